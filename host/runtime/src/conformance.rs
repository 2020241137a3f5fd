//! The conformance kit: what a plugin must keep to, tried on the plugin itself.
//!
//! The same code serves authors (`windlass plugin test`) and the server: [`quick`] is the part that runs whenever a plugin is
//! loaded, [`examine`] is all of it. Each finding names its [`Rule`] and shows the input that led to it. Nothing is random: one
//! plugin gives the same report on every machine, but for times.
//!
//! ```text
//! file ─► load (world, schema, descriptor) ─► quick (describe twice, presets, defaults)
//!                                         └─► examine: generate ─► calls, each twice ─► answers (rules of each kind)
//!                                                      broken parameters, short memory, no time, failing host, many servers
//! ```
//!
//! Source: design, "Plugins"; the README of the kit for authors describes each rule.

mod answers;
mod fixture;
mod generate;
mod kit;
mod request;
mod stability;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use windlass_domain::plugin::{Descriptor, PluginKind};

pub use fixture::{Answer, FixtureAnswer, FixtureHost};
pub use request::{ordinary_request, request_with};

use crate::{
    call::Export,
    convert::descriptor::descriptor_from_guest,
    error::{Rejection, RejectionCode},
    plugin::{Loaded, Plugin},
};
use generate::Generator;
use kit::Kit;

/// Sets of parameters that are made from a schema.
const SETS: usize = 24;
/// Where the generator starts.
const SEED: u64 = 0x57_49_4E_44;
/// Findings of one rule that are kept.
const MAX_FINDINGS: usize = 20;

/// What is examined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// It loads: one world, its exports, no other imports, within the limits of files and code.
    World,
    /// Its descriptor keeps to the contract, and its schema says what its parameters are.
    Schema,
    /// `describe` answers the same at every call.
    Describe,
    /// Parameters that its schema allows are answered or refused with an error of its own.
    Parameters,
    /// Equal requests get equal answers, also at another time and with other random numbers.
    Determinism,
    /// What its answers hold is what the core accepts.
    Answers,
    /// Parameters that its schema does not allow, and that a server therefore refuses: better by itself too than by a trap.
    InvalidParameters,
    /// With too little memory it ends with an error, never with another answer.
    Memory,
    /// Without time it ends with an error, and the next call is not touched by it.
    Time,
    /// Host calls that fail, and answers of another shape, end in a report or an error of its own.
    HostErrors,
    /// Requests of many servers are answered within the limits.
    Output,
    /// Beside the version before it: name and kind stay, the version rises, parameters do not vanish silently.
    Stability,
    /// Its author's own samples are answered as they say.
    Samples,
}

/// How a rule ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Not for this plugin.
    Skipped,
    /// It keeps to it.
    Passed,
    /// It keeps to it, and its users may be surprised.
    Warning,
    /// It does not.
    Failed,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Which rule.
    pub rule: Rule,
    /// How bad it is: a warning or a failure.
    pub severity: Severity,
    /// What is wrong, and what to do.
    pub text: String,
    /// The function that was called, where one was.
    pub export: Option<Export>,
    /// What it was called with: give it to `windlass plugin call` to see it again.
    pub input: Option<Value>,
}

impl Finding {
    fn new(rule: Rule, severity: Severity, text: impl Into<String>) -> Self {
        Self {
            rule,
            severity,
            text: text.into(),
            export: None,
            input: None,
        }
    }

    fn of_call(mut self, export: Export, input: &Value) -> Self {
        self.export = Some(export);
        self.input = Some(input.clone());
        self
    }
}

/// One rule, as it ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuleResult {
    /// Which rule.
    pub rule: Rule,
    /// The worst of its findings; passed without any.
    pub severity: Severity,
    /// What was tried, in a few words, with figures; or why the rule was skipped.
    pub tried: String,
    /// What was found, at most 20.
    pub findings: Vec<Finding>,
}

