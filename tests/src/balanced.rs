//! The sample application on every server of a [`TestHost`], behind a real load balancer on the first one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    process::Command,
    sync::{Mutex, PoisonError},
};

use serde_json::{Value, json};
use windlass::api::client::ClientError;

use crate::{
    host::{TestHost, eventually, free_port, items, program, tar_gz, text},
    release::upload,
};

/// The application, its instance, and the load balancer in front of it.
pub struct Balanced {
    /// The service instance.
    pub instance: String,
    /// The load balancer.
    pub balancer: String,
    /// Its listener for the application.
    pub listener: String,
    /// The listener's pool.
    pub pool: String,
    /// Where clients connect.
    pub front: SocketAddr,
    /// Servers: name and id.
    pub servers: Vec<(String, String)>,
    /// The port of the application on each server, by its id.
    pub ports: BTreeMap<String, u16>,
    /// Packages that were uploaded, by version.
    pub packages: BTreeMap<String, String>,
}

/// A port of 13000 to 14000 that was free a moment ago, and that this process was not given before.
///
/// # Panics
/// When all are taken.
#[must_use]
pub fn free_front_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    // Tests run side by side: each begins somewhere else.
    let begin = free_port() % 1000;
    let found = (0..1000)
        .map(|step| 13_000 + (begin + step) % 1000)
        .filter(|port| !given.contains(port))
        .find(|port| std::net::TcpListener::bind(("0.0.0.0", *port)).is_ok());
    let found = found.expect("a free front port");
    given.insert(found);
    found
}

/// How the listener works: HTTP, with quick checks of `/healthz`.
#[must_use]
pub fn http_settings(front_port: u16) -> Value {
    json!({
        "protocol": "http",
        "front_port": front_port,
        "back_port": 8080,
        "health": { "probe": { "http": { "path": "/healthz" } }, "interval_ms": 500, "rise": 2, "fall": 2 },
    })
}

/// A package of the sample application: its program, its version, and files that make something go wrong.
///
/// # Panics
/// When the program is not built.
#[must_use]
pub fn package(version: &str, files: &[(&str, &str)]) -> bytes::Bytes {
    let sample = fs::read(program("windlass-sample")).expect("the sample application");
    let mut all: Vec<(&str, u32, &[u8])> = vec![
        ("sample", 0o755, &sample),
        ("VERSION", 0o644, version.as_bytes()),
    ];
    all.extend(
        files
            .iter()
            .map(|(name, content)| (*name, 0o644, content.as_bytes())),
    );
    tar_gz(&all)
}

impl Balanced {
    /// Makes everything and releases version 1.0.0; ready when every server answers through the load balancer.
    ///
    /// # Panics
    /// When something is refused or does not come up.
    pub async fn prepare(host: &TestHost) -> Self {
        let api = &host.api;
        let app = json!({ "name": "shop", "tech_stack": { "name": "binary", "version": "*" } });
        let app = api.post("/v1/apps", &app).await.expect("an application");
        let servers = host.servers().await;
        let front_port = free_front_port();
        let balancer = json!({ "name": "front", "server": servers[0].1 });
        let balancer = api.post(&host.ws("load-balancers"), &balancer).await;
        let balancer = text(&balancer.expect("a load balancer")["id"]);
        let listener = json!({ "name": "shop", "settings": http_settings(front_port) });
        let listener = api
            .post(
                &host.ws(&format!("load-balancers/{balancer}/listeners")),
                &listener,
            )
            .await
            .expect("a listener");
        let mut balanced = Self {
            instance: String::new(),
            balancer,
            pool: text(&listener["pool"]),
            listener: text(&listener["id"]),
            front: SocketAddr::from(([127, 0, 0, 1], front_port)),
            ports: servers
                .iter()
                .map(|(_, id)| (id.clone(), free_port()))
                .collect(),
            servers,
            packages: BTreeMap::new(),
        };
        balanced.attach(host, &balanced.pool).await;
        let instance = json!({
            "name": "shop",
            "app": app["id"],
            "pools": [balanced.pool],
            "parameters": {
                "program": "sample",
                "port": 8080,
                "health": { "kind": "http", "path": "/healthz", "interval_ms": 100, "deadline_s": 30 },
                "stop_grace_s": 1,
            },
        });
        let instance = api.post(&host.ws("service-instances"), &instance).await;
        balanced.instance = text(&instance.expect("an instance")["id"]);
        let variables: serde_json::Map<String, Value> = balanced
            .ports
            .iter()
            .map(|(id, port)| (id.clone(), json!({ "PORT": port.to_string() })))
            .collect();
        let ids: Vec<&String> = balanced.ports.keys().collect();
        api.post(
            &host.ws(&format!("service-instances/{}/servers", balanced.instance)),
            &json!({ "servers": ids, "variables": variables }),
        )
        .await
        .expect("servers are bound");
        balanced.upload(host, "1.0.0", &[]).await;
        balanced.wait_current(host).await;
        balanced.release(host, "1.0.0", "all-in-one").await;
        balanced
    }

