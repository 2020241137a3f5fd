//! `/v1/workspaces/{ws}/process-templates`: lists of steps that replace the fixed flow of releases and operations.

use axum::{extract::State, http::HeaderMap};
use serde::Deserialize;
use serde_json::Value;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    id::TemplateId,
    template::{ProcessTemplate, TemplateKind},
};

use super::{
    Api,
    extract::{IfMatch, Json, PageLimits, Path, Query, page_of, read_whole},
    reply::{self, Page, Reply},
    workspaces::Confirm,
};
use crate::service::{Caller, templates::CreateTemplate};

const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 100,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_process_template, list_process_templates))
        .routes(routes!(
            get_process_template,
            update_process_template,
            delete_process_template
        ))
}

/// Which templates.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListTemplates {
    /// Only for this: `release`, `restart`, `online`, `offline`, `static_files` or `initialise`.
    kind: Option<TemplateKind>,
    /// Entries of the page: 1 to 100, 10 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/process-templates", operation_id = "create_process_template", tag = "process templates",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    request_body = CreateTemplate, responses((status = 201, description = "Made.", body = ProcessTemplate)))]
async fn create_process_template(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Json(body): Json<Value>,
) -> Reply {
    let made = api.templates.create(caller, &ws, read_whole(body)?).await?;
    Ok(reply::created(
        &format!("/v1/workspaces/{ws}/process-templates/{}", made.0.id),
        made,
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/process-templates", operation_id = "list_process_templates", tag = "process templates",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListTemplates),
    responses((status = 200, description = "Those that can be used in the workspace, oldest first.", body = Page<ProcessTemplate>)))]
async fn list_process_templates(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListTemplates>,
) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    Ok(reply::page(
        api.templates.list(&ws, query.kind, page).await?,
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/process-templates/{id}", operation_id = "get_process_template", tag = "process templates",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = TemplateId, Path, description = "The template's id.")),
    responses((status = 200, description = "The template.", body = ProcessTemplate)))]
async fn get_process_template(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, TemplateId)>,
    headers: HeaderMap,
) -> Reply {
    Ok(reply::found_unless(
        &headers,
        api.templates.get(&ws, id).await?,
    ))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/process-templates/{id}", operation_id = "update_process_template", tag = "process templates",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = TemplateId, Path, description = "The template's id.")),
    request_body = CreateTemplate, responses((status = 200, description = "Replaced. Its kind stays as it is; orders keep the plan that they were made with.", body = ProcessTemplate)))]
async fn update_process_template(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, TemplateId)>,
    IfMatch(if_match): IfMatch,
    Json(body): Json<Value>,
) -> Reply {
    let request = read_whole(body)?;
    let updated = api.templates.update(caller, &ws, id, if_match, request);
    Ok(reply::found(updated.await?))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/process-templates/{id}", operation_id = "delete_process_template", tag = "process templates",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = TemplateId, Path, description = "The template's id."), Confirm),
    responses((status = 204, description = "Deleted. Orders keep the plan that they were made with.")))]
async fn delete_process_template(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, TemplateId)>,
    Query(query): Query<Confirm>,
) -> Reply {
    api.templates
        .delete(caller, &ws, id, &query.confirm)
        .await?;
    Ok(reply::nothing())
}
