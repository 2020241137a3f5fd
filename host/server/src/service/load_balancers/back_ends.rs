//! Servers behind pools of load balancers: attached, or bound to a service instance that names the pool; and their weights.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};
use windlass_domain::{
    address::refuse_back_end,
    id::{PoolId, ServerId},
    instance::ServiceInstance,
    load_balancer::{BackEnd, Listener, LoadBalancer, MAX_WEIGHT, Origin, check_weight},
    name::ServerName,
    pool::{MemberStats, Pool, PoolKind},
    server::{ReleaseState, Server},
};
use windlass_store::{Revision, Store, Txn};

use super::{
    LoadBalancers,
    configuration::{self, Member},
};
use crate::{
    engine::{self, rows::owed_weight},
    keys::{self, Kind},
    service::{Caller, ServiceError, records, servers},
};

/// Servers that one call attaches, changes or detaches: all of it is one transaction.
pub const MAX_BACK_ENDS_PER_CALL: usize = 30;

/// A server to be put behind a pool, or there already: then what is not given stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachBackEnd {
    /// The server: of this workspace.
    pub server: ServerId,
    /// Where the load balancer reaches it; never given: at the first address that its agent reports.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub address: Option<IpAddr>,
    /// Its port; never given: the listener's back-end port.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub port: Option<u16>,
    /// 0 to 100; never given: 100.
    #[serde(default)]
    #[schema(maximum = 100)]
    pub weight: Option<u32>,
}

/// A weight to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetBackEndWeight {
    /// The server.
    pub server: ServerId,
    /// 0 to 100; 0: no new requests.
    #[schema(maximum = 100)]
    pub weight: u32,
}

/// A server behind a pool, with what HAProxy shows of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct BackEndView {
    /// The server.
    pub server: ServerId,
    /// Its name.
    pub server_name: ServerName,
    /// Why it is there.
    pub origin: Origin,
    /// Where it is reached; absent: its agent reports no address and none was given, so HAProxy does not know it.
    #[schema(value_type = Option<String>)]
    pub address: Option<SocketAddr>,
    /// The weight that it is to have.
    pub weight: u32,
    /// What HAProxy shows; absent: it does not run, cannot be asked, or does not have the server yet.
    pub shown: Option<MemberStats>,
    /// What HAProxy's last check said, for people.
    pub check: String,
}

impl LoadBalancers {
    /// The pool of a load balancer, with its listener.
    pub(super) async fn of_pool(
        &self,
        id: PoolId,
    ) -> Result<Option<(Pool, LoadBalancer, Listener)>, ServiceError> {
        let store = &*self.store;
        let Some((pool, _)) = records::find::<Pool>(store, &id.to_string()).await? else {
            return Ok(None);
        };
        let PoolKind::LoadBalancer {
            load_balancer,
            listener,
        } = pool.kind
        else {
            return Ok(None);
        };
        let balancer = records::find::<LoadBalancer>(store, &load_balancer.to_string()).await?;
        let listener = records::find::<Listener>(store, &listener.to_string()).await?;
        Ok(match (balancer, listener) {
            (Some((balancer, _)), Some((listener, _))) => Some((pool, balancer, listener)),
            (_, _) => None,
        })
    }

    async fn real_pool(
        &self,
        ws: &str,
        id: PoolId,
    ) -> Result<(Pool, LoadBalancer, Listener), ServiceError> {
        let (pool, _) = records::get::<Pool>(&*self.store, &id.to_string()).await?;
        if pool.workspace.as_str() != ws {
            return Err(ServiceError::not_found("pool", id));
        }
        self.of_pool(id).await?.ok_or_else(|| {
            ServiceError::conflict(
                "pool_has_no_back_ends",
                format!("the pool `{}` is not of a load balancer", pool.name),
                "name the pool of a listener or of a virtual server group",
            )
        })
    }

    pub(super) async fn members_of(&self, pool: &Pool) -> Result<Vec<Member>, ServiceError> {
        let store = &*self.store;
        let mut bound = configuration::bound(store, pool.workspace.as_str()).await?;
        let bound = bound.remove(&pool.id).unwrap_or_default();
        configuration::members(store, pool.id, &bound).await
    }

