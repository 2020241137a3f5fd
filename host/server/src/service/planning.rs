//! Planning: from what people asked for and what the catalogue holds to a plan, with the plugins' help.
//!
//! Owns the requests to strategies and tech stacks. Writes nothing but the plan's blob.
//!
//! | module | owns |
//! | --- | --- |
//! | `edits` | what changes of an order's plan take |
//! | `reads` | what a plan *reads*, and how it is compared later (drift) |
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
mod rollback;
mod running;
mod templates;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use semver::VersionReq;
use windlass_domain::{
    application::Application,
    expand::{self, PartInput, PlanInput, ServerInput},
    flow,
    id::{InstanceId, ServerId},
    instance::{Binding, ServiceInstance},
    manifest::Manifest,
    order::{ReleaseSpec, ShiftTarget, StackChange, Target},
    package::Package,
    plan::{Part, Plan, Read},
    plugin::{
        AppRole, LifecyclePlan, LifecycleRequest, Phase, PluginKind, ServerFacts, StrategyApp,
        StrategyPlan, StrategyRequest, StrategyServer, Wishes,
    },
    pool::Pool,
    revise::arrange,
    server::Server,
    stages::{BadDependencies, stages},
    template::TemplateKind,
    value::{Environment, Value},
    workspace::{DeploymentZone, Workspace},
};
use windlass_runtime::{Plugin, Plugins};
use windlass_store::{Blobs, Store};

use self::{
    faults::{
        Layers, check_environment, check_environment_size, check_limits, internal, invalid,
        lookup_failed, parameters_invalid,
    },
    reads::{
        back_ends_subject, installed_subject, instance_subject, members_subject, package_subject,
        plugin_subject, read_back_ends, read_cells, read_installed, read_instance, read_members,
        read_package, read_plugin, read_server, server_subject,
    },
};
use super::{
    ServiceError,
    apps::Apps,
    instances::Instances,
    load_balancers::{self, Behind},
    packages::Packages,
    servers::Servers,
    templates::Templates,
    workspaces::Workspaces,
};
use crate::engine::{Agents, rows};
pub(super) use faults::plugin_failed;

/// Phases of a release, in order.
const RELEASE_PHASES: [Phase; 7] = [
    Phase::Prepare,
    Phase::Install,
    Phase::Configure,
    Phase::Stop,
    Phase::Deploy,
    Phase::Start,
    Phase::Check,
];

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
}

/// One application of a release, with everything that was read for it.
struct Chosen {
    instance: ServiceInstance,
    app_name: String,
    package: Package,
    stack: Plugin,
    /// Those to be released.
    servers: Vec<(Server, Binding)>,
    /// All that could be, as they are read.
    members: Read,
    /// Only servers of these cells; empty: all.
    cells: Vec<String>,
    parameters: Environment,
}

impl Planner {
    /// A planner over these parts.
    #[must_use]
    pub fn new(parts: PlannerParts) -> Self {
        Self {
            parts: Arc::new(parts),
        }
    }

    /// Plans a release. Nothing is written.
    ///
    /// # Errors
    /// [`ServiceError`] names the field, the plugin, or the rule that a plugin's answer broke.
    pub async fn plan_release(
        &self,
        workspace: &str,
        spec: &ReleaseSpec,
    ) -> Result<Plan, ServiceError> {
        self.plan_servers(workspace, spec, None).await
    }

