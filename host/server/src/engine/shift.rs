//! Changes of weights that are not one server's turn: shifts that a strategy plans, their taking back, and what a person
//! changes by hand.
//!
//! Before the first weight of a shift changes, all that it changes are remembered in the leaf's row, so that after a crash,
//! or when a person ends the order, what was before is known. Taking back sets them again, for servers that this order left
//! broken only as far as it takes traffic from them. A change by hand is kept in the root's row until it is made. All raise
//! before they lower, lower nothing that would leave a pool with fewer healthy members with traffic than
//! `min_healthy_members`, and leave servers alone that an order works on or left broken. One is made at a time, whatever
//! order it is of, so that two do not count on each other's members.
//!
//! | step | when it fails |
//! | --- | --- |
//! | remember | nothing was changed: tried again |
//! | set, read back | tried again from the start: weights are absolute |
//! | take back | tried again, then the leaf is `failed` and the order ends so |
//! | change by hand | tried again while the pool fails, a few times; then the person is told |

use std::collections::{BTreeMap, BTreeSet};

use windlass_domain::{
    id::{OrderId, PoolId, ServerId},
    order::Purpose,
    plan::{NodeId, NodeIndex, NodeKind, Part, Plan, TrafficAction},
    plugin::{ShiftWeight, UnitState},
    progress::{NodeState, Progress, ServerWeight, TrafficChange, Undo},
    reducer::{Event, unit_state, weights_before},
    share::{self, Side},
};
use windlass_store::Txn;

use super::{
    executor::{Job, Steering},
    rows,
    traffic::set_and_read_back,
};

/// The weights of members of pools.
type Weights = BTreeMap<(PoolId, ServerId), u32>;

/// How often a change by hand is tried while a pool fails.
const EDIT_ATTEMPTS: u32 = 3;

/// What performing a shift needs to know of the progress.
pub(crate) struct View {
    /// The weights before this leaf's first attempt, once they are remembered.
    before: Option<Vec<u32>>,
    /// It is to be taken back.
    takes_back: bool,
    /// The weights before the order touched them.
    before_order: Weights,
    /// Servers of the part that the order works on, or left broken.
    out: Out,
}

/// Servers that a change of weights leaves alone.
#[derive(Default)]
struct Out {
    /// Changed, and not healthy.
    broken: BTreeSet<ServerId>,
    /// Their turn is under way.
    busy: BTreeSet<ServerId>,
    /// Released, and healthy: whatever seat is still theirs.
    released: BTreeSet<ServerId>,
}

impl Out {
    fn of(plan: &Plan, progress: &Progress, part: u32) -> Self {
        let mut out = Self::default();
        for (node, planned) in (0u32..).zip(&plan.nodes) {
            let NodeKind::Unit { unit } = planned.kind else {
                continue;
            };
            let unit = plan.units.get(unit as usize);
            let Some(unit) = unit.filter(|unit| unit.part == Some(part)) else {
                continue;
            };
            match unit_state(plan, progress, node) {
                UnitState::Failed if progress.state(node) == NodeState::Running => {
                    out.busy.insert(unit.server);
                }
                UnitState::Failed => {
                    out.broken.insert(unit.server);
                }
                UnitState::Released => {
                    out.released.insert(unit.server);
                }
                UnitState::Untouched if progress.state(node).is_busy() => {
                    out.busy.insert(unit.server);
                }
                UnitState::Untouched => {}
            }
        }
        out
    }

    fn has(&self, server: ServerId) -> bool {
        self.broken.contains(&server) || self.busy.contains(&server)
    }
}

impl View {
    pub(crate) fn of(plan: &Plan, progress: &Progress, leaf: NodeIndex, part: u32) -> Self {
        let row = progress.node(leaf);
        Self {
            before: row.shifted.clone(),
            takes_back: row.undo == Undo::Due,
            before_order: weights_before(plan, progress, 0),
            out: Out::of(plan, progress, part),
        }
    }
}

