//! Load balancers at their agents: what is wanted is taken there, weights are set and read back, HAProxy is looked at.
//!
//! One task converges ([`LoadBalancers::run`]); requests and the engine set weights. For one load balancer both take turns
//! (`Steering::alone`), so that a configuration never carries a weight that was changed while it was made.
//!
//! ```text
//!  a row changed, a session opened ─► make the configuration ─► the same as the agent's of this session? ─► done
//!                                                                       │ no
//!                                    refused: kept, shown, tried again ◄─┴─► apply ─► taken
//! ```
//! Nothing of it is stored: after a restart every load balancer is taken to its agent again, which finds that it has it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio::{
    sync::{Notify, OwnedMutexGuard},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use windlass_domain::{
    Digest,
    id::{CertificateId, LoadBalancerId, PoolId, ServerId},
    load_balancer::{BackEnd, Configuration, LoadBalancer, Origin, Power},
    pool::MemberStats,
    server::Server,
};
use windlass_protocol::{
    BalancerRequest, BalancerState, MemberWeight, Query, QueryErrorCode, QueryReply, SecretText,
    SessionId,
};
use windlass_store::{Revision, Store, Txn};

use super::{LoadBalancers, back_ends::SetBackEndWeight, configuration};
use crate::{
    gateway::{Gateway, QueryFailure, secrets::SecretVault},
    keys::{self, Kind},
    service::{ServiceError, certificates, records},
};

/// Between two looks at what nobody announces: bindings, sessions.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// After a configuration was refused, it is tried again so much later, unless it changes.
const REFUSED_PAUSE: Duration = Duration::from_secs(15);
/// How long an agent may take to reload.
const APPLY_WITHIN: Duration = Duration::from_secs(50);
/// How long an agent may take to look.
const LOOK_WITHIN: Duration = Duration::from_secs(5);
/// How long one that did not answer is not asked again.
const MUTE_PAUSE: Duration = Duration::from_secs(10);
/// How long an agent may take to set weights.
const SET_WITHIN: Duration = Duration::from_secs(10);
/// HAProxy's view that is younger than this is not asked for again.
const FRESH: Duration = Duration::from_millis(100);

/// Why a load balancer could not be steered.
#[derive(Debug, thiserror::Error)]
pub enum SteeringError {
    /// Its agent.
    #[error(transparent)]
    Agent(#[from] QueryFailure),
    /// The agent answered something else.
    #[error("the agent answered something else than was asked; upgrade it")]
    OddAnswer,
    /// Rows.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

impl SteeringError {
    /// With its causes, in one line.
    pub(super) fn text(&self) -> String {
        match self {
            // The agent's own words say all.
            Self::Agent(QueryFailure::Agent { source, .. }) => source.message.clone(),
            Self::Agent(_) | Self::OddAnswer | Self::Service(_) => crate::platform::chain(self),
        }
    }
}

/// A load balancer as it is.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub struct LoadBalancerState {
    /// Which.
    #[schema(value_type = LoadBalancerId)]
    pub load_balancer: LoadBalancerId,
    /// Whether it is to run.
    pub power: Power,
    /// Whether its agent is connected.
    pub online: bool,
    /// Whether HAProxy runs what is wanted now.
    pub current: bool,
    /// Why it does not, and what to do; empty: nothing is known to be wrong.
    pub error: String,
    /// Whether HAProxy runs.
    pub running: bool,
    /// Processes that still serve connections of before a reload.
    pub old_processes: u32,
    /// Every server behind it, as HAProxy shows it.
    pub members: Vec<PoolMemberState>,
}

/// A server as HAProxy shows it.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub struct PoolMemberState {
    /// The pool.
    #[schema(value_type = PoolId)]
    pub pool: PoolId,
    /// What HAProxy's last check said, for people.
    pub check: String,
    /// Weight, health, counters.
    pub stats: MemberStats,
}

/// What is known of one load balancer.
#[derive(Default)]
struct Known {
    /// Taken: what, and in which session.
    taken: Option<(Digest, SessionId)>,
    /// Refused: what, when, and why.
    refused: Option<(Digest, Instant, String)>,
    /// The store's revision at which `taken` was found to be current.
    current_at: Option<Revision>,
    /// HAProxy's view.
    seen: Option<(Instant, Arc<BalancerState>)>,
    /// When its agent was last asked for that in vain.
    mute_since: Option<Instant>,
}

