//! How long the reducer takes for one event: `cargo run --release -p windlass-domain --example reducer_speed`.
//!
//! Plans of N servers in one parallel group, 10 steps each, all succeeding; then the same cancelled half-way. One line
//! per plan, nanoseconds per event, the slowest single event in microseconds.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use uuid::Uuid;
use windlass_domain::{
    Timestamp,
    id::ServerId,
    limits::{Amount, Limits},
    order::{Action, Control},
    plan::{Level, Node, NodeIndex, NodeKind, Plan, StepTemplate, Unit},
    plugin::{OnFailure, Phase, RestoreWeight, RollbackScope, StackAction, StackStep},
    progress::Progress,
    reducer::{Effect, Event, apply},
    task::{Outcome, TaskResult},
};

const STEPS: u32 = 10;

fn main() {
    for (servers, in_flight) in [(200, 10), (200, 200), (1000, 10), (1000, 1000)] {
        for cancel_after in [None, Some(servers as usize * 6)] {
            run(servers, in_flight, cancel_after);
        }
    }
}

fn run(servers: u32, in_flight: u32, cancel_after: Option<usize>) {
    let plan = plan(servers, in_flight);
    let mut progress = Progress::load(&plan, Control::NotStarted, false, []);
    let mut waiting = VecDeque::from([
        Event::Act(Action::Run),
        Event::Initialised { locked: Vec::new() },
    ]);
    let (mut events, mut slowest) = (0usize, 0u128);
    let begin = Instant::now();
    let mut cancelled = false;
    while let Some(event) = waiting.pop_front() {
        let event = match cancel_after {
            Some(limit) if !cancelled && events > limit => {
                cancelled = true;
                waiting.push_front(event);
                Event::Act(Action::Cancel { node: None })
            }
            Some(_) | None => event,
        };
        let one = Instant::now();
        let answer = apply(&plan, &mut progress, event, Timestamp::from_unix_ms(0));
        slowest = slowest.max(one.elapsed().as_nanos());
        events += 1;
        // After a cancel, answers to what was taken back are refused.
        let Ok(delta) = answer else { continue };
        for effect in delta.effects {
            match effect {
                Effect::Admit(unit) => waiting.push_back(Event::UnitAdmitted(unit)),
                Effect::Dispatch { node, attempt } => {
                    waiting.push_back(finished(node, attempt, Outcome::Succeeded));
                }
                Effect::Revoke { node, attempt } => {
                    waiting.push_back(finished(node, attempt, Outcome::Revoked));
                }
                Effect::Initialise
                | Effect::Release(_)
                | Effect::Traffic { .. }
                | Effect::Pause { .. }
                | Effect::Judge { .. }
                | Effect::StartRollback
                | Effect::RollBackStage(_)
                | Effect::ChangeTraffic { .. }
                | Effect::Finish => {}
            }
        }
        if delta.more {
            waiting.push_front(Event::Advance);
        }
    }
    let took = begin.elapsed().as_nanos();
    println!(
        "{servers} servers x {STEPS} steps, {in_flight} in flight{}: {events} events, {} ns each, slowest {} us, {:?}",
        if cancel_after.is_some() {
            ", cancelled"
        } else {
            ""
        },
        took / events as u128,
        slowest / 1000,
        progress.order_state(),
    );
}

fn finished(node: NodeIndex, attempt: u32, outcome: Outcome) -> Event {
    Event::StepFinished {
        node,
        attempt,
        result: Box::new(TaskResult {
            outcome,
            exit_code: Some(0),
            output: String::new(),
            dropped_bytes: 0,
            message: String::new(),
            fault: None,
            started_at: None,
            finished_at: Timestamp::from_unix_ms(0),
        }),
    }
}

fn plan(servers: u32, in_flight: u32) -> Plan {
    let mut nodes = vec![
        node(None, Level::Order, NodeKind::Sequence),
        node(
            Some(0),
            Level::Group,
            NodeKind::Parallel {
                max_in_flight: 0,
                max_failures: 0,
            },
        ),
    ];
    let mut units = Vec::new();
    for unit in 0..servers {
        let parent = 2 + unit * (STEPS + 1);
        nodes.push(node(Some(1), Level::Server, NodeKind::Unit { unit }));
        for step in 0..STEPS {
            nodes.push(node(Some(parent), Level::Step, NodeKind::Step { step }));
        }
        units.push(Unit {
            part: Some(0),
            server: ServerId::from_uuid(Uuid::from_u128(u128::from(unit) + 1)),
            server_name: format!("web-{unit}"),
            cell: "a".to_owned(),
            env: BTreeMap::new(),
            restore: RestoreWeight::Remembered,
            before: None,
            drained_by: None,
            prepared: None,
            reads: Vec::new(),
        });
    }
    Plan {
        schema: Plan::SCHEMA,
        limits: Limits {
            max_in_flight: in_flight,
            max_failures: Amount::Count(0),
            ..Limits::default()
        },
        on_failure: OnFailure::Block,
        brings_back: false,
        progress_deadline_ms: None,
        delivery_deadline_ms: 1,
        strategy: None,
        parts: Vec::new(),
        steps: (0..STEPS)
            .map(|step| {
                StepTemplate::Stack(StackStep {
                    phase: Phase::Start,
                    name: format!("step {step}"),
                    action: StackAction::Stop { grace_ms: 1 },
                    run_as: None,
                    env: BTreeMap::new(),
                    timeout_ms: 1,
                    retries: 0,
                    repeatable: false,
                })
            })
            .collect(),
        units,
        nodes,
        reads: BTreeMap::new(),
        left_out: Vec::new(),
        next_id: 0,
    }
}

fn node(parent: Option<NodeIndex>, level: Level, kind: NodeKind) -> Node {
    Node {
        id: None,
        parent,
        rollback: RollbackScope::Order,
        level,
        name: String::new(),
        kind,
    }
}
