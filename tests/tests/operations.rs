//! Application operations over the API, with real agents: what each does to servers, which servers it is for, what is refused,
//! and that nothing runs twice.

use std::{collections::BTreeMap, fs};

use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};
use windlass_tests::{
    host::{TestHost, eventually, items, text},
    operated::{
        check_serves, done, make, on, operation, ready, refused, run, running, starts, state_of,
    },
    scene::{Scene, act, nodes, nodes_when, refusal, step, unit},
};

#[tokio::test]
async fn people_operate_an_application() {
    let (mut host, scene) = ready().await;
    nothing_is_operated_before_it_is_released(&host, &scene).await;
    let mut order = scene.order("first", 0);
    order["run"] = true.into();
    let order = host.order(&order).await.expect("an order");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    check_serves(&host, &scene).await;
    what_makes_no_sense_is_refused(&host, &scene).await;
    a_restart_is_previewed_and_runs_exactly_so(&host, &scene).await;
    only_chosen_servers_are_restarted(&host, &scene).await;
    a_server_goes_offline_and_comes_back_with_its_weight(&host, &scene).await;
    what_has_changed_since_is_drift(&host, &scene).await;
    a_failure_is_retried_and_nothing_else_runs_again(&host, &scene).await;
    the_server_dies_in_an_operation_and_nothing_runs_twice(&mut host, &scene).await;
    a_cancelled_restart_leaves_the_rest_alone(&host, &scene).await;
    an_operation_is_edited(&host, &scene).await;
    an_operation_is_grouped_anew_and_synced(&host, &scene).await;
    servers_are_prepared_again(&host, &scene).await;
    operations_are_listed(&host).await;
}

async fn nothing_is_operated_before_it_is_released(host: &TestHost, scene: &Scene) {
    // Agents that were started again are back a moment later.
    eventually("the agents are back", || async {
        let asked = operation(scene, "too early", json!({ "kind": "restart" }));
        let (.., says) = refused(host, &asked).await;
        if says.contains("not connected") {
            Err(says)
        } else {
            Ok(())
        }
    })
    .await;
    for kind in [
        json!({ "kind": "restart" }),
        json!({ "kind": "offline" }),
        json!({ "kind": "online" }),
    ] {
        let (status, code, says) = refused(host, &operation(scene, "too early", kind)).await;
        assert_eq!(
            (status, code.as_str()),
            (409, "no_server_qualifies"),
            "{says}"
        );
        assert!(
            says.contains("agent-1 of `scene`: nothing is installed on it: release to it first"),
            "{says}"
        );
    }
}

