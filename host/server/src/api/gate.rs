//! What every request passes: request id, token, idempotency key, counting, and the body of problems.
//!
//! ```text
//! request ─► id ─► token ─► idempotency key known? ─yes─► the answer kept with it
//!                                   │ no (its record goes with the caller into the change's own transaction)
//!                                   ▼
//!                               handler ─► answer kept with the key ─► problem written as body ─► counted
//! ```
//! One middleware, so that a request costs one boxed future. Knows no resource.

use std::panic::AssertUnwindSafe;

use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt as _;
use sha2::{Digest as _, Sha256};
use windlass_domain::{Digest, id::TokenId, order::Order};
use windlass_runtime::{CallContext, on_behalf_of};
use windlass_store::Txn;

use super::{Api, extract, listener::Peer, problem::Problem, reply::ShownOnce};
use crate::{
    ids,
    service::{
        Caller, ServiceError,
        idempotency::{Answer, Begun, Stored},
    },
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// Ends of the paths at which a POST makes a resource.
const MAKING: [&str; 17] = [
    "/workspaces",
    "/cells",
    "/apps",
    "/packages",
    "/service-instances",
    "/activation-codes",
    "/pools",
    "/orders",
    "/tokens",
    "/certificates",
    "/diagnoses",
    "/groups",
    "/invocations",
    "/listeners",
    "/load-balancers",
    "/notification-channels",
    "/process-templates",
];
/// Longest request id that is taken over from the caller.
const REQUEST_ID_MAX_CHARS: usize = 100;

pub(crate) async fn gate(State(api): State<Api>, request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let answered = AssertUnwindSafe(admit(&api, request, next))
        .catch_unwind()
        .await;
    let mut response = match answered {
        Ok(Ok(response)) => response,
        Ok(Err(problem)) => problem.into_response(),
        Err(_) => {
            // The panic itself was printed by its hook.
            tracing::error!(request.id = ?id, "a handler panicked");
            let detail = "the server met a fault of its own";
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail)
                .mend("look for the request id in the server's log")
                .into_response()
        }
    };
    if let Some(mut problem) = response.extensions_mut().remove::<Problem>() {
        problem.request_id = id.to_str().unwrap_or_default().to_owned();
        if response.status().is_server_error() && problem.code != "not_ready" {
            tracing::warn!(request.id = %problem.request_id, code = %problem.code, "answered with a problem");
        }
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        headers.insert(header::CONTENT_LENGTH, body.len().into());
        *response.body_mut() = Body::from(body);
    }
    response.headers_mut().insert(REQUEST_ID, id);
    let route = route.as_ref().map_or("(none)", MatchedPath::as_str);
    api.metrics.count_request(&method, route, response.status());
    response
}

fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(REQUEST_ID).filter(|value| {
        let bytes = value.as_bytes();
        !bytes.is_empty()
            && bytes.len() <= REQUEST_ID_MAX_CHARS
            && bytes.iter().all(|byte| byte.is_ascii_graphic())
    });
    given.cloned().unwrap_or_else(|| {
        HeaderValue::try_from(format!("req_{}", ids::new_uuid().simple()))
            .unwrap_or_else(|_| HeaderValue::from_static("req"))
    })
}

fn needs_token(request: &Request) -> bool {
    match request.uri().path() {
        "/healthz" | "/readyz" | "/openapi.json" | "/docs" | "/docs/" => false,
        // Figures, no contents: a collector on the same machine needs no token. Anybody else does.
        "/metrics" => !request
            .extensions()
            .get::<Peer>()
            .is_some_and(|Peer(peer)| peer.ip().is_loopback()),
        _ => true,
    }
}

async fn admit(api: &Api, mut request: Request, next: Next) -> Result<Response, Problem> {
    if !needs_token(&request) {
        return Ok(next.run(request).await);
    }
    let bearer = bearer(request.headers())?;
    let Some(known) = api.tokens.authenticate(bearer).await? else {
        return Err(Problem::new(
            StatusCode::UNAUTHORIZED,
            "token_invalid",
            "the token is unknown, expired or revoked",
        )
        .field("Authorization")
        .mend("ask an administrator for a new token"));
    };
    let token = known.token.id;
    let caller = Caller {
        name: known.token.name.to_string(),
        with: Txn::new(),
    };
    // For streams, which outlive this check.
    request.extensions_mut().insert(known);
    let key = request.headers().get(IDEMPOTENCY_KEY).cloned();
    match key {
        // Setting a secret twice is setting it once; a digest of its value is never kept.
        Some(key) if extract::is_write(request.method()) && !is_secret(request.uri()) => {
            let key = key.to_str().map_err(|_| {
                Problem::bad_request(
                    "idempotency_key_invalid",
                    "the idempotency key is not plain text",
                )
                .field("Idempotency-Key")
                .mend("send for example a UUID")
            })?;
            let context = calling(&caller);
            on_behalf_of(context, once(api, token, key, caller, request, next)).await
        }
        Some(_) | None => {
            let context = calling(&caller);
            request.extensions_mut().insert(caller);
            Ok(on_behalf_of(context, next.run(request)).await)
        }
    }
}

/// Calls of plugins that a request causes are recorded under the caller's name.
fn calling(caller: &Caller) -> CallContext {
    CallContext {
        caller: caller.name.clone(),
        order: None,
    }
}

fn bearer(headers: &HeaderMap) -> Result<&str, Problem> {
    let missing = |detail: &str| {
        Problem::new(StatusCode::UNAUTHORIZED, "token_missing", detail)
            .field("Authorization")
            .mend("send `Authorization: Bearer <token>`; the first token is in the file `admin.token` of the data directory")
    };
    let value = headers
        .get(header::AUTHORIZATION)
        .ok_or_else(|| missing("the request has no token"))?;
    let text = value.to_str().unwrap_or_default();
    match text.split_once(' ') {
        Some((scheme, token))
            if scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty() =>
        {
            Ok(token.trim())
        }
        Some(_) | None => Err(missing("the header `Authorization` holds no bearer token")),
    }
}

