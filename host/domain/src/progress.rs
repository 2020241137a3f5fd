//! Progress: where every node of a plan is.
//!
//! Leaves have states of their own; the state of an inner node *follows* from its children's, and from the marks on it, by
//! one function, [`derive()`]. For that each inner node keeps a [`Tally`] of its children's states, so that one leaf's
//! change costs its depth, not the size of the plan. Stored are leaves and the marks that people or checks put on inner
//! nodes; tallies are not.

mod marks;
mod told;

use serde::{Deserialize, Serialize};

use crate::{
    id::PoolId,
    order::{Control, Ending, OrderState},
    plan::{Level, NodeId, NodeIndex, NodeKind, Plan, TrafficAction},
    task::TaskResult,
    time::Timestamp,
};

pub use marks::{EditState, ServerWeight, StageRollback, TrafficChange, TrafficEdit};

/// The state of a node.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    Default,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// Not reached.
    #[default]
    NotStarted,
    /// Under way; of an inner node also: begun, and nothing in it may start at the moment.
    Running,
    /// Waits for a person.
    AwaitingConfirmation,
    /// A person or another order holds it.
    Locked,
    /// What it was planned from has changed.
    Drifted,
    /// Whether it ran cannot be known.
    Unknown,
    /// It failed.
    Failed,
    /// Being ended.
    Cancelling,
    /// Ended by a person, or because the order rolls back.
    Cancelled,
    /// A person went on without it.
    Ignored,
    /// Done.
    Succeeded,
}

impl NodeState {
    /// How many there are.
    pub const COUNT: usize = 11;

    /// Every state, in the order of their numbers.
    pub const ALL: [Self; Self::COUNT] = [
        Self::NotStarted,
        Self::Running,
        Self::AwaitingConfirmation,
        Self::Locked,
        Self::Drifted,
        Self::Unknown,
        Self::Failed,
        Self::Cancelling,
        Self::Cancelled,
        Self::Ignored,
        Self::Succeeded,
    ];

    /// Whether nothing more happens in it and what comes after it may start.
    #[must_use]
    pub const fn is_settled(self) -> bool {
        match self {
            Self::Cancelled | Self::Ignored | Self::Succeeded => true,
            Self::NotStarted
            | Self::Running
            | Self::AwaitingConfirmation
            | Self::Locked
            | Self::Drifted
            | Self::Unknown
            | Self::Failed
            | Self::Cancelling => false,
        }
    }

    /// Whether a person has to mend it: retry, ignore, cancel or roll back.
    #[must_use]
    pub const fn needs_mending(self) -> bool {
        match self {
            Self::Drifted | Self::Unknown | Self::Failed => true,
            Self::NotStarted
            | Self::Running
            | Self::AwaitingConfirmation
            | Self::Locked
            | Self::Cancelling
            | Self::Cancelled
            | Self::Ignored
            | Self::Succeeded => false,
        }
    }

    /// Whether something is under way in it.
    #[must_use]
    pub const fn is_busy(self) -> bool {
        matches!(self, Self::Running | Self::Cancelling)
    }
}

/// Servers of an order by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default, utoipa::ToSchema)]
#[serde(default)]
pub struct Counts {
    /// Not reached, or locked, and not ended.
    pub waiting: u32,
    /// Under way, held by the envelope, being ended, or waiting for a person.
    pub running: u32,
    /// Done.
    pub succeeded: u32,
    /// Failed, drifted or unknown, also where its turn was ended after that.
    pub failed: u32,
    /// Ignored.
    pub ignored: u32,
    /// Cancelled: also what was not reached in something that a person ended, in an order that rolls back, or before an order
    /// was over.
    pub cancelled: u32,
}

impl Counts {
    /// All of them: as many as the plan has servers' turns.
    #[must_use]
    pub const fn total(&self) -> u32 {
        self.waiting + self.running + self.succeeded + self.failed + self.ignored + self.cancelled
    }
}

