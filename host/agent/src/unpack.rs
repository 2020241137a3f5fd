//! Unpacks packages, which are not trusted.
//!
//! Everything happens in a fresh directory that is given its name only when all of it is good; a failure leaves nothing.
//! Entries are created beneath that directory only (`openat2` with `RESOLVE_BENEATH` and `RESOLVE_NO_SYMLINKS`), each name once,
//! never through a link. Refused, each with its own error: absolute paths, `..`, links that leave, writing through a link, devices
//! and other special files, set-user-id and set-group-id bits, more bytes, entries or growth than the policy allows.
//! Source: design, "Agents", "Unpacking"; spec "Packages".

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufReader, Read, Seek as _, SeekFrom, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use flate2::read::MultiGzDecoder;
use rustix::{
    fs::{
        AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, linkat, mkdirat, openat2,
        statat, symlinkat,
    },
    io::Errno,
};
use tar::EntryType;
use windlass_domain::task::{PackageFormat, PackageRef};

use crate::{
    clock,
    config::Policy,
    files::{FileError, chain, remove_tree},
    users::User,
};

/// Growth is judged only beyond this size.
const RATIO_FREE_BYTES: u64 = 1 << 20;
/// Names and link targets longer than this are refused; so are tar's extension headers longer than 64 KiB.
const MAX_PATH: usize = 4096;
const MAX_EXTENSION: u64 = 64 * 1024;
/// A zip's table of contents beyond this would only fill memory.
const MAX_ZIP_DIRECTORY: u32 = 64 << 20;

