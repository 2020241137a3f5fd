//! The judge: which entries an archive may have, together. Accepted entries go to a [`Sink`], in an order in which they can
//! be created.
//!
//! Keeps a model of the tree that the archive describes: one node for each path. What an archive means never depends on
//! the file system it is unpacked to.
//!
//! - Every path appears once. A directory may appear again: its last mode applies.
//! - Nothing is created below a file or through a link.
//! - Links stay inside: by their text when they are read, and by following all links of the model at the end. A link to a
//!   path that the archive does not contain is allowed.
//! - A hard link whose target follows later is created at the end. A hard link to a symbolic link becomes a symbolic link
//!   with the same target.
//! - Set-user-id, set-group-id and sticky bits are dropped from directories; files with the first two are refused.

use std::{collections::HashMap, convert::Infallible, rc::Rc};

use crate::{
    Limits,
    path::{EntryPath, MAX_PATH_BYTES},
    refusal::{ReadError, Reason, Refusal, Stop, shown},
};

/// Growth is judged only beyond this size.
const RATIO_FREE_BYTES: u64 = 1 << 20;
/// All names of an archive together: what the model of the tree keeps in memory.
const MAX_NAMES_BYTES: u64 = 32 << 20;
/// Steps to resolve all links.
const MAX_LINK_STEPS: u64 = 20_000_000;
/// Links followed for one path, as in the kernel.
const MAX_LINKS_FOLLOWED: u32 = 40;
/// The node of the archive's root.
const ROOT: u32 = 0;

/// Receives the accepted entries. Every parent directory is created before what is below it.
pub trait Sink {
    /// Why it cannot go on.
    type Error;

    /// Creates a directory.
    ///
    /// # Errors
    /// When it cannot be created.
    fn directory(&mut self, path: &EntryPath) -> Result<(), Self::Error>;

    /// Creates a file with these permission bits (at most 0o777) and this content.
    ///
    /// # Errors
    /// Those of `content`, and [`ReadError::Sink`] when the file cannot be created or written.
    fn file(
        &mut self,
        path: &EntryPath,
        mode: u32,
        content: &mut FileContent<'_>,
    ) -> Result<(), ReadError<Self::Error>>;

    /// Creates a symbolic link.
    ///
    /// # Errors
    /// When it cannot be created.
    fn symlink(&mut self, path: &EntryPath, target: &str) -> Result<(), Self::Error>;

    /// Creates a second name for a file that was created before.
    ///
    /// # Errors
    /// When it cannot be created.
    fn hard_link(&mut self, path: &EntryPath, target: &EntryPath) -> Result<(), Self::Error>;

    /// Sets a directory's permission bits (at most 0o777), after everything was created.
    ///
    /// # Errors
    /// When they cannot be set.
    fn directory_mode(&mut self, path: &EntryPath, mode: u32) -> Result<(), Self::Error>;
}

/// A sink that creates nothing: for archives that are only examined.
#[derive(Debug, Clone, Copy)]
pub struct Discard;

impl Sink for Discard {
    type Error = Infallible;

    fn directory(&mut self, _path: &EntryPath) -> Result<(), Infallible> {
        Ok(())
    }

    fn file(
        &mut self,
        _path: &EntryPath,
        _mode: u32,
        content: &mut FileContent<'_>,
    ) -> Result<(), ReadError<Infallible>> {
        while content.next()?.is_some() {}
        Ok(())
    }

    fn symlink(&mut self, _path: &EntryPath, _target: &str) -> Result<(), Infallible> {
        Ok(())
    }

    fn hard_link(&mut self, _path: &EntryPath, _target: &EntryPath) -> Result<(), Infallible> {
        Ok(())
    }

    fn directory_mode(&mut self, _path: &EntryPath, _mode: u32) -> Result<(), Infallible> {
        Ok(())
    }
}

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// The next bytes.
    Data(&'a [u8]),
    /// So many zero bytes that need no space on a disk.
    Hole(u64),
}

/// Where a reader of a format gets a file's content from.
pub(crate) trait Pieces {
    /// The next piece; `None` at the end.
    fn next(&mut self) -> Result<Option<Piece<'_>>, Stop>;
}

/// The content of one file, piece by piece, counted against the limits.
pub struct FileContent<'a> {
    pieces: &'a mut dyn Pieces,
    budget: &'a mut Budget,
    ended: bool,
}

