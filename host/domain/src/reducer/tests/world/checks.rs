//! What must hold after every event, whatever came before it.

use std::collections::BTreeSet;

use crate::{
    order::{Action, Control, Ending},
    plan::{NodeIndex, NodeKind, TrafficAction},
    plugin::UnitState,
    progress::{Admission, NodeState, Progress, StageRollback, Undo},
    reducer::{Delta, Effect, Event, MAX_ROWS, due, unit_state},
};

use super::World;

impl World {
    /// Rows, states and counters are what the delta says and what a load from rows gives.
    pub(super) fn check_delta(&mut self, before: &Progress, event: &Event, delta: &Delta) {
        let now = &self.progress;
        let loaded = Progress::load(&self.plan, now.control, now.stalled, self.rows.clone());
        assert_same(&loaded, now, &format!("loaded after {event:?}"));
        assert_eq!(loaded.order_state(), now.order_state());
        let states = (0u32..)
            .zip(before.states.iter().zip(&now.states))
            .filter(|(_, (before, now))| before != now)
            .map(|(node, (_, now))| (node, *now))
            .collect::<Vec<_>>();
        assert_eq!(delta.states, states, "{event:?}");
        assert!(
            delta.rows.len() <= MAX_ROWS,
            "{event:?} changed {} rows",
            delta.rows.len()
        );
        self.most_rows = self.most_rows.max(delta.rows.len());
        for node in &delta.rows {
            self.check_node(before, *node, event);
        }
    }

    /// What one changed node may and may not have done.
    fn check_node(&self, before: &Progress, node: NodeIndex, event: &Event) {
        let (was, is) = (before.node(node), self.progress.node(node));
        let planned = &self.plan.nodes[node as usize];
        if let Event::Act(Action::RunAgain { .. }) = event {
            assert!(
                is.attempt == was.attempt || is.attempt == was.attempt + 1,
                "attempts of {node} go on counting"
            );
            return;
        }
        assert!(
            was.remembered.is_none() || was.remembered == is.remembered,
            "{event:?}: node {node} forgot its weights"
        );
        assert!(
            was.shifted.is_none() || was.shifted == is.shifted,
            "{event:?}: node {node} forgot the weights before its shift"
        );
        assert!(
            matches!(was.undo, Undo::None | Undo::Due)
                || was.undo == is.undo
                || matches!(event, Event::Act(Action::RollBackStage { .. })),
            "{event:?}: node {node} was taken back twice"
        );
        if planned.kind.is_leaf() {
            assert!(
                !was.state.is_settled() || is.state == was.state,
                "{event:?}: leaf {node} was {:?} and is {:?}",
                was.state,
                is.state
            );
            assert!(
                is.attempt == was.attempt || is.attempt == was.attempt + 1,
                "{event:?}: attempts of {node}"
            );
            let restore = planned.kind == NodeKind::Traffic(TrafficAction::Restore);
            let undone = is.undo == Undo::Due;
            if is.attempt > was.attempt && !restore && !undone {
                // A gate can open and, as nothing else is under way any more, be ended by a rollback in the same turn.
                let ended_at_once = is.state == NodeState::Cancelled
                    || (is.state == NodeState::AwaitingConfirmation
                        && before.control == Control::Active
                        && self.progress.control == Control::EndingForRollback);
                assert!(
                    ended_at_once
                        || !self
                            .ancestors(node)
                            .any(|row| row.is_ended() || row.ignored),
                    "{event:?}: {node} started in a dead end"
                );
                let unit = self.unit_of(node);
                // An automatic new attempt is still what was begun before the lock.
                if unit.is_none() && !was.state.is_busy() {
                    let locked = self.ancestors(node).any(|row| row.locked.is_some());
                    assert!(!locked, "{event:?}: {node} started under a lock");
                    assert!(!self.progress.stalled, "{event:?}: {node} while stalled");
                }
                if !ended_at_once && !was.state.is_busy() {
                    self.check_order(node, unit, event);
                }
                assert!(
                    unit.is_some()
                        || was.state.is_busy()
                        || self.progress.units.troubled() <= self.progress.allowed_failures,
                    "{event:?}: {node} started after too many failures"
                );
            }
        } else if was.admission == Admission::None && is.admission == Admission::Asked {
            assert!(
                !self
                    .ancestors(node)
                    .any(|row| row.is_ended() || row.ignored || row.locked.is_some()),
                "{event:?}: unit {node} was asked for under a lock or in a dead end"
            );
            assert!(!self.progress.stalled && is.drift.is_empty());
            let failed = self.progress.units.troubled();
            assert!(
                failed <= self.progress.allowed_failures,
                "{event:?}: unit {node} after {failed} failures"
            );
            self.check_order(node, None, event);
        } else if is.admission == Admission::Admitted && was.admission != Admission::Admitted {
            assert!(
                self.progress.units.troubled() <= self.progress.allowed_failures,
                "{event:?}: unit {node} admitted after too many failures"
            );
            assert!(
                !self.ancestors(node).any(|row| row.locked.is_some()),
                "{event:?}: unit {node} admitted under a lock"
            );
        }
    }

