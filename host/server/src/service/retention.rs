//! Retention: what is removed by itself, and when. Source: design, "Data".
//!
//! | what | goes when |
//! | --- | --- |
//! | idempotency records | 24 hours old |
//! | upload records | older than [`RetentionSettings::keep_ms`] |
//! | orders with their nodes, logs and events | over, older than that, not among the newest of their workspace, and no order that is not over refers to them |
//! | deliveries of notifications | ended, and older than that |
//! | events of plugins | not among the newest 1,000 |
//! | system events | not among the newest 1,000, and older than 7 days; or not among the newest 10,000 |
//! | diagnoses | over, and older than [`RetentionSettings::keep_diagnoses_ms`] |
//! | blobs | no package, kept order, diagnosis or installed release refers to them, and older than [`RetentionSettings::blob_grace_ms`] |
//!
//! One task owns the sweep ([`Retention::run`]). Every part can be cut off anywhere and is done again by the next sweep.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use tokio_util::sync::CancellationToken;
use windlass_domain::{
    Digest, Timestamp,
    diagnosis::Diagnosis,
    id::OrderId,
    manifest::Manifest,
    notification::Delivery,
    order::{Order, PlanRevision, Purpose},
    package::UploadRecord,
};
use windlass_store::{Blobs, Store, Txn, retention};

use super::{
    ServiceError, events,
    idempotency::Idempotency,
    packages::Packages,
    records::{self, Committed},
};
use crate::{
    clock,
    engine::rows as engine_rows,
    gateway::events::SystemEvent,
    keys::{self, Kind},
};

/// How long things are kept.
#[derive(Debug, Clone)]
pub struct RetentionSettings {
    /// Time between two sweeps. Default 1 hour.
    pub interval: Duration,
    /// Time before the first sweep, so that a start is not slowed down. Default 10 minutes.
    pub first_after: Duration,
    /// Upload records and orders are kept for so long, in milliseconds. Default 90 days.
    pub keep_ms: u64,
    /// So many of the newest orders of each workspace stay whatever their age. Default 1000.
    pub keep_orders: usize,
    /// Diagnoses are kept for so long, in milliseconds. Default 30 days.
    pub keep_diagnoses_ms: u64,
    /// A blob that nothing refers to is kept for so long after it was written, in milliseconds: the time in which a previewed
    /// plan can be made an order, and an upload can be committed. Default 24 hours.
    pub blob_grace_ms: u64,
}

impl Default for RetentionSettings {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(3600),
            first_after: Duration::from_secs(600),
            keep_ms: 90 * 24 * 3_600_000,
            keep_orders: 1000,
            keep_diagnoses_ms: 30 * 24 * 3_600_000,
            blob_grace_ms: 24 * 3_600_000,
        }
    }
}

/// What one sweep removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Idempotency records.
    pub idempotency_records: u64,
    /// Upload records.
    pub upload_records: u64,
    /// Deliveries of notifications.
    pub deliveries: u64,
    /// Orders.
    pub orders: u64,
    /// System events.
    pub events: u64,
    /// Diagnoses.
    pub diagnoses: u64,
    /// Blobs.
    pub blobs: u64,
    /// Their bytes.
    pub blob_bytes: u64,
}

/// The sweep. Cheap to clone.
#[derive(Clone)]
pub struct Retention {
    store: Arc<dyn Store>,
    blobs: Blobs,
    settings: RetentionSettings,
}

