//! Changes of an order's plan while it waits and while it runs, with real agents: each edit, each refusal, and the server's
//! death between.

use hyper::Method;
use serde_json::{Value, json};
use windlass::api::client::ClientError;
use windlass_tests::{
    host::{Setup, TestHost, eventually, items, text},
    problem::{accepted, ask, refused},
    scene::{Scene, act, events, group_of, nodes, nodes_when, refusal, unit},
};

/// A host with four agents: `shop` runs on the first three, `bank` on the fourth.
async fn ready() -> (TestHost, Scene, Scene) {
    let host = TestHost::start(Setup {
        agents: 4,
        ..Setup::default()
    })
    .await;
    let servers = host.servers().await;
    let shop = Scene::prepare_on(&host, "shop", servers[..3].to_vec()).await;
    let bank = Scene::prepare_on(&host, "bank", servers[3..].to_vec()).await;
    shop.release(&host, 0).await;
    bank.release(&host, 0).await;
    shop.forget();
    bank.forget();
    (host, shop, bank)
}

async fn run(host: &TestHost, mut order: Value) -> String {
    order["run"] = true.into();
    host.order(&order).await.expect("an order")
}

fn path(host: &TestHost, order: &str, rest: &str) -> String {
    host.ws(&format!("orders/{order}/revisions{rest}"))
}

async fn edit(host: &TestHost, order: &str, edit: &Value) -> Result<Value, ClientError> {
    host.api.post(&path(host, order, ""), edit).await
}

/// Checks that an edit is refused with this code, and leaves the plan as it was.
async fn check_refused(host: &TestHost, order: &str, asked: &Value, status: u16, code: &str) {
    let before = revisions(host, order).await;
    for rest in ["", "/preview"] {
        let path = path(host, order, rest);
        let answer = ask(&host.api, Method::POST, &path, Some(asked), &[]).await;
        refused(&answer, status, code);
    }
    assert_eq!(revisions(host, order).await, before, "{asked}");
}

async fn revisions(host: &TestHost, order: &str) -> Vec<Value> {
    items(
        &host
            .api
            .get(&path(host, order, ""))
            .await
            .expect("revisions"),
    )
}

fn id(servers: &[(String, String)], name: &str) -> String {
    let found = servers.iter().find(|(known, _)| known == name);
    found.expect("a server").1.clone()
}

/// Servers by application, as a shape: groups in the plan's order, each with its servers.
fn groups(nodes: &[Value]) -> Vec<Vec<String>> {
    let groups = nodes.iter().filter(|node| node["level"] == "group");
    groups
        .map(|group| {
            let inside = nodes
                .iter()
                .filter(|node| node["level"] == "server" && node["parent"] == group["node"]);
            inside.map(|node| text(&node["server_name"])).collect()
        })
        .collect()
}

#[tokio::test]
async fn people_change_the_plan_of_an_order() {
    let (mut host, shop, bank) = ready().await;
    a_running_order_is_regrouped(&host, &shop).await;
    servers_come_and_go(&mut host, &shop).await;
    a_server_that_left_is_free_for_others(&host, &shop).await;
    lanes_and_stages(&host, &shop, &bank).await;
    some_plans_are_not_changed(&host, &shop, &bank).await;
    what_goes_with_a_group(&host, &shop, &bank).await;
    an_order_of_many_revisions_is_rolled_back(&host, &shop).await;
    a_change_survives_the_death_of_the_server(&mut host, &shop).await;
}

