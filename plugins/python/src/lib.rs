//! The tech stack `python`: a package run in a virtual environment of its own.
//!
//! Every release has its virtual environment in its own directory, made while the old release still runs: going back to the
//! release before needs nothing from anywhere. Requirements come from wheels in the package, without network (`wheels`), from
//! an index (`index`), or there are none (`none`).

use serde::Deserialize;
use serde_json::json;
use windlass_sdk::{
    Descriptor, PluginError, TechStack, Value,
    lifecycle::{LifecyclePlan, LifecycleRequest, Phase},
    parse_parameters,
    service::{Program, Runtime, Service, literal, path_schema},
};

/// The plugin.
#[derive(Debug)]
pub struct Python;

#[derive(Deserialize)]
struct Parameters {
    module: Option<String>,
    script: Option<String>,
    command: Option<String>,
    #[serde(default = "python3")]
    python: String,
    #[serde(default)]
    dependencies: Dependencies,
    #[serde(default = "requirements")]
    requirements: String,
    #[serde(default = "wheels")]
    wheels: String,
    index_url: Option<String>,
    runtime_version: Option<String>,
    runtime_package: Option<String>,
    #[serde(flatten)]
    service: Service,
}

#[derive(Deserialize, Clone, Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Dependencies {
    #[default]
    None,
    Wheels,
    Index,
}

fn python3() -> String {
    "python3".into()
}

fn requirements() -> String {
    "requirements.txt".into()
}

fn wheels() -> String {
    "wheels".into()
}

/// Makes the environment. One that was made completely stays as it is, because the application may be running from it; what is
/// left of another is made afresh.
const CONFIGURE: &str = r#"complete=.venv/.windlass-complete
if [ -f "$complete" ]; then echo "the environment is there already"; exit 0; fi
rm -rf .venv
if [ "$DEPENDENCIES" = none ]; then
    "$PYTHON" -m venv --without-pip .venv
    : > "$complete"
    exit 0
fi
[ -f "$REQUIREMENTS" ] || { echo "the package has no file $REQUIREMENTS" >&2; exit 1; }
"$PYTHON" -m venv .venv || { echo "$PYTHON cannot make a virtual environment with pip. Run: sudo apt-get install -y python3-venv" >&2; exit 1; }
if [ "$DEPENDENCIES" = wheels ]; then
    [ -d "$WHEELS" ] || { echo "the package has no directory $WHEELS: make it with pip wheel -w $WHEELS -r $REQUIREMENTS" >&2; exit 1; }
    set -- --no-index --find-links "$WHEELS" --no-cache-dir
else
    set -- --cache-dir "$WINDLASS_DATA_DIR/pip-cache"
    if [ -n "$INDEX_URL" ]; then set -- "$@" --index-url "$INDEX_URL"; fi
fi
.venv/bin/python -m pip --disable-pip-version-check --no-input install --only-binary=:all: "$@" -r "$REQUIREMENTS"
: > "$complete"
"#;

impl TechStack for Python {
    fn describe() -> Descriptor {
        Descriptor::new("python", "1.0.0")
            .title("Python application")
            .summary(
                "Runs a Python module, script or command in a virtual environment of each release. Requirements from wheels \
                 in the package, from an index, or none. Health by HTTP, TCP or a script.",
            )
            .provider("Windlass")
            .category("python")
            .operating_system("linux")
            .wish_user("app")
            .parameters(&schema())
            .preset(
                "gunicorn",
                "A WSGI application behind gunicorn, its wheels in the package",
                &json!({
                    "port": 8000, "dependencies": "wheels", "command": "gunicorn",
                    "arguments": ["--bind", "0.0.0.0:${PORT}", "app:app"],
                    "health": { "kind": "http", "path": "/" }
                }),
            )
    }

    fn lifecycle(request: LifecycleRequest) -> Result<LifecyclePlan, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let service = &parameters.service;
        let command = command(&parameters, &request)?;
        let runtime = Runtime {
            command: &parameters.python,
            version_option: "--version",
            version_of: r"s/^Python ([0-9][0-9.]*).*/\1/p",
            minimum: parameters.runtime_version.as_deref(),
            package: parameters.runtime_package.as_deref(),
            suggestion: "python3 python3-venv",
            run_as: service.run_as.as_deref(),
        };
        let mut plan = runtime.steps(LifecyclePlan::new(), &request);
        if request.wants(Phase::Configure) {
            let dependencies = match parameters.dependencies {
                Dependencies::None => "none",
                Dependencies::Wheels => "wheels",
                Dependencies::Index => "index",
            };
            let index = parameters.index_url.as_deref().unwrap_or_default();
            plan = plan.step(
                service
                    .script(Phase::Configure, "make the environment", CONFIGURE)
                    .env("PYTHON", Value::plain(parameters.python.clone()))
                    .env("DEPENDENCIES", Value::plain(dependencies))
                    .env(
                        "REQUIREMENTS",
                        Value::plain(parameters.requirements.clone()),
                    )
                    .env("WHEELS", Value::plain(parameters.wheels.clone()))
                    .env("INDEX_URL", Value::plain(index))
                    .repeatable(),
            );
        }
        let program = Program::new(command).default_env("PYTHONUNBUFFERED", "1");
        service.steps(plan, &request, &program)
    }
}

