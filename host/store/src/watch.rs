//! Watches: what was committed, in order, from a revision on.
//!
//! Owns [`Watch`], which callers hold, and the in-memory ring that feeds the watches of the embedded back ends
//! after each sync. The ring is bounded by events and by bytes; what falls out of it is answered with
//! [`WatchError::Compacted`], never silently left out. It keeps nothing across a restart.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::Notify;

use crate::error::WatchError;
use crate::key::{Key, Prefix};
use crate::txn::{Revision, Value};

/// One changed row. The events of one transaction share its revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub revision: Revision,
    pub key: Key,
    pub kind: EventKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    Put {
        value: Value,
        /// The row hangs on a lease.
        leased: bool,
    },
    /// Deleted by a transaction or with its lease.
    Deleted,
}

/// Feeds a [`Watch`]; each kind of back end has its own.
#[async_trait]
pub(crate) trait WatchSource: Send {
    /// Waits for events and returns them in order. Returns none only when `through` is given and every event up
    /// to it has been returned. Loses nothing when the future is dropped.
    async fn next_batch(&mut self, through: Option<Revision>) -> Result<Vec<Event>, WatchError>;
}

/// Events of one prefix in the order of their commits.
pub struct Watch {
    source: Box<dyn WatchSource>,
    waiting: VecDeque<Event>,
    /// The revision of the event returned last, and the one before it that was complete.
    current: Revision,
    complete: Revision,
}

impl Watch {
    pub(crate) fn new(source: Box<dyn WatchSource>, from: Revision) -> Self {
        Self {
            source,
            waiting: VecDeque::new(),
            current: from,
            complete: from,
        }
    }

