//! The strategy's parameters, and their schema.

use serde::Deserialize;
use serde_json::json;
use windlass_sdk::PluginError;

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Parameters {
    #[serde(default = "percentages")]
    pub(crate) percentages: Vec<u32>,
    #[serde(default = "minute")]
    window_s: u64,
    #[serde(default = "five")]
    pub(crate) max_windows: u32,
    #[serde(default = "hundred")]
    pub(crate) min_requests: u64,
    #[serde(default = "five_percent")]
    pub(crate) max_error_percent: f64,
    #[serde(default = "one_point")]
    pub(crate) max_error_increase_pp: f64,
    pub(crate) max_latency_ms: Option<f64>,
    #[serde(default = "twice")]
    pub(crate) max_latency_ratio: f64,
    #[serde(default)]
    pub(crate) on_bad: OnBad,
    #[serde(default)]
    pub(crate) confirm: bool,
    #[serde(default)]
    pub(crate) max_in_flight: u32,
    #[serde(default)]
    pub(crate) min_healthy_s: u64,
    pub(crate) health_deadline_s: Option<u64>,
    progress_deadline_s: Option<u64>,
    #[serde(default = "yes")]
    pub(crate) auto_rollback: bool,
}

/// What bad figures do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum OnBad {
    #[default]
    RollBack,
    Hold,
}

fn percentages() -> Vec<u32> {
    vec![5, 25, 50, 100]
}

fn minute() -> u64 {
    60
}

fn five() -> u32 {
    5
}

fn hundred() -> u64 {
    100
}

fn five_percent() -> f64 {
    5.0
}

fn one_point() -> f64 {
    1.0
}

fn twice() -> f64 {
    2.0
}

fn yes() -> bool {
    true
}

impl Parameters {
    pub(crate) fn window_ms(&self) -> u64 {
        self.window_s.saturating_mul(1000)
    }

    pub(crate) fn progress_deadline_ms(&self) -> Option<u64> {
        self.progress_deadline_s
            .map(|seconds| seconds.saturating_mul(1000))
    }

    /// What a schema cannot say.
    pub(crate) fn check(&self) -> Result<(), PluginError> {
        for (position, pair) in self.percentages.windows(2).enumerate() {
            if pair[1] <= pair[0] {
                return Err(PluginError::invalid_parameter(
                    &format!("/percentages/{}", position + 1),
                    format!(
                        "{} does not stand above {}: percentages rise",
                        pair[1], pair[0]
                    ),
                ));
            }
        }
        let last = self.percentages.len().saturating_sub(1);
        if self.percentages.get(last) != Some(&100) {
            return Err(PluginError::invalid_parameter(
                &format!("/percentages/{last}"),
                "the last percentage is 100: a release that ends with two versions is none",
            ));
        }
        Ok(())
    }
}

pub(crate) fn schema() -> serde_json::Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "percentages": {
                "type": "array", "minItems": 1, "maxItems": 20, "default": [5, 25, 50, 100],
                "items": { "type": "integer", "minimum": 1, "maximum": 100 },
                "description": "Shares of the traffic that the new version gets one after the other, rising; the last is 100. As many of the servers are released, rounded up."
            },
            "window_s": { "type": "integer", "minimum": 1, "maximum": 3600, "default": 60, "description": "For so long figures are collected before they are judged." },
            "max_windows": { "type": "integer", "minimum": 1, "maximum": 100, "default": 5, "description": "After so many windows with too few requests a person decides." },
            "min_requests": { "type": "integer", "minimum": 1, "maximum": 1_000_000_000, "default": 100, "description": "The new version, and the old one where it is compared with, must have had so many requests." },
            "max_error_percent": { "type": "number", "minimum": 0, "maximum": 100, "default": 5, "description": "Failed requests of the new version, of a hundred." },
            "max_error_increase_pp": { "type": "number", "minimum": 0, "maximum": 100, "default": 1, "description": "Percentage points by which they may exceed the old version's at the same time." },
            "max_latency_ms": { "type": "number", "exclusiveMinimum": 0, "maximum": 3_600_000, "description": "Mean time to an answer of the new version. Default: no limit of its own." },
            "max_latency_ratio": { "type": "number", "minimum": 1, "maximum": 1000, "default": 2, "description": "So many times the old version's mean time to an answer at the same time; differences below 5 ms do not count." },
            "on_bad": { "enum": ["roll-back", "hold"], "default": "roll-back", "description": "What bad figures do: roll the order back, or wait for a person." },
            "confirm": { "type": "boolean", "default": false, "description": "A person also confirms each percentage below 100." },
            "max_in_flight": { "type": "integer", "minimum": 0, "maximum": 10000, "default": 0, "description": "Servers at once; 0: the order's limits." },
            "min_healthy_s": { "type": "integer", "minimum": 0, "maximum": 3600, "default": 0, "description": "A server must be healthy for so long." },
            "health_deadline_s": { "type": "integer", "minimum": 1, "maximum": 3600, "description": "Default: the tech stack's." },
            "progress_deadline_s": { "type": "integer", "minimum": 1, "maximum": 604_800, "description": "The order counts as failed when nothing finished for so long." },
            "auto_rollback": { "type": "boolean", "default": true, "description": "A server whose release fails rolls the order back." }
        }
    })
}
