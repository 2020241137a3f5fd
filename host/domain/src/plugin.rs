//! What plugins say and are asked, in the words of the host.
//!
//! These types mirror the WIT package `windlass:plugin`; the runtime maps between the two, so that neither the engine nor
//! the API knows about WebAssembly. Everything a guest returns is *untrusted*: these types say what its shape is, and
//! the core checks it (see `expand` and `envelope`). Source: design, "Plugins".

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    limits::Limits,
    task::{Check, PackageRef, Script, Supervise},
    value::Environment,
};

/// What a plugin is; read from its exports.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum PluginKind {
    /// How an application is prepared, installed, started, stopped and checked.
    TechStack,
    /// In which order and waves servers are released.
    DeploymentStrategy,
    /// Finds out what is wrong.
    Diagnostic,
    /// A command offered to everyone.
    PublicCommand,
}

/// What a plugin says of itself (`describe`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Descriptor {
    /// Name: lower-case letters, digits, `-`; starts with a letter; at most 60.
    pub name: String,
    /// Version.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// One line.
    pub title: String,
    /// A paragraph.
    pub summary: String,
    /// Who made it.
    pub provider: String,
    /// Free text to sort by.
    pub category: String,
    /// JSON Schema (2020-12) of its parameters.
    pub parameters: serde_json::Value,
    /// What it wants to be allowed; takes effect when approved.
    pub wishes: Wishes,
    /// Operating systems it supports (`linux`, `debian`, `debian:12`…); empty: any.
    pub operating_systems: Vec<String>,
    /// Items that a diagnostic reports on.
    pub items: Vec<DiagnosticItem>,
    /// Ready choices of parameters; users can view and clone them.
    #[serde(default)]
    pub presets: Vec<Preset>,
    /// Growth: codes that this version of the host may not know.
    pub attributes: BTreeMap<String, String>,
}

/// A ready choice of parameters that a plugin ships.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Preset {
    /// Name, unique in the plugin.
    pub name: String,
    /// One line.
    pub title: String,
    /// Operating systems; empty: those of the plugin.
    pub operating_systems: Vec<String>,
    /// Parameters; required ones may be missing.
    pub parameters: serde_json::Value,
}

/// What a plugin's steps want: takes effect when an operator has approved it. Source: design, "Consent".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default, utoipa::ToSchema)]
pub struct Wishes {
    /// OS users its scripts run as, beside the agent's own. `root` is one of them.
    pub users: Vec<String>,
    /// Absolute directories it writes below, beside the instance's own.
    pub path_roots: Vec<String>,
}

/// One item of a diagnostic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DiagnosticItem {
    /// Stable code.
    pub code: String,
    /// One line.
    pub title: String,
    /// `critical` items decide the outcome.
    pub severity: Severity,
}

/// Whether an item decides the outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Decides.
    Critical,
    /// Explains.
    NonCritical,
}

// ---------------------------------------------------------------------------------------------- tech stacks

/// A part of an application's life on a server. The order of the variants is the order of a release.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Make the server fit (once per server and stack version).
    Prepare,
    /// Install the framework itself.
    Install,
    /// Configure for this release; the new release directory exists, the old release still runs.
    Configure,
    /// Stop the application.
    Stop,
    /// After the link was switched to the new release.
    Deploy,
    /// Start the application.
    Start,
    /// Check its health.
    Check,
    /// Restart the application in place.
    Restart,
    /// Remove it.
    Uninstall,
}

/// What a tech stack is asked: the steps of these phases for one application on these servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LifecycleRequest {
    /// The application's name.
    pub application: String,
    /// The service instance's name.
    pub instance: String,
    /// The package to be released; `None` for operations without one.
    pub package: Option<PackageRef>,
    /// The instance's system parameters, valid against the stack's schema. Secrets stand as `{"secret_ref": name}`.
    pub parameters: serde_json::Value,
    /// Custom environment parameters of the instance and deployment parameters of the order.
    pub env: Environment,
    /// Which phases are wanted.
    pub phases: Vec<Phase>,
    /// The servers.
    pub servers: Vec<ServerFacts>,
}

