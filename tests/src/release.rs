//! A release on a [`TestHost`] whose every script leaves a line in a file, so that a test can count executions.

use std::{collections::BTreeMap, fs, path::PathBuf};

use bytes::Bytes;
use serde_json::{Value, json};
use windlass::api::client::Client;

use crate::host::{TestHost, items, tar_gz, text};

/// An application on every server of a host, with two packages to release in turn.
pub struct Counted {
    /// The service instance.
    pub instance: String,
    /// Packages.
    pub packages: Vec<String>,
    /// The pool in front of it.
    pub pool: String,
    /// Servers: name and id.
    pub servers: Vec<(String, String)>,
    executions: PathBuf,
}

/// Leaves a line: run, step, server.
fn leave(step: &str) -> String {
    format!("echo \"$RUN {step} $WINDLASS_SERVER\" >> \"$EXECUTIONS\"")
}

impl Counted {
    /// Makes the application, its packages and its instance, and binds every server.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn prepare(host: &TestHost) -> Self {
        let api = &host.api;
        let app = api
            .post(
                "/v1/apps",
                &json!({ "name": "counted", "tech_stack": { "name": "binary", "version": "*" } }),
            )
            .await
            .expect("an application");
        let pool = text(
            &api.post(&host.ws("pools"), &json!({ "name": "front" }))
                .await
                .expect("a pool")["id"],
        );
        let mut packages = Vec::new();
        for version in ["1.0.0", "2.0.0"] {
            let program = b"#!/bin/sh\nexec sleep 1000000\n";
            let file = tar_gz(&[
                ("run.sh", 0o755, program),
                ("VERSION", 0o644, version.as_bytes()),
            ]);
            packages.push(upload(host, "counted", version, file).await);
        }
        let executions = host.path().join("executions");
        fs::write(&executions, "").expect("the file of executions");
        let instance = api
            .post(
                &host.ws("service-instances"),
                &json!({
                    "name": "counted",
                    "app": app["id"],
                    "env": { "EXECUTIONS": executions.to_str() },
                    "pools": [pool],
                    "parameters": {
                        "program": "run.sh",
                        "configure_script": leave("configure"),
                        "health": { "kind": "script", "script": "true", "interval_ms": 100 },
                        "stop_grace_s": 1,
                    },
                }),
            )
            .await
            .expect("an instance");
        let instance = text(&instance["id"]);
        let servers = host.servers().await;
        let ids: Vec<&String> = servers.iter().map(|(_, id)| id).collect();
        api.post(
            &host.ws(&format!("service-instances/{instance}/servers")),
            &json!({ "servers": ids }),
        )
        .await
        .expect("servers are bound");
        Self {
            instance,
            packages,
            pool,
            servers,
            executions,
        }
    }

    /// An order that releases one package in groups of one; `run` marks its executions.
    #[must_use]
    pub fn order(&self, run: &str, package: usize) -> Value {
        json!({
            "title": format!("run {run}"),
            "strategy": "grouped",
            "parameters": { "grouping": "one-per-group" },
            "environment": { "RUN": run },
            "targets": [{ "instance": self.instance, "package": self.packages[package % self.packages.len()] }],
            "drain_deadline_ms": 1000,
            "run": true,
        })
    }

    /// How often each script ran in a run: `step server` → count.
    ///
    /// # Panics
    /// When the file cannot be read.
    #[must_use]
    pub fn executions(&self, run: &str) -> BTreeMap<String, u32> {
        let lines = fs::read_to_string(&self.executions).expect("the file of executions");
        let mut counts = BTreeMap::new();
        for line in lines.lines() {
            if let Some(rest) = line
                .strip_prefix(run)
                .and_then(|rest| rest.strip_prefix(' '))
            {
                *counts.entry(rest.to_owned()).or_default() += 1;
            }
        }
        counts
    }

    /// Checks that a run's order is right in everything that can be seen of it.
    ///
    /// # Panics
    /// With what is not right.
    pub async fn check_succeeded(&self, host: &TestHost, order: &Value, run: &str) {
        assert_eq!(order["state"], "succeeded", "run {run}: {order}");
        let expected: BTreeMap<String, u32> = self
            .servers
            .iter()
            .map(|(name, _)| (format!("configure {name}"), 1))
            .collect();
        assert_eq!(
            self.executions(run),
            expected,
            "run {run}: each script runs once on each server"
        );
        let id = text(&order["id"]);
        let nodes = host
            .api
            .get(&host.ws(&format!("orders/{id}/nodes")))
            .await
            .expect("nodes");
        for node in items(&nodes) {
            assert_eq!(node["state"], "succeeded", "run {run}: {node}");
            assert!(
                node["attempt"].as_u64() <= Some(1),
                "run {run}: one attempt: {node}"
            );
        }
        let weights = host
            .api
            .get(&host.ws(&format!("pools/{}/weights", self.pool)))
            .await
            .expect("weights");
        for weight in items(&weights) {
            assert_eq!(weight["weight"], 100, "run {run}: {weights}");
        }
    }
}

/// Uploads a package and answers its id.
///
/// # Panics
/// When the server refuses.
pub async fn upload(host: &TestHost, app: &str, version: &str, file: Bytes) -> String {
    let path = host.ws(&format!(
        "packages?app={app}&version={version}&file_name={app}-{version}.tar.gz"
    ));
    text(&host.api.upload(&path, file).await.expect("a package")["id"])
}

/// Makes an order even when the server dies meanwhile: with an idempotency key, so that it is made once.
///
/// # Errors
/// When the server cannot be reached; ask again after it is back.
///
/// # Panics
/// When the server refuses.
pub async fn order_once(
    api: &Client,
    path: &str,
    key: &str,
    order: &Value,
) -> Result<String, String> {
    let headers = [
        ("content-type", "application/json"),
        ("idempotency-key", key),
    ];
    let answer = api
        .request(
            hyper::Method::POST,
            path,
            order.to_string().into(),
            &headers,
        )
        .await
        .map_err(|error| error.to_string())?;
    match answer.status {
        200..300 => Ok(text(&answer.json()["id"])),
        // The server is going down, or the first request is still under way.
        409 | 503 if answer.text().contains("try again") => Err(answer.text()),
        status => panic!("{status}: {}", answer.text()),
    }
}
