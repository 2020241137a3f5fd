//! `windlass plugin call`: one function of a component, called here.

use std::{path::PathBuf, sync::Arc};

use clap::Args;
use windlass_runtime::{
    Export,
    conformance::{FixtureHost, request_with},
};

use super::open::{LimitOptions, fixture, json_argument, open, size, time};

/// What `windlass plugin call` is told.
#[derive(Debug, Clone, Args)]
pub struct CallOptions {
    /// The request: JSON, or @file. Fields that are left out are those of an ordinary request (three servers, a release in
    /// version 2).
    #[arg(long, default_value = "{}")]
    input: String,
    /// Answers of the platform for a diagnostic: a file with a list of {function, arguments, answer}, or recorded host calls.
    #[arg(long)]
    fixture: Option<PathBuf>,
    /// Print the whole request on standard error before the call.
    #[arg(long)]
    show_input: bool,
    /// Print everything as JSON: answer or failure, time, memory, host calls.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    limits: LimitOptions,
    /// The component.
    file: PathBuf,
    /// The function: describe, lifecycle, plan, rollback, judge, render, interpret, diagnose.
    export: Export,
}

/// Calls and prints; answers whether there was an answer.
pub(super) async fn call(options: &CallOptions) -> anyhow::Result<bool> {
    let given = json_argument("--input", &options.input)?;
    let answers = options
        .fixture
        .as_deref()
        .map(fixture)
        .transpose()?
        .unwrap_or_default();
    let (plugin, _) = open(&options.file, &options.limits).await?;
    let input = request_with(options.export, &given);
    if options.show_input {
        eprintln!("{}", serde_json::to_string_pretty(&input)?);
    }
    if let Some(parameters) = input.get("parameters")
        && let Err(faults) = plugin.validate_parameters(parameters)
    {
        // A server refuses these before it calls.
        for fault in faults {
            eprintln!("a server would refuse these parameters: {fault}");
        }
    }
    let host = Arc::new(FixtureHost::new(answers));
    let call = plugin.call_json(options.export, &input, Some(host)).await?;
    if options.json {
        say!("{}", serde_json::to_string_pretty(&call)?);
        return Ok(call.failure.is_none());
    }
    for look in &call.host_calls {
        eprintln!("{} {} → {}", look.function, look.arguments, look.answer);
    }
    match (&call.output, &call.failure) {
        (Some(output), _) => say!("{}", serde_json::to_string_pretty(output)?),
        (None, Some(failure)) => eprintln!(
            "{}: {}{}",
            failure.code,
            failure.message,
            failure
                .field
                .as_ref()
                .map_or_else(String::new, |field| format!(" (at {field})"))
        ),
        (None, None) => {}
    }
    eprintln!(
        "{} of guest time, {} of memory",
        time(call.guest_time_us),
        size(call.memory_bytes)
    );
    Ok(call.failure.is_none())
}
