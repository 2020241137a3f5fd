//! Writes a task's files, beneath what it may write to only.

use std::{
    io::Write as _,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode as FileMode, OFlags, openat2};
use windlass_domain::task::Task;

use super::{ActionError, Context, become_user};
use crate::{
    clock,
    files::{Context as _, FileError},
    instance::InstanceDir,
    tree::{self, BENEATH, BelowError},
    users::{self, User},
};

/// Writes a file beneath the release directory or an allowed root, never through a link.
pub(super) fn write_file(
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
        allowed_root(context, path)?
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
    let shown = root.join(&relative);
    let parent = relative.parent().unwrap_or(Path::new(""));
    let dir = open_below(&root, parent, &user, path)?;
    let temporary = format!(".windlass-{:016x}", u64::from_le_bytes(clock::random()));
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let write = || -> Result<(), FileError> {
        let file = openat2(
            &dir,
            temporary.as_str(),
            flags,
            FileMode::from_raw_mode(0o600),
            BENEATH,
        )
        .during("create", &shown)?;
        let mut file = std::fs::File::from(file);
        file.write_all(content.as_bytes()).during("write", &shown)?;
        file.sync_all().during("sync", &shown)?;
        let file = OwnedFd::from(file);
        own(&file, &user).during("give away", &shown)?;
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

/// The allowed root that an absolute path is below, and the path from there.
pub(super) fn allowed_root(
    context: &Context,
    path: &str,
) -> Result<(PathBuf, PathBuf), ActionError> {
    let roots = &context.policy.path_roots;
    let refused = || ActionError::PathNotAllowed {
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
    };
    let below = roots
        .iter()
        .find_map(|root| Some((root, Path::new(path).strip_prefix(root).ok()?)));
    let (root, relative) = below.ok_or_else(refused)?;
    Ok((root.clone(), relative.to_owned()))
}

/// [`tree::open_below`] for a task: missing directories belong to its user. `path` is what the task named.
pub(super) fn open_below(
    root: &Path,
    relative: &Path,
    user: &User,
    path: &str,
) -> Result<OwnedFd, ActionError> {
    let owner = become_user(user).map(|user| (user.uid, user.gid));
    tree::open_below(root, relative, owner).map_err(|error| match error {
        BelowError::NotADirectory => ActionError::Path(path.to_owned()),
        BelowError::File(error) => error.into(),
    })
}

/// Gives a file or directory to a user that is not the agent's own.
fn own(file: &OwnedFd, user: &User) -> rustix::io::Result<()> {
    match become_user(user) {
        Some(user) => rustix::fs::fchown(
            file,
            Some(rustix::fs::Uid::from_raw(user.uid)),
            Some(rustix::fs::Gid::from_raw(user.gid)),
        ),
        None => Ok(()),
    }
}
