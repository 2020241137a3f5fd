//! Releases of the sample application through a real load balancer, while clients never stop asking.
//!
//! Four servers, two in each of the cells `cell-a` (blue) and `cell-b` (green). Two loads for the whole time of each
//! scenario, half of the requests on connections that are kept alive and half with a connection each, `GET` and `POST` in
//! turn, never retried. What each scenario has to come to is checked here; what was counted is the caller's to judge.
//!
//! | scenario | what happens |
//! | --- | --- |
//! | `Rolling` | one server after the other; then weights are set by hand, and traffic follows them |
//! | `Gray` | one after the other without getting weights back; a person sets them |
//! | `CanarySlow` | a version that answers late is rolled back by itself |
//! | `CanaryFailing` | a version that answers with errors of its own is rolled back by itself |
//! | `BlueGreen` | to the end, with traffic shifted by hand to what was just released |
//! | `BackInStep1`, `2`, `3` | a blue-green release that is rolled back in that step |
//! | `KilledServer` | a blue-green release in which the server is killed and started again; no agent is back when it goes on |

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{
    balanced::Balanced,
    host::{Setup, TestHost, text},
    load::{Connections, Counts, Load, LoadSpec},
    scene::{act, nodes_when},
};

/// Requests per second of both loads together.
pub const REQUESTS_PER_S: u32 = 700;
/// Requests in a window in which shares are measured.
pub const WINDOW: u64 = 5000;

/// Requests before a scenario begins, and after it has ended.
const AROUND: u64 = 500;
/// Requests that a canary has to have had before it is judged: with [`CANARY_PERCENT`] of the traffic this takes more
/// requests than a window has, so that weights stay for the whole of it.
const JUDGED_REQUESTS: u64 = 1400;
const CANARY_PERCENT: u32 = 20;
/// Of traffic that is shifted to green in step 2, and to blue in step 4.
const GRAY_PERCENTS: [u32; 2] = [30, 20];

/// What happens under load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the table in the module's head says what each is"
)]
pub enum Scenario {
    Rolling,
    Gray,
    CanarySlow,
    CanaryFailing,
    BlueGreen,
    BackInStep1,
    BackInStep2,
    BackInStep3,
    KilledServer,
}

impl Scenario {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Rolling,
        Self::Gray,
        Self::CanarySlow,
        Self::CanaryFailing,
        Self::BlueGreen,
        Self::BackInStep1,
        Self::BackInStep2,
        Self::BackInStep3,
        Self::KilledServer,
    ];
}

/// What was counted in a scenario.
#[derive(Debug, Clone)]
pub struct Findings {
    /// Of which.
    pub scenario: Scenario,
    /// Of both loads together.
    pub counts: Counts,
    /// Requests per second over its whole time.
    pub mean_per_s: f64,
    /// Requests in its poorest whole second.
    pub least_per_s: u64,
    /// Retries and redispatches of HAProxy, since it runs.
    pub second_tries: u64,
    /// Windows in which shares were measured.
    pub windows: Vec<Window>,
}

impl Findings {
    /// The largest distance of a measured share from the wanted one, in percentage points; 0 without a window.
    #[must_use]
    pub fn share_error_pp(&self) -> f64 {
        let errors = self.windows.iter().map(Window::error_pp);
        errors.fold(0.0, f64::max)
    }
}

/// A window in which shares were measured.
#[derive(Debug, Clone)]
pub struct Window {
    /// What traffic was measured, for people.
    pub what: String,
    /// Of servers, and of cells where one was given a share: wanted and measured share, in percent.
    pub shares: BTreeMap<String, (f64, f64)>,
}

impl Window {
    fn error_pp(&self) -> f64 {
        let errors = self.shares.values();
        errors.fold(0.0, |worst, (wanted, found)| {
            worst.max((wanted - found).abs())
        })
    }
}

/// A host with the application that scenarios are played on, one after the other.
pub struct Stage {
    host: TestHost,
    balanced: Balanced,
    /// The version that every server has.
    runs: &'static str,
}

impl Stage {
    /// Boots everything; version 1.0.0 runs on every server.
    pub async fn prepare() -> Self {
        let host = TestHost::start(Setup {
            agents: 4,
            ..Setup::default()
        })
        .await;
        let mut balanced = Balanced::prepare(&host).await;
        balanced.upload(&host, "2.0.0", &[]).await;
        balanced.upload(&host, "slow", &[("delay_ms", "40")]).await;
        balanced
            .upload(&host, "failing", &[("fail_every", "4")])
            .await;
        Self {
            host,
            balanced,
            runs: "1.0.0",
        }
    }

