//! What the platform asks the agent of a server that hosts load balancers, and what it is answered.
//!
//! The configuration is a desired state with a revision: saying it again changes nothing, an older one never replaces a newer
//! one, so it is asked as a query and not run as a task. The agent keeps the last one that HAProxy took, and keeps HAProxy
//! running on it, with or without a session. Source: spec "Load balancers".

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use windlass_domain::{
    id::{CertificateId, LoadBalancerId, PoolId, ServerId},
    load_balancer::Configuration,
    pool::MemberStats,
};

use crate::secret::SecretText;

/// Something to do with one load balancer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "snake_case")]
pub enum BalancerRequest {
    /// Be like this. Answered with the state, whose revision is a higher one where the agent has that already.
    Apply {
        /// The desired state.
        configuration: Box<Configuration>,
        /// Each certificate that it shows: chain and private key, PEM.
        certificates: BTreeMap<CertificateId, SecretText>,
    },
    /// Set weights now and keep them; they are read back into the state that is answered.
    SetWeights {
        /// Which.
        load_balancer: LoadBalancerId,
        /// Absolute weights.
        weights: Vec<MemberWeight>,
    },
    /// Look.
    State {
        /// Which.
        load_balancer: LoadBalancerId,
    },
    /// End it, and forget it.
    Remove {
        /// Which.
        load_balancer: LoadBalancerId,
    },
    /// A request of a later version.
    #[serde(other)]
    Unknown,
}

/// A weight to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberWeight {
    /// The pool.
    pub pool: PoolId,
    /// Its member.
    pub server: ServerId,
    /// 0 to 100.
    pub weight: u32,
}

/// A load balancer as HAProxy shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalancerState {
    /// The revision that it runs; `None`: nothing was applied.
    pub revision: Option<u64>,
    /// Whether HAProxy runs.
    pub running: bool,
    /// For people, when it does not, though it should: why.
    pub message: String,
    /// Former processes that still serve connections after a reload.
    pub old_processes: u32,
    /// Servers of all pools.
    pub members: Vec<MemberState>,
}

/// A server of a pool as HAProxy shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberState {
    /// The pool.
    pub pool: PoolId,
    /// Weight, health, counters.
    pub stats: MemberStats,
    /// What the last check said, for people.
    pub check: String,
}
