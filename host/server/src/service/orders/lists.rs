//! The list of a workspace's orders, and how many there are in which state.
//!
//! Both read the rows of the list, see `engine::summary`; headers are read of the orders of one page alone.

use windlass_domain::{
    Timestamp,
    id::InstanceId,
    order::{Order, OrderState},
};
use windlass_store::{Blobs, Store};

use super::{Orders, dashboard::OrderCounts, failed};
use crate::{
    engine::{
        rows,
        summary::{self, PurposeKind, Summary},
    },
    service::{PageOf, PageRequest, ServiceError, records},
};

/// Rows of the list that are looked at at a time.
const SCANNED: usize = 200;

/// Filters of the list of orders.
#[derive(Debug, Clone, Default)]
pub struct OrderFilter {
    /// Only in this state.
    pub state: Option<OrderState>,
    /// Only for this.
    pub purpose: Option<PurposeKind>,
    /// Only with this strategy: `name`, or `name@version`.
    pub strategy: Option<String>,
    /// Only with this in their title or their maker's name, whatever its case.
    pub text: Option<String>,
    /// Only made at this time or later.
    pub made_after: Option<Timestamp>,
    /// Only made before this time.
    pub made_before: Option<Timestamp>,
    /// Only with the application of this name.
    pub application: Option<String>,
    /// Only with this service instance.
    pub instance: Option<InstanceId>,
}

impl OrderFilter {
    fn lets_through(&self, order: &Summary) -> bool {
        let strategy = |wanted: &String| {
            let (name, _) = order.strategy.split_once('@').unwrap_or_default();
            *wanted == order.strategy || wanted == name
        };
        let text = |wanted: &String| {
            let wanted = wanted.to_lowercase();
            order.title.to_lowercase().contains(&wanted)
                || order.created_by.to_lowercase().contains(&wanted)
        };
        self.state.is_none_or(|state| state == order.state)
            && self
                .purpose
                .is_none_or(|purpose| order.purpose == Some(purpose))
            && self.strategy.as_ref().is_none_or(strategy)
            && self.text.as_ref().is_none_or(text)
            && self.made_after.is_none_or(|at| order.created_at >= at)
            && self.made_before.is_none_or(|at| order.created_at < at)
            && self.application.as_ref().is_none_or(|wanted| {
                let mut known = order.applications.iter();
                known.any(|(name, _)| name == wanted)
            })
            && self.instance.is_none_or(|wanted| {
                let mut known = order.applications.iter();
                known.any(|(_, instance)| *instance == wanted)
            })
    }
}

impl Orders {
    /// Orders of a workspace, newest first.
    ///
    /// # Errors
    /// A cursor that this list did not give; [`ServiceError`].
    pub async fn list(
        &self,
        workspace: &str,
        filter: &OrderFilter,
        page: &PageRequest,
    ) -> Result<PageOf<Order>, ServiceError> {
        let shared = &self.engine.shared;
        list(&*shared.store, &shared.blobs, workspace, filter, page).await
    }

    /// Orders of a workspace by state.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn counts(&self, workspace: &str) -> Result<OrderCounts, ServiceError> {
        let shared = &self.engine.shared;
        counts(&*shared.store, &shared.blobs, workspace).await
    }
}

async fn counts(
    store: &dyn Store,
    blobs: &Blobs,
    workspace: &str,
) -> Result<OrderCounts, ServiceError> {
    let mut counts = OrderCounts::default();
    let entries = rows::read_all(store, &rows::orders_of(workspace))
        .await
        .map_err(|error| failed("count orders", error))?;
    for entry in entries {
        let known = summary::read(store, blobs, &entry)
            .await
            .map_err(|error| failed("count orders", error))?;
        let Some((_, order)) = known else { continue };
        counts.total += 1;
        counts.active += u64::from(!order.state.is_terminal());
        *counts.by_state.entry(order.state).or_default() += 1;
    }
    Ok(counts)
}

