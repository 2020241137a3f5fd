//! Servers: a record plus a live agent session. Source: spec "Servers".

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::{
    address::refuse_reported,
    id::{ActivationCodeId, InstanceId, ServerId},
    name::{CellName, InvalidValue, ServerName, TagKey, WorkspaceName, check_length},
    text,
    time::Timestamp,
};

/// Tags of a server at most.
pub const MAX_TAGS: usize = 50;

/// A managed server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Server {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: ServerId,
    /// Name: unique in the workspace.
    pub name: ServerName,
    /// Workspace.
    pub workspace: WorkspaceName,
    /// Cell; `None` until it is assigned: then nothing can be released to it.
    #[serde(default)]
    pub cell: Option<CellName>,
    /// The service instance it is assigned to.
    #[serde(default)]
    pub instance: Option<InstanceId>,
    /// Tags, at most 50; values at most 120 characters.
    #[serde(default)]
    pub tags: BTreeMap<TagKey, String>,
    /// The public key of its agent, as the protocol prints it.
    pub public_key: String,
    /// The activation code that it came with.
    #[serde(default)]
    pub activation_code: Option<ActivationCodeId>,
    /// What its agent said of the machine.
    #[serde(default)]
    pub facts: MachineFacts,
    /// Whether an agent session is up.
    #[serde(default)]
    pub connection: ConnectionState,
    /// When the connection state changed, or the agent was heard last before it was lost.
    #[serde(default)]
    pub last_seen_at: Option<Timestamp>,
    /// How releases left it.
    #[serde(default)]
    pub release_state: ReleaseState,
    /// State of the machine.
    #[serde(default)]
    pub machine_state: MachineState,
    /// When it was registered.
    pub created_at: Timestamp,
}

/// What an agent knows about its machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct MachineFacts {
    /// Host name.
    pub host_name: String,
    /// Addresses at which the server can be reached, as its agent reports them: at most 64, without loopback, link-local,
    /// multicast and reserved ones.
    pub addresses: Vec<String>,
    /// Addresses that the agent reports and that are not used, each with the reason; at most 8.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refused_addresses: Vec<String>,
    /// For example `debian 12`.
    pub os: String,
    /// Kernel release.
    pub kernel: String,
    /// For example `x86_64`.
    pub arch: String,
    /// Processors.
    pub cores: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Disk in bytes.
    pub disk_bytes: u64,
    /// The agent's version.
    pub agent_version: String,
    /// The agent's own OS user.
    pub agent_user: String,
    /// Other OS users that tasks may run as there.
    pub allowed_users: Vec<String>,
    /// Whether tasks may run as root there.
    pub root_enabled: bool,
}

/// Addresses of a server that are kept.
const MAX_ADDRESSES: usize = 64;
/// Refused addresses that are shown.
const MAX_REFUSED: usize = 8;

impl MachineFacts {
    /// Takes over the addresses that an agent reports. Their text is replaced by the address's own form, so that nothing else
    /// gets into a configuration.
    #[must_use]
    pub fn with_reported_addresses(mut self, reported: &[String]) -> Self {
        self.addresses = Vec::new();
        self.refused_addresses = Vec::new();
        for text in reported.iter().take(MAX_ADDRESSES) {
            let refused = match text.parse::<IpAddr>() {
                Ok(address) => match refuse_reported(address) {
                    None => {
                        self.addresses.push(address.to_string());
                        continue;
                    }
                    Some(reason) => reason,
                },
                Err(_) => "it is not an address",
            };
            if self.refused_addresses.len() < MAX_REFUSED {
                self.refused_addresses
                    .push(format!("{}: {refused}", text::one_line(text, 60)));
            }
        }
        self
    }
}

/// Whether an agent session is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ConnectionState {
    /// No session.
    #[default]
    Offline,
    /// A session is up.
    Online,
}

/// How releases left a server. Source: spec "Servers".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseState {
    /// Nothing was released to it yet.
    #[default]
    AwaitingRelease,
    /// An order works on it.
    Releasing,
    /// The last release succeeded.
    Released,
    /// The last release failed.
    ReleaseFailed,
    /// Its application was taken offline.
    Offline,
}

/// State of a machine. Source: spec "Servers".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// Registered; no session yet.
    #[default]
    Initialising,
    /// Runs.
    Running,
    /// Was stopped.
    Stopped,
    /// Restarts.
    Restarting,
    /// Its agent is not heard.
    Lost,
}

impl Server {
    /// The current [`Server::schema`].
    pub const SCHEMA: u32 = 1;

    /// Checks tags.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn validate(&self) -> Result<(), (&'static str, InvalidValue)> {
        if self.tags.len() > MAX_TAGS {
            return Err((
                "tags",
                InvalidValue::limit(
                    format!("a server has at most {MAX_TAGS} tags"),
                    MAX_TAGS as u64,
                    self.tags.len() as u64,
                ),
            ));
        }
        for value in self.tags.values() {
            check_length("the value of a tag", value, 0, 120).map_err(|error| ("tags", error))?;
        }
        Ok(())
    }
}
