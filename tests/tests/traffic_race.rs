//! A person takes a server's traffic away while another server's turn begins: whatever comes first, the pool keeps the
//! members with traffic that the order promises.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use windlass::engine::traffic::{SimulatedPools, TrafficError, TrafficPools};
use windlass_domain::{
    id::{OrderId, PoolId, ServerId},
    limits::{Amount, Limits},
    order::{Action, Order, OrderState},
    plugin::{
        NodeRole, OnFailure, RestoreWeight, RollbackScope, StrategyNode, StrategyNodeKind,
        StrategyPlan, StrategyUnit,
    },
    pool::MemberStats,
    progress::{EditState, ServerWeight},
    task::Outcome,
};
use windlass_store::{
    Blobs, Txn,
    memory::{self, MemoryOptions},
};
use windlass_tests::simulated::{Fleet, GivenPlans, Journal, Release, plan_in_cells, server, uuid};

/// How long a pool takes to set a weight: the moment in which everything else happens.
const SETS_IN: Duration = Duration::from_millis(20);

/// Pools that take their time, and note when nobody has any traffic.
struct Watched {
    inner: Arc<SimulatedPools>,
    weights: Mutex<BTreeMap<ServerId, u32>>,
    was_empty: Arc<AtomicBool>,
}

#[async_trait]
impl TrafficPools for Watched {
    async fn weight(&self, pool: PoolId, server: ServerId) -> Result<u32, TrafficError> {
        self.inner.weight(pool, server).await
    }

