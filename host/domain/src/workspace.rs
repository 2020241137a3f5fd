//! Workspaces, with their cells and deployment zones.
//!
//! A workspace is one row that holds its cells, so that the rules between zones, cells and deployment zones are kept by one
//! compare-and-swap. Source: spec "Workspaces".

use std::{net::Ipv4Addr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    name::{CellName, InvalidValue, WorkspaceName, ZoneName, check_length},
    time::Timestamp,
};

/// Zones of a workspace at most (default of a setting).
pub const MAX_ZONES: usize = 2;
/// Largest package by default, in bytes. Source: spec "Packages".
pub const DEFAULT_PACKAGE_LIMIT_BYTES: u64 = 200_000_000;
/// Largest package that a workspace can be set to allow, in bytes.
pub const MAX_PACKAGE_LIMIT_BYTES: u64 = 300_000_000;

/// All packages of a workspace together by default, in bytes: 20 GiB.
pub const DEFAULT_UPLOAD_QUOTA_BYTES: u64 = 20 << 30;
/// The largest quota that a workspace can be set to, in bytes: 1 PiB.
pub const MAX_UPLOAD_QUOTA_BYTES: u64 = 1 << 50;

/// A set of resources with one network and one security policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Workspace {
    /// Schema version of this record.
    pub schema: u32,
    /// Identifier: globally unique, never changes.
    pub name: WorkspaceName,
    /// Name for people, 1 to 60 characters.
    pub display_name: String,
    /// Region.
    pub region: ZoneName,
    /// Zones, at most two.
    pub zones: Vec<ZoneName>,
    /// Private network, for example `10.2.0.0/16`; never changes.
    pub network: String,
    /// Kind.
    #[serde(default)]
    pub kind: WorkspaceKind,
    /// Cells; never deleted.
    pub cells: Vec<Cell>,
    /// Largest package, in bytes: 1 to 300,000,000.
    #[serde(default = "default_package_limit")]
    pub package_limit_bytes: u64,
    /// Quota for all packages of the workspace together, in bytes: 1 to 2^50. Default: 21,474,836,480 (20 GiB).
    #[serde(default = "default_upload_quota")]
    pub upload_quota_bytes: u64,
    /// When it was made.
    pub created_at: Timestamp,
}

fn default_package_limit() -> u64 {
    DEFAULT_PACKAGE_LIMIT_BYTES
}

fn default_upload_quota() -> u64 {
    DEFAULT_UPLOAD_QUOTA_BYTES
}

/// Kind of a workspace. A unitized group is a set of standard workspaces; it comes later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkspaceKind {
    /// A workspace of its own.
    #[default]
    Standard,
}

/// A communication boundary inside a workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Cell {
    /// Identifier, unique in the workspace; never changes.
    pub name: CellName,
    /// Name for people.
    pub display_name: String,
    /// The deployment zone it belongs to: `a` or `b`.
    pub deployment_zone: DeploymentZone,
    /// Zones bound to it.
    pub zones: Vec<ZoneName>,
}

/// Fault-domain division of a workspace's zones; there are at most two.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum DeploymentZone {
    /// The first.
    A,
    /// The second.
    B,
}

impl Workspace {
    /// The current [`Workspace::schema`].
    pub const SCHEMA: u32 = 1;

    /// The cells that a new workspace gets: one per zone, each in a deployment zone of its own.
    #[must_use]
    pub fn first_cells(zones: &[ZoneName]) -> Vec<Cell> {
        [DeploymentZone::A, DeploymentZone::B]
            .into_iter()
            .zip(["cell-a", "cell-b"])
            .zip(zones)
            .filter_map(|((deployment_zone, name), zone)| {
                Some(Cell {
                    name: name.parse().ok()?,
                    display_name: name.to_owned(),
                    deployment_zone,
                    zones: vec![zone.clone()],
                })
            })
            .collect()
    }