    /// Plays one scenario under load.
    ///
    /// # Panics
    /// When the order does not come to what it should, or a server has not what it should have afterwards.
    pub async fn play(&mut self, scenario: Scenario) -> Findings {
        let loads = [Connections::KeptAlive, Connections::OnePerRequest].map(|connections| {
            Load::start(LoadSpec {
                clients: 12,
                requests_per_s: REQUESTS_PER_S / 2,
                ..LoadSpec::to(self.balanced.front, connections)
            })
        });
        let other = if self.runs == "1.0.0" {
            "2.0.0"
        } else {
            "1.0.0"
        };
        Load::shares_of_all(&loads, AROUND).await;
        let run = self.run(&loads, other);
        let (released, windows) = match scenario {
            Scenario::Rolling => (true, run.rolling().await),
            Scenario::Gray => (true, run.gray().await),
            Scenario::CanarySlow => (false, run.canary("slow").await),
            Scenario::CanaryFailing => (false, run.canary("failing").await),
            Scenario::BlueGreen => (true, run.blue_green().await),
            Scenario::BackInStep1 => (false, run.back_in(1).await),
            Scenario::BackInStep2 => (false, run.back_in(2).await),
            Scenario::BackInStep3 => (false, run.back_in(3).await),
            Scenario::KilledServer => (true, self.killed_server(&loads, other).await),
        };
        if released {
            self.runs = other;
        }
        self.check_serves(scenario).await;
        Load::shares_of_all(&loads, AROUND).await;
        let second_tries = self.balanced.second_tries(&self.host).await;
        let mut counts = Counts::default();
        let (mut mean_per_s, mut least_per_s) = (0.0, 0);
        for load in loads {
            let report = load.stop().await;
            counts.add(&report.counts);
            mean_per_s += report.mean_per_s;
            least_per_s += report.least_per_s;
        }
        Findings {
            scenario,
            counts,
            mean_per_s,
            least_per_s,
            second_tries,
            windows,
        }
    }

    fn run<'a>(&'a self, loads: &'a [Load; 2], other: &'static str) -> Run<'a> {
        Run {
            host: &self.host,
            balanced: &self.balanced,
            loads,
            other,
        }
    }

    async fn killed_server(&mut self, loads: &[Load; 2], other: &'static str) -> Vec<Window> {
        let run = self.run(loads, other);
        let id = run.blue_green_order().await;
        run.waits(&id, "confirm 1 cut traffic").await;
        self.host.kill();
        self.host.boot(&[]).await;
        let run = self.run(loads, other);
        for gate in [
            "confirm 1 cut traffic",
            "confirm 2 release green",
            "confirm 3 switch traffic",
            "confirm 4 release blue",
        ] {
            run.confirm(&id, gate).await;
        }
        run.ended(&id, "succeeded").await;
        Vec::new()
    }

    /// Every server has the version, its full weight, and is found up by HAProxy.
    async fn check_serves(&self, scenario: Scenario) {
        for agent in &self.host.agents {
            let instance = agent.data.join("instances").join(&self.balanced.instance);
            let version = std::fs::read_to_string(instance.join("current/VERSION"));
            let version = version.expect("an installed version");
            assert_eq!(version, self.runs, "{scenario:?}: on {}", agent.name);
        }
        let pool = &self.balanced.pool;
        for back_end in self.balanced.back_ends(&self.host, pool).await {
            let shown = &back_end["shown"];
            assert_eq!(back_end["weight"], 100, "{scenario:?}: {back_end}");
            assert_eq!(shown["weight"], 100, "{scenario:?}: {back_end}");
            assert_eq!(shown["health"], "up", "{scenario:?}: {back_end}");
        }
    }
}

/// One scenario under way.
struct Run<'a> {
    host: &'a TestHost,
    balanced: &'a Balanced,
    loads: &'a [Load; 2],
    /// The version that is released.
    other: &'static str,
}

