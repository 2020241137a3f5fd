//! A small gateway that keeps to the rules of `windlass_protocol`, an agent that is a real process, and a proxy that cuts.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    convert::Infallible,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
};
use tokio_rustls::{TlsAcceptor, rustls};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};
use windlass_domain::{
    Digest, Timestamp,
    id::{AppId, InstanceId, OrderId, ServerId},
    manifest::{Manifest, PluginRef},
    task::{Action, PackageFormat, PackageRef, Script, Supervise, Task, TaskId, TaskResult},
    value::Environment,
};
use windlass_protocol::*;

/// Longer than anything takes on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) fn id() -> uuid::Uuid {
    uuid::Uuid::now_v7()
}

#[derive(Default)]
pub(crate) struct State {
    inbox: Vec<Slot>,
    pub(crate) results: BTreeMap<TaskId, TaskResult>,
    pub(crate) accepted: BTreeSet<TaskId>,
    pub(crate) started: BTreeSet<TaskId>,
    pub(crate) output: HashMap<TaskId, String>,
    pub(crate) states: Vec<AgentState>,
    pub(crate) hellos: Vec<Hello>,
    pub(crate) secrets_asked: Vec<(InstanceId, Vec<String>)>,
    pub(crate) secrets: BTreeMap<String, String>,
    pub(crate) blobs: HashMap<Digest, Vec<u8>>,
    /// How many bytes the next download sends before it breaks off.
    pub(crate) cut_download_after: Option<usize>,
    /// Each download's first byte.
    pub(crate) download_starts: Vec<usize>,
    /// Sent to the agent as they are.
    pub(crate) raw: Vec<String>,
    pub(crate) unsupported: Vec<String>,
    grants: HashMap<String, Digest>,
    /// While set, no result is acknowledged.
    pub(crate) hold_acks: bool,
    open: bool,
    kick: u64,
}

struct Slot {
    push: TaskPush,
    pushed_epoch: Option<Epoch>,
    revoke: bool,
}

pub(crate) struct Gateway {
    pub(crate) state: Mutex<State>,
    changed: Notify,
    identity: Identity,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) code: ActivationCode,
    pub(crate) server_id: ServerId,
    agent_key: Mutex<Option<PublicKey>>,
    pub(crate) port: u16,
}