    /// The cell with this identifier.
    #[must_use]
    pub fn cell(&self, name: &CellName) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.name == *name)
    }

    /// Checks everything that has rules: zones, cells, network, texts, limits.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn validate(&self) -> Result<(), (&'static str, InvalidValue)> {
        check_length("the display name", &self.display_name, 1, 60)
            .map_err(|error| ("display_name", error))?;
        if self.zones.is_empty() || self.zones.len() > MAX_ZONES {
            return Err((
                "zones",
                InvalidValue::limit(
                    format!(
                        "a workspace has 1 to {MAX_ZONES} zones, {} are given",
                        self.zones.len()
                    ),
                    MAX_ZONES as u64,
                    self.zones.len() as u64,
                ),
            ));
        }
        if let Some(zone) = repeated(&self.zones) {
            return Err((
                "zones",
                InvalidValue::rule(format!("the zone `{zone}` stands twice")),
            ));
        }
        let network: Network = self.network.parse().map_err(|error| ("network", error))?;
        network
            .check_private()
            .map_err(|error| ("network", error))?;
        if self.package_limit_bytes == 0 || self.package_limit_bytes > MAX_PACKAGE_LIMIT_BYTES {
            return Err((
                "package_limit_bytes",
                InvalidValue::limit(
                    format!("the package limit is 1 to {MAX_PACKAGE_LIMIT_BYTES} bytes"),
                    MAX_PACKAGE_LIMIT_BYTES,
                    self.package_limit_bytes,
                ),
            ));
        }
        if self.upload_quota_bytes == 0 || self.upload_quota_bytes > MAX_UPLOAD_QUOTA_BYTES {
            return Err((
                "upload_quota_bytes",
                InvalidValue::limit(
                    format!("the upload quota must be 1 to {MAX_UPLOAD_QUOTA_BYTES} bytes"),
                    MAX_UPLOAD_QUOTA_BYTES,
                    self.upload_quota_bytes,
                ),
            ));
        }
        self.validate_cells().map_err(|error| ("cells", error))
    }

    fn validate_cells(&self) -> Result<(), InvalidValue> {
        let names: Vec<_> = self.cells.iter().map(|cell| cell.name.clone()).collect();
        if let Some(name) = repeated(&names) {
            return Err(InvalidValue::rule(format!(
                "the cell `{name}` exists already"
            )));
        }
        for cell in &self.cells {
            check_length("the display name of a cell", &cell.display_name, 1, 60)?;
            for zone in &cell.zones {
                if !self.zones.contains(zone) {
                    return Err(InvalidValue::rule(format!(
                        "the cell `{}` names the zone `{zone}`, which the workspace does not have",
                        cell.name
                    )));
                }
                if let Some(other) = self.cells.iter().find(|other| {
                    other.deployment_zone != cell.deployment_zone && other.zones.contains(zone)
                }) {
                    return Err(InvalidValue::rule(format!(
                        "the zone `{zone}` would be in two deployment zones: of the cells `{}` and `{}`",
                        cell.name, other.name
                    )));
                }
            }
        }
        Ok(())
    }
}

fn repeated<T: PartialEq>(items: &[T]) -> Option<&T> {
    items
        .iter()
        .enumerate()
        .find(|(index, item)| items[..*index].contains(item))
        .map(|(_, item)| item)
}

/// An IPv4 network in CIDR form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    base: u32,
    prefix_bits: u8,
}

impl Network {
    /// Whether `other` lies in this network.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.prefix_bits <= other.prefix_bits && other.base & mask(self.prefix_bits) == self.base
    }

    /// Whether an address lies in this network.
    #[must_use]
    pub fn holds(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.prefix_bits) == self.base
    }

    /// Private networks that a workspace can have. Source: spec "Workspaces", "Network". A subset has a prefix of at most 29.
    ///
    /// # Errors
    /// [`InvalidValue`] that lists them.
    pub fn check_private(self) -> Result<(), InvalidValue> {
        let allowed = [
            "10.0.0.0/9",
            "10.2.0.0/16",
            "172.16.0.0/12",
            "192.168.0.0/16",
        ];
        if self.prefix_bits <= 29
            && allowed
                .iter()
                .filter_map(|network| network.parse::<Self>().ok())
                .any(|network| network.contains(self))
        {
            return Ok(());
        }
        Err(InvalidValue::rule(format!(
            "the network must be one of {} or a subset with a prefix of at most 29",
            allowed.join(", ")
        )))
    }
}

