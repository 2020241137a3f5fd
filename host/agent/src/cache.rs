//! The package cache: downloads that resume, checked by digest, within a limit.
//!
//! A file under its digest's name is whole and was checked; `<digest>.part` is on its way.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    path::Path,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::{Request, StatusCode};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use windlass_domain::{Digest, manifest::Manifest, task::PackageRef};
use windlass_protocol::{BLOBS_PATH, DownloadGrant};

use crate::{
    config::{DataDir, Policy},
    files::{Context as _, FileError, chain, make_dir, read_json, remove_file, sync_dir},
    net::{NetError, Platform},
};

/// Why a package is not in the cache.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Other bytes than promised.
    #[error(
        "the downloaded package has {what} {got}; the platform said {expected}; it was thrown away: upload it again"
    )]
    Mismatch {
        /// Which property.
        what: &'static str,
        /// What came.
        got: String,
        /// What was promised.
        expected: String,
    },
    /// No space.
    #[error(
        "the package has {bytes} bytes and the disk has {free} free, of which {reserved} are kept; free some space"
    )]
    NoSpace {
        /// Its size.
        bytes: u64,
        /// What is free.
        free: u64,
        /// What has to stay free.
        reserved: u64,
    },
    /// A final no.
    #[error("the platform refuses the download with status {0}")]
    Refused(StatusCode),
    /// No grant came.
    #[error("the platform gave no grant for the download")]
    NoGrant,
    /// The file system.
    #[error(transparent)]
    File(#[from] FileError),
}

/// What one attempt came to.
enum Attempt {
    Done,
    /// The grant is not good any more: wait for another.
    Stale,
    /// The connection broke: try again.
    Broken(String),
}

/// Gets a package into the cache. Goes on from what a broken attempt left; waits for a new grant when the session changed.
/// Ends only with the package, a final error, or with the caller's time-out.
///
/// # Errors
/// When the package cannot be had, and trying again would not help.
pub async fn fetch(
    data: &DataDir,
    policy: &Policy,
    platform: &Platform,
    package: &PackageRef,
    mut grants: watch::Receiver<Option<DownloadGrant>>,
) -> Result<(), FetchError> {
    make_dir(&data.cache(), 0o711)?;
    let whole = data.cached(&package.digest);
    if is_intact(&whole, package).await? {
        return Ok(());
    }
    let part = whole.with_extension("part");
    let have = fs::metadata(&part).map_or(0, |meta| meta.len());
    let free = free_bytes(data.path());
    if package
        .size_bytes
        .saturating_sub(have)
        .saturating_add(policy.min_free_bytes)
        > free
    {
        return Err(FetchError::NoSpace {
            bytes: package.size_bytes,
            free,
            reserved: policy.min_free_bytes,
        });
    }
    let mut pause = Duration::from_millis(200);
    loop {
        let grant = grants
            .borrow_and_update()
            .clone()
            .filter(|grant| grant.digest == package.digest);
        let outcome = match &grant {
            Some(grant) => attempt(platform, package, grant, &part).await?,
            None => Attempt::Stale,
        };
        match outcome {
            Attempt::Done => break,
            Attempt::Stale => {
                tracing::debug!("waiting for a grant");
                if grants.changed().await.is_err() {
                    return Err(FetchError::NoGrant);
                }
            }
            Attempt::Broken(reason) => {
                tracing::info!(%reason, "a download broke off; it goes on");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(5));
            }
        }
    }
    let (digest, size) = digest_of(part.clone()).await?;
    let mismatch = if size != package.size_bytes {
        Some((
            "a size of",
            size.to_string(),
            package.size_bytes.to_string(),
        ))
    } else if digest != package.digest {
        Some((
            "the SHA-256",
            digest.to_string(),
            package.digest.to_string(),
        ))
    } else {
        None
    };
    if let Some((what, got, expected)) = mismatch {
        remove_file(&part)?;
        return Err(FetchError::Mismatch {
            what,
            got,
            expected,
        });
    }
    // Unpacking may run as the application's user; packages are no secrets of one application on its own server.
    fs::rename(&part, &whole).during("keep", &whole)?;
    sync_dir(&data.cache())?;
    Ok(())
}

