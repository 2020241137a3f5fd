//! `/v1/apps`.

use axum::{extract::State, http::HeaderMap};
use serde::Deserialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{application::Application, name::PluginName};

use super::{
    Api,
    extract::{IfMatch, Json, PageLimits, Path, Query, page_of},
    reply::{self, Page, Reply},
    workspaces::Confirm,
};
use crate::service::{
    Caller,
    apps::{AppFilter, CreateApp, UpdateApp},
};

/// Source: spec "Applications".
const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 20,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_app, list_apps))
        .routes(routes!(get_app, update_app, delete_app))
}

/// Which applications.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListApps {
    /// Name or alias contains this, in any case.
    search: Option<String>,
    /// Exactly this owner.
    owner: Option<String>,
    /// Exactly this tech stack.
    tech_stack: Option<PluginName>,
    /// Entries of the page: 1 to 20, 10 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[utoipa::path(post, path = "/v1/apps", operation_id = "create_app", tag = "apps",
    request_body = CreateApp, responses((status = 201, description = "Made.", body = Application)))]
async fn create_app(State(api): State<Api>, caller: Caller, Json(body): Json<CreateApp>) -> Reply {
    let made = api.apps.create(caller, body).await?;
    Ok(reply::created(&format!("/v1/apps/{}", made.0.id), made))
}

#[utoipa::path(get, path = "/v1/apps", operation_id = "list_apps", tag = "apps",
    params(ListApps), responses((status = 200, description = "Oldest first.", body = Page<Application>)))]
async fn list_apps(State(api): State<Api>, Query(query): Query<ListApps>) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let filter = AppFilter {
        search: query.search,
        owner: query.owner,
        tech_stack: query.tech_stack,
    };
    Ok(reply::page(api.apps.list(&filter, page).await?))
}

#[utoipa::path(get, path = "/v1/apps/{app}", operation_id = "get_app", tag = "apps",
    params(("app" = String, Path, description = "The application's id or name.")),
    responses((status = 200, description = "The application.", body = Application)))]
async fn get_app(State(api): State<Api>, Path(app): Path<String>, headers: HeaderMap) -> Reply {
    Ok(reply::found_unless(&headers, api.apps.get(&app).await?))
}

#[utoipa::path(put, path = "/v1/apps/{app}", operation_id = "update_app", tag = "apps",
    params(("app" = String, Path, description = "The application's id or name.")),
    request_body = UpdateApp, responses((status = 200, description = "Changed; what is not given stays.", body = Application)))]
async fn update_app(
    State(api): State<Api>,
    caller: Caller,
    Path(app): Path<String>,
    if_match: IfMatch,
    Json(body): Json<UpdateApp>,
) -> Reply {
    Ok(reply::found(
        api.apps.update(caller, &app, if_match.0, body).await?,
    ))
}

#[utoipa::path(delete, path = "/v1/apps/{app}", operation_id = "delete_app", tag = "apps",
    params(("app" = String, Path, description = "The application's id or name."), Confirm),
    responses((status = 204, description = "Deleted.")))]
async fn delete_app(
    State(api): State<Api>,
    caller: Caller,
    Path(app): Path<String>,
    Query(query): Query<Confirm>,
) -> Reply {
    api.apps.delete(caller, &app, &query.confirm).await?;
    Ok(reply::nothing())
}
