//! The order as a whole: its rollback, that of one of its stages, the rows of a new order, and what is left to do once it has
//! ended.

use std::time::Duration;

use windlass_domain::{
    id::OrderId,
    order::{Action, Control, Ending, Order, OrderState, Purpose},
    plan::{NodeIndex, Plan},
    progress::{Progress, StageRollback},
    reducer::{self, Event},
};
use windlass_store::Txn;

use super::{AGAIN, Job, View};
use crate::{
    clock,
    engine::{ActError, NoRollback, initialise, rows, summary::Summary},
};

/// Longest wait before a rollback that could not be planned is planned again.
const PLAN_PAUSE_MAX: Duration = Duration::from_secs(15);

pub(super) async fn start_rollback(job: &Job) {
    let View::Whole(progress) = &job.view else {
        return;
    };
    let shared = &job.engine.shared;
    let reason = match &job.order.rollback_asked {
        Some(asked) if !asked.reason.is_empty() => &asked.reason,
        Some(_) | None if job.order.state_reason.is_empty() => "asked for",
        Some(_) | None => &job.order.state_reason,
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
pub(super) async fn roll_back_stage(job: &Job, node: NodeIndex) {
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
pub(crate) fn new_order_running(mut order: Order, plan: &Plan) -> (OrderId, Txn) {
    let mut progress = Progress::load(plan, Control::NotStarted, false, []);
    let at = clock::now();
    let delta = reducer::apply(plan, &mut progress, Event::Act(Action::Run), at)
        .expect("an order that nobody has run can be run");
    order.control = progress.control;
    order.state = progress.order_state();
    order.counts = progress.counts(plan);
    order.started_at = Some(at);
    let mut txn = new_order(&order, plan).put(rows::active(order.id), "");
    if let Some((key, value)) = rows::told(&order, OrderState::NotStarted, order.state, at) {
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

/// Gives locks back, tells the parent, and takes the order out of the list of unfinished ones: from then on it is never taken
/// up again.
pub(super) async fn finish(job: &Job) {
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
    if order.lock_owner == order.id {
        initialise::unlock_all(shared, order.id).await?;
    }
    shared
        .store
        .commit(Txn::new().delete(rows::active(order.id)))
        .await?;
    Ok(())
}
