//! `/v1/workspaces/{ws}/orders`: preview, make, look at, act on, follow.
//!
//! Events are a stream of server-sent events (`id` = sequence number, `event` = what happened, `data` = the event as JSON),
//! resumed with `Last-Event-ID` or `?after=`. The stream ends with the event `end` when the order has ended and
//! everything was sent, and without it when the token was revoked or expired, or the server stops: then come back with the
//! last id. Every 15 s without an event a comment is sent.

use axum::{
    Extension,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    Digest, Timestamp,
    id::{AppId, InstanceId, OrderId},
    order::{Action, Happened, Order, OrderEvent, OrderState, ReleaseSpec},
    progress::NodeProgress,
};

use super::{
    Api,
    extract::{Json, PageLimits, Path, Query, page_of, read},
    problem::Problem,
    reply::{self, Page, Reply},
    stream::{self, KEEP_ALIVE},
};
use crate::service::{
    Caller, PageOf, ServiceError,
    orders::{CreateOrder, NodeView, OrderFilter, PlanView, PurposeKind},
    tokens::Authenticated,
};

const PAGES: PageLimits = PageLimits {
    default: 20,
    max: 100,
};
/// Events read at a time.
const EVENTS_AT_ONCE: usize = 200;

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_order, list_orders))
        .routes(routes!(preview_order))
        .routes(routes!(get_order))
        .routes(routes!(list_order_nodes))
        .routes(routes!(get_order_node))
        .routes(routes!(get_order_plan))
        .routes(routes!(act_on_order))
        .routes(routes!(watch_order_events))
}

/// Which orders.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListOrders {
    /// Only in this state.
    state: Option<OrderState>,
    /// Only for this: `release`, `rollback` or `operation`.
    purpose: Option<PurposeKind>,
    /// Only with this strategy: `name`, or `name@version`.
    strategy: Option<String>,
    /// Only with this in their title or their maker's name, whatever its case.
    text: Option<String>,
    /// Only made at this time or later (RFC 3339).
    made_after: Option<Timestamp>,
    /// Only made before this time (RFC 3339).
    made_before: Option<Timestamp>,
    /// Only with this application, by name or id.
    app: Option<String>,
    /// Only with this service instance.
    instance: Option<InstanceId>,
    /// Entries of the page: 1 to 100, 20 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

/// From where to follow.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct WatchEvents {
    /// Only events after this sequence number; `Last-Event-ID` goes before it.
    after: Option<u64>,
}

/// An action as a request names it. Where an action has no fields of its own, serde passes over what stands beside its name:
/// here it is refused.
struct AskedAction(Action);

impl<'de> Deserialize<'de> for AskedAction {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        let fields = serde_json::Map::deserialize(deserializer)?;
        let action = Action::deserialize(serde_json::Value::Object(fields.clone()))
            .map_err(D::Error::custom)?;
        let known = serde_json::to_value(&action).map_err(D::Error::custom)?;
        match fields
            .keys()
            .find(|name| known.get(name.as_str()).is_none())
        {
            None => Ok(Self(action)),
            Some(name) => Err(D::Error::custom(format!(
                "unknown field `{name}` of this action"
            ))),
        }
    }
}

/// The order that a body asks for. Flattening and refusing unknown fields do not go together in serde: what stands beside the
/// release is taken out first, and the rest read as `preview` reads it, so that both name the same field when they refuse.
fn asked_order(
    mut fields: serde_json::Map<String, serde_json::Value>,
) -> Result<CreateOrder, Problem> {
    let mut own = serde_json::Map::new();
    for name in ["plan_digest", "run"] {
        own.extend(fields.remove_entry(name));
    }
    /// The fields of [`CreateOrder`] beside the release.
    #[derive(Deserialize)]
    struct Beside {
        plan_digest: Option<Digest>,
        #[serde(default)]
        run: bool,
    }
    let Beside { plan_digest, run } = read(serde_json::Value::Object(own))?;
    Ok(CreateOrder {
        release: read(serde_json::Value::Object(fields))?,
        plan_digest,
        run,
    })
}

/// One node with everything that is kept of it.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
struct NodeDetails {
    /// As in the list.
    #[serde(flatten)]
    view: NodeView,
    /// Its row: a step's outcome and output among it.
    progress: NodeProgress,
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/orders/preview", operation_id = "preview_order", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier.")), request_body = ReleaseSpec,
    responses((status = 200, description = "The complete plan; nothing is done. It is kept for a day: make an order with its digest.", body = PlanView)))]
async fn preview_order(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Json(body): Json<ReleaseSpec>,
) -> Reply {
    Ok(reply::json(
        StatusCode::OK,
        &api.orders.preview(&ws, body).await?,
    ))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/orders", operation_id = "create_order", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier.")), request_body = CreateOrder,
    responses((status = 201, description = "Made; it runs once somebody runs it, or at once with `run`.", body = Order)))]
async fn create_order(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Json(fields): Json<serde_json::Map<String, serde_json::Value>>,
) -> Reply {
    let order = api.orders.create(caller, &ws, asked_order(fields)?).await?;
    let location = format!("/v1/workspaces/{ws}/orders/{}", order.id);
    Ok(reply::made(&location, &order))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders", operation_id = "list_orders", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListOrders),
    responses((status = 200, description = "Newest first.", body = Page<Order>)))]
