//! `/v1/workspaces/{ws}/operations`: restart, online, offline, static files, initialisation. What is made is an order: look at
//! it, act on it and follow it under `/v1/workspaces/{ws}/orders`.

use axum::{extract::State, http::StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{Digest, operation::OperationSpec, order::Order};

use super::{
    Api,
    extract::{Json, Path, read, read_whole},
    problem::Problem,
    reply::{self, Reply},
};
use crate::service::{
    Caller,
    orders::{PlanView, operations::CreateOperation},
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_operation))
        .routes(routes!(preview_operation))
}

/// The operation that a body asks for; see `asked_order` for why what stands beside it is taken out first.
fn asked_operation(mut fields: Map<String, Value>) -> Result<CreateOperation, Problem> {
    let mut own = Map::new();
    for name in ["plan_digest", "run"] {
        own.extend(fields.remove_entry(name));
    }
    /// The fields of [`CreateOperation`] beside the operation.
    #[derive(Deserialize)]
    struct Beside {
        plan_digest: Option<Digest>,
        #[serde(default)]
        run: bool,
    }
    let Beside { plan_digest, run } = read(Value::Object(own))?;
    Ok(CreateOperation {
        operation: read_whole(Value::Object(fields))?,
        plan_digest,
        run,
    })
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/operations/preview", operation_id = "preview_operation", tag = "operations",
    params(("ws" = String, Path, description = "The workspace's identifier.")), request_body = OperationSpec,
    responses((status = 200, description = "The complete plan; nothing is done. `left_out` in it names the servers that do not qualify, with the reason. It is kept for a day: make an order with its digest.", body = PlanView)))]
async fn preview_operation(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Json(body): Json<Value>,
) -> Reply {
    let spec: OperationSpec = read_whole(body)?;
    Ok(reply::json(
        StatusCode::OK,
        &api.orders.preview_operation(&ws, &spec).await?,
    ))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/operations", operation_id = "create_operation", tag = "operations",
    params(("ws" = String, Path, description = "The workspace's identifier.")), request_body = CreateOperation,
    responses((status = 201, description = "Made, as an order; it runs once somebody runs it, or at once with `run`. All that can be done with orders can be done with it, but that it is not rolled back.", body = Order)))]
async fn create_operation(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Json(fields): Json<Map<String, Value>>,
) -> Reply {
    let create = asked_operation(fields)?;
    let order = api.orders.create_operation(caller, &ws, create).await?;
    let location = format!("/v1/workspaces/{ws}/orders/{}", order.id);
    Ok(reply::made(&location, &order))
}
