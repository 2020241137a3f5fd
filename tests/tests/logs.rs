//! Logs of steps: live while they run, resumed, and later, of every attempt.

use serde_json::{Value, json};
use windlass::api::client::EventStream;
use windlass_tests::{
    host::{Setup, TestHost, eventually, items, text},
    scene::{Scene, act, nodes, nodes_when, refusal, step},
};

/// Bytes of one line of the script: far more than anybody keeps, or a connection holds on its way to a slow reader.
const LONG: u64 = 16_000_000;

/// Says something, waits while it is told to, says something more, and fails while it is told to.
const SCRIPT: &str = "echo first on $WINDLASS_SERVER\n\
    while [ -e \"$SCENE/hold\" ]; do sleep 0.05; done\n\
    echo the key is $KEY\n\
    if [ -e \"$SCENE/fail-$WINDLASS_SERVER\" ]; then echo told to fail; exit 7; fi\n\
    head -c 16000000 /dev/zero | tr '\\0' x; echo; echo last\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_are_followed_live_and_kept_of_every_attempt() {
    let host = TestHost::start(Setup {
        agents: 1,
        ..Setup::default()
    })
    .await;
    let scene = Scene::prepare(&host).await;
    host.api
        .put(
            &host.ws("secrets/key"),
            &json!({ "value": "s3cr3t-and-long" }),
        )
        .await
        .expect("a secret");
    let mut parameters = windlass_tests::scene::parameters();
    parameters["configure_script"] = SCRIPT.into();
    let mut env = scene.env();
    env["KEY"] = json!({ "secret_ref": "key" });
    scene
        .change(&host, &json!({ "parameters": parameters, "env": env }))
        .await;
    scene.put("hold");
    scene.put("fail-agent-1");
    let mut order = scene.order("logs", 0);
    order["run"] = true.into();
    let order = host.order(&order).await.expect("an order");
    let seen = nodes_when(&host, &order, "the script runs", |nodes| {
        step(nodes, "agent-1", "configure")["state"] == "running"
    })
    .await;
    let node = step(&seen, "agent-1", "configure")["node"].clone();
    let log = host.ws(&format!("orders/{order}/nodes/{node}/log"));

    let mut live = follow(&host, &format!("{log}/live"), None).await;
    let (id, piece) = output(&mut live).await;
    assert_eq!(piece["text"], "first on agent-1\n");
    assert_eq!(piece["next_offset"], id, "resumed with the event's id");
    let now = host.api.get(&log).await.expect("the log");
    assert_eq!(
        (&now["output"], &now["ended"], &now["attempt"]),
        (&piece["text"], &json!(false), &json!(1)),
        "{now}"
    );
    // Whoever comes back gets what is new.
    let mut resumed = follow(&host, &format!("{log}/live"), Some(id)).await;
    scene.take("hold");
    let (text_of, end) = rest(&mut resumed).await;
    assert_eq!(text_of, "the key is [secret]\ntold to fail\n");
    assert_eq!(
        (&end["outcome"], &end["exit_code"], &end["attempt"]),
        (&json!("failed"), &json!(7), &json!(1)),
        "{end}"
    );
    assert_eq!(rest(&mut live).await.0, text_of, "both followers see it");

    // The second attempt is followed before it begins, by one who does not read before it is over and holds nobody up; the
    // first one's log stays.
    let mut second = follow(&host, &format!("{log}/live?attempt=2"), None).await;
    scene.take("fail-agent-1");
    host.order_in(&order, &["blocked"]).await;
    act(&host, &order, &json!({ "action": "retry", "node": node }))
        .await
        .expect("a retry");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    let (text_of, end) = rest(&mut second).await;
    assert!(
        // What came faster than it was read is left out, wherever that was; the end is there.
        text_of.ends_with("xxx\nlast\n") && (text_of.len() as u64) < LONG,
        "{} bytes",
        text_of.len()
    );
    assert_eq!(end["outcome"], "succeeded", "{end}");
    let earlier = host
        .api
        .get(&format!("{log}?attempt=1"))
        .await
        .expect("the log");
    assert!(
        text(&earlier["output"]).ends_with("told to fail\n"),
        "{earlier}"
    );
    assert_eq!(
        (
            &earlier["exit_code"],
            &earlier["attempts"],
            &earlier["ended"]
        ),
        (&json!(7), &json!(2), &json!(true))
    );
    let last = host.api.get(&log).await.expect("the log");
    assert_eq!(last["attempt"], 2);
    assert!(
        last["dropped_bytes"].as_u64() > Some(LONG - 25_000),
        "{}",
        last["dropped_bytes"]
    );
    assert!(text(&last["output"]).len() <= 24 * 1024);

    // The one after it will never be; what never can be is no log that could still come.
    let never = host.api.get(&format!("{log}?attempt=3")).await;
    let never = never.expect("the log of what was not begun");
    assert_eq!(
        (&never["ended"], &never["outcome"]),
        (&json!(true), &Value::Null),
        "{never}"
    );
    for attempt in [0, 7] {
        for path in [&log, &format!("{log}/live")] {
            let path = format!("{path}?attempt={attempt}");
            let (status, code, _) = refusal(host.api.get(&path).await);
            assert_eq!((status, code.as_str()), (404, "not_found"), "{path}");
        }
    }

    dashboards_show_it(&host, &order).await;

    // Long after, a stream gives what is kept, with the gap.
    let mut host = host;
    host.restart().await;
    let mut late = follow(&host, &format!("{log}/live?attempt=2"), None).await;
    let (_, head) = output(&mut late).await;
    assert!(text(&head["text"]).starts_with("first on agent-1\n"));
    let (_, tail) = output(&mut late).await;
    assert!(
        tail["dropped_bytes"].as_u64() > Some(LONG - 25_000),
        "{}",
        tail["dropped_bytes"]
    );
    assert!(rest(&mut late).await.0.is_empty());

    let others = nodes(&host, &order).await;
    let server = others
        .iter()
        .find(|node| node["level"] == "server")
        .expect("a server");
    let path = host.ws(&format!("orders/{order}/nodes/{}/log", server["node"]));
    let (status, code, _) = refusal(host.api.get(&path).await);
    assert_eq!((status, code.as_str()), (409, "not_a_step"));
}

