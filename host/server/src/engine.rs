//! The engine: drives orders.
//!
//! An order is a plan and its progress. One [`actor`] per order folds the events that wait into one commit and then performs
//! the effects that fell due, at least once; the pure reducer in `windlass_domain::reducer` decides everything. The outbox
//! *is* the progress: recovery reads unfinished orders and performs what `due` lists. There is no other path.
//!
//! ```text
//! service::orders ── act ──►┐
//! gateway ── report ───────►│ actor: fold ─► apply (pure) ─► one commit ─► answer ─► effects ─┐
//! executor ── answers ─────►┘◄────────────────────────────────────────────────────────────────┘
//! ```
//!
//! | module | owns |
//! | --- | --- |
//! | [`actor`] | one order: its header, rows, events, inbox slots |
//! | `executor` | performing effects, each safe to repeat |
//! | `figures` | what pools counted while a judgement's window was open |
//! | `keeper` | the safety envelope across all orders |
//! | [`traffic`] | the seam to load balancers |
//! | [`live`] | the output of steps that run, for those who look on |
//! | [`rows`] | keys and JSON of the rows above |
//! | `summary` | what lists and counts read of an order |

pub mod actor;
mod batch;
mod executor;
mod figures;
mod initialise;
mod keeper;
pub mod live;
pub mod rows;
mod shift;
pub(crate) mod summary;
pub mod traffic;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use windlass_domain::{
    id::{InstanceId, OrderId, ServerId},
    inbox::JournalEpoch,
    manifest::Manifest,
    order::{Action, Control, Order},
    plan::{NodeId, NodeIndex, Plan, Read},
    plugin::{Judgement, Observation},
    progress::Progress,
    reducer::{Event, Refused},
    revise::{BadEdit, Edit},
    server::ReleaseState,
    task::{TaskId, TaskResult},
};
use windlass_store::{BlobError, Blobs, CommitError, Lease, Store, Txn};

use actor::Command;
pub(crate) use executor::differences;
use keeper::{Keeper, KeeperTask};
use rows::RowError;
use traffic::TrafficPools;

/// Commands that may wait for one order.
const QUEUE: usize = 4096;
/// How long the servers of an instance are taken for those that were read.
const MEMBERS_FOR: Duration = Duration::from_millis(100);
/// How long an agent may be disconnected before the outcome of a step on its server counts as unknown, unless it is configured.
pub const AGENT_LOST_AFTER: Duration = Duration::from_secs(60);
/// Servers of an instance, each with its cell's identifier.
pub(crate) type Members = Arc<[(ServerId, String)]>;
/// How long an order stays with a server that no longer says it is alive.
const LEASE_TTL_MS: u64 = 10_000;

/// What the engine needs of agents' sessions.
pub trait Agents: Send + Sync + 'static {
    /// The epoch of the agent's journal, where a session is up.
    fn current_epoch(&self, server: ServerId) -> Option<JournalEpoch>;

    /// Whether a session is up.
    fn is_online(&self, server: ServerId) -> bool;

    /// For how long no session has been up; `None` while one is. Counted from the last message of the agent, or from the
    /// start of the platform for an agent that has not connected since.
    fn silent_for(&self, server: ServerId) -> Option<Duration>;

    /// A slot of the server's inbox changed: push it. Only a hint; the gateway watches the inbox too.
    fn nudge(&self, server: ServerId);
}

/// A rollback that was planned.
#[derive(Debug, Clone)]
pub struct PlannedRollback {
    /// The new order's header, not started.
    pub order: Order,
    /// Its plan, whose blob is stored.
    pub plan: Arc<Plan>,
}

/// What the engine needs of the catalogue and the plugins while an order runs.
#[async_trait]
pub trait Planning: Send + Sync + 'static {
    /// What the subjects are now, in the words of [`Plan::reads`]; one that is gone is absent. An error is shown to people.
    async fn reread(
        &self,
        plan: &Plan,
        subjects: &[String],
    ) -> Result<BTreeMap<String, Read>, String>;

    /// Why servers cannot take part now; empty: all can. Source: spec "Release orders", "initialisation".
    async fn check_servers(&self, plan: &Plan) -> Result<Vec<String>, String>;

    /// The servers of a service instance, each with its cell's identifier.
    async fn members(&self, instance: InstanceId) -> Result<Vec<(ServerId, String)>, String>;

    /// Makes the tech-stack versions of an order that has succeeded those of its service instances. Safe to repeat.
    async fn keep_tech_stacks(&self, order: &Order) -> Result<(), String>;

    /// Asks the order's strategy. `figures`: what pools counted, see `figures`.
    async fn judge(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        stage: &str,
        figures: Vec<Observation>,
    ) -> Result<Judgement, String>;

    /// Plans the rollback of an order.
    async fn plan_rollback(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        reason: &str,
    ) -> Result<PlannedRollback, NoRollback>;

    /// Plans the rollback of one stage: of what it released. `None` when that is nothing.
    async fn plan_stage_rollback(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        stage: (NodeIndex, &str),
    ) -> Result<Option<PlannedRollback>, NoRollback>;
}

