//! Pools: what stands behind the traffic seam. Members and their weights live with the pool's own back end.

use serde::{Deserialize, Serialize};

use crate::{
    id::PoolId,
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
}
