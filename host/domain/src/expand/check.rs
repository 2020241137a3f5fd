//! Whether what plugins returned may become a plan at all: the rules, and what each of a strategy's nodes becomes.
//!
//! Builds no tree. Everything here is written against a plugin that means harm: what it returned is either refused, with
//! the node or step and the rule, or safe to expand.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::{
    flow::FlowStep,
    id::ServerId,
    limits::Limits,
    name::RESERVED_ENV_PREFIX,
    plan::{NodeKind, TrafficAction},
    plugin::{
        Phase, RestoreWeight, ShiftWeight, StackAction, StackStep, StrategyNode, StrategyNodeKind,
        StrategyPlan, StrategyUnit,
    },
    value::{Environment, Value},
};

use super::{
    BadPlan, MAX_DEPTH, MAX_ENV_BYTES, MAX_MANIFEST_BYTES, MAX_NODES, MAX_RETRIES, MAX_STEP_BYTES,
    MAX_STEPS, MAX_TIMEOUT_MS, PartInput, PlanInput, cut,
};

/// What a strategy's node becomes.
#[derive(Debug)]
pub(super) enum Checked<'a> {
    /// A node with children.
    Inner(NodeKind),
    /// A leaf.
    Leaf(NodeKind),
    /// A server's turn.
    Server {
        /// As the strategy wants it.
        unit: &'a StrategyUnit,
        /// Index of its application in [`PlanInput::parts`].
        part: usize,
        /// Index among the application's servers.
        server: usize,
    },
}

/// One application of an order as a strategy's nodes name it.
struct Place {
    /// Its index.
    part: usize,
    /// The servers that stand in the plan, with their indices.
    servers: HashMap<ServerId, usize>,
    /// These, and those that can only be named where traffic is moved.
    members: HashSet<ServerId>,
}

/// Applications and servers of an order by the texts that a strategy names them with.
struct Places<'a>(HashMap<&'a str, Place>);

impl<'a> Places<'a> {
    fn of(parts: &'a [PartInput]) -> Self {
        let place = |(index, part): (usize, &'a PartInput)| {
            let servers: HashMap<ServerId, usize> = part
                .servers
                .iter()
                .map(|server| server.id)
                .zip(0..)
                .collect();
            let place = Place {
                part: index,
                members: servers.keys().chain(&part.only_traffic).copied().collect(),
                servers,
            };
            (part.part.key.as_str(), place)
        };
        Self(parts.iter().enumerate().map(place).collect())
    }

    fn place(&self, node: Named<'_>, application: &str) -> Result<&Place, BadPlan> {
        self.0
            .get(application)
            .ok_or_else(|| BadPlan::UnknownApplication {
                node: node.index,
                name: node.name(),
                application: cut(application),
            })
    }

    /// The application's index, and of how many servers its traffic can be moved.
    fn part(&self, node: Named<'_>, application: &str) -> Result<(usize, usize), BadPlan> {
        let place = self.place(node, application)?;
        Ok((place.part, place.members.len()))
    }

    /// A server whose traffic is moved.
    fn member(
        &self,
        node: Named<'_>,
        application: &str,
        server: &str,
    ) -> Result<ServerId, BadPlan> {
        let place = self.place(node, application)?;
        server
            .parse::<ServerId>()
            .ok()
            .filter(|id| place.members.contains(id))
            .ok_or_else(|| unknown_server(node, application, server))
    }

    /// The application's servers that are not among these, by id.
    fn others(
        &self,
        node: Named<'_>,
        application: &str,
        chosen: &BTreeSet<ServerId>,
    ) -> Result<Vec<ServerId>, BadPlan> {
        let all = self.place(node, application)?.members.iter().copied();
        let others: BTreeSet<ServerId> = all.filter(|id| !chosen.contains(id)).collect();
        Ok(others.into_iter().collect())
    }

    /// The indices of the application and the server.
    fn server(
        &self,
        node: Named<'_>,
        application: &str,
        server: &str,
    ) -> Result<(usize, usize), BadPlan> {
        let place = self.place(node, application)?;
        server
            .parse::<ServerId>()
            .ok()
            .and_then(|id| Some((place.part, *place.servers.get(&id)?)))
            .ok_or_else(|| unknown_server(node, application, server))
    }
}

