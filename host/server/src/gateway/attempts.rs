//! How often a source may fail to register: a limit on guessing activation codes.
//!
//! Counts failures only, so that a whole fleet behind one address can register with good codes. Memory is bounded: with too
//! many sources at once, the oldest counts are forgotten. Times are inputs.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Failures of one source within the window; more are refused.
pub(crate) const MAX_FAILURES: u32 = 10;
/// How long a failure counts.
pub(crate) const WINDOW: Duration = Duration::from_secs(60);
/// Sources that are remembered.
const MAX_SOURCES: usize = 10_000;

/// Failures by source.
#[derive(Default)]
pub(crate) struct Attempts {
    failures: Mutex<HashMap<IpAddr, (Instant, u32)>>,
}

impl Attempts {
    /// How long the source has to wait; `None`: it may try.
    pub(crate) fn wait(&self, source: IpAddr, now: Instant) -> Option<Duration> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, count) = failures.get(&network(source))?;
        let left = (*since + WINDOW).checked_duration_since(now)?;
        (*count >= MAX_FAILURES && !left.is_zero()).then_some(left)
    }

    /// Counts a failure.
    pub(crate) fn failed(&self, source: IpAddr, now: Instant) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let source = network(source);
        if failures.len() >= MAX_SOURCES && !failures.contains_key(&source) {
            failures.retain(|_, (since, _)| *since + WINDOW > now);
            if failures.len() >= MAX_SOURCES {
                let oldest = failures.iter().min_by_key(|(_, (since, _))| *since);
                if let Some(oldest) = oldest.map(|(source, _)| *source) {
                    failures.remove(&oldest);
                }
            }
        }
        let entry = failures.entry(source).or_insert((now, 0));
        if entry.0 + WINDOW <= now {
            *entry = (now, 0);
        }
        entry.1 += 1;
    }
}

/// One IPv6 customer has at least a /64: its addresses are one source.
fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let network = u128::from(address) >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from(network))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_waits_after_too_many_failures_and_others_do_not() {
        let attempts = Attempts::default();
        let bad: IpAddr = "2001:db8::1".parse().unwrap();
        let neighbour: IpAddr = "2001:db8::2".parse().unwrap();
        let good: IpAddr = "192.0.2.1".parse().unwrap();
        let start = Instant::now();
        for _ in 0..MAX_FAILURES {
            assert_eq!(attempts.wait(bad, start), None);
            attempts.failed(bad, start);
        }
        assert_eq!(attempts.wait(bad, start), Some(WINDOW));
        assert_eq!(attempts.wait(neighbour, start), Some(WINDOW));
        assert_eq!(attempts.wait(good, start), None);
        let later = start + WINDOW;
        assert_eq!(attempts.wait(bad, later), None);
        attempts.failed(bad, later);
        assert_eq!(attempts.wait(bad, later), None);
    }

    #[test]
    fn memory_is_bounded() {
        let attempts = Attempts::default();
        let now = Instant::now();
        for number in 0..u32::try_from(MAX_SOURCES).unwrap() + 10 {
            attempts.failed(IpAddr::V4(number.into()), now);
        }
        assert_eq!(attempts.failures.lock().unwrap().len(), MAX_SOURCES);
    }
}
