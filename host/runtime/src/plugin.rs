//! A loaded plugin, and calling it: domain types in, domain types out.
//!
//! Every call has a fresh store. Whatever a guest does, a call ends in an answer or in a [`CallError`] that is attributed;
//! the store is dropped either way, and nothing of one call is seen by the next.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, TryAcquireError};
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
    call::{self, CallRecord, CallSink, Export, GuestClock, Usage},
    convert,
    diagnostic::Host,
    error::{CallError, CallFailure, FieldError, millis},
    limits::MemoryMeter,
    sandbox::{RunningCall, Sandbox},
    schema::Schema,
    state::{GuestLog, HostCall, State},
    surroundings::Surroundings,
};

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
#[derive(Clone)]
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
#[derive(Clone)]
pub(crate) struct Caller {
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) reference: PluginRef,
    pub(crate) label: Arc<str>,
    pub(crate) memory_limit: u64,
    pub(crate) guest_time: Duration,
    pub(crate) sink: Option<Arc<dyn CallSink>>,
    pub(crate) surroundings: Surroundings,
}

pub(crate) struct Loaded {
    pub(crate) guest: Guest,
    pub(crate) caller: Caller,
    pub(crate) descriptor: Arc<Descriptor>,
    pub(crate) schema: Arc<Schema>,
}

/// A plugin that can be called. Cheap to clone; keeps working after its file was removed or replaced.
#[derive(Clone)]
pub struct Plugin {
    pub(crate) loaded: Arc<Loaded>,
    recording: Recording,
}

/// Whether calls reach the sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Recording {
    On,
    Off,
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Plugin").field(self.reference()).finish()
    }
}

/// Calls one exported function in a fresh store: `$call` gets the bindings and the store. Gives the guest's answer, or why there
/// is none, with what the call used.
macro_rules! invoke {
    ($caller:expr, $host:expr, $pre:expr, |$bindings:ident, $store:ident| $call:expr) => {{
        let caller: &Caller = $caller;
        match caller.begin($host).await {
            Err(refused) => refused,
            Ok(mut invocation) => {
                let clock = Arc::clone(&invocation.clock);
                let outcome = {
                    let $store = &mut invocation.store;
                    let mut call = std::pin::pin!(async {
                        let $bindings = $pre.instantiate_async(&mut *$store).await?;
                        $store.data_mut().instantiated = true;
                        $call.await
                    });
                    let timed = std::future::poll_fn(|context| {
                        clock.resume();
                        let polled = call.as_mut().poll(context);
                        clock.pause();
                        polled
                    });
                    tokio::time::timeout(caller.sandbox.limits.call_time, timed).await
                };
                caller.finish(invocation, outcome)
            }
        }
    }};
}

impl Plugin {
    pub(crate) fn new(loaded: Arc<Loaded>) -> Self {
        Self {
            loaded,
            recording: Recording::On,
        }
    }

    /// The same plugin, whose calls are not recorded: replays and comparisons are no calls of the platform.
    #[must_use]
    pub fn unrecorded(&self) -> Self {
        Self {
            loaded: Arc::clone(&self.loaded),
            recording: Recording::Off,
        }
    }

    /// The same plugin with less: memory of a call in bytes, time that a call may compute. Its calls are not recorded. No time at
    /// all stops a call at its first instruction.
    #[must_use]
    pub fn constrained(&self, memory_bytes: Option<u64>, guest_time: Option<Duration>) -> Self {
        self.changed(|caller| Caller {
            memory_limit: memory_bytes
                .map_or(caller.memory_limit, |bytes| bytes.min(caller.memory_limit)),
            guest_time: guest_time.map_or(caller.guest_time, |time| time.min(caller.guest_time)),
            ..caller
        })
    }

    /// The same plugin at another time and with other random numbers, where its language has them. Its calls are not recorded.
    pub(crate) fn elsewhere(&self) -> Self {
        self.changed(Caller::elsewhere)
    }

    fn changed(&self, change: impl FnOnce(Caller) -> Caller) -> Self {
        let Loaded {
            guest,
            caller,
            descriptor,
            schema,
        } = &*self.loaded;
        let caller = Caller {
            sink: None,
            ..change(caller.clone())
        };
        Self {
            loaded: Arc::new(Loaded {
                guest: guest.clone(),
                caller,
                descriptor: Arc::clone(descriptor),
                schema: Arc::clone(schema),
            }),
            recording: Recording::Off,
        }
    }

