//! `/v1/workspaces/{ws}/invocations`: run a public command on servers, follow its output, read what it came to, stop it.
//!
//! The output of a server is followed like the log of a step (`order_logs`): events `output` (`id` = where the next piece begins,
//! `data` = a piece), then `end` with the run and what the command makes of it. Resumed with `Last-Event-ID` or `?offset=`.

use axum::{
    Extension,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::mpsc;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    id::{OrderId, ServerId},
    invocation::{Invocation, quota::InvocationQuota},
};

use super::{
    Api,
    diagnoses::WaitQuery,
    extract::{Json, PageLimits, Path, Query, page_of},
    problem::Problem,
    reply::{self, Page, Reply},
    stream,
};
use crate::service::{
    Caller, PageOf, ServiceError,
    invocations::{CreateInvocation, RunFollower, RunNews, RunOutput},
    orders::logs::LogPiece,
    tokens::Authenticated,
};

const PAGES: PageLimits = PageLimits {
    default: 20,
    max: 100,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_invocation, list_invocations))
        .routes(routes!(get_invocation))
        .routes(routes!(stop_invocation))
        .routes(routes!(get_run_output))
        .routes(routes!(follow_run_output))
        .routes(routes!(get_invocation_quota))
}

/// Which page.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListInvocations {
    /// Entries of the page: 1 to 100, 20 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/invocations", operation_id = "create_invocation", tag = "invocations",
    params(("ws" = String, Path, description = "The workspace's identifier."), WaitQuery),
    request_body = CreateInvocation, responses((status = 201, description = "Made, and running. With `wait_s` the answer comes when it has ended, with its results.", body = Invocation)))]
async fn create_invocation(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Query(query): Query<WaitQuery>,
    Json(body): Json<CreateInvocation>,
) -> Reply {
    let wait = query.wait()?;
    let mut made = api.invocations.create(caller, &ws, body).await?;
    if !wait.is_zero() {
        made = api.invocations.wait(&ws, made.id, wait).await?;
    }
    let location = format!("/v1/workspaces/{ws}/invocations/{}", made.id);
    Ok(reply::made(&location, &made))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/invocations", operation_id = "list_invocations", tag = "invocations",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListInvocations),
    responses((status = 200, description = "Newest first, without their servers.", body = Page<Invocation>)))]
async fn list_invocations(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListInvocations>,
) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let PageOf { items, next } = api.invocations.list(&ws, &page).await?;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items,
            next_cursor: next,
        },
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/invocations/{id}", operation_id = "get_invocation", tag = "invocations",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The invocation's id."), WaitQuery),
    responses((status = 200, description = "The invocation with the result of each server.", body = Invocation)))]
async fn get_invocation(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, OrderId)>,
    Query(query): Query<WaitQuery>,
) -> Reply {
    let wait = query.wait()?;
    let found = if wait.is_zero() {
        api.invocations.get(&ws, id).await?
    } else {
        api.invocations.wait(&ws, id, wait).await?
    };
    Ok(reply::json(StatusCode::OK, &found))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/invocations/{id}/stop", operation_id = "stop_invocation", tag = "invocations",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The invocation's id.")),
    responses((status = 200, description = "It stops: what runs is killed, what has yet to run does not.", body = Invocation)))]
async fn stop_invocation(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, OrderId)>,
) -> Reply {
    let stopped = api.invocations.stop(caller, &ws, id).await?;
    Ok(reply::json(StatusCode::OK, &stopped))
}

/// From where.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct FollowOutput {
    /// Only what stands from this byte of the output on; `Last-Event-ID` goes before it.
    offset: Option<u64>,
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/invocations/{id}/servers/{server}/output", operation_id = "get_run_output", tag = "invocations",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The invocation's id."), ("server" = ServerId, Path, description = "The server's id.")),
    responses((status = 200, description = "What there is of the output of one server now.", body = RunOutput)))]
async fn get_run_output(
    State(api): State<Api>,
    Path((ws, id, server)): Path<(String, OrderId, ServerId)>,
) -> Reply {
    let output = api.invocations.output(&ws, id, server).await?;
    Ok(reply::json(StatusCode::OK, &output))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/invocations/{id}/servers/{server}/output/live", operation_id = "follow_run_output", tag = "invocations",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The invocation's id."), ("server" = ServerId, Path, description = "The server's id."), FollowOutput,
        ("Last-Event-ID" = Option<u64>, Header, description = "Where the piece that is known last ended.")),
    responses((status = 200, description = "Server-sent events: `output` with a LogPiece, `end` with a Run.", content_type = "text/event-stream", body = LogPiece)))]
async fn follow_run_output(
    State(api): State<Api>,
    Extension(known): Extension<Authenticated>,
    Path((ws, id, server)): Path<(String, OrderId, ServerId)>,
    Query(query): Query<FollowOutput>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let offset = stream::last_event_id(&headers)?
        .or(query.offset)
        .unwrap_or(0);
    let follower = api.invocations.follow(&ws, id, server, offset).await?;
    Ok(stream::respond(&api, known, move |sender| async move {
        if let Err(error) = follow(follower, &sender).await {
            tracing::warn!(order.id = %id, server.id = %server, error = &error as &dyn std::error::Error, "a live output ended early");
        }
    }))
}

/// Sends news until the end. Returns early when nobody listens.
async fn follow(
    mut follower: RunFollower,
    sender: &mpsc::Sender<Bytes>,
) -> Result<(), ServiceError> {
    loop {
        let Some(news) = stream::awaited(follower.next(), sender).await else {
            return Ok(());
        };
        let frame = match news? {
            None => return Ok(()),
            Some(RunNews::Piece(piece)) => stream::frame(Some(piece.next_offset), "output", &piece),
            Some(RunNews::Ended(run)) => stream::frame(None, "end", &run),
        };
        if sender.send(frame).await.is_err() {
            return Ok(());
        }
    }
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/invocation-quota", operation_id = "get_invocation_quota", tag = "invocations",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    responses((status = 200, description = "How many invocations the workspace may make today, and has made.", body = InvocationQuota)))]
async fn get_invocation_quota(State(api): State<Api>, Path(ws): Path<String>) -> Reply {
    let quota = api.invocations.quota(&ws).await?;
    Ok(reply::json(StatusCode::OK, &quota))
}
