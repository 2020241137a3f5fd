//! The HTTP API of a real server: tokens, problems, ETags, idempotency, pages, events, and what operators do with a server.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};
use tokio_rustls::TlsConnector;
use windlass::api::client::{Answer, Client, ServerSent};
use windlass_tests::{
    host::{
        Setup, TestHost, WORKSPACE, eventually, free_port, items, plugins, program, tar_gz, text,
    },
    problem::{accepted, ask, refused},
    release::{Counted, upload},
};

async fn server() -> TestHost {
    TestHost::start(Setup {
        agents: 0,
        ..Setup::default()
    })
    .await
}

fn app(name: &str) -> Value {
    json!({ "name": name, "tech_stack": { "name": "binary", "version": "*" } })
}

async fn make_app(api: &Client, name: &str) -> Answer {
    let answer = ask(api, Method::POST, "/v1/apps", Some(&app(name)), &[]).await;
    accepted(&answer, 201);
    answer
}

#[tokio::test]
async fn every_request_is_checked_at_the_edge() {
    let host = server().await;
    let api = &host.api;
    let address = host.address().to_string();
    let nobody = Client::new(&address, "");
    let stranger = Client::new(&address, &format!("wlt_{}", "0".repeat(64)));

    for path in [
        "/v1/apps",
        "/v1/nothing",
        "/nothing",
        "/v1/plugins",
        "/v1/workspaces/test/orders",
    ] {
        let missing = ask(&nobody, Method::GET, path, None, &[]).await;
        refused(&missing, 401, "token_missing");
        assert!(
            missing
                .header("www-authenticate")
                .is_some_and(|way| way.starts_with("Bearer"))
        );
        refused(
            &ask(&stranger, Method::GET, path, None, &[]).await,
            401,
            "token_invalid",
        );
        refused(
            &ask(
                &nobody,
                Method::GET,
                path,
                None,
                &[("authorization", "Basic YTpi")],
            )
            .await,
            401,
            "token_missing",
        );
    }

    let no_id = "/v1/workspaces/test/orders/1";
    let hex = "01890a5dac96774bbcceb302099a8057";
    let no_order = format!("/v1/workspaces/test/orders/ord_{hex}");
    for (method, path, status, code) in [
        (Method::GET, "/v1/nothing", 404, "route_not_found"),
        (Method::GET, "/", 404, "route_not_found"),
        (Method::PATCH, "/v1/apps", 405, "method_not_allowed"),
        (Method::DELETE, "/healthz", 405, "method_not_allowed"),
        (Method::GET, "/v1/workspaces/nobody", 404, "not_found"),
        (
            Method::GET,
            "/v1/workspaces/nobody/orders",
            404,
            "not_found",
        ),
        (
            Method::GET,
            "/v1/workspaces/nobody/servers",
            404,
            "not_found",
        ),
        (Method::GET, "/v1/apps/nobody", 404, "not_found"),
        (Method::GET, "/v1/plugins/nobody", 404, "not_found"),
        (Method::GET, no_order.as_str(), 404, "not_found"),
        (Method::GET, no_id, 400, "path_invalid"),
        (Method::GET, "/v1/apps?page_size=0", 400, "out_of_limit"),
        (
            Method::GET,
            "/v1/apps?page_size=many",
            400,
            "parameter_invalid",
        ),
        (Method::GET, "/v1/apps?colour=red", 400, "unknown_parameter"),
        (
            Method::POST,
            "/v1/workspaces/test/packages?app=shop&version=1",
            400,
            "missing_parameter",
        ),
        (
            Method::GET,
            "/v1/workspaces/test/orders?cursor=b3JkXzAxODkwYTVkYWM5Njc3NGJiY2NlYjMwMjA5OWE4MDU3",
            400,
            "cursor_invalid",
        ),
        (
            Method::GET,
            "/v1/workspaces/test/orders?state=happy",
            400,
            "parameter_invalid",
        ),
    ] {
        let answer = ask(api, method.clone(), path, None, &[]).await;
        refused(&answer, status, code);
        if status == 405 {
            assert!(
                answer.header("allow").is_some(),
                "{path}: which methods there are"
            );
        }
    }
    let bad_resume = ask(
        api,
        Method::GET,
        &format!("{no_order}/events"),
        None,
        &[("last-event-id", "x")],
    )
    .await;
    assert_eq!(
        refused(&bad_resume, 400, "last_event_id_invalid")["field"],
        "Last-Event-ID"
    );

    // Bodies.
    let good = app("shop").to_string();
    let json = ("content-type", "application/json");
    let large = format!("{{\"name\": \"{}\"}}", "x".repeat(1024 * 1024));
    for (content_type, body, status, code, field) in [
        (
            None,
            good.as_str(),
            415,
            "content_type_unsupported",
            "Content-Type",
        ),
        (
            Some("text/plain"),
            &good,
            415,
            "content_type_unsupported",
            "Content-Type",
        ),
        (Some(json.1), "", 400, "body_malformed", "body"),
        (Some(json.1), "{\"name\": ", 400, "body_malformed", "body"),
        (Some(json.1), "{} {}", 422, "missing_field", "name"),
        (
            Some(json.1),
            &format!("{good} more"),
            400,
            "body_malformed",
            "body",
        ),
        (
            Some(json.1),
            "{\"tech_stack\": {\"name\": \"binary\", \"version\": \"*\"}}",
            422,
            "missing_field",
            "name",
        ),
        (
            Some(json.1),
            "{\"name\": \"shop\", \"colour\": 1}",
            422,
            "unknown_field",
            "colour",
        ),
        (Some(json.1), "{\"name\": 7}", 422, "invalid_value", "name"),
        (Some(json.1), "[]", 422, "invalid_value", "body"),
        (Some(json.1), &large, 413, "body_too_large", "body"),
    ] {
        let headers: Vec<(&str, &str)> = content_type
            .map(|value| ("content-type", value))
            .into_iter()
            .collect();
        let answer = api
            .request(
                Method::POST,
                "/v1/apps",
                Bytes::copy_from_slice(body.as_bytes()),
                &headers,
            )
            .await
            .expect("an answer");
        assert_eq!(refused(&answer, status, code)["field"], field, "{code}");
    }
    // Unknown fields, wherever they stand.
    let (app_id, target) = (
        format!("app_{hex}"),
        json!({ "instance": format!("svc_{hex}"), "package": format!("pkg_{hex}") }),
    );
    let mut colourful = target.clone();
    colourful["colour"] = json!(1);
    for (path, body, field) in [
        (
            "/v1/workspaces",
            json!({ "name": "other", "colour": 1 }),
            "colour",
        ),
        (
            "/v1/apps",
            json!({ "name": "a", "tech_stack": { "name": "binary", "version": "*", "colour": 1 } }),
            "/tech_stack/colour",
        ),
        ("/v1/tokens", json!({ "name": "a", "colour": 1 }), "colour"),
        (
            "/v1/workspaces/test/pools",
            json!({ "name": "a", "colour": 1 }),
            "colour",
        ),
        (
            "/v1/workspaces/test/activation-codes",
            json!({ "colour": 1 }),
            "colour",
        ),
        (
            "/v1/workspaces/test/service-instances",
            json!({ "name": "a", "app": app_id, "colour": 1 }),
            "colour",
        ),
        (
            "/v1/workspaces/test/orders",
            json!({ "title": "a", "targets": [target], "colour": 1 }),
            "colour",
        ),
        (
            "/v1/workspaces/test/orders/preview",
            json!({ "title": "a", "targets": [target], "limits": { "colour": 1 } }),
            "/limits/colour",
        ),
        (
            "/v1/workspaces/test/orders/preview",
            json!({ "title": "a", "targets": [colourful] }),
            "/targets/0/colour",
        ),
        (
            &format!("{no_order}/actions"),
            json!({ "action": "run", "colour": 1 }),
            "colour",
        ),
    ] {
        let answer = ask(api, Method::POST, path, Some(&body), &[]).await;
        assert_eq!(
            refused(&answer, 422, "unknown_field")["field"],
            field,
            "{path}: {}",
            answer.text()
        );
    }
    refused(
        &ask(
            api,
            Method::POST,
            &format!("{no_order}/actions"),
            Some(&json!({ "action": "dance" })),
            &[],
        )
        .await,
        422,
        "invalid_value",
    );

    // The caller's request id is taken over when it is one.
    let answer = ask(
        api,
        Method::GET,
        "/v1/apps/nobody",
        None,
        &[("x-request-id", "mine-7")],
    )
    .await;
    assert_eq!(refused(&answer, 404, "not_found")["request_id"], "mine-7");
    let long = "x".repeat(101);
    let answer = ask(
        api,
        Method::GET,
        "/v1/apps/nobody",
        None,
        &[("x-request-id", &long)],
    )
    .await;
    assert_ne!(refused(&answer, 404, "not_found")["request_id"], long);
    // Nothing of all this was made.
    assert!(items(&api.get("/v1/apps").await.expect("applications")).is_empty());
    assert_eq!(
        items(&api.get("/v1/workspaces").await.expect("workspaces")).len(),
        1
    );
}

