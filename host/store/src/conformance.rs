//! What every back end must do, as functions that a test calls for each of them.
//!
//! A back end brings a [`Harness`]; [`run_all`] runs every property in a store of its own. Failures panic with
//! what was expected: this module belongs to tests.
#![allow(
    clippy::unwrap_used,
    reason = "the suite is test code, a failure is a panic"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::OperationKind;
use crate::trace::{CommitStage, CommitTrace};
use crate::watch::RingLimits;
use crate::{
    CommitError, Entry, EventKind, Expected, Key, LimitError, PAGE_MAX_ENTRIES, Prefix, Revision,
    Store, StoreError, TXN_MAX_BYTES, TXN_MAX_OPERATIONS, Txn, VALUE_MAX_BYTES, WatchError,
};

/// What a property needs of a new store.
#[derive(Clone, Default)]
pub struct Wish {
    pub ring: RingLimits,
    pub trace: Option<Arc<dyn CommitTrace>>,
}

/// A back end under test.
#[async_trait]
pub trait Harness: Send + Sync {
    /// An empty store.
    async fn fresh(&self, wish: Wish) -> Arc<dyn Store>;
    /// Opens the data of the newest store again, after it was closed; `None` for back ends that keep none.
    async fn reopen(&self) -> Option<Arc<dyn Store>>;
    /// Whether the wish's trace and ring are heeded: false for stores of other processes.
    fn is_embedded(&self) -> bool;
    /// Lets time pass for leases.
    async fn pass_time(&self, time: Duration);
}

/// Runs every property. Call it in a runtime of one thread.
pub async fn run_all(harness: &dyn Harness) {
    rows_come_and_go(harness).await;
    preconditions_hold_or_conflict(harness).await;
    transactions_are_atomic(harness).await;
    one_of_many_wins_a_swap(harness).await;
    limits_are_enforced(harness).await;
    scans_page_in_order(harness).await;
    scans_page_under_writes(harness).await;
    watches_see_commits_in_order(harness).await;
    watches_resume(harness).await;
    leases_end_and_live_on(harness).await;
    closed_stores_say_so(harness).await;
    revisions_rise_across_reopen(harness).await;
    if harness.is_embedded() {
        watches_are_bounded(harness).await;
        syncs_precede_answers(harness).await;
        nothing_shows_before_its_sync(harness).await;
        failed_syncs_break_the_store(harness).await;
    }
}

/// A key of the suite's tenant.
pub fn key(text: &str) -> Key {
    Key::new(format!("default/{text}")).unwrap()
}

fn prefix(text: &str) -> Prefix {
    Prefix::from_bytes(format!("default/{text}")).unwrap()
}

async fn put(store: &dyn Store, name: &str, value: &str) -> Revision {
    store
        .commit(Txn::new().put(key(name), value.to_owned()))
        .await
        .unwrap()
}

async fn text(store: &dyn Store, name: &str) -> Option<String> {
    let entry = store.get(&key(name)).await.unwrap()?;
    Some(String::from_utf8(entry.value.to_vec()).unwrap())
}

async fn all(store: &dyn Store, prefix: &Prefix) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    loop {
        let after = entries.last().map(|entry| entry.key.clone());
        let page = store.scan(prefix, after.as_ref(), 100).await.unwrap();
        entries.extend(page.entries);
        if !page.more {
            return entries;
        }
    }
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    // A plain thread's clock: tokio's may be stopped.
    let (late, is_late) = tokio::sync::oneshot::channel();
    let (done, is_done) = std::sync::mpsc::sync_channel::<()>(1);
    let guard = std::thread::spawn(move || {
        if is_done.recv_timeout(Duration::from_secs(30))
            == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            late.send(()).ok();
        }
    });
    let result = tokio::select! {
        result = future => Some(result),
        Ok(()) = is_late => None,
    };
    drop(done);
    guard.join().unwrap();
    result.unwrap_or_else(|| panic!("waited 30 s for: {what}"))
}

