//! The listener of the public API: connections, TLS, HTTP/1.1, and their orderly end.
//!
//! One task for each connection, owned by the listener and awaited at shutdown. Requests that are being answered are
//! finished, up to [`DRAIN`]; then what is left is cut.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::Request};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service as _;

/// Connections at once; the next wait in the system's queue.
const MAX_CONNECTIONS: usize = 4096;
/// How long a TLS handshake or the head of a request may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// How long requests may take to end at shutdown.
const DRAIN: Duration = Duration::from_secs(5);
/// Pause after the system gave no connection (out of file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where a request came from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// Serves until `stop`; returns when every connection has ended.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    tls: Option<Arc<rustls::ServerConfig>>,
    stop: CancellationToken,
) {
    let tls = tls.map(TlsAcceptor::from);
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = TaskTracker::new();
    let cut = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = async {
                let permit = room.clone().acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
        };
        let (stream, peer, permit) = match accepted {
            (Ok(permit), Ok((stream, peer))) => (stream, peer, permit),
            (Err(_), _) => break,
            (_, Err(error)) => {
                tracing::error!(%error, "the API's listener gets no connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "no TCP_NODELAY");
        }
        let (router, tls, stop, cut) = (router.clone(), tls.clone(), stop.clone(), cut.clone());
        connections.spawn(async move {
            let serve = async {
                match tls {
                    None => connection(stream, peer, router, stop).await,
                    Some(tls) => match timeout(HEAD_TIMEOUT, tls.accept(stream)).await {
                        Ok(Ok(stream)) => connection(stream, peer, router, stop).await,
                        Ok(Err(error)) => tracing::debug!(%peer, %error, "a TLS handshake failed"),
                        Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
                    },
                }
            };
            tokio::select! {
                () = serve => {}
                () = cut.cancelled() => {}
            }
            drop(permit);
        });
    }
    // Nobody is accepted any more.
    drop(listener);
    connections.close();
    if timeout(DRAIN, connections.wait()).await.is_err() {
        tracing::warn!(
            open = connections.len(),
            "connections were cut: their requests did not end in time"
        );
        cut.cancel();
        connections.wait().await;
    }
}

async fn connection<S>(stream: S, peer: SocketAddr, router: Router, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let mut request: Request = request.map(axum::body::Body::new);
        request.extensions_mut().insert(Peer(peer));
        let mut router = router.clone();
        async move {
            let response = router.call(request).await;
            response.map_err(|error: Infallible| error)
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, error = &error as &dyn std::error::Error, "a connection of the API ended");
    }
}
