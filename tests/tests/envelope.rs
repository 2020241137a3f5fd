//! The safety envelope against strategies that mean harm: whatever a plugin plans, the order's limits hold.
//!
//! One server with four agents and the shipped plugins, and beside them a test guest that breaks one rule at a time.

use serde_json::{Value, json};
use windlass_tests::{
    guests::{PluginDirectory, guest, wait_active},
    host::{Setup, TestHost, eventually, text},
    scene::{Scene, act, events, group_of, most_busy, nodes, nodes_when, refusal, unit},
};

/// An order whose strategy is the hostile guest.
fn hostile(scene: &Scene, behave: &str, package: usize, limits: Value) -> Value {
    let mut order = scene.order(behave, package);
    order["strategy"] = "hostile".into();
    order["parameters"] = json!({ "behave": behave });
    order["limits"] = limits;
    order["run"] = true.into();
    order
}

async fn ready() -> (PluginDirectory, TestHost, Scene) {
    let plugins = PluginDirectory::shipped();
    plugins.drop_in(
        "hostile.wasm",
        &guest("deployment-strategy", "hostile", "1.0.0"),
    );
    let host = TestHost::start(Setup {
        agents: 4,
        plugins: Some(plugins.path()),
        ..Setup::default()
    })
    .await;
    wait_active(&host, "hostile@1.0.0").await;
    // All in one cell: the limit counts by cell.
    for (_, id) in host.servers().await {
        host.api
            .put(
                &host.ws(&format!("servers/{id}")),
                &json!({ "cell": "cell-a" }),
            )
            .await
            .expect("the server is moved");
    }
    let scene = Scene::prepare(&host).await;
    scene.release(&host, 0).await;
    scene.forget();
    (plugins, host, scene)
}

#[tokio::test]
async fn what_a_hostile_strategy_plans_is_refused_or_held() {
    let (_plugins, mut host, scene) = ready().await;
    plans_that_break_a_rule_are_refused(&host, &scene).await;
    all_at_once_is_held_at_max_unavailable(&host, &scene).await;
    all_at_once_is_held_at_max_in_flight(&host, &scene).await;
    all_at_once_leaves_the_pool_a_member(&host, &scene).await;
    an_offline_agent_counts_as_unavailable(&mut host, &scene).await;
    two_orders_share_the_limit(&host, &scene).await;
}

#[tokio::test]
async fn what_a_hostile_strategy_does_while_it_runs_is_stopped() {
    let (_plugins, host, scene) = ready().await;
    a_broken_health_check_blocks_whatever_the_judge_says(&host, &scene).await;
    for (behave, cause) in [
        ("rollback-trap", "trap"),
        ("rollback-missing", "this guest has no rollback"),
        ("rollback-empty", "the strategy returned no nodes"),
        ("rollback-twice", "stands in the plan twice"),
    ] {
        without_a_rollback_the_core_rolls_back(&host, &scene, behave, cause).await;
    }
    a_rollback_all_at_once_keeps_the_limit(&host, &scene).await;
    traffic_is_not_cut_one_server_after_the_other(&host, &scene).await;
    what_is_taken_offline_gets_no_traffic(&host, &scene).await;
}