pub async fn rows_come_and_go(harness: &dyn Harness) {
    let store = harness.fresh(Wish::default()).await;
    assert_eq!(store.get(&key("a")).await.unwrap(), None);
    let first = put(&*store, "a", "1").await;
    let entry = store.get(&key("a")).await.unwrap().unwrap();
    assert_eq!(
        entry,
        Entry {
            key: key("a"),
            value: Bytes::from_static(b"1"),
            revision: first,
            leased: false
        }
    );
    let second = put(&*store, "a", "2").await;
    assert!(second > first);
    assert_eq!(text(&*store, "a").await.as_deref(), Some("2"));
    assert!(store.revision().await.unwrap() >= second);
    let third = store.commit(Txn::new().delete(key("a"))).await.unwrap();
    assert!(third > second);
    assert_eq!(store.get(&key("a")).await.unwrap(), None);
    // Empty values are values, and rows at the limits go in and come out.
    put(&*store, "empty", "").await;
    assert_eq!(text(&*store, "empty").await.as_deref(), Some(""));
    let long = Key::new(vec![b'k'; crate::KEY_MAX_BYTES]).unwrap();
    let large = Bytes::from(vec![7; VALUE_MAX_BYTES]);
    let txn = Txn::new().put(long.clone(), large.clone());
    store.commit(txn).await.unwrap();
    assert_eq!(store.get(&long).await.unwrap().unwrap().value, large);
    store.close().await.unwrap();
}

pub async fn preconditions_hold_or_conflict(harness: &dyn Harness) {
    let store = harness.fresh(Wish::default()).await;
    let one = put(&*store, "a", "1").await;
    let check = |expected: Expected, name: &'static str| {
        let store = Arc::clone(&store);
        async move {
            let txn = Txn::new().require(key(name), expected).put(key("w"), "x");
            store.commit(txn).await
        }
    };
    for (expected, name) in [
        (Expected::Exists, "a"),
        (Expected::RevisionIs(one), "a"),
        (Expected::Absent, "b"),
    ] {
        check(expected, name).await.unwrap();
    }
    for (wrong, name, now) in [
        (Expected::Absent, "a", Some(one)),
        (Expected::Exists, "b", None),
        (Expected::RevisionIs(Revision(one.0 + 1)), "a", Some(one)),
        (Expected::RevisionIs(one), "b", None),
    ] {
        match check(wrong, name).await {
            Err(CommitError::Conflict {
                key: k,
                expected,
                found,
            }) => assert_eq!((k, expected, found), (key(name), wrong, now)),
            other => panic!("{wrong:?} of {name}: {other:?}"),
        }
    }
    // Preconditions alone are a transaction that makes no event.
    let before = store.revision().await.unwrap();
    let seen = store.commit(Txn::new().exists(key("a"))).await.unwrap();
    assert!(seen >= before);
    let refused = store.commit(Txn::new().absent(key("a"))).await;
    assert!(matches!(refused, Err(CommitError::Conflict { .. })));
    store.close().await.unwrap();
}

pub async fn transactions_are_atomic(harness: &dyn Harness) {
    let store = harness.fresh(Wish::default()).await;
    let a = put(&*store, "a", "1").await;
    let refused = store
        .commit(
            Txn::new()
                .revision_is(key("a"), a)
                .absent(key("a2"))
                .exists(key("missing"))
                .put(key("b"), "1")
                .delete(key("a")),
        )
        .await;
    assert!(
        matches!(&refused, Err(CommitError::Conflict { key: k, .. }) if *k == key("missing")),
        "{refused:?}"
    );
    assert_eq!(text(&*store, "a").await.as_deref(), Some("1"));
    assert_eq!(text(&*store, "b").await, None);
    let done = store
        .commit(
            Txn::new()
                .put(key("b"), "1")
                .delete(key("a"))
                .put(key("c"), "1"),
        )
        .await
        .unwrap();
    assert_eq!(text(&*store, "a").await, None);
    for name in ["b", "c"] {
        let entry = store.get(&key(name)).await.unwrap().unwrap();
        assert_eq!(entry.revision, done, "one revision for the transaction");
    }
    store.close().await.unwrap();
}

