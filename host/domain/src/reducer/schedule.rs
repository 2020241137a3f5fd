//! What may start: walks the tree from the root, or from one server, and starts leaves and asks for servers as far as
//! sequence, places in flight, failures, locks and the turn's budget go.
//!
//! Takes back what was asked for and would not be asked for any more. Ends nothing that has started (see `ending`).

use crate::{
    order::Control,
    plan::{NodeIndex, NodeKind, TrafficAction},
    progress::{Admission, NodeState, StageRollback},
};

use super::{Effect, Turn, effect_of};

impl Turn<'_> {
    pub(super) fn schedule_from(&mut self, unit: NodeIndex) {
        match self.progress.control {
            Control::Active => {
                if self.under_cancel(unit) {
                    self.cancel_in(unit)
                } else {
                    self.visit(unit, true, false)
                }
            }
            Control::Cancelling | Control::EndingForRollback => self.cancel_in(unit),
            Control::NotStarted
            | Control::Initialising
            | Control::RollingBack
            | Control::Ended(_) => {}
        }
    }

    pub(super) fn schedule_all(&mut self) {
        match self.progress.control {
            Control::Active => {
                self.take_shifts_back();
                self.visit(0, false, self.progress.stalled);
            }
            Control::Cancelling | Control::EndingForRollback => self.cancel_in(0),
            Control::NotStarted
            | Control::Initialising
            | Control::RollingBack
            | Control::Ended(_) => {}
        }
    }

    /// Starts what may start in a node. `opened`: a person asked to run it or something around it; `locked`: it is held.
    fn visit(&mut self, node: NodeIndex, opened: bool, locked: bool) {
        if self.budget == 0 {
            self.delta.more = true;
            return;
        }
        let plan = self.plan;
        let row = self.progress.node(node);
        if row.ignored {
            return;
        }
        match &row.rollback {
            Some(StageRollback::Ending { .. }) => return self.cancel_in(node),
            Some(
                StageRollback::Due { .. }
                | StageRollback::Running { .. }
                | StageRollback::Done
                | StageRollback::Failed { .. },
            ) => return,
            None => {}
        }
        if row.cancel {
            self.cancel_in(node);
            // Before what stands behind it starts.
            self.take_shifts_back();
            return;
        }
        let opened = opened || row.opened;
        let locked = locked || row.locked.is_some();
        match &plan.nodes[node as usize].kind {
            NodeKind::Sequence => self.visit_sequence(node, opened, locked),
            NodeKind::Parallel {
                max_in_flight,
                max_failures,
            } => {
                self.visit_parallel(node, opened, locked, *max_in_flight, *max_failures);
            }
            NodeKind::Unit { .. } => match row.admission {
                // Its turn goes on when it has a place among those in flight: its own, or after a retry a free one.
                Admission::Admitted => {
                    if self.progress.live[node as usize].count > 0
                        || self.progress.live_units < self.max_units_in_flight()
                    {
                        self.visit_sequence(node, true, false);
                    }
                }
                Admission::Asked | Admission::Held(_) => {}
                Admission::None => {
                    if opened && !locked && row.drift.is_empty() && self.may_start_unit() {
                        self.budget -= 1;
                        self.change(node, |row| row.admission = Admission::Asked);
                        self.delta.effects.push(Effect::Admit(node));
                    }
                }
            },
            NodeKind::Step { .. }
            | NodeKind::Traffic(_)
            | NodeKind::Gate { .. }
            | NodeKind::Pause { .. }
            | NodeKind::Judge { .. } => {
                // A server's turn goes on; beside it nothing starts after too many failures, a shift of traffic least of all.
                let stopped = self.progress.is_over_failures() && self.unit_of(node).is_none();
                // What a person changes is changed before the plan moves on: the later one stays.
                let waits = matches!(
                    plan.nodes[node as usize].kind,
                    NodeKind::Traffic(TrafficAction::Set { .. } | TrafficAction::Share { .. })
                ) && self.progress.edit_is_due();
                if opened
                    && !locked
                    && !stopped
                    && !waits
                    && !self.progress.stalled
                    && self.progress.state(node) == NodeState::NotStarted
                {
                    self.start(node);
                }
            }
        }
    }

    fn visit_sequence(&mut self, node: NodeIndex, opened: bool, locked: bool) {
        loop {
            let children = &self.progress.branches[node as usize];
            let Some(child) = children.list.get(children.cursor).copied() else {
                return;
            };
            if !self.progress.state(child).is_settled() {
                self.visit(child, opened, locked);
                if !self.progress.state(child).is_settled() {
                    return;
                }
            }
            self.progress.branches[node as usize].cursor += 1;
        }
    }

    fn visit_parallel(
        &mut self,
        node: NodeIndex,
        opened: bool,
        locked: bool,
        max_in_flight: u32,
        max_failures: u32,
    ) {
        let count = self.progress.children(node).len();
        let mut prefix = true;
        for position in self.progress.branches[node as usize].cursor..count {
            let child = self.progress.branches[node as usize].list[position];
            let state = self.progress.state(child);
            if state.is_settled() {
                if prefix {
                    self.progress.branches[node as usize].cursor = position + 1;
                }
                continue;
            }
            prefix = false;
            if !self.progress.node(child).is_ended() {
                let unit = matches!(self.plan.nodes[child as usize].kind, NodeKind::Unit { .. });
                let live = self.progress.live[child as usize].count > 0;
                if unit && live {
                    // Its own answers drive it.
                    continue;
                }
                // More than allowed can be live: restores of servers that a person ended need no place.
                let others = self.progress.live[node as usize].children - u32::from(live);
                if max_in_flight > 0 && others >= max_in_flight {
                    continue;
                }
                if state == NodeState::NotStarted {
                    let failed = self.progress.tally(node).troubled();
                    if failed > max_failures || (unit && !self.may_start_unit()) {
                        continue;
                    }
                }
            }
            if self.budget == 0 {
                self.delta.more = true;
                return;
            }
            self.visit(child, opened, locked);
        }
    }

    /// Servers that may be worked on at once. A limit of 0 would never let an order end; it is taken for 1.
    fn max_units_in_flight(&self) -> u32 {
        self.plan.limits.max_in_flight.max(1)
    }

    /// Whether the order's own limits allow one more server to start.
    fn may_start_unit(&self) -> bool {
        self.progress.live_units < self.max_units_in_flight() && !self.progress.is_over_failures()
    }

    /// Whether a unit whose admission is outstanding would not be asked for now.
    pub(super) fn is_held_back(&self, unit: NodeIndex) -> bool {
        if self.progress.stalled || self.progress.is_over_failures() {
            return true;
        }
        let mut at = Some(unit);
        while let Some(index) = at {
            if self.progress.node(index).locked.is_some() {
                return true;
            }
            at = self.plan.nodes[index as usize].parent;
        }
        self.plan.nodes[unit as usize].parent.is_some_and(|parent| {
            matches!(self.plan.nodes[parent as usize].kind, NodeKind::Parallel { max_failures, .. }
                if self.progress.tally(parent).troubled() > max_failures)
        })
    }

    /// Takes back what was asked for: the unit has not started.
    pub(super) fn withdraw(&mut self, unit: NodeIndex) {
        self.budget = self.budget.saturating_sub(1);
        self.change(unit, |row| {
            row.admission = Admission::None;
            row.message.clear();
        });
        self.delta.effects.push(Effect::Release(unit));
    }

    /// Units that the envelope holds, and that would not be asked for any more, stop waiting: they would keep the order
    /// busy for ever, for the envelope may hold them just because of what failed. Those without an answer get one.
    pub(super) fn withdraw_held(&mut self) {
        if self.progress.asked == 0 || self.progress.control != Control::Active {
            return;
        }
        for position in 0..self.progress.unit_nodes.len() {
            let unit = self.progress.unit_nodes[position];
            if matches!(self.progress.node(unit).admission, Admission::Held(_))
                && !self.under_cancel(unit)
                && self.is_held_back(unit)
            {
                if self.budget == 0 {
                    self.delta.more = true;
                    return;
                }
                self.withdraw(unit);
            }
        }
    }

    /// Starts a leaf: a new attempt.
    pub(super) fn start(&mut self, node: NodeIndex) {
        self.budget = self.budget.saturating_sub(1);
        let at = self.at;
        let kind = &self.plan.nodes[node as usize].kind;
        let waits = matches!(kind, NodeKind::Gate { .. });
        self.change(node, |row| {
            row.state = if waits {
                NodeState::AwaitingConfirmation
            } else {
                NodeState::Running
            };
            row.attempt += 1;
            row.started_at = Some(at);
            row.finished_at = None;
        });
        self.delta
            .effects
            .extend(effect_of(kind, node, self.progress.node(node)));
    }
}
