//! What a change of an order's plan takes: servers that are grouped anew, or that came, are planned like any others, with
//! what the order was made from; the domain puts that plan into the one that runs.
//!
//! Whether the change fits what has started by then is not decided here, but where it is made.

use std::collections::{BTreeMap, BTreeSet};

use windlass_domain::{
    id::ServerId,
    instance::Binding,
    operation::OperationSpec,
    order::{Control, Order, Purpose, ReleaseSpec, Target},
    plan::{LeftOut, NodeKind, Part, Plan},
    progress::Progress,
    revise::{BadEdit, Edit, Graft, PlanEdit, is_touched},
    server::Server,
    stages::Dependencies,
};

use super::{
    Planner, ServiceError,
    operations::nobody,
    reads::{back_ends_subject, members_subject, read_back_ends, read_members},
};
use crate::service::{load_balancers::behind, orders::bad_edit};

impl Planner {
    /// A change as it was asked for, with all that it takes to make it.
    ///
    /// # Errors
    /// [`ServiceError`]: what the order is for does not allow it, or its servers cannot be planned so.
    pub async fn edit(
        &self,
        order: &Order,
        plan: &Plan,
        progress: &Progress,
        edit: PlanEdit,
    ) -> Result<Edit, ServiceError> {
        expect_editable(order, &edit)?;
        Ok(match edit {
            PlanEdit::DeleteGroup { node } => Edit::DeleteGroup { node },
            PlanEdit::MoveServers { servers, to } => Edit::MoveServers { servers, to },
            PlanEdit::Regroup {
                application,
                strategy,
                parameters,
            } => {
                let asked = self.asked_of(order, plan, &application).await?;
                let bound = self.bound_now(&asked).await?;
                let bound = bound.iter().map(|(server, _)| server.id);
                let open = open_servers(plan, progress, asked.part);
                let servers = bound.filter(|server| open.contains(server)).collect();
                let grafted = self
                    .graft(order, asked.grouped(strategy, parameters), &servers)
                    .await?;
                match (grafted.graft, grafted.out.as_slice()) {
                    (Some(graft), _) => Edit::Regroup(graft),
                    (None, []) => {
                        return Err(bad_edit(&BadEdit::NothingToRegroup { application }));
                    }
                    (None, out) => return Err(nobody(out)),
                }
            }
            PlanEdit::SyncServers { application } => {
                let asked = self.asked_of(order, plan, &application).await?;
                let standing = standing(plan, asked.part);
                let out: BTreeSet<ServerId> = left_out(plan, asked.part).collect();
                let known: BTreeSet<ServerId> = standing.union(&out).copied().collect();
                let bound = self.bound_now(&asked).await?;
                let now: BTreeSet<ServerId> = bound.iter().map(|(server, _)| server.id).collect();
                let mut reads = BTreeMap::new();
                if asked.spec.servers().is_empty() {
                    let subject = members_subject(&application, asked.spec.cells());
                    reads.insert(subject, read_members(&bound));
                }
                // Who is bound stands behind the application's pools.
                let pools = asked.part.pools.iter().copied().collect();
                for (pool, members) in behind(&*self.parts.store, &order.workspace, pools).await? {
                    reads.insert(back_ends_subject(&pool), read_back_ends(&members));
                }
                let came: BTreeSet<ServerId> = now.difference(&known).copied().collect();
                let gone = known.difference(&now).copied().collect();
                let Grafted { graft, out } =
                    self.graft(order, asked.grouped_by_default(), &came).await?;
                if order.control == Control::Active && graft.is_some() {
                    self.expect_online(&bound, &came)?;
                }
                Edit::SyncServers {
                    application,
                    came: graft,
                    out,
                    gone,
                    reads,
                }
            }
            PlanEdit::Sequence { lanes } => {
                let dependencies = match order.purpose {
                    Purpose::Release => self.release_spec(order).await?.dependencies,
                    Purpose::Rollback { .. }
                    | Purpose::Operation { .. }
                    | Purpose::Invocation { .. } => Dependencies::default(),
                };
                let dependencies = dependencies.pairs().map_err(super::dependencies_invalid)?;
                Edit::Sequence {
                    lanes,
                    dependencies,
                }
            }
        })
    }

