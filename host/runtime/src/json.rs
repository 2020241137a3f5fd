//! Calling a plugin with JSON in and JSON out: for replays, for authors at a command line, for checks.
//!
//! The JSON of an export is that of the domain's request and answer (`windlass_domain::plugin`):
//!
//! | export | input | output |
//! | --- | --- | --- |
//! | `describe` | nothing, `null` or `{}` | `Descriptor` |
//! | `lifecycle` | `LifecycleRequest` | `LifecyclePlan` |
//! | `plan` | `StrategyRequest` | `StrategyPlan` |
//! | `rollback` | `RollbackRequest` | `StrategyPlan` |
//! | `judge` | `JudgeRequest` | `Judgement` |
//! | `render` | `CommandRequest` | `RenderedCommand` |
//! | `interpret` | `CommandRun` | `CommandResult` |
//! | `diagnose` | `DiagnosisRequest` | `{"report": Report, "verdict": text or null}` |

use std::sync::Arc;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    call::{Export, Usage},
    diagnostic::Host,
    error::{CallError, CallFailure, FailureReport},
    plugin::{Call, Plugin},
    state::HostCall,
};

/// One call that was made with JSON and ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct JsonCall {
    /// The function.
    pub export: Export,
    /// Its answer; `null` when it failed.
    pub output: Option<serde_json::Value>,
    /// Why it gave no answer; `null` when it did.
    pub failure: Option<FailureReport>,
    /// Time that the guest computed, in microseconds.
    pub guest_time_us: u64,
    /// From the start to the answer, with waiting, in microseconds.
    pub elapsed_us: u64,
    /// Peak of its linear memory, in bytes.
    pub memory_bytes: u64,
    /// Host calls that it made, with their answers, in order.
    pub host_calls: Vec<HostCall>,
}

impl JsonCall {
    fn of<T: Serialize>(export: Export, call: Call<T>) -> Result<Self, CallError> {
        let Usage {
            elapsed,
            guest_time,
            memory_bytes,
            host_calls,
        } = call.usage;
        let (output, failure) = match call.result {
            Ok(answer) => (
                Some(serde_json::to_value(answer).expect("answers have string keys")),
                None,
            ),
            Err(error) => match &error.failure {
                // Nothing was called.
                CallFailure::WrongKind { .. }
                | CallFailure::InvalidInput { .. }
                | CallFailure::NotStarted { .. } => return Err(error),
                CallFailure::Refused { .. }
                | CallFailure::GuestTime { .. }
                | CallFailure::CallTime { .. }
                | CallFailure::HostCallTime { .. }
                | CallFailure::HostCalls { .. }
                | CallFailure::Memory { .. }
                | CallFailure::Output { .. }
                | CallFailure::Trap { .. }
                | CallFailure::Mismatch { .. }
                | CallFailure::InvalidAnswer { .. } => (None, Some(error.failure.report())),
            },
        };
        Ok(Self {
            export,
            output,
            failure,
            guest_time_us: micros(guest_time),
            elapsed_us: micros(elapsed),
            memory_bytes,
            host_calls,
        })
    }
}

pub(crate) fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Plugin {
    /// Calls one export with JSON: input and output have the form of the domain's types (table at the head of this module). A
    /// call that failed is a [`JsonCall`] with its failure; `host` answers the probes of a diagnostic, which without one traps
    /// at its first probe.
    ///
    /// # Errors
    /// When nothing was called: [`CallFailure::InvalidInput`] with the JSON pointer of the field (unknown fields too),
    /// [`CallFailure::WrongKind`], [`CallFailure::NotStarted`].
    pub async fn call_json(
        &self,
        export: Export,
        input: &serde_json::Value,
        host: Option<Arc<dyn Host>>,
    ) -> Result<JsonCall, CallError> {
        if !Export::of_kind(self.kind()).contains(&export) {
            let actual = self.kind();
            return Err(self
                .caller()
                .error(export, CallFailure::WrongKind { actual }));
        }
        match export {
            Export::Describe => {
                let is_nothing = match input {
                    serde_json::Value::Null => true,
                    serde_json::Value::Object(fields) => fields.is_empty(),
                    serde_json::Value::Bool(_)
                    | serde_json::Value::Number(_)
                    | serde_json::Value::String(_)
                    | serde_json::Value::Array(_) => false,
                };
                if !is_nothing {
                    return Err(self.invalid_input(
                        export,
                        InputError {
                            field: String::new(),
                            reason: "`describe` takes no input: give `{}`".to_owned(),
                        },
                    ));
                }
                JsonCall::of(export, self.call_describe().await)
            }
            Export::Lifecycle => {
                let request = self.input(export, input)?;
                JsonCall::of(export, self.call_lifecycle(&request).await)
            }
            Export::Plan => {
                let request = self.input(export, input)?;
                JsonCall::of(export, self.call_plan(&request).await)
            }
            Export::Rollback => {
                let request = self.input(export, input)?;
                JsonCall::of(export, self.call_rollback(&request).await)
            }
            Export::Judge => {
                let request = self.input(export, input)?;
                JsonCall::of(export, self.call_judge(&request).await)
            }
            Export::Render => {
                let request = self.input(export, input)?;
                JsonCall::of(export, self.call_render(&request).await)
            }
            Export::Interpret => {
                let run = self.input(export, input)?;
                JsonCall::of(export, self.call_interpret(&run).await)
            }
            Export::Diagnose => {
                let request = self.input(export, input)?;
                JsonCall::of(export, self.call_diagnose(&request, host).await)
            }
        }
    }

    fn input<T: DeserializeOwned>(
        &self,
        export: Export,
        input: &serde_json::Value,
    ) -> Result<T, CallError> {
        parse(input).map_err(|error| self.invalid_input(export, error))
    }

    fn invalid_input(&self, export: Export, InputError { field, reason }: InputError) -> CallError {
        self.caller()
            .error(export, CallFailure::InvalidInput { field, reason })
    }
}

