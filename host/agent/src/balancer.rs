//! Load balancers that this server hosts: one HAProxy each, kept as the platform wants it, whether there is a session or not.
//!
//! Owns `balancers/` in the data directory, HAProxy's configuration and process, and its table in nftables. It must not know
//! what a pool is for, or whose server is behind it. Source: spec "Load balancers".
//!
//! ```text
//! balancers/<id>/   desired.json      the last configuration that HAProxy took, with the weights of now
//!                   haproxy.cfg       made of it; next.cfg while another is tried
//!                   counted.json      what its processes have counted
//!                   certificates/     chain and key, 0600
//!                   admin.sock        HAProxy's master, 0600; worker.sock hands listeners over in a reload
//!                   run/              its shim
//!
//! apply:  certificates ─► next.cfg ─► haproxy -c ─► new ports are free? ─► servers.state ─► haproxy.cfg
//!           │                 │            │                │                                  │
//!           └── refused ◄─────┴────────────┴────────────────┘               start, or reload ◄─┘
//!               (nothing has changed)                                          │         │
//!                                        desired.json ◄── runs the revision ◄──┘         └─► does not: haproxy.cfg as before
//! ```
//! Everything may be cut off anywhere: `desired.json` is replaced last, `haproxy.cfg` is made of it again when the agent
//! starts, and the platform says its wish in every session. A weight stands in both files before HAProxy is told, so neither
//! a reload nor a crash of HAProxy gives a drained server its old weight back.
//!
//! After a reload the former process serves the connections that it has. Idle ones may carry one more request, to any server
//! as that process weighs it, and its weights cannot be changed: they count as connections of every server until they are
//! gone (10 s at most when nothing is asked), so that nobody takes a server away under them.

mod admin;
mod checked;
mod files;
mod process;
mod tally;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use windlass_domain::{
    id::{CertificateId, LoadBalancerId, PoolId, ServerId},
    load_balancer::{Configuration, render},
};
use windlass_protocol::{
    BalancerRequest, BalancerState, MemberState, MemberWeight, QueryError, QueryErrorCode,
    SecretText,
};

use crate::{config::DataDir, files::FileError};
use admin::Snapshot;
use files::BalancerDir;
use tally::Tally;

/// Between two looks whether the kernel has what was set.
const BANDWIDTH_EVERY: Duration = Duration::from_secs(10);

/// Why a load balancer is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum BalancerError {
    /// The local policy.
    #[error(
        "this agent hosts no load balancers: `policy.load_balancers` is off in its config.json"
    )]
    NotAllowed,
    /// A program.
    #[error(
        "{0} is not installed on this server: install the packages haproxy and nftables (`apt-get install haproxy nftables`)"
    )]
    Missing(&'static str),
    /// Nothing was applied.
    #[error("the load balancer {0} is not on this server (yet)")]
    NotHere(LoadBalancerId),
    /// A member that HAProxy does not have.
    #[error(
        "the load balancer has no server {server} in the pool {pool} (yet): its listener may be stopped"
    )]
    NoMember {
        /// The pool.
        pool: PoolId,
        /// The server.
        server: ServerId,
    },
    /// A certificate that did not come.
    #[error("the certificate {0} did not come with the configuration")]
    NoCertificate(CertificateId),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// HAProxy refuses the text.
    #[error("HAProxy refuses the configuration: {0}")]
    Refused(String),
    /// Somebody has the port.
    #[error("the front port {port} cannot be listened on: end what uses it, or choose another")]
    Port {
        /// Which.
        port: u16,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It does not run.
    #[error("HAProxy does not run the new configuration, the one before stays: {0}")]
    NotTaken(String),
    /// It does not answer.
    #[error("HAProxy does not answer on its admin socket: {0}")]
    Admin(String),
    /// Bandwidth needs root.
    #[error(
        "a peak bandwidth needs an agent that runs as root, to set nftables: this one runs as `{0}`; run it as root, or take the limit away"
    )]
    NotRoot(String),
    /// Bandwidth was refused.
    #[error("nftables refuses the peak bandwidth: {0}")]
    Bandwidth(String),
}

