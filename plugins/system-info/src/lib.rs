//! The public command `system-info`: what a server is, as structured data.
//!
//! The script prints `key=value` lines; `interpret` makes an object of them. It reads only `/proc`, `/etc/os-release` and
//! the output of `uname` and `df`, so that it runs as any user on any Linux.

use std::collections::BTreeMap;

use serde_json::json;
use windlass_sdk::{
    Descriptor, PluginError, PublicCommand, Script, Value,
    command::{CommandResult, InterpretRequest, RenderRequest, RenderedCommand},
    parse_parameters,
};

/// The plugin.
#[derive(Debug)]
pub struct SystemInfo;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    #[serde(default = "root")]
    disk_path: String,
}

fn root() -> String {
    "/".into()
}

const SCRIPT: &str = r#"say() { printf '%s=%s\n' "$1" "$2"; }
say host "$(uname -n)"
say kernel "$(uname -r)"
say arch "$(uname -m)"
if [ -r /etc/os-release ]; then
    say os "$(. /etc/os-release; printf '%s' "${ID:-}")"
    say os_version "$(. /etc/os-release; printf '%s' "${VERSION_ID:-}")"
fi
say cpus "$(grep -c '^processor' /proc/cpuinfo)"
say memory_kib "$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo)"
say memory_available_kib "$(sed -n 's/^MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo)"
say load_1m "$(cut -d' ' -f1 /proc/loadavg)"
say uptime_s "$(cut -d. -f1 /proc/uptime)"
say disk_path "$DISK_PATH"
say disk_kib "$(df -Pk -- "$DISK_PATH" | awk 'NR == 2 { print $2 }')"
say disk_used_kib "$(df -Pk -- "$DISK_PATH" | awk 'NR == 2 { print $3 }')"
"#;

/// Keys whose values are figures.
const FIGURES: [&str; 6] = [
    "cpus",
    "memory_kib",
    "memory_available_kib",
    "uptime_s",
    "disk_kib",
    "disk_used_kib",
];

impl PublicCommand for SystemInfo {
    fn describe() -> Descriptor {
        Descriptor::new("system-info", "1.0.0")
            .title("System information")
            .summary("Operating system, kernel, processors, memory, load and one disk of a server, as structured data.")
            .provider("Windlass")
            .category("inspection")
            .operating_system("linux")
            .parameters(&json!({
                "type": "object",
                "additionalProperties": false,
                "properties": {
                    "disk_path": {
                        "type": "string",
                        "description": "A path on the disk to report on.",
                        "pattern": "^/",
                        "maxLength": 4096,
                        "default": "/"
                    }
                }
            }))
    }

    fn render(request: RenderRequest) -> Result<RenderedCommand, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        Ok(RenderedCommand::new(Script::shell(SCRIPT))
            .env("DISK_PATH", Value::plain(parameters.disk_path)))
    }

    fn interpret(request: InterpretRequest) -> Result<CommandResult, PluginError> {
        let mut data = BTreeMap::new();
        for (key, value) in request
            .output
            .lines()
            .filter_map(|line| line.split_once('='))
        {
            let value = if FIGURES.contains(&key) {
                match value.parse::<u64>() {
                    Ok(figure) => json!(figure),
                    Err(_) => serde_json::Value::Null,
                }
            } else {
                json!(value)
            };
            data.insert(key, value);
        }
        let text = |key| {
            data.get(key)
                .and_then(|value| value.as_str())
                .unwrap_or("?")
        };
        let figure = |key| {
            data.get(key)
                .and_then(serde_json::Value::as_u64)
                .unwrap_or(0)
        };
        let summary = match request.exit_code {
            Some(0) => format!(
                "{} {} on {}, {} processors, {} MiB memory",
                text("os"),
                text("os_version"),
                text("arch"),
                figure("cpus"),
                figure("memory_kib") / 1024,
            ),
            Some(code) => format!("the script ended with exit code {code}"),
            None => format!("the script did not end by itself: {}", request.outcome),
        };
        Ok(CommandResult::new(
            request.exit_code == Some(0),
            summary,
            &json!(data),
        ))
    }
}

windlass_sdk::public_command!(SystemInfo);

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_sdk::ServerFacts;

    #[test]
    fn a_parameter_is_data_and_never_script() {
        let path = "/$(touch /tmp/x)'\"";
        let command = SystemInfo::render(RenderRequest::new(
            &json!({ "disk_path": path }),
            ServerFacts::new("s1", "s1"),
        ))
        .unwrap();
        assert!(!command.script.text.contains("touch"));
        assert_eq!(command.env, [("DISK_PATH".into(), Value::plain(path))]);
    }

    #[test]
    fn the_script_runs_and_its_output_is_understood() {
        let command =
            SystemInfo::render(RenderRequest::new(&json!({}), ServerFacts::new("s1", "s1")))
                .unwrap();
        let output = std::process::Command::new("/bin/sh")
            .args(["-eu", "-c", &command.script.text])
            .env("DISK_PATH", "/")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let result = SystemInfo::interpret(InterpretRequest::finished(0, &text)).unwrap();
        let data: serde_json::Value = serde_json::from_str(&result.data).unwrap();
        assert!(result.succeeded);
        assert!(data["cpus"].as_u64().unwrap() > 0, "{data}");
        assert!(data["disk_kib"].as_u64().unwrap() > 0, "{data}");
    }

    #[test]
    fn a_failed_run_is_not_a_success() {
        let result = SystemInfo::interpret(InterpretRequest::finished(2, "cpus=x")).unwrap();
        assert!(!result.succeeded);
        assert!(result.summary.contains('2'));
    }
}
