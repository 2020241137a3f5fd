//! Notifications on their way: from what happened to orders to channels, at least once.
//!
//! ```text
//! engine ── notice row, in the commit that made it ──► fan-out ── one commit ──► a delivery per channel, notice gone
//!                                                                                   │ due
//!                                     delivered, or later again, or given up ◄── attempt ◄┘
//! ```
//! | step | when it is cut off |
//! | --- | --- |
//! | notice | committed with the order's state, or neither |
//! | fan-out | its one commit was made or was not: each channel gets one delivery |
//! | attempt | made again after the start: receivers know a repetition by the delivery's id |
//!
//! One attempt per channel at a time, [`AT_ONCE_IN_A_WORKSPACE`] in a workspace, [`AT_ONCE`] altogether; a channel that does not
//! answer holds up no other, and a workspace no other workspace. Owns the rows
//! `delivery-due/…`; `service::notifications` owns channels and what people do with deliveries.

pub mod destination;
mod dingtalk;
mod email;
mod message;
pub mod request;
mod webhook;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::Sha256;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use windlass_domain::{
    Timestamp,
    id::{ChannelId, DeliveryId},
    notification::{
        Attempt, Channel, ChannelTarget, Delivery, DeliveryState, MAX_ATTEMPTS, Notice,
        ReceiverOutcome,
    },
    workspace::Workspace,
};
use windlass_store::{Event, EventKind, Key, Store, Txn, WatchError, crash::crash_point};

use crate::{
    clock,
    gateway::secrets::SecretSource,
    ids,
    keys::{self, Kind},
    service::{
        ServiceError,
        records::{self, Committed},
    },
};
use message::Message;
use request::Requests;

/// Attempts that are made at the same time.
pub const AT_ONCE: usize = 128;
/// Of these, attempts for one workspace: receivers that do not answer hold up no other workspace.
pub const AT_ONCE_IN_A_WORKSPACE: usize = 4;
/// Of these, attempts that repeat a failed one: the rest is for channels that may answer at once.
const REPEATED_AT_ONCE: usize = 2;
/// Before everything is read again after the store failed.
const AGAIN: Duration = Duration::from_secs(1);
/// What a row below `delivery-due` holds.
const A_DUE_DELIVERY: &str = "a due delivery";

/// That a delivery is to be attempted: the row `delivery-due/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Due {
    pub(crate) channel: ChannelId,
    pub(crate) at: Timestamp,
    /// The workspace that the attempt counts for.
    #[serde(default)]
    pub(crate) workspace: String,
    /// Whether an attempt failed before.
    #[serde(default)]
    pub(crate) repeated: bool,
}

/// Why an attempt failed. The text is kept with the delivery: never a secret in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct SendError {
    /// The receiver's answer, where there was one.
    pub(crate) code: Option<u16>,
    /// What is wrong, and what to do.
    pub(crate) message: String,
    /// Whether another attempt would not help.
    pub(crate) permanent: bool,
    /// The outcome for each receiver, where there are several.
    pub(crate) receivers: Vec<ReceiverOutcome>,
}

impl SendError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            code: None,
            message: message.into(),
            permanent: false,
            receivers: Vec::new(),
        }
    }

    /// An answer with another status than 2xx.
    pub(crate) fn answered(who: &str, code: u16, message: impl Into<String>) -> Self {
        let mut error = Self::new(message);
        error.code = Some(code);
        // 304 and others that lead nowhere are answers like any other.
        if matches!(code, 301 | 302 | 303 | 307 | 308) {
            error.permanent = true;
            error.message = format!(
                "{who} answered {code}, a redirect; redirects are not followed. Set the channel's `url` to the address that it redirects to, then send the notification again"
            );
        }
        error
    }
}

/// A message that was accepted.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    /// The receiver's answer.
    pub(crate) code: Option<u16>,
    /// The outcome for each receiver, where there are several.
    pub(crate) receivers: Vec<ReceiverOutcome>,
}

impl Sent {
    fn answered(code: u16) -> Self {
        Self {
            code: Some(code),
            receivers: Vec::new(),
        }
    }
}

