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
//!            │             │         └── ignore ──► ignored
//!            │             └─ cancel ─► cancelling ─► cancelled | succeeded | unknown
//!            └─ gate: running is `awaiting confirmation`; a judge that holds waits likewise
//! unit:  none ─► asked ─► (held) ─► admitted ─► its leaves, one after the other
//!                  └─► drifted ── retry ──► none
//! ```

use std::collections::BTreeMap;

use crate::{
    id::OrderId,
    order::{Action, Control, Ending, OrderState},
    plan::{Level, NodeIndex, NodeKind, Plan, StepTemplate, TrafficAction},
    plugin::{Judgement, OnFailure, Phase, UnitState, Verdict},
    progress::{Admission, Drift, NodeProgress, NodeState, PoolWeight, Progress},
    task::{Outcome, TaskResult},
    time::Timestamp,
};

/// How many nodes one call starts, ends or resets at most.
pub const TURN_BUDGET: usize = 12;

/// How many rows one call changes at most: an event's own (see [`LOCKS_PER_TURN`]; others have at most
/// `TURN_BUDGET + 1`), what is started or ended after it, and one node that is ended in two rows.
pub const MAX_ROWS: usize = LOCKS_PER_TURN + TURN_BUDGET + 2;

/// How many groups one [`Event::Initialised`] locks before it asks to be applied [`again`](Delta::again).
const LOCKS_PER_TURN: usize = 2 * TURN_BUDGET;

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
    /// Effects that fell due.
    pub effects: Vec<Effect>,
    /// Whether an [`Event::Advance`] would do more.
    pub more: bool,
    /// Whether the same event should be applied again, at once and before any other: it covers more nodes than one call
    /// may change. Can be true of `Initialised`, and of the actions `confirm`, `retry` and `ignore`.
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
    #[error("`{action}` is not possible while the order is {state:?}")]
    WrongState {
        /// What was asked.
        action: &'static str,
        /// The order's state.
        state: OrderState,
    },
    /// The node is of another level.
    #[error("`{action}` does not apply to node {node}, which is a {level:?}: choose {choose}")]
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
    for (node, planned) in (0u32..).zip(&plan.nodes) {
        let row = progress.node(node);
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
    match (kind, row.state) {
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

/// How far a unit got: what a rollback is planned from.
#[must_use]
pub fn unit_state(plan: &Plan, progress: &Progress, unit: NodeIndex) -> UnitState {
    if progress.state(unit) == NodeState::Succeeded {
        return UnitState::Released;
    }
    let touched = progress
        .children(unit)
        .iter()
        .any(|leaf| is_disruptive(plan, *leaf) && progress.node(*leaf).attempt > 0);
    if touched {
        UnitState::Failed
    } else {
        UnitState::Untouched
    }
}

/// Whether a leaf, once started, changes what serves on the server.
fn is_disruptive(plan: &Plan, leaf: NodeIndex) -> bool {
    match &plan.nodes[leaf as usize].kind {
        NodeKind::Step { step } => match &plan.steps[*step as usize] {
            StepTemplate::Fetch | StepTemplate::Unpack => false,
            StepTemplate::Activate => true,
            StepTemplate::Stack(step) => match step.phase {
                Phase::Prepare | Phase::Install | Phase::Configure | Phase::Check => false,
                Phase::Stop | Phase::Deploy | Phase::Start | Phase::Restart | Phase::Uninstall => {
                    true
                }
            },
        },
        NodeKind::Sequence
        | NodeKind::Parallel { .. }
        | NodeKind::Unit { .. }
        | NodeKind::Traffic(_)
        | NodeKind::Gate { .. }
        | NodeKind::Pause { .. }
        | NodeKind::Judge { .. } => false,
    }
}

/// The restore leaf to run when a unit is ended that was drained but not changed: its weight would stay at 0 for nothing.
fn restore_of_untouched(plan: &Plan, progress: &Progress, unit: NodeIndex) -> Option<NodeIndex> {
    if unit_state(plan, progress, unit) != UnitState::Untouched {
        return None;
    }
    let drained = |leaf: &NodeIndex| {
        matches!(
            plan.nodes[*leaf as usize].kind,
            NodeKind::Traffic(TrafficAction::Drain { .. })
        ) && progress.node(*leaf).remembered.is_some()
    };
    let leaves = progress.children(unit);
    leaves.iter().any(drained).then(|| {
        leaves.iter().copied().find(|leaf| {
            matches!(
                plan.nodes[*leaf as usize].kind,
                NodeKind::Traffic(TrafficAction::Restore)
            ) && progress.state(*leaf) == NodeState::NotStarted
        })
    })?
}

/// Whether a server is as it was before its turn: nothing on it changed, and its weight was not taken or is back.
fn is_as_before(plan: &Plan, progress: &Progress, unit: NodeIndex) -> bool {
    let leaf_of = |wanted: fn(&TrafficAction) -> bool| {
        progress.children(unit).iter().copied().find(|leaf| {
            matches!(&plan.nodes[*leaf as usize].kind, NodeKind::Traffic(action) if wanted(action))
        })
    };
    let drain = leaf_of(|action| matches!(action, TrafficAction::Drain { .. }));
    let restore = leaf_of(|action| matches!(action, TrafficAction::Restore));
    let drained = drain.is_some_and(|leaf| progress.node(leaf).remembered.is_some());
    let restored = restore.is_none_or(|leaf| progress.state(leaf) == NodeState::Succeeded);
    unit_state(plan, progress, unit) == UnitState::Untouched && (!drained || restored)
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

impl Turn<'_> {
    fn event(&mut self, event: Event) -> Result<(), Refused> {
        if matches!(self.progress.control, Control::Ended(_)) {
            return Err(Refused::Terminal);
        }
        match event {
            Event::Act(action) => self.act(&action),
            Event::Initialised { locked } => {
                self.expect_control(Control::Initialising, "initialised")?;
                for (node, _) in &locked {
                    self.known(*node)?;
                }
                let mut wanted = locked
                    .into_iter()
                    .filter(|(node, reason)| {
                        self.progress.node(*node).locked.as_ref() != Some(reason)
                    })
                    .collect::<Vec<_>>();
                self.delta.again = wanted.len() > LOCKS_PER_TURN;
                wanted.truncate(LOCKS_PER_TURN);
                for (node, reason) in wanted {
                    self.change(node, |row| row.locked = Some(reason));
                }
                if !self.delta.again {
                    self.progress.control = Control::Active;
                    self.schedule_all();
                }
                Ok(())
            }
            Event::InitialisationFailed { .. } => {
                self.expect_control(Control::Initialising, "initialisation failed")?;
                self.progress.control = Control::NotStarted;
                Ok(())
            }
            Event::UnitAdmitted(node) => {
                self.asked(node)?;
                if self.under_cancel(node) {
                    self.cancel_in(node);
                } else if self.is_held_back(node) {
                    // It was asked for before the failure or the lock that now stands against it.
                    self.withdraw(node);
                    self.schedule_all();
                } else {
                    self.change(node, |row| {
                        row.admission = Admission::Admitted;
                        row.message.clear();
                    });
                    self.schedule_from(node);
                }
                Ok(())
            }
            Event::UnitHeld(node, reason) => {
                self.asked(node)?;
                if self.under_cancel(node) {
                    self.cancel_in(node);
                } else if self.is_held_back(node) {
                    self.withdraw(node);
                    self.schedule_all();
                } else {
                    self.change(node, |row| row.admission = Admission::Held(reason));
                }
                Ok(())
            }
            Event::UnitDrifted(node, drift) => {
                self.asked(node)?;
                if self.under_cancel(node) {
                    self.cancel_in(node);
                } else {
                    self.change(node, |row| {
                        row.admission = Admission::None;
                        row.drift = drift;
                    });
                    self.withdraw_held();
                    self.schedule_all();
                }
                Ok(())
            }
            Event::StepFinished {
                node,
                attempt,
                result,
            } => self.step_finished(node, attempt, *result),
            Event::TrafficRemembered {
                node,
                attempt,
                weights,
            } => {
                self.current(node, attempt, |kind| {
                    matches!(kind, NodeKind::Traffic(TrafficAction::Drain { .. }))
                })?;
                self.change(node, |row| {
                    row.remembered.get_or_insert(weights);
                });
                Ok(())
            }
            Event::TrafficDone { node, attempt } => {
                self.current(node, attempt, |kind| matches!(kind, NodeKind::Traffic(_)))?;
                self.end_leaf(node, NodeState::Succeeded, String::new());
                Ok(())
            }
            Event::TrafficFailed {
                node,
                attempt,
                message,
                repeat,
            } => {
                self.current(node, attempt, |kind| matches!(kind, NodeKind::Traffic(_)))?;
                let restore = matches!(
                    self.plan.nodes[node as usize].kind,
                    NodeKind::Traffic(TrafficAction::Restore)
                );
                let cancelling = self.progress.state(node) == NodeState::Cancelling
                    || (!restore && self.under_cancel(node));
                let stalled = self.progress.stalled && !restore;
                if repeat && !cancelling && !stalled && attempt % TRAFFIC_ATTEMPTS != 0 {
                    self.change(node, |row| row.message = message);
                    self.start(node);
                } else {
                    self.end_leaf(
                        node,
                        if cancelling {
                            NodeState::Cancelled
                        } else {
                            NodeState::Failed
                        },
                        message,
                    );
                }
                Ok(())
            }
            Event::PauseElapsed { node, attempt } => {
                self.current(node, attempt, |kind| matches!(kind, NodeKind::Pause { .. }))?;
                self.end_leaf(node, NodeState::Succeeded, String::new());
                Ok(())
            }
            Event::Judged {
                node,
                attempt,
                judgement,
            } => {
                self.current(node, attempt, |kind| matches!(kind, NodeKind::Judge { .. }))?;
                match judgement {
                    Ok(Judgement {
                        verdict: Verdict::GoOn,
                        reason,
                    }) => self.end_leaf(node, NodeState::Succeeded, reason),
                    Ok(Judgement {
                        verdict: Verdict::Hold,
                        reason,
                    }) => {
                        self.change(node, |row| {
                            row.state = NodeState::AwaitingConfirmation;
                            row.message = reason;
                        });
                    }
                    Ok(Judgement {
                        verdict: Verdict::RollBack,
                        reason,
                    }) => {
                        let at = self.at;
                        self.change(node, |row| {
                            row.state = NodeState::Failed;
                            row.finished_at = Some(at);
                            row.message = reason;
                        });
                        self.end_for_rollback();
                    }
                    Err(reason) => self.end_leaf(node, NodeState::Failed, reason),
                }
                Ok(())
            }
            Event::ProgressDeadline => {
                self.expect_control(Control::Active, "progress deadline")?;
                // A person who takes time is no missing progress.
                if self.progress.order_state() != OrderState::Running {
                    return Err(self.wrong_state("progress deadline"));
                }
                match self.plan.on_failure {
                    OnFailure::RollBack => self.end_for_rollback(),
                    OnFailure::Block => {
                        self.progress.stalled = true;
                        self.withdraw_held();
                    }
                }
                Ok(())
            }
            Event::RollbackStarted(_) => {
                self.expect_all_ended("rollback started")?;
                self.progress.control = Control::RollingBack;
                Ok(())
            }
            Event::RollbackImpossible(_) => {
                self.expect_all_ended("rollback impossible")?;
                self.end(Ending::Failed);
                Ok(())
            }
            Event::RollbackEnded { ending } => {
                self.expect_control(Control::RollingBack, "rollback ended")?;
                self.end(match ending {
                    Ending::Succeeded => Ending::RolledBack,
                    Ending::Failed | Ending::Cancelled | Ending::RolledBack => Ending::Failed,
                });
                Ok(())
            }
            Event::Advance => {
                self.sweep();
                self.withdraw_held();
                self.schedule_all();
                Ok(())
            }
        }
    }

    // ------------------------------------------------------------------------------------------ what people do

    fn act(&mut self, action: &Action) -> Result<(), Refused> {
        match action {
            Action::Run => match self.progress.control {
                Control::NotStarted => {
                    self.change(0, |row| row.opened = true);
                    self.initialise();
                    Ok(())
                }
                Control::Active => {
                    let opened = self.progress.node(0).opened;
                    if opened && !self.progress.stalled {
                        return Err(Refused::Nothing {
                            action: "run",
                            node: 0,
                            on: "is not running yet",
                        });
                    }
                    self.progress.stalled = false;
                    self.change(0, |row| row.opened = true);
                    self.schedule_all();
                    Ok(())
                }
                Control::Initialising
                | Control::Cancelling
                | Control::EndingForRollback
                | Control::RollingBack
                | Control::Ended(_) => Err(self.wrong_state("run")),
            },
            Action::RunNode { node } => self.run_node(*node),
            Action::Confirm { node } => {
                self.expect_active("confirm")?;
                let node = node.unwrap_or(0);
                self.known(node)?;
                let waiting =
                    self.leaves_in(node, |state| state == NodeState::AwaitingConfirmation);
                if waiting.is_empty() {
                    return Err(Refused::Nothing {
                        action: "confirm",
                        node,
                        on: "waits for confirmation",
                    });
                }
                let mut waiting = waiting;
                self.delta.again = waiting.len() > TURN_BUDGET;
                waiting.truncate(TURN_BUDGET);
                self.progress.stalled = false;
                for leaf in &waiting {
                    self.put(*leaf, NodeState::Succeeded, String::new());
                }
                // Nothing starts before all are confirmed: a gate that opens after this action is not confirmed by it.
                for leaf in waiting {
                    self.release_if_done(leaf);
                }
                if !self.delta.again {
                    self.schedule_all();
                }
                Ok(())
            }
            Action::Retry { node } => self.retry(*node),
            Action::Ignore { node } => self.ignore(*node),
            Action::Cancel { node } => self.cancel(*node),
            Action::Lock { node, reason } => {
                self.expect_lockable("lock", *node)?;
                let reason = if reason.is_empty() {
                    "locked by a person".to_owned()
                } else {
                    reason.clone()
                };
                self.change(*node, |row| row.locked = Some(reason));
                self.withdraw_held();
                Ok(())
            }
            Action::Unlock { node } => {
                self.expect_lockable("unlock", *node)?;
                if self.progress.node(*node).locked.is_none() {
                    return Err(Refused::Nothing {
                        action: "unlock",
                        node: *node,
                        on: "is locked",
                    });
                }
                self.change(*node, |row| row.locked = None);
                self.schedule_all();
                Ok(())
            }
            Action::RollBack { .. } => match self.progress.control {
                Control::Active => {
                    self.end_for_rollback();
                    Ok(())
                }
                Control::NotStarted
                | Control::Initialising
                | Control::Cancelling
                | Control::EndingForRollback
                | Control::RollingBack
                | Control::Ended(_) => Err(self.wrong_state("roll back")),
            },
        }
    }

    fn run_node(&mut self, node: NodeIndex) -> Result<(), Refused> {
        self.known(node)?;
        match self.progress.control {
            Control::NotStarted | Control::Active => {}
            Control::Initialising
            | Control::Cancelling
            | Control::EndingForRollback
            | Control::RollingBack
            | Control::Ended(_) => return Err(self.wrong_state("run")),
        }
        let level = self.plan.nodes[node as usize].level;
        if !matches!(level, Level::Group | Level::Application | Level::Server) {
            return Err(Refused::WrongLevel {
                action: "run",
                node,
                level,
                choose: "an application, group or server",
            });
        }
        if self.progress.state(node).is_settled()
            || self.progress.node(node).locked.is_some()
            || self.in_dead_end(node)
        {
            return Err(Refused::Nothing {
                action: "run",
                node,
                on: "is neither done, ended nor locked",
            });
        }
        // Groups, servers and applications that stand before it in a sequence come first. Gates, pauses and the like
        // between them belong to the way there and are run with it.
        let mut on_the_way = Vec::new();
        let mut opened_around = false;
        let mut at = node;
        loop {
            opened_around |= self.progress.node(at).opened;
            let Some(parent) = self.plan.nodes[at as usize].parent else {
                break;
            };
            if matches!(self.plan.nodes[parent as usize].kind, NodeKind::Sequence) {
                for before in self.progress.children(parent) {
                    if *before == at {
                        break;
                    }
                    if self.progress.state(*before).is_settled() {
                        continue;
                    }
                    let planned = &self.plan.nodes[*before as usize];
                    if !planned.kind.is_leaf() || on_the_way.len() == TURN_BUDGET {
                        return Err(Refused::NotReady {
                            node,
                            before: *before,
                            name: planned.name.clone(),
                        });
                    }
                    on_the_way.push(*before);
                }
            }
            at = parent;
        }
        if opened_around && self.progress.control == Control::Active && !self.progress.stalled {
            return Err(Refused::Nothing {
                action: "run",
                node,
                on: "was not run before",
            });
        }
        self.progress.stalled = false;
        for leaf in on_the_way {
            self.change(leaf, |row| row.opened = true);
        }
        self.change(node, |row| row.opened = true);
        if self.progress.control == Control::NotStarted {
            self.initialise();
        } else {
            self.schedule_all();
        }
        Ok(())
    }

    fn retry(&mut self, node: NodeIndex) -> Result<(), Refused> {
        self.expect_active("retry")?;
        self.known(node)?;
        let mut found = self.mendable_in(node);
        if found.is_empty() {
            return Err(Refused::Nothing {
                action: "retry",
                node,
                on: "failed, drifted or is unknown",
            });
        }
        self.delta.again = found.len() > self.budget;
        found.truncate(self.budget);
        for index in found {
            if self.plan.nodes[index as usize].kind.is_leaf() {
                self.change(index, |row| {
                    row.state = NodeState::NotStarted;
                    row.result = None;
                });
            } else {
                self.change(index, |row| row.drift.clear());
            }
        }
        self.progress.stalled = false;
        self.schedule_all();
        Ok(())
    }

    fn ignore(&mut self, node: NodeIndex) -> Result<(), Refused> {
        self.expect_active("ignore")?;
        self.known(node)?;
        let mut found = self.mendable_in(node);
        if found.is_empty() {
            return Err(Refused::Nothing {
                action: "ignore",
                node,
                on: "failed, drifted or is unknown",
            });
        }
        self.delta.again = found.len() > self.budget;
        found.truncate(self.budget);
        let step = self.plan.nodes[node as usize].kind.is_leaf();
        for index in found {
            let unit = self.unit_of(index);
            match unit {
                // On a step: the server goes on with its next step. Above: the server is left as it is.
                Some(unit) if !step => {
                    self.change(unit, |row| row.ignored = true);
                    self.leave_unit(unit);
                }
                // It does not go on by itself: what has failed has given up its place among those in flight.
                Some(_) | None => {
                    self.put(index, NodeState::Ignored, String::new());
                    self.release_if_done(index);
                }
            }
        }
        self.progress.stalled = false;
        self.schedule_all();
        Ok(())
    }

    fn cancel(&mut self, node: Option<NodeIndex>) -> Result<(), Refused> {
        let node = node.unwrap_or(0);
        self.known(node)?;
        if node == 0 {
            return match self.progress.control {
                Control::NotStarted => {
                    self.end(Ending::Cancelled);
                    Ok(())
                }
                Control::Initialising | Control::Active => {
                    self.progress.control = Control::Cancelling;
                    self.change(0, |row| row.cancel = true);
                    self.cancel_in(0);
                    Ok(())
                }
                Control::Cancelling
                | Control::EndingForRollback
                | Control::RollingBack
                | Control::Ended(_) => Err(self.wrong_state("cancel")),
            };
        }
        self.expect_active("cancel")?;
        let level = self.plan.nodes[node as usize].level;
        if !matches!(level, Level::Group | Level::Application | Level::Server) {
            return Err(Refused::WrongLevel {
                action: "cancel",
                node,
                level,
                choose: "the order, an application, group or server",
            });
        }
        if self.progress.state(node).is_settled() || self.progress.node(node).cancel {
            return Err(Refused::Nothing {
                action: "cancel",
                node,
                on: "is not done or ended already",
            });
        }
        self.change(node, |row| row.cancel = true);
        self.cancel_in(node);
        self.schedule_all();
        Ok(())
    }

    fn initialise(&mut self) {
        self.progress.control = Control::Initialising;
        self.delta.effects.push(Effect::Initialise);
    }

    fn end_for_rollback(&mut self) {
        if self.progress.control == Control::Active {
            self.progress.control = Control::EndingForRollback;
            self.change(0, |row| row.cancel = true);
            self.cancel_in(0);
        }
    }

    fn end(&mut self, ending: Ending) {
        self.progress.control = Control::Ended(ending);
        self.delta.effects.push(Effect::Finish);
    }

    // ------------------------------------------------------------------------------------------ answers to effects

    fn step_finished(
        &mut self,
        node: NodeIndex,
        attempt: u32,
        result: TaskResult,
    ) -> Result<(), Refused> {
        self.current(node, attempt, |kind| matches!(kind, NodeKind::Step { .. }))?;
        let cancelling = self.progress.state(node) == NodeState::Cancelling;
        let outcome = result.outcome;
        let message = result.message.clone();
        self.change(node, |row| row.result = Some(result));
        match outcome {
            Outcome::Succeeded => self.end_leaf(node, NodeState::Succeeded, message),
            Outcome::Unknown => self.end_leaf(node, NodeState::Unknown, message),
            Outcome::Failed | Outcome::TimedOut | Outcome::Refused | Outcome::Revoked
                if cancelling =>
            {
                self.end_leaf(node, NodeState::Cancelled, message);
            }
            Outcome::Failed | Outcome::TimedOut
                if self.may_repeat(node) && !self.under_cancel(node) && !self.progress.stalled =>
            {
                self.change(node, |row| row.message = message);
                self.start(node);
            }
            Outcome::Failed | Outcome::TimedOut | Outcome::Refused | Outcome::Revoked => {
                self.end_leaf(node, NodeState::Failed, message);
            }
        }
        Ok(())
    }

    /// Whether a step is attempted again by itself: only where its author said that repeating does no harm.
    fn may_repeat(&self, node: NodeIndex) -> bool {
        let NodeKind::Step { step } = &self.plan.nodes[node as usize].kind else {
            return false;
        };
        // Attempts that a person asked for count too: a retried step does not start its automatic attempts afresh.
        let attempt = self.progress.node(node).attempt;
        match &self.plan.steps[*step as usize] {
            StepTemplate::Fetch | StepTemplate::Unpack => attempt < 3,
            StepTemplate::Activate => false,
            StepTemplate::Stack(step) => step.repeatable && attempt <= step.retries,
        }
    }

    fn end_leaf(&mut self, node: NodeIndex, state: NodeState, message: String) {
        self.put(node, state, message);
        self.after_leaf(node);
    }

    /// A server whose last leaf has ended well is available again.
    fn release_if_done(&mut self, node: NodeIndex) {
        if let Some(unit) = self.unit_of(node)
            && self.progress.state(unit) == NodeState::Succeeded
        {
            self.delta.effects.push(Effect::Release(unit));
        }
    }

    fn put(&mut self, node: NodeIndex, state: NodeState, message: String) {
        let at = self.at;
        self.change(node, |row| {
            row.state = state;
            row.finished_at = Some(at);
            row.message = message;
        });
    }

    fn after_leaf(&mut self, node: NodeIndex) {
        if self.progress.state(node).needs_mending() {
            self.withdraw_held();
        }
        let Some(unit) = self.unit_of(node) else {
            return self.schedule_all();
        };
        if self.under_cancel(unit) {
            self.cancel_in(unit);
        } else if self.progress.node(unit).ignored {
            self.leave_unit(unit);
        } else if self.progress.state(unit) == NodeState::Running {
            // Still the same server's turn: nothing else in the tree is affected.
            return self.schedule_from(unit);
        }
        if self.progress.live[unit as usize].count == 0 {
            self.release_if_done(unit);
            // While the order as a whole is being ended, `settle` goes on.
            if self.progress.control == Control::Active {
                self.schedule_all();
            }
        }
    }

    // ------------------------------------------------------------------------------------------ scheduling

    fn schedule_from(&mut self, unit: NodeIndex) {
        match self.progress.control {
            Control::Active => {
                if self.under_cancel(unit) {
                    self.cancel_in(unit)
                } else {
                    self.visit(unit, true, false)
                }
            }
            Control::Cancelling | Control::EndingForRollback => self.cancel_in(unit),
            Control::NotStarted
            | Control::Initialising
            | Control::RollingBack
            | Control::Ended(_) => {}
        }
    }

    fn schedule_all(&mut self) {
        match self.progress.control {
            Control::Active => self.visit(0, false, self.progress.stalled),
            Control::Cancelling | Control::EndingForRollback => self.cancel_in(0),
            Control::NotStarted
            | Control::Initialising
            | Control::RollingBack
            | Control::Ended(_) => {}
        }
    }

    /// Starts what may start in a node. `opened`: a person asked to run it or something around it; `locked`: it is held.
    fn visit(&mut self, node: NodeIndex, opened: bool, locked: bool) {
        if self.budget == 0 {
            self.delta.more = true;
            return;
        }
        let plan = self.plan;
        let row = self.progress.node(node);
        if row.ignored {
            return;
        }
        if row.cancel {
            return self.cancel_in(node);
        }
        let opened = opened || row.opened;
        let locked = locked || row.locked.is_some();
        match &plan.nodes[node as usize].kind {
            NodeKind::Sequence => self.visit_sequence(node, opened, locked),
            NodeKind::Parallel {
                max_in_flight,
                max_failures,
            } => {
                self.visit_parallel(node, opened, locked, *max_in_flight, *max_failures);
            }
            NodeKind::Unit { .. } => match row.admission {
                // Its turn goes on when it has a place among those in flight: its own, or after a retry a free one.
                Admission::Admitted => {
                    if self.progress.live[node as usize].count > 0
                        || self.progress.live_units < self.max_units_in_flight()
                    {
                        self.visit_sequence(node, true, false);
                    }
                }
                Admission::Asked | Admission::Held(_) => {}
                Admission::None => {
                    if opened && !locked && row.drift.is_empty() && self.may_start_unit() {
                        self.budget -= 1;
                        self.change(node, |row| row.admission = Admission::Asked);
                        self.delta.effects.push(Effect::Admit(node));
                    }
                }
            },
            NodeKind::Step { .. }
            | NodeKind::Traffic(_)
            | NodeKind::Gate { .. }
            | NodeKind::Pause { .. }
            | NodeKind::Judge { .. } => {
                // A server's turn goes on; beside it nothing starts after too many failures, a shift of traffic least of all.
                let stopped = self.progress.is_over_failures() && self.unit_of(node).is_none();
                if opened
                    && !locked
                    && !stopped
                    && !self.progress.stalled
                    && self.progress.state(node) == NodeState::NotStarted
                {
                    self.start(node);
                }
            }
        }
    }

    fn visit_sequence(&mut self, node: NodeIndex, opened: bool, locked: bool) {
        loop {
            let children = &self.progress.branches[node as usize];
            let Some(child) = children.list.get(children.cursor).copied() else {
                return;
            };
            if !self.progress.state(child).is_settled() {
                self.visit(child, opened, locked);
                if !self.progress.state(child).is_settled() {
                    return;
                }
            }
            self.progress.branches[node as usize].cursor += 1;
        }
    }

    fn visit_parallel(
        &mut self,
        node: NodeIndex,
        opened: bool,
        locked: bool,
        max_in_flight: u32,
        max_failures: u32,
    ) {
        let count = self.progress.children(node).len();
        let mut prefix = true;
        for position in self.progress.branches[node as usize].cursor..count {
            let child = self.progress.branches[node as usize].list[position];
            let state = self.progress.state(child);
            if state.is_settled() {
                if prefix {
                    self.progress.branches[node as usize].cursor = position + 1;
                }
                continue;
            }
            prefix = false;
            if !self.progress.node(child).cancel {
                let unit = matches!(self.plan.nodes[child as usize].kind, NodeKind::Unit { .. });
                let live = self.progress.live[child as usize].count > 0;
                if unit && live {
                    // Its own answers drive it.
                    continue;
                }
                // More than allowed can be live: restores of servers that a person ended need no place.
                let others = self.progress.live[node as usize].children - u32::from(live);
                if max_in_flight > 0 && others >= max_in_flight {
                    continue;
                }
                if state == NodeState::NotStarted {
                    let failed = self.progress.tally(node).troubled();
                    if failed > max_failures || (unit && !self.may_start_unit()) {
                        continue;
                    }
                }
            }
            if self.budget == 0 {
                self.delta.more = true;
                return;
            }
            self.visit(child, opened, locked);
        }
    }

    /// Servers that may be worked on at once. A limit of 0 would never let an order end; it is taken for 1.
    fn max_units_in_flight(&self) -> u32 {
        self.plan.limits.max_in_flight.max(1)
    }

    /// Whether the order's own limits allow one more server to start.
    fn may_start_unit(&self) -> bool {
        self.progress.live_units < self.max_units_in_flight() && !self.progress.is_over_failures()
    }

    /// Whether a unit whose admission is outstanding would not be asked for now.
    fn is_held_back(&self, unit: NodeIndex) -> bool {
        if self.progress.stalled || self.progress.is_over_failures() {
            return true;
        }
        let mut at = Some(unit);
        while let Some(index) = at {
            if self.progress.node(index).locked.is_some() {
                return true;
            }
            at = self.plan.nodes[index as usize].parent;
        }
        self.plan.nodes[unit as usize].parent.is_some_and(|parent| {
            matches!(self.plan.nodes[parent as usize].kind, NodeKind::Parallel { max_failures, .. }
                if self.progress.tally(parent).troubled() > max_failures)
        })
    }

    /// Takes back what was asked for: the unit has not started.
    fn withdraw(&mut self, unit: NodeIndex) {
        self.budget = self.budget.saturating_sub(1);
        self.change(unit, |row| {
            row.admission = Admission::None;
            row.message.clear();
        });
        self.delta.effects.push(Effect::Release(unit));
    }

    /// Units that the envelope holds, and that would not be asked for any more, stop waiting: they would keep the order
    /// busy for ever, for the envelope may hold them just because of what failed. Those without an answer get one.
    fn withdraw_held(&mut self) {
        if self.progress.asked == 0 || self.progress.control != Control::Active {
            return;
        }
        for position in 0..self.progress.unit_nodes.len() {
            let unit = self.progress.unit_nodes[position];
            if matches!(self.progress.node(unit).admission, Admission::Held(_))
                && !self.under_cancel(unit)
                && self.is_held_back(unit)
            {
                if self.budget == 0 {
                    self.delta.more = true;
                    return;
                }
                self.withdraw(unit);
            }
        }
    }

    /// Starts a leaf: a new attempt.
    fn start(&mut self, node: NodeIndex) {
        self.budget = self.budget.saturating_sub(1);
        let at = self.at;
        let kind = &self.plan.nodes[node as usize].kind;
        let waits = matches!(kind, NodeKind::Gate { .. });
        self.change(node, |row| {
            row.state = if waits {
                NodeState::AwaitingConfirmation
            } else {
                NodeState::Running
            };
            row.attempt += 1;
            row.started_at = Some(at);
            row.finished_at = None;
        });
        self.delta
            .effects
            .extend(effect_of(kind, node, self.progress.node(node)));
    }

    /// Everything that was marked to be ended, wherever it stands: what an earlier turn had no budget for.
    fn sweep(&mut self) {
        let mut index = 0;
        while index < self.end_of(0) {
            if self.progress.node(index).cancel {
                self.cancel_in(index);
                index = self.end_of(index);
            } else {
                index += 1;
            }
        }
    }

    /// Ends what is under way in a node that is marked to be ended, as far as the budget goes.
    fn cancel_in(&mut self, node: NodeIndex) {
        let mut index = node;
        while index < self.end_of(node) {
            if self.budget == 0 {
                self.delta.more = true;
                return;
            }
            let state = self.progress.state(index);
            let row = self.progress.node(index);
            let live = self.progress.live[index as usize].count > 0;
            match &self.plan.nodes[index as usize].kind {
                NodeKind::Sequence | NodeKind::Parallel { .. } => {
                    if state == NodeState::NotStarted && !live {
                        index = self.end_of(index);
                        continue;
                    }
                    if !row.cancel && !state.is_settled() {
                        self.mark_cancelled(index);
                    }
                    index += 1;
                }
                NodeKind::Unit { .. } => {
                    let end = self.end_of(index);
                    if live {
                        // Its leaves first: what ends at once makes the way free for its restore.
                        for leaf in index + 1..end {
                            self.cancel_leaf(leaf);
                        }
                    }
                    self.cancel_unit(index);
                    index = end;
                }
                NodeKind::Step { .. }
                | NodeKind::Traffic(_)
                | NodeKind::Gate { .. }
                | NodeKind::Pause { .. }
                | NodeKind::Judge { .. } => {
                    self.cancel_leaf(index);
                    index += 1;
                }
            }
        }
    }

    fn cancel_leaf(&mut self, leaf: NodeIndex) {
        let state = self.progress.state(leaf);
        match &self.plan.nodes[leaf as usize].kind {
            NodeKind::Step { .. } => {
                if state == NodeState::Running {
                    self.budget = self.budget.saturating_sub(1);
                    self.change(leaf, |row| row.state = NodeState::Cancelling);
                    let attempt = self.progress.node(leaf).attempt;
                    self.delta.effects.push(Effect::Revoke {
                        node: leaf,
                        attempt,
                    });
                }
            }
            // A restore gives a healthy or untouched server its weight back: it ends by itself.
            NodeKind::Traffic(TrafficAction::Restore) => {}
            NodeKind::Traffic(TrafficAction::Drain { .. } | TrafficAction::Set { .. }) => {
                if state == NodeState::Running {
                    self.budget = self.budget.saturating_sub(1);
                    self.change(leaf, |row| row.state = NodeState::Cancelling);
                }
            }
            NodeKind::Gate { .. } | NodeKind::Pause { .. } | NodeKind::Judge { .. } => {
                if matches!(state, NodeState::Running | NodeState::AwaitingConfirmation) {
                    self.budget = self.budget.saturating_sub(1);
                    let at = self.at;
                    self.change(leaf, |row| {
                        row.state = NodeState::Cancelled;
                        row.finished_at = Some(at);
                    });
                }
            }
            NodeKind::Sequence | NodeKind::Parallel { .. } | NodeKind::Unit { .. } => {}
        }
    }

    /// Ends one server's turn. One that was drained but not changed gets its weight back first.
    fn cancel_unit(&mut self, unit: NodeIndex) {
        let row = self.progress.node(unit);
        let marked = row.cancel;
        if row.ignored || self.progress.state(unit) == NodeState::Succeeded {
            return;
        }
        match row.admission {
            Admission::None => {
                if !row.drift.is_empty() && !marked {
                    self.mark_cancelled(unit);
                }
            }
            Admission::Asked | Admission::Held(_) => {
                self.withdraw(unit);
                if !marked {
                    self.change(unit, |row| row.cancel = true);
                }
            }
            Admission::Admitted => {
                self.leave_unit(unit);
                if !marked {
                    self.mark_cancelled(unit);
                }
            }
        }
    }

    /// Leaves a server whose turn a person ended: it gets its weight back if nothing on it changed, and is available
    /// again when it is as it was.
    fn leave_unit(&mut self, unit: NodeIndex) {
        let tally = self.progress.tally(unit);
        let busy = tally.of(NodeState::Running) + tally.of(NodeState::Cancelling) > 0;
        if busy || self.progress.node(unit).admission != Admission::Admitted {
            return;
        }
        if let Some(restore) = restore_of_untouched(self.plan, self.progress, unit) {
            self.start(restore);
        } else if is_as_before(self.plan, self.progress, unit) {
            self.withdraw(unit);
        }
    }

    fn mark_cancelled(&mut self, node: NodeIndex) {
        self.budget = self.budget.saturating_sub(1);
        self.change(node, |row| row.cancel = true);
    }

    /// After every event: whether the order as a whole is over, or has to be rolled back.
    fn settle(&mut self) {
        match self.progress.control {
            Control::Active => {
                if self.progress.state(0).is_settled() {
                    self.sweep();
                    let root = self.progress.state(0);
                    if self.delta.more || !self.progress.is_quiet() || !root.is_settled() {
                        return;
                    }
                    // A strategy can tolerate more failures than the order does: then it is not over.
                    if self.progress.is_over_failures() {
                        if self.plan.on_failure == OnFailure::RollBack {
                            self.end_for_rollback();
                            self.settle();
                        }
                        return;
                    }
                    let failed = self.has_trouble();
                    self.end(match root {
                        NodeState::Cancelled if failed => Ending::Failed,
                        NodeState::Cancelled => Ending::Cancelled,
                        NodeState::NotStarted
                        | NodeState::Running
                        | NodeState::AwaitingConfirmation
                        | NodeState::Locked
                        | NodeState::Drifted
                        | NodeState::Unknown
                        | NodeState::Failed
                        | NodeState::Cancelling
                        | NodeState::Ignored
                        | NodeState::Succeeded => Ending::Succeeded,
                    });
                } else if self.plan.on_failure == OnFailure::RollBack
                    && !self.delta.more
                    && !self.delta.again
                    && self.progress.is_quiet()
                    && self.is_stopped_by_failure()
                {
                    self.end_for_rollback();
                    self.settle();
                }
            }
            Control::Cancelling | Control::EndingForRollback => {
                if !self.progress.is_quiet() {
                    return;
                }
                self.cancel_in(0);
                if self.delta.more || !self.progress.is_quiet() {
                    return;
                }
                if self.progress.control == Control::EndingForRollback {
                    self.delta.effects.push(Effect::StartRollback);
                } else {
                    let failed = self.has_trouble();
                    self.end(if failed {
                        Ending::Failed
                    } else {
                        Ending::Cancelled
                    });
                }
            }
            Control::NotStarted
            | Control::Initialising
            | Control::RollingBack
            | Control::Ended(_) => {}
        }
    }

    /// Whether something failed, drifted or is unknown, wherever it stands.
    fn has_trouble(&self) -> bool {
        self.progress
            .states
            .iter()
            .any(|state| state.needs_mending())
    }

    /// Whether it is a failure that stops an order in which nothing is under way: not a tolerated one, not a lock. What
    /// drifted or is unknown is for a person to decide.
    fn is_stopped_by_failure(&self) -> bool {
        match self.progress.state(0) {
            NodeState::Failed => true,
            NodeState::Running | NodeState::AwaitingConfirmation | NodeState::Locked => {
                self.progress.is_over_failures()
            }
            NodeState::NotStarted
            | NodeState::Drifted
            | NodeState::Unknown
            | NodeState::Cancelling
            | NodeState::Cancelled
            | NodeState::Ignored
            | NodeState::Succeeded => false,
        }
    }

    // ------------------------------------------------------------------------------------------ the tree

    fn change(&mut self, node: NodeIndex, change: impl FnOnce(&mut NodeProgress)) {
        change(&mut self.progress.nodes[node as usize]);
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
            if row.ignored || row.cancel {
                return true;
            }
            at = self.plan.nodes[index as usize].parent;
        }
        false
    }

    fn under_cancel(&self, node: NodeIndex) -> bool {
        let mut at = Some(node);
        while let Some(index) = at {
            if self.progress.node(index).cancel {
                return true;
            }
            at = self.plan.nodes[index as usize].parent;
        }
        false
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

    // ------------------------------------------------------------------------------------------ refusals

    fn known(&self, node: NodeIndex) -> Result<(), Refused> {
        if (node as usize) < self.plan.nodes.len() {
            Ok(())
        } else {
            let last = u32::try_from(self.plan.nodes.len().saturating_sub(1)).unwrap_or(u32::MAX);
            Err(Refused::NoSuchNode { node, last })
        }
    }

    fn current(
        &self,
        node: NodeIndex,
        attempt: u32,
        is: impl Fn(&NodeKind) -> bool,
    ) -> Result<(), Refused> {
        self.known(node)?;
        let current = is(&self.plan.nodes[node as usize].kind)
            && self.progress.state(node).is_busy()
            && self.progress.node(node).attempt == attempt;
        if current {
            Ok(())
        } else {
            Err(Refused::NotCurrent { node })
        }
    }

    fn asked(&self, node: NodeIndex) -> Result<(), Refused> {
        self.known(node)?;
        match self.progress.node(node).admission {
            Admission::Asked | Admission::Held(_) => Ok(()),
            Admission::None | Admission::Admitted => Err(Refused::NotCurrent { node }),
        }
    }

    fn wrong_state(&self, action: &'static str) -> Refused {
        Refused::WrongState {
            action,
            state: self.progress.order_state(),
        }
    }

    fn expect_control(&self, control: Control, action: &'static str) -> Result<(), Refused> {
        if self.progress.control == control {
            Ok(())
        } else {
            Err(self.wrong_state(action))
        }
    }

    /// The answer to [`Effect::StartRollback`]: due when nothing is under way any more.
    fn expect_all_ended(&self, action: &'static str) -> Result<(), Refused> {
        self.expect_control(Control::EndingForRollback, action)?;
        if self.progress.is_quiet() {
            Ok(())
        } else {
            Err(self.wrong_state(action))
        }
    }

    fn expect_active(&self, action: &'static str) -> Result<(), Refused> {
        self.expect_control(Control::Active, action)
    }

    fn expect_lockable(&self, action: &'static str, node: NodeIndex) -> Result<(), Refused> {
        self.known(node)?;
        match self.progress.control {
            Control::NotStarted | Control::Active => {}
            Control::Initialising
            | Control::Cancelling
            | Control::EndingForRollback
            | Control::RollingBack
            | Control::Ended(_) => return Err(self.wrong_state(action)),
        }
        let level = self.plan.nodes[node as usize].level;
        if !matches!(level, Level::Group | Level::Application) {
            return Err(Refused::WrongLevel {
                action,
                node,
                level,
                choose: "a group or an application",
            });
        }
        if self.progress.state(node).is_settled() {
            return Err(Refused::Nothing {
                action,
                node,
                on: "is not done yet",
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
