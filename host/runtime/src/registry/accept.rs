//! From a settled file to an active plugin, or a rejected file; and back from kept bytes.

use std::{collections::BTreeMap, sync::Arc};

use windlass_domain::digest::Digest;

use super::{Inner, blocking};
use crate::{
    directory::{self, Contents, Stamp},
    error::{LookupError, Rejection, RejectionCode},
    keep::{Known, Staged},
    load,
    plugin::{Loaded, Plugin},
};

/// What became of one file.
struct FileOutcome {
    digest: Option<Digest>,
    size_bytes: Option<u64>,
    result: Result<Candidate, Rejection>,
}

/// A plugin that passed every check of its own, and is not kept yet.
struct Candidate {
    loaded: Arc<Loaded>,
    signed_by: Option<String>,
    /// `None`: these bytes were accepted before, and are kept.
    staged: Option<Staged>,
}

impl Inner {
    /// Loads what is cached before it returns; the rest goes on in the background.
    pub(super) async fn load_at_start(self: &Arc<Self>, files: Vec<(String, Stamp)>) {
        let mut cached = tokio::task::JoinSet::new();
        for (name, stamp) in files {
            let inner = Arc::clone(self);
            cached.spawn(async move {
                let Ok(place) = inner.loading.acquire().await else {
                    return;
                };
                let read = inner.read(&name).await;
                if let Ok(contents) = &read
                    && !inner.keep.is_compiled(contents.digest)
                {
                    // Read again when its turn has come: what waits holds no bytes.
                    drop((place, read));
                    let background = Arc::clone(&inner);
                    inner.tasks.spawn(async move {
                        background.load_in_turn(name, stamp).await;
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

    /// Loads one settled file when there is a place for it.
    pub(super) async fn load_in_turn(self: &Arc<Self>, name: String, stamp: Stamp) {
        let place = tokio::select! {
            place = self.loading.acquire() => place,
            () = self.shutdown.cancelled() => return,
        };
        if place.is_ok() {
            let read = self.read(&name).await;
            self.load_file(name, stamp, read).await;
        }
    }

    async fn read(self: &Arc<Self>, name: &str) -> Result<Contents, Rejection> {
        let (dir, name, limit) = (
            self.dir.clone(),
            name.to_owned(),
            self.sandbox.limits.file_bytes,
        );
        blocking(move || directory::read(&dir, &name, limit)).await
    }

    /// Takes one settled file through all checks and makes it active, or rejected.
    async fn load_file(
        self: &Arc<Self>,
        name: String,
        stamp: Stamp,
        read: Result<Contents, Rejection>,
    ) {
        let outcome = match read {
            Err(rejection) => FileOutcome {
                digest: None,
                size_bytes: None,
                result: Err(rejection),
            },
            Ok(contents) => {
                let digest = contents.digest;
                let size_bytes = Some(contents.bytes.len() as u64);
                let result = tokio::select! {
                    result = self.check(contents, &name) => result,
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
        contents: Contents,
        name: &str,
    ) -> Result<Candidate, Rejection> {
        let Contents {
            digest,
            bytes,
            signature,
        } = contents;
        let signed_by = self.trust.check(digest, &bytes, signature.as_deref())?;
        let (loaded, is_known) = {
            let table = self.table();
            let is_known = table.known.contains_key(&digest);
            (table.loaded.get(&digest).cloned(), is_known)
        };
        if let Some(loaded) = loaded.filter(|_| is_known) {
            return Ok(Candidate {
                loaded,
                signed_by,
                staged: None,
            });
        }
        load::check_bytes(&bytes)?;
        let bytes = Arc::new(bytes);
        let staged = if is_known && self.keep.is_compiled(digest) {
            None
        } else {
            Some(self.compiled(digest, &bytes).await?)
        };
        let loaded = load::load(&self.sandbox, digest, bytes, name, self.sink.clone()).await?;
        Ok(Candidate {
            loaded: Arc::new(loaded),
            signed_by,
            staged,
        })
    }

    /// Stages bytes, and compiles them unless that was done before.
    pub(super) async fn compiled(
        &self,
        digest: Digest,
        bytes: &Arc<Vec<u8>>,
    ) -> Result<Staged, Rejection> {
        let (keep, bytes) = (self.keep.clone(), Arc::clone(bytes));
        let staged = blocking(move || keep.stage(digest, &bytes))
            .await
            .map_err(|error| not_kept(&error))?;
        if !self.keep.is_compiled(digest) {
            self.compiler.compile(&staged.path).await?;
        }
        Ok(staged)
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
        let provides_another;
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
                    provides_another = before != Some(digest);
                    entry.rejection = None;
                    if let Some(known) = table.known.get(&digest) {
                        tracing::info!(
                            plugin.name = known.descriptor.name,
                            plugin.version = %known.descriptor.version,
                            plugin.digest = %digest,
                            plugin.file = name,
                            "plugin is active"
                        );
                        if provides_another {
                            table.log_held_back(&known.descriptor);
                        }
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
                    provides_another = false;
                }
            }
        }
        if provides_another {
            self.write_files().await;
        }
        self.changed();
    }

    /// Keeps a candidate for good, unless a file already provides its version with other bytes: another file, or this file
    /// before it was overwritten.
    async fn accept(
        self: &Arc<Self>,
        name: &str,
        digest: Digest,
        size_bytes: u64,
        candidate: Candidate,
    ) -> Result<(), Rejection> {
        let Candidate {
            loaded,
            signed_by,
            staged,
        } = candidate;
        let known = Known {
            kind: loaded.guest.kind(),
            descriptor: Arc::clone(&loaded.descriptor),
            size_bytes,
            signed_by,
        };
        if let Some(other) =
            self.table()
                .provider_of(&known.descriptor.name, &known.descriptor.version, digest)
        {
            let (plugin, version) = (&known.descriptor.name, &known.descriptor.version);
            let text = if other == name {
                format!(
                    "the file was overwritten with other bytes of the same version {plugin}@{version}; the previous bytes stay active. Raise the version and drop the plugin again, or restore the previous file"
                )
            } else {
                format!(
                    "the file `{other}` already provides {plugin}@{version} with other bytes: raise the version, or remove one of the files"
                )
            };
            return Err(Rejection::new(RejectionCode::DuplicateVersion, text));
        }
        if staged.is_some() || self.table().known.get(&digest) != Some(&known) {
            let (keep, known) = (self.keep.clone(), known.clone());
            blocking(move || {
                keep.accept(digest, staged.as_ref(), &known)?;
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

    pub(super) async fn write_files(&self) {
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

    pub(super) async fn pinned(self: &Arc<Self>, digest: Digest) -> Result<Plugin, LookupError> {
        {
            let table = self.table();
            if table.decisions.revoked.contains(&digest) {
                return Err(LookupError::Revoked { digest });
            }
            if let Some(loaded) = table.loaded.get(&digest) {
                return Ok(Plugin::new(Arc::clone(loaded)));
            }
            if !table.known.contains_key(&digest) {
                return Err(LookupError::UnknownDigest { digest });
            }
        }
        self.load_kept(digest)
            .await
            .map(Plugin::new)
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
}

pub(super) fn not_kept(error: &std::io::Error) -> Rejection {
    Rejection::new(
        RejectionCode::NotKept,
        format!("its bytes cannot be kept: {error}"),
    )
}