    /// Whatever stands before a node in a sequence is done; up to `within`, where given.
    fn check_order(&self, node: NodeIndex, within: Option<NodeIndex>, event: &Event) {
        let mut at = node;
        while let Some(parent) = self.plan.nodes[at as usize].parent {
            if !matches!(
                self.plan.nodes[parent as usize].kind,
                NodeKind::Parallel { .. }
            ) {
                for child in self.progress.children(parent) {
                    assert!(
                        *child >= at || self.progress.state(*child).is_settled(),
                        "{event:?}: {node} started before {child}"
                    );
                }
            }
            if Some(parent) == within {
                return;
            }
            at = parent;
        }
    }

    /// Emitted and unanswered effects are what recovery would find.
    pub(super) fn check_effects(&mut self, event: &Event, delta: &Delta) {
        let answered = |effect: &Effect| match (effect, event) {
            (Effect::Initialise, Event::Initialised { .. }) => !delta.again,
            (Effect::Initialise, Event::InitialisationFailed { .. }) => true,
            (Effect::Initialise, _) => self.progress.control != Control::Initialising,
            (Effect::Admit(unit), Event::UnitAdmitted(node) | Event::UnitDrifted(node, _))
                if node == unit =>
            {
                true
            }
            (Effect::Admit(unit), _) => delta.effects.contains(&Effect::Release(*unit)),
            (
                Effect::Dispatch { node, attempt } | Effect::Revoke { node, attempt },
                Event::StepFinished {
                    node: about,
                    attempt: of,
                    ..
                },
            ) if (node, attempt) == (about, of) => true,
            (Effect::Dispatch { node, attempt }, _) => delta.effects.contains(&Effect::Revoke {
                node: *node,
                attempt: *attempt,
            }),
            (
                Effect::Traffic { node, attempt },
                Event::TrafficDone {
                    node: about,
                    attempt: of,
                }
                | Event::TrafficFailed {
                    node: about,
                    attempt: of,
                    ..
                },
            ) => (node, attempt) == (about, of),
            (Effect::Pause { node, .. } | Effect::Judge { node, .. }, _) => {
                delta.states.iter().any(|(changed, _)| changed == node)
            }
            (Effect::StartRollback, Event::RollbackStarted(_) | Event::RollbackImpossible(_)) => {
                true
            }
            (Effect::RollBackStage(stage), Event::StageRollback { node, .. }) => stage == node,
            (Effect::ChangeTraffic { number }, Event::TrafficChanged { number: of, .. }) => {
                number == of
            }
            (
                Effect::Release(_)
                | Effect::RollBackStage(_)
                | Effect::ChangeTraffic { .. }
                | Effect::Revoke { .. }
                | Effect::Traffic { .. }
                | Effect::StartRollback
                | Effect::Finish,
                _,
            ) => false,
        };
        let mut outstanding = std::mem::take(&mut self.outstanding);
        outstanding.retain(|effect| !answered(effect));
        for effect in &delta.effects {
            match effect {
                Effect::Release(_) => continue,
                Effect::Dispatch { .. }
                | Effect::Traffic { .. }
                | Effect::Pause { .. }
                | Effect::Judge { .. } => {
                    assert!(self.started.insert(*effect), "{effect:?} started twice");
                }
                Effect::Initialise
                | Effect::Admit(_)
                | Effect::Revoke { .. }
                | Effect::StartRollback
                | Effect::RollBackStage(_)
                | Effect::ChangeTraffic { .. }
                | Effect::Finish => {}
            }
            // What started and was ended in the same turn needs nothing any more.
            let gone = match effect {
                Effect::Dispatch { node, attempt } => delta.effects.contains(&Effect::Revoke {
                    node: *node,
                    attempt: *attempt,
                }),
                Effect::Pause { node, .. } | Effect::Judge { node, .. } => {
                    !self.progress.state(*node).is_busy()
                }
                Effect::Admit(unit) => matches!(
                    self.progress.node(*unit).admission,
                    Admission::None | Admission::Admitted
                ),
                Effect::Initialise
                | Effect::Release(_)
                | Effect::Revoke { .. }
                | Effect::Traffic { .. }
                | Effect::StartRollback
                | Effect::RollBackStage(_)
                | Effect::ChangeTraffic { .. }
                | Effect::Finish => false,
            };
            if !gone {
                outstanding.insert(*effect);
            }
        }
        self.outstanding = outstanding;
        let mut expect = due(&self.plan, &self.progress)
            .into_iter()
            .filter(|effect| !matches!(effect, Effect::Release(_)))
            .collect::<BTreeSet<_>>();
        if self.more {
            // What is left to be ended is seen only when all turns are done.
            expect.remove(&Effect::StartRollback);
            self.outstanding.remove(&Effect::StartRollback);
        }
        assert_eq!(self.outstanding, expect, "after {event:?}");
    }

