//! Notifications to real listeners: webhooks that fail at first, a DingTalk robot, a mail server, and a server that is killed
//! between what happened and its telling.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use ring::hmac;
use serde_json::{Value, json};
use windlass_tests::{
    host::{Setup, TestHost, eventually, items, text},
    scene::{Scene, act, refusal},
};

const SIGNING_KEY: &str = "signing-key-that-nobody-may-see";
const ROBOT_TOKEN: &str = "robot-token-that-nobody-may-see";
const ROBOT_SECRET: &str = "SECrobot-secret-that-nobody-may-see";
const MAIL_PASSWORD: &str = "mail-password-that-nobody-may-see";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn channels_are_told_what_happens_to_orders() {
    let mut host = TestHost::start(Setup {
        agents: 2,
        ..Setup::default()
    })
    .await;
    let scene = Scene::prepare(&host).await;
    for (name, value) in [
        ("hook-key", SIGNING_KEY),
        ("robot-token", ROBOT_TOKEN),
        ("robot-secret", ROBOT_SECRET),
        ("mail-password", MAIL_PASSWORD),
    ] {
        host.api
            .put(
                &host.ws(&format!("secrets/{name}")),
                &json!({ "value": value }),
            )
            .await
            .expect("a secret");
    }
    let hook = Web::listen("{}");
    let robot = Web::listen(r#"{"errcode":0,"errmsg":"ok"}"#);
    let mail = Mail::listen();
    let hook_channel = channel(&host, "hook", json!({
        "kind": "webhook", "url": format!("{}/hook?team=ops", hook.url), "signing_secret": "hook-key",
    }))
    .await;
    channel(&host, "robot", json!({
        "kind": "dingtalk", "url": format!("{}/robot/send", robot.url), "access_token_secret": "robot-token",
        "security": { "kind": "sign", "secret": "robot-secret" },
    }))
    .await;
    channel(&host, "mail", json!({
        "kind": "email", "server": "127.0.0.1", "port": mail.port, "security": "none", "user": "windlass",
        "password_secret": "mail-password", "from": "Windlass <windlass@example.com>", "to": ["ops@example.com", "dev@example.com"],
    }))
    .await;
    denied_and_wrong_channels_are_told_of(&host).await;
    a_test_message_arrives(&host, &hook_channel, &hook).await;

    // An order that waits, goes on, and ends.
    let mut order = scene.order("told", 0);
    order["parameters"] = json!({ "grouping": "one-per-group", "gray_traffic": true });
    order["limits"] = json!({ "min_healthy_members": 0 });
    order["run"] = true.into();
    let id = host.order(&order).await.expect("an order");
    for _ in 0..2 {
        host.order_in(&id, &["awaiting_confirmation"]).await;
        act(&host, &id, &json!({ "action": "confirm", "node": null }))
            .await
            .expect("confirmed");
    }
    assert_eq!(host.order_ended(&id).await["state"], "succeeded");
    told(&host, &id, &["started", "waiting", "succeeded"]).await;
    every_webhook_is_signed(&hook);
    the_robot_can_check_its_messages(&robot);
    let mails = mail.taken();
    let about: Vec<&String> = mails.iter().filter(|mail| mail.contains(&id)).collect();
    for receiver in ["RCPT TO:<ops@example.com>", "RCPT TO:<dev@example.com>"] {
        let to = about.iter().filter(|mail| mail.contains(receiver));
        assert!(to.count() >= 3, "{receiver}: {mails:?}");
    }
    for mail in about {
        for part in ["From: ", "Subject: [windlass test] told"] {
            assert!(mail.contains(part), "{part}: {mail}");
        }
    }
    each_receiver_of_a_mail_has_its_own_outcome(&host, &mail).await;
    a_redirect_is_not_followed_and_ends_the_delivery(&host).await;

    // An order that tells nobody.
    let mut quiet = scene.order("quiet", 1);
    quiet["notifications"] = false.into();
    quiet["limits"] = json!({ "min_healthy_members": 0 });
    quiet["run"] = true.into();
    let quiet = host.order(&quiet).await.expect("an order");
    host.order_ended(&quiet).await;

    // The receiver is down; the server is killed; both come back.
    hook.fail(u32::MAX);
    let mut order = scene.order("killed", 0);
    order["parameters"] = json!({ "grouping": "all-in-one" });
    order["limits"] = json!({ "max_unavailable": "100%", "min_healthy_members": 0 });
    order["run"] = true.into();
    let id = host.order(&order).await.expect("an order");
    host.order_ended(&id).await;
    let pending = deliveries(&host, &format!("order={id}&state=pending")).await;
    assert!(!pending.is_empty(), "nothing was taken yet");
    host.kill();
    hook.fail(0);
    host.boot(&[]).await;
    told(&host, &id, &["started", "succeeded"]).await;
    let failed_first = deliveries(&host, &format!("order={id}&channel={hook_channel}")).await;
    assert!(
        failed_first
            .iter()
            .any(|delivery| delivery["attempts"].as_u64() > Some(1)
                && delivery["last_attempts"][0]["answer_code"] == 500),
        "attempts are on record: {failed_first:?}"
    );
    assert_eq!(
        deliveries(&host, &format!("order={quiet}")).await,
        Vec::<Value>::new()
    );

    // Sent again by hand, it is the same delivery.
    let again = text(&failed_first[0]["id"]);
    let before = hook.of(&again).len();
    host.api
        .post(
            &host.ws(&format!("notification-deliveries/{again}/resend")),
            &json!({}),
        )
        .await
        .expect("sent again");
    eventually("it arrives again", || async {
        (hook.of(&again).len() > before)
            .then_some(())
            .ok_or_else(|| "not yet".to_owned())
    })
    .await;

    // No secret is anywhere but at its receiver.
    let shown = deliveries(&host, "").await;
    let channels = host
        .api
        .get(&host.ws("notification-channels"))
        .await
        .expect("channels");
    let everything = format!("{shown:?} {channels} {}", host.server_log());
    for secret in [SIGNING_KEY, ROBOT_TOKEN, ROBOT_SECRET, MAIL_PASSWORD] {
        assert!(!everything.contains(secret), "{secret} is shown");
    }
}

/// Makes a channel; answers its id.
/// What a channel was told of an order, in its sequence: moment, state and reason.
async fn told_of(host: &TestHost, order: &str) -> Vec<(String, String, String)> {
    let mut found = deliveries(host, &format!("order={order}")).await;
    found.sort_by_key(|delivery| delivery["notice"]["order"]["seq"].as_u64());
    let told = found.iter().map(|delivery| {
        let (notice, order) = (&delivery["notice"], &delivery["notice"]["order"]);
        (
            text(&notice["moment"]),
            text(&order["state"]),
            text(&order["reason"]),
        )
    });
    told.collect()
}

/// Waits until a channel was told so often of an order.
async fn told_times(host: &TestHost, order: &str, times: usize) -> Vec<(String, String, String)> {
    eventually("it is told", || async {
        let told = told_of(host, order).await;
        if told.len() >= times {
            Ok(told)
        } else {
            Err(format!("{told:?}"))
        }
    })
    .await
}

/// A failure, or a gate, is told while another application is still under way; each once, also where the server dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_are_told_while_others_run() {
    let mut host = TestHost::start(Setup {
        agents: 2,
        ..Setup::default()
    })
    .await;
    let servers = host.servers().await;
    let one = Scene::prepare_on(&host, "one", servers[..1].to_vec()).await;
    let two = Scene::prepare_on(&host, "two", servers[1..].to_vec()).await;
    let hook = Web::listen("{}");
    channel(
        &host,
        "hook",
        json!({ "kind": "webhook", "url": format!("{}/hook", hook.url) }),
    )
    .await;
    let both = |title: &str| {
        let mut order = one.order(title, 0);
        order["targets"] = json!([
            { "instance": one.instance, "package": one.packages[0] },
            { "instance": two.instance, "package": two.packages[0] },
        ]);
        order["limits"] = json!({ "min_healthy_members": 0 });
        order["run"] = true.into();
        order
    };

    one.put("fail-agent-1");
    two.put("hold");
    let order = host.order(&both("fails")).await.expect("an order");
    let told = told_times(&host, &order, 2).await;
    let reason = "configure on agent-1 of one: ";
    assert_eq!((told[0].0.as_str(), told.len()), ("started", 2), "{told:?}");
    assert_eq!(
        (told[1].0.as_str(), told[1].1.as_str()),
        ("blocked", "running"),
        "{told:?}"
    );
    assert!(told[1].2.starts_with(reason), "{told:?}");
    let header = host.api.get(&host.ws(&format!("orders/{order}"))).await;
    let header = header.expect("the order");
    assert_eq!(header["state"], "running", "{header}");
    assert!(
        text(&header["state_reason"]).starts_with(reason),
        "{header}"
    );
    // What was told is not told again: not after a restart, and not when the other application is done.
    host.kill();
    host.boot(&[]).await;
    two.take("hold");
    host.order_in(&order, &["blocked"]).await;
    one.take("fail-agent-1");
    act(&host, &order, &json!({ "action": "retry", "node": 0 }))
        .await
        .expect("it is tried again");
    let ended = host.order_ended(&order).await;
    assert_eq!(
        (&ended["state"], &ended["state_reason"]),
        (&json!("succeeded"), &json!(""))
    );
    let told = told_times(&host, &order, 3).await;
    let moments: Vec<&str> = told.iter().map(|(moment, ..)| moment.as_str()).collect();
    assert_eq!(moments, ["started", "blocked", "succeeded"], "{told:?}");

    // Two gates in a row, and another application under way.
    let template = json!({ "name": "two-looks", "kind": "restart", "visibility": "workspace", "steps": [
        { "step": "drain" }, { "step": "stop_installed" }, { "step": "start_installed" }, { "step": "check_installed" },
        { "step": "confirm", "message": "the first look" }, { "step": "confirm", "message": "the second look" },
        { "step": "restore" } ] });
    let template = host
        .api
        .post(&host.ws("process-templates"), &template)
        .await;
    let template = text(&template.expect("a template")["id"]);
    let restart = json!({
        "title": "looks", "operation": { "kind": "restart" }, "template": template,
        "parameters": { "grouping": "one-per-group" }, "drain_deadline_ms": 1000, "run": true,
        "limits": { "min_healthy_members": 0 }, "targets": [{ "instance": one.instance }],
    });
    let made = host.api.post(&host.ws("operations"), &restart).await;
    let order = text(&made.expect("an operation")["id"]);
    for look in ["the first look", "the second look"] {
        eventually("it waits", || async {
            let header = host.api.get(&host.ws(&format!("orders/{order}"))).await;
            let reason = text(&header.expect("the order")["state_reason"]);
            if reason.contains(look) {
                Ok(())
            } else {
                Err(reason)
            }
        })
        .await;
        act(&host, &order, &json!({ "action": "confirm", "node": null }))
            .await
            .expect("confirmed");
    }
    host.order_ended(&order).await;
    let told = told_times(&host, &order, 4).await;
    let said: Vec<(&str, bool, bool)> = told
        .iter()
        .map(|(moment, _, reason)| {
            let (first, second) = (reason.contains("first"), reason.contains("second"));
            (moment.as_str(), first, second)
        })
        .collect();
    assert_eq!(
        said,
        [
            ("started", false, false),
            ("waiting", true, false),
            ("waiting", false, true),
            ("succeeded", false, false)
        ],
        "{told:?}"
    );

    // Two applications wait, the second one while the first one does: each has its people.
    let template = json!({ "name": "look-last", "kind": "release", "visibility": "workspace", "steps": [
        { "step": "drain" }, { "step": "fetch" }, { "step": "unpack" }, { "step": "phase", "phase": "configure" },
        { "step": "stop_installed" }, { "step": "activate" }, { "step": "phase", "phase": "start" },
        { "step": "phase", "phase": "check" }, { "step": "confirm", "message": "look at it" }, { "step": "restore" } ] });
    let template = host
        .api
        .post(&host.ws("process-templates"), &template)
        .await;
    let mut order = both("waits");
    order["template"] = template.expect("a template")["id"].clone();
    two.put("hold");
    let order = host.order(&order).await.expect("an order");
    let waits = |times: usize| {
        let order = order.clone();
        let host = &host;
        async move { told_times(host, &order, times).await }
    };
    waits(2).await;
    two.take("hold");
    let told = waits(3).await;
    for (told, (moment, of)) in told.iter().zip([
        ("started", ""),
        ("waiting", "agent-1 of one: look at it"),
        ("waiting", "agent-2 of two: look at it"),
    ]) {
        assert!(told.0 == moment && told.2.ends_with(of), "{told:?}");
    }
    act(&host, &order, &json!({ "action": "confirm", "node": null }))
        .await
        .expect("both are confirmed");
    host.order_ended(&order).await;
    host.stop().await;
}

