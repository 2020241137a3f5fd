//! What is kept of the rollback of a stage, and of the traffic that people change. What they do is the reducer's.

use serde::{Deserialize, Serialize};

use crate::{
    id::{OrderId, ServerId},
    plan::NodeIndex,
};

/// Where the rollback of one stage is. While there is one, nothing starts in the stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum StageRollback {
    /// What is under way in the stage is being ended.
    Ending {
        /// Why it is rolled back.
        reason: String,
    },
    /// Nothing is under way any more: its rollback order is to be made.
    Due {
        /// Why it is rolled back.
        reason: String,
    },
    /// Its rollback order is under way.
    Running {
        /// That order.
        order: OrderId,
    },
    /// It is as it was before. A person runs it again, or goes on without it.
    Done,
    /// It could not be brought back: a person tries again.
    Failed {
        /// Why.
        message: String,
    },
}

impl StageRollback {
    /// Whether it goes on by itself.
    #[must_use]
    pub const fn is_under_way(&self) -> bool {
        match self {
            Self::Ending { .. } | Self::Due { .. } | Self::Running { .. } => true,
            Self::Done | Self::Failed { .. } => false,
        }
    }
}

/// A server and its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServerWeight {
    /// The server.
    pub server: ServerId,
    /// 0 to 100.
    pub weight: u32,
}

/// What a person changes of an order's traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrafficChange {
    /// These servers get these weights in every pool of the applications that were released on them.
    Weights(Vec<ServerWeight>),
    /// The servers of one cell get a share of every pool's traffic.
    Cell {
        /// The cell's identifier.
        cell: String,
        /// The share, 0 to 50.
        percent: u32,
    },
}

/// The last change of traffic by a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TrafficEdit {
    /// Counts them, from 1.
    pub number: u32,
    /// The stage that it belongs to, whose rollback takes it back; 0: the order.
    pub scope: NodeIndex,
    /// What is changed.
    pub change: TrafficChange,
    /// How far it is.
    pub state: EditState,
}

/// How far a change of traffic is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EditState {
    /// Being made.
    Due,
    /// Made, and read back.
    Done,
    /// Refused by the safety envelope, or a pool failed: why.
    Failed(String),
}
