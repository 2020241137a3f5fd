//! From what plugins answered to a plan: checks a strategy's nodes and expands each unit by the fixed skeleton.
//!
//! Everything a plugin returned is untrusted. A strategy's plan is accepted only when every server stands in it exactly
//! once, parents come before children, weights lie between 0 and 100 and no shift takes a pool's last traffic away;
//! otherwise it is refused with the node and the rule, and no server is touched. A stack's steps must stay within what
//! an operator has approved.
//!
//! The skeleton of a unit is its flow (see [`crate::flow`]). Of a release: drain → fetch → unpack → prepare → install →
//! configure → stop (from the manifest that is installed) → activate → deploy → start → check → restore.
//! Source: spec "Release orders", "Per server".

mod build;
mod check;
#[cfg(test)]
pub(crate) mod fixture;
mod server_work;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use server_work::{BadServerWork, ServerTurn, ServerWork, server_work};

use crate::{
    flow::FlowStep,
    id::ServerId,
    limits::Limits,
    manifest::{Manifest, PluginRef},
    plan::{FilesStep, NodeIndex, Part, Plan, Read},
    plugin::{
        LifecyclePlan, NodeRole, OnFailure, Phase, RestoreWeight, RollbackScope, StrategyNode,
        StrategyNodeKind, StrategyPlan, StrategyUnit, Wishes,
    },
    value::Environment,
};

/// A plan has at most so many nodes.
pub const MAX_NODES: usize = 200_000;
/// The tree is at most so deep, counted in strategy nodes.
pub const MAX_DEPTH: usize = 16;
/// A step may run for at most a day.
pub const MAX_TIMEOUT_MS: u64 = 86_400_000;
/// Automatic new attempts of one step.
pub const MAX_RETRIES: u32 = 10;
/// A stack gives at most so many steps for all phases of one application.
pub const MAX_STEPS: usize = 200;
/// One step as JSON: it has to fit a row of the inbox together with its environment.
pub const MAX_STEP_BYTES: usize = 20 * 1024;
/// The stop, start and check steps of one application together, as JSON: they have to fit a manifest's row.
pub const MAX_MANIFEST_BYTES: usize = 20 * 1024;
/// The environment of one server, as JSON.
pub const MAX_ENV_BYTES: usize = 8 * 1024;

/// One application to be planned.
#[derive(Debug, Clone)]
pub struct PartInput {
    /// All but `stop`, `start` and `check`, which are taken from `steps`.
    pub part: Part,
    /// What the stack answered.
    pub steps: LifecyclePlan,
    /// What an operator has approved of the stack's wishes.
    pub approved: Wishes,
    /// The steps of each server's turn.
    pub flow: Vec<FlowStep>,
    /// What [`FlowStep::PlaceFiles`] places.
    pub files: Option<FilesStep>,
    /// Whether the phases prepare and install are left out on servers that have been through the same already.
    pub from_cache: bool,
    /// Its servers: each stands in the plan once.
    pub servers: Vec<ServerInput>,
    /// Further servers that can only be named where traffic is moved.
    pub only_traffic: Vec<ServerId>,
}

/// One server of an application to be planned.
#[derive(Debug, Clone)]
pub struct ServerInput {
    /// Its id.
    pub id: ServerId,
    /// Its name.
    pub name: String,
    /// Its cell's identifier.
    pub cell: String,
    /// What differs on it.
    pub env: Environment,
    /// What is installed there now.
    pub installed: Option<Manifest>,
    /// Of a rollback: the drain that remembers its weights.
    pub drained_by: Option<NodeIndex>,
    /// Keys in the plan's reads that concern it.
    pub reads: Vec<String>,
}

/// Everything a plan is expanded from.
#[derive(Debug, Clone)]
pub struct PlanInput {
    /// The strategy; `None`: the core's own plan.
    pub strategy: Option<PluginRef>,
    /// The envelope.
    pub limits: Limits,
    /// Deadline of each drain, in milliseconds.
    pub drain_deadline_ms: u64,
    /// How long a task may wait for its server, in milliseconds.
    pub delivery_deadline_ms: u64,
    /// Applications.
    pub parts: Vec<PartInput>,
    /// What was read.
    pub reads: BTreeMap<String, Read>,
}