impl Gateway {
    pub(crate) async fn start() -> Arc<Self> {
        let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let spki = rcgen::PublicKeyData::subject_public_key_info(&certified.signing_key);
        let fingerprint = Fingerprint::of_key(&spki);
        let key =
            rustls::pki_types::PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key.into())
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gateway = Arc::new(Self {
            state: Mutex::default(),
            changed: Notify::new(),
            identity: Identity::from_seed([42; 32]),
            fingerprint,
            code: ActivationCode::new(windlass_agent::clock::random(), fingerprint),
            server_id: ServerId::from_uuid(id()),
            agent_key: Mutex::new(None),
            port: listener.local_addr().unwrap().port(),
        });
        let served = gateway.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (gateway, acceptor) = (served.clone(), acceptor.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let service = service_fn(move |request| gateway.clone().answer(request));
                    // Broken connections are what these tests are about.
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades()
                        .await
                        .ok();
                });
            }
        });
        gateway
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let done = change(&mut self.state());
        self.changed.notify_waiters();
        done
    }

    /// Waits until `look` finds something; panics with the last state otherwise.
    pub(crate) async fn until<T>(
        &self,
        what: &str,
        mut look: impl FnMut(&State) -> Option<T>,
    ) -> T {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if let Some(found) = look(&self.state()) {
                    return found;
                }
                changed.await;
            }
        };
        match tokio::time::timeout(DEADLINE, wait).await {
            Ok(found) => found,
            Err(_) => {
                let state = self.state();
                panic!(
                    "no {what} in time; results {:#?}, accepted {:?}, started {:?}, session open: {}",
                    state.results, state.accepted, state.started, state.open
                )
            }
        }
    }

    pub(crate) fn push(&self, task: Task) -> TaskId {
        let id = task.id;
        self.change(|state| {
            let secrets = state
                .secrets
                .iter()
                .map(|(name, value)| (name.clone(), SecretText::new(value.clone())))
                .collect();
            state.inbox.push(Slot {
                push: TaskPush {
                    task,
                    secrets,
                    grant: None,
                },
                pushed_epoch: None,
                revoke: false,
            });
        });
        id
    }

    /// Puts a task that was sent before, or came to an end before, into the inbox again.
    pub(crate) fn push_again(&self, task: Task) -> TaskId {
        self.change(|state| {
            state.results.remove(&task.id);
            state.inbox.retain(|slot| slot.push.task.id != task.id);
        });
        self.push(task)
    }

    pub(crate) fn revoke(&self, id: TaskId) {
        self.change(|state| {
            if let Some(slot) = state.inbox.iter_mut().find(|slot| slot.push.task.id == id) {
                slot.revoke = true;
            }
        });
    }

    pub(crate) async fn result(&self, id: TaskId) -> TaskResult {
        self.until(&format!("result of {id}"), |state| {
            state.results.get(&id).cloned()
        })
        .await
    }

    pub(crate) async fn run(&self, task: Task) -> TaskResult {
        let id = self.push(task);
        self.result(id).await
    }

    pub(crate) async fn connected(&self) {
        self.until("session", |state| state.open.then_some(()))
            .await;
    }

    /// Ends the current session by closing its connection.
    pub(crate) fn kick(&self) {
        self.change(|state| {
            state.kick += 1;
            state.open = false;
        });
    }

    async fn answer(
        self: Arc<Self>,
        mut request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let path = request.uri().path().to_owned();
        let status = |code: StatusCode| {
            let mut response = Response::new(Full::new(Bytes::new()));
            *response.status_mut() = code;
            response
        };
        if path == REGISTER_PATH {
            let body = request
                .into_body()
                .collect()
                .await
                .map(|body| body.to_bytes())
                .unwrap_or_default();
            let request: RegisterRequest = serde_json::from_slice(&body).unwrap();
            let code = ActivationCode::parse(request.code.reveal()).unwrap();
            if code.secret_hash() != self.code.secret_hash() {
                let problem = Problem {
                    code: "activation_code_unknown".into(),
                    detail: "no such code".into(),
                };
                let mut response =
                    Response::new(Full::new(serde_json::to_vec(&problem).unwrap().into()));
                *response.status_mut() = StatusCode::FORBIDDEN;
                return Ok(response);
            }
            identity::verify_registration(request.public_key, &code, &request.proof).unwrap();
            *self.agent_key.lock().unwrap() = Some(request.public_key);
            let answer = RegisterResponse {
                server_id: self.server_id,
                name: "test".into(),
                platform_key: self.identity.public_key(),
            };
            return Ok(Response::new(Full::new(
                serde_json::to_vec(&answer).unwrap().into(),
            )));
        }
        if path == CONNECT_PATH {
            let accept = derive_accept_key(request.headers()["sec-websocket-key"].as_bytes());
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                if let Ok(upgraded) = upgrade.await {
                    let socket = WebSocketStream::from_raw_socket(
                        TokioIo::new(upgraded),
                        Role::Server,
                        None,
                    )
                    .await;
                    self.session(socket).await;
                    self.change(|_| ());
                }
            });
            let response = Response::builder()
                .status(StatusCode::SWITCHING_PROTOCOLS)
                .header("connection", "upgrade")
                .header("upgrade", "websocket")
                .header("sec-websocket-accept", accept);
            return Ok(response.body(Full::default()).unwrap());
        }
        let Some(digest) = path
            .strip_prefix(BLOBS_PATH)
            .and_then(|rest| rest[1..].parse::<Digest>().ok())
        else {
            return Ok(status(StatusCode::NOT_FOUND));
        };
        let mut state = self.state();
        let header = |name: &str| {
            request
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        let token = header("authorization")
            .and_then(|value| value.strip_prefix("Bearer "))
            .unwrap_or_default();
        match state.grants.get(token) {
            None => return Ok(status(StatusCode::UNAUTHORIZED)),
            Some(granted) if *granted != digest => return Ok(status(StatusCode::FORBIDDEN)),
            Some(_) => {}
        }
        let from: usize = header("range")
            .and_then(|value| {
                value
                    .strip_prefix("bytes=")?
                    .strip_suffix('-')?
                    .parse()
                    .ok()
            })
            .unwrap_or(0);
        state.download_starts.push(from);
        let blob = state.blobs[&digest].clone();
        let mut response = Response::new(Full::new(Bytes::copy_from_slice(&blob[from..])));
        if from > 0 {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        }
        if let Some(cut) = state.cut_download_after.take() {
            *response.body_mut() = Full::new(Bytes::copy_from_slice(&blob[from..from + cut]));
        }
        Ok(response)
    }

    async fn session<S>(&self, mut socket: WebSocketStream<S>) -> Option<()>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    {
        let server_nonce = Nonce::from_bytes(windlass_agent::clock::random());
        let challenge = ToAgent::Challenge {
            nonce: server_nonce,
            protocols: ProtocolRange::OURS,
        };
        socket
            .send(Message::text(encode(&challenge).unwrap()))
            .await
            .ok()?;
        let Message::Text(text) = socket.next().await?.ok()? else {
            return None;
        };
        let Decoded::Message(ToServer::Hello(hello)) = decode(&text).unwrap() else {
            panic!("no hello")
        };
        let transcript = Transcript {
            protocol: hello.protocol,
            server_id: hello.server_id,
            server_nonce,
            agent_nonce: hello.nonce,
            fingerprint: self.fingerprint,
        };
        let key = self.agent_key.lock().unwrap().unwrap();
        transcript
            .verify_hello(key, hello.epoch, &hello.signature)
            .unwrap();
        let session = SessionId::from_bytes(windlass_agent::clock::random());
        let welcome = ToAgent::Welcome(Welcome {
            session,
            signature: self.identity.sign_welcome(&transcript, session),
            heartbeat_interval_ms: 2000,
        });
        socket
            .send(Message::text(encode(&welcome).unwrap()))
            .await
            .ok()?;
        let epoch = hello.epoch;
        let kick = self.change(|state| {
            state.states.push(hello.state.clone());
            state.hellos.push(*hello);
            state.grants.clear();
            state.open = true;
            state.kick += 1;
            // Sent under another epoch: not sent again, unknown.
            let (lost, rest) = std::mem::take(&mut state.inbox)
                .into_iter()
                .partition(|slot| slot.pushed_epoch.is_some_and(|pushed| pushed != epoch));
            state.inbox = rest;
            let lost: Vec<Slot> = lost;
            for slot in lost {
                let result = windlass_agent::execute::result_without_run(
                    windlass_domain::task::Outcome::Unknown,
                    "the journal's epoch changed",
                    None,
                );
                state.results.entry(slot.push.task.id).or_insert(result);
            }
            state.kick
        });
        let (mut sent, mut revoked) = (BTreeSet::new(), BTreeSet::new());
        let mut heartbeat = tokio::time::interval(Duration::from_secs(2));
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let mut messages = Vec::new();
            {
                let mut state = self.state();
                if state.kick != kick {
                    return None;
                }
                messages.append(&mut state.raw);
                let mut grants = Vec::new();
                for slot in &mut state.inbox {
                    let id = slot.push.task.id;
                    if sent.insert(id) {
                        slot.pushed_epoch = Some(epoch);
                        if let Action::Fetch(package) = &slot.push.task.action {
                            let token = id.to_string().replace('.', "-") + &session.to_string();
                            grants.push((token.clone(), package.digest));
                            slot.push.grant = Some(DownloadGrant {
                                digest: package.digest,
                                token: SecretText::new(token),
                            });
                        }
                        messages.push(encode(&ToAgent::Task(Box::new(slot.push.clone()))).unwrap());
                    }
                    if slot.revoke && revoked.insert(id) {
                        messages.push(encode(&ToAgent::Revoke { task_id: id }).unwrap());
                    }
                }
                state.grants.extend(grants);
            }
            for message in messages {
                socket.send(Message::text(message)).await.ok()?;
            }
            tokio::select! {
                () = changed => {}
                _ = heartbeat.tick() => {
                    socket.send(Message::text(encode(&ToAgent::Ping { seq: 1 }).unwrap())).await.ok()?;
                }
                frame = socket.next() => {
                    let Message::Text(text) = frame?.ok()? else { continue };
                    let Decoded::Message(message) = decode::<ToServer>(&text).unwrap() else { panic!("{text}") };
                    let mut reply = None;
                    self.change(|state| match message {
                        ToServer::Accepted { task_id } => { state.accepted.insert(task_id); }
                        ToServer::Started { task_id, .. } => { state.started.insert(task_id); }
                        ToServer::Output(chunk) => state.output.entry(chunk.task_id).or_default().push_str(&chunk.text),
                        ToServer::Result { task_id, result } => {
                            // The row and the inbox, then the acknowledgement. What came first stays.
                            state.inbox.retain(|slot| slot.push.task.id != task_id);
                            sent.remove(&task_id);
                            state.results.entry(task_id).or_insert(result);
                            if !state.hold_acks {
                                reply = Some(ToAgent::Ack { task_id });
                            }
                        }
                        ToServer::State(now) => state.states.push(*now),
                        ToServer::SecretsNeeded { instance, names } => {
                            let values = names
                                .iter()
                                .filter_map(|name| Some((name.clone(), SecretText::new(state.secrets.get(name)?.clone()))))
                                .collect();
                            state.secrets_asked.push((instance, names));
                            reply = Some(ToAgent::Secrets { instance, values });
                        }
                        ToServer::Unsupported { of_kind } => state.unsupported.push(of_kind),
                        ToServer::Pong { .. } => {}
                        ToServer::Hello(_) => panic!("a second hello"),
                    });
                    if let Some(reply) = reply {
                        socket.send(Message::text(encode(&reply).unwrap())).await.ok()?;
                    }
                }
            }
        }
    }
}

