//! Tar archives: v7, ustar, pax, GNU and star, read in one pass to the last byte.
//!
//! ```text
//! block ─► extension header (x, g, L, K) ─► remembered for the next entry ─┐
//!   │                                                                      ▼
//!   ├────► entry header ─► name, link, size after all extensions ─► judge, with its content
//!   └────► zero block: the end; only zeros may follow
//! ```
//! An archive without its end record is refused, since nothing shows that it is complete.

mod header;
mod pax;
mod sparse;

use std::{
    io::{self, BufRead, Read},
    rc::Rc,
};

use crate::{
    Compression, Examined,
    decode::{Decoder, Meter, Metered},
    judge::{Judge, Piece, Pieces, Sink, Summary},
    refusal::{ReadError, Reason, Refusal, Stop, shown_bytes},
};

use header::{BLOCK, Header, Kind};
use pax::Pax;
use sparse::{Segment, SparseMap};

pub(crate) use header::is_header;

/// Longest extension header. Sparse maps are the longest.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// Headers, padding and what follows the end may have as many bytes as this, beside the limit for content.
const EXTRA_BYTES: u64 = 1 << 30;
const BUFFER_BYTES: usize = 64 << 10;
const FORMAT: &str = "the tar archive";

/// What extension headers state about the next entry.
#[derive(Default)]
struct Extensions {
    pax: Pax,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    any: bool,
}

struct Reader<R: BufRead> {
    source: Decoder<Metered<R>>,
    meter: Rc<Meter>,
    compression: Compression,
    /// Bytes of the uncompressed archive that were read.
    offset: u64,
    /// How many more there may be.
    max_offset: u64,
    max_bytes: u64,
    buffer: Vec<u8>,
}

pub(crate) fn read<S: Sink>(
    source: impl BufRead,
    compression: Compression,
    judge: Judge<'_, S>,
) -> Result<Summary, ReadError<S::Error>> {
    let mut reader = Reader::new(source, compression, &judge);
    let first = reader.block()?;
    reader.entries(first, judge)
}

pub(crate) fn read_if_tar<S: Sink>(
    source: impl BufRead,
    compression: Compression,
    judge: Judge<'_, S>,
) -> Result<Examined, ReadError<S::Error>> {
    let mut reader = Reader::new(source, compression, &judge);
    let mut block = [0; BLOCK];
    let count = reader.read_some(&mut block)?;
    if count < BLOCK || !(is_header(&block) || block == [0; BLOCK]) {
        return Ok(Examined::NotTar);
    }
    reader.entries(Some(block), judge).map(Examined::Tar)
}

impl<R: BufRead> Reader<R> {
    fn new<S: Sink>(source: R, compression: Compression, judge: &Judge<'_, S>) -> Self {
        let (metered, meter) = Metered::new(source);
        let max_bytes = judge.limits().bytes;
        Self {
            source: Decoder::new(metered, compression),
            meter,
            compression,
            offset: 0,
            max_offset: max_bytes.saturating_add(EXTRA_BYTES),
            max_bytes,
            buffer: vec![0; BUFFER_BYTES],
        }
    }

    fn refuse(&self, reason: Reason) -> Refusal {
        Refusal::at(self.offset, reason)
    }

    fn broken(&self, why: impl Into<String>) -> Refusal {
        self.refuse(Reason::Broken {
            format: FORMAT,
            why: why.into(),
        })
    }

