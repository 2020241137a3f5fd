//! The platform: everything of one server, wired together, started and ended in order.
//!
//! ```text
//! start:    directory ─► ports ─► store, plugins (side by side) ─► services ─► engine ─► gateway ─► API ─► ready
//! shutdown: not ready ─► API and streams ─► diagnoses ─► gateway ─► engine ─► keepers, control ─► plugins ─► store
//! ```
//! Every task has its owner here and is awaited at shutdown. Owns the layout of the data directory:
//!
//! | in `<data>` | what |
//! | --- | --- |
//! | `store/` | rows; its `LOCK` says that a server runs here |
//! | `blobs/` | packages, plans |
//! | `plugins-state/` | kept bytes and compiled code of plugins |
//! | `plugin-calls/` | the journal of calls of plugins: not part of a backup |
//! | `platform.key`, `agent-tls.key`, `secrets.key` | the platform's keys, 0600 |
//! | `admin.token` | the first administrator's token, 0600 |
//! | `control.sock` | asked by `windlass backup` while the server runs |

mod control;
mod tls;

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use windlass_domain::manifest::PluginRef;
use windlass_protocol::Fingerprint;
use windlass_runtime::{
    CallRecord, Failing, Figures as CallFigures, OpenError, PluginFigures, PluginStatus, Plugins,
    PluginsConfig, Sinks, Trust, TrustError,
    journal::{Journal, JournalError, JournalSettings},
};
use windlass_store::{
    BlobError, Blobs, Store, StoreError,
    backup::{BLOBS_DIRECTORY, STORE_DIRECTORY},
    sled::{self, SledOptions},
};

use crate::{
    api::{self, ApiParts, Gauge, Gauges, agents::AgentListenerSettings},
    clock,
    config::ServerConfig,
    engine::{Agents, Engine, EngineParts, rows, rows::RowError, traffic::SimulatedPools},
    gateway::{
        Gateway, GatewayParts, GatewaySettings,
        identity::{IdentityError, PlatformIdentity},
        secrets::{SecretError, SecretVault},
    },
    ids,
    notify::{Notifier, NotifierParts, destination::Destinations, request::Requests},
    service::{
        ServiceError,
        activation_codes::ActivationCodes,
        apps::Apps,
        certificates::Certificates,
        diagnoses::{Diagnoses, DiagnosesParts},
        events::SystemEvents,
        idempotency::Idempotency,
        instances::Instances,
        invocations::{Invocations, InvocationsParts},
        load_balancers::{LoadBalancerParts, LoadBalancers, pools::AllPools},
        looks::Sights,
        notifications::Notifications,
        orders::Orders,
        packages::Packages,
        planning::{Planner, PlannerParts},
        plugin_calls::PluginCalls,
        plugin_events::PluginEvents,
        plugins::PluginService,
        pools::Pools,
        retention::{Retention, RetentionSettings},
        servers::Servers,
        shadows::{ShadowQueue, Shadows},
        templates::Templates,
        tokens::{ADMIN_TOKEN_FILE, AdminTokenError, Tokens},
        workspaces::Workspaces,
    },
};
pub use control::{BackupFailure, back_up};
pub use tls::TlsError;

