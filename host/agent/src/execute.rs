//! Carries out one task: the only place where an action becomes a deed.
//!
//! It knows nothing of sessions and writes nothing to the journal; whoever calls it has recorded the start. Every action can be
//! begun again after the agent died in it: a script is found again by its run directory, the others do no harm when repeated.

use std::{
    collections::BTreeMap,
    io::Write as _,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::fs::{Mode as FileMode, OFlags, ResolveFlags, openat2};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use windlass_domain::{
    Timestamp,
    task::{Action, Check, Outcome, PackageRef, Probe, Script, Task, TaskId, TaskResult},
    value::Value,
};
use windlass_protocol::{DownloadGrant, OutputChunk, SecretText};

use crate::{
    app, cache, clock,
    config::{DataDir, Policy},
    files::{Context as _, FileError, chain, remove_tree},
    instance::{InstanceDir, InstanceError, check_file_name},
    mask::Masker,
    net::Platform,
    probe::{self, Streak},
    proc::{self, Cgroup},
    shim::{
        client::{self, Found, Watch},
        spec::{End, Mode, RunDir, RunStatus, Spec},
    },
    unpack::{self, UnpackError},
    users::{self, User, UserError},
};

/// What every task needs to know of the agent.
pub struct Context {
    /// Where everything is.
    pub data: DataDir,
    /// What is allowed.
    pub policy: Policy,
    /// Where packages come from.
    pub platform: Platform,
    /// The subtree for process trees, where there is one.
    pub cgroup: Option<Cgroup>,
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
    /// The application did not come up.
    #[error("the application could not be started: {0}")]
    App(String),
    /// Our own thread.
    #[error("a worker of the agent failed")]
    Worker(#[source] tokio::task::JoinError),
}

/// How an action ended, before it is a result.
pub(crate) struct Ended {
    outcome: Outcome,
    exit_code: Option<i32>,
    output: String,
    dropped_bytes: u64,
    message: String,
}

impl Ended {
    fn new(outcome: Outcome, message: impl Into<String>) -> Self {
        Self {
            outcome,
            exit_code: None,
            output: String::new(),
            dropped_bytes: 0,
            message: message.into(),
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
        Err(error) => Ended::new(Outcome::Failed, chain(&error)),
    };
    let result = TaskResult {
        outcome: ended.outcome,
        exit_code: ended.exit_code,
        output: masker.text(&ended.output),
        dropped_bytes: ended.dropped_bytes,
        message: masker.text(&ended.message),
        started_at: Some(started_at),
        finished_at: clock::now(),
    };
    (id, result)
}

async fn carry_out(
    context: &Arc<Context>,
    job: &Job,
    left: Duration,
) -> Result<Ended, ActionError> {
    let task = &job.task;
    if let Action::Script(script) = &task.action {
        return run_script(context, job, script, left).await;
    }
    let cancelled = AtomicBool::new(false);
    let cancelled = Arc::new(cancelled);
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
                cache::evict(&context.data, &context.policy, &in_use)?;
                Ok(Ended::new(Outcome::Succeeded, ""))
            }
            Action::Unpack { package, release } => {
                unpack_release(context, task, package, release, &cancelled).await?;
                Ok(Ended::new(Outcome::Succeeded, ""))
            }
            Action::WriteFile {
                path,
                content,
                mode,
            } => {
                write_file(context, task, path, content, *mode)?;
                Ok(Ended::new(Outcome::Succeeded, ""))
            }
            Action::Activate(manifest) => {
                let user = users::resolve(task.run_as.as_deref(), &context.policy)?;
                InstanceDir::of(&context.data, task, Some(&user))?.activate(manifest)?;
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
            Action::Check(check) => run_check(context, job, check, &progress).await,
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
                    format!("ExecutionTimeout: it was not done within {} ms{colon}{detail}", task.timeout_ms),
                ))
            }
        },
    };
    cancelled.store(true, Ordering::Relaxed);
    ended
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

