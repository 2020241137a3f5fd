//! Public commands.

use windlass_domain::plugin::{
    CommandOutcome, CommandRequest, CommandResult, CommandRun, RenderedCommand,
};

use crate::{
    bindings::public_command::exports::windlass::plugin::command as wit,
    convert::{environment_from_guest, json_from_guest, script_from_guest, server_to_guest},
    error::CallFailure,
};

pub(crate) fn request_to_guest(request: &CommandRequest) -> wit::RenderRequest {
    wit::RenderRequest {
        parameters: request.parameters.to_string(),
        target: server_to_guest(&request.target),
        attributes: Vec::new(),
    }
}

pub(crate) fn rendered_from_guest(
    command: wit::RenderedCommand,
) -> Result<RenderedCommand, CallFailure> {
    Ok(RenderedCommand {
        script: script_from_guest(command.script),
        run_as: command.run_as,
        env: environment_from_guest("env", command.env)?,
        timeout_ms: command.timeout_ms,
    })
}

pub(crate) fn run_to_guest(run: &CommandRun) -> wit::InterpretRequest {
    wit::InterpretRequest {
        parameters: run.parameters.to_string(),
        outcome: match run.outcome {
            CommandOutcome::Finished => "finished",
            CommandOutcome::TimedOut => "timed-out",
            CommandOutcome::Stopped => "stopped",
        }
        .to_owned(),
        exit_code: run.exit_code,
        output: run.output.clone(),
        dropped_bytes: run.dropped_bytes,
        attributes: Vec::new(),
    }
}

pub(crate) fn result_from_guest(result: wit::CommandResult) -> Result<CommandResult, CallFailure> {
    Ok(CommandResult {
        succeeded: result.succeeded,
        summary: result.summary,
        data: json_from_guest("data", &result.data)?,
    })
}
