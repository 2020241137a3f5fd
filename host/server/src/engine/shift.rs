//! Changes of weights that are not one server's turn: shifts that a strategy plans, their taking back, and what a person
//! changes by hand.
//!
//! Before the first weight of a shift changes, all that it changes are remembered in the leaf's row, so that after a crash,
//! or when a person ends the order, what was before is known. Taking back sets them again, for servers that this order left
//! broken only as far as it takes traffic from them. A change by hand is kept in the root's row until it is made. All raise
//! before they lower, lower nothing that would leave a pool with fewer healthy members with traffic than
//! `min_healthy_members` (the keeper decides, in turn with admissions), and leave servers alone that an order works on or
//! left broken, or has taken offline. One is made at a time, whatever order it is of. A rollback gives no traffic to a server
//! that it has not brought back: that still runs what was to go.
//!
//! | step | when it fails |
//! | --- | --- |
//! | remember | nothing was changed: tried again |
//! | set, read back | tried again from the start: weights are absolute |
//! | take back | tried again, then the leaf is `failed` and the order ends so |
//! | change by hand | tried again while the pool fails, a few times; then the person is told |

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use windlass_domain::{
    id::{OrderId, PoolId, ServerId},
    order::Purpose,
    plan::{NodeId, NodeIndex, NodeKind, Part, Plan, TrafficAction},
    plugin::{ShiftWeight, UnitState},
    progress::{NodeState, Progress, ServerWeight, TrafficChange, Undo},
    reducer::{Event, takes_offline, unit_state, weights_before},
    share::{self, Side},
};
use windlass_store::Txn;

use super::{
    executor::{Again, Job, Steering, helps},
    keeper::{Cut, PoolWeights, Reweighing, Short, Weighed},
    rows,
    traffic::set_and_read_back,
};

/// The weights of members of pools.
type Weights = BTreeMap<(PoolId, ServerId), u32>;

/// How often a change by hand is tried while a pool fails.
const EDIT_ATTEMPTS: u32 = 3;
/// How long agents that are not connected are waited for meanwhile.
const EDIT_WAITS: Duration = Duration::from_secs(8);

