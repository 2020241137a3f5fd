//! A server's turn: its seat in the safety envelope, taken and given back, drift before its first step, and the end of tasks
//! that were never sent.

use windlass_domain::{
    dispatch,
    inbox::InboxEntry,
    plan::{NodeIndex, Plan},
    progress::{Drift, NodeState, Progress},
    reducer::{self, Event},
    task::{Outcome, TaskResult},
};
use windlass_store::Txn;

use super::{AGAIN, Job, View, weights::nothing_owed};
use crate::{
    clock,
    engine::{
        keeper::{Admission, Answer, Leaving, Seat},
        rows,
    },
};

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
pub(super) async fn admit(job: &Job, node: NodeIndex) {
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
pub(super) fn leaving(plan: &Plan, progress: &Progress, unit: NodeIndex) -> Leaving {
    if progress.state(unit) != NodeState::Succeeded {
        Leaving::AsFound
    } else if reducer::takes_offline(plan, unit) {
        Leaving::Offline
    } else {
        Leaving::Serving
    }
}

pub(super) async fn release(job: &Job, node: NodeIndex, leaving: Leaving) {
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
pub(super) async fn revoke(job: &Job, node: NodeIndex, attempt: u32) {
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
