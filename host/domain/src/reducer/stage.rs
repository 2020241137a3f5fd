//! The rollback of one stage, or of one application that stands in none: it is ended, its rollback order runs, and a person
//! runs it again or goes on without it. Here a stage is either.
//!
//! Its shifts of traffic are taken back first, then what it released is brought back.
//!
//! Source: spec "Blue-green release", "Step rollback"; "Release orders", "Actions". What the rollback order does is planned elsewhere; here stands when it
//! is due and what its end means. While a stage is rolled back nothing starts in it, and the order as a whole is neither
//! ended nor rolled back.

use crate::{
    order::Control,
    plan::{Level, NodeIndex, NodeKind, Plan},
    plugin::RollbackScope,
    progress::{NodeProgress, NodeState, Progress, StageRollback, Undo},
    task::{Outcome, TaskResult},
};

use super::{Effect, Refused, Turn};

/// The stage that has begun and after which the order has no way back.
#[must_use]
pub fn no_way_back(plan: &Plan, progress: &Progress) -> Option<NodeIndex> {
    progress.stage_nodes.iter().copied().find(|stage| {
        let closes = match plan.nodes[*stage as usize].rollback {
            RollbackScope::Order => false,
            RollbackScope::Stage | RollbackScope::Nothing => true,
        };
        closes && progress.state(*stage) != NodeState::NotStarted
    })
}

