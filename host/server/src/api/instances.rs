//! `/v1/workspaces/{ws}/service-instances`, and the servers that are bound to them with their variables.

use std::collections::BTreeMap;

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
};
use serde::Deserialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    id::{AppId, InstanceId, ServerId},
    instance::{Binding, ServiceInstance},
    name::CellName,
};

use super::{
    Api,
    extract::{IfMatch, Json, PageLimits, Path, Query, page_of},
    problem::Problem,
    reply::{self, Page, Reply},
    workspaces::Confirm,
};
use crate::service::{
    Caller,
    instances::{BindServer, CreateInstance, InstanceFilter, UpdateInstance},
};

const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 100,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_instance, list_instances))
        .routes(routes!(get_instance, update_instance, delete_instance))
        .routes(routes!(bind_servers, list_bound_servers, unbind_servers))
}

/// Which service instances.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListInstances {
    /// Name contains this, in any case.
    search: Option<String>,
    /// Of this application.
    app: Option<AppId>,
    /// Runs in this cell (an instance without cells runs in all).
    cell: Option<CellName>,
    /// Entries of the page: 1 to 100, 10 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

/// Servers to be bound, all or none; for those that are bound already, variables are replaced.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct BindServers {
    /// The servers.
    servers: Vec<ServerId>,
    /// Variables of single servers: server → name → value.
    #[serde(default)]
    variables: BTreeMap<ServerId, BTreeMap<String, String>>,
}

/// Servers to be unbound.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct UnbindServers {
    /// The servers.
    servers: Vec<ServerId>,
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/service-instances", operation_id = "create_instance", tag = "service-instances",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    request_body = CreateInstance, responses((status = 201, description = "Made.", body = ServiceInstance)))]
async fn create_instance(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Json(body): Json<CreateInstance>,
) -> Reply {
    let made = api.instances.create(caller, &ws, body).await?;
    Ok(reply::created(
        &format!("/v1/workspaces/{ws}/service-instances/{}", made.0.id),
        made,
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/service-instances", operation_id = "list_instances", tag = "service-instances",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListInstances),
    responses((status = 200, description = "Oldest first.", body = Page<ServiceInstance>)))]
async fn list_instances(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListInstances>,
) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let filter = InstanceFilter {
        search: query.search,
        app: query.app,
        cell: query.cell,
    };
    Ok(reply::page(api.instances.list(&ws, &filter, page).await?))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/service-instances/{id}", operation_id = "get_instance", tag = "service-instances",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = InstanceId, Path, description = "The service instance's id.")),
    responses((status = 200, description = "The service instance.", body = ServiceInstance)))]
async fn get_instance(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, InstanceId)>,
    headers: HeaderMap,
) -> Reply {
    Ok(reply::found_unless(
        &headers,
        api.instances.get(&ws, id).await?,
    ))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/service-instances/{id}", operation_id = "update_instance", tag = "service-instances",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = InstanceId, Path, description = "The service instance's id.")),
    request_body = UpdateInstance, responses((status = 200, description = "Changed; what is not given stays.", body = ServiceInstance)))]
async fn update_instance(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, InstanceId)>,
    if_match: IfMatch,
    Json(body): Json<UpdateInstance>,
) -> Reply {
    Ok(reply::found(
        api.instances
            .update(caller, &ws, id, if_match.0, body)
            .await?,
    ))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/service-instances/{id}", operation_id = "delete_instance", tag = "service-instances",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = InstanceId, Path, description = "The service instance's id."), Confirm),
    responses((status = 204, description = "Deleted.")))]
async fn delete_instance(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, InstanceId)>,
    Query(query): Query<Confirm>,
) -> Reply {
    api.instances
        .delete(caller, &ws, id, &query.confirm)
        .await?;
    Ok(reply::nothing())
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/service-instances/{id}/servers", operation_id = "bind_servers", tag = "service-instances",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = InstanceId, Path, description = "The service instance's id.")),
    request_body = BindServers, responses((status = 200, description = "Bound: the bindings that were asked for.", body = Page<Binding>)))]
async fn bind_servers(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, InstanceId)>,
    Json(mut body): Json<BindServers>,
) -> Reply {
    let wanted = body
        .servers
        .into_iter()
        .map(|server| BindServer {
            server,
            variables: body.variables.remove(&server).unwrap_or_default(),
        })
        .collect();
    if let Some(server) = body.variables.keys().next() {
        let detail = format!("variables are given for `{server}`, which is not among the servers");
        return Err(
            Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_value", detail)
                .field("variables")
                .mend("add the server to `servers`, or leave its variables out"),
        );
    }
    let (items, _) = api.instances.bind(caller, &ws, id, wanted).await?;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items,
            next_cursor: None,
        },
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/service-instances/{id}/servers", operation_id = "list_bound_servers", tag = "service-instances",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = InstanceId, Path, description = "The service instance's id.")),
    responses((status = 200, description = "All bindings with their variables, on one page.", body = Page<Binding>)))]
async fn list_bound_servers(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, InstanceId)>,
) -> Reply {
    api.instances.get(&ws, id).await?;
    let items = api.instances.bindings(id).await?;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items,
            next_cursor: None,
        },
    ))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/service-instances/{id}/servers", operation_id = "unbind_servers", tag = "service-instances",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = InstanceId, Path, description = "The service instance's id.")),
    request_body = UnbindServers, responses((status = 204, description = "Unbound, all or none.")))]
async fn unbind_servers(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, InstanceId)>,
    Json(body): Json<UnbindServers>,
) -> Reply {
    api.instances.unbind(caller, &ws, id, body.servers).await?;
    Ok(reply::nothing())
}
