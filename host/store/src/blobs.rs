//! Blobs: packages, plugin bytes, plans, full outputs, each under the SHA-256 of its bytes.
//!
//! Owns writing (streamed, hashed on the way, with a limit), reading (streamed, from an offset), and collecting
//! what nothing refers to. It does not know who refers to a blob: [`Blobs::collect`] is told.
//!
//! ```text
//! writer --write*--> finish: sync, rename to its digest, sync the directory --> there
//!        \--error, wrong digest, too large, dropped--> nothing is left
//! ```
//! In a directory: `ab/ab12…` (two digits, then the whole digest), `tmp/` for what is being written (emptied at
//! open), `LOCK` held by the process. Files are written by this module itself, so that a blob that is there is
//! on the disk. Elsewhere: any `object_store`, with the same names.
//!
//! A blob is written first and referred to by a commit afterwards. So that a blob between the two is not
//! collected, the collector leaves alone what is younger than a grace time; writing a blob that is there already
//! makes it young again. The collector and the writers of one process exclude each other for each deletion;
//! between servers that share an object store only the grace time protects.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::{
    MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload, path::Path as ObjectPath,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Mutex, OwnedRwLockReadGuard, RwLock};

use crate::error::StoreError;
use crate::sled::{DirectoryLock, make_directory};

/// Bytes that a local writer collects before it hashes and writes them, and that a reader reads at a time.
const LOCAL_CHUNK_BYTES: usize = 256 * 1024;
/// The same for an object store, whose parts have a least size.
const REMOTE_CHUNK_BYTES: usize = 5 * 1024 * 1024;

/// The SHA-256 of a blob's bytes. As text: 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BlobDigest([u8; 32]);

impl BlobDigest {
    /// The digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobDigest({self})")
    }
}

/// Text that is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no SHA-256 digest; give 64 lower-case hexadecimal digits")]
pub struct DigestParseError {
    text: String,
}

impl FromStr for BlobDigest {
    type Err = DigestParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || DigestParseError {
            text: text.chars().take(80).collect(),
        };
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        if text.len() != 64 {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let (Some(high), Some(low)) = (digit(pair[0]), digit(pair[1])) else {
                return Err(wrong());
            };
            *byte = high << 4 | low;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for BlobDigest {
    type Error = DigestParseError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<BlobDigest> for String {
    fn from(digest: BlobDigest) -> Self {
        digest.to_string()
    }
}

/// Why a blob could not be written or read. After an error of a writer nothing of the blob is left.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    #[error("the data has more than {limit_bytes} bytes, which is the limit; send less")]
    TooLarge { limit_bytes: u64 },
    #[error("the data has the SHA-256 {found}, but {expected} was announced; send it again")]
    WrongDigest {
        expected: BlobDigest,
        found: BlobDigest,
    },
    #[error("there is no blob {digest}")]
    Missing { digest: BlobDigest },
    #[error("blob {digest} is damaged: its bytes have the SHA-256 {found}; restore a backup")]
    Corrupt {
        digest: BlobDigest,
        found: BlobDigest,
    },
    #[error("offset {offset} lies behind the {size_bytes} bytes of blob {digest}")]
    OffsetTooLarge {
        digest: BlobDigest,
        offset: u64,
        size_bytes: u64,
    },
    #[error("a writer that has failed takes no more data; start again")]
    WriterFailed,
    #[error(
        "a blob in an object store cannot be read before it is complete; keep blobs in a directory"
    )]
    NotAFile,
    #[error("cannot {operation} `{}`", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the object store cannot {operation}")]
    Remote {
        operation: &'static str,
        #[source]
        source: object_store::Error,
    },
    #[error("the work on a blob was cut off: {reason}")]
    Interrupted { reason: String },
    /// The lock or the directory of the blobs.
    #[error(transparent)]
    Directory(#[from] StoreError),
}

/// What is known about a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobInfo {
    pub digest: BlobDigest,
    pub size_bytes: u64,
    /// When it was written last, by the clock of the file system or of the object store.
    pub modified: SystemTime,
}

/// The space of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub total_bytes: u64,
    /// What a process without privileges may still use.
    pub free_bytes: u64,
}

/// What a collection did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Collected {
    pub deleted: u64,
    pub deleted_bytes: u64,
    pub kept: u64,
}

