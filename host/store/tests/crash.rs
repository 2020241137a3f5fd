//! The store on disk under `kill -9`: what was acknowledged is there, what was not is there whole or not at all,
//! revisions never come again, rows of leases are gone.
//!
//! The writer is this test binary once more, running [`writer_child`] only.
#![allow(clippy::unwrap_used, reason = "helpers of tests, a failure is a panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use windlass_store::crash::{CRASH_AT, CRASH_LOG};
use windlass_store::sled::{self, SledOptions};
use windlass_store::{Key, Page, Prefix, Revision, Store, Txn, sortable};

const DIRECTORY: &str = "WINDLASS_STORE_TEST_DIRECTORY";
const ROUND: &str = "WINDLASS_STORE_TEST_ROUND";
const TASKS: u64 = 16;
/// Keys of one transaction of a task; a task with an even number writes one key at a time.
const KEYS: u64 = 5;
const KILLS: u64 = 60;

fn key(round: &str, task: u64, number: u64, part: u64) -> Key {
    let segments = [
        "t",
        round,
        &task.to_string(),
        &sortable(number),
        &part.to_string(),
    ];
    Key::from_segments(segments).expect("a key within the limits")
}

fn keys_of(task: u64) -> u64 {
    if task.is_multiple_of(2) { 1 } else { KEYS }
}

async fn open(directory: &Path) -> Arc<dyn Store> {
    sled::open(directory, SledOptions::default())
        .await
        .expect("the store opens after a kill")
}

/// Writes until it is killed and prints `ack <task> <number> <revision>` for each commit that returned. Does
/// nothing as a test of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writer_child() {
    let Some(directory) = std::env::var_os(DIRECTORY) else {
        return;
    };
    let round = std::env::var(ROUND).unwrap();
    let store = open(Path::new(&directory)).await;
    let lease = store.lease(60_000).await.unwrap();
    let leased = Key::from_segments(["leased", &round]).unwrap();
    let txn = Txn::new().put_leased(leased, "owner", lease.id());
    store.commit(txn).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..TASKS {
        let store = Arc::clone(&store);
        let round = round.clone();
        tasks.spawn(async move {
            for number in 0.. {
                let mut txn = Txn::new();
                for part in 0..keys_of(task) {
                    let value = vec![b'v'; 100 + (number as usize * 37) % 400];
                    txn = txn.put(key(&round, task, number, part), value);
                }
                // A row that is rewritten and one that goes, in the same transaction.
                if task % 2 == 1 {
                    let of_task = Key::from_segments(["last", &round, &task.to_string()]).unwrap();
                    txn = txn.put(of_task, number.to_string());
                }
                let revision = store.commit(txn).await.unwrap();
                let mut out = std::io::stdout().lock();
                writeln!(out, "ack {task} {number} {revision}").unwrap();
            }
        });
    }
    while tasks.join_next().await.is_some() {}
}

/// What a writer was told before it ended.
#[derive(Default)]
struct Acknowledged {
    /// By task and number.
    commits: BTreeMap<(u64, u64), Revision>,
}

/// Runs a writer; `kill_after` acknowledgements it is killed, else it ends by itself at a crash point.
fn run_writer(
    directory: &Path,
    round: &str,
    kill_after: Option<u64>,
    environment: &[(&str, String)],
) -> Acknowledged {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["writer_child", "--exact", "--nocapture"])
        .env(DIRECTORY, directory)
        .env(ROUND, round)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut acknowledged = Acknowledged::default();
    let mut count = 0;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        // The test runner writes on the same lines.
        let Some((_, ack)) = line.split_once("ack ") else {
            continue;
        };
        let numbers: Vec<u64> = ack.split(' ').map(|text| text.parse().unwrap()).collect();
        let [task, number, revision] = numbers[..] else {
            panic!("{line}");
        };
        let revision = Revision(revision);
        acknowledged.commits.insert((task, number), revision);
        count += 1;
        if kill_after == Some(count) {
            // What it wrote to the pipe before it died is still read.
            child.kill().unwrap();
        }
    }
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(9), "the writer was killed: {status}");
    acknowledged
}

async fn rows(store: &dyn Store, prefix: &Prefix) -> BTreeMap<Key, (Revision, usize)> {
    let mut found = BTreeMap::new();
    let mut after: Option<Key> = None;
    loop {
        let Page { entries, more, .. } = store.scan(prefix, after.as_ref(), 1000).await.unwrap();
        after = entries.last().map(|entry| entry.key.clone());
        for entry in entries {
            found.insert(entry.key, (entry.revision, entry.value.len()));
        }
        if !more {
            return found;
        }
    }
}

