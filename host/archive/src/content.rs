//! Which format a file has: by its content first, then by its name, unless the caller declares a [`Kind`].
//!
//! | content | name | format |
//! | --- | --- | --- |
//! | tar, plain or compressed | `.jar`, `.war`, `.ear`, `.zip` | refused: content and name contradict each other |
//! | tar, plain or compressed | any other | that tar format |
//! | compressed, no tar inside | `.tar`, `.tar.*`, `.tgz` … | refused |
//! | compressed, no tar inside | any other | single file |
//! | zip | `.jar`, `.war`, `.ear` | jar: stays one file |
//! | zip | `.tar`, `.tar.*` … | refused |
//! | zip | any other | zip |
//! | something before a zip | `.jar`, `.war`, `.ear`, `.zip` | as above, if a zip is found from the end |
//! | 7z, rar, lzip, compress, lz4 | any | refused, unless declared as a single file |
//! | anything else | `.zip`, `.jar`, `.tar` … | refused |
//! | anything else | any other | single file |

use std::{
    fs::File,
    io::{self, Read as _, Seek as _},
};

use windlass_domain::task::PackageFormat;

use crate::{Compression, tar::is_header};

/// How many first bytes of a file [`recognise`] needs, unless the file is shorter.
pub const HEAD_BYTES: usize = 512;

/// What a file is, as its first bytes show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A tar archive, or a compressed file that may be one.
    Stream(Compression),
    /// A zip archive.
    Zip,
    /// An archive or compressed file of a format that is not supported.
    Foreign(&'static str),
    /// Anything else.
    Other,
}

/// What a file is, by its first [`HEAD_BYTES`] (or all of a shorter file).
#[must_use]
pub fn recognise(head: &[u8]) -> Content {
    const BEGINNINGS: [(&[u8], Content); 13] = [
        (&[0x1f, 0x8b], Content::Stream(Compression::Gzip)),
        (b"\xfd7zXZ\0", Content::Stream(Compression::Xz)),
        (
            &[0x28, 0xb5, 0x2f, 0xfd],
            Content::Stream(Compression::Zstd),
        ),
        (b"BZh", Content::Stream(Compression::Bzip2)),
        (b"PK\x03\x04", Content::Zip),
        (b"PK\x05\x06", Content::Zip),
        (b"PK\x06\x06", Content::Zip),
        (b"PK00PK\x03\x04", Content::Zip),
        (b"7z\xbc\xaf\x27\x1c", Content::Foreign("a 7z archive")),
        (b"Rar!\x1a\x07", Content::Foreign("a RAR archive")),
        (b"LZIP\x01", Content::Foreign("an lzip file")),
        (&[0x1f, 0x9d], Content::Foreign("a file of `compress`")),
        (&[0x04, 0x22, 0x4d, 0x18], Content::Foreign("an LZ4 file")),
    ];
    let known = BEGINNINGS
        .iter()
        .find(|(beginning, _)| head.starts_with(beginning));
    match known {
        // A script could begin with these letters; a bzip2 file has its block size behind them.
        Some((b"BZh", _))
            if !head
                .get(3)
                .is_some_and(|level| (b'1'..=b'9').contains(level)) =>
        {
            Content::Other
        }
        Some((_, content)) => *content,
        None if skippable_zstd(head) => Content::Stream(Compression::Zstd),
        None if head.get(..HEAD_BYTES).is_some_and(is_header) => Content::Stream(Compression::None),
        None => Content::Other,
    }
}

/// zstd files of `pzstd` begin with a frame to skip.
fn skippable_zstd(head: &[u8]) -> bool {
    head.first().is_some_and(|first| first & 0xf0 == 0x50)
        && head.get(1..4) == Some(&[0x2a, 0x4d, 0x18])
}

/// What a file's name claims that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameClaim {
    /// `.tar`, `.tgz`, `.tar.xz` and so on.
    Tar,
    /// `.zip`.
    Zip,
    /// `.jar`, `.war`, `.ear`.
    Jar,
    /// Anything else.
    Nothing,
}

