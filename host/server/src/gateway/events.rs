//! System events that the gateway raises: a small record for each, oldest first.
//!
//! Row: `event/{milliseconds since 1970}/{random}` below the tenant. Source: spec "Diagnostics, events".

use serde::{Deserialize, Serialize};
use windlass_domain::{Timestamp, id::ServerId};
use windlass_store::{CommitError, Key, LimitError, Store, Txn, sortable};

use crate::ids;

/// How bad it is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum EventLevel {
    /// For the record.
    Info,
    /// Somebody should look.
    Warning,
    /// Something does not work.
    Critical,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A second session of one server's key took over: a copied machine or data directory, or a restart that was not noticed.
    AgentSessionEvicted,
    /// A certificate of a load balancer ends soon, or has ended. Source: spec "Load balancers".
    CertificateEnds,
}

/// A system event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SystemEvent {
    /// Schema version of this record.
    pub schema: u32,
    /// When.
    pub at: Timestamp,
    /// What.
    pub kind: EventKind,
    /// How bad.
    pub level: EventLevel,
    /// On which server.
    pub server: Option<ServerId>,
    /// For people: what happened and what to do.
    pub message: String,
}

/// Appends an event.
///
/// # Errors
/// [`CommitError`].
pub async fn append(store: &dyn Store, event: &SystemEvent) -> Result<(), CommitError> {
    store.commit(put(event)?).await.map(drop)
}

/// The part of a transaction that appends an event.
///
/// # Errors
/// [`LimitError`], which a time and a random text never make.
pub fn put(event: &SystemEvent) -> Result<Txn, LimitError> {
    let at = sortable(u64::try_from(event.at.unix_ms()).unwrap_or(0));
    let key = Key::from_segments([
        "default",
        "event",
        &at,
        &ids::new_uuid().simple().to_string(),
    ])?;
    let value = serde_json::to_vec(event).expect("the record has string keys");
    Ok(Txn::new().put(key, value))
}
