//! What the platform and its agents say to each other, as types. Pure: no input or output, no clock, no random numbers.
//!
//! Both sides use this crate: the server's gateway and `windlass-agent`. It owns the shape of every message, the limits of a
//! frame, the bytes that are signed, and the text form of an activation code. It must not open sockets or read keys from disk.
//! Source: design, "Agents"; spec "Managed servers".
//!
//! # Listener
//! One TLS listener (HTTP/1.1 only), with a certificate of the platform's own. The agent trusts no certificate authority: it
//! compares the [`Fingerprint`] of the certificate's *key* (SHA-256 of its SubjectPublicKeyInfo, DER) with the one in its
//! [`ActivationCode`]. A renewed certificate with the same key keeps every agent connected.
//!
//! | request | purpose |
//! | --- | --- |
//! | `POST` [`REGISTER_PATH`] | [`RegisterRequest`] → 200 [`RegisterResponse`], otherwise [`Problem`] with 400, 403 or 429 |
//! | `GET` [`CONNECT_PATH`] | upgrade to a WebSocket: one session |
//! | `GET` [`BLOBS_PATH`]`/{digest}` | `Authorization: Bearer <grant>`, optional `Range: bytes=N-` → 200 or 206 with the bytes; 401 grant unknown or of an ended session, 403 grant of another digest, 404, 416 |
//!
//! # A session
//! One JSON text frame is one message, at most [`MAX_FRAME_BYTES`] both ways; `"kind"` names it.
//! Messages to the agent are [`ToAgent`], to the server [`ToServer`].
//! ```text
//!        server                                            agent
//!          │ ◄──── TLS, key pinned; WebSocket upgrade ────── │  connecting
//!          │ ── challenge { nonce S, protocols } ──────────► │  challenged
//!          │ ◄─ hello { server id, nonce A, signature … } ── │  greeted
//!  verify; evict an older session of the same server id
//!          │ ── welcome { session, signature, heartbeat } ─► │  verify → open
//!          │ ── task / revoke / ack / ping / query / … ────► │
//!          │ ◄─ accepted / started / output / result / … ─── │
//!          │ ── goodbye { reason } ────────────────────────► │  closed
//! ```
//! Before `open`, any other message ends the session. Both signatures are over [`identity::Transcript`]: both nonces, the
//! fingerprint of the certificate each side sees, the server id and the signer's role, so nothing can be replayed, relayed
//! through another certificate or reflected. What ends a session: `goodbye`, a closed or broken connection, a frame over the
//! limit, or [`MISSED_HEARTBEATS`] intervals without any frame from the other side. The server pings once per interval; the
//! agent answers `pong`. The agent then reconnects (first after about 100 ms, at most 30 s apart, with jitter), except after
//! [`GoodbyeReason::Deregistered`].
//!
//! **Versions.** A number, [`PROTOCOL_VERSION`]. The server offers a range, the agent takes the highest that it knows
//! ([`negotiate`]). Unknown fields are ignored; an unknown kind is answered with `unsupported` and is not fatal ([`decode`]).
//! So an agent one version behind works.
//!
//! | version | what it added |
//! | --- | --- |
//! | 1 | all that is not named below |
//! | 2 | `query` and `query_answer`: see [`query`]. An agent of version 1 is not asked; the asker is told to upgrade it |
//! | 3 | the action `place_files`. An agent of an earlier version is not sent it; the step fails and says so |
//!
//! # A task
//! The server's view; `epoch` is the journal epoch in the hello, `pushed_epoch` is a field of the inbox row:
//! ```text
//!            first push: pushed_epoch := epoch, durable BEFORE the frame is sent
//!  queued ──────────────────────────────► pushed ── accepted ──► accepted ── started ──► started
//!    │                                      │ └───────────────────────┴───── result ───────┴─► finished ── commit result row
//!    │ node ended before                    │                                                  and inbox removal, THEN ack
//!    ▼ the first push                       │ a session whose epoch ≠ pushed_epoch
//!  dropped                                  └────────────────────► finished(unknown), never sent again
//! ```
//! On each new session the server sends every inbox row again whose `pushed_epoch` is this session's epoch (or none yet):
//! the agent does not run it twice, and takes the fresh secrets and grant, which it had only in memory. A revoke is sent again
//! in the same way, until a result arrives. A result for a task that the server no longer has is acknowledged at once.
//!
//! The agent's view; `▣` marks what is synced to the journal before going on:
//! ```text
//!              expired / fence too low / disk full ─► finished(refused)
//!  task ──► ▣ accepted ──► ▣ started ──► ▣ finished ── result ──► (ack) ▣ forgotten: id and outcome stay as a tombstone
//!              │ revoke        │ revoke: tree killed       ▲
//!              └───────────────┴─────► finished(revoked) ──┘
//!  revoke of an id never seen ─► ▣ finished(revoked): a late push does not run it; answered with that result
//! ```
//! - *accepted* is sent when the task is in the journal, *started* when it left its queue, *result* when the end is in the journal.
//! - A push of a known id never starts it a second time: it is answered with `accepted`, `started` or the result, whichever holds.
//! - After the agent restarted: scripts are re-attached through their shim and finish by themselves. What had not started yet, and
//!   actions without a shim that were interrupted (fetch, unpack, write, activate, start, stop, check: all of them can be carried
//!   on without harm), wait until they are pushed again, since secrets and grants are not in the journal.
//! - After the machine restarted: a script that left no exit status is `unknown`.
//! - A result is sent again in every session until it is acknowledged.
//! - A new epoch means: what this agent did before is not known to it. It runs nothing again by itself.

