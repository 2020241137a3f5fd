//! A world around one order: a runner that checks after every event what must always hold, and answers what is due.

mod checks;

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use crate::{
    order::{Action, Control, Ending, OrderState},
    plan::{NodeIndex, NodeKind, Plan, TrafficAction},
    plugin::{Judgement, Verdict},
    progress::{NodeProgress, NodeState, Progress, StageRollback},
    reducer::{Delta, Effect, Event, Refused, apply, due},
    task::{Outcome, TaskResult},
    time::Timestamp,
};

use checks::assert_same;

pub(super) fn result(outcome: Outcome) -> Box<TaskResult> {
    Box::new(TaskResult {
        outcome,
        exit_code: None,
        output: String::new(),
        dropped_bytes: 0,
        message: String::new(),
        fault: None,
        started_at: None,
        finished_at: Timestamp::from_unix_ms(0),
    })
}

/// One order that runs. Every event goes through [`World::apply`], which checks all that must always hold.
pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) progress: Progress,
    rows: BTreeMap<NodeIndex, NodeProgress>,
    /// Effects that were emitted and not answered: what [`due`] must list.
    outstanding: BTreeSet<Effect>,
    started: BTreeSet<Effect>,
    pub(super) more: bool,
    pub(super) events: usize,
    pub(super) most_rows: usize,
}

impl World {
    pub(super) fn new(plan: Plan) -> Self {
        Self {
            progress: Progress::load(&plan, Control::NotStarted, false, []),
            plan,
            rows: BTreeMap::new(),
            outstanding: BTreeSet::new(),
            started: BTreeSet::new(),
            more: false,
            events: 0,
            most_rows: 0,
        }
    }

    /// A world whose order was run and is active.
    pub(super) fn running(plan: Plan) -> Self {
        let mut world = Self::new(plan);
        world.act(Action::Run).unwrap();
        world
            .apply(Event::Initialised { locked: Vec::new() })
            .unwrap();
        world.advance();
        world
    }

    /// Does what an engine does for `more`; says in how many turns.
    pub(super) fn advance(&mut self) -> usize {
        let mut turns = 0;
        while self.more {
            self.apply(Event::Advance).unwrap();
            turns += 1;
            assert!(turns <= 2 * self.plan.nodes.len() + 2, "`more` never ends");
        }
        turns
    }

    /// Does what an engine does for `again`.
    pub(super) fn act(&mut self, action: Action) -> Result<Delta, Refused> {
        self.send(Event::Act(action))
    }

    pub(super) fn send(&mut self, event: Event) -> Result<Delta, Refused> {
        let mut delta = self.apply(event.clone())?;
        let mut turns = 0;
        while delta.again {
            delta = self.apply(event.clone())?;
            turns += 1;
            assert!(turns <= self.plan.nodes.len(), "`again` never ends");
        }
        Ok(delta)
    }

    pub(super) fn apply(&mut self, event: Event) -> Result<Delta, Refused> {
        let before = self.progress.clone();
        self.events += 1;
        let at = Timestamp::from_unix_ms(i64::try_from(self.events).unwrap());
        let answer = apply(&self.plan, &mut self.progress, event.clone(), at);
        match &answer {
            Err(refused) => {
                assert_same(&before, &self.progress, &format!("{event:?}: {refused}"));
                let over = matches!(before.control, Control::Ended(_));
                assert_eq!(over, *refused == Refused::Terminal, "{event:?}");
            }
            Ok(delta) => {
                assert!(
                    !before.order_state().is_terminal(),
                    "{event:?} after the end"
                );
                for row in &delta.rows {
                    self.rows.insert(*row, self.progress.node(*row).clone());
                }
                self.more =
                    !self.is_over() && (delta.more || (self.more && event != Event::Advance));
                self.check_delta(&before, &event, delta);
                self.check_effects(&event, delta);
                self.check_limits();
            }
        }
        answer
    }

    fn ancestors(&self, node: NodeIndex) -> impl Iterator<Item = &NodeProgress> {
        std::iter::successors(Some(node), |at| self.plan.nodes[*at as usize].parent)
            .map(|at| self.progress.node(at))
    }