impl Run<'_> {
    async fn rolling(&self) -> Vec<Window> {
        let (host, balanced) = (self.host, self.balanced);
        balanced.release(host, self.other, "one-per-group").await;
        let weights = [100, 60, 40, 80];
        let ids = balanced.servers.iter().map(|(_, id)| id.as_str());
        let wanted: Vec<(&str, u32)> = ids.clone().zip(weights).collect();
        balanced.set_weights(host, &wanted).await;
        let window = self.measure("weights set by hand", &weights, None).await;
        let full: Vec<(&str, u32)> = ids.map(|id| (id, 100)).collect();
        balanced.set_weights(host, &full).await;
        vec![window]
    }

    async fn gray(&self) -> Vec<Window> {
        let mut order = self.balanced.order(self.other, "one-per-group");
        order["parameters"]["gray_traffic"] = true.into();
        let id = self.order(&order).await;
        let mut windows = Vec::new();
        for (group, weight) in (1..).zip([30, 60, 100, 100]) {
            self.waits(&id, &format!("confirm group {group}")).await;
            self.weigh(&id, &[(group - 1, weight)]).await;
            if group == 2 {
                let weights = [30, 60, 100, 100];
                windows.push(self.measure("gray traffic", &weights, None).await);
            }
            if group == 4 {
                self.weigh(&id, &[(0, 100), (1, 100)]).await;
            }
            self.act(&id, json!({ "action": "confirm" })).await;
        }
        self.ended(&id, "succeeded").await;
        windows
    }

    async fn canary(&self, version: &str) -> Vec<Window> {
        let parameters = json!({
            "percentages": [CANARY_PERCENT, 60, 100],
            "window_s": 1,
            "max_windows": 100,
            "min_requests": JUDGED_REQUESTS,
        });
        let order = self.order_of("canary", parameters, version);
        let id = self.order(&order).await;
        let judge = format!("judge {CANARY_PERCENT} %");
        let what = format!("`{judge}` is under way");
        nodes_when(self.host, &id, &what, |nodes| {
            named(nodes, &judge).is_some_and(|node| node["state"] == "running")
        })
        .await;
        let mut windows = Vec::new();
        // Who answers with errors does not say its server: its share could not be seen.
        if version == "slow" {
            windows.push(self.measure("a canary", &[75, 100, 100, 100], None).await);
        }
        self.ended(&id, "rolled_back").await;
        let nodes = crate::scene::nodes(self.host, &id).await;
        let judge = named(&nodes, &judge).expect("the judge");
        let says = if version == "slow" {
            "the new version answers in"
        } else {
            "requests to the new version failed"
        };
        assert!(text(&judge["message"]).contains(says), "{judge}");
        windows
    }

    async fn blue_green(&self) -> Vec<Window> {
        let id = self.blue_green_order().await;
        self.confirm(&id, "confirm 1 cut traffic").await;
        self.waits(&id, "confirm 2 release green").await;
        let mut windows = vec![self.shift(&id, "cell-b", GRAY_PERCENTS[0]).await];
        self.confirm(&id, "confirm 2 release green").await;
        self.confirm(&id, "confirm 3 switch traffic").await;
        self.waits(&id, "confirm 4 release blue").await;
        windows.push(self.shift(&id, "cell-a", GRAY_PERCENTS[1]).await);
        self.confirm(&id, "confirm 4 release blue").await;
        self.ended(&id, "succeeded").await;
        windows
    }

    async fn back_in(&self, step: u32) -> Vec<Window> {
        let id = self.blue_green_order().await;
        let gates = [
            "confirm 1 cut traffic",
            "confirm 2 release green",
            "confirm 3 switch traffic",
        ];
        let mut windows = Vec::new();
        for (number, gate) in (1..=step).zip(gates) {
            self.waits(&id, gate).await;
            if number < step {
                self.confirm(&id, gate).await;
                continue;
            }
            windows.push(match step {
                1 => self.measure("all to blue", &[1, 0, 1, 0], None).await,
                2 => self.shift(&id, "cell-b", GRAY_PERCENTS[0]).await,
                _ => self.measure("all to green", &[0, 1, 0, 1], None).await,
            });
        }
        self.act(&id, json!({ "action": "roll_back", "reason": "looks bad" }))
            .await;
        self.ended(&id, "rolled_back").await;
        windows
    }

    // -------------------------------------------------------------------------------------- what a person does

    fn order_of(&self, strategy: &str, parameters: Value, version: &str) -> Value {
        let mut order = self.balanced.order(version, "one-per-group");
        order["strategy"] = strategy.into();
        order["parameters"] = parameters;
        // A whole cell goes at once; the other one serves.
        order["limits"]["max_unavailable"] = "100%".into();
        order
    }

    async fn order(&self, order: &Value) -> String {
        self.host.order(order).await.expect("an order")
    }

    async fn blue_green_order(&self) -> String {
        self.order(&self.order_of("blue-green", json!({}), self.other))
            .await
    }

    async fn act(&self, order: &str, action: Value) {
        act(self.host, order, &action)
            .await
            .unwrap_or_else(|error| panic!("{action}: {error}"));
    }

    async fn waits(&self, order: &str, gate: &str) {
        let what = format!("`{gate}` waits for confirmation");
        nodes_when(self.host, order, &what, |nodes| {
            named(nodes, gate).is_some_and(|node| node["state"] == "awaiting_confirmation")
        })
        .await;
    }

    async fn confirm(&self, order: &str, gate: &str) {
        self.waits(order, gate).await;
        self.act(order, json!({ "action": "confirm" })).await;
    }

    async fn ended(&self, order: &str, state: &str) {
        let ended = self.host.order_ended(order).await;
        if ended["state"] != state {
            let nodes = crate::scene::nodes(self.host, order).await;
            panic!("{state} was expected: {ended}\n{nodes:?}");
        }
    }

    /// Sets weights of servers, by their places.
    async fn weigh(&self, order: &str, weights: &[(usize, u32)]) {
        let weights: Vec<Value> = weights
            .iter()
            .map(|(place, weight)| json!({ "server": self.balanced.servers[*place].1, "weight": weight }))
            .collect();
        let path = self.host.ws(&format!("orders/{order}/weights"));
        let body = json!({ "weights": weights });
        let set = self.host.api.post(&path, &body).await;
        set.unwrap_or_else(|error| panic!("{body}: {error}"));
    }

    /// Gives a cell a share, and measures what it gets.
    async fn shift(&self, order: &str, cell: &str, percent: u32) -> Window {
        let path = self.host.ws(&format!("orders/{order}/shift"));
        let body = json!({ "cell": cell, "percent": percent });
        let shifted = self.host.api.post(&path, &body).await;
        shifted.unwrap_or_else(|error| panic!("{body}: {error}"));
        let of = |place: usize| {
            let mine = place.is_multiple_of(2) == (cell == "cell-a");
            if mine { percent } else { 100 - percent }
        };
        let shares = [of(0), of(1), of(2), of(3)];
        let what = format!("{percent} % to {cell}");
        self.measure(&what, &shares, Some((cell, percent))).await
    }

    // -------------------------------------------------------------------------------------- what is measured

    /// Measures over a window what share each server gets; wanted is what these weights, or ones in their proportion, make.
    async fn measure(&self, what: &str, weights: &[u32], cell: Option<(&str, u32)>) -> Window {
        let pool = &self.balanced.pool;
        let shown = self.balanced.back_ends(self.host, pool).await;
        let shown: Vec<f64> = self
            .balanced
            .servers
            .iter()
            .map(|(name, id)| {
                let back_end = shown.iter().find(|back_end| back_end["server"] == **id);
                let weight = back_end.and_then(|back_end| back_end["shown"]["weight"].as_f64());
                weight.unwrap_or_else(|| panic!("{what}: a weight of {name}: {shown:?}"))
            })
            .collect();
        let percent = |weight: f64, all: f64| 100.0 * weight / all;
        let all_wanted = f64::from(weights.iter().sum::<u32>());
        let all_shown: f64 = shown.iter().sum();
        for (wanted, shown) in weights.iter().zip(&shown) {
            let wanted = percent(f64::from(*wanted), all_wanted);
            // Whole weights are as near as can be.
            assert!(
                (wanted - percent(*shown, all_shown)).abs() <= 1.0,
                "{what}: HAProxy has other weights: {weights:?} {shown:?}"
            );
        }
        let found = Load::shares_of_all(self.loads, WINDOW).await;
        let of = |name: &str| 100.0 * found.get(name).copied().unwrap_or(0.0);
        let servers = &self.balanced.servers;
        let mut shares: BTreeMap<String, (f64, f64)> = servers
            .iter()
            .zip(weights)
            .map(|((name, _), weight)| {
                let wanted = percent(f64::from(*weight), all_wanted);
                (name.clone(), (wanted, of(name)))
            })
            .collect();
        if let Some((cell, percent)) = cell {
            let first = usize::from(cell != "cell-a");
            let mine = servers.iter().skip(first).step_by(2);
            let found = mine.map(|(name, _)| of(name)).sum();
            shares.insert(cell.to_owned(), (f64::from(percent), found));
        }
        Window {
            what: what.to_owned(),
            shares,
        }
    }
}

fn named<'a>(nodes: &'a [Value], name: &str) -> Option<&'a Value> {
    nodes.iter().find(|node| node["name"] == name)
}
