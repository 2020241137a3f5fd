//! Notification channels of workspaces, and what people do with deliveries. Source: spec "Notifications".
//!
//! Owns the records of channels and the checks of their fields; the sending is [`crate::notify`]'s. A channel names secrets, it
//! never holds one.

use std::{collections::BTreeSet, sync::Arc};

use lettre::message::Mailbox;
use reqwest::Url;
use serde::{Deserialize, Serialize};
use windlass_domain::{
    id::{ChannelId, DeliveryId, OrderId},
    name::{ChannelName, check_length},
    notification::{
        Channel, ChannelTarget, Delivery, DeliveryState, DingTalkSecurity, Moment, Notice,
    },
    workspace::Workspace,
};
use windlass_store::{Revision, Store};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    records::{self, Sort},
};
use crate::{
    clock, ids,
    keys::{self, Kind},
    notify,
};

/// Channels of one workspace: a notice becomes a delivery of each with one commit.
pub const MAX_CHANNELS: usize = 30;
/// Receivers of one e-mail channel.
const MAX_RECEIVERS: usize = 50;
/// Longest address, in characters.
const MAX_URL_CHARS: usize = 2000;
/// Attempts of a test message: whoever tries a channel wants to know now.
const TEST_ATTEMPTS: u32 = 1;

/// A channel to be made.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateChannel {
    /// Name: unique in the workspace.
    pub name: ChannelName,
    /// Whether it is told at all. Default: yes.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// What it is told of. Default: everything that orders can come to.
    #[serde(default = "all_moments")]
    pub moments: BTreeSet<Moment>,
    /// Where and how.
    pub target: ChannelTarget,
}

fn yes() -> bool {
    true
}

fn all_moments() -> BTreeSet<Moment> {
    Moment::OF_ORDERS.into()
}

/// A change of a channel; what is not given stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateChannel {
    /// Whether it is told at all.
    #[serde(default)]
    pub enabled: Option<bool>,
    /// What it is told of.
    #[serde(default)]
    pub moments: Option<BTreeSet<Moment>>,
    /// Where and how: all of it.
    #[serde(default)]
    pub target: Option<ChannelTarget>,
}

/// Which deliveries.
#[derive(Debug, Clone, Default)]
pub struct DeliveryFilter {
    /// Only of this channel.
    pub channel: Option<ChannelId>,
    /// Only of this order.
    pub order: Option<OrderId>,
    /// Only in this state.
    pub state: Option<DeliveryState>,
}

/// Channels and deliveries. Cheap to clone.
#[derive(Clone)]
pub struct Notifications {
    store: Arc<dyn Store>,
}

impl Notifications {
    /// Over a store.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// One channel of a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when it is another workspace's.
    pub async fn channel(
        &self,
        ws: &str,
        id: ChannelId,
    ) -> Result<(Channel, Revision), ServiceError> {
        let found = records::get::<Channel>(&*self.store, &id.to_string()).await?;
        if found.0.workspace.as_str() == ws {
            Ok(found)
        } else {
            Err(ServiceError::not_found("notification channel", id))
        }
    }

