//! An application on a [`TestHost`] whose scripts wait and fail as a test tells them, by files.
//!
//! | file in the scene's directory | what it does |
//! | --- | --- |
//! | `hold`, `hold-{server}` | the `configure` script waits while it is there |
//! | `fail-{server}` | the `configure` script fails |
//! | `sick-{server}` | the health check fails, and with the package 3.0.0 it always does |
//! | `log` | `+ {server}` when a `configure` script begins, `- {server}` when it ends |

use std::{collections::BTreeMap, fs, path::PathBuf};

use serde_json::{Value, json};
use windlass::api::client::ClientError;

use crate::{
    host::{Agent, TestHost, eventually, items, tar_gz, text},
    release::upload,
};

/// The application, its instance and packages.
pub struct Scene {
    /// The application's id.
    pub app: String,
    /// The service instance.
    pub instance: String,
    /// Packages 1.0.0, 2.0.0, and 3.0.0 whose health check fails.
    pub packages: Vec<String>,
    /// The pool in front of it.
    pub pool: String,
    /// Servers: name and id.
    pub servers: Vec<(String, String)>,
    /// Where the files are.
    pub directory: PathBuf,
}

impl Scene {
    /// Makes the application and binds every server of the host.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn prepare(host: &TestHost) -> Self {
        let servers = host.servers().await;
        Self::prepare_on(host, "scene", servers).await
    }

    /// Makes the application with this name and binds these servers.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn prepare_on(host: &TestHost, name: &str, servers: Vec<(String, String)>) -> Self {
        let api = &host.api;
        let app = api
            .post(
                "/v1/apps",
                &json!({ "name": name, "tech_stack": { "name": "binary", "version": "*" } }),
            )
            .await
            .expect("an application");
        let app = text(&app["id"]);
        let pool = text(
            &api.post(&host.ws("pools"), &json!({ "name": name }))
                .await
                .expect("a pool")["id"],
        );
        let mut packages = Vec::new();
        for version in ["1.0.0", "2.0.0", "3.0.0"] {
            packages.push(upload(host, name, version, program(version)).await);
        }
        let directory = host.path().join(format!("{name}-files"));
        fs::create_dir(&directory).expect("the scene's directory");
        fs::write(directory.join("log"), "").expect("the log");
        let mut scene = Self {
            app,
            instance: String::new(),
            packages,
            pool,
            servers,
            directory,
        };
        let instance = json!({
            "name": name,
            "app": scene.app,
            "env": scene.env(),
            "pools": [scene.pool],
            "parameters": parameters(),
        });
        scene.instance = text(
            &api.post(&host.ws("service-instances"), &instance)
                .await
                .expect("an instance")["id"],
        );
        let ids: Vec<&str> = scene.servers.iter().map(|(_, id)| id.as_str()).collect();
        scene.bind(host, &ids, json!({})).await;
        scene
    }

    /// The instance's environment.
    #[must_use]
    pub fn env(&self) -> Value {
        json!({ "SCENE": self.directory.to_str() })
    }

    /// Changes the instance.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn change(&self, host: &TestHost, change: &Value) {
        host.api
            .put(
                &host.ws(&format!("service-instances/{}", self.instance)),
                change,
            )
            .await
            .expect("the instance is changed");
    }

    /// Binds servers, or replaces the variables of bound ones.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn bind(&self, host: &TestHost, servers: &[&str], variables: Value) {
        let body = json!({ "servers": servers, "variables": variables });
        host.api
            .post(
                &host.ws(&format!("service-instances/{}/servers", self.instance)),
                &body,
            )
            .await
            .expect("servers are bound");
    }

    /// Unbinds servers.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn unbind(&self, host: &TestHost, servers: &[&str]) {
        let path = host.ws(&format!("service-instances/{}/servers", self.instance));
        let body = json!({ "servers": servers }).to_string().into();
        let answer = host
            .api
            .request(
                hyper::Method::DELETE,
                &path,
                body,
                &[("content-type", "application/json")],
            )
            .await
            .expect("an answer");
        assert_eq!(answer.status, 204, "{}", answer.text());
    }

    /// An order that releases a package (0 to 2) to one server after the other, not run yet.
    #[must_use]
    pub fn order(&self, title: &str, package: usize) -> Value {
        json!({
            "title": title,
            "strategy": "grouped",
            "parameters": { "grouping": "one-per-group" },
            "targets": [{ "instance": self.instance, "package": self.packages[package] }],
            "drain_deadline_ms": 1000,
        })
    }

    /// Releases a package everywhere, four at a time, and checks that it is there.
    ///
    /// # Panics
    /// When the release does not succeed.
    pub async fn release(&self, host: &TestHost, package: usize) {
        let mut order = self.order(&format!("release {package}"), package);
        order["run"] = true.into();
        let id = host.order(&order).await.expect("an order");
        let order = host.order_ended(&id).await;
        assert_eq!(order["state"], "succeeded", "{order}");
        self.check_serves(host, package).await;
    }

    /// Checks that this package runs on every server with its full weight.
    ///
    /// # Panics
    /// When it does not.
    pub async fn check_serves(&self, host: &TestHost, package: usize) {
        let expected = format!("{}.0.0", package + 1);
        for agent in &host.agents {
            if self.servers.iter().any(|(name, _)| *name == agent.name) {
                assert_eq!(
                    self.installed_on(agent).as_deref(),
                    Some(expected.as_str()),
                    "on {}",
                    agent.name
                );
            }
        }
        for (name, id) in &self.servers {
            assert_eq!(self.weight(host, id).await, 100, "the weight of {name}");
        }
    }

    /// The version that an agent has installed.
    #[must_use]
    pub fn installed_on(&self, agent: &Agent) -> Option<String> {
        fs::read_to_string(
            agent
                .data
                .join("instances")
                .join(&self.instance)
                .join("current/VERSION"),
        )
        .ok()
    }

    /// A server's weight in the pool.
    ///
    /// # Panics
    /// When it cannot be read.
    pub async fn weight(&self, host: &TestHost, server: &str) -> u64 {
        let weights = host
            .api
            .get(&host.ws(&format!("pools/{}/weights", self.pool)))
            .await
            .expect("weights");
        let found = items(&weights)
            .into_iter()
            .find(|weight| weight["server"] == server);
        found.map_or(100, |weight| weight["weight"].as_u64().expect("a weight"))
    }

    /// Tells the pool what to do wrong.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn fault(&self, host: &TestHost, fault: &Value) {
        host.api
            .put(&host.ws(&format!("pools/{}/fault", self.pool)), fault)
            .await
            .expect("the pool is told");
    }

    /// Puts one of the files that tell scripts what to do.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn put(&self, file: &str) {
        fs::write(self.directory.join(file), "").expect("a file");
    }

    /// Takes it away again.
    ///
    /// # Panics
    /// When it is not there.
    pub fn take(&self, file: &str) {
        fs::remove_file(self.directory.join(file)).expect("the file was there");
    }

    /// Forgets which scripts ran.
    ///
    /// # Panics
    /// When the log cannot be written.
    pub fn forget(&self) {
        fs::write(self.directory.join("log"), "").expect("the log");
    }

    /// Which scripts began and ended, in this order: `+ server`, `- server`.
    ///
    /// # Panics
    /// When the log cannot be read.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        let log = fs::read_to_string(self.directory.join("log")).expect("the log");
        log.lines().map(str::to_owned).collect()
    }

    /// How often the script began on each server.
    #[must_use]
    pub fn begun(&self) -> BTreeMap<String, u32> {
        let mut counts = BTreeMap::new();
        for line in self.log() {
            if let Some(server) = line.strip_prefix("+ ") {
                *counts.entry(server.to_owned()).or_default() += 1;
            }
        }
        counts
    }

    /// The most scripts that ran at once.
    #[must_use]
    pub fn most_at_once(&self) -> usize {
        let (mut now, mut most) = (0_usize, 0);
        for line in self.log() {
            if line.starts_with('+') {
                now += 1;
                most = most.max(now);
            } else {
                now = now.saturating_sub(1);
            }
        }
        most
    }

    /// Waits until the script has begun on so many servers, each begun script counted once.
    pub async fn wait_begun(&self, count: usize) {
        eventually(&format!("{count} scripts have begun"), || async {
            let begun = self
                .log()
                .iter()
                .filter(|line| line.starts_with('+'))
                .count();
            if begun >= count {
                Ok(())
            } else {
                Err(format!("{begun} of {count}"))
            }
        })
        .await;
    }
}

