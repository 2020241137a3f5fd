//! The agent's journal: what it accepted, started and finished, durable before it is acted on.
//!
//! It owns the file and the picture of the tasks that follows from it. It must not run anything or talk to anybody.
//!
//! # The file
//! Frames of `length | CRC-32 of the content | CRC-32 of these eight bytes | content`, numbers as u32 little endian, the content
//! a JSON list of [`Record`]s; one frame is one append, so it counts whole or not at all. The first record is the header with the random epoch. The file always has a
//! whole number of chunks of 64 KiB, filled with zeros: its space is taken before it is needed, so that a full disk cannot
//! stop the end of a task from being recorded, and a file that was cut short is seen by its size.
//!
//! # Opening it
//! ```text
//!  no file                                              → created, new epoch
//!  all frames whole, then zeros                         → intact
//!  the last frame torn, and nothing after it            → intact: it was never synced, so nothing was done about it
//!  anything else: size, checksum, content, header       → kept aside as journal.damaged-<time>, new epoch
//! ```
//! A torn frame is accepted in two cases: the machine restarted since the journal was opened (each opening records the boot id), or
//! its end is zeros, which is a write that was cut. A last frame whose bytes are all there but wrong is damage.
//!
//! When acknowledged records dominate, the file is written anew (to another name, synced, renamed) with the same epoch.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::FallocateFlags;
use serde::{Deserialize, Serialize};
use windlass_domain::{
    Timestamp,
    id::InstanceId,
    task::{Outcome, Task, TaskId, TaskResult},
};
use windlass_protocol::{Epoch, JournalState};

use crate::{
    crash,
    files::{self, Context as _, FileError, sync_dir},
};

const CHUNK: u64 = 64 * 1024;
const FRAME_HEAD: usize = 12;
/// A frame holds at most a task and its result; a pushed task fits into 1 MiB.
const MAX_CONTENT: usize = 4 << 20;
/// Acknowledged ids that are remembered, so that none of them ever runs again.
const TOMBSTONES: usize = 4096;
/// Bytes of forgotten records after which the file is written anew.
const COMPACT_AT: u64 = 4 << 20;

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    Header {
        format: u32,
        epoch: Epoch,
    },
    /// The file was opened in this start of the machine.
    Opened {
        boot_id: String,
    },
    /// The file has at least so many bytes from now on.
    Size {
        bytes: u64,
    },
    Accepted {
        task: Box<Task>,
    },
    Started {
        task_id: TaskId,
        at: Timestamp,
    },
    Finished {
        task_id: TaskId,
        result: Box<TaskResult>,
    },
    Acked {
        task_id: TaskId,
        outcome: Outcome,
    },
    /// The highest fence seen of an instance, kept over compaction.
    Fence {
        instance: InstanceId,
        fence: u64,
    },
}

/// A task that is not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The task; `None` when only its revoke was seen.
    pub task: Option<Task>,
    /// When it started, if it did.
    pub started_at: Option<Timestamp>,
    /// How it ended, if it did.
    pub result: Option<TaskResult>,
}

/// What the journal knows about an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// Nothing.
    Never,
    /// It is held.
    Held(Box<Entry>),
    /// It ended so, and the server has the result.
    Acknowledged(Outcome),
}