/// Agents of load balancers.
pub struct Steering {
    store: Arc<dyn Store>,
    secrets: SecretVault,
    gateway: Gateway,
    changed: Notify,
    known: Mutex<HashMap<LoadBalancerId, Known>>,
    turns: Mutex<HashMap<LoadBalancerId, Arc<tokio::sync::Mutex<()>>>>,
}

/// The turn of one load balancer.
pub(super) struct Alone(#[expect(dead_code, reason = "held, not read")] OwnedMutexGuard<()>);

impl Steering {
    pub(super) fn new(store: Arc<dyn Store>, secrets: SecretVault, gateway: Gateway) -> Self {
        Self {
            store,
            secrets,
            gateway,
            changed: Notify::new(),
            known: Mutex::default(),
            turns: Mutex::default(),
        }
    }

    /// Something changed.
    pub(super) fn look_again(&self) {
        self.changed.notify_one();
    }

    /// Waits for the turn of a load balancer.
    pub(super) async fn alone(&self, id: LoadBalancerId) -> Alone {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.entry(id).or_default().clone()
        };
        Alone(turn.lock_owned().await)
    }

    fn known<T>(&self, id: LoadBalancerId, with: impl FnOnce(&mut Known) -> T) -> T {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        with(known.entry(id).or_default())
    }

    fn forget(&self, id: LoadBalancerId) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.remove(&id);
    }

    async fn ask(
        &self,
        server: ServerId,
        request: BalancerRequest,
        within: Duration,
    ) -> Result<BalancerState, SteeringError> {
        let query = Query::LoadBalancer {
            request: Box::new(request),
        };
        match self.gateway.query(server, query, within).await? {
            QueryReply::LoadBalancer(state) => Ok(*state),
            QueryReply::Probe(_) | QueryReply::Connect(_) | QueryReply::Unknown => {
                Err(SteeringError::OddAnswer)
            }
        }
    }

    fn saw(&self, id: LoadBalancerId, state: BalancerState) -> Arc<BalancerState> {
        let state = Arc::new(state);
        self.known(id, |known| {
            known.seen = Some((Instant::now(), state.clone()));
            known.mute_since = None;
        });
        state
    }

    /// HAProxy's view, at most a tenth of a second old, and never older than the last weight that was set. An agent that gave no
    /// answer is not waited for again for a while: whoever has to look at many must not stand still for one.
    pub(super) async fn look(
        &self,
        balancer: &LoadBalancer,
    ) -> Result<Arc<BalancerState>, SteeringError> {
        let fresh = self.known(balancer.id, |known| {
            let (at, state) = known.seen.as_ref()?;
            (at.elapsed() < FRESH).then(|| state.clone())
        });
        if let Some(state) = fresh {
            return Ok(state);
        }
        let mute = self.known(balancer.id, |known| known.mute_since);
        if mute.is_some_and(|since| since.elapsed() < MUTE_PAUSE) {
            return Err(QueryFailure::Timeout {
                server: balancer.server,
                waited_ms: u64::try_from(LOOK_WITHIN.as_millis()).unwrap_or(u64::MAX),
            }
            .into());
        }
        let request = BalancerRequest::State {
            load_balancer: balancer.id,
        };
        let asked = Instant::now();
        let asked_for = self.ask(balancer.server, request, LOOK_WITHIN).await;
        if let Err(SteeringError::Agent(QueryFailure::Timeout { .. })) = &asked_for {
            self.known(balancer.id, |known| known.mute_since = Some(Instant::now()));
        }
        let state = Arc::new(asked_for?);
        Ok(self.known(balancer.id, |known| match &known.seen {
            // Weights were set meanwhile: what was seen before says nothing any more.
            Some((at, newer)) if *at > asked => newer.clone(),
            Some(_) | None => {
                known.seen = Some((asked, state.clone()));
                known.mute_since = None;
                state
            }
        }))
    }

    /// Has HAProxy take weights that are kept already, and reads them back.
    pub(super) async fn tell_weights(
        &self,
        _alone: &Alone,
        balancer: &LoadBalancer,
        pool: PoolId,
        weights: &[SetBackEndWeight],
    ) -> Result<Arc<BalancerState>, SteeringError> {
        let request = BalancerRequest::SetWeights {
            load_balancer: balancer.id,
            weights: weights
                .iter()
                .map(|set| MemberWeight {
                    pool,
                    server: set.server,
                    weight: set.weight,
                })
                .collect(),
        };
        let told = self.ask(balancer.server, request.clone(), SET_WITHIN).await;
        let state = match told {
            // A server that was bound or attached just now: the agent has to hear of it first.
            Err(SteeringError::Agent(QueryFailure::Agent { source, .. }))
                if source.code == QueryErrorCode::NotFound =>
            {
                self.converge(balancer).await?;
                self.ask(balancer.server, request, SET_WITHIN).await?
            }
            told => told?,
        };
        Ok(self.saw(balancer.id, state))
    }

    /// Takes what is wanted to the agent, unless it has that. The caller has the load balancer's turn.
    async fn converge(&self, balancer: &LoadBalancer) -> Result<(), SteeringError> {
        let id = balancer.id;
        let Some(session) = self.gateway.session_id(balancer.server) else {
            return Err(QueryFailure::Offline {
                server: balancer.server,
            }
            .into());
        };
        let revision = self.store.revision().await.map_err(ServiceError::from)?;
        let unchanged = self.known(id, |known| {
            known.current_at == Some(revision)
                && known
                    .taken
                    .as_ref()
                    .is_some_and(|(_, taken_in)| *taken_in == session)
        });
        if unchanged {
            return Ok(());
        }
        let mut configuration = configuration::of(&*self.store, balancer).await?;
        let json = serde_json::to_vec(&configuration).expect("a configuration has string keys");
        let digest = Digest::of(&json);
        let done = self.known(id, |known| {
            if known.taken == Some((digest, session)) {
                known.current_at = Some(revision);
                known.refused = None;
                return true;
            }
            known
                .refused
                .as_ref()
                .is_some_and(|(refused, at, _)| *refused == digest && at.elapsed() < REFUSED_PAUSE)
        });
        if done {
            return Ok(());
        }
        configuration.revision = revision.0;
        match self.apply(balancer, configuration).await {
            Ok(state) => {
                self.saw(id, state);
                self.known(id, |known| {
                    known.taken = Some((digest, session));
                    known.current_at = Some(revision);
                    known.refused = None;
                });
                Ok(())
            }
            Err(error) => {
                let text = error.text();
                let told = self.known(id, |known| {
                    let told = known
                        .refused
                        .as_ref()
                        .is_none_or(|(.., before)| *before != text);
                    known.refused = Some((digest, Instant::now(), text.clone()));
                    told
                });
                if told {
                    tracing::warn!(load_balancer = %id, error = %text, "a load balancer did not take its configuration; it is tried again");
                }
                Err(error)
            }
        }
    }

    async fn apply(
        &self,
        balancer: &LoadBalancer,
        mut configuration: Configuration,
    ) -> Result<BalancerState, SteeringError> {
        let mut pems: BTreeMap<CertificateId, SecretText> = BTreeMap::new();
        for certificate in configuration.certificates() {
            let pem = certificates::bundle(&*self.store, &self.secrets, certificate).await?;
            pems.insert(certificate, pem);
        }
        loop {
            let request = BalancerRequest::Apply {
                configuration: Box::new(configuration.clone()),
                certificates: pems.clone(),
            };
            let state = self.ask(balancer.server, request, APPLY_WITHIN).await?;
            match state.revision {
                // A platform that was restored from a backup counts from there: what it wants is right all the same.
                Some(newer) if newer > configuration.revision => {
                    configuration.revision = newer + 1;
                }
                Some(_) | None => return Ok(state),
            }
        }
    }

    async fn forget_gone(&self) -> Result<(), ServiceError> {
        for entry in records::all(&*self.store, &keys::balancers_gone()).await? {
            let (id, server): (Option<LoadBalancerId>, Option<ServerId>) = {
                let mut segments = entry.key.segments().rev();
                let mut next = || segments.next().unwrap_or_default();
                (next().parse().ok(), next().parse().ok())
            };
            let (Some(load_balancer), Some(server)) = (id, server) else {
                continue;
            };
            let text = server.to_string();
            let is_left = records::find::<Server>(&*self.store, &text)
                .await?
                .is_some();
            if is_left {
                if !self.gateway.is_online(server) {
                    continue;
                }
                let request = BalancerRequest::Remove { load_balancer };
                if let Err(error) = self.ask(server, request, APPLY_WITHIN).await {
                    tracing::warn!(%load_balancer, error = %error.text(), "a deleted load balancer still runs; it is tried again");
                    continue;
                }
            }
            self.forget(load_balancer);
            let gone = Txn::new().delete(entry.key.clone());
            self.store.commit(gone).await?;
        }
        Ok(())
    }
}

