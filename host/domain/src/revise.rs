//! Revisions: changes of a plan while its order waits or runs.
//!
//! Groups are deleted, servers moved, an application's servers that nobody has begun are grouped anew, servers come and go,
//! applications change their sequence. Each makes a new revision of the plan. What has started never changes: an edit that
//! would touch it is refused, with the node. Nodes keep their ids over revisions, and units their positions, so that rows,
//! tasks under way and events mean the same nodes before and after: the one thing that an engine has to write is the header
//! that names the new plan. Source: design, "Revisions and drift"; spec "Release orders".

mod graft;
mod sequence;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    id::ServerId,
    order::Control,
    plan::{LeftOut, Level, NodeId, NodeIndex, NodeKind, Plan, Read},
    progress::{Admission, NodeState, Progress},
    reducer::Refused,
    text::{self, code},
};

pub use graft::Graft;
pub use sequence::{Lane, arrange};
use tree::Tree;

/// A change of a plan as people ask for it. JSON: `{"edit": "delete_group", "node": 12}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", tag = "edit", deny_unknown_fields)]
pub enum PlanEdit {
    /// Leave a group out that has not started: its servers are unassigned, and skipped.
    DeleteGroup {
        /// The group.
        node: NodeId,
    },
    /// Move servers that have not started to another group of their application.
    MoveServers {
        /// The servers.
        servers: Vec<ServerId>,
        /// The group.
        to: NodeId,
    },
    /// Group an application's servers anew that have not started, those without a group among them.
    Regroup {
        /// The application's name.
        application: String,
        /// The strategy plugin: `name` or `name@version`.
        #[serde(default = "grouped")]
        strategy: String,
        /// Its parameters.
        #[serde(default = "empty_object")]
        parameters: serde_json::Value,
    },
    /// Take in servers that were bound to the application since, and leave out those that are bound no more.
    SyncServers {
        /// The application's name.
        application: String,
    },
    /// Bring the applications into another sequence: lanes side by side, in each lane stages one after the other, in each
    /// stage applications side by side.
    Sequence {
        /// The whole sequence.
        lanes: Vec<Lane>,
    },
}

fn grouped() -> String {
    "grouped".to_owned()
}

fn empty_object() -> serde_json::Value {
    serde_json::Value::Object(serde_json::Map::new())
}

/// A change of a plan with all that it takes to make it.
#[derive(Debug, Clone)]
pub enum Edit {
    /// See [`PlanEdit::DeleteGroup`].
    DeleteGroup {
        /// The group.
        node: NodeId,
    },
    /// See [`PlanEdit::MoveServers`].
    MoveServers {
        /// The servers.
        servers: Vec<ServerId>,
        /// The group.
        to: NodeId,
    },
    /// See [`PlanEdit::Regroup`].
    Regroup(Box<Graft>),
    /// See [`PlanEdit::SyncServers`].
    SyncServers {
        /// The application's name.
        application: String,
        /// Servers that came, planned; `None`: none did.
        came: Option<Box<Graft>>,
        /// Servers that came and do not qualify, with the reasons.
        out: Vec<LeftOut>,
        /// Servers that are bound no more.
        gone: Vec<ServerId>,
        /// What is read of the application's servers now.
        reads: BTreeMap<String, Read>,
    },
    /// See [`PlanEdit::Sequence`].
    Sequence {
        /// The whole sequence.
        lanes: Vec<Lane>,
        /// What depends on what: the first on the second.
        dependencies: Vec<(String, String)>,
    },
}

/// A new revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revised {
    /// The plan.
    pub plan: Plan,
    /// What differs from the one before, for people.
    pub difference: String,
}

