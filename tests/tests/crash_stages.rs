//! The server dies at every commit boundary of a blue-green release, of its rollback, and of the rollback of one of its
//! steps, and is started again.
//!
//! One process: the store stops answering at the chosen commit, before or after it is durable, and the engine with it;
//! another engine goes on with what is durable. Agents are simulated and keep their journals. Whatever the engine went
//! through, each task ran exactly once, the order ends as it should, and weights are right. (`crash_server.rs` kills real
//! processes; what is tried here is every boundary of the longest order that there is.)

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::Notify;
use windlass_domain::{
    id::{OrderId, PoolId, ServerId},
    limits::{Amount, Limits},
    order::{Action, OrderState},
    plan::{Level, NodeIndex, Plan},
    plugin::{
        NodeRole, OnFailure, RestoreWeight, RollbackScope, ShiftWeight, StrategyNode,
        StrategyNodeKind, StrategyPlan, StrategyUnit,
    },
    progress::{NodeState, Progress, StageRollback},
    task::{Outcome, TaskId},
};
use windlass_store::{
    Blobs, CommitError, Entry, Key, Lease, Page, Prefix, Revision, Store, StoreError, Txn, Watch,
    WatchError,
    memory::{self, MemoryOptions},
};
use windlass_tests::simulated::{Fleet, GivenPlans, Journal, Release, plan_in_cells, server, uuid};

/// Runs that go on side by side: most of a run is waiting for a moment.
const LANES: usize = 6;

// ---------------------------------------------------------------------------------------------- a store that dies

/// When the store dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Death {
    /// The commit is not made.
    Before,
    /// It is durable, and nobody is told.
    After,
}

struct Mortal {
    inner: Arc<dyn Store>,
    /// Commits until the one that kills it; below 0: dead.
    left: AtomicI64,
    death: Death,
    died: Notify,
    leases: Mutex<Vec<Lease>>,
}

impl Mortal {
    fn new(inner: Arc<dyn Store>, lives: i64, death: Death) -> Arc<Self> {
        Arc::new(Self {
            inner,
            left: AtomicI64::new(lives),
            death,
            died: Notify::new(),
            leases: Mutex::default(),
        })
    }

    fn is_dead(&self) -> bool {
        self.left.load(Ordering::SeqCst) < 0
    }

    fn alive(&self) -> Result<(), StoreError> {
        if self.is_dead() {
            Err(StoreError::Closed)
        } else {
            Ok(())
        }
    }

    /// The rows of a process go with it.
    async fn bury(&self) {
        let leases = std::mem::take(&mut *self.leases.lock().expect("nobody panicked with it"));
        for lease in leases {
            lease.revoke().await.expect("the lease is revoked");
        }
    }
}