/// Why no rollback was planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRollback {
    /// There is nothing to go back to.
    #[error("{0}")]
    Nothing(String),
    /// What the order changed has been changed by a later one.
    #[error("{0}")]
    Superseded(String),
    /// Something that passes: it can be planned later.
    #[error("{0}")]
    NotNow(String),
}

impl NoRollback {
    /// Of an error that passes.
    pub(crate) fn not_now(error: impl std::error::Error) -> Self {
        Self::NotNow(crate::platform::chain(&error))
    }
}

/// Why an order did not take an action or a report.
#[derive(Debug, thiserror::Error)]
pub enum ActError {
    /// There is no such order.
    #[error("there is no order {0}")]
    NoSuchOrder(OrderId),
    /// The order's state does not allow it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Another order holds a server of the group.
    #[error("server {server} is held by the order {holder}: unlock the group when that has ended")]
    Held {
        /// The server.
        server: ServerId,
        /// Its holder.
        holder: OrderId,
    },
    /// It cannot be done now; nothing was changed, or it will be seen that it was. Try again.
    #[error("the order {0} cannot be changed right now: try again")]
    Busy(OrderId),
    /// A row could not be read.
    #[error("the order {id} could not be read")]
    Row {
        /// The order.
        id: OrderId,
        /// The cause.
        #[source]
        source: RowError,
    },
    /// The plan cannot be changed so.
    #[error(transparent)]
    Edit(#[from] BadEdit),
    /// The plan was changed since it was looked at.
    #[error("the plan was changed meanwhile: revision {now} runs")]
    Revised {
        /// The revision that runs.
        now: u32,
    },
    /// Its plan could not be read or written.
    #[error("the plan of order {id} could not be read or written")]
    Plan {
        /// The order.
        id: OrderId,
        /// The cause.
        #[source]
        source: PlanError,
    },
}

/// Why a plan could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The blob store failed, or the blob is gone.
    #[error("the blob store failed")]
    Blob(#[from] BlobError),
    /// It is not a plan.
    #[error("the plan's blob is not a plan")]
    Malformed(#[from] serde_json::Error),
    /// It was written by a later version.
    #[error(
        "the plan has schema {schema}, and this version reads {} at most: upgrade the server",
        Plan::SCHEMA
    )]
    TooNew {
        /// The plan's schema.
        schema: u32,
    },
}

/// The engine's parts, shared by its tasks.
pub(crate) struct Shared {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) blobs: Blobs,
    pub(crate) agents: Arc<dyn Agents>,
    pub(crate) planning: Arc<dyn Planning>,
    pub(crate) pools: Arc<dyn TrafficPools>,
    pub(crate) live: live::LiveOutput,
    /// How long an agent may be disconnected before the outcome of a step on its server counts as unknown.
    pub(crate) agent_lost_after: Duration,
    keeper: OnceLock<Keeper>,
    /// Held while weights are weighed and set: two changes never count on each other's members.
    pub(crate) weighing: tokio::sync::Mutex<()>,
    /// Servers of instances as they were read a moment ago: a large order asks for each of its servers.
    members: tokio::sync::Mutex<HashMap<InstanceId, (Instant, Members)>>,
    lease: Mutex<Option<Lease>>,
    /// Names this engine in the rows of orders that it drives.
    pub(crate) name: String,
    actors: Mutex<HashMap<OrderId, mpsc::Sender<Command>>>,
    tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

/// Drives orders. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    pub(crate) shared: Arc<Shared>,
}

