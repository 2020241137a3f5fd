//! Invocations on a real server with real agents: what each end looks like, and that a script runs at most once whatever dies.

use std::{fs, path::Path};

use serde_json::{Value, json};
use windlass::api::client::ClientError;
use windlass_tests::{
    guests::{PluginDirectory, guest, wait_active},
    host::{Setup, TestHost, eventually, items, text},
};

async fn host_with_commands(agents: u32) -> (TestHost, PluginDirectory) {
    let plugins = PluginDirectory::shipped();
    plugins.drop_in("shell.wasm", &guest("public-command", "shell", "1.0.0"));
    let setup = Setup {
        agents,
        plugins: Some(plugins.path()),
        ..Setup::default()
    };
    let host = TestHost::start(setup).await;
    wait_active(&host, "shell@1.0.0").await;
    (host, plugins)
}

async fn invoke(host: &TestHost, body: &Value) -> Result<Value, ClientError> {
    host.api.post(&host.ws("invocations?wait_s=60"), body).await
}

fn shell(run: &str, servers: &[&str]) -> Value {
    json!({ "command": "shell", "parameters": { "run": run }, "servers": servers })
}

fn with(mut body: Value, name: &str, value: Value) -> Value {
    body[name] = value;
    body
}

async fn written(path: &Path) -> String {
    eventually(&format!("{} is written", path.display()), || async {
        fs::read_to_string(path)
            .ok()
            .filter(|text| text.ends_with('\n'))
            .ok_or_else(|| "not yet".to_owned())
    })
    .await
}

