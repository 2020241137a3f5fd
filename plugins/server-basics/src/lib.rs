//! The diagnostic `server-basics`: disk, memory and load of one server.
//!
//! It looks through the named probes `disk`, `memory` and `load`, and reads nothing else. What it expects of their answers:
//! `disk` → `{"used_percent": n, "path": text}` or a list of such; `memory` → `{"total_kib": n, "available_kib": n}`;
//! `load` → `{"load_1m": n, "cpus": n}`.

use serde::Deserialize;
use serde_json::{Value, json};
use windlass_sdk::{
    Descriptor, Diagnostic, PluginError, Severity,
    diagnosis::{DiagnosisRequest, Finding, FindingState, Host, Report},
    parse_parameters,
};

/// The plugin.
#[derive(Debug)]
pub struct ServerBasics;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    #[serde(default = "ninety")]
    disk_failed_percent: f64,
    #[serde(default = "ninety")]
    memory_failed_percent: f64,
    #[serde(default = "two")]
    load_failed_per_cpu: f64,
}

fn ninety() -> f64 {
    90.0
}

fn two() -> f64 {
    2.0
}

/// From this share of a limit on it is a warning.
const WARNING: f64 = 0.85;
const PROBE_TIMEOUT_MS: u64 = 10_000;

impl Diagnostic for ServerBasics {
    fn describe() -> Descriptor {
        let percent = json!({ "type": "number", "minimum": 1, "maximum": 100, "default": 90 });
        Descriptor::new("server-basics", "1.0.0")
            .title("Server basics")
            .summary("Whether a server has disk space, memory and processor time left.")
            .provider("Windlass")
            .category("server")
            .operating_system("linux")
            .item("disk", "Disk space", Severity::Critical)
            .item("memory", "Memory", Severity::Critical)
            .item("load", "Processor load", Severity::NonCritical)
            .parameters(&json!({
                "type": "object",
                "additionalProperties": false,
                "properties": {
                    "disk_failed_percent": percent,
                    "memory_failed_percent": percent,
                    "load_failed_per_cpu": { "type": "number", "exclusiveMinimum": 0, "maximum": 1000, "default": 2 }
                }
            }))
    }

    fn diagnose(request: DiagnosisRequest, host: &dyn Host) -> Result<Report, PluginError> {
        if request.subject.kind != "server" {
            return Err(PluginError::unsupported(format!(
                "server-basics looks at servers, not at `{}`",
                request.subject.kind
            )));
        }
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let server = &request.subject.id;
        let mut findings = Vec::new();
        for (item, look) in [
            ("disk", disk as fn(&Value, &Parameters) -> Option<Seen>),
            ("memory", memory),
            ("load", load),
        ] {
            if request.wants(item) {
                findings.push(find(item, look, server, &parameters, host));
            }
        }
        let bad = findings
            .iter()
            .filter(|finding| finding.state == FindingState::Failed)
            .map(|finding| finding.code.as_str())
            .collect::<Vec<_>>();
        let summary = if bad.is_empty() {
            "nothing is short".to_owned()
        } else {
            format!("short of: {}", bad.join(", "))
        };
        Ok(Report::new(summary, findings))
    }
}

/// A figure, its limit, and how both read.
struct Seen {
    figure: f64,
    limit: f64,
    text: String,
    suggestion: &'static str,
}

fn find(
    item: &str,
    look: fn(&Value, &Parameters) -> Option<Seen>,
    server: &str,
    parameters: &Parameters,
    host: &dyn Host,
) -> Finding {
    let answer = match host.run(server, item, &[], PROBE_TIMEOUT_MS) {
        Ok(answer) => answer,
        Err(error) => {
            return Finding::new(
                item,
                FindingState::Skipped,
                format!("the probe failed: {} ({})", error.message, error.code),
            );
        }
    };
    let seen = serde_json::from_str(&answer.data)
        .ok()
        .and_then(|data| look(&data, parameters));
    let Some(seen) = seen else {
        return Finding::new(
            item,
            FindingState::Skipped,
            "the probe's answer has another shape than expected",
        );
    };
    let state = if seen.figure >= seen.limit {
        FindingState::Failed
    } else if seen.figure >= seen.limit * WARNING {
        FindingState::Warning
    } else {
        FindingState::Ok
    };
    let finding = Finding::new(item, state, seen.text);
    match state {
        FindingState::Failed | FindingState::Warning => finding.suggest(seen.suggestion),
        FindingState::Ok | FindingState::Skipped => finding,
    }
}

