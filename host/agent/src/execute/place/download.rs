//! Downloads an archive from a URL, within limits, and checks it.

use std::{fs::File, io::Write as _, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, StatusCode, Uri, body::Incoming, header};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{InvalidDnsNameError, ServerName},
};
use sha2::{Digest as _, Sha256};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use windlass_domain::{
    Digest,
    task::{FilesRef, PackageRef},
};

use super::package;
use crate::{
    cache::free_bytes,
    config::Policy,
    execute::Context,
    files::{Context as _, FileError},
    net::{CONNECT_TIMEOUT, NetError, send},
};

/// A server may send us elsewhere so many times.
const MAX_REDIRECTS: usize = 5;
/// Longest silence of a server.
const SILENCE: Duration = Duration::from_secs(60);
/// Between two looks at the free space.
const LOOK_EVERY_BYTES: u64 = 8 << 20;

/// Why an archive is not here.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// Not a URL.
    #[error(
        "`{0}` is not a URL that can be downloaded from: expected http:// or https://, and no change from https to http"
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
    /// Too slow.
    #[error("{address} was silent for too long")]
    Silent {
        /// Where.
        address: String,
    },
    /// Its name cannot be in a certificate.
    #[error("`{host}` cannot be the name of a server with a certificate")]
    Name {
        /// The host.
        host: String,
        /// Why.
        #[source]
        source: InvalidDnsNameError,
    },
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[source] rustls::Error),
    /// The request failed.
    #[error("the archive was not sent")]
    Request(#[source] NetError),
    /// The request cannot be made.
    #[error("the request cannot be made")]
    Build(#[source] hyper::http::Error),
    /// The answer broke off.
    #[error("the download from {address} broke off after {bytes} bytes")]
    Broken {
        /// Where.
        address: String,
        /// How much had come.
        bytes: u64,
        /// Why.
        #[source]
        source: hyper::Error,
    },
    /// Not 200.
    #[error("{address} answers with the status {status}, and no archive")]
    Status {
        /// Where.
        address: String,
        /// Its answer.
        status: StatusCode,
    },
    /// A circle, perhaps.
    #[error("the URL leads elsewhere more than {MAX_REDIRECTS} times")]
    Redirects,
    /// Too large.
    #[error("the archive has more than {limit} bytes, which is `max_bytes` of the operation")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// No space.
    #[error(
        "the disk has {free} bytes free, of which {reserved} are kept: too few for the archive; free some space"
    )]
    NoSpace {
        /// What is free.
        free: u64,
        /// What has to stay free.
        reserved: u64,
    },
    /// Other bytes.
    #[error("the archive has the SHA-256 {got}, and {expected} was asked for; nothing was changed")]
    Mismatch {
        /// What came.
        got: Digest,
        /// What was asked for.
        expected: Digest,
    },
    /// Not an archive.
    #[error(
        "the file from {address} is not an archive; static files must be a tar archive (plain, gz, xz, zst or bz2) or a zip archive; nothing was changed"
    )]
    NoArchive {
        /// Where it is from.
        address: String,
    },
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Downloads to a file, and checks it.
pub(super) async fn download(
    context: &Context,
    files: &FilesRef,
    to: &Path,
) -> Result<PackageRef, DownloadError> {
    let mut url = parse(&files.url)?;
    for _ in 0..=MAX_REDIRECTS {
        let response = get(&url).await?;
        let status = response.status();
        if status == StatusCode::OK {
            return save(response, &url, &context.policy, files, to).await;
        }
        let moved = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308);
        let location = response.headers().get(header::LOCATION);
        let location = location.and_then(|value| value.to_str().ok());
        match location.filter(|_| moved) {
            Some(location) => url = follow(&url, location)?,
            None => {
                let address = address(&url);
                return Err(DownloadError::Status { address, status });
            }
        }
    }
    Err(DownloadError::Redirects)
}

fn parse(text: &str) -> Result<Uri, DownloadError> {
    let bad = || DownloadError::Url(text.chars().take(500).collect());
    let url: Uri = text.parse().map_err(|_| bad())?;
    let known = matches!(url.scheme_str(), Some("http" | "https"));
    let host = url.host().is_some_and(|host| !host.is_empty());
    if known && host { Ok(url) } else { Err(bad()) }
}

/// Where a server sends us: to another URL, or to another path of its own.
fn follow(from: &Uri, location: &str) -> Result<Uri, DownloadError> {
    let url = match (location.strip_prefix('/'), from.authority()) {
        (Some(path), Some(authority)) if !path.starts_with('/') => {
            let scheme = from.scheme_str().unwrap_or("http");
            parse(&format!("{scheme}://{authority}{location}"))?
        }
        (Some(_) | None, _) => parse(location)?,
    };
    // What was promised to nobody else stays so.
    if from.scheme_str() == Some("https") && url.scheme_str() != Some("https") {
        return Err(DownloadError::Url(location.chars().take(500).collect()));
    }
    Ok(url)
}

fn is_tls(url: &Uri) -> bool {
    url.scheme_str() == Some("https")
}

