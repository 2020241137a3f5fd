//! Operations on applications as they are installed: restart, offline, online, static files, initialisation.
//!
//! Source: spec "Application operations".

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

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
    /// Replace a directory with the content of an archive.
    StaticFiles(StaticFiles),
    /// Prepare the servers for the tech stack again.
    Initialise,
}

/// Files for a directory of each server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StaticFiles {
    /// Where the archive is: `http://` or `https://`, a `.tar.gz`.
    pub url: String,
    /// SHA-256 that it must have; without one, whatever is there is taken.
    #[serde(default)]
    pub sha256: Option<Digest>,
    /// The directory that is replaced: starts and ends with `/`.
    pub directory: String,
    /// OS user that the files belong to.
    #[serde(default = "root")]
    pub user: String,
}

const fn full() -> u32 {
    100
}

fn root() -> String {
    "root".to_owned()
}