impl From<BalancerError> for QueryError {
    fn from(error: BalancerError) -> Self {
        let code = match &error {
            BalancerError::NotAllowed | BalancerError::NotRoot(_) => QueryErrorCode::Denied,
            BalancerError::Missing(_) => QueryErrorCode::Unsupported,
            BalancerError::NotHere(_) | BalancerError::NoMember { .. } => QueryErrorCode::NotFound,
            BalancerError::NoCertificate(_) | BalancerError::Refused(_) => {
                QueryErrorCode::InvalidRequest
            }
            BalancerError::File(_)
            | BalancerError::Port { .. }
            | BalancerError::NotTaken(_)
            | BalancerError::Admin(_)
            | BalancerError::Bandwidth(_) => QueryErrorCode::Failed,
        };
        Self::new(code, crate::files::chain(&error))
    }
}

/// The load balancers of this server. Cheap to clone.
#[derive(Clone)]
pub struct Balancers {
    shared: Arc<Shared>,
}

struct Shared {
    data: DataDir,
    allowed: bool,
    known: Mutex<HashMap<LoadBalancerId, Arc<tokio::sync::Mutex<Balancer>>>>,
    /// What was begun is carried through, also when its session ends.
    tasks: TaskTracker,
}

impl Balancers {
    /// Those that stand in the data directory; nothing is started yet.
    #[must_use]
    pub fn open(data: &DataDir, allowed: bool) -> Self {
        let known = files::all(data)
            .into_iter()
            .map(|id| {
                (
                    id,
                    Arc::new(tokio::sync::Mutex::new(Balancer::open(data, id))),
                )
            })
            .collect();
        Self {
            shared: Arc::new(Shared {
                data: data.clone(),
                allowed,
                known: Mutex::new(known),
                tasks: TaskTracker::new(),
            }),
        }
    }

    fn find(&self, id: LoadBalancerId) -> Option<Arc<tokio::sync::Mutex<Balancer>>> {
        self.known().get(&id).cloned()
    }

    fn known(
        &self,
    ) -> std::sync::MutexGuard<'_, HashMap<LoadBalancerId, Arc<tokio::sync::Mutex<Balancer>>>> {
        let known = self.shared.known.lock();
        known.unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what was asked; to its end, also when the caller is gone.
    ///
    /// # Errors
    /// Why it was not done; HAProxy is then as it was.
    pub async fn answer(&self, request: BalancerRequest) -> Result<BalancerState, QueryError> {
        let balancers = self.clone();
        let done = self
            .shared
            .tasks
            .spawn(async move { balancers.perform(request).await });
        match done.await {
            Ok(answer) => answer,
            Err(error) => Err(QueryError::new(
                QueryErrorCode::Failed,
                format!("a worker of the agent failed: {error}"),
            )),
        }
    }

    async fn perform(&self, request: BalancerRequest) -> Result<BalancerState, QueryError> {
        match request {
            BalancerRequest::Apply {
                configuration,
                certificates,
            } => {
                if !self.shared.allowed {
                    return Err(BalancerError::NotAllowed.into());
                }
                let id = configuration.load_balancer;
                let balancer = self
                    .known()
                    .entry(id)
                    .or_insert_with(|| {
                        Arc::new(tokio::sync::Mutex::new(Balancer::open(
                            &self.shared.data,
                            id,
                        )))
                    })
                    .clone();
                let mut balancer = balancer.lock().await;
                balancer.apply(*configuration, &certificates).await?;
                Ok(balancer.state().await)
            }
            BalancerRequest::SetWeights {
                load_balancer,
                weights,
            } => {
                let balancer = self
                    .find(load_balancer)
                    .ok_or(BalancerError::NotHere(load_balancer))?;
                let mut balancer = balancer.lock().await;
                balancer.set_weights(&weights).await?;
                Ok(balancer.state().await)
            }
            BalancerRequest::State { load_balancer } => {
                let balancer = self
                    .find(load_balancer)
                    .ok_or(BalancerError::NotHere(load_balancer))?;
                let mut balancer = balancer.lock().await;
                Ok(balancer.state().await)
            }
            BalancerRequest::Remove { load_balancer } => {
                if let Some(balancer) = self.find(load_balancer) {
                    balancer.lock().await.remove().await?;
                    self.known().remove(&load_balancer);
                }
                Ok(BalancerState::default())
            }
            BalancerRequest::Unknown => Err(QueryError::new(
                QueryErrorCode::Unsupported,
                format!(
                    "the agent {} does not know this request to a load balancer; upgrade it",
                    env!("CARGO_PKG_VERSION")
                ),
            )),
        }
    }