/// `host:port`.
fn address(url: &Uri) -> String {
    let port = url.port_u16().unwrap_or(if is_tls(url) { 443 } else { 80 });
    format!("{}:{port}", url.host().unwrap_or_default())
}

async fn get(url: &Uri) -> Result<Response<Incoming>, DownloadError> {
    let address = address(url);
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let host = url.authority().map_or("", |authority| authority.as_str());
    let request = Request::get(path)
        .header(header::HOST, host)
        .header(
            header::USER_AGENT,
            concat!("windlass-agent/", env!("CARGO_PKG_VERSION")),
        )
        .body(Full::new(Bytes::new()))
        .map_err(DownloadError::Build)?;
    let unreached = |source| DownloadError::Connect {
        address: address.clone(),
        source,
    };
    let silent = || DownloadError::Silent {
        address: address.clone(),
    };
    let connect = async {
        let stream = TcpStream::connect(&address).await.map_err(unreached)?;
        if !is_tls(url) {
            return Ok(Connection::Plain(stream));
        }
        let host = url.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(|source| DownloadError::Name {
            host: host.to_owned(),
            source,
        })?;
        let connector = TlsConnector::from(Arc::new(trusting_the_machine()?));
        let stream = connector.connect(name, stream).await.map_err(unreached)?;
        Ok::<Connection, DownloadError>(Connection::Tls(Box::new(stream)))
    };
    let connection = timeout(CONNECT_TIMEOUT, connect)
        .await
        .map_err(|_| silent())??;
    let answer = async {
        match connection {
            Connection::Plain(stream) => send(TokioIo::new(stream), request, &address).await,
            Connection::Tls(stream) => send(TokioIo::new(stream), request, &address).await,
        }
    };
    timeout(SILENCE, answer)
        .await
        .map_err(|_| silent())?
        .map_err(DownloadError::Request)
}

enum Connection {
    Plain(TcpStream),
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

/// TLS that trusts the certificate authorities of this machine.
fn trusting_the_machine() -> Result<ClientConfig, DownloadError> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::debug!(%error, "a certificate authority of the machine cannot be read");
    }
    roots.add_parsable_certificates(found.certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(DownloadError::Tls)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

async fn save(
    response: Response<Incoming>,
    url: &Uri,
    policy: &Policy,
    files: &FilesRef,
    to: &Path,
) -> Result<PackageRef, DownloadError> {
    let limit = files.max_bytes;
    let told = response.headers().get(header::CONTENT_LENGTH);
    let told = told.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if told.is_some_and(|told| told > limit) {
        return Err(DownloadError::TooLarge { limit });
    }
    let enough_space = |coming: u64| {
        let (free, reserved) = (free_bytes(to.parent().unwrap_or(to)), policy.min_free_bytes);
        if coming.saturating_add(reserved) > free {
            return Err(DownloadError::NoSpace { free, reserved });
        }
        Ok(())
    };
    enough_space(told.unwrap_or(0))?;
    let mut file = File::create(to).during("create", to)?;
    let mut digest = Sha256::new();
    let (mut bytes, mut looked_at) = (0_u64, 0_u64);
    let mut body = response.into_body();
    loop {
        let frame = timeout(SILENCE, body.frame()).await;
        let frame = frame.map_err(|_| DownloadError::Silent {
            address: address(url),
        })?;
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|source| DownloadError::Broken {
            address: address(url),
            bytes,
            source,
        })?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        bytes += data.len() as u64;
        if bytes > limit {
            return Err(DownloadError::TooLarge { limit });
        }
        if bytes - looked_at >= LOOK_EVERY_BYTES {
            looked_at = bytes;
            enough_space(0)?;
        }
        digest.update(&data);
        file.write_all(&data).during("write", to)?;
    }
    let got = Digest::from_bytes(digest.finalize().into());
    match files.sha256 {
        Some(expected) if expected != got => {
            return Err(DownloadError::Mismatch { got, expected });
        }
        Some(_) | None => {}
    }
    drop(file);
    let mut file = File::open(to).during("open", to)?;
    let format = windlass_archive::archive_format(&mut file).during("read", to)?;
    let format = format.ok_or_else(|| DownloadError::NoArchive {
        address: address(url),
    })?;
    Ok(package(got, bytes, format))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_sends_us_to_no_lesser_protocol() {
        for (from, location, to) in [
            ("http://a/x", "http://b/y.tar.gz", Some("http://b/y.tar.gz")),
            ("http://a:81/x", "/y?z=1", Some("http://a:81/y?z=1")),
            ("https://a/x", "/y", Some("https://a/y")),
            ("http://a/x", "https://b/y", Some("https://b/y")),
            ("https://a/x", "http://a/x", None),
            ("http://a/x", "file:///etc/passwd", None),
            ("http://a/x", "//b/y", None),
            ("http://a/x", "y", None),
            ("http://a/x", "", None),
        ] {
            let found = follow(&from.parse().unwrap(), location).ok();
            let found = found.map(|url| url.to_string());
            assert_eq!(found.as_deref(), to, "{from} to {location}");
        }
    }
}
