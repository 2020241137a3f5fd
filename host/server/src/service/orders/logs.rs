//! Logs of steps: each attempt's output, live while it runs and as it is kept later.
//!
//! Live pieces come from memory ([`crate::engine::live`]); what was missed of them, and everything later, comes from the
//! step's result, which holds the head and the tail of the output. Whoever follows reads at their own speed.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use windlass_domain::{
    Timestamp,
    id::{OrderId, ServerId},
    plan::{NodeId, NodeKind},
    progress::NodeProgress,
    task::{Outcome, TaskId, TaskResult},
};
use windlass_store::Watch;

use super::{Orders, failed, no_such_order};
use crate::{
    engine::{
        self,
        live::{LiveOutput, Piece},
        rows,
    },
    service::ServiceError,
};

/// The log of one attempt of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct StepLog {
    /// The step.
    pub node: NodeId,
    /// Which attempt, from 1; 0: none was begun.
    pub attempt: u32,
    /// Attempts so far.
    pub attempts: u32,
    /// Whether it is over: then nothing is added any more.
    pub ended: bool,
    /// Standard output and error. Of an attempt that is over at most 24 KiB, head and tail with a line between them that
    /// says what was dropped; of one that runs what was sent lately. Secrets are masked.
    pub output: String,
    /// Where `output` begins: bytes of the output before it.
    pub offset: u64,
    /// Where a live view goes on: give it as `offset`.
    pub next_offset: u64,
    /// Bytes that are not in `output`.
    pub dropped_bytes: u64,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// The main process's exit code, where there was one.
    pub exit_code: Option<i32>,
    /// What happened, for people.
    pub message: String,
    /// When it started.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}

/// What a follower of a log gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LogPiece {
    /// Bytes of the output before it.
    pub offset: u64,
    /// Where the next piece begins, unless something is dropped between them.
    pub next_offset: u64,
    /// Bytes that came before it and cannot be shown any more.
    pub dropped_bytes: u64,
    /// The text.
    pub text: String,
}

/// How a followed attempt ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LogEnd {
    /// Which attempt.
    pub attempt: u32,
    /// Attempts so far: more than `attempt` where the step was repeated.
    pub attempts: u32,
    /// How it ended; absent: it was not begun, and the order is over.
    pub outcome: Option<Outcome>,
    /// The main process's exit code, where there was one.
    pub exit_code: Option<i32>,
    /// What happened, for people.
    pub message: String,
}

/// News of a followed attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogNews {
    /// Output.
    Piece(LogPiece),
    /// The end; nothing follows.
    End(LogEnd),
}

/// One follower of one attempt.
pub struct LogFollower {
    orders: Orders,
    live: LiveOutput,
    server: ServerId,
    task: TaskId,
    offset: u64,
    grown: Arc<Notify>,
    events: Watch,
    ended: bool,
}

/// Where one attempt is.
struct Attempt {
    attempt: u32,
    attempts: u32,
    /// Its row at its end.
    ended: Option<NodeProgress>,
    started_at: Option<Timestamp>,
    /// The order is over: an attempt that was not begun never is.
    order_is_over: bool,
}

impl Orders {
    /// The log of an attempt of a step: the last one unless another is named.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] of the order, the node or the attempt; `not_a_step`.
    pub async fn log(
        &self,
        workspace: &str,
        id: OrderId,
        node: NodeId,
        attempt: Option<u32>,
    ) -> Result<StepLog, ServiceError> {
        let server = self.server_of_step(workspace, id, node).await?;
        let found = self.attempt(id, node, attempt).await?;
        let task = TaskId {
            order: id,
            node,
            attempt: found.attempt,
        };
        let mut log = StepLog {
            node,
            attempt: found.attempt,
            attempts: found.attempts,
            ended: found.ended.is_some(),
            output: String::new(),
            offset: 0,
            next_offset: 0,
            dropped_bytes: 0,
            outcome: None,
            exit_code: None,
            message: String::new(),
            started_at: found.started_at,
            finished_at: None,
        };
        match found.ended {
            Some(row) => {
                log.finished_at = row.finished_at;
                log.message = row.message;
                if let Some(result) = row.result {
                    log.next_offset = Kept::of(&result).total();
                    log.outcome = Some(result.outcome);
                    log.exit_code = result.exit_code;
                    log.output = result.output;
                    log.dropped_bytes = result.dropped_bytes;
                }
            }
            None => {
                let pieces = self.engine.shared.live.read(server, task, 0);
                log.offset = pieces.first().map_or(0, |piece| piece.offset);
                log.next_offset = pieces.last().map_or(0, Piece::end);
                log.output = pieces.into_iter().map(|piece| piece.text).collect();
                let shown = log.output.len() as u64;
                log.dropped_bytes = log.next_offset.saturating_sub(shown);
            }
        }
        Ok(log)
    }

