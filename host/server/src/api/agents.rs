//! The HTTP surface for agents: a TLS listener of its own, with three requests and nothing else.
//!
//! Owns accepting connections, TLS, HTTP/1.1, the upgrade to a WebSocket. What they mean is the gateway's. It must stay small
//! in memory: one task and small buffers for each agent, which outlive the HTTP part of a connection only as a session.
//! The requests stand in `windlass_protocol`; they are no part of the public API and not in its OpenAPI document.
//!
//! ```text
//! accepted ──► TLS ──► HTTP ──► answered, closed                (register, download)
//!                        └────► upgraded ──► session ──► closed  (connect)
//! ```
//! Each phase but the session has a time limit, and the number of connections has one.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper::{server::conn::http1, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        handshake::derive_accept_key,
        protocol::{Role, WebSocketConfig},
    },
};
use tokio_util::task::TaskTracker;
use tower::Service as _;
use windlass_domain::Digest;
use windlass_protocol::{
    BLOBS_PATH, CONNECT_PATH, MAX_FRAME_BYTES, Problem, REGISTER_PATH, RegisterRequest,
};
use windlass_store::BlobError;

use crate::gateway::{DownloadError, Gateway, GrantRefusal, RegisterError};

/// Largest body of a registration.
const REGISTER_MAX_BYTES: usize = 64 * 1024;
/// hyper's smallest buffer; bounds the headers of a request.
const HTTP_BUFFER_BYTES: usize = 8 * 1024;
/// Buffers of a session: the default of 128 KiB each would be most of its memory.
const SESSION_BUFFER_BYTES: usize = 4 * 1024;
/// Longest request: the largest package over a slow line.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3600);
/// Pause after the system gave no connection (out of file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Settings of the agents' listener.
#[derive(Debug, Clone)]
pub struct AgentListenerSettings {
    /// Connections at once, sessions included; more are closed at once.
    pub max_connections: usize,
    /// How long the TLS handshake, and the head and body of a registration, may take each.
    pub handshake_timeout: Duration,
}

impl Default for AgentListenerSettings {
    fn default() -> Self {
        Self {
            max_connections: 20_000,
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// Serves agents until the gateway stops; returns when every connection is closed.
pub async fn serve(listener: TcpListener, gateway: Gateway, settings: AgentListenerSettings) {
    let stop = gateway.stopping();
    let connections = TaskTracker::new();
    let room = Arc::new(Semaphore::new(settings.max_connections));
    let shared = Arc::new(Shared {
        tls: TlsAcceptor::from(gateway.identity().tls()),
        router: router(gateway.clone(), settings.handshake_timeout),
        gateway,
        settings,
    });
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::error!(%error, "the agents' listener gets no connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            tracing::warn!(%peer, limit = shared.settings.max_connections, "an agent's connection was closed: max_connections are open");
            continue;
        };
        let shared = shared.clone();
        connections.spawn(async move {
            if let Err(error) = connection(&shared, stream, peer).await {
                tracing::debug!(%peer, error = &error as &dyn std::error::Error, "an agent's connection ended");
            }
            drop(permit);
        });
    }
    connections.close();
    connections.wait().await;
}

struct Shared {
    tls: TlsAcceptor,
    router: Router,
    gateway: Gateway,
    settings: AgentListenerSettings,
}

/// Why a connection ended before it was a session.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("the TLS handshake failed")]
    Tls(#[source] io::Error),
    #[error("the connection took longer than {} s", limit.as_secs())]
    Timeout { limit: Duration },
    #[error("the HTTP request failed")]
    Http(#[source] hyper::Error),
}

/// Where the handler of an upgrade leaves it for the connection's own task.
type UpgradeSlot = Arc<Mutex<Option<OnUpgrade>>>;

#[derive(Clone)]
struct Connection {
    peer: SocketAddr,
    upgrade: UpgradeSlot,
}

async fn connection(
    shared: &Shared,
    stream: TcpStream,
    peer: SocketAddr,
) -> Result<(), ConnectionError> {
    // Boxed, so that a session does not keep the room of what came before it.
    let upgraded = Box::pin(request(shared, stream, peer)).await?;
    let Some((io, already_read)) = upgraded else {
        return Ok(());
    };
    let config = WebSocketConfig::default()
        .read_buffer_size(SESSION_BUFFER_BYTES)
        .write_buffer_size(SESSION_BUFFER_BYTES)
        .max_write_buffer_size(2 * MAX_FRAME_BYTES)
        .max_message_size(Some(MAX_FRAME_BYTES))
        .max_frame_size(Some(MAX_FRAME_BYTES));
    let socket =
        WebSocketStream::from_partially_read(io, already_read, Role::Server, Some(config)).await;
    shared.gateway.serve(socket, peer).await;
    Ok(())
}

/// TLS and one request. Returns the socket where that was an upgrade.
async fn request(
    shared: &Shared,
    stream: TcpStream,
    peer: SocketAddr,
) -> Result<Option<(TlsStream<TcpStream>, Vec<u8>)>, ConnectionError> {
    let limit = shared.settings.handshake_timeout;
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "no TCP_NODELAY");
    }
    let stream = timeout(limit, shared.tls.accept(stream))
        .await
        .map_err(|_| ConnectionError::Timeout { limit })?
        .map_err(ConnectionError::Tls)?;
    let slot = UpgradeSlot::default();
    let about = Connection {
        peer,
        upgrade: slot.clone(),
    };
    let router = shared.router.clone();
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(about.clone());
        let mut router = router.clone();
        async move {
            let mut response = router.call(request).await.into_response();
            // One request for each connection; an upgrade has its own word for this header.
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
            Ok::<_, Infallible>(response)
        }
    });
    let http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limit)
        .max_buf_size(HTTP_BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(http);
    let stop = shared.gateway.stopping();
    tokio::select! {
        served = timeout(REQUEST_TIMEOUT, http.as_mut()) => {
            served
                .map_err(|_| ConnectionError::Timeout { limit: REQUEST_TIMEOUT })?
                .map_err(ConnectionError::Http)?;
        }
        () = stop.cancelled() => return Ok(None),
    }
    let upgrade = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(upgrade) = upgrade else {
        return Ok(None);
    };
    let upgraded = upgrade.await.map_err(ConnectionError::Http)?;
    // hyper's own layer is taken off again: a session needs the socket, not its boxes.
    Ok(upgraded
        .downcast::<TokioIo<TlsStream<TcpStream>>>()
        .ok()
        .map(|parts| (parts.io.into_inner(), parts.read_buf.to_vec())))
}

