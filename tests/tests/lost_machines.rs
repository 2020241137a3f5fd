//! Machines that die while an order works on them: the order is free to go on, to be rolled back or to end.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use serde_json::json;
use tokio::task::JoinSet;
use windlass_domain::{
    Timestamp,
    id::OrderId,
    limits::{Amount, Limits},
    order::{Action, Order, OrderState},
    plan::NodeKind,
    plugin::{
        NodeRole, OnFailure, RestoreWeight, RollbackScope, StrategyNode, StrategyNodeKind,
        StrategyPlan, StrategyUnit,
    },
    task::{Outcome, TaskResult},
};
use windlass_store::{
    Blobs, Key, Txn,
    memory::{self, MemoryOptions},
};
use windlass_tests::{
    host::{Setup, TestHost, eventually, text},
    scene::{Scene, act, nodes, nodes_when, step},
    simulated::{Fleet, GivenPlans, Release, Sessions, plan, server},
};

const LOST_AFTER: Duration = Duration::from_millis(300);
/// Tasks of a server's run: fetch, unpack, activate, start, check.
const TASKS: usize = 5;

fn one_per_group(servers: u32) -> Release {
    let node = |parent, name: String, role, kind| StrategyNode {
        parent,
        name,
        role,
        rollback: RollbackScope::Order,
        kind,
    };
    let mut nodes = Vec::new();
    for number in 1..=servers {
        let group = u32::try_from(nodes.len()).expect("few groups");
        let parallel = StrategyNodeKind::Parallel {
            max_in_flight: 0,
            max_failures: 0,
        };
        let name = format!("group {number}");
        nodes.push(node(None, name, NodeRole::Group, parallel));
        let unit = StrategyNodeKind::Unit(StrategyUnit {
            application: "app".to_owned(),
            server: server(number).to_string(),
            restore: RestoreWeight::Remembered,
            healthy_for_ms: 0,
            health_deadline_ms: None,
        });
        let name = format!("server-{number}");
        nodes.push(node(Some(group), name, NodeRole::Plain, unit));
    }
    Release {
        servers,
        steps: 2,
        strategy: StrategyPlan {
            nodes,
            on_failure: OnFailure::Block,
            progress_deadline_ms: None,
        },
        limits: Limits {
            max_unavailable: Amount::Percent(100),
            max_in_flight: 1000,
            min_healthy_members: 0,
            ..Limits::default()
        },
        on_failure: OnFailure::Block,
        pools: Vec::new(),
    }
}

/// A release to three servers, one after the other, whose first server dies when it has received the task with this position.
struct Lost {
    fleet: Fleet,
    order: OrderId,
    _directory: tempfile::TempDir,
}

impl Lost {
    async fn in_task(position: usize) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let blobs = Blobs::open_directory(directory.path().join("blobs")).await;
        let blobs = blobs.expect("a blob store");
        let sessions: Arc<OnceLock<Arc<Sessions>>> = Arc::default();
        let received = Mutex::new(0);
        let dying = sessions.clone();
        let planning = GivenPlans {
            reads: Mutex::default(),
            members: (1..=3)
                .map(|number| (server(number), "cell-a".to_owned()))
                .collect(),
            rollback: Some(plan(one_per_group(1))),
            not_now: 0.into(),
            stage_rollbacks: BTreeMap::new(),
            blobs: blobs.clone(),
        };
        let fleet = Fleet::with_lost_time(
            memory::open(MemoryOptions::default()).expect("a store in memory"),
            blobs,
            planning,
            Arc::new(move |of, _| {
                if of == server(1) {
                    let mut received = received.lock().expect("no panic");
                    if *received == position {
                        dying.get().expect("sessions").set_online(of, false);
                    }
                    *received += 1;
                }
                Outcome::Succeeded
            }),
            LOST_AFTER,
        )
        .await;
        assert!(sessions.set(fleet.sessions.clone()).is_ok());
        let order = fleet.create(&plan(one_per_group(3))).await;
        let lost = Self {
            fleet,
            order,
            _directory: directory,
        };
        lost.act(Action::Run).await;
        lost
    }

    async fn act(&self, action: Action) {
        let acted = self
            .fleet
            .engine
            .act(self.order, action, "test", Txn::new());
        acted.await.expect("the action is accepted");
    }

    /// Waits until the step that ran on the dead machine is unknown.
    async fn unknown(&self) {
        let stopped =
            |order: &Order| order.state == OrderState::Unknown && order.counts.failed == 1;
        self.fleet.wait_for(self.order, stopped).await;
    }

    /// Whether a server is locked by the order.
    async fn is_locked(&self, number: u32) -> bool {
        let server = server(number).to_string();
        let key = Key::from_segments(["default", "lock", &server]).expect("a key");
        self.fleet.store.get(&key).await.expect("a lock").is_some()
    }

    async fn succeeds(self) {
        let order = self.fleet.wait_ended(self.order).await;
        assert_eq!(order.state, OrderState::Succeeded, "{}", order.state_reason);
        self.fleet.shutdown().await;
    }
}

