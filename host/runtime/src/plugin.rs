//! A loaded plugin, and calling it: domain types in, domain types out.
//!
//! Every call has a fresh store. Whatever a guest does, a call ends in an answer or in a [`CallError`] that is attributed;
//! the store is dropped either way, and nothing of one call is seen by the next.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::OwnedSemaphorePermit;
use wasmtime::{Store, UpdateDeadline};
use windlass_domain::{
    manifest::PluginRef,
    plugin::{
        CommandRequest, CommandResult, CommandRun, Descriptor, DiagnosisRequest, JudgeRequest,
        Judgement, LifecyclePlan, LifecycleRequest, PluginKind, RenderedCommand, Report,
        RollbackRequest, StrategyPlan, StrategyRequest,
    },
};

use crate::{
    bindings::{deployment_strategy, diagnostic, public_command, tech_stack, types},
    convert,
    diagnostic::Host,
    error::{CallError, CallFailure, FieldError, millis},
    limits::MemoryMeter,
    sandbox::{RunningCall, Sandbox, TICK},
    schema::Schema,
    state::{GuestLog, HostCall, State},
};

/// One finished call: for metrics, and the seam for the call journal. See [`CallSink`].
#[derive(Debug, Clone, PartialEq)]
pub struct CallRecord {
    /// Which plugin.
    pub plugin: PluginRef,
    /// Which function.
    pub export: &'static str,
    /// From the start of the call to its answer, with waiting.
    pub elapsed: Duration,
    /// Upper bound of the time that the guest computed, in steps of 5 ms; 0: less than one step.
    pub guest_time: Duration,
    /// Linear memory at the end, which is its peak, in bytes.
    pub memory_bytes: u64,
    /// Host calls that it made.
    pub host_calls: usize,
    /// `None`: it answered; else the code of the failure.
    pub failure: Option<&'static str>,
}

/// Receives every finished call. Called on the caller's task: must not block.
pub trait CallSink: Send + Sync {
    /// One call ended.
    fn record(&self, record: CallRecord);
}

/// What a diagnostic answered, with what it looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Diagnosis {
    /// The report.
    pub report: Report,
    /// The plugin's own verdict, where it gave one.
    pub verdict: Option<String>,
    /// Every look at the platform with its answer, in order.
    pub looks: Vec<HostCall>,
}

/// A component linked to its world.
pub(crate) enum Guest {
    TechStack(tech_stack::TechStackPre<State>),
    DeploymentStrategy(deployment_strategy::DeploymentStrategyPre<State>),
    Diagnostic(diagnostic::DiagnosticPre<State>),
    PublicCommand(public_command::PublicCommandPre<State>),
}

impl Guest {
    pub(crate) fn kind(&self) -> PluginKind {
        match self {
            Self::TechStack(_) => PluginKind::TechStack,
            Self::DeploymentStrategy(_) => PluginKind::DeploymentStrategy,
            Self::Diagnostic(_) => PluginKind::Diagnostic,
            Self::PublicCommand(_) => PluginKind::PublicCommand,
        }
    }
}

/// What a call needs beside the component.
pub(crate) struct Caller {
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) reference: PluginRef,
    pub(crate) label: Arc<str>,
    pub(crate) memory_limit: u64,
    pub(crate) sink: Option<Arc<dyn CallSink>>,
}

pub(crate) struct Loaded {
    pub(crate) guest: Guest,
    pub(crate) caller: Caller,
    pub(crate) descriptor: Arc<Descriptor>,
    pub(crate) schema: Schema,
}

/// A plugin that can be called. Cheap to clone; keeps working after its file was removed or replaced.
#[derive(Clone)]
pub struct Plugin(pub(crate) Arc<Loaded>);

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Plugin").field(self.reference()).finish()
    }
}

/// Calls one exported function in a fresh store: `$call` gets the bindings and the store.
macro_rules! invoke {
    ($caller:expr, $export:literal, $host:expr, $pre:expr, |$bindings:ident, $store:ident| $call:expr) => {{
        let caller: &Caller = $caller;
        let mut invocation = caller.begin($export, $host).await?;
        let outcome = {
            let $store = &mut invocation.store;
            tokio::time::timeout(caller.sandbox.limits.call_time, async {
                let $bindings = $pre.instantiate_async(&mut *$store).await?;
                $store.data_mut().instantiated = true;
                $call.await
            })
            .await
        };
        caller.finish(invocation, outcome)
    }};
}

