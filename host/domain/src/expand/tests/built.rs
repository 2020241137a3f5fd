//! What an accepted plan looks like, and which plans are the same.

use crate::{
    digest::Digest,
    expand::{
        MAX_TIMEOUT_MS, PlanInput, expand,
        fixture::{
            all_at_once, env, input, installed, node, part, script, server, server_id, steps,
            strategy, unit, unit_of,
        },
        one_by_one,
    },
    flow,
    limits::Amount,
    operation::Operation,
    plan::{FilesStep, Level, NodeIndex, NodeKind, Plan, StepTemplate, TrafficAction},
    plugin::{
        NodeRole, Phase, RestoreWeight, RollbackScope, ShiftWeight, StackAction, StackStep,
        StrategyNode, StrategyNodeKind, StrategyPlan, StrategyUnit,
    },
    reducer,
    value::Environment,
};

fn plan(input: PlanInput, strategy: &StrategyPlan) -> Plan {
    expand(input, strategy).expect("the plan is in order")
}

type Change = fn(&mut PlanInput, &mut StrategyPlan);

/// The names of a node's children.
fn children(plan: &Plan, parent: NodeIndex) -> Vec<&str> {
    let children = plan.nodes.iter().filter(|node| node.parent == Some(parent));
    children.map(|node| node.name.as_str()).collect()
}

fn find(plan: &Plan, name: &str) -> NodeIndex {
    let position = plan.nodes.iter().position(|node| node.name == name);
    u32::try_from(position.unwrap_or_else(|| panic!("no node `{name}`"))).unwrap()
}

/// The stack's step of this name.
fn stack_step<'a>(plan: &'a Plan, name: &str) -> &'a StackStep {
    let steps = plan.steps.iter().filter_map(|step| match step {
        StepTemplate::Stack(step) => Some(step),
        StepTemplate::Fetch
        | StepTemplate::Unpack
        | StepTemplate::Activate
        | StepTemplate::PlaceFiles(_)
        | StepTemplate::Script(_) => None,
    });
    let mut named = steps.filter(|step| step.name == name);
    let first = named.next().unwrap_or_else(|| panic!("no step `{name}`"));
    assert_eq!(named.next(), None, "one step `{name}`");
    first
}

#[test]
fn an_operation_has_the_steps_of_what_is_installed() {
    let turn = |operation: Operation, pools: bool| {
        let mut input = input();
        let part = &mut input.parts[0];
        part.flow = flow::operation(&operation);
        part.part.package = None;
        part.part.stack = None;
        part.files = match &operation {
            Operation::StaticFiles(files) => Some(FilesStep {
                files: files.reference(),
                run_as: files.user.clone(),
            }),
            Operation::Restart
            | Operation::Online { .. }
            | Operation::Offline
            | Operation::Initialise => None,
        };
        if !pools {
            part.part.pools.clear();
        }
        let mut manifest = installed();
        let known = steps();
        let of = |phase| {
            known
                .iter()
                .filter(move |step| step.phase == phase)
                .cloned()
        };
        manifest.start = of(Phase::Start).collect();
        manifest.check = of(Phase::Check).collect();
        part.servers[0].env = manifest.env.clone();
        part.servers[0].installed = Some(manifest);
        let plan = plan(input, &all_at_once());
        let server = find(&plan, "web-1");
        let names: Vec<String> = children(&plan, server)
            .into_iter()
            .map(str::to_owned)
            .collect();
        let ends = (
            reducer::takes_out(&plan, server),
            reducer::takes_offline(&plan, server),
        );
        assert_eq!(plan.units[0].before, None, "nothing to go back to");
        (names, ends, plan.schema)
    };
    let files = serde_json::from_str(
        r#"{"url": "https://files.example/site.tar.gz", "directory": "/srv/www/site/"}"#,
    )
    .unwrap();
    for (operation, expect, ends, schema) in [
        (
            Operation::Restart,
            &["drain", "stop the old one", "start", "listens", "restore"][..],
            (true, false),
            2,
        ),
        (
            Operation::Online { initial_weight: 7 },
            &["start", "listens", "restore"],
            (true, false),
            2,
        ),
        (
            Operation::Offline,
            &["drain", "stop the old one", "without traffic"],
            (true, true),
            2,
        ),
        (
            Operation::Initialise,
            &["directories", "users", "runtime"],
            (false, false),
            2,
        ),
        (
            Operation::StaticFiles(files),
            &["place files"],
            (false, false),
            4,
        ),
    ] {
        let (names, found, version) = turn(operation.clone(), true);
        assert_eq!(names, expect, "{operation:?}");
        assert_eq!((found, version), (ends, schema), "{operation:?}");
        let (names, ..) = turn(operation.clone(), false);
        let mut expect: Vec<&str> = expect.to_vec();
        expect.retain(|name| !["drain", "restore", "without traffic"].contains(name));
        assert_eq!(names, expect, "without pools: {operation:?}");
    }
}

