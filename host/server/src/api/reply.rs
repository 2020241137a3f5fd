//! Forms of good answers: one resource with its ETag, a new one with its place, a page, nothing.

use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use windlass_store::Revision;

use super::problem::Problem;
use crate::service::PageOf;

/// One page of a list.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub(crate) struct Page<T> {
    /// Its entries.
    pub items: Vec<T>,
    /// Give this as `cursor` for the next page; absent: this is the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// What handlers answer.
pub(crate) type Reply = Result<Response, Problem>;

/// JSON with a status.
pub(crate) fn json<T: Serialize>(status: StatusCode, value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => {
            let json = HeaderValue::from_static("application/json");
            (status, [(header::CONTENT_TYPE, json)], body).into_response()
        }
        Err(error) => Problem::from(crate::service::ServiceError::internal(
            "write an answer",
            error,
        ))
        .into_response(),
    }
}

fn tagged(mut response: Response, revision: Revision) -> Response {
    if let Ok(etag) = HeaderValue::try_from(format!("\"{}\"", revision.0)) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response
}

/// 200 with a resource and its ETag.
pub(crate) fn found<T: Serialize>((value, revision): (T, Revision)) -> Response {
    tagged(json(StatusCode::OK, &value), revision)
}

/// 201 with something that has no ETag, and its place.
pub(crate) fn made<T: Serialize>(location: &str, value: &T) -> Response {
    let mut response = json(StatusCode::CREATED, value);
    if let Ok(location) = HeaderValue::try_from(location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// 200 with a resource and its ETag, or 304 when `If-None-Match` names it.
pub(crate) fn found_unless<T: Serialize>(
    headers: &HeaderMap,
    (value, revision): (T, Revision),
) -> Response {
    let known = headers
        .get(header::IF_NONE_MATCH)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|known| {
            let etag = format!("\"{}\"", revision.0);
            known
                .split(',')
                .any(|one| one.trim().trim_start_matches("W/") == etag)
        });
    if known {
        return tagged(StatusCode::NOT_MODIFIED.into_response(), revision);
    }
    found((value, revision))
}

/// 201 with a new resource, its ETag and its place.
pub(crate) fn created<T: Serialize>(location: &str, (value, revision): (T, Revision)) -> Response {
    tagged(made(location, &value), revision)
}

/// 200 with a page.
pub(crate) fn page<T: Serialize>(page: PageOf<(T, Revision)>) -> Response {
    let page = Page {
        items: page.items.into_iter().map(|(value, _)| value).collect(),
        next_cursor: page.next,
    };
    json(StatusCode::OK, &page)
}

/// 204.
pub(crate) fn nothing() -> Response {
    StatusCode::NO_CONTENT.into_response()
}

/// Marks an answer that shows a secret once: it is never kept with the idempotency key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ShownOnce;

/// An answer that is not kept with the idempotency key: a repetition gets the resource without what was shown once.
pub(crate) fn shown_once(mut response: Response) -> Response {
    response.extensions_mut().insert(ShownOnce);
    response
}
