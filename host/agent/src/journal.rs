//! The agent's journal: what it accepted, started and finished, durable before it is acted on.
//!
//! It owns the file and the picture of the tasks that follows from it. It must not run anything or talk to anybody.
//!
//! # The file
//! Frames of `length | CRC-32 of the content | CRC-32 of these eight bytes | content`, numbers as u32 little endian, the content
//! a JSON list of `picture::Record`s; one frame is one append, so it counts whole or not at all. The first record is the header with
//! the random epoch. The file always has a whole number of chunks of 64 KiB, filled with zeros: its space is taken before it is
//! needed, so that a full disk cannot stop the end of a task from being recorded, and a file that was cut short is seen by its size.
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
//! # Writing it anew
//! When more than half of it, and 4 MiB beyond, is about tasks that the server has, it is written anew with the same epoch: to
//! `journal.new`, synced, renamed over it, the directory synced. Looked at when it is opened and after each acknowledgement, by
//! what the file holds, so that restarts do not put it off. A crash before the rename leaves a whole journal and a file that
//! the next attempt overwrites; one behind it leaves the new journal, which says the same. Where it cannot be done (a full
//! disk), the old one goes on and it is tried again 1 MiB later. While the directory is not synced nothing is appended: a power
//! failure could bring the old file back, without it.
//!
//! Of damaged journals the two latest are kept.

mod frame;
mod picture;

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::FallocateFlags;
use windlass_domain::{
    Timestamp,
    id::InstanceId,
    task::{Task, TaskId, TaskResult},
};
use windlass_protocol::{Epoch, JournalState};

pub use picture::{Entry, Known};

use frame::{MAX_CONTENT, frame, read};
use picture::{Picture, Record};

use crate::{
    crash,
    files::{self, Context as _, FileError, sync_dir},
};

const CHUNK: u64 = 64 * 1024;
/// Acknowledged ids that are remembered, so that none of them ever runs again.
const TOMBSTONES: usize = 4096;
/// Bytes that the file may have beyond twice what it has to hold.
const SLACK: u64 = 4 << 20;
/// Bytes that are appended between two looks at how much it has to hold, at least.
const LOOK_EVERY: u64 = 1 << 20;
/// Bytes of the records that one frame takes when the file is written anew: far from what a frame may hold.
const FRAME_BYTES: u64 = 1 << 20;
/// Damaged journals that are kept.
const KEPT_DAMAGED: usize = 2;

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

