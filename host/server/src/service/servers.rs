//! Servers: registration with a code, their records, what the gateway needs of them. Source: spec "Servers",
//! "Managed servers".
//!
//! Binding a server to a service instance is [`super::instances`]'. An order holds a server by the engine's row
//! `lock/{server}`: while it is there, the server's cell, binding and record stay.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use windlass_domain::{
    Digest,
    activation::{ActivationCode, CodeRefusal},
    id::{InstanceId, ServerId},
    instance::ServiceInstance,
    load_balancer::LoadBalancer,
    manifest::Manifest,
    name::{CellName, ServerName, TagKey},
    server::{ConnectionState, MachineFacts, MachineState, ReleaseState, Server},
    text::one_line,
    value::Value,
    workspace::Workspace,
};
use windlass_protocol::{PublicKey, ServerFacts};
use windlass_store::{Revision, Store, Txn, retention};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    records::{self, Committed, Sort},
};
use crate::{
    clock,
    engine::rows::{self as engine_rows, ServerLock},
    gateway::{
        Directory, DirectoryError, KnownServer, RegisterError, Registered, Registration,
        SessionNote,
    },
    ids,
    keys::{self, Kind},
};

/// Tries of a write that only agents cause: of those that meet, one gets through in each round.
const TRIES: u32 = 100;
/// Servers of one name prefix that are looked at for a free number.
const MAX_NUMBER: u32 = 100_000;
/// Longest text that an agent reports of its machine; what is longer is cut.
const MAX_FACT_CHARS: usize = 200;
/// Users of an agent's allow-list that are kept. An OS user's name has at most 32 characters.
const MAX_ALLOWED_USERS: usize = 64;

/// Forgets what was released to a server while it was bound to service instances of the workspace.
async fn forget_installed(store: &dyn Store, ws: &str, id: ServerId) -> Result<(), ServiceError> {
    for row in records::all(store, &keys::all_of_workspace(Kind::Instance, ws)).await? {
        let Ok(instance) = keys::last_segment(&row.key).parse::<InstanceId>() else {
            continue;
        };
        for key in [
            engine_rows::installed(instance, id),
            engine_rows::installed_before(instance, id),
        ] {
            if store.get(&key).await?.is_some() {
                store.commit(Txn::new().delete(key)).await?;
            }
        }
    }
    Ok(())
}

/// What of a server can change; what is not given stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateServer {
    /// Name: unique in the workspace.
    #[serde(default)]
    pub name: Option<ServerName>,
    /// All tags: at most 50.
    #[serde(default)]
    pub tags: Option<BTreeMap<TagKey, String>>,
    /// Cell.
    #[serde(default)]
    pub cell: Option<CellName>,
}

/// Which servers; all conditions that are given must hold.
#[derive(Debug, Clone, Default)]
pub struct ServerFilter {
    /// Name or host name contains this, in any case.
    pub search: Option<String>,
    /// In this cell.
    pub cell: Option<CellName>,
    /// Bound to this service instance.
    pub instance: Option<InstanceId>,
    /// With, or without an agent session.
    pub connection: Option<ConnectionState>,
    /// Has this tag, with this value where one is given.
    pub tag: Option<(TagKey, Option<String>)>,
}

impl ServerFilter {
    fn fits(&self, server: &Server) -> bool {
        self.search.as_ref().is_none_or(|text| {
            let text = text.to_lowercase();
            server.name.as_str().to_lowercase().contains(&text)
                || server.facts.host_name.to_lowercase().contains(&text)
        }) && self
            .cell
            .as_ref()
            .is_none_or(|cell| server.cell.as_ref() == Some(cell))
            && self
                .instance
                .is_none_or(|instance| server.instance == Some(instance))
            && self
                .connection
                .is_none_or(|connection| server.connection == connection)
            && self.tag.as_ref().is_none_or(|(key, wanted)| {
                server
                    .tags
                    .get(key)
                    .is_some_and(|value| wanted.as_ref().is_none_or(|wanted| value == wanted))
            })
    }
}

/// Servers. Cheap to clone.
#[derive(Clone)]
pub struct Servers {
    store: Arc<dyn Store>,
    /// Registrations of this process take turns: they would only get in each other's way at the code's quota.
    registering: Arc<tokio::sync::Mutex<()>>,
}