async fn a_running_order_is_regrouped(host: &TestHost, shop: &Scene) {
    shop.put("hold");
    let mut order = shop.order("regrouped", 1);
    // Gray traffic leaves released servers at 0: whoever wants that has to allow it.
    order["limits"] = json!({ "min_healthy_members": 0 });
    let order = run(host, order).await;
    shop.wait_begun(1).await;
    let planned = nodes(host, &order).await;
    let group = |server: &str| group_of(&planned, server)["node"].clone();
    let two = id(&shop.servers, "agent-2");
    let three = id(&shop.servers, "agent-3");

    // What has started stays as it is, and so does what is not there.
    let begun = json!({ "edit": "delete_group", "node": group("agent-1") });
    check_refused(host, &order, &begun, 409, "has_started").await;
    let not_there = json!({ "edit": "delete_group", "node": 9999 });
    check_refused(host, &order, &not_there, 404, "not_found").await;
    let no_group = json!({ "edit": "delete_group", "node": unit(&planned, "agent-2")["node"] });
    check_refused(host, &order, &no_group, 409, "wrong_level").await;
    let to_two = |servers: Value| json!({ "edit": "move_servers", "servers": servers, "to": group("agent-2") });
    for (servers, status, code) in [
        (json!([]), 422, "no_servers"),
        (json!([three, three]), 422, "server_twice"),
        (json!([two]), 422, "already_there"),
        (
            json!([id(&host.servers().await, "agent-4")]),
            422,
            "not_in_application",
        ),
        (json!([id(&shop.servers, "agent-1")]), 409, "has_started"),
    ] {
        check_refused(host, &order, &to_two(servers), status, code).await;
    }
    let unknown = json!({ "edit": "regroup", "application": "nobody" });
    check_refused(host, &order, &unknown, 422, "no_such_application").await;

    // A preview does nothing; the same edit then does what it showed.
    let asked = to_two(json!([three]));
    let preview = host.api.post(&path(host, &order, "/preview"), &asked).await;
    let preview = preview.expect("a preview");
    assert_eq!(preview["revision"], 2, "{preview}");
    assert!(
        text(&preview["difference"]).contains("agent-3"),
        "{preview}"
    );
    assert_eq!(revisions(host, &order).await.len(), 1);
    let if_match = [("if-match", "\"1\"")];
    let list = path(host, &order, "");
    let answer = ask(&host.api, Method::POST, &list, Some(&asked), &if_match).await;
    let header = accepted(&answer, 200);
    assert_eq!(header["plan"], preview["plan_digest"], "{header}");
    // Whoever looked at the first one is told.
    let answer = ask(&host.api, Method::POST, &list, Some(&asked), &if_match).await;
    assert_eq!(refused(&answer, 412, "changed")["current"], 2);
    let answer = ask(&host.api, Method::GET, &list, None, &[]).await;
    assert_eq!(answer.header("etag"), Some("\"2\""));

    // Nodes keep their ids.
    let moved = nodes(host, &order).await;
    for server in ["agent-1", "agent-2", "agent-3"] {
        assert_eq!(
            unit(&moved, server)["node"],
            unit(&planned, server)["node"],
            "{server}"
        );
    }
    assert_eq!(
        groups(&moved),
        [vec!["agent-1"], vec!["agent-2", "agent-3"]]
    );

    // Unassigned, and grouped anew.
    let deleted = json!({ "edit": "delete_group", "node": group("agent-2") });
    let header = edit(host, &order, &deleted).await.expect("deleted");
    assert_eq!(header["server_count"], 1, "{header}");
    assert_eq!(header["counts"]["waiting"], 0, "{header}");
    let progress = host.ws(&format!("orders/{order}/progress"));
    let progress = host.api.get(&progress).await.expect("progress");
    let left: Vec<String> = progress["left_out"]
        .as_array()
        .expect("servers")
        .iter()
        .map(|out| text(&out["server_name"]))
        .collect();
    assert_eq!(left, ["agent-2", "agent-3"], "{progress}");
    check_refused(host, &order, &deleted, 404, "not_found").await;
    let wrong = json!({
        "edit": "regroup", "application": "shop", "parameters": { "grouping": "nonsense" }
    });
    check_refused(host, &order, &wrong, 422, "parameters_invalid").await;
    let none = json!({ "edit": "regroup", "application": "shop", "strategy": "nobody" });
    check_refused(host, &order, &none, 422, "plugin_not_available").await;
    let judged = json!({ "edit": "regroup", "application": "shop", "strategy": "canary" });
    check_refused(host, &order, &judged, 409, "foreign_judge").await;
    let staged = json!({ "edit": "regroup", "application": "shop", "strategy": "blue-green" });
    let (_, code, told) = refusal(edit(host, &order, &staged).await);
    assert!(
        ["foreign_traffic", "plugin_refused"].contains(&code.as_str()),
        "{code}: {told}"
    );
    let anew = json!({
        "edit": "regroup", "application": "shop",
        "parameters": { "grouping": "one-per-group", "gray_traffic": true }
    });
    // What is planned now would not fit what was planned then.
    let mut env = shop.env();
    env["MORE"] = "later".into();
    shop.change(host, &json!({ "env": env })).await;
    check_refused(host, &order, &anew, 409, "plan_drifted").await;
    shop.change(host, &json!({ "env": shop.env() })).await;
    let header = edit(host, &order, &anew).await.expect("grouped anew");
    assert_eq!(header["server_count"], 3, "{header}");
    let anew = nodes(host, &order).await;
    assert_eq!(
        groups(&anew),
        [vec!["agent-1"], vec!["agent-2"], vec!["agent-3"]]
    );
    let known: Vec<&Value> = planned.iter().map(|node| &node["node"]).collect();
    assert!(
        !known.contains(&&unit(&anew, "agent-2")["node"]),
        "an id is never given again"
    );

    // The new nodes are acted on like any others: gates wait, steps have logs and details.
    shop.take("hold");
    for (begun, gate) in [(2, 1), (3, 2)] {
        nodes_when(host, &order, "a gate waits", |nodes| {
            let waits =
                |node: &&Value| node["kind"] == "gate" && node["state"] == "awaiting_confirmation";
            nodes.iter().filter(waits).count() == 1
        })
        .await;
        assert_eq!(shop.begun().len(), begun, "gate {gate}");
        act(host, &order, &json!({ "action": "confirm", "node": null }))
            .await
            .expect("confirmed");
    }
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    assert_eq!(ended["counts"]["succeeded"], 3, "{ended}");
    assert!(
        shop.begun().values().all(|times| *times == 1),
        "{:?}",
        shop.begun()
    );
    let last = nodes(host, &order).await;
    let configure = last
        .iter()
        .find(|node| node["server_name"] == "agent-3" && node["name"] == "configure")
        .expect("a step");
    let log = host.ws(&format!("orders/{order}/nodes/{}/log", configure["node"]));
    assert_eq!(
        host.api.get(&log).await.expect("a log")["outcome"],
        "succeeded"
    );
    check_history(host, &order).await;

    // A rollback takes each server from the plan that runs.
    let action = json!({ "action": "roll_back", "reason": "try it" });
    shop.put("hold");
    let back = act(host, &order, &action).await.expect("rolled back");
    let back = text(&back["id"]);
    host.order_in(&back, &["running"]).await;
    let refused = json!({ "edit": "sync_servers", "application": "shop" });
    let (status, code, _) = refusal(edit(host, &back, &refused).await);
    assert_eq!((status, code.as_str()), (409, "wrong_purpose"));
    shop.take("hold");
    assert_eq!(host.order_ended(&back).await["state"], "succeeded");
    // Gray traffic left the servers at 0, which is what the rollback found.
    for agent in &host.agents[..3] {
        assert_eq!(shop.installed_on(agent).as_deref(), Some("1.0.0"));
    }
    shop.forget();
    let mut full = shop.order("full traffic", 0);
    full["parameters"] = json!({ "grouping": "one-per-group", "weight_override": 100 });
    full["limits"] = json!({ "min_healthy_members": 0 });
    let full = run(host, full).await;
    assert_eq!(host.order_ended(&full).await["state"], "succeeded");
    shop.check_serves(host, 0).await;
    shop.forget();
}

