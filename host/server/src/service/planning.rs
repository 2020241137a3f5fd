//! Planning: from what people asked for and what the catalogue holds to a plan, with the plugins' help.
//!
//! Owns what a plan *reads* and how it is compared later (drift), the requests to strategies and tech stacks, and the plan
//! of a rollback. Writes nothing but the plan's blob.
//!
//! | subject of a read | what counts |
//! | --- | --- |
//! | `instance {name}` | parameters, environment, stack version, cells, pools |
//! | `package {application}` | version and digest |
//! | `plugin {kind} {name}` | version and digest that would be taken now |
//! | `cells` | the workspace's cells |
//! | `servers of {name}`, `servers of {name} in {cells}` | which servers are bound: all of them, or in the cells chosen |
//! | `server {name}` | cell, address, system, variables |
//! | `installed {application} on {server}` | release and plan that are installed |

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use async_trait::async_trait;
use semver::VersionReq;
use windlass_domain::{
    Digest, dispatch,
    expand::{self, PartInput, PlanInput, ServerInput},
    id::{InstanceId, OrderId, ServerId},
    instance::{Binding, ServiceInstance},
    manifest::{Manifest, PluginRef},
    order::{Control, Order, OrderState, PlanRevision, Purpose, ReleaseSpec, Target},
    package::Package,
    plan::{NodeIndex, NodeKind, Part, Plan, Read, StepTemplate, TrafficAction},
    plugin::{
        JudgeRequest, Judgement, LifecyclePlan, LifecycleRequest, Observation, OnFailure, Phase,
        PluginKind, RollbackRequest, ServerFacts, StackStep, StrategyApp, StrategyPlan,
        StrategyRequest, StrategyServer, UnitProgress, UnitState, Wishes,
    },
    progress::{NodeState, Progress},
    reducer,
    server::Server,
    stages::stages,
    value::{Environment, Value},
    workspace::{DeploymentZone, Workspace},
};
use windlass_runtime::{Plugin, Plugins};
use windlass_store::{Blobs, Store};

use super::{
    ServiceError, apps::Apps, instances::Instances, packages::Packages, servers::Servers,
    workspaces::Workspaces,
};
use crate::{
    clock,
    engine::{self, Agents, PlannedRollback, Planning, rows},
    ids,
};

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
/// Longest wait for connections to end, in milliseconds: a day.
const MAX_DRAIN_DEADLINE_MS: u64 = 24 * 3600 * 1000;
/// Longest wait of a task for its server, in milliseconds: a week.
const MAX_DELIVERY_DEADLINE_MS: u64 = 7 * 24 * 3600 * 1000;
/// Most servers at once: as many as an order can have.
const MAX_IN_FLIGHT: u64 = 10_000;

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
}

/// One application of a release, with everything that was read for it.
struct Chosen {
    instance: ServiceInstance,
    app_name: String,
    package: Package,
    stack: Plugin,
    servers: Vec<(Server, Binding)>,
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
        let (workspace, _) = self.parts.workspaces.get(workspace).await?;
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
        check_limits(spec)?;
        check_environment("/environment", &spec.environment)?;
        let mut chosen = Vec::with_capacity(spec.targets.len());
        let mut seen = HashSet::new();
        for (index, target) in spec.targets.iter().enumerate() {
            let part = self.choose(&workspace, index, target).await?;
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
        let stage_of = stages(&names, &spec.dependencies).map_err(|error| {
            invalid(
                "dependencies_invalid",
                "/dependencies".to_owned(),
                error.to_string(),
                "mend the dependencies",
            )
        })?;
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
        for part in &chosen {
            parts.push(self.part(&workspace, spec, part, &mut reads).await?);
        }
        let request = StrategyRequest {
            parameters: spec.parameters.clone(),
            limits: spec.limits.clone(),
            applications: parts
                .iter()
                .zip(&chosen)
                .map(|(input, part)| StrategyApp {
                    key: part.app_name.clone(),
                    stage: stage_of.get(&part.app_name).copied().unwrap_or(1),
                    has_pools: !part.instance.pools.is_empty(),
                    target_version: part.package.version.to_string(),
                    servers: part
                        .servers
                        .iter()
                        .zip(&input.servers)
                        .map(|((server, _), input)| self.strategy_server(&workspace, server, input))
                        .collect(),
                })
                .collect(),
        };
        let answer = strategy
            .plan(&request)
            .await
            .map_err(|error| plugin_failed(&error))?;
        let input = PlanInput {
            strategy: Some(strategy.reference().clone()),
            limits: spec.limits.clone(),
            drain_deadline_ms: spec.drain_deadline_ms,
            delivery_deadline_ms: spec.delivery_deadline_ms,
            parts,
            reads,
        };
        expand::expand(input, &answer).map_err(|bad| ServiceError::Plugin {
            code: "plan_refused",
            message: format!(
                "the plan that `{}` made is refused: {bad}",
                strategy.reference().name
            ),
            mend:
                "change the order's parameters or limits, or mend the plugin; no server was touched"
                    .to_owned(),
        })
    }

