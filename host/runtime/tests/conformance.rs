//! The conformance kit: the shipped plugins pass it, and each way of breaking a rule is found, named, and shown with its input.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{fs, path::Path, sync::OnceLock, time::Duration};

use serde_json::json;
use support::{guest, shipped};
use windlass_domain::{plugin::CommandRequest, value::Value};
use windlass_runtime::{
    FileError, Plugin, RejectionCode, RuntimeLimits,
    conformance::{Examination, FixtureAnswer, Rule, Sample, Severity, examine, quick},
    load_file,
};

async fn load(file: &Path) -> Plugin {
    let limits = RuntimeLimits {
        guest_time: Duration::from_secs(1),
        calls_at_once: 4,
        ..RuntimeLimits::default()
    };
    // Each component is compiled once, whatever number of tests load it.
    static CACHE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let cache = CACHE.get_or_init(|| tempfile::tempdir().unwrap());
    load_file(file, limits, Some(cache.path())).await.unwrap().0
}

async fn load_guest(kind: &str, marker: &str) -> Plugin {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("guest.wasm");
    fs::write(&file, guest(kind, marker)).unwrap();
    load(&file).await
}

fn sample(export: &str, input: serde_json::Value) -> Sample {
    serde_json::from_value(json!({ "name": "a sample", "export": export, "input": input })).unwrap()
}

