//! Workspaces with their cells. Source: spec "Workspaces".
//!
//! A workspace is one row, cells inside: its rules are kept by one compare-and-swap. A cell is never deleted; a zone that was
//! added later has no cell until one is given to it, and nothing can be released to servers there.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use windlass_domain::{
    certificate::Certificate,
    instance::ServiceInstance,
    load_balancer::LoadBalancer,
    name::{CellName, WorkspaceName, ZoneName},
    notification::Channel,
    package::Package,
    pool::Pool,
    server::Server,
    template::ProcessTemplate,
    workspace::{
        Cell, DEFAULT_PACKAGE_LIMIT_BYTES, DEFAULT_UPLOAD_QUOTA_BYTES, DeploymentZone, Workspace,
        WorkspaceKind,
    },
};
use windlass_store::{Revision, Store, retention};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    records::{self, Sort},
};
use crate::{
    clock,
    keys::{self, Kind},
};

/// A workspace to be made. Its first cells are made from its zones: `cell-a` in deployment zone a, `cell-b` in b.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateWorkspace {
    /// Identifier: unique, never changes.
    pub name: WorkspaceName,
    /// Name for people, 1 to 60 characters; the identifier unless given.
    #[serde(default)]
    pub display_name: Option<String>,
    /// Region; `default` unless given.
    #[serde(default = "default_region")]
    pub region: ZoneName,
    /// One or two zones; `zone-a` unless given.
    #[serde(default = "default_zones")]
    pub zones: Vec<ZoneName>,
    /// Private network; `10.2.0.0/16` unless given. Never changes.
    #[serde(default = "default_network")]
    pub network: String,
    /// Largest package in bytes: 1 to 300,000,000; 200,000,000 unless given.
    #[serde(default)]
    pub package_limit_bytes: Option<u64>,
    /// Quota for all packages of the workspace together, in bytes: 1 to 2^50. Default: 21,474,836,480 (20 GiB).
    #[serde(default)]
    pub upload_quota_bytes: Option<u64>,
}

fn zone(name: &str) -> ZoneName {
    name.parse().expect("a valid zone name")
}

fn default_region() -> ZoneName {
    zone("default")
}

fn default_zones() -> Vec<ZoneName> {
    vec![zone("zone-a")]
}

fn default_network() -> String {
    "10.2.0.0/16".to_owned()
}

/// A change of a workspace; what is not given stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateWorkspace {
    /// Name for people.
    #[serde(default)]
    pub display_name: Option<String>,
    /// Zones: one may be added; those that are there stay.
    #[serde(default)]
    pub zones: Option<Vec<ZoneName>>,
    /// Largest package in bytes.
    #[serde(default)]
    pub package_limit_bytes: Option<u64>,
    /// Quota for all packages of the workspace together, in bytes. Packages that are stored already are kept.
    #[serde(default)]
    pub upload_quota_bytes: Option<u64>,
}

/// A cell to be added.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddCell {
    /// Identifier, unique in the workspace; never changes.
    pub name: CellName,
    /// Name for people; the identifier unless given.
    #[serde(default)]
    pub display_name: Option<String>,
    /// Deployment zone: `a` or `b`.
    pub deployment_zone: DeploymentZone,
    /// Zones bound to it: of the workspace, and of no other deployment zone.
    #[serde(default)]
    pub zones: Vec<ZoneName>,
}

/// A change of a cell; what is not given stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateCell {
    /// Name for people.
    #[serde(default)]
    pub display_name: Option<String>,
    /// Zones bound to it.
    #[serde(default)]
    pub zones: Option<Vec<ZoneName>>,
}

/// Which workspaces.
#[derive(Debug, Clone, Default)]
pub struct WorkspaceFilter {
    /// Identifier or display name contains this, in any case.
    pub search: Option<String>,
}

/// Workspaces. Cheap to clone.
#[derive(Clone)]
pub struct Workspaces {
    store: Arc<dyn Store>,
}

