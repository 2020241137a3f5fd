//! Tasks: what the server asks an agent to do, as data.
//!
//! A [`Task`] is the unit of "delivery at least once, execution at most once". The server owns a task until the agent
//! has acknowledged it; the agent owns its execution. An [`Action`] says what to do; everything that differs between
//! servers is in the environment. Nothing in a task is a secret: environments hold references (see [`crate::value`]).

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

use crate::{
    digest::Digest,
    id::{InstanceId, OrderId},
    manifest::Manifest,
    text,
    time::Timestamp,
    value::Environment,
};

/// Names one attempt of one step of one order. Text form: `ord_….<node>.<attempt>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TaskId {
    /// The order that the step belongs to.
    pub order: OrderId,
    /// The step's node in the order's plan.
    pub node: u32,
    /// Which attempt, from 1.
    pub attempt: u32,
}

/// Why a text is not a task id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a task id: expected `<order id>.<node>.<attempt>`")]
pub struct InvalidTaskId;

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.order, self.node, self.attempt)
    }
}

impl fmt::Debug for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TaskId {
    type Err = InvalidTaskId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split('.');
        let (Some(order), Some(node), Some(attempt), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidTaskId);
        };
        Ok(Self {
            order: order.parse().map_err(|_| InvalidTaskId)?,
            node: node.parse().map_err(|_| InvalidTaskId)?,
            attempt: attempt.parse().map_err(|_| InvalidTaskId)?,
        })
    }
}

impl TryFrom<String> for TaskId {
    type Error = InvalidTaskId;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<TaskId> for String {
    fn from(id: TaskId) -> Self {
        id.to_string()
    }
}

/// Something for an agent to do once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Which attempt of which step this is. An agent never runs one id twice.
    pub id: TaskId,
    /// The service instance it belongs to; its directories and processes are named by it. `None`: server work, which is of
    /// no instance. Its scripts start in the agent's own directory for such work, and it holds up no instance's tasks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// The release directory that relative paths and `WINDLASS_RELEASE_DIR` mean; `None`: the one that is current.
    /// It may not exist before `Unpack` has made it.
    #[serde(default)]
    pub release: Option<String>,
    /// Rises with every order on this (server, instance). An agent refuses a task with a lower fence than it has seen.
    /// Without meaning for server work.
    pub fence: u64,
    /// Not started after this time.
    pub expires_at: Timestamp,
    /// How long it may run once started, in milliseconds. At the end the whole process tree is killed.
    pub timeout_ms: u64,
    /// The OS user to run as; `None` is the agent's own user.
    pub run_as: Option<String>,
    /// Environment of scripts and applications, beside what the agent adds itself (`WINDLASS_…`).
    pub env: Environment,
    /// What to do.
    pub action: Action,
}

/// How an uploaded package is packed. Source: spec "Packages".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PackageFormat {
    /// `.tar.gz` or `.tgz`: unpacked into the release directory.
    TarGz,
    /// `.zip`: unpacked into the release directory.
    Zip,
    /// `.jar`, `.war` or `.ear`: kept whole, as one file with its name.
    Jar,
    /// Any other file: kept whole, as one executable file with its name.
    Plain,
    /// A tar archive without compression: unpacked into the release directory.
    Tar,
    /// A tar archive compressed with xz: unpacked into the release directory.
    TarXz,
    /// A tar archive compressed with zstd: unpacked into the release directory.
    TarZst,
    /// A tar archive compressed with bzip2: unpacked into the release directory.
    TarBz2,
}

impl PackageFormat {
    /// The format's name in the API and for plugins.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TarGz => "tar_gz",
            Self::Zip => "zip",
            Self::Jar => "jar",
            Self::Plain => "plain",
            Self::Tar => "tar",
            Self::TarXz => "tar_xz",
            Self::TarZst => "tar_zst",
            Self::TarBz2 => "tar_bz2",
        }
    }

    /// Whether a package of this format is unpacked into the release directory. Others stay one file.
    #[must_use]
    pub const fn is_archive(self) -> bool {
        match self {
            Self::TarGz | Self::Zip | Self::Tar | Self::TarXz | Self::TarZst | Self::TarBz2 => true,
            Self::Jar | Self::Plain => false,
        }
    }
}

/// A package as an agent needs to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PackageRef {
    /// SHA-256 of the file.
    pub digest: Digest,
    /// Size of the file in bytes.
    pub size_bytes: u64,
    /// How it is packed.
    pub format: PackageFormat,
    /// The file's own name, without directories: valid as a file name.
    pub file_name: String,
    /// The version it was uploaded as.
    pub version: String,
}

/// What an agent can do. Paths are relative to the release directory unless they start with `/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Run a script under the shim. Outcome: its exit code.
    Script(Script),
    /// Download a package into the agent's cache: resumes, checks the digest. Already cached and intact: nothing to do.
    Fetch(PackageRef),
    /// Unpack a cached package into a fresh release directory named by `release`; then rename it into place.
    Unpack {
        /// The cached package.
        package: PackageRef,
        /// Names the release directory: letters, digits, `-`, `_`, `.`.
        release: String,
    },
    /// Write one file, to a temporary name and then renamed.
    WriteFile {
        /// Where.
        path: String,
        /// Its text. `${NAME}` is *not* expanded.
        content: String,
        /// Permission bits, for example `0o644`.
        mode: u32,
    },
    /// Make a release the installed one: switch the `current` link and write its manifest, keeping the one before.
    Activate(Box<Manifest>),
    /// Start (or replace) the instance's application under its shim, which outlives the agent and restarts the
    /// application when it ends by itself. Succeeds once the process runs.
    Start(Supervise),
    /// Stop the instance's application: `SIGTERM`, after the grace `SIGKILL` to the whole tree. Not running: nothing to do.
    StopSupervised {
        /// Time between the two signals, in milliseconds.
        grace_ms: u64,
    },
    /// Check health until it is good for `healthy_for_ms` on end, or the task's time-out passes.
    Check(Check),
    /// Replace a directory with the content of an archive that the agent downloads: the new one is there as a whole, or the old
    /// one stays.
    PlaceFiles(FilesRef),
}

