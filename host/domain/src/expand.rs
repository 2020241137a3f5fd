//! From what plugins answered to a plan: checks a strategy's nodes and expands each unit by the fixed skeleton.
//!
//! Everything a plugin returned is untrusted. A strategy's plan is accepted only when every server stands in it exactly
//! once, parents come before children, weights lie between 0 and 100 and no shift takes a pool's last traffic away;
//! otherwise it is refused with the node and the rule, and no server is touched. A stack's steps must stay within what
//! an operator has approved.
//!
//! The skeleton of a unit: drain → fetch → unpack → prepare → install → configure → stop (from the manifest that is
//! installed) → activate → deploy → start → check → restore. Source: spec "Release orders", "Per server".

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::{
    id::ServerId,
    limits::Limits,
    manifest::{Manifest, PluginRef},
    plan::{Level, Node, NodeIndex, NodeKind, Part, Plan, Read, StepTemplate, TrafficAction, Unit},
    plugin::{
        LifecyclePlan, NodeRole, OnFailure, Phase, RestoreWeight, StackAction, StackStep,
        StrategyNode, StrategyNodeKind, StrategyPlan, StrategyUnit, Wishes,
    },
    value::Environment,
};

/// A plan has at most so many nodes.
pub const MAX_NODES: usize = 200_000;
/// The tree is at most so deep, counted in strategy nodes.
pub const MAX_DEPTH: usize = 16;
/// A step may run for at most a day.
pub const MAX_TIMEOUT_MS: u64 = 86_400_000;
/// Automatic new attempts of one step.
pub const MAX_RETRIES: u32 = 10;
/// A stack gives at most so many steps for all phases of one application.
pub const MAX_STEPS: usize = 200;
/// One step as JSON: it has to fit a row of the inbox together with its environment.
pub const MAX_STEP_BYTES: usize = 20 * 1024;
/// The stop, start and check steps of one application together, as JSON: they have to fit a manifest's row.
pub const MAX_MANIFEST_BYTES: usize = 20 * 1024;
/// The environment of one server, as JSON.
pub const MAX_ENV_BYTES: usize = 8 * 1024;

/// One application to be planned.
#[derive(Debug, Clone)]
pub struct PartInput {
    /// All but `stop`, `start` and `check`, which are taken from `steps`.
    pub part: Part,
    /// What the stack answered.
    pub steps: LifecyclePlan,
    /// What an operator has approved of the stack's wishes.
    pub approved: Wishes,
    /// Its servers.
    pub servers: Vec<ServerInput>,
}

/// One server of an application to be planned.
#[derive(Debug, Clone)]
pub struct ServerInput {
    /// Its id.
    pub id: ServerId,
    /// Its name.
    pub name: String,
    /// Its cell's identifier.
    pub cell: String,
    /// What differs on it.
    pub env: Environment,
    /// What is installed there now.
    pub installed: Option<Manifest>,
    /// Of a rollback: the drain that remembers its weights.
    pub drained_by: Option<NodeIndex>,
    /// Keys in the plan's reads that concern it.
    pub reads: Vec<String>,
}

/// Everything a plan is expanded from.
#[derive(Debug, Clone)]
pub struct PlanInput {
    /// The strategy; `None`: the core's own plan.
    pub strategy: Option<PluginRef>,
    /// The envelope.
    pub limits: Limits,
    /// Deadline of each drain, in milliseconds.
    pub drain_deadline_ms: u64,
    /// How long a task may wait for its server, in milliseconds.
    pub delivery_deadline_ms: u64,
    /// Applications.
    pub parts: Vec<PartInput>,
    /// What was read.
    pub reads: BTreeMap<String, Read>,
}