    /// Looks after all of them, in the background: what should run is started, weights are as they were set.
    pub fn look_after(&self) {
        let all: Vec<_> = self.known().values().cloned().collect();
        let allowed = self.shared.allowed;
        for balancer in all {
            self.shared.tasks.spawn(async move {
                // Whoever holds it looks after it right now.
                if let Ok(mut balancer) = balancer.try_lock() {
                    if allowed {
                        balancer.look_after().await;
                    } else {
                        balancer.keep_off().await;
                    }
                }
            });
        }
    }
}

/// One load balancer.
struct Balancer {
    dir: BalancerDir,
    /// What HAProxy was last seen to take.
    desired: Option<Configuration>,
    /// The files were made of `desired` since the agent started.
    restored: bool,
    /// What went wrong last, while it does not run.
    message: String,
    /// When it was last looked whether the kernel has the peak bandwidth.
    bandwidth_at: Option<Instant>,
    /// Why it does not; empty: it does.
    bandwidth: String,
    tally: Tally,
}

impl Balancer {
    fn open(data: &DataDir, id: LoadBalancerId) -> Self {
        let dir = BalancerDir::new(data, id);
        let (desired, message) = match dir.desired() {
            Ok(desired) => (desired, String::new()),
            Err(error) => (None, crate::files::chain(&error)),
        };
        // Figures that cannot be read begin anew.
        let tally = Tally::of_kept(dir.counted().ok().flatten().unwrap_or_default());
        Self {
            dir,
            desired,
            restored: false,
            message,
            bandwidth_at: None,
            bandwidth: String::new(),
            tally,
        }
    }

    async fn apply(
        &mut self,
        wanted: Configuration,
        certificates: &BTreeMap<CertificateId, SecretText>,
    ) -> Result<(), BalancerError> {
        if let Some(desired) = &self.desired {
            if desired.revision > wanted.revision {
                return Ok(());
            }
            if desired.structure() == wanted.structure()
                && self.restored
                && self.runs_as_wanted().await
            {
                return self.take_weights(wanted).await;
            }
        }
        self.dir.make()?;
        if wanted.listeners.is_empty() {
            process::stop(&self.dir).await?;
            process::clear_bandwidth(&self.dir, &wanted).await?;
            self.dir.keep(&wanted)?;
        } else {
            for certificate in wanted.certificates() {
                let pem = certificates
                    .get(&certificate)
                    .ok_or(BalancerError::NoCertificate(certificate))?;
                self.dir.put_certificate(certificate, pem)?;
            }
            let before = self.desired.clone();
            process::check(&self.dir, &wanted, before.as_ref()).await?;
            if process::answers(&self.dir).await {
                // What the process that is replaced has counted is kept, where it can be had.
                drop(self.snapshot().await);
            }
            if let Err(error) = process::replace(&self.dir, &wanted).await {
                if let Some(before) = &before {
                    self.dir.write_configuration(before)?;
                }
                return Err(error);
            }
            self.dir.keep(&wanted)?;
            self.bandwidth_at = None;
            self.keep_bandwidth(&wanted).await;
        }
        self.dir.drop_certificates_except(&wanted)?;
        tracing::info!(load_balancer = %wanted.load_balancer, revision = wanted.revision, listeners = wanted.listeners.len(), "a load balancer runs a new configuration");
        self.desired = Some(wanted);
        self.restored = true;
        self.message.clear();
        if self.wants_to_run() {
            self.mend_weights().await?;
        }
        Ok(())
    }

