//! Orders: preview, create, look at, act on.
//!
//! Owns what an order is made from (the specification and the plan, both blobs by digest) and which checks stand before an
//! action; the engine owns what happens then. A previewed plan is kept, so that an order made with its digest runs exactly
//! that plan, or is refused with what has changed since.

pub mod dashboard;
mod lists;
pub mod logs;
pub mod operations;
mod revisions;
mod traffic;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use windlass_domain::{
    Digest, Timestamp, dispatch,
    id::{InstanceId, OrderId, PackageId, ServerId},
    order::{
        Action, Control, Order, OrderEvent, OrderState, PlanRevision, Purpose, ReleaseSpec,
        RollbackAsked, StackChange,
    },
    plan::{Level, NodeId, NodeIndex, NodeKind, Plan},
    progress::{Counts, Drift, NodeProgress, NodeState, PoolWeight, Progress, StageRollback},
    reducer::{self, Refused},
    server::{ConnectionState, Server},
    text::REASON_MAX_CHARS,
};
use windlass_runtime::for_order;
use windlass_store::{CommitError, Revision, Watch};

use super::{Caller, ServiceError, planning::Planner, records};
use crate::{
    clock,
    engine::{self, ActError, Engine, NoRollback, rows},
    ids,
    keys::Kind,
};

pub use crate::engine::summary::PurposeKind;
pub use lists::OrderFilter;
pub use revisions::RevisionView;
pub(super) use revisions::bad_edit;
pub use traffic::{CellShare, MemberShare, PoolTraffic, TrafficView};

/// An order to be made. JSON: the fields of the release, and beside them `plan_digest` and `run`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct CreateOrder {
    /// What to release.
    #[serde(flatten)]
    pub release: ReleaseSpec,
    /// The digest that a preview gave: run exactly that plan, or be refused with what has changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan_digest: Option<Digest>,
    /// Run it at once. Default false.
    #[serde(default)]
    pub run: bool,
}

/// How a package is released at once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReleasePackage {
    /// The service instance; may be left out where its application has one alone in the workspace.
    pub instance: Option<InstanceId>,
    /// The order's title, 1 to 50 characters; absent: the application and the version.
    pub title: Option<String>,
}

/// A plan and the digest that names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PlanView {
    /// The digest.
    pub plan_digest: Digest,
    /// Servers it works on.
    pub server_count: usize,
    /// The plan: every step with its script in `steps`, every server with what differs in `units`, the tree in `nodes`.
    pub plan: Plan,
}

/// One node of an order with where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NodeView {
    /// Its id: what actions name. It holds when the plan is revised.
    pub node: NodeId,
    /// Its parent's id.
    pub parent: Option<NodeId>,
    /// What it stands for.
    pub level: Level,
    /// Name for people.
    pub name: String,
    /// `sequence`, `parallel`, `unit`, `step`, `traffic`, `gate`, `pause`, `judge`.
    pub kind: String,
    /// The server, where it is one's.
    pub server: Option<ServerId>,
    /// That server's name.
    pub server_name: Option<String>,
    /// Its state.
    pub state: NodeState,
    /// Attempts so far.
    pub attempt: u32,
    /// When the last attempt started.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// What happened, what holds it, or what it waits for.
    pub message: String,
    /// What drifted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drift: Vec<Drift>,
    /// Where the rollback of a stage is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<StageRollback>,
    /// Weights that a drain remembered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remembered: Vec<PoolWeight>,
    /// The main process's exit code, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
}

/// An order that is about to be made.
struct NewOrder {
    id: OrderId,
    title: String,
    purpose: Purpose,
    plan: Plan,
    /// The plan that was previewed.
    plan_digest: Option<Digest>,
    /// What was asked for, kept already.
    spec: Digest,
    run: bool,
    notify: bool,
    /// Ids of packages that it uses.
    packages: BTreeSet<String>,
    /// Tech-stack versions that its success changes.
    tech_stacks: Vec<StackChange>,
}

/// Orders. Cheap to clone.
#[derive(Clone)]
pub struct Orders {
    engine: Engine,
    planner: Planner,
}