pub mod balancer;
pub mod code;
pub mod fixed;
pub mod identity;
pub mod message;
pub mod query;
pub mod register;
pub mod secret;

pub use balancer::{BalancerRequest, BalancerState, MemberState, MemberWeight};
pub use code::{ActivationCode, InvalidActivationCode};
pub use fixed::{Epoch, Nonce, PublicKey, SessionId, Signature};
pub use identity::{BadSignature, Fingerprint, Identity, Transcript};
pub use message::{
    AgentState, AppState, DecodeError, Decoded, DiskState, EncodeError, Goodbye, GoodbyeReason,
    HeldState, HeldTask, Hello, JournalState, NoCommonProtocol, OutputChunk, ProtocolRange,
    TaskPush, ToAgent, ToServer, Welcome, decode, encode, negotiate,
};
pub use query::{
    ConnectReply, MAX_QUERIES_IN_FLIGHT, MAX_QUERY_DATA_BYTES, MAX_QUERY_TEXT_BYTES,
    MAX_QUERY_TIMEOUT_MS, ProbeReply, QUERIES_SINCE, Query, QueryError, QueryErrorCode, QueryReply,
};
pub use register::{Problem, RegisterRequest, RegisterResponse, ServerFacts};
pub use secret::{DownloadGrant, SecretText};

/// The version of the protocol that this crate describes. Rises when a message changes its meaning, or when
/// the other side has to know before a new one is sent.
pub const PROTOCOL_VERSION: u32 = 4;

/// From this version an agent takes tasks of no service instance.
pub const SERVER_WORK_VERSION: u32 = 2;

/// From this version an agent knows how to place files.
pub const PLACE_FILES_VERSION: u32 = 3;

/// From this version an agent knows the package formats `tar`, `tar_xz`, `tar_zst` and `tar_bz2`.
pub const TAR_FORMATS_VERSION: u32 = 4;

/// The oldest version that this crate still speaks.
pub const MIN_PROTOCOL_VERSION: u32 = 1;

/// The largest frame in either direction, in bytes. A longer one ends the session.
pub const MAX_FRAME_BYTES: usize = 1024 * 1024;

/// The most output that one [`ToServer::Output`] carries, in bytes.
pub const MAX_OUTPUT_CHUNK_BYTES: usize = 16 * 1024;

/// The most tasks that a hello lists; `held_total` tells how many there are.
pub const MAX_HELD_IN_HELLO: usize = 1000;

/// Time between two heartbeats unless the welcome says otherwise, in milliseconds.
pub const DEFAULT_HEARTBEAT_INTERVAL_MS: u64 = 10_000;

/// After so many heartbeat intervals without any frame from the other side, it counts as dead.
pub const MISSED_HEARTBEATS: u32 = 3;

/// Where an agent registers.
pub const REGISTER_PATH: &str = "/agent/v1/register";

/// Where an agent opens its session.
pub const CONNECT_PATH: &str = "/agent/v1/connect";

/// Where packages are; a slash and the digest follow.
pub const BLOBS_PATH: &str = "/agent/v1/blobs";
