//! Connections that break anywhere, platforms that are somebody else, and messages of later versions.

use windlass_domain::task::{Action, Outcome, PackageFormat};
use windlass_protocol::{ActivationCode, Fingerprint, Goodbye, GoodbyeReason, ToAgent, encode};

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_cut_anywhere_costs_nothing() {
    let gateway = Gateway::start().await;
    let proxy = Proxy::start(gateway.port).await;
    let mut agent =
        TestAgent::register_at(&gateway, proxy.port, tempfile::tempdir().unwrap()).await;
    agent.start();
    gateway.connected().await;
    let log = agent.open_file("runs.log");
    let mut order = Order::new();
    let mut expect = Vec::new();
    // Through the TLS handshake, the upgrade, challenge, hello, welcome, push, accepted, started, result and acknowledgement.
    let cuts = (0..4200).step_by(300).flat_map(|after| {
        [true, false].map(|towards_agent| Cut {
            towards_agent,
            after: after + 1,
        })
    });
    for cut in cuts {
        let sessions = gateway.state().hellos.len();
        let task = order.script(&format!("echo $WINDLASS_TASK >> {}", log.display()));
        expect.push(task.id.to_string());
        proxy.cut_next(cut);
        gateway.kick();
        let id = gateway.push(task);
        let result = gateway.result(id).await;
        assert_eq!(result.outcome, Outcome::Succeeded, "{cut:?} {result:?}");
        assert!(!proxy.is_armed(), "{cut:?} after {sessions} sessions");
    }
    assert_eq!(lines(&log), expect);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_platform_with_another_key_gets_nothing() {
    let gateway = Gateway::start().await;
    let dir = tempfile::tempdir().unwrap();
    let code = ActivationCode::new([7; 16], Fingerprint::of_key(b"another key"));
    let register = |code: &str| {
        let mut command = binary();
        command.args([
            "register",
            "--server",
            &format!("https://127.0.0.1:{}", gateway.port),
            "--code",
            code,
        ]);
        command.arg("--data").arg(dir.path().join("agent"));
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    let output = register(&code.print()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && text.contains(&code.fingerprint().to_string()),
        "{text}"
    );
    // The right platform, but a code that it does not know.
    let code = ActivationCode::new([7; 16], gateway.fingerprint);
    let output = register(&code.print()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("403") && text.contains("activation_code_unknown"),
        "{text}"
    );
    let output = register("wl1-nonsense").await.unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("copy the whole code"), "{text}");
    assert!(!dir.path().join("agent/config.json").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn later_versions_and_the_end_of_a_registration() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    gateway.connected().await;
    gateway.change(|state| {
        state
            .raw
            .push("{\"kind\":\"teleport\",\"where\":\"mars\"}".into())
    });
    gateway
        .until("answer", |state| {
            (state.unsupported == ["teleport"]).then_some(())
        })
        .await;
    assert_eq!(
        gateway.run(Order::new().script("true")).await.outcome,
        Outcome::Succeeded
    );
    let goodbye = ToAgent::Goodbye(Goodbye {
        reason: GoodbyeReason::Deregistered,
        message: "removed".into(),
    });
    gateway.change(|state| state.raw.push(encode(&goodbye).unwrap()));
    let status = until("the agent's end", || agent.ended()).await;
    assert_eq!(status.code(), Some(79));
    agent.start();
    let status = until("the agent's second end", || agent.ended()).await;
    assert_eq!(status.code(), Some(79));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_goes_on_with_the_grant_of_the_next_session() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    gateway.connected().await;
    let mut order = Order::new();
    let package = package(&gateway, vec![7; 100_000], PackageFormat::Plain, "app");
    gateway.state().cut_download_after = Some(60_000);
    let id = gateway.push(order.task(Action::Fetch(package)));
    gateway
        .until("half a download", |state| {
            (!state.download_starts.is_empty()).then_some(())
        })
        .await;
    gateway.kick();
    let result = gateway.result(id).await;
    assert_eq!(result.outcome, Outcome::Succeeded, "{result:?}");
    assert_eq!(gateway.state().download_starts, [0, 60_000]);
}
