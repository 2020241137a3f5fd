//! Hostile plugins of every kind against the real server: others are served all the while, and each culprit is named.

use std::time::Duration;

use windlass_tests::{
    guests::PluginDirectory,
    host::{Setup, TestHost},
    hostile,
};

/// The figure itself is a line of `make bench`; this bound only tells being served from not being served.
const SERVED_WITHIN: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_are_served_while_every_kind_of_plugin_is_hostile() {
    let directory = PluginDirectory::shipped();
    let mut host = TestHost::start(Setup {
        agents: 1,
        plugins: Some(directory.path()),
        ..Setup::default()
    })
    .await;
    let waited = hostile::run(&host, &directory).await;
    assert!(waited.requests() > 100, "{}", waited.requests());
    let p99 = waited.percentile(99);
    eprintln!("{} requests of others: p99 {p99:?}", waited.requests());
    assert!(p99 < SERVED_WITHIN, "{p99:?}");
    // The same directory does no harm at the next start.
    host.restart().await;
    let good = host.api.get("/v1/plugins/good").await.expect("it is there");
    assert_eq!(good["state"], "active");
}
