//! Stages that are rolled back by themselves, and traffic that people change, one readable example each.

use uuid::Uuid;

use super::{
    plans::{Leaf, Tree, plan, server},
    world::World,
};
use crate::{
    id::{OrderId, PoolId, ServerId},
    order::{Action, Control, OrderState},
    plan::{Level, NodeIndex, NodeKind, Plan, TrafficAction},
    plugin::{RollbackScope, ShiftWeight, UnitState},
    progress::{EditState, NodeState, ServerWeight, StageRollback, TrafficChange},
    reducer::{Effect, Event, Refused, unit_state, weights_before},
    task::Outcome,
};

/// order 0; stage 1: shift 2, gate 3; stage 4: shift 5, server 6 (leaves 7 to 12), gate 13; stage 14: shift 15, gate 16.
fn three_stages() -> Plan {
    let stage = |children| Tree::Sequence(Level::Stage, children);
    let leaf = |leaf| Tree::Leaf(leaf);
    let mut plan = plan(vec![
        stage(vec![leaf(Leaf::Set), leaf(Leaf::Gate)]),
        stage(vec![leaf(Leaf::Set), server(), leaf(Leaf::Gate)]),
        stage(vec![leaf(Leaf::Set), leaf(Leaf::Gate)]),
    ]);
    plan.nodes[THIRD as usize].rollback = RollbackScope::Stage;
    plan.parts[0].pools = vec![pool()];
    for node in &mut plan.nodes {
        if let NodeKind::Traffic(TrafficAction::Set { weights, .. }) = &mut node.kind {
            weights.push((green(), ShiftWeight::Exactly(0)));
        }
    }
    plan
}

const FIRST: NodeIndex = 1;
const SECOND: NodeIndex = 4;
const SHIFT: NodeIndex = 5;
const UNIT: NodeIndex = 6;
const THIRD: NodeIndex = 14;

fn pool() -> PoolId {
    PoolId::from_uuid(Uuid::from_u128(9))
}

/// The server of the only unit.
fn green() -> ServerId {
    ServerId::from_uuid(Uuid::from_u128(100))
}

fn confirm() -> Action {
    Action::Confirm { node: None }
}

fn roll_back(node: NodeIndex) -> Action {
    Action::RollBackStage {
        node,
        reason: "bad".to_owned(),
    }
}

/// Answers what is due well; shifts remember `weight`.
fn go_on(world: &mut World, weight: u32) {
    for _ in 0..200 {
        world.advance();
        let Some(effect) = world.due().first().copied() else {
            return;
        };
        if let Effect::Traffic { node, attempt } = effect
            && world.progress.shifts.contains(&node)
            && world.progress.node(node).shifted.is_none()
        {
            let weights = vec![weight];
            world
                .send(Event::ShiftRemembered {
                    node,
                    attempt,
                    weights,
                })
                .unwrap();
        }
        let answer = world.good_answer(effect).unwrap();
        world.send(answer).unwrap();
    }
    panic!("never at rest: {:?}", world.due());
}

/// The second stage waits for confirmation.
fn in_the_second() -> World {
    let mut world = World::running(three_stages());
    go_on(&mut world, 100);
    world.act(confirm()).unwrap();
    go_on(&mut world, 0);
    assert_eq!(world.state(SECOND), NodeState::AwaitingConfirmation);
    world
}

fn rollback(world: &World, stage: NodeIndex) -> Option<StageRollback> {
    world.progress.node(stage).rollback.clone()
}

#[test]
fn a_stage_is_rolled_back_and_run_again() {
    let mut world = in_the_second();
    assert_eq!(
        unit_state(&world.plan, &world.progress, UNIT),
        UnitState::Released
    );
    world.act(roll_back(SECOND)).unwrap();
    // Its shift is taken back first.
    let attempt = 2;
    assert_eq!(
        world.due(),
        [Effect::Traffic {
            node: SHIFT,
            attempt
        }]
    );
    world
        .send(Event::TrafficDone {
            node: SHIFT,
            attempt,
        })
        .unwrap();
    assert_eq!(world.due(), [Effect::RollBackStage(SECOND)]);
    let order = OrderId::from_uuid(Uuid::from_u128(8));
    let now = StageRollback::Running { order };
    world
        .send(Event::StageRollback { node: SECOND, now })
        .unwrap();
    assert_eq!(world.order(), OrderState::Running);
    for action in [
        Action::Cancel { node: None },
        Action::RollBack {
            reason: "bad".to_owned(),
            parameters: None,
        },
        roll_back(SECOND),
    ] {
        let refused = world.act(action).unwrap_err();
        assert!(
            matches!(refused, Refused::StageRollsBack { node: SECOND, .. }),
            "{refused}"
        );
    }
    let now = StageRollback::Done;
    world
        .send(Event::StageRollback { node: SECOND, now })
        .unwrap();
    assert_eq!(world.order(), OrderState::AwaitingConfirmation);
    // What was brought back is left out when the order is rolled back.
    assert_eq!(
        unit_state(&world.plan, &world.progress, UNIT),
        UnitState::Untouched
    );
    world.act(Action::RunAgain { node: SECOND }).unwrap();
    assert_eq!(
        world.due(),
        [Effect::Traffic {
            node: SHIFT,
            attempt: 3
        }]
    );
    go_on(&mut world, 0);
    assert!(world.progress.node(UNIT).again);
    // Attempts go on counting: no task's id comes twice.
    assert_eq!(world.progress.node(UNIT + 2).attempt, 2);
    world.finish();
    assert_eq!(world.order(), OrderState::Succeeded);
}

