//! Files of plugins: `POST /v1/plugins`, `GET` and `DELETE` of a version, previews of a candidate.
//!
//! A body is the component's bytes, at most [`FILE_MAX_BYTES`], held in memory; at most [`AT_ONCE`] of them at a time. A client
//! that sends nothing for [`CHUNK_TIMEOUT`] is given up.

use std::time::Duration;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::IntoResponse as _,
};
use http_body_util::BodyExt as _;
use serde::Deserialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::Digest;
use windlass_runtime::{Export, PluginStatus, journal::CallFilter};

use super::{
    Api,
    extract::{Path, Query, read_rest},
    problem::Problem,
    reply::{self, Reply},
};
use crate::service::{
    Caller,
    plugin_calls::{PREVIEW_CALLS, Preview},
    plugins::PluginUsers,
};

/// Largest file: that of the plugin directory.
const FILE_MAX_BYTES: usize = 32 * 1024 * 1024;
/// Bodies at once: each is in memory.
pub(super) const AT_ONCE: usize = 4;
/// How long a client may send nothing.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(60);
/// The header that carries what would stand in the file's `.sig`.
const SIGNATURE: &str = "plugin-signature";

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(upload_plugin))
        .routes(routes!(preview_plugin))
        .routes(routes!(get_plugin_users))
        .routes(routes!(download_plugin))
        .routes(routes!(delete_plugin))
}

/// Which recorded calls are made again.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct PreviewPlugin {
    /// So many of the newest calls: at most 1,000, 100 unless given.
    last: Option<usize>,
    /// Only calls that were made with this version.
    #[param(value_type = Option<String>)]
    version: Option<semver::Version>,
    /// Only calls of this function.
    export: Option<Export>,
}

#[utoipa::path(post, path = "/v1/plugins", operation_id = "upload_plugin", tag = "plugins",
    params(("Plugin-Signature" = Option<String>, Header, description = "Ed25519 signature of the file, base64: what would stand in its `.sig` file.")),
    request_body(content = Vec<u8>, content_type = "application/wasm", description = "The component, at most 32 MiB."),
    responses((status = 201, description = "Checked, put into the plugin directory, and live; its wishes take effect when they are approved. Bytes that stand there already are left as they are.", body = PluginStatus)))]
async fn upload_plugin(State(api): State<Api>, _caller: Caller, request: Request) -> Reply {
    let _place = place(&api).await?;
    let (bytes, signature) = receive(request).await?;
    let status = api.plugins.upload(bytes, signature).await?;
    let mut response = reply::json(StatusCode::CREATED, &status);
    if let Some(descriptor) = &status.descriptor
        && let Ok(location) = HeaderValue::try_from(format!(
            "/v1/plugins/{}/{}",
            descriptor.name, descriptor.version
        ))
    {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

#[utoipa::path(post, path = "/v1/plugins/{name}/preview", operation_id = "preview_plugin", tag = "plugins",
    params(("name" = String, Path, description = "The plugin's name."), PreviewPlugin,
        ("Plugin-Signature" = Option<String>, Header, description = "Ed25519 signature of the file, base64, where the server requires one.")),
    request_body(content = Vec<u8>, content_type = "application/wasm", description = "The candidate: a component of the same name, at most 32 MiB."),
    responses((status = 200, description = "What it would have answered to the newest recorded calls. It is neither kept nor live.", body = Preview)))]
async fn preview_plugin(
    State(api): State<Api>,
    _caller: Caller,
    Path(name): Path<String>,
    Query(query): Query<PreviewPlugin>,
    request: Request,
) -> Reply {
    let _place = place(&api).await?;
    let (bytes, signature) = receive(request).await?;
    let filter = CallFilter {
        version: query.version,
        export: query.export,
        ..CallFilter::default()
    };
    let last = query.last.unwrap_or(PREVIEW_CALLS);
    let preview = api
        .plugin_calls
        .preview(&name, bytes, signature, filter, last)
        .await?;
    Ok(reply::json(StatusCode::OK, &preview))
}

#[utoipa::path(get, path = "/v1/plugins/{name}/users", operation_id = "get_plugin_users", tag = "plugins",
    params(("name" = String, Path, description = "The plugin's name.")),
    responses((status = 200, description = "Applications, orders that are not over, and installed releases, by version.", body = PluginUsers)))]
