//! The platform's identity towards agents: the key it signs welcomes with, and the key of its TLS listener.
//!
//! Two files in a directory with mode 0700, each with mode 0600, made at the first start and never changed:
//! `platform.key` (32 bytes, Ed25519) and `agent-tls.key` (PKCS#8, ECDSA P-256). The certificate is made anew from the TLS
//! key at each start: agents pin the *key*, so there is nothing to renew. Losing either file means that every agent has to
//! register again; a backup must hold them. Source: design, "Agents".

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use windlass_protocol::{Fingerprint, Identity};

use crate::ids::random_bytes;

/// The largest key file that is read.
const KEY_FILE_MAX_BYTES: u64 = 16 * 1024;

/// Why the platform has no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file could not be read or written.
    #[error("cannot {operation} `{}`", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Others than the owner may use the file.
    #[error(
        "the key file `{}` has mode {mode:04o}, so that others may read it; run `chmod 600` on it, and make new keys if it may have leaked",
        path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file does not hold a key.
    #[error("`{}` is not {expected}; restore it from a backup (deleting it makes every agent register again)", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
    },
    /// The certificate could not be made of the key.
    #[error("the TLS certificate could not be made")]
    Certificate(#[source] rcgen::Error),
    /// rustls did not take the certificate.
    #[error("the TLS certificate cannot be used")]
    Tls(#[source] rustls::Error),
}

/// The platform's keys. `Debug` shows nothing private.
#[derive(Debug)]
pub struct PlatformIdentity {
    signing: Identity,
    fingerprint: Fingerprint,
    tls: Arc<ServerConfig>,
}

impl PlatformIdentity {
    /// Reads the identity in `directory`, or makes it where there is none. Blocks; called once at start.
    ///
    /// # Errors
    /// [`IdentityError`]. Files that are there are never replaced.
    pub fn open(directory: &Path) -> Result<Self, IdentityError> {
        make_private_directory(directory)?;
        let seed_path = directory.join("platform.key");
        let seed = load_or_create(&seed_path, || Ok(random_bytes::<32>().to_vec()))?;
        let seed = <[u8; 32]>::try_from(seed).map_err(|_| IdentityError::Malformed {
            path: seed_path,
            expected: "a key of 32 bytes",
        })?;
        let tls_path = directory.join("agent-tls.key");
        let tls_key = load_or_create(&tls_path, || {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256);
            Ok(key.map_err(IdentityError::Certificate)?.serialize_der())
        })?;
        let tls_key = KeyPair::try_from(tls_key).map_err(|_| IdentityError::Malformed {
            path: tls_path,
            expected: "a PKCS#8 private key",
        })?;
        let certificate = CertificateParams::new(vec!["windlass".to_owned()])
            .and_then(|params| params.self_signed(&tls_key))
            .map_err(IdentityError::Certificate)?;
        let fingerprint = Fingerprint::of_key(&tls_key.subject_public_key_info());
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(tls_key.serialize_der()));
        Ok(Self {
            signing: Identity::from_seed(seed),
            fingerprint,
            tls: Arc::new(tls_config(certificate.der().clone(), private)?),
        })
    }

    /// The key that welcomes are signed with.
    #[must_use]
    pub fn signing(&self) -> &Identity {
        &self.signing
    }

    /// What activation codes carry and agents pin.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The agents' listener.
    #[must_use]
    pub fn tls(&self) -> Arc<ServerConfig> {
        self.tls.clone()
    }
}

fn tls_config(
    certificate: rustls::pki_types::CertificateDer<'static>,
    private: PrivateKeyDer<'static>,
) -> Result<ServerConfig, IdentityError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(IdentityError::Tls)?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], private)
        .map_err(IdentityError::Tls)?;
    // Sessions last for days: resumption would save nothing and costs memory for each agent.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Makes a directory that only its owner may enter; one that is there is left as it is.
///
/// # Errors
/// [`IdentityError::Io`].
pub(crate) fn make_private_directory(directory: &Path) -> Result<(), IdentityError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(directory).map_err(failed("make", directory))
}

/// The bytes of a private file, which is made with mode 0600 where there is none: written beside it, synced, linked into
/// place, so that a crash leaves a whole file or none, and two starts at once agree on one.
///
/// # Errors
/// [`IdentityError`]; those of `make`.
pub(crate) fn load_or_create(
    path: &Path,
    make: impl FnOnce() -> Result<Vec<u8>, IdentityError>,
) -> Result<Vec<u8>, IdentityError> {
    if let Some(bytes) = load(path)? {
        return Ok(bytes);
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let bytes = make()?;
    let written = write_private(&temporary, &bytes).and_then(|()| {
        // `link` fails where the file exists by now, `rename` would replace it.
        match fs::hard_link(&temporary, path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(failed("make", path)(error))
            }
            Err(_) | Ok(()) => Ok(()),
        }
    });
    fs::remove_file(&temporary).map_err(failed("remove", &temporary))?;
    written?;
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("sync", directory))?;
    load(path)?.ok_or_else(|| IdentityError::Malformed {
        path: path.to_owned(),
        expected: "a file that stays",
    })
}

fn write_private(path: &Path, bytes: &[u8]) -> Result<(), IdentityError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path).map_err(failed("make", path))?;
    file.write_all(bytes).map_err(failed("write", path))?;
    file.sync_all().map_err(failed("sync", path))
}

fn load(path: &Path) -> Result<Option<Vec<u8>>, IdentityError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let mode = file
        .metadata()
        .map_err(failed("read", path))?
        .permissions()
        .mode()
        & 0o7777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    let mut bytes = Vec::new();
    file.take(KEY_FILE_MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(failed("read", path))?;
    Ok(Some(bytes))
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let path = path.to_owned();
    move |source| IdentityError::Io {
        operation,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once_and_stays() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("identity");
        let first = PlatformIdentity::open(&directory).unwrap();
        let again = PlatformIdentity::open(&directory).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        assert_eq!(first.signing().public_key(), again.signing().public_key());
        for name in ["platform.key", "agent-tls.key"] {
            let mode = fs::metadata(directory.join(name))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);
        let other = PlatformIdentity::open(&scratch.path().join("other")).unwrap();
        assert_ne!(first.fingerprint(), other.fingerprint());
    }

    #[test]
    fn a_readable_or_damaged_key_is_refused_and_not_replaced() {
        let scratch = tempfile::tempdir().unwrap();
        PlatformIdentity::open(scratch.path()).unwrap();
        let path = scratch.path().join("platform.key");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = PlatformIdentity::open(scratch.path()).unwrap_err();
        assert!(
            matches!(error, IdentityError::Exposed { mode: 0o644, .. }),
            "{error}"
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "short").unwrap();
        let error = PlatformIdentity::open(scratch.path()).unwrap_err();
        assert!(matches!(error, IdentityError::Malformed { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"short");
    }
}