fn disk(data: &Value, parameters: &Parameters) -> Option<Seen> {
    let used = |disk: &Value| disk["used_percent"].as_f64();
    let fullest = match data {
        Value::Array(disks) => {
            disks
                .iter()
                .filter(|disk| used(disk).is_some())
                .max_by(|one, two| {
                    used(one)
                        .unwrap_or(0.0)
                        .total_cmp(&used(two).unwrap_or(0.0))
                })?
        }
        one => one,
    };
    let figure = used(fullest)?;
    let path = fullest["path"].as_str().unwrap_or("the disk");
    Some(Seen {
        figure,
        limit: parameters.disk_failed_percent,
        text: format!(
            "{figure:.0} % of {path} used, the limit is {:.0} %",
            parameters.disk_failed_percent
        ),
        suggestion: "Remove old files or grow the disk.",
    })
}

fn memory(data: &Value, parameters: &Parameters) -> Option<Seen> {
    let total = data["total_kib"].as_f64().filter(|total| *total > 0.0)?;
    let available = data["available_kib"].as_f64()?;
    let figure = (total - available) / total * 100.0;
    Some(Seen {
        figure,
        limit: parameters.memory_failed_percent,
        text: format!(
            "{figure:.0} % of {:.0} MiB used, the limit is {:.0} %",
            total / 1024.0,
            parameters.memory_failed_percent
        ),
        suggestion: "Look for the process that grew, or give the server more memory.",
    })
}

fn load(data: &Value, parameters: &Parameters) -> Option<Seen> {
    let load = data["load_1m"].as_f64()?;
    let cpus = data["cpus"].as_f64().filter(|cpus| *cpus > 0.0)?;
    let figure = load / cpus;
    Some(Seen {
        figure,
        limit: parameters.load_failed_per_cpu,
        text: format!(
            "load {load:.2} on {cpus:.0} processors, the limit is {:.1} for each",
            parameters.load_failed_per_cpu
        ),
        suggestion: "Look for the busiest processes, or move applications off.",
    })
}

windlass_sdk::diagnostic!(ServerBasics);

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_sdk::diagnosis::{Connection, Endpoint, MetricRange, ProbeAnswer, Sample};

    /// A server whose probes answer what the test says.
    struct Fake(Value);

    impl Host for Fake {
        fn available(&self, _: &str) -> Result<Vec<String>, PluginError> {
            Ok(Vec::new())
        }

        fn run(
            &self,
            _: &str,
            probe: &str,
            _: &[(String, String)],
            _: u64,
        ) -> Result<ProbeAnswer, PluginError> {
            let data = self
                .0
                .get(probe)
                .ok_or_else(|| PluginError::unsupported("no such probe"))?;
            Ok(ProbeAnswer {
                data: data.to_string(),
                text: String::new(),
                attributes: Vec::new(),
            })
        }

        fn connect(&self, _: &str, _: &Endpoint, _: u64) -> Result<Connection, PluginError> {
            Err(PluginError::unsupported("connect"))
        }

        fn read(&self, _: &str, _: &str) -> Result<String, PluginError> {
            Err(PluginError::unsupported("read"))
        }

        fn find(
            &self,
            _: &str,
            _: &[(String, String)],
            _: u32,
        ) -> Result<Vec<String>, PluginError> {
            Err(PluginError::unsupported("find"))
        }

        fn metrics(
            &self,
            _: &str,
            _: &str,
            _: &str,
            _: MetricRange,
        ) -> Result<Vec<Sample>, PluginError> {
            Err(PluginError::unsupported("metrics"))
        }

        fn order_log(&self, _: &str, _: Option<u32>, _: u32) -> Result<String, PluginError> {
            Err(PluginError::unsupported("order_log"))
        }
    }

    fn states(server: Value) -> Vec<FindingState> {
        let request = DiagnosisRequest::new("server", "s1", &json!({}));
        ServerBasics::diagnose(request, &Fake(server))
            .unwrap()
            .findings
            .into_iter()
            .map(|finding| finding.state)
            .collect()
    }

    #[test]
    fn figures_become_states() {
        use FindingState::{Failed, Ok, Skipped, Warning};
        let memory = |available| json!({ "total_kib": 1000, "available_kib": available });
        assert_eq!(
            states(json!({
                "disk": [{ "path": "/", "used_percent": 10 }, { "path": "/data", "used_percent": 95 }],
                "memory": memory(200),
                "load": { "load_1m": 0.5, "cpus": 2 }
            })),
            [Failed, Warning, Ok]
        );
        assert_eq!(
            states(json!({ "disk": { "used_percent": 5 }, "memory": { "unexpected": true } })),
            [Ok, Skipped, Skipped]
        );
    }

    #[test]
    fn only_servers_and_only_the_asked_items() {
        let mut request = DiagnosisRequest::new("path", "p1", &json!({}));
        assert!(ServerBasics::diagnose(request.clone(), &Fake(json!({}))).is_err());
        request.subject.kind = "server".into();
        request.items = vec!["load".into()];
        let report = ServerBasics::diagnose(request, &Fake(json!({}))).unwrap();
        assert_eq!(report.findings.len(), 1);
    }
}
