//! What people cannot do to an order, each with its refusal; and what they can do that the other tests leave out: an
//! application by itself, an order that is initialised again, a step that is left out, all with real agents.
//!
//! `shop` runs on agents 1 and 2 (one in each cell), `side` on agent 3.

use serde_json::{Value, json};
use windlass_tests::{
    host::{Setup, TestHost, items, text},
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
    an_application_is_rolled_back(&host, &shop, &side).await;
    a_rollback_is_grouped_as_asked(&host, &shop).await;
    a_group_is_confirmed(&host, &shop).await;
    an_application_is_locked_and_a_group_ignored(&host, &shop).await;
    weights_change_one_after_the_other(&host, &shop).await;
    a_step_is_left_out(&host, &shop).await;
    an_order_is_initialised_again(&mut host, &shop).await;
    an_order_that_was_ended_holds_no_server(&mut host, &shop).await;
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
        json!({ "action": "lock", "node": leaf, "reason": "no" }),
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
    // What was asked for before is forgotten: one group is run, and no other.
    let group = group_of(&nodes(host, &order).await, "agent-1")["node"].clone();
    act(
        host,
        &order,
        &json!({ "action": "run_node", "node": group }),
    )
    .await
    .expect("it is initialised again");
    let waiting = host.order_in(&order, &["awaiting_confirmation"]).await;
    assert_eq!(waiting["counts"]["succeeded"], 1, "{waiting}");
    assert_eq!(waiting["counts"]["waiting"], 1, "{waiting}");
    act(host, &order, &json!({ "action": "run" }))
        .await
        .expect("all of it");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    shop.check_serves(host, 1).await;
}

/// Cancelled while it waits for an agent, an order takes no locks any more when that is back.
async fn an_order_that_was_ended_holds_no_server(host: &mut TestHost, shop: &Scene) {
    shop.forget();
    host.kill_agent(1);
    let order = run(host, shop.order("ended early", 0)).await;
    host.order_in(&order, &["initialising"]).await;
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    assert_eq!(host.order_ended(&order).await["state"], "cancelled");
    host.start_agent(1, &[]);
    host.wait_online().await;
    shop.release(host, 0).await;
}

/// One application of two goes back while the other is under way; it is released again, and goes back for good.
async fn an_application_is_rolled_back(host: &TestHost, shop: &Scene, side: &Scene) {
    let mut order = shop.order("two applications", 1);
    order["targets"] = json!([
        { "instance": shop.instance, "package": shop.packages[1] },
        { "instance": side.instance, "package": side.packages[0] },
    ]);
    shop.put("hold");
    side.forget();
    let order = run(host, order).await;
    let seen = nodes(host, &order).await;
    let of = |name: &str| {
        let found = seen
            .iter()
            .find(|node| node["level"] == "application" && node["name"] == name);
        found.expect("an application")["node"].clone()
    };
    let side_is = async |state: &str| {
        nodes_when(host, &order, "the application's state", |nodes| {
            nodes
                .iter()
                .any(|node| node["node"] == of("side") && node["state"] == state)
        })
        .await
    };
    side_is("succeeded").await;
    let back = json!({ "action": "roll_back_stage", "node": of("side"), "reason": "side by side" });
    let group = group_of(&seen, "agent-3")["node"].clone();
    let of_group = json!({ "action": "roll_back_stage", "node": group, "reason": "no" });
    check_refused(host, &order, of_group, "wrong_level").await;
    let blank = json!({ "action": "roll_back_stage", "node": of("side"), "reason": " " });
    check_refused(host, &order, blank, "reason_missing").await;
    for next in ["run_again", "go_on"] {
        act(host, &order, &back).await.expect("it goes back");
        side_is("awaiting_confirmation").await;
        assert_eq!(side.installed_on(&host.agents[2]).as_deref(), Some("2.0.0"));
        side.check_serves(host, 1).await;
        act(host, &order, &json!({ "action": next, "node": of("side") }))
            .await
            .expect("a decision");
        if next == "run_again" {
            let seen = side_is("succeeded").await;
            side.check_serves(host, 0).await;
            // What the first run of a step came to is kept.
            let configure = step(&seen, "agent-3", "configure")["node"].clone();
            for attempt in [1, 2] {
                let log = format!("orders/{order}/nodes/{configure}/log?attempt={attempt}");
                let log = host.api.get(&host.ws(&log)).await.expect("its log");
                assert_eq!(
                    (&log["ended"], &log["outcome"], &log["exit_code"]),
                    (&json!(true), &json!("succeeded"), &json!(0)),
                    "{log}"
                );
            }
        }
    }
    side_is("ignored").await;
    check_refused(
        host,
        &order,
        json!({ "action": "go_on", "node": of("side") }),
        "nothing_to_do",
    )
    .await;
    shop.take("hold");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    shop.check_serves(host, 1).await;
    side.check_serves(host, 1).await;
    let rollbacks = host.ws("orders?purpose=rollback&page_size=50");
    let rollbacks = items(&host.api.get(&rollbacks).await.expect("orders"));
    let of_it = rollbacks
        .iter()
        .filter(|rollback| rollback["purpose"]["of"] == order.as_str());
    assert_eq!(of_it.count(), 2, "each is an order of its own");
    shop.release(host, 0).await;
    shop.forget();
}

