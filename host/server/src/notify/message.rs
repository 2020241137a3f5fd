//! What a notification says: as JSON for programs, as text for people. Source: spec "Payload", "Notifications".

use serde::Serialize;
use windlass_domain::{
    Timestamp,
    notification::{Delivery, Moment, OrderNotice, Severity},
};

/// One message, ready for any kind of channel.
pub(crate) struct Message {
    /// The delivery's id: receivers know a repetition by it.
    pub(crate) id: String,
    /// What happened.
    pub(crate) moment: Moment,
    /// The resource: the order's id, the channel's for a test.
    pub(crate) resource: String,
    /// One line.
    pub(crate) title: String,
    /// More lines: name and value.
    pub(crate) facts: Vec<(&'static str, String)>,
    /// The workspace.
    pub(crate) workspace: String,
    /// The document.
    pub(crate) json: String,
}

/// The document that webhooks get.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Payload<'a> {
    ver: &'static str,
    id: &'a str,
    product: &'static str,
    resource_id: &'a str,
    level: Severity,
    name: String,
    user_id: &'a str,
    event_time: Timestamp,
    region_id: &'a str,
    content: Content<'a>,
}

#[derive(Serialize)]
struct Content<'a> {
    workspace: &'a str,
    channel: &'a str,
    moment: Moment,
    title: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    order: Option<&'a OrderNotice>,
}

impl Message {
    pub(crate) fn of(delivery: &Delivery, region: &str) -> Self {
        let id = delivery.id.to_string();
        let workspace = delivery.workspace.to_string();
        let moment = delivery.notice.moment;
        let order = delivery.notice.order.as_ref();
        let (resource, title, user) = match order {
            Some(order) => (
                order.id.to_string(),
                format!("{}: {}", one_line(&order.title), told(moment)),
                order.created_by.as_str(),
            ),
            None => (
                delivery.channel.to_string(),
                format!("this is a test of the channel {}", delivery.channel_name),
                "",
            ),
        };
        let payload = Payload {
            ver: "1.0",
            id: &id,
            product: "windlass",
            resource_id: &resource,
            level: moment.level(),
            name: match order {
                Some(_) => format!("order.{}", moment.code()),
                None => "channel.test".to_owned(),
            },
            user_id: user,
            event_time: delivery.notice.at,
            region_id: region,
            content: Content {
                workspace: &workspace,
                channel: delivery.channel_name.as_str(),
                moment,
                title: &title,
                order,
            },
        };
        let json = serde_json::to_string(&payload).expect("a payload has string keys");
        let facts = facts(&workspace, order, delivery.notice.at);
        Self {
            id,
            moment,
            resource,
            title,
            facts,
            workspace,
            json,
        }
    }
}

fn facts(
    workspace: &str,
    order: Option<&OrderNotice>,
    at: Timestamp,
) -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("workspace", workspace.to_owned()),
        ("time", at.to_string()),
    ];
    let Some(order) = order else { return facts };
    facts.push(("order", order.id.to_string()));
    if let Some(of) = order.rollback_of {
        facts.push(("rolls back", of.to_string()));
    }
    if !order.reason.is_empty() {
        facts.push(("reason", one_line(&order.reason)));
    }
    let counts = &order.counts;
    facts.push((
        "servers",
        format!(
            "{} of {} done, {} failed",
            counts.succeeded, order.server_count, counts.failed
        ),
    ));
    if !order.strategy.is_empty() {
        facts.push(("strategy", order.strategy.clone()));
    }
    facts.push(("made by", order.created_by.clone()));
    facts
}

/// In the words of a sentence about an order.
fn told(moment: Moment) -> &'static str {
    match moment {
        Moment::Started => "started",
        Moment::Waiting => "waits for confirmation",
        Moment::Blocked => "is blocked, somebody has to act",
        Moment::Succeeded => "succeeded",
        Moment::Failed => "failed",
        Moment::Cancelled => "was cancelled",
        Moment::RollingBack => "is being rolled back",
        Moment::RolledBack => "was rolled back",
        Moment::Test => "is a test",
    }
}

/// A text without line breaks and other control characters.
fn one_line(text: &str) -> String {
    let cut: String = text.chars().take(500).collect();
    cut.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