/// All blobs of a platform. Cheap to clone.
#[derive(Clone)]
pub struct Blobs {
    inner: Arc<Inner>,
}

struct Inner {
    place: Place,
    /// Held while a blob gets its name, and while one is deleted by the collector.
    naming: Arc<Mutex<()>>,
    /// Read-held by backups, write-held by the collector.
    collecting: Arc<RwLock<()>>,
}

enum Place {
    Directory(LocalDirectory),
    Objects(Arc<dyn ObjectStore>),
}

/// Blobs as files. Its functions block.
pub(crate) struct LocalDirectory {
    root: PathBuf,
    _lock: DirectoryLock,
}

impl LocalDirectory {
    pub(crate) fn open(root: PathBuf) -> Result<Self, BlobError> {
        make_directory(&root)?;
        let lock = DirectoryLock::take(&root)?;
        let tmp = root.join("tmp");
        if tmp.exists() {
            std::fs::remove_dir_all(&tmp).map_err(io("empty", &tmp))?;
        }
        make_directory(&tmp)?;
        sync_directory(&root)?;
        Ok(Self { root, _lock: lock })
    }

    pub(crate) fn begin(&self) -> Result<LocalPart, BlobError> {
        LocalPart::create(self.root.join("tmp").join(temporary_name()))
    }
}

/// A name that no other writer of this or of another process uses at the time.
fn temporary_name() -> String {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
    format!("{}-{number}", std::process::id())
}

/// While it lives, nothing is collected.
#[derive(Debug)]
pub struct CollectionHold {
    _guard: OwnedRwLockReadGuard<()>,
}

impl Blobs {
    /// Opens the blobs of a directory, which is made if it is missing. Removes what an earlier process left
    /// half-written.
    ///
    /// # Errors
    /// [`BlobError::Directory`] when another process has it open or it cannot be made.
    pub async fn open_directory(root: impl Into<PathBuf>) -> Result<Self, BlobError> {
        let root = root.into();
        let directory = blocking(move || LocalDirectory::open(root)).await?;
        Ok(Self::new(Place::Directory(directory)))
    }

    /// Keeps blobs in an object store, such as one that speaks S3.
    #[must_use]
    pub fn in_objects(objects: Arc<dyn ObjectStore>) -> Self {
        Self::new(Place::Objects(objects))
    }

    fn new(place: Place) -> Self {
        Self {
            inner: Arc::new(Inner {
                place,
                naming: Arc::default(),
                collecting: Arc::default(),
            }),
        }
    }

    /// Starts a blob of at most `limit_bytes`.
    ///
    /// # Errors
    /// [`BlobError::Io`], [`BlobError::Remote`].
    pub async fn writer(&self, limit_bytes: u64) -> Result<BlobWriter, BlobError> {
        let name = temporary_name();
        let (sink, chunk_bytes) = match &self.inner.place {
            Place::Directory(LocalDirectory { root, .. }) => {
                let path = root.join("tmp").join(name);
                let part = blocking(move || LocalPart::create(path)).await?;
                (Sink::Local(part), LOCAL_CHUNK_BYTES)
            }
            Place::Objects(objects) => {
                let path = ObjectPath::from(format!("tmp/{name}"));
                let upload = objects
                    .put_multipart(&path)
                    .await
                    .map_err(remote("start an upload"))?;
                let part = RemotePart {
                    upload,
                    path,
                    hasher: Sha256::new(),
                };
                (Sink::Remote(part), REMOTE_CHUNK_BYTES)
            }
        };
        Ok(BlobWriter {
            blobs: self.clone(),
            sink: Some(sink),
            buffer: BytesMut::new(),
            chunk_bytes,
            size_bytes: 0,
            limit_bytes,
        })
    }

    /// Writes a small blob.
    ///
    /// # Errors
    /// Those of [`BlobWriter::finish`].
    pub async fn put_bytes(&self, bytes: Bytes) -> Result<BlobDigest, BlobError> {
        let mut writer = self.writer(bytes.len() as u64).await?;
        writer.write(bytes).await?;
        Ok(writer.finish(None).await?.digest)
    }

