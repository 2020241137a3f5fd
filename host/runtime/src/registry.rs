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
//! removed or good again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use notify::Watcher;
use semver::{Version, VersionReq};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use windlass_domain::{
    digest::Digest,
    plugin::{Descriptor, PluginKind},
};

use crate::{
    compile::{COMPILE_SUBCOMMAND, Compiler},
    directory::{self, Stamp},
    error::{LookupError, OpenError, Rejection, RejectionCode},
    keep::{Keep, Known},
    limits::RuntimeLimits,
    load,
    plugin::{CallSink, Loaded, Plugin},
    sandbox::Sandbox,
};

/// Loaded plugins that no file provides any more and nobody uses: so many stay, for orders that come back to them.
const MAX_IDLE_RETIRED: usize = 16;

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
}

/// State of a plugin, or of a file that would be one.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum PluginState {
    /// Being compiled and checked.
    Loading,
    /// Can be planned with.
    Active,
    /// Provided by a file, and makes no new plans; running orders keep it.
    Disabled,
    /// No file provides it any more; running orders keep it.
    Retired,
    /// Not called at all any more; running orders block.
    Revoked,
    /// Not a plugin, for the given reason.
    Rejected,
}

/// One line of the list of plugins: a plugin, or a file that is loading or rejected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PluginStatus {
    /// The file that provides it; `None` when retired.
    pub file: Option<String>,
    /// SHA-256 of its bytes, once they were read.
    pub digest: Option<Digest>,
    /// Its state.
    pub state: PluginState,
    /// Why it is rejected.
    pub rejection: Option<Rejection>,
    /// Its kind, once it was accepted.
    pub kind: Option<PluginKind>,
    /// What it says of itself, once it was accepted.
    #[schema(value_type = Option<Descriptor>)]
    pub descriptor: Option<Arc<Descriptor>>,
    /// Whether it is what its bare name stands for.
    pub is_default: bool,
    /// Whether its wishes are granted; true when it has none.
    pub approved: bool,
    /// Size in bytes, once they were read.
    pub size_bytes: Option<u64>,
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
    sink: Option<Arc<dyn CallSink>>,
    table: RwLock<Table>,
    /// One plugin is accepted at a time: two files cannot both become the same version.
    accepting: Mutex<()>,
    generation: watch::Sender<u64>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Table {
    files: BTreeMap<String, FileEntry>,
    loaded: HashMap<Digest, Arc<Loaded>>,
    known: BTreeMap<Digest, Known>,
    decisions: Decisions,
}

#[derive(Debug, Default)]
struct FileEntry {
    /// What was last looked at; `None`: the file could not even be looked at.
    stamp: Option<Stamp>,
    loading: bool,
    /// Of the bytes that were last read.
    digest: Option<Digest>,
    size_bytes: Option<u64>,
    rejection: Option<Rejection>,
    /// The accepted plugin that this file provides, or provided before it was replaced by something that was rejected.
    active: Option<Digest>,
}

/// Reports of changes in the plugin directory, made before the first look at it, so that no change falls between.
struct Reports {
    seen: mpsc::Receiver<()>,
    /// `None`: there are no reports, and the directory is looked at from time to time only.
    _watcher: Option<notify::RecommendedWatcher>,
}

