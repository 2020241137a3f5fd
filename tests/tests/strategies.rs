//! Strategies that move traffic, over the API of a real server with real agents and simulated pools: blue-green with every
//! way back, gray traffic with weights set by hand, a canary that sees too little.
//!
//! `cell-a` is blue and has agents 1, 3 and 5; `cell-b` is green and has agents 2, 4 and 6. The first four run the
//! application `scene`, the others `side`, which is never released again and only takes part in shifting.

use serde_json::{Value, json};
use windlass_tests::{
    host::{Setup, TestHost, eventually, items, text},
    scene::{Scene, act, events, nodes, nodes_when, refusal},
};

async fn ready() -> (TestHost, Scene, Scene) {
    let host = TestHost::start(Setup {
        agents: 6,
        ..Setup::default()
    })
    .await;
    let servers = host.servers().await;
    let scene = Scene::prepare_on(&host, "scene", servers[..4].to_vec()).await;
    let side = Scene::prepare_on(&host, "side", servers[4..].to_vec()).await;
    scene.release(&host, 0).await;
    side.release(&host, 0).await;
    (host, scene, side)
}

/// An order of a strategy that runs at once; a cell may be released at once.
fn order(scene: &Scene, strategy: &str, parameters: Value, package: usize) -> Value {
    let mut order = scene.order(strategy, package);
    order["strategy"] = strategy.into();
    order["parameters"] = parameters;
    order["limits"] = json!({ "max_unavailable": "100%" });
    order["run"] = true.into();
    order
}

/// Waits until this node waits for a person.
async fn waits(host: &TestHost, order: &str, name: &str) -> Vec<Value> {
    let what = format!("`{name}` waits for confirmation");
    nodes_when(host, order, &what, |nodes| {
        named(nodes, name).is_some_and(|node| node["state"] == "awaiting_confirmation")
    })
    .await
}

fn named<'a>(nodes: &'a [Value], name: &str) -> Option<&'a Value> {
    nodes.iter().find(|node| node["name"] == name)
}

async fn confirm(host: &TestHost, order: &str) {
    act(host, order, &json!({ "action": "confirm" }))
        .await
        .expect("confirmed");
}

/// The weights of the scene's servers, in their order.
async fn weights(host: &TestHost, scene: &Scene) -> Vec<u64> {
    let mut weights = Vec::new();
    for (_, server) in &scene.servers {
        weights.push(scene.weight(host, server).await);
    }
    weights
}

/// The versions that the scene's agents have installed, in their order.
fn versions(host: &TestHost, scene: &Scene) -> Vec<String> {
    scene
        .servers
        .iter()
        .map(|(name, _)| {
            let agent = host.agents.iter().find(|agent| agent.name == *name);
            scene
                .installed_on(agent.expect("an agent"))
                .expect("a version")
        })
        .collect()
}

async fn post(
    host: &TestHost,
    order: &str,
    what: &str,
    body: &Value,
) -> Result<Value, windlass::api::client::ClientError> {
    host.api
        .post(&host.ws(&format!("orders/{order}/{what}")), body)
        .await
}

async fn shift(host: &TestHost, order: &str, cell: &str, percent: u32) -> Value {
    post(
        host,
        order,
        "shift",
        &json!({ "cell": cell, "percent": percent }),
    )
    .await
    .expect("shifted")
}

/// The share of a cell in the pool of an application, in percent.
async fn share(host: &TestHost, order: &str, application: &str, cell: &str) -> f64 {
    let path = host.ws(&format!("orders/{order}/traffic"));
    let traffic = host.api.get(&path).await.expect("the order's traffic");
    let pools = traffic["pools"].as_array().expect("pools").clone();
    let pool = pools
        .iter()
        .find(|pool| pool["application"] == application)
        .expect("the application's pool");
    let cells = pool["cells"].as_array().expect("cells").clone();
    let found = cells.iter().find(|found| found["cell"] == cell);
    found.expect("the cell")["share_percent"]
        .as_f64()
        .expect("a share")
}

#[tokio::test]
async fn blue_and_green_change_places() {
    let (host, scene, side) = ready().await;
    what_is_missing_is_said(&host, &scene, &side).await;
    rolled_back_in_step_1(&host, &scene, &side).await;
    step_2_back_without_step_1(&host, &scene, &side).await;
    step_2_again_then_the_order_back_in_step_3(&host, &scene, &side).await;
    to_the_end_with_step_4_left_out_once(&host, &scene, &side).await;
}