/// What a stack may know of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerFacts {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Operating system, for example `debian`.
    pub os: String,
    /// Its version, for example `12`.
    pub os_version: String,
    /// For example `x86_64`.
    pub arch: String,
    /// First address.
    pub address: String,
    /// Its cell's identifier.
    pub cell: String,
    /// Per-server variables of the service instance.
    pub variables: BTreeMap<String, String>,
}

/// What a stack answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LifecyclePlan {
    /// Steps, shared by all servers, in the order of their phases.
    pub steps: Vec<StackStep>,
    /// What differs: server id → environment.
    pub server_env: BTreeMap<String, Environment>,
}

/// One step of a stack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct StackStep {
    /// Its phase.
    pub phase: Phase,
    /// Name for people, unique within the phase: 1 to 60 characters.
    pub name: String,
    /// What to do.
    pub action: StackAction,
    /// OS user; `None` is the agent's own. Others need an approved wish.
    pub run_as: Option<String>,
    /// Environment of this step alone.
    pub env: Environment,
    /// Time-out in milliseconds.
    pub timeout_ms: u64,
    /// Automatic new attempts after a failure; only where `repeatable`.
    pub retries: u32,
    /// Whether running it again does no harm.
    pub repeatable: bool,
}

/// What a stack's step can do; the core adds fetch, unpack and activate itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StackAction {
    /// Run a script.
    Script(Script),
    /// Write a file.
    WriteFile {
        /// Relative to the release directory, or absolute below an approved root.
        path: String,
        /// Text.
        content: String,
        /// Permission bits.
        mode: u32,
    },
    /// Keep an application running.
    Start(Supervise),
    /// Stop it.
    Stop {
        /// Between `SIGTERM` and `SIGKILL`, in milliseconds.
        grace_ms: u64,
    },
    /// Check its health.
    Check(Check),
}

// ---------------------------------------------------------------------------------------------- strategies

/// What a strategy is asked to plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrategyRequest {
    /// Parameters, valid against its schema.
    pub parameters: serde_json::Value,
    /// The order's limits, for information: the core enforces them whatever the strategy plans.
    pub limits: Limits,
    /// Identifiers of the workspace's cells, in their order.
    #[serde(default)]
    pub cells: Vec<String>,
    /// Applications in the order of their stages.
    pub applications: Vec<StrategyApp>,
}

/// What an order does with one of its applications.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AppRole {
    /// It is released.
    #[default]
    Release,
    /// It only takes part in moving traffic.
    ShiftOnly,
}

/// One application of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrategyApp {
    /// Key that nodes refer to: the application's name.
    pub key: String,
    /// Stage, from 1; applications of a higher stage depend on ones of a lower.
    pub stage: u32,
    /// What is done with it.
    #[serde(default)]
    pub role: AppRole,
    /// Whether its servers take traffic from pools.
    pub has_pools: bool,
    /// Package version to release; empty where it is not released.
    pub target_version: String,
    /// Its servers.
    pub servers: Vec<StrategyServer>,
}

/// One server of an application.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrategyServer {
    /// Its id, which nodes refer to.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its cell's identifier.
    pub cell: String,
    /// Its deployment zone.
    pub zone: String,
    /// Whether it is online and its application in order; others already count as unavailable.
    pub healthy: bool,
    /// The package version installed there now.
    pub installed_version: Option<String>,
}

/// A strategy's plan: nodes in any order in which parents stand before their children.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrategyPlan {
    /// The nodes. Those without a parent run one after the other.
    pub nodes: Vec<StrategyNode>,
    /// What a failure does to the order.
    pub on_failure: OnFailure,
    /// The order counts as failed when nothing has finished for so long, in milliseconds.
    pub progress_deadline_ms: Option<u64>,
}

/// What a failed node that nobody mended does to its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// The order is blocked until a person acts.
    #[default]
    Block,
    /// The order rolls back by itself.
    RollBack,
}

