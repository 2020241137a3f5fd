//! From a [`Configuration`] to the texts that HAProxy and nftables read. Pure; nothing is escaped, because nothing that could
//! need it gets here: see the head of [`super`].
//!
//! Paths in the text are relative to the load balancer's directory, in which HAProxy runs.
//!
//! Choices, and why:
//! - **Weights are written as they are now** (0 to 100 of HAProxy's 0 to 256, so that they read back as they were set): a
//!   reload never gives a drained server its old weight, not for a moment.
//! - `http-server-close`: a request never travels on a connection that a server may be about to close. With connections
//!   kept open to servers, each server that stops or tires of an idle connection costs a request.
//! - `idle-close-on-response`: a reload closes a client's idle connection only together with an answer.
//! - A client that sticks to a server by its cookie is sent elsewhere while that server's weight is 0 (`ignore-persist`).
//!   TCP clients stick by their address, hashed over the servers with weight.
//! - `server-state-file`: what checks had found is known after a reload. The agent writes into it what may be taken along.

use std::fmt::Write as _;

use super::{
    BackEndConfig, Balance, Configuration, GroupConfig, HealthProbe, HostPattern, ListenerConfig,
    Protocol,
};
use crate::id::LoadBalancerId;

/// HAProxy's main file.
pub const CONFIGURATION_FILE: &str = "haproxy.cfg";
/// The state of servers before a reload.
pub const STATE_FILE: &str = "servers.state";
/// The socket of the workers, from which listeners are handed over.
pub const WORKER_SOCKET: &str = "worker.sock";
/// The directory of certificates: `<id>.pem` each, chain and key.
pub const CERTIFICATES_DIRECTORY: &str = "certificates";

/// Between two checks of a server that changes its state, or is down.
const FAST_CHECK_MS: u32 = 500;

/// Files that HAProxy may have open: nearly 100,000 connections, two files each. It makes tables for as many as the system
/// allows it, which in containers can be a billion.
const MAX_FILES: u32 = 200_000;

/// What the machine that HAProxy runs on has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// The user, and its group, that workers become; `None`: they stay who the agent is.
    pub worker: Option<(String, String)>,
    /// Whether there is IPv6.
    pub ipv6: bool,
}

/// What HAProxy says of itself when it runs this configuration, with these or other weights.
#[must_use]
pub fn description(configuration: &Configuration) -> String {
    format!(
        "{}@{}",
        configuration.load_balancer,
        configuration.structure_digest().short()
    )
}

/// HAProxy's configuration.
#[must_use]
pub fn haproxy(configuration: &Configuration, machine: &Machine) -> String {
    let mut text = String::from("# Written by windlass-agent: what is changed here is lost.\n");
    global(&mut text, configuration, machine);
    for listener in &configuration.listeners {
        front_end(&mut text, listener, machine);
        for back_end in listener.back_ends() {
            self::back_end(&mut text, listener, back_end);
        }
    }
    text
}

/// One line; a `String` takes every text.
macro_rules! line {
    ($text:expr, $($format:tt)*) => {
        writeln!($text, $($format)*).expect("a text takes a line")
    };
}

fn global(text: &mut String, configuration: &Configuration, machine: &Machine) {
    line!(text, "global");
    line!(text, "    description {}", description(configuration));
    line!(text, "    log stdout format raw daemon notice");
    line!(
        text,
        "    stats socket unix@{WORKER_SOCKET} mode 600 level admin expose-fd listeners"
    );
    line!(text, "    server-state-file {STATE_FILE}");
    line!(text, "    hard-stop-after 1h");
    line!(text, "    fd-hard-limit {MAX_FILES}");
    line!(
        text,
        "    ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets"
    );
    if let Some((user, group)) = &machine.worker {
        line!(text, "    user {user}");
        line!(text, "    group {group}");
    }
    line!(text, "defaults");
    line!(text, "    log global");
    line!(text, "    load-server-state-from-file global");
    line!(text, "    option dontlognull");
    line!(text, "    option redispatch");
    line!(text, "    retries 3");
    line!(text, "    timeout connect 5s");
    line!(text, "    timeout queue 10s");
    line!(text, "    timeout client 60s");
    line!(text, "    timeout server 120s");
    line!(text, "    timeout tunnel 1h");
    line!(text, "    timeout client-fin 30s");
    line!(text, "    timeout http-request 30s");
    line!(text, "    timeout http-keep-alive 10s");
}

const fn is_http(protocol: Protocol) -> bool {
    match protocol {
        Protocol::Http | Protocol::Https { .. } => true,
        Protocol::Tcp => false,
    }
}

