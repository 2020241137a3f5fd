//! Invocations on a real server with real agents: what each end looks like, and that a script runs at most once whatever dies.

use std::{fs, path::Path};

use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};
use windlass::api::client::{Answer, ClientError, EventStream};
use windlass_tests::{
    guests::{PluginDirectory, guest, wait_active},
    host::{Setup, TestHost, WITHIN, eventually, items, text},
};

async fn host_with_commands(agents: u32) -> (TestHost, PluginDirectory) {
    host_with(agents, &[]).await
}

async fn host_with(agents: u32, arguments: &[&str]) -> (TestHost, PluginDirectory) {
    let plugins = PluginDirectory::shipped();
    plugins.drop_in("shell.wasm", &guest("public-command", "shell", "1.0.0"));
    let setup = Setup {
        agents,
        plugins: Some(plugins.path()),
        server_args: arguments.iter().map(|&argument| argument.into()).collect(),
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
    assert_eq!(
        (&run["state"], &run["exit_code"], &run["error"]["code"]),
        (&json!("finished"), &json!(0), &json!("OutputLimit")),
        "{run}"
    );
    assert!(
        text(&run["error"]["message"]).contains(&run["dropped_bytes"].to_string()),
        "{}",
        run["error"]
    );

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

/// The next event of a live output: its kind, its id, its data.
async fn next(stream: &mut EventStream) -> (String, String, Value) {
    let event = tokio::time::timeout(WITHIN, stream.next())
        .await
        .expect("an event in time")
        .expect("the stream holds")
        .expect("an event");
    let data = serde_json::from_str(&event.data).expect("JSON");
    (event.event, event.id, data)
}

/// What a live output says up to a text, or up to its end: everything in one, and the last event.
async fn read_to(stream: &mut EventStream, wanted: &str) -> (String, (String, String, Value)) {
    let mut all = String::new();
    loop {
        let event = next(stream).await;
        if event.0 == "output" {
            all.push_str(&text(&event.2["text"]));
        }
        if event.0 == "end" || (!wanted.is_empty() && all.contains(wanted)) {
            return (all, event);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_live_and_a_day_has_a_quota_that_nothing_forgets() {
    const PER_DAY: usize = 4;
    let (mut host, _plugins) = host_with(1, &["--invocations-per-day", "4"]).await;
    let (_, server) = host.servers().await.remove(0);
    let go = host.path().join("go");
    let run = format!(
        "echo first; while [ ! -e {} ]; do sleep 0.1; done; echo second; exit 4",
        go.display()
    );

    // --- output while it runs
    let made = host
        .api
        .post(&host.ws("invocations"), &shell(&run, &[&server]))
        .await
        .expect("an invocation");
    let run = host.ws(&format!(
        "invocations/{}/servers/{server}/output",
        text(&made["id"])
    ));
    let live = format!("{run}/live");
    let mut stream = host.api.events(&live, None).await.expect("a stream");
    let (said, (_, known, _)) = read_to(&mut stream, "first\n").await;
    assert_eq!((said.as_str(), known.as_str()), ("first\n", "6"));
    let now = host.api.get(&run).await.expect("the output of now");
    assert_eq!(
        (&now["output"], &now["ended"]),
        (&json!("first\n"), &json!(false))
    );
    fs::write(&go, "").expect("the test's sign");
    let (said, (_, _, end)) = read_to(&mut stream, "").await;
    assert_eq!(said, "second\n");
    assert_eq!(
        (&end["state"], &end["exit_code"], &end["error"]["code"]),
        (&json!("finished"), &json!(4), &json!("ExitCodeNonzero")),
        "{end}"
    );
    assert_eq!(end["result"]["result"]["summary"], "done", "{end}");
    assert!(stream.next().await.expect("it ends well").is_none());
    // Whoever comes later reads the same, from where they were.
    for (after, expect) in [(None, "first\nsecond\n"), (Some("6"), "second\n")] {
        let mut stream = host.api.events(&live, after).await.expect("a stream");
        let (said, (kind, _, _)) = read_to(&mut stream, "").await;
        assert_eq!((said.as_str(), kind.as_str()), (expect, "end"));
    }
    let now = host.api.get(&run).await.expect("the output");
    assert_eq!(
        (&now["output"], &now["ended"], &now["next_offset"]),
        (&json!("first\nsecond\n"), &json!(true), &json!(13))
    );
    let other = run.replace(&server, "srv_00000000000000000000000000000000");
    for path in [other.clone(), format!("{other}/live")] {
        let absent = host.api.events(&path, None).await.err().expect("no run");
        assert!(absent.to_string().contains("404"), "{absent}");
    }

    // --- the quota. A day may end in the middle: then the count begins again, and so does this part.
    let (api, list, quota) = (
        host.api.clone(),
        host.ws("invocations"),
        host.ws("invocation-quota"),
    );
    let body = Bytes::from(shell("true", &[&server]).to_string());
    let post = async |key: Option<&str>| -> Answer {
        let headers: Vec<_> = [("content-type", "application/json")]
            .into_iter()
            .chain(key.map(|key| ("idempotency-key", key)))
            .collect();
        let answer = api.request(Method::POST, &list, body.clone(), &headers);
        answer.await.expect("an answer")
    };
    loop {
        let before = api.get(&quota).await.expect("the quota");
        assert_eq!(before["limit"], PER_DAY, "{before}");
        let used = before["used"].as_u64().expect("a figure");
        // What is refused does not count, and the same request counts once.
        let bad = with(shell("true", &[&server]), "timeout_s", json!(86_401));
        api.post(&list, &bad).await.expect_err("out of limit");
        let key = text(&before["resets_at"]);
        let (first, again) = (post(Some(&key)).await, post(Some(&key)).await);
        assert_eq!((first.status, again.status), (201, 201));
        assert_eq!(first.json()["id"], again.json()["id"]);
        let many = tokio::join!(post(None), post(None), post(None), post(None));
        let many: [Answer; 4] = many.into();
        // Nothing forgets: neither of these ends is one that the server chose.
        host.kill();
        host.boot(&[]).await;
        let refused = post(None).await;
        let after = api.get(&quota).await.expect("the quota");
        if before["resets_at"] != after["resets_at"] {
            continue;
        }
        let made = many.iter().filter(|answer| answer.status == 201).count();
        assert_eq!(used as usize + 1 + made, PER_DAY, "{many:?}");
        assert_eq!(after["used"], PER_DAY, "{after}");
        for answer in many.iter().filter(|answer| answer.status != 201) {
            assert_eq!(answer.status, 429, "{}", answer.text());
        }
        let problem = refused.json();
        assert_eq!(
            (refused.status, &problem["code"], &problem["limit"]),
            (429, &json!("invocation_quota_reached"), &json!(PER_DAY)),
            "{problem}"
        );
        let retry_after = refused.header("retry-after").expect("when there is more");
        let retry_after: u64 = retry_after.parse().expect("seconds");
        assert!((1..=86_400).contains(&retry_after), "{retry_after}");
        let detail = text(&problem["detail"]);
        assert!(
            detail.contains(&text(&after["resets_at"])) && detail.contains(&PER_DAY.to_string()),
            "{detail}"
        );
        break;
    }
    // Each that was made is there, and each ends.
    let listed = items(&api.get(&list).await.expect("a list"));
    for made in &listed {
        let path = format!("{list}/{}?wait_s=60", text(&made["id"]));
        let ended = api.get(&path).await.expect("it");
        assert_eq!(ended["state"], "finished", "{ended}");
    }
}