/// Why what a plugin returned is no plan. No server was touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum BadPlan {
    #[error("the strategy returned no nodes")]
    Empty,
    #[error(
        "the plan has {nodes} nodes; the limit is {MAX_NODES}: release fewer servers in one order"
    )]
    TooManyNodes { nodes: usize },
    #[error("node {node} (`{name}`) is deeper than {MAX_DEPTH} levels")]
    TooDeep { node: usize, name: String },
    #[error(
        "node {node} (`{name}`) names node {parent} as its parent: a parent stands before its children"
    )]
    BadParent {
        node: usize,
        name: String,
        parent: u32,
    },
    #[error("node {node} (`{name}`) hangs below node {parent}, which is a leaf")]
    LeafParent {
        node: usize,
        name: String,
        parent: u32,
    },
    #[error("node {node} (`{name}`) has no children")]
    Childless { node: usize, name: String },
    #[error(
        "node {node} (`{name}`): its {field} has {bytes} bytes; the limit is {}",
        crate::text::MESSAGE_MAX_BYTES
    )]
    LongText {
        node: usize,
        name: String,
        field: &'static str,
        bytes: usize,
    },
    #[error(
        "node {node} has a name of {length} characters; a name has 1 to 60, none of them a control character"
    )]
    BadName { node: usize, length: usize },
    #[error(
        "node {node} (`{name}`) names the application `{application}`, which this order does not release"
    )]
    UnknownApplication {
        node: usize,
        name: String,
        application: String,
    },
    #[error(
        "node {node} (`{name}`) names the server `{server}`, which is not a server of `{application}` in this order"
    )]
    UnknownServer {
        node: usize,
        name: String,
        application: String,
        server: String,
    },
    #[error(
        "the server `{server}` of `{application}` stands in the plan twice, at nodes {first} and {second}"
    )]
    DuplicateServer {
        application: String,
        server: String,
        first: usize,
        second: usize,
    },
    #[error(
        "the plan leaves out {count} server(s), the first is `{server}` of `{application}`: every server of the order stands in the plan once"
    )]
    MissingServers {
        count: usize,
        application: String,
        server: String,
    },
    #[error("node {node} (`{name}`) sets a weight of {weight}; the limit is 0 to 100")]
    BadWeight {
        node: usize,
        name: String,
        weight: u32,
    },
    #[error(
        "node {node} (`{name}`) sets the weight of `{server}` twice: give each server one weight"
    )]
    WeightTwice {
        node: usize,
        name: String,
        server: String,
    },
    #[error(
        "node {node} (`{name}`) sets every weight of `{application}` to 0, which would cut all its traffic: `min_healthy_members` is {minimum}"
    )]
    CutsTraffic {
        node: usize,
        name: String,
        application: String,
        minimum: u32,
    },
    #[error("node {node} (`{name}`) gives a share of {percent} %; the limit is 0 to 100")]
    BadShare {
        node: usize,
        name: String,
        percent: u32,
    },
    #[error("node {node} (`{name}`) waits for {duration_ms} ms; the limit is a day")]
    PauseTooLong {
        node: usize,
        name: String,
        duration_ms: u64,
    },
    #[error(
        "a step of the tech stack of `{application}` has a name of {length} characters; a name has 1 to 60, none of them a control character"
    )]
    BadStepName { application: String, length: usize },
    #[error("the tech stack of `{application}` returned {steps} steps; the limit is {MAX_STEPS}")]
    TooManySteps { application: String, steps: usize },
    #[error("step `{step}` of `{application}`: {field} is {value}; the limit is {limit}")]
    StepLimit {
        application: String,
        step: String,
        field: &'static str,
        value: u64,
        limit: u64,
    },
    #[error(
        "step `{step}` of `{application}` wants to run as the OS user `{user}`, which is not approved for this plugin: approve it, or use a stack that does not need it"
    )]
    UserNotApproved {
        application: String,
        step: String,
        user: String,
    },
    #[error(
        "step `{step}` of `{application}` writes to `{path}`, which is below no path root that is approved for this plugin: approve one, or use a stack that does not need it"
    )]
    PathNotApproved {
        application: String,
        step: String,
        path: String,
    },
    #[error("step `{step}` of `{application}`: the path `{path}` must not contain `..`")]
    PathEscapes {
        application: String,
        step: String,
        path: String,
    },
    #[error("the tech stack of `{application}` returned two steps named `{step}` in one phase")]
    DuplicateStep { application: String, step: String },
    #[error("the tech stack of `{application}` sets the variable `{name}` for {of}: {rule}")]
    BadVariable {
        application: String,
        /// Which step or server.
        of: String,
        name: String,
        rule: &'static str,
    },
    #[error(
        "the environment of `{application}` on `{server}` has {bytes} bytes; the limit is {MAX_ENV_BYTES}: put large values into files of the package"
    )]
    EnvironmentTooLarge {
        application: String,
        server: String,
        bytes: u64,
    },
    #[error(
        "the tech stack of `{application}` gives no `start` step: nothing would run after the release"
    )]
    NoStart { application: String },
}