    /// Follows an attempt of a step from an offset on: the one that runs or comes next, unless another is named.
    ///
    /// # Errors
    /// As [`Orders::log`].
    pub async fn follow_log(
        &self,
        workspace: &str,
        id: OrderId,
        node: NodeId,
        attempt: Option<u32>,
        offset: u64,
    ) -> Result<LogFollower, ServiceError> {
        let server = self.server_of_step(workspace, id, node).await?;
        let events = self.watch(id).await?;
        let attempt = match attempt {
            Some(attempt) => attempt,
            None => self.attempt(id, node, None).await?.attempt.max(1),
        };
        let task = TaskId {
            order: id,
            node,
            attempt,
        };
        let live = self.engine.shared.live.clone();
        Ok(LogFollower {
            orders: self.clone(),
            server,
            task,
            offset,
            grown: live.watch(server, task),
            live,
            events,
            ended: false,
        })
    }

    /// The server of a step of an order of this workspace.
    async fn server_of_step(
        &self,
        workspace: &str,
        id: OrderId,
        node: NodeId,
    ) -> Result<ServerId, ServiceError> {
        let (order, _) = self.get(workspace, id).await?;
        let plan = engine::load_plan(&self.engine.shared.blobs, order.plan)
            .await
            .map_err(|error| failed("read the plan", error))?;
        let Some(index) = plan.index_of(node) else {
            return Err(ServiceError::not_found("node of this order", node));
        };
        let planned = &plan.nodes[index as usize];
        match (
            &planned.kind,
            windlass_domain::dispatch::unit_of(&plan, index),
        ) {
            (NodeKind::Step { .. }, Some((_, _, unit))) => Ok(unit.server),
            (
                NodeKind::Step { .. }
                | NodeKind::Sequence
                | NodeKind::Parallel { .. }
                | NodeKind::Unit { .. }
                | NodeKind::Traffic(_)
                | NodeKind::Gate { .. }
                | NodeKind::Pause { .. }
                | NodeKind::Judge { .. },
                _,
            ) => Err(ServiceError::conflict(
                "not_a_step",
                format!("node {node} (`{}`) is no step: it has no log", planned.name),
                "name a node of the kind `step`",
            )),
        }
    }

    async fn attempt(
        &self,
        id: OrderId,
        node: NodeId,
        wanted: Option<u32>,
    ) -> Result<Attempt, ServiceError> {
        let store = &*self.engine.shared.store;
        let unreadable = |error| failed("read a step's row", error);
        let (order, _) = rows::read_order(store, id)
            .await
            .map_err(unreadable)?
            .ok_or_else(|| no_such_order(id))?;
        let row = rows::read::<NodeProgress>(store, &rows::node(id, node), "a node's progress")
            .await
            .map_err(unreadable)?
            .map(|(row, _)| row)
            .unwrap_or_default();
        let attempt = wanted.unwrap_or(row.attempt);
        let key = rows::attempt(id, node, attempt);
        let earlier = rows::read::<NodeProgress>(store, &key, "an attempt of a step")
            .await
            .map_err(unreadable)?;
        let over = row.attempt == attempt && !row.state.is_busy() && row.result.is_some();
        let started_at = match &earlier {
            Some((earlier, _)) => earlier.started_at,
            None => row.started_at.filter(|_| row.attempt == attempt),
        };
        let attempts = row.attempt;
        let ended = earlier
            .map(|(earlier, _)| earlier)
            .or_else(|| over.then_some(row));
        Ok(Attempt {
            attempt,
            attempts,
            ended,
            started_at,
            order_is_over: order.state.is_terminal(),
        })
    }
}

impl LogFollower {
    /// The next news; waits for them. `None` after the end.
    ///
    /// # Errors
    /// [`ServiceError`] when a row cannot be read.
    pub async fn next(&mut self) -> Result<Option<LogNews>, ServiceError> {
        while !self.ended {
            let grown = self.grown.clone();
            let grown = grown.notified();
            tokio::pin!(grown);
            // Waits from here on, before anything is read.
            grown.as_mut().enable();
            if let Some(piece) = self.live_piece() {
                return Ok(Some(LogNews::Piece(piece)));
            }
            let TaskId {
                order,
                node,
                attempt,
            } = self.task;
            let found = self.orders.attempt(order, node, Some(attempt)).await?;
            if let Some(row) = &found.ended {
                // What the agent sent last may have come after its result.
                if let Some(piece) = self.live_piece() {
                    return Ok(Some(LogNews::Piece(piece)));
                }
                let rest = row.result.as_ref().and_then(|result| self.rest(result));
                if let Some(piece) = rest {
                    return Ok(Some(LogNews::Piece(piece)));
                }
            }
            if found.ended.is_some() || found.order_is_over || found.attempts > attempt {
                self.ended = true;
                return Ok(Some(LogNews::End(end_of(&found))));
            }
            tokio::select! {
                () = grown => {}
                event = self.events.next() => {
                    // Too far behind, or the store closes: a new watch, or the error of it, tells.
                    if event.is_err() {
                        self.events = self.orders.watch(order).await?;
                    }
                }
            }
        }
        Ok(None)
    }

