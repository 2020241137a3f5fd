//! Planning: from what people asked for and what the catalogue holds to a plan, with the plugins' help.
//!
//! Owns the requests to strategies and tech stacks. Writes nothing but the plan's blob.
//!
//! | module | owns |
//! | --- | --- |
//! | `edits` | what changes of an order's plan take |
//! | `reads` | what a plan *reads*, and how it is compared later (drift) |
//! | `release` | the plan of a release |
//! | `operations` | the plan of an operation, and which servers take part |
//! | `templates` | the flow that a process template gives |
//! | `rollback` | the plan of a rollback |
//! | `running` | what the engine asks while an order runs |
//! | `faults` | what a request is refused for |
//!
//! | subject of a read | what counts |
//! | --- | --- |
//! | `instance {name}` | parameters, environment, stack version, cells, pools |
//! | `package {application}` | version and digest |
//! | `plugin {kind} {name}` | version and digest that would be taken now |
//! | `cells` | the workspace's cells |
//! | `back ends of {pool}` | which servers stand behind a pool of a load balancer, and at which address and port; no weights |
//! | `servers of {name}`, `servers of {name} in {cells}` | which servers are bound: all of them, or in the cells chosen |
//! | `server {name}` | cell, address, system, variables |
//! | `installed {application} on {server}` | release and plan that are installed |
//! | `state of {application} on {server}` | released, failed, offline…: of operations |
//! | `pools of {application}` | the pools: of operations on what is installed |
//! | `process template {id}` | its steps |

mod edits;
mod faults;
mod operations;
mod reads;
mod release;
mod rollback;
mod running;
mod templates;

use std::sync::Arc;

use semver::VersionReq;
use windlass_domain::{
    application::Application,
    expand::{self, PartInput, PlanInput},
    id::{InstanceId, ServerId},
    instance::{Binding, ServiceInstance},
    manifest::Manifest,
    order::{ReleaseSpec, StackChange},
    plan::Plan,
    plugin::{PluginKind, ServerFacts, StrategyPlan, StrategyServer, Wishes},
    pool::Pool,
    server::Server,
    stages::BadDependencies,
    value::{Environment, Value},
    workspace::{DeploymentZone, Workspace},
};
use windlass_runtime::{Plugin, Plugins};
use windlass_store::{Blobs, Store};

use self::faults::{internal, invalid, lookup_failed};
use super::{
    ServiceError,
    apps::Apps,
    chosen,
    instances::Instances,
    load_balancers::{self, Behind},
    packages::Packages,
    servers::Servers,
    templates::Templates,
    workspaces::Workspaces,
};
use crate::engine::{Agents, rows, traffic::TrafficPools};
pub(super) use faults::plugin_failed;

/// Applications of one order.
const MAX_TARGETS: usize = 100;

/// Makes plans. Cheap to clone.
#[derive(Clone)]
pub struct Planner {
    parts: Arc<PlannerParts>,
}

/// What planning reads.
pub struct PlannerParts {
    /// Rows of the engine: what is installed.
    pub store: Arc<dyn Store>,
    /// Plans.
    pub blobs: Blobs,
    /// Strategies and tech stacks.
    pub plugins: Arc<Plugins>,
    /// Who is connected.
    pub agents: Arc<dyn Agents>,
    /// Workspaces.
    pub workspaces: Workspaces,
    /// Applications.
    pub apps: Apps,
    /// Packages.
    pub packages: Packages,
    /// Service instances.
    pub instances: Instances,
    /// Servers.
    pub servers: Servers,
    /// Process templates.
    pub templates: Templates,
    /// Weights.
    pub pools: Arc<dyn TrafficPools>,
}

impl Planner {
    /// A planner over these parts.
    #[must_use]
    pub fn new(parts: PlannerParts) -> Self {
        Self {
            parts: Arc::new(parts),
        }
    }

    /// A service instance that a request names.
    async fn instance(
        &self,
        workspace: &Workspace,
        id: InstanceId,
        field: String,
    ) -> Result<ServiceInstance, ServiceError> {
        let ws = workspace.name.as_str();
        let found = self.parts.instances.get(ws, id).await;
        let (instance, _) = found.map_err(|error| match error {
            ServiceError::NotFound { .. } => invalid(
                "instance_unknown",
                field,
                format!("there is no service instance {id} in the workspace `{ws}`"),
                "give ids of service instances of this workspace",
            ),
            other => other,
        })?;
        Ok(instance)
    }

