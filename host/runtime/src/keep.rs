//! The bytes of every plugin that was ever accepted, by digest, and what is known of them.
//!
//! An order is pinned to the digests that it was planned with, across restarts and after the file was removed: so bytes are
//! kept (written, synced, renamed) before a plugin becomes active. Layout below the state directory, which is the
//! platform's own (mode 0700):
//!
//! ```text
//! kept/<digest>.wasm, kept/<digest>.json   accepted plugins        staging/          bytes being checked
//! cache/                                   compiled code           compiled/<digest>-<engine>   it was compiled before
//! files.json                               file name → the digest that is active by it
//! ```

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize};
use windlass_domain::{
    digest::Digest,
    plugin::{Descriptor, PluginKind},
};

/// What is kept of an accepted plugin beside its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Known {
    pub(crate) kind: PluginKind,
    pub(crate) descriptor: std::sync::Arc<Descriptor>,
    pub(crate) size_bytes: u64,
    /// Name of the key that signed it.
    #[serde(default)]
    pub(crate) signed_by: Option<String>,
}

#[derive(Debug, Clone)]
pub(crate) struct Keep {
    root: PathBuf,
    engine: String,
}

impl Keep {
    /// `engine` names what compiled code depends on.
    pub(crate) fn open(root: &Path, engine: String) -> io::Result<Self> {
        let keep = Self {
            root: root.to_owned(),
            engine,
        };
        let mut private = fs::DirBuilder::new();
        private.recursive(true).mode(0o700);
        // What was being checked when the process ended is checked again from its file.
        match fs::remove_dir_all(keep.root.join("staging")) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        for part in ["kept", "staging", "cache", "compiled"] {
            private.create(keep.root.join(part))?;
        }
        Ok(keep)
    }

    pub(crate) fn cache_dir(root: &Path) -> PathBuf {
        root.join("cache")
    }

    pub(crate) fn path_of(&self, digest: Digest) -> PathBuf {
        self.root.join("kept").join(format!("{digest}.wasm"))
    }

    fn marker(&self, digest: Digest) -> PathBuf {
        self.root
            .join("compiled")
            .join(format!("{digest}-{}", self.engine))
    }

    pub(crate) fn is_compiled(&self, digest: Digest) -> bool {
        self.marker(digest).exists()
    }

    pub(crate) fn mark_compiled(&self, digest: Digest) -> io::Result<()> {
        fs::write(self.marker(digest), b"")
    }

    /// Writes bytes that are to be checked, under a name of their own: two files can hold the same bytes.
    pub(crate) fn stage(&self, digest: Digest, bytes: &[u8]) -> io::Result<Staged> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let staged = Staged {
            path: self
                .root
                .join("staging")
                .join(format!("{digest}-{number}.wasm")),
        };
        write_synced(&staged.path, bytes)?;
        Ok(staged)
    }

    /// Keeps checked bytes for good, and what is known of them; bytes that are kept already are not staged.
    pub(crate) fn accept(
        &self,
        digest: Digest,
        staged: Option<&Staged>,
        known: &Known,
    ) -> io::Result<()> {
        let kept = self.root.join("kept");
        let record = kept.join(format!("{digest}.json"));
        let temporary = kept.join(format!(".{digest}.json"));
        write_synced(&temporary, &serde_json::to_vec(known)?)?;
        fs::rename(&temporary, &record)?;
        if let Some(staged) = staged {
            fs::rename(&staged.path, self.path_of(digest))?;
        }
        fs::File::open(&kept)?.sync_all()
    }

    /// Removes kept bytes: the record last, so that what a crash leaves is found again.
    pub(crate) fn remove(&self, digest: Digest) -> io::Result<()> {
        let kept = self.root.join("kept");
        let record = kept.join(format!("{digest}.json"));
        for path in [self.marker(digest), self.path_of(digest), record] {
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        fs::File::open(&kept)?.sync_all()
    }

    /// Kept bytes, if they still are what their name says.
    pub(crate) fn read(&self, digest: Digest) -> io::Result<Vec<u8>> {
        let bytes = fs::read(self.path_of(digest))?;
        if Digest::of(&bytes) == digest {
            Ok(bytes)
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the kept bytes do not have their digest any more",
            ))
        }
    }

    /// Everything that is kept. A record that cannot be read is named in the log and left alone.
    pub(crate) fn list(&self) -> io::Result<BTreeMap<Digest, Known>> {
        let mut known = BTreeMap::new();
        for entry in fs::read_dir(self.root.join("kept"))? {
            let path = entry?.path();
            let Some(digest) = path
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| name.strip_suffix(".json"))
                .and_then(|name| name.parse::<Digest>().ok())
            else {
                continue;
            };
            if !self.path_of(digest).exists() {
                continue;
            }
            match fs::read(&path).and_then(|bytes| Ok(serde_json::from_slice(&bytes)?)) {
                Ok(record) => {
                    known.insert(digest, record);
                }
                Err(error) => {
                    tracing::error!(plugin.digest = %digest, "the record of a kept plugin cannot be read: {error}");
                }
            }
        }
        Ok(known)
    }

    /// Which digest each file of the plugin directory was active by.
    pub(crate) fn read_files(&self) -> BTreeMap<String, Digest> {
        match fs::read(self.root.join("files.json")) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::error!("files.json of the plugin state cannot be read: {error}");
                BTreeMap::new()
            }),
            Err(_) => BTreeMap::new(),
        }
    }

    pub(crate) fn write_files(&self, files: &BTreeMap<String, Digest>) -> io::Result<()> {
        let temporary = self.root.join(".files.json");
        write_synced(&temporary, &serde_json::to_vec(files)?)?;
        fs::rename(&temporary, self.root.join("files.json"))
    }
}

/// Bytes being checked; they vanish with this unless they were accepted.
#[derive(Debug)]
pub(crate) struct Staged {
    pub(crate) path: PathBuf,
}

impl Drop for Staged {
    fn drop(&mut self) {
        match fs::remove_file(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::error!("{} cannot be removed: {error}", self.path.display()),
        }
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
