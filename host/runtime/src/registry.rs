//! Which plugins there are: files come and go, versions live side by side, bytes stay.
//!
//! What an operator decided (disabled, revoked, approved, pinned) is kept by the server and given to the registry; what the
//! directory holds is found here. State of one file, and of the plugin that it last provided:
//!
//! ```text
//!            settled            accepted
//!  dropped ──────────► loading ──────────► active ──file removed or replaced──► retired (bytes kept)
//!                         │                  │ ▲
//!                         │ refused          │ │ enabled again
//!                         ▼                  ▼ │
//!                      rejected           disabled          any digest ──► revoked
//! ```
//!
//! A file that is rejected never displaces what it provided before: that stays active, across restarts, until the file is
//! removed or good again. Overwriting the file of a version with other bytes of the same version is such a rejection.

mod accept;
mod provide;
mod status;
mod table;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fmt,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use semver::{Version, VersionReq};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, Semaphore, watch as watched};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use windlass_domain::{digest::Digest, plugin::PluginKind};

pub use provide::{ProvideError, RemoveError, Trial};
pub use status::{PluginState, PluginStatus};

use crate::{
    call::CallSink,
    compile::{COMPILE_SUBCOMMAND, Compiler},
    directory,
    error::{LookupError, OpenError},
    figures::Failing,
    keep::Keep,
    limits::RuntimeLimits,
    plugin::Plugin,
    sandbox::Sandbox,
    trust::Trust,
};
use table::{FileEntry, Table};
use watch::Reports;

/// Files that are read and checked at once: each holds its bytes in memory.
const LOADED_AT_ONCE: usize = 4;

/// How the plugin directory is opened.
pub struct PluginsConfig {
    /// The plugin directory; made if it is missing.
    pub dir: PathBuf,
    /// The platform's own directory for kept bytes and compiled code; made with mode 0700.
    pub state_dir: PathBuf,
    /// The command of the compiling child; its arguments are appended. See [`crate::compile_child_main`].
    pub compile_command: Vec<OsString>,
    /// Limits of guests.
    pub limits: RuntimeLimits,
    /// What operators decided so far.
    pub decisions: Decisions,
    /// Which files are trusted. Default: all.
    pub trust: Trust,
    /// Receives every finished call.
    pub sink: Option<Arc<dyn CallSink>>,
    /// A file counts as settled when it did not change for so long. Default 100 ms.
    pub settle: Duration,
    /// The directory is looked at so often even when nothing was reported. Default 2 s.
    pub rescan: Duration,
}

impl PluginsConfig {
    /// The defaults; the compiling child is this program with [`COMPILE_SUBCOMMAND`].
    ///
    /// # Errors
    /// When this program's own path cannot be found.
    pub fn new(dir: PathBuf, state_dir: PathBuf) -> std::io::Result<Self> {
        Ok(Self {
            dir,
            state_dir,
            compile_command: vec![
                std::env::current_exe()?.into_os_string(),
                COMPILE_SUBCOMMAND.into(),
            ],
            limits: RuntimeLimits::default(),
            decisions: Decisions::default(),
            trust: Trust::default(),
            sink: None,
            settle: Duration::from_millis(100),
            rescan: Duration::from_secs(2),
        })
    }
}

/// What operators decided. The server keeps it; the registry acts on it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Decisions {
    /// Versions that make no new plans.
    pub disabled: BTreeSet<(String, Version)>,
    /// Digests that are not called at all any more.
    pub revoked: BTreeSet<Digest>,
    /// Digests whose wishes are granted.
    pub approved: BTreeSet<Digest>,
    /// Name → version that is the default instead of the highest.
    pub pinned: BTreeMap<String, Version>,
    /// Name → who or what pinned it, to follow the word "by". Names that were pinned by older versions of the platform have none.
    #[serde(default)]
    pub pin_reasons: BTreeMap<String, String>,
    /// Digests that failed again and again, until an operator decides. Shown, and nothing else: nothing is switched by itself.
    #[serde(default)]
    pub failing: BTreeMap<Digest, Failing>,
}

/// The plugins of one directory. Dropping it stops the watching; [`Plugins::close`] also waits for what runs.
pub struct Plugins {
    inner: Arc<Inner>,
}

impl fmt::Debug for Plugins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plugins")
            .field("dir", &self.inner.dir)
            .finish_non_exhaustive()
    }
}