#[tokio::test]
async fn weights_are_set_by_hand_and_canaries_wait_for_figures() {
    let (host, scene, _) = ready().await;
    gray_traffic(&host, &scene).await;
    a_cancelled_shift_is_taken_back(&host, &scene).await;
    a_cancelled_rollback_lets_nothing_bad_in(&host, &scene).await;
    a_canary_that_sees_too_little_never_goes_on(&host, &scene).await;
    a_cancelled_canary_costs_nobody_traffic_for_ever(&host, &scene).await;
    a_canary_with_bad_figures_is_rolled_back(&host, &scene).await;
    a_canary_with_good_figures_goes_to_the_end(&host, &scene).await;
}

async fn what_is_missing_is_said(host: &TestHost, scene: &Scene, side: &Scene) {
    let blue_green = |parameters: Value| order(scene, "blue-green", parameters, 1);
    let idle = json!({ "name": "idle", "tech_stack": { "name": "binary", "version": "*" } });
    let idle = host.api.post("/v1/apps", &idle).await;
    let idle = idle.expect("an application")["id"].clone();
    let mut only_blue = blue_green(json!({}));
    only_blue["targets"][0]["cells"] = json!(["cell-a"]);
    let mut twice = blue_green(json!({}));
    twice["shift_only"] = json!([{ "instance": scene.instance }]);
    let mut unknown = blue_green(json!({}));
    unknown["shift_only"] = json!([{ "instance": side.instance, "package": side.packages[0] }]);
    for (order, code, says) in [
        (
            blue_green(json!({ "green": "cell-x" })),
            "plugin_refused",
            "`cell-x` is not a cell of the workspace, which has cell-a and cell-b",
        ),
        (
            only_blue,
            "plugin_refused",
            "`scene` has no server in the cell cell-b",
        ),
        (twice, "target_twice", "`scene` stands in this order twice"),
        (unknown, "unknown_field", "package"),
        (
            {
                let mut order = blue_green(json!({}));
                let instances = host.ws("service-instances");
                let nobody =
                    json!({ "name": "nobody", "app": idle, "parameters": { "program": "run.sh" } });
                let nobody = host.api.post(&instances, &nobody).await;
                let nobody = nobody.expect("an instance");
                order["shift_only"] = json!([{ "instance": nobody["id"] }]);
                order
            },
            "nothing_to_shift",
            "nothing of `idle` is installed",
        ),
        (
            {
                let mut order = blue_green(json!({}));
                order["shift_only"] = vec![json!({ "instance": side.instance }); 101].into();
                order
            },
            "targets_out_of_range",
            "names 101",
        ),
    ] {
        let (status, found, detail) = refusal(host.order(&order).await);
        assert_eq!((status, found.as_str()), (422, code), "{detail}");
        assert!(detail.contains(says), "{found}: {detail}");
    }
    // A strategy that moves no traffic of others leaves them as they are.
    let mut grouped = order(scene, "grouped", json!({ "grouping": "one-per-group" }), 1);
    grouped["shift_only"] = json!([{ "instance": side.instance }]);
    grouped.as_object_mut().expect("an order").remove("run");
    let shown = host.api.post(&host.ws("orders/preview"), &grouped).await;
    assert_eq!(shown.expect("a preview")["server_count"], 4);
}

/// Waits until the rollback of a step has come this far.
async fn step_back(host: &TestHost, order: &str, step: &str, state: &str) {
    nodes_when(host, order, "the step's rollback", |nodes| {
        named(nodes, step).is_some_and(|stage| stage["rollback"]["state"] == state)
    })
    .await;
}