impl FileContent<'_> {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// [`ReadError::Refused`] when the content is damaged or exceeds a limit; [`ReadError::Source`].
    #[expect(
        clippy::should_implement_trait,
        reason = "pieces borrow the reader's buffer, which an iterator's items cannot"
    )]
    pub fn next<E>(&mut self) -> Result<Option<Piece<'_>>, ReadError<E>> {
        if self.ended {
            return Ok(None);
        }
        let Some(piece) = self.pieces.next()? else {
            self.ended = true;
            return Ok(None);
        };
        match piece {
            Piece::Data(data) => self.budget.spend(data.len() as u64)?,
            Piece::Hole(bytes) => self.budget.spend_hole(bytes)?,
        }
        Ok(Some(piece))
    }
}

/// What an accepted archive contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of all files, holes included.
    pub bytes: u64,
}

/// What may still be unpacked.
pub(crate) struct Budget {
    limits: Limits,
    /// The archive's size, or an upper bound.
    packed: u64,
    /// Content without holes.
    dense: u64,
    /// Content with holes.
    bytes: u64,
    entries: u64,
    names: u64,
}

impl Budget {
    fn entry(&mut self, name_bytes: usize) -> Result<(), Refusal> {
        self.entries += 1;
        let limit = self.limits.entries;
        if self.entries > limit {
            return Err(Refusal::whole(Reason::TooMany { limit }));
        }
        self.names += name_bytes as u64;
        if self.names > MAX_NAMES_BYTES {
            let limit = MAX_NAMES_BYTES;
            return Err(Refusal::whole(Reason::Names { limit }));
        }
        Ok(())
    }

    fn spend(&mut self, bytes: u64) -> Result<(), Refusal> {
        self.dense = self.dense.saturating_add(bytes);
        self.check_ratio(self.packed)?;
        self.spend_hole(bytes)
    }

    fn spend_hole(&mut self, bytes: u64) -> Result<(), Refusal> {
        self.bytes = self.bytes.saturating_add(bytes);
        let limit = self.limits.bytes;
        if self.bytes > limit {
            return Err(Refusal::whole(Reason::TooLarge { limit }));
        }
        Ok(())
    }

    fn check_ratio(&self, packed: u64) -> Result<(), Refusal> {
        let limit = self.limits.ratio;
        if self.dense > RATIO_FREE_BYTES && self.dense > packed.saturating_mul(limit) {
            return Err(Refusal::whole(Reason::Bomb { packed, limit }));
        }
        Ok(())
    }
}

#[derive(Clone)]
enum NodeKind {
    Directory {
        /// As the archive states it; `None` where the directory is only a parent of others.
        mode: Option<u32>,
    },
    File,
    Link {
        target: Rc<str>,
    },
    /// A hard link whose target is not known yet.
    HardLink {
        target: EntryPath,
    },
}

impl NodeKind {
    const fn describe(&self) -> &'static str {
        match self {
            Self::Directory { .. } => "a directory",
            Self::File => "a file",
            Self::Link { .. } => "a symbolic link",
            Self::HardLink { .. } => "a hard link",
        }
    }
}

struct Node {
    parent: u32,
    name: Rc<str>,
    kind: NodeKind,
}

/// Where a walk through the model ends.
enum Found {
    Node(u32),
    Missing,
    /// Behind this node, which is no directory.
    Behind(u32),
}

pub(crate) struct Judge<'a, S: Sink> {
    sink: &'a mut S,
    budget: Budget,
    nodes: Vec<Node>,
    index: HashMap<(u32, Rc<str>), u32>,
    /// Nodes that are symbolic links.
    links: Vec<u32>,
    /// Hard links whose target is not known yet.
    pending: Vec<u32>,
}

impl<'a, S: Sink> Judge<'a, S> {
    pub(crate) fn new(sink: &'a mut S, limits: Limits, packed: u64) -> Self {
        Self {
            sink,
            budget: Budget {
                limits,
                packed,
                dense: 0,
                bytes: 0,
                entries: 0,
                names: 0,
            },
            nodes: vec![Node {
                parent: ROOT,
                name: Rc::from(""),
                kind: NodeKind::Directory { mode: None },
            }],
            index: HashMap::new(),
            links: Vec::new(),
            pending: Vec::new(),
        }
    }

    pub(crate) const fn limits(&self) -> Limits {
        self.budget.limits
    }

    pub(crate) fn directory(&mut self, name: &str, mode: u32) -> Result<(), ReadError<S::Error>> {
        let path = parse(name)?;
        let node = self.place(&path, name, &NodeKind::Directory { mode: None })?;
        if node != ROOT {
            self.nodes[node as usize].kind = NodeKind::Directory {
                mode: Some(mode & 0o777),
            };
        }
        Ok(())
    }

