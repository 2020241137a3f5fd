//! Replaces a directory with the content of an archive that is downloaded from a URL.
//!
//! | step | when it fails, or the agent dies in it |
//! | --- | --- |
//! | download to `downloads/` | the file is removed; after a death it is downloaded again |
//! | unpack into a [`WorkDir`] beside the directory, as its user | removed; after a death by the next attempt. See [`crate::unpack`] |
//! | exchange the two | one step of the kernel: the old files are there or the new ones, never a part of them |
//! | remove the old files | the step succeeds with a warning that names what is left |
//!
//! The directory is strictly below one of the policy's roots, and is reached without links. Its user can usually write in the
//! directory around it, and rename or exchange anything there at any time. So the agent works through handles only, and removes
//! the old files only when they are the directory that it found at the beginning. Where others can write in the directory around,
//! that directory must belong to the step's user: anything else could have been put there to be removed by root.

mod download;

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use rustix::fs::{AtFlags, FileType, RenameFlags, renameat_with, statat};
use serde::{Deserialize, Serialize};
use windlass_domain::{
    Digest,
    task::{FilesRef, PackageFormat, PackageRef, Task},
};

use super::{
    ActionError, Context, become_user,
    file::{allowed_root, open_below},
};
use crate::{
    files::{Context as _, FileError, chain, make_dir, read_json, remove_file, write_json},
    tree::{WorkDir, WorkDirRecord},
    unpack,
    users::{self, User},
};
pub(super) use download::DownloadError;
use download::download;

/// What the new files are called in the work directory, and the old ones after the exchange.
const FILES: &str = "files";

/// Places files. Returns a sentence that describes what was placed, with a warning where old files are left.
pub(super) async fn place_files(
    context: &Arc<Context>,
    task: &Task,
    files: &FilesRef,
    cancelled: &Arc<AtomicBool>,
) -> Result<String, ActionError> {
    let user = users::resolve(task.run_as.as_deref(), &context.policy)?;
    let place = Arc::new(Place::open(context, files, &user)?);
    let downloads = context.data.downloads();
    make_dir(&downloads, 0o700)?;
    let archive = downloads.join(format!("{}.{}", task.id.order, task.id.node));
    let placed = async {
        let package = download(context, files, &archive).await?;
        let text = format!(
            "placed an archive of {} bytes with the SHA-256 {}",
            package.size_bytes, package.digest
        );
        let warning = replace(context, &place, &archive, package, &user, cancelled).await?;
        Ok::<String, ActionError>(match warning {
            Some(warning) => format!("{text}; warning: the old files are still there: {warning}"),
            None => text,
        })
    };
    let placed = placed.await;
    if let Err(error) = remove_file(&archive) {
        tracing::warn!(error = %chain(&error), "failed to remove a downloaded archive");
    }
    placed
}

/// Unpacks and exchanges; the text is why the old files could not be removed.
async fn replace(
    context: &Arc<Context>,
    place: &Arc<Place>,
    archive: &Path,
    package: PackageRef,
    user: &User,
    cancelled: &Arc<AtomicBool>,
) -> Result<Option<String>, ActionError> {
    let (context, place, archive) = (context.clone(), place.clone(), archive.to_owned());
    let (owner, cancelled) = (become_user(user), cancelled.clone());
    let work = move || -> Result<Option<String>, ActionError> {
        place.remove_leftovers()?;
        let work = WorkDir::create(&place.parent, place.around())?;
        let mut record = Record {
            work: work.record(place.around())?,
            removable: place.old.into_iter().collect(),
        };
        write_json(&place.record, &record, 0o600)?;
        let (owner, policy) = (owner.as_ref(), &context.policy);
        let fresh = work.path().join(FILES);
        let exchanged = unpack::unpack(&archive, &package, &fresh, owner, policy, &cancelled)
            .map_err(ActionError::from)
            .and_then(|()| {
                let fresh = identity(work.dir(), FILES)?;
                record.removable.extend(fresh);
                write_json(&place.record, &record, 0o600)?;
                place.exchange(&work, fresh)
            });
        if let Err(ActionError::NotRestored { .. }) = &exchanged {
            // What is in the work directory is somebody else's: it stays, and is forgotten.
            remove_file(&place.record)?;
            return exchanged.map(|()| None);
        }
        let removed = work
            .remove(&place.parent, place.around())
            .and_then(|()| remove_file(&place.record));
        let warning = removed.err().map(|error| chain(&error));
        match (exchanged, warning) {
            (Ok(()), warning) => Ok(warning),
            (Err(error), None) => Err(error),
            (Err(error), Some(warning)) => {
                tracing::warn!(error = %warning, "failed to remove a work directory");
                Err(error)
            }
        }
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(ActionError::Worker)?
}

/// What is recorded about an attempt before anything is moved, so that only its own files are removed after a death.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    work: WorkDirRecord,
    /// Device and inode of the new files and of the directory that they replace.
    removable: Vec<(u64, u64)>,
}

/// Device and inode of an entry, whatever it is; `None`: there is none.
fn identity(dir: &OwnedFd, name: &str) -> Result<Option<(u64, u64)>, FileError> {
    match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => Ok(Some((found.st_dev, found.st_ino))),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error).during("inspect", Path::new(name)),
    }
}

