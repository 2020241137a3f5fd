//! The reducer: what an event does to an order's progress, and which effects fall due.
//!
//! [`apply`] is deterministic and exhaustive: it looks at the plan, the progress and the event, and at nothing else. It
//! either refuses the event and leaves the progress untouched, or changes it and says what changed. Each call does a
//! bounded amount of work ([`TURN_BUDGET`]), so that its result fits one store transaction: at most [`MAX_ROWS`] rows
//! change. Where more could be done, [`Delta::more`] asks for an [`Event::Advance`]. That wish lasts until an `Advance`
//! has answered with `more: false` or the order has ended, whatever other events come between; after a restart each unfinished order gets one.
//!
//! **The outbox is the progress itself.** A leaf that is `running` *is* an effect that is due, as is a unit whose admission
//! is asked for, an order that initialises, or one that ends for a rollback. [`due`] lists them all; recovery performs that
//! list and nothing else. An effect is therefore performed at least once, and its answer names the attempt it is for:
//! answers to anything but the current attempt are refused as [`Refused::NotCurrent`].
//!
//! ```text
//! leaf:  not started ─► running ─► succeeded
//!            ▲             ├─► failed | unknown ── retry ──► (a new attempt)
//!            │             │         ├── ignore ──► ignored
//!            │             │         └── unknown: its result comes late ──► succeeded | failed
//!            │             └─ cancel ─► cancelling ─► cancelled | succeeded | unknown
//!            └─ gate: running is `awaiting confirmation`; a judge that holds waits likewise
//!        a shift in what was ended: ─► cancelling (the weights before it are set) ─► cancelled | failed
//! stage: ─ roll back ─► ending ─► due ─► running ─► done ─ run again ─► (as before it began) | go on ─► ignored
//!                          ▲               └─► failed ─ roll back ─┐
//!                          └───────────────────────────────────────┘
//! unit:  none ─► asked ─► (held) ─► admitted ─► its leaves, one after the other
//!                  └─► drifted ── retry ──► none
//! ```

mod actions;
mod answers;
mod ending;
mod naming;
mod refusals;
mod schedule;
mod stage;
#[cfg(test)]
mod tests;
mod traffic;
mod unit;
mod weights;

use std::collections::BTreeMap;

use crate::{
    id::OrderId,
    order::{Action, Control, Ending, OrderState},
    plan::{Level, NodeIndex, NodeKind, Plan},
    plugin::Judgement,
    progress::{
        Admission, Drift, EditState, NodeProgress, NodeState, PoolWeight, Progress, StageRollback,
    },
    task::TaskResult,
    text::{self, code},
    time::Timestamp,
};

pub use stage::no_way_back;
pub use traffic::{MAX_CELL_SHARE, MAX_WEIGHTS};
pub use unit::{takes_offline, takes_out, unit_state, unreached_servers};
pub use weights::weights_before;

/// How many nodes one call starts, ends or resets at most.
pub const TURN_BUDGET: usize = 12;

/// How many rows one call changes at most: an event's own (`2 * TURN_BUDGET` locks of an [`Event::Initialised`]; others have
/// at most `TURN_BUDGET + 1`), what is started or ended after it, and one node that is ended in two rows.
pub const MAX_ROWS: usize = LOCKS_PER_TURN + TURN_BUDGET + 2;

/// How many groups one [`Event::Initialised`] locks before it asks to be applied [`again`](Delta::again).
const LOCKS_PER_TURN: usize = 2 * TURN_BUDGET;

/// What a row says of each side of a drift, in bytes.
const MAX_DRIFT_BYTES: usize = 500;

/// Automatic attempts at a change of weights: it can be repeated without harm.
const TRAFFIC_ATTEMPTS: u32 = 3;

