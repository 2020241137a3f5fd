//! The public command `disk-resize-check`: whether a disk needs growing, and what has to be grown.
//! Source: spec "Public commands (plugins)".
//!
//! The script prints `key=value` lines from `df` and `/sys/class/block`, as any user; it changes nothing. `interpret` compares three
//! sizes: what the file system has, what its device has, and what the disk below has.

use std::collections::BTreeMap;

use serde_json::json;
use windlass_sdk::{
    Descriptor, PluginError, PublicCommand, Script, Value,
    command::{CommandResult, InterpretRequest, RenderRequest, RenderedCommand},
    parse_parameters,
};

/// The plugin.
#[derive(Debug)]
pub struct DiskResizeCheck;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    #[serde(default = "root")]
    path: String,
    #[serde(default = "limit")]
    limit_percent: f64,
}

fn root() -> String {
    "/".into()
}

fn limit() -> f64 {
    80.0
}

/// A file system shows this much less than its device has: tables, journal, superblocks.
const OVERHEAD: f64 = 0.1;
/// Less than this behind the last partition is alignment, in KiB.
const ALIGNMENT_KIB: u64 = 16 * 1024;

const SCRIPT: &str = r#"say() { printf '%s=%s\n' "$1" "$2"; }
line=$(df -PkT -- "$DISK_PATH" | awk 'NR == 2')
set -f
# shellcheck disable=SC2086 # words are wanted
set -- $line
source=$1
say source "$source"
say file_system "$2"
say total_kib "$3"
say used_kib "$4"
say available_kib "$5"
case "$source" in
    /dev/*) name=$(basename "$(readlink -f -- "$source")") ;;
    *) name= ;;
esac
block=/sys/class/block/$name
if [ -z "$name" ] || [ ! -r "$block/size" ]; then
    say device_kind none
    exit 0
fi
say device_kib "$(($(cat "$block/size") / 2))"
if [ ! -e "$block/partition" ]; then
    say device_kind disk
    say disk_kib "$(($(cat "$block/size") / 2))"
    exit 0
fi
say device_kind partition
disk=$(dirname "$(readlink -f "$block")")
say disk "$(basename "$disk")"
say disk_kib "$(($(cat "$disk/size") / 2))"
start=$(cat "$block/start")
end=$((start + $(cat "$block/size")))
say end_kib "$((end / 2))"
last=1
set +f
for other in "$disk"/*/start; do
    if [ "$(cat "$other")" -gt "$start" ]; then last=0; fi
done
say last_partition "$last"
"#;

const FIGURES: [&str; 7] = [
    "total_kib",
    "used_kib",
    "available_kib",
    "device_kib",
    "disk_kib",
    "end_kib",
    "last_partition",
];

/// What has to be grown, from what the script saw.
fn advise(figures: &BTreeMap<String, u64>, needs: bool) -> (&'static str, &'static str) {
    let figure = |name: &str| figures.get(name).copied();
    let (total, device, disk) = (
        figure("total_kib"),
        figure("device_kib"),
        figure("disk_kib"),
    );
    if let (Some(total), Some(device)) = (total, device)
        && (total as f64) < device as f64 * (1.0 - OVERHEAD)
    {
        return (
            "grow_file_system",
            "the file system is smaller than its device: grow it (resize2fs, xfs_growfs)",
        );
    }
    if let (Some(disk), Some(end), Some(1)) = (disk, figure("end_kib"), figure("last_partition"))
        && disk.saturating_sub(end) > ALIGNMENT_KIB
    {
        return (
            "grow_partition",
            "there is room behind the partition: grow it (growpart), then the file system",
        );
    }
    if needs {
        (
            "grow_disk",
            "the disk is used up: give the server a larger one, or remove files",
        )
    } else {
        ("none", "nothing has to be grown")
    }
}

impl PublicCommand for DiskResizeCheck {
    fn describe() -> Descriptor {
        Descriptor::new("disk-resize-check", "1.0.0")
            .title("Does a disk need growing")
            .summary("Compares what a file system, its partition and its disk have, and says whether one of them has to be grown. Changes nothing.")
            .provider("Windlass")
            .category("inspection")
            .operating_system("linux")
            .parameters(&json!({
                "type": "object",
                "additionalProperties": false,
                "properties": {
                    "path": {
                        "type": "string",
                        "description": "A path on the file system to look at.",
                        "pattern": "^/",
                        "maxLength": 4096,
                        "default": "/"
                    },
                    "limit_percent": {
                        "type": "number",
                        "description": "From this use on the disk needs growing.",
                        "minimum": 1,
                        "maximum": 100,
                        "default": 80
                    }
                }
            }))
    }

