//! Changes of traffic by a person while an order runs: weights of released servers, and a cell's share.
//!
//! Source: spec "Release orders" (gray traffic), "Blue-green release" (gray shift). One change at a time is under way; it is
//! kept in the root's row, so that it is made after a crash, too. Whether the safety envelope allows it is found out when it
//! is made.

use crate::{
    order::Control,
    plan::{Level, NodeIndex},
    plugin::UnitState,
    progress::{EditState, NodeState, ServerWeight, TrafficChange, TrafficEdit},
    share::MAX_WEIGHT,
};

use super::{Effect, Refused, Turn, takes_offline, unit_state};

/// Weights in one action.
pub const MAX_WEIGHTS: u32 = 100;
/// The largest share that a cell is given by hand, in percent.
pub const MAX_CELL_SHARE: u32 = 50;

impl Turn<'_> {
    pub(super) fn set_weights(&mut self, weights: &[ServerWeight]) -> Result<(), Refused> {
        self.expect_active("set weights")?;
        let count = u32::try_from(weights.len()).unwrap_or(u32::MAX);
        in_range("weights", count, 1, MAX_WEIGHTS)?;
        for (position, asked) in weights.iter().enumerate() {
            in_range("weight", asked.weight, 0, MAX_WEIGHT)?;
            let mut released = false;
            let mut name = asked.server.to_string();
            for (node, unit) in self.units() {
                if unit.server != asked.server {
                    continue;
                }
                name.clone_from(&unit.server_name);
                if takes_offline(self.plan, node) {
                    return Err(Refused::NotReleased {
                        server: name,
                        why: "this order takes it offline",
                    });
                }
                match unit_state(self.plan, self.progress, node) {
                    UnitState::Released => released = true,
                    UnitState::Failed => {
                        return Err(Refused::NotReleased {
                            server: name,
                            why: "its release failed, so that it stays at 0",
                        });
                    }
                    UnitState::Untouched => {}
                }
            }
            let twice = weights[..position]
                .iter()
                .any(|other| other.server == asked.server);
            if twice || !released {
                return Err(Refused::NotReleased {
                    server: name,
                    why: if twice {
                        "it is named twice"
                    } else {
                        "this order has not released it"
                    },
                });
            }
        }
        self.change_traffic(TrafficChange::Weights(weights.to_vec()))
    }

    pub(super) fn shift_cell(&mut self, cell: &str, percent: u32) -> Result<(), Refused> {
        self.expect_active("shift traffic")?;
        in_range("percent", percent, 0, MAX_CELL_SHARE)?;
        let scope = self.traffic_scope();
        let end = self.progress.subtree_end[scope as usize];
        let mut any = false;
        for (node, unit) in self.units() {
            if unit.cell != cell || !(scope..end).contains(&node) {
                continue;
            }
            any = true;
            if takes_offline(self.plan, node) {
                return Err(Refused::NotReleased {
                    server: unit.server_name.clone(),
                    why: "this order takes it offline",
                });
            }
            if unit_state(self.plan, self.progress, node) != UnitState::Released {
                return Err(Refused::NotReleased {
                    server: unit.server_name.clone(),
                    why: "traffic is shifted to a cell once this order has released all its servers there",
                });
            }
        }
        if !any {
            return Err(Refused::NoSuchCell {
                cell: cell.to_owned(),
                stage: (scope != 0).then(|| self.plan.nodes[scope as usize].name.clone()),
            });
        }
        self.change_traffic(TrafficChange::Cell {
            cell: cell.to_owned(),
            percent,
        })
    }

    fn units(&self) -> impl Iterator<Item = (NodeIndex, &crate::plan::Unit)> {
        let nodes = self.progress.unit_nodes.iter().copied();
        nodes.filter_map(|node| {
            let (_, _, unit) = crate::dispatch::unit_of(self.plan, node)?;
            // A command moves no traffic.
            unit.part.is_some().then_some((node, unit))
        })
    }

    /// What a change of traffic belongs to: the stage that is under way; applications are under way side by side.
    fn traffic_scope(&self) -> NodeIndex {
        let is_under_way = |stage: &NodeIndex| {
            let state = self.progress.state(*stage);
            !state.is_settled() && state != NodeState::NotStarted
        };
        let stages = self.progress.stage_nodes.iter().copied();
        let stages = stages.filter(|node| self.plan.nodes[*node as usize].level == Level::Stage);
        stages
            .map(|stage| self.progress.stage_of(stage))
            .find(is_under_way)
            .unwrap_or(0)
    }

    fn change_traffic(&mut self, change: TrafficChange) -> Result<(), Refused> {
        let mut number = 1;
        if let Some(last) = &self.progress.node(0).edit {
            number = last.number.saturating_add(1);
            if last.state == EditState::Due {
                return Err(Refused::TrafficChanges {
                    number: last.number,
                });
            }
        }
        self.expect_no_stage_rollback()?;
        let scope = self.traffic_scope();
        let edit = TrafficEdit {
            number,
            scope,
            change,
            state: EditState::Due,
        };
        self.change(0, |row| row.edit = Some(edit));
        self.delta.effects.push(Effect::ChangeTraffic { number });
        Ok(())
    }

    pub(super) fn traffic_changed(
        &mut self,
        number: u32,
        error: Option<String>,
    ) -> Result<(), Refused> {
        match self.progress.control {
            Control::Active | Control::Cancelling | Control::EndingForRollback => {}
            Control::NotStarted
            | Control::Initialising
            | Control::RollingBack
            | Control::Ended(_) => return Err(Refused::NotCurrent { node: 0 }),
        }
        let due = self
            .progress
            .node(0)
            .edit
            .as_ref()
            .is_some_and(|edit| edit.number == number && edit.state == EditState::Due);
        if !due {
            return Err(Refused::NotCurrent { node: 0 });
        }
        self.change(0, |row| {
            if let Some(edit) = &mut row.edit {
                edit.state = error.map_or(EditState::Done, EditState::Failed);
            }
        });
        // Shifts may have waited for it.
        self.schedule_all();
        Ok(())
    }
}

fn in_range(field: &'static str, found: u32, min: u32, max: u32) -> Result<(), Refused> {
    if (min..=max).contains(&found) {
        Ok(())
    } else {
        Err(Refused::OutOfRange {
            field,
            found,
            min,
            max,
        })
    }
}