/// A shift as it stands in the plan.
pub(super) struct Leaf<'a> {
    pub(super) node: NodeIndex,
    pub(super) attempt: u32,
    pub(super) action: &'a TrafficAction,
}

/// Sets the weights of a shift, or those from before it.
pub(super) async fn perform(job: &Job, leaf: Leaf<'_>, view: &View) -> Result<(), Steering> {
    let Some((part, servers)) = leaf.action.shifts() else {
        return Ok(());
    };
    let part = &job.plan.parts[part as usize];
    let _one_at_a_time = job.engine.shared.weighing.lock().await;
    match (view.takes_back, &view.before) {
        (true, Some(before)) => take_back(job, part, &servers, before, &view.out).await,
        // Nothing was changed.
        (true, None) => Ok(()),
        (false, before) => {
            let remembered = before.is_some();
            shift(job, &leaf, (part, &servers), view, remembered).await
        }
    }
}

async fn shift(
    job: &Job,
    leaf: &Leaf<'_>,
    (part, servers): (&Part, &[ServerId]),
    view: &View,
    remembered: bool,
) -> Result<(), Steering> {
    let before_order = match &job.order.purpose {
        Purpose::Release | Purpose::Operation { .. } | Purpose::Invocation { .. } => None,
        Purpose::Rollback { of, stage, .. } => Some(before_parent(job, *of, *stage).await?),
    };
    let before_order = before_order.as_ref().unwrap_or(&view.before_order);
    let mut planned = Vec::with_capacity(part.pools.len());
    let mut seen = Vec::with_capacity(part.pools.len() * servers.len());
    for pool in &part.pools {
        let now = Members::read(job, part, *pool, &view.out).await?;
        let mut shown = BTreeMap::new();
        for server in servers {
            let weight = match now.weights.get(server) {
                Some(member) => member.weight,
                None => job.engine.shared.pools.weight(*pool, *server).await?,
            };
            shown.insert(*server, weight);
            seen.push(weight);
        }
        let wanted = wanted(leaf.action, *pool, before_order, &shown, &view.out);
        planned.push((*pool, now, wanted));
    }
    keeps_minimum(job, &planned)?;
    if !remembered {
        // Durable before the first weight changes.
        let event = Event::ShiftRemembered {
            node: leaf.node,
            attempt: leaf.attempt,
            weights: seen,
        };
        job.tell(event, Txn::new())
            .await
            .map_err(|error| Steering {
                message: error.to_string(),
                repeat: true,
            })?;
    }
    set(job, planned).await
}

/// What a shift sets in one pool: of servers that are out nothing.
fn wanted(
    action: &TrafficAction,
    pool: PoolId,
    before: &Weights,
    now: &BTreeMap<ServerId, u32>,
    out: &Out,
) -> Vec<(ServerId, u32)> {
    let before = |server: ServerId| before.get(&(pool, server)).copied();
    let mut wanted: Vec<(ServerId, u32)> = match action {
        TrafficAction::Drain { .. } | TrafficAction::Restore => Vec::new(),
        TrafficAction::Set { part: _, weights } => weights
            .iter()
            .filter_map(|(server, weight)| match weight {
                ShiftWeight::Exactly(weight) => Some((*server, *weight)),
                ShiftWeight::Remembered => Some((*server, before(*server)?)),
            })
            .collect(),
        TrafficAction::Share {
            part: _,
            servers,
            rest,
            percent,
        } => {
            let side = |side: Side, servers: &[ServerId]| {
                let mine = servers.iter().filter(|server| !out.has(**server));
                mine.map(|server| share::Member {
                    server: *server,
                    before: before(*server)
                        .or_else(|| now.get(server).copied())
                        .unwrap_or(share::MAX_WEIGHT),
                    side,
                })
                .collect::<Vec<_>>()
            };
            let mut members = side(Side::Share, servers);
            members.extend(side(Side::Rest, rest));
            share::divide(&members, *percent)
        }
    };
    wanted.retain(|(server, _)| !out.has(*server));
    wanted
}