async fn what_makes_no_sense_is_refused(host: &TestHost, scene: &Scene) {
    let stranger = host.servers().await[2].1.clone();
    let restart = json!({ "kind": "restart" });
    let with = |name: &str, value: Value| {
        let mut asked = operation(scene, "wrong", restart.clone());
        asked[name] = value;
        asked
    };
    let first = scene.servers[0].1.clone();
    let chosen = |servers: Value| {
        let mut asked = operation(scene, "wrong", restart.clone());
        asked["targets"][0]["servers"] = servers;
        asked
    };
    let mut in_cell = operation(scene, "wrong", restart.clone());
    in_cell["targets"][0]["cells"] = json!(["nowhere"]);
    let mut other_cell = chosen(json!([first]));
    other_cell["targets"][0]["cells"] = json!(["cell-b"]);
    let mut twice = operation(scene, "wrong", restart.clone());
    twice["targets"] = json!([{ "instance": scene.instance }, { "instance": scene.instance }]);
    let files = |change: Value| {
        let mut kind = json!({ "kind": "static_files", "url": "http://h/x.tar.gz", "directory": "/srv/www/x/" });
        for (name, value) in change.as_object().cloned().unwrap_or_default() {
            kind[name] = value;
        }
        operation(scene, "wrong", kind)
    };
    for (asked, status, code, field, says) in [
        (
            with("title", json!("")),
            422,
            "out_of_limit",
            "title",
            "1 to 50",
        ),
        (
            with("title", json!("x".repeat(51))),
            422,
            "out_of_limit",
            "title",
            "1 to 50",
        ),
        (
            with("targets", json!([])),
            422,
            "targets_out_of_range",
            "targets",
            "names 0",
        ),
        (
            with("strategy", json!("nothing")),
            422,
            "plugin_not_available",
            "strategy",
            "nothing",
        ),
        (
            with("parameters", json!({ "groping": 1 })),
            422,
            "parameters_invalid",
            "parameters",
            "groping",
        ),
        (
            with("colour", json!(1)),
            422,
            "unknown_field",
            "colour",
            "colour",
        ),
        (
            with("operation", json!({ "kind": "explode" })),
            422,
            "invalid_value",
            "/operation/kind",
            "explode",
        ),
        (
            with(
                "operation",
                json!({ "kind": "restart", "initial_weight": 3 }),
            ),
            422,
            "unknown_field",
            "/operation/initial_weight",
            "initial_weight",
        ),
        (
            with(
                "operation",
                json!({ "kind": "online", "initial_weight": 101 }),
            ),
            422,
            "out_of_limit",
            "/operation/initial_weight",
            "0 to 100",
        ),
        (
            with("drain_deadline_ms", json!(999_999_999)),
            422,
            "out_of_limit",
            "drain_deadline_ms",
            "allowed",
        ),
        (in_cell, 422, "no_such_cell", "/targets/0/cells", "nowhere"),
        (twice, 422, "target_twice", "/targets/1/instance", "twice"),
        (
            chosen(json!([first, first])),
            422,
            "server_twice",
            "/targets/0/servers/1",
            "twice",
        ),
        (
            chosen(json!(["srv_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f"])),
            422,
            "server_unknown",
            "/targets/0/servers/0",
            "no server",
        ),
        (
            chosen(json!([stranger])),
            409,
            "no_server_qualifies",
            "",
            "agent-3 of `scene`: it is not bound to the service instance `scene`",
        ),
        (
            other_cell,
            409,
            "no_server_qualifies",
            "",
            "it is in the cell `cell-a`, which was not chosen",
        ),
        (
            files(json!({ "url": "ftp://h/x.tar.gz" })),
            422,
            "static_files_invalid",
            "/operation/url",
            "not a URL",
        ),
        (
            files(json!({ "url": "http://h/x.zip" })),
            422,
            "static_files_invalid",
            "/operation/url",
            ".tar.gz",
        ),
        (
            files(json!({ "directory": "/srv/www" })),
            422,
            "static_files_invalid",
            "/operation/directory",
            "starts and ends with `/`",
        ),
        (
            files(json!({ "directory": "/srv/../etc/" })),
            422,
            "static_files_invalid",
            "/operation/directory",
            "`..`",
        ),
        (
            files(json!({ "user": "a b" })),
            422,
            "static_files_invalid",
            "/operation/user",
            "OS user",
        ),
        (
            files(json!({ "max_bytes": 0 })),
            422,
            "static_files_invalid",
            "/operation/max_bytes",
            "allowed",
        ),
        (
            operation(scene, "wrong", json!({ "kind": "initialise" })),
            422,
            "nothing_to_prepare",
            "/targets/0/instance",
            "nothing to prepare",
        ),
    ] {
        let answer = host.api.post(&host.ws("operations/preview"), &asked).await;
        let Err(windlass::api::client::ClientError::Refused {
            status: found,
            problem,
            ..
        }) = answer
        else {
            panic!("{asked} was taken: {answer:?}");
        };
        assert_eq!(
            (found, problem["code"].as_str()),
            (status, Some(code)),
            "{asked}: {problem}"
        );
        assert!(
            problem["detail"]
                .as_str()
                .unwrap_or_default()
                .contains(says),
            "{problem}"
        );
        if !field.is_empty() {
            assert_eq!(problem["field"], field, "{problem}");
        }
        // Neither is anything made of it.
        let made = host.api.post(&host.ws("operations"), &asked).await;
        assert_eq!(refusal(made).1, code);
    }
    let orders = host.api.get(&host.ws("orders?purpose=operation")).await;
    assert_eq!(
        items(&orders.expect("orders")).len(),
        0,
        "bad input leaves nothing behind"
    );
}

