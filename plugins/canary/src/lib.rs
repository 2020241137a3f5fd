//! The deployment strategy `canary`: a part of the servers gets the new version and a part of the traffic; figures decide
//! whether it becomes more.
//!
//! For each percentage: so many of the servers are released, and together they get exactly that share of every pool's
//! traffic; then figures are collected and judged (see `judge`). At 100 % the rest follows in waves, and weights are
//! what they were before. Source: spec "Release orders"; the judgement's rules stand in `judge`.
//!
//! ```text
//! 5 %:  release 1 of 10 ─► share 5 %  ─► judge ─┬─ go on ─► 25 %: release 2 more ─► share 25 % ─► judge ─► …
//!                                     ▲         ├─ extend (too little seen) ─┐
//!                                     └─────────┼────────────────────────────┘
//!                                               ├─ hold: a person decides
//!                                               └─ roll back
//! ```

mod judge;
mod parameters;

use std::collections::BTreeMap;

use windlass_sdk::{
    DeploymentStrategy, Descriptor, PluginError, parse_parameters,
    strategy::{
        Application, JudgeRequest, Judgement, Limits, NodeRef, ParallelLimits, PlanBuilder,
        PlanRequest, ReleasePlan, ReleaseUnit, Role, Server, TrafficShare, TrafficShift,
        UnitProgress, Weight,
    },
};

use crate::parameters::{Parameters, schema};

/// Servers that follow at once after the last judgement: a quarter of all.
const WAVES: usize = 4;

/// The plugin.
#[derive(Debug)]
pub struct Canary;

impl DeploymentStrategy for Canary {
    fn describe() -> Descriptor {
        Descriptor::new("canary", "1.0.0")
            .title("Canary")
            .summary(
                "Releases a part of the servers and gives them a share of the traffic, in rising percentages. After each, \
                 requests, errors and latency of the new version are compared with the old one's at the same time: it goes \
                 on, waits for a person, or rolls back by itself. With too few requests it waits for more and never goes on.",
            )
            .provider("Windlass")
            .category("general")
            .parameters(&schema())
            .preset(
                "careful",
                "Small steps of five minutes each, and a person confirms each",
                &serde_json::json!({ "percentages": [1, 5, 10, 25, 50, 100], "window_s": 300, "confirm": true }),
            )
    }