fn rule(examination: &Examination, rule: Rule) -> &windlass_runtime::conformance::RuleResult {
    examination
        .rules
        .iter()
        .find(|result| result.rule == rule)
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shipped_plugins_conform() {
    let mut files: Vec<_> = fs::read_dir(shipped())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "wasm")
        })
        .collect();
    files.sort();
    assert!(files.len() >= 4);
    for file in files {
        let plugin = load(&file).await;
        assert_eq!(quick(&plugin).await, [], "{}", file.display());
        let examination = examine(&plugin, &[], None).await;
        let failed: Vec<_> = examination
            .rules
            .iter()
            .filter(|rule| rule.severity == Severity::Failed)
            .collect();
        assert!(failed.is_empty(), "{}: {failed:#?}", file.display());
        // And it was tried in earnest.
        assert!(
            examination.calls > 20,
            "{}: {} calls",
            file.display(),
            examination.calls
        );
        assert_eq!(
            rule(&examination, Rule::Memory).severity,
            Severity::Passed,
            "{}",
            file.display()
        );
        assert_eq!(
            rule(&examination, Rule::Time).severity,
            Severity::Passed,
            "{}",
            file.display()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_broken_rule_is_named_with_its_input() {
    for (kind, export, behave, broken, text) in [
        (
            "public-command",
            "render",
            "trap",
            Rule::Parameters,
            "plugin_trap",
        ),
        (
            "public-command",
            "render",
            "loop",
            Rule::Parameters,
            "plugin_time_limit",
        ),
        (
            "tech-stack",
            "lifecycle",
            "allocate",
            Rule::Parameters,
            "plugin_memory_limit",
        ),
        (
            "deployment-strategy",
            "plan",
            "duplicate-server",
            Rule::Answers,
            "is released 2 times",
        ),
        (
            "deployment-strategy",
            "plan",
            "unknown-server",
            Rule::Answers,
            "which the request does not have",
        ),
        (
            "diagnostic",
            "diagnose",
            "probe-for-ever",
            Rule::Parameters,
            "plugin_host_call_limit",
        ),
    ] {
        let plugin = load_guest(kind, ";1.0.0;ok;").await;
        let samples = [sample(
            export,
            json!({ "parameters": { "behave": behave } }),
        )];
        let examination = examine(&plugin, &samples, None).await;
        let result = rule(&examination, broken);
        let found = result
            .findings
            .iter()
            .find(|finding| finding.severity == Severity::Failed && finding.text.contains(text));
        let found = found.unwrap_or_else(|| panic!("{kind} {behave}: {result:#?}"));
        let input = found.input.as_ref().unwrap();
        assert_eq!(input["parameters"]["behave"], behave, "{kind} {behave}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diagnostic_that_guesses_is_caught() {
    // This guest says `ok` whatever its probe answers.
    let plugin = load_guest("diagnostic", ";1.0.0;ok;").await;
    let examination = examine(&plugin, &[], None).await;
    let result = rule(&examination, Rule::HostErrors);
    assert!(
        result
            .findings
            .iter()
            .any(|finding| finding.text.contains("reports `probe` as ok")),
        "{result:#?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn samples_say_what_they_expect_and_fixtures_answer() {
    let plugin = load_guest("diagnostic", ";1.0.0;ok;").await;
    let fixture: Vec<FixtureAnswer> = serde_json::from_value(json!([
        { "function": "probes.run", "arguments": { "probe": "disk" }, "answer": { "ok": { "data": { "free": 7 }, "text": "" } } }
    ]))
    .unwrap();
    for (expect, holds) in [
        (
            json!({ "output": { "report": { "findings": [{ "seen": "{\"free\":7}" }] } } }),
            true,
        ),
        (
            json!({ "output": { "report": { "findings": [{ "seen": "something else" }] } } }),
            false,
        ),
        (json!({ "failure": "plugin_trap" }), false),
    ] {
        let mut sample = sample("diagnose", json!({ "parameters": {} }));
        sample.fixture = fixture.clone();
        sample.expect = serde_json::from_value(expect.clone()).unwrap();
        let examination = examine(&plugin, &[sample], None).await;
        let passed = rule(&examination, Rule::Samples).severity == Severity::Passed;
        assert_eq!(passed, holds, "{expect}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_are_compared() {
    let old = load_guest("tech-stack", "stack;1.0.0;ok;").await;
    for (marker, failed) in [
        ("stack;1.1.0;ok;", false),
        ("stack;1.0.0;ok;", true),
        ("other;2.0.0;ok;", true),
    ] {
        let new = load_guest("tech-stack", marker).await;
        let before = (old.kind(), old.descriptor().as_ref());
        let examination = examine(&new, &[], Some(before)).await;
        let result = rule(&examination, Rule::Stability);
        assert_eq!(
            result.severity == Severity::Failed,
            failed,
            "{marker}: {result:#?}"
        );
    }
}

/// The command as the guest `entropy` renders it, and what it saw.
async fn seen(plugin: &Plugin, behave: &str) -> String {
    let request = CommandRequest {
        parameters: json!({ "behave": behave }),
        target: support::server("s1"),
    };
    match plugin.render(&request).await.unwrap().env.get("SEEN") {
        Some(Value::Plain(text)) => text.clone(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_by_time_or_chance_is_caught_and_never_differs_on_a_server() {
    let plugin = load_guest("entropy", "entropy;1.0.0;ok;").await;
    for (behave, depends) in [("time", true), ("chance", true), ("count", false)] {
        // What a server's calls see is the same each time: recorded calls can be made again.
        let first = seen(&plugin, behave).await;
        assert!(!first.is_empty());
        assert_eq!(seen(&plugin, behave).await, first, "{behave}");
        // The kit makes the second call at another time and with other random numbers.
        let samples = [sample(
            "render",
            json!({ "parameters": { "behave": behave } }),
        )];
        let examination = examine(&plugin, &samples, None).await;
        let result = rule(&examination, Rule::Determinism);
        let caught = result
            .findings
            .iter()
            .find(|finding| finding.severity == Severity::Failed);
        assert_eq!(caught.is_some(), depends, "{behave}: {result:#?}");
        if let Some(caught) = caught {
            let input = caught.input.as_ref().unwrap();
            assert_eq!(input["parameters"]["behave"], behave);
        }
    }
    // No instance lives longer than its call: there were none before.
    assert_eq!(seen(&plugin, "count").await, "0");
    // A description by chance is caught by the quick part, too, which servers run.
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("guest.wasm");
    fs::write(&file, guest("entropy", "entropy;1.0.0;chance;")).unwrap();
    let refused = load_file(&file, RuntimeLimits::default(), None)
        .await
        .expect_err("it describes itself by chance");
    let FileError::Rejected { rejection, .. } = &refused else {
        panic!("{refused:?}");
    };
    assert_eq!(rejection.code, RejectionCode::NotConforming, "{rejection}");
}
