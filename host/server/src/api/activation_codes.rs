//! `/v1/workspaces/{ws}/activation-codes`: what a server joins a workspace with. A code is shown once, when it is made.

use axum::{extract::State, http::HeaderMap};
use serde::Serialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::id::ActivationCodeId;

use super::{
    Api,
    extract::{IfMatch, Json, PageLimits, Path, Query, page_of},
    reply::{self, Page, Reply},
    tokens::ListQuery,
};
use crate::service::{
    Caller, PageOf,
    activation_codes::{ActivationCodeView, CreateActivationCode},
};

const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 100,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_activation_code, list_activation_codes))
        .routes(routes!(get_activation_code, delete_activation_code))
        .routes(routes!(disable_activation_code))
}

/// An activation code that was just made.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
struct MadeActivationCode {
    #[serde(flatten)]
    view: ActivationCodeView,
    /// The code: shown now and never again.
    code: String,
    /// How a server joins with it.
    command: String,
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/activation-codes", operation_id = "create_activation_code", tag = "activation-codes",
    params(("ws" = String, Path, description = "The workspace's identifier.")), request_body = CreateActivationCode,
    responses((status = 201, description = "Made. A repetition with the same idempotency key does not show the code again.", body = MadeActivationCode)))]
async fn create_activation_code(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Json(body): Json<CreateActivationCode>,
) -> Reply {
    let (new, revision) = api.activation_codes.create(caller, &ws, body).await?;
    let code = new.code.print();
    let view = ActivationCodeView::from(&new.record);
    let location = format!("/v1/workspaces/{ws}/activation-codes/{}", view.id);
    let command = format!(
        "WINDLASS_ACTIVATION_CODE={code} windlass-agent register --server {} --data /var/lib/windlass-agent",
        api.agent_address
    );
    Ok(reply::shown_once(reply::created(
        &location,
        (
            MadeActivationCode {
                view,
                code,
                command,
            },
            revision,
        ),
    )))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/activation-codes", operation_id = "list_activation_codes", tag = "activation-codes",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListQuery),
    responses((status = 200, description = "Newest first.", body = Page<ActivationCodeView>)))]
async fn list_activation_codes(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListQuery>,
) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let found = api.activation_codes.list(&ws, page).await?;
    let items = found
        .items
        .iter()
        .map(|(code, revision)| (ActivationCodeView::from(code), *revision))
        .collect();
    Ok(reply::page(PageOf {
        items,
        next: found.next,
    }))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/activation-codes/{id}", operation_id = "get_activation_code", tag = "activation-codes",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = ActivationCodeId, Path, description = "The code's id.")),
    responses((status = 200, description = "What may be seen of it.", body = ActivationCodeView)))]
async fn get_activation_code(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, ActivationCodeId)>,
    headers: HeaderMap,
) -> Reply {
    let (code, revision) = api.activation_codes.get(&ws, id).await?;
    Ok(reply::found_unless(
        &headers,
        (ActivationCodeView::from(&code), revision),
    ))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/activation-codes/{id}/disable", operation_id = "disable_activation_code", tag = "activation-codes",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = ActivationCodeId, Path, description = "The code's id.")),
    responses((status = 200, description = "Unusable from now on.", body = ActivationCodeView)))]
async fn disable_activation_code(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, ActivationCodeId)>,
    if_match: IfMatch,
) -> Reply {
    let (code, revision) = api
        .activation_codes
        .disable(caller, &ws, id, if_match.0)
        .await?;
    Ok(reply::found((ActivationCodeView::from(&code), revision)))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/activation-codes/{id}", operation_id = "delete_activation_code", tag = "activation-codes",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = ActivationCodeId, Path, description = "The code's id.")),
    responses((status = 204, description = "Deleted; servers that came with it stay.")))]
async fn delete_activation_code(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, ActivationCodeId)>,
) -> Reply {
    api.activation_codes.delete(caller, &ws, id).await?;
    Ok(reply::nothing())
}
