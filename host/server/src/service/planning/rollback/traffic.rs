//! The traffic of an order that is rolled back: away from what is brought back before, and back to what it was behind.

use std::collections::{BTreeMap, BTreeSet};

use windlass_domain::{
    expand::PartInput,
    flow,
    id::ServerId,
    plan::{NodeKind, Plan},
    plugin::{
        LifecyclePlan, NodeRole, RollbackScope, ShiftWeight, StrategyNode, StrategyNodeKind,
        StrategyPlan, UnitState, Wishes,
    },
    progress::Progress,
    reducer,
};

/// The traffic of an order that is rolled back, as far as the order had shifted it.
#[derive(Default)]
pub(super) struct Traffic {
    applications: Vec<Shifted>,
}

/// One application's.
struct Shifted {
    key: String,
    /// Servers whose weights the order shifted.
    all: Vec<ServerId>,
    /// Of them: those that the rollback leaves as they are.
    unchanged: Vec<ServerId>,
}

impl Traffic {
    /// What the order shifted; `parts` get the servers that only this is about.
    pub(super) fn of(plan: &Plan, progress: &Progress, parts: &mut Vec<PartInput>) -> Self {
        let mut shifted: BTreeMap<u32, BTreeSet<ServerId>> = BTreeMap::new();
        for (leaf, planned) in (0u32..).zip(&plan.nodes) {
            if let NodeKind::Traffic(action) = &planned.kind
                && let Some((part, servers)) = action.shifts()
                && progress.node(leaf).shifted.is_some()
            {
                shifted.entry(part).or_default().extend(servers);
            }
        }
        let mut applications = Vec::new();
        for (index, servers) in shifted {
            let part = &plan.parts[index as usize];
            let changed: BTreeSet<ServerId> = parts
                .iter()
                .filter(|input| input.part.instance == part.instance)
                .flat_map(|input| input.servers.iter().map(|server| server.id))
                .collect();
            // What failed and has nothing to go back to stays without traffic.
            let lost = |server: &ServerId| {
                !changed.contains(server)
                    && (0u32..)
                        .zip(&plan.nodes)
                        .any(|(node, planned)| match planned.kind {
                            NodeKind::Unit { unit } => {
                                let unit = &plan.units[unit as usize];
                                unit.part == Some(index)
                                    && unit.server == *server
                                    && reducer::unit_state(plan, progress, node)
                                        == UnitState::Failed
                            }
                            NodeKind::Sequence
                            | NodeKind::Parallel { .. }
                            | NodeKind::Step { .. }
                            | NodeKind::Traffic(_)
                            | NodeKind::Gate { .. }
                            | NodeKind::Pause { .. }
                            | NodeKind::Judge { .. } => false,
                        })
            };
            let all: Vec<ServerId> = servers.into_iter().filter(|server| !lost(server)).collect();
            let unchanged: Vec<ServerId> = all
                .iter()
                .filter(|server| !changed.contains(server))
                .copied()
                .collect();
            match parts.iter_mut().find(|input| input.part.key == part.key) {
                Some(input) => {
                    let mine: BTreeSet<ServerId> =
                        input.servers.iter().map(|server| server.id).collect();
                    input.only_traffic = all
                        .iter()
                        .filter(|server| !mine.contains(server))
                        .copied()
                        .collect();
                }
                None => parts.push(PartInput {
                    part: part.clone(),
                    steps: LifecyclePlan {
                        steps: Vec::new(),
                        server_env: BTreeMap::new(),
                    },
                    approved: Wishes::default(),
                    flow: flow::release(),
                    files: None,
                    from_cache: false,
                    servers: Vec::new(),
                    only_traffic: all.clone(),
                }),
            }
            applications.push(Shifted {
                key: part.key.clone(),
                all,
                unchanged,
            });
        }
        Self { applications }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.applications
            .iter()
            .all(|shifted| shifted.all.is_empty())
    }

    /// A plan between the taking away of traffic from what it changes and its restoring.
    pub(super) fn around(&self, mut plan: StrategyPlan) -> StrategyPlan {
        let moves = |node: &StrategyNode| match node.kind {
            StrategyNodeKind::Shift { .. } | StrategyNodeKind::Share { .. } => true,
            StrategyNodeKind::Sequence
            | StrategyNodeKind::Parallel { .. }
            | StrategyNodeKind::Unit(_)
            | StrategyNodeKind::Gate { .. }
            | StrategyNodeKind::Pause { .. }
            | StrategyNodeKind::Judge { .. } => false,
        };
        if self.is_empty() || plan.nodes.iter().any(moves) {
            return plan;
        }
        let leaf = |name: String, kind: StrategyNodeKind| StrategyNode {
            parent: None,
            name: name.chars().take(60).collect(),
            role: NodeRole::Plain,
            rollback: RollbackScope::Order,
            kind,
        };
        let texts = |servers: &[ServerId]| servers.iter().map(ToString::to_string).collect();
        let away = self.applications.iter().filter(|shifted| {
            !shifted.unchanged.is_empty() && shifted.unchanged.len() < shifted.all.len()
        });
        let mut nodes: Vec<StrategyNode> = away
            .map(|shifted| {
                let kind = StrategyNodeKind::Share {
                    application: shifted.key.clone(),
                    servers: texts(&shifted.unchanged),
                    percent: 100,
                };
                leaf(format!("traffic of {} away", shifted.key), kind)
            })
            .collect();
        let offset = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
        nodes.extend(plan.nodes.into_iter().map(|mut node| {
            node.parent = node.parent.map(|parent| parent + offset);
            node
        }));
        nodes.extend(self.applications.iter().map(|shifted| {
            let weights = shifted
                .all
                .iter()
                .map(|server| (server.to_string(), ShiftWeight::Remembered));
            let kind = StrategyNodeKind::Shift {
                application: shifted.key.clone(),
                weights: weights.collect(),
            };
            leaf(format!("traffic of {} as before", shifted.key), kind)
        }));
        plan.nodes = nodes;
        plan
    }
}
