//! What people are told of progress beside the states that the engine works with.
//!
//! The engine does not look at nodes again once an order has ended, and the state of an inner node says `running` whatever
//! failed in it while something else goes on. People want to know what broke, and when a person is needed.

use crate::{
    order::{Control, OrderState},
    plan::{NodeIndex, NodeKind, Plan},
};

use super::{NodeState, Progress};

impl Progress {
    /// The state of a node as it is told.
    ///
    /// What failed and was then ended is `failed`, and so is all around it. What was not reached in something that is over is
    /// `cancelled`, as [`Progress::counts`] counts it.
    #[must_use]
    pub fn told_state(&self, plan: &Plan, node: NodeIndex) -> NodeState {
        let state = self.state(node);
        let is_over = matches!(self.control, Control::Ended(_));
        match state {
            NodeState::Cancelled if self.is_broken(node) => NodeState::Failed,
            NodeState::NotStarted | NodeState::Locked
                if is_over || self.first_ended(plan, node).is_some() =>
            {
                NodeState::Cancelled
            }
            NodeState::Running | NodeState::AwaitingConfirmation | NodeState::Cancelling
                if is_over =>
            {
                if self.is_broken(node) {
                    NodeState::Failed
                } else {
                    NodeState::Cancelled
                }
            }
            NodeState::NotStarted
            | NodeState::Running
            | NodeState::AwaitingConfirmation
            | NodeState::Locked
            | NodeState::Drifted
            | NodeState::Unknown
            | NodeState::Failed
            | NodeState::Cancelling
            | NodeState::Cancelled
            | NodeState::Ignored
            | NodeState::Succeeded => state,
        }
    }

    /// Whether a server in this node failed, drifted or is unknown, also where its turn was ended with that.
    fn is_broken(&self, node: NodeIndex) -> bool {
        let inside = node..self.subtree_end[node as usize];
        let first = self.unit_nodes.partition_point(|unit| *unit < node);
        self.unit_nodes[first..]
            .iter()
            .take_while(|unit| inside.contains(unit))
            .any(|unit| self.state(*unit).needs_mending() || self.ended_broken(*unit))
    }

    /// Whether a unit's turn was ended after something in it had failed.
    pub(super) fn ended_broken(&self, unit: NodeIndex) -> bool {
        self.state(unit) == NodeState::Cancelled && self.tallies[unit as usize].troubled() > 0
    }

    /// What follows a group up to the next one: gates that ask about its servers, pauses after them, judgements of them.
    #[must_use]
    pub fn followers(&self, plan: &Plan, group: NodeIndex) -> Vec<NodeIndex> {
        let kind = |node: NodeIndex| &plan.nodes[node as usize].kind;
        let parent = plan.nodes[group as usize].parent;
        let Some(parent) = parent.filter(|parent| matches!(kind(*parent), NodeKind::Sequence))
        else {
            return Vec::new();
        };
        let siblings = self.children(parent).iter().copied();
        siblings
            .skip_while(|node| *node <= group)
            .take_while(|node| {
                matches!(
                    kind(*node),
                    NodeKind::Gate { .. } | NodeKind::Pause { .. } | NodeKind::Judge { .. }
                )
            })
            .collect()
    }

    /// The state that the order comes to once what is under way is done, as far as it is known: a failure that stops it, or a
    /// gate, is told while others still run. Else the order's state.
    #[must_use]
    pub fn comes_to(&self) -> OrderState {
        let state = self.order_state();
        if state != OrderState::Running {
            state
        } else if self.units.of(NodeState::Drifted) > 0 {
            OrderState::Drifted
        } else if self.units.of(NodeState::Unknown) > 0 {
            OrderState::Unknown
        } else if self.is_over_failures() {
            OrderState::Blocked
        } else if self.is_awaited() {
            OrderState::AwaitingConfirmation
        } else {
            state
        }
    }
}