async fn list_orders(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListOrders>,
) -> Reply {
    api.workspaces.get(&ws).await?;
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let filter = OrderFilter {
        state: query.state,
        purpose: query.purpose,
        strategy: query.strategy,
        text: query.text,
        made_after: query.made_after,
        made_before: query.made_before,
        application: match query.app {
            None => None,
            Some(app) => Some(application(&api, app).await?),
        },
        instance: query.instance,
    };
    let PageOf { items, next } = api.orders.list(&ws, &filter, &page).await?;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items,
            next_cursor: next,
        },
    ))
}

/// The name of an application that is named by name or id. A deleted one is known by its name alone.
async fn application(api: &Api, named: String) -> Result<String, Problem> {
    if named.parse::<AppId>().is_err() {
        return Ok(named);
    }
    let (app, _) = api.apps.get(&named).await?;
    Ok(app.name.to_string())
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders/{id}", operation_id = "get_order", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id.")),
    responses((status = 200, description = "Its header.", body = Order)))]
async fn get_order(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, OrderId)>,
    headers: HeaderMap,
) -> Reply {
    Ok(reply::found_unless(
        &headers,
        api.orders.get(&ws, id).await?,
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders/{id}/nodes", operation_id = "list_order_nodes", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id.")),
    responses((status = 200, description = "Every node with its state, on one page, parents before children.", body = Page<NodeView>)))]
async fn list_order_nodes(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, OrderId)>,
) -> Reply {
    let items = api.orders.nodes(&ws, id).await?;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items,
            next_cursor: None,
        },
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders/{id}/nodes/{node}", operation_id = "get_order_node", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id."), ("node" = u32, Path, description = "The node's index.")),
    responses((status = 200, description = "The node, a step's output included.", body = NodeDetails)))]
async fn get_order_node(
    State(api): State<Api>,
    Path((ws, id, node)): Path<(String, OrderId, u32)>,
) -> Reply {
    let (view, progress) = api.orders.node(&ws, id, node).await?;
    Ok(reply::json(StatusCode::OK, &NodeDetails { view, progress }))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders/{id}/plan", operation_id = "get_order_plan", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id.")),
    responses((status = 200, description = "The plan that it runs.", body = PlanView)))]
async fn get_order_plan(State(api): State<Api>, Path((ws, id)): Path<(String, OrderId)>) -> Reply {
    Ok(reply::json(
        StatusCode::OK,
        &api.orders.plan(&ws, id).await?,
    ))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/orders/{id}/actions", operation_id = "act_on_order", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id.")),
    request_body = Action, responses((status = 200, description = "Done, durably: the header after it. A rollback of an ended order answers the new order.", body = Order)))]
async fn act_on_order(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, OrderId)>,
    Json(AskedAction(body)): Json<AskedAction>,
) -> Reply {
    Ok(reply::json(
        StatusCode::OK,
        &api.orders.act(caller, &ws, id, body).await?,
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/orders/{id}/events", operation_id = "watch_order_events", tag = "orders",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = OrderId, Path, description = "The order's id."), WatchEvents,
        ("Last-Event-ID" = Option<u64>, Header, description = "The last event that is known.")),
    responses((status = 200, description = "Server-sent events; `data` is an OrderEvent. Ends after the order's end, or when the token ends.", content_type = "text/event-stream", body = OrderEvent)))]
async fn watch_order_events(
    State(api): State<Api>,
    Extension(known): Extension<Authenticated>,
    Path((ws, id)): Path<(String, OrderId)>,
    Query(query): Query<WatchEvents>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let after = stream::last_event_id(&headers)?
        .or(query.after)
        .unwrap_or(0);
    api.orders.get(&ws, id).await?;
    let source = api.clone();
    Ok(stream::respond(&api, known, move |sender| async move {
        if let Err(error) = follow(&source, &ws, id, after, &sender).await {
            tracing::warn!(order.id = %id, error = &error as &dyn std::error::Error, "a stream of events ended early");
        }
    }))
}

/// Sends events until the order has ended and everything was sent. Returns early when nobody listens.
async fn follow(
    api: &Api,
    ws: &str,
    id: OrderId,
    mut after: u64,
    sender: &mpsc::Sender<Bytes>,
) -> Result<(), ServiceError> {
    loop {
        // Taken before reading, so that no event falls between the two.
        let mut watch = api.orders.watch(id).await?;
        loop {
            let (order, _) = api.orders.get(ws, id).await?;
            let events = api.orders.events(ws, id, after, EVENTS_AT_ONCE).await?;
            if !events.is_empty() {
                after = events.last().map_or(after, |event| event.seq);
                if sender
                    .send(events.iter().map(frame).collect::<String>().into())
                    .await
                    .is_err()
                {
                    return Ok(());
                }
                continue;
            }
            if order.state.is_terminal() && after >= order.last_event {
                drop(
                    sender
                        .send(format!("id: {after}\nevent: end\ndata: {{}}\n\n").into())
                        .await,
                );
                return Ok(());
            }
            match tokio::time::timeout(KEEP_ALIVE, watch.next()).await {
                Ok(Ok(_)) => {}
                // Too far behind, or the store closes: a new watch, or the error of it, tells.
                Ok(Err(_)) => break,
                Err(_) => {
                    if sender.send(stream::COMMENT).await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
    }
}

fn frame(event: &OrderEvent) -> String {
    let name = match &event.what {
        Happened::Order { .. } => "order",
        Happened::Node { .. } => "node",
        Happened::Action { .. } => "action",
        Happened::Traffic { .. } => "traffic",
        Happened::Revised { .. } => "revised",
    };
    let data = serde_json::to_string(event).expect("events have string keys");
    format!("id: {}\nevent: {name}\ndata: {data}\n\n", event.seq)
}
