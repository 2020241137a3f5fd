//! The end of a zip archive and its directory.
//!
//! ```text
//! [anything] local headers and data … directory [zip64 end] [zip64 locator] end [comment]
//!            └ base: what offsets count from, found by comparing where the directory is with where it is stated to be
//! ```

use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};

use crate::refusal::{Reason, Refusal, Stop};

/// A directory beyond this is refused.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
const END_BYTES: u64 = 22;
const LOCATOR_BYTES: u64 = 20;
const END64_BYTES: u64 = 56;
const MAX_COMMENT_BYTES: u64 = u16::MAX as u64;
pub(super) const HEADER_BYTES: usize = 46;
pub(super) const FORMAT: &str = "the zip archive";

pub(super) fn broken(why: impl Into<String>) -> Reason {
    Reason::Broken {
        format: FORMAT,
        why: why.into(),
    }
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u16::from_le_bytes)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

/// Where the directory is, and what offsets count from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Directory {
    /// The archive's first byte in the file.
    pub(super) base: u64,
    /// The directory's first byte in the file.
    pub(super) start: u64,
    pub(super) size: u64,
    pub(super) entries: u64,
}

pub(super) fn source_error(error: io::Error) -> Stop {
    Stop::Source(error)
}

/// Reads exactly so many bytes at a position, or says that the archive is not complete.
pub(super) fn read_at<R: Read + Seek>(
    source: &mut R,
    at: u64,
    buffer: &mut [u8],
) -> Result<(), Stop> {
    source.seek(SeekFrom::Start(at)).map_err(source_error)?;
    match source.read_exact(buffer) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(Refusal::at(at, Reason::Truncated { format: FORMAT }).into())
        }
        Err(error) => Err(source_error(error)),
    }
}

impl Directory {
    /// Finds the directory from the file's end.
    pub(super) fn find<R: Read + Seek>(source: &mut R) -> Result<Self, Stop> {
        let len = source.seek(SeekFrom::End(0)).map_err(source_error)?;
        let tail = len.min(END_BYTES + MAX_COMMENT_BYTES);
        let mut bytes = vec![0; usize::try_from(tail).unwrap_or(0)];
        read_at(source, len - tail, &mut bytes)?;
        let mut loose = None;
        let mut found = None;
        for at in (0..bytes.len().saturating_sub(END_BYTES as usize - 1)).rev() {
            if !bytes[at..].starts_with(b"PK\x05\x06") {
                continue;
            }
            let comment = usize::from(u16_at(&bytes, at + 20));
            match (at + END_BYTES as usize + comment).cmp(&bytes.len()) {
                std::cmp::Ordering::Equal => {
                    found = Some(at);
                    break;
                }
                std::cmp::Ordering::Less => {
                    loose.get_or_insert(at + END_BYTES as usize + comment);
                }
                std::cmp::Ordering::Greater => {}
            }
        }
        let Some(at) = found else {
            let refusal = match loose {
                Some(end) => {
                    Refusal::at(len - tail + end as u64, Reason::Trailing { format: FORMAT })
                }
                None => Refusal::at(
                    len,
                    broken(
                        "its end record is missing: the file is not a zip archive, or it ends in the middle",
                    ),
                ),
            };
            return Err(refusal.into());
        };
        let end_at = len - tail + at as u64;
        let end = &bytes[at..];
        let disks = (u16_at(end, 4), u16_at(end, 6));
        let entries_here = u16_at(end, 8);
        let entries = u16_at(end, 10);
        let size = u32_at(end, 12);
        let offset = u32_at(end, 16);
        let refuse = |why: &str| Stop::from(Refusal::at(end_at, broken(why)));
        let several = || {
            Stop::from(Refusal::at(
                end_at,
                Reason::Unsupported {
                    what: "an archive of several volumes".to_owned(),
                    remedy: "pack it as one file",
                },
            ))
        };
        let mut directory = Self {
            base: 0,
            start: 0,
            size: size.into(),
            entries: entries.into(),
        };
        let mut offset = u64::from(offset);
        let mut directory_end = end_at;
        if let Some(found) = End64::find(source, end_at)? {
            // Fields that fit are stated twice; the narrow ones are only placeholders where all their bits are set.
            let fits = |narrow: u64, placeholder: u64, value: u64| {
                narrow == placeholder || narrow == value
            };
            let agree = fits(entries.into(), u16::MAX.into(), found.entries)
                && fits(size.into(), u32::MAX.into(), found.size)
                && fits(offset, u32::MAX.into(), found.offset);
            if !agree {
                return Err(refuse(
                    "its two end records contradict each other (zip64 and plain)",
                ));
            }
            if found.disk != 0 || found.directory_disk != 0 || found.entries != found.entries_here {
                return Err(several());
            }
            directory.entries = found.entries;
            directory.size = found.size;
            offset = found.offset;
            directory_end = found.at;
        } else if disks != (0, 0) || entries_here != entries {
            return Err(several());
        }
        if directory.size > MAX_DIRECTORY_BYTES {
            return Err(refuse(&format!(
                "its directory has {} bytes; the limit is {MAX_DIRECTORY_BYTES}",
                directory.size
            )));
        }
        directory.start = directory_end
            .checked_sub(directory.size)
            .ok_or_else(|| refuse("its directory does not fit in front of its end record"))?;
        directory.base = directory
            .start
            .checked_sub(offset)
            .ok_or_else(|| refuse("its directory is not where its end record states"))?;
        // At least 46 bytes each: a wrong number is found before anything is read.
        if directory.entries > directory.size / HEADER_BYTES as u64 {
            return Err(refuse(
                "its directory is too short for its number of entries",
            ));
        }
        Ok(directory)
    }

