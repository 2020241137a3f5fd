//! The store: one ordered key-value store with revisions, and blobs beside it.
//!
//! Owns the [`Store`] contract, its embedded back ends ([`sled`], [`memory`]), the limits that hold in all of
//! them, blobs, retention, backup and restore. Only this crate names a storage engine. It knows bytes, not
//! records: what stands in a row belongs to the layers above, and so do all policies.
//!
//! Reading shows only what is durable: a row that is written but not synced yet is waited for. Rows are small
//! (at most [`VALUE_MAX_BYTES`]); large data goes to [`blobs`].
//!
//! | module | subject |
//! | --- | --- |
//! | [`key`], [`txn`], [`watch`], [`lease`] | the parts of the contract |
//! | `embedded` | the commit path that the embedded back ends share |
//! | [`sled`], [`memory`] | back ends |
//! | [`blobs`], [`retention`], [`backup`] | large data; removing many rows; one archive of everything |
//! | `conformance` (feature) | what every back end must do |
//! | [`crash`], [`trace`] | hooks for tests |

pub mod backup;
#[cfg(feature = "bench")]
pub mod bench;
pub mod blobs;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod crash;
mod embedded;
pub mod error;
pub mod key;
pub mod lease;
pub mod memory;
pub mod retention;
pub mod sled;
pub mod trace;
pub mod txn;
pub mod watch;

use async_trait::async_trait;

pub use blobs::{BlobDigest, BlobError, BlobInfo, BlobReader, BlobWriter, Blobs};
pub use error::{CommitError, LimitError, StoreError, WatchError};
pub use key::{KEY_MAX_BYTES, Key, Prefix, sortable};
pub use lease::{Lease, LeaseId};
pub use txn::{
    Change, Expected, Operation, Precondition, Revision, TXN_MAX_BYTES, TXN_MAX_OPERATIONS, Txn,
    VALUE_MAX_BYTES, Value,
};
pub use watch::{Event, EventKind, Watch};

/// Most entries of one page.
pub const PAGE_MAX_ENTRIES: usize = 1000;
/// A page ends early when its values reach this many bytes.
pub const PAGE_MAX_BYTES: usize = 4 * 1024 * 1024;

/// A row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: Key,
    pub value: Value,
    /// That of the commit which wrote it; what [`Txn::revision_is`] compares, and an ETag.
    pub revision: Revision,
    /// It hangs on a lease; backups leave it out.
    pub leased: bool,
}

/// Some rows of a prefix in the order of the scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub entries: Vec<Entry>,
    /// There may be more after the last of them.
    pub more: bool,
    /// A watch from here misses no change to what this page (and the pages after it) shows. Pages are not a
    /// snapshot: rows committed later than this may be among them.
    pub revision: Revision,
}

/// An ordered key-value store with revisions. Used as `Arc<dyn Store>`.
///
/// The contract is etcd's on purpose, so that several servers can share one. All back ends pass the same suite
/// (`conformance`).
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The row with this key. Embedded back ends answer without waiting, unless just this row is being written.
    ///
    /// # Errors
    /// [`StoreError`]; a missing row is none.
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError>;

    /// Up to `limit` rows (1 to [`PAGE_MAX_ENTRIES`]) whose keys start with `prefix`, by rising key, after the
    /// key `after`.
    ///
    /// # Errors
    /// [`LimitError::PageSize`] and others of [`StoreError`].
    async fn scan(
        &self,
        prefix: &Prefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError>;

    /// Like [`Store::scan`] by falling key, before the key `before`: newest first where keys hold times.
    ///
    /// # Errors
    /// Those of [`Store::scan`].
    async fn scan_reverse(
        &self,
        prefix: &Prefix,
        before: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError>;

    /// Writes all of it or nothing. When it returns, the transaction survives a loss of power. A transaction that
    /// changes nothing (preconditions only, deletes of rows that are not there) returns a revision at which its
    /// preconditions held and makes no event.
    ///
    /// When the future is dropped before it is ready, the transaction may or may not be committed.
    ///
    /// # Errors
    /// [`CommitError::Conflict`] names the first precondition that does not hold.
    async fn commit(&self, txn: Txn) -> Result<Revision, CommitError>;

    /// Changes of this prefix with revisions greater than `from`, in order.
    ///
    /// # Errors
    /// [`WatchError::Compacted`] when they are no longer all kept.
    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch, WatchError>;

    /// The newest durable revision.
    ///
    /// # Errors
    /// [`StoreError::Closed`], [`StoreError::Broken`].
    async fn revision(&self) -> Result<Revision, StoreError>;

    /// Grants a lease.
    ///
    /// # Errors
    /// [`LimitError::LeaseTtl`].
    async fn lease(&self, ttl_ms: u64) -> Result<Lease, StoreError>;

    /// Commits what was handed in before, ends watches with [`WatchError::Closed`], and lets go of files and
    /// locks. Everything after it is answered with [`StoreError::Closed`]. Closing twice is allowed.
    ///
    /// # Errors
    /// Those of the last write.
    async fn close(&self) -> Result<(), StoreError>;
}
