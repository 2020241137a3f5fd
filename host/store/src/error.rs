//! What can go wrong at the boundary of the store. Owns the error types of rows, transactions and watches;
//! those of blobs and backups stand beside their code.

use std::path::PathBuf;

use crate::key::Key;
use crate::lease::LeaseId;
use crate::txn::{Expected, Revision};

/// A limit that holds in every back end (design, "Data: one ordered key-value store with revisions").
/// Each names the limit and the current figure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    #[error("a key may not be empty; give it at least one segment")]
    KeyEmpty,
    #[error(
        "key `{start}…` has {found_bytes} bytes, the limit is {limit_bytes}; use shorter names"
    )]
    KeyTooLong {
        start: String,
        found_bytes: usize,
        limit_bytes: usize,
    },
    #[error("a key may not start with a zero byte: those rows belong to the store itself")]
    KeyReserved,
    #[error("a segment of a key may not be empty")]
    SegmentEmpty,
    #[error("segment `{segment}` of a key contains `/`; segments are joined by it")]
    SegmentHasSeparator { segment: String },
    #[error(
        "the value of `{key}` has {found_bytes} bytes, the limit is {limit_bytes}; keep large data as a blob"
    )]
    ValueTooLarge {
        key: Key,
        found_bytes: usize,
        limit_bytes: usize,
    },
    #[error("a transaction with no operation and no precondition does nothing")]
    TxnEmpty,
    #[error("a transaction has {found} {what}, the limit is {limit}; split it")]
    TooManyOperations {
        what: OperationKind,
        found: usize,
        limit: usize,
    },
    #[error("a transaction has {found_bytes} bytes, the limit is {limit_bytes}; split it")]
    TxnTooLarge {
        found_bytes: usize,
        limit_bytes: usize,
    },
    #[error("key `{key}` stands twice among the {what} of a transaction; name each key once")]
    KeyTwice { what: OperationKind, key: Key },
    #[error("a lease of {found_ms} ms is outside the limits of {min_ms} to {max_ms} ms")]
    LeaseTtl {
        found_ms: u64,
        min_ms: u64,
        max_ms: u64,
    },
    #[error("a page of {found} entries is outside the limits of 1 to {limit}")]
    PageSize { found: usize, limit: usize },
}

/// What a count of a transaction counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperationKind {
    /// Puts and deletes.
    Operations,
    Preconditions,
}

impl std::fmt::Display for OperationKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Operations => "operations",
            Self::Preconditions => "preconditions",
        })
    }
}

/// Why the store could not answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error(
        "the directory `{}` is in use by another process ({holder}); stop that one first, or use another directory",
        directory.display()
    )]
    Locked { directory: PathBuf, holder: String },
    #[error(
        "the store in `{}` is damaged: {reason}; restore a backup into an empty directory",
        directory.display()
    )]
    Corrupt { directory: PathBuf, reason: String },
    #[error("row `{key}` is damaged: {reason}; restore a backup into an empty directory")]
    CorruptRow { key: String, reason: String },
    #[error(
        "the store in `{}` has format {found}, this version reads format {supported}; use a matching version",
        directory.display()
    )]
    Format {
        directory: PathBuf,
        found: String,
        supported: u32,
    },
    #[error("cannot {operation} `{}`", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The engine's own error, as text so that its type stays inside its back end.
    #[error("the storage engine failed to {operation}: {reason}")]
    Engine {
        operation: &'static str,
        reason: String,
    },
    /// After a failed write or sync nobody knows what is on the disk: the store refuses everything until it is
    /// opened again.
    #[error("the store stopped after a failed write ({reason}); check the disk and restart")]
    Broken { reason: String },
    #[error("the store is closed")]
    Closed,
    #[error("lease {lease} is over; take a new one")]
    LeaseOver { lease: LeaseId },
}

/// Why a transaction was not committed. For every variant but [`CommitError::Store`] nothing was written. After
/// `Store(Broken)` the outcome is unknown until the store was opened again: the transaction is there whole or
/// not at all.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    #[error("`{key}` was expected to {expected}, found {}", found_text(.found.as_ref()))]
    Conflict {
        key: Key,
        expected: Expected,
        /// The revision of the row now; `None` when there is no row.
        found: Option<Revision>,
    },
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error("lease {lease} is over, its rows are gone; take a new one")]
    LeaseOver { lease: LeaseId },
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn found_text(found: Option<&Revision>) -> String {
    match found {
        Some(revision) => format!("revision {revision}"),
        None => "no row".to_owned(),
    }
}

/// Why a watch ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// Events were missed: the start lies before what is kept, before a restart, or the watcher was too slow.
    /// List again and watch from the revision of the list.
    #[error(
        "events after revision {from} are no longer kept (the oldest start is {oldest}); list again and watch from there"
    )]
    Compacted { from: Revision, oldest: Revision },
    #[error("the store is closed")]
    Closed,
}
