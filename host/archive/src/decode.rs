//! Decompression of streams: gzip, xz, zstd and bzip2, each with all its members, to the last byte.
//!
//! Checksums and sizes that the formats carry are verified. Zero bytes after the last member are padding (tapes, some FTP
//! servers); any other byte there is refused, since it is either damage or something that other programs would read.

use std::{
    cell::{Cell, RefCell},
    io::{self, BufRead, Cursor, Read},
    rc::Rc,
};

use flate2::bufread::GzDecoder;

use crate::{
    Compression,
    refusal::{Reason, Refusal, Stop},
};

/// The largest dictionary (xz) or window (zstd) that is allocated: what `xz -9` and `zstd -19 --long=26` need.
pub const MAX_DICTIONARY_BYTES: u64 = 64 << 20;
/// What the decoder of xz may allocate, its dictionary and a little more, in KiB.
const XZ_MEMORY_KIB: u32 = ((MAX_DICTIONARY_BYTES + (8 << 20)) / 1024) as u32;

/// What is known of a source beside its bytes; shared with its reader, which decoders own.
#[derive(Default)]
pub(crate) struct Meter {
    /// Bytes that were consumed.
    consumed: Cell<u64>,
    /// Why the source failed. Decoders report it as an error of theirs.
    failed: RefCell<Option<io::Error>>,
}

impl Meter {
    pub(crate) fn consumed(&self) -> u64 {
        self.consumed.get()
    }

    /// Turns an error of a decoder into what it is: a failed source, or a damaged stream.
    pub(crate) fn explain(&self, error: &io::Error, compression: Compression) -> Stop {
        if let Some(failed) = self.failed.borrow_mut().take() {
            return Stop::Source(failed);
        }
        let format = compression.describe();
        let reason = if let Some(trailing) = error.get_ref().and_then(|inner| inner.downcast_ref())
        {
            let Trailing = trailing;
            Reason::Trailing { format }
        } else if error.kind() == io::ErrorKind::UnexpectedEof || is_cut(error) {
            Reason::Truncated { format }
        } else if error.kind() == io::ErrorKind::OutOfMemory {
            Reason::Unsupported {
                what: format!("a dictionary of more than {MAX_DICTIONARY_BYTES} bytes"),
                remedy: "compress with a smaller one (`xz -9` or `zstd -19` at most)",
            }
        } else {
            let why = chain(error);
            Reason::Broken { format, why }
        };
        // Of an uncompressed archive the reader knows the byte itself.
        Refusal::at(self.consumed(), reason).into()
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// Whether a decoder found the end of its input, and says so only in a cause.
fn is_cut(error: &io::Error) -> bool {
    let mut cause = error
        .get_ref()
        .map(|inner| inner as &(dyn std::error::Error + 'static));
    while let Some(error) = cause {
        if error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::UnexpectedEof)
        {
            return true;
        }
        cause = error.source();
    }
    false
}

/// A source that counts, and remembers why it failed.
pub(crate) struct Metered<R> {
    inner: R,
    meter: Rc<Meter>,
}

impl<R: BufRead> Metered<R> {
    pub(crate) fn new(inner: R) -> (Self, Rc<Meter>) {
        let meter = Rc::<Meter>::default();
        let metered = Self {
            inner,
            meter: Rc::clone(&meter),
        };
        (metered, meter)
    }
}

impl<R: BufRead> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl<R: BufRead> BufRead for Metered<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf().map_err(|error| {
            let copy = io::Error::new(error.kind(), error.to_string());
            *self.meter.failed.borrow_mut() = Some(error);
            copy
        })
    }

    fn consume(&mut self, count: usize) {
        self.meter
            .consumed
            .set(self.meter.consumed.get() + count as u64);
        self.inner.consume(count);
    }
}

/// Bytes after the end of a stream.
#[derive(Debug, thiserror::Error)]
#[error("more data follows the end")]
struct Trailing;

fn trailing() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Trailing)
}

fn truncated() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