    /// Name, version and digest.
    #[must_use]
    pub fn reference(&self) -> &PluginRef {
        &self.loaded.caller.reference
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> PluginKind {
        self.loaded.guest.kind()
    }

    /// What it said of itself when it was loaded.
    #[must_use]
    pub fn descriptor(&self) -> &Arc<Descriptor> {
        &self.loaded.descriptor
    }

    /// Checks parameters against its schema.
    ///
    /// # Errors
    /// Up to 20 faults, each with the JSON pointer of its field.
    pub fn validate_parameters(
        &self,
        parameters: &serde_json::Value,
    ) -> Result<(), Vec<FieldError>> {
        self.loaded.schema.validate(parameters)
    }

    /// Tech stack: the steps of some phases.
    ///
    /// # Errors
    /// [`CallFailure`], attributed.
    pub async fn lifecycle(&self, request: &LifecycleRequest) -> Result<LifecyclePlan, CallError> {
        self.call_lifecycle(request).await.result
    }

    /// Strategy: plans an order.
    ///
    /// # Errors
    /// [`CallFailure`], attributed.
    pub async fn plan(&self, request: &StrategyRequest) -> Result<StrategyPlan, CallError> {
        self.call_plan(request).await.result
    }

    /// Strategy: plans the way back.
    ///
    /// # Errors
    /// [`CallFailure`], attributed; the core's own plan runs then.
    pub async fn rollback(&self, request: &RollbackRequest) -> Result<StrategyPlan, CallError> {
        self.call_rollback(request).await.result
    }

    /// Strategy: judges a stage.
    ///
    /// # Errors
    /// [`CallFailure`], attributed; the order holds then.
    pub async fn judge(&self, request: &JudgeRequest) -> Result<Judgement, CallError> {
        self.call_judge(request).await.result
    }

    /// Public command: the script for one server.
    ///
    /// # Errors
    /// [`CallFailure`], attributed.
    pub async fn render(&self, request: &CommandRequest) -> Result<RenderedCommand, CallError> {
        self.call_render(request).await.result
    }

    /// Public command: what a run's output means.
    ///
    /// # Errors
    /// [`CallFailure`], attributed.
    pub async fn interpret(&self, run: &CommandRun) -> Result<CommandResult, CallError> {
        self.call_interpret(run).await.result
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
        let call = self.call_diagnose(request, Some(host)).await;
        let DiagnosisAnswer { report, verdict } = call.result?;
        Ok(Diagnosis {
            report,
            verdict,
            looks: call.usage.host_calls,
        })
    }

    pub(crate) async fn call_lifecycle(&self, request: &LifecycleRequest) -> Call<LifecyclePlan> {
        let Guest::TechStack(pre) = &self.loaded.guest else {
            return self.wrong_kind(Export::Lifecycle);
        };
        let guest_request = convert::lifecycle::request_to_guest(request);
        let outcome = invoke!(self.caller(), None, pre, |guest, store| guest
            .windlass_plugin_lifecycle()
            .call_lifecycle(store, &guest_request));
        self.answer(
            Export::Lifecycle,
            request,
            outcome,
            convert::lifecycle::plan_from_guest,
        )
    }

    pub(crate) async fn call_plan(&self, request: &StrategyRequest) -> Call<StrategyPlan> {
        let Guest::DeploymentStrategy(pre) = &self.loaded.guest else {
            return self.wrong_kind(Export::Plan);
        };
        let guest_request = convert::strategy::request_to_guest(request);
        let outcome = invoke!(self.caller(), None, pre, |guest, store| guest
            .windlass_plugin_strategy()
            .call_plan(store, &guest_request));
        self.answer(
            Export::Plan,
            request,
            outcome,
            convert::strategy::plan_from_guest,
        )
    }

    pub(crate) async fn call_rollback(&self, request: &RollbackRequest) -> Call<StrategyPlan> {
        let Guest::DeploymentStrategy(pre) = &self.loaded.guest else {
            return self.wrong_kind(Export::Rollback);
        };
        let progress = convert::strategy::progress_to_guest(&request.progress);
        let guest_request = convert::strategy::request_to_guest(&request.request);
        let outcome = invoke!(self.caller(), None, pre, |guest, store| guest
            .windlass_plugin_strategy()
            .call_rollback(store, &guest_request, &progress));
        self.answer(
            Export::Rollback,
            request,
            outcome,
            convert::strategy::plan_from_guest,
        )
    }

    pub(crate) async fn call_judge(&self, request: &JudgeRequest) -> Call<Judgement> {
        let Guest::DeploymentStrategy(pre) = &self.loaded.guest else {
            return self.wrong_kind(Export::Judge);
        };
        let guest_request = convert::strategy::judge_to_guest(request);
        let outcome = invoke!(self.caller(), None, pre, |guest, store| guest
            .windlass_plugin_strategy()
            .call_judge(store, &guest_request));
        self.answer(Export::Judge, request, outcome, |judgement| {
            Ok(convert::strategy::judgement_from_guest(judgement))
        })
    }

    pub(crate) async fn call_render(&self, request: &CommandRequest) -> Call<RenderedCommand> {
        let Guest::PublicCommand(pre) = &self.loaded.guest else {
            return self.wrong_kind(Export::Render);
        };
        let guest_request = convert::command::request_to_guest(request);
        let outcome = invoke!(self.caller(), None, pre, |guest, store| guest
            .windlass_plugin_command()
            .call_render(store, &guest_request));
        self.answer(
            Export::Render,
            request,
            outcome,
            convert::command::rendered_from_guest,
        )
    }

    pub(crate) async fn call_interpret(&self, run: &CommandRun) -> Call<CommandResult> {
        let Guest::PublicCommand(pre) = &self.loaded.guest else {
            return self.wrong_kind(Export::Interpret);
        };
        let guest_run = convert::command::run_to_guest(run);
        let outcome = invoke!(self.caller(), None, pre, |guest, store| guest
            .windlass_plugin_command()
            .call_interpret(store, &guest_run));
        self.answer(
            Export::Interpret,
            run,
            outcome,
            convert::command::result_from_guest,
        )
    }

    pub(crate) async fn call_diagnose(
        &self,
        request: &DiagnosisRequest,
        host: Option<Arc<dyn Host>>,
    ) -> Call<DiagnosisAnswer> {
        let Guest::Diagnostic(pre) = &self.loaded.guest else {
            return self.wrong_kind(Export::Diagnose);
        };
        let guest_request = convert::diagnosis::request_to_guest(request);
        let outcome = invoke!(self.caller(), host, pre, |guest, store| guest
            .windlass_plugin_diagnosis()
            .call_diagnose(store, &guest_request));
        self.answer(Export::Diagnose, request, outcome, |report| {
            let (report, verdict) = convert::diagnosis::report_from_guest(report);
            Ok(DiagnosisAnswer { report, verdict })
        })
    }

    /// Asks the plugin again what it is.
    pub(crate) async fn call_describe(&self) -> Call<Descriptor> {
        let (outcome, usage) = self.caller().describe(&self.loaded.guest).await;
        let schema_bytes = self.caller().sandbox.limits.schema_bytes;
        self.answer(
            Export::Describe,
            &(),
            (outcome.map(Ok), usage),
            |descriptor| {
                convert::descriptor::descriptor_from_guest(self.kind(), descriptor, schema_bytes)
                    .map(|(descriptor, _)| descriptor)
                    .map_err(|rejection| CallFailure::invalid("descriptor", rejection.text))
            },
        )
    }

    /// Turns what the guest said into the host's words, and records the call.
    fn answer<Wit, Domain: Serialize>(
        &self,
        export: Export,
        request: &impl Serialize,
        (outcome, usage): Outcome<Result<Wit, types::PluginError>>,
        convert: impl FnOnce(Wit) -> Result<Domain, CallFailure>,
    ) -> Call<Domain> {
        let result = outcome
            .and_then(|answer| answer.map_err(convert::refused))
            .and_then(convert);
        if let (Recording::On, Some(sink)) = (self.recording, &self.caller().sink) {
            sink.record(&Arc::new(CallRecord {
                plugin: self.reference().clone(),
                export,
                context: call::context(),
                input: json_text(request),
                is_fault: result.as_ref().is_err_and(CallFailure::is_fault),
                outcome: result.as_ref().map(json_text).map_err(CallFailure::report),
                usage: usage.clone(),
            }));
        }
        Call {
            result: result.map_err(|failure| self.caller().error(export, failure)),
            usage,
        }
    }

    pub(crate) fn caller(&self) -> &Caller {
        &self.loaded.caller
    }

    fn wrong_kind<T>(&self, export: Export) -> Call<T> {
        let actual = self.kind();
        Call {
            result: Err(self
                .caller()
                .error(export, CallFailure::WrongKind { actual })),
            usage: Usage::default(),
        }
    }
}

fn json_text(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("requests and answers have string keys")
}

/// A guest's answer or why there is none, and what the call used.
pub(crate) type Outcome<T> = (Result<T, CallFailure>, Usage);

/// One call that ended.
pub(crate) struct Call<T> {
    pub(crate) result: Result<T, CallError>,
    pub(crate) usage: Usage,
}

/// What a diagnostic answered, as the journal keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct DiagnosisAnswer {
    report: Report,
    verdict: Option<String>,
}

