//! What an event is refused for. Nothing here changes anything: these are asked before the first change of a turn.

use crate::{
    order::Control,
    plan::{Level, NodeIndex, NodeKind},
    progress::{Admission, NodeState},
    task::Outcome,
};

use super::{Refused, Turn};

impl Turn<'_> {
    pub(super) fn known(&self, node: NodeIndex) -> Result<(), Refused> {
        if (node as usize) < self.plan.nodes.len() {
            Ok(())
        } else {
            let last = u32::try_from(self.plan.nodes.len().saturating_sub(1)).unwrap_or(u32::MAX);
            Err(Refused::NoSuchNode { node, last })
        }
    }

    pub(super) fn current(
        &self,
        node: NodeIndex,
        attempt: u32,
        is: impl Fn(&NodeKind) -> bool,
    ) -> Result<(), Refused> {
        self.known(node)?;
        let current = is(&self.plan.nodes[node as usize].kind)
            && self.progress.state(node).is_busy()
            && self.progress.node(node).attempt == attempt;
        if current {
            Ok(())
        } else {
            Err(Refused::NotCurrent { node })
        }
    }

    /// Whether a result tells what became of a step whose outcome nobody knew, and nobody has acted on that since.
    pub(super) fn is_late(&self, node: NodeIndex, attempt: u32, outcome: Outcome) -> bool {
        self.progress.control == Control::Active
            && self
                .plan
                .nodes
                .get(node as usize)
                .is_some_and(|planned| matches!(planned.kind, NodeKind::Step { .. }))
            && self.progress.state(node) == NodeState::Unknown
            && self.progress.node(node).attempt == attempt
            && outcome != Outcome::Unknown
            && !self.under_cancel(node)
    }

    pub(super) fn asked(&self, node: NodeIndex) -> Result<(), Refused> {
        self.known(node)?;
        match self.progress.node(node).admission {
            Admission::Asked | Admission::Held(_) => Ok(()),
            Admission::None | Admission::Admitted => Err(Refused::NotCurrent { node }),
        }
    }

    pub(super) fn wrong_state(&self, action: &'static str) -> Refused {
        Refused::WrongState {
            action,
            state: self.progress.order_state(),
        }
    }

    pub(super) fn expect_control(
        &self,
        control: Control,
        action: &'static str,
    ) -> Result<(), Refused> {
        if self.progress.control == control {
            Ok(())
        } else {
            Err(self.wrong_state(action))
        }
    }

    /// The answer to [`Effect::StartRollback`]: due when nothing is under way any more.
    pub(super) fn expect_all_ended(&self, action: &'static str) -> Result<(), Refused> {
        self.expect_control(Control::EndingForRollback, action)?;
        if self.progress.is_quiet() {
            Ok(())
        } else {
            Err(self.wrong_state(action))
        }
    }

    pub(super) fn expect_active(&self, action: &'static str) -> Result<(), Refused> {
        self.expect_control(Control::Active, action)
    }

    pub(super) fn expect_lockable(
        &self,
        action: &'static str,
        node: NodeIndex,
    ) -> Result<(), Refused> {
        self.known(node)?;
        match self.progress.control {
            Control::NotStarted | Control::Active => {}
            Control::Initialising
            | Control::Cancelling
            | Control::EndingForRollback
            | Control::RollingBack
            | Control::Ended(_) => return Err(self.wrong_state(action)),
        }
        let level = self.plan.nodes[node as usize].level;
        if !matches!(level, Level::Group | Level::Application | Level::Server) {
            return Err(Refused::WrongLevel {
                action,
                node,
                level,
                choose: "a group, an application or a server",
            });
        }
        if self.progress.state(node).is_settled() {
            return Err(Refused::Nothing {
                action,
                node,
                on: "is not done yet",
            });
        }
        Ok(())
    }
}