/// One order has ended: it is counted, found and shown with its durations.
async fn dashboards_show_it(host: &TestHost, order: &str) {
    let counts = host
        .api
        .get(&host.ws("order-counts"))
        .await
        .expect("counts");
    let expected = json!({ "total": 1, "active": 0, "by_state": { "succeeded": 1 } });
    assert_eq!(counts, expected);
    let progress = host
        .api
        .get(&host.ws(&format!("orders/{order}/progress")))
        .await
        .expect("the progress");
    let application = &progress["applications"][0];
    let server = &application["groups"][0]["servers"][0];
    assert_eq!(application["application"], "scene", "{progress}");
    assert_eq!(
        (&application["version"], &application["servers"]),
        (&json!("1.0.0"), &json!({ "succeeded": 1 }))
    );
    assert_eq!(
        (&server["name"], &server["steps_done"]),
        (&json!("agent-1"), &server["steps_total"])
    );
    for span in [&progress, application, &application["groups"][0], server] {
        assert!(
            span["duration_ms"].as_u64() > Some(0) && !span["finished_at"].is_null(),
            "{span}"
        );
    }
    let instance = text(&application["instance"]);
    for (filter, found) in [
        ("app=scene", 1),
        ("app=other", 0),
        (
            &*format!("app=scene&instance={instance}&state=succeeded"),
            1,
        ),
        (&*format!("instance={instance}&state=failed"), 0),
        ("text=LOGS", 1),
        ("text=nothing", 0),
        ("strategy=grouped&state=succeeded", 1),
        ("strategy=canary", 0),
        ("made_after=2000-01-01T00:00:00Z", 1),
        ("made_before=2000-01-01T00:00:00Z", 0),
    ] {
        let page = host.api.get(&host.ws(&format!("orders?{filter}"))).await;
        let page = page.expect("orders");
        assert_eq!(items(&page).len(), found, "{filter}: {page}");
    }
}

async fn follow(host: &TestHost, path: &str, last: Option<u64>) -> EventStream {
    eventually("a stream", || async {
        let last = last.map(|last| last.to_string());
        let stream = host.api.events(path, last.as_deref()).await;
        stream.map_err(|error| error.to_string())
    })
    .await
}

/// The next piece of output, with its event's id.
async fn output(stream: &mut EventStream) -> (u64, Value) {
    let event = stream
        .next()
        .await
        .expect("an event")
        .expect("more of them");
    assert_eq!(event.event, "output", "{}", event.data);
    let data: Value = serde_json::from_str(&event.data).expect("JSON");
    (data["next_offset"].as_u64().expect("a place"), data)
}

/// Everything up to the end, and the end. What is missing between two pieces is said.
async fn rest(stream: &mut EventStream) -> (String, Value) {
    let mut all = String::new();
    let mut at = None;
    while let Some(event) = stream.next().await.expect("an event") {
        let data: Value = serde_json::from_str(&event.data).expect("JSON");
        if event.event == "end" {
            return (all, data);
        }
        let number = |field: &str| data[field].as_u64().expect("a number");
        if let Some(at) = at {
            assert_eq!(number("offset"), at + number("dropped_bytes"), "{at}");
        }
        let piece = data["text"].as_str().expect("a text");
        assert_eq!(number("next_offset"), number("offset") + piece.len() as u64);
        at = Some(number("next_offset"));
        all.push_str(piece);
    }
    panic!("the stream ended before its end: {all}");
}