async fn plans_that_break_a_rule_are_refused(host: &TestHost, scene: &Scene) {
    let second = &scene.servers[1].1;
    for (behave, says) in [
        (
            "skip-servers",
            format!("leaves out 2 server(s), the first is `{second}` of `scene`"),
        ),
        (
            "unknown-server",
            "names the server `srv_nobody`, which is not a server of `scene`".to_owned(),
        ),
        ("duplicate-server", "stands in the plan twice".to_owned()),
        ("twice-in-parallel", "stands in the plan twice".to_owned()),
        ("empty", "the strategy returned no nodes".to_owned()),
        ("bad-share", "gives a share of 101 %".to_owned()),
        (
            "late-parent",
            "a parent stands before its children".to_owned(),
        ),
        (
            "unknown-application",
            "names the application `nothing`".to_owned(),
        ),
        ("bad-weight", "1000: weights are 0 to 100".to_owned()),
        (
            "bad-parent",
            "a parent stands before its children".to_owned(),
        ),
        ("unknown-node", "teleport".to_owned()),
        ("endless-gates", "more memory than the limit of".to_owned()),
        (
            "cut-traffic",
            "would cut all its traffic: `min_healthy_members` is 1".to_owned(),
        ),
        ("cut-twice", "twice: give each server one weight".to_owned()),
        ("shift-bad-weight", "101: weights are 0 to 100".to_owned()),
        (
            "shift-unknown-server",
            "names the server `srv_nobody`".to_owned(),
        ),
        (
            "shift-unknown-application",
            "names the application `nothing`".to_owned(),
        ),
        ("childless", "node 0 (`nobody`) has no children".to_owned()),
        (
            "leaf-parent",
            "node 1 (`below`) hangs below node 0, which is a leaf".to_owned(),
        ),
        ("too-deep", "(`level`) is deeper than".to_owned()),
        (
            "bad-name",
            "node 0 has a name of 9 characters; a name has 1 to 60, none of them a control"
                .to_owned(),
        ),
        ("long-pause", "node 0 (`pause`) waits for".to_owned()),
        ("bad-scope", "everything".to_owned()),
        (
            "share-unknown-server",
            "names the server `srv_nobody`, which is not a server of `scene`".to_owned(),
        ),
        (
            "share-twice",
            "twice: give each server one weight".to_owned(),
        ),
        (
            "share-nobody",
            "would cut all its traffic: `min_healthy_members` is 1".to_owned(),
        ),
        (
            "share-nothing",
            "would cut all its traffic: `min_healthy_members` is 1".to_owned(),
        ),
        ("trap", "trap".to_owned()),
    ] {
        let mut order = hostile(scene, behave, 1, json!({}));
        let (status, code, detail) = refusal(host.order(&order).await);
        // A plan that breaks a rule can be corrected by the sender of the order; a failed call cannot.
        let expected = if code == "plan_refused" { 422 } else { 502 };
        assert_eq!(status, expected, "{behave}: {code}: {detail}");
        // What is no answer of the contract is the call's failure; what is no plan is refused as such.
        let codes: &[&str] = match behave {
            "empty"
            | "skip-servers"
            | "unknown-server"
            | "duplicate-server"
            | "twice-in-parallel"
            | "unknown-application"
            | "cut-traffic" => &["plan_refused"],
            "trap" | "endless-gates" => &["plugin_call_failed"],
            _ => &["plan_refused", "plugin_call_failed"],
        };
        assert!(codes.contains(&code.as_str()), "{behave}: {code}: {detail}");
        assert!(detail.contains(&says), "{behave}: {code}: {detail}");
        assert!(
            detail.contains("hostile"),
            "{behave}: it names the plugin: {detail}"
        );
        order.as_object_mut().expect("an object").remove("run");
        let (_, _, previewed) = refusal(host.api.post(&host.ws("orders/preview"), &order).await);
        assert_eq!(previewed, detail, "{behave}: the preview says the same");
    }
    let orders = host.api.get(&host.ws("orders")).await.expect("orders");
    assert_eq!(
        orders["items"].as_array().map(Vec::len),
        Some(1),
        "nothing but the first release was made: {orders}"
    );
    assert_eq!(scene.log(), Vec::<String>::new(), "no server was touched");
    scene.check_serves(host, 0).await;
}

fn held(nodes: &[Value], says: &str) -> usize {
    nodes
        .iter()
        .filter(|node| {
            node["level"] == "server"
                && node["message"]
                    .as_str()
                    .is_some_and(|message| message.contains(says))
        })
        .count()
}

