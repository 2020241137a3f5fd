//! Applications: one code base each, shared by all workspaces of a tenant. Source: spec "Applications".

use serde::{Deserialize, Serialize};

use crate::{
    id::AppId,
    name::{AppName, InvalidValue, PluginName, check_length},
    time::Timestamp,
};

/// An application.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Application {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: AppId,
    /// Name: unique in the tenant.
    pub name: AppName,
    /// Alias, at most 60 characters.
    #[serde(default)]
    pub alias: String,
    /// Description, at most 500 characters.
    #[serde(default)]
    pub description: String,
    /// Owner; the caller that made it unless said otherwise.
    pub owner: String,
    /// Its tech stack. The framework never changes.
    pub tech_stack: TechStackChoice,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Which tech stack plugin, in which versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TechStackChoice {
    /// Name of the plugin.
    pub name: PluginName,
    /// Version requirement, for example `^1`; `*`: the default version.
    #[serde(default = "any_version")]
    #[schema(value_type = String)]
    pub version: semver::VersionReq,
}

fn any_version() -> semver::VersionReq {
    semver::VersionReq::STAR
}

impl Application {
    /// The current [`Application::schema`].
    pub const SCHEMA: u32 = 1;

    /// Checks the texts.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn validate(&self) -> Result<(), (&'static str, InvalidValue)> {
        check_length("the alias", &self.alias, 0, 60).map_err(|error| ("alias", error))?;
        check_length("the description", &self.description, 0, 500)
            .map_err(|error| ("description", error))?;
        check_length("the owner", &self.owner, 1, 120).map_err(|error| ("owner", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_at_their_limits() {
        let app = |alias: usize, description: usize, owner: usize| Application {
            schema: Application::SCHEMA,
            id: AppId::from_uuid(uuid::Uuid::nil()),
            name: "shop".parse().unwrap(),
            alias: "ä".repeat(alias),
            description: "d".repeat(description),
            owner: "o".repeat(owner),
            tech_stack: serde_json::from_str("{\"name\":\"binary\"}").unwrap(),
            created_at: Timestamp::default(),
        };
        assert_eq!(app(60, 500, 1).validate(), Ok(()));
        assert_eq!(app(61, 0, 1).validate().unwrap_err().0, "alias");
        assert_eq!(app(0, 501, 1).validate().unwrap_err().0, "description");
        assert_eq!(app(0, 0, 0).validate().unwrap_err().0, "owner");
    }
}