    /// Reads a whole blob of at most `limit_bytes` and checks its digest.
    ///
    /// # Errors
    /// [`BlobError::Missing`], [`BlobError::TooLarge`], [`BlobError::Corrupt`].
    pub async fn get_bytes(
        &self,
        digest: BlobDigest,
        limit_bytes: u64,
    ) -> Result<Bytes, BlobError> {
        let mut reader = self.read(digest, 0).await?;
        if reader.size_bytes > limit_bytes {
            return Err(BlobError::TooLarge { limit_bytes });
        }
        let mut all = BytesMut::new();
        while let Some(chunk) = reader.next_chunk().await? {
            all.extend_from_slice(&chunk);
        }
        let found = BlobDigest::of(&all);
        if found != digest {
            return Err(BlobError::Corrupt { digest, found });
        }
        Ok(all.freeze())
    }

    /// Reads a blob from an offset to its end, in chunks.
    ///
    /// # Errors
    /// [`BlobError::Missing`], [`BlobError::OffsetTooLarge`].
    pub async fn read(&self, digest: BlobDigest, offset: u64) -> Result<BlobReader, BlobError> {
        let size_bytes = self
            .size(digest)
            .await?
            .ok_or(BlobError::Missing { digest })?;
        if offset > size_bytes {
            return Err(BlobError::OffsetTooLarge {
                digest,
                offset,
                size_bytes,
            });
        }
        let chunks = match &self.inner.place {
            Place::Directory(LocalDirectory { root, .. }) => {
                let path = local_path(root, digest);
                let opened = path.clone();
                let file = blocking(move || {
                    let mut file =
                        File::open(&opened).map_err(missing_or(digest, "open", &opened))?;
                    file.seek(SeekFrom::Start(offset))
                        .map_err(io("seek in", &opened))?;
                    Ok(file)
                })
                .await?;
                local_chunks(file, path)
            }
            Place::Objects(_) if offset == size_bytes => stream::empty().boxed(),
            Place::Objects(objects) => {
                let options = object_store::GetOptions {
                    range: Some((offset..size_bytes).into()),
                    ..object_store::GetOptions::default()
                };
                let got = objects.get_opts(&object_path(digest), options).await;
                let got = got.map_err(|error| missing_object(digest, "read a blob", error))?;
                got.into_stream().map_err(remote("read a blob")).boxed()
            }
        };
        Ok(BlobReader { size_bytes, chunks })
    }

    /// Its size in bytes; `None` when there is no such blob.
    ///
    /// # Errors
    /// [`BlobError::Io`], [`BlobError::Remote`].
    pub async fn size(&self, digest: BlobDigest) -> Result<Option<u64>, BlobError> {
        Ok(self.info(digest).await?.map(|info| info.size_bytes))
    }

    /// Whether it is there.
    ///
    /// # Errors
    /// Those of [`Blobs::size`].
    pub async fn exists(&self, digest: BlobDigest) -> Result<bool, BlobError> {
        Ok(self.info(digest).await?.is_some())
    }

    /// What is known about it; `None` when there is no such blob.
    ///
    /// # Errors
    /// Those of [`Blobs::size`].
    pub async fn info(&self, digest: BlobDigest) -> Result<Option<BlobInfo>, BlobError> {
        match &self.inner.place {
            Place::Directory(LocalDirectory { root, .. }) => {
                let path = local_path(root, digest);
                blocking(move || local_info(&path, digest)).await
            }
            Place::Objects(objects) => match objects.head(&object_path(digest)).await {
                Ok(meta) => Ok(Some(BlobInfo {
                    digest,
                    size_bytes: meta.size,
                    modified: meta.last_modified.into(),
                })),
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                Err(source) => Err(remote("look for a blob")(source)),
            },
        }
    }

    /// Where the file of a blob is, if blobs are files here. It may be read, never changed.
    #[must_use]
    pub fn file_path(&self, digest: BlobDigest) -> Option<PathBuf> {
        match &self.inner.place {
            Place::Directory(LocalDirectory { root, .. }) => Some(local_path(root, digest)),
            Place::Objects(_) => None,
        }
    }

