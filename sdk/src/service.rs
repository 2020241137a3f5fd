//! Parts of a stack that keeps one program per service instance running: a port, a health check, an environment, scripts.
//!
//! A stack reads [`Service`] beside its own parameters, puts [`Service::schema`] around its own properties, adds its own
//! steps to a plan, and lets [`Service::steps`] add what all such stacks have. From strongest to weakest a program's
//! environment is: the server's variables, the environment of the instance and the order (which the core adds itself), the
//! parameter `environment`, what the stack gives as a default.
//!
//! ```
//! use serde::Deserialize;
//! use serde_json::json;
//! use windlass_sdk::{
//!     lifecycle::{LifecyclePlan, LifecycleRequest, Phase},
//!     parse_parameters,
//!     service::{Program, Service},
//! };
//!
//! #[derive(Deserialize)]
//! struct Parameters {
//!     script: String,
//!     #[serde(flatten)]
//!     service: Service,
//! }
//!
//! let request = LifecycleRequest::new("shop", &json!({ "script": "run.pl", "port": 8080 }));
//! let parameters: Parameters = parse_parameters(&request.parameters)?;
//! let program = Program::new(["perl", &parameters.script]);
//! let plan = parameters.service.steps(LifecyclePlan::new(), &request, &program)?;
//! assert!(plan.steps.iter().any(|step| step.phase == Phase::Check.code()));
//! # Ok::<(), windlass_sdk::PluginError>(())
//! ```

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::json;

use crate::{
    Environment, PluginError, Script, Value,
    lifecycle::{
        Action, HttpProbe, LifecyclePlan, LifecycleRequest, Phase, Probe, Step, Supervise,
    },
};

/// The variable that holds the port.
pub const PORT: &str = "PORT";

/// How long a script of the parameters may take, in milliseconds.
const SCRIPT_TIMEOUT_MS: u64 = 600_000;

/// The parameters that all stacks of services share. See [`Service::schema`] for their limits.
#[derive(Debug, Clone, Deserialize)]
pub struct Service {
    /// Arguments of the program.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// The port that it listens on.
    pub port: Option<u16>,
    /// How its health is checked; `None`: TCP where there is a port.
    pub health: Option<Health>,
    /// Time between `SIGTERM` and `SIGKILL`, in seconds.
    #[serde(default = "ten")]
    pub stop_grace_s: u64,
    /// OS user; `None`: the agent's own.
    pub run_as: Option<String>,
    /// Environment.
    #[serde(default)]
    pub environment: BTreeMap<String, Variable>,
    /// Whether it is started again when it ends by itself.
    #[serde(default)]
    pub restart: Restart,
    /// Makes the server fit.
    pub prepare_script: Option<String>,
    /// Run in the new release directory before the old release stops.
    pub configure_script: Option<String>,
    /// Run after the switch to the new release, before it starts.
    pub deploy_script: Option<String>,
    /// Run before the application is removed, after it was stopped.
    pub uninstall_script: Option<String>,
}

/// How health is checked.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// By what.
    pub kind: HealthKind,
    /// HTTP: the path.
    #[serde(default = "slash")]
    pub path: String,
    /// HTTP: accepted status codes; empty: any 2xx.
    #[serde(default)]
    pub statuses: Vec<u16>,
    /// HTTP: text that the body must contain.
    pub body_contains: Option<String>,
    /// Script: its text.
    pub script: Option<String>,
    /// Until when it must be good, in seconds.
    #[serde(default = "two_minutes")]
    pub deadline_s: u64,
    /// Time between tries, in milliseconds.
    #[serde(default = "one_second")]
    pub interval_ms: u64,
    /// How long one try may take, in milliseconds.
    #[serde(default = "five_seconds")]
    pub try_timeout_ms: u64,
    /// How long it must be good on end, in seconds.
    #[serde(default)]
    pub healthy_for_s: u64,
}

/// Kinds of health checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthKind {
    /// An HTTP request.
    Http,
    /// A TCP connection.
    Tcp,
    /// A shell script.
    Script,
    /// None at all.
    None,
}

