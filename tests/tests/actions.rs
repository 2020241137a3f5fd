//! What people cannot do to an order, each with its refusal; and what they can do that the other tests leave out: an
//! application by itself, an order that is initialised again, a step that is left out, all with real agents.
//!
//! `shop` runs on agents 1 and 2 (one in each cell), `side` on agent 3.

use serde_json::{Value, json};
use windlass_tests::{
    host::{Setup, TestHost, text},
    scene::{Scene, act, group_of, nodes, nodes_when, refusal, step, unit},
};

#[tokio::test]
async fn people_are_told_what_they_cannot_do() {
    let mut host = TestHost::start(Setup {
        agents: 3,
        ..Setup::default()
    })
    .await;
    let servers = host.servers().await;
    let shop = Scene::prepare_on(&host, "shop", servers[..2].to_vec()).await;
    let side = Scene::prepare_on(&host, "side", servers[2..].to_vec()).await;
    there_is_nothing_to_go_back_to(&host, &shop).await;
    side.release(&host, 0).await;
    an_order_that_was_not_run(&host, &shop).await;
    an_application_by_itself(&host, &shop, &side).await;
    an_order_is_rolled_back_once(&host, &shop).await;
    weights_change_one_after_the_other(&host, &shop).await;
    a_step_is_left_out(&host, &shop).await;
    an_order_is_initialised_again(&mut host, &shop).await;
}

async fn run(host: &TestHost, mut order: Value) -> String {
    order["run"] = true.into();
    host.order(&order).await.expect("an order")
}

async fn check_refused(host: &TestHost, order: &str, action: Value, code: &str) {
    let (_, found, detail) = refusal(act(host, order, &action).await);
    assert_eq!(found, code, "{action}: {detail}");
}

async fn there_is_nothing_to_go_back_to(host: &TestHost, shop: &Scene) {
    let first = run(host, shop.order("the first", 0)).await;
    assert_eq!(host.order_ended(&first).await["state"], "succeeded");
    let back = json!({ "action": "roll_back", "reason": "try it" });
    check_refused(host, &first, back, "nothing_to_roll_back_to").await;
    shop.forget();
}

async fn an_order_that_was_not_run(host: &TestHost, shop: &Scene) {
    let order = host.order(&shop.order("waits", 1)).await.expect("an order");
    let seen = nodes(host, &order).await;
    let server = unit(&seen, "agent-1")["node"].clone();
    let group = group_of(&seen, "agent-1")["node"].clone();
    let leaf = step(&seen, "agent-1", "configure")["node"].clone();
    for action in [
        json!({ "action": "confirm" }),
        json!({ "action": "retry", "node": 0 }),
        json!({ "action": "ignore", "node": 0 }),
        json!({ "action": "cancel", "node": group }),
        json!({ "action": "roll_back", "reason": "no" }),
    ] {
        check_refused(host, &order, action, "wrong_state").await;
    }
    for action in [
        json!({ "action": "lock", "node": server, "reason": "no" }),
        json!({ "action": "unlock", "node": leaf }),
        json!({ "action": "run_node", "node": leaf }),
    ] {
        check_refused(host, &order, action, "wrong_level").await;
    }
    for name in [
        "run_node",
        "retry",
        "ignore",
        "lock",
        "unlock",
        "roll_back_stage",
    ] {
        let mut action = json!({ "action": name, "node": 99_999 });
        if name == "roll_back_stage" {
            action["reason"] = "no".into();
        }
        check_refused(host, &order, action, "not_found").await;
    }
    let unlock = json!({ "action": "unlock", "node": group });
    check_refused(host, &order, unlock, "nothing_to_do").await;
    // Locked before it is run: the others go first.
    act(
        host,
        &order,
        &json!({ "action": "lock", "node": group, "reason": "later" }),
    )
    .await
    .expect("locked");
    shop.put("hold");
    act(host, &order, &json!({ "action": "run" }))
        .await
        .expect("it runs");
    host.order_in(&order, &["blocked"]).await;
    check_refused(host, &order, json!({ "action": "run" }), "nothing_to_do").await;
    for action in [
        json!({ "action": "confirm" }),
        json!({ "action": "retry", "node": 0 }),
        json!({ "action": "ignore", "node": server }),
        json!({ "action": "run_node", "node": group }),
    ] {
        check_refused(host, &order, action, "nothing_to_do").await;
    }
    let cancel = json!({ "action": "cancel", "node": leaf });
    check_refused(host, &order, cancel, "wrong_level").await;
    act(host, &order, &json!({ "action": "unlock", "node": group }))
        .await
        .expect("unlocked");
    shop.wait_begun(1).await;
    // It is being ended: nothing else is possible.
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    let (_, code, _) = refusal(act(host, &order, &json!({ "action": "cancel" })).await);
    assert!(
        matches!(code.as_str(), "wrong_state" | "order_ended"),
        "{code}"
    );
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "cancelled", "{ended}");
    for action in [
        json!({ "action": "run" }),
        json!({ "action": "cancel" }),
        json!({ "action": "retry", "node": 0 }),
        json!({ "action": "lock", "node": group, "reason": "no" }),
    ] {
        check_refused(host, &order, action, "order_ended").await;
    }
    shop.take("hold");
    shop.release(host, 0).await;
    shop.forget();
}

