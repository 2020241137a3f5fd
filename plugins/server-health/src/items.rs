//! What each item looks at, and how it judges. A look answers what it saw, or why it could not see anything.

use serde_json::Value;
use windlass_sdk::{Severity, diagnosis::FindingState};

use super::{Looks, Seen};

/// Of a limit without a warning of its own, this share is a warning.
const WARNING: f64 = 0.8;
/// Names in one text.
const NAMED: usize = 5;

/// One item of the report.
pub(crate) struct Item {
    pub(crate) code: &'static str,
    pub(crate) title: &'static str,
    pub(crate) severity: Severity,
    pub(crate) look: fn(&Looks<'_>) -> Result<Seen, String>,
}

const fn critical(
    code: &'static str,
    title: &'static str,
    look: fn(&Looks<'_>) -> Result<Seen, String>,
) -> Item {
    Item {
        code,
        title,
        severity: Severity::Critical,
        look,
    }
}

const fn explaining(
    code: &'static str,
    title: &'static str,
    look: fn(&Looks<'_>) -> Result<Seen, String>,
) -> Item {
    Item {
        code,
        title,
        severity: Severity::NonCritical,
        look,
    }
}

/// The items, in the order of the report.
pub(crate) const ALL: [Item; 15] = [
    critical("agent", "The agent", agent),
    critical("disk", "Disk space", disk),
    critical("inodes", "Inodes", inodes),
    critical("memory", "Memory", memory),
    explaining("load", "Processor load", load),
    critical("file-handles", "File handles", file_handles),
    explaining("clock", "Clock", clock),
    critical("dns", "Name resolution", dns),
    explaining(
        "oom-kills",
        "Processes killed for want of memory",
        oom_kills,
    ),
    critical(
        "disk-errors",
        "Disk errors in the kernel's log",
        disk_errors,
    ),
    explaining("kernel-errors", "Errors in the kernel's log", kernel_errors),
    explaining("zombies", "Zombie processes", zombies),
    explaining("failed-units", "Failed units of systemd", failed_units),
    critical("ports", "Ports that have to be open", ports),
    explaining("packages", "Files of packages", packages),
];

fn figure(facts: &Value, name: &str) -> Result<f64, String> {
    facts[name]
        .as_f64()
        .ok_or_else(|| format!("the probe's answer has no figure `{name}`"))
}

fn list<'a>(facts: &'a Value, name: &str) -> Result<&'a [Value], String> {
    facts[name]
        .as_array()
        .map(Vec::as_slice)
        .ok_or_else(|| format!("the probe's answer has no list `{name}`"))
}

fn text<'a>(facts: &'a Value, name: &str) -> &'a str {
    facts[name].as_str().unwrap_or("?")
}

/// The first of a list, and how many more there are.
fn named(texts: &[String]) -> String {
    let mut named = texts
        .iter()
        .take(NAMED)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    if texts.len() > NAMED {
        named.push_str(&format!(" and {} more", texts.len() - NAMED));
    }
    named
}

/// Against a limit, and a lower one that warns.
fn judged(figure: f64, warning: f64, failed: f64, text: String, suggestion: &str) -> Seen {
    if figure >= failed {
        Seen::failed(text, suggestion)
    } else if figure >= warning {
        Seen::warning(text, suggestion)
    } else {
        Seen::ok(text)
    }
}

fn agent(looks: &Looks<'_>) -> Result<Seen, String> {
    let facts = looks.facts("agent", &[])?;
    let free_mib = figure(&facts, "data_free_kib")? / 1024.0;
    let text = format!(
        "agent {} has run for {:.0} s with {:.0} KiB, {free_mib:.0} MiB are free for its data",
        text(&facts, "version"),
        figure(&facts, "running_s").unwrap_or(0.0),
        figure(&facts, "resident_kib").unwrap_or(0.0),
    );
    Ok(if facts["data_full"] == true {
        Seen::failed(
            text,
            "Free room on the file system of the agent's data directory: it refuses releases until then.",
        )
    } else {
        Seen::ok(text)
    })
}

fn disk(looks: &Looks<'_>) -> Result<Seen, String> {
    fullest(
        looks,
        "disk",
        "space",
        "Remove old files, or grow the disk.",
    )
}

fn inodes(looks: &Looks<'_>) -> Result<Seen, String> {
    fullest(
        looks,
        "inodes",
        "inodes",
        "Find the directory with very many small files, and remove them.",
    )
}