/// A journal that cannot be used at all (a damaged one is replaced, not refused).
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system.
    #[error(transparent)]
    File(#[from] FileError),
    /// A record that cannot be written.
    #[error("a journal record cannot be written as JSON")]
    Json(#[source] serde_json::Error),
    /// More than a frame may hold.
    #[error("a journal record has {bytes} bytes; the limit is {MAX_CONTENT}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
}

#[derive(Debug, Default, Clone)]
struct Picture {
    epoch: Option<Epoch>,
    boot_id: String,
    size: u64,
    held: BTreeMap<TaskId, Entry>,
    /// Held ids, oldest first.
    order: Vec<TaskId>,
    fences: BTreeMap<InstanceId, u64>,
    tombstones: VecDeque<(TaskId, Outcome)>,
}

impl Picture {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Header { epoch, .. } => self.epoch = Some(epoch),
            Record::Opened { boot_id } => self.boot_id = boot_id,
            Record::Size { bytes } => self.size = bytes,
            Record::Accepted { task } => {
                self.raise_fence(task.instance, task.fence);
                let entry = self.entry(task.id);
                entry.task = Some(*task);
            }
            Record::Started { task_id, at } => self.entry(task_id).started_at = Some(at),
            Record::Finished { task_id, result } => self.entry(task_id).result = Some(*result),
            Record::Acked { task_id, outcome } => {
                self.held.remove(&task_id);
                self.order.retain(|id| *id != task_id);
                self.tombstones.push_back((task_id, outcome));
                if self.tombstones.len() > TOMBSTONES {
                    self.tombstones.pop_front();
                }
            }
            Record::Fence { instance, fence } => self.raise_fence(instance, fence),
        }
    }

    fn entry(&mut self, id: TaskId) -> &mut Entry {
        if !self.held.contains_key(&id) {
            self.order.push(id);
        }
        self.held.entry(id).or_insert(Entry {
            task: None,
            started_at: None,
            result: None,
        })
    }

    fn raise_fence(&mut self, instance: InstanceId, fence: u64) {
        let highest = self.fences.entry(instance).or_insert(fence);
        *highest = (*highest).max(fence);
    }

    /// The records that make this picture from nothing.
    fn records(&self, epoch: Epoch) -> Vec<Record> {
        let mut records = vec![
            Record::Header { format: 1, epoch },
            Record::Opened {
                boot_id: self.boot_id.clone(),
            },
        ];
        records.extend(self.fences.iter().map(|(instance, fence)| Record::Fence {
            instance: *instance,
            fence: *fence,
        }));
        records.extend(
            self.tombstones
                .iter()
                .map(|(task_id, outcome)| Record::Acked {
                    task_id: *task_id,
                    outcome: *outcome,
                }),
        );
        for id in &self.order {
            let Some(entry) = self.held.get(id) else {
                continue;
            };
            if let Some(task) = &entry.task {
                records.push(Record::Accepted {
                    task: Box::new(task.clone()),
                });
            }
            if let Some(at) = entry.started_at {
                records.push(Record::Started { task_id: *id, at });
            }
            if let Some(result) = &entry.result {
                records.push(Record::Finished {
                    task_id: *id,
                    result: Box::new(result.clone()),
                });
            }
        }
        records
    }
}

/// The open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    end: u64,
    size: u64,
    forgotten: u64,
    epoch: Epoch,
    picture: Picture,
    state: JournalState,
}