pub async fn one_of_many_wins_a_swap(harness: &dyn Harness) {
    const TASKS: usize = 16;
    const WINS: usize = 10;
    let store = harness.fresh(Wish::default()).await;
    put(&*store, "count", "0").await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..TASKS {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let mut conflicts = 0;
            for _ in 0..WINS {
                loop {
                    let row = store.get(&key("count")).await.unwrap().unwrap();
                    let count: usize = std::str::from_utf8(&row.value).unwrap().parse().unwrap();
                    let txn = Txn::new()
                        .revision_is(key("count"), row.revision)
                        .put(key("count"), (count + 1).to_string());
                    match store.commit(txn).await {
                        Ok(_) => break,
                        Err(CommitError::Conflict { .. }) => conflicts += 1,
                        Err(other) => panic!("{other}"),
                    }
                    tokio::task::yield_now().await;
                }
            }
            conflicts
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(
        text(&*store, "count").await,
        Some((TASKS * WINS).to_string()),
        "no increment is lost"
    );
    store.close().await.unwrap();
}

pub async fn limits_are_enforced(harness: &dyn Harness) {
    let store = harness.fresh(Wish::default()).await;
    let many =
        |count: usize| (0..count).fold(Txn::new(), |txn, n| txn.put(key(&format!("n/{n}")), "x"));
    store.commit(many(TXN_MAX_OPERATIONS)).await.unwrap();
    let deletes =
        |count: usize| (0..count).fold(Txn::new(), |txn, n| txn.delete(key(&format!("n/{n}"))));
    let checks =
        |count: usize| (0..count).fold(Txn::new(), |txn, n| txn.exists(key(&format!("n/{n}"))));
    // Preconditions count on their own.
    store
        .commit(checks(TXN_MAX_OPERATIONS).and(deletes(TXN_MAX_OPERATIONS)))
        .await
        .unwrap();
    let before = store.revision().await.unwrap();
    let large = |count: usize| {
        (0..count).fold(Txn::new(), |txn, n| {
            txn.put(key(&format!("l/{n}")), vec![b'x'; VALUE_MAX_BYTES])
        })
    };
    let expect = |txn: Txn, limit: LimitError| {
        let store = Arc::clone(&store);
        async move {
            match store.commit(txn).await {
                Err(CommitError::Limit(found)) => assert_eq!(found, limit),
                other => panic!("expected `{limit}`, found {other:?}"),
            }
        }
    };
    expect(Txn::new(), LimitError::TxnEmpty).await;
    for (what, txn) in [
        (OperationKind::Operations, many(TXN_MAX_OPERATIONS + 1)),
        (OperationKind::Preconditions, checks(TXN_MAX_OPERATIONS + 1)),
    ] {
        let limit = TXN_MAX_OPERATIONS;
        let found = limit + 1;
        expect(txn, LimitError::TooManyOperations { what, found, limit }).await;
    }
    expect(
        Txn::new().put(key("v"), vec![0; VALUE_MAX_BYTES + 1]),
        LimitError::ValueTooLarge {
            key: key("v"),
            found_bytes: VALUE_MAX_BYTES + 1,
            limit_bytes: VALUE_MAX_BYTES,
        },
    )
    .await;
    let count = TXN_MAX_BYTES / VALUE_MAX_BYTES;
    expect(
        large(count),
        LimitError::TxnTooLarge {
            found_bytes: large(count).size_bytes(),
            limit_bytes: TXN_MAX_BYTES,
        },
    )
    .await;
    store.commit(large(count - 1)).await.unwrap();
    expect(
        Txn::new().put(key("d"), "1").delete(key("d")),
        LimitError::KeyTwice {
            what: OperationKind::Operations,
            key: key("d"),
        },
    )
    .await;
    expect(
        Txn::new().absent(key("d")).exists(key("d")),
        LimitError::KeyTwice {
            what: OperationKind::Preconditions,
            key: key("d"),
        },
    )
    .await;
    assert!(store.revision().await.unwrap() > before);
    for found in [0, PAGE_MAX_ENTRIES + 1] {
        let refused = store.scan(&Prefix::everything(), None, found).await;
        assert!(
            matches!(&refused, Err(StoreError::Limit(LimitError::PageSize { found: f, limit })) if *f == found && *limit == PAGE_MAX_ENTRIES),
            "{refused:?}"
        );
    }
    for found in [1, u64::MAX] {
        let refused = store.lease(found).await;
        assert!(
            matches!(&refused, Err(StoreError::Limit(LimitError::LeaseTtl { found_ms, .. })) if *found_ms == found),
            "{refused:?}"
        );
    }
    store.close().await.unwrap();
}

pub async fn scans_page_in_order(harness: &dyn Harness) {
    let store = harness.fresh(Wish::default()).await;
    for n in (0..25).rev() {
        put(&*store, &format!("o/{n:02}"), "x").await;
    }
    put(&*store, "n/99", "x").await;
    put(&*store, "o0", "x").await;
    put(&*store, "p/00", "x").await;
    let names =
        |entries: &[Entry]| -> Vec<String> { entries.iter().map(|e| e.key.to_string()).collect() };
    let wanted: Vec<String> = (0..25).map(|n| format!("default/o/{n:02}")).collect();
    let page = store.scan(&prefix("o/"), None, 10).await.unwrap();
    assert_eq!(names(&page.entries), wanted[..10]);
    assert!(page.more);
    let page = store
        .scan(&prefix("o/"), Some(&key("o/09")), 10)
        .await
        .unwrap();
    assert_eq!(names(&page.entries), wanted[10..20]);
    let page = store
        .scan(&prefix("o/"), Some(&key("o/14")), 10)
        .await
        .unwrap();
    assert_eq!(names(&page.entries), wanted[15..]);
    assert!(!page.more, "exactly the last ten");
    let mut falling = wanted.clone();
    falling.reverse();
    let page = store.scan_reverse(&prefix("o/"), None, 10).await.unwrap();
    assert_eq!(names(&page.entries), falling[..10]);
    assert!(page.more);
    let page = store
        .scan_reverse(&prefix("o/"), Some(&key("o/05")), 10)
        .await
        .unwrap();
    assert_eq!(names(&page.entries), falling[20..]);
    assert!(!page.more);
    // Cursors outside the prefix.
    for (cursor, rising, falling) in [("a", 25, 0), ("z", 0, 25)] {
        let up = store.scan(&prefix("o/"), Some(&key(cursor)), 100).await;
        assert_eq!(up.unwrap().entries.len(), rising, "after {cursor}");
        let down = store
            .scan_reverse(&prefix("o/"), Some(&key(cursor)), 100)
            .await;
        assert_eq!(down.unwrap().entries.len(), falling, "before {cursor}");
    }
    let none = store.scan(&prefix("nothing/"), None, 10).await.unwrap();
    assert!(none.entries.is_empty() && !none.more);
    assert_eq!(all(&*store, &Prefix::everything()).await.len(), 28);
    store.close().await.unwrap();
}

/// Rows that are there during the whole scan are seen exactly once, whatever is written meanwhile; the watch from
/// the first page's revision completes the picture.
pub async fn scans_page_under_writes(harness: &dyn Harness) {
    let store = harness.fresh(Wish::default()).await;
    for n in 0..200 {
        put(&*store, &format!("s/{n:03}"), "kept").await;
    }
    let writer = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            for n in 0..200 {
                put(&*store, &format!("s/{n:03}+"), "new").await;
                put(&*store, &format!("s/{:03}", (n * 7) % 200), "changed").await;
            }
        }
    });
    let first = store.scan(&prefix("s/"), None, 7).await.unwrap();
    let from = first.revision;
    let mut seen: Vec<Entry> = first.entries;
    loop {
        let after = seen.last().map(|entry| entry.key.clone());
        let page = store.scan(&prefix("s/"), after.as_ref(), 7).await.unwrap();
        seen.extend(page.entries);
        if !page.more {
            break;
        }
        tokio::task::yield_now().await;
    }
    writer.await.unwrap();
    let keys: Vec<&Key> = seen.iter().map(|entry| &entry.key).collect();
    assert!(keys.is_sorted(), "in order");
    let old = keys.iter().filter(|key| !key.to_string().ends_with('+'));
    assert_eq!(old.collect::<BTreeSet<_>>().len(), 200, "none is missing");
    assert_eq!(keys.iter().collect::<BTreeSet<_>>().len(), keys.len());
    let mut model: BTreeMap<Key, (Revision, Bytes)> = seen
        .into_iter()
        .map(|entry| (entry.key, (entry.revision, entry.value)))
        .collect();
    let through = store.revision().await.unwrap();
    let mut watch = store.watch(&prefix("s/"), from).await.unwrap();
    while let Some(event) = within("the events of the scan", watch.next_through(through))
        .await
        .unwrap()
    {
        match event.kind {
            EventKind::Put { value, .. } => {
                let row = model.entry(event.key).or_default();
                if event.revision > row.0 {
                    *row = (event.revision, value);
                }
            }
            EventKind::Deleted => panic!("nothing was deleted"),
        }
    }
    let now: BTreeMap<Key, (Revision, Bytes)> = all(&*store, &prefix("s/"))
        .await
        .into_iter()
        .map(|entry| (entry.key, (entry.revision, entry.value)))
        .collect();
    assert_eq!(model, now);
    store.close().await.unwrap();
}

