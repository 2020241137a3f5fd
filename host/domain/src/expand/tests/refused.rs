//! Every way in which a plan is refused, and what stands just within each limit.

use std::collections::BTreeSet;

use crate::{
    expand::{
        BadPlan, MAX_DEPTH, MAX_ENV_BYTES, MAX_NODES, MAX_RETRIES, MAX_STEP_BYTES, MAX_STEPS,
        MAX_TIMEOUT_MS, PlanInput, expand,
        fixture::{
            all_at_once, env, input, node, parallel, part, script, server, server_id, step,
            strategy, unit, unit_of,
        },
    },
    plugin::{
        Phase, RestoreWeight, ShiftWeight, StackAction, StackStep, StrategyNode, StrategyNodeKind,
        StrategyPlan,
    },
    text::MESSAGE_MAX_BYTES,
};

fn error(input: PlanInput, plan: &StrategyPlan) -> BadPlan {
    expand(input, plan).expect_err("it is refused")
}

/// What is answered to both servers at once, changed.
fn nodes(change: impl FnOnce(&mut Vec<StrategyNode>)) -> BadPlan {
    let mut plan = all_at_once();
    change(&mut plan.nodes);
    error(input(), &plan)
}

/// What is answered when something in the order, or in what its stack returned, is changed.
fn stack(change: impl FnOnce(&mut PlanInput)) -> BadPlan {
    let mut input = input();
    change(&mut input);
    error(input, &all_at_once())
}

/// Likewise, with one more step.
fn with_step(added: StackStep) -> BadPlan {
    stack(|input| input.parts[0].steps.steps.push(added))
}

fn writes(path: &str) -> StackStep {
    let action = StackAction::WriteFile {
        path: path.to_owned(),
        content: String::new(),
        mode: 0o644,
    };
    step(Phase::Deploy, "write", action)
}

fn gate(parent: Option<u32>) -> StrategyNode {
    let message = String::new();
    node(parent, "look", StrategyNodeKind::Gate { message })
}

fn shift(application: &str, weights: &[(u128, u32)]) -> StrategyNode {
    let weights = weights
        .iter()
        .map(|(server, weight)| {
            (
                server_id(*server).to_string(),
                ShiftWeight::Exactly(*weight),
            )
        })
        .collect();
    let application = application.to_owned();
    let kind = StrategyNodeKind::Shift {
        application,
        weights,
    };
    node(None, "shift", kind)
}

fn share(servers: &[u128], percent: u32) -> StrategyNode {
    let servers = servers.iter().map(|server| server_id(*server).to_string());
    let kind = StrategyNodeKind::Share {
        application: "shop".to_owned(),
        servers: servers.collect(),
        percent,
    };
    node(None, "share", kind)
}

fn judge(window_ms: u64) -> StrategyNode {
    let stage = "figures".to_owned();
    node(None, "judge", StrategyNodeKind::Judge { stage, window_ms })
}

fn pause(duration_ms: u64) -> StrategyNode {
    node(None, "wait", StrategyNodeKind::Pause { duration_ms })
}

/// A unit with one thing changed.
fn odd_unit(change: impl FnOnce(&mut crate::plugin::StrategyUnit)) -> StrategyNode {
    let mut unit = unit_of("shop", 1);
    change(&mut unit);
    node(Some(0), "odd", StrategyNodeKind::Unit(unit))
}

/// A chain of so many sequences with both servers at its end.
fn chain(sequences: u32) -> StrategyPlan {
    let mut nodes: Vec<_> = (0..sequences)
        .map(|index| node(index.checked_sub(1), "in", StrategyNodeKind::Sequence))
        .collect();
    nodes.extend([unit(Some(sequences - 1), 1), unit(Some(sequences - 1), 2)]);
    strategy(nodes)
}

const LONG: &str = "sixty-one-characters-are-one-more-than-a-name-for-people-has-";

