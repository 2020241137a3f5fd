//! What a public command is asked and answers.

pub use crate::bindings::public_command::exports::windlass::plugin::command::{
    CommandResult, InterpretRequest, RenderRequest, RenderedCommand,
};
use crate::{Script, ServerFacts, Value};

impl RenderRequest {
    /// A request; for tests.
    ///
    /// ```
    /// # use windlass_sdk::{ServerFacts, command::RenderRequest};
    /// let request = RenderRequest::new(&serde_json::json!({ "path": "/" }), ServerFacts::new("s1", "web-1"));
    /// assert_eq!(request.parameters, r#"{"path":"/"}"#);
    /// ```
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
    ///
    /// ```
    /// # use windlass_sdk::{Script, Value, command::RenderedCommand};
    /// let command = RenderedCommand::new(Script::shell(r#"df -Pk -- "$DISK""#))
    ///     .env("DISK", Value::plain("/data"))
    ///     .timeout_ms(30_000);
    /// assert_eq!(command.env.len(), 1);
    /// ```
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
    ///
    /// ```
    /// # use windlass_sdk::command::InterpretRequest;
    /// let run = InterpretRequest::finished(0, "12\n");
    /// assert_eq!((run.exit_code, run.output.trim()), (Some(0), "12"));
    /// ```
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
    ///
    /// ```
    /// # use windlass_sdk::command::CommandResult;
    /// let result = CommandResult::new(true, "12 entries", &serde_json::json!({ "entries": 12 }));
    /// assert_eq!(result.data, r#"{"entries":12}"#);
    /// ```
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
