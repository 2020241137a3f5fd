//! The engine with a simulated fleet: releases to their end, with failures, restarts and limits.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, atomic::AtomicU32, mpsc},
};

use windlass::engine::{ActError, Engine};
use windlass_domain::{
    Timestamp,
    id::{PoolId, ServerId},
    limits::{Amount, Limits},
    order::{Action, Order, OrderState},
    plan::Level,
    plugin::{
        NodeRole, OnFailure, RestoreWeight, RollbackScope, StrategyNode, StrategyNodeKind,
        StrategyPlan, StrategyUnit,
    },
    progress::NodeState,
    task::{Outcome, Task},
};
use windlass_store::{
    Blobs, EventKind, Key, Prefix, Revision, Store, Txn,
    memory::{self, MemoryOptions},
};
use windlass_tests::simulated::{Answer, Fleet, GivenPlans, Release, plan, server, uuid};

fn node(parent: Option<u32>, name: &str, role: NodeRole, kind: StrategyNodeKind) -> StrategyNode {
    StrategyNode {
        parent,
        name: name.to_owned(),
        role,
        rollback: RollbackScope::Order,
        kind,
    }
}

fn unit(parent: u32, number: u32) -> StrategyNode {
    let kind = StrategyNodeKind::Unit(StrategyUnit {
        application: "app".to_owned(),
        server: server(number).to_string(),
        restore: RestoreWeight::Remembered,
        healthy_for_ms: 0,
        health_deadline_ms: None,
    });
    node(
        Some(parent),
        &format!("server-{number}"),
        NodeRole::Plain,
        kind,
    )
}

/// Groups one after the other, the servers of each side by side.
fn groups(sizes: &[u32], max_failures: u32) -> StrategyPlan {
    let mut nodes = Vec::new();
    let mut next = 1;
    for (index, size) in sizes.iter().enumerate() {
        let group = u32::try_from(nodes.len()).expect("few groups");
        let kind = StrategyNodeKind::Parallel {
            max_in_flight: 0,
            max_failures,
        };
        nodes.push(node(
            None,
            &format!("group {}", index + 1),
            NodeRole::Group,
            kind,
        ));
        for _ in 0..*size {
            nodes.push(unit(group, next));
            next += 1;
        }
    }
    StrategyPlan {
        nodes,
        on_failure: OnFailure::Block,
        progress_deadline_ms: None,
    }
}

fn generous() -> Limits {
    Limits {
        max_unavailable: Amount::Percent(100),
        max_in_flight: 1000,
        min_healthy_members: 0,
        ..Limits::default()
    }
}

fn release(sizes: &[u32]) -> Release {
    Release {
        servers: sizes.iter().sum(),
        steps: 2,
        strategy: groups(sizes, 0),
        limits: generous(),
        on_failure: OnFailure::Block,
        pools: Vec::new(),
    }
}

async fn blobs_in(directory: &tempfile::TempDir) -> Blobs {
    Blobs::open_directory(directory.path().join("blobs"))
        .await
        .expect("a test directory")
}

fn given(servers: u32, blobs: &Blobs) -> GivenPlans {
    GivenPlans {
        reads: Mutex::default(),
        members: (1..=servers)
            .map(|number| (server(number), "cell-a".to_owned()))
            .collect(),
        rollback: Some(plan(release(&[1]))),
        not_now: AtomicU32::new(0),
        stage_rollbacks: std::collections::BTreeMap::new(),
        blobs: blobs.clone(),
    }
}

async fn fleet(directory: &tempfile::TempDir, servers: u32, answer: Arc<Answer>) -> Fleet {
    let blobs = blobs_in(directory).await;
    let planning = given(servers, &blobs);
    Fleet::start(
        memory::open(MemoryOptions::default()).expect("a store in memory"),
        blobs,
        planning,
        answer,
    )
    .await
}

fn all_good() -> Arc<Answer> {
    Arc::new(|_, _| Outcome::Succeeded)
}

