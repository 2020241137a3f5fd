//! `preview_1000_servers_ms`, `preview_1000_servers_mb`, `engine_steps_per_s_1000` and `api_p99_under_load_ms`: one release of
//! 20 applications, with dependencies between them, to 1,000 servers.
//!
//! The platform runs in this process, with its store on the disk, its plugins and its API over HTTP; agents alone are
//! simulated: they take tasks from their inboxes and report to the engine, as the gateway does for real ones. Whoever asks
//! the API is this program started again, so that neither memory nor time of the client counts.
//!
//! | figure | what |
//! | --- | --- |
//! | `preview_1000_servers_ms` | request to the last byte of the answer, the complete plan; median of [`PREVIEWS`] |
//! | `preview_1000_servers_mb` | growth of the peak of resident memory over those previews; a megabyte is 10^6 bytes |
//! | `engine_steps_per_s_1000` | steps per second over the whole run, each report durable before its answer; median of [`ROUNDS`] |
//! | `api_p99_under_load_ms` | what 99 of 100 requests wait at most during all those runs: an application, an order, pages of orders and servers, by turns over [`CLIENTS`] connections |

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    process::Command,
    task::JoinSet,
};
use windlass::{
    api::client::Client,
    config::ServerConfig,
    gateway::{Directory as _, Registration},
    platform,
    service::servers::Servers,
};
use windlass_domain::task::Outcome;
use windlass_protocol::{Identity, ServerFacts};
use windlass_tests::{
    host::{eventually, items, plugins, program, tar_gz, text},
    simulated::{Sessions, SimulatedAgents},
};

const SERVERS: u32 = 1000;
const APPLICATIONS: u32 = 20;
/// So many applications follow each other by their dependencies.
const STAGES: u32 = 4;
const PREVIEWS: usize = 7;
const ROUNDS: usize = 5;
const CLIENTS: usize = 4;
/// Between two requests of one connection.
const BETWEEN: Duration = Duration::from_millis(5);
const WORKSPACE: &str = "large";

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [] => measure().await,
        [role, address, token] if role == "preview" => previews(address, token).await,
        [role, address, token, paths @ ..] if role == "ask" => {
            ask_on(address, token, paths).await;
        }
        _ => panic!("usage: bench_fleet"),
    }
}

async fn measure() {
    let directory = tempfile::tempdir().expect("a directory");
    let (sessions, nudged) = Sessions::new();
    let mut config = ServerConfig::local(
        &directory.path().join("server"),
        (Ipv4Addr::LOCALHOST, 0).into(),
        &plugins(),
    );
    config.compile_command = Some(vec![
        program("windlass").into_os_string(),
        windlass_runtime::COMPILE_SUBCOMMAND.into(),
    ]);
    let running = platform::start_with(config, |_| sessions)
        .await
        .expect("the platform starts");
    let agents = SimulatedAgents::of(
        &running.engine,
        &running.store,
        Arc::new(|_, _| Outcome::Succeeded),
        nudged,
    );
    running.ready().await;
    let token = fs::read_to_string(&running.admin_token_file).expect("the token");
    let token = token.trim();
    let address = running.api_url.trim_start_matches("http://");
    let api = Client::new(address, token);
    let started = Instant::now();
    let order = prepare(&api, &running).await;
    eprintln!(
        "{SERVERS} servers of {APPLICATIONS} applications made in {:.1} s",
        started.elapsed().as_secs_f64()
    );

    preview(address, token, &order).await;
    let app = text(&items(&api.get("/v1/apps").await.expect("applications"))[0]["id"]);
    let paths = [
        format!("/v1/apps/{app}"),
        format!("/v1/workspaces/{WORKSPACE}/orders"),
        format!("/v1/workspaces/{WORKSPACE}/servers"),
    ];
    let mut rates = Vec::new();
    let mut waits = Vec::new();
    for round in 0..=ROUNDS {
        let (rate, asked) = release(&api, (address, token), &order, &paths).await;
        eprintln!(
            "{rate:.0} steps/s, {} requests meanwhile, the slowest {:.1} ms",
            asked.len(),
            asked.iter().copied().fold(0.0, f64::max)
        );
        // The first one installs: it has nothing to stop, and warms up.
        if round > 0 {
            rates.push(rate);
            waits.extend(asked);
        }
    }
    println!("engine_steps_per_s_1000 {:.0} 1/s", median(&mut rates));
    waits.sort_by(f64::total_cmp);
    let at = waits.len() * 99 / 100;
    println!("api_p99_under_load_ms {:.1} ms", waits[at]);
    running.shutdown().await.expect("the store is closed");
    agents.shutdown().await;
}

