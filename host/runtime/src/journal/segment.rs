//! The files of the journal: frames of compressed lines, each with a head that says what can be found in it.
//!
//! ```text
//! <first call's uuid>.calls:  frame frame frame …
//! frame:  "WCJ1"  head bytes u32  body bytes u32  crc32 of head and body   head (JSON)   body (zstd of lines)
//! ```
//! A frame is written with one append. One that a crash tore is the last of its file; it is cut off when the file is opened.
//! Readers hold the open file: a file that is replaced or removed meanwhile still answers them.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use windlass_domain::{Timestamp, id::CallId};

use super::entry::{CallFilter, CallSummary, outcome_fits};

const MAGIC: &[u8; 4] = b"WCJ1";
const HEADER_BYTES: u64 = 16;
/// A head is far smaller: a larger figure is damage.
const MAX_HEAD_BYTES: u32 = 256 * 1024;
/// Bytes of a body, compressed and not: a call holds at most a few answers of 8 MiB.
const MAX_BODY_BYTES: u32 = 256 * 1024 * 1024;
const MAX_RAW_BYTES: u64 = 512 * 1024 * 1024;
/// Extension of the files.
pub(super) const EXTENSION: &str = "calls";
/// Different plugins, functions and orders that a head names; beyond that it does not help the search.
const MAX_NAMED: usize = 64;
/// Fast, and a third to a tenth of the size for lines of JSON.
const COMPRESSION_LEVEL: i32 = 1;

/// What can be found in a frame.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Head {
    pub(super) first: CallId,
    pub(super) last: CallId,
    pub(super) from: Timestamp,
    pub(super) to: Timestamp,
    pub(super) calls: u64,
    pub(super) raw_bytes: u64,
    /// Plugin, version, function, outcome; `None`: too many to name.
    pub(super) kinds: Option<BTreeSet<(String, String, String, String)>>,
    /// Orders; `None`: too many to name.
    pub(super) orders: Option<BTreeSet<String>>,
}

impl Head {
    pub(super) fn of(first: &CallSummary) -> Self {
        Self {
            first: first.id,
            last: first.id,
            from: first.at,
            to: first.at,
            calls: 0,
            raw_bytes: 0,
            kinds: Some(BTreeSet::new()),
            orders: Some(BTreeSet::new()),
        }
    }

    pub(super) fn add(&mut self, call: &CallSummary) {
        self.first = self.first.min(call.id);
        self.last = self.last.max(call.id);
        self.from = self.from.min(call.at);
        self.to = self.to.max(call.at);
        self.calls += 1;
        let kind = (
            call.plugin.name.clone(),
            call.plugin.version.to_string(),
            call.export.name().to_owned(),
            call.outcome.clone(),
        );
        insert_bounded(&mut self.kinds, kind);
        if let Some(order) = &call.order {
            insert_bounded(&mut self.orders, order.clone());
        }
    }

    fn join(&mut self, other: &Self) {
        self.first = self.first.min(other.first);
        self.last = self.last.max(other.last);
        self.from = self.from.min(other.from);
        self.to = self.to.max(other.to);
        self.calls += other.calls;
        join_bounded(&mut self.kinds, other.kinds.as_ref());
        join_bounded(&mut self.orders, other.orders.as_ref());
    }

    /// Whether a call that the filter wants can be in this frame.
    pub(super) fn may_hold(&self, filter: &CallFilter) -> bool {
        let in_time = filter.from.is_none_or(|from| self.to >= from)
            && filter.to.is_none_or(|to| self.from < to);
        let version = filter.version.as_ref().map(ToString::to_string);
        let of_kind = self.kinds.as_ref().is_none_or(|kinds| {
            kinds.iter().any(|(plugin, has_version, export, outcome)| {
                filter.plugin.as_ref().is_none_or(|wanted| wanted == plugin)
                    && version.as_ref().is_none_or(|wanted| wanted == has_version)
                    && filter.export.is_none_or(|wanted| wanted.name() == export)
                    && filter
                        .outcome
                        .as_ref()
                        .is_none_or(|wanted| outcome_fits(wanted, outcome))
            })
        });
        let of_order = match (&filter.order, &self.orders) {
            (Some(wanted), Some(orders)) => orders.contains(wanted),
            (None, _) | (_, None) => true,
        };
        in_time && of_kind && of_order
    }
}

fn insert_bounded<T: Ord>(set: &mut Option<BTreeSet<T>>, item: T) {
    if let Some(items) = set {
        items.insert(item);
        if items.len() > MAX_NAMED {
            *set = None;
        }
    }
}

