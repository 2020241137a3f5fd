//! Every action of the API on running orders, with real agents: what people can do, and what the servers look like after.

use serde_json::{Value, json};
use windlass_tests::{
    host::{Setup, TestHost, eventually, text},
    scene::{Scene, act, group_of, nodes, nodes_when, refusal, step, unit},
};

/// A host with two agents and the first package released to both.
async fn ready() -> (TestHost, Scene) {
    let host = TestHost::start(Setup {
        agents: 2,
        ..Setup::default()
    })
    .await;
    let scene = Scene::prepare(&host).await;
    scene.release(&host, 0).await;
    scene.forget();
    (host, scene)
}

async fn run(host: &TestHost, mut order: Value) -> String {
    order["run"] = true.into();
    host.order(&order).await.expect("an order")
}

/// The order's steps that ran more than once: `step server` with how often.
fn repeated(nodes: &[Value]) -> Vec<String> {
    let again = nodes
        .iter()
        .filter(|node| node["kind"] == "step" && node["attempt"].as_u64() > Some(1));
    again
        .map(|node| {
            format!(
                "{} {} {}",
                node["name"].as_str().unwrap_or_default(),
                node["server_name"].as_str().unwrap_or_default(),
                node["attempt"]
            )
        })
        .collect()
}

#[tokio::test]
async fn people_run_and_mend_an_order() {
    let (host, scene) = ready().await;
    one_group_then_the_next(&host, &scene).await;
    a_gate_waits_for_its_confirmation(&host, &scene).await;
    retries_run_what_failed_and_nothing_else(&host, &scene).await;
    a_failure_is_ignored_by_step_and_by_server(&host, &scene).await;
    a_locked_group_waits(&host, &scene).await;
}

#[tokio::test]
async fn people_end_an_order() {
    let (host, scene) = ready().await;
    a_cancelled_order_kills_its_script_and_gives_the_weight_back(&host, &scene).await;
    a_cancelled_group_leaves_the_others(&host, &scene).await;
    a_running_order_is_rolled_back_by_hand(&host, &scene).await;
    a_succeeded_order_is_rolled_back_by_hand(&host, &scene).await;
}

#[tokio::test]
async fn orders_stop_and_roll_back_by_themselves() {
    let (host, scene) = ready().await;
    a_broken_package_is_rolled_back(&host, &scene).await;
    without_progress_an_order_stops(&host, &scene).await;
    pools_that_fail_stop_the_order_and_keep_the_weight(&host, &scene).await;
}

async fn one_group_then_the_next(host: &TestHost, scene: &Scene) {
    let order = host
        .order(&scene.order("groups", 1))
        .await
        .expect("an order");
    let planned = nodes(host, &order).await;
    let (first, second) = (
        group_of(&planned, "agent-1")["node"].clone(),
        group_of(&planned, "agent-2")["node"].clone(),
    );
    let (status, code, detail) = refusal(
        act(
            host,
            &order,
            &json!({ "action": "run_node", "node": second }),
        )
        .await,
    );
    assert_eq!((status, code.as_str()), (409, "not_ready"), "{detail}");
    act(
        host,
        &order,
        &json!({ "action": "run_node", "node": first }),
    )
    .await
    .expect("the first group runs");
    let waiting = host.order_in(&order, &["awaiting_confirmation"]).await;
    assert_eq!(
        scene.begun(),
        [("agent-1".to_owned(), 1)].into(),
        "{waiting}"
    );
    let seen = nodes(host, &order).await;
    assert_eq!(
        (
            &unit(&seen, "agent-1")["state"],
            &unit(&seen, "agent-2")["state"]
        ),
        (&json!("succeeded"), &json!("not_started"))
    );
    act(
        host,
        &order,
        &json!({ "action": "run_node", "node": second }),
    )
    .await
    .expect("the second group runs");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    let (status, code, _) = refusal(act(host, &order, &json!({ "action": "run" })).await);
    assert_eq!((status, code.as_str()), (409, "order_ended"));
    scene.check_serves(host, 1).await;
    scene.forget();
}

