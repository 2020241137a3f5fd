//! One trait per kind, and the macros that make a component of an implementation.

use crate::{
    Descriptor, PluginError,
    command::{CommandResult, InterpretRequest, RenderRequest, RenderedCommand},
    diagnosis::{DiagnosisRequest, Host, Report},
    lifecycle::{LifecyclePlan, LifecycleRequest},
    strategy::{JudgeRequest, Judgement, PlanRequest, ReleasePlan, UnitProgress, Verdict},
};

/// How an application is prepared, installed, started, stopped and checked. Functions are pure.
///
/// ```
/// use windlass_sdk::{Descriptor, PluginError, TechStack, lifecycle::{LifecyclePlan, LifecycleRequest, Phase, Step, Supervise}};
///
/// struct Runner;
///
/// impl TechStack for Runner {
///     fn describe() -> Descriptor {
///         Descriptor::new("runner", "1.0.0")
///     }
///
///     fn lifecycle(request: LifecycleRequest) -> Result<LifecyclePlan, PluginError> {
///         let mut plan = LifecyclePlan::new();
///         if request.wants(Phase::Start) {
///             plan = plan.step(Step::start(Phase::Start, "start", Supervise::new(vec!["./run".into()])));
///         }
///         Ok(plan)
///     }
/// }
///
/// windlass_sdk::tech_stack!(Runner);
///
/// let plan = Runner::lifecycle(LifecycleRequest::new("shop", &serde_json::json!({}))).unwrap();
/// assert_eq!(plan.steps[0].name, "start");
/// ```
pub trait TechStack {
    /// What this plugin is.
    fn describe() -> Descriptor;

    /// The steps of the asked phases.
    ///
    /// # Errors
    /// Shown to the user as they are; name the field.
    fn lifecycle(request: LifecycleRequest) -> Result<LifecyclePlan, PluginError>;
}

/// In which order and waves servers are released. Functions are pure.
///
/// ```
/// use windlass_sdk::{DeploymentStrategy, Descriptor, PluginError, strategy::{PlanBuilder, PlanRequest, ReleasePlan, ReleaseUnit}};
///
/// struct OneByOne;
///
/// impl DeploymentStrategy for OneByOne {
///     fn describe() -> Descriptor {
///         Descriptor::new("one-by-one", "1.0.0")
///     }
///
///     fn plan(request: PlanRequest) -> Result<ReleasePlan, PluginError> {
///         let mut plan = PlanBuilder::new();
///         for application in &request.applications {
///             for server in &application.servers {
///                 plan.release(None, &server.name, ReleaseUnit::new(&application.key, &server.id));
///             }
///         }
///         Ok(plan.build())
///     }
/// }
///
/// windlass_sdk::deployment_strategy!(OneByOne);
///
/// assert!(OneByOne::plan(PlanRequest::new(&serde_json::json!({}))).unwrap().nodes.is_empty());
/// ```
pub trait DeploymentStrategy {
    /// What this plugin is.
    fn describe() -> Descriptor;

    /// Plans an order.
    ///
    /// # Errors
    /// Shown to the user as they are; name the field.
    fn plan(request: PlanRequest) -> Result<ReleasePlan, PluginError>;

    /// Plans the way back. Where this fails the core's own rollback plan runs, which is what happens by default.
    ///
    /// # Errors
    /// `unsupported` by default.
    fn rollback(
        request: PlanRequest,
        progress: Vec<UnitProgress>,
    ) -> Result<ReleasePlan, PluginError> {
        drop((request, progress));
        Err(PluginError::unsupported(
            "this strategy has no rollback of its own",
        ))
    }

    /// Judges a stage. By default: go on.
    ///
    /// # Errors
    /// An error holds the order.
    fn judge(request: JudgeRequest) -> Result<Judgement, PluginError> {
        drop(request);
        Ok(Judgement::new(Verdict::GoOn, "nothing was to be judged"))
    }
}

/// Finds out what is wrong.
///
/// ```
/// use windlass_sdk::{Descriptor, Diagnostic, PluginError, Severity, diagnosis::{DiagnosisRequest, Finding, FindingState, Host, Report}};
///
/// struct Reachable;
///
/// impl Diagnostic for Reachable {
///     fn describe() -> Descriptor {
///         Descriptor::new("reachable", "1.0.0").item("agent", "The agent answers", Severity::Critical)
///     }
///
///     fn diagnose(request: DiagnosisRequest, host: &dyn Host) -> Result<Report, PluginError> {
///         let finding = match host.available(&request.subject.id) {
///             Ok(probes) => Finding::new("agent", FindingState::Ok, format!("{} probes", probes.len())),
///             Err(error) => Finding::new("agent", FindingState::Skipped, error.message),
///         };
///         Ok(Report::new("looked", vec![finding]))
///     }
/// }
///
/// windlass_sdk::diagnostic!(Reachable);
///
/// assert_eq!(Reachable::describe().items.len(), 1);
/// ```
pub trait Diagnostic {
    /// What this plugin is.
    fn describe() -> Descriptor;

    /// Diagnoses, looking through `host`.
    ///
    /// # Errors
    /// When no report can be made at all; an item that cannot be looked at is `skipped`.
    fn diagnose(request: DiagnosisRequest, host: &dyn Host) -> Result<Report, PluginError>;
}