impl Reports {
    fn start(dir: &Path) -> Self {
        let (report, seen) = mpsc::channel::<()>(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // An error may stand for a change that was not seen.
            if event.map_or(true, |event| is_change(event.kind)) {
                let _full_when_a_look_is_due_already = report.try_send(());
            }
        })
        .and_then(|mut watcher| {
            watcher.watch(dir, notify::RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        if let Err(error) = &watcher {
            tracing::error!(
                "changes of the plugin directory are not reported, it is looked at from time to time: {error}"
            );
        }
        Self {
            seen,
            _watcher: watcher.ok(),
        }
    }
}

/// Whether files may be others than before. Opening and reading are reported too: a look at the directory would cause the next.
fn is_change(kind: notify::EventKind) -> bool {
    use notify::{
        EventKind,
        event::{AccessKind, AccessMode},
    };
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        EventKind::Any
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Remove(_)
        | EventKind::Other => true,
    }
}

/// What became of one file.
struct FileOutcome {
    digest: Option<Digest>,
    size_bytes: Option<u64>,
    result: Result<Candidate, Rejection>,
}

/// A plugin that passed every check of its own, and is not kept yet.
enum Candidate {
    /// These bytes were accepted before and are loaded.
    Same,
    New(Arc<Loaded>, crate::keep::Staged),
    /// These bytes were accepted before, and were loaded from what is kept.
    Kept(Arc<Loaded>),
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
                let sandbox = Sandbox::new(limits, &cache_dir)?;
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
            let active = last_good
                .get(&name)
                .copied()
                .filter(|digest| table.known.contains_key(digest));
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
            sink,
            table: RwLock::new(table),
            accepting: Mutex::new(()),
            generation: watch::Sender::new(0),
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
    pub fn changes(&self) -> watch::Receiver<u64> {
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

    /// Loads what is cached before it returns; the rest goes on in the background.
    async fn load_at_start(self: &Arc<Self>, files: Vec<(String, Stamp)>) {
        let mut cached = tokio::task::JoinSet::new();
        for (name, stamp) in files {
            let inner = Arc::clone(self);
            cached.spawn(async move {
                let read = inner.read(&name).await;
                if let Ok((digest, _)) = &read
                    && !inner.keep.is_compiled(*digest)
                {
                    let background = Arc::clone(&inner);
                    inner.tasks.spawn(async move {
                        background.load_file(name, stamp, read).await;
                    });
                    return;
                }
                inner.load_file(name, stamp, read).await;
            });
        }
        while let Some(joined) = cached.join_next().await {
            if let Err(error) = joined {
                tracing::error!("loading a plugin at start failed: {error}");
            }
        }
        // A file that is bad now provides what it provided before.
        let provided: Vec<Digest> = {
            let table = self.table();
            table
                .files
                .values()
                .filter_map(|entry| entry.active)
                .filter(|digest| !table.loaded.contains_key(digest))
                .collect()
        };
        for digest in provided {
            if let Err(error) = self.load_kept(digest).await {
                tracing::error!(plugin.digest = %digest, "a kept plugin cannot be loaded: {error}");
            }
        }
        self.changed();
    }

    async fn read(self: &Arc<Self>, name: &str) -> Result<(Digest, Arc<Vec<u8>>), Rejection> {
        let (dir, name, limit) = (
            self.dir.clone(),
            name.to_owned(),
            self.sandbox.limits.file_bytes,
        );
        blocking(move || directory::read(&dir, &name, limit))
            .await
            .map(|(_, digest, bytes)| (digest, Arc::new(bytes)))
    }

    /// Takes one settled file through all checks and makes it active, or rejected.
    async fn load_file(
        self: &Arc<Self>,
        name: String,
        stamp: Stamp,
        read: Result<(Digest, Arc<Vec<u8>>), Rejection>,
    ) {
        let outcome = match read {
            Err(rejection) => FileOutcome {
                digest: None,
                size_bytes: None,
                result: Err(rejection),
            },
            Ok((digest, bytes)) => {
                let size_bytes = Some(bytes.len() as u64);
                let result = tokio::select! {
                    result = self.check(digest, bytes, &name) => result,
                    () = self.shutdown.cancelled() => return,
                };
                FileOutcome {
                    digest: Some(digest),
                    size_bytes,
                    result,
                }
            }
        };
        self.settle_file(&name, stamp, outcome).await;
    }

    async fn check(
        self: &Arc<Self>,
        digest: Digest,
        bytes: Arc<Vec<u8>>,
        name: &str,
    ) -> Result<Candidate, Rejection> {
        {
            let table = self.table();
            if table.loaded.contains_key(&digest) && table.known.contains_key(&digest) {
                return Ok(Candidate::Same);
            }
        }
        load::check_bytes(&bytes)?;
        if self.table().known.contains_key(&digest) && self.keep.is_compiled(digest) {
            let loaded = load::load(&self.sandbox, digest, bytes, name, self.sink.clone()).await?;
            return Ok(Candidate::Kept(Arc::new(loaded)));
        }
        let staged = {
            let (keep, bytes) = (self.keep.clone(), Arc::clone(&bytes));
            blocking(move || keep.stage(digest, &bytes))
                .await
                .map_err(|error| not_kept(&error))?
        };
        if !self.keep.is_compiled(digest) {
            self.compiler.compile(&staged.path).await?;
        }
        let loaded = load::load(&self.sandbox, digest, bytes, name, self.sink.clone()).await?;
        Ok(Candidate::New(Arc::new(loaded), staged))
    }

    async fn settle_file(self: &Arc<Self>, name: &str, stamp: Stamp, outcome: FileOutcome) {
        let _turn = self.accepting.lock().await;
        let FileOutcome {
            digest,
            size_bytes,
            result,
        } = outcome;
        let result = match (digest, result) {
            (Some(digest), Ok(candidate)) => self
                .accept(name, digest, size_bytes.unwrap_or(0), candidate)
                .await
                .map(|()| digest),
            (_, Err(rejection)) => Err(rejection),
            (None, Ok(_)) => return,
        };
        {
            let mut table = self.table_mut();
            // The file was removed, or changed again, since: what comes next settles it.
            let Some(entry) = table
                .files
                .get_mut(name)
                .filter(|entry| entry.stamp == Some(stamp))
            else {
                return;
            };
            entry.loading = false;
            entry.digest = digest;
            entry.size_bytes = size_bytes;
            match result {
                Ok(digest) => {
                    let before = entry.active.replace(digest);
                    entry.rejection = None;
                    if let Some(known) = table.known.get(&digest) {
                        tracing::info!(
                            plugin.name = known.descriptor.name,
                            plugin.version = %known.descriptor.version,
                            plugin.digest = %digest,
                            plugin.file = name,
                            "plugin is active"
                        );
                    }
                    if let Some(before) = before.filter(|before| *before != digest) {
                        table.retired(before);
                    }
                }
                Err(rejection) => {
                    tracing::error!(
                        plugin.file = name,
                        plugin.rejection = ?rejection.code,
                        "the file is not accepted as a plugin: {rejection}"
                    );
                    entry.rejection = Some(rejection);
                }
            }
        }
        self.write_files().await;
        self.changed();
    }

    /// Keeps a candidate for good, unless another file already provides its version.
    async fn accept(
        self: &Arc<Self>,
        name: &str,
        digest: Digest,
        size_bytes: u64,
        candidate: Candidate,
    ) -> Result<(), Rejection> {
        let (loaded, staged) = match candidate {
            Candidate::Same => (self.table().loaded.get(&digest).cloned(), None),
            Candidate::Kept(loaded) => (Some(loaded), None),
            Candidate::New(loaded, staged) => (Some(loaded), Some(staged)),
        };
        let Some(loaded) = loaded else {
            return Err(Rejection::new(
                RejectionCode::NotKept,
                "the plugin was unloaded while it was checked: touch the file",
            ));
        };
        let known = Known {
            kind: loaded.guest.kind(),
            descriptor: Arc::clone(&loaded.descriptor),
            size_bytes,
        };
        if let Some(other) = self.table().provider_of(
            &known.descriptor.name,
            &known.descriptor.version,
            name,
            digest,
        ) {
            return Err(Rejection::new(
                RejectionCode::DuplicateVersion,
                format!(
                    "the file `{other}` already provides {}@{} with other bytes: raise the version, or remove one of the files",
                    known.descriptor.name, known.descriptor.version
                ),
            ));
        }
        if let Some(staged) = staged {
            let (keep, known) = (self.keep.clone(), known.clone());
            blocking(move || {
                keep.accept(digest, &staged, &known)?;
                keep.mark_compiled(digest)
            })
            .await
            .map_err(|error| not_kept(&error))?;
        }
        let mut table = self.table_mut();
        table.known.insert(digest, known);
        table.loaded.insert(digest, loaded);
        Ok(())
    }

    async fn write_files(&self) {
        let files: BTreeMap<String, Digest> = self
            .table()
            .files
            .iter()
            .filter_map(|(name, entry)| Some((name.clone(), entry.active?)))
            .collect();
        let keep = self.keep.clone();
        if let Err(error) = blocking(move || keep.write_files(&files)).await {
            tracing::error!("the state of the plugin directory cannot be written: {error}");
        }
    }

    async fn pinned(self: &Arc<Self>, digest: Digest) -> Result<Plugin, LookupError> {
        {
            let table = self.table();
            if table.decisions.revoked.contains(&digest) {
                return Err(LookupError::Revoked { digest });
            }
            if let Some(loaded) = table.loaded.get(&digest) {
                return Ok(Plugin(Arc::clone(loaded)));
            }
            if !table.known.contains_key(&digest) {
                return Err(LookupError::UnknownDigest { digest });
            }
        }
        self.load_kept(digest)
            .await
            .map(Plugin)
            .map_err(|rejection| LookupError::NotLoadable { digest, rejection })
    }

    /// Loads an accepted plugin from its kept bytes.
    async fn load_kept(self: &Arc<Self>, digest: Digest) -> Result<Arc<Loaded>, Rejection> {
        let keep = self.keep.clone();
        let bytes = blocking(move || keep.read(digest))
            .await
            .map_err(|error| not_kept(&error))?;
        if !self.keep.is_compiled(digest) {
            self.compiler.compile(&self.keep.path_of(digest)).await?;
            let keep = self.keep.clone();
            blocking(move || keep.mark_compiled(digest))
                .await
                .map_err(|error| not_kept(&error))?;
        }
        let loaded = load::load(
            &self.sandbox,
            digest,
            Arc::new(bytes),
            "kept",
            self.sink.clone(),
        )
        .await?;
        let mut table = self.table_mut();
        let loaded = Arc::clone(table.loaded.entry(digest).or_insert(Arc::new(loaded)));
        table.drop_idle_retired();
        Ok(loaded)
    }

    async fn watch_directory(self: &Arc<Self>, mut reports: Reports) {
        let mut unsettled = BTreeMap::new();
        loop {
            let pause = if unsettled.is_empty() {
                self.rescan
            } else {
                self.settle
            };
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                // A closed channel never wakes: the watcher could not be made.
                Some(()) = reports.seen.recv() => {}
                () = tokio::time::sleep(pause) => {}
            }
            self.look(&mut unsettled).await;
        }
    }