/// One call that runs.
pub(crate) struct Invocation {
    pub(crate) store: Store<State>,
    clock: Arc<GuestClock>,
    started: Instant,
    _place: OwnedSemaphorePermit,
    _ticking: RunningCall,
}

impl Caller {
    /// The same, at another time and with other random numbers.
    pub(crate) fn elsewhere(self) -> Self {
        Self {
            surroundings: Surroundings::Other,
            ..self
        }
    }

    /// Asks a component what it is.
    pub(crate) async fn describe(&self, guest: &Guest) -> Outcome<types::Descriptor> {
        match guest {
            Guest::TechStack(pre) => invoke!(self, None, pre, |guest, store| guest
                .windlass_plugin_plugin_info()
                .call_describe(store)),
            Guest::DeploymentStrategy(pre) => invoke!(self, None, pre, |guest, store| guest
                .windlass_plugin_plugin_info()
                .call_describe(store)),
            Guest::Diagnostic(pre) => invoke!(self, None, pre, |guest, store| guest
                .windlass_plugin_plugin_info()
                .call_describe(store)),
            Guest::PublicCommand(pre) => invoke!(self, None, pre, |guest, store| guest
                .windlass_plugin_plugin_info()
                .call_describe(store)),
        }
    }

    async fn begin<T>(&self, host: Option<Arc<dyn Host>>) -> Result<Invocation, Outcome<T>> {
        let started = Instant::now();
        let limits = &self.sandbox.limits;
        let not_started = |reason: String| {
            let usage = Usage {
                elapsed: started.elapsed(),
                ..Usage::default()
            };
            (Err(CallFailure::NotStarted { reason }), usage)
        };
        let places = Arc::clone(&self.sandbox.places);
        let place = match places.try_acquire_owned() {
            Ok(place) => place,
            Err(TryAcquireError::Closed) => {
                return Err(not_started("the plugin engine is shutting down".to_owned()));
            }
            Err(TryAcquireError::NoPermits) => {
                let places = Arc::clone(&self.sandbox.places);
                match tokio::time::timeout(limits.call_time, places.acquire_owned()).await {
                    Ok(Ok(place)) => place,
                    Ok(Err(_closed)) => {
                        return Err(not_started("the plugin engine is shutting down".to_owned()));
                    }
                    Err(_elapsed) => {
                        return Err(not_started(format!(
                            "all {} places for calls were taken for {} ms",
                            limits.calls_at_once,
                            millis(limits.call_time)
                        )));
                    }
                }
            }
        };
        let state = State::new(
            MemoryMeter::new(self.memory_limit),
            Arc::new(GuestLog::new(Arc::clone(&self.label))),
            host,
            limits.host_calls,
            limits.host_call_time,
            self.surroundings,
        );
        let mut store = Store::new(&self.sandbox.engine, state);
        store.limiter(|state| &mut state.memory);
        store.set_hostcall_fuel(limits.output_bytes);
        store.set_max_component_handles(limits.handles);
        let clock = Arc::new(GuestClock::default());
        let (budget, running) = (self.guest_time, Arc::clone(&clock));
        // Without any time the first instruction looks at the clock; else the first tick does.
        store.set_epoch_deadline(u64::from(!budget.is_zero()));
        store.epoch_deadline_callback(move |mut context| {
            if running.used() >= budget {
                context.data_mut().out_of_time = true;
                Ok(UpdateDeadline::Interrupt)
            } else {
                // Tokio's own yield lets the worker look at its sockets and timers first: with one that wakes at once, guests
                // that compute on every worker would keep everybody's requests waiting for a third of a second.
                Ok(UpdateDeadline::YieldCustom(
                    1,
                    Box::pin(tokio::task::yield_now()),
                ))
            }
        });
        Ok(Invocation {
            store,
            clock,
            started,
            _place: place,
            _ticking: self.sandbox.ticker.begin(),
        })
    }

