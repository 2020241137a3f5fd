//! An agent that is a real process.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::Gateway;

/// A registered agent, a real process; everything of it is ended with the test.
pub(crate) struct TestAgent {
    pub(crate) dir: tempfile::TempDir,
    /// The binary that [`TestAgent::start`] starts.
    pub(crate) program: PathBuf,
    /// The user that it runs as, where that is not the test's own.
    user: Option<u32>,
    child: Option<Child>,
}

/// The agent's binary: of this build, or beside an example of it.
pub(crate) fn binary_path() -> PathBuf {
    match option_env!("CARGO_BIN_EXE_windlass-agent") {
        Some(path) => path.into(),
        None => {
            let example = std::env::current_exe().unwrap();
            let profile = example.ancestors().nth(2).unwrap();
            profile.join("windlass-agent")
        }
    }
}

pub(crate) fn binary() -> Command {
    command(&binary_path())
}

fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_remove("WINDLASS_CRASH_AT")
        .env_remove("WINDLASS_CRASH_LOG")
        .stdin(Stdio::null());
    command
}

impl TestAgent {
    pub(crate) async fn register(gateway: &Gateway) -> Self {
        Self::register_at(gateway, gateway.port, tempfile::tempdir().unwrap()).await
    }

    pub(crate) async fn register_at(gateway: &Gateway, port: u16, dir: tempfile::TempDir) -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        // Other users have to get through to their scripts.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let agent = Self {
            dir,
            program: binary_path(),
            user: None,
            child: None,
        };
        agent.registered(gateway, port).await
    }

    /// Runs as another user, with a copy of the binary where that user gets at it. Needs root.
    pub(crate) async fn register_as(gateway: &Gateway, user: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("windlass-agent");
        std::fs::copy(binary_path(), &program).unwrap();
        std::os::unix::fs::chown(dir.path(), Some(user), Some(user)).unwrap();
        let agent = Self {
            dir,
            program,
            user: Some(user),
            child: None,
        };
        agent.registered(gateway, gateway.port).await
    }

    fn command(&self) -> Command {
        use std::os::unix::process::CommandExt as _;
        let mut command = command(&self.program);
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
    }

    async fn registered(self, gateway: &Gateway, port: u16) -> Self {
        let agent = self;
        let mut command = agent.command();
        command
            .args([
                "register",
                "--server",
                &format!("https://127.0.0.1:{port}"),
                "--code",
                &gateway.code.print(),
            ])
            .args(["--allow-root", "--allow-user", "nobody", "--data"])
            .arg(agent.data());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap())
            .await
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        agent
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("agent")
    }

    pub(crate) fn policy(&self, change: impl FnOnce(&mut windlass_agent::config::Policy)) {
        let data = windlass_agent::config::DataDir::open(&self.data()).unwrap();
        let mut config = data.load_config().unwrap();
        change(&mut config.policy);
        data.save_config(&config).unwrap();
    }

    pub(crate) fn start(&mut self) {
        self.start_with(&[]);
    }

    pub(crate) fn start_with(&mut self, env: &[(&str, String)]) {
        assert!(self.child.is_none());
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .unwrap();
        let mut command = self.command();
        command
            .args(["run", "--data"])
            .arg(self.data())
            .envs(env.iter().cloned())
            .env("WINDLASS_LOG", "debug")
            .stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Its exit status, once it ended by itself.
    pub(crate) fn ended(&mut self) -> Option<std::process::ExitStatus> {
        let status = self.child.as_mut()?.try_wait().unwrap()?;
        self.child = None;
        Some(status)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn stop_all(&mut self) {
        let mut command = self.command();
        command.args(["stop-all", "--data"]).arg(self.data());
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        if let Some(mut child) = self.child.take() {
            child.wait().unwrap();
        }
    }

    /// Processes that belong to the data directory, by their environment.
    pub(crate) fn left_behind(&self) -> Vec<windlass_agent::proc::ProcessId> {
        let data = self.data().into_os_string();
        let data = data.as_encoded_bytes();
        windlass_agent::proc::with_environment(|line| {
            line.starts_with(b"WINDLASS_") && line.windows(data.len()).any(|part| part == data)
        })
    }

    /// A file beside the data directory that every user may write.
    pub(crate) fn open_file(&self, name: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.dir.path().join(name);
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        path
    }
}

impl Drop for TestAgent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the agent's log\n{}", self.log());
        }
        let mut command = self.command();
        command.args(["stop-all", "--data"]).arg(self.data());
        let stopped = command.output().is_ok_and(|output| output.status.success());
        if let Some(mut child) = self.child.take() {
            child.wait().ok();
        }
        assert!(stopped || std::thread::panicking(), "stop-all failed");
    }
}
