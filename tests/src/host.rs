//! The real thing: a server process, agent processes, a data directory that is gone afterwards.
//!
//! [`TestHost::start`] boots the binaries that `make build` built. `kill` ends the server as a power cut would, `restart`
//! brings it up again on the same data and addresses. Everything that was started is ended on drop, by its process id.

use std::{
    fs::{self, File},
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::{Value, json};
use tempfile::TempDir;
use windlass::api::client::{Client, ClientError};

/// The workspace that the harness makes.
pub const WORKSPACE: &str = "test";
/// How long anything awaited may take.
pub const WITHIN: Duration = Duration::from_secs(60);

/// How a host is set up.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Agents.
    pub agents: u32,
    /// More environment of the server's first process.
    pub server_env: Vec<(String, String)>,
    /// More arguments of every server's process.
    pub server_args: Vec<String>,
    /// The plugin directory of every server's process; the built plugins unless given.
    pub plugins: Option<PathBuf>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            agents: 2,
            server_env: Vec::new(),
            server_args: Vec::new(),
            plugins: None,
        }
    }
}

/// A server with agents.
pub struct TestHost {
    directory: TempDir,
    listen: SocketAddr,
    agent_listen: SocketAddr,
    plugins: PathBuf,
    server_args: Vec<String>,
    server: Option<Child>,
    /// Agents by their data directories.
    pub agents: Vec<Agent>,
    /// A client with the administrator's token.
    pub api: Client,
}

/// An agent's process.
pub struct Agent {
    /// Its name.
    pub name: String,
    /// Its data directory.
    pub data: PathBuf,
    child: Option<Child>,
}

/// A program that `make build` built.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("the test knows its path");
    let found = own
        .ancestors()
        .skip(1)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not built: run `make build`"))
}

/// The directory of built plugins.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn plugins() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent");
    // Relative to the workspace, as in tests/bench.sh.
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    let found = root.join(target).join("plugins");
    assert!(
        found.join("binary.wasm").exists(),
        "plugins are not built: run `make plugins`"
    );
    found
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("its address")
}

/// A port that was free a moment ago.
#[must_use]
pub fn free_port() -> u16 {
    free_address().port()
}

/// Waits for a condition, looking every few milliseconds.
///
/// # Panics
/// With what the condition last said, when the time is over.
pub async fn eventually<T, F: Future<Output = Result<T, String>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + WITHIN;
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    loop {
        ticks.tick().await;
        match look().await {
            Ok(found) => return found,
            Err(last) => assert!(Instant::now() < deadline, "{what}: {last}"),
        }
    }
}

