//! Application operations and process templates over the API, with real agents: what each does to servers, which servers it
//! is for, what is refused, and that nothing runs twice.

use std::{collections::BTreeMap, fs, path::Path};

use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};
use windlass_tests::{
    host::{Setup, TestHost, eventually, items, tar_gz, text},
    release::upload,
    scene::{Scene, act, nodes, nodes_when, refusal, step, unit},
};

/// A package whose program leaves a line whenever it is started.
fn counted() -> Bytes {
    let program =
        b"#!/bin/sh\necho \"$WINDLASS_SERVER\" >> \"$SCENE/starts\"\nexec sleep 1000000\n";
    tar_gz(&[("run.sh", 0o755, program), ("VERSION", 0o644, b"5.0.0")])
}

/// A host with three agents; the application runs on the first two, the third is bound to nothing.
async fn ready() -> (TestHost, Scene) {
    let mut host = TestHost::start(Setup {
        agents: 3,
        ..Setup::default()
    })
    .await;
    let root = host.path().join("www");
    fs::create_dir(&root).expect("a directory for static files");
    for index in 0..2 {
        allow(&mut host, index, &root);
    }
    host.wait_online().await;
    let servers = host.servers().await;
    let mut scene = Scene::prepare_on(&host, "scene", servers[..2].to_vec()).await;
    scene.packages = vec![upload(&host, "scene", "5.0.0", counted()).await];
    (host, scene)
}

/// Lets an agent's tasks write below a directory.
fn allow(host: &mut TestHost, index: usize, root: &Path) {
    host.kill_agent(index);
    let path = host.agents[index].data.join("config.json");
    let config = fs::read(&path).expect("the agent's configuration");
    let mut config: Value = serde_json::from_slice(&config).expect("its JSON");
    config["policy"]["path_roots"] = json!([root]);
    fs::write(&path, config.to_string()).expect("the configuration is written");
    host.start_agent(index, &[]);
}

/// How often the application was started on each server.
fn starts(scene: &Scene) -> BTreeMap<String, u32> {
    let lines = fs::read_to_string(scene.directory.join("starts")).unwrap_or_default();
    let mut counts = BTreeMap::new();
    for line in lines.lines() {
        *counts.entry(line.to_owned()).or_default() += 1;
    }
    counts
}

/// Servers on which the application runs.
fn running(scene: &Scene) -> Vec<String> {
    let mark = format!("SCENE={}", scene.directory.display());
    let mut found: Vec<String> = fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let comm = fs::read_to_string(path.join("comm")).ok()?;
            let environment = fs::read(path.join("environ")).ok()?;
            let lines: Vec<String> = environment
                .split(|byte| *byte == 0)
                .map(|line| String::from_utf8_lossy(line).into_owned())
                .collect();
            if comm.trim() != "sleep" || !lines.contains(&mark) {
                return None;
            }
            let server = lines
                .iter()
                .find_map(|line| line.strip_prefix("WINDLASS_SERVER="));
            Some(server?.to_owned())
        })
        .collect();
    found.sort();
    found
}

fn operation(scene: &Scene, title: &str, operation: Value) -> Value {
    json!({
        "title": title,
        "operation": operation,
        "parameters": { "grouping": "one-per-group" },
        "targets": [{ "instance": scene.instance }],
        "drain_deadline_ms": 1000,
    })
}

/// An operation on some servers of the scene.
fn on(scene: &Scene, title: &str, kind: Value, servers: &[usize]) -> Value {
    let mut asked = operation(scene, title, kind);
    let ids: Vec<&str> = servers
        .iter()
        .map(|at| scene.servers[*at].1.as_str())
        .collect();
    asked["targets"][0]["servers"] = json!(ids);
    asked["limits"] = json!({ "max_unavailable": "100%", "min_healthy_members": 0 });
    asked
}

async fn make(host: &TestHost, asked: &Value) -> String {
    let made = host.api.post(&host.ws("operations"), asked).await;
    text(&made.expect("an operation")["id"])
}