impl Health {
    /// A check of this kind with the defaults of all else.
    #[must_use]
    pub fn new(kind: HealthKind) -> Self {
        Self {
            kind,
            path: slash(),
            statuses: Vec::new(),
            body_contains: None,
            script: None,
            deadline_s: two_minutes(),
            interval_ms: one_second(),
            try_timeout_ms: five_seconds(),
            healthy_for_s: 0,
        }
    }
}

/// Whether a program that ended by itself is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Restart {
    /// Whenever it ends and nobody stopped it.
    #[default]
    Always,
    /// Never.
    Never,
}

/// A variable of the parameters: text, or `{"secret_ref": "name"}`.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Variable {
    /// Text.
    Plain(String),
    /// The name of a secret.
    Secret {
        /// Its name.
        secret_ref: String,
    },
}

impl Variable {
    /// As a value of the contract.
    #[must_use]
    pub fn value(&self) -> Value {
        match self {
            Self::Plain(text) => Value::plain(text.clone()),
            Self::Secret { secret_ref } => Value::SecretRef(secret_ref.clone()),
        }
    }
}

/// The program that a stack starts.
#[derive(Debug, Clone)]
pub struct Program {
    /// Program and arguments, those of the parameters not among them.
    pub command: Vec<String>,
    /// Variables that it gets unless something above them sets them.
    pub defaults: Vec<(String, Value)>,
    /// A release does not replace it where it runs with the same command: the stack's own step tells it of the new release.
    pub keeps_running: bool,
}

impl Program {
    /// A program and its arguments; `${NAME}` in them is replaced by the environment variable NAME.
    #[must_use]
    pub fn new<S: Into<String>>(command: impl IntoIterator<Item = S>) -> Self {
        Self {
            command: command.into_iter().map(Into::into).collect(),
            defaults: Vec::new(),
            keeps_running: false,
        }
    }

    /// A variable that it gets unless something above it sets it.
    #[must_use]
    pub fn default_env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.defaults.push((name.into(), Value::plain(value)));
        self
    }

    /// Kept running over releases; see [`Step::kept_running`].
    #[must_use]
    pub fn keeps_running(mut self) -> Self {
        self.keeps_running = true;
        self
    }
}

fn ten() -> u64 {
    10
}

fn slash() -> String {
    "/".into()
}

fn two_minutes() -> u64 {
    120
}

fn one_second() -> u64 {
    1_000
}

fn five_seconds() -> u64 {
    5_000
}

