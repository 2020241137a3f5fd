//! The deployment strategy `grouped`: the servers of each application in groups, one group after the other.
//!
//! Applications of a lower stage come first; within a stage they go side by side. Source: spec "Release orders", "Grouping".
//! The plan keeps within the order's limits by itself (a group never has more servers of one cell in flight than may be
//! unavailable), so that the core's envelope has nothing to refuse.

mod grouping;
mod parameters;

use std::collections::BTreeMap;

use windlass_sdk::{
    DeploymentStrategy, Descriptor, PluginError, parse_parameters,
    strategy::{
        Application, Limits, NodeRef, ParallelLimits, PlanBuilder, PlanRequest, ReleasePlan,
        ReleaseUnit, Role, Server, UnitProgress, Weight,
    },
};

use crate::{
    grouping::{Group, amount_of, beta_group, groups_of},
    parameters::{Grouping, Parameters, schema},
};

/// The plugin.
#[derive(Debug)]
pub struct Grouped;

impl DeploymentStrategy for Grouped {
    fn describe() -> Descriptor {
        Descriptor::new("grouped", "1.0.0")
            .title("In groups")
            .summary(
                "Releases the servers of each application in groups: one server first and then waves, by cell, one by one, \
                 all at once, or as listed. With a beta group, gray traffic, pauses and automatic rollback.",
            )
            .provider("Windlass")
            .category("general")
            .parameters(&schema())
            .preset(
                "beta-first",
                "A beta group, then waves, rolling back by itself",
                &serde_json::json!({ "grouping": "quick", "beta_group": true, "auto_rollback": true }),
            )
    }

    fn plan(request: PlanRequest) -> Result<ReleasePlan, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        if parameters.grouping == Grouping::AllInOne && request.limits.max_unavailable != "100%" {
            return Err(PluginError::not_possible(format!(
                "grouping `all-in-one` makes all servers unavailable at once: the order's limit max_unavailable is {}, set it to 100%",
                request.limits.max_unavailable
            )));
        }
        let mut plan = PlanBuilder::new();
        plan.progress_deadline_ms(
            parameters
                .progress_deadline_s
                .map(|s| s.saturating_mul(1000)),
        );
        if parameters.auto_rollback {
            plan.roll_back_on_failure();
        }
        parameters.check_groups(&request.applications)?;
        for (stage, applications) in by_stage(&request.applications) {
            let parent = stage_node(&mut plan, stage, applications.len());
            for application in applications {
                plan_application(&mut plan, parent, application, &parameters, &request.limits)?;
            }
        }
        Ok(plan.build())
    }

    fn rollback(
        request: PlanRequest,
        progress: Vec<UnitProgress>,
    ) -> Result<ReleasePlan, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let mut plan = PlanBuilder::new();
        plan.progress_deadline_ms(
            parameters
                .progress_deadline_s
                .map(|s| s.saturating_mul(1000)),
        );
        // What was released last depends on what was released first: stages in reverse.
        for (stage, applications) in by_stage(&request.applications).into_iter().rev() {
            let changed: Vec<_> = applications
                .into_iter()
                .filter_map(|application| {
                    let (failed, released) = changed_servers(application, &progress);
                    (!failed.is_empty() || !released.is_empty()).then_some((
                        application,
                        failed,
                        released,
                    ))
                })
                .collect();
            if changed.is_empty() {
                continue;
            }
            let parent = stage_node(&mut plan, stage, changed.len());
            for (application, failed, released) in changed {
                let node = plan.sequence(parent, &application.key, Role::Application);
                let mut groups = Vec::new();
                if !failed.is_empty() {
                    groups.push(Group {
                        name: "failed servers".into(),
                        servers: failed,
                    });
                }
                groups.extend(groups_of(application, released, &parameters)?);
                for group in groups {
                    release_group(
                        &mut plan,
                        node,
                        application,
                        &group,
                        &parameters,
                        &request.limits,
                        Weight::Remembered,
                    );
                }
            }
        }
        Ok(plan.build())
    }
}

/// Applications to be released, by stage. Those that only take part in moving traffic are left as they are: this strategy
/// moves that of servers that it releases alone.
fn by_stage(applications: &[Application]) -> BTreeMap<u32, Vec<&Application>> {
    let mut stages: BTreeMap<u32, Vec<&Application>> = BTreeMap::new();
    let released = applications
        .iter()
        .filter(|application| application.role != "shift-only");
    for application in released {
        stages
            .entry(application.stage)
            .or_default()
            .push(application);
    }
    stages
}

/// Where the applications of a stage go: side by side if there are several, else straight to the top.
fn stage_node(plan: &mut PlanBuilder, stage: u32, applications: usize) -> Option<NodeRef> {
    let no_limit = ParallelLimits {
        max_in_flight: 0,
        max_failures: 0,
    };
    (applications > 1)
        .then(|| plan.parallel(None, &format!("stage A{stage}"), Role::Plain, no_limit))
}

