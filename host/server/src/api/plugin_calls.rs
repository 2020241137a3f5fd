//! `/v1/plugin-calls`: recorded calls of plugins, made again or given away; `/v1/plugin-events`.

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::IntoResponse as _,
};
use serde::{Deserialize, Serialize};
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{Timestamp, id::CallId};
use windlass_runtime::{
    Export,
    journal::{CallFilter, CallSummary, JournalState, JournaledCall},
    replay::Replayed,
};

use super::{
    Api,
    extract::{Json, PageLimits, Path, Query, page_of},
    problem::Problem,
    reply::{self, Page, Reply},
};
use crate::service::{Caller, plugin_calls::EXPORT_MAX_CALLS, plugin_events::PluginEvent};

const PAGES: PageLimits = PageLimits {
    default: 50,
    max: 200,
};
/// Calls of an export unless told.
const EXPORT_CALLS: usize = 1000;

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list_plugin_calls))
        .routes(routes!(export_plugin_calls))
        .routes(routes!(get_plugin_call_journal))
        .routes(routes!(get_plugin_call))
        .routes(routes!(replay_plugin_call))
        .routes(routes!(list_plugin_events))
}

/// Which calls.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListCalls {
    /// Of the plugin with this name.
    plugin: Option<String>,
    /// Of this version.
    #[param(value_type = Option<String>)]
    version: Option<semver::Version>,
    /// Of this function.
    export: Option<Export>,
    /// That ended so: `ok`, `failed`, or the code of a failure, for example `plugin_trap`.
    outcome: Option<String>,
    /// For this order.
    order: Option<String>,
    /// That ended then or later.
    from: Option<Timestamp>,
    /// That ended before.
    to: Option<Timestamp>,
    /// Entries of the page: 1 to 200, 50 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before. A page may have fewer entries than asked for although there is a next one.
    cursor: Option<String>,
}

/// Which calls are given away.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ExportCalls {
    /// Of the plugin with this name.
    plugin: Option<String>,
    /// Of this version.
    #[param(value_type = Option<String>)]
    version: Option<semver::Version>,
    /// Of this function.
    export: Option<Export>,
    /// That ended so.
    outcome: Option<String>,
    /// For this order.
    order: Option<String>,
    /// That ended then or later.
    from: Option<Timestamp>,
    /// That ended before.
    to: Option<Timestamp>,
    /// So many of the newest: at most 100,000, 1,000 unless given.
    last: Option<usize>,
}

/// With what a call is made again.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct ReplayCall {
    /// With this version of the plugin; absent: with the very bytes that it was made with.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    version: Option<semver::Version>,
}

/// Which events.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListEvents {
    /// Entries of the page: 1 to 200, 50 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[utoipa::path(get, path = "/v1/plugin-calls", operation_id = "list_plugin_calls", tag = "plugin-calls", params(ListCalls),
    responses((status = 200, description = "Recorded calls, newest first, without what went in and out.", body = Page<CallSummary>)))]
async fn list_plugin_calls(State(api): State<Api>, Query(query): Query<ListCalls>) -> Reply {
    let filter = CallFilter {
        plugin: query.plugin,
        version: query.version,
        digest: None,
        export: query.export,
        outcome: query.outcome,
        order: query.order,
        from: query.from,
        to: query.to,
    };
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let found = api.plugin_calls.list(filter, page).await?;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items: found.items,
            next_cursor: found.next,
        },
    ))
}

#[utoipa::path(get, path = "/v1/plugin-calls/export", operation_id = "export_plugin_calls", tag = "plugin-calls", params(ExportCalls),
    responses((status = 200, description = "Recorded calls, newest first, one JSON document a line: for `windlass plugin replay`.", content_type = "application/x-ndjson", body = JournaledCall)))]
async fn export_plugin_calls(State(api): State<Api>, Query(query): Query<ExportCalls>) -> Reply {
    let filter = CallFilter {
        plugin: query.plugin,
        version: query.version,
        digest: None,
        export: query.export,
        outcome: query.outcome,
        order: query.order,
        from: query.from,
        to: query.to,
    };
    let last = query.last.unwrap_or(EXPORT_CALLS);
    if last == 0 || last > EXPORT_MAX_CALLS {
        return Err(Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "out_of_limit",
            format!("an export has 1 to {EXPORT_MAX_CALLS} calls, {last} were asked for"),
        )
        .field("last")
        .limit(EXPORT_MAX_CALLS as u64, last as u64)
        .mend("ask for fewer calls, or narrow the time with `from` and `to`"));
    }
    let lines = api.plugin_calls.export(filter, last).await;
    let stream = futures_util::stream::unfold(lines, |mut lines| async {
        let line = lines.recv().await?;
        let line = line
            .map(|mut line| {
                line.push(b'\n');
                line
            })
            .map_err(std::io::Error::other);
        Some((line, lines))
    });
    let mut headers = HeaderMap::new();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/x-ndjson"),
    );
    Ok((headers, Body::from_stream(stream)).into_response())
}

#[utoipa::path(get, path = "/v1/plugin-calls/journal", operation_id = "get_plugin_call_journal", tag = "plugin-calls",
    responses((status = 200, description = "What the journal holds and what it lost.", body = JournalState)))]
async fn get_plugin_call_journal(State(api): State<Api>) -> Reply {
    Ok(reply::json(StatusCode::OK, &api.plugin_calls.state()))
}

#[utoipa::path(get, path = "/v1/plugin-calls/{id}", operation_id = "get_plugin_call", tag = "plugin-calls",
    params(("id" = CallId, Path, description = "The call's id.")),
    responses((status = 200, description = "The call, with what went in and out. Secrets are references.", body = JournaledCall)))]
async fn get_plugin_call(State(api): State<Api>, Path(id): Path<CallId>) -> Reply {
    Ok(reply::json(
        StatusCode::OK,
        &api.plugin_calls.get(id).await?,
    ))
}

#[utoipa::path(post, path = "/v1/plugin-calls/{id}/replay", operation_id = "replay_plugin_call", tag = "plugin-calls",
    params(("id" = CallId, Path, description = "The call's id.")),
    request_body = ReplayCall,
    responses((status = 200, description = "The call, made again: host calls are answered from the record. The same bytes give the same answer.", body = Replayed)))]
async fn replay_plugin_call(
    State(api): State<Api>,
    _caller: Caller,
    Path(id): Path<CallId>,
    Json(body): Json<ReplayCall>,
) -> Reply {
    let replayed = api.plugin_calls.replay(id, body.version.as_ref()).await?;
    Ok(reply::json(StatusCode::OK, &replayed))
}

#[utoipa::path(get, path = "/v1/plugin-events", operation_id = "list_plugin_events", tag = "plugins", params(ListEvents),
    responses((status = 200, description = "What happened to plugins, newest first: failing versions, comparisons, promotions.", body = Page<PluginEvent>)))]
async fn list_plugin_events(State(api): State<Api>, Query(query): Query<ListEvents>) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let found = api.plugin_events.list(&page).await?;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items: found.items,
            next_cursor: found.next,
        },
    ))
}
