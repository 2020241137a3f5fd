//! A platform's agent side for tests: the real gateway and listener, a store in memory, services and an engine that remember.

#![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]
#![allow(
    dead_code,
    reason = "each program that includes this file uses its own part"
)]

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::watch,
    task::JoinHandle,
    time::timeout,
};
use windlass::{
    api::agents::{self, AgentListenerSettings},
    gateway::{
        Directory, DirectoryError, Gateway, GatewayParts, GatewaySettings, KnownServer,
        RegisterError, Registered, Registration, ReportError, Reported, SessionNote, TaskReports,
        identity::PlatformIdentity, secrets::SecretVault,
    },
    ids::{new_uuid, random_bytes},
};
use windlass_domain::{
    Timestamp,
    id::{InstanceId, OrderId, ServerId},
    inbox::{InboxEntry, JournalEpoch},
    task::{Action, Outcome, Script, Task, TaskId, TaskResult},
};
use windlass_protocol::{ActivationCode, Epoch, Identity, OutputChunk, PublicKey};
use windlass_store::{
    Blobs, Key, Store, Txn,
    memory::{self, MemoryOptions},
};

use super::client::{PATIENCE, Who, dial, tls};

/// Server records in memory.
#[derive(Default)]
pub(crate) struct Records {
    pub(crate) servers: Mutex<HashMap<ServerId, (String, PublicKey)>>,
    pub(crate) codes: Mutex<HashMap<String, u32>>,
    pub(crate) notes: Mutex<Vec<String>>,
    pub(crate) restart_secrets: Mutex<BTreeSet<String>>,
}

#[async_trait]
impl Directory for Records {
    async fn register(
        &self,
        code: &ActivationCode,
        registration: Registration,
    ) -> Result<Registered, RegisterError> {
        let refused = |code, detail: &str| {
            let detail = detail.to_owned();
            RegisterError::Refused { code, detail }
        };
        let mut codes = self.codes.lock().unwrap();
        match codes.get_mut(&code.secret_hash().to_string()) {
            None => return Err(refused("activation_code_unknown", "unknown code")),
            Some(0) => return Err(refused("activation_code_used_up", "used up")),
            Some(left) => *left -= 1,
        }
        let server = ServerId::from_uuid(new_uuid());
        let name = registration.name.unwrap_or_default();
        let record = (name.clone(), registration.public_key);
        self.servers.lock().unwrap().insert(server, record);
        Ok(Registered { server, name })
    }

    async fn find(&self, server: ServerId) -> Result<Option<KnownServer>, DirectoryError> {
        let servers = self.servers.lock().unwrap();
        Ok(servers.get(&server).map(|(name, key)| KnownServer {
            name: name.clone(),
            workspace: "prod".into(),
            public_key: *key,
        }))
    }

    async fn note(&self, _server: ServerId, note: SessionNote) -> Result<(), DirectoryError> {
        let text = match note {
            SessionNote::Connected { .. } => "connected",
            SessionNote::Facts { .. } => "facts",
            SessionNote::Disconnected { .. } => "disconnected",
        };
        self.notes.lock().unwrap().push(text.to_owned());
        Ok(())
    }

    async fn secrets_of_installed(
        &self,
        _server: ServerId,
        _instance: InstanceId,
    ) -> Result<BTreeSet<String>, DirectoryError> {
        Ok(self.restart_secrets.lock().unwrap().clone())
    }
}

/// Takes reports like the engine: the result and the removal of the slot are one commit.
pub(crate) struct Reports {
    store: Arc<dyn Store>,
    pub(crate) committed: watch::Sender<Vec<(TaskId, TaskResult)>>,
    pub(crate) calls: AtomicU32,
    /// So many reports fail first.
    pub(crate) failing: AtomicU32,
}

#[async_trait]
impl TaskReports for Reports {
    async fn report(
        &self,
        server: ServerId,
        task: TaskId,
        result: TaskResult,
    ) -> Result<Reported, ReportError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let fails = |left: u32| left.checked_sub(1);
        if self
            .failing
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, fails)
            .is_ok()
        {
            return Err(ReportError("the engine is busy".into()));
        }
        let key = slot(server, task);
        let held = self.store.get(&key).await.unwrap();
        let current = held.filter(|entry| {
            let entry: InboxEntry = serde_json::from_slice(&entry.value).unwrap();
            entry.task.id == task
        });
        let Some(entry) = current else {
            return Ok(Reported::NotWanted);
        };
        let done = Txn::new()
            .revision_is(key.clone(), entry.revision)
            .delete(key);
        if self.store.commit(done).await.is_err() {
            return Err(ReportError("the slot changed".into()));
        }
        self.committed
            .send_modify(|all| all.push((task, result.clone())));
        Ok(Reported::Committed)
    }

    fn started(&self, _server: ServerId, _task: TaskId, _at: Timestamp) {}

    fn output(&self, _server: ServerId, _chunk: OutputChunk) {}
}

pub(crate) struct World {
    pub(crate) gateway: Gateway,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) blobs: Blobs,
    pub(crate) records: Arc<Records>,
    pub(crate) reports: Arc<Reports>,
    pub(crate) vault: SecretVault,
    pub(crate) at: SocketAddr,
    listener: JoinHandle<()>,
    /// Last: vanishes after what uses it.
    directory: tempfile::TempDir,
}

impl World {
    pub(crate) async fn start() -> Self {
        Self::with(GatewaySettings::default()).await
    }

