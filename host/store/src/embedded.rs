//! The commit path that the embedded back ends share.
//!
//! Owns: grouping of commits, preconditions, revisions, the order of apply, sync and answer, leases, the feeding
//! of watches, and reads that show durable rows only. A back end adds [`Rows`]: where rows are kept. It must not
//! know how they are stored.
//!
//! ```text
//! commit() --queue--> plan: check preconditions (also against the group's own writes), give revisions
//!                       --> apply --> sync --> answer every transaction --> feed the watches
//! ```
//! A failed apply or sync breaks the store: what is on the disk is unknown until it is opened again, so every
//! later write is refused, and so is every read of what the failed group wrote.
//!
//! Revisions: the highest that may have been used is kept in a row of the back end's own, raised by a block at a
//! time and synced before any revision of the block is given out. After a crash numbering goes on behind the
//! block. Keys that start with a zero byte are such rows; no scan shows them:
//! `\0r` the mark of the revisions, `\0L<key>` one for each row on a lease (found and removed at the next open).

use std::collections::HashMap;
use std::ops::Bound;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::crash::crash_point;
use crate::error::{CommitError, LimitError, StoreError, WatchError};
use crate::key::{Key, Prefix};
use crate::lease::{Lease, LeaseControl, LeaseId, LeaseTable, check_ttl};
use crate::trace::{CommitStage, CommitTrace};
use crate::txn::{Change, Revision, Txn};
use crate::watch::{Event, EventKind, Ring, RingLimits, Watch};
use crate::{Entry, PAGE_MAX_BYTES, PAGE_MAX_ENTRIES, Page, Store};

/// How many revisions are reserved at a time.
const REVISION_BLOCK: u64 = 1 << 20;
/// Most commits that wait for the commit thread; more wait before the queue.
const QUEUE_COMMITS: usize = 512;
/// Most commits of one group.
const GROUP_COMMITS: usize = 512;
/// A transaction of more bytes than this also takes its share of [`LARGE_TOTAL_KIB`] while it waits.
const LARGE_BYTES: usize = 64 * 1024;
/// Most KiB of large transactions that wait at a time.
const LARGE_TOTAL_KIB: usize = 32 * 1024;

/// The highest revision that may have been used.
const MARK_KEY: &[u8] = b"\0r";
/// Before the key of a row that hangs on a lease.
const LEASED_KEY: &[u8] = b"\0L";
/// The first key that belongs to callers.
const FIRST_KEY: &[u8] = b"\x01";

/// A row as a back end keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredRow {
    pub(crate) revision: Revision,
    pub(crate) leased: bool,
    pub(crate) value: Bytes,
}

/// One change of a row, the back end's own rows included.
pub(crate) struct RowWrite {
    pub(crate) key: Bytes,
    /// `None` deletes.
    pub(crate) row: Option<StoredRow>,
}

/// In which order a range is visited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Rising,
    Falling,
}

/// Whether a visitor wants more rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Visit {
    GoOn,
    Stop,
}

/// Where an embedded back end keeps its rows. Called by one writer at a time and by many readers.
pub(crate) trait Rows: Send + Sync + 'static {
    fn get(&self, key: &[u8]) -> Result<Option<StoredRow>, StoreError>;
    fn revision_of(&self, key: &[u8]) -> Result<Option<Revision>, StoreError>;
    fn visit(
        &self,
        start: Bound<&[u8]>,
        end: Bound<&[u8]>,
        direction: Direction,
        visitor: &mut dyn FnMut(Bytes, StoredRow) -> Visit,
    ) -> Result<(), StoreError>;
    /// Applies the transactions in order; each is on the disk as a whole or not at all after a crash.
    fn apply(&self, transactions: &[Vec<RowWrite>]) -> Result<(), StoreError>;
    /// When it returns, everything applied before survives a loss of power.
    fn sync(&self) -> Result<(), StoreError>;
    /// Lets go of files and locks; everything after it is [`StoreError::Closed`]. With `ended_at` the last write was
    /// the mark of the revisions, and it was this one.
    fn close(&self, ended_at: Option<Revision>) -> Result<(), StoreError>;
}