    /// Puts every server behind a pool, at its port on this machine.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn attach(&self, host: &TestHost, pool: &str) {
        let back_ends: Vec<Value> = self
            .ports
            .iter()
            .map(|(id, port)| json!({ "server": id, "address": "127.0.0.1", "port": port }))
            .collect();
        host.api
            .post(
                &host.ws(&format!("pools/{pool}/back-ends")),
                &json!({ "servers": back_ends }),
            )
            .await
            .expect("back ends");
    }

    /// Uploads a version of the application.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn upload(&mut self, host: &TestHost, version: &str, files: &[(&str, &str)]) {
        let id = upload(host, "shop", version, package(version, files)).await;
        self.packages.insert(version.to_owned(), id);
    }

    /// An order that releases a version, run at once.
    #[must_use]
    pub fn order(&self, version: &str, grouping: &str) -> Value {
        let unavailable = if grouping == "all-in-one" {
            "100%"
        } else {
            "50%"
        };
        let healthy = u32::from(grouping != "all-in-one");
        json!({
            "title": format!("shop {version}"),
            "strategy": "grouped",
            "parameters": { "grouping": grouping },
            "limits": { "max_unavailable": unavailable, "min_healthy_members": healthy },
            "targets": [{ "instance": self.instance, "package": self.packages[version] }],
            "drain_deadline_ms": 20_000,
            "run": true,
        })
    }

    /// Releases a version to its end.
    ///
    /// # Panics
    /// When it does not succeed.
    pub async fn release(&self, host: &TestHost, version: &str, grouping: &str) {
        let id = host
            .order(&self.order(version, grouping))
            .await
            .expect("an order");
        let order = host.order_ended(&id).await;
        if order["state"] != "succeeded" {
            let nodes = host.api.get(&host.ws(&format!("orders/{id}/nodes"))).await;
            panic!("{order}\n{nodes:?}");
        }
    }

    /// A path below the load balancer.
    #[must_use]
    pub fn path(&self, host: &TestHost, rest: &str) -> String {
        host.ws(&format!("load-balancers/{}{rest}", self.balancer))
    }

    /// The load balancer's state.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub async fn state(&self, host: &TestHost) -> Result<Value, ClientError> {
        host.api.get(&self.path(host, "/state")).await
    }

    /// Waits until HAProxy runs what is wanted.
    pub async fn wait_current(&self, host: &TestHost) {
        eventually("the load balancer runs what is wanted", || async {
            let state = self.state(host).await.map_err(|error| error.to_string())?;
            if state["current"] == true {
                Ok(())
            } else {
                Err(state.to_string())
            }
        })
        .await;
    }

    /// The servers behind a pool.
    ///
    /// # Panics
    /// When they cannot be listed.
    pub async fn back_ends(&self, host: &TestHost, pool: &str) -> Vec<Value> {
        let page = host
            .api
            .get(&host.ws(&format!("pools/{pool}/back-ends")))
            .await;
        items(&page.expect("back ends"))
    }

    /// Sets weights of the listener's pool; answers what HAProxy shows.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn set_weights(&self, host: &TestHost, weights: &[(&str, u32)]) -> Vec<Value> {
        let weights: Vec<Value> = weights
            .iter()
            .map(|(server, weight)| json!({ "server": server, "weight": weight }))
            .collect();
        let path = host.ws(&format!("pools/{}/back-ends", self.pool));
        let page = host.api.put(&path, &json!({ "weights": weights })).await;
        items(&page.expect("weights"))
    }

    /// Retries and redispatches that HAProxy counted, of all servers.
    ///
    /// # Panics
    /// When it shows none.
    pub async fn second_tries(&self, host: &TestHost) -> u64 {
        let state = self.state(host).await.expect("the state");
        let members = state["members"].as_array().expect("members");
        assert!(!members.is_empty(), "{state}");
        members
            .iter()
            .map(|member| {
                member["stats"]["retries"].as_u64().expect("a counter")
                    + member["stats"]["redispatches"].as_u64().expect("a counter")
            })
            .sum()
    }

    /// Kills HAProxy, master and workers.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill_haproxy(&self, host: &TestHost) {
        let directory = host.agents[0].data.join("balancers").join(&self.balancer);
        let directory = directory.canonicalize().expect("its directory");
        let processes: Vec<String> = fs::read_dir("/proc")
            .expect("/proc")
            .flatten()
            .filter(|process| {
                let program = fs::read_to_string(process.path().join("comm"));
                let works_in = fs::read_link(process.path().join("cwd"));
                program.is_ok_and(|program| program.trim() == "haproxy")
                    && works_in.is_ok_and(|works_in| works_in == directory)
            })
            .filter_map(|process| process.file_name().into_string().ok())
            .collect();
        assert!(!processes.is_empty(), "HAProxy runs");
        // A worker of before a reload may have ended just now: what kill(1) says of it does not matter.
        Command::new("kill")
            .arg("-KILL")
            .args(&processes)
            .status()
            .expect("kill(1)");
    }
}