#[derive(Clone)]
struct Api {
    gateway: Gateway,
    body_timeout: Duration,
}

fn router(gateway: Gateway, body_timeout: Duration) -> Router {
    Router::new()
        .route(REGISTER_PATH, post(register_agent))
        .route(CONNECT_PATH, get(connect_agent))
        .route(&format!("{BLOBS_PATH}/{{digest}}"), get(download_blob))
        .with_state(Api {
            gateway,
            body_timeout,
        })
}

/// `POST /agent/v1/register`.
async fn register_agent(
    State(api): State<Api>,
    Extension(connection): Extension<Connection>,
    request: Request,
) -> Response {
    let body = axum::body::to_bytes(request.into_body(), REGISTER_MAX_BYTES);
    let body = match timeout(api.body_timeout, body).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            let detail = format!("the body is broken or longer than {REGISTER_MAX_BYTES} bytes");
            return problem(StatusCode::BAD_REQUEST, "body_unreadable", detail);
        }
        Err(_) => {
            let limit = api.body_timeout.as_secs();
            let detail = format!("the body took longer than {limit} s");
            return problem(StatusCode::REQUEST_TIMEOUT, "body_timeout", detail);
        }
    };
    let request: RegisterRequest = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => {
            // Only where, not what: the body holds the code.
            let (line, column) = (error.line(), error.column());
            let detail = format!(
                "the body is not a registration (line {line}, column {column}); use an agent of a matching version"
            );
            return problem(StatusCode::BAD_REQUEST, "body_malformed", detail);
        }
    };
    match api.gateway.register(connection.peer.ip(), request).await {
        Ok(response) => axum::Json(response).into_response(),
        Err(error) => {
            let status = match &error {
                RegisterError::TooMany { .. } => StatusCode::TOO_MANY_REQUESTS,
                RegisterError::Malformed(_) => StatusCode::BAD_REQUEST,
                RegisterError::OtherPlatform
                | RegisterError::Proof
                | RegisterError::Refused { .. } => StatusCode::FORBIDDEN,
                RegisterError::Unavailable(_) => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "a registration failed"
                    );
                    StatusCode::SERVICE_UNAVAILABLE
                }
            };
            let mut response = problem(status, error.code(), error.to_string());
            if let RegisterError::TooMany { wait_s } = error {
                response
                    .headers_mut()
                    .insert(header::RETRY_AFTER, wait_s.into());
            }
            response
        }
    }
}

