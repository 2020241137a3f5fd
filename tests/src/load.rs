//! A load of HTTP requests that never retries: what a test sends through a load balancer while a release goes on.
//!
//! Every request that was handed to a connection counts: answered with 200, or failed. A connection that the other side
//! closed while it was idle is opened anew, as any client does, before a request is handed to it; a request itself is never
//! sent again. Answers are told apart by the last word of their first line: the sample application says its server there.
//! An error that the sample application was told to answer is whole and its own: it is counted by itself, not as a failure.
//!
//! ```text
//! Load::start ─► connections × (wait for the next beat ─► request ─► count) ─► Load::stop ─► Report
//!                        mark ─► requests ─► shares since the mark
//! ```

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request,
    client::conn::http1::{SendRequest, handshake},
    header,
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet};

/// How long one request may take.
const REQUEST_WITHIN: Duration = Duration::from_secs(30);
/// Failures whose texts are kept.
const FAILURES_KEPT: usize = 20;

/// How a load uses its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connections {
    /// One after the other on the same connection.
    KeptAlive,
    /// A connection for every request.
    OnePerRequest,
}

/// A load.
#[derive(Debug, Clone)]
pub struct LoadSpec {
    /// Where to.
    pub address: SocketAddr,
    /// The `Host` header.
    pub host: String,
    /// Path and query.
    pub path: String,
    /// Clients that ask at the same time.
    pub clients: usize,
    /// How they use their connections.
    pub connections: Connections,
    /// Requests per second of all of them together, as far as answers come in time.
    pub requests_per_s: u32,
}

impl LoadSpec {
    /// 600 requests per second to `/` from 8 clients, every second one a `POST`.
    #[must_use]
    pub fn to(address: SocketAddr, connections: Connections) -> Self {
        Self {
            address,
            host: "load.example".to_owned(),
            path: "/".to_owned(),
            clients: 8,
            connections,
            requests_per_s: 600,
        }
    }
}

/// What was counted so far.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Requests that ended, well or not.
    pub requests: u64,
    /// Of them: no answer, a broken one, or another status than 200.
    pub failed: u64,
    /// The first failures, for people.
    pub failures: Vec<String>,
    /// Errors that the application was told to answer with: requests that got through, and are not among the failed ones.
    pub told_to_fail: u64,
    /// Answers by who gave them.
    pub by: BTreeMap<String, u64>,
    /// The longest time of a request in milliseconds.
    pub slowest_ms: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, more: &Self) {
        self.requests += more.requests;
        self.failed += more.failed;
        self.failures.extend(more.failures.iter().cloned());
        self.told_to_fail += more.told_to_fail;
        for (who, count) in &more.by {
            *self.by.entry(who.clone()).or_default() += count;
        }
        self.slowest_ms = self.slowest_ms.max(more.slowest_ms);
    }

    /// The share of each answerer among the answers since an earlier look, 0 to 1.
    ///
    /// # Panics
    /// When there was no answer since.
    #[must_use]
    pub fn shares_since(&self, earlier: &Self) -> BTreeMap<String, f64> {
        let counts: BTreeMap<&String, u64> = self
            .by
            .iter()
            .map(|(who, count)| (who, count - earlier.by.get(who).copied().unwrap_or(0)))
            .collect();
        let all: u64 = counts.values().sum();
        assert!(all > 0, "nobody answered since: {self:?}");
        counts
            .into_iter()
            .map(|(who, count)| (who.clone(), count as f64 / all as f64))
            .collect()
    }
}

/// How a request ended well.
enum Answered {
    By(String),
    ToldToFail,
}

/// What a load came to.
#[derive(Debug, Clone)]
pub struct Report {
    /// All of it.
    pub counts: Counts,
    /// Requests per second over the whole time.
    pub mean_per_s: f64,
    /// Requests in the poorest whole second.
    pub least_per_s: u64,
}

#[derive(Default)]
struct Shared {
    counts: Mutex<Counts>,
    /// Requests in each second since the start.
    seconds: Mutex<Vec<u64>>,
    stop: AtomicBool,
}

impl Shared {
    fn count(&self, began: Instant, took: Duration, answer: Result<Answered, String>) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.requests += 1;
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        counts.slowest_ms = counts.slowest_ms.max(took_ms);
        match answer {
            Ok(Answered::By(who)) => *counts.by.entry(who).or_default() += 1,
            Ok(Answered::ToldToFail) => counts.told_to_fail += 1,
            Err(why) => {
                counts.failed += 1;
                if counts.failures.len() < FAILURES_KEPT {
                    let at = began.elapsed().as_secs_f64();
                    counts.failures.push(format!("after {at:.3} s: {why}"));
                }
            }
        }
        drop(counts);
        let second = usize::try_from(began.elapsed().as_secs()).unwrap_or(usize::MAX);
        let mut seconds = self.seconds.lock().unwrap_or_else(PoisonError::into_inner);
        if seconds.len() <= second {
            seconds.resize(second + 1, 0);
        }
        seconds[second] += 1;
    }
}

/// A load that is under way.
pub struct Load {
    shared: Arc<Shared>,
    clients: JoinSet<()>,
    began: Instant,
}

