//! Measures the memory that an idle agent costs the server: opens many sessions over TLS from a second process, lets all of
//! them live through heartbeats, and prints `idle_agent_kb <n> KB`: growth of the resident set, divided by the sessions.
//!
//! `cargo run --release --example idle_agents [count]` (2,000 unless given). Ends with status 1 when the limit is missed.

#[path = "../tests/gateway/client.rs"]
mod client;
#[path = "../tests/gateway/world.rs"]
mod world;

use std::{
    net::SocketAddr,
    process::{ExitCode, Stdio},
    time::Duration,
};

use client::{Agent, Who};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    task::JoinSet,
};
use windlass::gateway::GatewaySettings;
use windlass_domain::id::ServerId;
use windlass_protocol::{Epoch, Identity};
use world::World;

/// What an idle agent may cost. Source: the figures of `make bench`.
const LIMIT_KB: u64 = 40;
/// Short, so that buffers that heartbeats need are counted too.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Handshakes at once in the client.
const AT_ONCE: usize = 32;

fn agent(number: u32) -> (ServerId, Identity) {
    let mut seed = [1; 32];
    seed[..4].copy_from_slice(&number.to_be_bytes());
    let id = format!("srv_{number:032x}");
    (
        id.parse().expect("the form of an id"),
        Identity::from_seed(seed),
    )
}

fn resident_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().split(' ').next()?.parse().ok())
        .expect("VmRSS in kB")
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    match &arguments[..] {
        [role, at, fingerprint, key, count] if role == "agents" => {
            let who = Who {
                server: agent(0).0,
                identity: agent(0).1,
                epoch: Epoch::from_bytes([1; 16]),
                fingerprint: fingerprint.parse().expect("a fingerprint"),
                platform_key: key.parse().expect("a key"),
                protocol: windlass_protocol::PROTOCOL_VERSION,
            };
            let at = at.parse().expect("an address");
            runtime.block_on(agents(at, &who, count.parse().expect("a count")));
            ExitCode::SUCCESS
        }
        [] => runtime.block_on(measure(2000)),
        [count] => runtime.block_on(measure(count.parse().expect("a count"))),
        _ => {
            eprintln!("usage: idle_agents [count]");
            ExitCode::FAILURE
        }
    }
}

async fn measure(count: u32) -> ExitCode {
    let world = World::with(GatewaySettings {
        heartbeat_interval: HEARTBEAT,
        ..GatewaySettings::default()
    })
    .await;
    for number in 0..count {
        let (server, identity) = agent(number);
        let record = (format!("web-{number}"), identity.public_key());
        let mut servers = world.records.servers.lock().expect("not poisoned");
        servers.insert(server, record);
    }
    // What any first session costs is not an agent's.
    let warm = world.server();
    drop(Agent::connect(world.at, &warm).await);
    let before = resident_kb();
    let identity = world.gateway.identity();
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .arg("agents")
        .arg(world.at.to_string())
        .arg(identity.fingerprint().to_string())
        .arg(identity.signing().public_key().to_string())
        .arg(count.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("the agents' process");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let line = lines.next_line().await.expect("the agents' word");
    assert_eq!(line.as_deref(), Some("connected"), "the agents failed");
    let online = world.gateway.sessions().len();
    assert_eq!(online, count as usize, "sessions");
    // A figure over time: heartbeats are the load that is measured.
    tokio::time::sleep(3 * HEARTBEAT).await;
    assert_eq!(world.gateway.sessions().len(), online, "sessions were lost");
    let kb = resident_kb().saturating_sub(before) / u64::from(count);
    println!("idle_agent_kb {kb} KB");
    drop(child.stdin.take());
    let status = child.wait().await.expect("the agents' end");
    world.stop().await;
    if status.success() && kb <= LIMIT_KB {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The second process: holds its sessions until its input ends.
async fn agents(at: SocketAddr, template: &Who, count: u32) {
    let mut connecting = JoinSet::new();
    let mut connected = Vec::new();
    let mut held = JoinSet::new();
    for number in 0..count {
        let (server, identity) = agent(number);
        let who = Who {
            server,
            identity,
            ..template.clone()
        };
        connecting.spawn(async move { Agent::connect(at, &who).await });
        if connecting.len() >= AT_ONCE
            && let Some(agent) = connecting.join_next().await
        {
            connected.push(agent.expect("a session"));
        }
        while let Some(mut agent) = connected.pop() {
            held.spawn(async move { while agent.next().await.is_some() {} });
        }
    }
    while let Some(agent) = connecting.join_next().await {
        let mut agent = agent.expect("a session");
        held.spawn(async move { while agent.next().await.is_some() {} });
    }
    println!("connected");
    tokio::task::spawn_blocking(|| std::io::stdin().lines().count())
        .await
        .expect("the end of the input");
}