async fn run(host: &TestHost, mut asked: Value) -> String {
    asked["run"] = true.into();
    make(host, &asked).await
}

/// Runs an operation to its end.
async fn done(host: &TestHost, asked: Value) -> Value {
    let id = run(host, asked).await;
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    ended
}

async fn refused(host: &TestHost, asked: &Value) -> (u16, String, String) {
    refusal(host.api.post(&host.ws("operations/preview"), asked).await)
}

/// The state of a server, once no order works on it: one that has ended says a moment later how it leaves its servers.
async fn state_of(host: &TestHost, server: &str) -> String {
    eventually("no order works on the server", || async {
        let server = host.api.get(&host.ws(&format!("servers/{server}"))).await;
        match text(&server.expect("the server")["release_state"]).as_str() {
            "releasing" => Err("an order works on it".to_owned()),
            state => Ok(state.to_owned()),
        }
    })
    .await
}

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
    servers_are_prepared_again(&host, &scene).await;
    files_are_replaced_as_a_whole(&host, &scene).await;
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
            "/targets",
            "names 0",
        ),
        (
            with("strategy", json!("nothing")),
            422,
            "plugin_not_available",
            "/strategy",
            "nothing",
        ),
        (
            with("parameters", json!({ "groping": 1 })),
            422,
            "parameters_invalid",
            "/parameters",
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
            "/drain_deadline_ms",
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

/// Both servers run the application, with their whole weight.
async fn check_serves(host: &TestHost, scene: &Scene) {
    eventually("the application runs on both servers", || async {
        let running = running(scene);
        if running == ["agent-1", "agent-2"] {
            Ok(())
        } else {
            Err(format!("{running:?}"))
        }
    })
    .await;
    for (name, id) in &scene.servers {
        assert_eq!(scene.weight(host, id).await, 100, "the weight of {name}");
        assert_eq!(state_of(host, id).await, "released", "{name}");
    }
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

/// Serves files over HTTP from a thread; answers `http://host:port`.
async fn serve(files: Vec<(&'static str, Bytes)>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let address = listener.local_addr().expect("its address");
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            let mut buffer = [0; 1024];
            while !request.ends_with(b"\r\n\r\n") {
                match stream.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(read) => request.extend_from_slice(&buffer[..read]),
                }
            }
            let request = String::from_utf8_lossy(&request).into_owned();
            let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
            let found = files.iter().find(|(name, _)| *name == path);
            let (head, body) = match (path.as_str(), found) {
                ("/moved.tar.gz", _) => (
                    "HTTP/1.1 302 Found\r\nlocation: /one.tar.gz\r\ncontent-length: 0\r\n"
                        .to_owned(),
                    Bytes::new(),
                ),
                (_, Some((_, body))) => (
                    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n", body.len()),
                    body.clone(),
                ),
                (_, None) => (
                    "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n".to_owned(),
                    Bytes::new(),
                ),
            };
            let head = format!("{head}connection: close\r\n\r\n");
            if stream.write_all(head.as_bytes()).await.is_ok() {
                stream.write_all(&body).await.ok();
            }
        }
    });
    format!("http://{address}")
}