async fn a_gate_waits_for_its_confirmation(host: &TestHost, scene: &Scene) {
    let mut order = scene.order("beta", 0);
    order["parameters"] = json!({ "grouping": "one-per-group", "gray_traffic": true });
    // Whoever leaves released servers without traffic has to allow it.
    order["limits"] = json!({ "min_healthy_members": 0 });
    let order = run(host, order).await;
    let waiting = host.order_in(&order, &["awaiting_confirmation"]).await;
    assert!(
        !text(&waiting["state_reason"]).is_empty(),
        "it says what to look at: {waiting}"
    );
    assert_eq!(scene.begun().len(), 1, "nothing goes past a gate");
    assert_eq!(
        scene.weight(host, &scene.servers[0].1).await,
        0,
        "gray: no traffic yet"
    );
    act(host, &order, &json!({ "action": "confirm", "node": null }))
        .await
        .expect("confirmed");
    nodes_when(host, &order, "the second gate waits", |nodes| {
        let gates: Vec<&Value> = nodes
            .iter()
            .filter(|node| node["kind"] == "gate")
            .map(|node| &node["state"])
            .collect();
        gates == ["succeeded", "awaiting_confirmation"]
    })
    .await;
    act(host, &order, &json!({ "action": "confirm", "node": null }))
        .await
        .expect("confirmed");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    // Weights that gray traffic left at 0 come back with a release that overrides them.
    let mut full = scene.order("full traffic", 1);
    full["parameters"] = json!({ "grouping": "one-per-group", "weight_override": 100 });
    full["limits"] = json!({ "min_healthy_members": 0 });
    let full = run(host, full).await;
    assert_eq!(host.order_ended(&full).await["state"], "succeeded");
    scene.check_serves(host, 1).await;
    scene.forget();
}

async fn retries_run_what_failed_and_nothing_else(host: &TestHost, scene: &Scene) {
    scene.put("fail-agent-1");
    let order = run(host, scene.order("retries", 0)).await;
    let blocked = host.order_in(&order, &["blocked"]).await;
    let reason = text(&blocked["state_reason"]);
    assert!(
        reason.contains("configure on agent-1") && reason.contains("exit code 7"),
        "{reason}"
    );
    let seen = nodes(host, &order).await;
    let failed = step(&seen, "agent-1", "configure");
    assert_eq!(
        (&failed["state"], &failed["exit_code"]),
        (&json!("failed"), &json!(7)),
        "{failed}"
    );
    let details = host
        .api
        .get(&host.ws(&format!("orders/{order}/nodes/{}", failed["node"])))
        .await
        .expect("the step");
    assert!(
        details.to_string().contains("told to fail"),
        "its output is shown: {details}"
    );
    let nothing = json!({ "action": "retry", "node": unit(&seen, "agent-2")["node"] });
    assert_eq!(
        refusal(act(host, &order, &nothing).await).1,
        "nothing_to_do"
    );
    for (times, node) in [
        (2, failed),
        (3, unit(&seen, "agent-1")),
        (4, group_of(&seen, "agent-1")),
    ] {
        act(
            host,
            &order,
            &json!({ "action": "retry", "node": node["node"] }),
        )
        .await
        .expect("a retry");
        nodes_when(host, &order, "it failed again", |nodes| {
            let step = step(nodes, "agent-1", "configure");
            step["attempt"] == times && step["state"] == "failed"
        })
        .await;
        assert_eq!(scene.begun(), [("agent-1".to_owned(), times)].into());
    }
    scene.take("fail-agent-1");
    act(host, &order, &json!({ "action": "retry", "node": 0 }))
        .await
        .expect("a retry");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    assert_eq!(
        repeated(&nodes(host, &order).await),
        ["configure agent-1 5"],
        "nothing else was repeated"
    );
    assert_eq!(
        scene.begun(),
        [("agent-1".to_owned(), 5), ("agent-2".to_owned(), 1)].into()
    );
    scene.check_serves(host, 0).await;
    scene.forget();
}

