//! `windlass plugin test`: the conformance kit, on a project, a component or a directory of components.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use clap::Args;
use serde::Serialize;
use windlass_domain::{
    manifest::PluginRef,
    plugin::{Descriptor, PluginKind},
};
use windlass_runtime::{
    Plugin,
    conformance::{self, Examination, Sample, Severity},
};

use super::{
    new::code,
    open::{Build, LimitOptions, Project, components, open, read_samples, size, time},
};

/// What `windlass plugin test` is told.
#[derive(Debug, Clone, Args)]
pub struct TestOptions {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Take the component that is there, and build nothing.
    #[arg(long)]
    no_build: bool,
    /// The component of the version before this one: what changed between them is examined too.
    #[arg(long)]
    before: Option<PathBuf>,
    /// A directory of samples, for a component without a project.
    #[arg(long)]
    samples: Option<PathBuf>,
    #[command(flatten)]
    limits: LimitOptions,
    /// A project (a directory with windlass-plugin.json), a component, or a directory of components.
    path: PathBuf,
}

/// One component that was examined.
#[derive(Debug, Serialize)]
struct Tested {
    file: PathBuf,
    plugin: PluginRef,
    kind: PluginKind,
    examination: Examination,
}

/// Examines and prints; answers whether everything conforms.
pub(super) async fn test(options: &TestOptions) -> anyhow::Result<bool> {
    let mut samples: Vec<Sample> = options
        .samples
        .as_deref()
        .map(read_samples)
        .transpose()?
        .unwrap_or_default();
    let files = if options.path.is_dir() {
        match Project::of(&options.path)? {
            Some(project) => {
                let build = if options.no_build {
                    Build::Skip
                } else {
                    Build::Run
                };
                samples.extend(project.samples(&options.path)?);
                vec![project.build(&options.path, build)?]
            }
            None => components(&options.path)?,
        }
    } else {
        vec![options.path.clone()]
    };
    let mut loaded: Vec<(PathBuf, Plugin)> = Vec::new();
    for file in files {
        let (plugin, _) = open(&file, &options.limits).await?;
        loaded.push((file, plugin));
    }
    // Versions of one plugin stand beside each other: each is compared with the one before it.
    loaded.sort_by(|(_, one), (_, other)| {
        let key = |plugin: &Plugin| {
            (
                plugin.descriptor().name.clone(),
                plugin.descriptor().version.clone(),
            )
        };
        key(one).cmp(&key(other))
    });
    let mut before: BTreeMap<String, (PluginKind, Arc<Descriptor>)> = BTreeMap::new();
    if let Some(file) = &options.before {
        let (plugin, _) = open(file, &options.limits).await?;
        let kept = (plugin.kind(), Arc::clone(plugin.descriptor()));
        // Whatever its name is: that it changed is one of the things to be found.
        for (_, plugin) in &loaded {
            before.insert(plugin.descriptor().name.clone(), kept.clone());
        }
    }
    let mut tested = Vec::new();
    for (file, plugin) in loaded {
        let descriptor = Arc::clone(plugin.descriptor());
        let last = before.insert(descriptor.name.clone(), (plugin.kind(), descriptor));
        let last = last
            .as_ref()
            .map(|(kind, descriptor)| (*kind, descriptor.as_ref()));
        let examination = conformance::examine(&plugin, &samples, last).await;
        tested.push(Tested {
            file,
            plugin: plugin.reference().clone(),
            kind: plugin.kind(),
            examination,
        });
    }
    if options.json {
        say!("{}", serde_json::to_string_pretty(&tested)?);
    } else {
        tested.iter().for_each(print);
    }
    Ok(tested
        .iter()
        .all(|one| one.examination.severity() < Severity::Failed))
}

fn print(tested: &Tested) {
    let Tested {
        file,
        plugin,
        kind,
        examination,
    } = tested;
    say!(
        "{}@{} ({}) {}",
        plugin.name,
        plugin.version,
        code(*kind),
        file.display()
    );
    for rule in &examination.rules {
        let name = serde_json::to_value(rule.rule).unwrap_or_default();
        say!(
            "  {:<9}{:<20}{}",
            word(rule.severity),
            name.as_str().unwrap_or_default(),
            rule.tried
        );
        for finding in &rule.findings {
            say!("    {}: {}", word(finding.severity), finding.text);
            if let (Some(export), Some(input)) = (finding.export, &finding.input) {
                let input = input.to_string();
                let cut: String = input.chars().take(2000).collect();
                say!(
                    "      {export} {cut}{}",
                    if cut.len() < input.len() { "…" } else { "" }
                );
            }
        }
    }
    say!(
        "  {} calls; longest {}, peak {}, largest answer {}\n",
        examination.calls,
        time(examination.longest_guest_time_us),
        size(examination.peak_memory_bytes),
        size(examination.largest_answer_bytes)
    );
}

fn word(severity: Severity) -> &'static str {
    match severity {
        Severity::Skipped => "skipped",
        Severity::Passed => "passed",
        Severity::Warning => "warning",
        Severity::Failed => "FAILED",
    }
}
