//! What a diagnostic sees the platform through: the server implements [`Host`], and the imports of the world call it.
//!
//! Read-only by construction: the trait has no function that changes anything. The implementation carries the rights of
//! the person who asked for the diagnosis.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    bindings::{
        diagnostic::windlass::plugin::{probes, resources},
        types::PluginError,
    },
    state::State,
};

/// Arguments and attributes: names and texts.
pub type Attributes = Vec<(String, String)>;

/// Why a host function could not answer; the guest sees code and message. Codes: wit, `plugin-error`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} ({code})")]
pub struct HostError {
    /// Stable code: `not-found`, `offline`, `unsupported`, `invalid-request`, `denied`, `timeout`, `limit-exceeded`,
    /// `not-possible`, `failed`, `internal`.
    pub code: String,
    /// What is wrong.
    pub message: String,
}

impl HostError {
    /// An error with a code of the contract.
    #[must_use]
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            message: message.into(),
        }
    }
}

/// What a probe saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeAnswer {
    /// Facts, in the shape of the probe.
    pub data: serde_json::Value,
    /// The raw text.
    pub text: String,
}

/// Where to connect to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// `tcp`, `udp`, `icmp`, or another code.
    pub protocol: String,
    /// A server's id, an address or a host name.
    pub target: String,
    /// Port, where the protocol has one.
    pub port: Option<u16>,
}

/// How a connection attempt ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Whether the other side answered.
    pub reached: bool,
    /// Time until then, in microseconds.
    pub elapsed_us: u64,
    /// What was seen.
    pub detail: String,
}

/// Which part of a metric, in milliseconds before now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricRange {
    /// From.
    pub from_ago_ms: u64,
    /// To; 0: now.
    pub to_ago_ms: u64,
    /// Length of a period.
    pub period_ms: u64,
}

/// One point of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Start of the period, milliseconds since 1970.
    pub at_ms: u64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// Mean.
    pub mean: f64,
}

/// The platform as a diagnostic sees it. Each call has a time-out and is recorded with its answer by the runtime.
#[async_trait::async_trait]
pub trait Host: Send + Sync {
    /// Codes of the probes of a server.
    async fn available(&self, server: &str) -> Result<Vec<String>, HostError>;
    /// Runs a named read-only probe on a server.
    async fn run(
        &self,
        server: &str,
        probe: &str,
        arguments: &Attributes,
        timeout_ms: u64,
    ) -> Result<ProbeAnswer, HostError>;
    /// Connects from a server to an address.
    async fn connect(
        &self,
        from_server: &str,
        to: &Endpoint,
        timeout_ms: u64,
    ) -> Result<Connection, HostError>;
    /// Reads a resource as the API shows it.
    async fn read(&self, kind: &str, id: &str) -> Result<serde_json::Value, HostError>;
    /// Ids of resources that match all filters.
    async fn find(
        &self,
        kind: &str,
        filters: &Attributes,
        limit: u32,
    ) -> Result<Vec<String>, HostError>;
    /// Points of a metric, oldest first.
    async fn metrics(
        &self,
        kind: &str,
        id: &str,
        metric: &str,
        range: MetricRange,
    ) -> Result<Vec<Sample>, HostError>;
    /// The end of the log of an order or of one of its nodes.
    async fn order_log(
        &self,
        order: &str,
        node: Option<u32>,
        max_bytes: u32,
    ) -> Result<String, HostError>;
}

impl State {
    fn platform(&self) -> wasmtime::Result<Arc<dyn Host>> {
        // Only `diagnose` brings a host; `describe` of a diagnostic has none.
        self.host
            .clone()
            .ok_or_else(|| wasmtime::format_err!("probes exist during `diagnose` only"))
    }
}

type Answer<T> = wasmtime::Result<Result<T, PluginError>>;

impl probes::Host for State {
    async fn available(&mut self, server: String) -> Answer<Vec<String>> {
        let host = self.platform()?;
        self.host_call(
            "probes.available",
            json!({ "server": server }),
            host.available(&server),
        )
        .await
    }

    async fn run(
        &mut self,
        server: String,
        probe: String,
        arguments: Attributes,
        timeout_ms: u64,
    ) -> Answer<probes::ProbeAnswer> {
        let host = self.platform()?;
        let answer = self
            .host_call(
                "probes.run",
                json!({ "server": server, "probe": probe, "arguments": arguments, "timeout_ms": timeout_ms }),
                host.run(&server, &probe, &arguments, timeout_ms),
            )
            .await?;
        Ok(answer.map(|answer| probes::ProbeAnswer {
            data: answer.data.to_string(),
            text: answer.text,
            attributes: Vec::new(),
        }))
    }

    async fn connect(
        &mut self,
        from_server: String,
        to: probes::Endpoint,
        timeout_ms: u64,
    ) -> Answer<probes::Connection> {
        let host = self.platform()?;
        let to = Endpoint {
            protocol: to.protocol,
            target: to.target,
            port: to.port,
        };
        let answer = self
            .host_call(
                "probes.connect",
                json!({ "from_server": from_server, "to": to, "timeout_ms": timeout_ms }),
                host.connect(&from_server, &to, timeout_ms),
            )
            .await?;
        Ok(answer.map(|connection| probes::Connection {
            reached: connection.reached,
            elapsed_us: connection.elapsed_us,
            detail: connection.detail,
            attributes: Vec::new(),
        }))
    }
}

impl resources::Host for State {
    async fn read(&mut self, kind: String, id: String) -> Answer<String> {
        let host = self.platform()?;
        let answer = self
            .host_call(
                "resources.read",
                json!({ "kind": kind, "id": id }),
                host.read(&kind, &id),
            )
            .await?;
        Ok(answer.map(|document| document.to_string()))
    }

    async fn find(&mut self, kind: String, filters: Attributes, limit: u32) -> Answer<Vec<String>> {
        let host = self.platform()?;
        // What is recorded is what the host is asked: a replay compares it.
        let limit = limit.min(1000);
        self.host_call(
            "resources.find",
            json!({ "kind": kind, "filters": filters, "limit": limit }),
            host.find(&kind, &filters, limit),
        )
        .await
    }

    async fn metrics(
        &mut self,
        kind: String,
        id: String,
        metric: String,
        range: resources::MetricRange,
    ) -> Answer<Vec<resources::Sample>> {
        let host = self.platform()?;
        let range = MetricRange {
            from_ago_ms: range.from_ago_ms,
            to_ago_ms: range.to_ago_ms,
            period_ms: range.period_ms,
        };
        let answer = self
            .host_call(
                "resources.metrics",
                json!({ "kind": kind, "id": id, "metric": metric, "range": range }),
                host.metrics(&kind, &id, &metric, range),
            )
            .await?;
        Ok(answer.map(|samples| {
            samples
                .into_iter()
                .map(|sample| resources::Sample {
                    at_ms: sample.at_ms,
                    min: sample.min,
                    max: sample.max,
                    mean: sample.mean,
                })
                .collect()
        }))
    }

    async fn order_log(
        &mut self,
        order: String,
        node: Option<u32>,
        max_bytes: u32,
    ) -> Answer<String> {
        let host = self.platform()?;
        let max_bytes = max_bytes.min(256 * 1024);
        self.host_call(
            "resources.order-log",
            json!({ "order": order, "node": node, "max_bytes": max_bytes }),
            host.order_log(&order, node, max_bytes),
        )
        .await
    }
}
