//! Unpacks packages, which are not trusted.
//!
//! [`windlass_archive`] reads them and decides what is accepted, exactly as it did when they were uploaded. This module decides
//! where and as which user the files are created: in a new directory that is renamed to its final name only when everything in
//! it is complete. A failure leaves nothing. Entries are created beneath an open handle of that directory only (see `tree`).
//! Where the application's user is not the agent's own, a process of that user does all of it (see `child`): whatever an
//! archive does to the programs that read it, it does with no more rights than the application has anyway.
//! Source: design, "Agents", "Unpacking"; spec "Packages".

pub mod child;
mod tree;

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    os::unix::fs::DirBuilderExt as _,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use windlass_archive::{Compression, Limits, ReadError, Reason, Refusal};
use windlass_domain::task::{PackageFormat, PackageRef};

use tree::Tree;

use crate::{clock, config::Policy, files::FileError, tree::remove_tree, users::User};

/// Why a package is not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The archive is refused.
    #[error("the package cannot be unpacked: {refusal}{}", setting(&refusal.reason))]
    Refused {
        /// Where and why.
        refusal: Box<Refusal>,
    },
    /// The package's file cannot be read.
    #[error("the package's file cannot be read")]
    Read(#[source] io::Error),
    /// The package's own name is none that a file can have.
    #[error("`{0}` cannot be the name of a file; upload the package with another `file_name`")]
    FileName(String),
    /// The release directory's side.
    #[error("`{path}` cannot be unpacked")]
    Write {
        /// The entry.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What the process that unpacks as the application's user says.
    #[error("{0}")]
    Child(String),
    /// That process ended without a word.
    #[error("the process that unpacks as `{user}` ended early ({status})")]
    ChildDied {
        /// The user.
        user: String,
        /// How it ended.
        status: std::process::ExitStatus,
    },
    /// That process could not be started.
    #[error("no process of the user `{user}` can be started to unpack")]
    ChildStart {
        /// The user.
        user: String,
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

/// Unpacks the package at `source` into `target`, which must not exist; as `user`, where one is given: only root can do that.
/// Blocks.
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
    let unpacked = unpack_into(source, package, &fresh, user, policy, cancelled)
        .and_then(|()| std::fs::rename(&fresh, target).map_err(write_failed(target)));
    if unpacked.is_err() {
        remove_tree(&fresh)?;
    }
    unpacked
}

fn write_failed(path: &Path) -> impl FnOnce(io::Error) -> UnpackError {
    let path = path.display().to_string();
    move |source| UnpackError::Write { path, source }
}

fn unpack_into(
    source: &Path,
    package: &PackageRef,
    fresh: &Path,
    user: Option<&User>,
    policy: &Policy,
    cancelled: &AtomicBool,
) -> Result<(), UnpackError> {
    // For the one who fills it alone until all of it is good; the end opens it.
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(fresh)
        .map_err(write_failed(fresh))?;
    let file = File::open(source).map_err(write_failed(source))?;
    match user {
        Some(user) => child::unpack_as(user, file, package, fresh, policy, cancelled),
        None => fill(file, package, fresh, policy, cancelled),
    }
}

/// Fills an empty directory of one's own with what a package holds.
fn fill(
    file: File,
    package: &PackageRef,
    fresh: &Path,
    policy: &Policy,
    cancelled: &AtomicBool,
) -> Result<(), UnpackError> {
    let root = File::open(fresh).map_err(write_failed(fresh))?;
    let packed = file.metadata().map_err(UnpackError::Read)?.len();
    let limits = Limits {
        bytes: policy.unpack_bytes,
        entries: policy.unpack_entries,
        ratio: policy.unpack_ratio,
    };
    let mut tree = Tree::new(root.into(), cancelled);
    let mut source = Stoppable { file, cancelled };
    let read = match package.format {
        PackageFormat::Zip => windlass_archive::read_zip(source, limits, &mut tree),
        PackageFormat::Jar | PackageFormat::Plain => {
            let mode = if package.format == PackageFormat::Plain {
                0o755
            } else {
                0o644
            };
            tree.whole_file(&package.file_name, mode, &mut source)?;
            return finish(&tree, fresh);
        }
        PackageFormat::Tar
        | PackageFormat::TarGz
        | PackageFormat::TarXz
        | PackageFormat::TarZst
        | PackageFormat::TarBz2 => {
            let compression = Compression::of_format(package.format).unwrap_or(Compression::None);
            let source = BufReader::with_capacity(64 << 10, source);
            windlass_archive::read_tar(source, compression, packed, limits, &mut tree)
        }
    };
    read.map_err(|error| match error {
        _ if cancelled.load(Ordering::Relaxed) => UnpackError::Cancelled,
        ReadError::Refused(refusal) => UnpackError::Refused { refusal },
        ReadError::Source(error) => UnpackError::Read(error),
        ReadError::Sink(error) => error,
    })?;
    finish(&tree, fresh)
}

fn finish(tree: &Tree<'_>, fresh: &Path) -> Result<(), UnpackError> {
    tree.finish()?;
    rustix::fs::syncfs(tree.root()).map_err(|error| write_failed(fresh)(error.into()))
}

/// The agent's setting behind a limit, for a message.
fn setting(reason: &Reason) -> &'static str {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "only limits have a setting; another reason has none"
    )]
    match reason {
        Reason::TooLarge { .. } => " (`policy.unpack_bytes` of this agent)",
        Reason::TooMany { .. } => " (`policy.unpack_entries` of this agent)",
        Reason::Bomb { .. } => " (`policy.unpack_ratio` of this agent)",
        _ => "",
    }
}

/// A package's file, which can no longer be read when the task has ended.
struct Stoppable<'a> {
    file: File,
    cancelled: &'a AtomicBool,
}

impl Read for Stoppable<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::other("the task has ended"));
        }
        self.file.read(buffer)
    }
}

impl Seek for Stoppable<'_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.file.seek(position)
    }
}
