//! What `run` executes is what `preview` showed, byte for byte, or it is refused naming what changed; and a secret is
//! nowhere but in the process that needs it.

use std::{fs, path::Path};

use serde_json::{Value, json};
use windlass_tests::{
    guests::{PluginDirectory, guest, wait_active},
    host::{Setup, TestHost, items, text},
    release::upload,
    scene::{Scene, act, events, nodes, parameters, program, refusal, unit},
};

/// A script that leaves a copy of itself.
const COPIES_ITSELF: &str = "cp \"$0\" \"$SCENE/copy-$WINDLASS_SERVER\"\n# byte for byte: ü, \"quotes\", 'single', $HOME, \\n, \ttab, and no line end at the end";

async fn preview(host: &TestHost, order: &Value) -> Value {
    host.api
        .post(&host.ws("orders/preview"), order)
        .await
        .expect("a preview")
}

/// An order that must be what was previewed.
fn from(order: &Value, preview: &Value) -> Value {
    let mut order = order.clone();
    order["plan_digest"] = preview["plan_digest"].clone();
    order
}

#[tokio::test]
async fn what_runs_is_what_was_previewed() {
    let host = TestHost::start(Setup {
        agents: 2,
        ..Setup::default()
    })
    .await;
    let scene = Scene::prepare(&host).await;
    let mut copying = parameters();
    copying["configure_script"] = COPIES_ITSELF.into();
    scene.change(&host, &json!({ "parameters": copying })).await;

    let order = scene.order("previewed", 0);
    let shown = preview(&host, &order).await;
    assert_eq!(
        preview(&host, &order).await,
        shown,
        "the same question has the same answer"
    );
    assert_eq!(shown["server_count"], 2);
    let made = items(&host.api.get(&host.ws("orders")).await.expect("orders"));
    assert_eq!(made, Vec::<Value>::new(), "a preview does nothing");

    let id = host.order(&from(&order, &shown)).await.expect("an order");
    act(&host, &id, &json!({ "action": "run" }))
        .await
        .expect("it runs");
    let ended = host.order_ended(&id).await;
    assert_eq!(
        (&ended["state"], &ended["plan"]),
        (&json!("succeeded"), &shown["plan_digest"]),
        "{ended}"
    );
    let ran = host
        .api
        .get(&host.ws(&format!("orders/{id}/plan")))
        .await
        .expect("the plan");
    assert_eq!(ran, shown, "the plan that ran is the one that was shown");
    let planned = shown["plan"]["steps"]
        .as_array()
        .expect("steps")
        .iter()
        .find(|step| step["stack"]["name"] == "configure");
    let script = text(&planned.expect("the script's step")["stack"]["action"]["script"]["text"]);
    assert_eq!(script, COPIES_ITSELF);
    for (server, _) in &scene.servers {
        let copy = fs::read(scene.directory.join(format!("copy-{server}")))
            .expect("the script's copy of itself");
        assert_eq!(
            String::from_utf8_lossy(&copy),
            script,
            "what ran on {server}"
        );
    }
    // Another request with the digest of this one.
    let mut other = from(
        &scene.order("previewed", 0),
        &preview(&host, &scene.order("previewed", 0)).await,
    );
    other["limits"] = json!({ "max_in_flight": 1 });
    let (status, code, detail) = refusal(host.order(&other).await);
    assert_eq!((status, code.as_str()), (409, "plan_differs"), "{detail}");
    let unknown = json!("0".repeat(64));
    other["plan_digest"] = unknown;
    let (status, code, detail) = refusal(host.order(&other).await);
    assert_eq!(
        (status, code.as_str()),
        (422, "no_such_preview"),
        "{detail}"
    );
}

/// What was previewed and made before something changed.
struct Before {
    order: Value,
    shown: Value,
    made: String,
}

async fn before(host: &TestHost, scene: &Scene, package: usize) -> Before {
    let order = scene.order("drift", package);
    let shown = preview(host, &order).await;
    let made = host.order(&from(&order, &shown)).await.expect("an order");
    Before { order, shown, made }
}

impl Before {
    /// Neither the preview nor the order that was made of it is run: both are refused with what changed.
    async fn refused_naming(self, host: &TestHost, subject: &str) {
        self.preview_is_refused(host, subject).await;
        let refused = refusal(act(host, &self.made, &json!({ "action": "run" })).await);
        self.names(&refused, subject);
        self.end(host).await;
    }

    async fn preview_is_refused(&self, host: &TestHost, subject: &str) {
        let refused = refusal(host.order(&from(&self.order, &self.shown)).await);
        self.names(&refused, subject);
    }

