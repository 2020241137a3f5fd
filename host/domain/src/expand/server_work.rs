//! Plans of server work: one script on each of some servers, of no application.
//!
//! Nothing is drained, locked or counted by the envelope, and nothing is left installed. Servers go side by side; the limits
//! say how many at once, and how many may fail before no further one is started.

use std::collections::BTreeSet;

use crate::{
    id::ServerId,
    limits::Limits,
    name::check_variable,
    plan::{Level, Node, NodeIndex, NodeKind, Plan, ScriptStep, StepTemplate, Unit},
    plugin::{OnFailure, RestoreWeight, RollbackScope},
    value::Value,
};

use super::{
    MAX_ENV_BYTES, MAX_NODES, MAX_STEP_BYTES, MAX_TIMEOUT_MS,
    check::{is_bad_name, json_bytes},
    cut,
};

/// A script on each of some servers.
#[derive(Debug, Clone)]
pub struct ServerWork {
    /// Name for people: 1 to 60 characters.
    pub name: String,
    /// The servers, in the order in which they are started.
    pub turns: Vec<ServerTurn>,
    /// `max_in_flight` and `max_failures` count; the others have no meaning here.
    pub limits: Limits,
    /// How long a script may wait for its server before it is not started any more, in milliseconds.
    pub delivery_deadline_ms: u64,
}

/// One server of it.
#[derive(Debug, Clone)]
pub struct ServerTurn {
    /// The server.
    pub server: ServerId,
    /// Its name.
    pub name: String,
    /// What runs there. Equal ones are kept once.
    pub script: ScriptStep,
}

/// Why server work is refused. No server was touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum BadServerWork {
    #[error("there is no server to work on: name at least one")]
    NoServers,
    #[error("{servers} servers are too many for one order: name {} at most", MAX_NODES / 2 - 1)]
    TooManyServers { servers: usize },
    #[error("the server `{server}` is named twice: name each server once")]
    ServerTwice { server: String },
    #[error(
        "the script for `{server}` has a name of {length} characters; a name has 1 to 60, none of them a control character"
    )]
    BadName { server: String, length: usize },
    #[error("the script for `{server}`: {field} is {value}; the limit is {limit}")]
    Limit {
        server: String,
        field: &'static str,
        value: u64,
        limit: u64,
    },
    #[error("the script for `{server}` has a variable that no script can have: {what}")]
    BadVariable { server: String, what: String },
}

/// Plans server work: below the root one group, in it each server with one step.
///
/// # Errors
/// [`BadServerWork`] names the server and the rule.
pub fn server_work(work: ServerWork) -> Result<Plan, BadServerWork> {
    if work.turns.is_empty() {
        return Err(BadServerWork::NoServers);
    }
    if work.turns.len() > MAX_NODES / 2 - 1 {
        return Err(BadServerWork::TooManyServers {
            servers: work.turns.len(),
        });
    }
    let mut seen = BTreeSet::new();
    for turn in &work.turns {
        if !seen.insert(turn.server) {
            return Err(BadServerWork::ServerTwice {
                server: turn.name.clone(),
            });
        }
        check(turn)?;
    }
    let servers = index(work.turns.len());
    let node = |parent, level, name: &str, kind| Node {
        id: None,
        parent,
        level,
        name: name.to_owned(),
        rollback: RollbackScope::Order,
        kind,
    };
    let group = NodeKind::Parallel {
        max_in_flight: 0,
        max_failures: work.limits.max_failures.of(servers),
    };
    let mut plan = Plan {
        schema: Plan::SCHEMA,
        limits: work.limits,
        on_failure: OnFailure::Block,
        brings_back: false,
        progress_deadline_ms: None,
        delivery_deadline_ms: work.delivery_deadline_ms,
        strategy: None,
        parts: Vec::new(),
        steps: Vec::new(),
        units: Vec::with_capacity(work.turns.len()),
        nodes: vec![
            node(None, Level::Order, "order", NodeKind::Sequence),
            node(Some(0), Level::Group, &cut(&work.name), group),
        ],
        reads: std::collections::BTreeMap::new(),
        left_out: Vec::new(),
        next_id: 0,
    };
    for ServerTurn {
        server,
        name,
        script,
    } in work.turns
    {
        let unit = index(plan.units.len());
        plan.units.push(Unit {
            part: None,
            server,
            server_name: name.clone(),
            cell: String::new(),
            env: script.env.clone(),
            restore: RestoreWeight::Remembered,
            before: None,
            drained_by: None,
            prepared: None,
            reads: Vec::new(),
        });
        let at = index(plan.nodes.len());
        plan.nodes
            .push(node(Some(1), Level::Server, &name, NodeKind::Unit { unit }));
        let title = script.name.clone();
        // What differs on a server is its environment, so that equal texts stand once.
        let template = StepTemplate::Script(ScriptStep {
            env: std::collections::BTreeMap::new(),
            ..script
        });
        let step = match plan.steps.iter().position(|known| *known == template) {
            Some(step) => step,
            None => {
                plan.steps.push(template);
                plan.steps.len() - 1
            }
        };
        let step = NodeKind::Step { step: index(step) };
        plan.nodes.push(node(Some(at), Level::Step, &title, step));
    }
    plan.schema = plan.lowest_schema();
    Ok(plan)
}