fn unknown_server(node: Named<'_>, application: &str, server: &str) -> BadPlan {
    BadPlan::UnknownServer {
        node: node.index,
        name: node.name(),
        application: cut(application),
        server: cut(server),
    }
}

/// A strategy's node as errors name it.
#[derive(Clone, Copy)]
struct Named<'a> {
    index: usize,
    name: &'a str,
}

impl Named<'_> {
    fn name(self) -> String {
        cut(self.name)
    }

    fn weight(self, weight: u32) -> Result<(), BadPlan> {
        if weight <= 100 {
            return Ok(());
        }
        Err(BadPlan::BadWeight {
            node: self.index,
            name: self.name(),
            weight,
        })
    }

    /// Refuses what would leave an application without any traffic.
    fn keeps_traffic(
        self,
        limits: &Limits,
        application: &str,
        somebody: bool,
    ) -> Result<(), BadPlan> {
        let minimum = limits.min_healthy_members;
        if minimum == 0 || somebody {
            return Ok(());
        }
        Err(BadPlan::CutsTraffic {
            node: self.index,
            name: self.name(),
            application: cut(application),
            minimum,
        })
    }

    fn text(self, field: &'static str, text: &str) -> Result<(), BadPlan> {
        if text.len() <= crate::text::MESSAGE_MAX_BYTES {
            return Ok(());
        }
        Err(BadPlan::LongText {
            node: self.index,
            name: self.name(),
            field,
            bytes: text.len(),
        })
    }

    fn wait(self, duration_ms: u64) -> Result<(), BadPlan> {
        if duration_ms <= MAX_TIMEOUT_MS {
            return Ok(());
        }
        Err(BadPlan::PauseTooLong {
            node: self.index,
            name: self.name(),
            duration_ms,
        })
    }
}

/// Whether a text is no name for people.
pub(super) fn is_bad_name(name: &str) -> bool {
    !(1..=60).contains(&name.chars().count()) || name.chars().any(char::is_control)
}

/// Checks a strategy's nodes; says what each becomes, in their order.
pub(super) fn nodes<'a>(
    input: &PlanInput,
    strategy: &'a StrategyPlan,
) -> Result<Vec<Checked<'a>>, BadPlan> {
    if strategy.nodes.is_empty() {
        return Err(BadPlan::Empty);
    }
    if strategy.nodes.len() > MAX_NODES {
        return Err(BadPlan::TooManyNodes {
            nodes: strategy.nodes.len(),
        });
    }
    let places = Places::of(&input.parts);
    let servers = input
        .parts
        .iter()
        .map(|part| part.servers.len())
        .sum::<usize>();
    let allowed_failures = input
        .limits
        .max_failures
        .of(u32::try_from(servers).unwrap_or(u32::MAX));
    let mut levels: Vec<usize> = Vec::with_capacity(strategy.nodes.len());
    let mut has_children = vec![false; strategy.nodes.len()];
    let mut seen: HashMap<(usize, usize), usize> = HashMap::new();
    let mut checked = Vec::with_capacity(strategy.nodes.len());
    for (index, node) in strategy.nodes.iter().enumerate() {
        let named = Named {
            index,
            name: &node.name,
        };
        if is_bad_name(&node.name) {
            return Err(BadPlan::BadName {
                node: index,
                length: node.name.chars().count(),
            });
        }
        let level = match node.parent {
            None => 1,
            Some(parent) => {
                let above = level_of(strategy, &levels, named, parent)?;
                has_children[parent as usize] = true;
                above + 1
            }
        };
        if level > MAX_DEPTH {
            return Err(BadPlan::TooDeep {
                node: index,
                name: named.name(),
            });
        }
        levels.push(level);
        let is = check_node(&input.limits, &places, allowed_failures, named, node)?;
        if let Checked::Server { unit, part, server } = &is
            && let Some(first) = seen.insert((*part, *server), index)
        {
            return Err(BadPlan::DuplicateServer {
                application: cut(&unit.application),
                server: cut(&unit.server),
                first,
                second: index,
            });
        }
        checked.push(is);
    }
    for (index, is) in checked.iter().enumerate() {
        if matches!(is, Checked::Inner(_)) && !has_children[index] {
            return Err(BadPlan::Childless {
                node: index,
                name: cut(&strategy.nodes[index].name),
            });
        }
    }
    let all = input.parts.iter().enumerate().flat_map(|(index, part)| {
        let servers = part.servers.iter().enumerate();
        servers.map(move |(position, server)| ((index, position), part, server))
    });
    let mut missing = all.filter(|(place, _, _)| !seen.contains_key(place));
    if let Some((_, part, server)) = missing.next() {
        return Err(BadPlan::MissingServers {
            application: part.part.key.clone(),
            server: server.id.to_string(),
            count: 1 + missing.count(),
        });
    }
    Ok(checked)
}

