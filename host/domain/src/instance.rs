//! Service instances: an application in one workspace. Source: spec "Service instances".

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    id::{AppId, InstanceId, PackageId, PoolId, ServerId},
    name::{CellName, InstanceName, InvalidValue, WorkspaceName, check_length, check_variable},
    time::Timestamp,
    value::{Environment, Value},
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
        for (key, value) in &self.env {
            let text = match value {
                Value::Plain(text) => Some(text.as_str()),
                Value::SecretRef(_) => None,
            };
            check_variable(key, text).map_err(|error| ("env", error))?;
        }
        Ok(())
    }
}

/// Variables of one server of an instance at most.
pub const MAX_VARIABLES: usize = 100;
/// Longest value of a variable, in characters.
pub const MAX_VARIABLE_CHARS: usize = 1000;

/// A server that is bound to a service instance. A server is bound to at most one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Binding {
    /// Schema version of this record.
    pub schema: u32,
    /// The service instance.
    pub instance: InstanceId,
    /// The server.
    pub server: ServerId,
    /// Variables of this server: they become environment of its steps and its application.
    #[serde(default)]
    pub variables: BTreeMap<String, String>,
    /// When it was bound.
    pub bound_at: Timestamp,
}

impl Binding {
    /// The current [`Binding::schema`].
    pub const SCHEMA: u32 = 1;

    /// Checks the variables.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn validate(&self) -> Result<(), (&'static str, InvalidValue)> {
        let found = self.variables.len();
        if found > MAX_VARIABLES {
            return Err((
                "variables",
                InvalidValue::limit(
                    format!("a server has at most {MAX_VARIABLES} variables, {found} are given"),
                    MAX_VARIABLES as u64,
                    found as u64,
                ),
            ));
        }
        for (key, value) in &self.variables {
            check_variable(key, Some(value)).map_err(|error| ("variables", error))?;
            check_length("the value of a variable", value, 0, MAX_VARIABLE_CHARS)
                .map_err(|error| ("variables", error))?;
        }
        Ok(())
    }
}