/// A registered agent, a real process; everything of it is ended with the test.
pub(crate) struct TestAgent {
    pub(crate) dir: tempfile::TempDir,
    child: Option<Child>,
}

pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_windlass-agent"));
    command
        .env_remove("WINDLASS_CRASH_AT")
        .env_remove("WINDLASS_CRASH_LOG")
        .stdin(Stdio::null());
    command
}

impl TestAgent {
    pub(crate) async fn register(gateway: &Gateway) -> Self {
        Self::register_at(gateway, gateway.port, tempfile::tempdir().unwrap()).await
    }

    pub(crate) async fn register_at(gateway: &Gateway, port: u16, dir: tempfile::TempDir) -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        // Other users have to get through to their scripts.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let agent = Self { dir, child: None };
        let mut command = binary();
        command
            .args([
                "register",
                "--server",
                &format!("https://127.0.0.1:{port}"),
                "--code",
                &gateway.code.print(),
            ])
            .args(["--allow-root", "--allow-user", "nobody", "--data"])
            .arg(agent.data());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap())
            .await
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        agent
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("agent")
    }

    pub(crate) fn policy(&self, change: impl FnOnce(&mut windlass_agent::config::Policy)) {
        let data = windlass_agent::config::DataDir::open(&self.data()).unwrap();
        let mut config = data.load_config().unwrap();
        change(&mut config.policy);
        data.save_config(&config).unwrap();
    }

    pub(crate) fn start(&mut self) {
        self.start_with(&[]);
    }

    pub(crate) fn start_with(&mut self, env: &[(&str, String)]) {
        assert!(self.child.is_none());
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .unwrap();
        let mut command = binary();
        command
            .args(["run", "--data"])
            .arg(self.data())
            .envs(env.iter().cloned())
            .env("WINDLASS_LOG", "debug")
            .stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Its exit status, once it ended by itself.
    pub(crate) fn ended(&mut self) -> Option<std::process::ExitStatus> {
        let status = self.child.as_mut()?.try_wait().unwrap()?;
        self.child = None;
        Some(status)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn stop_all(&mut self) {
        let mut command = binary();
        command.args(["stop-all", "--data"]).arg(self.data());
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        if let Some(mut child) = self.child.take() {
            child.wait().unwrap();
        }
    }

    /// A file beside the data directory that every user may write.
    pub(crate) fn open_file(&self, name: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.dir.path().join(name);
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        path
    }
}

impl Drop for TestAgent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the agent's log\n{}", self.log());
        }
        let mut command = binary();
        command.args(["stop-all", "--data"]).arg(self.data());
        let stopped = command.output().is_ok_and(|output| output.status.success());
        if let Some(mut child) = self.child.take() {
            child.wait().ok();
        }
        assert!(stopped || std::thread::panicking(), "stop-all failed");
    }
}

