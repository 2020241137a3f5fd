//! Every (state, event): for each kind of leaf in each state, for units in each step of their admission, and for each
//! part of the order's control flow. What follows stands in snapshots; lists are exhaustive by construction.

use std::fmt::Write as _;

use uuid::Uuid;

use super::{
    plans::{Leaf, Tree, build},
    world::result,
};
use crate::{
    id::{OrderId, ServerId},
    order::{Action, Control, Ending},
    plan::{Level, NodeIndex, NodeKind, Plan, TrafficAction},
    plugin::{Judgement, OnFailure, Phase, Verdict},
    progress::{Admission, Drift, NodeProgress, NodeState, Progress, ServerWeight, StageRollback},
    reducer::{Effect, Event, Refused, apply},
    task::Outcome,
    time::Timestamp,
};

/// All events about `node`, in its first attempt. Each arm makes the events of the kind that comes next, so that a new
/// kind does not compile before it has a place here.
fn events(node: NodeIndex) -> Vec<Event> {
    let attempt = 1;
    let judged = |judgement| Event::Judged {
        node,
        attempt,
        judgement,
    };
    let verdict = |verdict| {
        judged(Ok(Judgement {
            verdict,
            reason: String::new(),
        }))
    };
    let failed = |repeat| Event::TrafficFailed {
        node,
        attempt,
        message: "no".to_owned(),
        repeat,
    };
    let finished = |outcome| Event::StepFinished {
        node,
        attempt,
        result: result(outcome),
    };
    let ended = |ending| Event::RollbackEnded { ending };
    let mut all = vec![Event::Initialised { locked: Vec::new() }];
    loop {
        let next = match all.last().expect("starts with one") {
            Event::Initialised { .. } => vec![Event::InitialisationFailed {
                reason: "offline".to_owned(),
            }],
            Event::InitialisationFailed { .. } => vec![Event::UnitAdmitted(node)],
            Event::UnitAdmitted(_) => vec![Event::UnitHeld(node, "not now".to_owned())],
            Event::UnitHeld(..) => vec![Event::UnitDrifted(node, vec![drift()])],
            Event::UnitDrifted(..) => [
                Outcome::Succeeded,
                Outcome::Failed,
                Outcome::TimedOut,
                Outcome::Revoked,
                Outcome::Refused,
                Outcome::Unknown,
            ]
            .map(finished)
            .to_vec(),
            Event::StepFinished { .. } => vec![Event::TrafficRemembered {
                node,
                attempt,
                weights: Vec::new(),
            }],
            Event::TrafficRemembered { .. } => vec![Event::ShiftRemembered {
                node,
                attempt,
                weights: vec![7],
            }],
            Event::ShiftRemembered { .. } => vec![Event::TrafficDone { node, attempt }],
            Event::TrafficDone { .. } => vec![failed(true), failed(false)],
            Event::TrafficFailed { .. } => vec![Event::PauseElapsed { node, attempt }],
            Event::PauseElapsed { .. } => vec![
                verdict(Verdict::GoOn),
                verdict(Verdict::Hold),
                verdict(Verdict::RollBack),
                verdict(Verdict::Extend),
                judged(Err("trap".to_owned())),
            ],
            Event::Judged { .. } => vec![Event::ProgressDeadline],
            Event::ProgressDeadline => vec![Event::RollbackStarted(OrderId::from_uuid(
                Uuid::from_u128(3),
            ))],
            Event::RollbackStarted(_) => vec![Event::RollbackImpossible("nothing".to_owned())],
            Event::RollbackImpossible(_) => vec![
                ended(Ending::Failed),
                ended(Ending::Cancelled),
                ended(Ending::RolledBack),
                ended(Ending::Succeeded),
            ],
            Event::RollbackEnded { .. } => [
                StageRollback::Running {
                    order: OrderId::from_uuid(Uuid::from_u128(3)),
                },
                StageRollback::Done,
                StageRollback::Failed {
                    message: "no".to_owned(),
                },
            ]
            .map(|now| Event::StageRollback { node, now })
            .to_vec(),
            Event::StageRollback { .. } => vec![
                Event::TrafficChanged {
                    number: 1,
                    error: Some("no".to_owned()),
                },
                Event::TrafficChanged {
                    number: 1,
                    error: None,
                },
            ],
            Event::TrafficChanged { .. } => vec![Event::Advance],
            Event::Advance => actions(node).into_iter().map(Event::Act).collect(),
            Event::Act(_) => return all,
        };
        all.extend(next);
    }
}

