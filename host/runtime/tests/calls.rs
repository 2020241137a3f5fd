//! Calling plugins: what the shipped ones answer, and that a guest that misbehaves hurts only its own call.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::json;
use support::{Home, guest, lifecycle, server, shipped};
use windlass_domain::{
    limits::Limits,
    plugin::{
        AppRole, CommandOutcome, CommandRequest, CommandRun, DiagnosisRequest, DiagnosisSubject,
        FindingState, JudgeRequest, PluginKind, RollbackRequest, StackAction, StrategyApp,
        StrategyNodeKind, StrategyRequest, StrategyServer, UnitProgress, UnitState, Verdict,
    },
    value::Value,
};
use windlass_runtime::{
    CallFailure, CallRecord, CallSink, Export, Plugins,
    diagnostic::{
        Attributes, Connection, Endpoint, Host, HostError, MetricRange, ProbeAnswer, Sample,
    },
};

fn release(parameters: serde_json::Value, servers: usize) -> StrategyRequest {
    StrategyRequest {
        parameters,
        limits: Limits::default(),
        cells: vec!["a".into()],
        applications: vec![StrategyApp {
            key: "shop".into(),
            stage: 1,
            role: AppRole::Release,
            has_pools: true,
            target_version: "2".into(),
            servers: (0..servers)
                .map(|index| StrategyServer {
                    id: format!("s{index}"),
                    name: format!("s{index}"),
                    cell: "a".into(),
                    zone: "z".into(),
                    healthy: true,
                    installed_version: None,
                })
                .collect(),
        }],
    }
}

async fn open_shipped(home: &Home) -> Plugins {
    for name in ["binary", "grouped", "server-basics", "system-info"] {
        let file = format!("{name}.wasm");
        home.drop_file(&file, &std::fs::read(shipped().join(&file)).unwrap());
    }
    home.open().await
}

async fn open_guests(home: &Home) -> Plugins {
    for kind in [
        "tech-stack",
        "deployment-strategy",
        "diagnostic",
        "public-command",
    ] {
        home.drop_file(&format!("{kind}.wasm"), &guest(kind, ";1.0.0;ok;"));
    }
    home.open().await
}

/// A platform whose disk probe answers, and whose other functions never do.
struct FakeHost;

#[async_trait::async_trait]
impl Host for FakeHost {
    async fn available(&self, _: &str) -> Result<Vec<String>, HostError> {
        Ok(vec!["disk".into()])
    }

    async fn run(
        &self,
        server: &str,
        probe: &str,
        _: &Attributes,
        _: u64,
    ) -> Result<ProbeAnswer, HostError> {
        match (server, probe) {
            ("hangs", _) => std::future::pending().await,
            (_, "disk") => Ok(ProbeAnswer {
                data: json!({ "used_percent": 97, "path": "/data" }),
                text: String::new(),
            }),
            _ => Err(HostError::new("unsupported", "no such probe")),
        }
    }

    async fn connect(&self, _: &str, _: &Endpoint, _: u64) -> Result<Connection, HostError> {
        std::future::pending().await
    }

    async fn read(&self, _: &str, _: &str) -> Result<serde_json::Value, HostError> {
        std::future::pending().await
    }

    async fn find(&self, _: &str, _: &Attributes, _: u32) -> Result<Vec<String>, HostError> {
        std::future::pending().await
    }

    async fn metrics(
        &self,
        _: &str,
        _: &str,
        _: &str,
        _: MetricRange,
    ) -> Result<Vec<Sample>, HostError> {
        std::future::pending().await
    }

    async fn order_log(&self, _: &str, _: Option<u32>, _: u32) -> Result<String, HostError> {
        std::future::pending().await
    }
}

