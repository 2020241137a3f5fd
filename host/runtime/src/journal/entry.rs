//! One call as the journal keeps it: a line of JSON, the summary's fields first.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use windlass_domain::{Timestamp, id::CallId, manifest::PluginRef};

use crate::{
    call::{CallRecord, ENGINE, Export},
    error::FailureReport,
    json::micros,
    state::HostCall,
};

/// The outcome of a call that answered; others have the code of their failure.
pub const OUTCOME_OK: &str = "ok";

/// A recorded call without what went in and out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct CallSummary {
    /// Rises with every call.
    pub id: CallId,
    /// When it ended.
    pub at: Timestamp,
    /// Which plugin.
    pub plugin: PluginRef,
    /// Which function.
    pub export: Export,
    /// The principal's name, or `engine` where the platform acted by itself.
    pub caller: String,
    /// The order that it was made for, where there is one.
    pub order: Option<String>,
    /// `ok`, or the code of the failure.
    pub outcome: String,
    /// Time that the guest computed, in microseconds.
    pub guest_time_us: u64,
    /// From the start to the answer, with waiting, in microseconds.
    pub elapsed_us: u64,
    /// Peak of its linear memory, in bytes.
    pub memory_bytes: u64,
}

/// A recorded call. Secrets are references in it, as in everything that a plugin is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct JournaledCall {
    /// Who, when, how it ended.
    #[serde(flatten)]
    pub summary: CallSummary,
    /// What it was asked.
    pub input: Value,
    /// Host calls that it made, with their answers, in order.
    pub host_calls: Vec<HostCall>,
    /// What it answered; `null` when it failed.
    pub output: Option<Value>,
    /// Why it gave no answer; `null` when it did.
    pub failure: Option<FailureReport>,
}

impl JournaledCall {
    /// A call that ended just now, as the journal would give it back.
    ///
    /// # Errors
    /// When what went in or out is not JSON, which a record of this runtime rules out.
    pub fn of(id: CallId, at: Timestamp, record: &CallRecord) -> Result<Self, serde_json::Error> {
        let (output, failure) = match &record.outcome {
            Ok(output) => (Some(serde_json::from_str(output)?), None),
            Err(failure) => (None, Some(failure.clone())),
        };
        Ok(Self {
            summary: CallSummary::of(id, at, record),
            input: serde_json::from_str(&record.input)?,
            host_calls: record.usage.host_calls.clone(),
            output,
            failure,
        })
    }
}

impl CallSummary {
    pub(super) fn of(id: CallId, at: Timestamp, record: &CallRecord) -> Self {
        let (caller, order) = match &record.context {
            Some(context) => (context.caller.clone(), context.order.clone()),
            None => (ENGINE.to_owned(), None),
        };
        Self {
            id,
            at,
            plugin: record.plugin.clone(),
            export: record.export,
            caller,
            order,
            outcome: match &record.outcome {
                Ok(_) => OUTCOME_OK.to_owned(),
                Err(failure) => failure.code.clone(),
            },
            guest_time_us: micros(record.usage.guest_time),
            elapsed_us: micros(record.usage.elapsed),
            memory_bytes: record.usage.memory_bytes,
        }
    }
}

/// Appends the line of a call. Input and output are JSON already, and are not read again.
pub(super) fn write_line(line: &mut Vec<u8>, summary: &CallSummary, record: &CallRecord) {
    const KEYS: &str = "records have string keys";
    let start = line.len();
    serde_json::to_writer(&mut *line, summary).expect(KEYS);
    debug_assert_eq!(line.last(), Some(&b'}'), "a summary is an object");
    line.truncate(line.len().max(start + 1) - 1);
    line.extend_from_slice(b",\"input\":");
    line.extend_from_slice(record.input.as_bytes());
    line.extend_from_slice(b",\"host_calls\":");
    serde_json::to_writer(&mut *line, &record.usage.host_calls).expect(KEYS);
    let (output, failure) = match &record.outcome {
        Ok(output) => (output.as_str(), None),
        Err(failure) => ("null", Some(failure)),
    };
    line.extend_from_slice(b",\"output\":");
    line.extend_from_slice(output.as_bytes());
    line.extend_from_slice(b",\"failure\":");
    serde_json::to_writer(&mut *line, &failure).expect(KEYS);
    line.extend_from_slice(b"}\n");
}

/// Bytes that a record holds, for the bound of the queue.
pub(super) fn weight(record: &CallRecord) -> usize {
    const FIXED: usize = 512;
    let host_calls = record.usage.host_calls.len().saturating_mul(512);
    let output = record.outcome.as_ref().map_or(0, String::len);
    FIXED + record.input.len() + output + host_calls
}

/// Which calls.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallFilter {
    /// Of this plugin.
    pub plugin: Option<String>,
    /// Of this version of it.
    pub version: Option<semver::Version>,
    /// Of exactly these bytes.
    pub digest: Option<windlass_domain::Digest>,
    /// Of this function.
    pub export: Option<Export>,
    /// That ended so: `ok`, `failed` for everything else, or the code of a failure.
    pub outcome: Option<String>,
    /// For this order.
    pub order: Option<String>,
    /// That ended then or later.
    pub from: Option<Timestamp>,
    /// That ended before.
    pub to: Option<Timestamp>,
}

impl CallFilter {
    pub(super) fn wants(&self, call: &CallSummary) -> bool {
        fn fits<T: PartialEq + ?Sized>(wanted: Option<&T>, is: &T) -> bool {
            wanted.is_none_or(|wanted| wanted == is)
        }
        fits(self.plugin.as_deref(), call.plugin.name.as_str())
            && fits(self.version.as_ref(), &call.plugin.version)
            && fits(self.digest.as_ref(), &call.plugin.digest)
            && fits(self.export.as_ref(), &call.export)
            && self
                .outcome
                .as_deref()
                .is_none_or(|wanted| outcome_fits(wanted, &call.outcome))
            && self
                .order
                .as_deref()
                .is_none_or(|wanted| call.order.as_deref() == Some(wanted))
            && self.from.is_none_or(|from| call.at >= from)
            && self.to.is_none_or(|to| call.at < to)
    }
}

pub(super) fn outcome_fits(wanted: &str, outcome: &str) -> bool {
    match wanted {
        "failed" => outcome != OUTCOME_OK,
        wanted => outcome == wanted,
    }
}
