//! `/v1/events`: system events, what happened to servers and certificates without anybody asking for it.

use axum::{extract::State, http::StatusCode};
use serde::Deserialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::id::ServerId;

use super::{
    Api,
    extract::{PageLimits, Query, page_of},
    reply::{self, Page, Reply},
};
use crate::{
    gateway::events::{EventKind, EventLevel, SystemEvent},
    service::events::EventFilter,
};

const PAGES: PageLimits = PageLimits {
    default: 50,
    max: 200,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(list_events))
}

/// Which events.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListSystemEvents {
    /// Only on this server.
    server: Option<ServerId>,
    /// Only of this kind.
    kind: Option<EventKind>,
    /// Only of this level.
    level: Option<EventLevel>,
    /// Entries of the page: 1 to 200, 50 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[utoipa::path(get, path = "/v1/events", operation_id = "list_events", tag = "events", params(ListSystemEvents),
    responses((status = 200, description = "System events, newest first. The newest 1,000 are kept, and all of 7 days up to 10,000.", body = Page<SystemEvent>)))]
async fn list_events(State(api): State<Api>, Query(query): Query<ListSystemEvents>) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let filter = EventFilter {
        server: query.server,
        kind: query.kind,
        level: query.level,
    };
    let found = api.events.list(&filter, &page).await?;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items: found.items,
            next_cursor: found.next,
        },
    ))
}