    fn unit_of(&self, node: NodeIndex) -> Option<NodeIndex> {
        std::iter::successors(Some(node), |at| self.plan.nodes[*at as usize].parent)
            .find(|at| matches!(self.plan.nodes[*at as usize].kind, NodeKind::Unit { .. }))
    }

    // -------------------------------------------------------------------------------- an obliging world

    /// What is due, apart from releases.
    pub(super) fn due(&self) -> Vec<Effect> {
        let mut effects = due(&self.plan, &self.progress);
        effects.retain(|effect| !matches!(effect, Effect::Release(_) | Effect::Finish));
        effects
    }

    /// The answer to an effect when all goes well.
    pub(super) fn good_answer(&self, effect: Effect) -> Option<Event> {
        Some(match effect {
            Effect::Initialise => Event::Initialised { locked: Vec::new() },
            Effect::Admit(node) => Event::UnitAdmitted(node),
            Effect::Dispatch { node, attempt } => Event::StepFinished {
                node,
                attempt,
                result: result(Outcome::Succeeded),
            },
            Effect::Revoke { node, attempt } => Event::StepFinished {
                node,
                attempt,
                result: result(Outcome::Revoked),
            },
            Effect::Traffic { node, attempt } => {
                let drain = matches!(
                    self.plan.nodes[node as usize].kind,
                    NodeKind::Traffic(TrafficAction::Drain { .. })
                );
                let shift = matches!(
                    self.plan.nodes[node as usize].kind,
                    NodeKind::Traffic(TrafficAction::Set { .. })
                );
                if shift && self.progress.node(node).shifted.is_none() {
                    Event::ShiftRemembered {
                        node,
                        attempt,
                        weights: vec![attempt],
                    }
                } else if drain && self.progress.node(node).remembered.is_none() {
                    Event::TrafficRemembered {
                        node,
                        attempt,
                        weights: Vec::new(),
                    }
                } else {
                    Event::TrafficDone { node, attempt }
                }
            }
            Effect::Pause { node, attempt } => Event::PauseElapsed { node, attempt },
            Effect::Judge { node, attempt } => Event::Judged {
                node,
                attempt,
                judgement: Ok(Judgement {
                    verdict: Verdict::GoOn,
                    reason: String::new(),
                }),
            },
            Effect::StartRollback => {
                Event::RollbackStarted(crate::id::OrderId::from_uuid(Uuid::from_u128(3)))
            }
            Effect::RollBackStage(node) => Event::StageRollback {
                node,
                now: StageRollback::Done,
            },
            Effect::ChangeTraffic { number } => Event::TrafficChanged {
                number,
                error: None,
            },
            Effect::Release(_) | Effect::Finish => return None,
        })
    }

    /// Answers everything that is due, well, until nothing is due.
    pub(super) fn settle(&mut self) {
        for _ in 0..20 * self.plan.nodes.len() + 100 {
            self.advance();
            let Some(answer) = self
                .due()
                .first()
                .and_then(|effect| self.good_answer(*effect))
            else {
                return;
            };
            self.send(answer).unwrap();
        }
        panic!("effects never end: {:?}", self.due());
    }

