//! What comes back from effects: initialisation, admission, tasks, weights, pauses, judgements, deadlines, rollbacks.
//!
//! An answer that is not about the current attempt of something under way is refused (see `refusals`) before anything
//! changes. What follows from an answer is the scheduler's (see `schedule`) or, in a node that is ended, `ending`'s.

use crate::{
    order::{Control, Ending},
    plan::{NodeIndex, NodeKind, StepTemplate, TrafficAction},
    plugin::{Judgement, OnFailure, Verdict},
    progress::{Admission, NodeState, Undo},
    task::{Outcome, TaskResult},
};

use super::{Effect, Event, LOCKS_PER_TURN, Refused, TRAFFIC_ATTEMPTS, Turn};

impl Turn<'_> {
    pub(super) fn event(&mut self, event: Event) -> Result<(), Refused> {
        if matches!(self.progress.control, Control::Ended(_)) {
            return Err(Refused::Terminal);
        }
        match event {
            Event::Act(action) => self.act(&action),
            Event::Initialised { locked } => {
                self.expect_control(Control::Initialising, "initialised")?;
                for (node, _) in &locked {
                    self.known(*node)?;
                }
                let mut wanted = locked
                    .into_iter()
                    .filter(|(node, reason)| {
                        self.progress.node(*node).locked.as_ref() != Some(reason)
                    })
                    .collect::<Vec<_>>();
                self.delta.again = wanted.len() > LOCKS_PER_TURN;
                wanted.truncate(LOCKS_PER_TURN);
                for (node, reason) in wanted {
                    self.change(node, |row| row.locked = Some(reason));
                }
                if !self.delta.again {
                    self.progress.control = Control::Active;
                    self.schedule_all();
                }
                Ok(())
            }
            Event::InitialisationFailed { .. } => {
                self.expect_control(Control::Initialising, "initialisation failed")?;
                self.progress.control = Control::NotStarted;
                // Whoever runs it next says anew what: nothing of what was asked for stays.
                let opened: Vec<NodeIndex> = (0u32..)
                    .zip(&self.progress.nodes)
                    .filter(|(_, row)| row.opened)
                    .map(|(node, _)| node)
                    .collect();
                for node in opened {
                    self.change(node, |row| row.opened = false);
                }
                Ok(())
            }
            Event::UnitAdmitted(node) => {
                self.asked(node)?;
                if self.under_cancel(node) {
                    self.cancel_in(node);
                } else if self.is_held_back(node) {
                    // It was asked for before the failure or the lock that now stands against it.
                    self.withdraw(node);
                    self.schedule_all();
                } else {
                    self.change(node, |row| {
                        row.admission = Admission::Admitted;
                        row.message.clear();
                    });
                    self.schedule_from(node);
                }
                Ok(())
            }
            Event::UnitHeld(node, reason) => {
                self.asked(node)?;
                if self.under_cancel(node) {
                    self.cancel_in(node);
                } else if self.is_held_back(node) {
                    self.withdraw(node);
                    self.schedule_all();
                } else {
                    self.change(node, |row| row.admission = Admission::Held(reason));
                }
                Ok(())
            }
            Event::UnitDrifted(node, drift) => {
                self.asked(node)?;
                if self.under_cancel(node) {
                    self.cancel_in(node);
                } else {
                    self.change(node, |row| {
                        row.admission = Admission::None;
                        row.drift = drift;
                    });
                    self.withdraw_held();
                    self.schedule_all();
                }
                Ok(())
            }
            Event::StepFinished {
                node,
                attempt,
                result,
            } => self.step_finished(node, attempt, *result),
            Event::TrafficRemembered {
                node,
                attempt,
                weights,
            } => {
                self.current(node, attempt, |kind| {
                    matches!(kind, NodeKind::Traffic(TrafficAction::Drain { .. }))
                })?;
                self.change(node, |row| {
                    row.remembered.get_or_insert(weights);
                });
                Ok(())
            }
            Event::ShiftRemembered {
                node,
                attempt,
                weights,
            } => {
                self.current(node, attempt, |kind| {
                    matches!(
                        kind,
                        NodeKind::Traffic(TrafficAction::Set { .. } | TrafficAction::Share { .. })
                    )
                })?;
                self.change(node, |row| {
                    row.shifted.get_or_insert(weights);
                });
                Ok(())
            }
            Event::TrafficDone { node, attempt } => {
                self.current(node, attempt, |kind| matches!(kind, NodeKind::Traffic(_)))?;
                if self.progress.node(node).undo == Undo::Due {
                    self.end_undo(node, Undo::Done, "taken back".to_owned());
                    return Ok(());
                }
                self.end_leaf(node, NodeState::Succeeded, String::new());
                Ok(())
            }
            Event::TrafficFailed {
                node,
                attempt,
                message,
                repeat,
            } => {
                self.current(node, attempt, |kind| matches!(kind, NodeKind::Traffic(_)))?;
                if self.progress.node(node).undo == Undo::Due {
                    if repeat && attempt % TRAFFIC_ATTEMPTS != 0 {
                        self.start_undo(node, message);
                    } else {
                        self.end_undo(node, Undo::Failed, message);
                    }
                    return Ok(());
                }
                let restore = matches!(
                    self.plan.nodes[node as usize].kind,
                    NodeKind::Traffic(TrafficAction::Restore)
                );
                let cancelling = self.progress.state(node) == NodeState::Cancelling
                    || (!restore && self.under_cancel(node));
                let stalled = self.progress.stalled && !restore;
                if repeat && !cancelling && !stalled && attempt % TRAFFIC_ATTEMPTS != 0 {
                    self.change(node, |row| row.message = message);
                    self.start(node);
                } else {
                    self.end_leaf(
                        node,
                        if cancelling {
                            NodeState::Cancelled
                        } else {
                            NodeState::Failed
                        },
                        message,
                    );
                }
                Ok(())
            }
            Event::PauseElapsed { node, attempt } => {
                self.current(node, attempt, |kind| matches!(kind, NodeKind::Pause { .. }))?;
                self.end_leaf(node, NodeState::Succeeded, String::new());
                Ok(())
            }
            Event::Judged {
                node,
                attempt,
                judgement,
            } => {
                self.current(node, attempt, |kind| matches!(kind, NodeKind::Judge { .. }))?;
                match judgement {
                    Ok(Judgement {
                        verdict: Verdict::GoOn,
                        reason,
                    }) => self.end_leaf(node, NodeState::Succeeded, reason),
                    Ok(Judgement {
                        verdict: Verdict::Hold,
                        reason,
                    }) => {
                        self.change(node, |row| {
                            row.state = NodeState::AwaitingConfirmation;
                            row.message = reason;
                        });
                    }
                    // It goes on to be asked: the effect is still due.
                    Ok(Judgement {
                        verdict: Verdict::Extend,
                        reason,
                    }) => self.change(node, |row| {
                        row.extended += 1;
                        row.message = reason;
                    }),
                    Ok(Judgement {
                        verdict: Verdict::RollBack,
                        reason,
                    }) => {
                        let at = self.at;
                        self.change(node, |row| {
                            row.state = NodeState::Failed;
                            row.finished_at = Some(at);
                            row.message = reason;
                        });
                        self.end_for_rollback();
                    }
                    Err(reason) => self.end_leaf(node, NodeState::Failed, reason),
                }
                Ok(())
            }
            Event::ProgressDeadline => {
                self.expect_control(Control::Active, "progress deadline")?;
                // A stage's rollback order has a deadline of its own.
                if !self.progress.owes_progress() || self.progress.stage_in_rollback().is_some() {
                    return Err(self.wrong_state("progress deadline"));
                }
                match self.plan.on_failure {
                    OnFailure::RollBack if self.no_way_back().is_none() => self.end_for_rollback(),
                    OnFailure::RollBack | OnFailure::Block => {
                        self.progress.stalled = true;
                        self.withdraw_held();
                    }
                }
                Ok(())
            }
            Event::RollbackStarted(_) => {
                self.expect_all_ended("rollback started")?;
                self.progress.control = Control::RollingBack;
                Ok(())
            }
            Event::RollbackImpossible(_) => {
                self.expect_all_ended("rollback impossible")?;
                self.end(Ending::Failed);
                Ok(())
            }
            Event::RollbackEnded { ending } => {
                self.expect_control(Control::RollingBack, "rollback ended")?;
                self.end(match ending {
                    Ending::Succeeded => Ending::RolledBack,
                    Ending::Failed | Ending::Cancelled | Ending::RolledBack => Ending::Failed,
                });
                Ok(())
            }
            Event::StageRollback { node, now } => self.stage_rollback_went_on(node, now),
            Event::TrafficChanged { number, error } => self.traffic_changed(number, error),
            Event::Advance => {
                self.sweep();
                self.withdraw_held();
                self.schedule_all();
                Ok(())
            }
        }
    }

    fn step_finished(
        &mut self,
        node: NodeIndex,
        attempt: u32,
        result: TaskResult,
    ) -> Result<(), Refused> {
        let late = self.is_late(node, attempt, result.outcome);
        if !late {
            self.current(node, attempt, |kind| matches!(kind, NodeKind::Step { .. }))?;
        }
        let cancelling = self.progress.state(node) == NodeState::Cancelling;
        let outcome = result.outcome;
        let message = result.message.clone();
        self.change(node, |row| row.result = Some(result));
        match outcome {
            Outcome::Succeeded => self.end_leaf(node, NodeState::Succeeded, message),
            // Of server work nothing hangs on what cannot be known: nobody has to decide before the others go on. The
            // result says it.
            Outcome::Unknown if self.is_server_work(node) => {
                self.end_leaf(node, NodeState::Failed, message);
            }
            Outcome::Unknown => self.end_leaf(node, NodeState::Unknown, message),
            Outcome::Failed | Outcome::TimedOut | Outcome::Refused | Outcome::Revoked
                if cancelling =>
            {
                self.end_leaf(node, NodeState::Cancelled, message);
            }
            Outcome::Failed | Outcome::TimedOut
                if self.may_repeat(node) && !self.under_cancel(node) && !self.progress.stalled =>
            {
                self.change(node, |row| row.message = message);
                self.start(node);
            }
            Outcome::Failed | Outcome::TimedOut | Outcome::Refused | Outcome::Revoked => {
                self.end_leaf(node, NodeState::Failed, message);
            }
        }
        if late {
            // What stood against others is gone.
            self.schedule_all();
        }
        Ok(())
    }

    /// Whether a step is attempted again by itself: only where its author said that repeating does no harm.
    fn may_repeat(&self, node: NodeIndex) -> bool {
        let NodeKind::Step { step } = &self.plan.nodes[node as usize].kind else {
            return false;
        };
        // Attempts that a person asked for count too: a retried step does not start its automatic attempts afresh.
        let attempt = self.progress.node(node).attempt;
        match &self.plan.steps[*step as usize] {
            StepTemplate::Fetch | StepTemplate::Unpack | StepTemplate::PlaceFiles(_) => attempt < 3,
            StepTemplate::Activate | StepTemplate::Script(_) => false,
            StepTemplate::Stack(step) => step.repeatable && attempt <= step.retries,
        }
    }

    fn end_leaf(&mut self, node: NodeIndex, state: NodeState, message: String) {
        self.put(node, state, message);
        self.after_leaf(node);
    }

    /// A server whose last leaf has ended well is available again.
    pub(super) fn release_if_done(&mut self, node: NodeIndex) {
        if let Some(unit) = self.unit_of(node)
            && self.progress.state(unit) == NodeState::Succeeded
        {
            self.delta.effects.push(Effect::Release(unit));
        }
    }

    pub(super) fn put(&mut self, node: NodeIndex, state: NodeState, message: String) {
        let at = self.at;
        self.change(node, |row| {
            row.state = state;
            row.finished_at = Some(at);
            row.message = message;
        });
    }

    pub(super) fn after_leaf(&mut self, node: NodeIndex) {
        if self.progress.state(node).needs_mending() {
            self.withdraw_held();
        }
        let Some(unit) = self.unit_of(node) else {
            return self.schedule_all();
        };
        if self.under_cancel(unit) {
            self.cancel_in(unit);
        } else if self.progress.node(unit).ignored {
            self.leave_unit(unit);
        } else if self.progress.state(unit) == NodeState::Running {
            // Still the same server's turn: nothing else in the tree is affected.
            return self.schedule_from(unit);
        }
        if self.progress.live[unit as usize].count == 0 {
            self.release_if_done(unit);
            // While the order as a whole is being ended, `settle` goes on.
            if self.progress.control == Control::Active {
                self.schedule_all();
            }
        }
    }
}
