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
    order::OrderState,
    plan::{NodeId, NodeKind},
    progress::{NodeProgress, NodeState},
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
    /// It is under way.
    runs: bool,
    /// Its row at its end.
    ended: Option<NodeProgress>,
    started_at: Option<Timestamp>,
    /// The order is over: an attempt that was not begun never is.
    order_is_over: bool,
}

/// Which attempt of a step is asked for.
#[derive(Debug, Clone, Copy)]
enum Which {
    /// The last one that was begun.
    Last,
    /// The one that runs or comes next; the last one where none does.
    Next,
    /// This one.
    Number(u32),
}

impl Which {
    /// Its number, by the step's row.
    fn of(self, row: &NodeProgress, order: OrderState) -> u32 {
        match self {
            Self::Number(attempt) => attempt,
            Self::Last => row.attempt,
            // Not begun yet, or a person wants it repeated.
            Self::Next if row.state == NodeState::NotStarted && !order.is_terminal() => {
                row.attempt + 1
            }
            Self::Next => row.attempt.max(1),
        }
    }
}

impl Attempt {
    /// An attempt by the step's row, and by its own where it has one.
    fn of(attempt: u32, row: NodeProgress, own: Option<NodeProgress>, order: OrderState) -> Self {
        let attempts = row.attempt;
        let current = (attempts == attempt).then_some(row);
        let runs = current.as_ref().is_some_and(|row| row.state.is_busy());
        let started_at = own.as_ref().or(current.as_ref());
        let started_at = started_at.and_then(|row| row.started_at);
        let over = current.filter(|row| !runs && row.result.is_some());
        Self {
            attempt,
            attempts,
            runs,
            ended: own.or(over),
            started_at,
            order_is_over: order.is_terminal(),
        }
    }

    /// Whether there is such an attempt, or it may be the next one: that can be followed before it begins.
    fn is_known(&self) -> bool {
        let comes = self.attempt == self.attempts.saturating_add(1);
        self.attempt > 0 && (comes || self.runs || self.ended.is_some())
    }
}

