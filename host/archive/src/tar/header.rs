//! One header block of a tar archive.

use super::sparse::Segment;

/// Bytes of a block.
pub(crate) const BLOCK: usize = 512;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    HardLink,
    Symlink,
    Directory,
    /// A sparse file of GNU's first format.
    OldSparse,
    PaxLocal,
    PaxGlobal,
    /// GNU: the next entry's name.
    LongName,
    /// GNU: the next entry's link target.
    LongLink,
    VolumeLabel,
    /// A device or FIFO.
    Special(&'static str),
    Other(u8),
}

pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: u32,
    pub(super) size: u64,
    /// The first segments of an old sparse file.
    pub(super) sparse: Vec<Segment>,
    /// The size of an old sparse file with its holes.
    pub(super) sparse_size: u64,
    /// Whether more segments follow in blocks of their own.
    pub(super) sparse_extended: bool,
}

/// Whether a block is a header, by its checksum.
pub(crate) fn is_header(block: &[u8]) -> bool {
    let Ok(block) = <&[u8; BLOCK]>::try_from(block) else {
        return false;
    };
    *block != [0; BLOCK] && check_sum(block).is_ok()
}

fn check_sum(block: &[u8; BLOCK]) -> Result<(), String> {
    let stated = octal(&block[148..156], "its checksum")?;
    let counted = |index: usize| (148..156).contains(&index);
    let byte = |index: usize, byte: u8| if counted(index) { b' ' } else { byte };
    let unsigned: u64 = (0..BLOCK)
        .map(|index| u64::from(byte(index, block[index])))
        .sum();
    // Some old programs summed signed bytes.
    let signed: i64 = (0..BLOCK)
        .map(|index| i64::from(byte(index, block[index]).cast_signed()))
        .sum();
    if stated == unsigned || i64::try_from(stated) == Ok(signed) {
        Ok(())
    } else {
        Err(format!(
            "the checksum of a header does not match ({stated} stated, {unsigned} found)"
        ))
    }
}

impl Header {
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Self, String> {
        check_sum(block)?;
        let gnu = &block[257..265] == b"ustar  \0";
        let ustar = &block[257..262] == b"ustar" && !gnu;
        let kind = match block[156] {
            b'0' | 0 | b'7' => Kind::Regular,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Special("a character device"),
            b'4' => Kind::Special("a block device"),
            b'5' => Kind::Directory,
            b'6' => Kind::Special("a FIFO"),
            b'x' | b'X' => Kind::PaxLocal,
            b'g' => Kind::PaxGlobal,
            b'L' => Kind::LongName,
            b'K' => Kind::LongLink,
            b'V' => Kind::VolumeLabel,
            b'S' if gnu => Kind::OldSparse,
            other => Kind::Other(other),
        };
        let mut name = text(&block[..100]).to_vec();
        if ustar {
            // star has its own fields after a prefix of 130 bytes.
            let end = if &block[508..512] == b"tar\0" {
                475
            } else {
                500
            };
            let prefix = text(&block[345..end]);
            if !prefix.is_empty() {
                let mut whole = prefix.to_vec();
                if !whole.ends_with(b"/") {
                    whole.push(b'/');
                }
                whole.append(&mut name);
                name = whole;
            }
        }
        let mode = number(&block[100..108], "its mode")?;
        let mut header = Self {
            kind,
            name,
            link: text(&block[157..257]).to_vec(),
            mode: u32::try_from(mode & 0o7777).unwrap_or(0),
            size: number(&block[124..136], "its size")?,
            sparse: Vec::new(),
            sparse_size: 0,
            sparse_extended: false,
        };
        if kind == Kind::OldSparse {
            header.sparse = segments(&block[386..482])?;
            header.sparse_extended = block[482] != 0;
            header.sparse_size = number(&block[483..495], "its real size")?;
        }
        Ok(header)
    }
}

/// The segments of an extension block of an old sparse file, and whether another one follows.
pub(super) fn sparse_extension(block: &[u8; BLOCK]) -> Result<(Vec<Segment>, bool), String> {
    Ok((segments(&block[..504])?, block[504] != 0))
}

fn segments(bytes: &[u8]) -> Result<Vec<Segment>, String> {
    let mut segments = Vec::new();
    for pair in bytes.chunks_exact(24) {
        // An empty one ends the list.
        if pair[0] == 0 || pair[12] == 0 {
            break;
        }
        segments.push(Segment {
            offset: number(&pair[..12], "the offset of a sparse segment")?,
            length: number(&pair[12..], "the length of a sparse segment")?,
        });
    }
    Ok(segments)
}

/// Up to the first NUL.
fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|byte| *byte == 0);
    &field[..end.unwrap_or(field.len())]
}

/// A number: octal digits, or binary when the first bit is set.
fn number(field: &[u8], what: &str) -> Result<u64, String> {
    match field[0] {
        0xff => Err(format!("{what} is negative")),
        first if first & 0x80 != 0 => {
            let mut value = u64::from(first & 0x7f);
            for byte in &field[1..] {
                if value >> 56 != 0 {
                    return Err(format!("{what} is larger than 64 bits"));
                }
                value = value << 8 | u64::from(*byte);
            }
            Ok(value)
        }
        _ => octal(field, what),
    }
}

/// Octal digits with spaces before, and NULs or spaces after them; an empty field is 0.
fn octal(field: &[u8], what: &str) -> Result<u64, String> {
    let start = field.iter().position(|byte| *byte != b' ');
    let digits = &field[start.unwrap_or(field.len())..];
    let end = digits
        .iter()
        .position(|byte| matches!(byte, 0 | b' '))
        .unwrap_or(digits.len());
    let mut value = 0_u64;
    for digit in &digits[..end] {
        if !(b'0'..=b'7').contains(digit) {
            return Err(format!("{what} is not an octal number"));
        }
        value = value
            .checked_mul(8)
            .and_then(|value| value.checked_add(u64::from(digit - b'0')))
            .ok_or_else(|| format!("{what} is larger than 64 bits"))?;
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        let check = |field: &[u8], expected: Result<u64, &str>| {
            assert_eq!(
                number(field, "n"),
                expected.map_err(str::to_owned),
                "{field:?}"
            );
        };
        check(b"0000644\0", Ok(0o644));
        check(b"   644 \0", Ok(0o644));
        check(b"00000001000", Ok(0o1000));
        check(&[0; 8], Ok(0));
        check(b"       \0", Ok(0));
        check(&[0x80, 0, 0, 0, 0, 0, 1, 0], Ok(256));
        check(
            &[
                0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
            ],
            Ok(u64::MAX),
        );
        check(
            &[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            Err("n is larger than 64 bits"),
        );
        check(&[0xff; 12], Err("n is negative"));
        check(b"0000689\0", Err("n is not an octal number"));
        check(b"-000644\0", Err("n is not an octal number"));
    }
}