fn check(turn: &ServerTurn) -> Result<(), BadServerWork> {
    let script = &turn.script;
    if is_bad_name(&script.name) {
        return Err(BadServerWork::BadName {
            server: turn.name.clone(),
            length: script.name.chars().count(),
        });
    }
    for (field, value, limit) in [
        ("timeout_ms", script.timeout_ms, MAX_TIMEOUT_MS),
        (
            "its size as JSON in bytes",
            json_bytes(&script.script),
            MAX_STEP_BYTES as u64,
        ),
        (
            "the size of its environment as JSON in bytes",
            json_bytes(&script.env),
            MAX_ENV_BYTES as u64,
        ),
    ] {
        if value > limit {
            return Err(BadServerWork::Limit {
                server: turn.name.clone(),
                field,
                value,
                limit,
            });
        }
    }
    for (key, value) in &script.env {
        let text = match value {
            Value::Plain(text) => Some(text.as_str()),
            Value::SecretRef(_) => None,
        };
        check_variable(key, text).map_err(|error| BadServerWork::BadVariable {
            server: turn.name.clone(),
            what: error.message,
        })?;
    }
    Ok(())
}

/// An index in a plan; there are never so many that one is too large.
fn index(position: usize) -> NodeIndex {
    NodeIndex::try_from(position).unwrap_or(NodeIndex::MAX)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::{
        dispatch::{self, Attempt},
        expand::fixture::{env, server_id},
        id::OrderId,
        limits::Amount,
        order::{Control, OrderState},
        progress::Progress,
        reducer::{self, Effect, Event},
        task::{Action, Outcome, Script, TaskResult},
        time::Timestamp,
    };

    fn turn(number: u128, text: &str) -> ServerTurn {
        let who = number.to_string();
        ServerTurn {
            server: server_id(number),
            name: format!("web-{number}"),
            script: ScriptStep {
                name: "clean up".to_owned(),
                script: Script {
                    interpreter: vec!["/bin/sh".to_owned()],
                    text: text.to_owned(),
                    working_dir: None,
                },
                run_as: Some("ops".to_owned()),
                env: env(&[("WHO", who.as_str())]),
                timeout_ms: 10_000,
            },
        }
    }

    fn work(turns: Vec<ServerTurn>) -> ServerWork {
        ServerWork {
            name: "clean up".to_owned(),
            turns,
            limits: Limits {
                max_in_flight: 2,
                max_failures: Amount::Percent(100),
                ..Limits::default()
            },
            delivery_deadline_ms: 10_000,
        }
    }

    #[test]
    fn each_server_has_one_step_and_equal_texts_stand_once() {
        let plan = server_work(work(vec![turn(1, "a"), turn(2, "a"), turn(3, "b")])).unwrap();
        assert_eq!((plan.schema, plan.parts.len(), plan.steps.len()), (2, 0, 2));
        assert_eq!(plan.nodes.len(), 8);
        let attempt = Attempt {
            order: OrderId::from_uuid(Uuid::from_u128(1)),
            plan: plan.digest(),
            attempt: 1,
            fence: 7,
            expires_at: Timestamp::from_unix_ms(0),
        };
        for (unit, text, who) in [(2, "a", "1"), (4, "a", "2"), (6, "b", "3")] {
            let task = dispatch::task(&plan, unit + 1, attempt).unwrap();
            assert_eq!((task.instance, task.release), (None, None));
            assert_eq!(task.env, env(&[("WHO", who)]));
            assert_eq!(task.run_as.as_deref(), Some("ops"));
            assert_eq!(task.timeout_ms, 10_000);
            let Action::Script(script) = task.action else {
                panic!("{:?}", task.action);
            };
            assert_eq!(script.text, text);
        }
        // It reads back as it was, and its digest names it.
        let json = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |change: fn(&mut ServerTurn)| {
            let mut turn = turn(1, "a");
            change(&mut turn);
            vec![turn]
        };
        for (turns, expect) in [
            (Vec::new(), "no server"),
            (vec![turn(1, "a"), turn(1, "b")], "`web-1` is named twice"),
            (
                with(|turn| turn.script.name.clear()),
                "name of 0 characters",
            ),
            (
                with(|turn| turn.script.timeout_ms = MAX_TIMEOUT_MS + 1),
                "timeout_ms is 86400001; the limit is 86400000",
            ),
            (
                with(|turn| turn.script.script.text = "x".repeat(30_000)),
                "its size as JSON",
            ),
            (
                with(|turn| {
                    turn.script.env = env(&[("A", "x".repeat(9_000).as_str())]);
                }),
                "its environment as JSON",
            ),
            (
                with(|turn| turn.script.env = env(&[("A=B", "x")])),
                "variable that no script can have: the parameter key `A=B`",
            ),
            (
                with(|turn| turn.script.env = env(&[("WINDLASS_SERVER", "x")])),
                "the platform's own",
            ),
        ] {
            let error = server_work(work(turns)).unwrap_err().to_string();
            assert!(error.contains(expect), "{expect}: {error}");
        }
    }

    /// Runs every server with the outcome that its name ends with.
    #[test]
    fn failures_and_what_is_unknown_stop_nobody() {
        let outcomes = [Outcome::Failed, Outcome::Unknown, Outcome::Succeeded];
        let plan = server_work(work(vec![turn(1, "a"), turn(2, "a"), turn(3, "a")])).unwrap();
        let mut progress = Progress::load(&plan, Control::NotStarted, false, []);
        let at = Timestamp::from_unix_ms(1);
        let mut effects = reducer::apply(
            &plan,
            &mut progress,
            Event::Act(crate::order::Action::Run),
            at,
        )
        .unwrap()
        .effects;
        while let Some(effect) = effects.pop() {
            let event = match effect {
                Effect::Initialise => Event::Initialised { locked: Vec::new() },
                Effect::Admit(node) => Event::UnitAdmitted(node),
                Effect::Dispatch { node, attempt } => {
                    let unit = (node as usize - 3) / 2;
                    Event::StepFinished {
                        node,
                        attempt,
                        result: Box::new(TaskResult {
                            outcome: outcomes[unit],
                            exit_code: None,
                            output: String::new(),
                            dropped_bytes: 0,
                            message: String::new(),
                            fault: None,
                            started_at: None,
                            finished_at: at,
                        }),
                    }
                }
                Effect::Release(_) | Effect::Finish => continue,
                Effect::Revoke { .. }
                | Effect::Traffic { .. }
                | Effect::Pause { .. }
                | Effect::Judge { .. }
                | Effect::StartRollback
                | Effect::RollBackStage(_)
                | Effect::ChangeTraffic { .. } => panic!("{effect:?}"),
            };
            effects.extend(
                reducer::apply(&plan, &mut progress, event, at)
                    .unwrap()
                    .effects,
            );
        }
        assert_eq!(progress.order_state(), OrderState::Succeeded);
        let counts = progress.counts(&plan);
        assert_eq!((counts.succeeded, counts.failed), (1, 2));
        let result = progress.node(5).result.as_ref().unwrap();
        assert_eq!(result.outcome, Outcome::Unknown, "the result says it");
    }
}
