//! Requests that the kit makes: one ordinary one for each function, whose parameters and size are then changed.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use windlass_domain::{
    digest::Digest,
    limits::Limits,
    plugin::{
        AppRole, CommandOutcome, CommandRequest, CommandRun, DiagnosisRequest, DiagnosisSubject,
        JudgeRequest, LifecycleRequest, Observation, Phase, RollbackRequest, ServerFacts,
        StrategyApp, StrategyRequest, StrategyServer, UnitProgress, UnitState,
    },
    task::{PackageFormat, PackageRef},
};

use crate::call::Export;

/// Servers of an ordinary request.
pub(crate) const SERVERS: usize = 3;

/// An ordinary request of a function: an application `shop` on some servers, to be released in version 2.
///
/// Its JSON is what [`crate::Plugin::call_json`] takes. `describe` has `{}`.
#[must_use]
pub fn ordinary_request(export: Export, parameters: &Value, servers: usize) -> Value {
    let parameters = parameters.clone();
    let request = match export {
        Export::Describe => Ok(json!({})),
        Export::Lifecycle => serde_json::to_value(LifecycleRequest {
            application: "shop".into(),
            instance: "shop-prod".into(),
            package: Some(PackageRef {
                digest: Digest::of(b"package"),
                size_bytes: 1024,
                format: PackageFormat::TarGz,
                file_name: "shop.tar.gz".into(),
                version: "2".into(),
            }),
            parameters,
            env: BTreeMap::new(),
            phases: vec![
                Phase::Prepare,
                Phase::Install,
                Phase::Configure,
                Phase::Stop,
                Phase::Deploy,
                Phase::Start,
                Phase::Check,
            ],
            servers: (1..=servers).map(server).collect(),
        }),
        Export::Plan => serde_json::to_value(strategy(parameters, servers)),
        Export::Rollback => {
            let request = strategy(parameters, servers);
            let progress = (1..=servers)
                .map(|number| UnitProgress {
                    application: "shop".into(),
                    server: format!("srv-{number}"),
                    state: match number % 3 {
                        1 => UnitState::Released,
                        2 => UnitState::Failed,
                        _ => UnitState::Untouched,
                    },
                })
                .collect();
            serde_json::to_value(RollbackRequest { request, progress })
        }
        Export::Judge => serde_json::to_value(JudgeRequest {
            stage: "batch-1".into(),
            parameters,
            observations: (1..=servers)
                .map(|number| Observation {
                    application: "shop".into(),
                    server: format!("srv-{number}"),
                    metric: "unit.released".into(),
                    value: 1.0,
                })
                .collect(),
        }),
        Export::Render => serde_json::to_value(CommandRequest {
            parameters,
            target: server(1),
        }),
        Export::Interpret => serde_json::to_value(CommandRun {
            parameters,
            outcome: CommandOutcome::Finished,
            exit_code: Some(0),
            output: "ok\n".into(),
            dropped_bytes: 0,
        }),
        Export::Diagnose => serde_json::to_value(DiagnosisRequest {
            subject: DiagnosisSubject {
                kind: "server".into(),
                id: "srv-1".into(),
                data: json!({}),
            },
            parameters,
            items: Vec::new(),
        }),
    };
    request.expect("requests have string keys")
}

/// Lays the fields that an author gave over an ordinary request: what is left out stays ordinary.
#[must_use]
pub fn request_with(export: Export, given: &Value) -> Value {
    let parameters = given
        .get("parameters")
        .cloned()
        .unwrap_or_else(|| json!({}));
    let mut request = ordinary_request(export, &parameters, SERVERS);
    match (request.as_object_mut(), given.as_object()) {
        (Some(fields), Some(given)) => {
            for (name, value) in given {
                fields.insert(name.clone(), value.clone());
            }
            request
        }
        (Some(_), None) | (None, _) => given.clone(),
    }
}

/// The parameters inside a request, to be replaced.
pub(crate) fn set_parameters(export: Export, request: &mut Value, parameters: Value) {
    let place = match export {
        Export::Rollback => "/request/parameters",
        Export::Describe
        | Export::Lifecycle
        | Export::Plan
        | Export::Judge
        | Export::Render
        | Export::Interpret
        | Export::Diagnose => "/parameters",
    };
    if let Some(old) = request.pointer_mut(place) {
        *old = parameters;
    }
}

fn server(number: usize) -> ServerFacts {
    ServerFacts {
        id: format!("srv-{number}"),
        name: format!("web-{number}"),
        os: "debian".into(),
        os_version: "12".into(),
        arch: "x86_64".into(),
        address: "127.0.0.1".into(),
        cell: "cell-1".into(),
        variables: BTreeMap::new(),
    }
}

fn strategy(parameters: Value, servers: usize) -> StrategyRequest {
    StrategyRequest {
        parameters,
        limits: Limits::default(),
        cells: vec!["cell-1".into(), "cell-2".into()],
        applications: vec![StrategyApp {
            key: "shop".into(),
            stage: 1,
            role: AppRole::Release,
            has_pools: true,
            target_version: "2".into(),
            servers: (1..=servers)
                .map(|number| StrategyServer {
                    id: format!("srv-{number}"),
                    name: format!("web-{number}"),
                    cell: format!("cell-{}", number % 2 + 1),
                    zone: format!("zone-{}", number % 3 + 1),
                    healthy: number % 7 != 0,
                    installed_version: Some("1".into()),
                })
                .collect(),
        }],
    }
}