/// Why what a plugin returned is no plan. No server was touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum BadPlan {
    #[error("the strategy returned no nodes")]
    Empty,
    #[error(
        "the plan has {nodes} nodes; the limit is {MAX_NODES}: release fewer servers in one order"
    )]
    TooManyNodes { nodes: usize },
    #[error("node {node} (`{name}`) is deeper than {MAX_DEPTH} levels")]
    TooDeep { node: usize, name: String },
    #[error(
        "node {node} (`{name}`) names node {parent} as its parent: a parent stands before its children"
    )]
    BadParent {
        node: usize,
        name: String,
        parent: u32,
    },
    #[error("node {node} (`{name}`) hangs below node {parent}, which is a leaf")]
    LeafParent {
        node: usize,
        name: String,
        parent: u32,
    },
    #[error("node {node} (`{name}`) has no children")]
    Childless { node: usize, name: String },
    #[error("node {node} has a name of {length} characters; the limit is 1 to 60")]
    BadName { node: usize, length: usize },
    #[error(
        "node {node} (`{name}`) names the application `{application}`, which this order does not release"
    )]
    UnknownApplication {
        node: usize,
        name: String,
        application: String,
    },
    #[error(
        "node {node} (`{name}`) names the server `{server}`, which is not a server of `{application}` in this order"
    )]
    UnknownServer {
        node: usize,
        name: String,
        application: String,
        server: String,
    },
    #[error(
        "the server `{server}` of `{application}` stands in the plan twice, at nodes {first} and {second}"
    )]
    DuplicateServer {
        application: String,
        server: String,
        first: usize,
        second: usize,
    },
    #[error(
        "the plan leaves out {count} server(s), the first is `{server}` of `{application}`: every server of the order stands in the plan once"
    )]
    MissingServers {
        count: usize,
        application: String,
        server: String,
    },
    #[error("node {node} (`{name}`) sets a weight of {weight}; the limit is 0 to 100")]
    BadWeight {
        node: usize,
        name: String,
        weight: u32,
    },
    #[error(
        "node {node} (`{name}`) sets every weight of `{application}` to 0, which would cut all its traffic: `min_healthy_members` is {minimum}"
    )]
    CutsTraffic {
        node: usize,
        name: String,
        application: String,
        minimum: u32,
    },
    #[error("node {node} (`{name}`) waits for {duration_ms} ms; the limit is a day")]
    PauseTooLong {
        node: usize,
        name: String,
        duration_ms: u64,
    },
    #[error("the tech stack of `{application}` returned {steps} steps; the limit is {MAX_STEPS}")]
    TooManySteps { application: String, steps: usize },
    #[error("step `{step}` of `{application}`: {field} is {value}; the limit is {limit}")]
    StepLimit {
        application: String,
        step: String,
        field: &'static str,
        value: u64,
        limit: u64,
    },
    #[error(
        "step `{step}` of `{application}` wants to run as the OS user `{user}`, which is not approved for this plugin: approve it, or use a stack that does not need it"
    )]
    UserNotApproved {
        application: String,
        step: String,
        user: String,
    },
    #[error(
        "step `{step}` of `{application}` writes to `{path}`, which is below no path root that is approved for this plugin"
    )]
    PathNotApproved {
        application: String,
        step: String,
        path: String,
    },
    #[error("step `{step}` of `{application}`: the path `{path}` must not contain `..`")]
    PathEscapes {
        application: String,
        step: String,
        path: String,
    },
    #[error("the tech stack of `{application}` returned two steps named `{step}` in one phase")]
    DuplicateStep { application: String, step: String },
    #[error(
        "the environment of `{application}` on `{server}` has {bytes} bytes; the limit is {MAX_ENV_BYTES}: put large values into files of the package"
    )]
    EnvironmentTooLarge {
        application: String,
        server: String,
        bytes: u64,
    },
    #[error(
        "the tech stack of `{application}` gives no `start` step: nothing would run after the release"
    )]
    NoStart { application: String },
}

/// Checks the strategy's plan and expands it.
///
/// # Errors
/// [`BadPlan`] names the node or step and the rule.
pub fn expand(input: PlanInput, strategy: &StrategyPlan) -> Result<Plan, BadPlan> {
    for part in &input.parts {
        check_steps(part)?;
    }
    check_nodes(&input, strategy)?;
    let mut builder = Builder {
        drain_deadline_ms: input.drain_deadline_ms,
        max_failures: 0,
        steps: Vec::new(),
        known_steps: HashMap::new(),
        units: Vec::new(),
        nodes: Vec::new(),
    };
    let servers = input
        .parts
        .iter()
        .map(|part| part.servers.len())
        .sum::<usize>();
    builder.max_failures = input
        .limits
        .max_failures
        .of(u32::try_from(servers).unwrap_or(u32::MAX));
    builder.nodes.push(Node {
        parent: None,
        level: Level::Order,
        name: "order".to_owned(),
        kind: NodeKind::Sequence,
    });
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); strategy.nodes.len()];
    let mut tops = Vec::new();
    for (index, node) in strategy.nodes.iter().enumerate() {
        match node.parent {
            Some(parent) => children[parent as usize].push(index),
            None => tops.push(index),
        }
    }
    for top in tops {
        builder.node(&input, strategy, &children, top, 0);
    }
    if builder.nodes.len() > MAX_NODES {
        return Err(BadPlan::TooManyNodes {
            nodes: builder.nodes.len(),
        });
    }
    let parts = input
        .parts
        .into_iter()
        .map(|PartInput { part, steps, .. }| {
            let of = |phase| {
                steps
                    .steps
                    .iter()
                    .filter(|step| step.phase == phase)
                    .cloned()
                    .collect()
            };
            Part {
                stop: of(Phase::Stop),
                start: of(Phase::Start),
                check: of(Phase::Check),
                ..part
            }
        })
        .collect();
    Ok(Plan {
        schema: Plan::SCHEMA,
        limits: input.limits,
        on_failure: strategy.on_failure,
        progress_deadline_ms: strategy.progress_deadline_ms,
        delivery_deadline_ms: input.delivery_deadline_ms,
        strategy: input.strategy,
        parts,
        steps: builder.steps,
        units: builder.units,
        nodes: builder.nodes,
        reads: input.reads,
    })
}