/// The list of revisions, their plans and the events say the same.
async fn check_history(host: &TestHost, order: &str) {
    let all = revisions(host, order).await;
    let header = host
        .api
        .get(&host.ws(&format!("orders/{order}")))
        .await
        .expect("the order");
    assert_eq!(header["plan"], all.last().expect("a revision")["digest"]);
    for (number, revision) in (1..).zip(&all) {
        assert_eq!(revision["revision"], number, "{revision}");
        assert_eq!(revision["author"], "admin", "{revision}");
        let rest = format!("/{number}");
        let plan = host.api.get(&path(host, order, &rest)).await;
        assert_eq!(
            plan.expect("its plan")["plan_digest"],
            revision["digest"],
            "{revision}"
        );
    }
    let told: Vec<Value> = events(host, order)
        .await
        .into_iter()
        .filter(|event| event["type"] == "revised")
        .collect();
    assert_eq!(told.len() + 1, all.len(), "{told:?}");
    for (event, revision) in told.iter().zip(&all[1..]) {
        assert_eq!(event["plan"], revision["digest"]);
        assert_eq!(event["difference"], revision["difference"]);
        assert_eq!(event["by"], revision["author"]);
    }
    let missing = path(host, order, "/99");
    let answer = ask(&host.api, Method::GET, &missing, None, &[]).await;
    refused(&answer, 404, "not_found");
}