async fn a_restart_is_previewed_and_runs_exactly_so(host: &TestHost, scene: &Scene) {
    let before = starts(scene);
    let mut asked = operation(scene, "restart all", json!({ "kind": "restart" }));
    let preview = host.api.post(&host.ws("operations/preview"), &asked).await;
    let preview = preview.expect("a preview");
    assert_eq!(preview["server_count"], 2);
    let planned = preview["plan"]["nodes"].as_array().expect("nodes").iter();
    let steps: Vec<&str> = planned
        .filter(|node| node["level"] == "step")
        .filter_map(|node| node["name"].as_str())
        .collect();
    let turn = ["drain", "stop", "start", "health check", "restore"];
    assert_eq!(steps, [turn, turn].concat());
    assert_eq!(starts(scene), before, "a preview does nothing");

    asked["plan_digest"] = preview["plan_digest"].clone();
    asked["run"] = true.into();
    // The same request under the same key is carried out once.
    let body = Bytes::from(asked.to_string());
    let headers = [
        ("content-type", "application/json"),
        ("idempotency-key", "restart-once"),
    ];
    let mut made = Vec::new();
    for _ in 0..2 {
        let answer = host
            .api
            .request(Method::POST, &host.ws("operations"), body.clone(), &headers)
            .await
            .expect("an answer");
        assert_eq!(answer.status, 201, "{}", answer.text());
        let order: Value = serde_json::from_str(&answer.text()).expect("an order");
        made.push(text(&order["id"]));
    }
    assert_eq!(made[0], made[1]);
    let ended = host.order_ended(&made[0]).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    assert_eq!(
        ended["purpose"],
        json!({ "kind": "operation", "operation": { "kind": "restart" } })
    );
    assert_eq!(ended["plan"], preview["plan_digest"]);
    let expect: BTreeMap<String, u32> = before
        .iter()
        .map(|(server, count)| (server.clone(), count + 1))
        .collect();
    assert_eq!(starts(scene), expect, "each was started once");
    check_serves(host, scene).await;
    let back = json!({ "action": "roll_back", "reason": "no" });
    let (status, code, says) = refusal(act(host, &made[0], &back).await);
    assert_eq!(
        (status, code.as_str()),
        (409, "operation_not_rolled_back"),
        "{says}"
    );
}

async fn only_chosen_servers_are_restarted(host: &TestHost, scene: &Scene) {
    let stranger = host.servers().await[2].1.clone();
    let mut asked = on(scene, "restart one", json!({ "kind": "restart" }), &[0]);
    let servers = asked["targets"][0]["servers"].as_array_mut();
    servers.expect("servers").push(stranger.clone().into());
    let before = starts(scene);
    let order = run(host, asked).await;
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    let plan = host
        .api
        .get(&host.ws(&format!("orders/{order}/plan")))
        .await;
    assert_eq!(
        plan.expect("the plan")["plan"]["left_out"],
        json!([{
            "application": "scene",
            "server": stranger,
            "server_name": "agent-3",
            "reason": "it is not bound to the service instance `scene`",
        }])
    );
    let after = starts(scene);
    assert_eq!(after["agent-1"], before["agent-1"] + 1);
    assert_eq!(after["agent-2"], before["agent-2"]);
    // By cell, likewise.
    let mut asked = operation(scene, "restart a cell", json!({ "kind": "restart" }));
    asked["targets"][0]["cells"] = json!(["cell-b"]);
    done(host, asked).await;
    assert_eq!(starts(scene)["agent-2"], before["agent-2"] + 1);
    assert_eq!(starts(scene)["agent-1"], after["agent-1"]);
    check_serves(host, scene).await;
}

