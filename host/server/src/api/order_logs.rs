//! `/v1/workspaces/{ws}/orders/{id}/nodes/{node}/log`: the log of a step, later and live.
//!
//! A live log is a stream of server-sent events: `output` (`id` = where the next piece begins, `data` = a piece), then `end`
//! with how the attempt ended. Resumed with `Last-Event-ID` or `?offset=`; a gap shows as `dropped_bytes`. A reader that
//! is slow misses old pieces and slows nobody. The stream ends early when the token ends or the server stops.

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
use windlass_domain::id::OrderId;

use super::{
    Api,
    extract::{Path, Query},
    problem::Problem,
    reply::{self, Reply},
    stream,
};
use crate::service::{
    ServiceError,
    orders::logs::{LogFollower, LogNews, LogPiece, StepLog},
    tokens::Authenticated,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(get_step_log))
        .routes(routes!(follow_step_log))
}

/// Which log.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct WhichLog {
    /// Which attempt, from 1; the last unless given.
    attempt: Option<u32>,
}

/// Which log, and from where.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct FollowLog {
    /// Which attempt, from 1; unless given the one that runs or comes next, or the last one where none does.
    attempt: Option<u32>,
    /// Only what stands from this byte of the output on; `Last-Event-ID` goes before it.
    offset: Option<u64>,
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders/{id}/nodes/{node}/log", operation_id = "get_step_log", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id."), ("node" = u32, Path, description = "The step's node."), WhichLog),
    responses((status = 200, description = "The log of an attempt, as it is now.", body = StepLog)))]
async fn get_step_log(
    State(api): State<Api>,
    Path((ws, id, node)): Path<(String, OrderId, u32)>,
    Query(query): Query<WhichLog>,
) -> Reply {
    let log = api.orders.log(&ws, id, node, query.attempt).await?;
    Ok(reply::json(StatusCode::OK, &log))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders/{id}/nodes/{node}/log/live", operation_id = "follow_step_log", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id."), ("node" = u32, Path, description = "The step's node."), FollowLog,
        ("Last-Event-ID" = Option<u64>, Header, description = "Where the piece that is known last ended.")),
    responses((status = 200, description = "Server-sent events: `output` with a LogPiece, `end` with a LogEnd.", content_type = "text/event-stream", body = LogPiece)))]
async fn follow_step_log(
    State(api): State<Api>,
    Extension(known): Extension<Authenticated>,
    Path((ws, id, node)): Path<(String, OrderId, u32)>,
    Query(query): Query<FollowLog>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let offset = stream::last_event_id(&headers)?
        .or(query.offset)
        .unwrap_or(0);
    let follower = api
        .orders
        .follow_log(&ws, id, node, query.attempt, offset)
        .await?;
    Ok(stream::respond(&api, known, move |sender| async move {
        if let Err(error) = follow(follower, &sender).await {
            tracing::warn!(order.id = %id, node, error = &error as &dyn std::error::Error, "a live log ended early");
        }
    }))
}

/// Sends news until the end. Returns early when nobody listens.
async fn follow(
    mut follower: LogFollower,
    sender: &mpsc::Sender<Bytes>,
) -> Result<(), ServiceError> {
    loop {
        let Some(news) = stream::awaited(follower.next(), sender).await else {
            return Ok(());
        };
        let frame = match news? {
            None => return Ok(()),
            Some(LogNews::Piece(piece)) => stream::frame(Some(piece.next_offset), "output", &piece),
            Some(LogNews::End(end)) => stream::frame(None, "end", &end),
        };
        if sender.send(frame).await.is_err() {
            return Ok(());
        }
    }
}