async fn a_failure_is_ignored_by_step_and_by_server(host: &TestHost, scene: &Scene) {
    // By step: the server goes on with what comes after it.
    scene.put("fail-agent-1");
    let order = run(host, scene.order("ignore a step", 1)).await;
    host.order_in(&order, &["blocked"]).await;
    let seen = nodes(host, &order).await;
    act(
        host,
        &order,
        &json!({ "action": "ignore", "node": step(&seen, "agent-1", "configure")["node"] }),
    )
    .await
    .expect("ignored");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    assert_eq!(
        step(&nodes(host, &order).await, "agent-1", "configure")["state"],
        "ignored"
    );
    scene.check_serves(host, 1).await;
    // By server: it is left as it was, with its weight, and the next group goes on.
    let order = run(host, scene.order("ignore a server", 0)).await;
    host.order_in(&order, &["blocked"]).await;
    assert_eq!(scene.weight(host, &scene.servers[0].1).await, 0, "drained");
    let seen = nodes(host, &order).await;
    act(
        host,
        &order,
        &json!({ "action": "ignore", "node": unit(&seen, "agent-1")["node"] }),
    )
    .await
    .expect("ignored");
    let ended = host.order_ended(&order).await;
    assert_eq!(
        (
            ended["counts"]["ignored"].as_u64(),
            ended["counts"]["succeeded"].as_u64()
        ),
        (Some(1), Some(1)),
        "{ended}"
    );
    assert_eq!(
        scene.installed_on(&host.agents[0]).as_deref(),
        Some("2.0.0"),
        "left as it was"
    );
    assert_eq!(
        scene.installed_on(&host.agents[1]).as_deref(),
        Some("1.0.0")
    );
    assert_eq!(
        scene.weight(host, &scene.servers[0].1).await,
        100,
        "an unchanged server gets its weight back"
    );
    scene.take("fail-agent-1");
    scene.release(host, 0).await;
    scene.forget();
}

async fn a_locked_group_waits(host: &TestHost, scene: &Scene) {
    scene.put("hold");
    let order = run(host, scene.order("locks", 1)).await;
    scene.wait_begun(1).await;
    let group = group_of(&nodes(host, &order).await, "agent-2")["node"].clone();
    act(
        host,
        &order,
        &json!({ "action": "lock", "node": group, "reason": "lunch" }),
    )
    .await
    .expect("locked");
    scene.take("hold");
    let blocked = host.order_in(&order, &["blocked"]).await;
    assert!(
        text(&blocked["state_reason"]).contains("lunch"),
        "{blocked}"
    );
    assert_eq!(scene.begun().len(), 1);
    act(host, &order, &json!({ "action": "unlock", "node": group }))
        .await
        .expect("unlocked");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    scene.check_serves(host, 1).await;
    scene.forget();
}

/// The processes whose command line or environment names the scene's files.
fn scripts_of(scene: &Scene) -> Vec<u32> {
    let mark = format!("SCENE={}", scene.directory.display());
    let processes = std::fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    processes
        .filter(|pid| {
            let read = |file: &str| {
                std::fs::read(format!("/proc/{pid}/{file}"))
                    .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                    .unwrap_or_default()
            };
            read("environ").contains(&mark) && read("cmdline").contains("/runs/")
        })
        .collect()
}