/// Why a plan is not changed. It is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum BadEdit {
    #[error("the plan has no node {node}")]
    NoSuchNode { node: NodeId },
    #[error("node {node} (`{name}`) is no group: its level is {}", code(level))]
    NotAGroup {
        node: NodeId,
        name: String,
        level: Level,
    },
    #[error("node {node} (`{name}`) has started or ended: what has started does not change")]
    Started { node: NodeId, name: String },
    #[error("`{server}` has started or ended: what has started does not change")]
    ServerStarted { server: String },
    #[error("group {node} (`{name}`) is done, ended or ignored: nothing more can go into it")]
    GroupOver { node: NodeId, name: String },
    #[error("the server {server} stands in no group of `{application}`")]
    NotInApplication {
        server: ServerId,
        application: String,
    },
    #[error("the server {server} is named twice")]
    ServerTwice { server: ServerId },
    #[error("no server is named")]
    NoServers,
    #[error("`{server}` stands in this group already")]
    AlreadyThere { server: String },
    #[error("the order has no application `{application}`")]
    NoSuchApplication { application: String },
    #[error(
        "`{application}` does not stand in the plan as one application: the strategy's plan has a shape of its own, which cannot be edited so"
    )]
    NotOneApplication { application: String },
    #[error("nothing would be left to do: cancel the order instead")]
    NothingLeft,
    #[error("nothing differs: the order has the servers that are bound to `{application}`")]
    NothingToSync { application: String },
    #[error("every server of `{application}` has started: there is nothing to group anew")]
    NothingToRegroup { application: String },
    #[error(
        "{subject} was {before} when the order was planned, and is {after}: what is planned now would not fit the rest; make a new order"
    )]
    Drifted {
        subject: String,
        before: String,
        after: String,
    },
    #[error(
        "the strategy `{strategy}` judges, and the order's own is another: only the order's own strategy can judge in it"
    )]
    ForeignJudge { strategy: String },
    #[error(
        "the strategy `{strategy}` moves traffic by itself, and the order's own is another: what takes that back again is the order's own strategy's"
    )]
    ForeignTraffic { strategy: String },
    #[error(
        "the plan moves traffic of `{of}` at node {node} (`{name}`), and counts on where each server stands then: wait until that is done, or make a new order"
    )]
    TrafficMoves {
        /// A server, or an application.
        of: String,
        node: NodeId,
        name: String,
    },
    #[error(
        "the plan has moved traffic of `{application}` at node {node} (`{name}`), and what would bring it back goes with the grouping: make a new order"
    )]
    TrafficMoved {
        application: String,
        node: NodeId,
        name: String,
    },
    #[error("the sequence leaves out the application `{application}`")]
    SequenceMisses { application: String },
    #[error("the sequence names the application `{application}` twice")]
    SequenceTwice { application: String },
    #[error("the sequence has an empty lane or stage: leave it out")]
    SequenceEmpty,
    #[error(
        "`{application}` depends on `{on}`, and would not come after it: both have to stand in one lane, `{on}` in an earlier stage"
    )]
    BreaksDependency { application: String, on: String },
    #[error(
        "`{application}` has started, and would stand behind `{before}`, which is not done: what has started stays in front"
    )]
    BehindUnstarted { application: String, before: String },
    #[error("the plan would have {nodes} nodes; the limit is {limit}")]
    TooLarge { nodes: usize, limit: usize },
}

/// Whether the plan of an order can be changed now at all.
///
/// # Errors
/// [`Refused::WrongState`], [`Refused::StageRollsBack`] with the stage's id.
pub fn expect_revisable(plan: &Plan, progress: &Progress) -> Result<(), Refused> {
    match progress.control {
        Control::NotStarted | Control::Active => {}
        Control::Initialising
        | Control::Cancelling
        | Control::EndingForRollback
        | Control::RollingBack
        | Control::Ended(_) => {
            return Err(Refused::WrongState {
                action: "revise",
                state: progress.order_state(),
            });
        }
    }
    match progress.stage_in_rollback() {
        None => Ok(()),
        Some(stage) => Err(Refused::StageRollsBack {
            node: plan.id_of(stage),
            name: plan.nodes[stage as usize].name.clone(),
        }),
    }
}

/// Applies a change.
///
/// # Errors
/// [`BadEdit`] names the node, server or application and the rule.
pub fn revise(plan: &Plan, progress: &Progress, edit: &Edit) -> Result<Revised, BadEdit> {
    let mut draft = Draft {
        plan: plan.clone(),
        tree: Tree::of(plan),
        progress,
        original: plan,
    };
    let difference = match edit {
        Edit::DeleteGroup { node } => draft.delete_group(*node)?,
        Edit::MoveServers { servers, to } => draft.move_servers(servers, *to)?,
        Edit::Regroup(graft) => draft.regroup(graft)?,
        Edit::SyncServers {
            application,
            came,
            out,
            gone,
            reads,
        } => draft.sync(application, (came.as_deref(), out), gone, reads)?,
        Edit::Sequence {
            lanes,
            dependencies,
        } => draft.sequence(lanes, dependencies)?,
    };
    let plan = draft.finish()?;
    Ok(Revised {
        plan,
        difference: cut(difference),
    })
}

/// Whether anything in a node was begun, or ended by a person: then it does not change any more. Locks and orders to run do
/// not count.
#[must_use]
pub fn is_touched(plan: &Plan, progress: &Progress, node: NodeIndex) -> bool {
    let end = progress.subtree_end[node as usize];
    (node..end).any(|index| {
        let row = progress.node(index);
        let leaf = plan.nodes[index as usize].kind.is_leaf();
        row.cancel
            || row.ignored
            || row.attempt > 0
            || row.admission != Admission::None
            || !row.drift.is_empty()
            || row.rollback.is_some()
            || (leaf && progress.state(index) != NodeState::NotStarted)
    })
}

