//! Invocations: a command that runs on servers, as people see it. Source: spec "Invocations".
//!
//! An invocation *is* an order of server work (`Purpose::Invocation`): nothing here is stored but its specification, and every state
//! below follows from the order's progress.
//!
//! ```text
//!  of a server:  pending ──► running ──► finished (the exit code tells success)
//!                   │           ├──────► failed   (there is no exit code: the error says why)
//!                   └───────────┴── stopping ──► stopped
//! ```

pub mod quota;

use serde::{Deserialize, Serialize};

use crate::{
    id::ServerId,
    manifest::PluginRef,
    plugin::CommandResult,
    progress::{NodeProgress, NodeState},
    task::{Fault, Outcome, TaskResult},
    time::Timestamp,
};

/// The shortest time-out, in seconds: a shorter one counts as this.
pub const MIN_TIMEOUT_S: u64 = 10;
/// The longest time-out, in seconds.
pub const MAX_TIMEOUT_S: u64 = 86_400;
/// Servers of one invocation.
pub const MAX_SERVERS: usize = 50;

/// What an invocation was made from; kept with its order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InvocationSpec {
    /// The public command, with the bytes that rendered it and will interpret its output.
    pub command: PluginRef,
    /// Its parameters. Secrets are references.
    pub parameters: serde_json::Value,
    /// OS user that was asked for; `None`: the command's choice.
    pub run_as: Option<String>,
    /// Time-out that was asked for, in seconds; `None`: the command's.
    pub timeout_s: Option<u64>,
    /// Servers at once.
    pub max_in_flight: u32,
    /// How long it waits for a server that is not connected, in seconds.
    pub delivery_timeout_s: u64,
}

/// Where an invocation is on one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Not started.
    Pending,
    /// Sent to its server, or running there.
    Running,
    /// Being ended by a person.
    Stopping,
    /// Ended by a person.
    Stopped,
    /// Ended by itself.
    Finished,
    /// Did not end by itself, or did not start.
    Failed,
}

/// Where an invocation is as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InvocationState {
    /// Nothing has started.
    Pending,
    /// Something runs, or has yet to.
    Running,
    /// Something is being stopped.
    Stopping,
    /// All stopped.
    Stopped,
    /// All failed, or failed and stopped.
    Failed,
    /// All finished, or finished and stopped.
    Finished,
    /// Some finished, some failed.
    PartialFailed,
}

impl InvocationState {
    /// Whether nothing more happens.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        match self {
            Self::Pending | Self::Running | Self::Stopping => false,
            Self::Stopped | Self::Failed | Self::Finished | Self::PartialFailed => true,
        }
    }
}

/// The whole's state from those of its servers: the first rule that fits.
#[must_use]
pub fn whole(states: &[RunState]) -> InvocationState {
    let any = |wanted: RunState| states.contains(&wanted);
    let all = |wanted: &[RunState]| states.iter().all(|state| wanted.contains(state));
    if any(RunState::Running) {
        InvocationState::Running
    } else if any(RunState::Stopping) {
        InvocationState::Stopping
    } else if all(&[RunState::Pending]) {
        InvocationState::Pending
    } else if any(RunState::Pending) {
        InvocationState::Running
    } else if all(&[RunState::Stopped]) {
        InvocationState::Stopped
    } else if all(&[RunState::Failed, RunState::Stopped]) {
        InvocationState::Failed
    } else if all(&[RunState::Finished, RunState::Stopped]) {
        InvocationState::Finished
    } else {
        InvocationState::PartialFailed
    }
}

/// Why a run failed, or did not do what it should.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RunError {
    /// Stable code.
    pub code: ErrorCode,
    /// What the code means.
    pub explanation: String,
    /// What happened here.
    pub message: String,
    /// What to do.
    pub mend: String,
}

/// Codes of failed runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum ErrorCode {
    /// The agent was not connected.
    ClientNotOnline,
    /// The agent did not report.
    ClientNotResponse,
    /// The agent is too old.
    ClientNeedUpgrade,
    /// It came to the agent too late.
    DeliveryTimeout,
    /// It ran too long.
    ExecutionTimeout,
    /// It could not be run.
    ExecutionException,
    /// It ended with another code than 0.
    ExitCodeNonzero,
    /// The machine or the agent restarted under it.
    InstanceRestarted,
    /// No such OS user.
    UserNotExists,
    /// No such working directory.
    DirectoryNotExists,
    /// No such interpreter.
    InterpreterMissing,
    /// It did what it should, and wrote more than is kept: beside [`RunState::Finished`] and exit code 0.
    OutputLimit,
}

