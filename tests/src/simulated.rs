//! A simulated fleet: agents that live in the test's own process.
//!
//! They do what real ones do as far as the engine can see: find tasks in the inbox rows, and report how they ended. What a
//! task answers is the test's to say. Beside them stands a planner that reads nothing: plans are given.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use windlass::engine::{
    AGENT_LOST_AFTER, Agents, Engine, EngineParts, NoRollback, PlannedRollback, Planning,
    store_json,
    traffic::{SimulatedPools, TrafficPools},
};
use windlass_domain::{
    Digest, Timestamp,
    expand::{self, PartInput, PlanInput, ServerInput},
    flow,
    id::{AppId, InstanceId, OrderId, PoolId, ServerId},
    inbox::{InboxEntry, JournalEpoch},
    limits::Limits,
    manifest::PluginRef,
    order::{Control, Order, OrderState, PlanRevision, Purpose},
    plan::{NodeIndex, Part, Plan, Read},
    plugin::{
        Judgement, LifecyclePlan, Observation, OnFailure, Phase, StackAction, StackStep,
        StrategyPlan, Verdict, Wishes,
    },
    progress::{Counts, Progress},
    task::{Outcome, PackageFormat, PackageRef, Script, Task, TaskId, TaskResult},
};
use windlass_store::{Blobs, Store};

/// What agents have executed, which survives the death of the server, as their journals do: how each task ended.
pub type Journal = Arc<Mutex<HashMap<TaskId, Outcome>>>;

/// Answers a task.
pub type Answer = dyn Fn(ServerId, &Task) -> Outcome + Send + Sync;

/// Ids that tests make from small numbers.
#[must_use]
pub fn uuid(number: u128) -> Uuid {
    Uuid::from_u128(0x0193_0000_0000_7000_8000_0000_0000_0000 | number)
}

/// The server with this number.
#[must_use]
pub fn server(number: u32) -> ServerId {
    ServerId::from_uuid(uuid(u128::from(number)))
}

/// The journal's epoch of every simulated agent.
#[must_use]
pub fn epoch() -> JournalEpoch {
    JournalEpoch::from_bytes([7; 16])
}

/// Sessions that are always up, except for servers that were taken away.
pub struct Sessions {
    /// Servers whose session was taken away, and when.
    offline: Mutex<HashMap<ServerId, Instant>>,
    nudges: mpsc::Sender<ServerId>,
}

impl Sessions {
    /// Sessions for an engine that is yet to be made, and what it will nudge: [`SimulatedAgents::of`] takes it.
    #[must_use]
    pub fn new() -> (Arc<Self>, mpsc::Receiver<ServerId>) {
        let (nudges, nudged) = mpsc::channel(100_000);
        let sessions = Self {
            offline: Mutex::default(),
            nudges,
        };
        (Arc::new(sessions), nudged)
    }

    /// Takes a server's session away, or gives it back.
    pub fn set_online(&self, server: ServerId, online: bool) {
        let mut offline = self.offline.lock().unwrap_or_else(PoisonError::into_inner);
        if online {
            offline.remove(&server)
        } else {
            offline.insert(server, Instant::now())
        };
    }
}

impl Agents for Sessions {
    fn current_epoch(&self, server: ServerId) -> Option<JournalEpoch> {
        self.is_online(server).then(epoch)
    }

    fn is_online(&self, server: ServerId) -> bool {
        !self
            .offline
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(&server)
    }

    fn silent_for(&self, server: ServerId) -> Option<Duration> {
        let offline = self.offline.lock().unwrap_or_else(PoisonError::into_inner);
        offline.get(&server).map(Instant::elapsed)
    }

    fn nudge(&self, server: ServerId) {
        // The fleet looks into every inbox at intervals too, so that a full queue loses nothing.
        let _full = self.nudges.try_send(server);
    }
}

/// A planner for plans that are given.
pub struct GivenPlans {
    /// What subjects are now.
    pub reads: Mutex<BTreeMap<String, Read>>,
    /// Servers of every instance, with their cells.
    pub members: Vec<(ServerId, String)>,
    /// The rollback's plan; `None`: there is nothing to roll back to.
    pub rollback: Option<Plan>,
    /// So many times a rollback cannot be planned now.
    pub not_now: AtomicU32,
    /// The rollbacks' plans of stages; a stage without one has nothing to bring back.
    pub stage_rollbacks: BTreeMap<NodeIndex, Plan>,
    /// Where plans are kept.
    pub blobs: Blobs,
}