async fn files_are_replaced_as_a_whole(host: &TestHost, scene: &Scene) {
    let root = host.path().join("www");
    let large = tar_gz(&[("a", 0o644, b"good"), ("b/c", 0o644, b"good")]);
    let url = serve(vec![
        (
            "/one.tar.gz",
            tar_gz(&[("index.html", 0o644, b"one"), ("only-one/x", 0o600, b"1")]),
        ),
        ("/two.tar.gz", tar_gz(&[("index.html", 0o644, b"two")])),
        ("/large.tar.gz", large),
        ("/broken.tar.gz", Bytes::from_static(b"this is no archive")),
    ])
    .await;
    // Both agents run on this machine: each of them has a directory of its own.
    let user = std::process::Command::new("id").arg("-un").output();
    let user = String::from_utf8(user.expect("id(1)").stdout).expect("a name");
    let place = |at: usize, file: &str, more: Value| {
        let mut kind = json!({
            "kind": "static_files",
            "url": format!("{url}/{file}"),
            "directory": format!("{}/site-{at}/", root.display()),
            "user": user.trim(),
        });
        for (name, value) in more.as_object().cloned().unwrap_or_default() {
            kind[name] = value;
        }
        on(scene, "files", kind, &[at])
    };
    let none = || json!({});
    let shown = |at: usize| fs::read_to_string(root.join(format!("site-{at}/index.html")));
    let ended = done(host, place(0, "moved.tar.gz", none())).await;
    assert_eq!(shown(0).expect("the file"), "one");
    assert!(root.join("site-0/only-one/x").is_file());
    let order = text(&ended["id"]);
    let seen = nodes(host, &order).await;
    let steps: Vec<&Value> = seen.iter().filter(|node| node["level"] == "step").collect();
    assert_eq!(
        steps.len(),
        1,
        "the application goes on, in traffic: {steps:?}"
    );
    done(host, place(0, "two.tar.gz", none())).await;
    assert_eq!(shown(0).expect("the file"), "two");
    assert!(
        !root.join("site-0/only-one").exists(),
        "the old files are gone"
    );
    let left: Vec<String> = fs::read_dir(&root)
        .expect("the root")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    assert_eq!(left, ["site-0"], "nothing is left beside it");

    // What cannot be placed changes nothing, and says why.
    std::os::unix::fs::symlink("/etc", root.join("site-1")).expect("a link");
    for (asked, says) in [
        (
            place(1, "one.tar.gz", none()),
            "is there and is no directory",
        ),
        (place(0, "nothing.tar.gz", none()), "404"),
        (place(0, "broken.tar.gz", none()), ".tar.gz"),
        (
            place(0, "large.tar.gz", json!({ "max_bytes": 20 })),
            "more than 20 bytes",
        ),
        (
            place(0, "one.tar.gz", json!({ "sha256": "0".repeat(64) })),
            "SHA-256",
        ),
        (
            place(0, "one.tar.gz", json!({ "directory": "/srv/elsewhere/" })),
            "/srv/elsewhere/",
        ),
        (
            place(
                0,
                "one.tar.gz",
                json!({ "directory": format!("{}/", root.display()) }),
            ),
            "no task's to replace",
        ),
        (
            place(0, "one.tar.gz", json!({ "user": "nobody-here" })),
            "nobody-here",
        ),
    ] {
        let order = run(host, asked).await;
        let blocked = host.order_in(&order, &["blocked"]).await;
        let reason = text(&blocked["state_reason"]);
        assert!(reason.contains(says), "{says}: {reason}");
        act(host, &order, &json!({ "action": "cancel" }))
            .await
            .expect("cancelled");
        assert_eq!(host.order_ended(&order).await["state"], "failed");
        assert_eq!(shown(0).expect("the file"), "two", "as it was");
    }
    assert!(
        !root.join("site-1/index.html").exists(),
        "nothing went through the link"
    );
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
    assert_eq!(list("release").await.len(), 1);
    assert_eq!(list("rollback").await.len(), 0);
    let counts = host
        .api
        .get(&host.ws("order-counts"))
        .await
        .expect("counts");
    assert_eq!(counts["total"].as_u64(), Some(operations.len() as u64 + 1));
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

// ------------------------------------------------------------------------------------------ process templates

fn script(name: &str, text: &str) -> Value {
    json!({
        "step": "script",
        "name": name,
        "script": { "interpreter": ["/bin/sh", "-eu"], "text": text, "working_dir": null },
    })
}

fn leave(word: &str) -> Value {
    script(
        word,
        &format!("echo \"{word} $WINDLASS_SERVER\" >> \"$SCENE/steps\""),
    )
}

fn left(scene: &Scene) -> Vec<String> {
    let lines = fs::read_to_string(scene.directory.join("steps")).unwrap_or_default();
    lines.lines().map(str::to_owned).collect()
}

fn phases(names: &[&str]) -> Vec<Value> {
    let step = |name: &&str| match name.strip_prefix("phase ") {
        Some(phase) => json!({ "step": "phase", "phase": phase }),
        None => json!({ "step": name }),
    };
    names.iter().map(step).collect()
}

#[tokio::test]
async fn people_replace_the_flow_by_a_template() {
    let (host, scene) = ready().await;
    let kept = templates_are_kept(&host).await;
    a_release_follows_its_template(&host, &scene, &kept).await;
    an_operation_follows_its_template(&host, &scene, &kept).await;
    a_template_that_changed_is_drift(&host, &scene).await;
}

async fn create(host: &TestHost, ws: &str, template: &Value) -> Value {
    let path = format!("/v1/workspaces/{ws}/process-templates");
    host.api.post(&path, template).await.expect("a template")
}

/// Makes a workspace `other` and a template in it that the whole tenant sees; answers its id.
async fn templates_are_kept(host: &TestHost) -> String {
    let workspace = json!({ "name": "other", "zones": ["zone-a", "zone-b"] });
    host.api
        .post("/v1/workspaces", &workspace)
        .await
        .expect("a workspace");
    let restart = phases(&["drain", "stop_installed", "start_installed", "restore"]);
    let mut template = json!({
        "name": "quiet",
        "kind": "restart",
        "description": "without a check",
        "steps": restart,
        "grants": [{ "workspace": "test", "users": ["anna"], "roles": ["operators"] }],
    });
    let made = create(host, "other", &template).await;
    let id = text(&made["id"]);
    assert_eq!(
        (&made["visibility"], &made["workspace"]),
        (&json!("workspace"), &json!("other"))
    );
    assert_eq!(made["grants"][0]["roles"], json!(["operators"]));
    let own = format!("/v1/workspaces/other/process-templates/{id}");
    let foreign = host.ws(&format!("process-templates/{id}"));
    assert_eq!(
        refusal(host.api.get(&foreign).await).0,
        404,
        "kept in its workspace"
    );
    let taken = host
        .api
        .post("/v1/workspaces/other/process-templates", &template)
        .await;
    assert_eq!(refusal(taken).1, "name_taken");
    // Its kind never changes; all else does.
    template["kind"] = json!("offline");
    template["steps"] = json!(phases(&["drain", "stop_installed"]));
    assert_eq!(
        refusal(host.api.put(&own, &template).await).1,
        "template_kind_immutable"
    );
    template["kind"] = json!("restart");
    let (status, code, says) = refusal(host.api.put(&own, &template).await);
    assert_eq!((status, code.as_str()), (422, "template_invalid"), "{says}");
    template["steps"] = json!(restart);
    template["visibility"] = json!("tenant");
    template["name"] = json!("everywhere");
    host.api.put(&own, &template).await.expect("it is changed");
    let seen = host
        .api
        .get(&foreign)
        .await
        .expect("seen in every workspace");
    assert_eq!(seen["name"], "everywhere");
    assert_eq!(
        refusal(host.api.put(&foreign, &template).await).1,
        "template_of_other_workspace"
    );
    for (query, count) in [("", 1), ("?kind=restart", 1), ("?kind=release", 0)] {
        let page = host
            .api
            .get(&host.ws(&format!("process-templates{query}")))
            .await;
        assert_eq!(items(&page.expect("templates")).len(), count, "{query}");
    }
    // A workspace with templates is not deleted.
    let deleted = |path: String| async move {
        let answer = host
            .api
            .request(Method::DELETE, &path, Bytes::new(), &[])
            .await;
        let answer = answer.expect("an answer");
        (answer.status, answer.text())
    };
    let (status, says) = deleted("/v1/workspaces/other?confirm=other".to_owned()).await;
    assert!(
        status == 409 && says.contains("process template everywhere"),
        "{status} {says}"
    );
    let second =
        json!({ "name": "gone", "kind": "offline", "steps": phases(&["drain", "stop_installed"]) });
    let gone = text(&create(host, "other", &second).await["id"]);
    let path = format!("/v1/workspaces/other/process-templates/{gone}");
    assert_eq!(deleted(format!("{path}?confirm=x")).await.0, 422);
    assert_eq!(deleted(format!("{path}?confirm=gone")).await.0, 204);
    assert_eq!(refusal(host.api.get(&path).await).0, 404);

    for (kind, steps, field, says) in [
        ("restart", json!([]), "/steps", "1 to 50 steps"),
        (
            "release",
            json!(phases(&["drain", "fetch", "activate", "unpack"])),
            "/steps/2",
            "`activate` (step 3) stands before `unpack` (step 4)",
        ),
        (
            "restart",
            json!(phases(&["stop_installed", "start_installed", "restore"])),
            "/steps/2",
            "nothing has taken",
        ),
        (
            "offline",
            json!(phases(&["stop_installed"])),
            "/steps",
            "no step `drain`",
        ),
        (
            "online",
            json!(phases(&["fetch"])),
            "/steps/0",
            "is no step of an online operation",
        ),
        (
            "static_files",
            json!([script("", "true")]),
            "/steps/0",
            "a script has a name",
        ),
        (
            "static_files",
            json!([{ "step": "confirm", "message": "" }]),
            "/steps/0",
            "a message of 1 to 500",
        ),
        (
            "static_files",
            json!([{ "step": "place_files", "directory": "/x/" }]),
            "/steps/0/directory",
            "directory",
        ),
        (
            "static_files",
            json!([{ "step": "dance" }]),
            "/steps/0",
            "dance",
        ),
    ] {
        let asked = json!({ "name": "bad", "kind": kind, "steps": steps });
        let answer = host.api.post(&host.ws("process-templates"), &asked).await;
        let Err(windlass::api::client::ClientError::Refused {
            status, problem, ..
        }) = answer
        else {
            panic!("{asked} was taken: {answer:?}");
        };
        assert_eq!(status, 422, "{problem}");
        assert!(
            problem["detail"]
                .as_str()
                .unwrap_or_default()
                .contains(says),
            "{problem}"
        );
        assert!(
            problem["field"]
                .as_str()
                .unwrap_or_default()
                .starts_with(field),
            "{problem}"
        );
    }
    id
}

async fn a_release_follows_its_template(host: &TestHost, scene: &Scene, other: &str) {
    let mut steps = phases(&["drain", "fetch", "unpack"]);
    steps.push(leave("unpacked"));
    steps.extend(phases(&[
        "phase configure",
        "stop_installed",
        "activate",
        "phase start",
    ]));
    steps.push(leave("started"));
    steps.push(json!({ "step": "confirm", "message": "look at it" }));
    steps.extend(phases(&["phase check", "restore"]));
    let template = json!({ "name": "careful", "kind": "release", "steps": steps });
    let template = text(&create(host, "test", &template).await["id"]);
    let mut order = scene.order("by template", 0);
    order["template"] = other.into();
    let (_, code, says) = refusal(host.api.post(&host.ws("orders/preview"), &order).await);
    assert_eq!(code, "template_of_other_kind", "{says}");
    order["template"] = "tpl_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f".into();
    let (_, code, says) = refusal(host.api.post(&host.ws("orders/preview"), &order).await);
    assert_eq!(code, "no_such_template", "{says}");
    order["template"] = template.into();
    let preview = host.api.post(&host.ws("orders/preview"), &order).await;
    order["plan_digest"] = preview.expect("a preview")["plan_digest"].clone();
    order["run"] = true.into();
    let order = host.order(&order).await.expect("an order");
    for (server, before) in [("agent-1", 0), ("agent-2", 1)] {
        let waiting = host.order_in(&order, &["awaiting_confirmation"]).await;
        let reason = text(&waiting["state_reason"]);
        assert!(
            reason.contains("look at it") && reason.contains(server),
            "{reason}"
        );
        assert_eq!(
            left(scene)[before * 2..],
            [format!("unpacked {server}"), format!("started {server}")]
        );
        let at = usize::from(server == "agent-2");
        assert_eq!(
            scene.weight(host, &scene.servers[at].1).await,
            0,
            "out of traffic"
        );
        act(host, &order, &json!({ "action": "confirm" }))
            .await
            .expect("confirmed");
        nodes_when(host, &order, "its turn is over", |nodes| {
            unit(nodes, server)["state"] == "succeeded"
        })
        .await;
    }
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    check_serves(host, scene).await;
    let names: Vec<Value> = nodes(host, &order)
        .await
        .iter()
        .filter(|node| node["server_name"] == "agent-1" && node["level"] == "step")
        .map(|node| node["name"].clone())
        .collect();
    assert_eq!(
        json!(names),
        json!([
            "drain",
            "fetch",
            "unpack",
            "unpacked",
            "configure",
            "activate",
            "start",
            "started",
            "confirm",
            "health check",
            "restore",
        ])
    );
}

async fn an_operation_follows_its_template(host: &TestHost, scene: &Scene, template: &str) {
    let before = starts(scene);
    let mut asked = operation(scene, "by template", json!({ "kind": "restart" }));
    asked["template"] = template.into();
    let ended = done(host, asked.clone()).await;
    let steps = nodes(host, &text(&ended["id"])).await;
    let names: Vec<&str> = steps
        .iter()
        .filter(|node| node["server_name"] == "agent-1" && node["level"] == "step")
        .filter_map(|node| node["name"].as_str())
        .collect();
    assert_eq!(
        names,
        ["drain", "stop", "start", "restore"],
        "without a check"
    );
    assert_eq!(starts(scene)["agent-1"], before["agent-1"] + 1);
    asked["operation"] = json!({ "kind": "offline" });
    assert_eq!(refused(host, &asked).await.1, "template_of_other_kind");
    check_serves(host, scene).await;
}

async fn a_template_that_changed_is_drift(host: &TestHost, scene: &Scene) {
    let steps = |word: &str| {
        let mut steps = phases(&[
            "drain",
            "stop_installed",
            "start_installed",
            "check_installed",
        ]);
        steps.push(leave(word));
        steps.extend(phases(&["restore"]));
        json!({ "name": "changing", "kind": "restart", "steps": steps })
    };
    let template = create(host, "test", &steps("before")).await;
    let path = host.ws(&format!("process-templates/{}", text(&template["id"])));
    let mut asked = operation(scene, "drift", json!({ "kind": "restart" }));
    asked["template"] = template["id"].clone();
    let preview = host.api.post(&host.ws("operations/preview"), &asked).await;
    let waiting = make(host, &asked).await;
    let before = (starts(scene), left(scene));
    host.api
        .put(&path, &steps("after"))
        .await
        .expect("it is changed");
    let mut previewed = asked.clone();
    previewed["plan_digest"] = preview.expect("a preview")["plan_digest"].clone();
    let (_, code, says) = refusal(host.api.post(&host.ws("operations"), &previewed).await);
    assert_eq!(code, "plan_drifted", "{says}");
    assert!(
        says.contains("process template") && says.contains("`changing`"),
        "{says}"
    );
    let (_, code, says) = refusal(act(host, &waiting, &json!({ "action": "run" })).await);
    assert_eq!(code, "plan_drifted", "{says}");
    assert_eq!((starts(scene), left(scene)), before, "nothing was touched");
    // As it was, it is run as it was.
    host.api
        .put(&path, &steps("before"))
        .await
        .expect("it is changed back");
    act(host, &waiting, &json!({ "action": "run" }))
        .await
        .expect("it runs");
    assert_eq!(host.order_ended(&waiting).await["state"], "succeeded");
    let lines = left(scene);
    assert_eq!(
        lines[lines.len() - 2..],
        ["before agent-1", "before agent-2"]
    );
    check_serves(host, scene).await;
}
