//! The plan of a rollback: what the servers that an order changed had before.
//!
//! Steps come from the plan that installed what is to come back, never from today's plugins. Where the strategy gives no
//! rollback, fails, or breaks a rule, the core's own plan runs: one server after the other, failed ones first. Traffic that
//! the order had shifted is taken away from the servers that it changed before, and all of it goes back behind, unless the
//! strategy's plan moves traffic itself. A stage's traffic is back before its rollback is planned.

mod traffic;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use windlass_domain::{
    Digest, dispatch,
    expand::{self, PartInput, PlanInput, ServerInput},
    flow,
    id::{OrderId, ServerId},
    manifest::{Manifest, PluginRef},
    order::{
        Control, Ending, Order, OrderState, PlanRevision, Purpose, RollbackAsked, StackChange,
    },
    plan::{NodeIndex, NodeKind, Part, Plan, StepTemplate, TrafficAction, Unit},
    plugin::{
        AppRole, LifecyclePlan, OnFailure, Phase, RollbackRequest, StackStep, StrategyApp,
        StrategyPlan, StrategyRequest, StrategyServer, UnitProgress, UnitState, Wishes,
    },
    prepared,
    progress::Progress,
    reducer,
    stages::stages,
    text,
};

use self::traffic::Traffic;
use super::{Planner, ServiceError, cell_names};
use crate::{
    clock,
    engine::{self, NoRollback, PlannedRollback, rows},
    ids,
    service::chosen,
};

impl Planner {
    /// Plans the rollback of an order: by its strategy, or by the core where the strategy's plan fails or breaks a rule.
    ///
    /// # Errors
    /// [`NoRollback`].
    pub async fn rollback(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        reason: &str,
        by: &str,
    ) -> Result<PlannedRollback, NoRollback> {
        let planned = self
            .roll_back(order, plan, progress, (None, reason), by)
            .await?;
        planned.ok_or_else(nothing)
    }

    /// Whether an order that has not ended could be rolled back as far as it got.
    ///
    /// # Errors
    /// [`NoRollback`].
    pub async fn can_roll_back(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
    ) -> Result<(), NoRollback> {
        let mut found = self.rollback_parts(order, plan, progress, None).await?;
        let traffic = Traffic::of(plan, progress, &mut found.parts);
        if found.units.is_empty() && traffic.is_empty() {
            return Err(nothing());
        }
        Ok(())
    }

    /// Refuses parameters of a rollback that the order's strategy would not take.
    ///
    /// # Errors
    /// `parameters_invalid`, `out_of_limit`.
    pub async fn check_rollback(
        &self,
        order: &Order,
        plan: &Plan,
        asked: &RollbackAsked,
    ) -> Result<(), ServiceError> {
        let Some(parameters) = &asked.parameters else {
            return Ok(());
        };
        let bytes = serde_json::to_vec(parameters).map_or(usize::MAX, |json| json.len());
        if bytes > RollbackAsked::MAX_PARAMETER_BYTES {
            return Err(ServiceError::Limit {
                code: "out_of_limit",
                field: "/parameters".to_owned(),
                message: format!(
                    "the parameters of a rollback have {bytes} bytes as JSON, at most {} are allowed",
                    RollbackAsked::MAX_PARAMETER_BYTES
                ),
                limit: RollbackAsked::MAX_PARAMETER_BYTES as u64,
                current: bytes as u64,
                mend: "give those alone that differ from the order's own".to_owned(),
            });
        }
        if !parameters.is_object() {
            return Err(ServiceError::invalid(
                "parameters_invalid",
                "/parameters",
                "the parameters of a rollback are an object",
                "give the strategy's parameters that are to stand above the order's own",
            ));
        }
        let Some(strategy) = &plan.strategy else {
            return Ok(());
        };
        let unavailable = |message: String| ServiceError::Unavailable { message };
        let spec = self.spec(order).await.map_err(unavailable)?;
        let plugin = self.parts.plugins.pinned(strategy.digest).await;
        let plugin = plugin.map_err(|error| unavailable(error.to_string()))?;
        plugin
            .validate_parameters(&asked.over(spec.parameters))
            .map_err(|faults| chosen::parameters_invalid("/parameters", strategy, &faults))
    }