    /// The space of the file system that the blobs are on; `None` in an object store.
    ///
    /// # Errors
    /// [`BlobError::Io`].
    pub async fn space(&self) -> Result<Option<Space>, BlobError> {
        let Some(root) = self.inner.root().map(Path::to_owned) else {
            return Ok(None);
        };
        let found = blocking(move || {
            rustix::fs::statvfs(&root)
                .map_err(|error| io("measure the space of", &root)(error.into()))
        });
        let found = found.await?;
        Ok(Some(Space {
            total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
            free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
        }))
    }

    /// Deletes a blob whether or not anything refers to it. False when there was none.
    ///
    /// # Errors
    /// [`BlobError::Io`], [`BlobError::Remote`].
    pub async fn delete(&self, digest: BlobDigest) -> Result<bool, BlobError> {
        match &self.inner.place {
            Place::Directory(LocalDirectory { root, .. }) => {
                let path = local_path(root, digest);
                blocking(move || match std::fs::remove_file(&path) {
                    Ok(()) => Ok(true),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
                    Err(error) => Err(io("delete", &path)(error)),
                })
                .await
            }
            Place::Objects(objects) => {
                let there = self.info(digest).await?.is_some();
                match objects.delete(&object_path(digest)).await {
                    Ok(()) => Ok(there),
                    Err(object_store::Error::NotFound { .. }) => Ok(false),
                    Err(source) => Err(remote("delete a blob")(source)),
                }
            }
        }
    }

    /// All blobs by rising digest. Holds the entries of one of 256 directories at a time. What is written or
    /// deleted meanwhile may or may not be among them.
    pub fn list(&self) -> BoxStream<'static, Result<BlobInfo, BlobError>> {
        let blobs = self.clone();
        let start = (0..=u8::MAX, VecDeque::new());
        stream::try_unfold(
            (blobs, start),
            |(blobs, (mut shards, mut found))| async move {
                loop {
                    if let Some(info) = found.pop_front() {
                        return Ok(Some((info, (blobs, (shards, found)))));
                    }
                    let Some(shard) = shards.next() else {
                        return Ok(None);
                    };
                    found = blobs.shard(shard).await?.into();
                }
            },
        )
        .boxed()
    }

    async fn shard(&self, shard: u8) -> Result<Vec<BlobInfo>, BlobError> {
        let mut found: Vec<BlobInfo> = match &self.inner.place {
            Place::Directory(LocalDirectory { root, .. }) => {
                let directory = root.join(format!("{shard:02x}"));
                blocking(move || local_shard(&directory)).await?
            }
            Place::Objects(objects) => {
                objects
                    .list(Some(&ObjectPath::from(format!("{shard:02x}"))))
                    .map_err(remote("list blobs"))
                    .try_filter_map(|meta| async move {
                        let digest = meta.location.filename().and_then(|name| name.parse().ok());
                        Ok(digest.map(|digest| BlobInfo {
                            digest,
                            size_bytes: meta.size,
                            modified: meta.last_modified.into(),
                        }))
                    })
                    .try_collect()
                    .await?
            }
        };
        found.sort_unstable_by_key(|info| info.digest);
        Ok(found)
    }

    /// Keeps the collector away while the value lives; for backups.
    pub async fn hold_collection(&self) -> CollectionHold {
        CollectionHold {
            _guard: Arc::clone(&self.inner.collecting).read_owned().await,
        }
    }

    /// Deletes the blobs that are not live and were written before `written_before` (now less the grace time, which
    /// must exceed the longest time between writing a blob and committing a reference to it). `is_live` is asked
    /// once for each of them; after an error of it nothing more is deleted. Also removes leftovers of uploads to an
    /// object store that are as old.
    ///
    /// # Errors
    /// Those of `is_live`, and [`BlobError`].
    pub async fn collect<E, F, Fut>(
        &self,
        mut is_live: F,
        written_before: SystemTime,
    ) -> Result<Collected, E>
    where
        E: From<BlobError>,
        F: FnMut(BlobDigest) -> Fut,
        Fut: Future<Output = Result<bool, E>>,
    {
        let _collecting = self.inner.collecting.write().await;
        let mut collected = Collected::default();
        let mut all = self.list();
        while let Some(info) = all.next().await {
            let info = info?;
            if info.modified >= written_before || is_live(info.digest).await? {
                collected.kept += 1;
                continue;
            }
            let _naming = self.inner.naming.lock().await;
            // It may have been written again since it was listed.
            let again = self.info(info.digest).await?;
            if again.is_some_and(|again| again.modified >= written_before) {
                collected.kept += 1;
            } else if self.delete(info.digest).await? {
                collected.deleted += 1;
                collected.deleted_bytes += info.size_bytes;
            }
        }
        if let Place::Objects(objects) = &self.inner.place {
            let mut leftovers = objects.list(Some(&ObjectPath::from("tmp")));
            while let Some(meta) = leftovers.next().await {
                let meta = meta.map_err(remote("list uploads"))?;
                if SystemTime::from(meta.last_modified) < written_before {
                    let deleted = objects.delete(&meta.location).await;
                    deleted.map_err(remote("delete an upload"))?;
                }
            }
        }
        Ok(collected)
    }
}

