//! `/v1/workspaces/{ws}/secrets`: values that plans only refer to. They can be set and deleted, and never be read.

use axum::{extract::State, http::StatusCode};
use serde::Deserialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_protocol::SecretText;
use windlass_store::Txn;

use super::{
    Api,
    extract::{Json, Path},
    reply::{self, Page, Reply},
};
use crate::{gateway::secrets::SecretInfo, service::ServiceError};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list_secrets))
        .routes(routes!(set_secret, delete_secret))
}

/// A secret's new value. `Debug` shows nothing.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct SetSecret {
    /// 1 to 16,384 bytes. Never shown again.
    #[schema(write_only)]
    value: String,
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/secrets", operation_id = "list_secrets", tag = "secrets",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    responses((status = 200, description = "Names of all secrets, on one page; at most 1,000.", body = Page<SecretInfo>)))]
async fn list_secrets(State(api): State<Api>, Path(ws): Path<String>) -> Reply {
    api.workspaces.get(&ws).await?;
    let items = api.secrets.list(&ws).await?;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items,
            next_cursor: None,
        },
    ))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/secrets/{name}", operation_id = "set_secret", tag = "secrets",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("name" = String, Path, description = "The secret's name.")),
    request_body = SetSecret, responses((status = 204, description = "Set; idempotency keys are not needed and not looked at.")))]
async fn set_secret(
    State(api): State<Api>,
    Path((ws, name)): Path<(String, String)>,
    Json(body): Json<SetSecret>,
) -> Reply {
    api.workspaces.get(&ws).await?;
    api.secrets
        .put(&ws, &name, &SecretText::new(body.value), Txn::new())
        .await?;
    Ok(reply::nothing())
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/secrets/{name}", operation_id = "delete_secret", tag = "secrets",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("name" = String, Path, description = "The secret's name.")),
    responses((status = 204, description = "Deleted. Tasks that refer to it fail from now on.")))]
async fn delete_secret(State(api): State<Api>, Path((ws, name)): Path<(String, String)>) -> Reply {
    api.workspaces.get(&ws).await?;
    if api.secrets.delete(&ws, &name).await? {
        Ok(reply::nothing())
    } else {
        Err(ServiceError::not_found("secret", &name).into())
    }
}
