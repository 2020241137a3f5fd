//! An application that is operated on: two servers run it, and every start of it leaves a line.

use std::{collections::BTreeMap, fs, path::Path};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::{
    host::{Setup, TestHost, eventually, tar_gz, text},
    release::upload,
    scene::{Scene, refusal},
};

/// A package whose program leaves a line whenever it is started.
fn counted() -> Bytes {
    let program =
        b"#!/bin/sh\necho \"$WINDLASS_SERVER\" >> \"$SCENE/starts\"\nexec sleep 1000000\n";
    tar_gz(&[("run.sh", 0o755, program), ("VERSION", 0o644, b"5.0.0")])
}

/// A host with three agents; the application runs on the first two, the third is bound to nothing.
///
/// # Panics
/// When the host or the application cannot be had.
pub async fn ready() -> (TestHost, Scene) {
    let mut host = TestHost::start(Setup {
        agents: 3,
        ..Setup::default()
    })
    .await;
    let root = host.path().join("www");
    fs::create_dir(&root).expect("a directory for static files");
    for index in 0..2 {
        allow(&mut host, index, &root);
    }
    host.wait_online().await;
    let servers = host.servers().await;
    let mut scene = Scene::prepare_on(&host, "scene", servers[..2].to_vec()).await;
    scene.packages = vec![upload(&host, "scene", "5.0.0", counted()).await];
    (host, scene)
}

/// Lets an agent's tasks write below a directory.
fn allow(host: &mut TestHost, index: usize, root: &Path) {
    host.kill_agent(index);
    let path = host.agents[index].data.join("config.json");
    let config = fs::read(&path).expect("the agent's configuration");
    let mut config: Value = serde_json::from_slice(&config).expect("its JSON");
    config["policy"]["path_roots"] = json!([root]);
    fs::write(&path, config.to_string()).expect("the configuration is written");
    host.start_agent(index, &[]);
}

/// How often the application was started on each server.
#[must_use]
pub fn starts(scene: &Scene) -> BTreeMap<String, u32> {
    let lines = fs::read_to_string(scene.directory.join("starts")).unwrap_or_default();
    let mut counts = BTreeMap::new();
    for line in lines.lines() {
        *counts.entry(line.to_owned()).or_default() += 1;
    }
    counts
}

/// Servers on which the application runs.
///
/// # Panics
/// Without `/proc`.
#[must_use]
pub fn running(scene: &Scene) -> Vec<String> {
    let mark = format!("SCENE={}", scene.directory.display());
    let mut found: Vec<String> = fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let comm = fs::read_to_string(path.join("comm")).ok()?;
            let environment = fs::read(path.join("environ")).ok()?;
            let lines: Vec<String> = environment
                .split(|byte| *byte == 0)
                .map(|line| String::from_utf8_lossy(line).into_owned())
                .collect();
            if comm.trim() != "sleep" || !lines.contains(&mark) {
                return None;
            }
            let server = lines
                .iter()
                .find_map(|line| line.strip_prefix("WINDLASS_SERVER="));
            Some(server?.to_owned())
        })
        .collect();
    found.sort();
    found
}

/// An operation on every server of the scene, one after the other.
#[must_use]
pub fn operation(scene: &Scene, title: &str, operation: Value) -> Value {
    json!({
        "title": title,
        "operation": operation,
        "parameters": { "grouping": "one-per-group" },
        "targets": [{ "instance": scene.instance }],
        "drain_deadline_ms": 1000,
    })
}

/// An operation on some servers of the scene.
#[must_use]
pub fn on(scene: &Scene, title: &str, kind: Value, servers: &[usize]) -> Value {
    let mut asked = operation(scene, title, kind);
    let ids: Vec<&str> = servers
        .iter()
        .map(|at| scene.servers[*at].1.as_str())
        .collect();
    asked["targets"][0]["servers"] = json!(ids);
    asked["limits"] = json!({ "max_unavailable": "100%", "min_healthy_members": 0 });
    asked
}

/// Makes an operation; answers its order.
///
/// # Panics
/// When it is refused.
pub async fn make(host: &TestHost, asked: &Value) -> String {
    let made = host.api.post(&host.ws("operations"), asked).await;
    text(&made.expect("an operation")["id"])
}

/// Makes an operation that runs at once; answers its order.
///
/// # Panics
/// When it is refused.
pub async fn run(host: &TestHost, mut asked: Value) -> String {
    asked["run"] = true.into();
    make(host, &asked).await
}

/// Runs an operation to its end.
///
/// # Panics
/// When it does not succeed.
pub async fn done(host: &TestHost, asked: Value) -> Value {
    let id = run(host, asked).await;
    let ended = host.order_ended(&id).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    ended
}

/// What an operation is refused for: status, code and detail.
///
/// # Panics
/// When it is not.
pub async fn refused(host: &TestHost, asked: &Value) -> (u16, String, String) {
    refusal(host.api.post(&host.ws("operations/preview"), asked).await)
}

/// The state of a server, once no order works on it: one that has ended says a moment later how it leaves its servers.
///
/// # Panics
/// When no end comes.
pub async fn state_of(host: &TestHost, server: &str) -> String {
    eventually("no order works on the server", || async {
        let server = host.api.get(&host.ws(&format!("servers/{server}"))).await;
        match text(&server.expect("the server")["release_state"]).as_str() {
            "releasing" => Err("an order works on it".to_owned()),
            state => Ok(state.to_owned()),
        }
    })
    .await
}

/// Both servers run the application, with their whole weight.
///
/// # Panics
/// When one does not.
pub async fn check_serves(host: &TestHost, scene: &Scene) {
    eventually("the application runs on both servers", || async {
        let running = running(scene);
        if running == ["agent-1", "agent-2"] {
            Ok(())
        } else {
            Err(format!("{running:?}"))
        }
    })
    .await;
    for (name, id) in &scene.servers {
        assert_eq!(scene.weight(host, id).await, 100, "the weight of {name}");
        assert_eq!(state_of(host, id).await, "released", "{name}");
    }
}
