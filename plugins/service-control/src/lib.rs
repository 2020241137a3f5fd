//! The public command `service-control`: starts, stops, restarts or looks at a unit of systemd.
//! Source: spec "Public commands (plugins)".
//!
//! The script prints `key=value` lines and ends with a code that says what happened: see [`ENDS`]. It never waits longer than
//! systemd's own time-outs of the unit, and the invocation's.

use std::collections::BTreeMap;

use serde_json::json;
use windlass_sdk::{
    Descriptor, PluginError, PublicCommand, Script, Value,
    command::{CommandResult, InterpretRequest, RenderRequest, RenderedCommand},
    parse_parameters,
};

/// The plugin.
#[derive(Debug)]
pub struct ServiceControl;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    unit: String,
    #[serde(default)]
    action: Action,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Action {
    Start,
    Stop,
    Restart,
    #[default]
    Status,
}

impl Action {
    fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Status => "status",
        }
    }
}

/// Codes that the script ends with beside 0, and what each means.
pub const ENDS: [(i32, &str, &str); 4] = [
    (
        40,
        "no_systemd",
        "systemd does not run this server, so there are no units to control",
    ),
    (
        41,
        "no_such_unit",
        "there is no such unit on this server; check its name with `systemctl list-unit-files`",
    ),
    (
        42,
        "refused",
        "systemd refused or failed; see `error`, and whether the user may control units (run it as root)",
    ),
    (
        43,
        "not_as_asked",
        "the unit is not in the state that was asked for; see `journalctl -u` of it",
    ),
];

const SCRIPT: &str = r#"say() { printf '%s=%s\n' "$1" "$2"; }
property() { systemctl show --property "$1" --value -- "$UNIT" 2>/dev/null || :; }
if [ ! -d /run/systemd/system ] || ! command -v systemctl >/dev/null 2>&1; then
    exit 40
fi
load=$(property LoadState)
say load "$load"
if [ "$load" = not-found ] || [ -z "$load" ]; then
    exit 41
fi
say before "$(property ActiveState)"
if [ "$ACTION" != status ]; then
    if ! error=$(systemctl --no-ask-password "$ACTION" -- "$UNIT" 2>&1); then
        say error "$(printf '%s' "$error" | tr '\n' ' ')"
        say active "$(property ActiveState)"
        exit 42
    fi
fi
active=$(property ActiveState)
say active "$active"
say sub "$(property SubState)"
say enabled "$(property UnitFileState)"
say pid "$(property MainPID)"
say since "$(property StateChangeTimestamp)"
case "$ACTION $active" in
    'start active' | 'start reloading' | 'restart active' | 'restart reloading') ;;
    # What runs once and ends is inactive when it was started well.
    'start inactive' | 'restart inactive') [ "$(property Type)" = oneshot ] || exit 43 ;;
    'stop inactive' | 'stop failed') ;;
    status*) ;;
    *) exit 43 ;;
esac
"#;

impl PublicCommand for ServiceControl {
    fn describe() -> Descriptor {
        Descriptor::new("service-control", "1.0.0")
            .title("Control a service")
            .summary("Starts, stops, restarts or looks at a unit of systemd, and tells its state before and after. Controlling units mostly needs root.")
            .provider("Windlass")
            .category("operation")
            .operating_system("linux")
            .parameters(&json!({
                "type": "object",
                "additionalProperties": false,
                "required": ["unit"],
                "properties": {
                    "unit": {
                        "type": "string",
                        "description": "The unit, for example `nginx.service` or `nginx`.",
                        "pattern": "^[A-Za-z0-9_.@:\\\\][A-Za-z0-9_.@:\\\\-]*$",
                        "maxLength": 255
                    },
                    "action": {
                        "enum": ["start", "stop", "restart", "status"],
                        "description": "What to do.",
                        "default": "status"
                    }
                }
            }))
    }

    fn render(request: RenderRequest) -> Result<RenderedCommand, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        Ok(RenderedCommand::new(Script::shell(SCRIPT))
            .env("UNIT", Value::plain(parameters.unit))
            .env("ACTION", Value::plain(parameters.action.as_str())))
    }

    fn interpret(request: InterpretRequest) -> Result<CommandResult, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let (unit, action) = (parameters.unit, parameters.action.as_str());
        let mut data: BTreeMap<&str, serde_json::Value> = request
            .output
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key, json!(value)))
            .collect();
        let active = data
            .get("active")
            .and_then(|value| value.as_str())
            .unwrap_or("unknown")
            .to_owned();
        let pid = data
            .get("pid")
            .and_then(|pid| pid.as_str()?.parse::<u64>().ok())
            .filter(|pid| *pid > 0);
        data.insert("pid", json!(pid));
        data.insert("unit", json!(unit));
        data.insert("action", json!(action));
        let end = ENDS
            .iter()
            .find(|(code, ..)| request.exit_code == Some(*code));
        let (succeeded, summary) = match (request.exit_code, end) {
            (Some(0), _) if action == "status" => (true, format!("{unit} is {active}")),
            (Some(0), _) => (true, format!("{unit}: {action} succeeded, it is {active}")),
            (_, Some((_, code, meaning))) => {
                data.insert("problem", json!(code));
                (
                    false,
                    format!("{unit}: {action} did not succeed: {meaning}"),
                )
            }
            (Some(code), None) => (
                false,
                format!("{unit}: the script ended with exit code {code}"),
            ),
            (None, None) => (
                false,
                format!(
                    "{unit}: the script did not end by itself: {}",
                    request.outcome
                ),
            ),
        };
        Ok(CommandResult::new(succeeded, summary, &json!(data)))
    }
}

