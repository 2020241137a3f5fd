//! Load balancers: HAProxy on managed servers, as records. Source: spec "Load balancers".
//!
//! Owns load balancers, their listeners and groups, the pools that come and go with these, and what is kept of the servers
//! behind them. What a server hosts is made of the rows each time (`configuration`) and taken there by [`steering`].
//!
//! | module | owns |
//! | --- | --- |
//! | [`listeners`] | listeners, virtual server groups |
//! | [`back_ends`] | servers behind pools: attached or bound, weights |
//! | `configuration` | what a load balancer is to run |
//! | [`pools`], `steered` | the engine's seam, and a pool behind it |
//! | [`steering`] | agents: converging, weights, HAProxy's own view |

pub mod back_ends;
mod configuration;
pub mod listeners;
pub mod pools;
mod steered;
pub mod steering;

pub(super) use configuration::{Behind, behind};

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use windlass_domain::{
    id::{LoadBalancerId, ServerId},
    load_balancer::{Listener, LoadBalancer, PortRanges, Power},
    name::LoadBalancerName,
    workspace::Workspace,
};
use windlass_store::{Revision, Store};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    records::{self, Sort},
    servers,
};
use crate::{
    clock,
    gateway::{Gateway, secrets::SecretVault},
    ids,
    keys::{self, Kind},
};
use steering::Steering;

/// A load balancer to be made.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateLoadBalancer {
    /// Name: unique in the workspace.
    pub name: LoadBalancerName,
    /// The server that is to host it: of this workspace, with the package `haproxy` installed.
    pub server: ServerId,
    /// Description, at most 500 characters.
    #[serde(default)]
    pub description: String,
}

/// A change of a load balancer; what is not given stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateLoadBalancer {
    /// Description.
    #[serde(default)]
    pub description: Option<String>,
}

/// Load balancers. Cheap to clone.
#[derive(Clone)]
pub struct LoadBalancers {
    store: Arc<dyn Store>,
    front_ports: Arc<PortRanges>,
    steering: Arc<Steering>,
}

/// What load balancers stand on.
pub struct LoadBalancerParts {
    /// Rows.
    pub store: Arc<dyn Store>,
    /// Keys of certificates.
    pub secrets: SecretVault,
    /// Agents.
    pub gateway: Gateway,
    /// Front ports that listeners may have.
    pub front_ports: PortRanges,
}

impl LoadBalancers {
    /// Over their parts. Nothing converges until [`LoadBalancers::run`].
    #[must_use]
    pub fn new(parts: LoadBalancerParts) -> Self {
        let LoadBalancerParts {
            store,
            secrets,
            gateway,
            front_ports,
        } = parts;
        Self {
            steering: Arc::new(Steering::new(store.clone(), secrets, gateway)),
            front_ports: Arc::new(front_ports),
            store,
        }
    }

    /// One load balancer of a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when it is another workspace's.
    pub async fn get(
        &self,
        ws: &str,
        id: LoadBalancerId,
    ) -> Result<(LoadBalancer, Revision), ServiceError> {
        let (balancer, revision) =
            records::get::<LoadBalancer>(&*self.store, &id.to_string()).await?;
        if balancer.workspace.as_str() == ws {
            Ok((balancer, revision))
        } else {
            Err(ServiceError::not_found("load balancer", id))
        }
    }

