//! The diagnostic `server-health`: whether a server is well, and where it is not, why and what to do.
//! Source: spec "Diagnostics (plugins)", "Server diagnosis".
//!
//! | module | owns |
//! | --- | --- |
//! | [`parameters`] | limits that an operator can set |
//! | `items` | what each item looks at, and how it judges |
//!
//! Each item runs one probe, or shares its answer with others. A probe that gives no answer makes its items `skipped`, with the
//! reason: an item is never `ok` because nobody looked.

mod items;
pub mod parameters;

use std::{cell::RefCell, collections::BTreeMap};

use serde_json::Value;
use windlass_sdk::{
    Descriptor, Diagnostic, PluginError,
    diagnosis::{DiagnosisRequest, Endpoint, Finding, FindingState, Host, Report},
    parse_parameters,
};

use parameters::Parameters;

/// The plugin.
#[derive(Debug)]
pub struct ServerHealth;

/// How long one probe may take.
const PROBE_TIMEOUT_MS: u64 = 10_000;
/// How long one connection attempt may take.
const CONNECT_TIMEOUT_MS: u64 = 3000;

/// A probe with its arguments.
type Asked = (String, Vec<(String, String)>);

/// Looks of one diagnosis: each probe runs once, however many items want its answer.
struct Looks<'a> {
    server: &'a str,
    host: &'a dyn Host,
    parameters: &'a Parameters,
    answers: RefCell<BTreeMap<Asked, Result<Value, String>>>,
}

impl Looks<'_> {
    /// Facts of a probe.
    fn facts(&self, probe: &str, arguments: &[(String, String)]) -> Result<Value, String> {
        let key = (probe.to_owned(), arguments.to_vec());
        if let Some(known) = self.answers.borrow().get(&key) {
            return known.clone();
        }
        let answer = self
            .host
            .run(self.server, probe, arguments, PROBE_TIMEOUT_MS)
            .map_err(|error| {
                format!(
                    "the probe `{probe}` gave no answer: {} ({})",
                    error.message, error.code
                )
            })
            .and_then(|answer| {
                serde_json::from_str(&answer.data)
                    .map_err(|_| format!("the probe `{probe}` answered something that is not JSON"))
            });
        self.answers.borrow_mut().insert(key, answer.clone());
        answer
    }

    /// A connection attempt of the server to itself.
    fn connect(&self, port: u16) -> Result<(bool, String), String> {
        let to = Endpoint {
            protocol: "tcp".into(),
            target: "127.0.0.1".into(),
            port: Some(port),
        };
        self.host
            .connect(self.server, &to, CONNECT_TIMEOUT_MS)
            .map(|connection| (connection.reached, connection.detail))
            .map_err(|error| {
                format!(
                    "no connection was tried: {} ({})",
                    error.message, error.code
                )
            })
    }
}

/// What an item came to.
struct Seen {
    state: FindingState,
    text: String,
    suggestion: String,
}

impl Seen {
    fn ok(text: impl Into<String>) -> Self {
        Self {
            state: FindingState::Ok,
            text: text.into(),
            suggestion: String::new(),
        }
    }

    fn skipped(text: impl Into<String>) -> Self {
        Self {
            state: FindingState::Skipped,
            ..Self::ok(text)
        }
    }

    fn warning(text: impl Into<String>, suggestion: &str) -> Self {
        Self {
            state: FindingState::Warning,
            text: text.into(),
            suggestion: suggestion.to_owned(),
        }
    }

    fn failed(text: impl Into<String>, suggestion: &str) -> Self {
        Self {
            state: FindingState::Failed,
            ..Self::warning(text, suggestion)
        }
    }
}

impl Diagnostic for ServerHealth {
    fn describe() -> Descriptor {
        let mut descriptor = Descriptor::new("server-health", "1.0.0")
            .title("Server health")
            .summary(
                "Whether a server is well: disk, inodes, memory, load, file handles, clock, name resolution, out-of-memory kills, \
                 kernel and disk errors, zombies, failed units, ports that should be open, changed package files, and the agent.",
            )
            .provider("Windlass")
            .category("server")
            .operating_system("linux")
            .parameters(&parameters::schema());
        for item in items::ALL {
            descriptor = descriptor.item(item.code, item.title, item.severity);
        }
        descriptor
    }

    fn diagnose(request: DiagnosisRequest, host: &dyn Host) -> Result<Report, PluginError> {
        if request.subject.kind != "server" {
            return Err(PluginError::unsupported(format!(
                "server-health looks at servers, not at `{}`",
                request.subject.kind
            )));
        }
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let looks = Looks {
            server: &request.subject.id,
            host,
            parameters: &parameters,
            answers: RefCell::default(),
        };
        let findings: Vec<Finding> = items::ALL
            .iter()
            .filter(|item| request.wants(item.code))
            .map(|item| {
                let seen = (item.look)(&looks).unwrap_or_else(Seen::skipped);
                Finding::new(item.code, seen.state, seen.text).suggest(&seen.suggestion)
            })
            .collect();
        Ok(Report::new(summary(&findings), findings))
    }
}

fn summary(findings: &[Finding]) -> String {
    let codes = |state| {
        findings
            .iter()
            .filter(|finding| finding.state == state)
            .map(|finding| finding.code.as_str())
            .collect::<Vec<_>>()
    };
    let (failed, warning, skipped) = (
        codes(FindingState::Failed),
        codes(FindingState::Warning),
        codes(FindingState::Skipped),
    );
    let mut parts = Vec::new();
    if !failed.is_empty() {
        parts.push(format!("failed: {}", failed.join(", ")));
    }
    if !warning.is_empty() {
        parts.push(format!("could become bad: {}", warning.join(", ")));
    }
    if !skipped.is_empty() {
        parts.push(format!("not looked at: {}", skipped.join(", ")));
    }
    if parts.is_empty() {
        "everything that was looked at is well".to_owned()
    } else {
        parts.join("; ")
    }
}

windlass_sdk::diagnostic!(ServerHealth);

#[cfg(test)]
mod tests;
