//! Traffic through a load balancer while a rolling release goes on: requests that failed, and how far measured shares are
//! from weights.
//!
//! Two loads of 300 requests per second each, kept alive and one connection per request, `GET` and `POST`, never retried.

use windlass_tests::{
    balanced::Balanced,
    host::{Setup, TestHost},
    load::{Connections, Load, LoadSpec},
};

const WEIGHTS: [u32; 3] = [100, 60, 40];
/// Requests of the window in which shares are measured.
const WINDOW: u64 = 5000;

#[tokio::main]
async fn main() {
    let host = TestHost::start(Setup {
        agents: 3,
        ..Setup::default()
    })
    .await;
    let mut balanced = Balanced::prepare(&host).await;
    balanced.upload(&host, "2.0.0", &[]).await;
    let loads = [Connections::KeptAlive, Connections::OnePerRequest].map(|connections| {
        Load::start(LoadSpec {
            requests_per_s: 300,
            ..LoadSpec::to(balanced.front, connections)
        })
    });
    balanced.release(&host, "2.0.0", "one-per-group").await;
    let ids: Vec<String> = balanced.servers.iter().map(|(_, id)| id.clone()).collect();
    let weights: Vec<(&str, u32)> = ids.iter().map(String::as_str).zip(WEIGHTS).collect();
    balanced.set_weights(&host, &weights).await;
    let mut worst = 0.0_f64;
    let all: u32 = WEIGHTS.iter().sum();
    let shares = Load::shares_of_all(&loads, WINDOW).await;
    for ((name, _), weight) in balanced.servers.iter().zip(WEIGHTS) {
        let wanted = f64::from(weight) / f64::from(all);
        let found = shares.get(name).copied().unwrap_or(0.0);
        worst = worst.max((wanted - found).abs() * 100.0);
    }
    let second_tries = balanced.second_tries(&host).await;
    let (mut failed, mut requests, mut mean) = (0, 0, 0.0);
    for load in loads {
        let report = load.stop().await;
        for failure in &report.counts.failures {
            eprintln!("bench_traffic: {failure}");
        }
        failed += report.counts.failed;
        requests += report.counts.requests;
        mean += report.mean_per_s;
    }
    eprintln!(
        "bench_traffic: {requests} requests, {mean:.0} per second, {second_tries} retries and redispatches of HAProxy"
    );
    println!("traffic_failed_requests {failed} requests");
    println!("traffic_share_error_pp {worst:.2} pp");
}