pub async fn watches_see_commits_in_order(harness: &dyn Harness) {
    let store = harness.fresh(Wish::default()).await;
    let before = put(&*store, "w/before", "x").await;
    let mut watch = store.watch(&prefix("w/"), before).await.unwrap();
    let mut revisions = Vec::new();
    revisions.push(put(&*store, "w/a", "1").await);
    put(&*store, "other", "x").await;
    let both = Txn::new()
        .put(key("w/b"), "2")
        .put(key("other"), "y")
        .delete(key("w/a"));
    revisions.push(store.commit(both).await.unwrap());
    // Deleting what is not there and checking alone change nothing.
    let nothing = Txn::new().delete(key("w/none"));
    let unchanged = store.commit(nothing).await.unwrap();
    assert_eq!(unchanged, revisions[1]);
    revisions.push(put(&*store, "w/c", "3").await);
    let put_event = |revision, name: &str, value: &'static str| crate::Event {
        revision,
        key: key(name),
        kind: EventKind::Put {
            value: Bytes::from_static(value.as_bytes()),
            leased: false,
        },
    };
    let wanted = [
        put_event(revisions[0], "w/a", "1"),
        put_event(revisions[1], "w/b", "2"),
        crate::Event {
            revision: revisions[1],
            key: key("w/a"),
            kind: EventKind::Deleted,
        },
        put_event(revisions[2], "w/c", "3"),
    ];
    for event in wanted {
        assert_eq!(within("an event", watch.next()).await.unwrap(), event);
    }
    // Many tasks at once: the watch shows one order, that of the revisions, without gaps.
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8 {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let mut of_task = Vec::new();
            for n in 0..25 {
                of_task.push(put(&*store, &format!("w/{task}/{n}"), "x").await);
            }
            of_task
        });
    }
    let mut acknowledged = BTreeSet::new();
    while let Some(of_task) = tasks.join_next().await {
        acknowledged.extend(of_task.unwrap());
    }
    let mut watched = Vec::new();
    while watched.len() < 200 {
        watched.push(within("an event", watch.next()).await.unwrap().revision);
    }
    assert!(watched.is_sorted());
    assert_eq!(watched.into_iter().collect::<BTreeSet<_>>(), acknowledged);
    store.close().await.unwrap();
    assert_eq!(
        within("the end", watch.next()).await,
        Err(WatchError::Closed)
    );
}