/// A revision in the making.
struct Draft<'a> {
    original: &'a Plan,
    progress: &'a Progress,
    /// All but the nodes, which are in the tree.
    plan: Plan,
    tree: Tree,
}

impl Draft<'_> {
    fn finish(mut self) -> Result<Plan, BadEdit> {
        // Gates and the like of an application of which no server is left and nothing has started.
        for (index, node) in (0u32..).zip(&self.original.nodes) {
            if node.level == Level::Application
                && !self.tree.has_units(index as usize)
                && !self.is_touched(index)
            {
                self.tree.remove(index as usize);
            }
        }
        let Self { mut plan, tree, .. } = self;
        if !tree.has_units(0) {
            return Err(BadEdit::NothingLeft);
        }
        let (nodes, next_id) = tree.flatten();
        if nodes.len() > crate::expand::MAX_NODES {
            return Err(BadEdit::TooLarge {
                nodes: nodes.len(),
                limit: crate::expand::MAX_NODES,
            });
        }
        plan.nodes = nodes;
        plan.next_id = next_id;
        plan.schema = plan.lowest_schema();
        Ok(plan)
    }

    fn known(&self, id: NodeId) -> Result<NodeIndex, BadEdit> {
        self.original
            .index_of(id)
            .ok_or(BadEdit::NoSuchNode { node: id })
    }

    fn name(&self, node: NodeIndex) -> String {
        self.original.nodes[node as usize].name.clone()
    }

    fn is_touched(&self, node: NodeIndex) -> bool {
        is_touched(self.original, self.progress, node)
    }

    fn unit_at(&self, node: NodeIndex) -> Option<u32> {
        match self.original.nodes[node as usize].kind {
            NodeKind::Unit { unit } => Some(unit),
            NodeKind::Sequence
            | NodeKind::Parallel { .. }
            | NodeKind::Step { .. }
            | NodeKind::Traffic(_)
            | NodeKind::Gate { .. }
            | NodeKind::Pause { .. }
            | NodeKind::Judge { .. } => None,
        }
    }

    /// The units below a node: their nodes and positions.
    fn units_in(&self, node: NodeIndex) -> Vec<(NodeIndex, u32)> {
        let end = self.progress.subtree_end[node as usize];
        (node..end)
            .filter_map(|index| Some((index, self.unit_at(index)?)))
            .collect()
    }

    fn application_of(&self, unit: u32) -> String {
        let unit = &self.original.units[unit as usize];
        let part = self.original.part_of(unit);
        part.map_or_else(String::new, |part| part.key.clone())
    }

    /// The shifts of an application's traffic.
    fn shifts_of(&self, part: u32) -> impl Iterator<Item = (NodeIndex, Vec<ServerId>)> + '_ {
        let nodes = (0u32..).zip(&self.original.nodes);
        nodes.filter_map(move |(index, planned)| match &planned.kind {
            NodeKind::Traffic(action) => action
                .shifts()
                .filter(|(of, _)| *of == part)
                .map(|(_, servers)| (index, servers)),
            NodeKind::Sequence
            | NodeKind::Parallel { .. }
            | NodeKind::Unit { .. }
            | NodeKind::Step { .. }
            | NodeKind::Gate { .. }
            | NodeKind::Pause { .. }
            | NodeKind::Judge { .. } => None,
        })
    }

    /// A strategy that moves a server's traffic counts on where the server stands: canaries, cells.
    fn expect_no_shift_of(&self, unit: u32) -> Result<(), BadEdit> {
        let unit = &self.original.units[unit as usize];
        let Some(part) = unit.part else { return Ok(()) };
        let moves = self.shifts_of(part).find(|(index, servers)| {
            servers.contains(&unit.server) && !self.progress.state(*index).is_settled()
        });
        match moves {
            None => Ok(()),
            Some((index, _)) => Err(BadEdit::TrafficMoves {
                of: unit.server_name.clone(),
                node: self.original.id_of(index),
                name: self.name(index),
            }),
        }
    }

    /// Notes a server that stands in no group, with the reason of today.
    fn leave_out(&mut self, out: LeftOut) {
        self.plan
            .left_out
            .retain(|known| known.server != out.server || known.application != out.application);
        self.plan.left_out.push(out);
    }

    fn delete_group(&mut self, id: NodeId) -> Result<String, BadEdit> {
        let node = self.known(id)?;
        let planned = &self.original.nodes[node as usize];
        if planned.level != Level::Group {
            return Err(BadEdit::NotAGroup {
                node: id,
                name: planned.name.clone(),
                level: planned.level,
            });
        }
        if self.is_touched(node) {
            return Err(BadEdit::Started {
                node: id,
                name: planned.name.clone(),
            });
        }
        let units = self.units_in(node);
        for (_, unit) in &units {
            self.expect_no_shift_of(*unit)?;
        }
        let name = self.name(node);
        let names: Vec<&str> = units
            .iter()
            .map(|(_, unit)| self.original.units[*unit as usize].server_name.as_str())
            .collect();
        let application = units
            .first()
            .map_or_else(String::new, |(_, unit)| self.application_of(*unit));
        let followers = self.followers(node);
        let difference = format!(
            "deleted the group `{name}` of {application}: {} unassigned{}",
            listed(&names),
            self.with_followers(&followers)
        );
        for (_, unit) in units {
            let out = LeftOut {
                application: self.application_of(unit),
                server: self.original.units[unit as usize].server,
                server_name: self.original.units[unit as usize].server_name.clone(),
                reason: format!("unassigned: its group `{name}` was deleted"),
            };
            self.leave_out(out);
        }
        for node in followers.into_iter().chain([node]) {
            self.tree.remove(node as usize);
        }
        Ok(difference)
    }

    /// What follows a group and was not reached: it goes with it.
    fn followers(&self, group: NodeIndex) -> Vec<NodeIndex> {
        let followers = self.progress.followers(self.original, group);
        followers
            .into_iter()
            .take_while(|node| !self.is_touched(*node))
            .collect()
    }

    fn with_followers(&self, followers: &[NodeIndex]) -> String {
        let names: Vec<String> = followers.iter().map(|node| self.name(*node)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        if names.is_empty() {
            String::new()
        } else {
            format!("; without {}", listed(&names))
        }
    }

    fn move_servers(&mut self, servers: &[ServerId], to: NodeId) -> Result<String, BadEdit> {
        let node = self.known(to)?;
        let planned = &self.original.nodes[node as usize];
        if planned.level != Level::Group {
            return Err(BadEdit::NotAGroup {
                node: to,
                name: planned.name.clone(),
                level: planned.level,
            });
        }
        let ended =
            std::iter::successors(Some(node), |at| self.original.nodes[*at as usize].parent).any(
                |at| {
                    let row = self.progress.node(at);
                    row.cancel || row.ignored
                },
            );
        if ended || self.progress.state(node).is_settled() {
            return Err(BadEdit::GroupOver {
                node: to,
                name: planned.name.clone(),
            });
        }
        let inside = self.units_in(node);
        let application = inside
            .first()
            .map_or_else(String::new, |(_, unit)| self.application_of(*unit));
        let part = inside
            .first()
            .and_then(|(_, unit)| self.original.units[*unit as usize].part);
        if servers.is_empty() {
            return Err(BadEdit::NoServers);
        }
        let mut moved: Vec<NodeIndex> = Vec::new();
        let mut names = Vec::new();
        for server in servers {
            let found = self.units_in(0).into_iter().find(|(_, unit)| {
                let unit = &self.original.units[*unit as usize];
                unit.server == *server && unit.part == part
            });
            let Some((at, unit)) = found else {
                return Err(BadEdit::NotInApplication {
                    server: *server,
                    application,
                });
            };
            let name = self.original.units[unit as usize].server_name.clone();
            if moved.contains(&at) {
                return Err(BadEdit::ServerTwice { server: *server });
            }
            if inside.iter().any(|(inside, _)| *inside == at) {
                return Err(BadEdit::AlreadyThere { server: name });
            }
            if self.is_touched(at) {
                return Err(BadEdit::ServerStarted { server: name });
            }
            self.expect_no_shift_of(unit)?;
            moved.push(at);
            names.push(name);
        }
        // Groups that are empty without them go, and what follows those.
        let groups: BTreeSet<NodeIndex> = moved
            .iter()
            .filter_map(|at| self.original.nodes[*at as usize].parent)
            .filter(|group| self.original.nodes[*group as usize].level == Level::Group)
            .filter(|group| {
                let mut units = self.units_in(*group).into_iter();
                units.all(|(at, _)| moved.contains(&at))
            })
            .collect();
        let followers: Vec<NodeIndex> = groups
            .into_iter()
            .flat_map(|group| self.followers(group))
            .collect();
        for at in moved {
            self.tree.move_to(at as usize, node as usize);
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let difference = format!(
            "moved {} of {application} to the group `{}`{}",
            listed(&names),
            planned.name,
            self.with_followers(&followers)
        );
        for node in followers {
            self.tree.remove(node as usize);
        }
        Ok(difference)
    }
}

/// A difference is kept with the order's header: it is no longer than this, in characters.
const MAX_DIFFERENCE: usize = 1000;

fn cut(difference: String) -> String {
    match difference.char_indices().nth(MAX_DIFFERENCE) {
        None => difference,
        Some((at, _)) => format!("{}…", &difference[..at]),
    }
}

/// Names for people: the first of them.
fn listed(names: &[&str]) -> String {
    text::first_of(names.iter(), 10, ", ")
}
