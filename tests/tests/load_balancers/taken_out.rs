//! Traffic of a server that an order has taken out is the order's to give back.

use serde_json::{Value, json};
use windlass_tests::{
    balanced::Balanced,
    host::TestHost,
    problem::{accepted, ask, refused},
    scene::act,
};

/// The first server is broken by a release, and nobody gives it traffic while the order has it, by whatever call.
pub(crate) async fn a_server_that_is_taken_out_gets_no_traffic(
    host: &TestHost,
    balanced: &mut Balanced,
) {
    balanced.upload(host, "1.1.0", &[("broken", "")]).await;
    let mut order = balanced.order("1.1.0", "one-per-group");
    order["parameters"]["health_deadline_s"] = 1.into();
    let order = host.order(&order).await.expect("an order");
    host.order_in(&order, &["blocked"]).await;
    let (name, id) = balanced.servers[0].clone();
    let weight = || async {
        let all = balanced.back_ends(host, &balanced.pool).await;
        let mine = all
            .iter()
            .find(|back_end| back_end["server"] == id.as_str());
        let mine = mine.expect("it is behind the pool");
        (mine["weight"].clone(), mine["origin"].clone())
    };
    assert_eq!(weight().await, (json!(0), json!("attached")));
    let path = host.ws(&format!("pools/{}/back-ends", balanced.pool));
    let send = |method: hyper::Method, body: Value| {
        let path = path.clone();
        async move { ask(&host.api, method, &path, Some(&body), &[]).await }
    };
    let mut back_end =
        json!({ "server": id, "address": "127.0.0.1", "port": balanced.ports[&id], "weight": 50 });
    let weights = |weight: u32| json!({ "weights": [{ "server": id, "weight": weight }] });
    for answer in [
        send(hyper::Method::PUT, weights(50)).await,
        send(hyper::Method::POST, json!({ "servers": [back_end] })).await,
    ] {
        refused(&answer, 409, "server_taken_out");
        assert!(answer.text().contains(&name), "{}", answer.text());
    }
    accepted(&send(hyper::Method::PUT, weights(0)).await, 200);

    // Detached it stays, because it is bound, and without traffic.
    let detach = json!({ "servers": [id] });
    let detached = send(hyper::Method::DELETE, detach.clone()).await;
    assert_eq!(detached.status, 204, "{}", detached.text());
    assert_eq!(weight().await, (json!(0), json!("bound")));
    refused(
        &send(hyper::Method::DELETE, detach).await,
        409,
        "back_end_bound",
    );
    back_end
        .as_object_mut()
        .expect("an object")
        .remove("weight");
    accepted(
        &send(hyper::Method::POST, json!({ "servers": [back_end] })).await,
        200,
    );
    assert_eq!(weight().await, (json!(0), json!("attached")));
    balanced.wait_current(host).await;

    act(host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("cancelled");
    host.order_ended(&order).await;
    // A person has given it 0 meanwhile: so it is not given back what it had.
    balanced.release(host, "1.0.0", "one-per-group").await;
    assert_eq!(weight().await, (json!(0), json!("attached")));
    balanced.set_weights(host, &[(&id, 100)]).await;
    assert_eq!(weight().await, (json!(100), json!("attached")));
}