    /// One look at the directory: forgets what is gone, loads what has settled.
    async fn look(self: &Arc<Self>, unsettled: &mut BTreeMap<String, (Stamp, Instant)>) {
        let dir = self.dir.clone();
        let found = match blocking(move || directory::scan(&dir)).await {
            Ok(found) => found,
            Err(error) => {
                tracing::error!("the plugin directory cannot be read: {error}");
                return;
            }
        };
        unsettled.retain(|name, _| found.contains_key(name));
        let mut changed = false;
        let mut settled = Vec::new();
        {
            let mut table = self.table_mut();
            let gone: Vec<String> = table
                .files
                .keys()
                .filter(|name| !found.contains_key(*name))
                .cloned()
                .collect();
            for name in gone {
                changed = true;
                if let Some(active) = table.files.remove(&name).and_then(|entry| entry.active) {
                    table.retired(active);
                }
            }
            for (name, stamp) in found {
                match stamp {
                    Err(rejection) => {
                        let entry = table.files.entry(name.clone()).or_default();
                        if entry.rejection.as_ref() != Some(&rejection) {
                            tracing::error!(
                                plugin.file = name,
                                plugin.rejection = ?rejection.code,
                                "the file is not accepted as a plugin: {rejection}"
                            );
                            entry.rejection = Some(rejection);
                            entry.stamp = None;
                            entry.loading = false;
                            changed = true;
                        }
                    }
                    Ok(stamp) => {
                        if table
                            .files
                            .get(&name)
                            .is_some_and(|entry| entry.stamp == Some(stamp))
                        {
                            unsettled.remove(&name);
                            continue;
                        }
                        match unsettled.get(&name) {
                            Some((before, since))
                                if *before == stamp && since.elapsed() >= self.settle =>
                            {
                                unsettled.remove(&name);
                                let entry = table.files.entry(name.clone()).or_default();
                                entry.stamp = Some(stamp);
                                entry.loading = true;
                                changed = true;
                                settled.push((name, stamp));
                            }
                            Some((before, _)) if *before == stamp => {}
                            Some(_) | None => {
                                unsettled.insert(name, (stamp, Instant::now()));
                            }
                        }
                    }
                }
            }
        }
        if changed {
            let _turn = self.accepting.lock().await;
            self.write_files().await;
            self.changed();
        }
        for (name, stamp) in settled {
            let inner = Arc::clone(self);
            self.tasks.spawn(async move {
                let read = inner.read(&name).await;
                inner.load_file(name, stamp, read).await;
            });
        }
    }
}

fn not_kept(error: &std::io::Error) -> Rejection {
    Rejection::new(
        RejectionCode::NotKept,
        format!("its bytes cannot be kept: {error}"),
    )
}

impl Table {
    /// Digests that a file provides, with that file.
    fn provided(&self) -> BTreeMap<Digest, &str> {
        self.files
            .iter()
            .filter_map(|(name, entry)| Some((entry.active?, name.as_str())))
            .collect()
    }

