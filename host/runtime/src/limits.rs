//! What a guest may use, and the accounting of one call's memory.
//!
//! Source: design, "Plugins", "Isolation"; all figures are defaults of settings.

use std::{collections::BTreeMap, time::Duration};

use wasmtime::ResourceLimiter;

/// Limits of guests. Every error about one names it with its figure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeLimits {
    /// Linear memory of one call, all memories together, in bytes. Default 64 MiB.
    pub memory_bytes: u64,
    /// The same per plugin name, where it differs.
    pub memory_bytes_by_plugin: BTreeMap<String, u64>,
    /// Largest memory that any plugin can be given, in bytes: the pool's slots have this size. Default 256 MiB.
    pub max_memory_bytes: u64,
    /// Time that a guest computes in one call. Default 5 s.
    pub guest_time: Duration,
    /// Time that a whole call takes, with host calls and waiting for a processor. Default 60 s.
    pub call_time: Duration,
    /// Time of one host call. Default 15 s.
    pub host_call_time: Duration,
    /// Host calls in one call. Default 500.
    pub host_calls: u32,
    /// Bytes that a guest hands to the host at once: its answer, or the arguments of a host call. Default 8 MiB.
    pub output_bytes: usize,
    /// Handles (resources) that a guest holds. Default 1,000.
    pub handles: usize,
    /// Calls at once, over all plugins. Default 32.
    pub calls_at_once: u32,
    /// Size of a plugin's file, in bytes. Default 32 MiB.
    pub file_bytes: u64,
    /// Size of a parameters' schema, in bytes. Default 64 KiB.
    pub schema_bytes: usize,
    /// Time that compiling takes. Default 120 s.
    pub compile_time: Duration,
    /// Address space of the compiling process, in bytes. Default 4 GiB.
    pub compile_memory_bytes: u64,
}

impl Default for RuntimeLimits {
    fn default() -> Self {
        const MIB: u64 = 1024 * 1024;
        Self {
            memory_bytes: 64 * MIB,
            memory_bytes_by_plugin: BTreeMap::new(),
            max_memory_bytes: 256 * MIB,
            guest_time: Duration::from_secs(5),
            call_time: Duration::from_secs(60),
            host_call_time: Duration::from_secs(15),
            host_calls: 500,
            output_bytes: 8 * 1024 * 1024,
            handles: 1000,
            calls_at_once: 32,
            file_bytes: 32 * MIB,
            schema_bytes: 64 * 1024,
            compile_time: Duration::from_secs(120),
            compile_memory_bytes: 4096 * MIB,
        }
    }
}

impl RuntimeLimits {
    /// The memory limit of a plugin, never above the size of a pool's slot.
    #[must_use]
    pub fn memory_of(&self, plugin: &str) -> u64 {
        self.memory_bytes_by_plugin
            .get(plugin)
            .copied()
            .unwrap_or(self.memory_bytes)
            .min(self.max_memory_bytes)
    }
}

/// Counts the memory of one store, all memories together, and remembers a denial: the guest sees only a failed allocation.
#[derive(Debug)]
pub(crate) struct MemoryMeter {
    limit_bytes: u64,
    used_bytes: u64,
    pub(crate) denied: bool,
}

/// Elements that all tables of one call hold together.
const TABLE_ELEMENTS: usize = 200_000;

impl MemoryMeter {
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Self {
            limit_bytes,
            used_bytes: 0,
            denied: false,
        }
    }

    /// Memory never shrinks: what is used at the end is the peak.
    pub(crate) fn peak_bytes(&self) -> u64 {
        self.used_bytes
    }
}

impl ResourceLimiter for MemoryMeter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let after = self
            .used_bytes
            .saturating_add((desired.saturating_sub(current)) as u64);
        if after > self.limit_bytes {
            self.denied = true;
            return Ok(false);
        }
        self.used_bytes = after;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(desired <= TABLE_ELEMENTS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_memories_count_together_and_a_denial_is_remembered() {
        let mut meter = MemoryMeter::new(100);
        assert!(meter.memory_growing(0, 60, None).unwrap());
        assert!(meter.memory_growing(0, 40, None).unwrap());
        assert!(!meter.denied);
        assert!(!meter.memory_growing(40, 41, None).unwrap());
        assert!(meter.denied);
        assert_eq!(meter.peak_bytes(), 100);
    }

    #[test]
    fn a_plugin_is_never_given_more_than_a_slot() {
        let limits = RuntimeLimits {
            memory_bytes_by_plugin: [("big".to_owned(), u64::MAX)].into(),
            ..RuntimeLimits::default()
        };
        assert_eq!(limits.memory_of("big"), limits.max_memory_bytes);
        assert_eq!(limits.memory_of("other"), limits.memory_bytes);
    }
}
