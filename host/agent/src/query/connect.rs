//! Connection attempts from this machine: TCP, UDP, ICMP echo. An attempt that fails is an answer, with what was seen.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpStream, UdpSocket, lookup_host},
    time::timeout,
};
use windlass_protocol::{ConnectReply, QueryError, QueryErrorCode};

use crate::clock;

/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 4;

/// Tries within `limit`. A name with several addresses is reached when one of them is.
pub(super) async fn attempt(
    protocol: &str,
    target: &str,
    port: Option<u16>,
    limit: Duration,
) -> Result<ConnectReply, QueryError> {
    let invalid = |message: String| QueryError::new(QueryErrorCode::InvalidRequest, message);
    let wants_port = |name: &str| match port {
        Some(port) if port > 0 => Ok(port),
        Some(_) | None => Err(invalid(format!(
            "{name} wants a port from 1 to 65535; give one"
        ))),
    };
    if target.is_empty() || target.len() > 253 || target.chars().any(|c| c.is_control() || c == ' ')
    {
        return Err(invalid(
            "the target must be an IP address or a host name of at most 253 characters".to_owned(),
        ));
    }
    let how = match protocol {
        "tcp" => How::Tcp(wants_port("tcp")?),
        "udp" => How::Udp(wants_port("udp")?),
        "icmp" if port.is_some() => {
            return Err(invalid("icmp has no port; leave it out".to_owned()));
        }
        "icmp" => How::Icmp,
        other => {
            return Err(QueryError::new(
                QueryErrorCode::Unsupported,
                format!("the protocol `{other}` cannot be tried; known are tcp, udp and icmp"),
            ));
        }
    };
    let begun = Instant::now();
    let ended = timeout(limit, try_name(how, target)).await;
    let (reached, detail) = ended.unwrap_or_else(|_| {
        let ms = limit.as_millis();
        let detail = match how {
            How::Tcp(_) => format!("no answer within {ms} ms: the packets are dropped on the way, or the server is down"),
            How::Udp(_) => format!("neither an answer nor a refusal within {ms} ms: the port may be open and silent, or filtered"),
            How::Icmp => format!("no echo within {ms} ms"),
        };
        (false, detail)
    });
    Ok(ConnectReply {
        reached,
        elapsed_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
        detail,
    })
}

#[derive(Debug, Clone, Copy)]
enum How {
    Tcp(u16),
    Udp(u16),
    Icmp,
}

async fn try_name(how: How, target: &str) -> (bool, String) {
    let port = match how {
        How::Tcp(port) | How::Udp(port) => port,
        How::Icmp => 0,
    };
    let bare = target.trim_start_matches('[').trim_end_matches(']');
    let addresses: Vec<SocketAddr> = match bare.parse::<IpAddr>() {
        Ok(address) => vec![SocketAddr::new(address, port)],
        Err(_) => match lookup_host((bare, port)).await {
            Ok(found) => found.take(MAX_ADDRESSES).collect(),
            Err(error) => return (false, format!("the name `{bare}` has no address: {error}")),
        },
    };
    let mut seen = Vec::new();
    for address in addresses {
        let tried = match how {
            How::Tcp(_) => TcpStream::connect(address)
                .await
                .map(|_| "connected".to_owned()),
            How::Udp(_) => udp(address).await,
            How::Icmp => icmp(address.ip()).await,
        };
        match tried {
            Ok(detail) => return (true, format!("{address}: {detail}")),
            Err(error) => seen.push(format!("{address}: {error}")),
        }
    }
    if seen.is_empty() {
        seen.push(format!("the name `{bare}` has no address"));
    }
    (false, seen.join("; "))
}

async fn udp(address: SocketAddr) -> io::Result<String> {
    let socket = UdpSocket::bind(any(address.ip())).await?;
    socket.connect(address).await?;
    socket.send(b"windlass\n").await?;
    let mut answer = [0; 2048];
    let length = socket.recv(&mut answer).await?;
    Ok(format!("answered with {length} bytes"))
}

