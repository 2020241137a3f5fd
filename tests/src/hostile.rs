//! Plugins that do everything wrong at once, on a [`TestHost`], while somebody else uses the API.
//!
//! What each of them is rejected for, or how its calls end, is checked by name; how long others waited is given back.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::task::JoinHandle;
use windlass::api::client::{Client, ClientError};

use crate::{
    guests::{PluginDirectory, guest, guest_that, wait_active},
    host::{TestHost, eventually, items, text},
    release::upload,
    scene,
};

/// Files that are dropped at once.
const FILES: usize = 1000;
/// How a hostile call is asked to behave, and the code that its error names.
const CALLS: [(&str, &str); 6] = [
    ("loop", "computed longer than the limit"),
    ("recurse", "trapped"),
    ("allocate", "more memory than the limit"),
    ("giant", "handed over more than the limit"),
    ("trap", "trapped"),
    ("unknown-action", "its answer cannot be used"),
];
/// A guest whose `describe` does something wrong, and what it is rejected for.
const DESCRIBES: [(&str, &str); 10] = [
    ("loop", "describe_timeout"),
    ("recurse", "describe_failed"),
    ("allocate", "memory_limit"),
    ("trap", "describe_failed"),
    ("schema-broken", "schema_invalid"),
    ("schema-wrong", "schema_invalid"),
    ("schema-enormous", "schema_too_large"),
    ("schema-remote", "schema_remote_reference"),
    ("schema-regex", "schema_regex"),
    ("schema-bomb", "schema_regex"),
];

/// How long requests took while plugins were hostile.
#[derive(Debug)]
pub struct Waited {
    sorted: Vec<Duration>,
}

impl Waited {
    /// So many percent of the requests took at most so long.
    ///
    /// # Panics
    /// When there were none.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let last = self.sorted.len().checked_sub(1).expect("requests");
        self.sorted[last * percent / 100]
    }

    /// How many.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.sorted.len()
    }
}

/// Somebody who uses the API all the while: lists, a record, a write that is refused.
fn others(api: Client, stop: Arc<AtomicBool>) -> JoinHandle<Vec<Duration>> {
    tokio::spawn(async move {
        let mut times = Vec::new();
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        while !stop.load(Ordering::Relaxed) {
            for path in ["/v1/apps", "/v1/workspaces/test", "/v1/plugins/grouped"] {
                ticks.tick().await;
                let started = Instant::now();
                api.get(path).await.expect("others are served");
                times.push(started.elapsed());
            }
        }
        times
    })
}

/// Lets every kind of hostile file and call loose, and checks that each is named.
///
/// # Panics
/// When a culprit is not named, a good plugin does not become live beside them, or a request of others fails.
pub async fn run(host: &TestHost, directory: &PluginDirectory) -> Waited {
    let asked = Asked::prepare(host, directory).await;
    let stop = Arc::new(AtomicBool::new(false));
    let others = others(host.api.clone(), stop.clone());
    let expected = drop_files(&directory.path());
    let flapping = flap(directory.path().join("flapping.wasm"), stop.clone());
    let looks = look_for_ever(host, directory).await;
    for (how, says) in CALLS {
        asked.ends_with(host, how, says).await;
    }
    named_for_its_looks(host, &looks).await;
    // Loops on every worker at once.
    asked.behave(host, "loop").await;
    let orders: Vec<_> = (0..4).map(|_| asked.ask(host)).collect();
    for answer in futures_join(orders).await {
        let (status, _, detail) = scene::refusal(answer);
        assert_eq!(status, 502, "{detail}");
    }
    names(host, &expected).await;
    stop.store(true, Ordering::Relaxed);
    flapping.await.expect("the file is left in order");
    wait_active(host, "flapping@1.0.0").await;
    // Whoever is good is live beside them.
    directory.drop_in("good.wasm", &guest("tech-stack", "good", "1.0.0"));
    wait_active(host, "good@1.0.0").await;
    let mut sorted = others.await.expect("others are served");
    sorted.sort();
    Waited { sorted }
}