fn is_secret(uri: &Uri) -> bool {
    let mut segments = uri.path().split('/').skip(1);
    segments.next() == Some("v1")
        && segments.next() == Some("workspaces")
        && segments.nth(1) == Some("secrets")
}

/// Uploads of packages and plugins are streams: their query and the digest that they promise stand for them. A plugin's bytes
/// stand for themselves: uploading them again does nothing.
fn is_upload(request: &Request) -> bool {
    let path = request.uri().path();
    request.method() == Method::POST
        && (path.ends_with("/packages")
            || path == "/v1/plugins"
            || (path.starts_with("/v1/plugins/") && path.ends_with("/preview")))
}

/// Carries a request out once for its idempotency key.
async fn once(
    api: &Api,
    token: TokenId,
    key: &str,
    caller: Caller,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let mut hash = Sha256::new();
    hash.update(request.method().as_str());
    hash.update([0]);
    hash.update(
        request
            .uri()
            .path_and_query()
            .map_or("", |path| path.as_str()),
    );
    hash.update([0]);
    let mut request = if is_upload(&request) {
        for name in ["x-content-sha256", "content-length"] {
            hash.update(
                request
                    .headers()
                    .get(name)
                    .map_or(&b""[..], HeaderValue::as_bytes),
            );
            hash.update([0]);
        }
        request
    } else {
        let (parts, body) = request.into_parts();
        let body = extract::read_body(body).await?;
        hash.update(&body);
        Request::from_parts(parts, Body::from(body))
    };
    let digest = Digest::from_bytes(hash.finalize().into());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let with = match api.idempotency.begin(token, key, digest).await? {
        Begun::New(with) => with,
        Begun::Answered(stored) => return again(api, &method, &path, stored).await,
    };
    request.extensions_mut().insert(Caller { with, ..caller });
    let response = next.run(request).await;
    // A twin of this request may have been faster: then what this one met is the twin's doing, and its answer is the twin's.
    if !response.status().is_success()
        && let Some(stored) = api.idempotency.lookup(token, key, digest).await?
    {
        return again(api, &method, &path, stored).await;
    }
    if !response.status().is_success() || response.extensions().get::<ShownOnce>().is_some() {
        return Ok(response);
    }
    keep(api, token, key, response).await
}

/// Keeps an answer with its key. Where that fails the answer is given all the same: the resource is kept already.
async fn keep(
    api: &Api,
    token: TokenId,
    key: &str,
    response: Response,
) -> Result<Response, Problem> {
    let (parts, body) = response.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX)
        .await
        .map_err(|error| Problem::from(ServiceError::internal("write an answer", error)))?;
    let text = |name| {
        let value: Option<&HeaderValue> = parts.headers.get(name);
        value
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    let answer = Answer {
        status: parts.status.as_u16(),
        body: serde_json::from_slice(&body).unwrap_or(serde_json::Value::Null),
        etag: text(header::ETAG),
        location: text(header::LOCATION),
    };
    if let Err(error) = api.idempotency.complete(token, key, answer).await {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "an answer was not kept with its idempotency key"
        );
    }
    Ok(Response::from_parts(parts, Body::from(body)))
}

/// The answer of a request that was carried out before.
async fn again(
    api: &Api,
    method: &Method,
    path: &str,
    mut stored: Stored,
) -> Result<Response, Problem> {
    if let (None, Some(resource)) = (&stored.answer, &stored.resource)
        && let Some(order) = api.orders.of_record(resource).await?
    {
        stored.answer = Some(order_now(method, path, &order));
    }
    let answer = stored.answer.unwrap_or_else(|| {
        // The server died between the change and its answer, or the answer is not kept: made again from the resource.
        let body = stored.resource.unwrap_or(serde_json::Value::Null);
        let etag = Some(format!("\"{}\"", stored.revision.0));
        let makes = method == Method::POST && MAKING.iter().any(|last| path.ends_with(last));
        let id = ["id", "name"]
            .iter()
            .find_map(|field| body.get(field)?.as_str());
        Answer {
            status: match () {
                () if makes => StatusCode::CREATED.as_u16(),
                // Only deletions that answer with a record have a body.
                () if method == Method::DELETE && !body.is_object() => {
                    StatusCode::NO_CONTENT.as_u16()
                }
                () => StatusCode::OK.as_u16(),
            },
            location: id.filter(|_| makes).map(|id| format!("{path}/{id}")),
            etag: etag.filter(|_| !body.is_null()),
            body,
        }
    });
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::OK);
    let mut response = if answer.body.is_null() || status == StatusCode::NO_CONTENT {
        status.into_response()
    } else {
        super::reply::json(status, &answer.body)
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::ETAG, answer.etag),
        (header::LOCATION, answer.location),
    ] {
        if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
            headers.insert(name, value);
        }
    }
    headers.insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    Ok(response)
}

/// The answer to a request that made an order, or changed one, with the order as it is now.
fn order_now(method: &Method, path: &str, order: &Order) -> Answer {
    let makes = method == Method::POST
        && ["/orders", "/operations", "/release"]
            .iter()
            .any(|last| path.ends_with(last));
    Answer {
        status: if makes {
            StatusCode::CREATED.as_u16()
        } else {
            StatusCode::OK.as_u16()
        },
        location: makes.then(|| format!("/v1/workspaces/{}/orders/{}", order.workspace, order.id)),
        etag: None,
        body: serde_json::to_value(order).unwrap_or_default(),
    }
}