/// The level of a node's parent, which stands before the node and can have children. The top is level 1.
fn level_of(
    strategy: &StrategyPlan,
    levels: &[usize],
    named: Named<'_>,
    parent: u32,
) -> Result<usize, BadPlan> {
    let Some(level) = levels.get(parent as usize) else {
        return Err(BadPlan::BadParent {
            node: named.index,
            name: named.name(),
            parent,
        });
    };
    match strategy.nodes[parent as usize].kind {
        StrategyNodeKind::Sequence | StrategyNodeKind::Parallel { .. } => Ok(*level),
        StrategyNodeKind::Unit(_)
        | StrategyNodeKind::Shift { .. }
        | StrategyNodeKind::Share { .. }
        | StrategyNodeKind::Gate { .. }
        | StrategyNodeKind::Pause { .. }
        | StrategyNodeKind::Judge { .. } => Err(BadPlan::LeafParent {
            node: named.index,
            name: named.name(),
            parent,
        }),
    }
}

/// Checks what one node says; where it stands was checked before.
fn check_node<'a>(
    limits: &Limits,
    places: &Places<'_>,
    allowed_failures: u32,
    named: Named<'_>,
    node: &'a StrategyNode,
) -> Result<Checked<'a>, BadPlan> {
    Ok(match &node.kind {
        StrategyNodeKind::Sequence => Checked::Inner(NodeKind::Sequence),
        StrategyNodeKind::Parallel {
            max_in_flight,
            max_failures,
        } => Checked::Inner(NodeKind::Parallel {
            max_in_flight: *max_in_flight,
            // The order's own limit is the ceiling, whatever the strategy says.
            max_failures: (*max_failures).min(allowed_failures),
        }),
        StrategyNodeKind::Unit(unit) => {
            let (part, server) = places.server(named, &unit.application, &unit.server)?;
            match unit.restore {
                RestoreWeight::Override(weight) => named.weight(weight)?,
                RestoreWeight::Remembered | RestoreWeight::KeepZero => {}
            }
            named.wait(unit.healthy_for_ms)?;
            named.wait(unit.health_deadline_ms.unwrap_or(0))?;
            Checked::Server { unit, part, server }
        }
        StrategyNodeKind::Shift {
            application,
            weights,
        } => {
            let (part, all) = places.part(named, application)?;
            let mut set: Vec<(ServerId, ShiftWeight)> = Vec::with_capacity(weights.len());
            let mut seen = BTreeSet::new();
            let mut without_traffic = BTreeSet::new();
            for (server, weight) in weights {
                let id = places.member(named, application, server)?;
                if let ShiftWeight::Exactly(weight) = weight {
                    named.weight(*weight)?;
                }
                // A second weight would hide the first from whoever counts what serves.
                if !seen.insert(id) {
                    return Err(BadPlan::WeightTwice {
                        node: named.index,
                        name: named.name(),
                        server: cut(server),
                    });
                }
                if *weight == ShiftWeight::Exactly(0) {
                    without_traffic.insert(id);
                }
                set.push((id, *weight));
            }
            named.keeps_traffic(limits, application, without_traffic.len() < all)?;
            Checked::Leaf(NodeKind::Traffic(TrafficAction::Set {
                part: u32::try_from(part).unwrap_or(u32::MAX),
                weights: set,
            }))
        }
        StrategyNodeKind::Share {
            application,
            servers,
            percent,
        } => {
            let (part, all) = places.part(named, application)?;
            let mut chosen = BTreeSet::new();
            for server in servers {
                if !chosen.insert(places.member(named, application, server)?) {
                    return Err(BadPlan::WeightTwice {
                        node: named.index,
                        name: named.name(),
                        server: cut(server),
                    });
                }
            }
            if *percent > 100 {
                return Err(BadPlan::BadShare {
                    node: named.index,
                    name: named.name(),
                    percent: *percent,
                });
            }
            let somebody = match percent {
                0 => chosen.len() < all,
                100 => !chosen.is_empty(),
                _ => true,
            };
            named.keeps_traffic(limits, application, somebody)?;
            Checked::Leaf(NodeKind::Traffic(TrafficAction::Share {
                part: u32::try_from(part).unwrap_or(u32::MAX),
                rest: places.others(named, application, &chosen)?,
                servers: chosen.into_iter().collect(),
                percent: *percent,
            }))
        }
        StrategyNodeKind::Gate { message } => {
            named.text("message", message)?;
            Checked::Leaf(NodeKind::Gate {
                message: message.clone(),
            })
        }
        StrategyNodeKind::Pause { duration_ms } => {
            named.wait(*duration_ms)?;
            Checked::Leaf(NodeKind::Pause {
                duration_ms: *duration_ms,
            })
        }
        StrategyNodeKind::Judge { stage, window_ms } => {
            named.wait(*window_ms)?;
            named.text("stage", stage)?;
            Checked::Leaf(NodeKind::Judge {
                stage: stage.clone(),
                window_ms: *window_ms,
            })
        }
    })
}