/// The first bytes of a member, then its source.
pub(crate) type Member<R> = io::Chain<Cursor<Vec<u8>>, R>;

/// A decoder of one member.
pub(crate) trait DecodeMember<R>: Read + Sized {
    /// How a member begins.
    const MAGIC: &'static [u8];

    fn begin(source: Member<R>) -> io::Result<Self>;

    /// Checks what is to be checked at the end, and returns the source.
    fn end(self) -> io::Result<Member<R>>;
}

/// What comes after a member, or first.
enum Next {
    End,
    /// A member begins: its magic was read.
    Member(Vec<u8>),
    /// Bytes that are skipped, in zstd.
    Skip(u64),
}

/// A stream of members.
pub(crate) struct Members<R: BufRead, D> {
    state: State<R, D>,
    any: bool,
}

enum State<R: BufRead, D> {
    Between(R),
    Inside(D),
    /// After the end, or an error.
    Ended,
}

impl<R: BufRead, D: DecodeMember<R>> Members<R, D> {
    fn new(source: R) -> Self {
        Self {
            state: State::Between(source),
            any: false,
        }
    }

    fn next(&self, source: &mut R) -> io::Result<Next> {
        let mut magic = Vec::new();
        (&mut *source)
            .take(D::MAGIC.len() as u64)
            .read_to_end(&mut magic)?;
        if magic == D::MAGIC {
            return Ok(Next::Member(magic));
        }
        let skippable = D::MAGIC == ZSTD_MAGIC
            && magic.len() == 4
            && magic[0] & 0xf0 == 0x50
            && magic[1..] == [0x2a, 0x4d, 0x18];
        if skippable {
            let mut length = [0; 4];
            source.read_exact(&mut length)?;
            return Ok(Next::Skip(u32::from_le_bytes(length).into()));
        }
        if !self.any {
            return Err(if D::MAGIC.starts_with(&magic) {
                truncated()
            } else {
                io::Error::new(io::ErrorKind::InvalidData, "it does not begin as one")
            });
        }
        if magic.iter().any(|byte| *byte != 0) {
            return Err(if D::MAGIC.starts_with(&magic) {
                truncated()
            } else {
                trailing()
            });
        }
        skip_zeros(source)?;
        Ok(Next::End)
    }
}

/// Reads zeros up to the end.
fn skip_zeros(source: &mut impl BufRead) -> io::Result<()> {
    loop {
        let available = source.fill_buf()?;
        if available.is_empty() {
            return Ok(());
        }
        if available.iter().any(|byte| *byte != 0) {
            return Err(trailing());
        }
        let count = available.len();
        source.consume(count);
    }
}

impl<R: BufRead, D: DecodeMember<R>> Read for Members<R, D> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match std::mem::replace(&mut self.state, State::Ended) {
                State::Ended => return Ok(0),
                State::Between(mut source) => match self.next(&mut source)? {
                    Next::End => return Ok(0),
                    Next::Skip(bytes) => {
                        let skipped = io::copy(&mut (&mut source).take(bytes), &mut io::sink())?;
                        if skipped != bytes {
                            return Err(truncated());
                        }
                        self.state = State::Between(source);
                    }
                    Next::Member(magic) => {
                        self.any = true;
                        self.state = State::Inside(D::begin(Cursor::new(magic).chain(source))?);
                    }
                },
                State::Inside(mut decoder) => {
                    let count = decoder.read(buffer)?;
                    if count > 0 {
                        self.state = State::Inside(decoder);
                        return Ok(count);
                    }
                    let (_, source) = decoder.end()?.into_inner();
                    self.state = State::Between(source);
                }
            }
        }
    }
}

pub(crate) struct Gzip<R: BufRead>(GzDecoder<Member<R>>);

impl<R: BufRead> Read for Gzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: BufRead> DecodeMember<R> for Gzip<R> {
    const MAGIC: &'static [u8] = &[0x1f, 0x8b];

    fn begin(source: Member<R>) -> io::Result<Self> {
        Ok(Self(GzDecoder::new(source)))
    }