impl Orders {
    /// The log of an attempt of a step: the last one unless another is named.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] of the order, the node or the attempt that is named; `not_a_step`.
    pub async fn log(
        &self,
        workspace: &str,
        id: OrderId,
        node: NodeId,
        attempt: Option<u32>,
    ) -> Result<StepLog, ServiceError> {
        let server = self.server_of_step(workspace, id, node).await?;
        let found = self.asked_attempt(id, node, attempt, Which::Last).await?;
        let task = TaskId {
            order: id,
            node,
            attempt: found.attempt,
        };
        let mut log = StepLog {
            node,
            attempt: found.attempt,
            attempts: found.attempts,
            ended: found.ended.is_some() || found.order_is_over,
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

    /// Follows an attempt of a step from an offset on: the one that runs or comes next (the last one where none does), unless
    /// another is named.
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
        let found = self.asked_attempt(id, node, attempt, Which::Next).await?;
        let task = TaskId {
            order: id,
            node,
            attempt: found.attempt,
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

    /// The attempt that is named, which there must be, or another one.
    async fn asked_attempt(
        &self,
        id: OrderId,
        node: NodeId,
        named: Option<u32>,
        otherwise: Which,
    ) -> Result<Attempt, ServiceError> {
        let which = named.map_or(otherwise, Which::Number);
        let found = self.attempt(id, node, which).await?;
        if named.is_some() && !found.is_known() {
            return Err(ServiceError::not_found(
                "attempt of this step",
                found.attempt,
            ));
        }
        Ok(found)
    }

    async fn attempt(
        &self,
        id: OrderId,
        node: NodeId,
        which: Which,
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
        let attempt = which.of(&row, order.state);
        let key = rows::attempt(id, node, attempt);
        let own = rows::read::<NodeProgress>(store, &key, "an attempt of a step")
            .await
            .map_err(unreadable)?
            .map(|(row, _)| row);
        Ok(Attempt::of(attempt, row, own, order.state))
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
            let found = self
                .orders
                .attempt(order, node, Which::Number(attempt))
                .await?;
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
        match rows::head_and_tail(result) {
            Some((head, tail)) => Self {
                head,
                tail,
                tail_at: head.len() as u64 + result.dropped_bytes,
            },
            None => Self {
                head: &result.output,
                tail: "",
                tail_at: result.output.len() as u64,
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

    /// A step's row in its attempt `attempt`.
    fn row(attempt: u32, state: NodeState) -> NodeProgress {
        NodeProgress {
            state,
            attempt,
            result: state.needs_mending().then(|| result("text", 0)),
            ..NodeProgress::default()
        }
    }

    #[test]
    fn the_attempt_that_is_followed_is_the_one_that_runs_or_comes() {
        use NodeState as S;
        let (open, over) = (OrderState::Running, OrderState::Cancelled);
        for (attempts, state, order, last, next) in [
            (0, S::NotStarted, open, 0, 1),
            (1, S::Running, open, 1, 1),
            (1, S::Cancelling, open, 1, 1),
            // Nobody has said that it is repeated.
            (1, S::Failed, open, 1, 1),
            (1, S::Succeeded, open, 1, 1),
            // A retry, or its stage is run again.
            (1, S::NotStarted, open, 1, 2),
            (2, S::Running, open, 2, 2),
            (0, S::NotStarted, over, 0, 1),
            (1, S::NotStarted, over, 1, 1),
        ] {
            let row = row(attempts, state);
            let found = [Which::Last, Which::Next].map(|which| which.of(&row, order));
            assert_eq!(found, [last, next], "{attempts} {state:?} {order:?}");
        }
    }

    #[test]
    fn only_attempts_that_were_or_come_next_are_known() {
        use NodeState as S;
        let own = |attempt| Some(row(attempt, S::Failed));
        for (attempt, row, own, known, ended) in [
            (0, row(0, S::NotStarted), None, false, false),
            (1, row(0, S::NotStarted), None, true, false),
            (2, row(0, S::NotStarted), None, false, false),
            (1, row(1, S::Running), None, true, false),
            (2, row(1, S::Running), None, true, false),
            (7, row(1, S::Running), None, false, false),
            (1, row(1, S::Failed), None, true, true),
            // It waits to be repeated.
            (1, row(1, S::NotStarted), own(1), true, true),
            (1, row(2, S::Running), own(1), true, true),
            // Of it nothing was kept.
            (1, row(1, S::NotStarted), None, false, false),
            (1, row(2, S::Running), None, false, false),
            (u32::MAX, row(2, S::Running), None, false, false),
        ] {
            let shown = format!("{attempt} of {} {:?}", row.attempt, row.state);
            let found = Attempt::of(attempt, row, own, OrderState::Running);
            assert_eq!(
                (found.is_known(), found.ended.is_some()),
                (known, ended),
                "{shown}"
            );
        }
    }

    #[test]
    fn a_log_whose_row_was_cut_keeps_its_places() {
        let json = "{\"level\":\"info\",\"a\":\"b\"}\n";
        let long = rows::tests::log_of(json, 12_288, 1_000_000, 12_224);
        let row = NodeProgress {
            result: Some(long),
            ..NodeProgress::default()
        };
        let kept: NodeProgress = serde_json::from_slice(&rows::encode_node(&row)).unwrap();
        let cut = kept.result.unwrap();
        let kept = Kept::of(&cut);
        assert_eq!(kept.total(), 12_288 + 1_000_000 + 12_224);
        // Whoever has seen all that is left of the head gets the tail, at its place, with the gap.
        let seen = kept.head.len() as u64;
        assert!(seen > 0 && seen < 12_288, "{seen}");
        let rest = kept.beyond(seen).unwrap();
        assert_eq!(rest.offset - seen, cut.dropped_bytes);
        assert_eq!(rest.end(), kept.total());
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