impl Orders {
    /// Orders over this engine.
    #[must_use]
    pub fn new(engine: Engine, planner: Planner) -> Self {
        Self { engine, planner }
    }

    /// Makes the complete plan without doing anything. It is kept for a day, so that an order can name its digest.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn preview(
        &self,
        workspace: &str,
        spec: ReleaseSpec,
    ) -> Result<PlanView, ServiceError> {
        check_title(&spec.title)?;
        let spec = self.planner.with_packages(workspace, spec).await?;
        let plan = self.planner.plan_release(workspace, &spec).await?;
        let plan_digest = self.keep(&plan).await?;
        Ok(PlanView {
            plan_digest,
            server_count: plan.units.len(),
            plan,
        })
    }

    /// Makes an order.
    ///
    /// # Errors
    /// [`ServiceError`]; `plan_drifted` when `plan_digest` names a plan that would be another one today.
    pub async fn create(
        &self,
        caller: Caller,
        workspace: &str,
        create: CreateOrder,
    ) -> Result<Order, ServiceError> {
        let CreateOrder {
            release,
            plan_digest,
            run,
        } = create;
        check_title(&release.title)?;
        let release = self.planner.with_packages(workspace, release).await?;
        let packages = release
            .targets
            .iter()
            .filter_map(|target| Some(target.package?.to_string()))
            .collect();
        let id = OrderId::from_uuid(ids::new_uuid());
        let plan = for_order(
            id.to_string(),
            self.planner.plan_release(workspace, &release),
        )
        .await?;
        let tech_stacks = self.planner.tech_stack_changes(workspace, &release).await?;
        let spec = self.keep_spec(&release).await?;
        let new = NewOrder {
            id,
            title: release.title,
            purpose: Purpose::Release,
            plan,
            plan_digest,
            spec,
            run,
            notify: release.notifications,
            packages,
            tech_stacks,
        };
        self.make(caller, workspace, new).await
    }

    /// Makes a release order of a package with all settings as they are by default, and runs it. Source: spec "Packages",
    /// "Release now".
    ///
    /// # Errors
    /// Those of [`Orders::create`]; `no_instance`, `several_instances`.
    pub async fn release_package(
        &self,
        caller: Caller,
        workspace: &str,
        package: PackageId,
        asked: ReleasePackage,
    ) -> Result<Order, ServiceError> {
        let ReleasePackage { instance, title } = asked;
        let mut release = self
            .planner
            .release_of(workspace, package, instance)
            .await?;
        if let Some(title) = title {
            release.title = title;
        }
        let create = CreateOrder {
            release,
            plan_digest: None,
            run: true,
        };
        self.create(caller, workspace, create).await
    }

    async fn keep_spec<T: Serialize + Sync>(&self, spec: &T) -> Result<Digest, ServiceError> {
        engine::store_json(&self.engine.shared.blobs, spec)
            .await
            .map_err(|error| failed("keep the order's specification", error))
    }

    /// Makes an order of a plan, where that is the one that was previewed.
    async fn make(
        &self,
        caller: Caller,
        workspace: &str,
        new: NewOrder,
    ) -> Result<Order, ServiceError> {
        let NewOrder {
            id,
            title,
            purpose,
            plan,
            plan_digest,
            spec,
            run,
            notify,
            packages,
            tech_stacks,
        } = new;
        let digest = self.keep(&plan).await?;
        if let Some(previewed) = plan_digest.filter(|previewed| *previewed != digest) {
            return Err(self.changed_since(previewed, &plan).await);
        }
        let at = clock::now();
        let order = Order {
            schema: Order::SCHEMA,
            id,
            workspace: workspace.to_owned(),
            title,
            purpose,
            state: OrderState::NotStarted,
            state_reason: String::new(),
            strategy: plan.strategy.as_ref().map_or_else(String::new, |plugin| {
                format!("{}@{}", plugin.name, plugin.version)
            }),
            plan: digest,
            revisions: vec![PlanRevision {
                revision: 1,
                digest,
                author: caller.name.clone(),
                at,
                difference: String::new(),
            }],
            spec,
            counts: Counts {
                waiting: u32::try_from(plan.units.len()).unwrap_or(u32::MAX),
                ..Counts::default()
            },
            control: Control::NotStarted,
            stalled: false,
            lock_owner: id,
            last_event: 0,
            rolled_back_by: None,
            rollback_asked: None,
            server_count: u32::try_from(plan.units.len()).unwrap_or(u32::MAX),
            created_by: caller.name.clone(),
            created_at: at,
            started_at: None,
            finished_at: None,
            last_progress_at: None,
            notify,
            tech_stacks,
        };
        // Who begins to use a package says so in the same commit: a deletion at this moment finds out.
        let with = packages
            .into_iter()
            .fold(caller.answered(shown(&order)), |with, package| {
                with.and(records::refer(Kind::Package, &package))
            });
        if run {
            // Made and run with one commit: an answer that was lost means both or neither.
            self.engine
                .create_running(order, &plan, with)
                .await
                .map_err(not_committed)?;
        } else {
            self.engine
                .create(&order, &plan, with)
                .await
                .map_err(not_committed)?;
        }
        Ok(self.get(workspace, id).await?.0)
    }

    /// An order's header.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn get(
        &self,
        workspace: &str,
        id: OrderId,
    ) -> Result<(Order, Revision), ServiceError> {
        let found = rows::read_order(&*self.engine.shared.store, id)
            .await
            .map_err(|error| failed("read an order", error))?;
        found
            .filter(|(order, _)| order.workspace == workspace)
            .ok_or_else(|| no_such_order(id))
    }

    /// Every node with where it is.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn nodes(&self, workspace: &str, id: OrderId) -> Result<Vec<NodeView>, ServiceError> {
        let (_, plan, progress) = self.progress(workspace, id).await?;
        Ok((0u32..)
            .zip(&plan.nodes)
            .map(|(node, _)| view(&plan, &progress, node))
            .collect())
    }

    /// One node with everything that is kept of it: a step's output among it.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn node(
        &self,
        workspace: &str,
        id: OrderId,
        node: NodeId,
    ) -> Result<(NodeView, NodeProgress), ServiceError> {
        let (_, plan, progress) = self.progress(workspace, id).await?;
        let Some(node) = plan.index_of(node) else {
            return Err(ServiceError::not_found("node of this order", node));
        };
        Ok((view(&plan, &progress, node), progress.node(node).clone()))
    }

    /// The plan that an order runs.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn plan(&self, workspace: &str, id: OrderId) -> Result<PlanView, ServiceError> {
        let (order, plan, _) = self.progress(workspace, id).await?;
        let plan = std::sync::Arc::unwrap_or_clone(plan);
        Ok(PlanView {
            plan_digest: order.plan,
            server_count: plan.placed().len(),
            plan,
        })
    }

    /// Acts on an order; answers its header after it.
    ///
    /// # Errors
    /// [`ServiceError`]; `plan_drifted` when a `run` finds that what was planned from has changed.
    pub async fn act(
        &self,
        caller: Caller,
        workspace: &str,
        id: OrderId,
        action: Action,
    ) -> Result<Order, ServiceError> {
        check_reason(&action)?;
        let (order, _) = self.get(workspace, id).await?;
        operations::check_action(&order, &action)?;
        match &action {
            Action::Run | Action::RunNode { .. } if order.control == Control::NotStarted => {
                let plan = engine::load_plan(&self.engine.shared.blobs, order.plan)
                    .await
                    .map_err(|error| failed("read the plan", error))?;
                // Orders are pinned to the plugins that they were planned with: a newer version is no drift.
                let drift = self.planner.drift(&plan).await?;
                let drift: Vec<Drift> = drift
                    .into_iter()
                    .filter(|drift| {
                        !drift.subject.starts_with("strategy ")
                            && !drift.subject.starts_with("tech stack ")
                    })
                    .collect();
                if !drift.is_empty() {
                    return Err(drifted(&drift));
                }
            }
            Action::RollBack { reason, parameters } if order.state.is_terminal() => {
                let asked = RollbackAsked {
                    reason: reason.clone(),
                    parameters: parameters.clone(),
                };
                return self.roll_back_ended(caller, order, asked).await;
            }
            Action::RollBack { reason, parameters } if order.control == Control::Active => {
                // Refused before anything is ended for it.
                let (_, plan, progress) = self.progress(workspace, id).await?;
                let asked = RollbackAsked {
                    reason: reason.clone(),
                    parameters: parameters.clone(),
                };
                self.planner.check_rollback(&order, &plan, &asked).await?;
                self.planner
                    .can_roll_back(&order, &plan, &progress)
                    .await
                    .map_err(no_rollback)?;
            }
            Action::Run
            | Action::RunNode { .. }
            | Action::Confirm { .. }
            | Action::Retry { .. }
            | Action::Ignore { .. }
            | Action::Cancel { .. }
            | Action::Lock { .. }
            | Action::Unlock { .. }
            | Action::RollBack { .. }
            | Action::RollBackStage { .. }
            | Action::RunAgain { .. }
            | Action::GoOn { .. }
            | Action::SetWeights { .. }
            | Action::ShiftCell { .. } => {}
        }
        let with = caller.answered(shown(&order));
        self.engine
            .act(id, action, &caller.name, with)
            .await
            .map_err(refused)?;
        Ok(self.get(workspace, id).await?.0)
    }

    /// Whether a rollback goes on, or has succeeded. One that failed or was ended can be made again.
    async fn is_back_or_on_the_way(&self, rollback: OrderId) -> Result<bool, ServiceError> {
        let found = rows::read_order(&*self.engine.shared.store, rollback).await;
        let found = found.map_err(|error| failed("read an order", error))?;
        Ok(found.is_some_and(|(order, _)| {
            !order.state.is_terminal() || order.state == OrderState::Succeeded
        }))
    }

    /// Makes and runs a rollback of an order that has ended; answers the new order.
    async fn roll_back_ended(
        &self,
        caller: Caller,
        mut order: Order,
        asked: RollbackAsked,
    ) -> Result<Order, ServiceError> {
        let conflict = |code, message: String, mend: &str| ServiceError::Conflict {
            code,
            message,
            mend: mend.to_owned(),
        };
        if let Purpose::Rollback { .. } = order.purpose {
            return Err(conflict(
                "rollback_of_rollback",
                "a rollback order cannot be rolled back".to_owned(),
                "release the wanted version instead",
            ));
        }
        if let Some(by) = order.rolled_back_by
            && self.is_back_or_on_the_way(by).await?
        {
            return Err(conflict(
                "already_rolled_back",
                format!("the order was rolled back by {by}"),
                "look at that order",
            ));
        }
        let (_, plan, progress) = self.progress(&order.workspace, order.id).await?;
        if let Some(stage) = reducer::no_way_back(&plan, &progress) {
            return Err(conflict(
                "no_way_back",
                format!(
                    "the stage `{}` has begun: from there on the order cannot be rolled back",
                    plan.nodes[stage as usize].name
                ),
                "release the wanted version instead",
            ));
        }
        self.planner.check_rollback(&order, &plan, &asked).await?;
        let reason = asked.reason.clone();
        order.rollback_asked = Some(asked);
        let planned = self
            .planner
            .rollback(&order, &plan, &progress, &reason, &caller.name)
            .await
            .map_err(no_rollback)?;
        let with = caller.answered(shown(&planned.order));
        let id = self
            .engine
            .roll_back_ended(order.id, planned, with)
            .await
            .map_err(refused)?;
        Ok(self.get(&order.workspace, id).await?.0)
    }

    /// Events after a sequence number, at most `limit`.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn events(
        &self,
        workspace: &str,
        id: OrderId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<OrderEvent>, ServiceError> {
        self.get(workspace, id).await?;
        let store = &*self.engine.shared.store;
        let prefix = rows::events(id);
        // A row holds the events of one commit under the first of them: the row at or before the wanted one comes first.
        let start = rows::event(id, after.saturating_add(1));
        let at = store
            .scan_reverse(&prefix, Some(&rows::event(id, after.saturating_add(2))), 1)
            .await;
        let at = at.map_err(|error| failed("read an order's events", error))?;
        let mut entries = at.entries;
        let from = entries.first().map_or(start, |entry| entry.key.clone());
        let mut events = Vec::new();
        loop {
            for entry in &entries {
                let decoded = rows::decode_events(entry)
                    .map_err(|error| failed("read an order's events", error))?;
                events.extend(decoded.into_iter().filter(|event| event.seq > after));
            }
            if events.len() >= limit {
                events.truncate(limit);
                return Ok(events);
            }
            let last = entries
                .last()
                .map_or_else(|| from.clone(), |entry| entry.key.clone());
            let page = store
                .scan(&prefix, Some(&last), 100)
                .await
                .map_err(|error| failed("read an order's events", error))?;
            if page.entries.is_empty() {
                return Ok(events);
            }
            entries = page.entries;
        }
    }

    /// Wakes when an order has new events. Take it before reading them, so that none is missed.
    ///
    /// # Errors
    /// [`ServiceError::Unavailable`].
    pub async fn watch(&self, id: OrderId) -> Result<Watch, ServiceError> {
        let store = &*self.engine.shared.store;
        let revision = store
            .revision()
            .await
            .map_err(|error| failed("watch an order", error))?;
        store
            .watch(&rows::events(id), revision)
            .await
            .map_err(|error| ServiceError::Unavailable {
                message: error.to_string(),
            })
    }

    /// A server as it is now: its session, and where it is in the life of a release. The record knows neither for sure.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn server_now(&self, mut server: Server) -> Result<Server, ServiceError> {
        let online = self.engine.shared.agents.is_online(server.id);
        server.connection = if online {
            ConnectionState::Online
        } else {
            ConnectionState::Offline
        };
        if let Some(instance) = server.instance {
            let state = self.engine.release_state(instance, server.id).await;
            server.release_state =
                state.map_err(|error| failed("read a server's release state", error))?;
        }
        Ok(server)
    }

    /// An order with its plan and where everything in it is.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub(super) async fn progress(
        &self,
        workspace: &str,
        id: OrderId,
    ) -> Result<(Order, std::sync::Arc<Plan>, Progress), ServiceError> {
        let found = self.engine.progress(id).await.map_err(refused)?;
        found
            .filter(|(order, ..)| order.workspace == workspace)
            .ok_or_else(|| no_such_order(id))
    }

    async fn keep(&self, plan: &Plan) -> Result<Digest, ServiceError> {
        engine::store_json(&self.engine.shared.blobs, plan)
            .await
            .map_err(|error| failed("keep the plan", error))
    }

    /// Why a previewed plan is not the one that would be made now.
    async fn changed_since(&self, previewed: Digest, now: &Plan) -> ServiceError {
        let before = match engine::load_plan(&self.engine.shared.blobs, previewed).await {
            Ok(before) => before,
            Err(_) => {
                return ServiceError::Invalid {
                    code: "no_such_preview",
                    field: "/plan_digest".to_owned(),
                    message: format!(
                        "there is no previewed plan with the digest {previewed}: previews are kept for a day"
                    ),
                    mend: "preview the order again and use the digest that it gives".to_owned(),
                };
            }
        };
        let subjects: Vec<String> = before
            .reads
            .keys()
            .chain(now.reads.keys())
            .cloned()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let mut changed = engine::differences(&before, &subjects, &now.reads);
        changed.extend(operations::taking_part_changed(&before, now));
        if changed.is_empty() {
            return ServiceError::Conflict {
                code: "plan_differs",
                message: "the request is not the one that was previewed: its release, parameters or limits differ".to_owned(),
                mend: "preview this request and use the digest that it gives".to_owned(),
            };
        }
        drifted(&changed)
    }
}