impl Journal {
    /// Opens the journal of a data directory, or begins a new one with `fresh_epoch`.
    ///
    /// # Errors
    /// When no journal can be had at all, for example on a disk that is full before the first start.
    pub fn open(
        path: &Path,
        fresh_epoch: Epoch,
        boot_id: &str,
        now: Timestamp,
    ) -> Result<Self, JournalError> {
        let read = match File::open(path) {
            Ok(mut file) => {
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes).during("read", path)?;
                read(&bytes, boot_id)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Self::create(path, fresh_epoch, boot_id, JournalState::Created);
            }
            Err(error) => return Err(error).during("open", path).map_err(Into::into),
        };
        match read {
            Ok((picture, epoch, end)) => {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(path)
                    .during("open", path)?;
                let size = file.metadata().during("look at", path)?.len();
                let mut journal = Self {
                    path: path.to_owned(),
                    file,
                    end,
                    size,
                    forgotten: 0,
                    epoch,
                    picture,
                    state: JournalState::Intact,
                };
                // What a torn frame left behind its begin must not look like a frame later.
                journal.wipe_rest()?;
                if journal.picture.boot_id != boot_id {
                    journal.append(vec![Record::Opened {
                        boot_id: boot_id.to_owned(),
                    }])?;
                }
                Ok(journal)
            }
            Err(reason) => {
                let kept = path.with_extension(format!("damaged-{}", now.unix_ms()));
                std::fs::rename(path, &kept).during("keep aside", path)?;
                let state = JournalState::Replaced {
                    reason,
                    kept_as: kept.display().to_string(),
                };
                Self::create(path, fresh_epoch, boot_id, state)
            }
        }
    }

    fn create(
        path: &Path,
        epoch: Epoch,
        boot_id: &str,
        state: JournalState,
    ) -> Result<Self, JournalError> {
        let picture = Picture {
            boot_id: boot_id.to_owned(),
            ..Picture::default()
        };
        Self::write_anew(path, epoch, picture, state)
    }

    /// A whole new file in the place of the one at `path`.
    fn write_anew(
        path: &Path,
        epoch: Epoch,
        picture: Picture,
        state: JournalState,
    ) -> Result<Self, JournalError> {
        let temporary = path.with_extension("new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .during("create", &temporary)?;
        let mut journal = Self {
            path: temporary.clone(),
            file,
            end: 0,
            size: 0,
            forgotten: 0,
            epoch,
            picture: Picture::default(),
            state,
        };
        journal.append(picture.records(epoch))?;
        std::fs::rename(&temporary, path).during("replace", path)?;
        if let Some(dir) = path.parent() {
            sync_dir(dir)?;
        }
        journal.path = path.to_owned();
        Ok(journal)
    }

    /// The epoch of this life of the journal.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What became of it when it was opened.
    #[must_use]
    pub fn state(&self) -> &JournalState {
        &self.state
    }

    /// What is known about an id.
    #[must_use]
    pub fn known(&self, id: &TaskId) -> Known {
        if let Some(entry) = self.picture.held.get(id) {
            return Known::Held(Box::new(entry.clone()));
        }
        self.picture
            .tombstones
            .iter()
            .rev()
            .find(|(known, _)| known == id)
            .map_or(Known::Never, |(_, outcome)| Known::Acknowledged(*outcome))
    }

    /// Everything that is not acknowledged, oldest first.
    pub fn held(&self) -> impl Iterator<Item = (TaskId, &Entry)> {
        self.picture
            .order
            .iter()
            .filter_map(|id| Some((*id, self.picture.held.get(id)?)))
    }

    /// The highest fence seen of an instance; 0 where none was.
    #[must_use]
    pub fn fence(&self, instance: &InstanceId) -> u64 {
        self.picture.fences.get(instance).copied().unwrap_or(0)
    }

    /// Records that a task was taken; durable when it returns.
    ///
    /// # Errors
    /// When it cannot be recorded: then the task must not be answered.
    pub fn accept(&mut self, task: Task) -> Result<(), JournalError> {
        self.append(vec![Record::Accepted {
            task: Box::new(task),
        }])
    }

    /// Records that a task starts; durable when it returns.
    ///
    /// # Errors
    /// When it cannot be recorded: then the task must not start.
    pub fn start(&mut self, task_id: TaskId, at: Timestamp) -> Result<(), JournalError> {
        self.append(vec![Record::Started { task_id, at }])
    }

    /// Records a task's end; durable when it returns. With `task`, its acceptance in the same breath.
    ///
    /// # Errors
    /// When it cannot be recorded: then the result must not be sent.
    pub fn finish(
        &mut self,
        task: Option<Task>,
        task_id: TaskId,
        result: TaskResult,
    ) -> Result<(), JournalError> {
        let mut records: Vec<Record> = task
            .map(|task| Record::Accepted {
                task: Box::new(task),
            })
            .into_iter()
            .collect();
        records.push(Record::Finished {
            task_id,
            result: Box::new(result),
        });
        self.append(records)
    }

    /// Records that the server has the result. Not acknowledged twice: an id that is not held is left alone.
    ///
    /// # Errors
    /// When it cannot be recorded: the result is then sent again some time, which does no harm.
    pub fn acknowledge(&mut self, task_id: TaskId) -> Result<(), JournalError> {
        let Some(entry) = self.picture.held.get(&task_id) else {
            return Ok(());
        };
        let Some(result) = &entry.result else {
            return Ok(());
        };
        let outcome = result.outcome;
        let size = serde_json::to_vec(result).map_or(0, |json| json.len());
        self.forgotten += size as u64 + 1024;
        self.append(vec![Record::Acked { task_id, outcome }])?;
        if self.forgotten >= COMPACT_AT {
            let state = self.state.clone();
            *self = Self::write_anew(&self.path.clone(), self.epoch, self.picture.clone(), state)?;
        }
        Ok(())
    }

    fn append(&mut self, records: Vec<Record>) -> Result<(), JournalError> {
        crash::point("before_journal");
        let frame = frame(&records)?;
        // Room for this frame, and always a whole chunk beyond it: the reserve for the ends of what was accepted.
        let wanted = (self.end + frame.len() as u64).div_ceil(CHUNK) * CHUNK + CHUNK;
        let mut growth = None;
        if wanted > self.size {
            match self.grow(wanted) {
                Ok(()) => growth = Some(wanted),
                // On a full disk the reserve is used up to its end.
                Err(_) if self.end + frame.len() as u64 <= self.size => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.write(&frame)?;
        for record in records {
            self.picture.apply(record);
        }
        if let Some(bytes) = growth {
            // Small, and the chunk for it was just added.
            let frame = self::frame(&[Record::Size { bytes }])?;
            self.write(&frame)?;
            self.picture.size = bytes;
        }
        crash::point("after_journal");
        Ok(())
    }

    fn write(&mut self, frame: &[u8]) -> Result<(), FileError> {
        self.file
            .write_all_at(frame, self.end)
            .during("write", &self.path)?;
        self.file.sync_data().during("sync", &self.path)?;
        self.end += frame.len() as u64;
        Ok(())
    }

    fn grow(&mut self, bytes: u64) -> Result<(), FileError> {
        rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, bytes)
            .during("take space for", &self.path)?;
        self.file.sync_all().during("sync", &self.path)?;
        self.size = bytes;
        Ok(())
    }

    fn wipe_rest(&mut self) -> Result<(), FileError> {
        let len = usize::try_from(self.size.saturating_sub(self.end)).unwrap_or(0);
        let mut rest = vec![0; len];
        self.file
            .read_exact_at(&mut rest, self.end)
            .during("read", &self.path)?;
        if rest.iter().any(|byte| *byte != 0) {
            rest.fill(0);
            self.file
                .write_all_at(&rest, self.end)
                .during("write", &self.path)?;
            self.file.sync_data().during("sync", &self.path)?;
        }
        Ok(())
    }
}

fn frame(records: &[Record]) -> Result<Vec<u8>, JournalError> {
    let content = serde_json::to_vec(records).map_err(JournalError::Json)?;
    let length = u32::try_from(content.len())
        .ok()
        .filter(|_| content.len() <= MAX_CONTENT)
        .ok_or(JournalError::TooLarge {
            bytes: content.len(),
        })?;
    let mut frame = Vec::with_capacity(FRAME_HEAD + content.len());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&crc32fast::hash(&content).to_le_bytes());
    frame.extend_from_slice(&crc32fast::hash(&frame).to_le_bytes());
    frame.extend_from_slice(&content);
    Ok(frame)
}