#[async_trait]
impl Planning for GivenPlans {
    async fn reread(
        &self,
        _: &Plan,
        subjects: &[String],
    ) -> Result<BTreeMap<String, Read>, String> {
        let reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(subjects
            .iter()
            .filter_map(|subject| Some((subject.clone(), reads.get(subject)?.clone())))
            .collect())
    }

    async fn check_servers(&self, _: &Plan) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }

    async fn members(&self, _: InstanceId) -> Result<Vec<(ServerId, String)>, String> {
        Ok(self.members.clone())
    }

    async fn keep_tech_stacks(&self, _: &Order) -> Result<(), String> {
        Ok(())
    }

    async fn judge(
        &self,
        _: &Order,
        _: &Plan,
        _: &Progress,
        _: &str,
        _: Vec<Observation>,
    ) -> Result<Judgement, String> {
        Ok(Judgement {
            verdict: Verdict::GoOn,
            reason: String::new(),
        })
    }

    async fn plan_rollback(
        &self,
        of: &Order,
        _: &Plan,
        _: &Progress,
        reason: &str,
    ) -> Result<PlannedRollback, NoRollback> {
        let less = |left: u32| left.checked_sub(1);
        if self
            .not_now
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
            .is_ok()
        {
            return Err(NoRollback::NotNow("told so".to_owned()));
        }
        let plan = self
            .rollback
            .clone()
            .ok_or_else(|| NoRollback::Nothing("there is no earlier release".to_owned()))?;
        let purpose = Purpose::Rollback {
            of: of.id,
            reason: reason.to_owned(),
            core_plan_because: None,
            stage: None,
        };
        let mut order = new_order(&self.blobs, &plan, purpose).await;
        order.lock_owner = of.lock_owner;
        Ok(PlannedRollback {
            order,
            plan: Arc::new(plan),
        })
    }

    async fn plan_stage_rollback(
        &self,
        of: &Order,
        _: &Plan,
        _: &Progress,
        (stage, reason): (NodeIndex, &str),
    ) -> Result<Option<PlannedRollback>, NoRollback> {
        let Some(plan) = self.stage_rollbacks.get(&stage).cloned() else {
            return Ok(None);
        };
        let purpose = Purpose::Rollback {
            of: of.id,
            reason: reason.to_owned(),
            core_plan_because: None,
            stage: Some(stage),
        };
        let mut order = new_order(&self.blobs, &plan, purpose).await;
        order.lock_owner = of.lock_owner;
        Ok(Some(PlannedRollback {
            order,
            plan: Arc::new(plan),
        }))
    }
}

/// An engine with a simulated fleet around it.
pub struct Fleet {
    /// The engine.
    pub engine: Engine,
    /// Its store.
    pub store: Arc<dyn Store>,
    /// Its blobs.
    pub blobs: Blobs,
    /// Sessions.
    pub sessions: Arc<Sessions>,
    /// Pools.
    pub pools: Arc<SimulatedPools>,
    /// Tasks that were executed, in order.
    pub executed: Arc<Mutex<Vec<(ServerId, Task)>>>,
    agents: SimulatedAgents,
}

impl Fleet {
    /// Starts an engine on a store, and a fleet that answers as told.
    ///
    /// # Panics
    /// When the engine cannot start.
    pub async fn start(
        store: Arc<dyn Store>,
        blobs: Blobs,
        planning: GivenPlans,
        answer: Arc<Answer>,
    ) -> Self {
        Self::resume(store, blobs, planning, answer, Journal::default()).await
    }

    /// Likewise, with agents that know what they have executed.
    ///
    /// # Panics
    /// When the engine cannot start.
    pub async fn resume(
        store: Arc<dyn Store>,
        blobs: Blobs,
        planning: GivenPlans,
        answer: Arc<Answer>,
        journal: Journal,
    ) -> Self {
        let members = planning.members.clone();
        Self::with_planner(store, blobs, planning, members, answer, journal).await
    }

