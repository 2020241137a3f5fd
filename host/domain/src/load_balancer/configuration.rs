//! What a load balancer is to run: everything that its agent needs, and nothing else.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{Balance, HealthCheck, HostPattern, Network, Protocol};
use crate::{
    digest::Digest,
    id::{CertificateId, ListenerId, LoadBalancerId, PoolId, ServerId},
    name::PathPrefix,
};

/// The desired state of one load balancer. A higher revision replaces a lower one; saying it again changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// Which.
    pub load_balancer: LoadBalancerId,
    /// Rises with every change.
    pub revision: u64,
    /// Listeners that are to run; none: HAProxy is to be stopped.
    pub listeners: Vec<ListenerConfig>,
}

/// A listener that is to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerConfig {
    /// Which.
    pub id: ListenerId,
    /// What is spoken.
    pub protocol: Protocol,
    /// Where.
    pub front_port: u16,
    /// How requests are shared out.
    pub balance: Balance,
    /// Whether servers are told the client's address.
    pub forwarded_for: bool,
    /// Whether a client stays with its server.
    pub sticky: bool,
    /// How servers are checked.
    pub health: HealthCheck,
    /// Peak bandwidth each way.
    pub peak_kbit_per_s: Option<u32>,
    /// Who may connect; `None`: all.
    pub access: Option<Vec<Network>>,
    /// Where everything goes that no group takes.
    pub back_end: BackEndConfig,
    /// Groups, in the order in which they are tried.
    pub groups: Vec<GroupConfig>,
}

/// A virtual server group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupConfig {
    /// Host names; none: any.
    pub hosts: Vec<HostPattern>,
    /// Beginnings of paths; none: any.
    pub paths: Vec<PathPrefix>,
    /// Its servers.
    pub back_end: BackEndConfig,
}

/// The servers of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackEndConfig {
    /// The pool.
    pub pool: PoolId,
    /// Its servers.
    pub members: Vec<MemberConfig>,
}

/// A server of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberConfig {
    /// Which.
    pub server: ServerId,
    /// Where it is reached.
    pub address: SocketAddr,
    /// 0 to 100.
    pub weight: u32,
}

impl ListenerConfig {
    /// The servers of its pools.
    pub fn back_ends(&self) -> impl Iterator<Item = &BackEndConfig> {
        std::iter::once(&self.back_end).chain(self.groups.iter().map(|group| &group.back_end))
    }

    /// As [`ListenerConfig::back_ends`].
    pub fn back_ends_mut(&mut self) -> impl Iterator<Item = &mut BackEndConfig> {
        std::iter::once(&mut self.back_end)
            .chain(self.groups.iter_mut().map(|group| &mut group.back_end))
    }
}

impl Configuration {
    /// A server of a pool.
    pub fn member_mut(&mut self, pool: PoolId, server: ServerId) -> Option<&mut MemberConfig> {
        self.listeners
            .iter_mut()
            .flat_map(ListenerConfig::back_ends_mut)
            .filter(|back_end| back_end.pool == pool)
            .flat_map(|back_end| &mut back_end.members)
            .find(|member| member.server == server)
    }

    /// What it is without its revision and its weights: two of the same structure differ in nothing that HAProxy has to be
    /// reloaded for.
    #[must_use]
    pub fn structure(&self) -> Self {
        let mut structure = self.clone();
        structure.revision = 0;
        for listener in &mut structure.listeners {
            for back_end in listener.back_ends_mut() {
                for member in &mut back_end.members {
                    member.weight = 0;
                }
            }
        }
        structure
    }

    /// The digest of the [structure](Self::structure).
    ///
    /// # Panics
    /// Never: a configuration has string keys.
    #[must_use]
    pub fn structure_digest(&self) -> Digest {
        let json = serde_json::to_vec(&self.structure());
        Digest::of(&json.expect("a configuration has string keys"))
    }

    /// Every server of every pool.
    pub fn members(&self) -> impl Iterator<Item = (PoolId, &MemberConfig)> {
        self.listeners
            .iter()
            .flat_map(ListenerConfig::back_ends)
            .flat_map(|back_end| {
                back_end
                    .members
                    .iter()
                    .map(move |member| (back_end.pool, member))
            })
    }

    /// The certificates that it shows.
    pub fn certificates(&self) -> impl Iterator<Item = CertificateId> {
        self.listeners
            .iter()
            .filter_map(|listener| match listener.protocol {
                Protocol::Https { certificate } => Some(certificate),
                Protocol::Http | Protocol::Tcp => None,
            })
    }
}
