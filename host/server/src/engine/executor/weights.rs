//! Weights of a server's turn: drain, restore, and what is owed to it when its turn ends.
//!
//! Old weights are kept before new ones are set, so that doing it again after a crash does no harm.

use std::time::Duration;

use windlass_domain::{
    dispatch,
    id::{PoolId, ServerId},
    order::Purpose,
    plan::{NodeIndex, NodeKind, Plan, TrafficAction, Unit},
    plugin::{RestoreWeight, UnitState},
    progress::{NodeProgress, NodeState, PoolWeight},
    reducer::Event,
};
use windlass_store::{CommitError, Revision, Txn};

use super::{Job, View};
use crate::engine::{
    keeper::Leaving,
    rows::{self, OwedWeight, RowError},
    shift,
    traffic::{DEFAULT_WEIGHT, TrafficError, set_and_read_back},
};

/// Between two looks at something that nobody announces.
const POLL: Duration = Duration::from_millis(200);
/// In so many looks at open connections it is once looked whether they are still waited for.
const LOOKS_PER_CHECK: u32 = 5;
/// How long agents that are not connected are waited for before a change of weights counts as failed.
const BACK_WITHIN: Duration = Duration::from_secs(60);

pub(super) async fn traffic(job: &Job, node: NodeIndex, attempt: u32) {
    let event = match steer(job, node, attempt).await {
        Ok(()) => Event::TrafficDone { node, attempt },
        Err(Steering { message, again }) => Event::TrafficFailed {
            node,
            attempt,
            message,
            repeat: helps(job, &again).await,
        },
    };
    job.answer(event).await;
}

/// Why weights were not changed.
pub(in crate::engine) struct Steering {
    pub(in crate::engine) message: String,
    pub(in crate::engine) again: Again,
}

/// Whether another attempt could help.
pub(in crate::engine) enum Again {
    Never,
    Now,
    /// Once the pool can be reached.
    Reached(PoolId),
    /// Once so many of these are connected.
    Connected {
        count: usize,
        of: Vec<ServerId>,
    },
}