    /// A page of a workspace's channels, oldest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn channels(
        &self,
        ws: &str,
        page: PageRequest,
    ) -> Result<PageOf<(Channel, Revision)>, ServiceError> {
        records::get::<Workspace>(&*self.store, ws).await?;
        let prefix = keys::all_of_workspace(Kind::Channel, ws);
        records::list(&*self.store, &prefix, Sort::Rising, &page, |_: &Channel| {
            true
        })
        .await
    }

    /// Makes a channel.
    ///
    /// # Errors
    /// `name_taken`; `too_many_channels`; the field that breaks a rule; [`ServiceError::NotFound`] of the workspace.
    pub async fn create(
        &self,
        caller: Caller,
        ws: &str,
        request: CreateChannel,
    ) -> Result<(Channel, Revision), ServiceError> {
        check(&request.target, &request.moments)?;
        let store = &*self.store;
        let id = ChannelId::from_uuid(ids::new_uuid());
        records::change(store, &caller, || async {
            let (workspace, _) = records::get::<Workspace>(store, ws).await?;
            let name_key = keys::name_in_workspace(Kind::Channel, ws, request.name.as_str());
            if records::indexed(store, &name_key).await?.is_some() {
                return Err(ServiceError::taken(
                    "notification channel",
                    "name",
                    request.name.as_str(),
                ));
            }
            // Of two that count at the same time, one counts again.
            let alone = records::touch_exclusively(store, Kind::Channel, ws).await?;
            let of = keys::all_of_workspace(Kind::Channel, ws);
            let found = records::all(store, &of).await?.len();
            if found >= MAX_CHANNELS {
                return Err(ServiceError::Limit {
                    code: "too_many_channels",
                    field: String::new(),
                    message: format!(
                        "the workspace has {found} notification channels, the limit is {MAX_CHANNELS}"
                    ),
                    limit: MAX_CHANNELS as u64,
                    current: found as u64,
                    mend: "delete a channel first".to_owned(),
                });
            }
            let at = clock::now();
            let channel = Channel {
                schema: Channel::SCHEMA,
                id,
                name: request.name.clone(),
                workspace: workspace.name,
                enabled: request.enabled,
                moments: request.moments.clone(),
                target: request.target.clone(),
                created_at: at,
                updated_at: at,
            };
            let text = id.to_string();
            let txn = records::create(&channel)?
                .and(records::refer(Kind::Workspace, ws))
                .and(alone)
                .absent(name_key.clone())
                .put(name_key, text.clone())
                .put(keys::of_workspace(Kind::Channel, ws, &text), "");
            Ok((txn, channel))
        })
        .await
    }

    /// Changes a channel. What waits to be sent goes where the channel points then.
    ///
    /// # Errors
    /// [`ServiceError::Changed`]; the field that breaks a rule; [`ServiceError::NotFound`].
    pub async fn update(
        &self,
        caller: Caller,
        ws: &str,
        id: ChannelId,
        if_match: Option<Revision>,
        change: UpdateChannel,
    ) -> Result<(Channel, Revision), ServiceError> {
        let store = &*self.store;
        records::change(store, &caller, || async {
            let (mut channel, revision) = self.channel(ws, id).await?;
            records::check_revision::<Channel>(if_match, revision)?;
            if let Some(enabled) = change.enabled {
                channel.enabled = enabled;
            }
            if let Some(moments) = &change.moments {
                channel.moments.clone_from(moments);
            }
            if let Some(target) = &change.target {
                channel.target.clone_from(target);
            }
            check(&channel.target, &channel.moments)?;
            channel.updated_at = clock::now();
            Ok((records::replace(&channel, revision)?, channel))
        })
        .await
    }

    /// Deletes a channel; `confirm` is its name. What waits to be sent to it is given up.
    ///
    /// # Errors
    /// `confirmation_missing`; [`ServiceError::NotFound`].
    pub async fn delete(
        &self,
        caller: Caller,
        ws: &str,
        id: ChannelId,
        confirm: &str,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        records::change(store, &caller, || async {
            let (channel, revision) = self.channel(ws, id).await?;
            records::check_confirm("notification channel", confirm, channel.name.as_str())?;
            let txn = records::remove(&channel, revision)
                .delete(keys::name_in_workspace(
                    Kind::Channel,
                    ws,
                    channel.name.as_str(),
                ))
                .delete(keys::of_workspace(Kind::Channel, ws, &id.to_string()));
            Ok((txn, ()))
        })
        .await?;
        Ok(())
    }

    /// Sends a test message through a channel, once; also where the channel is switched off. Answers its delivery, which says
    /// a little later how it went.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn test(
        &self,
        caller: Caller,
        ws: &str,
        id: ChannelId,
    ) -> Result<(Delivery, Revision), ServiceError> {
        let store = &*self.store;
        records::change(store, &caller, || async {
            let (channel, _) = self.channel(ws, id).await?;
            let notice = Notice {
                moment: Moment::Test,
                at: clock::now(),
                order: None,
            };
            let (delivery, txn) = notify::new_delivery(&channel, notice, TEST_ATTEMPTS)?;
            Ok((txn, delivery))
        })
        .await
    }

    /// One delivery of a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when it is another workspace's.
    pub async fn delivery(
        &self,
        ws: &str,
        id: DeliveryId,
    ) -> Result<(Delivery, Revision), ServiceError> {
        let found = records::get::<Delivery>(&*self.store, &id.to_string()).await?;
        if found.0.workspace.as_str() == ws {
            Ok(found)
        } else {
            Err(ServiceError::not_found("delivery", id))
        }
    }

    /// A page of a workspace's deliveries, newest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn deliveries(
        &self,
        ws: &str,
        filter: &DeliveryFilter,
        page: PageRequest,
    ) -> Result<PageOf<(Delivery, Revision)>, ServiceError> {
        records::get::<Workspace>(&*self.store, ws).await?;
        let prefix = keys::all_of_workspace(Kind::Delivery, ws);
        let is = |delivery: &Delivery| {
            let order = delivery.notice.order.as_ref().map(|order| order.id);
            filter.channel.is_none_or(|id| id == delivery.channel)
                && filter.order.is_none_or(|id| Some(id) == order)
                && filter.state.is_none_or(|state| state == delivery.state)
        };
        records::list(&*self.store, &prefix, Sort::Falling, &page, is).await
    }

    /// Sends a delivery again, now.
    ///
    /// # Errors
    /// `channel_gone`; [`ServiceError::NotFound`].
    pub async fn send_again(
        &self,
        caller: Caller,
        ws: &str,
        id: DeliveryId,
    ) -> Result<(Delivery, Revision), ServiceError> {
        let store = &*self.store;
        records::change(store, &caller, || async {
            let (mut delivery, revision) = self.delivery(ws, id).await?;
            let channel = records::find::<Channel>(store, &delivery.channel.to_string()).await?;
            if channel.is_none() {
                return Err(ServiceError::conflict(
                    "channel_gone",
                    format!(
                        "the channel `{}` of this delivery was deleted",
                        delivery.channel_name
                    ),
                    "make a channel and send a test message through it",
                ));
            }
            delivery.send_again(clock::now());
            let txn = records::replace(&delivery, revision)?.and(notify::due_row(&delivery));
            Ok((txn, delivery))
        })
        .await
    }
}