    fn plan(request: PlanRequest) -> Result<ReleasePlan, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        parameters.check()?;
        let mut plan = PlanBuilder::new();
        plan.progress_deadline_ms(parameters.progress_deadline_ms());
        if parameters.auto_rollback {
            plan.roll_back_on_failure();
        }
        for application in &request.applications {
            check_application(application)?;
        }
        for (stage, applications) in by_stage(&request.applications) {
            let parent = stage_node(&mut plan, stage, applications.len());
            for application in applications {
                let node = plan.sequence(parent, &application.key, Role::Application);
                plan_application(&mut plan, node, application, &parameters, &request.limits);
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
        plan.progress_deadline_ms(parameters.progress_deadline_ms());
        let all = plan.sequence(None, "applications", Role::Plain);
        // Traffic is the core's: away from these servers before, and back to what it was behind. Stages in reverse.
        for application in request.applications.iter().rev() {
            let in_state = |wanted: fn(&str) -> bool| -> Vec<&Server> {
                let is = |server: &&Server| {
                    progress.iter().any(|unit| {
                        unit.application == application.key
                            && unit.server == server.id
                            && wanted(&unit.state)
                    })
                };
                application.servers.iter().filter(is).collect()
            };
            let failed = in_state(|state| state != "released" && state != "untouched");
            let released = in_state(|state| state == "released");
            if failed.is_empty() && released.is_empty() {
                continue;
            }
            let node = plan.sequence(Some(all), &application.key, Role::Application);
            for (name, servers) in [("failed servers", failed), ("released servers", released)] {
                if !servers.is_empty() {
                    let most = in_flight(application, &servers, &parameters, &request.limits);
                    let group = group(&mut plan, node, name, most);
                    for server in servers {
                        let unit = ReleaseUnit::new(&application.key, &server.id);
                        plan.release(Some(group), &server.name, unit);
                    }
                }
            }
        }
        Ok(plan.build())
    }

    fn judge(request: JudgeRequest) -> Result<Judgement, PluginError> {
        judge::judge(&request)
    }
}

fn check_application(application: &Application) -> Result<(), PluginError> {
    let key = &application.key;
    if application.role == "shift-only" {
        return Err(PluginError::unsupported(format!(
            "a canary releases what gets its traffic: `{key}` is to take part in shifting only; leave it out"
        )));
    }
    if !application.has_pools {
        return Err(PluginError::not_possible(format!(
            "a canary is judged by its traffic, and `{key}` takes none from a pool: give its service instance a pool, or \
             choose the strategy `grouped`"
        )));
    }
    if application.servers.len() < 2 {
        return Err(PluginError::not_possible(format!(
            "a canary is compared with servers of the old version, and `{key}` has {} server: bind another, or choose the \
             strategy `grouped`",
            application.servers.len()
        )));
    }
    Ok(())
}

fn by_stage(applications: &[Application]) -> BTreeMap<u32, Vec<&Application>> {
    let mut stages: BTreeMap<u32, Vec<&Application>> = BTreeMap::new();
    for application in applications {
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
    node: NodeRef,
    application: &Application,
    parameters: &Parameters,
    limits: &Limits,
) {
    let servers = cells_in_turn(application);
    let mut released: Vec<&Server> = Vec::new();
    for percent in parameters.percentages.iter().copied() {
        let name = format!("{percent} %");
        let part = plan.sequence(Some(node), &name, Role::Plain);
        if percent < 100 {
            let until = servers_for(percent, servers.len());
            let next = &servers[released.len()..until.max(released.len())];
            release_group(plan, part, application, &name, next, parameters, limits);
            released.extend(next);
            let share = TrafficShare {
                application: application.key.clone(),
                servers: released.iter().map(|server| server.id.clone()).collect(),
                percent,
            };
            plan.share(Some(part), &format!("{name} of the traffic"), share);
        } else {
            let rest = &servers[released.len()..];
            let size = servers.len().div_ceil(WAVES);
            for (wave, next) in (1..).zip(rest.chunks(size)) {
                let name = format!("{name}, wave {wave}");
                release_group(plan, part, application, &name, next, parameters, limits);
                released.extend(next);
                let weights = released
                    .iter()
                    .map(|server| (server.id.clone(), Weight::Remembered));
                let shift = TrafficShift {
                    application: application.key.clone(),
                    weights: weights.collect(),
                };
                plan.shift(Some(part), &format!("{name}: weights as before"), shift);
            }
        }
        let stage = judge::stage(&application.key, percent);
        plan.judge(
            Some(part),
            &format!("judge {name}"),
            &stage,
            parameters.window_ms(),
        );
        if parameters.confirm && percent < 100 {
            plan.gate(
                Some(part),
                &format!("confirm {name}"),
                "The figures of the new version are good: look at it, then confirm to go on.",
            );
        }
    }
}

/// How many of `all` servers run the new version at this percentage: rounded up, and at least one stays with the old one.
fn servers_for(percent: u32, all: usize) -> usize {
    let share = usize::try_from(percent).unwrap_or(100);
    (all * share).div_ceil(100).clamp(1, all - 1)
}

/// The servers, one cell after the other in turn, so that the first ones stand in as many cells as there are.
fn cells_in_turn(application: &Application) -> Vec<&Server> {
    let mut cells: BTreeMap<&str, Vec<&Server>> = BTreeMap::new();
    for server in &application.servers {
        cells.entry(&server.cell).or_default().push(server);
    }
    let longest = cells.values().map(Vec::len).max().unwrap_or(0);
    (0..longest)
        .flat_map(|turn| {
            cells
                .values()
                .filter_map(move |servers| servers.get(turn).copied())
        })
        .collect()
}

fn release_group(
    plan: &mut PlanBuilder,
    parent: NodeRef,
    application: &Application,
    name: &str,
    servers: &[&Server],
    parameters: &Parameters,
    limits: &Limits,
) {
    if servers.is_empty() {
        return;
    }
    let most = in_flight(application, servers, parameters, limits);
    let group = group(plan, parent, name, most);
    for server in servers {
        let mut unit = ReleaseUnit::new(&application.key, &server.id);
        // The share that follows gives it its part.
        unit.restore = Weight::KeepZero;
        unit.healthy_for_ms = parameters.min_healthy_s.saturating_mul(1000);
        unit.health_deadline_ms = parameters
            .health_deadline_s
            .map(|seconds| seconds.saturating_mul(1000));
        plan.release(Some(group), &server.name, unit);
    }
}

fn group(plan: &mut PlanBuilder, parent: NodeRef, name: &str, max_in_flight: u32) -> NodeRef {
    let limits = ParallelLimits {
        max_in_flight,
        max_failures: 0,
    };
    plan.parallel(Some(parent), name, Role::Group, limits)
}

/// How many go at once: what the user asked for, and never more of one cell than may be unavailable.
fn in_flight(
    application: &Application,
    servers: &[&Server],
    parameters: &Parameters,
    limits: &Limits,
) -> u32 {
    let mut most = match parameters.max_in_flight {
        0 => limits.max_in_flight,
        wanted => wanted.min(limits.max_in_flight),
    };
    for server in servers {
        let of_cell = application
            .servers
            .iter()
            .filter(|other| other.cell == server.cell)
            .count();
        let allowed = amount_of(&limits.max_unavailable, of_cell).max(1);
        most = if most == 0 {
            allowed
        } else {
            most.min(allowed)
        };
    }
    most
}

/// What an amount of the contract (`3`, `25%`) is of a total; shares are rounded down. Unknown texts count as nothing.
fn amount_of(amount: &str, total: usize) -> u32 {
    let total = u64::try_from(total).unwrap_or(u64::MAX);
    let count = match amount.strip_suffix('%') {
        Some(percent) => percent
            .parse::<u64>()
            .map_or(0, |percent| total.saturating_mul(percent) / 100),
        None => amount.parse().unwrap_or(0),
    };
    u32::try_from(count).unwrap_or(u32::MAX)
}

windlass_sdk::deployment_strategy!(Canary);

#[cfg(test)]
mod tests;
