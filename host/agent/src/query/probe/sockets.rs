//! Sockets: who listens where, and how many connections are in which state.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use serde_json::{Value, json};
use windlass_protocol::{ProbeReply, QueryError, QueryErrorCode};

use super::{Arguments, facts, facts_of};
use crate::{proc, query::read_text};

/// States of TCP by the kernel's number (`include/net/tcp_states.h`).
const STATES: [(u8, &str); 11] = [
    (1, "established"),
    (2, "syn_sent"),
    (3, "syn_received"),
    (4, "fin_wait_1"),
    (5, "fin_wait_2"),
    (6, "time_wait"),
    (7, "closed"),
    (8, "close_wait"),
    (9, "last_ack"),
    (10, "listening"),
    (11, "closing"),
];
const LISTENING: u8 = 10;
/// A UDP socket that is not connected.
const UNCONNECTED: u8 = 7;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listener {
    pub(super) protocol: &'static str,
    pub(super) address: IpAddr,
    pub(super) port: u16,
    uid: u32,
    pub(super) inode: u64,
}

struct Socket {
    address: IpAddr,
    port: u16,
    state: u8,
    uid: u32,
    inode: u64,
}

/// One line of `/proc/net/tcp`, `tcp6`, `udp` or `udp6`.
fn socket(line: &str) -> Option<Socket> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (address, port) = fields.get(1)?.split_once(':')?;
    Some(Socket {
        address: address_of(address)?,
        port: u16::from_str_radix(port, 16).ok()?,
        state: u8::from_str_radix(fields.get(3)?, 16).ok()?,
        uid: fields.get(7)?.parse().ok()?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// Words of the machine's byte order in hexadecimal.
fn address_of(digits: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let digits = digits.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    match digits.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (at, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?);
            }
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

/// Every socket that waits for others.
pub(super) fn listening() -> Vec<Listener> {
    let mut found = Vec::new();
    for (file, protocol, wanted) in [
        ("/proc/net/tcp", "tcp", LISTENING),
        ("/proc/net/tcp6", "tcp", LISTENING),
        ("/proc/net/udp", "udp", UNCONNECTED),
        ("/proc/net/udp6", "udp", UNCONNECTED),
    ] {
        // A kernel without IPv6 has no `tcp6`.
        let text = fs::read_to_string(file).unwrap_or_default();
        let sockets = text.lines().skip(1).filter_map(socket);
        found.extend(
            sockets
                .filter(|socket| socket.state == wanted)
                .map(|socket| Listener {
                    protocol,
                    address: socket.address,
                    port: socket.port,
                    uid: socket.uid,
                    inode: socket.inode,
                }),
        );
    }
    found
}

/// The process that holds each socket, as far as this user may see, by the socket's inode.
pub(super) fn holders() -> HashMap<u64, (u32, String)> {
    let mut found = HashMap::new();
    for pid in proc::all_pids() {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        let inodes = entries.filter_map(|entry| {
            let target = fs::read_link(entry.ok()?.path()).ok()?;
            target
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')?
                .parse::<u64>()
                .ok()
        });
        let mut name = None;
        for inode in inodes {
            let name = name.get_or_insert_with(|| {
                fs::read_to_string(format!("/proc/{pid}/comm"))
                    .map(|name| name.trim_end().to_owned())
                    .unwrap_or_default()
            });
            found.entry(inode).or_insert((pid, name.clone()));
        }
    }
    found
}

pub(super) fn listeners(arguments: &Arguments) -> Result<ProbeReply, QueryError> {
    let port = match arguments.get("port") {
        Some(text) => Some(text.parse::<u16>().map_err(|_| {
            QueryError::new(
                QueryErrorCode::InvalidRequest,
                format!("the argument `port` must be a number from 0 to 65535, not `{text}`"),
            )
        })?),
        None => None,
    };
    let holders = holders();
    let found: Vec<Value> = listening()
        .into_iter()
        .filter(|listener| port.is_none_or(|port| listener.port == port))
        .map(|listener| {
            let holder = holders.get(&listener.inode);
            json!({
                "protocol": listener.protocol,
                "address": listener.address,
                "port": listener.port,
                "uid": listener.uid,
                "pid": holder.map(|(pid, _)| pid),
                "process": holder.map(|(_, name)| name),
            })
        })
        .collect();
    Ok(facts(found.into()))
}

pub(super) fn sockets() -> Result<ProbeReply, QueryError> {
    let mut tcp: BTreeMap<&str, u64> = STATES.iter().map(|(_, name)| (*name, 0)).collect();
    for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let text = fs::read_to_string(file).unwrap_or_default();
        for socket in text.lines().skip(1).filter_map(socket) {
            if let Some((_, name)) = STATES.iter().find(|(state, _)| *state == socket.state) {
                *tcp.entry(name).or_default() += 1;
            }
        }
    }
    let text = read_text("/proc/net/sockstat")?;
    let figure = |line: &str, name: &str| -> Option<u64> {
        let mut words = text
            .lines()
            .find_map(|found| found.strip_prefix(line)?.strip_prefix(':'))?
            .split_whitespace();
        words.find(|word| *word == name)?;
        words.next()?.parse().ok()
    };
    Ok(facts_of(
        json!({
            "tcp": tcp,
            "used": figure("sockets", "used"),
            "tcp_orphans": figure("TCP", "orphan"),
            "tcp_memory_pages": figure("TCP", "mem"),
            "udp": figure("UDP", "inuse"),
        }),
        text,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_kernel_is_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0000000000000000 100 0 0 10 0";
        let found = socket(line).unwrap();
        assert_eq!(found.address, Ipv4Addr::LOCALHOST);
        assert_eq!((found.port, found.state), (8080, LISTENING));
        assert_eq!((found.uid, found.inode), (1000, 4711));
        assert_eq!(
            address_of("00000000000000000000000001000000"),
            Some(Ipv6Addr::LOCALHOST.into())
        );
        assert_eq!(address_of("0100007"), None);
    }

    #[test]
    fn an_own_listener_is_seen_with_its_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let arguments = [("port".to_owned(), port.to_string())].into();
        let seen = listeners(&arguments).unwrap().data;
        assert_eq!(seen[0]["pid"], std::process::id(), "{seen}");
        assert_eq!(seen[0]["address"], "127.0.0.1");
        drop(listener);
        assert_eq!(listeners(&arguments).unwrap().data, json!([]));
        let wrong = [("port".to_owned(), "http".to_owned())].into();
        let code = listeners(&wrong).unwrap_err().code;
        assert_eq!(code, QueryErrorCode::InvalidRequest);
        assert!(sockets().unwrap().data["tcp"]["listening"].is_u64());
    }
}
