//! `/v1/workspaces/{ws}/orders/{id}/traffic`, `weights` and `shift`: what an order's pools show, and what people change of it
//! while the order runs.

use axum::{extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    id::OrderId,
    order::{Action, Order},
    progress::ServerWeight,
};

use super::{
    Api,
    extract::{Json, Path},
    reply::{self, Reply},
};
use crate::service::{Caller, orders::TrafficView};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(get_order_traffic))
        .routes(routes!(set_order_weights))
        .routes(routes!(shift_order_traffic))
}

/// Weights of servers that the order has released.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct SetWeights {
    /// Servers and their weights, 1 to 100 of them.
    weights: Vec<ServerWeight>,
}

/// A share of the traffic for one cell.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct ShiftTraffic {
    /// The cell's identifier.
    cell: String,
    /// The share of its servers in every pool, 0 to 50.
    percent: u32,
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders/{id}/traffic", operation_id = "get_order_traffic", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id.")),
    responses((status = 200, description = "The weights that its applications' pools show, with the shares of members and cells.", body = TrafficView)))]
async fn get_order_traffic(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, OrderId)>,
) -> Reply {
    Ok(reply::json(
        StatusCode::OK,
        &api.orders.traffic(&ws, id).await?,
    ))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/orders/{id}/weights", operation_id = "set_order_weights", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id.")),
    request_body = SetWeights, responses((status = 200, description = "Set, in every pool of the applications released on these servers, and read back. Possible for servers whose release succeeded, until the order ends.", body = Order)))]
async fn set_order_weights(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, OrderId)>,
    Json(SetWeights { weights }): Json<SetWeights>,
) -> Reply {
    let action = Action::SetWeights { weights };
    Ok(reply::json(
        StatusCode::OK,
        &api.orders.change_traffic(caller, &ws, id, action).await?,
    ))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/orders/{id}/shift", operation_id = "shift_order_traffic", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id.")),
    request_body = ShiftTraffic, responses((status = 200, description = "Shifted, in every pool of the order's applications, and read back. Possible to a cell in which the order has released all its servers, until the order ends.", body = Order)))]
async fn shift_order_traffic(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, OrderId)>,
    Json(ShiftTraffic { cell, percent }): Json<ShiftTraffic>,
) -> Reply {
    let action = Action::ShiftCell { cell, percent };
    Ok(reply::json(
        StatusCode::OK,
        &api.orders.change_traffic(caller, &ws, id, action).await?,
    ))
}
