//! `windlass plugin check`: what a file is, and what it costs.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use windlass_domain::plugin::Descriptor;
use windlass_runtime::{
    Export, FailureReport, LoadReport,
    conformance::{self, Finding, Severity},
};

use super::{
    new::code,
    open::{LimitOptions, open, size, time},
};

/// What `windlass plugin check` is told.
#[derive(Debug, Clone, Args)]
pub struct CheckOptions {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    limits: LimitOptions,
    /// The component.
    file: PathBuf,
}

/// All of it, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    /// What loading showed.
    load: LoadReport,
    /// What the plugin says of itself.
    descriptor: Descriptor,
    /// What sample calls cost.
    budget: Vec<Cost>,
    /// What a server finds when it loads the plugin.
    findings: Vec<Finding>,
}

/// One sample call.
#[derive(Debug, Serialize)]
struct Cost {
    export: Export,
    guest_time_us: u64,
    memory_bytes: u64,
    answer_bytes: usize,
    failure: Option<FailureReport>,
}

/// Servers of the sample calls.
const SERVERS: usize = 10;

/// Prints it; answers whether the plugin is in order.
pub(super) async fn check(options: &CheckOptions) -> anyhow::Result<bool> {
    let (plugin, load) = open(&options.file, &options.limits).await?;
    let parameters = conformance::fitting_parameters(&plugin, 1)
        .pop()
        .unwrap_or_else(|| serde_json::json!({}));
    let mut budget = Vec::new();
    for export in Export::of_kind(plugin.kind()) {
        if *export == Export::Describe {
            continue;
        }
        let input = conformance::ordinary_request(*export, &parameters, SERVERS);
        let host = std::sync::Arc::new(conformance::FixtureHost::new(Vec::new()));
        let call = plugin.call_json(*export, &input, Some(host)).await?;
        budget.push(Cost {
            export: *export,
            guest_time_us: call.guest_time_us,
            memory_bytes: call.memory_bytes,
            answer_bytes: call.output.map_or(0, |output| output.to_string().len()),
            failure: call.failure,
        });
    }
    let report = Report {
        load,
        descriptor: plugin.descriptor().as_ref().clone(),
        budget,
        findings: conformance::quick(&plugin).await,
    };
    if options.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(report
        .findings
        .iter()
        .all(|finding| finding.severity < Severity::Failed))
}

fn print(report: &Report) {
    let Report {
        load, descriptor, ..
    } = report;
    let line = |name: &str, value: &str| say!("{name:<12}{value}");
    let list = |values: &[String]| {
        if values.is_empty() {
            "none".to_owned()
        } else {
            values.join(", ")
        }
    };
    line("name", &descriptor.name);
    line("version", &descriptor.version.to_string());
    line("kind", code(load.kind));
    line("contract", &format!("windlass:plugin@{}", load.contract));
    line("title", &descriptor.title);
    line("digest", &load.digest.to_string());
    line("size", &size(load.size_bytes));
    line("imports", &list(&load.imports));
    line("exports", &list(&load.exports));
    line(
        "systems",
        &if descriptor.operating_systems.is_empty() {
            "any".into()
        } else {
            list(&descriptor.operating_systems)
        },
    );
    line("users", &list(&descriptor.wishes.users));
    line("paths", &list(&descriptor.wishes.path_roots));
    if !descriptor.items.is_empty() {
        let items: Vec<_> = descriptor
            .items
            .iter()
            .map(|item| item.code.clone())
            .collect();
        line("items", &list(&items));
    }
    line("schema", &size(load.schema_bytes));
    let required: Vec<&str> = descriptor.parameters["required"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(serde_json::Value::as_str)
        .collect();
    for (name, property) in descriptor.parameters["properties"]
        .as_object()
        .into_iter()
        .flatten()
    {
        let kind = property["type"].as_str().unwrap_or("any");
        let needed = if required.contains(&name.as_str()) {
            ", required"
        } else {
            ""
        };
        let text = property["description"].as_str().unwrap_or("");
        say!("  {name} ({kind}{needed}) {text}");
    }
    say!("");
    say!(
        "{:<12}{:>12}{:>12}{:>12}",
        "budget",
        "time",
        "memory",
        "answer"
    );
    let compile = if load.was_cached { "from cache" } else { "" };
    say!(
        "{:<12}{:>12}{:>12}  {compile}",
        "compile",
        time(load.compile_us),
        ""
    );
    say!(
        "{:<12}{:>12}{:>12}",
        "describe",
        time(load.describe_us),
        size(load.describe_memory_bytes)
    );
    for cost in &report.budget {
        say!(
            "{:<12}{:>12}{:>12}{:>12}{}",
            cost.export.name(),
            time(cost.guest_time_us),
            size(cost.memory_bytes),
            size(cost.answer_bytes as u64),
            cost.failure
                .as_ref()
                .map_or_else(String::new, |failure| format!("  {}", failure.message)),
        );
    }
    for finding in &report.findings {
        say!("\n{}", finding.text);
    }
}
