//! Activation codes: how servers arrive. Source: spec "Managed servers".
//!
//! The record holds the hash of the code's secret only. [`ActivationCode::refuses`] is the one place that decides whether a
//! code can be redeemed; the service takes its quota by compare-and-swap.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    id::ActivationCodeId,
    name::{CellName, InvalidValue, NamePrefix, WorkspaceName, check_length},
    time::Timestamp,
    workspace::Network,
};

/// Quota of a code at most.
pub const MAX_QUOTA: u32 = 1000;
/// Validity of a code at most, in hours.
pub const MAX_VALIDITY_H: u32 = 24;
/// Allowed sources of a code at most.
pub const MAX_SOURCES: usize = 100;

/// An activation code as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActivationCode {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: ActivationCodeId,
    /// Workspace that servers register into.
    pub workspace: WorkspaceName,
    /// Hash of its secret.
    pub secret_hash: Digest,
    /// Start of the names of servers.
    pub name_prefix: NamePrefix,
    /// Cell that servers are put into; `None`: assigned later, or the only one there is.
    #[serde(default)]
    pub cell: Option<CellName>,
    /// Addresses or IPv4 networks it may be used from; empty: any.
    #[serde(default)]
    pub allowed_sources: Vec<String>,
    /// How many servers may register.
    pub quota: u32,
    /// How many have.
    #[serde(default)]
    pub used: u32,
    /// Until when it can be used.
    pub expires_at: Timestamp,
    /// Description, at most 500 characters.
    #[serde(default)]
    pub description: String,
    /// No longer usable, by hand.
    #[serde(default)]
    pub disabled: bool,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Why a code cannot be redeemed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodeRefusal {
    /// Disabled.
    #[error("the activation code is disabled; ask for a new one")]
    Disabled,
    /// Too late.
    #[error("the activation code expired at {at}; ask for a new one")]
    Expired {
        /// When.
        at: Timestamp,
    },
    /// Used up.
    #[error(
        "the activation code is used up: {quota} of {quota} servers have registered; ask for a new one"
    )]
    UsedUp {
        /// Its quota.
        quota: u32,
    },
    /// Wrong place.
    #[error(
        "the activation code may not be used from {from}; register from an allowed address, or ask for a code that allows it"
    )]
    Source {
        /// From where it was tried.
        from: IpAddr,
    },
}

impl ActivationCode {
    /// The current [`ActivationCode::schema`].
    pub const SCHEMA: u32 = 1;

    /// Whether it cannot be redeemed now from there.
    ///
    /// # Errors
    /// Why not.
    pub fn refuses(&self, now: Timestamp, from: IpAddr) -> Result<(), CodeRefusal> {
        if self.disabled {
            return Err(CodeRefusal::Disabled);
        }
        if now >= self.expires_at {
            return Err(CodeRefusal::Expired {
                at: self.expires_at,
            });
        }
        if self.used >= self.quota {
            return Err(CodeRefusal::UsedUp { quota: self.quota });
        }
        let from = from.to_canonical();
        if !self.allowed_sources.is_empty()
            && !self.allowed_sources.iter().any(|source| fits(source, from))
        {
            return Err(CodeRefusal::Source { from });
        }
        Ok(())
    }

    /// Checks sources, quota and texts.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn validate(&self) -> Result<(), (&'static str, InvalidValue)> {
        if self.quota == 0 || self.quota > MAX_QUOTA {
            return Err((
                "quota",
                InvalidValue::limit(
                    format!("the quota is 1 to {MAX_QUOTA} servers"),
                    u64::from(MAX_QUOTA),
                    u64::from(self.quota),
                ),
            ));
        }
        if self.allowed_sources.len() > MAX_SOURCES {
            return Err((
                "allowed_sources",
                InvalidValue::limit(
                    format!("at most {MAX_SOURCES} sources"),
                    MAX_SOURCES as u64,
                    self.allowed_sources.len() as u64,
                ),
            ));
        }
        for source in &self.allowed_sources {
            if source.parse::<IpAddr>().is_err() && source.parse::<Network>().is_err() {
                return Err((
                    "allowed_sources",
                    InvalidValue::rule(format!(
                        "`{source}` is neither an address nor an IPv4 network such as `10.2.0.0/16`"
                    )),
                ));
            }
        }
        check_length("the description", &self.description, 0, 500)
            .map_err(|error| ("description", error))
    }
}

fn fits(source: &str, from: IpAddr) -> bool {
    match (source.parse::<IpAddr>(), source.parse::<Network>(), from) {
        (Ok(address), _, _) => address.to_canonical() == from,
        (Err(_), Ok(network), IpAddr::V4(from)) => network.holds(from),
        (Err(_), _, _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code() -> ActivationCode {
        ActivationCode {
            schema: ActivationCode::SCHEMA,
            id: ActivationCodeId::from_uuid(uuid::Uuid::nil()),
            workspace: "test".parse().unwrap(),
            secret_hash: Digest::of(b""),
            name_prefix: "web".parse().unwrap(),
            cell: None,
            allowed_sources: vec!["10.2.0.0/16".into(), "192.0.2.7".into()],
            quota: 2,
            used: 1,
            expires_at: Timestamp::from_unix_ms(1000),
            description: String::new(),
            disabled: false,
            created_at: Timestamp::default(),
        }
    }

    #[test]
    fn each_reason_to_refuse() {
        let at = Timestamp::from_unix_ms;
        let from = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(code().refuses(at(999), from("10.2.3.4")), Ok(()));
        assert_eq!(code().refuses(at(999), from("::ffff:192.0.2.7")), Ok(()));
        let mut used = code();
        used.used = 2;
        let mut disabled = code();
        disabled.disabled = true;
        assert_eq!(
            code().refuses(at(1000), from("10.2.3.4")),
            Err(CodeRefusal::Expired { at: at(1000) })
        );
        assert_eq!(
            used.refuses(at(0), from("10.2.3.4")),
            Err(CodeRefusal::UsedUp { quota: 2 })
        );
        assert_eq!(
            disabled.refuses(at(0), from("10.2.3.4")),
            Err(CodeRefusal::Disabled)
        );
        assert_eq!(
            code().refuses(at(0), from("10.3.0.1")),
            Err(CodeRefusal::Source {
                from: from("10.3.0.1")
            })
        );
    }

    #[test]
    fn quota_at_its_limits() {
        for (quota, good) in [(0, false), (1, true), (1000, true), (1001, false)] {
            let code = ActivationCode { quota, ..code() };
            assert_eq!(code.validate().is_ok(), good, "{quota}");
        }
    }
}