/// Why a package is not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// A path that starts with `/`.
    #[error("the package holds the absolute path `{0}`; entries must be relative")]
    Absolute(String),
    /// A path with `..`.
    #[error(
        "the package holds the path `{0}`, which has `..` in it; entries must stay beneath the release directory"
    )]
    Traversal(String),
    /// Another path that is none.
    #[error("the package holds an entry without a usable name: `{0}`")]
    Name(String),
    /// A link out.
    #[error("the link `{path}` in the package points to `{target}`, outside the release directory")]
    LinkLeaves {
        /// The link.
        path: String,
        /// Its target.
        target: String,
    },
    /// An entry behind a link.
    #[error("the package writes `{0}` through a link that it made before")]
    ThroughLink(String),
    /// A name twice.
    #[error("the package holds `{0}` twice")]
    Twice(String),
    /// A device, FIFO or socket.
    #[error("`{path}` in the package is {what}; only files, directories and links are unpacked")]
    Special {
        /// The entry.
        path: String,
        /// What it is.
        what: &'static str,
    },
    /// Bits that give rights.
    #[error(
        "`{path}` in the package has the set-user-id or set-group-id bit (mode {mode:o}); remove it"
    )]
    SetId {
        /// The entry.
        path: String,
        /// Its mode.
        mode: u32,
    },
    /// Too large.
    #[error(
        "the package unpacks to more than {limit} bytes, the limit `policy.unpack_bytes` of this agent"
    )]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// Too many.
    #[error(
        "the package holds more than {limit} entries, the limit `policy.unpack_entries` of this agent"
    )]
    TooMany {
        /// The limit.
        limit: u64,
    },
    /// A bomb.
    #[error(
        "the package of {packed} bytes unpacks to more than {limit} times its size, the limit `policy.unpack_ratio` of this agent: it looks like a bomb"
    )]
    Bomb {
        /// Its size.
        packed: u64,
        /// The limit.
        limit: u64,
    },
    /// Not of its format.
    #[error("the package cannot be read as {format}: {reason}")]
    Broken {
        /// The format.
        format: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The release directory's side.
    #[error("`{path}` cannot be unpacked")]
    Write {
        /// The entry.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its task ended first.
    #[error("unpacking was ended before it was done")]
    Cancelled,
    /// Other files.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Unpacks the package at `source` into `target`, which must not exist; as `user` where one is given. Blocks.
///
/// # Errors
/// When anything about it is not right; then `target` does not exist and nothing is left beside it.
pub fn unpack(
    source: &Path,
    package: &PackageRef,
    target: &Path,
    user: Option<&User>,
    policy: &Policy,
    cancelled: &AtomicBool,
) -> Result<(), UnpackError> {
    let name = format!(".new-{:016x}", u64::from_le_bytes(clock::random()));
    let fresh = target.with_file_name(name);
    let unpacked = unpack_into(source, package, &fresh, user, policy, cancelled).and_then(|()| {
        std::fs::rename(&fresh, target).map_err(|source| UnpackError::Write {
            path: target.display().to_string(),
            source,
        })
    });
    if unpacked.is_err() {
        remove_tree(&fresh)?;
    }
    unpacked
}

fn unpack_into(
    source: &Path,
    package: &PackageRef,
    fresh: &Path,
    user: Option<&User>,
    policy: &Policy,
    cancelled: &AtomicBool,
) -> Result<(), UnpackError> {
    let at = |path: &Path| {
        let path = path.display().to_string();
        move |error: io::Error| UnpackError::Write {
            path,
            source: error,
        }
    };
    std::fs::create_dir(fresh).map_err(at(fresh))?;
    let root = File::open(fresh).map_err(at(fresh))?;
    let mut file = File::open(source).map_err(at(source))?;
    let packed = file.metadata().map_err(at(source))?.len();
    let mut tree = Tree {
        root: root.into(),
        user: user.map(|user| (Uid::from_raw(user.uid), Gid::from_raw(user.gid))),
        budget: Budget {
            packed,
            bytes: 0,
            entries: 0,
            policy,
            cancelled,
        },
        made: BTreeSet::new(),
        modes: Vec::new(),
        links: Vec::new(),
    };
    match package.format {
        PackageFormat::TarGz => {
            inspect_tar(&file, &tree.budget)?;
            file.rewind().map_err(at(source))?;
            unpack_tar(&file, &mut tree)?;
        }
        PackageFormat::Zip => unpack_zip(file, &mut tree)?,
        PackageFormat::Jar | PackageFormat::Plain => {
            let mode = match package.format {
                PackageFormat::Plain => 0o755,
                PackageFormat::Jar | PackageFormat::TarGz | PackageFormat::Zip => 0o644,
            };
            let path = parts(&package.file_name)?;
            tree.file(&path, &package.file_name, mode, &mut file)?;
        }
    }
    tree.finish()?;
    rustix::fs::syncfs(&tree.root).map_err(|error| at(fresh)(error.into()))
}

/// What may still be unpacked.
struct Budget<'a> {
    packed: u64,
    bytes: u64,
    entries: u64,
    policy: &'a Policy,
    cancelled: &'a AtomicBool,
}

impl Budget<'_> {
    fn entry(&mut self) -> Result<(), UnpackError> {
        self.entries += 1;
        let limit = self.policy.unpack_entries;
        if self.entries > limit {
            return Err(UnpackError::TooMany { limit });
        }
        Ok(())
    }

    fn spend(&mut self, bytes: u64) -> Result<(), UnpackError> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(UnpackError::Cancelled);
        }
        self.bytes = self.bytes.saturating_add(bytes);
        let limit = self.policy.unpack_ratio;
        if self.bytes > RATIO_FREE_BYTES && self.bytes > self.packed.saturating_mul(limit) {
            return Err(UnpackError::Bomb {
                packed: self.packed,
                limit,
            });
        }
        let limit = self.policy.unpack_bytes;
        if self.bytes > limit {
            return Err(UnpackError::TooLarge { limit });
        }
        Ok(())
    }
}

/// The directory that is filled.
struct Tree<'a> {
    root: OwnedFd,
    user: Option<(Uid, Gid)>,
    budget: Budget<'a>,
    /// Directories that exist, so that parents are made once.
    made: BTreeSet<PathBuf>,
    /// Modes of directories, set at the end: a directory without the right to write would stop its own entries.
    modes: Vec<(PathBuf, u32)>,
    links: Vec<(PathBuf, String)>,
}

const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// The components of an entry's path; empty for the root itself (`./`).
fn parts(path: &str) -> Result<PathBuf, UnpackError> {
    let shown = || path.chars().take(200).collect::<String>();
    if path.is_empty() || path.len() > MAX_PATH || path.contains('\0') {
        return Err(UnpackError::Name(shown()));
    }
    if path.starts_with('/') {
        return Err(UnpackError::Absolute(shown()));
    }
    let mut parts = PathBuf::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(UnpackError::Traversal(shown())),
            part => parts.push(part),
        }
    }
    Ok(parts)
}

fn permissions(mode: u32, shown: &str) -> Result<u32, UnpackError> {
    if mode & 0o6000 != 0 {
        return Err(UnpackError::SetId {
            path: shown.into(),
            mode: mode & 0o7777,
        });
    }
    Ok(mode & 0o777)
}