fn median(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn path(rest: &str) -> String {
    format!("/v1/workspaces/{WORKSPACE}/{rest}")
}

/// Makes servers, applications, packages and instances; answers an order of them all.
async fn prepare(api: &Client, running: &platform::Running) -> Value {
    let workspace = json!({ "name": WORKSPACE, "zones": ["zone-a", "zone-b"] });
    let workspace = api
        .post("/v1/workspaces", &workspace)
        .await
        .expect("a workspace");
    let servers = Servers::new(running.store.clone());
    let mut codes = Vec::new();
    for cell in workspace["cells"].as_array().expect("cells") {
        let code = json!({ "quota": SERVERS, "cell": cell["name"] });
        let code = api.post(&path("activation-codes"), &code).await;
        codes.push(text(&code.expect("a code")["code"]));
    }
    let mut ids = Vec::new();
    for number in 0..SERVERS {
        let mut seed = [1; 32];
        seed[..4].copy_from_slice(&number.to_be_bytes());
        let registration = Registration {
            public_key: Identity::from_seed(seed).public_key(),
            name: Some(format!("server-{number:04}")),
            facts: ServerFacts {
                host_name: format!("server-{number:04}"),
                addresses: vec![format!("10.0.{}.{}", number / 250, number % 250 + 1)],
                os: "debian 12".to_owned(),
                arch: "x86_64".to_owned(),
                cores: 4,
                ..ServerFacts::default()
            },
            source: IpAddr::V4(Ipv4Addr::LOCALHOST),
        };
        let code = codes[number as usize % codes.len()]
            .parse()
            .expect("a code");
        let registered = servers.register(&code, registration).await;
        ids.push(registered.expect("a server").server.to_string());
    }
    let mut targets = Vec::new();
    let mut dependencies = Vec::new();
    let each = SERVERS / APPLICATIONS;
    for number in 0..APPLICATIONS {
        let name = format!("app-{number:02}");
        let app = json!({ "name": name, "tech_stack": { "name": "binary", "version": "*" } });
        let app = text(&api.post("/v1/apps", &app).await.expect("an application")["id"]);
        let file = tar_gz(&[("run.sh", 0o755, b"#!/bin/sh\nexec sleep 1000000\n")]);
        let upload = path(&format!(
            "packages?app={name}&version=1.0.0&file_name={name}.tar.gz"
        ));
        let package = text(&api.upload(&upload, file).await.expect("a package")["id"]);
        let instance = json!({
            "name": name, "app": app,
            "env": { "LISTEN": "0.0.0.0:8080", "MODE": "production" },
            "parameters": {
                "program": "run.sh",
                "configure_script": "printf 'listen %s\\n' \"$LISTEN\" > conf\n",
                "health": { "kind": "script", "script": "true" },
            },
        });
        let instance = api.post(&path("service-instances"), &instance).await;
        let instance = text(&instance.expect("an instance")["id"]);
        let mine: Vec<&String> = ids
            .iter()
            .skip((number * each) as usize)
            .take(each as usize)
            .collect();
        for servers in mine.chunks(25) {
            let bound = json!({ "servers": servers, "variables": {} });
            let to = path(&format!("service-instances/{instance}/servers"));
            api.post(&to, &bound).await.expect("servers are bound");
        }
        targets.push(json!({ "instance": instance, "package": package }));
        if number % STAGES > 0 {
            dependencies.push(format!("{name}>app-{:02}", number - 1));
        }
    }
    json!({
        "title": "everything", "strategy": "grouped", "parameters": { "grouping": "all-in-one" },
        "limits": { "max_unavailable": "100%", "max_in_flight": SERVERS, "min_healthy_members": 0 },
        "dependencies": dependencies.join(","), "targets": targets,
    })
}

/// The figures of previews.
async fn preview(address: &str, token: &str, order: &Value) {
    // What the first preview of all costs is no figure of its own: plugins are loaded, caches filled.
    ask_previews(address, token, order, 1).await;
    let before = memory_kb("VmRSS:");
    fs::write("/proc/self/clear_refs", "5").expect("the peak is set back");
    let mut times = ask_previews(address, token, order, PREVIEWS).await;
    let grown = memory_kb("VmHWM:").saturating_sub(before);
    println!("preview_1000_servers_ms {:.0} ms", median(&mut times));
    println!(
        "preview_1000_servers_mb {:.0} MB",
        grown as f64 * 1024.0 / 1e6
    );
}

fn memory_kb(line: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has it");
    let found = status.lines().find_map(|text| text.strip_prefix(line));
    let kb = found.and_then(|rest| rest.trim().split(' ').next()?.parse().ok());
    kb.expect("a figure in kB")
}

/// Has another process preview an order; answers how long each took, in milliseconds.
async fn ask_previews(address: &str, token: &str, order: &Value, times: usize) -> Vec<f64> {
    let mut client = Command::new(std::env::current_exe().expect("this program"))
        .args(["preview", address, token])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("the client");
    let mut input = client.stdin.take().expect("piped");
    let mut lines = BufReader::new(client.stdout.take().expect("piped")).lines();
    let line = format!("{order}\n");
    let mut found = Vec::new();
    for _ in 0..times {
        input.write_all(line.as_bytes()).await.expect("an order");
        let line = lines.next_line().await.expect("a line");
        let line = line.expect("the client answers");
        let (ms, bytes) = line.split_once(' ').expect("two figures");
        eprintln!("a preview of {bytes} bytes in {ms} ms");
        found.push(ms.parse().expect("a figure"));
    }
    drop(input);
    client.wait().await.expect("the client ends");
    found
}

/// The client's side: for each order on its input, the time and the size of its preview.
async fn previews(address: &str, token: &str) {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(body) = lines.next_line().await.expect("a line") {
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        let head = format!(
            "POST {} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            path("orders/preview"),
            body.len(),
        );
        let started = Instant::now();
        stream.write_all(head.as_bytes()).await.expect("a request");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("an answer");
        let ms = started.elapsed().as_secs_f64() * 1000.0;
        let start = String::from_utf8_lossy(&answer[..answer.len().min(2000)]).into_owned();
        assert!(start.starts_with("HTTP/1.1 200 "), "{start}");
        println!("{ms:.1} {}", answer.len());
    }
}

/// One release to all servers: steps per second, and how long each request meanwhile took, in milliseconds.
async fn release(
    api: &Client,
    (address, token): (&str, &str),
    order: &Value,
    paths: &[String],
) -> (f64, Vec<f64>) {
    let made = api.post(&path("orders"), order).await.expect("an order");
    let id = text(&made["id"]);
    let plan = api.get(&path(&format!("orders/{id}/plan"))).await;
    let plan = plan.expect("its plan");
    let nodes = plan["plan"]["nodes"].as_array().expect("nodes");
    let steps = nodes.iter().filter(|node| !node["kind"]["step"].is_null());
    let steps = steps.count();
    drop(plan);
    let mut client = Command::new(std::env::current_exe().expect("this program"))
        .args(["ask", address, token])
        .args(paths)
        .arg(path(&format!("orders/{id}")))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("the client");
    let mut lines = BufReader::new(client.stdout.take().expect("piped")).lines();
    let ready = lines.next_line().await.expect("a line");
    assert_eq!(ready.as_deref(), Some("ready"), "the client failed");
    let started = Instant::now();
    let run = json!({ "action": "run" });
    api.post(&path(&format!("orders/{id}/actions")), &run)
        .await
        .expect("it runs");
    let ended = eventually("the order has ended", || async {
        let order = api.get(&path(&format!("orders/{id}"))).await;
        let order = order.map_err(|error| error.to_string())?;
        match order["state"].as_str() {
            Some("succeeded") => Ok(order),
            Some(_) | None => Err(order.to_string()),
        }
    })
    .await;
    let elapsed = started.elapsed();
    assert_eq!(ended["counts"]["succeeded"], SERVERS, "{ended}");
    drop(client.stdin.take());
    let mut waits = Vec::new();
    while let Some(line) = lines.next_line().await.expect("a line") {
        waits.push(line.parse().expect("a figure"));
    }
    client.wait().await.expect("the client ends");
    (steps as f64 / elapsed.as_secs_f64(), waits)
}

/// The client's side: asks for paths by turns until its input ends, then says how long each answer took, in milliseconds.
async fn ask_on(address: &str, token: &str, paths: &[String]) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for first in 0..CLIENTS {
        let api = Client::new(address, token);
        let (stop, paths) = (stop.clone(), paths.to_vec());
        clients.spawn(async move {
            let mut waits = Vec::new();
            for path in paths.iter().cycle().skip(first) {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let started = Instant::now();
                api.get(path).await.expect("an answer");
                waits.push(started.elapsed().as_secs_f64() * 1000.0);
                tokio::time::sleep(BETWEEN).await;
            }
            waits
        });
    }
    println!("ready");
    let mut input = Vec::new();
    tokio::io::stdin()
        .read_to_end(&mut input)
        .await
        .expect("the end of the input");
    stop.store(true, Ordering::Relaxed);
    while let Some(waits) = clients.join_next().await {
        for wait in waits.expect("a client") {
            println!("{wait:.3}");
        }
    }
}
