//! Listeners and their virtual server groups. Each has a pool of its name, which is made and deleted with it.

use serde::{Deserialize, Serialize};
use windlass_domain::{
    certificate::Certificate,
    id::{ListenerId, LoadBalancerId, PoolId},
    instance::ServiceInstance,
    load_balancer::{
        HostPattern, Listener, ListenerSettings, LoadBalancer, MAX_LISTENERS, Power, Protocol,
        ServerGroup,
    },
    name::{PathPrefix, PoolName},
    pool::{Pool, PoolKind},
};
use windlass_store::{Revision, Store, Txn, retention};

use super::LoadBalancers;
use crate::{
    clock, ids,
    keys::{self, Kind},
    service::{Caller, ServiceError, records},
};

/// A listener to be made.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateListener {
    /// Name, which its pool has too: unique among the pools of the workspace.
    pub name: PoolName,
    /// How it works.
    pub settings: ListenerSettings,
}

/// A change of a listener.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateListener {
    /// All of how it works.
    pub settings: ListenerSettings,
}

/// A virtual server group to be made.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateGroup {
    /// Name, which its pool has too: unique among the pools of the workspace.
    pub name: PoolName,
    /// Host names, `*.example.com` for all below one; none: any. At most 20.
    #[serde(default)]
    pub hosts: Vec<HostPattern>,
    /// Beginnings of paths; none: any. At most 20.
    #[serde(default)]
    pub paths: Vec<PathPrefix>,
}

/// A change of a virtual server group.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateGroup {
    /// All host names.
    #[serde(default)]
    pub hosts: Vec<HostPattern>,
    /// All beginnings of paths.
    #[serde(default)]
    pub paths: Vec<PathPrefix>,
}

/// The listeners of a load balancer, oldest first.
pub(super) async fn all_of(
    store: &dyn Store,
    id: LoadBalancerId,
) -> Result<Vec<Listener>, ServiceError> {
    let below = keys::all_of_workspace(Kind::Listener, &id.to_string());
    records::all_indexed(store, &below).await
}