    /// A page of a workspace's load balancers, oldest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn list(
        &self,
        ws: &str,
        page: PageRequest,
    ) -> Result<PageOf<(LoadBalancer, Revision)>, ServiceError> {
        records::get::<Workspace>(&*self.store, ws).await?;
        let prefix = keys::all_of_workspace(Kind::LoadBalancer, ws);
        records::list(
            &*self.store,
            &prefix,
            Sort::Rising,
            &page,
            |_: &LoadBalancer| true,
        )
        .await
    }

    /// Makes a load balancer, started, without listeners.
    ///
    /// # Errors
    /// `name_taken`; [`ServiceError::NotFound`] of the workspace or the server; a text that breaks a rule.
    pub async fn create(
        &self,
        caller: Caller,
        ws: &str,
        request: CreateLoadBalancer,
    ) -> Result<(LoadBalancer, Revision), ServiceError> {
        let store = &*self.store;
        let id = LoadBalancerId::from_uuid(ids::new_uuid());
        let made = records::change(store, &caller, || async {
            let (workspace, _) = records::get::<Workspace>(store, ws).await?;
            servers::in_workspace(store, ws, request.server).await?;
            let name_key = keys::name_in_workspace(Kind::LoadBalancer, ws, request.name.as_str());
            if records::indexed(store, &name_key).await?.is_some() {
                let name = request.name.as_str();
                return Err(ServiceError::taken("load balancer", "name", name));
            }
            let balancer = LoadBalancer {
                schema: LoadBalancer::SCHEMA,
                id,
                name: request.name.clone(),
                workspace: workspace.name,
                server: request.server,
                description: request.description.clone(),
                power: Power::Started,
                created_at: clock::now(),
            };
            balancer.validate().map_err(ServiceError::of_value)?;
            let text = id.to_string();
            let txn = records::create(&balancer)?
                .and(records::refer(Kind::Workspace, ws))
                .and(records::refer(Kind::Server, &request.server.to_string()))
                .absent(name_key.clone())
                .put(name_key, text.clone())
                .put(keys::of_workspace(Kind::LoadBalancer, ws, &text), "");
            Ok((txn, balancer))
        })
        .await?;
        self.steering.look_again();
        Ok(made)
    }

    /// Changes its texts.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], [`ServiceError::Changed`]; a text that breaks a rule.
    pub async fn update(
        &self,
        caller: Caller,
        ws: &str,
        id: LoadBalancerId,
        if_match: Option<Revision>,
        request: UpdateLoadBalancer,
    ) -> Result<(LoadBalancer, Revision), ServiceError> {
        records::change(&*self.store, &caller, || async {
            let (mut balancer, revision) = self.get(ws, id).await?;
            records::check_revision::<LoadBalancer>(if_match, revision)?;
            if let Some(description) = &request.description {
                balancer.description.clone_from(description);
            }
            balancer.validate().map_err(ServiceError::of_value)?;
            Ok((records::replace(&balancer, revision)?, balancer))
        })
        .await
    }

    /// Starts or stops it. Doing so again changes nothing.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn set_power(
        &self,
        caller: Caller,
        ws: &str,
        id: LoadBalancerId,
        power: Power,
    ) -> Result<(LoadBalancer, Revision), ServiceError> {
        let changed = records::change(&*self.store, &caller, || async {
            let (mut balancer, revision) = self.get(ws, id).await?;
            balancer.power = power;
            Ok((records::replace(&balancer, revision)?, balancer))
        })
        .await?;
        self.steering.look_again();
        Ok(changed)
    }

    /// Deletes a load balancer without listeners; `confirm` is its name. Its agent ends HAProxy when it is connected next.
    ///
    /// # Errors
    /// `in_use`, with the listeners; `confirmation_missing`; [`ServiceError::NotFound`].
    pub async fn delete(
        &self,
        caller: Caller,
        ws: &str,
        id: LoadBalancerId,
        confirm: &str,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        let text = id.to_string();
        records::change(store, &caller, || async {
            let (balancer, revision) = self.get(ws, id).await?;
            let name = balancer.name.as_str();
            records::check_confirm("load balancer", confirm, name)?;
            let unused = records::unused(store, Kind::LoadBalancer, &text).await?;
            let by: Vec<String> = listeners::all_of(store, id)
                .await?
                .iter()
                .map(|listener: &Listener| format!("listener {} ({})", listener.name, listener.id))
                .collect();
            if !by.is_empty() {
                return Err(ServiceError::in_use("load balancer", name, &by));
            }
            let txn = records::remove(&balancer, revision)
                .and(unused)
                .put(keys::balancer_gone(balancer.server, id), "")
                .delete(keys::name_in_workspace(Kind::LoadBalancer, ws, name))
                .delete(keys::of_workspace(Kind::LoadBalancer, ws, &text));
            Ok((txn, ()))
        })
        .await?;
        self.steering.look_again();
        Ok(())
    }
}
