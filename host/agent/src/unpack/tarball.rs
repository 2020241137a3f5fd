//! `.tar.gz` archives.

use std::{
    fs::File,
    io::{self, BufReader},
};

use flate2::read::MultiGzDecoder;
use tar::EntryType;

use super::{
    Budget, UnpackError,
    tree::{Tree, parts},
};
use crate::files::chain;

/// Extension headers of tar, which are read into memory, are refused when they are longer.
const MAX_EXTENSION: u64 = 64 * 1024;

fn broken_tar(error: &io::Error) -> UnpackError {
    UnpackError::Broken {
        format: "a .tar.gz archive",
        reason: chain(error),
    }
}

/// Goes over a whole archive before anything is written: its sizes, and headers that would be read into memory.
pub(super) fn inspect_tar(file: &File, budget: &Budget<'_>) -> Result<(), UnpackError> {
    let mut budget = Budget {
        bytes: 0,
        entries: 0,
        ..*budget
    };
    let mut archive = tar::Archive::new(MultiGzDecoder::new(BufReader::new(file)));
    for entry in archive
        .entries()
        .map_err(|error| broken_tar(&error))?
        .raw(true)
    {
        let entry = entry.map_err(|error| broken_tar(&error))?;
        budget.entry()?;
        budget.spend(entry.size())?;
        let kind = entry.header().entry_type();
        let extends = kind.is_gnu_longname()
            || kind.is_gnu_longlink()
            || kind.is_pax_global_extensions()
            || kind.is_pax_local_extensions();
        if extends && entry.size() > MAX_EXTENSION {
            return Err(UnpackError::Broken {
                format: "a .tar.gz archive",
                reason: format!(
                    "an extension header has {} bytes; the limit is {MAX_EXTENSION}",
                    entry.size()
                ),
            });
        }
    }
    Ok(())
}

pub(super) fn unpack_tar(file: &File, tree: &mut Tree<'_>) -> Result<(), UnpackError> {
    let mut archive = tar::Archive::new(MultiGzDecoder::new(BufReader::new(file)));
    for entry in archive.entries().map_err(|error| broken_tar(&error))? {
        let mut entry = entry.map_err(|error| broken_tar(&error))?;
        let text = |bytes: &[u8]| {
            String::from_utf8(bytes.to_vec())
                .map_err(|_| UnpackError::Name(String::from_utf8_lossy(bytes).into_owned()))
        };
        let shown = text(&entry.path_bytes())?;
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            continue;
        }
        let path = parts(&shown)?;
        let mode = entry.header().mode().map_err(|error| broken_tar(&error))?;
        let special = |what| UnpackError::Special {
            path: shown.clone(),
            what,
        };
        let link = entry
            .link_name_bytes()
            .map(|bytes| text(&bytes))
            .transpose()?;
        match kind {
            EntryType::Directory => tree.directory(&path, &shown, mode)?,
            EntryType::Regular | EntryType::Continuous => {
                tree.file(&path, &shown, mode, &mut entry)?
            }
            EntryType::Symlink => tree.symlink(&path, &shown, &link.unwrap_or_default())?,
            EntryType::Link => tree.hard_link(&path, &shown, &link.unwrap_or_default())?,
            EntryType::Char => return Err(special("a character device")),
            EntryType::Block => return Err(special("a block device")),
            EntryType::Fifo => return Err(special("a FIFO")),
            // tar's own enum has no end; what it may add is special here.
            _ => return Err(special("of an unknown kind")),
        }
    }
    Ok(())
}
