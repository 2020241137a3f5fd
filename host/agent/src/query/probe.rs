//! Probes: read-only looks at this machine. Each has a code, arguments that may be left out, and facts of a fixed shape.
//!
//! All of them work as an ordinary user; what that user may not see is left out, and said in the facts. Figures carry their unit
//! in their name. Shapes grow by new fields only. Source: wit, `probes`; spec "Diagnostics".
//!
//! | code | arguments | facts |
//! | --- | --- | --- |
//! | `available` | | codes of all probes: `["system", …]` |
//! | `system` | | `host_name`, `os`, `os_version`, `os_title`, `kernel`, `arch`, `cpus`, `memory_kib`, `uptime_s`, `booted_at_unix_ms`, `boot_id`, `systemd` (whether it runs this machine) |
//! | `memory` | | `total_kib`, `available_kib`, `free_kib`, `cached_kib`, `swap_total_kib`, `swap_free_kib`, `used_percent`, `swap_used_percent` |
//! | `load` | | `load_1m`, `load_5m`, `load_15m`, `cpus`, `running`, `tasks` |
//! | `file-handles` | | `allocated`, `max`, `used_percent`, `processes` (the 10 nearest to their own limit: `pid`, `name`, `open`, `limit`, `used_percent`), `unseen_processes` |
//! | `clock` | | `unix_ms`, `synchronized` (`null`: nobody here knows); the platform adds `platform_unix_ms`, `round_trip_ms`, `drift_ms` |
//! | `dns` | `name`: looked up, too | `servers` (`server`, `answered`, `response`, `elapsed_us`, `error`), `search`, `lookup` (`name`, `addresses`, `elapsed_us`, `error`) |
//! | `kernel-log` | `within_s`: only the newest seconds | `source`, `uptime_s`, `records`; `error_count`, `oom_kill_count`, `disk_error_count` and their last 50 as `errors`, `oom_kills`, `disk_errors` (`at_s` since the start of the machine, `level`, `message`); text: the log |
//! | `boot-log` | | `source`, `lines`; text: the log of the machine's last start |
//! | `processes` | | `total`, `threads`, `running`, `stopped`, `uninterruptible`, `zombies`; `zombie_processes`, `uninterruptible_processes` (`pid`, `name`, `parent`, `parent_name`); `by_memory`, `by_cpu_time` (`pid`, `name`, `resident_kib`, `cpu_s`, `threads`) |
//! | `failed-units` | | `units`: `unit`, `load`, `active`, `sub`, `description`; `unsupported` without systemd |
//! | `agent` | | `version`, `pid`, `user`, `running_s`, `resident_kib`, `threads`, `open_files`, `data_dir`, `data_free_kib`, `data_full`, `journal_bytes`, `runs`, `instances`, `cgroups`, `root_enabled`, `allowed_users` |
//! | `disk` | `path`: only the file system that holds it | a list: `path`, `device`, `type`, `read_only`, `total_kib`, `used_kib`, `available_kib`, `used_percent`; or `skipped` with the reason |
//! | `inodes` | `path` | a list: `path`, `device`, `type`, `total`, `used`, `free`, `used_percent`; or `skipped` |
//! | `interfaces` | | a list: `name`, `up`, `loopback`, `state`, `carrier`, `mac`, `mtu`, `speed_mbit_s`, and `rx_`/`tx_` `bytes`, `errors`, `dropped` |
//! | `addresses` | | `source` (`ip`: all is known; `proc`: addresses alone), `addresses`: `interface`, `address`, `prefix`, `family`, `scope`, `dynamic` |
//! | `routes` | `to`: an address | `routes` (`family`, `destination`, `prefix`, `gateway`, `interface`, `metric`, `reject`), `default_ipv4`, `default_ipv6`, `to` (`target`, `route`: the one that is taken) |
//! | `firewall` | | `tool` (`nft`, `iptables`), `rules`, `dropping_rules`, `input_policy_drop`, `output_policy_drop`, `chains` (`family`, `table`, `name`, `hook`, `policy`); text: the rules. Root only |
//! | `listeners` | `port` | a list: `protocol`, `address`, `port`, `uid`, `pid`, `process` (both `null` where this user may not see them) |
//! | `sockets` | | `tcp`: connections by state; `used`, `tcp_orphans`, `tcp_memory_pages`, `udp` |
//! | `ssh` | | `installed`, `running`, `listening_ports`, `configured_ports`, `configured_ports_open`, `permit_root_login`, `password_authentication`, `files` (`path`, `present`); text: the configuration |
//! | `package-verification` | `package`: only this one | `tool` (`dpkg`, `rpm`), `changed_count`, `changed_configuration_count`, `changed` (`path`, `what`: `content`, `attributes`, `missing`; `configuration`) |

