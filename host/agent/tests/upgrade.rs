//! The agent's binary is replaced while an application and a script run.

use std::fs;

use windlass_agent::proc::{self, ProcessId};
use windlass_domain::{Timestamp, task::Outcome};

use crate::support::*;

/// What the newest state says of the only application: its process and since when it runs.
async fn app_after(gateway: &Gateway, hellos: usize) -> (ProcessId, Timestamp) {
    let (pid, since) = gateway
        .until("the application's state", |state| {
            let app = state.states.last()?.apps.first()?;
            (state.hellos.len() > hellos).then(|| Some((app.pid?, app.since?)))?
        })
        .await;
    (ProcessId::of(pid).unwrap(), since)
}

#[tokio::test(flavor = "multi_thread")]
async fn another_binary_takes_over_what_runs() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    // The old and the new binary are files of their own; the new one has another name, directory and content.
    let old = agent.dir.path().join("windlass-agent");
    let new = agent.dir.path().join("versions/2.0/successor");
    fs::create_dir_all(new.parent().unwrap()).unwrap();
    fs::copy(binary_path(), &old).unwrap();
    fs::copy(binary_path(), &new).unwrap();
    let mut end = fs::OpenOptions::new().append(true).open(&new).unwrap();
    std::io::Write::write_all(&mut end, b"a later version").unwrap();
    drop(end);
    agent.program = old.clone();
    agent.start();

    let mut order = Order::new();
    let start = order.start(&["/bin/sh", "-c", "exec sleep 600"]);
    assert_eq!(gateway.run(start).await.outcome, Outcome::Succeeded);
    let app = app_after(&gateway, 0).await;
    let (ticks, flag) = (agent.open_file("ticks"), agent.dir.path().join("go"));
    let mut other = Order::new();
    let script = gateway.push(other.script(&format!(
        "echo $$ >> {}; while [ ! -e {} ]; do sleep 0.05; done; echo went on; exit 17",
        ticks.display(),
        flag.display()
    )));
    until("the script", || (!lines(&ticks).is_empty()).then_some(())).await;
    let process = ProcessId::of(lines(&ticks)[0].parse().unwrap()).unwrap();

    for round in 0..10 {
        let hellos = gateway.state().hellos.len();
        agent.kill();
        if round == 5 {
            // As a package manager does it: the old file is gone while shims still run from it.
            fs::remove_file(&old).unwrap();
            agent.program = new.clone();
        }
        agent.start();
        assert_eq!(app_after(&gateway, hellos).await, app, "round {round}");
        assert!(app.0.is_alive() && process.is_alive(), "round {round}");
    }
    let running = fs::read_link(format!("/proc/{}/exe", agent.pid())).unwrap();
    assert_eq!(running, new.canonicalize().unwrap());
    fs::write(&flag, "").unwrap();
    let result = gateway.result(script).await;
    assert_eq!(
        (result.outcome, result.exit_code, result.output.as_str()),
        (Outcome::Failed, Some(17), "went on\n"),
        "{result:?}"
    );
    assert_eq!(lines(&ticks).len(), 1);

    // A shim of the old binary still restarts its application, and obeys the new agent.
    proc::signal(&app.0, rustix::process::Signal::KILL);
    let again = gateway
        .until("a restart", |state| {
            let app = state.states.last()?.apps.first()?;
            (app.restarts == 1).then_some(app.pid)?
        })
        .await;
    assert!(is_alive(again));
    // The new agent's own work, and the end of everything, whatever the binary is called.
    let result = gateway.run(order.script("echo new")).await;
    assert_eq!(result.output, "new\n");
    let pid = agent.pid();
    agent.stop_all();
    assert!(!is_alive(again) && !is_alive(pid));
    assert_eq!(agent.left_behind(), []);
}
