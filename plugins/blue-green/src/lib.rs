//! The deployment strategy `blue-green`: the applications of one cell, green, are released while the other, blue, has all
//! the traffic; then they change places.
//!
//! Five steps, each a stage that can be rolled back by itself until it is confirmed. Source: spec "Blue-green release".
//!
//! | step | traffic | released | way back |
//! | --- | --- | --- | --- |
//! | 1 cut traffic | all to blue | | of the step, of the order |
//! | 2 release green | blue; by hand 0 to 50 % to green | green, all applications side by side | likewise |
//! | 3 switch traffic | all to green | | likewise |
//! | 4 release blue | green; by hand 0 to 50 % to blue | blue | of the step |
//! | 5 restore traffic | as before the order | | none |
//!
//! Steps 2 and 4 begin by taking the traffic from what they release: whatever became of the step before, nothing is released
//! that serves. Dependencies are ignored: a cell without traffic may be inconsistent for a while.

mod cells;
mod parameters;

use windlass_sdk::{
    DeploymentStrategy, Descriptor, PluginError, parse_parameters,
    strategy::{
        Application, Limits, NodeRef, ParallelLimits, PlanBuilder, PlanRequest, ReleasePlan,
        ReleaseUnit, Role, Rollback, Server, TrafficShare, TrafficShift, UnitProgress, Weight,
    },
};

use crate::{
    cells::{Cells, is_released},
    parameters::{Parameters, schema},
};

/// The plugin.
#[derive(Debug)]
pub struct BlueGreen;

impl DeploymentStrategy for BlueGreen {
    fn describe() -> Descriptor {
        Descriptor::new("blue-green", "1.0.0")
            .title("Blue-green")
            .summary(
                "Releases the servers of one cell while the other has all the traffic, switches over, and releases the \
                 other. Needs a workspace of exactly two cells, with servers of every application in both. Traffic can be \
                 shifted by hand to what was just released; every step waits for confirmation and can be rolled back.",
            )
            .provider("Windlass")
            .category("general")
            .parameters(&schema())
    }

    fn plan(request: PlanRequest) -> Result<ReleasePlan, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let cells = Cells::of(&request, &parameters)?;
        let mut plan = PlanBuilder::new();
        plan.progress_deadline_ms(parameters.progress_deadline_ms());
        if parameters.auto_rollback {
            plan.roll_back_on_failure();
        }
        let mut steps = Steps {
            plan,
            request: &request,
            parameters: &parameters,
            cells: &cells,
        };
        steps.traffic(
            "1 cut traffic",
            &cells.blue,
            "All traffic goes to blue. Confirm to release green.",
        );
        steps.release(
            "2 release green",
            &cells.green,
            &cells.blue,
            Rollback::Order,
        );
        steps.traffic(
            "3 switch traffic",
            &cells.green,
            "All traffic goes to green, which runs the new version. Confirm to release blue: from then on the order as a \
             whole cannot be rolled back.",
        );
        steps.release("4 release blue", &cells.blue, &cells.green, Rollback::Stage);
        steps.restore("5 restore traffic");
        Ok(steps.plan.build())
    }

    fn rollback(
        request: PlanRequest,
        progress: Vec<UnitProgress>,
    ) -> Result<ReleasePlan, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let mut plan = PlanBuilder::new();
        plan.progress_deadline_ms(parameters.progress_deadline_ms());
        // Traffic is the core's: away from these servers before, and back to what it was behind.
        let all = plan.parallel(None, "applications", Role::Plain, NO_LIMIT);
        for application in &request.applications {
            let is_changed = |server: &&Server| {
                progress.iter().any(|unit| {
                    unit.application == application.key
                        && unit.server == server.id
                        && unit.state != "untouched"
                })
            };
            let changed: Vec<&Server> = application.servers.iter().filter(is_changed).collect();
            if !changed.is_empty() {
                release_servers(
                    &mut plan,
                    all,
                    application,
                    &changed,
                    &parameters,
                    &request.limits,
                );
            }
        }
        Ok(plan.build())
    }
}