/// Retry, ignore, cancel, run again, and rollback of each step: waiting, while it runs, and again when it failed.
#[tokio::test]
async fn people_act_on_each_step() {
    let (host, scene, side) = ready().await;
    scene.forget();
    scene.put("fail-agent-2");
    let id = host
        .order(&blue_green(&scene, &side, 1))
        .await
        .expect("an order");
    let shown = waits(&host, &id, "confirm 1 cut traffic").await;
    let stage = |name: &str| named(&shown, name).expect("the stage")["node"].clone();
    let on = async |action: &str, step: &str| {
        let action = json!({ "action": action, "node": stage(step), "reason": "try it" });
        let mut action = action;
        if action["action"] != "roll_back_stage" {
            action.as_object_mut().expect("an action").remove("reason");
        }
        act(&host, &id, &action).await.expect("acted on");
    };
    let (cut, green) = ("1 cut traffic", "2 release green");
    let (switch, blue) = ("3 switch traffic", "4 release blue");

    // The first step back, and again.
    on("roll_back_stage", cut).await;
    step_back(&host, &id, cut, "done").await;
    assert_eq!(weights(&host, &scene).await, [100; 4]);
    on("run_again", cut).await;
    waits(&host, &id, "confirm 1 cut traffic").await;
    assert_eq!(weights(&host, &scene).await, [100, 0, 100, 0]);
    on("confirm", cut).await;

    // What failed in the second is tried again.
    host.order_in(&id, &["blocked"]).await;
    scene.take("fail-agent-2");
    on("retry", green).await;
    waits(&host, &id, "confirm 2 release green").await;
    assert_eq!(
        versions(&host, &scene),
        ["1.0.0", "2.0.0", "1.0.0", "2.0.0"]
    );
    // Its rollback fails, and is made again.
    scene.put("fail-agent-2");
    on("roll_back_stage", green).await;
    step_back(&host, &id, green, "running").await;
    let rollbacks = host.ws("orders?purpose=rollback&state=blocked");
    let rollback = eventually("the rollback order is blocked", || async {
        let found = items(&host.api.get(&rollbacks).await.expect("orders"));
        let first = found.first().map(|order| text(&order["id"]));
        first.ok_or_else(|| "none is".to_owned())
    })
    .await;
    act(&host, &rollback, &json!({ "action": "cancel" }))
        .await
        .expect("the rollback is ended");
    step_back(&host, &id, green, "failed").await;
    scene.take("fail-agent-2");
    on("roll_back_stage", green).await;
    step_back(&host, &id, green, "done").await;
    assert_eq!(versions(&host, &scene), ["1.0.0"; 4]);
    // While it runs: what runs is ended first.
    scene.forget();
    scene.put("hold");
    on("run_again", green).await;
    scene.wait_begun(1).await;
    on("roll_back_stage", green).await;
    scene.take("hold");
    step_back(&host, &id, green, "done").await;
    assert_eq!(versions(&host, &scene), ["1.0.0"; 4]);
    assert_eq!(weights(&host, &scene).await, [100, 0, 100, 0]);
    on("run_again", green).await;
    waits(&host, &id, "confirm 2 release green").await;
    on("confirm", green).await;

    // The third back, and again.
    waits(&host, &id, "confirm 3 switch traffic").await;
    on("roll_back_stage", switch).await;
    step_back(&host, &id, switch, "done").await;
    assert_eq!(weights(&host, &scene).await, [100, 0, 100, 0]);
    on("run_again", switch).await;
    waits(&host, &id, "confirm 3 switch traffic").await;
    assert_eq!(weights(&host, &scene).await, [0, 100, 0, 100]);
    scene.put("fail-agent-1");
    on("confirm", switch).await;

    // What failed in the fourth is gone on without; the step is ended, and the next one restores the traffic.
    host.order_in(&id, &["blocked"]).await;
    on("ignore", blue).await;
    waits(&host, &id, "confirm 4 release blue").await;
    on("cancel", blue).await;
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    scene.take("fail-agent-1");
    assert_eq!(
        versions(&host, &scene),
        ["1.0.0", "2.0.0", "2.0.0", "2.0.0"]
    );
    assert_eq!(weights(&host, &side).await, [100; 2]);
}

fn blue_green(scene: &Scene, side: &Scene, package: usize) -> Value {
    let mut order = order(scene, "blue-green", json!({}), package);
    order["shift_only"] = json!([{ "instance": side.instance }]);
    order
}