impl Servers {
    /// Over a store.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            registering: Arc::default(),
        }
    }

    /// One server of a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when it is another workspace's.
    pub async fn get(&self, ws: &str, id: ServerId) -> Result<(Server, Revision), ServiceError> {
        in_workspace(&*self.store, ws, id).await
    }

    /// A page of a workspace's servers, oldest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn list(
        &self,
        ws: &str,
        filter: &ServerFilter,
        page: PageRequest,
    ) -> Result<PageOf<(Server, Revision)>, ServiceError> {
        records::get::<Workspace>(&*self.store, ws).await?;
        let prefix = keys::all_of_workspace(Kind::Server, ws);
        let keep = |server: &Server| filter.fits(server);
        records::list(&*self.store, &prefix, Sort::Rising, &page, keep).await
    }

    /// Changes a server's name, tags or cell; the cell only while it is bound to no service instance.
    ///
    /// # Errors
    /// `name_taken`, `cell_unknown`, `server_bound`; [`ServiceError::NotFound`], [`ServiceError::Changed`]; tags that break a
    /// rule.
    pub async fn update(
        &self,
        caller: Caller,
        ws: &str,
        id: ServerId,
        if_match: Option<Revision>,
        request: UpdateServer,
    ) -> Result<(Server, Revision), ServiceError> {
        let store = &*self.store;
        records::change(store, &caller, || async {
            let (mut server, revision) = self.get(ws, id).await?;
            records::check_revision::<Server>(if_match, revision)?;
            let mut txn = Txn::new();
            if let Some(name) = request.name.as_ref().filter(|name| **name != server.name) {
                let key = keys::name_in_workspace(Kind::Server, ws, name.as_str());
                if records::indexed(store, &key).await?.is_some() {
                    return Err(ServiceError::taken("server", "name", name.as_str()));
                }
                txn = txn.absent(key.clone()).put(key, id.to_string()).delete(
                    keys::name_in_workspace(Kind::Server, ws, server.name.as_str()),
                );
                server.name = name.clone();
            }
            if let Some(tags) = &request.tags {
                server.tags.clone_from(tags);
            }
            if let Some(cell) = request
                .cell
                .as_ref()
                .filter(|cell| server.cell.as_ref() != Some(cell))
            {
                let (workspace, _) = records::get::<Workspace>(store, ws).await?;
                if workspace.cell(cell).is_none() {
                    return Err(ServiceError::invalid(
                        "cell_unknown",
                        "cell",
                        format!("the workspace `{ws}` has no cell `{cell}`"),
                        "name one of its cells, or add the cell first",
                    ));
                }
                if let Some(instance) = server.instance {
                    return Err(ServiceError::conflict(
                        "server_bound",
                        format!(
                            "the server `{}` is bound to the service instance {instance}: its cell stays",
                            server.name
                        ),
                        "unbind the server first",
                    ));
                }
                server.cell = Some(cell.clone());
            }
            server.validate().map_err(ServiceError::of_value)?;
            Ok((txn.and(records::replace(&server, revision)?), server))
        })
        .await
    }

    /// Removes a server's record; `confirm` is its name. Afterwards the caller tells the gateway
    /// (`Gateway::deregister`), which makes the agent stop; what is known of its installed releases goes with it. A server that
    /// is bound to a service instance stays: its application would go on without anybody who knows of it.
    ///
    /// # Errors
    /// `server_locked` when an order holds it; `in_use`, with the load balancers that it hosts; `server_bound`;
    /// `confirmation_missing`; [`ServiceError::NotFound`].
    pub async fn deregister(
        &self,
        caller: Caller,
        ws: &str,
        id: ServerId,
        confirm: &str,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        let text = id.to_string();
        records::change(store, &caller, || async {
            let (server, revision) = self.get(ws, id).await?;
            records::check_confirm("server", confirm, server.name.as_str())?;
            let unused = records::unused(store, Kind::Server, &text).await?;
            let below = keys::all_of_workspace(Kind::LoadBalancer, ws);
            let hosts: Vec<String> = records::all_indexed::<LoadBalancer>(store, &below)
                .await?
                .into_iter()
                .filter(|balancer| balancer.server == id)
                .map(|balancer| format!("load balancer {} ({})", balancer.name, balancer.id))
                .collect();
            if !hosts.is_empty() {
                return Err(ServiceError::in_use("server", server.name.as_str(), &hosts));
            }
            let unlocked = unlocked(store, &server).await?;
            if let Some(instance) = server.instance {
                let name = records::find::<ServiceInstance>(store, &instance.to_string())
                    .await?
                    .map_or_else(String::new, |(found, _)| format!("`{}` ", found.name));
                return Err(ServiceError::conflict(
                    "server_bound",
                    format!(
                        "the server `{}` is bound to the service instance {name}({instance}): what was released to it would \
                         go on running, and nobody would know of it",
                        server.name
                    ),
                    "stop the application with an order if it is to end, unbind the server from the service instance, and \
                     remove it then",
                ));
            }
            let txn = unlocked
                .and(unused)
                .and(records::remove(&server, revision))
                .delete(keys::name_in_workspace(
                    Kind::Server,
                    ws,
                    server.name.as_str(),
                ))
                .delete(keys::of_workspace(Kind::Server, ws, &text))
                .delete(keys::server_key(key_hash(&server.public_key)));
            Ok((txn, ()))
        })
        .await?;
        if let Err(error) = forget_installed(store, ws, id).await {
            tracing::warn!(
                server.id = %id,
                error = &error as &dyn std::error::Error,
                "what was installed on a removed server could not be forgotten; it goes with its service instances"
            );
        }
        if let Err(error) = retention::delete_prefix(store, &keys::inbox(id)).await {
            tracing::warn!(
                server.id = %id,
                error = &error as &dyn std::error::Error,
                "the inbox of a removed server could not be emptied; nobody reads it any more"
            );
        }
        Ok(())
    }

    async fn redeem(
        &self,
        code: &windlass_protocol::ActivationCode,
        registration: &Registration,
    ) -> Result<Registered, Refusal> {
        let store = &*self.store;
        let public_key = registration.public_key.to_string();
        let key_index = keys::server_key(key_hash(&public_key));
        let _turn = self.registering.lock().await;
        for _ in 0..TRIES {
            let found = self.code_of(code.secret_hash()).await?;
            let Some((mut code, revision)) = found else {
                return Err(Refusal::Unknown);
            };
            if let Some(server) = self.registered_as(&key_index).await? {
                // An agent whose answer was lost asks again with the same code.
                if server.activation_code == Some(code.id) {
                    let name = server.name.to_string();
                    let server = server.id;
                    return Ok(Registered { server, name });
                }
                return Err(Refusal::Registered {
                    name: server.name.to_string(),
                });
            }
            let now = clock::now();
            code.refuses(now, registration.source)?;
            code.used += 1;
            let ws = code.workspace.to_string();
            let (workspace, _) = records::get::<Workspace>(store, &ws).await?;
            let only_cell = match workspace.cells.as_slice() {
                [cell] => Some(cell.name.clone()),
                _ => None,
            };
            let id = ServerId::from_uuid(ids::new_uuid());
            let wished = registration.name.as_deref();
            let server = Server {
                schema: Server::SCHEMA,
                id,
                name: self.name_for(&ws, &code, wished).await?,
                workspace: workspace.name,
                cell: code.cell.clone().or(only_cell),
                instance: None,
                tags: BTreeMap::new(),
                public_key: public_key.clone(),
                activation_code: Some(code.id),
                facts: machine(&registration.facts),
                connection: ConnectionState::Offline,
                last_seen_at: None,
                release_state: ReleaseState::AwaitingRelease,
                machine_state: MachineState::Initialising,
                created_at: now,
            };
            let text = id.to_string();
            let name_key = keys::name_in_workspace(Kind::Server, &ws, server.name.as_str());
            let txn = records::create(&server)?
                .and(records::replace(&code, revision)?)
                .and(records::refer(Kind::Workspace, &ws))
                .absent(name_key.clone())
                .put(name_key, text.clone())
                .absent(key_index.clone())
                .put(key_index.clone(), text.clone())
                .put(keys::of_workspace(Kind::Server, &ws, &text), "");
            match records::commit(store, txn).await? {
                Committed::Done(_) => {
                    return Ok(Registered {
                        server: id,
                        name: server.name.to_string(),
                    });
                }
                Committed::Conflict => {}
            }
        }
        Err(Refusal::Failed(ServiceError::Unavailable {
            message: "too many servers register at the same time; try again".to_owned(),
        }))
    }

    async fn code_of(
        &self,
        secret_hash: Digest,
    ) -> Result<Option<(ActivationCode, Revision)>, ServiceError> {
        let store = &*self.store;
        let hash_key = keys::by_hash(Kind::Activation, secret_hash);
        match records::indexed(store, &hash_key).await? {
            Some(id) => records::find(store, &id).await,
            None => Ok(None),
        }
    }

    async fn registered_as(
        &self,
        key_index: &windlass_store::Key,
    ) -> Result<Option<Server>, ServiceError> {
        let store = &*self.store;
        match records::indexed(store, key_index).await? {
            Some(id) => Ok(records::find(store, &id).await?.map(|(server, _)| server)),
            None => Ok(None),
        }
    }

    /// The name wished for, else the code's prefix and the next free number.
    async fn name_for(
        &self,
        ws: &str,
        code: &ActivationCode,
        wished: Option<&str>,
    ) -> Result<ServerName, Refusal> {
        let store = &*self.store;
        if let Some(wished) = wished {
            let name: ServerName =
                wished
                    .parse()
                    .map_err(|error: windlass_domain::name::InvalidValue| Refusal::Name {
                        message: error.message,
                    })?;
            let key = keys::name_in_workspace(Kind::Server, ws, name.as_str());
            if records::indexed(store, &key).await?.is_some() {
                return Err(Refusal::Name {
                    message: format!("the name `{name}` is taken by another server"),
                });
            }
            return Ok(name);
        }
        for number in code.used..=MAX_NUMBER {
            let text = format!("{}{number}", code.name_prefix);
            let name: ServerName =
                text.parse()
                    .map_err(|error: windlass_domain::name::InvalidValue| Refusal::Name {
                        message: error.message,
                    })?;
            let key = keys::name_in_workspace(Kind::Server, ws, name.as_str());
            if records::indexed(store, &key).await?.is_none() {
                return Ok(name);
            }
        }
        Err(Refusal::Name {
            message: format!(
                "all names from `{0}1` to `{0}{MAX_NUMBER}` are taken",
                code.name_prefix
            ),
        })
    }

    /// Changes a server's record from inside, whatever its revision. Writes nothing where nothing changes.
    async fn amend(
        &self,
        id: ServerId,
        change: impl Fn(&mut Server) + Send + Sync,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        for _ in 0..TRIES {
            let Some((before, revision)) = records::find::<Server>(store, &id.to_string()).await?
            else {
                return Ok(());
            };
            let mut server = before.clone();
            change(&mut server);
            if server == before {
                return Ok(());
            }
            match records::commit(store, records::replace(&server, revision)?).await? {
                Committed::Done(_) => return Ok(()),
                Committed::Conflict => {}
            }
        }
        Err(ServiceError::Unavailable {
            message: "the server's record changes all the time; try again".to_owned(),
        })
    }
}