/// A rollback takes a reason and a grouping, of an order that has ended and of one that runs.
async fn a_rollback_is_grouped_as_asked(host: &TestHost, shop: &Scene) {
    for ends_first in [true, false] {
        let mut order = shop.order("grouped", 1);
        order["limits"] = json!({ "max_unavailable": "100%", "min_healthy_members": 0 });
        if !ends_first {
            order["parameters"]["gray_traffic"] = true.into();
        }
        let order = run(host, order).await;
        let back = |parameters: Value| json!({ "action": "roll_back", "reason": "grouped otherwise", "parameters": parameters });
        if ends_first {
            assert_eq!(host.order_ended(&order).await["state"], "succeeded");
        } else {
            host.order_in(&order, &["awaiting_confirmation"]).await;
            act(host, &order, &json!({ "action": "confirm" }))
                .await
                .expect("confirmed");
            nodes_when(host, &order, "the second group waits", |nodes| {
                let mut gates = nodes.iter().filter(|node| node["kind"] == "gate");
                gates
                    .next_back()
                    .is_some_and(|gate| gate["state"] == "awaiting_confirmation")
            })
            .await;
        }
        for (parameters, code) in [
            (json!({ "grouping": "nonsense" }), "parameters_invalid"),
            (json!([]), "parameters_invalid"),
            (json!({ "groups": "x".repeat(5000) }), "out_of_limit"),
        ] {
            check_refused(host, &order, back(parameters), code).await;
        }
        let made = act(host, &order, &back(json!({ "grouping": "all-in-one" })))
            .await
            .expect("rolled back");
        let rollback = if ends_first {
            text(&made["id"])
        } else {
            let ended = host.order_ended(&order).await;
            assert_eq!(ended["state"], "rolled_back", "{ended}");
            text(&ended["rolled_back_by"])
        };
        let ended = host.order_ended(&rollback).await;
        assert_eq!(ended["state"], "succeeded", "{ended}");
        assert_eq!(ended["purpose"]["reason"], "grouped otherwise", "{ended}");
        let seen = nodes(host, &rollback).await;
        let groups = seen.iter().filter(|node| node["level"] == "group").count();
        assert_eq!(groups, 1, "both at once: {seen:?}");
        for agent in &host.agents[..2] {
            assert_eq!(shop.installed_on(agent).as_deref(), Some("1.0.0"));
        }
        shop.forget();
    }
    let mut full = shop.order("full traffic", 0);
    full["parameters"]["weight_override"] = 100.into();
    full["limits"] = json!({ "min_healthy_members": 0 });
    let full = run(host, full).await;
    assert_eq!(host.order_ended(&full).await["state"], "succeeded");
    shop.forget();
}

