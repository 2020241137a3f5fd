//! What a failure leaves for what comes after it, with real agents: weights, rollbacks, texts that came from outside.

use serde_json::{Value, json};
use windlass_tests::{
    host::{Setup, TestHost, eventually, text},
    scene::{Scene, act, nodes, refusal},
};

async fn run(host: &TestHost, mut order: Value) -> String {
    order["run"] = true.into();
    host.order(&order).await.expect("an order")
}

async fn roll_back(host: &TestHost, order: &str) -> (u16, String, String) {
    let action = json!({ "action": "roll_back", "reason": "second thoughts" });
    refusal(act(host, order, &action).await)
}

#[tokio::test]
async fn an_order_that_failed_does_no_harm_to_later_ones() {
    let mut host = TestHost::start(Setup {
        agents: 2,
        ..Setup::default()
    })
    .await;
    let scene = Scene::prepare(&host).await;
    nothing_to_go_back_to_ends_nothing(&host, &scene).await;
    the_next_release_gives_the_weight_back(&host, &scene).await;
    a_superseded_order_is_not_rolled_back(&host, &scene).await;
    a_rollback_waits_for_what_passes(&host, &scene).await;
    an_odd_archive_harms_nobody(&host, &scene).await;
    progress_says_what_broke(&host, &scene).await;
    a_server_that_is_away_keeps_no_other_from_going_back(&mut host, &scene).await;
    reasons_have_a_length(&host, &scene).await;
    host.stop().await;
}

async fn nothing_to_go_back_to_ends_nothing(host: &TestHost, scene: &Scene) {
    scene.put("fail-agent-1");
    let order = run(host, scene.order("first of all", 0)).await;
    host.order_in(&order, &["blocked"]).await;
    let refused = roll_back(host, &order).await;
    assert_eq!(
        (refused.0, refused.1.as_str()),
        (409, "nothing_to_roll_back_to"),
        "{refused:?}"
    );
    scene.take("fail-agent-1");
    act(host, &order, &json!({ "action": "retry", "node": 0 }))
        .await
        .expect("it was not ended");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    scene.check_serves(host, 0).await;
}

async fn the_next_release_gives_the_weight_back(host: &TestHost, scene: &Scene) {
    for _ in 0..2 {
        let order = run(host, scene.order("broken", 2)).await;
        host.order_in(&order, &["blocked"]).await;
        act(host, &order, &json!({ "action": "cancel" }))
            .await
            .expect("it is ended");
        host.order_ended(&order).await;
        assert_eq!(
            scene.weight(host, &scene.servers[0].1).await,
            0,
            "what is broken stays without traffic"
        );
    }
    // An order that ends before it has changed the server leaves it as it found it.
    scene.put("hold");
    let order = run(host, scene.order("second thoughts", 1)).await;
    scene.wait_begun(1).await;
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("it is ended");
    host.order_ended(&order).await;
    scene.take("hold");
    scene.forget();
    assert_eq!(
        scene.weight(host, &scene.servers[0].1).await,
        0,
        "what an earlier order broke stays without traffic"
    );
    // Checks the weights.
    scene.release(host, 1).await;
}

async fn a_superseded_order_is_not_rolled_back(host: &TestHost, scene: &Scene) {
    let earlier = run(host, scene.order("earlier", 0)).await;
    assert_eq!(host.order_ended(&earlier).await["state"], "succeeded");
    scene.release(host, 1).await;
    scene.forget();
    let refused = roll_back(host, &earlier).await;
    assert_eq!(
        (refused.0, refused.1.as_str()),
        (409, "order_superseded"),
        "{refused:?}"
    );
    assert!(refused.2.contains("2.0.0"), "{refused:?}");
    assert_eq!(scene.log(), Vec::<String>::new(), "no server was touched");
}

