//! Orders: long-running work that people start, watch, mend and end.
//!
//! An [`Order`] is the header of a *plan* plus its *progress* (see [`crate::plan`], [`crate::progress`]). The header is one
//! row; every change of the order compares and swaps it. Source: spec "Release orders"; design, "The engine".
//!
//! ```text
//!               ┌────────────── cancel ──────────────┐
//! not started ─ run ─► initialising ─► running ◄──► blocked, drifted, unknown, awaiting confirmation
//!      │                     │            │  └─ cancel ─► cancelling ─► cancelled | failed
//!      └─ cancel ─► cancelled◄┘           ├─ roll back ─► rolling back ─► rolled back | failed
//!                                         └─► succeeded
//! ```
//! `cancelled`, `failed`, `rolled_back` and `succeeded` are terminal: they are never left. A cancelled order in which
//! something had failed or is unknown ends as `failed`, so that history does not hide it.

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    id::{InstanceId, OrderId, PackageId, ServerId, TemplateId},
    limits::Limits,
    operation::Operation,
    progress::{Counts, ServerWeight},
    revise::Lane,
    stages::Dependencies,
    time::Timestamp,
    value::{Environment, deserialize_parameters, parameters_schema},
};

/// The state of an order as a whole.
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
pub enum OrderState {
    /// Planned; nobody has run it.
    NotStarted,
    /// Servers are checked and locked.
    Initialising,
    /// Something is under way.
    Running,
    /// A failure, a lock or a limit stops it; a person acts, or waits until the cause is gone.
    Blocked,
    /// What it was planned from has changed on a server; a person decides.
    Drifted,
    /// Whether a step ran cannot be known; a person decides.
    Unknown,
    /// A gate or a judge waits for a person, or nothing is under way and the next group waits for being run.
    AwaitingConfirmation,
    /// Tasks under way are being ended.
    Cancelling,
    /// Done.
    Succeeded,
    /// Ended with something failed or unknown.
    Failed,
    /// Ended by a person.
    Cancelled,
    /// A linked rollback order is under way.
    RollingBack,
    /// The linked rollback order has succeeded.
    RolledBack,
}

impl OrderState {
    /// Whether it is never left.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        match self {
            Self::Succeeded | Self::Failed | Self::Cancelled | Self::RolledBack => true,
            Self::NotStarted
            | Self::Initialising
            | Self::Running
            | Self::Blocked
            | Self::Drifted
            | Self::Unknown
            | Self::AwaitingConfirmation
            | Self::Cancelling
            | Self::RollingBack => false,
        }
    }
}

/// What an order is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Purpose {
    /// Release packages.
    Release,
    /// Bring back what a release changed.
    Rollback {
        /// The order that is rolled back.
        of: OrderId,
        /// Why.
        reason: String,
        /// Whether the core's own plan runs because the strategy's was missing, failed, or broke a limit: the cause.
        core_plan_because: Option<String>,
        /// The stage of that order that alone is rolled back (its node's id); absent: all of it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stage: Option<u32>,
    },
    /// Do something to applications as they are installed.
    Operation {
        /// What.
        operation: Operation,
    },
    /// Run a command on servers.
    Invocation {
        /// What runs, as people name it: `name@version` of a public command, for example.
        command: String,
    },
}

impl Purpose {
    /// The order that it rolls back.
    #[must_use]
    pub const fn rollback_of(&self) -> Option<OrderId> {
        match self {
            Self::Release | Self::Operation { .. } | Self::Invocation { .. } => None,
            Self::Rollback { of, .. } => Some(*of),
        }
    }
}

/// One service instance of a release and its target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The service instance.
    pub instance: InstanceId,
    /// The package to release; absent: the service instance's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<PackageId>,
    /// Only servers of these cells (identifiers); empty: all of the instance's.
    #[serde(default)]
    pub cells: Vec<String>,
    /// Version requirement of the tech stack to release with: `=1.2.0` for exactly that one. When the order succeeds, it
    /// becomes the service instance's. Absent: what the instance has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub tech_stack_version: Option<semver::VersionReq>,
    /// Deployment parameters of this application: names and values that become environment, as an object or as text
    /// (`key=value`, separated by blanks or new lines). Names that no shell knows (`a.b`) reach programs, not scripts.
    #[serde(default, deserialize_with = "deserialize_parameters")]
    #[schema(schema_with = parameters_schema)]
    pub parameters: Environment,
}

