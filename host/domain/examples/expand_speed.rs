//! How long it takes to expand a plan: `cargo run --release -p windlass-domain --example expand_speed`.
//!
//! Plans of N servers with M applications each, all in one group per application; each server's turn has eight steps.
//! One line per plan: nodes, milliseconds for checking and expanding, and for the plan's digest.

use std::{collections::BTreeMap, time::Instant};

use uuid::Uuid;
use windlass_domain::{
    Digest,
    expand::{PartInput, PlanInput, ServerInput, expand},
    flow,
    id::{AppId, InstanceId, PoolId, ServerId},
    limits::Limits,
    manifest::{Manifest, PluginRef},
    plan::Part,
    plugin::{
        LifecyclePlan, NodeRole, OnFailure, Phase, RestoreWeight, RollbackScope, StackAction,
        StackStep, StrategyNode, StrategyNodeKind, StrategyPlan, StrategyUnit, Wishes,
    },
    task::{PackageFormat, PackageRef, Script},
    value::{Environment, Value},
};

fn main() {
    for (servers, applications) in [(10, 1), (200, 20), (1000, 1), (1000, 20)] {
        run(servers, applications);
    }
}

fn run(servers: u32, applications: u32) {
    let parts: Vec<_> = (0..applications).map(|app| part(app, servers)).collect();
    let strategy = strategy(&parts);
    let input = PlanInput {
        strategy: None,
        limits: Limits::default(),
        drain_deadline_ms: 30_000,
        delivery_deadline_ms: 600_000,
        parts,
        reads: BTreeMap::new(),
    };
    let begin = Instant::now();
    let plan = match expand(input, &strategy) {
        Ok(plan) => plan,
        Err(bad) => {
            println!("{servers} servers x {applications} applications: refused: {bad}");
            return;
        }
    };
    let expanded = begin.elapsed();
    let begin = Instant::now();
    let digest = plan.digest();
    println!(
        "{servers} servers x {applications} applications: {} nodes, {} steps, {} ms, digest {} in {} ms",
        plan.nodes.len(),
        plan.steps.len(),
        expanded.as_millis(),
        digest.short(),
        begin.elapsed().as_millis(),
    );
}

/// A group for each application, and its servers in it.
fn strategy(parts: &[PartInput]) -> StrategyPlan {
    let mut nodes = Vec::new();
    for part in parts {
        let group = u32::try_from(nodes.len()).expect("few nodes");
        nodes.push(StrategyNode {
            parent: None,
            name: part.part.key.clone(),
            role: NodeRole::Group,
            rollback: RollbackScope::Order,
            kind: StrategyNodeKind::Parallel {
                max_in_flight: 0,
                max_failures: 0,
            },
        });
        nodes.extend(part.servers.iter().map(|server| StrategyNode {
            parent: Some(group),
            name: server.name.clone(),
            role: NodeRole::Plain,
            rollback: RollbackScope::Order,
            kind: StrategyNodeKind::Unit(StrategyUnit {
                application: part.part.key.clone(),
                server: server.id.to_string(),
                restore: RestoreWeight::Remembered,
                healthy_for_ms: 0,
                health_deadline_ms: None,
            }),
        }));
    }
    StrategyPlan {
        nodes,
        on_failure: OnFailure::Block,
        progress_deadline_ms: None,
    }
}

fn part(app: u32, servers: u32) -> PartInput {
    let stack = PluginRef {
        name: "binary".to_owned(),
        version: semver::Version::new(1, 0, 0),
        digest: Digest::of(b"binary"),
    };
    let package = PackageRef {
        digest: Digest::of(b"package"),
        size_bytes: 1,
        format: PackageFormat::Jar,
        file_name: "app.jar".to_owned(),
        version: "1".to_owned(),
    };
    let part = Part {
        key: format!("app-{app}"),
        app: AppId::from_uuid(Uuid::from_u128(u128::from(app))),
        instance: InstanceId::from_uuid(Uuid::from_u128(u128::from(app))),
        package: Some(package.clone()),
        stack: Some(stack.clone()),
        pools: vec![PoolId::from_uuid(Uuid::from_u128(u128::from(app)))],
        env: environment(10),
        prepare: Vec::new(),
        stop: Vec::new(),
        start: Vec::new(),
        check: Vec::new(),
    };
    let installed = Manifest {
        instance: part.instance,
        app: part.app,
        release: "0-0123456789ab".to_owned(),
        package,
        stack,
        stop: vec![step(Phase::Stop)],
        start: Vec::new(),
        check: Vec::new(),
        env: environment(10),
        plan: None,
        prepared: None,
    };
    PartInput {
        flow: flow::release(),
        files: None,
        part,
        steps: LifecyclePlan {
            steps: [Phase::Start, Phase::Check].map(step).into(),
            server_env: BTreeMap::new(),
        },
        approved: Wishes::default(),
        from_cache: false,
        only_traffic: Vec::new(),
        servers: (0..servers)
            .map(|server| ServerInput {
                id: ServerId::from_uuid(Uuid::from_u128(u128::from(server))),
                name: format!("web-{server}"),
                cell: "a".to_owned(),
                env: environment(3),
                installed: Some(installed.clone()),
                drained_by: None,
                reads: vec![format!("server web-{server}")],
            })
            .collect(),
    }
}

fn environment(variables: u32) -> Environment {
    (0..variables)
        .map(|number| (format!("NAME_{number}"), Value::Plain("value".to_owned())))
        .collect()
}

fn step(phase: Phase) -> StackStep {
    StackStep {
        phase,
        name: format!("{phase:?}"),
        action: StackAction::Script(Script {
            interpreter: vec!["/bin/sh".to_owned()],
            text: "echo a script of some length\n".repeat(30),
            working_dir: None,
        }),
        run_as: None,
        env: Environment::new(),
        timeout_ms: 60_000,
        retries: 0,
        repeatable: false,
    }
}