    pub(crate) fn file(
        &mut self,
        name: &str,
        mode: u32,
        pieces: &mut dyn Pieces,
    ) -> Result<(), ReadError<S::Error>> {
        let path = parse(name)?;
        if mode & 0o6000 != 0 {
            return Err(Refusal::of_entry(name, Reason::SetId(mode & 0o7777)).into());
        }
        self.place(&path, name, &NodeKind::File)?;
        let mut content = FileContent {
            pieces,
            budget: &mut self.budget,
            ended: false,
        };
        let written = self
            .sink
            .file(&path, mode & 0o777, &mut content)
            .and_then(|()| {
                while content.next()?.is_some() {}
                Ok(())
            });
        written.map_err(|error| match error {
            ReadError::Refused(refusal) => ReadError::Refused(Box::new(refusal.in_entry(name))),
            ReadError::Source(_) | ReadError::Sink(_) => error,
        })
    }

    pub(crate) fn symlink(&mut self, name: &str, target: &str) -> Result<(), ReadError<S::Error>> {
        let path = parse(name)?;
        check_target(&path, target).map_err(|reason| Refusal::of_entry(name, reason))?;
        let kind = NodeKind::Link {
            target: Rc::from(target),
        };
        let node = self.place(&path, name, &kind)?;
        self.links.push(node);
        self.sink.symlink(&path, target).map_err(ReadError::Sink)
    }

    pub(crate) fn hard_link(
        &mut self,
        name: &str,
        target_name: &str,
    ) -> Result<(), ReadError<S::Error>> {
        let path = parse(name)?;
        let refuse = |reason| Refusal::of_entry(name, reason);
        let target = EntryPath::parse(target_name).map_err(|reason| {
            refuse(match reason {
                Reason::Absolute | Reason::Traversal => Reason::LinkLeaves {
                    target: shown(target_name),
                },
                Reason::Name => Reason::LinkTarget,
                reason => reason,
            })
        })?;
        let kind = match self.find(&target) {
            Found::Node(node) => match &self.nodes[node as usize].kind {
                NodeKind::Directory { .. } => {
                    let target = shown(target_name);
                    return Err(refuse(Reason::HardLinkDirectory { target }).into());
                }
                kind @ (NodeKind::File | NodeKind::Link { .. }) => kind.clone(),
                NodeKind::HardLink { .. } => NodeKind::HardLink {
                    target: target.clone(),
                },
            },
            Found::Missing => NodeKind::HardLink {
                target: target.clone(),
            },
            Found::Behind(node) => {
                let (parent, kind) = self.shown_node(node);
                return Err(refuse(Reason::BelowOther { parent, kind }).into());
            }
        };
        if let NodeKind::HardLink { target } = &kind {
            // Its name is in memory until the end.
            self.budget.names += target.as_str().len() as u64;
        }
        if let NodeKind::Link { target } = &kind {
            check_target(&path, target).map_err(refuse)?;
        }
        let node = self.place(&path, name, &kind)?;
        match kind {
            NodeKind::HardLink { .. } => self.pending.push(node),
            NodeKind::Link { target } => {
                self.links.push(node);
                self.sink.symlink(&path, &target).map_err(ReadError::Sink)?;
            }
            NodeKind::File => {
                self.sink
                    .hard_link(&path, &target)
                    .map_err(ReadError::Sink)?;
            }
            NodeKind::Directory { .. } => {}
        }
        Ok(())
    }

    /// Ends the archive, which has turned out to have `packed` bytes.
    pub(crate) fn finish(mut self, packed: u64) -> Result<Summary, ReadError<S::Error>> {
        self.budget.check_ratio(packed)?;
        self.resolve_hard_links()?;
        self.check_links()?;
        for node in 1..self.nodes.len() {
            if let NodeKind::Directory { mode: Some(mode) } = self.nodes[node].kind {
                let path = self.path_of(node_index(node));
                self.sink
                    .directory_mode(&path, mode)
                    .map_err(ReadError::Sink)?;
            }
        }
        Ok(Summary {
            entries: self.budget.entries,
            bytes: self.budget.bytes,
        })
    }

