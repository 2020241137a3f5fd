//! A server's inbox: what stands in the store for an agent to do, or to end.
//!
//! Key: `inbox/{server}/{order}/{unit}` below the tenant, one slot per server, order and unit. The engine puts, replaces and
//! deletes slots in its own commits: they *are* the outbox of its dispatches. The gateway reads them, pushes them, and writes
//! nothing but the epoch of a slot that has none, by compare-and-swap, before the first push.
//!
//! ```text
//!              epoch: None                          epoch: Some(of the session)
//!  put ──► never pushed ── stamped, durable ──► may have been pushed ── result committed ──► deleted or replaced
//!              │                                    │
//!              └─ node ended: deleted               └─ node ended: revoked = true, until a result arrives
//! ```
//! A slot whose epoch is not that of the agent's journal is never pushed again: whether its task ran cannot be known.
//! Source: design, "Agents", "Delivery at least once".

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::task::Task;

/// Names one life of an agent's journal: 16 random bytes, made by the agent with the journal's file.
/// Text form: 32 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JournalEpoch([u8; 16]);

/// Why a text is not a journal epoch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a journal epoch: expected 32 lower-case hexadecimal digits")]
pub struct InvalidJournalEpoch;

impl JournalEpoch {
    /// An epoch from its bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for JournalEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for JournalEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for JournalEpoch {
    type Err = InvalidJournalEpoch;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        fn nibble(digit: u8) -> Result<u8, InvalidJournalEpoch> {
            match digit {
                b'0'..=b'9' => Ok(digit - b'0'),
                b'a'..=b'f' => Ok(digit - b'a' + 10),
                _ => Err(InvalidJournalEpoch),
            }
        }
        let digits: &[u8; 32] = text
            .as_bytes()
            .try_into()
            .map_err(|_| InvalidJournalEpoch)?;
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for JournalEpoch {
    type Error = InvalidJournalEpoch;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<JournalEpoch> for String {
    fn from(epoch: JournalEpoch) -> Self {
        epoch.to_string()
    }
}

impl utoipa::PartialSchema for JournalEpoch {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .pattern(Some("^[0-9a-f]{32}$"))
            .build()
            .into()
    }
}

impl utoipa::ToSchema for JournalEpoch {}

/// One slot of a server's inbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InboxEntry {
    /// Schema version of this record.
    pub schema: u32,
    /// The task; holds references to secrets only.
    pub task: Task,
    /// The task is not wanted any more: the agent ends it and answers with a result.
    #[serde(default)]
    pub revoked: bool,
    /// The journal that the task was, or may have been, pushed to. `None`: certainly never pushed.
    #[serde(default)]
    pub epoch: Option<JournalEpoch>,
}

impl InboxEntry {
    /// The current [`InboxEntry::schema`].
    pub const SCHEMA: u32 = 1;

    /// A slot for a task to run. `epoch` is that of the session that is up now; with none, the gateway stamps it later.
    #[must_use]
    pub fn new(task: Task, epoch: Option<JournalEpoch>) -> Self {
        Self {
            schema: Self::SCHEMA,
            task,
            revoked: false,
            epoch,
        }
    }

    /// The same slot with the task no longer wanted.
    #[must_use]
    pub fn revoke(self) -> Self {
        Self {
            revoked: true,
            ..self
        }
    }

    /// What a session with an agent whose journal has this epoch does with the slot.
    #[must_use]
    pub fn delivery(&self, session: JournalEpoch) -> Delivery {
        match (self.epoch, self.revoked) {
            (None, _) => Delivery::Stamp,
            (Some(epoch), _) if epoch != session => Delivery::JournalLost,
            (Some(_), false) => Delivery::Push,
            (Some(_), true) => Delivery::Revoke,
        }
    }
}

/// What is to be done with a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Write the session's epoch into it first.
    Stamp,
    /// Send the task.
    Push,
    /// Send a revoke.
    Revoke,
    /// It was sent under another journal: report `unknown`, send nothing.
    JournalLost,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        task::{Action, Script},
        time::Timestamp,
        value::Value,
    };

    fn task() -> Task {
        Task {
            id: "ord_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f.3.1".parse().unwrap(),
            instance: Some("svc_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f".parse().unwrap()),
            release: None,
            fence: 7,
            expires_at: Timestamp::from_unix_ms(1_700_000_000_000),
            timeout_ms: 60_000,
            run_as: None,
            env: [("PASSWORD".into(), Value::SecretRef("db".into()))].into(),
            action: Action::Script(Script {
                interpreter: vec!["/bin/sh".into()],
                text: "true".into(),
                working_dir: None,
            }),
        }
    }

    #[test]
    fn each_slot_has_one_delivery() {
        let ours = JournalEpoch::from_bytes([1; 16]);
        let other = JournalEpoch::from_bytes([2; 16]);
        let fresh = |epoch| InboxEntry::new(task(), epoch);
        for (entry, expect) in [
            (fresh(None), Delivery::Stamp),
            (fresh(None).revoke(), Delivery::Stamp),
            (fresh(Some(ours)), Delivery::Push),
            (fresh(Some(ours)).revoke(), Delivery::Revoke),
            (fresh(Some(other)), Delivery::JournalLost),
            (fresh(Some(other)).revoke(), Delivery::JournalLost),
        ] {
            assert_eq!(entry.delivery(ours), expect, "{entry:?}");
        }
    }

    #[test]
    fn json_goes_both_ways_and_grows() {
        let epoch = JournalEpoch::from_bytes([0xa5; 16]);
        let entry = InboxEntry::new(task(), Some(epoch)).revoke();
        let mut json = serde_json::to_value(&entry).unwrap();
        assert_eq!(json["epoch"], "a5".repeat(16));
        assert_eq!(json["schema"], 1);
        json["of_a_later_version"] = 1.into();
        assert_eq!(
            serde_json::from_value::<InboxEntry>(json.clone()).unwrap(),
            entry
        );
        // What version 1 has to have; the rest has defaults.
        let object = json.as_object_mut().unwrap();
        object.remove("revoked");
        object.remove("epoch");
        assert_eq!(
            serde_json::from_value::<InboxEntry>(json).unwrap(),
            InboxEntry::new(task(), None)
        );
    }

    #[test]
    fn other_texts_are_no_epoch() {
        for text in [
            "",
            "a5",
            &"A5".repeat(16),
            &"g5".repeat(16),
            &"a5".repeat(17),
        ] {
            assert_eq!(
                text.parse::<JournalEpoch>(),
                Err(InvalidJournalEpoch),
                "{text}"
            );
        }
    }
}
