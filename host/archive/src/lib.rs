//! Reads and judges archives: packages that users upload, and archives of static files.
//!
//! One code path has two callers. The server examines every upload with it (the entries go to [`Discard`]); the agent unpacks
//! with it (the entries go to its own [`Sink`], which creates files). Both therefore accept and refuse exactly the same
//! archives, for the same reasons.
//!
//! ```text
//! bytes ─► decode (gz, xz, zst, bz2) ─► tar ─┐
//!                                             ├─► judge (names, links, duplicates, limits) ─► Sink
//! file ─► zip (found from its end) ───────────┘
//! ```
//! | module | owns |
//! | --- | --- |
//! | `content` | which format a file has, by its content and its name |
//! | `decode` | decompression: members, checksums, trailing bytes, memory limits |
//! | `tar`, `tar::header`, `tar::pax`, `tar::sparse` | tar archives with every header that changes name, size or content |
//! | `zip`, `zip::directory` | zip archives |
//! | `path` | names of entries |
//! | `judge` | which entries an archive may have, together |
//! | `refusal` | the reasons for refusing an archive |
//!
//! This crate opens no file, creates none and follows no path. It has no recursion; memory is bounded by [`Limits`] and by the
//! constants of the formats, whatever the archive declares. Dictionaries of xz and zstd are limited to
//! [`MAX_DICTIONARY_BYTES`].

mod content;
mod decode;
mod judge;
mod path;
mod refusal;
mod tar;
mod zip;

pub use content::{
    Content, Course, HEAD_BYTES, Kind, Mismatch, NameClaim, archive_format, claim, course, head_of,
    recognise,
};
pub use decode::MAX_DICTIONARY_BYTES;
pub use judge::{Discard, FileContent, Piece, Sink, Summary};
pub use path::{EntryPath, MAX_DEPTH, MAX_NAME_BYTES, MAX_PATH_BYTES};
pub use refusal::{ReadError, Reason, Refusal};
pub use zip::check_zip_directory;

use std::{
    convert::Infallible,
    fs::File,
    io::{BufRead, BufReader, Read, Seek},
};

use windlass_domain::task::PackageFormat;

use judge::Judge;

/// Limits of an archive. The defaults are those of an agent's policy, so that an upload is judged as agents judge it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most that an archive may unpack to, in bytes.
    pub bytes: u64,
    /// The most files, directories and links that an archive may contain.
    pub entries: u64,
    /// How many times its own size an archive may unpack to. Holes of sparse files do not count.
    pub ratio: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 4 << 30,
            entries: 200_000,
            ratio: 200,
        }
    }
}

/// How a tar archive is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not compressed.
    None,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
    /// bzip2.
    Bzip2,
}

impl Compression {
    /// The package format of a tar archive that is compressed in this way.
    #[must_use]
    pub const fn tar_format(self) -> PackageFormat {
        match self {
            Self::None => PackageFormat::Tar,
            Self::Gzip => PackageFormat::TarGz,
            Self::Xz => PackageFormat::TarXz,
            Self::Zstd => PackageFormat::TarZst,
            Self::Bzip2 => PackageFormat::TarBz2,
        }
    }

    /// The compression of a package format that is a tar archive.
    #[must_use]
    pub const fn of_format(format: PackageFormat) -> Option<Self> {
        match format {
            PackageFormat::Tar => Some(Self::None),
            PackageFormat::TarGz => Some(Self::Gzip),
            PackageFormat::TarXz => Some(Self::Xz),
            PackageFormat::TarZst => Some(Self::Zstd),
            PackageFormat::TarBz2 => Some(Self::Bzip2),
            PackageFormat::Zip | PackageFormat::Jar | PackageFormat::Plain => None,
        }
    }

    /// The name of the format, with its article, for messages.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::None => "a tar archive",
            Self::Gzip => "a gzip-compressed tar archive",
            Self::Xz => "an xz-compressed tar archive",
            Self::Zstd => "a zstd-compressed tar archive",
            Self::Bzip2 => "a bzip2-compressed tar archive",
        }
    }
}

