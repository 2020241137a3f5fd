//! The agent's side of a shim: starts one, finds one again, waits for its end, asks it to stop.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    process::Stdio,
    time::Duration,
};

use rustix::fs::{FlockOperation, flock, inotify};
use tokio::io::unix::AsyncFd;
use windlass_domain::Timestamp;

use super::spec::{RunDir, RunIdentity, RunStatus, Spec};
use crate::{
    crash,
    files::{Context as _, FileError, make_dir, read_json, sync_dir},
    tree::remove_tree,
};

/// What a run directory shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing was ever run there: it may be removed and begun again.
    Nothing,
    /// The shim lives.
    Live,
    /// The shim wrote the end (it may still read the output of services that were left behind).
    Ended(Box<RunStatus>),
    /// Something was run, the shim is gone, and it left no end.
    Lost(RunIdentity),
}

/// Looks at a run directory.
///
/// # Errors
/// When a file in it cannot be read or understood.
pub fn find(dir: &RunDir) -> Result<Found, FileError> {
    // The lock first: whoever finds it free sees everything that the shim wrote.
    let live = is_live(dir)?;
    if let Some(status) = read_json(&dir.status())? {
        return Ok(Found::Ended(Box::new(status)));
    }
    if live {
        return Ok(Found::Live);
    }
    Ok(match read_json(&dir.identity())? {
        Some(identity) => Found::Lost(identity),
        None => Found::Nothing,
    })
}

/// Whether a shim holds the directory.
///
/// # Errors
/// When the lock file cannot be opened.
pub fn is_live(dir: &RunDir) -> Result<bool, FileError> {
    let path = dir.lock();
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).during("open", &path),
    };
    Ok(flock(&file, FlockOperation::NonBlockingLockExclusive).is_err())
}

/// What the shim says about itself; `None` before it said anything.
///
/// # Errors
/// When the file cannot be read or understood.
pub fn identity(dir: &RunDir) -> Result<Option<RunIdentity>, FileError> {
    read_json(&dir.identity())
}

/// Looks at a run directory whose shim may be just starting, until it has said who it is, or is gone. A shim whose agent died
/// before it had told all goes without having run anything.
///
/// # Errors
/// As [`find`] and [`identity`].
pub async fn find_settled(dir: &RunDir) -> Result<Found, FileError> {
    let watch = Watch::new(dir);
    loop {
        let found = find(dir)?;
        if found != Found::Live || identity(dir)?.is_some() {
            return Ok(found);
        }
        watch.changed(Duration::from_millis(50)).await;
    }
}

/// Starts a shim in a directory in which nothing was ever run. The script's text, where there is one, is put beside it.
///
/// # Errors
/// When the directory cannot be made or the shim cannot be started; then nothing was run.
pub async fn start(dir: &RunDir, spec: &Spec, script: Option<&str>) -> Result<(), FileError> {
    remove_tree(dir.path())?;
    make_dir(dir.path(), 0o711)?;
    if let Some(text) = script {
        let path = dir.script();
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .during("create", &path)?;
        file.write_all(text.as_bytes()).during("write", &path)?;
        // Whoever runs the script has to read it; it holds no secrets.
        file.set_permissions(std::fs::Permissions::from_mode(0o644))
            .during("set the mode of", &path)?;
    }
    let lock_path = dir.lock();
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .during("create", &lock_path)?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive).during("lock", &lock_path)?;
    if let Some(parent) = dir.path().parent() {
        sync_dir(parent)?;
    }
    let request = serde_json::to_vec(spec)
        .map_err(io::Error::from)
        .during("describe", dir.path())?;
    crash::point("before_shim");
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command
        .arg("shim")
        .arg(dir.path())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::from(lock))
        .stderr(Stdio::null())
        .process_group(0);
    let mut child = command.spawn().during("start the shim of", dir.path())?;
    drop(command);
    if let Some(mut stdin) = child.stdin.take() {
        use tokio::io::AsyncWriteExt as _;
        stdin
            .write_all(&request)
            .await
            .during("tell the shim of", dir.path())?;
    }
    crash::point("after_shim");
    // Dropped, not awaited: tokio collects its status when it ends, and it may outlive us.
    drop(child);
    Ok(())
}

/// Asks the shim to end its tree: SIGTERM, and SIGKILL after the grace. A shim that is gone has nothing to end.
pub fn stop(dir: &RunDir, grace_ms: u64) {
    send(dir, &format!("stop {grace_ms}\n"));
}

/// Asks the shim to kill its tree.
pub fn kill(dir: &RunDir) {
    send(dir, "kill\n");
}

fn send(dir: &RunDir, line: &str) {
    let sent = OpenOptions::new()
        .write(true)
        .custom_flags(i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0))
        .open(dir.control())
        .and_then(|mut control| control.write_all(line.as_bytes()));
    if let Err(error) = sent {
        tracing::debug!(%error, dir = %dir.path().display(), "the shim takes no requests");
    }
}

/// Tells when something in a run directory may have changed.
pub struct Watch(Option<AsyncFd<std::os::fd::OwnedFd>>);

impl Watch {
    /// Watches a directory. Where the kernel gives no watch, [`Watch::changed`] wakes up by time alone.
    #[must_use]
    pub fn new(dir: &RunDir) -> Self {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let watched = inotify::init(flags).and_then(|descriptor| {
            let events = inotify::WatchFlags::MOVED_TO
                | inotify::WatchFlags::MODIFY
                | inotify::WatchFlags::CLOSE;
            inotify::add_watch(&descriptor, dir.path(), events)?;
            Ok(descriptor)
        });
        Self(watched.ok().and_then(own))
    }

    /// Waits for a change, at most `longest`.
    pub async fn changed(&self, longest: Duration) {
        let Some(descriptor) = &self.0 else {
            tokio::time::sleep(longest.min(Duration::from_millis(100))).await;
            return;
        };
        if let Ok(Ok(mut ready)) = tokio::time::timeout(longest, descriptor.readable()).await {
            let mut events = [0u8; 4096];
            while rustix::io::read(descriptor.get_ref(), &mut events).is_ok_and(|count| count > 0) {
            }
            ready.clear_ready();
        }
    }
}

#[allow(
    deprecated,
    reason = "the replacement is unsafe for descriptors that may be closed elsewhere; an `OwnedFd` closes only here"
)]
fn own(descriptor: std::os::fd::OwnedFd) -> Option<AsyncFd<std::os::fd::OwnedFd>> {
    AsyncFd::new(descriptor).ok()
}

/// How long to wait for a change before looking again anyway: a shim that was killed changes no file.
pub const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// When a run began, if it did.
#[must_use]
pub fn started_at(dir: &RunDir) -> Option<Timestamp> {
    identity(dir).ok().flatten()?.started_at
}
