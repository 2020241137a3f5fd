use std::sync::atomic::AtomicI64;

use windlass_domain::{digest::Digest, manifest::PluginRef};

use super::*;
use crate::{
    call::{CallContext, Export, Usage},
    error::CallFailure,
};

static NEXT: AtomicU64 = AtomicU64::new(1);
static CLOCK: AtomicI64 = AtomicI64::new(1_000_000_000);

fn new_id() -> Uuid {
    Uuid::from_u128(u128::from(NEXT.fetch_add(1, Ordering::Relaxed)) << 8)
}

/// A clock of each test's own would need state in a function: tests that move time use times relative to this one.
fn now() -> Timestamp {
    Timestamp::from_unix_ms(CLOCK.load(Ordering::Relaxed))
}

fn settings(dir: &std::path::Path) -> JournalSettings {
    JournalSettings::new(dir.join("calls"), now, new_id)
}

fn record(plugin: &str, number: usize) -> Arc<CallRecord> {
    let failure = (number % 10 == 9).then(|| {
        CallFailure::Trap {
            reason: "unreachable".into(),
        }
        .report()
    });
    Arc::new(CallRecord {
        plugin: PluginRef {
            name: plugin.to_owned(),
            version: semver::Version::new(1, 0, 0),
            digest: Digest::of(plugin.as_bytes()),
        },
        export: if number.is_multiple_of(2) {
            Export::Plan
        } else {
            Export::Judge
        },
        context: Some(Arc::new(CallContext {
            caller: "anna".into(),
            order: number.is_multiple_of(3).then(|| format!("ord_{number}")),
        })),
        input: format!("{{\"number\":{number},\"text\":\"{}\"}}", "x".repeat(200)),
        is_fault: failure.is_some(),
        outcome: match failure {
            Some(failure) => Err(failure),
            None => Ok(format!("[{number}]")),
        },
        usage: Usage {
            elapsed: Duration::from_micros(50),
            guest_time: Duration::from_micros(20),
            memory_bytes: 65_536,
            host_calls: Vec::new(),
        },
    })
}

async fn all(journal: &Journal, filter: CallFilter) -> Vec<CallSummary> {
    let mut calls = Vec::new();
    let mut before = None;
    loop {
        let page = journal.list(filter.clone(), before, 7).await.unwrap();
        calls.extend(page.items);
        match page.next {
            Some(next) => before = Some(next),
            None => return calls,
        }
    }
}

