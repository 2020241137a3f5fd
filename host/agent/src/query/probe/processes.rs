//! Processes, failed units of systemd, and the agent itself.

use std::{collections::HashMap, fs};

use serde_json::{Value, json};
use windlass_protocol::{ProbeReply, QueryError, QueryErrorCode};

use super::{facts, facts_of, system::has_systemd};
use crate::{
    cache,
    execute::Context,
    proc,
    query::{failed, program, read_text},
    users,
};

/// Processes in a list of the largest.
const LARGEST: usize = 10;
/// Zombies and stuck processes that are named.
const NAMED: usize = 50;
/// Clock ticks in a second: `USER_HZ`, which is 100 on every Linux that Windlass runs on.
const TICKS_PER_SECOND: u64 = 100;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Process {
    pid: u32,
    parent: u32,
    name: String,
    state: char,
    threads: u64,
    cpu_ticks: u64,
    resident_pages: u64,
}

impl Process {
    /// One `/proc/<pid>/stat` (proc(5)).
    fn parse(text: &str) -> Option<Self> {
        let (pid, rest) = text.split_once(" (")?;
        let (name, rest) = rest.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let figure = |at: usize| fields.get(at)?.parse::<u64>().ok();
        Some(Self {
            pid: pid.parse().ok()?,
            parent: fields.get(1)?.parse().ok()?,
            name: name.to_owned(),
            state: fields.first()?.chars().next()?,
            threads: figure(17)?,
            cpu_ticks: figure(11)? + figure(12)?,
            resident_pages: figure(21)?,
        })
    }
}

pub(super) fn processes() -> Result<ProbeReply, QueryError> {
    let all: Vec<Process> = proc::all_pids()
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok())
        .filter_map(|text| Process::parse(&text))
        .collect();
    if all.is_empty() {
        return Err(failed("no process can be seen below /proc"));
    }
    Ok(facts(summary(&all, resident_kib)))
}

/// What a process has in memory; `None` when it is gone.
fn resident_kib(process: &Process) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

fn summary(all: &[Process], resident_kib: impl Fn(&Process) -> Option<u64>) -> Value {
    let names: HashMap<u32, &str> = all
        .iter()
        .map(|process| (process.pid, process.name.as_str()))
        .collect();
    let in_state = |states: &str| {
        all.iter()
            .filter(|process| states.contains(process.state))
            .collect::<Vec<_>>()
    };
    let named = |processes: &[&Process]| -> Vec<Value> {
        let one = |process: &&Process| {
            json!({
                "pid": process.pid,
                "name": process.name,
                "parent": process.parent,
                "parent_name": names.get(&process.parent),
            })
        };
        processes.iter().take(NAMED).map(one).collect()
    };
    let largest = |figure: fn(&Process) -> u64| {
        let mut sorted: Vec<&Process> = all.iter().collect();
        sorted.sort_by_key(|process| std::cmp::Reverse(figure(process)));
        let one = |process: &Process| {
            json!({
                "pid": process.pid,
                "name": process.name,
                "resident_kib": resident_kib(process),
                "cpu_s": process.cpu_ticks / TICKS_PER_SECOND,
                "threads": process.threads,
            })
        };
        let found: Vec<Value> = sorted.into_iter().take(LARGEST).map(one).collect();
        found
    };
    let (zombies, stuck) = (in_state("ZX"), in_state("D"));
    json!({
        "total": all.len(),
        "threads": all.iter().map(|process| process.threads).sum::<u64>(),
        "running": in_state("R").len(),
        "stopped": in_state("Tt").len(),
        "uninterruptible": stuck.len(),
        "zombies": zombies.len(),
        "zombie_processes": named(&zombies),
        "uninterruptible_processes": named(&stuck),
        "by_memory": largest(|process| process.resident_pages),
        "by_cpu_time": largest(|process| process.cpu_ticks),
    })
}

pub(super) async fn failed_units() -> Result<ProbeReply, QueryError> {
    if !has_systemd() {
        return Err(QueryError::new(
            QueryErrorCode::Unsupported,
            "systemd does not run this server, so there are no units",
        ));
    }
    let arguments = [
        "list-units",
        "--state=failed",
        "--all",
        "--plain",
        "--no-legend",
        "--no-pager",
        "--full",
    ];
    let said = program::run("systemctl", &arguments).await?;
    if said.code != 0 {
        return Err(failed(format!(
            "systemctl ended with {}: {}",
            said.code,
            said.errors.trim()
        )));
    }
    Ok(facts_of(
        json!({ "units": units(&said.output) }),
        said.output,
    ))
}

