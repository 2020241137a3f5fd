//! The actor of one order.
//!
//! Owns the order's header, node rows, event rows and inbox slots: nobody else writes them (the gateway stamps a slot's
//! epoch by compare-and-swap, nothing more). It folds the commands that wait into one commit that compares and swaps the
//! header; a conflict there means that another server drives the order, and the actor ends. Only after the commit are
//! callers answered and effects performed.
//!
//! Inside, nodes are indices of the plan that runs. Commands, rows, events, tasks and the effects that are being performed
//! name them by their ids, which hold when the plan is revised.
//!
//! | step | when it fails |
//! | --- | --- |
//! | load | logged, tried again after a second |
//! | claim the owner row | another server drives the order: the actor ends |
//! | apply | the event is refused, the order is as it was |
//! | commit | nothing was promised: callers are told to try again, the order is loaded afresh |
//! | revise the plan (`revise`) | refused, or the commit failed: the plan is as it was |
//! | effect | repeated by the executor until it has an answer; performed again after a restart |
//!
//! An order that has ended shows it in its state only when the seats of its servers are given back and its tech stacks are
//! kept: who sees the end may go on with what the order held. What is left then ([`Effect::Finish`]) nobody waits for.

mod reason;
mod revise;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};
use windlass_domain::{
    Timestamp,
    dispatch::{self, Attempt},
    id::{InstanceId, OrderId, ServerId},
    inbox::InboxEntry,
    manifest::Manifest,
    order::{Action, Control, Happened, Order, OrderEvent, OrderState, RollbackAsked},
    plan::{Indices, NodeIndex, NodeKind, Plan, StepTemplate},
    plugin::UnitState,
    prepared,
    progress::{NodeProgress, NodeState, Progress, StageRollback},
    reducer::{self, Effect, Event, Refused},
    task::{Fault, Outcome, TaskId, TaskResult},
    text,
};
use windlass_store::{CommitError, Revision, StoreError, Txn, crash::crash_point};

use super::{
    ActError, Engine, PlanError, batch,
    batch::{Batch, Reply, SlotChange},
    executor, initialise,
    rows::{self, RowError},
    summary::Summary,
};
use crate::clock;
pub(crate) use revise::Revise;

/// How much longer than its own time-out a task may stay unanswered before its outcome counts as unknown; and how long after
/// an order was loaded, because agents have to come back first.
const ANSWER_GRACE_MS: u64 = 60_000;

/// Bounds of the interval at which running steps are checked for agents that were lost.
const MIN_LOST_CHECK_MS: u64 = 50;
const MAX_LOST_CHECK_MS: u64 = 5_000;

/// Something for an order.
pub(crate) enum Command {
    /// An event, from a person or from the executor.
    Event {
        event: Event,
        by: String,
        /// Committed together with it.
        with: Txn,
        reply: Option<Reply>,
    },
    /// An agent's report.
    Report {
        server: ServerId,
        task: TaskId,
        result: Box<TaskResult>,
        reply: Reply,
    },
    /// A person changes the plan.
    Revise(Box<Revise>),
}

impl Command {
    /// An answer of the executor.
    pub(crate) fn internal(event: Event) -> Self {
        Self::Event {
            event,
            by: String::new(),
            with: Txn::new(),
            reply: None,
        }
    }
}