async fn a_cancelled_order_kills_its_script_and_gives_the_weight_back(
    host: &TestHost,
    scene: &Scene,
) {
    scene.put("hold");
    let order = run(host, scene.order("cancel", 1)).await;
    scene.wait_begun(1).await;
    assert!(!scripts_of(scene).is_empty(), "the script runs");
    assert_eq!(scene.weight(host, &scene.servers[0].1).await, 0, "drained");
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "cancelled", "{ended}");
    assert_eq!(scripts_of(scene), Vec::<u32>::new(), "the script is gone");
    assert_eq!(
        scene.log(),
        ["+ agent-1"],
        "it did not come to its end, and nothing else began"
    );
    let seen = nodes(host, &order).await;
    assert_eq!(step(&seen, "agent-1", "configure")["state"], "cancelled");
    scene.take("hold");
    scene.check_serves(host, 0).await;
    scene.forget();
}

async fn a_cancelled_group_leaves_the_others(host: &TestHost, scene: &Scene) {
    scene.put("hold");
    let order = run(host, scene.order("cancel a group", 1)).await;
    scene.wait_begun(1).await;
    let group = group_of(&nodes(host, &order).await, "agent-1")["node"].clone();
    act(host, &order, &json!({ "action": "cancel", "node": group }))
        .await
        .expect("cancelled");
    scene.wait_begun(2).await;
    assert_eq!(
        scene.weight(host, &scene.servers[0].1).await,
        100,
        "an unchanged server gets its weight back"
    );
    scene.take("hold");
    let ended = host.order_ended(&order).await;
    assert_eq!(
        (
            ended["counts"]["cancelled"].as_u64(),
            ended["counts"]["succeeded"].as_u64()
        ),
        (Some(1), Some(1)),
        "{ended}"
    );
    assert_eq!(
        scene.installed_on(&host.agents[0]).as_deref(),
        Some("1.0.0")
    );
    assert_eq!(
        scene.installed_on(&host.agents[1]).as_deref(),
        Some("2.0.0")
    );
    scene.release(host, 0).await;
    scene.forget();
}

async fn a_running_order_is_rolled_back_by_hand(host: &TestHost, scene: &Scene) {
    scene.put("hold-agent-2");
    let order = run(host, scene.order("roll back running", 1)).await;
    scene.wait_begun(2).await;
    assert_eq!(
        scene.installed_on(&host.agents[0]).as_deref(),
        Some("2.0.0")
    );
    act(
        host,
        &order,
        &json!({ "action": "roll_back", "reason": "second thoughts" }),
    )
    .await
    .expect("a rollback");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "rolled_back", "{ended}");
    let rollback = host.order_ended(&text(&ended["rolled_back_by"])).await;
    assert_eq!(
        (&rollback["purpose"]["of"], &rollback["server_count"]),
        (&ended["id"], &json!(1)),
        "only what had changed: {rollback}"
    );
    scene.take("hold-agent-2");
    scene.check_serves(host, 0).await;
    scene.forget();
}

async fn a_succeeded_order_is_rolled_back_by_hand(host: &TestHost, scene: &Scene) {
    let order = run(host, scene.order("roll back ended", 1)).await;
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    let rollback = act(
        host,
        &order,
        &json!({ "action": "roll_back", "reason": "complaints" }),
    )
    .await
    .expect("a rollback");
    assert_eq!(
        (&rollback["purpose"]["of"], &rollback["purpose"]["reason"]),
        (&json!(order), &json!("complaints"))
    );
    let rollback = host.order_ended(&text(&rollback["id"])).await;
    assert_eq!(rollback["state"], "succeeded", "{rollback}");
    scene.check_serves(host, 0).await;
    let parent = host
        .api
        .get(&host.ws(&format!("orders/{order}")))
        .await
        .expect("the order");
    assert_eq!(
        (&parent["state"], &parent["rolled_back_by"]),
        (&json!("succeeded"), &rollback["id"]),
        "both stay visible"
    );
    for id in [&order, &text(&rollback["id"])] {
        let again = refusal(
            act(
                host,
                id,
                &json!({ "action": "roll_back", "reason": "again" }),
            )
            .await,
        );
        assert_eq!(again.0, 409, "{again:?}");
    }
    scene.forget();
}