/// An order as its idempotency record keeps it.
/// What an idempotency record keeps of an order: which it is. Its header after an action is the actor's to know, and is read
/// when the answer has to be made again.
fn shown(order: &Order) -> serde_json::Value {
    serde_json::to_value(OrderNow {
        order_now: order.id,
    })
    .unwrap_or_default()
}

/// An order in an idempotency record.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OrderNow {
    order_now: OrderId,
}

impl Orders {
    /// The order that an idempotency record stands for, as it is now; `None`: the record stands for something else, or the
    /// order is gone.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn of_record(
        &self,
        resource: &serde_json::Value,
    ) -> Result<Option<Order>, ServiceError> {
        let Ok(OrderNow { order_now }) = OrderNow::deserialize(resource) else {
            return Ok(None);
        };
        let found = rows::read_order(&*self.engine.shared.store, order_now).await;
        let found = found.map_err(|error| failed("read an order", error))?;
        Ok(found.map(|(order, _)| order))
    }
}

fn view(plan: &Plan, progress: &Progress, node: NodeIndex) -> NodeView {
    let planned = &plan.nodes[node as usize];
    let row = progress.node(node);
    let unit = dispatch::unit_of(plan, node).map(|(_, _, unit)| unit);
    let held = match &row.admission {
        windlass_domain::progress::Admission::Held(reason) => Some(reason.clone()),
        windlass_domain::progress::Admission::None
        | windlass_domain::progress::Admission::Asked
        | windlass_domain::progress::Admission::Admitted => None,
    };
    let gate = match &planned.kind {
        NodeKind::Gate { message } if progress.state(node) == NodeState::AwaitingConfirmation => {
            Some(message.clone())
        }
        NodeKind::Gate { .. }
        | NodeKind::Sequence
        | NodeKind::Parallel { .. }
        | NodeKind::Unit { .. }
        | NodeKind::Step { .. }
        | NodeKind::Traffic(_)
        | NodeKind::Pause { .. }
        | NodeKind::Judge { .. } => None,
    };
    NodeView {
        node: plan.id_of(node),
        parent: planned.parent.map(|parent| plan.id_of(parent)),
        level: planned.level,
        name: planned.name.clone(),
        kind: match &planned.kind {
            NodeKind::Sequence => "sequence",
            NodeKind::Parallel { .. } => "parallel",
            NodeKind::Unit { .. } => "unit",
            NodeKind::Step { .. } => "step",
            NodeKind::Traffic(_) => "traffic",
            NodeKind::Gate { .. } => "gate",
            NodeKind::Pause { .. } => "pause",
            NodeKind::Judge { .. } => "judge",
        }
        .to_owned(),
        server: unit.map(|unit| unit.server),
        server_name: unit.map(|unit| unit.server_name.clone()),
        state: progress.state(node),
        attempt: row.attempt,
        started_at: row.started_at,
        finished_at: row.finished_at,
        message: row
            .locked
            .clone()
            .or(held)
            .or(gate)
            .unwrap_or_else(|| row.message.clone()),
        drift: row.drift.clone(),
        rollback: row.rollback.clone(),
        remembered: row.remembered.clone().unwrap_or_default(),
        exit_code: row.result.as_ref().and_then(|result| result.exit_code),
    }
}