/// All rules, as they ended.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Examination {
    /// In the order of [`Rule`].
    pub rules: Vec<RuleResult>,
    /// Calls that were made.
    pub calls: u64,
    /// The longest time that a guest computed in an ordinary call, in microseconds.
    pub longest_guest_time_us: u64,
    /// The highest peak of memory of an ordinary call, in bytes.
    pub peak_memory_bytes: u64,
    /// The largest answer, in bytes of JSON.
    pub largest_answer_bytes: u64,
}

impl Examination {
    /// The worst of all rules.
    #[must_use]
    pub fn severity(&self) -> Severity {
        self.rules
            .iter()
            .map(|rule| rule.severity)
            .max()
            .unwrap_or(Severity::Skipped)
    }

    fn add(&mut self, rule: Rule, tried: impl Into<String>, mut findings: Vec<Finding>) {
        let severity = findings
            .iter()
            .map(|finding| finding.severity)
            .max()
            .unwrap_or(Severity::Passed);
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        findings.truncate(MAX_FINDINGS);
        self.rules.push(RuleResult {
            rule,
            severity,
            tried: tried.into(),
            findings,
        });
    }

    fn skip(&mut self, rule: Rule, why: impl Into<String>) {
        self.rules.push(RuleResult {
            rule,
            severity: Severity::Skipped,
            tried: why.into(),
            findings: Vec::new(),
        });
    }
}

/// A call that an author wrote down, with what it must answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// Its name, for people: the file's.
    #[serde(default)]
    pub name: String,
    /// The function.
    pub export: Export,
    /// Fields of its request; those that are left out are those of an ordinary request.
    pub input: Value,
    /// Answers of the platform, for diagnostics.
    #[serde(default)]
    pub fixture: Vec<FixtureAnswer>,
    /// What it must answer; anything but a fault when it is left out.
    #[serde(default)]
    pub expect: Option<Expected>,
}

/// What a sample must answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Expected {
    /// An answer that has at least these fields, and lists that start with these entries.
    Output(Value),
    /// A failure with this code: `plugin_refused` for an error of the plugin's own.
    Failure(String),
}

/// The part that runs whenever a plugin is loaded: `describe` once more, presets and defaults against the schema.
pub async fn quick(plugin: &Plugin) -> Vec<Finding> {
    let mut findings = described_again(&plugin.loaded, 1).await;
    findings.extend(schema_fits_itself(&plugin.loaded));
    findings
}

/// The same, for the host: the first finding is the reason why the plugin is not accepted.
pub(crate) async fn accept(loaded: &Loaded) -> Result<(), Rejection> {
    let mut findings = described_again(loaded, 1).await;
    findings.extend(schema_fits_itself(loaded));
    match findings.first() {
        None => Ok(()),
        Some(finding) => Err(Rejection::new(
            RejectionCode::NotConforming,
            finding.text.clone(),
        )),
    }
}

/// Up to `wanted` sets of parameters that fit a plugin's schema: its presets, then made ones, the smallest first.
#[must_use]
pub fn fitting_parameters(plugin: &Plugin, wanted: usize) -> Vec<Value> {
    let descriptor = plugin.descriptor();
    let fits = |set: &Value| plugin.validate_parameters(set).is_ok();
    let mut sets: Vec<Value> = descriptor
        .presets
        .iter()
        .map(|preset| preset.parameters.clone())
        .filter(|set| fits(set))
        .collect();
    sets.extend(Generator::new(SEED).valid(&descriptor.parameters, wanted, fits));
    sets.dedup();
    sets.truncate(wanted);
    sets
}