/// The length and the checksum of the content, from the head of the frame that begins at `at`; `None` when there is no whole one.
fn head_at(bytes: &[u8], at: usize) -> Option<(usize, u32)> {
    let number = |from: usize| {
        let digits = bytes.get(at + from..at + from + 4)?;
        Some(u32::from_le_bytes(digits.try_into().ok()?))
    };
    let (length, crc, check) = (number(0)?, number(4)?, number(8)?);
    let length = usize::try_from(length).ok()?;
    let whole = crc32fast::hash(&bytes[at..at + 8]) == check;
    (whole && length > 0 && length <= MAX_CONTENT).then_some((length, crc))
}

/// The content of the frame that begins at `at`; `None` when there is no whole one.
fn content_at(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let (length, crc) = head_at(bytes, at)?;
    let content = bytes.get(at + FRAME_HEAD..at + FRAME_HEAD + length)?;
    (crc32fast::hash(content) == crc).then_some(content)
}

/// The picture, the epoch and the end of the last whole frame; or what is wrong with the file.
fn read(bytes: &[u8], boot_id: &str) -> Result<(Picture, Epoch, u64), String> {
    if bytes.is_empty() || !(bytes.len() as u64).is_multiple_of(CHUNK) {
        return Err(format!(
            "it has {} bytes, which is no whole number of {CHUNK}-byte chunks: it was cut",
            bytes.len()
        ));
    }
    let mut picture = Picture::default();
    let mut at = 0;
    while let Some(content) = content_at(bytes, at) {
        let records: Vec<Record> = serde_json::from_slice(content)
            .map_err(|error| format!("the record at byte {at} cannot be understood: {error}"))?;
        for record in records {
            if let Record::Header { format, .. } = record
                && format != 1
            {
                return Err(format!("its format is {format}; this agent knows format 1"));
            }
            picture.apply(record);
        }
        at += FRAME_HEAD + content.len();
    }
    let epoch = picture.epoch.ok_or("it does not begin with a header")?;
    if (bytes.len() as u64) < picture.size {
        return Err(format!(
            "it has {} bytes and once had {}: it was cut",
            bytes.len(),
            picture.size
        ));
    }
    let rest = &bytes[at..];
    if rest.iter().any(|byte| *byte != 0) {
        judge_torn(rest, picture.boot_id != boot_id)
            .map_err(|reason| format!("after byte {at}: {reason}"))?;
    }
    Ok((picture, epoch, at as u64))
}