fn any(like: IpAddr) -> SocketAddr {
    match like {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// One echo request. The kernel's ping sockets need no privilege where `net.ipv4.ping_group_range` allows them; else a raw socket is
/// tried, which only root may have.
async fn icmp(address: IpAddr) -> io::Result<String> {
    let (domain, protocol) = match address {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let (socket, raw) = match Socket::new(domain, Type::DGRAM, Some(protocol)) {
        Ok(socket) => (socket, false),
        Err(_) => {
            let raw = Socket::new(domain, Type::RAW, Some(protocol)).map_err(|error| {
                let message = "this agent may not send ICMP echo requests: widen `net.ipv4.ping_group_range`, or run the agent as root";
                io::Error::new(error.kind(), message)
            })?;
            (raw, true)
        }
    };
    socket.set_nonblocking(true)?;
    // Both kinds of socket send and receive datagrams, which is all that is asked of this type.
    let socket = UdpSocket::from_std(socket.into())?;
    socket.connect(SocketAddr::new(address, 0)).await?;
    let mark: [u8; 8] = clock::random();
    socket.send(&echo_request(address, mark)).await?;
    let mut answer = [0; 2048];
    loop {
        let length = socket.recv(&mut answer).await?;
        let mut packet = &answer[..length];
        if raw && address.is_ipv4() {
            // A raw IPv4 socket hands the header over, too.
            let header = usize::from(packet.first().copied().unwrap_or(0) & 0x0f) * 4;
            packet = packet.get(header..).unwrap_or_default();
        }
        let reply = if address.is_ipv4() { 0 } else { 129 };
        if packet.first() == Some(&reply) && packet.get(8..16) == Some(&mark[..]) {
            return Ok("echo received".to_owned());
        }
    }
}

fn echo_request(address: IpAddr, mark: [u8; 8]) -> [u8; 16] {
    let mut packet = [0; 16];
    packet[0] = if address.is_ipv4() { 8 } else { 128 };
    packet[4..6].copy_from_slice(&mark[..2]);
    packet[7] = 1;
    packet[8..].copy_from_slice(&mark);
    if address.is_ipv4() {
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// RFC 1071.
fn checksum(packet: &[u8]) -> u16 {
    let mut sum: u32 = packet
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn reached(protocol: &str, target: &str, port: Option<u16>) -> ConnectReply {
        let limit = Duration::from_secs(10);
        attempt(protocol, target, port, limit).await.unwrap()
    }

    #[tokio::test]
    async fn an_open_port_is_reached_and_a_closed_one_says_so() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let open = reached("tcp", "127.0.0.1", Some(port)).await;
        assert!(open.reached, "{open:?}");
        assert!(reached("tcp", "localhost", Some(port)).await.reached);
        drop(listener);
        let closed = reached("tcp", "127.0.0.1", Some(port)).await;
        assert!(!closed.reached);
        assert!(closed.detail.contains("refused"), "{closed:?}");
    }

    #[tokio::test]
    async fn udp_tells_an_answer_from_a_refusal() {
        let echo = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = echo.local_addr().unwrap().port();
        let answering = tokio::spawn(async move {
            let mut buffer = [0; 64];
            let (length, from) = echo.recv_from(&mut buffer).await.unwrap();
            echo.send_to(&buffer[..length], from).await.unwrap();
        });
        let open = reached("udp", "127.0.0.1", Some(port)).await;
        answering.await.unwrap();
        assert!(open.reached, "{open:?}");
        let closed = reached("udp", "127.0.0.1", Some(port)).await;
        assert!(
            !closed.reached && closed.detail.contains("refused"),
            "{closed:?}"
        );
    }

    #[tokio::test]
    async fn an_echo_comes_back_where_it_may_be_sent() {
        let echo = reached("icmp", "127.0.0.1", None).await;
        assert!(
            echo.reached || echo.detail.contains("ping_group_range"),
            "{echo:?}"
        );
    }

    #[tokio::test]
    async fn silence_ends_at_the_limit() {
        // Bound, never accepted or read: a UDP port that is silent.
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = silent.local_addr().unwrap().port();
        let limit = Duration::from_millis(30);
        let reply = attempt("udp", "127.0.0.1", Some(port), limit)
            .await
            .unwrap();
        assert!(!reply.reached);
        assert!(reply.detail.contains("30 ms"), "{reply:?}");
    }

    #[tokio::test]
    async fn what_cannot_be_tried_is_refused() {
        let limit = Duration::from_secs(1);
        for (protocol, target, port, code) in [
            ("gre", "127.0.0.1", None, QueryErrorCode::Unsupported),
            ("tcp", "127.0.0.1", None, QueryErrorCode::InvalidRequest),
            ("tcp", "127.0.0.1", Some(0), QueryErrorCode::InvalidRequest),
            ("icmp", "127.0.0.1", Some(1), QueryErrorCode::InvalidRequest),
            ("tcp", "a b", Some(1), QueryErrorCode::InvalidRequest),
            ("tcp", "", Some(1), QueryErrorCode::InvalidRequest),
        ] {
            let refused = attempt(protocol, target, port, limit).await.unwrap_err();
            assert_eq!(refused.code, code, "{protocol} {target} {port:?}");
        }
        let nameless = reached("tcp", "no-such-host.invalid", Some(1)).await;
        assert!(!nameless.reached && nameless.detail.contains("no-such-host"));
    }

    #[test]
    fn the_checksum_is_that_of_the_internet() {
        // RFC 1071, section 3.
        let sum = checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum, !0xddf2);
    }
}