impl ErrorCode {
    /// What it means, and what to do.
    #[must_use]
    pub const fn explained(self) -> (&'static str, &'static str) {
        match self {
            Self::ClientNotOnline => (
                "the server's agent was not connected to the platform in time",
                "start the agent, check that it reaches the platform, then invoke again",
            ),
            Self::ClientNotResponse => (
                "the agent took the command and did not report its end: whether it ran cannot be known",
                "look at the server, then invoke again if it did not run",
            ),
            Self::ClientNeedUpgrade => (
                "the agent is too old for commands",
                "upgrade the agent, then invoke again",
            ),
            Self::DeliveryTimeout => (
                "the command came to the agent after its time",
                "invoke again, with a longer `delivery_timeout_s` where the server is often away",
            ),
            Self::ExecutionTimeout => (
                "it ran longer than its time-out, and its process tree was killed",
                "give it a longer `timeout_s`, or less to do",
            ),
            Self::ExecutionException => (
                "the agent could not run it",
                "do what the message says, then invoke again",
            ),
            Self::ExitCodeNonzero => (
                "it ran and ended with another exit code than 0",
                "read its output",
            ),
            Self::InstanceRestarted => (
                "the server or its agent restarted while it ran, and its end was lost",
                "look at what it has done, then invoke again if that is right",
            ),
            Self::UserNotExists => (
                "there is no such OS user on the server",
                "create the user, or set another `run_as`",
            ),
            Self::DirectoryNotExists => (
                "its working directory is not there",
                "create the directory on the server, or choose another",
            ),
            Self::InterpreterMissing => (
                "the program that reads the script is not installed on the server",
                "install the interpreter on the server",
            ),
            Self::OutputLimit => (
                "it wrote more output than is kept of it, 24 KiB; its result is made from the head and the tail",
                "let it write less, or into a file on the server; whoever follows the output while it runs sees more",
            ),
        }
    }

    fn with(self, message: String) -> RunError {
        let (explanation, mend) = self.explained();
        RunError {
            code: self,
            explanation: explanation.to_owned(),
            message,
            mend: mend.to_owned(),
        }
    }
}

/// Where one server is, from the row of its step; `order_ended`: nothing more happens in the order.
#[must_use]
pub fn run_state(row: &NodeProgress, order_ended: bool) -> RunState {
    match row.state {
        NodeState::NotStarted if order_ended => RunState::Stopped,
        NodeState::NotStarted
        | NodeState::AwaitingConfirmation
        | NodeState::Locked
        | NodeState::Drifted => RunState::Pending,
        NodeState::Running => RunState::Running,
        NodeState::Cancelling => RunState::Stopping,
        NodeState::Cancelled | NodeState::Ignored => RunState::Stopped,
        NodeState::Succeeded => RunState::Finished,
        NodeState::Failed | NodeState::Unknown => match &row.result {
            Some(result) if result.outcome == Outcome::Failed && result.exit_code.is_some() => {
                RunState::Finished
            }
            Some(result) if result.outcome == Outcome::Revoked => RunState::Stopped,
            Some(_) | None => RunState::Failed,
        },
    }
}

/// Why a run did not do what it should, or that its output is not whole; `None`: neither, it has not ended, or was stopped.
#[must_use]
pub fn run_error(state: RunState, result: Option<&TaskResult>) -> Option<RunError> {
    match state {
        RunState::Pending | RunState::Running | RunState::Stopping | RunState::Stopped => None,
        RunState::Finished | RunState::Failed => {
            let result = result?;
            let code = code(result)?;
            let message = match code {
                ErrorCode::OutputLimit => format!(
                    "{} bytes of its output were left out, between the head and the tail that are kept",
                    result.dropped_bytes
                ),
                ErrorCode::ClientNotOnline
                | ErrorCode::ClientNotResponse
                | ErrorCode::ClientNeedUpgrade
                | ErrorCode::DeliveryTimeout
                | ErrorCode::ExecutionTimeout
                | ErrorCode::ExecutionException
                | ErrorCode::ExitCodeNonzero
                | ErrorCode::InstanceRestarted
                | ErrorCode::UserNotExists
                | ErrorCode::DirectoryNotExists
                | ErrorCode::InterpreterMissing => result.message.clone(),
            };
            Some(code.with(message))
        }
    }
}