/// `GET /agent/v1/connect`: the upgrade. The connection's own task goes on with the session.
async fn connect_agent(
    Extension(connection): Extension<Connection>,
    mut request: Request,
) -> Response {
    let headers = request.headers();
    let wants = |name: header::HeaderName, token: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .is_some_and(|value| {
                value
                    .split(',')
                    .any(|part| part.trim().eq_ignore_ascii_case(token))
            })
    };
    let accept = headers
        .get(header::SEC_WEBSOCKET_KEY)
        .filter(|_| {
            wants(header::UPGRADE, "websocket")
                && wants(header::CONNECTION, "upgrade")
                && wants(header::SEC_WEBSOCKET_VERSION, "13")
        })
        .map(|key| derive_accept_key(key.as_bytes()))
        .and_then(|accept| HeaderValue::try_from(accept).ok());
    let Some(accept) = accept else {
        let detail = "this path takes an upgrade to a WebSocket, version 13, only".to_owned();
        return problem(StatusCode::BAD_REQUEST, "not_a_websocket", detail);
    };
    let upgrade = hyper::upgrade::on(&mut request);
    *connection
        .upgrade
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = Some(upgrade);
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    response
}

/// `GET /agent/v1/blobs/{digest}`.
async fn download_blob(
    State(api): State<Api>,
    Path(digest): Path<String>,
    headers: HeaderMap,
) -> Response {
    let text = |name| {
        headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    let token = text(header::AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
    let Some(token) = token else {
        return refused(&GrantRefusal::Unknown);
    };
    let Ok(digest) = digest.parse::<Digest>() else {
        let detail = format!(
            "`{}` is no SHA-256 digest",
            digest.chars().take(80).collect::<String>()
        );
        return problem(StatusCode::NOT_FOUND, "blob_missing", detail);
    };
    // Other forms of a range are ignored, as RFC 9110 allows.
    let offset = text(header::RANGE)
        .and_then(|range| range.strip_prefix("bytes="))
        .and_then(|range| range.strip_suffix('-'))
        .and_then(|first| first.parse::<u64>().ok());
    match api
        .gateway
        .download(token, digest, offset.unwrap_or(0))
        .await
    {
        Ok(download) => {
            let size = download.size_bytes;
            let from = offset.unwrap_or(0);
            if from > 0 && from >= size {
                return out_of_range(from, size);
            }
            let mut response = Body::from_stream(download.bytes).into_response();
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_LENGTH, (size - from).into());
            headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
            headers.insert(
                header::CONTENT_TYPE,
                HeaderValue::from_static("application/octet-stream"),
            );
            if offset.is_some() && size > 0 {
                let range = format!("bytes {from}-{}/{size}", size - 1);
                if let Ok(range) = HeaderValue::try_from(range) {
                    headers.insert(header::CONTENT_RANGE, range);
                }
                *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            }
            response
        }
        Err(DownloadError::Grant(refusal)) => refused(&refusal),
        Err(DownloadError::Blob(BlobError::OffsetTooLarge {
            offset, size_bytes, ..
        })) => out_of_range(offset, size_bytes),
        Err(DownloadError::Blob(error @ BlobError::Missing { .. })) => {
            problem(StatusCode::NOT_FOUND, "blob_missing", error.to_string())
        }
        Err(error @ DownloadError::Blob(_)) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "a download failed"
            );
            let detail = error.to_string();
            problem(StatusCode::SERVICE_UNAVAILABLE, "unavailable", detail)
        }
    }
}

fn refused(refusal: &GrantRefusal) -> Response {
    let (status, code) = match refusal {
        GrantRefusal::Unknown => (StatusCode::UNAUTHORIZED, "grant_unknown"),
        GrantRefusal::OtherDigest => (StatusCode::FORBIDDEN, "grant_of_another_digest"),
    };
    let mut response = problem(status, code, refusal.to_string());
    if status == StatusCode::UNAUTHORIZED {
        response
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

fn out_of_range(offset: u64, size: u64) -> Response {
    let detail = format!("the range begins at byte {offset}; the package has {size}");
    let mut response = problem(StatusCode::RANGE_NOT_SATISFIABLE, "range_too_far", detail);
    if let Ok(range) = HeaderValue::try_from(format!("bytes */{size}")) {
        response.headers_mut().insert(header::CONTENT_RANGE, range);
    }
    response
}

fn problem(status: StatusCode, code: &str, detail: String) -> Response {
    let code = code.to_owned();
    let mut response = (status, axum::Json(Problem { code, detail })).into_response();
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/problem+json"),
    );
    response
}
