//! `/v1/workspaces/{ws}/load-balancers`: HAProxy on managed servers, and its listeners.

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
};
use serde::Deserialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    id::{ListenerId, LoadBalancerId, PoolId},
    load_balancer::{Listener, LoadBalancer, Power},
};

use super::{
    Api,
    extract::{IfMatch, Json, PageLimits, Path, Query, page_of},
    reply::{self, Page, Reply},
    tokens::ListQuery,
    workspaces::Confirm,
};
use crate::service::{
    Caller,
    load_balancers::{
        CreateLoadBalancer, UpdateLoadBalancer,
        listeners::{CreateGroup, CreateListener, UpdateGroup, UpdateListener},
        steering::LoadBalancerState,
    },
};

const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 100,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_load_balancer, list_load_balancers))
        .routes(routes!(
            get_load_balancer,
            update_load_balancer,
            delete_load_balancer
        ))
        .routes(routes!(act_on_load_balancer))
        .routes(routes!(get_load_balancer_state))
        .routes(routes!(create_listener, list_listeners))
        .routes(routes!(get_listener, update_listener, delete_listener))
        .routes(routes!(act_on_listener))
        .routes(routes!(create_server_group))
        .routes(routes!(update_server_group, delete_server_group))
}

/// What is to be done.
#[derive(Debug, Clone, Copy, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct PowerAction {
    action: PowerActionKind,
}

#[derive(Debug, Clone, Copy, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
enum PowerActionKind {
    /// Let it run.
    Start,
    /// Let it not run, until it is started.
    Stop,
}

impl From<PowerAction> for Power {
    fn from(action: PowerAction) -> Self {
        match action.action {
            PowerActionKind::Start => Self::Started,
            PowerActionKind::Stop => Self::Stopped,
        }
    }
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/load-balancers", operation_id = "create_load_balancer", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    request_body = CreateLoadBalancer, responses((status = 201, description = "Made, started, without listeners.", body = LoadBalancer)))]
async fn create_load_balancer(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Json(body): Json<CreateLoadBalancer>,
) -> Reply {
    let made = api.load_balancers.create(caller, &ws, body).await?;
    let location = format!("/v1/workspaces/{ws}/load-balancers/{}", made.0.id);
    Ok(reply::created(&location, made))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/load-balancers", operation_id = "list_load_balancers", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListQuery),
    responses((status = 200, description = "Oldest first.", body = Page<LoadBalancer>)))]
async fn list_load_balancers(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListQuery>,
) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    Ok(reply::page(api.load_balancers.list(&ws, page).await?))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/load-balancers/{id}", operation_id = "get_load_balancer", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id.")),
    responses((status = 200, description = "The load balancer.", body = LoadBalancer)))]
async fn get_load_balancer(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, LoadBalancerId)>,
    headers: HeaderMap,
) -> Reply {
    let found = api.load_balancers.get(&ws, id).await?;
    Ok(reply::found_unless(&headers, found))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/load-balancers/{id}", operation_id = "update_load_balancer", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id.")),
    request_body = UpdateLoadBalancer, responses((status = 200, description = "Changed; what is not given stays.", body = LoadBalancer)))]
async fn update_load_balancer(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, LoadBalancerId)>,
    if_match: IfMatch,
    Json(body): Json<UpdateLoadBalancer>,
) -> Reply {
    let changed = api
        .load_balancers
        .update(caller, &ws, id, if_match.0, body)
        .await?;
    Ok(reply::found(changed))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/load-balancers/{id}", operation_id = "delete_load_balancer", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id."), Confirm),
    responses((status = 204, description = "Deleted; its agent ends HAProxy, now or when it is connected next.")))]
async fn delete_load_balancer(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, LoadBalancerId)>,
    Query(query): Query<Confirm>,
) -> Reply {
    api.load_balancers
        .delete(caller, &ws, id, &query.confirm)
        .await?;
    Ok(reply::nothing())
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/load-balancers/{id}/actions", operation_id = "act_on_load_balancer", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id.")),
    request_body = PowerAction, responses((status = 200, description = "Started or stopped; doing so again changes nothing.", body = LoadBalancer)))]
async fn act_on_load_balancer(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, LoadBalancerId)>,
    Json(body): Json<PowerAction>,
) -> Reply {
    let changed = api
        .load_balancers
        .set_power(caller, &ws, id, body.into())
        .await?;
    Ok(reply::found(changed))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/load-balancers/{id}/state", operation_id = "get_load_balancer_state", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id.")),
    responses((status = 200, description = "Whether HAProxy runs what is wanted, why not, and its own view of every server.", body = LoadBalancerState)))]
async fn get_load_balancer_state(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, LoadBalancerId)>,
) -> Reply {
    let state = api.load_balancers.state(&ws, id).await?;
    Ok(reply::json(StatusCode::OK, &state))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/load-balancers/{id}/listeners", operation_id = "create_listener", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id.")),
    request_body = CreateListener, responses((status = 201, description = "Made with its pool, started.", body = Listener)))]
