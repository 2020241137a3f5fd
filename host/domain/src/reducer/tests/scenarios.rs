//! The rules that matter, one readable example each.

use super::{
    plans::{Leaf, Tree, application, build, group, plan, server},
    world::{World, result},
};
use crate::{
    limits::Amount,
    order::{Action, Control, Ending, OrderState},
    plan::{Level, NodeIndex, Plan},
    plugin::{Judgement, OnFailure, UnitState, Verdict},
    progress::{Admission, Drift, NodeState},
    reducer::{Effect, Event, MAX_ROWS, Refused, TURN_BUDGET, due, unit_state},
    task::Outcome,
};

/// The leaves of [`server`], counted from the unit.
const DRAIN: NodeIndex = 1;
const FETCH: NodeIndex = 2;
const STOP: NodeIndex = 3;
const CHECK: NodeIndex = 5;
const RESTORE: NodeIndex = 6;
/// Nodes of one server.
const SERVER: NodeIndex = 7;

/// order 0, application 1, group 2 with server 3, and a second group with two servers.
fn two_groups() -> Plan {
    plan(vec![application(vec![group(1), group(2)])])
}
const FIRST_GROUP: NodeIndex = 2;
const FIRST: NodeIndex = 3;
const SECOND_GROUP: NodeIndex = 10;
const SECOND: NodeIndex = 11;
const THIRD: NodeIndex = 18;

fn run_node(node: NodeIndex) -> Action {
    Action::RunNode { node }
}

fn cancel(node: NodeIndex) -> Action {
    Action::Cancel { node: Some(node) }
}

#[test]
fn a_release_that_goes_well() {
    let mut world = World::new(two_groups());
    assert_eq!(world.order(), OrderState::NotStarted);
    world.finish();
    assert_eq!(world.order(), OrderState::Succeeded);
    let counts = world.progress.counts(&world.plan);
    assert_eq!((counts.succeeded, counts.waiting), (3, 0));
    assert!(due(&world.plan, &world.progress).contains(&Effect::Finish));
}

#[test]
fn a_failed_step_stops_at_the_first_group() {
    let mut world = World::running(two_groups());
    world.run_to(FIRST + CHECK);
    world.finish_step(FIRST, Outcome::Failed);
    assert_eq!(world.order(), OrderState::Blocked);
    assert_eq!(world.state(FIRST_GROUP), NodeState::Failed);
    assert_eq!(world.state(SECOND_GROUP), NodeState::NotStarted);
    assert!(world.due().is_empty(), "nothing goes on: {:?}", world.due());
}

#[test]
fn servers_asked_for_before_a_failure_are_not_started_after_it() {
    let mut world = World::running(plan(vec![application(vec![group(3)])]));
    let (held, asked) = (FIRST + SERVER, FIRST + 2 * SERVER);
    world
        .send(Event::UnitHeld(held, "too few left".to_owned()))
        .unwrap();
    world.run_to(FIRST + CHECK);
    world.finish_step(FIRST, Outcome::Failed);
    // The envelope may hold it just because of the failed one: waiting for it would never end.
    assert_eq!(world.progress.node(held).admission, Admission::None);
    assert_eq!(world.order(), OrderState::Running);
    let delta = world.send(Event::UnitAdmitted(asked)).unwrap();
    assert_eq!(delta.effects, [Effect::Release(asked)]);
    assert_eq!(world.order(), OrderState::Blocked);
    world.act(Action::Ignore { node: FIRST }).unwrap();
    assert_eq!(world.due(), [Effect::Admit(held), Effect::Admit(asked)]);
}

#[test]
fn a_failure_rolls_back_by_itself() {
    let mut plan = two_groups();
    plan.on_failure = OnFailure::RollBack;
    let mut world = World::running(plan);
    world.run_to(FIRST + CHECK);
    world.finish_step(FIRST, Outcome::Failed);
    assert_eq!(world.order(), OrderState::RollingBack);
    assert_eq!(world.due(), [Effect::StartRollback]);
    assert_eq!(
        unit_state(&world.plan, &world.progress, FIRST),
        UnitState::Failed
    );
    assert_eq!(
        unit_state(&world.plan, &world.progress, SECOND),
        UnitState::Untouched
    );
    world.finish();
    assert_eq!(world.order(), OrderState::RolledBack);
}