async fn in_each_task<F: Future<Output = ()> + Send + 'static>(run: impl Fn(usize) -> F) {
    let mut runs: JoinSet<()> = (0..TASKS).map(run).collect();
    while let Some(ended) = runs.join_next().await {
        ended.expect("no assertion failed");
    }
}

#[tokio::test]
async fn an_order_can_be_cancelled_when_a_machine_died_in_any_task() {
    in_each_task(|position| async move {
        let lost = Lost::in_task(position).await;
        lost.unknown().await;
        lost.act(Action::Cancel { node: None }).await;
        let order = lost.fleet.wait_ended(lost.order).await;
        assert_eq!(order.state, OrderState::Failed, "in task {position}");
        for number in 1..=3 {
            // The last effect of an order that has ended.
            eventually("the server is unlocked", || async {
                let locked = lost.is_locked(number).await;
                (!locked).then_some(()).ok_or_else(|| number.to_string())
            })
            .await;
        }
        lost.fleet.shutdown().await;
    })
    .await;
}

#[tokio::test]
async fn cancelling_unlocks_unreached_servers_while_a_dead_machine_is_awaited() {
    let directory = tempfile::tempdir().expect("a directory");
    let blobs = Blobs::open_directory(directory.path().join("blobs")).await;
    let blobs = blobs.expect("a blob store");
    let sessions: Arc<OnceLock<Arc<Sessions>>> = Arc::default();
    let dying = sessions.clone();
    let planning = GivenPlans {
        reads: Mutex::default(),
        members: (1..=3)
            .map(|number| (server(number), "cell-a".to_owned()))
            .collect(),
        rollback: None,
        not_now: 0.into(),
        stage_rollbacks: BTreeMap::new(),
        blobs: blobs.clone(),
    };
    let fleet = Fleet::with_lost_time(
        memory::open(MemoryOptions::default()).expect("a store in memory"),
        blobs,
        planning,
        Arc::new(move |of, _| {
            dying.get().expect("sessions").set_online(of, false);
            Outcome::Succeeded
        }),
        Duration::from_secs(3600),
    )
    .await;
    assert!(sessions.set(fleet.sessions.clone()).is_ok());
    let order = fleet.create(&plan(one_per_group(3))).await;
    let lost = Lost {
        fleet,
        order,
        _directory: directory,
    };
    lost.act(Action::Run).await;
    eventually("the first server died", || async {
        let online = windlass::engine::Agents::is_online(&*lost.fleet.sessions, server(1));
        (!online).then_some(()).ok_or_else(String::new)
    })
    .await;
    lost.act(Action::Cancel { node: None }).await;
    for number in 2..=3 {
        eventually("an unreached server is unlocked", || async {
            let locked = lost.is_locked(number).await;
            (!locked).then_some(()).ok_or_else(|| number.to_string())
        })
        .await;
    }
    assert!(lost.is_locked(1).await, "its step may still run");
    let order = lost.fleet.order(lost.order).await;
    assert_eq!(order.state, OrderState::Cancelling);
    lost.fleet.shutdown().await;
}

#[tokio::test]
async fn a_dead_machine_can_be_ignored_in_any_task() {
    in_each_task(|position| async move {
        let lost = Lost::in_task(position).await;
        lost.unknown().await;
        lost.act(Action::Ignore { node: 0 }).await;
        lost.succeeds().await;
    })
    .await;
}

#[tokio::test]
async fn a_task_of_a_dead_machine_can_be_retried_when_it_is_back() {
    in_each_task(|position| async move {
        let lost = Lost::in_task(position).await;
        lost.unknown().await;
        lost.fleet.sessions.set_online(server(1), true);
        lost.act(Action::Retry { node: 0 }).await;
        lost.succeeds().await;
    })
    .await;
}