/// What performing a shift needs to know of the progress.
pub(crate) struct View {
    /// The weights before this leaf's first attempt, once they are remembered.
    before: Option<Vec<u32>>,
    /// It is to be taken back.
    takes_back: bool,
    /// The weights before the order touched them.
    before_order: Weights,
    /// Servers of the part that the order works on, left broken, or has taken offline.
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
    /// Their turn has stopped their application.
    offline: BTreeSet<ServerId>,
    /// Of a rollback: not brought back, so that they get no traffic.
    stale: BTreeSet<ServerId>,
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
            if plan.brings_back && unit_state(plan, progress, node) != UnitState::Released {
                out.stale.insert(unit.server);
            }
            match unit_state(plan, progress, node) {
                UnitState::Failed if progress.state(node) == NodeState::Running => {
                    out.busy.insert(unit.server);
                }
                UnitState::Failed => {
                    out.broken.insert(unit.server);
                }
                UnitState::Released if takes_offline(plan, node) => {
                    out.offline.insert(unit.server);
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
        self.busy.contains(&server) || self.is_dead(server)
    }

    /// No traffic of it would be answered.
    fn is_dead(&self, server: ServerId) -> bool {
        self.broken.contains(&server) || self.offline.contains(&server)
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
        let now = Members::read(job, part, *pool).await?;
        let mut shown = BTreeMap::new();
        for server in servers {
            let weight = match now.0.get(server) {
                Some(member) => member.weight,
                None => job.engine.shared.pools.weight(*pool, *server).await?,
            };
            shown.insert(*server, weight);
            seen.push(weight);
        }
        let mut wanted = wanted(leaf.action, *pool, before_order, &shown, &view.out);
        wanted.retain(|(server, weight)| {
            !view.out.stale.contains(server) || shown.get(server).is_some_and(|now| weight <= now)
        });
        planned.push(weights_of(part, *pool, &now, wanted, &view.out));
    }
    let allowed = allow(job, planned, Short::Refuse).await?;
    if !remembered {
        // Durable before the first weight changes.
        let event = Event::ShiftRemembered {
            node: leaf.node,
            attempt: leaf.attempt,
            weights: seen.clone(),
        };
        let kept = job.tell(event, Txn::new()).await;
        kept.map_err(|error| Steering {
            message: error.to_string(),
            again: Again::Now,
        })?;
    }
    let before = view.before.as_ref().unwrap_or(&seen);
    let members = part
        .pools
        .iter()
        .flat_map(|pool| servers.iter().map(move |server| (*pool, *server)));
    let raised = members
        .zip(before)
        .filter(|((_, server), weight)| **weight == 0 && view.out.released.contains(server))
        .map(|(member, _)| member)
        .collect();
    set(job, allowed, &raised).await
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
pub(super) async fn before_parent(
    job: &Job,
    of: OrderId,
    stage: Option<NodeId>,
) -> Result<Weights, Steering> {
    let found = job.engine.progress(of).await.map_err(|error| Steering {
        message: error.to_string(),
        again: Again::Now,
    })?;
    Ok(found.map_or_else(Weights::new, |(_, plan, progress)| {
        let scope = stage.and_then(|stage| plan.index_of(stage)).unwrap_or(0);
        weights_before(&plan, &progress, scope)
    }))
}

/// Weights that are to be set in one pool.
fn weights_of(
    part: &Part,
    pool: PoolId,
    now: &Members,
    weights: Vec<(ServerId, u32)>,
    out: &Out,
) -> PoolWeights {
    PoolWeights {
        instance: part.instance,
        pool,
        weights,
        members: now.0.keys().copied().collect(),
        released: out.released.clone(),
        out: [&out.broken, &out.busy, &out.offline]
            .into_iter()
            .flatten()
            .copied()
            .collect(),
    }
}

/// Weights that the keeper allows to be set, until this is dropped.
struct Allowed {
    pools: Vec<(PoolId, Vec<(ServerId, u32)>)>,
    _cut: Cut,
}

/// Asks the keeper; weights of servers that another order works on are left out.
async fn allow(job: &Job, pools: Vec<PoolWeights>, short: Short) -> Result<Allowed, Steering> {
    let mut orders = vec![job.order.id];
    if let Purpose::Rollback { of, .. } = &job.order.purpose {
        orders.push(*of);
    }
    let minimum = job.plan.limits.min_healthy_members;
    let mut weights: Vec<(PoolId, Vec<(ServerId, u32)>)> = pools
        .iter()
        .map(|change| (change.pool, change.weights.clone()))
        .collect();
    let later = |message: String| Steering {
        message,
        again: Again::Now,
    };
    let Some(keeper) = job.engine.shared.keeper() else {
        return Err(later("the safety envelope is not open yet".to_owned()));
    };
    let asked = Reweighing {
        orders,
        minimum,
        short,
        pools,
    };
    let answer = keeper.weigh(asked).await;
    match answer.map_err(|gone| later(gone.to_string()))? {
        Weighed::Allowed(cut) => {
            for (pool, weights) in &mut weights {
                weights.retain(|(server, _)| !cut.taken.contains(&(*pool, *server)));
            }
            Ok(Allowed {
                pools: weights,
                _cut: cut,
            })
        }
        Weighed::Unread(error) => Err(error.into()),
        Weighed::TooFew {
            pool,
            serving,
            away,
        } => {
            let missing = usize::try_from(minimum.saturating_sub(serving)).unwrap_or(usize::MAX);
            Err(Steering {
                message: format!(
                    "min_healthy_members is {minimum}, and these weights would leave the pool {pool} with {serving} \
                     healthy members with traffic ({} more are not connected): nothing was changed",
                    away.len()
                ),
                again: if away.len() >= missing {
                    Again::Connected {
                        count: missing,
                        of: away,
                    }
                } else {
                    Again::Never
                },
            })
        }
    }
}

/// Sets weights. Of those that this order has released, and that had none, the pool's own check has to find each up before
/// traffic is taken from another; whether others are up is known, and no reason to stop.
async fn set(
    job: &Job,
    allowed: Allowed,
    raised: &BTreeSet<(PoolId, ServerId)>,
) -> Result<(), Steering> {
    let pools = &*job.engine.shared.pools;
    for (pool, weights) in &allowed.pools {
        // Raise before lowering, so that the pool never has less than both states have.
        let mut weights = weights.clone();
        weights.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
        for (server, weight) in weights {
            set_and_read_back(pools, *pool, server, weight).await?;
            if weight > 0 && raised.contains(&(*pool, server)) {
                pools.comes_up(*pool, server).await?;
            }
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
    let mut kept = Vec::new();
    for (pool, before) in part.pools.iter().zip(before.chunks(servers.len().max(1))) {
        let now = Members::read(job, part, *pool).await?;
        let mut wanted = Vec::with_capacity(servers.len());
        for (server, weight) in servers.iter().zip(before) {
            let has = match now.0.get(server) {
                Some(member) => member.weight,
                None => pools.weight(*pool, *server).await?,
            };
            wanted.push((*server, *weight, has));
        }
        let stale: Vec<String> = wanted
            .iter()
            .filter(|(server, weight, has)| weight > has && out.stale.contains(server))
            .map(|(server, ..)| server.to_string())
            .collect();
        if !stale.is_empty() {
            return Err(Steering {
                message: format!(
                    "the traffic of the pool {pool} stays away from {}: what this order was to take away still runs there; \
                     bring them to another release, then set the weights",
                    stale.join(", ")
                ),
                again: Again::Never,
            });
        }
        // Raise before lowering.
        wanted.sort_by_key(|(_, weight, _)| std::cmp::Reverse(*weight));
        for (server, weight, has) in wanted {
            let raises = weight > has;
            if weight == has || (raises && out.is_dead(server)) {
                continue;
            }
            let one = weights_of(part, *pool, &now, vec![(server, weight)], out);
            match allow(job, vec![one], Short::NotShorter).await {
                Ok(allowed) => set(job, allowed, &BTreeSet::new()).await?,
                Err(Steering {
                    again: Again::Never,
                    ..
                }) => {
                    kept.push(format!("{server} in {pool} keeps {has}"));
                }
                Err(error) => return Err(error),
            }
        }
    }
    if kept.is_empty() {
        return Ok(());
    }
    Err(Steering {
        message: format!(
            "min_healthy_members is {}, and servers that would take the traffic back were left broken, so {}: mend those \
             servers, then set the weights",
            job.plan.limits.min_healthy_members,
            kept.join(", ")
        ),
        again: Again::Never,
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
    let (mut error, mut raised) = (None, BTreeSet::new());
    for attempt in 1..=EDIT_ATTEMPTS {
        match try_change(job, progress, &edit.change, &mut raised).await {
            Ok(()) => {
                error = None;
                if let TrafficChange::Weights(weights) = &edit.change {
                    decided(job, weights).await;
                }
                break;
            }
            Err(Steering { message, again }) => {
                error = Some(message);
                if attempt == EDIT_ATTEMPTS {
                    break;
                }
                // Somebody waits for the answer.
                let helps = tokio::time::timeout(EDIT_WAITS, helps(job, &again));
                if !helps.await.unwrap_or(false) {
                    break;
                }
                tokio::time::sleep(super::executor::AGAIN).await;
            }
        }
    }
    job.answer(Event::TrafficChanged { number, error }).await;
}

/// A person has decided what these servers get: none of them is owed another weight any more.
async fn decided(job: &Job, weights: &[ServerWeight]) {
    for ServerWeight { server, .. } in weights {
        let units = job.plan.units.iter().filter(|unit| unit.server == *server);
        let parts = units.filter_map(|unit| job.plan.part_of(unit));
        let pools: BTreeSet<PoolId> = parts.flat_map(|part| part.pools.iter().copied()).collect();
        let txn = pools.iter().fold(Txn::new(), |txn, pool| {
            txn.delete(rows::owed_weight(*pool, *server))
        });
        if let Err(error) = job.engine.shared.store.commit(txn).await {
            tracing::warn!(order.id = %job.order.id, server.id = %server, error = &error as &dyn std::error::Error, "a weight that a person has decided still stands as owed");
        }
    }
}

async fn try_change(
    job: &Job,
    progress: &Progress,
    change: &TrafficChange,
    raised: &mut BTreeSet<(PoolId, ServerId)>,
) -> Result<(), Steering> {
    let _one_at_a_time = job.engine.shared.weighing.lock().await;
    let before_order = weights_before(&job.plan, progress, 0);
    let mut planned = Vec::new();
    for (index, part) in (0u32..).zip(&job.plan.parts) {
        let out = Out::of(&job.plan, progress, index);
        for pool in &part.pools {
            let now = Members::read(job, part, *pool).await?;
            let mut wanted: Vec<(ServerId, u32)> = match change {
                TrafficChange::Weights(weights) => weights
                    .iter()
                    .filter(|asked| out.released.contains(&asked.server))
                    .map(|ServerWeight { server, weight }| (*server, *weight))
                    .collect(),
                TrafficChange::Cell { cell, percent } => {
                    let (mut servers, mut rest) = (Vec::new(), Vec::new());
                    for (server, member) in &now.0 {
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
                            again: Again::Never,
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
            wanted.retain(|(server, weight)| {
                let shown = now.0.get(server).map(|member| member.weight);
                !out.stale.contains(server) || shown.is_some_and(|shown| *weight <= shown)
            });
            let idle = now.0.iter().filter(|(_, member)| member.weight == 0);
            let idle = idle.filter(|(server, _)| out.released.contains(*server));
            raised.extend(idle.map(|(server, _)| (*pool, *server)));
            planned.push(weights_of(part, *pool, &now, wanted, &out));
        }
    }
    let allowed = allow(job, planned, Short::Refuse).await?;
    set(job, allowed, raised).await
}

// ---------------------------------------------------------------------------------------------- members

struct Member {
    weight: u32,
    cell: String,
}

/// The members of one pool.
struct Members(BTreeMap<ServerId, Member>);

impl Members {
    async fn read(job: &Job, part: &Part, pool: PoolId) -> Result<Self, Steering> {
        let shared = &job.engine.shared;
        let members = shared.planning.members(part.instance).await;
        let members = members.map_err(|message| Steering {
            message,
            again: Again::Now,
        })?;
        let mut found = BTreeMap::new();
        for (server, cell) in members {
            let weight = shared.pools.weight(pool, server).await?;
            found.insert(server, Member { weight, cell });
        }
        Ok(Self(found))
    }
}
