//! The tech stack `java-jar`: one jar with everything in it (Spring Boot style), run by a Java of the server.
//!
//! The jar is the package itself, or a named file in an unpacked archive. It is stopped with `SIGTERM`, on which a Java
//! program runs its shutdown hooks. The port stands in `PORT` and, for Spring Boot, in `SERVER_PORT`.

use serde::Deserialize;
use serde_json::json;
use windlass_sdk::{
    Descriptor, Environment, PluginError, TechStack, Value,
    lifecycle::{LifecyclePlan, LifecycleRequest, Phase},
    parse_parameters,
    service::{PORT, Program, Runtime, Service, literal, path_schema},
};

/// Where Spring Boot finds its port.
const SERVER_PORT: &str = "SERVER_PORT";

/// The plugin.
#[derive(Debug)]
pub struct JavaJar;

#[derive(Deserialize)]
struct Parameters {
    jar: Option<String>,
    #[serde(default = "java")]
    java: String,
    #[serde(default)]
    jvm_options: Vec<String>,
    runtime_version: Option<String>,
    runtime_package: Option<String>,
    #[serde(flatten)]
    service: Service,
}

fn java() -> String {
    "java".into()
}

/// Behind what `JAVA_TOOL_OPTIONS` makes it say; Java 8 calls itself 1.8.
const VERSION_OF: &str = r#"s/^[a-z]+ version "(1\.)?([0-9][0-9.]*).*/\2/p"#;

/// A jar is a zip, which is found from its end: executable jars begin with a script.
const CONFIGURE: &str = r#"[ -f "$JAR" ] || { echo "the package has no file $JAR: name the jar in it as the parameter jar" >&2; exit 1; }
tail -c 65557 "$JAR" | LC_ALL=C tr '\000\n' '  ' | LC_ALL=C grep -q "$(printf 'PK\005\006')" || { echo "$JAR is not a jar" >&2; exit 1; }
"#;

impl TechStack for JavaJar {
    fn describe() -> Descriptor {
        Descriptor::new("java-jar", "1.0.0")
            .title("Java: one executable jar")
            .summary(
                "Runs a fat jar (Spring Boot and the like) with the server's Java. JVM options, graceful stop, health by \
                 HTTP, TCP or a script. Can install Java from a Debian package.",
            )
            .provider("Windlass")
            .category("java")
            .operating_system("linux")
            .wish_user("app")
            .parameters(&schema())
            .preset(
                "spring-boot",
                "A Spring Boot service with the actuator",
                &json!({
                    "port": 8080, "runtime_version": "17", "stop_grace_s": 30,
                    "health": { "kind": "http", "path": "/actuator/health", "body_contains": "\"UP\"" }
                }),
            )
    }

    fn lifecycle(request: LifecycleRequest) -> Result<LifecyclePlan, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let service = &parameters.service;
        let jar = jar(&parameters, &request)?;
        let runtime = Runtime {
            command: &parameters.java,
            version_option: "-version",
            version_of: VERSION_OF,
            minimum: parameters.runtime_version.as_deref(),
            package: parameters.runtime_package.as_deref(),
            suggestion: "openjdk-17-jre-headless",
            run_as: service.run_as.as_deref(),
        };
        let mut plan = runtime.steps(LifecyclePlan::new(), &request);
        if request.wants(Phase::Configure) {
            plan = plan.step(
                service
                    .script(Phase::Configure, "look at the jar", CONFIGURE)
                    .env("JAR", Value::plain(jar.clone()))
                    .repeatable(),
            );
        }
        let mut command = vec![parameters.java.clone()];
        command.extend(parameters.jvm_options.iter().cloned());
        command.push("-jar".into());
        command.push(format!("${{WINDLASS_RELEASE_DIR}}/{}", literal(&jar)));
        let mut plan = service.steps(plan, &request, &Program::new(command))?;
        // The port that a server has, wherever it was given, is Spring Boot's too.
        let has = |env: &Environment, wanted: &str| {
            let mut env = env.iter();
            env.find(|(name, _)| name == wanted)
                .map(|(_, value)| value.clone())
        };
        for (server, own) in request.servers.iter().zip(&mut plan.server_env) {
            let is_own = |wanted: &str| server.variables.iter().any(|(name, _)| name == wanted);
            let common = has(&request.env, PORT).filter(|_| !is_own(PORT));
            let is_named = has(&request.env, SERVER_PORT).or(has(&own.env, SERVER_PORT));
            if let (Some(port), None) = (common.or(has(&own.env, PORT)), is_named) {
                own.env.push((SERVER_PORT.into(), port));
            }
        }
        Ok(plan)
    }
}

fn schema() -> serde_json::Value {
    let mut own = Runtime::properties();
    let properties = json!({
        "jar": path_schema("The jar, relative to the release directory. Default: the package's own file; needed where the package is an archive."),
        "java": {
            "type": "string", "pattern": "^[A-Za-z0-9_./+-]+$", "maxLength": 1000, "default": "java",
            "description": "The Java to run it with: a name in PATH or an absolute path."
        },
        "jvm_options": {
            "type": "array", "maxItems": 100, "items": { "type": "string", "minLength": 1, "maxLength": 4096 },
            "description": "Options of the JVM, for example -Xmx512m. ${NAME} is replaced by the environment variable NAME."
        }
    });
    if let (Some(own), Some(properties)) = (own.as_object_mut(), properties.as_object()) {
        own.extend(properties.clone());
    }
    Service::schema(&own)
}