async fn channel(host: &TestHost, name: &str, target: Value) -> String {
    let body = json!({ "name": name, "target": target });
    let made = host
        .api
        .post(&host.ws("notification-channels"), &body)
        .await;
    text(&made.expect("a channel")["id"])
}

async fn deliveries(host: &TestHost, filter: &str) -> Vec<Value> {
    let path = host.ws(&format!("notification-deliveries?page_size=100&{filter}"));
    items(
        &host
            .api
            .get(path.trim_end_matches('&'))
            .await
            .expect("deliveries"),
    )
}

/// Waits until every channel has taken these moments of an order.
async fn told(host: &TestHost, order: &str, moments: &[&str]) {
    let channels = ["hook", "mail", "robot"];
    let wanted: BTreeSet<(String, String)> = channels
        .iter()
        .flat_map(|channel| {
            moments
                .iter()
                .map(|moment| ((*channel).to_owned(), (*moment).to_owned()))
        })
        .collect();
    eventually(&format!("everybody is told of {order}"), || async {
        let found = deliveries(host, &format!("order={order}")).await;
        let taken: BTreeSet<(String, String)> = found
            .iter()
            .filter(|delivery| delivery["state"] == "delivered")
            .map(|delivery| {
                (
                    text(&delivery["channel_name"]),
                    text(&delivery["notice"]["moment"]),
                )
            })
            .collect();
        if wanted.is_subset(&taken) {
            Ok(())
        } else {
            Err(format!("{found:?}"))
        }
    })
    .await;
}

