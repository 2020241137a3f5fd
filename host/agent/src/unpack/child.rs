//! Unpacking as the application's user: the agent's own program once more, without the agent's rights.
//!
//! ```text
//! agent (root)                                      child (the application's user)
//!   makes the fresh directory, gives it to the user
//!   opens the package             ── stdin ──►        unpacks it into its working directory
//!   waits; kills it when its task ends
//!                                 ◄── stdout ──       says what is wrong; nothing when all is good
//!   renames the directory, or removes it
//! ```
//! The package comes as an open file: its user may read nothing else of the agent's. The child has one user and one group, no
//! environment and no more files than these; it dies with the agent, and the directory of a child that died is removed when
//! the agent starts. Other processes of the same user can meddle with the directory meanwhile, as they can with the finished
//! release: nothing that they could not do to themselves.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use windlass_domain::task::PackageRef;

use super::{UnpackError, fill, write_failed};
use crate::{config::Policy, files::chain, users::User};

/// Between two looks at the child and at whether its task has ended.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// The longest reason that is listened to.
const MAX_REASON: u64 = 64 * 1024;

/// What the child is told, as its only argument. Nothing in it is secret: arguments can be seen by everybody.
#[derive(Serialize, Deserialize)]
struct Order {
    /// The agent's process: a child whose parent is another one was left alone.
    agent: u32,
    package: PackageRef,
    unpack_bytes: u64,
    unpack_entries: u64,
    unpack_ratio: u64,
}

/// Unpacks an open package into an empty directory, as `user`.
pub(super) fn unpack_as(
    user: &User,
    file: File,
    package: &PackageRef,
    fresh: &Path,
    policy: &Policy,
    cancelled: &AtomicBool,
) -> Result<(), UnpackError> {
    let start_failed = |source| UnpackError::ChildStart {
        user: user.name.clone(),
        source,
    };
    std::os::unix::fs::chown(fresh, Some(user.uid), Some(user.gid)).map_err(write_failed(fresh))?;
    let order = Order {
        agent: std::process::id(),
        package: package.clone(),
        unpack_bytes: policy.unpack_bytes,
        unpack_entries: policy.unpack_entries,
        unpack_ratio: policy.unpack_ratio,
    };
    let order = serde_json::to_string(&order).map_err(|error| start_failed(error.into()))?;
    // With `uid`, all groups but this one are given up, too.
    let mut child = Command::new("/proc/self/exe")
        .arg("unpack")
        .arg(order)
        .env_clear()
        .uid(user.uid)
        .gid(user.gid)
        .current_dir(fresh)
        .stdin(file)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(start_failed)?;
    let status = loop {
        if cancelled.load(Ordering::Relaxed) {
            child
                .kill()
                .and_then(|()| child.wait())
                .map_err(start_failed)?;
            return Err(UnpackError::Cancelled);
        }
        match child.try_wait().map_err(start_failed)? {
            Some(status) => break status,
            None => std::thread::sleep(LOOK_EVERY),
        }
    };
    if status.success() {
        return Ok(());
    }
    let mut reason = String::new();
    if let Some(said) = child.stdout.take() {
        // What is no text is no reason: then its status is told.
        said.take(MAX_REASON).read_to_string(&mut reason).ok();
    }
    if reason.is_empty() {
        let user = user.name.clone();
        Err(UnpackError::ChildDied { user, status })
    } else {
        Err(UnpackError::Child(reason))
    }
}

/// Runs as `windlass-agent unpack`, in the directory to be filled, with the package on stdin.
#[must_use]
pub fn run(order: &str) -> ExitCode {
    match unpack_here(order) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            let mut stdout = std::io::stdout();
            match stdout
                .write_all(reason.as_bytes())
                .and_then(|()| stdout.flush())
            {
                Ok(()) => ExitCode::from(1),
                Err(_) => ExitCode::from(2),
            }
        }
    }
}

fn unpack_here(order: &str) -> Result<(), String> {
    let order: Order = serde_json::from_str(order).map_err(|error| error.to_string())?;
    let kill = rustix::process::Signal::KILL;
    rustix::process::set_parent_process_death_signal(Some(kill))
        .map_err(|error| error.to_string())?;
    let parent = rustix::process::getppid().map(|parent| parent.as_raw_nonzero().get());
    if parent.and_then(|parent| u32::try_from(parent).ok()) != Some(order.agent) {
        return Err("the agent is gone".to_owned());
    }
    let policy = Policy {
        unpack_bytes: order.unpack_bytes,
        unpack_entries: order.unpack_entries,
        unpack_ratio: order.unpack_ratio,
        ..Policy::default()
    };
    let stdin = std::io::stdin();
    let file = stdin
        .as_fd()
        .try_clone_to_owned()
        .map(File::from)
        .map_err(|error| error.to_string())?;
    let never = AtomicBool::new(false);
    fill(file, &order.package, Path::new("."), &policy, &never).map_err(|error| chain(&error))
}