#[test]
fn a_failed_rollback_ends_as_failed() {
    for impossible in [true, false] {
        let mut world = World::running(two_groups());
        world
            .act(Action::RollBack {
                reason: "bad".to_owned(),
                parameters: None,
            })
            .unwrap();
        assert_eq!(world.due(), [Effect::StartRollback]);
        if impossible {
            world
                .send(Event::RollbackImpossible("nothing before".to_owned()))
                .unwrap();
        } else {
            world.settle();
            world
                .send(Event::RollbackEnded {
                    ending: Ending::Cancelled,
                })
                .unwrap();
        }
        assert_eq!(world.order(), OrderState::Failed);
    }
}

#[test]
fn tolerated_failures_neither_stop_nor_roll_back() {
    let mut plan = plan(vec![application(vec![
        Tree::Parallel(Level::Group, 1, 1, vec![server(), server()]),
        group(1),
    ])]);
    plan.on_failure = OnFailure::RollBack;
    plan.limits.max_failures = Amount::Percent(50);
    let mut world = World::new(plan);
    world.act(run_node(FIRST_GROUP)).unwrap();
    world.run_to_failure(FIRST);
    world.settle();
    assert_eq!(world.state(FIRST_GROUP), NodeState::Succeeded);
    assert_eq!(world.order(), OrderState::AwaitingConfirmation);
    // It can still be mended, although the order has gone past its group.
    world.act(Action::Retry { node: FIRST }).unwrap();
    assert_eq!(world.order(), OrderState::Running);
    world.finish();
    assert_eq!(world.order(), OrderState::Succeeded);
    assert_eq!(world.state(FIRST), NodeState::Succeeded);
}

impl World {
    /// Brings a server up and lets its check fail.
    fn run_to_failure(&mut self, unit: NodeIndex) {
        if self.progress.control == Control::Initialising {
            self.send(Event::Initialised { locked: Vec::new() })
                .unwrap();
        }
        self.run_to(unit + CHECK);
        self.finish_step(unit, Outcome::Failed);
    }
}

#[test]
fn a_strategy_cannot_tolerate_more_failures_than_the_order() {
    for (on_failure, then) in [
        (OnFailure::Block, OrderState::Blocked),
        (OnFailure::RollBack, OrderState::RollingBack),
    ] {
        for after in [vec![], vec![Tree::Leaf(Leaf::Set)]] {
            let mut children = vec![Tree::Parallel(Level::Group, 0, 9, vec![server()])];
            children.extend(after);
            let mut plan = plan(vec![application(children)]);
            plan.on_failure = on_failure;
            let mut world = World::running(plan);
            world.run_to_failure(FIRST);
            assert_eq!(
                world.state(FIRST_GROUP) == NodeState::Succeeded,
                on_failure == OnFailure::Block
            );
            assert_eq!(world.order(), then);
        }
    }
}

#[test]
fn a_gate_waits_for_its_confirmation() {
    let mut world = World::running(plan(vec![application(vec![
        group(1),
        Tree::Leaf(Leaf::Gate),
        group(1),
    ])]));
    let gate = FIRST + SERVER;
    world.settle();
    assert_eq!(world.order(), OrderState::AwaitingConfirmation);
    assert_eq!(world.state(gate), NodeState::AwaitingConfirmation);
    assert!(matches!(
        world.act(Action::Confirm { node: Some(FIRST) }),
        Err(Refused::Nothing { .. })
    ));
    world.act(Action::Confirm { node: None }).unwrap();
    assert_eq!(world.state(gate), NodeState::Succeeded);
    assert_eq!(world.due(), [Effect::Admit(gate + 2)]);
}

#[test]
fn one_confirmation_does_not_reach_gates_that_open_after_it() {
    let gates = vec![Leaf::Gate, Leaf::Gate];
    let mut world = World::running(plan(vec![Tree::Parallel(
        Level::Group,
        0,
        0,
        vec![Tree::Unit(gates); 2 * TURN_BUDGET],
    )]));
    world.plan.limits.max_in_flight = 100;
    world.send(Event::Advance).unwrap();
    world.advance();
    world.settle();
    world.act(Action::Confirm { node: Some(1) }).unwrap();
    world.settle();
    for unit in world.progress.unit_nodes.clone() {
        assert_eq!(world.state(unit + 1), NodeState::Succeeded);
        assert_eq!(world.state(unit + 2), NodeState::AwaitingConfirmation);
    }
}

