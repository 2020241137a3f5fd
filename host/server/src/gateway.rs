//! The gateway: agents' sessions, and the delivery of tasks through them.
//!
//! Owns the platform's identity, sessions, the pushing of inbox slots, download grants, and the values of secrets on their
//! way to an agent. It must not know HTTP (`api::agents` serves the listener and hands sockets over), and it writes no row of
//! the engine but the epoch of an inbox slot, by compare-and-swap, before the first push. Source: design, "Agents".
//!
//! ```text
//!  store ── one watch on `inbox/` ──► gateway ── key ──► session of that server: reads the slot again, stamps, pushes
//!  agent ── result ──► session ── TaskReports::report (durable when it returns) ──► ack
//! ```
//!
//! | module | owns |
//! | --- | --- |
//! | `session` | one session: handshake, then one loop in one task |
//! | `orders` | the seam to the engine |
//! | `slots` | what a session does with each slot of its inbox |
//! | `queries` | questions that an agent answers in the session: [`Gateway::query`] |
//! | [`identity`] | the platform's keys |
//! | `grants` | the right to download one package |
//! | [`secrets`] | secrets, sealed in the store |
//! | `attempts` | the limit on failed registrations |
//! | [`events`] | system events |
//!
//! A slow agent holds up nobody else: what waits for it is a set of *keys* (at most one per slot), read when there is room.

mod attempts;
pub mod events;
mod grants;
pub mod identity;
mod orders;
mod queries;
pub mod secrets;
mod session;
mod slots;

use std::{
    collections::{BTreeSet, HashMap},
    error::Error as StdError,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    task::Poll,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream::BoxStream};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};
use tokio_tungstenite::WebSocketStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use windlass_domain::{
    Digest, Timestamp,
    id::{InstanceId, ServerId},
    inbox::JournalEpoch,
    task::{TaskId, TaskResult},
};
use windlass_protocol::{
    ActivationCode, AgentState, GoodbyeReason, InvalidActivationCode, OutputChunk, PublicKey,
    RegisterRequest, RegisterResponse, ServerFacts, SessionId, identity::verify_registration,
};
use windlass_store::{BlobDigest, BlobError, Blobs, Prefix, Store, StoreError, WatchError};

use attempts::Attempts;
pub use grants::GrantRefusal;
use grants::Grants;
use identity::PlatformIdentity;
pub use queries::QueryFailure;
use secrets::SecretSource;
use session::Session;

/// How long the gateway waits before it watches the inbox again after the store failed.
const WATCH_RETRY: Duration = Duration::from_secs(1);

/// What the gateway knows and writes about servers. Implemented by the services.
#[async_trait]
pub trait Directory: Send + Sync + 'static {
    /// Redeems an activation code: makes a server record with this key. Redeeming it again with the same key, after an
    /// answer that was lost, may give the same record. The proof of possession was checked.
    ///
    /// # Errors
    /// [`RegisterError::Refused`], [`RegisterError::Unavailable`].
    async fn register(
        &self,
        code: &ActivationCode,
        registration: Registration,
    ) -> Result<Registered, RegisterError>;

    /// A server that is registered. `None`: there is no such record.
    ///
    /// # Errors
    /// [`DirectoryError`].
    async fn find(&self, server: ServerId) -> Result<Option<KnownServer>, DirectoryError>;

    /// Writes what changed about a server's connection. Called on changes only, never for a heartbeat.
    ///
    /// # Errors
    /// [`DirectoryError`]: logged; the next change is written anyway.
    async fn note(&self, server: ServerId, note: SessionNote) -> Result<(), DirectoryError>;

    /// The names of secrets that the environment of the instance's installed release on this server refers to: what its
    /// agent may ask for after its machine restarted.
    ///
    /// # Errors
    /// [`DirectoryError`].
    async fn secrets_of_installed(
        &self,
        server: ServerId,
        instance: InstanceId,
    ) -> Result<BTreeSet<String>, DirectoryError>;
}