    /// Likewise, with a planner of the test's own.
    ///
    /// # Panics
    /// When the engine cannot start.
    pub async fn with_planner(
        store: Arc<dyn Store>,
        blobs: Blobs,
        planning: impl Planning + 'static,
        members: Vec<(ServerId, String)>,
        answer: Arc<Answer>,
        journal: Journal,
    ) -> Self {
        let pools = |pools: Arc<SimulatedPools>| pools as Arc<dyn TrafficPools>;
        Self::with_pools(store, blobs, planning, members, (answer, journal), pools).await
    }

    /// Likewise, with something between the engine and the simulated pools.
    ///
    /// # Panics
    /// When the engine cannot start.
    pub async fn with_pools(
        store: Arc<dyn Store>,
        blobs: Blobs,
        planning: impl Planning + 'static,
        members: Vec<(ServerId, String)>,
        (answer, journal): (Arc<Answer>, Journal),
        steered: impl FnOnce(Arc<SimulatedPools>) -> Arc<dyn TrafficPools>,
    ) -> Self {
        let lost_after = AGENT_LOST_AFTER;
        let answers = (answer, journal);
        Self::assemble(
            store, blobs, planning, members, answers, steered, lost_after,
        )
        .await
    }

    /// Likewise, with a time after which the outcome of a step on a disconnected server counts as unknown.
    ///
    /// # Panics
    /// When the engine cannot start.
    pub async fn with_lost_time(
        store: Arc<dyn Store>,
        blobs: Blobs,
        planning: GivenPlans,
        answer: Arc<Answer>,
        lost_after: Duration,
    ) -> Self {
        let members = planning.members.clone();
        let pools = |pools: Arc<SimulatedPools>| pools as Arc<dyn TrafficPools>;
        let answers = (answer, Journal::default());
        Self::assemble(store, blobs, planning, members, answers, pools, lost_after).await
    }

    async fn assemble(
        store: Arc<dyn Store>,
        blobs: Blobs,
        planning: impl Planning + 'static,
        members: Vec<(ServerId, String)>,
        (answer, journal): (Arc<Answer>, Journal),
        steered: impl FnOnce(Arc<SimulatedPools>) -> Arc<dyn TrafficPools>,
        agent_lost_after: Duration,
    ) -> Self {
        let (sessions, nudged) = Sessions::new();
        let pools = Arc::new(SimulatedPools::new(store.clone()));
        let engine = Engine::new(EngineParts {
            store: store.clone(),
            blobs: blobs.clone(),
            agents: sessions.clone(),
            planning: Arc::new(planning),
            pools: steered(pools.clone()),
            agent_lost_after,
        });
        let executed = Arc::new(Mutex::new(Vec::new()));
        let agents = SimulatedAgents::start(
            FleetTask {
                engine: engine.clone(),
                store: store.clone(),
                answer,
                executed: executed.clone(),
                tasks: TaskTracker::new(),
                journal,
                reported: HashSet::new(),
                sessions: Some(sessions.clone()),
            },
            nudged,
        );
        // What waits in inboxes is pushed when a session begins.
        for (server, _) in &members {
            sessions.nudge(*server);
        }
        engine.start().await.expect("the engine starts");
        Self {
            engine,
            store,
            blobs,
            sessions,
            pools,
            executed,
            agents,
        }
    }

    /// Ends everything but the store.
    pub async fn shutdown(self) {
        self.engine.shutdown().await;
        self.agents.shutdown().await;
    }

    /// Keeps a plan and an order for it.
    ///
    /// # Panics
    /// When they cannot be written.
    pub async fn create(&self, plan: &Plan) -> OrderId {
        let order = new_order(&self.blobs, plan, Purpose::Release).await;
        self.engine
            .create(&order, plan, windlass_store::Txn::new())
            .await
            .expect("the order is kept");
        order.id
    }

    /// The order's header.
    ///
    /// # Panics
    /// When there is none.
    pub async fn order(&self, id: OrderId) -> Order {
        self.engine
            .order(id)
            .await
            .expect("the header is read")
            .expect("there is an order")
    }

    /// Waits until the order is in a state; at most 60 s.
    ///
    /// # Panics
    /// With the last state, when the time is over.
    pub async fn wait_for(&self, id: OrderId, wanted: impl Fn(&Order) -> bool) -> Order {
        let mut last = None;
        let waited = tokio::time::timeout(Duration::from_secs(60), async {
            let mut ticks = tokio::time::interval(Duration::from_millis(5));
            loop {
                ticks.tick().await;
                let order = self.order(id).await;
                if wanted(&order) {
                    return order;
                }
                last = Some((order.state, order.state_reason, order.counts));
            }
        });
        match waited.await {
            Ok(order) => order,
            Err(_) => panic!("the order is still {last:?}"),
        }
    }

