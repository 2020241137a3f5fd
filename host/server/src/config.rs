//! What a server is told at its start. Owns no behaviour; `platform` acts on it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use windlass_domain::{invocation::quota::INVOCATIONS_PER_DAY, load_balancer::PortRanges};

/// The share of the disk that uploads leave free by default, in percent.
pub const UPLOAD_DISK_RESERVE_PERCENT: u8 = 5;

/// Settings of a server.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Everything that lasts: store, blobs, keys, compiled plugins. Made if it is missing, with mode 0700.
    pub data: PathBuf,
    /// Where the API listens. Port 0: any.
    pub listen: SocketAddr,
    /// Where agents connect. Port 0: any.
    pub agent_listen: SocketAddr,
    /// What agents are told to connect to, `host:port`; the listening address unless given.
    pub agent_advertise: Option<String>,
    /// The plugin directory; made if it is missing.
    pub plugins: PathBuf,
    /// The directory that ships with this program: plugins whose bytes stand there are approved when they are first seen,
    /// unless they want `root`.
    pub shipped_plugins: Option<PathBuf>,
    /// TLS of the API.
    pub tls: Tls,
    /// Networks that notifications are not sent to.
    pub notification_deny: Vec<ipnet::IpNet>,
    /// Exceptions from these networks.
    pub notification_allow: Vec<crate::notify::destination::Allowed>,
    /// Which plugin files are trusted.
    pub trust: PluginTrust,
    /// How the call journal is kept.
    pub journal: JournalLimits,
    /// Front ports that listeners of load balancers may have.
    pub front_ports: PortRanges,
    /// Invocations that a workspace may make in a day.
    pub invocations_per_day: u32,
    /// The share of the data directory's disk that uploads leave free, in percent.
    pub upload_disk_reserve_percent: u8,
    /// How long an agent may be disconnected before the outcome of a step on its server counts as unknown.
    pub agent_lost_after: Duration,
    /// The program that compiles plugins; this program's own subcommand unless given (tests run in another program).
    pub compile_command: Option<Vec<std::ffi::OsString>>,
}

/// Which plugin files are trusted; the default trusts all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PluginTrust {
    /// A file with an Ed25519 public key, or a directory of such files (`*.pub`, `*.pem`).
    pub keys: Option<PathBuf>,
    /// Whether a file that none of the keys signed is refused.
    pub require_signature: bool,
    /// A file of SHA-256 digests, one a line: only these are plugins.
    pub allow_list: Option<PathBuf>,
}

/// How much of the calls of plugins is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalLimits {
    /// Older calls are dropped.
    pub max_age: Duration,
    /// The oldest calls are dropped beyond this size, in bytes.
    pub max_bytes: u64,
}

impl Default for JournalLimits {
    fn default() -> Self {
        Self {
            max_age: Duration::from_secs(7 * 24 * 3600),
            max_bytes: 512 * 1024 * 1024,
        }
    }
}

/// TLS of the API. Agents' connections have TLS always.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Tls {
    /// Plain HTTP on a loopback address, the platform's own certificate on any other.
    #[default]
    ByAddress,
    /// Plain HTTP, also on other addresses: something in front ends TLS.
    Off,
    /// The platform's own certificate, whose key agents pin; `windlass server` prints its fingerprint.
    Own,
    /// A certificate chain and its key, both PEM.
    Files {
        /// The chain, the server's certificate first.
        certificate: PathBuf,
        /// The key, PKCS#8, PKCS#1 or SEC1.
        key: PathBuf,
    },
}

impl ServerConfig {
    /// A server on this machine alone: agents connect to any free port of it.
    #[must_use]
    pub fn local(data: &Path, listen: SocketAddr, plugins: &Path) -> Self {
        Self {
            data: data.to_owned(),
            listen,
            agent_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            agent_advertise: None,
            plugins: plugins.to_owned(),
            shipped_plugins: shipped_plugins(),
            tls: Tls::ByAddress,
            notification_deny: crate::notify::destination::denied_by_default(),
            // Everything of a local installation is on this machine.
            notification_allow: ["127.0.0.0/8", "::1/128"]
                .map(|network| network.parse().expect("it is a network"))
                .into(),
            trust: PluginTrust::default(),
            journal: JournalLimits::default(),
            front_ports: PortRanges::default(),
            invocations_per_day: INVOCATIONS_PER_DAY,
            upload_disk_reserve_percent: UPLOAD_DISK_RESERVE_PERCENT,
            agent_lost_after: crate::engine::AGENT_LOST_AFTER,
            compile_command: None,
        }
    }
}

/// Where the plugins of this installation stand, seen from this program's file: `plugins` beside it, beside its directory (a
/// build), or `share/windlass/plugins` (an installed package).
#[must_use]
pub fn shipped_plugins() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let directory = program.parent()?;
    ["plugins", "../plugins", "../share/windlass/plugins"]
        .into_iter()
        .map(|place| directory.join(place))
        .find(|place| place.is_dir())
}
