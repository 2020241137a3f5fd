//! Ids and indices of nodes: the reducer speaks of indices in the plan that it is given, everybody outside of ids, which hold
//! over revisions of a plan. Here one is turned into the other.

use crate::{
    order::Action,
    plan::{NodeId, NodeIndex},
};

use super::{Effect, Event, Refused};

impl Event {
    /// The same event with each node named otherwise.
    ///
    /// # Errors
    /// The first node that has no other name.
    pub fn with_nodes(self, name: impl Fn(u32) -> Option<u32>) -> Result<Self, u32> {
        let named = |node: u32| name(node).ok_or(node);
        Ok(match self {
            Self::Act(action) => Self::Act(with_nodes(action, named)?),
            Self::Initialised { locked } => Self::Initialised {
                // A group that was deleted meanwhile needs no lock.
                locked: locked
                    .into_iter()
                    .filter_map(|(node, reason)| Some((name(node)?, reason)))
                    .collect(),
            },
            Self::UnitAdmitted(node) => Self::UnitAdmitted(named(node)?),
            Self::UnitHeld(node, reason) => Self::UnitHeld(named(node)?, reason),
            Self::UnitDrifted(node, drift) => Self::UnitDrifted(named(node)?, drift),
            Self::StepFinished {
                node,
                attempt,
                result,
            } => Self::StepFinished {
                node: named(node)?,
                attempt,
                result,
            },
            Self::TrafficRemembered {
                node,
                attempt,
                weights,
            } => Self::TrafficRemembered {
                node: named(node)?,
                attempt,
                weights,
            },
            Self::TrafficDone { node, attempt } => Self::TrafficDone {
                node: named(node)?,
                attempt,
            },
            Self::TrafficFailed {
                node,
                attempt,
                message,
                repeat,
            } => Self::TrafficFailed {
                node: named(node)?,
                attempt,
                message,
                repeat,
            },
            Self::PauseElapsed { node, attempt } => Self::PauseElapsed {
                node: named(node)?,
                attempt,
            },
            Self::Judged {
                node,
                attempt,
                judgement,
            } => Self::Judged {
                node: named(node)?,
                attempt,
                judgement,
            },
            Self::ShiftRemembered {
                node,
                attempt,
                weights,
            } => Self::ShiftRemembered {
                node: named(node)?,
                attempt,
                weights,
            },
            Self::StageRollback { node, now } => Self::StageRollback {
                node: named(node)?,
                now,
            },
            Self::InitialisationFailed { .. }
            | Self::TrafficChanged { .. }
            | Self::ProgressDeadline
            | Self::RollbackStarted(_)
            | Self::RollbackImpossible(_)
            | Self::RollbackEnded { .. }
            | Self::Advance => self,
        })
    }
}

fn with_nodes(action: Action, name: impl Fn(u32) -> Result<u32, u32>) -> Result<Action, u32> {
    Ok(match action {
        Action::RunNode { node } => Action::RunNode { node: name(node)? },
        Action::Confirm { node } => Action::Confirm {
            node: node.map(name).transpose()?,
        },
        Action::Retry { node } => Action::Retry { node: name(node)? },
        Action::Ignore { node } => Action::Ignore { node: name(node)? },
        Action::Cancel { node } => Action::Cancel {
            node: node.map(name).transpose()?,
        },
        Action::Lock { node, reason } => Action::Lock {
            node: name(node)?,
            reason,
        },
        Action::Unlock { node } => Action::Unlock { node: name(node)? },
        Action::RollBackStage { node, reason } => Action::RollBackStage {
            node: name(node)?,
            reason,
        },
        Action::RunAgain { node } => Action::RunAgain { node: name(node)? },
        Action::GoOn { node } => Action::GoOn { node: name(node)? },
        Action::Run
        | Action::RollBack { .. }
        | Action::SetWeights { .. }
        | Action::ShiftCell { .. } => action,
    })
}

impl Effect {
    /// The same effect with its node named otherwise.
    #[must_use]
    pub fn with_node(self, name: impl Fn(NodeIndex) -> NodeId) -> Self {
        match self {
            Self::Admit(node) => Self::Admit(name(node)),
            Self::Release(node) => Self::Release(name(node)),
            Self::Dispatch { node, attempt } => Self::Dispatch {
                node: name(node),
                attempt,
            },
            Self::Revoke { node, attempt } => Self::Revoke {
                node: name(node),
                attempt,
            },
            Self::Traffic { node, attempt } => Self::Traffic {
                node: name(node),
                attempt,
            },
            Self::Pause { node, attempt } => Self::Pause {
                node: name(node),
                attempt,
            },
            Self::Judge { node, attempt } => Self::Judge {
                node: name(node),
                attempt,
            },
            Self::RollBackStage(node) => Self::RollBackStage(name(node)),
            Self::Initialise | Self::ChangeTraffic { .. } | Self::StartRollback | Self::Finish => {
                self
            }
        }
    }
}

impl Refused {
    /// The same refusal with each node named otherwise.
    #[must_use]
    pub fn with_nodes(self, name: impl Fn(NodeIndex) -> NodeId) -> Self {
        match self {
            Self::NotCurrent { node } => Self::NotCurrent { node: name(node) },
            Self::WrongLevel {
                action,
                node,
                level,
                choose,
            } => Self::WrongLevel {
                action,
                node: name(node),
                level,
                choose,
            },
            Self::Nothing { action, node, on } => Self::Nothing {
                action,
                node: name(node),
                on,
            },
            Self::NotReady {
                node,
                before,
                name: text,
            } => Self::NotReady {
                node: name(node),
                before: name(before),
                name: text,
            },
            Self::StageRollsBack { node, name: text } => Self::StageRollsBack {
                node: name(node),
                name: text,
            },
            Self::NoWayBack { node, name: text } => Self::NoWayBack {
                node: name(node),
                name: text,
            },
            // Which nodes there are is not a matter of names.
            Self::NoSuchNode { .. }
            | Self::Terminal
            | Self::WrongState { .. }
            | Self::TrafficChanges { .. }
            | Self::NotReleased { .. }
            | Self::NoSuchCell { .. }
            | Self::OutOfRange { .. } => self,
        }
    }
}