fn jar(parameters: &Parameters, request: &LifecycleRequest) -> Result<String, PluginError> {
    match (&parameters.jar, &request.package) {
        (Some(jar), _) => Ok(jar.clone()),
        (None, Some(package)) if matches!(package.format.as_str(), "plain" | "jar") => {
            Ok(package.file_name.clone())
        }
        (None, Some(package)) => Err(PluginError::invalid_parameter(
            "/jar",
            format!(
                "the package {} is an archive ({}): name the jar in it as `jar`",
                package.file_name, package.format
            ),
        )),
        (None, None) => Err(PluginError::invalid_parameter(
            "/jar",
            "there is no package: name the jar as `jar`",
        )),
    }
}

windlass_sdk::tech_stack!(JavaJar);

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_sdk::{PackageRef, ServerFacts, lifecycle::Action};

    fn request(parameters: &serde_json::Value, format: &str, file: &str) -> LifecycleRequest {
        LifecycleRequest::new("shop", parameters)
            .package(PackageRef::new("1", format, file))
            .server(ServerFacts::new("s1", "one"))
            .server(ServerFacts::new("s2", "two").variable("PORT", "9001"))
    }

    fn command(plan: &LifecyclePlan) -> &[String] {
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
    fn a_jar_runs_with_its_options_and_port() {
        let parameters = json!({ "port": 8080, "jvm_options": ["-Xmx64m"], "arguments": ["--debug"], "runtime_version": "17" });
        let plan = JavaJar::lifecycle(request(&parameters, "jar", "shop.jar")).unwrap();
        assert_eq!(
            command(&plan),
            [
                "java",
                "-Xmx64m",
                "-jar",
                "${WINDLASS_RELEASE_DIR}/shop.jar",
                "--debug"
            ]
        );
        let port = |server: usize| {
            let env = &plan.server_env[server].env;
            let found = env.iter().find(|(name, _)| name == "SERVER_PORT");
            found.map(|(_, value)| value.clone())
        };
        assert_eq!(port(0), Some(Value::plain("8080")));
        assert_eq!(port(1), Some(Value::plain("9001")));
        let phases: Vec<&str> = plan.steps.iter().map(|step| step.phase.as_str()).collect();
        assert!(phases.contains(&"prepare") && !phases.contains(&"install"));
    }

    #[test]
    fn spring_boot_gets_the_port_wherever_it_was_given() {
        let at = |common: &[(&str, &str)], parameters: serde_json::Value, server: usize| {
            let mut request = request(&parameters, "jar", "shop.jar");
            let common = common.iter();
            request.env = common
                .map(|(name, value)| ((*name).to_owned(), Value::plain(*value)))
                .collect();
            let plan = JavaJar::lifecycle(request).unwrap();
            let mut env = plan.server_env[server].env.iter();
            env.find(|(name, _)| name == "SERVER_PORT")
                .map(|(_, value)| value.clone())
        };
        let is = |port: &str| Some(Value::plain(port));
        let variable = json!({ "environment": { "PORT": "7000" } });
        let both = json!({ "port": 7001, "environment": { "SERVER_PORT": "7002" } });
        // Of the order or the instance.
        assert_eq!(at(&[("PORT", "8000")], json!({ "port": 1 }), 0), is("8000"));
        // Of the parameters.
        assert_eq!(at(&[], variable.clone(), 0), is("7000"));
        // Of the server.
        assert_eq!(at(&[("PORT", "8000")], variable, 1), is("9001"));
        // Whoever names it himself means it.
        assert_eq!(at(&[], both, 0), is("7002"));
        assert_eq!(at(&[("SERVER_PORT", "1")], json!({ "port": 2 }), 0), None);
        assert_eq!(at(&[], json!({}), 0), None);
    }

    #[test]
    fn the_version_is_found_in_what_java_says() {
        for (said, expect) in [
            ("openjdk version \"17.0.15\" 2025-04-15", "17.0.15"),
            ("java version \"1.8.0_392\"", "8.0"),
            (
                "Picked up JAVA_TOOL_OPTIONS: -Xmx64m\nopenjdk version \"21\" 2023-09-19",
                "21",
            ),
        ] {
            let found = std::process::Command::new("sh")
                .args([
                    "-c",
                    "printf '%s\\n' \"$0\" | sed -nE \"$1\"",
                    said,
                    VERSION_OF,
                ])
                .output();
            let found = String::from_utf8(found.unwrap().stdout).unwrap();
            assert_eq!(found.trim(), expect, "{said}");
        }
    }

    #[test]
    fn java_is_installed_where_a_package_is_named() {
        let parameters = json!({ "runtime_package": "openjdk-17-jre-headless" });
        let plan = JavaJar::lifecycle(request(&parameters, "jar", "shop.jar")).unwrap();
        let install = plan.steps.iter().find(|step| step.phase == "install");
        assert!(install.is_some_and(|step| step.env.contains(&(
            "RUNTIME_PACKAGE".into(),
            Value::plain("openjdk-17-jre-headless")
        ))));
    }

    #[test]
    fn an_archive_needs_the_name_of_its_jar() {
        let missing = JavaJar::lifecycle(request(&json!({}), "tar_gz", "shop.tar.gz")).unwrap_err();
        assert_eq!(missing.field.as_deref(), Some("/jar"));
        let named = json!({ "jar": "lib/${x}.jar" });
        let plan = JavaJar::lifecycle(request(&named, "tar_gz", "shop.tar.gz")).unwrap();
        assert_eq!(
            command(&plan)[2],
            "${WINDLASS_RELEASE_DIR}/lib/$${x}.jar",
            "nothing in a name is replaced"
        );
    }
}
