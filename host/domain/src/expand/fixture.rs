//! Small orders to be planned, for tests of what a plan is expanded from and what becomes of it.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::{
    digest::Digest,
    flow,
    id::{AppId, InstanceId, PoolId, ServerId},
    limits::Limits,
    manifest::{Manifest, PluginRef},
    plan::{Part, Read},
    plugin::{
        LifecyclePlan, NodeRole, OnFailure, Phase, RestoreWeight, RollbackScope, StackAction,
        StackStep, StrategyNode, StrategyNodeKind, StrategyPlan, StrategyUnit, Wishes,
    },
    task::{Check, PackageFormat, PackageRef, Probe, Restart, Script, Supervise},
    value::{Environment, Value},
};

use super::{PartInput, PlanInput, ServerInput};

pub(crate) fn server_id(number: u128) -> ServerId {
    ServerId::from_uuid(Uuid::from_u128(number))
}

pub(crate) fn env(pairs: &[(&str, &str)]) -> Environment {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), Value::Plain((*value).to_owned())))
        .collect()
}

pub(crate) fn plugin(name: &str) -> PluginRef {
    PluginRef {
        name: name.to_owned(),
        version: semver::Version::new(1, 0, 0),
        digest: Digest::of(name.as_bytes()),
    }
}

pub(crate) fn package(version: &str) -> PackageRef {
    PackageRef {
        digest: Digest::of(version.as_bytes()),
        size_bytes: 7,
        format: PackageFormat::TarGz,
        file_name: "shop.tgz".to_owned(),
        version: version.to_owned(),
    }
}

pub(crate) fn script(text: &str) -> StackAction {
    StackAction::Script(Script {
        interpreter: vec!["/bin/sh".to_owned(), "-eu".to_owned()],
        text: text.to_owned(),
        working_dir: None,
    })
}

pub(crate) fn step(phase: Phase, name: &str, action: StackAction) -> StackStep {
    StackStep {
        phase,
        name: name.to_owned(),
        action,
        run_as: None,
        env: Environment::new(),
        timeout_ms: 60_000,
        retries: 0,
        repeatable: false,
    }
}

/// What a stack of every phase answers, not in the order of the phases.
pub(crate) fn steps() -> Vec<StackStep> {
    let start = StackAction::Start(Supervise {
        command: vec!["./shop".to_owned()],
        working_dir: None,
        restart: Restart::Always,
        keep_running: false,
    });
    let check = StackAction::Check(Check {
        probe: Probe::Tcp {
            address: "127.0.0.1:80".to_owned(),
        },
        interval_ms: 100,
        try_timeout_ms: 1_000,
        healthy_for_ms: 2_000,
    });
    let config = StackAction::WriteFile {
        path: "shop.conf".to_owned(),
        content: "port = 80".to_owned(),
        mode: 0o644,
    };
    vec![
        step(Phase::Check, "listens", check),
        step(
            Phase::Stop,
            "stop the new one",
            StackAction::Stop { grace_ms: 10 },
        ),
        step(Phase::Install, "runtime", script("install")),
        step(Phase::Prepare, "directories", script("mkdir")),
        step(Phase::Configure, "configuration", config),
        step(Phase::Start, "start", start),
        step(Phase::Deploy, "migrate", script("migrate")),
        step(Phase::Prepare, "users", script("useradd")),
    ]
}

pub(crate) fn server(number: u128) -> ServerInput {
    ServerInput {
        id: server_id(number),
        name: format!("web-{number}"),
        cell: "a".to_owned(),
        env: env(&[("PORT", "80"), ("OF", "server")]),
        installed: None,
        drained_by: None,
        reads: vec![format!("server web-{number}")],
    }
}

