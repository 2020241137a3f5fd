//! One session with one agent: the handshake, then one loop in one task.
//!
//! ```text
//! challenge ──► hello ──► refused: goodbye
//!                 └─────► entered in the map (an older session of the same server is evicted) ──► welcome ──► loop ──► goodbye
//! ```
//! The loop reads only while few reports are under way, and takes inbox slots only while few frames wait to be written: what
//! it holds is bounded on both sides, and a slow agent stops itself alone. Reading and writing never wait for each other.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    future::poll_fn,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt as _, SinkExt as _, StreamExt as _,
    future::BoxFuture,
    stream::{FuturesUnordered, SplitSink, SplitStream},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message},
};
use tokio_util::sync::CancellationToken;
use windlass_domain::{
    Timestamp,
    id::{InstanceId, ServerId},
    inbox::JournalEpoch,
    task::{Fault, Outcome, TaskId, TaskResult},
};
use windlass_protocol::{
    AgentState, DecodeError, Decoded, EncodeError, Goodbye, GoodbyeReason, HeldState, HeldTask,
    Hello, MISSED_HEARTBEATS, Nonce, ProtocolRange, SecretText, SessionId, ToAgent, ToServer,
    Transcript, Welcome, decode, encode, negotiate,
};
use windlass_store::{Key, crash::crash_point};

use super::{
    DirectoryError, Gateway, Reported, SessionInfo, SessionNote, TaskReports,
    events::{self, EventKind, EventLevel, SystemEvent},
    queries::Queries,
    slots::Slots,
};
use crate::{clock, ids::random_bytes};

/// Frames that may wait to be written before no more slots are taken.
const MAX_WAITING_FRAMES: usize = 64;
/// Reports that may be under way before nothing more is read.
const MAX_REPORTS: usize = 32;
/// Times that a report is tried, with pauses that double from [`REPORT_PAUSE`]; then the session ends, and the agent sends
/// the result again in its next one.
const REPORT_TRIES: u32 = 7;
const REPORT_PAUSE: Duration = Duration::from_millis(100);
/// After the store or the secrets failed, slots are looked at again after this time.
const SLOT_PAUSE: Duration = Duration::from_secs(1);
/// How long a goodbye may take.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);
/// Most secrets that an agent may ask for at once.
const MAX_SECRETS_ASKED: usize = 1000;

/// A session that is up, as the gateway sees it.
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) server: ServerId,
    pub(super) server_name: String,
    pub(super) workspace: String,
    pub(super) epoch: JournalEpoch,
    /// Cancelled when it is over: ends its download grants.
    pub(super) ended: CancellationToken,
    pub(super) queries: Queries,
    peer: SocketAddr,
    pub(super) protocol: u32,
    since: Timestamp,
    state: Mutex<AgentState>,
    inbox: Mutex<Waiting>,
    ending: Mutex<Option<Goodbye>>,
    wake: Notify,
    heard_unix_ms: AtomicI64,
}

/// Slots to look at.
#[derive(Default)]
pub(super) struct Waiting {
    /// All of them.
    pub(super) all: bool,
    /// These: at most one entry per slot, however often it changed.
    pub(super) keys: BTreeSet<Key>,
}

impl Session {
    pub(super) fn look_at(&self, key: Key) {
        self.inbox().keys.insert(key);
        self.wake.notify_one();
    }

    pub(super) fn look_at_all(&self) {
        self.inbox().all = true;
        self.wake.notify_one();
    }

    /// There is a query to be written.
    pub(super) fn wake_up(&self) {
        self.wake.notify_one();
    }

    /// The version of the protocol that it speaks.
    pub(super) fn protocol(&self) -> u32 {
        self.protocol
    }

    /// Has the session say goodbye. The first reason counts.
    pub(super) fn end(&self, reason: GoodbyeReason, message: &str) {
        let message = message.to_owned();
        self.ending().get_or_insert(Goodbye { reason, message });
        self.ended.cancel();
        self.wake.notify_one();
    }

    pub(super) fn info(&self) -> SessionInfo {
        let state = self.state().clone();
        SessionInfo {
            server: self.server,
            peer: self.peer,
            connected_since: self.since,
            protocol: self.protocol,
            agent_version: state.facts.agent_version.clone(),
            epoch: self.epoch,
            state,
        }
    }