/// How commits reach the one writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writer {
    /// A thread of its own that groups what waits: for back ends whose sync takes time.
    Thread,
    /// The caller itself, under a lock: for back ends that never wait. Works with a paused clock.
    Caller,
}

#[derive(Clone, Default)]
pub(crate) struct EmbeddedOptions {
    pub(crate) ring: RingLimits,
    pub(crate) trace: Option<Arc<dyn CommitTrace>>,
}

/// What readers, watches and the writer share.
struct Shared {
    /// The newest durable revision.
    durable: AtomicU64,
    /// The last revision of the newest group that deletes rows; may be ahead of `durable`.
    deleting: AtomicU64,
    /// Woken when `durable` rises and when the store breaks.
    settled: Notify,
    ring: Arc<Ring>,
    leases: Mutex<LeaseTable>,
    leases_changed: Notify,
    broken: OnceLock<String>,
    closed: AtomicBool,
    trace: Option<Arc<dyn CommitTrace>>,
}

impl Shared {
    fn leases(&self) -> MutexGuard<'_, LeaseTable> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn durable(&self) -> Revision {
        Revision(self.durable.load(Ordering::SeqCst))
    }

    fn check_usable(&self) -> Result<(), StoreError> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(StoreError::Closed);
        }
        match self.broken.get() {
            None => Ok(()),
            Some(reason) => Err(StoreError::Broken {
                reason: reason.clone(),
            }),
        }
    }

    /// Waits until everything up to this revision is durable.
    async fn settle(&self, revision: Revision) -> Result<(), StoreError> {
        loop {
            if self.durable() >= revision {
                return Ok(());
            }
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            if self.durable() >= revision {
                return Ok(());
            }
            self.check_usable()?;
            settled.await;
        }
    }

    /// A stage whose error does not matter any more.
    fn trace(&self, stage: CommitStage) {
        if let Err(error) = self.trace_fallible(stage) {
            tracing::warn!(?stage, %error, "the trace of the commit path failed");
        }
    }

    fn trace_fallible(&self, stage: CommitStage) -> std::io::Result<()> {
        match &self.trace {
            None => Ok(()),
            Some(trace) => trace.reached(stage),
        }
    }
}

type CommitResult = Result<Revision, CommitError>;

enum Request {
    Commit {
        txn: Txn,
        answer: oneshot::Sender<CommitResult>,
        /// The share of a large transaction, held until it was answered.
        share: Option<OwnedSemaphorePermit>,
    },
    /// Deletes the rows of a lease that is ending.
    EndLease {
        lease: LeaseId,
        answer: oneshot::Sender<CommitResult>,
    },
    Close {
        answer: oneshot::Sender<Result<(), StoreError>>,
    },
}

impl Request {
    /// Whether planning it has to know what a row is now.
    fn looks_up(&self) -> bool {
        match self {
            Self::Commit { txn, .. } => {
                !txn.preconditions().is_empty()
                    || txn
                        .operations()
                        .iter()
                        .any(|operation| matches!(operation.change, Change::Delete))
            }
            Self::EndLease { .. } | Self::Close { .. } => false,
        }
    }
}

/// An embedded store over some [`Rows`].
pub(crate) struct Embedded<R: Rows> {
    rows: Arc<R>,
    shared: Arc<Shared>,
    driver: Driver<R>,
    large: Arc<Semaphore>,
    expiry: Mutex<Option<JoinHandle<()>>>,
    me: Weak<Self>,
}

enum Driver<R: Rows> {
    Thread(mpsc::Sender<Request>),
    Caller(Box<Mutex<Committer<R>>>),
}