/// What a file's name claims that it is.
#[must_use]
pub fn claim(file_name: &str) -> NameClaim {
    const TAR: [&str; 11] = [
        ".tar",
        ".tar.gz",
        ".tgz",
        ".tar.xz",
        ".txz",
        ".tar.zst",
        ".tzst",
        ".tar.bz2",
        ".tbz2",
        ".tbz",
        ".tar.zstd",
    ];
    let name = file_name.to_ascii_lowercase();
    let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    if ends(&TAR) {
        NameClaim::Tar
    } else if ends(&[".zip"]) {
        NameClaim::Zip
    } else if ends(&[".jar", ".war", ".ear"]) {
        NameClaim::Jar
    } else {
        NameClaim::Nothing
    }
}

/// What a caller declares a file to be, whatever its name and content look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An archive that is unpacked: any tar format, or zip.
    Archive,
    /// A jar, war or ear: stays one file, not executable.
    Jar,
    /// A single file that stays as it is, executable.
    File,
}

/// How an upload is examined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// While it arrives. If it turns out not to be a tar archive, it is of the other format, or refused where there is none.
    Stream {
        /// How it is compressed.
        compression: Compression,
        /// What it is without a tar archive inside.
        otherwise: Option<PackageFormat>,
    },
    /// When it is complete: as a zip archive that is unpacked.
    Zip,
    /// When it is complete: as a zip archive that stays one file.
    Jar,
    /// Not at all: a single file.
    Plain,
}

/// Why a file is refused by its first bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Mismatch(pub String);

/// How a file is examined, by its first [`HEAD_BYTES`] (or all of a shorter file), its name and what is declared.
///
/// # Errors
/// [`Mismatch`] when content, name and declaration contradict each other, or the format is not supported.
pub fn course(head: &[u8], file_name: &str, kind: Option<Kind>) -> Result<Course, Mismatch> {
    let content = recognise(head);
    let claim = claim(file_name);
    let archive = match kind {
        Some(Kind::File) => return Ok(Course::Plain),
        Some(Kind::Jar) => return Ok(Course::Jar),
        Some(Kind::Archive) => true,
        None => false,
    };
    let mismatch = |found: &str| {
        Mismatch(format!(
            "the name `{}` does not fit the content, which is {found}",
            crate::refusal::shown(file_name)
        ))
    };
    match (content, claim) {
        (Content::Foreign(what), _) => Err(Mismatch(format!("{what} is not supported"))),
        (Content::Stream(compression), NameClaim::Zip | NameClaim::Jar) if !archive => {
            Err(mismatch(compression.describe()))
        }
        (Content::Zip, NameClaim::Tar) if !archive => Err(mismatch("a zip archive")),
        (Content::Stream(compression), claim) => Ok(Course::Stream {
            compression,
            otherwise: (!archive && claim == NameClaim::Nothing).then_some(PackageFormat::Plain),
        }),
        (Content::Zip, NameClaim::Jar) if !archive => Ok(Course::Jar),
        (Content::Zip, _) => Ok(Course::Zip),
        // Without entries, a tar archive is nothing but its end.
        (Content::Other, NameClaim::Tar) if is_empty_tar(head) => Ok(Course::Stream {
            compression: Compression::None,
            otherwise: None,
        }),
        (Content::Other, NameClaim::Tar) => Err(mismatch("not a tar archive")),
        // Perhaps something is in front of it.
        (Content::Other, NameClaim::Zip) => Ok(Course::Zip),
        (Content::Other, NameClaim::Jar) if !archive => Ok(Course::Jar),
        (Content::Other, NameClaim::Nothing) if !archive => Ok(Course::Plain),
        (Content::Other, NameClaim::Jar | NameClaim::Nothing) => Ok(Course::Zip),
    }
}

fn is_empty_tar(head: &[u8]) -> bool {
    head.len() == HEAD_BYTES && head.iter().all(|byte| *byte == 0)
}

/// The first [`HEAD_BYTES`] of a file, which is at its beginning afterwards.
///
/// # Errors
/// When the file cannot be read.
pub fn head_of(file: &mut File) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(HEAD_BYTES);
    file.rewind()?;
    file.take(HEAD_BYTES as u64).read_to_end(&mut head)?;
    file.rewind()?;
    Ok(head)
}