fn check(target: &ChannelTarget, moments: &BTreeSet<Moment>) -> Result<(), ServiceError> {
    if moments.contains(&Moment::Test) {
        return Err(invalid(
            "/moments",
            "`test` is no moment of an order",
            "leave it out: test messages are always sent",
        ));
    }
    if moments.is_empty() {
        return Err(invalid(
            "/moments",
            "a channel that is told of no moment would never send anything",
            "name at least one, or leave `moments` out for all of them; switch the channel off with `enabled`",
        ));
    }
    match target {
        ChannelTarget::Webhook {
            url,
            signing_secret,
            ..
        } => {
            check_url("/target/url", url)?;
            check_secret("/target/signing_secret", signing_secret.as_deref())
        }
        ChannelTarget::DingTalk {
            url,
            access_token_secret,
            security,
        } => {
            let parsed = check_url("/target/url", url)?;
            if parsed.query().is_some() {
                return Err(invalid(
                    "/target/url",
                    "the robot's address must have no query: its access token is a secret",
                    "put the access token into a secret and name that as `access_token_secret`",
                ));
            }
            check_secret("/target/access_token_secret", Some(access_token_secret))?;
            match security {
                DingTalkSecurity::Keyword { keyword } => {
                    check_text("/target/security/keyword", keyword, 100)
                }
                DingTalkSecurity::Sign { secret } => {
                    check_secret("/target/security/secret", Some(secret))
                }
            }
        }
        ChannelTarget::Email {
            server,
            user,
            password_secret,
            certificate_authority,
            from,
            to,
            port,
            ..
        } => {
            check_text("/target/server", server, 253)?;
            if server.contains(['/', ':', '@']) && server.parse::<std::net::IpAddr>().is_err() {
                return Err(invalid(
                    "/target/server",
                    "the mail server is a name or an address, without port or user",
                    "give the port as `port`",
                ));
            }
            if *port == 0 {
                return Err(invalid(
                    "/target/port",
                    "0 is not a port",
                    "give the mail server's port: 587 for STARTTLS, 465 for TLS, mostly",
                ));
            }
            if user.is_some() != password_secret.is_some() {
                return Err(invalid(
                    "/target/password_secret",
                    "`user` and `password_secret` go together",
                    "give both or neither",
                ));
            }
            if let Some(user) = user {
                check_text("/target/user", user, 320)?;
            }
            check_secret("/target/password_secret", password_secret.as_deref())?;
            if let Some(pem) = certificate_authority
                && (pem.len() > 8192 || !pem.contains("-----BEGIN CERTIFICATE-----"))
            {
                return Err(invalid(
                    "/target/certificate_authority",
                    "it is not a certificate in PEM of at most 8192 bytes",
                    "give one certificate that begins with -----BEGIN CERTIFICATE-----",
                ));
            }
            check_mailbox("/target/from", from)?;
            if to.is_empty() || to.len() > MAX_RECEIVERS {
                return Err(ServiceError::Limit {
                    code: "out_of_limit",
                    field: "/target/to".to_owned(),
                    message: format!(
                        "an e-mail channel has 1 to {MAX_RECEIVERS} receivers, this one has {}",
                        to.len()
                    ),
                    limit: MAX_RECEIVERS as u64,
                    current: to.len() as u64,
                    mend: "name a mailing list, or make another channel".to_owned(),
                });
            }
            for (index, receiver) in to.iter().enumerate() {
                check_mailbox(&format!("/target/to/{index}"), receiver)?;
            }
            Ok(())
        }
    }
}

