//! Examines the bytes of an upload with the code that agents unpack with.
//!
//! ```text
//! first bytes ─► course ─┬─ stream (tar family): a thread of its own reads while the bytes arrive, beside hashing and writing
//!                        ├─ complete (zip, jar; streams when all threads are taken): the written file is read before it is named
//!                        └─ plain: nothing
//! ```
//! At most [`STREAMS`] uploads are examined while they arrive and [`FILES`] complete ones at a time: memory and threads do not
//! grow with the number of clients.

use std::{
    fs::File,
    io::{self, BufRead, Read},
    sync::Arc,
};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use windlass_archive::{Compression, Course, ExamineError, HEAD_BYTES, Kind, Limits};
use windlass_domain::task::PackageFormat;

use crate::service::ServiceError;

/// Uploads that are examined while they arrive.
const STREAMS: usize = 16;
/// Complete files that are examined at a time.
const FILES: usize = 2;
/// Pieces of an upload that wait for their examination.
const QUEUED_PIECES: usize = 16;

/// What all uploads share.
#[derive(Clone)]
pub(super) struct Examiners {
    limits: Limits,
    streams: Arc<Semaphore>,
    files: Arc<Semaphore>,
}

impl Default for Examiners {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            streams: Arc::new(Semaphore::new(STREAMS)),
            files: Arc::new(Semaphore::new(FILES)),
        }
    }
}

/// What an upload is declared to be.
#[derive(Clone)]
pub(super) struct Declared {
    pub(super) file_name: String,
    pub(super) kind: Option<Kind>,
    /// Its size, or the most that it may have.
    pub(super) max_bytes: u64,
}

/// The examination of one upload.
pub(super) struct Examination {
    examiners: Examiners,
    declared: Declared,
    state: State,
}

enum State {
    /// The first bytes, until there are enough.
    Head(Vec<u8>),
    Stream(Stream),
    /// When the file is complete.
    Complete,
    Plain,
}

struct Stream {
    /// `None` as soon as the thread has ended.
    pieces: Option<mpsc::Sender<Message>>,
    verdict: oneshot::Receiver<Result<PackageFormat, ExamineError>>,
}

enum Message {
    Piece(Bytes),
    End,
}

impl Examiners {
    pub(super) fn begin(&self, declared: Declared) -> Examination {
        Examination {
            examiners: self.clone(),
            declared,
            state: State::Head(Vec::new()),
        }
    }
}

impl Examination {
    /// Takes the next bytes.
    pub(super) async fn add(&mut self, bytes: &Bytes) -> Result<(), ServiceError> {
        if let State::Head(head) = &mut self.state {
            let wanted = (HEAD_BYTES - head.len()).min(bytes.len());
            head.extend_from_slice(&bytes[..wanted]);
            if head.len() < HEAD_BYTES {
                return Ok(());
            }
            let rest = bytes.slice(wanted..);
            self.choose().await?;
            return self.pass(rest).await;
        }
        self.pass(bytes.clone()).await
    }

    /// Decides how to go on, by the first bytes.
    async fn choose(&mut self) -> Result<(), ServiceError> {
        let State::Head(head) = &mut self.state else {
            return Ok(());
        };
        let head = std::mem::take(head);
        let (name, kind) = (&self.declared.file_name, self.declared.kind);
        let course = windlass_archive::course(&head, name, kind).map_err(ExamineError::Mismatch);
        self.state = match course.map_err(refused)? {
            Course::Plain => State::Plain,
            Course::Zip | Course::Jar => State::Complete,
            Course::Stream {
                compression,
                otherwise,
            } => match Arc::clone(&self.examiners.streams).try_acquire_owned() {
                Ok(permit) => State::Stream(self.start(compression, otherwise, permit)?),
                Err(_) => State::Complete,
            },
        };
        self.pass(head.into()).await
    }

    fn start(
        &self,
        compression: Compression,
        otherwise: Option<PackageFormat>,
        permit: OwnedSemaphorePermit,
    ) -> Result<Stream, ServiceError> {
        let (pieces, arriving) = mpsc::channel(QUEUED_PIECES);
        let (answer, verdict) = oneshot::channel();
        let (max_bytes, limits) = (self.declared.max_bytes, self.examiners.limits);
        let examine = move || {
            let _permit = permit;
            let source = Arriving {
                pieces: arriving,
                piece: Bytes::new(),
                ended: false,
            };
            let found =
                windlass_archive::examine_course(source, compression, otherwise, max_bytes, limits);
            // The upload may have been given up.
            answer.send(found).ok();
        };
        // Not one of the runtime's threads: it waits for a client.
        std::thread::Builder::new()
            .name("examine-upload".to_owned())
            .spawn(examine)
            .map_err(|error| ServiceError::internal("start to examine an upload", error))?;
        Ok(Stream {
            pieces: Some(pieces),
            verdict,
        })
    }

