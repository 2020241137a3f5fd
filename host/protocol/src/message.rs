//! The messages of a session, their text form, and the choice of a protocol version.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use windlass_domain::{
    Timestamp,
    id::{InstanceId, ServerId},
    task::{Task, TaskId, TaskResult},
};

use crate::{
    MAX_FRAME_BYTES, MIN_PROTOCOL_VERSION, PROTOCOL_VERSION,
    fixed::{Epoch, Nonce, SessionId, Signature},
    query::{Query, QueryError, QueryReply},
    register::ServerFacts,
    secret::{DownloadGrant, SecretText},
};

/// The server's messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ToAgent {
    /// The first frame of a session.
    Challenge {
        /// The server's nonce.
        nonce: Nonce,
        /// The protocol versions that the server speaks.
        protocols: ProtocolRange,
    },
    /// The answer to a good hello: the session is open.
    Welcome(Welcome),
    /// A task to run once.
    Task(Box<TaskPush>),
    /// The task is not wanted any more: not started, or killed. Its end is reported by a result in either case.
    Revoke {
        /// Which task.
        task_id: TaskId,
    },
    /// The task's result is durable at the server; the agent may forget it.
    Ack {
        /// Which task.
        task_id: TaskId,
    },
    /// Once per heartbeat interval.
    Ping {
        /// Comes back in the pong.
        seq: u64,
    },
    /// Values that the agent asked for with [`ToServer::SecretsNeeded`].
    Secrets {
        /// The service instance that they are for.
        instance: InstanceId,
        /// Name of the secret → its value. A name that is missing has no value any more.
        values: BTreeMap<String, SecretText>,
    },
    /// A question that is answered in this session or not at all.
    Query {
        /// Comes back in the answer; not used twice in a session.
        id: u64,
        /// What is asked.
        body: Query,
        /// How long the agent may take, in milliseconds.
        timeout_ms: u64,
    },
    /// The server ends the session.
    Goodbye(Goodbye),
    /// The server does not know this kind of message.
    Unsupported {
        /// The kind that was sent.
        of_kind: String,
    },
}

/// The agent's messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ToServer {
    /// The answer to a challenge.
    Hello(Box<Hello>),
    /// The task is in the agent's journal.
    Accepted {
        /// Which task.
        task_id: TaskId,
    },
    /// The task left its queue and runs.
    Started {
        /// Which task.
        task_id: TaskId,
        /// When, on the agent's clock.
        at: Timestamp,
    },
    /// Live output of a running task. May be dropped; the result holds what counts.
    Output(OutputChunk),
    /// The task's end. Sent again in every session until it is acknowledged.
    Result {
        /// Which task.
        task_id: TaskId,
        /// How it ended.
        result: TaskResult,
    },
    /// Facts and health: after the welcome and whenever something in it changed.
    State(Box<AgentState>),
    /// The answer to a ping.
    Pong {
        /// The ping's number.
        seq: u64,
    },
    /// An application has to be started again after the machine restarted, and its environment refers to these secrets.
    SecretsNeeded {
        /// The service instance.
        instance: InstanceId,
        /// Names of secrets.
        names: Vec<String>,
    },
    /// The answer to a query.
    QueryAnswer {
        /// The query's number.
        id: u64,
        /// What was found, or why nothing.
        result: Result<QueryReply, QueryError>,
    },
    /// The agent does not know this kind of message.
    Unsupported {
        /// The kind that was sent.
        of_kind: String,
    },
}

/// The protocol versions that one side speaks, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtocolRange {
    /// Lowest.
    pub min: u32,
    /// Highest.
    pub max: u32,
}

impl ProtocolRange {
    /// What this crate speaks.
    pub const OURS: Self = Self {
        min: MIN_PROTOCOL_VERSION,
        max: PROTOCOL_VERSION,
    };
}