/// Reads a tar archive from beginning to end. `packed_bytes` is the size of `source`, or an upper bound while it is not known:
/// growth is judged by it on the way, and by the bytes that were really read at the end.
///
/// # Errors
/// [`ReadError::Refused`] with the entry or the byte; [`ReadError::Source`] when `source` cannot be read;
/// [`ReadError::Sink`] as the sink returns it.
pub fn read_tar<S: Sink>(
    source: impl BufRead,
    compression: Compression,
    packed_bytes: u64,
    limits: Limits,
    sink: &mut S,
) -> Result<Summary, ReadError<S::Error>> {
    let judge = Judge::new(sink, limits, packed_bytes);
    tar::read(source, compression, judge)
}

/// Reads a zip archive, which is found from its end: bytes before it, such as a start script, are skipped.
///
/// # Errors
/// Those of [`read_tar`].
pub fn read_zip<S: Sink>(
    source: impl Read + Seek,
    limits: Limits,
    sink: &mut S,
) -> Result<Summary, ReadError<S::Error>> {
    zip::read(source, limits, sink)
}

/// What examining a compressed stream has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Examined {
    /// A tar archive that agents accept.
    Tar(Summary),
    /// The stream decompresses to something else. It was not read to its end.
    NotTar,
}

/// Examines a stream that is a tar archive, or compressed and perhaps a tar archive inside, while it arrives.
///
/// # Errors
/// [`ReadError::Refused`] and [`ReadError::Source`].
pub fn examine_stream(
    source: impl BufRead,
    compression: Compression,
    packed_bytes: u64,
    limits: Limits,
) -> Result<Examined, ReadError<Infallible>> {
    let mut sink = Discard;
    let judge = Judge::new(&mut sink, limits, packed_bytes);
    tar::read_if_tar(source, compression, judge)
}

/// Why an upload is refused, or could not be examined.
#[derive(Debug, thiserror::Error)]
pub enum ExamineError {
    /// Content, name and declaration contradict each other, or the format is not supported.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The content is none of what it could be.
    #[error("the content decompresses, but is not {0}")]
    NotTar(&'static str),
    /// The archive is refused.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The file could not be read.
    #[error("the file could not be read")]
    Source(#[source] std::io::Error),
}

impl From<ReadError<Infallible>> for ExamineError {
    fn from(error: ReadError<Infallible>) -> Self {
        match error {
            ReadError::Refused(refusal) => Self::Refused(refusal),
            ReadError::Source(error) => Self::Source(error),
            ReadError::Sink(never) => match never {},
        }
    }
}

/// Examines a stream that [`course`] has found to be one. Returns its format.
///
/// # Errors
/// [`ExamineError`].
pub fn examine_course(
    source: impl BufRead,
    compression: Compression,
    otherwise: Option<PackageFormat>,
    packed_bytes: u64,
    limits: Limits,
) -> Result<PackageFormat, ExamineError> {
    match examine_stream(source, compression, packed_bytes, limits)? {
        Examined::Tar(_) => Ok(compression.tar_format()),
        Examined::NotTar => otherwise.ok_or(ExamineError::NotTar(compression.describe())),
    }
}

/// Examines a complete file as an upload with this name and declaration. Returns its format.
///
/// # Errors
/// [`ExamineError`].
pub fn examine_file(
    file: &mut File,
    file_name: &str,
    kind: Option<Kind>,
    limits: Limits,
) -> Result<PackageFormat, ExamineError> {
    let head = head_of(file).map_err(ExamineError::Source)?;
    match course(&head, file_name, kind)? {
        Course::Stream {
            compression,
            otherwise,
        } => {
            let packed = file.metadata().map_err(ExamineError::Source)?.len();
            let source = BufReader::with_capacity(64 << 10, file);
            examine_course(source, compression, otherwise, packed, limits)
        }
        Course::Zip => {
            read_zip(file, limits, &mut Discard)?;
            Ok(PackageFormat::Zip)
        }
        Course::Jar => {
            check_zip_directory(file)?;
            Ok(PackageFormat::Jar)
        }
        Course::Plain => Ok(PackageFormat::Plain),
    }
}
