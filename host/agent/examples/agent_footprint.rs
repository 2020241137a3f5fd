//! Measures the agent: the size of its stripped binary, and what it keeps resident while it is connected and idle.
//!
//! `cargo run --release -p windlass-agent --example agent_footprint`, after `make build`, prints two lines, `name value unit`; a
//! megabyte is 10^6 bytes.
//! The stripped binary itself runs, as a real process, against the small gateway of the tests, over TLS. It first carries out a
//! script, so that what is resident is not that of an agent which never did anything.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is how a measurement that cannot be made fails"
)]

#[allow(dead_code, unused_imports, reason = "the tests use more of it")]
#[path = "../tests"]
mod tests {
    pub(crate) mod support;
}

use std::{
    io::Write as _,
    process::Command,
    time::{Duration, Instant},
};

use tests::support::{Gateway, Order, TestAgent, binary_path};

const MEGABYTE: f64 = 1e6;
/// Memory is watched until it has not grown for so long,
const CALM: Duration = Duration::from_secs(3);
/// or for so long: on a busy machine a page comes now and then.
const WATCH: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(100);

fn resident_kib(pid: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::main]
async fn main() {
    assert!(
        binary_path().exists(),
        "the agent is not built: run `make build`"
    );
    let dir = tempfile::tempdir().unwrap();
    let stripped = dir.path().join("windlass-agent");
    let strip = Command::new("strip")
        .arg("-o")
        .arg(&stripped)
        .arg(binary_path())
        .status();
    assert!(
        strip.is_ok_and(|status| status.success()),
        "`strip` is needed: install binutils"
    );
    let bytes = u32::try_from(std::fs::metadata(&stripped).unwrap().len()).unwrap();

    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.program = stripped;
    agent.start();
    gateway.run(Order::new().script("true")).await;
    let mut most = 0;
    let mut calm = Duration::ZERO;
    let start = Instant::now();
    while calm < CALM && start.elapsed() < WATCH {
        let now = resident_kib(agent.pid());
        calm = if now > most {
            Duration::ZERO
        } else {
            calm + LOOK
        };
        most = most.max(now);
        tokio::time::sleep(LOOK).await;
    }
    agent.stop_all();
    let mut out = std::io::stdout();
    writeln!(out, "agent_binary_mb {:.2} MB", f64::from(bytes) / MEGABYTE).unwrap();
    writeln!(
        out,
        "agent_rss_mb {:.2} MB",
        f64::from(most) * 1024.0 / MEGABYTE
    )
    .unwrap();
}