    /// What an order's initialisation checks, for servers that come in later.
    fn expect_online(
        &self,
        bound: &[(Server, Binding)],
        came: &BTreeSet<ServerId>,
    ) -> Result<(), ServiceError> {
        let mut came = bound.iter().filter(|(server, _)| came.contains(&server.id));
        match came.find(|(server, _)| !self.parts.agents.is_online(server.id)) {
            None => Ok(()),
            Some((server, _)) => Err(ServiceError::conflict(
                "server_not_connected",
                format!(
                    "{} was bound, and its agent is not connected: it cannot take part now",
                    server.name
                ),
                "start its agent, or unbind it",
            )),
        }
    }

    async fn release_spec(&self, order: &Order) -> Result<ReleaseSpec, ServiceError> {
        self.spec(order)
            .await
            .map_err(|message| ServiceError::Unavailable { message })
    }

    /// What the order was made from, of one application.
    async fn asked_of<'a>(
        &self,
        order: &Order,
        plan: &'a Plan,
        application: &str,
    ) -> Result<Asked<'a>, ServiceError> {
        let missing = || {
            bad_edit(&BadEdit::NoSuchApplication {
                application: application.to_owned(),
            })
        };
        let mut parts = plan.parts.iter();
        let part = parts.find(|part| part.key == application);
        let part = part.ok_or_else(missing)?;
        let (spec, dependencies) = match order.purpose {
            Purpose::Release | Purpose::Rollback { .. } | Purpose::Invocation { .. } => {
                let asked = self.release_spec(order).await?;
                let dependencies = asked.dependencies.pairs();
                let mut targets = asked.targets.iter();
                let target = targets.find(|target| target.instance == part.instance);
                let target = Target {
                    // The order stays with the tech stack that it was planned with.
                    tech_stack_version: part
                        .stack
                        .as_ref()
                        .and_then(|stack| format!("={}", stack.version).parse().ok()),
                    ..target.ok_or_else(missing)?.clone()
                };
                let spec = ReleaseSpec {
                    targets: vec![target],
                    shift_only: Vec::new(),
                    dependencies: Dependencies::default(),
                    lanes: Vec::new(),
                    ..asked
                };
                (Spec::Release(spec), dependencies)
            }
            Purpose::Operation { .. } => {
                let asked = self.asked::<OperationSpec>(order).await;
                let mut asked = asked.map_err(|message| ServiceError::Unavailable { message })?;
                asked
                    .targets
                    .retain(|target| target.instance == part.instance);
                (Spec::Operation(asked), Ok(Vec::new()))
            }
        };
        Ok(Asked {
            part,
            spec,
            dependencies: dependencies.map_err(super::dependencies_invalid)?,
        })
    }

    /// The servers that are bound now and were asked for.
    async fn bound_now(&self, asked: &Asked<'_>) -> Result<Vec<(Server, Binding)>, ServiceError> {
        let Some(instance) = self.parts.instances.find(asked.part.instance).await? else {
            return Ok(Vec::new());
        };
        let mut bound = self.bound(&instance, asked.spec.cells()).await?;
        let named = asked.spec.servers();
        bound.retain(|(server, _)| named.is_empty() || named.contains(&server.id));
        Ok(bound)
    }

    /// Plans some servers of one application with what the order was made from.
    async fn graft(
        &self,
        order: &Order,
        asked: Asked<'_>,
        servers: &BTreeSet<ServerId>,
    ) -> Result<Grafted, ServiceError> {
        if servers.is_empty() {
            return Ok(Grafted::default());
        }
        let (plan, out) = match asked.spec {
            Spec::Release(spec) => {
                let plan = self.plan_servers(&order.workspace, &spec, Some(servers));
                (Some(plan.await?), Vec::new())
            }
            Spec::Operation(mut spec) => {
                for target in &mut spec.targets {
                    target.servers = servers.iter().copied().collect();
                }
                self.plan_qualified(&order.workspace, &spec).await?
            }
        };
        let graft = plan.map(|plan| {
            Box::new(Graft {
                application: asked.part.key.clone(),
                plan,
                dependencies: asked.dependencies,
            })
        });
        Ok(Grafted { graft, out })
    }
}

