//! Tech stacks.

use std::collections::BTreeMap;

use windlass_domain::{
    plugin::{LifecyclePlan, LifecycleRequest, Phase, StackAction, StackStep},
    task::{Check, PackageRef, Probe, Restart, Supervise},
};

use crate::{
    bindings::{tech_stack::exports::windlass::plugin::lifecycle as wit, types},
    convert::{environment_from_guest, environment_to_guest, script_from_guest, server_to_guest},
    error::CallFailure,
};

pub(crate) fn request_to_guest(request: &LifecycleRequest) -> wit::LifecycleRequest {
    wit::LifecycleRequest {
        application: request.application.clone(),
        instance: request.instance.clone(),
        operation: "release".to_owned(),
        package: request.package.as_ref().map(package_to_guest),
        parameters: request.parameters.to_string(),
        env: environment_to_guest(&request.env),
        phases: request
            .phases
            .iter()
            .map(|phase| phase_code(*phase).to_owned())
            .collect(),
        servers: request.servers.iter().map(server_to_guest).collect(),
        attributes: Vec::new(),
    }
}

fn package_to_guest(package: &PackageRef) -> types::PackageRef {
    types::PackageRef {
        version: package.version.clone(),
        digest: package.digest.to_string(),
        size_bytes: package.size_bytes,
        format: package.format.name().to_owned(),
        file_name: package.file_name.clone(),
        attributes: Vec::new(),
    }
}

const PHASES: [Phase; 9] = [
    Phase::Prepare,
    Phase::Install,
    Phase::Configure,
    Phase::Stop,
    Phase::Deploy,
    Phase::Start,
    Phase::Check,
    Phase::Restart,
    Phase::Uninstall,
];

fn phase_code(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepare => "prepare",
        Phase::Install => "install",
        Phase::Configure => "configure",
        Phase::Stop => "stop",
        Phase::Deploy => "deploy",
        Phase::Start => "start",
        Phase::Check => "check",
        Phase::Restart => "restart",
        Phase::Uninstall => "uninstall",
    }
}

pub(crate) fn plan_from_guest(plan: wit::LifecyclePlan) -> Result<LifecyclePlan, CallFailure> {
    let steps = plan
        .steps
        .into_iter()
        .enumerate()
        .map(|(index, step)| step_from_guest(&format!("steps[{index}]"), step))
        .collect::<Result<_, _>>()?;
    let mut server_env = BTreeMap::new();
    for (index, entry) in plan.server_env.into_iter().enumerate() {
        let field = format!("server-env[{index}]");
        let env = environment_from_guest(&field, entry.env)?;
        if server_env.insert(entry.server.clone(), env).is_some() {
            return Err(CallFailure::invalid(
                field,
                format!("names the server `{}` twice", entry.server),
            ));
        }
    }
    Ok(LifecyclePlan { steps, server_env })
}

fn step_from_guest(field: &str, step: wit::Step) -> Result<StackStep, CallFailure> {
    let phase = PHASES
        .into_iter()
        .find(|phase| phase_code(*phase) == step.phase)
        .ok_or_else(|| unknown_code(&format!("{field}.phase"), &step.phase))?;
    let action = match step.action {
        wit::Action::Script(script) => StackAction::Script(script_from_guest(script)),
        wit::Action::WriteFile(file) => StackAction::WriteFile {
            path: file.path,
            content: file.content,
            mode: file.mode,
        },
        wit::Action::Start(supervise) => StackAction::Start(Supervise {
            command: supervise.command,
            working_dir: supervise.working_dir,
            restart: match supervise.restart.as_str() {
                "always" => Restart::Always,
                "never" => Restart::Never,
                other => return Err(unknown_code(&format!("{field}.action.restart"), other)),
            },
            keep_running: step
                .attributes
                .iter()
                .any(|(name, value)| name == "keep-running" && value == "true"),
        }),
        wit::Action::Stop(grace_ms) => StackAction::Stop { grace_ms },
        wit::Action::Check(check) => StackAction::Check(Check {
            probe: match check.probe {
                wit::Probe::Script(script) => Probe::Script(script_from_guest(script)),
                wit::Probe::Http(http) => Probe::Http {
                    url: http.url,
                    statuses: http.statuses,
                    body_contains: http.body_contains,
                },
                wit::Probe::Tcp(address) => Probe::Tcp { address },
                wit::Probe::Extension(extension) => {
                    return Err(unknown_code(
                        &format!("{field}.action.probe"),
                        &extension.code,
                    ));
                }
            },
            interval_ms: check.interval_ms,
            try_timeout_ms: check.try_timeout_ms,
            healthy_for_ms: check.healthy_for_ms,
        }),
        wit::Action::Extension(extension) => {
            return Err(unknown_code(&format!("{field}.action"), &extension.code));
        }
    };
    Ok(StackStep {
        phase,
        name: step.name,
        action,
        run_as: step.run_as,
        env: environment_from_guest(&format!("{field}.env"), step.env)?,
        timeout_ms: step.timeout_ms,
        retries: step.retries,
        repeatable: step.repeatable,
    })
}

pub(crate) fn unknown_code(field: &str, code: &str) -> CallFailure {
    let code: String = code.chars().take(60).collect();
    CallFailure::invalid(
        field,
        format!("is `{code}`, which this host does not know: a newer host may be needed"),
    )
}