    /// Reads until the buffer is full or the source ends.
    fn read_some(&mut self, buffer: &mut [u8]) -> Result<usize, Stop> {
        let mut count = 0;
        while count < buffer.len() {
            match self.source.read(&mut buffer[count..]) {
                Ok(0) => break,
                Ok(more) => count += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.meter.explain(&error, self.compression)),
            }
        }
        self.offset += count as u64;
        if self.offset > self.max_offset {
            let limit = self.max_bytes;
            return Err(self.refuse(Reason::TooLarge { limit }).into());
        }
        Ok(count)
    }

    /// The next block; `None` at the end of the source.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Stop> {
        let mut block = [0; BLOCK];
        match self.read_some(&mut block)? {
            0 => Ok(None),
            BLOCK => Ok(Some(block)),
            _ => Err(self.truncated().into()),
        }
    }

    fn truncated(&self) -> Refusal {
        self.refuse(Reason::Truncated { format: FORMAT })
    }

    /// Reads a short entry's content, with its padding.
    fn short_content(&mut self, size: u64, what: &str) -> Result<Vec<u8>, Stop> {
        if size > MAX_EXTENSION_BYTES {
            return Err(self
                .broken(format!(
                    "{what} has {size} bytes; the limit is {MAX_EXTENSION_BYTES}"
                ))
                .into());
        }
        let padded = usize::try_from(size).unwrap_or(0).next_multiple_of(BLOCK);
        let mut content = vec![0; padded];
        if self.read_some(&mut content)? < padded {
            return Err(self.truncated().into());
        }
        content.truncate(usize::try_from(size).unwrap_or(0));
        Ok(content)
    }

    fn entries<S: Sink>(
        mut self,
        first: Option<[u8; BLOCK]>,
        mut judge: Judge<'_, S>,
    ) -> Result<Summary, ReadError<S::Error>> {
        let mut extensions = Extensions::default();
        let mut next = first;
        loop {
            let Some(block) = next else {
                return Err(self.truncated().into());
            };
            if block == [0; BLOCK] {
                if extensions.any {
                    return Err(self
                        .broken("an extension header is not followed by an entry")
                        .into());
                }
                self.end()?;
                return judge.finish(self.meter.consumed());
            }
            let header = Header::parse(&block).map_err(|why| self.broken(why))?;
            match header.kind {
                Kind::PaxLocal => {
                    let content = self.short_content(header.size, "a pax header")?;
                    let added = extensions.pax.add(&content);
                    added.map_err(|reason| self.refuse(reason))?;
                    extensions.any = true;
                }
                Kind::PaxGlobal => {
                    let content = self.short_content(header.size, "a global pax header")?;
                    pax::check_global(&content).map_err(|reason| self.refuse(reason))?;
                }
                Kind::LongName | Kind::LongLink => {
                    let mut content = self.short_content(header.size, "a long name")?;
                    if let Some(end) = content.iter().position(|byte| *byte == 0) {
                        content.truncate(end);
                    }
                    let slot = match header.kind {
                        Kind::LongName => &mut extensions.long_name,
                        _ => &mut extensions.long_link,
                    };
                    *slot = Some(content);
                    extensions.any = true;
                }
                // A label names the archive, not a file.
                Kind::VolumeLabel if header.size == 0 => {}
                Kind::VolumeLabel
                | Kind::Regular
                | Kind::HardLink
                | Kind::Symlink
                | Kind::Directory
                | Kind::OldSparse
                | Kind::Special(_)
                | Kind::Other(_) => {
                    let extensions = std::mem::take(&mut extensions);
                    self.entry(&header, extensions, &mut judge)?;
                }
            }
            next = self.block()?;
        }
    }

    fn entry<S: Sink>(
        &mut self,
        header: &Header,
        extensions: Extensions,
        judge: &mut Judge<'_, S>,
    ) -> Result<(), ReadError<S::Error>> {
        let at = self.offset;
        let Extensions {
            pax,
            long_name,
            long_link,
            ..
        } = extensions;
        // pax goes before GNU's long names, which go before the header.
        let name_bytes = pax
            .sparse_name()
            .or(pax.path())
            .or(long_name.as_deref())
            .unwrap_or(&header.name);
        let shown_name = shown_bytes(name_bytes);
        let refuse = |reason| Refusal {
            entry: Some(shown_name.clone()),
            offset: Some(at),
            reason,
        };
        let name = std::str::from_utf8(name_bytes).map_err(|_| refuse(Reason::NotUtf8))?;
        let link_bytes = pax
            .linkpath()
            .or(long_link.as_deref())
            .unwrap_or(&header.link);
        let size = pax.size().unwrap_or(header.size);
        let no_content = |kind| {
            if size == 0 {
                Ok(())
            } else {
                Err(refuse(Reason::UnexpectedContent { kind, size }))
            }
        };
        let no_sparse = || {
            if pax.is_sparse() {
                Err(refuse(Reason::Broken {
                    format: FORMAT,
                    why: "it has a sparse map, but is not a regular file".to_owned(),
                }))
            } else {
                Ok(())
            }
        };
        let link = || std::str::from_utf8(link_bytes).map_err(|_| refuse(Reason::NotUtf8));
        let located = |error: ReadError<S::Error>| match error {
            ReadError::Refused(mut refusal) => {
                refusal.offset.get_or_insert(at);
                ReadError::Refused(refusal)
            }
            ReadError::Source(_) | ReadError::Sink(_) => error,
        };
        match header.kind {
            Kind::Directory => {
                no_content("a directory")?;
                no_sparse()?;
                judge.directory(name, header.mode).map_err(located)
            }
            // Before there was a type for directories, a slash at the end made one.
            Kind::Regular if name.ends_with('/') => {
                no_content("a directory (its path ends with `/`)")?;
                no_sparse()?;
                judge.directory(name, header.mode).map_err(located)
            }
            Kind::Symlink => {
                no_content("a symbolic link")?;
                no_sparse()?;
                judge.symlink(name, link()?).map_err(located)
            }
            Kind::HardLink => {
                no_content("a hard link")?;
                no_sparse()?;
                judge.hard_link(name, link()?).map_err(located)
            }
            Kind::Regular | Kind::OldSparse => {
                let map = if header.kind == Kind::OldSparse {
                    no_sparse()?;
                    self.old_sparse_map(header)?
                } else {
                    self.pax_sparse_map(&pax, size).map_err(|stop| match stop {
                        Stop::Refused(refusal) => {
                            Stop::Refused(Box::new(refusal.in_entry(&shown_name)))
                        }
                        Stop::Source(_) => stop,
                    })?
                };
                let (map, size) = map.unwrap_or_else(|| (SparseMap::dense(size), size));
                map.check(size).map_err(|why| {
                    refuse(Reason::Broken {
                        format: FORMAT,
                        why: why.to_owned(),
                    })
                })?;
                let mut content = TarContent {
                    reader: self,
                    segments: map.segments(),
                    segment: None,
                };
                judge
                    .file(name, header.mode, &mut content)
                    .map_err(located)?;
                self.skip_padding(size)?;
                Ok(())
            }
            Kind::Special(what) => Err(refuse(Reason::Special(what)).into()),
            Kind::Other(byte) => {
                let kind = format!("`{}`", (byte as char).escape_default());
                Err(refuse(Reason::EntryType(kind)).into())
            }
            Kind::PaxLocal
            | Kind::PaxGlobal
            | Kind::LongName
            | Kind::LongLink
            | Kind::VolumeLabel => {
                Err(refuse(Reason::EntryType("a header of its own".into())).into())
            }
        }
    }

    /// The map of a file in GNU's old sparse format, whose rest is in blocks after the header; and the size of the data.
    fn old_sparse_map(&mut self, header: &Header) -> Result<Option<(SparseMap, u64)>, Stop> {
        let mut map = SparseMap::new(header.sparse_size);
        let mut extended = header.sparse_extended;
        let broken = |reader: &Self, why: String| reader.broken(why);
        for segment in header.sparse.clone() {
            map.push(segment).map_err(|why| broken(self, why.into()))?;
        }
        while extended {
            let Some(block) = self.block()? else {
                return Err(self.truncated().into());
            };
            let (segments, more) =
                header::sparse_extension(&block).map_err(|why| broken(self, why))?;
            for segment in segments {
                map.push(segment).map_err(|why| broken(self, why.into()))?;
            }
            extended = more;
        }
        Ok(Some((map, header.size)))
    }

    /// The map that pax headers contain or announce, and the size of the data behind it.
    fn pax_sparse_map(&mut self, pax: &Pax, size: u64) -> Result<Option<(SparseMap, u64)>, Stop> {
        if !pax.is_sparse() {
            return Ok(None);
        }
        if let Some(map) = pax.sparse_map().map_err(|reason| self.refuse(reason))? {
            return Ok(Some((map, size)));
        }
        // Version 1.0: decimal lines before the data, in whole blocks.
        let real_size = pax.sparse_size().map_err(|reason| self.refuse(reason))?;
        let mut map = SparseMap::new(real_size);
        let mut left = size;
        let mut line = Vec::new();
        let mut numbers = Vec::new();
        let mut count: Option<u64> = None;
        loop {
            let wanted = count.map_or(1, |count| count.saturating_mul(2).saturating_add(1));
            if numbers.len() as u64 >= wanted {
                break;
            }
            if left < BLOCK as u64 {
                return Err(self.broken("its sparse map does not end").into());
            }
            let Some(block) = self.block()? else {
                return Err(self.truncated().into());
            };
            left -= BLOCK as u64;
            for byte in block {
                let wanted = count.map_or(1, |count| count.saturating_mul(2).saturating_add(1));
                if numbers.len() as u64 >= wanted {
                    break;
                }
                if byte != b'\n' {
                    if line.len() > 20 {
                        return Err(self.broken("its sparse map is not made of numbers").into());
                    }
                    line.push(byte);
                    continue;
                }
                let number = sparse::decimal(&line).map_err(|why| self.broken(why))?;
                line.clear();
                if count.is_none() {
                    if number > sparse::MAX_SEGMENTS as u64 {
                        return Err(self.broken(sparse::TOO_MANY).into());
                    }
                    count = Some(number);
                }
                numbers.push(number);
            }
        }
        for pair in numbers[1..].chunks_exact(2) {
            let segment = Segment {
                offset: pair[0],
                length: pair[1],
            };
            map.push(segment).map_err(|why| self.broken(why))?;
        }
        Ok(Some((map, left)))
    }

    /// Skips what fills the last block of an entry's content.
    fn skip_padding(&mut self, size: u64) -> Result<(), Stop> {
        let padding = size.next_multiple_of(BLOCK as u64) - size;
        let mut block = [0; BLOCK];
        let padding = usize::try_from(padding).unwrap_or(0);
        if self.read_some(&mut block[..padding])? < padding {
            return Err(self.truncated().into());
        }
        Ok(())
    }

    /// After the first zero block: reads to the end.
    fn end(&mut self) -> Result<(), Stop> {
        let mut buffer = std::mem::take(&mut self.buffer);
        loop {
            let at = self.offset;
            let count = self.read_some(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            if let Some(other) = buffer[..count].iter().position(|byte| *byte != 0) {
                let reason = Reason::Trailing { format: FORMAT };
                return Err(Refusal::at(at + other as u64, reason).into());
            }
        }
    }
}