impl Load {
    /// Begins to send.
    #[must_use]
    pub fn start(spec: LoadSpec) -> Self {
        let shared = Arc::new(Shared::default());
        let began = Instant::now();
        let mut clients = JoinSet::new();
        let count = u32::try_from(spec.clients.max(1)).unwrap_or(u32::MAX);
        let beat = Duration::from_secs(1) * count / spec.requests_per_s.max(1);
        for number in 0..count {
            let (spec, shared) = (spec.clone(), shared.clone());
            // Clients take turns, so that requests are spread over the second.
            let first = began + beat * number / count;
            clients.spawn(async move {
                let mut ticks = tokio::time::interval_at(first.into(), beat);
                ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
                let mut kept = None;
                let mut sent = u64::from(number);
                while !shared.stop.load(Ordering::Relaxed) {
                    ticks.tick().await;
                    sent += 1;
                    let asked = Instant::now();
                    let answer =
                        tokio::time::timeout(REQUEST_WITHIN, ask(&spec, &mut kept, sent)).await;
                    let answer = answer.unwrap_or_else(|_| Err("no answer in time".to_owned()));
                    if answer.is_err() {
                        kept = None;
                    }
                    shared.count(began, asked.elapsed(), answer);
                }
            });
        }
        Self {
            shared,
            clients,
            began,
        }
    }

    /// What was counted so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let counts = self.shared.counts.lock();
        counts.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until so many more requests have ended; the shares among them.
    ///
    /// # Panics
    /// When they do not end within a minute and a tenth of a second for each ten of them.
    pub async fn shares_over(&self, requests: u64) -> BTreeMap<String, f64> {
        Self::shares_of_all(std::slice::from_ref(self), requests).await
    }

    /// The same of several loads together. What shares a pool out knows nothing of loads: where two of them take turns, one
    /// server may answer more of the one than of the other.
    ///
    /// # Panics
    /// As [`Load::shares_over`].
    pub async fn shares_of_all(loads: &[Self], requests: u64) -> BTreeMap<String, f64> {
        let counts = || {
            let mut all = Counts::default();
            for load in loads {
                all.add(&load.counts());
            }
            all
        };
        let before = counts();
        let deadline =
            Instant::now() + Duration::from_secs(60) + Duration::from_millis(10 * requests);
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        loop {
            ticks.tick().await;
            let now = counts();
            if now.requests >= before.requests + requests {
                return now.shares_since(&before);
            }
            assert!(
                Instant::now() < deadline,
                "{requests} more requests: {now:?}"
            );
        }
    }

    /// Ends the load after the requests that are under way.
    ///
    /// # Panics
    /// When a client did.
    pub async fn stop(mut self) -> Report {
        self.shared.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.clients.join_next().await {
            ended.expect("a client of the load");
        }
        let took = self.began.elapsed().as_secs_f64();
        let seconds = self.shared.seconds.lock();
        let mut seconds = seconds.unwrap_or_else(PoisonError::into_inner).clone();
        // The last second was not a whole one.
        seconds.pop();
        let counts = self.counts();
        Report {
            mean_per_s: counts.requests as f64 / took,
            least_per_s: seconds.iter().copied().min().unwrap_or(0),
            counts,
        }
    }
}

type Sender = SendRequest<Full<Bytes>>;

async fn connect(spec: &LoadSpec) -> Result<Sender, String> {
    let stream = TcpStream::connect(spec.address)
        .await
        .map_err(|error| format!("not connected: {error}"))?;
    stream
        .set_nodelay(true)
        .map_err(|error| format!("not connected: {error}"))?;
    let (sender, connection) = handshake(TokioIo::new(stream))
        .await
        .map_err(|error| format!("not connected: {error}"))?;
    // Ends with the connection; what goes wrong on it shows in the request.
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender)
}

/// One request; who answered it.
async fn ask(spec: &LoadSpec, kept: &mut Option<Sender>, number: u64) -> Result<Answered, String> {
    let mut sender = match kept.take() {
        Some(mut sender) => match sender.ready().await {
            Ok(()) => sender,
            Err(_) => connect(spec).await?,
        },
        None => connect(spec).await?,
    };
    let (method, body) = if number.is_multiple_of(2) {
        (Method::GET, Bytes::new())
    } else {
        (
            Method::POST,
            Bytes::from(format!("body of request {number}")),
        )
    };
    let mut request = Request::builder()
        .method(method)
        .uri(&spec.path)
        .header(header::HOST, &spec.host);
    if spec.connections == Connections::OnePerRequest {
        request = request.header(header::CONNECTION, "close");
    }
    let request = request
        .body(Full::new(body))
        .map_err(|error| error.to_string())?;
    let answer = sender
        .send_request(request)
        .await
        .map_err(|error| format!("broken off: {}", with_causes(&error)))?;
    let status = answer.status();
    let body = answer
        .into_body()
        .collect()
        .await
        .map_err(|error| format!("broken off in the body: {}", with_causes(&error)))?
        .to_bytes();
    let text = String::from_utf8_lossy(&body).into_owned();
    let first = text.lines().next().unwrap_or_default();
    let told_to_fail = status == hyper::StatusCode::INTERNAL_SERVER_ERROR
        && first.starts_with("sample ")
        && first.ends_with(" was told to fail");
    if status != hyper::StatusCode::OK && !told_to_fail {
        return Err(format!(
            "{status}: {}",
            text.chars().take(200).collect::<String>()
        ));
    }
    if spec.connections == Connections::KeptAlive {
        *kept = Some(sender);
    }
    if told_to_fail {
        return Ok(Answered::ToldToFail);
    }
    let who = first.split(' ').next_back().unwrap_or_default();
    Ok(Answered::By(who.to_owned()))
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
