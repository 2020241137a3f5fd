//! The tech stack `binary`: any executable, started, checked, stopped and kept running.
//!
//! The program is the package's own file, or a named file in an unpacked archive. What differs between servers is
//! environment: a server's variables stand above everything else, so that three servers on one machine can each have their
//! `PORT`. From strongest to weakest: the server's variables, the environment of the instance and the order (which the
//! core adds itself), the parameters.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::json;
use windlass_sdk::{
    Descriptor, Environment, PluginError, Script, TechStack, Value,
    lifecycle::{HttpProbe, LifecyclePlan, LifecycleRequest, Phase, Probe, Step, Supervise},
    parse_parameters,
};

/// The plugin.
#[derive(Debug)]
pub struct Binary;

/// The variable that holds the port.
const PORT: &str = "PORT";
/// The OS user that the plugin wishes for.
const USER: &str = "app";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    program: Option<String>,
    #[serde(default)]
    arguments: Vec<String>,
    port: Option<u16>,
    health: Option<Health>,
    #[serde(default = "ten")]
    stop_grace_s: u64,
    run_as: Option<String>,
    #[serde(default)]
    environment: BTreeMap<String, Variable>,
    #[serde(default)]
    restart: Restart,
    prepare_script: Option<String>,
    configure_script: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Health {
    kind: HealthKind,
    #[serde(default = "slash")]
    path: String,
    #[serde(default)]
    statuses: Vec<u16>,
    body_contains: Option<String>,
    script: Option<String>,
    #[serde(default = "two_minutes")]
    deadline_s: u64,
    #[serde(default = "one_second")]
    interval_ms: u64,
    #[serde(default = "five_seconds")]
    try_timeout_ms: u64,
    #[serde(default)]
    healthy_for_s: u64,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum HealthKind {
    Http,
    Tcp,
    Script,
    None,
}

#[derive(Deserialize, Clone, Copy, Default)]
#[serde(rename_all = "lowercase")]
enum Restart {
    #[default]
    Always,
    Never,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Variable {
    Plain(String),
    Secret { secret_ref: String },
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

impl TechStack for Binary {
    fn describe() -> Descriptor {
        Descriptor::new("binary", "1.0.0")
            .title("Any executable")
            .summary(
                "Runs one executable per service instance: the package's own file, or a named file in its archive. \
                 Health by HTTP, TCP or a script.",
            )
            .provider("Windlass")
            .category("general")
            .operating_system("linux")
            .wish_user(USER)
            .parameters(&schema())
            .preset(
                "http-service",
                "A service that answers HTTP",
                &json!({ "port": 8080, "health": { "kind": "http", "path": "/" } }),
            )
    }

    fn lifecycle(request: LifecycleRequest) -> Result<LifecyclePlan, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let user = parameters.run_as.as_deref();
        let mut plan = LifecyclePlan::new();
        let script = |phase, name, text: &str| {
            Step::script(phase, name, text)
                .timeout_ms(600_000)
                .run_as(user)
        };
        if request.wants(Phase::Prepare)
            && let Some(text) = &parameters.prepare_script
        {
            plan = plan.step(script(Phase::Prepare, "prepare", text));
        }
        if request.wants(Phase::Configure)
            && let Some(text) = &parameters.configure_script
        {
            plan = plan.step(script(Phase::Configure, "configure", text));
        }
        let grace_ms = parameters.stop_grace_s.saturating_mul(1000);
        let stop = |phase| Step::stop(phase, "stop", grace_ms).run_as(user);
        if request.wants(Phase::Stop) {
            plan = plan.step(stop(Phase::Stop));
        }
        if request.wants(Phase::Start) {
            let supervise = supervise(&parameters, &request)?;
            plan = plan.step(Step::start(Phase::Start, "start", supervise).run_as(user));
        }
        if request.wants(Phase::Check)
            && let Some(step) = check(&parameters, &request)?
        {
            plan = plan.step(step.run_as(user));
        }
        if request.wants(Phase::Restart) {
            let supervise = supervise(&parameters, &request)?;
            plan = plan
                .step(stop(Phase::Restart))
                .step(Step::start(Phase::Restart, "start", supervise).run_as(user));
        }
        if request.wants(Phase::Uninstall) {
            plan = plan.step(stop(Phase::Uninstall));
        }
        for server in &request.servers {
            plan = plan.server_env(
                &server.id,
                server_env(&parameters, &request.env, &server.variables),
            );
        }
        Ok(plan)
    }
}

fn schema() -> serde_json::Value {
    let name = "^[A-Za-z_][A-Za-z0-9_]*$";
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "program": {
                "type": "string", "minLength": 1, "maxLength": 4096,
                "description": "The executable, relative to the release directory. Default: the package's own file; needed where the package is an archive."
            },
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
                "type": "object", "maxProperties": 200, "propertyNames": { "pattern": name },
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
            "prepare_script": { "type": "string", "maxLength": 16384, "description": "Makes the server fit; run once per server and stack version." },
            "configure_script": { "type": "string", "maxLength": 16384, "description": "Run in the new release directory before the old release stops." }
        }
    })
}