    fn names(&self, (status, code, detail): &(u16, String, String), subject: &str) {
        assert_eq!(
            (*status, code.as_str()),
            (409, "plan_drifted"),
            "{subject}: {detail}"
        );
        assert!(
            detail.contains(&format!("{subject}: was ")),
            "it names `{subject}`: {detail}"
        );
    }

    async fn end(self, host: &TestHost) {
        let order = host
            .api
            .get(&host.ws(&format!("orders/{}", self.made)))
            .await
            .expect("the order");
        assert_eq!(order["state"], "not_started", "nothing was done: {order}");
        act(host, &self.made, &json!({ "action": "cancel" }))
            .await
            .expect("the order is ended");
    }
}

#[tokio::test]
async fn each_kind_of_drift_is_refused_naming_what_changed() {
    let mut host = TestHost::start(Setup {
        agents: 2,
        ..Setup::default()
    })
    .await;
    let scene = Scene::prepare(&host).await;
    scene.release(&host, 0).await;
    scene.forget();

    let old = before(&host, &scene, 1).await;
    let mut changed = parameters();
    changed["stop_grace_s"] = 2.into();
    scene.change(&host, &json!({ "parameters": changed })).await;
    old.refused_naming(&host, "instance of scene").await;

    let old = before(&host, &scene, 1).await;
    let mut env = scene.env();
    env["MORE"] = "more".into();
    scene.change(&host, &json!({ "env": env })).await;
    old.refused_naming(&host, "instance of scene").await;

    let old = before(&host, &scene, 1).await;
    scene.change(&host, &json!({ "pools": [] })).await;
    old.refused_naming(&host, "instance of scene").await;
    scene.change(&host, &json!({ "pools": [scene.pool] })).await;

    let old = before(&host, &scene, 1).await;
    let (name, id) = &scene.servers[0];
    scene
        .bind(&host, &[id], json!({ (id): { "PORT": "1234" } }))
        .await;
    old.refused_naming(&host, &format!("server {name}")).await;

    let old = before(&host, &scene, 1).await;
    let cell = json!({ "name": "cell-c", "deployment_zone": "a", "zones": ["zone-a"] });
    host.api
        .post(&host.ws("cells"), &cell)
        .await
        .expect("a cell");
    old.refused_naming(&host, "cells").await;

    // A server in a cell in which the instance had none: still one of those that would be released to.
    host.add_agent("agent-3").await;
    host.wait_online().await;
    let third = host
        .servers()
        .await
        .into_iter()
        .find(|(name, _)| name == "agent-3")
        .expect("the new server")
        .1;
    host.api
        .put(
            &host.ws(&format!("servers/{third}")),
            &json!({ "cell": "cell-c" }),
        )
        .await
        .expect("the server is moved");
    let old = before(&host, &scene, 1).await;
    scene.bind(&host, &[&third], json!({})).await;
    old.refused_naming(&host, "servers of scene").await;

    let old = before(&host, &scene, 1).await;
    scene.unbind(&host, &[&third]).await;
    old.refused_naming(&host, "servers of scene").await;

    let old = before(&host, &scene, 0).await;
    scene.forget();
    scene.release(&host, 1).await;
    old.refused_naming(&host, "installed scene on agent-1")
        .await;
    scene.forget();

    packages_that_are_gone_are_refused(&host, &scene).await;
    assert_eq!(
        scene.log(),
        Vec::<String>::new(),
        "no refused order touched a server"
    );
}

async fn packages_that_are_gone_are_refused(host: &TestHost, scene: &Scene) {
    let spare = upload(host, "scene", "9.0.0", program("9.0.0")).await;
    let mut order = scene.order("gone", 0);
    order["targets"][0]["package"] = spare.clone().into();
    let shown = preview(host, &order).await;
    delete(host, &spare, "9.0.0").await;
    let (status, code, detail) = refusal(host.order(&from(&order, &shown)).await);
    assert_eq!(
        (status, code.as_str()),
        (422, "package_unknown"),
        "{detail}"
    );
    assert!(detail.contains(&spare), "{detail}");
    // The same version again, with other bytes.
    let other = upload(host, "scene", "9.0.0", program("9.0.0 but not the same")).await;
    order["targets"][0]["package"] = other.clone().into();
    let (status, code, detail) = refusal(host.order(&from(&order, &shown)).await);
    assert_eq!((status, code.as_str()), (409, "plan_drifted"), "{detail}");
    assert!(
        detail.contains("package of scene: was 9.0.0 with digest "),
        "{detail}"
    );
    // One that an order is going to use stays.
    let made = host.order(&order).await.expect("an order");
    let path = host.ws(&format!("packages/{other}?confirm=9.0.0"));
    let kept = host
        .api
        .request(hyper::Method::DELETE, &path, bytes::Bytes::new(), &[])
        .await
        .expect("an answer");
    assert!(
        kept.status == 409 && kept.text().contains(&made),
        "{}: {}",
        kept.status,
        kept.text()
    );
    act(host, &made, &json!({ "action": "cancel" }))
        .await
        .expect("the order is ended");
}