    /// Answers everything, and does what a patient person would, until the order is over.
    pub(super) fn finish(&mut self) {
        for _ in 0..3 * self.plan.nodes.len() + 50 {
            self.settle();
            if self.is_over() {
                return;
            }
            if self.progress.control == Control::RollingBack {
                self.apply(Event::RollbackEnded {
                    ending: Ending::Succeeded,
                })
                .unwrap();
                continue;
            }
            let locked = (0..u32::try_from(self.plan.nodes.len()).unwrap())
                .find(|node| {
                    self.progress.node(*node).locked.is_some()
                        && !self.progress.state(*node).is_settled()
                })
                .map(|node| Action::Unlock { node });
            let retry = if self.events.is_multiple_of(2) {
                Action::Retry { node: 0 }
            } else {
                Action::Ignore { node: 0 }
            };
            let rollback_of = |node: &NodeIndex| &self.progress.node(*node).rollback;
            let stages = self.progress.stage_nodes.clone();
            // The rollback order of a stage ends, and a person goes on.
            let under_way = stages
                .iter()
                .find(|node| matches!(rollback_of(node), Some(StageRollback::Running { .. })));
            if let Some(node) = under_way.copied() {
                let now = StageRollback::Done;
                self.apply(Event::StageRollback { node, now }).unwrap();
                continue;
            }
            let again = self.events.is_multiple_of(3);
            let stages = stages.into_iter().flat_map(|node| {
                let first = if again {
                    Action::RunAgain { node }
                } else {
                    Action::GoOn { node }
                };
                let reason = String::new();
                [first, Action::RollBackStage { node, reason }]
                    .into_iter()
                    .take(match &self.progress.node(node).rollback {
                        Some(StageRollback::Failed { .. }) => 2,
                        Some(_) => 1,
                        None => 0,
                    })
            });
            let stages: Vec<Action> = stages.collect();
            let acted = [Action::Confirm { node: None }, retry, Action::Run]
                .into_iter()
                .chain(locked)
                .chain(stages)
                .filter(|action| self.act(action.clone()).is_ok())
                .count();
            assert!(
                acted > 0,
                "stuck in {:?}: {:?} {:?}",
                self.progress.order_state(),
                self.progress.states,
                self.rows
            );
        }
        panic!("never over: {:?}", self.progress.states);
    }

    pub(super) fn is_over(&self) -> bool {
        self.progress.order_state().is_terminal()
    }

    // -------------------------------------------------------------------------------- for examples

    pub(super) fn order(&self) -> OrderState {
        self.progress.order_state()
    }

    pub(super) fn state(&self, node: NodeIndex) -> NodeState {
        self.progress.state(node)
    }

    /// Ends the running step in a unit with an outcome.
    pub(super) fn finish_step(&mut self, unit: NodeIndex, outcome: Outcome) -> NodeIndex {
        let (node, attempt) = self.running_in(unit);
        self.send(Event::StepFinished {
            node,
            attempt,
            result: result(outcome),
        })
        .unwrap();
        node
    }

    /// The leaf under way in a node, and its attempt.
    pub(super) fn running_in(&self, node: NodeIndex) -> (NodeIndex, u32) {
        let leaf = (node..self.progress.subtree_end[node as usize])
            .find(|leaf| {
                self.plan.nodes[*leaf as usize].kind.is_leaf()
                    && self.progress.state(*leaf).is_busy()
            })
            .unwrap_or_else(|| panic!("nothing runs in {node}: {:?}", self.progress.states));
        (leaf, self.progress.node(leaf).attempt)
    }

    /// Answers well what is due in a node until `leaf` runs.
    pub(super) fn run_to(&mut self, leaf: NodeIndex) {
        let unit = self.unit_of(leaf).unwrap_or(leaf);
        let end = self.progress.subtree_end[unit as usize];
        while !self.progress.state(leaf).is_busy() {
            let effect = self
                .due()
                .into_iter()
                .find(|effect| effect_node(*effect).is_some_and(|node| (unit..end).contains(&node)))
                .unwrap_or_else(|| panic!("nothing due in {unit}"));
            let answer = self.good_answer(effect).unwrap();
            self.send(answer).unwrap();
        }
    }
}

/// The node an effect is about.
pub(super) fn effect_node(effect: Effect) -> Option<NodeIndex> {
    match effect {
        Effect::Admit(node)
        | Effect::Release(node)
        | Effect::Dispatch { node, .. }
        | Effect::Revoke { node, .. }
        | Effect::Traffic { node, .. }
        | Effect::Pause { node, .. }
        | Effect::Judge { node, .. }
        | Effect::RollBackStage(node) => Some(node),
        Effect::Initialise
        | Effect::StartRollback
        | Effect::ChangeTraffic { .. }
        | Effect::Finish => None,
    }
}
