//! A world around one order: small plans, and a runner that checks after every event what must always hold.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use crate::{
    digest::Digest,
    id::{AppId, InstanceId, ServerId},
    limits::{Amount, Limits},
    order::{Action, Control, Ending, OrderState},
    plan::{Level, Node, NodeIndex, NodeKind, Part, Plan, StepTemplate, TrafficAction, Unit},
    plugin::{
        Judgement, OnFailure, Phase, RestoreWeight, StackAction, StackStep, UnitState, Verdict,
    },
    progress::{Admission, NodeProgress, NodeState, Progress},
    reducer::{Delta, Effect, Event, MAX_ROWS, Refused, apply, due, unit_state},
    task::{Outcome, PackageFormat, PackageRef, TaskResult},
    time::Timestamp,
};

/// A leaf of a plan to be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaf {
    Drain,
    Restore,
    Set,
    Fetch,
    Activate,
    /// Phase and automatic retries; repeatable where there are some.
    Stack(Phase, u32),
    Gate,
    Pause,
    Judge,
}

/// A plan to be built.
#[derive(Debug, Clone)]
pub(super) enum Tree {
    Sequence(Level, Vec<Tree>),
    /// Level, max in flight, max failures.
    Parallel(Level, u32, u32, Vec<Tree>),
    Unit(Vec<Leaf>),
    Leaf(Leaf),
}

/// A server as the skeleton makes it.
pub(super) fn server() -> Tree {
    Tree::Unit(vec![
        Leaf::Drain,
        Leaf::Fetch,
        Leaf::Stack(Phase::Stop, 0),
        Leaf::Activate,
        Leaf::Stack(Phase::Check, 0),
        Leaf::Restore,
    ])
}

pub(super) fn group(servers: usize) -> Tree {
    Tree::Parallel(Level::Group, 0, 0, vec![server(); servers])
}

pub(super) fn application(children: Vec<Tree>) -> Tree {
    Tree::Sequence(Level::Application, children)
}

/// An order of applications one after the other.
pub(super) fn plan(children: Vec<Tree>) -> Plan {
    build(&Tree::Sequence(Level::Order, children))
}

pub(super) fn build(tree: &Tree) -> Plan {
    let package = PackageRef {
        digest: Digest::of(b"package"),
        size_bytes: 7,
        format: PackageFormat::Plain,
        file_name: "shop".to_owned(),
        version: "1".to_owned(),
    };
    let mut plan = Plan {
        schema: Plan::SCHEMA,
        limits: Limits {
            max_in_flight: 10,
            max_failures: Amount::Count(0),
            ..Limits::default()
        },
        on_failure: OnFailure::Block,
        progress_deadline_ms: None,
        delivery_deadline_ms: 1,
        strategy: None,
        parts: vec![Part {
            key: "shop".to_owned(),
            app: AppId::from_uuid(Uuid::from_u128(1)),
            instance: InstanceId::from_uuid(Uuid::from_u128(2)),
            package,
            stack: crate::manifest::PluginRef {
                name: "binary".to_owned(),
                version: semver::Version::new(1, 0, 0),
                digest: Digest::of(b"plugin"),
            },
            pools: Vec::new(),
            env: BTreeMap::new(),
            stop: Vec::new(),
            start: Vec::new(),
            check: Vec::new(),
        }],
        steps: Vec::new(),
        units: Vec::new(),
        nodes: Vec::new(),
        reads: BTreeMap::new(),
    };
    add(&mut plan, None, tree);
    plan
}

fn add(plan: &mut Plan, parent: Option<NodeIndex>, tree: &Tree) {
    let index = u32::try_from(plan.nodes.len()).unwrap();
    let (level, kind) = match tree {
        Tree::Sequence(level, _) => (*level, NodeKind::Sequence),
        Tree::Parallel(level, max_in_flight, max_failures, _) => (
            *level,
            NodeKind::Parallel {
                max_in_flight: *max_in_flight,
                max_failures: *max_failures,
            },
        ),
        Tree::Unit(_) => {
            let unit = u32::try_from(plan.units.len()).unwrap();
            plan.units.push(Unit {
                part: 0,
                server: ServerId::from_uuid(Uuid::from_u128(100 + u128::from(unit))),
                server_name: format!("web-{unit}"),
                cell: "a".to_owned(),
                env: BTreeMap::new(),
                restore: RestoreWeight::Remembered,
                before: None,
                drained_by: None,
                reads: Vec::new(),
            });
            (Level::Server, NodeKind::Unit { unit })
        }
        Tree::Leaf(leaf) => (Level::Step, leaf_kind(plan, *leaf)),
    };
    plan.nodes.push(Node {
        parent,
        level,
        name: format!("{level:?} {index}"),
        kind,
    });
    match tree {
        Tree::Sequence(_, children) | Tree::Parallel(_, _, _, children) => {
            for child in children {
                add(plan, Some(index), child);
            }
        }
        Tree::Unit(leaves) => {
            for leaf in leaves {
                add(plan, Some(index), &Tree::Leaf(*leaf));
            }
        }
        Tree::Leaf(_) => {}
    }
}

