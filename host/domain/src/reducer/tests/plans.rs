//! Small plans, and how they are written down.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::{
    digest::Digest,
    id::{AppId, InstanceId, ServerId},
    limits::{Amount, Limits},
    plan::{Level, Node, NodeIndex, NodeKind, Part, Plan, StepTemplate, TrafficAction, Unit},
    plugin::{OnFailure, Phase, RestoreWeight, RollbackScope, StackAction, StackStep},
    task::{PackageFormat, PackageRef},
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
        brings_back: false,
        progress_deadline_ms: None,
        delivery_deadline_ms: 1,
        strategy: None,
        parts: vec![Part {
            key: "shop".to_owned(),
            app: AppId::from_uuid(Uuid::from_u128(1)),
            instance: InstanceId::from_uuid(Uuid::from_u128(2)),
            package: Some(package),
            stack: Some(crate::manifest::PluginRef {
                name: "binary".to_owned(),
                version: semver::Version::new(1, 0, 0),
                digest: Digest::of(b"plugin"),
            }),
            pools: Vec::new(),
            env: BTreeMap::new(),
            prepare: Vec::new(),
            stop: Vec::new(),
            start: Vec::new(),
            check: Vec::new(),
        }],
        steps: Vec::new(),
        units: Vec::new(),
        nodes: Vec::new(),
        reads: BTreeMap::new(),
        left_out: Vec::new(),
        next_id: 0,
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
                part: Some(0),
                server: ServerId::from_uuid(Uuid::from_u128(100 + u128::from(unit))),
                server_name: format!("web-{unit}"),
                cell: "a".to_owned(),
                env: BTreeMap::new(),
                restore: RestoreWeight::Remembered,
                before: None,
                drained_by: None,
                prepared: None,
                reads: Vec::new(),
            });
            (Level::Server, NodeKind::Unit { unit })
        }
        Tree::Leaf(leaf) => (Level::Step, leaf_kind(plan, *leaf)),
    };
    plan.nodes.push(Node {
        id: None,
        parent,
        level,
        name: format!("{level:?} {index}"),
        rollback: RollbackScope::Order,
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
                window_ms: 0,
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
