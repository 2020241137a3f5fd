//! The plan of a release.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use windlass_domain::{
    application::Application,
    expand::{PartInput, PlanInput, ServerInput},
    flow,
    id::{InstanceId, PackageId, ServerId},
    instance::{Binding, ServiceInstance},
    order::{ReleaseSpec, ShiftTarget, Target},
    package::Package,
    plan::{Part, Plan, Read},
    plugin::{
        AppRole, LifecyclePlan, LifecycleRequest, Phase, PluginKind, StrategyApp, StrategyRequest,
        Wishes,
    },
    revise::arrange,
    server::Server,
    stages::stages,
    template::TemplateKind,
    text,
    value::{Environment, Value},
    workspace::Workspace,
};
use windlass_runtime::Plugin;

use super::{
    MAX_TARGETS, Planner, ServiceError, behind, cell_names, cell_of, check_cells,
    dependencies_invalid, expanded, facts,
    faults::{
        Layers, check_environment, check_environment_size, check_limits, invalid, plugin_failed,
    },
    reads::{
        back_ends_subject, installed_subject, instance_subject, members_subject, package_subject,
        plugin_subject, read_back_ends, read_cells, read_installed, read_instance, read_members,
        read_package, read_plugin, read_server, server_subject,
    },
    server_environment,
    templates::expect_traffic,
};
use crate::service::chosen;

/// Longest title of an order, in bytes: as many as characters are allowed.
const TITLE_MAX_BYTES: usize = 50;

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
    /// A specification that names a package for each service instance that has one of its own: what an order is made from
    /// says what it releases, whatever the instance has later.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] of a service instance.
    pub async fn with_packages(
        &self,
        workspace: &str,
        mut spec: ReleaseSpec,
    ) -> Result<ReleaseSpec, ServiceError> {
        let unnamed = spec.targets.iter_mut().take(MAX_TARGETS);
        for target in unnamed.filter(|target| target.package.is_none()) {
            let instances = &self.parts.instances;
            let (instance, _) = instances.get(workspace, target.instance).await?;
            target.package = instance.package;
        }
        Ok(spec)
    }

    /// What a package's release with all settings by default is: on the service instance that is named, or on the only one of
    /// its application.
    ///
    /// # Errors
    /// `no_instance`, `several_instances`; [`ServiceError::NotFound`] of the package.
    pub async fn release_of(
        &self,
        workspace: &str,
        package: PackageId,
        instance: Option<InstanceId>,
    ) -> Result<ReleaseSpec, ServiceError> {
        let (package, _) = self.parts.packages.get(workspace, package).await?;
        let (app, _) = self.parts.apps.get(&package.app.to_string()).await?;
        let instance = match instance {
            Some(instance) => {
                let (named, _) = self.parts.instances.get(workspace, instance).await?;
                if named.app != app.id {
                    return Err(invalid(
                        "package_of_other_application",
                        "/instance".to_owned(),
                        format!(
                            "the package {} is not one of the application that `{}` runs",
                            package.id, named.name
                        ),
                        "name a service instance of the package's application",
                    ));
                }
                instance
            }
            None => self.only_instance(workspace, &app).await?,
        };
        let mut title = format!("{} {}", app.name, package.version);
        text::cut(&mut title, TITLE_MAX_BYTES);
        let targets = vec![Target::new(instance, package.id)];
        Ok(ReleaseSpec::new(title, targets))
    }

    async fn only_instance(
        &self,
        workspace: &str,
        app: &Application,
    ) -> Result<InstanceId, ServiceError> {
        let all = self.parts.instances.of_app(workspace, app.id).await?;
        match all.as_slice() {
            [only] => Ok(only.id),
            [] => Err(ServiceError::conflict(
                "no_instance",
                format!(
                    "the application `{}` has no service instance in the workspace `{workspace}`",
                    app.name
                ),
                "make a service instance of it, and bind servers to it",
            )),
            several => {
                let names: Vec<String> = several
                    .iter()
                    .take(20)
                    .map(|instance| format!("{} ({})", instance.name, instance.id))
                    .collect();
                Err(ServiceError::conflict(
                    "several_instances",
                    format!(
                        "the application `{}` has {} service instances in the workspace `{workspace}`: {}",
                        app.name,
                        several.len(),
                        names.join(", ")
                    ),
                    "name one of them as `instance`",
                ))
            }
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
    pub(super) async fn plan_servers(
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
            .map_err(|faults| {
                chosen::parameters_invalid("/parameters", strategy.reference(), &faults)
            })?;

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
        expect_traffic(&plan, &flow)?;
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
        let instance = self
            .instance(workspace, target.instance, field.clone())
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
        let instance = self
            .instance(workspace, target.instance, field("instance"))
            .await?;
        let Some(wanted) = target.package else {
            return Err(invalid(
                "package_missing",
                field("package"),
                format!(
                    "the service instance `{}` has no package of its own, and the order names none for it",
                    instance.name
                ),
                "name a package, or give the service instance one",
            ));
        };
        let package = self
            .parts
            .packages
            .get(workspace.name.as_str(), wanted)
            .await;
        let (package, _) = package.map_err(|error| match error {
            ServiceError::NotFound { .. } => invalid(
                "package_unknown",
                field("package"),
                format!(
                    "there is no package {wanted} in the workspace `{}`",
                    workspace.name
                ),
                "give the id of a package of this workspace",
            ),
            other => other,
        })?;
        let (app, _) = self.parts.apps.get(&instance.app.to_string()).await?;
        if package.app != instance.app {
            return Err(invalid(
                "package_of_other_application",
                field("package"),
                format!(
                    "the package {wanted} is not one of the application `{}`",
                    app.name
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
}
