//! How nodes, and the order as a whole, come to their end.
//!
//! A node that is marked `cancel` starts nothing more; what is under way in it is ended, a bounded number of nodes a turn.
//! A server that was drained, and not changed or healthy with its new release, gets its weight back on the way out; one that
//! was left broken stays without traffic. When all of it is at rest, the shifts of traffic in it are taken back, the latest
//! first. So are those of a stage that is rolled back. (Not when the order rolls back: what its servers get then is the rollback's plan to say.)
//! [`Turn::settle`] runs after every event and finds out whether the order is over or has to be rolled back.

use crate::{
    order::{Control, Ending},
    plan::{NodeIndex, NodeKind, TrafficAction},
    plugin::OnFailure,
    progress::{Admission, NodeState, StageRollback, Undo},
};

use super::{
    Effect, Turn,
    unit::{is_as_before, restore_on_leaving},
};

impl Turn<'_> {
    pub(super) fn end_for_rollback(&mut self) {
        // While a stage is rolled back, what failed waits for a person.
        if self.progress.control == Control::Active
            && self.no_way_back().is_none()
            && self.progress.stage_in_rollback().is_none()
        {
            self.progress.control = Control::EndingForRollback;
            self.change(0, |row| row.cancel = true);
            self.cancel_in(0);
        }
    }

    pub(super) fn end(&mut self, ending: Ending) {
        self.progress.control = Control::Ended(ending);
        self.delta.effects.push(Effect::Finish);
    }

    /// Everything that was marked to be ended, wherever it stands: what an earlier turn had no budget for.
    pub(super) fn sweep(&mut self) {
        let mut index = 0;
        while index < self.end_of(0) {
            let row = self.progress.node(index);
            let ends = row.cancel || matches!(row.rollback, Some(StageRollback::Ending { .. }));
            if ends {
                self.cancel_in(index);
                index = self.end_of(index);
            } else {
                index += 1;
            }
        }
    }

    /// Ends what is under way in a node that is marked to be ended, as far as the budget goes.
    pub(super) fn cancel_in(&mut self, node: NodeIndex) {
        let mut index = node;
        while index < self.end_of(node) {
            if self.budget == 0 {
                self.delta.more = true;
                return;
            }
            let state = self.progress.state(index);
            let row = self.progress.node(index);
            let live = self.progress.live[index as usize].count > 0;
            match &self.plan.nodes[index as usize].kind {
                NodeKind::Sequence | NodeKind::Parallel { .. } => {
                    if state == NodeState::NotStarted && !live {
                        index = self.end_of(index);
                        continue;
                    }
                    // A stage that is rolled back is ended by that mark.
                    if !row.is_ended() && !state.is_settled() {
                        self.mark_cancelled(index);
                    }
                    index += 1;
                }
                NodeKind::Unit { .. } => {
                    let end = self.end_of(index);
                    if live {
                        // Its leaves first: what ends at once makes the way free for its restore.
                        for leaf in index + 1..end {
                            self.cancel_leaf(leaf);
                        }
                    }
                    self.cancel_unit(index);
                    index = end;
                }
                NodeKind::Step { .. }
                | NodeKind::Traffic(_)
                | NodeKind::Gate { .. }
                | NodeKind::Pause { .. }
                | NodeKind::Judge { .. } => {
                    self.cancel_leaf(index);
                    index += 1;
                }
            }
        }
    }

    fn cancel_leaf(&mut self, leaf: NodeIndex) {
        let state = self.progress.state(leaf);
        match &self.plan.nodes[leaf as usize].kind {
            NodeKind::Step { .. } => {
                if state == NodeState::Running {
                    self.budget = self.budget.saturating_sub(1);
                    self.change(leaf, |row| row.state = NodeState::Cancelling);
                    let attempt = self.progress.node(leaf).attempt;
                    self.delta.effects.push(Effect::Revoke {
                        node: leaf,
                        attempt,
                    });
                }
            }
            // A restore gives a healthy or untouched server its weight back: it ends by itself.
            NodeKind::Traffic(TrafficAction::Restore) => {}
            NodeKind::Traffic(
                TrafficAction::Drain { .. }
                | TrafficAction::Set { .. }
                | TrafficAction::Share { .. },
            ) => {
                if state == NodeState::Running {
                    self.budget = self.budget.saturating_sub(1);
                    self.change(leaf, |row| row.state = NodeState::Cancelling);
                }
            }
            NodeKind::Gate { .. } | NodeKind::Pause { .. } | NodeKind::Judge { .. } => {
                if matches!(state, NodeState::Running | NodeState::AwaitingConfirmation) {
                    self.budget = self.budget.saturating_sub(1);
                    let at = self.at;
                    self.change(leaf, |row| {
                        row.state = NodeState::Cancelled;
                        row.finished_at = Some(at);
                    });
                }
            }
            NodeKind::Sequence | NodeKind::Parallel { .. } | NodeKind::Unit { .. } => {}
        }
    }

    /// Ends one server's turn. One that was drained but not changed gets its weight back first.
    fn cancel_unit(&mut self, unit: NodeIndex) {
        let row = self.progress.node(unit);
        let marked = row.cancel;
        if row.ignored || self.progress.state(unit) == NodeState::Succeeded {
            return;
        }
        match row.admission {
            Admission::None => {
                if !row.drift.is_empty() && !marked {
                    self.mark_cancelled(unit);
                }
            }
            Admission::Asked | Admission::Held(_) => {
                self.withdraw(unit);
                if !marked {
                    self.change(unit, |row| row.cancel = true);
                }
            }
            Admission::Admitted => {
                self.leave_unit(unit);
                if !marked {
                    self.mark_cancelled(unit);
                }
            }
        }
    }

    /// Leaves a server whose turn a person ended: it gets its weight back if nothing on it changed or all on it is done, and
    /// is available again when it is as it was.
    pub(super) fn leave_unit(&mut self, unit: NodeIndex) {
        let tally = self.progress.tally(unit);
        let busy = tally.of(NodeState::Running) + tally.of(NodeState::Cancelling) > 0;
        if busy || self.progress.node(unit).admission != Admission::Admitted {
            return;
        }
        if let Some(restore) = restore_on_leaving(self.plan, self.progress, unit) {
            self.start(restore);
        } else if is_as_before(self.plan, self.progress, unit) {
            self.withdraw(unit);
        }
    }

    fn mark_cancelled(&mut self, node: NodeIndex) {
        self.budget = self.budget.saturating_sub(1);
        self.change(node, |row| row.cancel = true);
    }

    /// Takes back the last shift that is left in what was ended and is at rest; says whether there is one. One after the
    /// other: each remembers what the one before it had set.
    pub(super) fn take_shifts_back(&mut self) -> bool {
        // A change by hand is made first: it may be of weights that are to be as they were.
        if self.progress.ended == 0 || self.progress.edit_is_due() {
            return false;
        }
        let left = self.progress.shifts.iter().rev().copied().find(|leaf| {
            let row = self.progress.node(*leaf);
            row.shifted.is_some()
                && row.undo == Undo::None
                && self
                    .progress
                    .first_ended(self.plan, *leaf)
                    .is_some_and(|around| self.progress.is_at_rest(around))
        });
        let Some(leaf) = left else {
            return false;
        };
        if self.budget == 0 {
            self.delta.more = true;
        } else {
            self.start_undo(leaf, String::new());
        }
        true
    }

    /// A new attempt at setting the weights from before a shift.
    pub(super) fn start_undo(&mut self, leaf: NodeIndex, message: String) {
        self.budget = self.budget.saturating_sub(1);
        let at = self.at;
        self.change(leaf, |row| {
            row.undo = Undo::Due;
            row.attempt += 1;
            row.started_at = Some(at);
            row.finished_at = None;
            row.message = message;
        });
        let attempt = self.progress.node(leaf).attempt;
        self.delta.effects.push(Effect::Traffic {
            node: leaf,
            attempt,
        });
    }

    pub(super) fn end_undo(&mut self, leaf: NodeIndex, undo: Undo, message: String) {
        let at = self.at;
        self.change(leaf, |row| {
            row.undo = undo;
            row.finished_at = Some(at);
            row.message = message;
        });
        self.schedule_all();
    }

    /// After every event: whether the order as a whole is over, or has to be rolled back.
    pub(super) fn settle(&mut self) {
        self.settle_stages();
        match self.progress.control {
            Control::Active => {
                self.take_shifts_back();
                if self.progress.state(0).is_settled() {
                    self.sweep();
                    let root = self.progress.state(0);
                    if self.delta.more || !self.progress.is_quiet() || !root.is_settled() {
                        return;
                    }
                    // A strategy can tolerate more failures than the order does: then it is not over.
                    if self.progress.is_over_failures() {
                        if self.plan.on_failure == OnFailure::RollBack
                            && self.no_way_back().is_none()
                        {
                            self.end_for_rollback();
                            self.settle();
                        }
                        return;
                    }
                    let failed = self.has_trouble();
                    self.end(match root {
                        NodeState::Cancelled if failed => Ending::Failed,
                        NodeState::Cancelled => Ending::Cancelled,
                        NodeState::NotStarted
                        | NodeState::Running
                        | NodeState::AwaitingConfirmation
                        | NodeState::Locked
                        | NodeState::Drifted
                        | NodeState::Unknown
                        | NodeState::Failed
                        | NodeState::Cancelling
                        | NodeState::Ignored
                        | NodeState::Succeeded => Ending::Succeeded,
                    });
                } else if self.plan.on_failure == OnFailure::RollBack
                    && !self.delta.more
                    && !self.delta.again
                    && self.progress.is_quiet()
                    && self.is_stopped_by_failure()
                    && self.no_way_back().is_none()
                {
                    self.end_for_rollback();
                    self.settle();
                }
            }
            Control::Cancelling | Control::EndingForRollback => {
                if !self.progress.is_quiet() {
                    return;
                }
                self.cancel_in(0);
                if self.delta.more || !self.progress.is_quiet() {
                    return;
                }
                if self.progress.control == Control::EndingForRollback {
                    self.delta.effects.push(Effect::StartRollback);
                } else if !self.take_shifts_back() {
                    let failed = self.has_trouble();
                    self.end(if failed {
                        Ending::Failed
                    } else {
                        Ending::Cancelled
                    });
                }
            }
            Control::NotStarted
            | Control::Initialising
            | Control::RollingBack
            | Control::Ended(_) => {}
        }
    }

    /// Whether something failed, drifted or is unknown, wherever it stands.
    fn has_trouble(&self) -> bool {
        self.progress
            .states
            .iter()
            .any(|state| state.needs_mending())
    }

    /// Whether it is a failure that stops an order in which nothing is under way: not a tolerated one, not a lock. What
    /// drifted or is unknown is for a person to decide.
    fn is_stopped_by_failure(&self) -> bool {
        match self.progress.state(0) {
            NodeState::Failed => true,
            NodeState::Running | NodeState::AwaitingConfirmation | NodeState::Locked => {
                self.progress.is_over_failures()
            }
            NodeState::NotStarted
            | NodeState::Drifted
            | NodeState::Unknown
            | NodeState::Cancelling
            | NodeState::Cancelled
            | NodeState::Ignored
            | NodeState::Succeeded => false,
        }
    }
}
