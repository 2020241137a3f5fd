//! Names of entries: relative, normalised, without a way out.

use std::fmt;

use crate::refusal::Reason;

/// Longest path of an entry, in bytes. With the directory that it is unpacked to it stays below the kernel's 4,096.
pub const MAX_PATH_BYTES: usize = 3072;
/// Longest name of one file or directory, in bytes: Linux's own limit.
pub const MAX_NAME_BYTES: usize = 255;
/// Most components of a path.
pub const MAX_DEPTH: usize = 128;

/// The path of an entry: one or more names joined with `/`, none of them empty, `.` or `..`. Empty only for the archive's root.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct EntryPath(String);

impl EntryPath {
    /// Normalises a name from an archive: empty components and `.` are dropped.
    ///
    /// # Errors
    /// The [`Reason`] for refusing it.
    pub fn parse(name: &str) -> Result<Self, Reason> {
        if name.is_empty() || name.contains('\0') {
            return Err(Reason::Name);
        }
        if name.starts_with('/') {
            return Err(Reason::Absolute);
        }
        let mut path = String::with_capacity(name.len().min(MAX_PATH_BYTES));
        let mut depth = 0_usize;
        for part in name.split('/') {
            match part {
                "" | "." => continue,
                ".." => return Err(Reason::Traversal),
                part => {
                    if part.len() > MAX_NAME_BYTES {
                        return Err(Reason::NameLength(part.len()));
                    }
                    depth += 1;
                    if depth > MAX_DEPTH {
                        // Counted to the end for the message.
                        continue;
                    }
                    if !path.is_empty() {
                        path.push('/');
                    }
                    path.push_str(part);
                }
            }
        }
        if depth > MAX_DEPTH {
            return Err(Reason::Depth(depth));
        }
        if path.len() > MAX_PATH_BYTES {
            return Err(Reason::PathLength(path.len()));
        }
        Ok(Self(path))
    }

    /// From components that were checked.
    pub(crate) fn from_checked(path: String) -> Self {
        Self(path)
    }

    /// The path as text, relative, without a `/` at its end.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is the archive's root.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// Its components, from the root.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').filter(|part| !part.is_empty())
    }

    /// The path of the directory that contains it, and its own name.
    #[must_use]
    pub fn split(&self) -> (&str, &str) {
        self.0.rsplit_once('/').unwrap_or(("", &self.0))
    }

    /// The number of components.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.parts().count()
    }
}

impl fmt::Display for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "." } else { &self.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_normalised_or_refused() {
        let deep = |count: usize| vec!["d"; count].join("/");
        let check = |name: &str, expected: Result<&str, Reason>| {
            let parsed = EntryPath::parse(name);
            assert_eq!(
                parsed.as_ref().map(EntryPath::as_str),
                expected.as_ref().map(|path| *path),
                "{name}"
            );
        };
        check("a", Ok("a"));
        check("./a//b/./c/", Ok("a/b/c"));
        check("./", Ok(""));
        check("a\\b", Ok("a\\b"));
        check("...", Ok("..."));
        check("", Err(Reason::Name));
        check("a\0b", Err(Reason::Name));
        check("/a", Err(Reason::Absolute));
        check("a/../b", Err(Reason::Traversal));
        check("..", Err(Reason::Traversal));
        check(&"n".repeat(255), Ok(&"n".repeat(255)));
        check(&"n".repeat(256), Err(Reason::NameLength(256)));
        check(&deep(128), Ok(&deep(128)));
        check(&deep(1500), Err(Reason::Depth(1500)));
        let long = vec!["n".repeat(250); 13].join("/");
        check(&long, Err(Reason::PathLength(long.len())));
    }
}
