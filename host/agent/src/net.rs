//! The agent's connections to the platform: TLS with the platform's key pinned, and plain HTTP/1.1 requests over it.
//!
//! No certificate authority is trusted, no name is checked: the key is the name. See [`windlass_protocol::Fingerprint`].

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use windlass_protocol::Fingerprint;

/// How long a connection may take until it can be used.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to the platform that failed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Not `https://host:port`.
    #[error(
        "`{0}` is not an address of the platform's agent listener: expected `https://host:port`"
    )]
    Url(String),
    /// No connection.
    #[error("{address} cannot be reached")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No TLS.
    #[error(
        "{address} is reached, but there is no TLS session with the platform's key (fingerprint {fingerprint})"
    )]
    Tls {
        /// Where.
        address: String,
        /// What was expected.
        fingerprint: Fingerprint,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Too slow.
    #[error("{address} did not answer within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout {
        /// Where.
        address: String,
    },
    /// TLS itself cannot be set up.
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
    /// A request that failed.
    #[error("the request to {address} failed")]
    Http {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: hyper::Error,
    },
    /// A request that cannot be made.
    #[error("the request cannot be made")]
    Request(#[source] hyper::http::Error),
}

/// The platform's agent listener, and how to know it.
#[derive(Clone)]
pub struct Platform {
    host: String,
    port: u16,
    fingerprint: Fingerprint,
    connector: TlsConnector,
}

impl Platform {
    /// From `https://host:port` and the fingerprint of its key.
    ///
    /// # Errors
    /// When the address has another form.
    pub fn new(url: &str, fingerprint: Fingerprint) -> Result<Self, NetError> {
        let invalid = || NetError::Url(url.to_owned());
        let authority = url
            .strip_prefix("https://")
            .ok_or_else(invalid)?
            .trim_end_matches('/');
        let (host, port) = authority.rsplit_once(':').ok_or_else(invalid)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || host.contains('/') {
            return Err(invalid());
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Arc::new(PinnedKey {
            fingerprint,
            provider: provider.clone(),
        });
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(NetError::Setup)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        Ok(Self {
            host: host.to_owned(),
            port: port.parse().map_err(|_| invalid())?,
            fingerprint,
            connector: TlsConnector::from(Arc::new(config)),
        })
    }

    /// `host:port`.
    #[must_use]
    pub fn address(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// The key's fingerprint.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// A TLS connection to exactly this platform.
    ///
    /// # Errors
    /// When there is none within [`CONNECT_TIMEOUT`], or the key is another.
    pub async fn connect(&self) -> Result<TlsStream<TcpStream>, NetError> {
        let address = self.address();
        let connect = async {
            let stream = TcpStream::connect((self.host.as_str(), self.port))
                .await
                .and_then(|stream| stream.set_nodelay(true).map(|()| stream))
                .map_err(|source| NetError::Connect {
                    address: address.clone(),
                    source,
                })?;
            let name = ServerName::try_from(self.host.clone())
                .map_err(|_| NetError::Url(self.host.clone()))?;
            self.connector
                .connect(name, stream)
                .await
                .map_err(|source| NetError::Tls {
                    address: address.clone(),
                    fingerprint: self.fingerprint,
                    source,
                })
        };
        tokio::time::timeout(CONNECT_TIMEOUT, connect)
            .await
            .unwrap_or_else(|_| {
                Err(NetError::Timeout {
                    address: self.address(),
                })
            })
    }

    /// One request on a connection of its own. The connection lives as long as the answer's body is read.
    ///
    /// # Errors
    /// When there is no connection or no answer.
    pub async fn request(
        &self,
        request: hyper::http::request::Builder,
        body: Bytes,
    ) -> Result<Response<Incoming>, NetError> {
        let stream = self.connect().await?;
        let request = request
            .header("host", self.address())
            .header(
                "user-agent",
                concat!("windlass-agent/", env!("CARGO_PKG_VERSION")),
            )
            .body(Full::new(body))
            .map_err(NetError::Request)?;
        send(TokioIo::new(stream), request, &self.address()).await
    }
}

/// Sends one request over a fresh connection.
///
/// # Errors
/// When there is no answer.
pub async fn send<T>(
    io: T,
    request: Request<Full<Bytes>>,
    address: &str,
) -> Result<Response<Incoming>, NetError>
where
    T: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let failed = |source| NetError::Http {
        address: address.to_owned(),
        source,
    };
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(64 * 1024)
        .handshake(io)
        .await
        .map_err(failed)?;
    // Ends by itself with the answer's body, or when the answer is dropped.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a request's connection broke");
        }
    });
    sender.send_request(request).await.map_err(failed)
}

#[derive(Debug)]
struct PinnedKey {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        if Fingerprint::of_key(&certificate.subject_public_key_info()) == self.fingerprint {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