    /// Turns an outcome into an answer or a failure, with what the call used.
    fn finish<T>(
        &self,
        mut invocation: Invocation,
        outcome: Result<wasmtime::Result<T>, tokio::time::error::Elapsed>,
    ) -> Outcome<T> {
        let state = invocation.store.data_mut();
        let host_calls = std::mem::take(&mut state.host_calls);
        let result = match outcome {
            // A guest that was refused memory and went on answers something that depends on the limit: never its answer.
            Ok(Ok(_)) if state.memory.denied => Err(CallFailure::Memory {
                limit_bytes: self.memory_limit,
            }),
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.classify(state, &error)),
            Err(_) => Err(CallFailure::CallTime {
                limit_ms: millis(self.sandbox.limits.call_time),
            }),
        };
        let usage = Usage {
            elapsed: invocation.started.elapsed(),
            guest_time: invocation.clock.used(),
            memory_bytes: state.memory.peak_bytes(),
            host_calls,
        };
        (result, usage)
    }

    fn classify(&self, state: &mut State, error: &wasmtime::Error) -> CallFailure {
        let limits = &self.sandbox.limits;
        if let Some(failure) = state.host_failure.take() {
            return failure;
        }
        if state.out_of_time {
            return CallFailure::GuestTime {
                limit_ms: millis(self.guest_time),
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

    pub(crate) fn error(&self, export: Export, failure: CallFailure) -> CallError {
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