/// Every case, with what its refusal is about.
fn cases() -> Vec<(&'static str, BadPlan)> {
    let day = MAX_TIMEOUT_MS;
    vec![
        ("no nodes", nodes(Vec::clear)),
        (
            "more nodes than a plan has",
            nodes(|nodes| nodes.resize(MAX_NODES + 1, gate(None))),
        ),
        (
            "one level too deep",
            error(input(), &chain(MAX_DEPTH as u32)),
        ),
        ("its own parent", nodes(|nodes| nodes[0].parent = Some(0))),
        (
            "a parent that comes later",
            nodes(|nodes| nodes[1].parent = Some(2)),
        ),
        (
            "a parent that is not there",
            nodes(|nodes| nodes[2].parent = Some(9)),
        ),
        ("below a server", nodes(|nodes| nodes[2].parent = Some(1))),
        (
            "below a gate",
            nodes(|nodes| nodes.extend([gate(None), gate(Some(3))])),
        ),
        (
            "below a shift",
            nodes(|nodes| nodes.extend([shift("shop", &[]), gate(Some(3))])),
        ),
        (
            "below a pause",
            nodes(|nodes| nodes.extend([pause(1), gate(Some(3))])),
        ),
        ("no children", nodes(|nodes| nodes.push(parallel("empty")))),
        (
            "no children in a sequence",
            nodes(|nodes| nodes.push(node(Some(0), "in", StrategyNodeKind::Sequence))),
        ),
        ("no name", nodes(|nodes| nodes[1].name.clear())),
        (
            "a long name",
            nodes(|nodes| nodes[1].name = LONG.to_owned()),
        ),
        (
            "a line in a name",
            nodes(|nodes| nodes[1].name = "a\nb".to_owned()),
        ),
        (
            "a server of an unknown application",
            nodes(|nodes| nodes.push(odd_unit(|unit| unit.application = "bank".to_owned()))),
        ),
        (
            "a shift of an unknown application",
            nodes(|nodes| nodes.push(shift("bank", &[(1, 1)]))),
        ),
        (
            "an unknown server",
            nodes(|nodes| nodes.push(odd_unit(|unit| unit.server = server_id(3).to_string()))),
        ),
        (
            "what is no server id",
            nodes(|nodes| nodes.push(odd_unit(|unit| unit.server = "web-1".to_owned()))),
        ),
        (
            "a server under another spelling of its id",
            nodes(|nodes| nodes[1] = odd_unit(|unit| unit.server = unit.server.to_uppercase())),
        ),
        (
            "a shift of an unknown server",
            nodes(|nodes| nodes.push(shift("shop", &[(1, 1), (3, 1)]))),
        ),
        ("a server of another application", {
            let mut input = input();
            input.parts.push(part("bank", vec![server(3)]));
            let mut plan = all_at_once();
            plan.nodes.push(unit(Some(0), 3));
            error(input, &plan)
        }),
        ("a server twice", nodes(|nodes| nodes.push(unit(None, 2)))),
        ("a server left out", nodes(|nodes| nodes.truncate(2))),
        (
            "all servers left out",
            nodes(|nodes| *nodes = vec![gate(None)]),
        ),
        (
            "a weight too large",
            nodes(|nodes| nodes[1] = odd_unit(|unit| unit.restore = RestoreWeight::Override(101))),
        ),
        (
            "a shift too large",
            nodes(|nodes| nodes.push(shift("shop", &[(1, 100), (2, u32::MAX)]))),
        ),
        (
            "a shift that cuts all traffic",
            nodes(|nodes| nodes.push(shift("shop", &[(1, 0), (2, 0)]))),
        ),
        (
            "a weight that hides another",
            nodes(|nodes| nodes.push(shift("shop", &[(1, 0), (1, 100), (2, 0)]))),
        ),
        (
            "a share too large",
            nodes(|nodes| nodes.push(share(&[1], 101))),
        ),
        (
            "a share for nobody",
            nodes(|nodes| nodes.push(share(&[], 100))),
        ),
        (
            "a share that cuts all traffic",
            nodes(|nodes| nodes.push(share(&[1, 2], 0))),
        ),
        (
            "a share that names a server twice",
            nodes(|nodes| nodes.push(share(&[1, 1], 50))),
        ),
        (
            "a share for an unknown server",
            nodes(|nodes| nodes.push(share(&[3], 50))),
        ),
        (
            "a window too long",
            nodes(|nodes| nodes.push(judge(day + 1))),
        ),
        (
            "a pause too long",
            nodes(|nodes| nodes.push(pause(day + 1))),
        ),
        (
            "a message too long",
            nodes(|nodes| {
                let message = "x".repeat(MESSAGE_MAX_BYTES + 1);
                nodes.push(node(None, "look", StrategyNodeKind::Gate { message }));
            }),
        ),
        (
            "a healthy time too long",
            nodes(|nodes| nodes[1] = odd_unit(|unit| unit.healthy_for_ms = day + 1)),
        ),
        (
            "a health deadline too long",
            nodes(|nodes| nodes[1] = odd_unit(|unit| unit.health_deadline_ms = Some(u64::MAX))),
        ),
        (
            "too many steps",
            stack(|input| {
                let steps = &mut input.parts[0].steps.steps;
                let last = steps[0].clone();
                steps.resize(MAX_STEPS + 1, last);
            }),
        ),
        (
            "a step without a name",
            with_step(step(Phase::Deploy, "", script(""))),
        ),
        (
            "a step with a long name",
            with_step(step(Phase::Deploy, LONG, script(""))),
        ),
        (
            "a step that runs too long",
            with_step(StackStep {
                timeout_ms: day + 1,
                ..step(Phase::Deploy, "slow", script(""))
            }),
        ),
        (
            "a step with too many attempts",
            with_step(StackStep {
                retries: MAX_RETRIES + 1,
                ..step(Phase::Deploy, "again", script(""))
            }),
        ),
        (
            "a step too large",
            with_step(step(
                Phase::Deploy,
                "large",
                script(&"x".repeat(MAX_STEP_BYTES)),
            )),
        ),
        (
            "a stop that waits too long",
            with_step(step(
                Phase::Stop,
                "patient",
                StackAction::Stop { grace_ms: day + 1 },
            )),
        ),
        (
            "a check that is healthy too late",
            stack(|input| match &mut input.parts[0].steps.steps[0].action {
                StackAction::Check(check) => check.healthy_for_ms = day + 1,
                other => panic!("the first step is a check, not {other:?}"),
            }),
        ),
        (
            "steps too large for a manifest",
            stack(|input| {
                for name in ["one", "two"] {
                    let text = "x".repeat(MAX_STEP_BYTES / 2);
                    let steps = &mut input.parts[0].steps.steps;
                    steps.push(step(Phase::Stop, name, script(&text)));
                }
            }),
        ),
        (
            "a user who is not approved",
            with_step(StackStep {
                run_as: Some("root".to_owned()),
                ..step(Phase::Deploy, "as root", script(""))
            }),
        ),
        (
            "a path that is not approved",
            with_step(writes("/etc/passwd")),
        ),
        (
            "a path beside an approved one",
            with_step(writes("/srv/www-2/a")),
        ),
        ("an approved path itself", with_step(writes("/srv/www"))),
        (
            "a path that leaves the release",
            with_step(writes("../../current")),
        ),
        (
            "a path that leaves an approved one",
            with_step(writes("/etc/shop/../passwd")),
        ),
        (
            "two steps of one name",
            with_step(step(Phase::Prepare, "users", script(""))),
        ),
        (
            "an environment too large in the order",
            stack(|input| {
                input.parts[0].part.env = env(&[("A", &"x".repeat(MAX_ENV_BYTES))]);
            }),
        ),
        (
            "an environment too large from the stack, on one server",
            stack(|input| {
                let own = env(&[("A", &"x".repeat(MAX_ENV_BYTES))]);
                let server_env = &mut input.parts[0].steps.server_env;
                server_env.insert(server_id(2).to_string(), own);
            }),
        ),
        (
            "a variable of a step without a name",
            with_step(StackStep {
                env: env(&[("", "x")]),
                ..step(Phase::Deploy, "odd", script(""))
            }),
        ),
        (
            "a variable of a step that no shell takes",
            with_step(StackStep {
                env: env(&[("A=B", "x")]),
                ..step(Phase::Deploy, "odd", script(""))
            }),
        ),
        (
            "a variable that starts with a digit",
            stack(|input| {
                let server_env = &mut input.parts[0].steps.server_env;
                server_env.insert(server_id(2).to_string(), env(&[("1A", "x")]));
            }),
        ),
        (
            "a variable of the platform's own",
            stack(|input| {
                let server_env = &mut input.parts[0].steps.server_env;
                server_env.insert(server_id(1).to_string(), env(&[("WINDLASS_SERVER", "x")]));
            }),
        ),
        (
            "a variable with a zero byte",
            stack(|input| {
                let server_env = &mut input.parts[0].steps.server_env;
                server_env.insert(server_id(1).to_string(), env(&[("A", "x\0")]));
            }),
        ),
        (
            "nothing to start",
            stack(|input| {
                let steps = &mut input.parts[0].steps.steps;
                steps.retain(|step| step.phase != Phase::Start);
            }),
        ),
    ]
}

