//! Flows: which steps a server's turn has, in which order.
//!
//! A release has a fixed flow, and each operation its own; a process template replaces it. A flow says nothing about what
//! the steps are: those come from the tech stack, or from the manifest that is installed.
//! Source: spec "Release orders", "Per server"; "Application operations"; "Process templates".

use serde::{Deserialize, Serialize};

use crate::{
    operation::Operation,
    plan::ScriptStep,
    plugin::{Phase, RestoreWeight},
};

/// One part of a server's turn. JSON: `{"step": "phase", "phase": "configure"}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", tag = "step", deny_unknown_fields)]
pub enum FlowStep {
    /// Remember the weights, set 0, wait for connections to end. Nothing where the application has no pools.
    Drain,
    /// Download the package.
    Fetch,
    /// Unpack it into a release directory of its own.
    Unpack,
    /// The tech stack's steps of one phase.
    Phase {
        /// Which.
        phase: Phase,
    },
    /// Stop what is installed, by its own steps.
    StopInstalled,
    /// Make the new release the installed one.
    Activate,
    /// Start what is installed, by its own steps.
    StartInstalled,
    /// Check the health of what is installed, by its own steps.
    CheckInstalled,
    /// Give the weights back.
    Restore,
    /// Replace the directory with the archive's content. Only of an operation that brings static files.
    PlaceFiles,
    /// Run a script in the release's directory.
    Script(ScriptStep),
    /// Wait until a person confirms.
    Confirm {
        /// What to look at.
        message: String,
    },
}

/// The flow of a release.
#[must_use]
pub fn release() -> Vec<FlowStep> {
    let phase = |phase| FlowStep::Phase { phase };
    vec![
        FlowStep::Drain,
        FlowStep::Fetch,
        FlowStep::Unpack,
        phase(Phase::Prepare),
        phase(Phase::Install),
        phase(Phase::Configure),
        FlowStep::StopInstalled,
        FlowStep::Activate,
        phase(Phase::Deploy),
        phase(Phase::Start),
        phase(Phase::Check),
        FlowStep::Restore,
    ]
}

/// The flow of an operation.
#[must_use]
pub fn operation(operation: &Operation) -> Vec<FlowStep> {
    match operation {
        Operation::Restart => vec![
            FlowStep::Drain,
            FlowStep::StopInstalled,
            FlowStep::StartInstalled,
            FlowStep::CheckInstalled,
            FlowStep::Restore,
        ],
        Operation::Online { .. } => vec![
            FlowStep::StartInstalled,
            FlowStep::CheckInstalled,
            FlowStep::Restore,
        ],
        Operation::Offline => vec![FlowStep::Drain, FlowStep::StopInstalled],
        Operation::StaticFiles(_) => vec![FlowStep::PlaceFiles],
        Operation::Initialise => vec![
            FlowStep::Phase {
                phase: Phase::Prepare,
            },
            FlowStep::Phase {
                phase: Phase::Install,
            },
        ],
    }
}

/// The weight that a server gets at the end of an operation, whatever its strategy says; `None`: the strategy's. Where nothing on
/// the server was changed, it gets back what it had.
#[must_use]
pub const fn restore(operation: &Operation) -> Option<RestoreWeight> {
    match operation {
        Operation::Online { initial_weight } => Some(RestoreWeight::Override(*initial_weight)),
        Operation::Offline => Some(RestoreWeight::KeepZero),
        Operation::Restart | Operation::StaticFiles(_) | Operation::Initialise => None,
    }
}