/// The other application goes on, and the order with it.
async fn an_application_by_itself(host: &TestHost, shop: &Scene, side: &Scene) {
    let mut order = shop.order("two applications", 1);
    order["targets"] = json!([
        { "instance": shop.instance, "package": shop.packages[1] },
        { "instance": side.instance, "package": side.packages[1] },
    ]);
    let order = host.order(&order).await.expect("an order");
    let seen = nodes(host, &order).await;
    let of = |name: &str| {
        let found = seen
            .iter()
            .find(|node| node["level"] == "application" && node["name"] == name);
        found.expect("an application")["node"].clone()
    };
    shop.put("hold");
    side.forget();
    act(
        host,
        &order,
        &json!({ "action": "run_node", "node": of("shop") }),
    )
    .await
    .expect("it runs");
    shop.wait_begun(1).await;
    assert!(side.begun().is_empty(), "nobody ran it");
    act(
        host,
        &order,
        &json!({ "action": "cancel", "node": of("shop") }),
    )
    .await
    .expect("cancelled");
    let waiting = host.order_in(&order, &["awaiting_confirmation"]).await;
    assert_eq!(waiting["counts"]["waiting"], 1, "{waiting}");
    let again = json!({ "action": "cancel", "node": of("shop") });
    check_refused(host, &order, again, "nothing_to_do").await;
    act(
        host,
        &order,
        &json!({ "action": "run_node", "node": of("side") }),
    )
    .await
    .expect("it runs");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    assert_eq!(
        (&ended["counts"]["succeeded"], &ended["counts"]["cancelled"]),
        (&json!(1), &json!(2)),
        "{ended}"
    );
    shop.take("hold");
    shop.check_serves(host, 0).await;
    side.check_serves(host, 1).await;
    shop.forget();
}

async fn an_order_is_rolled_back_once(host: &TestHost, shop: &Scene) {
    let order = run(host, shop.order("back", 1)).await;
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    let back = json!({ "action": "roll_back", "reason": "try it" });
    let made = act(host, &order, &back).await.expect("rolled back");
    let rollback = text(&made["id"]);
    assert_eq!(host.order_ended(&rollback).await["state"], "succeeded");
    check_refused(host, &order, back.clone(), "already_rolled_back").await;
    check_refused(host, &rollback, back, "rollback_of_rollback").await;
    shop.check_serves(host, 0).await;
    shop.forget();
}

async fn weights_change_one_after_the_other(host: &TestHost, shop: &Scene) {
    let mut order = shop.order("gray", 1);
    order["parameters"] = json!({ "grouping": "one-per-group", "gray_traffic": true });
    order["limits"] = json!({ "min_healthy_members": 0 });
    let order = run(host, order).await;
    host.order_in(&order, &["awaiting_confirmation"]).await;
    let weights = host.ws(&format!("orders/{order}/weights"));
    let body = json!({ "weights": [{ "server": shop.servers[0].1, "weight": 40 }] });
    // The pool refuses for a while: the first change is still being made when the second is asked for.
    shop.fault(host, &json!({ "refuse_set": true })).await;
    let (first, second) = tokio::join!(host.api.post(&weights, &body), async {
        nodes_when(host, &order, "the change is being made", |_| true).await;
        let shown = windlass_tests::host::eventually("a second change is refused", || async {
            match host.api.post(&weights, &body).await {
                Err(windlass::api::client::ClientError::Refused { problem, .. })
                    if problem["code"] == "traffic_changes" =>
                {
                    Ok(problem)
                }
                other => Err(format!("{other:?}")),
            }
        });
        shown.await
    });
    assert!(
        text(&second["detail"]).contains("still being made"),
        "{second}"
    );
    drop(first);
    shop.fault(host, &json!({})).await;
    windlass_tests::host::eventually("the weight is set", || async {
        host.api
            .post(&weights, &body)
            .await
            .map_err(|error| error.to_string())
    })
    .await;
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    host.order_ended(&order).await;
    let mut full = shop.order("full traffic", 0);
    full["parameters"] = json!({ "grouping": "one-per-group", "weight_override": 100 });
    full["limits"] = json!({ "min_healthy_members": 0 });
    let full = run(host, full).await;
    assert_eq!(host.order_ended(&full).await["state"], "succeeded");
    shop.check_serves(host, 0).await;
    shop.forget();
}