/// Waits for a condition outside of the gateway.
pub(crate) async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "no {what} in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Makes tasks of one order and one instance.
pub(crate) struct Order {
    pub(crate) order: OrderId,
    pub(crate) instance: InstanceId,
    node: u32,
}

impl Order {
    pub(crate) fn new() -> Self {
        Self {
            order: OrderId::from_uuid(id()),
            instance: InstanceId::from_uuid(id()),
            node: 0,
        }
    }

    pub(crate) fn task(&mut self, action: Action) -> Task {
        self.node += 1;
        Task {
            id: TaskId {
                order: self.order,
                node: self.node,
                attempt: 1,
            },
            instance: self.instance,
            release: None,
            fence: 1,
            expires_at: Timestamp::from_unix_ms(253_000_000_000_000),
            timeout_ms: 50_000,
            run_as: None,
            env: Environment::new(),
            action,
        }
    }

    pub(crate) fn script(&mut self, text: &str) -> Task {
        self.task(Action::Script(script(text)))
    }

    pub(crate) fn manifest(&self, release: &str, package: &PackageRef) -> Manifest {
        Manifest {
            instance: self.instance,
            app: AppId::from_uuid(id()),
            release: release.into(),
            package: package.clone(),
            stack: PluginRef {
                name: "binary".into(),
                version: "1.0.0".parse().unwrap(),
                digest: Digest::of(b"p"),
            },
            stop: vec![],
            start: vec![],
            check: vec![],
            env: Environment::new(),
            plan: None,
        }
    }