/// Lets an order go on to its end, and checks that there were never more than so many servers at once.
async fn finish(host: &TestHost, scene: &Scene, order: &str, most: usize, package: usize) {
    scene.take("hold");
    let ended = host.order_ended(order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    let (nodes, events) = (nodes(host, order).await, events(host, order).await);
    assert_eq!(most_busy(&nodes, &events), most, "by the events");
    assert!(
        scene.most_at_once() <= most,
        "by the executions: {:?}",
        scene.log()
    );
    assert!(
        scene.begun().values().all(|times| *times == 1),
        "{:?}",
        scene.begun()
    );
    assert_eq!(scene.begun().len(), 4);
    scene.check_serves(host, package).await;
    scene.forget();
}

async fn all_at_once_is_held_at_max_unavailable(host: &TestHost, scene: &Scene) {
    scene.put("hold");
    let order = host
        .order(&hostile(scene, "all-at-once", 1, json!({})))
        .await
        .expect("an order");
    scene.wait_begun(2).await;
    let says = "max_unavailable is 50% of 4 servers in cell cell-a, and 2 are unavailable";
    nodes_when(host, &order, "two servers are held", |nodes| {
        held(nodes, says) == 2
    })
    .await;
    assert_eq!(scene.begun().len(), 2, "{:?}", scene.log());
    finish(host, scene, &order, 2, 1).await;
}

async fn all_at_once_is_held_at_max_in_flight(host: &TestHost, scene: &Scene) {
    scene.put("hold");
    let limits = json!({ "max_unavailable": "100%", "min_healthy_members": 0, "max_in_flight": 1 });
    let order = host
        .order(&hostile(scene, "all-at-once", 0, limits))
        .await
        .expect("an order");
    scene.wait_begun(1).await;
    let waiting = nodes(host, &order)
        .await
        .iter()
        .filter(|node| node["level"] == "server" && node["state"] == "not_started")
        .count();
    assert_eq!(waiting, 3);
    finish(host, scene, &order, 1, 0).await;
}

async fn all_at_once_leaves_the_pool_a_member(host: &TestHost, scene: &Scene) {
    scene.put("hold");
    let order = host
        .order(&hostile(
            scene,
            "all-at-once",
            1,
            json!({ "max_unavailable": "100%" }),
        ))
        .await
        .expect("an order");
    scene.wait_begun(3).await;
    nodes_when(host, &order, "the last server is held", |nodes| {
        held(nodes, "min_healthy_members is 1") == 1
    })
    .await;
    assert_eq!(scene.begun().len(), 3, "{:?}", scene.log());
    finish(host, scene, &order, 3, 1).await;
}

async fn an_offline_agent_counts_as_unavailable(host: &mut TestHost, scene: &Scene) {
    scene.put("hold");
    let order = host
        .order(&hostile(
            scene,
            "one-by-one",
            0,
            json!({ "max_unavailable": 1 }),
        ))
        .await
        .expect("an order");
    scene.wait_begun(1).await;
    host.kill_agent(3);
    let path = host.ws(&format!("servers/{}", scene.servers[3].1));
    eventually("the agent is known to be away", || async {
        let server = host
            .api
            .get(&path)
            .await
            .map_err(|error| error.to_string())?;
        if server["connection"] == "offline" {
            Ok(())
        } else {
            Err(server.to_string())
        }
    })
    .await;
    scene.take("hold");
    let says = "max_unavailable is 1 of 4 servers in cell cell-a, and 1 are unavailable";
    let nodes = nodes_when(host, &order, "the second server is held", |nodes| {
        held(nodes, says) == 1
    })
    .await;
    assert_eq!(unit(&nodes, "agent-1")["state"], "succeeded");
    assert_eq!(scene.begun().len(), 1, "{:?}", scene.log());
    host.start_agent(3, &[]);
    scene.put("hold");
    finish(host, scene, &order, 1, 0).await;
}

async fn two_orders_share_the_limit(host: &TestHost, scene: &Scene) {
    let late: Vec<&str> = scene.servers[2..]
        .iter()
        .map(|(_, id)| id.as_str())
        .collect();
    scene.unbind(host, &late).await;
    scene.put("hold");
    let first = host
        .order(&hostile(scene, "first", 1, json!({ "max_unavailable": 1 })))
        .await
        .expect("an order");
    scene.wait_begun(1).await;
    scene.bind(host, &late, json!({})).await;
    let mut second = scene.order("second", 1);
    second["limits"] = json!({ "max_unavailable": 1 });
    second["run"] = true.into();
    let second = host.order(&second).await.expect("an order");
    let locked = |nodes: &[Value]| {
        nodes
            .iter()
            .filter(|node| node["level"] == "group" && node["state"] == "locked")
            .count()
            == 2
    };
    let shown = nodes_when(
        host,
        &second,
        "the groups of the first order's servers are locked",
        locked,
    )
    .await;
    for name in ["agent-1", "agent-2"] {
        let group = group_of(&shown, name);
        assert!(
            text(&group["message"]).contains("`first`"),
            "it names the order that holds it: {group}"
        );
        act(
            host,
            &second,
            &json!({ "action": "cancel", "node": group["node"] }),
        )
        .await
        .expect("the group is left out");
    }
    let says = "max_unavailable is 1 of 4 servers in cell cell-a, and 1 are unavailable";
    nodes_when(
        host,
        &second,
        "a server of the second order is held because of the first's",
        |nodes| {
            unit(nodes, "agent-3")["message"]
                .as_str()
                .is_some_and(|message| message.contains(says))
        },
    )
    .await;
    assert_eq!(scene.begun().len(), 1, "{:?}", scene.log());
    scene.take("hold");
    assert_eq!(host.order_ended(&first).await["state"], "succeeded");
    let ended = host.order_ended(&second).await;
    assert_eq!(ended["counts"]["succeeded"], 2, "{ended}");
    let shown = nodes(host, &second).await;
    for name in ["agent-1", "agent-2"] {
        assert_eq!(group_of(&shown, name)["state"], "cancelled", "{shown:?}");
    }
    assert_eq!(scene.most_at_once(), 1, "{:?}", scene.log());
    assert_eq!(scene.begun().len(), 4, "{:?}", scene.log());
    scene.check_serves(host, 1).await;
    scene.forget();
}

async fn a_broken_health_check_blocks_whatever_the_judge_says(host: &TestHost, scene: &Scene) {
    let order = host
        .order(&hostile(scene, "judge-all-good", 2, json!({})))
        .await
        .expect("an order");
    let blocked = host.order_in(&order, &["blocked"]).await;
    assert!(
        text(&blocked["state_reason"]).contains("agent-1"),
        "{blocked}"
    );
    assert_eq!(
        scene.begun(),
        [("agent-1".to_owned(), 1)].into(),
        "it stops at the first server"
    );
    assert_eq!(
        scene.weight(host, &scene.servers[0].1).await,
        0,
        "what is broken has no traffic"
    );
    act(
        host,
        &order,
        &json!({ "action": "roll_back", "reason": "broken" }),
    )
    .await
    .expect("a rollback");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "rolled_back", "{ended}");
    scene.check_serves(host, 0).await;
    scene.forget();
}

