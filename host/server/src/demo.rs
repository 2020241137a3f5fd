//! `windlass demo`: three releases of a real application on three real agents.
//!
//! Version 1 everywhere; version 2 with a beta group and a person's confirmation; a broken version 3 whose health check
//! fails, which stops after the first group and rolls back by itself. Everything goes over the API, like any user's; what
//! each server answers is fetched from the application itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::IsTerminal as _,
    net::TcpListener,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use hyper::Method;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::{
    api::client::Client,
    dev::{self, Dev, DevOptions, WORKSPACE, items},
};

/// How long one release may take.
const RELEASE_WITHIN: Duration = Duration::from_secs(180);
/// Agents of the demo.
const AGENTS: u32 = 3;

/// What `windlass demo` is told.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// Data; a directory of its own below the system's temporary one by default.
    pub data: Option<PathBuf>,
    /// Address of the API.
    pub listen: std::net::SocketAddr,
    /// The plugin directory.
    pub plugins: PathBuf,
    /// End when everything was shown.
    pub exit: bool,
}

/// Runs the demo.
///
/// # Errors
/// What was not as expected.
pub async fn run(options: &DemoOptions) -> anyhow::Result<()> {
    let own = options.data.is_none();
    let data = options.data.clone().unwrap_or_else(|| {
        std::env::temp_dir().join(format!(
            "windlass-demo-{}",
            crate::ids::new_uuid().as_simple()
        ))
    });
    let dev_options = DevOptions {
        data: data.clone(),
        listen: options.listen,
        agents: AGENTS,
        plugins: Some(options.plugins.clone()),
    };
    say("Starting the server and three agents");
    let dev = Dev::start(&dev_options).await?;
    println!("  server {}   data {}", dev.running.api_url, data.display());
    let shown = show(&dev.client).await;
    let stopped = match (&shown, options.exit) {
        (Ok(demo), false) => {
            explore(&dev, demo);
            dev::stop_signal().await?;
            dev.stop().await
        }
        (Ok(_) | Err(_), _) => dev.stop().await,
    };
    shown?;
    stopped?;
    if own {
        std::fs::remove_dir_all(&data)
            .with_context(|| format!("{} could not be removed", data.display()))?;
    }
    println!("\nEverything was as expected; no process is left.");
    Ok(())
}

/// What the demo made.
struct Demo {
    instance: String,
    order: String,
}