const NO_LIMIT: ParallelLimits = ParallelLimits {
    max_in_flight: 0,
    max_failures: 0,
};

/// The steps in the making.
struct Steps<'a> {
    plan: PlanBuilder,
    request: &'a PlanRequest,
    parameters: &'a Parameters,
    cells: &'a Cells,
}

impl Steps<'_> {
    /// A step that gives one cell all the traffic.
    fn traffic(&mut self, name: &str, to: &str, look: &str) {
        let step = self.plan.stage(None, name, Rollback::Order);
        self.all_to(step, to);
        self.plan.gate(Some(step), &format!("confirm {name}"), look);
    }

    /// A step that releases one cell while the other has the traffic.
    fn release(&mut self, name: &str, cell: &str, other: &str, rollback: Rollback) {
        let request = self.request;
        let step = self.plan.stage(None, name, rollback);
        self.all_to(step, other);
        let side_by_side = self
            .plan
            .parallel(Some(step), "applications", Role::Plain, NO_LIMIT);
        for application in request.applications.iter().filter(|app| is_released(app)) {
            let servers: Vec<&Server> = self.cells.servers_in(application, cell).collect();
            release_servers(
                &mut self.plan,
                side_by_side,
                application,
                &servers,
                self.parameters,
                &request.limits,
            );
        }
        let look = format!(
            "The cell {cell} runs the new version without traffic: shift 0 to 50 % to it to see it serve, then confirm."
        );
        self.plan
            .gate(Some(step), &format!("confirm {name}"), &look);
    }

    fn all_to(&mut self, step: NodeRef, cell: &str) {
        let request = self.request;
        let pools = self
            .plan
            .parallel(Some(step), "traffic", Role::Plain, NO_LIMIT);
        for application in request.applications.iter().filter(|app| app.has_pools) {
            let share = TrafficShare {
                application: application.key.clone(),
                servers: self
                    .cells
                    .servers_in(application, cell)
                    .map(|server| server.id.clone())
                    .collect(),
                percent: 100,
            };
            let name = format!("{} to {cell}", application.key);
            self.plan.share(Some(pools), &name, share);
        }
    }

    fn restore(&mut self, name: &str) {
        let request = self.request;
        let step = self.plan.stage(None, name, Rollback::Nothing);
        let pools = self
            .plan
            .parallel(Some(step), "traffic", Role::Plain, NO_LIMIT);
        for application in request.applications.iter().filter(|app| app.has_pools) {
            let shift = TrafficShift {
                application: application.key.clone(),
                weights: application
                    .servers
                    .iter()
                    .map(|server| (server.id.clone(), Weight::Remembered))
                    .collect(),
            };
            let name = format!("{} as before", application.key);
            self.plan.shift(Some(pools), &name, shift);
        }
    }
}

fn release_servers(
    plan: &mut PlanBuilder,
    parent: NodeRef,
    application: &Application,
    servers: &[&Server],
    parameters: &Parameters,
    limits: &Limits,
) {
    let allowed = cells::amount_of(&limits.max_unavailable, servers.len()).max(1);
    let most = [parameters.max_in_flight, limits.max_in_flight, allowed];
    let most = most.into_iter().filter(|most| *most > 0).min();
    let node = plan.sequence(Some(parent), &application.key, Role::Application);
    let group = plan.parallel(
        Some(node),
        &application.key,
        Role::Group,
        ParallelLimits {
            max_in_flight: most.unwrap_or(0),
            max_failures: 0,
        },
    );
    for server in servers {
        let mut unit = ReleaseUnit::new(&application.key, &server.id);
        unit.healthy_for_ms = parameters.min_healthy_s.saturating_mul(1000);
        unit.health_deadline_ms = parameters
            .health_deadline_s
            .map(|seconds| seconds.saturating_mul(1000));
        plan.release(Some(group), &server.name, unit);
    }
}

windlass_sdk::deployment_strategy!(BlueGreen);

#[cfg(test)]
mod tests;
