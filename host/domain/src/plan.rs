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
//! A unit is a server of an application, or *server work*: a server on which something runs that is of no application, a
//! command for example. Server work takes nothing out of service: it has no drain, no seat in the safety envelope, no lock
//! and leaves no manifest.
//!
//! Nodes stand in depth-first order: a parent before its children, and a subtree is one contiguous range.
//! Scripts are shared by all servers (`steps`); what differs between servers is environment (`units`).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    id::{AppId, InstanceId, PoolId, ServerId},
    limits::Limits,
    manifest::PluginRef,
    plugin::{OnFailure, RestoreWeight, RollbackScope, ShiftWeight, StackStep},
    task::{FilesRef, PackageRef, Script},
    value::Environment,
};

/// A node's index in [`Plan::nodes`]. It holds within one revision of a plan.
pub type NodeIndex = u32;

/// What names a node over all revisions of a plan: in the API, in rows, events and tasks. Where nothing was revised it is
/// the index. See [`Plan::id_of`].
pub type NodeId = u32;

/// What an order will do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Plan {
    /// Schema version of this record: the lowest that can say what the plan says ([`Plan::lowest_schema`]), so that a plan
    /// which an earlier version could make keeps its digest.
    pub schema: u32,
    /// The safety envelope.
    pub limits: Limits,
    /// What a failure does.
    pub on_failure: OnFailure,
    /// Of a rollback: what stands on its servers is what has to go. One whose turn is ended before it is brought back gets no
    /// traffic again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub brings_back: bool,
    /// The order counts as failed when nothing has finished for so long, in milliseconds.
    pub progress_deadline_ms: Option<u64>,
    /// How long a task may wait for its server before it is not started any more, in milliseconds.
    pub delivery_deadline_ms: u64,
    /// The strategy that planned it; `None`: the core itself.
    pub strategy: Option<PluginRef>,
    /// Applications; empty where all is server work.
    pub parts: Vec<Part>,
    /// Steps, shared by all servers.
    pub steps: Vec<StepTemplate>,
    /// Servers, once per application, or once where it is server work.
    pub units: Vec<Unit>,
    /// The tree. Index 0 is the root.
    pub nodes: Vec<Node>,
    /// What was read to make it: subject → what it was. A difference is drift.
    pub reads: BTreeMap<String, Read>,
    /// Servers that were asked for and do not take part, with the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
    /// Of a later revision: all ids of nodes that were ever given are below it. 0: none was given.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub next_id: NodeId,
}

fn is_zero<N: Default + PartialEq>(number: &N) -> bool {
    *number == N::default()
}

/// A server that does not take part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LeftOut {
    /// The application's name.
    pub application: String,
    /// The server.
    pub server: ServerId,
    /// Its name.
    pub server_name: String,
    /// Why.
    pub reason: String,
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
    /// The package that will be installed; `None`: an operation on what is installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<PackageRef>,
    /// The tech stack that rendered the steps; `None`: they are those of the installed manifests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stack: Option<PluginRef>,
    /// Pools that its servers take traffic from.
    pub pools: Vec<PoolId>,
    /// Environment common to its servers.
    pub env: Environment,
    /// Steps that prepare a server: of the phases prepare and install. They are in the turns of those servers alone that
    /// have not been through them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prepare: Vec<StackStep>,
    /// Steps that the manifest will keep: stop.
    pub stop: Vec<StackStep>,
    /// Steps that the manifest will keep: start.
    pub start: Vec<StackStep>,
    /// Steps that the manifest will keep: check.
    pub check: Vec<StackStep>,
}

/// One server of one application, or of server work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Unit {
    /// Index in [`Plan::parts`]; `None`: server work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<u32>,
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
    pub drained_by: Option<NodeId>,
    /// What the server was prepared for already, where its turn leaves the phases prepare and install out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared: Option<Digest>,
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
    /// A script of neither: a command. Never attempted again by itself.
    Script(ScriptStep),
    /// Replace a directory with the content of an archive.
    PlaceFiles(FilesStep),
}

/// Static files as a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FilesStep {
    /// The archive, and where it goes.
    pub files: FilesRef,
    /// OS user that they belong to.
    pub run_as: String,
}

/// A command as a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ScriptStep {
    /// Name for people: 1 to 60 characters.
    pub name: String,
    /// The script.
    pub script: Script,
    /// OS user; `None` is the agent's own.
    pub run_as: Option<String>,
    /// Environment of this step alone.
    #[serde(default)]
    pub env: Environment,
    /// Time-out in milliseconds. Default: 60 s.
    #[serde(default = "script_timeout")]
    pub timeout_ms: u64,
}