impl Retention {
    /// Over a store and its blobs.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, blobs: Blobs, settings: RetentionSettings) -> Self {
        Self {
            store,
            blobs,
            settings,
        }
    }

    /// Sweeps again and again until `stop`; a sweep that is under way is cut off. Run by one owned task.
    pub async fn run(&self, stop: CancellationToken) {
        let mut pause = self.settings.first_after;
        loop {
            let swept = tokio::select! {
                () = stop.cancelled() => return,
                swept = async {
                    tokio::time::sleep(pause).await;
                    self.sweep(clock::now()).await
                } => swept,
            };
            match swept {
                Ok(swept) if swept == Swept::default() => {}
                Ok(swept) => tracing::info!(
                    orders = swept.orders,
                    events = swept.events,
                    diagnoses = swept.diagnoses,
                    upload_records = swept.upload_records,
                    deliveries = swept.deliveries,
                    idempotency_records = swept.idempotency_records,
                    blobs = swept.blobs,
                    blob_bytes = swept.blob_bytes,
                    "what was kept long enough was removed"
                ),
                Err(error) => tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "what was kept long enough could not be removed; it is tried again"
                ),
            }
            pause = self.settings.interval;
        }
    }

    /// One sweep.
    ///
    /// # Errors
    /// Those of the store; what was removed before stays removed.
    pub async fn sweep(&self, now: Timestamp) -> Result<Swept, ServiceError> {
        let idempotency = Idempotency::new(self.store.clone());
        let idempotency_records = idempotency.prune().await?;
        let upload_records = self.prune_uploads(now).await?;
        let deliveries = self.prune_deliveries(now).await?;
        let orders = self.prune_orders(now).await?;
        retention::prune(
            &*self.store,
            &keys::plugin_events(),
            super::plugin_events::KEPT,
            |_| true,
        )
        .await?;
        let events = self.prune_events(now).await?;
        let diagnoses = self.prune_diagnoses(now).await?;
        let collected = self.collect_blobs(now).await?;
        Ok(Swept {
            idempotency_records,
            upload_records,
            deliveries,
            orders,
            events,
            diagnoses,
            blobs: collected.deleted,
            blob_bytes: collected.deleted_bytes,
        })
    }

    fn is_old(&self, now: Timestamp, at: Timestamp) -> bool {
        now.since_ms(at) >= self.settings.keep_ms
    }

    async fn prune_uploads(&self, now: Timestamp) -> Result<u64, ServiceError> {
        let is_old = |entry: &windlass_store::Entry| {
            serde_json::from_slice::<UploadRecord>(&entry.value)
                .is_ok_and(|record| self.is_old(now, record.finished_at))
        };
        let pruned = retention::prune(&*self.store, &keys::all_uploads(), 0, is_old).await?;
        Ok(pruned.deleted)
    }

    async fn prune_deliveries(&self, now: Timestamp) -> Result<u64, ServiceError> {
        let store = &*self.store;
        let mut deleted = 0;
        for entry in records::all(store, &keys::records(Kind::Delivery)).await? {
            let delivery: Delivery = records::decode(&entry)?;
            if !delivery.ended_at.is_some_and(|at| self.is_old(now, at)) {
                continue;
            }
            let (ws, id) = (delivery.workspace.as_str(), delivery.id.to_string());
            let txn = records::remove(&delivery, entry.revision).delete(keys::of_workspace(
                Kind::Delivery,
                ws,
                &id,
            ));
            if let Committed::Done(_) = records::commit(store, txn).await? {
                deleted += 1;
            }
        }
        Ok(deleted)
    }

    async fn prune_events(&self, now: Timestamp) -> Result<u64, ServiceError> {
        let is_old = |entry: &windlass_store::Entry| {
            serde_json::from_slice::<SystemEvent>(&entry.value)
                .is_ok_and(|event| now.since_ms(event.at) >= events::KEPT_MS)
        };
        let prefix = keys::events();
        let old = retention::prune(&*self.store, &prefix, events::KEPT, is_old).await?;
        let many = retention::prune(&*self.store, &prefix, events::KEPT_MAX, |_| true).await?;
        Ok(old.deleted + many.deleted)
    }

    async fn orders(&self) -> Result<Vec<(Order, windlass_store::Revision)>, ServiceError> {
        records::all(&*self.store, &keys::orders())
            .await?
            .iter()
            .map(|entry| Ok((records::decode_plain(entry, "an order")?, entry.revision)))
            .collect()
    }

    async fn prune_orders(&self, now: Timestamp) -> Result<u64, ServiceError> {
        let orders = self.orders().await?;
        let mut needed: HashSet<OrderId> = HashSet::new();
        let mut by_workspace: BTreeMap<&str, Vec<&(Order, _)>> = BTreeMap::new();
        for found in &orders {
            let order = &found.0;
            by_workspace
                .entry(&order.workspace)
                .or_default()
                .push(found);
            if !order.state.is_terminal() {
                needed.insert(order.lock_owner);
                needed.extend(order.rolled_back_by);
                match order.purpose {
                    Purpose::Rollback { of, .. } => {
                        needed.insert(of);
                    }
                    Purpose::Release | Purpose::Operation { .. } | Purpose::Invocation { .. } => {}
                }
            }
        }
        let mut deleted = 0;
        for orders in by_workspace.into_values() {
            // By rising id, which is by age: the newest are the last.
            let beyond = orders.len().saturating_sub(self.settings.keep_orders);
            for (order, revision) in orders.into_iter().take(beyond) {
                let ended = order.finished_at.unwrap_or(order.created_at);
                if order.state.is_terminal()
                    && self.is_old(now, ended)
                    && !needed.contains(&order.id)
                    && self.delete_order(order, *revision).await?
                {
                    deleted += 1;
                }
            }
        }
        Ok(deleted)
    }

    /// Deletes an order's rows, the header last: cut off before that, the next sweep finds it again. False: it has something
    /// to do yet, or has just changed.
    async fn delete_order(
        &self,
        order: &Order,
        revision: windlass_store::Revision,
    ) -> Result<bool, ServiceError> {
        let store = &*self.store;
        let active = engine_rows::active(order.id);
        if store.get(&active).await?.is_some() {
            return Ok(false);
        }
        for prefix in [
            engine_rows::nodes(order.id),
            engine_rows::attempts(order.id),
            engine_rows::events(order.id),
            engine_rows::samples(order.id),
            engine_rows::revisions(order.id),
        ] {
            retention::delete_prefix(store, &prefix).await?;
        }
        let key = engine_rows::order(order.id);
        let txn = Txn::new()
            .absent(active)
            .revision_is(key.clone(), revision)
            .delete(key)
            .delete(engine_rows::listed(order));
        match records::commit(store, txn).await? {
            Committed::Done(_) => Ok(true),
            Committed::Conflict => Ok(false),
        }
    }

    async fn diagnoses(&self) -> Result<Vec<(Diagnosis, windlass_store::Revision)>, ServiceError> {
        records::all(&*self.store, &keys::records(Kind::Diagnosis))
            .await?
            .iter()
            .map(|entry| Ok((records::decode(entry)?, entry.revision)))
            .collect()
    }

    async fn prune_diagnoses(&self, now: Timestamp) -> Result<u64, ServiceError> {
        let mut deleted = 0;
        for (diagnosis, revision) in self.diagnoses().await? {
            let is_old = diagnosis
                .finished_at
                .is_some_and(|at| now.since_ms(at) >= self.settings.keep_diagnoses_ms);
            if !is_old {
                continue;
            }
            let (ws, id) = (diagnosis.workspace.as_str(), diagnosis.id.to_string());
            let txn = records::remove(&diagnosis, revision).delete(keys::of_workspace(
                Kind::Diagnosis,
                ws,
                &id,
            ));
            match records::commit(&*self.store, txn).await? {
                Committed::Done(_) => deleted += 1,
                Committed::Conflict => {}
            }
        }
        Ok(deleted)
    }

    /// Every digest that a row refers to.
    async fn live(&self) -> Result<HashSet<Digest>, ServiceError> {
        let store = &*self.store;
        let packages = Packages::new(self.store.clone(), self.blobs.clone());
        let mut live: HashSet<Digest> = packages.digests_in_use().await?.into_iter().collect();
        for (order, _) in self.orders().await? {
            live.extend([order.plan, order.spec]);
            live.extend(order.revisions.iter().map(|revision| revision.digest));
        }
        for entry in records::all(store, &engine_rows::all_revisions()).await? {
            let revision: PlanRevision = records::decode_plain(&entry, "a plan's revision")?;
            live.insert(revision.digest);
        }
        let diagnoses = self.diagnoses().await?;
        live.extend(diagnoses.iter().filter_map(|(found, _)| found.record));
        for prefix in keys::all_installed() {
            for entry in records::all(store, &prefix).await? {
                let manifest: Manifest = records::decode_plain(&entry, "what is installed")?;
                live.insert(manifest.package.digest);
                live.extend(manifest.plan);
            }
        }
        Ok(live)
    }

    async fn collect_blobs(
        &self,
        now: Timestamp,
    ) -> Result<windlass_store::blobs::Collected, ServiceError> {
        let before = now.unix_ms() - i64::try_from(self.settings.blob_grace_ms).unwrap_or(i64::MAX);
        let written_before = UNIX_EPOCH + Duration::from_millis(u64::try_from(before).unwrap_or(0));
        // Read after the moment was fixed: what refers to an older blob later writes it again first, which makes it young.
        let live = self.live().await?;
        self.blobs
            .collect(
                |digest| {
                    let is_live = live.contains(&Digest::from_bytes(*digest.as_bytes()));
                    async move { Ok::<_, ServiceError>(is_live) }
                },
                written_before,
            )
            .await
    }
}