#[tokio::test]
async fn a_release_of_two_groups_succeeds_and_runs_each_step_once() {
    let directory = tempfile::tempdir().unwrap();
    let fleet = fleet(&directory, 5, all_good()).await;
    let id = fleet.create(&plan(release(&[1, 4]))).await;
    fleet
        .engine
        .act(id, Action::Run, "test", Txn::new())
        .await
        .unwrap();
    let order = fleet.wait_ended(id).await;
    assert_eq!(order.state, OrderState::Succeeded, "{}", order.state_reason);
    assert_eq!(order.counts.succeeded, 5);
    let executed = fleet.executed.lock().unwrap().clone();
    // fetch, unpack, activate and two steps of the stack
    assert_eq!(executed.len(), 5 * 5);
    let ids: HashSet<_> = executed.iter().map(|(_, task)| task.id).collect();
    assert_eq!(ids.len(), executed.len());
    assert_eq!(
        executed[..5]
            .iter()
            .map(|(server, _)| *server)
            .collect::<HashSet<_>>(),
        [server(1)].into()
    );
    fleet.shutdown().await;
}

#[tokio::test]
async fn a_failure_blocks_after_the_first_group_and_a_retry_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let broken = Arc::new(Mutex::new(true));
    let is_broken = broken.clone();
    let answer: Arc<Answer> = Arc::new(move |on: ServerId, task| {
        let broken = *is_broken.lock().unwrap() && on == server(1) && task.id.node % 7 == 5;
        if broken {
            Outcome::Failed
        } else {
            Outcome::Succeeded
        }
    });
    let fleet = fleet(&directory, 3, answer).await;
    let id = fleet.create(&plan(release(&[1, 2]))).await;
    fleet
        .engine
        .act(id, Action::Run, "test", Txn::new())
        .await
        .unwrap();
    let order = fleet
        .wait_for(id, |order| order.state == OrderState::Blocked)
        .await;
    assert_eq!((order.counts.failed, order.counts.waiting), (1, 2));
    *broken.lock().unwrap() = false;
    fleet
        .engine
        .act(id, Action::Retry { node: 0 }, "test", Txn::new())
        .await
        .unwrap();
    assert_eq!(fleet.wait_ended(id).await.state, OrderState::Succeeded);
    fleet.shutdown().await;
}

#[tokio::test]
async fn a_failure_rolls_back_by_itself_where_the_plan_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let answer: Arc<Answer> = Arc::new(move |_, task| {
        // The first order's last step fails; the rollback order's does not.
        let mut seen = seen.lock().unwrap();
        seen.insert(task.id.order);
        if seen.len() == 1 && task.id.node % 7 == 0 {
            Outcome::Failed
        } else {
            Outcome::Succeeded
        }
    });
    let fleet = fleet(&directory, 3, answer).await;
    let id = fleet
        .create(&plan(Release {
            on_failure: OnFailure::RollBack,
            ..release(&[1, 2])
        }))
        .await;
    fleet
        .engine
        .act(id, Action::Run, "test", Txn::new())
        .await
        .unwrap();
    let order = fleet.wait_ended(id).await;
    assert_eq!(
        order.state,
        OrderState::RolledBack,
        "{}",
        order.state_reason
    );
    let rollback = fleet.wait_ended(order.rolled_back_by.unwrap()).await;
    assert_eq!(rollback.state, OrderState::Succeeded);
    fleet.shutdown().await;
}

#[tokio::test]
async fn a_rollback_that_cannot_be_planned_now_is_not_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let blobs = blobs_in(&directory).await;
    let mut planning = given(2, &blobs);
    planning.not_now = AtomicU32::new(2);
    let first = Mutex::new(None);
    let fails = Arc::new(move |_, task: &Task| {
        // The first order's last step fails; the rollback order's does not.
        let of_first = *first.lock().unwrap().get_or_insert(task.id.order) == task.id.order;
        if of_first && task.id.node.is_multiple_of(7) {
            Outcome::Failed
        } else {
            Outcome::Succeeded
        }
    });
    let store = memory::open(MemoryOptions::default()).unwrap();
    let fleet = Fleet::start(store, blobs, planning, fails).await;
    let broken = Release {
        on_failure: OnFailure::RollBack,
        ..release(&[1, 1])
    };
    let id = fleet.create(&plan(broken)).await;
    fleet
        .engine
        .act(id, Action::Run, "test", Txn::new())
        .await
        .unwrap();
    let order = fleet.wait_ended(id).await;
    assert_eq!(
        order.state,
        OrderState::RolledBack,
        "{}",
        order.state_reason
    );
    fleet.shutdown().await;
}