async fn servers_come_and_go(host: &mut TestHost, shop: &Scene) {
    let three = id(&shop.servers, "agent-3");
    let sync = json!({ "edit": "sync_servers", "application": "shop" });
    // Before it is run: what was planned from is read anew.
    shop.unbind(host, &[&three]).await;
    let order = host
        .order(&shop.order("synced", 1))
        .await
        .expect("an order");
    check_refused(host, &order, &sync, 409, "nothing_to_sync").await;
    shop.bind(host, &[&three], json!({})).await;
    let (status, code, _) = refusal(act(host, &order, &json!({ "action": "run" })).await);
    assert_eq!((status, code.as_str()), (409, "plan_drifted"));
    let header = edit(host, &order, &sync).await.expect("synced");
    assert_eq!(header["server_count"], 3, "{header}");
    shop.unbind(host, &[&three]).await;
    let header = edit(host, &order, &sync).await.expect("synced");
    assert_eq!(header["server_count"], 2, "{header}");
    let difference = text(&header["revisions"][2]["difference"]);
    assert!(difference.contains("left out agent-3"), "{difference}");
    shop.bind(host, &[&three], json!({})).await;
    edit(host, &order, &sync).await.expect("synced");
    // While it runs its servers stay bound, except for those that are assigned to no group.
    shop.put("hold");
    act(host, &order, &json!({ "action": "run" }))
        .await
        .expect("it runs");
    shop.wait_begun(1).await;
    let seen = nodes(host, &order).await;
    let group = group_of(&seen, "agent-3")["node"].clone();
    let header = edit(
        host,
        &order,
        &json!({ "edit": "delete_group", "node": group }),
    )
    .await;
    assert_eq!(header.expect("deleted")["server_count"], 2);
    check_refused(host, &order, &sync, 409, "nothing_to_sync").await;
    eventually("the server is free to go", || async {
        let path = host.ws(&format!("service-instances/{}/servers", shop.instance));
        let body = json!({ "servers": [three] });
        let answer = ask(&host.api, Method::DELETE, &path, Some(&body), &[]).await;
        match answer.status {
            204 => Ok(()),
            _ => Err(answer.text()),
        }
    })
    .await;
    let header = edit(host, &order, &sync).await.expect("synced");
    let last = &header["revisions"].as_array().expect("revisions").len() - 1;
    let difference = text(&header["revisions"][last]["difference"]);
    assert!(difference.contains("forgot 1 unassigned"), "{difference}");
    shop.bind(host, &[&three], json!({})).await;
    host.kill_agent(2);
    eventually("the agent is away", || async {
        let server = host.api.get(&host.ws(&format!("servers/{three}"))).await;
        let server = server.expect("the server");
        if server["connection"] == "online" {
            Err(server.to_string())
        } else {
            Ok(())
        }
    })
    .await;
    check_refused(host, &order, &sync, 409, "server_not_connected").await;
    host.start_agent(2, &[]);
    host.wait_online().await;
    let header = edit(host, &order, &sync).await.expect("synced");
    assert_eq!(header["server_count"], 3, "{header}");
    shop.take("hold");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    assert_eq!(ended["counts"]["succeeded"], 3, "{ended}");
    shop.check_serves(host, 1).await;
    check_history(host, &order).await;
    for asked in [sync, json!({ "edit": "delete_group", "node": 1 })] {
        check_refused(host, &order, &asked, 409, "order_ended").await;
    }
    shop.forget();
}