/// All file systems over the limit, or the fullest.
fn fullest(looks: &Looks<'_>, probe: &str, what: &str, suggestion: &str) -> Result<Seen, String> {
    let facts = looks.facts(probe, &[])?;
    let mut disks: Vec<(&str, f64)> = facts
        .as_array()
        .ok_or("the probe's answer is no list")?
        .iter()
        // What cannot be written does not run full.
        .filter(|disk| disk["read_only"] != true)
        .filter_map(|disk| Some((disk["path"].as_str()?, disk["used_percent"].as_f64()?)))
        .collect();
    disks.sort_by(|one, two| two.1.total_cmp(&one.1));
    let Some((path, used)) = disks.first().copied() else {
        return Err("no file system could be looked at".to_owned());
    };
    let parameters = looks.parameters;
    let over: Vec<String> = disks
        .iter()
        .filter(|(_, used)| *used >= parameters.disk_warning_percent)
        .map(|(path, used)| format!("{path} {used:.1} %"))
        .collect();
    let text = if over.is_empty() {
        format!("the most used is {path}: {used:.1} % of its {what}")
    } else {
        format!(
            "{what} in use: {} (limit {:.0} %)",
            named(&over),
            parameters.disk_failed_percent
        )
    };
    Ok(judged(
        used,
        parameters.disk_warning_percent,
        parameters.disk_failed_percent,
        text,
        suggestion,
    ))
}

fn memory(looks: &Looks<'_>) -> Result<Seen, String> {
    let facts = looks.facts("memory", &[])?;
    let used = figure(&facts, "used_percent")?;
    let limit = looks.parameters.memory_failed_percent;
    let text = format!(
        "{used:.1} % of {:.0} MiB in use, {:.1} % of the swap (limit {limit:.0} %)",
        figure(&facts, "total_kib")? / 1024.0,
        figure(&facts, "swap_used_percent").unwrap_or(0.0),
    );
    Ok(judged(
        used,
        limit * WARNING,
        limit,
        text,
        "Look for the process that grew (probe `processes`), or give the server more memory.",
    ))
}

fn load(looks: &Looks<'_>) -> Result<Seen, String> {
    let facts = looks.facts("load", &[])?;
    let cpus = figure(&facts, "cpus")?.max(1.0);
    let per_cpu = figure(&facts, "load_5m")? / cpus;
    let limit = looks.parameters.load_failed_per_cpu;
    let text = format!(
        "load {:.2} on {cpus:.0} processors over five minutes: {per_cpu:.2} for each (limit {limit:.1})",
        per_cpu * cpus
    );
    Ok(judged(
        per_cpu,
        limit * WARNING,
        limit,
        text,
        "Look for the busiest processes, or move applications to other servers.",
    ))
}

fn file_handles(looks: &Looks<'_>) -> Result<Seen, String> {
    let facts = looks.facts("file-handles", &[])?;
    let limit = looks.parameters.handles_failed_percent;
    let machine = figure(&facts, "used_percent")?;
    let nearest = list(&facts, "processes")?.first();
    let process = nearest.map_or(0.0, |process| {
        figure(process, "used_percent").unwrap_or(0.0)
    });
    let mut text = format!("{machine:.1} % of the machine's file handles in use");
    if let Some(nearest) = nearest {
        text.push_str(&format!(
            "; nearest to its own limit is {} ({}) with {process:.1} %",
            nearest["name"].as_str().unwrap_or("?"),
            nearest["pid"],
        ));
    }
    Ok(judged(
        machine.max(process),
        limit * WARNING,
        limit,
        text,
        "Look for a leak of files or connections in that process, or raise its limit (LimitNOFILE, fs.file-max).",
    ))
}

fn clock(looks: &Looks<'_>) -> Result<Seen, String> {
    let facts = looks.facts("clock", &[])?;
    let drift = figure(&facts, "drift_ms")?;
    // It cannot be told more exactly than the way to the agent allows.
    let certain = (drift.abs() - figure(&facts, "round_trip_ms")? / 2.0).max(0.0);
    let limit = looks.parameters.clock_failed_ms;
    let suggestion = "Let chrony or systemd-timesyncd keep the clock.";
    let text = format!("{drift:.0} ms off the platform's clock (limit {limit:.0} ms)");
    let seen = judged(certain, limit / 2.0, limit, text, suggestion);
    Ok(match seen.state {
        FindingState::Ok if facts["synchronized"] == false => {
            Seen::warning(format!("{}; nothing keeps it right", seen.text), suggestion)
        }
        FindingState::Ok | FindingState::Warning | FindingState::Failed | FindingState::Skipped => {
            seen
        }
    })
}

fn dns(looks: &Looks<'_>) -> Result<Seen, String> {
    let name = looks.parameters.dns_name.as_deref();
    let arguments: Vec<(String, String)> = name
        .map(|name| ("name".to_owned(), name.to_owned()))
        .into_iter()
        .collect();
    let facts = looks.facts("dns", &arguments)?;
    let servers = list(&facts, "servers")?;
    let silent: Vec<String> = servers
        .iter()
        .filter(|server| server["answered"] != true)
        .map(|server| text(server, "server").to_owned())
        .collect();
    if let Some(name) = name
        && facts["lookup"]["addresses"]
            .as_array()
            .is_none_or(Vec::is_empty)
    {
        return Ok(Seen::failed(
            format!("`{name}` is not found: {}", text(&facts["lookup"], "error")),
            "Check the name, and /etc/resolv.conf on the server.",
        ));
    }
    Ok(if silent.len() == servers.len() {
        Seen::failed(
            format!("no name server answers: {}", named(&silent)),
            "Check /etc/resolv.conf, and that the server reaches port 53 of its name servers.",
        )
    } else if silent.is_empty() {
        Seen::ok(format!("{} name servers answer", servers.len()))
    } else {
        Seen::warning(
            format!("these name servers do not answer: {}", named(&silent)),
            "Remove them from /etc/resolv.conf, or mend them.",
        )
    })
}

