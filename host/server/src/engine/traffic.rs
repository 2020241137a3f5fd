//! The seam behind which traffic is steered, and the simulated pool that stands there until a real load balancer does.
//!
//! A pool has members with weights from 0 to 100; a member that was never set has 100. The simulated pool keeps weights
//! durably in the store, answers read-backs, and can be told to fail, so that everything above the seam is tried against
//! something that can go wrong. It owns the rows `pool-weight/…` and `pool-fault/…` and nothing else.

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use windlass_domain::{
    id::{PoolId, ServerId},
    pool::{MemberHealth, MemberStats},
};
use windlass_store::{Store, Txn};

use super::rows;

/// The weight of a member that was never set.
pub const DEFAULT_WEIGHT: u32 = 100;

/// Why a pool could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum TrafficError {
    /// The pool refused or could not be reached; trying again may help.
    #[error("the pool {pool} failed: {reason}")]
    Failed {
        /// The pool.
        pool: PoolId,
        /// Why.
        reason: String,
    },
    /// What was read back is not what was set.
    #[error("the pool {pool} shows a weight of {found} for {server} after it was set to {wanted}")]
    ReadBack {
        /// The pool.
        pool: PoolId,
        /// The member.
        server: ServerId,
        /// As set.
        wanted: u32,
        /// As read.
        found: u32,
    },
}

/// Pools of back ends.
#[async_trait]
pub trait TrafficPools: Send + Sync + 'static {
    /// The weight of a member, 0 to 100.
    async fn weight(&self, pool: PoolId, server: ServerId) -> Result<u32, TrafficError>;

    /// Sets the weight of a member. Setting it again does no harm.
    async fn set_weight(
        &self,
        pool: PoolId,
        server: ServerId,
        weight: u32,
    ) -> Result<(), TrafficError>;

    /// Connections that a member still serves.
    async fn connections(&self, pool: PoolId, server: ServerId) -> Result<u32, TrafficError>;

    /// What the pool knows of each of its members: for judging a release by what its servers answer.
    async fn stats(&self, pool: PoolId) -> Result<Vec<MemberStats>, TrafficError>;
}

/// Sets a weight and compares what is read back with it: never assumed. Source: spec "Load balancers".
///
/// # Errors
/// [`TrafficError`].
pub async fn set_and_read_back(
    pools: &dyn TrafficPools,
    pool: PoolId,
    server: ServerId,
    wanted: u32,
) -> Result<(), TrafficError> {
    pools.set_weight(pool, server, wanted).await?;
    let found = pools.weight(pool, server).await?;
    if found == wanted {
        Ok(())
    } else {
        Err(TrafficError::ReadBack {
            pool,
            server,
            wanted,
            found,
        })
    }
}

/// What a simulated pool is told to do wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PoolFault {
    /// Refuse to set weights.
    pub refuse_set: bool,
    /// Accept a weight and keep the old one.
    pub ignore_set: bool,
    /// Connections that never end.
    pub stuck_connections: u32,
}

#[derive(Serialize, Deserialize)]
struct StoredWeight {
    weight: u32,
}

/// Pools whose weights are rows of the store.
pub struct SimulatedPools {
    store: Arc<dyn Store>,
}

impl SimulatedPools {
    /// Pools in this store.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// What a pool is told to do wrong.
    ///
    /// # Errors
    /// [`TrafficError::Failed`] when the store does.
    pub async fn fault(&self, pool: PoolId) -> Result<PoolFault, TrafficError> {
        let key = rows::pool_fault(&pool.to_string());
        let row = rows::read(&*self.store, &key, "a pool's fault")
            .await
            .map_err(|error| failed(pool, &error))?;
        Ok(row.map(|(fault, _)| fault).unwrap_or_default())
    }

    /// Tells a pool what to do wrong.
    ///
    /// # Errors
    /// [`TrafficError::Failed`] when the store does.
    pub async fn set_fault(&self, pool: PoolId, fault: PoolFault) -> Result<(), TrafficError> {
        let txn = Txn::new().put(rows::pool_fault(&pool.to_string()), rows::encode(&fault));
        self.store
            .commit(txn)
            .await
            .map_err(|error| failed(pool, &error))?;
        Ok(())
    }

    /// Every weight that was ever set in a pool.
    ///
    /// # Errors
    /// [`TrafficError::Failed`] when the store does.
    pub async fn weights(&self, pool: PoolId) -> Result<Vec<(ServerId, u32)>, TrafficError> {
        let entries = rows::read_all(&*self.store, &rows::pool_weights(&pool.to_string()))
            .await
            .map_err(|error| failed(pool, &error))?;
        let mut weights = Vec::with_capacity(entries.len());
        for entry in entries {
            let Some(server) = entry
                .key
                .segments()
                .next_back()
                .and_then(|id| id.parse().ok())
            else {
                continue;
            };
            let stored: StoredWeight =
                rows::decode(&entry, "a weight").map_err(|error| failed(pool, &error))?;
            weights.push((server, stored.weight));
        }
        Ok(weights)
    }
}

fn failed(pool: PoolId, error: &dyn std::error::Error) -> TrafficError {
    TrafficError::Failed {
        pool,
        reason: error.to_string(),
    }
}

#[async_trait]
impl TrafficPools for SimulatedPools {
    async fn weight(&self, pool: PoolId, server: ServerId) -> Result<u32, TrafficError> {
        let key = rows::pool_weight(&pool.to_string(), server);
        let row: Option<(StoredWeight, _)> = rows::read(&*self.store, &key, "a weight")
            .await
            .map_err(|error| failed(pool, &error))?;
        Ok(row.map_or(DEFAULT_WEIGHT, |(stored, _)| stored.weight))
    }

    async fn set_weight(
        &self,
        pool: PoolId,
        server: ServerId,
        weight: u32,
    ) -> Result<(), TrafficError> {
        let fault = self.fault(pool).await?;
        if fault.refuse_set {
            return Err(TrafficError::Failed {
                pool,
                reason: "it was told to refuse weights".to_owned(),
            });
        }
        if fault.ignore_set {
            return Ok(());
        }
        let txn = Txn::new().put(
            rows::pool_weight(&pool.to_string(), server),
            rows::encode(&StoredWeight { weight }),
        );
        self.store
            .commit(txn)
            .await
            .map_err(|error| failed(pool, &error))?;
        Ok(())
    }

    async fn connections(&self, pool: PoolId, _server: ServerId) -> Result<u32, TrafficError> {
        Ok(self.fault(pool).await?.stuck_connections)
    }

    /// Members whose weight was ever set; nothing is counted, since no traffic is sent.
    async fn stats(&self, pool: PoolId) -> Result<Vec<MemberStats>, TrafficError> {
        let sessions = self.fault(pool).await?.stuck_connections;
        let weights = self.weights(pool).await?;
        Ok(weights
            .into_iter()
            .map(|(server, weight)| MemberStats {
                server,
                weight,
                health: MemberHealth::Unchecked,
                sessions,
                requests: 0,
                errors: 0,
                retries: 0,
                redispatches: 0,
                latency_ms: None,
            })
            .collect())
    }
}