impl Service {
    /// The schema of a stack's parameters: its own properties (an object of schemas) beside those of [`Service`].
    ///
    /// # Panics
    /// When `own` is not a JSON object: a fault of the plugin, seen by its first test.
    #[must_use]
    pub fn schema(own: &serde_json::Value) -> serde_json::Value {
        let mut properties = properties();
        let all = properties.as_object_mut().expect("it is one");
        let own = own.as_object().expect("properties are an object");
        all.extend(
            own.iter()
                .map(|(name, schema)| (name.clone(), schema.clone())),
        );
        json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "additionalProperties": false,
            "properties": properties,
        })
    }

    /// Adds what all services have to the stack's own steps: the scripts of the parameters, stop, start, check, restart,
    /// uninstall, and each server's environment. The stack's own steps of a phase come first.
    ///
    /// # Errors
    /// `invalid-parameter` when a health check lacks what it needs.
    pub fn steps(
        &self,
        plan: LifecyclePlan,
        request: &LifecycleRequest,
        program: &Program,
    ) -> Result<LifecyclePlan, PluginError> {
        let user = self.run_as.as_deref();
        let mut plan = plan;
        for (phase, name, text) in [
            (Phase::Prepare, "prepare", &self.prepare_script),
            (Phase::Configure, "configure", &self.configure_script),
            (Phase::Deploy, "deploy", &self.deploy_script),
        ] {
            if request.wants(phase)
                && let Some(text) = text
            {
                plan = plan.step(self.script(phase, name, text));
            }
        }
        let grace_ms = self.stop_grace_s.saturating_mul(1000);
        let stop = |phase| Step::stop(phase, "stop", grace_ms).run_as(user);
        let start = |phase| {
            let step = Step::start(phase, "start", self.supervise(program)).run_as(user);
            if program.keeps_running {
                step.kept_running()
            } else {
                step
            }
        };
        if request.wants(Phase::Stop) {
            plan = plan.step(stop(Phase::Stop));
        }
        if request.wants(Phase::Start) {
            // Before the stack's own steps of the phase, which talk to the program.
            let at = plan
                .steps
                .iter()
                .position(|step| step.phase == Phase::Start.code())
                .unwrap_or(plan.steps.len());
            plan.steps.insert(at, start(Phase::Start));
        }
        if request.wants(Phase::Check)
            && let Some(step) = self.check(program, request)?
        {
            plan = plan.step(step.run_as(user));
        }
        if request.wants(Phase::Restart) {
            plan = plan.step(stop(Phase::Restart)).step(start(Phase::Restart));
        }
        if request.wants(Phase::Uninstall) {
            plan = plan.step(stop(Phase::Uninstall));
            if let Some(text) = &self.uninstall_script {
                plan = plan.step(self.script(Phase::Uninstall, "uninstall", text));
            }
        }
        for server in &request.servers {
            let env = self.server_env(program, &request.env, &server.variables);
            plan = plan.server_env(&server.id, env);
        }
        Ok(plan)
    }

    /// A script as the service's user, with ten minutes' time.
    #[must_use]
    pub fn script(&self, phase: Phase, name: &str, text: &str) -> Step {
        Step::script(phase, name, text)
            .timeout_ms(SCRIPT_TIMEOUT_MS)
            .run_as(self.run_as.as_deref())
    }

    fn supervise(&self, program: &Program) -> Supervise {
        let mut command = program.command.clone();
        command.extend(self.arguments.iter().cloned());
        let supervise = Supervise::new(command);
        match self.restart {
            Restart::Always => supervise,
            Restart::Never => supervise.never_restarted(),
        }
    }

    fn check(
        &self,
        program: &Program,
        request: &LifecycleRequest,
    ) -> Result<Option<Step>, PluginError> {
        let default = Health::new(if self.port.is_some() {
            HealthKind::Tcp
        } else {
            HealthKind::None
        });
        let health = self.health.as_ref().unwrap_or(&default);
        let probe = match health.kind {
            HealthKind::None => return Ok(None),
            HealthKind::Script => {
                let text = health.script.as_deref().ok_or_else(|| {
                    PluginError::invalid_parameter("/health/script", "is needed for kind `script`")
                })?;
                Probe::Script(Script::shell(text))
            }
            HealthKind::Http => {
                self.need_port(program, request)?;
                Probe::Http(HttpProbe {
                    url: format!("http://127.0.0.1:${{{PORT}}}{}", health.path),
                    statuses: health.statuses.clone(),
                    body_contains: health.body_contains.clone(),
                })
            }
            HealthKind::Tcp => {
                self.need_port(program, request)?;
                Probe::Tcp(format!("127.0.0.1:${{{PORT}}}"))
            }
        };
        Ok(Some(checked(Phase::Check, "health check", probe, health)))
    }

    /// That every server knows its port: a check over the network cannot be written down without.
    ///
    /// # Errors
    /// `invalid-parameter` with the first server that has none.
    pub fn need_port(
        &self,
        program: &Program,
        request: &LifecycleRequest,
    ) -> Result<(), PluginError> {
        if self.port.is_some()
            || self.environment.contains_key(PORT)
            || program.defaults.iter().any(|(name, _)| name == PORT)
            || request.env.iter().any(|(name, _)| name == PORT)
        {
            return Ok(());
        }
        match request
            .servers
            .iter()
            .find(|server| !server.variables.iter().any(|(name, _)| name == PORT))
        {
            None => Ok(()),
            Some(server) => Err(PluginError::invalid_parameter(
                "/port",
                format!(
                    "the health check needs a port: set `port`, or the variable PORT of server {}",
                    server.name
                ),
            )),
        }
    }

    /// The environment of one server: what nothing above it sets, then the server's own variables.
    fn server_env(
        &self,
        program: &Program,
        common: &Environment,
        variables: &[(String, String)],
    ) -> Environment {
        let mut env: BTreeMap<String, Value> = program.defaults.iter().cloned().collect();
        if let Some(port) = self.port {
            env.insert(PORT.into(), Value::plain(port.to_string()));
        }
        for (name, variable) in &self.environment {
            env.insert(name.clone(), variable.value());
        }
        for (name, _) in common {
            env.remove(name);
        }
        for (name, value) in variables {
            env.insert(name.clone(), Value::plain(value.clone()));
        }
        env.into_iter().collect()
    }
}

