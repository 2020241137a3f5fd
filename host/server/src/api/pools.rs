//! `/v1/workspaces/{ws}/pools`: what servers take traffic from, their weights, and what a simulated pool does wrong.

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
};
use serde::Serialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    id::{PoolId, ServerId},
    pool::{Pool, PoolKind},
};

use super::{
    Api,
    extract::{Json, PageLimits, Path, Query, page_of},
    reply::{self, Page, Reply},
    tokens::ListQuery,
    workspaces::Confirm,
};
use crate::{
    engine::traffic::{PoolFault, SimulatedTraffic},
    service::{Caller, ServiceError, pools::CreatePool},
};

const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 100,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_pool, list_pools))
        .routes(routes!(get_pool, delete_pool))
        .routes(routes!(get_pool_weights))
        .routes(routes!(get_pool_fault, set_pool_fault))
        .routes(routes!(set_pool_traffic))
}

/// A member's weight.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
struct MemberWeight {
    /// The member.
    server: ServerId,
    /// 0 to 100.
    weight: u32,
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/pools", operation_id = "create_pool", tag = "pools",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    request_body = CreatePool, responses((status = 201, description = "Made.", body = Pool)))]
async fn create_pool(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Json(body): Json<CreatePool>,
) -> Reply {
    let made = api.pools.create(caller, &ws, body).await?;
    Ok(reply::created(
        &format!("/v1/workspaces/{ws}/pools/{}", made.0.id),
        made,
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/pools", operation_id = "list_pools", tag = "pools",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListQuery),
    responses((status = 200, description = "Oldest first.", body = Page<Pool>)))]
async fn list_pools(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListQuery>,
) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    Ok(reply::page(api.pools.list(&ws, page).await?))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/pools/{id}", operation_id = "get_pool", tag = "pools",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PoolId, Path, description = "The pool's id.")),
    responses((status = 200, description = "The pool.", body = Pool)))]
async fn get_pool(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, PoolId)>,
    headers: HeaderMap,
) -> Reply {
    Ok(reply::found_unless(&headers, api.pools.get(&ws, id).await?))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/pools/{id}", operation_id = "delete_pool", tag = "pools",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PoolId, Path, description = "The pool's id."), Confirm),
    responses((status = 204, description = "Deleted.")))]
async fn delete_pool(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, PoolId)>,
    Query(query): Query<Confirm>,
) -> Reply {
    api.pools.delete(caller, &ws, id, &query.confirm).await?;
    Ok(reply::nothing())
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/pools/{id}/weights", operation_id = "get_pool_weights", tag = "pools",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PoolId, Path, description = "The pool's id.")),
    responses((status = 200, description = "Weights that were set, on one page; a member that is missing has 100. Of a load balancer: those that are kept.", body = Page<MemberWeight>)))]
async fn get_pool_weights(State(api): State<Api>, Path((ws, id)): Path<(String, PoolId)>) -> Reply {
    let (pool, _) = api.pools.get(&ws, id).await?;
    let weights = match pool.kind {
        PoolKind::Simulated => api.traffic.weights(id).await?,
        PoolKind::LoadBalancer { .. } => {
            let members = api.load_balancers.back_ends(&ws, id).await?;
            members
                .iter()
                .map(|member| (member.server, member.weight))
                .collect()
        }
    };
    let items = weights
        .into_iter()
        .map(|(server, weight)| MemberWeight { server, weight })
        .collect();
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items,
            next_cursor: None,
        },
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/pools/{id}/fault", operation_id = "get_pool_fault", tag = "pools",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PoolId, Path, description = "The pool's id.")),
    responses((status = 200, description = "What the simulated pool does wrong.", body = PoolFault)))]
async fn get_pool_fault(State(api): State<Api>, Path((ws, id)): Path<(String, PoolId)>) -> Reply {
    simulated(&api, &ws, id).await?;
    Ok(reply::json(StatusCode::OK, &api.traffic.fault(id).await?))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/pools/{id}/fault", operation_id = "set_pool_fault", tag = "pools",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PoolId, Path, description = "The pool's id.")),
    request_body = PoolFault, responses((status = 200, description = "Set. Setting it again changes nothing.", body = PoolFault)))]
async fn set_pool_fault(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, PoolId)>,
    Json(body): Json<PoolFault>,
) -> Reply {
    simulated(&api, &ws, id).await?;
    api.traffic.set_fault(id, body).await?;
    Ok(reply::json(StatusCode::OK, &body))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/pools/{id}/traffic", operation_id = "set_pool_traffic", tag = "pools",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PoolId, Path, description = "The pool's id.")),
    request_body = SimulatedTraffic, responses((status = 200, description = "From now on the simulated pool counts as if its members answered so.", body = SimulatedTraffic)))]
async fn set_pool_traffic(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, PoolId)>,
    Json(body): Json<SimulatedTraffic>,
) -> Reply {
    simulated(&api, &ws, id).await?;
    api.traffic.set_traffic(id, body.clone()).await?;
    Ok(reply::json(StatusCode::OK, &body))
}

/// Only a simulated pool can be told to do something wrong, or to count what nobody sent.
async fn simulated(api: &Api, ws: &str, id: PoolId) -> Result<(), ServiceError> {
    let (pool, _) = api.pools.get(ws, id).await?;
    match pool.kind {
        PoolKind::Simulated => Ok(()),
        PoolKind::LoadBalancer { .. } => Err(ServiceError::conflict(
            "pool_not_simulated",
            format!(
                "the pool `{}` is of a load balancer: its members answer by themselves, and nothing of them can be set",
                pool.name
            ),
            "look at the load balancer's state instead",
        )),
    }
}