/// Something that happened, as the engine tells the reducer.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A person acts. [`Action::RollBack`] of an ended order is not the reducer's: it only makes a new order.
    Act(Action),
    /// Locks are taken. Groups in which a server is held by another order are locked, with the reason.
    Initialised {
        /// Node and reason.
        locked: Vec<(NodeIndex, String)>,
    },
    /// Initialisation found that the order cannot run.
    InitialisationFailed {
        /// Why: kept in the order's header.
        reason: String,
    },
    /// Nothing drifted and the envelope allows it: the unit may start.
    UnitAdmitted(NodeIndex),
    /// The envelope says: not now.
    UnitHeld(NodeIndex, String),
    /// What the unit was planned from has changed.
    UnitDrifted(NodeIndex, Vec<Drift>),
    /// A task ended.
    StepFinished {
        /// The step.
        node: NodeIndex,
        /// The attempt it is about.
        attempt: u32,
        /// How.
        result: Box<TaskResult>,
    },
    /// The weights before a drain. Kept before the first one is changed, so that a crash in between loses none.
    TrafficRemembered {
        /// The leaf.
        node: NodeIndex,
        /// The attempt.
        attempt: u32,
        /// The weights.
        weights: Vec<PoolWeight>,
    },
    /// The weights before a shift, in the order of [`NodeProgress::shifted`]. Kept before the first one is changed.
    ShiftRemembered {
        /// The leaf.
        node: NodeIndex,
        /// The attempt.
        attempt: u32,
        /// The weights.
        weights: Vec<u32>,
    },
    /// Weights were set and read back.
    TrafficDone {
        /// The leaf.
        node: NodeIndex,
        /// The attempt.
        attempt: u32,
    },
    /// Weights could not be set, or read back otherwise than set, or would break the envelope.
    TrafficFailed {
        /// The leaf.
        node: NodeIndex,
        /// The attempt.
        attempt: u32,
        /// Why.
        message: String,
        /// Whether another attempt could help.
        repeat: bool,
    },
    /// A pause is over.
    PauseElapsed {
        /// The leaf.
        node: NodeIndex,
        /// The attempt.
        attempt: u32,
    },
    /// The strategy judged.
    Judged {
        /// The leaf.
        node: NodeIndex,
        /// The attempt.
        attempt: u32,
        /// What it said, or why it could not.
        judgement: Result<Judgement, String>,
    },
    /// Nothing finished for longer than the plan allows.
    ProgressDeadline,
    /// The linked rollback order exists.
    RollbackStarted(OrderId),
    /// There is nothing to roll back to, or no plan for it could be made.
    RollbackImpossible(String),
    /// The linked rollback order has ended.
    RollbackEnded {
        /// How.
        ending: Ending,
    },
    /// The rollback of a stage went on: its order exists, it is done, or it failed.
    StageRollback {
        /// The stage.
        node: NodeIndex,
        /// Where it is now: `running`, `done` or `failed`.
        now: StageRollback,
    },
    /// Traffic was changed as a person asked, or not.
    TrafficChanged {
        /// Which change.
        number: u32,
        /// Why it was not made.
        error: Option<String>,
    },
    /// Go on with what can be done.
    Advance,
}

/// Something that falls due. Each is safe to perform again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Effect {
    /// Take locks, check servers; answer with `Initialised` or `InitialisationFailed`.
    Initialise,
    /// Check drift and the envelope of a unit.
    Admit(NodeIndex),
    /// The unit's server is available again (or was never touched).
    Release(NodeIndex),
    /// Have a task executed: the inbox row is written with the commit itself.
    Dispatch {
        /// The step.
        node: NodeIndex,
        /// The attempt.
        attempt: u32,
    },
    /// Have a task ended: the inbox row is changed with the commit itself.
    Revoke {
        /// The step.
        node: NodeIndex,
        /// The attempt.
        attempt: u32,
    },
    /// Change weights.
    Traffic {
        /// The leaf.
        node: NodeIndex,
        /// The attempt.
        attempt: u32,
    },
    /// Wait.
    Pause {
        /// The leaf.
        node: NodeIndex,
        /// The attempt.
        attempt: u32,
    },
    /// Ask the strategy.
    Judge {
        /// The leaf.
        node: NodeIndex,
        /// The attempt.
        attempt: u32,
    },
    /// Make the rollback order.
    StartRollback,
    /// Make the rollback order of a stage.
    RollBackStage(NodeIndex),
    /// Change traffic as a person asked.
    ChangeTraffic {
        /// Which change.
        number: u32,
    },
    /// Give locks back, tell the parent, take the order out of the list of unfinished ones.
    Finish,
}