/// Where a unit is on its way through the gate that every server passes before its first step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Admission {
    /// Not asked for.
    #[default]
    None,
    /// Asked for: drift and the safety envelope are being checked.
    Asked,
    /// Asked for, and the envelope says: not now, because of this.
    Held(String),
    /// It may start.
    Admitted,
}

/// Where the taking back of a shift of traffic is. A shift is taken back when a person ends what it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Undo {
    /// Not asked for.
    #[default]
    None,
    /// The weights before it are being set.
    Due,
    /// They are back.
    Done,
    /// They could not all be set.
    Failed,
}

/// The weight of one server in one pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PoolWeight {
    /// The pool.
    pub pool: PoolId,
    /// 0 to 100.
    pub weight: u32,
}

/// One difference between what was planned from and what is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Drift {
    /// What, for example `package shop@2.0.0` or `installed on web-1`.
    pub subject: String,
    /// As it was planned.
    pub before: String,
    /// As it is.
    pub after: String,
}

/// What is kept of one node. A node without a row is as [`NodeProgress::default`] says: not started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default, utoipa::ToSchema)]
#[serde(default)]
pub struct NodeProgress {
    /// The state of a leaf. Of an inner node it is not kept: it follows from its children.
    pub state: NodeState,
    /// Attempts so far.
    #[serde(skip_serializing_if = "is_zero")]
    pub attempt: u32,
    /// When the last attempt started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// How the last attempt of a step ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<TaskResult>,
    /// What happened, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Of a drain: the weights before the first attempt. Kept over retries, so that 0 is never taken for the old weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remembered: Option<Vec<PoolWeight>>,
    /// Of a shift: the weights before its first attempt, as the plan lists them: for each pool of the part, for each server
    /// of the shift. Kept over retries. Numbers alone: a shift of a thousand servers stays one row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shifted: Option<Vec<u32>>,
    /// Of a shift in something that was ended: whether its weights are taken back.
    #[serde(skip_serializing_if = "is_no_undo")]
    pub undo: Undo,
    /// Of a unit: whether it may start.
    #[serde(skip_serializing_if = "is_none_admission")]
    pub admission: Admission,
    /// Of a unit: what drifted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drift: Vec<Drift>,
    /// Of an inner node: held, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locked: Option<String>,
    /// Of an inner node: a person goes on without it.
    #[serde(skip_serializing_if = "is_false")]
    pub ignored: bool,
    /// Of an inner node: nothing more is started in it.
    #[serde(skip_serializing_if = "is_false")]
    pub cancel: bool,
    /// Of an inner node: a person asked to run it.
    #[serde(skip_serializing_if = "is_false")]
    pub opened: bool,
    /// Of a stage: where its rollback is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollback: Option<StageRollback>,
    /// Of a unit: it was rolled back with its stage and runs again, so that what is installed is another installation of the
    /// same release.
    #[serde(skip_serializing_if = "is_false")]
    pub again: bool,
    /// Of a judge: how many windows were collected and did not suffice.
    #[serde(skip_serializing_if = "is_zero")]
    pub extended: u32,
    /// Of the root: the last change of traffic by a person.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub edit: Option<TrafficEdit>,
}

impl NodeProgress {
    /// Whether nothing more may start in it: it is being ended, or its stage is rolled back.
    #[must_use]
    pub(crate) const fn is_ended(&self) -> bool {
        self.cancel || self.rollback.is_some()
    }

    /// Whether an effect is outstanding that is an inner node's own.
    const fn is_waiting(&self) -> bool {
        let rollback = match &self.rollback {
            Some(rollback) => rollback.is_under_way(),
            None => false,
        };
        let edit = matches!(
            self.edit,
            Some(TrafficEdit {
                state: EditState::Due,
                ..
            })
        );
        rollback || edit || matches!(self.admission, Admission::Asked | Admission::Held(_))
    }
}