/// The format of an archive in a file that is to be unpacked, whatever its name; `None` when it is none.
///
/// # Errors
/// When the file cannot be read.
pub fn archive_format(file: &mut File) -> io::Result<Option<PackageFormat>> {
    let head = head_of(file)?;
    Ok(match recognise(&head) {
        Content::Stream(compression) => Some(compression.tar_format()),
        Content::Zip => Some(PackageFormat::Zip),
        Content::Other if is_empty_tar(&head) => Some(PackageFormat::Tar),
        Content::Foreign(_) | Content::Other => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_recognised_by_their_first_bytes() {
        let check = |head: &[u8], expected| assert_eq!(recognise(head), expected, "{head:?}");
        check(&[0x1f, 0x8b, 8], Content::Stream(Compression::Gzip));
        check(b"\xfd7zXZ\0\0", Content::Stream(Compression::Xz));
        check(
            &[0x28, 0xb5, 0x2f, 0xfd],
            Content::Stream(Compression::Zstd),
        );
        check(
            &[0x52, 0x2a, 0x4d, 0x18, 0],
            Content::Stream(Compression::Zstd),
        );
        check(b"BZh91AY", Content::Stream(Compression::Bzip2));
        check(b"BZhello", Content::Other);
        check(b"PK\x03\x04", Content::Zip);
        check(b"#!/bin/sh\n", Content::Other);
        check(b"\x7fELF", Content::Other);
        check(b"7z\xbc\xaf\x27\x1c", Content::Foreign("a 7z archive"));
        check(b"", Content::Other);
        check(&[0; 512], Content::Other);
    }

    #[test]
    fn content_goes_before_the_name_and_a_declaration_before_both() {
        let stream = |compression, otherwise| {
            Ok(Course::Stream {
                compression,
                otherwise,
            })
        };
        let gz: &[u8] = &[0x1f, 0x8b, 8, 0];
        let zip: &[u8] = b"PK\x03\x04";
        let script: &[u8] = b"#!/bin/sh\n";
        let rar: &[u8] = b"Rar!\x1a\x07\0";
        let plain = Some(PackageFormat::Plain);
        type Expected = Result<Course, ()>;
        let cases: [(&[u8], &str, Option<Kind>, Expected); 18] = [
            (gz, "a.tar.gz", None, stream(Compression::Gzip, None)),
            (gz, "a.tar", None, stream(Compression::Gzip, None)),
            (gz, "a", None, stream(Compression::Gzip, plain)),
            (
                gz,
                "a",
                Some(Kind::Archive),
                stream(Compression::Gzip, None),
            ),
            (gz, "a", Some(Kind::File), Ok(Course::Plain)),
            (gz, "a.zip", None, Err(())),
            (
                gz,
                "a.zip",
                Some(Kind::Archive),
                stream(Compression::Gzip, None),
            ),
            (zip, "a.zip", None, Ok(Course::Zip)),
            (zip, "a", None, Ok(Course::Zip)),
            (zip, "a.war", None, Ok(Course::Jar)),
            (zip, "a.war", Some(Kind::Archive), Ok(Course::Zip)),
            (zip, "a.tar.gz", None, Err(())),
            (script, "a.jar", None, Ok(Course::Jar)),
            (script, "a.zip", None, Ok(Course::Zip)),
            (script, "run.sh", None, Ok(Course::Plain)),
            (script, "a.tar", None, Err(())),
            (rar, "a.rar", None, Err(())),
            (rar, "a.rar", Some(Kind::File), Ok(Course::Plain)),
        ];
        for (head, name, kind, expected) in cases {
            let found = course(head, name, kind).map_err(drop);
            assert_eq!(found, expected, "{name} {kind:?}");
        }
        assert_eq!(
            course(&[0; 512], "a.tar", None).map_err(drop),
            stream(Compression::None, None)
        );
    }

    #[test]
    fn names_claim_a_format() {
        for (name, expected) in [
            ("a.tar.gz", NameClaim::Tar),
            ("a.TGZ", NameClaim::Tar),
            ("a.tar", NameClaim::Tar),
            ("a.tar.zst", NameClaim::Tar),
            ("a.zip", NameClaim::Zip),
            ("a.war", NameClaim::Jar),
            ("a.gz", NameClaim::Nothing),
            ("tar", NameClaim::Nothing),
        ] {
            assert_eq!(claim(name), expected, "{name}");
        }
    }
}
