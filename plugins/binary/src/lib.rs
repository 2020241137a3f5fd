//! The tech stack `binary`: any executable, started, checked, stopped and kept running.
//!
//! The program is the package's own file, or a named file in an unpacked archive. What differs between servers is
//! environment: a server's variables stand above everything else, so that three servers on one machine can each have their
//! `PORT`. What all services have (port, health, environment, scripts) is the kit's: [`windlass_sdk::service`].

use serde::Deserialize;
use serde_json::json;
use windlass_sdk::{
    Descriptor, PluginError, TechStack,
    lifecycle::{LifecyclePlan, LifecycleRequest},
    parse_parameters,
    service::{Program, Service},
};

/// The plugin.
#[derive(Debug)]
pub struct Binary;

/// The OS user that the plugin wishes for.
const USER: &str = "app";

#[derive(Deserialize)]
struct Parameters {
    program: Option<String>,
    #[serde(flatten)]
    service: Service,
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
            .parameters(&Service::schema(&json!({
                "program": {
                    "type": "string", "minLength": 1, "maxLength": 4096,
                    "description": "The executable, relative to the release directory. Default: the package's own file; needed where the package is an archive."
                }
            })))
            .preset(
                "http-service",
                "A service that answers HTTP",
                &json!({ "port": 8080, "health": { "kind": "http", "path": "/" } }),
            )
    }

    fn lifecycle(request: LifecycleRequest) -> Result<LifecyclePlan, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let program = Program::new([program(&parameters, &request)?]);
        parameters
            .service
            .steps(LifecyclePlan::new(), &request, &program)
    }
}

fn program(parameters: &Parameters, request: &LifecycleRequest) -> Result<String, PluginError> {
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
    Ok(if program.starts_with('/') || program.starts_with("./") {
        program
    } else {
        format!("./{program}")
    })
}

windlass_sdk::tech_stack!(Binary);

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_sdk::{
        PackageRef, ServerFacts, Value,
        lifecycle::{Action, Phase, Probe},
    };

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