/// A program that an application needs on its server: looked for in the phase `prepare`, installed in the phase `install`
/// where a Debian package is named.
#[derive(Debug, Clone)]
pub struct Runtime<'a> {
    /// The program: a name in `PATH` or an absolute path.
    pub command: &'a str,
    /// The option that makes it print its version.
    pub version_option: &'a str,
    /// What finds the version in what it prints then, on either output: a command of `sed -nE` that prints it.
    pub version_of: &'a str,
    /// The lowest version that will do, for example `17`; `None`: any.
    pub minimum: Option<&'a str>,
    /// The Debian package to install where the program is missing or too old; `None`: nothing is installed.
    pub package: Option<&'a str>,
    /// The package that an error names.
    pub suggestion: &'a str,
    /// Whom the application runs as, see [`Service::run_as`].
    pub run_as: Option<&'a str>,
}

/// Prints the version where it will do; else says what is wrong in `problem`.
const LOOK: &str = r#"look() {
    if ! command -v "$RUNTIME" >/dev/null 2>&1; then
        problem="$RUNTIME is not installed on this server"
        return 1
    fi
    said=$("$RUNTIME" "$RUNTIME_VERSION_OPTION" 2>&1) || true
    found=$(printf '%s\n' "$said" | sed -nE "$RUNTIME_VERSION_OF" | head -n 1)
    if [ -z "$found" ]; then
        problem="$RUNTIME $RUNTIME_VERSION_OPTION names no version: $said"
        return 1
    fi
    if [ -n "$RUNTIME_MINIMUM" ] && [ "$(printf '%s\n%s\n' "$RUNTIME_MINIMUM" "$found" | sort -V | head -n 1)" != "$RUNTIME_MINIMUM" ]; then
        problem="$RUNTIME is version $found on this server, at least $RUNTIME_MINIMUM is needed"
        return 1
    fi
    echo "$RUNTIME $found"
}
"#;

const PREPARE: &str = r#"if look; then exit 0; fi
if [ -n "$RUNTIME_PACKAGE" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "$problem: the next step installs $RUNTIME_PACKAGE"
        exit 0
    fi
    echo "$problem, and installing $RUNTIME_PACKAGE needs root and apt-get. Run: sudo apt-get install -y $RUNTIME_PACKAGE" >&2
    exit 1
fi
echo "$problem. Install it (for example: sudo apt-get install -y $RUNTIME_SUGGESTION), or set the parameter runtime_package" >&2
exit 1
"#;

const INSTALL: &str = r#"if look; then exit 0; fi
export DEBIAN_FRONTEND=noninteractive
apt-get -o DPkg::Lock::Timeout=300 update
apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$RUNTIME_PACKAGE"
look || { echo "$problem, although $RUNTIME_PACKAGE was installed" >&2; exit 1; }
"#;

impl Runtime<'_> {
    /// Adds the steps that look for it and install it: as the application's user, or, where something may have to be installed,
    /// as the agent's own, who alone may be root.
    #[must_use]
    pub fn steps(&self, mut plan: LifecyclePlan, request: &LifecycleRequest) -> LifecyclePlan {
        let step = |phase, name: &str, text: &str| {
            Step::script(phase, name, format!("{LOOK}{text}"))
                .timeout_ms(SCRIPT_TIMEOUT_MS)
                .env("RUNTIME", Value::plain(self.command))
                .env("RUNTIME_VERSION_OPTION", Value::plain(self.version_option))
                .env("RUNTIME_VERSION_OF", Value::plain(self.version_of))
                .env(
                    "RUNTIME_MINIMUM",
                    Value::plain(self.minimum.unwrap_or_default()),
                )
                .env(
                    "RUNTIME_PACKAGE",
                    Value::plain(self.package.unwrap_or_default()),
                )
                .env("RUNTIME_SUGGESTION", Value::plain(self.suggestion))
                .run_as(self.run_as.filter(|_| self.package.is_none()))
                .repeatable()
        };
        if request.wants(Phase::Prepare) {
            plan = plan.step(step(Phase::Prepare, "look for the runtime", PREPARE));
        }
        if request.wants(Phase::Install) && self.package.is_some() {
            plan = plan.step(step(Phase::Install, "install the runtime", INSTALL));
        }
        plan
    }

    /// The schemas of the parameters `runtime_version` and `runtime_package`.
    #[must_use]
    pub fn properties() -> serde_json::Value {
        json!({
            "runtime_version": {
                "type": "string", "pattern": "^[0-9]+(\\.[0-9]+)*$", "maxLength": 40,
                "description": "The lowest version of the runtime that will do; it is looked for in the phase `prepare`."
            },
            "runtime_package": {
                "type": "string", "pattern": "^[a-z0-9][a-z0-9+.-]+$", "maxLength": 100,
                "description": "A Debian package that is installed where the runtime is missing or too old; needs an agent that runs as root. Default: nothing is installed."
            }
        })
    }
}