/// Sends a test message to a new channel and waits for its end.
async fn test_message(host: &TestHost, name: &str, target: Value) -> Value {
    let id = channel(host, name, target).await;
    let path = host.ws(&format!("notification-channels/{id}/test"));
    let test = host.api.post(&path, &json!({})).await.expect("a test");
    ended(host, &text(&test["id"])).await
}

async fn each_receiver_of_a_mail_has_its_own_outcome(host: &TestHost, mail: &Mail) {
    let target = json!({
        "kind": "email", "server": "127.0.0.1", "port": mail.port, "security": "none", "user": "windlass",
        "password_secret": "mail-password", "from": "windlass@example.com",
        "to": ["removed@example.com", "present@example.com"],
    });
    let delivery = test_message(host, "mail-partly", target).await;
    assert_eq!(delivery["state"], "given_up", "{delivery}");
    let attempt = &delivery["last_attempts"][0];
    let receivers = attempt["receivers"].as_array().expect("outcomes");
    let outcomes: Vec<(&Value, &Value, bool)> = receivers
        .iter()
        .map(|one| (&one["receiver"], &one["answer_code"], one["error"] == ""))
        .collect();
    assert_eq!(
        outcomes,
        [
            (&json!("removed@example.com"), &json!(550), false),
            (&json!("present@example.com"), &json!(250), true),
        ],
        "{delivery}"
    );
    let error = text(&attempt["error"]);
    assert!(
        error.starts_with("1 of 2 receivers did not get it (removed@example.com)"),
        "{error}"
    );
    assert_eq!(error.matches("no such mailbox").count(), 1, "{error}");
    let taken = mail.taken();
    assert!(
        taken
            .iter()
            .any(|mail| mail.contains("RCPT TO:<present@example.com>")),
        "{taken:?}"
    );
}

