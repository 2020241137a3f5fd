//! What a change of an order's plan takes: servers that are grouped anew, or that came, are planned like any release, with
//! what the order was made from; the domain puts that plan into the one that runs.
//!
//! Whether the change fits what has started by then is not decided here, but where it is made.

use std::collections::{BTreeMap, BTreeSet};

use windlass_domain::{
    id::ServerId,
    instance::Binding,
    order::{Control, Order, Purpose, ReleaseSpec, Target},
    plan::{NodeKind, Part, Plan},
    progress::Progress,
    revise::{BadEdit, Edit, Graft, PlanEdit, is_touched},
    server::Server,
    stages::Dependencies,
};

use super::{
    Planner, ServiceError,
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
                let (spec, part, target) = self.target(order, plan, &application).await?;
                let open = open_servers(plan, progress, part);
                let bound = self.bound_to(part, &target).await?;
                let servers: BTreeSet<ServerId> = open.intersection(&bound).copied().collect();
                if servers.is_empty() {
                    return Err(bad_edit(&BadEdit::NothingToRegroup { application }));
                }
                let spec = ReleaseSpec {
                    strategy,
                    parameters,
                    ..spec
                };
                let graft = self
                    .graft(order, spec, target, (application, &servers))
                    .await?;
                Edit::Regroup(graft)
            }
            PlanEdit::SyncServers { application } => {
                let (spec, part, target) = self.target(order, plan, &application).await?;
                let standing = standing(plan, part);
                let out: BTreeSet<ServerId> = left_out(plan, part).collect();
                let known: BTreeSet<ServerId> = standing.union(&out).copied().collect();
                let (instance, cells) = (part.instance, target.cells.clone());
                let found = self.parts.instances.find(instance).await?;
                let bound = match found {
                    Some(instance) => self.bound(&instance, &cells).await?,
                    None => Vec::new(),
                };
                let now: BTreeSet<ServerId> = bound.iter().map(|(server, _)| server.id).collect();
                let mut reads: BTreeMap<_, _> =
                    [(members_subject(&application, &cells), read_members(&bound))].into();
                // Who is bound stands behind the application's pools.
                let (store, pools) = (&*self.parts.store, part.pools.iter().copied().collect());
                for (pool, members) in behind(store, &order.workspace, pools).await? {
                    reads.insert(back_ends_subject(&pool), read_back_ends(&members));
                }
                let came: BTreeSet<ServerId> = now.difference(&known).copied().collect();
                let gone = known.difference(&now).copied().collect();
                if order.control == Control::Active {
                    self.expect_online(&bound, &came)?;
                }
                let came = if came.is_empty() {
                    None
                } else {
                    let spec = ReleaseSpec {
                        parameters: without_groups(spec.parameters),
                        ..spec
                    };
                    let graft = (application.clone(), &came);
                    Some(self.graft(order, spec, target, graft).await?)
                };
                Edit::SyncServers {
                    application,
                    came,
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

    /// What the order releases of an application.
    async fn target<'a>(
        &self,
        order: &Order,
        plan: &'a Plan,
        application: &str,
    ) -> Result<(ReleaseSpec, &'a Part, Target), ServiceError> {
        let spec = self.release_spec(order).await?;
        let found = plan.parts.iter().find_map(|part| {
            let mut targets = spec.targets.iter();
            let target = targets.find(|target| target.instance == part.instance)?;
            (part.key == application).then(|| (part, target.clone()))
        });
        let (part, target) = found.ok_or_else(|| {
            bad_edit(&BadEdit::NoSuchApplication {
                application: application.to_owned(),
            })
        })?;
        Ok((spec, part, target))
    }

    async fn bound_to(
        &self,
        part: &Part,
        target: &Target,
    ) -> Result<BTreeSet<ServerId>, ServiceError> {
        let Some(instance) = self.parts.instances.find(part.instance).await? else {
            return Ok(BTreeSet::new());
        };
        let bound = self.bound(&instance, &target.cells).await?;
        Ok(bound.iter().map(|(server, _)| server.id).collect())
    }

    /// Plans some servers of one application with what the order was made from.
    async fn graft(
        &self,
        order: &Order,
        spec: ReleaseSpec,
        target: Target,
        (application, servers): (String, &BTreeSet<ServerId>),
    ) -> Result<Box<Graft>, ServiceError> {
        let dependencies = spec.dependencies.pairs();
        let dependencies = dependencies.map_err(super::dependencies_invalid)?;
        let spec = ReleaseSpec {
            targets: vec![target],
            shift_only: Vec::new(),
            dependencies: Dependencies::default(),
            lanes: Vec::new(),
            ..spec
        };
        let plan = self
            .plan_servers(&order.workspace, &spec, Some(servers))
            .await?;
        Ok(Box::new(Graft {
            application,
            plan,
            dependencies,
        }))
    }
}

/// The order's parameters without explicit groups: what came stands in none of them, and is grouped as by default.
fn without_groups(mut parameters: serde_json::Value) -> serde_json::Value {
    if let Some(fields) = parameters.as_object_mut()
        && fields.get("grouping").is_some_and(|by| by == "explicit")
    {
        fields.retain(|name, _| name != "grouping" && name != "groups");
    }
    parameters
}

/// Which plans can be changed in which way.
fn expect_editable(order: &Order, edit: &PlanEdit) -> Result<(), ServiceError> {
    let plans_anew = match edit {
        PlanEdit::Regroup { .. } | PlanEdit::SyncServers { .. } => true,
        PlanEdit::DeleteGroup { .. } | PlanEdit::MoveServers { .. } | PlanEdit::Sequence { .. } => {
            false
        }
    };
    let moves = matches!(edit, PlanEdit::MoveServers { .. });
    let (what, mend) = match &order.purpose {
        Purpose::Release => return Ok(()),
        Purpose::Operation { .. } if !plans_anew => return Ok(()),
        Purpose::Rollback { .. } if moves => return Ok(()),
        Purpose::Operation { .. } => (
            "an operation's servers are not grouped anew",
            "cancel it, and make another operation for these servers",
        ),
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