#[tokio::test]
async fn the_rollback_of_an_order_starts_while_a_machine_that_died_in_any_task_is_away() {
    in_each_task(|position| async move {
        let lost = Lost::in_task(position).await;
        lost.unknown().await;
        lost.act(Action::RollBack {
            reason: "a machine died".to_owned(),
            parameters: None,
        })
        .await;
        let started = |order: &Order| order.rolled_back_by.is_some();
        lost.fleet.wait_for(lost.order, started).await;
        lost.fleet.shutdown().await;
    })
    .await;
}

#[tokio::test]
async fn the_late_result_of_a_lost_machine_counts_unless_somebody_acted() {
    let lost = Lost::in_task(2).await;
    lost.unknown().await;
    let task = {
        let executed = lost.fleet.executed.lock().expect("no panic");
        executed.last().expect("a task").1.id
    };
    lost.fleet.sessions.set_online(server(1), true);
    let result = TaskResult {
        outcome: Outcome::Succeeded,
        exit_code: Some(0),
        output: String::new(),
        dropped_bytes: 0,
        message: String::new(),
        fault: None,
        started_at: None,
        finished_at: Timestamp::from_unix_ms(1_700_000_000_000),
    };
    let reported = lost.fleet.engine.report(server(1), task, result);
    reported.await.expect("a late result is accepted");
    lost.succeeds().await;
}

/// Kills every process that a machine ran for its agent, whose data directory names them.
fn kill_processes_of(host: &mut TestHost, index: usize) {
    host.kill_agent(index);
    let data = host.agents[index].data.clone();
    let data = data.to_str().expect("a path in UTF-8").as_bytes();
    let names = |file: Vec<u8>| file.windows(data.len()).any(|part| part == data);
    loop {
        let mut killed = 0;
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
                continue;
            };
            let read = |file| fs::read(entry.path().join(file)).unwrap_or_default();
            if pid != std::process::id() && (names(read("cmdline")) || names(read("environ"))) {
                let status = std::process::Command::new("kill")
                    .args(["-9", &pid.to_string()])
                    .status();
                killed += u32::from(status.is_ok_and(|status| status.success()));
            }
        }
        if killed == 0 {
            return;
        }
        // A zombie has neither a command line nor an environment.
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn an_order_outlives_the_machine_of_a_real_agent() {
    let mut host = TestHost::start(Setup {
        agents: 3,
        server_args: vec!["--agent-lost-after-s".to_owned(), "1".to_owned()],
        ..Setup::default()
    })
    .await;
    let scene = Scene::prepare(&host).await;
    scene.put("hold-agent-1");
    let mut body = scene.order("a machine dies", 0);
    body["run"] = true.into();
    body["limits"] = json!({ "max_unavailable": "100%", "min_healthy_members": 0 });
    let order = host.order(&body).await.expect("an order");
    scene.wait_begun(1).await;
    kill_processes_of(&mut host, 0);
    let seen = nodes_when(&host, &order, "the step is unknown", |nodes| {
        step(nodes, "agent-1", "configure")["state"] == "unknown"
    })
    .await;
    let message = text(&step(&seen, "agent-1", "configure")["message"]);
    assert!(
        message.contains("whether the step ran cannot be known"),
        "{message}"
    );
    // The others are released without it, and its step runs again when it is back.
    scene.take("hold-agent-1");
    host.start_agent(0, &[]);
    host.wait_online().await;
    act(&host, &order, &json!({ "action": "retry", "node": 0 }))
        .await
        .expect("a retry");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    let state = |nodes: &[serde_json::Value]| text(&step(nodes, "agent-1", "configure")["state"]);
    assert_eq!(state(&nodes(&host, &order).await), "succeeded");
    // Cancelled instead: the order ends although the machine stays away.
    scene.forget();
    scene.put("hold-agent-2");
    body["targets"][0]["package"] = scene.packages[1].clone().into();
    let order = host.order(&body).await.expect("an order");
    scene.wait_begun(2).await;
    kill_processes_of(&mut host, 1);
    act(&host, &order, &json!({ "action": "cancel" }))
        .await
        .expect("it is cancelled");
    let ended = host.order_ended(&order).await;
    assert_eq!(ended["state"], "failed", "{ended}");
    host.stop().await;
}

#[test]
fn every_task_of_a_run_is_covered() {
    let planned = plan(one_per_group(1));
    let tasks = planned
        .nodes
        .iter()
        .filter(|node| matches!(node.kind, NodeKind::Step { .. }));
    assert_eq!(tasks.count(), TASKS);
}
