//! What stops an order or what it waits for, and why, for people.
//!
//! People are told of each stop once, for as long as it lasts: of each gate, and of each group of servers once for what
//! fails in it. A text that changes meanwhile (whom the safety envelope waits for) is shown, and no news.

use std::collections::BTreeMap;

use windlass_domain::{
    dispatch,
    order::OrderState,
    plan::{Level, NodeId, NodeIndex, NodeKind},
    plugin::RestoreWeight,
    progress::{NodeProgress, NodeState, StageRollback},
    text,
};

use super::Actor;

/// What stops an order: the state of a node, the group that it is in (or itself, outside of groups), of a gate also the place
/// in its server's turn; and the first such node.
pub(super) type Stops = BTreeMap<(NodeState, NodeId, NodeIndex), NodeIndex>;

/// The state of an order that a node in this state stops.
const fn of_stop(state: NodeState) -> Option<OrderState> {
    match state {
        NodeState::AwaitingConfirmation => Some(OrderState::AwaitingConfirmation),
        NodeState::Drifted => Some(OrderState::Drifted),
        NodeState::Unknown => Some(OrderState::Unknown),
        NodeState::Failed => Some(OrderState::Blocked),
        NodeState::NotStarted
        | NodeState::Running
        | NodeState::Locked
        | NodeState::Cancelling
        | NodeState::Cancelled
        | NodeState::Ignored
        | NodeState::Succeeded => None,
    }
}

/// How the rollback of a stage or an application stops its order.
fn of_rollback(row: &NodeProgress) -> Option<NodeState> {
    match &row.rollback {
        Some(StageRollback::Done) if !row.ignored => Some(NodeState::AwaitingConfirmation),
        Some(StageRollback::Failed { .. }) => Some(NodeState::Failed),
        Some(
            StageRollback::Ending { .. }
            | StageRollback::Due { .. }
            | StageRollback::Running { .. }
            | StageRollback::Done,
        )
        | None => None,
    }
}

impl Actor {
    /// Why the order is in its state, for people.
    pub(super) fn reason(&self, state: OrderState) -> String {
        let first = |wanted: fn(NodeState) -> bool| {
            (0u32..).zip(&self.plan.nodes).find(|(node, planned)| {
                planned.kind.is_leaf() && wanted(self.progress.state(*node))
                    || (!self.progress.node(*node).drift.is_empty()
                        && wanted(self.progress.state(*node)))
            })
        };
        let told = |found: Option<(u32, &windlass_domain::plan::Node)>| {
            found.map_or_else(String::new, |(node, _)| self.said_of(node))
        };
        match state {
            OrderState::Blocked if self.progress.stalled => {
                "nothing finished within the progress deadline".to_owned()
            }
            OrderState::Blocked if self.progress.is_held() => self.held_because(),
            OrderState::Blocked | OrderState::RollingBack => {
                let stage = self.stage_where(|row| of_rollback(row) == Some(NodeState::Failed));
                if let Some(stage) = stage
                    && state == OrderState::Blocked
                {
                    return self.said_of(stage);
                }
                let failed = told(first(|state| state == NodeState::Failed));
                if !failed.is_empty() {
                    return failed;
                }
                let held = (0u32..).zip(&self.plan.nodes).find_map(|(node, planned)| {
                    let reason = self.progress.node(node).locked.as_ref()?;
                    Some(format!("{} is locked: {reason}", planned.name))
                });
                held.unwrap_or_default()
            }
            OrderState::Drifted => told(first(|state| state == NodeState::Drifted)),
            OrderState::Unknown => told(first(|state| state == NodeState::Unknown)),
            OrderState::AwaitingConfirmation => {
                let awaits =
                    |row: &NodeProgress| of_rollback(row) == Some(NodeState::AwaitingConfirmation);
                match self.stage_where(awaits) {
                    Some(stage) => self.said_of(stage),
                    None => told(first(|state| state == NodeState::AwaitingConfirmation)),
                }
            }
            OrderState::NotStarted => self.order.state_reason.clone(),
            // A rollback that cannot be has said why.
            OrderState::Failed if !self.order.state_reason.is_empty() => {
                self.order.state_reason.clone()
            }
            OrderState::Failed => told(first(NodeState::needs_mending)),
            // What made it go back.
            OrderState::RolledBack => match &self.order.rollback_asked {
                Some(asked) if self.order.state_reason.is_empty() => asked.reason.clone(),
                Some(_) | None => self.order.state_reason.clone(),
            },
            OrderState::Succeeded | OrderState::Cancelled => self.left_behind(state),
            OrderState::Initialising | OrderState::Running | OrderState::Cancelling => {
                String::new()
            }
        }
    }

