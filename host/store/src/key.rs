//! Keys and prefixes of the store.
//!
//! Owns the rules of a key: 1 to [`KEY_MAX_BYTES`] bytes, the first of them not zero (rows of the back ends
//! themselves live there), segments joined by `/`, the tenant first: `default/order/0192…/node/3`.
//! It does not know which kinds of record there are: the layers above own their segments.

use std::fmt;

use bytes::Bytes;

use crate::error::LimitError;

/// Longest key, in bytes (*fixed*: design, "Data: one ordered key-value store with revisions").
pub const KEY_MAX_BYTES: usize = 512;

/// Stands between the segments of a key.
pub const SEPARATOR: u8 = b'/';

/// Names one row. Cheap to clone. Keys sort by their bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Bytes);

impl Key {
    /// Takes bytes as they are.
    ///
    /// # Errors
    /// [`LimitError::KeyEmpty`], [`LimitError::KeyTooLong`], [`LimitError::KeyReserved`].
    pub fn new(bytes: impl Into<Bytes>) -> Result<Self, LimitError> {
        let bytes = bytes.into();
        check_bytes(&bytes)?;
        if bytes.is_empty() {
            return Err(LimitError::KeyEmpty);
        }
        Ok(Self(bytes))
    }

    /// Joins segments with `/`: `["default", "order", "o1"]` gives `default/order/o1`.
    ///
    /// # Errors
    /// Those of [`Key::new`], and [`LimitError::SegmentEmpty`], [`LimitError::SegmentHasSeparator`].
    pub fn from_segments<S: AsRef<str>>(
        segments: impl IntoIterator<Item = S>,
    ) -> Result<Self, LimitError> {
        Self::new(join(segments)?)
    }

    /// This key with one more segment.
    ///
    /// # Errors
    /// Those of [`Key::from_segments`].
    pub fn child(&self, segment: impl AsRef<str>) -> Result<Self, LimitError> {
        let mut bytes = self.0.to_vec();
        bytes.push(SEPARATOR);
        push_segment(&mut bytes, segment.as_ref())?;
        Self::new(bytes)
    }

    /// The prefix of everything below this key: `default/order/o1` gives `default/order/o1/`.
    #[must_use]
    pub fn below(&self) -> Prefix {
        let mut bytes = self.0.to_vec();
        bytes.push(SEPARATOR);
        Prefix(bytes.into())
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes without a copy.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }

    /// The key as text; `None` when it is not UTF-8.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }

    /// The segments of a key that is text; none for one that is not UTF-8.
    pub fn segments(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.as_str()
            .into_iter()
            .flat_map(|text| text.split(SEPARATOR as char))
    }

    /// For rows that a back end read from its own files, where the rules were checked when they were written.
    pub(crate) fn trusted(bytes: Bytes) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

/// Names all rows whose keys start with it. Ends with `/` unless made from raw bytes, so that the rows of
/// `order/1` do not show those of `order/10`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Prefix(Bytes);

impl Prefix {
    /// Every row of every tenant: for backups.
    #[must_use]
    pub const fn everything() -> Self {
        Self(Bytes::new())
    }

    /// `["default", "order"]` gives `default/order/`.
    ///
    /// # Errors
    /// Those of [`Key::from_segments`].
    pub fn from_segments<S: AsRef<str>>(
        segments: impl IntoIterator<Item = S>,
    ) -> Result<Self, LimitError> {
        let mut bytes = join(segments)?;
        if !bytes.is_empty() {
            bytes.push(SEPARATOR);
        }
        Self::from_bytes(bytes)
    }