fn supervise(
    parameters: &Parameters,
    request: &LifecycleRequest,
) -> Result<Supervise, PluginError> {
    let program = match (&parameters.program, &request.package) {
        (Some(program), _) => program.clone(),
        (None, Some(package)) if matches!(package.format.as_str(), "plain" | "jar") => {
            package.file_name.clone()
        }
        (None, Some(package)) => {
            return Err(PluginError::invalid_parameter(
                "/program",
                format!(
                    "the package {} is an archive ({}): name the executable in it as `program`",
                    package.file_name, package.format
                ),
            ));
        }
        (None, None) => {
            return Err(PluginError::invalid_parameter(
                "/program",
                "there is no package: name the executable as `program`",
            ));
        }
    };
    // A bare name would be looked up in PATH.
    let program = if program.starts_with('/') || program.starts_with("./") {
        program
    } else {
        format!("./{program}")
    };
    let mut command = vec![program];
    command.extend(parameters.arguments.iter().cloned());
    let supervise = Supervise::new(command);
    Ok(match parameters.restart {
        Restart::Always => supervise,
        Restart::Never => supervise.never_restarted(),
    })
}

fn check(parameters: &Parameters, request: &LifecycleRequest) -> Result<Option<Step>, PluginError> {
    let default = Health {
        kind: if parameters.port.is_some() {
            HealthKind::Tcp
        } else {
            HealthKind::None
        },
        path: slash(),
        statuses: Vec::new(),
        body_contains: None,
        script: None,
        deadline_s: two_minutes(),
        interval_ms: one_second(),
        try_timeout_ms: five_seconds(),
        healthy_for_s: 0,
    };
    let health = parameters.health.as_ref().unwrap_or(&default);
    let probe = match health.kind {
        HealthKind::None => return Ok(None),
        HealthKind::Script => {
            let text = health.script.as_deref().ok_or_else(|| {
                PluginError::invalid_parameter("/health/script", "is needed for kind `script`")
            })?;
            Probe::Script(Script::shell(text))
        }
        HealthKind::Http => {
            need_port(parameters, request)?;
            Probe::Http(HttpProbe {
                url: format!("http://127.0.0.1:${{{PORT}}}{}", health.path),
                statuses: health.statuses.clone(),
                body_contains: health.body_contains.clone(),
            })
        }
        HealthKind::Tcp => {
            need_port(parameters, request)?;
            Probe::Tcp(format!("127.0.0.1:${{{PORT}}}"))
        }
    };
    let mut step = Step::check(Phase::Check, "health check", probe)
        .timeout_ms(health.deadline_s.saturating_mul(1000));
    if let windlass_sdk::lifecycle::Action::Check(check) = &mut step.action {
        check.interval_ms = health.interval_ms;
        check.try_timeout_ms = health.try_timeout_ms;
        check.healthy_for_ms = health.healthy_for_s.saturating_mul(1000);
    }
    Ok(Some(step))
}

