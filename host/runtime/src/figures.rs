//! Figures of plugins: how often each was called, how long it took, how it failed; and which version fails again and again.
//!
//! Kept in memory since the server started, per digest. A version that failed [`FAILURES_IN_A_ROW`] times in a row on one
//! function is reported once per row, by [`Figures::failing`]: what follows is decided by whoever listens, and nothing is
//! switched here. Refusals count as answers: the plugin did its work.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use windlass_domain::{Timestamp, digest::Digest, manifest::PluginRef};

use crate::{
    call::{CallRecord, CallSink, Export},
    error::FailureReport,
    json::micros,
};

/// So many failures in a row on one function make a version failing.
pub const FAILURES_IN_A_ROW: u32 = 5;
/// Reports that wait for whoever listens; there are few, and one that is lost comes again with the next failure.
const REPORTS: usize = 64;

/// Figures of one plugin version, since the server started.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PluginFigures {
    /// Finished calls.
    pub calls: u64,
    /// Failed calls, by the code of the failure; refusals (`plugin_refused`) are among them.
    pub failures: BTreeMap<String, u64>,
    /// Half of the calls took less time, in microseconds, with waiting; exact to 7 %.
    pub p50_us: u64,
    /// 99 of 100 calls took less.
    pub p99_us: u64,
    /// Time that all calls computed, in microseconds.
    pub guest_time_us: u64,
    /// Largest peak of memory of a call, in bytes.
    pub peak_memory_bytes: u64,
    /// The last failure that was the plugin's fault.
    pub last_error: Option<LastError>,
}

/// The last failure of a plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LastError {
    /// When.
    pub at: Timestamp,
    /// Of which function.
    pub export: Export,
    /// What happened.
    pub failure: FailureReport,
}

/// A version that failed again and again on one function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Failing {
    /// Which version.
    pub plugin: PluginRef,
    /// Which function.
    pub export: Export,
    /// When it failed last.
    pub at: Timestamp,
    /// How often in a row.
    pub failures: u32,
    /// The last failure.
    pub failure: FailureReport,
}

/// Counts calls. One of the sinks of the registry.
pub struct Figures {
    now: fn() -> Timestamp,
    plugins: Mutex<HashMap<Digest, Counted>>,
    reports: mpsc::Sender<Failing>,
}

struct Counted {
    plugin: PluginRef,
    calls: u64,
    failures: BTreeMap<String, u64>,
    times: Histogram,
    guest_time: Duration,
    peak_memory_bytes: u64,
    last_error: Option<LastError>,
    in_a_row: HashMap<Export, u32>,
}

impl Figures {
    /// With the clock; and the reports of versions that fail again and again.
    #[must_use]
    pub fn new(now: fn() -> Timestamp) -> (Arc<Self>, mpsc::Receiver<Failing>) {
        let (reports, failing) = mpsc::channel(REPORTS);
        let figures = Arc::new(Self {
            now,
            plugins: Mutex::default(),
            reports,
        });
        (figures, failing)
    }

    /// The figures of one version; all zero when it was not called.
    #[must_use]
    pub fn of(&self, digest: Digest) -> PluginFigures {
        self.plugins
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&digest)
            .map(Counted::figures)
            .unwrap_or_default()
    }

    /// The figures of every version that was called.
    #[must_use]
    pub fn all(&self) -> Vec<(PluginRef, PluginFigures)> {
        let mut all: Vec<_> = self
            .plugins
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(|counted| (counted.plugin.clone(), counted.figures()))
            .collect();
        all.sort_by(|one, two| one.0.cmp(&two.0));
        all
    }

    /// Begins to count failures in a row anew: an operator looked at it.
    pub fn forget_row(&self, digest: Digest) {
        if let Some(counted) = self
            .plugins
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_mut(&digest)
        {
            counted.in_a_row.clear();
        }
    }
}

impl CallSink for Figures {
    fn record(&self, record: &Arc<CallRecord>) {
        let mut plugins = self.plugins.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = plugins
            .entry(record.plugin.digest)
            .or_insert_with(|| Counted::new(record.plugin.clone()));
        counted.calls += 1;
        counted.times.add(micros(record.usage.elapsed));
        counted.guest_time += record.usage.guest_time;
        counted.peak_memory_bytes = counted.peak_memory_bytes.max(record.usage.memory_bytes);
        let Err(failure) = &record.outcome else {
            counted.in_a_row.remove(&record.export);
            return;
        };
        *counted.failures.entry(failure.code.clone()).or_default() += 1;
        if record.is_fault {
            let at = (self.now)();
            counted.last_error = Some(LastError {
                at,
                export: record.export,
                failure: failure.clone(),
            });
            let in_a_row = counted.in_a_row.entry(record.export).or_default();
            *in_a_row = in_a_row.saturating_add(1);
            if *in_a_row >= FAILURES_IN_A_ROW {
                let report = Failing {
                    plugin: record.plugin.clone(),
                    export: record.export,
                    at,
                    failures: *in_a_row,
                    failure: failure.clone(),
                };
                let _full_then_the_next_failure_reports = self.reports.try_send(report);
            }
        } else if failure.code == "plugin_refused" {
            counted.in_a_row.remove(&record.export);
        }
    }
}

