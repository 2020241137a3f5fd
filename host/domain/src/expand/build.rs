//! Expands a checked strategy's plan: its own nodes as they are, each server by the fixed skeleton.
//!
//! Refuses nothing: every reference was resolved when it was checked. A step stands once, however many servers run it.

use std::collections::{BTreeMap, HashMap};

use crate::{
    digest::Digest,
    flow::FlowStep,
    manifest::Manifest,
    plan::{Level, Node, NodeIndex, NodeKind, StepTemplate, TrafficAction, Unit},
    plugin::{NodeRole, Phase, RollbackScope, StackAction, StackStep, StrategyPlan, StrategyUnit},
    prepared,
};

use super::{MAX_NODES, MAX_TIMEOUT_MS, PartInput, PlanInput, ServerInput, check::Checked};

/// What a plan's tree consists of.
pub(super) struct Tree {
    pub(super) steps: Vec<StepTemplate>,
    pub(super) units: Vec<Unit>,
    pub(super) nodes: Vec<Node>,
}

/// The tree of a plan. It breaks off once it has more than [`MAX_NODES`] nodes: such a plan is refused.
pub(super) fn tree(input: &PlanInput, strategy: &StrategyPlan, checked: &[Checked<'_>]) -> Tree {
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); strategy.nodes.len()];
    let mut tops = Vec::new();
    for (index, node) in strategy.nodes.iter().enumerate() {
        match node.parent {
            Some(parent) => children[parent as usize].push(index),
            None => tops.push(index),
        }
    }
    let mut builder = Builder {
        input,
        strategy,
        checked,
        children,
        phases: input
            .parts
            .iter()
            .map(|part| phases_of(&part.steps.steps))
            .collect(),
        prepared: input
            .parts
            .iter()
            .map(|part| prepared::common(&part.part).filter(|_| part.from_cache))
            .collect(),
        known: HashMap::new(),
        adapted: HashMap::new(),
        tree: Tree {
            steps: Vec::new(),
            units: Vec::new(),
            nodes: vec![Node {
                id: None,
                parent: None,
                level: Level::Order,
                name: "order".to_owned(),
                rollback: RollbackScope::Order,
                kind: NodeKind::Sequence,
            }],
        },
    };
    for top in tops {
        builder.node(top, 0);
    }
    builder.tree
}

/// An index in a plan; plans are refused long before one could be too large.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

/// Where an application's steps stand in what its stack answered, by phase.
type Phases = BTreeMap<Phase, Vec<usize>>;

fn phases_of(steps: &[StackStep]) -> Phases {
    let mut phases = Phases::new();
    for (position, step) in steps.iter().enumerate() {
        phases.entry(step.phase).or_default().push(position);
    }
    phases
}

/// A stack's step as a strategy wants it: its part and position, and of a check the minimum healthy time and the deadline.
type Adapted = (usize, usize, u64, Option<u64>);

struct Builder<'a> {
    input: &'a PlanInput,
    strategy: &'a StrategyPlan,
    /// What each of the strategy's nodes becomes.
    checked: &'a [Checked<'a>],
    /// Of each of the strategy's nodes.
    children: Vec<Vec<usize>>,
    /// Of each part.
    phases: Vec<Phases>,
    /// Of each part: what servers that were prepared already have been through.
    prepared: Vec<Option<Digest>>,
    /// Steps by their JSON.
    known: HashMap<String, u32>,
    /// Spares writing a step as JSON for every server.
    adapted: HashMap<Adapted, u32>,
    tree: Tree,
}