fn script_spec(
    context: &Context,
    task: &Task,
    secrets: &BTreeMap<String, SecretText>,
    script: &Script,
    dir: &RunDir,
    timeout: Duration,
) -> Result<Spec, ActionError> {
    let user = users::resolve(task.run_as.as_deref(), &context.policy)?;
    let instance = InstanceDir::of(&context.data, task, Some(&user))?;
    let (env, texts) = environment(&instance, task, &user, secrets)?;
    let work_dir = instance.work_dir(task)?;
    let working_dir = match &script.working_dir {
        Some(path) => work_dir.join(path),
        None => work_dir,
    };
    let mut command = script.interpreter.clone();
    command.push(dir.script().display().to_string());
    let name = dir
        .path()
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    Ok(Spec {
        command,
        env,
        working_dir,
        user: become_user(&user),
        secrets: texts,
        cgroup: cgroup(context, &name),
        mode: Mode::Script {
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        },
    })
}

async fn run_script(
    context: &Context,
    job: &Job,
    script: &Script,
    left: Duration,
) -> Result<Ended, ActionError> {
    let dir = RunDir::new(context.data.run(&job.task.id));
    if client::find(&dir)? == Found::Nothing {
        let spec = script_spec(context, &job.task, &job.secrets, script, &dir, left)?;
        client::start(&dir, &spec, Some(&script.text)).await?;
    }
    let mut tail = Tail::new(&dir, job.task.id);
    let status = follow(&dir, Some(&job.revoked), |done| {
        tail.send(&job.output, done)
    })
    .await?;
    Ok(match status {
        Followed::Ended(status) => script_ended(&status, job.task.timeout_ms),
        Followed::NeverRan => Ended::new(
            Outcome::Failed,
            "ExecutionException: the shim could not start the script; the disk may be full or out of memory: look at the agent's log",
        ),
        Followed::Lost { machine_restarted } => {
            kill_marked(&job.task.id);
            let message = if machine_restarted {
                "InstanceRestarted: the server restarted while the script ran; what it did cannot be known"
            } else {
                "ExecutionException: the script's shim was killed from outside; how the script ended cannot be known, what was left of it was killed"
            };
            Ended {
                output: output_of(&dir),
                ..Ended::new(Outcome::Unknown, message)
            }
        }
    })
}

fn output_of(dir: &RunDir) -> String {
    let mut capture = crate::capture::Capture::default();
    capture.push(&std::fs::read(dir.output()).unwrap_or_default());
    capture.render().0
}

/// Ends processes that a lost shim left.
pub(crate) fn kill_marked(task: &TaskId) {
    let marker = format!("WINDLASS_TASK={task}");
    for process in proc::with_environment(|line| line == marker.as_bytes()) {
        proc::signal(&process, rustix::process::Signal::KILL);
    }
}

fn script_ended(status: &RunStatus, timeout_ms: u64) -> Ended {
    let (output, dropped_bytes) = status.output.render();
    let (outcome, exit_code, message) = match &status.end {
        End::Exited(0) => (Outcome::Succeeded, Some(0), String::new()),
        End::Exited(code) => (
            Outcome::Failed,
            Some(*code),
            format!("ExitCodeNonzero: the script ended with exit code {code}; see its output"),
        ),
        End::Signaled(signal) => (
            Outcome::Failed,
            None,
            format!("ExecutionException: the script was ended by signal {signal} from outside"),
        ),
        End::TimedOut => (
            Outcome::TimedOut,
            None,
            format!(
                "ExecutionTimeout: the script ran longer than its time-out of {timeout_ms} ms; its process tree was killed"
            ),
        ),
        End::Stopped => (
            Outcome::Revoked,
            None,
            "it was revoked while it ran; its process tree was killed".into(),
        ),
        End::NotStarted(message) => (Outcome::Failed, None, message.clone()),
    };
    Ended {
        outcome,
        exit_code,
        output,
        dropped_bytes,
        message,
    }
}

