//! The safety envelope's limits: a field of the order, never of plugin parameters.
//!
//! Source: spec "Release orders", "Limits of the order itself"; design, "Safety envelope".

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A count or a share. JSON: a number, or text such as `"50%"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// So many.
    Count(u32),
    /// So many of a hundred, 0 to 100.
    Percent(u8),
}

/// Why a text is not an amount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is neither a count nor a share: expected for example `3` or `\"25%\"` (at most 100%)"
)]
pub struct InvalidAmount(String);

impl Amount {
    /// How many of `total` this is; shares are rounded down.
    #[must_use]
    pub fn of(self, total: u32) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Percent(percent) => {
                u32::try_from(u64::from(total) * u64::from(percent) / 100).unwrap_or(u32::MAX)
            }
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl FromStr for Amount {
    type Err = InvalidAmount;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidAmount(text.chars().take(40).collect());
        match text.strip_suffix('%') {
            Some(percent) => percent
                .parse()
                .ok()
                .filter(|percent| *percent <= 100)
                .map(Self::Percent)
                .ok_or_else(invalid),
            None => text.parse().map(Self::Count).map_err(|_| invalid()),
        }
    }
}

impl Serialize for Amount {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Count(count) => serializer.serialize_u32(*count),
            Self::Percent(_) => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "expected a count such as 3 or a share such as \"25%\""
        )]
        enum Form {
            Count(u32),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Count(count) => Ok(Self::Count(count)),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

impl utoipa::PartialSchema for Amount {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Type};
        utoipa::openapi::schema::Schema::OneOf(
            OneOfBuilder::new()
                .item(
                    ObjectBuilder::new()
                        .schema_type(Type::Integer)
                        .minimum(Some(0)),
                )
                .item(
                    ObjectBuilder::new()
                        .schema_type(Type::String)
                        .pattern(Some("^[0-9]{1,3}%$")),
                )
                .build(),
        )
        .into()
    }
}

impl utoipa::ToSchema for Amount {}

/// Limits of an order, whatever its strategy plans.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Servers of one application in one cell that may be unavailable at once. At least 1 is always allowed. Default 50 %.
    pub max_unavailable: Amount,
    /// Servers of the order that may be worked on at once. Default 10.
    pub max_in_flight: u32,
    /// Failed servers that do not stop the order, as a count or a share of its servers. Default 0: stop at the first.
    pub max_failures: Amount,
    /// Healthy members with a weight above 0 that each pool keeps, where it has more than one. Default 1.
    pub min_healthy_members: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_unavailable: Amount::Percent(50),
            max_in_flight: 10,
            max_failures: Amount::Count(0),
            min_healthy_members: 1,
        }
    }
}

impl Limits {
    /// How many of `total` servers of one application in one cell may be unavailable at once: never less than 1.
    #[must_use]
    pub fn unavailable_of(&self, total: u32) -> u32 {
        self.max_unavailable.of(total).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_round_down_and_one_is_always_allowed() {
        let limits = Limits::default();
        for (total, expect) in [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (200, 100)] {
            assert_eq!(limits.unavailable_of(total), expect, "of {total}");
        }
        assert_eq!(Amount::Percent(33).of(10), 3);
    }

    #[test]
    fn amounts_in_json() {
        for (json, expect) in [
            ("3", Amount::Count(3)),
            ("\"25%\"", Amount::Percent(25)),
            ("\"4\"", Amount::Count(4)),
        ] {
            assert_eq!(serde_json::from_str::<Amount>(json).unwrap(), expect);
        }
        for json in ["-1", "\"101%\"", "\"x\"", "1.5", "null"] {
            assert!(serde_json::from_str::<Amount>(json).is_err(), "{json}");
        }
    }
}