/// A package: a program that runs until it is ended, and its version.
#[must_use]
pub fn program(version: &str) -> bytes::Bytes {
    tar_gz(&[
        ("run.sh", 0o755, b"#!/bin/sh\nexec sleep 1000000\n"),
        ("VERSION", 0o644, version.as_bytes()),
    ])
}

/// The parameters of the instance.
#[must_use]
pub fn parameters() -> Value {
    json!({
        "program": "run.sh",
        "configure_script": "echo \"+ $WINDLASS_SERVER\" >> \"$SCENE/log\"\n\
            while [ -e \"$SCENE/hold\" ] || [ -e \"$SCENE/hold-$WINDLASS_SERVER\" ]; do sleep 0.02; done\n\
            status=0; if [ -e \"$SCENE/fail-$WINDLASS_SERVER\" ]; then echo told to fail; status=7; fi\n\
            echo \"- $WINDLASS_SERVER\" >> \"$SCENE/log\"\n\
            exit $status\n",
        "health": {
            "kind": "script",
            "script": "[ ! -e \"$SCENE/sick-$WINDLASS_SERVER\" ] && [ \"$WINDLASS_PACKAGE_VERSION\" != 3.0.0 ]",
            "interval_ms": 100,
            "deadline_s": 5,
        },
        "stop_grace_s": 1,
    })
}

