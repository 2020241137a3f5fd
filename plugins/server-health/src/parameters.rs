//! Limits that an operator can set; each has a default.

use serde::Deserialize;
use serde_json::{Value, json};

/// Parameters of a diagnosis.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Parameters {
    /// Share of a file system's room or inodes that is bad, in percent.
    pub disk_failed_percent: f64,
    /// Share that could become bad, in percent.
    pub disk_warning_percent: f64,
    /// Share of memory that is bad, in percent.
    pub memory_failed_percent: f64,
    /// Load for each processor, over five minutes, that is bad.
    pub load_failed_per_cpu: f64,
    /// Share of file handles that is bad, in percent: of the machine's, and of a process's own limit.
    pub handles_failed_percent: f64,
    /// Clock drift that is bad, in milliseconds.
    pub clock_failed_ms: f64,
    /// A name that has to be found.
    pub dns_name: Option<String>,
    /// How far back the kernel's log is looked at, in seconds.
    pub log_within_s: u64,
    /// So many zombies are bad.
    pub zombies_failed: u64,
    /// TCP ports that have to be open on the server.
    pub expected_ports: Vec<u16>,
    /// Packages whose files have to be as they were delivered.
    pub verify_packages: Vec<String>,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            disk_failed_percent: 90.0,
            disk_warning_percent: 80.0,
            memory_failed_percent: 90.0,
            load_failed_per_cpu: 2.0,
            handles_failed_percent: 90.0,
            clock_failed_ms: 5000.0,
            dns_name: None,
            log_within_s: 86_400,
            zombies_failed: 20,
            expected_ports: Vec::new(),
            verify_packages: Vec::new(),
        }
    }
}

/// Their JSON Schema.
#[must_use]
pub fn schema() -> Value {
    let percent = |default: u32, description: &str| json!({ "type": "number", "minimum": 1, "maximum": 100, "default": default, "description": description });
    json!({
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "disk_failed_percent": percent(90, "Used room or inodes of a file system that are bad, in percent."),
            "disk_warning_percent": percent(80, "Used room or inodes that could become bad, in percent."),
            "memory_failed_percent": percent(90, "Used memory that is bad, in percent."),
            "load_failed_per_cpu": { "type": "number", "exclusiveMinimum": 0, "maximum": 1000, "default": 2, "description": "Load over five minutes for each processor that is bad." },
            "handles_failed_percent": percent(90, "Used file handles that are bad, in percent: of the machine's limit and of a process's own."),
            "clock_failed_ms": { "type": "number", "exclusiveMinimum": 0, "maximum": 86_400_000, "default": 5000, "description": "Clock drift that is bad, in milliseconds." },
            "dns_name": { "type": "string", "minLength": 1, "maxLength": 253, "description": "A name that has to be found." },
            "log_within_s": { "type": "integer", "minimum": 60, "maximum": 2_592_000, "default": 86_400, "description": "How far back the kernel's log is looked at, in seconds." },
            "zombies_failed": { "type": "integer", "minimum": 1, "maximum": 100_000, "default": 20, "description": "So many zombies are bad; one is a warning." },
            "expected_ports": { "type": "array", "maxItems": 50, "uniqueItems": true, "items": { "type": "integer", "minimum": 1, "maximum": 65535 }, "default": [], "description": "TCP ports that have to be open on the server." },
            "verify_packages": { "type": "array", "maxItems": 10, "uniqueItems": true, "items": { "type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9+._:-]*$", "maxLength": 200 }, "default": [], "description": "Packages whose files have to be as they were delivered." }
        }
    })
}
