//! `engine_steps_per_s`: one order, 200 simulated servers with 10 steps each, on the real store.
//!
//! A step counts when the engine has accepted its report: the event is durable, with the next dispatch, before it is
//! answered. Effects go through inbox rows, as they do with real agents; only the agents' own work is left out. Prints the
//! median of several orders.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Instant,
};

use windlass_domain::{
    limits::{Amount, Limits},
    order::{Action, OrderState},
    plugin::{
        NodeRole, OnFailure, RestoreWeight, RollbackScope, StrategyNode, StrategyNodeKind,
        StrategyPlan, StrategyUnit,
    },
    task::Outcome,
};
use windlass_store::{Blobs, Txn, sled};
use windlass_tests::simulated::{Fleet, GivenPlans, Release, plan, server};

const SERVERS: u32 = 200;
/// Fetch, unpack and activate are the core's; the stack gives the rest.
const STACK_STEPS: u32 = 7;
const ROUNDS: usize = 7;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let directory = tempfile::tempdir().expect("a directory");
    let store = sled::open(directory.path().join("store"), sled::SledOptions::default())
        .await
        .expect("a store");
    let blobs = Blobs::open_directory(directory.path().join("blobs"))
        .await
        .expect("blobs");
    let planning = GivenPlans {
        reads: Mutex::new(BTreeMap::new()),
        members: (1..=SERVERS)
            .map(|number| (server(number), "cell-a".to_owned()))
            .collect(),
        rollback: None,
        not_now: std::sync::atomic::AtomicU32::new(0),
        stage_rollbacks: BTreeMap::new(),
        blobs: blobs.clone(),
    };
    let fleet = Fleet::start(
        store.clone(),
        blobs,
        planning,
        Arc::new(|_, _| Outcome::Succeeded),
    )
    .await;
    let plan = plan(Release {
        servers: SERVERS,
        steps: STACK_STEPS,
        strategy: all_at_once(),
        limits: Limits {
            max_unavailable: Amount::Percent(100),
            max_in_flight: SERVERS,
            min_healthy_members: 0,
            ..Limits::default()
        },
        on_failure: OnFailure::Block,
        pools: Vec::new(),
    });
    let steps = f64::from(SERVERS * (STACK_STEPS + 3));
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        let id = fleet.create(&plan).await;
        let start = Instant::now();
        fleet
            .engine
            .act(id, Action::Run, "bench", Txn::new())
            .await
            .expect("the order runs");
        let order = fleet.wait_ended(id).await;
        let elapsed = start.elapsed();
        assert_eq!(order.state, OrderState::Succeeded, "{}", order.state_reason);
        rates.push(steps / elapsed.as_secs_f64());
    }
    rates.sort_by(f64::total_cmp);
    println!("engine_steps_per_s {:.0} 1/s", rates[ROUNDS / 2]);
    fleet.shutdown().await;
    store.close().await.expect("the store is closed");
}

fn all_at_once() -> StrategyPlan {
    let group = StrategyNodeKind::Parallel {
        max_in_flight: 0,
        max_failures: 0,
    };
    let mut nodes = vec![StrategyNode {
        parent: None,
        name: "all".to_owned(),
        role: NodeRole::Group,
        rollback: RollbackScope::Order,
        kind: group,
    }];
    nodes.extend((1..=SERVERS).map(|number| StrategyNode {
        parent: Some(0),
        name: format!("server-{number}"),
        role: NodeRole::Plain,
        rollback: RollbackScope::Order,
        kind: StrategyNodeKind::Unit(StrategyUnit {
            application: "app".to_owned(),
            server: server(number).to_string(),
            restore: RestoreWeight::Remembered,
            healthy_for_ms: 0,
            health_deadline_ms: None,
        }),
    }));
    StrategyPlan {
        nodes,
        on_failure: OnFailure::Block,
        progress_deadline_ms: None,
    }
}