impl Target {
    /// A package on all servers of a service instance.
    #[must_use]
    pub const fn new(instance: InstanceId, package: PackageId) -> Self {
        Self {
            instance,
            package: Some(package),
            cells: Vec::new(),
            tech_stack_version: None,
            parameters: Environment::new(),
        }
    }
}

/// A version requirement of the tech stack that a release changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct StackChange {
    /// The service instance.
    pub instance: InstanceId,
    /// What it had; `None`: its application's.
    #[schema(value_type = Option<String>)]
    pub before: Option<semver::VersionReq>,
    /// What it has once the order has succeeded.
    #[schema(value_type = Option<String>)]
    pub after: Option<semver::VersionReq>,
}

/// One service instance that only takes part in moving traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ShiftTarget {
    /// The service instance; its application runs on its servers already.
    pub instance: InstanceId,
}

/// What was asked for: everything a plan is made from that a person chose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReleaseSpec {
    /// 1 to 50 characters.
    pub title: String,
    /// The strategy plugin: `name` for its default version or `name@version`.
    #[serde(default = "grouped")]
    pub strategy: String,
    /// The strategy's parameters, valid against its schema.
    #[serde(default = "empty_object")]
    pub parameters: serde_json::Value,
    /// What to release.
    pub targets: Vec<Target>,
    /// What is not released and takes part where the strategy moves traffic.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shift_only: Vec<ShiftTarget>,
    /// Dependencies between applications: the short form `a>b,c>d` (a depends on b), or pairs.
    #[serde(default)]
    pub dependencies: Dependencies,
    /// The applications in lanes side by side, each of stages one after the other; absent: by their dependencies.
    #[serde(default)]
    pub lanes: Vec<Lane>,
    /// Deployment parameters of all applications, likewise; an application's own stand above them.
    #[serde(default, deserialize_with = "deserialize_parameters")]
    #[schema(schema_with = parameters_schema)]
    pub environment: Environment,
    /// Whether servers that were prepared for the same tech stack already, with the same parameters and environment, are
    /// not prepared again. Default: yes.
    #[serde(default = "yes")]
    pub install_from_cache: bool,
    /// The safety envelope.
    #[serde(default)]
    pub limits: Limits,
    /// How long to wait for connections to end after a weight was set to 0, in milliseconds. Default 30 s.
    #[serde(default = "drain_deadline")]
    pub drain_deadline_ms: u64,
    /// How long a task may wait for its server before it is not started any more, in milliseconds. Default 10 min.
    #[serde(default = "delivery_deadline")]
    pub delivery_deadline_ms: u64,
    /// A process template for releases, which replaces the fixed flow of each server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplateId>,
    /// Whether the workspace's notification channels are told. Default: yes.
    #[serde(default = "yes")]
    pub notifications: bool,
}

impl ReleaseSpec {
    /// A release with all settings as they are by default.
    #[must_use]
    pub fn new(title: String, targets: Vec<Target>) -> Self {
        Self {
            title,
            strategy: grouped(),
            parameters: empty_object(),
            targets,
            shift_only: Vec::new(),
            dependencies: Dependencies::default(),
            lanes: Vec::new(),
            environment: Environment::new(),
            install_from_cache: yes(),
            limits: Limits::default(),
            drain_deadline_ms: drain_deadline(),
            delivery_deadline_ms: delivery_deadline(),
            template: None,
            notifications: yes(),
        }
    }
}

const fn yes() -> bool {
    true
}

fn grouped() -> String {
    "grouped".to_owned()
}

fn empty_object() -> serde_json::Value {
    serde_json::Value::Object(serde_json::Map::new())
}