fn join_bounded<T: Ord + Clone>(set: &mut Option<BTreeSet<T>>, other: Option<&BTreeSet<T>>) {
    match other {
        None => *set = None,
        Some(other) => {
            for item in other {
                insert_bounded(set, item.clone());
            }
        }
    }
}

/// Where a frame is.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) head: Head,
    offset: u64,
    head_bytes: u32,
    body_bytes: u32,
}

/// One file of the journal, open.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) path: PathBuf,
    file: Arc<File>,
    pub(super) frames: Vec<Arc<Frame>>,
    pub(super) bytes: u64,
}

impl Segment {
    /// A new file, named after its first call.
    pub(super) fn create(dir: &Path, first: CallId) -> io::Result<Self> {
        let path = path_of(dir, first.uuid());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        Ok(Self {
            path,
            file: Arc::new(file),
            frames: Vec::new(),
            bytes: 0,
        })
    }

    /// An existing file: reads the heads, and cuts off what was not written whole.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let length = file.metadata()?.len();
        let mut segment = Self {
            path: path.to_owned(),
            file: Arc::new(file),
            frames: Vec::new(),
            bytes: 0,
        };
        while let Some(frame) = segment.frame_at(segment.bytes, length)? {
            segment.bytes = frame.end();
            segment.frames.push(Arc::new(frame));
        }
        // The last frame alone can have its length and not its bytes.
        if let Some(last) = segment.frames.last().cloned()
            && segment.body(&last).is_err()
        {
            segment.frames.pop();
            segment.bytes = last.offset;
        }
        if segment.bytes < length {
            tracing::warn!(
                file = %path.display(),
                bytes = length - segment.bytes,
                "the end of a file of the call journal was not written whole and is cut off"
            );
            segment.file.set_len(segment.bytes)?;
        }
        Ok(segment)
    }

    fn frame_at(&self, offset: u64, length: u64) -> io::Result<Option<Frame>> {
        let mut header = [0; HEADER_BYTES as usize];
        if offset + HEADER_BYTES > length {
            return Ok(None);
        }
        self.file.read_exact_at(&mut header, offset)?;
        let figure = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (head_bytes, body_bytes) = (figure(4), figure(8));
        let end = offset + HEADER_BYTES + u64::from(head_bytes) + u64::from(body_bytes);
        if !header.starts_with(MAGIC)
            || head_bytes > MAX_HEAD_BYTES
            || body_bytes > MAX_BODY_BYTES
            || end > length
        {
            return Ok(None);
        }
        let mut head = vec![0; head_bytes as usize];
        self.file.read_exact_at(&mut head, offset + HEADER_BYTES)?;
        Ok(serde_json::from_slice(&head).ok().map(|head| Frame {
            head,
            offset,
            head_bytes,
            body_bytes,
        }))
    }

    /// Appends a frame of lines. After an error the file is as it was before.
    pub(super) fn append(&mut self, head: &Head, lines: &[u8]) -> io::Result<()> {
        let mut head = head.clone();
        head.raw_bytes = lines.len() as u64;
        let head_json = serde_json::to_vec(&head)?;
        let body = zstd::bulk::compress(lines, COMPRESSION_LEVEL)?;
        let too_large = || io::Error::other("a frame of the call journal is too large");
        let head_bytes = u32::try_from(head_json.len()).map_err(|_| too_large())?;
        let body_bytes = u32::try_from(body.len()).map_err(|_| too_large())?;
        if head_bytes > MAX_HEAD_BYTES || body_bytes > MAX_BODY_BYTES {
            return Err(too_large());
        }
        let mut frame = Vec::with_capacity(HEADER_BYTES as usize + head_json.len() + body.len());
        frame.extend_from_slice(MAGIC);
        frame.extend_from_slice(&head_bytes.to_le_bytes());
        frame.extend_from_slice(&body_bytes.to_le_bytes());
        frame.extend_from_slice(&checksum(&head_json, &body).to_le_bytes());
        frame.extend_from_slice(&head_json);
        frame.extend_from_slice(&body);
        if let Err(error) = self.file.write_all_at(&frame, self.bytes) {
            self.file.set_len(self.bytes)?;
            return Err(error);
        }
        self.frames.push(Arc::new(Frame {
            head,
            offset: self.bytes,
            head_bytes,
            body_bytes,
        }));
        self.bytes += frame.len() as u64;
        Ok(())
    }

    /// The lines of a frame.
    pub(super) fn body(&self, frame: &Frame) -> io::Result<Vec<u8>> {
        let damaged = |what: &str| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{}: {what} at byte {}", self.path.display(), frame.offset),
            )
        };
        let mut checked = [0; 4];
        self.file.read_exact_at(&mut checked, frame.offset + 12)?;
        let mut bytes = vec![0; frame.head_bytes as usize + frame.body_bytes as usize];
        self.file
            .read_exact_at(&mut bytes, frame.offset + HEADER_BYTES)?;
        let (head, body) = bytes.split_at(frame.head_bytes as usize);
        if checksum(head, body) != u32::from_le_bytes(checked) {
            return Err(damaged("a frame does not have its checksum"));
        }
        if frame.head.raw_bytes > MAX_RAW_BYTES {
            return Err(damaged("a frame is too large"));
        }
        let raw_bytes = usize::try_from(frame.head.raw_bytes).unwrap_or(usize::MAX);
        zstd::bulk::decompress(body, raw_bytes)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// When its youngest call ended.
    pub(super) fn youngest(&self) -> Option<Timestamp> {
        self.frames.iter().map(|frame| frame.head.to).max()
    }

    pub(super) fn first(&self) -> Option<CallId> {
        self.frames.first().map(|frame| frame.head.first)
    }

    pub(super) fn last(&self) -> Option<CallId> {
        self.frames.last().map(|frame| frame.head.last)
    }

    /// A reader's view: the same open file, the frames that are there now.
    pub(super) fn snapshot(&self) -> Self {
        Self {
            path: self.path.clone(),
            file: Arc::clone(&self.file),
            frames: self.frames.clone(),
            bytes: self.bytes,
        }
    }
}