#[test]
fn retry_of_a_group_is_for_its_failed_servers_only() {
    let mut world = World::running(plan(vec![application(vec![group(2)])]));
    let good = FIRST + SERVER;
    world.run_to(good + DRAIN);
    world.run_to_failure(FIRST);
    world.settle();
    assert_eq!(world.state(good), NodeState::Succeeded);
    let delta = world.act(Action::Retry { node: FIRST_GROUP }).unwrap();
    assert_eq!(delta.rows, [FIRST + CHECK]);
    assert_eq!(
        delta.effects,
        [Effect::Dispatch {
            node: FIRST + CHECK,
            attempt: 2
        }]
    );
    world.settle();
    assert_eq!(world.order(), OrderState::Succeeded);
}

#[test]
fn retried_servers_wait_for_a_place_in_flight() {
    let mut plan = plan(vec![
        Tree::Parallel(Level::Group, 2, 9, vec![server(); 6]),
        Tree::Leaf(Leaf::Gate),
    ]);
    plan.limits.max_failures = Amount::Count(9);
    let mut world = World::running(plan);
    for unit in world.progress.unit_nodes.clone() {
        world.run_to(unit + STOP);
        world.finish_step(unit, Outcome::Failed);
    }
    assert_eq!(world.order(), OrderState::AwaitingConfirmation);
    world.act(Action::Retry { node: 1 }).unwrap();
    assert_eq!(world.due().len(), 2);
    world.settle();
    let counts = world.progress.counts(&world.plan);
    assert_eq!((counts.succeeded, counts.failed), (6, 0));
}

#[test]
fn ignoring_a_step_goes_on_and_ignoring_a_server_leaves_it() {
    for (node, restored, then) in [
        (FIRST + CHECK, true, NodeState::Succeeded),
        (FIRST, false, NodeState::Ignored),
        (FIRST_GROUP, false, NodeState::Ignored),
    ] {
        let mut world = World::running(two_groups());
        world.run_to_failure(FIRST);
        world.act(Action::Ignore { node }).unwrap();
        assert_eq!(world.state(FIRST + RESTORE).is_busy(), restored, "{node}");
        world.settle();
        assert_eq!(world.state(FIRST), then, "{node}");
        assert_eq!(world.order(), OrderState::Succeeded, "{node}");
    }
}

#[test]
fn an_ignored_server_that_was_only_drained_gets_its_weight_back() {
    let mut world = World::running(plan(vec![application(vec![group(1)])]));
    world.run_to(FIRST + FETCH);
    for _ in 0..3 {
        world.finish_step(FIRST, Outcome::Failed);
    }
    assert_eq!(world.order(), OrderState::Blocked);
    world.act(Action::Ignore { node: FIRST }).unwrap();
    // The order does not end before that.
    assert_eq!(world.order(), OrderState::Running);
    let (restore, attempt) = world.running_in(FIRST);
    assert_eq!(restore, FIRST + RESTORE);
    let delta = world
        .send(Event::TrafficDone {
            node: restore,
            attempt,
        })
        .unwrap();
    assert_eq!(delta.effects, [Effect::Release(FIRST), Effect::Finish]);
    assert_eq!(world.state(FIRST), NodeState::Ignored);
}

#[test]
fn a_cancelled_server_that_was_only_drained_gets_its_weight_back() {
    for node in [None, Some(FIRST), Some(1)] {
        for until in [DRAIN, FETCH] {
            let mut world = World::running(two_groups());
            world.run_to(FIRST + until);
            world.act(Action::Cancel { node }).unwrap();
            assert_eq!(world.state(FIRST), NodeState::Cancelling);
            while world.state(FIRST + RESTORE) == NodeState::NotStarted {
                let effect = world.due()[0];
                let answer = world.good_answer(effect).unwrap();
                world.send(answer).unwrap();
            }
            assert!(!world.is_over(), "ended before the weight is back");
            world.settle();
            assert_eq!(world.state(FIRST), NodeState::Cancelled);
        }
    }
}

