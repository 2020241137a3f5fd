//! Extended headers of pax: records `length keyword=value` that go before an entry.
//!
//! Records that change an entry's name, link target, size or content are applied, or the archive is refused. Others (times,
//! owners, comments, extended attributes) describe what is not unpacked.

use crate::refusal::Reason;

use super::sparse::{self, Segment, SparseMap};

/// What the records before one entry state.
#[derive(Default)]
pub(super) struct Pax {
    path: Option<Vec<u8>>,
    linkpath: Option<Vec<u8>>,
    size: Option<u64>,
    sparse: Sparse,
}

/// Records of GNU's sparse files, versions 0.0, 0.1 and 1.0.
#[derive(Default)]
struct Sparse {
    any: bool,
    major: Option<u64>,
    minor: Option<u64>,
    name: Option<Vec<u8>>,
    real_size: Option<u64>,
    size: Option<u64>,
    count: Option<u64>,
    /// Version 0.1: the whole map.
    map: Option<Vec<Segment>>,
    /// Version 0.0: the map, a record for each number.
    list: Vec<Segment>,
    offset: Option<u64>,
}

fn broken(why: impl Into<String>) -> Reason {
    Reason::Broken {
        format: "the tar archive",
        why: why.into(),
    }
}

/// Calls `each` with every record.
fn records(
    content: &[u8],
    mut each: impl FnMut(&str, &[u8]) -> Result<(), Reason>,
) -> Result<(), Reason> {
    let mut rest = content;
    while !rest.is_empty() {
        let malformed = || broken("a pax header contains a malformed record");
        let space = rest
            .iter()
            .take(20)
            .position(|byte| *byte == b' ')
            .ok_or_else(malformed)?;
        let length = sparse::decimal(&rest[..space]).map_err(|_| malformed())?;
        let length = usize::try_from(length).map_err(|_| malformed())?;
        if length <= space + 1 || length > rest.len() || rest[length - 1] != b'\n' {
            return Err(malformed());
        }
        let record = &rest[space + 1..length - 1];
        let equals = record
            .iter()
            .position(|byte| *byte == b'=')
            .ok_or_else(malformed)?;
        let keyword = std::str::from_utf8(&record[..equals]).map_err(|_| malformed())?;
        each(keyword, &record[equals + 1..])?;
        rest = &rest[length..];
    }
    Ok(())
}

/// Refuses a global header that would change names, sizes or content of all entries behind it.
pub(super) fn check_global(content: &[u8]) -> Result<(), Reason> {
    records(content, |keyword, _| {
        let changes = matches!(keyword, "path" | "linkpath" | "size")
            || keyword.starts_with("GNU.sparse.")
            || refused(keyword);
        if changes {
            return Err(Reason::Unsupported {
                what: format!("the record `{keyword}` in a global pax header"),
                remedy: "pack the archive again without it",
            });
        }
        Ok(())
    })
}

/// Records that change content in a way that is not supported: sparse files of other programs, parts of several volumes.
fn refused(keyword: &str) -> bool {
    matches!(keyword, "SCHILY.realsize" | "SUN.holesdata")
        || keyword.starts_with("GNU.volume.")
        || keyword.starts_with("GNU.dumpdir")
}

impl Pax {
    /// Adds the records of a header. The last record of a keyword applies.
    pub(super) fn add(&mut self, content: &[u8]) -> Result<(), Reason> {
        records(content, |keyword, value| self.record(keyword, value))
    }