async fn a_server_that_left_is_free_for_others(host: &TestHost, shop: &Scene) {
    shop.put("hold");
    let first = run(host, shop.order("the first", 0)).await;
    shop.wait_begun(1).await;
    let second = run(host, shop.order("the second", 0)).await;
    host.order_in(&second, &["blocked"]).await;
    let seen = nodes(host, &first).await;
    let three = group_of(&seen, "agent-3")["node"].clone();
    let theirs = nodes(host, &second).await;
    let theirs = |server: &str| group_of(&theirs, server)["node"].clone();
    let unlock = json!({ "action": "unlock", "node": theirs("agent-3") });
    let (status, code, _) = refusal(act(host, &second, &unlock).await);
    assert_eq!((status, code.as_str()), (409, "server_held"));
    edit(
        host,
        &first,
        &json!({ "edit": "delete_group", "node": three }),
    )
    .await
    .expect("deleted");
    // Its lock is given back a moment after the answer.
    eventually("the server is free", || async {
        let answer = act(host, &second, &unlock).await;
        answer.map_err(|error| error.to_string())
    })
    .await;
    // Taken in again, its group is locked with the name of the one that holds it, wherever it is moved.
    let anew = json!({
        "edit": "regroup", "application": "shop", "parameters": { "grouping": "one-per-group" }
    });
    edit(host, &first, &anew).await.expect("grouped anew");
    let seen = nodes(host, &first).await;
    let group = group_of(&seen, "agent-3");
    assert!(text(&group["message"]).contains("the second"), "{group}");
    let to = group_of(&seen, "agent-2")["node"].clone();
    let three = id(&shop.servers, "agent-3");
    let moved = json!({ "edit": "move_servers", "servers": [three], "to": to });
    edit(host, &first, &moved).await.expect("moved");
    let seen = nodes(host, &first).await;
    let group = group_of(&seen, "agent-3");
    assert_eq!(group["node"], to);
    assert!(text(&group["message"]).contains("the second"), "{group}");
    act(host, &second, &json!({ "action": "cancel", "node": null }))
        .await
        .expect("cancelled");
    host.order_ended(&second).await;
    eventually("the group is ours", || async {
        let unlock = json!({ "action": "unlock", "node": to });
        let answer = act(host, &first, &unlock).await;
        answer.map_err(|error| error.to_string())
    })
    .await;
    shop.take("hold");
    let ended = host.order_ended(&first).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    shop.check_serves(host, 0).await;
    shop.forget();
}

/// An order of both applications.
fn both(shop: &Scene, bank: &Scene, title: &str) -> Value {
    let mut order = shop.order(title, 1);
    order["targets"] = json!([
        { "instance": shop.instance, "package": shop.packages[1] },
        { "instance": bank.instance, "package": bank.packages[1] },
    ]);
    order
}

async fn lanes_and_stages(host: &TestHost, shop: &Scene, bank: &Scene) {
    let preview = host.ws("orders/preview");
    for (field, value, status, code, says) in [
        (
            "dependencies",
            json!("bank>shop,shop>bank"),
            422,
            "dependencies_invalid",
            "bank>shop>bank",
        ),
        (
            "dependencies",
            json!([{ "app": "shop", "depends_on": "shop" }]),
            422,
            "dependencies_invalid",
            "shop>shop",
        ),
        (
            "dependencies",
            json!("bank>nobody"),
            422,
            "dependencies_invalid",
            "`nobody`",
        ),
        (
            "dependencies",
            json!("bank"),
            422,
            "dependencies_invalid",
            "`a>b`",
        ),
        (
            "lanes",
            json!([{ "stages": [["shop"]] }]),
            422,
            "lanes_invalid",
            "`bank`",
        ),
        (
            "lanes",
            json!([{ "stages": [["shop"], ["bank", "shop"]] }]),
            422,
            "lanes_invalid",
            "twice",
        ),
    ] {
        let mut order = both(shop, bank, "wrong");
        order[field] = value;
        let answer = ask(&host.api, Method::POST, &preview, Some(&order), &[]).await;
        let problem = refused(&answer, status, code);
        assert!(text(&problem["detail"]).contains(says), "{problem}");
    }
    // `bank` after `shop`; lanes side by side would break that.
    let mut order = both(shop, bank, "stages");
    order["dependencies"] = json!([{ "app": "bank", "depends_on": "shop" }]);
    let order = host.order(&order).await.expect("an order");
    let side_by_side = json!({
        "edit": "sequence", "lanes": [{ "stages": [["shop"]] }, { "stages": [["bank"]] }]
    });
    check_refused(host, &order, &side_by_side, 422, "breaks_dependency").await;
    for (lanes, code) in [
        (json!([{ "stages": [["shop"]] }]), "sequence_invalid"),
        (
            json!([{ "stages": [["shop"], ["bank"], ["shop"]] }]),
            "sequence_invalid",
        ),
        (
            json!([{ "stages": [["shop"], [], ["bank"]] }]),
            "sequence_invalid",
        ),
        (
            json!([{ "stages": [["shop"], ["bank"], ["nobody"]] }]),
            "no_such_application",
        ),
    ] {
        let asked = json!({ "edit": "sequence", "lanes": lanes });
        check_refused(host, &order, &asked, 422, code).await;
    }
    act(host, &order, &json!({ "action": "cancel", "node": null }))
        .await
        .expect("cancelled");

    // Released after what it depends on, and brought back before it.
    let mut order = both(shop, bank, "there and back");
    order["dependencies"] = json!("bank>shop");
    let order = run(host, order).await;
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    assert_eq!(first_server(host, &order).await, "agent-1");
    let back = json!({ "action": "roll_back", "reason": "try it" });
    let back = act(host, &order, &back).await.expect("rolled back");
    let back = text(&back["id"]);
    assert_eq!(host.order_ended(&back).await["state"], "succeeded");
    assert_eq!(first_server(host, &back).await, "agent-4");
    shop.check_serves(host, 0).await;
    bank.check_serves(host, 0).await;
    shop.forget();
    bank.forget();

    // Without a dependency: one after the other as lanes say, until a person brings them side by side.
    let mut order = both(shop, bank, "lanes");
    order["lanes"] = json!([{ "stages": [["shop"], ["bank"]] }]);
    shop.put("hold");
    bank.put("hold");
    let order = run(host, order).await;
    shop.wait_begun(1).await;
    let turned = json!({ "edit": "sequence", "lanes": [{ "stages": [["bank"], ["shop"]] }] });
    check_refused(host, &order, &turned, 409, "has_started").await;
    assert!(bank.begun().is_empty(), "its stage is the second");
    edit(host, &order, &side_by_side).await.expect("in lanes");
    bank.wait_begun(1).await;
    assert_eq!(shop.begun().len(), 1, "one after the other in its lane");
    shop.take("hold");
    bank.take("hold");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    shop.check_serves(host, 1).await;
    bank.check_serves(host, 1).await;
    check_history(host, &order).await;
    shop.forget();
    bank.forget();
}