/// One server of a workspace.
pub(crate) async fn in_workspace(
    store: &dyn Store,
    ws: &str,
    id: ServerId,
) -> Result<(Server, Revision), ServiceError> {
    let (server, revision) = records::get::<Server>(store, &id.to_string()).await?;
    if server.workspace.as_str() == ws {
        Ok((server, revision))
    } else {
        Err(ServiceError::not_found("server", id))
    }
}

/// The part of a transaction that holds only while no order has locked the server. The lock of an order that has ended goes
/// with it.
pub(crate) async fn unlocked(store: &dyn Store, server: &Server) -> Result<Txn, ServiceError> {
    let key = engine_rows::lock(server.id);
    let Some(entry) = store.get(&key).await? else {
        return Ok(Txn::new().absent(key));
    };
    let lock: ServerLock = records::decode_plain(&entry, "a server's lock")?;
    let ended = engine_rows::has_ended(store, lock.owner).await;
    if ended.map_err(|error| ServiceError::internal("read an order", error))? {
        return Ok(Txn::new()
            .revision_is(key.clone(), entry.revision)
            .delete(key));
    }
    Err(ServiceError::conflict(
        "server_locked",
        format!(
            "the server `{}` is held by the order {}",
            server.name, lock.owner
        ),
        "wait until the order has ended, or cancel it",
    ))
}