/// What became of a run.
pub(crate) enum Followed {
    /// The shim wrote how it ended.
    Ended(Box<RunStatus>),
    /// Nothing was run.
    NeverRan,
    /// It cannot be known.
    Lost { machine_restarted: bool },
}

/// Waits for the end of a run. `look` is called after each change, with whether it is the last time.
async fn follow(
    dir: &RunDir,
    revoked: Option<&CancellationToken>,
    mut look: impl FnMut(bool),
) -> Result<Followed, ActionError> {
    let watch = Watch::new(dir);
    let mut killed = false;
    loop {
        let found = client::find(dir)?;
        look(!matches!(found, Found::Live));
        match found {
            Found::Ended(status) => return Ok(Followed::Ended(status)),
            Found::Nothing => return Ok(Followed::NeverRan),
            Found::Lost(identity) => {
                return Ok(Followed::Lost {
                    machine_restarted: identity.shim.boot_id != proc::boot_id(),
                });
            }
            Found::Live => {}
        }
        let revoke = async {
            match revoked {
                Some(token) if !killed => token.cancelled().await,
                Some(_) | None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = revoke => {
                // A shim that is just starting has no ears yet: asked again until it takes the request.
                if dir.identity().exists() && dir.control().exists() {
                    client::kill(dir);
                    killed = true;
                } else {
                    watch.changed(Duration::from_millis(50)).await;
                }
            }
            () = watch.changed(client::LOOK_AGAIN) => {}
        }
    }
}

/// Reads what a run has written since the last look.
struct Tail {
    path: PathBuf,
    task_id: TaskId,
    offset: u64,
    dropped: u64,
}

impl Tail {
    fn new(dir: &RunDir, task_id: TaskId) -> Self {
        Self {
            path: dir.output(),
            task_id,
            offset: 0,
            dropped: 0,
        }
    }

    fn send(&mut self, output: &mpsc::Sender<OutputChunk>, last: bool) {
        use std::os::unix::fs::FileExt as _;
        let Ok(file) = std::fs::File::open(&self.path) else {
            return;
        };
        let mut buffer = vec![0; windlass_protocol::MAX_OUTPUT_CHUNK_BYTES];
        loop {
            let count = file.read_at(&mut buffer, self.offset).unwrap_or(0);
            // A character may be written in two pieces; its begin waits for the rest.
            let whole = match std::str::from_utf8(&buffer[..count]) {
                Err(error) if error.error_len().is_none() && !last => error.valid_up_to(),
                Ok(_) | Err(_) => count,
            };
            if whole == 0 {
                return;
            }
            let chunk = OutputChunk {
                task_id: self.task_id,
                offset: self.offset,
                text: String::from_utf8_lossy(&buffer[..whole]).into_owned(),
                dropped_bytes: self.dropped,
            };
            self.offset += whole as u64;
            match output.try_send(chunk) {
                Ok(()) => self.dropped = 0,
                Err(_) => self.dropped += whole as u64,
            }
        }
    }
}

async fn unpack_release(
    context: &Arc<Context>,
    task: &Task,
    package: &PackageRef,
    release: &str,
    cancelled: &Arc<AtomicBool>,
) -> Result<(), ActionError> {
    check_file_name(&package.file_name)?;
    let user = users::resolve(task.run_as.as_deref(), &context.policy)?;
    let instance = InstanceDir::of(&context.data, task, Some(&user))?;
    let source = context.data.cached(&package.digest);
    if !source.is_file() {
        return Err(ActionError::NotCached(package.digest.to_string()));
    }
    let target = instance.release(release)?;
    let installed = instance.installed()?;
    let in_use = [&installed.current, &installed.previous]
        .into_iter()
        .flatten()
        .any(|manifest| manifest.release == release);
    // A release that is installed, or was before it, is left as it is: it may be running.
    if !(in_use && target.is_dir()) {
        remove_tree(&target)?;
        let (context, package, cancelled) = (context.clone(), package.clone(), cancelled.clone());
        let owner = become_user(&user);
        let work = move || {
            unpack::unpack(
                &source,
                &package,
                &target,
                owner.as_ref(),
                &context.policy,
                &cancelled,
            )
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(ActionError::Worker)??;
    }
    instance.describe_release(release, package)?;
    Ok(())
}

/// Writes a file beneath the release directory or an allowed root, never through a link.
fn write_file(
    context: &Context,
    task: &Task,
    path: &str,
    content: &str,
    mode: u32,
) -> Result<(), ActionError> {
    let user = users::resolve(task.run_as.as_deref(), &context.policy)?;
    let instance = InstanceDir::of(&context.data, task, Some(&user))?;
    let invalid = || ActionError::Path(path.to_owned());
    let (root, relative) = if path.starts_with('/') {
        let roots = &context.policy.path_roots;
        let root = roots
            .iter()
            .find(|root| Path::new(path).starts_with(root))
            .ok_or_else(|| ActionError::PathNotAllowed {
                path: path.to_owned(),
                allowed: if roots.is_empty() {
                    "none".into()
                } else {
                    roots
                        .iter()
                        .map(|root| root.display().to_string())
                        .collect::<Vec<_>>()
                        .join(", ")
                },
            })?;
        (
            root.clone(),
            Path::new(path)
                .strip_prefix(root)
                .map_err(|_| invalid())?
                .to_owned(),
        )
    } else {
        (instance.release_dir(task)?, PathBuf::from(path))
    };
    let plain = relative.components().all(|part| {
        matches!(
            part,
            std::path::Component::Normal(_) | std::path::Component::CurDir
        )
    });
    let name = relative.file_name().filter(|_| plain).ok_or_else(invalid)?;
    let open_root = std::fs::File::open(&root).during("open", &root)?;
    let mut dir = OwnedFd::from(open_root);
    let owner = become_user(&user).map(|user| {
        (
            rustix::fs::Uid::from_raw(user.uid),
            rustix::fs::Gid::from_raw(user.gid),
        )
    });
    let own = |file: &OwnedFd| match owner {
        Some((uid, gid)) => rustix::fs::fchown(file, Some(uid), Some(gid)),
        None => Ok(()),
    };
    let shown = root.join(&relative);
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    for part in relative.parent().into_iter().flat_map(Path::components) {
        let std::path::Component::Normal(part) = part else {
            continue;
        };
        let open = |dir: &OwnedFd| {
            openat2(
                dir,
                part,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                FileMode::empty(),
                beneath,
            )
        };
        dir = match open(&dir) {
            Ok(below) => below,
            Err(rustix::io::Errno::NOENT) => {
                rustix::fs::mkdirat(&dir, part, FileMode::from_raw_mode(0o755))
                    .during("make a directory for", &shown)?;
                let below = open(&dir).during("open a directory of", &shown)?;
                own(&below).during("give away a directory of", &shown)?;
                below
            }
            Err(rustix::io::Errno::LOOP | rustix::io::Errno::XDEV | rustix::io::Errno::NOTDIR) => {
                return Err(invalid());
            }
            Err(error) => {
                return Err(error)
                    .during("open a directory of", &shown)
                    .map_err(Into::into);
            }
        };
    }
    let temporary = format!(".windlass-{:016x}", u64::from_le_bytes(clock::random()));
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let write = || -> Result<(), FileError> {
        let file = openat2(
            &dir,
            temporary.as_str(),
            flags,
            FileMode::from_raw_mode(0o600),
            beneath,
        )
        .during("create", &shown)?;
        let mut file = std::fs::File::from(file);
        file.write_all(content.as_bytes()).during("write", &shown)?;
        file.sync_all().during("sync", &shown)?;
        let file = OwnedFd::from(file);
        own(&file).during("give away", &shown)?;
        // Set-id bits are never a task's to set.
        rustix::fs::fchmod(&file, FileMode::from_raw_mode(mode & 0o1777))
            .during("set the mode of", &shown)?;
        rustix::fs::renameat(&dir, temporary.as_str(), &dir, name).during("replace", &shown)?;
        rustix::fs::fsync(&dir).during("sync", &shown)
    };
    let written = write();
    if written.is_err()
        && let Err(error) =
            rustix::fs::unlinkat(&dir, temporary.as_str(), rustix::fs::AtFlags::empty())
    {
        tracing::debug!(%error, "a temporary file is left");
    }
    Ok(written?)
}

async fn run_check(
    context: &Context,
    job: &Job,
    check: &Check,
    progress: &std::sync::Mutex<String>,
) -> Result<Ended, ActionError> {
    let user = users::resolve(job.task.run_as.as_deref(), &context.policy)?;
    let instance = InstanceDir::of(&context.data, &job.task, Some(&user))?;
    let (env, _) = environment(&instance, &job.task, &user, &job.secrets)?;
    let mut streak = Streak::new(check.healthy_for_ms);
    let limit = Duration::from_millis(check.try_timeout_ms.max(1));
    let mut number = 0u64;
    loop {
        let began = Instant::now();
        number += 1;
        let attempt = async {
            match &check.probe {
                Probe::Http {
                    url,
                    statuses,
                    body_contains,
                } => probe::http(url, statuses, body_contains.as_deref(), &env).await,
                Probe::Tcp { address } => probe::tcp(address, &env).await,
                Probe::Script(script) => probe_script(context, job, script, limit, number).await,
            }
        };
        // A script's shim keeps the time itself; the little more lets it say so.
        let patience = match &check.probe {
            Probe::Script(_) => limit + Duration::from_secs(5),
            Probe::Http { .. } | Probe::Tcp { .. } => limit,
        };
        let attempt = tokio::time::timeout(patience, attempt)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {} ms", check.try_timeout_ms)));
        if streak.judge(attempt, Instant::now()) {
            return Ok(Ended::new(Outcome::Succeeded, ""));
        }
        let text = format!(
            "not healthy for {} ms on end; the last failure: {}",
            check.healthy_for_ms, streak.last_failure
        );
        *progress
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = text;
        tokio::time::sleep_until(began + Duration::from_millis(check.interval_ms.max(10))).await;
    }
}

/// One try of a script check, under a shim of its own.
async fn probe_script(
    context: &Context,
    job: &Job,
    script: &Script,
    limit: Duration,
    number: u64,
) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| chain(error);
    let name = format!(
        "{}.probe-{number}-{:08x}",
        job.task.id,
        u32::from_le_bytes(clock::random())
    );
    let dir = RunDir::new(context.data.runs().join(name));
    let spec = script_spec(context, &job.task, &job.secrets, script, &dir, limit)
        .map_err(|error| text(&error))?;
    client::start(&dir, &spec, Some(&script.text))
        .await
        .map_err(|error| text(&error))?;
    let followed = follow(&dir, None, |_| {})
        .await
        .map_err(|error| text(&error))?;
    let outcome = match followed {
        Followed::Ended(status) => match &status.end {
            End::Exited(0) => Ok(()),
            end @ (End::Exited(_)
            | End::Signaled(_)
            | End::TimedOut
            | End::Stopped
            | End::NotStarted(_)) => {
                let (output, _) = status.output.render();
                let tail: String = output
                    .trim_end()
                    .chars()
                    .rev()
                    .take(500)
                    .collect::<Vec<_>>()
                    .into_iter()
                    .rev()
                    .collect();
                Err(format!(
                    "the check's script: {}; {tail}",
                    crate::shim::host::describe(end)
                ))
            }
        },
        Followed::NeverRan | Followed::Lost { .. } => Err("the check's script was lost".into()),
    };
    remove_tree(dir.path()).map_err(|error| text(&error))?;
    outcome
}