impl Plugin {
    /// Name, version and digest.
    #[must_use]
    pub fn reference(&self) -> &PluginRef {
        &self.0.caller.reference
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> PluginKind {
        self.0.guest.kind()
    }

    /// What it said of itself when it was loaded.
    #[must_use]
    pub fn descriptor(&self) -> &Arc<Descriptor> {
        &self.0.descriptor
    }

    /// Checks parameters against its schema.
    ///
    /// # Errors
    /// Up to 20 faults, each with the JSON pointer of its field.
    pub fn validate_parameters(
        &self,
        parameters: &serde_json::Value,
    ) -> Result<(), Vec<FieldError>> {
        self.0.schema.validate(parameters)
    }

    /// Tech stack: the steps of some phases.
    ///
    /// # Errors
    /// [`CallFailure`], attributed.
    pub async fn lifecycle(&self, request: &LifecycleRequest) -> Result<LifecyclePlan, CallError> {
        const EXPORT: &str = "lifecycle";
        let Guest::TechStack(pre) = &self.0.guest else {
            return Err(self.wrong_kind(EXPORT));
        };
        let request = convert::lifecycle::request_to_guest(request);
        let (answer, _) = invoke!(&self.0.caller, "lifecycle", None, pre, |guest, store| guest
            .windlass_plugin_lifecycle()
            .call_lifecycle(store, &request))?;
        self.answer(EXPORT, answer, convert::lifecycle::plan_from_guest)
    }

    /// Strategy: plans an order.
    ///
    /// # Errors
    /// [`CallFailure`], attributed.
    pub async fn plan(&self, request: &StrategyRequest) -> Result<StrategyPlan, CallError> {
        const EXPORT: &str = "plan";
        let Guest::DeploymentStrategy(pre) = &self.0.guest else {
            return Err(self.wrong_kind(EXPORT));
        };
        let request = convert::strategy::request_to_guest(request);
        let (answer, _) = invoke!(&self.0.caller, "plan", None, pre, |guest, store| guest
            .windlass_plugin_strategy()
            .call_plan(store, &request))?;
        self.answer(EXPORT, answer, convert::strategy::plan_from_guest)
    }

    /// Strategy: plans the way back.
    ///
    /// # Errors
    /// [`CallFailure`], attributed; the core's own plan runs then.
    pub async fn rollback(&self, request: &RollbackRequest) -> Result<StrategyPlan, CallError> {
        const EXPORT: &str = "rollback";
        let Guest::DeploymentStrategy(pre) = &self.0.guest else {
            return Err(self.wrong_kind(EXPORT));
        };
        let progress = convert::strategy::progress_to_guest(&request.progress);
        let request = convert::strategy::request_to_guest(&request.request);
        let (answer, _) = invoke!(&self.0.caller, "rollback", None, pre, |guest, store| guest
            .windlass_plugin_strategy()
            .call_rollback(store, &request, &progress))?;
        self.answer(EXPORT, answer, convert::strategy::plan_from_guest)
    }

    /// Strategy: judges a stage.
    ///
    /// # Errors
    /// [`CallFailure`], attributed; the order holds then.
    pub async fn judge(&self, request: &JudgeRequest) -> Result<Judgement, CallError> {
        const EXPORT: &str = "judge";
        let Guest::DeploymentStrategy(pre) = &self.0.guest else {
            return Err(self.wrong_kind(EXPORT));
        };
        let request = convert::strategy::judge_to_guest(request);
        let (answer, _) = invoke!(&self.0.caller, "judge", None, pre, |guest, store| guest
            .windlass_plugin_strategy()
            .call_judge(store, &request))?;
        self.answer(EXPORT, answer, |judgement| {
            Ok(convert::strategy::judgement_from_guest(judgement))
        })
    }

    /// Public command: the script for one server.
    ///
    /// # Errors
    /// [`CallFailure`], attributed.
    pub async fn render(&self, request: &CommandRequest) -> Result<RenderedCommand, CallError> {
        const EXPORT: &str = "render";
        let Guest::PublicCommand(pre) = &self.0.guest else {
            return Err(self.wrong_kind(EXPORT));
        };
        let request = convert::command::request_to_guest(request);
        let (answer, _) = invoke!(&self.0.caller, "render", None, pre, |guest, store| guest
            .windlass_plugin_command()
            .call_render(store, &request))?;
        self.answer(EXPORT, answer, convert::command::rendered_from_guest)
    }

    /// Public command: what a run's output means.
    ///
    /// # Errors
    /// [`CallFailure`], attributed.
    pub async fn interpret(&self, run: &CommandRun) -> Result<CommandResult, CallError> {
        const EXPORT: &str = "interpret";
        let Guest::PublicCommand(pre) = &self.0.guest else {
            return Err(self.wrong_kind(EXPORT));
        };
        let run = convert::command::run_to_guest(run);
        let (answer, _) = invoke!(&self.0.caller, "interpret", None, pre, |guest, store| guest
            .windlass_plugin_command()
            .call_interpret(store, &run))?;
        self.answer(EXPORT, answer, convert::command::result_from_guest)
    }

    /// Diagnostic: diagnoses, looking through `host`, which carries the caller's rights.
    ///
    /// # Errors
    /// [`CallFailure`], attributed.
    pub async fn diagnose(
        &self,
        request: &DiagnosisRequest,
        host: Arc<dyn Host>,
    ) -> Result<Diagnosis, CallError> {
        const EXPORT: &str = "diagnose";
        let Guest::Diagnostic(pre) = &self.0.guest else {
            return Err(self.wrong_kind(EXPORT));
        };
        let request = convert::diagnosis::request_to_guest(request);
        let (answer, looks) = invoke!(
            &self.0.caller,
            "diagnose",
            Some(host),
            pre,
            |guest, store| guest
                .windlass_plugin_diagnosis()
                .call_diagnose(store, &request)
        )?;
        self.answer(EXPORT, answer, |report| {
            let (report, verdict) = convert::diagnosis::report_from_guest(report);
            Ok(Diagnosis {
                report,
                verdict,
                looks,
            })
        })
    }

    fn answer<Wit, Domain>(
        &self,
        export: &'static str,
        answer: Result<Wit, types::PluginError>,
        convert: impl FnOnce(Wit) -> Result<Domain, CallFailure>,
    ) -> Result<Domain, CallError> {
        answer
            .map_err(convert::refused)
            .and_then(convert)
            .map_err(|failure| self.0.caller.error(export, failure))
    }

    fn wrong_kind(&self, export: &'static str) -> CallError {
        let actual = self.kind();
        self.0
            .caller
            .error(export, CallFailure::WrongKind { actual })
    }
}

/// One call that runs.
pub(crate) struct Invocation {
    pub(crate) store: Store<State>,
    export: &'static str,
    started: Instant,
    _place: OwnedSemaphorePermit,
    _ticking: RunningCall,
}

impl Caller {
    /// Asks a component that is being loaded what it is.
    pub(crate) async fn describe(&self, guest: &Guest) -> Result<types::Descriptor, CallError> {
        let (descriptor, _) = match guest {
            Guest::TechStack(pre) => invoke!(self, "describe", None, pre, |guest, store| guest
                .windlass_plugin_plugin_info()
                .call_describe(store))?,
            Guest::DeploymentStrategy(pre) => {
                invoke!(self, "describe", None, pre, |guest, store| guest
                    .windlass_plugin_plugin_info()
                    .call_describe(store))?
            }
            Guest::Diagnostic(pre) => invoke!(self, "describe", None, pre, |guest, store| guest
                .windlass_plugin_plugin_info()
                .call_describe(store))?,
            Guest::PublicCommand(pre) => {
                invoke!(self, "describe", None, pre, |guest, store| guest
                    .windlass_plugin_plugin_info()
                    .call_describe(store))?
            }
        };
        Ok(descriptor)
    }