mod disks;
mod dns;
mod firewall;
mod logs;
mod network;
mod packages;
mod processes;
mod sockets;
mod ssh;
mod system;

use std::collections::BTreeMap;

use windlass_protocol::{ProbeReply, QueryError, QueryErrorCode};

use super::Scope;

/// Codes of all probes of this agent.
pub const CODES: [&str; 21] = [
    "system",
    "memory",
    "load",
    "file-handles",
    "clock",
    "disk",
    "inodes",
    "dns",
    "kernel-log",
    "boot-log",
    "processes",
    "failed-units",
    "agent",
    "interfaces",
    "addresses",
    "routes",
    "firewall",
    "listeners",
    "sockets",
    "ssh",
    "package-verification",
];

/// Arguments of a probe.
pub(super) type Arguments = BTreeMap<String, String>;

/// Runs a probe.
///
/// # Errors
/// `unsupported` for a code that is not known, and where the machine has no such thing; otherwise why it could not be seen.
pub async fn run(
    code: &str,
    arguments: Arguments,
    scope: &Scope,
) -> Result<ProbeReply, QueryError> {
    match code {
        "available" => Ok(facts(CODES.into())),
        "system" => scope.read(|_| system::system()).await,
        "memory" => scope.read(|_| system::memory()).await,
        "load" => scope.read(|_| system::load()).await,
        "file-handles" => scope.read(|_| system::file_handles()).await,
        "clock" => system::clock().await,
        "disk" => scope.read(move |_| disks::disk(&arguments)).await,
        "inodes" => scope.read(move |_| disks::inodes(&arguments)).await,
        "dns" => dns::dns(&arguments).await,
        "kernel-log" => logs::kernel_log(&arguments, scope).await,
        "boot-log" => logs::boot_log(scope).await,
        "processes" => scope.read(|_| processes::processes()).await,
        "failed-units" => processes::failed_units().await,
        "agent" => scope.read(processes::agent).await,
        "interfaces" => scope.read(|_| network::interfaces()).await,
        "addresses" => network::addresses().await,
        "routes" => scope.read(move |_| network::routes(&arguments)).await,
        "firewall" => firewall::firewall().await,
        "listeners" => scope.read(move |_| sockets::listeners(&arguments)).await,
        "sockets" => scope.read(|_| sockets::sockets()).await,
        "ssh" => scope.read(|_| ssh::ssh()).await,
        "package-verification" => packages::verify(&arguments).await,
        other => Err(QueryError::new(
            QueryErrorCode::Unsupported,
            format!(
                "the agent {} has no probe `{other}`; it has {}",
                env!("CARGO_PKG_VERSION"),
                CODES.join(", ")
            ),
        )),
    }
}

/// Facts without a text.
fn facts(data: serde_json::Value) -> ProbeReply {
    ProbeReply {
        data,
        text: String::new(),
        dropped_bytes: 0,
    }
}

/// Facts with the text that they were read from.
fn facts_of(data: serde_json::Value, text: String) -> ProbeReply {
    ProbeReply {
        data,
        text,
        dropped_bytes: 0,
    }
}

/// A share in percent with one decimal; 0 of nothing is 0.
fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    (part as f64 / whole as f64 * 1000.0).round() / 10.0
}
