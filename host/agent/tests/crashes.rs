//! The agent dies at every crash point; its journal is lost in every way; its disk is full.

use std::{fs, os::unix::process::ExitStatusExt as _, time::Duration};

use tokio::signal::unix::{SignalKind, signal};

use windlass_agent::clock;
use windlass_domain::{
    Timestamp,
    task::{Action, Outcome, PackageFormat},
};
use windlass_protocol::JournalState;

use crate::support::*;

/// A whole small release. Each script leaves one line. Says whether the agent died in it; it was started again then.
async fn release(gateway: &Gateway, agent: &mut TestAgent, env: &[(&str, String)]) -> bool {
    let log = agent.open_file("runs.log");
    let mut order = Order::new();
    let package = package(
        gateway,
        b"#!/bin/sh\necho app >> $LOG; exec sleep 600\n".to_vec(),
        PackageFormat::Plain,
        "app",
    );
    let line = |name: &str| format!("echo {name} >> {}", log.display());
    let manifest = order.manifest("r1", &package);
    let mut steps = vec![
        order.task(Action::Fetch(package.clone())),
        order.task(Action::Unpack {
            package,
            release: "r1".into(),
        }),
        order.script(&line("configure")),
        order.task(Action::Activate(Box::new(manifest))),
        order.start(&["${WINDLASS_PACKAGE_FILE}"]),
        order.script(&format!("{}; exit 3", line("check"))),
        order.task(Action::StopSupervised { grace_ms: 2000 }),
    ];
    for step in &mut steps {
        step.release = Some("r1".into());
        step.env.insert(
            "LOG".into(),
            windlass_domain::value::Value::Plain(log.display().to_string()),
        );
    }
    // Wakes whoever waits when an agent ends, this one or another's.
    let mut ended = signal(SignalKind::child()).unwrap();
    agent.start_with(env);
    let mut crashed = None;
    for step in steps {
        let last = matches!(step.action, Action::StopSupervised { .. });
        let fails =
            matches!(&step.action, Action::Script(script) if script.text.contains("exit 3"));
        let id = gateway.push(step);
        let deadline = tokio::time::Instant::now() + DEADLINE;
        let result = loop {
            let changed = gateway.next_change();
            // Whoever crashed is started again, without the wish to.
            if let Some(status) = agent.ended() {
                assert_eq!(status.signal(), Some(9), "{status}");
                crashed = Some(gateway.state().hellos.len());
                agent.start();
            }
            if let Some(result) = gateway.state().results.get(&id).cloned() {
                break result;
            }
            tokio::select! {
                () = changed => {}
                _ = ended.recv() => {}
                () = tokio::time::sleep_until(deadline) => {
                    panic!("{id} has no result {env:?}; the agent's log:\n{}", agent.log())
                }
            }
        };
        let expect = if fails {
            Outcome::Failed
        } else {
            Outcome::Succeeded
        };
        assert_eq!(result.outcome, expect, "{result:?} {env:?}");
        if fails {
            assert_eq!(result.exit_code, Some(3), "{env:?}");
        }
        if last && crashed.is_none() && !env.is_empty() {
            // The crash may be in what follows the last result.
            let died = tokio::time::timeout(Duration::from_millis(500), async {
                while agent.ended().is_none() {
                    ended.recv().await;
                }
            });
            if died.await.is_ok() {
                crashed = Some(gateway.state().hellos.len());
                agent.start();
            }
        }
    }
    if let Some(sessions) = crashed {
        // An agent that has just been started may not have its lock yet, and is not to be left behind.
        gateway
            .until("session of the agent that was started again", |state| {
                (state.hellos.len() > sessions).then_some(())
            })
            .await;
    }
    let mut ran = lines(&log);
    ran.sort();
    assert_eq!(ran, ["app", "check", "configure"], "{env:?}");
    crashed.is_some()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_doubled_or_lost_at_any_crash_point() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    let log = agent.dir.path().join("points");
    let died = release(
        &gateway,
        &mut agent,
        &[("WINDLASS_CRASH_LOG", log.display().to_string())],
    )
    .await;
    assert!(!died);
    let points = lines(&log);
    drop(agent);
    assert!(points.len() > 60, "{points:?}");
    for name in [
        "before_journal",
        "after_journal",
        "before_shim",
        "after_shim",
        "before_result",
        "after_result",
        "before_send",
        "after_send",
        "before_ack",
        "after_ack",
        "app_recorded",
        "activate_switched",
    ] {
        assert!(
            points.iter().any(|point| point == name),
            "{name} is not passed"
        );
    }
    // Eight at a time: most of it is waiting for reconnects.
    let began = std::time::Instant::now();
    let next = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(1));
    let missed = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (next, missed, last) = (next.clone(), missed.clone(), points.len());
        workers.spawn(async move {
            loop {
                let point = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if point > last {
                    return;
                }
                let gateway = Gateway::start().await;
                let mut agent = TestAgent::register(&gateway).await;
                let died = release(
                    &gateway,
                    &mut agent,
                    &[("WINDLASS_CRASH_AT", point.to_string())],
                )
                .await;
                if !died {
                    missed.lock().unwrap().push(point);
                }
                // Ending everything blocks; the gateways of the others live on these threads.
                tokio::task::block_in_place(|| drop(agent));
            }
        });
    }
    while let Some(done) = workers.join_next().await {
        done.unwrap();
    }
    let missed = std::mem::take(&mut *missed.lock().unwrap());
    eprintln!(
        "{} points in {:?}, not reached: {missed:?}",
        points.len(),
        began.elapsed()
    );
    // How often the agent says how it is differs from run to run, so the last numbers may not be reached.
    assert!(
        missed.len() <= 3,
        "points {missed:?} of {} were not reached",
        points.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_journal_means_unknown_and_nothing_runs_again() {
    type Harm = fn(&std::path::Path);
    let harms: [(&str, Harm); 3] = [
        ("deleted", |path| fs::remove_file(path).unwrap()),
        ("truncated", |path| {
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(file.metadata().unwrap().len() / 2 + 100)
                .unwrap();
        }),
        ("corrupted", |path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[200] ^= 1;
            fs::write(path, bytes).unwrap();
        }),
    ];
    for (name, harm) in harms {
        let gateway = Gateway::start().await;
        let mut agent = TestAgent::register(&gateway).await;
        agent.start();
        let log = agent.open_file("runs.log");
        let mut order = Order::new();
        let app = order.start(&["/bin/sleep", "600"]);
        assert_eq!(gateway.run(app).await.outcome, Outcome::Succeeded);
        let pid = gateway
            .until("pid", |state| state.states.last()?.apps.first()?.pid)
            .await;
        let task = order.script(&format!("echo $$ >> {}; sleep 600", log.display()));
        let queued = order.script(&format!("echo queued >> {}", log.display()));
        let (running, queued) = (gateway.push(task.clone()), gateway.push(queued));
        until("the script", || (!lines(&log).is_empty()).then_some(())).await;
        gateway
            .until("queued", |state| {
                state.accepted.contains(&queued).then_some(())
            })
            .await;
        let epoch = gateway.state().hellos.last().unwrap().epoch;
        agent.kill();
        harm(&agent.data().join("journal"));
        agent.start();
        for id in [running, queued] {
            assert_eq!(gateway.result(id).await.outcome, Outcome::Unknown, "{name}");
        }
        let hello = gateway.state().hellos.last().unwrap().clone();
        assert_ne!(hello.epoch, epoch);
        match (&hello.state.journal, name) {
            (JournalState::Created, "deleted") => {}
            (JournalState::Replaced { kept_as, .. }, _) => assert!(fs::metadata(kept_as).is_ok()),
            (state, _) => panic!("{name}: {state:?}"),
        }
        // What ran behind the journal's back was ended; the application was not.
        let script: u32 = lines(&log)[0].parse().unwrap();
        until("end of the script", || (!is_alive(script)).then_some(())).await;
        assert_eq!(hello.state.apps[0].pid, Some(pid));
        assert!(is_alive(pid));
        // Pushed once more by mistake, it is still not run.
        gateway.push_again(task);
        let result = gateway.result(running).await;
        assert_eq!(result.outcome, Outcome::Unknown, "{result:?}");
        assert_eq!(lines(&log).len(), 1, "{name}");
        // And the agent works on.
        assert_eq!(
            gateway.run(order.script("true")).await.outcome,
            Outcome::Succeeded
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_interrupted_before_it_acted_does_not_run_too_late() {
    const LATE_MS: u32 = 1500;
    for (by_expiry, expect) in [(true, Outcome::Refused), (false, Outcome::TimedOut)] {
        let gateway = Gateway::start().await;
        let mut agent = TestAgent::register(&gateway).await;
        agent.start_with(&[("WINDLASS_CRASH_AT", "before_shim:1".into())]);
        gateway.connected().await;
        let log = agent.open_file("runs.log");
        let mut task = Order::new().script(&format!("echo ran >> {}", log.display()));
        let too_late = Timestamp::from_unix_ms(clock::now().unix_ms() + i64::from(LATE_MS));
        if by_expiry {
            task.expires_at = too_late;
        } else {
            task.timeout_ms = LATE_MS.into();
        }
        let id = gateway.push(task);
        let status = until("the crash", || agent.ended()).await;
        assert_eq!(status.signal(), Some(9));
        until("its time", || {
            (clock::now().since_ms(too_late) > 100).then_some(())
        })
        .await;
        agent.start();
        let result = gateway.result(id).await;
        assert_eq!(result.outcome, expect, "{result:?}");
        assert_eq!(lines(&log), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_said_and_can_be_freed() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = is_root()
        && std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8m,mode=711", "windlass-test"])
            .arg(dir.path())
            .status()
            .is_ok_and(|status| status.success());
    if !mounted {
        eprintln!("skipped: only root can mount a small file system");
        return;
    }
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let status = std::process::Command::new("umount")
                .arg("-l")
                .arg(&self.0)
                .status();
            assert!(status.is_ok_and(|status| status.success()) || std::thread::panicking());
        }
    }
    let _unmount = Unmount(dir.path().to_owned());
    let gateway = Gateway::start().await;
    let place = tempfile::tempdir_in(dir.path()).unwrap();
    let mut agent = TestAgent::register_at(&gateway, gateway.port, place).await;
    agent.policy(|policy| policy.min_free_bytes = 512 << 10);
    agent.start();
    gateway.connected().await;
    let mut order = Order::new();
    assert_eq!(
        gateway.run(order.script("true")).await.outcome,
        Outcome::Succeeded
    );
    // Filled to the last byte, and the agent started on it.
    let ballast = dir.path().join("ballast");
    let fill = || {
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&ballast)
            .unwrap();
        for size in [65536, 4096, 512, 1] {
            while std::io::Write::write_all(&mut file, &vec![1; size]).is_ok() {}
        }
    };
    fill();
    agent.kill();
    agent.start();
    gateway
        .until("a full disk", |state| {
            state.states.last()?.disk.full.then_some(())
        })
        .await;
    let write = order.task(Action::Fetch(package(
        &gateway,
        b"x".to_vec(),
        PackageFormat::Plain,
        "x",
    )));
    let result = gateway.run(write).await;
    assert_eq!(result.outcome, Outcome::Refused);
    assert!(
        result.message.contains("full") && result.message.contains("524288"),
        "{}",
        result.message
    );
    let free = order.script(&format!("rm {}; echo freed", ballast.display()));
    let result = gateway.run(free).await;
    assert_eq!(
        (result.outcome, result.output.as_str()),
        (Outcome::Succeeded, "freed\n"),
        "{result:?}"
    );
    gateway
        .until("a free disk", |state| {
            (!state.states.last()?.disk.full).then_some(())
        })
        .await;
    // A disk that fills up under a running script does not cost its exit code.
    let flag = dir.path().join("go");
    let id = gateway.push(order.script(&format!(
        "while [ ! -e {} ]; do sleep 0.02; done; exit 9",
        flag.display()
    )));
    gateway
        .until("start", |state| state.started.contains(&id).then_some(()))
        .await;
    let status = agent
        .data()
        .join("runs")
        .join(id.to_string())
        .join("identity.json");
    until("the script", || {
        fs::read_to_string(&status)
            .ok()
            .filter(|text| text.contains("\"main\":{"))
            .map(|_| ())
    })
    .await;
    fs::write(&flag, "").ok();
    fill();
    let result = gateway.result(id).await;
    assert_eq!(
        (result.outcome, result.exit_code),
        (Outcome::Failed, Some(9)),
        "{result:?}"
    );
    agent.stop_all();
}
