//! Servers of one application, planned anew and put into the plan that runs: regrouped ones, and ones that came.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    id::ServerId,
    manifest::PluginRef,
    plan::{LeftOut, Level, NodeIndex, NodeKind, Plan, Read, TrafficAction},
};

use super::{
    BadEdit, Draft, listed,
    sequence::{dependants_of, needed_by},
};

/// A plan of some servers of one application, made like any other, to become part of the plan that runs. Those that turned out
/// not to qualify stand in its `left_out`.
#[derive(Debug, Clone)]
pub struct Graft {
    /// The application's name.
    pub application: String,
    /// The plan: one application, these servers.
    pub plan: Plan,
    /// What depends on what in the order: the first on the second.
    pub dependencies: Vec<(String, String)>,
}

impl Draft<'_> {
    /// The position of an application, and its node; no node where all its groups were deleted.
    fn application(&self, application: &str) -> Result<(u32, Option<NodeIndex>), BadEdit> {
        let missing = || BadEdit::NoSuchApplication {
            application: application.to_owned(),
        };
        let part = (0u32..)
            .zip(&self.original.parts)
            .find(|(_, part)| part.key == application)
            .map(|(index, _)| index)
            .ok_or_else(missing)?;
        let of_it = |node: NodeIndex| {
            let mut units = self.units_in(node).into_iter();
            units.any(|(_, unit)| self.original.units[unit as usize].part == Some(part))
        };
        let mut nodes = (0u32..)
            .zip(&self.original.nodes)
            .filter(|(_, node)| node.level == Level::Application)
            .map(|(index, _)| index)
            .filter(|index| of_it(*index));
        match (nodes.next(), nodes.next()) {
            (Some(node), None) => Ok((part, Some(node))),
            (None, _) if !of_it(0) => Ok((part, None)),
            (None, _) | (Some(_), Some(_)) => Err(BadEdit::NotOneApplication {
                application: application.to_owned(),
            }),
        }
    }

    /// The node that an application's groups go below. Where it has none: a new one in front of the first application that
    /// depends on it, or at the end of the order. What it depends on itself has to be done there.
    fn place_of(&mut self, graft: &Graft, node: Option<NodeIndex>) -> Result<usize, BadEdit> {
        if let Some(node) = node {
            return Ok(node as usize);
        }
        let dependant = self.first_dependant(graft)?;
        if let Some(dependant) = dependant {
            for on in needed_by(&graft.application, &graft.dependencies) {
                let Ok((_, Some(node))) = self.application(on) else {
                    continue;
                };
                if !self.progress.state(node).is_settled() && !self.comes_before(node, dependant) {
                    return Err(BadEdit::BreaksDependency {
                        application: graft.application.clone(),
                        on: on.to_owned(),
                    });
                }
            }
        }
        let new = self.tree.add(
            0,
            Level::Application,
            &graft.application,
            NodeKind::Sequence,
        );
        if let Some(dependant) = dependant {
            self.tree.put_before(new, dependant as usize);
        }
        Ok(new)
    }

    /// Whether a node is over before a place in the tree is reached: a sequence holds both, the node in an earlier child.
    fn comes_before(&self, node: NodeIndex, place: NodeIndex) -> bool {
        let mut at = place;
        while let Some(parent) = self.original.nodes[at as usize].parent {
            if (parent..self.progress.subtree_end[parent as usize]).contains(&node) {
                let kind = &self.original.nodes[parent as usize].kind;
                return matches!(kind, NodeKind::Sequence) && node < at;
            }
            at = parent;
        }
        false
    }

    /// What stands in a sequence around the first application that depends on the graft's, itself or by others.
    fn first_dependant(&self, graft: &Graft) -> Result<Option<NodeIndex>, BadEdit> {
        let mut first: Option<NodeIndex> = None;
        for dependant in dependants_of(&graft.application, &graft.dependencies) {
            let Ok((_, Some(node))) = self.application(dependant) else {
                continue;
            };
            if self.is_touched(node) {
                return Err(BadEdit::BreaksDependency {
                    application: dependant.to_owned(),
                    on: graft.application.clone(),
                });
            }
            first = Some(first.map_or(node, |first| first.min(node)));
        }
        let parent = |node: &NodeIndex| self.original.nodes[*node as usize].parent;
        let in_sequence = |node: &NodeIndex| {
            parent(node).is_some_and(|parent| {
                matches!(
                    self.original.nodes[parent as usize].kind,
                    NodeKind::Sequence
                )
            })
        };
        Ok(first.and_then(|first| std::iter::successors(Some(first), parent).find(in_sequence)))
    }

    pub(super) fn regroup(&mut self, graft: &Graft) -> Result<String, BadEdit> {
        let (part, node) = self.application(&graft.application)?;
        if graft.plan.units.is_empty() {
            return Err(BadEdit::NothingToRegroup {
                application: graft.application.clone(),
            });
        }
        self.check(graft)?;
        let moved = self
            .shifts_of(part)
            .find(|(index, _)| self.is_touched(*index));
        if let Some((index, _)) = moved {
            return Err(BadEdit::TrafficMoved {
                application: graft.application.clone(),
                node: self.original.id_of(index),
                name: self.name(index),
            });
        }
        let servers: BTreeSet<ServerId> = graft.plan.units.iter().map(|unit| unit.server).collect();
        let out: BTreeSet<ServerId> = graft.plan.left_out.iter().map(|out| out.server).collect();
        let mut taken = Vec::new();
        for (at, unit) in self.units_in(0) {
            let unit = &self.original.units[unit as usize];
            let planned = servers.contains(&unit.server) || out.contains(&unit.server);
            if unit.part != Some(part) || !planned {
                continue;
            }
            if self.is_touched(at) {
                return Err(BadEdit::ServerStarted {
                    server: unit.server_name.clone(),
                });
            }
            taken.push(at);
        }
        // Gates, pauses and the like of the old grouping go with it, as far as they were not reached; those in front of it
        // stay: they belong to what has started. Found before anything is taken out: what is empty goes by itself, the
        // application's own node at the end as well.
        let begun = node.is_some_and(|node| self.is_touched(node));
        let first = taken.iter().copied().min().unwrap_or(NodeIndex::MAX);
        let inside = node.map_or(0..0, |node| {
            let from = if begun { node.max(first) } else { node };
            from..self.progress.subtree_end[node as usize].max(from)
        });
        let between: Vec<NodeIndex> = inside
            .filter(|index| {
                let kind = &self.original.nodes[*index as usize].kind;
                kind.is_leaf()
                    && !self.is_touched(*index)
                    && crate::dispatch::unit_of(self.original, *index).is_none()
            })
            .collect();
        let place = self.place_of(graft, node)?;
        self.insert(part, place, graft);
        for at in between.into_iter().chain(taken) {
            self.tree.remove(at as usize);
        }
        for out in &graft.plan.left_out {
            self.leave_out(out.clone());
        }
        let groups = graft
            .plan
            .nodes
            .iter()
            .filter(|node| node.level == Level::Group)
            .map(|node| node.name.as_str())
            .collect::<Vec<_>>();
        Ok(format!(
            "grouped {} server(s) of {} anew: {}{}",
            servers.len(),
            graft.application,
            listed(&groups),
            not_taking_part("; ", &graft.plan.left_out)
        ))
    }

    pub(super) fn sync(
        &mut self,
        application: &str,
        (came, out): (Option<&Graft>, &[LeftOut]),
        gone: &[ServerId],
        reads: &BTreeMap<String, Read>,
    ) -> Result<String, BadEdit> {
        let (part, node) = self.application(application)?;
        let moves = self
            .shifts_of(part)
            .find(|(index, _)| !self.progress.state(*index).is_settled());
        if let Some((index, _)) = moves {
            return Err(BadEdit::TrafficMoves {
                of: application.to_owned(),
                node: self.original.id_of(index),
                name: self.name(index),
            });
        }
        let mut said = Vec::new();
        if let Some(graft) = came {
            self.check(graft)?;
            let standing = |server: ServerId| {
                self.units_in(0).into_iter().any(|(_, unit)| {
                    let unit = &self.original.units[unit as usize];
                    unit.part == Some(part) && unit.server == server
                })
            };
            if let Some(unit) = graft.plan.units.iter().find(|unit| standing(unit.server)) {
                return Err(BadEdit::ServerTwice {
                    server: unit.server,
                });
            }
            let names: Vec<&str> = graft
                .plan
                .units
                .iter()
                .map(|unit| unit.server_name.as_str())
                .collect();
            said.push(format!("took in {}", listed(&names)));
            let place = self.place_of(graft, node)?;
            self.insert(part, place, graft);
        }
        for out in out {
            self.leave_out(out.clone());
        }
        if !out.is_empty() {
            said.push(not_taking_part("", out));
        }
        let mut left = Vec::new();
        let mut stay = Vec::new();
        for (at, unit) in self.units_in(0) {
            let planned = &self.original.units[unit as usize];
            if planned.part != Some(part) || !gone.contains(&planned.server) {
                continue;
            }
            if self.is_touched(at) {
                stay.push(planned.server_name.as_str());
                continue;
            }
            left.push(planned.server_name.as_str());
            self.tree.remove(at as usize);
        }
        // What is bound no more is not the application's to be assigned to a group either.
        let named = self.plan.left_out.len();
        self.plan
            .left_out
            .retain(|out| out.application != application || !gone.contains(&out.server));
        if self.plan.left_out.len() != named {
            said.push(format!(
                "forgot {} unassigned",
                named - self.plan.left_out.len()
            ));
        }
        self.plan.reads.extend(
            reads
                .iter()
                .map(|(subject, read)| (subject.clone(), read.clone())),
        );
        if !left.is_empty() {
            said.push(format!("left out {}", listed(&left)));
        }
        if said.is_empty() {
            return Err(BadEdit::NothingToSync {
                application: application.to_owned(),
            });
        }
        if !stay.is_empty() {
            said.push(format!("{} stay(s), having started", listed(&stay)));
        }
        Ok(format!("{} of {application}", said.join("; ")))
    }

    /// Whether what was planned now fits what was planned then.
    fn check(&self, graft: &Graft) -> Result<(), BadEdit> {
        for (subject, read) in &graft.plan.reads {
            let common = ["instance of ", "package of ", "pools of "];
            let common = subject == "cells" || common.iter().any(|of| subject.starts_with(of));
            if let Some(before) = self.original.reads.get(subject)
                && common
                && before.digest != read.digest
            {
                return Err(BadEdit::Drifted {
                    subject: subject.clone(),
                    before: before.shown.clone(),
                    after: read.shown.clone(),
                });
            }
        }
        let stack_of = |plan: &Plan| {
            let mut parts = plan.parts.iter();
            let part = parts.find(|part| part.key == graft.application);
            part.and_then(|part| part.stack.clone())
        };
        let shown =
            |stack: &PluginRef| format!("{}@{} ({})", stack.name, stack.version, stack.digest);
        let (before, after) = (stack_of(self.original), stack_of(&graft.plan));
        if let (Some(before), Some(after)) = (before, after)
            && before.digest != after.digest
        {
            return Err(BadEdit::Drifted {
                subject: format!("the tech stack of `{}`", graft.application),
                before: shown(&before),
                after: shown(&after),
            });
        }
        let judges = graft
            .plan
            .nodes
            .iter()
            .any(|node| matches!(node.kind, NodeKind::Judge { .. }));
        if judges && graft.plan.strategy != self.original.strategy {
            return Err(BadEdit::ForeignJudge {
                strategy: graft
                    .plan
                    .strategy
                    .as_ref()
                    .map_or_else(String::new, |strategy| strategy.name.clone()),
            });
        }
        let moves = graft.plan.nodes.iter().any(|node| {
            node.level == Level::Stage
                || matches!(
                    node.kind,
                    NodeKind::Traffic(TrafficAction::Set { .. } | TrafficAction::Share { .. })
                )
        });
        if moves && graft.plan.strategy != self.original.strategy {
            return Err(BadEdit::ForeignTraffic {
                strategy: graft
                    .plan
                    .strategy
                    .as_ref()
                    .map_or_else(String::new, |strategy| strategy.name.clone()),
            });
        }
        Ok(())
    }

    /// Puts the graft's groups at the end of an application. A server that has a unit keeps its position.
    fn insert(&mut self, part: u32, application: usize, graft: &Graft) {
        let mut units: BTreeMap<u32, u32> = BTreeMap::new();
        for (index, planned) in (0u32..).zip(&graft.plan.units) {
            let unit = crate::plan::Unit {
                part: Some(part),
                ..planned.clone()
            };
            let known = self
                .plan
                .units
                .iter()
                .position(|known| known.part == Some(part) && known.server == unit.server);
            let position = match known {
                Some(position) => {
                    self.plan.units[position] = unit;
                    position
                }
                None => {
                    self.plan.units.push(unit);
                    self.plan.units.len() - 1
                }
            };
            units.insert(index, u32::try_from(position).unwrap_or(u32::MAX));
            self.plan
                .left_out
                .retain(|out| out.server != planned.server || out.application != graft.application);
        }
        let mut steps: BTreeMap<u32, u32> = BTreeMap::new();
        for (index, step) in (0u32..).zip(&graft.plan.steps) {
            let known = self.plan.steps.iter().position(|known| known == step);
            let position = known.unwrap_or_else(|| {
                self.plan.steps.push(step.clone());
                self.plan.steps.len() - 1
            });
            steps.insert(index, u32::try_from(position).unwrap_or(u32::MAX));
        }
        for (subject, read) in &graft.plan.reads {
            // Orders are pinned to the plugins they were planned with. Which servers there are is for a sync to say.
            let stays = ["strategy ", "tech stack ", "servers of "]
                .iter()
                .any(|kind| subject.starts_with(kind));
            if !stays {
                self.plan.reads.insert(subject.clone(), read.clone());
            }
        }
        // Depth-first: a node's place in the tree is known before its children come.
        let mut places: Vec<usize> = vec![application; graft.plan.nodes.len()];
        for (index, node) in graft.plan.nodes.iter().enumerate().skip(1) {
            let parent = node
                .parent
                .map_or(application, |parent| places[parent as usize]);
            if node.level == Level::Application {
                // Its place is taken by the node that is there.
                places[index] = parent;
                continue;
            }
            let kind = match &node.kind {
                NodeKind::Unit { unit } => NodeKind::Unit { unit: units[unit] },
                NodeKind::Step { step } => NodeKind::Step { step: steps[step] },
                NodeKind::Traffic(TrafficAction::Set { weights, .. }) => {
                    NodeKind::Traffic(TrafficAction::Set {
                        part,
                        weights: weights.clone(),
                    })
                }
                NodeKind::Traffic(TrafficAction::Share {
                    part: _,
                    servers,
                    rest,
                    percent,
                }) => NodeKind::Traffic(TrafficAction::Share {
                    part,
                    servers: servers.clone(),
                    rest: rest.clone(),
                    percent: *percent,
                }),
                other @ (NodeKind::Sequence
                | NodeKind::Parallel { .. }
                | NodeKind::Traffic(
                    TrafficAction::Drain { .. } | TrafficAction::Restore,
                )
                | NodeKind::Gate { .. }
                | NodeKind::Pause { .. }
                | NodeKind::Judge { .. }) => other.clone(),
            };
            let name = match node.level {
                Level::Group => self.tree.name_below(application, &node.name),
                Level::Order
                | Level::Application
                | Level::Stage
                | Level::Server
                | Level::Step
                | Level::Plain => node.name.clone(),
            };
            places[index] = self.tree.add(parent, node.level, &name, kind);
            self.tree.roll_back_as(places[index], node.rollback);
        }
    }
}

/// For people: which servers do not qualify; empty where all do.
fn not_taking_part(before: &str, out: &[LeftOut]) -> String {
    if out.is_empty() {
        return String::new();
    }
    let names: Vec<&str> = out.iter().map(|out| out.server_name.as_str()).collect();
    format!("{before}{} do(es) not take part", listed(&names))
}