async fn show(client: &Client) -> anyhow::Result<Demo> {
    let ws = format!("/v1/workspaces/{WORKSPACE}");
    say("Making the application `sample`, its service instance and a pool");
    let app = client
        .post(
            "/v1/apps",
            &json!({ "name": "sample", "tech_stack": { "name": "binary", "version": "*" } }),
        )
        .await
        .context("the application was not made")?;
    let pool = client
        .post(&format!("{ws}/pools"), &json!({ "name": "front" }))
        .await
        .context("the pool was not made")?;
    let servers = items(&client.get(&format!("{ws}/servers?page_size=50")).await?);
    let mut fleet = Fleet::default();
    let mut variables = serde_json::Map::new();
    for server in &servers {
        let (id, name) = (text(&server["id"])?, text(&server["name"])?);
        let port = free_port()?;
        variables.insert(id.clone(), json!({ "PORT": port.to_string() }));
        fleet.servers.insert(id, (name, port));
    }
    let ids: Vec<&String> = fleet.servers.keys().collect();
    let instance = client
        .post(
            &format!("{ws}/service-instances"),
            &json!({
                "name": "sample",
                "app": app["id"],
                "parameters": { "program": "sample", "port": 8080, "health": { "kind": "http", "path": "/healthz", "interval_ms": 200, "deadline_s": 20 } },
                "pools": [pool["id"]],
            }),
        )
        .await
        .context("the service instance was not made")?;
    let instance = text(&instance["id"])?;
    client
        .post(
            &format!("{ws}/service-instances/{instance}/servers"),
            &json!({ "servers": ids, "variables": variables }),
        )
        .await
        .context("the servers were not bound")?;

    let one = upload(client, "1.0.0", false).await?;
    let two = upload(client, "2.0.0", false).await?;
    let three = upload(client, "3.0.0", true).await?;

    say("Releasing version 1 (one server first, then the rest)");
    let order = fleet
        .release(client, "release 1.0.0", &instance, &one, json!({}))
        .await?;
    ensure!(
        order["state"] == "succeeded",
        "version 1 should be released, and the order is {}",
        order["state"]
    );
    fleet.expect("1.0.0").await?;

    say("Releasing version 2 with a beta group (one server of each zone, then a person confirms)");
    let order = fleet
        .release(
            client,
            "release 2.0.0",
            &instance,
            &two,
            json!({ "beta_group": true }),
        )
        .await?;
    ensure!(
        order["state"] == "succeeded",
        "version 2 should be released, and the order is {}",
        order["state"]
    );
    ensure!(
        fleet.confirmed,
        "the order should have waited for confirmation"
    );
    fleet.expect("2.0.0").await?;

    say("Releasing a broken version 3 (its health check fails; automatic rollback)");
    let parameters =
        json!({ "grouping": "one-per-group", "auto_rollback": true, "health_deadline_s": 3 });
    let order = fleet
        .release(client, "release 3.0.0", &instance, &three, parameters)
        .await?;
    ensure!(
        order["state"] == "rolled_back",
        "version 3 should be rolled back, and the order is {}",
        order["state"]
    );
    let nodes = client
        .get(&format!("{ws}/orders/{}/nodes", text(&order["id"])?))
        .await?;
    let untouched = items(&nodes)
        .iter()
        .filter(|node| node["level"] == "server" && node["state"] == "not_started")
        .count();
    ensure!(
        untouched == 2,
        "it should have stopped after the first of three groups: {}",
        order["counts"]
    );
    println!("  it stopped after the first group: the other two servers were not touched");
    fleet.expect("2.0.0").await?;
    let weights = client
        .get(&format!("{ws}/pools/{}/weights", text(&pool["id"])?))
        .await?;
    let shown: Vec<String> = items(&weights)
        .iter()
        .map(|member| format!("{} {}", fleet.name_of(&member["server"]), member["weight"]))
        .collect();
    println!("  weights: {}", shown.join(", "));
    ensure!(
        shown.len() == fleet.servers.len()
            && items(&weights).iter().all(|member| member["weight"] != 0),
        "a server was left without traffic: {weights}"
    );
    Ok(Demo {
        instance,
        order: text(&order["id"])?,
    })
}

/// The servers of the demo: id → name and port of the application.
#[derive(Default)]
struct Fleet {
    servers: BTreeMap<String, (String, u16)>,
    confirmed: bool,
}

impl Fleet {
    /// Makes an order, runs it, and follows it to its end, confirming where it waits.
    async fn release(
        &mut self,
        client: &Client,
        title: &str,
        instance: &str,
        package: &str,
        parameters: Value,
    ) -> anyhow::Result<Value> {
        let orders = format!("/v1/workspaces/{WORKSPACE}/orders");
        let request = json!({
            "title": title,
            "strategy": "grouped",
            "parameters": parameters,
            "targets": [{ "instance": instance, "package": package }],
            "drain_deadline_ms": 1000,
        });
        let preview = client
            .post(&format!("{orders}/preview"), &request)
            .await
            .context("the order cannot be previewed")?;
        let nodes = preview["plan"]["nodes"].as_array().map_or(0, Vec::len);
        let digest = text(&preview["plan_digest"])?;
        println!("  plan {digest:.12} with {nodes} nodes");
        let mut create = request;
        create["plan_digest"] = preview["plan_digest"].clone();
        create["run"] = json!(true);
        let order = client
            .post(&orders, &create)
            .await
            .context("the order was not made")?;
        let id = text(&order["id"])?;
        let path = format!("{orders}/{id}");
        let followed = self.follow(client, &path, &preview["plan"]);
        let order = tokio::time::timeout(RELEASE_WITHIN, followed)
            .await
            .context("the order did not end in time")??;
        if let Some(rollback) = order["rolled_back_by"].as_str() {
            println!("  rolled back by the order {rollback}");
        }
        Ok(order)
    }

