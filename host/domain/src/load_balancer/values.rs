//! Values of load balancers that are parsed once: networks, host patterns, ranges of ports.

use std::{fmt, net::IpAddr, ops::RangeInclusive, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::name::{HostName, InvalidValue};

/// An address, or a network: `10.0.0.7`, `10.0.0.0/8`, `2001:db8::/32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    const fn whole(address: IpAddr) -> u8 {
        match address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        }
    }

    /// The first address of the network that holds an address.
    fn first_of(address: IpAddr, prefix: u8) -> IpAddr {
        match address {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V4((u32::from(v4) & mask).into())
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V6((u128::from(v6) & mask).into())
            }
        }
    }
}

impl FromStr for Network {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shown: String = text.chars().take(60).collect();
        let refuse = || {
            InvalidValue::rule(format!(
                "{shown:?} is neither an address nor a network: write it like `10.0.0.7`, `10.0.0.0/8` or `2001:db8::/32`"
            ))
        };
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| refuse())?;
        let whole = Self::whole(address);
        let prefix = match prefix {
            None => whole,
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits
                .parse()
                .ok()
                .filter(|prefix| *prefix <= whole)
                .ok_or_else(refuse)?,
            Some(_) => return Err(refuse()),
        };
        let first = Self::first_of(address, prefix);
        if first != address {
            return Err(InvalidValue::rule(format!(
                "`{shown}` names an address inside a network: the network is `{first}/{prefix}`, the address alone `{address}`"
            )));
        }
        Ok(Self { address, prefix })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.prefix == Self::whole(self.address) {
            write!(f, "{}", self.address)
        } else {
            write!(f, "{}/{}", self.address, self.prefix)
        }
    }
}

impl TryFrom<String> for Network {
    type Error = InvalidValue;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.to_string()
    }
}

/// A host name, or `*.` and one: all names below it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HostPattern {
    /// This one.
    Exact(HostName),
    /// All below it, not itself.
    Below(HostName),
}

impl FromStr for HostPattern {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("*.") {
            Some(name) => name.parse().map(Self::Below),
            None => text.parse().map(Self::Exact),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => write!(f, "{name}"),
            Self::Below(name) => write!(f, "*.{name}"),
        }
    }
}

impl TryFrom<String> for HostPattern {
    type Error = InvalidValue;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<HostPattern> for String {
    fn from(pattern: HostPattern) -> Self {
        pattern.to_string()
    }
}

macro_rules! text_schema {
    ($($name:ident: $says:literal;)*) => {$(
        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .description(Some($says))
                    .build()
                    .into()
            }
        }

        impl utoipa::ToSchema for $name {}
    )*};
}

text_schema! {
    Network: "An address or a network: `10.0.0.7`, `10.0.0.0/8`, `2001:db8::/32`.";
    HostPattern: "A host name in lower case, or `*.` and one for all names below it.";
}

/// Ranges of ports, written like `80,443,2800-3300`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortRanges(Vec<RangeInclusive<u16>>);

impl PortRanges {
    /// Whether a port is in one of them.
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|range| range.contains(&port))
    }
}

/// 80, 443, 2800-3300, 5000-10000, 13000-14000. Source: spec "Load balancers".
impl Default for PortRanges {
    fn default() -> Self {
        Self(vec![
            80..=80,
            443..=443,
            2800..=3300,
            5000..=10_000,
            13_000..=14_000,
        ])
    }
}

impl FromStr for PortRanges {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |part: &str| {
            InvalidValue::rule(format!(
                "{:?} is not a port or a range of ports: write them like `80,443,2800-3300`",
                part.chars().take(40).collect::<String>()
            ))
        };
        let ranges = text.split(',').map(str::trim).map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            match (first.trim().parse(), last.trim().parse()) {
                (Ok(first), Ok(last)) if first >= 1 && first <= last => Ok(first..=last),
                (Ok(_) | Err(_), Ok(_) | Err(_)) => Err(refuse(part)),
            }
        });
        ranges.collect::<Result<Vec<_>, _>>().map(Self)
    }
}