    fn all_before_restore_succeeded(&self, unit: NodeIndex) -> bool {
        self.progress
            .children(unit)
            .iter()
            .take_while(|leaf| {
                self.plan.nodes[**leaf as usize].kind != NodeKind::Traffic(TrafficAction::Restore)
            })
            .all(|leaf| self.progress.state(*leaf) == NodeState::Succeeded)
    }

    /// Limits hold; whoever was drained for nothing gets its weight back.
    pub(super) fn check_limits(&self) {
        let ended = |node| {
            self.ancestors(node)
                .any(|row| row.is_ended() || row.ignored)
        };
        let live = |node: NodeIndex| {
            (node..self.progress.subtree_end[node as usize])
                .any(|index| self.progress.live[index as usize].own && !ended(index))
        };
        let units = self.progress.unit_nodes.iter().filter(|unit| live(**unit));
        assert!(
            units.count() <= self.plan.limits.max_in_flight.max(1) as usize,
            "too many servers at once"
        );
        for (node, planned) in (0u32..).zip(&self.plan.nodes) {
            if let NodeKind::Parallel { max_in_flight, .. } = planned.kind
                && max_in_flight > 0
            {
                let children = self.progress.children(node).iter();
                assert!(
                    children.filter(|child| live(**child)).count() <= max_in_flight as usize,
                    "too many children of {node} at once"
                );
            }
        }
        let counts = self.progress.counts(&self.plan);
        assert_eq!(counts.total() as usize, self.plan.units.len(), "{counts:?}");
        if self.progress.order_state().is_terminal() {
            assert_eq!((counts.waiting, counts.running), (0, 0), "{counts:?}");
        }
        if self.more || !self.progress.is_quiet() {
            return;
        }
        let person_ended_it = matches!(
            self.progress.control,
            Control::Active | Control::Ended(Ending::Cancelled | Ending::Succeeded)
        );
        for shift in &self.progress.shifts {
            let row = self.progress.node(*shift);
            if person_ended_it && ended(*shift) && row.shifted.is_some() {
                assert!(
                    matches!(row.undo, Undo::Done | Undo::Failed),
                    "the weights before the shift {shift} are not back"
                );
            }
        }
        for unit in &self.progress.unit_nodes {
            // Brought back by an order of its own.
            let stage = self.progress.stage_of(*unit);
            if self.progress.node(stage).rollback == Some(StageRollback::Done) {
                continue;
            }
            let leaf = |wanted: fn(&TrafficAction) -> bool| {
                let children = self.progress.children(*unit).iter().copied();
                children
                    .filter(|leaf| {
                        matches!(&self.plan.nodes[*leaf as usize].kind, NodeKind::Traffic(action) if wanted(action))
                    })
                    .map(|leaf| self.progress.node(leaf))
                    .next()
            };
            let drain = leaf(|action| matches!(action, TrafficAction::Drain { .. }));
            let restore = leaf(|action| matches!(action, TrafficAction::Restore));
            if let (Some(drain), Some(restore)) = (drain, restore)
                && ended(*unit)
                && drain.remembered.is_some()
            {
                let all_good = self.all_before_restore_succeeded(*unit);
                let untouched =
                    unit_state(&self.plan, &self.progress, *unit) == UnitState::Untouched;
                if all_good || (untouched && !self.plan.brings_back) {
                    assert!(restore.attempt > 0, "unit {unit} was left without traffic");
                } else if untouched {
                    assert_eq!(restore.attempt, 0, "unit {unit} still has what was to go");
                }
            }
        }
    }
}

/// Everything but the positions that only make scanning faster.
pub(super) fn assert_same(expect: &Progress, got: &Progress, what: &str) {
    assert_eq!(expect.control, got.control, "{what}");
    assert_eq!(expect.stalled, got.stalled, "{what}");
    assert_eq!(expect.nodes, got.nodes, "{what}");
    assert_eq!(expect.states, got.states, "{what}");
    assert_eq!(expect.tallies, got.tallies, "{what}");
    assert_eq!(expect.units, got.units, "{what}");
    assert_eq!(expect.live, got.live, "{what}");
    assert_eq!(
        (expect.live_units, expect.busy_leaves, expect.asked),
        (got.live_units, got.busy_leaves, got.asked),
        "{what}"
    );
    assert_eq!(expect.ended, got.ended, "{what}");
}