    fn render(request: RenderRequest) -> Result<RenderedCommand, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        Ok(RenderedCommand::new(Script::shell(SCRIPT))
            .env("DISK_PATH", Value::plain(parameters.path)))
    }

    fn interpret(request: InterpretRequest) -> Result<CommandResult, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let pairs = request
            .output
            .lines()
            .filter_map(|line| line.split_once('='));
        let (mut figures, mut data) = (BTreeMap::new(), serde_json::Map::new());
        for (key, value) in pairs {
            match value.parse::<u64>() {
                Ok(figure) if FIGURES.contains(&key) => {
                    figures.insert(key.to_owned(), figure);
                    data.insert(key.to_owned(), json!(figure));
                }
                Ok(_) | Err(_) => {
                    data.insert(key.to_owned(), json!(value));
                }
            }
        }
        data.insert("path".into(), json!(parameters.path));
        data.insert("limit_percent".into(), json!(parameters.limit_percent));
        let used = figures.get("used_kib").copied();
        let room = figures.get("available_kib").copied();
        let (Some(0), Some(used), Some(room)) = (request.exit_code, used, room) else {
            let summary = match request.exit_code {
                Some(0) => "the script's output has no sizes".to_owned(),
                Some(code) => format!(
                    "`{}` cannot be looked at: the script ended with exit code {code}",
                    parameters.path
                ),
                None => format!("the script did not end by itself: {}", request.outcome),
            };
            return Ok(CommandResult::new(false, summary, &data.into()));
        };
        let used_percent = (used as f64 / (used + room).max(1) as f64 * 1000.0).round() / 10.0;
        let needs = used_percent >= parameters.limit_percent;
        let (advice, meaning) = advise(&figures, needs);
        data.insert("used_percent".into(), json!(used_percent));
        data.insert("needs_growing".into(), json!(needs));
        data.insert("advice".into(), json!(advice));
        let summary = format!(
            "{}: {used_percent:.1} % used (limit {:.0} %): {meaning}",
            parameters.path, parameters.limit_percent
        );
        Ok(CommandResult::new(true, summary, &data.into()))
    }
}

windlass_sdk::public_command!(DiskResizeCheck);

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_sdk::ServerFacts;

    fn interpret(exit_code: i32, output: &str) -> (bool, String, serde_json::Value) {
        let result =
            DiskResizeCheck::interpret(InterpretRequest::finished(exit_code, output)).unwrap();
        let data = serde_json::from_str(&result.data).unwrap();
        (result.succeeded, result.summary, data)
    }

    #[test]
    fn the_advice_says_what_is_too_small() {
        let sizes = |total: u64, used: u64, device: u64, end: u64, disk: u64, last: u64| {
            format!(
                "source=/dev/sda1\ntotal_kib={total}\nused_kib={used}\navailable_kib={}\ndevice_kib={device}\ndevice_kind=partition\nend_kib={end}\ndisk_kib={disk}\nlast_partition={last}\n",
                total - used
            )
        };
        for (output, needs, advice) in [
            (
                sizes(
                    95_000_000,
                    10_000_000,
                    100_000_000,
                    100_001_024,
                    100_001_024,
                    1,
                ),
                false,
                "none",
            ),
            (
                sizes(
                    95_000_000,
                    90_000_000,
                    100_000_000,
                    100_001_024,
                    100_001_024,
                    1,
                ),
                true,
                "grow_disk",
            ),
            (
                sizes(
                    95_000_000,
                    90_000_000,
                    100_000_000,
                    100_001_024,
                    200_000_000,
                    1,
                ),
                true,
                "grow_partition",
            ),
            (
                sizes(
                    95_000_000,
                    90_000_000,
                    100_000_000,
                    100_001_024,
                    200_000_000,
                    0,
                ),
                true,
                "grow_disk",
            ),
            (
                sizes(
                    50_000_000,
                    10_000_000,
                    100_000_000,
                    100_001_024,
                    200_000_000,
                    1,
                ),
                false,
                "grow_file_system",
            ),
        ] {
            let (succeeded, summary, data) = interpret(0, &output);
            assert!(succeeded, "{summary}");
            assert_eq!(data["needs_growing"], needs, "{summary}");
            assert_eq!(data["advice"], advice, "{summary}");
        }
    }

    #[test]
    fn the_script_runs_here_and_its_output_is_understood() {
        let request = RenderRequest::new(&json!({}), ServerFacts::new("s1", "s1"));
        let command = DiskResizeCheck::render(request).unwrap();
        let output = std::process::Command::new("/bin/sh")
            .args(["-eu", "-c", &command.script.text])
            .env("DISK_PATH", "/")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let (succeeded, summary, data) = interpret(0, &text);
        assert!(
            succeeded && data["used_percent"].is_number(),
            "{summary} {text}"
        );
    }

    #[test]
    fn a_failed_run_is_no_answer() {
        let (succeeded, summary, _) = interpret(1, "");
        assert!(!succeeded && summary.contains("exit code 1"), "{summary}");
        assert!(!interpret(0, "nonsense").0);
    }
}