#[test]
fn a_stage_that_failed_is_rolled_back_and_left_out() {
    let mut world = World::running(three_stages());
    go_on(&mut world, 100);
    world.act(confirm()).unwrap();
    let (node, attempt) = (SHIFT, 1);
    let weights = vec![0];
    for event in [
        Event::ShiftRemembered {
            node,
            attempt,
            weights,
        },
        Event::TrafficDone { node, attempt },
    ] {
        world.send(event).unwrap();
    }
    world.run_to(UNIT + 4);
    world.finish_step(UNIT, Outcome::Failed);
    assert_eq!(world.order(), OrderState::Blocked);
    world.act(roll_back(SECOND)).unwrap();
    go_on(&mut world, 0);
    assert_eq!(rollback(&world, SECOND), Some(StageRollback::Done));
    world.act(Action::GoOn { node: SECOND }).unwrap();
    assert_eq!(world.state(SECOND), NodeState::Ignored);
    go_on(&mut world, 0);
    assert_eq!(world.state(THIRD), NodeState::AwaitingConfirmation);
    world.finish();
    assert_eq!(world.order(), OrderState::Succeeded);
}

#[test]
fn a_rollback_that_failed_is_tried_again() {
    let mut world = in_the_second();
    world.act(roll_back(SECOND)).unwrap();
    // The pool refuses: three attempts, then a person is asked.
    for attempt in 2..=3 {
        world
            .send(Event::TrafficFailed {
                node: SHIFT,
                attempt,
                message: "no".to_owned(),
                repeat: attempt < 3,
            })
            .unwrap();
    }
    let message = "no".to_owned();
    assert_eq!(
        rollback(&world, SECOND),
        Some(StageRollback::Failed { message })
    );
    assert_eq!(world.order(), OrderState::Blocked);
    let refused = world.act(Action::RunAgain { node: SECOND }).unwrap_err();
    assert!(matches!(refused, Refused::Nothing { .. }), "{refused}");
    world.act(roll_back(SECOND)).unwrap();
    go_on(&mut world, 0);
    assert_eq!(rollback(&world, SECOND), Some(StageRollback::Done));
}

#[test]
fn there_is_no_way_back_from_a_stage_that_says_so() {
    let mut world = in_the_second();
    world.act(confirm()).unwrap();
    go_on(&mut world, 0);
    let refused = world
        .act(Action::RollBack {
            reason: "bad".to_owned(),
            parameters: None,
        })
        .unwrap_err();
    assert!(
        matches!(refused, Refused::NoWayBack { node: THIRD, .. }),
        "{refused}"
    );
    // What is done is not rolled back by itself any more, and what was not reached neither.
    for stage in [FIRST, SECOND] {
        let refused = world.act(roll_back(stage)).unwrap_err();
        assert!(matches!(refused, Refused::Nothing { .. }), "{refused}");
    }
    world.act(roll_back(THIRD)).unwrap();
    go_on(&mut world, 0);
    assert_eq!(rollback(&world, THIRD), Some(StageRollback::Done));
}

#[test]
fn the_weights_before_are_those_that_were_seen_first() {
    let world = in_the_second();
    let before = |scope| {
        weights_before(&world.plan, &world.progress, scope)
            .get(&(pool(), green()))
            .copied()
    };
    assert_eq!(before(0), Some(100), "before the order");
    assert_eq!(before(SECOND), Some(0), "before the second stage");
    assert_eq!(before(THIRD), None, "nothing was changed in it yet");
}

