//! Crash points: places where a test lets the agent die, as if the power of its process were cut.
//!
//! `WINDLASS_CRASH_AT=<n>` ends the process with SIGKILL at the n-th point that it passes (from 1);
//! `WINDLASS_CRASH_AT=<name>:<n>` at the n-th pass of the point of that name. `WINDLASS_CRASH_LOG=<file>` appends the name of
//! each point that is passed, one per line. Without these variables a point costs one load of an atomic.

use std::{
    collections::HashMap,
    io::Write as _,
    sync::{Mutex, OnceLock},
};

struct Plan {
    at: Option<(Option<String>, u64)>,
    log: Option<std::path::PathBuf>,
    passed: Mutex<(u64, HashMap<&'static str, u64>)>,
}

static PLAN: OnceLock<Option<Plan>> = OnceLock::new();

fn plan() -> Option<&'static Plan> {
    PLAN.get_or_init(|| {
        let at =
            std::env::var("WINDLASS_CRASH_AT")
                .ok()
                .and_then(|text| match text.split_once(':') {
                    Some((name, count)) => Some((Some(name.to_owned()), count.parse().ok()?)),
                    None => Some((None, text.parse().ok()?)),
                });
        let log = std::env::var_os("WINDLASS_CRASH_LOG").map(Into::into);
        (at.is_some() || log.is_some()).then(|| Plan {
            at,
            log,
            passed: Mutex::default(),
        })
    })
    .as_ref()
}

/// Passes a crash point.
pub fn point(name: &'static str) {
    let Some(plan) = plan() else { return };
    let (of_name, total) = {
        let mut passed = plan
            .passed
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        passed.0 += 1;
        let of_name = passed.1.entry(name).or_default();
        *of_name += 1;
        (*of_name, passed.0)
    };
    if let Some(path) = &plan.log {
        let written = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()));
        if let Err(error) = written {
            tracing::warn!(%error, "the crash log cannot be written");
        }
    }
    let hit = match &plan.at {
        Some((Some(wanted), count)) => wanted == name && of_name == *count,
        Some((None, count)) => total == *count,
        None => false,
    };
    if hit {
        // SIGKILL to ourselves: nothing is flushed, no destructor runs.
        if rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .is_err()
        {
            std::process::abort();
        }
    }
}