    pub(crate) async fn with(settings: GatewaySettings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = memory::open(MemoryOptions::default()).unwrap();
        let blobs = Blobs::open_directory(directory.path().join("blobs"))
            .await
            .unwrap();
        let identity = PlatformIdentity::open(&directory.path().join("identity")).unwrap();
        let key = directory.path().join("secrets.key");
        let vault = SecretVault::open(store.clone(), &key).unwrap();
        let records = Arc::new(Records::default());
        let gateway = Gateway::new(GatewayParts {
            store: store.clone(),
            blobs: blobs.clone(),
            identity: Arc::new(identity),
            directory: records.clone(),
            secrets: Arc::new(vault.clone()),
            settings,
        });
        let reports = Arc::new(Reports {
            store: store.clone(),
            committed: watch::Sender::new(Vec::new()),
            calls: AtomicU32::new(0),
            failing: AtomicU32::new(0),
        });
        gateway.start(reports.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let serving = agents::serve(listener, gateway.clone(), AgentListenerSettings::default());
        let listener = tokio::spawn(serving);
        Self {
            gateway,
            store,
            blobs,
            records,
            reports,
            vault,
            at,
            listener,
            directory,
        }
    }

    /// Every test ends with it: nothing is left running.
    pub(crate) async fn stop(self) {
        timeout(PATIENCE, async {
            self.gateway.shutdown().await;
            self.listener.await.unwrap();
            self.store.close().await.unwrap();
        })
        .await
        .expect("the gateway did not stop");
        drop(self.directory);
    }

    /// A server that is registered.
    pub(crate) fn server(&self) -> Who {
        let identity = Identity::from_seed(random_bytes());
        let server = ServerId::from_uuid(new_uuid());
        let record = ("web-1".to_owned(), identity.public_key());
        self.records.servers.lock().unwrap().insert(server, record);
        Who {
            server,
            identity,
            epoch: Epoch::from_bytes(random_bytes()),
            fingerprint: self.gateway.identity().fingerprint(),
            platform_key: self.gateway.identity().signing().public_key(),
            protocol: windlass_protocol::PROTOCOL_VERSION,
        }
    }

    /// An activation code that may be used so often.
    pub(crate) fn code(&self, uses: u32) -> ActivationCode {
        let code = ActivationCode::new(random_bytes(), self.gateway.identity().fingerprint());
        let hash = code.secret_hash().to_string();
        self.records.codes.lock().unwrap().insert(hash, uses);
        code
    }

    /// Puts a slot as the engine does.
    pub(crate) async fn dispatch(&self, server: ServerId, task: Task, epoch: Option<JournalEpoch>) {
        self.put(server, InboxEntry::new(task, epoch)).await;
    }

    pub(crate) async fn put(&self, server: ServerId, entry: InboxEntry) {
        let key = slot(server, entry.task.id);
        let value = serde_json::to_vec(&entry).unwrap();
        self.store.commit(Txn::new().put(key, value)).await.unwrap();
    }

    pub(crate) async fn slot(&self, server: ServerId, task: TaskId) -> Option<InboxEntry> {
        let entry = self.store.get(&slot(server, task)).await.unwrap();
        entry.map(|entry| serde_json::from_slice(&entry.value).unwrap())
    }

    /// Waits until so many results are committed.
    pub(crate) async fn results(&self, count: usize) -> Vec<(TaskId, TaskResult)> {
        let mut committed = self.reports.committed.subscribe();
        let done = timeout(PATIENCE, committed.wait_for(|all| all.len() >= count)).await;
        let all = self.reports.committed.borrow().clone();
        assert!(
            done.is_ok(),
            "{count} results expected, these came: {all:?}"
        );
        all
    }

    /// One HTTP request over TLS: the whole answer as text.
    pub(crate) async fn http(&self, head: &str, body: &str) -> String {
        let tls = tls(self.gateway.identity().fingerprint());
        let mut stream = dial(self.at, &tls).await.unwrap();
        let length = body.len();
        let request = format!("{head}\r\nHost: windlass\r\nContent-Length: {length}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
        // The other side may close without a close_notify.
        drop(read.expect("no end of the answer"));
        String::from_utf8_lossy(&answer).into_owned()
    }
}

/// Tries until it holds; the failure shows what was last seen.
pub(crate) async fn until<T: std::fmt::Debug>(what: &str, mut look: impl FnMut() -> (bool, T)) {
    let waited = timeout(PATIENCE, async {
        while !look().0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    if waited.await.is_err() {
        panic!("{what}: {:?}", look().1);
    }
}

pub(crate) fn slot(server: ServerId, task: TaskId) -> Key {
    let (server, order) = (server.to_string(), task.order.to_string());
    Key::from_segments(["default", "inbox", &server, &order, "00000000000000000000"]).unwrap()
}

pub(crate) fn task() -> Task {
    Task {
        id: TaskId {
            order: OrderId::from_uuid(new_uuid()),
            node: 3,
            attempt: 1,
        },
        instance: Some(InstanceId::from_uuid(new_uuid())),
        release: None,
        fence: 1,
        expires_at: Timestamp::from_unix_ms(i64::MAX),
        timeout_ms: 1000,
        run_as: None,
        env: Default::default(),
        action: Action::Script(Script {
            interpreter: vec!["/bin/sh".into()],
            text: "true".into(),
            working_dir: None,
        }),
    }
}

pub(crate) fn result(outcome: Outcome) -> TaskResult {
    let started = matches!(outcome, Outcome::Succeeded | Outcome::Failed);
    TaskResult {
        outcome,
        exit_code: started.then_some(0),
        output: "done".into(),
        dropped_bytes: 0,
        message: String::new(),
        fault: None,
        started_at: started.then(|| Timestamp::from_unix_ms(1)),
        finished_at: Timestamp::from_unix_ms(2),
    }
}

pub(crate) fn journal(epoch: Epoch) -> JournalEpoch {
    JournalEpoch::from_bytes(*epoch.as_bytes())
}