#[test]
fn a_server_goes_through_the_skeleton_in_order() {
    let mut input = input();
    input.parts[0].servers[0].installed = Some(installed());
    let plan = plan(input, &all_at_once());
    assert_eq!(
        children(&plan, find(&plan, "web-1")),
        [
            "drain",
            "fetch",
            "unpack",
            "directories",
            "users",
            "runtime",
            "configuration",
            "stop the old one",
            "activate",
            "migrate",
            "start",
            "listens",
            "restore",
        ]
    );
    // Where nothing is installed there is nothing to stop, whatever the new release would stop by.
    let second = children(&plan, find(&plan, "web-2"));
    assert!(
        !second.iter().any(|name| name.contains("stop")),
        "{second:?}"
    );
    assert_eq!(second.len(), 12);
    assert_eq!(
        plan.nodes[find(&plan, "drain") as usize].kind,
        NodeKind::Traffic(TrafficAction::Drain {
            deadline_ms: 30_000
        })
    );
    let kept = &plan.parts[0];
    let names = |steps: &[StackStep]| {
        steps
            .iter()
            .map(|step| step.name.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&kept.stop), ["stop the new one"]);
    assert_eq!(names(&kept.start), ["start"]);
    assert_eq!(names(&kept.check), ["listens"]);
}

#[test]
fn a_server_without_pools_is_neither_drained_nor_restored() {
    let mut input = input();
    input.parts[0].part.pools.clear();
    let plan = plan(input, &all_at_once());
    let steps = children(&plan, find(&plan, "web-1"));
    assert_eq!((steps[0], steps[steps.len() - 1]), ("fetch", "listens"));
    assert!(
        !plan
            .nodes
            .iter()
            .any(|node| matches!(node.kind, NodeKind::Traffic(_)))
    );
}

#[test]
fn what_is_stopped_is_what_is_installed() {
    let mut input = input();
    let mut old = installed();
    // A manifest keeps stop steps alone here; what else stands among them is not run.
    old.stop.push(StackStep {
        phase: Phase::Uninstall,
        name: "uninstall".to_owned(),
        ..old.stop[0].clone()
    });
    input.parts[0].servers[0].installed = Some(old.clone());
    let plan = plan(input, &all_at_once());
    let stop = stack_step(&plan, "stop the old one");
    // Its own environment with the step's over it: neither the new release's nor the server's of today.
    assert_eq!(stop.env, env(&[("PORT", "79"), ("SIGNAL", "TERM")]));
    assert_eq!(stop.action, script("kill"));
    assert_eq!(
        (stop.run_as.as_deref(), stop.timeout_ms),
        (Some("shop"), 5_000)
    );
    assert!(!plan.nodes.iter().any(|node| node.name == "uninstall"));
    assert_eq!(plan.units[0].before, Some(old.release));
    assert_eq!(plan.units[1].before, None);
}