windlass_sdk::public_command!(ServiceControl);

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;
    use windlass_sdk::ServerFacts;

    fn interpret(action: &str, code: i32, output: &str) -> (bool, String, serde_json::Value) {
        let request = InterpretRequest {
            parameters: json!({ "unit": "web", "action": action }).to_string(),
            ..InterpretRequest::finished(code, output)
        };
        let result = ServiceControl::interpret(request).unwrap();
        let data = serde_json::from_str(&result.data).unwrap();
        (result.succeeded, result.summary, data)
    }

    /// One at a time: a program that another thread's child still holds open for writing cannot be run.
    static TURN: Mutex<u32> = Mutex::new(0);

    /// Runs the script with a `systemctl` of the test, or none.
    fn run(systemctl: Option<&str>, action: &str) -> (i32, String) {
        use std::os::unix::fs::PermissionsExt as _;
        let mut turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        *turn += 1;
        let directory =
            std::env::temp_dir().join(format!("service-control-{}-{turn}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let script = match systemctl {
            Some(body) => {
                let path = directory.join("systemctl");
                std::fs::write(&path, format!("#!/bin/sh\n{body}")).unwrap();
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
                // The directory that says whether systemd runs is the test's own.
                SCRIPT.replace("/run/systemd/system", directory.to_str().unwrap())
            }
            None => SCRIPT.replace("/run/systemd/system", "/no/such/directory"),
        };
        let output = std::process::Command::new("/bin/sh")
            .args(["-eu", "-c", &script])
            .env("PATH", format!("{}:/usr/bin:/bin", directory.display()))
            .env("UNIT", "web")
            .env("ACTION", action)
            .output()
            .unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code().unwrap(), text)
    }

    /// A unit whose state is kept beside the program.
    const SYSTEMCTL: &str = r#"state=$(cat "$(dirname "$0")/state" 2>/dev/null || echo inactive)
case "$1 $3" in
    'show LoadState') echo loaded ;;
    *) case "$1" in
        show) case "$3" in ActiveState) echo "$state" ;; MainPID) echo 77 ;; Type) echo simple ;; *) echo x ;; esac ;;
        --no-ask-password) case "$2" in
            start | restart) echo active > "$(dirname "$0")/state" ;;
            stop) echo "Access denied" >&2; exit 4 ;;
        esac ;;
    esac ;;
esac
"#;

    #[test]
    fn a_unit_is_started_and_its_state_told() {
        let (code, output) = run(Some(SYSTEMCTL), "start");
        let (succeeded, summary, data) = interpret("start", code, &output);
        assert!(succeeded, "{summary} {output}");
        assert_eq!(
            (&data["before"], &data["active"]),
            (&json!("inactive"), &json!("active"))
        );
        assert_eq!(data["pid"], 77);
        let (code, output) = run(Some(SYSTEMCTL), "status");
        let (succeeded, summary, _) = interpret("status", code, &output);
        assert!(succeeded && summary == "web is inactive", "{summary}");
    }

    #[test]
    fn what_went_wrong_has_a_code_and_a_mend() {
        let (code, output) = run(Some(SYSTEMCTL), "stop");
        let (succeeded, summary, data) = interpret("stop", code, &output);
        assert!(!succeeded && summary.contains("root"), "{summary}");
        assert_eq!(data["problem"], "refused");
        assert!(
            data["error"].as_str().unwrap().contains("Access denied"),
            "{data}"
        );
        let (code, output) = run(None, "start");
        let (succeeded, summary, data) = interpret("start", code, &output);
        assert!(
            !succeeded && summary.contains("systemd does not run"),
            "{summary}"
        );
        assert_eq!(data["problem"], "no_systemd");
        let (code, _) = run(Some("echo not-found"), "restart");
        assert_eq!(interpret("restart", code, "").2["problem"], "no_such_unit");
        let (code, _) = run(Some("echo failed"), "start");
        assert_eq!(interpret("start", code, "").2["problem"], "not_as_asked");
        assert!(!interpret("start", 1, "").0);
    }

    #[test]
    fn a_parameter_is_data_and_never_script() {
        let request = RenderRequest::new(
            &json!({ "unit": "$(touch x)", "action": "stop" }),
            ServerFacts::new("s1", "s1"),
        );
        let command = ServiceControl::render(request).unwrap();
        assert!(!command.script.text.contains("touch"));
        assert!(
            command
                .env
                .contains(&("UNIT".into(), Value::plain("$(touch x)")))
        );
        let wrong = RenderRequest::new(
            &json!({ "unit": "web", "action": "mask" }),
            ServerFacts::new("s1", "s1"),
        );
        assert!(ServiceControl::render(wrong).is_err());
    }
}