#[async_trait]
impl Store for Mortal {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        self.alive()?;
        self.inner.get(key).await
    }

    async fn scan(
        &self,
        prefix: &Prefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        self.alive()?;
        self.inner.scan(prefix, after, limit).await
    }

    async fn scan_reverse(
        &self,
        prefix: &Prefix,
        before: Option<&Key>,
        limit: usize,
    ) -> Result<Page, StoreError> {
        self.alive()?;
        self.inner.scan_reverse(prefix, before, limit).await
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, CommitError> {
        let left = self.left.fetch_sub(1, Ordering::SeqCst);
        if left > 0 {
            return self.inner.commit(txn).await;
        }
        if left == 0 {
            if self.death == Death::After {
                drop(self.inner.commit(txn).await);
            }
            self.died.notify_one();
        }
        Err(StoreError::Closed.into())
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch, WatchError> {
        self.inner.watch(prefix, from).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.alive()?;
        self.inner.revision().await
    }

    async fn lease(&self, ttl_ms: u64) -> Result<Lease, StoreError> {
        self.alive()?;
        let lease = self.inner.lease(ttl_ms).await?;
        self.leases
            .lock()
            .expect("nobody panicked with it")
            .push(lease.clone());
        Ok(lease)
    }

    async fn close(&self) -> Result<(), StoreError> {
        self.inner.close().await
    }
}

// ---------------------------------------------------------------------------------------------- the order

/// Blue is server 1, green server 2.
fn cell(number: u32) -> String {
    if number == 1 { "blue" } else { "green" }.to_owned()
}

fn pool() -> PoolId {
    PoolId::from_uuid(uuid(77))
}

fn node(
    parent: Option<u32>,
    name: &str,
    role: NodeRole,
    rollback: RollbackScope,
    kind: StrategyNodeKind,
) -> StrategyNode {
    StrategyNode {
        parent,
        name: name.to_owned(),
        role,
        rollback,
        kind,
    }
}

fn leaf(parent: Option<u32>, name: &str, kind: StrategyNodeKind) -> StrategyNode {
    node(parent, name, NodeRole::Plain, RollbackScope::Order, kind)
}

fn all_to(number: u32) -> StrategyNodeKind {
    StrategyNodeKind::Share {
        application: "app".to_owned(),
        servers: vec![server(number).to_string()],
        percent: 100,
    }
}

fn release_of(number: u32) -> StrategyNodeKind {
    StrategyNodeKind::Unit(StrategyUnit {
        application: "app".to_owned(),
        server: server(number).to_string(),
        restore: RestoreWeight::Remembered,
        healthy_for_ms: 0,
        health_deadline_ms: None,
    })
}

fn as_before() -> StrategyNodeKind {
    let weight = |number| (server(number).to_string(), ShiftWeight::Remembered);
    StrategyNodeKind::Shift {
        application: "app".to_owned(),
        weights: vec![weight(1), weight(2)],
    }
}

fn gate() -> StrategyNodeKind {
    StrategyNodeKind::Gate {
        message: "look".to_owned(),
    }
}

/// The nodes that the shipped strategy `blue-green` plans for one application with one server in each cell.
fn blue_green() -> StrategyPlan {
    let mut nodes = Vec::new();
    let mut stage = |name: &str, rollback, kinds: Vec<(&str, StrategyNodeKind)>| {
        let parent = u32::try_from(nodes.len()).expect("a small plan");
        nodes.push(node(
            None,
            name,
            NodeRole::Stage,
            rollback,
            StrategyNodeKind::Sequence,
        ));
        nodes.extend(
            kinds
                .into_iter()
                .map(|(name, kind)| leaf(Some(parent), name, kind)),
        );
    };
    stage(
        "1 cut traffic",
        RollbackScope::Order,
        vec![("to blue", all_to(1)), ("confirm", gate())],
    );
    stage(
        "2 release green",
        RollbackScope::Order,
        vec![
            ("to blue", all_to(1)),
            ("green", release_of(2)),
            ("confirm", gate()),
        ],
    );
    stage(
        "3 switch traffic",
        RollbackScope::Order,
        vec![("to green", all_to(2)), ("confirm", gate())],
    );
    stage(
        "4 release blue",
        RollbackScope::Stage,
        vec![
            ("to green", all_to(2)),
            ("blue", release_of(1)),
            ("confirm", gate()),
        ],
    );
    stage(
        "5 restore traffic",
        RollbackScope::Nothing,
        vec![("as before", as_before())],
    );
    strategy(nodes)
}

fn strategy(nodes: Vec<StrategyNode>) -> StrategyPlan {
    StrategyPlan {
        nodes,
        on_failure: OnFailure::Block,
        progress_deadline_ms: None,
    }
}

fn release(servers: std::ops::RangeInclusive<u32>, strategy: StrategyPlan) -> Plan {
    let release = Release {
        servers: *servers.end(),
        steps: 1,
        strategy,
        limits: Limits {
            max_unavailable: Amount::Percent(100),
            ..Limits::default()
        },
        on_failure: OnFailure::Block,
        pools: vec![pool()],
    };
    plan_in_cells(release, cell, |number| servers.contains(&number))
}

/// A canary of one server of two.
fn judged() -> Plan {
    let share = StrategyNodeKind::Share {
        application: "app".to_owned(),
        servers: vec![server(2).to_string()],
        percent: 20,
    };
    let judge = StrategyNodeKind::Judge {
        stage: "app 20".to_owned(),
        window_ms: 20,
    };
    release(
        2..=2,
        strategy(vec![
            leaf(None, "new", release_of(2)),
            leaf(None, "20 %", share),
            leaf(None, "judge", judge),
            leaf(None, "as before", as_before()),
        ]),
    )
}

/// What the core plans for the rollback of the order once green is released.
fn rollback_of_green() -> Plan {
    release(
        2..=2,
        strategy(vec![
            leaf(None, "traffic away", all_to(1)),
            leaf(None, "green", release_of(2)),
            leaf(None, "as before", as_before()),
        ]),
    )
}

/// What it plans for the rollback of step 2: its traffic is taken back before.
fn rollback_of_step_2() -> Plan {
    release(2..=2, strategy(vec![leaf(None, "green", release_of(2))]))
}

// ---------------------------------------------------------------------------------------------- what a person does

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Story {
    /// Every step is confirmed.
    ToTheEnd,
    /// The order is rolled back in step 3, after traffic was shifted by hand in step 2.
    RolledBackInStep3,
    /// Step 2 is rolled back after traffic was shifted by hand, run again, and all is confirmed.
    Step2Again,
    /// No blue-green release: one server gets a share of the traffic, and figures are collected before it gets all.
    Judged,
}

impl Story {
    fn plan(self) -> Plan {
        match self {
            Self::ToTheEnd | Self::RolledBackInStep3 | Self::Step2Again => {
                release(1..=2, blue_green())
            }
            Self::Judged => judged(),
        }
    }
}

fn stage(plan: &Plan, name: &str) -> NodeIndex {
    let found = plan
        .nodes
        .iter()
        .position(|node| node.level == Level::Stage && node.name.starts_with(name));
    u32::try_from(found.expect("the stage")).expect("a small plan")
}

/// What the person does next, if anything.
fn next(story: Story, plan: &Plan, progress: &Progress, state: OrderState) -> Option<Action> {
    if state == OrderState::NotStarted {
        return Some(Action::Run);
    }
    if story == Story::Judged {
        return None;
    }
    let second = stage(plan, "2");
    let third = stage(plan, "3");
    let confirm = Action::Confirm { node: None };
    let shift = Action::ShiftCell {
        cell: "green".to_owned(),
        percent: 20,
    };
    if state != OrderState::AwaitingConfirmation {
        return None;
    }
    let waits = |stage| progress.state(stage) == NodeState::AwaitingConfirmation;
    let shifted = progress.node(0).edit.is_some();
    let again = progress
        .children(second)
        .iter()
        .any(|child| progress.node(*child).again);
    match story {
        Story::ToTheEnd => Some(confirm),
        Story::RolledBackInStep3 if waits(second) && !shifted => Some(shift),
        Story::RolledBackInStep3 if waits(third) => Some(Action::RollBack {
            reason: "bad".to_owned(),
            parameters: None,
        }),
        Story::Step2Again if progress.node(second).rollback == Some(StageRollback::Done) => {
            Some(Action::RunAgain { node: second })
        }
        Story::Step2Again if waits(second) && !again && !shifted => Some(shift),
        Story::Step2Again if waits(second) && !again => Some(Action::RollBackStage {
            node: second,
            reason: "bad".to_owned(),
        }),
        Story::RolledBackInStep3 | Story::Step2Again => Some(confirm),
        Story::Judged => None,
    }
}

// ---------------------------------------------------------------------------------------------- runs

struct Run {
    inner: Arc<dyn Store>,
    blobs: Blobs,
    journal: Journal,
    executed: Vec<(ServerId, TaskId)>,
    _directory: tempfile::TempDir,
}

impl Run {
    async fn new(story: Story) -> (Self, OrderId) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let blobs = Blobs::open_directory(directory.path().join("blobs"))
            .await
            .expect("blobs open");
        let inner = memory::open(MemoryOptions::default()).expect("an empty store opens");
        let run = Self {
            inner,
            blobs,
            journal: Journal::default(),
            executed: Vec::new(),
            _directory: directory,
        };
        let fleet = run.fleet(run.inner.clone()).await;
        let id = fleet.create(&story.plan()).await;
        fleet.shutdown().await;
        (run, id)
    }

    async fn fleet(&self, store: Arc<dyn Store>) -> Fleet {
        let plan = release(1..=2, blue_green());
        let planning = GivenPlans {
            reads: Mutex::default(),
            members: (1..=2)
                .map(|number| (server(number), cell(number)))
                .collect(),
            rollback: Some(rollback_of_green()),
            not_now: std::sync::atomic::AtomicU32::new(0),
            stage_rollbacks: BTreeMap::from([(stage(&plan, "2"), rollback_of_step_2())]),
            blobs: self.blobs.clone(),
        };
        let all_good = Arc::new(|_, _: &_| Outcome::Succeeded);
        Fleet::resume(
            store,
            self.blobs.clone(),
            planning,
            all_good,
            self.journal.clone(),
        )
        .await
    }

    /// Lets one engine live until the order is over or its store dies. Says how many commits it made.
    async fn live(&mut self, id: OrderId, story: Story, lives: i64, death: Death) -> Option<i64> {
        let store = Mortal::new(self.inner.clone(), i64::MAX, death);
        let fleet = self.fleet(store.clone()).await;
        store.left.store(lives, Ordering::SeqCst);
        let over = tokio::select! {
            () = store.died.notified() => None,
            () = drive(&fleet, id, story) => Some(lives - store.left.load(Ordering::SeqCst)),
        };
        self.executed.extend(
            fleet
                .executed
                .lock()
                .expect("nobody panicked with it")
                .iter()
                .map(|(server, task)| (*server, task.id)),
        );
        store.left.store(-1, Ordering::SeqCst);
        fleet.shutdown().await;
        store.bury().await;
        over
    }

    async fn check(&self, id: OrderId, story: Story, what: &str) {
        let fleet = self.fleet(self.inner.clone()).await;
        let order = fleet.order(id).await;
        let expected = match story {
            Story::ToTheEnd | Story::Step2Again | Story::Judged => OrderState::Succeeded,
            Story::RolledBackInStep3 => OrderState::RolledBack,
        };
        assert_eq!(order.state, expected, "{what}: {}", order.state_reason);
        for number in [1, 2] {
            let weight = {
                use windlass::engine::traffic::TrafficPools as _;
                fleet
                    .pools
                    .weight(pool(), server(number))
                    .await
                    .expect("a simulated pool answers")
            };
            assert_eq!(weight, 100, "{what}: the weight of server {number}");
        }
        let once: BTreeSet<TaskId> = self.executed.iter().map(|(_, task)| *task).collect();
        assert_eq!(once.len(), self.executed.len(), "{what}: a task ran twice");
        let mut times: BTreeMap<(OrderId, NodeIndex), u32> = BTreeMap::new();
        for (_, task) in &self.executed {
            *times.entry((task.order, task.node)).or_default() += 1;
        }
        let plan = release(1..=2, blue_green());
        let second = stage(&plan, "2");
        let third = stage(&plan, "3");
        for ((order, node), times) in &times {
            let twice =
                story == Story::Step2Again && *order == id && (second..third).contains(node);
            assert_eq!(
                *times,
                1 + u32::from(twice),
                "{what}: node {node} of {order}"
            );
        }
        // fetch, unpack, activate, start: of each server, and of what was brought back or released again.
        let servers = match story {
            Story::ToTheEnd | Story::RolledBackInStep3 => 2,
            Story::Judged => 1,
            Story::Step2Again => 4,
        };
        assert_eq!(self.executed.len(), 4 * servers, "{what}: {times:?}");
        fleet.shutdown().await;
    }
}

