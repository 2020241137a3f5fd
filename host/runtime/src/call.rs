//! What a call of a plugin is, to everyone who hears of it: its function, on whose behalf, what went in and out, what it used.
//!
//! A finished call goes to the [`CallSink`] as a [`CallRecord`]: for the journal, for figures, for comparisons. Making a record
//! costs the caller the writing of two JSON texts, and nothing where there is no sink.

use std::{
    fmt,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use windlass_domain::{manifest::PluginRef, plugin::PluginKind};

use crate::{error::FailureReport, state::HostCall};

/// A function that a plugin exports.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Export {
    /// Every kind: what it is.
    Describe,
    /// Tech stack: the steps of some phases.
    Lifecycle,
    /// Strategy: plans an order.
    Plan,
    /// Strategy: plans the way back.
    Rollback,
    /// Strategy: judges a stage.
    Judge,
    /// Public command: the script for one server.
    Render,
    /// Public command: what a run's output means.
    Interpret,
    /// Diagnostic: diagnoses.
    Diagnose,
}

impl Export {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Describe,
        Self::Lifecycle,
        Self::Plan,
        Self::Rollback,
        Self::Judge,
        Self::Render,
        Self::Interpret,
        Self::Diagnose,
    ];

    /// Its name in the contract.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Describe => "describe",
            Self::Lifecycle => "lifecycle",
            Self::Plan => "plan",
            Self::Rollback => "rollback",
            Self::Judge => "judge",
            Self::Render => "render",
            Self::Interpret => "interpret",
            Self::Diagnose => "diagnose",
        }
    }

    /// The functions of a kind, `describe` first.
    #[must_use]
    pub const fn of_kind(kind: PluginKind) -> &'static [Self] {
        match kind {
            PluginKind::TechStack => &[Self::Describe, Self::Lifecycle],
            PluginKind::DeploymentStrategy => {
                &[Self::Describe, Self::Plan, Self::Rollback, Self::Judge]
            }
            PluginKind::PublicCommand => &[Self::Describe, Self::Render, Self::Interpret],
            PluginKind::Diagnostic => &[Self::Describe, Self::Diagnose],
        }
    }
}

impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no function of a plugin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("plugins have no function `{text}`: the functions are {}", names())]
pub struct UnknownExport {
    /// The text, cut to 80 characters.
    pub text: String,
}

fn names() -> String {
    Export::ALL.map(Export::name).join(", ")
}

impl FromStr for Export {
    type Err = UnknownExport;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|export| export.name() == text)
            .ok_or_else(|| UnknownExport {
                text: text.chars().take(80).collect(),
            })
    }
}

/// On whose behalf a call is made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct CallContext {
    /// The principal's name, or `engine` where the platform acts by itself.
    pub caller: String,
    /// The order that it is made for, where there is one.
    #[serde(default)]
    pub order: Option<String>,
}

tokio::task_local! {
    static CONTEXT: Arc<CallContext>;
}

/// Makes the calls of `work` on somebody's behalf: their records say so. Holds for this task, not for tasks that it spawns.
pub async fn on_behalf_of<T>(context: CallContext, work: impl Future<Output = T>) -> T {
    CONTEXT.scope(Arc::new(context), work).await
}

/// Makes the calls of `work` for an order, on behalf of whom this task makes calls already, or else of the platform.
pub async fn for_order<T>(order: String, work: impl Future<Output = T>) -> T {
    let context = CallContext {
        caller: context().map_or_else(|| ENGINE.to_owned(), |context| context.caller.clone()),
        order: Some(order),
    };
    on_behalf_of(context, work).await
}

/// Who calls when nobody asked for it.
pub(crate) const ENGINE: &str = "engine";

/// On whose behalf this task makes calls.
pub(crate) fn context() -> Option<Arc<CallContext>> {
    CONTEXT.try_with(Arc::clone).ok()
}

