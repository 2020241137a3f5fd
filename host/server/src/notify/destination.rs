//! Which addresses notifications may be sent to.
//!
//! A channel's address is chosen by the users of a workspace, so it must not lead to what only the platform can reach: the
//! platform's own machine, its metadata service, addresses of its own network segment. An IPv6 address can carry an IPv4
//! address that a translator or tunnel on the way takes out again; such an address is refused when the carried one is.
//!
//! Decided on resolved addresses, just before they are connected to. Knows nothing of HTTP or mail.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use ipnet::IpNet;
use windlass_domain::address::carried_ipv4;

/// Networks that nothing is sent to unless the operator replaces the list (`--notification-deny`).
const DENIED: [&str; 16] = [
    // This host and this network.
    "0.0.0.0/8",
    "127.0.0.0/8",
    "::/128",
    "::1/128",
    // Link-local; most clouds have their metadata service at 169.254.169.254.
    "169.254.0.0/16",
    "fe80::/10",
    // Metadata services of Alibaba Cloud, Azure, Oracle Cloud and Amazon.
    "100.100.100.200/32",
    "168.63.129.16/32",
    "192.0.0.0/24",
    "fd00:ec2::254/128",
    "fd00:ec2::23/128",
    // Google's, over IPv6.
    "fd20:ce::254/128",
    // Multicast, reserved, broadcast.
    "224.0.0.0/4",
    "240.0.0.0/4",
    "ff00::/8",
    // Deprecated site-local addresses.
    "fec0::/10",
];

/// The networks that are denied unless the operator says otherwise.
#[must_use]
pub fn denied_by_default() -> Vec<IpNet> {
    DENIED
        .into_iter()
        .map(|network| network.parse().expect("it is a network"))
        .collect()
}

/// An exception from the denied networks: a network, or one port of one address. Text form: `127.0.0.0/8` or `127.0.0.1:25`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// Every port of a network.
    Network(IpNet),
    /// One port of one address.
    Port(SocketAddr),
}

/// The text is neither a network nor an address with a port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is neither a network such as 127.0.0.0/8 nor an address with a port such as 127.0.0.1:25"
)]
pub struct InvalidAllowed(String);

impl FromStr for Allowed {
    type Err = InvalidAllowed;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(network) = text.parse() {
            return Ok(Self::Network(network));
        }
        text.parse()
            .map(Self::Port)
            .map_err(|_| InvalidAllowed(text.chars().take(60).collect()))
    }
}

impl Allowed {
    fn includes(&self, address: SocketAddr) -> bool {
        match self {
            Self::Network(network) => network.contains(&address.ip()),
            Self::Port(allowed) => *allowed == address,
        }
    }
}

/// What may be connected to. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Destinations {
    denied: Arc<[IpNet]>,
    allowed: Arc<[Allowed]>,
}

impl Destinations {
    /// Everything but the denied networks; the exceptions take precedence.
    #[must_use]
    pub fn new(denied: Vec<IpNet>, allowed: Vec<Allowed>) -> Self {
        Self {
            denied: denied.into(),
            allowed: allowed.into(),
        }
    }

    /// Whether nothing may be sent to an address.
    #[must_use]
    pub fn is_denied(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        let address = SocketAddr::new(ip, address.port());
        if self.allowed.iter().any(|allowed| allowed.includes(address)) {
            return false;
        }
        let denied = |ip: IpAddr| self.denied.iter().any(|network| network.contains(&ip));
        match ip {
            IpAddr::V4(_) => denied(ip),
            IpAddr::V6(v6) => {
                denied(ip)
                    || carried_ipv4(v6)
                        .into_iter()
                        .any(|v4| denied(IpAddr::V4(v4)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> SocketAddr {
        SocketAddr::new(address.parse().unwrap(), 80)
    }

    #[test]
    fn every_way_to_write_a_denied_address_is_denied() {
        let destinations = Destinations::new(denied_by_default(), Vec::new());
        for address in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "::ffff:0:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::a9fe:a9fe",
            "64:ff9b:1:a9fe:a9:fe00::",
            "64:ff9b:1:a9:fe:a9fe::",
            "2002:a9fe:a9fe::1",
            "2001:0:a9fe:a9fe::1",
            "2001:0:808:808:0:0:5601:5601",
            "2001:db8::5efe:169.254.169.254",
            "2001:db8::200:5efe:a9fe:a9fe",
            "fe80::1",
            "fec0::1",
            "0.0.0.0",
            "::",
            "127.0.0.1",
            "127.255.1.2",
            "::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "fd00:ec2::254",
            "fd20:ce::254",
            "224.0.0.1",
            "255.255.255.255",
            "ff02::1",
        ] {
            assert!(destinations.is_denied(at(address)), "{address}");
        }
        for address in [
            "8.8.8.8",
            "10.1.2.3",
            "192.168.1.1",
            "fd00::1",
            "2001:4860:4860::8888",
            "64:ff9b::808:808",
            "2002:808:808::1",
            "::ffff:8.8.8.8",
        ] {
            assert!(!destinations.is_denied(at(address)), "{address}");
        }
    }

    #[test]
    fn the_operator_can_replace_the_list_and_name_exceptions() {
        let strict = Destinations::new(vec!["10.0.0.0/8".parse().unwrap()], Vec::new());
        assert!(strict.is_denied(at("10.1.2.3")));
        assert!(strict.is_denied(at("::ffff:10.1.2.3")));
        assert!(!strict.is_denied(at("169.254.1.1")));

        let allowed = ["127.0.0.1:25", "::1/128"].map(|text| text.parse().unwrap());
        let open = Destinations::new(denied_by_default(), allowed.into());
        assert!(!open.is_denied("127.0.0.1:25".parse().unwrap()));
        assert!(!open.is_denied("[::ffff:127.0.0.1]:25".parse().unwrap()));
        assert!(open.is_denied("127.0.0.1:80".parse().unwrap()));
        assert!(!open.is_denied(at("::1")));
        assert!(open.is_denied(at("169.254.169.254")));
        assert!("localhost".parse::<Allowed>().is_err());
    }
}
