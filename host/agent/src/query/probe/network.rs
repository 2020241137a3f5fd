//! Interfaces, addresses and routes.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use serde_json::{Value, json};
use windlass_protocol::{ProbeReply, QueryError, QueryErrorCode};

use super::{Arguments, facts, facts_of};
use crate::{
    facts::local_addresses,
    query::{program, unreadable},
};

const CLASS: &str = "/sys/class/net";

pub(super) fn interfaces() -> Result<ProbeReply, QueryError> {
    let entries = fs::read_dir(CLASS).map_err(|error| unreadable(CLASS, &error))?;
    let mut found: Vec<Value> = entries
        .filter_map(|entry| Some(interface(&entry.ok()?.path())))
        .flatten()
        .collect();
    found.sort_by_key(|interface| interface["name"].as_str().map(str::to_owned));
    Ok(facts(found.into()))
}

fn interface(path: &Path) -> Option<Value> {
    let name = path.file_name()?.to_str()?;
    // `/sys/class/net` also holds plain files, such as `bonding_masters`.
    if !path.is_dir() {
        return None;
    }
    let text = |file: &str| {
        let text = fs::read_to_string(path.join(file)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    let figure = |file: &str| text(file)?.parse::<i64>().ok();
    let counter = |file: &str| figure(&format!("statistics/{file}"));
    // Bit 0 of the flags: an administrator has switched it on. Loopback is bit 3.
    let flags = text("flags")
        .and_then(|text| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok())
        .unwrap_or(0);
    Some(json!({
        "name": name,
        "up": flags & 1 != 0,
        "loopback": flags & 8 != 0,
        "state": text("operstate"),
        "carrier": figure("carrier").map(|carrier| carrier == 1),
        "mac": text("address"),
        "mtu": figure("mtu"),
        // -1 where nobody knows.
        "speed_mbit_s": figure("speed").filter(|speed| *speed > 0),
        "rx_bytes": counter("rx_bytes"),
        "tx_bytes": counter("tx_bytes"),
        "rx_errors": counter("rx_errors"),
        "tx_errors": counter("tx_errors"),
        "rx_dropped": counter("rx_dropped"),
        "tx_dropped": counter("tx_dropped"),
    }))
}

/// `ip` knows interface, prefix and origin of each address; without it the kernel's tables tell the addresses alone.
pub(super) async fn addresses() -> Result<ProbeReply, QueryError> {
    if let Ok(said) = program::run("ip", &["-json", "address", "show"]).await
        && said.code == 0
        && let Some(found) = addresses_of_ip(&said.output)
    {
        return Ok(facts_of(
            json!({ "source": "ip", "addresses": found }),
            said.output,
        ));
    }
    let found: Vec<Value> = local_addresses()
        .into_iter()
        .map(|address| {
            json!({
                "interface": null,
                "address": address,
                "prefix": null,
                "family": if address.contains(':') { "ipv6" } else { "ipv4" },
                "scope": "global",
                "dynamic": null,
            })
        })
        .collect();
    Ok(facts(json!({ "source": "proc", "addresses": found })))
}

fn addresses_of_ip(text: &str) -> Option<Vec<Value>> {
    let links: Value = serde_json::from_str(text).ok()?;
    let mut found = Vec::new();
    for link in links.as_array()? {
        for address in link["addr_info"].as_array().into_iter().flatten() {
            found.push(json!({
                "interface": link["ifname"],
                "address": address["local"],
                "prefix": address["prefixlen"],
                "family": match address["family"].as_str() {
                    Some("inet6") => "ipv6",
                    Some(_) | None => "ipv4",
                },
                "scope": address["scope"],
                "dynamic": address["dynamic"].as_bool().unwrap_or(false),
            }));
        }
    }
    Some(found)
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Route {
    destination: IpAddr,
    prefix: u32,
    gateway: Option<IpAddr>,
    interface: String,
    metric: u32,
    /// Packets for it are refused.
    reject: bool,
}

/// Flags of a route: usable; refused.
const UP: u32 = 0x1;
const REJECT: u32 = 0x200;

impl Route {
    /// One line of `/proc/net/route`: words of the machine's byte order in hexadecimal.
    fn parse_v4(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let word = |at: usize| u32::from_str_radix(fields.get(at)?, 16).ok();
        let address = |at: usize| Some(Ipv4Addr::from(word(at)?.to_ne_bytes()));
        let flags = word(3)?;
        let gateway = address(2)?;
        (flags & UP != 0).then_some(Self {
            destination: address(1)?.into(),
            prefix: word(7)?.count_ones(),
            gateway: (!gateway.is_unspecified()).then_some(gateway.into()),
            interface: (*fields.first()?).to_owned(),
            metric: fields.get(6)?.parse().ok()?,
            reject: flags & REJECT != 0,
        })
    }

    /// One line of `/proc/net/ipv6_route`: all hexadecimal.
    fn parse_v6(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let word = |at: usize| u32::from_str_radix(fields.get(at)?, 16).ok();
        let address = |at: usize| {
            let bits = u128::from_str_radix(fields.get(at)?, 16).ok()?;
            Some(Ipv6Addr::from_bits(bits))
        };
        let flags = word(8)?;
        let gateway = address(4)?;
        (flags & UP != 0).then_some(Self {
            destination: address(0)?.into(),
            prefix: word(1)?,
            gateway: (!gateway.is_unspecified()).then_some(gateway.into()),
            interface: (*fields.get(9)?).to_owned(),
            metric: word(5)?,
            reject: flags & REJECT != 0,
        })
    }

    fn covers(&self, target: IpAddr) -> bool {
        match (self.destination, target) {
            (IpAddr::V4(net), IpAddr::V4(target)) => {
                let mask = u32::MAX.checked_shl(32 - self.prefix).unwrap_or(0);
                net.to_bits() & mask == target.to_bits() & mask
            }
            (IpAddr::V6(net), IpAddr::V6(target)) => {
                let mask = u128::MAX.checked_shl(128 - self.prefix).unwrap_or(0);
                net.to_bits() & mask == target.to_bits() & mask
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }

    fn facts(&self) -> Value {
        json!({
            "family": if self.destination.is_ipv4() { "ipv4" } else { "ipv6" },
            "destination": self.destination,
            "prefix": self.prefix,
            "gateway": self.gateway,
            "interface": self.interface,
            "metric": self.metric,
            "reject": self.reject,
        })
    }
}

/// The route that a packet takes: the longest prefix, then the lowest metric.
fn chosen(routes: &[Route], target: IpAddr) -> Option<&Route> {
    routes
        .iter()
        .filter(|route| route.covers(target))
        .min_by_key(|route| (std::cmp::Reverse(route.prefix), route.metric))
}

pub(super) fn routes(arguments: &Arguments) -> Result<ProbeReply, QueryError> {
    let target = match arguments.get("to") {
        Some(text) => Some(text.parse::<IpAddr>().map_err(|_| {
            QueryError::new(
                QueryErrorCode::InvalidRequest,
                format!("the argument `to` must be an IP address, not `{text}`"),
            )
        })?),
        None => None,
    };
    let four = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let six = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    let routes: Vec<Route> = four
        .lines()
        .skip(1)
        .filter_map(Route::parse_v4)
        .chain(six.lines().filter_map(Route::parse_v6))
        .collect();
    let to = target.map(
        |target| json!({ "target": target, "route": chosen(&routes, target).map(Route::facts) }),
    );
    let all: Vec<Value> = routes.iter().map(Route::facts).collect();
    let has_default = |is_v4: bool| {
        routes
            .iter()
            .any(|route| route.destination.is_ipv4() == is_v4 && route.prefix == 0 && !route.reject)
    };
    Ok(facts_of(
        json!({
            "routes": all,
            "default_ipv4": has_default(true),
            "default_ipv6": has_default(false),
            "to": to,
        }),
        four,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUR: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
eth1\t0001A8C0\t00000000\t0001\t0\t0\t200\t00FFFFFF\t0\t0\t0
eth1\t0000000A\t00000000\t0000\t0\t0\t0\t000000FF\t0\t0\t0
";
    const SIX: &str = "\
20010db8000000000000000000000000 20 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
";

    fn routes() -> Vec<Route> {
        FOUR.lines()
            .skip(1)
            .filter_map(Route::parse_v4)
            .chain(SIX.lines().filter_map(Route::parse_v6))
            .collect()
    }

    #[test]
    fn the_nearest_route_is_chosen() {
        let routes = routes();
        assert_eq!(
            routes.len(),
            4,
            "routes that are not up are none: {routes:?}"
        );
        let via = |target: &str| {
            let route = chosen(&routes, target.parse().unwrap())?;
            Some((route.interface.clone(), route.prefix, route.gateway))
        };
        assert_eq!(via("192.168.1.7"), Some(("eth0".into(), 24, None)));
        assert_eq!(
            via("8.8.8.8"),
            Some(("eth0".into(), 0, Some("192.168.1.1".parse().unwrap())))
        );
        assert_eq!(via("2001:db8::1"), Some(("eth0".into(), 32, None)));
        assert_eq!(via("2001:db9::1"), None);
    }

    #[test]
    fn addresses_are_those_that_ip_tells() {
        let text = r#"[{"ifname":"eth0","addr_info":[{"family":"inet","local":"10.0.0.5","prefixlen":24,"scope":"global","dynamic":true},{"family":"inet6","local":"fe80::1","prefixlen":64,"scope":"link"}]},{"ifname":"lo","addr_info":[]},{}]"#;
        let found = addresses_of_ip(text).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(
            (&found[0]["interface"], &found[0]["dynamic"]),
            (&json!("eth0"), &json!(true))
        );
        assert_eq!(
            (&found[1]["family"], &found[1]["dynamic"]),
            (&json!("ipv6"), &json!(false))
        );
        assert!(addresses_of_ip("not json").is_none());
    }

    #[test]
    fn loopback_is_an_interface() {
        let seen = interfaces().unwrap().data;
        let loopback = seen
            .as_array()
            .unwrap()
            .iter()
            .find(|one| one["name"] == "lo");
        assert_eq!(loopback.unwrap()["loopback"], true);
    }
}
