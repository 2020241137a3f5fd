//! The embedded store on disk: rows in a sled tree.
//!
//! Owns the directory of the store, its lock and its format, and is the only file that names sled. The commit
//! path stands in `embedded`.
//!
//! A row is 8 bytes, the revision in big-endian with the highest bit set for rows on a lease, and then the value.
//! The revision is not a row of its own because every further key of a commit halves the throughput.
//! Durable means: sled's `flush` (its buffers are written) and then `fdatasync` of its `db` file (they are on the
//! disk; `flush` alone does not force the length of the file). `flush_async` is not used: awaited from many tasks
//! at once it never answers (spacejam/sled#1308). Values above 32 KiB are refused: sled writes very large ones to
//! files that it never syncs.
//!
//! The directory holds `LOCK` (held by the process that has it open), `FORMAT` (written once), sled's files, and,
//! while nobody has it open after a clean shutdown, `CLEAN` with the last revision. Damage to the end of the log looks
//! to sled like a crash in the middle of a write; after a clean shutdown there was none, so it is told apart.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::ops::Bound;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use sled::{Db, IVec};

use crate::Store;
use crate::embedded::{
    Direction, Embedded, EmbeddedOptions, RowWrite, Rows, StoredRow, Visit, Writer, read_mark,
};
use crate::error::StoreError;
use crate::trace::CommitTrace;
use crate::txn::Revision;
use crate::watch::RingLimits;

/// The version of the layout of the directory and of the rows.
pub const FORMAT_VERSION: u32 = 1;

const HEADER_BYTES: usize = 8;
/// A batch of sled's is applied when it holds more than this.
const BATCH_BYTES: usize = 256 * 1024;
const LEASED_BIT: u64 = 1 << 63;
const FORMAT_KEY: &[u8] = b"\0f";

/// Settings of the embedded store.
#[derive(Clone)]
pub struct SledOptions {
    /// Bytes of pages that sled keeps in memory.
    pub cache_bytes: u64,
    /// Bounds of what watches can look back to.
    pub ring: RingLimits,
    /// Called along the commit path; for tests.
    pub trace: Option<Arc<dyn CommitTrace>>,
}

impl Default for SledOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 64 * 1024 * 1024,
            ring: RingLimits::default(),
            trace: None,
        }
    }
}

/// Opens the store of a directory, which is made if it is missing. Rows of former leases are gone when it returns.
///
/// # Errors
/// [`StoreError::Locked`] when a process has it open, [`StoreError::Corrupt`] or [`StoreError::Format`] when the
/// files are not those of a store of this version, [`StoreError::Io`].
pub async fn open(
    directory: impl Into<PathBuf>,
    options: SledOptions,
) -> Result<Arc<dyn Store>, StoreError> {
    let directory = directory.into();
    let runtime = tokio::runtime::Handle::current();
    let opening = tokio::task::spawn_blocking(move || -> Result<Arc<dyn Store>, StoreError> {
        let rows = SledRows::open(&directory, options.cache_bytes)?;
        let _entered = runtime.enter();
        let store: Arc<dyn Store> = Embedded::start(
            rows,
            Writer::Thread,
            EmbeddedOptions {
                ring: options.ring,
                trace: options.trace,
            },
        )?;
        Ok(store)
    });
    opening.await.map_err(|error| StoreError::Engine {
        operation: "open",
        reason: error.to_string(),
    })?
}

/// A directory's lock, held while the value lives.
pub(crate) struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    pub(crate) fn take(directory: &Path) -> Result<Self, StoreError> {
        let path = directory.join("LOCK");
        let io = |operation, source| StoreError::Io {
            operation,
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| io("open", source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                file.read_to_string(&mut holder)
                    .map_err(|source| io("read", source))?;
                return Err(StoreError::Locked {
                    directory: directory.to_owned(),
                    holder: format!("process {}", holder.trim()),
                });
            }
            Err(TryLockError::Error(source)) => return Err(io("lock", source)),
        }
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        written.map_err(|source| io("write", source))?;
        Ok(Self { _file: file })
    }
}

