//! Directory trees that another user may change at the same moment.
//!
//! The agent often runs as root and works where an application's user can write. That user can exchange any name below its own
//! directories for a link, or for another directory, at any time. So root follows no path there: a directory is opened once,
//! without links, and everything else goes through its handle.
//!
//! | place | who can write there | decision |
//! | --- | --- | --- |
//! | journal, configuration, cache, downloads, `runs/`, `apps/`, `balancers/`, `instances/<id>/`, `releases/` | the agent only | paths: nobody else can change a name in them |
//! | a release that is unpacked | the application's user, once it is given to that user | filled by a child that runs as that user ([`crate::unpack::child`]), in a directory whose parent is the agent's |
//! | `WriteFile` in a release or below `policy.path_roots` | the application's user | [`open_below`]; the file is created, owned and renamed through handles |
//! | static files below `policy.path_roots` | the application's user | [`WorkDir`] beside the directory; exchanged and removed through handles |
//! | `data/` of an instance, given to another user | both users | [`give_tree`]: each entry is opened without links and judged and given by that handle |
//! | whatever is removed: old releases, run directories, replaced static files | the application's user | [`remove_tree`]: through handles, without recursion |
//! | scripts, applications, working directories | the application's user | entered by a process that has become that user already ([`crate::shim`]) |
//! | logs and files that probes read | root only (`/var/log`, `/proc`, `/sys`) | paths |
//!
//! Depth and size of a tree are decided by others, so nothing here recurses, and the number of open files does not grow with
//! the depth of what is removed.

use std::{
    collections::VecDeque,
    ffi::{CStr, CString},
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, Dir, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchmod, fchown, fstat,
        mkdirat, openat2, renameat, statat, unlinkat,
    },
    io::Errno,
    path::Arg,
};

use crate::{
    clock,
    files::{Context as _, FileError, remove_file},
};

/// No links on the way, and nothing above the directory that the look-up starts from.
pub(crate) const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// The deepest tree that is given to another user: each level keeps one file open.
const MAX_GIVEN_DEPTH: usize = 256;
/// Names that are held in memory while a tree is removed.
const MAX_QUEUED: usize = 4096;
/// How often a directory is emptied before it counts as one that somebody keeps filling.
const MAX_PASSES: usize = 64;

/// Opens a directory below another one without following a link.
fn open_dir(parent: &OwnedFd, name: impl Arg) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(parent, name, flags, Mode::empty(), BENEATH)
}

/// The names in a directory, at most `limit` of them.
fn names(dir: &OwnedFd, limit: usize) -> rustix::io::Result<Vec<CString>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if !is_dots(name) {
            if found.len() == limit {
                break;
            }
            found.push(name.to_owned());
        }
    }
    Ok(found)
}

