//! Network addresses that come from outside: which of them can be a server's.
//!
//! The rule for back ends of load balancers is one, whoever names the address: a person over the API, or an agent that reports
//! the addresses of its machine. Source: design, "Agents": an agent is not trusted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Why an address cannot be that of a back end; `None`: it can. A loopback address is accepted: a person may mean the load
/// balancer's own machine.
#[must_use]
pub fn refuse_back_end(address: IpAddr) -> Option<&'static str> {
    match address.to_canonical() {
        IpAddr::V4(v4) => refuse_v4(v4),
        IpAddr::V6(v6) if v6.is_unspecified() => Some("it is the unspecified address"),
        IpAddr::V6(v6) if v6.is_loopback() => None,
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some("it is link-local"),
        IpAddr::V6(v6) if v6.is_multicast() => Some("it is a multicast address"),
        IpAddr::V6(v6) => carried_ipv4(v6).into_iter().find_map(refuse_v4),
    }
}

fn refuse_v4(address: Ipv4Addr) -> Option<&'static str> {
    match address {
        v4 if v4.is_link_local() => Some("it is link-local"),
        v4 if v4.octets()[0] == 0 => Some("it is the unspecified address"),
        v4 if v4.is_multicast() => Some("it is a multicast address"),
        // Broadcast is one of the reserved ones.
        v4 if v4.octets()[0] >= 240 => Some("it is a reserved or broadcast address"),
        _ => None,
    }
}

/// Why an address that an agent reports is not taken as its server's; `None`: it is.
#[must_use]
pub fn refuse_reported(address: IpAddr) -> Option<&'static str> {
    let loopback = |v4: Ipv4Addr| v4.is_loopback();
    let own = match address.to_canonical() {
        IpAddr::V4(v4) => loopback(v4),
        IpAddr::V6(v6) => v6.is_loopback() || carried_ipv4(v6).into_iter().any(loopback),
    };
    if own {
        return Some("it is a loopback address");
    }
    refuse_back_end(address)
}

/// The IPv4 addresses that an IPv6 address may carry, by every scheme whose prefix or form it has. A translator or the end of a
/// tunnel takes such an address out again.
#[must_use]
pub fn carried_ipv4(address: Ipv6Addr) -> Vec<Ipv4Addr> {
    let bytes = address.octets();
    let at = |places: [usize; 4]| {
        let [a, b, c, d] = places.map(|place| bytes[place]);
        Ipv4Addr::new(a, b, c, d)
    };
    let last = at([12, 13, 14, 15]);
    let mut found = Vec::new();
    // IPv4-compatible (RFC 4291), IPv4-mapped, IPv4-translated (RFC 2765).
    let head = &bytes[..12];
    let compatible = head.iter().all(|byte| *byte == 0);
    let mapped = head[..10].iter().all(|byte| *byte == 0) && head[10..] == [0xff, 0xff];
    let translated = head[..8].iter().all(|byte| *byte == 0) && head[8..] == [0xff, 0xff, 0, 0];
    if compatible || mapped || translated {
        found.push(last);
    }
    // NAT64: the well-known prefix (RFC 6052) and the one for local use (RFC 8215), in which an operator may place the
    // address at any of the positions of RFC 6052.
    if bytes[..6] == [0, 0x64, 0xff, 0x9b, 0, 0] {
        found.push(last);
    }
    if bytes[..6] == [0, 0x64, 0xff, 0x9b, 0, 1] {
        found.push(last);
        let elsewhere = [[6, 7, 9, 10], [7, 9, 10, 11], [9, 10, 11, 12]].map(at);
        // No address begins with 0: where another position is used, this one holds the zeros around it.
        found.extend(elsewhere.into_iter().filter(|v4| v4.octets()[0] != 0));
    }
    // 6to4 (RFC 3056).
    if bytes[..2] == [0x20, 0x02] {
        found.push(at([2, 3, 4, 5]));
    }
    // Teredo (RFC 4380): the server, and the client with all bits inverted.
    if bytes[..4] == [0x20, 0x01, 0, 0] {
        found.push(at([4, 5, 6, 7]));
        found.push(Ipv4Addr::from_bits(!last.to_bits()));
    }
    // ISATAP (RFC 5214), with and without the universal bit.
    if matches!(bytes[8..12], [0 | 2, 0, 0x5e, 0xfe]) {
        found.push(last);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_no_server_can_have_are_refused_in_every_form() {
        for address in [
            "169.254.169.254",
            "0.0.0.0",
            "0.1.2.3",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "fe80::1",
            "ff02::1",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "2002:e000:1::",
        ] {
            let address: IpAddr = address.parse().unwrap();
            assert!(refuse_back_end(address).is_some(), "{address}");
            assert!(refuse_reported(address).is_some(), "{address}");
        }
        for address in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
        ] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(refuse_back_end(address), None, "{address}");
            assert!(refuse_reported(address).is_some(), "{address}");
        }
        for address in [
            "10.0.0.7",
            "192.168.1.1",
            "100.64.0.1",
            "2001:db8::7",
            "fd00::1",
        ] {
            assert_eq!(refuse_reported(address.parse().unwrap()), None, "{address}");
        }
    }
}
