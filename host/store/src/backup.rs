//! Backup and restore: rows, blobs and a few small files in one archive.
//!
//! Owns the archive's format. [`backup`] works on a running store, [`backup_directory`] on a stopped one,
//! [`restore`] into an empty directory only.
//!
//! **What a backup shows** is the state at one revision, that of its manifest: rows are scanned while a watch
//! that began before records what changes; after the scan, changes are recorded up to the newest revision then.
//! Restoring keeps, of each row, what has the highest revision. Blobs come after the rows: a blob is written
//! before the first row that refers to it, and the collector is held off from before the scan, so every blob
//! that a row of the backup refers to is in it. Rows on leases are left out: their owners are gone.
//!
//! Rows keep their revisions (they are ETags). Revisions of a restored store go on far behind those of the
//! backup, so that none that was given out after the backup is given out again.
//!
//! ```text
//! archive  = "WINDLASS-BACKUP 1\n" frame* manifest-frame sha256(manifest)
//! frame    = tag u8, length u32 big-endian, payload
//! row      = tag 1: revision u64, key length u16, key, value      deleted = tag 2: revision u64, key
//! blob     = tag 3: digest 32 bytes, size u64; then tag 4 until the size is reached: bytes
//! file     = tag 5: name length u16, name, content
//! manifest = tag 9: JSON, with the SHA-256 of everything before its frame
//! ```
//! The archive holds everything that the platform keeps and is readable by its owner only (0600). It is written
//! under another name and renamed when it is complete; a restore checks all of it before it writes anything,
//! fills a directory beside the target and renames that.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::blobs::{BlobDigest, BlobError, Blobs, LocalDirectory};
use crate::embedded::{RowWrite, Rows, StoredRow, mark_write};
use crate::error::{StoreError, WatchError};
use crate::key::{Key, Prefix};
use crate::sled::{SledOptions, SledRows, make_directory};
use crate::txn::{Revision, VALUE_MAX_BYTES};
use crate::watch::{Event, EventKind, Watch};
use crate::{KEY_MAX_BYTES, PAGE_MAX_ENTRIES, Store};

/// Where the rows are in a data directory.
pub const STORE_DIRECTORY: &str = "store";
/// Where the blobs are in a data directory.
pub const BLOBS_DIRECTORY: &str = "blobs";
/// The version of the archive's format.
pub const ARCHIVE_FORMAT: u32 = 1;
/// Most bytes of a small file.
pub const FILE_MAX_BYTES: usize = 1024 * 1024;

const MAGIC: &[u8] = b"WINDLASS-BACKUP 1\n";
/// How far behind the backup's the revisions of a restored store go on: more than a year of commits.
const RESTORE_SKIP: u64 = 1 << 40;
/// How often a backup that is overtaken by writers begins again.
const ATTEMPTS: u32 = 3;
const WRITE_BYTES: usize = 256 * 1024;
const FRAME_MAX_BYTES: usize = 2 * 1024 * 1024;

const TAG_ROW: u8 = 1;
const TAG_DELETED: u8 = 2;
const TAG_BLOB: u8 = 3;
const TAG_BLOB_DATA: u8 = 4;
const TAG_FILE: u8 = 5;
const TAG_MANIFEST: u8 = 9;

/// A small file beside store and blobs that belongs to the platform's state, such as its key. It is restored under
/// its name in the data directory, with mode 0600.
#[derive(Debug, Clone)]
pub struct SmallFile {
    /// One path segment.
    pub name: String,
    pub path: PathBuf,
}

/// What an archive holds; its last frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u32,
    /// The state of the rows is that of this revision.
    pub revision: Revision,
    /// Frames of rows and of deletions; a row that changed meanwhile has several.
    pub row_frames: u64,
    pub blobs: u64,
    pub blob_bytes: u64,
    pub files: u64,
    /// SHA-256 of everything before the manifest's frame.
    pub sha256: BlobDigest,
}

