//! The weights from before an order, or before one of its stages: what it remembered before it changed them.
//!
//! Looks at the plan and the progress, and changes neither.

use std::collections::BTreeMap;

use crate::{
    dispatch,
    id::{PoolId, ServerId},
    plan::{NodeIndex, NodeKind, Plan},
    progress::Progress,
};

/// The weight of each member of each pool before anything in `scope` (0: the order) first touched it, as far as anything
/// did. What stands first in the plan remembered first: shifts and drains of one application follow each other.
#[must_use]
pub fn weights_before(
    plan: &Plan,
    progress: &Progress,
    scope: NodeIndex,
) -> BTreeMap<(PoolId, ServerId), u32> {
    let mut before = BTreeMap::new();
    let end = progress.subtree_end[scope as usize];
    for (leaf, planned) in (0u32..).zip(&plan.nodes).skip(scope as usize) {
        if leaf >= end {
            break;
        }
        let NodeKind::Traffic(action) = &planned.kind else {
            continue;
        };
        let row = progress.node(leaf);
        if let (Some((part, servers)), Some(weights)) = (action.shifts(), &row.shifted) {
            let pools = &plan.parts[part as usize].pools;
            let members = pools
                .iter()
                .flat_map(|pool| servers.iter().map(|server| (*pool, *server)));
            for (member, weight) in members.zip(weights) {
                before.entry(member).or_insert(*weight);
            }
        }
        if let (Some(weights), Some((_, _, unit))) =
            (&row.remembered, dispatch::unit_of(plan, leaf))
        {
            for known in weights {
                before
                    .entry((known.pool, unit.server))
                    .or_insert(known.weight);
            }
        }
    }
    before
}
