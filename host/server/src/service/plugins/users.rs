//! Who uses which version of a plugin.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use windlass_domain::{
    Digest,
    application::Application,
    id::{AppId, InstanceId, OrderId},
    instance::ServiceInstance,
    manifest::{Manifest, PluginRef},
    order::Order,
};
use windlass_runtime::Decisions;

use super::{PluginService, apply_change};
use crate::{
    engine::rows as engine_rows,
    keys::{self, Kind},
    service::{Caller, ServiceError, records},
};

/// Who uses a plugin, by version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PluginUsers {
    /// Versions that somebody uses or that a file provides.
    pub versions: Vec<VersionUsers>,
}

/// Who uses one version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VersionUsers {
    /// The version.
    pub plugin: PluginRef,
    /// Who.
    pub used_by: UsedBy,
}

/// Users of one version.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct UsedBy {
    /// Names of applications whose next release is planned with it, or with a service instance of which it is.
    pub apps: BTreeSet<String>,
    /// Orders that are not over and were planned with it.
    pub orders: BTreeSet<OrderId>,
    /// What is installed, now or before, and was rendered by it.
    pub installed: Vec<InstalledBy>,
}

/// One installed release that a version rendered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct InstalledBy {
    /// The service instance.
    pub instance: InstanceId,
    /// The server's id.
    pub server: String,
    /// The release directory's name.
    pub release: String,
}

impl PluginService {
    /// Who uses a plugin: applications, orders that are not over, installed releases.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] when there is no version of it; those of the store.
    pub async fn users(&self, name: &str) -> Result<PluginUsers, ServiceError> {
        let mut versions: BTreeMap<PluginRef, UsedBy> = self
            .list()
            .into_iter()
            .filter_map(|status| {
                let descriptor = status.descriptor?;
                (descriptor.name == name).then_some((
                    PluginRef {
                        name: name.to_owned(),
                        version: descriptor.version.clone(),
                        digest: status.digest?,
                    },
                    UsedBy::default(),
                ))
            })
            .collect();
        if versions.is_empty() {
            return Err(ServiceError::not_found("plugin", name));
        }
        for (plugin, used_by) in self.uses().await? {
            if plugin.name == name {
                versions.insert(plugin, used_by);
            }
        }
        Ok(PluginUsers {
            versions: versions
                .into_iter()
                .map(|(plugin, used_by)| VersionUsers { plugin, used_by })
                .collect(),
        })
    }

    pub(super) async fn users_of(&self, digest: Digest) -> Result<UsedBy, ServiceError> {
        Ok(self
            .uses()
            .await?
            .into_iter()
            .find(|(plugin, _)| plugin.digest == digest)
            .map(|(_, used_by)| used_by)
            .unwrap_or_default())
    }

    /// Everything that somebody uses.
    async fn uses(&self) -> Result<BTreeMap<PluginRef, UsedBy>, ServiceError> {
        let mut uses: BTreeMap<PluginRef, UsedBy> = BTreeMap::new();
        self.add_apps(&mut uses).await?;
        self.add_orders(&mut uses).await?;
        self.add_installed(&mut uses).await?;
        Ok(uses)
    }

    async fn add_apps(&self, uses: &mut BTreeMap<PluginRef, UsedBy>) -> Result<(), ServiceError> {
        let store = &*self.store;
        let mut apps: BTreeMap<AppId, Application> = BTreeMap::new();
        for entry in records::all(store, &keys::records(Kind::App)).await? {
            let app: Application = records::decode(&entry)?;
            apps.insert(app.id, app);
        }
        let mut wanted: Vec<(&Application, semver::VersionReq)> = apps
            .values()
            .map(|app| (app, app.tech_stack.version.clone()))
            .collect();
        for entry in records::all(store, &keys::records(Kind::Instance)).await? {
            let instance: ServiceInstance = records::decode(&entry)?;
            if let (Some(version), Some(app)) =
                (instance.tech_stack_version, apps.get(&instance.app))
            {
                wanted.push((app, version));
            }
        }
        for (app, version) in wanted {
            let version = (version != semver::VersionReq::STAR).then_some(&version);
            if let Ok(plugin) = self.plugins.get(app.tech_stack.name.as_str(), version) {
                uses.entry(plugin.reference().clone())
                    .or_default()
                    .apps
                    .insert(app.name.to_string());
            }
        }
        Ok(())
    }

    async fn add_orders(&self, uses: &mut BTreeMap<PluginRef, UsedBy>) -> Result<(), ServiceError> {
        for entry in records::all(&*self.store, &keys::orders()).await? {
            let order: Order = records::decode_plain(&entry, "an order")?;
            if order.state.is_terminal()
                && self
                    .store
                    .get(&engine_rows::active(order.id))
                    .await?
                    .is_none()
            {
                continue;
            }
            let plan = crate::engine::load_plan(&self.blobs, order.plan)
                .await
                .map_err(|error| ServiceError::internal("read the plan of an order", error))?;
            let stacks = plan.parts.iter().filter_map(|part| part.stack.as_ref());
            for plugin in plan.strategy.iter().chain(stacks) {
                uses.entry(plugin.clone())
                    .or_default()
                    .orders
                    .insert(order.id);
            }
        }
        Ok(())
    }

    async fn add_installed(
        &self,
        uses: &mut BTreeMap<PluginRef, UsedBy>,
    ) -> Result<(), ServiceError> {
        for prefix in keys::all_installed() {
            for entry in records::all(&*self.store, &prefix).await? {
                let manifest: Manifest = records::decode_plain(&entry, "what is installed")?;
                uses.entry(manifest.stack.clone())
                    .or_default()
                    .installed
                    .push(InstalledBy {
                        instance: manifest.instance,
                        server: keys::last_segment(&entry.key).to_owned(),
                        release: manifest.release,
                    });
            }
        }
        Ok(())
    }

    /// Changes what was decided, durably, and then in the registry.
    pub(super) async fn change_decisions(
        &self,
        caller: &Caller,
        change: impl Fn(&mut Decisions) + Send + Sync,
    ) -> Result<(), ServiceError> {
        apply_change(&*self.store, caller, change).await?;
        self.refresh().await
    }
}
