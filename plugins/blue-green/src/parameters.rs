//! The strategy's parameters, and their schema.

use serde::Deserialize;
use serde_json::json;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Parameters {
    pub(crate) green: Option<String>,
    #[serde(default)]
    pub(crate) max_in_flight: u32,
    #[serde(default)]
    pub(crate) min_healthy_s: u64,
    pub(crate) health_deadline_s: Option<u64>,
    progress_deadline_s: Option<u64>,
    #[serde(default)]
    pub(crate) auto_rollback: bool,
}

impl Parameters {
    pub(crate) fn progress_deadline_ms(&self) -> Option<u64> {
        self.progress_deadline_s
            .map(|seconds| seconds.saturating_mul(1000))
    }
}

pub(crate) fn schema() -> serde_json::Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "green": {
                "type": "string", "minLength": 1, "maxLength": 60,
                "description": "The cell that is released first. Default: the second of the workspace's two cells."
            },
            "max_in_flight": { "type": "integer", "minimum": 0, "maximum": 10000, "default": 0, "description": "Servers of an application at once; 0: the order's limits." },
            "min_healthy_s": { "type": "integer", "minimum": 0, "maximum": 3600, "default": 0, "description": "A server must be healthy for so long." },
            "health_deadline_s": { "type": "integer", "minimum": 1, "maximum": 3600, "description": "Default: the tech stack's." },
            "progress_deadline_s": { "type": "integer", "minimum": 1, "maximum": 604_800, "description": "The order counts as failed when nothing finished for so long." },
            "auto_rollback": { "type": "boolean", "default": false, "description": "A failure in the steps 1 to 3 that stops the order rolls it back." }
        }
    })
}
