//! A change of the plan while its order waits or runs.
//!
//! The new plan's blob is written first; one commit then names it in the header, with the event and what may start or is over
//! because of it. A crash before that commit leaves a blob that nothing refers to, one behind it an order with the new plan:
//! rows, slots and tasks under way name nodes by their ids, so nothing else has to change. Locks of servers that come in are
//! taken before, and those of servers that went are given back behind; what a crash leaves locked is given back when the
//! order ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use tokio::sync::oneshot;
use windlass_domain::{
    Digest,
    id::ServerId,
    order::{Action, Control, Happened, Order, PlanRevision},
    plan::{NodeIndex, Plan},
    reducer::{self, Event},
    revise::{Edit, Revised, expect_revisable, is_touched, revise},
};
use windlass_store::{Txn, crash::crash_point};

use super::{Actor, Batch, Stopped};
use crate::{
    clock,
    engine::{ActError, initialise, rows, store_json},
};

/// Groups that one revision locks because others hold their servers: it is one commit.
const MAX_LOCKED: usize = 50;

/// A change of the plan that a person asks for.
pub(crate) struct Revise {
    /// The change.
    pub(crate) edit: Edit,
    /// The revision that it was made for.
    pub(crate) of: u32,
    pub(crate) by: String,
    /// Committed together with it.
    pub(crate) with: Txn,
    pub(crate) reply: oneshot::Sender<Result<(), ActError>>,
}

impl Actor {
    /// Makes a new revision, or refuses to. Says whether the reducer has more to do.
    pub(super) async fn revise(&mut self, asked: Revise) -> Result<bool, Stopped> {
        let Revise {
            edit,
            of,
            by,
            with,
            reply,
        } = asked;
        let groups_anew = matches!(edit, Edit::Regroup(_));
        let made = match self.draft(edit, of).await {
            Ok((revised, digest)) => {
                let locked = self.lock_servers_of(&revised.plan).await;
                locked.map(|mut locked| {
                    if groups_anew {
                        locked.extend(self.locks_kept(&revised.plan, &locked));
                    }
                    (revised, digest, locked)
                })
            }
            Err(refused) => Err(refused),
        };
        let (Revised { plan, difference }, digest, locked) = match made {
            Ok(made) => made,
            Err(refused) => {
                // Whoever asked may be gone.
                drop(reply.send(Err(refused)));
                return Ok(false);
            }
        };
        crash_point("engine.plan_kept");
        let at = clock::now();
        let before = placed_servers(&self.plan);
        self.progress = self.progress.carried(&self.plan, &plan);
        self.indices = plan.indices();
        self.plan = Arc::new(plan);
        self.watch_deadlines();
        let mut batch = Batch {
            header: true,
            more: true,
            ..Batch::default()
        };
        let revision = PlanRevision {
            revision: self.order.revision().saturating_add(1),
            digest,
            author: by.clone(),
            at,
            difference: difference.clone(),
        };
        self.note(
            &mut batch,
            at,
            &by,
            Happened::Revised {
                revision: revision.revision,
                plan: digest,
                difference,
            },
        );
        self.keep(&mut batch, revision);
        for (node, reason) in locked {
            let lock = Event::Act(Action::Lock { node, reason });
            // A group that is done needs no lock.
            if let Ok(delta) = reducer::apply(&self.plan, &mut self.progress, lock, at) {
                batch.nodes.extend(&delta.rows);
                for (node, state) in &delta.states {
                    self.note_node(&mut batch, at, *node, *state);
                }
                for effect in delta.effects {
                    self.fall_due(&mut batch, effect, at);
                }
            }
        }
        if !with.operations().is_empty() || !with.preconditions().is_empty() {
            batch.with.push(with);
        }
        batch.replies.push((reply, Ok(())));
        while batch.more && batch.has_room() {
            batch.more = false;
            self.advance(&mut batch);
        }
        let more = batch.more;
        self.commit(batch).await?;
        self.unlock_servers_that_left(&before).await;
        Ok(more)
    }

    /// The new plan, whose blob is stored.
    async fn draft(&self, edit: Edit, of: u32) -> Result<(Revised, Digest), ActError> {
        expect_revisable(&self.plan, &self.progress)?;
        let now = self.order.revision();
        if of != now {
            return Err(ActError::Revised { now });
        }
        let (plan, progress) = (self.plan.clone(), self.progress.clone());
        // Large plans take their time: others are served meanwhile.
        let revised = tokio::task::spawn_blocking(move || revise(&plan, &progress, &edit)).await;
        let id = self.order.id;
        let revised = revised.map_err(|_| ActError::Busy(id))??;
        let digest = store_json(&self.engine.shared.blobs, &revised.plan)
            .await
            .map_err(|source| ActError::Plan { id, source })?;
        Ok((revised, digest))
    }