    /// Likewise of one stage, or of all of it. `None`: there is nothing to bring back.
    pub(super) async fn roll_back(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        (stage, reason): (Option<NodeIndex>, &str),
        by: &str,
    ) -> Result<Option<PlannedRollback>, NoRollback> {
        let Found {
            mut parts,
            units,
            left_out,
        } = self.rollback_parts(order, plan, progress, stage).await?;
        let traffic = match stage {
            Some(_) => Traffic::default(),
            None => Traffic::of(plan, progress, &mut parts),
        };
        if units.is_empty() && traffic.is_empty() {
            return Ok(None);
        }
        let input = |strategy: Option<PluginRef>| PlanInput {
            strategy,
            limits: plan.limits.clone(),
            drain_deadline_ms: drain_deadline(plan),
            delivery_deadline_ms: plan.delivery_deadline_ms,
            parts: parts.clone(),
            reads: BTreeMap::new(),
        };
        let answer = if units.is_empty() {
            Ok(StrategyPlan {
                nodes: Vec::new(),
                on_failure: OnFailure::Block,
                progress_deadline_ms: None,
            })
        } else {
            self.strategy_rollback(order, plan, &parts, &units).await?
        };
        let planned = match answer {
            // An empty answer stays empty, and is refused as such.
            Ok(answer) if answer.nodes.is_empty() && !units.is_empty() => {
                expand::expand(input(plan.strategy.clone()), &answer).map_err(|bad| bad.to_string())
            }
            Ok(answer) => {
                let answer = traffic.around(answer);
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
                let own = traffic.around(expand::one_by_one(&servers));
                let own = expand::expand(input(None), &own)
                    .map_err(|bad| NoRollback::Nothing(bad.to_string()))?;
                tracing::warn!(order.id = %order.id, cause, "the strategy gave no rollback that can be used; the core's own plan runs");
                (own, Some(cause))
            }
        };
        // A rollback never rolls itself back.
        rollback.on_failure = OnFailure::Block;
        rollback.brings_back = true;
        rollback.schema = rollback.lowest_schema();
        let digest = engine::store_json(&self.parts.blobs, &rollback)
            .await
            .map_err(NoRollback::not_now)?;
        let at = clock::now();
        let mut reason = reason.to_owned();
        if !left_out.is_empty() {
            reason = format!("{reason} (not brought back: {})", left_out.join("; "));
            text::cut_message(&mut reason);
        }
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
                reason,
                core_plan_because,
                stage: stage.map(|stage| plan.id_of(stage)),
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
            rollback_asked: None,
            server_count: u32::try_from(rollback.units.len()).unwrap_or(u32::MAX),
            created_by: by.to_owned(),
            created_at: at,
            started_at: None,
            finished_at: None,
            last_progress_at: None,
            notify: order.notify,
            tech_stacks: stacks_back(order, stage),
        };
        Ok(Some(PlannedRollback {
            order: header,
            plan: Arc::new(rollback),
        }))
    }

    /// What the servers that an order changed had before, as parts to be released again; failed servers first. A server whose
    /// earlier release is not known any more keeps no other one from going back.
    async fn rollback_parts(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        stage: Option<NodeIndex>,
    ) -> Result<Found, NoRollback> {
        // The header shows the last revisions alone.
        let revisions = rows::read_revisions(&*self.parts.store, order)
            .await
            .map_err(NoRollback::not_now)?;
        let is_own = |manifest: &Manifest| {
            let digest = manifest.plan;
            revisions
                .iter()
                .any(|revision| Some(revision.digest) == digest)
        };
        let brought_back = self.plans_of_rollback(order).await?;
        let mut left_out = Vec::new();
        let mut groups: BTreeMap<(u32, Digest, u32), PartInput> = BTreeMap::new();
        let mut states = Vec::new();
        let mut plans: BTreeMap<Digest, Arc<Plan>> = BTreeMap::new();
        for (node, planned) in (0u32..).zip(&plan.nodes) {
            let NodeKind::Unit { unit } = planned.kind else {
                continue;
            };
            if stage.is_some_and(|stage| progress.stage_of(node) != stage) {
                continue;
            }
            let unit = &plan.units[unit as usize];
            let state = reducer::unit_state(plan, progress, node);
            let Some(before) = unit
                .before
                .as_ref()
                .filter(|_| state != UnitState::Untouched)
            else {
                continue;
            };
            // Server work leaves nothing behind that could be brought back.
            let (Some(index), Some(part)) = (unit.part, plan.part_of(unit)) else {
                continue;
            };
            let current = self
                .installed(part.instance, unit.server)
                .await
                .map_err(NoRollback::not_now)?;
            let earlier = self
                .manifest(&rows::installed_before(part.instance, unit.server))
                .await
                .map_err(NoRollback::not_now)?;
            // An earlier rollback, which was ended or failed elsewhere, has brought it back.
            if order.state.is_terminal()
                && let Some(current) = &current
                && current
                    .plan
                    .is_some_and(|plan| brought_back.contains(&plan))
            {
                continue;
            }
            // While an order runs nobody else works on its servers.
            if order.state.is_terminal()
                && let Some(current) = &current
                && !is_own(current)
                && (state == UnitState::Released || current.release != *before)
            {
                return Err(NoRollback::Superseded(format!(
                    "{} has been released to since: it has version {} of a later order",
                    unit.server_name, current.package.version
                )));
            }
            let known = [&current, &earlier]
                .into_iter()
                .flatten()
                .find(|manifest| manifest.release == *before);
            let Some((manifest, digest)) =
                known.and_then(|manifest| Some((manifest, manifest.plan?)))
            else {
                left_out.push(format!(
                    "{}, whose earlier release `{before}` is no longer known",
                    unit.server_name
                ));
                continue;
            };
            let old = match plans.get(&digest) {
                Some(old) => old.clone(),
                None => {
                    let old = engine::load_plan(&self.parts.blobs, digest)
                        .await
                        .map_err(NoRollback::not_now)?;
                    plans.entry(digest).or_insert(Arc::new(old)).clone()
                }
            };
            let found = unit_of_server(&old, manifest, unit.server);
            let Some((old_node, old_unit, old_index, old_part)) = found else {
                left_out.push(format!(
                    "{}: the plan that installed `{before}` there does not hold it",
                    unit.server_name
                ));
                continue;
            };
            let group = groups
                .entry((index, digest, old_index))
                .or_insert_with(|| PartInput {
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
                    flow: flow::release(),
                    files: None,
                    from_cache: true,
                    servers: Vec::new(),
                    only_traffic: Vec::new(),
                });
            states.push((
                group.part.key.clone(),
                unit.server,
                state,
                (index, digest, old_index),
            ));
            group.servers.push(ServerInput {
                id: unit.server,
                name: unit.server_name.clone(),
                cell: unit.cell.clone(),
                env: old_unit.env.clone(),
                installed: current,
                drained_by: drain_of(plan, progress, node).map(|leaf| plan.id_of(leaf)),
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
        if units.is_empty() && !left_out.is_empty() {
            return Err(NoRollback::Nothing(format!(
                "nothing can be brought back: {}",
                left_out.join("; ")
            )));
        }
        Ok(Found {
            parts: groups.into_values().collect(),
            units,
            left_out,
        })
    }

    /// The plans by which an earlier rollback of the order, which did not succeed, brought servers back.
    async fn plans_of_rollback(&self, order: &Order) -> Result<BTreeSet<Digest>, NoRollback> {
        let Some(earlier) = order.rolled_back_by else {
            return Ok(BTreeSet::new());
        };
        let store = &*self.parts.store;
        let found = rows::read_order(store, earlier).await;
        let Some((earlier, _)) = found.map_err(NoRollback::not_now)? else {
            return Ok(BTreeSet::new());
        };
        let revisions = rows::read_revisions(store, &earlier).await;
        let revisions = revisions.map_err(NoRollback::not_now)?;
        Ok(revisions
            .into_iter()
            .map(|revision| revision.digest)
            .collect())
    }

    /// The strategy's plan of a rollback; within, why there is none.
    async fn strategy_rollback(
        &self,
        order: &Order,
        plan: &Plan,
        parts: &[PartInput],
        units: &[UnitProgress],
    ) -> Result<Result<StrategyPlan, String>, NoRollback> {
        let Some(strategy) = &plan.strategy else {
            return Ok(Err("the order has no strategy".to_owned()));
        };
        let plugin = match self.parts.plugins.pinned(strategy.digest).await {
            Ok(plugin) => plugin,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let spec = self.spec(order).await.map_err(NoRollback::NotNow)?;
        let cells = self.cells(&order.workspace).await;
        // What depends on something was released after it, and is brought back before it: the strategy turns stages round.
        let names: Vec<&str> = plan.parts.iter().map(|part| part.key.as_str()).collect();
        let stage_of = stages(&names, &spec.dependencies).unwrap_or_default();
        let stage = |key: &str| {
            let (application, _) = key.split_once('~').unwrap_or((key, ""));
            stage_of.get(application).copied().unwrap_or(1)
        };
        let request = StrategyRequest {
            parameters: match &order.rollback_asked {
                Some(asked) => asked.over(spec.parameters),
                None => spec.parameters,
            },
            limits: plan.limits.clone(),
            cells: cells.map_err(NoRollback::NotNow)?,
            applications: parts
                .iter()
                .map(|part| StrategyApp {
                    key: part.part.key.clone(),
                    stage: stage(&part.part.key),
                    role: if part.servers.is_empty() {
                        AppRole::ShiftOnly
                    } else {
                        AppRole::Release
                    },
                    has_pools: !part.part.pools.is_empty(),
                    target_version: part
                        .part
                        .package
                        .as_ref()
                        .map_or_else(String::new, |package| package.version.clone()),
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
                        .chain(
                            part.only_traffic
                                .iter()
                                .map(|server| self.only_traffic(plan, *server)),
                        )
                        .collect(),
                })
                .collect(),
        };
        let request = RollbackRequest {
            request,
            progress: units.to_vec(),
        };
        let answer = windlass_runtime::for_order(order.id.to_string(), plugin.rollback(&request));
        Ok(answer.await.map_err(|error| error.to_string()))
    }
}

/// What a rollback consists of.
struct Found {
    /// What is released again, with its servers.
    parts: Vec<PartInput>,
    /// How far the order got on each server.
    units: Vec<UnitProgress>,
    /// Servers that stay as they are, each with the reason.
    left_out: Vec<String>,
}

fn nothing() -> NoRollback {
    NoRollback::Nothing(
        "nothing that this order changed had an earlier release to go back to".to_owned(),
    )
}

impl Planner {
    /// A server that a rollback leaves as it is, as its strategy sees it.
    fn only_traffic(&self, plan: &Plan, server: ServerId) -> StrategyServer {
        let unit = plan.units.iter().find(|unit| unit.server == server);
        let cell = unit.map_or_else(String::new, |unit| unit.cell.clone());
        StrategyServer {
            id: server.to_string(),
            name: unit.map_or_else(|| server.to_string(), |unit| unit.server_name.clone()),
            zone: cell.clone(),
            cell,
            healthy: self.parts.agents.is_online(server),
            installed_version: None,
        }
    }

    async fn cells(&self, workspace: &str) -> Result<Vec<String>, String> {
        let found = self.parts.workspaces.get(workspace).await;
        let (workspace, _) = found.map_err(|error| error.to_string())?;
        Ok(cell_names(&workspace))
    }
}

fn unit_of_server<'a>(
    plan: &'a Plan,
    manifest: &Manifest,
    server: ServerId,
) -> Option<(NodeIndex, &'a Unit, u32, &'a Part)> {
    (0u32..).zip(&plan.nodes).find_map(|(node, planned)| {
        let NodeKind::Unit { unit } = planned.kind else {
            return None;
        };
        let unit = plan.units.get(unit as usize)?;
        let (index, part) = (unit.part?, plan.part_of(unit)?);
        let package = part.package.as_ref()?;
        (unit.server == server
            && part.instance == manifest.instance
            && package.digest == manifest.package.digest)
            .then_some((node, unit, index, part))
    })
}

/// The tech-stack versions that come back: an order that has not succeeded has changed none.
fn stacks_back(order: &Order, stage: Option<NodeIndex>) -> Vec<StackChange> {
    if stage.is_some() || order.control != Control::Ended(Ending::Succeeded) {
        return Vec::new();
    }
    let changes = order.tech_stacks.iter().cloned();
    changes
        .map(|change| StackChange {
            instance: change.instance,
            before: change.after,
            after: change.before,
        })
        .collect()
}

/// The stack's steps as they were rendered for a unit: those of its leaves, those that prepare a server, which its leaves may
/// leave out, and how to stop what it installed.
fn steps_of(plan: &Plan, unit: NodeIndex, part: &Part) -> Vec<StackStep> {
    let rendered = dispatch::steps_of(plan, unit).filter_map(|step| match step {
        StepTemplate::Stack(step)
            if step.phase != Phase::Stop
                && (part.prepare.is_empty() || !prepared::prepares(step)) =>
        {
            Some(step.clone())
        }
        StepTemplate::Stack(_)
        | StepTemplate::Fetch
        | StepTemplate::Unpack
        | StepTemplate::Activate
        | StepTemplate::PlaceFiles(_)
        | StepTemplate::Script(_) => None,
    });
    let kept = part.prepare.iter().chain(&part.stop);
    rendered.chain(kept.cloned()).collect()
}

/// Everything that a plan's steps were allowed: users and roots that stand in it.
fn all_wishes(plan: &Plan) -> Wishes {
    let steps = plan.steps.iter().filter_map(|step| match step {
        StepTemplate::Stack(step) => Some(step),
        StepTemplate::Fetch
        | StepTemplate::Unpack
        | StepTemplate::Activate
        | StepTemplate::PlaceFiles(_)
        | StepTemplate::Script(_) => None,
    });
    let kept = plan
        .parts
        .iter()
        .flat_map(|part| part.prepare.iter().chain(&part.stop));
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
            | NodeKind::Traffic(
                TrafficAction::Restore | TrafficAction::Set { .. } | TrafficAction::Share { .. },
            )
            | NodeKind::Gate { .. }
            | NodeKind::Pause { .. }
            | NodeKind::Judge { .. } => None,
        })
        .unwrap_or(30_000)
}