async fn without_a_rollback_the_core_rolls_back(
    host: &TestHost,
    scene: &Scene,
    behave: &str,
    cause: &str,
) {
    let order = host
        .order(&hostile(scene, behave, 2, json!({})))
        .await
        .expect("an order");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "rolled_back", "{ended}");
    let rollback = host.order_ended(&text(&ended["rolled_back_by"])).await;
    let because = text(&rollback["purpose"]["core_plan_because"]);
    assert!(because.contains(cause), "{behave}: {because}");
    if behave == "rollback-trap" {
        assert!(
            because.contains("hostile") && because.contains("rollback"),
            "it names the plugin and the function: {because}"
        );
    }
    assert_eq!(rollback["strategy"], "", "the plan is the core's own");
    assert_eq!(rollback["state"], "succeeded", "{rollback}");
    scene.check_serves(host, 0).await;
    scene.forget();
}

async fn a_rollback_all_at_once_keeps_the_limit(host: &TestHost, scene: &Scene) {
    // Three servers are released before the last one fails: the rollback has four servers to bring back.
    scene.put("sick-agent-4");
    let order = host
        .order(&hostile(scene, "rollback-all-at-once", 1, json!({})))
        .await
        .expect("an order");
    let begun = |nodes: &[Value]| unit(nodes, "agent-3")["state"] == "succeeded";
    nodes_when(host, &order, "three servers are released", begun).await;
    let rolling = host.order_in(&order, &["rolling_back"]).await;
    scene.take("sick-agent-4");
    drop(rolling);
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "rolled_back", "{ended}");
    let rollback = text(&ended["rolled_back_by"]);
    let header = host.order_ended(&rollback).await;
    assert_eq!(
        (
            header["purpose"]["core_plan_because"].clone(),
            header["server_count"].as_u64()
        ),
        (Value::Null, Some(4)),
        "{header}"
    );
    let (nodes, events) = (nodes(host, &rollback).await, events(host, &rollback).await);
    assert!(
        most_busy(&nodes, &events) <= 2,
        "max_unavailable is 50 % of 4: {events:?}"
    );
    scene.check_serves(host, 0).await;
    scene.forget();
}

