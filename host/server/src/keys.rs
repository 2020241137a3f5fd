//! The keys of the catalogue's rows: the one place that knows where a record stands.
//!
//! Every key starts with the tenant. A record stands under its id; names, hashes and memberships are index rows, written in
//! the same transaction, so that they are unique and a list is one scan. The engine's rows are in `engine::rows`.
//!
//! | key (below the tenant) | value |
//! | --- | --- |
//! | `workspace/{ws}` | `Workspace`, its cells inside |
//! | `app/{id}`, `app-name/{name}` | `Application`, its id |
//! | `package/{id}`, `package-of/{ws}/{id}`, `package-version/{ws}/{app}/{version}` | `Package`, empty, its id |
//! | `upload/{ws}/{id}` | `UploadRecord` |
//! | `instance/{id}`, `instance-of/{ws}/{id}`, `instance-name/{ws}/{name}` | `ServiceInstance`, empty, its id |
//! | `binding/{instance}/{server}` | `Binding`: a server bound to a service instance |
//! | `server/{id}`, `server-of/{ws}/{id}`, `server-name/{ws}/{name}`, `server-key/{hash}` | `Server`, empty, its id, its id |
//! | `activation/{id}`, `activation-of/{ws}/{id}`, `activation-hash/{hash}` | `ActivationCode`, empty, its id |
//! | `pool/{id}`, `pool-of/{ws}/{id}`, `pool-name/{ws}/{name}` | `Pool`, empty, its id |
//! | `load-balancer/{id}`, `load-balancer-of/{ws}/{id}`, `load-balancer-name/{ws}/{name}` | `LoadBalancer`, empty, its id |
//! | `load-balancer-gone/{server}/{id}` | empty: deleted, and the agent of its server does not know yet |
//! | `listener/{id}`, `listener-of/{load balancer}/{id}` | `Listener`, empty |
//! | `front-port/{server}/{port}` | the listener that has the port |
//! | `back-end/{pool}/{server}` | `BackEnd`: weight and address of a server behind a listener |
//! | `certificate/{id}`, `certificate-of/{ws}/{id}`, `certificate-name/{ws}/{name}` | `Certificate`, empty, its id |
//! | `certificate-key/{id}` | its private key, sealed |
//! | `token/{id}`, `token-name/{name}`, `token-hash/{hash}` | `Token`, its id, its id |
//! | `diagnosis/{id}`, `diagnosis-of/{ws}/{id}`, `diagnosis-active/{ws}/{id}` | `Diagnosis`, empty, empty: it runs |
//! | `invocation-count/{ws}` | `DailyCount`: invocations made today |
//! | `use/{kind}/{id}` | touched by every write that begins to refer to a record: a deletion compares it |
//! | `channel/{id}`, `channel-of/{ws}/{id}`, `channel-name/{ws}/{name}` | `Channel`, empty, its id |
//! | `delivery/{id}`, `delivery-of/{ws}/{id}` | `Delivery`, empty |
//! | `delivery-due/{id}` | when it is attempted next (rows of the notifier) |
//! | `idempotency/{token}/{hash of key}` | what was asked and answered |
//! | `plugin-decisions` | what operators decided about plugins |
//! | `plugin-shadow/{name}/{version}` | `Shadow`: a comparison of a version with the default |
//! | `plugin-event/{uuid}` | `PluginEvent` |
//! | `event/{milliseconds}/{random}` | `SystemEvent` |

use windlass_domain::{
    Digest, Timestamp,
    id::{
        AppId, CertificateId, DeliveryId, DiagnosisId, InstanceId, LoadBalancerId, PoolId,
        ServerId, TokenId,
    },
};
use windlass_store::{Key, Prefix, sortable};

/// The tenant of every row until there are several.
const TENANT: &str = "default";

fn key<const N: usize>(segments: [&str; N]) -> Key {
    Key::from_segments(std::iter::once(TENANT).chain(segments))
        .expect("names and ids are short, not empty, and hold no separator")
}

/// A kind of record that stands under its own id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Workspace,
    App,
    Package,
    Instance,
    Server,
    Activation,
    Pool,
    LoadBalancer,
    Listener,
    Certificate,
    Token,
    Channel,
    Delivery,
    Diagnosis,
    Template,
}

