//! The plan of an operation on applications as they are installed.
//!
//! Decides which servers take part; the others stand in the plan with the reason. Restart, offline and online take their steps
//! and environment from what is installed, never from today's plugins; initialisation asks the tech stack of today.
//! Source: spec "Application operations".

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use windlass_domain::{
    application::Application,
    expand::{PartInput, PlanInput, ServerInput},
    flow,
    id::ServerId,
    instance::{Binding, ServiceInstance},
    manifest::Manifest,
    operation::{Operation, OperationSpec, OperationTarget, Standing},
    plan::{FilesStep, LeftOut, Part, Plan, Read},
    plugin::{
        AppRole, LifecyclePlan, LifecycleRequest, OnFailure, Phase, PluginKind, StrategyApp,
        StrategyRequest, Wishes,
    },
    server::{ReleaseState, Server},
    template::TemplateKind,
    text,
    value::{Environment, Value},
    workspace::Workspace,
};

use super::{
    MAX_TARGETS, Planner, ServiceError, behind, cell_names, cell_of, check_cells, expanded, facts,
    faults::{Layers, check_environment_size, check_limits, internal, invalid, plugin_failed},
    reads::{
        back_ends_subject, installed_subject, instance_subject, members_subject, plugin_subject,
        pools_subject, read_back_ends, read_cells, read_installed, read_instance, read_members,
        read_plugin, read_pools, read_server, read_state, server_subject, state_subject,
    },
    server_environment,
};
use crate::{engine, service::chosen};

/// Phases of an initialisation, in order.
const INITIALISE_PHASES: [Phase; 2] = [Phase::Prepare, Phase::Install];

/// How long an order that has ended may take to say how it leaves its servers.
const LEAVING_WITHIN: Duration = Duration::from_secs(2);
/// Between two looks at it.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A server that takes part.
struct Taking {
    server: Server,
    binding: Binding,
    installed: Option<Manifest>,
    state: ReleaseState,
}

/// One application of an operation.
struct Chosen {
    instance: ServiceInstance,
    app: Application,
    key: String,
    servers: Vec<Taking>,
}

/// Where the servers of an instance are in the life of their application.
pub(super) struct States(BTreeMap<ServerId, ReleaseState>);

impl States {
    pub(super) fn of(&self, server: ServerId, is_installed: bool) -> ReleaseState {
        let kept = self.0.get(&server).copied();
        kept.unwrap_or(if is_installed {
            ReleaseState::Released
        } else {
            ReleaseState::AwaitingRelease
        })
    }
}

impl Planner {
    /// Plans an operation. Nothing is written.
    ///
    /// # Errors
    /// [`ServiceError`] names the field, the plugin, or the rule that a plugin's answer broke; `no_server_qualifies` with the
    /// reasons.
    pub async fn plan_operation(
        &self,
        workspace: &str,
        spec: &OperationSpec,
    ) -> Result<Plan, ServiceError> {
        let (plan, left_out) = self.plan_qualified(workspace, spec).await?;
        plan.ok_or_else(|| nobody(&left_out))
    }