/// The code of a task's end. Texts are for people: nothing is read out of them.
fn code(result: &TaskResult) -> Option<ErrorCode> {
    match result.outcome {
        Outcome::Succeeded => {
            return (result.dropped_bytes > 0).then_some(ErrorCode::OutputLimit);
        }
        Outcome::TimedOut => return Some(ErrorCode::ExecutionTimeout),
        Outcome::Failed if result.exit_code.is_some() => return Some(ErrorCode::ExitCodeNonzero),
        Outcome::Failed | Outcome::Revoked | Outcome::Refused | Outcome::Unknown => {}
    }
    Some(match (result.fault, result.outcome) {
        (Some(Fault::NotDelivered), _) => ErrorCode::ClientNotOnline,
        (Some(Fault::Expired), _) => ErrorCode::DeliveryTimeout,
        (Some(Fault::AgentTooOld), _) => ErrorCode::ClientNeedUpgrade,
        (Some(Fault::NotReported), _) => ErrorCode::ClientNotResponse,
        (Some(Fault::Restarted), _) => ErrorCode::InstanceRestarted,
        (Some(Fault::NoUser), _) => ErrorCode::UserNotExists,
        (Some(Fault::NoDirectory), _) => ErrorCode::DirectoryNotExists,
        (Some(Fault::NoInterpreter), _) => ErrorCode::InterpreterMissing,
        (None, Outcome::Unknown) => ErrorCode::ClientNotResponse,
        (Some(Fault::RunnerLost | Fault::Other) | None, _) => ErrorCode::ExecutionException,
    })
}

/// An invocation with what it came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Invocation {
    /// Its id: that of its order.
    pub id: crate::id::OrderId,
    /// The workspace.
    pub workspace: String,
    /// The public command.
    pub command: PluginRef,
    /// Its parameters; secrets are references.
    pub parameters: serde_json::Value,
    /// OS user that was asked for; absent: the command's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_as: Option<String>,
    /// Servers at once.
    pub max_in_flight: u32,
    /// The whole's state.
    pub state: InvocationState,
    /// How many servers are in which state.
    pub counts: RunCounts,
    /// Each server; in a list of invocations empty.
    pub servers: Vec<Run>,
    /// Who asked.
    pub created_by: String,
    /// When.
    pub created_at: Timestamp,
    /// When everything had ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
}

/// How many servers are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RunCounts {
    /// Not started.
    pub pending: u32,
    /// Running.
    pub running: u32,
    /// Being stopped.
    pub stopping: u32,
    /// Stopped.
    pub stopped: u32,
    /// Ended by themselves.
    pub finished: u32,
    /// Did not.
    pub failed: u32,
}

impl RunCounts {
    /// Counts.
    #[must_use]
    pub fn of(states: &[RunState]) -> Self {
        let mut counts = Self::default();
        for state in states {
            match state {
                RunState::Pending => counts.pending += 1,
                RunState::Running => counts.running += 1,
                RunState::Stopping => counts.stopping += 1,
                RunState::Stopped => counts.stopped += 1,
                RunState::Finished => counts.finished += 1,
                RunState::Failed => counts.failed += 1,
            }
        }
        counts
    }
}

/// One server of an invocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Run {
    /// The server.
    pub server: ServerId,
    /// Its name.
    pub server_name: String,
    /// Where it is.
    pub state: RunState,
    /// Time-out in milliseconds.
    pub timeout_ms: u64,
    /// OS user; absent: the agent's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_as: Option<String>,
    /// Exit code, where it ended by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Standard output and error, head and tail of 24 KiB, secrets masked.
    pub output: String,
    /// Bytes that were left out between head and tail.
    pub dropped_bytes: u64,
    /// Why it did not do what it should, or (`OutputLimit`, beside exit code 0) that its output is not whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<RunError>,
    /// What the command makes of the output, once it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Interpreted>,
    /// When the agent started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
}

/// What a command makes of the output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Interpreted {
    /// The structured result.
    Result(InterpretedResult),
    /// The plugin could not say: why.
    Failed {
        /// Plugin, version, and what was exceeded or said.
        message: String,
    },
}

/// The structured result of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct InterpretedResult {
    /// Whether it did what it should.
    pub succeeded: bool,
    /// One line for people.
    pub summary: String,
    /// The command's own data.
    pub data: serde_json::Value,
}

