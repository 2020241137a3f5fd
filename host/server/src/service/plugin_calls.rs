//! Recorded calls of plugins: looking at them, making them again, and asking what another version would have answered.
//!
//! The journal itself is the runtime's (`windlass_runtime::journal`); this finds the plugin that a replay needs, and bounds what
//! one request can cost. Nothing here is live: replays are neither recorded nor counted.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use windlass_domain::{id::CallId, manifest::PluginRef, plugin::Descriptor};
use windlass_runtime::{
    LookupError, Plugin, Plugins, Rejection, Trial,
    journal::{CallFilter, CallSummary, Journal, JournalError, JournalState, JournaledCall},
    replay::{ReplayTotals, ReplayVerdict, Replayed, replay},
};

use super::{PageOf, ServiceError};

/// Calls that a preview makes again at most, and unless told.
pub const PREVIEW_MAX_CALLS: usize = 1000;
/// Calls of a preview unless told.
pub const PREVIEW_CALLS: usize = 100;
/// No further call is made again when a preview took so long.
const PREVIEW_TIME: Duration = Duration::from_secs(60);
/// Calls that one export holds at most.
pub const EXPORT_MAX_CALLS: usize = 100_000;
/// Replays that differ, and are told in full by a preview; the rest is counted.
const PREVIEW_DETAILS: usize = 50;

/// Recorded calls. Cheap to clone.
#[derive(Clone)]
pub struct PluginCalls {
    journal: Arc<Journal>,
    plugins: Arc<Plugins>,
}

/// What a candidate would have answered to recorded calls.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Preview {
    /// The candidate.
    pub candidate: PluginRef,
    /// What it says of itself.
    pub descriptor: Descriptor,
    /// Name of the key that signed it.
    pub signed_by: Option<String>,
    /// All replays in figures, time and memory of records and replays beside each other.
    pub totals: ReplayTotals,
    /// The replays that are not equal, newest first; at most 50.
    pub differences: Vec<Replayed>,
    /// Whether every wanted call was made again; false: the time of a preview (60 s) was over before.
    pub complete: bool,
}

impl PluginCalls {
    /// Over the journal and the registry.
    #[must_use]
    pub fn new(journal: Arc<Journal>, plugins: Arc<Plugins>) -> Self {
        Self { journal, plugins }
    }

    /// A page of calls, newest first. May hold fewer calls than asked for although there is a next page.
    ///
    /// # Errors
    /// A limit for the page's size, a cursor that is none, those of the journal.
    pub async fn list(
        &self,
        filter: CallFilter,
        page: super::PageRequest,
    ) -> Result<PageOf<CallSummary>, ServiceError> {
        let before = page
            .cursor
            .as_deref()
            .map(|cursor| {
                cursor.parse::<CallId>().map_err(|_| {
                    ServiceError::invalid(
                        "cursor_invalid",
                        "cursor",
                        "the cursor is not one of this list",
                        "start again without a cursor",
                    )
                })
            })
            .transpose()?;
        let found = self
            .journal
            .list(filter, before, page.size)
            .await
            .map_err(unreadable)?;
        Ok(PageOf {
            items: found.items,
            next: found.next.map(|id| id.to_string()),
        })
    }

    /// One call with what went in and out.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]: never recorded, dropped, or too old.
    pub async fn get(&self, id: CallId) -> Result<JournaledCall, ServiceError> {
        self.journal
            .get(id)
            .await
            .map_err(unreadable)?
            .ok_or_else(|| ServiceError::not_found("recorded call", id))
    }

    /// The newest calls as lines of JSON.
    pub async fn export(
        &self,
        filter: CallFilter,
        limit: usize,
    ) -> mpsc::Receiver<Result<Vec<u8>, JournalError>> {
        self.journal
            .newest(filter, limit.min(EXPORT_MAX_CALLS))
            .await
    }

    /// What the journal holds and what it lost.
    #[must_use]
    pub fn state(&self) -> JournalState {
        self.journal.state()
    }

    /// Makes a call again: with the bytes that it was made with, or with another version of the plugin.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]; `plugin_not_available` when the version is not there or cannot be called.
    pub async fn replay(
        &self,
        id: CallId,
        version: Option<&semver::Version>,
    ) -> Result<Replayed, ServiceError> {
        let call = self.get(id).await?;
        let plugin = match version {
            None => self.plugins.pinned(call.summary.plugin.digest).await,
            Some(version) => self.version(&call.summary.plugin.name, version).await,
        }
        .map_err(|error| not_available(if version.is_some() { "/version" } else { "" }, &error))?;
        Ok(replay(&plugin, &call).await)
    }