/// Attempts that are in progress.
#[derive(Default)]
struct InProgress {
    channels: HashSet<ChannelId>,
    /// All attempts, and those that repeat a failed one, by workspace.
    workspaces: BTreeMap<String, (usize, usize)>,
}

impl InProgress {
    fn begin(&mut self, due: &Due) {
        self.channels.insert(due.channel);
        let (all, repeated) = self.workspaces.entry(due.workspace.clone()).or_default();
        *all += 1;
        *repeated += usize::from(due.repeated);
    }

    fn end(&mut self, due: &Due) {
        self.channels.remove(&due.channel);
        if let Some((all, repeated)) = self.workspaces.get_mut(&due.workspace) {
            *all = all.saturating_sub(1);
            *repeated = repeated.saturating_sub(usize::from(due.repeated));
            if *all == 0 {
                self.workspaces.remove(&due.workspace);
            }
        }
    }

    /// How many attempts a workspace has in progress; `None`: it has no room for this one.
    fn room(&self, due: &Due) -> Option<usize> {
        let (all, repeated) = self
            .workspaces
            .get(&due.workspace)
            .copied()
            .unwrap_or_default();
        let free = !self.channels.contains(&due.channel)
            && all < AT_ONCE_IN_A_WORKSPACE
            && (!due.repeated || repeated < REPEATED_AT_ONCE);
        free.then_some(all)
    }
}

/// Sends notifications. Cheap to clone.
#[derive(Clone)]
pub struct Notifier {
    parts: Arc<NotifierParts>,
}

/// The parts that a notifier is made of.
pub struct NotifierParts {
    /// Notices, channels, deliveries.
    pub store: Arc<dyn Store>,
    /// Values of secrets.
    pub secrets: Arc<dyn SecretSource>,
    /// The way out.
    pub requests: Requests,
}

/// Deliveries that wait for their time.
#[derive(Default)]
struct Schedule {
    by_id: BTreeMap<DeliveryId, Due>,
    by_time: BTreeSet<(Timestamp, DeliveryId)>,
}

impl Schedule {
    fn put(&mut self, id: DeliveryId, due: Due) {
        self.remove(id);
        self.by_time.insert((due.at, id));
        self.by_id.insert(id, due);
    }

    fn remove(&mut self, id: DeliveryId) {
        if let Some(due) = self.by_id.remove(&id) {
            self.by_time.remove(&(due.at, id));
        }
    }

    /// Takes a delivery that is due: of the workspace with the fewest attempts in progress, the oldest one whose channel is free.
    fn take(&mut self, now: Timestamp, busy: &InProgress) -> Option<(DeliveryId, Due)> {
        let due = self.by_time.iter().take_while(|(at, _)| *at <= now);
        let (_, id) = due
            .filter_map(|(_, id)| Some((busy.room(&self.by_id[id])?, *id)))
            .min_by_key(|(in_progress, _)| *in_progress)?;
        let due = self.by_id.get(&id)?.clone();
        self.remove(id);
        Some((id, due))
    }

    /// When the next delivery that is not due yet falls due.
    fn next_after(&self, now: Timestamp) -> Option<Timestamp> {
        let after = (now.plus_ms(1), DeliveryId::from_uuid(uuid::Uuid::nil()));
        self.by_time.range(after..).next().map(|(at, _)| *at)
    }
}

/// Rows that cannot be read: each is passed over, and logged once. It stays, for a program that can read it.
#[derive(Default)]
struct Unreadable {
    known: BTreeSet<Key>,
}

impl Unreadable {
    /// What a row holds, where that can be read.
    fn decode<T: DeserializeOwned>(&mut self, key: &Key, value: &[u8], what: &str) -> Option<T> {
        let error = match serde_json::from_slice(value) {
            Ok(record) => return Some(record),
            Err(error) => records::malformed(key, what, &error),
        };
        if self.known.insert(key.clone()) {
            tracing::error!(row = %key, error = &error as &dyn std::error::Error, "a row of the notifications is passed over");
        }
        None
    }
}

impl Notifier {
    /// A notifier over these parts; it sends nothing until [`Notifier::run`].
    #[must_use]
    pub fn new(parts: NotifierParts) -> Self {
        Self {
            parts: Arc::new(parts),
        }
    }

