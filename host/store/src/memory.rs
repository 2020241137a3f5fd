//! A store in memory, for tests: the commit path, limits, leases and watches of the others, nothing on disk.
//! What it holds is gone when it is dropped. Works with tokio's paused clock.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;

use crate::Store;
use crate::embedded::{
    Direction, Embedded, EmbeddedOptions, RowWrite, Rows, StoredRow, Visit, Writer,
};
use crate::error::StoreError;
use crate::trace::CommitTrace;
use crate::txn::Revision;
use crate::watch::RingLimits;

/// Settings of a store in memory.
#[derive(Clone, Default)]
pub struct MemoryOptions {
    /// Bounds of what watches can look back to.
    pub ring: RingLimits,
    /// Called along the commit path; for tests.
    pub trace: Option<Arc<dyn CommitTrace>>,
}

/// An empty store in memory. Must be called in a tokio runtime.
///
/// # Errors
/// [`StoreError`] when the machine has no resources left.
pub fn open(options: MemoryOptions) -> Result<Arc<dyn Store>, StoreError> {
    let store: Arc<dyn Store> = Embedded::start(
        MemoryRows::default(),
        Writer::Caller,
        EmbeddedOptions {
            ring: options.ring,
            trace: options.trace,
        },
    )?;
    Ok(store)
}

#[derive(Default)]
struct MemoryRows {
    rows: RwLock<BTreeMap<Bytes, StoredRow>>,
    closed: AtomicBool,
}

impl MemoryRows {
    fn check_open(&self) -> Result<(), StoreError> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(StoreError::Closed);
        }
        Ok(())
    }
}

impl Rows for MemoryRows {
    fn get(&self, key: &[u8]) -> Result<Option<StoredRow>, StoreError> {
        self.check_open()?;
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        Ok(rows.get(key).cloned())
    }

    fn revision_of(&self, key: &[u8]) -> Result<Option<Revision>, StoreError> {
        Ok(self.get(key)?.map(|row| row.revision))
    }

    fn visit(
        &self,
        start: Bound<&[u8]>,
        end: Bound<&[u8]>,
        direction: Direction,
        visitor: &mut dyn FnMut(Bytes, StoredRow) -> Visit,
    ) -> Result<(), StoreError> {
        self.check_open()?;
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        let range = rows.range::<[u8], _>((start, end));
        let mut each = |(key, row): (&Bytes, &StoredRow)| visitor(key.clone(), row.clone());
        match direction {
            Direction::Rising => {
                for pair in range {
                    if each(pair) == Visit::Stop {
                        break;
                    }
                }
            }
            Direction::Falling => {
                for pair in range.rev() {
                    if each(pair) == Visit::Stop {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    fn apply(&self, transactions: &[Vec<RowWrite>]) -> Result<(), StoreError> {
        self.check_open()?;
        let mut rows = self.rows.write().unwrap_or_else(PoisonError::into_inner);
        for write in transactions.iter().flatten() {
            match &write.row {
                Some(row) => rows.insert(write.key.clone(), row.clone()),
                None => rows.remove(&write.key),
            };
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.check_open()
    }

    fn close(&self, _ended_at: Option<Revision>) -> Result<(), StoreError> {
        self.closed.store(true, Ordering::SeqCst);
        Ok(())
    }
}
