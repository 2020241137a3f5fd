//! Service instances: an application in one workspace. Source: spec "Service instances".

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    id::{AppId, InstanceId, PackageId, PoolId, ServerId},
    name::{CellName, InstanceName, InvalidValue, WorkspaceName, check_env_key, check_length},
    time::Timestamp,
    value::Environment,
};

/// A service instance. Which servers are bound to it stands with the servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ServiceInstance {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: InstanceId,
    /// Name: unique in the workspace.
    pub name: InstanceName,
    /// Workspace.
    pub workspace: WorkspaceName,
    /// Application.
    pub app: AppId,
    /// Version requirement of the tech stack; `None`: the application's.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub tech_stack_version: Option<semver::VersionReq>,
    /// Cells it runs in; empty: all of the workspace.
    #[serde(default)]
    pub cells: Vec<CellName>,
    /// The package that a release takes unless it says another.
    #[serde(default)]
    pub package: Option<PackageId>,
    /// Description, at most 500 characters.
    #[serde(default)]
    pub description: String,
    /// System parameters, valid against the tech stack's schema.
    #[serde(default)]
    pub parameters: serde_json::Value,
    /// Custom environment parameters.
    #[serde(default)]
    pub env: Environment,
    /// Variables of single servers.
    #[serde(default)]
    pub server_variables: BTreeMap<ServerId, BTreeMap<String, String>>,
    /// Pools that its servers take traffic from.
    #[serde(default)]
    pub pools: Vec<PoolId>,
    /// When it was made.
    pub created_at: Timestamp,
}

impl ServiceInstance {
    /// The current [`ServiceInstance::schema`].
    pub const SCHEMA: u32 = 1;

    /// Checks texts and keys.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn validate(&self) -> Result<(), (&'static str, InvalidValue)> {
        check_length("the description", &self.description, 0, 500)
            .map_err(|error| ("description", error))?;
        for key in self.env.keys() {
            check_env_key(key).map_err(|error| ("env", error))?;
        }
        for key in self.server_variables.values().flat_map(BTreeMap::keys) {
            check_env_key(key).map_err(|error| ("server_variables", error))?;
        }
        Ok(())
    }
}