    async fn pass(&mut self, bytes: Bytes) -> Result<(), ServiceError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let State::Stream(stream) = &mut self.state else {
            return Ok(());
        };
        let Some(pieces) = &stream.pieces else {
            return Ok(());
        };
        if pieces.send(Message::Piece(bytes)).await.is_ok() {
            return Ok(());
        }
        // The thread reads to the end unless it has found what to refuse, or that the file stays as it is.
        stream.pieces = None;
        match stream.verdict().await {
            Ok(format) => {
                debug_assert!(!format.is_archive());
                self.state = State::Plain;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the written file has to be read at the end.
    pub(super) async fn needs_file(&mut self) -> Result<bool, ServiceError> {
        self.choose().await?;
        Ok(match &self.state {
            State::Complete => true,
            State::Head(_) | State::Stream(_) | State::Plain => false,
        })
    }

    /// The verdict on the whole upload; `file` where [`Examination::needs_file`].
    pub(super) async fn finish(
        mut self,
        file: Option<File>,
    ) -> Result<PackageFormat, ServiceError> {
        match (&mut self.state, file) {
            (State::Plain, _) => Ok(PackageFormat::Plain),
            (State::Stream(stream), _) => {
                if let Some(pieces) = stream.pieces.take() {
                    // When the thread has ended before, its verdict says why.
                    pieces.send(Message::End).await.ok();
                }
                stream.verdict().await
            }
            (State::Head(_) | State::Complete, Some(file)) => self.read_file(file).await,
            (State::Head(_) | State::Complete, None) => Err(ServiceError::Unavailable {
                message: "the uploaded file cannot be read to examine it".to_owned(),
            }),
        }
    }

    async fn read_file(self, mut file: File) -> Result<PackageFormat, ServiceError> {
        let permit = Arc::clone(&self.examiners.files)
            .acquire_owned()
            .await
            .map_err(|error| ServiceError::internal("examine an upload", error))?;
        let limits = self.examiners.limits;
        let examined = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let (name, kind) = (&self.declared.file_name, self.declared.kind);
            windlass_archive::examine_file(&mut file, name, kind, limits)
        });
        match examined.await {
            Ok(examined) => examined.map_err(refused),
            Err(_) => Err(failed()),
        }
    }
}

impl Stream {
    async fn verdict(&mut self) -> Result<PackageFormat, ServiceError> {
        match (&mut self.verdict).await {
            Ok(found) => found.map_err(refused),
            Err(_) => Err(failed()),
        }
    }
}

/// The reader of archives has panicked: the input is as bad as it can be.
fn failed() -> ServiceError {
    ServiceError::invalid(
        "package_refused",
        "body",
        "the archive is damaged in a way that stopped the program that reads it",
        "pack it again with another program, for example GNU tar, and upload it again",
    )
}

fn refused(error: ExamineError) -> ServiceError {
    match error {
        ExamineError::Mismatch(mismatch) => ServiceError::invalid(
            "package_format",
            "file_name",
            mismatch.to_string(),
            "Set `file_name` to the name that the file's format has, pack the files as tar (plain, gz, xz, zst, bz2) or zip, \
             or declare what the file is: `kind=archive` is unpacked on servers, `kind=jar` and `kind=file` stay one file.",
        ),
        ExamineError::NotTar(what) => ServiceError::invalid(
            "package_format",
            "file_name",
            format!("the content of the file is not {what}"),
            "Pack the files with tar, or declare `kind=file` if the compressed file is to stay as it is.",
        ),
        ExamineError::Refused(refusal) => ServiceError::invalid(
            "package_refused",
            "body",
            format!("servers could not unpack this package: {refusal}"),
            "Fix the archive and upload it again. It was not stored.",
        ),
        ExamineError::Source(error) => ServiceError::internal("read an upload", error),
    }
}

/// The bytes of an upload as they arrive, for the examining thread.
struct Arriving {
    pieces: mpsc::Receiver<Message>,
    piece: Bytes,
    ended: bool,
}

impl Read for Arriving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Arriving {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.piece.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Message::Piece(piece)) => self.piece = piece,
                Some(Message::End) => self.ended = true,
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, count: usize) {
        // `fill_buf` has returned at least so many.
        self.piece = self.piece.slice(count.min(self.piece.len())..);
    }
}