    /// Likewise; no plan where no server qualifies. With those that do not.
    pub(super) async fn plan_qualified(
        &self,
        workspace: &str,
        spec: &OperationSpec,
    ) -> Result<(Option<Plan>, Vec<LeftOut>), ServiceError> {
        let (workspace, _) = self.parts.workspaces.get(workspace).await?;
        check_spec(spec)?;
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
        let kind = TemplateKind::of(&spec.operation);
        let flow = self
            .flow(&workspace, spec.template, kind, &mut reads)
            .await?
            .unwrap_or_else(|| flow::operation(&spec.operation));
        let mut left_out = Vec::new();
        let mut seen = BTreeSet::new();
        let mut chosen = Vec::new();
        for (index, target) in spec.targets.iter().enumerate() {
            let at = (index, target);
            let part = self
                .choose_servers(&workspace, spec, at, &mut reads, &mut left_out)
                .await?;
            if !seen.insert(part.key.clone()) {
                return Err(invalid(
                    "target_twice",
                    format!("/targets/{index}/instance"),
                    format!("the application `{}` stands in this order twice", part.key),
                    "name each application once",
                ));
            }
            // Of one without servers nothing can be planned; those that were left out say why.
            if !part.servers.is_empty() {
                chosen.push((index, part));
            }
        }
        if chosen.is_empty() {
            return Ok((None, left_out));
        }
        let mut parts = Vec::with_capacity(chosen.len());
        let mut applications = Vec::with_capacity(chosen.len());
        for (index, part) in &chosen {
            let input = self.operation_part(&workspace, spec, (*index, part), &mut reads);
            parts.push(PartInput {
                flow: flow.clone(),
                ..input.await?
            });
            applications.push(self.operated(&workspace, part));
        }
        for (pool, members) in behind(&*self.parts.store, &workspace, &parts).await? {
            reads.insert(back_ends_subject(&pool), read_back_ends(&members));
        }
        let request = StrategyRequest {
            parameters: spec.parameters.clone(),
            limits: spec.limits.clone(),
            cells: cell_names(&workspace),
            applications,
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
        let mut plan = expanded(&strategy, input, &answer)?;
        // There is nothing to go back to: whatever the strategy says, a failure waits for a person.
        plan.on_failure = OnFailure::Block;
        if let Some(restore) = flow::restore(&spec.operation) {
            for unit in &mut plan.units {
                unit.restore = restore;
            }
        }
        plan.left_out.clone_from(&left_out);
        plan.schema = plan.lowest_schema();
        Ok((Some(plan), left_out))
    }

    /// What orders have made of an instance's servers.
    pub(super) async fn states(
        &self,
        instance: windlass_domain::id::InstanceId,
    ) -> Result<States, ServiceError> {
        // An order that has just ended says a moment later how it leaves its servers.
        let until = tokio::time::Instant::now() + LEAVING_WITHIN;
        loop {
            let states = engine::states_of(&*self.parts.store, instance).await;
            let (states, leaving) =
                states.map_err(|error| internal("read the states of servers", error))?;
            if !leaving || tokio::time::Instant::now() >= until {
                return Ok(States(states));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Which servers of a target take part; the others go to `left_out`.
    async fn choose_servers(
        &self,
        workspace: &Workspace,
        spec: &OperationSpec,
        (index, target): (usize, &OperationTarget),
        reads: &mut BTreeMap<String, Read>,
        left_out: &mut Vec<LeftOut>,
    ) -> Result<Chosen, ServiceError> {
        let field = |name: &str| format!("/targets/{index}/{name}");
        let ws = workspace.name.as_str();
        let instance = self
            .instance(workspace, target.instance, field("instance"))
            .await?;
        let (app, _) = self.parts.apps.get(&instance.app.to_string()).await?;
        let key = app.name.to_string();
        check_cells(workspace, &target.cells, &field("cells"))?;
        let bound = self.bound(&instance, &target.cells).await?;
        if target.servers.is_empty() {
            reads.insert(members_subject(&key, &target.cells), read_members(&bound));
        }
        let out = |server: &Server, reason: String| LeftOut {
            application: key.clone(),
            server: server.id,
            server_name: server.name.to_string(),
            reason,
        };
        let mut asked = BTreeSet::new();
        for (at, id) in target.servers.iter().enumerate() {
            let field = field(&format!("servers/{at}"));
            if !asked.insert(*id) {
                return Err(invalid(
                    "server_twice",
                    field,
                    format!("the server {id} is named twice"),
                    "name each server once",
                ));
            }
            let found = self.parts.servers.get(ws, *id).await;
            let (server, _) = found.map_err(|error| match error {
                ServiceError::NotFound { .. } => invalid(
                    "server_unknown",
                    field,
                    format!("there is no server {id} in the workspace `{ws}`"),
                    "give ids of servers of this workspace",
                ),
                other => other,
            })?;
            if !bound.iter().any(|(bound, _)| bound.id == *id) {
                let reason = if server.instance == Some(instance.id) {
                    format!(
                        "it is in the cell `{}`, which was not chosen",
                        cell_of(&server)
                    )
                } else {
                    format!(
                        "it is not bound to the service instance `{}`",
                        instance.name
                    )
                };
                left_out.push(out(&server, reason));
            }
        }
        if bound.is_empty() && asked.is_empty() {
            return Err(invalid(
                "no_servers",
                field("instance"),
                format!(
                    "the service instance `{}` has no servers in the cells that were chosen",
                    instance.name
                ),
                "bind servers to it first, or choose other cells",
            ));
        }
        let states = self.states(instance.id).await?;
        let mut servers = Vec::with_capacity(bound.len());
        for (server, binding) in bound {
            if !asked.is_empty() && !asked.contains(&server.id) {
                continue;
            }
            let installed = self.installed(instance.id, server.id).await?;
            let state = states.of(server.id, installed.is_some());
            let standing = Standing {
                state,
                installed: installed.is_some(),
                online: self.parts.agents.is_online(server.id),
                without_traffic: self
                    .is_without_traffic(&instance, &spec.operation, server.id)
                    .await?,
            };
            let refused = spec.operation.refuses(standing);
            let refused = refused.or_else(|| lacks_steps(&spec.operation, installed.as_ref()?));
            match refused {
                Some(reason) => left_out.push(out(&server, reason.to_owned())),
                None => servers.push(Taking {
                    server,
                    binding,
                    installed,
                    state,
                }),
            }
        }
        Ok(Chosen {
            instance,
            app,
            key,
            servers,
        })
    }

    /// Whether a server has no weight in a pool of its service instance; asked only where it decides something.
    async fn is_without_traffic(
        &self,
        instance: &ServiceInstance,
        operation: &Operation,
        server: ServerId,
    ) -> Result<bool, ServiceError> {
        if !matches!(operation, Operation::Online { .. }) {
            return Ok(false);
        }
        for pool in &instance.pools {
            let weight = self.parts.pools.weight(*pool, server).await;
            let weight = weight.map_err(|error| ServiceError::Unavailable {
                message: error.to_string(),
            })?;
            if weight == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn operation_part(
        &self,
        workspace: &Workspace,
        spec: &OperationSpec,
        (index, chosen): (usize, &Chosen),
        reads: &mut BTreeMap<String, Read>,
    ) -> Result<PartInput, ServiceError> {
        let Chosen {
            instance,
            app,
            key,
            servers,
        } = chosen;
        let mut part = Part {
            key: key.clone(),
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
        let mut steps = LifecyclePlan {
            steps: Vec::new(),
            server_env: BTreeMap::new(),
        };
        let mut approved = Wishes::default();
        let mut files = None;
        let of_installed = spec.operation.is_of_installed();
        if !of_installed {
            part.env = common_environment(workspace, key, instance);
            let layers = Layers {
                target: index,
                order: &Environment::new(),
                parameters: &Environment::new(),
                instance: &instance.env,
            };
            let own = servers.iter().map(
                |Taking {
                     server, binding, ..
                 }| { (server.name.as_str(), server_environment(server, binding)) },
            );
            check_environment_size(key, &part.env, &layers, own)?;
        }
        match &spec.operation {
            Operation::Restart | Operation::Online { .. } | Operation::Offline => {}
            Operation::StaticFiles(asked) => {
                files = Some(FilesStep {
                    files: asked.reference(),
                    run_as: asked.user.clone(),
                });
            }
            Operation::Initialise => {
                let field = format!("/targets/{index}/instance");
                let stack = self.stack(app, instance, None, field.clone())?;
                let request = LifecycleRequest {
                    application: key.clone(),
                    instance: instance.name.to_string(),
                    package: None,
                    parameters: instance.parameters.clone(),
                    env: part.env.clone(),
                    phases: INITIALISE_PHASES.to_vec(),
                    servers: servers
                        .iter()
                        .map(|taking| facts(&taking.server, &taking.binding))
                        .collect(),
                };
                steps = stack
                    .lifecycle(&request)
                    .await
                    .map_err(|error| plugin_failed(&format!("{field}/parameters"), &error))?;
                let prepares = |step: &windlass_domain::plugin::StackStep| {
                    INITIALISE_PHASES.contains(&step.phase)
                };
                if !steps.steps.iter().any(prepares) {
                    return Err(invalid(
                        "nothing_to_prepare",
                        field,
                        format!(
                            "the tech stack `{}` has nothing to prepare on the servers of `{key}`",
                            stack.reference().name
                        ),
                        "leave this service instance out",
                    ));
                }
                approved = self.approved(&stack);
                part.stack = Some(stack.reference().clone());
                reads.insert(
                    plugin_subject(PluginKind::TechStack, &stack.reference().name),
                    read_plugin(stack.reference()),
                );
            }
        }
        let common = if of_installed {
            (pools_subject(key), read_pools(instance))
        } else {
            (instance_subject(key), read_instance(instance))
        };
        let subject = common.0.clone();
        reads.extend([common]);
        let mut inputs = Vec::with_capacity(servers.len());
        for taking in servers {
            let Taking {
                server,
                binding,
                installed,
                state,
            } = taking;
            let name = server.name.as_str();
            let own = [
                (server_subject(name), read_server(server, binding)),
                (
                    installed_subject(key, name),
                    read_installed(installed.as_ref()),
                ),
                (state_subject(key, name), read_state(*state)),
            ];
            let mut subjects = vec![subject.clone()];
            subjects.extend(own.iter().map(|(subject, _)| subject.clone()));
            reads.extend(own);
            let env = match installed {
                // What was installed runs with what it was installed with.
                Some(installed) if of_installed => installed.env.clone(),
                Some(_) | None => server_environment(server, binding),
            };
            inputs.push(ServerInput {
                id: server.id,
                name: name.to_owned(),
                cell: cell_of(server),
                env,
                installed: installed.clone(),
                drained_by: None,
                reads: subjects,
            });
        }
        Ok(PartInput {
            part,
            steps,
            approved,
            flow: Vec::new(),
            files,
            from_cache: false,
            servers: inputs,
            only_traffic: Vec::new(),
        })
    }

    /// An application as a strategy sees it: it has the version that it keeps.
    fn operated(&self, workspace: &Workspace, chosen: &Chosen) -> StrategyApp {
        let versions = chosen.servers.iter().filter_map(|taking| {
            let installed = taking.installed.as_ref()?;
            Some(installed.package.version.clone())
        });
        StrategyApp {
            key: chosen.key.clone(),
            stage: 1,
            role: AppRole::Release,
            has_pools: !chosen.instance.pools.is_empty(),
            target_version: versions.max().unwrap_or_default(),
            servers: chosen
                .servers
                .iter()
                .map(|taking| {
                    self.strategy_server(workspace, &taking.server, taking.installed.as_ref())
                })
                .collect(),
        }
    }
}

fn check_spec(spec: &OperationSpec) -> Result<(), ServiceError> {
    if spec.targets.is_empty() || spec.targets.len() > MAX_TARGETS {
        return Err(ServiceError::Limit {
            code: "targets_out_of_range",
            field: "/targets".to_owned(),
            message: format!(
                "an operation has 1 to {MAX_TARGETS} service instances, and this one names {}",
                spec.targets.len()
            ),
            limit: MAX_TARGETS as u64,
            current: spec.targets.len() as u64,
            mend: "name the service instances, and split larger operations".to_owned(),
        });
    }
    check_limits(
        &spec.limits,
        spec.drain_deadline_ms,
        spec.delivery_deadline_ms,
    )?;
    match &spec.operation {
        Operation::Online { initial_weight } if *initial_weight > 100 => Err(ServiceError::Limit {
            code: "out_of_limit",
            field: "/operation/initial_weight".to_owned(),
            message: format!("`initial_weight` is {initial_weight}: 0 to 100 are allowed"),
            limit: 100,
            current: u64::from(*initial_weight),
            mend: "give a weight of 0 to 100".to_owned(),
        }),
        Operation::StaticFiles(files) => files.validate().map_err(|(field, bad)| {
            invalid(
                "static_files_invalid",
                format!("/operation/{field}"),
                bad.message,
                "change the field",
            )
        }),
        Operation::Restart
        | Operation::Online { .. }
        | Operation::Offline
        | Operation::Initialise => Ok(()),
    }
}

/// What is installed can lack what an operation is made of: a stack gave it no such steps.
fn lacks_steps(operation: &Operation, installed: &Manifest) -> Option<&'static str> {
    let (stops, starts) = match operation {
        Operation::Restart => (true, true),
        Operation::Online { .. } => (false, true),
        Operation::Offline => (true, false),
        Operation::StaticFiles(_) | Operation::Initialise => (false, false),
    };
    if stops && installed.stop.is_empty() {
        Some("what is installed on it has no steps that stop it")
    } else if starts && installed.start.is_empty() {
        Some("what is installed on it has no steps that start it")
    } else {
        None
    }
}

/// No server takes part: with the first reasons.
pub(super) fn nobody(left_out: &[LeftOut]) -> ServiceError {
    let told = left_out.iter().map(|out| {
        format!(
            "{} of `{}`: {}",
            out.server_name, out.application, out.reason
        )
    });
    ServiceError::Conflict {
        code: "no_server_qualifies",
        message: format!(
            "no server qualifies for the operation: {}",
            text::first_of(told, 10, "; ")
        ),
        mend: "choose other servers, or mend what is named".to_owned(),
    }
}

/// The environment that a release would have, without a package.
fn common_environment(workspace: &Workspace, app: &str, instance: &ServiceInstance) -> Environment {
    let own = [
        ("WINDLASS_WORKSPACE", workspace.name.as_str()),
        ("WINDLASS_APPLICATION", app),
    ];
    let own = own
        .into_iter()
        .map(|(name, value)| (name.to_owned(), Value::Plain(value.to_owned())));
    own.chain(instance.env.clone()).collect()
}