    /// Takes bytes as they are, with no separator added.
    ///
    /// # Errors
    /// [`LimitError::KeyTooLong`], [`LimitError::KeyReserved`].
    pub fn from_bytes(bytes: impl Into<Bytes>) -> Result<Self, LimitError> {
        let bytes = bytes.into();
        check_bytes(&bytes)?;
        Ok(Self(bytes))
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    #[must_use]
    pub fn contains(&self, key: &Key) -> bool {
        key.as_bytes().starts_with(&self.0)
    }

    /// The first byte string after every key of this prefix; `None` when there is none.
    pub(crate) fn end(&self) -> Option<Vec<u8>> {
        let mut end = self.0.to_vec();
        while let Some(last) = end.pop() {
            if last < u8::MAX {
                end.push(last + 1);
                return Some(end);
            }
        }
        None
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Prefix({self})")
    }
}

/// A number as a segment that sorts like the number: 20 decimal digits with leading zeros.
#[must_use]
pub fn sortable(number: u64) -> String {
    format!("{number:020}")
}

fn check_bytes(bytes: &[u8]) -> Result<(), LimitError> {
    if bytes.len() > KEY_MAX_BYTES {
        return Err(LimitError::KeyTooLong {
            start: bytes[..48].escape_ascii().to_string(),
            found_bytes: bytes.len(),
            limit_bytes: KEY_MAX_BYTES,
        });
    }
    if bytes.first() == Some(&0) {
        return Err(LimitError::KeyReserved);
    }
    Ok(())
}

fn join<S: AsRef<str>>(segments: impl IntoIterator<Item = S>) -> Result<Vec<u8>, LimitError> {
    let mut bytes = Vec::with_capacity(96);
    for segment in segments {
        if !bytes.is_empty() {
            bytes.push(SEPARATOR);
        }
        push_segment(&mut bytes, segment.as_ref())?;
    }
    Ok(bytes)
}

fn push_segment(bytes: &mut Vec<u8>, segment: &str) -> Result<(), LimitError> {
    if segment.is_empty() {
        return Err(LimitError::SegmentEmpty);
    }
    if segment.as_bytes().contains(&SEPARATOR) {
        return Err(LimitError::SegmentHasSeparator {
            segment: segment.chars().take(64).collect(),
        });
    }
    bytes.extend_from_slice(segment.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_make_keys_and_come_back() {
        let key = Key::from_segments(["default", "order", "o1"]).unwrap();
        assert_eq!(key.as_str(), Some("default/order/o1"));
        assert_eq!(
            key.segments().collect::<Vec<_>>(),
            ["default", "order", "o1"]
        );
        assert_eq!(
            key.child("node").unwrap().as_str(),
            Some("default/order/o1/node")
        );
        let below = key.below();
        assert!(below.contains(&key.child("x").unwrap()));
        assert!(!below.contains(&Key::from_segments(["default", "order", "o10"]).unwrap()));
    }

    #[test]
    fn wrong_keys_are_refused_by_name() {
        assert_eq!(Key::new(""), Err(LimitError::KeyEmpty));
        assert_eq!(Key::new(vec![0, 1]), Err(LimitError::KeyReserved));
        assert!(Key::new(vec![b'k'; KEY_MAX_BYTES]).is_ok());
        assert!(matches!(
            Key::new(vec![b'k'; KEY_MAX_BYTES + 1]),
            Err(LimitError::KeyTooLong {
                found_bytes: 513,
                limit_bytes: 512,
                ..
            })
        ));
        assert_eq!(Key::from_segments(["a", ""]), Err(LimitError::SegmentEmpty));
        assert!(matches!(
            Key::from_segments(["a", "b/c"]),
            Err(LimitError::SegmentHasSeparator { .. })
        ));
    }

    #[test]
    fn the_end_of_a_prefix_follows_all_its_keys() {
        let check = |prefix: &[u8], end: Option<&[u8]>| {
            let prefix = Prefix::from_bytes(prefix.to_vec()).unwrap();
            assert_eq!(prefix.end().as_deref(), end);
        };
        check(b"ab/", Some(b"ab0"));
        check(b"a\xff", Some(b"b"));
        check(b"\xff\xff", None);
        check(b"", None);
    }

    #[test]
    fn sortable_numbers_sort() {
        assert!(sortable(9) < sortable(10));
        assert_eq!(sortable(u64::MAX).len(), 20);
    }
}
