//! One plugin from one file, without a plugin directory: for authors at a command line, and for checks.
//!
//! The same checks as in the directory, in the same order. What differs: the code is compiled in this process, and nothing is
//! kept but, where the caller wants it, the cache of compiled code.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use serde::{Deserialize, Serialize};
use windlass_domain::{digest::Digest, plugin::PluginKind};

use crate::{
    directory,
    error::{OpenError, Rejection},
    json::micros,
    limits::RuntimeLimits,
    load,
    plugin::Plugin,
    sandbox::Sandbox,
};

/// Why a file did not become a plugin.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file is not a plugin.
    #[error("{} is not a plugin: {rejection}", path.display())]
    Rejected {
        /// The file.
        path: PathBuf,
        /// Why not.
        rejection: Rejection,
    },
    /// The engine cannot be set up.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// What loading a file showed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadReport {
    /// SHA-256 of the file.
    pub digest: Digest,
    /// Size of the file, in bytes.
    pub size_bytes: u64,
    /// Its kind.
    pub kind: PluginKind,
    /// Version of the contract that it was built for, for example `1.0.0`.
    pub contract: String,
    /// Names of the interfaces that it imports, sorted.
    pub imports: Vec<String>,
    /// Names of the interfaces that it exports, sorted.
    pub exports: Vec<String>,
    /// Size of its parameters' schema, in bytes.
    pub schema_bytes: u64,
    /// Time of compiling it in this process, in microseconds; small where the code was in the cache.
    pub compile_us: u64,
    /// Whether the code was in the cache.
    pub was_cached: bool,
    /// Time that `describe` computed, in microseconds.
    pub describe_us: u64,
    /// Peak of the memory of `describe`, in bytes.
    pub describe_memory_bytes: u64,
}

/// Loads one file. `cache` is a directory of this user's own for compiled code; without one every load compiles.
///
/// # Errors
/// [`FileError::Rejected`] with the same codes as in a plugin directory; [`FileError::Open`] when this machine cannot run
/// plugins at all.
pub async fn load_file(
    path: &Path,
    limits: RuntimeLimits,
    cache: Option<&Path>,
) -> Result<(Plugin, LoadReport), FileError> {
    let rejected = |rejection: Rejection| FileError::Rejected {
        path: path.to_owned(),
        rejection,
    };
    let (file, file_bytes) = (path.to_owned(), limits.file_bytes);
    let (digest, bytes) =
        tokio::task::spawn_blocking(move || directory::read_file(&file, file_bytes))
            .await
            .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
            .map_err(rejected)?;
    load::check_bytes(&bytes).map_err(rejected)?;
    let sandbox = Arc::new(Sandbox::new(limits, cache)?);
    let size_bytes = bytes.len() as u64;
    let started = Instant::now();
    let component = load::component(&sandbox, Arc::new(bytes))
        .await
        .map_err(rejected)?;
    let compile_us = micros(started.elapsed());
    let name = path
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let (loaded, describe) = load::from_component(&sandbox, digest, &component, &name, None)
        .await
        .map_err(rejected)?;
    let (imports, exports) = load::interfaces(&sandbox.engine, &component);
    let report = LoadReport {
        digest,
        size_bytes,
        kind: loaded.guest.kind(),
        contract: load::contract_of(&exports),
        imports,
        exports,
        schema_bytes: loaded.descriptor.parameters.to_string().len() as u64,
        compile_us,
        was_cached: sandbox.cache_hits() > 0,
        describe_us: micros(describe.guest_time),
        describe_memory_bytes: describe.memory_bytes,
    };
    Ok((Plugin::new(Arc::new(loaded)), report))
}
