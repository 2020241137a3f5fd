//! The directory that is filled: each entry beneath it, once, never through a link.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{Read, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, Mode, OFlags, ResolveFlags, fchmod, linkat, mkdirat, openat2, statat, symlinkat,
    },
    io::Errno,
};

use super::{Budget, MAX_PATH, UnpackError};
use crate::files::chain;

/// The directory that is filled.
pub(super) struct Tree<'a> {
    pub(super) root: OwnedFd,
    pub(super) budget: Budget<'a>,
    /// Directories that exist, so that parents are made once.
    pub(super) made: BTreeSet<PathBuf>,
    /// Modes of directories, set at the end: a directory without the right to write would stop its own entries.
    pub(super) modes: Vec<(PathBuf, u32)>,
    pub(super) links: Vec<(PathBuf, String)>,
}

const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// The components of an entry's path; empty for the root itself (`./`).
pub(super) fn parts(path: &str) -> Result<PathBuf, UnpackError> {
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
        self.made.insert(path.to_owned());
        Ok(dir)
    }

    fn parent(&mut self, path: &Path, shown: &str) -> Result<OwnedFd, UnpackError> {
        if path.as_os_str().is_empty() {
            return Err(UnpackError::Name(shown.into()));
        }
        self.dir(path.parent().unwrap_or(Path::new("")), shown)
    }

    pub(super) fn directory(
        &mut self,
        path: &Path,
        shown: &str,
        mode: u32,
    ) -> Result<(), UnpackError> {
        let mode = permissions(mode, shown)? | 0o700;
        self.dir(path, shown)?;
        self.modes.push((path.to_owned(), mode));
        Ok(())
    }

    pub(super) fn file(
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
        fchmod(&descriptor, Mode::from_raw_mode(mode)).map_err(write_error(shown))
    }

    pub(super) fn symlink(
        &mut self,
        path: &Path,
        shown: &str,
        target: &str,
    ) -> Result<(), UnpackError> {
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
        self.links.push((path.to_owned(), target.to_owned()));
        Ok(())
    }

    /// A second name for a file that the package made before.
    pub(super) fn hard_link(
        &mut self,
        path: &Path,
        shown: &str,
        target: &str,
    ) -> Result<(), UnpackError> {
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

    pub(super) fn finish(&mut self) -> Result<(), UnpackError> {
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
        fchmod(&self.root, Mode::from_raw_mode(0o755)).map_err(write_error("."))
    }
}