async fn a_redirect_is_not_followed_and_ends_the_delivery(host: &TestHost) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let url = format!("http://{}/old", listener.local_addr().expect("its address"));
    std::thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            let moved = "HTTP/1.1 301 Moved Permanently\r\nLocation: /new\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            if read_request(&connection).is_some() {
                drop(connection.write_all(moved.as_bytes()));
            }
        }
    });
    let target = json!({ "kind": "webhook", "url": url });
    let delivery = test_message(host, "moved", target).await;
    let attempt = &delivery["last_attempts"][0];
    assert_eq!(
        (
            &delivery["attempts"],
            &attempt["permanent"],
            &attempt["answer_code"]
        ),
        (&json!(1), &json!(true), &json!(301)),
        "{delivery}"
    );
    let error = text(&attempt["error"]);
    assert!(error.contains("redirects are not followed"), "{error}");
}

async fn denied_and_wrong_channels_are_told_of(host: &TestHost) {
    let wrong =
        json!({ "name": "wrong", "target": { "kind": "webhook", "url": "gopher://example.com" } });
    let (status, code, _) = refusal(
        host.api
            .post(&host.ws("notification-channels"), &wrong)
            .await,
    );
    assert_eq!((status, code.as_str()), (422, "channel_invalid"));
    let silent = json!({ "name": "silent", "moments": [],
        "target": { "kind": "webhook", "url": "http://127.0.0.1:1/" } });
    let (status, code, detail) = refusal(
        host.api
            .post(&host.ws("notification-channels"), &silent)
            .await,
    );
    assert_eq!(
        (status, code.as_str()),
        (422, "channel_invalid"),
        "{detail}"
    );
    for (name, target, expect) in [
        (
            "metadata",
            json!({ "kind": "webhook", "url": "http://169.254.169.254/latest" }),
            "sends no notifications to",
        ),
        (
            "unset",
            json!({ "kind": "webhook", "url": "http://127.0.0.1:1/", "signing_secret": "none" }),
            "no secret `none`",
        ),
    ] {
        let id = channel(host, name, target).await;
        let test = host
            .api
            .post(
                &host.ws(&format!("notification-channels/{id}/test")),
                &json!({}),
            )
            .await
            .expect("a test");
        let ended = ended(host, &text(&test["id"])).await;
        assert_eq!(ended["state"], "given_up", "{ended}");
        let error = text(&ended["last_attempts"][0]["error"]);
        assert!(error.contains(expect), "{error}");
        let path = host.ws(&format!("notification-channels/{id}?confirm={name}"));
        let answer = host
            .api
            .request(hyper::Method::DELETE, &path, bytes::Bytes::new(), &[])
            .await
            .expect("an answer");
        assert_eq!(answer.status, 204, "{}", answer.text());
    }
}