/// Why a backup or a restore failed. Neither leaves anything behind.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("`{}` exists already; choose another name", path.display())]
    ArchiveExists { path: PathBuf },
    #[error(
        "`{}` exists already: another backup is being written, or one was interrupted; if none is running, delete the file, or choose another name for the archive", path.display()
    )]
    PartialExists { path: PathBuf },
    #[error("`{}` is not empty; restore into a new or an empty directory", path.display())]
    TargetNotEmpty { path: PathBuf },
    #[error("`{}` is no data directory: it has no `{STORE_DIRECTORY}`", path.display())]
    NoDataDirectory { path: PathBuf },
    #[error("`{}` is no Windlass backup", path.display())]
    NotABackup { path: PathBuf },
    #[error(
        "the backup has format {found}, this version reads format {supported}; use a matching version"
    )]
    Format { found: u32, supported: u32 },
    #[error("the backup `{}` is cut off: it ends in the middle; use a complete copy", path.display())]
    Truncated { path: PathBuf },
    #[error("the backup `{}` is altered or damaged: {reason}; use an intact copy", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("the file `{name}` cannot be part of a backup: {reason}")]
    BadFile { name: String, reason: String },
    #[error("writers were faster than the backup {attempts} times; try at a quieter time")]
    Overtaken { attempts: u32 },
    #[error("cannot {operation} `{}`", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the work was cut off: {reason}")]
    Interrupted { reason: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Blob(#[from] BlobError),
}

/// Writes everything to a new archive while the platform runs.
///
/// # Errors
/// [`BackupError::ArchiveExists`], [`BackupError::Overtaken`], those of the store and of the blobs.
pub async fn backup(
    store: &dyn Store,
    blobs: &Blobs,
    files: &[SmallFile],
    archive: &Path,
) -> Result<Manifest, BackupError> {
    // Also a link that leads nowhere has the name.
    if archive.symlink_metadata().is_ok() {
        return Err(BackupError::ArchiveExists {
            path: archive.to_owned(),
        });
    }
    for _ in 0..ATTEMPTS {
        // Dropped, and with it its file, when anything fails.
        let mut writer = ArchiveWriter::create(archive)?;
        let _hold = blobs.hold_collection().await;
        let Some(revision) = write_rows(store, &mut writer).await? else {
            continue;
        };
        write_blobs(blobs, &mut writer).await?;
        for file in files {
            write_file(file, &mut writer).await?;
        }
        return writer.finish(revision).await;
    }
    Err(BackupError::Overtaken { attempts: ATTEMPTS })
}

/// Writes everything of a data directory that no process has open to a new archive. `names` are small files in it;
/// those that are missing are left out.
///
/// # Errors
/// [`StoreError::Locked`] when the platform runs, and those of [`backup`].
pub async fn backup_directory(
    data: &Path,
    names: &[&str],
    archive: &Path,
) -> Result<Manifest, BackupError> {
    let rows = data.join(STORE_DIRECTORY);
    if !rows.is_dir() {
        return Err(BackupError::NoDataDirectory {
            path: data.to_owned(),
        });
    }
    let store = crate::sled::open(rows, SledOptions::default()).await?;
    let done = async {
        let blobs = Blobs::open_directory(data.join(BLOBS_DIRECTORY)).await?;
        let files: Vec<SmallFile> = names
            .iter()
            .map(|name| SmallFile {
                name: (*name).to_owned(),
                path: data.join(name),
            })
            .filter(|file| file.path.exists())
            .collect();
        backup(&*store, &blobs, &files, archive).await
    }
    .await;
    let closed = store.close().await;
    let manifest = done?;
    closed?;
    Ok(manifest)
}

/// Checks an archive and fills a new or empty data directory with it.
///
/// # Errors
/// [`BackupError::TargetNotEmpty`], [`BackupError::Truncated`], [`BackupError::Damaged`] and others; then the
/// target is as it was.
pub async fn restore(archive: &Path, data: &Path) -> Result<Manifest, BackupError> {
    let archive = archive.to_owned();
    let data = data.to_owned();
    blocking(move || restore_blocking(&archive, &data)).await
}

/// Reads a whole archive and checks it.
///
/// # Errors
/// [`BackupError::NotABackup`], [`BackupError::Truncated`], [`BackupError::Damaged`], [`BackupError::Format`].
pub async fn verify(archive: &Path) -> Result<Manifest, BackupError> {
    let archive = archive.to_owned();
    blocking(move || {
        let mut file = open_archive(&archive)?;
        read_archive(&archive, &mut file, &mut |_| Ok(()))
    })
    .await
}

/// `None` when writers were faster.
async fn write_rows(
    store: &dyn Store,
    writer: &mut ArchiveWriter,
) -> Result<Option<Revision>, BackupError> {
    let everything = Prefix::everything();
    let start = store.revision().await?;
    let mut watch = match store.watch(&everything, start).await {
        Ok(watch) => watch,
        Err(error) => return overtaken(error),
    };
    let mut after: Option<Key> = None;
    loop {
        let page = store
            .scan(&everything, after.as_ref(), PAGE_MAX_ENTRIES)
            .await?;
        after = page.entries.last().map(|entry| entry.key.clone());
        for entry in page.entries {
            if !entry.leased {
                writer.row(entry.revision, &entry.key, &entry.value);
            }
        }
        writer.flush_if_full().await?;
        if let Err(error) = write_events(&mut watch, page.revision, writer).await? {
            return overtaken(error);
        }
        if !page.more {
            break;
        }
    }
    let revision = store.revision().await?;
    if let Err(error) = write_events(&mut watch, revision, writer).await? {
        return overtaken(error);
    }
    Ok(Some(revision))
}

fn overtaken(error: WatchError) -> Result<Option<Revision>, BackupError> {
    match error {
        WatchError::Compacted { .. } => Ok(None),
        WatchError::Closed => Err(StoreError::Closed.into()),
    }
}

async fn write_events(
    watch: &mut Watch,
    through: Revision,
    writer: &mut ArchiveWriter,
) -> Result<Result<(), WatchError>, BackupError> {
    loop {
        match watch.next_through(through).await {
            Ok(None) => return Ok(Ok(())),
            Ok(Some(Event {
                revision,
                key,
                kind,
            })) => match kind {
                EventKind::Put {
                    value,
                    leased: false,
                } => writer.row(revision, &key, &value),
                // A row that now hangs on a lease is not kept, whatever it was before.
                EventKind::Put { leased: true, .. } | EventKind::Deleted => {
                    writer.deleted(revision, &key);
                }
            },
            Err(error) => return Ok(Err(error)),
        }
        writer.flush_if_full().await?;
    }
}

async fn write_blobs(blobs: &Blobs, writer: &mut ArchiveWriter) -> Result<(), BackupError> {
    let mut all = blobs.list();
    while let Some(info) = all.next().await {
        let digest = info?.digest;
        let mut reader = match blobs.read(digest, 0).await {
            Ok(reader) => reader,
            // Deleted since it was listed, by somebody who knows that nothing refers to it.
            Err(BlobError::Missing { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        writer.blob(digest, reader.size_bytes());
        let mut hasher = Sha256::new();
        while let Some(chunk) = reader.next_chunk().await? {
            hasher.update(&chunk);
            for part in chunk.chunks(WRITE_BYTES) {
                writer.frame(TAG_BLOB_DATA, &[part]);
            }
            writer.flush_if_full().await?;
        }
        let found = BlobDigest::from_bytes(hasher.finalize().into());
        if found != digest {
            return Err(BlobError::Corrupt { digest, found }.into());
        }
    }
    Ok(())
}

async fn write_file(file: &SmallFile, writer: &mut ArchiveWriter) -> Result<(), BackupError> {
    check_file_name(&file.name).map_err(|reason| BackupError::BadFile {
        name: file.name.clone(),
        reason,
    })?;
    let path = file.path.clone();
    let content = blocking(move || std::fs::read(&path).map_err(io("read", &path))).await?;
    if content.len() > FILE_MAX_BYTES {
        return Err(BackupError::BadFile {
            name: file.name.clone(),
            reason: format!(
                "it has {} bytes, the limit is {FILE_MAX_BYTES}",
                content.len()
            ),
        });
    }
    writer.file(&file.name, &content);
    writer.flush_if_full().await
}

fn check_file_name(name: &str) -> Result<(), String> {
    let own = [STORE_DIRECTORY, BLOBS_DIRECTORY, ".", "..", ""];
    if own.contains(&name) || name.contains('/') || name.contains('\0') || name.len() > 255 {
        return Err("its name must be one path segment of its own".to_owned());
    }
    Ok(())
}

/// An archive that is being written under another name. Dropping it removes it.
struct ArchiveWriter {
    partial: PartialFile,
    state: Option<(File, Sha256)>,
    buffer: Vec<u8>,
    row_frames: u64,
    blobs: u64,
    blob_bytes: u64,
    files: u64,
}

struct PartialFile {
    path: PathBuf,
    target: PathBuf,
    complete: bool,
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.complete
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an incomplete backup cannot be removed");
        }
    }
}

impl ArchiveWriter {
    fn create(target: &Path) -> Result<Self, BackupError> {
        let mut path = OsString::from(target);
        path.push(".partial");
        let path = PathBuf::from(path);
        // A new file that only its owner can read, or none: never a file or link that somebody put there before.
        let file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::AlreadyExists => {
                    BackupError::PartialExists { path: path.clone() }
                }
                _ => io("create", &path)(error),
            })?;
        Ok(Self {
            partial: PartialFile {
                path,
                target: target.to_owned(),
                complete: false,
            },
            state: Some((file, Sha256::new())),
            buffer: MAGIC.to_vec(),
            row_frames: 0,
            blobs: 0,
            blob_bytes: 0,
            files: 0,
        })
    }

    fn frame(&mut self, tag: u8, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        // Every payload is far below 4 GiB: rows, chunks and small files are limited.
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        self.buffer.push(tag);
        self.buffer.extend_from_slice(&length.to_be_bytes());
        for part in parts {
            self.buffer.extend_from_slice(part);
        }
    }

    fn row(&mut self, revision: Revision, key: &Key, value: &[u8]) {
        let key = key.as_bytes();
        let length = u16::try_from(key.len()).unwrap_or(u16::MAX);
        self.frame(
            TAG_ROW,
            &[&revision.0.to_be_bytes(), &length.to_be_bytes(), key, value],
        );
        self.row_frames += 1;
    }

    fn deleted(&mut self, revision: Revision, key: &Key) {
        self.frame(TAG_DELETED, &[&revision.0.to_be_bytes(), key.as_bytes()]);
        self.row_frames += 1;
    }

    fn blob(&mut self, digest: BlobDigest, size_bytes: u64) {
        self.frame(TAG_BLOB, &[digest.as_bytes(), &size_bytes.to_be_bytes()]);
        self.blobs += 1;
        self.blob_bytes += size_bytes;
    }

    fn file(&mut self, name: &str, content: &[u8]) {
        let length = u16::try_from(name.len()).unwrap_or(u16::MAX);
        self.frame(TAG_FILE, &[&length.to_be_bytes(), name.as_bytes(), content]);
        self.files += 1;
    }

    async fn flush_if_full(&mut self) -> Result<(), BackupError> {
        if self.buffer.len() >= WRITE_BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), BackupError> {
        let Some((mut file, mut hasher)) = self.state.take() else {
            return Err(BackupError::Interrupted {
                reason: "an earlier write failed".to_owned(),
            });
        };
        let mut buffer = std::mem::take(&mut self.buffer);
        let path = self.partial.path.clone();
        let (state, buffer) = blocking(move || {
            hasher.update(&buffer);
            file.write_all(&buffer).map_err(io("write to", &path))?;
            buffer.clear();
            Ok(((file, hasher), buffer))
        })
        .await?;
        self.state = Some(state);
        self.buffer = buffer;
        Ok(())
    }

    async fn finish(mut self, revision: Revision) -> Result<Manifest, BackupError> {
        self.flush().await?;
        let hasher = self.state.as_ref().map(|(_, hasher)| hasher.clone());
        let manifest = Manifest {
            format: ARCHIVE_FORMAT,
            revision,
            row_frames: self.row_frames,
            blobs: self.blobs,
            blob_bytes: self.blob_bytes,
            files: self.files,
            sha256: BlobDigest::from_bytes(hasher.unwrap_or_default().finalize().into()),
        };
        let json = serde_json::to_vec(&manifest).map_err(|error| BackupError::Interrupted {
            reason: error.to_string(),
        })?;
        self.frame(TAG_MANIFEST, &[&json]);
        self.buffer.extend_from_slice(&Sha256::digest(&json));
        self.flush().await?;
        let mut partial = self.partial;
        let file = self.state.take();
        blocking(move || {
            if let Some((file, _)) = file {
                file.sync_all().map_err(io("sync", &partial.path))?;
                check_name(&file, &partial.path)?;
            }
            // Not over a file that appeared meanwhile.
            std::fs::hard_link(&partial.path, &partial.target)
                .map_err(io("name", &partial.target))?;
            std::fs::remove_file(&partial.path).map_err(io("rename", &partial.path))?;
            partial.complete = true;
            sync_parent(&partial.target)
        })
        .await?;
        Ok(manifest)
    }
}

