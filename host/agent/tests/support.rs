//! A small gateway that keeps to the rules of `windlass_protocol`, an agent that is a real process, and a proxy that cuts.

mod gateway;
mod process;
mod proxy;
mod tasks;

use std::{path::Path, time::Duration};

pub(crate) use gateway::*;
pub(crate) use process::*;
pub(crate) use proxy::*;
pub(crate) use tasks::*;

/// Longer than anything takes on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) fn id() -> uuid::Uuid {
    uuid::Uuid::now_v7()
}

/// Waits for a condition outside of the gateway.
pub(crate) async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "no {what} in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(Into::into)
        .collect()
}

pub(crate) fn is_alive(pid: u32) -> bool {
    windlass_agent::proc::ProcessId::of(pid).is_some()
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
