//! What the agent knows about its machine.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
};

use windlass_protocol::ServerFacts;

use crate::{
    config::{DataDir, Policy},
    proc, users,
};

/// Reads the machine's facts.
#[must_use]
pub fn gather(data: &DataDir, policy: &Policy) -> ServerFacts {
    let uname = rustix::system::uname();
    let disk = rustix::fs::statvfs(data.path())
        .map_or(0, |stat| stat.f_blocks.saturating_mul(stat.f_frsize));
    ServerFacts {
        host_name: uname.nodename().to_string_lossy().into_owned(),
        addresses: local_addresses(),
        os: os(),
        kernel: uname.release().to_string_lossy().into_owned(),
        arch: uname.machine().to_string_lossy().into_owned(),
        cores: std::thread::available_parallelism()
            .map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX)),
        memory_bytes: memory(),
        disk_bytes: disk,
        boot_id: proc::boot_id(),
        agent_version: env!("CARGO_PKG_VERSION").into(),
        agent_user: users::own().name,
        allowed_users: policy.users.clone(),
        root_enabled: policy.root,
    }
}

fn os() -> String {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
            .unwrap_or_default()
    };
    format!("{} {}", field("ID"), field("VERSION_ID"))
        .trim()
        .to_owned()
}

fn memory() -> u64 {
    fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            text.lines()
                .next()?
                .split_whitespace()
                .nth(1)?
                .parse::<u64>()
                .ok()
        })
        .map_or(0, |kib| kib * 1024)
}

/// Local addresses from the kernel's routing tables, without loopback and link-local ones: first those that the machine speaks
/// to others from, so that bridges of containers and the like stand behind.
pub(crate) fn local_addresses() -> Vec<String> {
    let mut found: Vec<IpAddr> = Vec::new();
    let trie = fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let mut last = "";
    for line in trie.lines() {
        let line = line.trim();
        if line.contains("host LOCAL")
            && let Ok(address) = last.parse::<Ipv4Addr>()
            && !address.is_loopback()
        {
            found.push(address.into());
        }
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address;
        }
    }
    let six = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    for line in six.lines() {
        if let Some(digits) = line.split(' ').next()
            && let Ok(bits) = u128::from_str_radix(digits, 16)
        {
            let address = Ipv6Addr::from_bits(bits);
            if !address.is_loopback() && !address.is_unicast_link_local() {
                found.push(address.into());
            }
        }
    }
    let outgoing = outgoing_addresses();
    found.sort_by_key(|address| (!outgoing.contains(address), *address));
    found.dedup();
    found.iter().map(ToString::to_string).collect()
}

/// What the machine's default routes speak from. Nothing is sent: the kernel says it when a socket is pointed somewhere (here:
/// to addresses that are kept for documentation).
fn outgoing_addresses() -> Vec<IpAddr> {
    let outgoing = |local: &str, elsewhere: &str| {
        let socket = UdpSocket::bind(local).ok()?;
        socket.connect(elsewhere).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    [
        outgoing("0.0.0.0:0", "198.51.100.1:9"),
        outgoing("[::]:0", "[2001:db8::1]:9"),
    ]
    .into_iter()
    .flatten()
    .collect()
}
