//! Leases: rows that vanish when their owner no longer says that it lives.
//!
//! Owns [`Lease`], which callers hold, and the table of leases of the embedded back ends. Deadlines are in
//! tokio's monotonic time. The table decides when a lease is over; the rows are deleted by the commit path, like
//! any other change.
//!
//! ```text
//! live --(deadline passes, or revoke)--> ending --(its rows are deleted)--> gone
//! ```
//! A lease that is ending takes no more rows and cannot be kept alive.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use crate::error::{LimitError, StoreError};
use crate::key::Key;

/// Shortest lease.
pub const LEASE_MIN_TTL_MS: u64 = 100;
/// Longest lease: a day.
pub const LEASE_MAX_TTL_MS: u64 = 86_400_000;

/// Names a lease while it lives. Not stable across restarts: embedded leases die with the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The back end's side of a [`Lease`].
#[async_trait]
pub(crate) trait LeaseControl: Send + Sync {
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError>;
}

/// A lease that was granted. Dropping it does not end it: it runs out by itself.
#[derive(Clone)]
pub struct Lease {
    id: LeaseId,
    ttl_ms: u64,
    control: Arc<dyn LeaseControl>,
}

impl Lease {
    pub(crate) fn new(id: LeaseId, ttl_ms: u64, control: Arc<dyn LeaseControl>) -> Self {
        Self {
            id,
            ttl_ms,
            control,
        }
    }

    /// For [`crate::Txn::put_leased`].
    #[must_use]
    pub fn id(&self) -> LeaseId {
        self.id
    }

    /// How long it lives without a keep-alive. Keep it alive three times in this time.
    #[must_use]
    pub fn ttl_ms(&self) -> u64 {
        self.ttl_ms
    }

    /// Starts the time to live anew.
    ///
    /// # Errors
    /// [`StoreError::LeaseOver`] when it ran out or was revoked: its rows are gone or going.
    pub async fn keep_alive(&self) -> Result<(), StoreError> {
        self.control.keep_alive(self.id).await
    }

    /// Ends it now; when this returns, its rows are gone.
    ///
    /// # Errors
    /// [`StoreError::LeaseOver`] when it was over already.
    pub async fn revoke(&self) -> Result<(), StoreError> {
        self.control.revoke(self.id).await
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("id", &self.id)
            .field("ttl_ms", &self.ttl_ms)
            .finish_non_exhaustive()
    }
}

pub(crate) fn check_ttl(ttl_ms: u64) -> Result<(), LimitError> {
    if (LEASE_MIN_TTL_MS..=LEASE_MAX_TTL_MS).contains(&ttl_ms) {
        return Ok(());
    }
    Err(LimitError::LeaseTtl {
        found_ms: ttl_ms,
        min_ms: LEASE_MIN_TTL_MS,
        max_ms: LEASE_MAX_TTL_MS,
    })
}

/// The leases of an embedded back end and the rows that hang on them.
#[derive(Default)]
pub(crate) struct LeaseTable {
    granted: u64,
    leases: HashMap<LeaseId, Granted>,
    lease_of_row: HashMap<Key, LeaseId>,
}

struct Granted {
    ttl: Duration,
    state: LeaseState,
    rows: BTreeSet<Key>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum LeaseState {
    Live { deadline: Instant },
    Ending,
}

impl LeaseTable {
    pub(crate) fn grant(&mut self, ttl_ms: u64, now: Instant) -> LeaseId {
        self.granted += 1;
        let id = LeaseId(self.granted);
        let ttl = Duration::from_millis(ttl_ms);
        self.leases.insert(
            id,
            Granted {
                ttl,
                state: LeaseState::Live {
                    deadline: now + ttl,
                },
                rows: BTreeSet::new(),
            },
        );
        id
    }

    /// False when the lease is over. One whose deadline has passed is over even if nobody noticed so far.
    pub(crate) fn keep_alive(&mut self, id: LeaseId, now: Instant) -> bool {
        match self.leases.get_mut(&id) {
            Some(Granted {
                ttl,
                state: LeaseState::Live { deadline },
                ..
            }) if now < *deadline => {
                *deadline = now + *ttl;
                true
            }
            Some(_) | None => false,
        }
    }

    /// Marks it as ending; false when it was over already.
    pub(crate) fn end(&mut self, id: LeaseId) -> bool {
        match self.leases.get_mut(&id) {
            Some(granted) if granted.state != LeaseState::Ending => {
                granted.state = LeaseState::Ending;
                true
            }
            Some(_) | None => false,
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.leases
            .values()
            .filter_map(|granted| match granted.state {
                LeaseState::Live { deadline } => Some(deadline),
                LeaseState::Ending => None,
            })
            .min()
    }

    /// Marks those whose deadline has passed as ending and names them.
    pub(crate) fn end_overdue(&mut self, now: Instant) -> Vec<LeaseId> {
        let mut overdue = Vec::new();
        for (id, granted) in &mut self.leases {
            match granted.state {
                LeaseState::Live { deadline } if deadline <= now => {
                    granted.state = LeaseState::Ending;
                    overdue.push(*id);
                }
                LeaseState::Live { .. } | LeaseState::Ending => {}
            }
        }
        overdue.sort_unstable();
        overdue
    }

    pub(crate) fn takes_rows(&self, id: LeaseId) -> bool {
        self.leases
            .get(&id)
            .is_some_and(|granted| granted.state != LeaseState::Ending)
    }

    pub(crate) fn attach(&mut self, key: &Key, id: LeaseId) {
        if let Some(granted) = self.leases.get_mut(&id) {
            granted.rows.insert(key.clone());
            self.lease_of_row.insert(key.clone(), id);
        }
    }

    /// Frees a row of its lease; true when it had one.
    pub(crate) fn detach(&mut self, key: &Key) -> bool {
        if self.lease_of_row.is_empty() {
            return false;
        }
        let Some(id) = self.lease_of_row.remove(key) else {
            return false;
        };
        if let Some(granted) = self.leases.get_mut(&id) {
            granted.rows.remove(key);
        }
        true
    }

    /// Forgets a lease and returns the rows that hang on it.
    pub(crate) fn take(&mut self, id: LeaseId) -> BTreeSet<Key> {
        let rows = self
            .leases
            .remove(&id)
            .map(|granted| granted.rows)
            .unwrap_or_default();
        for key in &rows {
            self.lease_of_row.remove(key);
        }
        rows
    }
}