/// A number for each variant: a new one does not compile before it stands here, and fails before it has a case.
fn number(bad: &BadPlan) -> usize {
    match bad {
        BadPlan::Empty => 0,
        BadPlan::TooManyNodes { .. } => 1,
        BadPlan::TooDeep { .. } => 2,
        BadPlan::BadParent { .. } => 3,
        BadPlan::LeafParent { .. } => 4,
        BadPlan::Childless { .. } => 5,
        BadPlan::BadName { .. } => 6,
        BadPlan::UnknownApplication { .. } => 7,
        BadPlan::UnknownServer { .. } => 8,
        BadPlan::DuplicateServer { .. } => 9,
        BadPlan::MissingServers { .. } => 10,
        BadPlan::BadWeight { .. } => 11,
        BadPlan::CutsTraffic { .. } => 12,
        BadPlan::PauseTooLong { .. } => 13,
        BadPlan::TooManySteps { .. } => 14,
        BadPlan::BadStepName { .. } => 15,
        BadPlan::StepLimit { .. } => 16,
        BadPlan::UserNotApproved { .. } => 17,
        BadPlan::PathNotApproved { .. } => 18,
        BadPlan::PathEscapes { .. } => 19,
        BadPlan::DuplicateStep { .. } => 20,
        BadPlan::EnvironmentTooLarge { .. } => 21,
        BadPlan::NoStart { .. } => 22,
        BadPlan::WeightTwice { .. } => 23,
        BadPlan::BadVariable { .. } => 24,
        BadPlan::BadShare { .. } => 25,
        BadPlan::LongText { .. } => 26,
    }
}