#[derive(Debug, PartialEq, Eq)]
struct InputError {
    field: String,
    reason: String,
}

/// A request from JSON; a field that it does not have is refused, at any depth.
fn parse<T: DeserializeOwned>(input: &serde_json::Value) -> Result<T, InputError> {
    let mut track = serde_path_to_error::Track::new();
    let mut unknown: Option<String> = None;
    let deserializer = serde_path_to_error::Deserializer::new(input, &mut track);
    let parsed = serde_ignored::deserialize(deserializer, |path| {
        unknown.get_or_insert_with(|| pointer_of_ignored(&path));
    });
    match (parsed, unknown) {
        (Ok(request), None) => Ok(request),
        (Ok(_), Some(field)) => Err(InputError {
            field,
            reason: "is not a field of the input: remove it, or correct its name".to_owned(),
        }),
        (Err(error), _) => Err(InputError {
            field: pointer_of_error(&track.path()),
            reason: error.to_string(),
        }),
    }
}

/// As a JSON pointer.
fn pointer_of_error(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut pointer = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => pointer.push_str(&format!("/{index}")),
            Segment::Map { key } => push_key(&mut pointer, key),
            Segment::Enum { variant } => push_key(&mut pointer, variant),
            Segment::Unknown => {}
        }
    }
    pointer
}

/// As a JSON pointer.
fn pointer_of_ignored(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}/{index}", pointer_of_ignored(parent)),
        Path::Map { parent, key } => {
            let mut pointer = pointer_of_ignored(parent);
            push_key(&mut pointer, key);
            pointer
        }
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => pointer_of_ignored(parent),
    }
}

fn push_key(pointer: &mut String, key: &str) {
    pointer.push('/');
    pointer.push_str(&key.replace('~', "~0").replace('/', "~1"));
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use windlass_domain::plugin::JudgeRequest;

    use super::*;

    #[test]
    fn a_wrong_field_is_named_with_its_path() {
        let good = json!({"stage": "x", "parameters": {"anything": 1}, "observations": [
            {"application": "a", "server": "", "metric": "weight", "value": 1.0}]});
        parse::<JudgeRequest>(&good).unwrap();
        for (path, value, field, reason) in [
            ("/stag", json!("x"), "/stag", "not a field"),
            (
                "/observations/0/valu",
                json!(1),
                "/observations/0/valu",
                "not a field",
            ),
            (
                "/observations/0/value",
                json!("1"),
                "/observations/0/value",
                "invalid type",
            ),
            ("/stage", json!(1), "/stage", "invalid type"),
        ] {
            let mut bad = good.clone();
            let (parent, name) = path.rsplit_once('/').unwrap();
            bad.pointer_mut(parent).unwrap()[name] = value;
            let error = parse::<JudgeRequest>(&bad).unwrap_err();
            assert_eq!(error.field, field, "{path}");
            assert!(error.reason.contains(reason), "{path}: {}", error.reason);
        }
        let error = parse::<JudgeRequest>(&json!({"stage": "x"})).unwrap_err();
        assert!(error.reason.contains("missing field"), "{error:?}");
    }
}
