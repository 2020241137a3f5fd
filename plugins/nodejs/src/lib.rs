//! The tech stack `nodejs`: a package with a `package.json`, run by the server's Node.
//!
//! Dependencies come with the package (`bundled`: its `node_modules` is in it), or are installed from its lock file into
//! the new release directory while the old release still runs: from a registry (`registry`), or from an npm cache in the
//! package, without network (`offline`). A server that cannot get them fails before anything was stopped.
//!
//! Where `package.json` names the entry point, it is looked up once, in the release: Node told to run a directory `x` runs a
//! file `x.json` beside it.

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
pub struct NodeJs;

#[derive(Deserialize)]
struct Parameters {
    entry: Option<String>,
    #[serde(default = "node")]
    node: String,
    #[serde(default)]
    node_options: Vec<String>,
    #[serde(default)]
    dependencies: Dependencies,
    registry: Option<String>,
    npm_cache: Option<String>,
    runtime_version: Option<String>,
    runtime_package: Option<String>,
    #[serde(flatten)]
    service: Service,
}

#[derive(Deserialize, Clone, Copy, Default)]
#[serde(rename_all = "lowercase")]
enum Dependencies {
    #[default]
    Bundled,
    Registry,
    Offline,
}

fn node() -> String {
    "node".into()
}

/// The link to what package.json names: Node goes by the file behind it.
const MAIN: &str = ".windlass-main";

const LOOK: &str = r#"if [ "$ENTRY" = . ]; then
    [ -f package.json ] || { echo "the package has no package.json: name its entry point as the parameter entry" >&2; exit 1; }
    main=$("$NODE" -p 'require.resolve(process.cwd() + "/")') || { echo "what package.json names as main is not there: name the entry point as the parameter entry" >&2; exit 1; }
    ln -sfn "$main" .windlass-main
else
    [ -f "$ENTRY" ] || { echo "the package has no file $ENTRY" >&2; exit 1; }
fi
"#;

/// What was installed completely stays as it is: the application may be running from it.
const INSTALL: &str = r#"complete=node_modules/.windlass-complete
if [ -f "$complete" ]; then echo "the dependencies are there already"; exit 0; fi
[ -f package-lock.json ] || [ -f npm-shrinkwrap.json ] || { echo "the package has no package-lock.json: npm ci needs one" >&2; exit 1; }
command -v npm >/dev/null 2>&1 || { echo "npm is not installed on this server. Run: sudo apt-get install -y npm, or bundle node_modules and set dependencies to bundled" >&2; exit 1; }
if [ -n "$NPM_CACHE" ]; then
    [ -d "$NPM_CACHE" ] || { echo "the package has no directory $NPM_CACHE: make it with npm ci --cache $NPM_CACHE" >&2; exit 1; }
    set -- --offline --cache "$PWD/$NPM_CACHE"
else
    set -- --cache "$WINDLASS_DATA_DIR/npm-cache" --prefer-offline
fi
if [ -n "$NPM_REGISTRY" ]; then set -- "$@" --registry "$NPM_REGISTRY"; fi
npm ci --omit=dev --no-audit --no-fund --loglevel=warn "$@"
mkdir -p node_modules
: > "$complete"
"#;

impl TechStack for NodeJs {
    fn describe() -> Descriptor {
        Descriptor::new("nodejs", "1.0.0")
            .title("Node.js application")
            .summary(
                "Runs a Node.js application with the server's Node. Dependencies bundled, from a registry, or offline from a \
                 cache in the package. Health by HTTP, TCP or a script.",
            )
            .provider("Windlass")
            .category("javascript")
            .operating_system("linux")
            .wish_user("app")
            .parameters(&schema())
            .preset(
                "http-service",
                "A service that answers HTTP",
                &json!({ "port": 3000, "health": { "kind": "http", "path": "/" } }),
            )
    }

    fn lifecycle(request: LifecycleRequest) -> Result<LifecyclePlan, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let service = &parameters.service;
        let entry = entry(&parameters, &request)?;
        let runtime = Runtime {
            command: &parameters.node,
            version_option: "--version",
            version_of: r"s/^v([0-9][0-9.]*).*/\1/p",
            minimum: parameters.runtime_version.as_deref(),
            package: parameters.runtime_package.as_deref(),
            suggestion: "nodejs",
            run_as: service.run_as.as_deref(),
        };
        let mut plan = runtime.steps(LifecyclePlan::new(), &request);
        if request.wants(Phase::Configure) {
            plan = plan.step(
                service
                    .script(Phase::Configure, "look at the entry point", LOOK)
                    .env("ENTRY", Value::plain(entry.clone()))
                    .env("NODE", Value::plain(parameters.node.clone()))
                    .repeatable(),
            );
            let cache = match parameters.dependencies {
                Dependencies::Bundled => None,
                Dependencies::Registry => Some(""),
                Dependencies::Offline => {
                    Some(parameters.npm_cache.as_deref().unwrap_or(".npm-cache"))
                }
            };
            if let Some(cache) = cache {
                let registry = parameters.registry.as_deref().unwrap_or_default();
                plan = plan.step(
                    service
                        .script(Phase::Configure, "install dependencies", INSTALL)
                        .env("NPM_CACHE", Value::plain(cache))
                        .env("NPM_REGISTRY", Value::plain(registry))
                        .repeatable(),
                );
            }
        }
        let mut command = vec![parameters.node.clone()];
        command.extend(parameters.node_options.iter().cloned());
        let file = match entry.as_str() {
            "." => MAIN.to_owned(),
            entry => literal(entry),
        };
        command.push(format!("${{WINDLASS_RELEASE_DIR}}/{file}"));
        let program = Program::new(command).default_env("NODE_ENV", "production");
        service.steps(plan, &request, &program)
    }
}

