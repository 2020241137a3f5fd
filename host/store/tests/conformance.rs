//! The suite for the embedded back ends.
#![allow(clippy::unwrap_used, reason = "helpers of tests, a failure is a panic")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use windlass_store::conformance::{Harness, Wish, run_all};
use windlass_store::memory::{self, MemoryOptions};
use windlass_store::sled::{self, SledOptions};
use windlass_store::{Store, StoreError};

/// While it lives, tokio's stopped clock moves only when a test moves it.
struct StoppedClock {
    _release: std::sync::mpsc::SyncSender<()>,
}

impl StoppedClock {
    fn stop() -> Self {
        tokio::time::pause();
        let (release, released) = std::sync::mpsc::sync_channel::<()>(1);
        // tokio does not move its stopped clock by itself while a blocking task runs.
        drop(tokio::task::spawn_blocking(move || released.recv()));
        Self { _release: release }
    }
}

struct Memory;

#[async_trait]
impl Harness for Memory {
    async fn fresh(&self, wish: Wish) -> Arc<dyn Store> {
        memory::open(MemoryOptions {
            ring: wish.ring,
            trace: wish.trace,
        })
        .expect("a store in memory")
    }

    async fn reopen(&self) -> Option<Arc<dyn Store>> {
        None
    }

    fn is_embedded(&self) -> bool {
        true
    }

    async fn pass_time(&self, time: Duration) {
        tokio::time::advance(time).await;
    }
}

struct Sled {
    directory: tempfile::TempDir,
    number: AtomicU32,
}

impl Sled {
    fn path(&self) -> PathBuf {
        let number = self.number.load(Ordering::SeqCst);
        self.directory.path().join(number.to_string())
    }
}

#[async_trait]
impl Harness for Sled {
    async fn fresh(&self, wish: Wish) -> Arc<dyn Store> {
        self.number.fetch_add(1, Ordering::SeqCst);
        let options = SledOptions {
            ring: wish.ring,
            trace: wish.trace,
            ..SledOptions::default()
        };
        sled::open(self.path(), options)
            .await
            .expect("an empty store")
    }

    async fn reopen(&self) -> Option<Arc<dyn Store>> {
        let store = sled::open(self.path(), SledOptions::default()).await;
        Some(store.expect("the same store"))
    }

    fn is_embedded(&self) -> bool {
        true
    }

    async fn pass_time(&self, time: Duration) {
        tokio::time::advance(time).await;
    }
}

#[tokio::test]
async fn memory_conforms() {
    let _clock = StoppedClock::stop();
    run_all(&Memory).await;
}

#[tokio::test]
async fn sled_conforms() {
    let _clock = StoppedClock::stop();
    let harness = Sled {
        directory: tempfile::tempdir().unwrap(),
        number: AtomicU32::new(0),
    };
    run_all(&harness).await;
}

#[tokio::test]
async fn a_second_opening_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let first = sled::open(directory.path(), SledOptions::default())
        .await
        .unwrap();
    let second = sled::open(directory.path(), SledOptions::default()).await;
    match second.map(|_| ()) {
        Err(StoreError::Locked { holder, .. }) => {
            assert_eq!(holder, format!("process {}", std::process::id()));
        }
        other => panic!("{other:?}"),
    }
    first.close().await.unwrap();
    let third = sled::open(directory.path(), SledOptions::default()).await;
    third.unwrap().close().await.unwrap();
}