fn diagnosis(server: &str, parameters: serde_json::Value) -> DiagnosisRequest {
    DiagnosisRequest {
        subject: DiagnosisSubject {
            kind: "server".into(),
            id: server.into(),
            data: json!({}),
        },
        parameters,
        items: Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shipped_plugins_answer() {
    let home = Home::new();
    let plugins = open_shipped(&home).await;
    assert!(
        plugins.list().iter().all(|status| status.is_default),
        "{:?}",
        support::outline(&plugins)
    );

    let binary = plugins
        .get_of_kind(PluginKind::TechStack, "binary", None)
        .unwrap();
    let parameters = json!({ "port": 8080, "environment": { "TOKEN": { "secret_ref": "token" } } });
    binary.validate_parameters(&parameters).unwrap();
    let errors = binary
        .validate_parameters(&json!({ "port": 0, "x": 1 }))
        .unwrap_err();
    assert!(
        errors.iter().any(|error| error.field == "/port"),
        "{errors:?}"
    );
    let plan = binary.lifecycle(&lifecycle(parameters)).await.unwrap();
    let [stop, start, check] = &plan.steps[..] else {
        panic!("{plan:?}");
    };
    assert!(matches!(
        stop.action,
        StackAction::Stop { grace_ms: 10_000 }
    ));
    assert!(matches!(&start.action, StackAction::Start(start) if start.command == ["./shop"]));
    assert_eq!(check.timeout_ms, 120_000);
    assert_eq!(
        plan.server_env["s1"],
        BTreeMap::from([
            ("PORT".to_owned(), Value::Plain("8080".into())),
            ("TOKEN".to_owned(), Value::SecretRef("token".into())),
        ])
    );

    let grouped = plugins
        .get_of_kind(PluginKind::DeploymentStrategy, "grouped", None)
        .unwrap();
    let request = release(json!({ "beta_group": true }), 3);
    let plan = grouped.plan(&request).await.unwrap();
    let units = |plan: &windlass_domain::plugin::StrategyPlan| {
        plan.nodes
            .iter()
            .filter(|node| matches!(node.kind, StrategyNodeKind::Unit(_)))
            .count()
    };
    assert_eq!(units(&plan), 3);
    let back = RollbackRequest {
        request,
        progress: vec![UnitProgress {
            application: "shop".into(),
            server: "s0".into(),
            state: UnitState::Failed,
        }],
    };
    assert_eq!(units(&grouped.rollback(&back).await.unwrap()), 1);
    let judgement = grouped
        .judge(&JudgeRequest {
            stage: "x".into(),
            parameters: json!({}),
            observations: Vec::new(),
        })
        .await
        .unwrap();
    assert_eq!(judgement.verdict, Verdict::GoOn);

    let info = plugins
        .get_of_kind(PluginKind::PublicCommand, "system-info", None)
        .unwrap();
    let command = info
        .render(&CommandRequest {
            parameters: json!({ "disk_path": "/data" }),
            target: server("s1"),
        })
        .await
        .unwrap();
    assert_eq!(command.env["DISK_PATH"], Value::Plain("/data".into()));
    let result = info
        .interpret(&CommandRun {
            parameters: json!({}),
            outcome: CommandOutcome::Finished,
            exit_code: Some(0),
            output: "cpus=4\nos=debian".into(),
            dropped_bytes: 0,
        })
        .await
        .unwrap();
    assert_eq!(result.data["cpus"], 4);

    let basics = plugins
        .get_of_kind(PluginKind::Diagnostic, "server-basics", None)
        .unwrap();
    let diagnosis = basics
        .diagnose(&diagnosis("s1", json!({})), Arc::new(FakeHost))
        .await
        .unwrap();
    let states: Vec<_> = diagnosis
        .report
        .findings
        .iter()
        .map(|finding| finding.state)
        .collect();
    assert_eq!(
        states,
        [
            FindingState::Failed,
            FindingState::Skipped,
            FindingState::Skipped
        ]
    );
    assert_eq!(diagnosis.looks.len(), 3);
    assert_eq!(diagnosis.looks[0].function, "probes.run");
    assert_eq!(diagnosis.looks[0].answer["ok"]["data"]["used_percent"], 97);
    plugins.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_misbehaves_gets_its_own_attributed_error() {
    let home = Home::new();
    let plugins = open_guests(&home).await;
    let stack = plugins.get("test-stack", None).unwrap();
    for (behave, code, text) in [
        ("loop", "plugin_time_limit", "300 ms"),
        ("allocate", "plugin_memory_limit", "67108864"),
        ("trap", "plugin_trap", "unreachable"),
        ("recurse", "plugin_trap", "stack"),
        ("giant", "plugin_output_limit", "8388608"),
        ("refuse", "plugin_refused", "is not to my liking"),
        ("unknown-phase", "plugin_invalid_answer", "steps[0].phase"),
        ("unknown-action", "plugin_invalid_answer", "teleport"),
        (
            "same-server-twice",
            "plugin_invalid_answer",
            "server-env[1]",
        ),
    ] {
        let error = stack
            .lifecycle(&lifecycle(json!({ "behave": behave })))
            .await
            .unwrap_err();
        assert_eq!(error.failure.code(), code, "{behave}: {error}");
        let message = error.to_string();
        assert!(message.contains(text), "{behave}: {message}");
        assert!(
            message.contains("test-stack@1.0.0") && message.contains("`lifecycle`"),
            "{message}"
        );
        // The next call of the same plugin knows nothing of it.
        stack.lifecycle(&lifecycle(json!({}))).await.unwrap();
    }
    // Ten thousand long messages: bounded, and no failure.
    stack
        .lifecycle(&lifecycle(json!({ "behave": "chatter" })))
        .await
        .unwrap();

    let strategy = plugins.get("test-strategy", None).unwrap();
    for (behave, text) in [
        ("bad-parent", "nodes[0].parent"),
        ("bad-weight", "1000"),
        ("unknown-node", "teleport"),
    ] {
        let error = strategy
            .plan(&release(json!({ "behave": behave }), 3))
            .await
            .unwrap_err();
        assert_eq!(error.failure.code(), "plugin_invalid_answer", "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    let back = RollbackRequest {
        request: release(json!({ "behave": "rollback-trap" }), 3),
        progress: Vec::new(),
    };
    let error = strategy.rollback(&back).await.unwrap_err();
    assert!(matches!(error.failure, CallFailure::Trap { .. }), "{error}");

    let command = plugins.get("test-command", None).unwrap();
    let run = CommandRun {
        parameters: json!({ "behave": "not-json" }),
        outcome: CommandOutcome::Finished,
        exit_code: Some(0),
        output: String::new(),
        dropped_bytes: 0,
    };
    let error = command.interpret(&run).await.unwrap_err();
    assert!(error.to_string().contains("`data` is not JSON"), "{error}");
    let error = command.plan(&release(json!({}), 1)).await.unwrap_err();
    assert_eq!(error.failure.code(), "plugin_wrong_kind");
    plugins.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diagnostic_cannot_wait_or_ask_for_ever() {
    let home = Home::new();
    home.drop_file("diagnostic.wasm", &guest("diagnostic", ";1.0.0;ok;"));
    let mut config = home.config();
    config.limits.host_call_time = Duration::from_millis(100);
    let plugins = home.open_with(config).await;
    let looker = plugins.get("test-diagnostic", None).unwrap();
    let host: Arc<dyn Host> = Arc::new(FakeHost);
    let error = looker
        .diagnose(&diagnosis("hangs", json!({})), Arc::clone(&host))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error.failure,
            CallFailure::HostCallTime {
                function: "probes.run",
                limit_ms: 100
            }
        ),
        "{error}"
    );
    let forever = diagnosis("s1", json!({ "behave": "probe-for-ever" }));
    let error = looker
        .diagnose(&forever, Arc::clone(&host))
        .await
        .unwrap_err();
    assert!(
        matches!(error.failure, CallFailure::HostCalls { limit: 500 }),
        "{error}"
    );
    looker
        .diagnose(&diagnosis("s1", json!({})), host)
        .await
        .unwrap();
    plugins.close().await;
}

#[derive(Default)]
struct Kept(Mutex<Vec<Arc<CallRecord>>>);

impl CallSink for Kept {
    fn record(&self, record: &Arc<CallRecord>) {
        self.0.lock().unwrap().push(Arc::clone(record));
    }
}

/// Every worker of the executor is busy with a guest that loops; others are answered long before those are stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_are_served_while_guests_loop_and_every_call_is_recorded() {
    let home = Home::new();
    home.drop_file("stack.wasm", &guest("tech-stack", ";1.0.0;ok;"));
    let kept = Arc::new(Kept::default());
    let mut config = home.config();
    config.limits.guest_time = Duration::from_secs(2);
    config.sink = Some(kept.clone());
    let plugins = home.open_with(config).await;
    let stack = plugins.get("test-stack", None).unwrap();
    let loops: Vec<_> = (0..4)
        .map(|_| {
            let stack = stack.clone();
            tokio::spawn(async move {
                stack
                    .lifecycle(&lifecycle(json!({ "behave": "loop" })))
                    .await
            })
        })
        .collect();
    for _ in 0..20 {
        stack.lifecycle(&lifecycle(json!({}))).await.unwrap();
    }
    assert!(
        loops.iter().all(|one| !one.is_finished()),
        "they loop still"
    );
    for one in loops {
        let error = one.await.unwrap().unwrap_err();
        assert!(
            matches!(error.failure, CallFailure::GuestTime { limit_ms: 2000 }),
            "{error}"
        );
    }
    let records = std::mem::take(&mut *kept.0.lock().unwrap());
    let failed = records.iter().filter(
        |record| matches!(&record.outcome, Err(failure) if failure.code == "plugin_time_limit"),
    );
    assert!(
        failed.clone().count() == 4
            && failed
                .clone()
                .all(|record| record.usage.guest_time >= Duration::from_secs(2))
    );
    assert_eq!(
        records
            .iter()
            .filter(|record| record.outcome.is_ok())
            .count(),
        20
    );
    assert!(
        records
            .iter()
            .all(|record| record.usage.memory_bytes >= 65_536 && record.export == Export::Lifecycle)
    );
    plugins.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugins_own_memory_setting_counts() {
    let home = Home::new();
    home.drop_file("stack.wasm", &guest("tech-stack", ";1.0.0;ok;"));
    let mut config = home.config();
    config.limits.memory_bytes_by_plugin = [("test-stack".to_owned(), 4 << 20)].into();
    let plugins = home.open_with(config).await;
    let stack = plugins.get("test-stack", None).unwrap();
    let error = stack
        .lifecycle(&lifecycle(json!({ "behave": "allocate" })))
        .await
        .unwrap_err();
    assert_eq!(
        error.failure,
        CallFailure::Memory {
            limit_bytes: 4 << 20
        }
    );
    plugins.close().await;
}

#[test]
fn guests_import_nothing_but_their_world() {
    let engine = wasmtime::Engine::default();
    for (name, allowed) in [
        ("binary", vec!["types", "logging"]),
        ("grouped", vec!["types", "logging"]),
        ("system-info", vec!["types", "logging"]),
        (
            "server-basics",
            vec!["types", "logging", "probes", "resources"],
        ),
    ] {
        let file = shipped().join(format!("{name}.wasm"));
        let bytes = std::fs::read(file).unwrap();
        let component = wasmtime::component::Component::from_binary(&engine, &bytes).unwrap();
        let allowed: Vec<String> = allowed
            .into_iter()
            .map(|interface| format!("windlass:plugin/{interface}@1.0.0"))
            .collect();
        for (import, _) in component.component_type().imports(&engine) {
            assert!(
                allowed.iter().any(|name| name == import),
                "{name} imports {import}"
            );
        }
    }
}