#[cfg(test)]
mod tests {
    use windlass_domain::{
        diagnosis::{DiagnosisState, FindingCounts, Subject},
        id::DiagnosisId,
        manifest::PluginRef,
        order::OrderState,
    };

    use super::*;
    use crate::gateway::events::{EventKind, EventLevel, put};
    use crate::service::{
        packages::tests::{Ready, ready, request},
        records::PageRequest,
    };

    const DAY_MS: u64 = 24 * 3_600_000;

    fn order(number: u128, state: OrderState, finished_at: Option<Timestamp>) -> Order {
        Order {
            finished_at,
            ..engine_rows::tests::order(number, state)
        }
    }

    async fn store_order(ready: &Ready, order: &Order) {
        let txn = Txn::new()
            .put(engine_rows::order(order.id), records::encode(order))
            .put(engine_rows::order_of("prod", order.id), "")
            .put(engine_rows::node(order.id, 0), "{}")
            .put(engine_rows::attempt(order.id, 0, 1), "{}")
            .put(engine_rows::event(order.id, 1), "[]");
        ready.store.commit(txn).await.unwrap();
        for what in ["plan", "spec"] {
            let bytes = format!("{what} {}", order.id.uuid().as_u128());
            ready.blobs.put_bytes(bytes.into()).await.unwrap();
        }
    }