/// What one event changed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Delta {
    /// Nodes whose rows changed.
    pub rows: Vec<NodeIndex>,
    /// Nodes whose states changed, from the root down, each with its new state.
    pub states: Vec<(NodeIndex, NodeState)>,
    /// Rows of steps that had succeeded and are run again, as they were: those attempts are to be kept.
    pub reset: Vec<(NodeIndex, NodeProgress)>,
    /// Effects that fell due.
    pub effects: Vec<Effect>,
    /// Whether an [`Event::Advance`] would do more.
    pub more: bool,
    /// Whether the same event should be applied again, at once and before any other: it covers more nodes than one call
    /// may change. Can be true of `Initialised`, and of the actions `confirm`, `retry`, `ignore` and `run again`.
    pub again: bool,
}

/// Why an event was refused. The progress is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The order is over.
    #[error("the order has ended; nothing more can be done to it")]
    Terminal,
    /// The answer is not about the current attempt of something under way.
    #[error("node {node} is not waiting for this answer")]
    NotCurrent {
        /// The node.
        node: NodeIndex,
    },
    /// There is no such node.
    #[error("the plan has no node {node}; it has nodes 0 to {last}")]
    NoSuchNode {
        /// As asked.
        node: NodeIndex,
        /// The last one.
        last: NodeIndex,
    },
    /// The order's control flow does not allow it now.
    #[error("`{action}` is not possible while the order is {}", code(state))]
    WrongState {
        /// What was asked.
        action: &'static str,
        /// The order's state.
        state: OrderState,
    },
    /// The node is of another level.
    #[error(
        "`{action}` does not apply to node {node}, whose level is {}: choose {choose}",
        code(level)
    )]
    WrongLevel {
        /// What was asked.
        action: &'static str,
        /// The node.
        node: NodeIndex,
        /// Its level.
        level: Level,
        /// What can be chosen.
        choose: &'static str,
    },
    /// Nothing in the node is in a state that the action is for.
    #[error("nothing in node {node} can be changed by `{action}`: it acts on what {on}")]
    Nothing {
        /// What was asked.
        action: &'static str,
        /// The node.
        node: NodeIndex,
        /// What it acts on.
        on: &'static str,
    },
    /// A stage is being rolled back.
    #[error(
        "the stage `{name}` is being rolled back: wait until its rollback order has ended, or end that order"
    )]
    StageRollsBack {
        /// The stage.
        node: NodeIndex,
        /// Its name.
        name: String,
    },
    /// A stage has begun after which there is no way back.
    #[error("the stage `{name}` has begun: from there on it cannot be rolled back")]
    NoWayBack {
        /// The stage.
        node: NodeIndex,
        /// Its name.
        name: String,
    },
    /// A person changes traffic already.
    #[error("the change of traffic number {number} is still being made: try again")]
    TrafficChanges {
        /// Which one.
        number: u32,
    },
    /// A server's weight is not this order's to change.
    #[error("the weight of {server} cannot be changed: {why}")]
    NotReleased {
        /// The server: its name, or its id where the order does not know it.
        server: String,
        /// Why.
        why: &'static str,
    },
    /// There is nothing to shift traffic to.
    #[error(
        "no traffic can be shifted to the cell {cell}: {} releases no server in it",
        stage.as_ref().map_or_else(|| "this order".to_owned(), |stage| format!("the stage `{stage}`, which is under way,"))
    )]
    NoSuchCell {
        /// The cell.
        cell: String,
        /// The stage that is under way, in an order that has some.
        stage: Option<String>,
    },
    /// A figure is out of its range.
    #[error("`{field}` is {found}: {min} to {max} are allowed")]
    OutOfRange {
        /// The field of the action.
        field: &'static str,
        /// As asked.
        found: u32,
        /// The least.
        min: u32,
        /// The most.
        max: u32,
    },
    /// Something before it is not done.
    #[error("node {node} cannot run before node {before} (`{name}`) is done")]
    NotReady {
        /// As asked.
        node: NodeIndex,
        /// What comes first.
        before: NodeIndex,
        /// Its name.
        name: String,
    },
}

