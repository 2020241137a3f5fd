//! A pool of a load balancer as the engine steers it: read from HAProxy, set there, and only then taken for true.

use std::time::Duration;

use tokio::time::Instant;
use windlass_domain::{
    id::{PoolId, ServerId},
    load_balancer::{BackEnd, LoadBalancer, Power},
    pool::{MemberHealth, MemberStats, Pool, Responses},
};
use windlass_store::Txn;

use super::{LoadBalancers, back_ends::SetBackEndWeight, steering::SteeringError};
use crate::{
    keys,
    service::{Caller, ServiceError, records},
};

/// How long the load balancer's own check of a server that gets traffic again may take to find it up.
const UP_WITHIN: Duration = Duration::from_secs(20);
const UP_LOOK_EVERY: Duration = Duration::from_millis(100);

/// A pool of a load balancer as the engine steers it; `None` from [`LoadBalancers::steered`]: it is another kind of pool.
pub struct SteeredPool {
    balancers: LoadBalancers,
    pool: Pool,
    balancer: LoadBalancer,
    /// Whether HAProxy is to have the pool at all.
    runs: bool,
}

impl LoadBalancers {
    /// The pool, where it is a load balancer's.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn steered(&self, id: PoolId) -> Result<Option<SteeredPool>, ServiceError> {
        Ok(self
            .of_pool(id)
            .await?
            .map(|(pool, balancer, listener)| SteeredPool {
                balancers: self.clone(),
                pool,
                runs: balancer.power == Power::Started && listener.power == Power::Started,
                balancer,
            }))
    }
}

impl SteeredPool {
    /// Its members as HAProxy shows them; of a listener that is stopped: as they are kept.
    ///
    /// # Errors
    /// [`SteeringError`].
    pub async fn stats(&self) -> Result<Vec<MemberStats>, SteeringError> {
        if !self.runs {
            let members = self.balancers.members_of(&self.pool).await?;
            return Ok(members
                .iter()
                .map(|member| MemberStats {
                    server: member.server.id,
                    weight: member.weight,
                    health: MemberHealth::Unchecked,
                    sessions: 0,
                    requests: 0,
                    errors: 0,
                    retries: 0,
                    redispatches: 0,
                    latency_ms: None,
                    responses: Responses::default(),
                })
                .collect());
        }
        let state = self.balancers.steering.look(&self.balancer).await?;
        Ok(state
            .members
            .iter()
            .filter(|member| member.pool == self.pool.id)
            .map(|member| member.stats.clone())
            .collect())
    }

    /// One member as HAProxy shows it; `None`: it has none such (yet).
    ///
    /// # Errors
    /// [`SteeringError`].
    pub async fn member(&self, server: ServerId) -> Result<Option<MemberStats>, SteeringError> {
        let found = self.stats().await?;
        Ok(found.into_iter().find(|member| member.server == server))
    }

    /// Whether a weight of 0 is kept for a server, whatever HAProxy still shows.
    ///
    /// # Errors
    /// [`SteeringError`].
    pub async fn is_to_be_drained(&self, server: ServerId) -> Result<bool, SteeringError> {
        let key = keys::back_end(self.pool.id, server);
        let row = self.balancers.store.get(&key).await;
        let Some(entry) = row.map_err(ServiceError::from)? else {
            return Ok(false);
        };
        let row: BackEnd = records::decode_plain(&entry, "a back end")?;
        Ok(row.weight == 0)
    }

    /// Keeps a weight and has HAProxy take it.
    ///
    /// # Errors
    /// [`SteeringError`].
    pub async fn set_weight(&self, server: ServerId, weight: u32) -> Result<(), SteeringError> {
        let balancers = &self.balancers;
        let set = [SetBackEndWeight { server, weight }];
        let alone = balancers.steering.alone(self.balancer.id).await;
        let caller = Caller::default();
        balancers
            .keep_weights(&caller, &self.pool, &set, Txn::new())
            .await?;
        if self.runs {
            balancers
                .steering
                .tell_weights(&alone, &self.balancer, self.pool.id, &set)
                .await?;
        }
        Ok(())
    }

    /// Returns when HAProxy's own check finds a server up: before that it gets no traffic, and the next server must not be
    /// taken out on the strength of it.
    ///
    /// # Errors
    /// [`SteeringError`]; a text where the server does not come up in time.
    pub async fn comes_up(&self, server: ServerId) -> Result<Result<(), String>, SteeringError> {
        if !self.runs {
            return Ok(Ok(()));
        }
        let steering = &self.balancers.steering;
        let deadline = Instant::now() + UP_WITHIN;
        loop {
            let state = steering.look(&self.balancer).await?;
            let member = state
                .members
                .iter()
                .find(|member| member.pool == self.pool.id && member.stats.server == server);
            let down = match member {
                Some(member) if member.stats.serves() => return Ok(Ok(())),
                Some(member) => format!("it shows `{}`", member.check.trim()),
                None => "it does not have the server".to_owned(),
            };
            if Instant::now() > deadline {
                return Ok(Err(format!(
                    "the load balancer `{}` does not find the server {server} up within {} s after its weight was set: {down}; \
                     look at the listener's health check, and whether its server reaches that one",
                    self.balancer.name,
                    UP_WITHIN.as_secs()
                )));
            }
            tokio::time::sleep(UP_LOOK_EVERY).await;
        }
    }
}