    /// What a node that stops the order says.
    fn said_of(&self, node: NodeIndex) -> String {
        let planned = &self.plan.nodes[node as usize];
        let on = dispatch::unit_of(&self.plan, node)
            .map(|(_, _, unit)| format!(" on {}", unit.server_name));
        let row = self.progress.node(node);
        if let Some(StageRollback::Failed { message }) = &row.rollback {
            return format!("{} could not be rolled back: {message}", planned.name);
        }
        if of_rollback(row).is_some() {
            return format!(
                "{} was rolled back: run it again, or go on without it",
                planned.name
            );
        }
        let drift = row
            .drift
            .first()
            .map(|d| format!("{} was {} and is {}", d.subject, d.before, d.after));
        let asked = match &planned.kind {
            NodeKind::Gate { message } => Some(message),
            NodeKind::Sequence
            | NodeKind::Parallel { .. }
            | NodeKind::Unit { .. }
            | NodeKind::Step { .. }
            | NodeKind::Traffic(_)
            | NodeKind::Pause { .. }
            | NodeKind::Judge { .. } => None,
        };
        let said = Some(&row.message).filter(|message| !message.is_empty());
        let message = drift.or_else(|| said.or(asked).cloned());
        let what = format!(
            "{}{}{}",
            planned.name,
            on.unwrap_or_default(),
            self.of_application(node)
        );
        match message {
            Some(message) => format!("{what}: {message}"),
            None => what,
        }
    }

    /// What stops an order that comes to this state, and what it waits for.
    pub(super) fn stops(&self, comes_to: OrderState) -> Stops {
        match comes_to {
            OrderState::Blocked
            | OrderState::Drifted
            | OrderState::Unknown
            | OrderState::AwaitingConfirmation => {}
            OrderState::NotStarted
            | OrderState::Initialising
            | OrderState::Running
            | OrderState::Cancelling
            | OrderState::Succeeded
            | OrderState::Failed
            | OrderState::Cancelled
            | OrderState::RollingBack
            | OrderState::RolledBack => return Stops::new(),
        }
        let mut stops = Stops::new();
        for (node, planned) in (0u32..).zip(&self.plan.nodes) {
            let row = self.progress.node(node);
            if let Some(state) = of_rollback(row) {
                stops.insert((state, self.plan.id_of(node), 0), node);
            }
            let state = self.progress.state(node);
            let speaks = planned.kind.is_leaf() || !row.drift.is_empty();
            if speaks && of_stop(state).is_some() {
                let unit = dispatch::unit_of(&self.plan, node).map(|(unit, ..)| unit);
                let group = unit.and_then(|unit| self.plan.nodes[unit as usize].parent);
                let place = match unit {
                    Some(unit) if state == NodeState::AwaitingConfirmation => node - unit,
                    Some(_) | None => 0,
                };
                let at = self.plan.id_of(group.unwrap_or(node));
                stops.entry((state, at, place)).or_insert(node);
            }
        }
        stops
    }