/// The server that an order began with.
async fn first_server(host: &TestHost, order: &str) -> String {
    let begun = events(host, order).await.into_iter().find(|event| {
        event["type"] == "node" && event["state"] == "running" && !event["server"].is_null()
    });
    let server = text(&begun.expect("a server began")["server"]);
    let servers = host.servers().await;
    let found = servers.into_iter().find(|(_, id)| *id == server);
    found.expect("a server").0
}

async fn some_plans_are_not_changed(host: &TestHost, shop: &Scene, bank: &Scene) {
    // Nothing more goes into a group that was ended.
    shop.put("hold");
    let order = run(host, shop.order("an ended group", 1)).await;
    shop.wait_begun(1).await;
    let seen = nodes(host, &order).await;
    let ended = group_of(&seen, "agent-3")["node"].clone();
    act(host, &order, &json!({ "action": "cancel", "node": ended }))
        .await
        .expect("the group is ended");
    let two = id(&shop.servers, "agent-2");
    let moved = json!({ "edit": "move_servers", "servers": [two], "to": ended });
    check_refused(host, &order, &moved, 409, "group_over").await;
    act(host, &order, &json!({ "action": "cancel", "node": null }))
        .await
        .expect("cancelled");
    shop.take("hold");
    host.order_ended(&order).await;
    shop.forget();

    // The last group; an application without groups comes back.
    let order = host
        .order(&both(shop, bank, "the last group"))
        .await
        .expect("an order");
    for server in ["agent-1", "agent-2", "agent-3"] {
        let group = group_of(&nodes(host, &order).await, server)["node"].clone();
        edit(
            host,
            &order,
            &json!({ "edit": "delete_group", "node": group }),
        )
        .await
        .expect("deleted");
    }
    let group = group_of(&nodes(host, &order).await, "agent-4")["node"].clone();
    let last = json!({ "edit": "delete_group", "node": group });
    check_refused(host, &order, &last, 409, "nothing_left").await;
    let anew = json!({
        "edit": "regroup", "application": "shop", "parameters": { "grouping": "one-per-group" }
    });
    let header = edit(host, &order, &anew).await.expect("grouped anew");
    assert_eq!(header["server_count"], 4, "{header}");
    // Unknown fields and edits are none.
    for asked in [
        json!({ "edit": "regroup", "application": "shop", "group": 1 }),
        json!({ "edit": "rename" }),
        json!({ "node": 1 }),
    ] {
        let list = path(host, &order, "");
        let answer = ask(&host.api, Method::POST, &list, Some(&asked), &[]).await;
        assert_eq!(answer.status, 422, "{asked}: {}", answer.text());
    }
    // A header shows the last revisions, the list all of them.
    for _ in 0..3 {
        edit(host, &order, &anew).await.expect("grouped anew");
    }
    for _ in 0..3 {
        let seen = nodes(host, &order).await;
        let to = group_of(&seen, "agent-1")["node"].clone();
        let two = id(&shop.servers, "agent-2");
        edit(
            host,
            &order,
            &json!({ "edit": "move_servers", "servers": [two], "to": to }),
        )
        .await
        .expect("moved");
        edit(host, &order, &anew).await.expect("grouped anew");
    }
    let header = host.api.get(&host.ws(&format!("orders/{order}"))).await;
    let shown = header.expect("the order")["revisions"].clone();
    let all = revisions(host, &order).await;
    assert_eq!(all.len(), 14);
    assert_eq!(shown.as_array().expect("revisions"), &all[all.len() - 8..]);
    act(host, &order, &json!({ "action": "cancel", "node": null }))
        .await
        .expect("cancelled");
    check_history(host, &order).await;
}