    /// A configuration that differs in its weights, at most, from the one that runs: nothing is reloaded.
    async fn take_weights(&mut self, wanted: Configuration) -> Result<(), BalancerError> {
        if self.desired.as_ref() != Some(&wanted) {
            self.dir.keep(&wanted)?;
            if !wanted.listeners.is_empty() {
                self.dir.write_configuration(&wanted)?;
            }
            self.desired = Some(wanted);
        }
        if self.wants_to_run() {
            self.mend_weights().await?;
        }
        Ok(())
    }

    fn wants_to_run(&self) -> bool {
        let desired = self.desired.as_ref();
        desired.is_some_and(|desired| !desired.listeners.is_empty())
    }

    async fn runs_as_wanted(&self) -> bool {
        match &self.desired {
            Some(desired) if !desired.listeners.is_empty() => {
                process::runs(&self.dir, &render::description(desired)).await
            }
            Some(_) | None => true,
        }
    }

    async fn set_weights(&mut self, weights: &[MemberWeight]) -> Result<(), BalancerError> {
        let id = self.dir.id();
        let desired = self.desired.as_ref().ok_or(BalancerError::NotHere(id))?;
        let mut wanted = desired.clone();
        for MemberWeight {
            pool,
            server,
            weight,
        } in weights
        {
            let member = wanted
                .member_mut(*pool, *server)
                .ok_or(BalancerError::NoMember {
                    pool: *pool,
                    server: *server,
                })?;
            member.weight = (*weight).min(windlass_domain::load_balancer::MAX_WEIGHT);
        }
        if wanted != *desired {
            // Before HAProxy is told: whatever dies from here on, it comes back with the new weights.
            self.dir.keep(&wanted)?;
            self.dir.write_configuration(&wanted)?;
            self.desired = Some(wanted);
        }
        for weight in weights {
            admin::set_weight(&self.dir, weight).await?;
        }
        Ok(())
    }

    /// Weights that HAProxy does not have, for whatever reason, are set again.
    async fn mend_weights(&mut self) -> Result<(), BalancerError> {
        let snapshot = self.snapshot().await?;
        let Some(desired) = &self.desired else {
            return Ok(());
        };
        let wrong: Vec<MemberWeight> = desired
            .members()
            .filter(|(pool, member)| {
                snapshot
                    .members
                    .get(&(*pool, member.server))
                    .is_some_and(|shown| shown.weight != member.weight)
            })
            .map(|(pool, member)| MemberWeight {
                pool,
                server: member.server,
                weight: member.weight,
            })
            .collect();
        for weight in &wrong {
            tracing::info!(load_balancer = %self.dir.id(), pool = %weight.pool, server.id = %weight.server, weight = weight.weight, "a weight of HAProxy is set as it should be");
            admin::set_weight(&self.dir, weight).await?;
        }
        Ok(())
    }

    async fn look_after(&mut self) {
        let Some(desired) = self.desired.clone() else {
            return;
        };
        if desired.listeners.is_empty() {
            return;
        }
        let looked = async {
            if !self.restored {
                self.dir.write_configuration(&desired)?;
                self.dir.forget_state()?;
                self.restored = true;
            }
            self.keep_bandwidth(&desired).await;
            if !process::answers(&self.dir).await {
                return process::start(&self.dir, &desired).await;
            }
            if !self.runs_as_wanted().await {
                tracing::warn!(load_balancer = %self.dir.id(), "HAProxy runs another configuration than it should; it is reloaded");
                process::replace(&self.dir, &desired).await?;
            }
            self.mend_weights().await
        };
        match looked.await {
            Ok(()) => self.message.clear(),
            Err(error) => {
                let message = crate::files::chain(&error);
                if message != self.message {
                    tracing::error!(load_balancer = %self.dir.id(), error = %message, "a load balancer does not run");
                    self.message = message;
                }
            }
        }
    }