async fn get_plugin_users(State(api): State<Api>, Path(name): Path<String>) -> Reply {
    Ok(reply::json(
        StatusCode::OK,
        &api.plugins.users(&name).await?,
    ))
}

#[utoipa::path(get, path = "/v1/plugins/{name}/{version}/file", operation_id = "download_plugin", tag = "plugins",
    params(("name" = String, Path, description = "The plugin's name."), ("version" = String, Path, description = "Its version.")),
    responses((status = 200, description = "The component. Its ETag is its SHA-256.", content_type = "application/wasm", body = Vec<u8>)))]
async fn download_plugin(
    State(api): State<Api>,
    Path((name, version)): Path<(String, String)>,
) -> Reply {
    let (digest, bytes): (Digest, Vec<u8>) =
        api.plugins.download(&format!("{name}@{version}")).await?;
    let mut headers = HeaderMap::new();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/wasm"),
    );
    if let Ok(etag) = HeaderValue::try_from(format!("\"{digest}\"")) {
        headers.insert(header::ETAG, etag);
    }
    Ok((headers, bytes).into_response())
}

#[utoipa::path(delete, path = "/v1/plugins/{name}/{version}", operation_id = "delete_plugin", tag = "plugins",
    params(("name" = String, Path, description = "The plugin's name; `files` for a rejected file."), ("version" = String, Path, description = "Its version; the file's name for a rejected file.")),
    responses((status = 204, description = "Its file, its kept bytes and what was decided about it are gone. Refused with `in_use` while somebody needs it.")))]
async fn delete_plugin(
    State(api): State<Api>,
    caller: Caller,
    Path((name, version)): Path<(String, String)>,
) -> Reply {
    let wanted = if name == "files" {
        version
    } else {
        format!("{name}@{version}")
    };
    api.plugins.delete(caller, &wanted).await?;
    Ok(reply::nothing())
}

/// A place for a body that is held in memory.
async fn place(api: &Api) -> Result<tokio::sync::SemaphorePermit<'_>, Problem> {
    match tokio::time::timeout(CHUNK_TIMEOUT, api.plugin_bodies.acquire()).await {
        Ok(Ok(place)) => Ok(place),
        Ok(Err(_)) | Err(_) => Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "unavailable",
            format!("{AT_ONCE} other plugin files are being received"),
        )
        .mend("try again shortly")),
    }
}

/// The file, and its signature.
async fn receive(request: Request) -> Result<(Vec<u8>, Option<Vec<u8>>), Problem> {
    let too_large = |found: usize| {
        Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "plugin_too_large",
            format!("the file has more than {FILE_MAX_BYTES} bytes"),
        )
        .field("body")
        .limit(FILE_MAX_BYTES as u64, found as u64)
        .mend("make the plugin smaller: strip it, or link less into it")
    };
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let asks_first = request.headers().contains_key(header::EXPECT);
    let signature = request
        .headers()
        .get(SIGNATURE)
        .map(|value| value.as_bytes().to_vec());
    let mut body: Body = request.into_body();
    if let Some(length) = announced.filter(|length| *length > FILE_MAX_BYTES) {
        if !asks_first {
            read_rest(&mut body).await;
        }
        return Err(too_large(length));
    }
    let mut bytes = Vec::with_capacity(announced.unwrap_or(0));
    loop {
        match tokio::time::timeout(CHUNK_TIMEOUT, body.frame()).await {
            Ok(None) => break,
            Ok(Some(Ok(frame))) => {
                if let Ok(chunk) = frame.into_data() {
                    if bytes.len() + chunk.len() > FILE_MAX_BYTES {
                        read_rest(&mut body).await;
                        return Err(too_large(bytes.len() + chunk.len()));
                    }
                    bytes.extend_from_slice(&chunk);
                }
            }
            Ok(Some(Err(error))) => {
                return Err(Problem::bad_request(
                    "plugin_truncated",
                    format!("the upload broke off: {error}"),
                )
                .field("body")
                .mend("send the file again"));
            }
            Err(_) => {
                return Err(Problem::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "body_timeout",
                    format!("nothing came for {} s", CHUNK_TIMEOUT.as_secs()),
                )
                .field("body")
                .mend("send the file again"));
            }
        }
    }
    if bytes.is_empty() {
        return Err(Problem::bad_request("body_missing", "the body is empty")
            .field("body")
            .mend("send the component's bytes as body"));
    }
    Ok((bytes, signature))
}
