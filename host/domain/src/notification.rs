//! Notifications: where a workspace is told about its orders, and what became of each telling.
//!
//! A [`Channel`] is a place (a webhook, a DingTalk robot, an e-mail address) and the moments that it wants to hear of. A
//! [`Delivery`] is one message to one channel; it is kept with its attempts. Secrets stand here as names only. Source: spec
//! "Notifications".
//!
//! ```text
//! order changes its state ─► moment ─► one delivery per channel that wants it
//! pending ─ sent ─► delivered                    ┌─ send again ─┐
//!    └─ failed: again after a growing pause ─► given up ────────┘
//! ```

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    id::{ChannelId, DeliveryId, OrderId},
    name::{ChannelName, WorkspaceName},
    order::{Order, OrderState},
    progress::Counts,
    time::Timestamp,
};

/// Attempts of one delivery before it is given up.
pub const MAX_ATTEMPTS: u32 = 16;
/// Pause after the first failed attempt, in milliseconds; it doubles up to [`MAX_PAUSE_MS`].
pub const FIRST_PAUSE_MS: u64 = 1_000;
/// The longest pause between two attempts, in milliseconds.
pub const MAX_PAUSE_MS: u64 = 3_600_000;
/// Attempts that a delivery remembers.
pub const KEPT_ATTEMPTS: usize = 10;

/// What happened to an order, as far as people are told. Source: spec "Notifications".
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// It was run.
    Started,
    /// It waits for a person's confirmation.
    Waiting,
    /// Something failed, drifted or is unknown, or it cannot begin, and a person has to act.
    Blocked,
    /// Done.
    Succeeded,
    /// Ended with something failed or unknown.
    Failed,
    /// Ended by a person.
    Cancelled,
    /// Its rollback began.
    RollingBack,
    /// Its rollback is done.
    RolledBack,
    /// A test of the channel: of no order.
    Test,
}

impl Moment {
    /// All that an order can come to.
    pub const OF_ORDERS: [Self; 8] = [
        Self::Started,
        Self::Waiting,
        Self::Blocked,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
        Self::RollingBack,
        Self::RolledBack,
    ];

    /// Its code.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Waiting => "waiting",
            Self::Blocked => "blocked",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::RollingBack => "rolling_back",
            Self::RolledBack => "rolled_back",
            Self::Test => "test",
        }
    }

    /// What a change of an order's state means to people; `None`: nothing that they are told.
    #[must_use]
    pub const fn of(before: OrderState, after: OrderState) -> Option<Self> {
        match after {
            // It could not be initialised: it does not run until somebody runs it again.
            OrderState::NotStarted if matches!(before, OrderState::Initialising) => {
                Some(Self::Blocked)
            }
            OrderState::NotStarted | OrderState::Cancelling => None,
            // Straight to running where there is nothing to initialise.
            OrderState::Initialising | OrderState::Running => match before {
                OrderState::NotStarted => Some(Self::Started),
                OrderState::Initialising
                | OrderState::Running
                | OrderState::Blocked
                | OrderState::Drifted
                | OrderState::Unknown
                | OrderState::AwaitingConfirmation
                | OrderState::Cancelling
                | OrderState::Succeeded
                | OrderState::Failed
                | OrderState::Cancelled
                | OrderState::RollingBack
                | OrderState::RolledBack => None,
            },
            OrderState::AwaitingConfirmation => Some(Self::Waiting),
            OrderState::Blocked | OrderState::Drifted | OrderState::Unknown => Some(Self::Blocked),
            OrderState::Succeeded => Some(Self::Succeeded),
            OrderState::Failed => Some(Self::Failed),
            OrderState::Cancelled => Some(Self::Cancelled),
            OrderState::RollingBack => Some(Self::RollingBack),
            OrderState::RolledBack => Some(Self::RolledBack),
        }
    }

    /// How much it matters. Source: spec "System events", "Payload".
    #[must_use]
    pub const fn level(self) -> Severity {
        match self {
            Self::Failed => Severity::Critical,
            Self::Blocked | Self::RollingBack | Self::RolledBack | Self::Cancelled => {
                Severity::Warn
            }
            Self::Started | Self::Waiting | Self::Succeeded | Self::Test => Severity::Info,
        }
    }
}