/// Makes a directory that only its owner can read; it may exist.
pub(crate) fn make_directory(directory: &Path) -> Result<(), StoreError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|source| StoreError::Io {
            operation: "make the directory",
            path: directory.to_owned(),
            source,
        })
}

pub(crate) struct SledRows {
    directory: PathBuf,
    open: RwLock<Option<OpenRows>>,
}

struct OpenRows {
    db: Db,
    /// sled's `db` file, only to sync it.
    file: File,
    // Last, so that it is let go of after sled.
    _lock: DirectoryLock,
}

impl SledRows {
    pub(crate) fn open(directory: &Path, cache_bytes: u64) -> Result<Self, StoreError> {
        make_directory(directory)?;
        let lock = DirectoryLock::take(directory)?;
        let format_path = directory.join("FORMAT");
        let known = match std::fs::read_to_string(&format_path) {
            Ok(text) if text.trim() == FORMAT_VERSION.to_string() => true,
            Ok(text) => {
                return Err(StoreError::Format {
                    directory: directory.to_owned(),
                    found: text.trim().chars().take(32).collect(),
                    supported: FORMAT_VERSION,
                });
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            Err(source) => {
                return Err(StoreError::Io {
                    operation: "read",
                    path: format_path,
                    source,
                });
            }
        };
        let corrupt = |reason: String| StoreError::Corrupt {
            directory: directory.to_owned(),
            reason,
        };
        if known && !directory.join("db").is_file() {
            return Err(corrupt("its file `db` is missing".to_owned()));
        }
        let db = open_sled(directory, cache_bytes)?;
        let path = directory.join("db");
        let io = |operation, path: &Path, source| StoreError::Io {
            operation,
            path: path.to_owned(),
            source,
        };
        let file = File::open(&path).map_err(|source| io("open", &path, source))?;
        let rows = Self {
            directory: directory.to_owned(),
            open: RwLock::new(Some(OpenRows {
                db,
                file,
                _lock: lock,
            })),
        };
        let has_format = rows.get(FORMAT_KEY)?.is_some();
        if known && !has_format {
            // sled took a damaged file for an empty one; going on would look as if nothing had ever been stored.
            return Err(corrupt("its first row is gone".to_owned()));
        }
        if !known {
            let format = RowWrite {
                key: Bytes::from_static(FORMAT_KEY),
                row: Some(StoredRow {
                    revision: Revision(0),
                    leased: false,
                    value: Bytes::copy_from_slice(&FORMAT_VERSION.to_be_bytes()),
                }),
            };
            rows.apply(&[vec![format]])?;
            rows.sync()?;
            write_format(directory, &format_path)
                .map_err(|source| io("write", &format_path, source))?;
        }
        rows.check_end()?;
        Ok(rows)
    }

    /// After a clean shutdown the mark of the revisions must be the one that was written then.
    fn check_end(&self) -> Result<(), StoreError> {
        let path = self.directory.join("CLEAN");
        let io = |operation, source| StoreError::Io {
            operation,
            path: path.clone(),
            source,
        };
        let said = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(io("read", source)),
        };
        let found = read_mark(self)?;
        if said.trim() != found.to_string() {
            return Err(StoreError::Corrupt {
                directory: self.directory.clone(),
                reason: format!(
                    "it was closed at revision {} but ends at {found}",
                    said.trim().chars().take(32).collect::<String>()
                ),
            });
        }
        std::fs::remove_file(&path).map_err(|source| io("remove", source))?;
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|source| io("sync the removal of", source))
    }

    fn with<T>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&OpenRows) -> sled::Result<T>,
    ) -> Result<T, StoreError> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let open = open.as_ref().ok_or(StoreError::Closed)?;
        work(open).map_err(|error| engine_error(&self.directory, operation, error))
    }
}

/// Writes a line to a file of the directory, durably and at once.
fn write_small(directory: &Path, path: &Path, line: &str) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)?;
    writeln!(file, "{line}")?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}

