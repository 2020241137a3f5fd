//! `api_get_vs_bare_ratio`: requests per second of `GET /v1/apps/{id}` with its token check, against a bare axum handler that
//! reads the same record from sled and serialises it.
//!
//! Each arm is a process of its own on a runtime of its own: the real server, and this program started again as `bare`. The
//! load comes from here, the same for both: [`CONNECTIONS`] keep-alive connections, each sends its next request when it has
//! the answer. Rounds alternate, the arm that comes first takes turns; prints the median of the ratios of neighbouring rounds.

use std::{
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Json, Router, extract, routing};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    task::JoinSet,
};
use windlass_domain::application::Application;
use windlass_tests::host::{Setup, TestHost, text};

const CONNECTIONS: usize = 48;
const ROUNDS: usize = 9;
const ROUND: Duration = Duration::from_secs(1);

#[tokio::main(flavor = "multi_thread")]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    match arguments.next() {
        Some(directory) => serve_bare(Path::new(&directory)).await,
        None => measure().await,
    }
}

async fn measure() {
    let setup = Setup {
        agents: 0,
        ..Setup::default()
    };
    let mut host = TestHost::start(setup).await;
    let app = json!({
        "name": "shop", "alias": "The shop", "description": "What is sold, and where.", "owner": "sales",
        "tech_stack": { "name": "binary", "version": "*" },
    });
    let made = host
        .api
        .post("/v1/apps", &app)
        .await
        .expect("an application");
    let path = format!("/v1/apps/{}", text(&made["id"]));
    let mut bare = Bare::start(&host.path().join("bare"), &made.to_string()).await;
    let arms = [
        Arm {
            address: host.api_address(),
            path: path.clone(),
            token: Some(host.token()),
        },
        Arm {
            address: bare.address,
            path,
            token: None,
        },
    ];
    // Both answer with the same record.
    let mut bodies = Vec::new();
    for arm in &arms {
        let body = arm.connect().await.get().await;
        bodies.push(serde_json::from_slice::<Application>(&body).expect("an application"));
    }
    assert_eq!(bodies[0], bodies[1]);
    let mut ratios = Vec::new();
    for round in 0..=ROUNDS {
        let mut rates = [0.0; 2];
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for arm in order {
            rates[arm] = arms[arm].rate().await;
        }
        eprintln!("windlass {:.0}/s, bare {:.0}/s", rates[0], rates[1]);
        // The first warms both up.
        if round > 0 {
            ratios.push(rates[0] / rates[1]);
        }
    }
    ratios.sort_by(f64::total_cmp);
    println!("api_get_vs_bare_ratio {:.3} ratio", ratios[ROUNDS / 2]);
    bare.stop().await;
    host.stop().await;
}

/// One of the two that are compared.
struct Arm {
    address: SocketAddr,
    path: String,
    token: Option<String>,
}

/// A keep-alive connection with its request.
struct Connection {
    sender: http1::SendRequest<Empty<Bytes>>,
    request: Request<Empty<Bytes>>,
}

impl Arm {
    async fn connect(&self) -> Connection {
        let stream = TcpStream::connect(self.address)
            .await
            .expect("a connection");
        stream.set_nodelay(true).expect("no delay");
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .expect("a connection");
        // It ends with its sender; a break shows in the answer.
        tokio::spawn(connection);
        let mut request = Request::get(&self.path).header(header::HOST, self.address.to_string());
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(Empty::new()).expect("a request");
        Connection { sender, request }
    }

    /// Requests per second of one round.
    async fn rate(&self) -> f64 {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let mut callers = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let mut connection = self.connect().await;
            let (stop, done) = (stop.clone(), done.clone());
            callers.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    connection.get().await;
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // A rate over time: the load itself is what is waited for.
        tokio::time::sleep(ROUND / 8).await;
        let (before, start) = (done.load(Ordering::Relaxed), Instant::now());
        tokio::time::sleep(ROUND).await;
        let count = done.load(Ordering::Relaxed) - before;
        let rate = count as f64 / start.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        while let Some(ended) = callers.join_next().await {
            ended.expect("every request is answered");
        }
        rate
    }
}

impl Connection {
    async fn get(&mut self) -> Bytes {
        self.sender.ready().await.expect("the connection lives");
        let answer = self
            .sender
            .send_request(self.request.clone())
            .await
            .expect("an answer");
        assert_eq!(answer.status(), 200);
        let body = answer.into_body().collect().await.expect("its body");
        body.to_bytes()
    }
}

/// The process of the bare arm.
struct Bare {
    address: SocketAddr,
    child: Child,
}

impl Bare {
    async fn start(directory: &Path, record: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the bare arm's process");
        let input = child.stdin.as_mut().expect("piped");
        input
            .write_all(format!("{record}\n").as_bytes())
            .await
            .expect("the record is handed over");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let line = output.lines().next_line().await.expect("its address");
        let address = line.expect("its address").parse().expect("an address");
        Self { address, child }
    }

    async fn stop(&mut self) {
        drop(self.child.stdin.take());
        let status = self.child.wait().await.expect("its end");
        assert!(status.success(), "the bare arm ended with {status}");
    }
}

/// The bare arm: keeps the record that its input gives, prints its address, serves until the input ends.
async fn serve_bare(directory: &Path) {
    let mut input = BufReader::new(tokio::io::stdin());
    let mut record = String::new();
    input.read_line(&mut record).await.expect("the record");
    let app: Application = serde_json::from_str(&record).expect("an application");
    let db = sled::open(directory).expect("a database");
    db.insert(app.id.to_string(), record.trim_end())
        .expect("the record is kept");
    db.flush().expect("the record is durable");
    let router = Router::new()
        .route("/v1/apps/{app}", routing::get(get_bare))
        .with_state(db);
    let listener = TcpListener::bind(("127.0.0.1", 0))
        .await
        .expect("a listener");
    println!("{}", listener.local_addr().expect("its address"));
    let mut rest = Vec::new();
    tokio::select! {
        served = async { axum::serve(listener, router).await } => served.expect("it serves"),
        read = input.read_to_end(&mut rest) => {
            read.expect("the end of the input");
        }
    }
}

async fn get_bare(
    extract::State(db): extract::State<sled::Db>,
    extract::Path(app): extract::Path<String>,
) -> Json<Application> {
    let row = db
        .get(app)
        .expect("sled answers")
        .expect("there is the application");
    Json(serde_json::from_slice(&row).expect("a record"))
}