struct Inner {
    dir: PathBuf,
    settle: Duration,
    rescan: Duration,
    sandbox: Arc<Sandbox>,
    keep: Keep,
    compiler: Compiler,
    trust: Trust,
    sink: Option<Arc<dyn CallSink>>,
    table: RwLock<Table>,
    /// One plugin is accepted at a time: two files cannot both become the same version.
    accepting: Mutex<()>,
    /// Places for files that are being loaded.
    loading: Semaphore,
    generation: watched::Sender<u64>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl Plugins {
    /// Opens the plugin directory: plugins whose compiled code is cached are active when this returns, the others are
    /// `loading` (see [`Plugins::settled`]).
    ///
    /// # Errors
    /// When the engine cannot be set up or a directory cannot be used. A bad plugin is no error: it is listed as rejected.
    pub async fn open(config: PluginsConfig) -> Result<Self, OpenError> {
        let PluginsConfig {
            dir,
            state_dir,
            compile_command,
            limits,
            decisions,
            trust,
            sink,
            settle,
            rescan,
        } = config;
        let compile_time = limits.compile_time;
        let compile_memory = limits.compile_memory_bytes;
        let (sandbox, keep, cache_dir, known, last_good, reports, found) = {
            let (dir, state_dir) = (dir.clone(), state_dir.clone());
            blocking(move || {
                let at = |path: &PathBuf| {
                    let path = path.clone();
                    move |source| OpenError::Directory { path, source }
                };
                std::fs::create_dir_all(&dir).map_err(at(&dir))?;
                let cache_dir = Keep::cache_dir(&state_dir);
                // The directories come first: the cache must be private from its first file on.
                Keep::open(&state_dir, String::new()).map_err(at(&state_dir))?;
                let cache_dir = std::fs::canonicalize(cache_dir).map_err(at(&state_dir))?;
                let sandbox = Sandbox::new(limits, Some(&cache_dir))?;
                let keep =
                    Keep::open(&state_dir, sandbox.compatibility()).map_err(at(&state_dir))?;
                let known = keep.list().map_err(at(&state_dir))?;
                let last_good = keep.read_files();
                let reports = Reports::start(&dir);
                let found = directory::scan(&dir).map_err(at(&dir))?;
                Ok::<_, OpenError>((sandbox, keep, cache_dir, known, last_good, reports, found))
            })
            .await?
        };
        let mut table = Table {
            decisions,
            known,
            ..Table::default()
        };
        let mut to_load = Vec::new();
        for (name, stamp) in found {
            let active = last_good.get(&name).copied().filter(|digest| {
                table.known.get(digest).is_some_and(|known| {
                    trust
                        .check_accepted(*digest, known.signed_by.as_deref())
                        .is_ok()
                })
            });
            let entry = match stamp {
                Ok(stamp) => {
                    to_load.push((name.clone(), stamp));
                    FileEntry {
                        stamp: Some(stamp),
                        loading: true,
                        active,
                        ..FileEntry::default()
                    }
                }
                Err(rejection) => FileEntry {
                    rejection: Some(rejection),
                    active,
                    ..FileEntry::default()
                },
            };
            table.files.insert(name, entry);
        }
        let inner = Arc::new(Inner {
            compiler: Compiler::new(compile_command, cache_dir, compile_time, compile_memory),
            dir,
            settle,
            rescan,
            sandbox: Arc::new(sandbox),
            keep,
            trust,
            sink,
            table: RwLock::new(table),
            accepting: Mutex::new(()),
            loading: Semaphore::new(LOADED_AT_ONCE),
            generation: watched::Sender::new(0),
            shutdown: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        inner.load_at_start(to_load).await;
        let watching = Arc::clone(&inner);
        inner
            .tasks
            .spawn(async move { watching.watch_directory(reports).await });
        Ok(Self { inner })
    }

    /// Every plugin, and every file that is loading or rejected; by name, version and file.
    #[must_use]
    pub fn list(&self) -> Vec<PluginStatus> {
        self.inner.table().list()
    }

    /// The plugin to plan with: the pinned or highest enabled version of a name, or the highest that fits `wanted`.
    ///
    /// # Errors
    /// When no active version fits; the error lists what is active.
    pub fn get(&self, name: &str, wanted: Option<&VersionReq>) -> Result<Plugin, LookupError> {
        self.inner.table().get(name, wanted)
    }

    /// The same, of a kind.
    ///
    /// # Errors
    /// As [`Plugins::get`], and when it has another kind.
    pub fn get_of_kind(
        &self,
        kind: PluginKind,
        name: &str,
        wanted: Option<&VersionReq>,
    ) -> Result<Plugin, LookupError> {
        let plugin = self.get(name, wanted)?;
        if plugin.kind() == kind {
            Ok(plugin)
        } else {
            Err(LookupError::WrongKind {
                name: name.to_owned(),
                expected: kind,
                actual: plugin.kind(),
            })
        }
    }

    /// The plugin with a digest, whatever its state, unless it is revoked: what a running order is pinned to. Loaded from the
    /// kept bytes if it has to be.
    ///
    /// # Errors
    /// When it is revoked, was never accepted here, or cannot be loaded any more.
    pub async fn pinned(&self, digest: Digest) -> Result<Plugin, LookupError> {
        self.inner.pinned(digest).await
    }

    /// Whether the wishes of a digest are granted; true when it has none.
    #[must_use]
    pub fn is_approved(&self, digest: Digest) -> bool {
        self.inner.table().is_approved(digest)
    }

    /// Changes what operators decided; takes effect at once. The caller keeps the decisions across restarts.
    pub fn decide(&self, change: impl FnOnce(&mut Decisions)) {
        change(&mut self.inner.table_mut().decisions);
        self.inner.changed();
    }

    /// A counter that rises with every change of [`Plugins::list`].
    #[must_use]
    pub fn changes(&self) -> watched::Receiver<u64> {
        self.inner.generation.subscribe()
    }

    /// Waits until no file that was seen is loading.
    pub async fn settled(&self) {
        let mut changes = self.changes();
        while self.inner.table().files.values().any(|entry| entry.loading) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Takes bytes through every check of a dropped file, and gives a plugin that can be called but that nobody else can have:
    /// nothing is kept, and nothing is live. `signature` is what would stand in its `.sig` file.
    ///
    /// # Errors
    /// [`Rejection`](crate::Rejection), as for a file.
    pub async fn trial(
        &self,
        bytes: Vec<u8>,
        signature: Option<Vec<u8>>,
    ) -> Result<Trial, crate::Rejection> {
        self.inner.trial(Arc::new(bytes), signature).await
    }

    /// Puts a plugin into the directory, as `<name>-<version>.wasm`, and waits until it is live. Bytes that a file provides
    /// already are left as they are.
    ///
    /// # Errors
    /// [`ProvideError`]; the directory is as it was then.
    pub async fn provide(
        &self,
        bytes: Vec<u8>,
        signature: Option<Vec<u8>>,
    ) -> Result<PluginStatus, ProvideError> {
        self.inner.provide(Arc::new(bytes), signature).await
    }

    /// The bytes of an accepted plugin.
    ///
    /// # Errors
    /// [`LookupError::UnknownDigest`], or why they cannot be read any more.
    pub async fn bytes(&self, digest: Digest) -> Result<Vec<u8>, LookupError> {
        self.inner.bytes(digest).await
    }

    /// Removes the file that provides a plugin: it makes no new plans, and running orders keep it.
    ///
    /// # Errors
    /// [`RemoveError`].
    pub async fn withdraw(&self, digest: Digest) -> Result<(), RemoveError> {
        self.inner.withdraw(digest).await
    }

    /// Removes everything of a plugin that no file provides. Whoever is pinned to it cannot call it any more: the caller has
    /// made sure that nobody is.
    ///
    /// # Errors
    /// [`RemoveError`].
    pub async fn forget(&self, digest: Digest) -> Result<(), RemoveError> {
        self.inner.forget(digest).await
    }

    /// Removes a file that was rejected.
    ///
    /// # Errors
    /// [`RemoveError`]; [`RemoveError::NoSuchFile`] when it provides a plugin.
    pub async fn remove_rejected(&self, file: &str) -> Result<(), RemoveError> {
        self.inner.remove_rejected(file).await
    }

    /// Stops watching and waits for what runs.
    pub async fn close(&self) {
        self.inner.shutdown.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

impl Drop for Plugins {
    fn drop(&mut self) {
        self.inner.shutdown.cancel();
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

impl Inner {
    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.generation.send_modify(|generation| *generation += 1);
    }
}
