//! Shifts of traffic: the weights that a strategy sets, and their taking back.
//!
//! Before the first weight changes, all that the shift changes are remembered in the leaf's row, so that after a crash, or
//! when a person ends the order, what was before is known. Taking back sets them again, for servers that this order left
//! broken only as far as it takes traffic from them. Both raise before they lower, and lower nothing that would leave a
//! pool with fewer healthy members with traffic than `min_healthy_members`.
//!
//! | step | when it fails |
//! | --- | --- |
//! | remember | nothing was changed: tried again |
//! | set, read back | tried again from the start: weights are absolute |
//! | take back | tried again, then the leaf is `failed` and the order ends so |

use std::collections::{BTreeMap, BTreeSet};

use windlass_domain::{
    id::{PoolId, ServerId},
    plan::{NodeIndex, NodeKind, Part, Plan},
    plugin::UnitState,
    progress::{Progress, Undo},
    reducer::{Event, unit_state},
};
use windlass_store::Txn;

use super::{
    executor::{Job, Steering},
    traffic::set_and_read_back,
};

/// What performing a shift needs to know of the progress.
pub(crate) struct View {
    /// The weights before it, once they are remembered.
    before: Option<Vec<u32>>,
    /// It is to be taken back; these servers were left broken.
    take_back: Option<BTreeSet<ServerId>>,
}

impl View {
    pub(crate) fn of(plan: &Plan, progress: &Progress, leaf: NodeIndex, part: u32) -> Self {
        let row = progress.node(leaf);
        let take_back = match row.undo {
            Undo::Due => Some(broken(plan, progress, part)),
            Undo::None | Undo::Done | Undo::Failed => None,
        };
        Self {
            before: row.shifted.clone(),
            take_back,
        }
    }
}

/// The servers of a part that the order changed and did not finish.
fn broken(plan: &Plan, progress: &Progress, part: u32) -> BTreeSet<ServerId> {
    (0u32..)
        .zip(&plan.nodes)
        .filter_map(|(node, planned)| match planned.kind {
            NodeKind::Unit { unit } => Some((node, plan.units.get(unit as usize)?)),
            NodeKind::Sequence
            | NodeKind::Parallel { .. }
            | NodeKind::Step { .. }
            | NodeKind::Traffic(_)
            | NodeKind::Gate { .. }
            | NodeKind::Pause { .. }
            | NodeKind::Judge { .. } => None,
        })
        .filter(|(node, unit)| {
            unit.part == Some(part) && unit_state(plan, progress, *node) == UnitState::Failed
        })
        .map(|(_, unit)| unit.server)
        .collect()
}

/// A shift as it stands in the plan.
pub(super) struct Leaf<'a> {
    pub(super) node: NodeIndex,
    pub(super) attempt: u32,
    pub(super) part: &'a Part,
    pub(super) weights: &'a [(ServerId, u32)],
}

/// Sets the weights of a shift, or those from before it.
pub(super) async fn perform(job: &Job, leaf: Leaf<'_>, view: &View) -> Result<(), Steering> {
    match (&view.take_back, &view.before) {
        (Some(broken), Some(before)) => take_back(job, &leaf, before, broken).await,
        // Nothing was changed.
        (Some(_), None) => Ok(()),
        (None, before) => shift(job, &leaf, before.is_some()).await,
    }
}

async fn shift(job: &Job, leaf: &Leaf<'_>, remembered: bool) -> Result<(), Steering> {
    let minimum = job.plan.limits.min_healthy_members;
    let wanted: BTreeMap<ServerId, u32> = leaf.weights.iter().copied().collect();
    let nobody = BTreeSet::new();
    let mut seen = BTreeMap::new();
    for pool in &leaf.part.pools {
        let now = Members::read(job, leaf.part, *pool, &nobody).await?;
        let serving = now.serving_with(&wanted);
        if now.weights.len() > 1 && serving < minimum {
            return Err(Steering {
                message: format!(
                    "min_healthy_members is {minimum}, and these weights would leave the pool {pool} with {serving} \
                     healthy members with traffic: nothing was changed"
                ),
                repeat: false,
            });
        }
        seen.insert(*pool, now);
    }
    if !remembered {
        remember(job, leaf, &seen).await?;
    }
    for pool in &leaf.part.pools {
        // Raise before lowering, so that the pool never has less than both states have.
        let mut ordered = leaf.weights.to_vec();
        ordered.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
        for (server, weight) in ordered {
            set_and_read_back(&*job.engine.shared.pools, *pool, server, weight).await?;
        }
    }
    Ok(())
}

/// Durable before the first weight changes.
async fn remember(
    job: &Job,
    leaf: &Leaf<'_>,
    seen: &BTreeMap<PoolId, Members>,
) -> Result<(), Steering> {
    let pools = &*job.engine.shared.pools;
    let mut before = Vec::with_capacity(leaf.part.pools.len() * leaf.weights.len());
    for pool in &leaf.part.pools {
        for (server, _) in leaf.weights {
            let known = seen.get(pool).and_then(|now| now.weights.get(server));
            before.push(match known {
                Some(member) => member.weight,
                None => pools.weight(*pool, *server).await?,
            });
        }
    }
    let event = Event::ShiftRemembered {
        node: leaf.node,
        attempt: leaf.attempt,
        weights: before,
    };
    let kept = job
        .engine
        .send(job.order.id, event, String::new(), Txn::new())
        .await;
    kept.map_err(|error| Steering {
        message: error.to_string(),
        repeat: true,
    })
}

async fn take_back(
    job: &Job,
    leaf: &Leaf<'_>,
    before: &[u32],
    broken: &BTreeSet<ServerId>,
) -> Result<(), Steering> {
    let pools = &*job.engine.shared.pools;
    let minimum = job.plan.limits.min_healthy_members;
    let mut kept = Vec::new();
    for (pool, before) in leaf
        .part
        .pools
        .iter()
        .zip(before.chunks(leaf.weights.len().max(1)))
    {
        let mut now = Members::read(job, leaf.part, *pool, broken).await?;
        let mut wanted: Vec<(ServerId, u32)> = leaf
            .weights
            .iter()
            .zip(before)
            .map(|((server, _), weight)| (*server, *weight))
            .collect();
        wanted.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
        for (server, weight) in wanted {
            let has = match now.weights.get(&server) {
                Some(member) => member.weight,
                None => pools.weight(*pool, server).await?,
            };
            let raises = weight > has;
            if weight == has || (raises && broken.contains(&server)) {
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

struct Member {
    weight: u32,
    /// Connected, and not left broken.
    healthy: bool,
}

/// The members of one pool.
struct Members {
    weights: BTreeMap<ServerId, Member>,
}

impl Members {
    async fn read(
        job: &Job,
        part: &Part,
        pool: PoolId,
        broken: &BTreeSet<ServerId>,
    ) -> Result<Self, Steering> {
        let shared = &job.engine.shared;
        let members = shared
            .planning
            .members(part.instance)
            .await
            .map_err(|message| Steering {
                message,
                repeat: true,
            })?;
        let mut weights = BTreeMap::new();
        for (server, _) in members {
            let weight = shared.pools.weight(pool, server).await?;
            let healthy = shared.agents.is_online(server) && !broken.contains(&server);
            weights.insert(server, Member { weight, healthy });
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
