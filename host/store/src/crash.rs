//! Crash points: places in the code where a test can make this process die as by `kill -9`.
//!
//! Owns the environment variables `WINDLASS_CRASH_AT` (`<n>`: at the n-th hit of any point in this process, or
//! `<name>:<n>`: at the n-th hit of that point, counted from 1) and `WINDLASS_CRASH_LOG` (a file to which every
//! hit appends the name of its point as a line, so that a test can count them). With neither set, a point costs
//! one relaxed load. Nothing but tests sets them; they change nothing but when the process ends.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Where to die: the n-th hit of any point, or of the point with this name.
pub const CRASH_AT: &str = "WINDLASS_CRASH_AT";
/// The file that lists the hits.
pub const CRASH_LOG: &str = "WINDLASS_CRASH_LOG";

const UNREAD: u8 = 0;
const OFF: u8 = 1;
const ON: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(UNREAD);
static POINTS: OnceLock<Option<Points>> = OnceLock::new();

/// Dies here when the environment of the process says so. `name` is `<crate>.<place>`.
#[inline]
pub fn crash_point(name: &'static str) {
    if STATE.load(Ordering::Relaxed) != OFF {
        armed(name);
    }
}

#[cold]
fn armed(name: &'static str) {
    let points = POINTS.get_or_init(|| {
        let points = Points::from_environment();
        STATE.store(if points.is_some() { ON } else { OFF }, Ordering::Relaxed);
        points
    });
    if let Some(points) = points
        && points.hit(name)
    {
        die();
    }
}

/// Where the process is to die, and how often each point was hit.
struct Points {
    at: Option<CrashAt>,
    state: Mutex<Hits>,
}

#[derive(Default)]
struct Hits {
    all: u64,
    by_name: HashMap<&'static str, u64>,
    log: Option<File>,
}

#[derive(Debug, PartialEq, Eq)]
enum CrashAt {
    Any(u64),
    Named(String, u64),
}

impl CrashAt {
    fn parse(text: &str) -> Option<Self> {
        match text.rsplit_once(':') {
            None => text.parse().ok().map(Self::Any),
            Some((name, hit)) => hit
                .parse()
                .ok()
                .map(|hit| Self::Named(name.to_owned(), hit)),
        }
    }
}

impl Points {
    fn from_environment() -> Option<Self> {
        let at = std::env::var(CRASH_AT).ok().map(|text| {
            // A test that misspells its crash point must not pass because nothing crashed.
            CrashAt::parse(&text)
                .unwrap_or_else(|| panic!("{CRASH_AT} is `{text}`, expected `<n>` or `<name>:<n>`"))
        });
        let log = std::env::var_os(CRASH_LOG).map(|path| {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(&path)
                .unwrap_or_else(|error| panic!("{CRASH_LOG} {}: {error}", path.display()))
        });
        if at.is_none() && log.is_none() {
            return None;
        }
        Some(Self {
            at,
            state: Mutex::new(Hits {
                log,
                ..Hits::default()
            }),
        })
    }

    /// Counts and lists the hit; tells whether the process is to die now.
    fn hit(&self, name: &'static str) -> bool {
        let mut hits = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        hits.all += 1;
        let of_this = hits.by_name.entry(name).or_default();
        *of_this += 1;
        let of_this = *of_this;
        if let Some(log) = &mut hits.log
            && let Err(error) = writeln!(log, "{name}")
        {
            tracing::error!(point = name, %error, "the crash log cannot be written");
        }
        match &self.at {
            None => false,
            Some(CrashAt::Any(hit)) => *hit == hits.all,
            Some(CrashAt::Named(wanted, hit)) => wanted == name && *hit == of_this,
        }
    }
}

fn die() {
    let signalled =
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    if let Err(error) = signalled {
        tracing::error!(%error, "a process could not kill itself");
    }
    // The signal may take a moment; nothing of this thread may run on.
    loop {
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read() {
        assert_eq!(CrashAt::parse("3"), Some(CrashAt::Any(3)));
        assert_eq!(
            CrashAt::parse("store.after_sync:2"),
            Some(CrashAt::Named("store.after_sync".to_owned(), 2))
        );
        assert_eq!(CrashAt::parse("store.after_sync"), None);
        assert_eq!(CrashAt::parse("a:b"), None);
    }

    #[test]
    fn hits_are_counted_for_all_and_by_name() {
        let points = |at| Points {
            at,
            state: Mutex::new(Hits::default()),
        };
        let any = points(Some(CrashAt::Any(2)));
        assert!(!any.hit("a"));
        assert!(any.hit("b"));
        assert!(!any.hit("a"));
        let named = points(Some(CrashAt::Named("b".to_owned(), 2)));
        assert!(!named.hit("b"));
        assert!(!named.hit("a"));
        assert!(named.hit("b"));
    }
}
