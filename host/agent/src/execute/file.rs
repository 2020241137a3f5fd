//! Writes a task's files, beneath what it may write to only.

use std::{
    io::Write as _,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode as FileMode, OFlags, ResolveFlags, openat2};
use windlass_domain::task::Task;

use super::{ActionError, Context, become_user};
use crate::{
    clock,
    files::{Context as _, FileError},
    instance::InstanceDir,
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

/// No links on the way, and nothing above the directory that it starts from.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

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

/// Opens a directory below a root, never through a link; what is missing on the way is made, and belongs to the user. `path` is
/// what was asked for.
pub(super) fn open_below(
    root: &Path,
    relative: &Path,
    user: &User,
    path: &str,
) -> Result<OwnedFd, ActionError> {
    let open_root = std::fs::File::open(root).during("open", root)?;
    let mut dir = OwnedFd::from(open_root);
    let shown = root.join(relative);
    for part in relative.components() {
        let std::path::Component::Normal(part) = part else {
            continue;
        };
        let open = |dir: &OwnedFd| {
            openat2(
                dir,
                part,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                FileMode::empty(),
                BENEATH,
            )
        };
        dir = match open(&dir) {
            Ok(below) => below,
            Err(rustix::io::Errno::NOENT) => {
                rustix::fs::mkdirat(&dir, part, FileMode::from_raw_mode(0o755))
                    .during("make a directory for", &shown)?;
                let below = open(&dir).during("open a directory of", &shown)?;
                own(&below, user).during("give away a directory of", &shown)?;
                below
            }
            Err(rustix::io::Errno::LOOP | rustix::io::Errno::XDEV | rustix::io::Errno::NOTDIR) => {
                return Err(ActionError::Path(path.to_owned()));
            }
            Err(error) => {
                return Err(error)
                    .during("open a directory of", &shown)
                    .map_err(Into::into);
            }
        };
    }
    Ok(dir)
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