#[tokio::test]
async fn what_a_server_shows_of_itself() {
    let host = server().await;
    let nobody = Client::new(&host.address().to_string(), "");
    for path in ["/healthz", "/readyz"] {
        assert_eq!(nobody.get(path).await.expect(path)["status"], "ok");
    }
    assert_eq!(
        nobody.get("/openapi.json").await.expect("the document"),
        serde_json::to_value(windlass::api::openapi()).expect("JSON")
    );
    let docs = ask(&nobody, Method::GET, "/docs", None, &[]).await;
    assert!(
        docs.header("content-type")
            .is_some_and(|kind| kind.starts_with("text/html")),
        "{:?}",
        docs.headers
    );
    assert!(
        docs.header("content-security-policy")
            .is_some_and(|policy| policy.contains("default-src 'none'")),
        "{:?}",
        docs.headers
    );
    assert!(docs.text().contains("/openapi.json"));
    host.api.get("/v1/apps").await.expect("applications");
    let metrics = ask(&nobody, Method::GET, "/metrics", None, &[]).await;
    assert!(
        metrics
            .header("content-type")
            .is_some_and(|kind| kind.starts_with("text/plain"))
    );
    let metrics = metrics.text();
    assert!(
        metrics.contains(
            "windlass_http_requests_total{method=\"GET\",route=\"/v1/apps\",status=\"200\"} 1\n"
        ),
        "{metrics}"
    );
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line
            .rsplit_once(' ')
            .unwrap_or_else(|| panic!("not a sample: {line}"));
        assert!(
            name.starts_with("windlass_") && value.parse::<f64>().is_ok(),
            "{line}"
        );
    }

    let mode = |path: &Path| fs::metadata(path).expect("its mode").permissions().mode() & 0o777;
    assert_eq!(mode(&host.data()), 0o700);
    for secret in [
        "admin.token",
        "platform.key",
        "agent-tls.key",
        "secrets.key",
    ] {
        assert_eq!(mode(&host.data().join(secret)), 0o600, "{secret}");
    }
    let token = fs::read_to_string(host.data().join("admin.token")).expect("the token");
    assert!(
        !host.server_log().contains(token.trim()),
        "the log does not show the token"
    );
}

