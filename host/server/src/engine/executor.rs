//! The executor: performs effects and answers the order's actor.
//!
//! Every effect may be performed again after a crash or a lost answer; each here is written so that this does no harm:
//! weights are set to absolute values after the old ones were kept, admissions and locks are rows that name their order,
//! a rollback order comes into being in the commit that tells its parent. An effect that cannot be performed now is tried
//! again until it can be, or the actor ends it.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;
use windlass_domain::{
    dispatch,
    id::{PoolId, ServerId},
    inbox::InboxEntry,
    order::{Action, Control, Ending, Order, OrderState, Purpose},
    plan::{NodeIndex, NodeKind, Plan, TrafficAction, Unit},
    plugin::{Judgement, RestoreWeight, UnitState, Verdict},
    progress::{Drift, NodeProgress, NodeState, PoolWeight, Progress, StageRollback},
    reducer::{self, Effect, Event},
    task::{Outcome, TaskResult},
};
use windlass_store::{CommitError, Revision, Txn, crash::crash_point};

use super::{
    ActError, Engine, NoRollback,
    actor::Command,
    figures, initialise,
    keeper::{Admission, Answer, Leaving, Seat},
    rows::{self, OwedWeight, RowError},
    shift,
    summary::Summary,
    traffic::{TrafficError, set_and_read_back},
};
use crate::clock;

/// Between two looks at something that nobody announces.
const POLL: Duration = Duration::from_millis(200);
/// How long agents that are not connected are waited for before a change of weights counts as failed.
const BACK_WITHIN: Duration = Duration::from_secs(60);
/// Longest wait before a rollback that could not be planned is planned again.
const PLAN_PAUSE_MAX: Duration = Duration::from_secs(15);
/// Before an effect that failed for reasons of the store is tried again.
pub(super) const AGAIN: Duration = Duration::from_millis(500);

/// What an effect needs to know of the progress at the time it fell due.
pub(crate) enum View {
    /// Nothing.
    Nothing,
    /// Of a server's traffic leaf: weights that were remembered in its unit, and how far that got.
    Unit(Option<Vec<PoolWeight>>, UnitState),
    /// Of a shift.
    Shift(shift::View),
    /// Of a unit: it was rolled back with its stage and runs again.
    Again(bool),
    /// Of a unit: how its turn leaves the server.
    Leaving(Leaving),
    /// Everything.
    Whole(Box<Progress>),
}

impl View {
    pub(crate) fn of(plan: &Plan, progress: &Progress, effect: Effect) -> Self {
        match effect {
            Effect::Traffic { node, .. } => match &plan.nodes[node as usize].kind {
                NodeKind::Traffic(
                    TrafficAction::Set { part, .. } | TrafficAction::Share { part, .. },
                ) => Self::Shift(shift::View::of(plan, progress, node, *part)),
                NodeKind::Traffic(TrafficAction::Drain { .. } | TrafficAction::Restore)
                | NodeKind::Sequence
                | NodeKind::Parallel { .. }
                | NodeKind::Unit { .. }
                | NodeKind::Step { .. }
                | NodeKind::Gate { .. }
                | NodeKind::Pause { .. }
                | NodeKind::Judge { .. } => {
                    let Some((unit, ..)) = dispatch::unit_of(plan, node) else {
                        return Self::Nothing;
                    };
                    let leaves = progress.children(unit).iter();
                    let mut remembered =
                        leaves.filter_map(|leaf| progress.node(*leaf).remembered.clone());
                    let state = reducer::unit_state(plan, progress, unit);
                    Self::Unit(remembered.next(), state)
                }
            },
            Effect::Judge { .. }
            | Effect::StartRollback
            | Effect::RollBackStage(_)
            | Effect::ChangeTraffic { .. }
            | Effect::Finish => Self::Whole(Box::new(progress.clone())),
            Effect::Admit(node) => Self::Again(progress.node(node).again),
            Effect::Release(node) => Self::Leaving(leaving(plan, progress, node)),
            Effect::Initialise
            | Effect::Dispatch { .. }
            | Effect::Revoke { .. }
            | Effect::Pause { .. } => Self::Nothing,
        }
    }
}