/// Does what the person of a story does until the order is over.
async fn drive(fleet: &Fleet, id: OrderId, story: Story) {
    let mut ticks = tokio::time::interval(Duration::from_millis(2));
    loop {
        ticks.tick().await;
        let Ok(Some((order, plan, progress))) = fleet.engine.progress(id).await else {
            continue;
        };
        if order.state.is_terminal() {
            // What is left to be done after the end is part of it: locks, and the row of unfinished orders.
            let rest = fleet.store.scan(&active(), None, 10).await;
            if rest.is_ok_and(|rest| rest.entries.is_empty()) {
                return;
            }
            continue;
        }
        if let Some(action) = next(story, &plan, &progress, order.state) {
            // It may have been done by the time that it is asked for.
            drop(fleet.engine.act(id, action, "test", Txn::new()).await);
        }
    }
}

fn active() -> Prefix {
    Key::from_segments(["default", "order-active"])
        .expect("a key")
        .below()
}

async fn at_every_boundary(story: Story) {
    let (mut run, id) = Run::new(story).await;
    let commits = run.live(id, story, i64::MAX, Death::Before).await;
    let commits = commits.expect("nobody dies in the first run");
    run.check(id, story, "without a death").await;
    println!("{story:?}: {commits} commits");
    assert!(commits > 20, "{commits}");
    let boundaries: Vec<(i64, Death)> = (0..commits)
        .flat_map(|at| [(at, Death::Before), (at, Death::After)])
        .collect();
    let boundaries = Arc::new(Mutex::new(boundaries));
    let mut lanes = tokio::task::JoinSet::new();
    for _ in 0..LANES {
        let boundaries = boundaries.clone();
        lanes.spawn(async move {
            loop {
                let Some((at, death)) = boundaries.lock().expect("nobody panicked with it").pop()
                else {
                    return;
                };
                let what = format!("{story:?}, death {death:?} commit {at}");
                let (mut run, id) = Run::new(story).await;
                let whole = async {
                    // The point may lie behind the end: commits are folded as they come.
                    if run.live(id, story, at, death).await.is_none() {
                        let over = run.live(id, story, i64::MAX, Death::Before).await;
                        over.expect("nobody dies in the second life");
                    }
                    run.check(id, story, &what).await;
                };
                tokio::time::timeout(Duration::from_secs(60), whole)
                    .await
                    .unwrap_or_else(|_| panic!("{what}: never over"));
            }
        });
    }
    while let Some(done) = lanes.join_next().await {
        done.expect("a lane");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blue_green_release_survives_a_death_at_every_commit() {
    at_every_boundary(Story::ToTheEnd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_rollback_survives_a_death_at_every_commit() {
    at_every_boundary(Story::RolledBackInStep3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rollback_of_a_step_survives_a_death_at_every_commit() {
    at_every_boundary(Story::Step2Again).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_of_figures_survives_a_death_at_every_commit() {
    at_every_boundary(Story::Judged).await;
}