    /// The servers behind a pool, oldest first, with what HAProxy shows of them.
    ///
    /// # Errors
    /// `pool_has_no_back_ends`; [`ServiceError::NotFound`].
    pub async fn back_ends(&self, ws: &str, id: PoolId) -> Result<Vec<BackEndView>, ServiceError> {
        let (pool, balancer, listener) = self.real_pool(ws, id).await?;
        let members = self.members_of(&pool).await?;
        // A load balancer that cannot be asked shows nothing; its state says why.
        let state = self.steering.look(&balancer).await.unwrap_or_default();
        let mut shown: BTreeMap<ServerId, _> = state
            .members
            .iter()
            .filter(|member| member.pool == id)
            .map(|member| (member.stats.server, member.clone()))
            .collect();
        Ok(members
            .into_iter()
            .map(|member| {
                let shown = shown.remove(&member.server.id);
                BackEndView {
                    server: member.server.id,
                    address: member.address(&listener),
                    origin: member.origin,
                    weight: member.weight,
                    server_name: member.server.name,
                    check: shown
                        .as_ref()
                        .map(|shown| shown.check.clone())
                        .unwrap_or_default(),
                    shown: shown.map(|shown| shown.stats),
                }
            })
            .collect())
    }

    /// Puts servers behind a pool, all or none. For one that is there already, what is given replaces what is kept of it.
    ///
    /// # Errors
    /// `server_without_address`, `server_taken_out`, `pool_has_no_back_ends`, `out_of_limit`; [`ServiceError::NotFound`].
    pub async fn attach(
        &self,
        caller: Caller,
        ws: &str,
        id: PoolId,
        request: Vec<AttachBackEnd>,
    ) -> Result<Vec<BackEndView>, ServiceError> {
        let store = &*self.store;
        let wanted: Vec<ServerId> = request.iter().map(|attach| attach.server).collect();
        check_calls(&wanted)?;
        let (_, balancer, _) = self.real_pool(ws, id).await?;
        let steered = self.steering.alone(balancer.id).await;
        records::change(store, &caller, || async {
            let mut txn = records::refer(Kind::Pool, &id.to_string());
            for attach in &request {
                let (server, _) = servers::in_workspace(store, ws, attach.server).await?;
                if let Some(address) = attach.address
                    && let Some(reason) = refuse_back_end(address)
                {
                    return Err(ServiceError::invalid(
                        "invalid_value",
                        "address",
                        format!(
                            "{address} cannot be the address of a server: {reason}"
                        ),
                        "give an address at which the load balancer reaches the server",
                    ));
                }
                if attach.port == Some(0) {
                    return Err(ServiceError::invalid(
                        "invalid_value",
                        "port",
                        "a port is from 1 to 65535",
                        "correct `port`",
                    ));
                }
                let key = keys::back_end(id, attach.server);
                let before = store.get(&key).await?;
                let before: Option<BackEnd> = before
                    .map(|entry| records::decode_plain(&entry, "a back end"))
                    .transpose()?;
                let before = before.as_ref();
                let weight = attach.weight.or(before.map(|before| before.weight));
                let weight = weight.unwrap_or(MAX_WEIGHT);
                let address = attach.address.or(before.and_then(|before| before.address));
                if address.is_none() && configuration::first_address(&server).is_none() {
                    let refused = &server.facts.refused_addresses;
                    let refused = match refused.is_empty() {
                        true => String::new(),
                        false => format!(" (it reports {})", refused.join("; ")),
                    };
                    return Err(ServiceError::conflict(
                        "server_without_address",
                        format!(
                            "The agent of the server `{}` reports no address that can be used{refused}.",
                            server.name
                        ),
                        "Set `address` to an address at which the load balancer reaches the server.",
                    ));
                }
                checked_weight(weight)?;
                match attach.weight {
                    None => {}
                    Some(0) => txn = txn.delete(owed_weight(id, attach.server)),
                    Some(_) => {
                        expect_in_service(store, id, &server).await?;
                        txn = txn.delete(owed_weight(id, attach.server));
                    }
                }
                let row = BackEnd {
                    schema: BackEnd::SCHEMA,
                    pool: id,
                    server: attach.server,
                    address,
                    port: attach.port.or(before.and_then(|before| before.port)),
                    weight,
                    origin: Origin::Attached,
                };
                txn = txn
                    .and(records::refer(Kind::Server, &attach.server.to_string()))
                    .put(key, records::encode(&row));
            }
            Ok((txn, ()))
        })
        .await?;
        drop(steered);
        self.steering.look_again();
        self.back_ends(ws, id).await
    }