fn key_hash(public_key: &str) -> Digest {
    Digest::of(public_key.as_bytes())
}

fn machine(facts: &ServerFacts) -> MachineFacts {
    // An agent is not trusted: what it reports is bounded and free of control characters before it is stored or shown.
    let line = |text: &str| one_line(text, MAX_FACT_CHARS);
    MachineFacts {
        host_name: line(&facts.host_name),
        os: line(&facts.os),
        kernel: line(&facts.kernel),
        arch: line(&facts.arch),
        cores: facts.cores,
        memory_bytes: facts.memory_bytes,
        disk_bytes: facts.disk_bytes,
        agent_version: line(&facts.agent_version),
        agent_user: line(&facts.agent_user),
        allowed_users: facts
            .allowed_users
            .iter()
            .take(MAX_ALLOWED_USERS)
            .map(|user| line(user))
            .collect(),
        root_enabled: facts.root_enabled,
        ..MachineFacts::default()
    }
    .with_reported_addresses(&facts.addresses)
}

/// Why a registration was not accepted.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("the activation code is unknown; ask for a new one")]
    Unknown,
    #[error(transparent)]
    Code(#[from] CodeRefusal),
    #[error(
        "the agent's key belongs to the server `{name}`, which registered with another code; deregister that server, or remove the agent's data directory to make a new key"
    )]
    Registered { name: String },
    #[error("{message}; register with another name, or without one")]
    Name { message: String },
    #[error(transparent)]
    Failed(#[from] ServiceError),
}