    pub(super) fn inbox(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ending(&self) -> std::sync::MutexGuard<'_, Option<Goodbye>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, AgentState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last_heard(&self) -> Timestamp {
        Timestamp::from_unix_ms(self.heard_unix_ms.load(Ordering::Relaxed))
    }

    fn heard(&self) {
        let now = clock::now().unix_ms();
        self.heard_unix_ms.store(now, Ordering::Relaxed);
    }

    fn take_work(&self) -> Option<Waiting> {
        let mut inbox = self.inbox();
        (inbox.all || !inbox.keys.is_empty()).then(|| std::mem::take(&mut *inbox))
    }
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the connection broke")]
    Socket(#[source] Box<tungstenite::Error>),
    #[error("the agent closed the connection")]
    Closed,
    #[error("the agent took longer than {} ms for its hello", limit.as_millis())]
    HandshakeTimeout { limit: Duration },
    #[error("the agent was silent, or took nothing, for {MISSED_HEARTBEATS} heartbeats of {} ms", interval.as_millis())]
    Dead { interval: Duration },
    #[error("the agent sent a frame that is not a message")]
    Malformed(#[source] DecodeError),
    #[error("the agent sent a binary frame; messages are text")]
    Binary,
    #[error("the agent sent a message before its hello, or a second hello")]
    OutOfTurn,
    #[error("a message to the agent could not be written")]
    Encode(#[source] EncodeError),
    #[error("the server's record could not be read")]
    Directory(#[source] DirectoryError),
    #[error("a result could not be committed in {REPORT_TRIES} tries")]
    ReportFailed,
    #[error("{}", .0.message)]
    Goodbye(Goodbye),
}

impl Ended {
    /// What the agent is told, where it can still be told anything.
    fn goodbye(&self) -> Option<Goodbye> {
        let say = |reason, message: &str| {
            let message = message.to_owned();
            Some(Goodbye { reason, message })
        };
        match self {
            Self::Goodbye(goodbye) => Some(goodbye.clone()),
            Self::Socket(_) | Self::Closed | Self::Dead { .. } => None,
            Self::HandshakeTimeout { .. }
            | Self::Malformed(_)
            | Self::Binary
            | Self::OutOfTurn
            | Self::Encode(_) => say(GoodbyeReason::Other, &self.to_string()),
            Self::Directory(_) | Self::ReportFailed => say(
                GoodbyeReason::Other,
                "the platform cannot reach its store right now; reconnect",
            ),
        }
    }
}

impl From<tungstenite::Error> for Ended {
    fn from(error: tungstenite::Error) -> Self {
        match error {
            tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => {
                Self::Closed
            }
            error => Self::Socket(Box::new(error)),
        }
    }
}

/// The two halves of a socket.
struct Link<S> {
    writer: Writer<S>,
    stream: SplitStream<WebSocketStream<S>>,
}

/// The writing half of a socket, and what waits for it.
pub(super) struct Writer<S> {
    sink: SplitSink<WebSocketStream<S>, Message>,
    out: VecDeque<Outgoing>,
    flushed: bool,
    /// Counts frames, to see whether the agent takes any.
    written: u64,
    acks_in_flight: bool,
    pushes_in_flight: bool,
}

struct Outgoing {
    frame: Message,
    kind: OutKind,
}

/// What a crash test wants to know about a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum OutKind {
    Push,
    Ack,
    Other,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Writer<S> {
    pub(super) fn has_room(&self) -> bool {
        self.out.len() < MAX_WAITING_FRAMES
    }

    /// Acknowledgements may wait in greater number than tasks: an agent that is busy sending may read a little later.
    fn has_room_for_answers(&self) -> bool {
        self.out.len() < 4 * MAX_WAITING_FRAMES
    }

    /// Puts a message in line to be written.
    pub(super) fn put(&mut self, message: &ToAgent, kind: OutKind) -> Result<(), EncodeError> {
        let frame = Message::text(encode(message)?);
        self.out.push_back(Outgoing { frame, kind });
        Ok(())
    }

    /// Puts a query in line to be written; it was made into a frame by whoever asks.
    fn put_query(&mut self, frame: String) {
        let frame = Message::text(frame);
        let kind = OutKind::Other;
        self.out.push_back(Outgoing { frame, kind });
    }

    fn is_idle(&self) -> bool {
        self.out.is_empty() && self.flushed
    }

    /// Writes what waits. Loses nothing when dropped.
    async fn flush(&mut self) -> Result<(), Ended> {
        while !self.out.is_empty() {
            poll_fn(|cx| self.sink.poll_ready_unpin(cx)).await?;
            let Some(Outgoing { frame, kind }) = self.out.pop_front() else {
                break;
            };
            match kind {
                OutKind::Push => {
                    crash_point("gateway.before_push");
                    self.pushes_in_flight = true;
                }
                OutKind::Ack => {
                    crash_point("gateway.before_ack");
                    self.acks_in_flight = true;
                }
                OutKind::Other => {}
            }
            self.flushed = false;
            self.sink.start_send_unpin(frame)?;
            self.written += 1;
        }
        self.sink.flush().await?;
        self.flushed = true;
        if std::mem::take(&mut self.pushes_in_flight) {
            crash_point("gateway.after_push");
        }
        if std::mem::take(&mut self.acks_in_flight) {
            crash_point("gateway.after_ack");
        }
        Ok(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Link<S> {
    fn new(socket: WebSocketStream<S>) -> Self {
        let (sink, stream) = socket.split();
        let writer = Writer {
            sink,
            out: VecDeque::new(),
            flushed: true,
            written: 0,
            acks_in_flight: false,
            pushes_in_flight: false,
        };
        Self { writer, stream }
    }

    async fn say_goodbye(&mut self, goodbye: Goodbye) {
        let writer = &mut self.writer;
        writer.out.clear();
        let said = async {
            writer
                .put(&ToAgent::Goodbye(goodbye), OutKind::Other)
                .map_err(Ended::Encode)?;
            writer.flush().await?;
            writer.sink.close().await?;
            Ok::<(), Ended>(())
        };
        // The agent may be gone already: it finds out by itself.
        match timeout(GOODBYE_TIMEOUT, said).await {
            Ok(Ok(())) | Ok(Err(_)) | Err(_) => {}
        }
    }
}

/// The next message; pings and pongs of WebSocket itself are not messages.
async fn read<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut SplitStream<WebSocketStream<S>>,
) -> Result<Decoded<ToServer>, Ended> {
    loop {
        match stream.next().await {
            None => return Err(Ended::Closed),
            Some(Err(error)) => return Err(error.into()),
            Some(Ok(Message::Text(text))) => {
                return decode(text.as_str()).map_err(Ended::Malformed);
            }
            Some(Ok(Message::Binary(_))) => return Err(Ended::Binary),
            Some(Ok(Message::Close(_))) => return Err(Ended::Closed),
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
        }
    }
}

/// Serves a socket until the session on it ends.
pub(super) async fn serve<S>(gateway: Gateway, socket: WebSocketStream<S>, peer: SocketAddr)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut link = Link::new(socket);
    let Some(reports) = gateway.inner.reports.get().cloned() else {
        let message = "the platform is starting".to_owned();
        let reason = GoodbyeReason::ShuttingDown;
        return link.say_goodbye(Goodbye { reason, message }).await;
    };
    // Boxed, so that an idle session does not keep the room of its handshake.
    let limit = gateway.inner.parts.settings.handshake_timeout;
    let opened = timeout(limit, Box::pin(open(&gateway, &mut link, peer))).await;
    let opened = opened.unwrap_or(Err(Ended::HandshakeTimeout { limit }));
    let entered = match opened {
        Ok(entered) => entered,
        Err(ended) => {
            tracing::warn!(%peer, error = &ended as &dyn std::error::Error, "an agent's session was not opened");
            if let Some(goodbye) = ended.goodbye() {
                link.say_goodbye(goodbye).await;
            }
            return;
        }
    };
    let mut entered = entered;
    let session = entered.session.clone();
    let held = std::mem::take(&mut entered.held);
    // Outside the handshake's time limit: a note that was begun is followed by that of the end.
    let facts = Box::new(session.state().facts.clone());
    let at = session.since;
    let connected = SessionNote::Connected { at, facts };
    note(&gateway, session.server, connected).await;
    let ended = run(&gateway, &session, &mut link, reports, held).await;
    // Out of the map before the goodbye: nobody counts on this session any more.
    let was_current = entered.leave();
    tracing::info!(server.id = %session.server, server.name = %session.server_name, reason = %ended, "an agent's session ended");
    if let Some(goodbye) = ended.goodbye() {
        link.say_goodbye(goodbye).await;
    }
    drop(link);
    if was_current {
        let last_seen = session.last_heard();
        note(
            &gateway,
            session.server,
            SessionNote::Disconnected { last_seen },
        )
        .await;
        // A session that was opened meanwhile wrote its note before this one: say it again.
        if let Some(newer) = gateway.find(session.server) {
            let facts = Box::new(newer.state().facts.clone());
            let at = clock::now();
            note(
                &gateway,
                session.server,
                SessionNote::Connected { at, facts },
            )
            .await;
        }
    }
}

/// A session in the gateway's map. Dropping it takes it out and ends its grants.
struct Entered {
    gateway: Gateway,
    session: Arc<Session>,
    held: Held,
}

/// What the agent said it holds.
#[derive(Default)]
struct Held {
    started: HashSet<TaskId>,
    /// The list was cut: any other task may be held too.
    cut: bool,
}

impl Held {
    fn new(held: &[HeldTask], total: u64) -> Self {
        let started = held
            .iter()
            .filter(|task| match task.state {
                HeldState::Started | HeldState::Finished => true,
                HeldState::Accepted => false,
            })
            .map(|task| task.task_id)
            .collect();
        let cut = total > held.len() as u64;
        Self { started, cut }
    }
}

impl Entered {
    /// True when no other session had taken over.
    fn leave(&self) -> bool {
        self.session.ended.cancel();
        self.gateway.inner.grants.end(self.session.id);
        let mut sessions = self.gateway.sessions_map();
        let is_current = sessions
            .get(&self.session.server)
            .is_some_and(|current| current.id == self.session.id);
        if is_current {
            sessions.remove(&self.session.server);
            let silent_ms = clock::now().since_ms(self.session.last_heard());
            let now = Instant::now();
            let heard = now.checked_sub(Duration::from_millis(silent_ms));
            let mut last_heard = self.gateway.last_heard();
            last_heard.insert(self.session.server, heard.unwrap_or(now));
        }
        is_current
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.leave();
    }
}

async fn note(gateway: &Gateway, server: ServerId, note: SessionNote) {
    if let Err(error) = gateway.inner.parts.directory.note(server, note).await {
        tracing::error!(server.id = %server, error = &error as &dyn std::error::Error, "a server's record was not updated");
    }
}

/// The handshake.
async fn open<S: AsyncRead + AsyncWrite + Unpin>(
    gateway: &Gateway,
    link: &mut Link<S>,
    peer: SocketAddr,
) -> Result<Entered, Ended> {
    let parts = &gateway.inner.parts;
    let nonce = Nonce::from_bytes(random_bytes());
    let protocols = ProtocolRange::OURS;
    link.writer
        .put(&ToAgent::Challenge { nonce, protocols }, OutKind::Other)
        .map_err(Ended::Encode)?;
    link.writer.flush().await?;
    let Decoded::Message(ToServer::Hello(hello)) = read(&mut link.stream).await? else {
        return Err(Ended::OutOfTurn);
    };
    let refused = |message: String| {
        let reason = GoodbyeReason::Refused;
        Ended::Goodbye(Goodbye { reason, message })
    };
    let Hello {
        protocol,
        server_id: server,
        nonce: agent_nonce,
        epoch,
        signature,
        state,
        held,
        held_total,
    } = *hello;
    let chosen = ProtocolRange {
        min: protocol,
        max: protocol,
    };
    negotiate(ProtocolRange::OURS, chosen).map_err(|error| refused(error.to_string()))?;
    let known = parts
        .directory
        .find(server)
        .await
        .map_err(Ended::Directory)?;
    let Some(known) = known else {
        return Err(refused(format!(
            "the server {server} is not registered here; register it with an activation code"
        )));
    };
    let transcript = Transcript {
        protocol,
        server_id: server,
        server_nonce: nonce,
        agent_nonce,
        fingerprint: parts.identity.fingerprint(),
    };
    transcript
        .verify_hello(known.public_key, epoch, &signature)
        .map_err(|error| refused(error.to_string()))?;

    let id = SessionId::from_bytes(random_bytes());
    let at = clock::now();
    let session = Arc::new(Session {
        id,
        server,
        server_name: known.name,
        workspace: known.workspace,
        epoch: JournalEpoch::from_bytes(*epoch.as_bytes()),
        ended: CancellationToken::new(),
        queries: Queries::new(),
        peer,
        protocol,
        since: at,
        state: Mutex::new(state),
        inbox: Mutex::new(Waiting {
            all: true,
            keys: BTreeSet::new(),
        }),
        ending: Mutex::default(),
        wake: Notify::new(),
        heard_unix_ms: AtomicI64::new(at.unix_ms()),
    });
    let held = Held::new(&held, held_total);
    let older = gateway.sessions_map().insert(server, session.clone());
    let entered = Entered {
        gateway: gateway.clone(),
        session: session.clone(),
        held,
    };
    if let Some(older) = older {
        evict(gateway, &older, &session).await;
    }
    // Whoever shut the gateway down or removed the server a moment ago did not see this session in the map.
    if gateway.inner.stop.is_cancelled() {
        let reason = GoodbyeReason::ShuttingDown;
        let message = "the platform ends or restarts".to_owned();
        return Err(Ended::Goodbye(Goodbye { reason, message }));
    }
    let still = parts
        .directory
        .find(server)
        .await
        .map_err(Ended::Directory)?;
    if still.is_none() {
        let reason = GoodbyeReason::Deregistered;
        let message = "the server was removed from the platform".to_owned();
        return Err(Ended::Goodbye(Goodbye { reason, message }));
    }
    let interval = parts.settings.heartbeat_interval;
    let welcome = Welcome {
        session: id,
        signature: parts.identity.signing().sign_welcome(&transcript, id),
        heartbeat_interval_ms: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX),
    };
    link.writer
        .put(&ToAgent::Welcome(welcome), OutKind::Other)
        .map_err(Ended::Encode)?;
    link.writer.flush().await?;
    tracing::info!(server.id = %server, server.name = %session.server_name, %peer, "an agent's session is open");
    Ok(entered)
}

async fn evict(gateway: &Gateway, older: &Session, newer: &Session) {
    older.end(
        GoodbyeReason::Evicted,
        "another session with this server's key took over",
    );
    tracing::warn!(server.id = %newer.server, server.name = %newer.server_name, older = %older.peer, newer = %newer.peer, "a second session of one agent evicted the first");
    let now = clock::now();
    let Some(more) = gateway.inner.evictions.count(newer.server, now) else {
        return;
    };
    let since = match more {
        0 => String::new(),
        more => format!("; it happened {more} times more since this was said last"),
    };
    let event = SystemEvent {
        schema: 1,
        at: now,
        kind: EventKind::AgentSessionEvicted,
        level: EventLevel::Warning,
        server: Some(newer.server),
        message: format!(
            "a second session of {} from {} took over from the one from {}: if the agent did not just restart, \
             its data directory was copied; register the copy as a server of its own{since}",
            newer.server_name, newer.peer, older.peer
        ),
    };
    if let Err(error) = events::append(&*gateway.inner.parts.store, &event).await {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "a system event was not written"
        );
    }
}

type Reporting = FuturesUnordered<BoxFuture<'static, (TaskId, AckFor, Option<Reported>)>>;

/// Whether the agent waits for an acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AckFor {
    /// The agent sent the result.
    Agent,
    /// The gateway made the result: the agent knows nothing of it.
    Nobody,
}

/// What one session's loop holds beside its socket.
pub(super) struct Loop {
    reports: Arc<dyn TaskReports>,
    server: ServerId,
    reporting: Reporting,
    reported_now: HashSet<TaskId>,
    /// Tasks that cannot be pushed: why. They are revoked at the agent, which answers whether they ever started.
    pub(super) unpushable: HashMap<TaskId, (String, Option<Fault>)>,
    /// Tasks that the agent has started or finished, as far as this session knows.
    started: HashSet<TaskId>,
    /// There may be others.
    held_cut: bool,
}

impl Loop {
    /// Whether the agent may have started the task already.
    pub(super) fn may_have_started(&self, task: TaskId) -> bool {
        self.held_cut || self.started.contains(&task)
    }

    /// A task that could not be pushed was revoked at the agent: where that says that it never started, it failed for the
    /// reason that it could not be pushed for. What did start ends as the agent says.
    fn instead(&mut self, task: TaskId, result: TaskResult) -> TaskResult {
        match self.unpushable.get(&task) {
            Some((message, fault))
                if result.outcome == Outcome::Revoked && result.started_at.is_none() =>
            {
                TaskResult {
                    outcome: Outcome::Failed,
                    message: message.clone(),
                    fault: *fault,
                    ..result
                }
            }
            Some(_) | None => result,
        }
    }

    /// Hands a result to the engine, in the background of the loop.
    pub(super) fn report(&mut self, task: TaskId, result: TaskResult, ack: AckFor) {
        if !self.reported_now.insert(task) {
            return;
        }
        let (reports, server, result) = (self.reports.clone(), self.server, result.cut());
        let report = async move {
            let mut pause = REPORT_PAUSE;
            for _ in 0..REPORT_TRIES {
                crash_point("gateway.before_report");
                match reports.report(server, task, result.clone()).await {
                    Ok(reported) => {
                        crash_point("gateway.after_report");
                        return (task, ack, Some(reported));
                    }
                    Err(error) => {
                        tracing::warn!(server.id = %server, task.id = %task, error = &error as &dyn std::error::Error, "a result was not committed; trying again");
                    }
                }
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            (task, ack, None)
        };
        self.reporting.push(report.boxed());
    }
}

/// The loop of an open session. Returns why it ended.
async fn run<S: AsyncRead + AsyncWrite + Unpin + Send>(
    gateway: &Gateway,
    session: &Arc<Session>,
    link: &mut Link<S>,
    reports: Arc<dyn TaskReports>,
    held: Held,
) -> Ended {
    match turns(gateway, session, link, reports, held).await {
        Ok(never) => match never {},
        Err(ended) => ended,
    }
}

async fn turns<S: AsyncRead + AsyncWrite + Unpin + Send>(
    gateway: &Gateway,
    session: &Arc<Session>,
    link: &mut Link<S>,
    reports: Arc<dyn TaskReports>,
    held: Held,
) -> Result<std::convert::Infallible, Ended> {
    let interval = gateway.inner.parts.settings.heartbeat_interval;
    let mut state = Loop {
        reports,
        server: session.server,
        reporting: FuturesUnordered::new(),
        reported_now: HashSet::new(),
        unpushable: HashMap::new(),
        started: held.started,
        held_cut: held.cut,
    };
    let mut slots = Slots::new();
    let mut heartbeat = interval_at(Instant::now() + interval, interval);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut beats = Beats::default();
    let mut look_again = None;
    loop {
        if let Some(goodbye) = session.ending().take() {
            return Err(Ended::Goodbye(goodbye));
        }
        while link.writer.has_room()
            && let Some(frame) = session.queries.next_frame()
        {
            link.writer.put_query(frame);
        }
        if look_again.is_none()
            && link.writer.has_room()
            && state.reporting.len() < MAX_REPORTS
            && let Some(work) = session.take_work()
        {
            let writer = &mut link.writer;
            match Box::pin(slots.handle(gateway, session, work, writer, &mut state)).await {
                Ok(()) => {}
                Err(error) => {
                    tracing::error!(server.id = %session.server, error = &error as &dyn std::error::Error, "an inbox could not be delivered; trying again");
                    session.inbox().all = true;
                    look_again = Some(Instant::now() + SLOT_PAUSE);
                }
            }
            continue;
        }
        let can_read = state.reporting.len() < MAX_REPORTS && link.writer.has_room_for_answers();
        let has_output = !link.writer.is_idle();
        let (writer, stream) = (&mut link.writer, &mut link.stream);
        tokio::select! {
            message = read(stream), if can_read => {
                session.heard();
                beats.silent = 0;
                handle(gateway, session, message?, writer, &mut state).await?;
            }
            wrote = writer.flush(), if has_output => wrote?,
            Some((task, ack, reported)) = state.reporting.next() => {
                state.reported_now.remove(&task);
                match reported {
                    Some(Reported::Committed | Reported::NotWanted) => {
                        state.unpushable.remove(&task);
                        state.started.remove(&task);
                        if ack == AckFor::Agent {
                            let ack = ToAgent::Ack { task_id: task };
                            writer.put(&ack, OutKind::Ack).map_err(Ended::Encode)?;
                        }
                    }
                    None => return Err(Ended::ReportFailed),
                }
            }
            () = session.wake.notified() => {}
            () = tokio::time::sleep_until(look_again.unwrap_or_else(Instant::now)), if look_again.is_some() => {
                look_again = None;
            }
            _ = heartbeat.tick() => beats.tick(writer, can_read, interval)?,
        }
    }
}

/// Heartbeats without a sign of life.
#[derive(Default)]
struct Beats {
    seq: u64,
    /// Since a frame was read; beats while nothing is read on purpose do not count.
    silent: u32,
    /// Since a frame was written, with some waiting.
    stuck: u32,
    written: u64,
}

impl Beats {
    fn tick<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        writer: &mut Writer<S>,
        can_read: bool,
        interval: Duration,
    ) -> Result<(), Ended> {
        self.silent += u32::from(can_read);
        if writer.is_idle() || writer.written != self.written {
            self.stuck = 0;
        } else {
            self.stuck += 1;
        }
        self.written = writer.written;
        if self.silent > MISSED_HEARTBEATS || self.stuck > MISSED_HEARTBEATS {
            return Err(Ended::Dead { interval });
        }
        if writer.has_room() {
            self.seq += 1;
            let ping = ToAgent::Ping { seq: self.seq };
            writer.put(&ping, OutKind::Other).map_err(Ended::Encode)?;
        }
        Ok(())
    }
}

/// One message of the agent.
async fn handle<S: AsyncRead + AsyncWrite + Unpin>(
    gateway: &Gateway,
    session: &Session,
    message: Decoded<ToServer>,
    writer: &mut Writer<S>,
    state: &mut Loop,
) -> Result<(), Ended> {
    let message = match message {
        Decoded::Message(message) => message,
        Decoded::UnknownKind(of_kind) => {
            let answer = ToAgent::Unsupported { of_kind };
            return writer.put(&answer, OutKind::Other).map_err(Ended::Encode);
        }
    };
    match message {
        ToServer::Hello(_) => return Err(Ended::OutOfTurn),
        ToServer::Accepted { .. } | ToServer::Pong { .. } => {}
        ToServer::Started { task_id, at } => {
            state.started.insert(task_id);
            state.reports.started(session.server, task_id, at);
        }
        ToServer::Output(chunk) => state.reports.output(session.server, chunk),
        ToServer::Result { task_id, result } => {
            let result = state.instead(task_id, result);
            state.report(task_id, result, AckFor::Agent);
        }
        ToServer::State(new) => {
            let changed = {
                let mut old = session.state();
                let changed = (old.facts != new.facts).then(|| Box::new(new.facts.clone()));
                *old = *new;
                changed
            };
            if let Some(facts) = changed {
                let at = clock::now();
                note(gateway, session.server, SessionNote::Facts { at, facts }).await;
            }
        }
        ToServer::SecretsNeeded { instance, names } => {
            let values = secrets_for_restart(gateway, session, instance, names).await;
            if let Some(values) = values {
                let answer = ToAgent::Secrets { instance, values };
                writer.put(&answer, OutKind::Other).map_err(Ended::Encode)?;
            }
        }
        ToServer::QueryAnswer { id, result } => session.queries.answered(id, result),
        ToServer::Unsupported { of_kind } => {
            tracing::warn!(server.id = %session.server, kind = %of_kind, "the agent does not know a message; upgrade it");
        }
    }
    Ok(())
}

/// What an agent may have after its machine restarted: secrets that the installed release refers to, nothing else.
async fn secrets_for_restart(
    gateway: &Gateway,
    session: &Session,
    instance: InstanceId,
    names: Vec<String>,
) -> Option<BTreeMap<String, SecretText>> {
    let parts = &gateway.inner.parts;
    let allowed = match parts
        .directory
        .secrets_of_installed(session.server, instance)
        .await
    {
        Ok(allowed) => allowed,
        Err(error) => {
            tracing::error!(server.id = %session.server, error = &error as &dyn std::error::Error, "secrets for a restart were not sent");
            return None;
        }
    };
    let names = names.into_iter().take(MAX_SECRETS_ASKED);
    let (wanted, refused): (BTreeSet<String>, BTreeSet<String>) =
        names.partition(|name| allowed.contains(name));
    if !refused.is_empty() {
        tracing::warn!(server.id = %session.server, instance = %instance, count = refused.len(), "the agent asked for secrets that its installed release does not refer to");
    }
    match parts.secrets.resolve(&session.workspace, &wanted).await {
        Ok(values) => Some(values),
        Err(error) => {
            tracing::error!(server.id = %session.server, error = &error as &dyn std::error::Error, "secrets for a restart were not sent");
            None
        }
    }
}
