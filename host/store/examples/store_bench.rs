//! Prints `store_commits_per_s` and `store_vs_sled_ratio`: `store_bench [rounds] [seconds of a round]`.

use std::time::Duration;

use anyhow::Context;

#[tokio::main(worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let rounds = arguments.next().map_or(Ok(9), |text| text.parse())?;
    let seconds = arguments.next().map_or(Ok(2.0), |text| text.parse())?;
    let directory = tempfile::tempdir().context("a directory for the measurement")?;
    let figures =
        windlass_store::bench::commits(directory.path(), rounds, Duration::from_secs_f64(seconds))
            .await?;
    println!("store_commits_per_s {:.0} 1/s", figures.store_commits_per_s);
    println!(
        "bare_sled_commits_per_s {:.0} 1/s",
        figures.bare_commits_per_s
    );
    println!("store_vs_sled_ratio {:.3} ratio", figures.ratio);
    Ok(())
}