    /// Tells channels what happens until `stop`. Run by one owned task; attempts under way are cut off at its end.
    pub async fn run(self, stop: CancellationToken) {
        let mut unreadable = Unreadable::default();
        while !stop.is_cancelled() {
            tokio::select! {
                () = stop.cancelled() => return,
                Err(error) = self.work(&mut unreadable) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "notifications wait until the store answers");
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
    }

    /// Works until something fails: then everything is read again.
    async fn work(&self, unreadable: &mut Unreadable) -> Result<(), ServiceError> {
        let store = &*self.parts.store;
        let watched = |error: WatchError| ServiceError::internal("watch for notifications", error);
        // Watches first, so that nothing falls between them and what is read.
        let revision = store.revision().await?;
        let mut notices = store
            .watch(&keys::notices(), revision)
            .await
            .map_err(watched)?;
        let mut changes = store
            .watch(&keys::deliveries_due(), revision)
            .await
            .map_err(watched)?;
        let mut schedule = Schedule::default();
        for entry in records::all(store, &keys::deliveries_due()).await? {
            if let Ok(id) = keys::last_segment(&entry.key).parse()
                && let Some(due) = unreadable.decode(&entry.key, &entry.value, A_DUE_DELIVERY)
            {
                schedule.put(id, due);
            }
        }
        let mut busy = InProgress::default();
        let mut sending: JoinSet<(Due, Result<(), ServiceError>)> = JoinSet::new();
        self.fan_out(unreadable).await?;
        loop {
            let now = clock::now();
            while sending.len() < AT_ONCE
                && let Some((id, due)) = schedule.take(now, &busy)
            {
                busy.begin(&due);
                let notifier = self.clone();
                sending.spawn(async move { (due, notifier.attempt(id).await) });
            }
            let next = schedule.next_after(now);
            tokio::select! {
                notice = notices.next() => {
                    if matches!(notice.map_err(watched)?.kind, EventKind::Put { .. }) {
                        self.fan_out(unreadable).await?;
                    }
                }
                change = changes.next() => apply(&mut schedule, change.map_err(watched)?, unreadable),
                Some(ended) = sending.join_next() => {
                    let Ok((due, attempted)) = ended else {
                        return Err(ServiceError::Unavailable { message: "an attempt to send a notification was interrupted".to_owned() });
                    };
                    busy.end(&due);
                    attempted?;
                }
                () = sleep_until(next) => {}
            }
        }
    }

    /// Makes a delivery for each channel that wants to hear of a notice, and takes the notice away, with one commit.
    async fn fan_out(&self, unreadable: &mut Unreadable) -> Result<(), ServiceError> {
        let store = &*self.parts.store;
        for entry in records::all(store, &keys::notices()).await? {
            let notice = unreadable.decode::<Notice>(&entry.key, &entry.value, "a notice");
            let (Some(notice), Some(workspace)) = (notice, keys::notice_workspace(&entry.key))
            else {
                continue;
            };
            let below = keys::all_of_workspace(Kind::Channel, workspace);
            let channels = records::all_indexed::<Channel>(store, &below).await?;
            let mut txn = Txn::new()
                .revision_is(entry.key.clone(), entry.revision)
                .delete(entry.key.clone());
            for channel in channels {
                if channel.enabled && channel.moments.contains(&notice.moment) {
                    txn = txn.and(new_delivery(&channel, notice.clone(), MAX_ATTEMPTS)?.1);
                }
            }
            crash_point("notify.before_fan_out");
            match records::commit(store, txn).await? {
                // Another server was faster.
                Committed::Done(_) | Committed::Conflict => {}
            }
            crash_point("notify.after_fan_out");
        }
        Ok(())
    }

    /// One attempt of a delivery, and what becomes of it.
    async fn attempt(&self, id: DeliveryId) -> Result<(), ServiceError> {
        let store = &*self.parts.store;
        let Some((mut delivery, revision)) =
            records::find::<Delivery>(store, &id.to_string()).await?
        else {
            return Ok(());
        };
        if delivery.state != DeliveryState::Pending {
            return Ok(());
        }
        let channel = records::find::<Channel>(store, &delivery.channel.to_string()).await?;
        let mut made = None;
        match channel {
            Some((channel, _)) if channel.enabled || delivery.notice.order.is_none() => {
                let before = clock::now();
                crash_point("notify.before_send");
                let sent = self.send(&channel, &delivery).await;
                crash_point("notify.after_send");
                let at = clock::now();
                let took_ms = at.since_ms(before);
                let attempt = match sent {
                    Ok(sent) => Attempt {
                        at,
                        took_ms,
                        answer_code: sent.code,
                        error: String::new(),
                        permanent: false,
                        receivers: sent.receivers,
                    },
                    Err(error) => {
                        tracing::info!(delivery.id = %id, channel.name = %channel.name, attempt = delivery.attempts + 1, reason = %error, "a notification was not delivered");
                        Attempt {
                            at,
                            took_ms,
                            answer_code: error.code,
                            error: error.message,
                            permanent: error.permanent,
                            receivers: error.receivers,
                        }
                    }
                };
                let [high, low] = ids::random_bytes::<2>();
                made = Some(attempt.clone());
                delivery.attempted(attempt, u16::from_le_bytes([high, low]) % 1001);
            }
            Some(_) => delivery.give_up(clock::now(), "the channel was switched off"),
            None => delivery.give_up(clock::now(), "the channel was deleted"),
        }
        let txn = records::replace(&delivery, revision)?.and(due_row(&delivery));
        match (records::commit(store, txn).await?, made) {
            (Committed::Done(_), _) | (Committed::Conflict, None) => Ok(()),
            // A person sent it again meanwhile: its row says when.
            (Committed::Conflict, Some(made)) => self.note(id, made).await,
        }
    }

    /// Notes an attempt of a delivery that a person sent again while it was under way.
    async fn note(&self, id: DeliveryId, made: Attempt) -> Result<(), ServiceError> {
        let store = &*self.parts.store;
        loop {
            let found = records::find::<Delivery>(store, &id.to_string()).await?;
            let Some((mut delivery, revision)) = found else {
                return Ok(());
            };
            delivery.attempted_before(made.clone());
            match records::commit(store, records::replace(&delivery, revision)?).await? {
                Committed::Done(_) => return Ok(()),
                Committed::Conflict => {}
            }
        }
    }

    async fn send(&self, channel: &Channel, delivery: &Delivery) -> Result<Sent, SendError> {
        let workspace = channel.workspace.as_str();
        let region = records::find::<Workspace>(&*self.parts.store, workspace).await;
        let region = region.ok().flatten();
        let region = region.map_or_else(String::new, |(workspace, _)| workspace.region.to_string());
        let message = Message::of(delivery, &region);
        let secrets = Secrets {
            source: &*self.parts.secrets,
            workspace,
        };
        let requests = &self.parts.requests;
        match &channel.target {
            ChannelTarget::Webhook {
                url,
                method,
                signing_secret,
            } => {
                let key = secrets.read_optional(signing_secret.as_deref()).await?;
                webhook::send(requests, url, *method, key.as_ref(), &message).await
            }
            ChannelTarget::DingTalk {
                url,
                access_token_secret,
                security,
            } => {
                let token = secrets.read(access_token_secret).await?;
                dingtalk::send(requests, url, &token, security, &secrets, &message).await
            }
            ChannelTarget::Email { .. } => {
                let done = &delivery.done_receivers;
                email::send(requests, &channel.target, done, &secrets, &message).await
            }
        }
    }
}

/// The secrets of a workspace, as senders read them.
struct Secrets<'a> {
    source: &'a dyn SecretSource,
    workspace: &'a str,
}

