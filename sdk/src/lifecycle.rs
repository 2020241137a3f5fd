//! What a tech stack is asked and answers, with builders of steps.

pub use crate::bindings::tech_stack::exports::windlass::plugin::lifecycle::{
    Action, File, HealthCheck, HttpProbe, LifecyclePlan, LifecycleRequest, Probe, ServerEnv, Step,
    Supervise,
};
use crate::{Environment, PackageRef, Script, ServerFacts, Value};

/// The phases that this version of the SDK knows, in the order of a release.
///
/// ```
/// # use windlass_sdk::lifecycle::Phase;
/// assert_eq!(Phase::ALL.map(Phase::code)[3..7], ["stop", "deploy", "start", "check"]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Make the server fit.
    Prepare,
    /// Install the framework itself.
    Install,
    /// The new release directory exists, the old release still runs.
    Configure,
    /// Stop the application.
    Stop,
    /// After the link was switched to the new release.
    Deploy,
    /// Start the application.
    Start,
    /// Check its health.
    Check,
    /// Restart it in place.
    Restart,
    /// Remove it.
    Uninstall,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 9] = [
        Self::Prepare,
        Self::Install,
        Self::Configure,
        Self::Stop,
        Self::Deploy,
        Self::Start,
        Self::Check,
        Self::Restart,
        Self::Uninstall,
    ];

    /// Its code in the contract.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Install => "install",
            Self::Configure => "configure",
            Self::Stop => "stop",
            Self::Deploy => "deploy",
            Self::Start => "start",
            Self::Check => "check",
            Self::Restart => "restart",
            Self::Uninstall => "uninstall",
        }
    }
}

impl LifecycleRequest {
    /// A request for all phases of a release; for tests.
    ///
    /// ```
    /// # use windlass_sdk::{PackageRef, ServerFacts, lifecycle::{LifecycleRequest, Phase}};
    /// let request = LifecycleRequest::new("shop", &serde_json::json!({ "port": 8080 }))
    ///     .package(PackageRef::new("1.0.0", "jar", "shop.jar"))
    ///     .server(ServerFacts::new("s1", "web-1"));
    /// assert!(request.wants(Phase::Start));
    /// ```
    #[must_use]
    pub fn new(application: &str, parameters: &serde_json::Value) -> Self {
        Self {
            application: application.into(),
            instance: application.into(),
            operation: "release".into(),
            package: None,
            parameters: parameters.to_string(),
            env: Vec::new(),
            phases: Phase::ALL.iter().map(|phase| phase.code().into()).collect(),
            servers: Vec::new(),
            attributes: Vec::new(),
        }
    }

    /// With a package.
    #[must_use]
    pub fn package(mut self, package: PackageRef) -> Self {
        self.package = Some(package);
        self
    }

    /// With one more server.
    #[must_use]
    pub fn server(mut self, server: ServerFacts) -> Self {
        self.servers.push(server);
        self
    }

    /// Whether a phase is asked for.
    #[must_use]
    pub fn wants(&self, phase: Phase) -> bool {
        self.phases.iter().any(|code| code == phase.code())
    }
}

impl LifecyclePlan {
    /// No steps.
    #[must_use]
    pub fn new() -> Self {
        Self {
            steps: Vec::new(),
            server_env: Vec::new(),
            attributes: Vec::new(),
        }
    }

    /// One more step. The order of the calls is the order within a phase.
    ///
    /// ```
    /// # use windlass_sdk::{Value, lifecycle::{LifecyclePlan, Phase, Step}};
    /// let plan = LifecyclePlan::new()
    ///     .step(Step::script(Phase::Configure, "write config", "envsubst < app.tmpl > app.conf"))
    ///     .server_env("s1", vec![("PORT".into(), Value::plain("8080"))]);
    /// assert_eq!(plan.steps.len(), 1);
    /// ```
    #[must_use]
    pub fn step(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// Environment of one server, above the common one.
    #[must_use]
    pub fn server_env(mut self, server: &str, env: Environment) -> Self {
        self.server_env.push(ServerEnv {
            server: server.into(),
            env,
        });
        self
    }
}

impl Default for LifecyclePlan {
    fn default() -> Self {
        Self::new()
    }
}

impl Step {
    /// Any action: time-out 60 s, no new attempts, not repeatable.
    ///
    /// ```
    /// # use windlass_sdk::{Value, lifecycle::{Action, Phase, Step}};
    /// let step = Step::new(Phase::Stop, "stop", Action::Stop(10_000))
    ///     .timeout_ms(40_000)
    ///     .run_as(Some("app"))
    ///     .env("LANG", Value::plain("C"))
    ///     .retries(2);
    /// assert!(step.repeatable, "what is tried again must be repeatable");
    /// ```
    #[must_use]
    pub fn new(phase: Phase, name: &str, action: Action) -> Self {
        Self {
            phase: phase.code().into(),
            name: name.into(),
            action,
            run_as: None,
            env: Vec::new(),
            timeout_ms: 60_000,
            retries: 0,
            repeatable: false,
            attributes: Vec::new(),
        }
    }