/// Why an actor ended although its order has not.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Stopped {
    #[error("a row could not be read")]
    Row(#[from] RowError),
    #[error("the plan could not be read")]
    Plan(#[from] PlanError),
    #[error("the store failed")]
    Store(#[from] StoreError),
    #[error("a commit failed")]
    Commit(#[from] CommitError),
    #[error("the service instances could not be given the order's tech stacks: {0}")]
    TechStacks(String),
    #[error("an effect could not be performed")]
    Effect(#[source] tokio::task::JoinError),
}

/// Drives one order until it has ended, has nothing to do, or the engine stops.
pub(crate) async fn run(
    engine: Engine,
    id: OrderId,
    commands: mpsc::Receiver<Command>,
    back: mpsc::WeakSender<Command>,
) -> Result<(), Stopped> {
    let Some(mut actor) = Actor::load(engine, id, back).await? else {
        return Ok(());
    };
    let ended = actor.drive(commands).await;
    actor.effects.shutdown().await;
    ended
}

struct Actor {
    engine: Engine,
    order: Order,
    revision: Revision,
    plan: Arc<Plan>,
    /// Where the nodes of that plan stand.
    indices: Indices,
    progress: Progress,
    /// What that came to at the last commit, see [`Progress::comes_to`].
    comes_to: OrderState,
    /// What people were told of that lasts.
    stops: reason::Stops,
    /// Who waits for the end to show.
    end_awaited: Vec<(Reply, Result<(), ActError>)>,
    owner_claimed: bool,
    /// What is performed, named by ids.
    effects: JoinSet<Effect>,
    performing: HashMap<Effect, AbortHandle>,
    /// When something has to be looked at although nobody reported: sorted by time.
    deadlines: BTreeSet<(Timestamp, NodeIndex, u32)>,
    /// When running steps are next checked for agents that were lost.
    lost_check_at: Timestamp,
    /// Servers that were unlocked before the end of this order, which is being cancelled.
    unlocked: BTreeSet<ServerId>,
    loaded_at: Timestamp,
    back: mpsc::WeakSender<Command>,
}

impl Actor {
    async fn load(
        engine: Engine,
        id: OrderId,
        back: mpsc::WeakSender<Command>,
    ) -> Result<Option<Self>, Stopped> {
        let store = &*engine.shared.store;
        let Some((order, revision)) = rows::read_order(store, id).await? else {
            return Ok(None);
        };
        let plan = Arc::new(engine.shared.plan(order.plan).await?);
        let nodes = rows::read_nodes(store, id).await?;
        let progress = Progress::of_rows(&plan, order.control, order.stalled, nodes);
        // That it has ended was not told before it showed.
        let comes_to = match order.control {
            Control::Ended(_) => order.state,
            Control::NotStarted
            | Control::Initialising
            | Control::Active
            | Control::Cancelling
            | Control::EndingForRollback
            | Control::RollingBack => progress.comes_to(),
        };
        let mut actor = Self {
            engine,
            order,
            revision,
            indices: plan.indices(),
            plan,
            comes_to,
            stops: reason::Stops::new(),
            end_awaited: Vec::new(),
            progress,
            owner_claimed: false,
            effects: JoinSet::new(),
            performing: HashMap::new(),
            deadlines: BTreeSet::new(),
            lost_check_at: clock::now(),
            unlocked: BTreeSet::new(),
            loaded_at: clock::now(),
            back,
        };
        actor.stops = actor.stops(comes_to);
        actor.watch_deadlines();
        Ok(Some(actor))
    }

    async fn drive(&mut self, mut commands: mpsc::Receiver<Command>) -> Result<(), Stopped> {
        if !self.claim().await? {
            return Ok(());
        }
        // Recovery: go on with what can be done, then perform everything that is due.
        if !self.is_idle() {
            let again = Command::internal(Event::Advance);
            self.fold(again, &mut commands).await?;
            // The servers of one that shows its end are given back: by now they can be others'.
            if !self.order.state.is_terminal() {
                let mut due = reducer::due(&self.plan, &self.progress);
                due.retain(|effect| *effect != Effect::Finish);
                self.perform(due);
            }
            self.show_the_end().await?;
        }
        let stop = self.engine.shared.stop.clone();
        loop {
            if self.is_over() || (self.is_idle() && commands.is_empty()) {
                commands.close();
                if commands.is_empty() {
                    return self.leave().await;
                }
            }
            let deadline = self.next_deadline();
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                Some(done) = self.effects.join_next() => match done {
                    Ok(effect) => {
                        self.performing.remove(&effect);
                        if gives_back(&effect) {
                            self.show_the_end().await?;
                        }
                    }
                    Err(error) if error.is_panic() => return Err(Stopped::Effect(error)),
                    // Aborted: it is not due any more.
                    Err(_) => {}
                },
                command = commands.recv() => match command {
                    Some(command) => self.fold(command, &mut commands).await?,
                    None if self.is_over() || self.is_idle() => return self.leave().await,
                    None => return Ok(()),
                },
                () = sleep_until(deadline) => self.overdue(&mut commands).await?,
            }
        }
    }

    fn node_count(&self) -> NodeIndex {
        NodeIndex::try_from(self.plan.nodes.len()).unwrap_or(NodeIndex::MAX)
    }

    /// Nothing happens to the order unless somebody acts.
    fn is_idle(&self) -> bool {
        self.progress.control == Control::NotStarted
    }

    fn has_ended(&self) -> bool {
        matches!(self.progress.control, Control::Ended(_))
    }

    /// The order has ended and the last effect is performed.
    fn is_over(&self) -> bool {
        self.has_ended() && self.performing.is_empty() && self.effects.is_empty()
    }

    /// Makes this engine the order's owner, while its lease lives.
    async fn claim(&mut self) -> Result<bool, Stopped> {
        let shared = &self.engine.shared;
        let Some(lease) = shared.lease() else {
            return Ok(false);
        };
        let key = rows::owner(self.order.id);
        let name = rows::encode(&shared.name);
        if let Some(entry) = shared.store.get(&key).await? {
            // The actor before this one of the same engine.
            self.owner_claimed = entry.value == name;
            return Ok(self.owner_claimed);
        }
        let claim = Txn::new()
            .revision_is(rows::order(self.order.id), self.revision)
            .absent(key.clone())
            .put_leased(key, name, lease.id());
        match shared.store.commit(claim).await {
            Ok(_) => {
                self.owner_claimed = true;
                Ok(true)
            }
            Err(CommitError::Conflict { .. }) => {
                tracing::info!(order.id = %self.order.id, "another server drives this order");
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn leave(&mut self) -> Result<(), Stopped> {
        if self.owner_claimed {
            self.engine
                .shared
                .store
                .commit(Txn::new().delete(rows::owner(self.order.id)))
                .await?;
        }
        Ok(())
    }

    // ------------------------------------------------------------------------------------------ folding

    /// Folds a command and those that wait behind it into commits, until the reducer has no more to do.
    async fn fold(
        &mut self,
        first: Command,
        commands: &mut mpsc::Receiver<Command>,
    ) -> Result<(), Stopped> {
        let mut next = Some(first);
        let mut more = false;
        loop {
            let mut batch = Batch {
                more,
                ..Batch::default()
            };
            while let Some(command) = next.take() {
                crash_point("engine.before_apply");
                next = self.take(&mut batch, command);
                crash_point("engine.after_apply");
                if !batch.has_room() {
                    break;
                }
                if next.is_none() {
                    next = commands.try_recv().ok();
                }
            }
            while batch.more && batch.has_room() {
                batch.more = false;
                self.advance(&mut batch);
            }
            more = batch.more;
            let revise = batch.revise.take();
            self.commit(batch).await?;
            if let Some(asked) = revise {
                more |= self.revise(*asked).await?;
            }
            if next.is_none() {
                if !more {
                    return Ok(());
                }
                next = Some(Command::internal(Event::Advance));
            }
        }
    }

    fn advance(&mut self, batch: &mut Batch) {
        let command = Command::internal(Event::Advance);
        if self.take(batch, command).is_some() {
            batch.more = true;
        }
    }

    /// Applies one command. Returns it when it has to be applied again because it covers more than one turn may change.
    fn take(&mut self, batch: &mut Batch, command: Command) -> Option<Command> {
        let at = clock::now();
        let (event, by, with, reply) = match command {
            Command::Event {
                event,
                by,
                with,
                reply,
            } => (event, by, with, reply),
            Command::Report {
                server,
                task,
                result,
                reply,
            } => {
                let unit = self
                    .indices
                    .of(task.node)
                    .and_then(|node| dispatch::unit_of(&self.plan, node));
                let on_this_server = unit.is_some_and(|(_, _, unit)| unit.server == server);
                if !on_this_server {
                    batch
                        .replies
                        .push((reply, Err(Refused::NotCurrent { node: task.node }.into())));
                    return None;
                }
                let event = Event::StepFinished {
                    node: task.node,
                    attempt: task.attempt,
                    result,
                };
                (event, String::new(), Txn::new(), Some(reply))
            }
            Command::Revise(asked) => {
                batch.revise = Some(asked);
                return None;
            }
        };
        let repeat = event.clone();
        let event = match event.with_nodes(|id| self.indices.of(id)) {
            Ok(event) => event,
            Err(node) => {
                if let Some(reply) = reply {
                    let given = self.plan.next_id.max(self.node_count());
                    let last = given.saturating_sub(1);
                    let refused = Refused::NoSuchNode { node, last };
                    batch.replies.push((reply, Err(refused.into())));
                }
                return None;
            }
        };
        let finished = match &event {
            Event::StepFinished { node, result, .. } => {
                Some((*node, result.outcome, result.output.len()))
            }
            Event::Act(_)
            | Event::Initialised { .. }
            | Event::InitialisationFailed { .. }
            | Event::UnitAdmitted(_)
            | Event::UnitHeld(..)
            | Event::UnitDrifted(..)
            | Event::TrafficRemembered { .. }
            | Event::ShiftRemembered { .. }
            | Event::TrafficDone { .. }
            | Event::TrafficFailed { .. }
            | Event::PauseElapsed { .. }
            | Event::Judged { .. }
            | Event::ProgressDeadline
            | Event::RollbackStarted(_)
            | Event::RollbackImpossible(_)
            | Event::RollbackEnded { .. }
            | Event::StageRollback { .. }
            | Event::TrafficChanged { .. }
            | Event::Advance => None,
        };
        let mut attempts: Vec<(NodeIndex, NodeProgress)> =
            self.ended_attempt(&event, at).into_iter().collect();
        let control = self.progress.control;
        let delta = match reducer::apply(&self.plan, &mut self.progress, event, at) {
            Ok(delta) => delta,
            Err(refused) => {
                if let Some(reply) = reply {
                    let refused = refused.with_nodes(|node| self.plan.id_of(node));
                    batch.replies.push((reply, Err(refused.into())));
                }
                return None;
            }
        };
        if let Event::Act(action) = &repeat {
            self.note(
                batch,
                at,
                &by,
                Happened::Action {
                    did: action.clone(),
                },
            );
        }
        if let Event::TrafficChanged { number, error } = &repeat {
            let what = Happened::Traffic {
                edit: *number,
                error: error.clone(),
            };
            self.note(batch, at, "", what);
        }
        self.header_follows(batch, &repeat, control, at);
        if let Some((node, outcome, bytes)) = finished {
            self.step_is_over(batch, node, outcome);
            batch.bytes += bytes;
            self.order.last_progress_at = Some(at);
            batch.header = true;
        }
        attempts.extend(delta.reset.into_iter().map(|(node, row)| (node, kept(row))));
        for (node, row) in attempts {
            batch.bytes += 4096 + row.result.as_ref().map_or(0, |result| result.output.len());
            batch.attempts.push((node, row));
        }
        batch.nodes.extend(&delta.rows);
        for (node, state) in &delta.states {
            self.note_node(batch, at, *node, *state);
        }
        for effect in delta.effects {
            self.fall_due(batch, effect, at);
        }
        batch.more |= delta.more;
        if !with.operations().is_empty() || !with.preconditions().is_empty() {
            batch.with.push(with);
        }
        if delta.again {
            return Some(Command::Event {
                event: repeat,
                by,
                with: Txn::new(),
                reply,
            });
        }
        if let Some(reply) = reply {
            batch.replies.push((reply, Ok(())));
        }
        None
    }

    /// The row of an attempt that this event ends without success: a step that is repeated keeps the logs of all its
    /// attempts. The log of one that succeeded is its row, until it is run again with its stage.
    fn ended_attempt(&self, event: &Event, at: Timestamp) -> Option<(NodeIndex, NodeProgress)> {
        let Event::StepFinished {
            node,
            attempt,
            result,
        } = event
        else {
            return None;
        };
        if (*node as usize) >= self.plan.nodes.len() {
            return None;
        }
        // One whose outcome was unknown has such a row already: what became of it takes its place.
        let late = self.progress.state(*node) == NodeState::Unknown;
        if result.outcome == Outcome::Succeeded && !late {
            return None;
        }
        let row = NodeProgress {
            attempt: *attempt,
            started_at: self.progress.node(*node).started_at,
            finished_at: Some(at),
            message: result.message.clone(),
            result: Some((**result).clone()),
            ..NodeProgress::default()
        };
        Some((*node, row))
    }

    /// The parts of the header that an event sets besides the state.
    fn header_follows(&mut self, batch: &mut Batch, event: &Event, before: Control, at: Timestamp) {
        let control = self.progress.control;
        // A deadline that passes while a step is under way changes no row.
        if control != before || self.order.stalled != self.progress.stalled {
            batch.header = true;
        }
        self.order.control = control;
        self.order.stalled = self.progress.stalled;
        match event {
            Event::RollbackStarted(order) => self.order.rolled_back_by = Some(*order),
            Event::Act(Action::RollBack { reason, parameters }) => {
                self.order.rollback_asked = Some(RollbackAsked {
                    reason: reason.clone(),
                    parameters: parameters.clone(),
                });
            }
            Event::RollbackImpossible(reason) | Event::InitialisationFailed { reason } => {
                self.order.state_reason.clone_from(reason);
                text::cut_message(&mut self.order.state_reason);
            }
            Event::Act(_)
            | Event::Initialised { .. }
            | Event::UnitAdmitted(_)
            | Event::UnitHeld(..)
            | Event::UnitDrifted(..)
            | Event::StepFinished { .. }
            | Event::TrafficRemembered { .. }
            | Event::ShiftRemembered { .. }
            | Event::TrafficDone { .. }
            | Event::TrafficFailed { .. }
            | Event::PauseElapsed { .. }
            | Event::Judged { .. }
            | Event::ProgressDeadline
            | Event::RollbackEnded { .. }
            | Event::StageRollback { .. }
            | Event::TrafficChanged { .. }
            | Event::Advance => {}
        }
        if before == Control::NotStarted && control == Control::Initialising {
            self.order.started_at = Some(at);
        }
        if control == Control::Active && before == Control::Initialising {
            self.order.last_progress_at = Some(at);
        }
    }

    /// A task has ended: its slot is free, and a release may have become the installed one.
    fn step_is_over(&mut self, batch: &mut Batch, node: NodeIndex, outcome: Outcome) {
        let Some((_, unit_index, unit)) = dispatch::unit_of(&self.plan, node) else {
            return;
        };
        batch
            .slots
            .insert((unit.server, unit_index), SlotChange::Delete);
        let NodeKind::Step { step } = self.plan.nodes[node as usize].kind else {
            return;
        };
        if outcome == Outcome::Succeeded
            && matches!(self.plan.steps[step as usize], StepTemplate::Activate)
        {
            let manifest = dispatch::manifest(&self.plan, self.order.plan, node);
            let Some(mut manifest) = manifest else {
                return;
            };
            manifest.prepared = prepared::after(&self.plan, &self.progress, node);
            batch.bytes += 4096;
            batch
                .installs
                .push((manifest.instance, unit.server, manifest));
        }
    }

    fn fall_due(&mut self, batch: &mut Batch, effect: Effect, at: Timestamp) {
        match effect {
            Effect::Dispatch { node, attempt } => {
                let expires_at = at.plus_ms(self.plan.delivery_deadline_ms);
                // The revision of the order's last commit rises over all orders. An order that waited for a server's lock
                // has committed since the one before it gave the lock back, so its fence is higher.
                let fence = self.revision.0;
                let attempt = Attempt {
                    order: self.order.id,
                    plan: self.order.plan,
                    attempt,
                    fence,
                    expires_at,
                };
                let task = dispatch::task(&self.plan, node, attempt);
                let unit = dispatch::unit_of(&self.plan, node);
                if let (Some(task), Some((_, unit_index, unit))) = (task, unit) {
                    let epoch = self.engine.shared.agents.current_epoch(unit.server);
                    let entry = InboxEntry::new(task, epoch);
                    batch.bytes += 2048;
                    batch
                        .slots
                        .insert((unit.server, unit_index), SlotChange::Put(Box::new(entry)));
                }
            }
            Effect::Revoke { node, .. } => {
                if let Some((_, unit_index, unit)) = dispatch::unit_of(&self.plan, node) {
                    batch
                        .slots
                        .insert((unit.server, unit_index), SlotChange::Revoke);
                }
                batch.effects.push(effect);
            }
            Effect::Initialise
            | Effect::Admit(_)
            | Effect::Release(_)
            | Effect::Traffic { .. }
            | Effect::Pause { .. }
            | Effect::Judge { .. }
            | Effect::StartRollback
            | Effect::RollBackStage(_)
            | Effect::ChangeTraffic { .. } => batch.effects.push(effect),
            Effect::Finish => {
                batch.effects.push(effect);
                // One that was never run has nothing to give back.
                if self.order.started_at.is_some() {
                    let due = reducer::due(&self.plan, &self.progress);
                    batch.effects.extend(due.into_iter().filter(gives_back));
                }
            }
        }
    }

    fn note(&mut self, batch: &mut Batch, at: Timestamp, by: &str, what: Happened) {
        self.order.last_event += 1;
        batch.events.push(OrderEvent {
            seq: self.order.last_event,
            at,
            by: by.to_owned(),
            what,
        });
    }

    fn note_node(&mut self, batch: &mut Batch, at: Timestamp, node: NodeIndex, state: NodeState) {
        let server = dispatch::unit_of(&self.plan, node).map(|(_, _, unit)| unit.server);
        let row = self.progress.node(node);
        let what = Happened::Node {
            node: self.plan.id_of(node),
            name: self.plan.nodes[node as usize].name.clone(),
            server,
            state,
            attempt: row.attempt,
            message: row.message.clone(),
        };
        self.note(batch, at, "", what);
    }

    // ------------------------------------------------------------------------------------------ committing

    async fn commit(&mut self, mut batch: Batch) -> Result<(), Stopped> {
        if !batch.is_empty() {
            self.order.counts = self.progress.counts(&self.plan);
            if !self.is_giving_back(&batch.effects) {
                self.show_state(&mut batch).await?;
            }
            self.write(&batch).await?;
            crash_point("engine.after_commit");
        }
        for server in batch.slots.keys().map(|(server, _)| *server) {
            self.engine.shared.agents.nudge(server);
        }
        for node in &batch.nodes {
            self.watch_deadline(*node);
        }
        self.end_awaited.append(&mut batch.replies);
        if !self.is_giving_back(&batch.effects) {
            for (reply, answer) in self.end_awaited.drain(..) {
                // A caller that went away does not need the answer.
                drop(reply.send(answer));
            }
        }
        self.perform(batch.effects);
        self.unlock_unreached().await;
        Ok(())
    }

    /// Unlocks servers that a cancelled order never reached, without waiting for those that it did reach.
    async fn unlock_unreached(&mut self) {
        // A rollback works under the locks of the order that it rolls back, which may go on after it.
        if self.progress.control != Control::Cancelling || self.order.lock_owner != self.order.id {
            return;
        }
        let mut unreached = reducer::unreached_servers(&self.plan, &self.progress);
        unreached.retain(|server| !self.unlocked.contains(server));
        if unreached.is_empty() {
            return;
        }
        let unlocked =
            initialise::unlock_servers(&self.engine.shared, &unreached, self.order.id).await;
        match unlocked {
            Ok(()) => self.unlocked.extend(unreached),
            Err(error) => {
                tracing::warn!(order.id = %self.order.id, error = &error as &dyn std::error::Error, "failed to unlock the servers that a cancelled order did not reach; they are unlocked when it ends");
            }
        }
    }

    async fn show_state(&mut self, batch: &mut Batch) -> Result<(), Stopped> {
        let at = clock::now();
        let state = self.progress.order_state();
        let was = std::mem::replace(&mut self.order.state, state);
        let comes_to = self.progress.comes_to();
        let before = std::mem::replace(&mut self.comes_to, comes_to);
        let stops = self.stops(comes_to);
        let told = std::mem::replace(&mut self.stops, stops);
        batch.state_changed = state != was;
        if !batch.state_changed && state == OrderState::RollingBack {
            return Ok(());
        }
        if batch.state_changed && state.is_terminal() {
            self.order.finished_at.get_or_insert(at);
            self.keep_tech_stacks().await?;
        }
        self.order.state_reason = self.reason(comes_to);
        let reason = self.order.state_reason.clone();
        if batch.state_changed || comes_to != before {
            let reason = reason.clone();
            self.note(batch, at, "", Happened::Order { state, reason });
        }
        // A failure that was told while others still ran is not told again when they are done.
        let is_told = comes_to != before;
        if is_told {
            let notice = rows::told(&self.order, was, comes_to, at);
            batch.notices.extend(notice);
        }
        for (stopped, said) in self.news(&told, is_told.then_some(&*reason)) {
            let happened = Happened::Order {
                state,
                reason: said.clone(),
            };
            self.note(batch, at, "", happened);
            let shown = Order {
                state_reason: said,
                ..self.order.clone()
            };
            batch.notices.extend(rows::told(&shown, was, stopped, at));
        }
        Ok(())
    }

    /// Whether servers of an order that has ended are still to be given back.
    fn is_giving_back(&self, due: &[Effect]) -> bool {
        self.has_ended() && self.performing.keys().chain(due).any(gives_back)
    }

    /// Shows the end of an order that has ended, once its servers are given back, and finishes it.
    async fn show_the_end(&mut self) -> Result<(), Stopped> {
        if !self.has_ended() || self.is_giving_back(&[]) {
            return Ok(());
        }
        let effects = vec![Effect::Finish];
        if self.order.state.is_terminal() {
            self.perform(effects);
            return Ok(());
        }
        let batch = Batch {
            header: true,
            effects,
            ..Batch::default()
        };
        self.commit(batch).await
    }

    /// Before the order shows that it has succeeded: who plans the next one finds its tech stacks in force.
    async fn keep_tech_stacks(&self) -> Result<(), Stopped> {
        if self.order.tech_stacks.is_empty() || self.order.state != OrderState::Succeeded {
            return Ok(());
        }
        let mut kept = self.order.clone();
        kept.tech_stacks
            .retain(|change| self.has_released(change.instance));
        let planning = &self.engine.shared.planning;
        let done = planning.keep_tech_stacks(&kept).await;
        done.map_err(Stopped::TechStacks)
    }

    /// Whether a server of a service instance was released, and not rolled back with its stage.
    fn has_released(&self, instance: InstanceId) -> bool {
        initialise::units_of(&self.plan).any(|(node, unit)| {
            let of = self.plan.part_of(unit).map(|part| part.instance);
            let stage = self.progress.node(self.progress.stage_of(node));
            of == Some(instance)
                && stage.rollback != Some(StageRollback::Done)
                && reducer::unit_state(&self.plan, &self.progress, node) == UnitState::Released
        })
    }

    async fn write(&mut self, batch: &Batch) -> Result<(), Stopped> {
        let header = rows::order(self.order.id);
        loop {
            let txn = self.txn(batch, &header).await?;
            match self.engine.shared.store.commit(txn).await {
                Ok(revision) => {
                    self.revision = revision;
                    return Ok(());
                }
                // The gateway stamped a slot that is to be revoked: read it again.
                Err(CommitError::Conflict { key, .. })
                    if key != header && batch.with.is_empty() => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn txn(&self, batch: &Batch, header: &windlass_store::Key) -> Result<Txn, Stopped> {
        let store = &*self.engine.shared.store;
        let id = self.order.id;
        let mut txn = Txn::new()
            .revision_is(header.clone(), self.revision)
            .put(header.clone(), rows::encode(&self.order));
        if batch.state_changed {
            let summary = Summary::of(&self.order, &self.plan);
            txn = txn.put(rows::listed(&self.order), summary.encode());
        }
        for node in &batch.nodes {
            txn = txn.put(
                rows::node(id, self.plan.id_of(*node)),
                rows::encode_node(self.progress.node(*node)),
            );
        }
        for (node, row) in &batch.attempts {
            txn = txn.put(
                rows::attempt(id, self.plan.id_of(*node), row.attempt),
                rows::encode_node(row),
            );
        }
        for (key, value) in batch.notices.iter().chain(&batch.revisions) {
            txn = txn.put(key.clone(), value.clone());
        }
        for (first, value) in batch::event_rows(&batch.events) {
            txn = txn.put(rows::event(id, first), value);
        }
        for ((server, unit), change) in &batch.slots {
            let key = rows::slot(*server, id, *unit);
            txn = match change {
                SlotChange::Put(entry) => txn.put(key, rows::encode(entry)),
                SlotChange::Delete => txn.delete(key),
                SlotChange::Revoke => {
                    match rows::read::<InboxEntry>(store, &key, "an inbox entry").await? {
                        Some((entry, revision)) => {
                            let revoked = rows::encode(&entry.revoke());
                            txn.revision_is(key.clone(), revision).put(key, revoked)
                        }
                        None => txn,
                    }
                }
            };
        }
        for (instance, server, manifest) in &batch.installs {
            let key = rows::installed(*instance, *server);
            let current = rows::read::<Manifest>(store, &key, "what is installed").await?;
            if let Some((current, _)) = current
                && current.release != manifest.release
            {
                txn = txn.put(
                    rows::installed_before(*instance, *server),
                    rows::encode(&current),
                );
            }
            txn = txn.put(key, rows::encode(manifest));
        }
        for with in &batch.with {
            txn = txn.and(with.clone());
        }
        if batch.effects.contains(&Effect::Initialise) {
            txn = txn.put(rows::active(id), "");
        }
        Ok(txn)
    }

    // ------------------------------------------------------------------------------------------ effects

    fn perform(&mut self, effects: Vec<Effect>) {
        let gives_back_first = self.is_giving_back(&effects);
        for effect in effects {
            let named = effect.with_node(|node| self.plan.id_of(node));
            match named {
                // Dispatches are slots, written with the commit: the gateway pushes them.
                Effect::Dispatch { .. } => continue,
                Effect::Release(node) => {
                    if let Some(admission) = self.performing.remove(&Effect::Admit(node)) {
                        admission.abort();
                    }
                }
                Effect::Initialise
                | Effect::Admit(_)
                | Effect::Revoke { .. }
                | Effect::Traffic { .. }
                | Effect::Pause { .. }
                | Effect::Judge { .. }
                | Effect::StartRollback
                | Effect::RollBackStage(_)
                | Effect::ChangeTraffic { .. } => {}
                // Performed when the order shows that it has ended.
                Effect::Finish if gives_back_first => continue,
                Effect::Finish => {}
            }
            if self.performing.contains_key(&named) {
                continue;
            }
            let Some(back) = self.back.upgrade() else {
                continue;
            };
            let job = executor::Job {
                engine: self.engine.clone(),
                order: self.order.clone(),
                plan: self.plan.clone(),
                effect,
                back,
                view: executor::View::of(&self.plan, &self.progress, effect),
            };
            let handle = self.effects.spawn(async move {
                executor::perform(job).await;
                named
            });
            self.performing.insert(named, handle);
        }
    }

    // ------------------------------------------------------------------------------------------ deadlines

    /// Notes when tasks that run have to be looked at.
    fn watch_deadlines(&mut self) {
        self.deadlines.clear();
        for node in 0..self.node_count() {
            self.watch_deadline(node);
        }
    }

    /// Notes when a task that runs has to be looked at.
    fn watch_deadline(&mut self, node: NodeIndex) {
        let NodeKind::Step { step } = self.plan.nodes[node as usize].kind else {
            return;
        };
        let row = self.progress.node(node);
        let (true, Some(started)) = (row.state.is_busy(), row.started_at) else {
            return;
        };
        let delivery = started.plus_ms(self.plan.delivery_deadline_ms);
        let answer = self.answer_deadline(step, started);
        self.deadlines.insert((delivery, node, row.attempt));
        self.deadlines.insert((answer, node, row.attempt));
    }

    /// Until when a task that was pushed may be unanswered: as long as it may take to be delivered and to run. After a
    /// restart its agent gets the time to come back with what it knows, however long ago the step was started.
    fn answer_deadline(&self, step: u32, started: Timestamp) -> Timestamp {
        let timeout_ms = dispatch::timeout_ms(&self.plan.steps[step as usize]);
        let longest = started
            .plus_ms(self.plan.delivery_deadline_ms)
            .plus_ms(timeout_ms);
        longest.max(self.loaded_at).plus_ms(ANSWER_GRACE_MS)
    }

    /// Whether the agent that runs a step has been disconnected for so long that its answer is not awaited any more. The time
    /// counts from the start of the step at the earliest, so that a retry gives the agent time to come back.
    fn is_lost(&self, node: NodeIndex, now: Timestamp) -> bool {
        let Some((_, _, unit)) = dispatch::unit_of(&self.plan, node) else {
            return false;
        };
        let shared = &self.engine.shared;
        let started = self.progress.node(node).started_at;
        let awaited_ms = now.since_ms(started.unwrap_or(self.loaded_at).max(self.loaded_at));
        Duration::from_millis(awaited_ms) >= shared.agent_lost_after
            && shared
                .agents
                .silent_for(unit.server)
                .is_some_and(|silent| silent >= shared.agent_lost_after)
    }

    fn lost_check_interval_ms(&self) -> u64 {
        let lost_after = self.engine.shared.agent_lost_after.as_millis();
        u64::try_from(lost_after / 8).map_or(MAX_LOST_CHECK_MS, |interval| {
            interval.clamp(MIN_LOST_CHECK_MS, MAX_LOST_CHECK_MS)
        })
    }

    fn next_deadline(&self) -> Option<Timestamp> {
        let step = self.deadlines.first().map(|(at, ..)| *at);
        let progress = match (self.plan.progress_deadline_ms, self.order.last_progress_at) {
            (Some(deadline_ms), Some(last))
                if self.progress.owes_progress() && !self.progress.stalled =>
            {
                Some(last.plus_ms(deadline_ms))
            }
            (Some(_), Some(_)) | (None, _) | (_, None) => None,
        };
        let lost = step.map(|_| self.lost_check_at);
        step.into_iter().chain(progress).chain(lost).min()
    }

    async fn overdue(&mut self, commands: &mut mpsc::Receiver<Command>) -> Result<(), Stopped> {
        let now = clock::now();
        if let (Some(deadline_ms), Some(last)) =
            (self.plan.progress_deadline_ms, self.order.last_progress_at)
            && self.progress.owes_progress()
            && last.plus_ms(deadline_ms) <= now
        {
            self.fold(Command::internal(Event::ProgressDeadline), commands)
                .await?;
        }
        let mut due = BTreeSet::new();
        while let Some((at, node, attempt)) = self.deadlines.first().copied() {
            if at > now {
                break;
            }
            self.deadlines.pop_first();
            due.insert((node, attempt));
        }
        if self.lost_check_at <= now {
            self.lost_check_at = now.plus_ms(self.lost_check_interval_ms());
            let running = self
                .deadlines
                .iter()
                .map(|(_, node, attempt)| (*node, *attempt));
            due.extend(running.filter(|(node, _)| self.is_lost(*node, now)));
        }
        for (node, attempt) in due {
            let row = self.progress.node(node);
            if !row.state.is_busy() || row.attempt != attempt {
                continue;
            }
            if let Some(result) = self.unanswered(node, row.started_at, now).await? {
                let event = Event::StepFinished {
                    node: self.plan.id_of(node),
                    attempt,
                    result: Box::new(result),
                };
                self.fold(Command::internal(event), commands).await?;
            }
        }
        Ok(())
    }

    /// What to make of a task that nobody reported in time: not delivered, or unknown.
    async fn unanswered(
        &self,
        node: NodeIndex,
        started: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<Option<TaskResult>, Stopped> {
        let NodeKind::Step { step } = self.plan.nodes[node as usize].kind else {
            return Ok(None);
        };
        let Some((_, unit_index, unit)) = dispatch::unit_of(&self.plan, node) else {
            return Ok(None);
        };
        let store = &*self.engine.shared.store;
        let key = rows::slot(unit.server, self.order.id, unit_index);
        let slot = rows::read::<InboxEntry>(store, &key, "an inbox entry").await?;
        let (outcome, fault, message) = match slot {
            Some((entry, revision)) if entry.epoch.is_none() => {
                // Never pushed. Taking the slot away first keeps it so.
                let take = Txn::new().revision_is(key.clone(), revision).delete(key);
                match store_commit(store, take).await? {
                    true => (
                        Outcome::Refused,
                        Fault::NotDelivered,
                        format!(
                            "not delivered: the agent of {} is not connected. Start it, then retry the step",
                            unit.server_name
                        ),
                    ),
                    false => return Ok(None),
                }
            }
            // Pushed: looked at again when its time is up.
            Some(_)
                if !self.is_lost(node, now)
                    && started.is_some_and(|started| now < self.answer_deadline(step, started)) =>
            {
                return Ok(None);
            }
            Some(_) | None => (
                Outcome::Unknown,
                Fault::NotReported,
                format!(
                    "the agent of {} did not report in time: whether the step ran cannot be known. Check the server, then \
                     retry or ignore the step",
                    unit.server_name
                ),
            ),
        };
        Ok(Some(TaskResult {
            outcome,
            exit_code: None,
            output: String::new(),
            dropped_bytes: 0,
            message,
            fault: Some(fault),
            started_at: None,
            finished_at: now,
        }))
    }
}

/// Commits; `false` on a conflict.
async fn store_commit(store: &dyn windlass_store::Store, txn: Txn) -> Result<bool, Stopped> {
    match store.commit(txn).await {
        Ok(_) => Ok(true),
        Err(CommitError::Conflict { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

async fn sleep_until(deadline: Option<Timestamp>) {
    match deadline {
        Some(at) => {
            tokio::time::sleep(Duration::from_millis(at.since_ms(clock::now()).max(1))).await
        }
        None => std::future::pending().await,
    }
}

/// What is kept of an attempt.
fn kept(row: NodeProgress) -> NodeProgress {
    NodeProgress {
        attempt: row.attempt,
        started_at: row.started_at,
        finished_at: row.finished_at,
        message: row.message,
        result: row.result,
        ..NodeProgress::default()
    }
}

const fn gives_back(effect: &Effect) -> bool {
    matches!(effect, Effect::Release(_))
}
