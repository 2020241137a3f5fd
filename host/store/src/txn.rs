//! Transactions: what a commit consists of, and the limits that hold in every back end.
//!
//! Owns [`Txn`] and its validation, shared by all back ends. It writes nothing itself.

use std::collections::HashSet;
use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::{LimitError, OperationKind};
use crate::key::Key;
use crate::lease::LeaseId;

/// Most puts and deletes of one transaction, and, counted on their own, most preconditions (*fixed*: design,
/// "Data: one ordered key-value store with revisions"; etcd counts its compares apart from its operations too).
pub const TXN_MAX_OPERATIONS: usize = 128;
/// Most bytes of keys (of preconditions too) and values of one transaction (*fixed*).
pub const TXN_MAX_BYTES: usize = 1024 * 1024;
/// Most bytes of one value (*fixed*: larger ones the embedded engine would write to files that it never syncs).
pub const VALUE_MAX_BYTES: usize = 32 * 1024;

/// What a row holds, at most [`VALUE_MAX_BYTES`].
pub type Value = Bytes;

/// Counts commits of a store; rises with each, never used twice, not even after a crash. It may jump.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a row must be for a transaction to go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    Absent,
    Exists,
    RevisionIs(Revision),
}

impl Expected {
    pub(crate) fn holds(self, found: Option<Revision>) -> bool {
        match self {
            Self::Absent => found.is_none(),
            Self::Exists => found.is_some(),
            Self::RevisionIs(revision) => found == Some(revision),
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("be absent"),
            Self::Exists => f.write_str("exist"),
            Self::RevisionIs(revision) => write!(f, "have revision {revision}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Precondition {
    pub key: Key,
    pub expected: Expected,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    pub key: Key,
    pub change: Change,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Without a lease a put also frees the row of the lease that it had.
    Put {
        value: Value,
        lease: Option<LeaseId>,
    },
    /// Deleting a row that is not there is allowed and does nothing.
    Delete,
}

/// Preconditions, puts and deletes that are committed together or not at all.
///
/// ```
/// # use windlass_store::{Key, Txn};
/// # fn main() -> Result<(), windlass_store::LimitError> {
/// let name = Key::from_segments(["default", "app-name", "shop"])?;
/// let row = Key::from_segments(["default", "app", "app-1"])?;
/// let txn = Txn::new().absent(name.clone()).put(name, "app-1").put(row, "{}");
/// # let _ = txn;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    preconditions: Vec<Precondition>,
    operations: Vec<Operation>,
}

impl Txn {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Only if there is no such row.
    #[must_use]
    pub fn absent(self, key: Key) -> Self {
        self.require(key, Expected::Absent)
    }

    /// Only if there is such a row.
    #[must_use]
    pub fn exists(self, key: Key) -> Self {
        self.require(key, Expected::Exists)
    }

    /// Only if the row is still what was read with this revision.
    #[must_use]
    pub fn revision_is(self, key: Key, revision: Revision) -> Self {
        self.require(key, Expected::RevisionIs(revision))
    }

    #[must_use]
    pub fn require(mut self, key: Key, expected: Expected) -> Self {
        self.preconditions.push(Precondition { key, expected });
        self
    }

    #[must_use]
    pub fn put(self, key: Key, value: impl Into<Value>) -> Self {
        self.change(
            key,
            Change::Put {
                value: value.into(),
                lease: None,
            },
        )
    }

    /// The row vanishes when the lease ends.
    #[must_use]
    pub fn put_leased(self, key: Key, value: impl Into<Value>, lease: LeaseId) -> Self {
        self.change(
            key,
            Change::Put {
                value: value.into(),
                lease: Some(lease),
            },
        )
    }

    #[must_use]
    pub fn delete(self, key: Key) -> Self {
        self.change(key, Change::Delete)
    }

    #[must_use]
    pub fn change(mut self, key: Key, change: Change) -> Self {
        self.operations.push(Operation { key, change });
        self
    }

    /// Everything of `other` as well; for services that commit an idempotency record with their write.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.preconditions.extend(other.preconditions);
        self.operations.extend(other.operations);
        self
    }

    #[must_use]
    pub fn preconditions(&self) -> &[Precondition] {
        &self.preconditions
    }

    #[must_use]
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }

    pub(crate) fn into_operations(self) -> Vec<Operation> {
        self.operations
    }

    /// Bytes of keys and values, as the limit counts them.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        let of_preconditions: usize = self
            .preconditions
            .iter()
            .map(|precondition| precondition.key.as_bytes().len())
            .sum();
        let of_operations: usize = self
            .operations
            .iter()
            .map(|operation| {
                operation.key.as_bytes().len()
                    + match &operation.change {
                        Change::Put { value, .. } => value.len(),
                        Change::Delete => 0,
                    }
            })
            .sum();
        of_preconditions + of_operations
    }

    /// Checks every limit of a transaction. Each back end calls it first in `commit`.
    ///
    /// # Errors
    /// The first limit that does not hold.
    pub fn validate(&self) -> Result<(), LimitError> {
        if self.operations.is_empty() && self.preconditions.is_empty() {
            return Err(LimitError::TxnEmpty);
        }
        for (what, found) in [
            (OperationKind::Operations, self.operations.len()),
            (OperationKind::Preconditions, self.preconditions.len()),
        ] {
            if found > TXN_MAX_OPERATIONS {
                return Err(LimitError::TooManyOperations {
                    what,
                    found,
                    limit: TXN_MAX_OPERATIONS,
                });
            }
        }
        for operation in &self.operations {
            if let Change::Put { value, .. } = &operation.change
                && value.len() > VALUE_MAX_BYTES
            {
                return Err(LimitError::ValueTooLarge {
                    key: operation.key.clone(),
                    found_bytes: value.len(),
                    limit_bytes: VALUE_MAX_BYTES,
                });
            }
        }
        let found_bytes = self.size_bytes();
        if found_bytes > TXN_MAX_BYTES {
            return Err(LimitError::TxnTooLarge {
                found_bytes,
                limit_bytes: TXN_MAX_BYTES,
            });
        }
        if let Some(key) = twice(self.operations.iter().map(|operation| &operation.key)) {
            return Err(LimitError::KeyTwice {
                what: OperationKind::Operations,
                key: key.clone(),
            });
        }
        if let Some(key) = twice(self.preconditions.iter().map(|check| &check.key)) {
            return Err(LimitError::KeyTwice {
                what: OperationKind::Preconditions,
                key: key.clone(),
            });
        }
        Ok(())
    }
}

fn twice<'a>(keys: impl ExactSizeIterator<Item = &'a Key>) -> Option<&'a Key> {
    if keys.len() < 2 {
        return None;
    }
    let mut seen = HashSet::with_capacity(keys.len());
    keys.into_iter().find(|key| !seen.insert(*key))
}