/// Everything. `before`: kind and descriptor of the version before this one, where there is one.
pub async fn examine(
    plugin: &Plugin,
    samples: &[Sample],
    before: Option<(PluginKind, &Descriptor)>,
) -> Examination {
    let mut kit = Kit {
        plugin: plugin.unrecorded(),
        examination: Examination::default(),
        sets: Vec::new(),
        fixture: samples
            .iter()
            .map(|sample| sample.fixture.clone())
            .find(|fixture| !fixture.is_empty())
            .unwrap_or_default(),
    };
    kit.examination
        .add(Rule::World, "it was loaded", Vec::new());
    let mut findings = schema_fits_itself(&plugin.loaded);
    findings.extend(schema_is_helpful(plugin.descriptor()));
    kit.examination
        .add(Rule::Schema, "presets, defaults, descriptions", findings);
    kit.examination.add(
        Rule::Describe,
        "3 calls of `describe`",
        described_again(&plugin.loaded, 3).await,
    );
    kit.make_sets(samples);
    kit.ordinary_calls().await;
    kit.invalid_parameters().await;
    kit.short_memory().await;
    kit.no_time().await;
    kit.failing_host().await;
    kit.many_servers().await;
    match before {
        Some(before) => {
            let findings = stability::compare(before, (plugin.kind(), plugin.descriptor()));
            let tried = format!("beside {}@{}", before.1.name, before.1.version);
            kit.examination.add(Rule::Stability, tried, findings);
        }
        None => kit
            .examination
            .skip(Rule::Stability, "no version before this one was given"),
    }
    kit.samples(samples).await;
    kit.examination
}

async fn described_again(loaded: &Loaded, times: usize) -> Vec<Finding> {
    let schema_bytes = loaded.caller.sandbox.limits.schema_bytes;
    let caller = loaded.caller.clone().elsewhere();
    for _ in 0..times {
        let (again, _) = caller.describe(&loaded.guest).await;
        let fault = match again.map(|again| descriptor_from_guest(loaded.guest.kind(), again, schema_bytes)) {
            Ok(Ok((again, _))) if again == *loaded.descriptor => continue,
            Ok(Ok(_) | Err(_)) => {
                "`describe` answered something else than the first time: it must not depend on time, chance or earlier calls".to_owned()
            }
            Err(failure) => format!("`describe` failed at another call: {failure}"),
        };
        return vec![
            Finding::new(Rule::Describe, Severity::Failed, fault)
                .of_call(Export::Describe, &json!({})),
        ];
    }
    Vec::new()
}

/// Presets and defaults that the schema itself refuses. Presets may leave required parameters out.
fn schema_fits_itself(loaded: &Loaded) -> Vec<Finding> {
    let descriptor = &loaded.descriptor;
    let mut findings = Vec::new();
    for preset in &descriptor.presets {
        let faults = loaded
            .schema
            .validate(&preset.parameters)
            .err()
            .unwrap_or_default();
        for fault in faults
            .iter()
            .filter(|fault| !fault.message.contains("is a required property"))
        {
            findings.push(Finding::new(
                Rule::Schema,
                Severity::Failed,
                format!(
                    "the preset `{}` does not fit the schema: {fault}",
                    preset.name
                ),
            ));
        }
    }
    for (name, property) in descriptor.parameters["properties"]
        .as_object()
        .into_iter()
        .flatten()
    {
        let Some(default) = property.get("default") else {
            continue;
        };
        let alone = json!({ name: default });
        let faults = loaded.schema.validate(&alone).err().unwrap_or_default();
        let pointer = format!("/{}", name.replace('~', "~0").replace('/', "~1"));
        for fault in faults
            .iter()
            .filter(|fault| fault.field.starts_with(&pointer))
        {
            findings.push(Finding::new(
                Rule::Schema,
                Severity::Failed,
                format!("the default of `{name}` does not fit its own schema: {fault}"),
            ));
        }
    }
    findings
}

fn schema_is_helpful(descriptor: &Descriptor) -> Vec<Finding> {
    let mut findings = Vec::new();
    let schema = &descriptor.parameters;
    let mut warn =
        |text: String| findings.push(Finding::new(Rule::Schema, Severity::Warning, text));
    let closed = [
        &schema["additionalProperties"],
        &schema["unevaluatedProperties"],
    ]
    .into_iter()
    .any(|word| !word.is_null());
    if !closed {
        warn("the schema allows parameters that it does not name: a misspelt one is taken silently. Say `\"additionalProperties\": false`".into());
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        if property.get("description").is_none() && property.get("title").is_none() {
            warn(format!(
                "the parameter `{name}` has no description: people see its name only"
            ));
        }
    }
    if descriptor.summary.is_empty() {
        warn("the summary is empty: people choose by it".into());
    }
    findings
}