fn write_format(directory: &Path, path: &Path) -> std::io::Result<()> {
    write_small(directory, path, &FORMAT_VERSION.to_string())?;
    let conf = directory.join("conf");
    if conf.is_file() {
        File::open(conf)?.sync_all()?;
    }
    File::open(directory)?.sync_all()?;
    if let Some(parent) = directory.parent().filter(|p| !p.as_os_str().is_empty()) {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Opens sled. Our own lock is held, so a lock of sled's that is still there belongs to a store of this process that
/// is just being dropped: it is waited for.
fn open_sled(directory: &Path, cache_bytes: u64) -> Result<Db, StoreError> {
    const ATTEMPTS: u32 = 100;
    let config = sled::Config::new()
        .path(directory)
        .cache_capacity(cache_bytes)
        .mode(sled::Mode::HighThroughput)
        .flush_every_ms(None);
    let mut attempt = 1;
    loop {
        // sled panics on some damaged files.
        let opened = std::panic::catch_unwind(AssertUnwindSafe(|| config.open()));
        match opened {
            Ok(Ok(db)) => return Ok(db),
            Ok(Err(sled::Error::Io(error))) if is_lock(&error) && attempt < ATTEMPTS => {
                attempt += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(Err(sled::Error::Io(error))) if is_lock(&error) => {
                return Err(StoreError::Locked {
                    directory: directory.to_owned(),
                    holder: "unknown process".to_owned(),
                });
            }
            Ok(Err(error)) => return Err(engine_error(directory, "open", error)),
            Err(panic) => {
                let reason = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                    .unwrap_or_else(|| "the storage engine gave up".to_owned());
                return Err(StoreError::Corrupt {
                    directory: directory.to_owned(),
                    reason,
                });
            }
        }
    }
}

fn is_lock(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::WouldBlock || error.to_string().contains("acquire lock")
}

fn engine_error(directory: &Path, operation: &'static str, error: sled::Error) -> StoreError {
    match error {
        sled::Error::Io(source) => StoreError::Io {
            operation,
            path: directory.to_owned(),
            source,
        },
        sled::Error::Corruption { .. } => StoreError::Corrupt {
            directory: directory.to_owned(),
            reason: error.to_string(),
        },
        sled::Error::CollectionNotFound(_)
        | sled::Error::Unsupported(_)
        | sled::Error::ReportableBug(_) => StoreError::Engine {
            operation,
            reason: error.to_string(),
        },
    }
}

fn encode(row: &StoredRow, scratch: &mut Vec<u8>) -> IVec {
    let leased = if row.leased { LEASED_BIT } else { 0 };
    scratch.clear();
    scratch.extend_from_slice(&(row.revision.0 | leased).to_be_bytes());
    scratch.extend_from_slice(&row.value);
    IVec::from(scratch.as_slice())
}

fn decode_header(key: &[u8], stored: &[u8]) -> Result<(Revision, bool), StoreError> {
    let Some(header) = stored.first_chunk::<HEADER_BYTES>() else {
        return Err(StoreError::CorruptRow {
            key: key.escape_ascii().to_string(),
            reason: format!("{} bytes, too short for its header", stored.len()),
        });
    };
    let header = u64::from_be_bytes(*header);
    Ok((Revision(header & !LEASED_BIT), header & LEASED_BIT != 0))
}

fn decode(key: &[u8], stored: &[u8]) -> Result<StoredRow, StoreError> {
    let (revision, leased) = decode_header(key, stored)?;
    Ok(StoredRow {
        revision,
        leased,
        value: Bytes::copy_from_slice(&stored[HEADER_BYTES..]),
    })
}

impl Rows for SledRows {
    fn get(&self, key: &[u8]) -> Result<Option<StoredRow>, StoreError> {
        self.with("read a row", |open| open.db.get(key))?
            .map(|stored| decode(key, &stored))
            .transpose()
    }

    fn revision_of(&self, key: &[u8]) -> Result<Option<Revision>, StoreError> {
        self.with("read a row", |open| open.db.get(key))?
            .map(|stored| decode_header(key, &stored).map(|(revision, _)| revision))
            .transpose()
    }

    fn visit(
        &self,
        start: Bound<&[u8]>,
        end: Bound<&[u8]>,
        direction: Direction,
        visitor: &mut dyn FnMut(Bytes, StoredRow) -> Visit,
    ) -> Result<(), StoreError> {
        let mut range = self.with("list rows", |open| {
            Ok(open.db.range::<&[u8], _>((start, end)))
        })?;
        loop {
            let next = match direction {
                Direction::Rising => range.next(),
                Direction::Falling => range.next_back(),
            };
            let Some(pair) = next else {
                return Ok(());
            };
            let (key, stored) =
                pair.map_err(|error| engine_error(&self.directory, "list rows", error))?;
            let row = decode(&key, &stored)?;
            if visitor(Bytes::copy_from_slice(&key), row) == Visit::Stop {
                return Ok(());
            }
        }
    }

    fn apply(&self, transactions: &[Vec<RowWrite>]) -> Result<(), StoreError> {
        self.with("write", |open| {
            let mut scratch = Vec::with_capacity(1024);
            if transactions.iter().all(|writes| writes.len() == 1) {
                // One key is written atomically by itself, and faster than in a batch.
                for write in transactions.iter().flatten() {
                    match &write.row {
                        Some(row) => open.db.insert(&write.key, encode(row, &mut scratch))?,
                        None => open.db.remove(&write.key)?,
                    };
                }
                return Ok(());
            }
            // A batch is atomic, whatever it holds: several transactions in one cost half of one batch for each.
            // A transaction is never divided; of a key that is written twice the batch keeps the last.
            let mut batch = sled::Batch::default();
            let mut bytes = 0;
            for writes in transactions {
                for write in writes {
                    bytes += write.key.len();
                    match &write.row {
                        Some(row) => {
                            bytes += row.value.len();
                            batch.insert(write.key.as_ref(), encode(row, &mut scratch));
                        }
                        None => batch.remove(write.key.as_ref()),
                    }
                }
                if bytes > BATCH_BYTES {
                    open.db.apply_batch(std::mem::take(&mut batch))?;
                    bytes = 0;
                }
            }
            open.db.apply_batch(batch)?;
            Ok(())
        })
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.with("flush", |open| {
            open.db.flush()?;
            open.file.sync_data().map_err(sled::Error::Io)
        })
    }

    fn close(&self, ended_at: Option<Revision>) -> Result<(), StoreError> {
        let open = self
            .open
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(OpenRows { db, file, _lock }) = open else {
            return Ok(());
        };
        drop((db, file));
        let Some(mark) = ended_at else {
            return Ok(());
        };
        let path = self.directory.join("CLEAN");
        write_small(&self.directory, &path, &mark.to_string()).map_err(|source| StoreError::Io {
            operation: "write",
            path,
            source,
        })
    }
}

/// sled as it comes, for the measurement that compares the store with it.
#[cfg(feature = "bench")]
pub(crate) mod bare {
    use super::{Db, File, Path, StoreError, engine_error, open_sled};

    pub(crate) struct Bare {
        directory: std::path::PathBuf,
        db: Db,
        file: File,
    }

    impl Bare {
        pub(crate) fn open(directory: &Path, cache_bytes: u64) -> Result<Self, StoreError> {
            let db = open_sled(directory, cache_bytes)?;
            let path = directory.join("db");
            let file = File::open(&path).map_err(|source| StoreError::Io {
                operation: "open",
                path,
                source,
            })?;
            Ok(Self {
                directory: directory.to_owned(),
                db,
                file,
            })
        }

        pub(crate) fn insert(&self, key: &[u8], value: Vec<u8>) -> Result<(), StoreError> {
            self.db
                .insert(key, value)
                .map_err(|error| engine_error(&self.directory, "write", error))?;
            Ok(())
        }

        pub(crate) fn sync(&self) -> Result<(), StoreError> {
            self.db
                .flush()
                .and_then(|_| self.file.sync_data().map_err(sled::Error::Io))
                .map_err(|error| engine_error(&self.directory, "flush", error))
        }
    }
}