/// The content of a file: segments of data with holes between them.
struct TarContent<'a, R: BufRead> {
    reader: &'a mut Reader<R>,
    segments: sparse::Segments,
    segment: Option<u64>,
}

impl<R: BufRead> Pieces for TarContent<'_, R> {
    fn next(&mut self) -> Result<Option<Piece<'_>>, Stop> {
        loop {
            if let Some(left) = self.segment.filter(|left| *left > 0) {
                let wanted = left.min(BUFFER_BYTES as u64);
                let mut buffer = std::mem::take(&mut self.reader.buffer);
                buffer.resize(BUFFER_BYTES, 0);
                let count = usize::try_from(wanted).unwrap_or(BUFFER_BYTES);
                let read = self.reader.read_some(&mut buffer[..count]);
                self.reader.buffer = buffer;
                if read? < count {
                    return Err(self.reader.truncated().into());
                }
                self.segment = Some(left - wanted);
                return Ok(Some(Piece::Data(&self.reader.buffer[..count])));
            }
            match self.segments.next() {
                None => return Ok(None),
                Some(sparse::Part::Hole(0)) => {}
                Some(sparse::Part::Hole(bytes)) => return Ok(Some(Piece::Hole(bytes))),
                Some(sparse::Part::Data(bytes)) => self.segment = Some(bytes),
            }
        }
    }
}
