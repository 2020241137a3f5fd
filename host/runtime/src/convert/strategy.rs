//! Deployment strategies.

use windlass_domain::plugin::{
    AppRole, JudgeRequest, Judgement, NodeRole, OnFailure, RestoreWeight, RollbackScope,
    ShiftWeight, StrategyNode, StrategyNodeKind, StrategyPlan, StrategyRequest, StrategyUnit,
    UnitProgress, UnitState, Verdict,
};

use crate::{
    bindings::deployment_strategy::exports::windlass::plugin::strategy as wit,
    convert::lifecycle::unknown_code, error::CallFailure,
};

pub(crate) fn request_to_guest(request: &StrategyRequest) -> wit::PlanRequest {
    wit::PlanRequest {
        operation: "release".to_owned(),
        parameters: request.parameters.to_string(),
        limits: wit::Limits {
            max_unavailable: request.limits.max_unavailable.to_string(),
            max_in_flight: request.limits.max_in_flight,
            max_failures: request.limits.max_failures.to_string(),
            min_healthy_members: request.limits.min_healthy_members,
        },
        applications: request
            .applications
            .iter()
            .map(|app| wit::Application {
                key: app.key.clone(),
                stage: app.stage,
                role: match app.role {
                    AppRole::Release => "release",
                    AppRole::ShiftOnly => "shift-only",
                }
                .to_owned(),
                has_pools: app.has_pools,
                target_version: app.target_version.clone(),
                servers: app
                    .servers
                    .iter()
                    .map(|server| wit::Server {
                        id: server.id.clone(),
                        name: server.name.clone(),
                        cell: server.cell.clone(),
                        zone: server.zone.clone(),
                        healthy: server.healthy,
                        installed_version: server.installed_version.clone(),
                        attributes: Vec::new(),
                    })
                    .collect(),
                attributes: Vec::new(),
            })
            .collect(),
        attributes: vec![("cells".to_owned(), request.cells.join(","))],
    }
}

pub(crate) fn progress_to_guest(progress: &[UnitProgress]) -> Vec<wit::UnitProgress> {
    progress
        .iter()
        .map(|unit| wit::UnitProgress {
            application: unit.application.clone(),
            server: unit.server.clone(),
            state: match unit.state {
                UnitState::Untouched => "untouched",
                UnitState::Released => "released",
                UnitState::Failed => "failed",
            }
            .to_owned(),
        })
        .collect()
}

pub(crate) fn plan_from_guest(plan: wit::ReleasePlan) -> Result<StrategyPlan, CallFailure> {
    Ok(StrategyPlan {
        nodes: plan
            .nodes
            .into_iter()
            .enumerate()
            .map(|(index, node)| node_from_guest(index, node))
            .collect::<Result<_, _>>()?,
        on_failure: match plan.on_failure.as_str() {
            "block" => OnFailure::Block,
            "roll-back" => OnFailure::RollBack,
            other => return Err(unknown_code("on-failure", other)),
        },
        progress_deadline_ms: plan.progress_deadline_ms,
    })
}

fn node_from_guest(index: usize, node: wit::Node) -> Result<StrategyNode, CallFailure> {
    let field = format!("nodes[{index}]");
    // Checked here because the tree is the contract's own shape: whatever reads the list may rely on it.
    if let Some(parent) = node.parent
        && parent as usize >= index
    {
        return Err(CallFailure::invalid(
            format!("{field}.parent"),
            format!("is {parent}: a parent stands before its children"),
        ));
    }
    let kind = match node.kind {
        wit::NodeKind::Sequence => StrategyNodeKind::Sequence,
        wit::NodeKind::Parallel(limits) => StrategyNodeKind::Parallel {
            max_in_flight: limits.max_in_flight,
            max_failures: limits.max_failures,
        },
        wit::NodeKind::Release(unit) => StrategyNodeKind::Unit(StrategyUnit {
            application: unit.application,
            server: unit.server,
            restore: match unit.restore {
                wit::Weight::Remembered => RestoreWeight::Remembered,
                wit::Weight::KeepZero => RestoreWeight::KeepZero,
                wit::Weight::Exactly(weight) => {
                    RestoreWeight::Override(weight_in(&format!("{field}.restore"), weight)?)
                }
            },
            healthy_for_ms: unit.healthy_for_ms,
            health_deadline_ms: unit.health_deadline_ms,
        }),
        wit::NodeKind::Shift(shift) => {
            let mut weights = Vec::with_capacity(shift.weights.len());
            for (server, weight) in shift.weights {
                let weight = match weight {
                    wit::Weight::Exactly(weight) => {
                        ShiftWeight::Exactly(weight_in(&format!("{field}.weights"), weight)?)
                    }
                    wit::Weight::KeepZero => ShiftWeight::Exactly(0),
                    wit::Weight::Remembered => ShiftWeight::Remembered,
                };
                weights.push((server, weight));
            }
            StrategyNodeKind::Shift {
                application: shift.application,
                weights,
            }
        }
        wit::NodeKind::Share(share) => StrategyNodeKind::Share {
            application: share.application,
            servers: share.servers,
            percent: share.percent,
        },
        wit::NodeKind::Gate(message) => StrategyNodeKind::Gate { message },
        wit::NodeKind::Pause(duration_ms) => StrategyNodeKind::Pause { duration_ms },
        wit::NodeKind::Judge(judge) => StrategyNodeKind::Judge {
            stage: judge.stage,
            window_ms: judge.window_ms,
        },
        wit::NodeKind::Extension(extension) => {
            return Err(unknown_code(&format!("{field}.kind"), &extension.code));
        }
    };
    let rollback = node.attributes.iter().find(|(key, _)| key == "rollback");
    let rollback = match rollback.map(|(_, code)| code.as_str()) {
        None => RollbackScope::Order,
        Some("stage") => RollbackScope::Stage,
        Some("none") => RollbackScope::Nothing,
        Some(other) => return Err(unknown_code(&format!("{field}.attributes.rollback"), other)),
    };
    Ok(StrategyNode {
        parent: node.parent,
        name: node.name,
        role: match node.role.as_str() {
            "application" => NodeRole::Application,
            "group" => NodeRole::Group,
            "stage" => NodeRole::Stage,
            // The contract: any other code counts as plain.
            _ => NodeRole::Plain,
        },
        rollback,
        kind,
    })
}

fn weight_in(field: &str, weight: u32) -> Result<u32, CallFailure> {
    if weight <= 100 {
        Ok(weight)
    } else {
        Err(CallFailure::invalid(
            field,
            format!("is {weight}: weights are 0 to 100"),
        ))
    }
}

pub(crate) fn judge_to_guest(request: &JudgeRequest) -> wit::JudgeRequest {
    wit::JudgeRequest {
        stage: request.stage.clone(),
        parameters: request.parameters.to_string(),
        observations: request
            .observations
            .iter()
            .map(|observation| wit::Observation {
                application: observation.application.clone(),
                server: observation.server.clone(),
                metric: observation.metric.clone(),
                value: observation.value,
            })
            .collect(),
        attributes: Vec::new(),
    }
}

pub(crate) fn judgement_from_guest(mut judgement: wit::Judgement) -> Judgement {
    windlass_domain::text::cut_message(&mut judgement.reason);
    Judgement {
        verdict: match judgement.verdict {
            wit::Verdict::GoOn => Verdict::GoOn,
            wit::Verdict::Hold => Verdict::Hold,
            wit::Verdict::RollBack => Verdict::RollBack,
            wit::Verdict::Extend => Verdict::Extend,
        },
        reason: judgement.reason,
    }
}