#[tokio::test]
async fn a_token_is_made_once_used_and_revoked() {
    let mut host = server().await;
    let address = host.address().to_string();
    let wanted = json!({ "name": "robot", "validity_d": 7 });
    let key = [("idempotency-key", "a-token")];
    let made = ask(&host.api, Method::POST, "/v1/tokens", Some(&wanted), &key).await;
    let made = accepted(&made, 201);
    let robot = Client::new(&address, &text(&made["token"]));
    robot.get("/v1/apps").await.expect("the token works");
    // Made once, shown once.
    let again = ask(&host.api, Method::POST, "/v1/tokens", Some(&wanted), &key).await;
    assert_eq!(
        (&accepted(&again, 201)["id"], &again.json()["token"]),
        (&made["id"], &Value::Null),
        "{}",
        again.text()
    );
    refused(
        &ask(&host.api, Method::POST, "/v1/tokens", Some(&wanted), &[]).await,
        409,
        "name_taken",
    );
    let listed = host.api.get("/v1/tokens").await.expect("tokens");
    assert_eq!(items(&listed).len(), 2, "{listed}");
    assert!(
        !listed.to_string().contains(&text(&made["token"])),
        "a list shows no token"
    );
    for (validity_d, status) in [(0, 422), (3651, 422), (3650, 201)] {
        let body = json!({ "name": format!("for-{validity_d}"), "validity_d": validity_d });
        assert_eq!(
            ask(&host.api, Method::POST, "/v1/tokens", Some(&body), &[])
                .await
                .status,
            status,
            "{validity_d} days"
        );
    }

    host.restart().await;
    robot
        .get("/v1/apps")
        .await
        .expect("it works after a restart");
    let path = format!("/v1/tokens/{}", text(&made["id"]));
    accepted(&ask(&host.api, Method::DELETE, &path, None, &[]).await, 204);
    refused(
        &ask(&robot, Method::GET, "/v1/apps", None, &[]).await,
        401,
        "token_invalid",
    );
    host.restart().await;
    refused(
        &ask(&robot, Method::GET, "/v1/apps", None, &[]).await,
        401,
        "token_invalid",
    );
}

