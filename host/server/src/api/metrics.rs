//! Figures about the server, in Prometheus' text form. Owned by the API's state; there are no globals.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;
use axum::http::{Method, StatusCode};
use windlass_domain::Timestamp;

use crate::clock;

/// Figures that others know; read when asked.
#[async_trait]
pub trait Gauges: Send + Sync + 'static {
    /// Name (without the prefix `windlass_`), help, value. A figure that cannot be had is left out.
    async fn read(&self) -> Vec<Gauge>;
}

/// One figure.
#[derive(Debug, Clone, PartialEq)]
pub struct Gauge {
    /// Name without the prefix `windlass_`.
    pub name: &'static str,
    /// What it is.
    pub help: &'static str,
    /// Labels: name and value. Figures of one name stand beside each other.
    pub labels: Vec<(&'static str, String)>,
    /// Its value now.
    pub value: u64,
}

/// Requests so far: by route, then by method and status.
type Requests = HashMap<String, HashMap<(Method, u16), u64>>;

/// Counts requests, and writes everything down.
pub(crate) struct Metrics {
    started_at: Timestamp,
    requests: Mutex<Requests>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            started_at: clock::now(),
            requests: Mutex::default(),
        }
    }

    /// `route` is the pattern, never the path: there are few of them.
    pub(crate) fn count_request(&self, method: &Method, route: &str, status: StatusCode) {
        let method = match *method {
            // Anybody can make methods up.
            Method::GET
            | Method::HEAD
            | Method::POST
            | Method::PUT
            | Method::PATCH
            | Method::DELETE => method.clone(),
            _ => Method::OPTIONS,
        };
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = match requests.get_mut(route) {
            Some(counts) => counts,
            None => requests.entry(route.to_owned()).or_default(),
        };
        *counts.entry((method, status.as_u16())).or_default() += 1;
    }

    pub(crate) fn text(&self, gauges: &[Gauge]) -> String {
        let mut text = String::new();
        let head = |text: &mut String, name: &str, help: &str, kind: &str| {
            let written = writeln!(
                text,
                "# HELP windlass_{name} {help}\n# TYPE windlass_{name} {kind}"
            );
            written.expect("writing to a string succeeds");
        };
        head(
            &mut text,
            "process_start_time_ms",
            "When the process started, in milliseconds since 1970.",
            "gauge",
        );
        text.push_str(&format!(
            "windlass_process_start_time_ms {}\n",
            self.started_at.unix_ms()
        ));
        let mut last = "";
        for gauge in gauges {
            if std::mem::replace(&mut last, gauge.name) != gauge.name {
                // By convention of the format's users, what only rises has this ending.
                let kind = if gauge.name.ends_with("_total") {
                    "counter"
                } else {
                    "gauge"
                };
                head(&mut text, gauge.name, gauge.help, kind);
            }
            let labels: Vec<String> = gauge
                .labels
                .iter()
                .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
                .collect();
            let labels = if labels.is_empty() {
                String::new()
            } else {
                format!("{{{}}}", labels.join(","))
            };
            text.push_str(&format!(
                "windlass_{}{labels} {}\n",
                gauge.name, gauge.value
            ));
        }
        head(
            &mut text,
            "http_requests_total",
            "Requests by method, route and status.",
            "counter",
        );
        let mut lines: Vec<String> = self
            .requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .flat_map(|(route, counts)| {
                counts.iter().map(move |((method, status), count)| {
                    format!("windlass_http_requests_total{{method=\"{method}\",route=\"{route}\",status=\"{status}\"}} {count}\n")
                })
            })
            .collect();
        lines.sort();
        lines.into_iter().for_each(|line| text.push_str(&line));
        text
    }
}

/// A label's value, as the format wants it.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}
