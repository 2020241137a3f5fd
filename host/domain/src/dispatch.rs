//! From a node of a plan to the task that an agent gets: pure, so that a task can be made again after a crash and is the same.

use crate::{
    digest::Digest,
    id::OrderId,
    manifest::Manifest,
    plan::{NodeIndex, NodeKind, Part, Plan, StepTemplate, Unit},
    plugin::{Phase, StackAction, StackStep},
    prepared,
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

/// The name of the release directory that the unit at a node installs; `None`: it installs none.
///
/// A release is a package as it is configured: what the phases configure and deploy write into the directory of one release is
/// never written into that of another, from which an application may be serving, and to which a rollback may go back. So the
/// name has, beside the version, a digest of the package, the tech stack, people's environment, and the steps of these phases.
/// The same again has the same directory.
#[must_use]
pub fn release_name(plan: &Plan, node: NodeIndex) -> Option<String> {
    let (node, _, unit) = unit_of(plan, node)?;
    let part = plan.part_of(unit)?;
    let package = part.package.as_ref()?;
    let steps: Vec<&StackStep> = steps_of(plan, node)
        .filter_map(|step| match step {
            StepTemplate::Stack(step) => Some(step),
            StepTemplate::Fetch
            | StepTemplate::Unpack
            | StepTemplate::Activate
            | StepTemplate::PlaceFiles(_)
            | StepTemplate::Script(_) => None,
        })
        .filter(|step| matches!(step.phase, Phase::Configure | Phase::Deploy))
        .collect();
    let stack = part.stack.as_ref().map(|stack| &stack.digest);
    let env = prepared::peoples(part, &unit.env);
    let configured = Digest::of_json(&(&package.digest, stack, env, steps));
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
    Some(format!("{version}-{}", configured.short()))
}

/// The steps of the unit at this node, in their sequence.
pub fn steps_of(plan: &Plan, unit: NodeIndex) -> impl Iterator<Item = &StepTemplate> {
    let leaves = plan.nodes.iter().skip(unit as usize + 1);
    let leaves = leaves.take_while(move |leaf| leaf.parent == Some(unit));
    leaves.filter_map(|leaf| match leaf.kind {
        NodeKind::Step { step } => plan.steps.get(step as usize),
        NodeKind::Sequence
        | NodeKind::Parallel { .. }
        | NodeKind::Unit { .. }
        | NodeKind::Traffic(_)
        | NodeKind::Gate { .. }
        | NodeKind::Pause { .. }
        | NodeKind::Judge { .. } => None,
    })
}

/// The manifest that the activation of the unit at a node writes; `None`: the unit installs nothing.
#[must_use]
pub fn manifest(plan: &Plan, digest: Digest, node: NodeIndex) -> Option<Manifest> {
    let (_, _, unit) = unit_of(plan, node)?;
    let part = plan.part_of(unit)?;
    let mut env = part.env.clone();
    env.extend(unit.env.clone());
    Some(Manifest {
        instance: part.instance,
        app: part.app,
        release: release_name(plan, node)?,
        package: part.package.clone()?,
        stack: part.stack.clone()?,
        stop: part.stop.clone(),
        start: part.start.clone(),
        check: part.check.clone(),
        env,
        plan: Some(digest),
        prepared: None,
    })
}

/// The OS user that an application runs as, to whom its releases and its data belong; `None`: the agent's own.
fn runs_as(part: &Part) -> Option<String> {
    let starts = |step: &&StackStep| match step.action {
        StackAction::Start(_) => true,
        StackAction::Script(_)
        | StackAction::WriteFile { .. }
        | StackAction::Stop { .. }
        | StackAction::Check(_) => false,
    };
    part.start.iter().find(starts)?.run_as.clone()
}

/// How long a step may run once started, in milliseconds.
#[must_use]
pub const fn timeout_ms(step: &StepTemplate) -> u64 {
    match step {
        StepTemplate::Fetch
        | StepTemplate::Unpack
        | StepTemplate::Activate
        | StepTemplate::PlaceFiles(_) => CORE_TIMEOUT_MS,
        StepTemplate::Stack(step) => step.timeout_ms,
        StepTemplate::Script(step) => step.timeout_ms,
    }
}

/// The task of a step; `None` when the node is not a step of a unit.
#[must_use]
pub fn task(plan: &Plan, node: NodeIndex, attempt: Attempt) -> Option<Task> {
    let NodeKind::Step { step } = plan.nodes.get(node as usize)?.kind else {
        return None;
    };
    let (_, _, unit) = unit_of(plan, node)?;
    let part = plan.part_of(unit);
    let package = part.and_then(|part| part.package.as_ref());
    let mut env: Environment = part.map(|part| part.env.clone()).unwrap_or_default();
    env.extend(unit.env.clone());
    let mut run_as = None;
    let step = plan.steps.get(step as usize)?;
    // Without a package to install, it is the release that is current.
    let mut names = release_name(plan, node);
    let action = match step {
        StepTemplate::Fetch => Action::Fetch(package?.clone()),
        StepTemplate::Unpack => {
            run_as = part.and_then(runs_as);
            Action::Unpack {
                package: package?.clone(),
                release: names.clone()?,
            }
        }
        StepTemplate::Activate => {
            run_as = part.and_then(runs_as);
            Action::Activate(Box::new(manifest(plan, attempt.plan, node)?))
        }
        StepTemplate::PlaceFiles(step) => {
            run_as = Some(step.run_as.clone());
            Action::PlaceFiles(step.files.clone())
        }
        StepTemplate::Script(step) => {
            env.extend(step.env.clone());
            run_as.clone_from(&step.run_as);
            Action::Script(step.script.clone())
        }
        StepTemplate::Stack(step) => {
            if step.phase == Phase::Stop && package.is_some() {
                // What is stopped is what is installed, wherever the link points, with the environment it has.
                names = None;
                env.clear();
            }
            env.extend(step.env.clone());
            run_as.clone_from(&step.run_as);
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
            node: plan.id_of(node),
            attempt: attempt.attempt,
        },
        instance: part.map(|part| part.instance),
        release: names,
        fence: attempt.fence,
        expires_at: attempt.expires_at,
        timeout_ms: timeout_ms(step),
        run_as,
        env,
        action,
    })
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::expand::{
        PlanInput, expand,
        fixture::{all_at_once, env, input, installed, package, server_id},
    };

    /// Servers 1 and 2 of `shop`; something is installed on the first.
    fn plan() -> Plan {
        let mut input = input();
        input.parts[0].servers[0].installed = Some(installed());
        for step in &mut input.parts[0].steps.steps {
            if step.phase == Phase::Deploy {
                step.run_as = Some("shop".to_owned());
                step.env = env(&[("OF", "step")]);
            }
        }
        expand(input, &all_at_once()).unwrap()
    }

    fn attempt(plan: &Plan) -> Attempt {
        Attempt {
            order: OrderId::from_uuid(Uuid::from_u128(7)),
            plan: plan.digest(),
            attempt: 3,
            fence: 9,
            expires_at: Timestamp::from_unix_ms(1_000),
        }
    }

    /// The first node of this name.
    fn find(plan: &Plan, name: &str) -> NodeIndex {
        let position = plan.nodes.iter().position(|node| node.name == name);
        u32::try_from(position.unwrap_or_else(|| panic!("no node `{name}`"))).unwrap()
    }

    fn named(plan: &Plan, name: &str) -> Task {
        let task = task(plan, find(plan, name), attempt(plan));
        task.unwrap_or_else(|| panic!("`{name}` is a step"))
    }

    /// The stack's step of this name.
    fn stack_step(plan: &Plan, name: &str) -> StackStep {
        let NodeKind::Step { step } = plan.nodes[find(plan, name) as usize].kind else {
            panic!("`{name}` is a step");
        };
        match &plan.steps[step as usize] {
            StepTemplate::Stack(step) => step.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_task_is_of_its_attempt_and_its_server() {
        let plan = plan();
        let node = find(&plan, "migrate");
        let task = named(&plan, "migrate");
        assert_eq!(
            task.id.to_string(),
            format!("{}.{node}.3", attempt(&plan).order)
        );
        assert_eq!(
            (task.fence, task.expires_at),
            (9, Timestamp::from_unix_ms(1_000))
        );
        assert_eq!(task.instance, Some(plan.parts[0].instance));
        assert_eq!(task.release, release_name(&plan, find(&plan, "web-1")));
        // The step's own environment over the server's over the application's.
        assert_eq!(
            task.env,
            env(&[("OF", "step"), ("PORT", "80"), ("STAGE", "test")])
        );
        assert_eq!(
            (task.run_as.as_deref(), task.timeout_ms),
            (Some("shop"), 60_000)
        );
        let other = named(&plan, "configuration");
        assert_eq!(
            other.env,
            env(&[("OF", "server"), ("PORT", "80"), ("STAGE", "test")])
        );
        assert_eq!(other.run_as, None);
        // Made again after a crash, it is the same.
        assert_eq!(named(&plan, "migrate"), task);
    }

    #[test]
    fn every_kind_of_step_becomes_its_action() {
        let plan = plan();
        let unit = find(&plan, "web-1");
        let release = release_name(&plan, unit).unwrap();
        let package = package("1.0");
        for (name, expect) in [
            ("fetch", Action::Fetch(package.clone())),
            ("unpack", Action::Unpack { package, release }),
            (
                "activate",
                Action::Activate(Box::new(manifest(&plan, plan.digest(), unit).unwrap())),
            ),
        ] {
            let task = named(&plan, name);
            assert_eq!(task.action, expect, "{name}");
            assert_eq!(
                (task.timeout_ms, task.run_as),
                (CORE_TIMEOUT_MS, None),
                "{name}"
            );
        }
        for name in [
            "runtime",
            "configuration",
            "stop the old one",
            "start",
            "listens",
        ] {
            let action = named(&plan, name).action;
            let same = match (stack_step(&plan, name).action, action) {
                (StackAction::Script(step), Action::Script(task)) => step == task,
                (StackAction::Start(step), Action::Start(task)) => step == task,
                (StackAction::Check(step), Action::Check(task)) => step == task,
                (
                    StackAction::WriteFile {
                        path,
                        content,
                        mode,
                    },
                    task,
                ) => {
                    task == Action::WriteFile {
                        path,
                        content,
                        mode,
                    }
                }
                (_, task) => panic!("{name} became {task:?}"),
            };
            assert!(same, "{name}");
        }
    }

    #[test]
    fn a_release_belongs_to_whom_it_runs_as() {
        let mut input = input();
        for step in &mut input.parts[0].steps.steps {
            if step.phase == Phase::Start {
                step.run_as = Some("shop".to_owned());
            }
        }
        let plan = expand(input, &all_at_once()).unwrap();
        assert_eq!(named(&plan, "unpack").run_as.as_deref(), Some("shop"));
        assert_eq!(
            named(&plan, "fetch").run_as,
            None,
            "the cache is the agent's"
        );
    }

    #[test]
    fn what_is_stopped_is_the_current_release_in_its_own_environment() {
        let mut input = input();
        let mut old = installed();
        old.stop[0].action = StackAction::Stop { grace_ms: 250 };
        input.parts[0].servers[0].installed = Some(old);
        let plan = expand(input, &all_at_once()).unwrap();
        let task = named(&plan, "stop the old one");
        assert_eq!(task.action, Action::StopSupervised { grace_ms: 250 });
        assert_eq!(task.release, None, "the one that is current");
        assert_eq!(task.env, env(&[("PORT", "79"), ("SIGNAL", "TERM")]));
        assert_eq!(
            (task.run_as.as_deref(), task.timeout_ms),
            (Some("shop"), 5_000)
        );
    }

    #[test]
    fn what_is_no_step_of_a_server_is_no_task() {
        let plan = plan();
        for name in ["order", "all", "web-1", "drain", "restore"] {
            let node = find(&plan, name);
            assert_eq!(task(&plan, node, attempt(&plan)), None, "{name}");
        }
        let past = u32::try_from(plan.nodes.len()).unwrap();
        assert_eq!(task(&plan, past, attempt(&plan)), None);
        assert_eq!(unit_of(&plan, past), None);
        assert_eq!(unit_of(&plan, find(&plan, "all")), None);
        let second = find(&plan, "web-2");
        let found =
            unit_of(&plan, second + 2).map(|(node, index, unit)| (node, index, unit.server));
        assert_eq!(found, Some((second, 1, server_id(2))));
    }

    #[test]
    fn a_manifest_says_what_is_installed_and_how_to_stop_it() {
        let plan = plan();
        let manifest = manifest(&plan, plan.digest(), find(&plan, "web-2")).unwrap();
        let part = &plan.parts[0];
        assert_eq!((manifest.instance, manifest.app), (part.instance, part.app));
        assert_eq!(
            Some(&manifest.release),
            release_name(&plan, find(&plan, "web-2")).as_ref()
        );
        assert_eq!(
            (Some(&manifest.package), Some(&manifest.stack)),
            (part.package.as_ref(), part.stack.as_ref())
        );
        // The new release's own steps: what stops it when the next one comes.
        assert_eq!(manifest.stop[0].name, "stop the new one");
        assert_eq!(manifest.start[0].name, "start");
        assert_eq!(manifest.check[0].name, "listens");
        assert_eq!(
            manifest.env,
            env(&[("OF", "server"), ("PORT", "80"), ("STAGE", "test")])
        );
        assert_eq!(manifest.plan, Some(plan.digest()));
    }

    #[test]
    fn a_release_directory_is_named_by_version_and_content() {
        let mut plan = plan();
        let mut name = |version: &str| {
            let package = plan.parts[0].package.as_mut().unwrap();
            package.version = version.to_owned();
            release_name(&plan, find(&plan, "web-1")).unwrap()
        };
        let content = name("").split_off(1);
        assert_eq!(content.len(), 12, "{content}");
        for (version, expect) in [
            ("1.0.0-rc.1", "1.0.0-rc.1-"),
            ("1.0+build 7", "1.0_build_7-"),
            ("../../etc", ".._.._etc-"),
            ("ü\0\n", "___-"),
        ] {
            assert_eq!(name(version), format!("{expect}{content}"), "{version:?}");
        }
    }

    #[test]
    fn what_is_configured_anew_has_a_directory_of_its_own() {
        type Change = fn(&mut PlanInput);
        let named = |change: Change| {
            let mut input = input();
            change(&mut input);
            let plan = expand(input, &all_at_once()).unwrap();
            release_name(&plan, find(&plan, "web-1")).unwrap()
        };
        let before = named(|_| {});
        let other: [(&str, Change); 5] = [
            ("package", |input| {
                let package = input.parts[0].part.package.as_mut().unwrap();
                package.digest = Digest::of(b"another build of it");
            }),
            ("stack", |input| {
                let stack = input.parts[0].part.stack.as_mut().unwrap();
                stack.digest = Digest::of(b"another");
            }),
            ("environment", |input| {
                input.parts[0].part.env.extend(env(&[("STAGE", "other")]));
            }),
            ("server's environment", |input| {
                let server = &mut input.parts[0].servers[0];
                server.env.extend(env(&[("OF", "another")]));
            }),
            ("configuration", |input| step_of(input, Phase::Configure)),
        ];
        for (what, change) in other {
            assert_ne!(named(change), before, "{what}");
        }
        let same: [(&str, Change); 3] = [
            ("the platform's own variables", |input| {
                let own = env(&[("WINDLASS_PACKAGE_VERSION", "2")]);
                input.parts[0].part.env.extend(own);
            }),
            ("how it starts", |input| step_of(input, Phase::Start)),
            ("what is installed", |input| {
                input.parts[0].servers[0].installed = Some(installed());
            }),
        ];
        for (what, change) in same {
            assert_eq!(named(change), before, "{what}");
        }
    }

    /// Changes the steps of a phase.
    fn step_of(input: &mut PlanInput, phase: Phase) {
        let steps = input.parts[0].steps.steps.iter_mut();
        for step in steps.filter(|step| step.phase == phase) {
            step.timeout_ms += 1;
        }
    }
}