/// Whether what follows the last whole frame can be a write that was cut.
fn judge_torn(rest: &[u8], machine_restarted: bool) -> Result<(), String> {
    let later = (1..rest.len().saturating_sub(FRAME_HEAD)).any(|at| content_at(rest, at).is_some());
    if later {
        return Err("a damaged record is followed by whole ones".into());
    }
    if machine_restarted {
        return Ok(());
    }
    let written = rest
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    // Content never ends with a zero, so a frame that was written to its end shows it.
    let whole = match head_at(rest, 0) {
        Some((length, _)) => FRAME_HEAD + length,
        None => FRAME_HEAD,
    };
    if written >= whole {
        return Err("the last record is damaged".into());
    }
    Ok(())
}

/// Says what became of the journal, for the log.
#[must_use]
pub fn describe(state: &JournalState) -> String {
    match state {
        JournalState::Intact => "intact".into(),
        JournalState::Created => "new".into(),
        JournalState::Replaced { reason, kept_as } => {
            format!("replaced: {reason}; the damaged one is {kept_as}")
        }
    }
}

/// Makes a file of `bytes` bytes that really take space; one that exists is left alone.
///
/// # Errors
/// When there is no space for it.
pub fn take_reserve(path: &Path, bytes: u64) -> Result<(), FileError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .during("create", path)?;
    if let Err(error) = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
        files::remove_file(path)?;
        return Err(error).during("take space for", path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_domain::task::{Action, Script};

    const BOOT: &str = "boot-1";

    fn epoch(n: u8) -> Epoch {
        Epoch::from_bytes([n; 16])
    }

    fn task(node: u32, fence: u64) -> Task {
        Task {
            id: format!("ord_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f.{node}.1")
                .parse()
                .unwrap(),
            instance: "svc_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f".parse().unwrap(),
            release: None,
            fence,
            expires_at: Timestamp::from_unix_ms(1),
            timeout_ms: 1,
            run_as: None,
            env: [].into(),
            action: Action::Script(Script {
                interpreter: vec![],
                text: "x".repeat(3000),
                working_dir: None,
            }),
        }
    }

    fn result() -> TaskResult {
        TaskResult {
            outcome: Outcome::Succeeded,
            exit_code: Some(0),
            output: "y".repeat(9000),
            dropped_bytes: 0,
            message: String::new(),
            started_at: None,
            finished_at: Timestamp::from_unix_ms(2),
        }
    }

    fn open(path: &Path, fresh: u8, boot: &str) -> Journal {
        Journal::open(path, epoch(fresh), boot, Timestamp::from_unix_ms(7)).unwrap()
    }

    /// A journal with some history: tasks 1 to 20 accepted and started, 1 to 10 finished, 1 to 5 acknowledged.
    fn filled(path: &Path) -> Journal {
        let mut journal = open(path, 1, BOOT);
        assert_eq!(journal.state(), &JournalState::Created);
        for node in 1..=20 {
            journal.accept(task(node, u64::from(node))).unwrap();
            journal
                .start(task(node, 0).id, Timestamp::from_unix_ms(3))
                .unwrap();
        }
        for node in 1..=10 {
            journal.finish(None, task(node, 0).id, result()).unwrap();
        }
        for node in 1..=5 {
            journal.acknowledge(task(node, 0).id).unwrap();
        }
        journal
    }

    fn assert_filled(journal: &Journal) {
        assert_eq!(journal.epoch(), epoch(1));
        assert_eq!(journal.fence(&task(1, 0).instance), 20);
        assert_eq!(journal.held().count(), 15);
        assert_eq!(
            journal.known(&task(3, 0).id),
            Known::Acknowledged(Outcome::Succeeded)
        );
        assert!(
            matches!(journal.known(&task(7, 0).id), Known::Held(entry) if entry.result.is_some())
        );
        assert!(
            matches!(journal.known(&task(15, 0).id), Known::Held(entry) if entry.result.is_none() && entry.started_at.is_some())
        );
        assert_eq!(journal.known(&task(99, 0).id), Known::Never);
    }

    #[test]
    fn it_is_read_as_it_was_written_and_compacts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = filled(&path);
        assert_filled(&journal);
        for node in 100..600 {
            journal
                .finish(Some(task(node, 20)), task(node, 0).id, result())
                .unwrap();
            journal.acknowledge(task(node, 0).id).unwrap();
        }
        let size = path.metadata().unwrap().len();
        assert!(size < COMPACT_AT * 2, "{size}");
        drop(journal);
        let journal = open(&path, 2, BOOT);
        assert_eq!(journal.state(), &JournalState::Intact);
        assert_filled(&journal);
        assert_eq!(
            journal.known(&task(100, 0).id),
            Known::Acknowledged(Outcome::Succeeded)
        );
    }

    #[test]
    fn any_cut_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let end = filled(&path).end;
        let whole = std::fs::read(&path).unwrap();
        assert!(whole.len() as u64 >= 3 * CHUNK, "{}", whole.len());
        for len in [
            0,
            1,
            7,
            100,
            end - 1,
            end,
            end + 1,
            CHUNK,
            2 * CHUNK,
            whole.len() as u64 - 1,
        ] {
            std::fs::write(&path, &whole[..usize::try_from(len).unwrap()]).unwrap();
            let journal = open(&path, 2, BOOT);
            assert!(
                matches!(journal.state(), JournalState::Replaced { .. }),
                "cut to {len}"
            );
            assert_eq!(journal.epoch(), epoch(2));
            assert_eq!(journal.held().count(), 0);
            std::fs::remove_file(dir.path().join("journal.damaged-7")).unwrap();
        }
    }

    #[test]
    fn any_damage_is_seen_and_a_torn_last_record_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = filled(&path);
        let last = journal.end;
        journal.accept(task(50, 20)).unwrap();
        let end = journal.end;
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        let reopen = |bytes: &[u8], boot: &str| {
            std::fs::write(&path, bytes).unwrap();
            let journal = open(&path, 2, boot);
            if matches!(journal.state(), JournalState::Replaced { .. }) {
                std::fs::remove_file(dir.path().join("journal.damaged-7")).unwrap();
            }
            journal
        };
        // A flipped bit anywhere: in the first, a middle and the last record.
        for at in [
            2,
            6,
            20,
            40_000,
            last,
            last + 5,
            last + 9,
            last + 20,
            end - 1,
        ] {
            let mut bytes = whole.clone();
            bytes[usize::try_from(at).unwrap()] ^= 0x10;
            let journal = reopen(&bytes, BOOT);
            assert!(
                matches!(journal.state(), JournalState::Replaced { .. }),
                "bit at {at} of {last}..{end}"
            );
        }
        // The last write cut at any byte: never acted on, so nothing is lost.
        for cut in [last + 1, last + 4, last + 9, last + 12, last + 13, end - 1] {
            let mut bytes = whole.clone();
            bytes[usize::try_from(cut).unwrap()..].fill(0);
            let journal = reopen(&bytes, BOOT);
            assert_eq!(journal.state(), &JournalState::Intact, "cut at {cut}");
            assert_filled(&journal);
        }
        // After a power failure the blocks of the last write may be anything.
        let mut bytes = whole.clone();
        bytes[usize::try_from(last).unwrap() + 100] ^= 1;
        let journal = reopen(&bytes, "boot-2");
        assert_eq!(journal.state(), &JournalState::Intact);
        assert_filled(&journal);
        // And what was torn does not come back after more was written.
        drop(journal);
        let journal = open(&path, 3, "boot-2");
        assert_filled(&journal);
    }

    #[test]
    fn a_deleted_journal_is_a_new_life() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        drop(filled(&path));
        std::fs::remove_file(&path).unwrap();
        let journal = open(&path, 2, BOOT);
        assert_eq!(
            (journal.state(), journal.epoch()),
            (&JournalState::Created, epoch(2))
        );
    }
}