async fn traffic_is_not_cut_one_server_after_the_other(host: &TestHost, scene: &Scene) {
    let order = host
        .order(&hostile(scene, "cut-slowly", 1, json!({})))
        .await
        .expect("an order");
    let blocked = host.order_in(&order, &["blocked"]).await;
    let reason = text(&blocked["state_reason"]);
    let says = "min_healthy_members is 1, and these weights would leave the pool";
    assert!(
        reason.contains(says) && reason.contains("nothing was changed"),
        "{reason}"
    );
    let nodes = nodes(host, &order).await;
    let failed: Vec<&Value> = nodes
        .iter()
        .filter(|node| node["kind"] == "traffic" && node["state"] == "failed")
        .collect();
    assert_eq!(failed.len(), 1, "{nodes:?}");
    assert_eq!(failed[0]["name"], "shift agent-4");
    assert_eq!(
        failed[0]["attempt"], 1,
        "what a rule forbids is not tried again"
    );
    assert_eq!(
        scene.weight(host, &scene.servers[3].1).await,
        100,
        "the last one keeps its traffic"
    );
    assert_eq!(scene.log(), Vec::<String>::new(), "no server was touched");
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("the order is ended");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "failed", "{ended}");
    assert_eq!(
        (&ended["counts"]["waiting"], &ended["counts"]["cancelled"]),
        (&json!(0), &json!(4)),
        "{ended}"
    );
    // What the order had shifted is as it was before.
    for (name, id) in &scene.servers {
        assert_eq!(scene.weight(host, id).await, 100, "the weight of {name}");
    }
}

async fn what_is_taken_offline_gets_no_traffic(host: &TestHost, scene: &Scene) {
    let offline = json!({
        "title": "offline",
        "operation": { "kind": "offline" },
        "strategy": "hostile",
        "parameters": { "behave": "give-traffic-and-gate" },
        "targets": [{ "instance": scene.instance }],
        "drain_deadline_ms": 1000,
        "limits": { "max_unavailable": "100%", "min_healthy_members": 0 },
        "run": true,
    });
    let made = host.api.post(&host.ws("operations"), &offline).await;
    let order = text(&made.expect("an operation")["id"]);
    host.order_in(&order, &["awaiting_confirmation"]).await;
    let shifted = nodes(host, &order).await;
    let shift = shifted
        .iter()
        .find(|node| node["name"] == "give all traffic");
    assert_eq!(shift.expect("the shift")["state"], "succeeded");
    let id = &scene.servers[0].1;
    for (asked, why) in [
        (
            json!({ "action": "set_weights", "weights": [{ "server": id, "weight": 50 }] }),
            "takes it offline",
        ),
        (
            json!({ "action": "shift_cell", "cell": "cell-a", "percent": 50 }),
            "takes it offline",
        ),
    ] {
        let (status, code, detail) = refusal(act(host, &order, &asked).await);
        assert_eq!((status, code.as_str()), (409, "not_released"), "{detail}");
        assert!(detail.contains(why), "{detail}");
    }
    for (name, id) in &scene.servers {
        assert_eq!(scene.weight(host, id).await, 0, "the weight of {name}");
    }
    // Taking the shift back gives them none either.
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("the order is ended");
    host.order_ended(&order).await;
    for (name, id) in &scene.servers {
        assert_eq!(scene.weight(host, id).await, 0, "the weight of {name}");
    }
}