/// Whether a name still means the file that was written: in a directory that others can write to it may mean another.
fn check_name(file: &File, path: &Path) -> Result<(), BackupError> {
    let inspect = |meta: std::io::Result<std::fs::Metadata>| {
        meta.map(|meta| (meta.dev(), meta.ino()))
            .map_err(io("inspect", path))
    };
    if inspect(file.metadata())? == inspect(std::fs::symlink_metadata(path))? {
        return Ok(());
    }
    Err(BackupError::Interrupted {
        reason: format!(
            "another process replaced `{}` while the backup was written; write it into a directory that only you can write to",
            path.display()
        ),
    })
}

/// One frame that was read.
enum Frame<'a> {
    Row {
        revision: Revision,
        key: &'a [u8],
        value: &'a [u8],
    },
    Deleted {
        revision: Revision,
        key: &'a [u8],
    },
    Blob {
        digest: BlobDigest,
        size_bytes: u64,
    },
    BlobData(&'a [u8]),
    File {
        name: &'a str,
        content: &'a [u8],
    },
}

fn open_archive(path: &Path) -> Result<File, BackupError> {
    File::open(path).map_err(io("open", path))
}

/// Reads all frames in order and checks everything that the manifest says.
fn read_archive(
    path: &Path,
    file: &mut File,
    each: &mut dyn FnMut(Frame<'_>) -> Result<(), BackupError>,
) -> Result<Manifest, BackupError> {
    let damaged = |reason: &str| BackupError::Damaged {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    file.seek(SeekFrom::Start(0)).map_err(io("read", path))?;
    let mut reader = BufReader::with_capacity(WRITE_BYTES, file);
    let mut magic = [0; MAGIC.len()];
    match reader.read_exact(&mut magic) {
        Ok(()) if magic == MAGIC => {}
        Ok(()) => {
            return Err(BackupError::NotABackup {
                path: path.to_owned(),
            });
        }
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Err(BackupError::NotABackup {
                path: path.to_owned(),
            });
        }
        Err(error) => return Err(io("read", path)(error)),
    }
    let read = |reader: &mut BufReader<&mut File>, bytes: &mut [u8]| {
        reader.read_exact(bytes).map_err(|error| {
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                BackupError::Truncated {
                    path: path.to_owned(),
                }
            } else {
                io("read", path)(error)
            }
        })
    };
    let mut hasher = Sha256::new();
    hasher.update(magic);
    let mut found = (0, 0, 0, 0);
    // Bytes of the blob being read that are still to come, and the digest of those that came.
    let mut blob: Option<(BlobDigest, u64, Sha256)> = None;
    let mut payload = Vec::new();
    loop {
        let mut head = [0; 5];
        read(&mut reader, &mut head)?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > FRAME_MAX_BYTES {
            return Err(damaged("a frame is too long"));
        }
        payload.resize(length, 0);
        read(&mut reader, &mut payload)?;
        if let Some((digest, left, bytes)) = &blob
            && *left == 0
        {
            if BlobDigest::from_bytes(bytes.clone().finalize().into()) != *digest {
                return Err(damaged("a blob does not have its digest"));
            }
            blob = None;
        }
        if blob.is_some() != (head[0] == TAG_BLOB_DATA) {
            return Err(damaged("a blob is not complete"));
        }
        if head[0] == TAG_MANIFEST {
            break;
        }
        hasher.update(head);
        hasher.update(&payload);
        let frame = parse(head[0], &payload).ok_or_else(|| damaged("a frame cannot be read"))?;
        match &frame {
            Frame::Row { .. } | Frame::Deleted { .. } => found.0 += 1,
            Frame::Blob { digest, size_bytes } => {
                found.1 += 1;
                found.2 += size_bytes;
                blob = Some((*digest, *size_bytes, Sha256::new()));
            }
            Frame::BlobData(bytes) => {
                if let Some((_, left, hasher)) = &mut blob {
                    *left = left
                        .checked_sub(bytes.len() as u64)
                        .ok_or_else(|| damaged("a blob is too long"))?;
                    hasher.update(bytes);
                }
            }
            Frame::File { .. } => found.3 += 1,
        }
        each(frame)?;
    }
    let mut sum = [0; 32];
    read(&mut reader, &mut sum)?;
    if sum != <[u8; 32]>::from(Sha256::digest(&payload)) {
        return Err(damaged("its manifest does not have its digest"));
    }
    let mut more = [0; 1];
    if reader.read(&mut more).map_err(io("read", path))? != 0 {
        return Err(damaged("something follows its end"));
    }
    let manifest: Manifest = serde_json::from_slice(&payload)
        .map_err(|error| damaged(&format!("its manifest cannot be read: {error}")))?;
    if manifest.format != ARCHIVE_FORMAT {
        return Err(BackupError::Format {
            found: manifest.format,
            supported: ARCHIVE_FORMAT,
        });
    }
    if manifest.sha256 != BlobDigest::from_bytes(hasher.finalize().into()) {
        return Err(damaged(
            "its content does not have the digest of its manifest",
        ));
    }
    let said = (
        manifest.row_frames,
        manifest.blobs,
        manifest.blob_bytes,
        manifest.files,
    );
    if said != found {
        return Err(damaged("its counts are not those of its manifest"));
    }
    Ok(manifest)
}