/// The two sides have no protocol version in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "no common protocol version: this side speaks {} to {}, the other {} to {}; upgrade the older one",
    ours.min, ours.max, theirs.min, theirs.max
)]
pub struct NoCommonProtocol {
    /// This side's versions.
    pub ours: ProtocolRange,
    /// The other side's versions.
    pub theirs: ProtocolRange,
}

/// The highest version that both sides speak.
///
/// # Errors
/// When there is none.
pub fn negotiate(ours: ProtocolRange, theirs: ProtocolRange) -> Result<u32, NoCommonProtocol> {
    let version = ours.max.min(theirs.max);
    if version >= ours.min.max(theirs.min) {
        Ok(version)
    } else {
        Err(NoCommonProtocol { ours, theirs })
    }
}

/// The agent's introduction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The version that the agent chose ([`negotiate`]).
    pub protocol: u32,
    /// Who it is.
    pub server_id: ServerId,
    /// The agent's nonce.
    pub nonce: Nonce,
    /// The epoch of its journal.
    pub epoch: Epoch,
    /// See [`crate::Identity::sign_hello`].
    pub signature: Signature,
    /// Facts and health.
    pub state: AgentState,
    /// Tasks in its journal that are not acknowledged, oldest first, at most [`crate::MAX_HELD_IN_HELLO`]. For information:
    /// what to push follows from the inbox and the epoch alone.
    pub held: Vec<HeldTask>,
    /// How many tasks it holds altogether.
    pub held_total: u64,
}

/// A task that the agent holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldTask {
    /// Which task.
    pub task_id: TaskId,
    /// Where it is.
    pub state: HeldState,
}

/// Where a task is that the agent holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldState {
    /// In the journal; waits for its turn or, after a restart of the agent, for being pushed again.
    Accepted,
    /// Started.
    Started,
    /// Ended; its result follows in this session.
    Finished,
}

/// The server's answer to a good hello.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The session's id.
    pub session: SessionId,
    /// See [`crate::Identity::sign_welcome`].
    pub signature: Signature,
    /// Time between two pings, in milliseconds.
    pub heartbeat_interval_ms: u64,
}

/// A task on its way to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskPush {
    /// The task, which holds references to secrets only.
    pub task: Task,
    /// Name of each secret that the task's environment refers to → its value. In memory only, on both sides.
    #[serde(default)]
    pub secrets: BTreeMap<String, SecretText>,
    /// For a fetch: the right to download its package in this session.
    #[serde(default)]
    pub grant: Option<DownloadGrant>,
}

/// Why a session ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goodbye {
    /// The reason.
    pub reason: GoodbyeReason,
    /// For people.
    pub message: String,
}

/// What an agent has to know about the end of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GoodbyeReason {
    /// The server's record was removed: the agent stops and does not come back. Its applications keep running.
    Deregistered,
    /// Another session with the same key took over: reconnect with the longest pause.
    Evicted,
    /// The platform ends or restarts: reconnect soon.
    ShuttingDown,
    /// The hello was not accepted (unknown server, bad signature, no common protocol version): reconnect with the longest pause.
    Refused,
    /// A reason of a later version: reconnect as usual.
    #[serde(other)]
    Other,
}

/// A piece of a running task's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputChunk {
    /// Which task.
    pub task_id: TaskId,
    /// How many bytes of this task's output (as it was sent, masked) came before this piece, dropped ones included.
    pub offset: u64,
    /// At most [`crate::MAX_OUTPUT_CHUNK_BYTES`] bytes; secrets are masked, bytes that are not UTF-8 replaced.
    pub text: String,
    /// Bytes dropped just before this piece because they came faster than they could be sent.
    pub dropped_bytes: u64,
}

/// An agent's facts and health.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentState {
    /// The machine.
    pub facts: ServerFacts,
    /// The file system of its data directory.
    pub disk: DiskState,
    /// Its journal.
    pub journal: JournalState,
    /// Applications that it supervises.
    pub apps: Vec<AppState>,
    /// Whether process trees are killed through a writable cgroup v2 subtree.
    pub cgroups: bool,
}

