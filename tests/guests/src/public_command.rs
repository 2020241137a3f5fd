//! A public command: by default `true`; parameters choose what goes wrong, or (`run`) what runs.

use windlass_sdk::{
    Descriptor, PluginError, PublicCommand, Script, Value,
    command::{CommandResult, InterpretRequest, RenderRequest, RenderedCommand},
};

use crate::{
    behave::{behave, how},
    descriptor::{IsDiagnostic, describe},
};

/// The guest.
#[derive(Debug)]
pub struct Command;

impl PublicCommand for Command {
    fn describe() -> Descriptor {
        describe("test-command", IsDiagnostic::No)
    }

    fn render(request: RenderRequest) -> Result<RenderedCommand, PluginError> {
        behave(&how(&request.parameters));
        let run = serde_json::from_str::<serde_json::Value>(&request.parameters)
            .ok()
            .and_then(|parameters| Some(parameters["run"].as_str()?.to_owned()));
        Ok(match run {
            Some(run) => {
                RenderedCommand::new(Script::shell("eval \"$RUN\"")).env("RUN", Value::plain(run))
            }
            None => RenderedCommand::new(Script::shell("true")),
        })
    }

    fn interpret(request: InterpretRequest) -> Result<CommandResult, PluginError> {
        let how = how(&request.parameters);
        behave(&how);
        let mut result = CommandResult::new(true, "done", &serde_json::Value::Null);
        if how == "not-json" {
            result.data = "{".into();
        }
        Ok(result)
    }
}

windlass_sdk::public_command!(Command);
