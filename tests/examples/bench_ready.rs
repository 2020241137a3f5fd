//! `server_ready_ms`: from the start of the server's process to the first 200 of `/readyz`, with a warm plugin cache.
//!
//! The first start makes the data directory and compiles the plugins; it does not count. Prints the median of several more,
//! each after an orderly end of the one before.

use std::time::{Duration, Instant};

use windlass_tests::host::{Setup, TestHost};

const ROUNDS: usize = 7;

#[tokio::main]
async fn main() {
    let setup = Setup {
        agents: 0,
        ..Setup::default()
    };
    let mut host = TestHost::start(setup).await;
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..ROUNDS {
        host.stop().await;
        let start = Instant::now();
        host.boot(&[]).await;
        times.push(start.elapsed());
    }
    host.stop().await;
    times.sort();
    let median = times[ROUNDS / 2];
    println!("server_ready_ms {:.0} ms", median.as_secs_f64() * 1e3);
}
