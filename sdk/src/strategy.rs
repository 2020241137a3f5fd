//! What a deployment strategy is asked and answers, with a builder of plans.

pub use crate::bindings::deployment_strategy::exports::windlass::plugin::strategy::{
    Application, JudgeRequest, JudgeStage, Judgement, Limits, Node, NodeKind, Observation,
    ParallelLimits, PlanRequest, ReleasePlan, ReleaseUnit, Server, TrafficShare, TrafficShift,
    UnitProgress, Verdict, Weight,
};

/// A node of a plan that is being built: the place under which others are added.
///
/// ```
/// # use windlass_sdk::strategy::{PlanBuilder, Role};
/// let mut plan = PlanBuilder::new();
/// let parent = plan.sequence(None, "shop", Role::Application);
/// plan.pause(Some(parent), "settle", 5_000);
/// assert_eq!(plan.build().nodes[1].parent, Some(0));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeRef(u32);

/// What an inner node stands for.
///
/// ```
/// assert_eq!(windlass_sdk::strategy::Role::Group.code(), "group");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Structure only.
    Plain,
    /// One application.
    Application,
    /// A group of servers that people act on.
    Group,
    /// A part of the order that can be rolled back by itself until it is done.
    Stage,
}

/// What can be rolled back once a stage has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rollback {
    /// The stage, and the order.
    Order,
    /// The stage alone.
    Stage,
    /// Nothing.
    Nothing,
}

impl Role {
    /// Its code in the contract.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Application => "application",
            Self::Group => "group",
            Self::Stage => "stage",
        }
    }
}

/// Builds a plan. Parents are made before their children, so that the result is always a tree. `None` as the parent is the
/// top; nodes at the top run one after the other.
///
/// ```
/// use windlass_sdk::strategy::{ParallelLimits, PlanBuilder, ReleaseUnit, Role, TrafficShift, Weight};
///
/// let mut plan = PlanBuilder::new();
/// plan.roll_back_on_failure().progress_deadline_ms(Some(1_800_000));
/// let shop = plan.sequence(None, "shop", Role::Application);
/// let first = plan.sequence(Some(shop), "first", Role::Group);
/// plan.release(Some(first), "web-1", ReleaseUnit::new("shop", "s1"));
/// plan.gate(Some(shop), "look at web-1", "Is the new version well?");
/// plan.judge(Some(shop), "errors", "after-first", 60_000);
/// let rest = plan.parallel(Some(shop), "rest", Role::Group, ParallelLimits { max_in_flight: 2, max_failures: 0 });
/// for server in ["s2", "s3"] {
///     plan.release(Some(rest), server, ReleaseUnit::new("shop", server));
/// }
/// plan.shift(None, "all of the traffic", TrafficShift {
///     application: "shop".into(),
///     weights: vec![("s1".into(), Weight::Exactly(100))],
/// });
/// assert_eq!(plan.build().nodes.len(), 9);
/// ```
#[derive(Debug, Clone)]
pub struct PlanBuilder {
    plan: ReleasePlan,
}

impl Default for PlanBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl PlanBuilder {
    /// An empty plan; a failure blocks the order until a person acts.
    #[must_use]
    pub fn new() -> Self {
        Self {
            plan: ReleasePlan {
                nodes: Vec::new(),
                on_failure: "block".into(),
                progress_deadline_ms: None,
                attributes: Vec::new(),
            },
        }
    }

    /// A failure that stops the order rolls it back.
    pub fn roll_back_on_failure(&mut self) -> &mut Self {
        self.plan.on_failure = "roll-back".into();
        self
    }

    /// The order counts as failed when nothing has finished for so long.
    pub fn progress_deadline_ms(&mut self, deadline_ms: Option<u64>) -> &mut Self {
        self.plan.progress_deadline_ms = deadline_ms;
        self
    }

    /// Children one after the other.
    pub fn sequence(&mut self, parent: Option<NodeRef>, name: &str, role: Role) -> NodeRef {
        self.add(parent, name, role, NodeKind::Sequence)
    }

    /// A part of the order, its children one after the other, and what can be rolled back once it has begun.
    pub fn stage(&mut self, parent: Option<NodeRef>, name: &str, rollback: Rollback) -> NodeRef {
        let node = self.add(parent, name, Role::Stage, NodeKind::Sequence);
        let code = match rollback {
            Rollback::Order => None,
            Rollback::Stage => Some("stage"),
            Rollback::Nothing => Some("none"),
        };
        if let (Some(code), Some(added)) = (code, self.plan.nodes.last_mut()) {
            added.attributes.push(("rollback".into(), code.into()));
        }
        node
    }

    /// Children side by side; 0 in flight: no limit of its own.
    pub fn parallel(
        &mut self,
        parent: Option<NodeRef>,
        name: &str,
        role: Role,
        limits: ParallelLimits,
    ) -> NodeRef {
        self.add(parent, name, role, NodeKind::Parallel(limits))
    }

    /// Release one server.
    pub fn release(&mut self, parent: Option<NodeRef>, name: &str, unit: ReleaseUnit) -> NodeRef {
        self.add(parent, name, Role::Plain, NodeKind::Release(unit))
    }

    /// Set weights.
    pub fn shift(&mut self, parent: Option<NodeRef>, name: &str, shift: TrafficShift) -> NodeRef {
        self.add(parent, name, Role::Plain, NodeKind::Shift(shift))
    }

