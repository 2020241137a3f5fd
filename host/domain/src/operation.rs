//! Operations on applications as they are installed: restart, offline, online, initialisation of servers.
//!
//! Owns which servers an operation is for, with the reason where one is not. Source: spec "Application operations".

use serde::{Deserialize, Serialize};

use crate::{
    id::{InstanceId, ServerId},
    limits::Limits,
    server::ReleaseState,
};

/// What is done to the servers of an application. JSON: `{"kind": "online", "initial_weight": 50}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Operation {
    /// Stop and start the application's process (not the machine), out of traffic.
    Restart,
    /// Start what was taken offline, or what a release left broken.
    Online {
        /// Its weight afterwards, 0 to 100.
        #[serde(default = "full")]
        initial_weight: u32,
    },
    /// Take it out of traffic and stop it. It stays so until it is brought online or released again.
    Offline,
    /// Prepare the servers for the tech stack again.
    Initialise,
}

const fn full() -> u32 {
    100
}

/// What is asked for. JSON: `{"title": …, "operation": {"kind": "restart"}, "targets": [{"instance": …}]}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OperationSpec {
    /// 1 to 50 characters.
    pub title: String,
    /// What is done.
    pub operation: Operation,
    /// The strategy plugin: `name` for its default version or `name@version`.
    #[serde(default = "grouped")]
    pub strategy: String,
    /// The strategy's parameters, valid against its schema.
    #[serde(default = "empty_object")]
    pub parameters: serde_json::Value,
    /// Of which applications.
    pub targets: Vec<OperationTarget>,
    /// The safety envelope.
    #[serde(default)]
    pub limits: Limits,
    /// How long to wait for connections to end after a weight was set to 0, in milliseconds. Default 30 s.
    #[serde(default = "drain_deadline")]
    pub drain_deadline_ms: u64,
    /// How long a task may wait for its server before it is not started any more, in milliseconds. Default 10 min.
    #[serde(default = "delivery_deadline")]
    pub delivery_deadline_ms: u64,
}

/// One service instance of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OperationTarget {
    /// The service instance.
    pub instance: InstanceId,
    /// Only servers of these cells (identifiers); empty: of all.
    #[serde(default)]
    pub cells: Vec<String>,
    /// Only these of its servers; empty: all.
    #[serde(default)]
    pub servers: Vec<ServerId>,
}

fn grouped() -> String {
    "grouped".to_owned()
}

fn empty_object() -> serde_json::Value {
    serde_json::Value::Object(serde_json::Map::new())
}

const fn drain_deadline() -> u64 {
    30_000
}

const fn delivery_deadline() -> u64 {
    600_000
}

/// What decides whether a server can take part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// How releases and operations left it.
    pub state: ReleaseState,
    /// Whether something is installed on it.
    pub installed: bool,
    /// Whether its agent is connected.
    pub online: bool,
}

impl Operation {
    /// What people call it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Online { .. } => "online",
            Self::Offline => "offline",
            Self::Initialise => "initialise",
        }
    }

    /// Why a server cannot take part; `None`: it can.
    #[must_use]
    pub const fn refuses(&self, server: Standing) -> Option<&'static str> {
        if !server.online {
            return Some("its agent is not connected");
        }
        if matches!(server.state, ReleaseState::Releasing) {
            return Some("an order works on it");
        }
        let works_on_installed = match self {
            Self::Restart | Self::Online { .. } | Self::Offline => true,
            Self::Initialise => false,
        };
        if works_on_installed && !server.installed {
            return Some("nothing is installed on it: release to it first");
        }
        match (self, server.state) {
            (Self::Restart, ReleaseState::Offline) => {
                Some("it is offline: bring it online instead")
            }
            (Self::Online { .. }, ReleaseState::Released) => Some("it is online already"),
            (Self::Offline, ReleaseState::Offline) => Some("it is offline already"),
            (
                Self::Restart | Self::Online { .. } | Self::Offline | Self::Initialise,
                ReleaseState::AwaitingRelease
                | ReleaseState::Releasing
                | ReleaseState::Released
                | ReleaseState::ReleaseFailed
                | ReleaseState::Offline,
            ) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_operation_is_for_some_servers() {
        use ReleaseState as S;
        let states = [
            S::AwaitingRelease,
            S::Releasing,
            S::Released,
            S::ReleaseFailed,
            S::Offline,
        ];
        // In the order of the states: with something installed, then without.
        for (operation, installed, bare) in [
            (Operation::Restart, "y-yy-", "-----"),
            (Operation::Online { initial_weight: 5 }, "y--yy", "-----"),
            (Operation::Offline, "y-yy-", "-----"),
            (Operation::Initialise, "y-yyy", "y-yyy"),
        ] {
            for (expect, installed) in [(installed, true), (bare, false)] {
                let found: String = states
                    .iter()
                    .map(|state| {
                        let standing = Standing {
                            state: *state,
                            installed,
                            online: true,
                        };
                        let away = Standing {
                            online: false,
                            ..standing
                        };
                        assert!(operation.refuses(away).is_some());
                        match operation.refuses(standing) {
                            None => 'y',
                            Some(_) => '-',
                        }
                    })
                    .collect();
                assert_eq!(found, expect, "{operation:?}, installed: {installed}");
            }
        }
    }
}