/// `None` when the payload is not what its tag says, or breaks a rule of rows.
fn parse(tag: u8, payload: &[u8]) -> Option<Frame<'_>> {
    match tag {
        TAG_ROW => {
            let (revision, rest) = payload.split_first_chunk::<8>()?;
            let (length, rest) = rest.split_first_chunk::<2>()?;
            let (key, value) = rest.split_at_checked(u16::from_be_bytes(*length).into())?;
            (is_key(key) && value.len() <= VALUE_MAX_BYTES).then(|| Frame::Row {
                revision: Revision(u64::from_be_bytes(*revision)),
                key,
                value,
            })
        }
        TAG_DELETED => {
            let (revision, key) = payload.split_first_chunk::<8>()?;
            is_key(key).then(|| Frame::Deleted {
                revision: Revision(u64::from_be_bytes(*revision)),
                key,
            })
        }
        TAG_BLOB => {
            let (digest, size) = payload.split_first_chunk::<32>()?;
            Some(Frame::Blob {
                digest: BlobDigest::from_bytes(*digest),
                size_bytes: u64::from_be_bytes(size.try_into().ok()?),
            })
        }
        TAG_BLOB_DATA => Some(Frame::BlobData(payload)),
        TAG_FILE => {
            let (length, rest) = payload.split_first_chunk::<2>()?;
            let (name, content) = rest.split_at_checked(u16::from_be_bytes(*length).into())?;
            let name = std::str::from_utf8(name).ok()?;
            check_file_name(name).ok()?;
            Some(Frame::File { name, content })
        }
        _ => None,
    }
}