    fn record(&mut self, keyword: &str, value: &[u8]) -> Result<(), Reason> {
        let number = || {
            sparse::decimal(value)
                .map_err(|_| broken(format!("the pax record `{keyword}` is not a number")))
        };
        let name = || {
            if value.is_empty() || value.contains(&0) {
                Err(broken(format!(
                    "the pax record `{keyword}` is empty or contains a NUL byte"
                )))
            } else {
                Ok(Some(value.to_vec()))
            }
        };
        match keyword {
            "path" => self.path = name()?,
            "linkpath" => self.linkpath = name()?,
            "size" => self.size = Some(number()?),
            _ if refused(keyword) => {
                return Err(Reason::Unsupported {
                    what: format!("the pax record `{keyword}`"),
                    remedy: "pack the archive with GNU tar or bsdtar",
                });
            }
            _ => {
                if let Some(key) = keyword.strip_prefix("GNU.sparse.") {
                    self.sparse.any = true;
                    match key {
                        "major" => self.sparse.major = Some(number()?),
                        "minor" => self.sparse.minor = Some(number()?),
                        "name" => self.sparse.name = name()?,
                        "realsize" => self.sparse.real_size = Some(number()?),
                        "size" => self.sparse.size = Some(number()?),
                        "numblocks" => self.sparse.count = Some(number()?),
                        "map" => self.sparse.map = Some(map(value)?),
                        "offset" => {
                            let offset = number()?;
                            if self.sparse.offset.replace(offset).is_some() {
                                return Err(broken("a sparse segment has no length"));
                            }
                        }
                        "numbytes" => {
                            let length = number()?;
                            let offset = self.sparse.offset.take();
                            let offset =
                                offset.ok_or_else(|| broken("a sparse segment has no offset"))?;
                            if self.sparse.list.len() >= sparse::MAX_SEGMENTS {
                                return Err(broken(sparse::TOO_MANY));
                            }
                            self.sparse.list.push(Segment { offset, length });
                        }
                        _ => {
                            return Err(Reason::Unsupported {
                                what: format!("the pax record `{keyword}`"),
                                remedy: "pack the archive with GNU tar or bsdtar",
                            });
                        }
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn path(&self) -> Option<&[u8]> {
        self.path.as_deref()
    }

    pub(super) fn linkpath(&self) -> Option<&[u8]> {
        self.linkpath.as_deref()
    }

    pub(super) const fn size(&self) -> Option<u64> {
        self.size
    }

    /// The name of a sparse file, which goes before its `path`.
    pub(super) fn sparse_name(&self) -> Option<&[u8]> {
        self.sparse.name.as_deref()
    }

    pub(super) const fn is_sparse(&self) -> bool {
        self.sparse.any
    }

    /// The size of a sparse file with its holes.
    pub(super) fn sparse_size(&self) -> Result<u64, Reason> {
        match (self.sparse.real_size, self.sparse.size) {
            (Some(one), Some(other)) if one != other => {
                Err(broken("a sparse file has two different sizes"))
            }
            (Some(size), _) | (None, Some(size)) => Ok(size),
            (None, None) => Err(broken("the size of a sparse file is missing")),
        }
    }

    /// The map, if it is in the header; `None` when it goes before the data (version 1.0).
    pub(super) fn sparse_map(&self) -> Result<Option<SparseMap>, Reason> {
        let sparse = &self.sparse;
        match (sparse.major, sparse.minor) {
            (Some(1), Some(0)) => {
                if sparse.map.is_some() || !sparse.list.is_empty() {
                    return Err(broken("a sparse file has two maps"));
                }
                return Ok(None);
            }
            (None, None) | (Some(0), Some(0 | 1)) => {}
            (major, minor) => {
                let part = |number: Option<u64>| number.map_or("?".to_owned(), |n| n.to_string());
                return Err(Reason::Unsupported {
                    what: format!("sparse format {}.{}", part(major), part(minor)),
                    remedy: "pack the archive without sparse files",
                });
            }
        }
        if sparse.offset.is_some() {
            return Err(broken("a sparse segment has no length"));
        }
        let segments = match (&sparse.map, &sparse.list) {
            (Some(map), list) if list.is_empty() => map,
            (None, list) => list,
            (Some(_), _) => return Err(broken("a sparse file has two maps")),
        };
        if sparse
            .count
            .is_none_or(|count| count != segments.len() as u64)
        {
            return Err(broken("the map of a sparse file is not complete"));
        }
        let mut map = SparseMap::new(self.sparse_size()?);
        for segment in segments {
            map.push(*segment).map_err(broken)?;
        }
        Ok(Some(map))
    }
}

/// `offset,length,offset,length…`
fn map(value: &[u8]) -> Result<Vec<Segment>, Reason> {
    let malformed = || broken("the map of a sparse file is malformed");
    if value.is_empty() {
        return Ok(Vec::new());
    }
    let mut numbers = value
        .split(|byte| *byte == b',')
        .map(|number| sparse::decimal(number).map_err(|_| malformed()));
    let mut segments = Vec::new();
    while let Some(offset) = numbers.next() {
        let length = numbers.next().ok_or_else(malformed)?;
        if segments.len() >= sparse::MAX_SEGMENTS {
            return Err(broken(sparse::TOO_MANY));
        }
        segments.push(Segment {
            offset: offset?,
            length: length?,
        });
    }
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(keyword: &str, value: &str) -> Vec<u8> {
        let rest = format!(" {keyword}={value}\n");
        let mut length = rest.len();
        while length != rest.len() + length.to_string().len() {
            length = rest.len() + length.to_string().len();
        }
        format!("{length}{rest}").into_bytes()
    }

    #[test]
    fn records_apply_or_are_refused() {
        let pax = |records: &[(&str, &str)]| {
            let content: Vec<u8> = records.iter().flat_map(|(k, v)| record(k, v)).collect();
            let mut pax = Pax::default();
            pax.add(&content).map(|()| pax)
        };
        let found = pax(&[
            ("path", "a"),
            ("mtime", "1.5"),
            ("path", "b=c\nd"),
            ("size", "7"),
        ])
        .ok();
        let found = found.expect("these are records");
        assert_eq!(
            (found.path(), found.size()),
            (Some(&b"b=c\nd"[..]), Some(7))
        );
        for bad in [
            &[("size", "-1")][..],
            &[("size", "99999999999999999999")],
            &[("path", "")],
            &[("path", "a\0b")],
            &[("SUN.holesdata", " 1 2")],
            &[("SCHILY.realsize", "5")],
            &[("GNU.sparse.new", "5")],
            &[("GNU.sparse.numbytes", "5")],
            &[("GNU.sparse.map", "1,2,3")],
        ] {
            assert!(pax(bad).is_err(), "{bad:?}");
        }
        for bad in [
            &b"5 a=b\n"[..],
            b"7 a=b\n",
            b"x a=b\n",
            b"6 a=bc",
            b"4 a\n",
            b"0 \n",
            b"6 ab\n\n",
        ] {
            assert!(Pax::default().add(bad).is_err(), "{bad:?}");
        }
        assert!(check_global(&record("comment", "0a1b")).is_ok());
        assert!(check_global(&record("path", "all")).is_err());
    }
}
