//! Queries: what the platform asks an agent during a session, and what it is answered.
//!
//! A query is no task. It is asked and answered in one session, is never journaled, and answering it twice does no harm: it looks
//! at something, or says again what should be so. Whoever asked gets an answer or a reason in time, and asks again if it matters.
//!
//! ```text
//!  asked ── sent ──► runs at the agent, with a deadline ── answer ──► answered
//!    │        │                    └── deadline ──► answered: `timeout`
//!    └────────┴── session ends, or the asker's own deadline ──► gone: a late answer is dropped
//! ```
//! Added in version 2 of the protocol; an agent of version 1 is never sent one. A query that a later version added is
//! [`Query::Unknown`] to this one, and is answered with [`QueryErrorCode::Unsupported`]. Source: design, "Agents"; wit, `probes`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::balancer::{BalancerRequest, BalancerState};

/// The first version of the protocol with queries.
pub const QUERIES_SINCE: u32 = 2;

/// The most raw text in an answer, in bytes.
pub const MAX_QUERY_TEXT_BYTES: usize = 64 * 1024;

/// The most structured data in an answer, in bytes of JSON.
pub const MAX_QUERY_DATA_BYTES: usize = 256 * 1024;

/// The longest that a query may run at the agent, in milliseconds. A longer time-out counts as this.
pub const MAX_QUERY_TIMEOUT_MS: u64 = 60_000;

/// Queries of one session that may be under way at once.
pub const MAX_QUERIES_IN_FLIGHT: usize = 16;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "query", rename_all = "snake_case")]
pub enum Query {
    /// A read-only look at the machine.
    Probe {
        /// Which: a code of wit's `probes`, for example `disk`. `available` answers the codes that this agent knows.
        code: String,
        /// Arguments of the probe; it ignores those that it does not know.
        #[serde(default)]
        arguments: BTreeMap<String, String>,
    },
    /// A connection attempt from the machine.
    Connect {
        /// `tcp`, `udp` or `icmp`.
        protocol: String,
        /// An IP address or a host name.
        target: String,
        /// Port; none for `icmp`.
        #[serde(default)]
        port: Option<u16>,
    },
    /// Something to do with a load balancer that the server hosts.
    LoadBalancer {
        /// What.
        request: Box<BalancerRequest>,
    },
    /// A query of a later version.
    #[serde(other)]
    Unknown,
}

/// What was answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum QueryReply {
    /// What a probe saw.
    Probe(ProbeReply),
    /// How a connection attempt ended.
    Connect(ConnectReply),
    /// A load balancer as it is then.
    LoadBalancer(Box<BalancerState>),
    /// A reply of a later version.
    #[serde(other)]
    Unknown,
}

/// What a probe saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReply {
    /// Facts, in the shape of the probe; at most [`MAX_QUERY_DATA_BYTES`].
    pub data: serde_json::Value,
    /// The raw text that they were read from, where there is one; at most [`MAX_QUERY_TEXT_BYTES`].
    #[serde(default)]
    pub text: String,
    /// Bytes of the raw text that were left out.
    #[serde(default)]
    pub dropped_bytes: u64,
}

/// How a connection attempt ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectReply {
    /// Whether the other side answered.
    pub reached: bool,
    /// Time until the answer, or until the attempt was over, in microseconds.
    pub elapsed_us: u64,
    /// What was seen.
    pub detail: String,
}

/// Why there is no answer. The message says what is wrong and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct QueryError {
    /// What kind of reason.
    pub code: QueryErrorCode,
    /// For people.
    pub message: String,
}

impl QueryError {
    /// A reason.
    #[must_use]
    pub fn new(code: QueryErrorCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code, message }
    }
}

/// Kinds of reasons why there is no answer. The codes are those of wit's `plugin-error`, and `failed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QueryErrorCode {
    /// The agent does not know this query, or cannot answer it on this machine.
    Unsupported,
    /// An argument is wrong.
    InvalidRequest,
    /// What was asked for is not there.
    NotFound,
    /// The agent's user may not look there.
    Denied,
    /// It took longer than it may.
    Timeout,
    /// Too much at once, or too much to answer.
    LimitExceeded,
    /// It was tried and failed; also a code of a later version.
    #[serde(other)]
    Failed,
}

impl QueryErrorCode {
    /// The code as text.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unsupported => "unsupported",
            Self::InvalidRequest => "invalid-request",
            Self::NotFound => "not-found",
            Self::Denied => "denied",
            Self::Timeout => "timeout",
            Self::LimitExceeded => "limit-exceeded",
            Self::Failed => "failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_later_version_adds_is_unknown_and_not_malformed() {
        let query: Query =
            serde_json::from_str(r#"{"query":"defragment","depth":3,"disks":["a"]}"#).unwrap();
        assert_eq!(query, Query::Unknown);
        let reply: QueryReply =
            serde_json::from_str(r#"{"reply":"fragments","count":{"a":1}}"#).unwrap();
        assert_eq!(reply, QueryReply::Unknown);
        let error: QueryError =
            serde_json::from_str(r#"{"code":"eclipsed","message":"m"}"#).unwrap();
        assert_eq!(error.code, QueryErrorCode::Failed);
    }

    #[test]
    fn codes_read_as_they_are_written() {
        for code in [
            QueryErrorCode::Unsupported,
            QueryErrorCode::InvalidRequest,
            QueryErrorCode::NotFound,
            QueryErrorCode::Denied,
            QueryErrorCode::Timeout,
            QueryErrorCode::LimitExceeded,
            QueryErrorCode::Failed,
        ] {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
    }
}