fn leaf_kind(plan: &mut Plan, leaf: Leaf) -> NodeKind {
    let template = match leaf {
        Leaf::Drain => return NodeKind::Traffic(TrafficAction::Drain { deadline_ms: 1 }),
        Leaf::Restore => return NodeKind::Traffic(TrafficAction::Restore),
        Leaf::Set => {
            return NodeKind::Traffic(TrafficAction::Set {
                part: 0,
                weights: Vec::new(),
            });
        }
        Leaf::Gate => {
            return NodeKind::Gate {
                message: "look".to_owned(),
            };
        }
        Leaf::Pause => return NodeKind::Pause { duration_ms: 1 },
        Leaf::Judge => {
            return NodeKind::Judge {
                stage: "s".to_owned(),
            };
        }
        Leaf::Fetch => StepTemplate::Fetch,
        Leaf::Activate => StepTemplate::Activate,
        Leaf::Stack(phase, retries) => StepTemplate::Stack(StackStep {
            phase,
            name: format!("{phase:?}"),
            action: StackAction::Stop { grace_ms: 1 },
            run_as: None,
            env: BTreeMap::new(),
            timeout_ms: 1,
            retries,
            repeatable: retries > 0,
        }),
    };
    let step = plan.steps.iter().position(|known| *known == template);
    let step = step.unwrap_or_else(|| {
        plan.steps.push(template);
        plan.steps.len() - 1
    });
    NodeKind::Step {
        step: u32::try_from(step).unwrap(),
    }
}

pub(super) fn result(outcome: Outcome) -> Box<TaskResult> {
    Box::new(TaskResult {
        outcome,
        exit_code: None,
        output: String::new(),
        dropped_bytes: 0,
        message: String::new(),
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

    /// Rows, states and counters are what the delta says and what a load from rows gives.
    fn check_delta(&mut self, before: &Progress, event: &Event, delta: &Delta) {
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
        assert!(
            was.remembered.is_none() || was.remembered == is.remembered,
            "{event:?}: node {node} forgot its weights"
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
            if is.attempt > was.attempt && !restore {
                // A gate can open and, as nothing else is under way any more, be ended by a rollback in the same turn.
                let ended_at_once = is.state == NodeState::Cancelled
                    || (is.state == NodeState::AwaitingConfirmation
                        && before.control == Control::Active
                        && self.progress.control == Control::EndingForRollback);
                assert!(
                    ended_at_once || !self.ancestors(node).any(|row| row.cancel || row.ignored),
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
                    .any(|row| row.cancel || row.ignored || row.locked.is_some()),
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
    fn check_effects(&mut self, event: &Event, delta: &Delta) {
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
            (
                Effect::Release(_)
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

    /// Limits hold; whoever was drained for nothing gets its weight back.
    fn check_limits(&self) {
        let ended = |node| self.ancestors(node).any(|row| row.cancel || row.ignored);
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
        if self.more || !self.progress.is_quiet() {
            return;
        }
        for unit in &self.progress.unit_nodes {
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
                && unit_state(&self.plan, &self.progress, *unit) == UnitState::Untouched
            {
                assert!(restore.attempt > 0, "unit {unit} was left without traffic");
            }
        }
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
                if drain && self.progress.node(node).remembered.is_none() {
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
            let acted = [Action::Confirm { node: None }, retry, Action::Run]
                .into_iter()
                .chain(locked)
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
        | Effect::Judge { node, .. } => Some(node),
        Effect::Initialise | Effect::StartRollback | Effect::Finish => None,
    }
}

/// Everything but the positions that only make scanning faster.
fn assert_same(expect: &Progress, got: &Progress, what: &str) {
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
}