fn check_url(field: &str, text: &str) -> Result<Url, ServiceError> {
    let mend = "give an address such as https://example.com/hook";
    if text.chars().count() > MAX_URL_CHARS {
        return Err(invalid(
            field,
            &format!("the address has more than {MAX_URL_CHARS} characters"),
            mend,
        ));
    }
    let url = Url::parse(text)
        .map_err(|error| invalid(field, &format!("this is no address: {error}"), mend))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(invalid(
            field,
            "the address must begin with https:// or http:// and name a host",
            mend,
        ));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(invalid(
            field,
            "the address must not hold a user or password: it is shown to everybody who may see the channel",
            "sign the requests with `signing_secret` instead",
        ));
    }
    Ok(url)
}

fn check_secret(field: &str, name: Option<&str>) -> Result<(), ServiceError> {
    match name {
        Some(name) if crate::gateway::secrets::check_name(name).is_err() => Err(invalid(
            field,
            "this cannot name a secret",
            "set the secret at /secrets and give its name here, never the secret itself",
        )),
        Some(_) | None => Ok(()),
    }
}

fn check_text(field: &str, text: &str, max: usize) -> Result<(), ServiceError> {
    if text.chars().any(char::is_control) {
        return Err(invalid(field, "it holds a control character", "remove it"));
    }
    check_length("it", text, 1, max)
        .map_err(|error| invalid(field, &error.message, "shorten or fill it"))
}

fn check_mailbox(field: &str, text: &str) -> Result<(), ServiceError> {
    check_text(field, text, 320)?;
    match text.parse::<Mailbox>() {
        Ok(_) => Ok(()),
        Err(error) => Err(invalid(
            field,
            &format!("this is no e-mail address: {error}"),
            "give an address such as ops@example.com",
        )),
    }
}