/// The open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    end: u64,
    size: u64,
    /// The end at which it is looked at whether it should be written anew.
    look_at: u64,
    /// Its name in the directory may not survive a power failure yet.
    renamed: bool,
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
        prune_damaged(path, KEPT_DAMAGED);
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
                    look_at: 0,
                    renamed: false,
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
                journal.compact_when_due();
                Ok(journal)
            }
            Err(reason) => {
                let kept = path.with_extension(format!("damaged-{}", now.unix_ms()));
                // Before it is added, so that a clock that went back does not make it the one to go.
                prune_damaged(path, KEPT_DAMAGED - 1);
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
        let mut journal = Self::write_beside(path, epoch, &picture, state)?;
        journal.take_place()?;
        journal.sync_name()?;
        Ok(journal)
    }

    /// A whole new file beside the one at `path`, of which it is to take the place.
    fn write_beside(
        path: &Path,
        epoch: Epoch,
        picture: &Picture,
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
            path: path.to_owned(),
            file,
            end: 0,
            size: 0,
            look_at: 0,
            renamed: false,
            epoch,
            picture: Picture::default(),
            state,
        };
        if let Err(error) = journal.fill(picture) {
            if let Err(left) = files::remove_file(&temporary) {
                tracing::debug!(error = %left, "a journal that was not finished is left");
            }
            return Err(error);
        }
        Ok(journal)
    }

    fn fill(&mut self, picture: &Picture) -> Result<(), JournalError> {
        let mut records = Vec::new();
        let mut bytes = 0;
        for record in picture.records(self.epoch) {
            let size = json_bytes(&record)?;
            if bytes + size > FRAME_BYTES && !records.is_empty() {
                self.append(std::mem::take(&mut records))?;
                bytes = 0;
            }
            bytes += size;
            records.push(record);
        }
        self.append(records)?;
        self.look_at = 2 * self.end + SLACK;
        Ok(())
    }

    /// Takes the place of the file before it. Once the name is changed there is no way back.
    fn take_place(&mut self) -> Result<(), FileError> {
        std::fs::rename(self.path.with_extension("new"), &self.path)
            .during("replace", &self.path)?;
        self.renamed = true;
        Ok(())
    }

    fn sync_name(&mut self) -> Result<(), FileError> {
        if self.renamed {
            if let Some(dir) = self.path.parent() {
                sync_dir(dir)?;
            }
            self.renamed = false;
        }
        Ok(())
    }

    /// Writes the file anew when it holds too much that is not needed. That it cannot be done now does no harm.
    fn compact_when_due(&mut self) {
        if self.end < self.look_at {
            return;
        }
        if let Err(error) = self.compact() {
            self.look_at = self.end + LOOK_EVERY;
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                bytes = self.end,
                "the journal cannot be written anew now; it is tried again"
            );
        }
    }

    fn compact(&mut self) -> Result<(), JournalError> {
        let mut live = 0;
        for record in self.picture.records(self.epoch) {
            live += json_bytes(&record)?;
        }
        let due = 2 * live + SLACK;
        if self.end < due {
            self.look_at = due.max(self.end + LOOK_EVERY);
            return Ok(());
        }
        let mut anew =
            Self::write_beside(&self.path, self.epoch, &self.picture, self.state.clone())?;
        anew.take_place()?;
        // From here on it is the journal, whether its name is durable yet or not.
        *self = anew;
        self.sync_name()?;
        Ok(())
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

    /// Records that a task was taken and starts at once; durable, both or neither, when it returns.
    ///
    /// # Errors
    /// When it cannot be recorded: then the task must neither be answered nor start.
    pub fn accept_and_start(&mut self, task: Task, at: Timestamp) -> Result<(), JournalError> {
        let task_id = task.id;
        self.append(vec![
            Record::Accepted {
                task: Box::new(task),
            },
            Record::Started { task_id, at },
        ])
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
        self.append(vec![Record::Acked { task_id, outcome }])?;
        self.compact_when_due();
        Ok(())
    }

    fn append(&mut self, records: Vec<Record>) -> Result<(), JournalError> {
        crash::point("before_journal");
        self.sync_name()?;
        let bytes = frame(&records)?;
        // Room for this frame, and always a whole chunk beyond it: the reserve for the ends of what was accepted.
        let wanted = (self.end + bytes.len() as u64).div_ceil(CHUNK) * CHUNK + CHUNK;
        let mut growth = None;
        if wanted > self.size {
            match self.grow(wanted) {
                Ok(()) => growth = Some(wanted),
                // On a full disk the reserve is used up to its end.
                Err(_) if self.end + bytes.len() as u64 <= self.size => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.write(&bytes)?;
        for record in records {
            self.picture.apply(record);
        }
        if let Some(bytes) = growth {
            // Small, and the chunk for it was just added.
            self.write(&frame(&[Record::Size { bytes }])?)?;
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

/// The bytes of a record as JSON, without making them.
fn json_bytes(record: &Record) -> Result<u64, JournalError> {
    struct Counted(u64);
    impl io::Write for Counted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len() as u64;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut counted = Counted(0);
    serde_json::to_writer(&mut counted, record).map_err(JournalError::Json)?;
    Ok(counted.0)
}

/// Removes damaged journals except the latest `keep`. What cannot be removed stays: it is in nobody's way.
fn prune_damaged(path: &Path, keep: usize) {
    let (Some(dir), Some(name)) = (path.parent(), path.file_stem()) else {
        return;
    };
    let begin = format!("{}.damaged-", name.to_string_lossy());
    let mut found: Vec<(i64, PathBuf)> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let at = name.to_str()?.strip_prefix(&begin)?.parse().ok()?;
            Some((at, entry.path()))
        })
        .collect();
    found.sort();
    found.truncate(found.len().saturating_sub(keep));
    for (_, damaged) in found {
        match files::remove_file(&damaged) {
            Ok(()) => {
                tracing::info!(path = %damaged.display(), "an old damaged journal was removed")
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "an old damaged journal stays"
            ),
        }
    }
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
mod tests;
