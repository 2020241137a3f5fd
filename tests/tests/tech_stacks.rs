//! What a release says of its tech stack, which version, and whether servers are prepared again, and deployment parameters
//! as text. Two servers, and a test guest in two versions whose step `prepare` leaves a line.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};
use windlass::api::client::ClientError;
use windlass_tests::{
    guests::{PluginDirectory, guest, wait_active},
    host::{Setup, TestHost, eventually, text},
    release::upload,
    scene::{act, nodes, program, step},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_prepared_once_and_releases_change_the_version() {
    let plugins = PluginDirectory::shipped();
    for version in ["1.0.0", "1.1.0"] {
        let guest = guest("tech-stack", "staged", version);
        plugins.drop_in(&format!("staged-{version}.wasm"), &guest);
    }
    let host = TestHost::start(Setup {
        plugins: Some(plugins.path()),
        ..Setup::default()
    })
    .await;
    for version in ["1.0.0", "1.1.0"] {
        wait_active(&host, &format!("staged@{version}")).await;
    }
    let staged = Staged::prepare(&host).await;
    staged.bind(&host, "agent-1").await;
    let first = staged.release(&host, 0, &json!({})).await;
    assert_eq!(staged.prepared(), ["agent-1"]);
    assert_eq!(version_of(&host, &first).await, "1.1.0", "the highest");

    // A server that comes later is prepared, the one that was already is not.
    staged.bind(&host, "agent-2").await;
    let second = staged.release(&host, 1, &json!({})).await;
    assert_eq!(staged.prepared(), ["agent-2"]);
    let planned = nodes(&host, &second).await;
    let prepares = planned.iter().filter(|node| node["name"] == "prepare");
    assert_eq!(prepares.count(), 1, "the plan leaves it out");
    staged
        .release(&host, 0, &json!({ "install_from_cache": false }))
        .await;
    assert_eq!(staged.prepared(), ["agent-1", "agent-2"]);
    staged.release(&host, 1, &json!({})).await;
    assert_eq!(staged.prepared(), [""; 0], "what was not from cache counts");

    parameters_come_as_text(&host, &staged).await;
    a_version_is_lowered_and_comes_back(&host, &staged).await;
    what_failed_is_done_again(&host, &staged).await;
    refusals(&host, &staged).await;
}

/// An application's own parameters stand above those of all. Another environment is another preparation.
async fn parameters_come_as_text(host: &TestHost, staged: &Staged) {
    let mut change = json!({ "environment": " EMPTY= \r\n\tGREETING=all a.b-c=x=y\n" });
    staged.release(host, 0, &change).await;
    assert_eq!(staged.greeting("agent-1"), "all");
    assert_eq!(staged.prepared(), ["agent-1", "agent-2"]);
    change["targets"] = json!([{ "parameters": "GREETING=its\tOTHER=1" }]);
    let order = staged.release(host, 1, &change).await;
    assert_eq!(staged.greeting("agent-2"), "its");
    let plan = plan_of(host, &order).await;
    let env = &plan["parts"][0]["env"];
    assert_eq!(
        json!([env["a.b-c"], env["EMPTY"], env["OTHER"]]),
        json!([{ "plain": "x=y" }, { "plain": "" }, { "plain": "1" }])
    );
    staged.prepared();
    // The same as an object.
    change["environment"] = json!({ "EMPTY": "", "GREETING": "all", "a.b-c": { "plain": "x=y" } });
    staged.release(host, 0, &change).await;
    assert_eq!(staged.prepared(), [""; 0]);
    staged.release(host, 1, &json!({})).await;
    assert_eq!(staged.prepared(), ["agent-1", "agent-2"]);
}

async fn a_version_is_lowered_and_comes_back(host: &TestHost, staged: &Staged) {
    let lower = json!({ "targets": [{ "tech_stack_version": "=1.0.0" }] });
    staged.release(host, 0, &json!({})).await;
    assert_eq!(staged.prepared(), [""; 0]);
    // What is previewed runs.
    let mut order = staged.order(1, &lower);
    order.as_object_mut().expect("an object").remove("run");
    let preview = host.api.post(&host.ws("orders/preview"), &order).await;
    let preview = preview.expect("a preview");
    assert_eq!(preview["plan"]["parts"][0]["stack"]["version"], "1.0.0");
    let mut digest = lower.clone();
    digest["plan_digest"] = preview["plan_digest"].clone();
    let lowered = staged.release(host, 1, &digest).await;
    assert_eq!(staged.prepared(), ["agent-1", "agent-2"], "another version");
    assert_eq!(version_of(host, &lowered).await, "1.0.0");
    staged.has_version(host, &json!("=1.0.0")).await;

    let answer = act(
        host,
        &lowered,
        &json!({ "action": "roll_back", "reason": "try it" }),
    )
    .await
    .expect("a rollback");
    let back = text(&answer["id"]);
    assert_eq!(host.order_ended(&back).await["state"], "succeeded");
    // The release before was installed by a plan that left its preparation out.
    assert_eq!(staged.prepared(), ["agent-1", "agent-2"]);
    assert_eq!(version_of(host, &back).await, "1.1.0");
    staged.has_version(host, &Value::Null).await;

    staged.release(host, 1, &lower).await;
    staged.has_version(host, &json!("=1.0.0")).await;
    let next = staged.release(host, 0, &json!({})).await;
    assert_eq!(version_of(host, &next).await, "1.0.0", "it stays");
    assert_eq!(staged.prepared(), ["agent-1", "agent-2"]);
}

/// A preparation that failed and was ignored does not count.
async fn what_failed_is_done_again(host: &TestHost, staged: &Staged) {
    let change = json!({ "environment": "GREETING=again" });
    fs::write(staged.files.join("fail"), "").expect("a file");
    let order = host.order(&staged.order(0, &change)).await;
    let order = order.expect("an order");
    host.order_in(&order, &["blocked"]).await;
    fs::remove_file(staged.files.join("fail")).expect("the file was there");
    let planned = nodes(host, &order).await;
    let node = &step(&planned, "agent-1", "prepare")["node"];
    act(host, &order, &json!({ "action": "ignore", "node": node }))
        .await
        .expect("it is ignored");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    assert_eq!(staged.prepared(), ["agent-1", "agent-2"]);
    staged.release(host, 1, &change).await;
    assert_eq!(staged.prepared(), ["agent-1"]);
}

async fn refusals(host: &TestHost, staged: &Staged) {
    let target = |field: &str, value: &str| json!({ "targets": [{ field: value }] });
    for (change, code, field, says) in [
        (
            json!({ "environment": "A=1\nb c=2" }),
            "invalid_value",
            "environment",
            "line 2: `b` has no `=`",
        ),
        (
            target("parameters", "A=1 A=2"),
            "invalid_value",
            "/targets/0/parameters",
            "line 1: `A` was given in line 1 already",
        ),
        (
            target("parameters", "=1"),
            "invalid_value",
            "/targets/0/parameters",
            "no key before its `=`",
        ),
        (
            json!({ "environment": ["A=1"] }),
            "invalid_value",
            "environment",
            "a text of `key=value`",
        ),
        (
            target("parameters", "\u{e4}=1"),
            "parameter_key_invalid",
            "/targets/0/parameters/\u{e4}",
            "letters, digits",
        ),
        (
            json!({ "environment": "WINDLASS_SERVER=x" }),
            "parameter_key_reserved",
            "/environment/WINDLASS_SERVER",
            "the platform's own",
        ),
        (
            target("tech_stack_version", "=9.0.0"),
            "plugin_not_available",
            "/targets/0/tech_stack_version",
            "staged",
        ),
        (
            target("tech_stack_version", "newest"),
            "invalid_value",
            "/targets/0/tech_stack_version",
            "",
        ),
        (
            json!({ "install_from_cache": "no" }),
            "invalid_value",
            "install_from_cache",
            "boolean",
        ),
    ] {
        let refused = host.order(&staged.order(0, &change)).await;
        let Err(ClientError::Refused { problem, .. }) = refused else {
            panic!("{change} was not refused: {refused:?}");
        };
        assert_eq!(
            (&problem["code"], &problem["field"]),
            (&json!(code), &json!(field)),
            "{problem}"
        );
        assert!(text(&problem["detail"]).contains(says), "{problem}");
    }
}

/// The version of the tech stack that an order was planned with.
async fn version_of(host: &TestHost, order: &str) -> String {
    text(&plan_of(host, order).await["parts"][0]["stack"]["version"])
}

async fn plan_of(host: &TestHost, order: &str) -> Value {
    let path = host.ws(&format!("orders/{order}/plan"));
    host.api.get(&path).await.expect("the plan")["plan"].clone()
}

/// An application on the guest.
struct Staged {
    instance: String,
    packages: Vec<String>,
    files: PathBuf,
}

impl Staged {
    async fn prepare(host: &TestHost) -> Self {
        let app = json!({ "name": "staged", "tech_stack": { "name": "staged", "version": "^1" } });
        let app = host
            .api
            .post("/v1/apps", &app)
            .await
            .expect("an application");
        let mut packages = Vec::new();
        for version in ["1.0.0", "2.0.0"] {
            packages.push(upload(host, "staged", version, program(version)).await);
        }
        let files = host.path().join("files");
        fs::create_dir(&files).expect("a directory");
        fs::write(files.join("prepared"), "").expect("a file");
        let instance = json!({
            "name": "staged", "app": app["id"], "env": { "FILES": files.to_str() },
            "parameters": { "behave": "prepare" },
        });
        let instance = host
            .api
            .post(&host.ws("service-instances"), &instance)
            .await
            .expect("an instance");
        Self {
            instance: text(&instance["id"]),
            packages,
            files,
        }
    }

    async fn bind(&self, host: &TestHost, name: &str) {
        let servers = host.servers().await;
        let (_, id) = servers.iter().find(|(known, _)| known == name).expect(name);
        let path = format!("service-instances/{}/servers", self.instance);
        host.api
            .post(&host.ws(&path), &json!({ "servers": [id] }))
            .await
            .expect("a server is bound");
    }

    /// An order that releases a package, with what is changed in it.
    fn order(&self, package: usize, change: &Value) -> Value {
        let mut order = json!({
            "title": "staged",
            "parameters": { "grouping": "one-per-group" },
            "limits": { "max_unavailable": "100%" },
            "targets": [{ "instance": self.instance, "package": self.packages[package] }],
            "run": true,
        });
        let fields = |of: &Value| of.as_object().expect("an object").clone();
        for (name, value) in fields(change) {
            if name == "targets" {
                for (name, value) in fields(&value[0]) {
                    order["targets"][0][name] = value;
                }
            } else {
                order[name] = value;
            }
        }
        order
    }

    async fn release(&self, host: &TestHost, package: usize, change: &Value) -> String {
        let order = host.order(&self.order(package, change)).await;
        let order = order.expect("an order");
        let ended = host
            .order_in(&order, &["succeeded", "blocked", "failed"])
            .await;
        assert_eq!(ended["state"], "succeeded", "{ended}");
        order
    }

    /// The servers that were prepared since it was asked last.
    fn prepared(&self) -> Vec<String> {
        let file = self.files.join("prepared");
        let found = fs::read_to_string(&file).expect("the file");
        fs::write(&file, "").expect("the file");
        let mut found: Vec<String> = found.lines().map(str::to_owned).collect();
        found.sort();
        found
    }

    fn greeting(&self, server: &str) -> String {
        let file = self.files.join(format!("greeting-{server}"));
        fs::read_to_string(file).expect("a greeting")
    }

    /// Waits until the instance has this version.
    async fn has_version(&self, host: &TestHost, version: &Value) {
        let path = host.ws(&format!("service-instances/{}", self.instance));
        eventually(&format!("the instance has {version}"), || async {
            let found = host
                .api
                .get(&path)
                .await
                .map_err(|error| error.to_string())?;
            if found["tech_stack_version"] == *version {
                Ok(())
            } else {
                Err(found.to_string())
            }
        })
        .await;
    }
}