    /// Notes a revision in the header, and in the rows that hold all of them.
    fn keep(&mut self, batch: &mut Batch, revision: PlanRevision) {
        let id = self.order.id;
        if let [first] = self.order.revisions.as_slice() {
            let key = rows::revision(id, first.revision);
            batch.revisions.push((key, rows::encode(first)));
        }
        let key = rows::revision(id, revision.revision);
        batch.revisions.push((key, rows::encode(&revision)));
        self.order.plan = revision.digest;
        self.order.server_count = u32::try_from(self.plan.placed().len()).unwrap_or(u32::MAX);
        self.order.revisions.push(revision);
        let more = self.order.revisions.len();
        let beyond = more.saturating_sub(Order::SHOWN_REVISIONS);
        self.order.revisions.drain(..beyond);
    }

    /// Takes the locks of the servers that the new plan has still to begin; answers the groups to lock because other orders
    /// hold their servers: a server may have come in, or stand in a group now that was not locked for it.
    async fn lock_servers_of(&self, plan: &Plan) -> Result<Vec<(NodeIndex, String)>, ActError> {
        // An order that was not run has no locks yet.
        if self.progress.control != Control::Active {
            return Ok(Vec::new());
        }
        let progress = self.progress.carried(&self.plan, plan);
        let servers: BTreeSet<ServerId> = initialise::units_of(plan)
            .filter(|(node, unit)| unit.part.is_some() && !is_touched(plan, &progress, *node))
            .map(|(_, unit)| unit.server)
            .collect();
        let shared = &self.engine.shared;
        let held = initialise::lock_servers(shared, &servers, self.order.lock_owner).await;
        let held = held.map_err(|error| {
            tracing::error!(order.id = %self.order.id, error = &error as &dyn std::error::Error, "locks could not be taken");
            ActError::Busy(self.order.id)
        })?;
        let mut groups = initialise::groups_of(shared, plan, &held).await;
        groups.retain(|(node, _)| progress.node(*node).locked.is_none());
        match held.into_iter().next() {
            Some((server, holder)) if groups.len() > MAX_LOCKED => {
                Err(ActError::Held { server, holder })
            }
            Some(_) | None => Ok(groups),
        }
    }

    /// The new groups with servers whose group was locked, beside those that are `locked` anyway: grouping anew unlocks nobody.
    fn locks_kept(&self, plan: &Plan, locked: &[(NodeIndex, String)]) -> Vec<(NodeIndex, String)> {
        let lock_of = |unit: NodeIndex| {
            let group = initialise::group_of(&self.plan, unit);
            self.progress.node(group).locked.clone()
        };
        let before: BTreeMap<ServerId, String> = initialise::units_of(&self.plan)
            .filter_map(|(node, unit)| Some((unit.server, lock_of(node)?)))
            .collect();
        let progress = self.progress.carried(&self.plan, plan);
        let mut kept: BTreeMap<NodeIndex, String> = BTreeMap::new();
        for (node, unit) in initialise::units_of(plan) {
            let group = initialise::group_of(plan, node);
            let is_locked = progress.node(group).locked.is_some()
                || locked.iter().any(|(node, _)| *node == group);
            if let Some(reason) = before.get(&unit.server).filter(|_| !is_locked) {
                kept.entry(group).or_insert_with(|| reason.clone());
            }
        }
        kept.into_iter().collect()
    }

    /// Gives back the locks of servers that this order works on no more.
    async fn unlock_servers_that_left(&self, before: &BTreeSet<ServerId>) {
        if self.order.lock_owner != self.order.id {
            return;
        }
        let now = placed_servers(&self.plan);
        let left: BTreeSet<ServerId> = before.difference(&now).copied().collect();
        let shared = &self.engine.shared;
        if let Err(error) = initialise::unlock_servers(shared, &left, self.order.id).await {
            tracing::warn!(order.id = %self.order.id, error = &error as &dyn std::error::Error, "locks could not be given back; they are when the order ends");
        }
    }
}

fn placed_servers(plan: &Plan) -> BTreeSet<ServerId> {
    initialise::units_of(plan)
        .map(|(_, unit)| unit.server)
        .collect()
}
