//! A small gateway that keeps to the rules of `windlass_protocol`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, sync::Notify};
use tokio_rustls::{TlsAcceptor, rustls};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};
use windlass_domain::{
    Digest,
    id::{InstanceId, ServerId},
    task::{Action, Task, TaskId, TaskResult},
};
use windlass_protocol::*;

use super::{DEADLINE, id};

#[derive(Default)]
pub(crate) struct State {
    inbox: Vec<Slot>,
    pub(crate) results: BTreeMap<TaskId, TaskResult>,
    /// Results that said another outcome than the one before.
    pub(crate) conflicts: Vec<(TaskResult, TaskResult)>,
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
    pub(crate) answers: BTreeMap<u64, Result<QueryReply, QueryError>>,
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

    /// Ends with the next change of the state. Enabled from the start: what happens after this call is not missed.
    pub(crate) fn next_change(&self) -> std::pin::Pin<Box<tokio::sync::futures::Notified<'_>>> {
        let mut changed = Box::pin(self.changed.notified());
        changed.as_mut().enable();
        changed
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

    /// Sends a query.
    pub(crate) fn ask(&self, id: u64, body: Query, timeout_ms: u64) {
        let query = ToAgent::Query {
            id,
            body,
            timeout_ms,
        };
        self.change(|state| state.raw.push(encode(&query).unwrap()));
    }

    /// Waits for the answer of a query.
    pub(crate) async fn answer_of(&self, id: u64) -> Result<QueryReply, QueryError> {
        self.until(&format!("answer {id}"), |state| {
            state.answers.get(&id).cloned()
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
                            let first = state.results.entry(task_id).or_insert_with(|| result.clone()).clone();
                            if first.outcome != result.outcome {
                                state.conflicts.push((first, result));
                            }
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
                        ToServer::QueryAnswer { id, result } => {
                            assert!(state.answers.insert(id, result).is_none(), "answered twice");
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
