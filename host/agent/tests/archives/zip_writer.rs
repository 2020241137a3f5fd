//! Writes zip archives byte by byte: also those that no library writes.

use std::io::Write as _;

use flate2::{Compression, write::DeflateEncoder};

/// One entry with full control of its headers.
#[derive(Clone)]
pub(super) struct Raw {
    pub(super) name: Vec<u8>,
    pub(super) local_name: Option<Vec<u8>>,
    pub(super) content: Vec<u8>,
    pub(super) unix_mode: u32,
    pub(super) host: u8,
    pub(super) attributes: u32,
    pub(super) deflate: bool,
    pub(super) descriptor: bool,
    pub(super) wide: bool,
    pub(super) flags: u16,
    pub(super) method: Option<u16>,
    pub(super) crc: Option<u32>,
    pub(super) size: Option<u32>,
    pub(super) extra: Vec<u8>,
}

impl Raw {
    pub(super) fn new(name: &str, unix_mode: u32, content: &[u8]) -> Self {
        Self {
            name: name.into(),
            local_name: None,
            content: content.to_vec(),
            unix_mode,
            host: 3,
            attributes: 0,
            deflate: true,
            descriptor: false,
            wide: false,
            flags: 0,
            method: None,
            crc: None,
            size: None,
            extra: Vec::new(),
        }
    }
}

/// How the archive ends, and what is before it.
#[derive(Clone, Default)]
pub(super) struct Shape {
    pub(super) prefix: Vec<u8>,
    /// Offsets count from the file's beginning, not from the archive's.
    pub(super) adjusted: bool,
    pub(super) comment: Vec<u8>,
    /// A zip64 end record; all fields of the plain one are placeholders, as Go writes them.
    pub(super) zip64_end: bool,
    /// Added to the number of entries that the end record states.
    pub(super) more_entries: u16,
    /// The second entry's offset is the first one's.
    pub(super) overlap: bool,
}

pub(super) fn write(entries: &[Raw], shape: &Shape) -> Vec<u8> {
    let mut out = shape.prefix.clone();
    let base = if shape.adjusted { 0 } else { out.len() };
    let mut directory = Vec::new();
    let mut first = None;
    for (number, entry) in entries.iter().enumerate() {
        let packed = if entry.deflate {
            let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
            encoder.write_all(&entry.content).unwrap();
            encoder.finish().unwrap()
        } else {
            entry.content.clone()
        };
        let crc = entry.crc.unwrap_or_else(|| crc32fast::hash(&entry.content));
        let size = entry.size.unwrap_or(entry.content.len() as u32);
        let flags = entry.flags | if entry.descriptor { 8 } else { 0 };
        let method = entry.method.unwrap_or(if entry.deflate { 8 } else { 0 });
        let mut offset = (out.len() - base) as u64;
        let common = |later: bool, wide: bool, name: &[u8], extra: &[u8]| {
            let mut bytes = Vec::new();
            for field in [if entry.wide { 45 } else { 20_u16 }, flags, method, 0, 0x21] {
                bytes.extend(field.to_le_bytes());
            }
            let (crc, small_packed, small) = match (later, wide) {
                (true, _) => (0, 0, 0),
                (false, true) => (crc, u32::MAX, u32::MAX),
                (false, false) => (crc, packed.len() as u32, size),
            };
            for field in [crc, small_packed, small] {
                bytes.extend(field.to_le_bytes());
            }
            bytes.extend((name.len() as u16).to_le_bytes());
            bytes.extend((extra.len() as u16).to_le_bytes());
            bytes
        };
        let sizes = |with_offset: Option<u64>| {
            let mut field = Vec::new();
            let mut content = Vec::new();
            content.extend(u64::from(size).to_le_bytes());
            content.extend((packed.len() as u64).to_le_bytes());
            if let Some(offset) = with_offset {
                content.extend(offset.to_le_bytes());
            }
            field.extend(1_u16.to_le_bytes());
            field.extend((content.len() as u16).to_le_bytes());
            field.extend(content);
            field
        };
        let wide_local = entry.wide && !entry.descriptor;
        let local_extra = if wide_local { sizes(None) } else { Vec::new() };
        let name = entry.local_name.as_ref().unwrap_or(&entry.name);
        out.extend(b"PK\x03\x04");
        out.extend(common(entry.descriptor, wide_local, name, &local_extra));
        out.extend(name);
        out.extend(&local_extra);
        out.extend(&packed);
        if entry.descriptor {
            out.extend(b"PK\x07\x08");
            out.extend(crc.to_le_bytes());
            out.extend((packed.len() as u32).to_le_bytes());
            out.extend(size.to_le_bytes());
        }
        if shape.overlap && number == 1 {
            offset = first.unwrap_or(offset);
        }
        first.get_or_insert(offset);
        let mut extra = entry.extra.clone();
        if entry.wide {
            extra.extend(sizes(Some(offset)));
        }
        directory.extend(b"PK\x01\x02\x14");
        directory.push(entry.host);
        directory.extend(common(false, entry.wide, &entry.name, &extra));
        directory.extend([0; 6]);
        directory.extend((entry.unix_mode << 16 | entry.attributes).to_le_bytes());
        let narrow = if entry.wide { u32::MAX } else { offset as u32 };
        directory.extend(narrow.to_le_bytes());
        directory.extend(&entry.name);
        directory.extend(&extra);
    }
    let start = (out.len() - base) as u64;
    let size = directory.len() as u64;
    let count = entries.len() as u64 + u64::from(shape.more_entries);
    out.extend(&directory);
    if shape.zip64_end {
        let at = (out.len() - base) as u64;
        out.extend(b"PK\x06\x06");
        out.extend(44_u64.to_le_bytes());
        out.extend([45, 0, 45, 0]);
        out.extend([0; 8]);
        for field in [count, count, size, start] {
            out.extend(field.to_le_bytes());
        }
        out.extend(b"PK\x06\x07\0\0\0\0");
        out.extend(at.to_le_bytes());
        out.extend(1_u32.to_le_bytes());
    }
    out.extend(b"PK\x05\x06\0\0\0\0");
    let narrow = shape.zip64_end;
    for _ in 0..2 {
        let count = if narrow { u16::MAX } else { count as u16 };
        out.extend(count.to_le_bytes());
    }
    for value in [size, start] {
        let value = if narrow { u32::MAX } else { value as u32 };
        out.extend(value.to_le_bytes());
    }
    out.extend((shape.comment.len() as u16).to_le_bytes());
    out.extend(&shape.comment);
    out
}
