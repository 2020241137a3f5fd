//! A deployment strategy: by default one server after the other; parameters choose which rule it breaks.
//!
//! `behave` is one of those that all kinds share, or `all-at-once` (every server of every application in one group),
//! `skip-servers` (leaves out every second server), `cut-traffic` (sets every weight to 0 first), `judge-all-good` (a judge
//! after every server, answered with go on whatever was seen), `judge-and-gate` (the same, and a
//! gate after the first server), `judge-roll-back`, `unknown-server`, `duplicate-server`,
//! `unknown-application`, `bad-parent`, `empty`, `late-parent`, `twice-in-parallel`, `rollback-empty`, `bad-share`, `bad-weight`, `unknown-node`, `endless-gates`, `rollback-trap`, `rollback-all-at-once`.
//! Shifts that go wrong before the servers' turns: `cut-slowly` (a weight of 0, one server after the other), `cut-twice` (the
//! same, each hidden behind a weight of 100), `shift-bad-weight`, `shift-unknown-server`, `shift-unknown-application`.
//! `give-traffic-and-gate` gives every server a weight of 100 after all turns, and then waits for a person.
//! Nodes that go wrong before them: `childless`, `leaf-parent`, `too-deep`, `bad-name`, `long-pause`, `bad-scope`, and shares:
//! `share-unknown-server`, `share-twice`, `share-nobody`, `share-nothing`. `rollback-twice` is right until it is rolled back.

use windlass_sdk::{
    DeploymentStrategy, Descriptor, Extension, PluginError,
    strategy::{
        JudgeRequest, Judgement, NodeKind, ParallelLimits, PlanBuilder, PlanRequest, ReleasePlan,
        ReleaseUnit, Role, TrafficShare, TrafficShift, UnitProgress, Verdict, Weight,
    },
};

use crate::{
    behave::{behave, how},
    descriptor::{IsDiagnostic, answers_otherwise, describe},
};

/// The guest.
#[derive(Debug)]
pub struct Strategy;

const NO_LIMIT: ParallelLimits = ParallelLimits {
    max_in_flight: 0,
    max_failures: u32::MAX,
};

impl DeploymentStrategy for Strategy {
    fn describe() -> Descriptor {
        describe("test-strategy", IsDiagnostic::No)
    }

    fn plan(request: PlanRequest) -> Result<ReleasePlan, PluginError> {
        let how = how(&request.parameters);
        behave(&how);
        let mut plan = match how.as_str() {
            "empty" => PlanBuilder::new().build(),
            "twice-in-parallel" => twice_in_parallel(&request),
            "all-at-once" => all_at_once(&request),
            "cut-traffic" => cut_traffic(&request),
            "give-traffic-and-gate" => give_traffic_and_gate(&request),
            "cut-slowly"
            | "cut-twice"
            | "shift-bad-weight"
            | "shift-unknown-server"
            | "shift-unknown-application" => shifts(&request, &how),
            "childless"
            | "leaf-parent"
            | "too-deep"
            | "bad-name"
            | "long-pause"
            | "bad-scope"
            | "share-unknown-server"
            | "share-twice"
            | "share-nobody"
            | "share-nothing" => odd_before(&request, &how),
            other => one_by_one(&request, other),
        };
        match how.as_str() {
            "bad-parent" => {
                if let Some(node) = plan.nodes.first_mut() {
                    node.parent = Some(0);
                }
            }
            // Two nodes that stand above each other.
            "late-parent" => {
                if let Some(node) = plan.nodes.first_mut() {
                    node.parent = Some(1);
                }
            }
            "bad-share" => {
                let mut builder = PlanBuilder::new();
                let application = request.applications.first();
                builder.share(
                    None,
                    "too much",
                    TrafficShare {
                        application: application.map(|app| app.key.clone()).unwrap_or_default(),
                        servers: Vec::new(),
                        percent: 101,
                    },
                );
                plan.nodes.extend(builder.build().nodes);
            }
            "unknown-node" => {
                if let Some(node) = plan.nodes.last_mut() {
                    node.kind = NodeKind::Extension(Extension {
                        code: "teleport".into(),
                        arguments: "{}".into(),
                    });
                }
            }
            "auto-rollback"
            | "rollback-trap"
            | "rollback-all-at-once"
            | "rollback-missing"
            | "rollback-twice"
            | "rollback-empty" => {
                plan.on_failure = "roll-back".into();
            }
            _ => {}
        }
        Ok(plan)
    }

