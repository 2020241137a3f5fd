//! Unpacks packages, which are not trusted.
//!
//! Everything happens in a fresh directory that is given its name only when all of it is good; a failure leaves nothing.
//! Entries are created beneath that directory only (`openat2` with `RESOLVE_BENEATH` and `RESOLVE_NO_SYMLINKS`), each name once,
//! never through a link. Refused, each with its own error: absolute paths, `..`, links that leave, writing through a link, devices
//! and other special files, set-user-id and set-group-id bits, more bytes, entries or growth than the policy allows.
//! Where the application's user is not the agent's own, all of it is done by a process of that user (see `child`): whatever an
//! archive does to the programs that read it, it does with no more rights than the application has anyway.
//! Source: design, "Agents", "Unpacking"; spec "Packages".

pub mod child;
mod tarball;
mod tree;
mod zipfile;

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Seek as _},
    os::unix::fs::DirBuilderExt as _,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use windlass_domain::task::{PackageFormat, PackageRef};

use tarball::{inspect_tar, unpack_tar};
use tree::{Tree, parts};
use zipfile::unpack_zip;

use crate::{
    clock,
    config::Policy,
    files::{FileError, remove_tree},
    users::User,
};

/// Growth is judged only beyond this size.
const RATIO_FREE_BYTES: u64 = 1 << 20;
/// Names and link targets longer than this are refused.
const MAX_PATH: usize = 4096;

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
    #[error(
        "the package holds `{0}` twice, and which of them is meant cannot be known: pack it again with each name once"
    )]
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
    mut file: File,
    package: &PackageRef,
    fresh: &Path,
    policy: &Policy,
    cancelled: &AtomicBool,
) -> Result<(), UnpackError> {
    let root = File::open(fresh).map_err(write_failed(fresh))?;
    let packed = file.metadata().map_err(write_failed(fresh))?.len();
    let mut tree = Tree {
        root: root.into(),
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
            file.rewind().map_err(write_failed(fresh))?;
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
    rustix::fs::syncfs(&tree.root).map_err(|error| write_failed(fresh)(error.into()))
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