/// Gates, dependencies, explicit groups and locks, where groups are deleted and made anew.
async fn what_goes_with_a_group(host: &TestHost, shop: &Scene, bank: &Scene) {
    // Gray traffic: a gate behind each group asks about its servers.
    let mut gray = shop.order("gray", 1);
    gray["parameters"] = json!({ "grouping": "one-per-group", "gray_traffic": true });
    let gray = host.order(&gray).await.expect("an order");
    let gates = async |order: &str| {
        let seen = nodes(host, order).await;
        seen.iter().filter(|node| node["kind"] == "gate").count()
    };
    assert_eq!(gates(&gray).await, 3);
    let group = |seen: &[Value], server: &str| group_of(seen, server)["node"].clone();
    let seen = nodes(host, &gray).await;
    let delete = json!({ "edit": "delete_group", "node": group(&seen, "agent-2") });
    let header = edit(host, &gray, &delete).await.expect("deleted");
    assert_eq!(gates(&gray).await, 2, "{header}");
    let three = id(&shop.servers, "agent-3");
    let moved =
        json!({ "edit": "move_servers", "servers": [three], "to": group(&seen, "agent-1") });
    let header = edit(host, &gray, &moved).await.expect("moved");
    assert_eq!(gates(&gray).await, 1, "{header}");
    let last = header["revisions"].as_array().expect("revisions").last();
    let difference = text(&last.expect("a revision")["difference"]);
    assert!(difference.contains("without confirm"), "{difference}");

    // What others depend on comes back in front of them.
    let mut order = both(shop, bank, "depends");
    order["dependencies"] = "shop>bank".into();
    let order = host.order(&order).await.expect("an order");
    let seen = nodes(host, &order).await;
    let delete = json!({ "edit": "delete_group", "node": group(&seen, "agent-4") });
    edit(host, &order, &delete).await.expect("deleted");
    let anew = json!({ "edit": "regroup", "application": "bank", "parameters": { "grouping": "one-per-group" } });
    edit(host, &order, &anew).await.expect("grouped anew");
    let seen = nodes(host, &order).await;
    let applications: Vec<&str> = seen
        .iter()
        .filter(|node| node["level"] == "application")
        .filter_map(|node| node["name"].as_str())
        .collect();
    assert_eq!(applications, ["bank", "shop"]);

    // Servers come into an order of explicit groups.
    shop.unbind(host, &[&three]).await;
    let mut explicit = shop.order("explicit", 1);
    let (one, two) = (id(&shop.servers, "agent-1"), id(&shop.servers, "agent-2"));
    explicit["parameters"] = json!({ "grouping": "explicit",
        "groups": [{ "name": "one", "servers": [one] }, { "name": "two", "servers": [two] }] });
    let explicit = host.order(&explicit).await.expect("an order");
    shop.bind(host, &[&three], json!({})).await;
    let sync = json!({ "edit": "sync_servers", "application": "shop" });
    let header = edit(host, &explicit, &sync).await.expect("synced");
    assert_eq!(header["server_count"], 3, "{header}");

    // A person's lock stays where its servers go.
    shop.put("hold");
    let locked = run(host, shop.order("locked", 1)).await;
    shop.wait_begun(1).await;
    let seen = nodes(host, &locked).await;
    let lock =
        json!({ "action": "lock", "node": group(&seen, "agent-3"), "reason": "not tonight" });
    act(host, &locked, &lock).await.expect("locked");
    let anew = json!({ "edit": "regroup", "application": "shop", "parameters": { "grouping": "one-per-group" } });
    edit(host, &locked, &anew).await.expect("grouped anew");
    let seen = nodes(host, &locked).await;
    let of = |server: &str| group_of(&seen, server).clone();
    assert!(
        text(&of("agent-3")["message"]).contains("not tonight"),
        "{}",
        of("agent-3")
    );
    assert_eq!(of("agent-2")["state"], "not_started");
    let names: std::collections::BTreeSet<String> = ["agent-1", "agent-2", "agent-3"]
        .iter()
        .map(|server| text(&of(server)["name"]))
        .collect();
    assert_eq!(names.len(), 3, "each has a name of its own: {names:?}");
    for order in [gray, order, explicit, locked] {
        act(host, &order, &json!({ "action": "cancel", "node": null }))
            .await
            .expect("cancelled");
        host.order_ended(&order).await;
    }
    shop.take("hold");
    shop.forget();
}