/// The core's own plan: one server after the other, failed ones first, in the order given. Used for rollbacks whose
/// strategy has no answer, fails, or breaks a limit.
#[must_use]
pub fn one_by_one(servers: &[(String, ServerId)]) -> StrategyPlan {
    let unit = |(application, server): &(String, ServerId)| StrategyNode {
        parent: None,
        name: cut(&format!("{application} on {server}")),
        role: NodeRole::Group,
        kind: StrategyNodeKind::Unit(StrategyUnit {
            application: application.clone(),
            server: server.to_string(),
            restore: RestoreWeight::Remembered,
            healthy_for_ms: 0,
            health_deadline_ms: None,
        }),
    };
    StrategyPlan {
        nodes: servers.iter().map(unit).collect(),
        on_failure: OnFailure::Block,
        progress_deadline_ms: None,
    }
}

fn cut(name: &str) -> String {
    name.chars().take(60).collect()
}

struct Builder {
    drain_deadline_ms: u64,
    max_failures: u32,
    steps: Vec<StepTemplate>,
    known_steps: HashMap<String, u32>,
    units: Vec<Unit>,
    nodes: Vec<Node>,
}

impl Builder {
    fn push(&mut self, parent: NodeIndex, level: Level, name: String, kind: NodeKind) -> NodeIndex {
        let index = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        self.nodes.push(Node {
            parent: Some(parent),
            level,
            name,
            kind,
        });
        index
    }

    fn node(
        &mut self,
        input: &PlanInput,
        strategy: &StrategyPlan,
        children: &[Vec<usize>],
        at: usize,
        parent: NodeIndex,
    ) {
        if self.nodes.len() > MAX_NODES {
            return;
        }
        let planned = &strategy.nodes[at];
        let level = match planned.role {
            NodeRole::Plain => Level::Plain,
            NodeRole::Application => Level::Application,
            NodeRole::Group => Level::Group,
        };
        let name = planned.name.clone();
        let kind = match &planned.kind {
            StrategyNodeKind::Sequence => NodeKind::Sequence,
            StrategyNodeKind::Parallel {
                max_in_flight,
                max_failures,
            } => NodeKind::Parallel {
                max_in_flight: *max_in_flight,
                // The order's own limit is the ceiling, whatever the strategy says.
                max_failures: (*max_failures).min(self.max_failures),
            },
            StrategyNodeKind::Unit(unit) => {
                // A server that is a group by itself still gets a group around it, for people to act on.
                let parent = if planned.role == NodeRole::Group {
                    self.push(parent, Level::Group, name.clone(), NodeKind::Sequence)
                } else {
                    parent
                };
                return self.unit(input, unit, parent);
            }
            StrategyNodeKind::Shift {
                application,
                weights,
            } => {
                let part = part_of(input, application);
                let weights = weights
                    .iter()
                    .filter_map(|(server, weight)| Some((server.parse().ok()?, *weight)))
                    .collect();
                NodeKind::Traffic(TrafficAction::Set {
                    part: u32::try_from(part).unwrap_or(u32::MAX),
                    weights,
                })
            }
            StrategyNodeKind::Gate { message } => NodeKind::Gate {
                message: message.clone(),
            },
            StrategyNodeKind::Pause { duration_ms } => NodeKind::Pause {
                duration_ms: *duration_ms,
            },
            StrategyNodeKind::Judge { stage } => NodeKind::Judge {
                stage: stage.clone(),
            },
        };
        let level = if kind.is_leaf() { Level::Step } else { level };
        let index = self.push(parent, level, name, kind);
        for child in &children[at] {
            self.node(input, strategy, children, *child, index);
        }
    }

