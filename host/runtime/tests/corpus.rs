//! Plugins of published versions still load and answer as they did, and the contract changed only in ways that they survive.
//!
//! Made-up evolutions prove both: components built from a contract that differs in one place meet the real host.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{
    collections::BTreeSet,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use serde_json::Value;
use support::root;
use windlass_runtime::{
    FileError, Rejection, RejectionCode, RuntimeLimits,
    compatibility::{Effect, WitPackage, compare},
    conformance::{Sample, examine},
    load_file,
};
use wit_component::{ComponentEncoder, StringEncoding, dummy_module, embed_component_metadata};
use wit_parser::{LiftLowerAbi, ManglingAndAbi, Resolve};

fn limits() -> RuntimeLimits {
    RuntimeLimits {
        calls_at_once: 4,
        ..RuntimeLimits::default()
    }
}

fn releases() -> Vec<PathBuf> {
    let mut releases: Vec<PathBuf> = fs::read_dir(root().join("tests/corpus"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    releases.sort();
    assert!(!releases.is_empty());
    releases
}

fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(extension))
        .collect();
    files.sort();
    assert!(
        !files.is_empty(),
        "{} holds no {extension}",
        directory.display()
    );
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guests_of_published_versions_answer_as_they_did() {
    let temp = tempfile::tempdir().unwrap();
    for release in releases() {
        for packed in files(&release.join("guests"), ".wasm.gz") {
            let mut bytes = Vec::new();
            flate2::read::GzDecoder::new(fs::File::open(&packed).unwrap())
                .read_to_end(&mut bytes)
                .unwrap();
            let file = temp.path().join("guest.wasm");
            fs::write(&file, &bytes).unwrap();
            let (plugin, report) = load_file(&file, limits(), None)
                .await
                .unwrap_or_else(|error| panic!("{}: {error}", packed.display()));
            assert_eq!(report.contract, "1.0.0");
            let calls = packed.to_string_lossy().replace(".wasm.gz", ".json");
            let samples: Vec<Sample> =
                serde_json::from_str(&fs::read_to_string(&calls).unwrap()).unwrap();
            assert!(!samples.is_empty());
            let examination = examine(&plugin, &samples, None).await;
            let rule = |name: &str| {
                let rules = serde_json::to_value(&examination.rules).unwrap();
                rules
                    .as_array()
                    .unwrap()
                    .iter()
                    .find(|rule| rule["rule"] == name)
                    .unwrap()
                    .clone()
            };
            assert_eq!(
                rule("samples")["severity"],
                "passed",
                "{calls}: {:#}",
                rule("samples")
            );
            assert_eq!(
                rule("determinism")["severity"],
                "passed",
                "{calls}: {:#}",
                rule("determinism")
            );
        }
    }
}

/// Items that `wit/README.md` lists as changed before 1.0 in a way that breaks plugins.
fn listed() -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("wit/README.md")).unwrap();
    let (_, table) = text
        .split_once("| item | change that breaks plugins |")
        .unwrap();
    table
        .lines()
        .skip(1)
        .take_while(|line| line.starts_with('|'))
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(item, _)| item.to_owned())
        .collect()
}

#[test]
fn the_contract_changed_only_in_ways_that_published_plugins_survive() {
    let is_frozen = env!("CARGO_PKG_VERSION_MAJOR") != "0";
    let now = WitPackage::read(&root().join("wit")).unwrap();
    for release in releases() {
        let then = WitPackage::read(&release.join("wit")).unwrap();
        for change in compare(&then, &now).unwrap() {
            let is_allowed = change.effect == Effect::Survives
                || (!is_frozen && listed().contains(&change.item));
            assert!(
                is_allowed,
                "since {}: {change}. Before 1.0 list `{}` in wit/README.md; from 1.0 on it must not be",
                release.display(),
                change.item
            );
        }
    }
}

/// The present contract as one text.
fn contract() -> String {
    files(&root().join("wit"), ".wit")
        .iter()
        .map(|file| fs::read_to_string(file).unwrap())
        .collect::<Vec<_>>()
        .join("\n")
}