pub async fn watches_resume(harness: &dyn Harness) {
    let store = harness.fresh(Wish::default()).await;
    let start = store.revision().await.unwrap();
    for n in 0..10 {
        let both = Txn::new()
            .put(key(&format!("r/{n}/a")), "x")
            .put(key(&format!("r/{n}/b")), "x");
        store.commit(both).await.unwrap();
    }
    let mut first = store.watch(&prefix("r/"), start).await.unwrap();
    let mut seen = BTreeSet::new();
    for _ in 0..7 {
        seen.insert(within("an event", first.next()).await.unwrap().key);
    }
    // In the middle of the fourth transaction: it comes again.
    let from = first.resume_from();
    drop(first);
    let mut second = store.watch(&prefix("r/"), from).await.unwrap();
    let again = within("an event", second.next()).await.unwrap();
    assert_eq!(again.key, key("r/3/a"));
    seen.insert(again.key);
    let through = store.revision().await.unwrap();
    while let Some(event) = within("the rest", second.next_through(through))
        .await
        .unwrap()
    {
        seen.insert(event.key);
    }
    assert_eq!(seen.len(), 20);
    store.close().await.unwrap();
}

pub async fn watches_are_bounded(harness: &dyn Harness) {
    let ring = RingLimits {
        events: 16,
        bytes: 1 << 20,
    };
    let wish = Wish {
        ring,
        ..Wish::default()
    };
    let store = harness.fresh(wish).await;
    let start = store.revision().await.unwrap();
    let mut slow = store.watch(&prefix("x/"), start).await.unwrap();
    let mut last = start;
    for n in 0..40 {
        last = put(&*store, &format!("x/{n:02}"), "x").await;
    }
    // The ring is fed after the answer of the last commit.
    let mut tail = store.watch(&prefix("x/"), last).await.unwrap();
    assert_eq!(within("the tail", tail.next_through(last)).await, Ok(None));
    let lagged = within("the slow watch", slow.next()).await;
    assert!(
        matches!(lagged, Err(WatchError::Compacted { .. })),
        "{lagged:?}"
    );
    let refused = store.watch(&prefix("x/"), start).await.unwrap_err();
    let WatchError::Compacted { from, oldest } = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(from, start);
    let mut kept = store.watch(&prefix("x/"), oldest).await.unwrap();
    let mut count = 0;
    while within("what is kept", kept.next_through(last))
        .await
        .unwrap()
        .is_some()
    {
        count += 1;
    }
    assert_eq!(count, 16, "the ring keeps what it says");
    // A start in the future belongs to another store.
    let future = store
        .watch(&prefix("x/"), Revision(last.0 + (1 << 40)))
        .await;
    assert!(matches!(future, Err(WatchError::Compacted { .. })));
    store.close().await.unwrap();
}