fn write_error(path: &str) -> impl Fn(Errno) -> UnpackError + '_ {
    move |error| match error {
        Errno::LOOP | Errno::XDEV | Errno::NOTDIR => UnpackError::ThroughLink(path.into()),
        Errno::EXIST => UnpackError::Twice(path.into()),
        _ => UnpackError::Write {
            path: path.into(),
            source: error.into(),
        },
    }
}

impl Tree<'_> {
    /// Opens a directory beneath the root, made with everything above it.
    fn dir(&mut self, path: &Path, shown: &str) -> Result<OwnedFd, UnpackError> {
        let open = |root: &OwnedFd, path: &Path| {
            let path = if path.as_os_str().is_empty() {
                Path::new(".")
            } else {
                path
            };
            openat2(
                root,
                path,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
                BENEATH,
            )
        };
        if path.as_os_str().is_empty() || self.made.contains(path) {
            return open(&self.root, path).map_err(write_error(shown));
        }
        let parent = self.dir(path.parent().unwrap_or(Path::new("")), shown)?;
        let name = path
            .file_name()
            .ok_or_else(|| UnpackError::Name(shown.into()))?;
        self.budget.entry()?;
        match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            // A link or a file is there: opening it says so.
            Err(Errno::EXIST) => {}
            Err(error) => return Err(write_error(shown)(error)),
        }
        let dir = open(&self.root, path).map_err(write_error(shown))?;
        fchmod(&dir, Mode::from_raw_mode(0o755)).map_err(write_error(shown))?;
        self.own(&dir, shown)?;
        self.made.insert(path.to_owned());
        Ok(dir)
    }

    fn parent(&mut self, path: &Path, shown: &str) -> Result<OwnedFd, UnpackError> {
        if path.as_os_str().is_empty() {
            return Err(UnpackError::Name(shown.into()));
        }
        self.dir(path.parent().unwrap_or(Path::new("")), shown)
    }

    fn own(&self, file: &OwnedFd, shown: &str) -> Result<(), UnpackError> {
        match self.user {
            Some((uid, gid)) => fchown(file, Some(uid), Some(gid)).map_err(write_error(shown)),
            None => Ok(()),
        }
    }

    fn directory(&mut self, path: &Path, shown: &str, mode: u32) -> Result<(), UnpackError> {
        let mode = permissions(mode, shown)? | 0o700;
        self.dir(path, shown)?;
        self.modes.push((path.to_owned(), mode));
        Ok(())
    }

    fn file(
        &mut self,
        path: &Path,
        shown: &str,
        mode: u32,
        content: &mut dyn Read,
    ) -> Result<(), UnpackError> {
        let mode = permissions(mode, shown)?;
        self.parent(path, shown)?;
        self.budget.entry()?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let descriptor = openat2(&self.root, path, flags, Mode::from_raw_mode(0o600), BENEATH)
            .map_err(write_error(shown))?;
        let mut file = File::from(descriptor);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = content
                .read(&mut buffer)
                .map_err(|error| UnpackError::Broken {
                    format: "an archive",
                    reason: format!("`{shown}`: {}", chain(&error)),
                })?;
            if count == 0 {
                break;
            }
            self.budget.spend(count as u64)?;
            file.write_all(&buffer[..count])
                .map_err(|source| UnpackError::Write {
                    path: shown.into(),
                    source,
                })?;
        }
        let descriptor = OwnedFd::from(file);
        self.own(&descriptor, shown)?;
        fchmod(&descriptor, Mode::from_raw_mode(mode)).map_err(write_error(shown))
    }

    fn symlink(&mut self, path: &Path, shown: &str, target: &str) -> Result<(), UnpackError> {
        let leaves = || UnpackError::LinkLeaves {
            path: shown.into(),
            target: target.chars().take(200).collect(),
        };
        if target.is_empty()
            || target.starts_with('/')
            || target.contains('\0')
            || target.len() > MAX_PATH
        {
            return Err(leaves());
        }
        // By its text first; what links behind links amount to is asked of the kernel when everything is there.
        let mut depth = path.components().count() - 1;
        for part in target.split('/') {
            match part {
                "" | "." => {}
                ".." => depth = depth.checked_sub(1).ok_or_else(leaves)?,
                _ => depth += 1,
            }
        }
        let parent = self.parent(path, shown)?;
        self.budget.entry()?;
        let name = path
            .file_name()
            .ok_or_else(|| UnpackError::Name(shown.into()))?;
        symlinkat(target, &parent, name).map_err(write_error(shown))?;
        if let Some((uid, gid)) = self.user {
            rustix::fs::chownat(
                &parent,
                name,
                Some(uid),
                Some(gid),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .map_err(write_error(shown))?;
        }
        self.links.push((path.to_owned(), target.to_owned()));
        Ok(())
    }

    /// A second name for a file that the package made before.
    fn hard_link(&mut self, path: &Path, shown: &str, target: &str) -> Result<(), UnpackError> {
        let source = parts(target)?;
        let leaves = || UnpackError::LinkLeaves {
            path: shown.into(),
            target: target.into(),
        };
        let parent = self.parent(path, shown)?;
        self.budget.entry()?;
        let name = path
            .file_name()
            .ok_or_else(|| UnpackError::Name(shown.into()))?;
        let holder = openat2(
            &self.root,
            source
                .parent()
                .filter(|path| !path.as_os_str().is_empty())
                .unwrap_or(Path::new(".")),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            BENEATH,
        )
        .map_err(|_| leaves())?;
        let source_name = source.file_name().ok_or_else(leaves)?;
        let stat = statat(&holder, source_name, AtFlags::SYMLINK_NOFOLLOW).map_err(|_| leaves())?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(leaves());
        }
        linkat(&holder, source_name, &parent, name, AtFlags::empty()).map_err(write_error(shown))
    }

    fn finish(&mut self) -> Result<(), UnpackError> {
        for (path, target) in &self.links {
            let follow = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
            match openat2(
                &self.root,
                path,
                OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
                follow,
            ) {
                // A link to what is not there yet (a log, a socket) is allowed: by its text it stays beneath.
                Ok(_) | Err(Errno::NOENT) => {}
                Err(_) => {
                    return Err(UnpackError::LinkLeaves {
                        path: path.display().to_string(),
                        target: target.clone(),
                    });
                }
            }
        }
        for (path, mode) in std::mem::take(&mut self.modes).into_iter().rev() {
            let shown = path.display().to_string();
            let dir = self.dir(&path, &shown)?;
            fchmod(&dir, Mode::from_raw_mode(mode)).map_err(write_error(&shown))?;
        }
        fchmod(&self.root, Mode::from_raw_mode(0o755)).map_err(write_error("."))?;
        match self.user {
            Some((uid, gid)) => {
                fchown(self.root.as_fd(), Some(uid), Some(gid)).map_err(write_error("."))
            }
            None => Ok(()),
        }
    }
}

