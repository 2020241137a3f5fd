//! The kernel's log, and that of the last start of the machine.

use std::{fs::OpenOptions, io::Read as _, os::unix::fs::OpenOptionsExt as _, path::Path};

use serde_json::{Value, json};
use windlass_protocol::{ProbeReply, QueryError, QueryErrorCode};

use super::{Arguments, facts_of, system::has_systemd};
use crate::query::{Scope, failed, last, program, unreadable};

/// Records that are looked at, newest first.
const MAX_RECORDS: usize = 5000;
/// Records that are named in a list.
const NAMED: usize = 50;
/// Lines of the boot log.
const BOOT_LINES: &str = "1000";
/// Where systems without systemd leave it.
const BOOT_FILES: [&str; 3] = ["/var/log/boot.log", "/var/log/boot", "/var/log/dmesg"];

/// One message of the kernel.
#[derive(Debug, Clone, PartialEq)]
struct Record {
    /// 0 (emergency) to 7 (debug).
    level: u8,
    /// Since the start of the machine.
    at_s: f64,
    message: String,
}

pub(super) async fn kernel_log(
    arguments: &Arguments,
    scope: &Scope,
) -> Result<ProbeReply, QueryError> {
    let within_s = match arguments.get("within_s") {
        Some(text) => Some(text.parse::<f64>().ok().filter(|s| *s > 0.0).ok_or_else(|| {
            QueryError::new(
                QueryErrorCode::InvalidRequest,
                format!("the argument `within_s` must be a number of seconds above 0, not `{text}`"),
            )
        })?),
        None => None,
    };
    let (records, source) = match scope.read(|_| read_kmsg()).await {
        Ok(records) => (records, "/dev/kmsg"),
        Err(reason) => match dmesg().await {
            Some(records) => (records, "dmesg"),
            None => return Err(reason),
        },
    };
    let uptime_s: Option<f64> = std::fs::read_to_string("/proc/uptime")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok());
    let from_s = match (uptime_s, within_s) {
        (Some(uptime), Some(within)) => uptime - within,
        (Some(_) | None, _) => f64::MIN,
    };
    let records: Vec<Record> = records
        .into_iter()
        .filter(|record| record.at_s >= from_s)
        .collect();
    let mut facts = summary(&records);
    facts["source"] = source.into();
    facts["uptime_s"] = uptime_s.into();
    let text: String = records
        .iter()
        .map(|record| format!("[{:12.6}] {}\n", record.at_s, record.message))
        .collect();
    Ok(facts_of(facts, text))
}

/// Reads what the kernel keeps. Opened anew it begins with the oldest record; each read gives one.
fn read_kmsg() -> Result<Vec<Record>, QueryError> {
    const PATH: &str = "/dev/kmsg";
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(nonblocking)
        .open(PATH)
        .map_err(|error| match error.raw_os_error() {
            Some(1 | 13) => QueryError::new(
                QueryErrorCode::Denied,
                "the kernel's log is for root only here (`kernel.dmesg_restrict`); run the agent as root or lift the restriction",
            ),
            Some(_) | None => unreadable(PATH, &error),
        })?;
    let mut records = std::collections::VecDeque::new();
    let mut buffer = [0; 8192];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                let text = String::from_utf8_lossy(&buffer[..length]);
                records.extend(kmsg_record(&text));
                if records.len() > MAX_RECORDS {
                    records.pop_front();
                }
            }
            Err(error) => match error.kind() {
                std::io::ErrorKind::WouldBlock => break,
                std::io::ErrorKind::Interrupted | std::io::ErrorKind::BrokenPipe => {}
                _ => return Err(unreadable(PATH, &error)),
            },
        }
    }
    Ok(records.into())
}

/// `priority,sequence,microseconds,flags;message`, then lines of properties.
fn kmsg_record(text: &str) -> Option<Record> {
    let (head, message) = text.split_once(';')?;
    let mut head = head.split(',');
    let priority: u32 = head.next()?.parse().ok()?;
    let at_us: f64 = head.nth(1)?.parse().ok()?;
    let is_kernel = priority >> 3 == 0;
    is_kernel.then(|| Record {
        level: (priority & 7) as u8,
        at_s: at_us / 1e6,
        message: unescape(message.lines().next().unwrap_or_default()),
    })
}

/// Bytes that are not printable stand as `\xNN`.
fn unescape(text: &str) -> String {
    text.replace("\\x09", "\t").replace("\\x5c", "\\")
}

/// Where `/dev/kmsg` is missing, as in many containers.
async fn dmesg() -> Option<Vec<Record>> {
    let said = program::run("dmesg", &["--raw", "--kernel"]).await.ok()?;
    if said.code != 0 {
        return None;
    }
    let records: Vec<Record> = said.output.lines().filter_map(dmesg_record).collect();
    let from = records.len().saturating_sub(MAX_RECORDS);
    Some(records[from..].to_vec())
}