    /// Waits for the next event. Dropping the future loses no event.
    ///
    /// # Errors
    /// [`WatchError::Compacted`] when this watcher was too slow: list again. [`WatchError::Closed`].
    pub async fn next(&mut self) -> Result<Event, WatchError> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Ok(self.returned(event));
            }
            self.waiting = self.source.next_batch(None).await?.into();
        }
    }

    /// The next event up to revision `through`, or `None` when all of them have been returned.
    ///
    /// # Errors
    /// Those of [`Watch::next`].
    pub async fn next_through(&mut self, through: Revision) -> Result<Option<Event>, WatchError> {
        if self.waiting.is_empty() {
            self.waiting = self.source.next_batch(Some(through)).await?.into();
        }
        match self.waiting.pop_front() {
            Some(event) if event.revision <= through => Ok(Some(self.returned(event))),
            Some(event) => {
                self.waiting.push_front(event);
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// Where a later watch may start without missing an event: the last revision of which certainly all events
    /// were returned. The events of a transaction that was being returned come again.
    #[must_use]
    pub fn resume_from(&self) -> Revision {
        self.complete
    }

    fn returned(&mut self, event: Event) -> Event {
        if event.revision > self.current {
            self.complete = self.current;
            self.current = event.revision;
        }
        event
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("current", &self.current)
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

/// Bounds of the ring.
#[derive(Debug, Clone, Copy)]
pub struct RingLimits {
    pub events: usize,
    /// Bytes of keys and values, and a fixed sum for each event.
    pub bytes: usize,
}

impl Default for RingLimits {
    fn default() -> Self {
        Self {
            events: 65_536,
            bytes: 16 * 1024 * 1024,
        }
    }
}

/// What one event costs beside its key and value.
const EVENT_OVERHEAD_BYTES: usize = 128;
/// Most events that one watch takes at a time.
const BATCH_EVENTS: usize = 256;
/// Most events that one watch looks at while it holds the ring.
const BATCH_LOOKS: usize = 4096;

/// The last events of a store.
pub(crate) struct Ring {
    limits: RingLimits,
    state: Mutex<RingState>,
    fed: Notify,
}

struct RingState {
    events: VecDeque<Event>,
    bytes: usize,
    /// How many events were dropped from the front so far: the position of the first one kept.
    dropped: u64,
    /// Every event after this revision and up to `through` is kept.
    floor: Revision,
    /// The ring has been fed up to here.
    through: Revision,
    closed: bool,
}

impl Ring {
    pub(crate) fn new(limits: RingLimits, opened_at: Revision) -> Self {
        Self {
            limits,
            state: Mutex::new(RingState {
                events: VecDeque::new(),
                bytes: 0,
                dropped: 0,
                floor: opened_at,
                through: opened_at,
                closed: false,
            }),
            fed: Notify::new(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, RingState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn feed(&self, events: impl Iterator<Item = Event>, through: Revision) {
        {
            let mut state = self.state();
            for event in events {
                state.bytes += cost(&event);
                state.events.push_back(event);
            }
            while state.events.len() > self.limits.events || state.bytes > self.limits.bytes {
                // A transaction leaves as a whole: a watch must not start in its middle.
                let Some(first) = state.events.front().map(|event| event.revision) else {
                    break;
                };
                while let Some(event) = state.events.front()
                    && event.revision == first
                {
                    state.bytes -= cost(event);
                    state.events.pop_front();
                    state.dropped += 1;
                }
                state.floor = first;
            }
            state.through = through;
        }
        self.fed.notify_waiters();
    }

    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.fed.notify_waiters();
    }

    /// `durable` is the newest revision that anybody can have seen.
    pub(crate) fn watch(
        self: &Arc<Self>,
        prefix: &Prefix,
        from: Revision,
        durable: Revision,
    ) -> Result<Watch, WatchError> {
        let position = {
            let state = self.state();
            if state.closed {
                return Err(WatchError::Closed);
            }
            // A start after the newest revision belongs to another life of this store.
            if from < state.floor || from > durable {
                return Err(WatchError::Compacted {
                    from,
                    oldest: state.floor,
                });
            }
            let index = state.events.partition_point(|event| event.revision <= from);
            state.dropped + index as u64
        };
        let source = RingWatch {
            ring: Arc::clone(self),
            prefix: prefix.clone(),
            position,
            from,
        };
        Ok(Watch::new(Box::new(source), from))
    }
}

fn cost(event: &Event) -> usize {
    EVENT_OVERHEAD_BYTES
        + event.key.as_bytes().len()
        + match &event.kind {
            EventKind::Put { value, .. } => value.len(),
            EventKind::Deleted => 0,
        }
}

struct RingWatch {
    ring: Arc<Ring>,
    prefix: Prefix,
    position: u64,
    from: Revision,
}

enum Look {
    Found(Vec<Event>),
    /// Looked at many, none of this prefix: more are there.
    Again,
    AtEnd {
        through: Revision,
    },
}

impl RingWatch {
    fn look(&mut self) -> Result<Look, WatchError> {
        let state = self.ring.state();
        if self.position < state.dropped {
            return Err(WatchError::Compacted {
                from: self.from,
                oldest: state.floor,
            });
        }
        let start = usize::try_from(self.position - state.dropped).unwrap_or(usize::MAX);
        let mut found = Vec::new();
        for event in state.events.iter().skip(start).take(BATCH_LOOKS) {
            if found.len() == BATCH_EVENTS {
                break;
            }
            self.position += 1;
            if event.revision > self.from && self.prefix.contains(&event.key) {
                found.push(event.clone());
            }
        }
        if !found.is_empty() {
            return Ok(Look::Found(found));
        }
        if self.position < state.dropped + state.events.len() as u64 {
            return Ok(Look::Again);
        }
        if state.closed {
            return Err(WatchError::Closed);
        }
        Ok(Look::AtEnd {
            through: state.through,
        })
    }
}

#[async_trait]
impl WatchSource for RingWatch {
    async fn next_batch(&mut self, through: Option<Revision>) -> Result<Vec<Event>, WatchError> {
        let ring = Arc::clone(&self.ring);
        loop {
            let fed = ring.fed.notified();
            tokio::pin!(fed);
            fed.as_mut().enable();
            match self.look()? {
                Look::Found(events) => return Ok(events),
                Look::Again => tokio::task::yield_now().await,
                Look::AtEnd { through: reached } => {
                    if through.is_some_and(|through| through <= reached) {
                        return Ok(Vec::new());
                    }
                    fed.await;
                }
            }
        }
    }
}
