//! What happened to plugins without a person asking for it, and what people decided about that: a short history.
//!
//! The newest [`KEPT`] events are kept.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use windlass_domain::{Timestamp, manifest::PluginRef};
use windlass_store::{Store, Txn};

use super::{PageOf, PageRequest, ServiceError, records};
use crate::{clock, ids, keys};

/// Events that are kept.
pub const KEPT: usize = 1000;
/// Characters of a message.
const MESSAGE_MAX_CHARS: usize = 1000;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PluginEventKind {
    /// A version failed again and again on one function. It is called all the same: an operator decides.
    Failing,
    /// An operator looked at a failing version, and it counts anew.
    FailingCleared,
    /// A version is compared with the default from now on.
    ShadowStarted,
    /// A compared version answered something else than the default: it is not promoted by itself any more.
    ShadowDiffered,
    /// A compared version was made the default.
    ShadowPromoted,
    /// The comparison was ended.
    ShadowCancelled,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PluginEvent {
    /// When.
    pub at: Timestamp,
    /// What happened.
    pub kind: PluginEventKind,
    /// To which version.
    pub plugin: PluginRef,
    /// By whom; `windlass` where nobody asked for it.
    pub by: String,
    /// For people.
    pub message: String,
}

/// The history. Cheap to clone.
#[derive(Clone)]
pub struct PluginEvents {
    store: Arc<dyn Store>,
}

impl PluginEvents {
    /// Over a store.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// The part of a transaction that keeps an event.
    pub(crate) fn put(kind: PluginEventKind, plugin: &PluginRef, by: &str, message: &str) -> Txn {
        let event = PluginEvent {
            at: clock::now(),
            kind,
            plugin: plugin.clone(),
            by: by.to_owned(),
            message: message.chars().take(MESSAGE_MAX_CHARS).collect(),
        };
        Txn::new().put(
            keys::plugin_event(&ids::new_uuid().simple().to_string()),
            records::encode(&event),
        )
    }

    /// A page of events, newest first.
    ///
    /// # Errors
    /// Those of the store; a limit for the page's size.
    pub async fn list(&self, page: &PageRequest) -> Result<PageOf<PluginEvent>, ServiceError> {
        records::list_rows(
            &*self.store,
            &keys::plugin_events(),
            records::Sort::Falling,
            page,
            |entry| async move { Ok(Some(records::decode_plain(&entry, "an event of a plugin")?)) },
            |_| true,
        )
        .await
    }
}
