//! Load balancers: HAProxy on a managed server, its listeners, and the servers behind them. Source: spec "Load balancers".
//!
//! ```text
//! LoadBalancer ─┬─ Listener (front port) ─┬─ its pool: BackEnd, BackEnd …
//!  (a server)   │                         └─ ServerGroup (host names, paths) ─ its pool: BackEnd …
//!               └─ Listener …
//! ```
//! A service instance names pools; the servers that are bound to it are back ends of them, beside those that were attached.
//! What a load balancer is to run is one [`Configuration`]; [`render`] makes HAProxy's text of it. Everything that reaches
//! that text is a number, an address, one of our ids, or a text that was parsed into a type without blanks, quotes, `#`,
//! `\`, `;` and control characters.

mod configuration;
pub mod render;
mod values;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{
    id::{CertificateId, ListenerId, LoadBalancerId, PoolId, ServerId},
    name::{
        HealthPath, InvalidValue, LoadBalancerName, PathPrefix, PoolName, WorkspaceName,
        check_length,
    },
    time::Timestamp,
};

pub use configuration::{BackEndConfig, Configuration, GroupConfig, ListenerConfig, MemberConfig};
pub use values::{HostPattern, Network, PortRanges};

/// Listeners of a load balancer at most.
pub const MAX_LISTENERS: usize = 50;
/// Virtual server groups of a listener at most.
pub const MAX_GROUPS: usize = 20;
/// Host names, and paths, of a virtual server group at most.
pub const MAX_RULES: usize = 20;
/// Addresses of an access list at most.
pub const MAX_ACCESS: usize = 300;
/// The highest weight.
pub const MAX_WEIGHT: u32 = 100;

/// A load balancer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LoadBalancer {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: LoadBalancerId,
    /// Name: unique in the workspace.
    pub name: LoadBalancerName,
    /// Workspace.
    pub workspace: WorkspaceName,
    /// The server that HAProxy runs on.
    pub server: ServerId,
    /// Description, at most 500 characters.
    #[serde(default)]
    pub description: String,
    /// Whether it is to run.
    #[serde(default)]
    pub power: Power,
    /// When it was made.
    pub created_at: Timestamp,
}

impl LoadBalancer {
    /// The current [`LoadBalancer::schema`].
    pub const SCHEMA: u32 = 1;

    /// Checks texts.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn validate(&self) -> Result<(), (&'static str, InvalidValue)> {
        check_length("the description", &self.description, 0, 500)
            .map_err(|error| ("description", error))
    }
}

/// Whether something is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// It runs.
    #[default]
    Started,
    /// It does not, until it is started again.
    Stopped,
}

/// A listener: what is taken from a front port, and how it is shared out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Listener {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: ListenerId,
    /// Its load balancer.
    pub load_balancer: LoadBalancerId,
    /// Workspace.
    pub workspace: WorkspaceName,
    /// Name, which its pool has too: unique among the pools of the workspace.
    pub name: PoolName,
    /// The pool that takes what no group does.
    pub pool: PoolId,
    /// Virtual server groups, the first that fits takes a request.
    #[serde(default)]
    pub groups: Vec<ServerGroup>,
    /// How it works.
    pub settings: ListenerSettings,
    /// Whether it is to run.
    #[serde(default)]
    pub power: Power,
    /// When it was made.
    pub created_at: Timestamp,
}

/// A virtual server group: a named set of servers, chosen by host name or path (both, where both are given).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ServerGroup {
    /// Name, which its pool has too: unique among the pools of the workspace.
    pub name: PoolName,
    /// Its pool.
    pub pool: PoolId,
    /// Host names, `*.example.com` for all below one; none: any. At most 20.
    #[serde(default)]
    pub hosts: Vec<HostPattern>,
    /// Beginnings of paths; none: any. At most 20.
    #[serde(default)]
    pub paths: Vec<PathPrefix>,
}

/// How a listener works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ListenerSettings {
    /// What is spoken on the front port.
    pub protocol: Protocol,
    /// The port that clients connect to: by default 80, 443, 2800-3300, 5000-10000 or 13000-14000.
    #[schema(minimum = 1)]
    pub front_port: u16,
    /// The port of the servers behind it, unless a back end has its own.
    #[schema(minimum = 1)]
    pub back_port: u16,
    /// How requests are shared out.
    #[serde(default)]
    pub balance: Balance,
    /// Whether servers are told the client's address in `X-Forwarded-For`; means nothing for TCP.
    #[serde(default = "yes")]
    pub forwarded_for: bool,
    /// Whether a client stays with its server: by a cookie, for TCP by its address.
    #[serde(default)]
    pub sticky: bool,
    /// How servers are checked.
    #[serde(default)]
    pub health: HealthCheck,
    /// The most that is taken and, separately, sent on the front port, in kbit/s: 256 to 10,000,000; `None`: no limit. The
    /// load balancer's agent must run as root.
    #[serde(default)]
    #[schema(minimum = 256, maximum = 10_000_000)]
    pub peak_kbit_per_s: Option<u32>,
    /// The only addresses and networks that reach it, at most 300; `None`: all.
    #[serde(default)]
    pub access: Option<Vec<Network>>,
}

const fn yes() -> bool {
    true
}

/// What is spoken on a front port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Protocol {
    /// HTTP/1.1.
    Http,
    /// HTTP/1.1 and HTTP/2 over TLS.
    Https {
        /// The certificate that is shown.
        certificate: CertificateId,
    },
    /// Anything: connections are passed on as they are.
    Tcp,
}