/// Checks a round; returns the highest revision that the store used.
async fn check(store: &dyn Store, round: &str, acknowledged: &Acknowledged) -> Revision {
    let prefix = Prefix::from_segments(["t", round]).unwrap();
    let found = rows(store, &prefix).await;
    for ((task, number), revision) in &acknowledged.commits {
        for part in 0..keys_of(*task) {
            let row = found.get(&key(round, *task, *number, part));
            let (there, _) = row.unwrap_or_else(|| {
                panic!("round {round}: {task}/{number}/{part}, acknowledged at {revision}, is gone")
            });
            assert_eq!(there, revision);
        }
    }
    let mut parts: BTreeMap<(u64, u64), BTreeSet<Revision>> = BTreeMap::new();
    let mut counts: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    for (key, (revision, size)) in &found {
        let segments: Vec<&str> = key.segments().collect();
        let task: u64 = segments[2].parse().unwrap();
        let number: u64 = segments[3].parse().unwrap();
        assert_eq!(*size, 100 + (number as usize * 37) % 400);
        parts.entry((task, number)).or_default().insert(*revision);
        *counts.entry((task, number)).or_default() += 1;
    }
    for ((task, number), count) in counts {
        assert_eq!(
            count,
            keys_of(task),
            "round {round}: {task}/{number} is torn"
        );
        let revisions = &parts[&(task, number)];
        assert_eq!(revisions.len(), 1, "one revision for a transaction");
        let revision = *revisions.first().unwrap();
        if task % 2 == 1 {
            // The rewritten row belongs to the newest transaction that is there.
            let newest = parts.range((task, 0)..(task + 1, 0)).last().unwrap().0.1;
            if number == newest {
                let last = Key::from_segments(["last", round, &task.to_string()]).unwrap();
                let last = store.get(&last).await.unwrap().unwrap();
                assert_eq!(last.revision, revision);
                assert_eq!(last.value, number.to_string());
            }
        }
    }
    let leased = Prefix::from_segments(["leased"]).unwrap();
    assert!(rows(store, &leased).await.is_empty(), "leases died");
    let highest = found.values().map(|(revision, _)| *revision).max();
    highest.unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_at_any_moment_lose_nothing_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let mut before = Revision(0);
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut all = BTreeMap::new();
    for round in 0..KILLS {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let name = round.to_string();
        let path = directory.path().to_owned();
        let kill_after = 1 + random % 400;
        let acknowledged = tokio::task::spawn_blocking({
            let name = name.clone();
            move || run_writer(&path, &name, Some(kill_after), &[])
        })
        .await
        .unwrap();
        assert!(acknowledged.commits.len() as u64 >= kill_after);
        let lowest = acknowledged.commits.values().min().unwrap();
        assert!(*lowest > before, "{lowest} was given out before");
        let store = open(directory.path()).await;
        let highest = check(&*store, &name, &acknowledged).await;
        assert!(store.revision().await.unwrap() >= highest);
        before = before.max(highest);
        all.insert(name, acknowledged);
        store.close().await.unwrap();
    }
    // Nothing of an earlier round was lost by a later kill.
    let store = open(directory.path()).await;
    for (name, acknowledged) in &all {
        check(&*store, name, acknowledged).await;
    }
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_at_every_crash_point_lose_nothing_acknowledged() {
    for point in [
        "store.before_apply",
        "store.after_apply",
        "store.after_sync",
        "store.after_answer",
    ] {
        for hit in [1, 2, 3, 9, 40] {
            let directory = tempfile::tempdir().unwrap();
            let data = directory.path().join("store");
            let log = directory.path().join("log");
            let environment = [
                (CRASH_AT, format!("{point}:{hit}")),
                (CRASH_LOG, log.display().to_string()),
            ];
            let path = data.clone();
            let acknowledged =
                tokio::task::spawn_blocking(move || run_writer(&path, "p", None, &environment))
                    .await
                    .unwrap();
            let log = std::fs::read_to_string(log).unwrap();
            assert_eq!(log.lines().last(), Some(point));
            assert_eq!(log.lines().filter(|line| *line == point).count(), hit);
            let store = open(&data).await;
            let highest = check(&*store, "p", &acknowledged).await;
            if hit == 2 {
                // The first group held the lease's row; the second is the first of the tasks.
                let written = highest > Revision(0);
                match point {
                    "store.before_apply" => assert!(!written, "not applied yet"),
                    "store.after_sync" | "store.after_answer" => assert!(written, "it was synced"),
                    // Applied but not synced: the disk may have it or not.
                    _ => {}
                }
            }
            store.close().await.unwrap();
        }
    }
}