    fn unit(&mut self, input: &PlanInput, planned: &StrategyUnit, parent: NodeIndex) {
        let part_index = part_of(input, &planned.application);
        let part = &input.parts[part_index];
        let Some(server) = part
            .servers
            .iter()
            .find(|server| server.id.to_string() == planned.server)
        else {
            return;
        };
        let unit = u32::try_from(self.units.len()).unwrap_or(u32::MAX);
        let mut env = part
            .steps
            .server_env
            .get(&planned.server)
            .cloned()
            .unwrap_or_default();
        env.extend(server.env.clone());
        self.units.push(Unit {
            part: u32::try_from(part_index).unwrap_or(u32::MAX),
            server: server.id,
            server_name: server.name.clone(),
            cell: server.cell.clone(),
            env,
            restore: planned.restore,
            before: server
                .installed
                .as_ref()
                .map(|installed| installed.release.clone()),
            drained_by: server.drained_by,
            reads: server.reads.clone(),
        });
        let node = self.push(
            parent,
            Level::Server,
            server.name.clone(),
            NodeKind::Unit { unit },
        );
        let pools = !part.part.pools.is_empty();
        if pools {
            let drain = TrafficAction::Drain {
                deadline_ms: self.drain_deadline_ms,
            };
            self.push(
                node,
                Level::Step,
                "drain".to_owned(),
                NodeKind::Traffic(drain),
            );
        }
        self.step(node, "fetch", StepTemplate::Fetch);
        self.step(node, "unpack", StepTemplate::Unpack);
        let phase = |builder: &mut Self, steps: &[StackStep], wanted: Phase| {
            for step in steps.iter().filter(|step| step.phase == wanted) {
                builder.step(node, &step.name, StepTemplate::Stack(adapt(step, planned)));
            }
        };
        for wanted in [Phase::Prepare, Phase::Install, Phase::Configure] {
            phase(self, &part.steps.steps, wanted);
        }
        if let Some(installed) = &server.installed {
            // What is stopped runs with the environment that it was installed with.
            let mut stop = installed.stop.clone();
            for step in &mut stop {
                let own = std::mem::replace(&mut step.env, installed.env.clone());
                step.env.extend(own);
            }
            phase(self, &stop, Phase::Stop);
        }
        self.step(node, "activate", StepTemplate::Activate);
        for wanted in [Phase::Deploy, Phase::Start, Phase::Check] {
            phase(self, &part.steps.steps, wanted);
        }
        if pools {
            self.push(
                node,
                Level::Step,
                "restore".to_owned(),
                NodeKind::Traffic(TrafficAction::Restore),
            );
        }
    }

    fn step(&mut self, unit: NodeIndex, name: &str, template: StepTemplate) {
        let key = serde_json::to_string(&template).unwrap_or_default();
        let next = u32::try_from(self.steps.len()).unwrap_or(u32::MAX);
        let step = *self.known_steps.entry(key).or_insert(next);
        if step == next {
            self.steps.push(template);
        }
        self.push(unit, Level::Step, name.to_owned(), NodeKind::Step { step });
    }
}

/// A check as the strategy wants it: its minimum healthy time and its deadline.
fn adapt(step: &StackStep, planned: &StrategyUnit) -> StackStep {
    let mut step = step.clone();
    if let StackAction::Check(check) = &mut step.action {
        check.healthy_for_ms = check.healthy_for_ms.max(planned.healthy_for_ms);
        if let Some(deadline) = planned.health_deadline_ms {
            step.timeout_ms = deadline;
        }
        // A deadline below the healthy time could never be met.
        step.timeout_ms = step
            .timeout_ms
            .max(check.healthy_for_ms.saturating_add(check.try_timeout_ms))
            .min(MAX_TIMEOUT_MS);
    }
    step
}

fn part_of(input: &PlanInput, application: &str) -> usize {
    input
        .parts
        .iter()
        .position(|part| part.part.key == application)
        .unwrap_or(0)
}

