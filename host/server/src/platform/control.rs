//! The control socket of a running server: what its own user may ask of it without a token, today a backup.
//!
//! A Unix socket `control.sock` in the data directory (mode 0700 both), one JSON line there, one back. It holds no state.
//! A backup holds the platform's keys: that is why it is no call of the API.

use std::{
    fs, io,
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use windlass_store::{
    Blobs, Store, StoreError,
    backup::{self, BackupError, Manifest, SmallFile},
};

/// Name of the socket in the data directory.
const SOCKET: &str = "control.sock";
/// Longest line.
const LINE_MAX_BYTES: u64 = 16 * 1024;
/// How long a line may take.
const LINE_TIMEOUT: Duration = Duration::from_secs(5);
/// Files that belong to a backup beside the store and the blobs, where they exist.
pub(super) const KEY_FILES: [&str; 3] = ["platform.key", "agent-tls.key", "secrets.key"];

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Question {
    Backup { archive: PathBuf },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Done(Manifest),
    Failed(String),
}

/// Why a backup was not made.
#[derive(Debug, thiserror::Error)]
pub enum BackupFailure {
    /// The backup itself.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// A process has the directory open and does not answer.
    #[error("the data directory `{}` is in use by a process that does not answer; stop it, or ask the one that runs there", data.display())]
    NoAnswer {
        /// The data directory.
        data: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The running server did not make it.
    #[error("the running server made no backup: {reason}")]
    Refused {
        /// What it says.
        reason: String,
    },
}

/// Backs a data directory up, whether a server runs on it or not.
///
/// # Errors
/// [`BackupFailure`].
pub async fn back_up(data: &Path, archive: &Path) -> Result<Manifest, BackupFailure> {
    match backup::backup_directory(data, &KEY_FILES, archive).await {
        Err(BackupError::Store(StoreError::Locked { .. })) => {}
        done => return Ok(done?),
    }
    let failed = |source| BackupFailure::NoAnswer {
        data: data.to_owned(),
        source,
    };
    // The server has another working directory.
    let archive = std::path::absolute(archive).map_err(failed)?;
    let answer = ask(data, &Question::Backup { archive })
        .await
        .map_err(failed)?;
    match answer {
        Answer::Done(manifest) => Ok(manifest),
        Answer::Failed(reason) => Err(BackupFailure::Refused { reason }),
    }
}

async fn ask(data: &Path, question: &Question) -> io::Result<Answer> {
    let directory = fs::File::open(data)?;
    let mut stream = UnixStream::connect(short_path(&directory)).await?;
    let mut line = serde_json::to_vec(question)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut answer = String::new();
    BufReader::new(stream)
        .take(LINE_MAX_BYTES)
        .read_line(&mut answer)
        .await?;
    Ok(serde_json::from_str(&answer)?)
}

/// The socket by way of its open directory: the path of a socket has 108 bytes at most.
fn short_path(directory: &fs::File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()))
}

/// What the control socket stands on.
pub(super) struct Control {
    pub(super) store: Arc<dyn Store>,
    pub(super) blobs: Blobs,
    pub(super) data: PathBuf,
}

impl Control {
    /// Listens. One that a killed server left behind is replaced: the store's lock says that nobody else is here.
    pub(super) fn listen(&self) -> io::Result<UnixListener> {
        let directory = fs::File::open(&self.data)?;
        let path = self.data.join(SOCKET);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Err(_) | Ok(()) => {}
        }
        let listener = UnixListener::bind(short_path(&directory))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    /// Answers one after the other, until `stop`; then takes the socket away.
    pub(super) async fn serve(self, listener: UnixListener, stop: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            let served = match accepted {
                Ok((stream, _)) => tokio::select! {
                    () = stop.cancelled() => break,
                    served = self.answer(stream) => served,
                },
                Err(error) => Err(error),
            };
            if let Err(error) = served {
                tracing::warn!(%error, "a request over the control socket failed");
            }
        }
        if let Err(error) = fs::remove_file(self.data.join(SOCKET)) {
            tracing::debug!(%error, "the control socket was gone");
        }
    }

    async fn answer(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut line = String::new();
        let (reader, mut writer) = stream.split();
        let mut reader = BufReader::new(reader.take(LINE_MAX_BYTES));
        timeout(LINE_TIMEOUT, reader.read_line(&mut line)).await??;
        let answer = match serde_json::from_str(&line) {
            Ok(Question::Backup { archive }) => self.back_up(&archive).await,
            Err(error) => Answer::Failed(format!(
                "the question cannot be read: {error}; use the same version of `windlass`"
            )),
        };
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        writer.write_all(&line).await
    }

    async fn back_up(&self, archive: &Path) -> Answer {
        let files: Vec<SmallFile> = KEY_FILES
            .iter()
            .map(|name| SmallFile {
                name: (*name).to_owned(),
                path: self.data.join(name),
            })
            .filter(|file| file.path.exists())
            .collect();
        match backup::backup(&*self.store, &self.blobs, &files, archive).await {
            Ok(manifest) => Answer::Done(manifest),
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "a backup failed");
                Answer::Failed(super::chain(&error))
            }
        }
    }
}