async fn is_gone(pid: &str) {
    eventually(&format!("process {pid} is gone"), || async {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        let ended = stat
            .rsplit_once(") ")
            .is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']));
        if ended { Ok(()) } else { Err(stat) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_runs_on_servers_and_every_end_says_what_happened() {
    let (mut host, _plugins) = host_with_commands(3).await;
    let servers = host.servers().await;
    let ids: Vec<&str> = servers.iter().map(|(_, id)| id.as_str()).collect();

    // --- a shipped command on all of them, with its structured result
    let body = json!({ "command": "system-info", "servers": ids, "max_in_flight": 2 });
    let info = invoke(&host, &body).await.expect("an invocation");
    assert_eq!(info["state"], "finished", "{info}");
    assert_eq!(info["counts"]["finished"], 3, "{info}");
    let runs = info["servers"].as_array().expect("servers");
    for (run, (name, id)) in runs.iter().zip(&servers) {
        assert_eq!(
            (&run["server"], &run["server_name"]),
            (&json!(id), &json!(name))
        );
        assert_eq!(run["exit_code"], 0, "{run}");
        let result = &run["result"]["result"];
        assert_eq!(result["succeeded"], true, "{run}");
        assert!(result["data"]["cpus"].as_u64() > Some(0), "{run}");
        assert!(
            run["error"].is_null() && run["finished_at"].is_string(),
            "{run}"
        );
    }
    let service = json!({ "command": "service-control@1.0.0", "parameters": { "unit": "no-such-unit", "action": "start" }, "servers": [ids[0]] });
    let service = invoke(&host, &service).await.expect("an invocation");
    let result = &service["servers"][0]["result"]["result"];
    assert_eq!(result["succeeded"], false, "{service}");
    let problem = text(&result["data"]["problem"]);
    assert!(
        ["no_systemd", "no_such_unit"].contains(&problem.as_str()),
        "{service}"
    );
    let disk = json!({ "command": "disk-resize-check", "servers": [ids[0]] });
    let disk = invoke(&host, &disk).await.expect("an invocation");
    assert!(
        disk["servers"][0]["result"]["result"]["data"]["used_percent"].is_number(),
        "{disk}"
    );

    // --- other ends
    let code = invoke(&host, &shell("echo out; echo err >&2; exit 3", &ids[..1]))
        .await
        .expect("an invocation");
    let run = &code["servers"][0];
    assert_eq!(
        (&code["state"], &run["state"]),
        (&json!("finished"), &json!("finished"))
    );
    assert_eq!(
        (&run["exit_code"], &run["error"]["code"]),
        (&json!(3), &json!("ExitCodeNonzero"))
    );
    let output = text(&run["output"]);
    assert!(output.contains("out") && output.contains("err"), "{output}");
    let user = with(shell("true", &ids[..1]), "run_as", json!("nobody-at-all"));
    let user = invoke(&host, &user).await.expect("an invocation");
    let run = &user["servers"][0];
    assert_eq!(
        (&user["state"], &run["error"]["code"]),
        (&json!("failed"), &json!("UserNotExists"))
    );
    assert!(!text(&run["error"]["mend"]).is_empty(), "{run}");
    let much = invoke(&host, &shell("yes | head -c 300000", &ids[..1]))
        .await
        .expect("an invocation");
    let run = &much["servers"][0];
    assert!(
        run["dropped_bytes"].as_u64() > Some(200_000),
        "{}",
        run["dropped_bytes"]
    );
    assert!(text(&run["output"]).len() <= 24 * 1024);

    // --- a time-out, which is at least ten seconds, kills the whole tree; meanwhile another is stopped by a person
    let (slow, stopped) = (host.path().join("slow"), host.path().join("stopped"));
    let sleep = |pid: &Path| format!("sleep 600 & echo $! > {}; sleep 600", pid.display());
    let timed = with(shell(&sleep(&slow), &ids[..1]), "timeout_s", json!(1));
    let timed = host
        .api
        .post(&host.ws("invocations"), &timed)
        .await
        .expect("an invocation");
    assert_eq!(timed["servers"][0]["timeout_ms"], 10_000, "{timed}");
    let long = host
        .api
        .post(
            &host.ws("invocations"),
            &shell(&sleep(&stopped), &ids[1..2]),
        )
        .await
        .expect("an invocation");
    let (timed, long) = (text(&timed["id"]), text(&long["id"]));
    let child = written(&stopped).await;
    let running = host
        .api
        .get(&host.ws(&format!("invocations/{long}")))
        .await
        .expect("it");
    assert_eq!(running["state"], "running", "{running}");
    host.api
        .post(&host.ws(&format!("invocations/{long}/stop")), &json!({}))
        .await
        .expect("it stops");
    let ended = host
        .api
        .get(&host.ws(&format!("invocations/{long}?wait_s=60")))
        .await
        .expect("it");
    assert_eq!(
        (&ended["state"], &ended["servers"][0]["state"]),
        (&json!("stopped"), &json!("stopped"))
    );
    is_gone(&child).await;
    let again = host
        .api
        .post(&host.ws(&format!("invocations/{long}/stop")), &json!({}))
        .await
        .expect_err("it has ended")
        .to_string();
    assert!(again.contains("order_ended"), "{again}");
    let child = written(&slow).await;
    let ended = host
        .api
        .get(&host.ws(&format!("invocations/{timed}?wait_s=60")))
        .await
        .expect("it");
    assert_eq!(
        ended["servers"][0]["error"]["code"], "ExecutionTimeout",
        "{ended}"
    );
    assert_eq!(ended["state"], "failed", "{ended}");
    is_gone(&child).await;

    // --- an agent that is away
    host.kill_agent(2);
    let away = with(shell("true", &ids), "delivery_timeout_s", json!(1));
    let away = invoke(&host, &away).await.expect("an invocation");
    assert_eq!(away["state"], "partial_failed", "{away}");
    assert_eq!(
        (&away["counts"]["finished"], &away["counts"]["failed"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(
        away["servers"][2]["error"]["code"], "ClientNotOnline",
        "{away}"
    );

    // --- what is refused leaves nothing behind
    let before = items(
        &host
            .api
            .get(&host.ws("invocations?page_size=100"))
            .await
            .expect("a list"),
    );
    let good = || shell("true", &ids[..1]);
    let many: Vec<String> = (0..51).map(|number| format!("srv_{number:032x}")).collect();
    for (body, code) in [
        (with(good(), "servers", json!([])), "out_of_limit"),
        (with(good(), "servers", json!(many)), "out_of_limit"),
        (
            with(good(), "servers", json!([ids[0], ids[0]])),
            "server_unknown",
        ),
        (
            with(
                good(),
                "servers",
                json!(["srv_00000000000000000000000000000000"]),
            ),
            "server_unknown",
        ),
        (
            with(good(), "command", json!("server-health")),
            "plugin_not_available",
        ),
        (
            with(good(), "command", json!("shell@7.0.0")),
            "plugin_not_available",
        ),
        (
            with(good(), "parameters", json!({ "behave": 7 })),
            "parameters_invalid",
        ),
        (
            with(good(), "parameters", json!({ "behave": "trap" })),
            "plugin_call_failed",
        ),
        (with(good(), "timeout_s", json!(86_401)), "out_of_limit"),
        (with(good(), "max_in_flight", json!(0)), "out_of_limit"),
        (with(good(), "run_as", json!("a b")), "invalid_value"),
    ] {
        let refused = host.api.post(&host.ws("invocations"), &body).await;
        let error = refused.expect_err(code).to_string();
        assert!(error.contains(code), "{code}: {error}");
    }
    let after = items(
        &host
            .api
            .get(&host.ws("invocations?page_size=100"))
            .await
            .expect("a list"),
    );
    assert_eq!(before, after);
    assert_eq!(after[0]["id"], away["id"], "newest first");
    assert_eq!(
        items(&host.api.get(&host.ws("orders")).await.expect("a list")).len(),
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_dies_a_script_runs_once_and_its_end_is_known() {
    let (mut host, _plugins) = host_with_commands(2).await;
    let servers = host.servers().await;
    let ids: Vec<&str> = servers.iter().map(|(_, id)| id.as_str()).collect();
    let go = host.path().join("go");
    // Says that it began, waits for the test, and says that it ended.
    let run = format!(
        "echo $WINDLASS_TASK >> {}/tasks; while [ ! -e {} ]; do sleep 0.1; done; echo ended",
        host.path().display(),
        go.display()
    );
    let made = host
        .api
        .post(&host.ws("invocations"), &shell(&run, &ids))
        .await
        .expect("an invocation");
    let id = text(&made["id"]);
    let tasks = host.path().join("tasks");
    let lines = || {
        fs::read_to_string(&tasks)
            .unwrap_or_default()
            .lines()
            .count()
    };
    eventually("both scripts run", || async {
        if lines() == 2 {
            Ok(())
        } else {
            Err(lines().to_string())
        }
    })
    .await;
    // The server dies, and one agent with it; the other agent dies a little later, while the server is away.
    host.kill();
    host.kill_agent(0);
    host.kill_agent(1);
    fs::write(&go, "").expect("the test's sign");
    host.boot(&[]).await;
    host.start_agent(0, &[]);
    host.start_agent(1, &[]);
    let ended = host
        .api
        .get(&host.ws(&format!("invocations/{id}?wait_s=60")))
        .await
        .expect("it");
    assert_eq!(ended["state"], "finished", "{ended}");
    for run in ended["servers"].as_array().expect("servers") {
        assert_eq!(run["exit_code"], 0, "{run}");
        assert_eq!(text(&run["output"]).matches("ended").count(), 1, "{run}");
    }
    assert_eq!(
        lines(),
        2,
        "each ran once: {:?}",
        fs::read_to_string(&tasks)
    );
}