fn schema() -> serde_json::Value {
    let mut own = Runtime::properties();
    let properties = json!({
        "entry": path_schema("The file to run, relative to the release directory. Default: what package.json names as `main`; the package's own file where it is one script."),
        "node": {
            "type": "string", "pattern": "^[A-Za-z0-9_./+-]+$", "maxLength": 1000, "default": "node",
            "description": "The Node to run it with: a name in PATH or an absolute path."
        },
        "node_options": {
            "type": "array", "maxItems": 100, "items": { "type": "string", "minLength": 1, "maxLength": 4096 },
            "description": "Options of Node, for example --max-old-space-size=256."
        },
        "dependencies": {
            "enum": ["bundled", "registry", "offline"], "default": "bundled",
            "description": "bundled: node_modules is in the package. registry: npm ci. offline: npm ci from a cache in the package, without network."
        },
        "registry": {
            "type": "string", "pattern": "^https?://[A-Za-z0-9_.:/@%+~-]+$", "maxLength": 1000,
            "description": "The npm registry. Default: npm's own setting."
        },
        "npm_cache": path_schema("offline: the npm cache, relative to the release directory. Default: .npm-cache.")
    });
    if let (Some(own), Some(properties)) = (own.as_object_mut(), properties.as_object()) {
        own.extend(properties.clone());
    }
    Service::schema(&own)
}

/// The file to run; `.`: what package.json says.
fn entry(parameters: &Parameters, request: &LifecycleRequest) -> Result<String, PluginError> {
    match (&parameters.entry, &request.package) {
        (Some(entry), _) => Ok(entry.clone()),
        (None, Some(package)) if package.format == "plain" => Ok(package.file_name.clone()),
        (None, Some(package)) if package.format == "jar" => Err(PluginError::invalid_parameter(
            "/entry",
            format!(
                "the package {} is a jar: upload a .tar.gz or .zip",
                package.file_name
            ),
        )),
        (None, Some(_) | None) => Ok(".".into()),
    }
}

windlass_sdk::tech_stack!(NodeJs);

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_sdk::{PackageRef, ServerFacts, lifecycle::Action};

    fn plan(parameters: &serde_json::Value, format: &str) -> Result<LifecyclePlan, PluginError> {
        NodeJs::lifecycle(
            LifecycleRequest::new("shop", parameters)
                .package(PackageRef::new("1", format, "shop.js"))
                .server(ServerFacts::new("s1", "one")),
        )
    }

    fn entry_of(plan: &LifecyclePlan) -> &str {
        let start = plan.steps.iter().find_map(|step| match &step.action {
            Action::Start(start) => start.command.last(),
            Action::Script(_)
            | Action::WriteFile(_)
            | Action::Stop(_)
            | Action::Check(_)
            | Action::Extension(_) => None,
        });
        start.expect("a start")
    }

    #[test]
    fn the_entry_point_is_named_or_package_jsons_or_the_package() {
        for (parameters, format, expect) in [
            (
                json!({}),
                "tar_gz",
                "${WINDLASS_RELEASE_DIR}/.windlass-main",
            ),
            (json!({}), "plain", "${WINDLASS_RELEASE_DIR}/shop.js"),
            (
                json!({ "entry": "src/main.js" }),
                "zip",
                "${WINDLASS_RELEASE_DIR}/src/main.js",
            ),
        ] {
            assert_eq!(entry_of(&plan(&parameters, format).unwrap()), expect);
        }
        let jar = plan(&json!({}), "jar").unwrap_err();
        assert_eq!(jar.field.as_deref(), Some("/entry"));
    }

    #[test]
    fn dependencies_are_installed_where_they_are_not_bundled() {
        for (parameters, cache) in [
            (json!({}), None),
            (json!({ "dependencies": "registry" }), Some("")),
            (json!({ "dependencies": "offline" }), Some(".npm-cache")),
            (
                json!({ "dependencies": "offline", "npm_cache": "cache" }),
                Some("cache"),
            ),
        ] {
            let plan = plan(&parameters, "tar_gz").unwrap();
            let step = plan
                .steps
                .iter()
                .find(|step| step.name == "install dependencies");
            let found = step.map(|step| step.env[0].1.clone());
            assert_eq!(found, cache.map(Value::plain), "{parameters}");
        }
    }

    #[test]
    fn it_runs_in_production() {
        let plan = plan(&json!({ "port": 3000 }), "tar_gz").unwrap();
        assert_eq!(
            plan.server_env[0].env,
            [
                ("NODE_ENV".into(), Value::plain("production")),
                ("PORT".into(), Value::plain("3000")),
            ]
        );
    }
}
