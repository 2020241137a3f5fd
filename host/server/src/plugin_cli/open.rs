//! What the commands share: files and projects, where compiled code is kept, JSON from the command line.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::Value;
use windlass_runtime::{
    LoadReport, Plugin, RuntimeLimits,
    conformance::{FixtureAnswer, Sample},
    load_file,
};

/// Limits of the plugin that is looked at, where they differ from a server's defaults.
#[derive(Debug, Clone, Args)]
pub(super) struct LimitOptions {
    /// Memory of one call, in MiB.
    #[arg(long, default_value_t = 64)]
    memory_mib: u64,
    /// Time that the plugin may compute in one call, in milliseconds.
    #[arg(long, default_value_t = 5000)]
    guest_time_ms: u64,
}

impl LimitOptions {
    fn limits(&self) -> RuntimeLimits {
        let defaults = RuntimeLimits::default();
        let memory_bytes = self.memory_mib.saturating_mul(1024 * 1024);
        RuntimeLimits {
            memory_bytes,
            max_memory_bytes: defaults.max_memory_bytes.max(memory_bytes),
            guest_time: std::time::Duration::from_millis(self.guest_time_ms),
            calls_at_once: 4,
            ..defaults
        }
    }
}

/// Loads a plugin's file; its compiled code is kept for the next time.
pub(super) async fn open(
    file: &Path,
    limits: &LimitOptions,
) -> anyhow::Result<(Plugin, LoadReport)> {
    let cache = cache_directory();
    Ok(load_file(file, limits.limits(), cache.as_deref()).await?)
}

/// A directory of this user's own; `None`: there is no place for it, and each load compiles.
fn cache_directory() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    let directory = base.join("windlass").join("plugins");
    match fs::create_dir_all(&directory) {
        Ok(()) => Some(directory),
        Err(error) => {
            tracing::warn!(
                "compiled plugins are not kept: {}: {error}",
                directory.display()
            );
            None
        }
    }
}

/// JSON from the command line: the text itself, or `@file`.
pub(super) fn json_argument(name: &str, text: &str) -> anyhow::Result<Value> {
    let document = match text.strip_prefix('@') {
        Some(path) => {
            fs::read_to_string(path).with_context(|| format!("{name}: {path} cannot be read"))?
        }
        None => text.to_owned(),
    };
    serde_json::from_str(&document)
        .with_context(|| format!("{name} is not JSON: give JSON, or @file"))
}

/// A fixture's file: a list of answers, or recorded host calls.
pub(super) fn fixture(path: &Path) -> anyhow::Result<Vec<FixtureAnswer>> {
    let text =
        fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    serde_json::from_str(&text).with_context(|| {
        format!(
            "{} is not a fixture: a list of {{function, arguments, answer}}",
            path.display()
        )
    })
}

/// A project: `windlass-plugin.json` in its directory.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Project {
    /// Program and arguments that build the component, run in the project's directory.
    build: Vec<String>,
    /// The component, relative to the project's directory.
    component: PathBuf,
    /// The directory of samples, relative to the project's directory.
    #[serde(default)]
    samples: Option<PathBuf>,
}

/// The file by which a project is known.
pub(super) const PROJECT_FILE: &str = "windlass-plugin.json";

impl Project {
    /// Of a directory; `None`: it is no project.
    pub(super) fn of(directory: &Path) -> anyhow::Result<Option<Self>> {
        let path = directory.join(PROJECT_FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{} cannot be read", path.display()))?;
        serde_json::from_str(&text)
            .map(Some)
            .with_context(|| format!("{} is not a project's description", path.display()))
    }

    /// Builds the component and answers its path. The build's own output goes to standard error.
    pub(super) fn build(&self, directory: &Path, is_wanted: Build) -> anyhow::Result<PathBuf> {
        let component = directory.join(&self.component);
        if is_wanted == Build::Skip {
            return Ok(component);
        }
        let Some((program, arguments)) = self.build.split_first() else {
            bail!("`build` of {PROJECT_FILE} is empty: name the program that builds the component");
        };
        let output = Command::new(program)
            .args(arguments)
            .current_dir(directory)
            .output()
            .with_context(|| format!("the build cannot be started: {program}"))?;
        if !output.status.success() {
            bail!(
                "the build failed ({}): {}\n{}{}",
                output.status,
                self.build.join(" "),
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        if !component.is_file() {
            bail!(
                "the build made no {}: correct `component` of {PROJECT_FILE}",
                component.display()
            );
        }
        Ok(component)
    }

    pub(super) fn samples(&self, directory: &Path) -> anyhow::Result<Vec<Sample>> {
        match &self.samples {
            Some(samples) => read_samples(&directory.join(samples)),
            None => Ok(Vec::new()),
        }
    }
}

/// Whether a project is built first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Build {
    /// It is.
    Run,
    /// What is there is taken.
    Skip,
}

/// All samples of a directory, by their files' names.
pub(super) fn read_samples(directory: &Path) -> anyhow::Result<Vec<Sample>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)
        .with_context(|| format!("the samples in {} cannot be read", directory.display()))?
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "json")
        })
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let text = fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
            let mut sample: Sample = serde_json::from_str(&text).with_context(|| {
                format!(
                    "{} is not a sample: {{\"export\", \"input\", \"fixture\"?, \"expect\"?: {{\"output\"}} or {{\"failure\"}}}}",
                    path.display()
                )
            })?;
            if sample.name.is_empty() {
                sample.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            }
            Ok(sample)
        })
        .collect()
}

/// The `.wasm` files of a directory, sorted.
pub(super) fn components(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)
        .with_context(|| format!("{} cannot be read", directory.display()))?
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "wasm")
        })
        .collect();
    paths.sort();
    if paths.is_empty() {
        bail!(
            "{} is neither a project (it has no {PROJECT_FILE}) nor a directory with .wasm files",
            directory.display()
        );
    }
    Ok(paths)
}

/// `12.3 ms`, `340 µs`.
pub(super) fn time(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{}.{} ms", us / 1_000, us % 1_000 / 100),
        1_000_000.. => format!("{}.{} s", us / 1_000_000, us % 1_000_000 / 100_000),
    }
}

/// `1.5 MiB`, `40 KiB`.
pub(super) fn size(bytes: u64) -> String {
    const MIB: u64 = 1024 * 1024;
    match bytes {
        0..1_024 => format!("{bytes} bytes"),
        1_024..MIB => format!("{} KiB", bytes / 1024),
        MIB.. => format!("{}.{} MiB", bytes / MIB, bytes % MIB * 10 / MIB),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        assert_eq!(
            [time(12), time(12_345), time(2_500_000)],
            ["12 µs", "12.3 ms", "2.5 s"]
        );
        assert_eq!(
            [size(12), size(40 * 1024), size(1_572_864)],
            ["12 bytes", "40 KiB", "1.5 MiB"]
        );
    }
}
