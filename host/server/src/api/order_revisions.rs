//! `/v1/workspaces/{ws}/orders/{id}/revisions`: the plan of an order and its changes.
//!
//! The ETag of the list is the number of the revision that runs: an edit with `If-Match` is made for that revision, or refused
//! with the one that runs now.

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
};
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    id::OrderId,
    order::{Order, PlanRevision},
    revise::PlanEdit,
};
use windlass_store::Revision;

use super::{
    Api,
    extract::{IfMatch, Json, Path},
    reply::{self, Page, Reply},
};
use crate::service::{
    Caller,
    orders::{PlanView, RevisionView},
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(revise_order, list_order_revisions))
        .routes(routes!(preview_order_revision))
        .routes(routes!(get_order_revision))
}

/// The number of a plan's revision that `If-Match` names. One that no plan can have is none that runs.
fn named(if_match: &IfMatch) -> Option<u32> {
    let revision = if_match.0.as_ref()?;
    Some(u32::try_from(revision.0).unwrap_or(u32::MAX))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/orders/{id}/revisions", operation_id = "revise_order", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id."),
        ("If-Match" = Option<String>, Header, description = "The revision that was looked at, as the ETag of the list of revisions.")),
    request_body = PlanEdit,
    responses((status = 200, description = "The plan is changed, durably: the order's header after it, its last revision among it.", body = Order)))]
async fn revise_order(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, OrderId)>,
    if_match: IfMatch,
    Json(edit): Json<PlanEdit>,
) -> Reply {
    let order = api
        .orders
        .revise(caller, &ws, id, named(&if_match), edit)
        .await?;
    Ok(reply::json(StatusCode::OK, &order))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/orders/{id}/revisions/preview", operation_id = "preview_order_revision", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id."),
        ("If-Match" = Option<String>, Header, description = "The revision that was looked at, as the ETag of the list of revisions.")),
    request_body = PlanEdit,
    responses((status = 200, description = "The revision as it would be; nothing is done.", body = RevisionView)))]
async fn preview_order_revision(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, OrderId)>,
    if_match: IfMatch,
    Json(edit): Json<PlanEdit>,
) -> Reply {
    let revision = api
        .orders
        .preview_revision(&ws, id, named(&if_match), edit)
        .await?;
    Ok(reply::json(StatusCode::OK, &revision))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders/{id}/revisions", operation_id = "list_order_revisions", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id.")),
    responses((status = 200, description = "All of them on one page, the first one first; the last one runs. The ETag is its number.", body = Page<PlanRevision>)))]
async fn list_order_revisions(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, OrderId)>,
    headers: HeaderMap,
) -> Reply {
    let items = api.orders.revisions(&ws, id).await?;
    let last = items.last().map_or(0, |last| last.revision);
    let page = Page {
        items,
        next_cursor: None,
    };
    Ok(reply::found_unless(
        &headers,
        (page, Revision(u64::from(last))),
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders/{id}/revisions/{revision}", operation_id = "get_order_revision", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id."),
        ("revision" = u32, Path, description = "Its number, from 1.")),
    responses((status = 200, description = "The plan as it was with that revision.", body = PlanView)))]
async fn get_order_revision(
    State(api): State<Api>,
    Path((ws, id, revision)): Path<(String, OrderId, u32)>,
) -> Reply {
    let plan = api.orders.plan_of_revision(&ws, id, revision).await?;
    Ok(reply::json(StatusCode::OK, &plan))
}
