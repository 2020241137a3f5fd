//! Registration: what an agent sends with its activation code, and what it gets back.

use serde::{Deserialize, Serialize};
use windlass_domain::id::ServerId;

use crate::fixed::{PublicKey, Signature};

/// The body of `POST /agent/v1/register`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterRequest {
    /// The activation code, whole.
    pub code: crate::secret::SecretText,
    /// The key that this agent will prove itself with.
    pub public_key: PublicKey,
    /// Proof that the agent holds the private half: see [`crate::Identity::sign_registration`].
    pub proof: Signature,
    /// A name wished for; `None`: the code's prefix and the host name.
    pub name: Option<String>,
    /// What kind of machine it is.
    pub facts: ServerFacts,
}

/// The answer to a registration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterResponse {
    /// The server's id from now on.
    pub server_id: ServerId,
    /// The name it was given.
    pub name: String,
    /// The key that the platform signs its welcomes with.
    pub platform_key: PublicKey,
}

/// Why a registration or a download was refused: the fields of `application/problem+json` that an agent needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Stable code, for example `activation_code_expired`.
    pub code: String,
    /// For people: what is wrong, and what to do.
    pub detail: String,
}

/// What an agent knows about its machine. Source: spec "Servers".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct ServerFacts {
    /// Host name.
    pub host_name: String,
    /// Addresses of its interfaces, without loopback.
    pub addresses: Vec<String>,
    /// `ID` and `VERSION_ID` of `/etc/os-release`, for example `debian 12`.
    pub os: String,
    /// Kernel release.
    pub kernel: String,
    /// Architecture as `uname -m` says it, for example `x86_64`.
    pub arch: String,
    /// Processors that the agent may use.
    pub cores: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Size of the file system that holds the agent's data, in bytes.
    pub disk_bytes: u64,
    /// The kernel's boot id: changes with each start of the machine.
    pub boot_id: String,
    /// The agent's version.
    pub agent_version: String,
    /// The agent's own OS user.
    pub agent_user: String,
    /// Other OS users that its local allow-list lets tasks run as.
    pub allowed_users: Vec<String>,
    /// Whether tasks may run as root.
    pub root_enabled: bool,
}