impl fmt::Display for PortRanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            if range.start() == range.end() {
                write!(f, "{}", range.start())?;
            } else {
                write!(f, "{}-{}", range.start(), range.end())?;
            }
        }
        Ok(())
    }
}

impl TryFrom<String> for PortRanges {
    type Error = InvalidValue;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PortRanges> for String {
    fn from(ranges: PortRanges) -> Self {
        ranges.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::{HealthPath, PathPrefix};

    fn check<T: FromStr<Err = InvalidValue> + fmt::Display>(good: &[&str], bad: &[&str]) {
        for text in good {
            match text.parse::<T>() {
                Ok(value) => assert_eq!(value.to_string(), *text),
                Err(error) => panic!("{text}: {error}"),
            }
        }
        for text in bad {
            assert!(text.parse::<T>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn networks() {
        check::<Network>(
            &[
                "10.0.0.7",
                "10.0.0.0/8",
                "0.0.0.0/0",
                "::1",
                "2001:db8::/32",
                "::/0",
            ],
            &[
                "",
                "10.0.0.7/8",
                "10.0.0.0/33",
                "10.0.0",
                "::/129",
                "a",
                "10.0.0.0/+8",
                "10.0.0.0/",
                "10.0.0.7 10.0.0.8",
                "10.0.0.7\n",
                "10.0.0.7#",
                "10.0.0.0/ 8",
            ],
        );
        let error = "10.1.2.3/8".parse::<Network>().unwrap_err();
        assert!(error.message.contains("`10.0.0.0/8`"), "{error}");
        assert_eq!(
            "10.0.0.7/32".parse::<Network>().unwrap().to_string(),
            "10.0.0.7"
        );
    }

    /// What has a meaning in HAProxy's configuration, or in the shell, the log or a terminal.
    const HOSTILE: [&str; 14] = [
        " ", "\t", "\n", "\r", "\0", "\x1b", "\"", "'", "#", "\\", ";", "$", "`", "{",
    ];

    #[test]
    fn texts_that_reach_a_configuration_hold_nothing_that_it_could_take_for_its_own() {
        for hostile in HOSTILE {
            assert!(
                format!("/a{hostile}b").parse::<HealthPath>().is_err(),
                "{hostile:?}"
            );
            assert!(
                format!("/a{hostile}").parse::<PathPrefix>().is_err(),
                "{hostile:?}"
            );
            assert!(
                format!("a{hostile}b").parse::<HostPattern>().is_err(),
                "{hostile:?}"
            );
            assert!(
                format!("10.0.0.7{hostile}").parse::<Network>().is_err(),
                "{hostile:?}"
            );
        }
        check::<HealthPath>(
            &["/", "/healthz?full=1&a=%20"],
            &["", "healthz", "/ä", "/a|b", "/<a>"],
        );
        check::<PathPrefix>(&["/", "/api/v1/"], &["", "api", "/a?b", "-m"]);
        check::<HostPattern>(
            &["a", "shop.example.com", "*.example.com", "9.example"],
            &[
                "",
                "*",
                "*.",
                "*.*",
                "a*",
                "*a",
                "-m",
                "A.example",
                "a.example:80",
                ".example",
            ],
        );
    }

    #[test]
    fn port_ranges() {
        let default = PortRanges::default();
        assert_eq!(
            default.to_string(),
            "80,443,2800-3300,5000-10000,13000-14000"
        );
        for (port, allowed) in [
            (79, false),
            (80, true),
            (81, false),
            (443, true),
            (2799, false),
            (2800, true),
            (3300, true),
            (3301, false),
            (4999, false),
            (5000, true),
            (10_000, true),
            (10_001, false),
            (12_999, false),
            (13_000, true),
            (14_000, true),
            (14_001, false),
            (0, false),
            (65_535, false),
        ] {
            assert_eq!(default.contains(port), allowed, "{port}");
        }
        check::<PortRanges>(
            &["80", "1-65535", "80,90-91"],
            &["", "0", "a", "2-1", "80,", "1-65536", "-5"],
        );
    }
}
