//! Which cell is blue, which is green, and whether the applications are such that they can change places.

use windlass_sdk::{
    PluginError,
    strategy::{Application, PlanRequest, Server},
};

use crate::parameters::Parameters;

/// The two cells.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Cells {
    pub(crate) blue: String,
    pub(crate) green: String,
}

/// Whether an application is released, and does not only take part in moving traffic.
pub(crate) fn is_released(application: &Application) -> bool {
    application.role != "shift-only"
}

impl Cells {
    /// The cells of a request that fulfils what a blue-green release needs.
    pub(crate) fn of(request: &PlanRequest, parameters: &Parameters) -> Result<Self, PluginError> {
        let cells = request.cells();
        let [first, second] = cells[..] else {
            return Err(PluginError::not_possible(format!(
                "a blue-green release needs a workspace with exactly two cells, and this one has {}{}",
                cells.len(),
                if cells.is_empty() {
                    String::new()
                } else {
                    format!(": {}", cells.join(", "))
                }
            )));
        };
        let green = parameters.green.as_deref().unwrap_or(second);
        let blue = match green {
            green if green == first => second,
            green if green == second => first,
            other => {
                return Err(PluginError::invalid_parameter(
                    "/green",
                    format!(
                        "`{other}` is not a cell of the workspace, which has {first} and {second}"
                    ),
                ));
            }
        };
        let cells = Self {
            blue: blue.into(),
            green: green.into(),
        };
        let mut released = false;
        let mut takes_traffic = false;
        for application in &request.applications {
            released |= is_released(application);
            takes_traffic |= application.has_pools;
            cells.check(application)?;
        }
        if !released {
            return Err(PluginError::not_possible(
                "a blue-green release needs an application to release: all of this order's only take part in shifting",
            ));
        }
        if !takes_traffic {
            return Err(PluginError::not_possible(
                "None of the applications in this order has a pool, so a blue-green release has no traffic to move. Add a \
                 pool to at least one of their service instances, or use the strategy `grouped` with `grouping` `by-cell`.",
            ));
        }
        Ok(cells)
    }

    /// The servers of an application in a cell.
    pub(crate) fn servers_in<'a>(
        &self,
        application: &'a Application,
        cell: &str,
    ) -> impl Iterator<Item = &'a Server> {
        application
            .servers
            .iter()
            .filter(move |server| server.cell == cell)
    }

    fn check(&self, application: &Application) -> Result<(), PluginError> {
        let Application { key, servers, .. } = application;
        if !is_released(application) && !application.has_pools {
            return Err(PluginError::not_possible(format!(
                "`{key}` is to take part in shifting only, and it takes no traffic from a pool: leave it out"
            )));
        }
        let outside = servers
            .iter()
            .find(|server| server.cell != self.blue && server.cell != self.green);
        if let Some(server) = outside {
            return Err(PluginError::not_possible(format!(
                "the server {} of `{key}` is in neither of the cells {} and {}: put it into one of them",
                server.name, self.blue, self.green
            )));
        }
        for cell in [&self.blue, &self.green] {
            if !servers.iter().any(|server| server.cell == *cell) {
                let why = if application.has_pools {
                    "its traffic could not go there"
                } else {
                    "nothing of it could be released there"
                };
                return Err(PluginError::not_possible(format!(
                    "`{key}` has no server in the cell {cell}, so that {why}: bind one to its service instance, and release \
                     to both cells"
                )));
            }
        }
        Ok(())
    }
}

/// What an amount of the contract (`3`, `25%`) is of a total; shares are rounded down. Unknown texts count as nothing.
pub(crate) fn amount_of(amount: &str, total: usize) -> u32 {
    let total = u64::try_from(total).unwrap_or(u64::MAX);
    let count = match amount.strip_suffix('%') {
        Some(percent) => percent
            .parse::<u64>()
            .map_or(0, |percent| total.saturating_mul(percent) / 100),
        None => amount.parse().unwrap_or(0),
    };
    u32::try_from(count).unwrap_or(u32::MAX)
}