async fn delete(host: &TestHost, package: &str, version: &str) {
    let path = host.ws(&format!("packages/{package}?confirm={version}"));
    let answer = host
        .api
        .request(hyper::Method::DELETE, &path, bytes::Bytes::new(), &[])
        .await
        .expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[tokio::test]
async fn plugins_that_were_replaced_are_refused_and_orders_keep_theirs() {
    let plugins = PluginDirectory::shipped();
    plugins.drop_in("one.wasm", &guest("deployment-strategy", "turns", "1.0.0"));
    plugins.drop_in("two.wasm", &guest("tech-stack", "little", "1.0.0"));
    let host = TestHost::start(Setup {
        agents: 2,
        plugins: Some(plugins.path()),
        ..Setup::default()
    })
    .await;
    wait_active(&host, "turns@1.0.0").await;
    wait_active(&host, "little@1.0.0").await;
    let app = host
        .api
        .post(
            "/v1/apps",
            &json!({ "name": "little", "tech_stack": { "name": "little", "version": "*" } }),
        )
        .await
        .expect("an application");
    let package = upload(&host, "little", "1.0.0", program("1.0.0")).await;
    let instance = json!({ "name": "little", "app": app["id"] });
    let instance = text(
        &host
            .api
            .post(&host.ws("service-instances"), &instance)
            .await
            .expect("an instance")["id"],
    );
    let servers: Vec<String> = host.servers().await.into_iter().map(|(_, id)| id).collect();
    host.api
        .post(
            &host.ws(&format!("service-instances/{instance}/servers")),
            &json!({ "servers": servers }),
        )
        .await
        .expect("bound");
    let order = json!({ "title": "plugins", "strategy": "turns", "targets": [{ "instance": instance, "package": package }] });
    for (file, kind, name, version, subject) in [
        (
            "one-b.wasm",
            "deployment-strategy",
            "turns",
            "1.1.0",
            "strategy turns",
        ),
        (
            "two-b.wasm",
            "tech-stack",
            "little",
            "1.1.0",
            "tech stack little",
        ),
    ] {
        let shown = preview(&host, &order).await;
        let made = host.order(&from(&order, &shown)).await.expect("an order");
        plugins.drop_in(file, &guest(kind, name, version));
        wait_active(&host, &format!("{name}@{version}")).await;
        let (status, code, detail) = refusal(host.order(&from(&order, &shown)).await);
        assert_eq!((status, code.as_str()), (409, "plan_drifted"), "{detail}");
        assert!(
            detail.contains(&format!("{subject}: was {name}@1.0.0 "))
                && detail.contains(&format!("is {name}@{version} ")),
            "{detail}"
        );
        // The order that was made before keeps the plugins that it was planned with.
        act(&host, &made, &json!({ "action": "run" }))
            .await
            .expect("it runs");
        let ended = host.order_ended(&made).await;
        assert_eq!(
            (&ended["state"], &ended["plan"]),
            (&json!("succeeded"), &shown["plan_digest"]),
            "{ended}"
        );
    }
}

#[tokio::test]
async fn a_server_that_drifts_in_the_middle_blocks_its_group() {
    let host = TestHost::start(Setup {
        agents: 2,
        ..Setup::default()
    })
    .await;
    let scene = Scene::prepare(&host).await;
    scene.release(&host, 0).await;
    scene.forget();
    scene.put("hold");
    let mut order = scene.order("middle", 1);
    order["run"] = true.into();
    let order = host.order(&order).await.expect("an order");
    scene.wait_begun(1).await;
    let (name, id) = &scene.servers[1];
    let change = |env: Value| json!({ "env": env });
    let mut more = scene.env();
    more["MORE"] = "more".into();
    scene.change(&host, &change(more)).await;
    scene.take("hold");
    let drifted = host.order_in(&order, &["drifted"]).await;
    assert!(
        text(&drifted["state_reason"]).contains("instance of scene was "),
        "{drifted}"
    );
    let seen = nodes(&host, &order).await;
    let unit = unit(&seen, name);
    assert_eq!(
        (&unit["state"], &unit["server"]),
        (&json!("drifted"), &json!(id))
    );
    let drift = &unit["drift"][0];
    assert_eq!(drift["subject"], "instance of scene");
    assert_ne!(drift["before"], drift["after"], "{drift}");
    assert_eq!(scene.begun().len(), 1, "it was not touched");
    let retry = json!({ "action": "retry", "node": unit["node"] });
    act(&host, &order, &retry).await.expect("a retry");
    host.order_in(&order, &["drifted"]).await;
    scene.change(&host, &change(scene.env())).await;
    act(&host, &order, &retry).await.expect("a retry");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    scene.check_serves(&host, 1).await;
}

/// The files below a directory that hold a text.
fn files_with(directory: &Path, text: &str, found: &mut Vec<String>) -> usize {
    let mut looked = 0;
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        // What vanishes meanwhile is looked at the next time.
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        if kind.is_dir() {
            looked += files_with(&path, text, found);
        } else if kind.is_file()
            && let Ok(bytes) = fs::read(&path)
        {
            looked += 1;
            if bytes
                .windows(text.len())
                .any(|window| window == text.as_bytes())
            {
                found.push(path.display().to_string());
            }
        }
    }
    looked
}