#[test]
fn what_differs_between_servers_is_environment() {
    let mut input = input();
    let ours = env(&[("OF", "stack"), ("ZONE", "1")]);
    let server_env = &mut input.parts[0].steps.server_env;
    server_env.insert(server_id(1).to_string(), ours);
    // Of a server that is not in the order: not looked at.
    server_env.insert(server_id(9).to_string(), env(&[("A", "1")]));
    let plan = plan(input, &all_at_once());
    // What a person set on the server goes over what the stack says.
    assert_eq!(
        plan.units[0].env,
        env(&[("OF", "server"), ("PORT", "80"), ("ZONE", "1")])
    );
    assert_eq!(plan.units[1].env, env(&[("OF", "server"), ("PORT", "80")]));
    assert_eq!(plan.units[0].reads, ["server web-1"]);
}

#[test]
fn a_step_stands_once_however_many_servers_run_it() {
    let mut input = input();
    input.parts.push(part("bank", vec![server(3), server(4)]));
    for part in &mut input.parts {
        for server in &mut part.servers {
            server.installed = Some(installed());
        }
    }
    let mut strategy = all_at_once();
    for server in [3, 4] {
        let kind = StrategyNodeKind::Unit(unit_of("bank", server));
        strategy.nodes.push(node(Some(0), "bank", kind));
    }
    let all = plan(input.clone(), &strategy);
    // Fetch, unpack and activate; seven of the stack; one that stops what is installed.
    assert_eq!(all.steps.len(), 11);
    assert_eq!(all.units.len(), 4);

    // A strategy that wants a longer healthy time on one server changes its check alone.
    if let StrategyNodeKind::Unit(unit) = &mut strategy.nodes[4].kind {
        unit.healthy_for_ms = 5_000;
    }
    let longer = plan(input.clone(), &strategy);
    assert_eq!(longer.steps.len(), 12);

    // Servers that were installed with different environments are stopped with different ones.
    input.parts[0].servers[0].installed.as_mut().unwrap().env = env(&[("PORT", "78")]);
    assert_eq!(plan(input, &strategy).steps.len(), 13);
}

#[test]
fn each_application_has_its_own_steps() {
    let mut input = input();
    let mut bank = part("bank", vec![server(3)]);
    bank.steps.steps[2].action = script("install the bank's");
    input.parts.push(bank);
    let mut strategy = all_at_once();
    let kind = StrategyNodeKind::Unit(unit_of("bank", 3));
    strategy.nodes.push(node(Some(0), "bank", kind));
    let plan = plan(input, &strategy);
    let runtimes: Vec<_> = plan
        .nodes
        .iter()
        .filter(|node| node.name == "runtime")
        .map(|node| match node.kind {
            NodeKind::Step { step } => match &plan.steps[step as usize] {
                StepTemplate::Stack(step) => step.action.clone(),
                other => panic!("{other:?}"),
            },
            ref other => panic!("{other:?}"),
        })
        .collect();
    let [ours, theirs] = ["install", "install the bank's"].map(script);
    assert_eq!(runtimes, [ours.clone(), ours, theirs]);
    let parts: Vec<_> = plan.units.iter().map(|unit| unit.part).collect();
    assert_eq!(parts, [Some(0), Some(0), Some(1)]);
}