impl From<CommandResult> for InterpretedResult {
    fn from(result: CommandResult) -> Self {
        Self {
            succeeded: result.succeeded,
            summary: result.summary,
            data: result.data,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rule_that_fits_counts() {
        use RunState::{Failed, Finished, Pending, Running, Stopped, Stopping};
        for (states, expect) in [
            (vec![Pending, Pending], InvocationState::Pending),
            (vec![Running, Stopping, Failed], InvocationState::Running),
            (vec![Pending, Finished], InvocationState::Running),
            (vec![Stopping, Stopped, Finished], InvocationState::Stopping),
            (vec![Stopped, Stopped], InvocationState::Stopped),
            (vec![Failed, Failed], InvocationState::Failed),
            (vec![Failed, Stopped], InvocationState::Failed),
            (vec![Finished, Finished], InvocationState::Finished),
            (vec![Finished, Stopped], InvocationState::Finished),
            (vec![Finished, Failed], InvocationState::PartialFailed),
            (
                vec![Finished, Failed, Stopped],
                InvocationState::PartialFailed,
            ),
        ] {
            assert_eq!(whole(&states), expect, "{states:?}");
            let ended = !states
                .iter()
                .any(|state| matches!(state, Pending | Running | Stopping));
            assert_eq!(expect.is_terminal(), ended, "{states:?}");
            assert_eq!(
                RunCounts::of(&states).failed as usize,
                states.iter().filter(|s| **s == Failed).count()
            );
        }
    }

    fn row(
        state: NodeState,
        outcome: Outcome,
        exit_code: Option<i32>,
        fault: Option<Fault>,
    ) -> NodeProgress {
        NodeProgress {
            state,
            result: Some(TaskResult {
                outcome,
                exit_code,
                output: String::new(),
                dropped_bytes: 0,
                // Says nothing to programs.
                message: "UserNotExists: not delivered, and did not report".to_owned(),
                fault,
                started_at: None,
                finished_at: Timestamp::from_unix_ms(1),
            }),
            ..NodeProgress::default()
        }
    }

    #[test]
    fn each_end_has_its_state_and_code() {
        use NodeState::{Cancelled, Failed, Succeeded};
        let mut cut = row(Succeeded, Outcome::Succeeded, Some(0), None);
        if let Some(result) = &mut cut.result {
            result.dropped_bytes = 7;
        }
        let mut cut_and_failed = cut.clone();
        cut_and_failed.state = Failed;
        if let Some(result) = &mut cut_and_failed.result {
            (result.outcome, result.exit_code) = (Outcome::Failed, Some(1));
        }
        let failed = |outcome, fault| row(Failed, outcome, None, fault);
        let cases = [
            (
                row(Succeeded, Outcome::Succeeded, Some(0), None),
                RunState::Finished,
                None,
            ),
            (cut, RunState::Finished, Some(ErrorCode::OutputLimit)),
            (
                cut_and_failed,
                RunState::Finished,
                Some(ErrorCode::ExitCodeNonzero),
            ),
            (
                row(Failed, Outcome::Failed, Some(3), None),
                RunState::Finished,
                Some(ErrorCode::ExitCodeNonzero),
            ),
            (
                row(Cancelled, Outcome::Revoked, None, None),
                RunState::Stopped,
                None,
            ),
            (failed(Outcome::Revoked, None), RunState::Stopped, None),
        ];
        let failures = [
            (
                Outcome::Failed,
                Some(Fault::NoUser),
                ErrorCode::UserNotExists,
            ),
            (
                Outcome::Failed,
                Some(Fault::NoDirectory),
                ErrorCode::DirectoryNotExists,
            ),
            (
                Outcome::Failed,
                Some(Fault::NoInterpreter),
                ErrorCode::InterpreterMissing,
            ),
            (
                Outcome::Failed,
                Some(Fault::AgentTooOld),
                ErrorCode::ClientNeedUpgrade,
            ),
            (Outcome::Failed, None, ErrorCode::ExecutionException),
            (
                Outcome::Failed,
                Some(Fault::Other),
                ErrorCode::ExecutionException,
            ),
            (Outcome::TimedOut, None, ErrorCode::ExecutionTimeout),
            (
                Outcome::Refused,
                Some(Fault::NotDelivered),
                ErrorCode::ClientNotOnline,
            ),
            (
                Outcome::Refused,
                Some(Fault::Expired),
                ErrorCode::DeliveryTimeout,
            ),
            (Outcome::Refused, None, ErrorCode::ExecutionException),
            (
                Outcome::Unknown,
                Some(Fault::NotReported),
                ErrorCode::ClientNotResponse,
            ),
            (Outcome::Unknown, None, ErrorCode::ClientNotResponse),
            (
                Outcome::Unknown,
                Some(Fault::Restarted),
                ErrorCode::InstanceRestarted,
            ),
            (
                Outcome::Unknown,
                Some(Fault::RunnerLost),
                ErrorCode::ExecutionException,
            ),
        ]
        .map(|(outcome, fault, code)| (failed(outcome, fault), RunState::Failed, Some(code)));
        for (row, state, code) in cases.into_iter().chain(failures) {
            let found = run_state(&row, true);
            assert_eq!(found, state, "{row:?}");
            let error = run_error(found, row.result.as_ref());
            if let Some(error) = &error {
                assert!(!error.explanation.is_empty() && !error.mend.is_empty());
            }
            assert_eq!(error.map(|error| error.code), code, "{row:?}");
        }
        let waiting = NodeProgress::default();
        assert_eq!(run_state(&waiting, false), RunState::Pending);
        assert_eq!(
            run_state(&waiting, true),
            RunState::Stopped,
            "never started"
        );
    }

    #[test]
    fn a_reason_of_a_later_agent_is_read() {
        let fault: Fault = serde_json::from_str("\"eclipsed\"").unwrap();
        assert_eq!(fault, Fault::Other);
    }
}