    fn rollback(
        request: PlanRequest,
        progress: Vec<UnitProgress>,
    ) -> Result<ReleasePlan, PluginError> {
        // What is to be brought back; the others stand there for their traffic.
        let mut request = request;
        for application in &mut request.applications {
            let key = application.key.clone();
            application.servers.retain(|server| {
                progress.iter().any(|unit| {
                    unit.application == key && unit.server == server.id && unit.state != "untouched"
                })
            });
        }
        request
            .applications
            .retain(|application| !application.servers.is_empty());
        match how(&request.parameters).as_str() {
            "rollback-missing" => Err(PluginError::unsupported("this guest has no rollback")),
            "rollback-empty" => Ok(PlanBuilder::new().build()),
            "rollback-trap" => panic!("this guest traps in rollback on purpose"),
            "rollback-all-at-once" => Ok(all_at_once(&request)),
            "rollback-twice" => Ok(twice_in_parallel(&request)),
            _ => Ok(one_by_one(&request, "")),
        }
    }

    fn judge(request: JudgeRequest) -> Result<Judgement, PluginError> {
        let how = how(&request.parameters);
        behave(&how);
        Ok(match how.as_str() {
            "judge-roll-back" => Judgement::new(Verdict::RollBack, "for the test"),
            "judge-hold" => Judgement::new(Verdict::Hold, "for the test"),
            _ if answers_otherwise() => Judgement::new(Verdict::RollBack, "otherwise"),
            _ => Judgement::new(Verdict::GoOn, "all is always good"),
        })
    }
}

fn all_at_once(request: &PlanRequest) -> ReleasePlan {
    let mut plan = PlanBuilder::new();
    let group = plan.parallel(None, "everything", Role::Group, NO_LIMIT);
    for application in &request.applications {
        for server in &application.servers {
            plan.release(
                Some(group),
                &server.name,
                ReleaseUnit::new(&application.key, &server.id),
            );
        }
    }
    plan.build()
}

fn twice_in_parallel(request: &PlanRequest) -> ReleasePlan {
    let mut plan = all_at_once(request);
    let again = all_at_once(request);
    let offset = u32::try_from(plan.nodes.len()).unwrap_or(u32::MAX);
    plan.nodes.extend(again.nodes.into_iter().map(|mut node| {
        node.parent = node.parent.map(|parent| parent + offset);
        node
    }));
    plan
}

fn cut_traffic(request: &PlanRequest) -> ReleasePlan {
    let mut plan = PlanBuilder::new();
    set_all(&mut plan, request, "cut all traffic", 0);
    then_one_by_one(plan, request)
}

fn give_traffic_and_gate(request: &PlanRequest) -> ReleasePlan {
    let mut plan = PlanBuilder::new();
    for application in &request.applications {
        let parent = plan.sequence(None, &application.key, Role::Application);
        for server in &application.servers {
            plan.release(
                Some(parent),
                &server.name,
                ReleaseUnit::new(&application.key, &server.id),
            );
        }
    }
    set_all(&mut plan, request, "give all traffic", 100);
    plan.gate(None, "look", "at the traffic");
    plan.build()
}

/// One shift for every application: the same weight for all its servers.
fn set_all(plan: &mut PlanBuilder, request: &PlanRequest, name: &str, weight: u32) {
    for application in &request.applications {
        let weights = application
            .servers
            .iter()
            .map(|server| (server.id.clone(), Weight::Exactly(weight)))
            .collect();
        plan.shift(
            None,
            name,
            TrafficShift {
                application: application.key.clone(),
                weights,
            },
        );
    }
}

