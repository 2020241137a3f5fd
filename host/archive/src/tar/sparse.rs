//! Maps of sparse files: where data is, and where holes are.

/// The most segments of a map.
pub(super) const MAX_SEGMENTS: usize = 100_000;
pub(super) const TOO_MANY: &str = "the map of a sparse file has more than 100000 segments";

/// Some data of a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// Segments by rising offset, none over another.
#[derive(Debug, Clone)]
pub(super) struct SparseMap {
    size: u64,
    end: u64,
    data: u64,
    segments: Vec<Segment>,
}

/// The next part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Hole(u64),
    Data(u64),
}

/// The parts of a file, one after the other.
#[derive(Debug)]
pub(super) struct Segments {
    map: std::vec::IntoIter<Segment>,
    at: u64,
    size: u64,
    data: u64,
}

impl SparseMap {
    /// The map of a file of this size, with nothing but a hole so far.
    pub(super) const fn new(size: u64) -> Self {
        Self {
            size,
            end: 0,
            data: 0,
            segments: Vec::new(),
        }
    }

    /// The map of a file without holes.
    pub(super) fn dense(size: u64) -> Self {
        Self {
            size,
            end: size,
            data: size,
            segments: vec![Segment {
                offset: 0,
                length: size,
            }],
        }
    }

    pub(super) fn push(&mut self, segment: Segment) -> Result<(), &'static str> {
        if self.segments.len() >= MAX_SEGMENTS {
            return Err(TOO_MANY);
        }
        let end = segment
            .offset
            .checked_add(segment.length)
            .filter(|end| *end <= self.size)
            .ok_or("a segment of a sparse file is beyond its end")?;
        if segment.offset < self.end {
            return Err("the segments of a sparse file are not in order");
        }
        self.end = end;
        self.data += segment.length;
        self.segments.push(segment);
        Ok(())
    }

    /// Whether so many bytes of data are what the map describes.
    pub(super) fn check(&self, data: u64) -> Result<(), &'static str> {
        if self.data == data {
            Ok(())
        } else {
            Err("the map of a sparse file does not fit its data")
        }
    }

    pub(super) fn segments(self) -> Segments {
        Segments {
            map: self.segments.into_iter(),
            at: 0,
            size: self.size,
            data: 0,
        }
    }
}

impl Iterator for Segments {
    type Item = Part;

    fn next(&mut self) -> Option<Part> {
        if self.data > 0 {
            self.at += self.data;
            return Some(Part::Data(std::mem::take(&mut self.data)));
        }
        let next = match self.map.next() {
            Some(segment) => {
                self.data = segment.length;
                segment.offset
            }
            None if self.at < self.size => self.size,
            None => return None,
        };
        let hole = next - self.at;
        self.at = next;
        Some(Part::Hole(hole))
    }
}

/// A decimal number without sign.
pub(super) fn decimal(digits: &[u8]) -> Result<u64, &'static str> {
    const WHY: &str = "a number is malformed or larger than 64 bits";
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(WHY);
    }
    std::str::from_utf8(digits)
        .ok()
        .and_then(|digits| digits.parse().ok())
        .ok_or(WHY)
}