    /// Likewise, of some servers alone.
    async fn plan_servers(
        &self,
        workspace: &str,
        spec: &ReleaseSpec,
        only: Option<&BTreeSet<ServerId>>,
    ) -> Result<Plan, ServiceError> {
        let (workspace, _) = self.parts.workspaces.get(workspace).await?;
        if spec.shift_only.len() > MAX_TARGETS {
            return Err(ServiceError::Limit {
                code: "targets_out_of_range",
                field: "/shift_only".to_owned(),
                message: format!(
                    "an order shifts the traffic of at most {MAX_TARGETS} further service instances, and this one names {}",
                    spec.shift_only.len()
                ),
                limit: MAX_TARGETS as u64,
                current: spec.shift_only.len() as u64,
                mend: "name fewer service instances".to_owned(),
            });
        }
        if spec.targets.is_empty() || spec.targets.len() > MAX_TARGETS {
            return Err(ServiceError::Limit {
                code: "targets_out_of_range",
                field: "/targets".to_owned(),
                message: format!(
                    "an order releases 1 to {MAX_TARGETS} service instances, and this one names {}",
                    spec.targets.len()
                ),
                limit: MAX_TARGETS as u64,
                current: spec.targets.len() as u64,
                mend: "name the service instances to release, and split larger releases".to_owned(),
            });
        }
        check_limits(
            &spec.limits,
            spec.drain_deadline_ms,
            spec.delivery_deadline_ms,
        )?;
        check_environment("/environment", &spec.environment)?;
        let mut chosen = Vec::with_capacity(spec.targets.len());
        let mut seen = HashSet::new();
        for (index, target) in spec.targets.iter().enumerate() {
            let mut part = self.choose(&workspace, index, target).await?;
            if let Some(only) = only {
                part.servers.retain(|(server, _)| only.contains(&server.id));
            }
            if !seen.insert(part.app_name.clone()) {
                return Err(invalid(
                    "target_twice",
                    format!("/targets/{index}/instance"),
                    format!(
                        "the application `{}` stands in this order twice",
                        part.app_name
                    ),
                    "name each application once",
                ));
            }
            chosen.push(part);
        }
        let names: Vec<&str> = chosen.iter().map(|part| part.app_name.as_str()).collect();
        let stage_of = stages(&names, &spec.dependencies).map_err(dependencies_invalid)?;
        chosen.sort_by_key(|part| stage_of.get(&part.app_name).copied().unwrap_or(1));

        let strategy = self.strategy(&spec.strategy)?;
        strategy
            .validate_parameters(&spec.parameters)
            .map_err(|faults| parameters_invalid("/parameters", &strategy, &faults))?;

        let mut reads = BTreeMap::new();
        reads.insert("cells".to_owned(), read_cells(&workspace));
        reads.insert(
            plugin_subject(PluginKind::DeploymentStrategy, &strategy.reference().name),
            read_plugin(strategy.reference()),
        );
        let mut parts = Vec::with_capacity(chosen.len());
        let flow = self
            .flow(&workspace, spec.template, TemplateKind::Release, &mut reads)
            .await?
            .unwrap_or_else(flow::release);
        for part in &chosen {
            // Rows come without waiting: a large plan must not keep a thread from everybody else.
            tokio::task::yield_now().await;
            let part = self.part(&workspace, spec, part, &mut reads).await?;
            parts.push(PartInput {
                flow: flow.clone(),
                ..part
            });
        }
        let mut shifting = Vec::with_capacity(spec.shift_only.len());
        for (index, target) in spec.shift_only.iter().enumerate() {
            let (part, application) = self
                .shift_part(&workspace, (index, target), &mut seen, &mut reads)
                .await?;
            parts.push(part);
            shifting.push(application);
        }
        for (pool, members) in behind(&*self.parts.store, &workspace, &parts).await? {
            reads.insert(back_ends_subject(&pool), read_back_ends(&members));
        }
        let request = StrategyRequest {
            parameters: spec.parameters.clone(),
            limits: spec.limits.clone(),
            cells: cell_names(&workspace),
            applications: parts
                .iter()
                .zip(&chosen)
                .map(|(input, part)| StrategyApp {
                    key: part.app_name.clone(),
                    stage: stage_of.get(&part.app_name).copied().unwrap_or(1),
                    role: AppRole::Release,
                    has_pools: !part.instance.pools.is_empty(),
                    target_version: part.package.version.to_string(),
                    servers: part
                        .servers
                        .iter()
                        .zip(&input.servers)
                        .map(|((server, _), input)| {
                            self.strategy_server(&workspace, server, input.installed.as_ref())
                        })
                        .collect(),
                })
                .chain(shifting)
                .collect(),
        };
        let answer = strategy
            .plan(&request)
            .await
            .map_err(|error| plugin_failed("/parameters", &error))?;
        let input = PlanInput {
            strategy: Some(strategy.reference().clone()),
            limits: spec.limits.clone(),
            drain_deadline_ms: spec.drain_deadline_ms,
            delivery_deadline_ms: spec.delivery_deadline_ms,
            parts,
            reads,
        };
        let plan = expanded(&strategy, input, &answer)?;
        if spec.lanes.is_empty() {
            return Ok(plan);
        }
        let pairs = spec.dependencies.pairs().map_err(dependencies_invalid)?;
        arrange(&plan, &spec.lanes, &pairs).map_err(|bad| {
            invalid(
                "lanes_invalid",
                "/lanes".to_owned(),
                bad.to_string(),
                "mend the lanes, or leave them out: then the dependencies say the sequence",
            )
        })
    }

