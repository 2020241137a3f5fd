//! Revisions of an order's plan: what people change while it waits or runs.
//!
//! The planner gathers what an edit takes (a new grouping is planned like any release), the engine makes the revision. An
//! edit is made for the revision that was looked at; when another was made meanwhile, it is refused, or made again for that
//! one where the caller did not say which one was meant.

use serde::{Deserialize, Serialize};
use windlass_domain::{
    id::OrderId,
    order::{Order, PlanRevision},
    plan::Plan,
    reducer::Refused,
    revise::{BadEdit, PlanEdit, Revised, expect_revisable, revise},
};

use super::{Orders, PlanView, failed, refused, shown};
use crate::{
    engine::{self, ActError, rows},
    service::{Caller, ServiceError},
};

/// How often an edit that names no revision is made again when others were faster.
const ATTEMPTS: usize = 3;

/// A revision as it would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RevisionView {
    /// The number that it would have.
    pub revision: u32,
    /// What differs, for people.
    pub difference: String,
    /// The plan.
    #[serde(flatten)]
    pub plan: PlanView,
}

impl Orders {
    /// Changes the plan of an order; answers its header after it. `of`: the revision that was looked at.
    ///
    /// # Errors
    /// [`ServiceError::Changed`] when another revision than `of` runs; the rule that the edit breaks.
    pub async fn revise(
        &self,
        caller: Caller,
        workspace: &str,
        id: OrderId,
        of: Option<u32>,
        edit: PlanEdit,
    ) -> Result<Order, ServiceError> {
        let mut attempts = 1..=ATTEMPTS;
        loop {
            let (order, plan, progress) = self.revisable(workspace, id, of).await?;
            let made = self.planner.edit(&order, &plan, &progress, edit.clone());
            let made = windlass_runtime::for_order(id.to_string(), made).await?;
            let with = caller.answered(shown(&order));
            let of_now = order.revision();
            let revised = self.engine.revise(id, (of_now, made), &caller.name, with);
            attempts.next();
            match revised.await {
                Ok(()) => return Ok(self.get(workspace, id).await?.0),
                Err(ActError::Revised { .. }) if of.is_none() && !attempts.is_empty() => {}
                Err(error) => return Err(refused(error)),
            }
        }
    }

    /// What a change of the plan would come to. Nothing is done.
    ///
    /// # Errors
    /// As [`Orders::revise`].
    pub async fn preview_revision(
        &self,
        workspace: &str,
        id: OrderId,
        of: Option<u32>,
        edit: PlanEdit,
    ) -> Result<RevisionView, ServiceError> {
        let (order, plan, progress) = self.revisable(workspace, id, of).await?;
        let edit = self.planner.edit(&order, &plan, &progress, edit).await?;
        let revised = tokio::task::spawn_blocking(move || {
            let revised = revise(&plan, &progress, &edit)?;
            let digest = revised.plan.digest();
            Ok::<_, BadEdit>((revised, digest))
        });
        let revised = revised
            .await
            .map_err(|error| failed("change the plan", error))?;
        let (Revised { plan, difference }, plan_digest) = revised.map_err(|bad| bad_edit(&bad))?;
        Ok(RevisionView {
            revision: order.revision().saturating_add(1),
            difference,
            plan: PlanView {
                plan_digest,
                server_count: plan.placed().len(),
                plan,
            },
        })
    }

    /// Every revision of an order's plan, the first one first.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn revisions(
        &self,
        workspace: &str,
        id: OrderId,
    ) -> Result<Vec<PlanRevision>, ServiceError> {
        let (order, _) = self.get(workspace, id).await?;
        rows::read_revisions(&*self.engine.shared.store, &order)
            .await
            .map_err(|error| failed("read the plan's revisions", error))
    }

    /// The plan of an earlier revision.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] of the order or the revision.
    pub async fn plan_of_revision(
        &self,
        workspace: &str,
        id: OrderId,
        revision: u32,
    ) -> Result<PlanView, ServiceError> {
        let revisions = self.revisions(workspace, id).await?;
        let found = revisions.iter().find(|known| known.revision == revision);
        let Some(found) = found else {
            return Err(ServiceError::not_found("revision of this order", revision));
        };
        let plan = engine::load_plan(&self.engine.shared.blobs, found.digest)
            .await
            .map_err(|error| failed("read the plan", error))?;
        Ok(PlanView {
            plan_digest: found.digest,
            server_count: plan.placed().len(),
            plan,
        })
    }

    /// An order whose plan is the one that the caller looked at, and can be changed.
    async fn revisable(
        &self,
        workspace: &str,
        id: OrderId,
        of: Option<u32>,
    ) -> Result<
        (
            Order,
            std::sync::Arc<Plan>,
            windlass_domain::progress::Progress,
        ),
        ServiceError,
    > {
        let found = self.progress(workspace, id).await?;
        let now = found.0.revision();
        if of.is_some_and(|of| of != now) {
            return Err(ServiceError::Changed {
                what: "plan of this order",
                current: u64::from(now),
            });
        }
        let (order, plan, progress) = &found;
        if order.state.is_terminal() {
            return Err(refused(Refused::Terminal.into()));
        }
        expect_revisable(plan, progress).map_err(|error| refused(error.into()))?;
        Ok(found)
    }
}

