use std::cell::RefCell;

use serde_json::json;
use windlass_sdk::diagnosis::{Connection, MetricRange, ProbeAnswer, Sample};

use super::*;

/// A server whose probes answer what the test says; every probe that ran is remembered.
struct Fake {
    facts: Value,
    open: Vec<u16>,
    ran: RefCell<Vec<String>>,
}

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
        self.ran.borrow_mut().push(probe.to_owned());
        let data = self
            .facts
            .get(probe)
            .ok_or_else(|| PluginError::unsupported("not on this server"))?;
        Ok(ProbeAnswer {
            data: data.to_string(),
            text: String::new(),
            attributes: Vec::new(),
        })
    }

    fn connect(&self, _: &str, to: &Endpoint, _: u64) -> Result<Connection, PluginError> {
        let reached = to.port.is_some_and(|port| self.open.contains(&port));
        Ok(Connection {
            reached,
            elapsed_us: 1,
            detail: if reached { "connected" } else { "refused" }.into(),
            attributes: Vec::new(),
        })
    }

    fn read(&self, _: &str, _: &str) -> Result<String, PluginError> {
        Err(PluginError::unsupported("read"))
    }

    fn find(&self, _: &str, _: &[(String, String)], _: u32) -> Result<Vec<String>, PluginError> {
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

fn well() -> Value {
    json!({
        "agent": { "version": "1.2.3", "running_s": 10, "resident_kib": 9000, "data_free_kib": 9_000_000, "data_full": false },
        "disk": [{ "path": "/", "used_percent": 40.0 }, { "path": "/media", "used_percent": 100.0, "read_only": true }, { "path": "/net", "skipped": "x" }],
        "inodes": [{ "path": "/", "used_percent": 3.0 }],
        "memory": { "total_kib": 1000, "used_percent": 50.0, "swap_used_percent": 0.0 },
        "load": { "load_5m": 0.5, "cpus": 2 },
        "file-handles": { "used_percent": 1.0, "processes": [{ "name": "web", "pid": 7, "used_percent": 10.0 }] },
        "clock": { "drift_ms": -40, "round_trip_ms": 20, "synchronized": true },
        "dns": { "servers": [{ "server": "10.0.0.2", "answered": true }], "lookup": null },
        "kernel-log": { "oom_kill_count": 0, "disk_error_count": 0, "error_count": 0, "oom_kills": [], "disk_errors": [], "errors": [] },
        "processes": { "zombies": 0, "zombie_processes": [] },
        "failed-units": { "units": [] },
        "package-verification": { "changed": [{ "path": "/etc/x", "what": "content", "configuration": true }] },
    })
}

fn diagnose(facts: Value, parameters: &Value) -> (Report, Vec<String>) {
    let host = Fake {
        facts,
        open: vec![22],
        ran: RefCell::default(),
    };
    let request = DiagnosisRequest::new("server", "s1", parameters);
    let report = ServerHealth::diagnose(request, &host).unwrap();
    (report, host.ran.into_inner())
}

fn state_of(report: &Report, code: &str) -> FindingState {
    let found = report.findings.iter().find(|finding| finding.code == code);
    found.unwrap_or_else(|| panic!("no item {code}")).state
}

#[test]
fn a_server_that_is_well_is_well_in_every_item() {
    let parameters = json!({ "expected_ports": [22], "verify_packages": ["bash"] });
    let (report, ran) = diagnose(well(), &parameters);
    for finding in &report.findings {
        assert_eq!(finding.state, FindingState::Ok, "{finding:?}");
        assert!(finding.suggestion.is_empty(), "{finding:?}");
    }
    assert_eq!(report.findings.len(), items::ALL.len());
    assert_eq!(report.summary, "everything that was looked at is well");
    let logs = ran.iter().filter(|probe| *probe == "kernel-log").count();
    assert_eq!(logs, 1, "three items share one look");
}

#[test]
fn each_fault_is_found_by_its_item() {
    use FindingState::{Failed, Warning};
    let defaults = json!({});
    for (probe, facts, code, state, says) in [
        (
            "agent",
            json!({ "data_free_kib": 1, "data_full": true }),
            "agent",
            Failed,
            "0 MiB",
        ),
        (
            "disk",
            json!([{ "path": "/data", "used_percent": 99.5 }, { "path": "/", "used_percent": 85.0 }]),
            "disk",
            Failed,
            "/data 99.5 %, / 85.0 %",
        ),
        (
            "disk",
            json!([{ "path": "/data", "used_percent": 85.0 }]),
            "disk",
            Warning,
            "/data",
        ),
        (
            "inodes",
            json!([{ "path": "/var", "used_percent": 100.0 }]),
            "inodes",
            Failed,
            "/var",
        ),
        (
            "memory",
            json!({ "total_kib": 1024, "used_percent": 95.0 }),
            "memory",
            Failed,
            "95.0 % of 1 MiB",
        ),
        (
            "load",
            json!({ "load_5m": 7.0, "cpus": 2 }),
            "load",
            Failed,
            "3.50 for each",
        ),
        (
            "file-handles",
            json!({ "used_percent": 1.0, "processes": [{ "name": "web", "pid": 7, "used_percent": 97.0 }] }),
            "file-handles",
            Failed,
            "web (7)",
        ),
        (
            "clock",
            json!({ "drift_ms": 9000, "round_trip_ms": 10, "synchronized": true }),
            "clock",
            Failed,
            "9000 ms",
        ),
        (
            "clock",
            json!({ "drift_ms": 1, "round_trip_ms": 10, "synchronized": false }),
            "clock",
            Warning,
            "nothing keeps it right",
        ),
        (
            "dns",
            json!({ "servers": [{ "server": "10.0.0.9", "answered": false }] }),
            "dns",
            Failed,
            "10.0.0.9",
        ),
        (
            "dns",
            json!({ "servers": [{ "server": "10.0.0.9", "answered": false }, { "server": "10.0.0.2", "answered": true }] }),
            "dns",
            Warning,
            "10.0.0.9",
        ),
        (
            "kernel-log",
            json!({ "oom_kill_count": 1, "oom_kills": [{ "message": "Out of memory: Killed process 7 (java)" }] }),
            "oom-kills",
            Failed,
            "java",
        ),
        (
            "kernel-log",
            json!({ "disk_error_count": 1, "disk_errors": [{ "message": "I/O error, dev sda" }] }),
            "disk-errors",
            Failed,
            "sda",
        ),
        (
            "kernel-log",
            json!({ "error_count": 2, "errors": [{ "message": "one" }, { "message": "two" }] }),
            "kernel-errors",
            Warning,
            "two, one",
        ),
        (
            "processes",
            json!({ "zombies": 1, "zombie_processes": [{ "name": "child", "pid": 9, "parent": 8, "parent_name": "mother" }] }),
            "zombies",
            Warning,
            "child (9) of mother (8)",
        ),
        (
            "processes",
            json!({ "zombies": 50, "zombie_processes": [] }),
            "zombies",
            Failed,
            "50",
        ),
        (
            "failed-units",
            json!({ "units": [{ "unit": "nginx.service" }] }),
            "failed-units",
            Failed,
            "nginx.service",
        ),
    ] {
        let mut server = well();
        server[probe] = facts;
        let (report, _) = diagnose(server, &defaults);
        assert_eq!(state_of(&report, code), state, "{code}: {report:?}");
        let finding = report.findings.iter().find(|one| one.code == code).unwrap();
        assert!(finding.seen.contains(says), "{code}: {}", finding.seen);
        assert!(!finding.suggestion.is_empty(), "{code}");
        assert!(report.summary.contains(code), "{}", report.summary);
    }
}

#[test]
fn what_could_not_be_looked_at_is_never_well() {
    let (report, _) = diagnose(json!({ "memory": { "unexpected": 1 } }), &json!({}));
    for finding in &report.findings {
        let asked_for_nothing = ["ports", "packages"].contains(&finding.code.as_str());
        let expect = if asked_for_nothing {
            FindingState::Ok
        } else {
            FindingState::Skipped
        };
        assert_eq!(finding.state, expect, "{finding:?}");
    }
}

#[test]
fn a_closed_port_a_missing_name_and_a_changed_file_are_found() {
    let mut server = well();
    server["dns"]["lookup"] = json!({ "addresses": [], "error": "no such host" });
    server["package-verification"] =
        json!({ "changed": [{ "path": "/bin/sh", "what": "content", "configuration": false }] });
    let parameters = json!({ "expected_ports": [22, 8080], "dns_name": "db.example", "verify_packages": ["dash"] });
    let (report, _) = diagnose(server, &parameters);
    for code in ["ports", "dns", "packages"] {
        assert_eq!(state_of(&report, code), FindingState::Failed, "{code}");
    }
    assert!(
        report
            .findings
            .iter()
            .any(|one| one.seen == "not open: 8080 (refused)"),
        "{report:?}"
    );
}

#[test]
fn only_servers_and_only_the_asked_items() {
    let host = Fake {
        facts: well(),
        open: Vec::new(),
        ran: RefCell::default(),
    };
    let mut request = DiagnosisRequest::new("path", "p1", &json!({}));
    assert!(ServerHealth::diagnose(request.clone(), &host).is_err());
    request.subject.kind = "server".into();
    request.items = vec!["load".into()];
    let report = ServerHealth::diagnose(request, &host).unwrap();
    assert_eq!(report.findings.len(), 1);
    assert_eq!(*host.ran.borrow(), ["load"]);
}

#[test]
fn defaults_are_those_of_the_schema() {
    let properties = &parameters::schema()["properties"];
    let defaults: serde_json::Map<String, Value> = properties
        .as_object()
        .unwrap()
        .iter()
        .filter_map(|(name, property)| Some((name.clone(), property.get("default")?.clone())))
        .collect();
    let parsed: Parameters = serde_json::from_value(Value::Object(defaults)).unwrap();
    assert_eq!(parsed, Parameters::default());
}