/// All actions on `node`, likewise.
fn actions(node: NodeIndex) -> Vec<Action> {
    let mut all = vec![Action::Run];
    loop {
        let next = match all.last().expect("starts with one") {
            Action::Run => vec![Action::RunNode { node }],
            Action::RunNode { .. } => vec![Action::Confirm { node: Some(node) }],
            Action::Confirm { .. } => vec![Action::Retry { node }],
            Action::Retry { .. } => vec![Action::Ignore { node }],
            Action::Ignore { .. } => vec![
                Action::Cancel { node: None },
                Action::Cancel { node: Some(node) },
            ],
            Action::Cancel { .. } => vec![Action::Lock {
                node,
                reason: String::new(),
            }],
            Action::Lock { .. } => vec![Action::Unlock { node }],
            Action::Unlock { .. } => vec![Action::RollBack {
                reason: "bad".to_owned(),
                parameters: None,
            }],
            Action::RollBack { .. } => vec![Action::RollBackStage {
                node,
                reason: "bad".to_owned(),
            }],
            Action::RollBackStage { .. } => vec![Action::RunAgain { node }],
            Action::RunAgain { .. } => vec![Action::GoOn { node }],
            Action::GoOn { .. } => vec![Action::SetWeights {
                weights: vec![ServerWeight {
                    server: ServerId::from_uuid(Uuid::from_u128(100)),
                    weight: 50,
                }],
            }],
            Action::SetWeights { .. } => vec![Action::ShiftCell {
                cell: "a".to_owned(),
                percent: 20,
            }],
            Action::ShiftCell { .. } => return all,
        };
        all.extend(next);
    }
}

fn drift() -> Drift {
    Drift {
        subject: "package".to_owned(),
        before: "1".to_owned(),
        after: "2".to_owned(),
    }
}

fn name(event: &Event) -> String {
    match event {
        Event::Act(action) => match action {
            Action::Cancel { node: None } => "cancel the order".to_owned(),
            Action::Run
            | Action::RunNode { .. }
            | Action::Confirm { .. }
            | Action::Retry { .. }
            | Action::Ignore { .. }
            | Action::Cancel { .. }
            | Action::Lock { .. }
            | Action::Unlock { .. }
            | Action::RollBack { .. }
            | Action::RollBackStage { .. }
            | Action::RunAgain { .. }
            | Action::GoOn { .. }
            | Action::SetWeights { .. }
            | Action::ShiftCell { .. } => first_word(&format!("{action:?}")),
        },
        Event::StepFinished { result, .. } => format!("StepFinished {:?}", result.outcome),
        Event::TrafficFailed { repeat, .. } => {
            format!("TrafficFailed{}", if *repeat { " repeat" } else { "" })
        }
        Event::Judged { judgement, .. } => match judgement {
            Ok(judgement) => format!("Judged {:?}", judgement.verdict),
            Err(_) => "Judged trap".to_owned(),
        },
        Event::RollbackEnded { ending } => format!("RollbackEnded {ending:?}"),
        Event::StageRollback { now, .. } => match now {
            StageRollback::Running { .. } => "StageRollback running".to_owned(),
            StageRollback::Done => "StageRollback done".to_owned(),
            StageRollback::Ending { .. }
            | StageRollback::Due { .. }
            | StageRollback::Failed { .. } => "StageRollback failed".to_owned(),
        },
        Event::TrafficChanged { error, .. } => {
            format!(
                "TrafficChanged{}",
                if error.is_some() { " failed" } else { "" }
            )
        }
        Event::Initialised { .. }
        | Event::InitialisationFailed { .. }
        | Event::UnitAdmitted(_)
        | Event::UnitHeld(..)
        | Event::UnitDrifted(..)
        | Event::TrafficRemembered { .. }
        | Event::ShiftRemembered { .. }
        | Event::TrafficDone { .. }
        | Event::PauseElapsed { .. }
        | Event::ProgressDeadline
        | Event::RollbackStarted(_)
        | Event::RollbackImpossible(_)
        | Event::Advance => first_word(&format!("{event:?}")),
    }
}