/// The row under a key, as JSON, changed.
async fn rewrite(fleet: &dyn Store, key: &Key, change: impl FnOnce(&mut serde_json::Value)) {
    let entry = fleet.get(key).await.expect("a read").expect("the row");
    let mut row = serde_json::from_slice(&entry.value).expect("JSON");
    change(&mut row);
    let value = serde_json::to_vec(&row).expect("JSON");
    fleet
        .commit(Txn::new().put(key.clone(), value))
        .await
        .expect("a write");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_that_ran_on_while_the_server_was_away_keeps_its_result() {
    let directory = tempfile::tempdir().unwrap();
    let store = memory::open(MemoryOptions::default()).unwrap();
    let blobs = blobs_in(&directory).await;
    // An agent whose step runs until `end` is dropped, and tells when it has begun.
    let (begun, begins) = mpsc::sync_channel(100);
    let running = move || {
        let (end, ends) = mpsc::sync_channel::<()>(1);
        let (begun, ends) = (Mutex::new(begun.clone()), Mutex::new(ends));
        let runs: Arc<Answer> = Arc::new(move |_, task: &Task| {
            begun.lock().unwrap().send(task.id).ok();
            assert!(ends.lock().unwrap().recv().is_err());
            Outcome::Succeeded
        });
        (end, runs)
    };
    let (end, runs_long) = running();
    let planning = given(1, &blobs);
    let fleet = Fleet::start(store.clone(), blobs.clone(), planning, runs_long).await;
    let id = fleet.create(&plan(release(&[1]))).await;
    let act =
        |engine: Engine, action| async move { engine.act(id, action, "test", Txn::new()).await };
    act(fleet.engine.clone(), Action::Run).await.unwrap();
    let task = tokio::task::spawn_blocking(move || begins.recv().unwrap())
        .await
        .unwrap();
    fleet.engine.shutdown().await;
    drop(end);
    fleet.shutdown().await;
    // Meanwhile two hours have passed: more than it may take to be delivered, and less than it may run.
    let node = [
        "default",
        "order-node",
        &id.to_string(),
        &windlass_store::sortable(u64::from(task.node)),
    ];
    let long_ago = Timestamp::from_unix_ms(windlass::clock::now().unix_ms() - 2 * 3600 * 1000);
    rewrite(&*store, &Key::from_segments(node).unwrap(), |row| {
        row["started_at"] = serde_json::to_value(long_ago).unwrap();
    })
    .await;
    let (end, still_runs) = running();
    let planning = given(1, &blobs);
    let fleet = Fleet::start(store, blobs, planning, still_runs).await;
    // Until the order is this engine's.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let unlock = Action::Unlock { node: 1 };
    while let Err(ActError::Busy(_)) = act(fleet.engine.clone(), unlock.clone()).await {
        assert!(
            std::time::Instant::now() < deadline,
            "the order is nobody's"
        );
        tokio::task::yield_now().await;
    }
    for _ in 0..20 {
        let lock = Action::Lock {
            node: 1,
            reason: String::new(),
        };
        act(fleet.engine.clone(), lock).await.unwrap();
        act(fleet.engine.clone(), Action::Unlock { node: 1 })
            .await
            .unwrap();
        let order = fleet.order(id).await;
        assert_eq!(order.state, OrderState::Running, "{}", order.state_reason);
    }
    drop(end);
    let order = fleet.wait_ended(id).await;
    assert_eq!(order.state, OrderState::Succeeded, "{}", order.state_reason);
    fleet.shutdown().await;
}

#[tokio::test]
async fn no_more_servers_are_unavailable_than_the_envelope_allows() {
    let directory = tempfile::tempdir().unwrap();
    let busy = Arc::new(Mutex::new((HashSet::new(), 0)));
    let seen = busy.clone();
    let answer: Arc<Answer> = Arc::new(move |server, task| {
        let mut busy = seen.lock().unwrap();
        busy.0.insert(server);
        busy.1 = busy.1.max(busy.0.len());
        if task.id.node % 6 == 1 {
            busy.0.remove(&server);
        }
        Outcome::Succeeded
    });
    let fleet = fleet(&directory, 8, answer).await;
    let mut watch = fleet
        .store
        .watch(&Prefix::everything(), Revision(0))
        .await
        .unwrap();
    let limits = Limits {
        max_unavailable: Amount::Count(2),
        ..generous()
    };
    // A strategy that plans all servers at once.
    let id = fleet
        .create(&plan(Release {
            limits,
            ..release(&[8])
        }))
        .await;
    fleet
        .engine
        .act(id, Action::Run, "test", Txn::new())
        .await
        .unwrap();
    assert_eq!(fleet.wait_ended(id).await.state, OrderState::Succeeded);
    assert!(busy.lock().unwrap().1 <= 2, "{:?}", busy.lock().unwrap());

    // When the order shows that it has ended, no server counts as taken out any more.
    let header = format!("default/order/{id}");
    let (mut taken, mut most) = (HashSet::new(), 0);
    loop {
        let event = watch.next().await.unwrap();
        let key = event.key.to_string();
        if key.starts_with("default/unavailable/") {
            match event.kind {
                EventKind::Put { .. } => taken.insert(key),
                EventKind::Deleted => taken.remove(&key),
            };
            most = most.max(taken.len());
        } else if key == header
            && let EventKind::Put { value, .. } = event.kind
        {
            let order: Order = serde_json::from_slice(&value).unwrap();
            if order.state.is_terminal() {
                break;
            }
        }
    }
    assert_eq!((taken, most), (HashSet::new(), 2));
    fleet.shutdown().await;
}

#[tokio::test]
async fn an_order_that_its_own_failed_server_holds_is_blocked_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let broken = Arc::new(Mutex::new(true));
    let is_broken = broken.clone();
    let answer: Arc<Answer> = Arc::new(move |on: ServerId, task| {
        let broken = *is_broken.lock().unwrap() && on == server(1) && task.id.node % 7 == 5;
        if broken {
            Outcome::Failed
        } else {
            Outcome::Succeeded
        }
    });
    let fleet = fleet(&directory, 3, answer).await;
    // Both the strategy and the order tolerate the failure; but the failed server is unavailable, and one is the most.
    let tolerant = || Release {
        strategy: groups(&[3], 1),
        limits: Limits {
            max_unavailable: Amount::Count(1),
            max_failures: Amount::Count(1),
            ..generous()
        },
        ..release(&[3])
    };
    let id = fleet.create(&plan(tolerant())).await;
    let act = async |action| fleet.engine.act(id, action, "test", Txn::new()).await;
    act(Action::Run).await.unwrap();
    let order = fleet
        .wait_for(id, |order| order.state == OrderState::Blocked)
        .await;
    for says in [
        "max_unavailable is 1 of 3",
        "server-1: this order works on it or left it broken",
        "retry what failed",
    ] {
        assert!(order.state_reason.contains(says), "{}", order.state_reason);
    }
    assert_eq!((order.counts.failed, order.counts.total()), (1, 3));
    // Going on without it does not make it serve: the seat stays taken, and the order says so.
    act(Action::Ignore { node: 0 }).await.unwrap();
    let order = fleet.order(id).await;
    assert_eq!(
        (order.state, order.counts.ignored),
        (OrderState::Blocked, 1)
    );
    act(Action::Cancel { node: None }).await.unwrap();
    let order = fleet.wait_ended(id).await;
    assert_eq!(
        (
            order.counts.waiting,
            order.counts.cancelled,
            order.counts.ignored
        ),
        (0, 2, 1)
    );
    // The next order mends the server first and is not held by what the one before it left.
    *broken.lock().unwrap() = false;
    let next = fleet.create(&plan(tolerant())).await;
    let mut ticks = tokio::time::interval(std::time::Duration::from_millis(5));
    while fleet
        .engine
        .act(next, Action::Run, "test", Txn::new())
        .await
        .is_err()
    {
        ticks.tick().await;
    }
    let order = fleet
        .wait_for(next, |order| {
            order.state.is_terminal() || order.state == OrderState::Blocked
        })
        .await;
    if order.state == OrderState::Blocked {
        // The locks of the order before were given back a moment too late: its group was locked.
        assert!(
            order.state_reason.contains("is locked"),
            "{}",
            order.state_reason
        );
        let unlock = Action::Unlock { node: 1 };
        while fleet
            .engine
            .act(next, unlock.clone(), "test", Txn::new())
            .await
            .is_err()
        {
            ticks.tick().await;
        }
    }
    let order = fleet.wait_ended(next).await;
    assert_eq!(
        (order.state, order.counts.succeeded),
        (OrderState::Succeeded, 3),
        "{}",
        order.state_reason
    );
    fleet.shutdown().await;
}

