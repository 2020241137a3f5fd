//! What dashboards show: orders by state, and where an order is by application, group and server, with durations.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use windlass_domain::{
    Timestamp,
    id::{InstanceId, OrderId, ServerId},
    order::{Order, OrderState},
    plan::{LeftOut, Level, NodeId, NodeIndex, NodeKind, Plan},
    progress::{NodeState, Progress},
};

use super::Orders;
use crate::{clock, service::ServiceError};

/// Orders of a workspace by state.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct OrderCounts {
    /// All of them.
    pub total: u64,
    /// Those that have not ended.
    pub active: u64,
    /// By state; a state without orders is absent.
    pub by_state: BTreeMap<OrderState, u64>,
}

/// When something began and ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Span {
    /// When its first step started; absent: it was not begun.
    pub started_at: Option<Timestamp>,
    /// When its last step ended; absent: something is under way or has yet to be reached, or it was not begun.
    pub finished_at: Option<Timestamp>,
    /// From its start to its end, or to now, in milliseconds.
    pub duration_ms: u64,
}

/// Where an order is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct OrderProgress {
    /// The order.
    pub order: OrderId,
    /// Its state.
    pub state: OrderState,
    /// When it was run and ended.
    #[serde(flatten)]
    pub span: Span,
    /// Servers by state.
    pub servers: BTreeMap<NodeState, u32>,
    /// The order that rolls it back.
    pub rollback: Option<OrderId>,
    /// The order that it rolls back.
    pub previous_deployment: Option<OrderId>,
    /// By application, in the order of the plan.
    pub applications: Vec<ApplicationProgress>,
    /// Servers that were asked for and do not take part: those without a group, those that do not qualify.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
}

/// Where an application of an order is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ApplicationProgress {
    /// Its node: what actions name. Absent: it stands at none, or at several (in a blue-green release at one for each cell).
    pub node: Option<NodeId>,
    /// Its name; empty for commands on servers.
    pub application: String,
    /// Its state.
    pub state: NodeState,
    /// Its service instance.
    pub instance: Option<InstanceId>,
    /// The version that is released.
    pub version: Option<String>,
    /// When its first server began and its last ended.
    #[serde(flatten)]
    pub span: Span,
    /// Servers by state.
    pub servers: BTreeMap<NodeState, u32>,
    /// Its groups, in the order of the plan.
    pub groups: Vec<GroupProgress>,
}

/// Where a group of servers is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GroupProgress {
    /// Its node: what actions name.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Its state. What failed and was then ended is `failed`; what was not reached before the order was over is `cancelled`.
    pub state: NodeState,
    /// When its first server began and its last ended.
    #[serde(flatten)]
    pub span: Span,
    /// Its servers.
    pub servers: Vec<ServerProgress>,
}

/// Where a server's turn is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ServerProgress {
    /// Its node: what actions name.
    pub node: NodeId,
    /// The server.
    pub server: ServerId,
    /// Its name.
    pub name: String,
    /// The state of its turn, likewise.
    pub state: NodeState,
    /// The step that failed or was ended early; else the one that is under way, or ended last.
    pub step: Option<String>,
    /// Steps that are settled.
    pub steps_done: u32,
    /// Steps altogether.
    pub steps_total: u32,
    /// When its first step started and its last ended.
    #[serde(flatten)]
    pub span: Span,
}

impl Span {
    /// From the first beginning to the last end. What was not begun in an order that is over is not waited for.
    fn over(spans: impl Iterator<Item = Self>, order: &Order, now: Timestamp) -> Self {
        let is_over = order.finished_at.is_some();
        let spans: Vec<Self> = spans
            .filter(|span| !is_over || span.started_at.is_some())
            .collect();
        let started_at = spans.iter().filter_map(|span| span.started_at).min();
        let all_ended = spans.iter().all(|span| span.finished_at.is_some());
        let finished_at = spans.iter().filter_map(|span| span.finished_at).max();
        Self::of(started_at, finished_at.filter(|_| all_ended), now)
    }

    fn of(started_at: Option<Timestamp>, finished_at: Option<Timestamp>, now: Timestamp) -> Self {
        let duration_ms =
            started_at.map_or(0, |started| finished_at.unwrap_or(now).since_ms(started));
        Self {
            started_at,
            finished_at,
            duration_ms,
        }
    }
}

impl Orders {
    /// Where an order is, by application, group and server.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] of the order.
    pub async fn order_progress(
        &self,
        workspace: &str,
        id: OrderId,
    ) -> Result<OrderProgress, ServiceError> {
        let (order, plan, progress) = self.progress(workspace, id).await?;
        Ok(shown(&order, &plan, &progress, clock::now()))
    }
}