/// The parts that an engine is made of.
pub struct EngineParts {
    /// Rows.
    pub store: Arc<dyn Store>,
    /// Plans.
    pub blobs: Blobs,
    /// Sessions.
    pub agents: Arc<dyn Agents>,
    /// Catalogue and plugins.
    pub planning: Arc<dyn Planning>,
    /// Load balancers.
    pub pools: Arc<dyn TrafficPools>,
    /// How long an agent may be disconnected before the outcome of a step on its server counts as unknown.
    pub agent_lost_after: Duration,
}

impl Engine {
    /// An engine that does nothing until [`Engine::start`].
    #[must_use]
    pub fn new(parts: EngineParts) -> Self {
        let EngineParts {
            store,
            blobs,
            agents,
            planning,
            pools,
            agent_lost_after,
        } = parts;
        let shared = Shared {
            store,
            blobs,
            agents,
            planning,
            pools,
            live: live::LiveOutput::default(),
            agent_lost_after,
            keeper: OnceLock::new(),
            weighing: tokio::sync::Mutex::new(()),
            members: tokio::sync::Mutex::default(),
            lease: Mutex::new(None),
            name: crate::ids::new_uuid().to_string(),
            actors: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Opens the safety envelope and takes up every order that is not finished.
    ///
    /// # Errors
    /// [`RowError`] when the store cannot be read.
    pub async fn start(&self) -> Result<(), RowError> {
        let shared = &self.shared;
        let lease = shared
            .store
            .lease(LEASE_TTL_MS)
            .await
            .map_err(|source| RowError::Store {
                key: "lease".to_owned(),
                source,
            })?;
        shared.hold(lease);
        let keep = shared.clone();
        let stop = shared.stop.clone();
        shared.tasks.spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(LEASE_TTL_MS / 3));
            loop {
                tokio::select! {
                    () = stop.cancelled() => break,
                    _ = ticks.tick() => {
                        keep.keep_lease().await;
                    }
                }
            }
        });
        let (keeper, task) = KeeperTask::open(
            shared.store.clone(),
            shared.agents.clone(),
            shared.pools.clone(),
        )
        .await?;
        shared.keeper.get_or_init(|| keeper);
        let stop = shared.stop.clone();
        shared.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task.run() => {}
            }
        });
        for entry in rows::read_all(&*shared.store, &rows::all_active()).await? {
            if let Some(id) = entry
                .key
                .segments()
                .next_back()
                .and_then(|id| id.parse().ok())
            {
                self.take_up(id);
            }
        }
        Ok(())
    }

    /// Ends every task of the engine and waits for them. Orders stay as they are and are taken up at the next start.
    pub async fn shutdown(&self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }

    /// Keeps a new order, not started. `with` is committed together with it: an idempotency record.
    ///
    /// # Errors
    /// [`CommitError`], a conflict when a precondition of `with` does not hold.
    pub async fn create(&self, order: &Order, plan: &Plan, with: Txn) -> Result<(), CommitError> {
        self.shared
            .store
            .commit(executor::new_order(order, plan).and(with))
            .await?;
        Ok(())
    }

    /// Keeps a new order that runs from the start, with one commit.
    ///
    /// # Errors
    /// As [`Engine::create`].
    pub async fn create_running(
        &self,
        order: Order,
        plan: &Plan,
        with: Txn,
    ) -> Result<(), CommitError> {
        let (id, rows) = executor::new_order_running(order, plan);
        self.shared.store.commit(rows.and(with)).await?;
        drop(self.take_up(id));
        Ok(())
    }

    /// A person acts on an order. Returns once it is durable. `with` is committed together with it: an idempotency record.
    ///
    /// # Errors
    /// [`ActError`].
    pub async fn act(
        &self,
        id: OrderId,
        action: Action,
        by: &str,
        with: Txn,
    ) -> Result<(), ActError> {
        if let Action::Unlock { node } = &action {
            self.take_locks_of(id, *node).await?;
        }
        self.send(id, Event::Act(action), by.to_owned(), with).await
    }

    /// A person changes an order's plan, of which the revision `of` was looked at. Returns once it is durable. `with` is
    /// committed together with it: an idempotency record.
    ///
    /// # Errors
    /// [`ActError::Edit`], [`ActError::Revised`], and those of [`Engine::act`].
    pub async fn revise(
        &self,
        id: OrderId,
        (of, edit): (u32, Edit),
        by: &str,
        with: Txn,
    ) -> Result<(), ActError> {
        let (reply, answer) = oneshot::channel();
        let asked = actor::Revise {
            edit,
            of,
            by: by.to_owned(),
            with,
            reply,
        };
        self.deliver(id, Command::Revise(Box::new(asked))).await?;
        answer.await.map_err(|_| ActError::Busy(id))?
    }

    /// A group can be unlocked once its servers are ours.
    async fn take_locks_of(&self, id: OrderId, node: NodeId) -> Result<(), ActError> {
        let shared = &self.shared;
        let found = rows::read_order(&*shared.store, id)
            .await
            .map_err(|source| ActError::Row { id, source })?;
        let Some((order, _)) = found else {
            return Err(ActError::NoSuchOrder(id));
        };
        if order.control != Control::Active {
            return Ok(());
        }
        let plan = shared
            .plan(order.plan)
            .await
            .map_err(|source| ActError::Plan { id, source })?;
        let Some(node) = plan.index_of(node) else {
            // The actor says so.
            return Ok(());
        };
        // What cannot be unlocked takes no lock: the actor says why.
        let rows = rows::read_nodes(&*shared.store, id)
            .await
            .map_err(|source| ActError::Row { id, source })?;
        let progress = Progress::of_rows(&plan, order.control, order.stalled, rows);
        if progress.node(node).locked.is_none() || progress.state(node).is_settled() {
            return Ok(());
        }
        match initialise::lock_node(shared, &plan, node, order.lock_owner).await {
            Ok(None) => Ok(()),
            Ok(Some((server, holder))) => Err(ActError::Held { server, holder }),
            Err(error) => {
                tracing::error!(order.id = %id, error = &error as &dyn std::error::Error, "locks could not be taken");
                Err(ActError::Busy(id))
            }
        }
    }

    /// Where a server of an instance is in the life of a release.
    ///
    /// # Errors
    /// [`RowError`].
    pub async fn release_state(
        &self,
        instance: InstanceId,
        server: ServerId,
    ) -> Result<ReleaseState, RowError> {
        let store = &*self.shared.store;
        if let Some(state) = states_of(store, instance).await?.0.get(&server) {
            return Ok(*state);
        }
        let installed: Option<(Manifest, _)> = rows::read(
            store,
            &rows::installed(instance, server),
            "what is installed",
        )
        .await?;
        Ok(if installed.is_some() {
            ReleaseState::Released
        } else {
            ReleaseState::AwaitingRelease
        })
    }

    /// Keeps and runs the rollback of an order that has ended. `with` is committed together with it.
    ///
    /// # Errors
    /// [`ActError`].
    pub async fn roll_back_ended(
        &self,
        of: OrderId,
        planned: PlannedRollback,
        with: Txn,
    ) -> Result<OrderId, ActError> {
        let store = &*self.shared.store;
        let found = rows::read_order(store, of)
            .await
            .map_err(|source| ActError::Row { id: of, source })?;
        let Some((mut parent, revision)) = found else {
            return Err(ActError::NoSuchOrder(of));
        };
        let (id, new) = executor::new_order_running(planned.order, &planned.plan);
        parent.rolled_back_by = Some(id);
        let link = Txn::new()
            .revision_is(rows::order(of), revision)
            .put(rows::order(of), rows::encode(&parent));
        match store.commit(new.and(link).and(with)).await {
            Ok(_) => {
                drop(self.take_up(id));
                Ok(id)
            }
            Err(error) => {
                tracing::warn!(order.id = %of, error = &error as &dyn std::error::Error, "a rollback order was not made");
                Err(ActError::Busy(of))
            }
        }
    }

    /// An order's header.
    ///
    /// # Errors
    /// [`RowError`].
    pub async fn order(&self, id: OrderId) -> Result<Option<Order>, RowError> {
        Ok(rows::read_order(&*self.shared.store, id)
            .await?
            .map(|(order, _)| order))
    }

    /// Where every node of an order is, as far as it is durable. `None` when there is no such order.
    ///
    /// # Errors
    /// [`ActError::Row`], [`ActError::Plan`].
    pub async fn progress(
        &self,
        id: OrderId,
    ) -> Result<Option<(Order, Arc<Plan>, Progress)>, ActError> {
        let store = &*self.shared.store;
        let found = rows::read_order(store, id)
            .await
            .map_err(|source| ActError::Row { id, source })?;
        let Some((order, _)) = found else {
            return Ok(None);
        };
        let plan = self
            .shared
            .plan(order.plan)
            .await
            .map_err(|source| ActError::Plan { id, source })?;
        let nodes = rows::read_nodes(store, id)
            .await
            .map_err(|source| ActError::Row { id, source })?;
        let progress = Progress::of_rows(&plan, order.control, order.stalled, nodes);
        Ok(Some((order, Arc::new(plan), progress)))
    }

    /// An agent reports how a task ended. Returns once that is durable, so that the agent may forget it.
    ///
    /// # Errors
    /// [`ActError`]; [`Refused::NotCurrent`] and [`Refused::Terminal`] when nobody waits for it any more.
    pub async fn report(
        &self,
        server: ServerId,
        task: TaskId,
        result: TaskResult,
    ) -> Result<(), ActError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Report {
            server,
            task,
            result: Box::new(result),
            reply,
        };
        self.deliver(task.order, command).await?;
        answer.await.map_err(|_| ActError::Busy(task.order))?
    }

    pub(crate) async fn send(
        &self,
        id: OrderId,
        event: Event,
        by: String,
        with: Txn,
    ) -> Result<(), ActError> {
        let (reply, answer) = oneshot::channel();
        self.deliver(
            id,
            Command::Event {
                event,
                by,
                with,
                reply: Some(reply),
            },
        )
        .await?;
        answer.await.map_err(|_| ActError::Busy(id))?
    }

    async fn deliver(&self, id: OrderId, mut command: Command) -> Result<(), ActError> {
        // An actor that ends just now hands the command back: the next one takes it.
        for _ in 0..3 {
            let sender = self.sender(id).await?;
            match sender.send(command).await {
                Ok(()) => return Ok(()),
                Err(returned) => command = returned.0,
            }
        }
        Err(ActError::Busy(id))
    }

    async fn sender(&self, id: OrderId) -> Result<mpsc::Sender<Command>, ActError> {
        if let Some(sender) = self.live(id) {
            return Ok(sender);
        }
        let found = rows::read_order(&*self.shared.store, id)
            .await
            .map_err(|source| ActError::Row { id, source })?;
        match found {
            None => Err(ActError::NoSuchOrder(id)),
            Some((order, _)) if order.state.is_terminal() => Err(Refused::Terminal.into()),
            Some(_) => Ok(self.take_up(id)),
        }
    }

    fn live(&self, id: OrderId) -> Option<mpsc::Sender<Command>> {
        let actors = self
            .shared
            .actors
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        actors
            .get(&id)
            .filter(|sender| !sender.is_closed())
            .cloned()
    }

    /// Starts the actor of an order unless it runs.
    pub(crate) fn take_up(&self, id: OrderId) -> mpsc::Sender<Command> {
        let mut actors = self
            .shared
            .actors
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = actors.get(&id).filter(|sender| !sender.is_closed()) {
            return sender.clone();
        }
        let (sender, commands) = mpsc::channel(QUEUE);
        actors.insert(id, sender.clone());
        drop(actors);
        let engine = self.clone();
        let back = sender.downgrade();
        self.shared.tasks.spawn(async move {
            // A task of its own: one that panics has stopped like one that failed.
            let run = actor::run(engine.clone(), id, commands, back);
            let ended = engine.shared.tasks.spawn(run).await;
            engine.forget(id);
            let error: Box<dyn std::error::Error + Send + Sync> = match ended {
                Ok(Ok(())) => return,
                Ok(Err(stopped)) => stopped.into(),
                Err(panicked) => panicked.into(),
            };
            tracing::error!(order.id = %id, error = &*error as &dyn std::error::Error, "an order stopped; it will be taken up again");
            engine.take_up_later(id);
        });
        sender
    }

    fn forget(&self, id: OrderId) {
        let mut actors = self
            .shared
            .actors
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if actors.get(&id).is_some_and(mpsc::Sender::is_closed) {
            actors.remove(&id);
        }
    }

    fn take_up_later(&self, id: OrderId) {
        let engine = self.clone();
        self.shared.tasks.spawn(async move {
            tokio::select! {
                () = engine.shared.stop.cancelled() => {}
                () = tokio::time::sleep(Duration::from_secs(1)) => drop(engine.take_up(id)),
            }
        });
    }
}