fn front_end(text: &mut String, listener: &ListenerConfig, machine: &Machine) {
    let http = is_http(listener.protocol);
    line!(text, "frontend {}", listener.id);
    line!(text, "    mode {}", if http { "http" } else { "tcp" });
    let tls = match listener.protocol {
        Protocol::Https { certificate } => {
            format!(" ssl crt {CERTIFICATES_DIRECTORY}/{certificate}.pem alpn h2,http/1.1")
        }
        Protocol::Http | Protocol::Tcp => String::new(),
    };
    line!(text, "    bind *:{}{tls}", listener.front_port);
    if machine.ipv6 {
        line!(text, "    bind :::{} v6only{tls}", listener.front_port);
    }
    if let Some(access) = &listener.access {
        for network in access {
            line!(text, "    acl allowed src {network}");
        }
        // Without an address in it, a list lets nobody in.
        if access.is_empty() {
            line!(text, "    tcp-request connection reject");
        } else {
            line!(text, "    tcp-request connection reject unless allowed");
        }
    }
    if http {
        line!(text, "    option http-server-close");
        line!(text, "    option idle-close-on-response");
        if listener.forwarded_for {
            line!(text, "    option forwardfor");
            let scheme = if tls.is_empty() { "http" } else { "https" };
            line!(
                text,
                "    http-request set-header X-Forwarded-Proto {scheme}"
            );
        }
    }
    for group in &listener.groups {
        use_group(text, group);
    }
    line!(text, "    default_backend {}", listener.back_end.pool);
}

fn use_group(text: &mut String, group: &GroupConfig) {
    let pool = group.back_end.pool;
    let mut conditions = String::new();
    for host in &group.hosts {
        match host {
            HostPattern::Exact(name) => line!(
                text,
                "    acl {pool}_host req.hdr(host),host_only,lower -m str {name}"
            ),
            HostPattern::Below(name) => line!(
                text,
                "    acl {pool}_host req.hdr(host),host_only,lower -m end .{name}"
            ),
        }
    }
    for path in &group.paths {
        line!(text, "    acl {pool}_path path -m beg {path}");
    }
    if !group.hosts.is_empty() {
        conditions.push_str(&format!(" {pool}_host"));
    }
    if !group.paths.is_empty() {
        conditions.push_str(&format!(" {pool}_path"));
    }
    line!(text, "    use_backend {pool} if{conditions}");
}

fn back_end(text: &mut String, listener: &ListenerConfig, back_end: &BackEndConfig) {
    let http = is_http(listener.protocol);
    let pool = back_end.pool;
    line!(text, "backend {pool}");
    line!(text, "    mode {}", if http { "http" } else { "tcp" });
    match (listener.sticky && !http, listener.balance) {
        (true, Balance::RoundRobin | Balance::LeastConnections) => {
            line!(text, "    balance source");
            line!(text, "    hash-type consistent");
        }
        (false, Balance::RoundRobin) => line!(text, "    balance roundrobin"),
        (false, Balance::LeastConnections) => line!(text, "    balance leastconn"),
    }
    let by_cookie = listener.sticky && http;
    if by_cookie {
        let secure = match listener.protocol {
            Protocol::Https { .. } => " secure",
            Protocol::Http | Protocol::Tcp => "",
        };
        line!(
            text,
            "    cookie {pool} insert indirect nocache httponly{secure}"
        );
        for member in &back_end.members {
            let server = member.server;
            line!(
                text,
                "    ignore-persist if {{ req.cook({pool}) {server} }} {{ srv_uweight({pool}/{server}) 0 }}"
            );
        }
    }
    let health = &listener.health;
    match &health.probe {
        HealthProbe::Tcp => {}
        HealthProbe::Http { path } => {
            line!(text, "    option httpchk");
            line!(
                text,
                "    http-check send meth GET uri {path} ver HTTP/1.1 hdr Host localhost"
            );
            line!(text, "    http-check expect status 200-399");
        }
    }
    let fast = health.interval_ms.min(FAST_CHECK_MS);
    line!(
        text,
        "    default-server check inter {}ms fastinter {fast}ms downinter {fast}ms rise {} fall {}",
        health.interval_ms,
        health.rise,
        health.fall
    );
    for member in &back_end.members {
        let server = member.server;
        let cookie = if by_cookie {
            format!(" cookie {server}")
        } else {
            String::new()
        };
        line!(
            text,
            "    server {server} {} weight {}{cookie}",
            member.address,
            member.weight
        );
    }
}

/// The nftables table of a load balancer.
#[must_use]
pub fn table(load_balancer: LoadBalancerId) -> String {
    format!("windlass_{load_balancer}")
}

/// Takes the load balancer's table away, also where there is none.
#[must_use]
pub fn nftables_removed(load_balancer: LoadBalancerId) -> String {
    let table = table(load_balancer);
    format!("table inet {table}\ndelete table inet {table}\n")
}

