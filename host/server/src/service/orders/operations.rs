//! Operations on applications: preview and create. What they become are orders like others: the same actions, events, logs.
//!
//! An operation cannot be rolled back: it keeps no state to go back to. What undoes it is another operation, or a release.

use serde::Serialize;
use windlass_domain::{
    Digest,
    id::OrderId,
    operation::{Operation, OperationSpec},
    order::{Action, Order, Purpose},
    plan::{LeftOut, Plan},
    progress::Drift,
};
use windlass_runtime::for_order;

use super::{NewOrder, Orders, PlanView, check_title};
use crate::{
    ids,
    service::{Caller, ServiceError},
};

/// An operation to be made. JSON: the fields of the operation, and beside them `plan_digest` and `run`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct CreateOperation {
    /// What to do, to what.
    #[serde(flatten)]
    pub operation: OperationSpec,
    /// The digest that a preview gave: run exactly that plan, or be refused with what has changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan_digest: Option<Digest>,
    /// Run it at once. Default false.
    #[serde(default)]
    pub run: bool,
}

impl Orders {
    /// Makes the complete plan of an operation without doing anything. It is kept for a day.
    ///
    /// # Errors
    /// [`ServiceError`]; `no_server_qualifies` with the reasons.
    pub async fn preview_operation(
        &self,
        workspace: &str,
        spec: &OperationSpec,
    ) -> Result<PlanView, ServiceError> {
        check_title(&spec.title)?;
        let plan = self.planner.plan_operation(workspace, spec).await?;
        let plan_digest = self.keep(&plan).await?;
        Ok(PlanView {
            plan_digest,
            server_count: plan.units.len(),
            plan,
        })
    }

    /// Makes the order of an operation.
    ///
    /// # Errors
    /// [`ServiceError`]; `no_server_qualifies`; `plan_drifted` when `plan_digest` names a plan that would be another one today.
    pub async fn create_operation(
        &self,
        caller: Caller,
        workspace: &str,
        create: CreateOperation,
    ) -> Result<Order, ServiceError> {
        let CreateOperation {
            operation: asked,
            plan_digest,
            run,
        } = create;
        check_title(&asked.title)?;
        let id = OrderId::from_uuid(ids::new_uuid());
        let planned = self.planner.plan_operation(workspace, &asked);
        let plan = for_order(id.to_string(), planned).await?;
        let spec = self.keep_spec(&asked).await?;
        let new = NewOrder {
            id,
            title: asked.title,
            purpose: Purpose::Operation {
                operation: asked.operation,
            },
            plan,
            plan_digest,
            spec,
            run,
            notify: asked.notifications,
            packages: std::collections::BTreeSet::new(),
            tech_stacks: Vec::new(),
        };
        self.make(caller, workspace, new).await
    }
}

/// Refuses the actions that an operation does not know.
///
/// # Errors
/// `operation_not_rolled_back`, with what undoes it.
pub(super) fn check_action(order: &Order, action: &Action) -> Result<(), ServiceError> {
    let Purpose::Operation { operation } = &order.purpose else {
        return Ok(());
    };
    match action {
        Action::RollBack { .. } | Action::RollBackStage { .. } => Err(ServiceError::conflict(
            "operation_not_rolled_back",
            format!(
                "the order is the operation {}, and operations are not rolled back: they leave the release as it is",
                operation.name()
            ),
            match operation {
                Operation::Restart => "cancel the order, or restart again",
                Operation::Online { .. } => "cancel the order, and take the servers offline",
                Operation::Offline => "cancel the order, and bring the servers online",
                Operation::StaticFiles(_) => "cancel the order, and place the earlier files",
                Operation::Initialise => "cancel the order, or initialise again",
            },
        )),
        Action::Run
        | Action::RunNode { .. }
        | Action::Confirm { .. }
        | Action::Retry { .. }
        | Action::Ignore { .. }
        | Action::Cancel { .. }
        | Action::Lock { .. }
        | Action::Unlock { .. }
        | Action::RunAgain { .. }
        | Action::GoOn { .. }
        | Action::SetWeights { .. }
        | Action::ShiftCell { .. } => Ok(()),
    }
}

/// Servers that were left out in one plan and not in the other, or for another reason.
pub(super) fn taking_part_changed(before: &Plan, now: &Plan) -> Vec<Drift> {
    let shown = |plan: &Plan, out: &LeftOut| {
        let same =
            |other: &&LeftOut| other.server == out.server && other.application == out.application;
        let left_out = plan.left_out.iter().find(same);
        left_out.map_or_else(
            || "takes part, or is not named".to_owned(),
            |out| format!("is left out: {}", out.reason),
        )
    };
    let mut changed: Vec<Drift> = Vec::new();
    for out in before.left_out.iter().chain(&now.left_out) {
        let drift = Drift {
            subject: format!("server {} of {}", out.server_name, out.application),
            before: shown(before, out),
            after: shown(now, out),
        };
        if drift.before != drift.after && !changed.contains(&drift) {
            changed.push(drift);
        }
    }
    changed
}