impl LoadBalancers {
    /// Takes every load balancer to its agent, again and again, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut under_way: JoinSet<LoadBalancerId> = JoinSet::new();
        let mut busy = std::collections::HashSet::new();
        loop {
            match self.all().await {
                Ok(all) => {
                    for balancer in all {
                        // One agent that is slow holds up its own load balancers only.
                        if busy.insert(balancer.id) {
                            let balancers = self.clone();
                            under_way.spawn(async move {
                                balancers.converge(&balancer).await;
                                balancer.id
                            });
                        }
                    }
                }
                Err(error) => tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "load balancers are not looked after until the store answers"
                ),
            }
            if let Err(error) = self.steering.forget_gone().await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "deleted load balancers are not ended until the store answers"
                );
            }
            let pause = tokio::time::sleep(LOOK_EVERY);
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    Some(done) = under_way.join_next(), if !under_way.is_empty() => {
                        if let Ok(id) = done {
                            busy.remove(&id);
                        }
                    }
                    () = self.steering.changed.notified() => break,
                    () = &mut pause => break,
                }
            }
        }
    }

    async fn all(&self) -> Result<Vec<LoadBalancer>, ServiceError> {
        let rows = records::all(&*self.store, &keys::records(Kind::LoadBalancer)).await?;
        rows.iter().map(records::decode).collect()
    }

    async fn converge(&self, balancer: &LoadBalancer) {
        if !self.steering.gateway.is_online(balancer.server) {
            return;
        }
        let alone = self.steering.alone(balancer.id).await;
        // As it is now: it may have waited for its turn.
        let id = balancer.id.to_string();
        let found = records::find::<LoadBalancer>(&*self.store, &id).await;
        if let Ok(Some((balancer, _))) = found
            && let Err(error) = self.steering.converge(&balancer).await
        {
            tracing::debug!(load_balancer = %balancer.id, error = %error.text(), "not converged");
        }
        drop(alone);
        if let Err(error) = self.drop_stale_rows(balancer).await {
            tracing::debug!(load_balancer = %balancer.id, error = &error as &dyn std::error::Error, "stale back ends stay");
        }
    }

    /// Weights of servers that are bound no more are forgotten: one that is bound again begins with 100.
    async fn drop_stale_rows(&self, balancer: &LoadBalancer) -> Result<(), ServiceError> {
        let store = &*self.store;
        let bound = configuration::bound(store, balancer.workspace.as_str()).await?;
        for listener in super::listeners::all_of(store, balancer.id).await? {
            for pool in listener.pools() {
                for entry in records::all(store, &keys::back_ends(pool)).await? {
                    let row: BackEnd = records::decode_plain(&entry, "a back end")?;
                    let stands = row.origin == Origin::Attached
                        || bound
                            .get(&pool)
                            .is_some_and(|bound| bound.contains(&row.server));
                    if !stands {
                        let key = entry.key.clone();
                        let drop = Txn::new()
                            .revision_is(key.clone(), entry.revision)
                            .delete(key);
                        // Somebody was faster: it is looked at again.
                        records::commit(store, drop).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A load balancer as it is, HAProxy's own view included.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn state(
        &self,
        ws: &str,
        id: LoadBalancerId,
    ) -> Result<LoadBalancerState, ServiceError> {
        let (balancer, _) = self.get(ws, id).await?;
        let online = self.steering.gateway.is_online(balancer.server);
        let wanted = configuration::of(&*self.store, &balancer).await?;
        let json = serde_json::to_vec(&wanted).expect("a configuration has string keys");
        let digest = Digest::of(&json);
        let seen = self.steering.look(&balancer).await;
        let (current, refused) = self.steering.known(id, |known| {
            let current = known
                .taken
                .as_ref()
                .is_some_and(|(taken, _)| *taken == digest);
            let refused = known.refused.as_ref().map(|(.., why)| why.clone());
            (current, refused)
        });
        let (state, unseen) = match seen {
            Ok(state) => (state, None),
            Err(error) => (Arc::default(), Some(error.text())),
        };
        let error = [refused, unseen, Some(state.message.clone())]
            .into_iter()
            .flatten()
            .find(|text| !text.is_empty())
            .unwrap_or_default();
        Ok(LoadBalancerState {
            load_balancer: id,
            power: balancer.power,
            online,
            current: current && online && error.is_empty(),
            error,
            running: state.running,
            old_processes: state.old_processes,
            members: state
                .members
                .iter()
                .map(|member| PoolMemberState {
                    pool: member.pool,
                    check: member.check.clone(),
                    stats: member.stats.clone(),
                })
                .collect(),
        })
    }
}