/// Replaces the load balancer's table, in one transaction; `None`: no listener has a peak.
///
/// What exceeds the peak is dropped, for each direction by itself; TCP slows down to the rate. After a pause, what the rate
/// allows in a second may come at once (the kernel's bucket holds that in any case), and 256 KiB more: with less, a low
/// rate would drop each segment of a large send.
#[must_use]
pub fn nftables(configuration: &Configuration) -> Option<String> {
    const BURST_BYTES: u64 = 256 * 1024;
    let peaks: Vec<(u16, u64)> = configuration
        .listeners
        .iter()
        .filter_map(|listener| {
            let peak = listener.peak_kbit_per_s?;
            Some((listener.front_port, u64::from(peak) * 1000 / 8))
        })
        .collect();
    if peaks.is_empty() {
        return None;
    }
    let table = table(configuration.load_balancer);
    let mut text = nftables_removed(configuration.load_balancer);
    line!(text, "table inet {table} {{");
    for (chain, hook, end) in [("sent", "output", "sport"), ("taken", "input", "dport")] {
        line!(text, "    chain {chain} {{");
        line!(
            text,
            "        type filter hook {hook} priority 0; policy accept;"
        );
        for (port, bytes_per_s) in &peaks {
            line!(
                text,
                "        tcp {end} {port} limit rate over {bytes_per_s} bytes/second burst {BURST_BYTES} bytes drop"
            );
        }
        line!(text, "    }}");
    }
    line!(text, "}}");
    Some(text)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::{
        id::{CertificateId, ListenerId, PoolId, ServerId},
        load_balancer::{HealthCheck, MemberConfig},
    };

    fn machine() -> Machine {
        Machine {
            worker: Some(("haproxy".into(), "haproxy".into())),
            ipv6: true,
        }
    }

    fn members(numbers: &[(u128, u32)]) -> Vec<MemberConfig> {
        numbers
            .iter()
            .map(|(number, weight)| MemberConfig {
                server: ServerId::from_uuid(Uuid::from_u128(*number)),
                address: format!("10.0.0.{number}:8080").parse().unwrap(),
                weight: *weight,
            })
            .collect()
    }

    fn listener(number: u128, protocol: Protocol, front_port: u16) -> ListenerConfig {
        ListenerConfig {
            id: ListenerId::from_uuid(Uuid::from_u128(number)),
            protocol,
            front_port,
            balance: Balance::RoundRobin,
            forwarded_for: true,
            sticky: false,
            health: HealthCheck::default(),
            peak_kbit_per_s: None,
            access: None,
            back_end: BackEndConfig {
                pool: PoolId::from_uuid(Uuid::from_u128(number)),
                members: members(&[(1, 100), (2, 0)]),
            },
            groups: Vec::new(),
        }
    }

    fn configuration(listeners: Vec<ListenerConfig>) -> Configuration {
        Configuration {
            load_balancer: LoadBalancerId::from_uuid(Uuid::from_u128(1)),
            revision: 7,
            listeners,
        }
    }

    #[test]
    fn plain_http() {
        let plain = configuration(vec![listener(1, Protocol::Http, 80)]);
        insta::assert_snapshot!(haproxy(&plain, &machine()));
    }

    #[test]
    fn everything_at_once() {
        let certificate = CertificateId::from_uuid(Uuid::from_u128(1));
        let mut https = listener(1, Protocol::Https { certificate }, 443);
        https.sticky = true;
        https.balance = Balance::LeastConnections;
        https.health.probe = HealthProbe::Http {
            path: "/healthz?full=1".parse().unwrap(),
        };
        https.health.interval_ms = 200;
        https.access = Some(vec!["10.0.0.0/8".parse().unwrap(), "::1".parse().unwrap()]);
        https.groups = vec![GroupConfig {
            hosts: vec![
                "shop.example".parse().unwrap(),
                "*.shop.example".parse().unwrap(),
            ],
            paths: vec!["/api/".parse().unwrap()],
            back_end: BackEndConfig {
                pool: PoolId::from_uuid(Uuid::from_u128(9)),
                members: members(&[(3, 37)]),
            },
        }];
        let mut tcp = listener(2, Protocol::Tcp, 13_000);
        tcp.sticky = true;
        tcp.access = Some(Vec::new());
        tcp.back_end.members[0].address = "[2001:db8::1]:5432".parse().unwrap();
        let all = configuration(vec![https, tcp]);
        let bare = Machine {
            worker: None,
            ipv6: false,
        };
        insta::assert_snapshot!(haproxy(&all, &bare));
    }

    #[test]
    fn peaks() {
        let mut one = listener(1, Protocol::Http, 80);
        assert_eq!(nftables(&configuration(vec![one.clone()])), None);
        one.peak_kbit_per_s = Some(8_000);
        let mut two = listener(2, Protocol::Tcp, 13_000);
        two.peak_kbit_per_s = Some(100_000);
        let script = nftables(&configuration(vec![one, two])).unwrap();
        insta::assert_snapshot!(script);
    }
}