impl NodeProgress {
    /// The state of a leaf: as it is kept, unless it is a shift whose weights are taken back.
    #[must_use]
    pub const fn leaf_state(&self) -> NodeState {
        match self.undo {
            Undo::None => self.state,
            Undo::Due => NodeState::Cancelling,
            Undo::Done => NodeState::Cancelled,
            Undo::Failed => NodeState::Failed,
        }
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature serde asks for"
)]
const fn is_no_undo(undo: &Undo) -> bool {
    matches!(undo, Undo::None)
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature serde asks for"
)]
const fn is_false(flag: &bool) -> bool {
    !*flag
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature serde asks for"
)]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

const fn is_none_admission(admission: &Admission) -> bool {
    matches!(admission, Admission::None)
}

/// How many children of an inner node are in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally([u32; NodeState::COUNT]);

impl Tally {
    /// Children in `state`.
    #[must_use]
    pub const fn of(&self, state: NodeState) -> u32 {
        self.0[state as usize]
    }

    /// All children.
    #[must_use]
    pub fn total(&self) -> u32 {
        self.0.iter().sum()
    }

    /// Children in which something is under way or waits for a person.
    pub(crate) const fn active(&self) -> u32 {
        self.of(NodeState::Running)
            + self.of(NodeState::Cancelling)
            + self.of(NodeState::AwaitingConfirmation)
    }

    /// Children that a person has to mend.
    pub(crate) const fn troubled(&self) -> u32 {
        self.of(NodeState::Failed) + self.of(NodeState::Unknown) + self.of(NodeState::Drifted)
    }

    const fn add(&mut self, state: NodeState) {
        self.0[state as usize] += 1;
    }

    fn remove(&mut self, state: NodeState) {
        self.0[state as usize] -= 1;
    }
}

/// The state of an inner node from its children's (`tally`) and the `marks` on it: the one function that decides it.
///
/// The first rule that fits:
///
/// 0. A stage that is rolled back, and that nobody went on without: `running` while it is, then `awaiting_confirmation`, or
///    `failed`.
/// 1. A person ignored it: `running` while something in it is (its server gets its weight back), else `ignored`.
/// 2. All children are settled: `cancelled` when all of them are, or when it is marked to be ended and one of them is; else
///    `succeeded`.
/// 3. It is marked to be ended: `cancelling` while something is under way, waits for a person or for the unit's admission;
///    else `cancelled`, whatever in it was not reached or failed.
/// 4. A unit that drifted is `drifted`; one whose admission is asked for or held is `running`.
/// 5. Something in it is under way: `running`, whatever failed beside it.
/// 6. A child has drifted, is unknown, or failed: `drifted`, `unknown` or `failed`, in this order. In a `parallel` node up to
///    `max_failures` failed children are tolerated; what drifted or is unknown never is.
/// 7. All that is not settled is a tolerated failure: `succeeded`.
/// 8. A child waits for a person: `awaiting_confirmation`.
/// 9. It, or a child, is locked: `locked`.
/// 10. No child was reached and its admission was not asked for: `not_started`; else `running`.
///
/// Whether the order tolerates as many failures as its strategy does is not seen here but in [`Progress::order_state`].
#[must_use]
pub fn derive(kind: &NodeKind, marks: &NodeProgress, tally: &Tally) -> NodeState {
    use NodeState as S;
    let any = |state| tally.of(state) > 0;
    let total = tally.total();
    let busy = any(S::Running) || any(S::Cancelling);
    match &marks.rollback {
        Some(
            StageRollback::Ending { .. }
            | StageRollback::Due { .. }
            | StageRollback::Running { .. },
        ) => return S::Running,
        Some(StageRollback::Failed { .. }) => return S::Failed,
        Some(StageRollback::Done) if !marks.ignored => return S::AwaitingConfirmation,
        Some(StageRollback::Done) | None => {}
    }
    // An ignored server may still get its weight back.
    if marks.ignored {
        return if busy { S::Running } else { S::Ignored };
    }
    let settled = tally.of(S::Cancelled) + tally.of(S::Ignored) + tally.of(S::Succeeded);
    if settled == total {
        let all = total > 0 && tally.of(S::Cancelled) == total;
        return if all || (marks.cancel && any(S::Cancelled)) {
            S::Cancelled
        } else {
            S::Succeeded
        };
    }
    if marks.cancel {
        let asked = matches!(marks.admission, Admission::Asked | Admission::Held(_));
        return if busy || asked || any(S::AwaitingConfirmation) {
            S::Cancelling
        } else {
            S::Cancelled
        };
    }
    if matches!(kind, NodeKind::Unit { .. }) {
        match &marks.admission {
            Admission::None if !marks.drift.is_empty() => return S::Drifted,
            Admission::None => {}
            Admission::Asked | Admission::Held(_) => return S::Running,
            Admission::Admitted => {}
        }
    }
    if busy {
        return S::Running;
    }
    let tolerated = match kind {
        NodeKind::Parallel { max_failures, .. } => tally.of(S::Failed) <= *max_failures,
        NodeKind::Sequence
        | NodeKind::Unit { .. }
        | NodeKind::Step { .. }
        | NodeKind::Traffic(_)
        | NodeKind::Gate { .. }
        | NodeKind::Pause { .. }
        | NodeKind::Judge { .. } => !any(S::Failed),
    };
    if any(S::Drifted) {
        S::Drifted
    } else if any(S::Unknown) {
        S::Unknown
    } else if !tolerated {
        S::Failed
    } else if settled + tally.of(S::Failed) == total {
        S::Succeeded
    } else if any(S::AwaitingConfirmation) {
        S::AwaitingConfirmation
    } else if marks.locked.is_some() || any(S::Locked) {
        S::Locked
    } else if tally.of(S::NotStarted) == total && marks.admission == Admission::None {
        S::NotStarted
    } else {
        S::Running
    }
}