/// Room on the file system of the agent's data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    /// Bytes free.
    pub free_bytes: u64,
    /// Below the agent's reserve: it refuses everything but scripts (which may free the disk).
    pub full: bool,
}

/// What became of the agent's journal when it started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JournalState {
    /// Read whole (a torn last record after a power failure is whole: it was never acted on).
    Intact,
    /// There was none: a fresh agent, or its file was deleted.
    Created,
    /// It was damaged; a new one with a new epoch was begun.
    Replaced {
        /// What was wrong with it.
        reason: String,
        /// Where the damaged file was put.
        kept_as: String,
    },
}

/// A supervised application.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppState {
    /// Its service instance.
    pub instance: InstanceId,
    /// The activated release, where there is one.
    pub release: Option<String>,
    /// The main process; `None` while it does not run.
    pub pid: Option<u32>,
    /// When the main process was started.
    pub since: Option<Timestamp>,
    /// How often it ended by itself and was started again.
    pub restarts: u64,
    /// For people, when it does not run: why.
    pub message: String,
}

/// A message that cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// It is larger than a frame may be.
    #[error("the message has {bytes} bytes; a frame may have {MAX_FRAME_BYTES}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// It cannot be written as JSON.
    #[error("the message cannot be written as JSON")]
    Json(#[source] serde_json::Error),
}

/// A frame that is no message.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// It is larger than a frame may be.
    #[error("the frame has {bytes} bytes; it may have {MAX_FRAME_BYTES}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// It is not a JSON object with a `kind`.
    #[error("the frame is not a JSON object with a `kind`")]
    NotAMessage(#[source] serde_json::Error),
    /// Its kind is known, its content is not right.
    #[error("the `{kind}` message is not well formed")]
    Malformed {
        /// The kind.
        kind: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// What a frame turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded<M> {
    /// A message.
    Message(M),
    /// A kind of a later version: answer with `unsupported`, go on.
    UnknownKind(String),
}

/// A direction's message type: knows its kinds.
pub trait Message: Serialize + DeserializeOwned {
    /// The kinds of this direction.
    const KINDS: &'static [&'static str];
}

impl Message for ToAgent {
    const KINDS: &'static [&'static str] = &[
        "challenge",
        "welcome",
        "task",
        "revoke",
        "ack",
        "ping",
        "secrets",
        "query",
        "goodbye",
        "unsupported",
    ];
}

impl Message for ToServer {
    const KINDS: &'static [&'static str] = &[
        "hello",
        "accepted",
        "started",
        "output",
        "result",
        "state",
        "pong",
        "secrets_needed",
        "query_answer",
        "unsupported",
    ];
}

/// A message as the text of a frame.
///
/// # Errors
/// When it is larger than a frame may be.
pub fn encode<M: Message>(message: &M) -> Result<String, EncodeError> {
    let text = serde_json::to_string(message).map_err(EncodeError::Json)?;
    if text.len() > MAX_FRAME_BYTES {
        return Err(EncodeError::TooLarge { bytes: text.len() });
    }
    Ok(text)
}

/// The message in the text of a frame.
///
/// # Errors
/// When the frame is too large, not a message, or a known kind with wrong content. All of them end the session.
pub fn decode<M: Message>(text: &str) -> Result<Decoded<M>, DecodeError> {
    #[derive(Deserialize)]
    struct Kind {
        kind: String,
    }
    if text.len() > MAX_FRAME_BYTES {
        return Err(DecodeError::TooLarge { bytes: text.len() });
    }
    match serde_json::from_str(text) {
        Ok(message) => Ok(Decoded::Message(message)),
        Err(source) => {
            let Kind { kind } = serde_json::from_str(text).map_err(DecodeError::NotAMessage)?;
            if M::KINDS.contains(&kind.as_str()) {
                Err(DecodeError::Malformed { kind, source })
            } else {
                Ok(Decoded::UnknownKind(kind.chars().take(64).collect()))
            }
        }
    }
}

#[cfg(test)]
mod tests;