#[tokio::test]
async fn an_update_with_an_old_etag_is_refused() {
    let host = server().await;
    let api = &host.api;
    let made = make_app(api, "shop").await;
    let first = made.header("etag").expect("an ETag").to_owned();
    let location = made.header("location").expect("a location").to_owned();
    assert_eq!(location, format!("/v1/apps/{}", text(&made.json()["id"])));
    let read = ask(api, Method::GET, &location, None, &[]).await;
    assert_eq!(
        (read.header("etag"), read.json()),
        (Some(first.as_str()), made.json())
    );
    let unchanged = ask(
        api,
        Method::GET,
        &location,
        None,
        &[("if-none-match", &first)],
    )
    .await;
    assert_eq!((unchanged.status, unchanged.body.len()), (304, 0));

    let put = |alias: &str, headers: Vec<(&'static str, String)>| {
        let (alias, location) = (json!({ "alias": alias }), location.clone());
        async move {
            let headers: Vec<(&str, &str)> = headers
                .iter()
                .map(|(name, value)| (*name, value.as_str()))
                .collect();
            ask(api, Method::PUT, &location, Some(&alias), &headers).await
        }
    };
    let changed = put("one", vec![("if-match", first.clone())]).await;
    accepted(&changed, 200);
    let second = changed.header("etag").expect("an ETag").to_owned();
    assert_ne!(first, second);
    let stale = refused(
        &put("two", vec![("if-match", first.clone())]).await,
        412,
        "changed",
    );
    assert_eq!(stale["field"], "If-Match");
    assert_eq!(
        format!("\"{}\"", stale["current"]),
        second,
        "the problem names the current revision"
    );
    refused(
        &put("two", vec![("if-match", "17".to_owned())]).await,
        400,
        "if_match_invalid",
    );
    assert_eq!(
        api.get(&location).await.expect("the application")["alias"],
        "one"
    );
    assert_eq!(
        ask(
            api,
            Method::GET,
            &location,
            None,
            &[("if-none-match", &first)]
        )
        .await
        .status,
        200
    );
    for any in [vec![], vec![("if-match", "*".to_owned())]] {
        accepted(&put("three", any).await, 200);
    }
    // Of two changes of one revision, one is made.
    let now = ask(api, Method::GET, &location, None, &[])
        .await
        .header("etag")
        .expect("an ETag")
        .to_owned();
    let (one, two) = tokio::join!(
        put("left", vec![("if-match", now.clone())]),
        put("right", vec![("if-match", now.clone())])
    );
    let mut statuses = [one.status, two.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 412]);
}

#[tokio::test]
async fn a_request_with_an_idempotency_key_is_carried_out_once() {
    let mut host = server().await;
    let post = |api: Client, key: &'static str, body: Value| async move {
        ask(
            &api,
            Method::POST,
            "/v1/apps",
            Some(&body),
            &[("idempotency-key", key)],
        )
        .await
    };
    let same = |one: &Answer, two: &Answer| {
        assert_eq!(
            (
                one.status,
                one.json(),
                one.header("etag"),
                one.header("location")
            ),
            (
                two.status,
                two.json(),
                two.header("etag"),
                two.header("location")
            )
        );
    };
    let first = post(host.api.clone(), "k1", app("shop")).await;
    accepted(&first, 201);
    let second = post(host.api.clone(), "k1", app("shop")).await;
    same(&first, &second);
    assert_eq!(
        (
            first.header("idempotency-replayed"),
            second.header("idempotency-replayed")
        ),
        (None, Some("true"))
    );
    assert_eq!(
        refused(
            &post(host.api.clone(), "k1", app("other")).await,
            422,
            "idempotency_key_reused"
        )["field"],
        "Idempotency-Key"
    );
    refused(
        &ask(
            &host.api,
            Method::DELETE,
            "/v1/apps/shop?confirm=shop",
            None,
            &[("idempotency-key", "k1")],
        )
        .await,
        422,
        "idempotency_key_reused",
    );
    // Without the key it is another request.
    refused(
        &ask(&host.api, Method::POST, "/v1/apps", Some(&app("shop")), &[]).await,
        409,
        "name_taken",
    );
    let long = "k".repeat(201);
    assert_eq!(
        refused(
            &ask(
                &host.api,
                Method::POST,
                "/v1/apps",
                Some(&app("x")),
                &[("idempotency-key", &long)]
            )
            .await,
            422,
            "idempotency_key_invalid"
        )["limit"],
        200
    );
    // A refusal is not kept: the same key can be used once the cause is gone.
    refused(
        &post(host.api.clone(), "k2", app("9")).await,
        422,
        "invalid_value",
    );
    accepted(&post(host.api.clone(), "k2", app("nine")).await, 201);
    // Another caller's key is another key.
    let robot = host
        .api
        .post("/v1/tokens", &json!({ "name": "robot" }))
        .await
        .expect("a token");
    let robot = Client::new(&host.address().to_string(), &text(&robot["token"]));
    refused(&post(robot, "k1", app("shop")).await, 409, "name_taken");

    // At the same time.
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        tasks.spawn(post(host.api.clone(), "k3", app("twin")));
    }
    let mut ids = HashSet::new();
    while let Some(answer) = tasks.join_next().await {
        ids.insert(text(&accepted(&answer.expect("an answer"), 201)["id"]));
    }
    assert_eq!(ids.len(), 1, "{ids:?}");

    // A package: the digest that is promised stands for the file.
    let file = tar_gz(&[("run.sh", 0o755, b"#!/bin/sh\n")]);
    let path = host.ws("packages?app=shop&version=1.0.0&file_name=shop.tar.gz");
    let headers = [("idempotency-key", "k4")];
    let package = host
        .api
        .request(Method::POST, &path, file.clone(), &headers)
        .await
        .expect("an answer");
    accepted(&package, 201);

    // Across a crash and a restart.
    host.kill();
    host.boot(&[]).await;
    same(&first, &post(host.api.clone(), "k1", app("shop")).await);
    same(
        &package,
        &host
            .api
            .request(Method::POST, &path, file, &headers)
            .await
            .expect("an answer"),
    );
    refused(
        &post(host.api.clone(), "k1", app("other")).await,
        422,
        "idempotency_key_reused",
    );
    let deleted = ask(
        &host.api,
        Method::DELETE,
        "/v1/apps/nine?confirm=nine",
        None,
        &[("idempotency-key", "k5")],
    )
    .await;
    accepted(&deleted, 204);
    accepted(
        &ask(
            &host.api,
            Method::DELETE,
            "/v1/apps/nine?confirm=nine",
            None,
            &[("idempotency-key", "k5")],
        )
        .await,
        204,
    );
    let names: Vec<String> = items(&host.api.get("/v1/apps").await.expect("applications"))
        .iter()
        .map(|app| text(&app["name"]))
        .collect();
    assert_eq!(names, ["shop", "twin"]);
    assert_eq!(
        items(&host.api.get(&host.ws("packages")).await.expect("packages")).len(),
        1
    );
}