impl Workspaces {
    /// Over a store.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// One workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn get(&self, name: &str) -> Result<(Workspace, Revision), ServiceError> {
        records::get(&*self.store, name).await
    }

    /// A page of workspaces, by identifier.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted.
    pub async fn list(
        &self,
        filter: &WorkspaceFilter,
        page: PageRequest,
    ) -> Result<PageOf<(Workspace, Revision)>, ServiceError> {
        let search = filter.search.as_ref().map(|text| text.to_lowercase());
        let prefix = keys::records(Kind::Workspace);
        records::list(
            &*self.store,
            &prefix,
            Sort::Rising,
            &page,
            |found: &Workspace| {
                search.as_ref().is_none_or(|text| {
                    found.name.as_str().contains(text)
                        || found.display_name.to_lowercase().contains(text)
                })
            },
        )
        .await
    }

    /// Makes a workspace.
    ///
    /// # Errors
    /// `name_taken`; fields that break a rule.
    pub async fn create(
        &self,
        caller: Caller,
        request: CreateWorkspace,
    ) -> Result<(Workspace, Revision), ServiceError> {
        let workspace = Workspace {
            schema: Workspace::SCHEMA,
            display_name: request
                .display_name
                .unwrap_or_else(|| request.name.to_string()),
            name: request.name,
            region: request.region,
            cells: Workspace::first_cells(&request.zones),
            zones: request.zones,
            network: request.network,
            kind: WorkspaceKind::Standard,
            package_limit_bytes: request
                .package_limit_bytes
                .unwrap_or(DEFAULT_PACKAGE_LIMIT_BYTES),
            upload_quota_bytes: request
                .upload_quota_bytes
                .unwrap_or(DEFAULT_UPLOAD_QUOTA_BYTES),
            created_at: clock::now(),
        };
        workspace.validate().map_err(ServiceError::of_value)?;
        records::change(&*self.store, &caller, || async {
            let name = workspace.name.as_str();
            let there = records::find::<Workspace>(&*self.store, name).await?;
            if there.is_some() {
                return Err(ServiceError::taken("workspace", "name", name));
            }
            Ok((records::create(&workspace)?, workspace.clone()))
        })
        .await
    }

    /// Changes a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], [`ServiceError::Changed`]; fields that break a rule.
    pub async fn update(
        &self,
        caller: Caller,
        name: &str,
        if_match: Option<Revision>,
        request: UpdateWorkspace,
    ) -> Result<(Workspace, Revision), ServiceError> {
        self.edit(caller, name, if_match, |workspace| {
            if let Some(display_name) = &request.display_name {
                workspace.display_name.clone_from(display_name);
            }
            if let Some(zones) = &request.zones {
                if let Some(gone) = workspace.zones.iter().find(|zone| !zones.contains(zone)) {
                    return Err(ServiceError::invalid(
                        "zone_removed",
                        "zones",
                        format!("the zone `{gone}` is missing: a zone is never taken away from a workspace"),
                        "name all zones that are there, and the new one",
                    ));
                }
                workspace.zones.clone_from(zones);
            }
            if let Some(quota) = request.upload_quota_bytes {
                workspace.upload_quota_bytes = quota;
            }
            if let Some(limit) = request.package_limit_bytes {
                workspace.package_limit_bytes = limit;
            }
            Ok(())
        })
        .await
    }

    /// Adds a cell.
    ///
    /// # Errors
    /// `name_taken`; [`ServiceError::NotFound`], [`ServiceError::Changed`]; zones that break a rule.
    pub async fn add_cell(
        &self,
        caller: Caller,
        name: &str,
        if_match: Option<Revision>,
        request: AddCell,
    ) -> Result<(Workspace, Revision), ServiceError> {
        self.edit(caller, name, if_match, |workspace| {
            if workspace.cell(&request.name).is_some() {
                return Err(ServiceError::taken("cell", "name", request.name.as_str()));
            }
            workspace.cells.push(Cell {
                name: request.name.clone(),
                display_name: request
                    .display_name
                    .clone()
                    .unwrap_or_else(|| request.name.to_string()),
                deployment_zone: request.deployment_zone,
                zones: request.zones.clone(),
            });
            Ok(())
        })
        .await
    }

    /// Changes a cell's name for people or its zones.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], [`ServiceError::Changed`]; zones that break a rule.
    pub async fn update_cell(
        &self,
        caller: Caller,
        name: &str,
        cell: &CellName,
        if_match: Option<Revision>,
        request: UpdateCell,
    ) -> Result<(Workspace, Revision), ServiceError> {
        self.edit(caller, name, if_match, |workspace| {
            let found = workspace
                .cells
                .iter_mut()
                .find(|found| found.name == *cell)
                .ok_or_else(|| ServiceError::not_found("cell", cell))?;
            if let Some(display_name) = &request.display_name {
                found.display_name.clone_from(display_name);
            }
            if let Some(zones) = &request.zones {
                found.zones.clone_from(zones);
            }
            Ok(())
        })
        .await
    }

    async fn edit(
        &self,
        caller: Caller,
        name: &str,
        if_match: Option<Revision>,
        edit: impl Fn(&mut Workspace) -> Result<(), ServiceError> + Send + Sync,
    ) -> Result<(Workspace, Revision), ServiceError> {
        records::change(&*self.store, &caller, || async {
            let (mut workspace, revision) = records::get::<Workspace>(&*self.store, name).await?;
            records::check_revision::<Workspace>(if_match, revision)?;
            edit(&mut workspace)?;
            workspace.validate().map_err(ServiceError::of_value)?;
            Ok((records::replace(&workspace, revision)?, workspace))
        })
        .await
    }

    /// Deletes a workspace that holds nothing any more; `confirm` is its identifier. Its upload records and the list of its
    /// orders go with it.
    ///
    /// # Errors
    /// `in_use`, with what is left; `confirmation_missing`; [`ServiceError::NotFound`].
    pub async fn delete(
        &self,
        caller: Caller,
        name: &str,
        confirm: &str,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        records::change(store, &caller, || async {
            let (workspace, revision) = records::get::<Workspace>(store, name).await?;
            records::check_confirm("workspace", confirm, name)?;
            let unused = records::unused(store, Kind::Workspace, name).await?;
            let left = self.left_in(name).await?;
            if !left.is_empty() {
                return Err(ServiceError::in_use("workspace", name, &left));
            }
            let gone = records::remove(&workspace, revision).and(unused);
            Ok((gone.delete(keys::invocation_count(name)), ()))
        })
        .await?;
        for prefix in [
            keys::uploads(name),
            keys::orders_of(name),
            keys::invocations_of(name),
            keys::all_of_workspace(Kind::Diagnosis, name),
        ] {
            if let Err(error) = retention::delete_prefix(store, &prefix).await {
                tracing::warn!(
                    workspace = name,
                    error = &error as &dyn std::error::Error,
                    "what a deleted workspace left could not be removed; it is tried again when a workspace of its name is deleted"
                );
            }
        }
        Ok(())
    }

    async fn left_in(&self, name: &str) -> Result<Vec<String>, ServiceError> {
        let store = &*self.store;
        let below = |kind| keys::all_of_workspace(kind, name);
        let mut left = Vec::new();
        for found in records::all_indexed::<ServiceInstance>(store, &below(Kind::Instance)).await? {
            left.push(format!("service instance {} ({})", found.name, found.id));
        }
        for found in records::all_indexed::<Server>(store, &below(Kind::Server)).await? {
            left.push(format!("server {} ({})", found.name, found.id));
        }
        for found in records::all_indexed::<Package>(store, &below(Kind::Package)).await? {
            left.push(format!("package {} ({})", found.version, found.id));
        }
        for found in records::all_indexed::<LoadBalancer>(store, &below(Kind::LoadBalancer)).await?
        {
            left.push(format!("load balancer {} ({})", found.name, found.id));
        }
        for found in records::all_indexed::<Certificate>(store, &below(Kind::Certificate)).await? {
            left.push(format!("certificate {} ({})", found.name, found.id));
        }
        for found in records::all_indexed::<Pool>(store, &below(Kind::Pool)).await? {
            left.push(format!("pool {} ({})", found.name, found.id));
        }
        for found in records::all_indexed::<Channel>(store, &below(Kind::Channel)).await? {
            left.push(format!(
                "notification channel {} ({})",
                found.name, found.id
            ));
        }
        for found in records::all_indexed::<ProcessTemplate>(store, &below(Kind::Template)).await? {
            left.push(format!("process template {} ({})", found.name, found.id));
        }
        for row in records::all(store, &below(Kind::Activation)).await? {
            left.push(format!("activation code {}", keys::last_segment(&row.key)));
        }
        for row in records::all(store, &keys::secrets(name)).await? {
            left.push(format!("secret {}", keys::last_segment(&row.key)));
        }
        Ok(left)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::service::records::tests::{caller, memory_store};

    pub(crate) fn request(name: &str) -> CreateWorkspace {
        CreateWorkspace {
            name: name.parse().unwrap(),
            display_name: None,
            region: "here".parse().unwrap(),
            zones: vec!["z1".parse().unwrap(), "z2".parse().unwrap()],
            network: "10.2.0.0/16".to_owned(),
            package_limit_bytes: None,
            upload_quota_bytes: None,
        }
    }

    fn cell(name: &str, deployment_zone: DeploymentZone, zones: &[&str]) -> AddCell {
        AddCell {
            name: name.parse().unwrap(),
            display_name: None,
            deployment_zone,
            zones: zones.iter().map(|zone| zone.parse().unwrap()).collect(),
        }
    }

    #[tokio::test]
    async fn of_two_creations_at_once_one_wins() {
        let workspaces = Workspaces::new(memory_store());
        let (one, two) = tokio::join!(
            workspaces.create(caller(), request("prod")),
            workspaces.create(caller(), request("prod"))
        );
        assert!(one.is_ok() != two.is_ok());
        let error = one.err().or(two.err()).unwrap();
        assert!(
            matches!(
                error,
                ServiceError::Conflict {
                    code: "name_taken",
                    ..
                }
            ),
            "{error}"
        );
    }

    #[tokio::test]
    async fn cells_follow_the_rules_of_zones() {
        let workspaces = Workspaces::new(memory_store());
        let mut first = request("prod");
        first.zones.truncate(1);
        let (workspace, revision) = workspaces.create(caller(), first).await.unwrap();
        assert_eq!(workspace.cells.len(), 1);
        // A zone that is added has no cell yet.
        let zones = Some(vec!["z1".parse().unwrap(), "z2".parse().unwrap()]);
        let update = UpdateWorkspace {
            zones,
            ..UpdateWorkspace::default()
        };
        let (workspace, second) = workspaces
            .update(caller(), "prod", Some(revision), update.clone())
            .await
            .unwrap();
        assert_eq!(workspace.cells.len(), 1);
        let stale = workspaces
            .update(caller(), "prod", Some(revision), update)
            .await
            .unwrap_err();
        assert!(
            matches!(stale, ServiceError::Changed { current, .. } if current == second.0),
            "{stale}"
        );
        for (request, good) in [
            (cell("cell-a", DeploymentZone::A, &[]), false),
            (cell("x", DeploymentZone::B, &["z1"]), false),
            (cell("x", DeploymentZone::B, &["z9"]), false),
            (cell("cell-b", DeploymentZone::B, &["z2"]), true),
            (cell("x", DeploymentZone::B, &["z2"]), true),
        ] {
            let answer = workspaces.add_cell(caller(), "prod", None, request.clone());
            assert_eq!(answer.await.is_ok(), good, "{request:?}");
        }
        let gone = UpdateWorkspace {
            zones: Some(vec!["z1".parse().unwrap()]),
            ..UpdateWorkspace::default()
        };
        assert!(
            workspaces
                .update(caller(), "prod", None, gone)
                .await
                .is_err()
        );
        let moved = UpdateCell {
            zones: Some(vec!["z2".parse().unwrap()]),
            ..UpdateCell::default()
        };
        let name = "cell-a".parse().unwrap();
        let refused = workspaces.update_cell(caller(), "prod", &name, None, moved);
        assert!(refused.await.is_err());
    }

    #[tokio::test]
    async fn only_an_empty_workspace_goes_and_only_confirmed() {
        let store = memory_store();
        let workspaces = Workspaces::new(store.clone());
        workspaces.create(caller(), request("prod")).await.unwrap();
        let secret = keys::secrets("prod");
        let key = windlass_store::Key::new([secret.as_bytes(), b"password"].concat()).unwrap();
        let txn = windlass_store::Txn::new();
        store
            .commit(txn.clone().put(key.clone(), "{}"))
            .await
            .unwrap();
        let unconfirmed = workspaces
            .delete(caller(), "prod", "pro")
            .await
            .unwrap_err();
        assert!(matches!(
            unconfirmed,
            ServiceError::Invalid {
                code: "confirmation_missing",
                ..
            }
        ));
        let left = workspaces
            .delete(caller(), "prod", "prod")
            .await
            .unwrap_err();
        assert!(left.to_string().contains("secret password"), "{left}");
        store.commit(txn.delete(key)).await.unwrap();
        workspaces.delete(caller(), "prod", "prod").await.unwrap();
        assert!(workspaces.get("prod").await.is_err());
        workspaces.create(caller(), request("prod")).await.unwrap();
    }
}
