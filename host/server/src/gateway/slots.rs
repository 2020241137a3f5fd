//! What a session does with the slots of its inbox: reads each again, stamps it, pushes or revokes its task.
//!
//! Owns what was sent in this session, so that a slot is sent once however often it is looked at. It reports by itself where
//! nothing can be sent: `unknown` for a slot of another journal. A task that cannot be pushed (a secret is missing, or the
//! message is too large) is revoked at the agent instead: only the agent knows whether it started under an earlier push.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use tokio::io::{AsyncRead, AsyncWrite};
use windlass_domain::{
    inbox::{Delivery, InboxEntry},
    task::{Action, Fault, Outcome, PackageFormat, Task, TaskId, TaskResult},
    value::Value,
};
use windlass_protocol::{
    EncodeError, PLACE_FILES_VERSION, SERVER_WORK_VERSION, TAR_FORMATS_VERSION, TaskPush, ToAgent,
};
use windlass_store::{
    CommitError, Entry, Key, LimitError, PAGE_MAX_ENTRIES, Prefix, Revision, StoreError, Txn,
    crash::crash_point,
};

use super::{
    Gateway,
    grants::GrantId,
    secrets::SecretError,
    session::{AckFor, Loop, OutKind, Session, Waiting, Writer},
};
use crate::clock;