async fn a_rollback_waits_for_what_passes(host: &TestHost, scene: &Scene) {
    scene.put("hold");
    let mut order = scene.order("auto rollback", 2);
    order["parameters"] = json!({ "grouping": "one-per-group", "auto_rollback": true });
    let order = run(host, order).await;
    scene.wait_begun(1).await;
    let (blobs, away) = (host.data().join("blobs"), host.data().join("blobs-away"));
    std::fs::rename(&blobs, &away).expect("the blobs are away");
    scene.take("hold");
    eventually("the rollback cannot be planned", || async {
        let log = host.server_log();
        if log.contains("a rollback cannot be planned now") {
            Ok(())
        } else {
            Err(String::new())
        }
    })
    .await;
    std::fs::rename(&away, &blobs).expect("the blobs are back");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "rolled_back", "{ended}");
    scene.check_serves(host, 1).await;
}

async fn an_odd_archive_harms_nobody(host: &TestHost, scene: &Scene) {
    let long = |start: &[u8]| [start, &[0xff; 40_000]].concat();
    for (version, name) in [("9.0.0", long(b"")), ("9.0.1", long(b"a"))] {
        let path = host.ws(&format!(
            "packages?app=scene&version={version}&file_name=scene.tar.gz"
        ));
        let (status, code, detail) = refusal(host.api.upload(&path, archive(&name)).await);
        assert_eq!(
            (status, code.as_str()),
            (422, "package_refused"),
            "{detail}"
        );
        assert!(
            detail.len() <= 4096 && detail.contains("the name is not UTF-8"),
            "{detail}"
        );
    }
    assert!(!host.server_log().contains("panicked"));
    scene.check_serves(host, 1).await;
}

/// A rollback that was ended before it was done is made again, and one server's agent that is away holds up that server alone.
async fn a_server_that_is_away_keeps_no_other_from_going_back(host: &mut TestHost, scene: &Scene) {
    scene.forget();
    let mut order = scene.order("to go back", 0);
    // A server that is away serves nobody: whoever wants to go on without it has to allow it.
    order["limits"] = json!({ "max_unavailable": "100%", "min_healthy_members": 0 });
    let order = run(host, order).await;
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    host.kill_agent(1);
    let back = json!({ "action": "roll_back", "reason": "second thoughts" });
    let locked = async |rollback: &str| {
        let blocked = host.order_in(rollback, &["blocked"]).await;
        let reason = text(&blocked["state_reason"]);
        assert!(
            reason.contains("agent-2 is not connected: unlock it"),
            "{reason}"
        );
        assert_eq!(blocked["counts"]["succeeded"], 1, "{blocked}");
        assert_eq!(
            scene.installed_on(&host.agents[0]).as_deref(),
            Some("2.0.0")
        );
    };
    let first = act(host, &order, &back).await.expect("a rollback");
    let first = text(&first["id"]);
    locked(&first).await;
    act(host, &first, &json!({ "action": "cancel" }))
        .await
        .expect("it is ended");
    host.order_ended(&first).await;
    // What is back already is left alone.
    let second = act(host, &order, &back).await.expect("another rollback");
    let second = text(&second["id"]);
    let waiting = host.order_in(&second, &["blocked"]).await;
    assert_eq!(waiting["server_count"], 1, "{waiting}");
    host.start_agent(1, &[]);
    host.wait_online().await;
    let seen = nodes(host, &second).await;
    let server = seen.iter().find(|node| node["level"] == "server");
    let unlock = json!({ "action": "unlock", "node": server.expect("a server")["node"] });
    act(host, &second, &unlock).await.expect("unlocked");
    assert_eq!(host.order_ended(&second).await["state"], "succeeded");
    let refused = roll_back(host, &order).await;
    assert_eq!(
        (refused.0, refused.1.as_str()),
        (409, "already_rolled_back"),
        "{refused:?}"
    );
    scene.check_serves(host, 1).await;
}