    fn end(self) -> io::Result<Member<R>> {
        Ok(self.0.into_inner())
    }
}

pub(crate) struct Bzip2<R: BufRead>(bzip2::bufread::BzDecoder<Member<R>>);

impl<R: BufRead> Read for Bzip2<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: BufRead> DecodeMember<R> for Bzip2<R> {
    const MAGIC: &'static [u8] = b"BZh";

    fn begin(source: Member<R>) -> io::Result<Self> {
        Ok(Self(bzip2::bufread::BzDecoder::new(source)))
    }

    fn end(self) -> io::Result<Member<R>> {
        Ok(self.0.into_inner())
    }
}

const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

pub(crate) struct Zstd<R: BufRead> {
    decoder: ruzstd::decoding::StreamingDecoder<Member<R>, ruzstd::decoding::FrameDecoder>,
    decoded: u64,
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(buffer)?;
        self.decoded += count as u64;
        Ok(count)
    }
}

impl<R: BufRead> DecodeMember<R> for Zstd<R> {
    const MAGIC: &'static [u8] = ZSTD_MAGIC;

    fn begin(source: Member<R>) -> io::Result<Self> {
        use ruzstd::decoding::errors::FrameDecoderError;
        let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(
            source,
            MAX_DICTIONARY_BYTES,
        );
        match decoder {
            Ok(decoder) => Ok(Self {
                decoder,
                decoded: 0,
            }),
            Err(FrameDecoderError::WindowSizeTooBig { .. }) => {
                Err(io::ErrorKind::OutOfMemory.into())
            }
            Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }

    fn end(self) -> io::Result<Member<R>> {
        let frame = &self.decoder.decoder;
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
        if let (Some(stated), Some(found)) = (
            frame.get_checksum_from_data(),
            frame.get_calculated_checksum(),
        ) && stated != found
        {
            return Err(invalid("the checksum of its content does not match"));
        }
        // 0 also stands for a frame that does not state its size.
        let stated = frame.content_size();
        if stated != 0 && stated != self.decoded {
            return Err(invalid("its content does not have the stated size"));
        }
        Ok(self.decoder.into_inner())
    }
}

/// A decoder of a whole stream.
pub(crate) enum Decoder<R: BufRead> {
    Plain(R),
    Gzip(Box<Members<R, Gzip<R>>>),
    Xz(Box<Xz<R>>),
    Zstd(Box<Members<R, Zstd<R>>>),
    Bzip2(Box<Members<R, Bzip2<R>>>),
}

/// The library's reader reads all streams that follow each other, and refuses anything else behind them.
pub(crate) struct Xz<R: BufRead> {
    reader: lzma_rust2::XzReader<R>,
    ended: bool,
}

impl<R: BufRead> Read for Xz<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.ended || buffer.is_empty() {
            return Ok(0);
        }
        // The library's reader must not be read again after an error.
        self.ended = true;
        let count = self.reader.read(buffer)?;
        self.ended = count == 0;
        Ok(count)
    }
}

impl<R: BufRead> Decoder<R> {
    pub(crate) fn new(source: R, compression: Compression) -> Self {
        match compression {
            Compression::None => Self::Plain(source),
            Compression::Gzip => Self::Gzip(Box::new(Members::new(source))),
            Compression::Xz => Self::Xz(Box::new(Xz {
                reader: lzma_rust2::XzReader::new_mem_limit(source, true, XZ_MEMORY_KIB),
                ended: false,
            })),
            Compression::Zstd => Self::Zstd(Box::new(Members::new(source))),
            Compression::Bzip2 => Self::Bzip2(Box::new(Members::new(source))),
        }
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(reader) => reader.read(buffer),
            Self::Gzip(reader) => reader.read(buffer),
            Self::Xz(reader) => reader.read(buffer),
            Self::Zstd(reader) => reader.read(buffer),
            Self::Bzip2(reader) => reader.read(buffer),
        }
    }
}