fn invalid(field: &str, message: &str, mend: &str) -> ServiceError {
    ServiceError::invalid("channel_invalid", field, message, mend)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{
        records::tests::{caller, memory_store},
        workspaces::{Workspaces, tests::request},
    };

    fn target(json: serde_json::Value) -> ChannelTarget {
        serde_json::from_value(json).unwrap()
    }

    fn create(name: &str, target: ChannelTarget) -> CreateChannel {
        CreateChannel {
            name: name.parse().unwrap(),
            enabled: true,
            moments: all_moments(),
            target,
        }
    }

    #[test]
    fn what_cannot_be_sent_to_is_refused_with_its_field() {
        let email = |field: &str, value: serde_json::Value| {
            let mut json = serde_json::json!({
                "kind": "email", "server": "mail.example.com", "port": 587, "from": "a@example.com", "to": ["b@example.com"],
            });
            json[field] = value;
            json
        };
        for (json, field) in [
            (
                serde_json::json!({ "kind": "webhook", "url": "ftp://example.com" }),
                "/target/url",
            ),
            (
                serde_json::json!({ "kind": "webhook", "url": "https://u:p@example.com" }),
                "/target/url",
            ),
            (
                serde_json::json!({ "kind": "webhook", "url": "not an address" }),
                "/target/url",
            ),
            (
                serde_json::json!({ "kind": "webhook", "url": "https://example.com", "signing_secret": "no name!" }),
                "/target/signing_secret",
            ),
            (
                serde_json::json!({ "kind": "dingtalk", "url": "https://example.com/robot?access_token=x",
                    "access_token_secret": "t", "security": { "kind": "keyword", "keyword": "k" } }),
                "/target/url",
            ),
            (
                serde_json::json!({ "kind": "dingtalk", "access_token_secret": "t", "security": { "kind": "keyword", "keyword": "" } }),
                "/target/security/keyword",
            ),
            (email("from", "nobody".into()), "/target/from"),
            (email("to", serde_json::json!([])), "/target/to"),
            (
                email(
                    "to",
                    serde_json::json!(["b@example.com\r\nBcc: c@example.com"]),
                ),
                "/target/to/0",
            ),
            (email("user", "a".into()), "/target/password_secret"),
            (email("server", "mail:587".into()), "/target/server"),
            (email("port", 0.into()), "/target/port"),
            (
                email("certificate_authority", "x".into()),
                "/target/certificate_authority",
            ),
        ] {
            let shown = json.to_string();
            match check(&target(json), &all_moments()) {
                Err(
                    ServiceError::Invalid { field: found, .. }
                    | ServiceError::Limit { field: found, .. },
                ) => {
                    assert_eq!(found, field, "{shown}");
                }
                other => panic!("{shown}: {other:?}"),
            }
        }
        for json in [
            serde_json::json!({ "kind": "webhook", "url": "http://10.0.0.1:8080/hook?x=1", "signing_secret": "key" }),
            serde_json::json!({ "kind": "dingtalk", "access_token_secret": "t", "security": { "kind": "sign", "secret": "s" } }),
            email("to", serde_json::json!(["Ops <ops@example.com>"])),
        ] {
            check(&target(json), &all_moments()).unwrap();
        }
    }

    #[tokio::test]
    async fn channels_are_made_changed_and_deleted_and_have_a_limit() {
        let store = memory_store();
        let workspaces = Workspaces::new(store.clone());
        workspaces.create(caller(), request("one")).await.unwrap();
        let notifications = Notifications::new(store);
        let hook =
            || target(serde_json::json!({ "kind": "webhook", "url": "https://example.com" }));
        let (channel, revision) = notifications
            .create(caller(), "one", create("ops", hook()))
            .await
            .unwrap();
        let again = notifications
            .create(caller(), "one", create("ops", hook()))
            .await;
        assert_eq!(again.unwrap_err().code(), "name_taken");
        for number in 1..MAX_CHANNELS {
            let more = create(&format!("c{number}"), hook());
            notifications.create(caller(), "one", more).await.unwrap();
        }
        let full = notifications
            .create(caller(), "one", create("more", hook()))
            .await;
        assert_eq!(full.unwrap_err().code(), "too_many_channels");
        let off = UpdateChannel {
            enabled: Some(false),
            ..UpdateChannel::default()
        };
        let (changed, _) = notifications
            .update(caller(), "one", channel.id, Some(revision), off.clone())
            .await
            .unwrap();
        assert!(!changed.enabled && changed.moments == channel.moments);
        let stale = notifications
            .update(caller(), "one", channel.id, Some(revision), off)
            .await;
        assert_eq!(stale.unwrap_err().code(), "changed");
        let left = workspaces.delete(caller(), "one", "one").await.unwrap_err();
        assert!(left.to_string().contains("notification channel"), "{left}");
        // A delivery outlives its channel and cannot be sent again.
        let (delivery, _) = notifications
            .test(caller(), "one", channel.id)
            .await
            .unwrap();
        notifications
            .delete(caller(), "one", channel.id, "ops")
            .await
            .unwrap();
        let gone = notifications.send_again(caller(), "one", delivery.id).await;
        assert_eq!(gone.unwrap_err().code(), "channel_gone");
        let page = notifications
            .deliveries("one", &DeliveryFilter::default(), PageRequest::first(10))
            .await
            .unwrap();
        assert_eq!(page.items.len(), 1);
    }
}
