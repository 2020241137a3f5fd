//! `/v1/plugins/{name}/shadow`: a version that is compared with the default, and its evidence.

use axum::{extract::State, http::StatusCode};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    extract::{Json, Path},
    reply::{self, Page, Reply},
};
use crate::service::{
    Caller,
    shadows::{Shadow, StartShadow},
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(start_plugin_shadow))
        .routes(routes!(list_plugin_shadows))
        .routes(routes!(cancel_plugin_shadow))
        .routes(routes!(promote_plugin_shadow))
}

#[utoipa::path(post, path = "/v1/plugins/{name}/shadow", operation_id = "start_plugin_shadow", tag = "plugins",
    params(("name" = String, Path, description = "The plugin's name.")),
    request_body = StartShadow,
    responses((status = 201, description = "Every live call of the default is made again with this version, in the background; its answers are compared and never used.", body = Shadow)))]
async fn start_plugin_shadow(
    State(api): State<Api>,
    caller: Caller,
    Path(name): Path<String>,
    Json(body): Json<StartShadow>,
) -> Reply {
    let shadow = api.shadows.start(&caller, &name, &body).await?;
    Ok(reply::json(StatusCode::CREATED, &shadow))
}

#[utoipa::path(get, path = "/v1/plugins/{name}/shadow", operation_id = "list_plugin_shadows", tag = "plugins",
    params(("name" = String, Path, description = "The plugin's name.")),
    responses((status = 200, description = "Comparisons, one a version, the youngest first, on one page.", body = Page<Shadow>)))]
async fn list_plugin_shadows(State(api): State<Api>, Path(name): Path<String>) -> Reply {
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items: api.shadows.list(&name).await?,
            next_cursor: None,
        },
    ))
}

#[utoipa::path(delete, path = "/v1/plugins/{name}/shadow", operation_id = "cancel_plugin_shadow", tag = "plugins",
    params(("name" = String, Path, description = "The plugin's name.")),
    responses((status = 200, description = "The comparison is ended; its evidence stays.", body = Shadow)))]
async fn cancel_plugin_shadow(
    State(api): State<Api>,
    caller: Caller,
    Path(name): Path<String>,
) -> Reply {
    Ok(reply::json(
        StatusCode::OK,
        &api.shadows.cancel(&caller, &name).await?,
    ))
}

#[utoipa::path(post, path = "/v1/plugins/{name}/shadow/promote", operation_id = "promote_plugin_shadow", tag = "plugins",
    params(("name" = String, Path, description = "The plugin's name.")),
    responses((status = 200, description = "The compared version is the default now.", body = Shadow)))]
async fn promote_plugin_shadow(
    State(api): State<Api>,
    caller: Caller,
    Path(name): Path<String>,
) -> Reply {
    Ok(reply::json(
        StatusCode::OK,
        &api.shadows.promote(&caller, &name).await?,
    ))
}
