//! A tech stack: by default one script step; parameters choose what goes wrong.

use windlass_sdk::{
    Descriptor, Extension, PluginError, TechStack,
    lifecycle::{Action, LifecyclePlan, LifecycleRequest, Phase, Step},
};

use crate::{
    behave::{behave, giant_text, how},
    descriptor::{IsDiagnostic, answers_otherwise, describe},
};

/// Leaves the server's name, and fails while it is told to.
const PREPARE: &str = "echo \"$WINDLASS_SERVER\" >> \"$FILES/prepared\"; [ ! -e \"$FILES/fail\" ]";
/// Leaves what a parameter says.
const GREET: &str = "printf %s \"${GREETING-}\" > \"$FILES/greeting-$WINDLASS_SERVER\"";

/// The guest.
#[derive(Debug)]
pub struct Stack;

impl TechStack for Stack {
    fn describe() -> Descriptor {
        describe("test-stack", IsDiagnostic::No)
    }

    fn lifecycle(request: LifecycleRequest) -> Result<LifecyclePlan, PluginError> {
        let how = how(&request.parameters);
        behave(&how);
        let script = if answers_otherwise() {
            "true # otherwise"
        } else {
            "true"
        };
        let step = Step::script(Phase::Start, "start", script);
        match how.as_str() {
            "refuse" => Err(PluginError::invalid_parameter(
                "/behave",
                "is not to my liking",
            )),
            "giant" => {
                Ok(LifecyclePlan::new().step(Step::script(Phase::Start, "start", giant_text())))
            }
            "unknown-phase" => {
                let mut step = step;
                step.phase = "teleport".into();
                Ok(LifecyclePlan::new().step(step))
            }
            "unknown-action" => Ok(LifecyclePlan::new().step(Step::new(
                Phase::Start,
                "start",
                Action::Extension(Extension {
                    code: "teleport".into(),
                    arguments: "{}".into(),
                }),
            ))),
            "prepare" => Ok(LifecyclePlan::new()
                .step(Step::script(Phase::Prepare, "prepare", PREPARE))
                .step(Step::script(Phase::Start, "start", GREET))),
            "same-server-twice" => Ok(LifecyclePlan::new()
                .server_env("s1", Vec::new())
                .server_env("s1", Vec::new())),
            _ => Ok(LifecyclePlan::new().step(step)),
        }
    }
}

windlass_sdk::tech_stack!(Stack);
