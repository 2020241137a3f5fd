//! Calls with JSON, plugins from single files, and host calls from a transcript: what authors and replays use.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;

use serde_json::{Value, json};
use support::{Home, guest, lifecycle, shipped};
use windlass_domain::plugin::PluginKind;
use windlass_runtime::{
    CallFailure, Export, FileError, HostCall, LoadReport, Plugin, RejectionCode, RuntimeLimits,
    load_file, replay::Transcript,
};

async fn load(name: &str) -> (Plugin, LoadReport) {
    let file = shipped().join(format!("{name}.wasm"));
    load_file(&file, RuntimeLimits::default(), None)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_loaded_and_called_with_json_without_a_directory() {
    let (binary, report) = load("binary").await;
    assert_eq!(report.kind, PluginKind::TechStack);
    assert_eq!(report.digest, binary.reference().digest);
    assert_eq!(report.contract, "1.0.0");
    assert!(!report.was_cached && report.compile_us > 0 && report.describe_us > 0);
    assert!(report.describe_memory_bytes >= 65_536 && report.schema_bytes > 2);
    assert!(
        report
            .imports
            .iter()
            .all(|name| name.starts_with("windlass:plugin/")),
        "{report:?}"
    );

    let request = lifecycle(json!({ "port": 8080 }));
    let typed = binary.lifecycle(&request).await.unwrap();
    let input = serde_json::to_value(&request).unwrap();
    let call = binary
        .call_json(Export::Lifecycle, &input, None)
        .await
        .unwrap();
    assert_eq!(call.output, Some(serde_json::to_value(&typed).unwrap()));
    assert_eq!(call.failure, None);
    assert!(call.guest_time_us > 0 && call.guest_time_us <= call.elapsed_us);
    assert!(call.memory_bytes >= 65_536 && call.host_calls.is_empty());

    let described = binary
        .call_json(Export::Describe, &json!({}), None)
        .await
        .unwrap();
    assert_eq!(
        described.output,
        Some(serde_json::to_value(binary.descriptor()).unwrap())
    );

    let mut unknown = input.clone();
    unknown["servers"][0]["colour"] = json!("red");
    let mut wrong = input.clone();
    wrong["servers"][0]["os"] = json!(7);
    for (bad, field) in [(unknown, "/servers/0/colour"), (wrong, "/servers/0/os")] {
        let error = binary
            .call_json(Export::Lifecycle, &bad, None)
            .await
            .unwrap_err();
        assert!(
            matches!(&error.failure, CallFailure::InvalidInput { field: named, .. } if named == field),
            "{error}"
        );
    }
    let error = binary
        .call_json(Export::Plan, &input, None)
        .await
        .unwrap_err();
    assert!(
        matches!(error.failure, CallFailure::WrongKind { .. }),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_fails_says_so_in_json() {
    let home = Home::new();
    home.drop_file("stack.wasm", &guest("tech-stack", ";1.0.0;ok;"));
    let (stack, _) = load_file(&home.file("stack.wasm"), RuntimeLimits::default(), None)
        .await
        .unwrap();
    let input = serde_json::to_value(lifecycle(json!({ "behave": "trap" }))).unwrap();
    let call = stack
        .call_json(Export::Lifecycle, &input, None)
        .await
        .unwrap();
    assert_eq!(call.output, None);
    assert_eq!(call.failure.unwrap().code, "plugin_trap");
}

#[tokio::test]
async fn a_file_that_is_no_plugin_is_rejected_with_its_reason() {
    let home = Home::new();
    home.drop_file("text.wasm", b"hello");
    for (file, code) in [
        ("text.wasm", RejectionCode::NotWasm),
        ("missing.wasm", RejectionCode::Unreadable),
    ] {
        let error = load_file(&home.file(file), RuntimeLimits::default(), None)
            .await
            .unwrap_err();
        assert!(
            matches!(&error, FileError::Rejected { rejection, .. } if rejection.code == code),
            "{error}"
        );
    }
}

#[tokio::test]
async fn compiled_code_is_taken_from_a_cache_that_is_given() {
    let home = Home::new();
    let file = shipped().join("system-info.wasm");
    let limits = RuntimeLimits::default;
    let (_, first) = load_file(&file, limits(), Some(home.temp.path()))
        .await
        .unwrap();
    let (_, second) = load_file(&file, limits(), Some(home.temp.path()))
        .await
        .unwrap();
    assert!(!first.was_cached && second.was_cached);
}

fn disk(used_percent: u32) -> Vec<HostCall> {
    serde_json::from_value(json!([
        { "function": "probes.run", "elapsed_ms": 3,
          "arguments": { "server": "s1", "probe": "disk", "arguments": [], "timeout_ms": 5000 },
          "answer": { "ok": { "data": { "used_percent": used_percent, "path": "/" }, "text": "" } } }
    ]))
    .unwrap()
}

/// Which calls it makes is the plugin's business: what it made once is made again from the transcript.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diagnosis_is_made_again_from_its_transcript() {
    let (basics, _) = load("server-basics").await;
    let input = json!({ "subject": { "kind": "server", "id": "s1", "data": {} }, "parameters": {}, "items": [] });
    // Nothing is recorded: every probe is a difference, and the guest goes on.
    let empty = Arc::new(Transcript::default());
    let first = basics
        .call_json(Export::Diagnose, &input, Some(empty.clone()))
        .await
        .unwrap();
    assert!(!first.host_calls.is_empty());
    assert_eq!(empty.differences().len(), first.host_calls.len());
    assert!(first.output.is_some(), "{first:?}");

    let again = Arc::new(Transcript::new(first.host_calls.clone()));
    let second = basics
        .call_json(Export::Diagnose, &input, Some(again.clone()))
        .await
        .unwrap();
    assert_eq!(second.output, first.output);
    assert_eq!(again.differences(), []);

    // Other calls than recorded, and fewer.
    let mut longer = first.host_calls.clone();
    longer[0].arguments["server"] = json!("s2");
    longer.extend(disk(97));
    let other = Arc::new(Transcript::new(longer));
    basics
        .call_json(Export::Diagnose, &input, Some(other.clone()))
        .await
        .unwrap();
    let differences = other.differences();
    assert_eq!(differences.first().unwrap().index, 0);
    assert_eq!(
        differences[0].expected_arguments.as_ref().unwrap()["server"],
        "s2"
    );
    assert_eq!(differences.last().unwrap().function, None);
    assert_eq!(
        differences.last().unwrap().expected_function.as_deref(),
        Some("probes.run")
    );
    let _: Value = serde_json::to_value(&differences).unwrap();
}