fn is_key(key: &[u8]) -> bool {
    !key.is_empty() && key.len() <= KEY_MAX_BYTES && key[0] != 0
}

/// A directory that is being filled. Dropping it removes it.
struct Staging {
    path: PathBuf,
    complete: bool,
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.complete
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an incomplete restore cannot be removed");
        }
    }
}

fn restore_blocking(archive: &Path, data: &Path) -> Result<Manifest, BackupError> {
    match std::fs::read_dir(data) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                return Err(BackupError::TargetNotEmpty {
                    path: data.to_owned(),
                });
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("look into", data)(error)),
    }
    let mut file = open_archive(archive)?;
    read_archive(archive, &mut file, &mut |_| Ok(()))?;
    let data = std::path::absolute(data).map_err(io("find", data))?;
    let mut name = OsString::from(".");
    name.push(data.file_name().unwrap_or_default());
    name.push(".restoring");
    let path = data.with_file_name(name);
    if path.exists() {
        // What a restore into the same place left when it was killed.
        std::fs::remove_dir_all(&path).map_err(io("remove", &path))?;
    }
    make_directory(&path)?;
    let mut staging = Staging {
        path,
        complete: false,
    };
    let manifest = fill(archive, &mut file, &staging.path)?;
    std::fs::rename(&staging.path, &data).map_err(io("rename to", &data))?;
    staging.complete = true;
    sync_parent(&data)?;
    Ok(manifest)
}

