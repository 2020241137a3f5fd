//! `windlass dev`: the whole platform on one machine, with agents of its own.
//!
//! Starts the server, makes a workspace `dev`, registers agents as a user would (with an activation code, over the API), and
//! runs them as processes of their own. Everything is in one data directory, so that stopping and starting again goes on
//! where it was. Owns the agents' processes: they are ended, with their applications, before it returns.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::{
    api::client::Client,
    config::{self, ServerConfig},
    platform::{self, Running},
};

/// The workspace that is made.
pub const WORKSPACE: &str = "dev";
/// How long agents may take to be connected.
const CONNECT_WITHIN: Duration = Duration::from_secs(30);
/// How long agents may take to end with everything they run.
const STOP_WITHIN: Duration = Duration::from_secs(60);

/// What `windlass dev` is told.
#[derive(Debug, Clone)]
pub struct DevOptions {
    /// Data of the server and the agents.
    pub data: PathBuf,
    /// Address of the API.
    pub listen: SocketAddr,
    /// How many agents.
    pub agents: u32,
    /// The plugin directory; one in `data` unless given, with the shipped plugins in it.
    pub plugins: Option<PathBuf>,
}

impl DevOptions {
    fn plugins(&self) -> PathBuf {
        self.plugins
            .clone()
            .unwrap_or_else(|| self.data.join("plugins"))
    }
}

/// A platform with agents.
pub struct Dev {
    /// The server.
    pub running: Running,
    /// A client with the administrator's token.
    pub client: Client,
    /// The agents' data directories and processes.
    agents: Vec<(PathBuf, Child)>,
    binary: PathBuf,
}

impl Dev {
    /// Starts everything and waits until every agent is connected.
    ///
    /// # Errors
    /// What could not be started, and why; nothing is left running.
    pub async fn start(options: &DevOptions) -> anyhow::Result<Self> {
        let binary = agent_binary()?;
        make_private(&options.data)?;
        let plugins = options.plugins();
        if options.plugins.is_none() {
            bring_shipped(&plugins)?;
        }
        let mut config = ServerConfig::local(&options.data, options.listen, &plugins);
        config.agent_listen = agent_listen(&options.data)?;
        let running = platform::start(config)
            .await
            .context("the server did not start")?;
        let token = fs::read_to_string(&running.admin_token_file).with_context(|| {
            format!(
                "the token file {} cannot be read",
                running.admin_token_file.display()
            )
        })?;
        let client = Client::new(&running.api_url, &token);
        let mut dev = Self {
            running,
            client,
            agents: Vec::new(),
            binary,
        };
        match dev.bring_agents(options).await {
            Ok(()) => Ok(dev),
            Err(error) => {
                dev.stop().await?;
                Err(error)
            }
        }
    }

    async fn bring_agents(&mut self, options: &DevOptions) -> anyhow::Result<()> {
        self.running.ready().await;
        if self
            .client
            .get(&format!("/v1/workspaces/{WORKSPACE}"))
            .await
            .is_err()
        {
            self.client
                .post(
                    "/v1/workspaces",
                    &json!({ "name": WORKSPACE, "zones": ["zone-a", "zone-b"] }),
                )
                .await
                .context("the workspace was not made")?;
        }
        let workspace = self
            .client
            .get(&format!("/v1/workspaces/{WORKSPACE}"))
            .await?;
        let cells: Vec<&str> = workspace["cells"]
            .as_array()
            .map(|cells| {
                cells
                    .iter()
                    .filter_map(|cell| cell["name"].as_str())
                    .collect()
            })
            .unwrap_or_default();
        for number in 1..=options.agents {
            let name = format!("agent-{number}");
            let data = options.data.join("agents").join(&name);
            if !data.join("config.json").exists() {
                let cell = cells.get(number as usize % cells.len().max(1));
                self.register(&name, &data, cell.copied()).await?;
            }
            let child = self.run(&data)?;
            self.agents.push((data, child));
        }
        self.wait_connected(options.agents).await
    }