    /// Waits until the order has ended.
    pub async fn wait_ended(&self, id: OrderId) -> Order {
        self.wait_for(id, |order| order.state.is_terminal()).await
    }
}

/// The agents of a fleet, whatever engine they work for.
pub struct SimulatedAgents {
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl SimulatedAgents {
    /// Agents that answer every task as told, for an engine with these [`Sessions`].
    #[must_use]
    pub fn of(
        engine: &Engine,
        store: &Arc<dyn Store>,
        answer: Arc<Answer>,
        nudged: mpsc::Receiver<ServerId>,
    ) -> Self {
        let task = FleetTask {
            engine: engine.clone(),
            store: store.clone(),
            answer,
            executed: Arc::default(),
            tasks: TaskTracker::new(),
            journal: Journal::default(),
            reported: HashSet::new(),
            sessions: None,
        };
        Self::start(task, nudged)
    }

    fn start(task: FleetTask, nudged: mpsc::Receiver<ServerId>) -> Self {
        let (stop, tasks) = (CancellationToken::new(), task.tasks.clone());
        let stopped = stop.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = task.run(nudged) => {}
            }
        });
        Self { stop, tasks }
    }

    /// Ends them, when their engine has ended.
    pub async fn shutdown(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

struct FleetTask {
    engine: Engine,
    store: Arc<dyn Store>,
    answer: Arc<Answer>,
    executed: Arc<Mutex<Vec<(ServerId, Task)>>>,
    tasks: TaskTracker,
    journal: Journal,
    reported: HashSet<TaskId>,
    /// A server whose session was taken away reports nothing.
    sessions: Option<Arc<Sessions>>,
}

impl FleetTask {
    async fn run(mut self, mut nudged: mpsc::Receiver<ServerId>) {
        let mut batch = Vec::new();
        while nudged.recv_many(&mut batch, 256).await > 0 {
            let servers: HashSet<ServerId> = batch.drain(..).collect();
            for server in servers {
                self.serve(server).await;
            }
        }
    }

    async fn serve(&mut self, server: ServerId) {
        let prefix = windlass_store::Key::from_segments(["default", "inbox", &server.to_string()])
            .expect("a server id is a segment")
            .below();
        // A server that died answers no more.
        let Ok(page) = self.store.scan(&prefix, None, 100).await else {
            return;
        };
        for entry in page.entries {
            let entry: InboxEntry = serde_json::from_slice(&entry.value).expect("an inbox entry");
            let known = self
                .journal
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get(&entry.task.id)
                .copied();
            let outcome = match known {
                // An execution ends as it does, revoked or not.
                Some(_) if !self.reported.insert(entry.task.id) && !entry.revoked => continue,
                Some(outcome) => outcome,
                None if entry.revoked => Outcome::Revoked,
                None => {
                    self.reported.insert(entry.task.id);
                    self.executed
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((server, entry.task.clone()));
                    let outcome = (self.answer)(server, &entry.task);
                    self.journal
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .insert(entry.task.id, outcome);
                    outcome
                }
            };
            let sessions = self.sessions.as_ref();
            if sessions.is_some_and(|sessions| !sessions.is_online(server)) {
                continue;
            }
            let engine = self.engine.clone();
            let task = entry.task.id;
            self.tasks.spawn(async move {
                let result = TaskResult {
                    outcome,
                    exit_code: Some(i32::from(outcome != Outcome::Succeeded)),
                    output: "done\n".to_owned(),
                    dropped_bytes: 0,
                    message: String::new(),
                    fault: None,
                    started_at: None,
                    finished_at: Timestamp::from_unix_ms(1_700_000_000_000),
                };
                // An engine that stops does not take reports: the next one gets them again.
                drop(engine.report(server, task, result).await);
            });
        }
    }
}

/// What a simulated release is made of.
pub struct Release {
    /// Servers.
    pub servers: u32,
    /// Steps of the stack per server: the first of them is the start.
    pub steps: u32,
    /// The strategy's plan for these applications' only application, `app`.
    pub strategy: StrategyPlan,
    /// The envelope.
    pub limits: Limits,
    /// What a failure does.
    pub on_failure: OnFailure,
    /// Pools of the application.
    pub pools: Vec<PoolId>,
}

/// Expands a simulated release.
///
/// # Panics
/// When the strategy's plan is not accepted.
#[must_use]
pub fn plan(release: Release) -> Plan {
    plan_in_cells(release, |_| "cell-a".to_owned(), |_| true)
}

/// Expands a simulated release over servers in the cells that are given; of those that are not released traffic alone is moved.
///
/// # Panics
/// When the strategy's plan is not accepted.
#[must_use]
pub fn plan_in_cells(
    release: Release,
    cell: impl Fn(u32) -> String,
    is_released: impl Fn(u32) -> bool,
) -> Plan {
    let Release {
        servers,
        steps,
        mut strategy,
        limits,
        on_failure,
        pools,
    } = release;
    strategy.on_failure = on_failure;
    let step = |number: u32| StackStep {
        phase: if number == 0 {
            Phase::Start
        } else {
            Phase::Check
        },
        name: format!("step-{number}"),
        action: StackAction::Script(Script {
            interpreter: vec!["/bin/sh".to_owned()],
            text: "true".to_owned(),
            working_dir: None,
        }),
        run_as: None,
        env: BTreeMap::new(),
        timeout_ms: 60_000,
        retries: 0,
        repeatable: false,
    };
    let part = Part {
        key: "app".to_owned(),
        app: AppId::from_uuid(uuid(1)),
        instance: InstanceId::from_uuid(uuid(1)),
        package: Some(PackageRef {
            digest: Digest::of(b"package"),
            size_bytes: 7,
            format: PackageFormat::Plain,
            file_name: "app".to_owned(),
            version: "1.0.0".to_owned(),
        }),
        stack: Some(PluginRef {
            name: "simulated".to_owned(),
            version: semver::Version::new(1, 0, 0),
            digest: Digest::of(b""),
        }),
        pools,
        env: BTreeMap::new(),
        prepare: Vec::new(),
        stop: Vec::new(),
        start: Vec::new(),
        check: Vec::new(),
    };
    let input = PlanInput {
        strategy: None,
        limits,
        drain_deadline_ms: 1000,
        delivery_deadline_ms: 60_000,
        parts: vec![PartInput {
            part,
            steps: LifecyclePlan {
                steps: (0..steps).map(step).collect(),
                server_env: BTreeMap::new(),
            },
            approved: Wishes::default(),
            flow: flow::release(),
            files: None,
            from_cache: false,
            only_traffic: (1..=servers)
                .filter(|number| !is_released(*number))
                .map(server)
                .collect(),
            servers: (1..=servers)
                .filter(|number| is_released(*number))
                .map(|number| ServerInput {
                    id: server(number),
                    name: format!("server-{number}"),
                    cell: cell(number),
                    env: BTreeMap::new(),
                    installed: None,
                    drained_by: None,
                    reads: Vec::new(),
                })
                .collect(),
        }],
        reads: BTreeMap::new(),
    };
    expand::expand(input, &strategy).expect("the plan is accepted")
}

/// An order's header for a plan, whose blob is stored.
///
/// # Panics
/// When the blob cannot be written.
pub async fn new_order(blobs: &Blobs, plan: &Plan, purpose: Purpose) -> Order {
    let digest = store_json(blobs, plan).await.expect("the plan is kept");
    let at = windlass::clock::now();
    let id = OrderId::from_uuid(windlass::ids::new_uuid());
    Order {
        schema: Order::SCHEMA,
        id,
        workspace: "simulated".to_owned(),
        title: "simulated".to_owned(),
        purpose,
        state: OrderState::NotStarted,
        state_reason: String::new(),
        strategy: String::new(),
        plan: digest,
        revisions: vec![PlanRevision {
            revision: 1,
            digest,
            author: "test".to_owned(),
            at,
            difference: String::new(),
        }],
        spec: digest,
        counts: Counts::default(),
        control: Control::NotStarted,
        stalled: false,
        lock_owner: id,
        last_event: 0,
        rolled_back_by: None,
        rollback_asked: None,
        server_count: u32::try_from(plan.units.len()).unwrap_or(u32::MAX),
        created_by: "test".to_owned(),
        created_at: at,
        started_at: None,
        finished_at: None,
        last_progress_at: None,
        notify: true,
        tech_stacks: Vec::new(),
    }
}