impl Frame {
    fn end(&self) -> u64 {
        self.offset + HEADER_BYTES + u64::from(self.head_bytes) + u64::from(self.body_bytes)
    }
}

fn checksum(head: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(body);
    hasher.finalize()
}

fn path_of(dir: &Path, first: Uuid) -> PathBuf {
    dir.join(format!("{}.{EXTENSION}", first.as_simple()))
}

/// Writes the frames of neighbouring files that hold calls of `oldest` or later into one file with frames of about
/// `frame_bytes`, in place of the first of them; the others are removed. A crash between leaves files whose calls are in the first one too: [`open_all`] removes those.
pub(super) fn merge(
    dir: &Path,
    segments: &[Arc<Segment>],
    frame_bytes: usize,
    oldest: Timestamp,
) -> io::Result<Option<Segment>> {
    let Some(first) = segments.first().and_then(|segment| segment.first()) else {
        return Ok(None);
    };
    let temporary = dir.join(".merging");
    let mut merged = Segment {
        path: temporary.clone(),
        file: Arc::new(
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?,
        ),
        frames: Vec::new(),
        bytes: 0,
    };
    let mut lines: Vec<u8> = Vec::new();
    let mut head: Option<Head> = None;
    for segment in segments {
        for frame in segment
            .frames
            .iter()
            .filter(|frame| frame.head.to >= oldest)
        {
            lines.extend_from_slice(&segment.body(frame)?);
            match &mut head {
                Some(head) => head.join(&frame.head),
                None => head = Some(frame.head.clone()),
            }
            if lines.len() >= frame_bytes
                && let Some(head) = head.take()
            {
                merged.append(&head, &lines)?;
                lines.clear();
            }
        }
    }
    if let Some(head) = head {
        merged.append(&head, &lines)?;
    }
    merged.sync()?;
    let path = path_of(dir, first.uuid());
    fs::rename(&temporary, &path)?;
    merged.path = path;
    sync_directory(dir)?;
    for segment in &segments[1..] {
        fs::remove_file(&segment.path)?;
    }
    Ok(Some(merged))
}

pub(super) fn sync_directory(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Opens every file of the journal, oldest first. What a merge left over is removed; a file that is damaged from its start on is
/// named in the log and left alone.
pub(super) fn open_all(dir: &Path) -> io::Result<Vec<Arc<Segment>>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|found| found == EXTENSION));
    paths.sort();
    let mut segments: Vec<Arc<Segment>> = Vec::new();
    for path in paths {
        let segment = match Segment::open(&path) {
            Ok(segment) => segment,
            Err(error) => {
                tracing::error!(file = %path.display(), "a file of the call journal cannot be read: {error}");
                continue;
            }
        };
        let merged_already = segments
            .last()
            .and_then(|before| before.last())
            .zip(segment.last())
            .is_some_and(|(before, last)| last <= before);
        if segment.frames.is_empty() || merged_already {
            fs::remove_file(&path)?;
            continue;
        }
        segments.push(Arc::new(segment));
    }
    Ok(segments)
}

/// Writes nothing, and says whether the directory can be written: the journal's directory is made private.
pub(super) fn make_directory(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)?;
    let probe = dir.join(".probe");
    File::create(&probe)?.write_all(b"")?;
    fs::remove_file(probe)
}