/// Where files go.
struct Place {
    /// The directory around, held open: whatever is done to its path, this is where we work.
    parent: OwnedFd,
    /// Name of the directory that is replaced.
    name: String,
    /// Device and inode of the directory that is replaced; `None`: there is none yet.
    old: Option<(u64, u64)>,
    /// As requested.
    shown: String,
    /// Identifies the work directory of the last attempt for this directory, in the agent's own data.
    record: PathBuf,
}

impl Place {
    fn open(context: &Context, files: &FilesRef, user: &User) -> Result<Self, ActionError> {
        let shown = files.directory.clone();
        let (root, relative) = allowed_root(context, &shown)?;
        let plain = relative
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_)));
        if relative.as_os_str().is_empty() {
            return Err(ActionError::Root(shown));
        }
        let name = relative.file_name().filter(|_| plain);
        let Some(name) = name.and_then(|name| name.to_str()) else {
            return Err(ActionError::Path(shown));
        };
        let parent = relative.parent().unwrap_or(Path::new(""));
        let parent = open_below(&root, parent, user, &shown)?;
        let record = format!("{}.work.json", Digest::of(shown.as_bytes()).short());
        let mut place = Self {
            parent,
            name: name.to_owned(),
            old: None,
            shown,
            record: context.data.downloads().join(record),
        };
        place.old = place.find_old(user)?;
        Ok(place)
    }

    /// The directory around, for messages.
    fn around(&self) -> &Path {
        let shown = Path::new(&self.shown);
        shown.parent().unwrap_or(shown)
    }

    /// Device and inode of the directory to be replaced. Anything else with its name is in the way.
    fn find_old(&self, user: &User) -> Result<Option<(u64, u64)>, ActionError> {
        let around = rustix::fs::fstat(&self.parent).during("inspect", self.around())?;
        let own = rustix::process::geteuid().as_raw();
        let others_write = around.st_uid != own || around.st_mode & 0o022 != 0;
        match statat(&self.parent, self.name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Directory => {
                if others_write && found.st_uid != user.uid {
                    return Err(ActionError::NotOwner {
                        path: self.shown.clone(),
                        user: user.name.clone(),
                    });
                }
                Ok(Some((found.st_dev, found.st_ino)))
            }
            Ok(_) => Err(ActionError::NotADirectory(self.shown.clone())),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(error) => Err(error)
                .during("inspect", Path::new(&self.shown))
                .map_err(Into::into),
        }
    }

    /// Removes the work directory of an attempt that died.
    fn remove_leftovers(&self) -> Result<(), ActionError> {
        // A record that cannot be read was not written completely; then its directory is still empty.
        let record = read_json::<Record>(&self.record).unwrap_or_default();
        if let Some(record) = record
            && let Some(left) = WorkDir::reopen(&self.parent, &record.work)
        {
            let files = identity(left.dir(), FILES)?;
            if files.is_some_and(|files| !record.removable.contains(&files)) {
                tracing::warn!(
                    path = %self.around().display(),
                    "the work directory of an earlier attempt holds files of somebody else; it is left"
                );
            } else if let Err(error) = left.remove(&self.parent, self.around()) {
                tracing::warn!(error = %chain(&error), "failed to remove the work directory of an earlier attempt");
            }
        }
        Ok(remove_file(&self.record)?)
    }

    /// Exchanges the new files with the old ones. What is then in the work directory is removed, so it must be the directory
    /// that was there at the beginning: anything else is put back, and the new files are there again afterwards, or nothing in the
    /// work directory is removed.
    fn exchange(&self, work: &WorkDir, fresh: Option<(u64, u64)>) -> Result<(), ActionError> {
        let shown = Path::new(&self.shown);
        let rename =
            |flags| renameat_with(work.dir(), FILES, &self.parent, self.name.as_str(), flags);
        let Some(old) = self.old else {
            rename(RenameFlags::NOREPLACE).during("create", shown)?;
            return Ok(rustix::fs::fsync(&self.parent).during("sync what is around", shown)?);
        };
        rename(RenameFlags::EXCHANGE).during("replace", shown)?;
        match identity(work.dir(), FILES) {
            Ok(Some(found)) if found == old => {}
            Ok(_) | Err(_) => {
                let restored = rename(RenameFlags::EXCHANGE)
                    .is_ok_and(|()| identity(work.dir(), FILES).is_ok_and(|found| found == fresh));
                return Err(match restored {
                    true => ActionError::Exchanged(self.shown.clone()),
                    false => ActionError::NotRestored {
                        path: self.shown.clone(),
                        kept: self
                            .around()
                            .join(work.name())
                            .join(FILES)
                            .display()
                            .to_string(),
                    },
                });
            }
        }
        Ok(rustix::fs::fsync(&self.parent).during("sync what is around", shown)?)
    }
}

/// The archive as a package.
fn package(digest: Digest, size_bytes: u64, format: PackageFormat) -> PackageRef {
    PackageRef {
        digest,
        size_bytes,
        format,
        file_name: "files".to_owned(),
        version: String::new(),
    }
}
