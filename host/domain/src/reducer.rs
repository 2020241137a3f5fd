//! The reducer: what an event does to an order's progress, and which effects fall due.
//!
//! [`apply`] is deterministic and exhaustive: it looks at the plan, the progress and the event, and at nothing else. It
//! either refuses the event and leaves the progress untouched, or changes it and says what changed. Each call does a
//! bounded amount of work ([`TURN_BUDGET`] leaves), so that its result fits one store transaction; where more could be
//! done, [`Delta::more`] asks for an [`Event::Advance`].
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

/// How many leaves one call starts, ends or resets at most.
pub const TURN_BUDGET: usize = 12;

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
    InitialisationFailed,
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
    /// Whether the same action should be applied again: it covers more nodes than one call may change.
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
        Control::EndingForRollback
            if progress.is_quiet() && !cancelling_goes_on(plan, progress) =>
        {
            effects.push(Effect::StartRollback);
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

/// Whether ending still has something to start: a restore of an untouched server.
fn cancelling_goes_on(plan: &Plan, progress: &Progress) -> bool {
    (0u32..).zip(&plan.nodes).any(|(node, planned)| {
        matches!(planned.kind, NodeKind::Unit { .. })
            && !progress.state(node).is_settled()
            && restore_of_untouched(plan, progress, node).is_some()
    })
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
                for (node, reason) in locked {
                    self.change(node, |row| row.locked = Some(reason));
                }
                self.progress.control = Control::Active;
                Ok(())
            }
            Event::InitialisationFailed => {
                self.expect_control(Control::Initialising, "initialisation failed")?;
                self.progress.control = Control::NotStarted;
                Ok(())
            }
            Event::UnitAdmitted(node) => {
                self.asked(node)?;
                self.progress.asked -= 1;
                self.change(node, |row| {
                    row.admission = Admission::Admitted;
                    row.message.clear();
                });
                self.schedule_from(node);
                Ok(())
            }
            Event::UnitHeld(node, reason) => {
                self.asked(node)?;
                self.change(node, |row| row.admission = Admission::Held(reason));
                Ok(())
            }
            Event::UnitDrifted(node, drift) => {
                self.asked(node)?;
                self.progress.asked -= 1;
                self.change(node, |row| {
                    row.admission = Admission::None;
                    row.drift = drift;
                });
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
                let cancelling = self.progress.state(node) == NodeState::Cancelling;
                if repeat && !cancelling && attempt % TRAFFIC_ATTEMPTS != 0 {
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
                        self.end_for_rollback();
                        self.end_leaf(node, NodeState::Failed, reason);
                    }
                    Err(reason) => self.end_leaf(node, NodeState::Failed, reason),
                }
                Ok(())
            }
            Event::ProgressDeadline => {
                self.expect_control(Control::Active, "progress deadline")?;
                match self.plan.on_failure {
                    OnFailure::RollBack => self.end_for_rollback(),
                    OnFailure::Block => self.progress.stalled = true,
                }
                Ok(())
            }
            Event::RollbackStarted(_) => {
                self.expect_control(Control::EndingForRollback, "rollback started")?;
                self.progress.control = Control::RollingBack;
                Ok(())
            }
            Event::RollbackImpossible(_) => {
                self.expect_control(Control::EndingForRollback, "rollback impossible")?;
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
                for leaf in waiting {
                    self.end_leaf(leaf, NodeState::Succeeded, String::new());
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
        if self.progress.state(node) != NodeState::NotStarted {
            return Err(Refused::Nothing {
                action: "run",
                node,
                on: "has not started",
            });
        }
        // Everything that stands before it in a sequence comes first.
        let mut at = node;
        while let Some(parent) = self.plan.nodes[at as usize].parent {
            if matches!(self.plan.nodes[parent as usize].kind, NodeKind::Sequence) {
                let earlier = self
                    .progress
                    .children(parent)
                    .iter()
                    .take_while(|child| **child != at);
                if let Some(before) = earlier
                    .copied()
                    .find(|child| !self.progress.state(*child).is_settled())
                {
                    let name = self.plan.nodes[before as usize].name.clone();
                    return Err(Refused::NotReady { node, before, name });
                }
            }
            at = parent;
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
                Some(unit) if !step => self.change(unit, |row| row.ignored = true),
                Some(_) | None => self.end_leaf(index, NodeState::Ignored, String::new()),
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
            Outcome::Failed | Outcome::TimedOut if self.may_repeat(node) => {
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
        let at = self.at;
        self.change(node, |row| {
            row.state = state;
            row.finished_at = Some(at);
            row.message = message;
        });
        self.after_leaf(node);
    }

    fn after_leaf(&mut self, node: NodeIndex) {
        match self.unit_of(node) {
            Some(unit) if self.under_cancel(unit) => self.cancel_in(unit),
            // Still the same server's turn: nothing else in the tree is affected.
            Some(unit) if self.progress.state(unit) == NodeState::Running => {
                self.schedule_from(unit)
            }
            Some(unit) => {
                if self.progress.state(unit) == NodeState::Succeeded {
                    self.delta.effects.push(Effect::Release(unit));
                }
                self.schedule_all();
            }
            None => self.schedule_all(),
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
                Admission::Admitted => self.visit_sequence(node, true, false),
                Admission::Asked | Admission::Held(_) => {}
                Admission::None => {
                    if opened && !locked && row.drift.is_empty() && self.may_start_unit() {
                        self.budget -= 1;
                        self.progress.asked += 1;
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
                if opened
                    && !locked
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
        let active = |tally: &crate::progress::Tally| {
            tally.of(NodeState::Running)
                + tally.of(NodeState::Cancelling)
                + tally.of(NodeState::AwaitingConfirmation)
        };
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
            if state == NodeState::NotStarted {
                let tally = self.progress.tally(node);
                let failed = tally.of(NodeState::Failed)
                    + tally.of(NodeState::Unknown)
                    + tally.of(NodeState::Drifted);
                if failed > max_failures || (max_in_flight > 0 && active(tally) >= max_in_flight) {
                    continue;
                }
            }
            if self.budget == 0 {
                self.delta.more = true;
                return;
            }
            self.visit(child, opened, locked);
        }
    }

    /// Whether the order's own limits allow one more server to start.
    fn may_start_unit(&self) -> bool {
        let mut in_flight = 0u32;
        let mut failed = 0u32;
        for unit in &self.progress.unit_nodes {
            match self.progress.state(*unit) {
                NodeState::Running | NodeState::Cancelling | NodeState::AwaitingConfirmation => {
                    in_flight += 1
                }
                NodeState::Failed | NodeState::Unknown | NodeState::Drifted => failed += 1,
                NodeState::NotStarted
                | NodeState::Locked
                | NodeState::Cancelled
                | NodeState::Ignored
                | NodeState::Succeeded => {}
            }
        }
        let units = u32::try_from(self.progress.unit_nodes.len()).unwrap_or(u32::MAX);
        in_flight < self.plan.limits.max_in_flight
            && failed <= self.plan.limits.max_failures.of(units)
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

    /// Ends what is under way in a node that is marked to be ended, as far as the budget goes.
    fn cancel_in(&mut self, node: NodeIndex) {
        for index in node..self.end_of(node) {
            if self.budget == 0 {
                self.delta.more = true;
                return;
            }
            let state = self.progress.state(index);
            let row = self.progress.node(index);
            match &self.plan.nodes[index as usize].kind {
                NodeKind::Sequence | NodeKind::Parallel { .. } => {
                    if !row.cancel
                        && !row.ignored
                        && !state.is_settled()
                        && state != NodeState::NotStarted
                    {
                        self.mark_cancelled(index);
                    }
                }
                NodeKind::Unit { .. } => self.cancel_unit(index),
                NodeKind::Step { .. } => {
                    if state == NodeState::Running {
                        self.budget -= 1;
                        self.change(index, |row| row.state = NodeState::Cancelling);
                        let attempt = self.progress.node(index).attempt;
                        self.delta.effects.push(Effect::Revoke {
                            node: index,
                            attempt,
                        });
                    }
                }
                // A restore gives a healthy or untouched server its weight back: it ends by itself.
                NodeKind::Traffic(TrafficAction::Restore) => {}
                NodeKind::Traffic(TrafficAction::Drain { .. } | TrafficAction::Set { .. }) => {
                    if state == NodeState::Running {
                        self.budget -= 1;
                        self.change(index, |row| row.state = NodeState::Cancelling);
                    }
                }
                NodeKind::Gate { .. } | NodeKind::Pause { .. } | NodeKind::Judge { .. } => {
                    if matches!(state, NodeState::Running | NodeState::AwaitingConfirmation) {
                        self.budget -= 1;
                        let at = self.at;
                        self.change(index, |row| {
                            row.state = NodeState::Cancelled;
                            row.finished_at = Some(at);
                        });
                    }
                }
            }
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
                self.progress.asked -= 1;
                self.change(unit, |row| row.admission = Admission::None);
                self.mark_cancelled(unit);
                self.delta.effects.push(Effect::Release(unit));
            }
            Admission::Admitted => {
                let busy = self
                    .progress
                    .children(unit)
                    .iter()
                    .any(|leaf| self.progress.state(*leaf).is_busy());
                let untouched = unit_state(self.plan, self.progress, unit) == UnitState::Untouched;
                if !busy && let Some(restore) = restore_of_untouched(self.plan, self.progress, unit)
                {
                    self.start(restore);
                } else if !busy && untouched {
                    self.change(unit, |row| row.admission = Admission::None);
                    self.delta.effects.push(Effect::Release(unit));
                }
                if !marked {
                    self.mark_cancelled(unit);
                }
            }
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
                let root = self.progress.state(0);
                if root.is_settled() {
                    self.end(if root == NodeState::Cancelled {
                        Ending::Cancelled
                    } else {
                        Ending::Succeeded
                    });
                } else if self.plan.on_failure == OnFailure::RollBack
                    && !self.delta.more
                    && self.progress.is_quiet()
                    && self.progress.order_state() == OrderState::Blocked
                    && self.progress.states.contains(&NodeState::Failed)
                {
                    self.end_for_rollback();
                    self.cancel_in(0);
                    self.settle();
                }
            }
            Control::Cancelling | Control::EndingForRollback => {
                self.cancel_in(0);
                if self.delta.more || !self.progress.is_quiet() {
                    return;
                }
                if self.progress.control == Control::EndingForRollback {
                    self.delta.effects.push(Effect::StartRollback);
                } else {
                    let troubled = |state: &NodeState| state.needs_mending();
                    let failed = self.progress.states.iter().any(troubled);
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

    // ------------------------------------------------------------------------------------------ the tree

    fn change(&mut self, node: NodeIndex, change: impl FnOnce(&mut NodeProgress)) {
        change(&mut self.progress.nodes[node as usize]);
        self.delta.rows.push(node);
        let delta = &mut self.delta;
        self.progress.refresh(self.plan, node, |index, state| {
            delta.states.push((index, state))
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
