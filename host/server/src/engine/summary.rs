//! What lists and counts need of an order: the value of its row in its workspace's list.
//!
//! Written in the commit that makes the order and in every one that changes its state, so that a filter or a count over ten
//! thousand orders reads one range of small rows and no headers. A row of an earlier version is empty: then it is made from
//! header and plan.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use windlass_domain::{
    Timestamp,
    id::{InstanceId, OrderId},
    order::{Order, OrderState, Purpose},
    plan::Plan,
};
use windlass_store::{Blobs, Entry, Store};

use super::{PlanError, load_plan, rows};

/// What orders are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PurposeKind {
    /// Releases of packages.
    Release,
    /// Rollbacks.
    Rollback,
    /// Operations of any kind.
    Operation,
}

impl PurposeKind {
    /// `None`: an invocation, which is in a list of its own.
    const fn of(purpose: &Purpose) -> Option<Self> {
        match purpose {
            Purpose::Release => Some(Self::Release),
            Purpose::Rollback { .. } => Some(Self::Rollback),
            Purpose::Operation { .. } => Some(Self::Operation),
            Purpose::Invocation { .. } => None,
        }
    }
}

/// What is found and counted without an order's header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) state: OrderState,
    pub(crate) purpose: Option<PurposeKind>,
    pub(crate) title: String,
    pub(crate) strategy: String,
    pub(crate) created_by: String,
    pub(crate) created_at: Timestamp,
    /// Applications by name, with their service instances: at most as many as an order can name.
    pub(crate) applications: Vec<(String, InstanceId)>,
}

/// Why a summary could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SummaryError {
    #[error("a row of the list of orders cannot be read")]
    Row(#[from] rows::RowError),
    #[error("the plan of an order that an earlier version listed cannot be read")]
    Plan(#[from] PlanError),
}

impl Summary {
    pub(crate) fn of(order: &Order, plan: &Plan) -> Self {
        let mut applications: Vec<(String, InstanceId)> = plan
            .parts
            .iter()
            .map(|part| {
                // A rollback to several earlier releases of one application has several parts of it.
                let name = part.key.split('~').next().unwrap_or_default();
                (name.to_owned(), part.instance)
            })
            .collect();
        applications.sort();
        applications.dedup();
        Self {
            state: order.state,
            purpose: PurposeKind::of(&order.purpose),
            title: order.title.clone(),
            strategy: order.strategy.clone(),
            created_by: order.created_by.clone(),
            created_at: order.created_at,
            applications,
        }
    }

    pub(crate) fn encode(&self) -> Bytes {
        rows::encode(self)
    }
}

/// The order of a row of a list, and what the row says of it; `None`: the order was removed a moment ago.
pub(crate) async fn read(
    store: &dyn Store,
    blobs: &Blobs,
    entry: &Entry,
) -> Result<Option<(OrderId, Summary)>, SummaryError> {
    let id = entry.key.segments().next_back();
    let Some(id) = id.and_then(|id| id.parse().ok()) else {
        return Ok(None);
    };
    if !entry.value.is_empty() {
        return Ok(Some((
            id,
            rows::decode(entry, "a row of the list of orders")?,
        )));
    }
    let Some((order, _)) = rows::read_order(store, id).await? else {
        return Ok(None);
    };
    let plan = load_plan(blobs, order.plan).await?;
    Ok(Some((id, Summary::of(&order, &plan))))
}