fn check_files(host: &TestHost, secret: &str, when: &str) {
    let mut found = Vec::new();
    let looked = files_with(host.path(), secret, &mut found);
    assert!(looked > 20, "the files were looked at: {looked}");
    assert_eq!(found, Vec::<String>::new(), "{when}");
}

#[tokio::test]
async fn a_secret_is_nowhere_but_where_it_is_needed() {
    let secret = "pl4nted-S3cret-\"quoted\"-0123456789";
    let host = TestHost::start(Setup {
        agents: 2,
        ..Setup::default()
    })
    .await;
    let scene = Scene::prepare(&host).await;
    host.api
        .put(&host.ws("secrets/token"), &json!({ "value": secret }))
        .await
        .expect("the secret is kept");
    let mut env = scene.env();
    env["TOKEN"] = json!({ "secret_ref": "token" });
    let mut telling = parameters();
    telling["configure_script"] =
        "printf %s \"$TOKEN\" | sha256sum | cut -d' ' -f1 > \"$SCENE/sum-$WINDLASS_SERVER\"\n\
        echo \"the token is $TOKEN.\"; echo \"and again: $TOKEN\" >&2\n\
        echo \"+ $WINDLASS_SERVER\" >> \"$SCENE/log\"\n\
        while [ -e \"$SCENE/hold\" ]; do sleep 0.02; done\n"
            .into();
    scene
        .change(&host, &json!({ "env": env, "parameters": telling }))
        .await;
    scene.put("hold");
    let order = scene.order("secret", 0);
    let shown = preview(&host, &order).await;
    let id = host.order(&from(&order, &shown)).await.expect("an order");
    act(&host, &id, &json!({ "action": "run" }))
        .await
        .expect("it runs");
    scene.wait_begun(1).await;
    // The script is running: journals, run directories and inbox rows hold what they hold.
    check_files(&host, secret, "while a script with it runs");
    scene.take("hold");
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    check_files(&host, secret, "after the release");
    let mut answers = vec![shown, ended, Value::Array(events(&host, &id).await)];
    let seen = nodes(&host, &id).await;
    let mut outputs = 0;
    for node in &seen {
        let details = host
            .api
            .get(&host.ws(&format!("orders/{id}/nodes/{}", node["node"])))
            .await
            .expect("a node");
        outputs += usize::from(details.to_string().contains("the token is "));
        answers.push(details);
    }
    assert_eq!(outputs, 2, "the scripts' outputs are kept");
    answers.extend(seen);
    for path in [
        format!("orders/{id}/plan"),
        "orders".into(),
        "servers".into(),
        "secrets".into(),
        format!("service-instances/{}", scene.instance),
    ] {
        answers.push(host.api.get(&host.ws(&path)).await.expect("an answer"));
    }
    for answer in answers {
        let answer = answer.to_string();
        assert!(
            !answer.contains("pl4nted") && !answer.contains("0123456789"),
            "{answer}"
        );
    }
    let expected = sha256(&scene, secret);
    for (server, _) in &scene.servers {
        let sum =
            fs::read_to_string(scene.directory.join(format!("sum-{server}"))).expect("the sum");
        assert_eq!(
            sum.trim(),
            expected,
            "the script on {server} had the real value"
        );
    }
}

/// By the same program that the scripts use.
fn sha256(scene: &Scene, text: &str) -> String {
    let output = std::process::Command::new("sh")
        .args([
            "-c",
            "printf %s \"$1\" | sha256sum | cut -d' ' -f1",
            "sh",
            text,
        ])
        .current_dir(&scene.directory)
        .output()
        .expect("sha256sum");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