    /// What people were not told of before, one text for each kind, with the state of an order that it stops; without the
    /// reason that they are told just now.
    pub(super) fn news(&self, told: &Stops, reason: Option<&str>) -> Vec<(OrderState, String)> {
        let mut news: BTreeMap<NodeState, Vec<String>> = BTreeMap::new();
        for (stop, node) in &self.stops {
            let said = self.said_of(*node);
            if !told.contains_key(stop) && Some(&*said) != reason {
                news.entry(stop.0).or_default().push(said);
            }
        }
        let told = |(state, said): (NodeState, Vec<String>)| {
            Some((of_stop(state)?, text::first_of(said.iter(), 3, "; ")))
        };
        news.into_iter().filter_map(told).collect()
    }

    /// What people should know of servers that an order leaves: released in part, released without traffic.
    fn left_behind(&self, state: OrderState) -> String {
        let released = |node: &NodeIndex| self.progress.state(*node) == NodeState::Succeeded;
        let nodes = (0u32..).zip(&self.plan.nodes);
        let units = nodes.filter(|(_, planned)| matches!(planned.kind, NodeKind::Unit { .. }));
        let units = units.map(|(node, _)| node);
        let (released, others): (Vec<_>, Vec<_>) = units.partition(released);
        let mut said = Vec::new();
        if state == OrderState::Cancelled && !released.is_empty() && !others.is_empty() {
            said.push(format!(
                "{} of {} servers are done, the others stay as they were",
                released.len(),
                released.len() + others.len()
            ));
        }
        let unit_of = |node: NodeIndex| Some(dispatch::unit_of(&self.plan, node)?.2);
        let without: Vec<&str> = released
            .into_iter()
            .filter_map(unit_of)
            .filter(|unit| {
                let pools = self
                    .plan
                    .part_of(unit)
                    .is_some_and(|part| !part.pools.is_empty());
                let shifted = state == OrderState::Succeeded && self.shifts(unit.part);
                pools && unit.restore == RestoreWeight::KeepZero && !shifted
            })
            .map(|unit| unit.server_name.as_str())
            .collect();
        if !without.is_empty() {
            said.push(format!(
                "{} were released without traffic, and have what people gave them by hand; the next release that \
                 restores weights gives them what they had before",
                text::first_of(without.iter(), 10, ", ")
            ));
        }
        said.join("; ")
    }

    /// Whether the plan moves traffic of an application by itself.
    fn shifts(&self, part: Option<u32>) -> bool {
        self.plan.nodes.iter().any(|planned| {
            let NodeKind::Traffic(action) = &planned.kind else {
                return false;
            };
            action.shifts().is_some_and(|(of, _)| Some(of) == part)
        })
    }

    /// Which application a node is of, where the order has several.
    fn of_application(&self, node: NodeIndex) -> String {
        if self.plan.parts.len() < 2 {
            return String::new();
        }
        let of_unit = dispatch::unit_of(&self.plan, node)
            .and_then(|(_, _, unit)| Some(self.plan.part_of(unit)?.key.as_str()));
        let around = || {
            let parent = |at: &NodeIndex| self.plan.nodes[*at as usize].parent;
            std::iter::successors(parent(&node), parent)
                .map(|at| &self.plan.nodes[at as usize])
                .find(|planned| planned.level == Level::Application)
                .map(|planned| planned.name.as_str())
        };
        of_unit
            .or_else(around)
            .map_or_else(String::new, |name| format!(" of {name}"))
    }

    /// The first stage or application whose rollback is at such a point.
    fn stage_where(&self, wanted: fn(&NodeProgress) -> bool) -> Option<NodeIndex> {
        (0u32..)
            .zip(&self.plan.nodes)
            .find(|(node, planned)| {
                matches!(planned.level, Level::Stage | Level::Application)
                    && wanted(self.progress.node(*node))
            })
            .map(|(node, _)| node)
    }

    /// What the safety envelope holds, and why.
    fn held_because(&self) -> String {
        let Some((node, reason)) = self.progress.first_held() else {
            return String::new();
        };
        let server = dispatch::unit_of(&self.plan, node)
            .map_or_else(String::new, |(_, _, unit)| {
                format!("{}: ", unit.server_name)
            });
        format!("{server}{reason}")
    }
}
