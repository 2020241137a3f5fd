//! Why an archive is refused, for the person who has to pack it again.

use std::{fmt, io};

use crate::path::{MAX_DEPTH, MAX_NAME_BYTES, MAX_PATH_BYTES};

/// The most characters of a name that a message repeats.
const SHOWN_CHARS: usize = 200;

/// A name from an archive for a message: shortened, and without control characters.
pub(crate) fn shown(name: &str) -> String {
    let mut text: String = name.chars().take(SHOWN_CHARS).collect::<String>();
    if text.chars().any(|char| char.is_control()) {
        text = text.escape_debug().to_string();
    }
    if name.chars().nth(SHOWN_CHARS).is_some() {
        text.push('…');
    }
    text
}

/// The same for a name that may not be text.
pub(crate) fn shown_bytes(name: &[u8]) -> String {
    shown(&String::from_utf8_lossy(
        &name[..name.len().min(4 * SHOWN_CHARS + 4)],
    ))
}

/// A refused archive: where, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The entry at fault, shortened and escaped. Empty when the fault is not one entry's.
    pub entry: Option<String>,
    /// The byte of the archive (of the uncompressed archive for tar) at which the fault was found.
    pub offset: Option<u64>,
    /// Why.
    pub reason: Reason,
}

impl Refusal {
    pub(crate) fn of_entry(name: &str, reason: Reason) -> Self {
        Self {
            entry: Some(shown(name)),
            offset: None,
            reason,
        }
    }

    pub(crate) fn at(offset: u64, reason: Reason) -> Self {
        Self {
            entry: None,
            offset: Some(offset),
            reason,
        }
    }

    pub(crate) fn whole(reason: Reason) -> Self {
        Self {
            entry: None,
            offset: None,
            reason,
        }
    }

    /// Adds the entry, unless it is known.
    #[must_use]
    pub(crate) fn in_entry(mut self, name: &str) -> Self {
        self.entry.get_or_insert_with(|| shown(name));
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.entry, self.offset) {
            (Some(entry), Some(offset)) => write!(f, "entry `{entry}` at byte {offset}: ")?,
            (Some(entry), None) => write!(f, "entry `{entry}`: ")?,
            (None, Some(offset)) => write!(f, "at byte {offset}: ")?,
            (None, None) => {}
        }
        self.reason.fmt(f)
    }
}

impl std::error::Error for Refusal {}

