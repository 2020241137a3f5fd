//! Carries out one task: the only place where an action becomes a deed.
//!
//! It knows nothing of sessions and writes nothing to the journal; whoever calls it has recorded the start. Every action can be
//! begun again after the agent died in it: a script is found again by its run directory, the others do no harm when repeated.

mod check;
mod file;
mod place;
mod release;
mod script;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use windlass_domain::{
    Timestamp,
    task::{Action, Fault, Outcome, Task, TaskId, TaskResult},
    value::Value,
};
use windlass_protocol::{DownloadGrant, OutputChunk, SecretText};

use crate::{
    app,
    balancer::Balancers,
    cache, clock,
    config::{DataDir, Policy},
    files::{FileError, chain},
    housekeeping::Housekeeping,
    instance::{InstanceDir, InstanceError},
    mask::Masker,
    net::Platform,
    proc::Cgroup,
    unpack::UnpackError,
    users::{self, User, UserError},
};

pub(crate) use script::kill_marked;
use script::run_script;

/// What every task needs to know of the agent.
pub struct Context {
    /// Where everything is.
    pub data: DataDir,
    /// What is allowed.
    pub policy: Policy,
    /// Where packages come from.
    pub platform: Platform,
    /// Load balancers that this server hosts.
    pub balancers: Balancers,
    /// The subtree for process trees, where there is one.
    pub cgroup: Option<Cgroup>,
    /// Removal of old releases.
    pub housekeeping: Housekeeping,
}

/// One task to carry out.
pub struct Job {
    /// The task.
    pub task: Task,
    /// Values of the secrets that it refers to.
    pub secrets: BTreeMap<String, SecretText>,
    /// The newest grant.
    pub grants: watch::Receiver<Option<DownloadGrant>>,
    /// Cancelled when the task is revoked.
    pub revoked: CancellationToken,
    /// When it started (before a crash of the agent, perhaps).
    pub started_at: Timestamp,
    /// Takes live output.
    pub output: mpsc::Sender<OutputChunk>,
}