/// How much a message matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Severity {
    /// Something is broken.
    Critical,
    /// Somebody should look.
    Warn,
    /// For information.
    Info,
}

/// A place that is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Channel {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: ChannelId,
    /// Name: unique in the workspace.
    pub name: ChannelName,
    /// Workspace.
    pub workspace: WorkspaceName,
    /// Whether it is told at all.
    pub enabled: bool,
    /// What it is told of.
    pub moments: BTreeSet<Moment>,
    /// Where and how.
    pub target: ChannelTarget,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was changed last.
    pub updated_at: Timestamp,
}

impl Channel {
    /// The current [`Channel::schema`].
    pub const SCHEMA: u32 = 1;
}

/// Where and how a channel is told. Fields that end in `_secret` name secrets of the workspace; they are read when something
/// is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum ChannelTarget {
    /// An HTTP request.
    Webhook {
        /// `https://…` or `http://…`, without user and password.
        url: String,
        /// `post` sends the message as JSON, `get` its main fields in the query.
        #[serde(default)]
        method: WebhookMethod,
        /// The key of the signature: `Windlass-Signature: v1=<hex HMAC-SHA256 of "<Windlass-Timestamp>.<body>">`, with `get` of
        /// path and query instead of the body. Absent: not signed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signing_secret: Option<String>,
    },
    /// A robot in a DingTalk group.
    #[serde(rename = "dingtalk")]
    DingTalk {
        /// The robot's address without its token. Default: DingTalk's own.
        #[serde(default = "dingtalk_url")]
        url: String,
        /// The robot's access token.
        access_token_secret: String,
        /// What the robot demands.
        security: DingTalkSecurity,
    },
    /// A message by SMTP.
    Email {
        /// The mail server's name or address.
        server: String,
        /// Its port.
        port: u16,
        /// How the connection is protected.
        #[serde(default)]
        security: SmtpSecurity,
        /// The user that logs in; absent: nobody does.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
        /// That user's password.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        password_secret: Option<String>,
        /// A certificate authority (PEM) that the mail server's certificate may come from, beside the system's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        certificate_authority: Option<String>,
        /// Sender.
        from: String,
        /// Receivers.
        to: Vec<String>,
    },
}

fn dingtalk_url() -> String {
    "https://oapi.dingtalk.com/robot/send".to_owned()
}

/// The method of a webhook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WebhookMethod {
    /// The message is the body.
    #[default]
    Post,
    /// The message's main fields are the query.
    Get,
}

/// What a DingTalk robot demands of a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum DingTalkSecurity {
    /// That it holds a word.
    Keyword {
        /// The word.
        keyword: String,
    },
    /// That it is signed.
    Sign {
        /// The key of the signature.
        secret: String,
    },
}

/// How a connection to a mail server is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SmtpSecurity {
    /// Plain at first, TLS before anything is said: refused where the server cannot.
    #[default]
    Starttls,
    /// TLS from the start.
    Tls,
    /// Not at all.
    None,
}

/// A moment of an order that is to be told: written in the commit that made it, gone once it is a delivery per channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Notice {
    /// What happened.
    pub moment: Moment,
    /// When.
    pub at: Timestamp,
    /// The order; none for a test.
    pub order: Option<OrderNotice>,
}

/// An order as a notice tells of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct OrderNotice {
    /// The order.
    pub id: OrderId,
    /// Its title.
    pub title: String,
    /// Its strategy, `name@version`.
    pub strategy: String,
    /// The order that it rolls back.
    pub rollback_of: Option<OrderId>,
    /// Its state.
    pub state: OrderState,
    /// Why it is in this state.
    pub reason: String,
    /// Servers by state.
    pub counts: Counts,
    /// Servers altogether.
    pub server_count: u32,
    /// Who made it.
    pub created_by: String,
    /// When it was run.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// The event of the order that this was: rises within an order.
    pub seq: u64,
}