fn check_title(title: &str) -> Result<(), ServiceError> {
    windlass_domain::name::check_length("the title", title, 1, 50)
        .map_err(|error| ServiceError::of_value(("title", error)))?;
    if title.trim().is_empty() || title.chars().any(char::is_control) {
        return Err(ServiceError::invalid(
            "invalid_value",
            "title",
            "the title is blank, or holds a control character",
            "give a title of 1 to 50 characters that can be read",
        ));
    }
    Ok(())
}

fn drifted(drift: &[Drift]) -> ServiceError {
    let texts: Vec<String> = drift
        .iter()
        .map(|drift| {
            format!(
                "{}: was {}, is {}",
                drift.subject, drift.before, drift.after
            )
        })
        .collect();
    ServiceError::Conflict {
        code: "plan_drifted",
        message: format!(
            "what the plan was made from has changed since: {}",
            texts.join("; ")
        ),
        mend: "preview again and make a new order from it".to_owned(),
    }
}

fn no_such_order(id: OrderId) -> ServiceError {
    ServiceError::NotFound {
        what: "order",
        id: id.to_string(),
    }
}

fn failed(
    doing: &'static str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> ServiceError {
    ServiceError::Internal {
        doing,
        source: Box::new(source),
    }
}

/// A conflict can only be one on the idempotency record: the order's id is new.
pub(super) fn not_committed(error: CommitError) -> ServiceError {
    match error {
        CommitError::Conflict { .. } => ServiceError::Replay,
        error @ (CommitError::Limit(_) | CommitError::LeaseOver { .. } | CommitError::Store(_)) => {
            error.into()
        }
    }
}

