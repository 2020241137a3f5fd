//! Removing many rows: the primitives of retention. Policies (what is kept, and for how long) stand above.
//!
//! Everything is done in commits within the limits of a transaction, so a crash leaves it half done; doing it again
//! does the rest.

use crate::error::{CommitError, StoreError};
use crate::key::{Key, Prefix};
use crate::txn::{TXN_MAX_OPERATIONS, Txn};
use crate::{Entry, Store};

/// What [`prune`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pruned {
    pub deleted: u64,
    /// Rows that were to go but changed meanwhile; they stay.
    pub changed: u64,
}

/// Deletes every row of a prefix and returns how many there were. Rows that are added meanwhile may be deleted too:
/// what forbids adding them must be committed before.
///
/// # Errors
/// Those of the store.
pub async fn delete_prefix(store: &dyn Store, prefix: &Prefix) -> Result<u64, CommitError> {
    let mut deleted = 0;
    let mut after: Option<Key> = None;
    loop {
        let page = store
            .scan(prefix, after.as_ref(), TXN_MAX_OPERATIONS)
            .await?;
        let Some(last) = page.entries.last().map(|entry| entry.key.clone()) else {
            return Ok(deleted);
        };
        let mut txn = Txn::new();
        for entry in page.entries {
            txn = txn.delete(entry.key);
            deleted += 1;
        }
        store.commit(txn).await?;
        if !page.more {
            return Ok(deleted);
        }
        after = Some(last);
    }
}

/// Deletes rows of a prefix, except the `keep_newest` with the highest keys (keys that begin with a time or a
/// sequence sort by age), where `is_expired` says so. A row that changes between being looked at and being deleted
/// stays.
///
/// # Errors
/// Those of the store.
pub async fn prune(
    store: &dyn Store,
    prefix: &Prefix,
    keep_newest: usize,
    mut is_expired: impl FnMut(&Entry) -> bool + Send,
) -> Result<Pruned, StoreError> {
    let mut pruned = Pruned::default();
    let mut kept = 0;
    let mut before: Option<Key> = None;
    loop {
        let page = store
            .scan_reverse(prefix, before.as_ref(), TXN_MAX_OPERATIONS)
            .await?;
        let Some(last) = page.entries.last().map(|entry| entry.key.clone()) else {
            return Ok(pruned);
        };
        let mut going = Vec::new();
        for entry in page.entries {
            if kept < keep_newest {
                kept += 1;
            } else if is_expired(&entry) {
                going.push(entry);
            }
        }
        delete_unchanged(store, going, &mut pruned).await?;
        if !page.more {
            return Ok(pruned);
        }
        before = Some(last);
    }
}

async fn delete_unchanged(
    store: &dyn Store,
    mut rows: Vec<Entry>,
    pruned: &mut Pruned,
) -> Result<(), StoreError> {
    while !rows.is_empty() {
        let mut txn = Txn::new();
        for row in &rows {
            txn = txn
                .revision_is(row.key.clone(), row.revision)
                .delete(row.key.clone());
        }
        match store.commit(txn).await {
            Ok(_) => {
                pruned.deleted += rows.len() as u64;
                return Ok(());
            }
            Err(CommitError::Conflict { key, .. }) => {
                pruned.changed += 1;
                rows.retain(|row| row.key != key);
            }
            Err(CommitError::Limit(error)) => return Err(error.into()),
            Err(CommitError::LeaseOver { lease }) => return Err(StoreError::LeaseOver { lease }),
            Err(CommitError::Store(error)) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, MemoryOptions};
    use crate::sortable;

    async fn filled(rows: u64) -> std::sync::Arc<dyn Store> {
        let store = memory::open(MemoryOptions::default()).unwrap();
        for number in 0..rows {
            let key = Key::from_segments(["t", "event", &sortable(number)]).unwrap();
            let txn = Txn::new().put(key, number.to_string());
            store.commit(txn).await.unwrap();
        }
        let other = Key::from_segments(["t", "eventful"]).unwrap();
        store.commit(Txn::new().put(other, "x")).await.unwrap();
        store
    }

    async fn left(store: &dyn Store) -> Vec<String> {
        let page = store.scan(&Prefix::everything(), None, 1000).await.unwrap();
        page.entries
            .iter()
            .map(|entry| String::from_utf8(entry.value.to_vec()).unwrap())
            .collect()
    }

    #[tokio::test]
    async fn a_prefix_goes_in_chunks() {
        let store = filled(300).await;
        let prefix = Prefix::from_segments(["t", "event"]).unwrap();
        assert_eq!(delete_prefix(&*store, &prefix).await.unwrap(), 300);
        assert_eq!(left(&*store).await, ["x"]);
        assert_eq!(delete_prefix(&*store, &prefix).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn the_newest_and_the_young_stay() {
        let store = filled(300).await;
        let prefix = Prefix::from_segments(["t", "event"]).unwrap();
        let is_odd = |entry: &Entry| entry.value.last().is_some_and(|digit| digit % 2 == 1);
        let pruned = prune(&*store, &prefix, 290, is_odd).await.unwrap();
        assert_eq!(
            pruned,
            Pruned {
                deleted: 5,
                changed: 0
            }
        );
        let left = left(&*store).await;
        assert_eq!(left[..6], ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(left.len(), 296);
    }

    #[tokio::test]
    async fn a_row_that_changed_stays() {
        let store = filled(4).await;
        let prefix = Prefix::from_segments(["t", "event"]).unwrap();
        let page = store.scan(&prefix, None, 10).await.unwrap();
        let changed = page.entries[2].key.clone();
        store.commit(Txn::new().put(changed, "new")).await.unwrap();
        let mut pruned = Pruned::default();
        delete_unchanged(&*store, page.entries, &mut pruned)
            .await
            .unwrap();
        assert_eq!(
            pruned,
            Pruned {
                deleted: 3,
                changed: 1
            }
        );
        assert_eq!(left(&*store).await, ["new", "x"]);
    }
}
