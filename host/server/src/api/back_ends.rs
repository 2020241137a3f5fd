//! `/v1/workspaces/{ws}/pools/{id}/back-ends`: the servers behind a pool of a load balancer, and their weights.

use axum::{extract::State, http::StatusCode};
use serde::Deserialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::id::{PoolId, ServerId};

use super::{
    Api,
    extract::{Json, Path},
    reply::{self, Page, Reply},
};
use crate::service::{
    Caller,
    load_balancers::back_ends::{AttachBackEnd, BackEndView, SetBackEndWeight},
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(
        list_back_ends,
        attach_back_ends,
        set_back_end_weights,
        detach_back_ends
    ))
}

/// Servers to be attached.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct AttachBackEnds {
    /// 1 to 30.
    servers: Vec<AttachBackEnd>,
}

/// Weights to be set.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct SetBackEndWeights {
    /// 1 to 30.
    weights: Vec<SetBackEndWeight>,
}

/// Servers to be detached.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct DetachBackEnds {
    /// 1 to 30.
    servers: Vec<ServerId>,
}

fn page(items: Vec<BackEndView>) -> axum::response::Response {
    let page = Page {
        items,
        next_cursor: None,
    };
    reply::json(StatusCode::OK, &page)
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/pools/{id}/back-ends", operation_id = "list_back_ends", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PoolId, Path, description = "The pool of a listener or server group.")),
    responses((status = 200, description = "Bound and attached servers on one page, with what HAProxy shows of them.", body = Page<BackEndView>)))]
async fn list_back_ends(State(api): State<Api>, Path((ws, id)): Path<(String, PoolId)>) -> Reply {
    Ok(page(api.load_balancers.back_ends(&ws, id).await?))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/pools/{id}/back-ends", operation_id = "attach_back_ends", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PoolId, Path, description = "The pool of a listener or server group.")),
    request_body = AttachBackEnds, responses((status = 200, description = "All or none attached; of one that is there already, what is given is replaced.", body = Page<BackEndView>)))]
async fn attach_back_ends(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, PoolId)>,
    Json(body): Json<AttachBackEnds>,
) -> Reply {
    let back_ends = api
        .load_balancers
        .attach(caller, &ws, id, body.servers)
        .await?;
    Ok(page(back_ends))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/pools/{id}/back-ends", operation_id = "set_back_end_weights", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PoolId, Path, description = "The pool of a listener or server group.")),
    request_body = SetBackEndWeights, responses((status = 200, description = "All or none kept; `shown` is what was read back from HAProxy.", body = Page<BackEndView>)))]
async fn set_back_end_weights(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, PoolId)>,
    Json(body): Json<SetBackEndWeights>,
) -> Reply {
    let back_ends = api
        .load_balancers
        .set_weights(caller, &ws, id, body.weights)
        .await?;
    Ok(page(back_ends))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/pools/{id}/back-ends", operation_id = "detach_back_ends", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PoolId, Path, description = "The pool of a listener or server group.")),
    request_body = DetachBackEnds, responses((status = 204, description = "All or none detached; a server that is bound to a service instance that names the pool stays, with its weight.")))]
async fn detach_back_ends(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, PoolId)>,
    Json(body): Json<DetachBackEnds>,
) -> Reply {
    api.load_balancers
        .detach(caller, &ws, id, body.servers)
        .await?;
    Ok(reply::nothing())
}