/// Waits until another attempt could help; says whether it does. An agent that comes back, after the platform or it was
/// started anew, is waited for: it is no reason to stop an order.
pub(in crate::engine) async fn helps(job: &Job, again: &Again) -> bool {
    let shared = &job.engine.shared;
    let came_back = async {
        loop {
            let is_back = match again {
                Again::Never => return false,
                Again::Now => true,
                Again::Reached(pool) => {
                    let seen = shared.pools.stats(*pool).await;
                    !matches!(seen, Err(TrafficError::Away { .. }))
                }
                Again::Connected { count, of } => {
                    let connected = of.iter().filter(|server| shared.agents.is_online(**server));
                    connected.count() >= *count
                }
            };
            if is_back {
                return true;
            }
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(BACK_WITHIN, came_back)
        .await
        .unwrap_or(false)
}

impl From<RowError> for Steering {
    fn from(error: RowError) -> Self {
        Self {
            message: error.to_string(),
            again: Again::Now,
        }
    }
}

impl From<TrafficError> for Steering {
    fn from(error: TrafficError) -> Self {
        Self {
            message: error.to_string(),
            again: match error {
                TrafficError::Away { pool, .. } => Again::Reached(pool),
                TrafficError::Failed { .. } | TrafficError::ReadBack { .. } => Again::Now,
            },
        }
    }
}

async fn steer(job: &Job, node: NodeIndex, attempt: u32) -> Result<(), Steering> {
    let shared = &job.engine.shared;
    let pools = &*shared.pools;
    let NodeKind::Traffic(action) = &job.plan.nodes[node as usize].kind else {
        return Ok(());
    };
    let remembered = match &job.view {
        View::Unit(Some(weights), _) => Some(weights),
        View::Unit(None, _)
        | View::Nothing
        | View::Shift(_)
        | View::Again(_)
        | View::Leaving(_)
        | View::Whole(_) => None,
    };
    match action {
        TrafficAction::Drain { deadline_ms } => {
            let Some((_, _, unit)) = dispatch::unit_of(&job.plan, node) else {
                return Ok(());
            };
            let mine = pools_of(&job.plan, unit);
            if remembered.is_none() {
                let mut weights = weights_of_parent(job, unit).await?;
                let mut debts = Vec::new();
                for pool in mine {
                    if !weights.iter().any(|known| known.pool == *pool) {
                        let (weight, is_debt) = weight_to_keep(job, *pool, unit.server).await?;
                        if is_debt {
                            debts.push(*pool);
                        }
                        weights.push(PoolWeight {
                            pool: *pool,
                            weight,
                        });
                    }
                }
                let taken = |known: &&PoolWeight| known.weight > 0 && !debts.contains(&known.pool);
                let owed = weights.iter().filter(taken);
                let owed = owed.fold(Txn::new(), |txn, known| {
                    let row = OwedWeight {
                        order: job.order.id,
                        weight: known.weight,
                    };
                    let key = rows::owed_weight(known.pool, unit.server);
                    txn.put(key, rows::encode(&row))
                });
                // Durable before the first weight changes: after a crash the old weights are known.
                let event = Event::TrafficRemembered {
                    node,
                    attempt,
                    weights,
                };
                let kept = job.tell(event, owed).await;
                kept.map_err(|error| Steering {
                    message: error.to_string(),
                    again: Again::Now,
                })?;
            }
            for pool in mine {
                set_and_read_back(pools, *pool, unit.server, 0).await?;
            }
            let drained = async {
                for look in 1_u32.. {
                    // Nobody waits for connections of a turn that was ended.
                    if look % LOOKS_PER_CHECK == 0 && is_cancelled(job, node).await {
                        break;
                    }
                    let mut open = 0;
                    for pool in mine {
                        open += pools.connections(*pool, unit.server).await?;
                    }
                    if open == 0 {
                        break;
                    }
                    tokio::time::sleep(POLL).await;
                }
                Ok::<(), TrafficError>(())
            };
            // Past the deadline the release goes on: connections that do not end must not block it for ever.
            match tokio::time::timeout(Duration::from_millis(*deadline_ms), drained).await {
                Ok(result) => Ok(result?),
                Err(_) => {
                    tracing::warn!(order.id = %job.order.id, server.id = %unit.server, "connections did not end before the drain deadline");
                    Ok(())
                }
            }
        }
        TrafficAction::Restore => {
            let Some((_, _, unit)) = dispatch::unit_of(&job.plan, node) else {
                return Ok(());
            };
            let untouched = matches!(job.view, View::Unit(Some(_), UnitState::Untouched));
            for pool in pools_of(&job.plan, unit) {
                let before = remembered
                    .and_then(|weights| weights.iter().find(|weight| weight.pool == *pool));
                let wanted = match (unit.restore, before) {
                    // Its turn was ended before anything on it changed: it goes on as it was.
                    (_, Some(before)) if untouched => {
                        weight_as_found(job, *pool, unit.server, before.weight).await?
                    }
                    (RestoreWeight::Remembered, Some(before)) => before.weight,
                    (RestoreWeight::Remembered, None) => DEFAULT_WEIGHT,
                    (RestoreWeight::KeepZero, _) => 0,
                    (RestoreWeight::Override(weight), _) => weight,
                };
                set_and_read_back(pools, *pool, unit.server, wanted).await?;
                if wanted > 0
                    && !untouched
                    && let Err(error) = pools.comes_up(*pool, unit.server).await
                {
                    // What failed gets no traffic by itself, should it come up after all.
                    set_and_read_back(pools, *pool, unit.server, 0).await?;
                    return Err(error.into());
                }
            }
            Ok(())
        }
        TrafficAction::Set { .. } | TrafficAction::Share { .. } => match &job.view {
            View::Shift(view) => {
                let leaf = shift::Leaf {
                    node,
                    attempt,
                    action,
                };
                shift::perform(job, leaf, view).await
            }
            View::Nothing | View::Unit(..) | View::Again(_) | View::Leaving(_) | View::Whole(_) => {
                Ok(())
            }
        },
    }
}

/// Whether a leaf was cancelled since its effect fell due.
async fn is_cancelled(job: &Job, node: NodeIndex) -> bool {
    let key = rows::node(job.order.id, job.plan.id_of(node));
    let row = rows::read::<NodeProgress>(&*job.engine.shared.store, &key, "a node's progress");
    matches!(row.await, Ok(Some((row, _))) if row.state == NodeState::Cancelling)
}

/// The pools that a unit's server takes traffic from.
fn pools_of<'a>(plan: &'a Plan, unit: &Unit) -> &'a [PoolId] {
    plan.part_of(unit).map_or(&[], |part| &part.pools)
}