    /// An application that only takes part in moving traffic: nothing of it is released.
    async fn shift_part(
        &self,
        workspace: &Workspace,
        (index, target): (usize, &ShiftTarget),
        seen: &mut HashSet<String>,
        reads: &mut BTreeMap<String, Read>,
    ) -> Result<(PartInput, StrategyApp), ServiceError> {
        let field = format!("/shift_only/{index}/instance");
        let (instance, _) = self
            .parts
            .instances
            .get(workspace.name.as_str(), target.instance)
            .await?;
        let (app, _) = self.parts.apps.get(&instance.app.to_string()).await?;
        let key = app.name.to_string();
        if !seen.insert(key.clone()) {
            return Err(invalid(
                "target_twice",
                field,
                format!("the application `{key}` stands in this order twice"),
                "name each application once, to be released or to be shifted only",
            ));
        }
        let bound = self.bound(&instance, &[]).await?;
        let mut servers = Vec::with_capacity(bound.len());
        let mut runs = None;
        for (server, _) in &bound {
            let installed = self.installed(instance.id, server.id).await?;
            servers.push(self.strategy_server(workspace, server, installed.as_ref()));
            runs = runs.or(installed);
        }
        if runs.is_none() {
            return Err(invalid(
                "nothing_to_shift",
                field,
                format!(
                    "nothing of `{key}` is installed on any server of the service instance `{}`, so that it takes no traffic",
                    instance.name
                ),
                "release it first, or leave it out",
            ));
        }
        reads.insert(instance_subject(&key), read_instance(&instance));
        reads.insert(members_subject(&key, &[]), read_members(&bound));
        let application = StrategyApp {
            key: key.clone(),
            stage: 1,
            role: AppRole::ShiftOnly,
            has_pools: !instance.pools.is_empty(),
            target_version: String::new(),
            servers,
        };
        let part = Part {
            key,
            app: instance.app,
            instance: instance.id,
            package: None,
            stack: None,
            pools: instance.pools.clone(),
            env: Environment::new(),
            prepare: Vec::new(),
            stop: Vec::new(),
            start: Vec::new(),
            check: Vec::new(),
        };
        let input = PartInput {
            part,
            steps: LifecyclePlan {
                steps: Vec::new(),
                server_env: BTreeMap::new(),
            },
            approved: Wishes::default(),
            flow: Vec::new(),
            files: None,
            from_cache: false,
            servers: Vec::new(),
            only_traffic: bound.iter().map(|(server, _)| server.id).collect(),
        };
        Ok((input, application))
    }