    fn retention_of(ready: &Ready, keep_orders: usize) -> Retention {
        let settings = RetentionSettings {
            keep_orders,
            ..RetentionSettings::default()
        };
        Retention::new(ready.store.clone(), ready.blobs.clone(), settings)
    }

    #[tokio::test]
    async fn old_orders_go_with_everything_of_theirs() {
        let ready = ready().await;
        let now = clock::now();
        let days_ago = |days: u64| {
            Some(Timestamp::from_unix_ms(
                now.unix_ms() - i64::try_from(days * DAY_MS).unwrap(),
            ))
        };
        let mut rollback = order(4, OrderState::Running, None);
        let needed = order(2, OrderState::Failed, days_ago(100));
        rollback.lock_owner = needed.id;
        for order in [
            order(1, OrderState::Succeeded, days_ago(90)),
            needed,
            order(3, OrderState::Blocked, days_ago(100)),
            rollback,
            order(5, OrderState::Succeeded, days_ago(89)),
            order(6, OrderState::Succeeded, days_ago(91)),
            order(7, OrderState::Succeeded, days_ago(91)),
            order(8, OrderState::Succeeded, days_ago(91)),
        ] {
            store_order(&ready, &order).await;
        }
        // The sixth still has something to do; the last two are the newest.
        let active = engine_rows::active(OrderId::from_uuid(uuid::Uuid::from_u128(6)));
        ready
            .store
            .commit(Txn::new().put(active, ""))
            .await
            .unwrap();
        // The blobs' grace is not over yet.
        let later = now.plus_ms(DAY_MS / 2);
        let swept = retention_of(&ready, 2).sweep(later).await.unwrap();
        assert_eq!((swept.orders, swept.blobs), (1, 0));
        let gone = OrderId::from_uuid(uuid::Uuid::from_u128(1));
        for prefix in [engine_rows::nodes(gone), engine_rows::events(gone)] {
            assert!(!records::any(&*ready.store, &prefix).await.unwrap());
        }
        let left = records::all(&*ready.store, &engine_rows::orders_of("prod"))
            .await
            .unwrap();
        assert_eq!(left.len(), 7);
        let swept = retention_of(&ready, 2)
            .sweep(now.plus_ms(DAY_MS + 60_000))
            .await
            .unwrap();
        // Its plan and its specification; by now the fifth is 90 days old too.
        assert_eq!((swept.orders, swept.blobs), (1, 4));
        assert!(
            ready
                .blobs
                .exists(windlass_store::BlobDigest::of(b"plan 3"))
                .await
                .unwrap()
        );
    }

    async fn count(ready: &Ready, prefix: &windlass_store::Prefix) -> usize {
        records::all(&*ready.store, prefix).await.unwrap().len()
    }