/// The weight that a server is to get back when its turn succeeds: what its pool shows, unless that is the 0 that an order left
/// which failed. Then it is that order's debt.
async fn weight_to_keep(
    job: &Job,
    pool: PoolId,
    server: ServerId,
) -> Result<(u32, bool), Steering> {
    let shown = job.engine.shared.pools.weight(pool, server).await?;
    if shown > 0 {
        return Ok((shown, false));
    }
    let owed = owed(job, pool, server).await?;
    Ok(owed.map_or((0, false), |(owed, _)| (owed.weight, true)))
}

/// The weight of a server on which nothing was changed: what it had, and none where an order before had left it broken.
async fn weight_as_found(
    job: &Job,
    pool: PoolId,
    server: ServerId,
    before: u32,
) -> Result<u32, Steering> {
    let owed = owed(job, pool, server).await?;
    let is_debt = owed.is_some_and(|(owed, _)| owed.order != job.order.id);
    Ok(if is_debt { 0 } else { before })
}

async fn owed(
    job: &Job,
    pool: PoolId,
    server: ServerId,
) -> Result<Option<(OwedWeight, Revision)>, RowError> {
    let key = rows::owed_weight(pool, server);
    rows::read(&*job.engine.shared.store, &key, "a weight to be given back").await
}

/// A unit's turn is over: its server is owed nothing by this order any more, and by no other where it serves again. One that is
/// left as it was found is still owed what an order before took, and one that its strategy leaves at 0 what it had: the next
/// order that restores weights gives it back, unless a person has decided meanwhile.
pub(super) async fn nothing_owed(job: &Job, unit: &Unit, leaving: Leaving) -> Result<(), RowError> {
    if leaving == Leaving::Serving && unit.restore == RestoreWeight::KeepZero {
        return Ok(());
    }
    let mut txn = Txn::new();
    for pool in pools_of(&job.plan, unit) {
        if let Some((owed, revision)) = owed(job, *pool, unit.server).await?
            && (owed.order == job.order.id || matches!(leaving, Leaving::Serving))
        {
            let key = rows::owed_weight(*pool, unit.server);
            txn = txn.revision_is(key.clone(), revision).delete(key);
        }
    }
    if txn.operations().is_empty() {
        return Ok(());
    }
    match job.engine.shared.store.commit(txn).await {
        // On a conflict it was done already: a turn's end may be performed more than once, also side by side.
        Ok(_) | Err(CommitError::Conflict { .. }) => {}
        Err(error) => {
            tracing::warn!(order.id = %job.order.id, server.id = %unit.server, error = &error as &dyn std::error::Error, "a weight that was given back still stands as owed");
        }
    }
    Ok(())
}

/// Of a rollback: the weights that the order which is rolled back remembered; what the pool shows now is its 0. Of a stage's:
/// those from before the stage, which has moved traffic before it drained the server.
async fn weights_of_parent(job: &Job, unit: &Unit) -> Result<Vec<PoolWeight>, Steering> {
    let (Purpose::Rollback { of, stage, .. }, Some(drain)) = (&job.order.purpose, unit.drained_by)
    else {
        return Ok(Vec::new());
    };
    if stage.is_some() {
        let before = shift::before_parent(job, *of, *stage).await?;
        let mine = before
            .iter()
            .filter(|((_, server), _)| *server == unit.server);
        return Ok(mine
            .map(|((pool, _), weight)| PoolWeight {
                pool: *pool,
                weight: *weight,
            })
            .collect());
    }
    let key = rows::node(*of, drain);
    let row =
        rows::read::<NodeProgress>(&*job.engine.shared.store, &key, "a node's progress").await;
    Ok(row?.and_then(|(row, _)| row.remembered).unwrap_or_default())
}