impl fmt::Debug for Blobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.inner.place {
            Place::Directory(LocalDirectory { root, .. }) => write!(f, "Blobs({})", root.display()),
            Place::Objects(objects) => write!(f, "Blobs({objects})"),
        }
    }
}

/// A blob that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    pub digest: BlobDigest,
    pub size_bytes: u64,
}

/// A blob that is being written. Its memory does not depend on the blob's size. Dropping it leaves nothing.
pub struct BlobWriter {
    blobs: Blobs,
    /// Gone after an error.
    sink: Option<Sink>,
    buffer: BytesMut,
    chunk_bytes: usize,
    size_bytes: u64,
    limit_bytes: u64,
}

enum Sink {
    Local(LocalPart),
    Remote(RemotePart),
}

/// A file that is being written; dropping it removes it.
pub(crate) struct LocalPart {
    file: File,
    path: TemporaryFile,
    hasher: Sha256,
}

struct RemotePart {
    upload: Box<dyn MultipartUpload>,
    path: ObjectPath,
    hasher: Sha256,
}

/// Removes the file when dropped, unless it was renamed.
struct TemporaryFile {
    path: PathBuf,
    renamed: bool,
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.renamed
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "a temporary file cannot be removed");
        }
    }
}

impl LocalPart {
    fn create(path: PathBuf) -> Result<Self, BlobError> {
        let file = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(io("create", &path))?;
        Ok(Self {
            file,
            path: TemporaryFile {
                path,
                renamed: false,
            },
            hasher: Sha256::new(),
        })
    }

    pub(crate) fn write(mut self, chunk: &[u8]) -> Result<Self, BlobError> {
        self.hasher.update(chunk);
        self.file
            .write_all(chunk)
            .map_err(io("write to", &self.path.path))?;
        Ok(self)
    }

    /// Makes the bytes durable; the name comes later.
    fn seal(mut self) -> Result<(Self, BlobDigest), BlobError> {
        let digest = BlobDigest(std::mem::take(&mut self.hasher).finalize().into());
        self.file.sync_all().map_err(io("sync", &self.path.path))?;
        Ok((self, digest))
    }

    /// Ends a blob whose digest must be this one.
    pub(crate) fn end(
        self,
        directory: &LocalDirectory,
        expected: BlobDigest,
    ) -> Result<(), BlobError> {
        let (part, found) = self.seal()?;
        if found != expected {
            return Err(BlobError::WrongDigest { expected, found });
        }
        part.name(&directory.root, found)
    }

    /// Gives the file its name and the present as its age.
    fn name(mut self, root: &Path, digest: BlobDigest) -> Result<(), BlobError> {
        let path = local_path(root, digest);
        let directory = root.join(&digest.to_string()[..2]);
        if !directory.is_dir() {
            make_directory(&directory)?;
            sync_directory(root)?;
        }
        let now = rustix::fs::Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_NOW,
        };
        let times = rustix::fs::Timestamps {
            last_access: now,
            last_modification: now,
        };
        rustix::fs::futimens(&self.file, &times)
            .map_err(|error| io("touch", &self.path.path)(error.into()))?;
        std::fs::rename(&self.path.path, &path).map_err(io("rename to", &path))?;
        self.path.renamed = true;
        sync_directory(&directory)
    }
}