impl Kind {
    /// First segment of its keys.
    const fn segment(self) -> &'static str {
        match self {
            Self::Workspace => "workspace",
            Self::App => "app",
            Self::Package => "package",
            Self::Instance => "instance",
            Self::Server => "server",
            Self::Activation => "activation",
            Self::Pool => "pool",
            Self::LoadBalancer => "load-balancer",
            Self::Listener => "listener",
            Self::Certificate => "certificate",
            Self::Token => "token",
            Self::Channel => "channel",
            Self::Delivery => "delivery",
            Self::Diagnosis => "diagnosis",
            Self::Template => "process-template",
        }
    }

    /// For people.
    pub(crate) const fn what(self) -> &'static str {
        match self {
            Self::Workspace => "workspace",
            Self::App => "application",
            Self::Package => "package",
            Self::Instance => "service instance",
            Self::Server => "server",
            Self::Activation => "activation code",
            Self::Pool => "pool",
            Self::LoadBalancer => "load balancer",
            Self::Listener => "listener",
            Self::Certificate => "certificate",
            Self::Token => "token",
            Self::Channel => "notification channel",
            Self::Delivery => "delivery",
            Self::Diagnosis => "diagnosis",
            Self::Template => "process template",
        }
    }
}

/// The record itself.
pub(crate) fn record(kind: Kind, id: &str) -> Key {
    key([kind.segment(), id])
}

/// All records of a kind.
pub(crate) fn records(kind: Kind) -> Prefix {
    key([kind.segment()]).below()
}

/// That a record belongs to a workspace.
pub(crate) fn of_workspace(kind: Kind, ws: &str, id: &str) -> Key {
    key([&format!("{}-of", kind.segment()), ws, id])
}

/// The records of a workspace.
pub(crate) fn all_of_workspace(kind: Kind, ws: &str) -> Prefix {
    key([&format!("{}-of", kind.segment()), ws]).below()
}

/// A name that is unique in its workspace.
pub(crate) fn name_in_workspace(kind: Kind, ws: &str, name: &str) -> Key {
    key([&format!("{}-name", kind.segment()), ws, name])
}

/// A name that is unique in the tenant.
pub(crate) fn name_in_tenant(kind: Kind, name: &str) -> Key {
    key([&format!("{}-name", kind.segment()), name])
}

/// A record by the hash of a secret or key.
pub(crate) fn by_hash(kind: Kind, hash: Digest) -> Key {
    key([&format!("{}-hash", kind.segment()), &hash.to_string()])
}

/// Touched by whatever begins to refer to a record; a deletion that found nobody compares it.
pub(crate) fn in_use(kind: Kind, id: &str) -> Key {
    key(["use", kind.segment(), id])
}

/// A version of an application's packages in a workspace.
pub(crate) fn package_version(ws: &str, app: AppId, version: &str) -> Key {
    key(["package-version", ws, &app.to_string(), version])
}

/// Names the list of what applications have of packages, which is made from the records of applications; it has no rows.
pub(crate) fn package_overview(ws: &str) -> Prefix {
    key(["package-overview", ws]).below()
}

/// The versions of an application's packages in a workspace.
pub(crate) fn package_versions(ws: &str, app: AppId) -> Prefix {
    key(["package-version", ws, &app.to_string()]).below()
}

/// An upload record.
pub(crate) fn upload(ws: &str, id: &str) -> Key {
    key(["upload", ws, id])
}

/// The upload records of a workspace.
pub(crate) fn uploads(ws: &str) -> Prefix {
    key(["upload", ws]).below()
}

/// The upload records of all workspaces.
pub(crate) fn all_uploads() -> Prefix {
    key(["upload"]).below()
}

/// That a server is bound to a service instance.
pub(crate) fn binding(instance: InstanceId, server: ServerId) -> Key {
    key(["binding", &instance.to_string(), &server.to_string()])
}

/// The servers bound to a service instance.
pub(crate) fn bindings(instance: InstanceId) -> Prefix {
    key(["binding", &instance.to_string()]).below()
}

/// A server behind a pool.
pub(crate) fn back_end(pool: PoolId, server: ServerId) -> Key {
    key(["back-end", &pool.to_string(), &server.to_string()])
}

/// What is kept of the servers behind a pool.
pub(crate) fn back_ends(pool: PoolId) -> Prefix {
    key(["back-end", &pool.to_string()]).below()
}

/// Which listener has a front port of a server.
pub(crate) fn front_port(server: ServerId, port: u16) -> Key {
    key(["front-port", &server.to_string(), &port.to_string()])
}

/// A load balancer that was deleted before its agent was told.
pub(crate) fn balancer_gone(server: ServerId, id: LoadBalancerId) -> Key {
    key(["load-balancer-gone", &server.to_string(), &id.to_string()])
}

/// All of them.
pub(crate) fn balancers_gone() -> Prefix {
    key(["load-balancer-gone"]).below()
}

/// The private key of a certificate (sealed by the gateway's vault).
pub(crate) fn certificate_key(id: CertificateId) -> Key {
    key(["certificate-key", &id.to_string()])
}

