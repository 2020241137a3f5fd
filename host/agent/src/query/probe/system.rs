//! The machine as a whole: what it is, memory, load, file handles, clock.

use std::{fs, path::Path};

use serde_json::{Value, json};
use windlass_protocol::{ProbeReply, QueryError};

use super::{facts, facts_of, percent};
use crate::{
    clock, proc,
    query::{failed, program, read_text},
};

/// Processes in the answer of `file-handles`.
const NEAREST: usize = 10;

/// Whether systemd is this machine's first process, as `sd_booted(3)` tells.
pub(super) fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

pub(super) fn system() -> Result<ProbeReply, QueryError> {
    let uname = rustix::system::uname();
    let release = fs::read_to_string("/etc/os-release")
        .or_else(|_| fs::read_to_string("/usr/lib/os-release"))
        .unwrap_or_default();
    let of = |name: &str| {
        release
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches(['"', '\'']).to_owned())
    };
    let uptime = read_text("/proc/uptime")?;
    let uptime_s: f64 = uptime
        .split_whitespace()
        .next()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| failed("/proc/uptime has another form than expected"))?;
    let booted = clock::now().unix_ms() - (uptime_s * 1000.0) as i64;
    Ok(facts_of(
        json!({
            "host_name": uname.nodename().to_string_lossy(),
            "os": of("ID"),
            "os_version": of("VERSION_ID"),
            "os_title": of("PRETTY_NAME"),
            "kernel": uname.release().to_string_lossy(),
            "arch": uname.machine().to_string_lossy(),
            "cpus": cpus(),
            "memory_kib": kib(&read_text("/proc/meminfo")?, "MemTotal"),
            "uptime_s": uptime_s as u64,
            "booted_at_unix_ms": booted,
            "boot_id": proc::boot_id(),
            "systemd": has_systemd(),
        }),
        release,
    ))
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn kib(meminfo: &str, name: &str) -> Option<u64> {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

pub(super) fn memory() -> Result<ProbeReply, QueryError> {
    let text = read_text("/proc/meminfo")?;
    let data = memory_facts(&text)
        .ok_or_else(|| failed("/proc/meminfo has another form than expected"))?;
    Ok(facts_of(data, text))
}

fn memory_facts(text: &str) -> Option<Value> {
    let total = kib(text, "MemTotal")?;
    let available = kib(text, "MemAvailable").or_else(|| kib(text, "MemFree"))?;
    let swap_total = kib(text, "SwapTotal").unwrap_or(0);
    let swap_free = kib(text, "SwapFree").unwrap_or(0);
    Some(json!({
        "total_kib": total,
        "available_kib": available,
        "free_kib": kib(text, "MemFree"),
        "cached_kib": kib(text, "Cached"),
        "swap_total_kib": swap_total,
        "swap_free_kib": swap_free,
        "used_percent": percent(total.saturating_sub(available), total),
        "swap_used_percent": percent(swap_total.saturating_sub(swap_free), swap_total),
    }))
}

pub(super) fn load() -> Result<ProbeReply, QueryError> {
    let text = read_text("/proc/loadavg")?;
    let data =
        load_facts(&text).ok_or_else(|| failed("/proc/loadavg has another form than expected"))?;
    Ok(facts_of(data, text))
}

fn load_facts(text: &str) -> Option<Value> {
    let mut words = text.split_whitespace();
    let mut figure = || words.next()?.parse::<f64>().ok();
    let (one, five, fifteen) = (figure()?, figure()?, figure()?);
    let (running, tasks) = words.next()?.split_once('/')?;
    Some(json!({
        "load_1m": one,
        "load_5m": five,
        "load_15m": fifteen,
        "cpus": cpus(),
        "running": running.parse::<u64>().ok()?,
        "tasks": tasks.parse::<u64>().ok()?,
    }))
}

pub(super) fn file_handles() -> Result<ProbeReply, QueryError> {
    let text = read_text("/proc/sys/fs/file-nr")?;
    let figures: Vec<u64> = text
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    let [allocated, free, max] = figures[..] else {
        return Err(failed(
            "/proc/sys/fs/file-nr has another form than expected",
        ));
    };
    let used = allocated.saturating_sub(free);
    let mut unseen = 0_u64;
    let mut nearest: Vec<(f64, Value)> = Vec::new();
    for pid in proc::all_pids() {
        match open_files(pid) {
            Some(found) => nearest.push(found),
            None => unseen += 1,
        }
    }
    nearest.sort_by(|one, two| two.0.total_cmp(&one.0));
    nearest.truncate(NEAREST);
    let processes: Vec<Value> = nearest.into_iter().map(|(_, process)| process).collect();
    Ok(facts_of(
        json!({
            "allocated": used,
            "max": max,
            "used_percent": percent(used, max),
            "processes": processes,
            "unseen_processes": unseen,
        }),
        text,
    ))
}

/// How near a process is to its own limit; `None` where it may not be looked into, or is gone.
fn open_files(pid: u32) -> Option<(f64, Value)> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64;
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let limit: u64 = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    let used_percent = percent(open, limit);
    let process = json!({
        "pid": pid,
        "name": name.trim_end(),
        "open": open,
        "limit": limit,
        "used_percent": used_percent,
    });
    Some((used_percent, process))
}

pub(super) async fn clock() -> Result<ProbeReply, QueryError> {
    let synchronized = synchronized().await;
    // Read last, so that it is as fresh as the answer.
    let unix_ms = clock::now().unix_ms();
    Ok(facts(
        json!({ "unix_ms": unix_ms, "synchronized": synchronized }),
    ))
}

/// Whether something keeps the clock right; `None` where nobody can be asked.
async fn synchronized() -> Option<bool> {
    if Path::new("/run/systemd/timesync/synchronized").exists() {
        return Some(true);
    }
    if !has_systemd() {
        return None;
    }
    let arguments = ["show", "--property", "NTPSynchronized", "--value"];
    let said = program::run("timedatectl", &arguments).await.ok()?;
    match said.output.trim() {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_with_and_without_swap() {
        let text = "MemTotal:        1000 kB\nMemFree:          100 kB\nMemAvailable:     250 kB\nCached: 90 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n";
        let data = memory_facts(text).unwrap();
        assert_eq!(data["used_percent"], 75.0);
        assert_eq!(data["swap_used_percent"], 0.0);
        assert_eq!(data["cached_kib"], 90);
        // Kernels before 3.14 do not tell what is available.
        let data = memory_facts("MemTotal: 1000 kB\nMemFree: 100 kB\n").unwrap();
        assert_eq!(data["available_kib"], 100);
        assert!(memory_facts("").is_none());
    }

    #[test]
    fn load_is_read() {
        let data = load_facts("0.50 0.25 0.10 2/345 6789\n").unwrap();
        assert_eq!(data["load_1m"], 0.5);
        assert_eq!((&data["running"], &data["tasks"]), (&json!(2), &json!(345)));
        assert!(load_facts("0.50 x 0.10 2/345 6789").is_none());
    }

    #[test]
    fn this_machine_answers() {
        let system = system().unwrap().data;
        assert!(system["memory_kib"].as_u64().unwrap() > 1024, "{system}");
        assert!(system["uptime_s"].as_u64().is_some(), "{system}");
        let handles = file_handles().unwrap().data;
        assert!(handles["allocated"].as_u64().unwrap() > 0, "{handles}");
        let own = std::process::id();
        assert!(open_files(own).unwrap().1["open"].as_u64().unwrap() > 2);
    }
}