/// Why an edit is refused, in the words of services.
pub(in crate::service) fn bad_edit(bad: &BadEdit) -> ServiceError {
    let message = bad.to_string();
    let conflict = |code, mend: &str| ServiceError::conflict(code, message.clone(), mend);
    let invalid =
        |code, field: &str, mend: &str| ServiceError::invalid(code, field, message.clone(), mend);
    match bad {
        BadEdit::NoSuchNode { node } => ServiceError::not_found("node of this order", node),
        BadEdit::NotAGroup { .. } => conflict("wrong_level", "name a group"),
        BadEdit::Started { .. } | BadEdit::ServerStarted { .. } => conflict(
            "has_started",
            "choose what has not started, or cancel or roll back what has",
        ),
        BadEdit::BehindUnstarted { .. } => {
            conflict("has_started", "put it in front of what has not started")
        }
        BadEdit::GroupOver { .. } => conflict("group_over", "choose a group that is not done"),
        BadEdit::NotInApplication { .. } => invalid(
            "not_in_application",
            "/servers",
            "name servers that stand in a group of the application; group it anew to assign others",
        ),
        BadEdit::ServerTwice { .. } => invalid("server_twice", "/servers", "name each server once"),
        BadEdit::NoServers => invalid("no_servers", "/servers", "name the servers to move"),
        BadEdit::AlreadyThere { .. } => invalid(
            "already_there",
            "/servers",
            "leave it out, or choose another group",
        ),
        BadEdit::NoSuchApplication { .. } => invalid(
            "no_such_application",
            "/application",
            "name an application of this order",
        ),
        BadEdit::NotOneApplication { .. } => conflict(
            "plan_has_own_shape",
            "leave the sequence and grouping to the strategy, or make a new order with another one",
        ),
        BadEdit::NothingLeft => conflict("nothing_left", "cancel the order instead"),
        BadEdit::NothingToSync { .. } => {
            conflict("nothing_to_sync", "bind or unbind servers first")
        }
        BadEdit::NothingToRegroup { .. } => conflict("nothing_to_regroup", "wait for its end"),
        BadEdit::Drifted { .. } => conflict("plan_drifted", "make a new order"),
        BadEdit::ForeignJudge { .. } => conflict(
            "foreign_judge",
            "choose a strategy that does not judge, or the order's own",
        ),
        BadEdit::ForeignTraffic { .. } => conflict(
            "foreign_traffic",
            "choose a strategy that moves no traffic by itself, or the order's own",
        ),
        BadEdit::TrafficMoves { .. } => conflict(
            "traffic_moves",
            "wait until the traffic was moved, or make a new order",
        ),
        BadEdit::TrafficMoved { .. } => conflict("traffic_moved", "make a new order"),
        BadEdit::SequenceMisses { .. } | BadEdit::SequenceTwice { .. } | BadEdit::SequenceEmpty => {
            invalid(
                "sequence_invalid",
                "/lanes",
                "name each application of the order once, in lanes of stages",
            )
        }
        BadEdit::BreaksDependency { .. } => invalid(
            "breaks_dependency",
            "/lanes",
            "keep what depends on each other in one lane, in the order of the dependencies",
        ),
        BadEdit::TooLarge { nodes, limit } => ServiceError::Limit {
            code: "plan_too_large",
            field: "/edit".to_owned(),
            message,
            limit: *limit as u64,
            current: *nodes as u64,
            mend: "make a new order for some of the servers".to_owned(),
        },
    }
}
