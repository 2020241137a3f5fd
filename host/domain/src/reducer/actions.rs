//! What people do: each [`Action`] is refused, or changes what it is about and lets the
//! order go on.
//!
//! What starts or is ended because of an action is `schedule`'s and `ending`'s to do. Confirm, retry and ignore change at
//! most [`TURN_BUDGET`] nodes a turn and ask for the rest by [`again`](super::Delta::again).

use crate::{
    order::{Action, Control, Ending},
    plan::{Level, NodeIndex, NodeKind},
    progress::NodeState,
};

use super::{Effect, Refused, TURN_BUDGET, Turn};

impl Turn<'_> {
    pub(super) fn act(&mut self, action: &Action) -> Result<(), Refused> {
        match action {
            Action::Run => match self.progress.control {
                Control::NotStarted => {
                    self.change(0, |row| row.opened = true);
                    self.initialise();
                    Ok(())
                }
                Control::Active => {
                    let opened = self.progress.node(0).opened;
                    if opened && !self.progress.stalled {
                        return Err(Refused::Nothing {
                            action: "run",
                            node: 0,
                            on: "is not running yet",
                        });
                    }
                    self.progress.stalled = false;
                    self.change(0, |row| row.opened = true);
                    self.schedule_all();
                    Ok(())
                }
                Control::Initialising
                | Control::Cancelling
                | Control::EndingForRollback
                | Control::RollingBack
                | Control::Ended(_) => Err(self.wrong_state("run")),
            },
            Action::RunNode { node } => self.run_node(*node),
            Action::Confirm { node } => {
                self.expect_active("confirm")?;
                let node = node.unwrap_or(0);
                self.known(node)?;
                let waits = |state| state == NodeState::AwaitingConfirmation;
                let mut waiting = self.leaves_in(node, waits);
                if self.plan.nodes[node as usize].level == Level::Group {
                    // The gate that asks about a group's servers follows it.
                    let followers = self.progress.followers(self.plan, node);
                    waiting.extend(
                        followers
                            .into_iter()
                            .filter(|leaf| waits(self.progress.state(*leaf))),
                    );
                }
                if waiting.is_empty() {
                    return Err(Refused::Nothing {
                        action: "confirm",
                        node,
                        on: "waits for confirmation",
                    });
                }
                self.delta.again = waiting.len() > TURN_BUDGET;
                waiting.truncate(TURN_BUDGET);
                self.progress.stalled = false;
                for leaf in &waiting {
                    self.put(*leaf, NodeState::Succeeded, String::new());
                }
                // Nothing starts before all are confirmed: a gate that opens after this action is not confirmed by it.
                for leaf in waiting {
                    self.release_if_done(leaf);
                }
                if !self.delta.again {
                    self.schedule_all();
                }
                Ok(())
            }
            Action::Retry { node } => self.retry(*node),
            Action::Ignore { node } => self.ignore(*node),
            Action::Cancel { node } => self.cancel(*node),
            Action::Lock { node, reason } => {
                self.expect_lockable("lock", *node)?;
                let reason = if reason.is_empty() {
                    "locked by a person".to_owned()
                } else {
                    reason.clone()
                };
                self.change(*node, |row| row.locked = Some(reason));
                self.withdraw_held();
                Ok(())
            }
            Action::Unlock { node } => {
                self.expect_lockable("unlock", *node)?;
                if self.progress.node(*node).locked.is_none() {
                    return Err(Refused::Nothing {
                        action: "unlock",
                        node: *node,
                        on: "is locked",
                    });
                }
                self.change(*node, |row| row.locked = None);
                self.schedule_all();
                Ok(())
            }
            Action::RollBack { .. } => match self.progress.control {
                Control::Active => {
                    self.expect_no_stage_rollback()?;
                    self.expect_way_back()?;
                    self.end_for_rollback();
                    Ok(())
                }
                Control::NotStarted
                | Control::Initialising
                | Control::Cancelling
                | Control::EndingForRollback
                | Control::RollingBack
                | Control::Ended(_) => Err(self.wrong_state("roll back")),
            },
            Action::RollBackStage { node, reason } => self.roll_back_stage(*node, reason),
            Action::RunAgain { node } => self.run_again(*node),
            Action::GoOn { node } => self.go_on(*node),
            Action::SetWeights { weights } => self.set_weights(weights),
            Action::ShiftCell { cell, percent } => self.shift_cell(cell, *percent),
        }
    }

    fn run_node(&mut self, node: NodeIndex) -> Result<(), Refused> {
        self.known(node)?;
        match self.progress.control {
            Control::NotStarted | Control::Active => {}
            Control::Initialising
            | Control::Cancelling
            | Control::EndingForRollback
            | Control::RollingBack
            | Control::Ended(_) => return Err(self.wrong_state("run")),
        }
        let level = self.plan.nodes[node as usize].level;
        if !matches!(
            level,
            Level::Stage | Level::Group | Level::Application | Level::Server
        ) {
            return Err(Refused::WrongLevel {
                action: "run",
                node,
                level,
                choose: "a stage, application, group or server",
            });
        }
        if self.progress.state(node).is_settled()
            || self.progress.node(node).locked.is_some()
            || self.in_dead_end(node)
        {
            return Err(Refused::Nothing {
                action: "run",
                node,
                on: "is neither done, ended nor locked",
            });
        }
        // Groups, servers and applications that stand before it in a sequence come first. Gates, pauses and the like
        // between them belong to the way there and are run with it.
        let mut on_the_way = Vec::new();
        let mut opened_around = false;
        let mut at = node;
        loop {
            opened_around |= self.progress.node(at).opened;
            let Some(parent) = self.plan.nodes[at as usize].parent else {
                break;
            };
            if matches!(self.plan.nodes[parent as usize].kind, NodeKind::Sequence) {
                for before in self.progress.children(parent) {
                    if *before == at {
                        break;
                    }
                    if self.progress.state(*before).is_settled() {
                        continue;
                    }
                    let planned = &self.plan.nodes[*before as usize];
                    if !planned.kind.is_leaf() || on_the_way.len() == TURN_BUDGET {
                        return Err(Refused::NotReady {
                            node,
                            before: *before,
                            name: planned.name.clone(),
                        });
                    }
                    on_the_way.push(*before);
                }
            }
            at = parent;
        }
        if opened_around && self.progress.control == Control::Active && !self.progress.stalled {
            return Err(Refused::Nothing {
                action: "run",
                node,
                on: "was not run before",
            });
        }
        self.progress.stalled = false;
        for leaf in on_the_way {
            self.change(leaf, |row| row.opened = true);
        }
        self.change(node, |row| row.opened = true);
        if self.progress.control == Control::NotStarted {
            self.initialise();
        } else {
            self.schedule_all();
        }
        Ok(())
    }

    fn retry(&mut self, node: NodeIndex) -> Result<(), Refused> {
        self.expect_active("retry")?;
        self.known(node)?;
        let mut found = self.mendable_in(node);
        if found.is_empty() {
            return Err(Refused::Nothing {
                action: "retry",
                node,
                on: "failed, drifted or is unknown",
            });
        }
        self.delta.again = found.len() > self.budget;
        found.truncate(self.budget);
        for index in found {
            if self.plan.nodes[index as usize].kind.is_leaf() {
                self.change(index, |row| {
                    row.state = NodeState::NotStarted;
                    row.result = None;
                });
            } else {
                self.change(index, |row| row.drift.clear());
            }
        }
        self.progress.stalled = false;
        self.schedule_all();
        Ok(())
    }

    fn ignore(&mut self, node: NodeIndex) -> Result<(), Refused> {
        self.expect_active("ignore")?;
        self.known(node)?;
        let mut found = self.mendable_in(node);
        if found.is_empty() {
            return Err(Refused::Nothing {
                action: "ignore",
                node,
                on: "failed, drifted or is unknown",
            });
        }
        self.delta.again = found.len() > self.budget;
        found.truncate(self.budget);
        let step = self.plan.nodes[node as usize].kind.is_leaf();
        for index in found {
            let unit = self.unit_of(index);
            match unit {
                // On a step: the server goes on with its next step. Above: the server is left as it is.
                Some(unit) if !step => {
                    self.change(unit, |row| row.ignored = true);
                    self.leave_unit(unit);
                }
                // It does not go on by itself: what has failed has given up its place among those in flight.
                Some(_) | None => {
                    self.put(index, NodeState::Ignored, String::new());
                    self.release_if_done(index);
                }
            }
        }
        self.progress.stalled = false;
        self.schedule_all();
        Ok(())
    }

    fn cancel(&mut self, node: Option<NodeIndex>) -> Result<(), Refused> {
        let node = node.unwrap_or(0);
        self.known(node)?;
        if node == 0 {
            return match self.progress.control {
                Control::NotStarted => {
                    self.change(0, |row| row.cancel = true);
                    self.end(Ending::Cancelled);
                    Ok(())
                }
                Control::Initialising | Control::Active => {
                    self.expect_no_stage_rollback()?;
                    self.progress.control = Control::Cancelling;
                    self.change(0, |row| row.cancel = true);
                    self.cancel_in(0);
                    Ok(())
                }
                Control::Cancelling
                | Control::EndingForRollback
                | Control::RollingBack
                | Control::Ended(_) => Err(self.wrong_state("cancel")),
            };
        }
        self.expect_active("cancel")?;
        let level = self.plan.nodes[node as usize].level;
        if !matches!(
            level,
            Level::Stage | Level::Group | Level::Application | Level::Server
        ) {
            return Err(Refused::WrongLevel {
                action: "cancel",
                node,
                level,
                choose: "the order, a stage, application, group or server",
            });
        }
        if self.progress.state(node).is_settled() || self.in_dead_end(node) {
            return Err(Refused::Nothing {
                action: "cancel",
                node,
                on: "is not done or ended already",
            });
        }
        self.change(node, |row| row.cancel = true);
        self.cancel_in(node);
        self.schedule_all();
        Ok(())
    }

    fn initialise(&mut self) {
        self.progress.control = Control::Initialising;
        self.delta.effects.push(Effect::Initialise);
    }
}