async fn list(
    store: &dyn Store,
    blobs: &Blobs,
    workspace: &str,
    filter: &OrderFilter,
    page: &PageRequest,
) -> Result<PageOf<Order>, ServiceError> {
    let prefix = rows::orders_of(workspace);
    let mut before = page
        .cursor
        .as_deref()
        .map(|cursor| records::position_of(&prefix, cursor))
        .transpose()?;
    let mut items: Vec<Order> = Vec::new();
    loop {
        let found = store
            .scan_reverse(&prefix, before.as_ref(), SCANNED)
            .await
            .map_err(|error| failed("list orders", error))?;
        for entry in &found.entries {
            let known = summary::read(store, blobs, entry)
                .await
                .map_err(|error| failed("list orders", error))?;
            let Some((id, _)) = known.filter(|(_, known)| filter.lets_through(known)) else {
                continue;
            };
            let order = rows::read_order(store, id)
                .await
                .map_err(|error| failed("read an order", error))?;
            let Some((order, _)) = order else { continue };
            if filter.state.is_some_and(|state| state != order.state) {
                continue;
            }
            // One more than the page proves that there is a next one.
            if items.len() == page.size {
                let next = items
                    .last()
                    .map(|last| records::cursor_of(&prefix, &rows::order_of(workspace, last.id)));
                return Ok(PageOf { items, next });
            }
            items.push(order);
        }
        before = found.entries.last().map(|entry| entry.key.clone());
        if !found.more {
            return Ok(PageOf { items, next: None });
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use windlass_domain::{Digest, id::AppId, limits::Limits, plan::Plan};
    use windlass_store::{
        Txn,
        sled::{self, SledOptions},
    };

    use super::*;
    use crate::engine::store_json;

    const ORDERS: u128 = 10_000;
    /// Every so many orders are of another application.
    const APPLICATIONS: u128 = 100;
    /// Every so many rows are as an earlier version wrote them.
    const EMPTY: u128 = 501;

    /// Whether an order is found.
    type Expected = fn(u128) -> bool;

    fn plan(application: u128) -> Plan {
        let id = |number| uuid::Uuid::from_u128(number);
        serde_json::from_value(json!({
            "schema": 1, "limits": Limits::default(), "on_failure": "block", "progress_deadline_ms": null,
            "delivery_deadline_ms": 1, "strategy": null, "steps": [], "units": [], "nodes": [], "reads": {},
            "parts": [{
                "key": format!("app-{application}~2"), "app": AppId::from_uuid(id(application)),
                "instance": instance(application), "pools": [], "env": {}, "stop": [], "start": [], "check": [],
            }],
        }))
        .unwrap()
    }

    fn instance(application: u128) -> InstanceId {
        InstanceId::from_uuid(uuid::Uuid::from_u128(application))
    }

    /// Order `number` of the workspace: the higher, the newer.
    fn order(number: u128, plan: Digest) -> Order {
        let state = match number % 10 {
            0 => OrderState::Running,
            1 => OrderState::Failed,
            _ => OrderState::Succeeded,
        };
        let by = if number.is_multiple_of(7) {
            "Berta"
        } else {
            "anna"
        };
        Order {
            plan,
            created_by: by.to_owned(),
            created_at: Timestamp::from_unix_ms(i64::try_from(number).unwrap()),
            ..rows::tests::order(number, state)
        }
    }

    #[tokio::test]
    async fn ten_thousand_orders_are_filtered_paged_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let store = sled::open(dir.path().join("store"), SledOptions::default())
            .await
            .unwrap();
        let blobs = Blobs::open_directory(dir.path().join("blobs"))
            .await
            .unwrap();
        let mut plans = Vec::new();
        for application in 0..APPLICATIONS {
            let plan = plan(application);
            plans.push((store_json(&blobs, &plan).await.unwrap(), plan));
        }
        let all: Vec<u128> = (1..=ORDERS).collect();
        for chunk in all.chunks(60) {
            let mut txn = Txn::new();
            for number in chunk {
                let (digest, plan) = &plans[usize::try_from(number % APPLICATIONS).unwrap()];
                let order = order(*number, *digest);
                let summary = if number.is_multiple_of(EMPTY) {
                    bytes::Bytes::new()
                } else {
                    Summary::of(&order, plan).encode()
                };
                txn = txn
                    .put(rows::order(order.id), rows::encode(&order))
                    .put(rows::listed(&order), summary);
            }
            store.commit(txn).await.unwrap();
        }

        let none = OrderFilter::default;
        let filters: [(&str, OrderFilter, Expected); 8] = [
            ("none", none(), |_| true),
            (
                "application",
                OrderFilter {
                    application: Some("app-7".to_owned()),
                    ..none()
                },
                |number| number % APPLICATIONS == 7,
            ),
            (
                "instance and state",
                OrderFilter {
                    instance: Some(instance(11)),
                    state: Some(OrderState::Failed),
                    ..none()
                },
                |number| number % APPLICATIONS == 11,
            ),
            (
                "instance and another state",
                OrderFilter {
                    instance: Some(instance(11)),
                    state: Some(OrderState::Running),
                    ..none()
                },
                |_| false,
            ),
            (
                "text",
                OrderFilter {
                    text: Some("BERT".to_owned()),
                    ..none()
                },
                |number: u128| number.is_multiple_of(7),
            ),
            (
                "time",
                OrderFilter {
                    made_after: Some(Timestamp::from_unix_ms(100)),
                    made_before: Some(Timestamp::from_unix_ms(250)),
                    ..none()
                },
                |number| (100..250).contains(&number),
            ),
            (
                "another purpose",
                OrderFilter {
                    purpose: Some(PurposeKind::Rollback),
                    ..none()
                },
                |_| false,
            ),
            (
                "an application that no order has",
                OrderFilter {
                    application: Some("app-7~2".to_owned()),
                    ..none()
                },
                |_| false,
            ),
        ];
        for (name, filter, expect) in filters {
            let start = std::time::Instant::now();
            let mut found = Vec::new();
            let mut page = PageRequest {
                size: 100,
                cursor: None,
            };
            loop {
                let PageOf { items, next } =
                    list(&*store, &blobs, "prod", &filter, &page).await.unwrap();
                assert!(items.len() == page.size || next.is_none(), "{name}");
                found.extend(items.iter().map(|order| order.id.uuid().as_u128()));
                page.cursor = next;
                if page.cursor.is_none() {
                    break;
                }
            }
            let expected: Vec<u128> = all.iter().rev().copied().filter(|n| expect(*n)).collect();
            println!(
                "{name}: {} of {ORDERS} in {:?}",
                found.len(),
                start.elapsed()
            );
            assert!(
                found == expected,
                "{name}: {} of {}",
                found.len(),
                expected.len()
            );
        }
        let start = std::time::Instant::now();
        let found = counts(&*store, &blobs, "prod").await.unwrap();
        println!("counts in {:?}", start.elapsed());
        assert_eq!((found.total, found.active), (10_000, 1_000));
        assert_eq!(found.by_state[&OrderState::Succeeded], 8_000);
        assert_eq!(counts(&*store, &blobs, "test").await.unwrap().total, 0);
        store.close().await.unwrap();
    }
}