/// Of a rollback: what the order that is rolled back, or its stage, remembered.
async fn before_parent(job: &Job, of: OrderId, stage: Option<NodeId>) -> Result<Weights, Steering> {
    let found = job.engine.progress(of).await.map_err(|error| Steering {
        message: error.to_string(),
        repeat: true,
    })?;
    Ok(found.map_or_else(Weights::new, |(_, plan, progress)| {
        let scope = stage.and_then(|stage| plan.index_of(stage)).unwrap_or(0);
        weights_before(&plan, &progress, scope)
    }))
}

/// Refuses before anything is changed what would leave a pool with too few members.
fn keeps_minimum(job: &Job, planned: &[PoolShift]) -> Result<(), Steering> {
    let minimum = job.plan.limits.min_healthy_members;
    for (pool, now, wanted) in planned {
        let serving = now.serving_with(&wanted.iter().copied().collect());
        if now.weights.len() > 1 && serving < minimum {
            return Err(Steering {
                message: format!(
                    "min_healthy_members is {minimum}, and these weights would leave the pool {pool} with {serving} \
                     healthy members with traffic: nothing was changed"
                ),
                repeat: false,
            });
        }
    }
    Ok(())
}

async fn set(job: &Job, planned: Vec<PoolShift>) -> Result<(), Steering> {
    for (pool, _, mut wanted) in planned {
        // Raise before lowering, so that the pool never has less than both states have.
        wanted.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
        for (server, weight) in wanted {
            set_and_read_back(&*job.engine.shared.pools, pool, server, weight).await?;
        }
    }
    Ok(())
}

async fn take_back(
    job: &Job,
    part: &Part,
    servers: &[ServerId],
    before: &[u32],
    out: &Out,
) -> Result<(), Steering> {
    let pools = &*job.engine.shared.pools;
    let minimum = job.plan.limits.min_healthy_members;
    let mut kept = Vec::new();
    for (pool, before) in part.pools.iter().zip(before.chunks(servers.len().max(1))) {
        let mut now = Members::read(job, part, *pool, out).await?;
        let mut wanted: Vec<(ServerId, u32)> = servers
            .iter()
            .copied()
            .zip(before.iter().copied())
            .collect();
        wanted.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
        for (server, weight) in wanted {
            let has = match now.weights.get(&server) {
                Some(member) => member.weight,
                None => pools.weight(*pool, server).await?,
            };
            let raises = weight > has;
            if weight == has || (raises && out.broken.contains(&server)) {
                continue;
            }
            let left = now.serving_with(&[(server, weight)].into());
            if !raises && now.weights.len() > 1 && left < minimum.min(now.serving()) {
                kept.push(format!("{server} in {pool} keeps {has}"));
                continue;
            }
            set_and_read_back(pools, *pool, server, weight).await?;
            if let Some(member) = now.weights.get_mut(&server) {
                member.weight = weight;
            }
        }
    }
    if kept.is_empty() {
        return Ok(());
    }
    Err(Steering {
        message: format!(
            "min_healthy_members is {minimum}, and servers that would take the traffic back were left broken, so {}: \
             mend those servers, then set the weights",
            kept.join(", ")
        ),
        repeat: false,
    })
}

// ---------------------------------------------------------------------------------------------- by hand

/// Changes traffic as a person asked; answers the order's actor.
pub(super) async fn change_by_hand(job: &Job, progress: &Progress, number: u32) {
    let Some(edit) = progress
        .node(0)
        .edit
        .as_ref()
        .filter(|edit| edit.number == number)
    else {
        return;
    };
    let mut error = None;
    for attempt in 1..=EDIT_ATTEMPTS {
        match try_change(job, progress, &edit.change).await {
            Ok(()) => {
                error = None;
                break;
            }
            Err(Steering { message, repeat }) => {
                error = Some(message);
                if !repeat || attempt == EDIT_ATTEMPTS {
                    break;
                }
                tokio::time::sleep(super::executor::AGAIN).await;
            }
        }
    }
    job.answer(Event::TrafficChanged { number, error }).await;
}