/// One effect to perform.
pub(crate) struct Job {
    pub(crate) engine: Engine,
    pub(crate) order: Order,
    pub(crate) plan: Arc<Plan>,
    pub(crate) effect: Effect,
    pub(crate) back: mpsc::Sender<Command>,
    pub(crate) view: View,
}

impl Job {
    /// Answers the order's actor. It is gone when the server shuts down: the effect is still due then.
    pub(super) async fn answer(&self, event: Event) {
        let command = Command::internal(self.named(event));
        drop(self.back.send(command).await);
    }

    /// Answers, and waits until that is durable.
    pub(super) async fn tell(&self, event: Event, with: Txn) -> Result<(), ActError> {
        let event = self.named(event);
        let told = self.engine.send(self.order.id, event, String::new(), with);
        told.await
    }

    /// The event as it is called outside of this plan: by the time of the answer the order may have another revision.
    fn named(&self, event: Event) -> Event {
        event
            .with_nodes(|node| Some(self.plan.id_of(node)))
            .expect("every node of a plan has an id")
    }
}

/// Performs an effect to its answer.
pub(crate) async fn perform(job: Job) {
    crash_point("executor.before_effect");
    match job.effect {
        Effect::Initialise => initialise::initialise(&job).await,
        Effect::Admit(node) => admit(&job, node).await,
        Effect::Release(node) => {
            if let View::Leaving(leaving) = job.view {
                release(&job, node, leaving).await;
            }
        }
        Effect::Dispatch { .. } => {}
        Effect::Revoke { node, attempt } => revoke(&job, node, attempt).await,
        Effect::Traffic { node, attempt } => traffic(&job, node, attempt).await,
        Effect::Pause { node, attempt } => pause(&job, node, attempt).await,
        Effect::Judge { node, attempt } => judge(&job, node, attempt).await,
        Effect::StartRollback => start_rollback(&job).await,
        Effect::RollBackStage(node) => roll_back_stage(&job, node).await,
        Effect::ChangeTraffic { number } => {
            if let View::Whole(progress) = &job.view {
                shift::change_by_hand(&job, progress, number).await;
            }
        }
        Effect::Finish => finish(&job).await,
    }
    crash_point("executor.after_effect");
}

// ---------------------------------------------------------------------------------------------- units

/// The seat of a unit in the safety envelope; `None`: it takes none.
fn seat(plan: &Plan, node: NodeIndex) -> Option<Seat> {
    let (node, _, unit) = dispatch::unit_of(plan, node)?;
    let part = plan.part_of(unit)?;
    if !reducer::takes_out(plan, node) {
        return None;
    }
    Some(Seat {
        instance: part.instance,
        cell: unit.cell.clone(),
        server: unit.server,
    })
}