async fn attempt(
    platform: &Platform,
    package: &PackageRef,
    grant: &DownloadGrant,
    part: &Path,
) -> Result<Attempt, FetchError> {
    let mut have = fs::metadata(part).map_or(0, |meta| meta.len());
    if have >= package.size_bytes && have > 0 {
        if have == package.size_bytes {
            return Ok(Attempt::Done);
        }
        remove_file(part)?;
        have = 0;
    }
    let mut request = Request::get(format!("{BLOBS_PATH}/{}", package.digest))
        .header("authorization", format!("Bearer {}", grant.token.reveal()));
    if have > 0 {
        request = request.header("range", format!("bytes={have}-"));
    }
    let response = match platform.request(request, Bytes::new()).await {
        Ok(response) => response,
        Err(error @ (NetError::Url(_) | NetError::Setup(_) | NetError::Request(_))) => {
            return Ok(Attempt::Broken(chain(&error)));
        }
        Err(
            error @ (NetError::Connect { .. }
            | NetError::Tls { .. }
            | NetError::Timeout { .. }
            | NetError::Http { .. }),
        ) => {
            return Ok(Attempt::Broken(chain(&error)));
        }
    };
    let append = match response.status() {
        StatusCode::OK => false,
        StatusCode::PARTIAL_CONTENT => true,
        StatusCode::UNAUTHORIZED => return Ok(Attempt::Stale),
        StatusCode::RANGE_NOT_SATISFIABLE => {
            remove_file(part)?;
            return Ok(Attempt::Broken(
                "the platform cannot go on from there".into(),
            ));
        }
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            return Ok(Attempt::Broken(format!(
                "the platform answers with status {status}"
            )));
        }
        status => return Err(FetchError::Refused(status)),
    };
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .append(append)
        .truncate(!append)
        .open(part)
        .during("open", part)?;
    if !append {
        have = 0;
    }
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        let data = match frame {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            Err(error) => return Ok(Attempt::Broken(chain(&error))),
        };
        have += data.len() as u64;
        if have > package.size_bytes {
            remove_file(part)?;
            return Err(FetchError::Mismatch {
                what: "a size of at least",
                got: have.to_string(),
                expected: package.size_bytes.to_string(),
            });
        }
        file.write_all(&data).during("write", part)?;
    }
    file.sync_all().during("sync", part)?;
    if have < package.size_bytes {
        return Ok(Attempt::Broken(format!(
            "{have} of {} bytes came",
            package.size_bytes
        )));
    }
    Ok(Attempt::Done)
}

/// Whether a cached package is there and still what it was; one that is not is removed.
async fn is_intact(path: &Path, package: &PackageRef) -> Result<bool, FileError> {
    if !path.exists() {
        return Ok(false);
    }
    let (digest, _) = digest_of(path.to_owned()).await?;
    if digest == package.digest {
        return Ok(true);
    }
    tracing::warn!(path = %path.display(), "a cached package was damaged; it is fetched again");
    remove_file(path)?;
    Ok(false)
}

async fn digest_of(path: std::path::PathBuf) -> Result<(Digest, u64), FileError> {
    let named = path.clone();
    let read = move || {
        let mut file = File::open(&path)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 128 * 1024];
        let mut size = 0;
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                return io::Result::Ok((Digest::from_bytes(hash.finalize().into()), size));
            }
            size += count as u64;
            hash.update(&buffer[..count]);
        }
    };
    tokio::task::spawn_blocking(read)
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
        .during("read", &named)
}

/// Bytes that this process may still write on the file system of a path; `u64::MAX` when the kernel does not tell.
#[must_use]
pub fn free_bytes(path: &Path) -> u64 {
    rustix::fs::statvfs(path).map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Removes packages, oldest first, until the cache is within its limit. Those that a manifest or `in_use` names stay.
///
/// # Errors
/// When the cache cannot be read or a file cannot be removed.
pub fn evict(data: &DataDir, policy: &Policy, in_use: &BTreeSet<Digest>) -> Result<(), FileError> {
    let mut kept: BTreeSet<String> = in_use.iter().map(ToString::to_string).collect();
    for instance in fs::read_dir(data.instances())
        .into_iter()
        .flatten()
        .flatten()
    {
        for name in ["manifest.json", "manifest.previous.json"] {
            if let Some(manifest) = read_json::<Manifest>(&instance.path().join(name))? {
                kept.insert(manifest.package.digest.to_string());
            }
        }
    }
    let mut files = Vec::new();
    let mut total = 0;
    for entry in fs::read_dir(data.cache()).into_iter().flatten().flatten() {
        let Ok(meta) = entry.metadata() else { continue };
        let name = entry.file_name().to_string_lossy().into_owned();
        total += meta.len();
        if !kept.contains(name.trim_end_matches(".part")) {
            files.push((meta.modified().ok(), meta.len(), entry.path()));
        }
    }
    files.sort();
    for (_, size, path) in files {
        if total <= policy.cache_bytes {
            break;
        }
        remove_file(&path)?;
        total -= size;
    }
    Ok(())
}