/// What a call used.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Usage {
    /// From the start of the call to its answer, with waiting.
    pub elapsed: Duration,
    /// Time that the guest held a thread, with instantiating it; without waiting for host calls or for its turn.
    pub guest_time: Duration,
    /// Linear memory at the end, which is its peak, in bytes.
    pub memory_bytes: u64,
    /// Host calls that it made, with their answers, in order.
    pub host_calls: Vec<HostCall>,
}

/// One finished call. See [`CallSink`].
#[derive(Debug, Clone, PartialEq)]
pub struct CallRecord {
    /// Which plugin.
    pub plugin: PluginRef,
    /// Which function.
    pub export: Export,
    /// On whose behalf; `None`: the platform's own.
    pub context: Option<Arc<CallContext>>,
    /// What it was asked: JSON of the domain's request.
    pub input: String,
    /// What it answered: JSON of the domain's answer; or why there is no answer.
    pub outcome: Result<String, FailureReport>,
    /// Whether it failed by a fault of the plugin: no answer within its limits, or one that breaks the contract.
    pub is_fault: bool,
    /// What it used.
    pub usage: Usage,
}

/// Receives every finished call. Called on the caller's task: must not block.
pub trait CallSink: Send + Sync {
    /// One call ended.
    fn record(&self, record: &Arc<CallRecord>);
}

/// Several sinks, told one after the other.
pub struct Sinks(pub Vec<Arc<dyn CallSink>>);

impl CallSink for Sinks {
    fn record(&self, record: &Arc<CallRecord>) {
        for sink in &self.0 {
            sink.record(record);
        }
    }
}

/// How long a guest held a thread: runs while its call is polled. Read from inside the poll too, by the epoch's callback.
#[derive(Debug)]
pub(crate) struct GuestClock {
    origin: Instant,
    /// Nanoseconds of polls that ended.
    before: AtomicU64,
    /// Start of the poll that runs, in nanoseconds since `origin`; [`PAUSED`] outside of one.
    since: AtomicU64,
}

const PAUSED: u64 = u64::MAX;

impl Default for GuestClock {
    fn default() -> Self {
        Self {
            origin: Instant::now(),
            before: AtomicU64::new(0),
            since: AtomicU64::new(PAUSED),
        }
    }
}

impl GuestClock {
    pub(crate) fn resume(&self) {
        self.since.store(self.now(), Ordering::Relaxed);
    }

    pub(crate) fn pause(&self) {
        self.before.store(self.used_nanos(), Ordering::Relaxed);
        self.since.store(PAUSED, Ordering::Relaxed);
    }

    pub(crate) fn used(&self) -> Duration {
        Duration::from_nanos(self.used_nanos())
    }

    fn used_nanos(&self) -> u64 {
        let before = self.before.load(Ordering::Relaxed);
        match self.since.load(Ordering::Relaxed) {
            PAUSED => before,
            since => before.saturating_add(self.now().saturating_sub(since)),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(PAUSED - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_export_has_its_name_and_belongs_to_a_kind() {
        for export in Export::ALL {
            assert_eq!(export.name().parse(), Ok(export));
            assert_eq!(serde_json::to_value(export).unwrap(), export.name());
            assert!(
                [
                    PluginKind::TechStack,
                    PluginKind::DeploymentStrategy,
                    PluginKind::PublicCommand,
                    PluginKind::Diagnostic
                ]
                .into_iter()
                .any(|kind| Export::of_kind(kind).contains(&export))
            );
        }
        let error = "deploy".parse::<Export>().unwrap_err();
        assert!(error.to_string().contains("lifecycle"), "{error}");
    }

    #[test]
    fn a_guests_clock_stands_while_it_is_not_polled() {
        let clock = GuestClock::default();
        clock.resume();
        while clock.used() < Duration::from_micros(50) {}
        clock.pause();
        let used = clock.used();
        assert!(used >= Duration::from_micros(50));
        assert_eq!(clock.used(), used);
    }
}