async fn rolled_back_in_step_1(host: &TestHost, scene: &Scene, side: &Scene) {
    let id = host
        .order(&blue_green(scene, side, 1))
        .await
        .expect("an order");
    let shown = waits(host, &id, "confirm 1 cut traffic").await;
    assert_eq!(weights(host, scene).await, [100, 0, 100, 0]);
    assert_eq!(weights(host, side).await, [100, 0]);
    // Nothing is released in green yet; and what is no stage is not rolled back by itself.
    let (_, code, detail) = refusal(
        post(
            host,
            &id,
            "shift",
            &json!({ "cell": "cell-b", "percent": 10 }),
        )
        .await,
    );
    assert_eq!(code, "cell_not_released", "{detail}");
    let gate = named(&shown, "confirm 1 cut traffic").expect("the gate")["node"].clone();
    let (_, code, detail) = refusal(
        act(
            host,
            &id,
            &json!({ "action": "roll_back_stage", "node": gate, "reason": "x" }),
        )
        .await,
    );
    assert_eq!(code, "wrong_level", "{detail}");
    act(
        host,
        &id,
        &json!({ "action": "roll_back", "reason": "changed my mind" }),
    )
    .await
    .expect("a rollback");
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "rolled_back", "{ended}");
    scene.check_serves(host, 0).await;
    side.check_serves(host, 0).await;
    let rollback = text(&ended["rolled_back_by"]);
    let (_, code, detail) = refusal(
        act(
            host,
            &rollback,
            &json!({ "action": "roll_back", "reason": "again" }),
        )
        .await,
    );
    assert_eq!(code, "rollback_of_rollback", "{detail}");
}

async fn step_2_again_then_the_order_back_in_step_3(host: &TestHost, scene: &Scene, side: &Scene) {
    scene.forget();
    let id = host
        .order(&blue_green(scene, side, 1))
        .await
        .expect("an order");
    waits(host, &id, "confirm 1 cut traffic").await;
    confirm(host, &id).await;
    let shown = waits(host, &id, "confirm 2 release green").await;
    assert_eq!(versions(host, scene), ["1.0.0", "2.0.0", "1.0.0", "2.0.0"]);
    assert_eq!(weights(host, scene).await, [100, 0, 100, 0]);
    // 0 to 50 % to what was just released, seen per pool.
    shift(host, &id, "cell-b", 30).await;
    for application in ["scene", "side"] {
        let percent = share(host, &id, application, "cell-b").await;
        assert!((29.0..=31.0).contains(&percent), "{application}: {percent}");
    }
    for (cell, percent, expected) in [
        ("cell-b", 51, "out_of_limit"),
        ("cell-a", 10, "cell_not_released"),
        ("cell-x", 10, "cell_not_released"),
    ] {
        let body = json!({ "cell": cell, "percent": percent });
        let (_, code, detail) = refusal(post(host, &id, "shift", &body).await);
        assert_eq!(code, expected, "{detail}");
    }
    // The step's way back: the gray shift, then what it released.
    let stage = named(&shown, "2 release green").expect("the stage")["node"].clone();
    act(
        host,
        &id,
        &json!({ "action": "roll_back_stage", "node": stage, "reason": "looks bad" }),
    )
    .await
    .expect("the step is rolled back");
    let back = nodes_when(host, &id, "step 2 is rolled back", |nodes| {
        named(nodes, "2 release green").is_some_and(|stage| stage["rollback"]["state"] == "done")
    })
    .await;
    assert_eq!(
        named(&back, "2 release green").expect("the stage")["state"],
        "awaiting_confirmation"
    );
    let header = host.order_in(&id, &["awaiting_confirmation"]).await;
    assert!(
        text(&header["state_reason"]).contains("run it again, or go on without it"),
        "{header}"
    );
    assert_eq!(versions(host, scene), ["1.0.0"; 4]);
    assert_eq!(weights(host, scene).await, [100, 0, 100, 0]);
    assert_eq!(weights(host, side).await, [100, 0]);
    act(host, &id, &json!({ "action": "run_again", "node": stage }))
        .await
        .expect("the step runs again");
    waits(host, &id, "confirm 2 release green").await;
    assert_eq!(versions(host, scene), ["1.0.0", "2.0.0", "1.0.0", "2.0.0"]);
    shift(host, &id, "cell-b", 50).await;
    confirm(host, &id).await;
    waits(host, &id, "confirm 3 switch traffic").await;
    assert_eq!(weights(host, scene).await, [0, 100, 0, 100]);
    assert_eq!(weights(host, side).await, [0, 100]);
    // Traffic is shifted to what a step has just released: this one has released nothing.
    let body = json!({ "cell": "cell-b", "percent": 20 });
    let (_, code, detail) = refusal(post(host, &id, "shift", &body).await);
    assert_eq!(code, "cell_not_released");
    assert!(detail.contains("3 switch traffic"), "{detail}");
    // Green was released twice and brought back once; blue never.
    let begun = scene.begun();
    assert_eq!(
        (begun.get("agent-2"), begun.get("agent-1")),
        (Some(&3), None),
        "{begun:?}"
    );
    act(
        host,
        &id,
        &json!({ "action": "roll_back", "reason": "worse under load" }),
    )
    .await
    .expect("a rollback");
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "rolled_back", "{ended}");
    scene.check_serves(host, 0).await;
    side.check_serves(host, 0).await;
}

