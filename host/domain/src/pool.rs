//! Pools: what stands behind the traffic seam. Members and their weights live with the pool's own back end.

use serde::{Deserialize, Serialize};

use crate::{
    id::{ListenerId, LoadBalancerId, PoolId, ServerId},
    name::{PoolName, WorkspaceName},
    time::Timestamp,
};

/// A pool of back ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Pool {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: PoolId,
    /// Name: unique in the workspace.
    pub name: PoolName,
    /// Workspace.
    pub workspace: WorkspaceName,
    /// What it is made of.
    pub kind: PoolKind,
    /// When it was made.
    pub created_at: Timestamp,
}

impl Pool {
    /// The current [`Pool::schema`].
    pub const SCHEMA: u32 = 1;
}

/// What a pool is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PoolKind {
    /// Keeps weights durably and sends no traffic.
    #[default]
    Simulated,
    /// The servers of a listener, or of one of its virtual server groups: made and deleted with it.
    LoadBalancer {
        /// The load balancer.
        load_balancer: LoadBalancerId,
        /// The listener.
        listener: ListenerId,
    },
}

/// What a pool knows of one of its members, as its back end counts it.
///
/// Counters rise from the moment a member was first seen; they begin again at 0 when what counts them was started anew, so
/// a reader that compares two looks takes a lower figure as nothing ([`Counted::since`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MemberStats {
    /// The member.
    pub server: ServerId,
    /// Weight, 0 to 100.
    pub weight: u32,
    /// What the pool's own health check says.
    pub health: MemberHealth,
    /// Requests (HTTP) or connections (TCP) that are under way.
    pub sessions: u32,
    /// Requests or connections that were given to it.
    pub requests: u64,
    /// Of them: answered with a status from 500 on, broken off by the server, or never connected.
    pub errors: u64,
    /// Connections to it that were tried again.
    pub retries: u64,
    /// Requests that were given to another member because it could not be connected to.
    pub redispatches: u64,
    /// Mean time until its answer began, over about the last 500 requests, in milliseconds; `None`: not measured.
    pub latency_ms: Option<u32>,
    /// Answers whose time was measured.
    #[serde(default)]
    pub responses: Responses,
}

/// Answers, and what they took together. Rise like the other counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Responses {
    /// How many; 0: none was measured.
    pub count: u64,
    /// The times until each began, in microseconds, as near as the back end says: HAProxy's figures are off by up to half a
    /// second in sum.
    pub total_us: i64,
}

impl Responses {
    /// Those since an earlier look. A count that fell has begun anew, when the agent was started.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        if self.count < earlier.count {
            return self;
        }
        Self {
            count: self.count - earlier.count,
            total_us: self.total_us - earlier.total_us,
        }
    }
}

/// What a pool's own health check says of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemberHealth {
    /// It answers.
    Up,
    /// It does not: it gets no traffic whatever its weight.
    Down,
    /// The pool has no check, or has not checked yet.
    #[default]
    Unchecked,
}

/// What a member did: so far, or between two looks at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counted {
    /// Requests.
    pub requests: u64,
    /// Errors among them.
    pub errors: u64,
    /// Answers that were measured.
    pub responses: Responses,
}

impl Counted {
    /// What was counted since an earlier look. A counter that fell has begun anew, nobody knows when: that counts as nothing.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        let responses = self.responses.since(earlier.responses);
        if self.requests < earlier.requests || self.errors < earlier.errors {
            return Self {
                requests: 0,
                errors: 0,
                responses,
            };
        }
        Self {
            requests: self.requests - earlier.requests,
            errors: self.errors - earlier.errors,
            responses,
        }
    }
}

impl MemberStats {
    /// What it did so far.
    #[must_use]
    pub const fn counted(&self) -> Counted {
        Counted {
            requests: self.requests,
            errors: self.errors,
            responses: self.responses,
        }
    }

    /// Whether it takes new requests: with weight, and not down.
    #[must_use]
    pub const fn serves(&self) -> bool {
        self.weight > 0
            && match self.health {
                MemberHealth::Up | MemberHealth::Unchecked => true,
                MemberHealth::Down => false,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(requests: u64, errors: u64) -> MemberStats {
        MemberStats {
            server: ServerId::from_uuid(uuid::Uuid::from_u128(1)),
            weight: 100,
            health: MemberHealth::Up,
            sessions: 0,
            requests,
            errors,
            retries: 0,
            redispatches: 0,
            latency_ms: None,
            responses: Responses::default(),
        }
    }

    #[test]
    fn counters_are_compared_also_when_they_began_anew() {
        for (earlier, later, expect) in [
            ((10, 1), (15, 3), (5, 2)),
            ((10, 1), (10, 1), (0, 0)),
            ((10, 1), (4, 0), (0, 0)),
            ((10, 3), (12, 0), (0, 0)),
        ] {
            let counted = |(requests, errors)| stats(requests, errors).counted();
            let counted = counted(later).since(counted(earlier));
            assert_eq!((counted.requests, counted.errors), expect);
        }
        let answers = |count, total_us| Responses { count, total_us };
        for (earlier, later, expect) in [
            (answers(10, 500), answers(12, 900), answers(2, 400)),
            (answers(10, 500), answers(3, 40), answers(3, 40)),
        ] {
            assert_eq!(later.since(earlier), expect);
        }
    }

    #[test]
    fn a_member_serves_with_weight_unless_it_is_down() {
        for (weight, health, serves) in [
            (100, MemberHealth::Up, true),
            (1, MemberHealth::Unchecked, true),
            (100, MemberHealth::Down, false),
            (0, MemberHealth::Up, false),
        ] {
            let member = MemberStats {
                weight,
                health,
                ..stats(0, 0)
            };
            assert_eq!(member.serves(), serves, "{member:?}");
        }
    }
}
