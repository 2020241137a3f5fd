//! Service instances: an application in one workspace, and the servers that are bound to it. Source: spec "Service instances".
//!
//! A server is bound to at most one instance: its record names the instance, and a row `binding/{instance}/{server}` holds its
//! variables; both change in one transaction. A server that an order holds stays as it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use windlass_domain::{
    application::Application,
    id::{AppId, InstanceId, PackageId, PoolId, ServerId},
    instance::{Binding, ServiceInstance},
    name::{CellName, InstanceName},
    order::StackChange,
    package::Package,
    pool::Pool,
    server::{ReleaseState, Server},
    value::Environment,
    workspace::Workspace,
};
use windlass_store::{CommitError, Revision, Store, Txn, retention};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    apps::TechStacks,
    records::{self, Sort},
    servers,
};
use crate::{
    clock, ids,
    keys::{self, Kind},
};

/// Servers that are bound or unbound by one call: all of it is one transaction.
pub const MAX_SERVERS_PER_CALL: usize = 30;
/// Pools of an instance at most.
pub const MAX_POOLS: usize = 20;

/// A service instance to be made.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateInstance {
    /// Name: unique in the workspace.
    pub name: InstanceName,
    /// Application.
    pub app: AppId,
    /// Version requirement of the tech stack; the application's unless given.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub tech_stack_version: Option<semver::VersionReq>,
    /// Cells it runs in; none: all of the workspace.
    #[serde(default)]
    pub cells: Vec<CellName>,
    /// The package that a release takes unless it says another.
    #[serde(default)]
    pub package: Option<PackageId>,
    /// Description, at most 500 characters.
    #[serde(default)]
    pub description: String,
    /// System parameters, valid against the tech stack's schema. Secrets stand as `{"secret_ref": "name"}`.
    #[serde(default = "no_parameters")]
    pub parameters: serde_json::Value,
    /// Custom environment parameters.
    #[serde(default)]
    pub env: Environment,
    /// Pools that its servers take traffic from, at most 20.
    #[serde(default)]
    pub pools: Vec<PoolId>,
}

fn no_parameters() -> serde_json::Value {
    serde_json::Value::Object(serde_json::Map::new())
}

/// A change of a service instance; what is not given stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateInstance {
    /// Version requirement of the tech stack.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub tech_stack_version: Option<semver::VersionReq>,
    /// Cells it runs in.
    #[serde(default)]
    pub cells: Option<Vec<CellName>>,
    /// The package that a release takes unless it says another.
    #[serde(default)]
    pub package: Option<PackageId>,
    /// Description.
    #[serde(default)]
    pub description: Option<String>,
    /// All system parameters.
    #[serde(default)]
    pub parameters: Option<serde_json::Value>,
    /// All custom environment parameters.
    #[serde(default)]
    pub env: Option<Environment>,
    /// All pools.
    #[serde(default)]
    pub pools: Option<Vec<PoolId>>,
}

/// A server to be bound, or bound already: then its variables are replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BindServer {
    /// The server.
    pub server: ServerId,
    /// Its variables: names like environment keys, at most 100, values at most 1000 characters.
    #[serde(default)]
    pub variables: BTreeMap<String, String>,
}

/// Which service instances; all conditions that are given must hold.
#[derive(Debug, Clone, Default)]
pub struct InstanceFilter {
    /// Name contains this, in any case.
    pub search: Option<String>,
    /// Of this application.
    pub app: Option<AppId>,
    /// Runs in this cell (an instance without cells runs in all).
    pub cell: Option<CellName>,
}

/// Service instances. Cheap to clone.
#[derive(Clone)]
pub struct Instances {
    store: Arc<dyn Store>,
    plugins: Arc<dyn TechStacks>,
}

