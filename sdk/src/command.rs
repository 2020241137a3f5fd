//! What a public command is asked and answers.

pub use crate::bindings::public_command::exports::windlass::plugin::command::{
    CommandResult, InterpretRequest, RenderRequest, RenderedCommand,
};
use crate::{Script, ServerFacts, Value};

impl RenderRequest {
    /// A request; for tests.
    #[must_use]
    pub fn new(parameters: &serde_json::Value, target: ServerFacts) -> Self {
        Self {
            parameters: parameters.to_string(),
            target,
            attributes: Vec::new(),
        }
    }
}

impl RenderedCommand {
    /// A command run as the agent's own user, with a time-out of 60 s.
    #[must_use]
    pub fn new(script: Script) -> Self {
        Self {
            script,
            run_as: None,
            env: Vec::new(),
            timeout_ms: 60_000,
            attributes: Vec::new(),
        }
    }

    /// One more environment variable: the way of parameters into the script.
    #[must_use]
    pub fn env(mut self, name: &str, value: Value) -> Self {
        self.env.push((name.into(), value));
        self
    }

    /// Its time-out, in milliseconds.
    #[must_use]
    pub fn timeout_ms(mut self, timeout_ms: u64) -> Self {
        self.timeout_ms = timeout_ms;
        self
    }
}

impl InterpretRequest {
    /// A run that finished; for tests.
    #[must_use]
    pub fn finished(exit_code: i32, output: &str) -> Self {
        Self {
            parameters: "{}".into(),
            outcome: "finished".into(),
            exit_code: Some(exit_code),
            output: output.into(),
            dropped_bytes: 0,
            attributes: Vec::new(),
        }
    }
}

impl CommandResult {
    /// A result with its data.
    #[must_use]
    pub fn new(succeeded: bool, summary: impl Into<String>, data: &serde_json::Value) -> Self {
        Self {
            succeeded,
            summary: summary.into(),
            data: data.to_string(),
            attributes: Vec::new(),
        }
    }
}
