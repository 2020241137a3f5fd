//! One commit in the making: what the events of a fold changed.
//!
//! Owns how changes become rows, and how full a transaction may get. It performs nothing.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use tokio::sync::oneshot;
use windlass_domain::{
    id::{InstanceId, ServerId},
    inbox::InboxEntry,
    manifest::Manifest,
    order::OrderEvent,
    plan::NodeIndex,
    progress::NodeProgress,
    reducer::Effect,
};
use windlass_store::{Key, Txn};

use super::{ActError, actor::Revise};

/// Another event is folded in while the transaction has at most so many operations: the largest event adds fewer than the
/// rest, see [`windlass_domain::reducer::TURN_BUDGET`].
pub(crate) const FOLD_OPERATIONS: usize = 80;
/// And at most so many bytes.
pub(crate) const FOLD_BYTES: usize = 512 * 1024;

/// What becomes of an inbox slot.
#[derive(Debug, Clone)]
pub(crate) enum SlotChange {
    /// A new task takes the slot.
    Put(Box<InboxEntry>),
    /// The task in it is to be ended. Keeps what the gateway has stamped.
    Revoke,
    /// Its task is over.
    Delete,
}

/// Who waits for the commit.
pub(crate) type Reply = oneshot::Sender<Result<(), ActError>>;

#[derive(Default)]
pub(crate) struct Batch {
    /// Rows that changed.
    pub(crate) nodes: BTreeSet<NodeIndex>,
    /// Slots by server and unit.
    pub(crate) slots: BTreeMap<(ServerId, u32), SlotChange>,
    /// Manifests that were activated.
    pub(crate) installs: Vec<(InstanceId, ServerId, Manifest)>,
    /// Attempts that ended without success, as their steps' rows were at that moment.
    pub(crate) attempts: Vec<(NodeIndex, NodeProgress)>,
    pub(crate) events: Vec<OrderEvent>,
    /// What people are to be told: rows.
    pub(crate) notices: Vec<(Key, Bytes)>,
    /// Revisions of the plan: rows.
    pub(crate) revisions: Vec<(Key, Bytes)>,
    /// A revision that is asked for: it is made when this is committed. Nodes are indices of one revision in a batch.
    pub(crate) revise: Option<Box<Revise>>,
    pub(crate) effects: Vec<Effect>,
    /// What callers commit together with their event.
    pub(crate) with: Vec<Txn>,
    /// Who waits for it.
    pub(crate) replies: Vec<(Reply, Result<(), ActError>)>,
    /// Whether the header changed although no row did.
    pub(crate) header: bool,
    /// Whether the order is in another state than before: its row in the list follows.
    pub(crate) state_changed: bool,
    /// Whether the reducer has more to do.
    pub(crate) more: bool,
    /// Bytes of results and scripts so far, roughly.
    pub(crate) bytes: usize,
}

impl Batch {
    /// Whether one more event fits.
    pub(crate) fn has_room(&self) -> bool {
        let with: usize = self.with.iter().map(|txn| txn.operations().len()).sum();
        let rows = self.nodes.len() + self.slots.len() + self.installs.len() + self.attempts.len();
        rows + with <= FOLD_OPERATIONS && self.bytes <= FOLD_BYTES && self.revise.is_none()
    }

    /// Whether there is anything to commit.
    pub(crate) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
            && self.slots.is_empty()
            && self.events.is_empty()
            && self.with.is_empty()
            && !self.header
    }
}

/// The events of one commit as row values, split where they would be too large for one: `(first sequence number, value)`.
pub(crate) fn event_rows(events: &[OrderEvent]) -> Vec<(u64, Bytes)> {
    const MAX_BYTES: usize = 30 * 1024;
    let mut rows = Vec::new();
    let mut start = 0;
    while start < events.len() {
        let mut end = events.len();
        let mut bytes = super::rows::encode(&&events[start..end]);
        while bytes.len() > MAX_BYTES && end - start > 1 {
            end = start + (end - start) / 2;
            bytes = super::rows::encode(&&events[start..end]);
        }
        rows.push((events[start].seq, bytes));
        start = end;
    }
    rows
}