impl Counted {
    fn new(plugin: PluginRef) -> Self {
        Self {
            plugin,
            calls: 0,
            failures: BTreeMap::new(),
            times: Histogram::default(),
            guest_time: Duration::ZERO,
            peak_memory_bytes: 0,
            last_error: None,
            in_a_row: HashMap::new(),
        }
    }

    fn figures(&self) -> PluginFigures {
        PluginFigures {
            calls: self.calls,
            failures: self.failures.clone(),
            p50_us: self.times.percentile(50),
            p99_us: self.times.percentile(99),
            guest_time_us: micros(self.guest_time),
            peak_memory_bytes: self.peak_memory_bytes,
            last_error: self.last_error.clone(),
        }
    }
}

/// Times by size: eight steps for each doubling, so that a figure is at most 7 % off. 2.5 KB a plugin.
struct Histogram {
    counts: Box<[u64; STEPS]>,
}

const STEPS_PER_DOUBLING: usize = 8;
/// Up to 2^40 µs, which is twelve days.
const STEPS: usize = 40 * STEPS_PER_DOUBLING;

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: Box::new([0; STEPS]),
        }
    }
}

impl Histogram {
    fn add(&mut self, time_us: u64) {
        let index = step_of(time_us);
        self.counts[index] = self.counts[index].saturating_add(1);
    }

    /// The middle of the step that holds this share of the times; 0 when there are none.
    fn percentile(&self, percent: u64) -> u64 {
        let total: u64 = self.counts.iter().sum();
        let wanted = (total * percent).div_ceil(100);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted && *count > 0 {
                return middle_of(index);
            }
        }
        0
    }
}

fn step_of(time_us: u64) -> usize {
    let time_us = time_us.max(1);
    let doubling = time_us.ilog2() as usize;
    // The three bits below the highest one.
    let below = match doubling {
        0..=2 => (time_us << (3 - doubling)) & 7,
        _ => (time_us >> (doubling - 3)) & 7,
    };
    (doubling * STEPS_PER_DOUBLING + usize::try_from(below).unwrap_or(0)).min(STEPS - 1)
}

fn middle_of(step: usize) -> u64 {
    let (doubling, below) = (step / STEPS_PER_DOUBLING, step % STEPS_PER_DOUBLING);
    let from = ((8 + below as u64) << doubling) >> 3;
    let to = ((9 + below as u64) << doubling) >> 3;
    (from + to.max(from + 1)) / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{call::Usage, error::CallFailure};

    #[test]
    fn times_are_exact_to_seven_percent() {
        for time in (0..400).map(|power| 1.07_f64.powi(power) as u64) {
            let time = time.clamp(8, 1 << 39);
            let middle = middle_of(step_of(time));
            assert!(
                (middle as f64 - time as f64).abs() <= 0.07 * time as f64,
                "{time}: {middle}"
            );
        }
        let mut times = Histogram::default();
        assert_eq!(times.percentile(99), 0);
        (1..=1000).for_each(|time| times.add(time));
        assert!(times.percentile(50).abs_diff(500) < 40);
        assert!(times.percentile(99).abs_diff(990) < 70);
    }

    #[test]
    fn five_faults_in_a_row_are_reported_and_refusals_are_none() {
        let (figures, mut failing) = Figures::new(|| Timestamp::from_unix_ms(1));
        let plugin = PluginRef {
            name: "p".into(),
            version: semver::Version::new(1, 0, 0),
            digest: Digest::of(b"p"),
        };
        let call = |export: Export, failure: Option<CallFailure>| {
            figures.record(&Arc::new(CallRecord {
                plugin: plugin.clone(),
                export,
                context: None,
                input: "{}".into(),
                is_fault: failure.as_ref().is_some_and(CallFailure::is_fault),
                outcome: match failure {
                    Some(failure) => Err(failure.report()),
                    None => Ok("{}".into()),
                },
                usage: Usage::default(),
            }));
        };
        let trap = || {
            Some(CallFailure::Trap {
                reason: "unreachable".into(),
            })
        };
        let refusal = || {
            Some(CallFailure::Refused {
                code: "no".into(),
                message: "no".into(),
                field: None,
            })
        };
        for _ in 0..4 {
            call(Export::Plan, trap());
            call(Export::Judge, trap());
        }
        call(Export::Judge, refusal());
        call(Export::Judge, trap());
        assert!(failing.try_recv().is_err(), "a refusal ends a row");
        call(Export::Plan, trap());
        let report = failing.try_recv().unwrap();
        assert_eq!((report.export, report.failures), (Export::Plan, 5));
        assert_eq!(report.failure.code, "plugin_trap");

        call(Export::Plan, None);
        for _ in 0..4 {
            call(Export::Plan, trap());
        }
        assert!(failing.try_recv().is_err(), "an answer ends a row");
        figures.forget_row(plugin.digest);
        call(Export::Plan, trap());
        assert!(failing.try_recv().is_err(), "an operator ends a row");

        let seen = figures.of(plugin.digest);
        assert_eq!(seen.calls, 17);
        assert_eq!(seen.failures["plugin_trap"], 15);
        assert_eq!(seen.failures["plugin_refused"], 1);
        assert_eq!(seen.last_error.unwrap().export, Export::Plan);
        assert_eq!(figures.all().len(), 1);
    }
}
