//! Typed identifiers.
//!
//! An id is a readable prefix, an underscore and a UUIDv7 in 32 lower-case hexadecimal digits, for example
//! `ord_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f`. UUIDv7 sorts by creation time, so lists of ids are lists by age.
//! This module parses and prints ids; it never makes one up: the random bytes and the time are inputs.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Why a text is not an id of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {what}: expected `{prefix}_` followed by 32 hexadecimal digits")]
pub struct InvalidId {
    /// The text as it was given, cut to 80 characters.
    pub text: String,
    /// The prefix that was expected.
    pub prefix: &'static str,
    /// The kind of resource, with its article.
    pub what: &'static str,
}

fn parse(text: &str, prefix: &'static str, what: &'static str) -> Result<Uuid, InvalidId> {
    let invalid = || InvalidId {
        text: text.chars().take(80).collect(),
        prefix,
        what,
    };
    let digits = text
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_prefix('_'))
        .ok_or_else(invalid)?;
    if digits.len() != 32
        || !digits
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    {
        return Err(invalid());
    }
    Uuid::try_parse(digits).map_err(|_| invalid())
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal, $what:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Uuid);

        impl $name {
            /// The prefix before the underscore.
            pub const PREFIX: &'static str = $prefix;

            /// Makes an id from a UUIDv7 that the caller produced.
            #[must_use]
            pub fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The UUID inside.
            #[must_use]
            pub fn uuid(&self) -> Uuid {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "_{}"), self.0.as_simple())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                parse(text, $prefix, $what).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .pattern(Some(concat!("^", $prefix, "_[0-9a-f]{32}$")))
                    .build()
                    .into()
            }
        }

        impl utoipa::ToSchema for $name {}
    )*};
}

ids! {
    /// A cell (deployment unit) of a workspace.
    CellId = "cell", "a cell id";
    /// An application of a tenant.
    AppId = "app", "an application id";
    /// An uploaded package of an application.
    PackageId = "pkg", "a package id";
    /// One attempt to upload a package, successful or not.
    UploadId = "upl", "an upload record id";
    /// A service instance: an application in a workspace.
    InstanceId = "svc", "a service instance id";
    /// A managed server.
    ServerId = "srv", "a server id";
    /// An activation code (the record; the code itself is a secret).
    ActivationCodeId = "act", "an activation code id";
    /// An API token (the record; the token itself is a secret).
    TokenId = "tok", "a token id";
    /// A release, operation or rollback order.
    OrderId = "ord", "an order id";
    /// A pool of back ends behind the traffic seam.
    PoolId = "pool", "a pool id";
    /// One recorded call of a plugin.
    CallId = "call", "a plugin call's id";
    /// A notification channel.
    ChannelId = "chn", "a notification channel id";
    /// One message to one notification channel.
    DeliveryId = "dlv", "a delivery id";
    /// A run of a diagnostic.
    DiagnosisId = "dgn", "a diagnosis id";
    /// A load balancer: HAProxy on a managed server.
    LoadBalancerId = "lb", "a load balancer id";
    /// A listener of a load balancer.
    ListenerId = "lsn", "a listener id";
    /// A certificate of a workspace.
    CertificateId = "crt", "a certificate id";
    /// A process template.
    TemplateId = "tpl", "a process template id";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_and_parse() {
        let id = OrderId::from_uuid(Uuid::from_u128(0x0193_1c0c_5b7e_7c2e_8a4f_6d1b_2c3d_4e5f));
        assert_eq!(id.to_string(), "ord_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f");
        assert_eq!(id.to_string().parse::<OrderId>(), Ok(id));
        assert_eq!(
            serde_json::to_string(&id).unwrap(),
            "\"ord_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f\""
        );
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "ord_",
            "app_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f",
            "ord_01931C0C5B7E7C2E8A4F6D1B2C3D4E5F",
            "ord_01931c0c-5b7e-7c2e-8a4f-6d1b2c3d4e5f",
            "ord_01931c0c5b7e7c2e8a4f6d1b2c3d4e5",
        ] {
            assert!(text.parse::<OrderId>().is_err(), "{text}");
        }
    }
}