    /// The tech stack of an instance, which its parameters fit; in the version that is named, or in its own.
    fn stack(
        &self,
        app: &Application,
        instance: &ServiceInstance,
        named: Option<&VersionReq>,
        field: String,
    ) -> Result<Plugin, ServiceError> {
        let wanted = named
            .or(instance.tech_stack_version.as_ref())
            .unwrap_or(&app.tech_stack.version);
        let stack = self
            .parts
            .plugins
            .get_of_kind(
                PluginKind::TechStack,
                app.tech_stack.name.as_str(),
                specific(wanted),
            )
            .map_err(|error| lookup_failed(field, &error))?;
        stack
            .validate_parameters(&instance.parameters)
            .map_err(|faults| {
                chosen::parameters_invalid("/parameters", stack.reference(), &faults)
            })?;
        Ok(stack)
    }

    /// The tech-stack versions that a release changes, if it succeeds.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] of a service instance.
    pub async fn tech_stack_changes(
        &self,
        workspace: &str,
        spec: &ReleaseSpec,
    ) -> Result<Vec<StackChange>, ServiceError> {
        let mut changes = Vec::new();
        for target in &spec.targets {
            let Some(wanted) = &target.tech_stack_version else {
                continue;
            };
            let (instance, _) = self.parts.instances.get(workspace, target.instance).await?;
            if instance.tech_stack_version.as_ref() != Some(wanted) {
                changes.push(StackChange {
                    instance: target.instance,
                    before: instance.tech_stack_version,
                    after: Some(wanted.clone()),
                });
            }
        }
        Ok(changes)
    }

    /// The servers bound to an instance, in some cells, by name.
    async fn bound(
        &self,
        instance: &ServiceInstance,
        cells: &[String],
    ) -> Result<Vec<(Server, Binding)>, ServiceError> {
        let mut servers = Vec::new();
        for binding in self.parts.instances.bindings(instance.id).await? {
            let (server, _) = self
                .parts
                .servers
                .get(instance.workspace.as_str(), binding.server)
                .await?;
            if cells.is_empty() || cells.iter().any(|cell| *cell == cell_of(&server)) {
                servers.push((server, binding));
            }
        }
        servers.sort_by(|(one, _), (two, _)| one.name.cmp(&two.name));
        Ok(servers)
    }

    /// A strategy by `name` or `name@version`.
    fn strategy(&self, wanted: &str) -> Result<Plugin, ServiceError> {
        let (name, version) = match wanted.split_once('@') {
            None => (wanted, None),
            Some((name, version)) => {
                let requirement = format!("={version}").parse::<VersionReq>().map_err(|_| {
                    invalid(
                        "strategy_invalid",
                        "/strategy".to_owned(),
                        format!("`{version}` is not a version"),
                        "give a name, or `name@version` with a version such as 1.0.0",
                    )
                })?;
                (name, Some(requirement))
            }
        };
        self.parts
            .plugins
            .get_of_kind(PluginKind::DeploymentStrategy, name, version.as_ref())
            .map_err(|error| lookup_failed("/strategy".to_owned(), &error))
    }

    fn approved(&self, plugin: &Plugin) -> Wishes {
        if self.parts.plugins.is_approved(plugin.reference().digest) {
            plugin.descriptor().wishes.clone()
        } else {
            Wishes::default()
        }
    }

    fn strategy_server(
        &self,
        workspace: &Workspace,
        server: &Server,
        installed: Option<&Manifest>,
    ) -> StrategyServer {
        StrategyServer {
            id: server.id.to_string(),
            name: server.name.to_string(),
            cell: cell_of(server),
            zone: zone_of(workspace, &cell_of(server)),
            healthy: self.parts.agents.is_online(server.id),
            installed_version: installed.map(|installed| installed.package.version.clone()),
        }
    }

    async fn installed(
        &self,
        instance: InstanceId,
        server: ServerId,
    ) -> Result<Option<Manifest>, ServiceError> {
        let key = rows::installed(instance, server);
        self.manifest(&key).await
    }