/// One node of a strategy's plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrategyNode {
    /// Index of its parent, lower than its own; `None` at the top.
    pub parent: Option<u32>,
    /// Name for people: 1 to 60 characters.
    pub name: String,
    /// Whether it stands for a group of servers that people act on.
    pub role: NodeRole,
    /// What can be rolled back once it has begun: of a stage.
    #[serde(default)]
    pub rollback: RollbackScope,
    /// What it is.
    pub kind: StrategyNodeKind,
}

/// What a strategy's inner node stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeRole {
    /// Structure only.
    Plain,
    /// One application.
    Application,
    /// A group of servers.
    Group,
    /// A part of the order that can be rolled back by itself until it is done.
    Stage,
}

/// What can be rolled back once a stage has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RollbackScope {
    /// The stage, and the order.
    #[default]
    Order,
    /// The stage alone.
    Stage,
    /// Nothing.
    Nothing,
}

impl RollbackScope {
    pub(crate) const fn is_order(&self) -> bool {
        matches!(self, Self::Order)
    }
}

/// A weight in a change of traffic. JSON: a number, 0 to 100, or `"remembered"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ShiftWeight {
    /// This one.
    Exactly(u32),
    /// What it was before the order first touched it; a server that it did not touch keeps what it has.
    Remembered,
}

impl Serialize for ShiftWeight {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Exactly(weight) => serializer.serialize_u32(*weight),
            Self::Remembered => serializer.serialize_str("remembered"),
        }
    }
}

impl<'de> Deserialize<'de> for ShiftWeight {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Named {
            Remembered,
        }
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a weight, or `remembered`")]
        enum Form {
            Exactly(u32),
            Named(Named),
        }
        Ok(match Form::deserialize(deserializer)? {
            Form::Exactly(weight) => Self::Exactly(weight),
            Form::Named(Named::Remembered) => Self::Remembered,
        })
    }
}

impl utoipa::PartialSchema for ShiftWeight {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Type};
        let number = ObjectBuilder::new()
            .schema_type(Type::Integer)
            .minimum(Some(0))
            .maximum(Some(100));
        let named = ObjectBuilder::new()
            .schema_type(Type::String)
            .enum_values(Some(["remembered"]));
        utoipa::openapi::schema::Schema::OneOf(OneOfBuilder::new().item(number).item(named).build())
            .into()
    }
}

impl utoipa::ToSchema for ShiftWeight {}

/// The kinds of nodes a strategy can return; never steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StrategyNodeKind {
    /// Children one after the other.
    Sequence,
    /// Children side by side.
    Parallel {
        /// At most so many at once; 0: no limit of its own.
        max_in_flight: u32,
        /// So many failed children do not stop the others.
        max_failures: u32,
    },
    /// Release one server. The core expands it.
    Unit(StrategyUnit),
    /// Set weights of servers of one application.
    Shift {
        /// Key of the application.
        application: String,
        /// Server id and weight, 0 to 100.
        weights: Vec<(String, ShiftWeight)>,
    },
    /// Divide the traffic of one application.
    Share {
        /// Key of the application.
        application: String,
        /// Servers that together get the share.
        servers: Vec<String>,
        /// The share, 0 to 100.
        percent: u32,
    },
    /// Wait until a person confirms.
    Gate {
        /// What to look at before confirming.
        message: String,
    },
    /// Wait.
    Pause {
        /// For so long.
        duration_ms: u64,
    },
    /// Ask the strategy whether to go on.
    Judge {
        /// Its own name for what is judged.
        stage: String,
        /// For so long figures are collected first, in milliseconds.
        window_ms: u64,
    },
}

/// One server of one application, to be released.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrategyUnit {
    /// Key of the application.
    pub application: String,
    /// Id of the server.
    pub server: String,
    /// What happens to its weight after success.
    pub restore: RestoreWeight,
    /// Minimum healthy time, in milliseconds.
    pub healthy_for_ms: u64,
    /// Health deadline in milliseconds; `None`: the stack's.
    pub health_deadline_ms: Option<u64>,
}

/// What happens to a server's weight after it was released.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestoreWeight {
    /// Back to what it was before.
    Remembered,
    /// Stays at 0 (gray traffic: a person sets it).
    KeepZero,
    /// A given weight, 0 to 100.
    Override(u32),
}