/// What an order was made from, of one of its applications.
struct Asked<'a> {
    part: &'a Part,
    /// With the application's target alone.
    spec: Spec,
    /// What depends on what in the order.
    dependencies: Vec<(String, String)>,
}

enum Spec {
    Release(ReleaseSpec),
    Operation(OperationSpec),
}

/// Servers that were planned: those that take part, and those that do not qualify.
#[derive(Default)]
struct Grafted {
    graft: Option<Box<Graft>>,
    out: Vec<LeftOut>,
}

impl Asked<'_> {
    fn grouped(mut self, strategy: String, parameters: serde_json::Value) -> Self {
        let (by, with) = self.spec.grouping();
        (*by, *with) = (strategy, parameters);
        self
    }

    /// Without explicit groups: what came stands in none of them.
    fn grouped_by_default(mut self) -> Self {
        let (_, with) = self.spec.grouping();
        if let Some(fields) = with.as_object_mut()
            && fields.get("grouping").is_some_and(|by| by == "explicit")
        {
            fields.retain(|name, _| name != "grouping" && name != "groups");
        }
        self
    }
}

impl Spec {
    const fn grouping(&mut self) -> (&mut String, &mut serde_json::Value) {
        match self {
            Self::Release(spec) => (&mut spec.strategy, &mut spec.parameters),
            Self::Operation(spec) => (&mut spec.strategy, &mut spec.parameters),
        }
    }

    fn cells(&self) -> &[String] {
        match self {
            Self::Release(spec) => spec.targets.first().map_or(&[], |target| &target.cells),
            Self::Operation(spec) => spec.targets.first().map_or(&[], |target| &target.cells),
        }
    }

    /// Those that were chosen one by one; empty: all.
    fn servers(&self) -> &[ServerId] {
        match self {
            Self::Release(_) => &[],
            Self::Operation(spec) => spec.targets.first().map_or(&[], |target| &target.servers),
        }
    }
}

/// Which plans can be changed in which way.
fn expect_editable(order: &Order, edit: &PlanEdit) -> Result<(), ServiceError> {
    let moves = matches!(edit, PlanEdit::MoveServers { .. });
    let (what, mend) = match &order.purpose {
        Purpose::Release | Purpose::Operation { .. } => return Ok(()),
        Purpose::Rollback { .. } if moves => return Ok(()),
        Purpose::Rollback { .. } => (
            "a rollback brings back everything that it was made for: nothing can be left out of it or put off",
            "move servers to another group, or cancel the rollback",
        ),
        Purpose::Invocation { .. } => (
            "a command on servers has no groups",
            "cancel it, and invoke the command on other servers",
        ),
    };
    Err(ServiceError::conflict("wrong_purpose", what, mend))
}

/// The servers of a part that stand in the tree, with their nodes.
fn units_of<'a>(plan: &'a Plan, part: &'a Part) -> impl Iterator<Item = (u32, ServerId)> + 'a {
    let nodes = (0u32..).zip(&plan.nodes);
    nodes.filter_map(move |(node, planned)| {
        let unit = match planned.kind {
            NodeKind::Unit { unit } => plan.units.get(unit as usize)?,
            NodeKind::Sequence
            | NodeKind::Parallel { .. }
            | NodeKind::Step { .. }
            | NodeKind::Traffic(_)
            | NodeKind::Gate { .. }
            | NodeKind::Pause { .. }
            | NodeKind::Judge { .. } => return None,
        };
        let mine = plan.part_of(unit)?;
        (mine.key == part.key).then_some((node, unit.server))
    })
}

fn standing(plan: &Plan, part: &Part) -> BTreeSet<ServerId> {
    units_of(plan, part).map(|(_, server)| server).collect()
}

fn left_out<'a>(plan: &'a Plan, part: &'a Part) -> impl Iterator<Item = ServerId> + 'a {
    let out = plan.left_out.iter();
    out.filter(|out| out.application == part.key)
        .map(|out| out.server)
}

/// The servers of a part that nobody has begun: those that wait in a group, and those without one.
fn open_servers(plan: &Plan, progress: &Progress, part: &Part) -> BTreeSet<ServerId> {
    let waiting = units_of(plan, part).filter(|(node, _)| !is_touched(plan, progress, *node));
    waiting
        .map(|(_, server)| server)
        .chain(left_out(plan, part))
        .collect()
}