    /// Adds a node, with the directories above it.
    fn place(
        &mut self,
        path: &EntryPath,
        name: &str,
        kind: &NodeKind,
    ) -> Result<u32, ReadError<S::Error>> {
        let new_directory = matches!(kind, NodeKind::Directory { .. });
        if path.is_root() {
            return if new_directory {
                Ok(ROOT)
            } else {
                Err(Refusal::of_entry(name, Reason::Name).into())
            };
        }
        let mut at = ROOT;
        let mut end = 0;
        let whole = path.as_str();
        for part in path.parts() {
            end += part.len() + usize::from(end > 0);
            let last = end == whole.len();
            let key = (at, Rc::from(part));
            let existing = self.index.get(&key).copied();
            if let Some(node) = existing {
                let there = &self.nodes[node as usize].kind;
                let is_directory = matches!(there, NodeKind::Directory { .. });
                match (last, is_directory) {
                    (false, true) => {}
                    (false, false) => {
                        let (parent, kind) = self.shown_node(node);
                        let reason = Reason::BelowOther { parent, kind };
                        return Err(Refusal::of_entry(name, reason).into());
                    }
                    (true, true) if new_directory => {}
                    (true, true) => {
                        let reason = Reason::DirectoryAndOther(kind.describe());
                        return Err(Refusal::of_entry(name, reason).into());
                    }
                    (true, false) if new_directory => {
                        let reason = Reason::DirectoryAndOther(there.describe());
                        return Err(Refusal::of_entry(name, reason).into());
                    }
                    (true, false) => {
                        return Err(Refusal::of_entry(name, Reason::Duplicate).into());
                    }
                }
                at = node;
                continue;
            }
            self.budget
                .entry(part.len())
                .map_err(|refusal| refusal.in_entry(name))?;
            let node = node_index(self.nodes.len());
            let directory = NodeKind::Directory { mode: None };
            let (make, node_kind) = if last && !new_directory {
                (false, kind.clone())
            } else {
                (true, directory)
            };
            self.nodes.push(Node {
                parent: at,
                name: Rc::clone(&key.1),
                kind: node_kind,
            });
            self.index.insert(key, node);
            if make {
                let directory = EntryPath::from_checked(whole[..end].to_owned());
                self.sink.directory(&directory).map_err(ReadError::Sink)?;
            }
            at = node;
        }
        Ok(at)
    }

    /// Walks to a path without following links.
    fn find(&self, path: &EntryPath) -> Found {
        let mut at = ROOT;
        for part in path.parts() {
            if !matches!(self.nodes[at as usize].kind, NodeKind::Directory { .. }) {
                return Found::Behind(at);
            }
            match self.index.get(&(at, Rc::from(part))) {
                Some(node) => at = *node,
                None => return Found::Missing,
            }
        }
        Found::Node(at)
    }

    fn path_of(&self, node: u32) -> EntryPath {
        let mut parts = Vec::new();
        let mut at = node;
        while at != ROOT {
            let node = &self.nodes[at as usize];
            parts.push(&*node.name);
            at = node.parent;
        }
        parts.reverse();
        EntryPath::from_checked(parts.join("/"))
    }

    fn shown_node(&self, node: u32) -> (String, &'static str) {
        let path = shown(self.path_of(node).as_str());
        (path, self.nodes[node as usize].kind.describe())
    }

    /// Creates the hard links whose targets came after them.
    fn resolve_hard_links(&mut self) -> Result<(), ReadError<S::Error>> {
        for first in std::mem::take(&mut self.pending) {
            // The chain of hard links from this one to what they all are.
            let mut chain = Vec::new();
            let mut at = first;
            let (kind, target) = loop {
                let NodeKind::HardLink { target } = self.nodes[at as usize].kind.clone() else {
                    break (self.nodes[at as usize].kind.clone(), at);
                };
                let refuse =
                    |judge: &Self, reason| Refusal::of_entry(judge.path_of(first).as_str(), reason);
                let text = shown(target.as_str());
                // Every chain ends within the number of nodes, or never.
                if chain.len() > self.nodes.len() {
                    return Err(refuse(self, Reason::HardLinkCycle { target: text }).into());
                }
                chain.push(at);
                match self.find(&target) {
                    Found::Node(node) => at = node,
                    Found::Missing => {
                        return Err(refuse(self, Reason::HardLinkMissing { target: text }).into());
                    }
                    Found::Behind(node) => {
                        let (parent, kind) = self.shown_node(node);
                        return Err(refuse(self, Reason::BelowOther { parent, kind }).into());
                    }
                }
            };
            let target_path = self.path_of(target);
            for node in chain {
                let path = self.path_of(node);
                match &kind {
                    NodeKind::File => self.sink.hard_link(&path, &target_path),
                    NodeKind::Link { target } => {
                        check_target(&path, target)
                            .map_err(|reason| Refusal::of_entry(path.as_str(), reason))?;
                        self.links.push(node);
                        self.sink.symlink(&path, target)
                    }
                    NodeKind::Directory { .. } | NodeKind::HardLink { .. } => {
                        let target = shown(target_path.as_str());
                        let reason = Reason::HardLinkDirectory { target };
                        return Err(Refusal::of_entry(path.as_str(), reason).into());
                    }
                }
                .map_err(ReadError::Sink)?;
                self.nodes[node as usize].kind = kind.clone();
            }
        }
        Ok(())
    }

