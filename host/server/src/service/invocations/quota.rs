//! The daily quota of invocations. Source: spec "Commands".
//!
//! The count of a workspace is one row. It rises in the commit that makes the invocation, on the condition that nobody raised it
//! since it was read: cut off anywhere, an invocation is made and counted, or neither.

use windlass_domain::{
    invocation::quota::{DailyCount, InvocationQuota},
    order::Order,
    plan::Plan,
    workspace::Workspace,
};
use windlass_store::{CommitError, Txn};

use super::{Invocations, records};
use crate::{
    clock, keys,
    service::{ServiceError, orders::not_committed},
};

/// Commits that are tried where other servers count at the same time.
const TRIES: u32 = 16;

impl Invocations {
    /// What a workspace may still invoke today.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] of the workspace.
    pub async fn quota(&self, ws: &str) -> Result<InvocationQuota, ServiceError> {
        records::get::<Workspace>(&*self.parts.engine.shared.store, ws).await?;
        let (count, _) = self.count(ws).await?;
        Ok(count.against(self.parts.per_day))
    }

    /// The count of now, and the condition that it is still this.
    async fn count(&self, ws: &str) -> Result<(DailyCount, Txn), ServiceError> {
        let key = keys::invocation_count(ws);
        let (count, unchanged) = match self.parts.engine.shared.store.get(&key).await? {
            Some(row) => (
                records::decode_plain(&row, "a count of invocations")?,
                Txn::new().revision_is(key, row.revision),
            ),
            None => (DailyCount::default(), Txn::new().absent(key)),
        };
        Ok((count.at(clock::now()), unchanged))
    }

    /// Refuses what the quota has no room for, before anything is done for it.
    pub(super) async fn has_room(&self, ws: &str) -> Result<(), ServiceError> {
        let (count, _) = self.count(ws).await?;
        self.one_more(ws, count).map(|_| ())
    }

    fn one_more(&self, ws: &str, count: DailyCount) -> Result<DailyCount, ServiceError> {
        let limit = self.parts.per_day;
        count.one_more(limit).ok_or_else(|| {
            let InvocationQuota { used, resets_at, .. } = count.against(limit);
            ServiceError::Exhausted {
                code: "invocation_quota_reached",
                message: format!(
                    "the workspace `{ws}` has made {used} invocations today, and may make {limit} a day; the count begins again at \
                     {resets_at}"
                ),
                limit: limit.into(),
                current: used.into(),
                mend: "wait until then, name more servers in one invocation, or have the platform's operator raise \
                       `--invocations-per-day`"
                    .to_owned(),
                // Not a moment too early.
                renews_in_s: resets_at.since_ms(clock::now()).div_ceil(1000),
            }
        })
    }

    /// Makes an invocation that runs from the start, and counts it, with one commit.
    pub(super) async fn create_counted(
        &self,
        order: Order,
        plan: &Plan,
        with: Txn,
    ) -> Result<(), ServiceError> {
        let engine = &self.parts.engine;
        let key = keys::invocation_count(&order.workspace);
        // Of this server one after the other, so that only other servers can come between.
        let _turn = self.counting.lock().await;
        for _ in 0..TRIES {
            let (count, unchanged) = self.count(&order.workspace).await?;
            let count = self.one_more(&order.workspace, count)?;
            let counted = unchanged.put(key.clone(), records::encode(&count));
            let made = engine
                .create_running(order.clone(), plan, with.clone().and(counted))
                .await;
            match made {
                Ok(()) => return Ok(()),
                Err(CommitError::Conflict { key: at, .. }) if at == key => {}
                Err(error) => return Err(not_committed(error)),
            }
        }
        Err(ServiceError::Unavailable {
            message: format!(
                "the invocations of the workspace `{}` are being counted by others at the same time; try again",
                order.workspace
            ),
        })
    }
}
