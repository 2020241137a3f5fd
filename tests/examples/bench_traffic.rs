//! Traffic through a load balancer while releases of every strategy go on: requests that failed, how far measured shares
//! are from weights, and how constant the load was.
//!
//! What happens in each scenario, and under which load: `tests/src/under_load.rs`.

use windlass_tests::under_load::{REQUESTS_PER_S, Scenario, Stage};

#[tokio::main]
async fn main() {
    let mut stage = Stage::prepare().await;
    let (mut failed, mut second_tries) = (0, 0);
    let (mut worst_pp, mut least_per_s) = (0.0_f64, u64::MAX);
    for scenario in Scenario::ALL {
        let findings = stage.play(scenario).await;
        let counts = &findings.counts;
        for failure in &counts.failures {
            eprintln!("bench_traffic: {scenario:?}: {failure}");
        }
        for window in &findings.windows {
            eprintln!(
                "bench_traffic: {scenario:?}: {}: {:.2?}",
                window.what, window.shares
            );
        }
        eprintln!(
            "bench_traffic: {scenario:?}: {} requests, {} failed, {} answered with an error as the application was told, \
             {:.0} per second of {REQUESTS_PER_S}, {} in the poorest, slowest {} ms",
            counts.requests,
            counts.failed,
            counts.told_to_fail,
            findings.mean_per_s,
            findings.least_per_s,
            counts.slowest_ms
        );
        failed += counts.failed;
        second_tries = findings.second_tries;
        worst_pp = worst_pp.max(findings.share_error_pp());
        least_per_s = least_per_s.min(findings.least_per_s);
    }
    eprintln!("bench_traffic: {second_tries} retries and redispatches of HAProxy in all of it");
    println!("traffic_failed_requests {failed} requests");
    println!("traffic_second_tries {second_tries} requests");
    println!("traffic_share_error_pp {worst_pp:.2} pp");
    println!("traffic_least_per_s {least_per_s} requests");
}