    /// The next piece that is kept in memory.
    fn live_piece(&mut self) -> Option<LogPiece> {
        let piece = self
            .live
            .read(self.server, self.task, self.offset)
            .into_iter()
            .next()?;
        Some(self.give(piece))
    }

    /// What a result holds beyond what was given.
    fn rest(&mut self, result: &TaskResult) -> Option<LogPiece> {
        let piece = Kept::of(result).beyond(self.offset)?;
        Some(self.give(piece))
    }

    fn give(&mut self, piece: Piece) -> LogPiece {
        let dropped_bytes = piece.offset.saturating_sub(self.offset);
        self.offset = piece.end();
        LogPiece {
            offset: piece.offset,
            next_offset: self.offset,
            dropped_bytes,
            text: piece.text,
        }
    }
}

fn end_of(found: &Attempt) -> LogEnd {
    let row = found.ended.as_ref();
    let result = row.and_then(|row| row.result.as_ref());
    LogEnd {
        attempt: found.attempt,
        attempts: found.attempts,
        outcome: result.map(|result| result.outcome),
        exit_code: result.and_then(|result| result.exit_code),
        message: row.map_or_else(String::new, |row| row.message.clone()),
    }
}

/// A kept output, by where its parts stood in the whole one.
struct Kept<'a> {
    head: &'a str,
    tail: &'a str,
    tail_at: u64,
}

impl<'a> Kept<'a> {
    fn of(result: &'a TaskResult) -> Self {
        let marker = format!("\n[… {} bytes dropped …]\n", result.dropped_bytes);
        let whole = result.output.as_str();
        match whole.split_once(&marker) {
            Some((head, tail)) if result.dropped_bytes > 0 => Self {
                head,
                tail,
                tail_at: head.len() as u64 + result.dropped_bytes,
            },
            Some(_) | None => Self {
                head: whole,
                tail: "",
                tail_at: whole.len() as u64,
            },
        }
    }

    /// Bytes of the whole output.
    fn total(&self) -> u64 {
        self.tail_at + self.tail.len() as u64
    }

    /// The first part from an offset on.
    fn beyond(&self, offset: u64) -> Option<Piece> {
        for (at, text) in [(0, self.head), (self.tail_at, self.tail)] {
            let skip = usize::try_from(offset.saturating_sub(at)).unwrap_or(usize::MAX);
            if let Some(from) = (skip..text.len()).find(|from| text.is_char_boundary(*from)) {
                return Some(Piece {
                    offset: at + from as u64,
                    text: text[from..].to_owned(),
                });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(output: &str, dropped_bytes: u64) -> TaskResult {
        TaskResult {
            outcome: Outcome::Succeeded,
            exit_code: Some(0),
            output: output.to_owned(),
            dropped_bytes,
            message: String::new(),
            fault: None,
            started_at: None,
            finished_at: Timestamp::from_unix_ms(0),
        }
    }

    #[test]
    fn what_is_kept_is_found_by_its_place_in_the_whole() {
        let short = result("hello", 0);
        let kept = Kept::of(&short);
        assert_eq!(kept.total(), 5);
        for (offset, expect) in [
            (0, Some((0, "hello"))),
            (3, Some((3, "lo"))),
            (5, None),
            (9, None),
        ] {
            let found = kept.beyond(offset);
            let found = found
                .as_ref()
                .map(|piece| (piece.offset, piece.text.as_str()));
            assert_eq!(found, expect, "{offset}");
        }
        let cut = result("head\n[… 100 bytes dropped …]\ntail", 100);
        let kept = Kept::of(&cut);
        assert_eq!(kept.total(), 108);
        for (offset, expect) in [
            (0, Some((0, "head"))),
            (4, Some((104, "tail"))),
            (50, Some((104, "tail"))),
            (106, Some((106, "il"))),
            (108, None),
        ] {
            let found = kept.beyond(offset);
            let found = found
                .as_ref()
                .map(|piece| (piece.offset, piece.text.as_str()));
            assert_eq!(found, expect, "{offset}");
        }
    }
}
