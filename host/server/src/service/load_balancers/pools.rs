//! The engine's seam to pools of every kind: each request goes to what stands behind its pool.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use windlass_domain::{
    id::{PoolId, ServerId},
    pool::MemberStats,
};

use super::{LoadBalancers, steered::SteeredPool, steering::SteeringError};
use crate::{
    engine::traffic::{SimulatedPools, TrafficError, TrafficPools},
    gateway::QueryFailure,
};

/// Simulated pools, and those of load balancers.
pub struct AllPools {
    simulated: Arc<SimulatedPools>,
    balancers: LoadBalancers,
    /// Pools that are not of load balancers; what a pool is made of never changes.
    others: Mutex<HashSet<PoolId>>,
}

impl AllPools {
    /// Of both kinds.
    #[must_use]
    pub fn new(simulated: Arc<SimulatedPools>, balancers: LoadBalancers) -> Self {
        Self {
            simulated,
            balancers,
            others: Mutex::default(),
        }
    }

    async fn steered(&self, pool: PoolId) -> Result<Option<SteeredPool>, TrafficError> {
        if self.others().contains(&pool) {
            return Ok(None);
        }
        let found = self.balancers.steered(pool).await;
        let found = found.map_err(|error| failed(pool, &error))?;
        if found.is_none() {
            self.others().insert(pool);
        }
        Ok(found)
    }

    fn others(&self) -> std::sync::MutexGuard<'_, HashSet<PoolId>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn failed(pool: PoolId, error: &dyn std::error::Error) -> TrafficError {
    TrafficError::Failed {
        pool,
        reason: crate::platform::chain(error),
    }
}

/// Of one whose agent is not connected, or mute, it is known that it may come back.
fn not_steered(pool: PoolId, error: &SteeringError) -> TrafficError {
    match error {
        SteeringError::Agent(
            QueryFailure::Offline { .. }
            | QueryFailure::SessionLost { .. }
            | QueryFailure::Timeout { .. },
        ) => TrafficError::Away {
            pool,
            reason: crate::platform::chain(error),
        },
        SteeringError::Agent(_) | SteeringError::OddAnswer | SteeringError::Service(_) => {
            failed(pool, error)
        }
    }
}

async fn member(
    steered: &SteeredPool,
    pool: PoolId,
    server: ServerId,
) -> Result<MemberStats, TrafficError> {
    let found = steered.member(server).await;
    found
        .map_err(|error| not_steered(pool, &error))?
        .ok_or_else(|| TrafficError::Failed {
            pool,
            reason: format!(
                "HAProxy does not have the server {server}: its agent reports no address, or the load balancer has not \
                 heard of it yet; look at its state"
            ),
        })
}

#[async_trait]
impl TrafficPools for AllPools {
    async fn weight(&self, pool: PoolId, server: ServerId) -> Result<u32, TrafficError> {
        match self.steered(pool).await? {
            Some(steered) => Ok(member(&steered, pool, server).await?.weight),
            None => self.simulated.weight(pool, server).await,
        }
    }

    async fn serves(&self, pool: PoolId, server: ServerId) -> Result<bool, TrafficError> {
        match self.steered(pool).await? {
            Some(steered) => {
                let kept = steered.is_to_be_drained(server).await;
                // HAProxy may not have heard of it yet.
                let drained = kept.map_err(|error| not_steered(pool, &error))?;
                Ok(!drained && member(&steered, pool, server).await?.serves())
            }
            None => self.simulated.serves(pool, server).await,
        }
    }

    async fn set_weight(
        &self,
        pool: PoolId,
        server: ServerId,
        weight: u32,
    ) -> Result<(), TrafficError> {
        let Some(steered) = self.steered(pool).await? else {
            return self.simulated.set_weight(pool, server, weight).await;
        };
        let set = steered.set_weight(server, weight).await;
        set.map_err(|error| not_steered(pool, &error))
    }

    async fn comes_up(&self, pool: PoolId, server: ServerId) -> Result<(), TrafficError> {
        let Some(steered) = self.steered(pool).await? else {
            return Ok(());
        };
        let up = steered.comes_up(server).await;
        up.map_err(|error| not_steered(pool, &error))?
            .map_err(|reason| TrafficError::Failed { pool, reason })
    }

    async fn connections(&self, pool: PoolId, server: ServerId) -> Result<u32, TrafficError> {
        match self.steered(pool).await? {
            Some(steered) => Ok(member(&steered, pool, server).await?.sessions),
            None => self.simulated.connections(pool, server).await,
        }
    }

    async fn stats(&self, pool: PoolId) -> Result<Vec<MemberStats>, TrafficError> {
        match self.steered(pool).await? {
            Some(steered) => steered
                .stats()
                .await
                .map_err(|error| not_steered(pool, &error)),
            None => self.simulated.stats(pool).await,
        }
    }
}