/// What a strategy is asked when an order rolls back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollbackRequest {
    /// The request it planned.
    pub request: StrategyRequest,
    /// Where each server got to.
    pub progress: Vec<UnitProgress>,
}

/// Where one server got to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitProgress {
    /// Key of the application.
    pub application: String,
    /// Id of the server.
    pub server: String,
    /// How far.
    pub state: UnitState,
}

/// How far one server got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnitState {
    /// Not started, or ended before anything on it changed.
    Untouched,
    /// Changed and healthy.
    Released,
    /// Changed, and not healthy.
    Failed,
}

/// What a strategy sees when it judges.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JudgeRequest {
    /// Its own name for what is judged.
    pub stage: String,
    /// Parameters of the order.
    pub parameters: serde_json::Value,
    /// What was seen.
    pub observations: Vec<Observation>,
}

/// One thing that was seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// Key of the application.
    pub application: String,
    /// Server id; empty for the application as a whole.
    pub server: String,
    /// Name: one of those that the contract lists (`wit/deployment-strategy.wit`, `observation`).
    pub metric: String,
    /// Figure.
    pub value: f64,
}

impl Eq for Observation {}

/// A strategy's judgement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// What to do.
    pub verdict: Verdict,
    /// Why, for people.
    pub reason: String,
}

/// What to do after a judgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Go on.
    GoOn,
    /// Wait for a person.
    Hold,
    /// Roll the order back.
    RollBack,
    /// Collect for another window, and ask again.
    Extend,
}

// ---------------------------------------------------------------------------------------------- public commands, diagnostics

/// What a public command is asked to render.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandRequest {
    /// Parameters, valid against its schema.
    pub parameters: serde_json::Value,
    /// The server it will run on.
    pub target: ServerFacts,
}

/// A rendered command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenderedCommand {
    /// The script.
    pub script: Script,
    /// OS user.
    pub run_as: Option<String>,
    /// Environment: where parameters go.
    pub env: Environment,
    /// Time-out in milliseconds.
    pub timeout_ms: u64,
}

/// How a run of a public command ended: what its plugin is asked to interpret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandRun {
    /// The parameters that it was rendered with.
    pub parameters: serde_json::Value,
    /// How it ended.
    pub outcome: CommandOutcome,
    /// Exit code, where the process ended by itself.
    pub exit_code: Option<i32>,
    /// Output, with secrets masked.
    pub output: String,
    /// Bytes dropped from the middle of `output`.
    pub dropped_bytes: u64,
}

/// How a run of a public command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommandOutcome {
    /// By itself.
    Finished,
    /// Killed at its time-out.
    TimedOut,
    /// Stopped by a person.
    Stopped,
}

/// What a public command made of its output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandResult {
    /// Whether it did what it should.
    pub succeeded: bool,
    /// One line for people.
    pub summary: String,
    /// Structured result.
    pub data: serde_json::Value,
}

/// What a diagnostic is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiagnosisRequest {
    /// What is looked at.
    pub subject: DiagnosisSubject,
    /// Parameters, valid against its schema.
    pub parameters: serde_json::Value,
    /// Codes of the wanted items; empty: all.
    pub items: Vec<String>,
}

/// What a diagnostic looks at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiagnosisSubject {
    /// `server`, `path`, `operation`, `order`, `invocation`.
    pub kind: String,
    /// Its id.
    pub id: String,
    /// What the platform knows of it.
    pub data: serde_json::Value,
}

/// What a diagnostic found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Report {
    /// One line.
    pub summary: String,
    /// The items.
    pub findings: Vec<Finding>,
}

/// One item of a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Finding {
    /// Code of the item.
    pub code: String,
    /// Its state.
    pub state: FindingState,
    /// What was seen.
    pub seen: String,
    /// What to do.
    pub suggestion: String,
}

/// State of an item. Source: spec "Diagnostics".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FindingState {
    /// Good.
    Ok,
    /// Could become bad.
    Warning,
    /// Bad.
    Failed,
    /// Could not be looked at.
    Skipped,
}