pub async fn leases_end_and_live_on(harness: &dyn Harness) {
    const TTL_MS: u64 = 3_000;
    let ttl = Duration::from_millis(TTL_MS);
    let store = harness.fresh(Wish::default()).await;
    let start = store.revision().await.unwrap();
    let mut watch = store.watch(&prefix("l/"), start).await.unwrap();
    let kept = store.lease(TTL_MS).await.unwrap();
    let lost = store.lease(TTL_MS).await.unwrap();
    let revoked = store.lease(TTL_MS).await.unwrap();
    let txn = Txn::new()
        .put_leased(key("l/kept"), "1", kept.id())
        .put_leased(key("l/lost"), "2", lost.id())
        .put_leased(key("l/lost2"), "2", lost.id())
        .put_leased(key("l/freed"), "2", lost.id())
        .put_leased(key("l/moved"), "2", lost.id())
        .put_leased(key("l/revoked"), "3", revoked.id())
        .put(key("l/plain"), "4");
    store.commit(txn).await.unwrap();
    assert!(store.get(&key("l/lost")).await.unwrap().unwrap().leased);
    // A put without the lease frees the row, one with another lease moves it.
    put(&*store, "l/freed", "5").await;
    let moved = Txn::new().put_leased(key("l/moved"), "6", kept.id());
    store.commit(moved).await.unwrap();
    revoked.revoke().await.unwrap();
    assert_eq!(text(&*store, "l/revoked").await, None);
    assert!(matches!(
        revoked.revoke().await,
        Err(StoreError::LeaseOver { .. })
    ));
    // Two thirds of the time twice: only the one that is kept alive outlives it.
    for _ in 0..2 {
        harness.pass_time(ttl * 2 / 3).await;
        kept.keep_alive().await.unwrap();
    }
    let mut deleted = Vec::new();
    while deleted.len() < 3 {
        let event = within("the rows of the lease go", watch.next())
            .await
            .unwrap();
        if event.kind == EventKind::Deleted {
            deleted.push(event.key);
        }
    }
    assert_eq!(deleted, [key("l/revoked"), key("l/lost"), key("l/lost2")]);
    let left = all(&*store, &prefix("l/")).await;
    let left: Vec<_> = left.iter().map(|e| (e.key.clone(), e.leased)).collect();
    assert_eq!(
        left,
        [
            (key("l/freed"), false),
            (key("l/kept"), true),
            (key("l/moved"), true),
            (key("l/plain"), false),
        ]
    );
    assert!(matches!(
        lost.keep_alive().await,
        Err(StoreError::LeaseOver { .. })
    ));
    let late = Txn::new().put_leased(key("l/late"), "x", lost.id());
    assert!(matches!(
        store.commit(late).await,
        Err(CommitError::LeaseOver { lease }) if lease == lost.id()
    ));
    assert_eq!(text(&*store, "l/late").await, None);
    store.close().await.unwrap();
    if let Some(store) = harness.reopen().await {
        if harness.is_embedded() {
            assert_eq!(text(&*store, "l/kept").await, None, "died with the process");
            assert_eq!(text(&*store, "l/moved").await, None);
        }
        assert_eq!(text(&*store, "l/freed").await.as_deref(), Some("5"));
        assert_eq!(text(&*store, "l/plain").await.as_deref(), Some("4"));
        store.close().await.unwrap();
    }
}

