//! An engine whose lease ran out, as after the machine slept, takes a new one and goes on driving orders.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use async_trait::async_trait;
use windlass_domain::{
    limits::{Amount, Limits},
    order::{Action, OrderState},
    plugin::OnFailure,
};
use windlass_store::{
    Blobs, CommitError, Entry, Key, Lease, Page, Prefix, Revision, Store, StoreError, Txn, Watch,
    WatchError,
    memory::{self, MemoryOptions},
};
use windlass_tests::simulated::{Fleet, GivenPlans, Release, plan, server};

/// A store whose first lease is as short as one can be.
struct FirstLeaseIsShort {
    inner: Arc<dyn Store>,
    granted: AtomicBool,
}

#[async_trait]
impl Store for FirstLeaseIsShort {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.inner.get(key).await
    }

    async fn scan(
        &self,
        prefix: &Prefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }

    async fn scan_reverse(
        &self,
        prefix: &Prefix,
        before: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        self.inner.scan_reverse(prefix, before, limit).await
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, CommitError> {
        self.inner.commit(txn).await
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch, WatchError> {
        self.inner.watch(prefix, from).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.inner.revision().await
    }

    async fn lease(&self, ttl_ms: u64) -> Result<Lease, StoreError> {
        let first = !self.granted.swap(true, Ordering::SeqCst);
        let lease = self.inner.lease(if first { 100 } else { ttl_ms }).await?;
        if first {
            let row = Txn::new().put_leased(mark(), "", lease.id());
            self.inner.commit(row).await.expect("the mark is put");
        }
        Ok(lease)
    }

    async fn close(&self) -> Result<(), StoreError> {
        self.inner.close().await
    }
}

/// A row that goes with the first lease.
fn mark() -> Key {
    Key::from_segments(["default", "test", "first-lease"]).expect("a key")
}

#[tokio::test]
async fn an_engine_that_lost_its_lease_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let blobs = Blobs::open_directory(directory.path().join("blobs"))
        .await
        .unwrap();
    let planning = GivenPlans {
        reads: Mutex::default(),
        members: vec![(server(1), "cell-a".to_owned())],
        rollback: None,
        not_now: std::sync::atomic::AtomicU32::new(0),
        stage_rollbacks: std::collections::BTreeMap::new(),
        blobs: blobs.clone(),
    };
    let store = Arc::new(FirstLeaseIsShort {
        inner: memory::open(MemoryOptions::default()).unwrap(),
        granted: AtomicBool::new(false),
    });
    let all_good = Arc::new(|_, _: &_| windlass_domain::task::Outcome::Succeeded);
    let fleet = Fleet::start(store.clone(), blobs, planning, all_good).await;
    let release = Release {
        servers: 1,
        steps: 1,
        strategy: windlass_domain::expand::one_by_one(&[("app".to_owned(), server(1))]),
        limits: Limits {
            max_unavailable: Amount::Percent(100),
            ..Limits::default()
        },
        on_failure: OnFailure::Block,
        pools: Vec::new(),
    };
    let order = fleet.create(&plan(release)).await;
    let mut ticks = tokio::time::interval(std::time::Duration::from_millis(20));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while store.get(&mark()).await.unwrap().is_some() {
        assert!(
            std::time::Instant::now() < deadline,
            "the first lease lives on"
        );
        ticks.tick().await;
    }
    // Until the engine has noticed it asks to try again.
    while let Err(error) = fleet
        .engine
        .act(order, Action::Run, "test", Txn::new())
        .await
    {
        assert!(error.to_string().contains("try again"), "{error}");
        assert!(std::time::Instant::now() < deadline, "{error}");
        ticks.tick().await;
    }
    assert_eq!(fleet.wait_ended(order).await.state, OrderState::Succeeded);
    fleet.shutdown().await;
}
