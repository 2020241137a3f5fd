//! What answers took is known of each release by itself: HAProxy's own mean is still that of the one before.

use windlass_tests::{balanced::Balanced, host::TestHost};

use super::{get, who};

/// Answers that were measured: how many, and what they took together in milliseconds.
async fn answers(host: &TestHost, balanced: &Balanced) -> (u64, f64) {
    let all = balanced.back_ends(host, &balanced.pool).await;
    let figure = |name: &str| -> Vec<f64> {
        let of_all = all
            .iter()
            .map(|back_end| &back_end["shown"]["responses"][name]);
        of_all.filter_map(serde_json::Value::as_f64).collect()
    };
    let count: f64 = figure("count").iter().sum();
    (
        count as u64,
        figure("total_us").iter().sum::<f64>() / 1000.0,
    )
}

/// 600 fast answers of each server, then 20 slow ones of each.
pub(crate) async fn answers_are_timed(host: &TestHost, balanced: &mut Balanced) {
    const DELAY_MS: f64 = 40.0;
    balanced.upload(host, "1.2.0", &[("delay_ms", "40")]).await;
    for _ in 0..600 * balanced.ports.len() {
        who(&get(balanced.front, "/", &[]));
    }
    balanced.release(host, "1.2.0", "all-in-one").await;
    let (before, took_before) = answers(host, balanced).await;
    let asked = 20 * balanced.ports.len();
    for _ in 0..asked {
        who(&get(balanced.front, "/", &[]));
    }
    let (after, took) = answers(host, balanced).await;
    assert_eq!(after - before, asked as u64);
    let mean_ms = (took - took_before) / asked as f64;
    // HAProxy's whole milliseconds: half of one is 256 of the sum, for each server.
    let off = 512.0 / 20.0;
    assert!(
        mean_ms > DELAY_MS - off && mean_ms < DELAY_MS + 2.0 * off,
        "{mean_ms} ms on average"
    );
    let sliding = balanced.back_ends(host, &balanced.pool).await;
    let sliding = sliding[0]["shown"]["latency_ms"].as_f64();
    assert!(sliding.is_some_and(|mean| mean < 10.0), "{sliding:?}");
    balanced.release(host, "1.0.0", "all-in-one").await;
}