pub async fn closed_stores_say_so(harness: &dyn Harness) {
    let store = harness.fresh(Wish::default()).await;
    put(&*store, "a", "1").await;
    store.close().await.unwrap();
    store.close().await.unwrap();
    let commit = store.commit(Txn::new().put(key("a"), "2")).await;
    assert!(
        matches!(commit, Err(CommitError::Store(StoreError::Closed))),
        "{commit:?}"
    );
    assert!(matches!(
        store.get(&key("a")).await,
        Err(StoreError::Closed)
    ));
    assert!(matches!(
        store.scan(&prefix(""), None, 1).await,
        Err(StoreError::Closed)
    ));
    assert!(matches!(store.lease(1000).await, Err(StoreError::Closed)));
    assert!(matches!(store.revision().await, Err(StoreError::Closed)));
    let watch = store.watch(&prefix(""), Revision(0)).await;
    assert!(matches!(watch, Err(WatchError::Closed)));
}

pub async fn revisions_rise_across_reopen(harness: &dyn Harness) {
    let mut store = harness.fresh(Wish::default()).await;
    let mut last = Revision(0);
    let first = put(&*store, "first", "x").await;
    for round in 0..4 {
        let now = put(&*store, "a", &round.to_string()).await;
        assert!(now > last, "{now} after {last}");
        last = now;
        store.close().await.unwrap();
        let Some(again) = harness.reopen().await else {
            return;
        };
        store = again;
        assert!(store.revision().await.unwrap() >= last);
        assert_eq!(text(&*store, "a").await, Some(round.to_string()));
        if harness.is_embedded() {
            let old = store.watch(&prefix(""), first).await;
            assert!(matches!(old, Err(WatchError::Compacted { .. })), "{old:?}");
        }
    }
    store.close().await.unwrap();
}

/// Remembers the stages; a gate can hold the syncs, and a switch can let them fail.
#[derive(Default)]
struct Recorder {
    stages: Mutex<Vec<CommitStage>>,
    gate: Mutex<Gate>,
    opened: Condvar,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Gate {
    #[default]
    Open,
    /// Waits before the sync.
    Held,
    /// As if the disk had failed.
    Fails,
}

impl Recorder {
    fn set(&self, gate: Gate) {
        *self.gate.lock().unwrap() = gate;
        self.opened.notify_all();
    }