#[test]
fn a_rollback_gives_no_traffic_back_to_what_it_did_not_bring_back() {
    for action in [
        Action::Cancel { node: None },
        cancel(FIRST),
        Action::Ignore { node: FIRST },
    ] {
        let mut plan = two_groups();
        plan.brings_back = true;
        let mut world = World::running(plan);
        world.run_to(FIRST + FETCH);
        if matches!(action, Action::Ignore { .. }) {
            for _ in 0..3 {
                world.finish_step(FIRST, Outcome::Failed);
            }
        }
        world.act(action.clone()).unwrap();
        world.settle();
        assert_eq!(
            world.state(FIRST + RESTORE),
            NodeState::NotStarted,
            "{action:?}"
        );
        // It does not serve, so that it stays unavailable.
        assert_eq!(
            world.progress.node(FIRST).admission,
            Admission::Admitted,
            "{action:?}"
        );
        assert!(world.is_over(), "{action:?}");
    }
}

#[test]
fn a_cancelled_server_that_was_changed_stays_out_of_traffic() {
    let mut world = World::running(two_groups());
    world.run_to(FIRST + STOP);
    world.act(Action::Cancel { node: None }).unwrap();
    world.settle();
    assert_eq!(world.order(), OrderState::Cancelled);
    assert_eq!(world.state(FIRST + RESTORE), NodeState::NotStarted);
}

#[test]
fn cancelling_an_application_does_not_cancel_the_order() {
    let mut world = World::running(plan(vec![
        application(vec![group(2)]),
        application(vec![group(1)]),
    ]));
    let next = FIRST + 2 * SERVER + 2;
    world.run_to(FIRST + STOP);
    world.act(cancel(1)).unwrap();
    assert_eq!(world.order(), OrderState::Running);
    assert_eq!(world.state(1), NodeState::Cancelling);
    world.finish_step(FIRST, Outcome::Revoked);
    assert_eq!(world.state(1), NodeState::Cancelled);
    // What comes after it starts.
    assert_eq!(world.due(), [Effect::Admit(next)]);
    world.settle();
    assert_eq!(world.order(), OrderState::Succeeded);
}

#[test]
fn a_group_is_run_alone_after_the_ones_before_it() {
    let mut world = World::new(plan(vec![application(vec![
        group(1),
        Tree::Leaf(Leaf::Gate),
        group(1),
    ])]));
    let second_group = FIRST + SERVER + 1;
    let refused = world.act(run_node(second_group)).unwrap_err();
    assert_eq!(
        refused,
        Refused::NotReady {
            node: second_group,
            before: FIRST_GROUP,
            name: "Group 2".to_owned()
        }
    );
    world.act(run_node(FIRST_GROUP)).unwrap();
    assert_eq!(world.order(), OrderState::Initialising);
    world.settle();
    assert_eq!(world.state(FIRST_GROUP), NodeState::Succeeded);
    assert_eq!(world.order(), OrderState::AwaitingConfirmation);
    assert!(matches!(
        world.act(Action::Confirm { node: None }),
        Err(Refused::Nothing { .. })
    ));
    // The gate between the groups is on the way.
    world.act(run_node(second_group)).unwrap();
    assert_eq!(
        world.state(second_group - 1),
        NodeState::AwaitingConfirmation
    );
    world.act(Action::Confirm { node: None }).unwrap();
    world.settle();
    assert_eq!(world.order(), OrderState::Succeeded);
}

#[test]
fn a_lock_holds_a_group_and_unlocking_lets_it_go_on() {
    let mut world = World::new(two_groups());
    world.act(Action::Run).unwrap();
    world
        .send(Event::Initialised {
            locked: vec![(SECOND_GROUP, "web-2 is in order x".to_owned())],
        })
        .unwrap();
    world.settle();
    assert_eq!(world.state(FIRST_GROUP), NodeState::Succeeded);
    assert_eq!(world.state(SECOND_GROUP), NodeState::Locked);
    assert_eq!(world.order(), OrderState::Blocked);
    let unlock = Action::Unlock { node: SECOND_GROUP };
    world.act(unlock.clone()).unwrap();
    assert_eq!(world.due(), [Effect::Admit(SECOND), Effect::Admit(THIRD)]);
    assert!(matches!(world.act(unlock), Err(Refused::Nothing { .. })));

    // A lock while admission is asked for: it is not started, and asked for again later.
    world
        .act(Action::Lock {
            node: SECOND_GROUP,
            reason: String::new(),
        })
        .unwrap();
    world.settle();
    assert_eq!(world.state(SECOND_GROUP), NodeState::Locked);
    world.act(Action::Unlock { node: SECOND_GROUP }).unwrap();
    world.settle();
    assert_eq!(world.order(), OrderState::Succeeded);
}