fn is_dots(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

fn random_name(kind: &str) -> String {
    format!(".{kind}-{:016x}", u64::from_le_bytes(clock::random()))
}

/// Creates a directory and returns its handle.
///
/// Another user who can write in `parent` may put another directory in its place before it is opened. So the handle is used only
/// when it is an empty directory of the agent's own: then it does not matter which one it is.
fn create_dir(parent: &OwnedFd, name: &str, mode: u32) -> io::Result<OwnedFd> {
    mkdirat(parent, name, Mode::from_raw_mode(0o700))?;
    let opened = || -> io::Result<OwnedFd> {
        let dir = open_dir(parent, name)?;
        if fstat(&dir)?.st_uid != rustix::process::geteuid().as_raw() || !names(&dir, 1)?.is_empty()
        {
            return Err(io::Error::other(
                "another process exchanged the directory while it was created",
            ));
        }
        fchmod(&dir, Mode::from_raw_mode(mode))?;
        Ok(dir)
    };
    opened().inspect_err(|_| {
        // Only an empty directory can be removed this way, whoever's it is.
        if let Err(error) = unlinkat(parent, name, AtFlags::REMOVEDIR) {
            tracing::debug!(%error, name, "an empty directory is left");
        }
    })
}

/// Why a directory below a root cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BelowError {
    /// A component of the path is a link or a file.
    #[error("a component of the path is a symbolic link or a file")]
    NotADirectory,
    /// The file system.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Opens a directory below a root without following a link. Missing directories are created and given to `owner` (user and
/// group); `None` leaves them to the agent's own user.
///
/// # Errors
/// When a component is a link or a file, or the file system refuses.
pub fn open_below(
    root: &Path,
    relative: &Path,
    owner: Option<(u32, u32)>,
) -> Result<OwnedFd, BelowError> {
    let mut dir = OwnedFd::from(File::open(root).during("open", root)?);
    let shown = root.join(relative);
    for part in relative.components() {
        let std::path::Component::Normal(part) = part else {
            continue;
        };
        dir = match open_dir(&dir, part) {
            Ok(below) => below,
            Err(Errno::NOENT) => create_owned(&dir, part, owner, &shown)?,
            Err(Errno::LOOP | Errno::XDEV | Errno::NOTDIR) => {
                return Err(BelowError::NotADirectory);
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

/// Creates a directory under a name that nobody knows, gives it to its owner, and only then gives it its final name.
fn create_owned(
    parent: &OwnedFd,
    name: &std::ffi::OsStr,
    owner: Option<(u32, u32)>,
    shown: &Path,
) -> Result<OwnedFd, BelowError> {
    let temporary = random_name("windlass-new");
    let dir = create_dir(parent, &temporary, 0o755).during("create a directory for", shown)?;
    if let Some((uid, gid)) = owner {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        fchown(&dir, Some(uid), Some(gid)).during("set the owner of a directory of", shown)?;
    }
    match renameat(parent, temporary.as_str(), parent, name) {
        Ok(()) => Ok(dir),
        Err(error) => {
            if let Err(error) = unlinkat(parent, temporary.as_str(), AtFlags::REMOVEDIR) {
                tracing::debug!(%error, temporary, "an empty directory is left");
            }
            match error {
                // Another process was faster.
                Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR => match open_dir(parent, name) {
                    Ok(dir) => Ok(dir),
                    Err(Errno::LOOP | Errno::XDEV | Errno::NOTDIR) => {
                        Err(BelowError::NotADirectory)
                    }
                    Err(error) => Err(error)
                        .during("open a directory of", shown)
                        .map_err(Into::into),
                },
                error => Err(error)
                    .during("create a directory for", shown)
                    .map_err(Into::into),
            }
        }
    }
}

/// A directory of the agent's own inside a directory that others may write to. Others can rename it and pass through it, but
/// they cannot change what is in it; the agent reaches it by its handle only.
#[derive(Debug)]
pub struct WorkDir {
    name: String,
    dir: OwnedFd,
}

/// Identifies a [`WorkDir`] after the agent died, so that nothing else is removed in its place.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WorkDirRecord {
    name: String,
    device: u64,
    inode: u64,
}

impl WorkDir {
    /// Creates one.
    ///
    /// # Errors
    /// When the file system refuses, or another process interferes.
    pub fn create(parent: &OwnedFd, shown: &Path) -> Result<Self, FileError> {
        let name = random_name("windlass-work");
        // A child that runs as the application's user passes through it to the directory that it fills.
        let dir = create_dir(parent, &name, 0o711).during("create a directory in", shown)?;
        Ok(Self { name, dir })
    }

    /// Its name when it was created.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The handle.
    #[must_use]
    pub fn dir(&self) -> &OwnedFd {
        &self.dir
    }

    /// A path that leads to this directory whatever happens to its name. Valid in this process and in its children before
    /// they execute another program.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd()))
    }

    /// What to record before the directory is filled.
    ///
    /// # Errors
    /// When the directory cannot be inspected.
    pub fn record(&self, shown: &Path) -> Result<WorkDirRecord, FileError> {
        let stat = fstat(&self.dir).during("inspect a directory in", shown)?;
        Ok(WorkDirRecord {
            name: self.name.clone(),
            device: stat.st_dev,
            inode: stat.st_ino,
        })
    }

    /// Opens the directory of an earlier attempt; `None` when its name is not that directory any more.
    #[must_use]
    pub fn reopen(parent: &OwnedFd, record: &WorkDirRecord) -> Option<Self> {
        let dir = open_dir(parent, record.name.as_str()).ok()?;
        let stat = fstat(&dir).ok()?;
        let same = (stat.st_dev, stat.st_ino) == (record.device, record.inode);
        same.then(|| Self {
            name: record.name.clone(),
            dir,
        })
    }

    /// Removes the directory and everything in it.
    ///
    /// # Errors
    /// When something in it cannot be removed; the rest is removed.
    pub fn remove(&self, parent: &OwnedFd, shown: &Path) -> Result<(), FileError> {
        let place = shown.join(&self.name);
        fchmod(&self.dir, Mode::from_raw_mode(0o700)).during("set the mode of", &place)?;
        empty(&self.dir, &place)?;
        match unlinkat(parent, self.name.as_str(), AtFlags::REMOVEDIR) {
            // Whoever renamed it meanwhile has an empty directory.
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::NOTEMPTY) => Ok(()),
            Err(error) => Err(error).during("remove", &place),
        }
    }
}

/// Gives a directory to another owner, with everything in it that belongs to `from`. No link is followed, and nothing of
/// others is touched. After a crash it can be repeated: the directory itself changes its owner last.
///
/// # Errors
/// When something cannot be given away, or the tree has more than 256 levels.
pub fn give_tree(path: &Path, from: u32, uid: u32, gid: u32) -> Result<(), FileError> {
    let give = || -> io::Result<()> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())?;
        give_dirs(dir, from, Uid::from_raw(uid), Gid::from_raw(gid))
    };
    give().during("change the owner of", path)
}