    /// Takes servers from behind a pool, all or none. A server that is bound to a service instance that names the pool stays
    /// with its weight, at its agent's address.
    ///
    /// # Errors
    /// `back_end_unknown`, `back_end_bound`, `pool_has_no_back_ends`, `out_of_limit`; [`ServiceError::NotFound`].
    pub async fn detach(
        &self,
        caller: Caller,
        ws: &str,
        id: PoolId,
        request: Vec<ServerId>,
    ) -> Result<Revision, ServiceError> {
        let store = &*self.store;
        check_calls(&request)?;
        let (pool, balancer, _) = self.real_pool(ws, id).await?;
        let steered = self.steering.alone(balancer.id).await;
        let ((), revision) = records::change(store, &caller, || async {
            let mut bound = configuration::bound(store, ws).await?;
            let bound = bound.remove(&id).unwrap_or_default();
            let mut txn = Txn::new();
            for server in &request {
                let key = keys::back_end(id, *server);
                let entry = store.get(&key).await?;
                let row = entry.as_ref().map(|entry| {
                    records::decode_plain::<BackEnd>(entry, "a back end")
                        .map(|row| (row, entry.revision))
                });
                let (row, revision) = match (row.transpose()?, bound.contains(server)) {
                    (Some(found), _) if found.0.origin == Origin::Attached => found,
                    (Some(_) | None, true) => return Err(only_bound(&pool, *server)),
                    (Some(_) | None, false) => return Err(unknown(&pool, *server)),
                };
                txn = txn.revision_is(key.clone(), revision);
                txn = if bound.contains(server) {
                    let stays = BackEnd {
                        address: None,
                        port: None,
                        origin: Origin::Bound,
                        ..row
                    };
                    txn.put(key, records::encode(&stays))
                } else {
                    txn.delete(key)
                };
            }
            Ok((txn, ()))
        })
        .await?;
        drop(steered);
        self.steering.look_again();
        Ok(revision)
    }

    /// Sets weights, all or none. They are kept, and HAProxy is told; one that cannot be reached is told later: the answer
    /// shows both.
    ///
    /// # Errors
    /// `back_end_unknown`, `server_taken_out`, `pool_has_no_back_ends`, `out_of_limit`; [`ServiceError::NotFound`].
    pub async fn set_weights(
        &self,
        caller: Caller,
        ws: &str,
        id: PoolId,
        request: Vec<SetBackEndWeight>,
    ) -> Result<Vec<BackEndView>, ServiceError> {
        let wanted: Vec<ServerId> = request.iter().map(|set| set.server).collect();
        check_calls(&wanted)?;
        let (pool, balancer, _) = self.real_pool(ws, id).await?;
        for set in &request {
            checked_weight(set.weight)?;
        }
        let steered = self.steering.alone(balancer.id).await;
        // In the load balancer's turn: an order that takes one out now sets its weight behind this.
        let mut decided = Txn::new();
        for set in &request {
            let store = &*self.store;
            let server = records::find::<Server>(store, &set.server.to_string()).await?;
            if let (Some((server, _)), true) = (server, set.weight > 0) {
                expect_in_service(store, id, &server).await?;
            }
            decided = decided.delete(owed_weight(id, set.server));
        }
        self.keep_weights(&caller, &pool, &request, decided).await?;
        if let Err(error) = self
            .steering
            .tell_weights(&steered, &balancer, id, &request)
            .await
        {
            tracing::info!(
                load_balancer = %balancer.id,
                error = &error as &dyn std::error::Error,
                "weights are kept; HAProxy is told when it can be reached"
            );
        }
        drop(steered);
        self.steering.look_again();
        self.back_ends(ws, id).await
    }