impl Shared {
    /// The keeper; the engine has started.
    pub(crate) fn keeper(&self) -> Option<&Keeper> {
        self.keeper.get()
    }

    /// The lease under which this engine owns orders.
    pub(crate) fn lease(&self) -> Option<Lease> {
        let lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        lease.clone()
    }

    fn hold(&self, lease: Lease) {
        let mut held = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        *held = Some(lease);
    }

    /// Keeps the lease, or takes a new one: a process that stood still for longer than the lease must not be one that
    /// never drives an order again. Orders that another server took up meanwhile are its: their headers tell.
    async fn keep_lease(&self) {
        let Some(lease) = self.lease() else { return };
        let Err(error) = lease.keep_alive().await else {
            return;
        };
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "the engine's lease was lost: it takes a new one"
        );
        match self.store.lease(LEASE_TTL_MS).await {
            Ok(lease) => self.hold(lease),
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the engine has no lease; it asks again"
                );
            }
        }
    }

    /// The servers of an instance, each with its cell, as they were within [`MEMBERS_FOR`]. No server on which an order works
    /// is bound, unbound or put into another cell meanwhile.
    pub(crate) async fn members(&self, instance: InstanceId) -> Result<Members, String> {
        // Held while they are read: whoever asks meanwhile needs the same.
        let mut known = self.members.lock().await;
        known.retain(|_, (read_at, _)| read_at.elapsed() < MEMBERS_FOR);
        if let Some((_, members)) = known.get(&instance) {
            return Ok(members.clone());
        }
        let members: Members = self.planning.members(instance).await?.into();
        known.insert(instance, (Instant::now(), members.clone()));
        Ok(members)
    }

    /// A plan by its digest.
    pub(crate) async fn plan(&self, digest: windlass_domain::Digest) -> Result<Plan, PlanError> {
        load_plan(&self.blobs, digest).await
    }
}