impl LoadBalancers {
    /// The listeners of a load balancer, oldest first; at most 50.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn listeners(
        &self,
        ws: &str,
        id: LoadBalancerId,
    ) -> Result<Vec<Listener>, ServiceError> {
        self.get(ws, id).await?;
        all_of(&*self.store, id).await
    }

    /// One listener.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when it is another load balancer's.
    pub async fn listener(
        &self,
        ws: &str,
        balancer: LoadBalancerId,
        id: ListenerId,
    ) -> Result<(Listener, Revision), ServiceError> {
        self.get(ws, balancer).await?;
        let (listener, revision) = records::get::<Listener>(&*self.store, &id.to_string()).await?;
        if listener.load_balancer == balancer {
            Ok((listener, revision))
        } else {
            Err(ServiceError::not_found("listener", id))
        }
    }

    /// Makes a listener with its pool, started.
    ///
    /// # Errors
    /// `name_taken`, `front_port_taken`, `certificate_unknown`, `out_of_limit`, `invalid_value`; [`ServiceError::NotFound`].
    pub async fn create_listener(
        &self,
        caller: Caller,
        ws: &str,
        balancer: LoadBalancerId,
        request: CreateListener,
    ) -> Result<(Listener, Revision), ServiceError> {
        let store = &*self.store;
        let id = ListenerId::from_uuid(ids::new_uuid());
        let pool = PoolId::from_uuid(ids::new_uuid());
        let made = records::change(store, &caller, || async {
            let (balancer, _) = self.get(ws, balancer).await?;
            let listener = Listener {
                schema: Listener::SCHEMA,
                id,
                load_balancer: balancer.id,
                workspace: balancer.workspace.clone(),
                name: request.name.clone(),
                pool,
                groups: Vec::new(),
                settings: request.settings.clone(),
                power: Power::Started,
                created_at: clock::now(),
            };
            listener
                .validate(&self.front_ports)
                .map_err(ServiceError::of_value)?;
            let found = all_of(store, balancer.id).await?.len();
            if found >= MAX_LISTENERS {
                return Err(ServiceError::Limit {
                    code: "out_of_limit",
                    field: "listeners".to_owned(),
                    message: format!("a load balancer has at most {MAX_LISTENERS} listeners"),
                    limit: MAX_LISTENERS as u64,
                    current: found as u64,
                    mend: "delete one, or make another load balancer".to_owned(),
                });
            }
            let txn = records::create(&listener)?
                .put(
                    keys::of_workspace(Kind::Listener, &balancer.id.to_string(), &id.to_string()),
                    "",
                )
                .exists(keys::record(Kind::LoadBalancer, &balancer.id.to_string()))
                // Two listeners that are made at once see each other: the limit holds.
                .and(
                    records::touch_exclusively(store, Kind::LoadBalancer, &balancer.id.to_string())
                        .await?,
                )
                .and(take_port(store, &balancer, &listener).await?)
                .and(certificate_of(store, ws, &listener).await?)
                .and(new_pool(store, &listener, pool, &listener.name).await?);
            Ok((txn, listener))
        })
        .await?;
        self.steering.look_again();
        Ok(made)
    }

    /// Changes how a listener works.
    ///
    /// # Errors
    /// Those of [`LoadBalancers::create_listener`] but the name's; [`ServiceError::Changed`].
    pub async fn update_listener(
        &self,
        caller: Caller,
        ws: &str,
        balancer: LoadBalancerId,
        id: ListenerId,
        if_match: Option<Revision>,
        request: UpdateListener,
    ) -> Result<(Listener, Revision), ServiceError> {
        let store = &*self.store;
        let changed = records::change(store, &caller, || async {
            let (balancer, _) = self.get(ws, balancer).await?;
            let (mut listener, revision) = self.listener(ws, balancer.id, id).await?;
            records::check_revision::<Listener>(if_match, revision)?;
            let before = listener.settings.front_port;
            listener.settings = request.settings.clone();
            listener
                .validate(&self.front_ports)
                .map_err(ServiceError::of_value)?;
            let mut txn = records::replace(&listener, revision)?
                .and(certificate_of(store, ws, &listener).await?);
            if listener.settings.front_port != before {
                txn = txn
                    .and(take_port(store, &balancer, &listener).await?)
                    .delete(keys::front_port(balancer.server, before));
            }
            Ok((txn, listener))
        })
        .await?;
        self.steering.look_again();
        Ok(changed)
    }

    /// Starts or stops a listener. Doing so again changes nothing.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn set_listener_power(
        &self,
        caller: Caller,
        ws: &str,
        balancer: LoadBalancerId,
        id: ListenerId,
        power: Power,
    ) -> Result<(Listener, Revision), ServiceError> {
        let changed = records::change(&*self.store, &caller, || async {
            let (mut listener, revision) = self.listener(ws, balancer, id).await?;
            listener.power = power;
            Ok((records::replace(&listener, revision)?, listener))
        })
        .await?;
        self.steering.look_again();
        Ok(changed)
    }

    /// Deletes a listener with its groups, when no service instance takes traffic from their pools; `confirm` is its name.
    ///
    /// # Errors
    /// `in_use`, with the service instances; `confirmation_missing`; [`ServiceError::NotFound`].
    pub async fn delete_listener(
        &self,
        caller: Caller,
        ws: &str,
        balancer: LoadBalancerId,
        id: ListenerId,
        confirm: &str,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        let (pools, _) = records::change_showing(
            store,
            &caller,
            |_| serde_json::Value::Null,
            || async {
                let (balancer, _) = self.get(ws, balancer).await?;
                let (listener, revision) = self.listener(ws, balancer.id, id).await?;
                records::check_confirm("listener", confirm, listener.name.as_str())?;
                let mut txn = records::remove(&listener, revision)
                    .delete(keys::of_workspace(
                        Kind::Listener,
                        &balancer.id.to_string(),
                        &id.to_string(),
                    ))
                    .delete(keys::front_port(
                        balancer.server,
                        listener.settings.front_port,
                    ));
                for pool in listener.pools() {
                    txn = txn.and(without_pool(store, ws, pool).await?);
                }
                let pools: Vec<PoolId> = listener.pools().collect();
                Ok((txn, pools))
            },
        )
        .await?;
        for pool in pools {
            self.forget_back_ends(pool).await;
        }
        self.steering.look_again();
        Ok(())
    }

    /// Adds a virtual server group, behind those that are there.
    ///
    /// # Errors
    /// `name_taken`, `out_of_limit`, `invalid_value`; [`ServiceError::NotFound`].
    pub async fn create_group(
        &self,
        caller: Caller,
        ws: &str,
        balancer: LoadBalancerId,
        id: ListenerId,
        request: CreateGroup,
    ) -> Result<(Listener, Revision), ServiceError> {
        let store = &*self.store;
        let pool = PoolId::from_uuid(ids::new_uuid());
        let changed = records::change(store, &caller, || async {
            let (mut listener, revision) = self.listener(ws, balancer, id).await?;
            listener.groups.push(ServerGroup {
                name: request.name.clone(),
                pool,
                hosts: request.hosts.clone(),
                paths: request.paths.clone(),
            });
            listener
                .validate(&self.front_ports)
                .map_err(ServiceError::of_value)?;
            let txn = records::replace(&listener, revision)?
                .and(new_pool(store, &listener, pool, &request.name).await?);
            Ok((txn, listener))
        })
        .await?;
        self.steering.look_again();
        Ok(changed)
    }

    /// Changes what a virtual server group takes.
    ///
    /// # Errors
    /// `out_of_limit`, `invalid_value`; [`ServiceError::NotFound`].
    pub async fn update_group(
        &self,
        caller: Caller,
        ws: &str,
        balancer: LoadBalancerId,
        id: ListenerId,
        pool: PoolId,
        request: UpdateGroup,
    ) -> Result<(Listener, Revision), ServiceError> {
        let changed = records::change(&*self.store, &caller, || async {
            let (mut listener, revision) = self.listener(ws, balancer, id).await?;
            let group = listener.groups.iter_mut().find(|group| group.pool == pool);
            let group = group.ok_or_else(|| ServiceError::not_found("server group", pool))?;
            group.hosts.clone_from(&request.hosts);
            group.paths.clone_from(&request.paths);
            listener
                .validate(&self.front_ports)
                .map_err(ServiceError::of_value)?;
            Ok((records::replace(&listener, revision)?, listener))
        })
        .await?;
        self.steering.look_again();
        Ok(changed)
    }

    /// Deletes a virtual server group, when no service instance takes traffic from its pool; `confirm` is its name.
    ///
    /// # Errors
    /// `in_use`, with the service instances; `confirmation_missing`; [`ServiceError::NotFound`].
    pub async fn delete_group(
        &self,
        caller: Caller,
        ws: &str,
        balancer: LoadBalancerId,
        id: ListenerId,
        pool: PoolId,
        confirm: &str,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        records::change(store, &caller, || async {
            let (mut listener, revision) = self.listener(ws, balancer, id).await?;
            let place = listener.groups.iter().position(|group| group.pool == pool);
            let place = place.ok_or_else(|| ServiceError::not_found("server group", pool))?;
            let group = listener.groups.remove(place);
            records::check_confirm("server group", confirm, group.name.as_str())?;
            let txn =
                records::replace(&listener, revision)?.and(without_pool(store, ws, pool).await?);
            Ok((txn, ()))
        })
        .await?;
        self.forget_back_ends(pool).await;
        self.steering.look_again();
        Ok(())
    }

    async fn forget_back_ends(&self, pool: PoolId) {
        if let Err(error) = retention::delete_prefix(&*self.store, &keys::back_ends(pool)).await {
            tracing::warn!(
                pool.id = %pool,
                error = &error as &dyn std::error::Error,
                "the back ends of a deleted pool could not be removed; nobody reads them any more"
            );
        }
    }
}

