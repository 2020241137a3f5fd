//! The live output of steps that run: what agents sent lately, kept in memory for those who look on.
//!
//! Nobody waits for anybody: an agent's piece is taken or pushes out older ones, a reader takes what is still there and sees
//! how much it missed. What counts of an output is in the step's result; nothing here is durable, and a step whose output was
//! pushed out loses nothing but its live view.
//!
//! | limit | what happens beyond it |
//! | --- | --- |
//! | [`TASK_BYTES`] of one step | its oldest pieces go |
//! | [`SERVER_BYTES`] of one server | its step that was quiet for longest goes: no agent can push out the output of others |
//! | [`ALL_BYTES`] | the step that was quiet for longest goes |

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;
use windlass_domain::{id::ServerId, task::TaskId};
use windlass_protocol::OutputChunk;

/// Kept of one step, in bytes.
pub const TASK_BYTES: usize = 64 * 1024;
/// Kept of all steps of one server, in bytes.
pub const SERVER_BYTES: usize = 1024 * 1024;
/// Kept altogether, in bytes.
pub const ALL_BYTES: usize = 64 * 1024 * 1024;
/// What a step costs beside its text.
const TASK_COST: usize = 256;

/// A piece of an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Bytes of the output before it.
    pub offset: u64,
    /// The text; its end is the next piece's offset unless something was dropped between them.
    pub text: String,
}

impl Piece {
    /// Where it ends.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.text.len() as u64
    }
}

type Key = (ServerId, TaskId);

#[derive(Default)]
struct Output {
    pieces: VecDeque<Piece>,
    /// Of the texts.
    bytes: usize,
    /// Where the last piece ended.
    end: u64,
    /// When it was last written, in the count of writes.
    touched: u64,
}

#[derive(Default)]
struct Inner {
    outputs: HashMap<Key, Output>,
    /// By their last write: the first was quiet for longest.
    by_touch: BTreeMap<u64, Key>,
    of_server: HashMap<ServerId, usize>,
    bytes: usize,
    writes: u64,
    /// Who looks on; gone when nobody else holds it.
    watchers: HashMap<Key, Arc<Notify>>,
}

/// Live output of all steps. Cheap to clone.
#[derive(Clone, Default)]
pub struct LiveOutput {
    inner: Arc<Mutex<Inner>>,
}

impl LiveOutput {
    /// Takes a piece that an agent sent. Never waits for a reader. What was sent before (an agent that restarted reads its
    /// files again) is passed over.
    pub(crate) fn push(&self, server: ServerId, chunk: OutputChunk) {
        let mut inner = self.inner();
        let key = (server, chunk.task_id);
        let end = inner.outputs.get(&key).map_or(0, |output| output.end);
        let Some(piece) = beyond(chunk.offset, chunk.text, end) else {
            return;
        };
        inner.add(key, piece);
        inner.shrink(server);
        let watcher = inner.watchers.get(&key).cloned();
        drop(inner);
        if let Some(watcher) = watcher {
            watcher.notify_waiters();
        }
    }

    /// Pieces from an offset on, as far as they are still kept. Empty: nothing (more) was sent.
    #[must_use]
    pub fn read(&self, server: ServerId, task: TaskId, offset: u64) -> Vec<Piece> {
        let inner = self.inner();
        let Some(output) = inner.outputs.get(&(server, task)) else {
            return Vec::new();
        };
        let pieces = output.pieces.iter();
        pieces
            .filter_map(|piece| beyond(piece.offset, piece.text.clone(), offset))
            .collect()
    }