impl From<Refusal> for RegisterError {
    fn from(refusal: Refusal) -> Self {
        let detail = refusal.to_string();
        let code = match refusal {
            Refusal::Failed(error) => return Self::Unavailable(directory(error)),
            Refusal::Unknown => "activation_code_unknown",
            Refusal::Code(CodeRefusal::Disabled) => "activation_code_disabled",
            Refusal::Code(CodeRefusal::Expired { .. }) => "activation_code_expired",
            Refusal::Code(CodeRefusal::UsedUp { .. }) => "activation_code_used_up",
            Refusal::Code(CodeRefusal::Source { .. }) => "activation_code_source",
            Refusal::Registered { .. } => "server_registered",
            Refusal::Name { .. } => "server_name_refused",
        };
        Self::Refused { code, detail }
    }
}

fn directory(error: ServiceError) -> DirectoryError {
    DirectoryError(Box::new(error))
}

#[async_trait]
impl Directory for Servers {
    async fn register(
        &self,
        code: &windlass_protocol::ActivationCode,
        registration: Registration,
    ) -> Result<Registered, RegisterError> {
        Ok(self.redeem(code, &registration).await?)
    }

    async fn find(&self, server: ServerId) -> Result<Option<KnownServer>, DirectoryError> {
        let found = records::find::<Server>(&*self.store, &server.to_string()).await;
        let Some((server, _)) = found.map_err(directory)? else {
            return Ok(None);
        };
        let public_key = server
            .public_key
            .parse::<PublicKey>()
            .map_err(|error| DirectoryError(Box::new(error)))?;
        Ok(Some(KnownServer {
            name: server.name.to_string(),
            workspace: server.workspace.to_string(),
            public_key,
        }))
    }

    async fn note(&self, server: ServerId, note: SessionNote) -> Result<(), DirectoryError> {
        self.amend(server, |server| match &note {
            SessionNote::Connected { at, facts } => {
                server.connection = ConnectionState::Online;
                server.machine_state = MachineState::Running;
                server.last_seen_at = Some(*at);
                server.facts = machine(facts);
            }
            SessionNote::Facts { at, facts } => {
                server.last_seen_at = Some(*at);
                server.facts = machine(facts);
            }
            SessionNote::Disconnected { last_seen } => {
                server.connection = ConnectionState::Offline;
                server.machine_state = MachineState::Lost;
                server.last_seen_at = Some(*last_seen);
            }
        })
        .await
        .map_err(directory)
    }