#[tokio::test]
async fn a_failed_server_that_is_retried_gives_its_seat_to_those_it_held() {
    let directory = tempfile::tempdir().unwrap();
    let broken = Arc::new(Mutex::new(true));
    let is_broken = broken.clone();
    let answer: Arc<Answer> = Arc::new(move |on: ServerId, task| {
        let broken = *is_broken.lock().unwrap() && on == server(1) && task.id.node % 7 == 5;
        if broken {
            Outcome::Failed
        } else {
            Outcome::Succeeded
        }
    });
    let fleet = fleet(&directory, 3, answer).await;
    let tolerant = Release {
        strategy: groups(&[3], 1),
        limits: Limits {
            max_unavailable: Amount::Count(1),
            max_failures: Amount::Count(1),
            ..generous()
        },
        ..release(&[3])
    };
    let id = fleet.create(&plan(tolerant)).await;
    let act = async |action| fleet.engine.act(id, action, "test", Txn::new()).await;
    act(Action::Run).await.unwrap();
    fleet
        .wait_for(id, |order| order.state == OrderState::Blocked)
        .await;
    *broken.lock().unwrap() = false;
    act(Action::Retry { node: 0 }).await.unwrap();
    let order = fleet.wait_ended(id).await;
    assert_eq!(
        (order.state, order.counts.succeeded),
        (OrderState::Succeeded, 3)
    );
    fleet.shutdown().await;
}

