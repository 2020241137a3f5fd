//! Every strategy that moves traffic, through real HAProxy with real agents: no request is lost, and traffic follows
//! weights.
//!
//! What happens in each scenario, and under which load: `tests/src/under_load.rs`. `load_balancers.rs` has the rolling
//! release, `tests/examples/bench_traffic.rs` measures all of them.

use windlass_tests::under_load::{Findings, Scenario, Stage};

fn check(findings: &Findings, windows: usize) {
    let Findings {
        scenario,
        counts,
        second_tries,
        ..
    } = findings;
    assert_eq!(counts.failed, 0, "{scenario:?}: {counts:?}");
    assert_eq!(
        *second_tries, 0,
        "{scenario:?}: HAProxy tried something again"
    );
    assert!(
        counts.requests > 1000 && findings.mean_per_s >= 500.0,
        "{scenario:?} went on under load: {findings:?}"
    );
    let fails = *scenario == Scenario::CanaryFailing;
    assert_eq!(counts.told_to_fail > 0, fails, "{scenario:?}: {counts:?}");
    assert_eq!(findings.windows.len(), windows, "{scenario:?}");
    assert!(
        findings.share_error_pp() <= 3.0,
        "{scenario:?}: shares are not what weights make them: {:?}",
        findings.windows
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn no_strategy_loses_a_request() {
    let mut stage = Stage::prepare().await;
    for (scenario, windows) in [
        (Scenario::Gray, 1),
        (Scenario::CanarySlow, 1),
        (Scenario::CanaryFailing, 0),
        (Scenario::BlueGreen, 2),
        (Scenario::BackInStep1, 1),
        (Scenario::BackInStep2, 1),
        (Scenario::BackInStep3, 1),
        (Scenario::KilledServer, 0),
    ] {
        let began = std::time::Instant::now();
        let findings = stage.play(scenario).await;
        println!(
            "{scenario:?}: {} requests in {:.1} s, {:.0} per second, at least {}, slowest {} ms, shares {:.2} pp off",
            findings.counts.requests,
            began.elapsed().as_secs_f64(),
            findings.mean_per_s,
            findings.least_per_s,
            findings.counts.slowest_ms,
            findings.share_error_pp(),
        );
        check(&findings, windows);
    }
}