/// A record of a server could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("the record of a server could not be read or written")]
pub struct DirectoryError(#[source] pub Box<dyn StdError + Send + Sync>);

/// A registration whose proof was checked.
#[derive(Debug, Clone)]
pub struct Registration {
    /// The agent's key.
    pub public_key: PublicKey,
    /// A name wished for.
    pub name: Option<String>,
    /// The machine.
    pub facts: ServerFacts,
    /// Where it came from.
    pub source: IpAddr,
}

/// A server that was registered.
#[derive(Debug, Clone)]
pub struct Registered {
    /// Its id.
    pub server: ServerId,
    /// The name it was given.
    pub name: String,
}

/// A server as the gateway needs it.
#[derive(Debug, Clone)]
pub struct KnownServer {
    /// Its name.
    pub name: String,
    /// The workspace it belongs to: secrets are looked up there.
    pub workspace: String,
    /// The agent's key.
    pub public_key: PublicKey,
}

/// A change of a server's connection.
#[derive(Debug, Clone)]
pub enum SessionNote {
    /// A session was opened.
    Connected {
        /// When.
        at: Timestamp,
        /// The machine, agent version included.
        facts: Box<ServerFacts>,
    },
    /// Facts changed during a session.
    Facts {
        /// When.
        at: Timestamp,
        /// The machine.
        facts: Box<ServerFacts>,
    },
    /// The session ended and no other took over.
    Disconnected {
        /// When the agent was heard last.
        last_seen: Timestamp,
    },
}

/// Who takes the results of tasks. Implemented by the engine.
#[async_trait]
pub trait TaskReports: Send + Sync + 'static {
    /// A task of this server ended. Returns once that is durable: then the agent is told to forget it. Called again with the
    /// same result after a lost answer. A task that is not this server's must be answered with [`Reported::NotWanted`].
    ///
    /// # Errors
    /// [`ReportError`]: called again after a pause; the agent keeps the result.
    async fn report(
        &self,
        server: ServerId,
        task: TaskId,
        result: TaskResult,
    ) -> Result<Reported, ReportError>;

    /// A task left the agent's queue and runs. For information; must not block.
    fn started(&self, server: ServerId, task: TaskId, at: Timestamp);

    /// Live output. For information; must not block.
    fn output(&self, server: ServerId, chunk: OutputChunk);
}

/// What became of a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reported {
    /// It is durable.
    Committed,
    /// Nobody waits for it: the task is not current, or not this server's.
    NotWanted,
}

/// A result could not be made durable now.
#[derive(Debug, thiserror::Error)]
#[error("the result of a task could not be committed")]
pub struct ReportError(#[source] pub Box<dyn StdError + Send + Sync>);

/// Why a registration was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The source failed too often.
    #[error("too many failed registrations from this address; try again in {wait_s} s")]
    TooMany {
        /// How long to wait, in seconds.
        wait_s: u64,
    },
    /// The code has another form.
    #[error(transparent)]
    Malformed(#[from] InvalidActivationCode),
    /// The code belongs to another platform.
    #[error(
        "the activation code was made by another platform, or before this one lost its keys; make a new one"
    )]
    OtherPlatform,
    /// The signature does not fit.
    #[error("the proof does not fit the public key and the code")]
    Proof,
    /// The services refused the code: unknown, expired, used up, disabled.
    #[error("{detail}")]
    Refused {
        /// Stable code, for example `activation_code_expired`.
        code: &'static str,
        /// For people: what is wrong, and what to do.
        detail: String,
    },
    /// It cannot be done now.
    #[error("the registration cannot be stored right now; try again")]
    Unavailable(#[source] DirectoryError),
}

impl RegisterError {
    /// The stable code of the error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooMany { .. } => "too_many_registrations",
            Self::Malformed(_) => "activation_code_malformed",
            Self::OtherPlatform => "activation_code_of_another_platform",
            Self::Proof => "registration_proof_wrong",
            Self::Refused { code, .. } => code,
            Self::Unavailable(_) => "unavailable",
        }
    }
}

