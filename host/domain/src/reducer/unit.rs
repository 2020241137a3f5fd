//! How far one server's turn got: from it a rollback is planned, and a server that is left gets its weight back.
//!
//! Looks at the plan and the progress, and changes neither.

use std::collections::BTreeSet;

use crate::{
    dispatch::steps_of,
    id::ServerId,
    order::Control,
    plan::{NodeIndex, NodeKind, Plan, StepTemplate, TrafficAction},
    plugin::{Phase, UnitState},
    progress::{Admission, NodeState, Progress, StageRollback},
};

/// How far a unit got: what a rollback is planned from.
#[must_use]
pub fn unit_state(plan: &Plan, progress: &Progress, unit: NodeIndex) -> UnitState {
    let stage = progress.stage_of(unit);
    if progress.node(stage).rollback == Some(StageRollback::Done) {
        // Brought back with its stage.
        return UnitState::Untouched;
    }
    if progress.state(unit) == NodeState::Succeeded {
        return UnitState::Released;
    }
    let touched = progress
        .children(unit)
        .iter()
        .any(|leaf| is_disruptive(plan, *leaf) && progress.node(*leaf).attempt > 0);
    if touched {
        UnitState::Failed
    } else {
        UnitState::Untouched
    }
}

/// The servers on which an order that is being cancelled has started nothing and has no weight to restore: other orders may
/// work on them, however long the rest of the order takes to end.
#[must_use]
pub fn unreached_servers(plan: &Plan, progress: &Progress) -> BTreeSet<ServerId> {
    let restores_weights = progress
        .shifts
        .iter()
        .any(|leaf| progress.node(*leaf).shifted.is_some());
    if progress.control != Control::Cancelling || restores_weights {
        return BTreeSet::new();
    }
    let (mut unreached, mut reached) = (BTreeSet::new(), BTreeSet::new());
    for node in &progress.unit_nodes {
        let NodeKind::Unit { unit } = plan.nodes[*node as usize].kind else {
            continue;
        };
        let Some(unit) = plan.units.get(unit as usize) else {
            continue;
        };
        let untouched = progress.node(*node).admission == Admission::None
            && progress
                .children(*node)
                .iter()
                .all(|leaf| progress.node(*leaf).attempt == 0);
        if untouched {
            unreached.insert(unit.server);
        } else {
            // Another application on the same server.
            reached.insert(unit.server);
        }
    }
    &unreached - &reached
}

/// Whether a unit's turn takes its server out of service: it is drained, or what serves is changed. One that does neither
/// has no seat in the safety envelope.
#[must_use]
pub fn takes_out(plan: &Plan, unit: NodeIndex) -> bool {
    (unit + 1..)
        .zip(plan.nodes.iter().skip(unit as usize + 1))
        .take_while(|(_, node)| node.parent == Some(unit))
        .any(|(leaf, node)| {
            matches!(node.kind, NodeKind::Traffic(TrafficAction::Drain { .. }))
                || is_disruptive(plan, leaf)
        })
}

/// Whether a unit's turn ends with its application stopped: it stops what is installed, and neither installs nor starts
/// anything. (What is released may have nothing to start, such as files that a web server of the machine serves.)
#[must_use]
pub fn takes_offline(plan: &Plan, unit: NodeIndex) -> bool {
    let (mut stops, mut starts) = (false, false);
    for step in steps_of(plan, unit) {
        match step {
            StepTemplate::Activate => starts = true,
            StepTemplate::Stack(step) => {
                stops |= step.phase == Phase::Stop;
                starts |= matches!(step.phase, Phase::Start | Phase::Restart);
            }
            StepTemplate::Fetch
            | StepTemplate::Unpack
            | StepTemplate::PlaceFiles(_)
            | StepTemplate::Script(_) => {}
        }
    }
    stops && !starts
}

/// Whether a leaf, once started, changes what serves on the server.
fn is_disruptive(plan: &Plan, leaf: NodeIndex) -> bool {
    match &plan.nodes[leaf as usize].kind {
        NodeKind::Step { step } => match &plan.steps[*step as usize] {
            // Files are replaced in one moment, under an application that goes on.
            StepTemplate::Fetch | StepTemplate::Unpack | StepTemplate::PlaceFiles(_) => false,
            // What a command did is not for us to know.
            StepTemplate::Activate | StepTemplate::Script(_) => true,
            StepTemplate::Stack(step) => match step.phase {
                Phase::Prepare | Phase::Install | Phase::Configure | Phase::Check => false,
                Phase::Stop | Phase::Deploy | Phase::Start | Phase::Restart | Phase::Uninstall => {
                    true
                }
            },
        },
        NodeKind::Sequence
        | NodeKind::Parallel { .. }
        | NodeKind::Unit { .. }
        | NodeKind::Traffic(_)
        | NodeKind::Gate { .. }
        | NodeKind::Pause { .. }
        | NodeKind::Judge { .. } => false,
    }
}

/// The restore leaf to run when a unit is ended that was drained: where nothing on the server changed, or all that was to be
/// done on it has succeeded, its weight would stay at 0 for nothing. In a rollback a server on which nothing changed still
/// has what was to go: it stays without traffic.
pub(super) fn restore_on_leaving(
    plan: &Plan,
    progress: &Progress,
    unit: NodeIndex,
) -> Option<NodeIndex> {
    let leaves = progress.children(unit);
    let drained = |leaf: &NodeIndex| {
        matches!(
            plan.nodes[*leaf as usize].kind,
            NodeKind::Traffic(TrafficAction::Drain { .. })
        ) && progress.node(*leaf).remembered.is_some()
    };
    let position = leaves.iter().position(|leaf| {
        matches!(
            plan.nodes[*leaf as usize].kind,
            NodeKind::Traffic(TrafficAction::Restore)
        ) && progress.state(*leaf) == NodeState::NotStarted
    })?;
    let untouched = !plan.brings_back && unit_state(plan, progress, unit) == UnitState::Untouched;
    let healthy = leaves[..position]
        .iter()
        .all(|leaf| progress.state(*leaf) == NodeState::Succeeded);
    (leaves.iter().any(drained) && (untouched || healthy)).then(|| leaves[position])
}

/// Whether a server is as it was before its turn: nothing on it changed, and its weight was not taken or is back.
pub(super) fn is_as_before(plan: &Plan, progress: &Progress, unit: NodeIndex) -> bool {
    let leaf_of = |wanted: fn(&TrafficAction) -> bool| {
        progress.children(unit).iter().copied().find(|leaf| {
            matches!(&plan.nodes[*leaf as usize].kind, NodeKind::Traffic(action) if wanted(action))
        })
    };
    let drain = leaf_of(|action| matches!(action, TrafficAction::Drain { .. }));
    let restore = leaf_of(|action| matches!(action, TrafficAction::Restore));
    let drained = drain.is_some_and(|leaf| progress.node(leaf).remembered.is_some());
    let restored = restore.is_none_or(|leaf| progress.state(leaf) == NodeState::Succeeded);
    unit_state(plan, progress, unit) == UnitState::Untouched && (!drained || restored)
}
