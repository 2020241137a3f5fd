//! Plans: what an order will do, as a tree.
//!
//! A plan is made once by the core from what a strategy and the tech stacks answered, and never changes: a change is a new
//! revision. It is stored as a blob under its digest. It holds no order id, no time, no weight and no secret, so that
//! planning the same thing again gives the same digest.
//!
//! ```text
//! sequence (order)
//! └─ parallel | sequence (application, group…)        from the strategy
//!    └─ unit (server)                                  from the strategy
//!       └─ drain → fetch → unpack → prepare → …        from the skeleton and the tech stack
//! ```
//!
//! Nodes stand in depth-first order: a parent before its children, and a subtree is one contiguous range.
//! Scripts are shared by all servers (`steps`); what differs between servers is environment (`units`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    id::{AppId, InstanceId, PoolId, ServerId},
    limits::Limits,
    manifest::PluginRef,
    plugin::{OnFailure, RestoreWeight, StackStep},
    task::PackageRef,
    value::Environment,
};

/// A node's index in [`Plan::nodes`].
pub type NodeIndex = u32;

/// What an order will do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Plan {
    /// Schema version of this record.
    pub schema: u32,
    /// The safety envelope.
    pub limits: Limits,
    /// What a failure does.
    pub on_failure: OnFailure,
    /// The order counts as failed when nothing has finished for so long, in milliseconds.
    pub progress_deadline_ms: Option<u64>,
    /// How long a task may wait for its server before it is not started any more, in milliseconds.
    pub delivery_deadline_ms: u64,
    /// The strategy that planned it; `None`: the core itself.
    pub strategy: Option<PluginRef>,
    /// Applications.
    pub parts: Vec<Part>,
    /// Steps, shared by all servers.
    pub steps: Vec<StepTemplate>,
    /// Servers, once per application.
    pub units: Vec<Unit>,
    /// The tree. Index 0 is the root.
    pub nodes: Vec<Node>,
    /// What was read to make it: subject → what it was. A difference is drift.
    pub reads: BTreeMap<String, Read>,
}

/// One application of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Part {
    /// The application's name.
    pub key: String,
    /// The application.
    pub app: AppId,
    /// The service instance.
    pub instance: InstanceId,
    /// The package that will be installed.
    pub package: PackageRef,
    /// The tech stack that rendered the steps.
    pub stack: PluginRef,
    /// Pools that its servers take traffic from.
    pub pools: Vec<PoolId>,
    /// Environment common to its servers.
    pub env: Environment,
    /// Steps that the manifest will keep: stop.
    pub stop: Vec<StackStep>,
    /// Steps that the manifest will keep: start.
    pub start: Vec<StackStep>,
    /// Steps that the manifest will keep: check.
    pub check: Vec<StackStep>,
}

/// One server of one application.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Unit {
    /// Index in [`Plan::parts`].
    pub part: u32,
    /// The server.
    pub server: ServerId,
    /// Its name.
    pub server_name: String,
    /// Its cell's identifier.
    pub cell: String,
    /// What differs on it.
    pub env: Environment,
    /// What happens to its weight after success.
    pub restore: RestoreWeight,
    /// The release that was installed when it was planned.
    #[serde(default)]
    pub before: Option<String>,
    /// Of a rollback: the drain of this server in the order that is rolled back, which remembers its weights.
    #[serde(default)]
    pub drained_by: Option<NodeIndex>,
    /// Keys in [`Plan::reads`] that concern this server, checked again before its first step.
    pub reads: Vec<String>,
}

/// One step as planned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepTemplate {
    /// Download the part's package.
    Fetch,
    /// Unpack it into a fresh release directory.
    Unpack,
    /// Switch the link and write the manifest. Its success is what makes a release *installed*.
    Activate,
    /// A step of the tech stack, or of the installed manifest.
    Stack(StackStep),
}

/// What a node stands for; people act on nodes by it.
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
pub enum Level {
    /// The root.
    Order,
    /// An application.
    Application,
    /// A group of servers.
    Group,
    /// One server.
    Server,
    /// A leaf.
    Step,
    /// Structure without a meaning of its own.
    Plain,
}

/// One node of the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Node {
    /// Its parent; `None` for the root alone.
    pub parent: Option<NodeIndex>,
    /// What it stands for.
    pub level: Level,
    /// Name for people.
    pub name: String,
    /// What it is.
    pub kind: NodeKind,
}

/// Kinds of nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NodeKind {
    /// Children one after the other; a child starts when the one before it is done.
    Sequence,
    /// Children side by side.
    Parallel {
        /// At most so many at once; 0: no limit of its own.
        max_in_flight: u32,
        /// So many failed children do not stop the others.
        max_failures: u32,
    },
    /// A sequence that is one server's: index in [`Plan::units`]. Subject to drift check, lock and envelope before its first leaf.
    Unit {
        /// Index in [`Plan::units`].
        unit: u32,
    },
    /// A task for the agent: index in [`Plan::steps`].
    Step {
        /// Index in [`Plan::steps`].
        step: u32,
    },
    /// A change of weights.
    Traffic(TrafficAction),
    /// Wait until a person confirms.
    Gate {
        /// What to look at.
        message: String,
    },
    /// Wait.
    Pause {
        /// For so long.
        duration_ms: u64,
    },
    /// Ask the strategy.
    Judge {
        /// Its name for what is judged.
        stage: String,
    },
}

/// A change of weights behind the traffic seam.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrafficAction {
    /// Of the enclosing unit: remember the weights, set 0, wait until connections have ended or the deadline has passed.
    Drain {
        /// Deadline of the wait, in milliseconds.
        deadline_ms: u64,
    },
    /// Of the enclosing unit: set what [`Unit::restore`] says.
    Restore,
    /// Set given weights.
    Set {
        /// Index in [`Plan::parts`].
        part: u32,
        /// Server and weight, 0 to 100.
        weights: Vec<(ServerId, u32)>,
    },
}

/// Something that a plan was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Read {
    /// Digest of all that matters in it.
    pub digest: Digest,
    /// A short text of it for people: what `before` and `after` show when it drifted. Never a secret.
    pub shown: String,
}

impl NodeKind {
    /// Whether it has no children: something that is executed.
    #[must_use]
    pub const fn is_leaf(&self) -> bool {
        match self {
            Self::Sequence | Self::Parallel { .. } | Self::Unit { .. } => false,
            Self::Step { .. }
            | Self::Traffic(_)
            | Self::Gate { .. }
            | Self::Pause { .. }
            | Self::Judge { .. } => true,
        }
    }
}

impl Plan {
    /// The current [`Plan::schema`].
    pub const SCHEMA: u32 = 1;

    /// The digest that names this plan.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of_json(self)
    }
}