async fn futures_join<T>(all: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut all: Vec<_> = all.into_iter().map(Box::pin).collect();
    let mut done: Vec<Option<T>> = all.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (future, done) in all.iter_mut().zip(&mut done) {
            if done.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(context)
            {
                *done = Some(value);
            }
        }
        if done.iter().all(Option::is_some) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    done.into_iter().flatten().collect()
}

/// Diagnoses that look without end, as many as may run at once: at a server through its agent, and at what is not there, which is
/// answered at once.
async fn look_for_ever(host: &TestHost, directory: &PluginDirectory) -> Vec<String> {
    directory.drop_in("looker.wasm", &guest("diagnostic", "looker", "1.0.0"));
    wait_active(host, "looker@1.0.0").await;
    let (_, server) = host.servers().await.remove(0);
    let nothing = json!({ "kind": "operation", "id": "nothing" });
    let mut ids = Vec::new();
    for subject in [
        json!({ "kind": "server", "id": server }),
        nothing.clone(),
        nothing.clone(),
        nothing,
    ] {
        let body = json!({ "plugin": "looker", "subject": subject,
            "parameters": { "behave": "probe-for-ever" } });
        let made = host.api.post(&host.ws("diagnoses"), &body).await;
        ids.push(text(&made.expect("a diagnosis")["id"]));
    }
    ids
}

/// Each ends at a limit, and says who made the calls.
async fn named_for_its_looks(host: &TestHost, ids: &[String]) {
    for id in ids {
        let path = host.ws(&format!("diagnoses/{id}?wait_s=30"));
        let ended = eventually("the diagnosis ends", || async {
            let found = host.api.get(&path).await;
            let found = found.map_err(|error| error.to_string())?;
            match found["state"].as_str() {
                Some("running") => Err(found.to_string()),
                Some(_) | None => Ok(found),
            }
        })
        .await;
        let failure = &ended["failure"];
        let message = text(&failure["message"]);
        let says = match failure["code"].as_str() {
            Some("plugin_host_call_limit") => "more than 500 host calls",
            // A slow machine: its agent did not answer so many times in a minute.
            Some("plugin_call_time_limit") if ended["subject"]["kind"] == "server" => "60000 ms",
            other => panic!("{other:?}: {ended}"),
        };
        for part in ["looker@1.0.0", "`diagnose`", says] {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }
    let looker = host.api.get("/v1/plugins/looker").await.expect("it");
    let counted = &looker["figures"]["failures"]["plugin_host_call_limit"];
    assert!(counted.as_u64() >= Some(3), "{looker}");
}

/// Files of every bad kind, a thousand more of no kind at all; and the codes that they are to be rejected with.
fn drop_files(directory: &Path) -> BTreeMap<String, &'static str> {
    let mut expected = BTreeMap::new();
    for (mode, code) in DESCRIBES {
        let file = format!("describe-{mode}.wasm");
        let bytes = guest_that("tech-stack", &format!("hostile-{mode}"), "1.0.0", mode);
        fs::write(directory.join(&file), bytes).expect("a file");
        expected.insert(file, code);
    }
    let whole = guest("tech-stack", "truncated", "1.0.0");
    for (file, bytes, code) in [
        (
            "truncated.wasm",
            &whole[..whole.len() / 2],
            "invalid_component",
        ),
        ("empty.wasm", &b""[..], "not_wasm"),
        ("module.wasm", b"\0asm\x01\0\0\0", "core_module"),
        (
            "native.wasm",
            b"\x7fELF\x02\x01\x01\0\0\0\0\0",
            "precompiled",
        ),
    ] {
        fs::write(directory.join(file), bytes).expect("a file");
        expected.insert(file.to_owned(), code);
    }
    symlink("/etc/passwd", directory.join("outside.wasm")).expect("a link");
    expected.insert("outside.wasm".to_owned(), "symlink_outside");
    symlink("nowhere.wasm", directory.join("dangling.wasm")).expect("a link");
    expected.insert("dangling.wasm".to_owned(), "unreadable");
    fs::create_dir(directory.join("directory.wasm")).expect("a directory");
    expected.insert("directory.wasm".to_owned(), "not_a_file");
    for number in 0..FILES {
        let file = format!("many-{number}.wasm");
        fs::write(directory.join(&file), format!("no plugin {number}")).expect("a file");
        expected.insert(file, "not_wasm");
    }
    expected
}

