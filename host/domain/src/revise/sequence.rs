//! The sequence of applications: lanes side by side, stages one after the other.
//!
//! Source: spec "Release orders", "Dependencies", "Parallel lanes".

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    plan::{Level, NodeIndex, NodeKind, Plan},
    progress::Progress,
};

use super::{BadEdit, Draft, Edit, Revised, revise};

/// One lane: stages one after the other. JSON: `{"stages": [["a", "b"], ["c"]]}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Lane {
    /// The applications of each stage, which go side by side.
    pub stages: Vec<Vec<String>>,
}

/// Brings the applications of a plan that nobody has run into a sequence. It stays its first revision.
///
/// # Errors
/// [`BadEdit`].
pub fn arrange(
    plan: &Plan,
    lanes: &[Lane],
    dependencies: &[(String, String)],
) -> Result<Plan, BadEdit> {
    let progress = Progress::load(plan, crate::order::Control::NotStarted, false, []);
    let edit = Edit::Sequence {
        lanes: lanes.to_vec(),
        dependencies: dependencies.to_vec(),
    };
    let Revised { mut plan, .. } = revise(plan, &progress, &edit)?;
    for node in &mut plan.nodes {
        node.id = None;
    }
    plan.next_id = 0;
    plan.schema = plan.lowest_schema();
    Ok(plan)
}

impl Draft<'_> {
    /// The nodes of applications, by name: all servers stand in one, and nothing but structure stands above them.
    fn applications(&self) -> Result<BTreeMap<String, NodeIndex>, BadEdit> {
        let mut found = BTreeMap::new();
        let mut index: NodeIndex = 1;
        let end = self.progress.subtree_end[0];
        while index < end {
            let node = &self.original.nodes[index as usize];
            let shapeless = || BadEdit::NotOneApplication {
                application: node.name.clone(),
            };
            if node.level == Level::Application {
                let units = self.units_in(index);
                let (_, first) = units.first().ok_or_else(shapeless)?;
                let name = self.application_of(*first);
                let one = units
                    .iter()
                    .all(|(_, unit)| self.application_of(*unit) == name);
                if !one || found.insert(name, index).is_some() {
                    return Err(shapeless());
                }
                index = self.progress.subtree_end[index as usize];
                continue;
            }
            let structure = matches!(node.kind, NodeKind::Sequence | NodeKind::Parallel { .. })
                && node.level == Level::Plain;
            if !structure {
                return Err(shapeless());
            }
            index += 1;
        }
        Ok(found)
    }

    pub(super) fn sequence(
        &mut self,
        lanes: &[Lane],
        dependencies: &[(String, String)],
    ) -> Result<String, BadEdit> {
        let nodes = self.applications()?;
        let mut places: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for (lane_at, lane) in lanes.iter().enumerate() {
            if lane.stages.is_empty() {
                return Err(BadEdit::SequenceEmpty);
            }
            for (stage_at, stage) in lane.stages.iter().enumerate() {
                if stage.is_empty() {
                    return Err(BadEdit::SequenceEmpty);
                }
                for application in stage {
                    if !nodes.contains_key(application) {
                        return Err(BadEdit::NoSuchApplication {
                            application: application.clone(),
                        });
                    }
                    if places.insert(application, (lane_at, stage_at)).is_some() {
                        return Err(BadEdit::SequenceTwice {
                            application: application.clone(),
                        });
                    }
                }
            }
        }
        if let Some(application) = nodes
            .keys()
            .find(|name| !places.contains_key(name.as_str()))
        {
            return Err(BadEdit::SequenceMisses {
                application: application.clone(),
            });
        }
        for (application, place) in &places {
            // Also by an application that is not in the tree: its groups were deleted, and may come back.
            for on in needed_by(application, dependencies) {
                let Some(before) = places.get(on) else {
                    continue;
                };
                if place.0 != before.0 || place.1 <= before.1 {
                    return Err(BadEdit::BreaksDependency {
                        application: (*application).to_owned(),
                        on: on.to_owned(),
                    });
                }
            }
        }
        for (application, place) in &places {
            if !self.is_touched(nodes[*application]) {
                continue;
            }
            let open = places.iter().find(|(other, at)| {
                at.0 == place.0
                    && at.1 < place.1
                    && !self.progress.state(nodes[**other]).is_settled()
            });
            if let Some((before, _)) = open {
                return Err(BadEdit::BehindUnstarted {
                    application: (*application).to_owned(),
                    before: (*before).to_owned(),
                });
            }
        }
        let kept: Vec<usize> = nodes.values().map(|node| *node as usize).collect();
        self.tree.uproot(&kept);
        let side_by_side = NodeKind::Parallel {
            max_in_flight: 0,
            max_failures: 0,
        };
        let root = match lanes.len() {
            1 => 0,
            _ => self
                .tree
                .add(0, Level::Plain, "lanes", side_by_side.clone()),
        };
        let mut said = Vec::new();
        for (lane_at, lane) in lanes.iter().enumerate() {
            let letter = letter(lane_at);
            let parent = match lanes.len() {
                1 => root,
                _ => self.tree.add(
                    root,
                    Level::Plain,
                    &format!("lane {letter}"),
                    NodeKind::Sequence,
                ),
            };
            for (stage_at, stage) in lane.stages.iter().enumerate() {
                let parent = match stage.len() {
                    1 => parent,
                    _ => self.tree.add(
                        parent,
                        Level::Plain,
                        &format!("stage {letter}{}", stage_at + 1),
                        side_by_side.clone(),
                    ),
                };
                for application in stage {
                    self.tree.place(nodes[application] as usize, parent);
                }
            }
            let stages: Vec<String> = lane.stages.iter().map(|stage| stage.join(", ")).collect();
            said.push(format!("lane {letter}: {}", stages.join(" > ")));
        }
        Ok(format!("brought into sequence: {}", said.join("; ")))
    }
}

/// What an application depends on, itself or by others.
pub(super) fn needed_by<'a>(
    application: &'a str,
    dependencies: &'a [(String, String)],
) -> BTreeSet<&'a str> {
    let pairs = dependencies.iter();
    reached(application, pairs.map(|(one, on)| (&**one, &**on)))
}

/// What depends on an application, itself or by others.
pub(super) fn dependants_of<'a>(
    application: &'a str,
    dependencies: &'a [(String, String)],
) -> BTreeSet<&'a str> {
    let pairs = dependencies.iter();
    reached(application, pairs.map(|(one, on)| (&**on, &**one)))
}

/// Everything that pairs lead to from a start, without the start.
fn reached<'a>(
    start: &'a str,
    pairs: impl Iterator<Item = (&'a str, &'a str)> + Clone,
) -> BTreeSet<&'a str> {
    let mut found = BTreeSet::from([start]);
    loop {
        let known = found.len();
        for (from, to) in pairs.clone() {
            if found.contains(from) {
                found.insert(to);
            }
        }
        if found.len() == known {
            found.remove(start);
            return found;
        }
    }
}

/// The name of a lane: A, B, …, Z, and its number after that.
fn letter(lane: usize) -> String {
    match u8::try_from(lane) {
        Ok(lane @ 0..26) => char::from(b'A' + lane).to_string(),
        Ok(_) | Err(_) => (lane + 1).to_string(),
    }
}