    async fn begin(
        &self,
        export: &'static str,
        host: Option<Arc<dyn Host>>,
    ) -> Result<Invocation, CallError> {
        let started = Instant::now();
        let limits = &self.sandbox.limits;
        let place = tokio::time::timeout(
            limits.call_time,
            Arc::clone(&self.sandbox.places).acquire_owned(),
        )
        .await
        .map_err(|_| {
            let reason = format!(
                "all {} places for calls were taken for {} ms",
                limits.calls_at_once,
                millis(limits.call_time)
            );
            self.error(export, CallFailure::NotStarted { reason })
        })?
        .map_err(|_| {
            let reason = "the plugin engine is shutting down".to_owned();
            self.error(export, CallFailure::NotStarted { reason })
        })?;
        let state = State::new(
            MemoryMeter::new(self.memory_limit),
            Arc::new(GuestLog::new(Arc::clone(&self.label))),
            host,
            limits.host_calls,
            limits.host_call_time,
        );
        let mut store = Store::new(&self.sandbox.engine, state);
        store.limiter(|state| &mut state.memory);
        store.set_hostcall_fuel(limits.output_bytes);
        store.set_max_component_handles(limits.handles);
        let budget = self.sandbox.tick_budget();
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(move |mut context| {
            let state = context.data_mut();
            state.ticks += 1;
            if state.ticks > budget {
                state.out_of_time = true;
                Ok(UpdateDeadline::Interrupt)
            } else {
                Ok(UpdateDeadline::Yield(1))
            }
        });
        Ok(Invocation {
            store,
            export,
            started,
            _place: place,
            _ticking: self.sandbox.ticker.begin(),
        })
    }