    /// Wakes when the output of this task grew. Wait for it from before reading, so that nothing is missed.
    #[must_use]
    pub fn watch(&self, server: ServerId, task: TaskId) -> Arc<Notify> {
        let mut inner = self.inner();
        inner
            .watchers
            .retain(|_, watcher| Arc::strong_count(watcher) > 1);
        inner.watchers.entry((server, task)).or_default().clone()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The part of a piece from an offset on; `None`: all of it stands before.
fn beyond(at: u64, text: String, offset: u64) -> Option<Piece> {
    let skip = usize::try_from(offset.saturating_sub(at)).unwrap_or(usize::MAX);
    if text.is_empty() || skip >= text.len() {
        return None;
    }
    let from = (skip..text.len())
        .find(|from| text.is_char_boundary(*from))
        .unwrap_or(text.len());
    Some(Piece {
        offset: at + from as u64,
        text: if from == 0 {
            text
        } else {
            text[from..].to_owned()
        },
    })
    .filter(|piece| !piece.text.is_empty())
}

impl Inner {
    fn add(&mut self, key: Key, piece: Piece) {
        self.writes += 1;
        let writes = self.writes;
        let is_new = !self.outputs.contains_key(&key);
        let output = self.outputs.entry(key).or_default();
        let before = output.bytes;
        if !is_new {
            self.by_touch.remove(&output.touched);
        }
        output.touched = writes;
        output.end = piece.end();
        output.bytes += piece.text.len();
        output.pieces.push_back(piece);
        while output.bytes > TASK_BYTES
            && let Some(oldest) = output.pieces.pop_front()
        {
            output.bytes -= oldest.text.len();
        }
        let after = output.bytes + if is_new { TASK_COST } else { 0 };
        self.by_touch.insert(writes, key);
        let of_server = self.of_server.entry(key.0).or_default();
        *of_server = *of_server + after - before;
        self.bytes = self.bytes + after - before;
    }

    fn shrink(&mut self, server: ServerId) {
        while self.of_server.get(&server).copied().unwrap_or_default() > SERVER_BYTES {
            let mut quiet = self.by_touch.values();
            let Some(key) = quiet.find(|key| key.0 == server).copied() else {
                break;
            };
            self.remove(key);
        }
        while self.bytes > ALL_BYTES {
            let Some(key) = self.by_touch.values().next().copied() else {
                break;
            };
            self.remove(key);
        }
    }

    fn remove(&mut self, key: Key) {
        let Some(output) = self.outputs.remove(&key) else {
            return;
        };
        self.by_touch.remove(&output.touched);
        let size = output.bytes + TASK_COST;
        self.bytes = self.bytes.saturating_sub(size);
        if let Some(of_server) = self.of_server.get_mut(&key.0) {
            *of_server = of_server.saturating_sub(size);
            if *of_server == 0 {
                self.of_server.remove(&key.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use windlass_domain::id::OrderId;

    use super::*;

    fn server(number: u128) -> ServerId {
        ServerId::from_uuid(Uuid::from_u128(number))
    }

    fn task(node: u32) -> TaskId {
        TaskId {
            order: OrderId::from_uuid(Uuid::from_u128(7)),
            node,
            attempt: 1,
        }
    }

    fn chunk(node: u32, offset: u64, text: &str) -> OutputChunk {
        OutputChunk {
            task_id: task(node),
            offset,
            text: text.to_owned(),
            dropped_bytes: 0,
        }
    }

    fn texts(live: &LiveOutput, node: u32, offset: u64) -> Vec<(u64, String)> {
        let pieces = live.read(server(1), task(node), offset);
        pieces
            .into_iter()
            .map(|piece| (piece.offset, piece.text))
            .collect()
    }

    #[test]
    fn what_was_sent_before_is_passed_over_and_gaps_stay_visible() {
        let live = LiveOutput::default();
        for (offset, text) in [
            (0, "one "),
            (4, "two "),
            (0, "one two three"),
            (100, "late"),
        ] {
            live.push(server(1), chunk(1, offset, text));
        }
        let all = [(0, "one "), (4, "two "), (8, "three"), (100, "late")];
        let all: Vec<_> = all.map(|(at, text)| (at, text.to_owned())).into();
        assert_eq!(texts(&live, 1, 0), all);
        assert_eq!(
            texts(&live, 1, 6),
            [(6, "o ".into()), (8, "three".into()), (100, "late".into())]
        );
        assert!(texts(&live, 1, 104).is_empty());
        // Another server cannot speak for this task.
        live.push(server(2), chunk(1, 104, "forged"));
        assert!(texts(&live, 1, 104).is_empty());
    }

    #[test]
    fn characters_are_not_cut() {
        let live = LiveOutput::default();
        live.push(server(1), chunk(1, 0, "aé"));
        assert_eq!(texts(&live, 1, 1), [(1, "é".into())]);
        assert!(texts(&live, 1, 2).is_empty());
    }

    #[test]
    fn memory_is_bounded_by_step_server_and_all() {
        let live = LiveOutput::default();
        let piece = "x".repeat(16 * 1024);
        for number in 0..100_u64 {
            live.push(server(1), chunk(1, number * 16 * 1024, &piece));
        }
        assert_eq!(texts(&live, 1, 0).len(), 4, "the newest 64 KiB");
        live.push(server(2), chunk(9, 0, "kept"));
        for node in 2..200 {
            live.push(server(1), chunk(node, 0, &piece));
        }
        let inner = live.inner();
        assert!(inner.of_server[&server(1)] <= SERVER_BYTES);
        assert_eq!(inner.outputs.len(), inner.by_touch.len());
        assert!(!inner.outputs.contains_key(&(server(1), task(1))));
        assert!(
            inner.outputs.contains_key(&(server(2), task(9))),
            "one server pushes out nobody else"
        );
        let sum: usize = inner
            .outputs
            .values()
            .map(|output| output.bytes + TASK_COST)
            .sum();
        assert_eq!(inner.bytes, sum);
        drop(inner);
        for number in 10..200 {
            for node in 0..70 {
                live.push(server(number), chunk(node, 0, &piece));
            }
        }
        assert!(live.inner().bytes <= ALL_BYTES);
    }
}
