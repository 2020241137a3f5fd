//! `windlass plugin replay`: the calls of an exported journal made again, with a component of one's own.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Serialize;
use windlass_runtime::replay::{self, ReplayTotals, ReplayVerdict, Replayed};

use super::open::{LimitOptions, open, size, time};

/// What `windlass plugin replay` is told.
#[derive(Debug, Clone, Args)]
pub struct ReplayOptions {
    /// The exported journal (`GET /v1/plugin-calls/export`): one call a line.
    #[arg(long)]
    journal: PathBuf,
    /// Make the calls of another plugin again, too: its name.
    #[arg(long)]
    name: Option<String>,
    /// Print JSON: totals, and every call that is not equal.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    limits: LimitOptions,
    /// The component.
    file: PathBuf,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    totals: ReplayTotals,
    not_equal: Vec<Replayed>,
}

/// Makes the calls again and prints; answers whether all are equal.
pub(super) async fn replay(options: &ReplayOptions) -> anyhow::Result<bool> {
    let text = std::fs::read_to_string(&options.journal)
        .with_context(|| format!("{} cannot be read", options.journal.display()))?;
    let calls = replay::read_exported(&text)?;
    let (plugin, _) = open(&options.file, &options.limits).await?;
    let name = options
        .name
        .clone()
        .unwrap_or_else(|| plugin.reference().name.clone());
    let mut report = Report {
        totals: ReplayTotals::default(),
        not_equal: Vec::new(),
    };
    for call in calls.iter().filter(|call| call.summary.plugin.name == name) {
        let replayed = replay::replay(&plugin, call).await;
        report.totals.add(&replayed);
        if replayed.verdict != ReplayVerdict::Equal {
            report.not_equal.push(replayed);
        }
    }
    if report.totals.calls == 0 {
        bail!(
            "{} holds {} calls and none of `{name}`: export the journal of that plugin, or name another with --name",
            options.journal.display(),
            calls.len()
        );
    }
    if options.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    let totals = report.totals;
    Ok(totals.different == 0 && totals.failed == 0)
}

fn print(Report { totals, not_equal }: &Report) {
    for call in not_equal {
        let verdict = match call.verdict {
            ReplayVerdict::Equal => "equal",
            ReplayVerdict::Different => "different",
            ReplayVerdict::Failed => "failed",
            ReplayVerdict::NotComparable => "not comparable",
        };
        say!(
            "{} {} of {}@{}: {verdict}",
            call.call,
            call.export,
            call.recorded_with.name,
            call.recorded_with.version
        );
        if let Some(failure) = &call.failure {
            say!("  {}: {}", failure.code, failure.message);
        }
        let show = |value: &Option<serde_json::Value>| {
            value
                .as_ref()
                .map_or_else(|| "nothing".to_owned(), ToString::to_string)
        };
        for difference in &call.differences.first {
            say!(
                "  {}: {} → {}",
                difference.pointer,
                show(&difference.before),
                show(&difference.after)
            );
        }
        for host_call in &call.host_calls {
            say!(
                "  host call {}: {} → {}",
                host_call.index,
                host_call.expected_function.as_deref().unwrap_or("nothing"),
                host_call.function.as_deref().unwrap_or("nothing")
            );
        }
    }
    say!(
        "{} calls: {} equal, {} different, {} failed, {} not comparable",
        totals.calls,
        totals.equal,
        totals.different,
        totals.failed,
        totals.not_comparable
    );
    say!(
        "guest time {} → {}, peak memory {} → {}",
        time(totals.guest_time_before_us),
        time(totals.guest_time_us),
        size(totals.peak_memory_before_bytes),
        size(totals.peak_memory_bytes)
    );
}