fn log(looks: &Looks<'_>) -> Result<Value, String> {
    let within = looks.parameters.log_within_s.to_string();
    looks.facts("kernel-log", &[("within_s".to_owned(), within)])
}

/// The newest messages of one list of the kernel's log.
fn messages(facts: &Value, name: &str) -> String {
    let all: Vec<String> = facts[name]
        .as_array()
        .into_iter()
        .flatten()
        .rev()
        .map(|record| text(record, "message").to_owned())
        .collect();
    named(&all)
}

fn oom_kills(looks: &Looks<'_>) -> Result<Seen, String> {
    let facts = log(looks)?;
    let count = figure(&facts, "oom_kill_count")?;
    Ok(if count > 0.0 {
        Seen::failed(
            format!("{count:.0} messages: {}", messages(&facts, "oom_kills")),
            "Give the server more memory, or the application less work; limit what grows.",
        )
    } else {
        Seen::ok("no process was killed for want of memory")
    })
}

fn disk_errors(looks: &Looks<'_>) -> Result<Seen, String> {
    let facts = log(looks)?;
    let count = figure(&facts, "disk_error_count")?;
    Ok(if count > 0.0 {
        Seen::failed(
            format!("{count:.0} messages: {}", messages(&facts, "disk_errors")),
            "Save the data, then check the disk (smartctl) and the file system; replace the disk.",
        )
    } else {
        Seen::ok("no errors of disks or file systems")
    })
}

fn kernel_errors(looks: &Looks<'_>) -> Result<Seen, String> {
    let facts = log(looks)?;
    let count = figure(&facts, "error_count")?;
    Ok(if count > 0.0 {
        Seen::warning(
            format!("{count:.0} messages: {}", messages(&facts, "errors")),
            "Read the kernel's log (probe `kernel-log`).",
        )
    } else {
        Seen::ok("no messages of the level error or worse")
    })
}

fn zombies(looks: &Looks<'_>) -> Result<Seen, String> {
    let facts = looks.facts("processes", &[])?;
    let count = figure(&facts, "zombies")?;
    if count == 0.0 {
        return Ok(Seen::ok("no zombies"));
    }
    let parents: Vec<String> = list(&facts, "zombie_processes")?
        .iter()
        .map(|zombie| {
            format!(
                "{} ({}) of {} ({})",
                text(zombie, "name"),
                zombie["pid"],
                text(zombie, "parent_name"),
                zombie["parent"]
            )
        })
        .collect();
    let limit = looks.parameters.zombies_failed as f64;
    Ok(judged(
        count,
        1.0,
        limit,
        format!("{count:.0} zombies: {}", named(&parents)),
        "The parent does not wait for its children: mend or restart it.",
    ))
}

fn failed_units(looks: &Looks<'_>) -> Result<Seen, String> {
    let facts = looks.facts("failed-units", &[])?;
    let units: Vec<String> = list(&facts, "units")?
        .iter()
        .map(|unit| text(unit, "unit").to_owned())
        .collect();
    Ok(if units.is_empty() {
        Seen::ok("no failed units")
    } else {
        Seen::failed(
            named(&units),
            "Look at `systemctl status` and the journal of the unit; then restart it, or `systemctl reset-failed`.",
        )
    })
}

fn ports(looks: &Looks<'_>) -> Result<Seen, String> {
    let expected = &looks.parameters.expected_ports;
    if expected.is_empty() {
        return Ok(Seen::ok(
            "no port has to be open (parameter `expected_ports`)",
        ));
    }
    let mut closed = Vec::new();
    for port in expected {
        let (reached, detail) = looks.connect(*port)?;
        if !reached {
            closed.push(format!("{port} ({detail})"));
        }
    }
    Ok(if closed.is_empty() {
        Seen::ok(format!("all {} ports are open", expected.len()))
    } else {
        Seen::failed(
            format!("not open: {}", named(&closed)),
            "Start the service that should listen there, and look at its log.",
        )
    })
}

fn packages(looks: &Looks<'_>) -> Result<Seen, String> {
    let wanted = &looks.parameters.verify_packages;
    if wanted.is_empty() {
        return Ok(Seen::ok(
            "no package has to be verified (parameter `verify_packages`)",
        ));
    }
    let mut changed = Vec::new();
    for package in wanted {
        let arguments = [("package".to_owned(), package.clone())];
        let facts = looks.facts("package-verification", &arguments)?;
        let files = list(&facts, "changed")?
            .iter()
            // A configuration that was edited is what configurations are for.
            .filter(|file| file["configuration"] != true);
        changed
            .extend(files.map(|file| format!("{} ({})", text(file, "path"), text(file, "what"))));
    }
    Ok(if changed.is_empty() {
        Seen::ok(format!(
            "{} packages are as they were delivered",
            wanted.len()
        ))
    } else {
        Seen::failed(
            named(&changed),
            "Install the package again, unless somebody changed these files on purpose.",
        )
    })
}