    /// Another file that provides the same name and version with other bytes.
    fn provider_of(
        &self,
        plugin: &str,
        version: &Version,
        file: &str,
        digest: Digest,
    ) -> Option<String> {
        self.files.iter().find_map(|(name, entry)| {
            let active = entry.active.filter(|active| *active != digest)?;
            let known = self.known.get(&active)?;
            let same = name != file
                && known.descriptor.name == plugin
                && known.descriptor.version == *version;
            same.then(|| name.clone())
        })
    }

    fn is_approved(&self, digest: Digest) -> bool {
        self.decisions.approved.contains(&digest)
            || self.known.get(&digest).is_some_and(|known| {
                known.descriptor.wishes.users.is_empty()
                    && known.descriptor.wishes.path_roots.is_empty()
            })
    }

    fn is_enabled(&self, digest: Digest, descriptor: &Descriptor) -> bool {
        !self.decisions.revoked.contains(&digest)
            && !self
                .decisions
                .disabled
                .contains(&(descriptor.name.clone(), descriptor.version.clone()))
    }

    /// Enabled plugins of a name that a file provides, highest version last; pre-releases stand below every release.
    fn candidates(&self, name: &str) -> Vec<(Version, Digest)> {
        let mut versions: Vec<_> = self
            .provided()
            .into_keys()
            .filter_map(|digest| {
                let descriptor = &self.known.get(&digest)?.descriptor;
                (descriptor.name == name
                    && self.is_enabled(digest, descriptor)
                    && self.loaded.contains_key(&digest))
                .then(|| (descriptor.version.clone(), digest))
            })
            .collect();
        versions.sort_by_key(|(version, _)| (version.pre.is_empty(), version.clone()));
        versions
    }