/// How long keepers wait before they try again after the store failed.
const RETRY: Duration = Duration::from_secs(1);
/// How often old idempotency records are deleted.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory cannot be used.
    #[error("the data directory `{}` cannot be used: check that it is a directory that this user may write", path.display())]
    Data {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// An address cannot be listened on.
    #[error(
        "cannot listen on {address} for {whom}: choose another address with `{option}`, or end what uses it"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// `the API` or `agents`.
        whom: &'static str,
        /// The option that names it.
        option: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The API's certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The store; also when another server runs on the directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The blobs.
    #[error("the blobs cannot be opened")]
    Blobs(#[from] BlobError),
    /// The platform's keys.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The key of the secrets.
    #[error(transparent)]
    Secrets(#[from] SecretError),
    /// The plugins.
    #[error(transparent)]
    Plugins(#[from] OpenError),
    /// Which plugins are trusted.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The call journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// This program's own path is not known.
    #[error("this program cannot find its own file, which compiles plugins")]
    OwnPath(#[source] io::Error),
    /// The first token.
    #[error(transparent)]
    AdminToken(#[from] AdminTokenError),
    /// Something that services read at start.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// Unfinished orders.
    #[error("the engine cannot take up its orders")]
    Engine(#[from] RowError),
    /// The control socket.
    #[error("the control socket in `{}` cannot be made", path.display())]
    Control {
        /// The data directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A running server.
pub struct Running {
    /// Where the API is, for example `http://127.0.0.1:7460`.
    pub api_url: String,
    /// Where agents connect: `host:port`.
    pub agent_url: String,
    /// The file that holds the first administrator's token.
    pub admin_token_file: PathBuf,
    /// The fingerprint of the platform's TLS key: what activation codes carry.
    pub fingerprint: Fingerprint,
    /// Drives orders.
    pub engine: Engine,
    /// Holds agents' sessions.
    pub gateway: Gateway,
    /// Holds everything.
    pub store: Arc<dyn Store>,
    diagnoses: Diagnoses,
    plugins: Arc<Plugins>,
    journal: Arc<Journal>,
    ready: watch::Receiver<bool>,
    stop: CancellationToken,
    api: JoinHandle<()>,
    agents: JoinHandle<()>,
    streams: TaskTracker,
    keepers: TaskTracker,
    keepers_stop: CancellationToken,
}

impl Running {
    /// Waits until `/readyz` says so.
    pub async fn ready(&self) {
        let mut ready = self.ready.clone();
        // An error means that the server ends: nobody waits for it any more.
        drop(ready.wait_for(|ready| *ready).await);
    }

    /// Ends everything in order and waits for it. Orders stay as they are and are taken up at the next start.
    ///
    /// # Errors
    /// When the store cannot be closed; what was committed is durable all the same.
    pub async fn shutdown(self) -> Result<(), StoreError> {
        self.stop.cancel();
        joined("API", self.api).await;
        self.streams.close();
        self.streams.wait().await;
        self.diagnoses.shutdown().await;
        self.gateway.shutdown().await;
        joined("agents' listener", self.agents).await;
        self.engine.shutdown().await;
        self.keepers_stop.cancel();
        self.keepers.close();
        self.keepers.wait().await;
        self.plugins.close().await;
        self.journal.close().await;
        self.store.close().await
    }
}

async fn joined(what: &'static str, task: JoinHandle<()>) {
    if let Err(error) = task.await {
        tracing::error!(%error, what, "a task ended badly");
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// Starts a server. It answers when this returns; it is ready a little later, when plugins that are not in the cache are
/// compiled.
///
/// # Errors
/// [`StartError`]; nothing is left running.
pub async fn start(config: ServerConfig) -> Result<Running, StartError> {
    start_with(config, |gateway| Arc::new(gateway.clone())).await
}

/// Likewise, with sessions that are not the gateway's: how a fleet is simulated that is larger than a machine can hold.
///
/// # Errors
/// As [`start`].
pub async fn start_with(
    config: ServerConfig,
    sessions: impl FnOnce(&Gateway) -> Arc<dyn Agents>,
) -> Result<Running, StartError> {
    let data = open_data(&config.data)?;
    let api_listener = listen(config.listen, "the API", "--listen").await?;
    let agent_listener = listen(config.agent_listen, "agents", "--agent-listen").await?;
    let api_address = local(&api_listener, config.listen);
    let agent_address = config
        .agent_advertise
        .clone()
        .unwrap_or_else(|| local(&agent_listener, config.agent_listen).to_string());

    let mut plugins_config = PluginsConfig::new(config.plugins.clone(), data.join("plugins-state"))
        .map_err(StartError::OwnPath)?;
    if let Some(command) = &config.compile_command {
        plugins_config.compile_command.clone_from(command);
    }
    // The store first: its lock says that this directory is ours.
    let store = sled::open(data.join(STORE_DIRECTORY), SledOptions::default()).await?;
    let opened = open_parts(&config, &data, &store, plugins_config).await;
    let opened = match opened {
        Ok(opened) => opened,
        Err(error) => return Err(close_after(&store, error).await),
    };
    let Opened {
        blobs,
        plugins,
        calls,
        identity,
        secrets,
        tls,
    } = opened;
    let plugins = Arc::new(plugins);
    let fingerprint = identity.fingerprint();

    let workspaces = Workspaces::new(store.clone());
    let apps = Apps::new(store.clone(), plugins.clone());
    let packages = Packages::new(store.clone(), blobs.clone())
        .with_disk_reserve(config.upload_disk_reserve_percent);
    let instances = Instances::new(store.clone(), plugins.clone());
    let servers = Servers::new(store.clone());
    let tokens = Tokens::new(store.clone());
    let idempotency = Idempotency::new(store.clone());
    let Calls {
        journal,
        figures,
        failing,
        shadow_queue,
        shadowed,
    } = calls;
    let plugin_service = PluginService::new(
        store.clone(),
        blobs.clone(),
        plugins.clone(),
        figures.clone(),
    );
    let shadows = Shadows::new(
        store.clone(),
        plugins.clone(),
        plugin_service.clone(),
        shadow_queue,
    );
    let gateway = Gateway::new(GatewayParts {
        store: store.clone(),
        blobs: blobs.clone(),
        identity: Arc::new(identity),
        directory: Arc::new(servers.clone()),
        secrets: Arc::new(secrets.clone()),
        settings: GatewaySettings::default(),
    });
    let sessions = sessions(&gateway);
    let traffic = Arc::new(SimulatedPools::new(store.clone()));
    let certificates = Certificates::new(store.clone(), secrets.clone());
    let load_balancers = LoadBalancers::new(LoadBalancerParts {
        store: store.clone(),
        secrets: secrets.clone(),
        gateway: gateway.clone(),
        front_ports: config.front_ports.clone(),
    });
    let templates = Templates::new(store.clone());
    let pools = Arc::new(AllPools::new(traffic.clone(), load_balancers.clone()));
    let planner = Planner::new(PlannerParts {
        store: store.clone(),
        blobs: blobs.clone(),
        plugins: plugins.clone(),
        agents: sessions.clone(),
        workspaces: workspaces.clone(),
        apps: apps.clone(),
        packages: packages.clone(),
        instances: instances.clone(),
        servers: servers.clone(),
        templates: templates.clone(),
        pools: pools.clone(),
    });
    let engine = Engine::new(EngineParts {
        store: store.clone(),
        blobs: blobs.clone(),
        agents: sessions,
        planning: Arc::new(planner.clone()),
        pools,
        agent_lost_after: config.agent_lost_after,
    });
    let orders = Orders::new(engine.clone(), planner);
    let diagnoses = Diagnoses::new(DiagnosesParts {
        store: store.clone(),
        blobs: blobs.clone(),
        plugins: plugins.clone(),
        sights: Sights {
            inquiry: Arc::new(gateway.clone()),
            workspaces: workspaces.clone(),
            apps: apps.clone(),
            packages: packages.clone(),
            instances: instances.clone(),
            servers: servers.clone(),
            orders: orders.clone(),
        },
    });
    let invocations = Invocations::new(InvocationsParts {
        engine: engine.clone(),
        orders: orders.clone(),
        plugins: plugins.clone(),
        servers: servers.clone(),
        per_day: config.invocations_per_day,
    });
    let control = control::Control {
        store: store.clone(),
        blobs: blobs.clone(),
        data: data.clone(),
    };
    let prepared = async {
        tokens.ensure_admin(&data).await?;
        shadows.load().await?;
        let socket = control.listen().map_err(|source| StartError::Control {
            path: data.clone(),
            source,
        })?;
        diagnoses.recover().await?;
        engine.start().await?;
        Ok(socket)
    };
    let socket = match prepared.await {
        Ok(socket) => socket,
        Err(error) => {
            engine.shutdown().await;
            plugins.close().await;
            journal.close().await;
            return Err(close_after(&store, error).await);
        }
    };
    gateway.start(Arc::new(engine.clone()));

    let stop = CancellationToken::new();
    let keepers_stop = CancellationToken::new();
    let keepers = TaskTracker::new();
    keepers.spawn(control.serve(socket, keepers_stop.clone()));
    keepers.spawn(keep_tokens(tokens.clone(), keepers_stop.clone()));
    keepers.spawn(keep_answers(idempotency.clone(), keepers_stop.clone()));
    let retention = Retention::new(store.clone(), blobs.clone(), RetentionSettings::default());
    let notifier = Notifier::new(NotifierParts {
        store: store.clone(),
        secrets: Arc::new(secrets.clone()),
        requests: Requests::new(Destinations::new(
            config.notification_deny.clone(),
            config.notification_allow.clone(),
        )),
    });
    keepers.spawn(notifier.run(keepers_stop.clone()));
    let stop_retention = keepers_stop.clone();
    keepers.spawn(async move { retention.run(stop_retention).await });
    keepers.spawn(follow_decisions(
        plugin_service.clone(),
        keepers_stop.clone(),
    ));
    let (marking, stop_marking) = (plugin_service.clone(), keepers_stop.clone());
    keepers.spawn(async move { marking.mark_failing(failing, stop_marking).await });
    let (comparing, stop_comparing) = (shadows.clone(), keepers_stop.clone());
    keepers.spawn(async move { comparing.run(shadowed, stop_comparing).await });
    keepers.spawn(load_balancers.clone().run(keepers_stop.clone()));
    keepers.spawn(certificates.clone().watch_ends(keepers_stop.clone()));
    let (set_ready, ready) = watch::channel(false);
    let shipped = config.shipped_plugins.clone();
    keepers.spawn(first_pass(
        plugins.clone(),
        plugin_service.clone(),
        shipped,
        set_ready,
        keepers_stop.clone(),
    ));

    let streams = TaskTracker::new();
    let scheme = if tls.is_some() { "https" } else { "http" };
    let gauges = Arc::new(Figures {
        store: store.clone(),
        gateway: gateway.clone(),
        plugins: plugins.clone(),
        calls: figures,
        journal: journal.clone(),
    });
    let router = api::build(
        ApiParts {
            workspaces,
            apps,
            packages,
            instances,
            servers,
            activation_codes: ActivationCodes::new(store.clone(), fingerprint),
            tokens,
            notifications: Notifications::new(store.clone()),
            pools: Pools::new(store.clone()),
            load_balancers,
            certificates,
            plugins: plugin_service,
            plugin_calls: PluginCalls::new(journal.clone(), plugins.clone()),
            plugin_events: PluginEvents::new(store.clone()),
            events: SystemEvents::new(store.clone()),
            shadows,
            orders,
            templates,
            diagnoses: diagnoses.clone(),
            invocations,
            gateway: gateway.clone(),
            secrets,
            traffic,
            idempotency,
            gauges,
            ready: ready.clone(),
            agent_address: agent_address.clone(),
            stop: stop.clone(),
        },
        streams.clone(),
    );
    let api = tokio::spawn(api::listener::serve(
        api_listener,
        router,
        tls,
        stop.clone(),
    ));
    let agents = tokio::spawn(api::agents::serve(
        agent_listener,
        gateway.clone(),
        AgentListenerSettings::default(),
    ));
    Ok(Running {
        api_url: format!("{scheme}://{api_address}"),
        agent_url: agent_address,
        admin_token_file: data.join(ADMIN_TOKEN_FILE),
        fingerprint,
        engine,
        gateway,
        diagnoses,
        store,
        plugins,
        journal,
        ready,
        stop,
        api,
        agents,
        streams,
        keepers,
        keepers_stop,
    })
}

/// Makes the data directory, or checks that it can be written. Gives its absolute path.
fn open_data(data: &Path) -> Result<PathBuf, StartError> {
    let failed = |source| StartError::Data {
        path: data.to_owned(),
        source,
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(data)
        .map_err(failed)?;
    let data = data.canonicalize().map_err(failed)?;
    let probe = data.join(format!(".probe-{}", std::process::id()));
    fs::write(&probe, b"")
        .and_then(|()| fs::remove_file(&probe))
        .map_err(failed)?;
    let mode = fs::metadata(&data).map_err(failed)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        tracing::warn!(data = %data.display(), mode = format!("{mode:o}"), "others may look into the data directory; `chmod 700` it");
    }
    Ok(data)
}

async fn listen(
    address: SocketAddr,
    whom: &'static str,
    option: &'static str,
) -> Result<TcpListener, StartError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| StartError::Listen {
            address,
            whom,
            option,
            source,
        })
}

fn local(listener: &TcpListener, wanted: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(wanted)
}

async fn close_after(store: &Arc<dyn Store>, error: StartError) -> StartError {
    if let Err(error) = store.close().await {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "the store was not closed well"
        );
    }
    error
}

/// Where calls of plugins are told.
struct Calls {
    journal: Arc<Journal>,
    figures: Arc<CallFigures>,
    failing: mpsc::Receiver<Failing>,
    shadow_queue: Arc<ShadowQueue>,
    shadowed: mpsc::Receiver<Arc<CallRecord>>,
}

struct Opened {
    blobs: Blobs,
    plugins: Plugins,
    calls: Calls,
    identity: PlatformIdentity,
    secrets: SecretVault,
    tls: Option<Arc<rustls::ServerConfig>>,
}

async fn open_parts(
    config: &ServerConfig,
    data: &Path,
    store: &Arc<dyn Store>,
    mut plugins: PluginsConfig,
) -> Result<Opened, StartError> {
    let identity = PlatformIdentity::open(data)?;
    let secrets = SecretVault::open(store.clone(), &data.join("secrets.key"))?;
    let tls = tls::of(&config.tls, config.listen, &identity)?;
    let blobs = Blobs::open_directory(data.join(BLOBS_DIRECTORY)).await?;
    plugins.decisions = PluginService::load_decisions(&**store).await?;
    plugins.trust = Trust::read(
        config.trust.keys.as_deref(),
        config.trust.require_signature,
        config.trust.allow_list.as_deref(),
    )?;
    let journal = Arc::new(Journal::open(JournalSettings {
        max_age: config.journal.max_age,
        max_bytes: config.journal.max_bytes,
        ..JournalSettings::new(data.join("plugin-calls"), clock::now, ids::new_uuid)
    })?);
    let (figures, failing) = CallFigures::new(clock::now);
    let (shadow_queue, shadowed) = ShadowQueue::new();
    plugins.sink = Some(Arc::new(Sinks(vec![
        figures.clone(),
        journal.clone(),
        shadow_queue.clone(),
    ])));
    let plugins = Plugins::open(plugins).await?;
    let calls = Calls {
        journal,
        figures,
        failing,
        shadow_queue,
        shadowed,
    };
    Ok(Opened {
        blobs,
        plugins,
        calls,
        identity,
        secrets,
        tls,
    })
}

/// Says when every plugin that was in the directory at the start is active or rejected, and those that ship are approved.
async fn first_pass(
    plugins: Arc<Plugins>,
    service: PluginService,
    shipped: Option<PathBuf>,
    ready: watch::Sender<bool>,
    stop: CancellationToken,
) {
    let approve = async {
        plugins.settled().await;
        if let Some(shipped) = shipped {
            match PluginService::shipped_in(&shipped).await {
                Ok(shipped) => match service.approve_built_ins(&shipped).await {
                    Ok(approved) => {
                        tracing::debug!(approved, "plugins of the platform were approved")
                    }
                    Err(error) => tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "the platform's own plugins were not approved: approve them over the API"
                    ),
                },
                Err(error) => {
                    tracing::error!(%error, "the platform's own plugins cannot be read: approve them over the API")
                }
            }
        }
    };
    tokio::select! {
        () = approve => {
            ready.send_replace(true);
            tracing::info!("ready");
        }
        () = stop.cancelled() => {}
    }
}

/// Follows what other servers decide about plugins, again after the store failed.
async fn follow_decisions(service: PluginService, stop: CancellationToken) {
    while !stop.is_cancelled() {
        if let Err(error) = service.follow(stop.clone()).await {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "decisions about plugins are not followed until the store answers"
            );
        }
        pause(RETRY, &stop).await;
    }
}

/// Deletes answers that were kept with idempotency keys long enough.
async fn keep_answers(idempotency: Idempotency, stop: CancellationToken) {
    while !stop.is_cancelled() {
        if let Err(error) = idempotency.prune().await {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "old idempotency records were not deleted"
            );
        }
        pause(PRUNE_EVERY, &stop).await;
    }
}

async fn pause(duration: Duration, stop: &CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = tokio::time::sleep(duration) => {}
    }
}

/// Keeps the token cache true, again after the store failed.
async fn keep_tokens(tokens: Tokens, stop: CancellationToken) {
    while !stop.is_cancelled() {
        if let Err(error) = tokens.keep_cache(stop.clone()).await {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "revoked tokens are not noticed until the store answers"
            );
        }
        pause(RETRY, &stop).await;
    }
}

/// Figures for `/metrics`.
struct Figures {
    store: Arc<dyn Store>,
    gateway: Gateway,
    plugins: Arc<Plugins>,
    calls: Arc<CallFigures>,
    journal: Arc<Journal>,
}

#[async_trait]
impl Gauges for Figures {
    async fn read(&self) -> Vec<Gauge> {
        let mut gauges = Vec::new();
        let mut add = |name, help, value| {
            gauges.push(Gauge {
                name,
                help,
                labels: Vec::new(),
                value,
            });
        };
        add(
            "agent_sessions",
            "Agents that are connected.",
            self.gateway.sessions().len() as u64,
        );
        let plugins = self.plugins.list();
        let active = plugins
            .iter()
            .filter(|plugin| plugin.state == windlass_runtime::PluginState::Active)
            .count();
        add(
            "plugins",
            "Plugins and files that would be some.",
            plugins.len() as u64,
        );
        add(
            "plugins_active",
            "Plugins that can be called.",
            active as u64,
        );
        if let Ok(revision) = self.store.revision().await {
            add(
                "store_revision",
                "The store's revision: rises with every commit.",
                revision.0,
            );
        }
        if let Ok(active) = rows::read_all(&*self.store, &rows::all_active()).await {
            add(
                "orders_unfinished",
                "Orders that have not ended.",
                active.len() as u64,
            );
        }
        self.add_plugins(&plugins, &mut gauges);
        gauges
    }
}

impl Figures {
    fn add_plugins(&self, plugins: &[PluginStatus], gauges: &mut Vec<Gauge>) {
        let journal = self.journal.state();
        for (name, help, value) in [
            (
                "plugin_journal_written_total",
                "Calls of plugins that were recorded.",
                journal.written,
            ),
            (
                "plugin_journal_dropped_total",
                "Calls of plugins that were not recorded: the queue was full, or the disk refused them.",
                journal.dropped,
            ),
            (
                "plugin_journal_bytes",
                "Size of the recorded calls.",
                journal.bytes,
            ),
            (
                "plugins_failing",
                "Versions that failed again and again and wait for an operator.",
                plugins
                    .iter()
                    .filter(|plugin| plugin.failing.is_some())
                    .count() as u64,
            ),
        ] {
            gauges.push(Gauge {
                name,
                help,
                labels: Vec::new(),
                value,
            });
        }
        let calls = self.calls.all();
        let of = |plugin: &PluginRef| {
            vec![
                ("plugin", plugin.name.clone()),
                ("version", plugin.version.to_string()),
                ("digest", plugin.digest.short()),
            ]
        };
        type Read = fn(&PluginFigures) -> u64;
        let simple: [(&'static str, &'static str, Read); 5] = [
            ("plugin_calls_total", "Finished calls.", |figures| {
                figures.calls
            }),
            (
                "plugin_call_p50_us",
                "Half of the calls took less time, in microseconds.",
                |figures| figures.p50_us,
            ),
            (
                "plugin_call_p99_us",
                "99 of 100 calls took less time, in microseconds.",
                |figures| figures.p99_us,
            ),
            (
                "plugin_guest_time_us_total",
                "Time that calls computed, in microseconds.",
                |figures| figures.guest_time_us,
            ),
            (
                "plugin_peak_memory_bytes",
                "Largest peak of memory of a call.",
                |figures| figures.peak_memory_bytes,
            ),
        ];
        for (name, help, read) in simple {
            gauges.extend(calls.iter().map(|(plugin, figures)| Gauge {
                name,
                help,
                labels: of(plugin),
                value: read(figures),
            }));
        }
        for (plugin, figures) in &calls {
            gauges.extend(figures.failures.iter().map(|(code, count)| {
                let mut labels = of(plugin);
                labels.push(("code", code.clone()));
                Gauge {
                    name: "plugin_failures_total",
                    help: "Failed calls, by the code of the failure.",
                    labels,
                    value: *count,
                }
            }));
        }
    }
}
