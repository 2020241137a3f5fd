//! `/v1/workspaces/{ws}/notification-channels` and `…/notification-deliveries`: who is told of orders, and what became of it.

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
};
use serde::Deserialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    id::{ChannelId, DeliveryId, OrderId},
    notification::{Channel, Delivery, DeliveryState},
};

use super::{
    Api,
    extract::{IfMatch, Json, PageLimits, Path, Query, page_of},
    reply::{self, Page, Reply},
    tokens::ListQuery,
    workspaces::Confirm,
};
use crate::service::{
    Caller,
    notifications::{CreateChannel, DeliveryFilter, UpdateChannel},
};

const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 100,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(
            create_notification_channel,
            list_notification_channels
        ))
        .routes(routes!(
            get_notification_channel,
            update_notification_channel,
            delete_notification_channel
        ))
        .routes(routes!(test_notification_channel))
        .routes(routes!(list_deliveries))
        .routes(routes!(get_delivery))
        .routes(routes!(resend_delivery))
}

/// Which deliveries.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListDeliveries {
    /// Only of this channel.
    channel: Option<ChannelId>,
    /// Only of this order.
    order: Option<OrderId>,
    /// Only in this state.
    state: Option<DeliveryState>,
    /// Entries of the page: 1 to 100, 10 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/notification-channels", operation_id = "create_notification_channel", tag = "notifications",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    request_body = CreateChannel, responses((status = 201, description = "Made.", body = Channel)))]
async fn create_notification_channel(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Json(body): Json<CreateChannel>,
) -> Reply {
    let made = api.notifications.create(caller, &ws, body).await?;
    Ok(reply::created(
        &format!("/v1/workspaces/{ws}/notification-channels/{}", made.0.id),
        made,
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/notification-channels", operation_id = "list_notification_channels", tag = "notifications",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListQuery),
    responses((status = 200, description = "Oldest first.", body = Page<Channel>)))]
async fn list_notification_channels(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListQuery>,
) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    Ok(reply::page(api.notifications.channels(&ws, page).await?))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/notification-channels/{id}", operation_id = "get_notification_channel", tag = "notifications",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = ChannelId, Path, description = "The channel's id.")),
    responses((status = 200, description = "The channel.", body = Channel)))]
async fn get_notification_channel(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, ChannelId)>,
    headers: HeaderMap,
) -> Reply {
    Ok(reply::found_unless(
        &headers,
        api.notifications.channel(&ws, id).await?,
    ))
}

#[utoipa::path(put, path = "/v1/workspaces/{ws}/notification-channels/{id}", operation_id = "update_notification_channel", tag = "notifications",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = ChannelId, Path, description = "The channel's id.")),
    request_body = UpdateChannel, responses((status = 200, description = "Changed; what is not given stays.", body = Channel)))]
async fn update_notification_channel(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, ChannelId)>,
    if_match: IfMatch,
    Json(body): Json<UpdateChannel>,
) -> Reply {
    Ok(reply::found(
        api.notifications
            .update(caller, &ws, id, if_match.0, body)
            .await?,
    ))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/notification-channels/{id}", operation_id = "delete_notification_channel", tag = "notifications",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = ChannelId, Path, description = "The channel's id."), Confirm),
    responses((status = 204, description = "Deleted; what waits to be sent to it is given up.")))]
async fn delete_notification_channel(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, ChannelId)>,
    Query(query): Query<Confirm>,
) -> Reply {
    api.notifications
        .delete(caller, &ws, id, &query.confirm)
        .await?;
    Ok(reply::nothing())
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/notification-channels/{id}/test", operation_id = "test_notification_channel", tag = "notifications",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = ChannelId, Path, description = "The channel's id.")),
    responses((status = 202, description = "A test message is on its way, once; its delivery says how it went.", body = Delivery)))]
async fn test_notification_channel(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, ChannelId)>,
) -> Reply {
    let (delivery, _) = api.notifications.test(caller, &ws, id).await?;
    Ok(reply::json(StatusCode::ACCEPTED, &delivery))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/notification-deliveries", operation_id = "list_deliveries", tag = "notifications",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListDeliveries),
    responses((status = 200, description = "Newest first, each with its last attempts.", body = Page<Delivery>)))]
async fn list_deliveries(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListDeliveries>,
) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let filter = DeliveryFilter {
        channel: query.channel,
        order: query.order,
        state: query.state,
    };
    Ok(reply::page(
        api.notifications.deliveries(&ws, &filter, page).await?,
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/notification-deliveries/{id}", operation_id = "get_delivery", tag = "notifications",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = DeliveryId, Path, description = "The delivery's id.")),
    responses((status = 200, description = "The delivery with its last attempts.", body = Delivery)))]
async fn get_delivery(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, DeliveryId)>,
    headers: HeaderMap,
) -> Reply {
    Ok(reply::found_unless(
        &headers,
        api.notifications.delivery(&ws, id).await?,
    ))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/notification-deliveries/{id}/resend", operation_id = "resend_delivery", tag = "notifications",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = DeliveryId, Path, description = "The delivery's id.")),
    responses((status = 202, description = "It is sent again, now, with as many attempts as at first.", body = Delivery)))]
async fn resend_delivery(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, DeliveryId)>,
) -> Reply {
    let (delivery, _) = api.notifications.send_again(caller, &ws, id).await?;
    Ok(reply::json(StatusCode::ACCEPTED, &delivery))
}