fn no_rollback(why: NoRollback) -> ServiceError {
    let (code, message) = match why {
        NoRollback::Nothing(message) => ("nothing_to_roll_back_to", message),
        NoRollback::Superseded(message) => ("order_superseded", message),
        NoRollback::NotNow(message) => return ServiceError::Unavailable { message },
    };
    ServiceError::Conflict {
        code,
        message,
        mend: "release the wanted version instead".to_owned(),
    }
}

/// A person's reason is kept in rows, events and the header of a rollback order.
fn check_reason(action: &Action) -> Result<(), ServiceError> {
    let (Action::Lock { reason, .. }
    | Action::RollBack { reason, .. }
    | Action::RollBackStage { reason, .. }) = action
    else {
        return Ok(());
    };
    let length = reason.chars().count();
    if reason.trim().is_empty() && !matches!(action, Action::Lock { .. }) {
        return Err(ServiceError::invalid(
            "reason_missing",
            "reason",
            "a rollback has a reason, and this one is blank",
            "say why: it stands in both orders",
        ));
    }
    if length <= REASON_MAX_CHARS {
        return Ok(());
    }
    Err(ServiceError::Invalid {
        code: "reason_too_long",
        field: "reason".to_owned(),
        message: format!("the reason has {length} characters; the limit is {REASON_MAX_CHARS}"),
        mend: "say it in fewer words".to_owned(),
    })
}

