//! Making recorded calls again: the same input, host calls answered from their transcript, and what differs.
//!
//! The same bytes give the same answer, because a guest has no clock, no random numbers and no state: a difference between a
//! record and its replay with the recorded digest is a fault of the guest (WASI gives it neither) or of this host. With another
//! version it is what that version would have done. Nothing that is replayed is recorded, counted or made live.

mod diff;
mod transcript;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use windlass_domain::{id::CallId, manifest::PluginRef};

pub use diff::{Change, Difference, Differences, MAX_DIFFERENCES, compare};
pub use transcript::{HostCallDifference, Transcript};

use crate::{
    call::Export,
    error::{CallFailure, FailureReport},
    journal::JournaledCall,
    plugin::Plugin,
};

/// How a replay compares with its record.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum ReplayVerdict {
    /// The same answer after the same host calls, or the same failure.
    Equal,
    /// Another answer, or other host calls, or an answer where the record has a failure.
    Different,
    /// A failure where the record has an answer, or another failure.
    Failed,
    /// The record cannot be made again: its failure came from the host and not from the plugin, or its input is none for this
    /// plugin.
    NotComparable,
}

/// What a call cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Cost {
    /// Time that the guest computed, in microseconds.
    pub guest_time_us: u64,
    /// Peak of its linear memory, in bytes.
    pub memory_bytes: u64,
}

/// One call that was made again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Replayed {
    /// The recorded call.
    pub call: CallId,
    /// Its function.
    pub export: Export,
    /// What it was recorded with.
    pub recorded_with: PluginRef,
    /// What it was made again with.
    pub replayed_with: PluginRef,
    /// How they compare.
    pub verdict: ReplayVerdict,
    /// Where the answers differ.
    pub differences: Differences,
    /// Where the host calls differ.
    pub host_calls: Vec<HostCallDifference>,
    /// The record's failure.
    pub failure_before: Option<FailureReport>,
    /// The replay's failure, or why it could not be made.
    pub failure: Option<FailureReport>,
    /// What it cost then.
    pub cost_before: Cost,
    /// What it cost now; `null` when nothing was called.
    pub cost: Option<Cost>,
}

/// Makes a recorded call again, with this plugin.
pub async fn replay(plugin: &Plugin, call: &JournaledCall) -> Replayed {
    let summary = &call.summary;
    let mut replayed = Replayed {
        call: summary.id,
        export: summary.export,
        recorded_with: summary.plugin.clone(),
        replayed_with: plugin.reference().clone(),
        verdict: ReplayVerdict::NotComparable,
        differences: Differences::default(),
        host_calls: Vec::new(),
        failure_before: call.failure.clone(),
        failure: None,
        cost_before: Cost {
            guest_time_us: summary.guest_time_us,
            memory_bytes: summary.memory_bytes,
        },
        cost: None,
    };
    if call.failure.as_ref().is_some_and(is_of_the_host) {
        return replayed;
    }
    let transcript = Arc::new(Transcript::new(call.host_calls.clone()));
    let made = plugin
        .unrecorded()
        .call_json(summary.export, &call.input, Some(transcript.clone()))
        .await;
    let made = match made {
        Ok(made) => made,
        Err(error) => {
            replayed.failure = Some(error.failure.report());
            return replayed;
        }
    };
    replayed.cost = Some(Cost {
        guest_time_us: made.guest_time_us,
        memory_bytes: made.memory_bytes,
    });
    replayed.host_calls = transcript.differences();
    replayed.failure = made.failure;
    replayed.verdict = match (&call.failure, &replayed.failure) {
        (Some(before), Some(now)) if same_failure(before, now) => ReplayVerdict::Equal,
        (_, Some(_)) => ReplayVerdict::Failed,
        (before, None) => {
            let output = as_read(&made.output);
            replayed.differences = compare(&as_read(&call.output), &output);
            if before.is_none() && replayed.differences.is_empty() && replayed.host_calls.is_empty()
            {
                ReplayVerdict::Equal
            } else {
                ReplayVerdict::Different
            }
        }
    };
    replayed
}

/// Through text, as the record went: figures are the same on both sides.
fn as_read(output: &Option<Value>) -> Value {
    let text = serde_json::to_string(output).expect("JSON has string keys");
    serde_json::from_str(&text).expect("what was written as JSON can be read")
}