async fn a_broken_package_is_rolled_back(host: &TestHost, scene: &Scene) {
    let mut order = scene.order("auto rollback", 2);
    order["parameters"] = json!({ "grouping": "one-per-group", "auto_rollback": true });
    let order = run(host, order).await;
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "rolled_back", "{ended}");
    let rollback = host.order_ended(&text(&ended["rolled_back_by"])).await;
    let reason = text(&rollback["purpose"]["reason"]);
    assert!(reason.contains("health check on agent-1"), "{reason}");
    assert!(
        !scene.begun().contains_key("agent-2"),
        "it stopped at the first group: {:?}",
        scene.log()
    );
    scene.check_serves(host, 0).await;
    scene.forget();
}

async fn without_progress_an_order_stops(host: &TestHost, scene: &Scene) {
    scene.put("hold");
    let mut order = scene.order("deadline", 1);
    order["parameters"] = json!({ "grouping": "one-per-group", "progress_deadline_s": 3 });
    let order = run(host, order).await;
    let blocked = host.order_in(&order, &["blocked"]).await;
    assert!(
        blocked["stalled"] == true && text(&blocked["state_reason"]).contains("progress deadline"),
        "{blocked}"
    );
    scene.take("hold");
    eventually("the script under way ends", || async {
        if scene.log().contains(&"- agent-1".to_owned()) {
            Ok(())
        } else {
            Err(format!("{:?}", scene.log()))
        }
    })
    .await;
    // A busy machine may need longer than the deadline again: then it is run again.
    loop {
        act(host, &order, &json!({ "action": "run" }))
            .await
            .expect("it goes on");
        let after = host
            .order_in(&order, &["succeeded", "blocked", "failed"])
            .await;
        if after["state"] == "succeeded" {
            break;
        }
        assert!(after["stalled"] == true, "{after}");
    }
    scene.check_serves(host, 1).await;
    scene.forget();
}

async fn pools_that_fail_stop_the_order_and_keep_the_weight(host: &TestHost, scene: &Scene) {
    for (index, (fault, says)) in [
        (json!({ "refuse_set": true }), "told to refuse weights"),
        (json!({ "ignore_set": true }), "shows a weight of"),
    ]
    .into_iter()
    .enumerate()
    {
        let package = index % 2;
        // At the drain.
        scene.fault(host, &fault).await;
        let order = run(host, scene.order("drain fails", package)).await;
        let blocked = host.order_in(&order, &["blocked"]).await;
        let reason = text(&blocked["state_reason"]);
        assert!(
            reason.contains("drain on agent-1") && reason.contains(says),
            "{reason}"
        );
        assert_eq!(
            scene.log(),
            Vec::<String>::new(),
            "nothing is touched while it may have traffic"
        );
        // At the restore of the first server.
        scene.put("hold");
        scene.fault(host, &json!({})).await;
        act(host, &order, &json!({ "action": "retry", "node": 0 }))
            .await
            .expect("a retry");
        scene.wait_begun(1).await;
        scene.fault(host, &fault).await;
        scene.take("hold");
        let blocked = host.order_in(&order, &["blocked"]).await;
        let reason = text(&blocked["state_reason"]);
        assert!(
            reason.contains("restore on agent-1") && reason.contains(says),
            "{reason}"
        );
        assert_eq!(scene.weight(host, &scene.servers[0].1).await, 0);
        // The remembered weight comes back, not the 0 that the pool shows.
        scene.fault(host, &json!({})).await;
        act(host, &order, &json!({ "action": "retry", "node": 0 }))
            .await
            .expect("a retry");
        assert_eq!(host.order_ended(&order).await["state"], "succeeded");
        scene.check_serves(host, package).await;
        assert_eq!(
            scene.begun(),
            [("agent-1".to_owned(), 1), ("agent-2".to_owned(), 1)].into()
        );
        scene.forget();
    }
}
