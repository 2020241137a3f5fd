//! The server is killed at commit boundaries of a blue-green release and of its rollback, and started again.
//!
//! Processes are real, and so is what the agents run: scripts leave lines in a file. Whatever the server went through, each
//! ran exactly once, the order ends as it should, every server has the right release and its full weight. A kill is a
//! crash point: before and after each commit is applied and synced, around each event and each effect, in each exchange
//! with an agent. Here stands a sample of them, spread evenly; `WINDLASS_SOAK_SECONDS` set: every one. (`crash_stages.rs` has
//! each commit of these orders and more, inside one process.)

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};
use windlass_tests::{
    host::{Setup, TestHost, items, text},
    release::{Counted, order_once},
};

/// Hosts that work side by side.
const LANES: usize = 3;
/// Kills of each story in the sample.
const SAMPLE: u64 = 15;

/// What becomes of the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Story {
    /// Every step is confirmed.
    ToTheEnd,
    /// Traffic is shifted to green in step 2, and the order is rolled back in step 3.
    RolledBack,
}

/// A host whose servers have the package 1 (2.0.0), by the run `first`.
struct Stage {
    host: TestHost,
    counted: Counted,
}

impl Stage {
    async fn ready() -> Self {
        let host = TestHost::start(Setup {
            agents: 2,
            ..Setup::default()
        })
        .await;
        let counted = Counted::prepare(&host).await;
        let id = host.order(&counted.order("first", 1)).await;
        let order = host.order_ended(&id.expect("an order")).await;
        counted.check_succeeded(&host, &order, "first").await;
        Self { host, counted }
    }

    /// Releases the package 0 by a run of this name; each process of the server is killed at its own crash point, and the
    /// last one lives.
    async fn play(&mut self, story: Story, run: &str, kills: &[u64]) {
        let package = match story {
            // What is there already is released again: it does not matter here.
            Story::ToTheEnd => 1,
            Story::RolledBack => 0,
        };
        let mut wanted = self.counted.order(run, package);
        wanted["strategy"] = "blue-green".into();
        wanted["parameters"] = json!({});
        wanted["limits"] = json!({ "max_unavailable": "100%" });
        let before = self.executions();
        let path = self.host.ws("orders");
        let mut kills = kills.iter();
        let order = 'lives: loop {
            if !self.host.has_ended() {
                self.host.kill();
            }
            let env: Vec<(String, String)> = kills
                .next()
                .map(|at| ("WINDLASS_CRASH_AT".to_owned(), at.to_string()))
                .into_iter()
                .collect();
            let last = env.is_empty();
            self.host.spawn(&env);
            if !self.host.ready_or_gone().await {
                assert!(
                    !last,
                    "{run}: it died by itself:\n{}",
                    self.host.server_log()
                );
                continue;
            }
            let id = loop {
                match order_once(&self.host.api, &path, run, &wanted).await {
                    Ok(id) => break id,
                    Err(_) if self.host.has_ended() => continue 'lives,
                    Err(_) => {}
                }
            };
            match self.drive(&id, story).await {
                // Without a kill left this is the end; with one, the point lies behind it.
                Some(order) if last => break order,
                Some(_) => {}
                None => assert!(
                    !last,
                    "{run}: it died by itself:\n{}",
                    self.host.server_log()
                ),
            }
        };
        self.check(story, run, &order, &before).await;
    }

    /// Does what the person of a story does until the order is over and nothing of it is left to be done; `None`: the server
    /// died.
    async fn drive(&mut self, id: &str, story: Story) -> Option<Value> {
        let mut ticks = tokio::time::interval(std::time::Duration::from_millis(10));
        let deadline = std::time::Instant::now() + 2 * windlass_tests::host::WITHIN;
        let mut last = Value::Null;
        loop {
            ticks.tick().await;
            if self.host.has_ended() {
                return None;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "{story:?}: the order is not over: {last}"
            );
            let Ok(order) = self.host.api.get(&self.order(id, "")).await else {
                continue;
            };
            last = order.clone();
            match order["state"].as_str().unwrap_or_default() {
                "succeeded" | "rolled_back" => return Some(order),
                "awaiting_confirmation" => {
                    if let Some((what, body)) = self.next(id, story).await {
                        // It may have been done before the server died, or be refused for what is under way: it is asked for
                        // again as long as the order waits.
                        drop(self.host.api.post(&self.order(id, what), &body).await);
                    }
                }
                "failed" | "cancelled" => panic!("{story:?}: {order}"),
                // Blocked may be what waits for an agent's session.
                _ => {}
            }
        }
    }

    fn order(&self, id: &str, rest: &str) -> String {
        self.host.ws(&format!("orders/{id}{rest}"))
    }

    /// What the person does next.
    async fn next(&self, id: &str, story: Story) -> Option<(&'static str, Value)> {
        let nodes = self.host.api.get(&self.order(id, "/nodes")).await.ok()?;
        let nodes = items(&nodes);
        let gate = nodes
            .iter()
            .find(|node| node["kind"] == "gate" && node["state"] == "awaiting_confirmation")?;
        let name = text(&gate["name"]);
        let confirm = json!({ "action": "confirm", "node": gate["node"] });
        if story == Story::RolledBack && name.starts_with("confirm 3") {
            let back = json!({ "action": "roll_back", "reason": "bad" });
            return Some(("/actions", back));
        }
        if story == Story::RolledBack && name.starts_with("confirm 2") {
            let traffic = self.host.api.get(&self.order(id, "/traffic")).await.ok()?;
            if traffic["edit"].is_null() {
                return Some(("/shift", json!({ "cell": "cell-b", "percent": 20 })));
            }
        }
        Some(("/actions", confirm))
    }

    /// Every line that scripts left.
    fn executions(&self) -> BTreeMap<String, u32> {
        let lines = fs::read_to_string(self.host.path().join("executions"));
        let mut counts = BTreeMap::new();
        for line in lines.expect("the file of executions").lines() {
            *counts.entry(line.to_owned()).or_default() += 1;
        }
        counts
    }

    async fn check(&self, story: Story, run: &str, order: &Value, before: &BTreeMap<String, u32>) {
        let (state, executed) = match story {
            Story::ToTheEnd => (
                "succeeded",
                vec![
                    format!("{run} configure agent-1"),
                    format!("{run} configure agent-2"),
                ],
            ),
            // Blue is never touched; green is brought back with the steps that had put there what comes back.
            Story::RolledBack => (
                "rolled_back",
                vec![
                    "first configure agent-2".to_owned(),
                    format!("{run} configure agent-2"),
                ],
            ),
        };
        assert_eq!(order["state"], state, "{run}: {order}");
        let mut expected = before.clone();
        for line in executed {
            *expected.entry(line).or_default() += 1;
        }
        assert_eq!(self.executions(), expected, "{run}: each script runs once");
        let mut orders = vec![text(&order["id"])];
        if story == Story::RolledBack {
            orders.push(text(&order["rolled_back_by"]));
        }
        for id in orders {
            let nodes = self.host.api.get(&self.order(&id, "/nodes")).await;
            for node in items(&nodes.expect("nodes")) {
                assert!(
                    node["kind"] != "step" || node["attempt"].as_u64() <= Some(1),
                    "{run}: one attempt: {node}"
                );
            }
        }
        for agent in &self.host.agents {
            let instance = agent.data.join("instances").join(&self.counted.instance);
            let version = fs::read_to_string(instance.join("current/VERSION"));
            assert_eq!(
                version.expect("a version"),
                "2.0.0",
                "{run}: {}",
                agent.name
            );
        }
        let path = self
            .host
            .ws(&format!("pools/{}/weights", self.counted.pool));
        let weights = items(&self.host.api.get(&path).await.expect("weights"));
        assert_eq!(weights.len(), 2, "{run}: {weights:?}");
        for weight in weights {
            assert_eq!(weight["weight"], 100, "{run}: {weight}");
        }
    }
}