fn plan_application(
    plan: &mut PlanBuilder,
    parent: Option<NodeRef>,
    application: &Application,
    parameters: &Parameters,
    limits: &Limits,
) -> Result<(), PluginError> {
    let node = plan.sequence(parent, &application.key, Role::Application);
    let mut servers: Vec<&Server> = application.servers.iter().collect();
    let mut groups = Vec::new();
    let has_beta = parameters.beta_group && !servers.is_empty();
    if has_beta {
        let beta = beta_group(&servers);
        servers.retain(|server| !beta.iter().any(|chosen| chosen.id == server.id));
        groups.push(Group {
            name: "beta".into(),
            servers: beta,
        });
    }
    groups.extend(groups_of(application, servers, parameters)?);
    let restore = match (parameters.gray_traffic, parameters.weight_override) {
        (true, _) => Weight::KeepZero,
        (false, Some(weight)) => Weight::Exactly(weight),
        (false, None) => Weight::Remembered,
    };
    let last = groups.len().saturating_sub(1);
    for (index, group) in groups.iter().enumerate() {
        release_group(plan, node, application, group, parameters, limits, restore);
        if parameters.gray_traffic {
            plan.gate(
                Some(node),
                &format!("confirm {}", group.name),
                "Released without traffic: set weights of the released servers by hand, watch them, then confirm.",
            );
        } else if has_beta && index == 0 {
            plan.gate(
                Some(node),
                "confirm beta",
                "The beta group is released: check it, then confirm to release the others.",
            );
        }
        if index < last && parameters.pause_s > 0 {
            plan.pause(
                Some(node),
                &format!("pause after {}", group.name),
                parameters.pause_s.saturating_mul(1000),
            );
        }
    }
    Ok(())
}

fn release_group(
    plan: &mut PlanBuilder,
    parent: NodeRef,
    application: &Application,
    group: &Group<'_>,
    parameters: &Parameters,
    limits: &Limits,
    restore: Weight,
) {
    let node = plan.parallel(
        Some(parent),
        &group.name,
        Role::Group,
        ParallelLimits {
            max_in_flight: in_flight(application, group, parameters, limits),
            max_failures: parameters.max_failures,
        },
    );
    for server in &group.servers {
        let mut unit = ReleaseUnit::new(&application.key, &server.id);
        unit.restore = restore;
        unit.healthy_for_ms = parameters.min_healthy_s.saturating_mul(1000);
        unit.health_deadline_ms = parameters.health_deadline_s.map(|s| s.saturating_mul(1000));
        plan.release(Some(node), &server.name, unit);
    }
}

/// How many servers of a group go at once: what the user asked for, and never more of one cell than may be unavailable.
fn in_flight(
    application: &Application,
    group: &Group<'_>,
    parameters: &Parameters,
    limits: &Limits,
) -> u32 {
    if parameters.grouping == Grouping::AllInOne {
        return parameters.max_in_flight;
    }
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let mut most = match parameters.max_in_flight {
        0 => limits.max_in_flight,
        wanted => wanted.min(limits.max_in_flight),
    };
    let mut cells: BTreeMap<&str, u32> = BTreeMap::new();
    for server in &group.servers {
        *cells.entry(&server.cell).or_default() += 1;
    }
    for (cell, in_group) in cells {
        let of_cell = || {
            application
                .servers
                .iter()
                .filter(|server| server.cell == cell)
        };
        let allowed = amount_of(&limits.max_unavailable, count(of_cell().count())).max(1);
        // Unhealthy servers that this group does not release count as unavailable already.
        let down = count(
            of_cell()
                .filter(|server| {
                    !server.healthy && !group.servers.iter().any(|mine| mine.id == server.id)
                })
                .count(),
        );
        let free = allowed.saturating_sub(down).max(1);
        if in_group > free {
            most = if most == 0 { free } else { most.min(free) };
        }
    }
    most
}

/// The servers of an application that an order changed: failed ones, and released ones.
fn changed_servers<'a>(
    application: &'a Application,
    progress: &[UnitProgress],
) -> (Vec<&'a Server>, Vec<&'a Server>) {
    let mut failed = Vec::new();
    let mut released = Vec::new();
    for server in &application.servers {
        let state = progress
            .iter()
            .find(|unit| unit.application == application.key && unit.server == server.id)
            .map_or("untouched", |unit| unit.state.as_str());
        match state {
            "untouched" => {}
            "released" => released.push(server),
            // The contract: a state that is not known counts as failed.
            _ => failed.push(server),
        }
    }
    (failed, released)
}

windlass_sdk::deployment_strategy!(Grouped);

#[cfg(test)]
mod tests;