    pub(crate) fn start(&mut self, command: &[&str]) -> Task {
        self.task(Action::Start(Supervise {
            command: command.iter().map(ToString::to_string).collect(),
            working_dir: None,
            restart: windlass_domain::task::Restart::Always,
        }))
    }
}

pub(crate) fn script(text: &str) -> Script {
    Script {
        interpreter: vec!["/bin/sh".into(), "-eu".into()],
        text: text.into(),
        working_dir: None,
    }
}

pub(crate) fn package(
    gateway: &Gateway,
    bytes: Vec<u8>,
    format: PackageFormat,
    file_name: &str,
) -> PackageRef {
    let digest = Digest::of(&bytes);
    let package = PackageRef {
        digest,
        size_bytes: bytes.len() as u64,
        format,
        file_name: file_name.into(),
        version: "1".into(),
    };
    gateway.state().blobs.insert(digest, bytes);
    package
}

pub(crate) fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(Into::into)
        .collect()
}

pub(crate) fn is_alive(pid: u32) -> bool {
    windlass_agent::proc::ProcessId::of(pid).is_some()
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Forwards connections to the gateway; cuts them on demand.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    plan: Mutex<Option<Cut>>,
}

/// Where to cut: after so many bytes in one direction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    pub(crate) towards_agent: bool,
    pub(crate) after: usize,
}

impl Proxy {
    pub(crate) async fn start(to: u16) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Arc::new(Self {
            port: listener.local_addr().unwrap().port(),
            plan: Mutex::new(None),
        });
        let served = proxy.clone();
        tokio::spawn(async move {
            while let Ok((agent, _)) = listener.accept().await {
                let Ok(gateway) = TcpStream::connect(("127.0.0.1", to)).await else {
                    continue;
                };
                // One plan is for one connection.
                let plan = served.plan.lock().unwrap().take();
                tokio::spawn(async move {
                    let (agent_read, agent_write) = agent.into_split();
                    let (gateway_read, gateway_write) = gateway.into_split();
                    let limit = |towards| {
                        plan.filter(|cut| cut.towards_agent == towards)
                            .map(|cut| cut.after)
                    };
                    tokio::select! {
                        () = forward(agent_read, gateway_write, limit(false)) => {}
                        () = forward(gateway_read, agent_write, limit(true)) => {}
                    }
                });
            }
        });
        proxy
    }

    /// The next connection is cut there.
    pub(crate) fn cut_next(&self, cut: Cut) {
        *self.plan.lock().unwrap() = Some(cut);
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.plan.lock().unwrap().is_some()
    }
}

async fn forward(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut limit: Option<usize>,
) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut buffer = vec![0; 4096];
    loop {
        let Ok(count) = from.read(&mut buffer).await else {
            return;
        };
        if count == 0 {
            return;
        }
        let pass = limit.map_or(count, |left| count.min(left));
        if to.write_all(&buffer[..pass]).await.is_err() || limit == Some(pass) {
            return;
        }
        limit = limit.map(|left| left - pass);
    }
}