impl Secrets<'_> {
    async fn read(&self, name: &str) -> Result<windlass_protocol::SecretText, SendError> {
        let names = BTreeSet::from([name.to_owned()]);
        let found = self.source.resolve(self.workspace, &names).await;
        let mut values =
            found.map_err(|_| SendError::new("the secrets cannot be read right now"))?;
        values.remove(name).ok_or_else(|| {
            SendError::new(format!(
                "the workspace has no secret `{name}`: set it, or name another in the channel"
            ))
        })
    }

    async fn read_optional(
        &self,
        name: Option<&str>,
    ) -> Result<Option<windlass_protocol::SecretText>, SendError> {
        match name {
            Some(name) => Ok(Some(self.read(name).await?)),
            None => Ok(None),
        }
    }
}

fn hmac_sha256(key: &windlass_protocol::SecretText, text: &str) -> [u8; 32] {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(key.reveal().as_bytes()).expect("a key may have any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().into()
}

/// A new delivery of a channel, and the rows that it is made with.
pub(crate) fn new_delivery(
    channel: &Channel,
    notice: Notice,
    max_attempts: u32,
) -> Result<(Delivery, Txn), ServiceError> {
    let at = clock::now();
    let delivery = Delivery {
        schema: Delivery::SCHEMA,
        id: DeliveryId::from_uuid(ids::new_uuid()),
        workspace: channel.workspace.clone(),
        channel: channel.id,
        channel_name: channel.name.clone(),
        notice,
        state: DeliveryState::Pending,
        attempts: 0,
        max_attempts,
        last_attempts: Vec::new(),
        done_receivers: Vec::new(),
        next_at: Some(at),
        created_at: at,
        ended_at: None,
    };
    let of = keys::of_workspace(
        Kind::Delivery,
        channel.workspace.as_str(),
        &delivery.id.to_string(),
    );
    let txn = records::create(&delivery)?
        .put(of, "")
        .and(due_row(&delivery));
    Ok((delivery, txn))
}

/// The row that says when a delivery is attempted next, or that it is not.
pub(crate) fn due_row(delivery: &Delivery) -> Txn {
    let key = keys::delivery_due(delivery.id);
    match delivery.next_at {
        Some(at) => {
            let due = Due {
                channel: delivery.channel,
                at,
                workspace: delivery.workspace.to_string(),
                repeated: delivery.attempts > 0,
            };
            Txn::new().put(key, records::encode(&due))
        }
        None => Txn::new().delete(key),
    }
}

fn apply(schedule: &mut Schedule, event: Event, unreadable: &mut Unreadable) {
    let Ok(id) = keys::last_segment(&event.key).parse() else {
        return;
    };
    let due = match &event.kind {
        EventKind::Put { value, .. } => unreadable.decode(&event.key, value, A_DUE_DELIVERY),
        EventKind::Deleted => None,
    };
    match due {
        Some(due) => schedule.put(id, due),
        None => schedule.remove(id),
    }
}

async fn sleep_until(at: Option<Timestamp>) {
    match at {
        Some(at) => {
            tokio::time::sleep(Duration::from_millis(at.since_ms(clock::now()).max(1))).await;
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use windlass_domain::notification::Moment;

    use super::*;
    use crate::{gateway::secrets::SecretError, service::records::tests::memory_store};

    struct NoSecrets;

    #[async_trait::async_trait]
    impl SecretSource for NoSecrets {
        async fn resolve(
            &self,
            _workspace: &str,
            _names: &BTreeSet<String>,
        ) -> Result<BTreeMap<String, windlass_protocol::SecretText>, SecretError> {
            Ok(BTreeMap::new())
        }
    }

    #[tokio::test]
    async fn a_row_that_cannot_be_read_stops_no_other() {
        let store = memory_store();
        let notice =
            |order: &str| Key::from_segments(["default", "notice", "prod", order, "1"]).unwrap();
        let good = records::encode(&Notice {
            moment: Moment::Started,
            at: Timestamp::from_unix_ms(0),
            order: None,
        });
        let bad = [
            notice("a"),
            keys::delivery_due(DeliveryId::from_uuid(Uuid::nil())),
        ];
        let mut txn = Txn::new().put(notice("b"), good.clone());
        for key in &bad {
            txn = txn.put(key.clone(), r#"{"of": "another version"}"#);
        }
        let revision = store.revision().await.unwrap();
        store.commit(txn).await.unwrap();
        let mut changes = store.watch(&keys::notices(), revision).await.unwrap();
        let stop = CancellationToken::new();
        let notifier = Notifier::new(NotifierParts {
            store: store.clone(),
            secrets: Arc::new(NoSecrets),
            requests: Requests::new(destination::Destinations::new(Vec::new(), Vec::new())),
        });
        let running = tokio::spawn(notifier.run(stop.clone()));
        let mut fanned_out = async |key: Key| {
            let gone = async {
                loop {
                    let change = changes.next().await.unwrap();
                    if change.key == key && change.kind == EventKind::Deleted {
                        return;
                    }
                }
            };
            let waited = tokio::time::timeout(Duration::from_secs(10), gone).await;
            waited.unwrap_or_else(|_| panic!("{key} was not fanned out"));
        };
        fanned_out(notice("b")).await;
        // What is wrong is changed, and others come.
        let more = Txn::new().put(bad[1].clone(), "[]").put(notice("c"), good);
        store.commit(more).await.unwrap();
        fanned_out(notice("c")).await;
        for key in &bad {
            assert!(store.get(key).await.unwrap().is_some(), "{key} stays");
        }
        stop.cancel();
        running.await.unwrap();
    }

    #[test]
    fn an_unreadable_row_is_known_once() {
        let mut unreadable = Unreadable::default();
        let key = keys::delivery_due(DeliveryId::from_uuid(Uuid::nil()));
        for _ in 0..2 {
            assert!(
                unreadable
                    .decode::<Notice>(&key, b"{", "a notice")
                    .is_none()
            );
            assert_eq!(unreadable.known.len(), 1);
        }
        assert_eq!(unreadable.decode(&key, b"7", "a number"), Some(7));
    }

    fn due(channel: ChannelId, at: Timestamp, workspace: &str, repeated: bool) -> Due {
        Due {
            channel,
            at,
            workspace: workspace.to_owned(),
            repeated,
        }
    }

    #[test]
    fn a_workspace_whose_receivers_hang_holds_up_no_other() {
        let at = Timestamp::from_unix_ms;
        let mut schedule = Schedule::default();
        // A hundred channels of one workspace are due before the one of another.
        for number in 1..=101u128 {
            let workspace = if number == 101 { "small" } else { "large" };
            schedule.put(
                DeliveryId::from_uuid(Uuid::from_u128(number)),
                due(
                    ChannelId::from_uuid(Uuid::from_u128(number)),
                    at(1),
                    workspace,
                    number <= 90,
                ),
            );
        }
        let mut busy = InProgress::default();
        let mut taken = Vec::new();
        while let Some((_, due)) = schedule.take(at(5), &busy) {
            busy.begin(&due);
            taken.push((due.workspace, due.repeated));
        }
        let count = |workspace: &str, repeated| {
            let same = |one: &&(String, bool)| one.0 == workspace && one.1 == repeated;
            taken.iter().filter(same).count()
        };
        assert_eq!(count("small", false), 1, "{taken:?}");
        assert_eq!((count("large", true), count("large", false)), (2, 2));
        assert_eq!(taken[1].0, "small", "the one with the fewest comes next");
    }

    #[test]
    fn a_busy_channel_holds_up_no_other() {
        let channel = |number| ChannelId::from_uuid(Uuid::from_u128(number));
        let delivery = |number| DeliveryId::from_uuid(Uuid::from_u128(number));
        let at = Timestamp::from_unix_ms;
        let mut schedule = Schedule::default();
        for (number, of, when) in [(1, 1, 10), (2, 1, 20), (3, 2, 30), (4, 2, 99)] {
            schedule.put(delivery(number), due(channel(of), at(when), "w", false));
        }
        let mut busy = InProgress::default();
        let mut take = |now, busy: &InProgress| schedule.take(at(now), busy).map(|(id, _)| id);
        assert_eq!(take(5, &busy), None);
        assert_eq!(take(50, &busy), Some(delivery(1)));
        busy.begin(&due(channel(1), at(10), "w", false));
        assert_eq!(take(50, &busy), Some(delivery(3)));
        assert_eq!(take(50, &busy), None);
        busy.end(&due(channel(1), at(10), "w", false));
        assert_eq!(take(50, &busy), Some(delivery(2)));
        assert_eq!(schedule.next_after(at(50)), Some(at(99)));
        // Put again it stands once.
        let again = due(channel(2), at(70), "w", false);
        schedule.put(delivery(4), again);
        assert_eq!(schedule.next_after(at(50)), Some(at(70)));
        assert_eq!(schedule.by_time.len(), 1);
    }
}