/// Where the first step was left out, the second one has cut green's traffic itself: its rollback gives it back.
async fn step_2_back_without_step_1(host: &TestHost, scene: &Scene, side: &Scene) {
    let id = host
        .order(&blue_green(scene, side, 1))
        .await
        .expect("an order");
    let shown = waits(host, &id, "confirm 1 cut traffic").await;
    let stage = |name: &str| named(&shown, name).expect("the stage")["node"].clone();
    let green = "2 release green";
    let cancel = json!({ "action": "cancel", "node": stage("1 cut traffic") });
    act(host, &id, &cancel).await.expect("left out");
    waits(host, &id, "confirm 2 release green").await;
    assert_eq!(weights(host, scene).await, [100, 0, 100, 0]);
    act(
        host,
        &id,
        &json!({ "action": "roll_back_stage", "node": stage(green), "reason": "looks bad" }),
    )
    .await
    .expect("the step is rolled back");
    step_back(host, &id, green, "done").await;
    assert_eq!(versions(host, scene), ["1.0.0"; 4]);
    assert_eq!(weights(host, scene).await, [100; 4]);
    act(host, &id, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "cancelled", "{ended}");
    scene.check_serves(host, 0).await;
    side.check_serves(host, 0).await;
}

async fn to_the_end_with_step_4_left_out_once(host: &TestHost, scene: &Scene, side: &Scene) {
    let id = host
        .order(&blue_green(scene, side, 1))
        .await
        .expect("an order");
    for step in [
        "confirm 1 cut traffic",
        "confirm 2 release green",
        "confirm 3 switch traffic",
    ] {
        waits(host, &id, step).await;
        confirm(host, &id).await;
    }
    let shown = waits(host, &id, "confirm 4 release blue").await;
    assert_eq!(versions(host, scene), ["2.0.0"; 4]);
    assert_eq!(weights(host, scene).await, [0, 100, 0, 100]);
    shift(host, &id, "cell-a", 20).await;
    let percent = share(host, &id, "scene", "cell-a").await;
    assert!((19.0..=21.0).contains(&percent), "{percent}");
    // From here on only the step can be rolled back.
    let (_, code, detail) = refusal(
        act(
            host,
            &id,
            &json!({ "action": "roll_back", "reason": "too late" }),
        )
        .await,
    );
    assert_eq!(code, "no_way_back", "{detail}");
    let stage = named(&shown, "4 release blue").expect("the stage")["node"].clone();
    act(
        host,
        &id,
        &json!({ "action": "roll_back_stage", "node": stage, "reason": "once more" }),
    )
    .await
    .expect("the step is rolled back");
    nodes_when(host, &id, "step 4 is rolled back", |nodes| {
        named(nodes, "4 release blue").is_some_and(|stage| stage["rollback"]["state"] == "done")
    })
    .await;
    assert_eq!(versions(host, scene), ["1.0.0", "2.0.0", "1.0.0", "2.0.0"]);
    assert_eq!(weights(host, scene).await, [0, 100, 0, 100]);
    act(host, &id, &json!({ "action": "run_again", "node": stage }))
        .await
        .expect("the step runs again");
    waits(host, &id, "confirm 4 release blue").await;
    confirm(host, &id).await;
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    scene.check_serves(host, 1).await;
    side.check_serves(host, 0).await;
    let (_, code, detail) = refusal(
        act(
            host,
            &id,
            &json!({ "action": "roll_back", "reason": "too late" }),
        )
        .await,
    );
    assert_eq!(code, "no_way_back", "{detail}");
}

