//! Name resolution: which name servers this machine asks, and whether they answer.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    net::{UdpSocket, lookup_host},
    time::timeout,
};
use windlass_protocol::{ProbeReply, QueryError, QueryErrorCode};

use super::{Arguments, facts_of};
use crate::{clock, query::read_text};

/// How long one name server may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Like the resolver of glibc: more are not asked.
const MAX_SERVERS: usize = 3;

pub(super) async fn dns(arguments: &Arguments) -> Result<ProbeReply, QueryError> {
    let name = arguments.get("name").map(String::as_str);
    if let Some(name) = name
        && question(0, name).is_none()
    {
        return Err(QueryError::new(
            QueryErrorCode::InvalidRequest,
            format!("the argument `name` must be a host name, not `{name}`"),
        ));
    }
    let text = read_text("/etc/resolv.conf")?;
    let configured = Resolv::parse(&text);
    let mut servers = Vec::new();
    for server in configured.servers.iter().take(MAX_SERVERS) {
        servers.push(ask(*server, name.unwrap_or(".")).await);
    }
    let lookup = match name {
        Some(name) => Some(look_up(name).await),
        None => None,
    };
    Ok(facts_of(
        json!({ "servers": servers, "search": configured.search, "lookup": lookup }),
        text,
    ))
}

#[derive(Debug, PartialEq, Eq)]
struct Resolv {
    servers: Vec<IpAddr>,
    search: Vec<String>,
}

impl Resolv {
    /// resolv.conf(5). Without a server the resolver asks this machine.
    fn parse(text: &str) -> Self {
        let mut found = Self {
            servers: Vec::new(),
            search: Vec::new(),
        };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let address = words.next().and_then(|word| word.split('%').next());
                    found
                        .servers
                        .extend(address.and_then(|word| word.parse::<IpAddr>().ok()));
                }
                Some("search" | "domain") => found.search = words.map(str::to_owned).collect(),
                Some(_) | None => {}
            }
        }
        if found.servers.is_empty() {
            found.servers.push(Ipv4Addr::LOCALHOST.into());
        }
        found
    }
}

/// Asks one name server. Any answer shows that it works, also that there is no such name.
async fn ask(server: IpAddr, name: &str) -> Value {
    let begun = Instant::now();
    let asked = timeout(PATIENCE, exchange(server, name)).await;
    let elapsed_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    let (code, error) = match asked {
        Ok(Ok(code)) => (Some(code), None),
        Ok(Err(error)) => (None, Some(error.to_string())),
        Err(_) => (
            None,
            Some(format!("no answer within {} ms", PATIENCE.as_millis())),
        ),
    };
    json!({
        "server": server,
        "answered": code.is_some(),
        "response": code.map(response_name),
        "elapsed_us": elapsed_us,
        "error": error,
    })
}

async fn exchange(server: IpAddr, name: &str) -> std::io::Result<u8> {
    let any: IpAddr = match server {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(SocketAddr::new(server, 53)).await?;
    let id = u16::from_le_bytes(clock::random());
    let question = question(id, name).ok_or(std::io::ErrorKind::InvalidInput)?;
    socket.send(&question).await?;
    let mut answer = [0; 4096];
    loop {
        let length = socket.recv(&mut answer).await?;
        if let Some(code) = response_code(&answer[..length], id) {
            return Ok(code);
        }
    }
}

/// A question (RFC 1035, section 4): the addresses of a name, or the name servers of the root.
fn question(id: u16, name: &str) -> Option<Vec<u8>> {
    let mut packet = Vec::with_capacity(32);
    packet.extend(id.to_be_bytes());
    // Recursion desired; one question.
    packet.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    let trimmed = name.strip_suffix('.').unwrap_or(name);
    if name.is_empty() || trimmed.len() > 253 {
        return None;
    }
    for label in trimmed.split('.').filter(|_| !trimmed.is_empty()) {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if label.is_empty() || label.len() > 63 || !label.bytes().all(allowed) {
            return None;
        }
        packet.push(label.len() as u8);
        packet.extend(label.bytes());
    }
    let kind = if trimmed.is_empty() { 2 } else { 1 };
    packet.extend([0, 0, kind, 0, 1]);
    Some(packet)
}

fn response_code(packet: &[u8], id: u16) -> Option<u8> {
    let is_answer = packet.get(..2)? == id.to_be_bytes() && packet.get(2)? & 0x80 != 0;
    is_answer.then(|| packet.get(3).map(|flags| flags & 0x0f))?
}

fn response_name(code: u8) -> String {
    match code {
        0 => "NOERROR".into(),
        1 => "FORMERR".into(),
        2 => "SERVFAIL".into(),
        3 => "NXDOMAIN".into(),
        4 => "NOTIMP".into(),
        5 => "REFUSED".into(),
        other => format!("RCODE{other}"),
    }
}

/// As a program of this machine would: hosts file, search list and all.
async fn look_up(name: &str) -> Value {
    let begun = Instant::now();
    let found = lookup_host((name, 0)).await;
    let elapsed_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    let (addresses, error) = match found {
        Ok(found) => {
            let mut addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
            addresses.sort();
            addresses.dedup();
            (addresses, None)
        }
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    json!({ "name": name, "addresses": addresses, "elapsed_us": elapsed_us, "error": error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_read() {
        let text = "# x\nnameserver 10.0.0.1\nnameserver fe80::1%eth0\nsearch a.example b.example\noptions ndots:2\n";
        assert_eq!(
            Resolv::parse(text),
            Resolv {
                servers: vec!["10.0.0.1".parse().unwrap(), "fe80::1".parse().unwrap()],
                search: vec!["a.example".into(), "b.example".into()],
            }
        );
        assert_eq!(Resolv::parse("").servers, [Ipv4Addr::LOCALHOST]);
    }

    #[test]
    fn questions_and_answers_are_those_of_dns() {
        let asked = question(0x1234, "db.example.").unwrap();
        assert_eq!(
            asked,
            b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02db\x07example\x00\x00\x01\x00\x01"
        );
        assert_eq!(question(1, ".").unwrap().len(), 17);
        for wrong in ["", "a..b", "a b", "ä.example", "x\0"] {
            assert_eq!(question(1, wrong), None, "{wrong}");
        }
        let mut answer = asked;
        assert_eq!(response_code(&answer, 0x1234), None, "a question");
        answer[2] |= 0x80;
        answer[3] = 0x83;
        assert_eq!(response_code(&answer, 0x1234), Some(3));
        assert_eq!(response_code(&answer, 0x1235), None, "another's");
        assert_eq!(response_code(&[], 0), None);
    }

    #[tokio::test]
    async fn names_of_this_machine_are_found() {
        let found = look_up("localhost").await;
        assert!(
            !found["addresses"].as_array().unwrap().is_empty(),
            "{found}"
        );
        let missing = look_up("no-such-host.invalid").await;
        assert!(missing["error"].is_string(), "{missing}");
    }
}
