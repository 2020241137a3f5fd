//! New versions of a strategy arrive while orders run: every order keeps the version that it was planned with, also when the
//! server is started again and the version's file is gone by then.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use windlass::engine::{NoRollback, PlannedRollback, Planning};
use windlass_domain::{
    id::{InstanceId, OrderId, ServerId},
    limits::{Amount, Limits},
    order::{Action, Order, OrderState},
    plan::{Plan, Read},
    plugin::{
        AppRole, JudgeRequest, Judgement, Observation, OnFailure, StrategyApp, StrategyRequest,
        StrategyServer,
    },
    progress::Progress,
    task::Outcome,
};
use windlass_runtime::{
    CallRecord, CallSink, Export, PluginState, Plugins, PluginsConfig, for_order,
};
use windlass_store::{Blobs, Store, Txn, sled};
use windlass_tests::{
    guests::{guest, guest_that},
    host::{eventually, program},
    simulated::{Fleet, GivenPlans, Journal, Release, plan, server},
};

const ORDERS: u32 = 50;
const SERVERS: u32 = 3;

/// Judges by the plugin that the plan names; everything else is given.
struct PinnedStrategies {
    given: GivenPlans,
    plugins: Arc<Plugins>,
}

#[async_trait]
impl Planning for PinnedStrategies {
    async fn reread(
        &self,
        plan: &Plan,
        subjects: &[String],
    ) -> Result<BTreeMap<String, Read>, String> {
        self.given.reread(plan, subjects).await
    }

    async fn check_servers(&self, plan: &Plan) -> Result<Vec<String>, String> {
        self.given.check_servers(plan).await
    }

    async fn members(&self, instance: InstanceId) -> Result<Vec<(ServerId, String)>, String> {
        self.given.members(instance).await
    }

    async fn keep_tech_stacks(&self, _: &Order) -> Result<(), String> {
        Ok(())
    }

    async fn judge(
        &self,
        order: &Order,
        plan: &Plan,
        _: &Progress,
        stage: &str,
        observations: Vec<Observation>,
    ) -> Result<Judgement, String> {
        let strategy = plan.strategy.as_ref().ok_or("a plan without a strategy")?;
        let plugin = self
            .plugins
            .pinned(strategy.digest)
            .await
            .map_err(|error| error.to_string())?;
        let request = JudgeRequest {
            stage: stage.to_owned(),
            parameters: serde_json::json!({}),
            observations,
        };
        for_order(order.id.to_string(), plugin.judge(&request))
            .await
            .map_err(|error| error.to_string())
    }

    async fn plan_rollback(
        &self,
        of: &Order,
        plan: &Plan,
        progress: &Progress,
        reason: &str,
    ) -> Result<PlannedRollback, NoRollback> {
        self.given.plan_rollback(of, plan, progress, reason).await
    }

    async fn plan_stage_rollback(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        stage: (u32, &str),
    ) -> Result<Option<PlannedRollback>, NoRollback> {
        self.given
            .plan_stage_rollback(order, plan, progress, stage)
            .await
    }
}

/// Which version judged for which order.
#[derive(Default)]
struct Judges(Mutex<Vec<(String, String)>>);

impl CallSink for Judges {
    fn record(&self, record: &Arc<CallRecord>) {
        if record.export == Export::Judge {
            let order = record
                .context
                .as_ref()
                .and_then(|context| context.order.clone());
            self.0
                .lock()
                .expect("the judges")
                .push((order.unwrap_or_default(), record.plugin.version.to_string()));
        }
    }
}

async fn open_plugins(root: &Path, judges: &Arc<Judges>) -> Arc<Plugins> {
    let mut config =
        PluginsConfig::new(root.join("plugins"), root.join("state")).expect("this program's path");
    config.compile_command = vec![
        program("windlass").into_os_string(),
        windlass_runtime::COMPILE_SUBCOMMAND.into(),
    ];
    config.sink = Some(judges.clone());
    let plugins = Plugins::open(config).await.expect("the registry opens");
    plugins.settled().await;
    Arc::new(plugins)
}

fn drop_in(root: &Path, file: &str, bytes: &[u8]) {
    let hidden = root.join("plugins").join(format!(".{file}"));
    fs::write(&hidden, bytes).expect("a plugin is written");
    fs::rename(&hidden, root.join("plugins").join(file)).expect("a plugin is dropped");
}

async fn wait_active(plugins: &Plugins, version: &str) {
    eventually(&format!("version {version} is active"), || async {
        let list = plugins.list();
        let found = list.iter().any(|status| {
            status.state == PluginState::Active
                && status
                    .descriptor
                    .as_ref()
                    .is_some_and(|descriptor| descriptor.version.to_string() == version)
        });
        if found {
            Ok(())
        } else {
            Err(format!("{list:?}"))
        }
    })
    .await;
}

async fn fleet(root: &Path, store: Arc<dyn Store>, plugins: &Arc<Plugins>) -> Fleet {
    let blobs = Blobs::open_directory(root.join("blobs"))
        .await
        .expect("blobs");
    let members: Vec<_> = (1..=ORDERS * SERVERS)
        .map(|number| (server(number), "cell-a".to_owned()))
        .collect();
    let planning = PinnedStrategies {
        given: GivenPlans {
            reads: Mutex::default(),
            members: members.clone(),
            rollback: None,
            not_now: std::sync::atomic::AtomicU32::new(0),
            stage_rollbacks: Default::default(),
            blobs: blobs.clone(),
        },
        plugins: plugins.clone(),
    };
    Fleet::with_planner(
        store,
        blobs,
        planning,
        members,
        Arc::new(|_, _| Outcome::Succeeded),
        Journal::default(),
    )
    .await
}