fn broken_tar(error: &io::Error) -> UnpackError {
    UnpackError::Broken {
        format: "a .tar.gz archive",
        reason: chain(error),
    }
}

/// Goes over a whole archive before anything is written: its sizes, and headers that would be read into memory.
fn inspect_tar(file: &File, budget: &Budget<'_>) -> Result<(), UnpackError> {
    let mut budget = Budget {
        bytes: 0,
        entries: 0,
        ..*budget
    };
    let mut archive = tar::Archive::new(MultiGzDecoder::new(BufReader::new(file)));
    for entry in archive
        .entries()
        .map_err(|error| broken_tar(&error))?
        .raw(true)
    {
        let entry = entry.map_err(|error| broken_tar(&error))?;
        budget.entry()?;
        budget.spend(entry.size())?;
        let kind = entry.header().entry_type();
        let extends = kind.is_gnu_longname()
            || kind.is_gnu_longlink()
            || kind.is_pax_global_extensions()
            || kind.is_pax_local_extensions();
        if extends && entry.size() > MAX_EXTENSION {
            return Err(UnpackError::Broken {
                format: "a .tar.gz archive",
                reason: format!(
                    "an extension header has {} bytes; the limit is {MAX_EXTENSION}",
                    entry.size()
                ),
            });
        }
    }
    Ok(())
}

