//! Writes tar archives byte by byte: also those that no library writes.

/// One entry with full control of its header.
#[derive(Clone)]
pub(super) struct Raw {
    pub(super) name: Vec<u8>,
    pub(super) kind: u8,
    pub(super) mode: u32,
    pub(super) link: Vec<u8>,
    pub(super) size: Option<u64>,
    pub(super) content: Vec<u8>,
    pub(super) dialect: Dialect,
    pub(super) binary_numbers: bool,
    pub(super) bad_checksum: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Dialect {
    V7,
    Ustar,
    Gnu,
}

impl Raw {
    pub(super) fn new(name: &str, kind: u8, mode: u32) -> Self {
        Self {
            name: name.into(),
            kind,
            mode,
            link: Vec::new(),
            size: None,
            content: Vec::new(),
            dialect: Dialect::Ustar,
            binary_numbers: false,
            bad_checksum: false,
        }
    }

    pub(super) fn content(mut self, content: &[u8]) -> Self {
        self.content = content.to_vec();
        self
    }

    pub(super) fn link(mut self, link: &str) -> Self {
        self.link = link.into();
        self
    }

    pub(super) fn block(&self) -> [u8; 512] {
        let mut block = [0_u8; 512];
        let put = |block: &mut [u8; 512], at: usize, bytes: &[u8]| {
            block[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let (mut prefix, mut name) = (Vec::new(), self.name.clone());
        if self.dialect == Dialect::Ustar && name.len() > 100 {
            let cut = (1..name.len())
                .find(|at| name[*at] == b'/' && name.len() - at - 1 <= 100 && *at <= 155);
            if let Some(cut) = cut {
                prefix = name[..cut].to_vec();
                name = name[cut + 1..].to_vec();
            }
        }
        put(&mut block, 0, &name[..name.len().min(100)]);
        put(&mut block, 100, format!("{:07o}\0", self.mode).as_bytes());
        put(&mut block, 108, b"0000000\x000000000\x00");
        let size = self.size.unwrap_or(self.content.len() as u64);
        if self.binary_numbers || size >= 1 << 33 {
            let mut field = [0_u8; 12];
            field[4..].copy_from_slice(&size.to_be_bytes());
            field[0] |= 0x80;
            put(&mut block, 124, &field);
        } else {
            put(&mut block, 124, format!("{size:011o}\0").as_bytes());
        }
        put(&mut block, 136, b"14000000000\0");
        block[156] = self.kind;
        put(&mut block, 157, &self.link[..self.link.len().min(100)]);
        match self.dialect {
            Dialect::V7 => {}
            Dialect::Ustar => {
                put(&mut block, 257, b"ustar\x0000");
                put(&mut block, 345, &prefix[..prefix.len().min(155)]);
            }
            Dialect::Gnu => put(&mut block, 257, b"ustar  \0"),
        }
        seal(&mut block);
        if self.bad_checksum {
            block[148] ^= 1;
        }
        block
    }

    /// Whether name and link fit in the header.
    pub(super) fn fits(&self) -> bool {
        let name = self.name.len() <= 100
            || (self.dialect == Dialect::Ustar
                && (1..self.name.len()).any(|at| {
                    self.name[at] == b'/' && self.name.len() - at - 1 <= 100 && at <= 155
                }));
        name && self.link.len() <= 100
    }
}

pub(super) fn seal(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

pub(super) fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(512), 0);
}

pub(super) fn append(out: &mut Vec<u8>, raw: &Raw) {
    out.extend(raw.block());
    out.extend(&raw.content);
    pad(out);
}

/// A pax record.
pub(super) fn record(keyword: &str, value: &[u8]) -> Vec<u8> {
    let rest = keyword.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    let mut out = format!("{length} {keyword}=").into_bytes();
    out.extend(value);
    out.push(b'\n');
    out
}

pub(super) fn pax(out: &mut Vec<u8>, kind: u8, records: &[u8]) {
    append(out, &Raw::new("PaxHeaders/x", kind, 0o644).content(records));
}

/// A long name (`L`) or link (`K`) of GNU.
pub(super) fn gnu_long(out: &mut Vec<u8>, kind: u8, name: &[u8]) {
    let mut content = name.to_vec();
    content.push(0);
    let mut raw = Raw::new("././@LongLink", kind, 0o644).content(&content);
    raw.dialect = Dialect::Gnu;
    append(out, &raw);
}

pub(super) fn end(out: &mut Vec<u8>) {
    out.extend([0; 1024]);
}