fn check_nodes(input: &PlanInput, strategy: &StrategyPlan) -> Result<(), BadPlan> {
    if strategy.nodes.is_empty() {
        return Err(BadPlan::Empty);
    }
    if strategy.nodes.len() > MAX_NODES {
        return Err(BadPlan::TooManyNodes {
            nodes: strategy.nodes.len(),
        });
    }
    let servers: HashMap<&str, BTreeSet<String>> = input
        .parts
        .iter()
        .map(|part| {
            (
                part.part.key.as_str(),
                part.servers
                    .iter()
                    .map(|server| server.id.to_string())
                    .collect(),
            )
        })
        .collect();
    let mut depths: Vec<usize> = Vec::with_capacity(strategy.nodes.len());
    let mut has_children = vec![false; strategy.nodes.len()];
    let mut seen: HashMap<(&str, &str), usize> = HashMap::new();
    for (index, node) in strategy.nodes.iter().enumerate() {
        let name = || cut(&node.name);
        let length = node.name.chars().count();
        if !(1..=60).contains(&length) || node.name.chars().any(char::is_control) {
            return Err(BadPlan::BadName {
                node: index,
                length,
            });
        }
        let depth = match node.parent {
            None => 0,
            Some(parent) => {
                let above = depths.get(parent as usize);
                let above = above.ok_or_else(|| BadPlan::BadParent {
                    node: index,
                    name: name(),
                    parent,
                })?;
                if !matches!(
                    strategy.nodes[parent as usize].kind,
                    StrategyNodeKind::Sequence | StrategyNodeKind::Parallel { .. }
                ) {
                    return Err(BadPlan::LeafParent {
                        node: index,
                        name: name(),
                        parent,
                    });
                }
                has_children[parent as usize] = true;
                above + 1
            }
        };
        if depth > MAX_DEPTH {
            return Err(BadPlan::TooDeep {
                node: index,
                name: name(),
            });
        }
        depths.push(depth);
        let of_application = |application: &String| {
            servers
                .get(application.as_str())
                .ok_or_else(|| BadPlan::UnknownApplication {
                    node: index,
                    name: name(),
                    application: cut(application),
                })
        };
        let known = |application: &String, server: &String| {
            if of_application(application)?.contains(server) {
                return Ok(());
            }
            Err(BadPlan::UnknownServer {
                node: index,
                name: name(),
                application: cut(application),
                server: cut(server),
            })
        };
        match &node.kind {
            StrategyNodeKind::Unit(unit) => {
                known(&unit.application, &unit.server)?;
                if let Some(first) = seen.insert((&unit.application, &unit.server), index) {
                    return Err(BadPlan::DuplicateServer {
                        application: cut(&unit.application),
                        server: cut(&unit.server),
                        first,
                        second: index,
                    });
                }
                if let RestoreWeight::Override(weight) = unit.restore
                    && weight > 100
                {
                    return Err(BadPlan::BadWeight {
                        node: index,
                        name: name(),
                        weight,
                    });
                }
                let longest = unit
                    .healthy_for_ms
                    .max(unit.health_deadline_ms.unwrap_or(0));
                if longest > MAX_TIMEOUT_MS {
                    return Err(BadPlan::PauseTooLong {
                        node: index,
                        name: name(),
                        duration_ms: longest,
                    });
                }
            }
            StrategyNodeKind::Shift {
                application,
                weights,
            } => {
                let all = of_application(application)?;
                for (server, weight) in weights {
                    known(application, server)?;
                    if *weight > 100 {
                        return Err(BadPlan::BadWeight {
                            node: index,
                            name: name(),
                            weight: *weight,
                        });
                    }
                }
                let zero: BTreeSet<&String> = weights
                    .iter()
                    .filter(|(_, weight)| *weight == 0)
                    .map(|(server, _)| server)
                    .collect();
                let minimum = input.limits.min_healthy_members;
                if minimum > 0 && zero.len() == all.len() {
                    return Err(BadPlan::CutsTraffic {
                        node: index,
                        name: name(),
                        application: cut(application),
                        minimum,
                    });
                }
            }
            StrategyNodeKind::Pause { duration_ms } => {
                if *duration_ms > MAX_TIMEOUT_MS {
                    return Err(BadPlan::PauseTooLong {
                        node: index,
                        name: name(),
                        duration_ms: *duration_ms,
                    });
                }
            }
            StrategyNodeKind::Sequence
            | StrategyNodeKind::Parallel { .. }
            | StrategyNodeKind::Gate { .. }
            | StrategyNodeKind::Judge { .. } => {}
        }
    }
    for (index, node) in strategy.nodes.iter().enumerate() {
        let inner = matches!(
            node.kind,
            StrategyNodeKind::Sequence | StrategyNodeKind::Parallel { .. }
        );
        if inner && !has_children[index] {
            return Err(BadPlan::Childless {
                node: index,
                name: cut(&node.name),
            });
        }
    }
    let mut missing = input
        .parts
        .iter()
        .flat_map(|part| {
            let key = part.part.key.as_str();
            part.servers
                .iter()
                .map(move |server| (key, server.id.to_string()))
        })
        .filter(|(key, server)| !seen.contains_key(&(*key, server.as_str())));
    if let Some((application, server)) = missing.next() {
        return Err(BadPlan::MissingServers {
            count: 1 + missing.count(),
            application: application.to_owned(),
            server,
        });
    }
    Ok(())
}