#[test]
fn a_check_is_as_the_strategy_wants_it() {
    // Healthy time and deadline as wanted by the strategy; what becomes of the stack's 2 s within 60 s, a try each 0.1 s.
    let cases = [
        (0, None, (2_000, 60_000)),
        (1_000, None, (2_000, 60_000)),
        (10_000, None, (10_000, 60_000)),
        (0, Some(30_000), (2_000, 30_000)),
        // A deadline that the healthy time cannot meet.
        (10_000, Some(5_000), (10_000, 10_100)),
        (120_000, None, (120_000, 120_100)),
        (MAX_TIMEOUT_MS, None, (MAX_TIMEOUT_MS, MAX_TIMEOUT_MS)),
    ];
    for (healthy_for_ms, health_deadline_ms, expect) in cases {
        let mut strategy = all_at_once();
        for server in [1, 2] {
            strategy.nodes[server as usize].kind = StrategyNodeKind::Unit(StrategyUnit {
                healthy_for_ms,
                health_deadline_ms,
                ..unit_of("shop", server)
            });
        }
        let plan = plan(input(), &strategy);
        let step = stack_step(&plan, "listens");
        let StackAction::Check(check) = &step.action else {
            panic!("{step:?}");
        };
        assert_eq!(
            (check.healthy_for_ms, step.timeout_ms),
            expect,
            "{healthy_for_ms} {health_deadline_ms:?}"
        );
        // Nothing else has a deadline of the strategy's.
        assert_eq!(stack_step(&plan, "migrate").timeout_ms, 60_000);
        assert_eq!(
            plan.parts[0].check[0].timeout_ms, 60_000,
            "as the stack gave it"
        );
    }
}

#[test]
fn the_tree_is_in_depth_first_order_whatever_the_strategys_is() {
    let group = |name| StrategyNode {
        role: NodeRole::Group,
        ..node(Some(0), name, StrategyNodeKind::Sequence)
    };
    let message = "look".to_owned();
    let strategy = strategy(vec![
        StrategyNode {
            role: NodeRole::Application,
            ..node(None, "shop", StrategyNodeKind::Sequence)
        },
        node(None, "after", StrategyNodeKind::Gate { message }),
        group("group 1"),
        group("group 2"),
        unit(Some(3), 2),
        unit(Some(2), 1),
    ]);
    let plan = plan(input(), &strategy);
    let inner: Vec<_> = plan
        .nodes
        .iter()
        .filter(|node| node.level != Level::Step || node.name == "after")
        .map(|node| (node.level, node.name.as_str()))
        .collect();
    assert_eq!(
        inner,
        [
            (Level::Order, "order"),
            (Level::Application, "shop"),
            (Level::Group, "group 1"),
            (Level::Server, "web-1"),
            (Level::Group, "group 2"),
            (Level::Server, "web-2"),
            (Level::Step, "after"),
        ]
    );
    // Each node stands below the node before it or below one around that.
    for (index, node) in plan.nodes.iter().enumerate().skip(1) {
        let mut around = Some(u32::try_from(index - 1).unwrap());
        while around != node.parent {
            around = plan.nodes[around.expect("its parent is around") as usize].parent;
        }
    }
}

#[test]
fn a_server_that_is_a_group_stands_in_one() {
    let mut strategy = all_at_once();
    strategy.nodes[1].role = NodeRole::Group;
    let plan = plan(input(), &strategy);
    let server = &plan.nodes[3];
    assert_eq!(
        (plan.nodes[2].level, &plan.nodes[2].kind),
        (Level::Group, &NodeKind::Sequence)
    );
    assert_eq!((server.level, server.parent), (Level::Server, Some(2)));
}

#[test]
fn a_strategy_cannot_tolerate_more_failures_than_the_order() {
    for (allowed, wanted, expect) in [
        (Amount::Count(0), 9, 0),
        (Amount::Count(1), 9, 1),
        (Amount::Count(5), 3, 3),
        (Amount::Percent(50), 9, 1),
    ] {
        let mut input = input();
        input.limits.max_failures = allowed;
        let mut strategy = all_at_once();
        strategy.nodes[0].kind = StrategyNodeKind::Parallel {
            max_in_flight: 2,
            max_failures: wanted,
        };
        let kind = NodeKind::Parallel {
            max_in_flight: 2,
            max_failures: expect,
        };
        assert_eq!(plan(input, &strategy).nodes[1].kind, kind, "{allowed}");
    }
}