    async fn secrets_of_installed(
        &self,
        server: ServerId,
        instance: InstanceId,
    ) -> Result<BTreeSet<String>, DirectoryError> {
        let key = engine_rows::installed(instance, server);
        let read = self.store.get(&key).await;
        let Some(entry) = read.map_err(|error| DirectoryError(Box::new(error)))? else {
            return Ok(BTreeSet::new());
        };
        let manifest: Manifest =
            records::decode_plain(&entry, "what is installed").map_err(directory)?;
        // The agent starts, checks and stops the release again: with the steps' own environment too.
        let steps = manifest
            .stop
            .iter()
            .chain(&manifest.start)
            .chain(&manifest.check);
        Ok(manifest
            .env
            .values()
            .chain(steps.flat_map(|step| step.env.values()))
            .filter_map(|value| match value {
                Value::SecretRef(name) => Some(name.clone()),
                Value::Plain(_) => None,
            })
            .collect())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use windlass_domain::{Timestamp, activation::MAX_SOURCES, order::OrderState};
    use windlass_protocol::Fingerprint;

    use super::*;
    use crate::service::{
        activation_codes::{ActivationCodes, tests::request as code_request},
        records::tests::{caller, memory_store},
        workspaces::{Workspaces, tests::request as workspace_request},
    };

    fn facts() -> ServerFacts {
        ServerFacts {
            host_name: "host-7".to_owned(),
            addresses: vec!["10.2.0.7".to_owned()],
            os: "debian 12".to_owned(),
            kernel: "6.1".to_owned(),
            arch: "x86_64".to_owned(),
            cores: 4,
            memory_bytes: 1 << 30,
            disk_bytes: 1 << 34,
            boot_id: "b".to_owned(),
            agent_version: "0.1.0".to_owned(),
            agent_user: "windlass".to_owned(),
            allowed_users: vec![],
            root_enabled: false,
        }
    }

    fn registration(number: u8, name: Option<&str>) -> Registration {
        Registration {
            public_key: windlass_protocol::Identity::from_seed([number; 32]).public_key(),
            name: name.map(str::to_owned),
            facts: facts(),
            source: "10.2.0.7".parse().unwrap(),
        }
    }

    /// A workspace `prod` and a code with these fields.
    pub(crate) async fn with_code(
        store: &Arc<dyn Store>,
        mut fields: serde_json::Value,
    ) -> windlass_protocol::ActivationCode {
        let workspaces = Workspaces::new(store.clone());
        if workspaces.get("prod").await.is_err() {
            workspaces
                .create(caller(), workspace_request("prod"))
                .await
                .unwrap();
        }
        fields["name_prefix"] = "web-".into();
        let codes = ActivationCodes::new(store.clone(), Fingerprint::of_key(b"key"));
        let made = codes.create(caller(), "prod", code_request(fields)).await;
        made.unwrap().0.code
    }

    /// A registered server in the cell `cell-a` of `prod`.
    pub(crate) async fn server(store: &Arc<dyn Store>, number: u8) -> Server {
        let code = with_code(store, serde_json::json!({"cell": "cell-a"})).await;
        let servers = Servers::new(store.clone());
        let registered = servers.register(&code, registration(number, None)).await;
        servers
            .get("prod", registered.unwrap().server)
            .await
            .unwrap()
            .0
    }

    /// An order in a state that has locked a server.
    pub(crate) async fn lock(store: &Arc<dyn Store>, server: ServerId, state: OrderState) {
        let order = engine_rows::tests::order(1, state);
        let lock = ServerLock { owner: order.id };
        let txn = Txn::new()
            .put(engine_rows::order(order.id), engine_rows::encode(&order))
            .put(engine_rows::lock(server), engine_rows::encode(&lock));
        store.commit(txn).await.unwrap();
    }

    fn code_of(error: &RegisterError) -> &'static str {
        error.code()
    }

    #[tokio::test]
    async fn of_twenty_at_once_the_quota_of_ten_gets_in() {
        let store = memory_store();
        let code = with_code(&store, serde_json::json!({"quota": 10})).await;
        // Ten of them on another server of the platform, which has turns of its own.
        let (here, there) = (Servers::new(store.clone()), Servers::new(store.clone()));
        let all = (0..20).map(|number| {
            let servers = if number % 2 == 0 {
                here.clone()
            } else {
                there.clone()
            };
            let code = code.clone();
            tokio::spawn(async move { servers.register(&code, registration(number, None)).await })
        });
        let mut names = BTreeSet::new();
        let mut refused = 0;
        for answer in futures_util::future::join_all(all).await {
            match answer.unwrap() {
                Ok(registered) => assert!(names.insert(registered.name)),
                Err(error) => {
                    assert_eq!(code_of(&error), "activation_code_used_up");
                    refused += 1;
                }
            }
        }
        let expect: BTreeSet<String> = (1..=10).map(|number| format!("web-{number}")).collect();
        assert_eq!((names, refused), (expect, 10));
    }

    #[tokio::test]
    async fn a_lost_answer_is_given_again_and_another_code_is_refused() {
        let store = memory_store();
        let code = with_code(&store, serde_json::json!({"quota": 1})).await;
        let servers = Servers::new(store.clone());
        let first = servers
            .register(&code, registration(1, None))
            .await
            .unwrap();
        let again = servers
            .register(&code, registration(1, None))
            .await
            .unwrap();
        assert_eq!(first.server, again.server);
        let other = with_code(&store, serde_json::json!({})).await;
        let error = servers
            .register(&other, registration(1, None))
            .await
            .unwrap_err();
        assert_eq!(code_of(&error), "server_registered");
    }