fn check_steps(part: &PartInput) -> Result<(), BadPlan> {
    let application = || part.part.key.clone();
    let steps = &part.steps.steps;
    if steps.len() > MAX_STEPS {
        return Err(BadPlan::TooManySteps {
            application: application(),
            steps: steps.len(),
        });
    }
    if !steps.iter().any(|step| step.phase == Phase::Start) {
        return Err(BadPlan::NoStart {
            application: application(),
        });
    }
    let mut names = BTreeSet::new();
    for step in steps {
        let limit = |field, value: u64, limit: u64| {
            if value <= limit {
                return Ok(());
            }
            Err(BadPlan::StepLimit {
                application: application(),
                step: cut(&step.name),
                field,
                value,
                limit,
            })
        };
        limit(
            "the length of its name",
            step.name.chars().count() as u64,
            60,
        )?;
        limit("timeout_ms", step.timeout_ms, MAX_TIMEOUT_MS)?;
        limit("retries", u64::from(step.retries), u64::from(MAX_RETRIES))?;
        limit(
            "its size as JSON in bytes",
            json_bytes(step),
            MAX_STEP_BYTES as u64,
        )?;
        if !names.insert((step.phase, &step.name)) {
            return Err(BadPlan::DuplicateStep {
                application: application(),
                step: cut(&step.name),
            });
        }
        if let Some(user) = &step.run_as
            && !part.approved.users.contains(user)
        {
            return Err(BadPlan::UserNotApproved {
                application: application(),
                step: cut(&step.name),
                user: cut(user),
            });
        }
        match &step.action {
            StackAction::Script(_) | StackAction::Start(_) => {}
            StackAction::WriteFile { path, .. } => {
                check_path(part, step, path)?;
            }
            StackAction::Check(check) => {
                limit("healthy_for_ms", check.healthy_for_ms, MAX_TIMEOUT_MS)?
            }
            StackAction::Stop { grace_ms } => limit("grace_ms", *grace_ms, MAX_TIMEOUT_MS)?,
        }
    }
    let kept: Vec<&StackStep> = steps
        .iter()
        .filter(|step| matches!(step.phase, Phase::Stop | Phase::Start | Phase::Check))
        .collect();
    if json_bytes(&kept) > MAX_MANIFEST_BYTES as u64 {
        let (step, field) = (
            "stop, start and check".to_owned(),
            "their size as JSON in bytes",
        );
        let (value, limit) = (json_bytes(&kept), MAX_MANIFEST_BYTES as u64);
        return Err(BadPlan::StepLimit {
            application: application(),
            step,
            field,
            value,
            limit,
        });
    }
    for server in &part.servers {
        let mut env = part.part.env.clone();
        env.extend(
            part.steps
                .server_env
                .get(&server.id.to_string())
                .cloned()
                .unwrap_or_default(),
        );
        env.extend(server.env.clone());
        if json_bytes(&env) > MAX_ENV_BYTES as u64 {
            return Err(BadPlan::EnvironmentTooLarge {
                application: application(),
                server: server.name.clone(),
                bytes: json_bytes(&env),
            });
        }
    }
    Ok(())
}

fn json_bytes<T: serde::Serialize>(value: &T) -> u64 {
    serde_json::to_vec(value).map_or(u64::MAX, |bytes| bytes.len() as u64)
}

fn check_path(part: &PartInput, step: &StackStep, path: &str) -> Result<(), BadPlan> {
    let application = || part.part.key.clone();
    if path.split('/').any(|segment| segment == "..") {
        return Err(BadPlan::PathEscapes {
            application: application(),
            step: cut(&step.name),
            path: cut(path),
        });
    }
    let below = |root: &String| {
        let root = root.trim_end_matches('/');
        path.strip_prefix(root)
            .is_some_and(|rest| rest.starts_with('/'))
    };
    if path.starts_with('/') && !part.approved.path_roots.iter().any(below) {
        return Err(BadPlan::PathNotApproved {
            application: application(),
            step: cut(&step.name),
            path: cut(path),
        });
    }
    Ok(())
}