/// Where the servers of an instance are that take no part in serving because of an order; the others are as what is installed
/// on them says. And whether one of these orders has ended and is about to say how it leaves its servers: a moment later.
pub(crate) async fn states_of(
    store: &dyn Store,
    instance: InstanceId,
) -> Result<(BTreeMap<ServerId, ReleaseState>, bool), RowError> {
    let mut leaving = false;
    let mut over: HashMap<OrderId, bool> = HashMap::new();
    let mut states = BTreeMap::new();
    for entry in rows::read_all(store, &rows::unavailable_of(instance)).await? {
        let server = entry.key.segments().next_back();
        let Some(server) = server.and_then(|id| id.parse().ok()) else {
            continue;
        };
        let row: rows::Unavailable = rows::decode(&entry, "an unavailable server")?;
        if row.offline {
            states.insert(server, ReleaseState::Offline);
            continue;
        }
        let is_over = match over.get(&row.order) {
            Some(is_over) => *is_over,
            None => {
                let order = rows::read_order(store, row.order).await?;
                let has_ended = order.is_none_or(|(order, _)| order.state.is_terminal());
                let key = rows::active(row.order);
                let active = store.get(&key).await;
                let is_active = active
                    .map_err(|source| RowError::Store {
                        key: key.to_string(),
                        source,
                    })?
                    .is_some();
                leaving |= has_ended && is_active;
                let is_over = has_ended && !is_active;
                over.insert(row.order, is_over);
                is_over
            }
        };
        let state = if is_over {
            ReleaseState::ReleaseFailed
        } else {
            ReleaseState::Releasing
        };
        states.insert(server, state);
    }
    Ok((states, leaving))
}