#[tokio::test]
async fn lists_come_in_pages() {
    let host = server().await;
    let api = &host.api;
    let names: Vec<String> = (10..35).map(|number| format!("app-{number}")).collect();
    for name in &names {
        make_app(api, name).await;
    }
    let page = api.get("/v1/apps").await.expect("a page");
    assert_eq!(items(&page).len(), 10, "unless asked otherwise");
    for (size, pages) in [(20, 2), (7, 4), (5, 5), (1, 25)] {
        let (mut found, mut count, mut cursor) = (Vec::new(), 0, String::new());
        loop {
            let page = api
                .get(&format!("/v1/apps?page_size={size}{cursor}"))
                .await
                .expect("a page");
            count += 1;
            found.extend(items(&page).iter().map(|app| text(&app["name"])));
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        assert_eq!(
            found, names,
            "pages of {size}: all, oldest first, each once"
        );
        assert_eq!(count, pages, "pages of {size}");
    }
    let problem = refused(
        &ask(api, Method::GET, "/v1/apps?page_size=21", None, &[]).await,
        400,
        "out_of_limit",
    );
    assert_eq!(
        (&problem["field"], &problem["limit"], &problem["current"]),
        (&json!("page_size"), &json!(20), &json!(21))
    );
    let found = api
        .get("/v1/apps?search=PP-2&page_size=20")
        .await
        .expect("a page");
    assert_eq!(items(&found).len(), 10, "app-20 to app-29: {found}");
    // Every list refuses what decodes to no key, to one that was never given out, and another list's.
    let page = api.get("/v1/apps?page_size=1").await.expect("a page");
    let of_apps = text(&page["next_cursor"]);
    let document = api.get("/openapi.json").await.expect("the document");
    let takes_cursor = |item: &Value| {
        item["get"]["parameters"]
            .as_array()
            .is_some_and(|all| all.iter().any(|parameter| parameter["name"] == "cursor"))
    };
    let lists: Vec<String> = document["paths"]
        .as_object()
        .expect("paths")
        .iter()
        .filter(|(_, item)| takes_cursor(item))
        .map(|(path, _)| path.replace("{ws}", "test"))
        .collect();
    assert!(lists.len() >= 10, "{lists:?}");
    for list in &lists {
        for cursor in ["x", "%00", "!!!!", "YXBwXzE", "AAAAAAAAYXBwXzE", &of_apps] {
            let answer = ask(
                api,
                Method::GET,
                &format!("{list}?cursor={cursor}"),
                None,
                &[],
            )
            .await;
            if list == "/v1/apps" && cursor == of_apps {
                accepted(&answer, 200);
            } else {
                refused(&answer, 400, "cursor_invalid");
            }
        }
    }
}

#[tokio::test]
async fn names_at_each_limit() {
    let host = server().await;
    let api = &host.api;
    let shop = text(&make_app(api, "shop").await.json()["id"]);
    let stack = json!({ "name": "binary", "version": "*" });
    let network = json!("10.2.0.0/16");
    // Path, field, body beside it, shortest and longest, what else is no name.
    let cases = [
        (
            "/v1/workspaces".to_owned(),
            "name",
            json!({ "network": network }),
            2,
            40,
            vec!["A-b", "9a", "-a", "a-", "a b", "a_b"],
        ),
        (
            "/v1/workspaces".to_owned(),
            "region",
            json!({ "name": "with-region" }),
            1,
            40,
            vec!["R", "r_"],
        ),
        (
            "/v1/apps".to_owned(),
            "name",
            json!({ "tech_stack": stack }),
            1,
            60,
            vec!["9a", "-a", "a-", "a b", "a/b", "ä", "a\u{0}"],
        ),
        (
            "/v1/tokens".to_owned(),
            "name",
            json!({}),
            1,
            60,
            vec!["-a", "a ", "a/b"],
        ),
        (
            host.ws("pools"),
            "name",
            json!({}),
            1,
            60,
            vec!["9a", "a b"],
        ),
        (
            host.ws("service-instances"),
            "name",
            json!({ "app": shop, "parameters": { "program": "x" } }),
            1,
            60,
            vec!["9a", "a.b"],
        ),
        (
            host.ws("activation-codes"),
            "name_prefix",
            json!({ "cell": "cell-a" }),
            1,
            50,
            vec!["-a", "a b"],
        ),
    ];
    for (path, field, body, min, max, bad) in cases {
        let send = |name: String| {
            let mut body = body.clone();
            body[field] = json!(name);
            let path = path.clone();
            async move { ask(api, Method::POST, &path, Some(&body), &[]).await }
        };
        let about = format!("{path} {field}");
        for (length, good) in [(min - 1, false), (min, true), (max, true), (max + 1, false)] {
            // The region's workspace exists after the first good one.
            let answer = send("n".repeat(length)).await;
            let made = answer.status == 201 || (field == "region" && answer.status == 409);
            assert_eq!(
                made,
                good,
                "{about}, {length} characters: {}",
                answer.text()
            );
            if !good {
                let problem = refused(&answer, 422, "invalid_value");
                assert_eq!(problem["field"], field, "{about}");
                let limit = if length < min { min } else { max };
                assert!(
                    text(&problem["detail"]).contains(&limit.to_string()),
                    "{about}: {problem}"
                );
            }
        }
        for name in bad {
            assert_eq!(
                refused(&send(name.to_owned()).await, 422, "invalid_value")["field"],
                field,
                "{about} {name:?}"
            );
        }
    }

    // Versions and file names stand in the query.
    let file = || Bytes::from_static(b"x");
    for (version, file_name, good) in [
        ("n".repeat(60), "f".repeat(200), true),
        ("n".repeat(61), "f".to_owned(), false),
        (String::new(), "f".to_owned(), false),
        ("n".to_owned(), "f".repeat(201), false),
        ("n".to_owned(), String::new(), false),
        ("n".to_owned(), "..%2Ff".to_owned(), false),
        ("n".to_owned(), "a%2Fb".to_owned(), false),
        ("-n".to_owned(), "f".to_owned(), false),
    ] {
        let path = host.ws(&format!(
            "packages?app=shop&version={version}&file_name={file_name}"
        ));
        let answer = api
            .request(Method::POST, &path, file(), &[])
            .await
            .expect("an answer");
        if good {
            accepted(&answer, 201);
        } else {
            refused(&answer, 400, "parameter_invalid");
        }
    }
    // Texts for people are counted in characters.
    for (length, status) in [(500, 201), (501, 422)] {
        let mut body = app(&format!("described-{length}"));
        body["description"] = json!("ä".repeat(length));
        let answer = ask(api, Method::POST, "/v1/apps", Some(&body), &[]).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        if status == 422 {
            let problem = refused(&answer, 422, "out_of_limit");
            assert_eq!(
                (&problem["field"], &problem["limit"], &problem["current"]),
                (&json!("description"), &json!(500), &json!(501))
            );
        }
    }
}

/// The events of an order from some event on, until the stream says that the order has ended, or `count` of them.
async fn events(
    api: &Client,
    path: &str,
    after: Option<&str>,
    count: usize,
) -> (Vec<ServerSent>, bool) {
    let mut stream = api.events(path, after).await.expect("a stream");
    let mut found = Vec::new();
    while found.len() < count {
        let event = stream
            .next()
            .await
            .expect("the stream does not break")
            .expect("the stream says when the order has ended");
        if event.event == "end" {
            assert_eq!(stream.next().await.expect("the stream ends in order"), None);
            return (found, true);
        }
        found.push(event);
    }
    (found, false)
}

/// Everything that a server says of its data, without what differs between two that run on it.
async fn everything(api: &Client, counted: &Counted, order: &str) -> BTreeMap<String, Value> {
    let ws = format!("/v1/workspaces/{WORKSPACE}");
    let mut found = BTreeMap::new();
    let mut paths = vec![
        "/v1/workspaces".to_owned(),
        "/v1/apps".to_owned(),
        "/v1/tokens".to_owned(),
    ];
    for rest in [
        "",
        "/cells",
        "/packages",
        "/packages/uploads",
        "/service-instances",
        "/servers",
        "/activation-codes",
        "/orders",
        "/pools",
        "/secrets",
    ] {
        paths.push(format!("{ws}{rest}"));
    }
    for rest in ["", "/nodes", "/plan"] {
        paths.push(format!("{ws}/orders/{order}{rest}"));
    }
    paths.push(format!(
        "{ws}/service-instances/{}/servers",
        counted.instance
    ));
    paths.push(format!("{ws}/pools/{}/weights", counted.pool));
    for path in paths {
        let mut value = api
            .get(&path)
            .await
            .unwrap_or_else(|error| panic!("{path}: {error}"));
        if path.ends_with("/servers") {
            for server in value["items"].as_array_mut().into_iter().flatten() {
                let server = server.as_object_mut().expect("a server");
                server.retain(|name, _| {
                    !["connection", "last_seen_at", "connected_at", "load"].contains(&name.as_str())
                });
            }
        }
        found.insert(path, value);
    }
    found
}

/// The contents of a directory's files, by path below it, without locks.
fn contents(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut left = vec![directory.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(&next).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                left.push(path);
            } else if path.file_name().is_some_and(|name| name != "LOCK") {
                let below = path.strip_prefix(directory).expect("below it").to_owned();
                found.insert(below, fs::read(&path).expect("a file"));
            }
        }
    }
    found
}