    /// A version of a plugin that can be called, whether or not it can be planned with; the one that a file provides before one
    /// that is retired.
    pub(crate) async fn version(
        &self,
        name: &str,
        version: &semver::Version,
    ) -> Result<Plugin, LookupError> {
        let digest = self
            .plugins
            .list()
            .into_iter()
            .filter(|status| {
                status.descriptor.as_ref().is_some_and(|descriptor| {
                    descriptor.name == name && descriptor.version == *version
                })
            })
            .max_by_key(|status| status.file.is_some())
            .and_then(|status| status.digest)
            .ok_or_else(|| LookupError::NoSuchVersion {
                name: name.to_owned(),
                wanted: version.to_string(),
                active: "listed at /v1/plugins".to_owned(),
            })?;
        self.plugins.pinned(digest).await
    }

    /// Checks a candidate for a plugin as a dropped file would be, and makes the newest recorded calls of that plugin again with
    /// it. Nothing of it is kept, and it is not live.
    ///
    /// # Errors
    /// `plugin_rejected` with the reason; `plugin_name_differs`; a limit for the number of calls; those of the journal.
    pub async fn preview(
        &self,
        name: &str,
        bytes: Vec<u8>,
        signature: Option<Vec<u8>>,
        filter: CallFilter,
        last: usize,
    ) -> Result<Preview, ServiceError> {
        if last > PREVIEW_MAX_CALLS {
            return Err(ServiceError::Limit {
                code: "out_of_limit",
                field: "last".to_owned(),
                message: format!(
                    "a preview makes at most {PREVIEW_MAX_CALLS} calls again, {last} were asked for"
                ),
                limit: PREVIEW_MAX_CALLS as u64,
                current: last as u64,
                mend: "ask for fewer calls, or export the journal and replay it with `windlass plugin replay`"
                    .to_owned(),
            });
        }
        let Trial { plugin, signed_by } = self
            .plugins
            .trial(bytes, signature)
            .await
            .map_err(|rejection| rejected(&rejection))?;
        let candidate = plugin.reference().clone();
        if candidate.name != name {
            return Err(ServiceError::invalid(
                "plugin_name_differs",
                "body",
                format!(
                    "the file says that it is `{}`, and a candidate for `{name}` is asked for",
                    candidate.name
                ),
                format!(
                    "send a file of `{name}`, or use /v1/plugins/{}/preview",
                    candidate.name
                ),
            ));
        }
        let filter = CallFilter {
            plugin: Some(name.to_owned()),
            ..filter
        };
        let mut totals = ReplayTotals::default();
        let mut differences = Vec::new();
        let mut complete = true;
        let started = Instant::now();
        let mut lines = self.journal.newest(filter, last).await;
        while let Some(line) = lines.recv().await {
            if started.elapsed() > PREVIEW_TIME {
                complete = false;
                break;
            }
            let line = line.map_err(unreadable)?;
            let call = serde_json::from_slice(&line)
                .map_err(|error| ServiceError::internal("read a recorded call", error))?;
            let replayed = replay(&plugin, &call).await;
            totals.add(&replayed);
            if replayed.verdict != ReplayVerdict::Equal && differences.len() < PREVIEW_DETAILS {
                differences.push(replayed);
            }
        }
        Ok(Preview {
            candidate,
            descriptor: (**plugin.descriptor()).clone(),
            signed_by,
            totals,
            differences,
            complete,
        })
    }
}

pub(crate) fn unreadable(error: JournalError) -> ServiceError {
    ServiceError::internal("read the call journal", error)
}

pub(crate) fn not_available(field: &str, error: &LookupError) -> ServiceError {
    ServiceError::invalid(
        "plugin_not_available",
        field,
        error.to_string(),
        "see /v1/plugins for what is loaded and why something is not",
    )
}

/// The file of a request is no plugin; the stable code of the reason stands in the text.
pub(crate) fn rejected(rejection: &Rejection) -> ServiceError {
    let code = serde_json::to_value(rejection.code)
        .ok()
        .and_then(|code| code.as_str().map(str::to_owned))
        .unwrap_or_default();
    ServiceError::invalid(
        "plugin_rejected",
        "body",
        format!("the file is not accepted as a plugin ({code}): {rejection}"),
        "mend the plugin, and check it with `windlass plugin check`",
    )
}