    /// Follows every symbolic link through the finished tree, as the kernel would.
    fn check_links(&self) -> Result<(), Refusal> {
        let mut steps = 0_u64;
        for link in &self.links {
            let NodeKind::Link { target } = &self.nodes[*link as usize].kind else {
                continue;
            };
            self.follow(*link, &mut steps).map_err(|why| {
                let reason = match why {
                    Lost::Leaves => Reason::LinkLeaves {
                        target: shown(target),
                    },
                    Lost::Why(why) => Reason::LinkBroken {
                        target: shown(target),
                        why,
                    },
                    Lost::Steps => Reason::LinkSteps {
                        limit: MAX_LINK_STEPS,
                    },
                };
                Refusal::of_entry(self.path_of(*link).as_str(), reason)
            })?;
        }
        Ok(())
    }

    fn follow(&self, link: u32, steps: &mut u64) -> Result<(), Lost> {
        // What is still to be walked, the next part last: targets of links that were met on the way come on top.
        let mut todo: Vec<Rc<str>> = Vec::new();
        let mut ends: Vec<usize> = Vec::new();
        let mut followed = 0;
        let mut at = self.nodes[link as usize].parent;
        let push = |target: &Rc<str>, todo: &mut Vec<Rc<str>>, ends: &mut Vec<usize>| {
            todo.push(Rc::clone(target));
            ends.push(0);
        };
        let NodeKind::Link { target } = &self.nodes[link as usize].kind else {
            return Ok(());
        };
        push(target, &mut todo, &mut ends);
        while let (Some(text), Some(from)) = (todo.last().cloned(), ends.last().copied()) {
            *steps += 1;
            if *steps > MAX_LINK_STEPS {
                return Err(Lost::Steps);
            }
            if from > text.len() {
                todo.pop();
                ends.pop();
                continue;
            }
            let rest = &text[from..];
            let part = rest.split('/').next().unwrap_or_default();
            if let Some(end) = ends.last_mut() {
                *end = from + part.len() + 1;
            }
            let NodeKind::Directory { .. } = self.nodes[at as usize].kind else {
                return Err(Lost::Why("it goes through a file"));
            };
            match part {
                "" | "." => {}
                ".." if at == ROOT => return Err(Lost::Leaves),
                ".." => at = self.nodes[at as usize].parent,
                part => {
                    let Some(node) = self.index.get(&(at, Rc::from(part))).copied() else {
                        return Ok(());
                    };
                    match &self.nodes[node as usize].kind {
                        NodeKind::Directory { .. } | NodeKind::File => at = node,
                        NodeKind::HardLink { .. } => return Ok(()),
                        NodeKind::Link { target } => {
                            followed += 1;
                            if followed > MAX_LINKS_FOLLOWED {
                                return Err(Lost::Why("the links lead to each other"));
                            }
                            push(target, &mut todo, &mut ends);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// Why a link cannot be followed.
enum Lost {
    Leaves,
    Why(&'static str),
    Steps,
}

/// Node numbers fit: the number of entries is limited far below.
fn node_index(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn parse(name: &str) -> Result<EntryPath, Refusal> {
    EntryPath::parse(name).map_err(|reason| Refusal::of_entry(name, reason))
}

/// Whether a symbolic link at `path` may have this target, by its text alone.
fn check_target(path: &EntryPath, target: &str) -> Result<(), Reason> {
    if target.is_empty() || target.contains('\0') || target.len() > MAX_PATH_BYTES {
        return Err(Reason::LinkTarget);
    }
    let leaves = || Reason::LinkLeaves {
        target: shown(target),
    };
    if target.starts_with('/') {
        return Err(leaves());
    }
    let mut depth = path.depth().saturating_sub(1);
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => depth = depth.checked_sub(1).ok_or_else(leaves)?,
            _ => depth += 1,
        }
    }
    Ok(())
}