fn schema() -> serde_json::Value {
    let mut own = Runtime::properties();
    let properties = json!({
        "module": {
            "type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*(\\.[A-Za-z_][A-Za-z0-9_]*)*$", "maxLength": 200,
            "description": "A module to run (python -m). One of module, script and command; default: the package's own file where it is one script."
        },
        "script": path_schema("A script to run, relative to the release directory."),
        "command": {
            "type": "string", "pattern": "^[A-Za-z0-9_.-]+$", "maxLength": 200,
            "description": "A program of the virtual environment to run, for example gunicorn."
        },
        "python": {
            "type": "string", "pattern": "^[A-Za-z0-9_./+-]+$", "maxLength": 1000, "default": "python3",
            "description": "The Python that makes the virtual environment: a name in PATH or an absolute path."
        },
        "dependencies": {
            "enum": ["none", "wheels", "index"], "default": "none",
            "description": "none: the standard library only. wheels: from wheels in the package, without network. index: from a package index, wheels only."
        },
        "requirements": path_schema("The requirements, relative to the release directory. Default: requirements.txt."),
        "wheels": path_schema("The directory of wheels, relative to the release directory. Default: wheels."),
        "index_url": {
            "type": "string", "pattern": "^https?://[A-Za-z0-9_.:/@%+~-]+$", "maxLength": 1000,
            "description": "The package index. Default: pip's own setting."
        }
    });
    if let (Some(own), Some(properties)) = (own.as_object_mut(), properties.as_object()) {
        own.extend(properties.clone());
    }
    Service::schema(&own)
}

fn command(
    parameters: &Parameters,
    request: &LifecycleRequest,
) -> Result<Vec<String>, PluginError> {
    let bin = "${WINDLASS_RELEASE_DIR}/.venv/bin";
    let python = format!("{bin}/python");
    let release = |file: &str| format!("${{WINDLASS_RELEASE_DIR}}/{}", literal(file));
    let Parameters {
        module,
        script,
        command,
        ..
    } = parameters;
    let own_file = request
        .package
        .as_ref()
        .filter(|package| package.format == "plain")
        .map(|package| package.file_name.as_str());
    match (module, script, command, own_file) {
        (Some(module), None, None, _) => Ok(vec![python, "-m".into(), module.clone()]),
        (None, Some(script), None, _) => Ok(vec![python, release(script)]),
        (None, None, Some(command), _) => Ok(vec![format!("{bin}/{command}")]),
        (None, None, None, Some(file)) => Ok(vec![python, release(file)]),
        (None, None, None, None) => Err(PluginError::invalid_parameter(
            "/module",
            "what is to be run? Give one of `module`, `script` and `command`",
        )),
        (_, _, _, _) => Err(PluginError::invalid_parameter(
            "/module",
            "more than one of `module`, `script` and `command` is given: choose one",
        )),
    }
}

windlass_sdk::tech_stack!(Python);

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_sdk::{PackageRef, ServerFacts, lifecycle::Action};

    fn plan(parameters: &serde_json::Value, format: &str) -> Result<LifecyclePlan, PluginError> {
        Python::lifecycle(
            LifecycleRequest::new("shop", parameters)
                .package(PackageRef::new("1", format, "shop.py"))
                .server(ServerFacts::new("s1", "one")),
        )
    }

    fn command_of(plan: &LifecyclePlan) -> &[String] {
        let start = plan.steps.iter().find_map(|step| match &step.action {
            Action::Start(start) => Some(&start.command),
            Action::Script(_)
            | Action::WriteFile(_)
            | Action::Stop(_)
            | Action::Check(_)
            | Action::Extension(_) => None,
        });
        start.expect("a start")
    }

    #[test]
    fn what_is_run_is_named_once() {
        const BIN: &str = "${WINDLASS_RELEASE_DIR}/.venv/bin";
        let python = format!("{BIN}/python");
        for (parameters, format, expect) in [
            (
                json!({ "module": "shop.web", "arguments": ["-v"] }),
                "tar_gz",
                vec![python.as_str(), "-m", "shop.web", "-v"],
            ),
            (
                json!({ "script": "run.py" }),
                "zip",
                vec![&python, "${WINDLASS_RELEASE_DIR}/run.py"],
            ),
            (
                json!({ "command": "gunicorn" }),
                "tar_gz",
                vec!["${WINDLASS_RELEASE_DIR}/.venv/bin/gunicorn"],
            ),
            (
                json!({}),
                "plain",
                vec![&python, "${WINDLASS_RELEASE_DIR}/shop.py"],
            ),
        ] {
            assert_eq!(command_of(&plan(&parameters, format).unwrap()), expect);
        }
        for parameters in [json!({}), json!({ "module": "a", "script": "b" })] {
            let error = plan(&parameters, "tar_gz").unwrap_err();
            assert_eq!(error.field.as_deref(), Some("/module"), "{error:?}");
        }
    }

    #[test]
    fn every_release_makes_its_own_environment() {
        let parameters = json!({ "module": "shop", "dependencies": "wheels" });
        let plan = plan(&parameters, "tar_gz").unwrap();
        let step = plan
            .steps
            .iter()
            .find(|step| step.phase == "configure")
            .unwrap();
        assert!(step.repeatable);
        assert!(
            step.env
                .contains(&("DEPENDENCIES".into(), Value::plain("wheels")))
        );
        assert!(
            plan.server_env[0]
                .env
                .contains(&("PYTHONUNBUFFERED".into(), Value::plain("1")))
        );
    }
}