#[tokio::test]
async fn weights_are_remembered_set_to_zero_and_restored() {
    let directory = tempfile::tempdir().unwrap();
    let fleet = fleet(&directory, 2, all_good()).await;
    let pool = PoolId::from_uuid(uuid(9));
    use windlass::engine::traffic::TrafficPools as _;
    fleet.pools.set_weight(pool, server(1), 40).await.unwrap();
    let limits = Limits {
        min_healthy_members: 1,
        ..generous()
    };
    let id = fleet
        .create(&plan(Release {
            pools: vec![pool],
            limits,
            ..release(&[1, 1])
        }))
        .await;
    fleet
        .engine
        .act(id, Action::Run, "test", Txn::new())
        .await
        .unwrap();
    assert_eq!(fleet.wait_ended(id).await.state, OrderState::Succeeded);
    assert_eq!(
        fleet.pools.weights(pool).await.unwrap(),
        [(server(1), 40), (server(2), 100)]
    );
    fleet.shutdown().await;
}

#[tokio::test]
async fn a_second_order_on_the_same_server_is_locked_until_the_first_has_ended() {
    let directory = tempfile::tempdir().unwrap();
    let fleet = fleet(&directory, 1, all_good()).await;
    let gate = StrategyNodeKind::Gate {
        message: "look".to_owned(),
    };
    let mut waits = release(&[1]);
    waits
        .strategy
        .nodes
        .push(node(None, "confirm", NodeRole::Plain, gate));
    let first = fleet.create(&plan(waits)).await;
    fleet
        .engine
        .act(first, Action::Run, "test", Txn::new())
        .await
        .unwrap();
    fleet
        .wait_for(first, |order| {
            order.state == OrderState::AwaitingConfirmation
        })
        .await;
    let second = fleet.create(&plan(release(&[1]))).await;
    fleet
        .engine
        .act(second, Action::Run, "test", Txn::new())
        .await
        .unwrap();
    let blocked = fleet
        .wait_for(second, |order| order.state == OrderState::Blocked)
        .await;
    assert!(
        blocked.state_reason.contains(&first.to_string()),
        "{}",
        blocked.state_reason
    );
    let (_, tree, progress) = fleet.engine.progress(second).await.unwrap().unwrap();
    let group = tree
        .nodes
        .iter()
        .position(|node| node.level == Level::Group)
        .unwrap();
    let group = u32::try_from(group).unwrap();
    assert_eq!(progress.state(group), NodeState::Locked);
    let unlock = Action::Unlock { node: group };
    assert!(
        fleet
            .engine
            .act(second, unlock.clone(), "test", Txn::new())
            .await
            .is_err()
    );
    fleet
        .engine
        .act(first, Action::Confirm { node: None }, "test", Txn::new())
        .await
        .unwrap();
    fleet.wait_ended(first).await;
    // Locks are given back by the last effect, a moment after the end.
    let mut ticks = tokio::time::interval(std::time::Duration::from_millis(5));
    while fleet
        .engine
        .act(second, unlock.clone(), "test", Txn::new())
        .await
        .is_err()
    {
        ticks.tick().await;
    }
    assert_eq!(fleet.wait_ended(second).await.state, OrderState::Succeeded);
    fleet.shutdown().await;
}