    /// A script for `/bin/sh -eu`.
    ///
    /// ```
    /// # use windlass_sdk::lifecycle::{Phase, Step};
    /// let step = Step::script(Phase::Prepare, "make directories", "mkdir -p logs").repeatable();
    /// assert_eq!(step.phase, "prepare");
    /// ```
    #[must_use]
    pub fn script(phase: Phase, name: &str, text: impl Into<String>) -> Self {
        Self::new(phase, name, Action::Script(Script::shell(text)))
    }

    /// A file: relative to the release directory, or absolute below an approved root. Writing it again does no harm.
    ///
    /// ```
    /// # use windlass_sdk::lifecycle::{Phase, Step};
    /// let step = Step::write_file(Phase::Configure, "logging", "log.properties", "level=info\n", 0o644);
    /// assert!(step.repeatable);
    /// ```
    #[must_use]
    pub fn write_file(phase: Phase, name: &str, path: &str, content: &str, mode: u32) -> Self {
        let file = File {
            path: path.into(),
            content: content.into(),
            mode,
        };
        Self::new(phase, name, Action::WriteFile(file)).repeatable()
    }

    /// Start the application and keep it running.
    ///
    /// ```
    /// # use windlass_sdk::lifecycle::{Phase, Step, Supervise};
    /// let supervise = Supervise::new(vec!["java".into(), "-jar".into(), "shop.jar".into(), "--port=${PORT}".into()]);
    /// let step = Step::start(Phase::Start, "start", supervise);
    /// assert!(!step.repeatable);
    /// ```
    #[must_use]
    pub fn start(phase: Phase, name: &str, supervise: Supervise) -> Self {
        Self::new(phase, name, Action::Start(supervise))
    }

    /// Of a start: a release of the same stack does not stop the application, and where it already runs with the same
    /// command, directory and user it is not started again. The stack's next step of the phase tells it of the new release,
    /// for example by a signal that makes it read its configuration again. Restarts and stops are as always.
    #[must_use]
    pub fn kept_running(mut self) -> Self {
        self.attributes.push(("keep-running".into(), "true".into()));
        self
    }

    /// Stop the application: `SIGTERM`, after the grace `SIGKILL`. The time-out is the grace and 30 s. Stopping what is
    /// stopped does no harm.
    ///
    /// ```
    /// # use windlass_sdk::lifecycle::{Phase, Step};
    /// assert_eq!(Step::stop(Phase::Stop, "stop", 10_000).timeout_ms, 40_000);
    /// ```
    #[must_use]
    pub fn stop(phase: Phase, name: &str, grace_ms: u64) -> Self {
        Self::new(phase, name, Action::Stop(grace_ms))
            .timeout_ms(grace_ms.saturating_add(30_000))
            .repeatable()
    }

    /// Check its health, by default every second, 5 s for one try; the time-out is the health deadline, 120 s.
    ///
    /// ```
    /// # use windlass_sdk::lifecycle::{Phase, Probe, Step};
    /// let step = Step::check(Phase::Check, "port", Probe::Tcp("127.0.0.1:${PORT}".into()));
    /// assert_eq!(step.timeout_ms, 120_000);
    /// ```
    #[must_use]
    pub fn check(phase: Phase, name: &str, probe: Probe) -> Self {
        let check = HealthCheck {
            probe,
            interval_ms: 1_000,
            try_timeout_ms: 5_000,
            healthy_for_ms: 0,
        };
        Self::new(phase, name, Action::Check(check))
            .timeout_ms(120_000)
            .repeatable()
    }

    /// As another OS user; needs the wish in the descriptor and its approval.
    #[must_use]
    pub fn run_as(mut self, user: Option<&str>) -> Self {
        self.run_as = user.map(Into::into);
        self
    }

    /// One more environment variable.
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

    /// Running it again does no harm.
    #[must_use]
    pub fn repeatable(mut self) -> Self {
        self.repeatable = true;
        self
    }

    /// Repeatable, and tried again by itself so many times.
    #[must_use]
    pub fn retries(mut self, retries: u32) -> Self {
        self.repeatable = true;
        self.retries = retries;
        self
    }
}

impl Supervise {
    /// An application in the current release directory, restarted whenever it ends by itself.
    ///
    /// ```
    /// # use windlass_sdk::lifecycle::Supervise;
    /// assert_eq!(Supervise::new(vec!["./server".into()]).restart, "always");
    /// assert_eq!(Supervise::new(vec!["./job".into()]).never_restarted().restart, "never");
    /// ```
    #[must_use]
    pub fn new(command: Vec<String>) -> Self {
        Self {
            command,
            working_dir: None,
            restart: "always".into(),
        }
    }

    /// Not restarted.
    #[must_use]
    pub fn never_restarted(mut self) -> Self {
        self.restart = "never".into();
        self
    }
}