/// The engine's refusals in the words of services.
fn refused(error: ActError) -> ServiceError {
    let message = error.to_string();
    let conflict = |code, mend: &str| ServiceError::Conflict {
        code,
        message: message.clone(),
        mend: mend.to_owned(),
    };
    match error {
        ActError::NoSuchOrder(id) => no_such_order(id),
        ActError::Refused(refused) => match refused {
            Refused::Terminal => conflict("order_ended", "make a new order"),
            Refused::NotCurrent { .. } | Refused::WrongState { .. } => conflict(
                "wrong_state",
                "look at the order's state and choose an action that fits it",
            ),
            Refused::NoSuchNode { node, .. } => ServiceError::NotFound {
                what: "node of this order",
                id: node.to_string(),
            },
            Refused::WrongLevel { .. } => {
                conflict("wrong_level", "choose a node of the level named")
            }
            Refused::Nothing { .. } => conflict(
                "nothing_to_do",
                "look at the order's nodes for their states",
            ),
            Refused::StageRollsBack { .. } => conflict(
                "stage_rolls_back",
                "wait until the stage's rollback order has ended, or end that order",
            ),
            Refused::NoWayBack { .. } => {
                conflict("no_way_back", "release the wanted version instead")
            }
            Refused::TrafficChanges { .. } => conflict(
                "traffic_changes",
                "try again once the change before it is made",
            ),
            Refused::NotReleased { .. } => conflict(
                "not_released",
                "name servers that this order has released, each once",
            ),
            Refused::NoSuchCell { .. } => conflict(
                "cell_not_released",
                "name a cell whose servers were just released, while that waits to be confirmed",
            ),
            Refused::OutOfRange {
                field,
                found,
                min,
                max,
            } => ServiceError::Limit {
                code: "out_of_limit",
                field: format!("/{field}"),
                message: message.clone(),
                limit: u64::from(if found < min { min } else { max }),
                current: u64::from(found),
                mend: format!("give a value of `{field}` within the limit"),
            },
            Refused::NotReady { .. } => conflict("not_ready", "run what comes before it first"),
        },
        ActError::Held { .. } => conflict(
            "server_held",
            "wait until the other order has ended, or end it",
        ),
        ActError::Edit(bad) => revisions::bad_edit(&bad),
        ActError::Revised { now } => ServiceError::Changed {
            what: "plan of this order",
            current: u64::from(now),
        },
        ActError::Busy(_) => ServiceError::Unavailable { message },
        ActError::Row { source, .. } => failed("read the order", source),
        ActError::Plan { source, .. } => failed("read the order's plan", source),
    }
}
