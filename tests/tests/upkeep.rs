//! What may go and what stays while servers run it: packages, servers; limits of an order's environment; system events.

use std::{collections::BTreeMap, process::Command};

use hyper::Method;
use serde_json::json;
use windlass_tests::{
    host::{Setup, TestHost, eventually, items, text},
    problem::{accepted, ask, refused},
    scene::Scene,
};

#[tokio::test]
async fn what_servers_run_stays_and_what_happened_to_them_is_read() {
    let mut host = TestHost::start(Setup {
        agents: 3,
        ..Setup::default()
    })
    .await;
    let servers = host.servers().await;
    let scene = Scene::prepare_on(&host, "scene", servers[..1].to_vec()).await;
    scene.release(&host, 0).await;
    scene.release(&host, 1).await;

    packages_that_are_installed_stay(&host, &scene).await;
    a_bound_server_stays(&host, &scene).await;
    an_environment_that_is_too_large_is_refused(&host, &scene).await;
    sessions_that_evict_each_other_are_one_event(&mut host, &servers).await;
}

async fn packages_that_are_installed_stay(host: &TestHost, scene: &Scene) {
    for (package, how) in [(1, "installed"), (0, "kept for a rollback")] {
        let version = format!("{}.0.0", package + 1);
        let path = host.ws(&format!(
            "packages/{}?confirm={version}",
            scene.packages[package]
        ));
        let answer = ask(&host.api, Method::DELETE, &path, None, &[]).await;
        let problem = refused(&answer, 409, "in_use");
        let by = format!("service instance scene ({how} on server agent-1)");
        assert!(text(&problem["detail"]).contains(&by), "{problem}");
        // And it can still be released.
        host.api
            .post(&host.ws("orders/preview"), &scene.order("again", package))
            .await
            .expect("a preview");
    }
    let path = host.ws(&format!("packages/{}?confirm=3.0.0", scene.packages[2]));
    let answer = ask(&host.api, Method::DELETE, &path, None, &[]).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

async fn a_bound_server_stays(host: &TestHost, scene: &Scene) {
    let (name, id) = &scene.servers[0];
    let path = host.ws(&format!("servers/{id}?confirm={name}"));
    let answer = ask(&host.api, Method::DELETE, &path, None, &[]).await;
    let problem = refused(&answer, 409, "server_bound");
    for says in [name, "`scene`", &scene.instance] {
        assert!(text(&problem["detail"]).contains(says), "{problem}");
    }
    host.api
        .get(&host.ws(&format!("servers/{id}")))
        .await
        .expect("it is still there");
}

async fn an_environment_that_is_too_large_is_refused(host: &TestHost, scene: &Scene) {
    for (field, expect) in [
        ("environment", "environment"),
        ("", "/targets/0/parameters"),
    ] {
        let mut order = scene.order("large", 1);
        let large =
            json!({ "LARGE": "x".repeat(4000), "MORE": "x".repeat(4000), "A": "x".repeat(500) });
        match field {
            "" => order["targets"][0]["parameters"] = large,
            field => order[field] = large,
        }
        for path in ["orders", "orders/preview"] {
            let path = host.ws(path);
            let answer = ask(&host.api, Method::POST, &path, Some(&order), &[]).await;
            let problem = refused(&answer, 422, "environment_too_large");
            assert_eq!(problem["field"], expect, "{problem}");
            assert_eq!(problem["limit"], 8192, "{problem}");
        }
    }
    // As the description says, `run` may be left out.
    let made = ask(
        &host.api,
        Method::POST,
        &host.ws("orders"),
        Some(&scene.order("small", 1)),
        &[],
    )
    .await;
    assert_eq!(accepted(&made, 201)["state"], "not_started");
}

async fn sessions_that_evict_each_other_are_one_event(
    host: &mut TestHost,
    servers: &[(String, String)],
) {
    let ids: BTreeMap<&str, &str> = servers
        .iter()
        .map(|(name, id)| (name.as_str(), id.as_str()))
        .collect();
    let none = host.api.get("/v1/events").await.expect("events");
    assert_eq!(items(&none), Vec::<serde_json::Value>::new());

    // The third agent becomes a copy of the second: both have one key.
    host.kill_agent(2);
    let [original, copy] = [1, 2].map(|index| host.agents[index].data.clone());
    std::fs::remove_dir_all(&copy).expect("the agent's directory");
    let copied = Command::new("cp")
        .arg("-a")
        .args([&original, &copy])
        .status()
        .expect("cp");
    assert!(copied.success());
    host.start_agent(2, &[]);
    let of_copied = format!("/v1/events?server={}", ids["agent-2"]);
    let event = eventually("the eviction is an event", || async {
        let page = host.api.get(&of_copied).await;
        let page = page.map_err(|error| error.to_string())?;
        items(&page).into_iter().next().ok_or(page.to_string())
    })
    .await;
    assert_eq!(event["kind"], "agent_session_evicted", "{event}");
    assert_eq!(event["level"], "warning", "{event}");
    assert_eq!(event["server"], ids["agent-2"], "{event}");
    // One that was evicted waits long before it comes back: a restart does not.
    let evicted = "a second session of one agent evicted the first";
    for (count, index) in [(2, 1), (3, 2)] {
        host.kill_agent(index);
        host.start_agent(index, &[]);
        eventually("the other copy is evicted", || async {
            let found = host.server_log().matches(evicted).count();
            if found >= count {
                Ok(())
            } else {
                Err(format!("{found} evictions"))
            }
        })
        .await;
    }
    host.kill_agent(2);
    for (query, count) in [
        (String::new(), 1),
        (format!("?server={}", ids["agent-2"]), 1),
        (format!("?server={}", ids["agent-1"]), 0),
        ("?kind=agent_session_evicted&level=warning".to_owned(), 1),
        ("?kind=certificate_ends".to_owned(), 0),
        ("?level=critical".to_owned(), 0),
    ] {
        let page = host.api.get(&format!("/v1/events{query}")).await;
        let page = page.expect("events");
        assert_eq!(items(&page).len(), count, "{query}: {page}");
    }
    let answer = ask(&host.api, Method::GET, "/v1/events?level=loud", None, &[]).await;
    refused(&answer, 400, "parameter_invalid");
}
