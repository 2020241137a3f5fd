//! The call journal: every finished call, to be looked at and made again.
//!
//! ```text
//! call ends ─► record (never waits) ─► queue, bounded ─► writer thread ─► batch ─► frame of a file ─► readers
//!                 └ full: dropped, counted                   └ every 200 ms or 1 MiB; files are closed, merged, dropped by age and size
//! ```
//! What a crash can cost: calls of the last 200 ms, and after a loss of power what the kernel had not written yet; never more
//! than the end of one file (see `segment`). Calls are not lost silently otherwise: what the queue or the disk did not take is
//! counted. Nothing here delays a call: one that the queue does not take is not waited for.
//!
//! Secrets are never in it, because plugins are never shown one: requests hold references. Source: design, "Plugins".

mod entry;
mod segment;
mod writer;

use std::{
    io,
    ops::ControlFlow,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;
use windlass_domain::{Timestamp, id::CallId};

pub use entry::{CallFilter, CallSummary, JournaledCall, OUTCOME_OK};

use crate::call::{CallRecord, CallSink};
use segment::Segment;

/// Bytes of lines that one page reads at most: a page of a rare kind may have fewer calls than asked for, and a next one.
const PAGE_SCAN_BYTES: u64 = 256 * 1024 * 1024;

/// How the journal is kept.
#[derive(Clone)]
pub struct JournalSettings {
    /// Where; made with mode 0700.
    pub dir: PathBuf,
    /// Older calls are dropped. Default 7 days.
    pub max_age: Duration,
    /// The oldest calls are dropped beyond this size of all files, in bytes. Default 512 MiB.
    pub max_bytes: u64,
    /// Calls that wait to be written. Default 8,192.
    pub queue_calls: usize,
    /// Their bytes. Default 64 MiB.
    pub queue_bytes: usize,
    /// A batch is written when it is so old. Default 200 ms.
    pub batch_time: Duration,
    /// Or so large, in bytes. Default 1 MiB.
    pub batch_bytes: usize,
    /// A file is closed at this size, in bytes. Default 4 MiB.
    pub file_bytes: u64,
    /// Or at this age. Default 1 hour.
    pub file_time: Duration,
    /// The clock.
    pub now: fn() -> Timestamp,
    /// A UUIDv7 larger than all before it.
    pub new_id: fn() -> Uuid,
}

impl JournalSettings {
    /// The defaults.
    #[must_use]
    pub fn new(dir: PathBuf, now: fn() -> Timestamp, new_id: fn() -> Uuid) -> Self {
        const MIB: u64 = 1024 * 1024;
        Self {
            dir,
            max_age: Duration::from_secs(7 * 24 * 3600),
            max_bytes: 512 * MIB,
            queue_calls: 8192,
            queue_bytes: 64 * 1024 * 1024,
            batch_time: Duration::from_millis(200),
            batch_bytes: 1024 * 1024,
            file_bytes: 4 * MIB,
            file_time: Duration::from_secs(3600),
            now,
            new_id,
        }
    }
}

/// Why the journal could not be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Its directory cannot be used.
    #[error(
        "the call journal in {} cannot be used: check that this user may write there", path.display()
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It cannot be read.
    #[error("the call journal cannot be read")]
    Read(#[source] io::Error),
}

/// What the journal holds and what it lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct JournalState {
    /// Calls that can be read now.
    pub calls: u64,
    /// Size of its files, in bytes.
    pub bytes: u64,
    /// When the oldest of its calls ended.
    pub oldest: Option<Timestamp>,
    /// Calls written since the server started.
    pub written: u64,
    /// Calls since the server started that are not in it, because the queue was full or the disk refused them.
    pub dropped: u64,
    /// Older calls are dropped, in seconds.
    pub max_age_s: u64,
    /// The oldest calls are dropped beyond this size, in bytes.
    pub max_bytes: u64,
}

/// A page of calls, newest first.
#[derive(Debug, Clone, PartialEq)]
pub struct CallPage {
    /// The calls.
    pub items: Vec<CallSummary>,
    /// Older calls are found below this one; `None`: there are none.
    pub next: Option<CallId>,
}

