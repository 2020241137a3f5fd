//! The seam behind which traffic is steered, and the simulated pool. Those of load balancers are in
//! `service::load_balancers::pools`.
//!
//! A pool has members with weights from 0 to 100; a member that was never set has 100. The simulated pool keeps weights
//! durably in the store, answers read-backs, and can be told to fail, so that everything above the seam is tried against
//! something that can go wrong. It owns the rows `pool-weight/…`,
//! `pool-fault/…` and `pool-traffic/…` and nothing else.

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use windlass_domain::{
    Timestamp,
    id::{PoolId, ServerId},
    pool::{MemberHealth, MemberStats, Responses},
};
use windlass_store::{Store, Txn};

use super::rows;
use crate::clock;

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
    /// The agent of its load balancer is not connected, and may be so again in a moment.
    #[error("the pool {pool} cannot be reached now: {reason}")]
    Away {
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

    /// Whether a member takes new requests now: with weight, and up as far as the pool knows.
    async fn serves(&self, pool: PoolId, server: ServerId) -> Result<bool, TrafficError> {
        Ok(self.weight(pool, server).await? > 0)
    }

    /// Sets the weight of a member. Setting it again does no harm.
    async fn set_weight(
        &self,
        pool: PoolId,
        server: ServerId,
        weight: u32,
    ) -> Result<(), TrafficError>;

    /// Returns when a member that has got weight takes new requests, as far as the pool knows: before its own check finds it
    /// up it gets none, and nothing must rely on it.
    async fn comes_up(&self, _pool: PoolId, _server: ServerId) -> Result<(), TrafficError> {
        Ok(())
    }

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

/// What a simulated pool pretends that its members answer, from the moment that it is told on: for trying what judges it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SimulatedTraffic {
    /// Members; others answer nothing.
    pub members: Vec<SimulatedMember>,
}

/// What one member of a simulated pool answers while it has a weight.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SimulatedMember {
    /// The member.
    pub server: ServerId,
    /// Requests per second.
    pub requests_per_s: u32,
    /// Of a hundred of them, those that fail.
    #[serde(default)]
    pub error_percent: u32,
    /// Mean time to an answer, in milliseconds.
    #[serde(default)]
    pub latency_ms: Option<u32>,
}

#[derive(Serialize, Deserialize)]
struct StoredTraffic {
    since: Timestamp,
    traffic: SimulatedTraffic,
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

    /// Tells a pool what its members answer from now on.
    ///
    /// # Errors
    /// [`TrafficError::Failed`] when the store does.
    pub async fn set_traffic(
        &self,
        pool: PoolId,
        traffic: SimulatedTraffic,
    ) -> Result<(), TrafficError> {
        let stored = StoredTraffic {
            since: clock::now(),
            traffic,
        };
        let txn = Txn::new().put(rows::pool_traffic(&pool.to_string()), rows::encode(&stored));
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

    /// Members whose weight was ever set, and those that it was told of. No traffic is sent: what is counted is what it was
    /// told, since then.
    async fn stats(&self, pool: PoolId) -> Result<Vec<MemberStats>, TrafficError> {
        let sessions = self.fault(pool).await?.stuck_connections;
        let key = rows::pool_traffic(&pool.to_string());
        let told = rows::read::<StoredTraffic>(&*self.store, &key, "a pool's traffic")
            .await
            .map_err(|error| failed(pool, &error))?;
        let told = told.map(|(told, _)| told);
        let mut weights: BTreeMap<ServerId, u32> = self.weights(pool).await?.into_iter().collect();
        for member in told.iter().flat_map(|told| &told.traffic.members) {
            weights.entry(member.server).or_insert(DEFAULT_WEIGHT);
        }
        let now = clock::now();
        Ok(weights
            .into_iter()
            .map(|(server, weight)| {
                let mut stats = MemberStats {
                    server,
                    weight,
                    health: MemberHealth::Unchecked,
                    sessions,
                    requests: 0,
                    errors: 0,
                    retries: 0,
                    redispatches: 0,
                    latency_ms: None,
                    responses: Responses::default(),
                };
                let mine = told.iter().find_map(|told| {
                    let mut members = told.traffic.members.iter();
                    Some((told.since, members.find(|member| member.server == server)?))
                });
                if let Some((since, member)) = mine
                    && weight > 0
                {
                    let rate = u64::from(member.requests_per_s);
                    stats.requests = rate.saturating_mul(now.since_ms(since)) / 1000;
                    stats.errors = stats.requests * u64::from(member.error_percent.min(100)) / 100;
                    stats.latency_ms = member.latency_ms;
                }
                stats
            })
            .collect())
    }
}
