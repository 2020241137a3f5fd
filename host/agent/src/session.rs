//! Sessions with the platform: connects, proves who is who, carries messages, and comes back when it breaks.
//!
//! The states are drawn in the head of `windlass_protocol`. It holds no tasks: what is said twice or lost is the agent's affair.

use std::time::Duration;

use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{self, Message, protocol::WebSocketConfig},
};
use tokio_util::sync::CancellationToken;
use windlass_domain::id::ServerId;
use windlass_protocol::{
    BadSignature, CONNECT_PATH, DecodeError, Decoded, EncodeError, Goodbye, GoodbyeReason, Hello,
    Identity, MAX_FRAME_BYTES, MISSED_HEARTBEATS, NoCommonProtocol, Nonce, ProtocolRange,
    PublicKey, ToAgent, ToServer, Transcript, decode, encode, negotiate,
};

use crate::{
    agent::Command,
    clock, crash,
    files::chain,
    net::{CONNECT_TIMEOUT, NetError, Platform},
};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Messages that may wait for the network. More, and the session is closed.
const OUTBOUND: usize = 2048;
/// Buffers of an idle connection are this small.
const BUFFER: usize = 4096;

/// Who the agent is and whom it talks to.
pub struct Peer {
    /// The platform's listener.
    pub platform: Platform,
    /// The key that the platform signs with.
    pub platform_key: PublicKey,
    /// This server.
    pub server_id: ServerId,
    /// This agent's key.
    pub identity: Identity,
}

/// Why sessions are over for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// The agent was asked to stop.
    Stopped,
    /// The platform removed this server.
    Deregistered,
}