async fn progress_says_what_broke(host: &TestHost, scene: &Scene) {
    scene.put("fail-agent-1");
    let order = run(host, scene.order("to be ended", 1)).await;
    host.order_in(&order, &["blocked"]).await;
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("it is ended");
    let ended = host.order_ended(&order).await;
    scene.take("fail-agent-1");
    let progress = host.ws(&format!("orders/{order}/progress"));
    let progress = host.api.get(&progress).await.expect("progress");
    assert_eq!(
        progress["servers"],
        json!({ "failed": 1, "cancelled": 1 }),
        "{progress}"
    );
    let application = &progress["applications"][0];
    let (first, second) = (&application["groups"][0], &application["groups"][1]);
    let node = application["node"].clone();
    let seen = nodes(host, &order).await;
    let node = seen.iter().find(|seen| seen["node"] == node);
    let node = node.expect("the application's node");
    assert_eq!(
        (&node["level"], &node["name"]),
        (&json!("application"), &json!("scene"))
    );
    for (what, is) in [
        (application, "failed"),
        (first, "failed"),
        (&first["servers"][0], "failed"),
        (second, "cancelled"),
        (&second["servers"][0], "cancelled"),
    ] {
        assert_eq!(what["state"], is, "{what}");
    }
    assert_eq!(first["servers"][0]["step"], "configure", "{first}");
    // What was begun has an end, and what was not has none.
    for what in [application, first, &first["servers"][0]] {
        assert!(
            what["started_at"].is_string() && what["finished_at"].is_string(),
            "{what}"
        );
    }
    for what in [second, &second["servers"][0]] {
        assert!(
            what["started_at"].is_null() && what["finished_at"].is_null(),
            "{what}"
        );
    }
    assert!(text(&application["finished_at"]) <= text(&ended["finished_at"]));

    // A step that was under way when a person ended the order is named.
    scene.forget();
    scene.put("hold");
    let order = run(host, scene.order("to be cut off", 1)).await;
    scene.wait_begun(1).await;
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("it is ended");
    host.order_ended(&order).await;
    scene.take("hold");
    scene.forget();
    let progress = host.ws(&format!("orders/{order}/progress"));
    let progress = host.api.get(&progress).await.expect("progress");
    let server = &progress["applications"][0]["groups"][0]["servers"][0];
    assert_eq!(
        (&server["state"], &server["step"]),
        (&json!("cancelled"), &json!("configure")),
        "{server}"
    );
    assert!(server["finished_at"].is_string(), "{server}");
}

/// An archive with one file of this name, written as GNU tar writes long ones.
fn archive(name: &[u8]) -> bytes::Bytes {
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut archive = tar::Builder::new(gzip);
    let mut entry = |kind, short: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.as_mut_bytes()[..short.len()].copy_from_slice(short.as_bytes());
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        archive.append(&header, content).expect("it is packed");
    };
    entry(tar::EntryType::GNULongName, "././@LongLink", name);
    entry(tar::EntryType::Regular, "short", b"x");
    archive
        .into_inner()
        .and_then(flate2::write::GzEncoder::finish)
        .expect("the archive")
        .into()
}

async fn reasons_have_a_length(host: &TestHost, scene: &Scene) {
    scene.put("hold");
    let order = run(host, scene.order("reasons", 0)).await;
    scene.wait_begun(1).await;
    let lock = |reason: String| json!({ "action": "lock", "node": 1, "reason": reason });
    let roll_back = |reason: String| json!({ "action": "roll_back", "reason": reason });
    for action in [lock("x".repeat(501)), roll_back("ä".repeat(501))] {
        let refused = refusal(act(host, &order, &action).await);
        assert_eq!(
            (refused.0, refused.1.as_str()),
            (422, "reason_too_long"),
            "{refused:?}"
        );
        assert!(refused.2.contains("501") && refused.2.contains("500"));
    }
    scene.take("hold");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    let rollback = act(host, &order, &roll_back("🦀".repeat(500)))
        .await
        .expect("the longest reason");
    let ended = host.order_ended(&text(&rollback["id"])).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
}