impl<R: Rows> Embedded<R> {
    /// Takes over rows that nobody else uses: removes those of former leases, reserves revisions, starts the writer
    /// and the task that ends leases. Must be called in a tokio runtime; touches the disk.
    pub(crate) fn start(
        rows: R,
        writer: Writer,
        options: EmbeddedOptions,
    ) -> Result<Arc<Self>, StoreError> {
        let rows = Arc::new(rows);
        let opened_at = read_mark(rows.as_ref())?;
        remove_leased_rows(rows.as_ref())?;
        let shared = Arc::new(Shared {
            durable: AtomicU64::new(opened_at.0),
            deleting: AtomicU64::new(0),
            settled: Notify::new(),
            ring: Arc::new(Ring::new(options.ring, opened_at)),
            leases: Mutex::default(),
            leases_changed: Notify::new(),
            broken: OnceLock::new(),
            closed: AtomicBool::new(false),
            trace: options.trace,
        });
        let committer = Committer {
            rows: Arc::clone(&rows),
            shared: Arc::clone(&shared),
            last: opened_at,
            reserved: opened_at,
            pending: HashMap::new(),
        };
        let driver = match writer {
            Writer::Caller => Driver::Caller(Box::new(Mutex::new(committer))),
            Writer::Thread => {
                let (sender, receiver) = mpsc::channel(QUEUE_COMMITS);
                std::thread::Builder::new()
                    .name("store-commit".to_owned())
                    .spawn(move || committer.serve(receiver))
                    .map_err(|source| StoreError::Io {
                        operation: "start the commit thread of",
                        path: "store".into(),
                        source,
                    })?;
                Driver::Thread(sender)
            }
        };
        let store = Arc::new_cyclic(|me| Self {
            rows,
            shared,
            driver,
            large: Arc::new(Semaphore::new(LARGE_TOTAL_KIB)),
            expiry: Mutex::new(None),
            me: me.clone(),
        });
        let task = tokio::spawn(end_overdue_leases(
            store.me.clone(),
            Arc::clone(&store.shared),
        ));
        *store.expiry() = Some(task);
        Ok(store)
    }