/// The gate that asks about a group is confirmed by the group, whose progress says that it waits.
async fn a_group_is_confirmed(host: &TestHost, shop: &Scene) {
    let mut order = shop.order("a group", 1);
    order["parameters"]["gray_traffic"] = true.into();
    order["limits"] = json!({ "min_healthy_members": 0 });
    let order = run(host, order).await;
    for waits in 0..2 {
        let path = host.ws(&format!("orders/{order}/progress"));
        let group = windlass_tests::host::eventually("the group waits", || async {
            let progress = host.api.get(&path).await.expect("progress");
            let group = progress["applications"][0]["groups"][waits].clone();
            if group["state"] == "awaiting_confirmation" {
                Ok(group)
            } else {
                Err(progress.to_string())
            }
        })
        .await;
        let confirm = json!({ "action": "confirm", "node": group["node"] });
        act(host, &order, &confirm).await.expect("confirmed");
        check_refused(
            host,
            &order,
            confirm,
            if waits == 0 {
                "nothing_to_do"
            } else {
                "order_ended"
            },
        )
        .await;
    }
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    // Released without traffic, they are brought online.
    let online = json!({
        "title": "bring online", "operation": { "kind": "online", "initial_weight": 100 },
        "parameters": { "grouping": "one-per-group" }, "targets": [{ "instance": shop.instance }],
        "limits": { "min_healthy_members": 0 }, "run": true,
    });
    let made = host.api.post(&host.ws("operations"), &online).await;
    let made = text(&made.expect("an operation")["id"]);
    assert_eq!(host.order_ended(&made).await["state"], "succeeded");
    shop.check_serves(host, 1).await;
    let (status, code, told) = refusal(host.api.post(&host.ws("operations"), &online).await);
    assert_eq!(
        (status, code.as_str()),
        (409, "no_server_qualifies"),
        "{told}"
    );
    shop.release(host, 0).await;
    shop.forget();
}

async fn an_application_is_locked_and_a_group_ignored(host: &TestHost, shop: &Scene) {
    shop.put("fail-agent-1");
    shop.put("hold-agent-2");
    let order = host
        .order(&shop.order("locked", 1))
        .await
        .expect("an order");
    let seen = nodes(host, &order).await;
    let application = seen.iter().find(|node| node["level"] == "application");
    let application = application.expect("the application")["node"].clone();
    let on = |action: &str, node: &Value| json!({ "action": action, "node": node });
    act(host, &order, &on("lock", &application))
        .await
        .expect("locked");
    act(host, &order, &json!({ "action": "run" }))
        .await
        .expect("it runs");
    let blocked = host.order_in(&order, &["blocked"]).await;
    let reason = text(&blocked["state_reason"]);
    assert!(
        reason.contains("shop is locked: locked by a person"),
        "{reason}"
    );
    assert!(shop.begun().is_empty(), "nothing starts");
    act(host, &order, &on("unlock", &application))
        .await
        .expect("unlocked");
    check_refused(host, &order, on("unlock", &application), "nothing_to_do").await;
    nodes_when(host, &order, "the first server fails", |nodes| {
        unit(nodes, "agent-1")["state"] == "failed"
    })
    .await;
    let group = group_of(&seen, "agent-1")["node"].clone();
    act(host, &order, &on("ignore", &group))
        .await
        .expect("ignored");
    shop.wait_begun(2).await;
    // Whatever has begun is not grouped anew.
    let edits = host.ws(&format!("orders/{order}/revisions"));
    let anew = json!({ "edit": "regroup", "application": "shop" });
    let (status, code, detail) = refusal(host.api.post(&edits, &anew).await);
    assert_eq!(
        (status, code.as_str()),
        (409, "nothing_to_regroup"),
        "{detail}"
    );
    shop.take("hold-agent-2");
    let ended = host.order_ended(&order).await;
    assert_eq!(
        (&ended["counts"]["ignored"], &ended["counts"]["succeeded"]),
        (&json!(1), &json!(1)),
        "{ended}"
    );
    shop.take("fail-agent-1");
    shop.release(host, 0).await;
    shop.forget();
}