/// A component of a world that was built from another contract: every function is there and traps.
fn guest_of(contract: &str, world: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    // The head of the package must come first; files are joined in any order.
    let head = "package windlass:plugin@1.0.0;";
    let text = format!("{head}\n{}", contract.replacen(head, "", 1));
    let package = resolve.push_source("contract.wit", &text).unwrap();
    let world = resolve.packages[package].worlds[world];
    let mut module = dummy_module(&resolve, world, ManglingAndAbi::Legacy(LiftLowerAbi::Sync));
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).unwrap();
    ComponentEncoder::default()
        .module(&module)
        .unwrap()
        .encode()
        .unwrap()
}

/// How the real host takes it. A guest that links is asked what it is, and traps: `DescribeFailed` means that it linked.
async fn taken(contract: &str, world: &str) -> RejectionCode {
    rejected(contract, world).await.code
}

async fn rejected(contract: &str, world: &str) -> Rejection {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("guest.wasm");
    fs::write(&file, guest_of(contract, world)).unwrap();
    match load_file(&file, limits(), None).await {
        Err(FileError::Rejected { rejection, .. }) => rejection,
        other => panic!("a guest that traps was taken: {other:?}"),
    }
}

/// A strategy that could release and never roll back is not taken, and the reason names what it lacks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strategy_without_a_rollback_is_not_taken() {
    let rejection = rejected(&without(&contract(), ROLLBACK), "deployment-strategy").await;
    assert_eq!(rejection.code, RejectionCode::MissingExport, "{rejection}");
    assert!(rejection.to_string().contains("`rollback`"), "{rejection}");
}

fn without(contract: &str, text: &str) -> String {
    assert_eq!(
        contract.matches(text).count(),
        1,
        "`{text}` must stand in the contract once"
    );
    contract.replace(text, "")
}

const CONNECT: &str = "    connect: func(from-server: string, to: endpoint, timeout-ms: u64) -> result<connection, plugin-error>;";
const ROLLBACK: &str = "    rollback: func(request: plan-request, progress: list<unit-progress>) -> result<release-plan, plugin-error>;";
const JUDGE: &str = "    judge: func(request: judge-request) -> result<judgement, plugin-error>;";
const DROPPED: &str = "        dropped-bytes: u64,";
const TRACE: &str = "        trace,";
const LOG: &str = "    log: func(level: level, message: string, fields: attributes);";

/// The guest is older than the host: what the host has more of is the evolution.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_old_guests_fare_as_the_check_says() {
    let now = contract();
    let new = WitPackage::parse("new.wit", &headed(&now)).unwrap();
    for (what, world, then, links) in [
        ("nothing", "diagnostic", now.clone(), true),
        (
            "a function added to an imported interface",
            "diagnostic",
            without(&now, CONNECT),
            true,
        ),
        (
            "a function added to an exported interface",
            "deployment-strategy",
            without(&now, JUDGE),
            false,
        ),
        (
            "a record field added",
            "public-command",
            without(&now, DROPPED),
            false,
        ),
        (
            "an enum case added",
            "public-command",
            without(&now, TRACE),
            false,
        ),
        (
            "a function removed from an imported interface",
            "public-command",
            now.replace(LOG, &format!("{LOG}\n    flush: func();")),
            false,
        ),
    ] {
        let code = taken(&then, world).await;
        assert_eq!(
            code == RejectionCode::DescribeFailed,
            links,
            "{what}: {code:?}"
        );
        // And the check by text says the same.
        let old = WitPackage::parse("old.wit", &headed(&then)).unwrap();
        let breaks = compare(&old, &new)
            .unwrap()
            .iter()
            .any(|change| change.effect == Effect::Breaks);
        assert_eq!(breaks, !links, "{what}");
    }
}

fn headed(contract: &str) -> String {
    let head = "package windlass:plugin@1.0.0;";
    format!("{head}\n{}", contract.replacen(head, "", 1))
}

/// What the corpus's calls answer is not empty by accident.
#[test]
fn every_call_of_the_corpus_says_what_it_must_answer() {
    for release in releases() {
        for file in files(&release.join("guests"), ".json") {
            let calls: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
            for call in calls.as_array().unwrap() {
                assert!(!call["expect"].is_null(), "{}: {call}", file.display());
            }
        }
    }
}
