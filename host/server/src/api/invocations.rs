//! `/v1/workspaces/{ws}/invocations`: run a public command on servers, read what it came to, stop it.

use axum::{
    extract::State,
    http::{HeaderValue, StatusCode, header},
};
use serde::Deserialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{id::OrderId, invocation::Invocation};

use super::{
    Api,
    diagnoses::WaitQuery,
    extract::{Json, PageLimits, Path, Query, page_of},
    reply::{self, Page, Reply},
};
use crate::service::{Caller, PageOf, invocations::CreateInvocation};

const PAGES: PageLimits = PageLimits {
    default: 20,
    max: 100,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_invocation, list_invocations))
        .routes(routes!(get_invocation))
        .routes(routes!(stop_invocation))
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
    let mut response = reply::json(StatusCode::CREATED, &made);
    if let Ok(location) = HeaderValue::try_from(location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
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