impl Turn<'_> {
    pub(super) fn roll_back_stage(&mut self, node: NodeIndex, reason: &str) -> Result<(), Refused> {
        self.expect_stage("roll back", node)?;
        self.expect_no_stage_rollback()?;
        let planned = &self.plan.nodes[node as usize];
        if planned.rollback == RollbackScope::Nothing {
            return Err(Refused::NoWayBack {
                node,
                name: planned.name.clone(),
            });
        }
        let row = self.progress.node(node);
        let open = match &row.rollback {
            Some(StageRollback::Failed { .. }) => true,
            Some(_) => false,
            None => {
                let state = self.progress.state(node);
                let begun = state != NodeState::NotStarted;
                match planned.level {
                    // What is done of an application can still be brought back, as long as the order goes on.
                    Level::Application => begun,
                    Level::Order
                    | Level::Group
                    | Level::Stage
                    | Level::Server
                    | Level::Step
                    | Level::Plain => begun && !row.cancel && !state.is_settled(),
                }
            }
        };
        if !open {
            return Err(Refused::Nothing {
                action: "roll back",
                node,
                on: "has begun and is not done (an application may be), or whose rollback failed",
            });
        }
        self.progress.stalled = false;
        // What could not be taken back is tried again.
        let failed: Vec<NodeIndex> = self
            .shifts_in(node)
            .filter(|leaf| self.progress.node(*leaf).undo == Undo::Failed)
            .collect();
        for leaf in failed {
            if self.budget == 0 {
                self.delta.again = true;
                return Ok(());
            }
            self.budget -= 1;
            self.change(leaf, |row| row.undo = Undo::None);
        }
        let reason = reason.to_owned();
        self.change(node, |row| {
            row.rollback = Some(StageRollback::Ending { reason });
        });
        self.cancel_in(node);
        Ok(())
    }

    pub(super) fn run_again(&mut self, node: NodeIndex) -> Result<(), Refused> {
        self.expect_rolled_back("run again", node)?;
        for index in node + 1..self.end_of(node) {
            let row = self.progress.node(index);
            let again = NodeProgress {
                // Attempts go on counting: a task's id never comes twice.
                attempt: row.attempt,
                again: row.again
                    || matches!(self.plan.nodes[index as usize].kind, NodeKind::Unit { .. }),
                ..NodeProgress::default()
            };
            if *row == again || *row == NodeProgress::default() {
                continue;
            }
            if self.budget == 0 {
                self.delta.again = true;
                return Ok(());
            }
            self.budget -= 1;
            let succeeded = |result: &TaskResult| result.outcome == Outcome::Succeeded;
            if row.result.as_ref().is_some_and(succeeded) {
                self.delta.reset.push((index, row.clone()));
            }
            self.change(index, |row| *row = again);
        }
        self.change(node, |row| {
            row.rollback = None;
            row.cancel = false;
        });
        self.schedule_all();
        Ok(())
    }

    pub(super) fn go_on(&mut self, node: NodeIndex) -> Result<(), Refused> {
        self.expect_rolled_back("go on", node)?;
        self.change(node, |row| row.ignored = true);
        self.schedule_all();
        Ok(())
    }

    /// What became of the rollback order.
    pub(super) fn stage_rollback_went_on(
        &mut self,
        node: NodeIndex,
        now: StageRollback,
    ) -> Result<(), Refused> {
        self.known(node)?;
        let before = self.progress.node(node).rollback.as_ref();
        let fits = match (before, &now) {
            (
                Some(StageRollback::Due { .. }),
                StageRollback::Running { .. } | StageRollback::Done | StageRollback::Failed { .. },
            )
            | (
                Some(StageRollback::Running { .. }),
                StageRollback::Done | StageRollback::Failed { .. },
            ) => true,
            (Some(_) | None, _) => false,
        };
        if !fits {
            return Err(Refused::NotCurrent { node });
        }
        self.change(node, |row| row.rollback = Some(now));
        Ok(())
    }

    /// After every event: a stage in which nothing is under way any more is ready for its rollback order.
    pub(super) fn settle_stages(&mut self) {
        if self.progress.control != Control::Active {
            return;
        }
        // A change by hand that is under way could give traffic to what is taken back.
        if self.progress.edit_is_due() {
            return;
        }
        for position in 0..self.progress.stage_nodes.len() {
            let stage = self.progress.stage_nodes[position];
            let Some(StageRollback::Ending { reason }) = &self.progress.node(stage).rollback else {
                continue;
            };
            let reason = reason.clone();
            if !self.progress.is_at_rest(stage) {
                continue;
            }
            self.cancel_in(stage);
            if self.delta.more || !self.progress.is_at_rest(stage) {
                continue;
            }
            let shifts: Vec<NodeIndex> = self.shifts_in(stage).collect();
            let undo = |leaf: &&NodeIndex| self.progress.node(**leaf).undo;
            if shifts.iter().any(|leaf| undo(&leaf) == Undo::None) {
                self.take_shifts_back();
                continue;
            }
            let failed = shifts.iter().find(|leaf| undo(leaf) == Undo::Failed);
            if let Some(leaf) = failed {
                let message = self.progress.node(*leaf).message.clone();
                self.change(stage, |row| {
                    row.rollback = Some(StageRollback::Failed { message });
                });
                continue;
            }
            self.change(stage, |row| {
                row.rollback = Some(StageRollback::Due { reason });
            });
            self.delta.effects.push(Effect::RollBackStage(stage));
        }
    }

    /// The shifts of a stage that changed weights.
    fn shifts_in(&self, stage: NodeIndex) -> impl Iterator<Item = NodeIndex> {
        let end = self.end_of(stage);
        let mine = self.progress.shifts.iter().copied();
        mine.filter(move |leaf| (stage..end).contains(leaf))
            .filter(|leaf| self.progress.node(*leaf).shifted.is_some())
    }

    pub(super) fn no_way_back(&self) -> Option<NodeIndex> {
        no_way_back(self.plan, self.progress)
    }

    pub(super) fn expect_way_back(&self) -> Result<(), Refused> {
        match self.no_way_back() {
            None => Ok(()),
            Some(node) => Err(Refused::NoWayBack {
                node,
                name: self.plan.nodes[node as usize].name.clone(),
            }),
        }
    }

    pub(super) fn expect_no_stage_rollback(&self) -> Result<(), Refused> {
        match self.progress.stage_in_rollback() {
            None => Ok(()),
            Some(node) => Err(Refused::StageRollsBack {
                node,
                name: self.plan.nodes[node as usize].name.clone(),
            }),
        }
    }

    fn expect_stage(&self, action: &'static str, node: NodeIndex) -> Result<(), Refused> {
        self.expect_active(action)?;
        self.known(node)?;
        let level = self.plan.nodes[node as usize].level;
        if self.progress.stage_of(node) == node && node != 0 {
            return Ok(());
        }
        Err(Refused::WrongLevel {
            action,
            node,
            level,
            choose: "a stage, or an application that stands in none",
        })
    }

    fn expect_rolled_back(&self, action: &'static str, node: NodeIndex) -> Result<(), Refused> {
        self.expect_stage(action, node)?;
        let row = self.progress.node(node);
        if row.rollback == Some(StageRollback::Done) && !row.ignored {
            return Ok(());
        }
        Err(Refused::Nothing {
            action,
            node,
            on: "was rolled back",
        })
    }
}
