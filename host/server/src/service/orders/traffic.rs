//! The traffic of an order: what its pools show, and what people change of it while it runs.
//!
//! A change is an action like others: the engine keeps it and makes it. Here it is waited for, so that whoever asked learns
//! whether the safety envelope and the pools allowed it.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};
use windlass_domain::{
    id::{OrderId, PoolId, ServerId},
    order::{Action, Order},
    progress::{EditState, Progress, TrafficEdit},
    share::share_of,
};

use super::Orders;
use crate::service::{Caller, ServiceError};

/// How long a change is waited for.
const CHANGED_WITHIN: Duration = Duration::from_secs(20);

/// The traffic of an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TrafficView {
    /// The last change by a person, and how far it is.
    pub edit: Option<TrafficEdit>,
    /// The pools of its applications.
    pub pools: Vec<PoolTraffic>,
}

/// One pool of one application of an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PoolTraffic {
    /// The application.
    pub application: String,
    /// The pool.
    pub pool: PoolId,
    /// What its cells get.
    pub cells: Vec<CellShare>,
    /// Its members.
    pub members: Vec<MemberShare>,
}

/// What the servers of one cell get of a pool's traffic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct CellShare {
    /// The cell's identifier.
    pub cell: String,
    /// Sum of its members' weights.
    pub weight: u32,
    /// Their share by these weights, in percent; absent while no member has any.
    pub share_percent: Option<f64>,
}

/// What one member gets of a pool's traffic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MemberShare {
    /// The server.
    pub server: ServerId,
    /// Its cell's identifier.
    pub cell: String,
    /// Weight as the pool shows it, 0 to 100.
    pub weight: u32,
    /// Its share by these weights, in percent; absent while no member has any.
    pub share_percent: Option<f64>,
}

impl Orders {
    /// What the pools of an order's applications show.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn traffic(&self, workspace: &str, id: OrderId) -> Result<TrafficView, ServiceError> {
        let (_, plan, progress) = self.progress(workspace, id).await?;
        let shared = &self.engine.shared;
        let mut pools = Vec::new();
        for part in &plan.parts {
            let members = shared.planning.members(part.instance).await;
            let members = members.map_err(|message| ServiceError::Unavailable { message })?;
            for pool in &part.pools {
                let mut found = Vec::with_capacity(members.len());
                for (server, cell) in &members {
                    let weight = shared.pools.weight(*pool, *server).await;
                    let weight = weight.map_err(|error| ServiceError::Unavailable {
                        message: error.to_string(),
                    })?;
                    found.push((*server, cell.clone(), weight));
                }
                pools.push(shown(part.key.clone(), *pool, found));
            }
        }
        Ok(TrafficView {
            edit: progress.node(0).edit.clone(),
            pools,
        })
    }

    /// Changes traffic by hand ([`Action::SetWeights`], [`Action::ShiftCell`]), and waits until that is done. Answers the
    /// header after it.
    ///
    /// # Errors
    /// [`ServiceError`]; `traffic_not_changed` when the safety envelope forbids it or a pool failed.
    pub async fn change_traffic(
        &self,
        caller: Caller,
        workspace: &str,
        id: OrderId,
        action: Action,
    ) -> Result<Order, ServiceError> {
        // Taken before acting, so that no event falls between the two.
        let mut watch = self.watch(id).await?;
        self.act(caller, workspace, id, action).await?;
        let edit = |progress: &Progress| progress.node(0).edit.clone();
        let (_, _, progress) = self.progress(workspace, id).await?;
        let number = edit(&progress).map_or(0, |edit| edit.number);
        let made = tokio::time::timeout(CHANGED_WITHIN, async {
            loop {
                let (_, _, progress) = self.progress(workspace, id).await?;
                match edit(&progress) {
                    Some(edit) if edit.number == number => match edit.state {
                        EditState::Due => {}
                        EditState::Done => return Ok(()),
                        EditState::Failed(message) => {
                            return Err(ServiceError::Conflict {
                                code: "traffic_not_changed",
                                message,
                                mend: "choose other weights, or mend the pool, and try again"
                                    .to_owned(),
                            });
                        }
                    },
                    // A later one: this one is over.
                    Some(_) | None => return Ok(()),
                }
                if watch.next().await.is_err() {
                    watch = self.watch(id).await?;
                }
            }
        });
        match made.await {
            Ok(made) => made?,
            Err(_) => {
                return Err(ServiceError::Unavailable {
                    message: format!(
                        "the change of traffic is kept, and was not made within {} s: look at the order's traffic",
                        CHANGED_WITHIN.as_secs()
                    ),
                });
            }
        }
        Ok(self.get(workspace, id).await?.0)
    }
}

fn shown(application: String, pool: PoolId, members: Vec<(ServerId, String, u32)>) -> PoolTraffic {
    let all: u32 = members.iter().map(|(_, _, weight)| weight).sum();
    let mut sums: BTreeMap<&str, u32> = BTreeMap::new();
    for (_, cell, weight) in &members {
        *sums.entry(cell).or_default() += weight;
    }
    let cells = sums
        .into_iter()
        .map(|(cell, weight)| CellShare {
            cell: cell.to_owned(),
            weight,
            share_percent: share_of(weight, all),
        })
        .collect();
    let members = members
        .into_iter()
        .map(|(server, cell, weight)| MemberShare {
            server,
            cell,
            weight,
            share_percent: share_of(weight, all),
        })
        .collect();
    PoolTraffic {
        application,
        pool,
        cells,
        members,
    }
}