async fn ended(host: &TestHost, delivery: &str) -> Value {
    let path = host.ws(&format!("notification-deliveries/{delivery}"));
    eventually("the delivery has ended", || async {
        let found = host
            .api
            .get(&path)
            .await
            .map_err(|error| error.to_string())?;
        if found["state"] == "pending" {
            Err(found.to_string())
        } else {
            Ok(found)
        }
    })
    .await
}

async fn a_test_message_arrives(host: &TestHost, channel: &str, hook: &Web) {
    let path = host.ws(&format!("notification-channels/{channel}/test"));
    let test = host.api.post(&path, &json!({})).await.expect("a test");
    let ended = ended(host, &text(&test["id"])).await;
    assert_eq!(ended["state"], "delivered", "{ended}");
    let seen = hook.of(&text(&test["id"]));
    assert_eq!(seen.len(), 1);
    let message: Value = serde_json::from_str(&seen[0].body).expect("JSON");
    assert_eq!(message["name"], "channel.test");
}

fn every_webhook_is_signed(hook: &Web) {
    let key = hmac::Key::new(hmac::HMAC_SHA256, SIGNING_KEY.as_bytes());
    let seen = hook.seen();
    assert!(!seen.is_empty());
    for request in seen {
        assert!(
            request.line.starts_with("POST /hook?team=ops "),
            "{}",
            request.line
        );
        let timestamp = request.header("windlass-timestamp");
        let signature = request.header("windlass-signature");
        let hex = signature.strip_prefix("v1=").expect("the version");
        let tag: Vec<u8> = (0..hex.len() / 2)
            .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hexadecimal"))
            .collect();
        let signed = format!("{timestamp}.{}", request.body);
        hmac::verify(&key, signed.as_bytes(), &tag).expect("the signature is right");
        let message: Value = serde_json::from_str(&request.body).expect("JSON");
        for field in [
            "ver",
            "id",
            "product",
            "resourceId",
            "level",
            "name",
            "userId",
            "eventTime",
            "regionId",
            "content",
        ] {
            assert!(!message[field].is_null(), "{field}: {message}");
        }
    }
}

