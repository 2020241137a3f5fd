//! TLS of the API's listener.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use crate::{config::Tls, gateway::identity::PlatformIdentity};

/// Why the API's certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds something else.
    #[error("the {what} `{}` cannot be read: expected PEM", path.display())]
    File {
        /// `certificate` or `key`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The key is not the certificate's, or of a kind that is not known.
    #[error("the certificate `{}` and its key cannot be used together", path.display())]
    Unusable {
        /// The certificate's file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: rustls::Error,
    },
}

/// TLS of a listener on this address; `None`: plain HTTP.
pub(super) fn of(
    wanted: &Tls,
    address: SocketAddr,
    identity: &PlatformIdentity,
) -> Result<Option<Arc<ServerConfig>>, TlsError> {
    match wanted {
        Tls::ByAddress if address.ip().is_loopback() => Ok(None),
        Tls::Off => Ok(None),
        Tls::ByAddress | Tls::Own => Ok(Some(identity.tls())),
        Tls::Files { certificate, key } => {
            files(certificate, key).map(|config| Some(Arc::new(config)))
        }
    }
}

fn files(certificate: &Path, key: &Path) -> Result<ServerConfig, TlsError> {
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| TlsError::File { what, path, source }
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
        .map_err(failed("certificate", certificate))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(failed("key", key))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let unusable = |source| TlsError::Unusable {
        path: certificate.to_owned(),
        source,
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(unusable)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}