fn give_dirs(top: OwnedFd, from: u32, uid: Uid, gid: Gid) -> io::Result<()> {
    let mut open = vec![Dir::new(top)?];
    loop {
        let depth = open.len();
        let Some(dir) = open.last_mut() else {
            return Ok(());
        };
        let Some(entry) = dir.read() else {
            // The directory itself last: as long as it belongs to the old owner, there is something left to do.
            let dir = dir.fd()?;
            if fstat(dir)?.st_uid == from {
                fchown(dir, Some(uid), Some(gid))?;
            }
            open.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if is_dots(name) {
            continue;
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat2(dir.fd()?, name, flags, Mode::empty(), BENEATH) {
            Ok(_) if depth == MAX_GIVEN_DEPTH => {
                return Err(io::Error::other(format!(
                    "it has directories nested deeper than {MAX_GIVEN_DEPTH} levels; flatten them, or change their owner yourself"
                )));
            }
            Ok(below) => open.push(Dir::new(below)?),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                // By its handle: the name may mean another file the next moment.
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = match rustix::fs::openat(dir.fd()?, name, flags, Mode::empty()) {
                    Ok(file) => file,
                    Err(Errno::NOENT) => continue,
                    Err(error) => return Err(error.into()),
                };
                if fstat(&file)?.st_uid == from {
                    chownat(&file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
                }
            }
            // Removed meanwhile.
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes a directory and everything in it. Succeeds when it does not exist. The directory that holds it must be the agent's.
///
/// The tree is first moved into a new directory of the agent's own, `.removing-<random>` beside it; its name is free at once. Then
/// each directory of the tree that is not empty is moved up into that one, and emptied there: no recursion, and only three files
/// open whatever the depth. A removal that failed in part leaves the rest there.
///
/// # Errors
/// With the path that cannot be removed and the reason, when there is one; everything else is removed.
pub fn remove_tree(path: &Path) -> Result<(), FileError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput)).during("remove", path);
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = match rustix::fs::open(parent, flags, Mode::empty()) {
        Ok(dir) => dir,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error).during("remove", path),
    };
    match unlinkat(&dir, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR) => return remove_file(path),
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        Err(error) => return Err(error).during("remove", path),
    }
    let pit_name = random_name("removing");
    let pit = create_dir(&dir, &pit_name, 0o700).during("remove", path)?;
    let moved = renameat(&dir, name, &pit, "0").during("remove", path);
    let emptied = moved.and_then(|()| empty(&pit, &parent.join(&pit_name)));
    match unlinkat(&dir, pit_name.as_str(), AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => emptied,
        Err(error) => emptied.and_then(|()| Err(error).during("remove", path)),
    }
}