/// Applies one event. `at` is the time it happened.
///
/// # Errors
/// [`Refused`]: the progress is unchanged.
pub fn apply(
    plan: &Plan,
    progress: &mut Progress,
    event: Event,
    at: Timestamp,
) -> Result<Delta, Refused> {
    let mut turn = Turn {
        plan,
        progress,
        delta: Delta::default(),
        before: BTreeMap::new(),
        at,
        budget: TURN_BUDGET,
    };
    turn.event(event)?;
    turn.settle();
    let Turn {
        progress,
        mut delta,
        before,
        ..
    } = turn;
    delta.rows.sort_unstable();
    delta.rows.dedup();
    delta.states = before
        .into_iter()
        .map(|(node, before)| (node, before, progress.state(node)))
        .filter(|(_, before, now)| before != now)
        .map(|(node, _, now)| (node, now))
        .collect();
    Ok(delta)
}

/// Every effect that is due: what recovery performs.
#[must_use]
pub fn due(plan: &Plan, progress: &Progress) -> Vec<Effect> {
    let mut effects = Vec::new();
    match progress.control {
        Control::NotStarted | Control::RollingBack => return effects,
        Control::Initialising => effects.push(Effect::Initialise),
        Control::Ended(_) => effects.push(Effect::Finish),
        Control::EndingForRollback if progress.is_quiet() => {
            // Due only when nothing is left to be ended: exactly what `Advance` finds out.
            let ahead = apply(
                plan,
                &mut progress.clone(),
                Event::Advance,
                Timestamp::from_unix_ms(0),
            );
            if ahead.is_ok_and(|delta| delta.effects.contains(&Effect::StartRollback)) {
                effects.push(Effect::StartRollback);
            }
        }
        Control::Active | Control::Cancelling | Control::EndingForRollback => {}
    }
    if let Some(edit) = &progress.node(0).edit
        && edit.state == EditState::Due
    {
        let number = edit.number;
        effects.push(Effect::ChangeTraffic { number });
    }
    for (node, planned) in (0u32..).zip(&plan.nodes) {
        let row = progress.node(node);
        if matches!(row.rollback, Some(StageRollback::Due { .. })) {
            effects.push(Effect::RollBackStage(node));
        }
        match row.admission {
            Admission::Asked | Admission::Held(_) => effects.push(Effect::Admit(node)),
            Admission::None if matches!(planned.kind, NodeKind::Unit { .. }) => {
                effects.push(Effect::Release(node))
            }
            Admission::Admitted if progress.state(node) == NodeState::Succeeded => {
                effects.push(Effect::Release(node))
            }
            Admission::None | Admission::Admitted => {}
        }
        if planned.kind.is_leaf() {
            effects.extend(effect_of(&planned.kind, node, row));
        }
    }
    effects
}

/// The effect that a leaf in its state stands for.
fn effect_of(kind: &NodeKind, node: NodeIndex, row: &NodeProgress) -> Option<Effect> {
    let attempt = row.attempt;
    match (kind, row.leaf_state()) {
        (NodeKind::Step { .. }, NodeState::Running) => Some(Effect::Dispatch { node, attempt }),
        (NodeKind::Step { .. }, NodeState::Cancelling) => Some(Effect::Revoke { node, attempt }),
        (NodeKind::Traffic(_), NodeState::Running | NodeState::Cancelling) => {
            Some(Effect::Traffic { node, attempt })
        }
        (NodeKind::Pause { .. }, NodeState::Running) => Some(Effect::Pause { node, attempt }),
        (NodeKind::Judge { .. }, NodeState::Running) => Some(Effect::Judge { node, attempt }),
        (
            NodeKind::Sequence
            | NodeKind::Parallel { .. }
            | NodeKind::Unit { .. }
            | NodeKind::Step { .. }
            | NodeKind::Traffic(_)
            | NodeKind::Gate { .. }
            | NodeKind::Pause { .. }
            | NodeKind::Judge { .. },
            _,
        ) => None,
    }
}