/// The plan of one order, on servers of its own, made by the plugin.
async fn planned(plugins: &Plugins, number: u32) -> Plan {
    let strategy = plugins.get("reloaded", None).expect("the strategy");
    let limits = Limits {
        max_unavailable: Amount::Percent(100),
        max_in_flight: 1000,
        min_healthy_members: 0,
        ..Limits::default()
    };
    let request = StrategyRequest {
        parameters: serde_json::json!({ "behave": "judge-and-gate" }),
        limits: limits.clone(),
        cells: vec!["cell-a".to_owned()],
        applications: vec![StrategyApp {
            key: "app".to_owned(),
            stage: 1,
            role: AppRole::Release,
            has_pools: false,
            target_version: "1.0.0".to_owned(),
            servers: (1..=SERVERS)
                .map(|number| StrategyServer {
                    id: server(number).to_string(),
                    name: format!("server-{number}"),
                    cell: "cell-a".to_owned(),
                    zone: "zone-a".to_owned(),
                    healthy: true,
                    installed_version: None,
                })
                .collect(),
        }],
    };
    let mut plan = plan(Release {
        servers: SERVERS,
        steps: 2,
        strategy: strategy.plan(&request).await.expect("a plan"),
        limits,
        on_failure: OnFailure::Block,
        pools: Vec::new(),
    });
    plan.strategy = Some(strategy.reference().clone());
    for (index, unit) in (1..).zip(&mut plan.units) {
        unit.server = server(number * SERVERS + index);
    }
    plan
}

async fn wait_all(fleet: &Fleet, orders: &[OrderId], wanted: OrderState) {
    for id in orders {
        let order = fleet
            .wait_for(*id, |order| {
                order.state == wanted || order.state.is_terminal()
            })
            .await;
        assert_eq!(order.state, wanted, "{}", order.state_reason);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_keep_the_version_that_they_were_planned_with() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    fs::create_dir(root.join("plugins")).expect("the plugin directory");
    drop_in(
        root,
        "one.wasm",
        &guest("deployment-strategy", "reloaded", "1.0.0"),
    );
    let judges = Arc::new(Judges::default());
    let plugins = open_plugins(root, &judges).await;
    let open_store =
        || async { sled::open(root.join("store"), sled::SledOptions::default()).await };
    let store = open_store().await.expect("a store");
    let running = fleet(root, store.clone(), &plugins).await;
    let mut orders = Vec::new();
    let mut plans = BTreeMap::new();
    for number in 0..ORDERS {
        let id = running.create(&planned(&plugins, number).await).await;
        plans.insert(id, running.order(id).await.plan);
        running
            .engine
            .act(id, Action::Run, "test", Txn::new())
            .await
            .expect("it runs");
        orders.push(id);
        // A version that would roll everything back arrives in the middle, and another beside the first replaces its file.
        if number == ORDERS / 2 {
            drop_in(
                root,
                "two.wasm",
                &guest_that("deployment-strategy", "reloaded", "0.9.0", "other"),
            );
        }
    }
    wait_all(&running, &orders, OrderState::AwaitingConfirmation).await;
    drop_in(
        root,
        "three.wasm",
        &guest_that("deployment-strategy", "reloaded", "2.0.0", "other"),
    );
    drop_in(
        root,
        "one.wasm",
        &guest_that("deployment-strategy", "reloaded", "1.0.1", "other"),
    );
    for version in ["0.9.0", "2.0.0", "1.0.1"] {
        wait_active(&plugins, version).await;
    }
    let half = orders.len() / 2;
    let confirm = Action::Confirm { node: None };
    for id in &orders[..half] {
        running
            .engine
            .act(*id, confirm.clone(), "test", Txn::new())
            .await
            .expect("it is confirmed");
    }
    wait_all(&running, &orders[..half], OrderState::Succeeded).await;

    // The others go on after a restart, with a version that no file provides any more.
    running.shutdown().await;
    plugins.close().await;
    drop(plugins);
    store.close().await.expect("the store is closed");
    drop(store);
    let plugins = open_plugins(root, &judges).await;
    let default = plugins.get("reloaded", None).expect("the strategy");
    assert_eq!(default.reference().version, semver::Version::new(2, 0, 0));
    let store = open_store().await.expect("the store again");
    let running = fleet(root, store.clone(), &plugins).await;
    for id in &orders[half..] {
        running
            .engine
            .act(*id, confirm.clone(), "test", Txn::new())
            .await
            .expect("it is confirmed");
    }
    wait_all(&running, &orders, OrderState::Succeeded).await;
    for (id, digest) in plans {
        let order = running.order(id).await;
        assert_eq!(order.plan, digest, "the plan of {id} was changed");
        assert_eq!(order.revisions.len(), 1);
    }
    let judged = judges.0.lock().expect("the judges").clone();
    for id in &orders {
        let of_order: Vec<&str> = judged
            .iter()
            .filter(|(order, _)| *order == id.to_string())
            .map(|(_, version)| version.as_str())
            .collect();
        assert!(of_order.len() >= SERVERS as usize, "{id}: {of_order:?}");
        assert!(
            of_order.iter().all(|version| *version == "1.0.0"),
            "{id} was judged by {of_order:?}"
        );
    }
    running.shutdown().await;
    plugins.close().await;
    store.close().await.expect("the store is closed");
}