async fn a_server_goes_offline_and_comes_back_with_its_weight(host: &TestHost, scene: &Scene) {
    let (first, second) = (&scene.servers[0].1, &scene.servers[1].1);
    let offline = json!({ "kind": "offline" });
    done(host, on(scene, "take one out", offline.clone(), &[0])).await;
    assert_eq!(running(scene), ["agent-2"]);
    assert_eq!(scene.weight(host, first).await, 0);
    assert_eq!(state_of(host, first).await, "offline");
    assert_eq!(state_of(host, second).await, "released");
    // A release does not put it on line by the way, nor leaves it without traffic.
    let mut release = scene.order("over it", 0);
    release["run"] = true.into();
    let release = host.order(&release).await.expect("an order");
    let refused_so = host.order_in(&release, &["not_started"]).await;
    let reason = text(&refused_so["state_reason"]);
    assert!(
        reason.contains("agent-1 is offline: bring it online first"),
        "{reason}"
    );
    act(host, &release, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    for (asked, says) in [
        (
            on(scene, "again", offline.clone(), &[0]),
            "it is offline already",
        ),
        (
            on(scene, "again", json!({ "kind": "restart" }), &[0]),
            "it is offline: bring it online instead",
        ),
        (
            on(scene, "again", json!({ "kind": "online" }), &[1]),
            "it is online already",
        ),
    ] {
        let (_, code, told) = refused(host, &asked).await;
        assert_eq!(code, "no_server_qualifies");
        assert!(told.contains(says), "{told}");
    }
    // The envelope counts it: the last one that serves is not taken away.
    let order = run(host, operation(scene, "take all out", offline.clone())).await;
    let held = host.order_in(&order, &["blocked"]).await;
    let reason = text(&held["state_reason"]);
    assert!(reason.contains("min_healthy_members"), "{reason}");
    let cancel = json!({ "action": "cancel" });
    act(host, &order, &cancel).await.expect("cancelled");
    assert_eq!(host.order_ended(&order).await["state"], "cancelled");
    assert_eq!(running(scene), ["agent-2"]);
    assert_eq!(state_of(host, second).await, "released");

    // Ended while its connections are waited for, a server goes on as it was.
    done(
        host,
        on(scene, "first back", json!({ "kind": "online" }), &[0]),
    )
    .await;
    scene.fault(host, &json!({ "stuck_connections": 1 })).await;
    let mut stuck = on(scene, "changed my mind", offline.clone(), &[1]);
    stuck["drain_deadline_ms"] = json!(600_000);
    let order = run(host, stuck).await;
    eventually("its weight is taken", || async {
        match scene.weight(host, second).await {
            0 => Ok(()),
            weight => Err(weight.to_string()),
        }
    })
    .await;
    act(host, &order, &cancel).await.expect("cancelled");
    scene.fault(host, &json!({})).await;
    assert_eq!(host.order_ended(&order).await["state"], "cancelled");
    check_serves(host, scene).await;
    done(host, on(scene, "first out", offline.clone(), &[0])).await;

    let online = json!({ "kind": "online", "initial_weight": 40 });
    let before = starts(scene);
    done(host, operation(scene, "bring back", online)).await;
    assert_eq!(scene.weight(host, first).await, 40);
    assert_eq!(state_of(host, first).await, "released");
    assert_eq!(starts(scene)["agent-1"], before["agent-1"] + 1);
    assert_eq!(starts(scene)["agent-2"], before["agent-2"], "it was online");
    done(host, on(scene, "out", offline, &[0])).await;
    done(host, on(scene, "back", json!({ "kind": "online" }), &[0])).await;
    check_serves(host, scene).await;
}

async fn what_has_changed_since_is_drift(host: &TestHost, scene: &Scene) {
    let asked = on(scene, "too late", json!({ "kind": "restart" }), &[0, 1]);
    let preview = host.api.post(&host.ws("operations/preview"), &asked).await;
    let digest = preview.expect("a preview")["plan_digest"].clone();
    let waiting = make(host, &asked).await;
    done(host, on(scene, "out", json!({ "kind": "offline" }), &[0])).await;
    let before = starts(scene);
    // What was previewed would be another plan today, and says why.
    let mut previewed = asked.clone();
    previewed["plan_digest"] = digest;
    let (status, code, says) = refusal(host.api.post(&host.ws("operations"), &previewed).await);
    assert_eq!((status, code.as_str()), (409, "plan_drifted"), "{says}");
    assert!(says.contains("is left out: it is offline"), "{says}");
    // What was made is not run.
    let (status, code, says) = refusal(act(host, &waiting, &json!({ "action": "run" })).await);
    assert_eq!((status, code.as_str()), (409, "plan_drifted"), "{says}");
    assert!(
        says.contains("state of scene on agent-1: was released, is offline"),
        "{says}"
    );
    assert_eq!(starts(scene), before);
    act(host, &waiting, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    done(host, on(scene, "back", json!({ "kind": "online" }), &[0])).await;
    check_serves(host, scene).await;
}

async fn a_failure_is_retried_and_nothing_else_runs_again(host: &TestHost, scene: &Scene) {
    scene.put("sick-agent-1");
    let before = starts(scene);
    let order = run(host, operation(scene, "sick", json!({ "kind": "restart" }))).await;
    let blocked = host.order_in(&order, &["blocked"]).await;
    assert!(
        text(&blocked["state_reason"]).contains("health check on agent-1"),
        "{blocked}"
    );
    assert_eq!(scene.weight(host, &scene.servers[0].1).await, 0, "kept out");
    assert_eq!(
        starts(scene)["agent-2"],
        before["agent-2"],
        "the next waits"
    );
    let back = json!({ "action": "roll_back", "reason": "sick" });
    assert_eq!(
        refusal(act(host, &order, &back).await).1,
        "operation_not_rolled_back"
    );
    scene.take("sick-agent-1");
    act(host, &order, &json!({ "action": "retry", "node": 0 }))
        .await
        .expect("a retry");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    let nodes = nodes(host, &order).await;
    assert!(step(&nodes, "agent-1", "health check")["attempt"].as_u64() >= Some(2));
    assert_eq!(step(&nodes, "agent-1", "start")["attempt"], 1);
    let after = starts(scene);
    assert_eq!(after["agent-1"], before["agent-1"] + 1);
    assert_eq!(after["agent-2"], before["agent-2"] + 1);
    check_serves(host, scene).await;
    // A server that an operation left broken is brought back by another.
    scene.put("sick-agent-1");
    let order = run(host, on(scene, "sick", json!({ "kind": "restart" }), &[0])).await;
    host.order_in(&order, &["blocked"]).await;
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    assert_eq!(host.order_ended(&order).await["state"], "failed");
    assert_eq!(state_of(host, &scene.servers[0].1).await, "release_failed");
    scene.take("sick-agent-1");
    done(host, operation(scene, "mend", json!({ "kind": "online" }))).await;
    check_serves(host, scene).await;
}

async fn the_server_dies_in_an_operation_and_nothing_runs_twice(
    host: &mut TestHost,
    scene: &Scene,
) {
    scene.put("sick-agent-1");
    let before = starts(scene);
    let order = run(
        host,
        operation(scene, "a power cut", json!({ "kind": "restart" })),
    )
    .await;
    nodes_when(host, &order, "the first server is checked", |nodes| {
        step(nodes, "agent-1", "health check")["state"] == "running"
    })
    .await;
    host.kill();
    host.boot(&[]).await;
    scene.take("sick-agent-1");
    // The check may have failed meanwhile; then it is the one step that is repeated.
    eventually("the operation ends", || async {
        let order = host
            .order_in(&order, &["running", "blocked", "succeeded"])
            .await;
        if order["state"] == "succeeded" {
            return Ok(());
        }
        if order["state"] == "blocked" {
            // Refused where what blocks it is only that agents are not back yet.
            drop(
                act(
                    host,
                    &text(&order["id"]),
                    &json!({ "action": "retry", "node": 0 }),
                )
                .await,
            );
        }
        Err(order.to_string())
    })
    .await;
    let expect: BTreeMap<String, u32> = before
        .iter()
        .map(|(server, count)| (server.clone(), count + 1))
        .collect();
    assert_eq!(starts(scene), expect);
    check_serves(host, scene).await;
}

async fn a_cancelled_restart_leaves_the_rest_alone(host: &TestHost, scene: &Scene) {
    let before = starts(scene);
    let order = make(
        host,
        &operation(scene, "half", json!({ "kind": "restart" })),
    )
    .await;
    let planned = nodes(host, &order).await;
    let first = unit(&planned, "agent-1")["node"].clone();
    act(
        host,
        &order,
        &json!({ "action": "run_node", "node": first }),
    )
    .await
    .expect("the first server runs");
    host.order_in(&order, &["awaiting_confirmation"]).await;
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "cancelled");
    assert_eq!(
        (&ended["counts"]["succeeded"], &ended["counts"]["cancelled"]),
        (&json!(1), &json!(1)),
        "{ended}"
    );
    assert_eq!(starts(scene)["agent-1"], before["agent-1"] + 1);
    assert_eq!(starts(scene)["agent-2"], before["agent-2"]);
    check_serves(host, scene).await;
}

/// Its groups are people's to change, and servers come and go as in a release; there is no way back.
async fn an_operation_is_edited(host: &TestHost, scene: &Scene) {
    let before = starts(scene);
    let order = make(
        host,
        &operation(scene, "edited", json!({ "kind": "restart" })),
    )
    .await;
    let seen = nodes(host, &order).await;
    let edits = host.ws(&format!("orders/{order}/revisions"));
    let sync = json!({ "edit": "sync_servers", "application": "scene" });
    let (status, code, detail) = refusal(host.api.post(&edits, &sync).await);
    assert_eq!(
        (status, code.as_str()),
        (409, "nothing_to_sync"),
        "{detail}"
    );
    for action in [
        json!({ "action": "roll_back", "reason": "no" }),
        json!({ "action": "roll_back_stage", "node": 1, "reason": "no" }),
    ] {
        let (status, code, detail) = refusal(act(host, &order, &action).await);
        assert_eq!(
            (status, code.as_str()),
            (409, "operation_not_rolled_back"),
            "{detail}"
        );
    }
    let group = windlass_tests::scene::group_of(&seen, "agent-2")["node"].clone();
    let delete = json!({ "edit": "delete_group", "node": group });
    let header = host.api.post(&edits, &delete).await.expect("deleted");
    assert_eq!(header["server_count"], 1, "{header}");
    act(host, &order, &json!({ "action": "run" }))
        .await
        .expect("it runs");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    assert_eq!(starts(scene)["agent-1"], before["agent-1"] + 1);
    assert_eq!(starts(scene)["agent-2"], before["agent-2"]);
    check_serves(host, scene).await;
}

/// Servers come and go while it waits and while it runs; those that do not qualify stand beside it with the reason.
async fn an_operation_is_grouped_anew_and_synced(host: &TestHost, scene: &Scene) {
    let third = host.servers().await[2].1.clone();
    let before = starts(scene);
    let order = make(
        host,
        &operation(scene, "grown", json!({ "kind": "restart" })),
    )
    .await;
    let edits = host.ws(&format!("orders/{order}/revisions"));
    let left_out = || async {
        let progress = host.ws(&format!("orders/{order}/progress"));
        let progress = host.api.get(&progress).await.expect("its progress");
        let out = progress["left_out"].as_array().cloned().unwrap_or_default();
        out.iter()
            .map(|out| (text(&out["server_name"]), text(&out["reason"])))
            .collect::<Vec<_>>()
    };
    let sync = json!({ "edit": "sync_servers", "application": "scene" });
    scene.bind(host, &[&third], json!({})).await;
    let header = host.api.post(&edits, &sync).await.expect("synced");
    assert_eq!(header["server_count"], 2, "{header}");
    let difference = text(&header["revisions"][1]["difference"]);
    assert!(
        difference.contains("agent-3 do(es) not take part"),
        "{difference}"
    );
    let nothing = "nothing is installed on it: release to it first".to_owned();
    assert_eq!(left_out().await, [("agent-3".to_owned(), nothing)]);
    act(host, &order, &json!({ "action": "run" }))
        .await
        .expect("it runs with the servers that it has now");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    assert_eq!(starts(scene)["agent-1"], before["agent-1"] + 1);
    assert_eq!(starts(scene)["agent-2"], before["agent-2"] + 1);

    // What was installed meanwhile qualifies: it comes in with the next grouping.
    let order = make(
        host,
        &operation(scene, "regrouped", json!({ "kind": "restart" })),
    )
    .await;
    let mut release = scene.order("on the third", 0);
    release["run"] = true.into();
    let release = host.order(&release).await.expect("a release");
    assert_eq!(host.order_ended(&release).await["state"], "succeeded");
    let before = starts(scene);
    let edits = host.ws(&format!("orders/{order}/revisions"));
    let regroup = json!({ "edit": "regroup", "application": "scene",
                          "parameters": { "grouping": "explicit", "groups": [
                              { "servers": [third] },
                              { "servers": [scene.servers[1].1, scene.servers[0].1] } ] } });
    let header = host.api.post(&edits, &regroup).await.expect("regrouped");
    assert_eq!(header["server_count"], 3, "{header}");
    let seen = nodes(host, &order).await;
    let group = |server: &str| windlass_tests::scene::group_of(&seen, server)["node"].clone();
    assert_ne!(group("agent-3"), group("agent-1"));
    assert_eq!(group("agent-2"), group("agent-1"));
    act(host, &order, &json!({ "action": "run" }))
        .await
        .expect("it runs");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    for server in ["agent-1", "agent-2", "agent-3"] {
        assert_eq!(starts(scene)[server], before[server] + 1, "{server}");
    }
    // Taken offline by the chosen server: who is bound beside it is nothing to the operation.
    let mut offline = on(scene, "off", json!({ "kind": "offline" }), &[]);
    offline["targets"][0]["servers"] = json!([third]);
    done(host, offline).await;
    scene.unbind(host, &[&third]).await;
    check_serves(host, scene).await;
}

async fn servers_are_prepared_again(host: &TestHost, scene: &Scene) {
    let mut parameters = windlass_tests::scene::parameters();
    parameters["prepare_script"] = json!("echo \"$WINDLASS_SERVER\" >> \"$SCENE/prepared\"");
    scene
        .change(host, &json!({ "parameters": parameters }))
        .await;
    let before = starts(scene);
    let ended = done(
        host,
        operation(scene, "prepare", json!({ "kind": "initialise" })),
    )
    .await;
    let nodes = nodes(host, &text(&ended["id"])).await;
    let names: Vec<&str> = nodes
        .iter()
        .filter(|node| node["level"] == "step")
        .filter_map(|node| node["name"].as_str())
        .collect();
    assert_eq!(names, ["prepare", "prepare"]);
    let prepared = fs::read_to_string(scene.directory.join("prepared"));
    assert_eq!(
        prepared.expect("what the scripts wrote"),
        "agent-1\nagent-2\n"
    );
    assert_eq!(starts(scene), before, "the application goes on");
    check_serves(host, scene).await;
}

async fn operations_are_listed(host: &TestHost) {
    let list = |purpose: &str| {
        let path = host.ws(&format!("orders?page_size=100&purpose={purpose}"));
        async move { items(&host.api.get(&path).await.expect("orders")) }
    };
    let operations = list("operation").await;
    assert!(operations.len() > 10);
    assert!(
        operations
            .iter()
            .all(|order| order["purpose"]["kind"] == "operation")
    );
    assert_eq!(list("release").await.len(), 3);
    assert_eq!(list("rollback").await.len(), 0);
    let counts = host
        .api
        .get(&host.ws("order-counts"))
        .await
        .expect("counts");
    assert_eq!(counts["total"].as_u64(), Some(operations.len() as u64 + 3));
    let id = text(&operations[0]["id"]);
    let progress = host
        .api
        .get(&host.ws(&format!("orders/{id}/progress")))
        .await;
    assert_eq!(
        progress.expect("progress")["applications"][0]["application"],
        "scene"
    );
}