/// Where every node of one plan is. Built from rows, changed by the reducer alone.
#[derive(Debug, Clone)]
pub struct Progress {
    /// The part of the control flow that does not follow from nodes.
    pub control: Control,
    /// Set when nothing finished for longer than the plan's progress deadline; cleared by a person who goes on.
    pub stalled: bool,
    pub(crate) nodes: Vec<NodeProgress>,
    pub(crate) states: Vec<NodeState>,
    pub(crate) tallies: Vec<Tally>,
    pub(crate) branches: Vec<Branch>,
    /// One past the last node of each node's subtree.
    pub(crate) subtree_end: Vec<NodeIndex>,
    /// The nodes that are units.
    pub(crate) unit_nodes: Vec<NodeIndex>,
    /// The nodes that can be rolled back by themselves: stages, and applications that neither stand in one nor hold one.
    pub(crate) stage_nodes: Vec<NodeIndex>,
    /// The states of all units.
    pub(crate) units: Tally,
    /// Failed units that do not stop the order.
    pub(crate) allowed_failures: u32,
    /// Leaves that run or are being ended.
    pub(crate) busy_leaves: u32,
    /// Inner nodes with an effect of their own that is outstanding: units that were asked for, stages that are rolled back,
    /// the order whose traffic a person changes.
    pub(crate) asked: u32,
    /// What is live in each subtree.
    pub(crate) live: Vec<Live>,
    /// Units in which something is live.
    pub(crate) live_units: u32,
    /// Nodes that are marked to be ended.
    pub(crate) ended: u32,
    /// The leaves that shift traffic, in the plan's order.
    pub(crate) shifts: Vec<NodeIndex>,
}

/// What is live in a subtree: leaves that run, wait for a person or are being ended, and units whose admission is asked.
/// A node can be `running` and not live: between two turns nothing in it may start, for example for want of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Live {
    /// Whether the node itself is.
    pub(crate) own: bool,
    /// How many nodes of the subtree are, itself included.
    pub(crate) count: u32,
    /// In how many of its children something is.
    pub(crate) children: u32,
}

/// The children of an inner node, in order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Branch {
    pub(crate) list: Vec<NodeIndex>,
    /// All children before this position are settled: where scanning begins.
    pub(crate) cursor: usize,
}

