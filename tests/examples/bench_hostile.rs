//! `hostile_p99_ms`: what 99 of 100 requests of others wait at most while plugins of every hostile kind are dropped and called.
//! See `windlass_tests::hostile`.

use windlass_tests::{
    guests::PluginDirectory,
    host::{Setup, TestHost},
    hostile,
};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let directory = PluginDirectory::shipped();
    let setup = Setup {
        agents: 1,
        plugins: Some(directory.path()),
        ..Setup::default()
    };
    let host = TestHost::start(setup).await;
    let waited = hostile::run(&host, &directory).await;
    let p99 = waited.percentile(99).as_secs_f64() * 1e3;
    println!("hostile_p99_ms {p99:.1} ms");
    eprintln!(
        "bench_hostile: {} requests, half of them within {:.1} ms",
        waited.requests(),
        waited.percentile(50).as_secs_f64() * 1e3
    );
}