/// A command offered to everyone. Functions are pure.
///
/// ```
/// use windlass_sdk::{Descriptor, PluginError, PublicCommand, Script, command::{InterpretRequest, RenderRequest, RenderedCommand}};
///
/// struct Uptime;
///
/// impl PublicCommand for Uptime {
///     fn describe() -> Descriptor {
///         Descriptor::new("uptime", "1.0.0")
///     }
///
///     fn render(_: RenderRequest) -> Result<RenderedCommand, PluginError> {
///         Ok(RenderedCommand::new(Script::shell("uptime")))
///     }
/// }
///
/// windlass_sdk::public_command!(Uptime);
///
/// // Unless it says otherwise, exit code 0 is success.
/// assert!(Uptime::interpret(InterpretRequest::finished(0, "up 3 days")).unwrap().succeeded);
/// ```
pub trait PublicCommand {
    /// What this plugin is.
    fn describe() -> Descriptor;

    /// Renders the command for one server. Parameters go into the environment, never into the script's text.
    ///
    /// # Errors
    /// Shown to the user as they are; name the field.
    fn render(request: RenderRequest) -> Result<RenderedCommand, PluginError>;

    /// What the output of a run means. By default: exit code 0 is success.
    ///
    /// # Errors
    /// The result is then shown without a structure.
    fn interpret(request: InterpretRequest) -> Result<CommandResult, PluginError> {
        let summary = match request.exit_code {
            Some(code) => format!("{} with exit code {code}", request.outcome),
            None => request.outcome.clone(),
        };
        Ok(CommandResult::new(
            request.exit_code == Some(0),
            summary,
            &serde_json::Value::Null,
        ))
    }
}

/// Makes a tech-stack plugin of a type that implements [`TechStack`]. Once per crate.
#[macro_export]
macro_rules! tech_stack {
    ($plugin:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            struct Component;
            $crate::__plugin_info!($plugin, $crate::TechStack);
            impl $crate::bindings::tech_stack::exports::windlass::plugin::lifecycle::Guest
                for Component
            {
                fn lifecycle(
                    request: $crate::lifecycle::LifecycleRequest,
                ) -> Result<$crate::lifecycle::LifecyclePlan, $crate::PluginError> {
                    <$plugin as $crate::TechStack>::lifecycle(request)
                }
            }
            $crate::bindings::tech_stack::__export_tech_stack!(Component with_types_in $crate::bindings::tech_stack);
        };
    };
}

/// Makes a deployment-strategy plugin of a type that implements [`DeploymentStrategy`]. Once per crate.
#[macro_export]
macro_rules! deployment_strategy {
    ($plugin:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            struct Component;
            $crate::__plugin_info!($plugin, $crate::DeploymentStrategy);
            impl $crate::bindings::deployment_strategy::exports::windlass::plugin::strategy::Guest
                for Component
            {
                fn plan(
                    request: $crate::strategy::PlanRequest,
                ) -> Result<$crate::strategy::ReleasePlan, $crate::PluginError> {
                    <$plugin as $crate::DeploymentStrategy>::plan(request)
                }

                fn rollback(
                    request: $crate::strategy::PlanRequest,
                    progress: Vec<$crate::strategy::UnitProgress>,
                ) -> Result<$crate::strategy::ReleasePlan, $crate::PluginError> {
                    <$plugin as $crate::DeploymentStrategy>::rollback(request, progress)
                }

                fn judge(
                    request: $crate::strategy::JudgeRequest,
                ) -> Result<$crate::strategy::Judgement, $crate::PluginError> {
                    <$plugin as $crate::DeploymentStrategy>::judge(request)
                }
            }
            $crate::bindings::deployment_strategy::__export_deployment_strategy!(Component with_types_in $crate::bindings::deployment_strategy);
        };
    };
}

/// Makes a diagnostic plugin of a type that implements [`Diagnostic`]. Once per crate.
#[macro_export]
macro_rules! diagnostic {
    ($plugin:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            struct Component;
            $crate::__plugin_info!($plugin, $crate::Diagnostic);
            impl $crate::bindings::diagnostic::exports::windlass::plugin::diagnosis::Guest
                for Component
            {
                fn diagnose(
                    request: $crate::diagnosis::DiagnosisRequest,
                ) -> Result<$crate::diagnosis::Report, $crate::PluginError> {
                    <$plugin as $crate::Diagnostic>::diagnose(
                        request,
                        &$crate::diagnosis::Platform,
                    )
                }
            }
            $crate::bindings::diagnostic::__export_diagnostic!(Component with_types_in $crate::bindings::diagnostic);
        };
    };
}

/// Makes a public-command plugin of a type that implements [`PublicCommand`]. Once per crate.
#[macro_export]
macro_rules! public_command {
    ($plugin:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            struct Component;
            $crate::__plugin_info!($plugin, $crate::PublicCommand);
            impl $crate::bindings::public_command::exports::windlass::plugin::command::Guest
                for Component
            {
                fn render(
                    request: $crate::command::RenderRequest,
                ) -> Result<$crate::command::RenderedCommand, $crate::PluginError> {
                    <$plugin as $crate::PublicCommand>::render(request)
                }

                fn interpret(
                    request: $crate::command::InterpretRequest,
                ) -> Result<$crate::command::CommandResult, $crate::PluginError> {
                    <$plugin as $crate::PublicCommand>::interpret(request)
                }
            }
            $crate::bindings::public_command::__export_public_command!(Component with_types_in $crate::bindings::public_command);
        };
    };
}

/// The part that all kinds share.
#[doc(hidden)]
#[macro_export]
macro_rules! __plugin_info {
    ($plugin:ty, $kind:path) => {
        impl $crate::bindings::info::exports::windlass::plugin::plugin_info::Guest for Component {
            fn describe() -> $crate::Descriptor {
                <$plugin as $kind>::describe()
            }
        }
        $crate::bindings::info::__export_info!(Component with_types_in $crate::bindings::info);
    };
}