impl Notice {
    /// What is told of an order whose state was `before`, and which comes to a state (its own, or that which it has once what is
    /// under way is done); `None`: nothing, or the order tells nobody.
    #[must_use]
    pub fn of(
        order: &Order,
        before: OrderState,
        comes_to: OrderState,
        at: Timestamp,
    ) -> Option<Self> {
        if !order.notify {
            return None;
        }
        let moment = Moment::of(before, comes_to)?;
        Some(Self {
            moment,
            at,
            order: Some(OrderNotice {
                id: order.id,
                title: order.title.clone(),
                strategy: order.strategy.clone(),
                rollback_of: order.purpose.rollback_of(),
                state: order.state,
                reason: order.state_reason.clone(),
                counts: order.counts,
                server_count: order.server_count,
                created_by: order.created_by.clone(),
                started_at: order.started_at,
                finished_at: order.finished_at,
                seq: order.last_event,
            }),
        })
    }
}

/// Where a delivery is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeliveryState {
    /// To be sent, or sent again.
    Pending,
    /// The receiver took it.
    Delivered,
    /// Too many attempts failed, or the channel is gone.
    GivenUp,
}

/// One attempt of a delivery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Attempt {
    /// When it ended.
    pub at: Timestamp,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// The receiver's answer: an HTTP status or an SMTP code; absent: there was none.
    pub answer_code: Option<u16>,
    /// What went wrong; empty: it was taken. Never holds a secret.
    pub error: String,
    /// Whether the receiver refused for good, so that another attempt would not help.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub permanent: bool,
    /// The outcome for each receiver of an e-mail that this attempt was sent to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub receivers: Vec<ReceiverOutcome>,
}

/// What became of an e-mail at one of its receivers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ReceiverOutcome {
    /// The receiver's address.
    pub receiver: String,
    /// The mail server's answer; absent: there was none.
    pub answer_code: Option<u16>,
    /// Why the receiver did not get the e-mail; empty: the mail server accepted it.
    pub error: String,
    /// Whether the mail server refused the receiver for good.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub permanent: bool,
}

/// One message to one channel. Delivered at least once: receivers know a repetition by the id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Delivery {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: DeliveryId,
    /// The workspace's identifier.
    pub workspace: WorkspaceName,
    /// The channel.
    pub channel: ChannelId,
    /// That channel's name when it was made.
    pub channel_name: ChannelName,
    /// What is told.
    pub notice: Notice,
    /// Where it is.
    pub state: DeliveryState,
    /// Attempts so far.
    pub attempts: u32,
    /// Attempts after which it is given up.
    pub max_attempts: u32,
    /// The last attempts, oldest first.
    pub last_attempts: Vec<Attempt>,
    /// Receivers of an e-mail that are done: they got it, or refused it for good. Further attempts leave them out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub done_receivers: Vec<String>,
    /// When it is attempted next.
    pub next_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When the receiver took it, or it was given up.
    pub ended_at: Option<Timestamp>,
}

impl Delivery {
    /// The current [`Delivery::schema`].
    pub const SCHEMA: u32 = 1;

    /// Notes an attempt. `jitter` in thousandths shortens the pause by up to a half, so that many do not come back at once.
    pub fn attempted(&mut self, attempt: Attempt, jitter: u16) {
        let at = attempt.at;
        let (taken, permanent) = (attempt.error.is_empty(), attempt.permanent);
        let done = attempt
            .receivers
            .iter()
            .filter(|one| one.error.is_empty() || one.permanent);
        self.done_receivers
            .extend(done.map(|one| one.receiver.clone()));
        self.record(attempt);
        self.next_at = None;
        if taken {
            self.state = DeliveryState::Delivered;
            self.ended_at = Some(at);
        } else if permanent || self.attempts >= self.max_attempts {
            self.state = DeliveryState::GivenUp;
            self.ended_at = Some(at);
        } else {
            self.next_at = Some(at.plus_ms(pause_ms(self.attempts, jitter)));
        }
    }

    /// Notes an attempt that was under way when a person sent it again: what that is due for stays.
    pub fn attempted_before(&mut self, attempt: Attempt) {
        self.record(attempt);
        self.max_attempts += 1;
    }

