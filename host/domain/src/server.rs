//! Servers: a record plus a live agent session. Source: spec "Servers".

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    id::{ActivationCodeId, InstanceId, ServerId},
    name::{CellName, InvalidValue, ServerName, TagKey, WorkspaceName, check_length},
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
    /// Addresses without loopback.
    pub addresses: Vec<String>,
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
