//! `/v1/workspaces/{ws}/servers`. Servers come with an activation code, not through here.

use axum::extract::State;
use serde::Deserialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    id::{InstanceId, ServerId},
    name::{CellName, TagKey},
    server::{ConnectionState, Server},
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
    servers::{ServerFilter, UpdateServer},
};

const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 50,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list_servers))
        .routes(routes!(get_server, update_server, deregister_server))
}

/// Which servers.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListServers {
    /// Name or host name contains this, in any case.
    search: Option<String>,
    /// In this cell.
    cell: Option<CellName>,
    /// Bound to this service instance.
    instance: Option<InstanceId>,
    /// With, or without an agent session.
    connection: Option<ConnectionState>,
    /// Has this tag: `key`, or `key:value`.
    tag: Option<String>,
    /// Entries of the page: 1 to 50, 10 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/servers", operation_id = "list_servers", tag = "servers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListServers),
    responses((status = 200, description = "Oldest first.", body = Page<Server>)))]
async fn list_servers(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListServers>,
) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let tag = query.tag.map(|tag| {
        let (key, value) = match tag.split_once(':') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (&*tag, None),
        };
        let key: TagKey = key
            .parse()
            .map_err(|error: windlass_domain::name::InvalidValue| {
                Problem::bad_request("parameter_invalid", error.message)
                    .field("tag")
                    .mend("give `key` or `key:value`")
            })?;
        Ok::<_, Problem>((key, value))
    });
    let filter = ServerFilter {
        search: query.search,
        cell: query.cell,
        instance: query.instance,
        connection: query.connection,
        tag: tag.transpose()?,
    };
    let mut page = api.servers.list(&ws, &filter, page).await?;
    for (server, _) in &mut page.items {
        *server = api.orders.server_now(server.clone()).await?;
    }
    Ok(reply::page(page))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/servers/{id}", operation_id = "get_server", tag = "servers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = ServerId, Path, description = "The server's id.")),
    responses((status = 200, description = "The server.", body = Server)))]
async fn get_server(State(api): State<Api>, Path((ws, id)): Path<(String, ServerId)>) -> Reply {
    // What is seen beside the record has no revision: the answer is never `304 Not Modified`.
    let (server, revision) = api.servers.get(&ws, id).await?;
    Ok(reply::found((
        api.orders.server_now(server).await?,
        revision,
    )))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/servers/{id}", operation_id = "update_server", tag = "servers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = ServerId, Path, description = "The server's id.")),
    request_body = UpdateServer, responses((status = 200, description = "Changed; what is not given stays.", body = Server)))]
async fn update_server(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, ServerId)>,
    if_match: IfMatch,
    Json(body): Json<UpdateServer>,
) -> Reply {
    Ok(reply::found(
        api.servers
            .update(caller, &ws, id, if_match.0, body)
            .await?,
    ))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/servers/{id}", operation_id = "deregister_server", tag = "servers",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = ServerId, Path, description = "The server's id."), Confirm),
    responses((status = 204, description = "Gone: its session ends and its key is not accepted any more. Refused while it is bound to a service instance.")))]
async fn deregister_server(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, ServerId)>,
    Query(query): Query<Confirm>,
) -> Reply {
    api.servers
        .deregister(caller, &ws, id, &query.confirm)
        .await?;
    api.gateway.deregister(id);
    Ok(reply::nothing())
}