/// One call of [`apply`].
struct Turn<'a> {
    plan: &'a Plan,
    progress: &'a mut Progress,
    delta: Delta,
    /// The states that nodes had before, of those that changed.
    before: BTreeMap<NodeIndex, NodeState>,
    at: Timestamp,
    budget: usize,
}

/// The tree: every change of a row goes through [`Turn::change`], which keeps states, tallies and the delta together.
impl Turn<'_> {
    fn change(&mut self, node: NodeIndex, change: impl FnOnce(&mut NodeProgress)) {
        let row = &mut self.progress.nodes[node as usize];
        let was_ended = row.is_ended();
        change(row);
        // Whoever wrote it: a row has to fit.
        text::cut_message(&mut row.message);
        for drift in &mut row.drift {
            text::cut(&mut drift.before, MAX_DRIFT_BYTES);
            text::cut(&mut drift.after, MAX_DRIFT_BYTES);
        }
        self.progress.ended =
            self.progress.ended + u32::from(row.is_ended()) - u32::from(was_ended);
        self.delta.rows.push(node);
        let before = &mut self.before;
        self.progress.refresh(self.plan, node, |index, state| {
            before.entry(index).or_insert(state);
        });
    }

    /// One past the last node of the subtree.
    fn end_of(&self, node: NodeIndex) -> NodeIndex {
        self.progress.subtree_end[node as usize]
    }

    fn leaves_in(&self, node: NodeIndex, wanted: impl Fn(NodeState) -> bool) -> Vec<NodeIndex> {
        (node..self.end_of(node))
            .filter(|index| {
                self.plan.nodes[*index as usize].kind.is_leaf()
                    && wanted(self.progress.state(*index))
            })
            .collect()
    }

    /// Leaves that failed or are unknown, and units that drifted, in servers that nobody ignored.
    fn mendable_in(&self, node: NodeIndex) -> Vec<NodeIndex> {
        (node..self.end_of(node))
            .filter(|index| {
                let kind = &self.plan.nodes[*index as usize].kind;
                let own = kind.is_leaf()
                    || (matches!(kind, NodeKind::Unit { .. })
                        && !self.progress.node(*index).drift.is_empty());
                own && self.progress.state(*index).needs_mending() && !self.in_dead_end(*index)
            })
            .collect()
    }

    /// Whether a node or one around it was ignored or ended.
    fn in_dead_end(&self, node: NodeIndex) -> bool {
        let mut at = Some(node);
        while let Some(index) = at {
            let row = self.progress.node(index);
            if row.ignored || row.is_ended() {
                return true;
            }
            at = self.plan.nodes[index as usize].parent;
        }
        false
    }

    fn under_cancel(&self, node: NodeIndex) -> bool {
        let mut at = Some(node);
        while let Some(index) = at {
            if self.progress.node(index).is_ended() {
                return true;
            }
            at = self.plan.nodes[index as usize].parent;
        }
        false
    }

    /// Whether a node belongs to a server on which something runs that is of no application.
    fn is_server_work(&self, node: NodeIndex) -> bool {
        crate::dispatch::unit_of(self.plan, node).is_some_and(|(_, _, unit)| unit.part.is_none())
    }

    /// The unit that a node is or belongs to.
    fn unit_of(&self, node: NodeIndex) -> Option<NodeIndex> {
        let mut at = Some(node);
        while let Some(index) = at {
            if matches!(self.plan.nodes[index as usize].kind, NodeKind::Unit { .. }) {
                return Some(index);
            }
            at = self.plan.nodes[index as usize].parent;
        }
        None
    }
}