fn of_plugin(plugin: &str) -> CallFilter {
    CallFilter {
        plugin: Some(plugin.to_owned()),
        ..CallFilter::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_found_again_by_what_they_are_across_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(settings(dir.path())).unwrap();
    for number in 0..100 {
        journal.record(&record("a", number));
        journal.record(&record("b", number));
    }
    for round in 0..2 {
        let journal = match round {
            0 => &journal,
            _ => {
                journal.close().await;
                // A record after the end is counted, not written.
                journal.record(&record("a", 0));
                assert_eq!(journal.state().dropped, 1);
                &Journal::open(settings(dir.path())).unwrap()
            }
        };
        let calls = all(journal, CallFilter::default()).await;
        assert_eq!(calls.len(), 200);
        assert!(
            calls.is_sorted_by(|one, two| one.id > two.id),
            "newest first"
        );
        let with = |change: fn(&mut CallFilter)| {
            let mut filter = of_plugin("a");
            change(&mut filter);
            filter
        };
        for (filter, expect) in [
            (of_plugin("a"), 100),
            (of_plugin("c"), 0),
            (with(|filter| filter.export = Some(Export::Judge)), 50),
            (with(|filter| filter.outcome = Some("failed".into())), 10),
            (
                with(|filter| filter.outcome = Some("plugin_trap".into())),
                10,
            ),
            (with(|filter| filter.outcome = Some("ok".into())), 90),
            (with(|filter| filter.order = Some("ord_42".into())), 1),
            (with(|filter| filter.order = Some("ord_43".into())), 0),
            (
                with(|filter| filter.version = Some(semver::Version::new(1, 0, 0))),
                100,
            ),
            (
                with(|filter| filter.version = Some(semver::Version::new(2, 0, 0))),
                0,
            ),
            (with(|filter| filter.digest = Some(Digest::of(b"b"))), 0),
            (
                with(|filter| filter.from = Some(Timestamp::from_unix_ms(1_000_000_001))),
                0,
            ),
            (
                with(|filter| filter.to = Some(Timestamp::from_unix_ms(1_000_000_001))),
                100,
            ),
        ] {
            assert_eq!(
                all(journal, filter.clone()).await.len(),
                expect,
                "{filter:?}"
            );
        }
        let call = journal.get(calls[0].id).await.unwrap().unwrap();
        assert_eq!(call.summary, calls[0]);
        assert_eq!(call.input["number"], 99);
        assert_eq!(call.failure.unwrap().code, "plugin_trap");
        let unknown = CallId::from_uuid(Uuid::from_u128(7));
        assert_eq!(journal.get(unknown).await.unwrap(), None);

        let mut lines = journal.newest(of_plugin("b"), 5).await;
        let mut numbers = Vec::new();
        while let Some(line) = lines.recv().await {
            let call: JournaledCall = serde_json::from_slice(&line.unwrap()).unwrap();
            numbers.push(call.input["number"].as_u64().unwrap());
        }
        assert_eq!(numbers, [99, 98, 97, 96, 95]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oldest_files_go_beyond_the_size_and_the_rest_stays_readable() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(dir.path());
    (
        settings.batch_bytes,
        settings.file_bytes,
        settings.max_bytes,
    ) = (2048, 8 * 1024, 40 * 1024);
    let journal = Journal::open(settings).unwrap();
    for number in 0..5_000 {
        journal.record(&record("a", number));
        if number % 500 == 0 {
            journal.flushed().await;
        }
    }
    journal.flushed().await;
    let state = journal.state();
    // One file more than the size may stand while it is written to.
    assert!(state.bytes <= 48 * 1024, "{state:?}");
    let on_disk: u64 = std::fs::read_dir(dir.path().join("calls"))
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert_eq!(on_disk, state.bytes);
    let calls = all(&journal, CallFilter::default()).await;
    assert_eq!(calls.len() as u64, state.calls);
    assert!(calls.len() < 5_000 && state.written + state.dropped == 5_000);
    journal.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_calls_are_not_shown_and_their_files_go() {
    fn later() -> Timestamp {
        Timestamp::from_unix_ms(1_000_000_000 + 3_600_000)
    }
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(settings(dir.path())).unwrap();
    journal.record(&record("a", 1));
    journal.close().await;
    for (max_age_s, left) in [(3_700, 1), (3_500, 0)] {
        let journal = Journal::open(JournalSettings {
            now: later,
            max_age: Duration::from_secs(max_age_s),
            ..settings(dir.path())
        })
        .unwrap();
        journal.flushed().await;
        assert_eq!(all(&journal, CallFilter::default()).await.len(), left);
        assert_eq!(journal.state().calls, left as u64);
        journal.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_end_and_left_overs_of_a_merge_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let files = || {
        let mut files: Vec<PathBuf> = std::fs::read_dir(dir.path().join("calls"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        files
    };
    for round in 0..3 {
        let journal = Journal::open(settings(dir.path())).unwrap();
        journal.record(&record("a", round));
        journal.close().await;
    }
    assert!(
        files().len() <= 2,
        "small files are merged at the next start: {:?}",
        files()
    );
    // As a crash leaves it that hit a merge before it removed the files that it merged.
    let left_over = std::fs::read(files().last().unwrap()).unwrap();
    let left_over_name = files().last().unwrap().clone();
    let journal = Journal::open(settings(dir.path())).unwrap();
    journal.flushed().await;
    journal.close().await;
    assert_eq!(files().len(), 1);
    std::fs::write(&left_over_name, left_over).unwrap();
    // And one that hit an append.
    let merged = files()[0].clone();
    let whole = std::fs::read(&merged).unwrap();
    for torn in [
        &whole[..],
        &whole[..whole.len() / 2],
        &b"WCJ1\xff\xff\xff\xff"[..],
    ] {
        let mut bytes = whole.clone();
        bytes.extend_from_slice(&torn[..torn.len().min(whole.len() - 1)]);
        std::fs::write(&merged, &bytes).unwrap();
        let journal = Journal::open(settings(dir.path())).unwrap();
        let calls = all(&journal, CallFilter::default()).await;
        assert_eq!(calls.len(), 3, "{} bytes torn", torn.len());
        journal.close().await;
        std::fs::write(&merged, &whole).unwrap();
    }
    // Damage in the middle costs what is behind it, never the start.
    let mut damaged = whole.clone();
    let at = damaged.len() - 3;
    damaged[at] ^= 0xff;
    std::fs::write(&merged, damaged).unwrap();
    let journal = Journal::open(settings(dir.path())).unwrap();
    assert!(all(&journal, CallFilter::default()).await.len() < 3);
    journal.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_queue_does_not_take_is_counted_and_nothing_waits() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(JournalSettings {
        queue_bytes: 4 * 1024,
        ..settings(dir.path())
    })
    .unwrap();
    for number in 0..2_000 {
        journal.record(&record("a", number));
    }
    journal.flushed().await;
    let state = journal.state();
    assert_eq!(state.written + state.dropped, 2_000);
    assert!(state.dropped > 0 && state.written > 0, "{state:?}");
    // It takes calls again.
    journal.record(&record("a", 1));
    journal.flushed().await;
    assert_eq!(journal.state().written, state.written + 1);
    journal.close().await;
}
