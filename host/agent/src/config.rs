//! The agent's configuration and the layout of its data directory.
//!
//! ```text
//! config.json     who the platform is, who this server is, what tasks may do here (the policy; edit it locally)
//! identity.key    the private key, 0600, 64 hexadecimal digits
//! agent.lock      held while an agent runs
//! journal         see `journal`; a damaged one is kept as journal.damaged-<time>
//! reserve         space that is given back when a script has to run on a full disk
//! cache/          packages by digest; `<digest>.part` while one is downloaded
//! downloads/      archives of static files while they are downloaded and unpacked
//! runs/<task>/    one script under its shim; removed when the server has the result
//! instances/<instance>/
//!     releases/<release>/   unpacked; <release>.json beside it describes its package
//!     current               link to the installed one
//!     manifest.json, manifest.previous.json
//!     app.json              the application to keep running; apps/<task>/ its shim's directory and log
//!     data/                 the application's own, kept over releases
//! server/         where scripts start that are of no service instance
//! balancers/<load balancer>/ see `balancer`
//! ```

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use windlass_domain::{
    Digest,
    id::{InstanceId, ServerId},
    task::TaskId,
};
use windlass_protocol::{Fingerprint, PublicKey};

use crate::files::{FileError, read_json, write_json};

/// What `windlass-agent register` leaves for `windlass-agent run`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Config {
    /// `https://host:port` of the platform's agent listener.
    pub platform_url: String,
    /// The platform's TLS key.
    pub fingerprint: Fingerprint,
    /// The key that the platform signs with.
    pub platform_key: PublicKey,
    /// This server's id.
    pub server_id: ServerId,
    /// This server's name.
    pub name: String,
    /// What tasks may do on this server.
    #[serde(default)]
    pub policy: Policy,
}

/// What tasks may do on this server, whatever the platform asks. Only somebody with access to the server changes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// OS users that tasks may run as, beside the agent's own.
    pub users: Vec<String>,
    /// Whether tasks may run as root. Default: no.
    pub root: bool,
    /// Whom tasks without a user run as when the agent itself is root.
    pub default_user: Option<String>,
    /// Directories below which tasks may write files by absolute path.
    pub path_roots: Vec<PathBuf>,
    /// The most that the package cache holds, in bytes. Packages of installed releases stay whatever it says.
    pub cache_bytes: u64,
    /// With less free space than this the disk counts as full, in bytes.
    pub min_free_bytes: u64,
    /// The most that a package may unpack to, in bytes.
    pub unpack_bytes: u64,
    /// The most files and directories that a package may hold.
    pub unpack_entries: u64,
    /// How many times its own size a package may unpack to (packages under 1 MiB unpacked are not judged by it).
    pub unpack_ratio: u64,
    /// Whether process trees are kept in cgroups where that is possible.
    pub cgroups: bool,
    /// Whether this server may host load balancers: HAProxy, started by the agent as its own user (its workers become
    /// `haproxy` where that is root).
    pub load_balancers: bool,
}

impl Default for Policy {
    fn default() -> Self {
        // Uploads are judged by the same limits.
        let limits = windlass_archive::Limits::default();
        Self {
            users: Vec::new(),
            root: false,
            default_user: None,
            path_roots: Vec::new(),
            cache_bytes: 2 << 30,
            min_free_bytes: 32 << 20,
            unpack_bytes: limits.bytes,
            unpack_entries: limits.entries,
            unpack_ratio: limits.ratio,
            cgroups: true,
            load_balancers: true,
        }
    }
}

/// A data directory: knows where everything is.
#[derive(Debug, Clone)]
pub struct DataDir(PathBuf);

impl DataDir {
    /// The directory, as an absolute path without links, so that everything in it has one name.
    ///
    /// # Errors
    /// When it cannot be made or resolved.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        use crate::files::Context as _;
        crate::files::make_dir(path, 0o711)?;
        let path = path.canonicalize().during("resolve", path)?;
        Ok(Self(path))
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// See the head of this module.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.0.join("config.json")
    }

    /// See the head of this module.
    #[must_use]
    pub fn identity(&self) -> PathBuf {
        self.0.join("identity.key")
    }

    /// See the head of this module.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.0.join("agent.lock")
    }

    /// See the head of this module.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.0.join("journal")
    }

    /// See the head of this module.
    #[must_use]
    pub fn reserve(&self) -> PathBuf {
        self.0.join("reserve")
    }

    /// See the head of this module.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.0.join("cache")
    }

    /// Archives of static files on their way.
    #[must_use]
    pub fn downloads(&self) -> PathBuf {
        self.0.join("downloads")
    }

    /// A package in the cache.
    #[must_use]
    pub fn cached(&self, digest: &Digest) -> PathBuf {
        self.cache().join(digest.to_string())
    }

    /// All runs.
    #[must_use]
    pub fn runs(&self) -> PathBuf {
        self.0.join("runs")
    }

    /// One run.
    #[must_use]
    pub fn run(&self, task: &TaskId) -> PathBuf {
        self.runs().join(task.to_string())
    }

    /// All instances.
    #[must_use]
    pub fn instances(&self) -> PathBuf {
        self.0.join("instances")
    }

    /// One instance.
    #[must_use]
    pub fn instance(&self, id: &InstanceId) -> PathBuf {
        self.instances().join(id.to_string())
    }

    /// Where scripts start that are of no service instance.
    #[must_use]
    pub fn server(&self) -> PathBuf {
        self.0.join("server")
    }

    /// All load balancers.
    #[must_use]
    pub fn balancers(&self) -> PathBuf {
        self.0.join("balancers")
    }

    /// Reads the configuration.
    ///
    /// # Errors
    /// When it is missing or broken.
    pub fn load_config(&self) -> Result<Config, ConfigError> {
        read_json(&self.config())?.ok_or_else(|| ConfigError::NotRegistered(self.config()))
    }

    /// Writes the configuration.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save_config(&self, config: &Config) -> Result<(), FileError> {
        write_json(&self.config(), config, 0o600)
    }

    /// Takes the lock of one agent per data directory; held until the file is dropped.
    ///
    /// # Errors
    /// When another agent holds it.
    pub fn take_lock(&self) -> Result<std::fs::File, ConfigError> {
        use crate::files::Context as _;
        let path = self.lock();
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .during("open", &path)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| ConfigError::Locked(self.0.clone()))?;
        file.set_len(0).during("write", &path)?;
        std::io::Write::write_all(&mut &file, std::process::id().to_string().as_bytes())
            .during("write", &path)?;
        Ok(file)
    }
}

/// A data directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No configuration.
    #[error("{} does not exist: run `windlass-agent register` first", .0.display())]
    NotRegistered(PathBuf),
    /// Another agent runs there.
    #[error("another agent runs on {}; stop it first (`windlass-agent stop-all --data …` also ends its applications)", .0.display())]
    Locked(PathBuf),
    /// Registered before.
    #[error("{} exists: this data directory is registered already; remove it only if the server was deregistered", .0.display())]
    AlreadyRegistered(PathBuf),
    /// Something in it.
    #[error(transparent)]
    File(#[from] FileError),
}