#[test]
fn a_lock_beside_a_tolerated_failure_is_no_cause_for_a_rollback() {
    let mut plan = plan(vec![application(vec![
        Tree::Parallel(Level::Group, 0, 1, vec![server(), server()]),
        group(1),
    ])]);
    plan.on_failure = OnFailure::RollBack;
    plan.limits.max_failures = Amount::Count(1);
    let mut world = World::new(plan);
    world.act(Action::Run).unwrap();
    world
        .send(Event::Initialised {
            locked: vec![(FIRST + 2 * SERVER, "held".to_owned())],
        })
        .unwrap();
    world.run_to_failure(FIRST);
    world.settle();
    assert_eq!(world.order(), OrderState::Blocked);
    assert_eq!(world.progress.control, Control::Active);
}

#[test]
fn drift_blocks_and_a_retry_checks_again() {
    let mut world = World::running(two_groups());
    let drift = Drift {
        subject: "installed on web-0".to_owned(),
        before: "1".to_owned(),
        after: "3".to_owned(),
    };
    world.send(Event::UnitDrifted(FIRST, vec![drift])).unwrap();
    assert_eq!(world.order(), OrderState::Drifted);
    assert!(world.due().is_empty());
    world.act(Action::Retry { node: FIRST_GROUP }).unwrap();
    assert_eq!(world.due(), [Effect::Admit(FIRST)]);
    assert!(world.progress.node(FIRST).drift.is_empty());
}

#[test]
fn what_is_unknown_is_never_run_again_by_itself() {
    let repeatable = Tree::Unit(vec![Leaf::Fetch]);
    let mut world = World::running(plan(vec![Tree::Sequence(Level::Group, vec![repeatable])]));
    let unit = 2;
    world.run_to(unit + 1);
    // A failure of a repeatable step is.
    world.finish_step(unit, Outcome::Failed);
    assert_eq!(world.running_in(unit), (unit + 1, 2));
    world.finish_step(unit, Outcome::Unknown);
    assert_eq!(world.order(), OrderState::Unknown);
    world.send(Event::Advance).unwrap();
    assert!(world.due().is_empty());
    world.act(Action::Retry { node: unit + 1 }).unwrap();
    assert_eq!(world.running_in(unit), (unit + 1, 3));
}

#[test]
fn no_progress_blocks_or_rolls_back() {
    for (on_failure, then) in [
        (OnFailure::Block, OrderState::Blocked),
        (OnFailure::RollBack, OrderState::RollingBack),
    ] {
        let mut plan = two_groups();
        plan.on_failure = on_failure;
        let mut world = World::running(plan);
        world.run_to(FIRST + STOP);
        world.send(Event::ProgressDeadline).unwrap();
        assert_eq!(world.order(), then);
    }
    let mut world = World::running(two_groups());
    world.run_to(FIRST + STOP);
    world.send(Event::ProgressDeadline).unwrap();
    world.finish_step(FIRST, Outcome::Succeeded);
    assert!(world.due().is_empty(), "it went on while stalled");
    world.act(Action::Run).unwrap();
    world.settle();
    assert_eq!(world.order(), OrderState::Succeeded);
}

#[test]
fn a_person_who_takes_time_is_no_missing_progress() {
    let mut plan = plan(vec![Tree::Leaf(Leaf::Gate), application(vec![group(1)])]);
    plan.on_failure = OnFailure::RollBack;
    let mut world = World::running(plan);
    assert!(matches!(
        world.send(Event::ProgressDeadline),
        Err(Refused::WrongState { .. })
    ));
}

#[test]
fn a_judge_goes_on_holds_or_rolls_back() {
    let judged = |verdict| {
        let mut world = World::running(plan(vec![Tree::Leaf(Leaf::Judge), group(1)]));
        let (node, attempt) = world.running_in(1);
        let reason = "error rate".to_owned();
        world
            .send(Event::Judged {
                node,
                attempt,
                judgement: Ok(Judgement { verdict, reason }),
            })
            .unwrap();
        world
    };
    assert_eq!(judged(Verdict::GoOn).due(), [Effect::Admit(3)]);
    let mut held = judged(Verdict::Hold);
    assert_eq!(held.order(), OrderState::AwaitingConfirmation);
    assert_eq!(held.progress.node(1).message, "error rate");
    held.act(Action::Confirm { node: Some(1) }).unwrap();
    assert_eq!(held.due(), [Effect::Admit(3)]);
    let bad = judged(Verdict::RollBack);
    assert_eq!(bad.order(), OrderState::RollingBack);
    assert_eq!(bad.state(1), NodeState::Failed);
    assert_eq!(bad.due(), [Effect::StartRollback]);
}