/// A server that the test started beside the host's.
struct Second {
    child: Child,
    output: PathBuf,
}

impl Second {
    fn start(data: &Path, log: &Path, options: &[&str]) -> Self {
        let file = fs::File::create(log).expect("a log");
        let child = Command::new(program("windlass"))
            .arg("server")
            .args([
                "--agent-listen",
                &format!("127.0.0.1:{}", free_port()),
                "--data",
            ])
            .arg(data)
            .arg("--plugins")
            .arg(plugins())
            .args(options)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a handle"))
            .stderr(file)
            .spawn()
            .expect("the server's process");
        Self {
            child,
            output: log.to_owned(),
        }
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// Waits until it has ended; whether it succeeded.
    async fn ended(&mut self) -> bool {
        eventually("the second server ends", || {
            let state = self.child.try_wait().expect("its state");
            async move { state.ok_or_else(|| "it still runs".to_owned()) }
        })
        .await
        .success()
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn windlass(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program("windlass"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the program");
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_is_followed_without_a_gap_then_backed_up_and_restored() {
    let mut host = TestHost::start(Setup {
        agents: 2,
        ..Setup::default()
    })
    .await;
    let counted = Counted::prepare(&host).await;

    // A stream ends with its token.
    let mut waiting = counted.order("never", 0);
    waiting["run"] = json!(false);
    let idle = host.order(&waiting).await.expect("an order");
    let robot = host
        .api
        .post("/v1/tokens", &json!({ "name": "robot" }))
        .await
        .expect("a token");
    let api = Client::new(&host.address().to_string(), &text(&robot["token"]));
    let path = host.ws(&format!("orders/{idle}/events"));
    let mut stream = api.events(&path, None).await.expect("a stream");
    accepted(
        &ask(
            &host.api,
            Method::DELETE,
            &format!("/v1/tokens/{}", text(&robot["id"])),
            None,
            &[],
        )
        .await,
        204,
    );
    let end = async {
        // Events from before the revocation may still come.
        while let Ok(Some(_)) = stream.next().await {}
    };
    tokio::time::timeout(windlass_tests::host::WITHIN, end)
        .await
        .expect("the stream ends when its token is revoked");
    assert!(
        matches!(api.events(&path, None).await, Err(error) if error.to_string().contains("401"))
    );
    host.api
        .post(
            &host.ws(&format!("orders/{idle}/actions")),
            &json!({ "action": "cancel", "node": null }),
        )
        .await
        .expect("cancelled");

    // Followed by one that breaks off again and again, across a restart of the server as well, and by one that comes late.
    let order = host
        .order(&counted.order("followed", 0))
        .await
        .expect("an order");
    let path = host.ws(&format!("orders/{order}/events"));
    let (mut followed, mut breaks) = (Vec::<ServerSent>::new(), 0);
    loop {
        let last = followed.last().map(|event| event.id.clone());
        let (more, ended) = events(&host.api, &path, last.as_deref(), 3).await;
        followed.extend(more);
        if ended {
            break;
        }
        breaks += 1;
        if breaks == 2 {
            host.kill();
            host.boot(&[]).await;
        }
    }
    let header = host.order_ended(&order).await;
    counted.check_succeeded(&host, &header, "followed").await;
    assert!(breaks > 3, "there was something to resume: {breaks}");
    let ids: Vec<u64> = followed
        .iter()
        .map(|event| event.id.parse().expect("a number"))
        .collect();
    let last = header["last_event"].as_u64().expect("a number");
    assert_eq!(
        ids,
        (1..=last).collect::<Vec<_>>(),
        "no event is missed, none comes twice"
    );
    for event in &followed {
        let data: Value = serde_json::from_str(&event.data).expect("JSON");
        assert_eq!(data["seq"].to_string(), event.id);
        assert_eq!(data["type"], event.event);
    }
    let (late, _) = events(&host.api, &path, None, usize::MAX).await;
    assert_eq!(late, followed, "who comes late sees the same");
    let (rest, _) = events(
        &host.api,
        &format!("{path}?after={}", last - 2),
        None,
        usize::MAX,
    )
    .await;
    assert_eq!(rest, followed[followed.len() - 2..]);

    // A second server on the same data.
    let data = host.data();
    let data_text = data.to_str().expect("a path");
    let listen = format!("127.0.0.1:{}", free_port());
    let mut second = Second::start(
        &data,
        &host.path().join("second.log"),
        &["--listen", &listen],
    );
    assert!(!second.ended().await, "{}", second.said());
    assert!(
        second.said().contains("in use by another process")
            && second.said().contains(&data.display().to_string()),
        "{}",
        second.said()
    );
    host.api
        .get("/readyz")
        .await
        .expect("the first one is not disturbed");

    // A backup of the running server, restored elsewhere.
    let archive = host.path().join("backup.windlass");
    let archive_text = archive.to_str().expect("a path");
    let before = everything(&host.api, &counted, &order).await;
    let (good, said) = windlass(&["backup", "--data", data_text, archive_text]);
    assert!(good, "{said}");
    assert_eq!(
        fs::metadata(&archive)
            .expect("the archive")
            .permissions()
            .mode()
            & 0o077,
        0,
        "it holds keys"
    );
    let (good, said) = windlass(&["backup", "--data", data_text, archive_text]);
    assert!(
        !good && said.contains(archive_text),
        "an archive is not written over: {said}"
    );
    // What comes after the backup is not in it.
    make_app(&host.api, "afterwards").await;
    let restored = host.path().join("restored");
    let restored_text = restored.to_str().expect("a path");
    let (good, said) = windlass(&["restore", "--data", data_text, archive_text]);
    assert!(
        !good && said.contains(data_text),
        "data is not written over: {said}"
    );
    let (good, said) = windlass(&["restore", "--data", restored_text, archive_text]);
    assert!(good, "{said}");
    let (there, here) = (
        contents(&restored.join("blobs")),
        contents(&data.join("blobs")),
    );
    assert_eq!(
        there.keys().collect::<Vec<_>>(),
        here.keys().collect::<Vec<_>>()
    );
    assert!(there == here, "the blobs are the same");
    let token = fs::read_to_string(data.join("admin.token")).expect("the token");
    let second = Second::start(
        &restored,
        &host.path().join("restored.log"),
        &["--listen", &listen],
    );
    let api = Client::new(&listen, &token);
    eventually("the restored server is ready", || async {
        api.get("/readyz")
            .await
            .map_err(|error| format!("{error}: {}", second.said()))
    })
    .await;
    assert_eq!(everything(&api, &counted, &order).await, before);
    assert_eq!(events(&api, &path, None, usize::MAX).await.0, followed);
    // It is a platform of its own from here on.
    make_app(&api, "elsewhere").await;
    upload_and_see(&host, &api).await;

    // Truncated, and no archive at all.
    let bytes = fs::read(&archive).expect("the archive");
    for (name, bytes) in [
        ("cut", &bytes[..bytes.len() - 7]),
        ("text", &b"I am no archive"[..]),
    ] {
        let broken = host.path().join(name);
        fs::write(&broken, bytes).expect("a file");
        let target = host.path().join(format!("from-{name}"));
        let (good, said) = windlass(&[
            "restore",
            "--data",
            target.to_str().expect("a path"),
            broken.to_str().expect("a path"),
        ]);
        assert!(!good && said.len() > 20, "{name}: {said}");
        assert!(!target.join("store").exists(), "{name}: nothing is left");
    }
}

/// The two servers share nothing.
async fn upload_and_see(host: &TestHost, restored: &Client) {
    upload(
        host,
        "counted",
        "3.0.0",
        tar_gz(&[("run.sh", 0o755, b"#!/bin/sh\n")]),
    )
    .await;
    assert_eq!(
        items(&host.api.get(&host.ws("packages")).await.expect("packages")).len(),
        3
    );
    assert_eq!(
        items(&restored.get(&host.ws("packages")).await.expect("packages")).len(),
        2
    );
}

#[tokio::test]
async fn beyond_this_machine_the_api_speaks_tls() {
    let directory = tempfile::tempdir().expect("a directory");
    let port = free_port();
    let second = Second::start(
        &directory.path().join("data"),
        &directory.path().join("log"),
        &["--listen", &format!("0.0.0.0:{port}")],
    );
    eventually("the server listens", || async {
        let said = second.said();
        if said.contains("API ") {
            Ok(())
        } else {
            Err(said)
        }
    })
    .await;
    assert!(second.said().contains("https://"), "{}", second.said());
    let plain = Client::new(&format!("127.0.0.1:{port}"), "");
    plain
        .get("/healthz")
        .await
        .expect_err("plain HTTP is not served");
    // Its certificate is its own: a client that knows no authority gets as far as the certificate, and refuses it.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("protocol versions")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", port))
        .await
        .expect("a connection");
    let name = "localhost".try_into().expect("a name");
    let error = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .expect_err("nobody vouches for it");
    let cause = error
        .get_ref()
        .and_then(|error| error.downcast_ref::<rustls::Error>());
    assert!(
        matches!(cause, Some(rustls::Error::InvalidCertificate(_))),
        "{error}"
    );
}