impl BlobWriter {
    /// Adds bytes.
    ///
    /// # Errors
    /// [`BlobError::TooLarge`]; after any error nothing is left of the blob.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), BlobError> {
        if self.sink.is_none() {
            return Err(BlobError::WriterFailed);
        }
        self.size_bytes += bytes.len() as u64;
        if self.size_bytes > self.limit_bytes {
            let limit_bytes = self.limit_bytes;
            self.abort().await;
            return Err(BlobError::TooLarge { limit_bytes });
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = self.chunk_bytes - self.buffer.len();
            self.buffer
                .extend_from_slice(&rest.split_to(room.min(rest.len())));
            if self.buffer.len() == self.chunk_bytes {
                self.flush().await?;
            }
        }
        Ok(())
    }

    /// Bytes taken so far.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Opens what was written so far for reading, before the blob has its name. The file must not be written.
    ///
    /// # Errors
    /// [`BlobError::Io`]; [`BlobError::NotAFile`] in an object store. After an error nothing is left of the blob.
    pub async fn reopen(&mut self) -> Result<File, BlobError> {
        if !self.buffer.is_empty() {
            self.flush().await?;
        }
        match &self.sink {
            Some(Sink::Local(part)) => {
                let path = part.path.path.clone();
                blocking(move || File::open(&path).map_err(io("open", &path))).await
            }
            Some(Sink::Remote(_)) => {
                self.abort().await;
                Err(BlobError::NotAFile)
            }
            None => Err(BlobError::WriterFailed),
        }
    }

    /// Ends the blob. When it returns, the blob is there and survives a loss of power.
    ///
    /// # Errors
    /// [`BlobError::WrongDigest`] when its digest is not the expected one.
    pub async fn finish(mut self, expected: Option<BlobDigest>) -> Result<Written, BlobError> {
        if !self.buffer.is_empty() {
            self.flush().await?;
        }
        let size_bytes = self.size_bytes;
        let check = |found: BlobDigest| match expected {
            Some(expected) if expected != found => Err(BlobError::WrongDigest { expected, found }),
            Some(_) | None => Ok(found),
        };
        let inner = Arc::clone(&self.blobs.inner);
        let digest = match self.sink.take().ok_or(BlobError::WriterFailed)? {
            Sink::Local(part) => {
                let (part, digest) = blocking(move || part.seal()).await?;
                let digest = check(digest)?;
                let Some(root) = inner.root().map(Path::to_owned) else {
                    return Err(BlobError::WriterFailed);
                };
                let naming = Arc::clone(&inner.naming).lock_owned().await;
                blocking(move || {
                    // Held to the end even when nobody waits for it any more.
                    let _naming = naming;
                    part.name(&root, digest)
                })
                .await?;
                digest
            }
            Sink::Remote(mut part) => {
                let digest = BlobDigest(std::mem::take(&mut part.hasher).finalize().into());
                if let Err(wrong) = check(digest) {
                    self.sink = Some(Sink::Remote(part));
                    self.abort().await;
                    return Err(wrong);
                }
                let completed = part.upload.complete().await;
                completed.map_err(remote("finish an upload"))?;
                let Place::Objects(objects) = &inner.place else {
                    return Err(BlobError::WriterFailed);
                };
                let _naming = inner.naming.lock().await;
                let copied = objects.copy(&part.path, &object_path(digest)).await;
                let deleted = objects.delete(&part.path).await;
                copied.map_err(remote("name a blob"))?;
                deleted.map_err(remote("delete an upload"))?;
                digest
            }
        };
        Ok(Written { digest, size_bytes })
    }

    async fn flush(&mut self) -> Result<(), BlobError> {
        let sink = self.sink.take().ok_or(BlobError::WriterFailed)?;
        match sink {
            Sink::Local(part) => {
                // The buffer comes back and is used again.
                let mut chunk = std::mem::take(&mut self.buffer);
                let (part, buffer) = blocking(move || {
                    let part = part.write(&chunk)?;
                    chunk.clear();
                    Ok((part, chunk))
                })
                .await?;
                self.buffer = buffer;
                self.sink = Some(Sink::Local(part));
            }
            Sink::Remote(mut part) => {
                let chunk = self.buffer.split().freeze();
                part.hasher.update(&chunk);
                let sent = part.upload.put_part(PutPayload::from_bytes(chunk)).await;
                if let Err(source) = sent {
                    self.sink = Some(Sink::Remote(part));
                    self.abort().await;
                    return Err(remote("take a part")(source));
                }
                self.sink = Some(Sink::Remote(part));
            }
        }
        Ok(())
    }

    async fn abort(&mut self) {
        match self.sink.take() {
            // Dropping it removes the file.
            Some(Sink::Local(_)) | None => {}
            Some(Sink::Remote(mut part)) => {
                if let Err(error) = part.upload.abort().await {
                    tracing::warn!(%error, "an upload cannot be aborted; the collector will remove it");
                }
            }
        }
    }
}