async fn gray_traffic(host: &TestHost, scene: &Scene) {
    let parameters = json!({ "grouping": "one-per-group", "gray_traffic": true });
    let id = host
        .order(&order(scene, "grouped", parameters, 1))
        .await
        .expect("an order");
    waits(host, &id, "confirm group 1").await;
    assert_eq!(weights(host, scene).await, [0, 100, 100, 100]);
    let server = |index: usize| scene.servers[index].1.clone();
    let weigh = |index: usize, weight: u32| json!({ "weights": [{ "server": server(index), "weight": weight }] });
    post(host, &id, "weights", &weigh(0, 30))
        .await
        .expect("the weight is set");
    assert_eq!(weights(host, scene).await, [30, 100, 100, 100]);
    for (body, expected) in [
        (weigh(1, 10), "not_released"),
        (weigh(0, 101), "out_of_limit"),
        (json!({ "weights": [] }), "out_of_limit"),
        (
            json!({ "weights": [weigh(0, 1)["weights"][0], weigh(0, 2)["weights"][0]] }),
            "not_released",
        ),
    ] {
        let (_, code, detail) = refusal(post(host, &id, "weights", &body).await);
        assert_eq!(code, expected, "{body}: {detail}");
    }
    // A pool that refuses is told, and nothing is kept as if it had not.
    scene.fault(host, &json!({ "refuse_set": true })).await;
    let (_, code, detail) = refusal(post(host, &id, "weights", &weigh(0, 40)).await);
    assert_eq!(code, "traffic_not_changed", "{detail}");
    scene.fault(host, &json!({})).await;
    assert_eq!(weights(host, scene).await, [30, 100, 100, 100]);
    // A failed server stays at 0.
    scene.put("fail-agent-2");
    confirm(host, &id).await;
    host.order_in(&id, &["blocked"]).await;
    let (_, code, detail) = refusal(post(host, &id, "weights", &weigh(1, 10)).await);
    assert!(
        code == "not_released" && detail.contains("agent-2"),
        "{code}: {detail}"
    );
    assert_eq!(weights(host, scene).await, [30, 0, 100, 100]);
    scene.take("fail-agent-2");
    act(host, &id, &json!({ "action": "retry", "node": 0 }))
        .await
        .expect("retried");
    for group in ["confirm group 2", "confirm group 3"] {
        waits(host, &id, group).await;
        confirm(host, &id).await;
    }
    waits(host, &id, "confirm group 4").await;
    assert_eq!(weights(host, scene).await, [30, 0, 0, 0]);
    // The last server with traffic keeps it.
    let (_, code, detail) = refusal(post(host, &id, "weights", &weigh(0, 0)).await);
    assert!(
        code == "traffic_not_changed" && detail.contains("min_healthy_members is 1"),
        "{code}: {detail}"
    );
    let all: Vec<Value> = (0..4)
        .map(|index| json!({ "server": server(index), "weight": 100 }))
        .collect();
    post(host, &id, "weights", &json!({ "weights": all }))
        .await
        .expect("weights are set");
    confirm(host, &id).await;
    assert_eq!(host.order_ended(&id).await["state"], "succeeded");
    scene.check_serves(host, 1).await;
    let (_, code, _) = refusal(post(host, &id, "weights", &weigh(0, 10)).await);
    assert_eq!(code, "order_ended");
    let told: Vec<Value> = events(host, &id)
        .await
        .into_iter()
        .filter(|event| event["type"] == "traffic")
        .collect();
    let errors = told
        .iter()
        .filter(|event| !event["error"].is_null())
        .count();
    assert_eq!((told.len(), errors), (4, 2), "{told:?}");
}

