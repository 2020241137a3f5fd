//! Process templates over the API, with real agents: how they are kept, what is refused, and releases and operations that follow
//! them.

use std::fs;

use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};
use windlass_tests::{
    host::{TestHost, items, text},
    operated::{check_serves, done, make, on, operation, ready, refused, starts, state_of},
    scene::{Scene, act, nodes, nodes_when, refusal, unit},
};

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
    each_kind_of_operation_follows_its_template(&host, &scene).await;
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

    let with = |pointer: &str, value: Value| {
        let mut step = script("a script", "true");
        match step.pointer_mut(pointer) {
            Some(found) => *found = value,
            None => step[pointer.trim_start_matches('/')] = value,
        }
        step
    };
    for (kind, steps, field, says) in [
        ("restart", json!([]), "steps", "1 to 50 steps"),
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
            "steps",
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
            json!([with("/run_as", json!("a b\n"))]),
            "/steps/0",
            "is not the name of an OS user",
        ),
        (
            "static_files",
            json!([with("/env", json!({ "A": { "plain": "x\0y" } }))]),
            "/steps/0",
            "zero byte",
        ),
        (
            "static_files",
            json!([with("/script/interpreter", json!(["sh"]))]),
            "/steps/0",
            "give the path of one",
        ),
        (
            "static_files",
            json!([with("/script/interpreter", json!(["/bin/sh\0"]))]),
            "/steps/0",
            "NUL",
        ),
        (
            "static_files",
            json!([with("/script/working_dir", json!("../../x"))]),
            "/steps/0",
            "working directory",
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
    // One that moves no traffic cannot give the weights that a strategy plans.
    let steps = phases(&[
        "fetch",
        "unpack",
        "phase configure",
        "stop_installed",
        "activate",
        "phase start",
        "phase check",
    ]);
    let bare = json!({ "name": "bare", "kind": "release", "steps": steps });
    let answer = host.api.post(&host.ws("process-templates"), &bare).await;
    let bare = answer.expect("a template");
    for parameters in [
        json!({ "grouping": "one-per-group", "gray_traffic": true }),
        json!({ "grouping": "one-per-group", "weight_override": 40 }),
    ] {
        let mut order = scene.order("bare", 0);
        order["template"] = bare["id"].clone();
        order["parameters"] = parameters;
        let (status, code, says) = refusal(host.order(&order).await);
        assert_eq!(
            (status, code.as_str()),
            (422, "template_moves_no_traffic"),
            "{says}"
        );
        order["parameters"] = json!({ "grouping": "one-per-group" });
        host.order(&order).await.expect("weights stay as they are");
    }
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
    // Deleted, it drifts nothing: the plan holds its steps.
    let gone = create(host, "test", &{
        let mut template = steps("gone");
        template["name"] = "gone".into();
        template
    })
    .await;
    let mut of_gone = asked.clone();
    of_gone["template"] = gone["id"].clone();
    let of_gone = make(host, &of_gone).await;
    let delete = host.ws(&format!(
        "process-templates/{}?confirm=gone",
        text(&gone["id"])
    ));
    let answer = host
        .api
        .request(Method::DELETE, &delete, Bytes::new(), &[])
        .await;
    assert_eq!(answer.expect("an answer").status, 204);
    act(host, &of_gone, &json!({ "action": "run" }))
        .await
        .expect("it runs");
    assert_eq!(host.order_ended(&of_gone).await["state"], "succeeded");
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

/// Offline, online, static files and initialisation, each with a script of its own between its steps.
async fn each_kind_of_operation_follows_its_template(host: &TestHost, scene: &Scene) {
    let first = &scene.servers[0].1;
    let before = left(scene).len();
    let mut parameters = windlass_tests::scene::parameters();
    parameters["prepare_script"] = json!("true");
    scene
        .change(host, &json!({ "parameters": parameters }))
        .await;
    let user = std::process::Command::new("id").arg("-un").output();
    let user = String::from_utf8(user.expect("id(1)").stdout).expect("a name");
    for (kind, operation, front, behind) in [
        (
            "offline",
            json!({ "kind": "offline" }),
            &["drain", "stop_installed"][..],
            &[][..],
        ),
        (
            "online",
            json!({ "kind": "online", "initial_weight": 100 }),
            &["start_installed", "check_installed"],
            &["restore"],
        ),
        (
            "initialise",
            json!({ "kind": "initialise" }),
            &["phase prepare"],
            &["phase install"],
        ),
    ] {
        let mut steps = phases(front);
        steps.push(leave(kind));
        steps.extend(phases(behind));
        let template = json!({ "name": format!("own-{kind}"), "kind": kind, "steps": steps });
        let template = create(host, "test", &template).await;
        let mut asked = on(scene, kind, operation, &[0]);
        asked["template"] = template["id"].clone();
        let ended = done(host, asked).await;
        assert_eq!(ended["server_count"], 1, "{ended}");
        let state = state_of(host, first).await;
        let (expect, weight) = match kind {
            "offline" => ("offline", 0),
            _ => ("released", 100),
        };
        assert_eq!(
            (state.as_str(), scene.weight(host, first).await),
            (expect, weight),
            "{kind}"
        );
    }
    assert_eq!(
        left(scene)[before..],
        ["offline agent-1", "online agent-1", "initialise agent-1"]
    );
    // Files that cannot be had leave what comes behind them undone.
    let mut steps = phases(&["place_files"]);
    steps.push(leave("static_files"));
    let template = json!({ "name": "own-files", "kind": "static_files", "steps": steps });
    let template = create(host, "test", &template).await;
    let directory = host.path().join("www/site");
    let mut asked = on(
        scene,
        "files",
        json!({ "kind": "static_files", "url": "http://127.0.0.1:1/x.tar.gz",
            "directory": format!("{}/", directory.display()), "user": user.trim() }),
        &[0],
    );
    asked["template"] = template["id"].clone();
    asked["run"] = true.into();
    let order = make(host, &asked).await;
    host.order_in(&order, &["blocked"]).await;
    act(host, &order, &json!({ "action": "ignore", "node": 0 }))
        .await
        .expect("gone on without");
    host.order_ended(&order).await;
    assert_eq!(left(scene).len(), before + 3, "its script did not run");
    check_serves(host, scene).await;
}
