//! `.zip` archives.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, BufReader, Read as _, Seek as _, SeekFrom},
};

use super::{
    MAX_PATH, UnpackError,
    tree::{Tree, parts},
};
use crate::files::chain;

/// A zip's table of contents beyond this would only fill memory.
const MAX_ZIP_DIRECTORY: u32 = 64 << 20;

pub(super) fn unpack_zip(mut file: File, tree: &mut Tree<'_>) -> Result<(), UnpackError> {
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
        zip::ZipArchive::new(BufReader::new(&file)).map_err(|error| broken(chain(&error)))?;
    let limit = tree.budget.policy.unpack_entries;
    if archive.len() as u64 > limit {
        return Err(UnpackError::TooMany { limit });
    }
    let start = archive.central_directory_start();
    if let Some(name) = name_twice(&file, start).map_err(|error| broken(chain(&error)))? {
        return Err(UnpackError::Twice(name));
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

/// The first file whose name stands twice in the table of contents, which starts at `start`. The crate keeps each name once
/// and lets the last one win, where other programs take the first: what such an archive holds depends on who reads it.
fn name_twice(file: &File, start: u64) -> io::Result<Option<String>> {
    const HEADER: usize = 46;
    let mut reader = BufReader::new(file);
    reader.seek(SeekFrom::Start(start))?;
    let mut seen = HashSet::new();
    loop {
        let mut header = [0; HEADER];
        match reader.read_exact(&mut header) {
            Ok(()) if header.starts_with(b"PK\x01\x02") => {}
            Ok(()) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let length = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let mut name = vec![0; usize::from(length(28))];
        reader.read_exact(&mut name)?;
        reader.seek_relative(i64::from(length(30)) + i64::from(length(32)))?;
        // A directory twice is one directory.
        if name.ends_with(b"/") {
            continue;
        }
        if let Some(name) = seen.replace(name) {
            return Ok(Some(
                String::from_utf8_lossy(&name).chars().take(200).collect(),
            ));
        }
    }
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
