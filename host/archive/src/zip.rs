//! Zip archives, found from their end.
//!
//! The directory decides. Each local header must agree with it, and no two entries may share bytes: programs that read an
//! archive from its beginning and those that read its directory then see the same files.

mod directory;

use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};

use flate2::bufread::DeflateDecoder;

use crate::{
    Limits,
    judge::{Judge, Piece, Pieces, Sink, Summary},
    path::MAX_PATH_BYTES,
    refusal::{ReadError, Reason, Refusal, Stop, shown_bytes},
};

use directory::{Directory, FORMAT, HEADER_BYTES, broken, source_error, u16_at, u32_at, u64_at};

const LOCAL_BYTES: usize = 30;
const BUFFER_BYTES: usize = 64 << 10;
const UTF8: u16 = 1 << 11;
/// Sizes and checksum follow the data.
const DESCRIPTOR: u16 = 1 << 3;
const ENCRYPTED: u16 = 1 | 1 << 6 | 1 << 13;
const PATCH: u16 = 1 << 5;

/// How an entry is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Stored,
    Deflate,
}

/// An entry of the directory.
struct Entry {
    name: String,
    /// The name's bytes, where they are not those of `name`.
    raw_name: Option<Box<[u8]>>,
    flags: u16,
    method_number: u16,
    method: Method,
    crc: u32,
    packed: u64,
    size: u64,
    /// Of the local header, in the file.
    at: u64,
    /// Type and permission bits, where the archive states them.
    unix_mode: Option<u32>,
    /// Marked as a directory for DOS.
    dos_directory: bool,
}

/// Checks that a zip archive can be found and its directory read, but nothing of its entries: for files that stay whole.
///
/// # Errors
/// [`ReadError::Refused`] and [`ReadError::Source`].
pub fn check_zip_directory(
    mut source: impl Read + Seek,
) -> Result<(), ReadError<std::convert::Infallible>> {
    let directory = Directory::find(&mut source)?;
    for_each_entry(&mut source, &directory, |_, _| Ok(()))?;
    Ok(())
}

/// Reads the directory; calls `each` with every header and its variable part.
fn for_each_entry<R: Read + Seek>(
    source: &mut R,
    directory: &Directory,
    mut each: impl FnMut(&[u8], &[u8]) -> Result<(), Stop>,
) -> Result<(), Stop> {
    let mut reader = directory.reader(source)?;
    let mut at = directory.start;
    let mut variable = Vec::new();
    for _ in 0..directory.entries {
        let mut header = [0; HEADER_BYTES];
        fill(&mut reader, &mut header, at)?;
        if !header.starts_with(b"PK\x01\x02") {
            return Err(Refusal::at(at, broken("its directory is damaged")).into());
        }
        let length = [28, 30, 32]
            .iter()
            .map(|field| usize::from(u16_at(&header, *field)))
            .sum();
        variable.resize(length, 0);
        fill(&mut reader, &mut variable, at)?;
        each(&header, &variable)?;
        at += (HEADER_BYTES + length) as u64;
    }
    // A signature of the directory, which nobody makes any more, would be here.
    if at != directory.start + directory.size {
        let why = "its directory has more entries than its end record states";
        return Err(Refusal::at(at, broken(why)).into());
    }
    Ok(())
}

fn fill(reader: &mut impl Read, buffer: &mut [u8], at: u64) -> Result<(), Stop> {
    match reader.read_exact(buffer) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(Refusal::at(at, broken("its directory ends in the middle")).into())
        }
        Err(error) => Err(source_error(error)),
    }
}

