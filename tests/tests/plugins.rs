//! The plugin platform over its API: uploads, the call journal, replays, previews, failing versions, shadows, trust.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use bytes::Bytes;
use ed25519_dalek::{Signer as _, SigningKey};
use hyper::Method;
use serde_json::{Value, json};
use windlass::api::client::Answer;
use windlass_tests::{
    guests::{PluginDirectory, guest, guest_that, wait_active},
    host::{Setup, TestHost, eventually, items, program, text},
    release::upload,
    scene,
};

/// A stack that is asked by previews of orders.
struct Asked {
    instance: String,
    package: String,
    app: String,
}

/// What must never be written anywhere but into the vault.
const PLANTED: &str = "planted-secret-3b1f";

impl Asked {
    async fn prepare(host: &TestHost, stack: &str) -> Self {
        let app = host
            .api
            .post(
                "/v1/apps",
                &json!({ "name": stack, "tech_stack": { "name": stack, "version": "*" } }),
            )
            .await
            .expect("an application");
        host.api
            .put(
                &host.ws("secrets/db-password"),
                &json!({ "value": PLANTED }),
            )
            .await
            .expect("a secret");
        let package = upload(host, stack, "1.0.0", scene::program("1.0.0")).await;
        let instance = host
            .api
            .post(
                &host.ws("service-instances"),
                &json!({ "name": stack, "app": app["id"], "parameters": {},
                    "env": { "DB_PASSWORD": { "secret_ref": "db-password" } } }),
            )
            .await
            .expect("an instance");
        let asked = Self {
            instance: text(&instance["id"]),
            package,
            app: text(&app["id"]),
        };
        let servers = host.servers().await;
        let ids: Vec<&str> = servers.iter().map(|(_, id)| id.as_str()).collect();
        host.api
            .post(
                &host.ws(&format!("service-instances/{}/servers", asked.instance)),
                &json!({ "servers": ids }),
            )
            .await
            .expect("servers are bound");
        asked
    }

    fn order(&self) -> Value {
        json!({ "title": "asked", "strategy": "grouped", "parameters": { "grouping": "one-per-group" },
            "targets": [{ "instance": self.instance, "package": self.package }] })
    }

    /// Lets the default version answer once.
    async fn ask(&self, host: &TestHost) -> bool {
        host.api
            .post(&host.ws("orders/preview"), &self.order())
            .await
            .is_ok()
    }

    async fn behave(&self, host: &TestHost, how: &str) {
        host.api
            .put(
                &host.ws(&format!("service-instances/{}", self.instance)),
                &json!({ "parameters": { "behave": how } }),
            )
            .await
            .expect("the instance is changed");
    }
}

async fn send(host: &TestHost, method: Method, path: &str, body: Vec<u8>) -> Answer {
    host.api
        .request(
            method,
            path,
            Bytes::from(body),
            &[("content-type", "application/wasm")],
        )
        .await
        .expect("an answer")
}

fn json_of(answer: &Answer) -> Value {
    serde_json::from_str(&answer.text()).unwrap_or(Value::Null)
}

fn files(directory: &Path) -> BTreeSet<String> {
    fs::read_dir(directory)
        .expect("the plugin directory")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect()
}

async fn calls(host: &TestHost, query: &str) -> Vec<Value> {
    items(
        &host
            .api
            .get(&format!("/v1/plugin-calls?{query}"))
            .await
            .expect("recorded calls"),
    )
}