/// Why one session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Net(#[from] NetError),
    #[error("the WebSocket failed")]
    WebSocket(#[from] tungstenite::Error),
    #[error(transparent)]
    Version(#[from] NoCommonProtocol),
    #[error("the platform does not prove that it is the one this server registered with")]
    Impostor(#[from] BadSignature),
    #[error("the platform sent what is no message")]
    Decode(#[from] DecodeError),
    #[error("a message cannot be sent")]
    Encode(#[from] EncodeError),
    #[error("the platform sent `{0}` where the handshake wants another message")]
    OutOfTurn(&'static str),
    #[error("the platform closed the connection")]
    Closed,
    #[error("the platform was silent for {0} ms")]
    Silent(u128),
    #[error("the platform ended the session: {}", .0.message)]
    Goodbye(Goodbye),
    #[error("the agent ends")]
    AgentGone,
}

type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// Keeps a session open until the agent stops or is deregistered.
pub async fn keep(peer: Peer, commands: mpsc::Sender<Command>, stop: CancellationToken) -> Over {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut opened = false;
        let ended = tokio::select! {
            () = stop.cancelled() => return Over::Stopped,
            ended = session(&peer, &commands, &mut opened) => ended,
        };
        if commands.send(Command::Closed).await.is_err() {
            return Over::Stopped;
        }
        if opened {
            pause = FIRST_PAUSE;
        }
        let mut wait = pause;
        pause = (pause * 2).min(LONGEST_PAUSE);
        match &ended {
            SessionError::Goodbye(Goodbye { reason, message }) => match reason {
                GoodbyeReason::Deregistered => {
                    tracing::warn!(%message, "this server was deregistered");
                    return Over::Deregistered;
                }
                GoodbyeReason::Evicted | GoodbyeReason::Refused => wait = LONGEST_PAUSE,
                GoodbyeReason::ShuttingDown | GoodbyeReason::Other => {}
            },
            SessionError::AgentGone => return Over::Stopped,
            SessionError::Net(_)
            | SessionError::WebSocket(_)
            | SessionError::Version(_)
            | SessionError::Impostor(_)
            | SessionError::Decode(_)
            | SessionError::Encode(_)
            | SessionError::OutOfTurn(_)
            | SessionError::Closed
            | SessionError::Silent(_) => {}
        }
        let wait = jittered(wait);
        tracing::warn!(error = %chain(&ended), retry_ms = wait.as_millis(), "no session with the platform");
        tokio::select! {
            () = stop.cancelled() => return Over::Stopped,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Between half of a pause and the whole of it, so that a fleet does not come back in step.
fn jittered(pause: Duration) -> Duration {
    let share = f64::from(u32::from_le_bytes(clock::random())) / f64::from(u32::MAX);
    pause.mul_f64(0.5 + share / 2.0)
}

async fn session(peer: &Peer, commands: &mpsc::Sender<Command>, opened: &mut bool) -> SessionError {
    match open_and_carry(peer, commands, opened).await {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

async fn open_and_carry(
    peer: &Peer,
    commands: &mpsc::Sender<Command>,
    opened: &mut bool,
) -> Result<std::convert::Infallible, SessionError> {
    let silent = |_| SessionError::Silent(CONNECT_TIMEOUT.as_millis());
    let stream = peer.platform.connect().await?;
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER)
        .write_buffer_size(BUFFER)
        .max_write_buffer_size(2 * MAX_FRAME_BYTES)
        .max_message_size(Some(MAX_FRAME_BYTES))
        .max_frame_size(Some(MAX_FRAME_BYTES));
    let url = format!("wss://{}{CONNECT_PATH}", peer.platform.address());
    let upgrade = client_async_with_config(url, stream, Some(config));
    let (mut socket, _) = timeout(CONNECT_TIMEOUT, upgrade).await.map_err(silent)??;
    crash::point("connected");
    let heartbeat = timeout(CONNECT_TIMEOUT, shake_hands(&mut socket, peer, commands))
        .await
        .map_err(silent)??;
    tracing::info!(server.id = %peer.server_id, platform = %peer.platform.address(), "connected");
    *opened = true;
    crash::point("welcomed");
    let (outbound, messages) = mpsc::channel(OUTBOUND);
    // Read only in the part that carries: nothing can come before the agent knows of the session.
    commands
        .send(Command::Opened(outbound))
        .await
        .map_err(|_| SessionError::AgentGone)?;
    let (sink, source) = socket.split();
    carry(sink, source, messages, commands, heartbeat).await
}

/// Proves both sides; the heartbeat's interval.
async fn shake_hands(
    socket: &mut Socket,
    peer: &Peer,
    commands: &mpsc::Sender<Command>,
) -> Result<Duration, SessionError> {
    let ToAgent::Challenge {
        nonce: server_nonce,
        protocols,
    } = handshake_message(socket).await?
    else {
        return Err(SessionError::OutOfTurn("something else than a challenge"));
    };
    let protocol = negotiate(ProtocolRange::OURS, protocols)?;
    let (reply, introduction) = oneshot::channel();
    commands
        .send(Command::Introduce(reply))
        .await
        .map_err(|_| SessionError::AgentGone)?;
    let introduction = introduction.await.map_err(|_| SessionError::AgentGone)?;
    let transcript = Transcript {
        protocol,
        server_id: peer.server_id,
        server_nonce,
        agent_nonce: Nonce::from_bytes(clock::random()),
        fingerprint: peer.platform.fingerprint(),
    };
    let hello = ToServer::Hello(Box::new(Hello {
        protocol,
        server_id: peer.server_id,
        nonce: transcript.agent_nonce,
        epoch: introduction.epoch,
        signature: peer.identity.sign_hello(&transcript, introduction.epoch),
        state: introduction.state,
        held: introduction.held,
        held_total: introduction.held_total,
    }));
    socket.send(Message::text(encode(&hello)?)).await?;
    let ToAgent::Welcome(welcome) = handshake_message(socket).await? else {
        return Err(SessionError::OutOfTurn("something else than a welcome"));
    };
    transcript.verify_welcome(peer.platform_key, welcome.session, &welcome.signature)?;
    Ok(Duration::from_millis(
        welcome.heartbeat_interval_ms.clamp(10, 600_000),
    ))
}

async fn handshake_message(socket: &mut Socket) -> Result<ToAgent, SessionError> {
    loop {
        match socket.next().await.ok_or(SessionError::Closed)?? {
            Message::Text(text) => match decode(&text)? {
                Decoded::Message(ToAgent::Goodbye(goodbye)) => {
                    return Err(SessionError::Goodbye(goodbye));
                }
                Decoded::Message(message) => return Ok(message),
                Decoded::UnknownKind(of_kind) => {
                    socket
                        .send(Message::text(encode(&ToServer::Unsupported { of_kind })?))
                        .await?;
                }
            },
            Message::Close(_) => return Err(SessionError::Closed),
            Message::Binary(_) => return Err(SessionError::OutOfTurn("a binary frame")),
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
        }
    }
}

async fn carry(
    mut sink: SplitSink<Socket, Message>,
    mut source: SplitStream<Socket>,
    mut messages: mpsc::Receiver<ToServer>,
    commands: &mpsc::Sender<Command>,
    heartbeat: Duration,
) -> Result<std::convert::Infallible, SessionError> {
    let patience = heartbeat * MISSED_HEARTBEATS;
    // Answers of the session itself; a platform that floods it with pings and reads nothing is cut off by the writer's time-out.
    let (replies, mut answers) = mpsc::channel::<ToServer>(16);
    let read = async {
        loop {
            let frame = timeout(patience, source.next())
                .await
                .map_err(|_| SessionError::Silent(patience.as_millis()))?
                .ok_or(SessionError::Closed)??;
            let reply = match frame {
                Message::Text(text) => match decode(&text)? {
                    Decoded::Message(ToAgent::Ping { seq }) => ToServer::Pong { seq },
                    Decoded::Message(ToAgent::Goodbye(goodbye)) => {
                        return Err(SessionError::Goodbye(goodbye));
                    }
                    Decoded::Message(ToAgent::Challenge { .. } | ToAgent::Welcome(_)) => {
                        return Err(SessionError::OutOfTurn(
                            "a handshake message in an open session",
                        ));
                    }
                    Decoded::Message(
                        message @ (ToAgent::Task(_)
                        | ToAgent::Revoke { .. }
                        | ToAgent::Ack { .. }
                        | ToAgent::Secrets { .. }
                        | ToAgent::Query { .. }
                        | ToAgent::Unsupported { .. }),
                    ) => {
                        commands
                            .send(Command::Inbound(message))
                            .await
                            .map_err(|_| SessionError::AgentGone)?;
                        continue;
                    }
                    Decoded::UnknownKind(of_kind) => ToServer::Unsupported { of_kind },
                },
                Message::Close(_) => return Err(SessionError::Closed),
                Message::Binary(_) => return Err(SessionError::OutOfTurn("a binary frame")),
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            };
            replies
                .send(reply)
                .await
                .map_err(|_| SessionError::Closed)?;
        }
    };
    let write = async {
        loop {
            let message = tokio::select! {
                biased;
                Some(answer) = answers.recv() => answer,
                message = messages.recv() => message.ok_or(SessionError::Closed)?,
            };
            let text = encode(&message)?;
            timeout(patience, sink.send(Message::text(text)))
                .await
                .map_err(|_| SessionError::Silent(patience.as_millis()))??;
        }
    };
    tokio::select! {
        ended = read => ended,
        ended = write => ended,
    }
}