/// The journal of one server. Dropping it ends the writer after what is queued; [`Journal::close`] waits for that.
pub struct Journal {
    shared: Arc<Shared>,
    queue: SyncSender<Message>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    settings: JournalSettings,
    /// Oldest first; the last may be the one that is written to.
    segments: RwLock<Vec<Arc<Segment>>>,
    queued_bytes: AtomicUsize,
    written: AtomicU64,
    dropped: AtomicU64,
}

enum Message {
    Call(Timestamp, Arc<CallRecord>),
    /// Answered when everything before it is written.
    Flush(oneshot::Sender<()>),
    /// The last.
    Stop,
}

impl Journal {
    /// Opens the journal of a directory, and starts its writer.
    ///
    /// # Errors
    /// When the directory cannot be used. A damaged file is no error: what can be read of it is kept.
    pub fn open(settings: JournalSettings) -> Result<Self, JournalError> {
        let failed = |source| JournalError::Directory {
            path: settings.dir.clone(),
            source,
        };
        segment::make_directory(&settings.dir).map_err(failed)?;
        let segments = segment::open_all(&settings.dir).map_err(failed)?;
        let (queue, messages) = sync_channel(settings.queue_calls.max(1));
        let shared = Arc::new(Shared {
            segments: RwLock::new(segments),
            queued_bytes: AtomicUsize::new(0),
            written: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            settings: settings.clone(),
        });
        let writing = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("call-journal".to_owned())
            .spawn(move || writer::Writer::new(writing).run(&messages))
            .map_err(failed)?;
        Ok(Self {
            shared,
            queue,
            writer: Mutex::new(Some(writer)),
        })
    }

    /// A page of the calls that a filter wants, newest first, older than `before`. Calls that ended before this was asked are
    /// among them.
    ///
    /// # Errors
    /// [`JournalError::Read`].
    pub async fn list(
        &self,
        filter: CallFilter,
        before: Option<CallId>,
        limit: usize,
    ) -> Result<CallPage, JournalError> {
        self.flushed().await;
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            let mut items = Vec::new();
            let mut next = None;
            let stopped_at = shared.walk(&filter, before, PAGE_SCAN_BYTES, |call, _| {
                if items.len() == limit {
                    next = items.last().map(|call: &CallSummary| call.id);
                    return ControlFlow::Break(());
                }
                items.push(call);
                ControlFlow::Continue(())
            })?;
            Ok(CallPage {
                items,
                next: next.or(stopped_at),
            })
        })
        .await
    }

    /// One call, if it is still there.
    ///
    /// # Errors
    /// [`JournalError::Read`].
    pub async fn get(&self, id: CallId) -> Result<Option<JournaledCall>, JournalError> {
        self.flushed().await;
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            for segment in shared.snapshot() {
                for frame in &segment.frames {
                    if !(frame.head.first..=frame.head.last).contains(&id) {
                        continue;
                    }
                    for line in lines(&segment.body(frame)?) {
                        let summary: CallSummary = serde_json::from_slice(line)?;
                        if summary.id == id {
                            return Ok(Some(serde_json::from_slice(line)?));
                        }
                    }
                }
            }
            Ok(None)
        })
        .await
    }

    /// The newest calls that a filter wants, newest first, at most `limit`, as lines of JSON without their newline. Read as they
    /// are taken from the receiver; dropping it ends the reading.
    pub async fn newest(
        &self,
        filter: CallFilter,
        limit: usize,
    ) -> mpsc::Receiver<Result<Vec<u8>, JournalError>> {
        const READ_AHEAD: usize = 16;
        self.flushed().await;
        let (sender, lines) = mpsc::channel(READ_AHEAD);
        let shared = Arc::clone(&self.shared);
        // Ends with the receiver: it owns the task's only purpose.
        let _reader = tokio::task::spawn_blocking(move || {
            let mut left = limit;
            let walked = shared.walk(&filter, None, u64::MAX, |_, line| {
                if left == 0 {
                    return ControlFlow::Break(());
                }
                left -= 1;
                match sender.blocking_send(Ok(line.to_vec())) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_nobody_reads_on) => ControlFlow::Break(()),
                }
            });
            if let Err(error) = walked
                && sender
                    .blocking_send(Err(JournalError::Read(error)))
                    .is_err()
            {
                tracing::debug!("nobody waits for the journal any more");
            }
        });
        lines
    }

    /// Waits until what ended before is written. Where the queue is full, does not wait.
    pub async fn flushed(&self) {
        let (answer, written) = oneshot::channel();
        if self.queue.try_send(Message::Flush(answer)).is_ok() {
            // An error: the journal is closing, and everything is written.
            let _written_or_closed = written.await;
        }
    }

    /// What it holds and what it lost.
    #[must_use]
    pub fn state(&self) -> JournalState {
        let shared = &self.shared;
        let segments = shared.snapshot();
        let frames = || segments.iter().flat_map(|segment| &segment.frames);
        JournalState {
            calls: frames().map(|frame| frame.head.calls).sum(),
            bytes: segments.iter().map(|segment| segment.bytes).sum(),
            oldest: frames().map(|frame| frame.head.from).min(),
            written: shared.written.load(Ordering::Relaxed),
            dropped: shared.dropped.load(Ordering::Relaxed),
            max_age_s: shared.settings.max_age.as_secs(),
            max_bytes: shared.settings.max_bytes,
        }
    }

    /// Writes what is queued and ends the writer. Later calls are dropped, and counted.
    pub async fn close(&self) {
        let writer = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(writer) = writer else { return };
        let queue = self.queue.clone();
        let ended = tokio::task::spawn_blocking(move || {
            let _told_or_gone = queue.send(Message::Stop);
            writer.join()
        })
        .await;
        if !matches!(ended, Ok(Ok(()))) {
            tracing::error!("the writer of the call journal ended badly");
        }
    }
}