    /// A reader of the directory's bytes.
    pub(super) fn reader<'a, R: Read + Seek>(
        &self,
        source: &'a mut R,
    ) -> Result<impl BufRead + use<'a, R>, Stop> {
        source
            .seek(SeekFrom::Start(self.start))
            .map_err(source_error)?;
        Ok(BufReader::with_capacity(64 << 10, source).take(self.size))
    }
}

/// The end record of zip64.
struct End64 {
    at: u64,
    disk: u32,
    directory_disk: u32,
    entries_here: u64,
    entries: u64,
    size: u64,
    offset: u64,
}

impl End64 {
    fn find<R: Read + Seek>(source: &mut R, end_at: u64) -> Result<Option<Self>, Stop> {
        let Some(locator_at) = end_at.checked_sub(LOCATOR_BYTES) else {
            return Ok(None);
        };
        let mut locator = [0; LOCATOR_BYTES as usize];
        read_at(source, locator_at, &mut locator)?;
        if !locator.starts_with(b"PK\x06\x07") {
            return Ok(None);
        }
        let refuse = |why: &str| Stop::from(Refusal::at(locator_at, broken(why)));
        let stated = u64_at(&locator, 8);
        // Where it states, or directly in front of the locator when something was put before the archive.
        let candidates = [Some(stated), locator_at.checked_sub(END64_BYTES)];
        for at in candidates.into_iter().flatten() {
            if at
                .checked_add(END64_BYTES)
                .is_none_or(|end| end > locator_at)
            {
                continue;
            }
            let mut record = [0; END64_BYTES as usize];
            read_at(source, at, &mut record)?;
            let size = u64_at(&record, 4);
            let ends = at.checked_add(12).and_then(|at| at.checked_add(size));
            if !record.starts_with(b"PK\x06\x06") || ends != Some(locator_at) {
                continue;
            }
            return Ok(Some(Self {
                at,
                disk: u32_at(&record, 16),
                directory_disk: u32_at(&record, 20),
                entries_here: u64_at(&record, 24),
                entries: u64_at(&record, 32),
                size: u64_at(&record, 40),
                offset: u64_at(&record, 48),
            }));
        }
        Err(refuse("its zip64 end record is missing"))
    }
}