#[test]
fn a_cancelled_order_does_not_hide_a_failure() {
    let mut world = World::running(two_groups());
    world.run_to_failure(FIRST);
    world.act(Action::Cancel { node: None }).unwrap();
    assert_eq!(world.order(), OrderState::Failed);

    // Nor does one whose applications are cancelled one by one.
    let mut world = World::running(two_groups());
    world.run_to_failure(FIRST);
    world.act(cancel(1)).unwrap();
    assert_eq!(world.order(), OrderState::Failed);
}

#[test]
fn cancelling_takes_back_what_was_asked_for() {
    let mut world = World::running(two_groups());
    let delta = world.act(Action::Cancel { node: None }).unwrap();
    assert_eq!(delta.effects, [Effect::Release(FIRST), Effect::Finish]);
    assert_eq!(world.order(), OrderState::Cancelled);
    assert_eq!(
        world.send(Event::UnitAdmitted(FIRST)),
        Err(Refused::Terminal)
    );
}

#[test]
fn a_pause_in_a_server_does_not_keep_it_drained_when_it_is_cancelled() {
    let unit = Tree::Unit(vec![
        Leaf::Drain,
        Leaf::Pause,
        Leaf::Activate,
        Leaf::Restore,
    ]);
    let mut world = World::running(plan(vec![Tree::Sequence(Level::Group, vec![unit])]));
    world.run_to(4);
    world.act(cancel(2)).unwrap();
    assert_eq!(world.running_in(2).0, 6);
    world.settle();
    assert_eq!(world.state(2), NodeState::Cancelled);
}

#[test]
fn weights_are_remembered_once() {
    let mut world = World::running(two_groups());
    world.run_to(FIRST + DRAIN);
    let weights = |weight| {
        vec![crate::progress::PoolWeight {
            pool: crate::id::PoolId::from_uuid(uuid::Uuid::from_u128(9)),
            weight,
        }]
    };
    for (attempt, weight) in [(1, 70), (2, 0)] {
        world
            .send(Event::TrafficRemembered {
                node: FIRST + DRAIN,
                attempt,
                weights: weights(weight),
            })
            .unwrap();
        world
            .send(Event::TrafficFailed {
                node: FIRST + DRAIN,
                attempt,
                message: "no answer".to_owned(),
                repeat: true,
            })
            .unwrap();
    }
    let row = world.progress.node(FIRST + DRAIN);
    assert_eq!(
        (row.attempt, row.remembered.clone()),
        (3, Some(weights(70)))
    );
}

#[test]
fn a_stale_or_repeated_answer_is_refused() {
    let mut world = World::running(two_groups());
    world.run_to(FIRST + STOP);
    let answer = |attempt| Event::StepFinished {
        node: FIRST + STOP,
        attempt,
        result: result(Outcome::Succeeded),
    };
    let refused = Err(Refused::NotCurrent { node: FIRST + STOP });
    assert_eq!(world.send(answer(0)), refused);
    world.send(answer(1)).unwrap();
    assert_eq!(world.send(answer(1)), refused);
}

#[test]
fn what_became_of_an_unknown_step_may_be_told_late() {
    let mut world = World::running(two_groups());
    world.run_to(FIRST + STOP);
    let answer = |outcome| Event::StepFinished {
        node: FIRST + STOP,
        attempt: 1,
        result: result(outcome),
    };
    world.send(answer(Outcome::Unknown)).unwrap();
    assert_eq!(world.order(), OrderState::Unknown);
    let refused = Err(Refused::NotCurrent { node: FIRST + STOP });
    assert_eq!(world.send(answer(Outcome::Unknown)), refused);
    world.send(answer(Outcome::Succeeded)).unwrap();
    assert_eq!(world.order(), OrderState::Running);
    world.finish();
    assert_eq!(world.order(), OrderState::Succeeded);
    // Once a person has decided, it is too late.
    let mut world = World::running(two_groups());
    world.run_to(FIRST + STOP);
    world.send(answer(Outcome::Unknown)).unwrap();
    world.act(Action::Ignore { node: FIRST + STOP }).unwrap();
    assert_eq!(world.send(answer(Outcome::Succeeded)), refused);
}