/// Every server must know its port before the health check can be written down.
fn need_port(parameters: &Parameters, request: &LifecycleRequest) -> Result<(), PluginError> {
    if parameters.port.is_some()
        || parameters.environment.contains_key(PORT)
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

/// The environment of one server: parameters that nothing above them sets, then the server's own variables.
fn server_env(
    parameters: &Parameters,
    common: &Environment,
    variables: &[(String, String)],
) -> Environment {
    let mut env: BTreeMap<String, Value> = BTreeMap::new();
    if let Some(port) = parameters.port {
        env.insert(PORT.into(), Value::plain(port.to_string()));
    }
    for (name, variable) in &parameters.environment {
        let value = match variable {
            Variable::Plain(text) => Value::plain(text.clone()),
            Variable::Secret { secret_ref } => Value::SecretRef(secret_ref.clone()),
        };
        env.insert(name.clone(), value);
    }
    for (name, _) in common {
        env.remove(name);
    }
    for (name, value) in variables {
        env.insert(name.clone(), Value::plain(value.clone()));
    }
    env.into_iter().collect()
}

windlass_sdk::tech_stack!(Binary);

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_sdk::{PackageRef, ServerFacts, lifecycle::Action};

    fn request(parameters: &serde_json::Value) -> LifecycleRequest {
        LifecycleRequest::new("shop", parameters)
            .package(PackageRef::new("1", "plain", "shop"))
            .server(ServerFacts::new("s1", "one"))
            .server(ServerFacts::new("s2", "two").variable("PORT", "9001"))
    }

    fn actions(plan: &LifecyclePlan, phase: Phase) -> Vec<&Action> {
        plan.steps
            .iter()
            .filter(|step| step.phase == phase.code())
            .map(|step| &step.action)
            .collect()
    }

    #[test]
    fn a_plain_package_runs_as_it_is() {
        let plan = Binary::lifecycle(request(
            &json!({ "port": 8080, "arguments": ["--port", "${PORT}"] }),
        ))
        .unwrap();
        let [Action::Start(start)] = actions(&plan, Phase::Start)[..] else {
            panic!("{plan:?}");
        };
        assert_eq!(start.command, ["./shop", "--port", "${PORT}"]);
        assert_eq!(start.restart, "always");
        let [Action::Check(check)] = actions(&plan, Phase::Check)[..] else {
            panic!("{plan:?}");
        };
        assert_eq!(check.probe, Probe::Tcp("127.0.0.1:${PORT}".into()));
        assert!(matches!(
            actions(&plan, Phase::Stop)[..],
            [Action::Stop(10_000)]
        ));
        assert_eq!(actions(&plan, Phase::Restart).len(), 2);
        assert!(actions(&plan, Phase::Prepare).is_empty());
    }

    #[test]
    fn a_servers_variables_stand_above_everything() {
        let mut request = request(
            &json!({ "port": 8080, "environment": { "A": "parameter", "B": { "secret_ref": "b" } } }),
        );
        request.env = vec![("A".into(), Value::plain("order"))];
        let plan = Binary::lifecycle(request).unwrap();
        assert_eq!(
            plan.server_env[0].env,
            [
                ("B".into(), Value::SecretRef("b".into())),
                ("PORT".into(), Value::plain("8080")),
            ]
        );
        assert!(
            plan.server_env[1]
                .env
                .contains(&("PORT".into(), Value::plain("9001")))
        );
    }

    #[test]
    fn only_the_asked_phases_are_answered() {
        let mut request = request(&json!({}));
        request.phases = vec!["stop".into(), "clone-something-new".into()];
        let plan = Binary::lifecycle(request).unwrap();
        assert_eq!(plan.steps.len(), 1);
    }

    #[test]
    fn the_health_deadline_is_the_time_out_of_the_check() {
        for (health, expect_ms) in [
            (json!({ "kind": "http", "path": "/healthz" }), 120_000),
            (json!({ "kind": "http", "deadline_s": 5 }), 5_000),
        ] {
            let plan = Binary::lifecycle(request(&json!({ "port": 1, "health": health }))).unwrap();
            let step = plan
                .steps
                .iter()
                .find(|step| step.phase == "check")
                .unwrap();
            assert_eq!(step.timeout_ms, expect_ms);
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut archive = request(&json!({}));
        archive.package = Some(PackageRef::new("1", "tar_gz", "shop.tar.gz"));
        assert_eq!(
            Binary::lifecycle(archive).unwrap_err().field.as_deref(),
            Some("/program")
        );

        let no_port = request(&json!({ "health": { "kind": "http" } }));
        let error = Binary::lifecycle(no_port).unwrap_err();
        assert_eq!(error.field.as_deref(), Some("/port"));
        assert!(error.message.contains("one"), "{}", error.message);
    }

    #[test]
    fn equal_requests_get_equal_answers() {
        let parameters = json!({ "port": 8080, "environment": { "Z": "1", "A": "2" } });
        assert_eq!(
            Binary::lifecycle(request(&parameters)).unwrap(),
            Binary::lifecycle(request(&parameters)).unwrap()
        );
    }
}
