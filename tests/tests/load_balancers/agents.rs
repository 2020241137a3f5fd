//! Load balancers whose agent does not answer, or may not host any.

use std::fs;

use serde_json::{Value, json};
use tokio::time::{Duration, Instant};
use windlass_tests::{
    balanced::Balanced,
    host::{Setup, TestHost, eventually},
};

use super::{get, try_get, who};

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_mute_or_may_not_host_load_balancers() {
    let mut host = TestHost::start(Setup::default()).await;
    let balanced = Balanced::prepare(&host).await;
    let second = balanced.servers[1].1.clone();

    // Its agent is connected and gives no answer: it is waited for once, and what is wished is kept.
    host.signal_agent(0, "STOP");
    eventually("the state says that there was no answer", || async {
        let state = balanced.state(&host).await.expect("a state");
        let error = state["error"].as_str().unwrap_or_default();
        if error.contains("gave no answer") {
            Ok(())
        } else {
            Err(state.to_string())
        }
    })
    .await;
    let asked = Instant::now();
    for _ in 0..10 {
        let state = balanced.state(&host).await.expect("a state");
        assert_ne!(state["error"], "", "{state}");
    }
    assert!(
        asked.elapsed() < Duration::from_secs(5),
        "ten looks at a mute agent took {:?}",
        asked.elapsed()
    );
    let kept = balanced.set_weights(&host, &[(&second, 0)]).await;
    assert!(kept.iter().any(|one| one["weight"] == 0), "{kept:?}");
    who(&get(balanced.front, "/", &[]));
    host.signal_agent(0, "CONT");
    shows_weight(&host, &balanced, &second, 0).await;
    for _ in 0..4 {
        assert_ne!(who(&get(balanced.front, "/", &[])), balanced.servers[1].0);
    }

    // Its administrator wants none on this server any more: HAProxy ends, and the state says why.
    host.kill_agent(0);
    let allow = |allowed: bool, host: &TestHost| {
        let path = host.agents[0].data.join("config.json");
        let config = fs::read(&path).expect("the agent's configuration");
        let mut config: Value = serde_json::from_slice(&config).expect("JSON");
        config["policy"]["load_balancers"] = allowed.into();
        fs::write(&path, config.to_string()).expect("the agent's configuration");
    };
    allow(false, &host);
    host.start_agent(0, &[]);
    host.wait_online().await;
    eventually("nobody listens, and the state says why", || async {
        let state = balanced.state(&host).await.expect("a state");
        let error = state["error"].as_str().unwrap_or_default();
        let listens = try_get(balanced.front, "/", &[]).is_ok();
        if !listens && error.contains("policy.load_balancers") && state["running"] == false {
            Ok(())
        } else {
            Err(format!("listens: {listens}, {state}"))
        }
    })
    .await;

    // And then he does again: as it was.
    host.kill_agent(0);
    allow(true, &host);
    host.start_agent(0, &[]);
    host.wait_online().await;
    balanced.wait_current(&host).await;
    shows_weight(&host, &balanced, &second, 0).await;
    assert_ne!(who(&get(balanced.front, "/", &[])), balanced.servers[1].0);
}

async fn shows_weight(host: &TestHost, balanced: &Balanced, server: &str, weight: u32) {
    eventually("HAProxy shows the weight", || async {
        let back_ends = balanced.back_ends(host, &balanced.pool).await;
        let shown = back_ends
            .iter()
            .find(|one| one["server"] == server)
            .map(|one| one["shown"]["weight"].clone());
        if shown == Some(json!(weight)) {
            Ok(())
        } else {
            Err(format!("{back_ends:?}"))
        }
    })
    .await;
}