async fn create_listener(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, LoadBalancerId)>,
    Json(body): Json<CreateListener>,
) -> Reply {
    let made = api
        .load_balancers
        .create_listener(caller, &ws, id, body)
        .await?;
    let location = format!(
        "/v1/workspaces/{ws}/load-balancers/{id}/listeners/{}",
        made.0.id
    );
    Ok(reply::created(&location, made))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/load-balancers/{id}/listeners", operation_id = "list_listeners", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id.")),
    responses((status = 200, description = "Oldest first, on one page; at most 50.", body = Page<Listener>)))]
async fn list_listeners(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, LoadBalancerId)>,
) -> Reply {
    let page = Page {
        items: api.load_balancers.listeners(&ws, id).await?,
        next_cursor: None,
    };
    Ok(reply::json(StatusCode::OK, &page))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/load-balancers/{id}/listeners/{listener}", operation_id = "get_listener", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id."),
        ("listener" = ListenerId, Path, description = "The listener's id.")),
    responses((status = 200, description = "The listener.", body = Listener)))]
async fn get_listener(
    State(api): State<Api>,
    Path((ws, id, listener)): Path<(String, LoadBalancerId, ListenerId)>,
    headers: HeaderMap,
) -> Reply {
    let found = api.load_balancers.listener(&ws, id, listener).await?;
    Ok(reply::found_unless(&headers, found))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/load-balancers/{id}/listeners/{listener}", operation_id = "update_listener", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id."),
        ("listener" = ListenerId, Path, description = "The listener's id.")),
    request_body = UpdateListener, responses((status = 200, description = "Changed.", body = Listener)))]
async fn update_listener(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id, listener)): Path<(String, LoadBalancerId, ListenerId)>,
    if_match: IfMatch,
    Json(body): Json<UpdateListener>,
) -> Reply {
    let changed = api
        .load_balancers
        .update_listener(caller, &ws, id, listener, if_match.0, body)
        .await?;
    Ok(reply::found(changed))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/load-balancers/{id}/listeners/{listener}", operation_id = "delete_listener", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id."),
        ("listener" = ListenerId, Path, description = "The listener's id."), Confirm),
    responses((status = 204, description = "Deleted, with its groups and their pools.")))]
async fn delete_listener(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id, listener)): Path<(String, LoadBalancerId, ListenerId)>,
    Query(query): Query<Confirm>,
) -> Reply {
    api.load_balancers
        .delete_listener(caller, &ws, id, listener, &query.confirm)
        .await?;
    Ok(reply::nothing())
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/load-balancers/{id}/listeners/{listener}/actions", operation_id = "act_on_listener", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id."),
        ("listener" = ListenerId, Path, description = "The listener's id.")),
    request_body = PowerAction, responses((status = 200, description = "Started or stopped; doing so again changes nothing.", body = Listener)))]
async fn act_on_listener(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id, listener)): Path<(String, LoadBalancerId, ListenerId)>,
    Json(body): Json<PowerAction>,
) -> Reply {
    let changed = api
        .load_balancers
        .set_listener_power(caller, &ws, id, listener, body.into())
        .await?;
    Ok(reply::found(changed))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/load-balancers/{id}/listeners/{listener}/groups", operation_id = "create_server_group", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id."),
        ("listener" = ListenerId, Path, description = "The listener's id.")),
    request_body = CreateGroup, responses((status = 201, description = "Added with its pool, behind the groups that are there.", body = Listener)))]
async fn create_server_group(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id, listener)): Path<(String, LoadBalancerId, ListenerId)>,
    Json(body): Json<CreateGroup>,
) -> Reply {
    let changed = api
        .load_balancers
        .create_group(caller, &ws, id, listener, body)
        .await?;
    let location = format!("/v1/workspaces/{ws}/load-balancers/{id}/listeners/{listener}");
    Ok(reply::created(&location, changed))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/load-balancers/{id}/listeners/{listener}/groups/{pool}", operation_id = "update_server_group", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id."),
        ("listener" = ListenerId, Path, description = "The listener's id."), ("pool" = PoolId, Path, description = "The group's pool.")),
    request_body = UpdateGroup, responses((status = 200, description = "Changed.", body = Listener)))]
async fn update_server_group(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id, listener, pool)): Path<(String, LoadBalancerId, ListenerId, PoolId)>,
    Json(body): Json<UpdateGroup>,
) -> Reply {
    let changed = api
        .load_balancers
        .update_group(caller, &ws, id, listener, pool, body)
        .await?;
    Ok(reply::found(changed))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/load-balancers/{id}/listeners/{listener}/groups/{pool}", operation_id = "delete_server_group", tag = "load balancers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = LoadBalancerId, Path, description = "The load balancer's id."),
        ("listener" = ListenerId, Path, description = "The listener's id."), ("pool" = PoolId, Path, description = "The group's pool."), Confirm),
    responses((status = 204, description = "Deleted, with its pool.")))]
async fn delete_server_group(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id, listener, pool)): Path<(String, LoadBalancerId, ListenerId, PoolId)>,
    Query(query): Query<Confirm>,
) -> Reply {
    api.load_balancers
        .delete_group(caller, &ws, id, listener, pool, &query.confirm)
        .await?;
    Ok(reply::nothing())
}