    async fn manifest(&self, key: &windlass_store::Key) -> Result<Option<Manifest>, ServiceError> {
        let row = rows::read(&*self.parts.store, key, "what is installed").await;
        Ok(row
            .map_err(|error| internal("read what is installed", error))?
            .map(|(manifest, _)| manifest))
    }
}

/// A strategy's answer as a plan.
fn expanded(
    strategy: &Plugin,
    input: PlanInput,
    answer: &StrategyPlan,
) -> Result<Plan, ServiceError> {
    expand::expand(input, answer).map_err(|bad| {
        let plugin = strategy.reference();
        invalid(
            "plan_refused",
            "/strategy".to_owned(),
            format!(
                "the plan of the strategy `{}@{}` is refused: {bad}",
                plugin.name, plugin.version
            ),
            "change the order's parameters or limits, fix the strategy, or choose another one; no server was touched",
        )
    })
}

fn check_cells(workspace: &Workspace, cells: &[String], field: &str) -> Result<(), ServiceError> {
    for cell in cells {
        let known = |known: &windlass_domain::workspace::Cell| known.name.as_str() == cell;
        if !workspace.cells.iter().any(known) {
            return Err(invalid(
                "no_such_cell",
                field.to_owned(),
                format!("the workspace `{}` has no cell `{cell}`", workspace.name),
                "name cells of the workspace, or none for all",
            ));
        }
    }
    Ok(())
}

fn dependencies_invalid(error: BadDependencies) -> ServiceError {
    invalid(
        "dependencies_invalid",
        "/dependencies".to_owned(),
        error.to_string(),
        "mend the dependencies",
    )
}

/// The cell of a server that was put in none.
const NO_CELL: &str = "none";

/// Its cell's identifier; servers in no cell are treated as those of one cell.
fn cell_of(server: &Server) -> String {
    server
        .cell
        .as_ref()
        .map_or_else(|| NO_CELL.to_owned(), ToString::to_string)
}

/// The identifiers of a workspace's cells, in their order.
fn cell_names(workspace: &Workspace) -> Vec<String> {
    let cells = workspace.cells.iter();
    cells.map(|cell| cell.name.to_string()).collect()
}

/// The deployment zone of a cell.
fn zone_of(workspace: &Workspace, cell: &str) -> String {
    let known = workspace
        .cells
        .iter()
        .find(|known| known.name.as_str() == cell);
    known.map_or_else(
        || cell.to_owned(),
        |known| match known.deployment_zone {
            DeploymentZone::A => "a".to_owned(),
            DeploymentZone::B => "b".to_owned(),
        },
    )
}

/// What stands behind the pools of parts.
async fn behind(
    store: &dyn Store,
    workspace: &Workspace,
    parts: &[PartInput],
) -> Result<Vec<(Pool, Vec<Behind>)>, ServiceError> {
    let pools = parts.iter().flat_map(|part| &part.part.pools);
    load_balancers::behind(store, workspace.name.as_str(), pools.copied().collect()).await
}

/// A requirement that says something: `*` is the default version, which may be pinned.
fn specific(wanted: &VersionReq) -> Option<&VersionReq> {
    Some(wanted).filter(|wanted| **wanted != VersionReq::STAR)
}

fn facts(server: &Server, binding: &Binding) -> ServerFacts {
    let (os, os_version) = server
        .facts
        .os
        .split_once(' ')
        .unwrap_or((&server.facts.os, ""));
    ServerFacts {
        id: server.id.to_string(),
        name: server.name.to_string(),
        os: os.to_owned(),
        os_version: os_version.to_owned(),
        arch: server.facts.arch.clone(),
        address: server.facts.addresses.first().cloned().unwrap_or_default(),
        cell: cell_of(server),
        variables: binding
            .variables
            .iter()
            .map(|(key, value)| (key.to_string(), value.clone()))
            .collect(),
    }
}

fn server_environment(server: &Server, binding: &Binding) -> Environment {
    let own = [
        ("WINDLASS_SERVER", server.name.to_string()),
        ("WINDLASS_CELL", cell_of(server)),
    ];
    let own = own
        .into_iter()
        .map(|(name, value)| (name.to_owned(), Value::Plain(value)));
    let variables = binding
        .variables
        .iter()
        .map(|(key, value)| (key.to_string(), Value::Plain(value.clone())));
    own.chain(variables).collect()
}