/// The part of a transaction that takes a listener's front port on its server.
async fn take_port(
    store: &dyn Store,
    balancer: &LoadBalancer,
    listener: &Listener,
) -> Result<Txn, ServiceError> {
    let port = listener.settings.front_port;
    let key = keys::front_port(balancer.server, port);
    if let Some(holder) = records::indexed(store, &key).await? {
        return Err(ServiceError::conflict(
            "front_port_taken",
            format!(
                "the front port {port} of the server {} is taken by the listener {holder}",
                balancer.server
            ),
            "choose another front port, or delete that listener",
        ));
    }
    Ok(Txn::new()
        .absent(key.clone())
        .put(key, listener.id.to_string()))
}

/// The part of a transaction that refers to a listener's certificate, where it has one.
async fn certificate_of(
    store: &dyn Store,
    ws: &str,
    listener: &Listener,
) -> Result<Txn, ServiceError> {
    let Protocol::Https { certificate } = listener.settings.protocol else {
        return Ok(Txn::new());
    };
    let id = certificate.to_string();
    let found = records::find::<Certificate>(store, &id).await?;
    if found.is_none_or(|(found, _)| found.workspace.as_str() != ws) {
        return Err(ServiceError::invalid(
            "certificate_unknown",
            "/settings/protocol/https/certificate",
            format!("the workspace `{ws}` has no certificate {id}"),
            "upload it first",
        ));
    }
    Ok(records::refer(Kind::Certificate, &id))
}