impl fmt::Debug for BlobWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobWriter")
            .field("size_bytes", &self.size_bytes)
            .field("limit_bytes", &self.limit_bytes)
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn root(&self) -> Option<&Path> {
        match &self.place {
            Place::Directory(LocalDirectory { root, .. }) => Some(root),
            Place::Objects(_) => None,
        }
    }
}

/// A blob that is being read.
pub struct BlobReader {
    size_bytes: u64,
    chunks: BoxStream<'static, Result<Bytes, BlobError>>,
}

impl BlobReader {
    /// The size of the whole blob.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// [`BlobError::Io`], [`BlobError::Remote`].
    pub async fn next_chunk(&mut self) -> Result<Option<Bytes>, BlobError> {
        self.chunks.try_next().await
    }

    /// The chunks as a stream, for a body.
    pub fn into_stream(self) -> BoxStream<'static, Result<Bytes, BlobError>> {
        self.chunks
    }
}

impl fmt::Debug for BlobReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobReader")
            .field("size_bytes", &self.size_bytes)
            .finish_non_exhaustive()
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BlobError> + Send + 'static,
) -> Result<T, BlobError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| BlobError::Interrupted {
            reason: error.to_string(),
        })?
}

fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BlobError {
    let path = path.to_owned();
    move |source| BlobError::Io {
        operation,
        path,
        source,
    }
}

fn remote(operation: &'static str) -> impl FnMut(object_store::Error) -> BlobError {
    move |source| BlobError::Remote { operation, source }
}

fn missing_or(
    digest: BlobDigest,
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> BlobError {
    let path = path.to_owned();
    move |source| {
        if source.kind() == std::io::ErrorKind::NotFound {
            BlobError::Missing { digest }
        } else {
            BlobError::Io {
                operation,
                path,
                source,
            }
        }
    }
}

fn missing_object(
    digest: BlobDigest,
    operation: &'static str,
    error: object_store::Error,
) -> BlobError {
    if matches!(error, object_store::Error::NotFound { .. }) {
        BlobError::Missing { digest }
    } else {
        remote(operation)(error)
    }
}

fn local_path(root: &Path, digest: BlobDigest) -> PathBuf {
    let name = digest.to_string();
    root.join(&name[..2]).join(name)
}

fn object_path(digest: BlobDigest) -> ObjectPath {
    let name = digest.to_string();
    ObjectPath::from(format!("{}/{name}", &name[..2]))
}

fn local_info(path: &Path, digest: BlobDigest) -> Result<Option<BlobInfo>, BlobError> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("look at", path)(error)),
    };
    Ok(Some(BlobInfo {
        digest,
        size_bytes: metadata.len(),
        modified: metadata.modified().map_err(io("look at", path))?,
    }))
}

fn local_shard(directory: &Path) -> Result<Vec<BlobInfo>, BlobError> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io("list", directory)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io("list", directory))?;
        let digest = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let Some(digest) = digest {
            found.extend(local_info(&entry.path(), digest)?);
        }
    }
    Ok(found)
}

fn local_chunks(file: File, path: PathBuf) -> BoxStream<'static, Result<Bytes, BlobError>> {
    stream::try_unfold((file, path), |(mut file, path)| async move {
        blocking(move || {
            let mut chunk = vec![0; LOCAL_CHUNK_BYTES];
            let mut filled = 0;
            while filled < chunk.len() {
                match file.read(&mut chunk[filled..]) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(io("read", &path)(error)),
                }
            }
            chunk.truncate(filled);
            Ok((filled > 0).then(|| (Bytes::from(chunk), (file, path))))
        })
        .await
    })
    .boxed()
}

fn sync_directory(directory: &Path) -> Result<(), BlobError> {
    File::open(directory)
        .and_then(|file| file.sync_all())
        .map_err(io("sync", directory))
}
