//! `/v1/workspaces`, with their cells.

use axum::{extract::State, http::HeaderMap};
use serde::Deserialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    name::CellName,
    workspace::{Cell, Workspace},
};

use super::{
    Api,
    extract::{IfMatch, Json, PageLimits, Path, Query, page_of},
    reply::{self, Page, Reply},
};
use crate::service::{
    Caller, ServiceError,
    workspaces::{AddCell, CreateWorkspace, UpdateCell, UpdateWorkspace, WorkspaceFilter},
};

const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 50,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_workspace, list_workspaces))
        .routes(routes!(get_workspace, update_workspace, delete_workspace))
        .routes(routes!(add_cell, list_cells))
        .routes(routes!(get_cell, update_cell))
}

/// Which workspaces.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListWorkspaces {
    /// Identifier or display name contains this, in any case.
    search: Option<String>,
    /// Entries of the page: 1 to 50, 10 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

/// The confirmation of a deletion.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Confirm {
    /// The name of what is to be deleted.
    #[serde(default)]
    pub(super) confirm: String,
}

#[utoipa::path(post, path = "/v1/workspaces", operation_id = "create_workspace", tag = "workspaces",
    request_body = CreateWorkspace, responses((status = 201, description = "Made.", body = Workspace)))]
async fn create_workspace(
    State(api): State<Api>,
    caller: Caller,
    Json(body): Json<CreateWorkspace>,
) -> Reply {
    let made = api.workspaces.create(caller, body).await?;
    Ok(reply::created(
        &format!("/v1/workspaces/{}", made.0.name),
        made,
    ))
}

#[utoipa::path(get, path = "/v1/workspaces", operation_id = "list_workspaces", tag = "workspaces",
    params(ListWorkspaces), responses((status = 200, description = "By identifier.", body = Page<Workspace>)))]
async fn list_workspaces(State(api): State<Api>, Query(query): Query<ListWorkspaces>) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let filter = WorkspaceFilter {
        search: query.search,
    };
    Ok(reply::page(api.workspaces.list(&filter, page).await?))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}", operation_id = "get_workspace", tag = "workspaces",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    responses((status = 200, description = "The workspace.", body = Workspace)))]
async fn get_workspace(
    State(api): State<Api>,
    Path(ws): Path<String>,
    headers: HeaderMap,
) -> Reply {
    Ok(reply::found_unless(
        &headers,
        api.workspaces.get(&ws).await?,
    ))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}", operation_id = "update_workspace", tag = "workspaces",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    request_body = UpdateWorkspace, responses((status = 200, description = "Changed; what is not given stays.", body = Workspace)))]
async fn update_workspace(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    if_match: IfMatch,
    Json(body): Json<UpdateWorkspace>,
) -> Reply {
    Ok(reply::found(
        api.workspaces.update(caller, &ws, if_match.0, body).await?,
    ))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}", operation_id = "delete_workspace", tag = "workspaces",
    params(("ws" = String, Path, description = "The workspace's identifier."), Confirm),
    responses((status = 204, description = "Deleted.")))]
async fn delete_workspace(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Query(query): Query<Confirm>,
) -> Reply {
    api.workspaces.delete(caller, &ws, &query.confirm).await?;
    Ok(reply::nothing())
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/cells", operation_id = "add_cell", tag = "workspaces",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    request_body = AddCell, responses((status = 201, description = "Added: the workspace as it is now, with its ETag.", body = Workspace)))]
async fn add_cell(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    if_match: IfMatch,
    Json(body): Json<AddCell>,
) -> Reply {
    let location = format!("/v1/workspaces/{ws}/cells/{}", body.name);
    Ok(reply::created(
        &location,
        api.workspaces
            .add_cell(caller, &ws, if_match.0, body)
            .await?,
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/cells", operation_id = "list_cells", tag = "workspaces",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    responses((status = 200, description = "All cells, on one page; the ETag is the workspace's.", body = Page<Cell>)))]
async fn list_cells(State(api): State<Api>, Path(ws): Path<String>) -> Reply {
    let (workspace, revision) = api.workspaces.get(&ws).await?;
    Ok(reply::found((
        Page {
            items: workspace.cells,
            next_cursor: None,
        },
        revision,
    )))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/cells/{cell}", operation_id = "get_cell", tag = "workspaces",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("cell" = String, Path, description = "The cell's identifier.")),
    responses((status = 200, description = "The cell; the ETag is the workspace's.", body = Cell)))]
async fn get_cell(State(api): State<Api>, Path((ws, cell)): Path<(String, CellName)>) -> Reply {
    let (workspace, revision) = api.workspaces.get(&ws).await?;
    let found = workspace.cells.into_iter().find(|found| found.name == cell);
    let found = found.ok_or_else(|| ServiceError::not_found("cell", &cell))?;
    Ok(reply::found((found, revision)))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/cells/{cell}", operation_id = "update_cell", tag = "workspaces",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("cell" = String, Path, description = "The cell's identifier.")),
    request_body = UpdateCell, responses((status = 200, description = "Changed: the workspace as it is now.", body = Workspace)))]
async fn update_cell(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, cell)): Path<(String, CellName)>,
    if_match: IfMatch,
    Json(body): Json<UpdateCell>,
) -> Reply {
    Ok(reply::found(
        api.workspaces
            .update_cell(caller, &ws, &cell, if_match.0, body)
            .await?,
    ))
}
