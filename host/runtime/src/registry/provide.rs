//! Plugins that come and go by request and not by hand: trials, uploads, removals.
//!
//! An upload goes through every check first, and stands in the directory then, whole at once: what happens to it afterwards is
//! what happens to every file there. A crash between leaves either nothing or a file that is loaded at the next start.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use windlass_domain::{digest::Digest, manifest::PluginRef};

use super::{Inner, PluginState, PluginStatus, accept::not_kept, blocking};
use crate::{
    directory::SIGNATURE_SUFFIX,
    error::{LookupError, Rejection, RejectionCode},
    load,
    plugin::Plugin,
};

/// How long an upload waits until its file is live: it was compiled and checked before.
const LIVE_WITHIN: Duration = Duration::from_secs(30);

/// A plugin that was checked and can be called, and is not live.
#[derive(Debug)]
pub struct Trial {
    /// The plugin; its calls are not recorded.
    pub plugin: Plugin,
    /// Name of the key that signed it.
    pub signed_by: Option<String>,
}

/// Why a plugin could not be put into the directory.
#[derive(Debug, thiserror::Error)]
pub enum ProvideError {
    /// It is not a plugin, or not a trusted one.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// A file could not be written.
    #[error(
        "{} cannot be written: make the plugin directory writable for the server's user, or put the file there yourself", path.display()
    )]
    Write {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file stands in the directory, and is not live.
    #[error(
        "the file `{file}` was written and is not live yet: see the list of plugins for its state"
    )]
    NotLive {
        /// Its name.
        file: String,
    },
}

