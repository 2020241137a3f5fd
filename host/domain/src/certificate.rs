//! Certificates of a workspace, for load balancers. Source: spec "Load balancers".
//!
//! A certificate never changes: another one is another record. Its private key stands sealed beside it and is never shown.

use serde::{Deserialize, Serialize};

use crate::{
    id::CertificateId,
    name::{CertificateName, WorkspaceName},
    time::Timestamp,
};

/// Days before its end at which an event is raised.
pub const EXPIRY_EVENTS_DAYS: [u32; 3] = [30, 7, 1];

const DAY_MS: u64 = 86_400_000;

/// A certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Certificate {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: CertificateId,
    /// Name: unique in the workspace.
    pub name: CertificateName,
    /// Workspace.
    pub workspace: WorkspaceName,
    /// The chain as PEM: the server's certificate first, then intermediates.
    pub chain: String,
    /// Whom the server's certificate is for, as it says itself.
    pub subject: String,
    /// Who issued it.
    pub issuer: String,
    /// Host names and addresses that it is for.
    pub names: Vec<String>,
    /// From when it is valid.
    pub not_before: Timestamp,
    /// Until when the whole chain is valid.
    pub not_after: Timestamp,
    /// The last event about its end that was raised: so many days ahead.
    #[serde(default)]
    pub warned_days: Option<u32>,
    /// When it was uploaded.
    pub created_at: Timestamp,
}

impl Certificate {
    /// The current [`Certificate::schema`].
    pub const SCHEMA: u32 = 1;

    /// The event about its end that is due now, as days ahead: the nearest that time has come for, unless it, or one nearer
    /// to the end, was raised before.
    #[must_use]
    pub fn event_due(&self, now: Timestamp) -> Option<u32> {
        let left_ms = self.not_after.since_ms(now);
        let reached = EXPIRY_EVENTS_DAYS
            .into_iter()
            .filter(|days| left_ms <= u64::from(*days) * DAY_MS)
            .min()?;
        match self.warned_days {
            Some(warned) if warned <= reached => None,
            Some(_) | None => Some(reached),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_falls_due_once_and_the_nearest_counts() {
        let end = Timestamp::from_unix_ms(100 * 86_400_000);
        let mut certificate = Certificate {
            schema: Certificate::SCHEMA,
            id: CertificateId::from_uuid(uuid::Uuid::from_u128(1)),
            name: "a".parse().unwrap(),
            workspace: "prod".parse().unwrap(),
            chain: String::new(),
            subject: String::new(),
            issuer: String::new(),
            names: Vec::new(),
            not_before: Timestamp::from_unix_ms(0),
            not_after: end,
            warned_days: None,
            created_at: Timestamp::from_unix_ms(0),
        };
        let at = |days_before: i64| Timestamp::from_unix_ms((100 - days_before) * 86_400_000);
        for (days_before, warned, expect) in [
            (31, None, None),
            (30, None, Some(30)),
            (30, Some(30), None),
            (7, Some(30), Some(7)),
            (6, Some(7), None),
            (1, Some(7), Some(1)),
            (1, None, Some(1)),
            (0, Some(1), None),
            (-5, None, Some(1)),
        ] {
            certificate.warned_days = warned;
            assert_eq!(
                certificate.event_due(at(days_before)),
                expect,
                "{days_before} {warned:?}"
            );
        }
    }
}
