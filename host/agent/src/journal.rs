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
//! When acknowledged records dominate, the file is written anew (to another name, synced, renamed) with the same epoch.

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
/// Bytes of forgotten records after which the file is written anew.
const COMPACT_AT: u64 = 4 << 20;

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