pub(crate) fn read<S: Sink>(
    mut source: impl Read + Seek,
    limits: Limits,
    sink: &mut S,
) -> Result<Summary, ReadError<S::Error>> {
    let directory = Directory::find(&mut source)?;
    let limit = limits.entries;
    if directory.entries > limit {
        return Err(Refusal::whole(Reason::TooMany { limit }).into());
    }
    let packed = source.seek(SeekFrom::End(0)).map_err(ReadError::Source)?;
    // What is bounded by the directory's size, and read before its entries so that only one position in the file is used.
    let mut entries = Vec::new();
    for_each_entry(&mut source, &directory, |header, variable| {
        entries.push(Entry::parse(header, variable, &directory)?);
        Ok(())
    })?;
    let mut source = BufReader::with_capacity(BUFFER_BYTES, source);
    let mut judge = Judge::new(sink, limits, packed);
    let mut spans = Vec::with_capacity(entries.len());
    for entry in &entries {
        let start = entry.find_data(&mut source)?;
        let end = start
            .checked_add(entry.packed)
            .filter(|end| *end <= directory.start)
            .ok_or_else(|| {
                let why = "its data runs into the archive's directory";
                Refusal::of_entry(&entry.name, broken(why))
            })?;
        spans.push((entry.at, end));
        entry.read(&mut source, start, &mut judge)?;
    }
    spans.sort_unstable();
    if let Some(pair) = spans.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        let other = entries.iter().find(|entry| entry.at == pair[1].0);
        let refusal = Refusal::at(pair[1].0, broken("two entries share the same bytes"));
        let refusal = match other {
            Some(entry) => refusal.in_entry(&entry.name),
            None => refusal,
        };
        return Err(refusal.into());
    }
    judge.finish(packed)
}

/// The extra fields of a header: their ids and contents.
fn extra_fields(extra: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = extra;
    std::iter::from_fn(move || {
        if rest.len() < 4 {
            // Padding, as some signing tools add it.
            return None;
        }
        let (id, length) = (u16_at(rest, 0), usize::from(u16_at(rest, 2)));
        let content = rest.get(4..4 + length)?;
        rest = &rest[4 + length..];
        Some((id, content))
    })
}

impl Entry {
    fn parse(header: &[u8], variable: &[u8], directory: &Directory) -> Result<Self, Stop> {
        let name_length = usize::from(u16_at(header, 28));
        let extra_length = usize::from(u16_at(header, 30));
        let raw_name = &variable[..name_length];
        let extra = &variable[name_length..name_length + extra_length];
        let shown = shown_bytes(raw_name);
        let refuse = |reason| Refusal {
            entry: Some(shown.clone()),
            offset: None,
            reason,
        };
        let flags = u16_at(header, 8);
        let name = entry_name(raw_name, flags, extra).map_err(&refuse)?;
        if flags & ENCRYPTED != 0 {
            return Err(refuse(Reason::Unsupported {
                what: "encryption".to_owned(),
                remedy: "pack the archive without a password",
            })
            .into());
        }
        if flags & PATCH != 0 {
            return Err(refuse(Reason::Unsupported {
                what: "patch data".to_owned(),
                remedy: "pack whole files",
            })
            .into());
        }
        let method_number = u16_at(header, 10);
        let method = match method_number {
            0 => Method::Stored,
            8 => Method::Deflate,
            other => {
                return Err(refuse(Reason::Unsupported {
                    what: format!("compression method {other} ({})", method_name(other)),
                    remedy: "pack the archive with `deflate`, which is the default of all programs, or without compression",
                })
                .into());
            }
        };
        let mut packed = u64::from(u32_at(header, 20));
        let mut size = u64::from(u32_at(header, 24));
        let mut offset = u64::from(u32_at(header, 42));
        let mut disk = u32::from(u16_at(header, 34));
        wide_sizes(
            extra,
            &mut size,
            &mut packed,
            Some((&mut offset, &mut disk)),
        )
        .map_err(|why| refuse(broken(why)))?;
        if disk != 0 {
            return Err(refuse(Reason::Unsupported {
                what: "an archive of several volumes".to_owned(),
                remedy: "pack it as one file",
            })
            .into());
        }
        let at = directory.base.checked_add(offset);
        let at = at
            .filter(|at| *at < directory.start)
            .ok_or_else(|| refuse(broken("its data is not inside the archive")))?;
        let attributes = u32_at(header, 38);
        let host = header[5];
        // 3 is Unix, 19 macOS. Others have no modes there.
        let stated = (attributes >> 16 != 0).then_some(attributes >> 16);
        let unix_mode = match host {
            3 | 19 => stated,
            _ => None,
        };
        let unix_mode = unix_mode.or(asi_mode(extra).map_err(&refuse)?);
        let dos_directory = matches!(host, 0 | 6 | 10 | 11 | 14) && attributes & 0x10 != 0;
        Ok(Self {
            raw_name: (raw_name != name.as_bytes()).then(|| Box::from(raw_name)),
            name,
            flags,
            method_number,
            method,
            crc: u32_at(header, 16),
            packed,
            size,
            at,
            unix_mode,
            dos_directory,
        })
    }