/// Failures that say nothing of the plugin: they depend on the host's load and time.
fn is_of_the_host(failure: &FailureReport) -> bool {
    let codes = [
        CallFailure::NotStarted {
            reason: String::new(),
        }
        .code(),
        CallFailure::CallTime { limit_ms: 0 }.code(),
        CallFailure::HostCallTime {
            function: "",
            limit_ms: 0,
        }
        .code(),
    ];
    codes.contains(&failure.code.as_str())
}

/// The guest's own words must be the same; where the engine speaks (traps with their frames, limits), the code is enough.
fn same_failure(before: &FailureReport, now: &FailureReport) -> bool {
    before.code == now.code && (before.code != REFUSED || before == now)
}

/// [`CallFailure::Refused`].
const REFUSED: &str = "plugin_refused";

/// Replays in figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ReplayTotals {
    /// Calls that were made again.
    pub calls: u64,
    /// Of these: the same answers.
    pub equal: u64,
    /// Other answers.
    pub different: u64,
    /// Failures where the record has none, or another.
    pub failed: u64,
    /// Not to be compared.
    pub not_comparable: u64,
    /// Guest time of the records that were compared, in microseconds.
    pub guest_time_before_us: u64,
    /// The same of their replays.
    pub guest_time_us: u64,
    /// Largest peak of memory of the records, in bytes.
    pub peak_memory_before_bytes: u64,
    /// The same of their replays.
    pub peak_memory_bytes: u64,
}

impl ReplayTotals {
    /// Adds those of other replays.
    pub fn join(&mut self, other: &Self) {
        self.calls += other.calls;
        self.equal += other.equal;
        self.different += other.different;
        self.failed += other.failed;
        self.not_comparable += other.not_comparable;
        self.guest_time_before_us += other.guest_time_before_us;
        self.guest_time_us += other.guest_time_us;
        self.peak_memory_before_bytes = self
            .peak_memory_before_bytes
            .max(other.peak_memory_before_bytes);
        self.peak_memory_bytes = self.peak_memory_bytes.max(other.peak_memory_bytes);
    }

    /// Counts one.
    pub fn add(&mut self, replayed: &Replayed) {
        self.calls += 1;
        match replayed.verdict {
            ReplayVerdict::Equal => self.equal += 1,
            ReplayVerdict::Different => self.different += 1,
            ReplayVerdict::Failed => self.failed += 1,
            ReplayVerdict::NotComparable => self.not_comparable += 1,
        }
        if let Some(cost) = replayed.cost {
            let before = replayed.cost_before;
            self.guest_time_before_us += before.guest_time_us;
            self.guest_time_us += cost.guest_time_us;
            self.peak_memory_before_bytes = self.peak_memory_before_bytes.max(before.memory_bytes);
            self.peak_memory_bytes = self.peak_memory_bytes.max(cost.memory_bytes);
        }
    }
}

/// Why a line of an exported journal is no call.
#[derive(Debug, thiserror::Error)]
#[error("line {line} of the exported journal is not a recorded call")]
pub struct NotACall {
    /// From 1.
    pub line: usize,
    /// What is wrong.
    #[source]
    pub source: serde_json::Error,
}

/// Reads an exported journal: one call a line; empty lines are skipped.
///
/// # Errors
/// [`NotACall`], with the number of the line.
pub fn read_exported(text: &str) -> Result<Vec<JournaledCall>, NotACall> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            serde_json::from_str(line).map_err(|source| NotACall {
                line: index + 1,
                source,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_compared_word_by_word_and_traps_by_their_code() {
        let refused = |message: &str| {
            CallFailure::Refused {
                code: "x".into(),
                message: message.into(),
                field: None,
            }
            .report()
        };
        let trap = |reason: &str| {
            CallFailure::Trap {
                reason: reason.into(),
            }
            .report()
        };
        assert_eq!(refused("a").code, REFUSED);
        assert!(same_failure(&refused("a"), &refused("a")));
        assert!(!same_failure(&refused("a"), &refused("b")));
        assert!(same_failure(&trap("a"), &trap("b")));
        assert!(!same_failure(&trap("a"), &refused("a")));
    }

    #[test]
    fn a_bad_line_of_an_export_is_named() {
        assert_eq!(read_exported("\n \n").unwrap(), []);
        assert_eq!(read_exported("\n{}").unwrap_err().line, 2);
    }
}