const fn drain_deadline() -> u64 {
    30_000
}

const fn delivery_deadline() -> u64 {
    600_000
}

/// One revision of an order's plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PlanRevision {
    /// From 1.
    pub revision: u32,
    /// The plan.
    pub digest: Digest,
    /// Who made it.
    pub author: String,
    /// When.
    pub at: Timestamp,
    /// What differs from the one before, for people.
    pub difference: String,
}

/// How a person wants an order rolled back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RollbackAsked {
    /// Why.
    pub reason: String,
    /// Parameters of the strategy that stand above the order's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<serde_json::Value>,
}

impl RollbackAsked {
    /// The largest [`RollbackAsked::parameters`] as JSON, in bytes: they stand in the order's header.
    pub const MAX_PARAMETER_BYTES: usize = 4096;

    /// The order's parameters with those above them.
    #[must_use]
    pub fn over(&self, mut own: serde_json::Value) -> serde_json::Value {
        if let (Some(own), Some(above)) = (
            own.as_object_mut(),
            self.parameters.as_ref().and_then(|given| given.as_object()),
        ) {
            own.extend(above.clone());
        }
        own
    }
}

/// An order's header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Order {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: OrderId,
    /// The workspace's identifier.
    pub workspace: String,
    /// Title.
    pub title: String,
    /// What it is for.
    pub purpose: Purpose,
    /// Its state; follows from its progress.
    pub state: OrderState,
    /// Why it is in this state, for people; empty where the state says it all.
    pub state_reason: String,
    /// The strategy, `name@version`; empty for the core's own plan.
    pub strategy: String,
    /// The plan that runs.
    pub plan: Digest,
    /// The last revisions of the plan, at most [`Order::SHOWN_REVISIONS`]; the last of them is `plan`.
    pub revisions: Vec<PlanRevision>,
    /// What was asked for (a blob).
    pub spec: Digest,
    /// Servers by state.
    pub counts: Counts,
    /// Where its control flow is.
    pub control: Control,
    /// Nothing finished within the progress deadline; nothing more is started until a person goes on.
    #[serde(default)]
    pub stalled: bool,
    /// The order whose locks it uses: itself, or for a rollback the first of the line.
    pub lock_owner: OrderId,
    /// Sequence number of its last event.
    pub last_event: u64,
    /// The order that rolls it back.
    pub rolled_back_by: Option<OrderId>,
    /// How a person wanted it rolled back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback_asked: Option<RollbackAsked>,
    /// Servers it works on.
    pub server_count: u32,
    /// Who made it.
    pub created_by: String,
    /// When.
    pub created_at: Timestamp,
    /// When it was run.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// When a leaf last ended; the progress deadline counts from here.
    pub last_progress_at: Option<Timestamp>,
    /// Whether the workspace's notification channels are told.
    #[serde(default = "yes")]
    pub notify: bool,
    /// Tech-stack versions that its success makes those of service instances.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tech_stacks: Vec<StackChange>,
}

impl Order {
    /// The current [`Order::schema`].
    pub const SCHEMA: u32 = 1;

    /// How many revisions its header shows; the others have rows alone.
    pub const SHOWN_REVISIONS: usize = 8;

    /// The revision of its plan that runs, from 1.
    #[must_use]
    pub fn revision(&self) -> u32 {
        self.revisions.last().map_or(1, |last| last.revision)
    }
}

/// The part of an order's control flow that does not follow from its nodes.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Nobody has run it.
    #[default]
    NotStarted,
    /// Locks are taken.
    Initialising,
    /// The scheduler starts what can be started.
    Active,
    /// Nothing is started; what runs is ended; then it is over.
    Cancelling,
    /// Nothing is started; what runs is ended; then a rollback order is made.
    EndingForRollback,
    /// The rollback order exists.
    RollingBack,
    /// Over.
    Ended(Ending),
}

/// How an order ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// Everything done.
    Succeeded,
    /// With something failed or unknown.
    Failed,
    /// By a person.
    Cancelled,
    /// Rolled back.
    RolledBack,
}