/// Checks the steps and the environment that a stack gave for one application.
pub(super) fn steps(part: &PartInput) -> Result<(), BadPlan> {
    let application = || part.part.key.clone();
    let steps = &part.steps.steps;
    if steps.len() > MAX_STEPS {
        return Err(BadPlan::TooManySteps {
            application: application(),
            steps: steps.len(),
        });
    }
    let starts = FlowStep::Phase {
        phase: Phase::Start,
    };
    if part.flow.contains(&starts) && !steps.iter().any(|step| step.phase == Phase::Start) {
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
        if is_bad_name(&step.name) {
            return Err(BadPlan::BadStepName {
                application: application(),
                length: step.name.chars().count(),
            });
        }
        limit("timeout_ms", step.timeout_ms, MAX_TIMEOUT_MS)?;
        limit("retries", u64::from(step.retries), u64::from(MAX_RETRIES))?;
        limit(
            "its size as JSON in bytes",
            json_bytes(step),
            MAX_STEP_BYTES as u64,
        )?;
        let of = || format!("the step `{}`", cut(&step.name));
        variables(part, &step.env, &Environment::new(), of)?;
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
        if let Some(given) = part.steps.server_env.get(&server.id.to_string()) {
            let of = || format!("the server `{}`", server.name);
            variables(part, given, &server.env, of)?;
            env.extend(given.clone());
        }
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

/// Longest name of a variable.
const MAX_VARIABLE_BYTES: usize = 128;

/// Checks the variables that a stack gives. What it hands back of the order's, the instance's or the server's own keeps the
/// wider form that people may use there.
fn variables(
    part: &PartInput,
    env: &Environment,
    of_server: &Environment,
    of: impl Fn() -> String,
) -> Result<(), BadPlan> {
    for (name, value) in env {
        let handed_back = part.part.env.contains_key(name) || of_server.contains_key(name);
        let rule = if name.starts_with(RESERVED_ENV_PREFIX) {
            Some("names that start with WINDLASS_ are the platform's own")
        } else if name.len() > MAX_VARIABLE_BYTES {
            Some("a name has at most 128 characters")
        } else if !handed_back && !is_variable(name) {
            Some("a name holds letters, digits and `_`, and does not start with a digit")
        } else if matches!(value, Value::Plain(text) if text.contains('\0')) {
            Some("its value holds a zero byte, which no environment can hold")
        } else {
            None
        };
        if let Some(rule) = rule {
            return Err(BadPlan::BadVariable {
                application: part.part.key.clone(),
                of: of(),
                name: cut(name),
                rule,
            });
        }
    }
    Ok(())
}

/// Whether every shell and operating system takes this as a variable's name.
fn is_variable(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

pub(super) fn json_bytes<T: serde::Serialize>(value: &T) -> u64 {
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