fn first_word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric()).collect()
}

fn refusal(refused: &Refused) -> &'static str {
    match refused {
        Refused::Terminal => "terminal",
        Refused::NotCurrent { .. } => "not current",
        Refused::NoSuchNode { .. } => "no such node",
        Refused::WrongState { .. } => "wrong state",
        Refused::WrongLevel { .. } => "wrong level",
        Refused::Nothing { .. } => "nothing",
        Refused::NotReady { .. } => "not ready",
        Refused::StageRollsBack { .. } => "stage rolls back",
        Refused::NoWayBack { .. } => "no way back",
        Refused::TrafficChanges { .. } => "traffic changes",
        Refused::NotReleased { .. } => "not released",
        Refused::NoSuchCell { .. } => "no such cell",
        Refused::OutOfRange { .. } => "out of range",
    }
}

const AT: i64 = 5;

/// order 0, group 1, unit 2 or leaf 2.
fn plan_of(tree: Tree) -> Plan {
    build(&Tree::Sequence(
        Level::Order,
        vec![Tree::Sequence(Level::Group, vec![tree])],
    ))
}

fn leaf_plan(leaf: Leaf) -> (Plan, NodeIndex) {
    match leaf {
        // Two leaves, so that the unit is not done when this one is.
        Leaf::Drain | Leaf::Restore | Leaf::Fetch | Leaf::Activate | Leaf::Stack(..) => {
            (plan_of(Tree::Unit(vec![leaf, Leaf::Activate])), 3)
        }
        Leaf::Set | Leaf::Gate | Leaf::Pause | Leaf::Judge => (plan_of(Tree::Leaf(leaf)), 2),
    }
}

/// A progress that runs, with a leaf in a state.
fn leaf_progress(plan: &Plan, leaf: NodeIndex, state: NodeState) -> Progress {
    let opened = NodeProgress {
        opened: true,
        ..NodeProgress::default()
    };
    let unit = NodeProgress {
        admission: Admission::Admitted,
        ..NodeProgress::default()
    };
    let row = NodeProgress {
        state,
        attempt: u32::from(state != NodeState::NotStarted),
        ..NodeProgress::default()
    };
    let mut rows = vec![(0, opened), (leaf, row)];
    if leaf == 3 {
        rows.push((2, unit));
    }
    Progress::load(plan, Control::Active, false, rows)
}

/// What an event does, in one line.
fn outcome(plan: &Plan, progress: &Progress, node: NodeIndex, event: Event) -> String {
    let mut after = progress.clone();
    match apply(plan, &mut after, event, Timestamp::from_unix_ms(AT)) {
        Err(refused) => format!("- {}", refusal(&refused)),
        Ok(delta) => {
            let mut line = format!("{:?}", after.state(node));
            if after.control != progress.control {
                write!(line, ", order {:?}", after.control).unwrap();
            }
            if after.stalled != progress.stalled {
                write!(line, ", stalled {}", after.stalled).unwrap();
            }
            if !delta.effects.is_empty() {
                let effects = delta.effects.iter().map(|effect| effect_name(*effect));
                write!(line, ", {}", effects.collect::<Vec<_>>().join(" ")).unwrap();
            }
            line
        }
    }
}