    fn stages(&self) -> Vec<CommitStage> {
        self.stages.lock().unwrap().clone()
    }
}

impl CommitTrace for Recorder {
    fn reached(&self, stage: CommitStage) -> io::Result<()> {
        self.stages.lock().unwrap().push(stage);
        if let CommitStage::Syncing { .. } = stage {
            let mut gate = self.gate.lock().unwrap();
            while *gate == Gate::Held {
                gate = self.opened.wait(gate).unwrap();
            }
            if *gate == Gate::Fails {
                return Err(io::Error::other("the disk is gone"));
            }
        }
        Ok(())
    }
}

fn traced(recorder: &Arc<Recorder>) -> Wish {
    Wish {
        trace: Some(Arc::clone(recorder) as Arc<dyn CommitTrace>),
        ..Wish::default()
    }
}

/// For concurrent commits, the sync of each one's group has returned before it is answered.
pub async fn syncs_precede_answers(harness: &dyn Harness) {
    let recorder = Arc::new(Recorder::default());
    let store = harness.fresh(traced(&recorder)).await;
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..64 {
        let store = Arc::clone(&store);
        let recorder = Arc::clone(&recorder);
        tasks.spawn(async move {
            for n in 0..10 {
                let revision = put(&*store, &format!("d/{task}/{n}"), "x").await;
                let synced = recorder
                    .stages()
                    .into_iter()
                    .any(|stage| matches!(stage, CommitStage::Synced { last } if last >= revision));
                assert!(synced, "{revision} was answered before its sync");
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    store.close().await.unwrap();
    let mut applied = Revision(0);
    let mut synced = Revision(0);
    let mut answered = 0;
    for stage in recorder.stages() {
        match stage {
            CommitStage::Applying { first, last } => {
                assert_eq!(applied, synced, "one group at a time");
                assert!(first > applied && last >= first);
                applied = last;
            }
            CommitStage::Syncing { last } => assert_eq!(last, applied),
            CommitStage::Synced { last } => {
                assert_eq!(last, applied);
                synced = last;
            }
            CommitStage::Answering { revision } => {
                assert!(revision <= synced, "{revision} answered at {synced}");
                answered += 1;
            }
            CommitStage::Notified { last } => assert!(last <= synced),
        }
    }
    assert_eq!(answered, 640);
}

/// While a sync is held, its commit is not answered, no watch shows it, and reading its row waits.
pub async fn nothing_shows_before_its_sync(harness: &dyn Harness) {
    let recorder = Arc::new(Recorder::default());
    let store = harness.fresh(traced(&recorder)).await;
    put(&*store, "gone", "x").await;
    let start = put(&*store, "still", "x").await;
    let runtime = tokio::runtime::Handle::current();
    recorder.set(Gate::Held);
    // A thread of its own: a back end may commit on the caller's.
    let committing = std::thread::spawn({
        let store = Arc::clone(&store);
        move || {
            let txn = Txn::new().put(key("new"), "1").delete(key("gone"));
            runtime.block_on(store.commit(txn))
        }
    });
    let held = |recorder: &Recorder| {
        let stages = recorder.stages();
        matches!(stages.last(), Some(CommitStage::Syncing { last }) if *last > start)
    };
    within("the sync starts", async {
        while !held(&recorder) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mut watch = store.watch(&prefix(""), start).await.unwrap();
    let new = key("new");
    let gone = key("gone");
    let everything = prefix("");
    {
        let mut new = std::pin::pin!(store.get(&new));
        let mut gone = std::pin::pin!(store.get(&gone));
        let mut scan = std::pin::pin!(store.scan(&everything, None, 10));
        let mut event = std::pin::pin!(watch.next());
        for _ in 0..100 {
            assert!(futures_util::poll!(&mut new).is_pending());
            assert!(futures_util::poll!(&mut gone).is_pending());
            assert!(futures_util::poll!(&mut scan).is_pending());
            assert!(futures_util::poll!(&mut event).is_pending());
            tokio::task::yield_now().await;
        }
        assert!(!committing.is_finished(), "answered before its sync");
        assert_eq!(text(&*store, "still").await.as_deref(), Some("x"));
        recorder.set(Gate::Open);
        let (new, gone, scan, event) = within("the sync is done", async {
            tokio::join!(new, gone, scan, event)
        })
        .await;
        let new = new.unwrap().unwrap();
        assert!(new.revision > start);
        assert_eq!(gone.unwrap(), None);
        assert_eq!(scan.unwrap().entries.len(), 2);
        assert_eq!(event.unwrap().revision, new.revision);
    }
    tokio::task::spawn_blocking(move || committing.join().unwrap())
        .await
        .unwrap()
        .unwrap();
    store.close().await.unwrap();
}

/// After a failed sync every commit that waits and every later one is refused, and what it wrote does not show.
pub async fn failed_syncs_break_the_store(harness: &dyn Harness) {
    let recorder = Arc::new(Recorder::default());
    let store = harness.fresh(traced(&recorder)).await;
    put(&*store, "before", "x").await;
    recorder.set(Gate::Fails);
    for _ in 0..2 {
        let refused = store.commit(Txn::new().put(key("lost"), "x")).await;
        let Err(CommitError::Store(StoreError::Broken { reason })) = refused else {
            panic!("{refused:?}");
        };
        assert!(reason.contains("the disk is gone"), "{reason}");
        recorder.set(Gate::Open);
    }
    let read = store.get(&key("lost")).await;
    assert!(matches!(read, Err(StoreError::Broken { .. })), "{read:?}");
    assert_eq!(text(&*store, "before").await.as_deref(), Some("x"));
    store.close().await.unwrap();
    if let Some(store) = harness.reopen().await {
        assert_eq!(text(&*store, "before").await.as_deref(), Some("x"));
        put(&*store, "after", "x").await;
        store.close().await.unwrap();
    }
}