/// Blue-green: a step is rolled back, and the order goes on without it; meanwhile nothing else is possible.
async fn a_step_is_left_out(host: &TestHost, shop: &Scene) {
    let mut order = shop.order("blue-green", 1);
    order["strategy"] = "blue-green".into();
    order["parameters"] = json!({});
    order["limits"] = json!({ "max_unavailable": "100%" });
    let order = run(host, order).await;
    let waits = |name: &'static str| {
        let order = order.clone();
        async move {
            nodes_when(host, &order, name, |nodes| {
                nodes
                    .iter()
                    .any(|node| node["name"] == name && node["state"] == "awaiting_confirmation")
            })
            .await
        }
    };
    let confirm = json!({ "action": "confirm" });
    let seen = waits("confirm 1 cut traffic").await;
    // The plan has a shape of its own: cells change places in it.
    let edits = host.ws(&format!("orders/{order}/revisions"));
    let group = group_of(&seen, "agent-1")["node"].clone();
    for (edit, code) in [
        (
            json!({ "edit": "delete_group", "node": group }),
            "traffic_moves",
        ),
        (
            json!({ "edit": "sync_servers", "application": "shop" }),
            "plan_has_own_shape",
        ),
        (
            json!({ "edit": "regroup", "application": "shop", "parameters": { "grouping": "one-per-group" } }),
            "plan_has_own_shape",
        ),
        (
            json!({ "edit": "sequence", "lanes": [{ "stages": [["shop"]] }] }),
            "plan_has_own_shape",
        ),
    ] {
        let (_, found, detail) = refusal(host.api.post(&edits, &edit).await);
        assert_eq!(found, code, "{edit}: {detail}");
    }
    act(host, &order, &confirm).await.expect("confirmed");
    let seen = waits("confirm 2 release green").await;
    let stage = seen
        .iter()
        .find(|node| node["name"] == "2 release green")
        .expect("the stage")["node"]
        .clone();
    for name in ["run_again", "go_on"] {
        let early = json!({ "action": name, "node": stage });
        check_refused(host, &order, early, "nothing_to_do").await;
    }
    shop.put("hold");
    act(
        host,
        &order,
        &json!({ "action": "roll_back_stage", "node": stage, "reason": "looks bad" }),
    )
    .await
    .expect("the step is rolled back");
    nodes_when(host, &order, "its rollback order runs", |nodes| {
        nodes
            .iter()
            .any(|node| node["node"] == stage && node["rollback"]["state"] == "running")
    })
    .await;
    for action in [
        json!({ "action": "cancel" }),
        json!({ "action": "roll_back", "reason": "all" }),
        json!({ "action": "roll_back_stage", "node": stage, "reason": "again" }),
    ] {
        check_refused(host, &order, action, "stage_rolls_back").await;
    }
    let edit = json!({ "edit": "move_servers", "servers": [], "to": group });
    let (_, code, detail) = refusal(host.api.post(&edits, &edit).await);
    assert_eq!(code, "stage_rolls_back", "{detail}");
    shop.take("hold");
    nodes_when(host, &order, "it is rolled back", |nodes| {
        nodes
            .iter()
            .any(|node| node["node"] == stage && node["rollback"]["state"] == "done")
    })
    .await;
    act(host, &order, &json!({ "action": "go_on", "node": stage }))
        .await
        .expect("it goes on without the step");
    waits("confirm 3 switch traffic").await;
    act(
        host,
        &order,
        &json!({ "action": "roll_back", "reason": "enough" }),
    )
    .await
    .expect("a rollback");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "rolled_back", "{ended}");
    shop.check_serves(host, 0).await;
    shop.forget();
}

/// A server that is not there: the order says so and can be run again.
async fn an_order_is_initialised_again(host: &mut TestHost, shop: &Scene) {
    host.kill_agent(1);
    let order = host
        .order(&shop.order("initialised again", 1))
        .await
        .expect("an order");
    act(host, &order, &json!({ "action": "run" }))
        .await
        .expect("it runs");
    host.order_in(&order, &["initialising"]).await;
    let edits = host.ws(&format!("orders/{order}/revisions"));
    let edit = json!({ "edit": "delete_group", "node": 1 });
    let (_, code, detail) = refusal(host.api.post(&edits, &edit).await);
    assert_eq!(code, "wrong_state", "{detail}");
    let failed = host.order_in(&order, &["not_started"]).await;
    let reason = text(&failed["state_reason"]);
    assert!(reason.contains("agent-2 is not connected"), "{reason}");
    host.start_agent(1, &[]);
    host.wait_online().await;
    act(host, &order, &json!({ "action": "run" }))
        .await
        .expect("it is initialised again");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    shop.check_serves(host, 1).await;
}