    /// Turns an outcome into an answer or an attributed error, and records the call.
    fn finish<T>(
        &self,
        mut invocation: Invocation,
        outcome: Result<wasmtime::Result<T>, tokio::time::error::Elapsed>,
    ) -> Result<(T, Vec<HostCall>), CallError> {
        let export = invocation.export;
        let state = invocation.store.data_mut();
        let host_calls = std::mem::take(&mut state.host_calls);
        let result = match outcome {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.classify(state, &error)),
            Err(_) => Err(CallFailure::CallTime {
                limit_ms: millis(self.sandbox.limits.call_time),
            }),
        };
        if let Some(sink) = &self.sink {
            let ticks = u32::try_from(state.ticks).unwrap_or(u32::MAX);
            sink.record(CallRecord {
                plugin: self.reference.clone(),
                export,
                elapsed: invocation.started.elapsed(),
                guest_time: TICK.saturating_mul(ticks),
                memory_bytes: state.memory.peak_bytes(),
                host_calls: host_calls.len(),
                failure: result.as_ref().err().map(CallFailure::code),
            });
        }
        match result {
            Ok(answer) => Ok((answer, host_calls)),
            Err(failure) => Err(self.error(export, failure)),
        }
    }

    fn classify(&self, state: &mut State, error: &wasmtime::Error) -> CallFailure {
        let limits = &self.sandbox.limits;
        if let Some(failure) = state.host_failure.take() {
            return failure;
        }
        if state.out_of_time {
            return CallFailure::GuestTime {
                limit_ms: millis(limits.guest_time),
            };
        }
        if state.memory.denied {
            return CallFailure::Memory {
                limit_bytes: self.memory_limit,
            };
        }
        // wasmtime has no type for this error; a test holds the text in place.
        if error
            .chain()
            .any(|cause| cause.to_string().contains("fuel allocated for hostcalls"))
        {
            return CallFailure::Output {
                limit_bytes: limits.output_bytes,
            };
        }
        if error
            .downcast_ref::<wasmtime::PoolConcurrencyLimitError>()
            .is_some()
        {
            return CallFailure::NotStarted {
                reason: format!("the pool of instances is exhausted: {error}"),
            };
        }
        // Instantiating looks up every export with its type; no trap means that one of them does not fit.
        if !state.instantiated && error.downcast_ref::<wasmtime::Trap>().is_none() {
            return CallFailure::Mismatch {
                reason: format!("{error:#}").replace('\n', " "),
            };
        }
        CallFailure::Trap {
            reason: trap_text(error),
        }
    }

    pub(crate) fn error(&self, export: &'static str, failure: CallFailure) -> CallError {
        CallError {
            plugin: Box::new(self.reference.clone()),
            export,
            failure,
        }
    }
}

/// The trap, and the innermost frames of the guest by their function names.
fn trap_text(error: &wasmtime::Error) -> String {
    const FRAMES: usize = 8;
    let trap = match error.downcast_ref::<wasmtime::Trap>() {
        Some(trap) => trap.to_string(),
        None => error.root_cause().to_string(),
    };
    let frames: Vec<String> = error
        .downcast_ref::<wasmtime::WasmBacktrace>()
        .map(|trace| {
            trace
                .frames()
                .iter()
                .filter_map(|frame| frame.func_name())
                .take(FRAMES)
                .map(|name| name.chars().take(120).collect())
                .collect()
        })
        .unwrap_or_default();
    let mut text: String = trap.chars().take(500).collect();
    if !frames.is_empty() {
        text.push_str(" (in ");
        text.push_str(&frames.join(" < "));
        text.push(')');
    }
    text
}
