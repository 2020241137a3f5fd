//! System events, as people read them. Source: spec "System events".
//!
//! Raised by whoever sees them ([`crate::gateway::events`]); kept as [`KEPT`], [`KEPT_MS`] and [`KEPT_MAX`] say.

use std::sync::Arc;

use windlass_domain::id::ServerId;
use windlass_store::Store;

use super::{PageOf, PageRequest, ServiceError, records};
use crate::{
    gateway::events::{EventKind, EventLevel, SystemEvent},
    keys,
};

/// So many of the newest events stay, whatever their age.
pub const KEPT: usize = 1000;
/// The others stay for so long, in milliseconds: 7 days.
pub const KEPT_MS: u64 = 7 * 24 * 3_600_000;
/// So many stay at most, whatever their age.
pub const KEPT_MAX: usize = 10_000;

/// Which events; all conditions that are given must hold.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    /// On this server.
    pub server: Option<ServerId>,
    /// Of this kind.
    pub kind: Option<EventKind>,
    /// As bad as this.
    pub level: Option<EventLevel>,
}

impl EventFilter {
    fn fits(&self, event: &SystemEvent) -> bool {
        self.server
            .is_none_or(|wanted| event.server == Some(wanted))
            && self.kind.is_none_or(|wanted| event.kind == wanted)
            && self.level.is_none_or(|wanted| event.level == wanted)
    }
}

/// The events. Cheap to clone.
#[derive(Clone)]
pub struct SystemEvents {
    store: Arc<dyn Store>,
}

impl SystemEvents {
    /// Over a store.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// A page of events, newest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; those of the store.
    pub async fn list(
        &self,
        filter: &EventFilter,
        page: &PageRequest,
    ) -> Result<PageOf<SystemEvent>, ServiceError> {
        records::list_rows(
            &*self.store,
            &keys::events(),
            records::Sort::Falling,
            page,
            |entry| async move { Ok(Some(records::decode_plain(&entry, "a system event")?)) },
            |event| filter.fits(event),
        )
        .await
    }
}
