//! What the list of plugins shows.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use windlass_domain::{
    digest::Digest,
    plugin::{Descriptor, PluginKind},
};

use crate::{
    error::Rejection,
    figures::{Failing, PluginFigures},
};

/// State of a plugin, or of a file that would be one.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum PluginState {
    /// Being compiled and checked.
    Loading,
    /// Can be planned with.
    Active,
    /// Provided by a file, and makes no new plans; running orders keep it.
    Disabled,
    /// No file provides it any more; running orders keep it.
    Retired,
    /// Not called at all any more; running orders block.
    Revoked,
    /// Not a plugin, for the given reason.
    Rejected,
}

/// One line of the list of plugins: a plugin, or a file that is loading or rejected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PluginStatus {
    /// The file that provides it; `None` when retired.
    pub file: Option<String>,
    /// SHA-256 of its bytes, once they were read.
    pub digest: Option<Digest>,
    /// Its state.
    pub state: PluginState,
    /// Why it is rejected.
    pub rejection: Option<Rejection>,
    /// Its kind, once it was accepted.
    pub kind: Option<PluginKind>,
    /// What it says of itself, once it was accepted.
    #[schema(value_type = Option<Descriptor>)]
    pub descriptor: Option<Arc<Descriptor>>,
    /// Whether it is what its bare name stands for.
    pub is_default: bool,
    /// Why the default of this name is not its highest version, for example `pinned to 1.2.0 by promotion of stack@1.2.0`;
    /// `null` when the name is not pinned.
    pub pin: Option<String>,
    /// Whether its wishes are granted; true when it has none.
    pub approved: bool,
    /// Size in bytes, once they were read.
    pub size_bytes: Option<u64>,
    /// Name of the key that signed it.
    pub signed_by: Option<String>,
    /// How it failed again and again, until an operator clears it or disables the version. It is called all the same.
    pub failing: Option<Failing>,
    /// Figures of its calls since the server started, once it was accepted.
    pub figures: Option<PluginFigures>,
}
