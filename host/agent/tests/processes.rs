//! Shims, scripts and applications over the death of the agent; time-outs; `stop-all`; budgets.

use std::{fs, path::PathBuf};

use rustix::process::Signal;
use windlass_agent::proc::{ProcessId, signal};
use windlass_domain::{
    task::{Action, Outcome, Restart},
    value::Value,
};

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_finds_its_script_again_and_the_exit_code_is_not_lost() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let log = agent.open_file("runs.log");
    let flag = agent.dir.path().join("go");
    let text = format!(
        "echo $WINDLASS_TASK >> {}; while [ ! -e {} ]; do sleep 0.02; done; echo done; exit 42",
        log.display(),
        flag.display()
    );
    // One that ends while an agent runs, one that ends while there is none.
    for ends_alone in [false, true] {
        fs::remove_file(&flag).ok();
        fs::write(&log, "").unwrap();
        let id = gateway.push(order.script(&text));
        until("the script", || (!lines(&log).is_empty()).then_some(())).await;
        for _ in 0..2 {
            agent.kill();
            agent.start();
            gateway.kick();
            gateway.connected().await;
        }
        if ends_alone {
            agent.kill();
            fs::write(&flag, "").unwrap();
            let status = agent
                .data()
                .join("runs")
                .join(id.to_string())
                .join("status.json");
            until("status", || status.exists().then_some(())).await;
            agent.start();
        } else {
            fs::write(&flag, "").unwrap();
        }
        let result = gateway.result(id).await;
        assert_eq!(
            (result.outcome, result.exit_code),
            (Outcome::Failed, Some(42)),
            "{result:?}"
        );
        assert_eq!(result.output, "done\n");
        assert_eq!(lines(&log), [id.to_string()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_keeps_its_process_over_ten_kills_of_the_agent() {
    let gateway = Gateway::start().await;
    gateway
        .state()
        .secrets
        .insert("key".into(), "s3cr3t-k3y".into());
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let mut start = order.start(&["/bin/sh", "-c", "echo up $KEY; exec sleep 600"]);
    start
        .env
        .insert("KEY".into(), Value::SecretRef("key".into()));
    let id = start.id;
    assert_eq!(gateway.run(start).await.outcome, Outcome::Succeeded);
    let pid = gateway
        .until("pid", |state| state.states.last()?.apps.first()?.pid)
        .await;
    for round in 0..10 {
        agent.kill();
        agent.start();
        let hellos = round + 2;
        let again = gateway
            .until("hello", |state| {
                (state.hellos.len() >= hellos)
                    .then(|| state.hellos.last()?.state.apps.first()?.pid)
                    .flatten()
            })
            .await;
        assert_eq!(again, pid, "round {round}");
        assert!(is_alive(pid));
    }
    let instance = agent
        .data()
        .join("instances")
        .join(order.instance.to_string());
    let output =
        fs::read_to_string(instance.join("apps").join(id.to_string()).join("output")).unwrap();
    assert_eq!(output, "up [secret]\n");

    // Killed from outside, it is started again; killed with its shim (as by a restart of the machine), too: with fresh secrets.
    signal(&ProcessId::of(pid).unwrap(), Signal::KILL);
    let next = gateway
        .until("another pid", |state| {
            let app = state.states.last()?.apps.first()?;
            (app.restarts == 1)
                .then_some(app.pid?)
                .filter(|next| *next != pid)
        })
        .await;
    agent.stop_all();
    assert!(!is_alive(next));
    gateway.state().states.clear();
    agent.start();
    let last = gateway
        .until("a third pid", |state| {
            state.states.last()?.apps.first()?.pid
        })
        .await;
    assert!(last != next && is_alive(last));
    assert_eq!(
        gateway.state().secrets_asked,
        [(order.instance, vec!["key".to_owned()])]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_that_is_never_restarted_stays_ended() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let mut start = order.start(&["/bin/sh", "-c", "exit 5"]);
    let Action::Start(supervise) = &mut start.action else {
        unreachable!()
    };
    supervise.restart = Restart::Never;
    assert_eq!(gateway.run(start).await.outcome, Outcome::Succeeded);
    let message = gateway
        .until("its end", |state| {
            Some(state.states.last()?.apps.first()?)
                .filter(|app| app.pid.is_none() && !app.message.is_empty())
                .map(|app| app.message.clone())
        })
        .await;
    assert!(message.contains("exit code 5"), "{message}");
    let start = order.start(&["/no/such/program"]);
    let result = gateway.run(start).await;
    assert_eq!(result.outcome, Outcome::Failed);
    assert!(
        result.message.contains("/no/such/program"),
        "{}",
        result.message
    );
}

/// The directory and the process of an instance's only shim.
fn shim_of(agent: &TestAgent, order: &Order) -> (PathBuf, ProcessId) {
    let apps = agent
        .data()
        .join("instances")
        .join(order.instance.to_string())
        .join("apps");
    let dir = fs::read_dir(apps).unwrap().next().unwrap().unwrap().path();
    let identity = fs::read(dir.join("identity.json")).unwrap();
    let identity: serde_json::Value = serde_json::from_slice(&identity).unwrap();
    let shim = serde_json::from_value(identity["shim"].clone()).unwrap();
    (dir, shim)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_when_the_machine_shuts_down_comes_back() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    for restart in [Restart::Always, Restart::Never] {
        let mut order = Order::new();
        let mut start = order.start(&["/bin/sleep", "600"]);
        let Action::Start(supervise) = &mut start.action else {
            unreachable!()
        };
        supervise.restart = restart;
        let pid_of = |state: &State| {
            let apps = &state.states.last()?.apps;
            apps.iter().find(|app| app.instance == order.instance)?.pid
        };
        assert_eq!(gateway.run(start).await.outcome, Outcome::Succeeded);
        let pid = gateway.until("its process", pid_of).await;
        agent.kill();
        // Everything is told to end; then the machine is another one.
        let (dir, shim) = shim_of(&agent, &order);
        let app = ProcessId::of(pid).unwrap();
        signal(&app, Signal::TERM);
        signal(&shim, Signal::TERM);
        until("both are gone", || {
            (!is_alive(pid) && !is_alive(shim.pid)).then_some(())
        })
        .await;
        let identity = dir.join("identity.json");
        let text = fs::read_to_string(&identity).unwrap();
        fs::write(&identity, text.replace(&shim.boot_id, "another boot")).unwrap();
        gateway.state().states.clear();
        agent.start();
        let again = gateway.until("its next process", pid_of).await;
        assert!(again != pid && is_alive(again));
    }

    // How a script ended that was told to go with the machine cannot be known.
    let mut order = Order::new();
    let log = agent.open_file("told.log");
    let id = gateway.push(order.script(&format!("echo up >> {}; sleep 600", log.display())));
    until("the script", || (!lines(&log).is_empty()).then_some(())).await;
    let run = agent.data().join("runs").join(id.to_string());
    let identity = fs::read(run.join("identity.json")).unwrap();
    let identity: serde_json::Value = serde_json::from_slice(&identity).unwrap();
    signal(
        &serde_json::from_value(identity["shim"].clone()).unwrap(),
        Signal::TERM,
    );
    let result = gateway.result(id).await;
    assert_eq!(result.outcome, Outcome::Unknown, "{result:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_that_cannot_be_started_again_is_not_given_up() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let mut order = Order::new();
    let program = agent.open_file("program");
    let away = program.with_extension("away");
    fs::copy("/bin/sleep", &program).unwrap();
    let start = order.start(&[program.to_str().unwrap(), "600"]);
    assert_eq!(gateway.run(start).await.outcome, Outcome::Succeeded);
    let app = |state: &State| state.states.last()?.apps.first().cloned();
    let mut pid = gateway.until("its process", |state| app(state)?.pid).await;
    // Its program is not there when it is started again: by its shim, and by the agent after a restart of the machine.
    for with_its_shim in [false, true] {
        fs::rename(&program, &away).unwrap();
        if with_its_shim {
            agent.stop_all();
            gateway.state().states.clear();
            agent.start();
        } else {
            signal(&ProcessId::of(pid).unwrap(), Signal::KILL);
        }
        let said = gateway
            .until("why it does not run", |state| {
                let app = app(state)?;
                (app.pid.is_none() && app.message.contains("program")).then_some(app.message)
            })
            .await;
        assert!(said.contains("it is started again in"), "{said}");
        fs::rename(&away, &program).unwrap();
        let next = gateway
            .until("its next process", |state| {
                app(state)?.pid.filter(|next| *next != pid)
            })
            .await;
        assert!(is_alive(next));
        pid = next;
    }
}

/// A tree that leaves its session twice; each process writes its number.
const TREE: &str = "
sh -c 'echo $$ >> $PIDS; sleep 600' &
setsid sh -c 'echo $$ >> $PIDS; (setsid sh -c \"echo \\$\\$ >> $PIDS; exec sleep 600\" &) ; exit 0'
echo $$ >> $PIDS
sleep 600
";

#[tokio::test(flavor = "multi_thread")]
async fn a_time_out_kills_the_whole_tree_with_and_without_cgroups_and_without_an_agent() {
    for (cgroups, agent_dies) in [(true, false), (false, false), (false, true)] {
        let gateway = Gateway::start().await;
        let mut agent = TestAgent::register(&gateway).await;
        agent.policy(|policy| policy.cgroups = cgroups);
        agent.start();
        // Where a v2 subtree can be written, it is used, and only where it is wanted.
        let possible = windlass_agent::proc::Cgroup::subtree(&agent.data()).is_some();
        gateway
            .until("the use of cgroups", |state| {
                (state.states.last()?.cgroups == (cgroups && possible)).then_some(())
            })
            .await;
        let pids = agent.open_file("pids");
        let mut order = Order::new();
        let mut task = order.script(TREE);
        task.timeout_ms = 1500;
        task.env
            .insert("PIDS".into(), Value::Plain(pids.display().to_string()));
        let id = gateway.push(task);
        until("four processes", || (lines(&pids).len() == 4).then_some(())).await;
        if agent_dies {
            agent.kill();
            let status = agent
                .data()
                .join("runs")
                .join(id.to_string())
                .join("status.json");
            until("status", || status.exists().then_some(())).await;
        } else {
            let result = gateway.result(id).await;
            assert_eq!(result.outcome, Outcome::TimedOut, "{result:?}");
            assert!(result.message.contains("1500 ms"), "{}", result.message);
        }
        for pid in lines(&pids) {
            assert!(
                !is_alive(pid.parse().unwrap()),
                "{pid} lives; cgroups: {cgroups}"
            );
        }
        if agent_dies {
            agent.start();
            assert_eq!(gateway.result(id).await.outcome, Outcome::TimedOut);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_ends_with_its_main_process_and_leaves_services_alone_and_stop_all_does_not() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    let pids = agent.open_file("pids");
    let mut order = Order::new();
    let mut task = order.script("(while :; do echo noise; sleep 0.1; done) & echo $! >> $PIDS; sleep 600 >/dev/null 2>&1 & echo $! >> $PIDS");
    task.env
        .insert("PIDS".into(), Value::Plain(pids.display().to_string()));
    let result = gateway.run(task).await;
    assert_eq!(result.outcome, Outcome::Succeeded, "{result:?}");
    let services: Vec<u32> = lines(&pids)
        .iter()
        .map(|pid| pid.parse().unwrap())
        .collect();
    assert!(services.iter().all(|pid| is_alive(*pid)));
    let start = order.start(&["/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done"]);
    assert_eq!(gateway.run(start).await.outcome, Outcome::Succeeded);
    let app = gateway
        .until("pid", |state| state.states.last()?.apps.first()?.pid)
        .await;
    gateway.push(Order::new().script("sleep 600"));
    gateway
        .until("a running script", |state| {
            (state.started.len() == 3).then_some(())
        })
        .await;
    let agent_pid = agent.pid();
    agent.stop_all();
    for pid in services.into_iter().chain([app, agent_pid]) {
        assert!(!is_alive(pid), "{pid}");
    }
    assert_eq!(agent.left_behind(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_agent_per_directory_and_within_its_memory() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    gateway.connected().await;
    let output = binary()
        .args(["run", "--data"])
        .arg(agent.data())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("another agent runs"), "{text}");
    assert_eq!(
        gateway.run(Order::new().script("true")).await.outcome,
        Outcome::Succeeded
    );
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(
        kib <= 15 * 1024 * if cfg!(debug_assertions) { 2 } else { 1 },
        "{kib} KiB resident"
    );
}
