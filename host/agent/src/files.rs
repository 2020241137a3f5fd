//! Files that must survive a power failure, and the error of a file operation.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

/// A file operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {}", path.display())]
pub struct FileError {
    /// What was tried, as a verb.
    pub operation: &'static str,
    /// On which path.
    pub path: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// Names the operation and the path of an error.
pub(crate) trait Context<T> {
    fn during(self, operation: &'static str, path: &Path) -> Result<T, FileError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn during(self, operation: &'static str, path: &Path) -> Result<T, FileError> {
        self.map_err(|error| FileError {
            operation,
            path: path.to_owned(),
            source: error.into(),
        })
    }
}

/// Syncs a directory, so that names in it survive a power failure.
///
/// # Errors
/// When it cannot be opened or synced.
pub fn sync_dir(dir: &Path) -> Result<(), FileError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .during("sync", dir)
}

/// Writes a file whole or not at all: to a temporary name beside it, synced, renamed, and the directory synced.
///
/// # Errors
/// When any of that fails; the file is then as it was.
pub fn write_durable(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    write_renamed(path, bytes, mode, true)
}

/// Like [`write_durable`] without the syncs: readers see the old or the new content, a power failure may lose it.
///
/// # Errors
/// When any of that fails; the file is then as it was.
pub fn write_replaced(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    write_renamed(path, bytes, mode, false)
}

fn write_renamed(path: &Path, bytes: &[u8], mode: u32, durable: bool) -> Result<(), FileError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)
            .during("create", &temporary)?;
        file.set_permissions(fs::Permissions::from_mode(mode))
            .during("set the mode of", &temporary)?;
        file.write_all(bytes).during("write", &temporary)?;
        if durable {
            file.sync_all().during("sync", &temporary)?;
        }
        fs::rename(&temporary, path).during("replace", path)
    };
    if let Err(error) = write() {
        if let Err(left) = remove_file(&temporary) {
            tracing::debug!(error = %left, "a temporary file is left");
        }
        return Err(error);
    }
    match path.parent() {
        Some(dir) if durable => sync_dir(dir),
        Some(_) | None => Ok(()),
    }
}

/// [`write_durable`] of a value as JSON.
///
/// # Errors
/// As there.
pub fn write_json<T: Serialize>(path: &Path, value: &T, mode: u32) -> Result<(), FileError> {
    let bytes = serde_json::to_vec_pretty(value)
        .map_err(io::Error::from)
        .during("write", path)?;
    write_durable(path, &bytes, mode)
}

/// Reads a JSON file; `None` when it does not exist.
///
/// # Errors
/// When it cannot be read or is not the JSON of a `T`.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, FileError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(io::Error::from)
            .during("understand", path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).during("read", path),
    }
}

/// Removes a file; one that does not exist is removed already.
///
/// # Errors
/// When it exists and cannot be removed.
pub fn remove_file(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).during("remove", path),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Makes a directory, and those above it, with this mode whatever the umask says. One that exists is left as it is.
///
/// # Errors
/// When it cannot be made.
pub fn make_dir(path: &Path, mode: u32) -> Result<(), FileError> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent()
        && !parent.as_os_str().is_empty()
        && !parent.is_dir()
    {
        make_dir(parent, mode)?;
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).during("make the directory", path)
        }
        Ok(()) | Err(_) => fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .during("set the mode of", path),
    }
}

/// An error and everything that caused it, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