#[test]
fn many_servers_start_and_end_in_bounded_turns() {
    const SERVERS: usize = 500;
    let mut plan = plan(vec![application(vec![group(SERVERS)])]);
    plan.limits.max_in_flight = 1000;
    let mut world = World::new(plan);
    world.act(Action::Run).unwrap();
    let delta = world
        .send(Event::Initialised { locked: Vec::new() })
        .unwrap();
    assert!(delta.more);
    assert_eq!(delta.rows.len(), TURN_BUDGET);
    let turns = world.advance();
    assert!(turns <= SERVERS / TURN_BUDGET + 1, "{turns} turns");
    assert_eq!(world.due().len(), SERVERS);
    world.run_to(FIRST + STOP);
    world.act(Action::Cancel { node: None }).unwrap();
    let turns = world.advance();
    assert!(turns <= SERVERS / TURN_BUDGET + 2, "{turns} turns");
    assert_eq!(world.due().len(), 1);
    world.settle();
    assert_eq!(world.order(), OrderState::Cancelled);
    assert!(world.most_rows <= MAX_ROWS);
}

#[test]
fn servers_of_what_was_ended_before_they_were_reached_count_as_cancelled() {
    let mut world = World::running(two_groups());
    world.act(cancel(SECOND_GROUP)).unwrap();
    let counts = world.progress.counts(&world.plan);
    assert_eq!(
        (counts.waiting, counts.running, counts.cancelled),
        (0, 1, 2)
    );
    world.finish();
    let counts = world.progress.counts(&world.plan);
    assert_eq!(
        (counts.succeeded, counts.cancelled, counts.total()),
        (1, 2, 3)
    );
    // Never run at all.
    let mut world = World::new(two_groups());
    world.act(Action::Cancel { node: None }).unwrap();
    let counts = world.progress.counts(&world.plan);
    assert_eq!((counts.waiting, counts.cancelled), (0, 3));
    // Ended in the middle.
    let mut world = World::running(two_groups());
    world.run_to(FIRST + STOP);
    world.act(Action::Cancel { node: None }).unwrap();
    world.finish();
    let counts = world.progress.counts(&world.plan);
    assert_eq!((counts.waiting, counts.cancelled), (0, 3));
}

#[test]
fn what_failed_still_counts_as_failed_when_its_order_is_ended() {
    let mut world = World::running(two_groups());
    world.run_to(FIRST + CHECK);
    world.finish_step(FIRST, Outcome::Failed);
    world.act(Action::Cancel { node: None }).unwrap();
    world.finish();
    let counts = world.progress.counts(&world.plan);
    assert_eq!((counts.failed, counts.cancelled, counts.total()), (1, 2, 3));
}

#[test]
fn an_order_that_only_the_envelope_holds_is_blocked_and_says_so() {
    let mut tolerant = plan(vec![application(vec![Tree::Parallel(
        Level::Group,
        0,
        1,
        vec![server(); 2],
    )])]);
    tolerant.limits.max_failures = Amount::Count(1);
    let mut world = World::running(tolerant);
    let held = FIRST + SERVER;
    let hold = Event::UnitHeld(held, "web-0 is unavailable".to_owned());
    world.send(hold).unwrap();
    assert_eq!(world.order(), OrderState::Running, "the other one goes on");
    world.run_to(FIRST + CHECK);
    world.finish_step(FIRST, Outcome::Failed);
    // One failure is tolerated, but the failed server is unavailable: nothing would ever happen by itself.
    assert_eq!(world.order(), OrderState::Blocked);
    assert_eq!(
        world.progress.first_held(),
        Some((held, "web-0 is unavailable"))
    );
    let counts = world.progress.counts(&world.plan);
    assert_eq!((counts.failed, counts.running), (1, 1));
    // The progress deadline still stands above it.
    let mut late = World::running(world.plan.clone());
    late.progress = world.progress.clone();
    assert!(late.progress.owes_progress());
    // Going on without the failed one does not make it available: still blocked.
    world.act(Action::Ignore { node: FIRST }).unwrap();
    assert_eq!(world.order(), OrderState::Blocked);
    assert!(
        !due(&world.plan, &world.progress).contains(&Effect::Release(FIRST)),
        "an ignored server that was changed keeps its seat"
    );
    // Mending it, or another server coming back, does.
    world.send(Event::UnitAdmitted(held)).unwrap();
    assert_eq!(world.order(), OrderState::Running);
    world.finish();
    assert_eq!(world.order(), OrderState::Succeeded);
}