    /// Divide traffic: these servers together get a share of their application's, in percent.
    pub fn share(&mut self, parent: Option<NodeRef>, name: &str, share: TrafficShare) -> NodeRef {
        self.add(parent, name, Role::Plain, NodeKind::Share(share))
    }

    /// Wait until a person confirms.
    pub fn gate(&mut self, parent: Option<NodeRef>, name: &str, message: &str) -> NodeRef {
        self.add(parent, name, Role::Plain, NodeKind::Gate(message.into()))
    }

    /// Wait.
    pub fn pause(&mut self, parent: Option<NodeRef>, name: &str, duration_ms: u64) -> NodeRef {
        self.add(parent, name, Role::Plain, NodeKind::Pause(duration_ms))
    }

    /// Ask the strategy whether to go on, after figures were collected for so long.
    pub fn judge(
        &mut self,
        parent: Option<NodeRef>,
        name: &str,
        stage: &str,
        window_ms: u64,
    ) -> NodeRef {
        let judge = JudgeStage {
            stage: stage.into(),
            window_ms,
        };
        self.add(parent, name, Role::Plain, NodeKind::Judge(judge))
    }

    /// The plan.
    #[must_use]
    pub fn build(self) -> ReleasePlan {
        self.plan
    }

    fn add(&mut self, parent: Option<NodeRef>, name: &str, role: Role, kind: NodeKind) -> NodeRef {
        let index = u32::try_from(self.plan.nodes.len()).unwrap_or(u32::MAX);
        self.plan.nodes.push(Node {
            parent: parent.map(|parent| parent.0),
            // The contract allows 60 characters.
            name: name.chars().take(60).collect(),
            role: role.code().into(),
            kind,
            attributes: Vec::new(),
        });
        NodeRef(index)
    }
}

impl ReleaseUnit {
    /// One server of one application; its weight is restored, and the stack's deadline holds.
    ///
    /// ```
    /// # use windlass_sdk::strategy::{ReleaseUnit, Weight};
    /// assert_eq!(ReleaseUnit::new("shop", "s1").restore, Weight::Remembered);
    /// ```
    #[must_use]
    pub fn new(application: &str, server: &str) -> Self {
        Self {
            application: application.into(),
            server: server.into(),
            restore: Weight::Remembered,
            healthy_for_ms: 0,
            health_deadline_ms: None,
        }
    }
}

impl PlanRequest {
    /// A release without applications, under the default limits; for tests.
    ///
    /// ```
    /// # use windlass_sdk::strategy::{Application, PlanRequest};
    /// let request = PlanRequest::new(&serde_json::json!({ "batch": 2 }))
    ///     .application(Application::new("shop", 1).server("s1", "cell-1", "zone-1"));
    /// assert_eq!(request.applications[0].servers.len(), 1);
    /// ```
    #[must_use]
    pub fn new(parameters: &serde_json::Value) -> Self {
        Self {
            operation: "release".into(),
            parameters: parameters.to_string(),
            limits: Limits {
                max_unavailable: "50%".into(),
                max_in_flight: 10,
                max_failures: "0".into(),
                min_healthy_members: 1,
            },
            applications: Vec::new(),
            attributes: Vec::new(),
        }
    }

    /// Identifiers of the workspace's cells, in their order.
    #[must_use]
    pub fn cells(&self) -> Vec<&str> {
        let cells = self.attributes.iter().find(|(key, _)| key == "cells");
        cells.map_or_else(Vec::new, |(_, cells)| {
            cells.split(',').filter(|cell| !cell.is_empty()).collect()
        })
    }

    /// In a workspace with these cells; for tests.
    #[must_use]
    pub fn in_cells(mut self, cells: &str) -> Self {
        self.attributes.push(("cells".into(), cells.into()));
        self
    }

    /// With one more application.
    #[must_use]
    pub fn application(mut self, application: Application) -> Self {
        self.applications.push(application);
        self
    }
}

impl Application {
    /// An application of a stage; for tests.
    ///
    /// ```
    /// # use windlass_sdk::strategy::Application;
    /// assert!(Application::new("shop", 1).server("s1", "cell-1", "zone-1").servers[0].healthy);
    /// ```
    #[must_use]
    pub fn new(key: &str, stage: u32) -> Self {
        Self {
            key: key.into(),
            stage,
            role: "release".into(),
            has_pools: true,
            target_version: "2".into(),
            servers: Vec::new(),
            attributes: Vec::new(),
        }
    }

    /// With one more healthy server.
    #[must_use]
    pub fn server(mut self, id: &str, cell: &str, zone: &str) -> Self {
        self.servers.push(Server {
            id: id.into(),
            name: id.into(),
            cell: cell.into(),
            zone: zone.into(),
            healthy: true,
            installed_version: Some("1".into()),
            attributes: Vec::new(),
        });
        self
    }
}

impl Judgement {
    /// A judgement and why.
    ///
    /// ```
    /// # use windlass_sdk::strategy::{Judgement, Verdict};
    /// assert_eq!(Judgement::new(Verdict::Hold, "errors rose by 3%").verdict, Verdict::Hold);
    /// ```
    #[must_use]
    pub fn new(verdict: Verdict, reason: &str) -> Self {
        Self {
            verdict,
            reason: reason.into(),
        }
    }
}