    #[tokio::test]
    async fn old_invocations_go_with_their_index_and_blobs() {
        let ready = ready().await;
        let now = clock::now();
        let days_ago =
            |days: u64| Timestamp::from_unix_ms(now.unix_ms() - (days * DAY_MS).cast_signed());
        for (number, state, ended) in [
            (1, OrderState::Succeeded, Some(days_ago(91))),
            (2, OrderState::Cancelled, Some(days_ago(91))),
            (3, OrderState::Succeeded, Some(days_ago(10))),
            (4, OrderState::Running, None),
        ] {
            let mut order = order(number, state, ended);
            order.purpose = Purpose::Invocation {
                command: "system-info@1.0.0".to_owned(),
            };
            store_order(&ready, &order).await;
            // Like an invocation's: listed among them and not among orders.
            let listed = Txn::new()
                .delete(engine_rows::order_of("prod", order.id))
                .put(engine_rows::listed(&order), "");
            ready.store.commit(listed).await.unwrap();
        }
        let swept = retention_of(&ready, 0)
            .sweep(now.plus_ms(DAY_MS + 60_000))
            .await
            .unwrap();
        // Each with its plan and its specification.
        assert_eq!((swept.orders, swept.blobs), (2, 4));
        assert_eq!(count(&ready, &engine_rows::invocations_of("prod")).await, 2);
        assert_eq!(count(&ready, &keys::orders()).await, 2);
        let gone = OrderId::from_uuid(uuid::Uuid::from_u128(2));
        for prefix in [
            engine_rows::nodes(gone),
            engine_rows::attempts(gone),
            engine_rows::events(gone),
        ] {
            assert_eq!(count(&ready, &prefix).await, 0);
        }
    }

    #[tokio::test]
    async fn diagnoses_go_after_thirty_days_with_their_index_and_record() {
        let ready = ready().await;
        let now = clock::now();
        let days_ago =
            |days: u64| Timestamp::from_unix_ms(now.unix_ms() - (days * DAY_MS).cast_signed());
        for (number, state, ended) in [
            (1u128, DiagnosisState::Succeeded, Some(days_ago(30))),
            (2, DiagnosisState::Failed, Some(days_ago(31))),
            (3, DiagnosisState::Succeeded, Some(days_ago(29))),
            // However old: it has not ended.
            (4, DiagnosisState::Running, None),
        ] {
            let record = format!("record {number}");
            ready.blobs.put_bytes(record.clone().into()).await.unwrap();
            let diagnosis = Diagnosis {
                schema: Diagnosis::SCHEMA,
                id: DiagnosisId::from_uuid(uuid::Uuid::from_u128(number)),
                workspace: "prod".parse().unwrap(),
                plugin: PluginRef {
                    name: "server-health".to_owned(),
                    version: semver::Version::new(1, 0, 0),
                    digest: Digest::of(b"a plugin"),
                },
                subject: Subject {
                    kind: "server".to_owned(),
                    id: "srv_1".to_owned(),
                    data: serde_json::Value::Null,
                },
                parameters: serde_json::json!({}),
                items: Vec::new(),
                state,
                failure: None,
                verdict: None,
                summary: String::new(),
                counts: FindingCounts::default(),
                record: Some(Digest::of(record.as_bytes())),
                created_by: "anna".to_owned(),
                created_at: days_ago(100),
                finished_at: ended,
            };
            let index = keys::of_workspace(Kind::Diagnosis, "prod", &diagnosis.id.to_string());
            let made = records::create(&diagnosis).unwrap().put(index, "");
            ready.store.commit(made).await.unwrap();
        }
        let retention = retention_of(&ready, 0);
        let swept = retention.sweep(now).await.unwrap();
        assert_eq!(
            (swept.diagnoses, swept.blobs),
            (2, 0),
            "blobs have a day yet"
        );
        assert_eq!(count(&ready, &keys::records(Kind::Diagnosis)).await, 2);
        let index = keys::all_of_workspace(Kind::Diagnosis, "prod");
        assert_eq!(count(&ready, &index).await, 2);
        let later = now.plus_ms(DAY_MS + 60_000);
        let swept = retention.sweep(later).await.unwrap();
        // By then the third is thirty days old, too.
        assert_eq!((swept.diagnoses, swept.blobs), (1, 3));
        let kept = windlass_store::BlobDigest::of(b"record 4");
        assert!(ready.blobs.exists(kept).await.unwrap());
    }

