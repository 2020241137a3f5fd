//! Random tasks, kills and cuts for a while; what has to be true at the end.
//!
//! Eight seconds as a part of the suite; `WINDLASS_SOAK_SECONDS` makes it longer. What is drawn follows from a fixed seed; when it
//! hits what is the machine's to say, so a run is not repeated exactly.

use std::{
    collections::BTreeMap,
    os::unix::process::ExitStatusExt as _,
    time::{Duration, Instant},
};

use windlass_agent::proc::ProcessId;
use windlass_domain::task::{Action, Check, Outcome, Probe, TaskId};

use crate::support::*;

const SEED: u64 = 0x5eed_0a6e_4712;
const DEFAULT_SECONDS: u64 = 8;
/// Tasks that wait or run at any time.
const OUTSTANDING: usize = 6;

/// SplitMix64: enough to choose.
struct Draw(u64);

impl Draw {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (bits ^ (bits >> 31)) % below
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.next(count) == 0
    }
}

/// What has to become of a task.
#[derive(Debug, Clone)]
struct Expect {
    outcome: Outcome,
    exit_code: Option<i32>,
    /// Whether it leaves a line when it runs to its end.
    leaves_line: bool,
    revoked: bool,
}

struct Load {
    draw: Draw,
    orders: Vec<Order>,
    expect: BTreeMap<TaskId, Expect>,
    log: std::path::PathBuf,
    file: std::path::PathBuf,
    port: u16,
}

impl Load {
    fn push(&mut self, gateway: &Gateway) {
        let which = usize::try_from(self.draw.next(self.orders.len() as u64)).unwrap();
        let line = format!("echo $WINDLASS_TASK >> {}", self.log.display());
        let code = i32::try_from(self.draw.next(4)).unwrap();
        let pause = self.draw.next(30);
        let kind = self.draw.next(10);
        let revoked = self.draw.one_in(10);
        let order = &mut self.orders[which];
        let task = match kind {
            0 => order.start(&["/bin/sh", "-c", "exec sleep 600"]),
            1 => order.task(Action::StopSupervised { grace_ms: 500 }),
            2 => order.task(Action::Check(Check {
                probe: Probe::Tcp {
                    address: format!("127.0.0.1:{}", self.port),
                },
                interval_ms: 20,
                try_timeout_ms: 5000,
                healthy_for_ms: 40,
            })),
            3 => order.task(Action::WriteFile {
                path: self.file.display().to_string(),
                content: "written".into(),
                mode: 0o644,
            }),
            // Much output, so that the journal is written anew from time to time.
            4 => order.script(&format!(
                "{line}; head -c 40000 /dev/zero | tr '\\0' x; exit {code}"
            )),
            _ => order.script(&format!("{line}; sleep 0.{pause:02}; exit {code}")),
        };
        let is_script = matches!(task.action, Action::Script(_));
        let fails = is_script && code != 0;
        let id = gateway.push(task);
        let expect = Expect {
            outcome: if fails {
                Outcome::Failed
            } else {
                Outcome::Succeeded
            },
            exit_code: is_script.then_some(code),
            leaves_line: is_script,
            revoked,
        };
        self.expect.insert(id, expect);
        if revoked {
            gateway.revoke(id);
        }
    }
}