    fn expiry(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.expiry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn submit(&self, request: Request) -> Result<(), StoreError> {
        match &self.driver {
            Driver::Thread(sender) => sender.send(request).await.map_err(|_| StoreError::Closed),
            Driver::Caller(committer) => {
                let mut committer = committer.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(answer) = committer.run(&mut vec![request]) {
                    let closed = committer.finish();
                    reply(answer, closed);
                }
                Ok(())
            }
        }
    }

    async fn end_lease(&self, lease: LeaseId) -> CommitResult {
        let (answer, answered) = oneshot::channel();
        self.submit(Request::EndLease { lease, answer }).await?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    async fn page(
        &self,
        prefix: &Prefix,
        beyond: Option<&Key>,
        limit: usize,
        direction: Direction,
    ) -> Result<Page, StoreError> {
        if limit == 0 || limit > PAGE_MAX_ENTRIES {
            return Err(LimitError::PageSize {
                found: limit,
                limit: PAGE_MAX_ENTRIES,
            }
            .into());
        }
        let revision = self.shared.durable();
        let mut entries = Vec::new();
        let mut bytes = 0;
        let mut more = false;
        {
            let end = prefix.end();
            let first = if prefix.as_bytes().is_empty() {
                FIRST_KEY
            } else {
                prefix.as_bytes()
            };
            let mut start = Bound::Included(first);
            let mut stop = end.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
            if let Some(beyond) = beyond.map(Key::as_bytes) {
                match direction {
                    Direction::Rising if beyond >= first => start = Bound::Excluded(beyond),
                    Direction::Falling if end.as_deref().is_none_or(|end| beyond < end) => {
                        stop = Bound::Excluded(beyond);
                    }
                    Direction::Rising | Direction::Falling => {}
                }
            }
            if !is_empty_range(start, stop) {
                self.rows.visit(start, stop, direction, &mut |key, row| {
                    if entries.len() == limit || bytes >= PAGE_MAX_BYTES {
                        more = true;
                        return Visit::Stop;
                    }
                    bytes += row.value.len();
                    entries.push(entry(Key::trusted(key), row));
                    Visit::GoOn
                })?;
            }
        }
        let newest = entries
            .iter()
            .map(|entry: &Entry| entry.revision.0)
            .max()
            .unwrap_or(0);
        let deleting = self.shared.deleting.load(Ordering::SeqCst);
        self.shared.settle(Revision(newest.max(deleting))).await?;
        Ok(Page {
            entries,
            more,
            revision,
        })
    }
}

impl<R: Rows> Drop for Embedded<R> {
    fn drop(&mut self) {
        if let Some(task) = self.expiry().take() {
            task.abort();
        }
        self.shared.ring.close();
    }
}

#[async_trait]
impl<R: Rows> Store for Embedded<R> {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        match self.rows.get(key.as_bytes())? {
            Some(row) => {
                if row.revision > self.shared.durable() {
                    self.shared.settle(row.revision).await?;
                }
                Ok(Some(entry(key.clone(), row)))
            }
            None => {
                // It may have been deleted by a group that is not durable yet.
                let deleting = Revision(self.shared.deleting.load(Ordering::SeqCst));
                if deleting > self.shared.durable() {
                    self.shared.settle(deleting).await?;
                }
                Ok(None)
            }
        }
    }

    async fn scan(
        &self,
        prefix: &Prefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        self.page(prefix, after, limit, Direction::Rising).await
    }

    async fn scan_reverse(
        &self,
        prefix: &Prefix,
        before: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        self.page(prefix, before, limit, Direction::Falling).await
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, CommitError> {
        txn.validate()?;
        let size = txn.size_bytes();
        let share = if size > LARGE_BYTES {
            let kib = u32::try_from(size.div_ceil(1024)).unwrap_or(u32::MAX);
            let share = Arc::clone(&self.large).acquire_many_owned(kib).await;
            Some(share.map_err(|_| StoreError::Closed)?)
        } else {
            None
        };
        let (answer, answered) = oneshot::channel();
        self.submit(Request::Commit { txn, answer, share }).await?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch, WatchError> {
        self.shared.ring.watch(prefix, from, self.shared.durable())
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.shared.check_usable()?;
        Ok(self.shared.durable())
    }

    async fn lease(&self, ttl_ms: u64) -> Result<Lease, StoreError> {
        check_ttl(ttl_ms)?;
        self.shared.check_usable()?;
        let control = self.me.upgrade().ok_or(StoreError::Closed)?;
        let id = self.shared.leases().grant(ttl_ms, Instant::now());
        self.shared.leases_changed.notify_one();
        Ok(Lease::new(id, ttl_ms, control))
    }

    async fn close(&self) -> Result<(), StoreError> {
        let task = self.expiry().take();
        if let Some(task) = task {
            task.abort();
            match task.await {
                Ok(()) => {}
                Err(error) if error.is_cancelled() => {}
                Err(error) => tracing::error!(%error, "the task that ends leases failed"),
            }
        }
        let (answer, answered) = oneshot::channel();
        let result = match self.submit(Request::Close { answer }).await {
            Ok(()) => answered.await.unwrap_or(Ok(())),
            // Closed before.
            Err(StoreError::Closed) => Ok(()),
            Err(other) => Err(other),
        };
        self.shared.ring.close();
        result
    }
}

#[async_trait]
impl<R: Rows> LeaseControl for Embedded<R> {
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        let kept = self.shared.leases().keep_alive(lease, Instant::now());
        if kept {
            Ok(())
        } else {
            Err(StoreError::LeaseOver { lease })
        }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let ended = self.shared.leases().end(lease);
        if !ended {
            return Err(StoreError::LeaseOver { lease });
        }
        match self.end_lease(lease).await {
            Ok(_) => Ok(()),
            Err(CommitError::Store(error)) => Err(error),
            Err(CommitError::LeaseOver { lease }) => Err(StoreError::LeaseOver { lease }),
            Err(CommitError::Limit(error)) => Err(error.into()),
            Err(conflict @ CommitError::Conflict { .. }) => Err(StoreError::Engine {
                operation: "end a lease",
                reason: conflict.to_string(),
            }),
        }
    }
}

async fn end_overdue_leases<R: Rows>(store: Weak<Embedded<R>>, shared: Arc<Shared>) {
    loop {
        let changed = shared.leases_changed.notified();
        let deadline = shared.leases().next_deadline();
        match deadline {
            None => changed.await,
            Some(deadline) => {
                tokio::select! {
                    () = tokio::time::sleep_until(deadline) => {}
                    () = changed => continue,
                }
            }
        }
        let overdue = shared.leases().end_overdue(Instant::now());
        for lease in overdue {
            let Some(store) = store.upgrade() else {
                return;
            };
            match store.end_lease(lease).await {
                Ok(_) => tracing::info!(%lease, "a lease ran out"),
                Err(error) => {
                    tracing::error!(%lease, %error, "the rows of a lease that ran out cannot be removed");
                }
            }
        }
    }
}

fn entry(key: Key, row: StoredRow) -> Entry {
    Entry {
        key,
        value: row.value,
        revision: row.revision,
        leased: row.leased,
    }
}

fn is_empty_range(start: Bound<&[u8]>, end: Bound<&[u8]>) -> bool {
    let (Bound::Included(first) | Bound::Excluded(first)) = start else {
        return false;
    };
    match end {
        Bound::Unbounded => false,
        Bound::Included(last) | Bound::Excluded(last) => first >= last,
    }
}

fn reply<T>(answer: oneshot::Sender<T>, result: T) {
    if answer.send(result).is_err() {
        tracing::trace!("nobody waits for the answer of a commit any more");
    }
}

/// The highest revision that may have been used, as far as the rows know.
pub(crate) fn read_mark<R: Rows>(rows: &R) -> Result<Revision, StoreError> {
    let Some(row) = rows.get(MARK_KEY)? else {
        return Ok(Revision(0));
    };
    let bytes: [u8; 8] = row
        .value
        .as_ref()
        .try_into()
        .map_err(|_| StoreError::CorruptRow {
            key: MARK_KEY.escape_ascii().to_string(),
            reason: format!("{} bytes instead of 8", row.value.len()),
        })?;
    Ok(Revision(u64::from_be_bytes(bytes)))
}

/// The write that sets the mark of the revisions.
pub(crate) fn mark_write(mark: Revision) -> RowWrite {
    RowWrite {
        key: Bytes::from_static(MARK_KEY),
        row: Some(StoredRow {
            revision: mark,
            leased: false,
            value: Bytes::copy_from_slice(&mark.0.to_be_bytes()),
        }),
    }
}

fn lease_marker(key: &Key) -> Bytes {
    [LEASED_KEY, key.as_bytes()].concat().into()
}

/// Embedded leases die with the process: removes the rows that hung on one when it ended.
fn remove_leased_rows<R: Rows>(rows: &R) -> Result<(), StoreError> {
    let mut markers = Vec::new();
    let end = [&LEASED_KEY[..1], &[LEASED_KEY[1] + 1]].concat();
    rows.visit(
        Bound::Included(LEASED_KEY),
        Bound::Excluded(&end),
        Direction::Rising,
        &mut |key, _| {
            markers.push(key);
            Visit::GoOn
        },
    )?;
    if markers.is_empty() {
        return Ok(());
    }
    for some in markers.chunks(GROUP_COMMITS) {
        let writes = some
            .iter()
            .flat_map(|marker| {
                [
                    RowWrite {
                        key: marker.slice(LEASED_KEY.len()..),
                        row: None,
                    },
                    RowWrite {
                        key: marker.clone(),
                        row: None,
                    },
                ]
            })
            .collect();
        rows.apply(&[writes])?;
    }
    rows.sync()
}

/// The one writer.
struct Committer<R: Rows> {
    rows: Arc<R>,
    shared: Arc<Shared>,
    /// The newest revision given out.
    last: Revision,
    /// Revisions up to here may be given out.
    reserved: Revision,
    /// What the group being planned has written so far: `None` when deleted.
    pending: HashMap<Key, Option<Revision>>,
}

/// A group while it is planned.
#[derive(Default)]
struct Group {
    transactions: Vec<Vec<RowWrite>>,
    events: Vec<Event>,
    answers: Vec<(oneshot::Sender<CommitResult>, CommitResult)>,
    shares: Vec<OwnedSemaphorePermit>,
    deletes: bool,
}

impl<R: Rows> Committer<R> {
    fn serve(mut self, mut queue: mpsc::Receiver<Request>) {
        let mut requests = Vec::with_capacity(GROUP_COMMITS);
        let mut closing = None;
        while queue.blocking_recv_many(&mut requests, GROUP_COMMITS) > 0 {
            if let Some(answer) = self.run(&mut requests) {
                // What stands in the queue is still committed, nothing new is taken.
                queue.close();
                closing.get_or_insert(answer);
            }
        }
        let closed = self.finish();
        match (closing, closed) {
            (Some(answer), closed) => reply(answer, closed),
            (None, Ok(())) => {}
            (None, Err(error)) => {
                tracing::error!(%error, "the store was dropped and could not be closed cleanly");
            }
        }
    }

    /// Notes exactly where the revisions ended and lets go of the files.
    fn finish(&mut self) -> Result<(), StoreError> {
        if self.shared.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        if self.shared.broken.get().is_some() {
            return self.rows.close(None);
        }
        let mark = self.last;
        let noted = self
            .rows
            .apply(&[vec![mark_write(mark)]])
            .and_then(|()| self.rows.sync());
        let closed = self.rows.close(noted.is_ok().then_some(mark));
        noted.and(closed)
    }

    /// Commits a group. Returns whom to answer when the store is to be closed.
    fn run(
        &mut self,
        requests: &mut Vec<Request>,
    ) -> Option<oneshot::Sender<Result<(), StoreError>>> {
        let mut closing = None;
        let mut group = Group::default();
        self.pending.clear();
        if self.shared.check_usable().is_ok()
            && let Err(error) = self.reserve(requests.len())
        {
            self.break_store(&error);
        }
        // What the group itself wrote is kept only where a later one of the group asks for it.
        let needs_pending = requests.iter().skip(1).any(Request::looks_up);
        for request in requests.drain(..) {
            match request {
                Request::Commit { txn, answer, share } => {
                    let planned = self
                        .shared
                        .check_usable()
                        .map_err(CommitError::from)
                        .and_then(|()| self.plan(txn, &mut group, needs_pending));
                    group.shares.extend(share);
                    group.answers.push((answer, planned));
                }
                Request::EndLease { lease, answer } => {
                    let planned = self
                        .shared
                        .check_usable()
                        .map(|()| self.plan_end(lease, &mut group))
                        .map_err(CommitError::from);
                    group.answers.push((answer, planned));
                }
                Request::Close { answer } => {
                    closing.get_or_insert(answer);
                }
            }
        }
        self.write(group);
        closing
    }

    fn write(&self, group: Group) {
        let last = self.last;
        if !group.transactions.is_empty() {
            let first = Revision(last.0 + 1 - group.transactions.len() as u64);
            if group.deletes {
                self.shared.deleting.store(last.0, Ordering::SeqCst);
            }
            // An engine that panics has failed like one that returns an error.
            let made = std::panic::catch_unwind(AssertUnwindSafe(|| {
                self.make_durable(&group.transactions, first, last)
            }));
            let made = made.unwrap_or_else(|_| {
                Err(StoreError::Engine {
                    operation: "write",
                    reason: "it panicked".to_owned(),
                })
            });
            if let Err(error) = made {
                let reason = self.break_store(&error);
                for (answer, _) in group.answers {
                    let reason = reason.clone();
                    reply(answer, Err(StoreError::Broken { reason }.into()));
                }
                return;
            }
            self.shared.durable.store(last.0, Ordering::SeqCst);
            self.shared.settled.notify_waiters();
        }
        for (answer, result) in group.answers {
            if let Ok(revision) = result {
                self.shared.trace(CommitStage::Answering { revision });
            }
            reply(answer, result);
        }
        drop(group.shares);
        crash_point("store.after_answer");
        if !group.transactions.is_empty() {
            self.shared.ring.feed(group.events.into_iter(), last);
            self.shared.trace(CommitStage::Notified { last });
        }
    }

    fn make_durable(
        &self,
        transactions: &[Vec<RowWrite>],
        first: Revision,
        last: Revision,
    ) -> Result<(), StoreError> {
        let traced = |stage| {
            self.shared
                .trace_fallible(stage)
                .map_err(|source| StoreError::Io {
                    operation: "write to",
                    path: "store".into(),
                    source,
                })
        };
        crash_point("store.before_apply");
        traced(CommitStage::Applying { first, last })?;
        self.rows.apply(transactions)?;
        crash_point("store.after_apply");
        traced(CommitStage::Syncing { last })?;
        self.rows.sync()?;
        crash_point("store.after_sync");
        self.shared.trace(CommitStage::Synced { last });
        Ok(())
    }

    fn break_store(&self, error: &StoreError) -> String {
        let reason = chain(error);
        tracing::error!(%reason, "the store stopped after a failed write");
        let reason = self.shared.broken.get_or_init(|| reason).clone();
        self.shared.settled.notify_waiters();
        reason
    }

    /// Makes sure that as many revisions may be given out.
    fn reserve(&mut self, revisions: usize) -> Result<(), StoreError> {
        if self.last.0 + revisions as u64 <= self.reserved.0 {
            return Ok(());
        }
        let reserved = Revision(self.last.0 + revisions as u64 + REVISION_BLOCK);
        self.rows.apply(&[vec![mark_write(reserved)]])?;
        self.rows.sync()?;
        self.reserved = reserved;
        Ok(())
    }

    fn found(&self, key: &Key) -> Result<Option<Revision>, StoreError> {
        match self.pending.get(key) {
            Some(pending) => Ok(*pending),
            None => self.rows.revision_of(key.as_bytes()),
        }
    }

    /// Decides one transaction and adds its writes to the group.
    fn plan(&mut self, txn: Txn, group: &mut Group, needs_pending: bool) -> CommitResult {
        for precondition in txn.preconditions() {
            let found = self.found(&precondition.key)?;
            if !precondition.expected.holds(found) {
                return Err(CommitError::Conflict {
                    key: precondition.key.clone(),
                    expected: precondition.expected,
                    found,
                });
            }
        }
        for operation in txn.operations() {
            if let Change::Put {
                lease: Some(lease), ..
            } = &operation.change
                && !self.shared.leases().takes_rows(*lease)
            {
                return Err(CommitError::LeaseOver { lease: *lease });
            }
        }
        let mut operations = txn.into_operations();
        let mut failed = None;
        operations.retain(|operation| match &operation.change {
            Change::Put { .. } => true,
            Change::Delete => match self.found(&operation.key) {
                Ok(found) => found.is_some(),
                Err(error) => {
                    failed = Some(error);
                    false
                }
            },
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
        if operations.is_empty() {
            return Ok(self.last);
        }
        let revision = Revision(self.last.0 + 1);
        self.last = revision;
        let mut leases = self.shared.leases();
        let mut writes = Vec::with_capacity(operations.len());
        for operation in operations {
            let key = operation.key;
            let had_lease = leases.detach(&key);
            let kind = match operation.change {
                Change::Put { value, lease } => {
                    writes.push(RowWrite {
                        key: key.to_bytes(),
                        row: Some(StoredRow {
                            revision,
                            leased: lease.is_some(),
                            value: value.clone(),
                        }),
                    });
                    if let Some(lease) = lease {
                        leases.attach(&key, lease);
                        writes.push(RowWrite {
                            key: lease_marker(&key),
                            row: Some(StoredRow {
                                revision,
                                leased: true,
                                value: Bytes::new(),
                            }),
                        });
                    }
                    if had_lease && lease.is_none() {
                        writes.push(RowWrite {
                            key: lease_marker(&key),
                            row: None,
                        });
                    }
                    if needs_pending {
                        self.pending.insert(key.clone(), Some(revision));
                    }
                    EventKind::Put {
                        value,
                        leased: lease.is_some(),
                    }
                }
                Change::Delete => {
                    group.deletes = true;
                    writes.push(RowWrite {
                        key: key.to_bytes(),
                        row: None,
                    });
                    if had_lease {
                        writes.push(RowWrite {
                            key: lease_marker(&key),
                            row: None,
                        });
                    }
                    if needs_pending {
                        self.pending.insert(key.clone(), None);
                    }
                    EventKind::Deleted
                }
            };
            group.events.push(Event {
                revision,
                key,
                kind,
            });
        }
        group.transactions.push(writes);
        Ok(revision)
    }

    /// Adds the deletes of the rows of a lease that is over.
    fn plan_end(&mut self, lease: LeaseId, group: &mut Group) -> Revision {
        let rows = self.shared.leases().take(lease);
        if rows.is_empty() {
            return self.last;
        }
        let revision = Revision(self.last.0 + 1);
        self.last = revision;
        group.deletes = true;
        let mut writes = Vec::with_capacity(2 * rows.len());
        for key in rows {
            writes.push(RowWrite {
                key: key.to_bytes(),
                row: None,
            });
            writes.push(RowWrite {
                key: lease_marker(&key),
                row: None,
            });
            self.pending.insert(key.clone(), None);
            group.events.push(Event {
                revision,
                key,
                kind: EventKind::Deleted,
            });
        }
        group.transactions.push(writes);
        revision
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
