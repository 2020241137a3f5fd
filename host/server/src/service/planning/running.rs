//! What the engine asks while an order runs: drift, servers, members, judgements, rollbacks.

use std::collections::{BTreeMap, btree_map::Entry};

use async_trait::async_trait;
use windlass_domain::{
    id::{InstanceId, ServerId},
    order::{Order, ReleaseSpec},
    plan::{NodeIndex, NodeKind, Plan, Read},
    plugin::{JudgeRequest, Judgement, Observation},
    progress::{NodeState, Progress},
    server::ReleaseState,
};

use super::{Planner, cell_of};
use crate::engine::{NoRollback, PlannedRollback, Planning};

/// The largest specification of an order.
const MAX_SPEC_BYTES: u64 = 1024 * 1024;

#[async_trait]
impl Planning for Planner {
    async fn reread(
        &self,
        plan: &Plan,
        subjects: &[String],
    ) -> Result<BTreeMap<String, Read>, String> {
        self.current(plan, subjects)
            .await
            .map_err(|error| error.to_string())
    }

    async fn check_servers(&self, plan: &Plan) -> Result<Vec<String>, String> {
        let mut problems = Vec::new();
        for part in &plan.parts {
            if let Some(stack) = &part.stack
                && let Err(error) = self.parts.plugins.pinned(stack.digest).await
            {
                problems.push(error.to_string());
            }
        }
        let placed = plan.placed();
        let mut states = BTreeMap::new();
        for unit in placed
            .iter()
            .filter_map(|unit| plan.units.get(*unit as usize))
        {
            // Server work waits for each server by itself, and what brings back for none.
            if unit.part.is_some() && !plan.brings_back && !self.parts.agents.is_online(unit.server)
            {
                problems.push(format!("{} is not connected", unit.server_name));
            }
            // Source: spec "Release orders", "Before running". What brings back takes each server as it is.
            let released = plan.part_of(unit).filter(|part| part.package.is_some());
            let Some(part) = released.filter(|_| !plan.brings_back) else {
                continue;
            };
            let states = match states.entry(part.instance) {
                Entry::Occupied(read) => read.into_mut(),
                Entry::Vacant(unread) => {
                    let read = self.states(part.instance).await;
                    unread.insert(read.map_err(|error| error.to_string())?)
                }
            };
            if states.of(unit.server, true) == ReleaseState::Offline {
                problems.push(format!(
                    "{} is offline: bring it online first, unbind it, or take its group out of the order",
                    unit.server_name
                ));
            }
        }
        Ok(problems)
    }

    async fn members(&self, instance: InstanceId) -> Result<Vec<(ServerId, String)>, String> {
        let instance = self
            .parts
            .instances
            .find(instance)
            .await
            .map_err(|error| error.to_string())?;
        let Some(instance) = instance else {
            return Ok(Vec::new());
        };
        let servers = self
            .bound(&instance, &[])
            .await
            .map_err(|error| error.to_string())?;
        Ok(servers
            .into_iter()
            .map(|(server, _)| (server.id, cell_of(&server)))
            .collect())
    }

    async fn keep_tech_stacks(&self, order: &Order) -> Result<(), String> {
        for change in &order.tech_stacks {
            self.parts
                .instances
                .change_tech_stack(change)
                .await
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    async fn judge(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        stage: &str,
        figures: Vec<Observation>,
    ) -> Result<Judgement, String> {
        let Some(strategy) = &plan.strategy else {
            return Err("the order has no strategy to judge".to_owned());
        };
        let plugin = self
            .parts
            .plugins
            .pinned(strategy.digest)
            .await
            .map_err(|error| error.to_string())?;
        let parameters = self.strategy_parameters(order).await?;
        let mut observations = figures;
        for (node, planned) in (0u32..).zip(&plan.nodes) {
            let NodeKind::Unit { unit } = planned.kind else {
                continue;
            };
            let unit = &plan.units[unit as usize];
            let Some(part) = plan.part_of(unit) else {
                continue;
            };
            let state = progress.state(node);
            for (metric, holds) in [
                ("unit.released", state == NodeState::Succeeded),
                ("unit.failed", state.needs_mending()),
                ("agent.online", self.parts.agents.is_online(unit.server)),
            ] {
                observations.push(Observation {
                    application: part.key.clone(),
                    server: unit.server.to_string(),
                    metric: metric.to_owned(),
                    value: f64::from(u8::from(holds)),
                });
            }
        }
        let request = JudgeRequest {
            stage: stage.to_owned(),
            parameters,
            observations,
        };
        windlass_runtime::for_order(order.id.to_string(), plugin.judge(&request))
            .await
            .map_err(|error| error.to_string())
    }

    async fn plan_rollback(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        reason: &str,
    ) -> Result<PlannedRollback, NoRollback> {
        self.rollback(order, plan, progress, reason, "windlass")
            .await
    }

    async fn plan_stage_rollback(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        (stage, reason): (NodeIndex, &str),
    ) -> Result<Option<PlannedRollback>, NoRollback> {
        self.roll_back(order, plan, progress, (Some(stage), reason), "windlass")
            .await
    }
}

impl Planner {
    /// The parameters that an order gave its strategy.
    pub(super) async fn strategy_parameters(
        &self,
        order: &Order,
    ) -> Result<serde_json::Value, String> {
        /// What releases and operations have in common.
        #[derive(serde::Deserialize)]
        struct Spec {
            parameters: serde_json::Value,
        }
        let spec: Spec = self.asked(order).await?;
        Ok(spec.parameters)
    }

    /// What a release was made from.
    pub(super) async fn spec(&self, order: &Order) -> Result<ReleaseSpec, String> {
        self.asked(order).await
    }

    pub(super) async fn asked<T: serde::de::DeserializeOwned>(
        &self,
        order: &Order,
    ) -> Result<T, String> {
        let digest = windlass_store::BlobDigest::from_bytes(*order.spec.as_bytes());
        let bytes = self
            .parts
            .blobs
            .get_bytes(digest, MAX_SPEC_BYTES)
            .await
            .map_err(|error| error.to_string())?;
        serde_json::from_slice(&bytes).map_err(|error| error.to_string())
    }
}
