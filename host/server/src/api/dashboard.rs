//! `/v1/workspaces/{ws}/order-counts` and `…/orders/{id}/progress`: what dashboards show.

use axum::{extract::State, http::StatusCode};
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::id::OrderId;

use super::{
    Api,
    extract::Path,
    reply::{self, Reply},
};
use crate::service::orders::dashboard::{OrderCounts, OrderProgress};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(count_orders))
        .routes(routes!(get_order_progress))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/order-counts", operation_id = "count_orders", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    responses((status = 200, description = "Orders of the workspace by state.", body = OrderCounts)))]
async fn count_orders(State(api): State<Api>, Path(ws): Path<String>) -> Reply {
    api.workspaces.get(&ws).await?;
    let counts = api.orders.counts(&ws).await?;
    Ok(reply::json(StatusCode::OK, &counts))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders/{id}/progress", operation_id = "get_order_progress", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id.")),
    responses((status = 200, description = "Where it is, by application, group and server, with durations.", body = OrderProgress)))]
async fn get_order_progress(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, OrderId)>,
) -> Reply {
    let progress = api.orders.order_progress(&ws, id).await?;
    Ok(reply::json(StatusCode::OK, &progress))
}