/// How requests are shared out, by weight in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// In turn.
    #[default]
    RoundRobin,
    /// To the server with the fewest connections for its weight.
    LeastConnections,
}

/// How servers are checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HealthCheck {
    /// What is tried.
    pub probe: HealthProbe,
    /// Time between two checks, in milliseconds: 200 to 60,000.
    #[schema(minimum = 200, maximum = 60_000)]
    pub interval_ms: u32,
    /// Good checks in a row until a server is up: 1 to 10.
    #[schema(minimum = 1, maximum = 10)]
    pub rise: u32,
    /// Bad checks in a row until it is down: 1 to 10.
    #[schema(minimum = 1, maximum = 10)]
    pub fall: u32,
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            probe: HealthProbe::default(),
            interval_ms: 2000,
            rise: 2,
            fall: 3,
        }
    }
}

/// What a health check tries.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum HealthProbe {
    /// To connect.
    #[default]
    Tcp,
    /// To get this path: a status from 200 to 399 is good.
    Http {
        /// Path and query.
        path: HealthPath,
    },
}

impl Listener {
    /// The current [`Listener::schema`].
    pub const SCHEMA: u32 = 1;

    /// Its pools: its own first, then those of its groups.
    pub fn pools(&self) -> impl Iterator<Item = PoolId> {
        std::iter::once(self.pool).chain(self.groups.iter().map(|group| group.pool))
    }

    /// Checks figures and lists.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn validate(&self, front_ports: &PortRanges) -> Result<(), (&'static str, InvalidValue)> {
        self.settings.validate(front_ports)?;
        at_most(
            "groups",
            "virtual server groups",
            self.groups.len(),
            MAX_GROUPS,
        )?;
        for group in &self.groups {
            group.validate()?;
            if self.settings.protocol == Protocol::Tcp {
                return Err((
                    "groups",
                    InvalidValue::rule(
                        "a TCP listener has no virtual server groups: host names and paths are HTTP's",
                    ),
                ));
            }
        }
        Ok(())
    }
}

impl ServerGroup {
    /// Checks that it chooses something.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn validate(&self) -> Result<(), (&'static str, InvalidValue)> {
        if self.hosts.is_empty() && self.paths.is_empty() {
            return Err((
                "hosts",
                InvalidValue::rule(format!(
                    "the server group `{}` would take everything: name a host or a path",
                    self.name
                )),
            ));
        }
        at_most("hosts", "host names", self.hosts.len(), MAX_RULES)?;
        at_most("paths", "paths", self.paths.len(), MAX_RULES)
    }
}

impl ListenerSettings {
    /// Checks figures and lists.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn validate(&self, front_ports: &PortRanges) -> Result<(), (&'static str, InvalidValue)> {
        if !front_ports.contains(self.front_port) {
            return Err((
                "/settings/front_port",
                InvalidValue::rule(format!(
                    "a front port is one of {front_ports}, not {}",
                    self.front_port
                )),
            ));
        }
        if self.back_port == 0 {
            return Err((
                "/settings/back_port",
                InvalidValue::rule("a back-end port is from 1 to 65535"),
            ));
        }
        let health = &self.health;
        within(
            "/settings/health/interval_ms",
            health.interval_ms,
            200,
            60_000,
        )?;
        within("/settings/health/rise", health.rise, 1, 10)?;
        within("/settings/health/fall", health.fall, 1, 10)?;
        if let Some(peak) = self.peak_kbit_per_s {
            within("/settings/peak_kbit_per_s", peak, 256, 10_000_000)?;
        }
        if let Some(access) = &self.access {
            at_most("/settings/access", "addresses", access.len(), MAX_ACCESS)?;
        }
        Ok(())
    }
}

fn at_most(
    field: &'static str,
    what: &str,
    found: usize,
    most: usize,
) -> Result<(), (&'static str, InvalidValue)> {
    if found <= most {
        return Ok(());
    }
    Err((
        field,
        InvalidValue::limit(
            format!("at most {most} {what} are allowed, {found} are given"),
            most as u64,
            found as u64,
        ),
    ))
}

fn within(
    field: &'static str,
    found: u32,
    least: u32,
    most: u32,
) -> Result<(), (&'static str, InvalidValue)> {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    let limit = if found < least { least } else { most };
    Err((
        field,
        InvalidValue::limit(
            format!("`{field}` is {found}: {least} to {most} are allowed"),
            u64::from(limit),
            u64::from(found),
        ),
    ))
}

/// Checks a weight.
///
/// # Errors
/// [`InvalidValue`].
pub fn check_weight(weight: u32) -> Result<(), InvalidValue> {
    within("weight", weight, 0, MAX_WEIGHT).map_err(|(_, error)| error)
}

/// What is kept of a server behind a pool. One without a row is there because it is bound, with weight 100.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BackEnd {
    /// Schema version of this record.
    pub schema: u32,
    /// The pool.
    pub pool: PoolId,
    /// The server.
    pub server: ServerId,
    /// Where it is reached; `None`: at the first address that its agent reports.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub address: Option<IpAddr>,
    /// Its port; `None`: the listener's back-end port.
    #[serde(default)]
    pub port: Option<u16>,
    /// 0 to 100; 0: no new requests.
    pub weight: u32,
    /// Why it is there.
    pub origin: Origin,
}

impl BackEnd {
    /// The current [`BackEnd::schema`].
    pub const SCHEMA: u32 = 1;
}

/// Why a server is behind a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// It was attached.
    Attached,
    /// It is bound to a service instance that takes traffic from the pool.
    Bound,
}
