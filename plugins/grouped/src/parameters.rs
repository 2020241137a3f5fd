//! The strategy's parameters, and their schema.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::json;
use windlass_sdk::{PluginError, strategy::Application};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Parameters {
    #[serde(default)]
    pub(crate) grouping: Grouping,
    #[serde(default)]
    pub(crate) groups: Vec<ExplicitGroup>,
    #[serde(default = "quarter")]
    pub(crate) wave_percent: u32,
    #[serde(default)]
    pub(crate) beta_group: bool,
    #[serde(default)]
    pub(crate) gray_traffic: bool,
    pub(crate) weight_override: Option<u32>,
    #[serde(default)]
    pub(crate) max_in_flight: u32,
    #[serde(default)]
    pub(crate) max_failures: u32,
    #[serde(default)]
    pub(crate) pause_s: u64,
    #[serde(default)]
    pub(crate) min_healthy_s: u64,
    pub(crate) health_deadline_s: Option<u64>,
    pub(crate) progress_deadline_s: Option<u64>,
    #[serde(default)]
    pub(crate) auto_rollback: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Grouping {
    #[default]
    Quick,
    ByCell,
    OnePerGroup,
    AllInOne,
    Explicit,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExplicitGroup {
    pub(crate) application: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) servers: Vec<String>,
}

fn quarter() -> u32 {
    25
}

impl Parameters {
    /// Explicit groups name all servers, each once.
    pub(crate) fn check_groups(&self, applications: &[Application]) -> Result<(), PluginError> {
        match (self.grouping, self.groups.is_empty()) {
            (Grouping::Explicit, true) => {
                return Err(PluginError::invalid_parameter(
                    "/groups",
                    "grouping `explicit` needs the groups",
                ));
            }
            (
                Grouping::Quick | Grouping::ByCell | Grouping::OnePerGroup | Grouping::AllInOne,
                false,
            ) => {
                return Err(PluginError::invalid_parameter(
                    "/groups",
                    "groups belong to grouping `explicit` only",
                ));
            }
            (Grouping::Explicit, false)
            | (
                Grouping::Quick | Grouping::ByCell | Grouping::OnePerGroup | Grouping::AllInOne,
                true,
            ) => {}
        }
        let mut seen = BTreeSet::new();
        for (group_index, group) in self.groups.iter().enumerate() {
            if let Some(key) = &group.application
                && !applications
                    .iter()
                    .any(|application| application.key == *key)
            {
                return Err(PluginError::invalid_parameter(
                    &format!("/groups/{group_index}/application"),
                    format!("`{key}` is not an application of this order"),
                ));
            }
            for (index, wanted) in group.servers.iter().enumerate() {
                let field = format!("/groups/{group_index}/servers/{index}");
                let mut found = false;
                for application in applications
                    .iter()
                    .filter(|application| group.is_of(application))
                {
                    if let Some(server) = application
                        .servers
                        .iter()
                        .find(|server| server.id == *wanted || server.name == *wanted)
                    {
                        found = true;
                        if !seen.insert((application.key.clone(), server.id.clone())) {
                            return Err(PluginError::invalid_parameter(
                                &field,
                                format!(
                                    "server `{wanted}` of {} is in two groups",
                                    application.key
                                ),
                            ));
                        }
                    }
                }
                if !found {
                    return Err(PluginError::invalid_parameter(
                        &field,
                        format!("`{wanted}` is not a server of this order: give its id or name"),
                    ));
                }
            }
        }
        match self.grouping {
            Grouping::Explicit => all_seen(applications, &seen),
            Grouping::Quick | Grouping::ByCell | Grouping::OnePerGroup | Grouping::AllInOne => {
                Ok(())
            }
        }
    }
}

/// An order releases to all servers that it has: groups that leave some out are a mistake, told with their names.
fn all_seen(
    applications: &[Application],
    seen: &BTreeSet<(String, String)>,
) -> Result<(), PluginError> {
    const SHOWN: usize = 10;
    let missing: Vec<String> = applications
        .iter()
        .flat_map(|application| {
            let servers = application.servers.iter();
            servers.map(move |server| (&application.key, server))
        })
        .filter(|(key, server)| !seen.contains(&((*key).clone(), server.id.clone())))
        .map(|(key, server)| format!("{} of {key}", server.name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let more = match missing.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let shown = missing[..missing.len().min(SHOWN)].join(", ");
    Err(PluginError::invalid_parameter(
        "/groups",
        format!(
            "in no group: {shown}{more}. Put each server into one; an order to some servers only names their cells"
        ),
    ))
}

impl ExplicitGroup {
    /// A group without an application holds for all of them.
    pub(crate) fn is_of(&self, application: &Application) -> bool {
        self.application
            .as_ref()
            .is_none_or(|key| *key == application.key)
    }
}

pub(crate) fn schema() -> serde_json::Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "grouping": {
                "enum": ["quick", "by-cell", "one-per-group", "all-in-one", "explicit"], "default": "quick",
                "description": "quick: one server, then waves; by-cell: a group per cell; one-per-group: one by one; all-in-one: all at once (the order must allow 100% unavailable); explicit: as listed in groups."
            },
            "groups": {
                "type": "array", "maxItems": 1000,
                "description": "explicit: the groups in order. Every server of the order stands in one.",
                "items": {
                    "type": "object", "additionalProperties": false, "required": ["servers"],
                    "properties": {
                        "application": { "type": "string", "description": "Default: every application that has the servers." },
                        "name": { "type": "string", "minLength": 1, "maxLength": 60 },
                        "servers": {
                            "type": "array", "minItems": 1, "maxItems": 10000, "items": { "type": "string" },
                            "description": "Ids or names."
                        }
                    }
                }
            },
            "wave_percent": { "type": "integer", "minimum": 1, "maximum": 100, "default": 25, "description": "quick: size of a wave." },
            "beta_group": {
                "type": "boolean", "default": false,
                "description": "One server from each deployment zone is released first; the order then waits for confirmation."
            },
            "gray_traffic": {
                "type": "boolean", "default": false,
                "description": "Weights are not restored after a group: you set them by hand, and every group waits for confirmation."
            },
            "weight_override": { "type": "integer", "minimum": 0, "maximum": 100, "description": "Weight after success, instead of the remembered one." },
            "max_in_flight": { "type": "integer", "minimum": 0, "maximum": 10000, "default": 0, "description": "Servers of a group at once; 0: the order's limit." },
            "max_failures": { "type": "integer", "minimum": 0, "maximum": 10000, "default": 0, "description": "Failed servers of a group that do not stop it; the order's limit stands above." },
            "pause_s": { "type": "integer", "minimum": 0, "maximum": 86400, "default": 0, "description": "Pause between groups." },
            "min_healthy_s": { "type": "integer", "minimum": 0, "maximum": 3600, "default": 0, "description": "A server must be healthy for so long." },
            "health_deadline_s": { "type": "integer", "minimum": 1, "maximum": 3600, "description": "Default: the tech stack's." },
            "progress_deadline_s": { "type": "integer", "minimum": 1, "maximum": 604_800, "description": "The order counts as failed when nothing finished for so long." },
            "auto_rollback": { "type": "boolean", "default": false, "description": "A failure that stops the order rolls it back." }
        }
    })
}