    fn record(&mut self, attempt: Attempt) {
        self.attempts += 1;
        self.keep(attempt);
    }

    fn keep(&mut self, attempt: Attempt) {
        self.last_attempts.push(attempt);
        let surplus = self.last_attempts.len().saturating_sub(KEPT_ATTEMPTS);
        self.last_attempts.drain(..surplus);
    }

    /// Ends it without another attempt.
    pub fn give_up(&mut self, at: Timestamp, error: &str) {
        self.keep(Attempt {
            at,
            took_ms: 0,
            answer_code: None,
            error: error.to_owned(),
            permanent: true,
            receivers: Vec::new(),
        });
        self.state = DeliveryState::GivenUp;
        self.next_at = None;
        self.ended_at = Some(at);
    }

    /// Sends it again to every receiver, with as many attempts as at first. What was attempted stays on record.
    pub fn send_again(&mut self, at: Timestamp) {
        self.done_receivers.clear();
        self.state = DeliveryState::Pending;
        self.max_attempts = self.attempts + MAX_ATTEMPTS;
        self.next_at = Some(at);
        self.ended_at = None;
    }
}

/// The pause after so many failed attempts, in milliseconds.
fn pause_ms(attempts: u32, jitter: u16) -> u64 {
    let doublings = attempts.saturating_sub(1).min(30);
    let pause = FIRST_PAUSE_MS
        .saturating_mul(1 << doublings)
        .min(MAX_PAUSE_MS);
    pause - pause / 2 * u64::from(jitter.min(1000)) / 1000
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_unix_ms(ms)
    }

    fn delivery() -> Delivery {
        Delivery {
            schema: Delivery::SCHEMA,
            id: DeliveryId::from_uuid(Uuid::from_u128(1)),
            workspace: "prod".parse().unwrap(),
            channel: ChannelId::from_uuid(Uuid::from_u128(2)),
            channel_name: "ops".parse().unwrap(),
            notice: Notice {
                moment: Moment::Test,
                at: at(0),
                order: None,
            },
            state: DeliveryState::Pending,
            attempts: 0,
            max_attempts: MAX_ATTEMPTS,
            last_attempts: Vec::new(),
            done_receivers: Vec::new(),
            next_at: Some(at(0)),
            created_at: at(0),
            ended_at: None,
        }
    }

    fn attempt(ms: i64, error: &str) -> Attempt {
        Attempt {
            at: at(ms),
            took_ms: 1,
            answer_code: None,
            error: error.to_owned(),
            permanent: false,
            receivers: Vec::new(),
        }
    }

    #[test]
    fn a_permanent_refusal_ends_a_delivery_after_one_attempt() {
        let mut refused = delivery();
        refused.attempted(
            Attempt {
                permanent: true,
                ..attempt(1, "moved")
            },
            0,
        );
        assert_eq!(
            (refused.state, refused.attempts),
            (DeliveryState::GivenUp, 1)
        );
    }

    #[test]
    fn receivers_that_are_done_are_left_out_until_a_person_sends_again() {
        let receiver = |receiver: &str, error: &str, permanent| ReceiverOutcome {
            receiver: receiver.to_owned(),
            answer_code: None,
            error: error.to_owned(),
            permanent,
        };
        let mut delivery = delivery();
        let receivers = vec![
            receiver("a@x", "", false),
            receiver("b@x", "unknown", true),
            receiver("c@x", "busy", false),
        ];
        delivery.attempted(
            Attempt {
                receivers,
                ..attempt(1, "b@x, c@x")
            },
            0,
        );
        assert_eq!(delivery.state, DeliveryState::Pending);
        assert_eq!(delivery.done_receivers, ["a@x", "b@x"]);
        delivery.send_again(at(2));
        assert!(delivery.done_receivers.is_empty());
    }

    #[test]
    fn an_attempt_that_a_person_overtook_is_noted_and_ends_nothing() {
        for error in ["", "busy"] {
            let mut delivery = delivery();
            delivery.attempted(attempt(1, "busy"), 0);
            delivery.send_again(at(5));
            let again = delivery.clone();
            delivery.attempted_before(attempt(9, error));
            assert_eq!(delivery.attempts, 2);
            assert_eq!(
                delivery.last_attempts,
                [attempt(1, "busy"), attempt(9, error)]
            );
            assert_eq!(
                (delivery.state, delivery.next_at),
                (again.state, again.next_at)
            );
            let left = |delivery: &Delivery| delivery.max_attempts - delivery.attempts;
            assert_eq!(left(&delivery), left(&again), "as many as were given");
        }
    }

    #[test]
    fn pauses_double_up_to_an_hour_and_jitter_shortens_them() {
        for (attempts, jitter, expect) in [
            (1, 0, 1_000),
            (2, 0, 2_000),
            (5, 0, 16_000),
            (12, 0, 2_048_000),
            (13, 0, MAX_PAUSE_MS),
            (400, 0, MAX_PAUSE_MS),
            (1, 1000, 500),
            (2, 500, 1_500),
            (2, 9_999, 1_000),
        ] {
            assert_eq!(pause_ms(attempts, jitter), expect, "{attempts} {jitter}");
        }
    }

    #[test]
    fn a_delivery_is_taken_or_given_up_and_can_be_sent_again() {
        let mut delivery = delivery();
        for number in 1..=MAX_ATTEMPTS {
            assert_eq!(delivery.state, DeliveryState::Pending, "{number}");
            delivery.attempted(attempt(i64::from(number), "no"), 0);
        }
        assert_eq!(
            (
                delivery.state,
                delivery.next_at,
                delivery.last_attempts.len()
            ),
            (DeliveryState::GivenUp, None, KEPT_ATTEMPTS)
        );
        delivery.send_again(at(100));
        assert_eq!(
            (delivery.state, delivery.next_at, delivery.ended_at),
            (DeliveryState::Pending, Some(at(100)), None)
        );
        delivery.attempted(attempt(101, ""), 0);
        assert_eq!(
            (delivery.state, delivery.attempts, delivery.ended_at),
            (DeliveryState::Delivered, MAX_ATTEMPTS + 1, Some(at(101)))
        );
    }

    #[test]
    fn people_are_told_of_starts_waits_and_ends() {
        use OrderState as S;
        for (before, after, expect) in [
            (S::NotStarted, S::Initialising, Some(Moment::Started)),
            (S::Initialising, S::NotStarted, Some(Moment::Blocked)),
            (S::NotStarted, S::NotStarted, None),
            (S::NotStarted, S::Running, Some(Moment::Started)),
            (S::Initialising, S::Running, None),
            (S::Blocked, S::Running, None),
            (S::Running, S::AwaitingConfirmation, Some(Moment::Waiting)),
            (S::Running, S::Unknown, Some(Moment::Blocked)),
            (S::Running, S::Cancelling, None),
            (S::Cancelling, S::Cancelled, Some(Moment::Cancelled)),
            (S::Running, S::Succeeded, Some(Moment::Succeeded)),
            (S::RollingBack, S::RolledBack, Some(Moment::RolledBack)),
        ] {
            assert_eq!(Moment::of(before, after), expect, "{before:?} {after:?}");
        }
    }

    #[test]
    fn targets_read_as_they_are_written() {
        for json in [
            r#"{"kind":"webhook","url":"https://example.com/hook"}"#,
            r#"{"kind":"dingtalk","access_token_secret":"t","security":{"kind":"sign","secret":"s"}}"#,
            r#"{"kind":"email","server":"mail","port":587,"from":"a@b","to":["c@d"]}"#,
        ] {
            let target: ChannelTarget = serde_json::from_str(json).unwrap();
            let again = serde_json::to_string(&target).unwrap();
            assert_eq!(
                serde_json::from_str::<ChannelTarget>(&again).unwrap(),
                target
            );
        }
        let unknown = r#"{"kind":"webhook","url":"https://e.com","password":"x"}"#;
        assert!(serde_json::from_str::<ChannelTarget>(unknown).is_err());
    }
}