/// Why an archive is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// A path that starts with `/`, or with a drive letter in a zip.
    #[error("the path is absolute; pack the files with relative paths")]
    Absolute,
    /// A path with `..`.
    #[error("the path contains `..`; entries must stay inside the archive's own directory")]
    Traversal,
    /// No usable name.
    #[error("the name is empty or contains a NUL byte; rename the file and pack it again")]
    Name,
    /// A name in an unknown encoding.
    #[error(
        "the name is not UTF-8, and the archive does not declare another encoding; rename the file, or pack it with UTF-8 names"
    )]
    NotUtf8,
    /// A path that is too long.
    #[error("the path has {0} bytes; the limit is {MAX_PATH_BYTES}")]
    PathLength(usize),
    /// A component of a path that is too long.
    #[error("a file or directory name in the path has {0} bytes; the limit is {MAX_NAME_BYTES}")]
    NameLength(usize),
    /// Too deep.
    #[error("the path is {0} directories deep; the limit is {MAX_DEPTH}")]
    Depth(usize),
    /// All names together are too long.
    #[error("the names in the archive have more than {limit} bytes in total; pack fewer files")]
    Names {
        /// The limit.
        limit: u64,
    },
    /// The same name again.
    #[error(
        "the archive contains this path more than once, so its content is ambiguous; pack it again with each path once"
    )]
    Duplicate,
    /// A directory and something else of the same name.
    #[error("the archive contains this path both as a directory and as {0}; keep only one of them")]
    DirectoryAndOther(&'static str),
    /// An entry below something that is no directory.
    #[error("`{parent}` is {kind} in the archive, so nothing can be below it")]
    BelowOther {
        /// The path above.
        parent: String,
        /// What it is.
        kind: &'static str,
    },
    /// A link out of the archive's directory.
    #[error("the link points to `{target}`, which is outside the archive's own directory")]
    LinkLeaves {
        /// Its target.
        target: String,
    },
    /// A link without a usable target.
    #[error(
        "the link's target is empty, contains a NUL byte or has more than {MAX_PATH_BYTES} bytes"
    )]
    LinkTarget,
    /// Links that lead to each other, or through a file.
    #[error("the link to `{target}` cannot be resolved: {why}")]
    LinkBroken {
        /// Its target.
        target: String,
        /// Why.
        why: &'static str,
    },
    /// Links that take too long to resolve.
    #[error("resolving the archive's links takes more than {limit} steps; simplify them")]
    LinkSteps {
        /// The limit.
        limit: u64,
    },
    /// A hard link to nothing.
    #[error("the hard link's target `{target}` is not in the archive")]
    HardLinkMissing {
        /// Its target.
        target: String,
    },
    /// A hard link to a directory.
    #[error("the hard link's target `{target}` is a directory; only files and links can be linked")]
    HardLinkDirectory {
        /// Its target.
        target: String,
    },
    /// Hard links that name each other.
    #[error("the hard link to `{target}` leads back to itself")]
    HardLinkCycle {
        /// Its target.
        target: String,
    },
    /// A device, FIFO or socket.
    #[error("it is {0}; only files, directories and links can be unpacked")]
    Special(&'static str),
    /// An entry of a type that the format does not define, or that has no meaning here.
    #[error(
        "its type is {0}, which is not supported; only files, directories and links can be unpacked"
    )]
    EntryType(String),
    /// Bits that give rights.
    #[error(
        "the file has the set-user-id or set-group-id bit (mode {0:o}); remove it before packing"
    )]
    SetId(u32),
    /// Data where there can be none.
    #[error("it is {kind}, but has {size} bytes of content")]
    UnexpectedContent {
        /// What it is.
        kind: &'static str,
        /// The size that it declares.
        size: u64,
    },
    /// Too large.
    #[error("the archive unpacks to more than {limit} bytes, the limit; pack less")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// Too many entries.
    #[error(
        "the archive contains more than {limit} files, directories and links, the limit; pack fewer"
    )]
    TooMany {
        /// The limit.
        limit: u64,
    },
    /// A decompression bomb.
    #[error(
        "the archive has {packed} bytes and unpacks to more than {limit} times its size, the limit, like a decompression bomb"
    )]
    Bomb {
        /// Its size.
        packed: u64,
        /// The limit.
        limit: u64,
    },
    /// The end is missing.
    #[error("{format} ends in the middle; upload the whole file")]
    Truncated {
        /// The format, with its article.
        format: &'static str,
    },
    /// Something behind the end.
    #[error("{format} ends here, but more data follows; remove it")]
    Trailing {
        /// The format, with its article.
        format: &'static str,
    },
    /// A header or stream that cannot be read.
    #[error("{format} cannot be read: {why}")]
    Broken {
        /// The format, with its article.
        format: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Something that the format allows, but that is not supported.
    #[error("{what} is not supported; {remedy}")]
    Unsupported {
        /// What.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
}

/// Why reading an archive ended without success.
#[derive(Debug, thiserror::Error)]
pub enum ReadError<E> {
    /// The archive is refused.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The archive's bytes could not be read.
    #[error("the archive's bytes could not be read")]
    Source(#[source] io::Error),
    /// The receiver of the entries failed.
    #[error("{0}")]
    Sink(E),
}

/// Why content of an entry cannot be read on. Becomes a [`ReadError`] of any sink.
#[derive(Debug)]
pub(crate) enum Stop {
    Refused(Box<Refusal>),
    Source(io::Error),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

impl<E> From<Refusal> for ReadError<E> {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

impl<E> From<Stop> for ReadError<E> {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Refused(refusal) => Self::Refused(refusal),
            Stop::Source(error) => Self::Source(error),
        }
    }
}