/// Removes everything in a directory that is the agent's own. Continues after a failure; returns the first one.
fn empty(pit: &OwnedFd, shown: &Path) -> Result<(), FileError> {
    let mut number = 0;
    let mut first_error = None;
    loop {
        let found = names(pit, MAX_QUEUED).during("list", shown)?;
        if found.is_empty() {
            return Ok(());
        }
        let mut queue = VecDeque::from(found);
        let mut progress = false;
        while let Some(name) = queue.pop_front() {
            match remove_entry(pit, &name, shown, &mut number, &mut queue) {
                Ok(()) => progress = true,
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        if !progress {
            return first_error.map_or(Ok(()), Err);
        }
    }
}

/// Removes one entry of the pit. Directories in it that are not empty become entries of the pit.
fn remove_entry(
    pit: &OwnedFd,
    name: &CStr,
    shown: &Path,
    number: &mut u64,
    queue: &mut VecDeque<CString>,
) -> Result<(), FileError> {
    let place = || shown.join(&*name.to_string_lossy());
    match unlinkat(pit, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error).during("remove", &place()),
    }
    let dir = open_dir(pit, name).during("remove", &place())?;
    if !rustix::process::geteuid().is_root()
        && let Err(error) = fchmod(&dir, Mode::from_raw_mode(0o700))
    {
        tracing::debug!(%error, "the mode of a directory that is removed stays");
    }
    for _ in 0..MAX_PASSES {
        let mut failed = None;
        for entry in Dir::read_from(&dir).during("list", &place())? {
            let entry = entry.during("list", &place())?;
            let below = entry.file_name();
            if is_dots(below) {
                continue;
            }
            if let Err(error) = remove_or_move(&dir, below, pit, number, queue) {
                let path = place().join(&*below.to_string_lossy());
                failed.get_or_insert(Err::<(), _>(error).during("remove", &path));
            }
        }
        match (unlinkat(pit, name, AtFlags::REMOVEDIR), failed) {
            (Ok(()) | Err(Errno::NOENT), _) => return Ok(()),
            (Err(_), Some(failed)) => return failed,
            (Err(Errno::NOTEMPTY | Errno::EXIST), None) => {}
            (Err(error), None) => return Err(error).during("remove", &place()),
        }
    }
    Err(io::Error::other("another process keeps adding files to it")).during("remove", &place())
}

fn remove_or_move(
    dir: &OwnedFd,
    name: &CStr,
    pit: &OwnedFd,
    number: &mut u64,
    queue: &mut VecDeque<CString>,
) -> rustix::io::Result<()> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error),
    }
    match unlinkat(dir, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    loop {
        *number += 1;
        let moved = CString::new(number.to_string()).map_err(|_| Errno::INVAL)?;
        // A name that an earlier, interrupted removal used.
        if statat(pit, &*moved, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            continue;
        }
        match renameat(dir, name, pit, &*moved) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
        if queue.len() < MAX_QUEUED {
            queue.push_back(moved);
        }
        return Ok(());
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    /// Makes `depth` nested directories without ever needing a long path.
    fn nest(top: &Path, depth: usize) {
        let mut dir = OwnedFd::from(File::open(top).unwrap());
        for _ in 0..depth {
            mkdirat(&dir, "d", Mode::from_raw_mode(0o755)).unwrap();
            dir = open_dir(&dir, "d").unwrap();
        }
        let flags = OFlags::CREATE | OFlags::WRONLY;
        rustix::fs::openat(&dir, "leaf", flags, Mode::from_raw_mode(0o644)).unwrap();
    }

    #[test]
    fn a_tree_of_twenty_thousand_levels_is_removed() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("deep");
        fs::create_dir(&path).unwrap();
        nest(&path, 20_000);
        remove_tree(&path).unwrap();
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_wide_tree_with_links_is_removed_and_the_targets_stay() {
        let top = tempfile::tempdir().unwrap();
        let outside = top.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "kept").unwrap();
        let path = top.path().join("wide");
        for at in 0..300 {
            let below = path.join(format!("{}/{at}/x", at % 7));
            fs::create_dir_all(&below).unwrap();
            symlink(&outside, below.join("link")).unwrap();
            fs::write(below.join("file"), "x").unwrap();
        }
        symlink(&outside, path.join("link")).unwrap();
        remove_tree(&path).unwrap();
        assert!(!path.exists());
        assert_eq!(fs::read_to_string(outside.join("kept")).unwrap(), "kept");
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 1);
        // A link in place of the directory: the link is removed, not what it leads to.
        symlink(&outside, &path).unwrap();
        remove_tree(&path).unwrap();
        assert_eq!(fs::read_to_string(outside.join("kept")).unwrap(), "kept");
        remove_tree(&path).unwrap();
    }

    #[test]
    fn a_tree_that_is_too_deep_to_be_given_away_is_refused_with_the_limit() {
        let top = tempfile::tempdir().unwrap();
        let own = rustix::process::geteuid().as_raw();
        nest(top.path(), MAX_GIVEN_DEPTH - 2);
        give_tree(top.path(), own + 1, own, own).unwrap();
        nest(&top.path().join("d"), 0);
        let deep = tempfile::tempdir().unwrap();
        nest(deep.path(), MAX_GIVEN_DEPTH + 10);
        let error = give_tree(deep.path(), own + 1, own, own).unwrap_err();
        let text = crate::files::chain(&error);
        assert!(text.contains("256 levels"), "{text}");
        remove_tree(&deep.path().join("d")).unwrap();
    }

    #[test]
    fn a_directory_below_a_link_is_refused() {
        let top = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path(), top.path().join("link")).unwrap();
        for path in ["link", "link/below"] {
            let refused = open_below(top.path(), Path::new(path), None);
            assert!(matches!(refused, Err(BelowError::NotADirectory)), "{path}");
        }
        open_below(top.path(), Path::new("a/b/c"), None).unwrap();
        assert!(top.path().join("a/b/c").is_dir());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        let left: Vec<_> = fs::read_dir(top.path()).unwrap().flatten().collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }
}