fn fill(archive: &Path, file: &mut File, target: &Path) -> Result<Manifest, BackupError> {
    let rows = SledRows::open(
        &target.join(STORE_DIRECTORY),
        SledOptions::default().cache_bytes,
    )?;
    let blobs = LocalDirectory::open(target.join(BLOBS_DIRECTORY))?;
    let mut part = None;
    let mut names = HashSet::new();
    let mut unsynced = 0;
    let manifest = read_archive(archive, file, &mut |frame| {
        match frame {
            Frame::Row {
                revision,
                key,
                value,
            } => {
                let row = StoredRow {
                    revision,
                    leased: false,
                    value: Bytes::copy_from_slice(value),
                };
                keep_newer(&rows, key, revision, Some(row))?;
                unsynced += 1;
            }
            Frame::Deleted { revision, key } => {
                keep_newer(&rows, key, revision, None)?;
                unsynced += 1;
            }
            Frame::Blob {
                digest,
                size_bytes: 0,
            } => blobs.begin()?.end(&blobs, digest)?,
            Frame::Blob { digest, size_bytes } => {
                part = Some((blobs.begin()?, digest, size_bytes));
            }
            Frame::BlobData(bytes) => {
                if let Some((writing, digest, left)) = part.take() {
                    let writing = writing.write(bytes)?;
                    let left = left.saturating_sub(bytes.len() as u64);
                    if left == 0 {
                        writing.end(&blobs, digest)?;
                    } else {
                        part = Some((writing, digest, left));
                    }
                }
            }
            Frame::File { name, content } => {
                if !names.insert(name.to_owned()) {
                    return Err(BackupError::BadFile {
                        name: name.to_owned(),
                        reason: "it stands twice in the backup".to_owned(),
                    });
                }
                write_small_file(&target.join(name), content)?;
            }
        }
        if unsynced >= 10_000 {
            rows.sync()?;
            unsynced = 0;
        }
        Ok(())
    })?;
    let mark = Revision(manifest.revision.0.saturating_add(RESTORE_SKIP));
    rows.apply(&[vec![mark_write(mark)]])?;
    rows.sync()?;
    rows.close(Some(mark))?;
    File::open(target)
        .and_then(|directory| directory.sync_all())
        .map_err(io("sync", target))?;
    Ok(manifest)
}

fn keep_newer(
    rows: &SledRows,
    key: &[u8],
    revision: Revision,
    row: Option<StoredRow>,
) -> Result<(), StoreError> {
    let there = rows.revision_of(key)?;
    if there.is_some_and(|there| there >= revision) {
        return Ok(());
    }
    rows.apply(&[vec![RowWrite {
        key: Bytes::copy_from_slice(key),
        row,
    }]])
}

fn write_small_file(path: &Path, content: &[u8]) -> Result<(), BackupError> {
    let mut file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(io("create", path))?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(io("write", path))
}

fn sync_parent(path: &Path) -> Result<(), BackupError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(io("sync", parent))
}

fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BackupError {
    let path = path.to_owned();
    move |source| BackupError::Io {
        operation,
        path,
        source,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BackupError> + Send + 'static,
) -> Result<T, BackupError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| BackupError::Interrupted {
            reason: error.to_string(),
        })?
}