/// Replaces and truncates a file while it is read; leaves it good.
fn flap(file: std::path::PathBuf, stop: Arc<AtomicBool>) -> JoinHandle<()> {
    tokio::task::spawn_blocking(move || {
        let good = guest("tech-stack", "flapping", "1.0.0");
        while !stop.load(Ordering::Relaxed) {
            fs::write(&file, &good[..good.len() / 3]).expect("a part of the file");
            std::thread::yield_now();
            fs::write(&file, &good).expect("the file");
            // Now and then long enough to be read, and often not.
            std::thread::sleep(Duration::from_millis(70));
        }
        fs::write(&file, &good).expect("the file");
    })
}

/// Waits until every file is rejected with its code.
async fn names(host: &TestHost, expected: &BTreeMap<String, &'static str>) {
    eventually("every hostile file is named", || async {
        let page = host
            .api
            .get("/v1/plugins")
            .await
            .map_err(|error| error.to_string())?;
        let found: BTreeMap<String, String> = items(&page)
            .iter()
            .filter_map(|status| {
                let code = status["rejection"]["code"].as_str()?;
                Some((text(&status["file"]), code.to_owned()))
            })
            .collect();
        let missing: Vec<String> = expected
            .iter()
            .filter(|(file, code)| found.get(*file).map(String::as_str) != Some(**code))
            .map(|(file, code)| format!("{file}: {:?}, not {code}", found.get(file)))
            .take(5)
            .collect();
        if missing.is_empty() {
            Ok(())
        } else {
            Err(missing.join("\n"))
        }
    })
    .await;
}

/// A stack that is asked by previews of orders and behaves as told.
struct Asked {
    instance: String,
    package: String,
}

impl Asked {
    async fn prepare(host: &TestHost, directory: &PluginDirectory) -> Self {
        directory.drop_in("hostile.wasm", &guest("tech-stack", "hostile", "1.0.0"));
        wait_active(host, "hostile@1.0.0").await;
        let app = host
            .api
            .post(
                "/v1/apps",
                &json!({ "name": "hostile", "tech_stack": { "name": "hostile", "version": "*" } }),
            )
            .await
            .expect("an application");
        let package = upload(host, "hostile", "1.0.0", scene::program("1.0.0")).await;
        let instance = host
            .api
            .post(
                &host.ws("service-instances"),
                &json!({ "name": "hostile", "app": app["id"], "parameters": {} }),
            )
            .await
            .expect("an instance");
        let asked = Self {
            instance: text(&instance["id"]),
            package,
        };
        let servers = host.servers().await;
        let ids: Vec<&str> = servers.iter().map(|(_, id)| id.as_str()).collect();
        host.api
            .post(
                &host.ws(&format!("service-instances/{}/servers", asked.instance)),
                &json!({ "servers": ids }),
            )
            .await
            .expect("servers are bound");
        asked
    }

    async fn behave(&self, host: &TestHost, how: &str) {
        host.api
            .put(
                &host.ws(&format!("service-instances/{}", self.instance)),
                &json!({ "parameters": { "behave": how } }),
            )
            .await
            .expect("the instance is changed");
    }

    async fn ask(&self, host: &TestHost) -> Result<Value, ClientError> {
        let order = json!({ "title": "hostile", "strategy": "grouped",
            "parameters": { "grouping": "one-per-group" },
            "targets": [{ "instance": self.instance, "package": self.package }] });
        host.api.post(&host.ws("orders/preview"), &order).await
    }

    /// The call fails, and its error names the plugin, the function and what was wrong.
    async fn ends_with(&self, host: &TestHost, how: &str, says: &str) {
        self.behave(host, how).await;
        let (status, code, detail) = scene::refusal(self.ask(host).await);
        assert_eq!(
            (status, code.as_str()),
            (502, "plugin_call_failed"),
            "{how}: {detail}"
        );
        for part in ["hostile@1.0.0", "`lifecycle`", says] {
            assert!(detail.contains(part), "{how}: `{part}` is not in: {detail}");
        }
    }
}