impl Progress {
    /// The progress of a plan from its rows (absent: not started).
    #[must_use]
    pub fn load(
        plan: &Plan,
        control: Control,
        stalled: bool,
        rows: impl IntoIterator<Item = (NodeIndex, NodeProgress)>,
    ) -> Self {
        let count = plan.nodes.len();
        let mut nodes = vec![NodeProgress::default(); count];
        for (index, row) in rows {
            if let Some(node) = nodes.get_mut(index as usize) {
                *node = row;
            }
        }
        let mut branches = vec![Branch::default(); count];
        for (index, node) in (0u32..).zip(&plan.nodes) {
            if let Some(parent) = node.parent {
                branches[parent as usize].list.push(index);
            }
        }
        let mut progress = Self {
            control,
            stalled,
            states: vec![NodeState::NotStarted; count],
            tallies: vec![Tally::default(); count],
            nodes,
            branches,
            subtree_end: (1u32..).take(count).collect(),
            unit_nodes: (0u32..)
                .zip(&plan.nodes)
                .filter(|(_, node)| matches!(node.kind, NodeKind::Unit { .. }))
                .map(|(index, _)| index)
                .collect(),
            stage_nodes: Vec::new(),
            units: Tally::default(),
            allowed_failures: 0,
            busy_leaves: 0,
            asked: 0,
            live: vec![Live::default(); count],
            live_units: 0,
            ended: 0,
            shifts: (0u32..)
                .zip(&plan.nodes)
                .filter(|(_, node)| {
                    matches!(
                        node.kind,
                        NodeKind::Traffic(TrafficAction::Set { .. } | TrafficAction::Share { .. })
                    )
                })
                .map(|(index, _)| index)
                .collect(),
        };
        progress.ended = progress
            .nodes
            .iter()
            .map(|row| u32::from(row.is_ended()))
            .sum();
        progress.allowed_failures = plan
            .limits
            .max_failures
            .of(u32::try_from(progress.unit_nodes.len()).unwrap_or(u32::MAX));
        // Depth-first order: children stand behind their parents, so going backwards meets them first.
        for index in (0..count).rev() {
            let node = &plan.nodes[index];
            let state = if node.kind.is_leaf() {
                progress.nodes[index].leaf_state()
            } else {
                derive(&node.kind, &progress.nodes[index], &progress.tallies[index])
            };
            progress.states[index] = state;
            if node.kind.is_leaf() && state.is_busy() {
                progress.busy_leaves += 1;
            }
            if matches!(node.kind, NodeKind::Unit { .. }) {
                progress.units.add(state);
            }
            if let Some(parent) = node.parent {
                let parent = parent as usize;
                progress.tallies[parent].add(state);
                progress.subtree_end[parent] =
                    progress.subtree_end[parent].max(progress.subtree_end[index]);
            }
        }
        let of_level = |level: Level| {
            let nodes = (0u32..).zip(&plan.nodes);
            nodes
                .filter(move |(_, node)| node.level == level)
                .map(|(index, _)| index)
        };
        let ends = &progress.subtree_end;
        let holds =
            |outer: NodeIndex, inner: NodeIndex| (outer..ends[outer as usize]).contains(&inner);
        let mut stages: Vec<NodeIndex> = of_level(Level::Stage).collect();
        let applications: Vec<NodeIndex> = of_level(Level::Application)
            .filter(|node| {
                let mut stages = stages.iter();
                !stages.any(|stage| holds(*stage, *node) || holds(*node, *stage))
            })
            .collect();
        stages.extend(applications);
        progress.stage_nodes = stages;
        for index in (0u32..).take(count) {
            progress.refresh_live(plan, index);
        }
        progress
    }

    /// The progress of a plan from its rows as they are kept, under the ids of nodes.
    #[must_use]
    pub fn of_rows(
        plan: &Plan,
        control: Control,
        stalled: bool,
        rows: impl IntoIterator<Item = (NodeId, NodeProgress)>,
    ) -> Self {
        let indices = plan.indices();
        let rows = rows
            .into_iter()
            .filter_map(|(id, row)| Some((indices.of(id)?, row)));
        Self::load(plan, control, stalled, rows)
    }