    #[tokio::test]
    async fn codes_are_refused_for_their_reason() {
        let store = memory_store();
        let servers = Servers::new(store.clone());
        let unknown = windlass_protocol::ActivationCode::new([9; 16], Fingerprint::of_key(b"key"));
        let far = with_code(
            &store,
            serde_json::json!({"allowed_sources": ["10.3.0.0/16"]}),
        )
        .await;
        let near = with_code(&store, serde_json::json!({"allowed_sources": ["10.2.0.7"]})).await;
        for (code, name, expect) in [
            (&unknown, None, "activation_code_unknown"),
            (&far, None, "activation_code_source"),
            (&near, Some("-"), "server_name_refused"),
        ] {
            let answer = servers.register(code, registration(1, name)).await;
            assert_eq!(code_of(&answer.unwrap_err()), expect);
        }
        let named = servers
            .register(&near, registration(1, Some("db1")))
            .await
            .unwrap();
        assert_eq!(named.name, "db1");
        let taken = servers.register(&near, registration(2, Some("db1"))).await;
        assert_eq!(code_of(&taken.unwrap_err()), "server_name_refused");
        let many = vec!["10.2.0.7"; MAX_SOURCES + 1];
        let codes = ActivationCodes::new(store.clone(), Fingerprint::of_key(b"key"));
        let request =
            code_request(serde_json::json!({"name_prefix": "a", "allowed_sources": many}));
        assert!(codes.create(caller(), "prod", request).await.is_err());
        // Expired: the row is set back.
        let (id, _) = servers.code_of(near.secret_hash()).await.unwrap().unwrap();
        let (mut record, revision) = records::get::<ActivationCode>(&*store, &id.id.to_string())
            .await
            .unwrap();
        record.expires_at = Timestamp::from_unix_ms(1);
        let txn = records::replace(&record, revision).unwrap();
        store.commit(txn).await.unwrap();
        let late = servers.register(&near, registration(3, None)).await;
        assert_eq!(code_of(&late.unwrap_err()), "activation_code_expired");
        let codes = codes
            .disable(caller(), "prod", record.id, None)
            .await
            .unwrap();
        assert!(codes.0.disabled);
        let disabled = servers.register(&near, registration(3, None)).await;
        assert_eq!(code_of(&disabled.unwrap_err()), "activation_code_disabled");
    }

    #[tokio::test]
    async fn a_server_is_changed_found_and_removed() {
        let store = memory_store();
        let servers = Servers::new(store.clone());
        let one = server(&store, 1).await;
        let two = server(&store, 2).await;
        let update = |name: &str| UpdateServer {
            name: Some(name.parse().unwrap()),
            tags: Some([("env".parse().unwrap(), "live".to_owned())].into()),
            cell: Some("cell-b".parse().unwrap()),
        };
        let taken = servers.update(caller(), "prod", one.id, None, update(two.name.as_str()));
        assert!(matches!(
            taken.await.unwrap_err(),
            ServiceError::Conflict {
                code: "name_taken",
                ..
            }
        ));
        let changed = servers
            .update(caller(), "prod", one.id, None, update("db"))
            .await;
        assert_eq!(changed.unwrap().0.cell, Some("cell-b".parse().unwrap()));
        let filter = ServerFilter {
            search: Some("DB".to_owned()),
            tag: Some(("env".parse().unwrap(), Some("live".to_owned()))),
            cell: Some("cell-b".parse().unwrap()),
            ..ServerFilter::default()
        };
        let page = servers
            .list("prod", &filter, PageRequest::first(5))
            .await
            .unwrap();
        assert_eq!(page.items.len(), 1);
        lock(&store, one.id, OrderState::Running).await;
        let held = servers
            .deregister(caller(), "prod", one.id, "db")
            .await
            .unwrap_err();
        assert!(matches!(
            held,
            ServiceError::Conflict {
                code: "server_locked",
                ..
            }
        ));
        // Who sees that the order has ended need not wait until it has given back its lock.
        lock(&store, one.id, OrderState::Succeeded).await;
        servers
            .deregister(caller(), "prod", one.id, "db")
            .await
            .unwrap();
        assert!(servers.find(one.id).await.unwrap().is_none());
        // Its name and its key are free again.
        let code = with_code(&store, serde_json::json!({})).await;
        let again = servers
            .register(&code, registration(1, Some("db")))
            .await
            .unwrap();
        assert_ne!(again.server, one.id);
    }