/// Acts on an order.
///
/// # Errors
/// The server's refusal.
pub async fn act(host: &TestHost, order: &str, action: &Value) -> Result<Value, ClientError> {
    host.api
        .post(&host.ws(&format!("orders/{order}/actions")), action)
        .await
}

/// Every node of an order.
///
/// # Panics
/// When they cannot be read.
pub async fn nodes(host: &TestHost, order: &str) -> Vec<Value> {
    items(
        &host
            .api
            .get(&host.ws(&format!("orders/{order}/nodes")))
            .await
            .expect("nodes"),
    )
}

/// The node of a server.
///
/// # Panics
/// When the order has none.
#[must_use]
pub fn unit<'a>(nodes: &'a [Value], server: &str) -> &'a Value {
    let found = nodes
        .iter()
        .find(|node| node["level"] == "server" && node["server_name"] == server);
    found.unwrap_or_else(|| panic!("a node of {server}: {nodes:?}"))
}

/// A step of a server.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn step<'a>(nodes: &'a [Value], server: &str, name: &str) -> &'a Value {
    let found = nodes.iter().find(|node| {
        node["level"] == "step" && node["server_name"] == server && node["name"] == name
    });
    found.unwrap_or_else(|| panic!("the step {name} of {server}: {nodes:?}"))
}

/// The group around a server.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn group_of<'a>(nodes: &'a [Value], server: &str) -> &'a Value {
    let mut at = unit(nodes, server);
    while at["level"] != "group" {
        let parent = at["parent"]
            .as_u64()
            .unwrap_or_else(|| panic!("a group around {server}: {nodes:?}"));
        at = nodes
            .iter()
            .find(|node| node["node"] == parent)
            .expect("the parent");
    }
    at
}

/// Waits until nodes of an order are as wanted; answers them.
pub async fn nodes_when(
    host: &TestHost,
    order: &str,
    what: &str,
    wanted: impl Fn(&[Value]) -> bool,
) -> Vec<Value> {
    eventually(what, || async {
        let nodes = nodes(host, order).await;
        if wanted(&nodes) {
            return Ok(nodes);
        }
        let seen: Vec<String> = nodes
            .iter()
            .map(|node| {
                format!(
                    "{} {} {}: {} {}",
                    node["node"], node["server_name"], node["name"], node["state"], node["message"]
                )
            })
            .collect();
        Err(seen.join("\n"))
    })
    .await
}

/// Everything that an order's event stream says from its first event to its end.
///
/// # Panics
/// When the stream breaks, or the order has not ended.
pub async fn events(host: &TestHost, order: &str) -> Vec<Value> {
    let mut stream = host
        .api
        .events(&host.ws(&format!("orders/{order}/events")), None)
        .await
        .expect("the event stream");
    let mut events = Vec::new();
    while let Some(event) = stream.next().await.expect("an event") {
        if event.event == "end" {
            return events;
        }
        events.push(serde_json::from_str(&event.data).expect("an event's data"));
    }
    panic!("the stream ended before its end: {events:?}");
}

/// The most servers that an order worked on at once, by its events: each from its first leaf until its turn is over. A
/// server that failed counts on; one that is held has not begun.
#[must_use]
pub fn most_busy(nodes: &[Value], events: &[Value]) -> usize {
    let unit_of = |event: &Value| {
        let node = nodes.iter().find(|node| node["node"] == event["node"])?;
        if node["level"] == "server" {
            return Some((node["node"].as_u64()?, true));
        }
        let parent = nodes.iter().find(|unit| unit["node"] == node["parent"])?;
        (parent["level"] == "server").then_some((parent["node"].as_u64()?, false))
    };
    let mut busy = std::collections::BTreeSet::new();
    let mut most = 0;
    for event in events.iter().filter(|event| event["type"] == "node") {
        match (unit_of(event), event["state"].as_str()) {
            (Some((unit, false)), Some("running")) => {
                busy.insert(unit);
            }
            (Some((unit, true)), Some("succeeded" | "cancelled" | "ignored")) => {
                busy.remove(&unit);
            }
            (Some(_) | None, _) => {}
        }
        most = most.max(busy.len());
    }
    most
}

/// The text of a refusal: status, code and what it says.
///
/// # Panics
/// When it is none.
pub fn refusal<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> (u16, String, String) {
    match answer {
        Err(ClientError::Refused {
            status, problem, ..
        }) => (
            status,
            problem["code"].as_str().unwrap_or_default().to_owned(),
            problem["detail"].as_str().unwrap_or_default().to_owned(),
        ),
        other => panic!("a refusal was expected: {other:?}"),
    }
}