    async fn choose(
        &self,
        workspace: &Workspace,
        index: usize,
        target: &Target,
    ) -> Result<Chosen, ServiceError> {
        let field = |name: &str| format!("/targets/{index}/{name}");
        let (instance, _) = self
            .parts
            .instances
            .get(workspace.name.as_str(), target.instance)
            .await?;
        let (package, _) = self
            .parts
            .packages
            .get(workspace.name.as_str(), target.package)
            .await?;
        let (app, _) = self.parts.apps.get(&instance.app.to_string()).await?;
        if package.app != instance.app {
            return Err(invalid(
                "package_of_other_application",
                field("package"),
                format!(
                    "the package {} is not one of the application `{}`",
                    target.package, app.name
                ),
                "choose a package of the instance's application",
            ));
        }
        check_cells(workspace, &target.cells, &field("cells"))?;
        check_environment(&field("parameters"), &target.parameters)?;
        let named = target.tech_stack_version.as_ref();
        let named_by = match named {
            Some(_) => "tech_stack_version",
            None => "instance",
        };
        let stack = self.stack(&app, &instance, named, field(named_by))?;
        let servers = self.bound(&instance, &target.cells).await?;
        if servers.is_empty() {
            return Err(invalid(
                "no_servers",
                field("instance"),
                format!(
                    "the service instance `{}` has no servers in the cells to be released",
                    instance.name
                ),
                "bind servers to it first, or choose other cells",
            ));
        }
        let parameters = target.parameters.clone();
        Ok(Chosen {
            instance,
            app_name: app.name.to_string(),
            package,
            stack,
            members: read_members(&servers),
            servers,
            cells: target.cells.clone(),
            parameters,
        })
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
            .map_err(|faults| parameters_invalid("/parameters", &stack, &faults))?;
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

    async fn part(
        &self,
        workspace: &Workspace,
        spec: &ReleaseSpec,
        chosen: &Chosen,
        reads: &mut BTreeMap<String, Read>,
    ) -> Result<PartInput, ServiceError> {
        let Chosen {
            instance,
            app_name,
            package,
            stack,
            servers,
            members,
            cells,
            parameters,
        } = chosen;
        let mut env: Environment = [
            ("WINDLASS_WORKSPACE", workspace.name.as_str()),
            ("WINDLASS_APPLICATION", app_name.as_str()),
            ("WINDLASS_PACKAGE_VERSION", package.version.as_str()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), Value::Plain(value.to_owned())))
        .collect();
        env.extend(instance.env.clone());
        env.extend(spec.environment.clone());
        env.extend(parameters.clone());
        let target = {
            let mut targets = spec.targets.iter();
            let found = targets.position(|target| target.instance == instance.id);
            found.unwrap_or_default()
        };
        let layers = Layers {
            target,
            order: &spec.environment,
            parameters,
            instance: &instance.env,
        };
        let own = servers
            .iter()
            .map(|(server, binding)| (server.name.as_str(), server_environment(server, binding)));
        check_environment_size(app_name, &env, &layers, own)?;
        let request = LifecycleRequest {
            application: app_name.clone(),
            instance: instance.name.to_string(),
            package: Some(package.reference()),
            parameters: instance.parameters.clone(),
            env: env.clone(),
            phases: RELEASE_PHASES.to_vec(),
            servers: servers
                .iter()
                .map(|(server, binding)| facts(server, binding))
                .collect(),
        };
        let steps = stack.lifecycle(&request).await.map_err(|error| {
            plugin_failed(&format!("/targets/{target}/instance/parameters"), &error)
        })?;
        let mine = [
            (instance_subject(app_name), read_instance(instance)),
            (package_subject(app_name), read_package(package)),
            (
                plugin_subject(PluginKind::TechStack, &stack.reference().name),
                read_plugin(stack.reference()),
            ),
            (members_subject(app_name, cells), members.clone()),
        ];
        let mut common: Vec<String> = mine[..2]
            .iter()
            .map(|(subject, _)| subject.clone())
            .collect();
        common.sort();
        reads.extend(mine);
        let mut inputs = Vec::with_capacity(servers.len());
        for (server, binding) in servers {
            let installed = self.installed(instance.id, server.id).await?;
            let own = [
                (
                    server_subject(server.name.as_str()),
                    read_server(server, binding),
                ),
                (
                    installed_subject(app_name, server.name.as_str()),
                    read_installed(installed.as_ref()),
                ),
            ];
            let mut subjects = common.clone();
            subjects.extend(own.iter().map(|(subject, _)| subject.clone()));
            reads.extend(own);
            inputs.push(ServerInput {
                id: server.id,
                name: server.name.to_string(),
                cell: cell_of(server),
                env: server_environment(server, binding),
                installed,
                drained_by: None,
                reads: subjects,
            });
        }
        let approved = self.approved(stack);
        let prepare = [Phase::Prepare, Phase::Install]
            .into_iter()
            .flat_map(|phase| steps.steps.iter().filter(move |step| step.phase == phase))
            .cloned()
            .collect();
        let part = Part {
            prepare,
            key: app_name.clone(),
            app: instance.app,
            instance: instance.id,
            package: Some(package.reference()),
            stack: Some(stack.reference().clone()),
            pools: instance.pools.clone(),
            env,
            stop: Vec::new(),
            start: Vec::new(),
            check: Vec::new(),
        };
        Ok(PartInput {
            part,
            steps,
            approved,
            flow: flow::release(),
            files: None,
            from_cache: spec.install_from_cache,
            servers: inputs,
            only_traffic: Vec::new(),
        })
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
    expand::expand(input, answer).map_err(|bad| ServiceError::Plugin {
        code: "plan_refused",
        message: format!(
            "the plan that `{}` made is refused: {bad}",
            strategy.reference().name
        ),
        mend: "change the order's parameters or limits, or mend the plugin; no server was touched"
            .to_owned(),
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
