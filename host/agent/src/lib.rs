//! The agent: runs on every managed server, dials out to the platform, and carries out its tasks, each at most once.
//!
//! ```text
//!  platform ◄── TLS, WebSocket ──► session ──► agent ──► journal        what was taken, started, finished
//!                                                │
//!                                                ├──► execute ──► cache, unpack, instance, probe
//!                                                │        └──► shim ═══► script            (own processes, which outlive
//!                                                ├──► app ─────────► shim ═══► application   the agent)
//!                                                └──► query: looks at the machine, answered in the session
//! ```
//! The rules of a session and of a task are in the head of `windlass_protocol`; the files in that of [`config`]; what a shim
//! promises in that of [`shim`]. Killing or upgrading the agent touches no application and loses no exit code.
//! It must not name a store, a plugin or the HTTP API. Source: design, "Agents"; spec "Managed servers".

pub mod agent;
pub mod app;
pub mod balancer;
pub mod cache;
pub mod capture;
pub mod clock;
pub mod config;
pub mod crash;
pub mod execute;
pub mod facts;
pub mod files;
pub mod housekeeping;
pub mod instance;
pub mod journal;
pub mod mask;
pub mod net;
pub mod probe;
pub mod proc;
pub mod query;
pub mod register;
pub mod session;
pub mod shim;
pub mod stop_all;
pub mod tree;
pub mod unpack;
pub mod users;

use std::{sync::Arc, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::Agent,
    balancer::Balancers,
    config::{ConfigError, DataDir},
    execute::Context,
    files::FileError,
    session::{Over, Peer},
};

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its data directory.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its journal.
    #[error(transparent)]
    Journal(#[from] journal::JournalError),
    /// The platform's address.
    #[error(transparent)]
    Net(#[from] net::NetError),
    /// Deregistered.
    #[error(
        "this server was deregistered: nothing is done until it is registered anew, with an empty data directory"
    )]
    Deregistered,
    /// Signals.
    #[error("the agent cannot watch for signals")]
    Signals(#[source] std::io::Error),
}

impl From<FileError> for RunError {
    fn from(error: FileError) -> Self {
        Self::Config(error.into())
    }
}

/// How long an agent that starts waits for the lock of the one before. One that was killed just when it started a shim leaves
/// its lock to that child until the child has become another program.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(20);

async fn await_lock(data: &DataDir) -> Result<std::fs::File, ConfigError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match data.take_lock() {
            Err(ConfigError::Locked(_)) if Instant::now() < deadline => {
                tokio::time::sleep(LOCK_RETRY).await;
            }
            taken @ (Ok(_) | Err(_)) => return taken,
        }
    }
}

/// Runs the agent of a data directory until SIGTERM or SIGINT, or until it is deregistered. Applications and scripts go on.
///
/// # Errors
/// When it cannot start, or was deregistered.
pub async fn run(data: &DataDir) -> Result<(), RunError> {
    let deregistered = data.path().join("deregistered");
    if deregistered.exists() {
        return Err(RunError::Deregistered);
    }
    let config = data.load_config()?;
    let identity = register::load_identity(data)?;
    let _lock = await_lock(data).await?;
    let platform = net::Platform::new(&config.platform_url, config.fingerprint)?;
    let cgroup = config
        .policy
        .cgroups
        .then(|| proc::Cgroup::subtree(data.path()))
        .flatten();
    let context = Arc::new(Context {
        data: data.clone(),
        balancers: Balancers::open(data, config.policy.load_balancers),
        policy: config.policy,
        platform: platform.clone(),
        cgroup,
        housekeeping: housekeeping::Housekeeping::default(),
    });
    let agent = Agent::open(context)?;
    let stop = CancellationToken::new();
    let (sender, commands) = mpsc::channel(256);
    let peer = Peer {
        platform,
        platform_key: config.platform_key,
        server_id: config.server_id,
        identity,
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let session = tokio::spawn(session::keep(peer, sender, stop.clone()));
    let agent = tokio::spawn(agent.run(commands, stop.clone()));
    tokio::pin!(session);
    let over = tokio::select! {
        over = &mut session => over.unwrap_or(Over::Stopped),
        _ = terminate.recv() => Over::Stopped,
        _ = interrupt.recv() => Over::Stopped,
    };
    stop.cancel();
    if let Err(error) = agent.await {
        tracing::error!(%error, "the agent's heart failed");
    }
    match over {
        Over::Stopped => Ok(()),
        Over::Deregistered => {
            files::write_durable(&deregistered, b"", 0o600)?;
            Err(RunError::Deregistered)
        }
    }
}