/// Why an action failed.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    /// The OS user.
    #[error(transparent)]
    User(#[from] UserError),
    /// A value that did not come.
    #[error("the secret `{0}` was not delivered with the task; it may have been deleted")]
    Secret(String),
    /// A variable in a text.
    #[error("`${{{0}}}` names no environment variable of this task")]
    Variable(String),
    /// The instance's directory.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The package.
    #[error(transparent)]
    Fetch(#[from] cache::FetchError),
    /// Unpacking.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// Not fetched.
    #[error("the package {0} is not in this agent's cache; fetch it first")]
    NotCached(String),
    /// An absolute path that may not be written.
    #[error(
        "the path `{path}` is not below a directory that this agent lets tasks write to (allowed: {allowed}); add one with `policy.path_roots` in the agent's config.json"
    )]
    PathNotAllowed {
        /// The path.
        path: String,
        /// What is allowed.
        allowed: String,
    },
    /// A path that is none.
    #[error("`{0}` is not a path of a file: no `..`, not empty, no links on the way")]
    Path(String),
    /// Files that cannot be downloaded.
    #[error("the files cannot be downloaded from the URL")]
    Download(#[from] place::DownloadError),
    /// A root itself.
    #[error(
        "`{0}` is a directory that this agent lets tasks write below, and no task's to replace: name one below it"
    )]
    Root(String),
    /// Something else has the name.
    #[error("`{0}` is there and is no directory: nothing was changed")]
    NotADirectory(String),
    /// The directory belongs to somebody else, and its user could have put it there.
    #[error(
        "`{path}` belongs to another user than `{user}`, who can rename what is in the directory around it: it is not replaced. Run the step as its owner, or change its owner to `{user}`"
    )]
    NotOwner {
        /// The directory.
        path: String,
        /// The user of the step.
        user: String,
    },
    /// Another process replaced the directory, and it could not be put back.
    #[error(
        "another process replaced `{path}` while the new files were unpacked; what it put there is in `{kept}` now. Stop what writes there, move it back, then retry the step"
    )]
    NotRestored {
        /// The directory.
        path: String,
        /// Where it is now.
        kept: String,
    },
    /// Another process replaced the directory meanwhile.
    #[error(
        "another process replaced `{0}` while the new files were unpacked; it was left as it is. Stop what writes there, then retry the step"
    )]
    Exchanged(String),
    /// Of no instance.
    #[error(
        "the task is of no service instance, and there is nothing to {0} without one: only scripts, checks and files by absolute path are possible"
    )]
    NoInstance(&'static str),
    /// The application did not come up.
    #[error("the application could not be started: {0}")]
    App(String),
    /// Our own thread.
    #[error("a worker of the agent failed")]
    Worker(#[source] tokio::task::JoinError),
}

/// How an action ended, before it is a result.
struct Ended {
    outcome: Outcome,
    exit_code: Option<i32>,
    output: String,
    dropped_bytes: u64,
    message: String,
    fault: Option<Fault>,
}

impl Ended {
    fn new(outcome: Outcome, message: impl Into<String>) -> Self {
        Self {
            outcome,
            exit_code: None,
            output: String::new(),
            dropped_bytes: 0,
            message: message.into(),
            fault: None,
        }
    }

    fn because(self, fault: Option<Fault>) -> Self {
        Self { fault, ..self }
    }
}

impl ActionError {
    /// The reason for programs, where there is one.
    fn fault(&self) -> Option<Fault> {
        match self {
            Self::User(UserError::NotExists(_)) => Some(Fault::NoUser),
            Self::User(
                UserError::NotAllowed { .. }
                | UserError::RootDisabled
                | UserError::NotPrivileged { .. },
            )
            | Self::Secret(_)
            | Self::Variable(_)
            | Self::Instance(_)
            | Self::File(_)
            | Self::Fetch(_)
            | Self::Unpack(_)
            | Self::NotCached(_)
            | Self::PathNotAllowed { .. }
            | Self::Path(_)
            | Self::Download(_)
            | Self::Root(_)
            | Self::NotADirectory(_)
            | Self::Exchanged(_)
            | Self::NotOwner { .. }
            | Self::NotRestored { .. }
            | Self::NoInstance(_)
            | Self::App(_)
            | Self::Worker(_) => None,
        }
    }
}

/// A result for a task that was not carried out here.
#[must_use]
pub fn result_without_run(
    outcome: Outcome,
    message: &str,
    started_at: Option<Timestamp>,
) -> TaskResult {
    TaskResult {
        outcome,
        exit_code: None,
        output: String::new(),
        dropped_bytes: 0,
        message: message.to_owned(),
        fault: None,
        started_at,
        finished_at: clock::now(),
    }
}

/// Carries out a task to its end, its time-out or its revoke.
pub async fn run(context: Arc<Context>, job: Job) -> (TaskId, TaskResult) {
    let masker = Masker::new(job.secrets.values().map(SecretText::reveal));
    let id = job.task.id;
    let started_at = job.started_at;
    let spent = Duration::from_millis(clock::now().since_ms(started_at));
    let left = Duration::from_millis(job.task.timeout_ms).saturating_sub(spent);
    let ended = match carry_out(&context, &job, left).await {
        Ok(ended) => ended,
        Err(error) => Ended::new(Outcome::Failed, chain(&error)).because(error.fault()),
    };
    let result = TaskResult {
        outcome: ended.outcome,
        exit_code: ended.exit_code,
        output: masker.text(&ended.output),
        dropped_bytes: ended.dropped_bytes,
        message: masker.text(&ended.message),
        fault: ended.fault,
        started_at: Some(started_at),
        finished_at: clock::now(),
    };
    (id, result.cut())
}

async fn carry_out(
    context: &Arc<Context>,
    job: &Job,
    left: Duration,
) -> Result<Ended, ActionError> {
    let task = &job.task;
    if task.instance.is_none() {
        needs_no_instance(&task.action)?;
    }
    if let Action::Script(script) = &task.action {
        return run_script(context, job, script, left).await;
    }
    if left.is_zero() {
        return Ok(too_late(task));
    }
    let cancelled = Arc::new(AtomicBool::new(false));
    let progress = std::sync::Mutex::new(String::new());
    let act = async {
        match &task.action {
            Action::Script(script) => run_script(context, job, script, left).await,
            Action::Fetch(package) => {
                cache::fetch(
                    &context.data,
                    &context.policy,
                    &context.platform,
                    package,
                    job.grants.clone(),
                )
                .await?;
                let in_use = [package.digest].into();
                // Housekeeping: the package is there.
                if let Err(error) = cache::evict(&context.data, &context.policy, &in_use) {
                    tracing::warn!(error = %chain(&error), "failed to remove old packages from the cache");
                }
                Ok(Ended::new(Outcome::Succeeded, ""))
            }
            Action::Unpack { package, release } => {
                release::unpack_release(context, task, package, release, &cancelled).await?;
                Ok(Ended::new(Outcome::Succeeded, ""))
            }
            Action::WriteFile {
                path,
                content,
                mode,
            } => {
                file::write_file(context, task, path, content, *mode)?;
                Ok(Ended::new(Outcome::Succeeded, ""))
            }
            Action::Activate(manifest) => {
                let user = users::resolve(task.run_as.as_deref(), &context.policy)?;
                let instance = InstanceDir::of(&context.data, task, Some(&user))?;
                instance.hand_over(&user).await?;
                instance.activate(manifest)?;
                Ok(Ended::new(Outcome::Succeeded, ""))
            }
            Action::Start(_) => {
                app::start(context, task, &job.secrets).await?;
                Ok(Ended::new(Outcome::Succeeded, ""))
            }
            Action::StopSupervised { grace_ms } => {
                app::stop(context, task, *grace_ms).await?;
                Ok(Ended::new(Outcome::Succeeded, ""))
            }
            Action::Check(check) => check::run_check(context, job, check, &progress).await,
            Action::PlaceFiles(files) => {
                let placed = place::place_files(context, task, files, &cancelled).await?;
                Ok(Ended::new(Outcome::Succeeded, placed))
            }
        }
    };
    let ended = tokio::select! {
        biased;
        () = job.revoked.cancelled() => Ok(Ended::new(Outcome::Revoked, "it was revoked while it ran")),
        ended = tokio::time::timeout(left, act) => match ended {
            Ok(ended) => ended,
            Err(_) => {
                let detail = progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
                let colon = if detail.is_empty() { "" } else { ": " };
                Ok(Ended::new(
                    Outcome::TimedOut,
                    format!("it was not done within {} ms{colon}{detail}", task.timeout_ms),
                ))
            }
        },
    };
    cancelled.store(true, Ordering::Relaxed);
    let mut ended = ended?;
    if let (Action::Check(_), Outcome::Succeeded, Some(id)) =
        (&task.action, ended.outcome, task.instance)
    {
        let instance = InstanceDir::of(&context.data, task, None)?;
        let warnings = context.housekeeping.remove_old_releases(id, instance).await;
        if !warnings.is_empty() {
            ended.message = format!(
                "warning: old releases are left on this server, which need disk space: {}",
                warnings.join("; ")
            );
        }
    }
    Ok(ended)
}

/// What can be done without a service instance.
fn needs_no_instance(action: &Action) -> Result<(), ActionError> {
    match action {
        Action::Script(_) | Action::Check(_) | Action::WriteFile { .. } | Action::PlaceFiles(_) => {
            Ok(())
        }
        Action::Fetch(_) => Err(ActionError::NoInstance("fetch")),
        Action::Unpack { .. } => Err(ActionError::NoInstance("unpack")),
        Action::Activate(_) => Err(ActionError::NoInstance("activate")),
        Action::Start(_) => Err(ActionError::NoInstance("start")),
        Action::StopSupervised { .. } => Err(ActionError::NoInstance("stop")),
    }
}

/// The end of a task that was interrupted by the agent's death and cannot go on: its time has passed.
fn too_late(task: &Task) -> Ended {
    Ended::new(
        Outcome::TimedOut,
        format!(
            "the agent was down while it ran, and its time-out of {} ms has passed; it does not go on",
            task.timeout_ms
        ),
    )
}

/// The whole environment of a task's processes, and the texts in it that are secret.
pub(crate) fn environment(
    instance: &InstanceDir,
    task: &Task,
    user: &User,
    secrets: &BTreeMap<String, SecretText>,
) -> Result<(BTreeMap<String, String>, Vec<String>), ActionError> {
    let mut env = instance.environment(task, user)?;
    for (name, value) in &task.env {
        let value = match value {
            Value::Plain(text) => text.clone(),
            Value::SecretRef(secret) => secrets
                .get(secret)
                .ok_or_else(|| ActionError::Secret(secret.clone()))?
                .reveal()
                .to_owned(),
        };
        // What the agent says about itself is not for a task to change.
        if !name.starts_with("WINDLASS_") || !env.contains_key(name) {
            env.insert(name.clone(), value);
        }
    }
    let texts = secrets
        .values()
        .map(|secret| secret.reveal().to_owned())
        .collect();
    Ok((env, texts))
}

/// Whom the shim has to become: nobody, when it is that user already.
pub(crate) fn become_user(user: &User) -> Option<User> {
    (user.uid != rustix::process::geteuid().as_raw()).then(|| user.clone())
}

/// A cgroup of this name in the agent's subtree, where there is one.
pub(crate) fn cgroup(context: &Context, name: &str) -> Option<PathBuf> {
    let made = context.cgroup.as_ref()?.child(name);
    made.map(|group| group.path().to_owned())
        .map_err(|error| tracing::warn!(%error, "no cgroup for a process tree; it is ended by walking it"))
        .ok()
}