fn the_robot_can_check_its_messages(robot: &Web) {
    let key = hmac::Key::new(hmac::HMAC_SHA256, ROBOT_SECRET.as_bytes());
    for request in robot.seen() {
        let target = request.line.split(' ').nth(1).expect("a target");
        let query = |name: &str| {
            let (_, query) = target.split_once('?').expect("a query");
            let found = query
                .split('&')
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
            unescape(found.unwrap_or_else(|| panic!("{name}: {target}")))
        };
        assert_eq!(query("access_token"), ROBOT_TOKEN);
        let signed = format!("{}\n{ROBOT_SECRET}", query("timestamp"));
        let tag = BASE64.decode(query("sign")).expect("base64");
        hmac::verify(&key, signed.as_bytes(), &tag).expect("the signature is right");
        let message: Value = serde_json::from_str(&request.body).expect("JSON");
        assert_eq!(message["msgtype"], "markdown");
    }
}

/// A value of a query: base64 and digits need no more than this.
fn unescape(value: &str) -> String {
    value
        .replace("%2B", "+")
        .replace("%2F", "/")
        .replace("%3D", "=")
}

// ---------------------------------------------------------------------------------------------- listeners

/// A request as it came.
#[derive(Clone, Debug)]
struct Seen {
    line: String,
    headers: Vec<String>,
    body: String,
}

impl Seen {
    fn header(&self, name: &str) -> String {
        let found = self.headers.iter().find_map(|header| {
            let (known, value) = header.split_once(": ")?;
            known.eq_ignore_ascii_case(name).then(|| value.to_owned())
        });
        found.unwrap_or_else(|| panic!("no {name}: {self:?}"))
    }
}

/// An HTTP listener that answers what it is told, or 500 for a while.
struct Web {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    failures: Arc<AtomicU32>,
}