    #[tokio::test]
    async fn packages_stay_while_something_refers_to_them() {
        let ready = ready().await;
        let kept = ready.upload(request("1", "a"), &[b"kept"]).await.unwrap();
        let gone = ready.upload(request("2", "a"), &[b"gone"]).await.unwrap();
        let caller = crate::service::records::tests::caller();
        ready
            .packages
            .delete(caller, "prod", gone.id, "2")
            .await
            .unwrap();
        let retention = retention_of(&ready, 10);
        let now = clock::now();
        assert_eq!(retention.sweep(now).await.unwrap(), Swept::default());
        let swept = retention.sweep(now.plus_ms(DAY_MS + 60_000)).await.unwrap();
        assert_eq!((swept.blobs, swept.blob_bytes), (1, 4));
        let digest = windlass_store::BlobDigest::from_bytes(*kept.digest.as_bytes());
        assert!(ready.blobs.exists(digest).await.unwrap());
        // Upload records go after 90 days, the package stays.
        let swept = retention.sweep(now.plus_ms(91 * DAY_MS)).await.unwrap();
        assert_eq!(swept.upload_records, 2);
        let filter = crate::service::packages::PackageFilter::default();
        let page = ready
            .packages
            .list("prod", &filter, PageRequest::first(5))
            .await;
        assert_eq!(page.unwrap().items.len(), 1);
    }

    #[tokio::test]
    async fn system_events_are_bounded_and_the_newest_stay() {
        let ready = ready().await;
        let now = clock::now();
        let ago = |ms: u64| Timestamp::from_unix_ms(now.unix_ms() - i64::try_from(ms).unwrap());
        let raise = |from: u64, count: u64| {
            let store = ready.store.clone();
            let at: Vec<Timestamp> = (0..count).map(|number| ago(from + number)).collect();
            async move {
                for chunk in at.chunks(100) {
                    let mut txn = Txn::new();
                    for at in chunk {
                        txn = txn.and(put(&SystemEvent {
                            schema: 1,
                            at: *at,
                            kind: EventKind::AgentSessionEvicted,
                            level: EventLevel::Warning,
                            server: None,
                            message: String::new(),
                        }));
                    }
                    store.commit(txn).await.unwrap();
                }
            }
        };
        let count = || async {
            let rows = records::all(&*ready.store, &keys::events()).await.unwrap();
            rows.len()
        };
        let retention = retention_of(&ready, 10);
        // 1,100 that are old: 1,000 are the newest.
        raise(8 * DAY_MS, 1100).await;
        assert_eq!(retention.sweep(now).await.unwrap().events, 100);
        // With 600 of today they are not.
        raise(DAY_MS, 600).await;
        assert_eq!(retention.sweep(now).await.unwrap().events, 600);
        // More than the most, all of today.
        raise(2 * DAY_MS, 9_500).await;
        assert_eq!(retention.sweep(now).await.unwrap().events, 500);
        assert_eq!(count().await, events::KEPT_MAX);
        let newest = super::super::events::SystemEvents::new(ready.store.clone());
        let filter = super::super::events::EventFilter::default();
        let page = newest.list(&filter, &PageRequest::first(1)).await.unwrap();
        assert_eq!(page.items[0].at, ago(DAY_MS));
    }

    #[tokio::test]
    async fn the_task_waits_sweeps_and_stops() {
        let ready = ready().await;
        let retention = retention_of(&ready, 10);
        let old = order(1, OrderState::Succeeded, Some(Timestamp::from_unix_ms(0)));
        store_order(&ready, &old).await;
        let retention = Retention {
            settings: RetentionSettings {
                keep_orders: 0,
                first_after: Duration::from_millis(1),
                ..retention.settings
            },
            ..retention
        };
        let from = ready.store.revision().await.unwrap();
        let prefix = keys::orders();
        let mut watch = ready.store.watch(&prefix, from).await.unwrap();
        let stop = CancellationToken::new();
        let running = tokio::spawn({
            let (retention, stop) = (retention.clone(), stop.clone());
            async move { retention.run(stop).await }
        });
        let event = watch.next().await.unwrap();
        assert_eq!(event.kind, windlass_store::EventKind::Deleted);
        stop.cancel();
        running.await.unwrap();
    }
}