/// The answer that a caller was given for an idempotency key.
pub(crate) fn idempotency(token: TokenId, idempotency_key: &str) -> Key {
    let hash = Digest::of(idempotency_key.as_bytes()).to_string();
    key(["idempotency", &token.to_string(), &hash])
}

/// All answers.
pub(crate) fn all_idempotency() -> Prefix {
    key(["idempotency"]).below()
}

/// That a delivery is to be attempted.
pub(crate) fn delivery_due(id: DeliveryId) -> Key {
    key(["delivery-due", &id.to_string()])
}

/// All deliveries that are to be attempted.
pub(crate) fn deliveries_due() -> Prefix {
    key(["delivery-due"]).below()
}

/// Moments of orders that are to be told (rows of the engine).
pub(crate) fn notices() -> Prefix {
    key(["notice"]).below()
}

/// The workspace of a notice: `notice/{workspace}/{order}/{seq}`.
pub(crate) fn notice_workspace(key: &Key) -> Option<&str> {
    key.segments().rev().nth(2)
}

/// What operators decided about plugins.
pub(crate) fn plugin_decisions() -> Key {
    key(["plugin-decisions"])
}

/// The comparison of a version with the default.
pub(crate) fn plugin_shadow(name: &str, version: &str) -> Key {
    key(["plugin-shadow", name, version])
}

/// The comparisons of a plugin, or of all.
pub(crate) fn plugin_shadows(name: Option<&str>) -> Prefix {
    match name {
        Some(name) => key(["plugin-shadow", name]).below(),
        None => key(["plugin-shadow"]).below(),
    }
}

/// One event of the plugins' history.
pub(crate) fn plugin_event(id: &str) -> Key {
    key(["plugin-event", id])
}

/// The plugins' history, oldest first.
pub(crate) fn plugin_events() -> Prefix {
    key(["plugin-event"]).below()
}

/// A system event.
pub(crate) fn event(at: Timestamp, id: &str) -> Key {
    let at = sortable(u64::try_from(at.unix_ms()).unwrap_or(0));
    key(["event", &at, id])
}

/// The system events, oldest first.
pub(crate) fn events() -> Prefix {
    key(["event"]).below()
}

/// That a diagnosis runs.
pub(crate) fn active_diagnosis(ws: &str, id: DiagnosisId) -> Key {
    key(["diagnosis-active", ws, &id.to_string()])
}

/// The diagnoses of a workspace that run.
pub(crate) fn active_diagnoses_of(ws: &str) -> Prefix {
    key(["diagnosis-active", ws]).below()
}

/// All diagnoses that run.
pub(crate) fn active_diagnoses() -> Prefix {
    key(["diagnosis-active"]).below()
}

/// How many invocations a workspace has made today.
pub(crate) fn invocation_count(ws: &str) -> Key {
    key(["invocation-count", ws])
}

/// The secrets of a workspace (rows of the gateway's vault).
pub(crate) fn secrets(ws: &str) -> Prefix {
    key(["secret", ws]).below()
}

/// The tasks of a server (rows of the engine).
pub(crate) fn inbox(server: ServerId) -> Prefix {
    key(["inbox", &server.to_string()]).below()
}

/// All headers of orders (rows of the engine).
pub(crate) fn orders() -> Prefix {
    key(["order"]).below()
}

/// What is installed, of all instances (rows of the engine): each is a `Manifest`.
pub(crate) fn all_installed() -> [Prefix; 2] {
    [
        key(["installed"]).below(),
        key(["installed-before"]).below(),
    ]
}

/// What is installed of one service instance (rows of the engine).
pub(crate) fn installed_of(instance: InstanceId) -> [Prefix; 2] {
    let instance = instance.to_string();
    [
        key(["installed", &instance]).below(),
        key(["installed-before", &instance]).below(),
    ]
}

/// The last segment of a key: an id, mostly.
pub(crate) fn last_segment(key: &Key) -> &str {
    key.segments().next_back().unwrap_or_default()
}

/// A server by the hash of its agent's public key.
pub(crate) fn server_key(hash: Digest) -> Key {
    key(["server-key", &hash.to_string()])
}

/// The orders of a workspace (rows of the engine).
pub(crate) fn orders_of(ws: &str) -> Prefix {
    key(["order-of", ws]).below()
}

/// The invocations of a workspace (rows of the engine).
pub(crate) fn invocations_of(ws: &str) -> Prefix {
    key(["invocation-of", ws]).below()
}

/// The index by hash of a kind.
pub(crate) fn hashes(kind: Kind) -> Prefix {
    key([&format!("{}-hash", kind.segment())]).below()
}