/// The header shows the last revisions alone; what was released under an earlier one is the order's all the same.
async fn an_order_of_many_revisions_is_rolled_back(host: &TestHost, shop: &Scene) {
    shop.release(host, 0).await;
    shop.forget();
    shop.put("hold-agent-2");
    let order = run(host, shop.order("many revisions", 1)).await;
    shop.wait_begun(2).await;
    let anew = json!({ "edit": "regroup", "application": "shop", "parameters": { "grouping": "one-per-group" } });
    for _ in 0..9 {
        edit(host, &order, &anew).await.expect("grouped anew");
    }
    shop.take("hold-agent-2");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    let back = json!({ "action": "roll_back", "reason": "try it" });
    let back = act(host, &order, &back).await.expect("rolled back");
    assert_eq!(
        host.order_ended(&text(&back["id"])).await["state"],
        "succeeded"
    );
    shop.check_serves(host, 0).await;
    shop.forget();
}

/// The server dies between the plan's blob and the commit, and between the commit and the answer.
async fn a_change_survives_the_death_of_the_server(host: &mut TestHost, shop: &Scene) {
    shop.put("hold");
    let order = run(host, shop.order("survives", 0)).await;
    shop.wait_begun(1).await;
    let three = id(&shop.servers, "agent-3");
    let to = group_of(&nodes(host, &order).await, "agent-2")["node"].clone();
    let asked = json!({ "edit": "move_servers", "servers": [three], "to": to });
    for (point, count) in [("engine.plan_kept:1", 1), ("engine.after_commit:1", 2)] {
        host.kill();
        host.boot(&[("WINDLASS_CRASH_AT".to_owned(), point.to_owned())])
            .await;
        let headers = [
            ("content-type", "application/json"),
            ("idempotency-key", "moved"),
        ];
        let body = asked.to_string().into();
        let list = path(host, &order, "");
        let answer = host.api.request(Method::POST, &list, body, &headers).await;
        assert!(answer.is_err(), "the server died: {answer:?}");
        eventually("the server is gone", || {
            let gone = host.has_ended();
            async move {
                if gone {
                    Ok(())
                } else {
                    Err("it runs".to_owned())
                }
            }
        })
        .await;
        host.boot(&[]).await;
        assert_eq!(revisions(host, &order).await.len(), count, "{point}");
        let seen = groups(&nodes(host, &order).await);
        assert_eq!(seen.len(), 4 - count, "{point}: {seen:?}");
    }
    // The same request again is answered, and not made again.
    let headers = [("idempotency-key", "moved")];
    let list = path(host, &order, "");
    let answer = ask(&host.api, Method::POST, &list, Some(&asked), &headers).await;
    let header = accepted(&answer, 200);
    assert_eq!(header["revisions"].as_array().expect("revisions").len(), 2);
    assert_eq!(revisions(host, &order).await.len(), 2);
    host.wait_online().await;
    shop.take("hold");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    assert!(
        shop.begun().values().all(|times| *times == 1),
        "{:?}",
        shop.begun()
    );
    shop.check_serves(host, 0).await;
    check_history(host, &order).await;
}