    async fn follow(
        &mut self,
        client: &Client,
        order: &str,
        plan: &Value,
    ) -> anyhow::Result<Value> {
        let bars = Bars::new(&self.servers, plan);
        let mut after: Option<String> = None;
        loop {
            let mut events = client
                .events(&format!("{order}/events"), after.as_deref())
                .await?;
            while let Some(event) = events.next().await? {
                after = Some(event.id.clone());
                let what: Value = serde_json::from_str(&event.data)?;
                match what["type"].as_str() {
                    Some("node") => bars.node(&what),
                    Some("order") => {
                        let state = text(&what["state"])?.replace('_', " ");
                        bars.line(&match what["reason"].as_str() {
                            Some(reason) if !reason.is_empty() => {
                                format!("  order: {state}: {reason}")
                            }
                            Some(_) | None => format!("  order: {state}"),
                        });
                        match what["state"].as_str() {
                            Some("awaiting_confirmation") => {
                                client
                                    .post(
                                        &format!("{order}/actions"),
                                        &json!({ "action": "confirm" }),
                                    )
                                    .await?;
                                self.confirmed = true;
                            }
                            Some("blocked" | "drifted" | "unknown")
                                if plan["on_failure"] == "block" =>
                            {
                                bail!("the order needs a person: {}", what["reason"]);
                            }
                            _ => {}
                        }
                    }
                    _ => {}
                }
            }
            let now = client.get(order).await?;
            if matches!(
                now["state"].as_str(),
                Some("succeeded" | "failed" | "cancelled" | "rolled_back")
            ) {
                bars.done();
                return Ok(now);
            }
        }
    }

    fn name_of(&self, server: &Value) -> &str {
        server
            .as_str()
            .and_then(|id| self.servers.get(id))
            .map_or("a server that is not the demo's", |(name, _)| name)
    }

    /// Fetches what each server's application answers, and compares.
    async fn expect(&self, version: &str) -> anyhow::Result<()> {
        for (name, port) in self.servers.values() {
            let app = Client::new(&format!("127.0.0.1:{port}"), "");
            let answer = app
                .request(Method::GET, "/", Bytes::new(), &[])
                .await?
                .text();
            println!("  {name}  http://127.0.0.1:{port}/  →  {}", answer.trim());
            ensure!(
                answer.starts_with(&format!("sample {version} ")),
                "{name} should answer with version {version}"
            );
        }
        Ok(())
    }
}

/// A bar per server; plain lines where nobody looks at a terminal.
struct Bars {
    all: MultiProgress,
    by_server: BTreeMap<String, ProgressBar>,
    steps: BTreeSet<u64>,
    terminal: bool,
}