fn unpack_tar(file: &File, tree: &mut Tree<'_>) -> Result<(), UnpackError> {
    let mut archive = tar::Archive::new(MultiGzDecoder::new(BufReader::new(file)));
    for entry in archive.entries().map_err(|error| broken_tar(&error))? {
        let mut entry = entry.map_err(|error| broken_tar(&error))?;
        let text = |bytes: &[u8]| {
            String::from_utf8(bytes.to_vec())
                .map_err(|_| UnpackError::Name(String::from_utf8_lossy(bytes).into_owned()))
        };
        let shown = text(&entry.path_bytes())?;
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            continue;
        }
        let path = parts(&shown)?;
        let mode = entry.header().mode().map_err(|error| broken_tar(&error))?;
        let special = |what| UnpackError::Special {
            path: shown.clone(),
            what,
        };
        let link = entry
            .link_name_bytes()
            .map(|bytes| text(&bytes))
            .transpose()?;
        match kind {
            EntryType::Directory => tree.directory(&path, &shown, mode)?,
            EntryType::Regular | EntryType::Continuous => {
                tree.file(&path, &shown, mode, &mut entry)?
            }
            EntryType::Symlink => tree.symlink(&path, &shown, &link.unwrap_or_default())?,
            EntryType::Link => tree.hard_link(&path, &shown, &link.unwrap_or_default())?,
            EntryType::Char => return Err(special("a character device")),
            EntryType::Block => return Err(special("a block device")),
            EntryType::Fifo => return Err(special("a FIFO")),
            // tar's own enum has no end; what it may add is special here.
            _ => return Err(special("of an unknown kind")),
        }
    }
    Ok(())
}

fn unpack_zip(mut file: File, tree: &mut Tree<'_>) -> Result<(), UnpackError> {
    let broken = |reason: String| UnpackError::Broken {
        format: "a .zip archive",
        reason,
    };
    let size = zip_directory_bytes(&mut file).map_err(|error| broken(chain(&error)))?;
    if size.is_none_or(|size| size > MAX_ZIP_DIRECTORY) {
        return Err(broken(format!(
            "its table of contents is missing or larger than {MAX_ZIP_DIRECTORY} bytes"
        )));
    }
    let mut archive =
        zip::ZipArchive::new(BufReader::new(file)).map_err(|error| broken(chain(&error)))?;
    let limit = tree.budget.policy.unpack_entries;
    if archive.len() as u64 > limit {
        return Err(UnpackError::TooMany { limit });
    }
    for index in 0..archive.len() {
        let mut entry = archive
            .by_index(index)
            .map_err(|error| broken(chain(&error)))?;
        let shown = entry
            .name()
            .map_err(|error| broken(chain(&error)))?
            .into_owned();
        let path = parts(&shown)?;
        // The crate's `unix_mode` leaves the set-id bits out, which are to be refused and not overlooked.
        let raw = entry.external_attributes() >> 16;
        let unix_mode = entry
            .unix_mode()
            .map(|mode| if raw == 0 { mode } else { raw });
        let kind = unix_mode.map_or(0, |mode| mode & 0o170_000);
        match kind {
            0o120_000 => {
                let mut target = Vec::new();
                (&mut entry)
                    .take(MAX_PATH as u64 + 1)
                    .read_to_end(&mut target)
                    .map_err(|error| broken(chain(&error)))?;
                let target =
                    String::from_utf8(target).map_err(|_| UnpackError::Name(shown.clone()))?;
                tree.symlink(&path, &shown, &target)?;
            }
            0o040_000 | 0o100_000 | 0 if entry.is_dir() => {
                tree.directory(&path, &shown, unix_mode.unwrap_or(0o755))?;
            }
            0o100_000 | 0 => {
                let mode =
                    unix_mode.map_or(0o644, |mode| if mode & 0o7777 == 0 { 0o644 } else { mode });
                tree.file(&path, &shown, mode, &mut entry)?;
            }
            0o020_000 => {
                return Err(UnpackError::Special {
                    path: shown,
                    what: "a character device",
                });
            }
            0o060_000 => {
                return Err(UnpackError::Special {
                    path: shown,
                    what: "a block device",
                });
            }
            0o010_000 => {
                return Err(UnpackError::Special {
                    path: shown,
                    what: "a FIFO",
                });
            }
            _ => {
                return Err(UnpackError::Special {
                    path: shown,
                    what: "of an unknown kind",
                });
            }
        }
    }
    Ok(())
}

/// The size of a zip's table of contents, from the record at the file's end.
fn zip_directory_bytes(file: &mut File) -> io::Result<Option<u32>> {
    const END: usize = 22;
    let len = file.metadata()?.len();
    let tail = len.min(END as u64 + 65_535);
    file.seek(SeekFrom::Start(len - tail))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    file.rewind()?;
    Ok((0..=bytes.len().saturating_sub(END))
        .rev()
        .find(|at| bytes[*at..].starts_with(b"PK\x05\x06"))
        .and_then(|at| bytes.get(at + 12..at + 16)?.try_into().ok())
        .map(u32::from_le_bytes))
}