/// A path below the release directory as a parameter's schema: relative, without `..`.
#[must_use]
pub fn path_schema(description: &str) -> serde_json::Value {
    // Every part begins with something else than a dot, or with a dot and something else.
    json!({
        "type": "string", "maxLength": 1000, "description": description,
        "pattern": "^([A-Za-z0-9_@+-]|\\.[A-Za-z0-9_@+-])[A-Za-z0-9_@+.-]*(/([A-Za-z0-9_@+-]|\\.[A-Za-z0-9_@+-])[A-Za-z0-9_@+.-]*)*$"
    })
}

/// A text in a command where nothing is to be replaced.
#[must_use]
pub fn literal(text: &str) -> String {
    text.replace("${", "$${")
}

/// A check with the figures of a [`Health`].
#[must_use]
pub fn checked(phase: Phase, name: &str, probe: Probe, health: &Health) -> Step {
    let mut step =
        Step::check(phase, name, probe).timeout_ms(health.deadline_s.saturating_mul(1000));
    if let Action::Check(check) = &mut step.action {
        check.interval_ms = health.interval_ms;
        check.try_timeout_ms = health.try_timeout_ms;
        check.healthy_for_ms = health.healthy_for_s.saturating_mul(1000);
    }
    step
}

fn properties() -> serde_json::Value {
    let script = |description: &str| json!({ "type": "string", "maxLength": 16384, "description": description });
    json!({
        "arguments": {
            "type": "array", "maxItems": 200, "items": { "type": "string", "maxLength": 4096 },
            "description": "Its arguments. ${NAME} is replaced by the environment variable NAME."
        },
        "port": {
            "type": "integer", "minimum": 1, "maximum": 65535,
            "description": "The port that it listens on; it finds it in the environment variable PORT. A server's own variable PORT stands above it."
        },
        "health": {
            "type": "object", "additionalProperties": false, "required": ["kind"],
            "description": "How its health is checked. Default: tcp where a port is given, else none.",
            "properties": {
                "kind": { "enum": ["http", "tcp", "script", "none"] },
                "path": { "type": "string", "pattern": "^/", "maxLength": 2000, "default": "/", "description": "http: the path." },
                "statuses": {
                    "type": "array", "maxItems": 50, "items": { "type": "integer", "minimum": 100, "maximum": 599 },
                    "description": "http: accepted status codes. Default: any 2xx."
                },
                "body_contains": { "type": "string", "maxLength": 1000, "description": "http: text that the body must contain." },
                "script": { "type": "string", "maxLength": 16384, "description": "script: a shell script that exits with 0." },
                "deadline_s": { "type": "integer", "minimum": 1, "maximum": 3600, "default": 120 },
                "interval_ms": { "type": "integer", "minimum": 100, "maximum": 60000, "default": 1000 },
                "try_timeout_ms": { "type": "integer", "minimum": 100, "maximum": 60000, "default": 5000 },
                "healthy_for_s": { "type": "integer", "minimum": 0, "maximum": 3600, "default": 0 }
            },
            "if": { "properties": { "kind": { "const": "script" } } },
            "then": { "required": ["script"] }
        },
        "stop_grace_s": {
            "type": "integer", "minimum": 0, "maximum": 600, "default": 10,
            "description": "Time between SIGTERM and SIGKILL."
        },
        "run_as": {
            "type": "string", "pattern": "^[a-z_][a-z0-9_-]{0,31}$",
            "description": "OS user. Default: the agent's own. Others need an approved wish."
        },
        "environment": {
            "type": "object", "maxProperties": 200, "propertyNames": { "pattern": "^[A-Za-z_][A-Za-z0-9_]*$" },
            "additionalProperties": {
                "oneOf": [
                    { "type": "string", "maxLength": 8192 },
                    {
                        "type": "object", "additionalProperties": false, "required": ["secret_ref"],
                        "properties": { "secret_ref": { "type": "string", "minLength": 1, "maxLength": 200 } }
                    }
                ]
            }
        },
        "restart": {
            "enum": ["always", "never"], "default": "always",
            "description": "Whether it is started again when it ends by itself."
        },
        "prepare_script": script("Makes the server fit; run once per server and stack version."),
        "configure_script": script("Run in the new release directory before the old release stops."),
        "deploy_script": script("Run after the switch to the new release, before it starts."),
        "uninstall_script": script("Run when the application is removed, after it was stopped.")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ServerFacts;

    fn service(parameters: &serde_json::Value) -> Service {
        serde_json::from_value(parameters.clone()).unwrap()
    }

    fn request(parameters: &serde_json::Value) -> LifecycleRequest {
        LifecycleRequest::new("shop", parameters)
            .server(ServerFacts::new("s1", "one"))
            .server(ServerFacts::new("s2", "two").variable("PORT", "9001"))
    }

    fn plan(parameters: &serde_json::Value, program: &Program) -> LifecyclePlan {
        let own = LifecyclePlan::new()
            .step(Step::script(Phase::Configure, "own", "true"))
            .step(Step::script(Phase::Start, "reload", "true"));
        service(parameters)
            .steps(own, &request(parameters), program)
            .unwrap()
    }

    fn names(plan: &LifecyclePlan, phase: Phase) -> Vec<&str> {
        let of = plan.steps.iter().filter(|step| step.phase == phase.code());
        of.map(|step| step.name.as_str()).collect()
    }

    #[test]
    fn the_stacks_own_steps_come_first_but_after_the_start() {
        let all = json!({ "port": 1, "prepare_script": "a", "configure_script": "b", "deploy_script": "c", "uninstall_script": "d" });
        let plan = plan(&all, &Program::new(["x"]));
        for (phase, expect) in [
            (Phase::Prepare, &["prepare"][..]),
            (Phase::Configure, &["own", "configure"]),
            (Phase::Stop, &["stop"]),
            (Phase::Deploy, &["deploy"]),
            (Phase::Start, &["start", "reload"]),
            (Phase::Check, &["health check"]),
            (Phase::Restart, &["stop", "start"]),
            (Phase::Uninstall, &["stop", "uninstall"]),
        ] {
            assert_eq!(names(&plan, phase), expect, "{phase:?}");
        }
    }

    #[test]
    fn a_programs_defaults_are_the_weakest() {
        let program = Program::new(["x"])
            .default_env("NODE_ENV", "production")
            .default_env("A", "default")
            .keeps_running();
        let parameters = json!({ "port": 8080, "environment": { "A": "parameter", "B": { "secret_ref": "b" } } });
        let mut request = request(&parameters);
        request.env = vec![("NODE_ENV".into(), Value::plain("test"))];
        let plan = service(&parameters)
            .steps(LifecyclePlan::new(), &request, &program)
            .unwrap();
        assert_eq!(
            plan.server_env[0].env,
            [
                ("A".into(), Value::plain("parameter")),
                ("B".into(), Value::SecretRef("b".into())),
                ("PORT".into(), Value::plain("8080")),
            ]
        );
        let second = &plan.server_env[1].env;
        assert!(second.contains(&("PORT".into(), Value::plain("9001"))));
        let start = plan.steps.iter().find(|step| step.name == "start").unwrap();
        assert_eq!(
            start.attributes,
            [("keep-running".to_owned(), "true".to_owned())]
        );
    }

    #[test]
    fn a_schema_holds_both_kinds_of_properties() {
        let schema = Service::schema(&json!({ "jar": { "type": "string" } }));
        for name in ["jar", "port", "health", "deploy_script"] {
            assert!(schema["properties"][name].is_object(), "{name}");
        }
        assert_eq!(schema["additionalProperties"], false);
    }
}
