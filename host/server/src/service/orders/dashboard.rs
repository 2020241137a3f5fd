//! What dashboards show: orders by state, and where an order is by application, group and server, with durations.

use std::collections::BTreeMap;

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
    /// When its last step ended; absent: something is under way or was not reached.
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
    /// Its name; empty for commands on servers.
    pub application: String,
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
    /// Its state.
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
    /// The state of its turn.
    pub state: NodeState,
    /// The step that is under way, failed, or ended last.
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
    fn over(spans: impl Iterator<Item = Self>, now: Timestamp) -> Self {
        let spans: Vec<Self> = spans.collect();
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
                application: part.map_or_else(String::new, |part| part.key.clone()),
                instance: part.map(|part| part.instance),
                version: part.and_then(|part| Some(part.package.as_ref()?.version.clone())),
                span: Span::default(),
                servers: BTreeMap::new(),
                groups: Vec::new(),
            };
            applications.push((unit.part, application));
            applications.len() - 1
        });
        let application = &mut applications[at].1;
        let group = group_of(plan, node);
        let server = server(plan, progress, node, now);
        *application.servers.entry(server.state).or_default() += 1;
        match application.groups.last_mut() {
            Some(last) if last.node == plan.id_of(group) => last.servers.push(server),
            Some(_) | None => application.groups.push(GroupProgress {
                node: plan.id_of(group),
                name: plan.nodes[group as usize].name.clone(),
                state: progress.state(group),
                span: Span::default(),
                servers: vec![server],
            }),
        }
    }
    let mut servers = BTreeMap::new();
    for (_, application) in &mut applications {
        for group in &mut application.groups {
            group.span = Span::over(group.servers.iter().map(|server| server.span), now);
        }
        application.span = Span::over(application.groups.iter().map(|group| group.span), now);
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

fn server(plan: &Plan, progress: &Progress, unit: NodeIndex, now: Timestamp) -> ServerProgress {
    let steps = progress.children(unit);
    let rows = || steps.iter().map(|step| progress.node(*step));
    let state = progress.state(unit);
    let (mut step, mut done) = (None, 0);
    for index in steps {
        let at = progress.state(*index);
        done += u32::from(at.is_settled());
        if at != NodeState::NotStarted && at != NodeState::Cancelled {
            step = Some(plan.nodes[*index as usize].name.clone());
        }
    }
    let planned = windlass_domain::dispatch::unit_of(plan, unit).map(|(_, _, unit)| unit);
    let ended = rows().filter_map(|row| row.finished_at).max();
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
        span: Span::of(
            rows().filter_map(|row| row.started_at).min(),
            ended.filter(|_| state.is_settled() || state.needs_mending()),
            now,
        ),
    }
}

/// The group around a unit; the unit itself where there is none.
fn group_of(plan: &Plan, unit: NodeIndex) -> NodeIndex {
    let mut at = unit;
    while let Some(parent) = plan.nodes[at as usize].parent {
        if plan.nodes[parent as usize].level == Level::Group {
            return parent;
        }
        at = parent;
    }
    unit
}
