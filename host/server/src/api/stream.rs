//! Streams of server-sent events: their life, their resumption, their sign of life.
//!
//! A stream is one owned task that ends with its listener, its token, its source or the server.

use std::{convert::Infallible, future::Future, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use serde::Serialize;
use tokio::sync::mpsc;
use windlass_domain::Timestamp;

use super::{Api, problem::Problem};
use crate::{clock, service::tokens::Authenticated};

/// Pause after which a stream shows that it lives.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// The sign of life.
pub(super) const COMMENT: Bytes = Bytes::from_static(b": keep-alive\n\n");
/// Frames that wait for a slow listener.
const WAITING: usize = 8;

/// `Last-Event-ID`, where it was sent.
pub(super) fn last_event_id(headers: &HeaderMap) -> Result<Option<u64>, Problem> {
    let last = headers.get("last-event-id").map(|value| {
        value
            .to_str()
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
            .ok_or_else(|| {
                Problem::bad_request("last_event_id_invalid", "the last event id is not a number")
                    .field("Last-Event-ID")
                    .mend("send the id of an event of this stream")
            })
    });
    last.transpose()
}

/// Answers with what `source` sends.
pub(super) fn respond<F: Future<Output = ()> + Send + 'static>(
    api: &Api,
    known: Authenticated,
    source: impl FnOnce(mpsc::Sender<Bytes>) -> F,
) -> Response {
    let (sender, receiver) = mpsc::channel::<Bytes>(WAITING);
    let stop = api.stop.clone();
    let listener = sender.clone();
    let source = source(sender);
    api.streams.spawn(async move {
        let ended = async {
            match known.token.expires_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = known.revoked.cancelled() => {}
            () = ended => {}
            () = listener.closed() => {}
            () = source => {}
        }
    });
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async {
        receiver
            .recv()
            .await
            .map(|bytes| (Ok::<_, Infallible>(bytes), receiver))
    });
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, Body::from_stream(stream)).into_response()
}

/// Waits for something to be sent, with signs of life meanwhile. `None`: nobody listens any more.
pub(super) async fn awaited<T>(
    next: impl Future<Output = T>,
    sender: &mpsc::Sender<Bytes>,
) -> Option<T> {
    tokio::pin!(next);
    loop {
        match tokio::time::timeout(KEEP_ALIVE, &mut next).await {
            Ok(found) => return Some(found),
            Err(_) if sender.send(COMMENT).await.is_err() => return None,
            Err(_) => {}
        }
    }
}

/// One event: what a resumed stream goes on after, its name, its data as JSON.
pub(super) fn frame<T: Serialize>(id: Option<u64>, event: &str, data: &T) -> Bytes {
    let data = serde_json::to_string(data).expect("news have string keys");
    let id = id.map_or_else(String::new, |id| format!("id: {id}\n"));
    format!("{id}event: {event}\ndata: {data}\n\n").into()
}

async fn sleep_until(at: Timestamp) {
    tokio::time::sleep(Duration::from_millis(at.since_ms(clock::now()))).await;
}