fn effect_name(effect: Effect) -> String {
    match effect {
        Effect::Initialise | Effect::StartRollback | Effect::Finish => format!("{effect:?}"),
        Effect::ChangeTraffic { number } => format!("ChangeTraffic({number})"),
        Effect::Admit(node) | Effect::Release(node) | Effect::RollBackStage(node) => {
            format!("{}({node})", first_word(&format!("{effect:?}")))
        }
        Effect::Dispatch { node, attempt }
        | Effect::Revoke { node, attempt }
        | Effect::Traffic { node, attempt }
        | Effect::Pause { node, attempt }
        | Effect::Judge { node, attempt } => {
            format!("{}({node}#{attempt})", first_word(&format!("{effect:?}")))
        }
    }
}

/// Lines of events with the same outcome are joined: a table that can be read.
fn rows(plan: &Plan, progress: &Progress, node: NodeIndex, table: &mut String) {
    let mut lines: Vec<(String, Vec<String>)> = Vec::new();
    for event in events(node) {
        let event_name = name(&event);
        let outcome = outcome(plan, progress, node, event);
        match lines.iter_mut().find(|(known, _)| *known == outcome) {
            Some((_, names)) => names.push(event_name),
            None => lines.push((outcome, vec![event_name])),
        }
    }
    for (outcome, names) in lines {
        writeln!(table, "    {outcome:<44} <= {}", names.join(", ")).unwrap();
    }
}

const LEAVES: [(&str, Leaf); 9] = [
    ("drain", Leaf::Drain),
    ("restore", Leaf::Restore),
    ("set weights", Leaf::Set),
    ("repeatable step", Leaf::Fetch),
    ("step", Leaf::Activate),
    ("step with one retry", Leaf::Stack(Phase::Check, 1)),
    ("gate", Leaf::Gate),
    ("pause", Leaf::Pause),
    ("judge", Leaf::Judge),
];

#[test]
fn every_leaf_in_every_state() {
    let mut table = String::new();
    for (leaf_name, leaf) in LEAVES {
        let (plan, node) = leaf_plan(leaf);
        for state in NodeState::ALL {
            writeln!(table, "{leaf_name} {state:?}").unwrap();
            rows(&plan, &leaf_progress(&plan, node, state), node, &mut table);
        }
    }
    insta::assert_snapshot!(table);
}

#[test]
fn every_unit_in_every_step_of_its_admission() {
    let plan = plan_of(Tree::Unit(vec![Leaf::Drain, Leaf::Activate, Leaf::Restore]));
    let mut table = String::new();
    let none = NodeProgress::default;
    let with = |admission| NodeProgress {
        admission,
        ..none()
    };
    for (what, row) in [
        ("none", none()),
        ("asked", with(Admission::Asked)),
        ("held", with(Admission::Held("why".to_owned()))),
        ("admitted", with(Admission::Admitted)),
        (
            "drifted",
            NodeProgress {
                drift: vec![drift()],
                ..none()
            },
        ),
        (
            "ignored",
            NodeProgress {
                ignored: true,
                ..none()
            },
        ),
        (
            "cancelled",
            NodeProgress {
                cancel: true,
                ..none()
            },
        ),
    ] {
        let opened = NodeProgress {
            opened: true,
            ..none()
        };
        let progress = Progress::load(&plan, Control::Active, false, [(0, opened), (2, row)]);
        writeln!(table, "unit {what}: {:?}", progress.state(2)).unwrap();
        rows(&plan, &progress, 2, &mut table);
    }
    insta::assert_snapshot!(table);
}