/// Why a plugin or a file could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// No bytes of this digest were accepted here.
    #[error("no plugin with the digest {digest} is kept here")]
    UnknownDigest {
        /// The digest.
        digest: Digest,
    },
    /// A file provides it again.
    #[error("the file `{file}` provides it")]
    Provided {
        /// The file.
        file: String,
    },
    /// There is no such rejected file.
    #[error("there is no rejected file `{file}` in the plugin directory")]
    NoSuchFile {
        /// Its name.
        file: String,
    },
    /// A file could not be removed.
    #[error("{} cannot be removed: make the plugin directory writable for the server's user, or remove the file yourself", path.display())]
    Remove {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl Inner {
    pub(super) async fn trial(
        self: &Arc<Self>,
        bytes: Arc<Vec<u8>>,
        signature: Option<Vec<u8>>,
    ) -> Result<Trial, Rejection> {
        let limit = self.sandbox.limits.file_bytes;
        if bytes.len() as u64 > limit {
            return Err(Rejection::new(
                RejectionCode::TooLarge,
                format!("the file has {} bytes, the limit is {limit}", bytes.len()),
            ));
        }
        let (digest, bytes) = {
            let bytes = Arc::clone(&bytes);
            blocking(move || (Digest::of(&bytes), bytes)).await
        };
        let signed_by = self.trust.check(digest, &bytes, signature.as_deref())?;
        load::check_bytes(&bytes)?;
        let _place = self
            .loading
            .acquire()
            .await
            .map_err(|_| not_kept(&io::Error::other("the plugin engine is shutting down")))?;
        let _staged = self.compiled(digest, &bytes).await?;
        let loaded = load::load(&self.sandbox, digest, bytes, "upload", None).await?;
        Ok(Trial {
            plugin: Plugin::new(Arc::new(loaded)).unrecorded(),
            signed_by,
        })
    }

    pub(super) async fn provide(
        self: &Arc<Self>,
        bytes: Arc<Vec<u8>>,
        signature: Option<Vec<u8>>,
    ) -> Result<PluginStatus, ProvideError> {
        let trial = self.trial(Arc::clone(&bytes), signature.clone()).await?;
        let plugin = trial.plugin.reference().clone();
        if let Some(status) = self.live(plugin.digest) {
            return Ok(status);
        }
        let file = self.file_name_for(&plugin)?;
        let path = self.dir.join(&file);
        let writing = path.clone();
        blocking(move || write_into(&writing, &bytes, signature.as_deref()))
            .await
            .map_err(|source| ProvideError::Write {
                path: path.clone(),
                source,
            })?;
        let mut changes = self.generation.subscribe();
        let live = async {
            loop {
                if let Some(status) = self.live(plugin.digest) {
                    return Ok(status);
                }
                let rejection = self
                    .table()
                    .files
                    .get(&file)
                    .filter(|entry| entry.digest == Some(plugin.digest) && !entry.loading)
                    .and_then(|entry| entry.rejection.clone());
                if let Some(rejection) = rejection {
                    return Err(ProvideError::Rejected(rejection));
                }
                if changes.changed().await.is_err() {
                    return Err(ProvideError::NotLive { file: file.clone() });
                }
            }
        };
        let ended = tokio::select! {
            ended = tokio::time::timeout(LIVE_WITHIN, live) => ended.ok(),
            () = self.shutdown.cancelled() => None,
        };
        match ended {
            Some(Err(ProvideError::Rejected(rejection))) => {
                // What was refused after all, because another file came first, is not left behind.
                remove_with_signature(&path)
                    .map_err(|source| ProvideError::Write { path, source })?;
                Err(rejection.into())
            }
            Some(ended) => ended,
            None => Err(ProvideError::NotLive { file }),
        }
    }

    /// The plugin, where a file provides it now.
    fn live(&self, digest: Digest) -> Option<PluginStatus> {
        self.table().list().into_iter().find(|status| {
            status.digest == Some(digest) && status.file.is_some() && status.descriptor.is_some()
        })
    }

    fn file_name_for(&self, plugin: &PluginRef) -> Result<String, Rejection> {
        let table = self.table();
        let file = format!("{}-{}.wasm", plugin.name, plugin.version);
        if let Some(other) = table.provider_of(&plugin.name, &plugin.version, plugin.digest) {
            return Err(Rejection::new(
                RejectionCode::DuplicateVersion,
                format!(
                    "the file `{other}` already provides {}@{} with other bytes: raise the version, or delete that one first",
                    plugin.name, plugin.version
                ),
            ));
        }
        if self.dir.join(&file).exists() {
            return Ok(format!(
                "{}-{}-{}.wasm",
                plugin.name,
                plugin.version,
                plugin.digest.short()
            ));
        }
        Ok(file)
    }

    pub(super) async fn bytes(self: &Arc<Self>, digest: Digest) -> Result<Vec<u8>, LookupError> {
        if !self.table().known.contains_key(&digest) {
            return Err(LookupError::UnknownDigest { digest });
        }
        let keep = self.keep.clone();
        blocking(move || keep.read(digest))
            .await
            .map_err(|error| LookupError::NotLoadable {
                digest,
                rejection: not_kept(&error),
            })
    }

    pub(super) async fn withdraw(self: &Arc<Self>, digest: Digest) -> Result<(), RemoveError> {
        loop {
            let file = {
                let table = self.table();
                if !table.known.contains_key(&digest) {
                    return Err(RemoveError::UnknownDigest { digest });
                }
                table
                    .files
                    .iter()
                    .find(|(_, entry)| entry.active == Some(digest))
                    .map(|(name, _)| name.clone())
            };
            // The same bytes can stand in several files.
            let Some(file) = file else { return Ok(()) };
            self.remove_file(&file).await?;
        }
    }

    pub(super) async fn remove_rejected(self: &Arc<Self>, file: &str) -> Result<(), RemoveError> {
        let is_rejected = self.table().list().iter().any(|status| {
            status.state == PluginState::Rejected && status.file.as_deref() == Some(file)
        });
        let provides = self
            .table()
            .files
            .get(file)
            .is_some_and(|entry| entry.active.is_some());
        if !is_rejected || provides {
            return Err(RemoveError::NoSuchFile {
                file: file.to_owned(),
            });
        }
        self.remove_file(file).await
    }

    /// Removes a file and forgets it at once, so that who asks next does not see it any more.
    async fn remove_file(self: &Arc<Self>, file: &str) -> Result<(), RemoveError> {
        let path = self.dir.join(file);
        let removing = path.clone();
        blocking(move || remove_with_signature(&removing))
            .await
            .map_err(|source| RemoveError::Remove { path, source })?;
        let _turn = self.accepting.lock().await;
        {
            let mut table = self.table_mut();
            if let Some(active) = table.files.remove(file).and_then(|entry| entry.active) {
                table.retired(active);
            }
        }
        self.write_files().await;
        self.changed();
        Ok(())
    }

    pub(super) async fn forget(self: &Arc<Self>, digest: Digest) -> Result<(), RemoveError> {
        let _turn = self.accepting.lock().await;
        {
            let table = self.table();
            if !table.known.contains_key(&digest) {
                return Err(RemoveError::UnknownDigest { digest });
            }
            if let Some(file) = table.provided().get(&digest) {
                return Err(RemoveError::Provided {
                    file: (*file).to_owned(),
                });
            }
        }
        let (keep, path) = (self.keep.clone(), self.keep.path_of(digest));
        blocking(move || keep.remove(digest))
            .await
            .map_err(|source| RemoveError::Remove { path, source })?;
        {
            let mut table = self.table_mut();
            table.known.remove(&digest);
            table.loaded.remove(&digest);
        }
        self.changed();
        Ok(())
    }
}

/// The signature first: a file that stands without its signature would be rejected for a moment.
fn write_into(path: &Path, bytes: &[u8], signature: Option<&[u8]>) -> io::Result<()> {
    if let Some(signature) = signature {
        write_at_once(&signature_path(path), signature)?;
    }
    if let Err(error) = write_at_once(path, bytes) {
        remove_with_signature(path)?;
        return Err(error);
    }
    path.parent()
        .map_or(Ok(()), |dir| fs::File::open(dir)?.sync_all())
}

fn write_at_once(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let hidden = path.with_file_name(format!(".upload-{name}"));
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .open(&hidden)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&hidden, path));
    if written.is_err() && hidden.exists() {
        fs::remove_file(&hidden)?;
    }
    written
}

fn remove_with_signature(path: &Path) -> io::Result<()> {
    for path in [path.to_owned(), signature_path(path)] {
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn signature_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(SIGNATURE_SUFFIX);
    name.into()
}
