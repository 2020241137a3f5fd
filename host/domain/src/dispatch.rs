//! From a node of a plan to the task that an agent gets: pure, so that a task can be made again after a crash and is the same.

use crate::{
    digest::Digest,
    id::OrderId,
    manifest::Manifest,
    plan::{NodeIndex, NodeKind, Plan, StepTemplate, Unit},
    plugin::{Phase, StackAction},
    task::{Action, Task, TaskId},
    time::Timestamp,
    value::Environment,
};

/// Time-out of the core's own steps: a fetch of the largest package over a slow line.
pub const CORE_TIMEOUT_MS: u64 = 1_800_000;

/// What a task carries beside what its plan says.
#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    /// The order.
    pub order: OrderId,
    /// The plan's digest.
    pub plan: Digest,
    /// Which attempt.
    pub attempt: u32,
    /// Higher than every fence that an earlier order used on the same server.
    pub fence: u64,
    /// When the agent may no longer start it.
    pub expires_at: Timestamp,
}

/// The unit that a node belongs to, with its node.
#[must_use]
pub fn unit_of(plan: &Plan, node: NodeIndex) -> Option<(NodeIndex, u32, &Unit)> {
    let mut at = Some(node);
    while let Some(index) = at {
        let planned = plan.nodes.get(index as usize)?;
        if let NodeKind::Unit { unit } = planned.kind {
            return Some((index, unit, plan.units.get(unit as usize)?));
        }
        at = planned.parent;
    }
    None
}

/// The name of the release directory that a unit installs.
#[must_use]
pub fn release_name(plan: &Plan, unit: &Unit) -> String {
    let package = &plan.parts[unit.part as usize].package;
    let version: String = package
        .version
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect();
    format!("{version}-{}", package.digest.short())
}

/// The manifest that a unit's activation writes.
#[must_use]
pub fn manifest(plan: &Plan, digest: Digest, unit: &Unit) -> Manifest {
    let part = &plan.parts[unit.part as usize];
    let mut env = part.env.clone();
    env.extend(unit.env.clone());
    Manifest {
        instance: part.instance,
        app: part.app,
        release: release_name(plan, unit),
        package: part.package.clone(),
        stack: part.stack.clone(),
        stop: part.stop.clone(),
        start: part.start.clone(),
        check: part.check.clone(),
        env,
        plan: Some(digest),
    }
}

/// The task of a step; `None` when the node is not a step of a unit.
#[must_use]
pub fn task(plan: &Plan, node: NodeIndex, attempt: Attempt) -> Option<Task> {
    let NodeKind::Step { step } = plan.nodes.get(node as usize)?.kind else {
        return None;
    };
    let (_, _, unit) = unit_of(plan, node)?;
    let part = plan.parts.get(unit.part as usize)?;
    let release = release_name(plan, unit);
    let mut env: Environment = part.env.clone();
    env.extend(unit.env.clone());
    let mut run_as = None;
    let mut timeout_ms = CORE_TIMEOUT_MS;
    let mut names = Some(release.clone());
    let action = match plan.steps.get(step as usize)? {
        StepTemplate::Fetch => Action::Fetch(part.package.clone()),
        StepTemplate::Unpack => Action::Unpack {
            package: part.package.clone(),
            release,
        },
        StepTemplate::Activate => Action::Activate(Box::new(manifest(plan, attempt.plan, unit))),
        StepTemplate::Stack(step) => {
            if step.phase == Phase::Stop {
                // What is stopped is what is installed, wherever the link points, with the environment it has.
                names = None;
                env.clear();
            }
            env.extend(step.env.clone());
            run_as.clone_from(&step.run_as);
            timeout_ms = step.timeout_ms;
            match &step.action {
                StackAction::Script(script) => Action::Script(script.clone()),
                StackAction::WriteFile {
                    path,
                    content,
                    mode,
                } => Action::WriteFile {
                    path: path.clone(),
                    content: content.clone(),
                    mode: *mode,
                },
                StackAction::Start(supervise) => Action::Start(supervise.clone()),
                StackAction::Stop { grace_ms } => Action::StopSupervised {
                    grace_ms: *grace_ms,
                },
                StackAction::Check(check) => Action::Check(check.clone()),
            }
        }
    };
    Some(Task {
        id: TaskId {
            order: attempt.order,
            node,
            attempt: attempt.attempt,
        },
        instance: part.instance,
        release: names,
        fence: attempt.fence,
        expires_at: attempt.expires_at,
        timeout_ms,
        run_as,
        env,
        action,
    })
}