/// What an earlier release left on a server.
pub(crate) fn installed() -> Manifest {
    let mut stop = step(Phase::Stop, "stop the old one", script("kill"));
    stop.env = env(&[("SIGNAL", "TERM")]);
    stop.run_as = Some("shop".to_owned());
    stop.timeout_ms = 5_000;
    Manifest {
        instance: InstanceId::from_uuid(Uuid::from_u128(2)),
        app: AppId::from_uuid(Uuid::from_u128(1)),
        release: "0.9-0123456789ab".to_owned(),
        package: package("0.9"),
        stack: plugin("binary"),
        stop: vec![stop],
        start: Vec::new(),
        check: Vec::new(),
        env: env(&[("PORT", "79"), ("SIGNAL", "INT")]),
        plan: None,
        prepared: None,
    }
}

/// An application with a pool.
pub(crate) fn part(key: &str, servers: Vec<ServerInput>) -> PartInput {
    PartInput {
        part: Part {
            key: key.to_owned(),
            app: AppId::from_uuid(Uuid::from_u128(1)),
            instance: InstanceId::from_uuid(Uuid::from_u128(2)),
            package: Some(package("1.0")),
            stack: Some(plugin("binary")),
            pools: vec![PoolId::from_uuid(Uuid::from_u128(3))],
            env: env(&[("OF", "part"), ("STAGE", "test")]),
            prepare: Vec::new(),
            stop: Vec::new(),
            start: Vec::new(),
            check: Vec::new(),
        },
        steps: LifecyclePlan {
            steps: steps(),
            server_env: BTreeMap::new(),
        },
        approved: Wishes {
            users: vec!["shop".to_owned()],
            path_roots: vec!["/etc/shop/".to_owned(), "/srv/www".to_owned()],
        },
        flow: flow::release(),
        files: None,
        from_cache: false,
        servers,
        only_traffic: Vec::new(),
    }
}

/// Servers 1 and 2 of `shop`.
pub(crate) fn input() -> PlanInput {
    PlanInput {
        strategy: Some(plugin("grouped")),
        limits: Limits::default(),
        drain_deadline_ms: 30_000,
        delivery_deadline_ms: 600_000,
        parts: vec![part("shop", vec![server(1), server(2)])],
        reads: [("b", "2"), ("a", "1")]
            .map(|(subject, shown)| {
                let read = Read {
                    digest: Digest::of(shown.as_bytes()),
                    shown: shown.to_owned(),
                };
                (subject.to_owned(), read)
            })
            .into(),
    }
}

pub(crate) fn node(parent: Option<u32>, name: &str, kind: StrategyNodeKind) -> StrategyNode {
    StrategyNode {
        parent,
        name: name.to_owned(),
        role: NodeRole::Plain,
        rollback: RollbackScope::Order,
        kind,
    }
}

pub(crate) fn parallel(name: &str) -> StrategyNode {
    let kind = StrategyNodeKind::Parallel {
        max_in_flight: 0,
        max_failures: 0,
    };
    StrategyNode {
        role: NodeRole::Group,
        ..node(None, name, kind)
    }
}

pub(crate) fn unit_of(application: &str, server: u128) -> StrategyUnit {
    StrategyUnit {
        application: application.to_owned(),
        server: server_id(server).to_string(),
        restore: RestoreWeight::Remembered,
        healthy_for_ms: 0,
        health_deadline_ms: None,
    }
}

pub(crate) fn unit(parent: Option<u32>, server: u128) -> StrategyNode {
    let kind = StrategyNodeKind::Unit(unit_of("shop", server));
    node(parent, &format!("web-{server}"), kind)
}

pub(crate) fn strategy(nodes: Vec<StrategyNode>) -> StrategyPlan {
    StrategyPlan {
        nodes,
        on_failure: OnFailure::Block,
        progress_deadline_ms: None,
    }
}

/// Both servers of [`input`] at once.
pub(crate) fn all_at_once() -> StrategyPlan {
    strategy(vec![parallel("all"), unit(Some(0), 1), unit(Some(0), 2)])
}