impl Web {
    fn listen(answer: &'static str) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("its address"));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let failures = Arc::new(AtomicU32::new(0));
        let (notes, fails) = (seen.clone(), failures.clone());
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                if let Some(request) = read_request(&connection) {
                    let fail = fails
                        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                            left.checked_sub(1)
                        })
                        .is_ok();
                    let status = if fail {
                        "500 Internal Server Error"
                    } else {
                        "200 OK"
                    };
                    let head = format!(
                        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                        answer.len()
                    );
                    let mut connection = connection;
                    if !fail {
                        notes.lock().expect("nobody panics with it").push(request);
                    }
                    // A server that was killed does not wait for its answer.
                    drop(connection.write_all(format!("{head}{answer}").as_bytes()));
                }
            }
        });
        Self {
            url,
            seen,
            failures,
        }
    }

    /// Answers 500 to so many requests from now on.
    fn fail(&self, requests: u32) {
        self.failures.store(requests, Ordering::SeqCst);
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("nobody panics with it").clone()
    }

    /// Requests of one delivery.
    fn of(&self, delivery: &str) -> Vec<Seen> {
        let mut seen = self.seen();
        seen.retain(|request| request.header("windlass-delivery") == delivery);
        seen
    }
}

fn read_request(connection: &TcpStream) -> Option<Seen> {
    let mut reader = BufReader::new(connection.try_clone().ok()?);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let line = lines.remove(0);
    let length = lines.iter().find_map(|header| {
        let (name, value) = header.split_once(": ")?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.parse::<usize>().ok())?
    });
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    Some(Seen {
        line,
        headers: lines,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

/// A mail server that asks for a password and refuses the first message.
struct Mail {
    port: u16,
    taken: Arc<Mutex<Vec<String>>>,
}

impl Mail {
    fn listen() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let taken = Arc::new(Mutex::new(Vec::new()));
        let notes = taken.clone();
        std::thread::spawn(move || {
            let mut refused = false;
            for connection in listener.incoming().flatten() {
                if let Some(mail) = converse(&connection, &mut refused) {
                    notes.lock().expect("nobody panics with it").push(mail);
                }
            }
        });
        Self { port, taken }
    }

    fn taken(&self) -> Vec<String> {
        self.taken.lock().expect("nobody panics with it").clone()
    }
}

/// One conversation: what was said, with the message, where one was taken.
fn converse(connection: &TcpStream, refused: &mut bool) -> Option<String> {
    let mut reader = BufReader::new(connection.try_clone().ok()?);
    let mut writer = connection;
    let mut say = |text: &str| writer.write_all(format!("{text}\r\n").as_bytes()).ok();
    say("220 mail.test ESMTP")?;
    let (mut said, mut in_data, mut known, mut taken) = (String::new(), false, false, false);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return taken.then_some(said);
        }
        let line = line.trim_end_matches(['\r', '\n']);
        said.push_str(line);
        said.push('\n');
        if in_data {
            if line == "." {
                in_data = false;
                taken = *refused;
                *refused = true;
                say(if taken {
                    "250 taken"
                } else {
                    "451 try again later"
                })?;
            }
            continue;
        }
        let plain = BASE64.encode(format!("\0windlass\0{MAIL_PASSWORD}"));
        match line.split(' ').next().unwrap_or_default() {
            "EHLO" => say("250-mail.test\r\n250-AUTH PLAIN LOGIN\r\n250 8BITMIME")?,
            "AUTH" if line == format!("AUTH PLAIN {plain}") => {
                known = true;
                say("235 welcome")?;
            }
            "AUTH" => say("535 who are you?")?,
            "RCPT" if line.contains("removed@") => say("550 no such mailbox")?,
            "MAIL" | "RCPT" if known => say("250 go on")?,
            "MAIL" | "RCPT" => say("530 log in first")?,
            "DATA" => {
                in_data = true;
                say("354 end with a dot")?;
            }
            "QUIT" => {
                say("221 bye")?;
                return taken.then_some(said);
            }
            _ => say("250 fine")?,
        }
    }
}