    /// What differs between what a plan read and what is now.
    ///
    /// # Errors
    /// [`ServiceError`] when something cannot be read.
    pub async fn drift(
        &self,
        plan: &Plan,
    ) -> Result<Vec<windlass_domain::progress::Drift>, ServiceError> {
        let subjects: Vec<String> = plan.reads.keys().cloned().collect();
        let now = self.current(plan, &subjects).await?;
        Ok(engine::differences(plan, &subjects, &now))
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
        for cell in &target.cells {
            if !workspace
                .cells
                .iter()
                .any(|known| known.name.as_str() == cell)
            {
                return Err(invalid(
                    "no_such_cell",
                    field("cells"),
                    format!("the workspace `{}` has no cell `{cell}`", workspace.name),
                    "name cells of the workspace, or none for all",
                ));
            }
        }
        check_environment(&field("parameters"), &target.parameters)?;
        let wanted = instance
            .tech_stack_version
            .as_ref()
            .unwrap_or(&app.tech_stack.version);
        let stack = self
            .parts
            .plugins
            .get_of_kind(
                PluginKind::TechStack,
                app.tech_stack.name.as_str(),
                specific(wanted),
            )
            .map_err(|error| lookup_failed(field("instance"), &error))?;
        stack
            .validate_parameters(&instance.parameters)
            .map_err(|faults| parameters_invalid("/parameters", &stack, &faults))?;
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
            servers,
            cells: target.cells.clone(),
            parameters,
        })
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
        let steps = stack
            .lifecycle(&request)
            .await
            .map_err(|error| plugin_failed(&error))?;
        let mine = [
            (instance_subject(app_name), read_instance(instance)),
            (package_subject(app_name), read_package(package)),
            (
                plugin_subject(PluginKind::TechStack, &stack.reference().name),
                read_plugin(stack.reference()),
            ),
            (members_subject(app_name, cells), read_members(servers)),
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
        let part = Part {
            key: app_name.clone(),
            app: instance.app,
            instance: instance.id,
            package: package.reference(),
            stack: stack.reference().clone(),
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
            servers: inputs,
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
        input: &ServerInput,
    ) -> StrategyServer {
        StrategyServer {
            id: server.id.to_string(),
            name: server.name.to_string(),
            cell: cell_of(server),
            zone: zone_of(workspace, &cell_of(server)),
            healthy: self.parts.agents.is_online(server.id),
            installed_version: input
                .installed
                .as_ref()
                .map(|installed| installed.package.version.clone()),
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

    /// What the subjects are now.
    async fn current(
        &self,
        plan: &Plan,
        subjects: &[String],
    ) -> Result<BTreeMap<String, Read>, ServiceError> {
        let wanted: HashSet<&str> = subjects.iter().map(String::as_str).collect();
        let mut now = BTreeMap::new();
        for (index, part) in (0u32..).zip(&plan.parts) {
            let instance = self.parts.instances.find(part.instance).await?;
            let subject = instance_subject(&part.key);
            if let (true, Some(instance)) = (wanted.contains(subject.as_str()), &instance) {
                now.insert(subject, read_instance(instance));
            }
            let Some(instance) = instance else { continue };
            let subject = package_subject(&part.key);
            if wanted.contains(subject.as_str())
                && let Some(package) = self
                    .parts
                    .packages
                    .find_version(instance.workspace.as_str(), part.app, &part.package.version)
                    .await?
            {
                now.insert(subject, read_package(&package));
            }
            let subject = plugin_subject(PluginKind::TechStack, &part.stack.name);
            if wanted.contains(subject.as_str()) {
                let (app, _) = self.parts.apps.get(&part.app.to_string()).await?;
                let wanted = instance
                    .tech_stack_version
                    .as_ref()
                    .unwrap_or(&app.tech_stack.version);
                if let Ok(plugin) = self.parts.plugins.get(&part.stack.name, specific(wanted)) {
                    now.insert(subject, read_plugin(plugin.reference()));
                }
            }
            if wanted.contains("cells")
                && let Ok((workspace, _)) =
                    self.parts.workspaces.get(instance.workspace.as_str()).await
            {
                now.insert("cells".to_owned(), read_cells(&workspace));
            }
            let units: Vec<_> = plan
                .units
                .iter()
                .filter(|unit| unit.part == index)
                .collect();
            // The cells as they were chosen: a server in a cell that had none belongs to a release to all cells.
            for subject in subjects {
                if let Some(cells) = members_cells(&part.key, subject) {
                    let members = self.bound(&instance, &cells).await?;
                    now.insert(subject.clone(), read_members(&members));
                }
            }
            for unit in units {
                let (server, installed) = (
                    server_subject(&unit.server_name),
                    installed_subject(&part.key, &unit.server_name),
                );
                if wanted.contains(server.as_str())
                    && let Some(binding) = self
                        .parts
                        .instances
                        .binding(instance.id, unit.server)
                        .await?
                    && let Ok((record, _)) = self
                        .parts
                        .servers
                        .get(instance.workspace.as_str(), unit.server)
                        .await
                {
                    now.insert(server, read_server(&record, &binding));
                }
                if wanted.contains(installed.as_str()) {
                    now.insert(
                        installed,
                        read_installed(self.installed(part.instance, unit.server).await?.as_ref()),
                    );
                }
            }
        }
        if let Some(strategy) = &plan.strategy {
            let subject = plugin_subject(PluginKind::DeploymentStrategy, &strategy.name);
            if wanted.contains(subject.as_str())
                && let Ok(plugin) = self.parts.plugins.get(&strategy.name, None)
            {
                now.insert(subject, read_plugin(plugin.reference()));
            }
        }
        Ok(now)
    }

    async fn spec(&self, order: &Order) -> Result<ReleaseSpec, String> {
        let digest = windlass_store::BlobDigest::from_bytes(*order.spec.as_bytes());
        let bytes = self
            .parts
            .blobs
            .get_bytes(digest, MAX_SPEC_BYTES)
            .await
            .map_err(|error| error.to_string())?;
        serde_json::from_slice(&bytes).map_err(|error| error.to_string())
    }

    /// What the servers that an order changed had before, as parts to be released again; failed servers first.
    async fn rollback_parts(
        &self,
        plan: &Plan,
        progress: &Progress,
    ) -> Result<(Vec<PartInput>, Vec<UnitProgress>), String> {
        let mut groups: BTreeMap<(u32, Digest, u32), PartInput> = BTreeMap::new();
        let mut states = Vec::new();
        let mut plans: BTreeMap<Digest, Arc<Plan>> = BTreeMap::new();
        for (node, planned) in (0u32..).zip(&plan.nodes) {
            let NodeKind::Unit { unit } = planned.kind else {
                continue;
            };
            let unit = &plan.units[unit as usize];
            let state = reducer::unit_state(plan, progress, node);
            let Some(before) = unit
                .before
                .as_ref()
                .filter(|_| state != UnitState::Untouched)
            else {
                continue;
            };
            let part = &plan.parts[unit.part as usize];
            let current = self
                .installed(part.instance, unit.server)
                .await
                .map_err(|error| error.to_string())?;
            let earlier = self
                .manifest(&rows::installed_before(part.instance, unit.server))
                .await
                .map_err(|error| error.to_string())?;
            let known = [&current, &earlier]
                .into_iter()
                .flatten()
                .find(|manifest| manifest.release == *before);
            let Some((manifest, digest)) =
                known.and_then(|manifest| Some((manifest, manifest.plan?)))
            else {
                return Err(format!(
                    "the release `{before}` that {} had before is no longer known",
                    unit.server_name
                ));
            };
            let old = match plans.get(&digest) {
                Some(old) => old.clone(),
                None => {
                    let old = engine::load_plan(&self.parts.blobs, digest)
                        .await
                        .map_err(|error| error.to_string())?;
                    plans.entry(digest).or_insert(Arc::new(old)).clone()
                }
            };
            let found = unit_of_server(&old, manifest, unit.server);
            let Some((old_node, old_unit)) = found else {
                return Err(format!(
                    "the plan that installed `{before}` on {} does not hold it",
                    unit.server_name
                ));
            };
            let group = groups
                .entry((unit.part, digest, old_unit.part))
                .or_insert_with(|| {
                    let old_part = &old.parts[old_unit.part as usize];
                    PartInput {
                        part: Part {
                            key: part.key.clone(),
                            pools: part.pools.clone(),
                            ..old_part.clone()
                        },
                        steps: LifecyclePlan {
                            steps: steps_of(&old, old_node, old_part),
                            server_env: BTreeMap::new(),
                        },
                        // They were checked against what was approved when they were planned.
                        approved: all_wishes(&old),
                        servers: Vec::new(),
                    }
                });
            states.push((
                group.part.key.clone(),
                unit.server,
                state,
                (unit.part, digest, old_unit.part),
            ));
            group.servers.push(ServerInput {
                id: unit.server,
                name: unit.server_name.clone(),
                cell: unit.cell.clone(),
                env: old_unit.env.clone(),
                installed: current,
                drained_by: drain_of(plan, progress, node),
                reads: Vec::new(),
            });
        }
        // Two earlier releases of one application are two parts: their keys differ.
        let mut used: BTreeMap<String, u32> = BTreeMap::new();
        let mut keys = BTreeMap::new();
        for (id, group) in &mut groups {
            let count = used.entry(group.part.key.clone()).or_default();
            *count += 1;
            if *count > 1 {
                group.part.key = format!("{}~{count}", group.part.key);
            }
            keys.insert(*id, group.part.key.clone());
        }
        let mut units: Vec<UnitProgress> = states
            .into_iter()
            .map(|(_, server, state, group)| UnitProgress {
                application: keys.get(&group).cloned().unwrap_or_default(),
                server: server.to_string(),
                state,
            })
            .collect();
        units.sort_by_key(|unit| match unit.state {
            UnitState::Failed => 0,
            UnitState::Released => 1,
            UnitState::Untouched => 2,
        });
        Ok((groups.into_values().collect(), units))
    }

    /// The strategy's plan of a rollback, or why there is none.
    async fn strategy_rollback(
        &self,
        order: &Order,
        plan: &Plan,
        parts: &[PartInput],
        units: &[UnitProgress],
    ) -> Result<StrategyPlan, String> {
        let Some(strategy) = &plan.strategy else {
            return Err("the order has no strategy".to_owned());
        };
        let plugin = self
            .parts
            .plugins
            .pinned(strategy.digest)
            .await
            .map_err(|error| error.to_string())?;
        let spec = self.spec(order).await?;
        let request = StrategyRequest {
            parameters: spec.parameters,
            limits: plan.limits.clone(),
            applications: parts
                .iter()
                .map(|part| StrategyApp {
                    key: part.part.key.clone(),
                    stage: 1,
                    has_pools: !part.part.pools.is_empty(),
                    target_version: part.part.package.version.clone(),
                    servers: part
                        .servers
                        .iter()
                        .map(|server| StrategyServer {
                            id: server.id.to_string(),
                            name: server.name.clone(),
                            cell: server.cell.clone(),
                            zone: server.cell.clone(),
                            healthy: self.parts.agents.is_online(server.id),
                            installed_version: server
                                .installed
                                .as_ref()
                                .map(|manifest| manifest.package.version.clone()),
                        })
                        .collect(),
                })
                .collect(),
        };
        let request = RollbackRequest {
            request,
            progress: units.to_vec(),
        };
        plugin
            .rollback(&request)
            .await
            .map_err(|error| error.to_string())
    }

    /// Plans the rollback of an order: by its strategy, or by the core where the strategy's plan fails or breaks a rule.
    ///
    /// # Errors
    /// Why there is nothing to roll back to.
    pub async fn rollback(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        reason: &str,
        by: &str,
    ) -> Result<PlannedRollback, String> {
        let (parts, units) = self.rollback_parts(plan, progress).await?;
        if parts.is_empty() {
            return Err(
                "nothing that this order changed had an earlier release to go back to".to_owned(),
            );
        }
        let input = |strategy: Option<PluginRef>| PlanInput {
            strategy,
            limits: plan.limits.clone(),
            drain_deadline_ms: drain_deadline(plan),
            delivery_deadline_ms: plan.delivery_deadline_ms,
            parts: parts.clone(),
            reads: BTreeMap::new(),
        };
        let planned = match self.strategy_rollback(order, plan, &parts, &units).await {
            Ok(answer) => {
                expand::expand(input(plan.strategy.clone()), &answer).map_err(|bad| bad.to_string())
            }
            Err(cause) => Err(cause),
        };
        let (mut rollback, core_plan_because) = match planned {
            Ok(rollback) => (rollback, None),
            Err(cause) => {
                let servers: Vec<(String, ServerId)> = units
                    .iter()
                    .filter_map(|unit| Some((unit.application.clone(), unit.server.parse().ok()?)))
                    .collect();
                let own = expand::expand(input(None), &expand::one_by_one(&servers))
                    .map_err(|bad| bad.to_string())?;
                tracing::warn!(order.id = %order.id, cause, "the strategy gave no rollback that can be used; the core's own plan runs");
                (own, Some(cause))
            }
        };
        // A rollback never rolls itself back.
        rollback.on_failure = OnFailure::Block;
        let digest = engine::store_json(&self.parts.blobs, &rollback)
            .await
            .map_err(|error| error.to_string())?;
        let at = clock::now();
        let id = OrderId::from_uuid(ids::new_uuid());
        let active = !order.state.is_terminal();
        let header = Order {
            schema: Order::SCHEMA,
            id,
            workspace: order.workspace.clone(),
            title: format!("roll back {}", order.title)
                .chars()
                .take(50)
                .collect(),
            purpose: Purpose::Rollback {
                of: order.id,
                reason: reason.to_owned(),
                core_plan_because,
            },
            state: OrderState::NotStarted,
            state_reason: String::new(),
            strategy: rollback
                .strategy
                .as_ref()
                .map_or_else(String::new, |plugin| {
                    format!("{}@{}", plugin.name, plugin.version)
                }),
            plan: digest,
            revisions: vec![PlanRevision {
                revision: 1,
                digest,
                author: by.to_owned(),
                at,
                difference: String::new(),
            }],
            spec: order.spec,
            counts: windlass_domain::progress::Counts::default(),
            control: Control::NotStarted,
            stalled: false,
            lock_owner: if active { order.lock_owner } else { id },
            last_event: 0,
            rolled_back_by: None,
            server_count: u32::try_from(rollback.units.len()).unwrap_or(u32::MAX),
            created_by: by.to_owned(),
            created_at: at,
            started_at: None,
            finished_at: None,
            last_progress_at: None,
        };
        Ok(PlannedRollback {
            order: header,
            plan: Arc::new(rollback),
        })
    }
}

/// The largest specification of an order.
pub(crate) const MAX_SPEC_BYTES: u64 = 1024 * 1024;

#[async_trait]
impl Planning for Planner {
    async fn reread(
        &self,
        plan: &Plan,
        subjects: &[String],
    ) -> Result<BTreeMap<String, Read>, String> {
        self.current(plan, subjects)
            .await
            .map_err(|error| error.to_string())
    }

    async fn check_servers(&self, plan: &Plan) -> Result<Vec<String>, String> {
        let mut problems = Vec::new();
        for part in &plan.parts {
            if let Err(error) = self.parts.plugins.pinned(part.stack.digest).await {
                problems.push(error.to_string());
            }
        }
        for unit in &plan.units {
            if !self.parts.agents.is_online(unit.server) {
                problems.push(format!("{} is not connected", unit.server_name));
            }
        }
        Ok(problems)
    }

    async fn members(&self, instance: InstanceId) -> Result<Vec<(ServerId, String)>, String> {
        let instance = self
            .parts
            .instances
            .find(instance)
            .await
            .map_err(|error| error.to_string())?;
        let Some(instance) = instance else {
            return Ok(Vec::new());
        };
        let servers = self
            .bound(&instance, &[])
            .await
            .map_err(|error| error.to_string())?;
        Ok(servers
            .into_iter()
            .map(|(server, _)| (server.id, cell_of(&server)))
            .collect())
    }

    async fn judge(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        stage: &str,
    ) -> Result<Judgement, String> {
        let Some(strategy) = &plan.strategy else {
            return Err("the order has no strategy to judge".to_owned());
        };
        let plugin = self
            .parts
            .plugins
            .pinned(strategy.digest)
            .await
            .map_err(|error| error.to_string())?;
        let spec = self.spec(order).await?;
        let mut observations = Vec::new();
        for (node, planned) in (0u32..).zip(&plan.nodes) {
            let NodeKind::Unit { unit } = planned.kind else {
                continue;
            };
            let unit = &plan.units[unit as usize];
            let state = progress.state(node);
            for (metric, holds) in [
                ("unit.released", state == NodeState::Succeeded),
                ("unit.failed", state.needs_mending()),
                ("agent.online", self.parts.agents.is_online(unit.server)),
            ] {
                observations.push(Observation {
                    application: plan.parts[unit.part as usize].key.clone(),
                    server: unit.server.to_string(),
                    metric: metric.to_owned(),
                    value: f64::from(u8::from(holds)),
                });
            }
        }
        let request = JudgeRequest {
            stage: stage.to_owned(),
            parameters: spec.parameters,
            observations,
        };
        plugin
            .judge(&request)
            .await
            .map_err(|error| error.to_string())
    }

    async fn plan_rollback(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        reason: &str,
    ) -> Result<PlannedRollback, String> {
        self.rollback(order, plan, progress, reason, "windlass")
            .await
    }
}

// ---------------------------------------------------------------------------------------------- reads

fn instance_subject(app: &str) -> String {
    format!("instance of {app}")
}

fn package_subject(app: &str) -> String {
    format!("package of {app}")
}

fn members_subject(app: &str, cells: &[String]) -> String {
    if cells.is_empty() {
        return format!("servers of {app}");
    }
    let cells: BTreeSet<&str> = cells.iter().map(String::as_str).collect();
    let cells: Vec<&str> = cells.into_iter().collect();
    format!("servers of {app} in {}", cells.join(", "))
}

/// The cells of such a subject of this application. Names of applications and cells hold no blanks.
fn members_cells(app: &str, subject: &str) -> Option<Vec<String>> {
    let rest = subject.strip_prefix("servers of ")?.strip_prefix(app)?;
    if rest.is_empty() {
        return Some(Vec::new());
    }
    let cells = rest.strip_prefix(" in ")?.split(", ");
    Some(cells.map(str::to_owned).collect())
}

fn server_subject(server: &str) -> String {
    format!("server {server}")
}

fn installed_subject(app: &str, server: &str) -> String {
    format!("installed {app} on {server}")
}

fn plugin_subject(kind: PluginKind, name: &str) -> String {
    let kind = match kind {
        PluginKind::TechStack => "tech stack",
        PluginKind::DeploymentStrategy => "strategy",
        PluginKind::Diagnostic => "diagnostic",
        PluginKind::PublicCommand => "public command",
    };
    format!("{kind} {name}")
}

fn read_instance(instance: &ServiceInstance) -> Read {
    let digest = Digest::of_json(&(
        &instance.parameters,
        &instance.env,
        &instance.tech_stack_version,
        &instance.cells,
        &instance.pools,
    ));
    Read {
        digest,
        shown: format!(
            "parameters, environment, cells and pools {}",
            digest.short()
        ),
    }
}

fn read_package(package: &Package) -> Read {
    Read {
        digest: package.digest,
        shown: format!("{} with digest {}", package.version, package.digest.short()),
    }
}

fn read_plugin(plugin: &PluginRef) -> Read {
    Read {
        digest: plugin.digest,
        shown: format!(
            "{}@{} with digest {}",
            plugin.name,
            plugin.version,
            plugin.digest.short()
        ),
    }
}

fn read_cells(workspace: &Workspace) -> Read {
    let names: Vec<&str> = workspace
        .cells
        .iter()
        .map(|cell| cell.name.as_str())
        .collect();
    Read {
        digest: Digest::of_json(&workspace.cells),
        shown: names.join(", "),
    }
}

fn read_members(servers: &[(Server, Binding)]) -> Read {
    let ids: BTreeSet<ServerId> = servers.iter().map(|(server, _)| server.id).collect();
    let names: Vec<&str> = servers
        .iter()
        .take(20)
        .map(|(server, _)| server.name.as_str())
        .collect();
    Read {
        digest: Digest::of_json(&ids),
        shown: format!("{} servers: {}", ids.len(), names.join(", ")),
    }
}

fn read_server(server: &Server, binding: &Binding) -> Read {
    let digest = Digest::of_json(&(facts(server, binding), &server.name));
    Read {
        digest,
        shown: format!(
            "cell {}, variables and system {}",
            cell_of(server),
            digest.short()
        ),
    }
}

fn read_installed(installed: Option<&Manifest>) -> Read {
    let shown = installed.map_or_else(|| "nothing".to_owned(), |manifest| manifest.release.clone());
    Read {
        digest: Digest::of_json(&installed.map(|manifest| (&manifest.release, &manifest.plan))),
        shown,
    }
}

// ---------------------------------------------------------------------------------------------- small pieces

/// The cell of a server that was put in none.
const NO_CELL: &str = "none";

/// Its cell's identifier; servers in no cell are treated as those of one cell.
fn cell_of(server: &Server) -> String {
    server
        .cell
        .as_ref()
        .map_or_else(|| NO_CELL.to_owned(), ToString::to_string)
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

fn unit_of_server<'a>(
    plan: &'a Plan,
    manifest: &Manifest,
    server: ServerId,
) -> Option<(NodeIndex, &'a windlass_domain::plan::Unit)> {
    (0u32..).zip(&plan.nodes).find_map(|(node, planned)| {
        let NodeKind::Unit { unit } = planned.kind else {
            return None;
        };
        let unit = plan.units.get(unit as usize)?;
        let part = plan.parts.get(unit.part as usize)?;
        (unit.server == server
            && part.instance == manifest.instance
            && dispatch::release_name(plan, unit) == manifest.release)
            .then_some((node, unit))
    })
}

/// The stack's steps as they were rendered for a unit: those of its leaves, and how to stop what it installed.
fn steps_of(plan: &Plan, unit: NodeIndex, part: &Part) -> Vec<StackStep> {
    let leaves = plan
        .nodes
        .iter()
        .skip(unit as usize + 1)
        .take_while(|node| node.parent == Some(unit));
    let rendered = leaves.filter_map(|node| match node.kind {
        NodeKind::Step { step } => match plan.steps.get(step as usize)? {
            StepTemplate::Stack(step) if step.phase != Phase::Stop => Some(step.clone()),
            StepTemplate::Stack(_)
            | StepTemplate::Fetch
            | StepTemplate::Unpack
            | StepTemplate::Activate => None,
        },
        NodeKind::Sequence
        | NodeKind::Parallel { .. }
        | NodeKind::Unit { .. }
        | NodeKind::Traffic(_)
        | NodeKind::Gate { .. }
        | NodeKind::Pause { .. }
        | NodeKind::Judge { .. } => None,
    });
    rendered.chain(part.stop.iter().cloned()).collect()
}

/// Everything that a plan's steps were allowed: users and roots that stand in it.
fn all_wishes(plan: &Plan) -> Wishes {
    let steps = plan.steps.iter().filter_map(|step| match step {
        StepTemplate::Stack(step) => Some(step),
        StepTemplate::Fetch | StepTemplate::Unpack | StepTemplate::Activate => None,
    });
    let kept = plan.parts.iter().flat_map(|part| &part.stop);
    let users = steps
        .chain(kept)
        .filter_map(|step| step.run_as.clone())
        .collect::<BTreeSet<_>>();
    Wishes {
        users: users.into_iter().collect(),
        path_roots: vec!["/".to_owned()],
    }
}

/// The drain leaf of a unit, where it remembered weights.
fn drain_of(plan: &Plan, progress: &Progress, unit: NodeIndex) -> Option<NodeIndex> {
    progress.children(unit).iter().copied().find(|leaf| {
        matches!(
            plan.nodes[*leaf as usize].kind,
            NodeKind::Traffic(TrafficAction::Drain { .. })
        ) && progress.node(*leaf).remembered.is_some()
    })
}

fn drain_deadline(plan: &Plan) -> u64 {
    plan.nodes
        .iter()
        .find_map(|node| match &node.kind {
            NodeKind::Traffic(TrafficAction::Drain { deadline_ms }) => Some(*deadline_ms),
            NodeKind::Sequence
            | NodeKind::Parallel { .. }
            | NodeKind::Unit { .. }
            | NodeKind::Step { .. }
            | NodeKind::Traffic(TrafficAction::Restore | TrafficAction::Set { .. })
            | NodeKind::Gate { .. }
            | NodeKind::Pause { .. }
            | NodeKind::Judge { .. } => None,
        })
        .unwrap_or(30_000)
}

fn check_environment(field: &str, env: &Environment) -> Result<(), ServiceError> {
    for key in env.keys() {
        windlass_domain::name::check_env_key(key).map_err(|error| {
            invalid(
                "parameter_key_invalid",
                format!("{field}/{key}"),
                error.message,
                "rename the parameter",
            )
        })?;
        if key.starts_with("WINDLASS_") {
            return Err(invalid(
                "parameter_key_reserved",
                format!("{field}/{key}"),
                "names that start with WINDLASS_ are the platform's own".to_owned(),
                "rename the parameter",
            ));
        }
    }
    Ok(())
}

fn invalid(code: &'static str, field: String, message: String, mend: &str) -> ServiceError {
    ServiceError::Invalid {
        code,
        field,
        message,
        mend: mend.to_owned(),
    }
}

fn parameters_invalid(
    root: &str,
    plugin: &Plugin,
    faults: &[windlass_runtime::FieldError],
) -> ServiceError {
    let first = faults.first();
    let field = first.map_or_else(String::new, |fault| fault.field.clone());
    let texts: Vec<String> = faults
        .iter()
        .map(|fault| format!("{}: {}", fault.field, fault.message))
        .collect();
    let name = &plugin.reference().name;
    invalid(
        "parameters_invalid",
        format!("{root}{field}"),
        format!(
            "the parameters do not fit the schema of `{name}`: {}",
            texts.join("; ")
        ),
        "see the plugin's schema at /v1/plugins",
    )
}

fn plugin_failed(error: &windlass_runtime::CallError) -> ServiceError {
    let cause =
        std::error::Error::source(error).map_or_else(String::new, |source| format!(": {source}"));
    ServiceError::Plugin {
        code: "plugin_call_failed",
        message: format!("{error}{cause}"),
        mend: "mend the parameters where the plugin says so; otherwise choose another version of the plugin".to_owned(),
    }
}

/// The order named, or its application has, a plugin that cannot be used now.
fn lookup_failed(field: String, error: &windlass_runtime::LookupError) -> ServiceError {
    invalid(
        "plugin_not_available",
        field,
        error.to_string(),
        "see /v1/plugins for what is loaded and why something is not",
    )
}

/// The figures of an order that have bounds.
fn check_limits(spec: &ReleaseSpec) -> Result<(), ServiceError> {
    for (field, found, min, max) in [
        (
            "/limits/max_in_flight",
            u64::from(spec.limits.max_in_flight),
            1,
            MAX_IN_FLIGHT,
        ),
        (
            "/drain_deadline_ms",
            spec.drain_deadline_ms,
            0,
            MAX_DRAIN_DEADLINE_MS,
        ),
        (
            "/delivery_deadline_ms",
            spec.delivery_deadline_ms,
            1,
            MAX_DELIVERY_DEADLINE_MS,
        ),
    ] {
        if !(min..=max).contains(&found) {
            return Err(ServiceError::Limit {
                code: "out_of_limit",
                field: field.to_owned(),
                message: format!("`{field}` is {found}: {min} to {max} are allowed"),
                limit: if found < min { min } else { max },
                current: found,
                mend: format!("give a value of `{field}` within the limit"),
            });
        }
    }
    Ok(())
}

fn internal(
    doing: &'static str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> ServiceError {
    ServiceError::Internal {
        doing,
        source: Box::new(source),
    }
}