    #[tokio::test]
    async fn a_server_that_is_bound_stays_and_takes_what_it_had_with_it() {
        use crate::service::{
            apps::{Apps, tests::OneStack},
            instances::{BindServer, Instances},
        };
        let store = memory_store();
        let servers = Servers::new(store.clone());
        let one = server(&store, 1).await;
        let apps = Apps::new(store.clone(), Arc::new(OneStack));
        let app = crate::service::apps::tests::request("shop");
        let (app, _) = apps.create(caller(), app).await.unwrap();
        let instances = Instances::new(store.clone(), Arc::new(OneStack));
        let request = serde_json::json!({"name": "shop", "app": app.id});
        let request = serde_json::from_value(request).unwrap();
        let made = instances.create(caller(), "prod", request).await;
        let instance = made.unwrap().0.id;
        let bind = BindServer {
            server: one.id,
            variables: BTreeMap::new(),
        };
        instances
            .bind(caller(), "prod", instance, vec![bind])
            .await
            .unwrap();
        let installed = [
            engine_rows::installed(instance, one.id),
            engine_rows::installed_before(instance, one.id),
        ];
        for key in &installed {
            let txn = Txn::new().put(key.clone(), "{}");
            store.commit(txn).await.unwrap();
        }
        let name = one.name.as_str();
        let bound = servers.deregister(caller(), "prod", one.id, name).await;
        let bound = bound.unwrap_err();
        assert_eq!(bound.code(), "server_bound");
        assert!(bound.to_string().contains("`shop`"), "{bound}");
        instances
            .unbind(caller(), "prod", instance, vec![one.id])
            .await
            .unwrap();
        servers
            .deregister(caller(), "prod", one.id, name)
            .await
            .unwrap();
        for key in &installed {
            assert!(store.get(key).await.unwrap().is_none());
        }
    }

    #[tokio::test]
    async fn sessions_leave_their_notes() {
        let store = memory_store();
        let servers = Servers::new(store.clone());
        let id = server(&store, 1).await.id;
        let at = Timestamp::from_unix_ms(5);
        let facts = Box::new(facts());
        servers
            .note(id, SessionNote::Connected { at, facts })
            .await
            .unwrap();
        let (online, revision) = servers.get("prod", id).await.unwrap();
        assert_eq!(online.connection, ConnectionState::Online);
        assert_eq!(online.last_seen_at, Some(at));
        let note = SessionNote::Disconnected { last_seen: at };
        servers.note(id, note.clone()).await.unwrap();
        let (lost, second) = servers.get("prod", id).await.unwrap();
        assert_eq!(lost.machine_state, MachineState::Lost);
        assert_ne!(revision, second);
        // Nothing new: no write.
        servers.note(id, note).await.unwrap();
        assert_eq!(servers.get("prod", id).await.unwrap().1, second);
    }

    #[test]
    fn what_an_agent_reports_is_bounded_escaped_and_checked() {
        let facts = ServerFacts {
            host_name: "web\nFAKE \u{1b}[2J".to_owned() + &"x".repeat(30_000),
            allowed_users: vec!["u".repeat(10_000); 10_000],
            addresses: [
                "169.254.169.254",
                "127.0.0.1",
                "255.255.255.255",
                "0.0.0.0",
                "224.0.0.1",
                "10.0.0.1\n server evil 10.0.0.2",
                "64:ff9b::a9fe:a9fe",
                "10.2.0.7",
                "2001:DB8::7",
            ]
            .map(str::to_owned)
            .into(),
            ..ServerFacts::default()
        };
        let machine = machine(&facts);
        assert_eq!(machine.addresses, ["10.2.0.7", "2001:db8::7"]);
        assert_eq!(machine.refused_addresses.len(), 7, "{machine:?}");
        let refused = machine.refused_addresses.join("|");
        assert!(
            refused.contains("127.0.0.1: it is a loopback address"),
            "{refused}"
        );
        let stored = serde_json::to_string(&machine).expect("facts are JSON");
        assert!(stored.len() < 20_000, "{}", stored.len());
        assert!(!machine.host_name.chars().any(char::is_control));
        assert!(!refused.chars().any(char::is_control), "{refused}");
    }
}