/// `windlass plugin replay`: its exit code and what it said.
fn replay(component: &Path, journal: &Path) -> (Option<i32>, String) {
    let output = Command::new(program("windlass"))
        .args(["plugin", "replay", "--journal"])
        .args([journal, component])
        .output()
        .expect("the program runs");
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

async fn shadow_when(host: &TestHost, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    eventually(what, || async {
        let page = host
            .api
            .get("/v1/plugins/asked/shadow")
            .await
            .map_err(|error| error.to_string())?;
        let shadow = page["items"][0].clone();
        if wanted(&shadow) {
            Ok(shadow)
        } else {
            Err(page.to_string())
        }
    })
    .await
}

async fn events(host: &TestHost) -> Vec<String> {
    let page = host
        .api
        .get("/v1/plugin-events")
        .await
        .expect("events of plugins");
    items(&page)
        .iter()
        .map(|event| {
            format!(
                "{} {}",
                text(&event["kind"]),
                text(&event["plugin"]["version"])
            )
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_is_uploaded_recorded_previewed_compared_and_deleted() {
    let directory = PluginDirectory::shipped();
    let mut host = TestHost::start(Setup {
        agents: 1,
        plugins: Some(directory.path()),
        ..Setup::default()
    })
    .await;

    // --- uploads: what is refused leaves nothing behind, what is taken is live, a repetition does nothing
    let before = files(&directory.path());
    for (body, code, status) in [
        (b"hello".to_vec(), "plugin_rejected", 422),
        (Vec::new(), "body_missing", 400),
        (vec![0; 33 << 20], "plugin_too_large", 413),
        (
            guest_that("tech-stack", "asked", "1.0.0", "schema-regex"),
            "plugin_rejected",
            422,
        ),
    ] {
        let answer = send(&host, Method::POST, "/v1/plugins", body).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        assert_eq!(json_of(&answer)["code"], code);
    }
    assert_eq!(files(&directory.path()), before);
    let first = guest("tech-stack", "asked", "1.0.0");
    for _ in 0..2 {
        let answer = send(&host, Method::POST, "/v1/plugins", first.clone()).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
        let status = json_of(&answer);
        assert_eq!(status["file"], "asked-1.0.0.wasm");
        assert_eq!(status["state"], "active");
    }
    assert_eq!(files(&directory.path()).len(), before.len() + 1);
    let twin = guest_that("tech-stack", "asked", "1.0.0", "other");
    let answer = send(&host, Method::POST, "/v1/plugins", twin).await;
    assert!(
        answer.text().contains("duplicate_version"),
        "{}",
        answer.text()
    );
    let file = send(
        &host,
        Method::GET,
        "/v1/plugins/asked/1.0.0/file",
        Vec::new(),
    )
    .await;
    assert_eq!(file.status, 200);
    assert_eq!(file.body.as_ref(), first.as_slice());

    // --- the journal: who, what, and never a secret
    let asked = Asked::prepare(&host, "asked").await;
    for _ in 0..3 {
        assert!(asked.ask(&host).await);
    }
    let found = calls(&host, "plugin=asked&export=lifecycle&outcome=ok").await;
    assert_eq!(found.len(), 3, "{found:?}");
    assert_eq!(
        calls(&host, "plugin=asked&version=1.0.0&page_size=2")
            .await
            .len(),
        2
    );
    assert!(calls(&host, "plugin=asked&outcome=failed").await.is_empty());
    assert!(calls(&host, "plugin=grouped&export=plan").await.len() >= 3);
    let id = text(&found[0]["id"]);
    let call = host
        .api
        .get(&format!("/v1/plugin-calls/{id}"))
        .await
        .expect("the call");
    assert_eq!(
        call["input"]["env"]["DB_PASSWORD"]["secret_ref"],
        "db-password"
    );
    assert_eq!(call["output"]["steps"][0]["name"], "start");
    assert_eq!(call["caller"], "admin");
    assert!(call["guest_time_us"].as_u64() > Some(0) && call["memory_bytes"].as_u64() > Some(0));
    let replayed = host
        .api
        .post(&format!("/v1/plugin-calls/{id}/replay"), &json!({}))
        .await
        .expect("a replay");
    assert_eq!(replayed["verdict"], "equal", "{replayed}");
    let exported = send(
        &host,
        Method::GET,
        "/v1/plugin-calls/export?last=1000",
        Vec::new(),
    )
    .await;
    assert_eq!(exported.status, 200);
    assert!(exported.text().lines().count() >= 6);
    assert!(
        !exported.text().contains(PLANTED),
        "a secret is in the journal"
    );
    assert!(exported.text().contains("db-password"));

    // --- an author makes the exported calls again, with the same bytes and with others
    let desk = tempfile::tempdir().expect("a directory");
    let journal = desk.path().join("calls.ndjson");
    fs::write(&journal, &exported.body).expect("the journal");
    for (file, bytes, code, says) in [
        ("same.wasm", first.clone(), 0, ", 0 different, 0 failed"),
        (
            "other.wasm",
            guest_that("tech-stack", "asked", "1.1.0", "other"),
            1,
            "/steps/0/action/script/text: \"true\" → \"true # otherwise\"",
        ),
        (
            "nobody.wasm",
            guest("tech-stack", "nobody", "1.0.0"),
            1,
            "none of `nobody`",
        ),
    ] {
        let component = desk.path().join(file);
        fs::write(&component, bytes).expect("the component");
        let (status, said) = replay(&component, &journal);
        assert_eq!(status, Some(code), "{file}: {said}");
        assert!(said.contains(says), "{file}: {said}");
        if code == 0 {
            let equal = calls(&host, "plugin=asked&page_size=100").await.len();
            let told = format!("{equal} calls: {equal} equal");
            assert!(said.contains(&told), "{file}: {said}, not {told}");
        }
    }

    // --- an order's calls carry its id
    let order = host.order(&asked.order()).await.expect("an order");
    assert_eq!(calls(&host, &format!("order={order}")).await.len(), 2);

    // --- previews of candidates: equal, different, and not live
    for (mode, equal, different) in [("ok", 4, 0), ("other", 0, 4)] {
        let candidate = guest_that("tech-stack", "asked", "1.1.0", mode);
        let answer = send(
            &host,
            Method::POST,
            "/v1/plugins/asked/preview?last=4&export=lifecycle",
            candidate,
        )
        .await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let preview = json_of(&answer);
        assert_eq!(preview["totals"]["equal"], equal, "{preview}");
        assert_eq!(preview["totals"]["different"], different, "{preview}");
        if different > 0 {
            let place = &preview["differences"][0]["differences"]["first"][0];
            assert_eq!(place["pointer"], "/steps/0/action/script/text", "{preview}");
            assert_eq!(place["after"], "true # otherwise");
        }
    }
    let answer = send(
        &host,
        Method::POST,
        "/v1/plugins/binary/preview",
        guest("tech-stack", "asked", "1.1.0"),
    )
    .await;
    assert_eq!(json_of(&answer)["code"], "plugin_name_differs");
    assert_eq!(files(&directory.path()).len(), before.len() + 1);

    // --- a version that fails again and again is marked, is called all the same, and is cleared by a person
    asked.behave(&host, "trap").await;
    for _ in 0..5 {
        assert!(!asked.ask(&host).await);
    }
    let marked = eventually("the version is marked", || async {
        let status = host
            .api
            .get("/v1/plugins/asked")
            .await
            .map_err(|error| error.to_string())?;
        if status["failing"].is_object() {
            Ok(status)
        } else {
            Err(status.to_string())
        }
    })
    .await;
    assert_eq!(marked["failing"]["export"], "lifecycle");
    assert_eq!(marked["failing"]["failure"]["code"], "plugin_trap");
    assert_eq!(marked["state"], "active");
    assert_eq!(marked["is_default"], true);
    assert_eq!(marked["figures"]["failures"]["plugin_trap"], 5);
    assert_eq!(marked["figures"]["last_error"]["export"], "lifecycle");
    let metrics = send(&host, Method::GET, "/metrics", Vec::new())
        .await
        .text();
    assert!(
        metrics.contains("windlass_plugin_failures_total{plugin=\"asked\",version=\"1.0.0\""),
        "{metrics}"
    );
    assert!(metrics.contains("windlass_plugins_failing 1"), "{metrics}");
    let cleared = host
        .api
        .post(
            "/v1/plugins/asked/1.0.0/actions",
            &json!({ "action": "clear_failing" }),
        )
        .await
        .expect("it is cleared");
    assert_eq!(cleared["failing"], Value::Null);
    asked.behave(&host, "nothing").await;
    assert_eq!(
        events(&host).await,
        ["failing_cleared 1.0.0", "failing 1.0.0"]
    );

    // --- a shadow that answers the same is promoted, also across a restart
    let pin = json!({ "action": "pin" });
    host.api
        .post("/v1/plugins/asked/1.0.0/actions", &pin)
        .await
        .expect("it is pinned");
    for (version, mode) in [("1.1.0", "ok"), ("1.2.0", "other")] {
        let bytes = guest_that("tech-stack", "asked", version, mode);
        let answer = send(&host, Method::POST, "/v1/plugins", bytes).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
    }
    let refused = host
        .api
        .post("/v1/plugins/asked/shadow", &json!({ "version": "1.0.0" }))
        .await;
    assert_eq!(scene::refusal(refused).1, "is_default");
    host.api
        .post(
            "/v1/plugins/asked/shadow",
            &json!({ "version": "1.1.0", "promote_after": 4 }),
        )
        .await
        .expect("a shadow");
    let refused = host
        .api
        .post("/v1/plugins/asked/shadow", &json!({ "version": "1.2.0" }))
        .await;
    assert_eq!(scene::refusal(refused).1, "shadow_running");
    assert!(asked.ask(&host).await && asked.ask(&host).await);
    shadow_when(&host, "two answers were compared", |shadow| {
        shadow["totals"]["equal"] == 2
    })
    .await;
    host.restart().await;
    wait_active(&host, "asked@1.0.0").await;
    assert!(asked.ask(&host).await && asked.ask(&host).await);
    let promoted = shadow_when(&host, "it is promoted", |shadow| {
        shadow["state"] == "promoted"
    })
    .await;
    assert_eq!(promoted["totals"]["equal"], 4, "{promoted}");
    // A promotion is durable first; the registry acts on it right after.
    eventually("1.1.0 is the default", || async {
        let default = host
            .api
            .get("/v1/plugins/asked")
            .await
            .map_err(|error| error.to_string())?;
        match default["descriptor"]["version"].as_str() {
            Some("1.1.0") => Ok(()),
            Some(_) | None => Err(default.to_string()),
        }
    })
    .await;
    let default = host.api.get("/v1/plugins/asked").await.expect("the plugin");
    assert_eq!(
        default["pin"], "pinned to 1.1.0 by promotion of asked@1.1.0 (4 equal answers in a row)",
        "{default}"
    );

    // --- one that answers otherwise is not, and the evidence says where
    host.api
        .post(
            "/v1/plugins/asked/shadow",
            &json!({ "version": "1.2.0", "promote_after": 1 }),
        )
        .await
        .expect("a shadow");
    assert!(asked.ask(&host).await);
    let differed = shadow_when(&host, "it differed", |shadow| shadow["state"] == "differed").await;
    let places = &differed["differences"][0]["replayed"]["differences"];
    assert_eq!(places["first"][0]["pointer"], "/steps/0/action/script/text");
    let answer = send(
        &host,
        Method::DELETE,
        "/v1/plugins/asked/shadow",
        Vec::new(),
    )
    .await;
    assert_eq!(json_of(&answer)["state"], "cancelled", "{}", answer.text());
    let default = host
        .api
        .get("/v1/plugins/asked")
        .await
        .expect("the default");
    assert_eq!(default["descriptor"]["version"], "1.1.0");

    // --- recorded calls outlive the restart; who uses what; what nobody uses can be deleted
    assert!(calls(&host, "plugin=asked").await.len() >= 12);
    let replayed = host
        .api
        .post(
            &format!("/v1/plugin-calls/{id}/replay"),
            &json!({ "version": "1.2.0" }),
        )
        .await
        .expect("a replay");
    assert_eq!(replayed["verdict"], "different", "{replayed}");
    let users = host
        .api
        .get("/v1/plugins/asked/users")
        .await
        .expect("its users");
    let used = |version: &str| {
        users["versions"]
            .as_array()
            .expect("versions")
            .iter()
            .find(|one| one["plugin"]["version"] == version)
            .unwrap_or_else(|| panic!("{version}: {users}"))["used_by"]
            .clone()
    };
    assert_eq!(used("1.0.0")["orders"], json!([order]));
    assert_eq!(used("1.1.0")["apps"], json!(["asked"]));
    let answer = send(&host, Method::DELETE, "/v1/plugins/asked/1.0.0", Vec::new()).await;
    assert_eq!(json_of(&answer)["code"], "in_use", "{}", answer.text());
    let answer = send(&host, Method::DELETE, "/v1/plugins/asked/1.2.0", Vec::new()).await;
    assert_eq!(answer.status, 204, "{}", answer.text());
    assert!(!files(&directory.path()).contains("asked-1.2.0.wasm"));
    let answer = send(&host, Method::GET, "/v1/plugins/asked/1.2.0", Vec::new()).await;
    assert_eq!(answer.status, 404);
    assert!(!asked.app.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_signed_and_listed_files_are_plugins_where_the_server_says_so() {
    let directory = PluginDirectory::shipped();
    for file in files(&directory.path()) {
        fs::remove_file(directory.path().join(file)).expect("the directory is emptied");
    }
    let settings = tempfile::tempdir().expect("a directory");
    let key = SigningKey::from_bytes(&[7; 32]);
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    fs::write(
        settings.path().join("release.pub"),
        hex(key.verifying_key().as_bytes()),
    )
    .expect("a key");
    let signed = guest("tech-stack", "signed", "1.0.0");
    let unsigned = guest("tech-stack", "unsigned", "1.0.0");
    let late = guest("tech-stack", "late", "1.0.0");
    directory.drop_in("signed.wasm.sig", &key.sign(&signed).to_bytes());
    directory.drop_in("signed.wasm", &signed);
    directory.drop_in("unsigned.wasm", &unsigned);
    directory.drop_in("late.wasm", &late);
    let host = TestHost::start(Setup {
        agents: 0,
        plugins: Some(directory.path()),
        server_args: vec![
            "--plugin-keys".to_owned(),
            settings.path().display().to_string(),
            "--require-signed-plugins".to_owned(),
        ],
        ..Setup::default()
    })
    .await;
    let status = host
        .api
        .get("/v1/plugins/signed")
        .await
        .expect("it is there");
    assert_eq!(status["signed_by"], "release");
    let status = host
        .api
        .get("/v1/plugins/unsigned.wasm")
        .await
        .expect("it is listed");
    assert_eq!(status["rejection"]["code"], "unsigned");
    let answer = send(&host, Method::POST, "/v1/plugins", unsigned.clone()).await;
    assert!(answer.text().contains("unsigned"), "{}", answer.text());
    // A signature that comes later makes the file a plugin; a wrong one names what is wrong.
    directory.drop_in("unsigned.wasm.sig", &key.sign(&signed).to_bytes());
    directory.drop_in("late.wasm.sig", &key.sign(&late).to_bytes());
    wait_active(&host, "late@1.0.0").await;
    eventually("the wrong signature is seen", || async {
        let status = host
            .api
            .get("/v1/plugins/unsigned.wasm")
            .await
            .map_err(|error| error.to_string())?;
        if status["rejection"]["code"] == "signature_invalid" {
            Ok(())
        } else {
            Err(status.to_string())
        }
    })
    .await;
}