    /// Ends what runs from a time when this server was to host load balancers; what is desired stays, should it be again.
    async fn keep_off(&mut self) {
        let off = BalancerError::NotAllowed.to_string();
        if self.message == off {
            return;
        }
        let ended = async {
            process::stop(&self.dir).await?;
            match &self.desired {
                Some(desired) => process::clear_bandwidth(&self.dir, desired).await,
                None => Ok(()),
            }
        };
        match ended.await {
            Ok(()) => self.message = off,
            Err(error) => {
                tracing::error!(load_balancer = %self.dir.id(), error = %crate::files::chain(&error), "a load balancer that is not to run here could not be ended; it is tried again");
            }
        }
    }

    /// Sets the peak bandwidth, and again whenever it is found to be gone: who loads the machine's own rules drops all tables.
    async fn keep_bandwidth(&mut self, desired: &Configuration) {
        let kept = match self.bandwidth_at {
            Some(at) if at.elapsed() < BANDWIDTH_EVERY => return,
            Some(_)
                if self.bandwidth.is_empty()
                    && process::has_bandwidth(&self.dir, desired).await =>
            {
                Ok(())
            }
            Some(_) | None => process::set_bandwidth(&self.dir, desired).await,
        };
        self.bandwidth_at = Some(Instant::now());
        self.bandwidth = match kept {
            Ok(()) => String::new(),
            Err(error) => {
                let error = crate::files::chain(&error);
                tracing::warn!(load_balancer = %self.dir.id(), %error, "a peak bandwidth is not set; it is tried again");
                format!("a peak bandwidth is not set: {error}")
            }
        };
    }

    async fn remove(&mut self) -> Result<(), BalancerError> {
        process::stop(&self.dir).await?;
        if let Some(desired) = &self.desired {
            process::clear_bandwidth(&self.dir, desired).await?;
        }
        self.desired = None;
        self.dir.remove()?;
        Ok(())
    }

    /// Looks at HAProxy, and adds to the counters.
    async fn snapshot(&mut self) -> Result<Snapshot, BalancerError> {
        let mut snapshot = admin::look(&self.dir).await?;
        // Without room for figures on the disk, HAProxy is steered all the same.
        if self.tally.look(std::mem::take(&mut snapshot.counted))
            && let Err(error) = self.dir.keep_counted(&self.tally.kept())
        {
            tracing::warn!(load_balancer = %self.dir.id(), error = %crate::files::chain(&error), "figures of a load balancer are not kept");
        }
        Ok(snapshot)
    }

    async fn state(&mut self) -> BalancerState {
        let revision = self.desired.as_ref().map(|desired| desired.revision);
        if !self.wants_to_run() {
            return BalancerState {
                revision,
                message: self.message.clone(),
                ..BalancerState::default()
            };
        }
        match self.snapshot().await {
            Ok(snapshot) => BalancerState {
                revision,
                running: true,
                message: self.bandwidth.clone(),
                old_processes: snapshot.old_processes,
                members: self.members(&snapshot),
            },
            Err(error) => BalancerState {
                revision,
                running: false,
                message: if self.message.is_empty() {
                    crate::files::chain(&error)
                } else {
                    self.message.clone()
                },
                ..BalancerState::default()
            },
        }
    }

    fn members(&self, snapshot: &Snapshot) -> Vec<MemberState> {
        let mut members: Vec<MemberState> = snapshot
            .members
            .iter()
            .map(|((pool, server), shown)| MemberState {
                pool: *pool,
                stats: shown.stats(*server, self.tally.of((*pool, *server))),
                check: shown.check.clone(),
            })
            .collect();
        members.sort_by_key(|member| (member.pool, member.stats.server));
        members
    }
}