/// How many crash points a process passes from its start to the end of a story.
async fn count_points(story: Story) -> u64 {
    let mut stage = Stage::ready().await;
    let log: PathBuf = stage.host.path().join("crash-points");
    stage.host.stop().await;
    // As in every run: the process that is killed is a fresh one.
    stage
        .host
        .boot(&[("WINDLASS_CRASH_LOG".to_owned(), log.display().to_string())])
        .await;
    let mut order = stage.counted.order("count", 0);
    order["strategy"] = "blue-green".into();
    order["parameters"] = json!({});
    order["limits"] = json!({ "max_unavailable": "100%" });
    let id = stage.host.order(&order).await.expect("an order");
    stage.drive(&id, story).await.expect("nobody dies");
    stage.host.stop().await;
    lines(&log)
}

fn lines(file: &Path) -> u64 {
    let text = fs::read_to_string(file).expect("the log of crash points");
    u64::try_from(text.lines().count()).expect("small")
}

async fn at_crash_points(story: Story) {
    let points = count_points(story).await;
    assert!(points > 100, "{story:?}: {points} crash points");
    let every = match std::env::var("WINDLASS_SOAK_SECONDS") {
        Ok(_) => 1,
        Err(_) => points.div_ceil(SAMPLE),
    };
    let kills: Vec<u64> = (1..=points)
        .step_by(usize::try_from(every).expect("small"))
        .collect();
    println!("{story:?}: {points} crash points, {} kills", kills.len());
    let kills = Arc::new(Mutex::new(kills.into_iter()));
    let mut lanes = tokio::task::JoinSet::new();
    for lane in 0..LANES {
        let kills = kills.clone();
        lanes.spawn(async move {
            let mut stage = Stage::ready().await;
            loop {
                let at = kills.lock().expect("nobody panicked with it").next();
                let Some(at) = at else {
                    return;
                };
                let run = format!("{story:?}-{lane}-{at}");
                stage.play(story, &run, &[at]).await;
            }
        });
    }
    while let Some(done) = lanes.join_next().await {
        done.expect("a lane");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn soak_of_kills_in_a_blue_green_release() {
    at_crash_points(Story::ToTheEnd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn soak_of_kills_in_a_blue_green_release_that_is_rolled_back() {
    at_crash_points(Story::RolledBack).await;
}
