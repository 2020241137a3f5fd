//! The executor: performs effects and answers the order's actor.
//!
//! Every effect may be performed again after a crash or a lost answer; each here is written so that this does no harm:
//! weights are set to absolute values after the old ones were kept, admissions and locks are rows that name their order,
//! a rollback order comes into being in the commit that tells its parent. An effect that cannot be performed now is tried
//! again until it can be, or the actor ends it.
//!
//! | module | owns |
//! | --- | --- |
//! | `turn` | a server's turn: its seat, drift, tasks that were never sent |
//! | `weights` | drain and restore of a turn, and what is owed to it |
//! | `whole` | rollbacks, the rows of a new order, its end |
//!
//! Here: pauses and judgements.

mod turn;
mod weights;
mod whole;

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;
use windlass_domain::{
    dispatch,
    order::Order,
    plan::{NodeIndex, NodeKind, Plan, TrafficAction},
    plugin::{Judgement, UnitState, Verdict},
    progress::{NodeProgress, PoolWeight, Progress},
    reducer::{self, Effect, Event},
};
use windlass_store::{Txn, crash::crash_point};

pub(super) use self::weights::{Again, Steering, helps};
pub(crate) use self::{
    turn::differences,
    whole::{new_order, new_order_running},
};
use self::{
    turn::{admit, leaving, release, revoke},
    weights::traffic,
    whole::{finish, roll_back_stage, start_rollback},
};
use super::{ActError, Engine, actor::Command, figures, initialise, keeper::Leaving, rows, shift};
use crate::clock;

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
            | Effect::ChangeTraffic { .. } => Self::Whole(Box::new(progress.clone())),
            Effect::Admit(node) => Self::Again(progress.node(node).again),
            Effect::Release(node) => Self::Leaving(leaving(plan, progress, node)),
            Effect::Initialise
            | Effect::Dispatch { .. }
            | Effect::Revoke { .. }
            | Effect::Pause { .. }
            | Effect::Finish => Self::Nothing,
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