/// The largest plan that is read: 1,000 servers in 20 applications with long scripts stay far below.
const PLAN_MAX_BYTES: u64 = 256 * 1024 * 1024;

/// Reads a plan by its digest.
///
/// # Errors
/// [`PlanError`].
pub async fn load_plan(blobs: &Blobs, digest: windlass_domain::Digest) -> Result<Plan, PlanError> {
    let digest = windlass_store::BlobDigest::from_bytes(*digest.as_bytes());
    let bytes = blobs.get_bytes(digest, PLAN_MAX_BYTES).await?;
    let plan: Plan = serde_json::from_slice(&bytes)?;
    if plan.schema > Plan::SCHEMA {
        return Err(PlanError::TooNew {
            schema: plan.schema,
        });
    }
    Ok(plan)
}

/// Stores a plan under its digest: its canonical JSON *is* the blob.
///
/// # Errors
/// [`PlanError`].
pub async fn store_json<T: serde::Serialize + Sync>(
    blobs: &Blobs,
    record: &T,
) -> Result<windlass_domain::Digest, PlanError> {
    let bytes = serde_json::to_value(record)?.to_string();
    let digest = blobs.put_bytes(bytes.into()).await?;
    Ok(windlass_domain::Digest::from_bytes(*digest.as_bytes()))
}