/// Checks drift and the envelope until the unit may start, or has drifted.
async fn admit(job: &Job, node: NodeIndex) {
    let shared = &job.engine.shared;
    let Some((_, _, unit)) = dispatch::unit_of(&job.plan, node) else {
        return;
    };
    let Some(keeper) = shared.keeper() else {
        return;
    };
    let seat = seat(&job.plan, node);
    let changed = keeper.changed();
    let name = |server| {
        let planned = job.plan.units.iter().find(|unit| unit.server == server);
        planned.map_or_else(|| server.to_string(), |unit| unit.server_name.clone())
    };
    // What is installed is another installation of the same release: its stage was rolled back.
    let again = matches!(job.view, View::Again(true));
    let subjects: Vec<String> = unit
        .reads
        .iter()
        .filter(|subject| !again || !subject.starts_with("installed "))
        .cloned()
        .collect();
    let mut told = String::new();
    let asked_at = tokio::time::Instant::now();
    loop {
        let notified = changed.notified();
        let subjects = match is_seated(job, seat.as_ref()).await {
            // Admitted before a crash: its state is that we work on it.
            Ok(true) => subjects
                .iter()
                .filter(|subject| !subject.starts_with("state of "))
                .cloned()
                .collect(),
            Ok(false) => subjects.clone(),
            Err(error) => {
                hold(job, node, &mut told, error.to_string()).await;
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        match drift(job, &subjects).await {
            Ok(drift) if !drift.is_empty() => {
                return job.answer(Event::UnitDrifted(node, drift)).await;
            }
            Ok(_) => {}
            Err(reason) => {
                hold(job, node, &mut told, reason).await;
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        }
        let (Some(seat), Some(part)) = (&seat, job.plan.part_of(unit)) else {
            return job.answer(Event::UnitAdmitted(node)).await;
        };
        let members = match shared.members(part.instance).await {
            Ok(members) => members,
            Err(reason) => {
                hold(job, node, &mut told, reason).await;
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let admission = Admission {
            order: job.order.id,
            seat: seat.clone(),
            limits: job.plan.limits.clone(),
            pools: part.pools.clone(),
            members,
        };
        match keeper.admit(admission).await {
            Ok(Answer::Admitted) => return job.answer(Event::UnitAdmitted(node)).await,
            Ok(Answer::Held(held)) => {
                // One server's place is free a moment after its turn: what ends within this time is no news.
                if asked_at.elapsed() >= AGAIN {
                    hold(job, node, &mut told, held.told(job.order.id, name)).await;
                }
                // A server that comes back is not announced by the keeper.
                drop(tokio::time::timeout(AGAIN, notified).await);
            }
            Err(_) => return,
        }
    }
}

/// Whether the order has the seat already.
async fn is_seated(job: &Job, seat: Option<&Seat>) -> Result<bool, rows::RowError> {
    let Some(seat) = seat else { return Ok(false) };
    let key = rows::unavailable(seat.instance, &seat.cell, seat.server);
    let store = &*job.engine.shared.store;
    let row = rows::read::<rows::Unavailable>(store, &key, "an unavailable server").await?;
    Ok(row.is_some_and(|(row, _)| row.order == job.order.id && !row.offline))
}

/// Tells once per reason why a unit does not start.
async fn hold(job: &Job, node: NodeIndex, told: &mut String, reason: String) {
    if *told != reason {
        told.clone_from(&reason);
        job.answer(Event::UnitHeld(node, reason)).await;
    }
}

/// What differs from what was planned.
async fn drift(job: &Job, subjects: &[String]) -> Result<Vec<Drift>, String> {
    let now = job
        .engine
        .shared
        .planning
        .reread(&job.plan, subjects)
        .await?;
    Ok(differences(&job.plan, subjects, &now))
}

/// The differences between what a plan read and what is.
#[must_use]
pub(crate) fn differences(
    plan: &Plan,
    subjects: &[String],
    now: &std::collections::BTreeMap<String, windlass_domain::plan::Read>,
) -> Vec<Drift> {
    subjects
        .iter()
        .filter_map(|subject| {
            let before = plan.reads.get(subject)?;
            let after = now.get(subject);
            if after.is_some_and(|after| after.digest == before.digest) {
                return None;
            }
            let shown = after.map_or_else(|| "gone".to_owned(), |after| after.shown.clone());
            Some(Drift {
                subject: subject.clone(),
                before: before.shown.clone(),
                after: shown,
            })
        })
        .collect()
}

/// How a unit leaves its server.
fn leaving(plan: &Plan, progress: &Progress, unit: NodeIndex) -> Leaving {
    if progress.state(unit) != NodeState::Succeeded {
        Leaving::AsFound
    } else if reducer::takes_offline(plan, unit) {
        Leaving::Offline
    } else {
        Leaving::Serving
    }
}

async fn release(job: &Job, node: NodeIndex, leaving: Leaving) {
    if let Some((_, _, unit)) = dispatch::unit_of(&job.plan, node) {
        while let Err(error) = nothing_owed(job, unit, leaving).await {
            tracing::warn!(order.id = %job.order.id, error = &error as &dyn std::error::Error, "weights cannot be read");
            tokio::time::sleep(AGAIN).await;
        }
    }
    if let (Some(seat), Some(keeper)) = (seat(&job.plan, node), job.engine.shared.keeper()) {
        while keeper
            .release(job.order.id, seat.clone(), leaving)
            .await
            .is_err()
        {
            tokio::time::sleep(AGAIN).await;
        }
    }
}

/// A task that was never pushed ends here; one that was is ended by the agent.
async fn revoke(job: &Job, node: NodeIndex, attempt: u32) {
    let Some((_, unit_index, unit)) = dispatch::unit_of(&job.plan, node) else {
        return;
    };
    let store = &*job.engine.shared.store;
    let key = rows::slot(unit.server, job.order.id, unit_index);
    let slot = match rows::read::<InboxEntry>(store, &key, "an inbox entry").await {
        Ok(slot) => slot,
        Err(error) => {
            tracing::error!(order.id = %job.order.id, error = &error as &dyn std::error::Error, "a task to be ended could not be read");
            return;
        }
    };
    let Some((entry, revision)) = slot else {
        return;
    };
    if entry.epoch.is_some() {
        return;
    }
    let take = Txn::new().revision_is(key.clone(), revision).delete(key);
    if store.commit(take).await.is_ok() {
        let result = TaskResult {
            outcome: Outcome::Revoked,
            exit_code: None,
            output: String::new(),
            dropped_bytes: 0,
            message: "ended before it was sent to the server".to_owned(),
            fault: None,
            started_at: None,
            finished_at: clock::now(),
        };
        job.answer(Event::StepFinished {
            node,
            attempt,
            result: Box::new(result),
        })
        .await;
    }
}

// ---------------------------------------------------------------------------------------------- traffic

async fn traffic(job: &Job, node: NodeIndex, attempt: u32) {
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
pub(super) struct Steering {
    pub(super) message: String,
    pub(super) again: Again,
}

/// Whether another attempt could help.
pub(super) enum Again {
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
pub(super) async fn helps(job: &Job, again: &Again) -> bool {
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
                loop {
                    let mut open = 0;
                    for pool in mine {
                        open += pools.connections(*pool, unit.server).await?;
                    }
                    if open == 0 {
                        return Ok::<(), TrafficError>(());
                    }
                    tokio::time::sleep(POLL).await;
                }
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
                    (RestoreWeight::Remembered, None) => super::traffic::DEFAULT_WEIGHT,
                    (RestoreWeight::KeepZero, _) => 0,
                    (RestoreWeight::Override(weight), _) => weight,
                };
                set_and_read_back(pools, *pool, unit.server, wanted).await?;
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
/// left as it was found is still owed what an order before took.
async fn nothing_owed(job: &Job, unit: &Unit, leaving: Leaving) -> Result<(), RowError> {
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

/// Of a rollback: the weights that the order which is rolled back remembered; what the pool shows now is its 0.
async fn weights_of_parent(job: &Job, unit: &Unit) -> Result<Vec<PoolWeight>, Steering> {
    let (Purpose::Rollback { of, .. }, Some(drain)) = (&job.order.purpose, unit.drained_by) else {
        return Ok(Vec::new());
    };
    let key = rows::node(*of, drain);
    let row =
        rows::read::<NodeProgress>(&*job.engine.shared.store, &key, "a node's progress").await;
    Ok(row?.and_then(|(row, _)| row.remembered).unwrap_or_default())
}

// ---------------------------------------------------------------------------------------------- waiting and judging

async fn pause(job: &Job, node: NodeIndex, attempt: u32) {
    let NodeKind::Pause { duration_ms } = job.plan.nodes[node as usize].kind else {
        return;
    };
    let key = rows::node(job.order.id, job.plan.id_of(node));
    let row =
        rows::read::<NodeProgress>(&*job.engine.shared.store, &key, "a node's progress").await;
    let started = match row {
        Ok(row) => row.and_then(|(row, _)| row.started_at),
        Err(error) => {
            tracing::error!(order.id = %job.order.id, error = &error as &dyn std::error::Error, "a pause could not be read; it starts again");
            None
        }
    };
    let now = clock::now();
    let until = started.unwrap_or(now).plus_ms(duration_ms);
    tokio::time::sleep(Duration::from_millis(until.since_ms(now))).await;
    job.answer(Event::PauseElapsed { node, attempt }).await;
}

async fn judge(job: &Job, node: NodeIndex, attempt: u32) {
    let (NodeKind::Judge { stage, window_ms }, View::Whole(progress)) =
        (&job.plan.nodes[node as usize].kind, &job.view)
    else {
        return;
    };
    let mut extended = progress.node(node).extended;
    loop {
        let judgement = match figures::collect(job, (node, attempt), *window_ms, extended).await {
            Ok(figures) => {
                let planning = &job.engine.shared.planning;
                planning
                    .judge(&job.order, &job.plan, progress, stage, figures)
                    .await
            }
            Err(message) => Err(message),
        };
        let judgement = judgement.map(|judgement| match judgement.verdict {
            // There is nothing to wait for.
            Verdict::Extend if *window_ms == 0 => Judgement {
                verdict: Verdict::Hold,
                ..judgement
            },
            Verdict::Extend | Verdict::GoOn | Verdict::Hold | Verdict::RollBack => judgement,
        });
        let extends = judgement
            .as_ref()
            .is_ok_and(|judgement| judgement.verdict == Verdict::Extend);
        let event = Event::Judged {
            node,
            attempt,
            judgement,
        };
        if !extends {
            return job.answer(event).await;
        }
        // Durable before the next window: it is not collected twice after a crash.
        if job.tell(event, Txn::new()).await.is_err() {
            return;
        }
        extended += 1;
    }
}

// ---------------------------------------------------------------------------------------------- the order as a whole

async fn start_rollback(job: &Job) {
    let View::Whole(progress) = &job.view else {
        return;
    };
    let shared = &job.engine.shared;
    let reason = if job.order.state_reason.is_empty() {
        "asked for"
    } else {
        &job.order.state_reason
    };
    let plan = || {
        shared
            .planning
            .plan_rollback(&job.order, &job.plan, progress, reason)
    };
    let planned = match planned(job, plan).await {
        Ok(planned) => planned,
        // Why it was to be rolled back is not forgotten over it.
        Err(why) => {
            let why = format!("{reason}; it could not be rolled back: {why}");
            return job.answer(Event::RollbackImpossible(why)).await;
        }
    };
    let (id, with) = new_order_running(planned.order, &planned.plan);
    // The rollback order comes into being in the commit that tells its parent.
    match job.tell(Event::RollbackStarted(id), with).await {
        Ok(()) => drop(job.engine.take_up(id)),
        Err(error) => {
            tracing::info!(order.id = %job.order.id, error = &error as &dyn std::error::Error, "the rollback order was not made now")
        }
    }
}

/// Plans until there is a plan, or nothing to plan: what passes gives no rollback up.
async fn planned<T, F>(job: &Job, plan: impl Fn() -> F) -> Result<T, NoRollback>
where
    F: Future<Output = Result<T, NoRollback>>,
{
    let mut pause = AGAIN;
    loop {
        match plan().await {
            Err(NoRollback::NotNow(reason)) => {
                tracing::warn!(order.id = %job.order.id, reason, "a rollback cannot be planned now; it is tried again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PLAN_PAUSE_MAX);
            }
            other => return other,
        }
    }
}

/// Makes the rollback order of a stage whose traffic is taken back; where nothing was released in it, it is done.
async fn roll_back_stage(job: &Job, node: NodeIndex) {
    let View::Whole(progress) = &job.view else {
        return;
    };
    let Some(StageRollback::Due { reason }) = &progress.node(node).rollback else {
        return;
    };
    let plan = || {
        let planning = &job.engine.shared.planning;
        planning.plan_stage_rollback(&job.order, &job.plan, progress, (node, reason))
    };
    let planned = match planned(job, plan).await {
        Ok(Some(planned)) => planned,
        Ok(None) => {
            let now = StageRollback::Done;
            return job.answer(Event::StageRollback { node, now }).await;
        }
        Err(why) => {
            let message = why.to_string();
            let now = StageRollback::Failed { message };
            return job.answer(Event::StageRollback { node, now }).await;
        }
    };
    let (order, with) = new_order_running(planned.order, &planned.plan);
    let now = StageRollback::Running { order };
    let event = Event::StageRollback { node, now };
    match job.tell(event, with).await {
        Ok(()) => drop(job.engine.take_up(order)),
        Err(error) => {
            tracing::info!(order.id = %job.order.id, error = &error as &dyn std::error::Error, "the rollback order of a stage was not made now")
        }
    }
}

/// The rows of an order that runs from the start.
pub(crate) fn new_order_running(
    mut order: Order,
    plan: &Plan,
) -> (windlass_domain::id::OrderId, Txn) {
    let mut progress = Progress::load(plan, Control::NotStarted, false, []);
    let at = clock::now();
    let delta = reducer::apply(plan, &mut progress, Event::Act(Action::Run), at)
        .expect("an order that nobody has run can be run");
    order.control = progress.control;
    order.state = progress.order_state();
    order.counts = progress.counts(plan);
    order.started_at = Some(at);
    let mut txn = new_order(&order, plan).put(rows::active(order.id), "");
    if let Some((key, value)) = rows::told(&order, OrderState::NotStarted, at) {
        txn = txn.put(key, value);
    }
    for node in delta.rows {
        txn = txn.put(
            rows::node(order.id, plan.id_of(node)),
            rows::encode_node(progress.node(node)),
        );
    }
    (order.id, txn)
}

/// The rows of a new order.
pub(crate) fn new_order(order: &Order, plan: &Plan) -> Txn {
    Txn::new()
        .absent(rows::order(order.id))
        .put(rows::order(order.id), rows::encode(order))
        .put(rows::listed(order), Summary::of(order, plan).encode())
}

/// Gives locks back, tells the parent, and takes the order out of the list of unfinished ones.
async fn finish(job: &Job) {
    loop {
        match try_finish(job).await {
            Ok(()) => return,
            Err(error) => {
                tracing::warn!(order.id = %job.order.id, error = &*error, "an order could not be finished yet");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn try_finish(job: &Job) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let shared = &job.engine.shared;
    let order = &job.order;
    if let Purpose::Rollback { of, stage, .. } = &order.purpose {
        let ending = match order.control {
            Control::Ended(ending) => ending,
            Control::NotStarted
            | Control::Initialising
            | Control::Active
            | Control::Cancelling
            | Control::EndingForRollback
            | Control::RollingBack => Ending::Failed,
        };
        let told = match stage {
            None => Event::RollbackEnded { ending },
            Some(node) => Event::StageRollback {
                node: *node,
                now: match ending {
                    Ending::Succeeded => StageRollback::Done,
                    Ending::Failed | Ending::Cancelled | Ending::RolledBack => {
                        StageRollback::Failed {
                            message: format!("the rollback order {} did not succeed", order.id),
                        }
                    }
                },
            },
        };
        match job.engine.send(*of, told, String::new(), Txn::new()).await {
            // Told already, or rolled back after it had ended.
            Ok(()) | Err(ActError::Refused(_) | ActError::NoSuchOrder(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if order.control == Control::Ended(Ending::Succeeded) && !order.tech_stacks.is_empty() {
        shared.planning.keep_tech_stacks(order).await?;
    }
    // Without its active row the order is never taken up again: every seat has to be given back before.
    if let View::Whole(progress) = &job.view {
        for effect in reducer::due(&job.plan, progress) {
            if let Effect::Release(node) = effect {
                release(job, node, leaving(&job.plan, progress, node)).await;
            }
        }
    }
    if order.lock_owner == order.id {
        initialise::unlock_all(shared, order.id).await?;
    }
    shared
        .store
        .commit(Txn::new().delete(rows::active(order.id)))
        .await?;
    Ok(())
}