impl Instances {
    /// Over a store and the plugins.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, plugins: Arc<dyn TechStacks>) -> Self {
        Self { store, plugins }
    }

    /// One service instance of a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when it is another workspace's.
    pub async fn get(
        &self,
        ws: &str,
        id: InstanceId,
    ) -> Result<(ServiceInstance, Revision), ServiceError> {
        let (instance, revision) =
            records::get::<ServiceInstance>(&*self.store, &id.to_string()).await?;
        if instance.workspace.as_str() == ws {
            Ok((instance, revision))
        } else {
            Err(ServiceError::not_found("service instance", id))
        }
    }

    /// A service instance, whatever its workspace: for planning.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn find(&self, id: InstanceId) -> Result<Option<ServiceInstance>, ServiceError> {
        let found = records::find::<ServiceInstance>(&*self.store, &id.to_string()).await?;
        Ok(found.map(|(instance, _)| instance))
    }

    /// A page of a workspace's service instances, oldest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn list(
        &self,
        ws: &str,
        filter: &InstanceFilter,
        page: PageRequest,
    ) -> Result<PageOf<(ServiceInstance, Revision)>, ServiceError> {
        records::get::<Workspace>(&*self.store, ws).await?;
        let search = filter.search.as_ref().map(|text| text.to_lowercase());
        let keep = |found: &ServiceInstance| {
            search
                .as_ref()
                .is_none_or(|text| found.name.as_str().to_lowercase().contains(text))
                && filter.app.is_none_or(|app| found.app == app)
                && filter
                    .cell
                    .as_ref()
                    .is_none_or(|cell| found.cells.is_empty() || found.cells.contains(cell))
        };
        let prefix = keys::all_of_workspace(Kind::Instance, ws);
        records::list(&*self.store, &prefix, Sort::Rising, &page, keep).await
    }

    /// The service instances of an application in a workspace.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn of_app(&self, ws: &str, app: AppId) -> Result<Vec<ServiceInstance>, ServiceError> {
        let below = keys::all_of_workspace(Kind::Instance, ws);
        let mut all = records::all_indexed::<ServiceInstance>(&*self.store, &below).await?;
        all.retain(|instance| instance.app == app);
        Ok(all)
    }

    /// Makes a service instance.
    ///
    /// # Errors
    /// `name_taken`, `cell_unknown`, `package_unknown`, `package_of_another_app`, `pool_unknown`, `tech_stack_unknown`,
    /// `parameters_invalid`; [`ServiceError::NotFound`] of the workspace or application; fields that break a rule.
    pub async fn create(
        &self,
        caller: Caller,
        ws: &str,
        request: CreateInstance,
    ) -> Result<(ServiceInstance, Revision), ServiceError> {
        let store = &*self.store;
        let id = InstanceId::from_uuid(ids::new_uuid());
        records::change(store, &caller, || async {
            let (workspace, _) = records::get::<Workspace>(store, ws).await?;
            let request = request.clone();
            let instance = ServiceInstance {
                schema: ServiceInstance::SCHEMA,
                id,
                name: request.name,
                workspace: workspace.name.clone(),
                app: request.app,
                tech_stack_version: request.tech_stack_version,
                cells: request.cells,
                package: request.package,
                description: request.description,
                parameters: request.parameters,
                env: request.env,
                pools: request.pools,
                created_at: clock::now(),
            };
            let refers = self.check(&workspace, &instance).await?;
            let name_key = keys::name_in_workspace(Kind::Instance, ws, instance.name.as_str());
            if records::indexed(store, &name_key).await?.is_some() {
                let name = instance.name.as_str();
                return Err(ServiceError::taken("service instance", "name", name));
            }
            let text = id.to_string();
            let txn = records::create(&instance)?
                .and(refers)
                .and(records::refer(Kind::Workspace, ws))
                .and(records::refer(Kind::App, &instance.app.to_string()))
                .absent(name_key.clone())
                .put(name_key, text.clone())
                .put(keys::of_workspace(Kind::Instance, ws, &text), "");
            Ok((txn, instance))
        })
        .await
    }

    /// Changes a service instance. Cells can be taken away only when no bound server is in them.
    ///
    /// # Errors
    /// Those of [`Instances::create`] but the name's; `cell_in_use`; [`ServiceError::Changed`].
    pub async fn update(
        &self,
        caller: Caller,
        ws: &str,
        id: InstanceId,
        if_match: Option<Revision>,
        request: UpdateInstance,
    ) -> Result<(ServiceInstance, Revision), ServiceError> {
        let store = &*self.store;
        records::change(store, &caller, || async {
            let (mut instance, revision) = self.get(ws, id).await?;
            records::check_revision::<ServiceInstance>(if_match, revision)?;
            let request = request.clone();
            if let Some(version) = request.tech_stack_version {
                instance.tech_stack_version = Some(version);
            }
            if let Some(cells) = request.cells {
                instance.cells = cells;
                self.check_bound_cells(ws, &instance).await?;
            }
            if let Some(package) = request.package {
                instance.package = Some(package);
            }
            if let Some(description) = request.description {
                instance.description = description;
            }
            if let Some(parameters) = request.parameters {
                instance.parameters = parameters;
            }
            if let Some(env) = request.env {
                instance.env = env;
            }
            if let Some(pools) = request.pools {
                instance.pools = pools;
            }
            let (workspace, _) = records::get::<Workspace>(store, ws).await?;
            let refers = self.check(&workspace, &instance).await?;
            Ok((records::replace(&instance, revision)?.and(refers), instance))
        })
        .await
    }

    /// Keeps the version of the tech stack that a release or its rollback has brought. Where the instance is gone, or has
    /// another version than before, nothing is done: a person has decided since. Safe to repeat.
    ///
    /// # Errors
    /// [`ServiceError`] when the store fails.
    pub async fn change_tech_stack(&self, change: &StackChange) -> Result<(), ServiceError> {
        let store = &*self.store;
        loop {
            let found =
                records::find::<ServiceInstance>(store, &change.instance.to_string()).await?;
            let Some((mut instance, revision)) = found else {
                return Ok(());
            };
            if instance.tech_stack_version != change.before {
                return Ok(());
            }
            instance.tech_stack_version.clone_from(&change.after);
            match store.commit(records::replace(&instance, revision)?).await {
                Ok(_) => return Ok(()),
                // Changed meanwhile: look again.
                Err(CommitError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn check_bound_cells(
        &self,
        ws: &str,
        instance: &ServiceInstance,
    ) -> Result<(), ServiceError> {
        for binding in self.bindings(instance.id).await? {
            let (server, _) = servers::in_workspace(&*self.store, ws, binding.server).await?;
            check_cell(instance, &server)?;
        }
        Ok(())
    }

    /// Checks everything an instance refers to. Gives the part of the transaction that refers to it.
    async fn check(
        &self,
        workspace: &Workspace,
        instance: &ServiceInstance,
    ) -> Result<Txn, ServiceError> {
        let store = &*self.store;
        let ws = workspace.name.as_str();
        instance.validate().map_err(ServiceError::of_value)?;
        let mut refers = Txn::new();
        for cell in &instance.cells {
            if workspace.cell(cell).is_none() {
                return Err(ServiceError::invalid(
                    "cell_unknown",
                    "cells",
                    format!("the workspace `{ws}` has no cell `{cell}`"),
                    "name its cells only, or add the cell first",
                ));
            }
        }
        if let Some(id) = instance.package {
            let found = records::find::<Package>(store, &id.to_string()).await?;
            let Some((package, _)) = found.filter(|(package, _)| package.workspace.as_str() == ws)
            else {
                return Err(ServiceError::invalid(
                    "package_unknown",
                    "package",
                    format!("the workspace `{ws}` has no package {id}"),
                    "upload it first, or name one of the application's packages",
                ));
            };
            if package.app != instance.app {
                return Err(ServiceError::invalid(
                    "package_of_another_app",
                    "package",
                    format!("the package {id} is of the application {}", package.app),
                    format!("name a package of the application {}", instance.app),
                ));
            }
            refers = refers.and(records::refer(Kind::Package, &id.to_string()));
        }
        if instance.pools.len() > MAX_POOLS {
            return Err(ServiceError::Limit {
                code: "out_of_limit",
                field: "pools".to_owned(),
                message: format!(
                    "a service instance has at most {MAX_POOLS} pools, {} are given",
                    instance.pools.len()
                ),
                limit: MAX_POOLS as u64,
                current: instance.pools.len() as u64,
                mend: "name fewer pools".to_owned(),
            });
        }
        let mut seen = BTreeSet::new();
        for id in &instance.pools {
            let found = records::find::<Pool>(store, &id.to_string()).await?;
            let is_here = found.is_some_and(|(pool, _)| pool.workspace.as_str() == ws);
            if !is_here || !seen.insert(*id) {
                let (code, why) = if is_here {
                    ("pool_twice", "stands twice")
                } else {
                    ("pool_unknown", "is not in this workspace")
                };
                return Err(ServiceError::invalid(
                    code,
                    "pools",
                    format!("the pool {id} {why}"),
                    "name each pool of the workspace once",
                ));
            }
            refers = refers.and(records::refer(Kind::Pool, &id.to_string()));
        }
        let app_id = instance.app.to_string();
        let (app, _) = records::get::<Application>(store, &app_id).await?;
        let mut stack = app.tech_stack;
        if let Some(version) = &instance.tech_stack_version {
            stack.version = version.clone();
        }
        self.plugins
            .check_parameters(&stack, &instance.parameters)?;
        Ok(refers)
    }

    /// Deletes a service instance to which no server is bound; `confirm` is its name. What is known of its installed releases
    /// goes with it.
    ///
    /// # Errors
    /// `in_use`, with the servers; `confirmation_missing`; [`ServiceError::NotFound`].
    pub async fn delete(
        &self,
        caller: Caller,
        ws: &str,
        id: InstanceId,
        confirm: &str,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        let text = id.to_string();
        records::change(store, &caller, || async {
            let (instance, revision) = self.get(ws, id).await?;
            records::check_confirm("service instance", confirm, instance.name.as_str())?;
            let unused = records::unused(store, Kind::Instance, &text).await?;
            let by: Vec<String> = self
                .bindings(id)
                .await?
                .iter()
                .map(|binding| format!("server {}", binding.server))
                .collect();
            if !by.is_empty() {
                let name = instance.name.as_str();
                return Err(ServiceError::in_use("service instance", name, &by));
            }
            let txn = records::remove(&instance, revision)
                .and(unused)
                .delete(keys::name_in_workspace(
                    Kind::Instance,
                    ws,
                    instance.name.as_str(),
                ))
                .delete(keys::of_workspace(Kind::Instance, ws, &text));
            Ok((txn, ()))
        })
        .await?;
        for prefix in keys::installed_of(id) {
            if let Err(error) = retention::delete_prefix(store, &prefix).await {
                tracing::warn!(
                    instance.id = %id,
                    error = &error as &dyn std::error::Error,
                    "what was installed of a deleted service instance could not be forgotten; its packages stay"
                );
            }
        }
        Ok(())
    }

    /// The servers bound to a service instance, oldest server first.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn bindings(&self, id: InstanceId) -> Result<Vec<Binding>, ServiceError> {
        records::all(&*self.store, &keys::bindings(id))
            .await?
            .iter()
            .map(|entry| records::decode_plain(entry, "a binding"))
            .collect()
    }

    /// How a server is bound to a service instance; `None`: it is not.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn binding(
        &self,
        id: InstanceId,
        server: ServerId,
    ) -> Result<Option<Binding>, ServiceError> {
        let entry = self.store.get(&keys::binding(id, server)).await?;
        entry
            .map(|entry| records::decode_plain(&entry, "a binding"))
            .transpose()
    }

    /// Binds servers, all or none. For one that is bound to this instance already, its variables are replaced.
    ///
    /// # Errors
    /// `server_bound` to another instance, `server_locked` by an order, `server_without_cell`, `server_in_other_cell`; limits;
    /// [`ServiceError::NotFound`] of the instance or a server.
    pub async fn bind(
        &self,
        caller: Caller,
        ws: &str,
        id: InstanceId,
        request: Vec<BindServer>,
    ) -> Result<(Vec<Binding>, Revision), ServiceError> {
        let store = &*self.store;
        let wanted: Vec<ServerId> = request.iter().map(|bind| bind.server).collect();
        check_servers(&wanted)?;
        records::change(store, &caller, || async {
            let (instance, _) = self.get(ws, id).await?;
            let mut txn = records::refer(Kind::Instance, &id.to_string());
            let mut bindings = Vec::with_capacity(request.len());
            for bind in &request {
                let (mut server, revision) = servers::in_workspace(store, ws, bind.server).await?;
                check_cell(&instance, &server)?;
                let key = keys::binding(id, server.id);
                let before = match server.instance {
                    Some(other) if other != id => {
                        return Err(ServiceError::conflict(
                            "server_bound",
                            format!(
                                "the server `{}` is bound to the service instance {other}",
                                server.name
                            ),
                            "unbind it there first: a server is bound to at most one",
                        ));
                    }
                    Some(_) => self.binding(id, server.id).await?,
                    None => {
                        server.instance = Some(id);
                        server.release_state = ReleaseState::AwaitingRelease;
                        None
                    }
                };
                let binding = Binding {
                    schema: Binding::SCHEMA,
                    instance: id,
                    server: server.id,
                    variables: bind.variables.clone(),
                    bound_at: before.map_or_else(clock::now, |before| before.bound_at),
                };
                binding.validate().map_err(ServiceError::of_value)?;
                txn = txn
                    .and(servers::unlocked(store, &server).await?)
                    .and(records::replace(&server, revision)?)
                    .put(key, records::encode(&binding));
                bindings.push(binding);
            }
            Ok((txn, bindings))
        })
        .await
    }

    /// Unbinds servers, all or none. What runs on them goes on running; nothing is released to them any more.
    ///
    /// # Errors
    /// `server_not_bound`, `server_locked` by an order; limits; [`ServiceError::NotFound`] of the instance or a server.
    pub async fn unbind(
        &self,
        caller: Caller,
        ws: &str,
        id: InstanceId,
        request: Vec<ServerId>,
    ) -> Result<Revision, ServiceError> {
        let store = &*self.store;
        check_servers(&request)?;
        let ((), revision) = records::change(store, &caller, || async {
            let (instance, _) = self.get(ws, id).await?;
            let mut txn = Txn::new();
            for server in &request {
                let (mut server, revision) = servers::in_workspace(store, ws, *server).await?;
                if server.instance != Some(id) {
                    return Err(ServiceError::conflict(
                        "server_not_bound",
                        format!(
                            "the server `{}` is not bound to the service instance `{}`",
                            server.name, instance.name
                        ),
                        "name servers that are bound to it",
                    ));
                }
                server.instance = None;
                server.release_state = ReleaseState::AwaitingRelease;
                txn = txn
                    .and(servers::unlocked(store, &server).await?)
                    .and(records::replace(&server, revision)?)
                    .delete(keys::binding(id, server.id));
            }
            Ok((txn, ()))
        })
        .await?;
        Ok(revision)
    }
}

/// A server takes part only in a cell of the instance.
fn check_cell(instance: &ServiceInstance, server: &Server) -> Result<(), ServiceError> {
    match &server.cell {
        None => Err(ServiceError::conflict(
            "server_without_cell",
            format!("the server `{}` is in no cell", server.name),
            "assign it to a cell first: nothing can be released to a server without one",
        )),
        Some(cell) if instance.cells.is_empty() || instance.cells.contains(cell) => Ok(()),
        Some(cell) => Err(ServiceError::conflict(
            "server_in_other_cell",
            format!(
                "the server `{}` is in the cell `{cell}`, in which the service instance `{}` does not run",
                server.name, instance.name
            ),
            "add the cell to the service instance, or take another server",
        )),
    }
}

fn check_servers(servers: &[ServerId]) -> Result<(), ServiceError> {
    if servers.is_empty() || servers.len() > MAX_SERVERS_PER_CALL {
        return Err(ServiceError::Limit {
            code: "out_of_limit",
            field: "servers".to_owned(),
            message: format!(
                "one call takes 1 to {MAX_SERVERS_PER_CALL} servers, {} are given",
                servers.len()
            ),
            limit: MAX_SERVERS_PER_CALL as u64,
            current: servers.len() as u64,
            mend: "make several calls".to_owned(),
        });
    }
    let mut seen = BTreeSet::new();
    match servers.iter().find(|server| !seen.insert(**server)) {
        None => Ok(()),
        Some(twice) => Err(ServiceError::invalid(
            "server_twice",
            "servers",
            format!("the server {twice} stands twice"),
            "name each server once",
        )),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;
    use windlass_domain::order::OrderState;

    use super::*;
    use crate::service::{
        apps::{Apps, tests::OneStack},
        pools::{CreatePool, Pools},
        records::tests::{caller, memory_store},
        servers::{Servers, UpdateServer, tests::lock},
        workspaces::Workspaces,
    };

    /// The services with an application `shop` and a server in `prod`.
    async fn ready() -> (Arc<dyn Store>, Instances, AppId, Server) {
        let store = memory_store();
        let server = servers::tests::server(&store, 1).await;
        let apps = Apps::new(store.clone(), Arc::new(OneStack));
        let request = crate::service::apps::tests::request("shop");
        let (app, _) = apps.create(caller(), request).await.unwrap();
        let instances = Instances::new(store.clone(), Arc::new(OneStack));
        (store, instances, app.id, server)
    }

    fn request(app: AppId, fields: serde_json::Value) -> CreateInstance {
        let mut json = json!({"name": "shop", "app": app});
        json.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        serde_json::from_value(json).unwrap()
    }

    fn bind(server: ServerId) -> Vec<BindServer> {
        let variables = [("ZONE".to_owned(), "1".to_owned())].into();
        vec![BindServer { server, variables }]
    }

    fn code(error: &ServiceError) -> &'static str {
        match error {
            ServiceError::Invalid { code, .. }
            | ServiceError::Limit { code, .. }
            | ServiceError::Exhausted { code, .. }
            | ServiceError::Conflict { code, .. }
            | ServiceError::Plugin { code, .. } => code,
            ServiceError::NotFound { .. } => "not_found",
            ServiceError::Changed { .. } => "changed",
            ServiceError::Replay => "replay",
            ServiceError::StorageFull { .. } => "storage_full",
            ServiceError::Unavailable { .. } => "unavailable",
            ServiceError::Internal { .. } => "internal",
        }
    }

    #[tokio::test]
    async fn everything_it_refers_to_is_checked() {
        let (store, instances, app, _) = ready().await;
        let pools = Pools::new(store.clone());
        let pool = CreatePool {
            name: "front".parse().unwrap(),
            kind: windlass_domain::pool::PoolKind::Simulated,
        };
        let (pool, _) = pools.create(caller(), "prod", pool).await.unwrap();
        let missing = PoolId::from_uuid(uuid::Uuid::nil());
        let package = PackageId::from_uuid(uuid::Uuid::nil());
        for (fields, expect) in [
            (json!({"cells": ["cell-x"]}), "cell_unknown"),
            (json!({"package": package}), "package_unknown"),
            (json!({"pools": [missing]}), "pool_unknown"),
            (json!({"pools": [pool.id, pool.id]}), "pool_twice"),
            (json!({"tech_stack_version": "^9"}), "tech_stack_unknown"),
            (json!({"parameters": {"port": "x"}}), "parameters_invalid"),
            (json!({"env": {"A B": "x"}}), "invalid_value"),
            (json!({"description": "x".repeat(501)}), "out_of_limit"),
            (json!({"pools": vec![missing; 21]}), "out_of_limit"),
            (
                json!({"app": AppId::from_uuid(uuid::Uuid::nil())}),
                "not_found",
            ),
        ] {
            let text = fields.to_string();
            let answer = instances
                .create(caller(), "prod", request(app, fields))
                .await;
            assert_eq!(code(&answer.unwrap_err()), expect, "{text}");
        }
        let good = json!({
            "cells": ["cell-a"], "pools": [pool.id], "parameters": {"port": 80},
            "env": {"PASSWORD": {"secret_ref": "password"}}
        });
        let create = || instances.create(caller(), "prod", request(app, good.clone()));
        let (one, two) = tokio::join!(create(), create());
        assert!(one.is_ok() != two.is_ok());
        let used = pools
            .delete(caller(), "prod", pool.id, "front")
            .await
            .unwrap_err();
        assert!(used.to_string().contains("service instance shop"), "{used}");
        let apps = Apps::new(store, Arc::new(OneStack));
        let used = apps.delete(caller(), "shop", "shop").await.unwrap_err();
        assert!(used.to_string().contains("in workspace prod"), "{used}");
    }

    #[tokio::test]
    async fn a_server_is_bound_to_at_most_one() {
        let (store, instances, app, server) = ready().await;
        let mut ids = Vec::new();
        for name in ["one", "two"] {
            let create = request(app, json!({"name": name}));
            let (made, _) = instances.create(caller(), "prod", create).await.unwrap();
            ids.push(made.id);
        }
        let (first, second) = tokio::join!(
            instances.bind(caller(), "prod", ids[0], bind(server.id)),
            instances.bind(caller(), "prod", ids[1], bind(server.id))
        );
        let (bound, error) = match (first, second) {
            (Ok(_), Err(error)) => (ids[0], error),
            (Err(error), Ok(_)) => (ids[1], error),
            both => panic!("{both:?}"),
        };
        assert_eq!(code(&error), "server_bound");
        let binding = instances.binding(bound, server.id).await.unwrap().unwrap();
        assert_eq!(binding.variables["ZONE"], "1");
        assert_eq!(instances.bindings(bound).await.unwrap(), [binding]);
        let move_away = UpdateServer {
            cell: Some("cell-b".parse().unwrap()),
            ..UpdateServer::default()
        };
        let servers = Servers::new(store.clone());
        let moved = servers
            .update(caller(), "prod", server.id, None, move_away)
            .await;
        assert_eq!(code(&moved.unwrap_err()), "server_bound");
        let cells = UpdateInstance {
            cells: Some(vec!["cell-b".parse().unwrap()]),
            ..UpdateInstance::default()
        };
        let away = instances.update(caller(), "prod", bound, None, cells).await;
        assert_eq!(code(&away.unwrap_err()), "server_in_other_cell");
        let name = instances.find(bound).await.unwrap().unwrap().name;
        let used = instances
            .delete(caller(), "prod", bound, name.as_str())
            .await;
        assert_eq!(code(&used.unwrap_err()), "in_use");
        lock(&store, server.id, OrderState::Running).await;
        let unbind = || instances.unbind(caller(), "prod", bound, vec![server.id]);
        assert_eq!(code(&unbind().await.unwrap_err()), "server_locked");
        lock(&store, server.id, OrderState::Failed).await;
        unbind().await.unwrap();
        assert_eq!(code(&unbind().await.unwrap_err()), "server_not_bound");
        instances
            .delete(caller(), "prod", bound, name.as_str())
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn a_full_call_fits_a_transaction() {
        let (store, instances, app, _) = ready().await;
        let create = request(app, json!({}));
        let (made, _) = instances.create(caller(), "prod", create).await.unwrap();
        let mut all = Vec::new();
        for number in 0..=u8::try_from(MAX_SERVERS_PER_CALL).unwrap() {
            let server = servers::tests::server(&store, number + 10).await.id;
            all.extend(bind(server));
        }
        let many = instances.bind(caller(), "prod", made.id, all.clone()).await;
        assert_eq!(code(&many.unwrap_err()), "out_of_limit");
        all.pop();
        let (bound, _) = instances
            .bind(caller(), "prod", made.id, all.clone())
            .await
            .unwrap();
        assert_eq!(bound.len(), MAX_SERVERS_PER_CALL);
        let servers = all.iter().map(|bind| bind.server).collect();
        instances
            .unbind(caller(), "prod", made.id, servers)
            .await
            .unwrap();
        let left = Workspaces::new(store)
            .delete(caller(), "prod", "prod")
            .await;
        assert_eq!(code(&left.unwrap_err()), "in_use");
    }
}
