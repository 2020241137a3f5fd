//! The server is killed at every counted crash point of a two-group release, and at random ones, and started again.
//!
//! Agents are real processes. Each release's scripts leave lines in a file: whatever the server went through, each ran
//! exactly once; the order ends as it should; weights and states are right.

use std::{collections::BTreeMap, fs};

use windlass_tests::{
    host::{Setup, TestHost},
    release::{Counted, order_once},
};

/// Hosts that work side by side.
const LANES: u64 = 3;
/// Random schedules.
const SCHEDULES: u64 = 200;

/// A small generator with a fixed seed: the same schedules in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

async fn ready() -> (TestHost, Counted) {
    let host = TestHost::start(Setup {
        agents: 2,
        ..Setup::default()
    })
    .await;
    let counted = Counted::prepare(&host).await;
    // The first release has nothing to stop: the ones that are killed all have the same steps.
    release(&host, &counted, "first", 1).await;
    (host, counted)
}

/// One release without any kill.
async fn release(host: &TestHost, counted: &Counted, run: &str, package: usize) {
    let id = host
        .order(&counted.order(run, package))
        .await
        .expect("an order");
    let order = host.order_ended(&id).await;
    counted.check_succeeded(host, &order, run).await;
}

/// One release in which each process of the server is killed at its own crash point, and the last one lives.
async fn release_with_kills(
    host: &mut TestHost,
    counted: &Counted,
    run: &str,
    package: usize,
    kills: &[u64],
) {
    let wanted = counted.order(run, package);
    let path = host.ws("orders");
    let mut kills = kills.iter();
    host.kill();
    let id = 'made: loop {
        let env: Vec<(String, String)> = kills
            .next()
            .map(|at| ("WINDLASS_CRASH_AT".to_owned(), at.to_string()))
            .into_iter()
            .collect();
        let last = env.is_empty();
        host.spawn(&env);
        if !host.ready_or_gone().await {
            assert!(
                !last,
                "run {run}: the server died by itself:\n{}",
                host.server_log()
            );
            continue;
        }
        loop {
            match order_once(&host.api, &path, run, &wanted).await {
                Ok(id) => {
                    if last {
                        break 'made id;
                    }
                    // It was made; the kill comes while it runs, or never when the point is behind its end.
                    if !died_or_done(host, &id).await {
                        // The point lies behind the order's end: it may still be passed at any moment.
                        host.kill();
                    }
                    continue 'made;
                }
                Err(_) if host.has_ended() => continue 'made,
                Err(_) => {}
            }
        }
    };
    let order = host.order_ended(&id).await;
    counted.check_succeeded(host, &order, run).await;
}

/// Waits until the server has died (true) or the order has ended (false).
async fn died_or_done(host: &mut TestHost, id: &str) -> bool {
    let mut ticks = tokio::time::interval(std::time::Duration::from_millis(10));
    loop {
        ticks.tick().await;
        if host.has_ended() {
            return true;
        }
        if let Ok(order) = host.api.get(&host.ws(&format!("orders/{id}"))).await
            && order["state"] == "succeeded"
        {
            return false;
        }
    }
}

/// How many crash points a server's process passes from its start to the end of a release, by name.
async fn count_points(host: &mut TestHost, counted: &Counted) -> (u64, BTreeMap<String, u64>) {
    host.stop().await;
    let log = host.path().join("crash-points");
    host.boot(&[("WINDLASS_CRASH_LOG".to_owned(), log.display().to_string())])
        .await;
    host.wait_online().await;
    release(host, counted, "count", 0).await;
    host.stop().await;
    host.boot(&[]).await;
    let mut names = BTreeMap::new();
    let lines = fs::read_to_string(&log).expect("the log of crash points");
    for name in lines.lines() {
        *names.entry(name.to_owned()).or_default() += 1;
    }
    (lines.lines().count() as u64, names)
}

async fn lane(number: u64, schedules: Vec<Vec<u64>>) {
    let (mut host, counted) = ready().await;
    for (index, kills) in schedules.iter().enumerate() {
        let run = format!("lane-{number}-{index}-{kills:?}").replace([' ', '[', ']'], "");
        release_with_kills(&mut host, &counted, &run, index, kills).await;
    }
}

async fn in_lanes(schedules: Vec<Vec<u64>>) {
    let mut lanes = tokio::task::JoinSet::new();
    for number in 0..LANES {
        let mine = schedules
            .iter()
            .skip(usize::try_from(number).expect("small"))
            .step_by(usize::try_from(LANES).expect("small"));
        lanes.spawn(lane(number, mine.cloned().collect()));
    }
    while let Some(done) = lanes.join_next().await {
        done.expect("a lane");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_survives_a_kill_at_every_crash_point() {
    let (mut host, counted) = ready().await;
    let (points, names) = count_points(&mut host, &counted).await;
    drop(host);
    println!("{points} crash points: {names:?}");
    for expected in [
        "store.before_apply",
        "store.after_apply",
        "store.after_sync",
        "engine.before_apply",
        "engine.after_apply",
        "engine.after_commit",
        "executor.before_effect",
        "executor.after_effect",
        "gateway.before_push",
        "gateway.after_push",
        "gateway.before_report",
        "gateway.after_report",
        "gateway.before_ack",
        "gateway.after_ack",
    ] {
        assert!(
            names.contains_key(expected),
            "the release passes {expected}: {names:?}"
        );
    }
    in_lanes((1..=points).map(|point| vec![point]).collect()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_survives_random_kills() {
    let mut random = Random(0x5eed_0f57);
    let schedules = (0..SCHEDULES)
        .map(|_| {
            (0..1 + random.below(3))
                .map(|_| 1 + random.below(250))
                .collect()
        })
        .collect();
    in_lanes(schedules).await;
}
