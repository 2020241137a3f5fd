//! The servers behind a pool are part of what a plan was made for.

use serde_json::{Value, json};
use windlass_tests::{
    balanced::Balanced,
    host::{TestHost, items, text},
    scene::{act, refusal},
};

/// Previews an order; answers it with the plan's digest.
async fn previewed(host: &TestHost, balanced: &Balanced) -> Value {
    let mut order = balanced.order("1.0.0", "one-per-group");
    let fields = order.as_object_mut().expect("an order");
    fields.remove("run");
    let shown = host.api.post(&host.ws("orders/preview"), &order).await;
    order["plan_digest"] = shown.expect("a preview")["plan_digest"].clone();
    order
}

/// A server that is unbound stands behind the pool no more; a sync takes the order along.
async fn servers_that_left_are_synced(host: &TestHost, balanced: &Balanced) {
    let (_, id) = &balanced.servers[2];
    let weights = balanced.back_ends(host, &balanced.pool).await;
    let mut order = balanced.order("1.0.0", "one-per-group");
    order.as_object_mut().expect("an order").remove("run");
    let order = host.order(&order).await.expect("an order");
    let bound = host.ws(&format!("service-instances/{}/servers", balanced.instance));
    let found = items(&host.api.get(&bound).await.expect("bindings"));
    let binding = found
        .iter()
        .find(|binding| binding["server"] == id.as_str());
    let variables = binding.expect("it is bound")["variables"].clone();
    let body = json!({ "servers": [id] }).to_string();
    let headers = [("content-type", "application/json")];
    let answer = host
        .api
        .request(hyper::Method::DELETE, &bound, body.into(), &headers)
        .await;
    assert_eq!(answer.expect("an answer").status, 204);
    let run = json!({ "action": "run" });
    let (_, code, detail) = refusal(act(host, &order, &run).await);
    assert_eq!(code, "plan_drifted", "{detail}");
    let edits = host.ws(&format!("orders/{order}/revisions"));
    let sync = json!({ "edit": "sync_servers", "application": "shop" });
    let header = host.api.post(&edits, &sync).await.expect("synced");
    assert_eq!(header["server_count"], 2, "{header}");
    act(
        host,
        &order,
        &json!({ "action": "lock", "node": 1, "reason": "only to look" }),
    )
    .await
    .expect("locked");
    act(host, &order, &run).await.expect("nothing drifted");
    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    host.order_ended(&order).await;
    let body = json!({ "servers": [id], "variables": { id: variables } });
    host.api.post(&bound, &body).await.expect("bound again");
    balanced.attach(host, &balanced.pool).await;
    balanced.wait_current(host).await;
    let before: Vec<(&str, u32)> = weights
        .iter()
        .filter_map(|back_end| {
            let weight = u32::try_from(back_end["weight"].as_u64()?).ok()?;
            Some((back_end["server"].as_str()?, weight))
        })
        .collect();
    balanced.set_weights(host, &before).await;
}

/// An order is refused when servers came, went or moved behind its pool since it was previewed; weights do not count.
pub(crate) async fn back_ends_that_change_are_noticed(host: &TestHost, balanced: &Balanced) {
    let (name, id) = &balanced.servers[2];
    let order = previewed(host, balanced).await;
    let made = host.order(&order).await.expect("an order");
    let weights = balanced.back_ends(host, &balanced.pool).await;
    balanced.set_weights(host, &[(id, 50)]).await;
    let same = host.order(&order).await.expect("weights do not count");

    servers_that_left_are_synced(host, balanced).await;
    let restart = json!({
        "title": "restart",
        "operation": { "kind": "restart" },
        "targets": [{ "instance": balanced.instance }],
        "parameters": { "grouping": "one-per-group" },
    });
    let restart = host.api.post(&host.ws("operations"), &restart).await;
    let restart = text(&restart.expect("an operation")["id"]);

    // It stays behind the pool, but at another address.
    let path = host.ws(&format!("pools/{}/back-ends", balanced.pool));
    let detach = json!({ "servers": [id] }).to_string();
    let answer = host
        .api
        .request(
            hyper::Method::DELETE,
            &path,
            detach.into(),
            &[("content-type", "application/json")],
        )
        .await
        .expect("an answer");
    assert_eq!(answer.status, 204, "{}", answer.text());
    let run = json!({ "action": "run" });
    for refused in [
        refusal(host.order(&order).await),
        refusal(act(host, &made, &run).await),
        refusal(act(host, &restart, &run).await),
    ] {
        let (status, code, detail) = refused;
        assert_eq!((status, code.as_str()), (409, "plan_drifted"), "{detail}");
        let moved = format!("{name} at 127.0.0.1:{}", balanced.ports[id]);
        assert!(
            detail.contains("back ends of shop: was ") && detail.contains(&moved),
            "{detail}"
        );
    }
    // As it was, so the plan holds again.
    balanced.attach(host, &balanced.pool).await;
    balanced.wait_current(host).await;
    let before: Vec<(&str, u32)> = weights
        .iter()
        .filter_map(|back_end| {
            let weight = u32::try_from(back_end["weight"].as_u64()?).ok()?;
            Some((back_end["server"].as_str()?, weight))
        })
        .collect();
    balanced.set_weights(host, &before).await;
    let again = host.order(&order).await.expect("nothing has changed");
    for order in [made, same, again, restart] {
        let ended = act(host, &order, &json!({ "action": "cancel" })).await;
        assert_eq!(text(&ended.expect("it is ended")["state"]), "cancelled");
    }
}
