//! What is installed on a server: the record that a release leaves behind.
//!
//! The deploy step switches a link and writes a [`Manifest`], on the agent and in the store; the one before is kept.
//! Stop and check of a *later* order come from the manifest that is installed, not from today's plugin. Source: design, "Installed".

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    id::{AppId, InstanceId},
    plugin::StackStep,
    task::PackageRef,
    value::Environment,
};

/// A plugin by name, version and the digest of its bytes.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
pub struct PluginRef {
    /// Its name.
    pub name: String,
    /// Its version.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// SHA-256 of its bytes.
    pub digest: Digest,
}

/// One installed release of a service instance on one server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Manifest {
    /// The service instance.
    pub instance: InstanceId,
    /// Its application.
    pub app: AppId,
    /// The release directory's name, see [`crate::dispatch::release_name`].
    pub release: String,
    /// The package.
    pub package: PackageRef,
    /// The tech stack that rendered the steps.
    pub stack: PluginRef,
    /// Steps that stop it, rendered when it was planned.
    pub stop: Vec<StackStep>,
    /// Steps that start it.
    pub start: Vec<StackStep>,
    /// Steps that check its health.
    pub check: Vec<StackStep>,
    /// Environment that it was planned with.
    pub env: Environment,
    /// The plan that installed it: what a rollback to it takes its steps from. Kept as long as a manifest names it.
    #[serde(default)]
    pub plan: Option<Digest>,
    /// What the server was prepared for when it was installed, see [`crate::prepared`]. Known to the platform alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared: Option<Digest>,
}

/// What a server has of one service instance: the current release and the one before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default, utoipa::ToSchema)]
pub struct Installed {
    /// What is installed now.
    pub current: Option<Manifest>,
    /// What was installed before it.
    pub previous: Option<Manifest>,
}