#[test]
fn people_change_weights_of_what_was_released() {
    let mut world = World::running(three_stages());
    let weigh = |weight| Action::SetWeights {
        weights: vec![ServerWeight {
            server: green(),
            weight,
        }],
    };
    let early = world.act(weigh(10)).unwrap_err();
    assert!(matches!(early, Refused::NotReleased { .. }), "{early}");
    let mut world = in_the_second();
    for (action, field) in [
        (weigh(101), "weight"),
        (
            Action::SetWeights {
                weights: Vec::new(),
            },
            "weights",
        ),
        (
            Action::ShiftCell {
                cell: "a".to_owned(),
                percent: 51,
            },
            "percent",
        ),
    ] {
        match world.act(action).unwrap_err() {
            Refused::OutOfRange { field: found, .. } => assert_eq!(found, field),
            other => panic!("{other}"),
        }
    }
    world.act(weigh(10)).unwrap();
    let edit = world.progress.node(0).edit.clone().unwrap();
    assert_eq!((edit.number, edit.scope), (1, SECOND));
    assert_eq!(world.due(), [Effect::ChangeTraffic { number: 1 }]);
    let busy = world.act(weigh(20)).unwrap_err();
    assert_eq!(busy, Refused::TrafficChanges { number: 1 });
    // Whoever ends the order waits for it.
    world.act(Action::Cancel { node: None }).unwrap();
    assert_eq!(world.progress.control, Control::Cancelling);
    world
        .send(Event::TrafficChanged {
            number: 1,
            error: Some("no".to_owned()),
        })
        .unwrap();
    let edit = world.progress.node(0).edit.clone().unwrap();
    assert_eq!(edit.state, EditState::Failed("no".to_owned()));
    go_on(&mut world, 0);
    assert_eq!(world.order(), OrderState::Cancelled);
}

#[test]
fn a_cell_gets_a_share_once_all_of_it_is_released() {
    let mut world = in_the_second();
    let shift = |cell: &str| Action::ShiftCell {
        cell: cell.to_owned(),
        percent: 20,
    };
    let nobody = world.act(shift("b")).unwrap_err();
    assert!(nobody.to_string().contains("no server in it"), "{nobody}");
    world.act(shift("a")).unwrap();
    let edit = world.progress.node(0).edit.clone().unwrap();
    let cell = "a".to_owned();
    assert_eq!(edit.change, TrafficChange::Cell { cell, percent: 20 });
    go_on(&mut world, 0);
    assert_eq!(
        world.progress.node(0).edit.clone().unwrap().state,
        EditState::Done
    );
}

#[test]
fn what_a_person_changes_is_changed_before_the_plan_moves_on() {
    let shift = |node| move |effect: &Effect| matches!(effect, Effect::Traffic { node: of, .. } if *of == node);
    let weigh = Action::SetWeights {
        weights: vec![ServerWeight {
            server: green(),
            weight: 10,
        }],
    };
    for (then, next) in [(confirm(), THIRD + 1), (roll_back(SECOND), SHIFT)] {
        let mut world = in_the_second();
        world.act(weigh.clone()).unwrap();
        world.act(then.clone()).unwrap();
        world.advance();
        assert_eq!(
            world.due(),
            [Effect::ChangeTraffic { number: 1 }],
            "{then:?}"
        );
        world
            .send(Event::TrafficChanged {
                number: 1,
                error: None,
            })
            .unwrap();
        assert!(
            world.due().iter().any(shift(next)),
            "{then:?}: {:?}",
            world.due()
        );
    }
}

#[test]
fn an_order_does_not_end_before_traffic_is_changed() {
    let weigh = Action::SetWeights {
        weights: vec![ServerWeight {
            server: green(),
            weight: 10,
        }],
    };
    // A server, and the gate that is the last of the order.
    let released = Tree::Sequence(Level::Application, vec![server(), Tree::Leaf(Leaf::Gate)]);
    for (last, ended) in [
        (confirm(), OrderState::Succeeded),
        (Action::Cancel { node: None }, OrderState::Cancelled),
    ] {
        let mut world = World::running(plan(vec![released.clone()]));
        world.settle();
        assert_eq!(world.order(), OrderState::AwaitingConfirmation);
        world.act(weigh.clone()).unwrap();
        world.act(last.clone()).unwrap();
        world.advance();
        assert!(!world.is_over(), "{last:?}");
        assert_eq!(world.due(), [Effect::ChangeTraffic { number: 1 }]);
        world
            .send(Event::TrafficChanged {
                number: 1,
                error: None,
            })
            .unwrap();
        world.advance();
        assert_eq!(world.order(), ended, "{last:?}");
    }
}