/// Checks the strategy's plan and expands it.
///
/// # Errors
/// [`BadPlan`] names the node or step and the rule.
pub fn expand(input: PlanInput, strategy: &StrategyPlan) -> Result<Plan, BadPlan> {
    for part in &input.parts {
        // What is not released has no steps.
        if !part.servers.is_empty() {
            check::steps(part)?;
        }
    }
    let checked = check::nodes(&input, strategy)?;
    let tree = build::tree(&input, strategy, &checked);
    if tree.nodes.len() > MAX_NODES {
        return Err(BadPlan::TooManyNodes {
            nodes: tree.nodes.len(),
        });
    }
    let parts = input
        .parts
        .into_iter()
        .map(|PartInput { part, steps, .. }| {
            let of = |phase| {
                steps
                    .steps
                    .iter()
                    .filter(|step| step.phase == phase)
                    .cloned()
                    .collect()
            };
            Part {
                stop: of(Phase::Stop),
                start: of(Phase::Start),
                check: of(Phase::Check),
                ..part
            }
        })
        .collect();
    let mut plan = Plan {
        schema: Plan::SCHEMA,
        limits: input.limits,
        on_failure: strategy.on_failure,
        brings_back: false,
        progress_deadline_ms: strategy.progress_deadline_ms,
        delivery_deadline_ms: input.delivery_deadline_ms,
        strategy: input.strategy,
        parts,
        steps: tree.steps,
        units: tree.units,
        nodes: tree.nodes,
        reads: input.reads,
        left_out: Vec::new(),
        next_id: 0,
    };
    plan.schema = plan.lowest_schema();
    Ok(plan)
}

/// The core's own plan: one server after the other, failed ones first, in the order given. Used for rollbacks whose
/// strategy has no answer, fails, or breaks a limit.
#[must_use]
pub fn one_by_one(servers: &[(String, ServerId)]) -> StrategyPlan {
    let unit = |(application, server): &(String, ServerId)| StrategyNode {
        parent: None,
        name: cut(&format!("{application} on {server}")),
        role: NodeRole::Group,
        rollback: RollbackScope::Order,
        kind: StrategyNodeKind::Unit(StrategyUnit {
            application: application.clone(),
            server: server.to_string(),
            restore: RestoreWeight::Remembered,
            healthy_for_ms: 0,
            health_deadline_ms: None,
        }),
    };
    StrategyPlan {
        nodes: servers.iter().map(unit).collect(),
        on_failure: OnFailure::Block,
        progress_deadline_ms: None,
    }
}

fn cut(name: &str) -> String {
    name.chars().take(60).collect()
}
