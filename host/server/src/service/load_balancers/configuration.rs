//! What a load balancer is to run, made of the rows as they are now.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use windlass_domain::{
    address::refuse_reported,
    id::{PoolId, ServerId},
    instance::{Binding, ServiceInstance},
    load_balancer::{
        BackEnd, BackEndConfig, Configuration, GroupConfig, Listener, ListenerConfig, LoadBalancer,
        MAX_WEIGHT, MemberConfig, Origin, Power,
    },
    name::ServerName,
    pool::{Pool, PoolKind},
    server::Server,
};
use windlass_store::Store;

use super::listeners;
use crate::{
    keys::{self, Kind},
    service::{ServiceError, records},
};

/// A server behind a pool.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub(super) server: Server,
    pub(super) origin: Origin,
    pub(super) weight: u32,
    /// What is kept of it.
    pub(super) row: Option<BackEnd>,
}

impl Member {
    /// Where it is reached; `None`: its agent reports no address, and none was given.
    pub(super) fn address(&self, listener: &Listener) -> Option<SocketAddr> {
        let given = self.row.as_ref().and_then(|row| row.address);
        let address = given.or_else(|| first_address(&self.server))?;
        let port = self.row.as_ref().and_then(|row| row.port);
        Some(SocketAddr::new(
            address,
            port.unwrap_or(listener.settings.back_port),
        ))
    }
}

/// The first address that the agent reports, IPv4 before IPv6.
pub(super) fn first_address(server: &Server) -> Option<IpAddr> {
    let addresses: Vec<IpAddr> = server
        .facts
        .addresses
        .iter()
        .filter_map(|address| address.parse().ok())
        // What an earlier version stored is judged as well.
        .filter(|address| refuse_reported(*address).is_none())
        .collect();
    let v4 = addresses.iter().find(|address| address.is_ipv4());
    v4.or_else(|| addresses.first()).copied()
}

/// The servers that are bound to service instances of a workspace, by the pools that these name.
pub(super) async fn bound(
    store: &dyn Store,
    ws: &str,
) -> Result<BTreeMap<PoolId, BTreeSet<ServerId>>, ServiceError> {
    let mut bound: BTreeMap<PoolId, BTreeSet<ServerId>> = BTreeMap::new();
    let below = keys::all_of_workspace(Kind::Instance, ws);
    for instance in records::all_indexed::<ServiceInstance>(store, &below).await? {
        if instance.pools.is_empty() {
            continue;
        }
        for entry in records::all(store, &keys::bindings(instance.id)).await? {
            let binding: Binding = records::decode_plain(&entry, "a binding")?;
            for pool in &instance.pools {
                bound.entry(*pool).or_default().insert(binding.server);
            }
        }
    }
    Ok(bound)
}

/// The servers behind a pool, oldest first; rows that stand for nothing any more are left out.
pub(super) async fn members(
    store: &dyn Store,
    pool: PoolId,
    bound: &BTreeSet<ServerId>,
) -> Result<Vec<Member>, ServiceError> {
    let mut rows: BTreeMap<ServerId, BackEnd> = BTreeMap::new();
    for entry in records::all(store, &keys::back_ends(pool)).await? {
        let row: BackEnd = records::decode_plain(&entry, "a back end")?;
        rows.insert(row.server, row);
    }
    let attached = rows
        .values()
        .filter(|row| row.origin == Origin::Attached)
        .map(|row| row.server);
    let all: BTreeSet<ServerId> = bound.iter().copied().chain(attached).collect();
    let mut members = Vec::with_capacity(all.len());
    for id in all {
        let Some((server, _)) = records::find::<Server>(store, &id.to_string()).await? else {
            continue;
        };
        let row = rows.remove(&id);
        members.push(Member {
            server,
            origin: row.as_ref().map_or(Origin::Bound, |row| row.origin),
            weight: row.as_ref().map_or(MAX_WEIGHT, |row| row.weight),
            row,
        });
    }
    Ok(members)
}

/// A server behind a pool, as far as a plan counts on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::service) struct Behind {
    pub(in crate::service) server: ServerId,
    pub(in crate::service) name: ServerName,
    /// Where it is reached; `None`: the first address that its agent reports.
    pub(in crate::service) address: Option<IpAddr>,
    /// Its port; `None`: the listener's.
    pub(in crate::service) port: Option<u16>,
}

/// The servers behind those of the pools that are of load balancers, each pool once.
pub(in crate::service) async fn behind(
    store: &dyn Store,
    ws: &str,
    pools: BTreeSet<PoolId>,
) -> Result<Vec<(Pool, Vec<Behind>)>, ServiceError> {
    let mut real = Vec::new();
    for id in pools {
        let found = records::find::<Pool>(store, &id.to_string()).await?;
        match found.map(|(pool, _)| (pool.kind, pool)) {
            Some((PoolKind::LoadBalancer { .. }, pool)) => real.push(pool),
            Some((PoolKind::Simulated, _)) | None => {}
        }
    }
    if real.is_empty() {
        return Ok(Vec::new());
    }
    let mut bound = bound(store, ws).await?;
    let mut found = Vec::with_capacity(real.len());
    for pool in real {
        let bound = bound.remove(&pool.id).unwrap_or_default();
        let members = members(store, pool.id, &bound).await?;
        let members = members
            .into_iter()
            .map(|member| Behind {
                server: member.server.id,
                name: member.server.name,
                address: member.row.as_ref().and_then(|row| row.address),
                port: member.row.as_ref().and_then(|row| row.port),
            })
            .collect();
        found.push((pool, members));
    }
    Ok(found)
}

/// What a load balancer is to run. Its revision is the caller's to set.
pub(super) async fn of(
    store: &dyn Store,
    balancer: &LoadBalancer,
) -> Result<Configuration, ServiceError> {
    let mut configuration = Configuration {
        load_balancer: balancer.id,
        revision: 0,
        listeners: Vec::new(),
    };
    match balancer.power {
        Power::Started => {}
        Power::Stopped => return Ok(configuration),
    }
    let bound = bound(store, balancer.workspace.as_str()).await?;
    for listener in listeners::all_of(store, balancer.id).await? {
        match listener.power {
            Power::Started => {}
            Power::Stopped => continue,
        }
        let mut back_ends = Vec::new();
        for pool in listener.pools() {
            let none = BTreeSet::new();
            let members = members(store, pool, bound.get(&pool).unwrap_or(&none)).await?;
            let members = members
                .iter()
                .filter_map(|member| {
                    Some(MemberConfig {
                        server: member.server.id,
                        address: member.address(&listener)?,
                        weight: member.weight,
                    })
                })
                .collect();
            back_ends.push(BackEndConfig { pool, members });
        }
        let mut back_ends = back_ends.into_iter();
        let Some(back_end) = back_ends.next() else {
            continue;
        };
        let groups = listener
            .groups
            .iter()
            .zip(back_ends)
            .map(|(group, back_end)| GroupConfig {
                hosts: group.hosts.clone(),
                paths: group.paths.clone(),
                back_end,
            })
            .collect();
        let settings = listener.settings.clone();
        configuration.listeners.push(ListenerConfig {
            id: listener.id,
            protocol: settings.protocol,
            front_port: settings.front_port,
            balance: settings.balance,
            forwarded_for: settings.forwarded_for,
            sticky: settings.sticky,
            health: settings.health,
            peak_kbit_per_s: settings.peak_kbit_per_s,
            access: settings.access,
            back_end,
            groups,
        });
    }
    Ok(configuration)
}