    fn refuse(&self, reason: Reason) -> Refusal {
        Refusal {
            entry: Some(crate::refusal::shown(&self.name)),
            offset: Some(self.at),
            reason,
        }
    }

    /// Compares the local header with the directory. Returns where the data begins.
    fn find_data<R: Read + Seek>(&self, source: &mut BufReader<R>) -> Result<u64, Stop> {
        let mut header = [0; LOCAL_BYTES];
        seek_buffered(source, self.at)?;
        read_local(source, &mut header).map_err(|error| self.local_error(error))?;
        if !header.starts_with(b"PK\x03\x04") {
            return Err(self.refuse(broken("its local header is missing")).into());
        }
        let name_length = usize::from(u16_at(&header, 26));
        let extra_length = usize::from(u16_at(&header, 28));
        let mut variable = vec![0; name_length + extra_length];
        read_local(source, &mut variable).map_err(|error| self.local_error(error))?;
        let (name, extra) = variable.split_at(name_length);
        let expected = self.raw_name.as_deref();
        if name != expected.unwrap_or(self.name.as_bytes()) {
            let why = format!(
                "it has another name in its local header: `{}`",
                shown_bytes(name)
            );
            return Err(self.refuse(broken(why)).into());
        }
        let flags = u16_at(&header, 6);
        let differs = |what: &str| {
            let why = format!("its local header and the directory state a different {what}");
            Stop::from(self.refuse(broken(why)))
        };
        if flags & ENCRYPTED != 0 {
            return Err(differs("encryption"));
        }
        if u16_at(&header, 8) != self.method_number {
            return Err(differs("compression method"));
        }
        let mut packed = u64::from(u32_at(&header, 18));
        let mut size = u64::from(u32_at(&header, 22));
        wide_sizes(extra, &mut size, &mut packed, None).map_err(|why| self.refuse(broken(why)))?;
        let later = (flags | self.flags) & DESCRIPTOR != 0;
        let fits = |value: u64, real: u64| {
            value == real || (later && (value == 0 || value == u64::from(u32::MAX)))
        };
        if !fits(size, self.size) || !fits(packed, self.packed) {
            return Err(differs("size"));
        }
        let crc = u32_at(&header, 14);
        if crc != self.crc && !(later && crc == 0) {
            return Err(differs("checksum"));
        }
        Ok(self.at + (LOCAL_BYTES + name_length + extra_length) as u64)
    }

    fn local_error(&self, error: io::Error) -> Stop {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            self.refuse(Reason::Truncated { format: FORMAT }).into()
        } else {
            source_error(error)
        }
    }

    fn read<R: Read + Seek, S: Sink>(
        &self,
        source: &mut BufReader<R>,
        start: u64,
        judge: &mut Judge<'_, S>,
    ) -> Result<(), ReadError<S::Error>> {
        let name = &self.name;
        let slash = name.ends_with('/');
        let mode = self.unix_mode.unwrap_or(0);
        let permissions = |default: u32| {
            if mode & 0o7777 == 0 {
                default
            } else {
                mode & 0o7777
            }
        };
        let special = |what| Err(self.refuse(Reason::Special(what)).into());
        let directory = |judge: &mut Judge<'_, S>| {
            if self.size > 0 {
                let (kind, size) = ("a directory", self.size);
                return Err(self.refuse(Reason::UnexpectedContent { kind, size }).into());
            }
            judge.directory(name, permissions(0o755))
        };
        seek_buffered(source, start)?;
        let mut content = ZipContent::new(source, self);
        match mode & 0o170_000 {
            0o120_000 => {
                if self.size > MAX_PATH_BYTES as u64 {
                    return Err(self.refuse(Reason::LinkTarget).into());
                }
                let mut target = Vec::new();
                while let Some(Piece::Data(data)) = content.next()? {
                    target.extend_from_slice(data);
                }
                let target = String::from_utf8(target).map_err(|_| self.refuse(Reason::NotUtf8))?;
                judge.symlink(name, &target)
            }
            0o040_000 => directory(judge),
            0o100_000 | 0 if slash => directory(judge),
            0 if self.dos_directory && self.size == 0 => directory(judge),
            0o100_000 | 0 => judge.file(name, permissions(0o644), &mut content),
            0o020_000 => special("a character device"),
            0o060_000 => special("a block device"),
            0o010_000 => special("a FIFO"),
            0o140_000 => special("a socket"),
            other => {
                let kind = format!("`{other:o}` (Unix)");
                Err(self.refuse(Reason::EntryType(kind)).into())
            }
        }
    }
}

