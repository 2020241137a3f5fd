//! What is about the server itself: alive, ready, figures, the OpenAPI document, the page that shows it.

use axum::{
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    problem::Problem,
    reply::{self, Reply},
};

const DOCS: &str = include_str!("docs.html");

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(get_health))
        .routes(routes!(get_readiness))
        .routes(routes!(get_metrics))
        .routes(routes!(get_openapi))
        .routes(routes!(get_docs))
}

/// That the process answers.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Health {
    /// `ok`.
    status: &'static str,
    /// The program's version.
    version: &'static str,
}

const OK: Health = Health {
    status: "ok",
    version: env!("CARGO_PKG_VERSION"),
};

#[utoipa::path(get, path = "/healthz", operation_id = "get_health", tag = "server",
    responses((status = 200, description = "The process answers.", body = Health)))]
async fn get_health() -> Response {
    reply::json(StatusCode::OK, &OK)
}

#[utoipa::path(get, path = "/readyz", operation_id = "get_readiness", tag = "server",
    responses((status = 200, description = "The store, the plugins and the engine are up.", body = Health)))]
async fn get_readiness(State(api): State<Api>) -> Reply {
    if *api.ready.borrow() && !api.stop.is_cancelled() {
        Ok(reply::json(StatusCode::OK, &OK))
    } else {
        let detail = "the server is starting or stopping";
        Err(
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", detail)
                .mend("ask again shortly"),
        )
    }
}

#[utoipa::path(get, path = "/metrics", operation_id = "get_metrics", tag = "server",
    responses((status = 200, description = "Figures in Prometheus' text form. From this machine no token is needed.", content_type = "text/plain", body = String)))]
async fn get_metrics(State(api): State<Api>) -> Response {
    let text = api.metrics.text(&api.gauges.read().await);
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

#[utoipa::path(get, path = "/openapi.json", operation_id = "get_openapi", tag = "server",
    responses((status = 200, description = "This document.", content_type = "application/json", body = serde_json::Value)))]
async fn get_openapi(State(api): State<Api>) -> Response {
    let json = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, json)], api.document.clone()).into_response()
}

#[utoipa::path(get, path = "/docs", operation_id = "get_docs", tag = "server",
    responses((status = 200, description = "A page that shows this document.", content_type = "text/html", body = String)))]
async fn get_docs() -> Response {
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/html; charset=utf-8"),
        ),
        (
            header::CONTENT_SECURITY_POLICY,
            HeaderValue::from_static(
                "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
            ),
        ),
    ];
    (headers, DOCS).into_response()
}
