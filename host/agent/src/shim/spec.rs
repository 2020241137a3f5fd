//! The files and messages between the agent, its shims and their trampolines.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use windlass_domain::{
    Timestamp,
    task::{Fault, Restart},
};

use crate::{capture::Capture, proc::ProcessId, users::User};

/// What a shim is told on its stdin.
#[derive(Clone, Serialize, Deserialize)]
pub struct Spec {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Whole environment, secrets included.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub working_dir: PathBuf,
    /// Whom to become; `None`: stay who the agent is.
    pub user: Option<User>,
    /// Texts to hide in the output.
    pub secrets: Vec<String>,
    /// The cgroup to run in.
    pub cgroup: Option<PathBuf>,
    /// What it is.
    pub mode: Mode,
}

/// What a shim runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A script: once.
    Script {
        /// Killed after so long, in milliseconds.
        timeout_ms: u64,
    },
    /// An application: kept running.
    App {
        /// Whether it is started again when it ends by itself.
        restart: Restart,
        /// It ran before, with another shim: one that is always restarted is tried again also when it cannot be started.
        again: bool,
    },
}

/// Content of `identity.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// The shim.
    pub shim: ProcessId,
    /// The main process while it runs.
    pub main: Option<ProcessId>,
    /// When the main process (the latest, for an application) was started.
    pub started_at: Option<Timestamp>,
    /// How often an application was started again.
    pub restarts: u64,
    /// For an application that does not run: how it ended.
    pub message: String,
}

/// Content of `status.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunStatus {
    /// How it ended.
    pub end: End,
    /// When it started.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Timestamp,
    /// Its output, masked.
    pub output: Capture,
    /// Why it did not start, for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
}

/// Why a program was not started: what a trampoline says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NotStarted {
    /// For people.
    pub(crate) message: String,
    /// For programs.
    pub(crate) fault: Option<Fault>,
}

impl From<String> for NotStarted {
    fn from(message: String) -> Self {
        Self {
            message,
            fault: None,
        }
    }
}

/// How the main process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// By itself.
    Exited(i32),
    /// By a signal from elsewhere.
    Signaled(i32),
    /// By its time-out.
    TimedOut,
    /// By the agent's request (a revoke or a stop).
    Stopped,
    /// It never ran.
    NotStarted(String),
}

/// Where a shim's files are.
#[derive(Debug, Clone)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// The files in this directory.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Locked while the shim lives.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// [`RunIdentity`].
    #[must_use]
    pub fn identity(&self) -> PathBuf {
        self.0.join("identity.json")
    }

    /// [`RunStatus`].
    #[must_use]
    pub fn status(&self) -> PathBuf {
        self.0.join("status.json")
    }

    /// The FIFO on which the shim takes `stop <grace ms>` and `kill`.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.0.join("control")
    }

    /// Masked output; for an application the newest part, the one before is `output.1`.
    #[must_use]
    pub fn output(&self) -> PathBuf {
        self.0.join("output")
    }

    /// The script's text.
    #[must_use]
    pub fn script(&self) -> PathBuf {
        self.0.join("script")
    }
}

/// What a trampoline is told on its stdin.
#[derive(Serialize, Deserialize)]
pub(crate) struct ExecSpec {
    pub(crate) command: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) working_dir: PathBuf,
    pub(crate) user: Option<User>,
    pub(crate) cgroup: Option<PathBuf>,
}