/// Why a download was refused.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The grant.
    #[error(transparent)]
    Grant(#[from] GrantRefusal),
    /// The blob.
    #[error("the package cannot be read")]
    Blob(#[from] BlobError),
}

/// The bytes of a package from an offset on.
pub struct Download {
    /// Size of the whole package in bytes.
    pub size_bytes: u64,
    /// The rest of it. Ends with an error when the session ends.
    pub bytes: BoxStream<'static, Result<Bytes, DownloadInterrupted>>,
}

/// A download broke off.
#[derive(Debug, thiserror::Error)]
pub enum DownloadInterrupted {
    /// The session that it was granted in has ended.
    #[error("the session that the download was granted in has ended")]
    SessionEnded,
    /// The blob could not be read on.
    #[error("the package cannot be read on")]
    Blob(#[from] BlobError),
}

/// A session as others may see it.
#[derive(Debug, Clone)]
pub struct SessionInfo {
    /// Whose.
    pub server: ServerId,
    /// Where it comes from.
    pub peer: SocketAddr,
    /// Since when it is open.
    pub connected_since: Timestamp,
    /// The version of the protocol that it speaks.
    pub protocol: u32,
    /// The agent's version.
    pub agent_version: String,
    /// The life of the agent's journal.
    pub epoch: JournalEpoch,
    /// Facts, disk, journal, supervised applications, as the agent reported them last.
    pub state: AgentState,
}

/// Settings of the gateway.
#[derive(Debug, Clone)]
pub struct GatewaySettings {
    /// Time between two pings.
    pub heartbeat_interval: Duration,
    /// How long a handshake may take after the socket was upgraded.
    pub handshake_timeout: Duration,
}

impl Default for GatewaySettings {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_millis(
                windlass_protocol::DEFAULT_HEARTBEAT_INTERVAL_MS,
            ),
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// The parts that a gateway is made of.
pub struct GatewayParts {
    /// Inbox rows, events.
    pub store: Arc<dyn Store>,
    /// Packages.
    pub blobs: Blobs,
    /// The platform's keys.
    pub identity: Arc<PlatformIdentity>,
    /// Server records and activation codes.
    pub directory: Arc<dyn Directory>,
    /// Values of secrets.
    pub secrets: Arc<dyn SecretSource>,
    /// Settings.
    pub settings: GatewaySettings,
}

/// The gateway. Cheap to clone.
#[derive(Clone)]
pub struct Gateway {
    inner: Arc<Inner>,
}

struct Inner {
    parts: GatewayParts,
    reports: OnceLock<Arc<dyn TaskReports>>,
    sessions: Mutex<HashMap<ServerId, Arc<Session>>>,
    /// When agents that are disconnected were last heard. Locked after `sessions`.
    last_heard: Mutex<HashMap<ServerId, Instant>>,
    started_at: Instant,
    grants: Grants,
    attempts: Attempts,
    evictions: events::Evictions,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Gateway {
    /// A gateway that takes no session until [`Gateway::start`].
    #[must_use]
    pub fn new(parts: GatewayParts) -> Self {
        Self {
            inner: Arc::new(Inner {
                parts,
                reports: OnceLock::new(),
                sessions: Mutex::default(),
                last_heard: Mutex::default(),
                started_at: Instant::now(),
                grants: Grants::default(),
                attempts: Attempts::default(),
                evictions: events::Evictions::default(),
                tasks: TaskTracker::new(),
                stop: CancellationToken::new(),
            }),
        }
    }

    /// Starts to watch the inbox and to take sessions. Called once, after the engine can take reports.
    pub fn start(&self, reports: Arc<dyn TaskReports>) {
        if self.inner.reports.set(reports).is_ok() {
            let gateway = self.clone();
            self.inner.tasks.spawn(async move {
                tokio::select! {
                    () = gateway.inner.stop.cancelled() => {}
                    () = gateway.watch_inbox() => {}
                }
            });
        }
    }

    /// Takes no more sessions, tells every agent that the platform ends, and waits until all sessions are closed.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        for session in self.all() {
            session.end(GoodbyeReason::ShuttingDown, "the platform ends or restarts");
        }
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    /// Cancelled when the gateway shuts down.
    #[must_use]
    pub fn stopping(&self) -> CancellationToken {
        self.inner.stop.clone()
    }

    /// The platform's keys.
    #[must_use]
    pub fn identity(&self) -> &PlatformIdentity {
        &self.inner.parts.identity
    }

    /// The epoch of the agent's journal, where a session is up: what a new slot is stamped with.
    #[must_use]
    pub fn current_epoch(&self, server: ServerId) -> Option<JournalEpoch> {
        self.find(server).map(|session| session.epoch)
    }

    /// Which session of the server is up.
    #[must_use]
    pub fn session_id(&self, server: ServerId) -> Option<SessionId> {
        self.find(server).map(|session| session.id)
    }

    /// Whether a session is up.
    #[must_use]
    pub fn is_online(&self, server: ServerId) -> bool {
        self.sessions_map().contains_key(&server)
    }

    /// For how long a server has been without a session; `None` while it has one.
    #[must_use]
    pub fn silent_for(&self, server: ServerId) -> Option<Duration> {
        let sessions = self.sessions_map();
        if sessions.contains_key(&server) {
            return None;
        }
        let last_heard = self.last_heard();
        let since = last_heard.get(&server).copied();
        Some(since.unwrap_or(self.inner.started_at).elapsed())
    }

    fn last_heard(&self) -> std::sync::MutexGuard<'_, HashMap<ServerId, Instant>> {
        let map = &self.inner.last_heard;
        map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server's inbox changed: look at it again. Only a hint; the gateway watches the inbox too.
    pub fn nudge(&self, server: ServerId) {
        if let Some(session) = self.find(server) {
            session.look_at_all();
        }
    }

    /// A server's record was removed: its agent is told, and cut off. Called after the commit that removed it.
    pub fn deregister(&self, server: ServerId) {
        if let Some(session) = self.find(server) {
            session.end(
                GoodbyeReason::Deregistered,
                "the server was removed from the platform",
            );
        }
    }

    /// The sessions that are up, by server.
    #[must_use]
    pub fn sessions(&self) -> Vec<SessionInfo> {
        let mut sessions: Vec<_> = self.all().iter().map(|session| session.info()).collect();
        sessions.sort_by_key(|session| session.server);
        sessions
    }

    /// The session of one server.
    #[must_use]
    pub fn session(&self, server: ServerId) -> Option<SessionInfo> {
        self.find(server).map(|session| session.info())
    }

    /// Registers a server.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub async fn register(
        &self,
        source: IpAddr,
        request: RegisterRequest,
    ) -> Result<RegisterResponse, RegisterError> {
        let inner = &self.inner;
        if let Some(wait) = inner.attempts.wait(source, Instant::now()) {
            let wait_s = wait.as_secs() + 1;
            return Err(RegisterError::TooMany { wait_s });
        }
        let registered = self.redeem(source, request).await;
        match &registered {
            Ok(_) | Err(RegisterError::Unavailable(_)) => {}
            Err(refused) => {
                inner.attempts.failed(source, Instant::now());
                tracing::warn!(%source, code = refused.code(), "a registration was refused");
            }
        }
        registered
    }

    async fn redeem(
        &self,
        source: IpAddr,
        request: RegisterRequest,
    ) -> Result<RegisterResponse, RegisterError> {
        let parts = &self.inner.parts;
        let RegisterRequest {
            code,
            public_key,
            proof,
            name,
            facts,
        } = request;
        let code = ActivationCode::parse(code.reveal())?;
        if code.fingerprint() != parts.identity.fingerprint() {
            return Err(RegisterError::OtherPlatform);
        }
        verify_registration(public_key, &code, &proof).map_err(|_| RegisterError::Proof)?;
        let registration = Registration {
            public_key,
            name,
            facts,
            source,
        };
        let Registered { server, name } = parts.directory.register(&code, registration).await?;
        tracing::info!(server.id = %server, server.name = %name, %source, "a server registered");
        Ok(RegisterResponse {
            server_id: server,
            name,
            platform_key: parts.identity.signing().public_key(),
        })
    }

    /// Opens a package for the holder of a grant, from an offset on.
    ///
    /// # Errors
    /// [`DownloadError`].
    pub async fn download(
        &self,
        token: &str,
        digest: Digest,
        offset: u64,
    ) -> Result<Download, DownloadError> {
        let ended = self.inner.grants.check(token, digest)?;
        let digest = BlobDigest::from_bytes(*digest.as_bytes());
        let reader = self.inner.parts.blobs.read(digest, offset).await?;
        let size_bytes = reader.size_bytes();
        let mut chunks = reader.into_stream();
        let mut over = false;
        let bytes = futures_util::stream::poll_fn(move |cx| {
            if over {
                return Poll::Ready(None);
            }
            if ended.is_cancelled() {
                over = true;
                return Poll::Ready(Some(Err(DownloadInterrupted::SessionEnded)));
            }
            chunks
                .poll_next_unpin(cx)
                .map(|chunk| chunk.map(|chunk| chunk.map_err(DownloadInterrupted::from)))
        })
        .boxed();
        Ok(Download { size_bytes, bytes })
    }

    /// Serves one session on an upgraded socket until it ends; the caller's task is the session's task.
    pub async fn serve<S>(&self, socket: WebSocketStream<S>, peer: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // Counted, so that shutdown waits for it.
        let token = self.inner.tasks.token();
        session::serve(self.clone(), socket, peer).await;
        drop(token);
    }

    /// One watch for all sessions. Payloads are not trusted: a session reads the row again.
    async fn watch_inbox(&self) {
        loop {
            match self.watch_once().await {
                Ok(never) => match never {},
                Err(Watching::Ended(WatchError::Compacted { .. })) => {
                    tracing::debug!("the gateway was too slow for the inbox; listing it again");
                }
                Err(Watching::Ended(WatchError::Closed)) => return,
                Err(Watching::Store(error)) => {
                    tracing::error!(
                        error = &error as &dyn StdError,
                        "the inbox cannot be watched; trying again"
                    );
                    tokio::time::sleep(WATCH_RETRY).await;
                }
            }
        }
    }

    async fn watch_once(&self) -> Result<std::convert::Infallible, Watching> {
        let store = &self.inner.parts.store;
        let prefix = Prefix::from_segments(["default", "inbox"]).map_err(StoreError::from)?;
        let from = store.revision().await?;
        let mut watch = store.watch(&prefix, from).await?;
        // What was committed before `from` shows in the rows themselves.
        for session in self.all() {
            session.look_at_all();
        }
        loop {
            let event = watch.next().await?;
            let server = event.key.segments().nth(2).and_then(|id| id.parse().ok());
            if let Some(session) = server.and_then(|server| self.find(server)) {
                session.look_at(event.key);
            }
        }
    }

    fn find(&self, server: ServerId) -> Option<Arc<Session>> {
        self.sessions_map().get(&server).cloned()
    }

    fn all(&self) -> Vec<Arc<Session>> {
        self.sessions_map().values().cloned().collect()
    }

    fn sessions_map(&self) -> std::sync::MutexGuard<'_, HashMap<ServerId, Arc<Session>>> {
        self.inner
            .sessions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a watch ended.
#[derive(Debug, thiserror::Error)]
enum Watching {
    #[error("the watch ended")]
    Ended(#[from] WatchError),
    #[error("the store failed")]
    Store(#[from] StoreError),
}