    /// The same progress under another revision of the plan: what is kept of a node is found by its id.
    #[must_use]
    pub fn carried(&self, from: &Plan, to: &Plan) -> Self {
        let rows = (0u32..)
            .zip(&self.nodes)
            .map(|(index, row)| (from.id_of(index), row.clone()));
        Self::of_rows(to, self.control, self.stalled, rows)
    }

    /// The state of a node.
    #[must_use]
    pub fn state(&self, node: NodeIndex) -> NodeState {
        self.states[node as usize]
    }

    /// What is kept of a node.
    #[must_use]
    pub fn node(&self, node: NodeIndex) -> &NodeProgress {
        &self.nodes[node as usize]
    }

    /// The children of a node, in order.
    #[must_use]
    pub fn children(&self, node: NodeIndex) -> &[NodeIndex] {
        &self.branches[node as usize].list
    }

    /// How many children of a node are in each state.
    #[must_use]
    pub fn tally(&self, node: NodeIndex) -> &Tally {
        &self.tallies[node as usize]
    }

    /// Whether no leaf is under way, no server's admission outstanding, no stage being rolled back and no traffic changed.
    #[must_use]
    pub const fn is_quiet(&self) -> bool {
        self.busy_leaves == 0 && self.asked == 0
    }

    /// Whether a person changes traffic just now.
    pub(crate) fn edit_is_due(&self) -> bool {
        let edit = &self.node(0).edit;
        edit.as_ref()
            .is_some_and(|edit| edit.state == EditState::Due)
    }

    /// Recomputes a node's state after its row or its tally changed, and its ancestors' as far as that reaches.
    /// `changed` is told each node whose state changed, with the state before, from the bottom up.
    pub(crate) fn refresh(
        &mut self,
        plan: &Plan,
        node: NodeIndex,
        mut changed: impl FnMut(NodeIndex, NodeState),
    ) {
        let mut at = Some(node);
        while let Some(index) = at {
            let i = index as usize;
            let kind = &plan.nodes[i].kind;
            let state = if kind.is_leaf() {
                self.nodes[i].leaf_state()
            } else {
                derive(kind, &self.nodes[i], &self.tallies[i])
            };
            let before = std::mem::replace(&mut self.states[i], state);
            if index == node {
                self.refresh_live(plan, node);
            }
            if before == state {
                return;
            }
            changed(index, before);
            if matches!(kind, NodeKind::Unit { .. }) {
                self.units.remove(before);
                self.units.add(state);
            }
            if kind.is_leaf() {
                self.busy_leaves =
                    self.busy_leaves + u32::from(state.is_busy()) - u32::from(before.is_busy());
            }
            at = plan.nodes[i].parent;
            if let Some(parent) = at {
                self.tallies[parent as usize].remove(before);
                self.tallies[parent as usize].add(state);
                // What was passed can come back: a tolerated failure is retried, an ended server gets its weight back.
                if before.is_settled() && !state.is_settled() {
                    let branch = &mut self.branches[parent as usize];
                    let position = branch.list.partition_point(|child| *child < index);
                    branch.cursor = branch.cursor.min(position);
                }
            }
        }
    }

    /// Brings what is counted of live nodes up to date after a row changed.
    fn refresh_live(&mut self, plan: &Plan, node: NodeIndex) {
        let kind = &plan.nodes[node as usize].kind;
        let is = if kind.is_leaf() {
            let state = self.states[node as usize];
            state.is_busy() || state == NodeState::AwaitingConfirmation
        } else {
            self.nodes[node as usize].is_waiting()
        };
        let was = std::mem::replace(&mut self.live[node as usize].own, is);
        if was == is {
            return;
        }
        if !kind.is_leaf() {
            self.asked = self.asked + u32::from(is) - u32::from(was);
        }
        let mut at = Some(node);
        let mut child_turned = false;
        while let Some(index) = at {
            let planned = &plan.nodes[index as usize];
            let live = &mut self.live[index as usize];
            if child_turned {
                live.children = live.children + u32::from(is) - u32::from(was);
            }
            let before = live.count;
            live.count = live.count + u32::from(is) - u32::from(was);
            child_turned = (before == 0) != (live.count == 0);
            if child_turned && matches!(planned.kind, NodeKind::Unit { .. }) {
                self.live_units = self.live_units + u32::from(is) - u32::from(was);
            }
            at = planned.parent;
        }
    }