/// What a person can do to an order. JSON: `{"action": "retry", "node": 12}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", tag = "action", deny_unknown_fields)]
pub enum Action {
    /// Run everything, or go on with everything.
    Run,
    /// Run one application, group or server, with the gates and the like before it. Refused while a server that stands
    /// before it is not done.
    RunNode {
        /// The node.
        node: u32,
    },
    /// Confirm everything that waits for a person in this node: gates, and judges that hold. What comes to wait later is not
    /// confirmed by it.
    Confirm {
        /// The gate or judge itself, or a node around; of a group, what follows it as well; absent: the whole order.
        node: Option<u32>,
    },
    /// Try again what failed, drifted or is unknown in this node.
    Retry {
        /// A step, server, group, or 0 for all.
        node: u32,
    },
    /// Go on without what failed, drifted or is unknown in this node.
    Ignore {
        /// A step, server, group, or 0 for all.
        node: u32,
    },
    /// End an application, group or server, or the whole order. What is under way in it is ended; what is done stays.
    Cancel {
        /// The node; absent or 0: the whole order.
        node: Option<u32>,
    },
    /// Start nothing more in this group, application or server; servers under way go on.
    Lock {
        /// The node.
        node: u32,
        /// Why; at most 500 characters.
        #[serde(default)]
        reason: String,
    },
    /// Take such a lock away. Refused while another order still holds a server of the group.
    Unlock {
        /// The node.
        node: u32,
    },
    /// Bring back what this order changed.
    RollBack {
        /// Why; at most 500 characters.
        reason: String,
        /// Parameters of the strategy that stand above the order's own in the rollback, for example
        /// `{"grouping": "one-per-group"}`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        parameters: Option<serde_json::Value>,
    },
    /// Bring back what one application changed, or a stage that is not done: what is under way in it is ended, then a rollback
    /// order runs. Again when that failed.
    RollBackStage {
        /// The stage, or an application that stands in none.
        node: u32,
        /// Why; at most 500 characters.
        reason: String,
    },
    /// Run a stage or application again that was rolled back.
    RunAgain {
        /// The stage or application.
        node: u32,
    },
    /// Go on without a stage or application that was rolled back.
    GoOn {
        /// The stage or application.
        node: u32,
    },
    /// Set weights of servers that this order has released; those that failed stay at 0. Possible until the order ends.
    SetWeights {
        /// Servers and their weights, 1 to 100 of them.
        weights: Vec<ServerWeight>,
    },
    /// Give the servers of one cell, which this order has released, a share of the traffic of all its applications.
    ShiftCell {
        /// The cell's identifier.
        cell: String,
        /// The share, 0 to 50.
        percent: u32,
    },
}

/// One thing that happened to an order; what the event stream sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct OrderEvent {
    /// Sequence number within the order, from 1, without gaps.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// Who, where a person did it; empty otherwise.
    pub by: String,
    /// What.
    #[serde(flatten)]
    pub what: Happened,
}

/// What can happen to an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum Happened {
    /// The order changed its state.
    Order {
        /// Its new state.
        state: OrderState,
        /// Why.
        reason: String,
    },
    /// A node changed its state.
    Node {
        /// The node.
        node: u32,
        /// Its name.
        name: String,
        /// The server, where it is one's.
        server: Option<ServerId>,
        /// Its new state.
        state: crate::progress::NodeState,
        /// Which attempt, from 1; 0 where it has none.
        attempt: u32,
        /// What happened, for people.
        message: String,
    },
    /// A person acted.
    Action {
        /// What was done.
        did: Action,
    },
    /// A change of traffic that a person asked for was made, or not.
    Traffic {
        /// Which one, counted from 1.
        edit: u32,
        /// Why it was not made.
        error: Option<String>,
    },
    /// The plan was changed.
    Revised {
        /// The new revision, from 2.
        revision: u32,
        /// Its plan.
        plan: Digest,
        /// What differs from the one before, for people.
        difference: String,
    },
}