impl TestHost {
    /// Boots a server and its agents, and waits until all are connected.
    ///
    /// # Panics
    /// When something does not start.
    pub async fn start(setup: Setup) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut host = Self {
            listen: free_address(),
            agent_listen: free_address(),
            plugins: setup.plugins.clone().unwrap_or_else(plugins),
            server_args: setup.server_args.clone(),
            server: None,
            agents: Vec::new(),
            api: Client::new("", ""),
            directory,
        };
        host.boot(&setup.server_env).await;
        host.api
            .post(
                "/v1/workspaces",
                &json!({ "name": WORKSPACE, "zones": ["zone-a", "zone-b"] }),
            )
            .await
            .expect("a workspace");
        for number in 1..=setup.agents {
            host.add_agent(&format!("agent-{number}")).await;
        }
        host.wait_online().await;
        host
    }

    /// The directory of everything.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The server's data directory.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.path().join("server")
    }

    /// The server's process id.
    #[must_use]
    pub fn server_pid(&self) -> Option<u32> {
        self.server.as_ref().map(Child::id)
    }

    /// Where the API listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.listen
    }

    /// Where the API listens.
    #[must_use]
    pub fn api_address(&self) -> SocketAddr {
        self.listen
    }

    /// The administrator's token.
    ///
    /// # Panics
    /// When its file cannot be read.
    #[must_use]
    pub fn token(&self) -> String {
        let file = fs::read_to_string(self.data().join("admin.token"));
        file.expect("the administrator's token").trim().to_owned()
    }

    /// Where agents connect.
    #[must_use]
    pub fn agent_address(&self) -> SocketAddr {
        self.agent_listen
    }

    /// Starts the server's process and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready.
    pub async fn boot(&mut self, env: &[(String, String)]) {
        self.spawn(env);
        self.ready().await;
    }

    /// Starts the server's process without waiting.
    ///
    /// # Panics
    /// When it cannot be run.
    pub fn spawn(&mut self, env: &[(String, String)]) {
        assert!(self.server.is_none(), "the server runs already");
        let log = self.log("server.log");
        let child = Command::new(program("windlass"))
            .arg("server")
            .arg("--data")
            .arg(self.data())
            .args([
                "--listen",
                &self.listen.to_string(),
                "--agent-listen",
                &self.agent_listen.to_string(),
                // The receivers of the tests are on this machine.
                "--notification-allow",
                "127.0.0.0/8",
            ])
            .arg("--plugins")
            .arg(&self.plugins)
            .args(&self.server_args)
            .envs(
                env.iter()
                    .map(|(name, value)| (name.as_str(), value.as_str())),
            )
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a handle"))
            .stderr(log)
            .spawn()
            .expect("the server's process");
        self.server = Some(child);
    }

    fn log(&self, name: &str) -> File {
        File::options()
            .create(true)
            .append(true)
            .open(self.path().join(name))
            .expect("a log file")
    }

    /// Waits until the server is ready; answers whether it is (it may have ended by itself).
    ///
    /// # Panics
    /// When it is neither ready nor gone in time.
    pub async fn ready_or_gone(&mut self) -> bool {
        let probe = Client::new(&self.listen.to_string(), "");
        let deadline = Instant::now() + WITHIN;
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        loop {
            ticks.tick().await;
            if probe.get("/readyz").await.is_ok() {
                let token = fs::read_to_string(self.data().join("admin.token"))
                    .expect("the administrator's token");
                self.api = Client::new(&self.listen.to_string(), &token);
                return true;
            }
            if self.has_ended() {
                return false;
            }
            assert!(
                Instant::now() < deadline,
                "the server is not ready:\n{}",
                self.server_log()
            );
        }
    }

    async fn ready(&mut self) {
        assert!(
            self.ready_or_gone().await,
            "the server has ended:\n{}",
            self.server_log()
        );
    }

    /// Whether the server's process has ended; takes note of it.
    ///
    /// # Panics
    /// When its state cannot be read.
    pub fn has_ended(&mut self) -> bool {
        match &mut self.server {
            None => true,
            Some(child) => {
                let ended = child.try_wait().expect("the server's state").is_some();
                if ended {
                    self.server = None;
                }
                ended
            }
        }
    }

    /// What the server logged.
    #[must_use]
    pub fn server_log(&self) -> String {
        fs::read_to_string(self.path().join("server.log")).unwrap_or_default()
    }

    /// Ends the server as a power cut would.
    ///
    /// # Panics
    /// When it cannot be ended.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.server.take() {
            match child.kill() {
                Ok(()) => {}
                // It ended by itself a moment ago.
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}"),
            }
            child.wait().expect("the server is gone");
        }
    }

    /// Ends the server in order.
    ///
    /// # Panics
    /// When it does not end.
    pub async fn stop(&mut self) {
        if let Some(mut child) = self.server.take() {
            signal(child.id(), "TERM");
            eventually("the server ends", || {
                let ended = child.try_wait().expect("the server's state").is_some();
                async move {
                    if ended {
                        Ok(())
                    } else {
                        Err("it still runs".to_owned())
                    }
                }
            })
            .await;
        }
    }

    /// Ends it in order and starts it again on the same data.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.boot(&[]).await;
    }

    /// Registers and runs one more agent.
    ///
    /// # Panics
    /// When it does not register.
    pub async fn add_agent(&mut self, name: &str) {
        let workspace = self
            .api
            .get(&format!("/v1/workspaces/{WORKSPACE}"))
            .await
            .expect("the workspace");
        let cells = workspace["cells"].as_array().cloned().unwrap_or_default();
        // One after the other, so that every cell has servers.
        let cell = &cells[self.agents.len() % cells.len()]["name"];
        let code = self
            .api
            .post(
                &format!("/v1/workspaces/{WORKSPACE}/activation-codes"),
                &json!({ "quota": 1, "cell": cell }),
            )
            .await
            .expect("an activation code");
        let data = self.path().join(name);
        fs::create_dir_all(&data).expect("the agent's directory");
        let output = Command::new(program("windlass-agent"))
            .args([
                "register",
                "--server",
                &format!("https://{}", self.agent_listen),
                "--name",
                name,
                "--allow-root",
                "--data",
            ])
            .arg(&data)
            .env(
                "WINDLASS_ACTIVATION_CODE",
                code["code"].as_str().expect("the code"),
            )
            .stdin(Stdio::null())
            .output()
            .expect("the agent's program");
        assert!(
            output.status.success(),
            "{name}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        self.agents.push(Agent {
            name: name.to_owned(),
            data,
            child: None,
        });
        let index = self.agents.len() - 1;
        self.start_agent(index, &[]);
    }

    /// Starts an agent's process.
    ///
    /// # Panics
    /// When it cannot be run.
    pub fn start_agent(&mut self, index: usize, env: &[(String, String)]) {
        let log = self.log(&format!("{}.log", self.agents[index].name));
        let agent = &mut self.agents[index];
        let child = Command::new(program("windlass-agent"))
            .arg("run")
            .arg("--data")
            .arg(&agent.data)
            .envs(
                env.iter()
                    .map(|(name, value)| (name.as_str(), value.as_str())),
            )
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a handle"))
            .stderr(log)
            .spawn()
            .expect("the agent's process");
        agent.child = Some(child);
    }

    /// Ends an agent as a power cut would; what it runs goes on.
    ///
    /// # Panics
    /// When it cannot be ended.
    pub fn kill_agent(&mut self, index: usize) {
        if let Some(mut child) = self.agents[index].child.take() {
            child.kill().expect("the agent is killed");
            child.wait().expect("the agent is gone");
        }
    }

    /// Sends a signal to an agent's process.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal_agent(&self, index: usize, name: &str) {
        let child = self.agents[index].child.as_ref();
        signal(child.expect("the agent runs").id(), name);
    }

    /// Waits until every agent is connected.
    pub async fn wait_online(&self) {
        let path = format!("/v1/workspaces/{WORKSPACE}/servers?page_size=50");
        eventually("every agent is connected", || async {
            let page = self
                .api
                .get(&path)
                .await
                .map_err(|error| error.to_string())?;
            let online = items(&page)
                .iter()
                .filter(|server| server["connection"] == "online")
                .count();
            if online >= self.agents.len() {
                Ok(())
            } else {
                Err(format!("{online} of {}: {page}", self.agents.len()))
            }
        })
        .await;
    }

    /// Servers by name: their ids.
    ///
    /// # Panics
    /// When they cannot be listed.
    pub async fn servers(&self) -> Vec<(String, String)> {
        let page = self
            .api
            .get(&format!("/v1/workspaces/{WORKSPACE}/servers?page_size=50"))
            .await
            .expect("servers");
        let mut servers: Vec<(String, String)> = items(&page)
            .iter()
            .map(|server| (text(&server["name"]), text(&server["id"])))
            .collect();
        servers.sort();
        servers
    }

    /// A path below the workspace.
    #[must_use]
    pub fn ws(&self, rest: &str) -> String {
        format!("/v1/workspaces/{WORKSPACE}/{rest}")
    }

    /// Makes an order and answers its id.
    ///
    /// # Errors
    /// The server's refusal.
    pub async fn order(&self, order: &Value) -> Result<String, ClientError> {
        Ok(text(&self.api.post(&self.ws("orders"), order).await?["id"]))
    }

    /// Waits until an order is in one of some states; answers its header.
    pub async fn order_in(&self, id: &str, states: &[&str]) -> Value {
        eventually(&format!("order {id} is one of {states:?}"), || async {
            let order = self
                .api
                .get(&self.ws(&format!("orders/{id}")))
                .await
                .map_err(|error| error.to_string())?;
            let state = order["state"].as_str().unwrap_or_default();
            if states.contains(&state) {
                Ok(order)
            } else {
                Err(order.to_string())
            }
        })
        .await
    }

    /// Waits until an order has ended; answers its header.
    pub async fn order_ended(&self, id: &str) -> Value {
        self.order_in(id, &["succeeded", "failed", "cancelled", "rolled_back"])
            .await
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        self.kill();
        for agent in &mut self.agents {
            let stop = Command::new(program("windlass-agent"))
                .arg("stop-all")
                .arg("--data")
                .arg(&agent.data)
                .output();
            if let Some(mut child) = agent.child.take() {
                drop(child.kill());
                drop(child.wait());
            }
            if std::thread::panicking() {
                eprintln!(
                    "--- {}: {:?}",
                    agent.name,
                    stop.map(|output| String::from_utf8_lossy(&output.stderr).into_owned())
                );
            }
        }
        if std::thread::panicking() {
            let log = self.server_log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("--- server log, last lines:");
            for line in tail.into_iter().rev() {
                eprintln!("{line}");
            }
        }
    }
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(pid.to_string())
        .status()
        .expect("kill(1)");
    assert!(status.success(), "process {pid} could not be signalled");
}

/// The entries of a page.
#[must_use]
pub fn items(page: &Value) -> Vec<Value> {
    page["items"].as_array().cloned().unwrap_or_default()
}

/// A text field.
///
/// # Panics
/// When it is none.
#[must_use]
pub fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("a text was expected: {value}"))
        .to_owned()
}

/// A `.tar.gz` of files: name, mode, content.
///
/// # Panics
/// When it cannot be packed.
#[must_use]
pub fn tar_gz(files: &[(&str, u32, &[u8])]) -> Bytes {
    let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(
        Vec::new(),
        flate2::Compression::fast(),
    ));
    for (name, mode, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        header.set_cksum();
        archive
            .append_data(&mut header, name, *content)
            .expect("a file is packed");
    }
    archive
        .into_inner()
        .expect("the archive")
        .finish()
        .expect("the compression")
        .into()
}