    fn default_of(&self, name: &str) -> Option<Digest> {
        let candidates = self.candidates(name);
        self.decisions
            .pinned
            .get(name)
            .and_then(|pinned| candidates.iter().find(|(version, _)| version == pinned))
            .or(candidates.last())
            .map(|(_, digest)| *digest)
    }

    fn get(&self, name: &str, wanted: Option<&VersionReq>) -> Result<Plugin, LookupError> {
        let candidates = self.candidates(name);
        if candidates.is_empty() {
            return Err(LookupError::NoSuchPlugin {
                name: name.to_owned(),
            });
        }
        let digest = match wanted {
            None => self.default_of(name),
            Some(wanted) => candidates
                .iter()
                .rev()
                .find(|(version, _)| wanted.matches(version))
                .map(|(_, digest)| *digest),
        };
        digest
            .and_then(|digest| self.loaded.get(&digest))
            .map(|loaded| Plugin(Arc::clone(loaded)))
            .ok_or_else(|| LookupError::NoSuchVersion {
                name: name.to_owned(),
                wanted: wanted.map(ToString::to_string).unwrap_or_default(),
                active: candidates
                    .iter()
                    .map(|(version, _)| version.to_string())
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    fn list(&self) -> Vec<PluginStatus> {
        let provided = self.provided();
        let defaults: BTreeSet<Digest> = self
            .known
            .values()
            .map(|known| known.descriptor.name.as_str())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .filter_map(|name| self.default_of(name))
            .collect();
        let mut plugins: Vec<PluginStatus> = self
            .known
            .iter()
            .map(|(digest, known)| {
                let file = provided.get(digest).map(|name| (*name).to_owned());
                PluginStatus {
                    state: if self.decisions.revoked.contains(digest) {
                        PluginState::Revoked
                    } else if file.is_none() {
                        PluginState::Retired
                    } else if self.is_enabled(*digest, &known.descriptor) {
                        PluginState::Active
                    } else {
                        PluginState::Disabled
                    },
                    file,
                    digest: Some(*digest),
                    rejection: None,
                    kind: Some(known.kind),
                    descriptor: Some(Arc::clone(&known.descriptor)),
                    is_default: defaults.contains(digest),
                    approved: self.is_approved(*digest),
                    size_bytes: Some(known.size_bytes),
                }
            })
            .collect();
        plugins.sort_by(|one, two| {
            let key = |status: &PluginStatus| {
                status
                    .descriptor
                    .as_ref()
                    .map(|descriptor| (descriptor.name.clone(), descriptor.version.clone()))
            };
            (key(one), one.digest).cmp(&(key(two), two.digest))
        });
        plugins.extend(self.files.iter().filter_map(|(name, entry)| {
            let state = match (entry.loading, &entry.rejection) {
                (true, _) => PluginState::Loading,
                (false, Some(_)) => PluginState::Rejected,
                (false, None) => return None,
            };
            Some(PluginStatus {
                file: Some(name.clone()),
                digest: entry.digest.filter(|_| !entry.loading),
                state,
                rejection: entry.rejection.clone().filter(|_| !entry.loading),
                kind: None,
                descriptor: None,
                is_default: false,
                approved: false,
                size_bytes: entry.size_bytes.filter(|_| !entry.loading),
            })
        }));
        plugins
    }

    fn retired(&mut self, digest: Digest) {
        if self.provided().contains_key(&digest) {
            return;
        }
        if let Some(known) = self.known.get(&digest) {
            tracing::info!(
                plugin.name = known.descriptor.name,
                plugin.version = %known.descriptor.version,
                plugin.digest = %digest,
                "plugin is retired; running orders keep it"
            );
        }
        self.drop_idle_retired();
    }

    /// Unloads retired plugins that nobody uses, beyond a number that stays.
    fn drop_idle_retired(&mut self) {
        let provided: BTreeSet<Digest> = self.provided().into_keys().collect();
        let idle: Vec<Digest> = self
            .loaded
            .iter()
            .filter(|(digest, loaded)| {
                !provided.contains(*digest) && Arc::strong_count(loaded) == 1
            })
            .map(|(digest, _)| *digest)
            .collect();
        for digest in idle.into_iter().skip(MAX_IDLE_RETIRED) {
            self.loaded.remove(&digest);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::{fs, sync::mpsc, time::Duration};

    use super::*;

    /// Otherwise each look at the directory would cause the next, here and in every server that shares it.
    #[test]
    fn a_look_at_the_directory_is_no_change_of_it_and_a_written_file_is() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("one.wasm"), "one").unwrap();
        let (report, reports) = mpsc::sync_channel(64);
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                report.send(event.unwrap().kind).unwrap();
            })
            .unwrap();
        watcher
            .watch(dir.path(), notify::RecursiveMode::NonRecursive)
            .unwrap();
        let next = || reports.recv_timeout(Duration::from_secs(10)).unwrap();

        directory::scan(dir.path()).unwrap();
        fs::read(dir.path().join("one.wasm")).unwrap();
        fs::write(dir.path().join("two.wasm"), "two").unwrap();
        let mut looks = 0;
        let mut kind = next();
        while !is_change(kind) {
            looks += 1;
            kind = next();
        }
        assert!(looks > 0, "a look is reported");
        assert!(kind.is_create(), "{kind:?}");
        // The file counts when it is closed, not only when it is made.
        while kind
            != notify::EventKind::Access(notify::event::AccessKind::Close(
                notify::event::AccessMode::Write,
            ))
        {
            kind = next();
        }
        assert!(is_change(kind));
    }
}
