//! Replaces a directory with the content of an archive that is downloaded from a URL.
//!
//! | step | when it fails, or the agent dies in it |
//! | --- | --- |
//! | download to `downloads/` | the file is removed; after a death it is written anew |
//! | unpack beside the directory, as its user | removed; after a death by the next attempt. See [`crate::unpack`] |
//! | exchange the two | one step of the kernel: the old files are there or the new ones, never a part of them |
//! | remove the old files | removed by the next attempt |
//!
//! The directory lies strictly below one of the policy's roots, and is reached without links.

mod download;

use std::{
    fs,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use rustix::fs::{AtFlags, CWD, FileType, RenameFlags, renameat_with, statat};
use windlass_domain::{
    Digest,
    task::{FilesRef, PackageFormat, PackageRef, Task},
};

use super::{
    ActionError, Context, become_user,
    file::{allowed_root, open_below},
};
use crate::{
    files::{Context as _, make_dir, remove_file, remove_tree},
    unpack,
    users::{self, User},
};
pub(super) use download::DownloadError;
use download::download;

/// Places files; says what was placed.
pub(super) async fn place_files(
    context: &Arc<Context>,
    task: &Task,
    files: &FilesRef,
    cancelled: &Arc<AtomicBool>,
) -> Result<String, ActionError> {
    let user = users::resolve(task.run_as.as_deref(), &context.policy)?;
    let place = Place::open(context, files, &user)?;
    let downloads = context.data.downloads();
    make_dir(&downloads, 0o700)?;
    let archive = downloads.join(format!("{}.{}", task.id.order, task.id.node));
    let placed = async {
        let package = download(context, files, &archive).await?;
        let said = format!(
            "placed an archive of {} bytes with the SHA-256 {}",
            package.size_bytes, package.digest
        );
        unpack_beside(context, &place, &archive, package, &user, cancelled).await?;
        // Nothing is awaited between the end of the unpacking and this.
        place.exchange()?;
        Ok::<String, ActionError>(said)
    };
    let placed = placed.await;
    let work = place.work();
    let clean = move || remove_file(&archive).and_then(|()| remove_tree(&work));
    let cleaned = tokio::task::spawn_blocking(clean).await;
    let said = placed?;
    cleaned.map_err(ActionError::Worker)??;
    Ok(said)
}

async fn unpack_beside(
    context: &Arc<Context>,
    place: &Place,
    archive: &Path,
    package: PackageRef,
    user: &User,
    cancelled: &Arc<AtomicBool>,
) -> Result<(), ActionError> {
    let (work, fresh, archive) = (place.work(), place.fresh(), archive.to_owned());
    let (context, owner) = (context.clone(), become_user(user));
    let cancelled = cancelled.clone();
    let unpacked = move || -> Result<(), ActionError> {
        // What an attempt left that died.
        remove_tree(&work)?;
        // Its user has to get through it, and nobody has to see what is in it.
        fs::DirBuilder::new()
            .mode(0o711)
            .create(&work)
            .during("make", &work)?;
        let (owner, policy) = (owner.as_ref(), &context.policy);
        unpack::unpack(&archive, &package, &fresh, owner, policy, &cancelled)?;
        Ok(())
    };
    tokio::task::spawn_blocking(unpacked)
        .await
        .map_err(ActionError::Worker)?
}

/// Where files go.
struct Place {
    /// The directory around, held open: whatever is done to its path, this is where we work.
    parent: OwnedFd,
    /// Name of the directory that is replaced.
    name: String,
    /// As asked for.
    shown: String,
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
        let place = Self {
            parent,
            name: name.to_owned(),
            shown,
        };
        place.is_there()?;
        Ok(place)
    }

    /// Whether there is a directory to be replaced. Anything else of its name is in the way.
    fn is_there(&self) -> Result<bool, ActionError> {
        match statat(&self.parent, self.name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Directory => Ok(true),
            Ok(_) => Err(ActionError::NotADirectory(self.shown.clone())),
            Err(rustix::io::Errno::NOENT) => Ok(false),
            Err(error) => Err(error)
                .during("look at", Path::new(&self.shown))
                .map_err(Into::into),
        }
    }

    fn around(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.parent.as_raw_fd()))
    }

    /// A directory beside it that is ours: named by it, so that the next attempt finds what this one leaves.
    fn work_name(&self) -> String {
        format!(".windlass-{}", Digest::of(self.name.as_bytes()).short())
    }

    fn work(&self) -> PathBuf {
        self.around().join(self.work_name())
    }

    /// Where the new files are unpacked, and the old ones are afterwards.
    fn fresh(&self) -> PathBuf {
        self.work().join("files")
    }

    fn exchange(&self) -> Result<(), ActionError> {
        let fresh = self.fresh();
        let flags = if self.is_there()? {
            RenameFlags::EXCHANGE
        } else {
            RenameFlags::NOREPLACE
        };
        renameat_with(CWD, &fresh, &self.parent, self.name.as_str(), flags)
            .during("replace", Path::new(&self.shown))?;
        rustix::fs::fsync(&self.parent).during("sync what is around", Path::new(&self.shown))?;
        Ok(())
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