#[test]
fn every_control_and_every_event() {
    let endings = [
        Ending::Succeeded,
        Ending::Failed,
        Ending::Cancelled,
        Ending::RolledBack,
    ];
    let mut controls = vec![Control::NotStarted];
    loop {
        let next = match controls.last().expect("starts with one") {
            Control::NotStarted => Control::Initialising,
            Control::Initialising => Control::Active,
            Control::Active => Control::Cancelling,
            Control::Cancelling => Control::EndingForRollback,
            Control::EndingForRollback => Control::RollingBack,
            Control::RollingBack => Control::Ended(Ending::Succeeded),
            Control::Ended(_) => break,
        };
        controls.push(next);
    }
    controls.extend(endings.into_iter().skip(1).map(Control::Ended));
    let mut table = String::new();
    for on_failure in [OnFailure::Block, OnFailure::RollBack] {
        let mut plan = plan_of(Tree::Unit(vec![Leaf::Activate]));
        plan.on_failure = on_failure;
        for control in &controls {
            // About the group; its server runs where that can be.
            let runs = matches!(control, Control::Active);
            let opened = NodeProgress {
                opened: true,
                ..NodeProgress::default()
            };
            let unit = NodeProgress {
                admission: Admission::Admitted,
                ..NodeProgress::default()
            };
            let step = NodeProgress {
                state: NodeState::Running,
                attempt: 1,
                ..NodeProgress::default()
            };
            let all = [(0, opened), (2, unit), (3, step)];
            let progress = Progress::load(&plan, *control, false, all.into_iter().filter(|_| runs));
            writeln!(table, "{control:?}, on failure {on_failure:?}").unwrap();
            rows(&plan, &progress, 1, &mut table);
        }
    }
    insta::assert_snapshot!(table);
}

/// Rules that must not depend on anybody's reading a snapshot well.
#[test]
fn settled_leaves_are_left_by_nothing() {
    for (leaf_name, leaf) in LEAVES {
        let (plan, node) = leaf_plan(leaf);
        for state in NodeState::ALL
            .into_iter()
            .filter(|state| state.is_settled())
        {
            for event in events(node) {
                let mut progress = leaf_progress(&plan, node, state);
                let what = name(&event);
                // Taken or refused: both must leave it alone.
                drop(apply(
                    &plan,
                    &mut progress,
                    event,
                    Timestamp::from_unix_ms(AT),
                ));
                assert_eq!(progress.state(node), state, "{leaf_name}: {what}");
            }
        }
    }
}

#[test]
fn answers_to_another_attempt_or_kind_are_refused() {
    for (leaf_name, leaf) in LEAVES {
        let (plan, node) = leaf_plan(leaf);
        let kind = &plan.nodes[node as usize].kind;
        for event in events(node) {
            let fits = match &event {
                Event::StepFinished { .. } => matches!(kind, NodeKind::Step { .. }),
                Event::TrafficDone { .. } | Event::TrafficFailed { .. } => {
                    matches!(kind, NodeKind::Traffic(_))
                }
                Event::TrafficRemembered { .. } => {
                    matches!(kind, NodeKind::Traffic(TrafficAction::Drain { .. }))
                }
                Event::ShiftRemembered { .. } => {
                    matches!(kind, NodeKind::Traffic(TrafficAction::Set { .. }))
                }
                Event::PauseElapsed { .. } => matches!(kind, NodeKind::Pause { .. }),
                Event::Judged { .. } => matches!(kind, NodeKind::Judge { .. }),
                Event::Act(_)
                | Event::Initialised { .. }
                | Event::InitialisationFailed { .. }
                | Event::UnitAdmitted(_)
                | Event::UnitHeld(..)
                | Event::UnitDrifted(..)
                | Event::ProgressDeadline
                | Event::RollbackStarted(_)
                | Event::RollbackImpossible(_)
                | Event::RollbackEnded { .. }
                | Event::StageRollback { .. }
                | Event::TrafficChanged { .. }
                | Event::Advance => continue,
            };
            let mut running = leaf_progress(&plan, node, NodeState::Running);
            let mut second = running.clone();
            second.nodes[node as usize].attempt = 2;
            let what = name(&event);
            let at = Timestamp::from_unix_ms(AT);
            assert_eq!(
                apply(&plan, &mut second, event.clone(), at),
                Err(Refused::NotCurrent { node }),
                "{leaf_name}: {what} of an earlier attempt"
            );
            let taken = apply(&plan, &mut running, event, at).is_ok();
            assert_eq!(taken, fits, "{leaf_name}: {what}");
        }
    }
}