/// An archive of files and where it goes, as an agent needs to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FilesRef {
    /// Where the archive is: `http://` or `https://`; tar (plain, gz, xz, zst, bz2) or zip.
    pub url: String,
    /// SHA-256 that it must have.
    pub sha256: Option<Digest>,
    /// The directory that is replaced: starts and ends with `/`.
    pub directory: String,
    /// The largest archive that is taken, in bytes.
    pub max_bytes: u64,
}

/// A script to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Script {
    /// The program that reads it, with its arguments: `["/bin/sh", "-eu"]`. The script's file is appended.
    pub interpreter: Vec<String>,
    /// Its text. It is shared by all servers of a plan; what differs is environment. Never holds a secret.
    pub text: String,
    /// Working directory; `None` is the release directory (or the instance's directory while there is none).
    pub working_dir: Option<String>,
}

/// An application to keep running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Supervise {
    /// Program and arguments; `${NAME}` in them is replaced by the environment variable of that name.
    pub command: Vec<String>,
    /// Working directory; `None` is the `current` release directory.
    pub working_dir: Option<String>,
    /// Restarted when it ends by itself, with a growing pause between 1 s and 30 s.
    pub restart: Restart,
    /// Where it runs already with the same program, directory and user, it is left alone: a later step tells it what is new.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_running: bool,
}

/// Whether an application that ended by itself is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Restart {
    /// Whenever it ends and nobody stopped it.
    Always,
    /// Never.
    Never,
}

/// A health check. Source: spec "Release orders", "Per server".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Check {
    /// What is tried.
    pub probe: Probe,
    /// Time between tries, in milliseconds.
    pub interval_ms: u64,
    /// How long one try may take, in milliseconds.
    pub try_timeout_ms: u64,
    /// How long it must be good on end before the check succeeds (minimum healthy time), in milliseconds.
    pub healthy_for_ms: u64,
}

/// One way to see whether an application is healthy. `${NAME}` in texts is replaced by the environment variable of that name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// A script that exits with 0.
    Script(Script),
    /// `GET url` answers with one of `statuses` (empty: any 2xx) and, where given, a body that contains `body_contains`.
    Http {
        /// `http://host:port/path`.
        url: String,
        /// Accepted status codes.
        statuses: Vec<u16>,
        /// Text that the body must contain.
        body_contains: Option<String>,
    },
    /// A TCP connection is accepted.
    Tcp {
        /// `host:port`.
        address: String,
    },
}

/// How a task ended. This is what the agent reports and what the server keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TaskResult {
    /// The outcome.
    pub outcome: Outcome,
    /// The main process's exit code, where a process ran and ended by itself.
    pub exit_code: Option<i32>,
    /// Standard output and error, at most 24 KiB: head and tail with a line between them that says what was dropped.
    /// Secrets are masked by the agent.
    pub output: String,
    /// Bytes that were dropped from `output`.
    pub dropped_bytes: u64,
    /// What happened, for people: which limit, file or probe, and what to do; at most 4 KiB. On success
    /// it is empty, a note (which files were placed), or a warning that begins with `warning:`.
    pub message: String,
    /// Why it ended so, where the outcome alone does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
    /// When it started on the agent's clock; `None` when it never did.
    pub started_at: Option<Timestamp>,
    /// When it ended on the agent's clock.
    pub finished_at: Timestamp,
}

impl TaskResult {
    /// The same with a message that fits everywhere: an archive or a program may have written it.
    #[must_use]
    pub fn cut(mut self) -> Self {
        text::cut_message(&mut self.message);
        self
    }
}

/// The outcome of a task.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done, exit code 0 where there is one.
    Succeeded,
    /// Ran and failed, or could not be run.
    Failed,
    /// Ran longer than its time-out; its process tree was killed.
    TimedOut,
    /// Ended because the server revoked it (before it started, or killed while it ran).
    Revoked,
    /// Not started: it arrived after its expiry, or with a fence lower than one already seen.
    Refused,
    /// It cannot be known whether it ran. Never guessed, never run again by itself.
    Unknown,
}

/// Why a task ended as it did, for programs: beside an outcome that does not say it. The message says it to people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Its agent was not connected in time, and it was never sent.
    NotDelivered,
    /// It came to its agent, or its turn there, after its expiry.
    Expired,
    /// The agent is too old for it.
    AgentTooOld,
    /// The agent took it and did not report: whether it ran cannot be known.
    NotReported,
    /// The machine or the agent restarted under it, and its end was lost.
    Restarted,
    /// What ran it was killed from outside, and its end was lost.
    RunnerLost,
    /// There is no such OS user on the server.
    NoUser,
    /// Its working directory is not there.
    NoDirectory,
    /// The program that reads the script is not installed.
    NoInterpreter,
    /// A reason that a later version of the agent gives.
    #[serde(other)]
    Other,
}