async fn a_cancelled_shift_is_taken_back(host: &TestHost, scene: &Scene) {
    let id = host
        .order(&order(scene, "blue-green", json!({}), 0))
        .await
        .expect("an order");
    waits(host, &id, "confirm 1 cut traffic").await;
    confirm(host, &id).await;
    waits(host, &id, "confirm 2 release green").await;
    shift(host, &id, "cell-b", 10).await;
    act(host, &id, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    assert_eq!(host.order_ended(&id).await["state"], "cancelled");
    assert_eq!(weights(host, scene).await, [100; 4]);
    let id = host
        .order(&order(
            scene,
            "grouped",
            json!({ "grouping": "one-per-group" }),
            1,
        ))
        .await
        .expect("an order");
    assert_eq!(host.order_ended(&id).await["state"], "succeeded");
}

/// Waits until the rollback order of an order works on a server; its id.
async fn rollback_works_on(host: &TestHost, scene: &Scene, order: &str) -> String {
    let path = host.ws(&format!("orders/{order}"));
    let rollback = eventually("the rollback order is made", || async {
        let header = host.api.get(&path).await;
        let header = header.map_err(|error| error.to_string())?;
        let rollback = header["rolled_back_by"].as_str().map(str::to_owned);
        rollback.ok_or_else(|| header.to_string())
    })
    .await;
    scene.wait_begun(1).await;
    rollback
}

/// `scene` has 2.0.0 everywhere before and after.
async fn a_cancelled_rollback_lets_nothing_bad_in(host: &TestHost, scene: &Scene) {
    // A canary has a share of the traffic; its rollback is cancelled when that is taken away and nothing is brought back.
    let parameters = json!({ "percentages": [20, 100], "window_s": 1, "max_windows": 1 });
    let id = host
        .order(&order(scene, "canary", parameters, 0))
        .await
        .expect("an order");
    waits(host, &id, "judge 20 %").await;
    assert_eq!(weights(host, scene).await, [75, 100, 100, 100]);
    // What has a share of the traffic is not grouped anew.
    let anew = json!({ "edit": "regroup", "application": "scene", "strategy": "canary" });
    let (_, code, detail) = refusal(post(host, &id, "revisions", &anew).await);
    assert_eq!(code, "traffic_moved", "{detail}");
    scene.forget();
    scene.put("hold");
    let roll_back = json!({ "action": "roll_back", "reason": "bad" });
    act(host, &id, &roll_back).await.expect("a rollback");
    let rollback = rollback_works_on(host, scene, &id).await;
    assert_eq!(weights(host, scene).await, [0, 100, 100, 100]);
    act(host, &rollback, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    let ended = host.order_ended(&rollback).await;
    assert_eq!(ended["state"], "failed", "{ended}");
    let left = nodes(host, &rollback).await;
    let away = named(&left, "traffic of scene away").expect("the shift");
    assert!(
        text(&away["message"]).contains("stays away from"),
        "it says why not all is as before: {away}"
    );
    assert_eq!(host.order_ended(&id).await["state"], "failed");
    assert_eq!(weights(host, scene).await, [0, 100, 100, 100]);
    assert_eq!(versions(host, scene)[0], "1.0.0");
    scene.take("hold");
    mend(host, scene).await;

    // A rolling release: what the rollback did not reach keeps what it has, what it drained gets nothing.
    let grouping = json!({ "grouping": "one-per-group" });
    let mut rolling = order(scene, "grouped", grouping, 0);
    rolling["limits"] = json!({ "max_in_flight": 1 });
    let id = host.order(&rolling).await.expect("an order");
    assert_eq!(host.order_ended(&id).await["state"], "succeeded");
    scene.forget();
    scene.put("hold");
    // Of an order that has ended the answer is its rollback.
    let rollback = act(host, &id, &roll_back).await.expect("a rollback");
    let rollback = text(&rollback["id"]);
    scene.wait_begun(1).await;
    act(host, &rollback, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    host.order_ended(&rollback).await;
    let drained = scene.begun().into_keys().next().expect("a server");
    let expected: Vec<u64> = scene
        .servers
        .iter()
        .map(|(name, _)| if *name == drained { 0 } else { 100 })
        .collect();
    assert_eq!(weights(host, scene).await, expected);
    assert_eq!(versions(host, scene), ["1.0.0"; 4]);
    scene.take("hold");
    mend(host, scene).await;
}

/// Releases 2.0.0 again, by a plain order, and gives back the weights that were taken.
async fn mend(host: &TestHost, scene: &Scene) {
    let mend = order(
        scene,
        "grouped",
        json!({ "grouping": "one-per-group", "weight_override": 100 }),
        1,
    );
    let id = host.order(&mend).await.expect("an order");
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    scene.check_serves(host, 1).await;
}

/// Tells the pool what its members answer: the first one with these errors.
async fn answers(host: &TestHost, scene: &Scene, error_percent: u32) {
    let members: Vec<Value> = scene
        .servers
        .iter()
        .enumerate()
        .map(|(index, (_, server))| {
            json!({
                "server": server,
                "requests_per_s": 1000,
                "error_percent": if index == 0 { error_percent } else { 0 },
                "latency_ms": 10,
            })
        })
        .collect();
    let path = host.ws(&format!("pools/{}/traffic", scene.pool));
    host.api
        .put(&path, &json!({ "members": members }))
        .await
        .expect("the pool is told");
}

async fn a_canary_with_bad_figures_is_rolled_back(host: &TestHost, scene: &Scene) {
    answers(host, scene, 20).await;
    let parameters = json!({ "percentages": [20, 100], "window_s": 1 });
    let id = host
        .order(&order(scene, "canary", parameters, 0))
        .await
        .expect("an order");
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "rolled_back", "{ended}");
    let judged = nodes(host, &id).await;
    let judge = named(&judged, "judge 20 %").expect("the judge");
    assert!(
        text(&judge["message"]).contains("requests to the new version failed; at most 5 % may"),
        "nobody was asked: {judge}"
    );
    scene.check_serves(host, 1).await;
}

async fn a_canary_with_good_figures_goes_to_the_end(host: &TestHost, scene: &Scene) {
    answers(host, scene, 0).await;
    let parameters = json!({ "percentages": [20, 60, 100], "window_s": 1 });
    let id = host
        .order(&order(scene, "canary", parameters, 0))
        .await
        .expect("an order");
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    scene.check_serves(host, 0).await;
    let told = events(host, &id).await;
    let people = told
        .iter()
        .filter(|event| event["type"] == "action")
        .count();
    assert_eq!(people, 0, "it went on by itself: {told:?}");
}

async fn a_canary_that_sees_too_little_never_goes_on(host: &TestHost, scene: &Scene) {
    let parameters = json!({ "percentages": [20, 100], "window_s": 1, "max_windows": 2 });
    let id = host
        .order(&order(scene, "canary", parameters, 0))
        .await
        .expect("an order");
    let shown = waits(host, &id, "judge 20 %").await;
    let judge = named(&shown, "judge 20 %").expect("the judge");
    assert!(
        text(&judge["message"]).contains("0 requests to the new version"),
        "{judge}"
    );
    assert_eq!(versions(host, scene), ["1.0.0", "2.0.0", "2.0.0", "2.0.0"]);
    // A fifth of the traffic for one server of four: 75 to three times 100.
    assert_eq!(weights(host, scene).await, [75, 100, 100, 100]);
    act(
        host,
        &id,
        &json!({ "action": "roll_back", "reason": "nobody asks for it" }),
    )
    .await
    .expect("a rollback");
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "rolled_back", "{ended}");
    scene.check_serves(host, 1).await;
    // Weights were taken away from what was rolled back before it was touched.
    let rollback = text(&ended["rolled_back_by"]);
    let names: Vec<String> = nodes(host, &rollback)
        .await
        .iter()
        .filter(|node| node["kind"] == "traffic" && node["server"].is_null())
        .map(|node| text(&node["name"]))
        .collect();
    assert_eq!(
        names,
        ["traffic of scene away", "traffic of scene as before"]
    );
    assert_eq!(
        items(
            &host
                .api
                .get(&host.ws("orders?state=running"))
                .await
                .expect("orders")
        )
        .len(),
        0
    );
}

/// What a cancelled canary has released gets no traffic that nobody let in; the next release gives back what it took.
async fn a_cancelled_canary_costs_nobody_traffic_for_ever(host: &TestHost, scene: &Scene) {
    let parameters = json!({ "percentages": [50, 100], "window_s": 1, "max_windows": 1 });
    let id = host
        .order(&order(scene, "canary", parameters, 0))
        .await
        .expect("an order");
    waits(host, &id, "judge 50 %").await;
    assert_eq!(weights(host, scene).await, [100, 100, 100, 100]);
    act(host, &id, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "cancelled", "{ended}");
    let mut taken = weights(host, scene).await;
    taken.sort_unstable();
    assert_eq!(taken, [0, 0, 100, 100]);
    let rolling = json!({ "grouping": "one-per-group" });
    let id = host
        .order(&order(scene, "grouped", rolling, 1))
        .await
        .expect("an order");
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    assert_eq!(weights(host, scene).await, [100, 100, 100, 100]);
    scene.check_serves(host, 1).await;
}