/// The name of an entry, with `/` between its parts.
fn entry_name(raw: &[u8], flags: u16, extra: &[u8]) -> Result<String, Reason> {
    let mut unicode = None;
    for (id, content) in extra_fields(extra) {
        // Info-ZIP's Unicode path: a version, the checksum of the name that it replaces, the name.
        if id != 0x7075 || content.len() < 5 || content[0] != 1 {
            continue;
        }
        // Of another name, it was not updated when the entry was renamed.
        if u32_at(content, 1) != crc32fast::hash(raw) {
            continue;
        }
        let name = std::str::from_utf8(&content[5..]).map_err(|_| Reason::NotUtf8)?;
        if unicode.replace(name).is_some_and(|other| other != name) {
            return Err(broken("it has two Unicode names"));
        }
    }
    let plain = std::str::from_utf8(raw);
    let name = match (plain, unicode) {
        (Ok(plain), None) => plain,
        (Ok(plain), Some(unicode)) if flags & UTF8 != 0 && plain != unicode => {
            return Err(broken("it has two different Unicode names"));
        }
        (Ok(_) | Err(_), Some(unicode)) => unicode,
        (Err(_), None) => return Err(Reason::NotUtf8),
    };
    // The specification allows forward slashes only; archives of some Windows programs have the other ones.
    let name = name.replace('\\', "/");
    let drive = name.as_bytes();
    if drive.len() > 2 && drive[0].is_ascii_alphabetic() && &drive[1..3] == b":/" {
        return Err(Reason::Absolute);
    }
    Ok(name)
}

/// Takes sizes, offset and disk from the zip64 field, where the header has no room for them.
fn wide_sizes(
    extra: &[u8],
    size: &mut u64,
    packed: &mut u64,
    place: Option<(&mut u64, &mut u32)>,
) -> Result<(), &'static str> {
    const NARROW: u64 = u32::MAX as u64;
    let mut found = false;
    let mut place = place;
    for (id, content) in extra_fields(extra) {
        if id != 1 {
            continue;
        }
        if std::mem::replace(&mut found, true) {
            return Err("it has two zip64 fields");
        }
        let mut at = 0;
        let mut next = || {
            let value = content.get(at..at + 8).map(|bytes| u64_at(bytes, 0));
            at += 8;
            value.ok_or("its zip64 field is too short")
        };
        if *size == NARROW {
            *size = next()?;
        }
        if *packed == NARROW {
            *packed = next()?;
        }
        if let Some((offset, disk)) = &mut place {
            if **offset == NARROW {
                **offset = next()?;
            }
            if **disk == u32::from(u16::MAX) {
                let value = content.get(at..at + 4);
                **disk = value
                    .map(|bytes| u32_at(bytes, 0))
                    .ok_or("its zip64 field is too short")?;
            }
        }
    }
    Ok(())
}

/// The mode in an ASi Unix field, which some old programs write instead of attributes.
fn asi_mode(extra: &[u8]) -> Result<Option<u32>, Reason> {
    for (id, content) in extra_fields(extra) {
        if id == 0x756e && content.len() >= 14 {
            if u32_at(content, 0) != crc32fast::hash(&content[4..]) {
                return Err(broken("its Unix field is damaged"));
            }
            let mode = u32::from(u16_at(content, 4));
            if mode & 0o170_000 == 0o120_000 {
                return Err(Reason::Unsupported {
                    what: "a symbolic link in an ASi Unix field".to_owned(),
                    remedy: "pack the archive with Info-ZIP (`zip --symlinks`) or bsdtar",
                });
            }
            return Ok(Some(mode));
        }
    }
    Ok(None)
}