#[test]
fn a_held_order_that_waits_for_a_person_says_that() {
    let mut world = World::running(build(&Tree::Parallel(
        Level::Order,
        0,
        0,
        vec![application(vec![group(1)]), Tree::Leaf(Leaf::Gate)],
    )));
    world
        .send(Event::UnitHeld(FIRST, "not now".to_owned()))
        .unwrap();
    assert_eq!(world.order(), OrderState::AwaitingConfirmation);
    world.act(Action::Confirm { node: None }).unwrap();
    assert_eq!(world.order(), OrderState::Blocked);
}

/// order 0, application 1, shift 2, group 3 with server 4, shift 11.
fn shifted() -> World {
    let mut world = World::running(plan(vec![application(vec![
        Tree::Leaf(Leaf::Set),
        group(1),
        Tree::Leaf(Leaf::Set),
        Tree::Leaf(Leaf::Gate),
    ])]));
    while world.order() != OrderState::AwaitingConfirmation {
        let effect = world.due()[0];
        let answer = world.good_answer(effect).unwrap();
        world.send(answer).unwrap();
    }
    world
}

#[test]
fn shifts_are_taken_back_when_their_order_or_application_is_ended() {
    for node in [None, Some(1)] {
        let mut world = shifted();
        assert_eq!(world.progress.node(2).shifted, Some(vec![1]));
        world.act(Action::Cancel { node }).unwrap();
        // The latest first, one at a time.
        assert_eq!(
            world.due(),
            [Effect::Traffic {
                node: 11,
                attempt: 2
            }]
        );
        assert_eq!(world.state(11), NodeState::Cancelling);
        assert!(!world.is_over());
        world
            .send(Event::TrafficDone {
                node: 11,
                attempt: 2,
            })
            .unwrap();
        assert_eq!(
            world.due(),
            [Effect::Traffic {
                node: 2,
                attempt: 2
            }]
        );
        world.settle();
        assert_eq!(
            (world.state(2), world.state(11)),
            (NodeState::Cancelled, NodeState::Cancelled)
        );
        assert_eq!(world.order(), OrderState::Cancelled);
    }
}

#[test]
fn an_order_whose_shift_cannot_be_taken_back_ends_as_failed() {
    let mut world = shifted();
    world.act(Action::Cancel { node: None }).unwrap();
    let failed = |attempt, repeat| Event::TrafficFailed {
        node: 11,
        attempt,
        message: "the pool is away".to_owned(),
        repeat,
    };
    world.send(failed(2, true)).unwrap();
    world.send(failed(3, true)).unwrap();
    assert_eq!(world.state(11), NodeState::Failed);
    world.settle();
    assert_eq!(world.order(), OrderState::Failed);
    assert_eq!(world.progress.node(11).message, "the pool is away");
    assert_eq!(
        world.state(2),
        NodeState::Cancelled,
        "the other one is back"
    );
}

#[test]
fn a_rollback_leaves_shifts_to_its_own_plan() {
    let mut world = shifted();
    world
        .act(Action::RollBack {
            reason: "bad".to_owned(),
            parameters: None,
        })
        .unwrap();
    assert_eq!(world.due(), [Effect::StartRollback]);
    assert_eq!(world.state(11), NodeState::Succeeded);
}

#[test]
fn a_healthy_server_gets_its_weight_back_although_its_order_is_ended() {
    let mut world = World::running(two_groups());
    world.run_to(FIRST + CHECK);
    world.act(Action::Cancel { node: None }).unwrap();
    // Its check succeeds before the agent hears that it was to be ended.
    let (node, attempt) = world.running_in(FIRST);
    world
        .send(Event::StepFinished {
            node,
            attempt,
            result: result(Outcome::Succeeded),
        })
        .unwrap();
    let restore = world.progress.node(FIRST + RESTORE);
    assert_eq!((restore.state, restore.attempt), (NodeState::Running, 1));
    world.settle();
    assert_eq!(world.state(FIRST), NodeState::Succeeded);
    assert_eq!(world.order(), OrderState::Cancelled);
}