/// One shift for every server.
fn shifts(request: &PlanRequest, how: &str) -> ReleasePlan {
    let mut plan = PlanBuilder::new();
    for application in &request.applications {
        for server in &application.servers {
            let id = server.id.clone();
            let weights = match how {
                "cut-twice" => vec![(id.clone(), Weight::Exactly(100)), (id, Weight::Exactly(0))],
                "shift-bad-weight" => vec![(id, Weight::Exactly(101))],
                "shift-unknown-server" => vec![("srv_nobody".into(), Weight::Exactly(1))],
                _ => vec![(id, Weight::Exactly(0))],
            };
            let application = match how {
                "shift-unknown-application" => "nothing".into(),
                _ => application.key.clone(),
            };
            plan.shift(
                None,
                &format!("shift {}", server.name),
                TrafficShift {
                    application,
                    weights,
                },
            );
        }
    }
    then_one_by_one(plan, request)
}

/// What is no plan, and behind it servers one by one.
fn odd_before(request: &PlanRequest, how: &str) -> ReleasePlan {
    let mut plan = PlanBuilder::new();
    let application = request.applications.first();
    let key = application.map(|app| app.key.clone()).unwrap_or_default();
    let all: Vec<String> = application
        .iter()
        .flat_map(|app| app.servers.iter().map(|server| server.id.clone()))
        .collect();
    let first = all.first().cloned().unwrap_or_default();
    let share = |servers: Vec<String>, percent| TrafficShare {
        application: key.clone(),
        servers,
        percent,
    };
    match how {
        "childless" => {
            plan.parallel(None, "nobody", Role::Plain, NO_LIMIT);
        }
        "leaf-parent" => {
            let gate = plan.gate(None, "wait", "here");
            plan.gate(Some(gate), "below", "there");
        }
        "too-deep" => {
            let mut parent = plan.sequence(None, "level", Role::Plain);
            for _ in 0..100 {
                parent = plan.sequence(Some(parent), "level", Role::Plain);
            }
            plan.gate(Some(parent), "wait", "far below");
        }
        "bad-name" => {
            plan.gate(None, "two\nlines", "here");
        }
        "long-pause" => {
            plan.pause(None, "pause", u64::MAX);
        }
        "share-unknown-server" => {
            plan.share(None, "share", share(vec!["srv_nobody".into()], 10));
        }
        "share-twice" => {
            plan.share(None, "share", share(vec![first.clone(), first], 10));
        }
        "share-nobody" => {
            plan.share(None, "share", share(Vec::new(), 100));
        }
        "share-nothing" => {
            plan.share(None, "share", share(all, 0));
        }
        _ => {
            plan.gate(None, "wait", "here");
        }
    }
    let mut plan = then_one_by_one(plan, request);
    if how == "bad-scope"
        && let Some(node) = plan.nodes.first_mut()
    {
        node.attributes = vec![("rollback".into(), "everything".into())];
    }
    plan
}

fn then_one_by_one(plan: PlanBuilder, request: &PlanRequest) -> ReleasePlan {
    let rest = one_by_one(request, "");
    let mut plan = plan.build();
    let offset = u32::try_from(plan.nodes.len()).unwrap_or(u32::MAX);
    plan.nodes.extend(rest.nodes.into_iter().map(|mut node| {
        node.parent = node.parent.map(|parent| parent + offset);
        node
    }));
    plan
}

fn one_by_one(request: &PlanRequest, how: &str) -> ReleasePlan {
    let mut plan = PlanBuilder::new();
    for application in &request.applications {
        let parent = plan.sequence(None, &application.key, Role::Application);
        for (index, server) in application.servers.iter().enumerate() {
            if how == "skip-servers" && index % 2 == 1 {
                continue;
            }
            let mut unit = ReleaseUnit::new(&application.key, &server.id);
            match how {
                "unknown-server" => unit.server = "srv_nobody".into(),
                "unknown-application" => unit.application = "nothing".into(),
                "bad-weight" => unit.restore = Weight::Exactly(1000),
                "duplicate-server" => {
                    plan.release(Some(parent), &server.name, unit.clone());
                }
                "endless-gates" => {
                    for _ in 0..100_000 {
                        plan.gate(Some(parent), "wait", "for ever");
                    }
                }
                _ => {}
            }
            plan.release(Some(parent), &server.name, unit);
            if how.starts_with("judge-") {
                plan.judge(Some(parent), "judge", &server.name, 0);
            }
            if how == "judge-and-gate" && index == 0 {
                plan.gate(Some(parent), "look", "at the first server");
            }
        }
    }
    plan.build()
}

windlass_sdk::deployment_strategy!(Strategy);