const fn method_name(method: u16) -> &'static str {
    match method {
        1..=6 => "of the 1980s",
        9 => "Deflate64",
        12 => "bzip2",
        14 => "LZMA",
        93 => "Zstandard",
        95 => "xz",
        98 => "PPMd",
        99 => "AES encryption",
        _ => "unknown",
    }
}

fn seek_buffered<R: Read + Seek>(source: &mut BufReader<R>, to: u64) -> Result<(), Stop> {
    // Entries mostly follow each other: what is buffered is kept.
    let at = source.stream_position().map_err(source_error)?;
    let distance = i128::from(to) - i128::from(at);
    match i64::try_from(distance) {
        Ok(distance) => source.seek_relative(distance).map_err(source_error),
        Err(_) => source
            .seek(SeekFrom::Start(to))
            .map(drop)
            .map_err(source_error),
    }
}

fn read_local(source: &mut impl BufRead, buffer: &mut [u8]) -> io::Result<()> {
    source.read_exact(buffer)
}

enum Data<'a, R: Read> {
    Stored(io::Take<&'a mut BufReader<R>>),
    Deflate(Box<DeflateDecoder<io::Take<&'a mut BufReader<R>>>>),
}

/// The content of an entry, checked against size and checksum at its end.
struct ZipContent<'a, R: Read> {
    data: Data<'a, R>,
    entry: &'a Entry,
    crc: crc32fast::Hasher,
    read: u64,
    buffer: Vec<u8>,
    ended: bool,
}

impl<'a, R: Read> ZipContent<'a, R> {
    fn new(source: &'a mut BufReader<R>, entry: &'a Entry) -> Self {
        let packed = source.take(entry.packed);
        Self {
            data: match entry.method {
                Method::Stored => Data::Stored(packed),
                Method::Deflate => Data::Deflate(Box::new(DeflateDecoder::new(packed))),
            },
            entry,
            crc: crc32fast::Hasher::new(),
            read: 0,
            buffer: Vec::new(),
            ended: false,
        }
    }

    fn end(&mut self) -> Result<(), Stop> {
        self.ended = true;
        if self.read != self.entry.size {
            let why = format!(
                "it has {} bytes, but {} are stated",
                self.read, self.entry.size
            );
            return Err(self.entry.refuse(broken(why)).into());
        }
        if std::mem::take(&mut self.crc).finalize() != self.entry.crc {
            let why = "its checksum does not match its content";
            return Err(self.entry.refuse(broken(why)).into());
        }
        Ok(())
    }
}

impl<R: Read> Pieces for ZipContent<'_, R> {
    fn next(&mut self) -> Result<Option<Piece<'_>>, Stop> {
        if self.ended {
            return Ok(None);
        }
        // Small files need no large buffer.
        let wanted = usize::try_from(self.entry.size.saturating_add(1)).unwrap_or(BUFFER_BYTES);
        self.buffer.resize(wanted.min(BUFFER_BYTES), 0);
        let read = loop {
            let read = match &mut self.data {
                Data::Stored(reader) => reader.read(&mut self.buffer),
                Data::Deflate(reader) => reader.read(&mut self.buffer),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        let count = match read {
            Ok(count) => count,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::InvalidInput
                        | io::ErrorKind::InvalidData
                        | io::ErrorKind::UnexpectedEof
                ) =>
            {
                let why = "its compressed data is damaged or ends in the middle";
                return Err(self.entry.refuse(broken(why)).into());
            }
            Err(error) => return Err(source_error(error)),
        };
        if count == 0 {
            self.end()?;
            return Ok(None);
        }
        self.read += count as u64;
        if self.read > self.entry.size {
            let why = format!("it has more than the {} bytes stated", self.entry.size);
            return Err(self.entry.refuse(broken(why)).into());
        }
        self.crc.update(&self.buffer[..count]);
        Ok(Some(Piece::Data(&self.buffer[..count])))
    }
}