fn shown(order: &Order, plan: &Plan, progress: &Progress, now: Timestamp) -> OrderProgress {
    let mut applications: Vec<(Option<u32>, ApplicationProgress)> = Vec::new();
    let mut nodes: Vec<BTreeSet<NodeIndex>> = Vec::new();
    for (node, planned) in (0u32..).zip(&plan.nodes) {
        let NodeKind::Unit { unit } = planned.kind else {
            continue;
        };
        let Some(unit) = plan.units.get(unit as usize) else {
            continue;
        };
        let at = applications.iter().position(|(part, _)| *part == unit.part);
        let at = at.unwrap_or_else(|| {
            let part = plan.part_of(unit);
            let application = ApplicationProgress {
                node: None,
                state: NodeState::NotStarted,
                application: part.map_or_else(String::new, |part| part.key.clone()),
                instance: part.map(|part| part.instance),
                version: part.and_then(|part| Some(part.package.as_ref()?.version.clone())),
                span: Span::default(),
                servers: BTreeMap::new(),
                groups: Vec::new(),
            };
            applications.push((unit.part, application));
            nodes.push(BTreeSet::new());
            applications.len() - 1
        });
        let application = &mut applications[at].1;
        nodes[at].extend(around(plan, node, Level::Application));
        let group = around(plan, node, Level::Group).unwrap_or(node);
        let server = server(order, plan, progress, node, now);
        *application.servers.entry(server.state).or_default() += 1;
        match application.groups.last_mut() {
            Some(last) if last.node == plan.id_of(group) => last.servers.push(server),
            Some(_) | None => application.groups.push(GroupProgress {
                node: plan.id_of(group),
                name: plan.nodes[group as usize].name.clone(),
                state: group_state(plan, progress, group),
                span: Span::default(),
                servers: vec![server],
            }),
        }
    }
    let mut servers = BTreeMap::new();
    for ((_, application), nodes) in applications.iter_mut().zip(nodes) {
        for group in &mut application.groups {
            group.span = Span::over(group.servers.iter().map(|server| server.span), order, now);
        }
        let groups = application.groups.iter().map(|group| group.span);
        application.span = Span::over(groups, order, now);
        let states: Vec<NodeState> = if nodes.is_empty() {
            application.servers.keys().copied().collect()
        } else {
            let states = nodes.iter().map(|node| progress.told_state(plan, *node));
            states.collect()
        };
        application.state = whole(&states);
        application.node = match nodes.iter().collect::<Vec<_>>().as_slice() {
            [only] => Some(plan.id_of(**only)),
            _ => None,
        };
        for (state, count) in &application.servers {
            *servers.entry(*state).or_default() += count;
        }
    }
    OrderProgress {
        order: order.id,
        state: order.state,
        span: Span::of(order.started_at, order.finished_at, now),
        servers,
        rollback: order.rolled_back_by,
        previous_deployment: order.purpose.rollback_of(),
        applications: applications
            .into_iter()
            .map(|(_, application)| application)
            .collect(),
        left_out: plan.left_out.clone(),
    }
}

/// What several states come to: the one that most needs to be seen.
fn whole(states: &[NodeState]) -> NodeState {
    const FIRST: [NodeState; 7] = [
        NodeState::Failed,
        NodeState::Unknown,
        NodeState::Drifted,
        NodeState::AwaitingConfirmation,
        NodeState::Cancelling,
        NodeState::Running,
        NodeState::Locked,
    ];
    let any = |state: &NodeState| states.contains(state);
    if let Some(found) = FIRST.iter().find(|state| any(state)) {
        *found
    } else if states.iter().all(|state| *state == NodeState::NotStarted) {
        NodeState::NotStarted
    } else if any(&NodeState::NotStarted) {
        NodeState::Running
    } else if any(&NodeState::Succeeded) {
        NodeState::Succeeded
    } else if any(&NodeState::Ignored) {
        NodeState::Ignored
    } else {
        NodeState::Cancelled
    }
}

fn server(
    order: &Order,
    plan: &Plan,
    progress: &Progress,
    unit: NodeIndex,
    now: Timestamp,
) -> ServerProgress {
    let steps = progress.children(unit);
    let rows = || steps.iter().map(|step| progress.node(*step));
    let state = progress.told_state(plan, unit);
    let done = steps
        .iter()
        .filter(|step| progress.state(**step).is_settled());
    let done = u32::try_from(done.count()).unwrap_or(u32::MAX);
    let begun = |step: &&NodeIndex| {
        let state = progress.state(**step);
        state != NodeState::NotStarted
            && (state != NodeState::Cancelled || progress.node(**step).attempt > 0)
    };
    // Where its turn ended early, it may have got its weight back behind the step that it ended at.
    let ended_at = steps.iter().filter(begun).find(|step| {
        let state = progress.state(**step);
        state.needs_mending() || state == NodeState::Cancelled
    });
    let step = ended_at.or(steps.iter().rfind(begun));
    let step = step.map(|step| plan.nodes[*step as usize].name.clone());
    let planned = windlass_domain::dispatch::unit_of(plan, unit).map(|(_, _, unit)| unit);
    let started_at = rows().filter_map(|row| row.started_at).min();
    let ended = rows().filter_map(|row| row.finished_at).max();
    let ended = ended.filter(|_| state.is_settled() || state.needs_mending());
    // Nothing goes on in an order that is over.
    let finished_at = ended.or(order.finished_at.filter(|_| started_at.is_some()));
    ServerProgress {
        node: plan.id_of(unit),
        server: planned.map_or_else(
            || ServerId::from_uuid(uuid::Uuid::nil()),
            |unit| unit.server,
        ),
        name: plan.nodes[unit as usize].name.clone(),
        state,
        step,
        steps_done: done,
        steps_total: u32::try_from(steps.len()).unwrap_or(u32::MAX),
        span: Span::of(started_at, finished_at, now),
    }
}

/// The state of a group as it is told: one that a gate asks about waits for that.
fn group_state(plan: &Plan, progress: &Progress, group: NodeIndex) -> NodeState {
    let state = progress.told_state(plan, group);
    let waits =
        |node: &NodeIndex| progress.told_state(plan, *node) == NodeState::AwaitingConfirmation;
    if state == NodeState::Succeeded && progress.followers(plan, group).iter().any(waits) {
        NodeState::AwaitingConfirmation
    } else {
        state
    }
}

/// The innermost node of a level around a unit.
fn around(plan: &Plan, unit: NodeIndex, level: Level) -> Option<NodeIndex> {
    let parent = |at: &NodeIndex| plan.nodes[*at as usize].parent;
    std::iter::successors(parent(&unit), parent).find(|at| plan.nodes[*at as usize].level == level)
}