async fn try_change(
    job: &Job,
    progress: &Progress,
    change: &TrafficChange,
) -> Result<(), Steering> {
    let _one_at_a_time = job.engine.shared.weighing.lock().await;
    let before_order = weights_before(&job.plan, progress, 0);
    let mut planned = Vec::new();
    for (index, part) in (0u32..).zip(&job.plan.parts) {
        let out = Out::of(&job.plan, progress, index);
        for pool in &part.pools {
            let now = Members::read(job, part, *pool, &out).await?;
            let wanted = match change {
                TrafficChange::Weights(weights) => weights
                    .iter()
                    .filter(|asked| out.released.contains(&asked.server))
                    .map(|ServerWeight { server, weight }| (*server, *weight))
                    .collect(),
                TrafficChange::Cell { cell, percent } => {
                    let (mut servers, mut rest) = (Vec::new(), Vec::new());
                    for (server, member) in &now.weights {
                        if before_order.contains_key(&(*pool, *server)) {
                            let mine = member.cell == *cell;
                            if mine { &mut servers } else { &mut rest }.push(*server);
                        }
                    }
                    if servers.is_empty() || rest.is_empty() {
                        return Err(Steering {
                            message: format!(
                                "this order has not moved the traffic of `{}` yet, so that there is nothing that a shift to \
                                 the cell {cell} could be taken back to: nothing was changed",
                                part.key
                            ),
                            repeat: false,
                        });
                    }
                    let action = TrafficAction::Share {
                        part: index,
                        servers,
                        rest,
                        percent: *percent,
                    };
                    wanted(&action, *pool, &before_order, &BTreeMap::new(), &out)
                }
            };
            planned.push((*pool, now, wanted));
        }
    }
    keeps_minimum(job, &planned)?;
    set(job, planned).await
}

// ---------------------------------------------------------------------------------------------- members

/// A pool, its members as they are, and the weights to set.
type PoolShift = (PoolId, Members, Vec<(ServerId, u32)>);

struct Member {
    weight: u32,
    cell: String,
    /// Connected, and neither worked on nor left broken by any order.
    healthy: bool,
}

/// The members of one pool.
struct Members {
    weights: BTreeMap<ServerId, Member>,
}

impl Members {
    async fn read(job: &Job, part: &Part, pool: PoolId, out: &Out) -> Result<Self, Steering> {
        let shared = &job.engine.shared;
        let again = |message: String| Steering {
            message,
            repeat: true,
        };
        let members = shared
            .planning
            .members(part.instance)
            .await
            .map_err(again)?;
        let seats = rows::read_all(&*shared.store, &rows::unavailable_of(part.instance)).await;
        let seats = seats.map_err(|error| again(error.to_string()))?;
        let seated: BTreeSet<ServerId> = seats
            .iter()
            .filter_map(|entry| entry.key.segments().next_back()?.parse().ok())
            .collect();
        let mut weights = BTreeMap::new();
        for (server, cell) in members {
            let weight = shared.pools.weight(pool, server).await?;
            // A seat is given back a moment after its server's turn.
            let free = !seated.contains(&server) || out.released.contains(&server);
            let healthy = free && shared.agents.is_online(server) && !out.has(server);
            let member = Member {
                weight,
                cell,
                healthy,
            };
            weights.insert(server, member);
        }
        Ok(Self { weights })
    }

    /// Healthy members with traffic.
    fn serving(&self) -> u32 {
        self.serving_with(&BTreeMap::new())
    }

    /// The same, once these weights are set.
    fn serving_with(&self, changed: &BTreeMap<ServerId, u32>) -> u32 {
        let serving = self.weights.iter().filter(|(server, member)| {
            member.healthy && *changed.get(server).unwrap_or(&member.weight) > 0
        });
        u32::try_from(serving.count()).unwrap_or(u32::MAX)
    }
}
