//! `/v1/plugins`: what is in the plugin directory, why a file is no plugin, and what operators decide.

use axum::{extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{Digest, plugin::PluginKind};
use windlass_runtime::{PluginState, PluginStatus};

use super::{
    Api,
    extract::{Json, Path, Query},
    reply::{self, Page, Reply},
};
use crate::service::{Caller, plugins::Decision};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list_plugins))
        .routes(routes!(get_plugin))
        .routes(routes!(get_plugin_version))
        .routes(routes!(act_on_plugin))
        .routes(routes!(get_plugin_digest))
        .routes(routes!(revoke_plugin))
        .routes(routes!(reinstate_plugin))
}

/// Which plugins.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListPlugins {
    /// Only of this kind.
    kind: Option<PluginKind>,
    /// Only in this state.
    state: Option<PluginState>,
}

/// What to do with a version.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct PluginAction {
    /// What to do.
    action: Decision,
}

#[utoipa::path(get, path = "/v1/plugins", operation_id = "list_plugins", tag = "plugins", params(ListPlugins),
    responses((status = 200, description = "Every plugin and every file that would be one, on one page.", body = Page<PluginStatus>)))]
async fn list_plugins(State(api): State<Api>, Query(query): Query<ListPlugins>) -> Reply {
    let mut items = api.plugins.list();
    items.retain(|plugin| {
        query.kind.is_none_or(|kind| plugin.kind == Some(kind))
            && query.state.is_none_or(|state| plugin.state == state)
    });
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items,
            next_cursor: None,
        },
    ))
}

#[utoipa::path(get, path = "/v1/plugins/{name}", operation_id = "get_plugin", tag = "plugins",
    params(("name" = String, Path, description = "A name (its default version), `name@version`, a digest, or a file of the plugin directory.")),
    responses((status = 200, description = "The plugin.", body = PluginStatus)))]
async fn get_plugin(State(api): State<Api>, Path(name): Path<String>) -> Reply {
    Ok(reply::json(StatusCode::OK, &api.plugins.get(&name)?))
}

#[utoipa::path(get, path = "/v1/plugins/{name}/{version}", operation_id = "get_plugin_version", tag = "plugins",
    params(("name" = String, Path, description = "The plugin's name."), ("version" = String, Path, description = "Its version.")),
    responses((status = 200, description = "The plugin.", body = PluginStatus)))]
async fn get_plugin_version(
    State(api): State<Api>,
    Path((name, version)): Path<(String, String)>,
) -> Reply {
    Ok(reply::json(
        StatusCode::OK,
        &api.plugins.get(&format!("{name}@{version}"))?,
    ))
}

#[utoipa::path(post, path = "/v1/plugins/{name}/{version}/actions", operation_id = "act_on_plugin", tag = "plugins",
    params(("name" = String, Path, description = "The plugin's name."), ("version" = String, Path, description = "Its version.")),
    request_body = PluginAction, responses((status = 200, description = "Decided, durably: the plugin as it is now.", body = PluginStatus)))]
async fn act_on_plugin(
    State(api): State<Api>,
    caller: Caller,
    Path((name, version)): Path<(String, String)>,
    Json(body): Json<PluginAction>,
) -> Reply {
    let status = api
        .plugins
        .decide(caller, &format!("{name}@{version}"), body.action)
        .await?;
    Ok(reply::json(StatusCode::OK, &status))
}

#[utoipa::path(get, path = "/v1/plugins/digests/{digest}", operation_id = "get_plugin_digest", tag = "plugins",
    params(("digest" = Digest, Path, description = "SHA-256 of the plugin's bytes.")),
    responses((status = 200, description = "The plugin.", body = PluginStatus)))]
async fn get_plugin_digest(State(api): State<Api>, Path(digest): Path<Digest>) -> Reply {
    Ok(reply::json(
        StatusCode::OK,
        &api.plugins.get(&digest.to_string())?,
    ))
}

#[utoipa::path(post, path = "/v1/plugins/digests/{digest}/revoke", operation_id = "revoke_plugin", tag = "plugins",
    params(("digest" = Digest, Path, description = "SHA-256 of the plugin's bytes.")),
    responses((status = 200, description = "Never called again; running orders that need it block.", body = PluginStatus)))]
async fn revoke_plugin(
    State(api): State<Api>,
    caller: Caller,
    Path(digest): Path<Digest>,
) -> Reply {
    let status = api
        .plugins
        .decide(caller, &digest.to_string(), Decision::Revoke)
        .await?;
    Ok(reply::json(StatusCode::OK, &status))
}

#[utoipa::path(post, path = "/v1/plugins/digests/{digest}/reinstate", operation_id = "reinstate_plugin", tag = "plugins",
    params(("digest" = Digest, Path, description = "SHA-256 of the plugin's bytes.")),
    responses((status = 200, description = "It can be called again.", body = PluginStatus)))]
async fn reinstate_plugin(
    State(api): State<Api>,
    caller: Caller,
    Path(digest): Path<Digest>,
) -> Reply {
    let status = api
        .plugins
        .decide(caller, &digest.to_string(), Decision::Reinstate)
        .await?;
    Ok(reply::json(StatusCode::OK, &status))
}
