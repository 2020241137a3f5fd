//! `/v1/tokens`: a token stands for a caller. Its text is shown once, when it is made.

use axum::{extract::State, http::HeaderMap};
use serde::{Deserialize, Serialize};
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::id::TokenId;

use super::{
    Api,
    extract::{Json, PageLimits, Path, Query, page_of},
    reply::{self, Page, Reply},
};
use crate::service::{
    Caller, PageOf,
    tokens::{CreateToken, TokenView},
};

const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 100,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_token, list_tokens))
        .routes(routes!(get_token, revoke_token))
}

/// Which page.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    /// Entries of the page: 1 to 100, 10 unless given.
    pub(super) page_size: Option<usize>,
    /// `next_cursor` of the page before.
    pub(super) cursor: Option<String>,
}

/// A token that was just made.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
struct MadeToken {
    #[serde(flatten)]
    view: TokenView,
    /// The token: shown now and never again.
    token: String,
}

#[utoipa::path(post, path = "/v1/tokens", operation_id = "create_token", tag = "tokens", request_body = CreateToken,
    responses((status = 201, description = "Made. A repetition with the same idempotency key does not show the token again.", body = MadeToken)))]
async fn create_token(
    State(api): State<Api>,
    caller: Caller,
    Json(body): Json<CreateToken>,
) -> Reply {
    let (new, revision) = api.tokens.create(caller, body).await?;
    let made = MadeToken {
        view: TokenView::from(&new.record),
        token: new.token,
    };
    let location = format!("/v1/tokens/{}", made.view.id);
    Ok(reply::shown_once(reply::created(
        &location,
        (made, revision),
    )))
}

#[utoipa::path(get, path = "/v1/tokens", operation_id = "list_tokens", tag = "tokens",
    params(ListQuery), responses((status = 200, description = "Oldest first.", body = Page<TokenView>)))]
async fn list_tokens(State(api): State<Api>, Query(query): Query<ListQuery>) -> Reply {
    let found = api
        .tokens
        .list(page_of(query.page_size, query.cursor, PAGES)?)
        .await?;
    let items = found
        .items
        .iter()
        .map(|(token, revision)| (TokenView::from(token), *revision))
        .collect();
    Ok(reply::page(PageOf {
        items,
        next: found.next,
    }))
}

#[utoipa::path(get, path = "/v1/tokens/{id}", operation_id = "get_token", tag = "tokens",
    params(("id" = TokenId, Path, description = "The token's id.")),
    responses((status = 200, description = "What may be seen of it.", body = TokenView)))]
async fn get_token(State(api): State<Api>, Path(id): Path<TokenId>, headers: HeaderMap) -> Reply {
    let (token, revision) = api.tokens.get(id).await?;
    Ok(reply::found_unless(
        &headers,
        (TokenView::from(&token), revision),
    ))
}

#[utoipa::path(delete, path = "/v1/tokens/{id}", operation_id = "revoke_token", tag = "tokens",
    params(("id" = TokenId, Path, description = "The token's id.")),
    responses((status = 204, description = "Revoked: streams that were opened with it end.")))]
async fn revoke_token(State(api): State<Api>, caller: Caller, Path(id): Path<TokenId>) -> Reply {
    api.tokens.revoke(caller, id).await?;
    Ok(reply::nothing())
}
