//! System events: a small record for each. Read by [`crate::service::events`]. Source: spec "Diagnostics, events".
//!
//! What can happen again and again is raised once in [`SILENCE_MS`], with how often it happened: see `Evictions`.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use windlass_domain::{Timestamp, id::ServerId};
use windlass_store::{CommitError, Store, Txn};

use crate::{ids, keys};

/// Time in which an eviction of one server's session is raised once, in milliseconds: 10 minutes.
pub const SILENCE_MS: u64 = 10 * 60_000;

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
    store.commit(put(event)).await.map(drop)
}

/// The part of a transaction that appends an event.
#[must_use]
pub fn put(event: &SystemEvent) -> Txn {
    let key = keys::event(event.at, &ids::new_uuid().simple().to_string());
    let value = serde_json::to_vec(event).expect("the record has string keys");
    Txn::new().put(key, value)
}

/// Which servers' sessions were evicted lately: two copies of one agent evict each other without an end. In memory only: a
/// restart raises one event more.
#[derive(Debug, Default)]
pub(super) struct Evictions(Mutex<HashMap<ServerId, Raised>>);

#[derive(Debug)]
struct Raised {
    at: Timestamp,
    /// Evictions since then.
    more: u32,
}

impl Evictions {
    /// Counts one. `Some`: an event is due, with how many there were since the one before.
    pub(super) fn count(&self, server: ServerId, now: Timestamp) -> Option<u32> {
        let mut raised = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = raised.get_mut(&server)
            && now.since_ms(before.at) < SILENCE_MS
        {
            before.more = before.more.saturating_add(1);
            return None;
        }
        let more = raised.get(&server).map_or(0, |before| before.more);
        // What is quiet for long is over, and its count with it.
        raised.retain(|_, before| now.since_ms(before.at) < 6 * SILENCE_MS);
        raised.insert(server, Raised { at: now, more: 0 });
        Some(more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evictions_of_one_server_are_raised_once_in_a_while_with_their_number() {
        let evictions = Evictions::default();
        let [one, two] = [1, 2].map(|id| ServerId::from_uuid(uuid::Uuid::from_u128(id)));
        let at = |ms: u64| Timestamp::from_unix_ms(1_000_000).plus_ms(ms);
        for (server, now, expect) in [
            (one, 0, Some(0)),
            (one, 1000, None),
            (two, 1000, Some(0)),
            (one, SILENCE_MS - 1, None),
            (one, SILENCE_MS, Some(2)),
            (one, SILENCE_MS + 1, None),
            (two, 7 * SILENCE_MS, Some(0)),
            (one, 7 * SILENCE_MS, Some(0)),
        ] {
            assert_eq!(evictions.count(server, at(now)), expect, "{server} {now}");
        }
        assert_eq!(evictions.0.lock().unwrap().len(), 2);
    }
}