    /// The outermost stage that a node is or belongs to; 0 where there is none.
    #[must_use]
    pub fn stage_of(&self, node: NodeIndex) -> NodeIndex {
        let around =
            |stage: &&NodeIndex| (**stage..self.subtree_end[**stage as usize]).contains(&node);
        self.stage_nodes.iter().find(around).copied().unwrap_or(0)
    }

    /// The stage that is being rolled back, where there is one.
    #[must_use]
    pub fn stage_in_rollback(&self) -> Option<NodeIndex> {
        let under_way = |stage: &&NodeIndex| {
            let rollback = &self.nodes[**stage as usize].rollback;
            rollback.as_ref().is_some_and(StageRollback::is_under_way)
        };
        self.stage_nodes.iter().find(under_way).copied()
    }

    /// Whether nothing is under way in a node; a stage's own rollback does not count.
    pub(crate) fn is_at_rest(&self, node: NodeIndex) -> bool {
        let live = &self.live[node as usize];
        live.count == u32::from(live.own)
    }

    /// Whether so many servers have failed, drifted or are unknown that no further one is started.
    pub(crate) const fn is_over_failures(&self) -> bool {
        self.units.troubled() > self.allowed_failures
    }

    /// Whether all that is left to happen by itself waits for the safety envelope: nothing is under way, and every server
    /// that was asked for is held. What holds them may be this order's own failed servers, so that it would never end.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.control == Control::Active
            && self.asked > 0
            && self.busy_leaves == 0
            && self.asked == self.held_units()
    }

    fn held_units(&self) -> u32 {
        let held = self
            .unit_nodes
            .iter()
            .filter(|unit| matches!(self.node(**unit).admission, Admission::Held(_)));
        u32::try_from(held.count()).unwrap_or(u32::MAX)
    }

    /// Why the first server that the envelope holds is held.
    #[must_use]
    pub fn first_held(&self) -> Option<(NodeIndex, &str)> {
        self.unit_nodes
            .iter()
            .find_map(|unit| match &self.node(*unit).admission {
                Admission::Held(reason) => Some((*unit, reason.as_str())),
                Admission::None | Admission::Asked | Admission::Admitted => None,
            })
    }

    /// Whether something has to finish within the plan's progress deadline: something is under way, or waits for the
    /// envelope. A person who takes time is no missing progress.
    #[must_use]
    pub fn owes_progress(&self) -> bool {
        match self.order_state() {
            OrderState::Running => true,
            OrderState::Blocked => !self.stalled && self.is_held(),
            OrderState::NotStarted
            | OrderState::Initialising
            | OrderState::Drifted
            | OrderState::Unknown
            | OrderState::AwaitingConfirmation
            | OrderState::Cancelling
            | OrderState::Succeeded
            | OrderState::Failed
            | OrderState::Cancelled
            | OrderState::RollingBack
            | OrderState::RolledBack => false,
        }
    }

    /// Whether something waits for a person: a gate, or a judge that holds.
    fn is_awaited(&self) -> bool {
        self.live
            .first()
            .is_some_and(|root| root.count > self.busy_leaves + self.asked)
    }

    /// The order's state: from the control flow, and while it is active from the root.
    #[must_use]
    pub fn order_state(&self) -> OrderState {
        match self.control {
            Control::NotStarted => OrderState::NotStarted,
            Control::Initialising => OrderState::Initialising,
            Control::Cancelling => OrderState::Cancelling,
            Control::EndingForRollback | Control::RollingBack => OrderState::RollingBack,
            Control::Ended(Ending::Succeeded) => OrderState::Succeeded,
            Control::Ended(Ending::Failed) => OrderState::Failed,
            Control::Ended(Ending::Cancelled) => OrderState::Cancelled,
            Control::Ended(Ending::RolledBack) => OrderState::RolledBack,
            Control::Active => match self.states.first().copied().unwrap_or_default() {
                NodeState::Failed | NodeState::Locked => OrderState::Blocked,
                NodeState::Drifted => OrderState::Drifted,
                NodeState::Unknown => OrderState::Unknown,
                NodeState::AwaitingConfirmation => OrderState::AwaitingConfirmation,
                NodeState::Running | NodeState::NotStarted if self.stalled => OrderState::Blocked,
                // The strategy tolerates more failures than the order does.
                NodeState::Running | NodeState::NotStarted | NodeState::Succeeded
                    if self.is_quiet() && self.is_over_failures() =>
                {
                    OrderState::Blocked
                }
                NodeState::Running if self.is_held() && self.is_awaited() => {
                    OrderState::AwaitingConfirmation
                }
                NodeState::Running if self.is_held() => OrderState::Blocked,
                // Nothing is under way and no failure stops it: a group waits for being run. (Locks, drift and what is
                // unknown show in the root's own state.)
                NodeState::Running | NodeState::NotStarted if self.is_quiet() => {
                    OrderState::AwaitingConfirmation
                }
                NodeState::NotStarted
                | NodeState::Running
                | NodeState::Cancelling
                | NodeState::Cancelled
                | NodeState::Ignored
                | NodeState::Succeeded => OrderState::Running,
            },
        }
    }

    /// Servers by state.
    #[must_use]
    pub fn counts(&self, plan: &Plan) -> Counts {
        let of = |state| self.units.of(state);
        let mut waiting = of(NodeState::NotStarted) + of(NodeState::Locked);
        let mut running = self.units.active();
        let mut never = 0;
        if matches!(self.control, Control::Ended(_)) {
            // Beside a tolerated failure an order can be over before all servers were reached.
            never = std::mem::take(&mut waiting) + std::mem::take(&mut running);
        } else if waiting > 0 && self.ended > 0 {
            never = self.never_reached(plan);
            waiting -= never;
        }
        let broken = self.ended_after_failing();
        Counts {
            waiting,
            running,
            succeeded: of(NodeState::Succeeded),
            failed: self.units.troubled() + broken,
            ignored: of(NodeState::Ignored),
            cancelled: of(NodeState::Cancelled) + never - broken,
        }
    }

    /// Units that failed, drifted or are unknown, and were ended with that: an order that rolls back does not hide what broke.
    fn ended_after_failing(&self) -> u32 {
        if self.units.of(NodeState::Cancelled) == 0 {
            return 0;
        }
        let broken = self
            .unit_nodes
            .iter()
            .filter(|unit| self.ended_broken(**unit));
        u32::try_from(broken.count()).unwrap_or(u32::MAX)
    }

    /// Units that wait in something that was ended: they are never reached any more, and have no row that says so.
    fn never_reached(&self, plan: &Plan) -> u32 {
        let never = self.unit_nodes.iter().filter(|unit| {
            matches!(
                self.state(**unit),
                NodeState::NotStarted | NodeState::Locked
            ) && self.first_ended(plan, **unit).is_some()
        });
        u32::try_from(never.count()).unwrap_or(u32::MAX)
    }

    /// The outermost node around `node`, itself included, that is marked to be ended or a stage that is rolled back.
    pub(crate) fn first_ended(&self, plan: &Plan, node: NodeIndex) -> Option<NodeIndex> {
        let mut first = None;
        let mut at = Some(node);
        while let Some(index) = at {
            if self.node(index).is_ended() {
                first = Some(index);
            }
            at = plan.nodes[index as usize].parent;
        }
        first
    }
}