#[test]
fn shifts_name_servers_by_id() {
    let mut strategy = all_at_once();
    let weights = vec![
        (server_id(2).to_string(), ShiftWeight::Exactly(40)),
        (server_id(1).to_string(), ShiftWeight::Remembered),
    ];
    let application = "shop".to_owned();
    let kind = StrategyNodeKind::Shift {
        application,
        weights,
    };
    strategy.nodes.push(node(None, "shift", kind));
    let plan = plan(input(), &strategy);
    assert_eq!(
        plan.nodes[find(&plan, "shift") as usize].kind,
        NodeKind::Traffic(TrafficAction::Set {
            part: 0,
            weights: vec![
                (server_id(2), ShiftWeight::Exactly(40)),
                (server_id(1), ShiftWeight::Remembered),
            ],
        })
    );
}

#[test]
fn a_share_names_both_sides() {
    let mut input = input();
    // A server that is not released, and whose traffic is moved all the same.
    input.parts[0].only_traffic = vec![server_id(7)];
    let mut strategy = all_at_once();
    let kind = StrategyNodeKind::Share {
        application: "shop".to_owned(),
        servers: vec![server_id(7).to_string(), server_id(1).to_string()],
        percent: 30,
    };
    strategy.nodes.push(StrategyNode {
        role: NodeRole::Stage,
        rollback: RollbackScope::Stage,
        ..node(None, "stage", StrategyNodeKind::Sequence)
    });
    let stage = u32::try_from(strategy.nodes.len() - 1).unwrap();
    strategy.nodes.push(node(Some(stage), "share", kind));
    let plan = plan(input, &strategy);
    let share = &plan.nodes[find(&plan, "share") as usize];
    let NodeKind::Traffic(action) = &share.kind else {
        panic!("{share:?}");
    };
    assert_eq!(
        *action,
        TrafficAction::Share {
            part: 0,
            servers: vec![server_id(1), server_id(7)],
            rest: vec![server_id(2)],
            percent: 30,
        }
    );
    let all = vec![server_id(1), server_id(7), server_id(2)];
    assert_eq!(action.shifts(), Some((0, all)));
    let stage = &plan.nodes[share.parent.unwrap() as usize];
    assert_eq!(
        (stage.level, stage.rollback),
        (Level::Stage, RollbackScope::Stage)
    );
}

#[test]
fn the_same_gives_the_same_digest_and_anything_else_another() {
    let digest = |change: Change| -> Digest {
        let (mut input, mut strategy) = (input(), all_at_once());
        input.parts[0].servers[0].installed = Some(installed());
        change(&mut input, &mut strategy);
        plan(input, &strategy).digest()
    };
    let as_it_is = digest(|_, _| {});
    let same: [(&str, Change); 5] = [
        ("nothing", |_, _| {}),
        ("the order of servers", |input, _| {
            input.parts[0].servers.reverse()
        }),
        ("the order of phases", |input, _| {
            // The sort is stable: within a phase the order stays.
            input.parts[0].steps.steps.sort_by_key(|step| step.phase);
        }),
        ("the order of reads and variables", |input, _| {
            let reads = std::mem::take(&mut input.reads);
            input.reads.extend(reads.into_iter().rev());
            for part in &mut input.parts {
                let env: Environment = std::mem::take(&mut part.part.env);
                part.part.env.extend(env.into_iter().rev());
            }
        }),
        ("what is approved and not used", |input, _| {
            input.parts[0].approved.users.push("other".to_owned());
        }),
    ];
    for (what, change) in same {
        assert_eq!(digest(change), as_it_is, "{what}");
    }
    let other: [(&str, Change); 15] = [
        ("a script", |input, _| {
            input.parts[0].steps.steps[2].action = script("install 2");
        }),
        ("the order of steps in a phase", |input, _| {
            input.parts[0].steps.steps.swap(3, 7);
        }),
        ("a time-out", |input, _| {
            input.parts[0].steps.steps[2].timeout_ms += 1
        }),
        ("a parameter", |input, _| {
            input.parts[0].part.env.extend(env(&[("STAGE", "live")]));
        }),
        ("a server's variable", |input, _| {
            input.parts[0].servers[1].env.extend(env(&[("PORT", "81")]));
        }),
        ("the package", |input, _| {
            let package = input.parts[0].part.package.as_mut().unwrap();
            package.digest = Digest::of(b"another build of it");
        }),
        ("the tech stack", |input, _| {
            let stack = input.parts[0].part.stack.as_mut().unwrap();
            stack.digest = Digest::of(b"another build of it");
        }),
        ("the strategy", |input, _| input.strategy = None),
        ("the limits", |input, _| input.limits.max_in_flight += 1),
        ("the drain's deadline", |input, _| {
            input.drain_deadline_ms += 1
        }),
        ("what is installed", |input, _| {
            input.parts[0].servers[0].installed = None;
        }),
        ("what was read", |input, _| {
            input.reads.get_mut("a").unwrap().digest = Digest::of(b"3");
        }),
        ("the order of the servers' turns", |_, strategy| {
            strategy.nodes.swap(1, 2)
        }),
        ("the weight afterwards", |_, strategy| {
            strategy.nodes[1].kind = StrategyNodeKind::Unit(StrategyUnit {
                restore: RestoreWeight::KeepZero,
                ..unit_of("shop", 1)
            });
        }),
        ("side by side or not", |_, strategy| {
            strategy.nodes[0].kind = StrategyNodeKind::Sequence;
        }),
    ];
    for (what, change) in other {
        assert_ne!(digest(change), as_it_is, "{what}");
    }
}

