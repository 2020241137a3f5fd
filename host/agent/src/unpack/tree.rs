//! The directory that is filled: every entry is created beneath its handle, once, and never through a link.
//!
//! The archive's reader has already refused whatever could lead out. The kernel is asked for the same again, with
//! `RESOLVE_BENEATH` and `RESOLVE_NO_SYMLINKS`: another process of the directory's owner may change it meanwhile.

use std::{
    fs::File,
    io::{self, Read, Seek as _, SeekFrom, Write as _},
    os::fd::OwnedFd,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags, fchmod, linkat, mkdirat, openat2, symlinkat},
    io::Errno,
};
use windlass_archive::{EntryPath, FileContent, Piece, ReadError, Sink};

use super::UnpackError;

const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// The directory that is filled.
pub(super) struct Tree<'a> {
    root: OwnedFd,
    cancelled: &'a AtomicBool,
}

fn write_error(path: &EntryPath) -> impl Fn(Errno) -> UnpackError + '_ {
    move |error| UnpackError::Write {
        path: path.to_string(),
        source: error.into(),
    }
}

impl<'a> Tree<'a> {
    pub(super) const fn new(root: OwnedFd, cancelled: &'a AtomicBool) -> Self {
        Self { root, cancelled }
    }

    pub(super) const fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// Opens the directory that contains an entry.
    fn parent(&self, path: &EntryPath) -> Result<OwnedFd, UnpackError> {
        let (parent, _) = path.split();
        self.open_directory(parent).map_err(write_error(path))
    }

    fn open_directory(&self, path: &str) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { "." } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat2(&self.root, path, flags, Mode::empty(), BENEATH)
    }

    fn create(&self, path: &EntryPath) -> Result<File, UnpackError> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        openat2(&self.root, path.as_str(), flags, mode, BENEATH)
            .map(File::from)
            .map_err(write_error(path))
    }

    /// Creates a package that stays one file.
    pub(super) fn whole_file(
        &mut self,
        name: &str,
        mode: u32,
        content: &mut impl Read,
    ) -> Result<(), UnpackError> {
        let path = EntryPath::parse(name).ok().filter(|path| !path.is_root());
        let path = path.ok_or_else(|| UnpackError::FileName(name.to_owned()))?;
        let mut file = self.create(&path)?;
        io::copy(content, &mut file).map_err(|source| {
            if self.cancelled.load(Ordering::Relaxed) {
                return UnpackError::Cancelled;
            }
            UnpackError::Write {
                path: path.to_string(),
                source,
            }
        })?;
        fchmod(&file, Mode::from_raw_mode(mode)).map_err(write_error(&path))
    }

    /// Opens the directory for others.
    pub(super) fn finish(&self) -> Result<(), UnpackError> {
        fchmod(&self.root, Mode::from_raw_mode(0o755)).map_err(|error| UnpackError::Write {
            path: ".".to_owned(),
            source: error.into(),
        })
    }
}

impl Sink for Tree<'_> {
    type Error = UnpackError;

    fn directory(&mut self, path: &EntryPath) -> Result<(), UnpackError> {
        let parent = self.parent(path)?;
        let (_, name) = path.split();
        let mode = Mode::from_raw_mode(0o755);
        mkdirat(&parent, name, mode).map_err(write_error(path))?;
        // The agent's own mask may have taken bits away.
        self.open_directory(path.as_str())
            .and_then(|directory| fchmod(&directory, mode))
            .map_err(write_error(path))
    }

    fn file(
        &mut self,
        path: &EntryPath,
        mode: u32,
        content: &mut FileContent<'_>,
    ) -> Result<(), ReadError<UnpackError>> {
        let failed = |source| {
            ReadError::Sink(UnpackError::Write {
                path: path.to_string(),
                source,
            })
        };
        let mut file = self.create(path).map_err(ReadError::Sink)?;
        let (mut length, mut ends_in_hole) = (0_u64, false);
        while let Some(piece) = content.next()? {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(ReadError::Sink(UnpackError::Cancelled));
            }
            match piece {
                Piece::Data(data) => {
                    file.write_all(data).map_err(failed)?;
                    length += data.len() as u64;
                    ends_in_hole = false;
                }
                // Limited by the reader, far below what an offset can be.
                Piece::Hole(bytes) => {
                    length = length.saturating_add(bytes);
                    file.seek(SeekFrom::Start(length)).map_err(failed)?;
                    ends_in_hole = true;
                }
            }
        }
        if ends_in_hole {
            file.set_len(length).map_err(failed)?;
        }
        fchmod(&file, Mode::from_raw_mode(mode))
            .map_err(|error| ReadError::Sink(write_error(path)(error)))
    }

    fn symlink(&mut self, path: &EntryPath, target: &str) -> Result<(), UnpackError> {
        let parent = self.parent(path)?;
        let (_, name) = path.split();
        symlinkat(target, &parent, name).map_err(write_error(path))
    }

    fn hard_link(&mut self, path: &EntryPath, target: &EntryPath) -> Result<(), UnpackError> {
        let parent = self.parent(path)?;
        let holder = self.parent(target)?;
        let ((_, name), (_, target_name)) = (path.split(), target.split());
        linkat(&holder, target_name, &parent, name, AtFlags::empty()).map_err(write_error(path))
    }

    fn directory_mode(&mut self, path: &EntryPath, mode: u32) -> Result<(), UnpackError> {
        // Its owner has to be able to remove what is in it.
        let mode = Mode::from_raw_mode(mode | 0o700);
        self.open_directory(path.as_str())
            .and_then(|directory| fchmod(&directory, mode))
            .map_err(write_error(path))
    }
}
