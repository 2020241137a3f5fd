//! `windlass-agent stop-all`: ends everything that belongs to one data directory, and waits until it is gone.
//!
//! For the directory it is like switching the machine off: scripts that ran end as `unknown`; applications come back when an agent
//! runs there again. Found are: the agent (by its lock; one that is only starting by its arguments), shims and trampolines (by
//! their arguments), everything in the directory's cgroup subtree, and every process whose environment names an instance directory in it.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    config::{ConfigError, DataDir},
    proc::{self, Cgroup, ProcessId},
};

const AGENT_GRACE: Duration = Duration::from_secs(5);
const APP_GRACE: Duration = Duration::from_secs(5);
const DEADLINE: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(20);

/// Something did not end.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// The data directory.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// These still run.
    #[error("{} processes under {data} do not end: {pids:?}; they may belong to another user: run this as root", pids.len())]
    Left {
        /// The data directory.
        data: String,
        /// Their numbers.
        pids: Vec<u32>,
    },
}

/// Ends everything under a data directory; how many processes that were.
///
/// # Errors
/// When something does not end in time.
pub fn stop_all(data: &DataDir) -> Result<usize, StopError> {
    let mut ended = 0;
    // The agent first, so that nothing is started any more; its lock is then held here.
    let began = Instant::now();
    let _lock = loop {
        match data.take_lock() {
            Ok(lock) => break lock,
            Err(
                error @ (ConfigError::File(_)
                | ConfigError::NotRegistered(_)
                | ConfigError::AlreadyRegistered(_)),
            ) => {
                return Err(error.into());
            }
            Err(error @ ConfigError::Locked(_)) => {
                if began.elapsed() > DEADLINE {
                    return Err(error.into());
                }
                let signal = if began.elapsed() < AGENT_GRACE {
                    Signal::TERM
                } else {
                    Signal::KILL
                };
                if let Some(agent) = lock_holder(data) {
                    ended = 1;
                    proc::signal(&agent, signal);
                }
                std::thread::sleep(STEP);
            }
        }
    };
    // Then the shims, so that no application is started again; then what they ran, kindly first.
    let began = Instant::now();
    let subtree = Cgroup::subtree(data.path());
    let mut seen = std::collections::BTreeSet::new();
    loop {
        let shims = shims(data.path());
        let mut others = with_data_dir(data.path());
        // One that was started a moment ago does not hold the lock yet, and would live on when it is let go of here.
        others.extend(starting(data.path()));
        seen.extend(shims.iter().chain(&others).map(|process| process.pid));
        let populated = subtree.as_ref().is_some_and(Cgroup::is_populated);
        if shims.is_empty() && others.is_empty() && !populated {
            if let Some(subtree) = subtree {
                subtree.remove_if_empty();
            }
            return Ok(ended + seen.len());
        }
        for shim in &shims {
            proc::signal(shim, Signal::KILL);
        }
        let signal = if began.elapsed() < APP_GRACE {
            Signal::TERM
        } else {
            Signal::KILL
        };
        for process in &others {
            proc::signal(process, signal);
        }
        if began.elapsed() >= APP_GRACE
            && let Some(subtree) = &subtree
        {
            subtree.kill();
        }
        if began.elapsed() > DEADLINE {
            let pids = shims
                .iter()
                .chain(&others)
                .map(|process| process.pid)
                .collect();
            return Err(StopError::Left {
                data: data.path().display().to_string(),
                pids,
            });
        }
        std::thread::sleep(STEP);
    }
}

fn lock_holder(data: &DataDir) -> Option<ProcessId> {
    let pid: u32 = fs::read_to_string(data.lock()).ok()?.trim().parse().ok()?;
    let process = ProcessId::of(pid)?;
    // A number in a stale file may be anybody's by now, and an upgraded agent's binary may have any name: whoever has the lock
    // file open is it.
    let lock = data.lock();
    fs::read_dir(format!("/proc/{pid}/fd"))
        .ok()?
        .flatten()
        .any(|entry| fs::read_link(entry.path()).is_ok_and(|open| open == lock))
        .then_some(process)
}

fn shims(data: &Path) -> Vec<ProcessId> {
    let own = std::process::id();
    proc::all_pids()
        .filter(|pid| *pid != own)
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|arguments| {
                let mut arguments = arguments.split(|byte| *byte == 0).skip(1);
                arguments.next() == Some(b"shim")
                    && arguments.next().is_some_and(|dir| is_below(dir, data))
            })
        })
        .filter_map(ProcessId::of)
        .collect()
}

/// Agents that run, or are about to, in this directory.
fn starting(data: &Path) -> Vec<ProcessId> {
    use std::os::unix::ffi::OsStrExt as _;
    let names_data = |pid: u32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut arguments = arguments.split(|byte| *byte == 0).skip(1);
        if arguments.next() != Some(b"run") {
            return None;
        }
        let given = loop {
            let argument = arguments.next()?;
            if argument == b"--data" {
                break arguments.next()?;
            }
            if let Some(given) = argument.strip_prefix(b"--data=") {
                break given;
            }
        };
        let cwd = fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
        let given = cwd.join(std::ffi::OsStr::from_bytes(given));
        (fs::canonicalize(given).ok()? == fs::canonicalize(data).ok()?).then_some(())
    };
    proc::all_pids()
        .filter(|pid| *pid != std::process::id() && names_data(*pid).is_some())
        .filter_map(ProcessId::of)
        .collect()
}

fn with_data_dir(data: &Path) -> Vec<ProcessId> {
    proc::with_environment(|line| {
        line.strip_prefix(b"WINDLASS_INSTANCE_DIR=")
            .is_some_and(|dir| is_below(dir, data))
    })
}

fn is_below(path: &[u8], data: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt as _;
    Path::new(std::ffi::OsStr::from_bytes(path)).starts_with(data)
}