#[test]
fn an_application_that_keeps_running_is_not_stopped_by_a_release_of_its_stack() {
    let keep = |step: &mut StackStep, keep: bool| {
        if let StackAction::Start(supervise) = &mut step.action {
            supervise.keep_running = keep;
        }
    };
    // Old and new keep it, only one of them does, and another stack comes.
    for (old, new, same_stack, stopped) in [
        (true, true, true, false),
        (true, false, true, true),
        (false, true, true, true),
        (true, true, false, true),
    ] {
        let mut input = input();
        let part = &mut input.parts[0];
        let mut before = installed();
        for step in &mut part.steps.steps {
            keep(step, new);
        }
        let start = part
            .steps
            .steps
            .iter()
            .find(|step| step.phase == Phase::Start);
        before.start = start.into_iter().cloned().collect();
        before.start.iter_mut().for_each(|step| keep(step, old));
        if !same_stack {
            before.stack.name = "another".to_owned();
        }
        part.servers[0].installed = Some(before);
        let plan = plan(input, &all_at_once());
        let steps = children(&plan, find(&plan, "web-1"));
        assert_eq!(
            steps.contains(&"stop the old one"),
            stopped,
            "{old} {new} {same_stack}: {steps:?}"
        );
    }
}

#[test]
fn the_cores_own_plan_is_one_server_after_the_other() {
    let servers = [("shop", 2), ("bank", 3), ("shop", 1)];
    let order = servers.map(|(application, server)| (application.to_owned(), server_id(server)));
    let mut input = input();
    input.strategy = None;
    input.parts.push(part("bank", vec![server(3)]));
    let plan = plan(input, &one_by_one(&order));
    let turns: Vec<_> = plan.units.iter().map(|unit| unit.server).collect();
    assert_eq!(turns, [2, 3, 1].map(server_id));
    assert_eq!(plan.nodes[0].kind, NodeKind::Sequence);
    let groups: Vec<_> = plan
        .nodes
        .iter()
        .filter(|node| node.parent == Some(0))
        .collect();
    assert_eq!(groups.len(), 3);
    for group in groups {
        assert_eq!(
            (group.level, &group.kind),
            (Level::Group, &NodeKind::Sequence)
        );
    }
    assert!(
        plan.units
            .iter()
            .all(|unit| unit.restore == RestoreWeight::Remembered)
    );
    // A name that is too long with the server's is cut, not refused.
    let long = one_by_one(&[("x".repeat(60), server_id(1))]);
    assert_eq!(long.nodes[0].name, "x".repeat(60));
}
