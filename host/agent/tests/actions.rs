//! Each action, and what surrounds every script.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
};

use windlass_domain::{
    Timestamp,
    task::{Action, Check, Fault, Outcome, PackageFormat, Probe},
    value::Value,
};

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_script_runs_with_its_environment_and_its_result_is_whole() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start_with(&[("LEAK", "of the agent".into())]);
    let mut order = Order::new();
    let mut task = order
        .script("echo out; echo err >&2; echo \"GREETING=$GREETING\"; env | sort; pwd; exit 7");
    task.env.insert(
        "GREETING".into(),
        Value::Plain("it's $(date) \"x\"\nline".into()),
    );
    let result = gateway.run(task.clone()).await;
    assert_eq!(
        (result.outcome, result.exit_code),
        (Outcome::Failed, Some(7)),
        "{result:?}"
    );
    assert!(result.message.contains("exit code 7"), "{}", result.message);
    for part in [
        "out\n",
        "err\n",
        "GREETING=it's $(date) \"x\"\nline",
        "WINDLASS_DATA_DIR=/",
        "HOME=",
        "LANG=C.UTF-8",
    ] {
        assert!(result.output.contains(part), "{part}: {}", result.output);
    }
    assert!(
        result
            .output
            .contains(&format!("WINDLASS_INSTANCE={}", order.instance))
    );
    assert!(!result.output.contains("LEAK"), "{}", result.output);
    assert!(gateway.state().started.contains(&task.id));
    // The server has it: the run's directory goes.
    let run = agent.data().join("runs").join(task.id.to_string());
    until("removal of the run", || (!run.exists()).then_some(())).await;
    // Asked again, it is not run again.
    let again = gateway.run(task).await;
    assert_eq!(again.outcome, Outcome::Failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_start_says_why() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let mut task = order.script("true");
    let Action::Script(script) = &mut task.action else {
        unreachable!()
    };
    script.interpreter = vec!["/no/such/interpreter".into()];
    let result = gateway.run(task).await;
    assert_eq!(result.fault, Some(Fault::NoInterpreter), "{result:?}");
    assert!(
        result.message.contains("/no/such/interpreter"),
        "{result:?}"
    );

    let mut task = order.script("true");
    let Action::Script(script) = &mut task.action else {
        unreachable!()
    };
    script.working_dir = Some("/no/such/directory".into());
    let result = gateway.run(task).await;
    assert_eq!(result.fault, Some(Fault::NoDirectory), "{result:?}");
    assert!(result.message.contains("/no/such/directory"), "{result:?}");

    let mut task = order.script("true");
    task.run_as = Some("no-such-user".into());
    let result = gateway.run(task).await;
    assert_eq!(result.fault, Some(Fault::NoUser), "{result:?}");
    assert!(result.message.contains("`no-such-user`"), "{result:?}");

    let mut task = order.script("true");
    task.env
        .insert("X".into(), Value::SecretRef("missing".into()));
    let result = gateway.run(task).await;
    assert!(result.message.contains("`missing`"), "{result:?}");

    let mut task = order.script("true");
    task.expires_at = Timestamp::from_unix_ms(1000);
    let result = gateway.run(task).await;
    assert_eq!(
        (result.outcome, result.fault),
        (Outcome::Refused, Some(Fault::Expired))
    );
    assert!(result.message.contains("expired"), "{result:?}");

    let mut task = order.script("true");
    task.fence = 9;
    assert_eq!(gateway.run(task).await.outcome, Outcome::Succeeded);
    agent.kill();
    agent.start();
    let mut task = order.script("true");
    task.fence = 8;
    let result = gateway.run(task).await;
    assert_eq!(result.outcome, Outcome::Refused);
    assert!(
        result.message.contains("fence is 8") && result.message.contains("seen 9"),
        "{result:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn another_user_is_another_user() {
    if !is_root() {
        eprintln!("skipped: only root can run scripts as another user");
        return;
    }
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let mut task = order.script(
        "id -un; id -Gn; touch $WINDLASS_DATA_DIR/mine; cat /proc/self/status | grep CapEff",
    );
    task.run_as = Some("nobody".into());
    let result = gateway.run(task).await;
    assert_eq!(result.outcome, Outcome::Succeeded, "{result:?}");
    assert!(
        result.output.starts_with("nobody\nnogroup\n"),
        "{}",
        result.output
    );
    assert!(
        result.output.contains("CapEff:\t0000000000000000"),
        "{}",
        result.output
    );
    let mut task = order.script("true");
    task.run_as = Some("daemon".into());
    let result = gateway.run(task).await;
    assert!(
        result.message.contains("allow-list") && result.message.contains("nobody"),
        "{result:?}"
    );
    drop(agent);

    let mut agent = TestAgent::register(&gateway).await;
    agent.policy(|policy| policy.root = false);
    agent.start();
    let result = gateway.run(Order::new().script("true")).await;
    assert!(result.message.contains("policy.root"), "{result:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn data_is_handed_over_with_the_application() {
    use std::os::unix::fs::{MetadataExt as _, symlink};
    if !is_root() {
        eprintln!("skipped: only root can run scripts as another user");
        return;
    }
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let package = package(
        &gateway,
        b"#!/bin/sh\nexec sleep 600\n".to_vec(),
        PackageFormat::Plain,
        "app",
    );
    // Root's step came first, and root's application ran with its data.
    let prepare = "mkdir -p $WINDLASS_DATA_DIR/a/b; touch $WINDLASS_DATA_DIR/a/b/kept";
    let manifest = order.manifest("r1", &package);
    for step in [
        order.script(prepare),
        order.task(Action::Fetch(package.clone())),
        order.task(Action::Unpack {
            package: package.clone(),
            release: "r1".into(),
        }),
        order.task(Action::Activate(Box::new(manifest))),
        order.start(&["${WINDLASS_PACKAGE_FILE}"]),
    ] {
        assert_eq!(gateway.run(step).await.outcome, Outcome::Succeeded);
    }
    let data = agent
        .data()
        .join("instances")
        .join(order.instance.to_string())
        .join("data");
    let others = agent.open_file("of another");
    symlink(&others, data.join("a/link")).unwrap();
    std::fs::write(data.join("a/daemons"), "").unwrap();
    std::os::unix::fs::chown(data.join("a/daemons"), Some(1), Some(1)).unwrap();
    let owner = |path: &str| {
        let found = std::fs::symlink_metadata(data.join(path));
        found.unwrap().uid()
    };

    // With the next release it is somebody else's: not before that is the installed one.
    let manifest = order.manifest("r2", &package);
    let mut unpack = order.task(Action::Unpack {
        package: package.clone(),
        release: "r2".into(),
    });
    unpack.run_as = Some("nobody".into());
    assert_eq!(gateway.run(unpack).await.outcome, Outcome::Succeeded);
    assert_eq!(owner("a/b/kept"), 0);
    let stop = order.task(Action::StopSupervised { grace_ms: 1000 });
    assert_eq!(gateway.run(stop).await.outcome, Outcome::Succeeded);
    let mut activate = order.task(Action::Activate(Box::new(manifest)));
    activate.run_as = Some("nobody".into());
    assert_eq!(gateway.run(activate).await.outcome, Outcome::Succeeded);
    for path in [".", "a", "a/b", "a/b/kept", "a/link"] {
        assert_eq!(owner(path), NOBODY, "{path}");
    }
    assert_eq!(owner("a/daemons"), 1, "what is a third one's stays");
    assert_eq!(
        std::fs::metadata(&others).unwrap().uid(),
        0,
        "no link is followed"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_hidden_everywhere() {
    let gateway = Gateway::start().await;
    gateway
        .state()
        .secrets
        .insert("db".into(), "hunter2-hunter2".into());
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let mut task = order.script(
        "printf 'a %s b\\n' \"$PASSWORD\"; printf %s \"${PASSWORD%hunter2}\"; sleep 0.3; echo hunter2 end",
    );
    task.env
        .insert("PASSWORD".into(), Value::SecretRef("db".into()));
    gateway.state().hold_acks = true;
    let result = gateway.run(task.clone()).await;
    assert_eq!(result.outcome, Outcome::Succeeded, "{result:?}");
    assert_eq!(result.output, "a [secret] b\n[secret] end\n");
    until("live output", || {
        (gateway.state().output.get(&task.id) == Some(&result.output)).then_some(())
    })
    .await;
    agent.kill();
    // Nothing that the agent keeps holds it.
    let mut files = vec![agent.dir.path().to_owned()];
    let mut seen = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if path.is_file() {
            seen += 1;
            let content = fs::read(&path).unwrap();
            assert!(
                !content.windows(15).any(|part| part == b"hunter2-hunter2"),
                "{}",
                path.display()
            );
        }
    }
    assert!(seen > 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_is_fetched_unpacked_activated_started_checked_and_stopped() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let port = {
        std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port()
    };
    let program =
        b"#!/bin/sh\necho starting on $PORT\nexec python3 -m http.server --bind 127.0.0.1 $PORT\n"
            .to_vec();
    let package = package(&gateway, program, PackageFormat::Plain, "app");
    // The first download breaks off; it goes on from there.
    gateway.state().cut_download_after = Some(20);
    let fetch = order.task(Action::Fetch(package.clone()));
    assert_eq!(gateway.run(fetch).await.outcome, Outcome::Succeeded);
    assert_eq!(gateway.state().download_starts, [0, 20]);
    for (n, release) in ["r1", "r2", "r3"].into_iter().enumerate() {
        let mut steps = vec![
            order.task(Action::Unpack {
                package: package.clone(),
                release: release.into(),
            }),
            order.task(Action::WriteFile {
                path: "www/index.html".into(),
                content: format!("hello from {release}"),
                mode: 0o640,
            }),
            order.script(
                "test -x \"$WINDLASS_PACKAGE_FILE\"; test \"$PWD\" = \"$WINDLASS_RELEASE_DIR\"",
            ),
            order.task(Action::Activate(Box::new(order_manifest(
                &order, release, &package,
            )))),
        ];
        let mut start = order.start(&["${WINDLASS_PACKAGE_FILE}"]);
        let Action::Start(supervise) = &mut start.action else {
            unreachable!()
        };
        supervise.working_dir = Some("www".into());
        start
            .env
            .insert("PORT".into(), Value::Plain(port.to_string()));
        steps.push(start);
        let mut check = order.task(Action::Check(Check {
            probe: Probe::Http {
                url: "http://127.0.0.1:${PORT}/".into(),
                statuses: vec![],
                body_contains: Some(format!("hello from {release}")),
            },
            interval_ms: 50,
            try_timeout_ms: 1000,
            healthy_for_ms: 200,
        }));
        check
            .env
            .insert("PORT".into(), Value::Plain(port.to_string()));
        steps.push(check);
        let mut check = order.task(Action::Check(Check {
            probe: Probe::Tcp {
                address: format!("127.0.0.1:{port}"),
            },
            interval_ms: 50,
            try_timeout_ms: 1000,
            healthy_for_ms: 0,
        }));
        check.release = None;
        steps.push(check);
        for mut step in steps {
            step.release = Some(release.into());
            let what = step.action.clone();
            let result = gateway.run(step).await;
            assert_eq!(
                result.outcome,
                Outcome::Succeeded,
                "{release} {what:?}: {result:?}"
            );
        }
        let instance = agent
            .data()
            .join("instances")
            .join(order.instance.to_string());
        assert_eq!(
            fs::read_link(instance.join("current")).unwrap(),
            std::path::Path::new("releases").join(release)
        );
        let file = fs::metadata(instance.join("current/www/index.html")).unwrap();
        assert_eq!(file.permissions().mode() & 0o7777, 0o640);
        let mut releases: Vec<_> = fs::read_dir(instance.join("releases"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.ends_with(".json"))
            .collect();
        releases.sort();
        let expect: &[&str] = [&["r1"][..], &["r1", "r2"], &["r2", "r3"]][n];
        assert_eq!(releases, expect);
    }
    let pid = gateway
        .until("pid", |state| state.states.last()?.apps.first()?.pid)
        .await;
    assert!(is_alive(pid));
    let result = gateway
        .run(order.task(Action::StopSupervised { grace_ms: 3000 }))
        .await;
    assert_eq!(result.outcome, Outcome::Succeeded, "{result:?}");
    assert!(!is_alive(pid));
    let again = gateway
        .run(order.task(Action::StopSupervised { grace_ms: 3000 }))
        .await;
    assert_eq!(again.outcome, Outcome::Succeeded);
    // A check that fails says what it saw last.
    let mut check = order.task(Action::Check(Check {
        probe: Probe::Script(script("echo not yet; exit 3")),
        interval_ms: 20,
        try_timeout_ms: 1000,
        healthy_for_ms: 0,
    }));
    check.timeout_ms = 700;
    let result = gateway.run(check).await;
    assert_eq!(result.outcome, Outcome::TimedOut);
    assert!(
        result.message.contains("exit code 3") && result.message.contains("not yet"),
        "{}",
        result.message
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_tells_how_the_application_ended_and_what_it_said() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let start = order.start(&["/bin/sh", "-c", "echo boom at start >&2; exit 7"]);
    // It runs, if only for a moment.
    drop(gateway.run(start).await);
    let mut check = order.task(Action::Check(Check {
        probe: Probe::Tcp {
            address: "127.0.0.1:1".into(),
        },
        interval_ms: 50,
        try_timeout_ms: 1000,
        healthy_for_ms: 0,
    }));
    check.timeout_ms = 1500;
    let result = gateway.run(check).await;
    assert_eq!(result.outcome, Outcome::TimedOut);
    for says in ["has ended", "exit code 7", "boom at start"] {
        assert!(result.message.contains(says), "{says}: {}", result.message);
    }
    let stop = order.task(Action::StopSupervised { grace_ms: 1000 });
    assert_eq!(gateway.run(stop).await.outcome, Outcome::Succeeded);
}

fn order_manifest(
    order: &Order,
    release: &str,
    package: &windlass_domain::task::PackageRef,
) -> windlass_domain::manifest::Manifest {
    order.manifest(release, package)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_package_with_other_bytes_is_refused() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let package = package(
        &gateway,
        b"what was promised".to_vec(),
        PackageFormat::Plain,
        "app",
    );
    gateway
        .state()
        .blobs
        .insert(package.digest, b"something differs".to_vec());
    let result = gateway
        .run(order.task(Action::Fetch(package.clone())))
        .await;
    assert_eq!(result.outcome, Outcome::Failed);
    assert!(
        result.message.contains("SHA-256") && result.message.contains(&package.digest.to_string()),
        "{}",
        result.message
    );
    assert_eq!(fs::read_dir(agent.data().join("cache")).unwrap().count(), 0);
    let unpack = order.task(Action::Unpack {
        package,
        release: "r1".into(),
    });
    let result = gateway.run(unpack).await;
    assert!(
        result.message.contains("fetch it first"),
        "{}",
        result.message
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_written_only_where_they_may_be() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    let root = agent.dir.path().join("etc");
    fs::create_dir(&root).unwrap();
    agent.policy(|policy| policy.path_roots = vec![root.clone()]);
    agent.start();
    let mut order = Order::new();
    let mut write = |path: String| {
        order.task(Action::WriteFile {
            path,
            content: "x".into(),
            mode: 0o6755,
        })
    };
    let good = root.join("a/b.conf");
    let result = gateway.run(write(good.display().to_string())).await;
    assert_eq!(result.outcome, Outcome::Succeeded, "{result:?}");
    assert_eq!(fs::metadata(&good).unwrap().mode() & 0o7777, 0o755);
    std::os::unix::fs::symlink("/tmp", root.join("link")).unwrap();
    for (path, part) in [
        ("/etc/passwd.windlass".to_owned(), "policy.path_roots"),
        (format!("{}/../x", root.display()), "not a path"),
        (format!("{}/link/x", root.display()), "not a path"),
        ("relative".to_owned(), "not unpacked"),
    ] {
        let result = gateway.run(write(path.clone())).await;
        assert_eq!(result.outcome, Outcome::Failed, "{path}");
        assert!(result.message.contains(part), "{path}: {}", result.message);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_are_revoked_before_and_after_their_start_and_before_they_arrive() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let log = agent.open_file("runs.log");
    let first =
        gateway.push(order.script(&format!("echo one >> {}; exec sleep 600", log.display())));
    let second = gateway.push(order.script(&format!("echo two >> {}", log.display())));
    until("first line", || (lines(&log) == ["one"]).then_some(())).await;
    gateway
        .until("second accepted", |state| {
            state.accepted.contains(&second).then_some(())
        })
        .await;
    gateway.revoke(second);
    let result = gateway.result(second).await;
    assert_eq!(
        (result.outcome, result.started_at),
        (Outcome::Revoked, None)
    );
    gateway.revoke(first);
    let result = gateway.result(first).await;
    assert_eq!(result.outcome, Outcome::Revoked, "{result:?}");
    assert!(result.started_at.is_some());
    // A revoke that comes before its task.
    let late = order.script(&format!("echo late >> {}", log.display()));
    let revoke = windlass_protocol::ToAgent::Revoke { task_id: late.id };
    gateway.change(|state| state.raw.push(windlass_protocol::encode(&revoke).unwrap()));
    assert_eq!(gateway.result(late.id).await.outcome, Outcome::Revoked);
    let id = gateway.push_again(late);
    assert_eq!(gateway.result(id).await.outcome, Outcome::Revoked);
    assert_eq!(lines(&log), ["one"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn output_comes_live_and_is_bounded() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let flag = agent.dir.path().join("go");
    let task = order.script(&format!(
        "echo early; while [ ! -e {} ]; do sleep 0.02; done; i=0; while [ $i -lt 8000 ]; do echo line $i; i=$((i+1)); done",
        flag.display()
    ));
    let id = gateway.push(task);
    gateway
        .until("early output", |state| {
            state.output.get(&id)?.contains("early").then_some(())
        })
        .await;
    assert!(!gateway.state().results.contains_key(&id));
    fs::write(&flag, "").unwrap();
    let result = gateway.result(id).await;
    assert!(result.output.len() <= 24 * 1024 && result.dropped_bytes > 0);
    assert!(result.output.starts_with("early\nline 0\n") && result.output.ends_with("line 7999\n"));
    assert!(
        result
            .output
            .contains(&format!("{} bytes dropped", result.dropped_bytes))
    );
}

/// The user `nobody` on every Linux.
const NOBODY: u32 = 65534;

#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_user_has_its_own_directory_and_processes_and_nobody_elses() {
    let gateway = Gateway::start().await;
    let mut agent = if is_root() {
        TestAgent::register_as(&gateway, NOBODY).await
    } else {
        TestAgent::register(&gateway).await
    };
    agent.start();
    let own = gateway
        .until("facts", |state| {
            Some(state.states.last()?.facts.agent_user.clone())
        })
        .await;
    let mut order = Order::new();
    let package = package(
        &gateway,
        b"#!/bin/sh\nexec sleep 600\n".to_vec(),
        PackageFormat::Plain,
        "app",
    );
    let manifest = order.manifest("r1", &package);
    let steps = [
        order.task(Action::Fetch(package.clone())),
        order.task(Action::Unpack {
            package,
            release: "r1".into(),
        }),
        order.task(Action::Activate(Box::new(manifest))),
        order.start(&["${WINDLASS_PACKAGE_FILE}"]),
        order.script("id -u; touch $WINDLASS_DATA_DIR/mine; stat -c %u $WINDLASS_RELEASE_DIR"),
    ];
    let mut output = String::new();
    for step in steps {
        let result = gateway.run(step).await;
        assert_eq!(result.outcome, Outcome::Succeeded, "{result:?}");
        output = result.output;
    }
    let uid =
        std::fs::metadata(agent.data()).map(|meta| std::os::unix::fs::MetadataExt::uid(&meta));
    let uid = uid.unwrap();
    assert_eq!(output, format!("{uid}\n{uid}\n"));
    // Itself by name, but nobody else; the message says who it is and what helps.
    let mut task = order.script("true");
    task.run_as = Some(own.clone());
    assert_eq!(gateway.run(task).await.outcome, Outcome::Succeeded);
    for other in ["root", "daemon"] {
        let mut task = order.script("true");
        task.run_as = Some(other.into());
        let result = gateway.run(task).await;
        assert_eq!(result.outcome, Outcome::Failed, "{result:?}");
        assert!(
            result.message.contains(&format!("`{own}`"))
                && result.message.contains(&format!("`{other}`"))
                && result.message.contains("run the agent as root"),
            "{}",
            result.message
        );
    }
    let pid = gateway
        .until("pid", |state| state.states.last()?.apps.first()?.pid)
        .await;
    agent.stop_all();
    assert!(!is_alive(pid));
    assert_eq!(agent.left_behind(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_package_is_unpacked_by_its_user_with_no_more_rights() {
    if !is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    // Room for the bomb's refusal, and a reason that names the agent's own limit.
    agent.policy(|policy| policy.unpack_entries = 50);
    agent.start();
    let archive = |files: &[(String, &[u8])]| {
        let mut builder = tar::Builder::new(flate2::write::GzEncoder::new(
            Vec::new(),
            flate2::Compression::fast(),
        ));
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            // Past the builder's own checks.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_size(content.len() as u64);
            header.set_mode(0o750);
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    };
    let mut order = Order::new();
    let mut unpack = async |release: &str, files: &[(String, &[u8])]| {
        let package = package(&gateway, archive(files), PackageFormat::TarGz, "app.tar.gz");
        let mut fetch = order.task(Action::Fetch(package.clone()));
        fetch.run_as = Some("nobody".into());
        assert_eq!(gateway.run(fetch).await.outcome, Outcome::Succeeded);
        let mut unpack = order.task(Action::Unpack {
            package,
            release: release.into(),
        });
        unpack.run_as = Some("nobody".into());
        gateway.run(unpack).await
    };
    let good = [
        ("bin/app".to_owned(), &b"#!/bin/sh\n"[..]),
        ("conf".to_owned(), b"x"),
    ];
    let result = unpack("r1", &good).await;
    assert_eq!(result.outcome, Outcome::Succeeded, "{result:?}");
    let found = std::process::Command::new("find")
        .arg(agent.data().join("instances"))
        .args(["-path", "*/r1/*", "-printf", "%u %m %P\\n"])
        .output()
        .unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    assert!(
        found.contains("nobody 750 ") && found.contains("bin/app"),
        "{found}"
    );
    assert!(
        found.lines().all(|line| line.starts_with("nobody ")),
        "{found}"
    );
    // What is refused is told in the same words, whoever unpacks.
    let many: Vec<(String, &[u8])> = (0..60).map(|at| (format!("f{at}"), &b""[..])).collect();
    for (files, says) in [
        (
            vec![("../out".to_owned(), &b"x"[..])],
            "entry `../out` at byte 512: the path contains `..`",
        ),
        (
            vec![("a".to_owned(), b"x"), ("a".to_owned(), b"y")],
            "contains this path more than once",
        ),
        (
            many,
            "more than 50 files, directories and links, the limit; pack fewer (`policy.unpack_entries` of this agent)",
        ),
    ] {
        let result = unpack("r2", &files).await;
        assert_eq!(result.outcome, Outcome::Failed, "{result:?}");
        assert!(result.message.contains(says), "{}", result.message);
    }
    let left = std::process::Command::new("find")
        .arg(agent.data().join("instances"))
        .args(["-name", "r2", "-o", "-name", ".new-*", "-o", "-name", "out"])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8(left.stdout).unwrap(),
        "",
        "something is left"
    );
    agent.stop_all();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_is_revoked_or_too_late_leaves_no_try_behind() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let pids = agent.open_file("pids");
    for (revoke, expect) in [(true, Outcome::Revoked), (false, Outcome::TimedOut)] {
        std::fs::write(&pids, "").unwrap();
        let mut task = Order::new().task(Action::Check(Check {
            probe: Probe::Script(script(&format!("echo $$ >> {}; sleep 600", pids.display()))),
            interval_ms: 100,
            try_timeout_ms: 600_000,
            healthy_for_ms: 0,
        }));
        if !revoke {
            task.timeout_ms = 1000;
        }
        let id = gateway.push(task);
        until("a try", || (!lines(&pids).is_empty()).then_some(())).await;
        if revoke {
            gateway.revoke(id);
        }
        assert_eq!(gateway.result(id).await.outcome, expect);
        let pid = lines(&pids)[0].parse().unwrap();
        until("its end", || (!is_alive(pid)).then_some(())).await;
        until("its directory's end", || {
            let mut runs = std::fs::read_dir(agent.data().join("runs")).unwrap();
            runs.next().is_none().then_some(())
        })
        .await;
    }
}

/// Sets or clears the immutable flag of a file.
fn set_immutable(path: &std::path::Path, flag: &str) {
    let status = std::process::Command::new("chattr")
        .arg(flag)
        .arg(path)
        .status();
    assert!(
        status.unwrap().success(),
        "chattr {flag} {}",
        path.display()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_release_that_cannot_be_removed_is_a_warning_after_the_health_check() {
    if !is_root() {
        eprintln!("skipped: only root can make a file immutable");
        return;
    }
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let package = package(
        &gateway,
        b"#!/bin/sh\nexec sleep 600\n".to_vec(),
        PackageFormat::Plain,
        "app",
    );
    let instance = agent
        .data()
        .join("instances")
        .join(order.instance.to_string());
    let mut messages = Vec::new();
    for release in ["r1", "r2", "r3", "r4"] {
        let manifest = order.manifest(release, &package);
        let fetch = order.task(Action::Fetch(package.clone()));
        let unpack = order.task(Action::Unpack {
            package: package.clone(),
            release: release.into(),
        });
        let activate = order.task(Action::Activate(Box::new(manifest)));
        let check = order.task(Action::Check(Check {
            probe: Probe::Script(script("true")),
            interval_ms: 10,
            try_timeout_ms: 10_000,
            healthy_for_ms: 0,
        }));
        for task in [fetch, unpack, activate, check] {
            let result = gateway.run(task).await;
            assert_eq!(result.outcome, Outcome::Succeeded, "{release}: {result:?}");
            messages.push(result.message);
        }
        let linked = fs::read_link(instance.join("current")).unwrap();
        assert_eq!(linked, PathBuf::from(format!("releases/{release}")));
        if release == "r1" {
            // As a mount point or a file of somebody else would: it cannot be removed.
            let keep = instance.join("releases/r1/a/b");
            fs::create_dir_all(&keep).unwrap();
            fs::write(keep.join("immutable"), "").unwrap();
            set_immutable(&keep.join("immutable"), "+i");
        }
    }
    let warnings: Vec<&String> = messages.iter().filter(|text| !text.is_empty()).collect();
    let left: Vec<PathBuf> = fs::read_dir(instance.join("releases"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let is_pit = |path: &&PathBuf| path.to_string_lossy().contains("/.removing-");
    for pit in left.iter().filter(is_pit) {
        let mut dirs = vec![pit.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path);
                } else {
                    set_immutable(&path, "-i");
                }
            }
        }
    }
    // r3 and r4 both met it: it is tried again with each release.
    assert_eq!(warnings.len(), 2, "{messages:?}");
    for warning in warnings {
        assert!(
            warning.starts_with("warning:")
                && warning.contains("immutable")
                && warning.contains("Operation not permitted"),
            "{warning}"
        );
    }
    assert!(left.contains(&instance.join("releases/r3")), "{left:?}");
    assert!(!left.contains(&instance.join("releases/r1")), "{left:?}");
}