const fn script_timeout() -> u64 {
    60_000
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
    /// A part of the order that can be rolled back by itself until it is done.
    Stage,
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
    /// Its id, where that is not its index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<NodeId>,
    /// Its parent; `None` for the root alone.
    pub parent: Option<NodeIndex>,
    /// What it stands for.
    pub level: Level,
    /// Name for people.
    pub name: String,
    /// Of a stage: what can be rolled back once it has begun.
    #[serde(default, skip_serializing_if = "RollbackScope::is_order")]
    pub rollback: RollbackScope,
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
        /// For so long figures are collected before it is asked, in milliseconds.
        #[serde(default, skip_serializing_if = "is_zero")]
        window_ms: u64,
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
        weights: Vec<(ServerId, ShiftWeight)>,
    },
    /// Divide traffic: in each pool of the part these servers together get a share, its other servers the rest.
    Share {
        /// Index in [`Plan::parts`].
        part: u32,
        /// The servers.
        servers: Vec<ServerId>,
        /// The part's other servers.
        rest: Vec<ServerId>,
        /// The servers' share, 0 to 100.
        percent: u32,
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

impl TrafficAction {
    /// The part and the servers whose weights a shift changes, in the order of
    /// [`NodeProgress::shifted`](crate::progress::NodeProgress::shifted); `None` for what is a unit's own.
    #[must_use]
    pub fn shifts(&self) -> Option<(u32, Vec<ServerId>)> {
        match self {
            Self::Drain { .. } | Self::Restore => None,
            Self::Set { part, weights } => {
                Some((*part, weights.iter().map(|(server, _)| *server).collect()))
            }
            Self::Share {
                part,
                servers,
                rest,
                percent: _,
            } => Some((*part, servers.iter().chain(rest).copied().collect())),
        }
    }
}

fn is_files(step: &StepTemplate) -> bool {
    match step {
        StepTemplate::PlaceFiles(_) => true,
        StepTemplate::Fetch
        | StepTemplate::Unpack
        | StepTemplate::Activate
        | StepTemplate::Stack(_)
        | StepTemplate::Script(_) => false,
    }
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

/// Where the nodes of one revision of a plan stand, by their ids.
#[derive(Debug, Clone, Default)]
pub struct Indices {
    count: u32,
    /// `None`: a node's id is its index.
    by_id: Option<HashMap<NodeId, NodeIndex>>,
}

impl Indices {
    /// Where the node with this id stands; `None`: the revision has none.
    #[must_use]
    pub fn of(&self, id: NodeId) -> Option<NodeIndex> {
        match &self.by_id {
            Some(by_id) => by_id.get(&id).copied(),
            None => Some(id).filter(|id| *id < self.count),
        }
    }
}

impl Plan {
    /// The highest [`Plan::schema`] that this version reads.
    ///
    /// | schema | what came with it |
    /// | --- | --- |
    /// | 1 | releases of packages |
    /// | 2 | applications without a package, server work, commands as steps |
    /// | 3 | shares of traffic, remembered weights in shifts, stages, windows of judgements |
    /// | 4 | servers left out, static files, revisions, rollbacks that are named so, preparations left out |
    pub const SCHEMA: u32 = 4;

    /// The lowest schema that can say what this plan says.
    #[must_use]
    pub fn lowest_schema(&self) -> u32 {
        let released = self
            .parts
            .iter()
            .all(|part| part.package.is_some() && part.stack.is_some());
        let of_applications = self.units.iter().all(|unit| unit.part.is_some());
        let known_steps = self.steps.iter().all(|step| match step {
            StepTemplate::Fetch
            | StepTemplate::Unpack
            | StepTemplate::Activate
            | StepTemplate::Stack(_) => true,
            StepTemplate::Script(_) | StepTemplate::PlaceFiles(_) => false,
        });
        let places_files = self.steps.iter().any(is_files);
        let known_nodes = self.nodes.iter().all(|node| {
            node.level != Level::Stage
                && match &node.kind {
                    NodeKind::Traffic(TrafficAction::Share { .. }) => false,
                    NodeKind::Traffic(TrafficAction::Set { part: _, weights }) => weights
                        .iter()
                        .all(|(_, weight)| matches!(weight, ShiftWeight::Exactly(_))),
                    NodeKind::Judge {
                        stage: _,
                        window_ms,
                    } => *window_ms == 0,
                    NodeKind::Traffic(TrafficAction::Drain { .. } | TrafficAction::Restore)
                    | NodeKind::Sequence
                    | NodeKind::Parallel { .. }
                    | NodeKind::Unit { .. }
                    | NodeKind::Step { .. }
                    | NodeKind::Gate { .. }
                    | NodeKind::Pause { .. } => true,
                }
        });
        let revised = self.next_id != 0 || !self.left_out.is_empty();
        let prepared = self.units.iter().any(|unit| unit.prepared.is_some());
        if revised || places_files || self.brings_back || prepared {
            4
        } else if !known_nodes {
            3
        } else if released && of_applications && known_steps {
            1
        } else {
            2
        }
    }

    /// What names a node over all revisions.
    #[must_use]
    pub fn id_of(&self, node: NodeIndex) -> NodeId {
        self.nodes
            .get(node as usize)
            .and_then(|planned| planned.id)
            .unwrap_or(node)
    }

    /// Where the node with this id stands in this revision; `None`: it has none. For many nodes: [`Plan::indices`].
    #[must_use]
    pub fn index_of(&self, id: NodeId) -> Option<NodeIndex> {
        let has_it =
            |index: NodeIndex| (index as usize) < self.nodes.len() && self.id_of(index) == id;
        if has_it(id) {
            return Some(id);
        }
        if self.next_id == 0 {
            return None;
        }
        let nodes = (0..).zip(&self.nodes);
        nodes
            .filter(|(_, node)| node.id == Some(id))
            .map(|(index, _)| index)
            .next()
    }

    /// Where all nodes of this revision stand, by their ids.
    #[must_use]
    pub fn indices(&self) -> Indices {
        let by_id = (self.next_id != 0).then(|| {
            let nodes = (0..).zip(&self.nodes);
            nodes
                .map(|(index, node)| (node.id.unwrap_or(index), index))
                .collect()
        });
        Indices {
            count: u32::try_from(self.nodes.len()).unwrap_or(u32::MAX),
            by_id,
        }
    }

    /// The positions of the units that stand in the tree. Others were taken out by a revision.
    #[must_use]
    pub fn placed(&self) -> BTreeSet<u32> {
        let nodes = self.nodes.iter();
        nodes
            .filter_map(|node| match node.kind {
                NodeKind::Unit { unit } => Some(unit),
                NodeKind::Sequence
                | NodeKind::Parallel { .. }
                | NodeKind::Step { .. }
                | NodeKind::Traffic(_)
                | NodeKind::Gate { .. }
                | NodeKind::Pause { .. }
                | NodeKind::Judge { .. } => None,
            })
            .collect()
    }

    /// The subjects of [`Plan::reads`] that what is still to be done depends on: without those of units that a revision took
    /// out.
    #[must_use]
    pub fn subjects(&self) -> Vec<String> {
        let placed = self.placed();
        let (mut of_placed, mut of_others) = (BTreeSet::new(), BTreeSet::new());
        for (position, unit) in (0u32..).zip(&self.units) {
            let subjects = if placed.contains(&position) {
                &mut of_placed
            } else {
                &mut of_others
            };
            subjects.extend(unit.reads.iter().map(String::as_str));
        }
        let subjects = self.reads.keys();
        subjects
            .filter(|subject| {
                let subject = subject.as_str();
                of_placed.contains(subject) || !of_others.contains(subject)
            })
            .cloned()
            .collect()
    }

    /// The application that a unit is of; `None`: it is server work.
    #[must_use]
    pub fn part_of(&self, unit: &Unit) -> Option<&Part> {
        self.parts.get(unit.part? as usize)
    }

    /// The digest that names this plan.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of_json(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expand::{
        expand,
        fixture::{all_at_once, input},
    };

    /// A plan as version 1 wrote it.
    const SCHEMA_1: &str = include_str!("plan/schema-1.json");

    #[test]
    fn plans_of_schema_1_read_and_keep_their_digest() {
        let plan: Plan = serde_json::from_str(SCHEMA_1).unwrap();
        assert_eq!(plan.schema, 1);
        assert_eq!(plan.lowest_schema(), 1);
        assert!(plan.parts.iter().all(|part| part.package.is_some()));
        assert!(plan.units.iter().all(|unit| unit.part == Some(0)));
        let written: serde_json::Value = serde_json::from_str(SCHEMA_1).unwrap();
        assert_eq!(serde_json::to_value(&plan).unwrap(), written);
        // As version 1 computed it.
        assert_eq!(
            plan.digest().to_string(),
            "f08e3aaa2fa8d33c1fa3db03fe7d614ac2396daa6cd885762db18df072ff5ba7"
        );
    }

    #[test]
    fn a_release_is_planned_as_version_1_did() {
        let plan = expand(input(), &all_at_once()).unwrap();
        assert_eq!(serde_json::to_value(&plan).unwrap()["schema"], 1);
        let written: Plan = serde_json::from_str(SCHEMA_1).unwrap();
        assert_eq!(plan, written);
    }
}