impl Builder<'_> {
    fn push(&mut self, parent: NodeIndex, level: Level, name: &str, kind: NodeKind) -> NodeIndex {
        let index = number(self.tree.nodes.len());
        self.tree.nodes.push(Node {
            id: None,
            parent: Some(parent),
            level,
            name: name.to_owned(),
            rollback: RollbackScope::Order,
            kind,
        });
        index
    }

    fn node(&mut self, at: usize, parent: NodeIndex) {
        if self.tree.nodes.len() > MAX_NODES {
            return;
        }
        let checked = self.checked;
        let planned = &self.strategy.nodes[at];
        let level = match planned.role {
            NodeRole::Plain => Level::Plain,
            NodeRole::Application => Level::Application,
            NodeRole::Group => Level::Group,
            NodeRole::Stage => Level::Stage,
        };
        match &checked[at] {
            Checked::Inner(kind) => {
                let index = self.push(parent, level, &planned.name, kind.clone());
                self.tree.nodes[index as usize].rollback = planned.rollback;
                for child in std::mem::take(&mut self.children[at]) {
                    self.node(child, index);
                }
            }
            Checked::Leaf(kind) => {
                self.push(parent, Level::Step, &planned.name, kind.clone());
            }
            Checked::Server { unit, part, server } => {
                // A server that is a group by itself still gets a group around it, for people to act on.
                let parent = if level == Level::Group {
                    self.push(parent, Level::Group, &planned.name, NodeKind::Sequence)
                } else {
                    parent
                };
                self.unit(unit, *part, *server, parent);
            }
        }
    }

    fn unit(&mut self, planned: &StrategyUnit, index: usize, server: usize, parent: NodeIndex) {
        let input = self.input;
        let part = &input.parts[index];
        let server = &part.servers[server];
        let unit = number(self.tree.units.len());
        let mut env = part
            .steps
            .server_env
            .get(&planned.server)
            .cloned()
            .unwrap_or_default();
        env.extend(server.env.clone());
        let prepared = self.prepared[index]
            .map(|common| prepared::on_server(common, &part.part, &env))
            .filter(|prepared| {
                let installed = server.installed.as_ref();
                installed.is_some_and(|installed| installed.prepared == Some(*prepared))
            });
        self.tree.units.push(Unit {
            prepared,
            part: Some(number(index)),
            server: server.id,
            server_name: server.name.clone(),
            cell: server.cell.clone(),
            env,
            restore: planned.restore,
            // What is not replaced is nothing to go back to.
            before: server
                .installed
                .as_ref()
                .filter(|_| part.part.package.is_some())
                .map(|installed| installed.release.clone()),
            drained_by: server.drained_by,
            reads: server.reads.clone(),
        });
        let node = self.push(parent, Level::Server, &server.name, NodeKind::Unit { unit });
        for step in &part.flow {
            self.flow_step(node, index, planned, server, step);
        }
        let keeps_out =
            part.flow.contains(&FlowStep::Drain) && !part.flow.contains(&FlowStep::Restore);
        if keeps_out && !part.part.pools.is_empty() {
            // What keeps the weight at 0 in the end gives it back where the turn ends before anything has changed.
            let stay = NodeKind::Traffic(TrafficAction::Restore);
            self.push(node, Level::Step, "without traffic", stay);
        }
    }

    /// The nodes of one part of a server's turn.
    fn flow_step(
        &mut self,
        unit: NodeIndex,
        index: usize,
        planned: &StrategyUnit,
        server: &ServerInput,
        step: &FlowStep,
    ) {
        let input = self.input;
        let part = &input.parts[index];
        let pools = !part.part.pools.is_empty();
        match step {
            FlowStep::Drain => {
                if pools {
                    let drain = TrafficAction::Drain {
                        deadline_ms: input.drain_deadline_ms,
                    };
                    self.push(unit, Level::Step, "drain", NodeKind::Traffic(drain));
                }
            }
            FlowStep::Restore => {
                if pools {
                    let restore = NodeKind::Traffic(TrafficAction::Restore);
                    self.push(unit, Level::Step, "restore", restore);
                }
            }
            FlowStep::Fetch => self.core(unit, "fetch", StepTemplate::Fetch),
            FlowStep::Unpack => self.core(unit, "unpack", StepTemplate::Unpack),
            FlowStep::Activate => self.core(unit, "activate", StepTemplate::Activate),
            FlowStep::Phase { phase } => {
                let count = self.phases[index].get(phase).map_or(0, Vec::len);
                let last = self.tree.units.last();
                let is_prepared = last.is_some_and(|unit| unit.prepared.is_some());
                for at in 0..count {
                    let position = self.phases[index][phase][at];
                    if !is_prepared || !prepared::prepares(&part.steps.steps[position]) {
                        self.stack(unit, index, position, planned);
                    }
                }
            }
            FlowStep::StopInstalled => {
                if let Some(installed) = &server.installed
                    && !stays_running(installed, part)
                {
                    let releases = part.part.package.is_some();
                    self.installed(unit, installed, &installed.stop, planned, releases);
                }
            }
            FlowStep::StartInstalled => {
                if let Some(installed) = &server.installed {
                    self.installed(unit, installed, &installed.start, planned, false);
                }
            }
            FlowStep::CheckInstalled => {
                if let Some(installed) = &server.installed {
                    self.installed(unit, installed, &installed.check, planned, false);
                }
            }
            FlowStep::PlaceFiles => {
                if let Some(files) = &part.files {
                    self.core(unit, "place files", StepTemplate::PlaceFiles(files.clone()));
                }
            }
            FlowStep::Script(script) => {
                self.core(unit, &script.name, StepTemplate::Script(script.clone()));
            }
            FlowStep::Confirm { message } => {
                let gate = NodeKind::Gate {
                    message: message.clone(),
                };
                self.push(unit, Level::Step, "confirm", gate);
            }
        }
    }

    /// A step of the core itself.
    fn core(&mut self, unit: NodeIndex, name: &str, template: StepTemplate) {
        let step = self.shared(template);
        self.push(unit, Level::Step, name, NodeKind::Step { step });
    }

    /// A step that the application's stack gave.
    fn stack(&mut self, unit: NodeIndex, part: usize, position: usize, planned: &StrategyUnit) {
        let input = self.input;
        let planned_step = &input.parts[part].steps.steps[position];
        let (healthy_for_ms, deadline_ms) = match &planned_step.action {
            StackAction::Check(_) => (planned.healthy_for_ms, planned.health_deadline_ms),
            StackAction::Script(_)
            | StackAction::WriteFile { .. }
            | StackAction::Start(_)
            | StackAction::Stop { .. } => (0, None),
        };
        let key = (part, position, healthy_for_ms, deadline_ms);
        let step = match self.adapted.get(&key) {
            Some(step) => *step,
            None => {
                let step = self.shared(StepTemplate::Stack(adapt(planned_step, planned)));
                self.adapted.insert(key, step);
                step
            }
        };
        self.push(
            unit,
            Level::Step,
            &planned_step.name,
            NodeKind::Step { step },
        );
    }

    /// Steps of what is installed, with the environment that it was installed with. Where a release replaces it, the unit's
    /// own environment is that of the new one, and each step brings the old one along.
    fn installed(
        &mut self,
        unit: NodeIndex,
        installed: &Manifest,
        steps: &[StackStep],
        planned: &StrategyUnit,
        replaced: bool,
    ) {
        for step in steps {
            if replaced && step.phase != Phase::Stop {
                continue;
            }
            let step = if replaced {
                let mut env = installed.env.clone();
                env.extend(step.env.clone());
                StackStep {
                    env,
                    ..step.clone()
                }
            } else {
                adapt(step, planned)
            };
            let name = step.name.clone();
            let step = self.shared(StepTemplate::Stack(step));
            self.push(unit, Level::Step, &name, NodeKind::Step { step });
        }
    }

    /// The index of a step that stands once, whoever runs it.
    fn shared(&mut self, template: StepTemplate) -> u32 {
        let key = serde_json::to_string(&template).unwrap_or_default();
        let next = number(self.tree.steps.len());
        let step = *self.known.entry(key).or_insert(next);
        if step == next {
            self.tree.steps.push(template);
        }
        step
    }
}

/// Whether a release leaves what is installed running: both it and what replaces it say so, and one stack knows how to tell it.
fn stays_running(installed: &Manifest, part: &PartInput) -> bool {
    let is_kept = |step: &StackStep| match &step.action {
        StackAction::Start(supervise) => step.phase == Phase::Start && supervise.keep_running,
        StackAction::Script(_)
        | StackAction::WriteFile { .. }
        | StackAction::Stop { .. }
        | StackAction::Check(_) => false,
    };
    let stack = part.part.stack.as_ref();
    part.part.package.is_some()
        && stack.is_some_and(|stack| stack.name == installed.stack.name)
        && installed.start.iter().any(is_kept)
        && part.steps.steps.iter().any(is_kept)
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
            .max(check.healthy_for_ms.saturating_add(check.interval_ms))
            .min(MAX_TIMEOUT_MS);
    }
    step
}
