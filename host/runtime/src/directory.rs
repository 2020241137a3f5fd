//! The plugin directory: which files are there, and their bytes once they have settled.
//!
//! Only `*.wasm` counts, and no name that starts with a dot, so that a file can be written beside and renamed. A symbolic link
//! is followed when it stays inside the directory. Files are regular files, read whole, at most the limit. Beside a file can
//! stand its signature, `<file>.sig`.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Read,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use windlass_domain::digest::Digest;

use crate::error::{Rejection, RejectionCode};

/// What tells one state of a file from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    file: FileStamp,
    /// Of its signature, where there is one: a signature that comes later is a change of the file.
    signature: Option<FileStamp>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileStamp {
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    inode: u64,
}

/// A settled file, read.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) digest: Digest,
    pub(crate) bytes: Vec<u8>,
    /// Bytes of its `.sig` file.
    pub(crate) signature: Option<Vec<u8>>,
}

/// What is appended to a file's name for its signature's.
pub(crate) const SIGNATURE_SUFFIX: &str = ".sig";
/// More than any signature has, as text too: what is beyond is not read.
const MAX_SIGNATURE_BYTES: u64 = 1024;

/// The candidates of the directory: file name and stamp, or why the file cannot even be looked at.
pub(crate) fn scan(dir: &Path) -> io::Result<BTreeMap<String, Result<Stamp, Rejection>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // A name that is not UTF-8 cannot be shown or asked for.
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && name.ends_with(".wasm") {
            let stamp = resolve(dir, &name).and_then(|path| {
                Ok(Stamp {
                    file: stamp(&path)?,
                    signature: stamp(&signature_of(dir, &name)).ok(),
                })
            });
            found.insert(name, stamp);
        }
    }
    Ok(found)
}

/// The real path of a file, which must lie in the directory.
fn resolve(dir: &Path, name: &str) -> Result<PathBuf, Rejection> {
    let dir = fs::canonicalize(dir).map_err(|error| unreadable(&error))?;
    let path = fs::canonicalize(dir.join(name)).map_err(|error| unreadable(&error))?;
    if path.starts_with(&dir) {
        Ok(path)
    } else {
        Err(Rejection::new(
            RejectionCode::SymlinkOutside,
            "a symbolic link that leaves the plugin directory: copy the file instead",
        ))
    }
}

fn signature_of(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}{SIGNATURE_SUFFIX}"))
}

fn stamp(path: &Path) -> Result<FileStamp, Rejection> {
    let metadata = fs::symlink_metadata(path).map_err(|error| unreadable(&error))?;
    stamp_of(&metadata)
}

fn stamp_of(metadata: &fs::Metadata) -> Result<FileStamp, Rejection> {
    if !metadata.is_file() {
        return Err(Rejection::new(
            RejectionCode::NotAFile,
            "not a regular file",
        ));
    }
    Ok(FileStamp {
        size: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
        inode: metadata.ino(),
    })
}

fn unreadable(error: &io::Error) -> Rejection {
    Rejection::new(
        RejectionCode::Unreadable,
        format!("the file cannot be read: {error}"),
    )
}

/// A settled file with its signature.
pub(crate) fn read(dir: &Path, name: &str, limit_bytes: u64) -> Result<Contents, Rejection> {
    let (digest, bytes) = read_resolved(&resolve(dir, name)?, limit_bytes)?;
    let signature = match open(&signature_of(dir, name)) {
        Ok(file) => {
            let mut signature = Vec::new();
            file.take(MAX_SIGNATURE_BYTES)
                .read_to_end(&mut signature)
                .map_err(|error| unreadable(&error))?;
            Some(signature)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            return Err(Rejection::new(
                RejectionCode::Unreadable,
                format!("its signature cannot be read: {error}"),
            ));
        }
    };
    Ok(Contents {
        digest,
        bytes,
        signature,
    })
}

/// The bytes of any file with their digest.
pub(crate) fn read_file(path: &Path, limit_bytes: u64) -> Result<(Digest, Vec<u8>), Rejection> {
    let path = fs::canonicalize(path).map_err(|error| unreadable(&error))?;
    read_resolved(&path, limit_bytes)
}

/// Not a link that took the file's place since, and no wait for the other end of a pipe.
fn open(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(
            rustix::fs::OFlags::NOFOLLOW
                .union(rustix::fs::OFlags::NONBLOCK)
                .bits()
                .cast_signed(),
        )
        .open(path)
}

fn read_resolved(path: &Path, limit_bytes: u64) -> Result<(Digest, Vec<u8>), Rejection> {
    let too_large = |size: u64| {
        Rejection::new(
            RejectionCode::TooLarge,
            format!("the file has {size} bytes, the limit is {limit_bytes}"),
        )
    };
    let file = open(path).map_err(|error| unreadable(&error))?;
    let stamp = stamp_of(&file.metadata().map_err(|error| unreadable(&error))?)?;
    if stamp.size > limit_bytes {
        return Err(too_large(stamp.size));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(stamp.size).unwrap_or(0));
    file.take(limit_bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(&error))?;
    if bytes.len() as u64 > limit_bytes {
        return Err(too_large(bytes.len() as u64));
    }
    let digest = Digest::of(&bytes);
    Ok((digest, bytes))
}