/// Starts the agent; every other time with a crash point somewhere ahead.
fn start(agent: &mut TestAgent, draw: &mut Draw) {
    if draw.one_in(2) {
        let at = draw.next(60) + 1;
        agent.start_with(&[("WINDLASS_CRASH_AT", at.to_string())]);
    } else {
        agent.start();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn soak_of_random_kills_and_cuts() {
    let seconds = std::env::var("WINDLASS_SOAK_SECONDS")
        .map_or(DEFAULT_SECONDS, |text| text.parse().unwrap());
    let gateway = Gateway::start().await;
    let proxy = Proxy::start(gateway.port).await;
    let mut agent =
        TestAgent::register_at(&gateway, proxy.port, tempfile::tempdir().unwrap()).await;
    let written = agent.dir.path().join("written");
    std::fs::create_dir(&written).unwrap();
    agent.policy(|policy| policy.path_roots = vec![written.clone()]);
    agent.start();
    let log = agent.open_file("runs.log");

    // The application that has to live through it all.
    let app_log = agent.open_file("app.log");
    let mut kept = Order::new();
    let command = format!("echo up >> {}; exec sleep 6000", app_log.display());
    let up = gateway.run(kept.start(&["/bin/sh", "-c", &command])).await;
    assert_eq!(up.outcome, Outcome::Succeeded);
    let pid_of_kept = |state: &State| {
        let apps = &state.states.last()?.apps;
        apps.iter().find(|app| app.instance == kept.instance)?.pid
    };
    let pid = gateway.until("its pid", pid_of_kept).await;
    until("its line", || (lines(&app_log) == ["up"]).then_some(())).await;
    let app = ProcessId::of(pid).unwrap();

    let mut load = Load {
        draw: Draw(SEED),
        orders: vec![Order::new(), Order::new(), Order::new()],
        expect: BTreeMap::new(),
        log: log.clone(),
        file: written.join("file"),
        port: gateway.port,
    };
    let mut draw = Draw(SEED + 1);
    let (mut kills, mut crashes, mut cuts) = (0, 0, 0);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(seconds) {
        let done = gateway.state().results.len() - 1;
        for _ in load.expect.len() - done..OUTSTANDING {
            load.push(&gateway);
        }
        // Not a wait for something: when trouble comes is what is random here.
        tokio::time::sleep(Duration::from_millis(draw.next(120))).await;
        if let Some(status) = agent.ended() {
            assert_eq!(status.signal(), Some(9), "{status}");
            crashes += 1;
            start(&mut agent, &mut draw);
        }
        match draw.next(12) {
            0 => {
                agent.kill();
                kills += 1;
                start(&mut agent, &mut draw);
            }
            1 => {
                cuts += 1;
                gateway.kick();
            }
            2 => {
                cuts += 1;
                proxy.cut_next(Cut {
                    towards_agent: draw.one_in(2),
                    after: usize::try_from(draw.next(6000)).unwrap() + 1,
                });
                gateway.kick();
            }
            _ => {}
        }
        assert!(app.is_alive(), "the application is gone");
    }

    // Calm: the agent as it is now, or without the wish to crash when it is down.
    agent.kill();
    agent.start();
    for (id, expect) in &load.expect {
        let result = gateway.result(*id).await;
        let ran = lines(&log)
            .iter()
            .filter(|line| **line == id.to_string())
            .count();
        let context = format!("{id} {expect:?} ran {ran} times, {result:?}");
        if expect.revoked && result.outcome == Outcome::Revoked {
            assert!(ran <= 1, "{context}");
            continue;
        }
        assert_eq!(result.outcome, expect.outcome, "{context}");
        assert_eq!(result.exit_code, expect.exit_code, "{context}");
        assert_eq!(ran, usize::from(expect.leaves_line), "{context}");
    }
    {
        let state = gateway.state();
        assert!(state.conflicts.is_empty(), "{:?}", state.conflicts);
        assert_eq!(state.results.len(), load.expect.len() + 1);
    }
    // Nothing ran that was not asked for.
    let known: Vec<String> = load.expect.keys().map(ToString::to_string).collect();
    assert!(lines(&log).iter().all(|line| known.contains(line)));
    assert!(app.is_alive());
    assert_eq!(gateway.until("its pid", pid_of_kept).await, pid);
    assert_eq!(lines(&app_log), ["up"]);
    eprintln!(
        "{seconds} s: {} tasks, {kills} kills, {crashes} crashes, {cuts} cuts",
        load.expect.len()
    );
    agent.stop_all();
    assert!(!app.is_alive());
    assert_eq!(agent.left_behind(), []);
}