async fn new_pool(
    store: &dyn Store,
    listener: &Listener,
    id: PoolId,
    name: &PoolName,
) -> Result<Txn, ServiceError> {
    let ws = listener.workspace.as_str();
    let name_key = keys::name_in_workspace(Kind::Pool, ws, name.as_str());
    if records::indexed(store, &name_key).await?.is_some() {
        return Err(ServiceError::taken("pool", "name", name.as_str()));
    }
    let pool = Pool {
        schema: Pool::SCHEMA,
        id,
        name: name.clone(),
        workspace: listener.workspace.clone(),
        kind: PoolKind::LoadBalancer {
            load_balancer: listener.load_balancer,
            listener: listener.id,
        },
        created_at: clock::now(),
    };
    let text = id.to_string();
    Ok(records::create(&pool)?
        .and(records::refer(Kind::Workspace, ws))
        .absent(name_key.clone())
        .put(name_key, text.clone())
        .put(keys::of_workspace(Kind::Pool, ws, &text), ""))
}

async fn without_pool(store: &dyn Store, ws: &str, id: PoolId) -> Result<Txn, ServiceError> {
    let text = id.to_string();
    let unused = records::unused(store, Kind::Pool, &text).await?;
    let (pool, revision) = records::get::<Pool>(store, &text).await?;
    let below = keys::all_of_workspace(Kind::Instance, ws);
    let by: Vec<String> = records::all_indexed::<ServiceInstance>(store, &below)
        .await?
        .into_iter()
        .filter(|instance| instance.pools.contains(&id))
        .map(|instance| format!("service instance {} ({})", instance.name, instance.id))
        .collect();
    if !by.is_empty() {
        return Err(ServiceError::in_use("pool", pool.name.as_str(), &by));
    }
    Ok(records::remove(&pool, revision)
        .and(unused)
        .delete(keys::name_in_workspace(Kind::Pool, ws, pool.name.as_str()))
        .delete(keys::of_workspace(Kind::Pool, ws, &text)))
}