impl Bars {
    fn new(servers: &BTreeMap<String, (String, u16)>, plan: &Value) -> Self {
        let all = MultiProgress::new();
        let nodes = plan["nodes"].as_array().cloned().unwrap_or_default();
        let steps: BTreeSet<u64> = (0u64..)
            .zip(&nodes)
            .filter(|(_, node)| {
                node["level"] == "step"
                    && node["parent"].as_u64().is_some_and(|parent| {
                        nodes[usize::try_from(parent).unwrap_or(0)]["level"] == "server"
                    })
            })
            .map(|(index, _)| index)
            .collect();
        let each = (steps.len() / servers.len().max(1)) as u64;
        let style = ProgressStyle::with_template("  {prefix:10} [{bar:30}] {pos}/{len} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        let by_server = servers
            .iter()
            .map(|(id, (name, _))| {
                let bar = all
                    .add(ProgressBar::new(each))
                    .with_style(style.clone())
                    .with_prefix(name.clone());
                (id.clone(), bar)
            })
            .collect();
        Self {
            all,
            by_server,
            steps,
            terminal: std::io::stderr().is_terminal(),
        }
    }

    fn node(&self, what: &Value) {
        let Some(bar) = what["server"]
            .as_str()
            .and_then(|server| self.by_server.get(server))
        else {
            return;
        };
        let (name, state) = (
            what["name"].as_str().unwrap_or_default(),
            what["state"].as_str().unwrap_or_default(),
        );
        let step = what["node"]
            .as_u64()
            .is_some_and(|node| self.steps.contains(&node));
        match state {
            "running" if step => bar.set_message(name.to_owned()),
            "succeeded" if step => bar.inc(1),
            "failed" if step => bar.abandon_with_message(format!(
                "{name} failed: {}",
                what["message"].as_str().unwrap_or_default()
            )),
            "succeeded" => bar.finish_with_message("released"),
            _ => {}
        }
        if !self.terminal && (!step || state == "failed") {
            let server = bar.prefix();
            let step = if step {
                format!("{name} ")
            } else {
                String::new()
            };
            let message = what["message"].as_str().unwrap_or_default();
            println!(
                "{}",
                format!("  {server:10} {step}{state} {message}").trim_end()
            );
        }
    }

    fn line(&self, line: &str) {
        if self.terminal {
            // A line that cannot be drawn is not worth ending the demo for.
            drop(self.all.println(line));
        } else {
            println!("{}", line.trim_end());
        }
    }

    fn done(&self) {
        for bar in self.by_server.values().filter(|bar| !bar.is_finished()) {
            bar.abandon();
        }
    }
}

async fn upload(client: &Client, version: &str, broken: bool) -> anyhow::Result<String> {
    let file = package(version, broken)?;
    let size = file.len();
    let path = format!(
        "/v1/workspaces/{WORKSPACE}/packages?app=sample&version={version}&file_name=sample-{version}.tar.gz"
    );
    let package = client
        .upload(&path, file.into())
        .await
        .with_context(|| format!("version {version} was not uploaded"))?;
    let digest = text(&package["digest"])?;
    println!("  uploaded sample {version}: {size} bytes, sha256 {digest:.12}");
    text(&package["id"])
}

/// The sample application as a package: its program and a file with its version.
fn package(version: &str, broken: bool) -> anyhow::Result<Vec<u8>> {
    let program = std::fs::read(dev::beside("windlass-sample")?)?;
    let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(
        Vec::new(),
        flate2::Compression::fast(),
    ));
    let mut add = |name: &str, mode: u32, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(mode);
        header.set_cksum();
        archive.append_data(&mut header, name, bytes)
    };
    add("sample", 0o755, &program)?;
    add("VERSION", 0o644, version.as_bytes())?;
    if broken {
        add("broken", 0o644, b"")?;
    }
    Ok(archive.into_inner()?.finish()?)
}

/// A port that was free a moment ago.
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn explore(dev: &Dev, demo: &Demo) {
    let url = &dev.running.api_url;
    let ws = format!("{url}/v1/workspaces/{WORKSPACE}");
    println!("\nThe server stays up. Things to try:\n");
    println!("  TOKEN=$(cat {})", dev.running.admin_token_file.display());
    println!("  curl -s -H \"Authorization: Bearer $TOKEN\" {ws}/servers");
    println!(
        "  curl -s -H \"Authorization: Bearer $TOKEN\" {ws}/service-instances/{}",
        demo.instance
    );
    println!(
        "  curl -s -H \"Authorization: Bearer $TOKEN\" {ws}/orders/{}/nodes",
        demo.order
    );
    println!(
        "  curl -sN -H \"Authorization: Bearer $TOKEN\" {ws}/orders/{}/events",
        demo.order
    );
    println!("  curl -s -H \"Authorization: Bearer $TOKEN\" {url}/v1/plugins");
    println!("\nBrowse the API at {url}/docs. Ctrl-C ends everything.");
}

fn say(line: &str) {
    println!("\n== {line}");
}

fn text(value: &Value) -> anyhow::Result<String> {
    value
        .as_str()
        .map(str::to_owned)
        .with_context(|| format!("a text was expected, and {value} was found"))
}