    /// Writes weights into the rows, `with` what else is to be so then.
    pub(super) async fn keep_weights(
        &self,
        caller: &Caller,
        pool: &Pool,
        request: &[SetBackEndWeight],
        with: Txn,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        records::change(store, caller, || async {
            let members = self.members_of(pool).await?;
            let mut txn = with.clone();
            for SetBackEndWeight { server, weight } in request {
                let member = members.iter().find(|member| member.server.id == *server);
                let member = member.ok_or_else(|| unknown(pool, *server))?;
                let key = keys::back_end(pool.id, *server);
                let row = match &member.row {
                    Some(row) => BackEnd {
                        weight: *weight,
                        ..row.clone()
                    },
                    None => BackEnd {
                        schema: BackEnd::SCHEMA,
                        pool: pool.id,
                        server: *server,
                        address: None,
                        port: None,
                        weight: *weight,
                        origin: Origin::Bound,
                    },
                };
                txn = txn.put(key, records::encode(&row));
            }
            Ok((txn, ()))
        })
        .await?;
        Ok(())
    }
}

fn unknown(pool: &Pool, server: ServerId) -> ServiceError {
    ServiceError::conflict(
        "back_end_unknown",
        format!("the server {server} is not behind the pool `{}`", pool.name),
        "attach it, or bind it to a service instance that names the pool",
    )
}

fn only_bound(pool: &Pool, server: ServerId) -> ServiceError {
    ServiceError::conflict(
        "back_end_bound",
        format!(
            "the server {server} is behind the pool `{}` because it is bound to a service instance",
            pool.name
        ),
        "unbind it, or set its weight to 0",
    )
}

/// Traffic of a server that an order has taken out is the order's to give back: it may not serve just now.
async fn expect_in_service(
    store: &dyn Store,
    pool: PoolId,
    server: &Server,
) -> Result<(), ServiceError> {
    let Some(id) = server.instance else {
        return Ok(());
    };
    let instance = records::find::<ServiceInstance>(store, &id.to_string()).await?;
    if !instance.is_some_and(|(instance, _)| instance.pools.contains(&pool)) {
        return Ok(());
    }
    let states = engine::states_of(store, id).await;
    let (states, _) =
        states.map_err(|error| ServiceError::internal("read the states of servers", error))?;
    let (why, mend) = match states.get(&server.id) {
        Some(ReleaseState::Releasing) => (
            format!(
                "an order has taken the server `{}` out, and gives it traffic again when it is done with it",
                server.name
            ),
            "wait for the order, or cancel it",
        ),
        Some(ReleaseState::Offline) => (
            format!("the server `{}` was taken offline", server.name),
            "bring it online with an operation",
        ),
        Some(
            ReleaseState::AwaitingRelease | ReleaseState::Released | ReleaseState::ReleaseFailed,
        )
        | None => return Ok(()),
    };
    Err(ServiceError::conflict("server_taken_out", why, mend))
}

fn checked_weight(weight: u32) -> Result<(), ServiceError> {
    check_weight(weight).map_err(|error| ServiceError::of_value(("weight", error)))
}

fn check_calls(servers: &[ServerId]) -> Result<(), ServiceError> {
    if servers.is_empty() || servers.len() > MAX_BACK_ENDS_PER_CALL {
        return Err(ServiceError::Limit {
            code: "out_of_limit",
            field: "servers".to_owned(),
            message: format!(
                "one call takes 1 to {MAX_BACK_ENDS_PER_CALL} servers, {} are given",
                servers.len()
            ),
            limit: MAX_BACK_ENDS_PER_CALL as u64,
            current: servers.len() as u64,
            mend: "name servers, and make several calls for more".to_owned(),
        });
    }
    let mut seen = BTreeSet::new();
    match servers.iter().find(|server| !seen.insert(**server)) {
        None => Ok(()),
        Some(twice) => Err(ServiceError::invalid(
            "server_twice",
            "servers",
            format!("the server {twice} stands twice"),
            "name each server once",
        )),
    }
}