fn units(listed: &str) -> Vec<Value> {
    listed
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (unit, load, active, sub) =
                (words.next()?, words.next()?, words.next()?, words.next()?);
            Some(json!({
                "unit": unit,
                "load": load,
                "active": active,
                "sub": sub,
                "description": words.collect::<Vec<_>>().join(" "),
            }))
        })
        .collect()
}

pub(super) fn agent(context: &Context) -> Result<ProbeReply, QueryError> {
    let own = read_text("/proc/self/status")?;
    let figure = |name: &str| -> Option<u64> {
        own.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    };
    let stat = read_text("/proc/self/stat")?;
    let started_ticks: Option<u64> = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.split(' ').nth(19)?.parse().ok());
    let uptime: Option<f64> = read_text("/proc/uptime")?
        .split_whitespace()
        .next()
        .and_then(|text| text.parse().ok());
    let running_s = started_ticks
        .zip(uptime)
        .map(|(ticks, uptime)| (uptime as u64).saturating_sub(ticks / TICKS_PER_SECOND));
    let data = &context.data;
    let count = |path| fs::read_dir(path).map_or(0, Iterator::count);
    let free_bytes = cache::free_bytes(data.path());
    Ok(facts(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "user": users::own().name,
        "running_s": running_s,
        "resident_kib": figure("VmRSS"),
        "threads": figure("Threads"),
        "open_files": fs::read_dir("/proc/self/fd").map_or(0, Iterator::count),
        "data_dir": data.path().to_string_lossy(),
        "data_free_kib": free_bytes / 1024,
        "data_full": free_bytes < context.policy.min_free_bytes,
        "journal_bytes": fs::metadata(data.journal()).map_or(0, |meta| meta.len()),
        "runs": count(data.runs()),
        "instances": count(data.instances()),
        "cgroups": context.cgroup.is_some(),
        "root_enabled": context.policy.root,
        "allowed_users": context.policy.users,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(pid: u32, name: &str, state: char, parent: u32, ticks: u64, pages: u64) -> String {
        format!(
            "{pid} ({name}) {state} {parent} 1 1 0 -1 4194560 0 0 0 0 {ticks} 1 0 0 20 0 3 0 555 1000 {pages} 18446744073709551615\n"
        )
    }

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let process = Process::parse(&stat(7, "a) R 1 (b", 'Z', 3, 41, 9)).unwrap();
        assert_eq!(
            process,
            Process {
                pid: 7,
                parent: 3,
                name: "a) R 1 (b".into(),
                state: 'Z',
                threads: 3,
                cpu_ticks: 42,
                resident_pages: 9,
            }
        );
        assert!(Process::parse("7 (sh) R").is_none());
    }

    #[test]
    fn zombies_are_named_with_their_parent() {
        let all: Vec<Process> = [
            stat(1, "init", 'S', 0, 200, 4),
            stat(2, "mother", 'S', 1, 100, 8),
            stat(3, "child", 'Z', 2, 0, 0),
        ]
        .iter()
        .map(|text| Process::parse(text).unwrap())
        .collect();
        let seen = summary(&all, |process| Some(process.resident_pages * 4));
        assert_eq!(
            seen["zombie_processes"],
            json!([{ "pid": 3, "name": "child", "parent": 2, "parent_name": "mother" }])
        );
        assert_eq!(seen["by_memory"][0]["resident_kib"], 32);
        assert_eq!(seen["by_cpu_time"][0]["pid"], 1);
        assert_eq!((&seen["total"], &seen["zombies"]), (&json!(3), &json!(1)));
    }

    #[test]
    fn failed_units_are_listed() {
        let found = units("  nginx.service loaded failed failed A web server\n\n");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0]["unit"], "nginx.service");
        assert_eq!(found[0]["description"], "A web server");
    }

    #[test]
    fn this_machine_has_processes() {
        let seen = processes().unwrap().data;
        assert!(seen["total"].as_u64().unwrap() > 0, "{seen}");
    }
}
