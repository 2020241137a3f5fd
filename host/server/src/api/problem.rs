//! What the API says when it refuses or fails: `application/problem+json` (RFC 9457).
//!
//! Owns the form of a problem and the one mapping from services' errors to HTTP. A handler returns a [`Problem`]; the gate
//! (`gate.rs`) writes it as the body, with the request's id. Codes are stable; texts are for people and may change.

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

use crate::{
    engine::traffic::TrafficError,
    gateway::secrets::{SECRET_MAX_BYTES, SECRETS_PER_WORKSPACE, SecretError},
    service::ServiceError,
};

/// A problem, as RFC 9457 has it, with Windlass's own members.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Problem {
    /// `about:blank`: the kind of problem stands in `code`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The status's name.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// Stable code, for programs: for example `name_taken`.
    pub code: String,
    /// What is wrong, for people.
    pub detail: String,
    /// What is wrong: a field of the body, by its name, or by a JSON pointer where it stands deeper (`/limits/max_in_flight`);
    /// a parameter, or a header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The limit that was met.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// The figure that stands against the limit, or the current revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<u64>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
    /// The request's id: what the server's log knows it by.
    #[serde(default)]
    pub request_id: String,
    /// When it may be tried again, in seconds: the header `Retry-After`.
    #[serde(skip)]
    pub retry_after_s: Option<u64>,
}

impl Problem {
    pub(crate) fn new(status: StatusCode, code: &str, detail: impl Into<String>) -> Self {
        Self {
            kind: "about:blank".to_owned(),
            title: status.canonical_reason().unwrap_or("Error").to_owned(),
            status: status.as_u16(),
            code: code.to_owned(),
            detail: detail.into(),
            field: None,
            limit: None,
            current: None,
            mend: None,
            request_id: String::new(),
            retry_after_s: None,
        }
    }

    pub(crate) fn bad_request(code: &str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, detail)
    }

    pub(crate) fn field(mut self, field: impl Into<String>) -> Self {
        let field: String = field.into();
        // Services and planners name fields by pointers. At the top level that is the field's name.
        let field = match field.strip_prefix('/') {
            Some(name) if !name.contains(['/', '~']) => name.to_owned(),
            Some(_) | None => field,
        };
        self.field = Some(field).filter(|field| !field.is_empty());
        self
    }

    pub(crate) fn limit(mut self, limit: u64, current: u64) -> Self {
        self.limit = Some(limit);
        self.current = Some(current);
        self
    }

    pub(crate) fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }
}

impl IntoResponse for Problem {
    /// Only the status, and the problem beside it: the gate writes the body, because it knows the request's id.
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        let at_once = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(1);
        if let Some(seconds) = self.retry_after_s.or(at_once) {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"windlass\""),
            );
        }
        response.extensions_mut().insert(self);
        response
    }
}

const REPLAY_CODE: &str = "request_repeated";

/// The one mapping of services' errors to HTTP.
impl From<ServiceError> for Problem {
    fn from(error: ServiceError) -> Self {
        let detail = error.to_string();
        match error {
            ServiceError::NotFound { .. } => Self::new(StatusCode::NOT_FOUND, "not_found", detail)
                .mend("check the id, and the workspace it belongs to"),
            ServiceError::Invalid {
                code, field, mend, ..
            } => {
                let status = match code {
                    // A parameter of the query, like its neighbours, which the edge refuses.
                    "cursor_invalid" => StatusCode::BAD_REQUEST,
                    _ => StatusCode::UNPROCESSABLE_ENTITY,
                };
                Self::new(status, code, detail).field(field).mend(mend)
            }
            ServiceError::Limit {
                code,
                field,
                limit,
                current,
                mend,
                ..
            } => {
                let status = match code {
                    "package_too_large" | "upload_quota_reached" => StatusCode::PAYLOAD_TOO_LARGE,
                    _ => StatusCode::UNPROCESSABLE_ENTITY,
                };
                Self::new(status, code, detail)
                    .field(field)
                    .limit(limit, current)
                    .mend(mend)
            }
            ServiceError::Exhausted {
                code,
                limit,
                current,
                mend,
                renews_in_s,
                ..
            } => Self {
                retry_after_s: Some(renews_in_s),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, code, detail)
                    .limit(limit, current)
                    .mend(mend)
            },
            ServiceError::StorageFull {
                limit,
                current,
                mend,
                ..
            } => Self::new(StatusCode::INSUFFICIENT_STORAGE, "storage_full", detail)
                .limit(limit, current)
                .mend(mend),
            ServiceError::Conflict { code, mend, .. } => {
                Self::new(StatusCode::CONFLICT, code, detail).mend(mend)
            }
            ServiceError::Changed { current, .. } => Self {
                current: Some(current),
                ..Self::new(StatusCode::PRECONDITION_FAILED, "changed", detail)
                    .field("If-Match")
                    .mend("read it again, and repeat the change with its new ETag")
            },
            // The request is well formed; a part that the platform stands on failed.
            ServiceError::Plugin { code, mend, .. } => {
                Self::new(StatusCode::BAD_GATEWAY, code, detail).mend(mend)
            }
            ServiceError::Replay => Self::new(StatusCode::CONFLICT, REPLAY_CODE, detail)
                .mend("send the request again with the same idempotency key"),
            ServiceError::Unavailable { .. } => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", detail)
                    .mend("try again shortly")
            }
            ServiceError::Internal { .. } => {
                tracing::error!(error = &error as &dyn std::error::Error, "a request failed");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail)
                    .mend("look for the request id in the server's log")
            }
        }
    }
}

impl From<SecretError> for Problem {
    fn from(error: SecretError) -> Self {
        let detail = error.to_string();
        match error {
            SecretError::Name { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_value", detail)
                    .field("name")
                    .mend("choose another name")
            }
            SecretError::Size { found_bytes } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "out_of_limit", detail)
                    .field("value")
                    .limit(SECRET_MAX_BYTES as u64, found_bytes as u64)
                    .mend("larger values belong into files of the package")
            }
            SecretError::TooMany { found } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "out_of_limit", detail)
                    .limit(SECRETS_PER_WORKSPACE as u64, found as u64)
                    .mend("delete a secret first")
            }
            SecretError::Sealed { .. }
            | SecretError::Key(_)
            | SecretError::Store(_)
            | SecretError::Commit(_)
            | SecretError::Workspace(_) => {
                Self::from(ServiceError::internal("read or write a secret", error))
            }
        }
    }
}

impl From<TrafficError> for Problem {
    fn from(error: TrafficError) -> Self {
        match error {
            TrafficError::Failed { .. }
            | TrafficError::Away { .. }
            | TrafficError::ReadBack { .. } => {
                Self::new(StatusCode::BAD_GATEWAY, "pool_failed", error.to_string())
                    .mend("try again; look at the pool's state")
            }
        }
    }
}