fn mask(prefix_bits: u8) -> u32 {
    u32::MAX
        .checked_shl(32 - u32::from(prefix_bits))
        .unwrap_or(0)
}

impl FromStr for Network {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || {
            InvalidValue::rule(format!(
                "`{}` is not an IPv4 network: expected for example `10.2.0.0/16`, with no bit set behind the prefix",
                text.chars().take(40).collect::<String>()
            ))
        };
        let (address, prefix) = text.split_once('/').ok_or_else(invalid)?;
        let base = u32::from(address.parse::<Ipv4Addr>().map_err(|_| invalid())?);
        let prefix_bits: u8 = prefix.parse().map_err(|_| invalid())?;
        if prefix_bits > 32 || base & !mask(prefix_bits) != 0 {
            return Err(invalid());
        }
        Ok(Self { base, prefix_bits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workspace(zones: &[&str], network: &str) -> Workspace {
        let zones: Vec<ZoneName> = zones.iter().map(|zone| zone.parse().unwrap()).collect();
        Workspace {
            schema: Workspace::SCHEMA,
            name: "test".parse().unwrap(),
            display_name: "Test".into(),
            region: "here".parse().unwrap(),
            cells: Workspace::first_cells(&zones),
            zones,
            network: network.into(),
            kind: WorkspaceKind::Standard,
            package_limit_bytes: DEFAULT_PACKAGE_LIMIT_BYTES,
            upload_quota_bytes: DEFAULT_UPLOAD_QUOTA_BYTES,
            created_at: Timestamp::default(),
        }
    }

    #[test]
    fn networks_in_and_out_of_the_private_ranges() {
        for (network, good) in [
            ("10.0.0.0/9", true),
            ("10.2.0.0/16", true),
            ("10.127.255.248/29", true),
            ("172.16.0.0/12", true),
            ("192.168.0.0/16", true),
            ("192.168.0.0/30", false),
            ("10.0.0.0/8", false),
            ("10.128.0.0/9", false),
            ("172.32.0.0/12", false),
            ("8.8.8.0/24", false),
            ("10.2.0.1/16", false),
            ("10.2.0.0", false),
            ("0.0.0.0/0", false),
            ("x", false),
        ] {
            assert_eq!(
                workspace(&["z1"], network).validate().is_ok(),
                good,
                "{network}"
            );
        }
    }

    #[test]
    fn two_zones_give_two_cells_in_two_deployment_zones() {
        let workspace = workspace(&["z1", "z2"], "10.2.0.0/16");
        assert_eq!(workspace.validate(), Ok(()));
        assert_eq!(workspace.cells.len(), 2);
        assert_ne!(
            workspace.cells[0].deployment_zone,
            workspace.cells[1].deployment_zone
        );
    }

    #[test]
    fn wrong_zones_and_cells_are_refused_with_their_field() {
        let field = |workspace: &Workspace| workspace.validate().unwrap_err().0;
        assert_eq!(field(&workspace(&[], "10.2.0.0/16")), "zones");
        assert_eq!(field(&workspace(&["a", "b", "c"], "10.2.0.0/16")), "zones");
        assert_eq!(field(&workspace(&["a", "a"], "10.2.0.0/16")), "zones");
        let mut both = workspace(&["a", "b"], "10.2.0.0/16");
        both.cells[0].zones.push("b".parse().unwrap());
        assert_eq!(field(&both), "cells");
        let mut large = workspace(&["a"], "10.2.0.0/16");
        large.package_limit_bytes = MAX_PACKAGE_LIMIT_BYTES + 1;
        assert_eq!(field(&large), "package_limit_bytes");
        for bytes in [0, MAX_UPLOAD_QUOTA_BYTES + 1] {
            let mut quota = workspace(&["zone-a"], "10.2.0.0/16");
            quota.upload_quota_bytes = bytes;
            assert_eq!(field(&quota), "upload_quota_bytes");
        }
    }
}