impl CallSink for Journal {
    fn record(&self, record: &Arc<CallRecord>) {
        let shared = &self.shared;
        let weight = entry::weight(record);
        let queued = shared.queued_bytes.fetch_add(weight, Ordering::Relaxed);
        let at = (shared.settings.now)();
        let taken = if queued.saturating_add(weight) > shared.settings.queue_bytes {
            Err(())
        } else {
            match self.queue.try_send(Message::Call(at, Arc::clone(record))) {
                Ok(()) => Ok(()),
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(()),
            }
        };
        if taken.is_err() {
            shared.queued_bytes.fetch_sub(weight, Ordering::Relaxed);
            shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Shared {
    fn snapshot(&self) -> Vec<Arc<Segment>> {
        self.segments
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Calls that ended before are too old.
    fn oldest_kept(&self) -> Timestamp {
        let max_age_ms = i64::try_from(self.settings.max_age.as_millis()).unwrap_or(i64::MAX);
        let now_ms = (self.settings.now)().unix_ms();
        Timestamp::from_unix_ms(now_ms.saturating_sub(max_age_ms).max(0))
    }

    /// Shows the calls that a filter wants, newest first, until `visit` breaks or about `scan_bytes` were read. In the latter case
    /// gives the call below which to go on.
    fn walk(
        &self,
        filter: &CallFilter,
        before: Option<CallId>,
        scan_bytes: u64,
        mut visit: impl FnMut(CallSummary, &[u8]) -> ControlFlow<()>,
    ) -> io::Result<Option<CallId>> {
        let mut scanned = 0;
        // A file is dropped when its youngest call is too old; its older ones are not shown until then.
        let oldest = self.oldest_kept();
        for segment in self.snapshot().iter().rev() {
            for frame in segment.frames.iter().rev() {
                let head = &frame.head;
                if before.is_some_and(|before| head.first >= before)
                    || head.to < oldest
                    || !head.may_hold(filter)
                {
                    continue;
                }
                if scanned > scan_bytes {
                    // Just above this frame: every call of it is older.
                    return Ok(Some(CallId::from_uuid(Uuid::from_u128(
                        head.last.uuid().as_u128().saturating_add(1),
                    ))));
                }
                let body = match segment.body(frame) {
                    Ok(body) => body,
                    Err(error) => {
                        tracing::error!("a frame of the call journal is left out: {error}");
                        continue;
                    }
                };
                scanned += body.len() as u64;
                for line in lines(&body).collect::<Vec<_>>().into_iter().rev() {
                    let call: CallSummary = serde_json::from_slice(line)?;
                    if before.is_none_or(|before| call.id < before)
                        && call.at >= oldest
                        && filter.wants(&call)
                        && visit(call, line).is_break()
                    {
                        return Ok(None);
                    }
                }
            }
        }
        Ok(None)
    }
}

fn lines(body: &[u8]) -> impl Iterator<Item = &[u8]> {
    body.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, JournalError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(JournalError::Read),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests;
