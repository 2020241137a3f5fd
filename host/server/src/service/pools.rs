//! Pools: what stands behind the traffic seam. Members' weights are the engine's.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use windlass_domain::{
    id::PoolId,
    instance::ServiceInstance,
    name::PoolName,
    pool::{Pool, PoolKind},
};
use windlass_store::{Revision, Store};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    records::{self, Sort},
};
use crate::{
    clock, ids,
    keys::{self, Kind},
};

/// A pool to be made.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreatePool {
    /// Name: unique in the workspace.
    pub name: PoolName,
    /// What it is made of.
    #[serde(default)]
    pub kind: PoolKind,
}

/// Pools. Cheap to clone.
#[derive(Clone)]
pub struct Pools {
    store: Arc<dyn Store>,
}

impl Pools {
    /// Over a store.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// One pool of a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when it is another workspace's.
    pub async fn get(&self, ws: &str, id: PoolId) -> Result<(Pool, Revision), ServiceError> {
        let (pool, revision) = records::get::<Pool>(&*self.store, &id.to_string()).await?;
        if pool.workspace.as_str() == ws {
            Ok((pool, revision))
        } else {
            Err(ServiceError::not_found("pool", id))
        }
    }

    /// A page of a workspace's pools, oldest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn list(
        &self,
        ws: &str,
        page: PageRequest,
    ) -> Result<PageOf<(Pool, Revision)>, ServiceError> {
        records::get::<windlass_domain::workspace::Workspace>(&*self.store, ws).await?;
        let prefix = keys::all_of_workspace(Kind::Pool, ws);
        records::list(&*self.store, &prefix, Sort::Rising, &page, |_: &Pool| true).await
    }

    /// Makes a pool.
    ///
    /// # Errors
    /// `name_taken`; `pool_kind_invalid`; [`ServiceError::NotFound`] of the workspace.
    pub async fn create(
        &self,
        caller: Caller,
        ws: &str,
        request: CreatePool,
    ) -> Result<(Pool, Revision), ServiceError> {
        let store = &*self.store;
        let id = PoolId::from_uuid(ids::new_uuid());
        match request.kind {
            PoolKind::Simulated => {}
            PoolKind::LoadBalancer { .. } => {
                return Err(ServiceError::invalid(
                    "pool_kind_invalid",
                    "kind",
                    "a pool of a load balancer is made with its listener or virtual server group",
                    "make the listener or group",
                ));
            }
        }
        records::change(store, &caller, || async {
            let (workspace, _) =
                records::get::<windlass_domain::workspace::Workspace>(store, ws).await?;
            let name_key = keys::name_in_workspace(Kind::Pool, ws, request.name.as_str());
            if records::indexed(store, &name_key).await?.is_some() {
                return Err(ServiceError::taken("pool", "name", request.name.as_str()));
            }
            let pool = Pool {
                schema: Pool::SCHEMA,
                id,
                name: request.name.clone(),
                workspace: workspace.name,
                kind: request.kind,
                created_at: clock::now(),
            };
            let text = id.to_string();
            let txn = records::create(&pool)?
                .and(records::refer(Kind::Workspace, ws))
                .absent(name_key.clone())
                .put(name_key, text.clone())
                .put(keys::of_workspace(Kind::Pool, ws, &text), "");
            Ok((txn, pool))
        })
        .await
    }

    /// Deletes a pool that no service instance takes traffic from; `confirm` is its name.
    ///
    /// # Errors
    /// `in_use`, with the service instances; `pool_of_listener`; `confirmation_missing`; [`ServiceError::NotFound`].
    pub async fn delete(
        &self,
        caller: Caller,
        ws: &str,
        id: PoolId,
        confirm: &str,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        let text = id.to_string();
        records::change(store, &caller, || async {
            let (pool, revision) = self.get(ws, id).await?;
            records::check_confirm("pool", confirm, pool.name.as_str())?;
            match pool.kind {
                PoolKind::Simulated => {}
                PoolKind::LoadBalancer { listener, .. } => {
                    return Err(ServiceError::conflict(
                        "pool_of_listener",
                        format!(
                            "the pool `{}` belongs to the listener {listener}",
                            pool.name
                        ),
                        "delete the listener, or its server group",
                    ));
                }
            }
            let unused = records::unused(store, Kind::Pool, &text).await?;
            let below = keys::all_of_workspace(Kind::Instance, ws);
            let by: Vec<String> = records::all_indexed::<ServiceInstance>(store, &below)
                .await?
                .into_iter()
                .filter(|instance| instance.pools.contains(&id))
                .map(|instance| format!("service instance {} ({})", instance.name, instance.id))
                .collect();
            if !by.is_empty() {
                return Err(ServiceError::in_use("pool", pool.name.as_str(), &by));
            }
            let txn = records::remove(&pool, revision)
                .and(unused)
                .delete(keys::name_in_workspace(Kind::Pool, ws, pool.name.as_str()))
                .delete(keys::of_workspace(Kind::Pool, ws, &text));
            Ok((txn, ()))
        })
        .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{
        records::tests::{caller, memory_store},
        workspaces::{Workspaces, tests::request},
    };

    #[tokio::test]
    async fn names_are_unique_in_a_workspace_and_free_after_deletion() {
        let store = memory_store();
        let workspaces = Workspaces::new(store.clone());
        let pools = Pools::new(store);
        let create = |ws: &'static str| {
            let request = CreatePool {
                name: "front".parse().unwrap(),
                kind: PoolKind::Simulated,
            };
            pools.create(caller(), ws, request)
        };
        assert!(matches!(
            create("one").await.unwrap_err(),
            ServiceError::NotFound {
                what: "workspace",
                ..
            }
        ));
        for ws in ["one", "two"] {
            workspaces.create(caller(), request(ws)).await.unwrap();
        }
        let (first, second) = tokio::join!(create("one"), create("one"));
        assert!(first.is_ok() != second.is_ok());
        let (pool, _) = first.or(second).unwrap();
        create("two").await.unwrap();
        assert!(pools.get("two", pool.id).await.is_err());
        let left = workspaces.delete(caller(), "one", "one").await.unwrap_err();
        assert!(left.to_string().contains("pool front"), "{left}");
        assert!(
            pools
                .delete(caller(), "one", pool.id, "back")
                .await
                .is_err()
        );
        pools
            .delete(caller(), "one", pool.id, "front")
            .await
            .unwrap();
        workspaces.delete(caller(), "one", "one").await.unwrap();
    }
}