    async fn set_weight(
        &self,
        pool: PoolId,
        server: ServerId,
        weight: u32,
    ) -> Result<(), TrafficError> {
        tokio::time::sleep(SETS_IN).await;
        self.inner.set_weight(pool, server, weight).await?;
        let mut weights = self.weights.lock().expect("nobody panicked with it");
        weights.insert(server, weight);
        if weights.values().all(|weight| *weight == 0) {
            self.was_empty.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    async fn connections(&self, pool: PoolId, server: ServerId) -> Result<u32, TrafficError> {
        self.inner.connections(pool, server).await
    }

    async fn stats(&self, pool: PoolId) -> Result<Vec<MemberStats>, TrafficError> {
        self.inner.stats(pool).await
    }
}

fn leaf(name: &str, kind: StrategyNodeKind) -> StrategyNode {
    StrategyNode {
        parent: None,
        name: name.to_owned(),
        role: NodeRole::Plain,
        rollback: RollbackScope::Order,
        kind,
    }
}

fn turn(number: u32, restore: RestoreWeight) -> StrategyNode {
    let kind = StrategyNodeKind::Unit(StrategyUnit {
        application: "app".to_owned(),
        server: server(number).to_string(),
        restore,
        healthy_for_ms: 0,
        health_deadline_ms: None,
    });
    leaf(&format!("server {number}"), kind)
}

/// The first server is released and given its weight by hand; a person lets the second one follow.
fn release() -> Release {
    let gate = || StrategyNodeKind::Gate {
        message: "look".to_owned(),
    };
    Release {
        servers: 2,
        steps: 1,
        strategy: StrategyPlan {
            nodes: vec![
                turn(1, RestoreWeight::KeepZero),
                leaf("confirm", gate()),
                turn(2, RestoreWeight::Remembered),
                leaf("confirm the end", gate()),
            ],
            on_failure: OnFailure::Block,
            progress_deadline_ms: None,
        },
        limits: Limits {
            max_unavailable: Amount::Percent(100),
            min_healthy_members: 1,
            ..Limits::default()
        },
        on_failure: OnFailure::Block,
        pools: vec![PoolId::from_uuid(uuid(77))],
    }
}

fn cell(number: u32) -> String {
    format!("cell-{number}")
}

struct Host {
    fleet: Fleet,
    was_empty: Arc<AtomicBool>,
    _directory: tempfile::TempDir,
}

impl Host {
    async fn start() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let blobs = Blobs::open_directory(directory.path().join("blobs"))
            .await
            .expect("blobs open");
        let members: Vec<(ServerId, String)> =
            [1, 2].map(|number| (server(number), cell(number))).to_vec();
        let planning = GivenPlans {
            reads: Mutex::default(),
            members: members.clone(),
            rollback: None,
            not_now: std::sync::atomic::AtomicU32::new(0),
            stage_rollbacks: BTreeMap::new(),
            blobs: blobs.clone(),
        };
        let was_empty = Arc::new(AtomicBool::new(false));
        let noted = was_empty.clone();
        let weights = members.iter().map(|(server, _)| (*server, 100)).collect();
        let fleet = Fleet::with_pools(
            memory::open(MemoryOptions::default()).expect("an empty store opens"),
            blobs,
            planning,
            members,
            (Arc::new(|_, _| Outcome::Succeeded), Journal::default()),
            |inner| {
                Arc::new(Watched {
                    inner,
                    weights: Mutex::new(weights),
                    was_empty: noted,
                })
            },
        )
        .await;
        Self {
            fleet,
            was_empty,
            _directory: directory,
        }
    }

    async fn act(&self, order: OrderId, action: Action) {
        let acted = self.fleet.engine.act(order, action, "test", Txn::new());
        acted.await.expect("the action is taken");
    }

    async fn weigh(&self, order: OrderId, weight: u32) {
        let weights = vec![ServerWeight {
            server: server(1),
            weight,
        }];
        self.act(order, Action::SetWeights { weights }).await;
    }

    /// Waits until the order and its last change by hand are as wanted; answers what became of the change.
    async fn when(&self, order: OrderId, wanted: impl Fn(&Order) -> bool) -> Option<EditState> {
        let mut ticks = tokio::time::interval(Duration::from_millis(2));
        let waited = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                ticks.tick().await;
                let found = self.fleet.engine.progress(order).await;
                let (header, _, progress) = found.expect("it is read").expect("the order");
                let edit = progress.node(0).edit.as_ref();
                if edit.is_none_or(|edit| edit.state != EditState::Due) && wanted(&header) {
                    return edit.map(|edit| edit.state.clone());
                }
            }
        });
        waited.await.expect("in time")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edit_and_a_drain_together_leave_the_pool_its_minimum() {
    let host = Host::start().await;
    let (mut refused, mut held) = (0, 0);
    // The server's turn begins before the weight is set, while it is, and after.
    for round in 0..24_u64 {
        let plan = plan_in_cells(release(), cell, |_| true);
        let id = host.fleet.create(&plan).await;
        host.act(id, Action::Run).await;
        host.when(id, |order| order.state == OrderState::AwaitingConfirmation)
            .await;
        host.weigh(id, 100).await;
        let full = host.when(id, |_| true).await;
        assert_eq!(full, Some(EditState::Done));

        let confirm = async {
            tokio::time::sleep(Duration::from_millis(round % 12 * 3)).await;
            host.act(id, Action::Confirm { node: None }).await;
        };
        let edit = async {
            tokio::time::sleep(Duration::from_millis(6)).await;
            host.weigh(id, 0).await;
        };
        tokio::join!(confirm, edit);
        let edited = host
            .when(id, |order| {
                order.state == OrderState::Blocked || order.counts.succeeded == 2
            })
            .await;
        match edited {
            Some(EditState::Failed(message)) => {
                assert!(message.contains("min_healthy_members is 1"), "{message}");
                refused += 1;
            }
            Some(EditState::Done) => held += 1,
            Some(EditState::Due) | None => panic!("the change was made or refused: {edited:?}"),
        }
        let order = host.fleet.order(id).await;
        if order.state == OrderState::Blocked {
            assert!(
                order.state_reason.contains("min_healthy_members is 1"),
                "{}",
                order.state_reason
            );
            // The second server goes on when the first one has traffic again.
            host.weigh(id, 50).await;
            host.when(id, |order| order.counts.succeeded == 2).await;
        }
        host.when(id, |order| order.state == OrderState::AwaitingConfirmation)
            .await;
        host.act(id, Action::Confirm { node: None }).await;
        let ended = host.fleet.wait_ended(id).await;
        assert_eq!(ended.state, OrderState::Succeeded, "{}", ended.state_reason);
        assert!(
            !host.was_empty.load(Ordering::SeqCst),
            "round {round}: nobody had any traffic"
        );
    }
    // Both ways it can go were gone.
    assert!(refused + held == 24 && held > 0, "{refused} {held}");
    host.fleet.shutdown().await;
}