#[test]
fn every_bad_plan_is_refused_with_its_node_and_rule() {
    let cases = cases();
    let seen: BTreeSet<usize> = cases.iter().map(|(_, bad)| number(bad)).collect();
    assert_eq!(seen, (0..=26).collect(), "each variant has a case");
    let messages: Vec<String> = cases
        .iter()
        .map(|(case, bad)| format!("{case}:\n    {bad}"))
        .collect();
    insta::assert_snapshot!(messages.join("\n"));
}

#[test]
fn few_nodes_that_expand_to_too_many_are_refused() {
    let count = 1_100;
    let mut input = input();
    input.parts[0].servers = (1..=count).map(server).collect();
    let steps = &mut input.parts[0].steps.steps;
    for number in steps.len()..MAX_STEPS {
        steps.push(step(Phase::Deploy, &format!("step {number}"), script("")));
    }
    let plan = strategy((1..=count).map(|server| unit(None, server)).collect());
    match error(input, &plan) {
        BadPlan::TooManyNodes { nodes } => {
            // It breaks off soon after the limit, whatever there is left to expand.
            assert!(
                (MAX_NODES + 1..MAX_NODES + 2 * MAX_STEPS).contains(&nodes),
                "{nodes}"
            );
        }
        other => panic!("{other}"),
    }
}

/// Changes that stand just within a limit.
fn accepted(change: impl FnOnce(&mut PlanInput, &mut StrategyPlan)) {
    let (mut input, mut plan) = (input(), all_at_once());
    change(&mut input, &mut plan);
    if let Err(bad) = expand(input, &plan) {
        panic!("refused: {bad}");
    }
}

#[test]
fn what_is_within_the_limits_is_accepted() {
    let sixty = &LONG[..60];
    // All servers at once: the plan is in order. How many may be unavailable is for the envelope to say.
    accepted(|_, _| {});
    accepted(|_, plan| *plan = chain(MAX_DEPTH as u32 - 1));
    accepted(|_, plan| plan.nodes[1].name = sixty.to_owned());
    // What a stack hands back of a person's own keeps the wider form.
    accepted(|input, _| {
        let part = &mut input.parts[0];
        part.part.env = env(&[("a.b-c", "x")]);
        let given = env(&[("a.b-c", "y"), ("_A1", "z")]);
        part.steps
            .server_env
            .insert(server_id(1).to_string(), given);
    });
    accepted(|_, plan| plan.nodes[1].name = "ü".repeat(60));
    accepted(|_, plan| plan.nodes.push(pause(MAX_TIMEOUT_MS)));
    accepted(|_, plan| plan.nodes.push(shift("shop", &[(1, 0), (2, 100)])));
    accepted(|_, plan| plan.nodes.push(shift("shop", &[(1, 0)])));
    accepted(|input, plan| {
        input.limits.min_healthy_members = 0;
        plan.nodes.push(shift("shop", &[(1, 0), (2, 0)]));
    });
    accepted(|_, plan| {
        plan.nodes[1] = odd_unit(|unit| unit.restore = RestoreWeight::Override(100));
    });
    accepted(|input, _| {
        let steps = &mut input.parts[0].steps.steps;
        steps.push(StackStep {
            retries: MAX_RETRIES,
            timeout_ms: MAX_TIMEOUT_MS,
            run_as: Some("shop".to_owned()),
            ..step(Phase::Deploy, sixty, script(""))
        });
        // The same name in another phase is another step.
        steps.push(step(Phase::Start, sixty, script("")));
    });
    for path in ["a/b..c", "/etc/shop/a", "/srv/www/a/b"] {
        accepted(|input, _| input.parts[0].steps.steps.push(writes(path)));
    }
    accepted(|input, _| {
        input.parts[0].approved.path_roots.push("/".to_owned());
        input.parts[0].steps.steps.push(writes("/opt/a"));
    });
}