/// `<priority>[ seconds] message`.
fn dmesg_record(line: &str) -> Option<Record> {
    let (priority, rest) = line.strip_prefix('<')?.split_once('>')?;
    let (at, message) = rest.strip_prefix('[')?.split_once(']')?;
    Some(Record {
        level: (priority.parse::<u32>().ok()? & 7) as u8,
        at_s: at.trim().parse().ok()?,
        message: message.trim_start().to_owned(),
    })
}

fn summary(records: &[Record]) -> Value {
    let lower = |record: &Record| record.message.to_lowercase();
    let picked = |accept: &dyn Fn(&Record) -> bool| {
        let found: Vec<&Record> = records.iter().filter(|record| accept(record)).collect();
        let from = found.len().saturating_sub(NAMED);
        let named: Vec<Value> = found[from..]
            .iter()
            .map(|record| {
                json!({ "at_s": record.at_s, "level": record.level, "message": record.message })
            })
            .collect();
        (found.len(), named)
    };
    let (oom_kill_count, oom_kills) = picked(&|record| {
        let text = lower(record);
        text.contains("out of memory: kill") || text.contains("oom-kill:")
    });
    let (error_count, errors) = picked(&|record| record.level <= 3);
    let (disk_error_count, disk_errors) = picked(&|record| {
        let text = lower(record);
        [
            "i/o error",
            "medium error",
            "ext4-fs error",
            "xfs_force_shutdown",
            "metadata corruption",
            "remounting filesystem read-only",
            "btrfs error",
        ]
        .iter()
        .any(|sign| text.contains(sign))
    });
    json!({
        "records": records.len(),
        "error_count": error_count,
        "errors": errors,
        "oom_kill_count": oom_kill_count,
        "oom_kills": oom_kills,
        "disk_error_count": disk_error_count,
        "disk_errors": disk_errors,
    })
}

pub(super) async fn boot_log(scope: &Scope) -> Result<ProbeReply, QueryError> {
    if has_systemd() {
        let arguments = ["--boot", "--no-pager", "--quiet", "--lines", BOOT_LINES];
        let said = program::run("journalctl", &arguments).await?;
        if said.code != 0 {
            return Err(failed(format!(
                "journalctl ended with {}: {}",
                said.code,
                said.errors.trim()
            )));
        }
        return Ok(boot_facts("journalctl", said.output));
    }
    scope
        .read(|_| {
            let Some(path) = BOOT_FILES.iter().find(|path| Path::new(path).exists()) else {
                return Err(QueryError::new(
                    QueryErrorCode::NotFound,
                    format!(
                        "systemd does not run this server, and there is none of {}",
                        BOOT_FILES.join(", ")
                    ),
                ));
            };
            let bytes = std::fs::read(path).map_err(|error| unreadable(path, &error))?;
            Ok(boot_facts(
                path,
                String::from_utf8_lossy(&bytes).into_owned(),
            ))
        })
        .await
}

fn boot_facts(source: &str, text: String) -> ProbeReply {
    let lines = text.lines().count();
    let (text, dropped_bytes) = last(text, windlass_protocol::MAX_QUERY_TEXT_BYTES);
    ProbeReply {
        data: json!({ "source": source, "lines": lines }),
        text,
        dropped_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_both_sources_are_read() {
        let one =
            kmsg_record("6,1234,5000001,-;usb 1-1: new\\x09device\n SUBSYSTEM=usb\n").unwrap();
        assert_eq!(
            one,
            Record {
                level: 6,
                at_s: 5.000001,
                message: "usb 1-1: new\tdevice".into()
            }
        );
        // 30 = facility 3: a service wrote it, not the kernel.
        assert_eq!(kmsg_record("30,1,2,-;systemd[1]: hello"), None);
        let two = dmesg_record("<3>[    1.500000] sda: I/O error").unwrap();
        assert_eq!((two.level, two.at_s), (3, 1.5));
        assert_eq!(two.message, "sda: I/O error");
    }

    #[test]
    fn what_matters_is_picked_out() {
        let record = |level, message: &str| Record {
            level,
            at_s: 1.0,
            message: message.into(),
        };
        let seen = summary(&[
            record(6, "eth0: link up"),
            record(3, "Out of memory: Killed process 77 (java) total-vm:1kB"),
            record(3, "blk_update_request: I/O error, dev sda, sector 9"),
        ]);
        assert_eq!(seen["oom_kill_count"], 1);
        assert_eq!(seen["disk_error_count"], 1);
        assert_eq!(seen["error_count"], 2);
        assert!(
            seen["oom_kills"][0]["message"]
                .as_str()
                .unwrap()
                .contains("java")
        );
    }
}