    async fn register(&self, name: &str, data: &Path, cell: Option<&str>) -> anyhow::Result<()> {
        let mut wanted = json!({ "quota": 1, "description": format!("windlass dev, {name}") });
        if let Some(cell) = cell {
            wanted["cell"] = json!(cell);
        }
        let code = self
            .client
            .post(
                &format!("/v1/workspaces/{WORKSPACE}/activation-codes"),
                &wanted,
            )
            .await
            .context("no activation code was made")?;
        let code = code["code"]
            .as_str()
            .context("the activation code is missing in the answer")?
            .to_owned();
        make_private(data)?;
        let mut command = Command::new(&self.binary);
        command
            .args([
                "register",
                "--server",
                &format!("https://{}", self.running.agent_url),
                "--name",
                name,
                "--data",
            ])
            .arg(data)
            .env("WINDLASS_ACTIVATION_CODE", code)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        if is_root() {
            command.arg("--allow-root");
        }
        let output = command
            .output()
            .await
            .with_context(|| format!("{} cannot be run", self.binary.display()))?;
        if !output.status.success() {
            bail!(
                "{name} was not registered: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }

    fn run(&self, data: &Path) -> anyhow::Result<Child> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(data.join("agent.log"))?;
        Command::new(&self.binary)
            .arg("run")
            .arg("--data")
            .arg(data)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{} cannot be run", self.binary.display()))
    }

    async fn wait_connected(&self, wanted: u32) -> anyhow::Result<()> {
        let path = format!("/v1/workspaces/{WORKSPACE}/servers?page_size=50");
        let mut online = 0;
        let waited = tokio::time::timeout(CONNECT_WITHIN, async {
            let mut ticks = tokio::time::interval(Duration::from_millis(50));
            loop {
                ticks.tick().await;
                let servers = self.client.get(&path).await?;
                online = items(&servers)
                    .iter()
                    .filter(|server| server["connection"] == "online")
                    .count();
                if online >= wanted as usize {
                    return anyhow::Ok(());
                }
            }
        });
        match waited.await {
            Ok(result) => result,
            Err(_) => bail!(
                "only {online} of {wanted} agents connected within {CONNECT_WITHIN:?}: see agents/*/agent.log"
            ),
        }
    }

    /// Ends every agent with everything it runs, then the server.
    ///
    /// # Errors
    /// When an agent could not be ended.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let mut failed = None;
        for (data, mut child) in self.agents.drain(..) {
            let stop = Command::new(&self.binary)
                .arg("stop-all")
                .arg("--data")
                .arg(&data)
                .stdin(Stdio::null())
                .output();
            let ended = async {
                let output = stop.await?;
                if !output.status.success() {
                    bail!(
                        "{}",
                        String::from_utf8_lossy(&output.stderr).trim().to_owned()
                    );
                }
                child.wait().await?;
                anyhow::Ok(())
            };
            match tokio::time::timeout(STOP_WITHIN, ended).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    failed = Some(
                        error.context(format!("the agent in {} was not ended", data.display())),
                    )
                }
                Err(_) => {
                    failed = Some(anyhow::anyhow!(
                        "the agent in {} did not end in time",
                        data.display()
                    ))
                }
            }
        }
        self.running
            .shutdown()
            .await
            .context("the store was not closed")?;
        failed.map_or(Ok(()), Err)
    }
}

/// A directory, with those above it, that nobody else may look into.
fn make_private(directory: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("{} cannot be made", directory.display()))
}

/// Puts the shipped plugins into a directory of one's own, so that what authors upload there is theirs alone. A file that differs
/// is replaced: by the one of this installation.
fn bring_shipped(directory: &Path) -> anyhow::Result<()> {
    let shipped = config::shipped_plugins().context(
        "the shipped plugins are not beside this program: build them with `make build`, or give --plugins",
    )?;
    make_private(directory)?;
    let failed = |path: &Path| format!("the shipped plugin {} cannot be copied", path.display());
    for entry in
        fs::read_dir(&shipped).with_context(|| format!("{} cannot be read", shipped.display()))?
    {
        let path = entry?.path();
        let (Some(name), Some("wasm" | "sig")) = (
            path.file_name(),
            path.extension().and_then(|extension| extension.to_str()),
        ) else {
            continue;
        };
        let bytes = fs::read(&path).with_context(|| failed(&path))?;
        let own = directory.join(name);
        if fs::read(&own).is_ok_and(|known| known == bytes) {
            continue;
        }
        // A name that does not end in .wasm is not looked at.
        let hidden = directory.join(format!(".{}.new", name.display()));
        fs::write(&hidden, bytes)
            .and_then(|()| fs::rename(&hidden, &own))
            .with_context(|| failed(&path))?;
    }
    Ok(())
}

/// Where agents connect: the same address at every start, because they keep it.
fn agent_listen(data: &Path) -> anyhow::Result<SocketAddr> {
    let file = data.join("agents").join("listen");
    if let Ok(kept) = fs::read_to_string(&file) {
        return kept
            .trim()
            .parse()
            .with_context(|| format!("{} does not hold an address", file.display()));
    }
    let address = std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
    make_private(&data.join("agents"))?;
    fs::write(&file, address.to_string())
        .with_context(|| format!("{} cannot be written", file.display()))?;
    Ok(address)
}

/// The entries of a page.
#[must_use]
pub fn items(page: &Value) -> Vec<Value> {
    page["items"].as_array().cloned().unwrap_or_default()
}

/// Whether this process is root's.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A program that is built beside this one.
///
/// # Errors
/// When it is not there.
pub fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("the path of this program is not known")?;
    let found = own.with_file_name(name);
    if !found.exists() {
        bail!("{} is missing: build it with `make build`", found.display());
    }
    Ok(found)
}

fn agent_binary() -> anyhow::Result<PathBuf> {
    beside("windlass-agent")
}

/// Runs until it is told to stop.
///
/// # Errors
/// [`Dev::start`], [`Dev::stop`].
pub async fn run(options: &DevOptions) -> anyhow::Result<()> {
    let dev = Dev::start(options).await?;
    println!("Windlass listens on {}", dev.running.api_url);
    println!("  browse:    {}/docs", dev.running.api_url);
    println!(
        "  token:     {} (send it as `Authorization: Bearer …`)",
        dev.running.admin_token_file.display()
    );
    println!(
        "  plugins:   {} (a component that is dropped there is live within a second)",
        fs::canonicalize(options.plugins())
            .unwrap_or_else(|_| options.plugins())
            .display()
    );
    println!(
        "  workspace: {WORKSPACE}, {} agents connected",
        options.agents
    );
    println!("Ctrl-C ends the server, the agents and what they run.");
    stop_signal().await?;
    println!("stopping…");
    dev.stop().await
}

/// Waits for `SIGINT` or `SIGTERM`.
///
/// # Errors
/// When signals cannot be waited for.
pub async fn stop_signal() -> anyhow::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result?,
        _ = terminate.recv() => {}
    }
    Ok(())
}