/// Why a slot was not delivered now.
#[derive(Debug, thiserror::Error)]
pub(super) enum SlotError {
    #[error("the inbox could not be read")]
    Store(#[from] StoreError),
    #[error("a slot could not be stamped")]
    Stamp(#[from] CommitError),
    #[error("the secrets of a task could not be read")]
    Secrets(#[from] SecretError),
    #[error("the key of an inbox is not right")]
    Key(#[from] LimitError),
    #[error("a revoke could not be written")]
    Encode(#[from] EncodeError),
}

/// A slot that was dealt with in this session.
struct Dealt {
    revision: Revision,
    task: Option<TaskId>,
    grant: Option<GrantId>,
}

/// The slots of one session.
pub(super) struct Slots {
    dealt: HashMap<Key, Dealt>,
}

impl Slots {
    pub(super) fn new() -> Self {
        Self {
            dealt: HashMap::new(),
        }
    }

    /// Looks at slots. What finds no room goes back to the session.
    ///
    /// # Errors
    /// [`SlotError`]: look at all of them again later.
    pub(super) async fn handle<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        gateway: &Gateway,
        session: &Arc<Session>,
        work: Waiting,
        writer: &mut Writer<S>,
        state: &mut Loop,
    ) -> Result<(), SlotError> {
        let store = &gateway.inner.parts.store;
        let mut turn = Turn {
            gateway,
            session,
            writer,
            state,
        };
        if work.all {
            let prefix = Prefix::from_segments(["default", "inbox", &session.server.to_string()])?;
            let mut after: Option<Key> = None;
            let mut found = BTreeSet::new();
            loop {
                let page = store
                    .scan(&prefix, after.as_ref(), PAGE_MAX_ENTRIES)
                    .await?;
                after = page.entries.last().map(|entry| entry.key.clone());
                for entry in page.entries {
                    found.insert(entry.key.clone());
                    if turn.writer.has_room() {
                        self.slot(&mut turn, entry).await?;
                    } else {
                        session.inbox().keys.insert(entry.key);
                    }
                }
                if !page.more || after.is_none() {
                    break;
                }
            }
            let gone: Vec<Key> = self
                .dealt
                .keys()
                .filter(|key| !found.contains(*key))
                .cloned()
                .collect();
            for key in gone {
                self.forget(gateway, &key);
            }
        }
        for key in work.keys {
            if !turn.writer.has_room() {
                session.inbox().keys.insert(key);
                continue;
            }
            match store.get(&key).await? {
                Some(entry) => self.slot(&mut turn, entry).await?,
                None => self.forget(gateway, &key),
            }
        }
        Ok(())
    }

    /// The slot is gone or holds another task: what was granted for it ends.
    fn forget(&mut self, gateway: &Gateway, key: &Key) {
        if let Some(Dealt {
            grant: Some(grant), ..
        }) = self.dealt.remove(key)
        {
            gateway.inner.grants.take_back(grant);
        }
    }

    async fn slot<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        turn: &mut Turn<'_, S>,
        entry: Entry,
    ) -> Result<(), SlotError> {
        let (session, gateway) = (turn.session, turn.gateway);
        let mut current = Some(entry);
        while let Some(Entry {
            key,
            value,
            revision,
            ..
        }) = current.take()
        {
            if self
                .dealt
                .get(&key)
                .is_some_and(|dealt| dealt.revision == revision)
            {
                return Ok(());
            }
            let slot: InboxEntry = match serde_json::from_slice(&value) {
                Ok(slot) => slot,
                Err(error) => {
                    tracing::error!(%key, %error, "an inbox slot cannot be read: it was written by another version, or is damaged");
                    self.deal(gateway, key, revision, None, None);
                    return Ok(());
                }
            };
            match slot.delivery(session.epoch) {
                Delivery::Stamp => {
                    crash_point("gateway.before_stamp");
                    current = turn.stamp(&key, revision, slot).await?;
                    crash_point("gateway.after_stamp");
                }
                Delivery::Push => {
                    let id = slot.task.id;
                    let grant = turn.push(slot.task).await?;
                    self.deal(gateway, key, revision, Some(id), grant);
                }
                Delivery::Revoke => {
                    let task_id = slot.task.id;
                    turn.writer
                        .put(&ToAgent::Revoke { task_id }, OutKind::Other)?;
                    self.deal(gateway, key, revision, Some(task_id), None);
                }
                Delivery::JournalLost => {
                    turn.state
                        .report(slot.task.id, journal_lost(), AckFor::Nobody);
                    self.deal(gateway, key, revision, Some(slot.task.id), None);
                }
            }
        }
        Ok(())
    }

    fn deal(
        &mut self,
        gateway: &Gateway,
        key: Key,
        revision: Revision,
        task: Option<TaskId>,
        grant: Option<GrantId>,
    ) {
        let before = self.dealt.insert(
            key,
            Dealt {
                revision,
                task,
                grant,
            },
        );
        if let Some(Dealt {
            grant: Some(grant),
            task: before,
            ..
        }) = before
        {
            // A revoked fetch ends with its session or slot at the latest; another task ends it now.
            if before != task {
                gateway.inner.grants.take_back(grant);
            }
        }
    }
}

/// What a slot is dealt with by.
struct Turn<'a, S> {
    gateway: &'a Gateway,
    session: &'a Arc<Session>,
    writer: &'a mut Writer<S>,
    state: &'a mut Loop,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Turn<'_, S> {
    /// Writes the session's epoch into a slot that has none. Returns the slot as it stands then, whoever wrote it.
    async fn stamp(
        &mut self,
        key: &Key,
        revision: Revision,
        slot: InboxEntry,
    ) -> Result<Option<Entry>, SlotError> {
        let store = &self.gateway.inner.parts.store;
        let epoch = Some(self.session.epoch);
        let stamped = InboxEntry { epoch, ..slot };
        let value = serde_json::to_vec(&stamped).expect("the record has string keys");
        let txn = Txn::new()
            .revision_is(key.clone(), revision)
            .put(key.clone(), value);
        match store.commit(txn).await {
            // Somebody was faster: the slot is read again like after our own commit.
            Ok(_) | Err(CommitError::Conflict { .. }) => Ok(store.get(key).await?),
            Err(error) => Err(error.into()),
        }
    }

    async fn push(&mut self, task: Task) -> Result<Option<GrantId>, SlotError> {
        let (gateway, session, id) = (self.gateway, self.session, task.id);
        if let Some((needed, what)) = needs_version(&task)
            && session.protocol < needed
        {
            let message = format!(
                "the agent of {} speaks version {} of the protocol, and {what} needs {needed}: upgrade \
                 the agent",
                session.server_name, session.protocol
            );
            let fault = Some(Fault::AgentTooOld);
            return self.revoke_instead(id, message, fault).map(|()| None);
        }
        let names: BTreeSet<String> = task
            .env
            .values()
            .filter_map(|value| match value {
                Value::SecretRef(name) => Some(name.clone()),
                Value::Plain(_) => None,
            })
            .collect();
        let secrets = if names.is_empty() {
            Default::default()
        } else {
            let source = &gateway.inner.parts.secrets;
            source.resolve(&session.workspace, &names).await?
        };
        let missing: Vec<&str> = names
            .iter()
            .filter(|name| !secrets.contains_key(*name))
            .map(String::as_str)
            .collect();
        // What has started does not need them: it is pushed, so that the agent answers where it is.
        if !missing.is_empty() && !self.state.may_have_started(id) {
            let names = missing.join("`, `");
            let message = format!(
                "the secret `{names}` has no value in the workspace `{}`: set it, then retry the step",
                session.workspace
            );
            return self.revoke_instead(id, message, None).map(|()| None);
        }
        let (grant_id, grant) = match &task.action {
            Action::Fetch(package) => {
                let ended = session.ended.clone();
                let (id, grant) = gateway.inner.grants.give(session.id, package.digest, ended);
                (Some(id), Some(grant))
            }
            Action::Script(_)
            | Action::Unpack { .. }
            | Action::WriteFile { .. }
            | Action::Activate(_)
            | Action::Start(_)
            | Action::StopSupervised { .. }
            | Action::PlaceFiles(_)
            | Action::Check(_) => (None, None),
        };
        let push = TaskPush {
            task,
            secrets,
            grant,
        };
        match self
            .writer
            .put(&ToAgent::Task(Box::new(push)), OutKind::Push)
        {
            Ok(()) => Ok(grant_id),
            Err(error) => {
                if let Some(grant) = grant_id {
                    gateway.inner.grants.take_back(grant);
                }
                let message = format!(
                    "the task with its secrets cannot be sent to the agent: {error}; use fewer or shorter secrets"
                );
                self.revoke_instead(id, message, None).map(|()| None)
            }
        }
    }

    fn revoke_instead(
        &mut self,
        task_id: TaskId,
        message: String,
        fault: Option<Fault>,
    ) -> Result<(), SlotError> {
        tracing::warn!(server.id = %self.session.server, task.id = %task_id, reason = %message, "a task cannot be pushed");
        self.state.unpushable.insert(task_id, (message, fault));
        self.writer
            .put(&ToAgent::Revoke { task_id }, OutKind::Other)?;
        Ok(())
    }
}

/// The outcome of a task that was sent under a journal that the agent no longer has.
fn journal_lost() -> TaskResult {
    TaskResult {
        outcome: Outcome::Unknown,
        exit_code: None,
        output: String::new(),
        dropped_bytes: 0,
        message: "the agent's journal was lost after the task was sent (it was deleted, damaged or replaced): \
                  whether it ran cannot be known; look at the server, then retry or ignore the step"
            .to_owned(),
        fault: Some(Fault::NotReported),
        started_at: None,
        finished_at: clock::now(),
    }
}

/// The version of the protocol that a task needs, where the first is too old, and what needs it.
fn needs_version(task: &Task) -> Option<(u32, &'static str)> {
    match &task.action {
        Action::PlaceFiles(_) => Some((PLACE_FILES_VERSION, "the placing of files")),
        Action::Fetch(package) | Action::Unpack { package, .. }
            if is_newer_format(package.format) =>
        {
            Some((TAR_FORMATS_VERSION, "packages of this format"))
        }
        Action::Activate(manifest) if is_newer_format(manifest.package.format) => {
            Some((TAR_FORMATS_VERSION, "packages of this format"))
        }
        Action::Script(_)
        | Action::Fetch(_)
        | Action::Unpack { .. }
        | Action::WriteFile { .. }
        | Action::Activate(_)
        | Action::Start(_)
        | Action::StopSupervised { .. }
        | Action::Check(_) => task
            .instance
            .is_none()
            .then_some((SERVER_WORK_VERSION, "work that is of no service instance")),
    }
}

/// Whether agents before [`TAR_FORMATS_VERSION`] do not know a package format.
fn is_newer_format(format: PackageFormat) -> bool {
    match format {
        PackageFormat::Tar
        | PackageFormat::TarXz
        | PackageFormat::TarZst
        | PackageFormat::TarBz2 => true,
        PackageFormat::TarGz | PackageFormat::Zip | PackageFormat::Jar | PackageFormat::Plain => {
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use windlass_domain::{
        Digest, Timestamp,
        id::{InstanceId, OrderId},
        task::PackageRef,
    };

    use super::*;

    #[test]
    fn tasks_with_a_newer_package_format_need_an_agent_that_knows_it() {
        for (format, expected) in [
            (PackageFormat::TarGz, None),
            (PackageFormat::Zip, None),
            (PackageFormat::Jar, None),
            (PackageFormat::Plain, None),
            (PackageFormat::Tar, Some(TAR_FORMATS_VERSION)),
            (PackageFormat::TarXz, Some(TAR_FORMATS_VERSION)),
            (PackageFormat::TarZst, Some(TAR_FORMATS_VERSION)),
            (PackageFormat::TarBz2, Some(TAR_FORMATS_VERSION)),
        ] {
            let package = PackageRef {
                digest: Digest::of(b"package"),
                size_bytes: 7,
                format,
                file_name: "shop".to_owned(),
                version: "1.0.0".to_owned(),
            };
            let unpack = Action::Unpack {
                package: package.clone(),
                release: "r".to_owned(),
            };
            for action in [Action::Fetch(package), unpack] {
                let task = Task {
                    id: TaskId {
                        order: OrderId::from_uuid(uuid::Uuid::nil()),
                        node: 1,
                        attempt: 1,
                    },
                    instance: Some(InstanceId::from_uuid(uuid::Uuid::nil())),
                    release: None,
                    fence: 1,
                    expires_at: Timestamp::default(),
                    timeout_ms: 1000,
                    run_as: None,
                    env: std::collections::BTreeMap::new(),
                    action,
                };
                let needed = needs_version(&task).map(|(version, _)| version);
                assert_eq!(needed, expected, "{format:?}");
            }
        }
    }
}
