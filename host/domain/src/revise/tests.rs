//! Every edit on a plan that waits and on one that runs, and every refusal.

use super::*;
use crate::{
    expand::{
        expand,
        fixture::{input, node, part, server, server_id, unit_of},
    },
    order::{Action, Control},
    plugin::{NodeRole, StrategyNode, StrategyNodeKind, StrategyPlan},
    reducer::{Effect, Event, apply},
    time::Timestamp,
};

fn role(role: NodeRole, node: StrategyNode) -> StrategyNode {
    StrategyNode { role, ..node }
}

fn group(parent: u32, name: &str) -> StrategyNode {
    let kind = StrategyNodeKind::Parallel {
        max_in_flight: 0,
        max_failures: 0,
    };
    role(NodeRole::Group, node(Some(parent), name, kind))
}

fn unit(parent: u32, application: &str, number: u128) -> StrategyNode {
    let kind = StrategyNodeKind::Unit(unit_of(application, number));
    node(Some(parent), &format!("web-{number}"), kind)
}

fn application(name: &str) -> StrategyNode {
    role(
        NodeRole::Application,
        node(None, name, StrategyNodeKind::Sequence),
    )
}

/// `shop`: group `one` with server 1, a gate, group `two` with 2 and 3; `bank`: group `only` with 4.
fn plan() -> Plan {
    let mut input = input();
    input.parts = vec![
        part("shop", vec![server(1), server(2), server(3)]),
        part("bank", vec![server(4)]),
    ];
    let gate = StrategyNodeKind::Gate {
        message: "look".to_owned(),
    };
    let nodes = vec![
        application("shop"),
        group(0, "one"),
        unit(1, "shop", 1),
        node(Some(0), "confirm one", gate),
        group(0, "two"),
        unit(4, "shop", 2),
        unit(4, "shop", 3),
        application("bank"),
        group(7, "only"),
        unit(8, "bank", 4),
    ];
    expand(input, &of(nodes)).unwrap()
}

fn of(nodes: Vec<StrategyNode>) -> StrategyPlan {
    StrategyPlan {
        nodes,
        on_failure: crate::plugin::OnFailure::Block,
        progress_deadline_ms: None,
    }
}

fn fresh(plan: &Plan) -> Progress {
    Progress::load(plan, Control::NotStarted, false, [])
}

/// An order of which server 1 has begun.
fn begun(plan: &Plan) -> Progress {
    let mut progress = fresh(plan);
    let at = Timestamp::from_unix_ms(1);
    let mut effects = Vec::new();
    for event in [
        Event::Act(Action::Run),
        Event::Initialised { locked: Vec::new() },
    ] {
        effects = apply(plan, &mut progress, event, at).unwrap().effects;
    }
    let Some(Effect::Admit(first)) = effects.first().copied() else {
        panic!("{effects:?}");
    };
    apply(plan, &mut progress, Event::UnitAdmitted(first), at).unwrap();
    progress
}

/// The id of the node with this name.
fn id(plan: &Plan, name: &str) -> NodeId {
    let at = plan.nodes.iter().position(|node| node.name == name);
    plan.id_of(u32::try_from(at.unwrap_or_else(|| panic!("no node `{name}`"))).unwrap())
}

/// The tree down to servers, as text.
fn shape(plan: &Plan) -> String {
    let mut text = String::new();
    for (index, node) in plan.nodes.iter().enumerate() {
        if node.level == Level::Step
            && index > 0
            && plan.nodes[node.parent.unwrap() as usize].level == Level::Server
        {
            continue;
        }
        let mut depth = 0;
        let mut at = node.parent;
        while let Some(parent) = at {
            depth += 1;
            at = plan.nodes[parent as usize].parent;
        }
        text.push_str(&format!("{}{}\n", "  ".repeat(depth), node.name));
    }
    text
}

/// Applies an edit, and checks what must hold of every revision.
fn good(plan: &Plan, progress: &Progress, edit: &Edit) -> Plan {
    let Revised {
        plan: revised,
        difference,
    } = revise(plan, progress, edit).unwrap();
    assert!(!difference.is_empty());
    assert_eq!(revised.schema, 4);
    assert!(revised.next_id >= plan.next_id);
    let mut ids = std::collections::BTreeSet::new();
    for (index, node) in (0u32..).zip(&revised.nodes) {
        assert!(node.parent.is_none_or(|parent| parent < index));
        let id = revised.id_of(index);
        assert!(ids.insert(id), "two nodes with the id {id}");
        assert_eq!(revised.index_of(id), Some(index));
        // A node keeps what it is.
        if let Some(before) = plan.index_of(id) {
            assert_eq!(plan.nodes[before as usize].kind, node.kind);
        }
    }
    // Units stand where they stood.
    for (position, unit) in plan.units.iter().enumerate() {
        assert_eq!(revised.units[position].server, unit.server);
    }
    // What was begun is as it was, under the same id.
    let carried = progress.carried(plan, &revised);
    for (index, _) in (0u32..).zip(&plan.nodes) {
        let row = progress.node(index);
        if row.attempt > 0 {
            let now = revised
                .index_of(plan.id_of(index))
                .expect("it is still there");
            assert_eq!(carried.node(now), row);
        }
    }
    let json = serde_json::to_string(&revised).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), revised);
    revised
}

fn bad(plan: &Plan, progress: &Progress, edit: &Edit) -> BadEdit {
    revise(plan, progress, edit).unwrap_err()
}

#[test]
fn a_group_is_deleted_and_its_servers_are_unassigned() {
    let plan = plan();
    for progress in [fresh(&plan), begun(&plan)] {
        let edit = Edit::DeleteGroup {
            node: id(&plan, "two"),
        };
        let revised = good(&plan, &progress, &edit);
        assert_eq!(
            shape(&revised),
            "order\n  shop\n    one\n      web-1\n    confirm one\n  bank\n    only\n      web-4\n"
        );
        let out: Vec<&str> = revised
            .left_out
            .iter()
            .map(|out| out.server_name.as_str())
            .collect();
        assert_eq!(out, ["web-2", "web-3"]);
    }
    let progress = begun(&plan);
    let started = Edit::DeleteGroup {
        node: id(&plan, "one"),
    };
    assert!(matches!(
        bad(&plan, &progress, &started),
        BadEdit::Started { .. }
    ));
    let server = Edit::DeleteGroup {
        node: id(&plan, "web-2"),
    };
    assert!(matches!(
        bad(&plan, &progress, &server),
        BadEdit::NotAGroup { .. }
    ));
    assert_eq!(
        bad(&plan, &progress, &Edit::DeleteGroup { node: 999 }),
        BadEdit::NoSuchNode { node: 999 }
    );
}

#[test]
fn the_last_group_stays() {
    let mut input = input();
    input.parts = vec![part("shop", vec![server(1)])];
    let plan = expand(
        input,
        &of(vec![
            application("shop"),
            group(0, "one"),
            unit(1, "shop", 1),
        ]),
    )
    .unwrap();
    let edit = Edit::DeleteGroup {
        node: id(&plan, "one"),
    };
    assert_eq!(bad(&plan, &fresh(&plan), &edit), BadEdit::NothingLeft);
}

#[test]
fn servers_move_to_another_group() {
    let plan = plan();
    let progress = begun(&plan);
    let to = |servers: &[u128], group: &str| Edit::MoveServers {
        servers: servers.iter().map(|number| server_id(*number)).collect(),
        to: id(&plan, group),
    };
    // Into the group that runs; the emptied one goes.
    let revised = good(&plan, &progress, &to(&[3], "one"));
    assert!(
        shape(&revised)
            .contains("one\n      web-1\n      web-3\n    confirm one\n    two\n      web-2")
    );
    let both = good(&plan, &progress, &to(&[2, 3], "one"));
    assert!(!shape(&both).contains("two"), "{}", shape(&both));
    // A second revision goes from the first.
    let carried = progress.carried(&plan, &revised);
    let back = Edit::MoveServers {
        servers: vec![server_id(3)],
        to: id(&revised, "two"),
    };
    good(&revised, &carried, &back);
    for (edit, expect) in [
        (to(&[1], "two"), "has started"),
        (to(&[2], "two"), "in this group already"),
        (to(&[4], "two"), "in no group of `shop`"),
        (to(&[2, 2], "one"), "named twice"),
        (to(&[], "one"), "no server is named"),
        (to(&[2], "shop"), "is no group: its level is application"),
    ] {
        let error = bad(&plan, &progress, &edit).to_string();
        assert!(error.contains(expect), "{expect}: {error}");
    }
}

/// Some servers of `shop`, each in a group of its own.
fn graft(numbers: &[u128]) -> Box<Graft> {
    let mut input = input();
    input.parts = vec![part(
        "shop",
        numbers.iter().map(|number| server(*number)).collect(),
    )];
    let mut nodes = vec![application("shop")];
    for number in numbers {
        let group_at = u32::try_from(nodes.len()).unwrap();
        nodes.push(group(0, &format!("new {number}")));
        nodes.push(unit(group_at, "shop", *number));
    }
    Box::new(Graft {
        application: "shop".to_owned(),
        plan: expand(input, &of(nodes)).unwrap(),
        dependencies: Vec::new(),
    })
}

#[test]
fn servers_that_have_not_started_are_grouped_anew() {
    let plan = plan();
    let progress = begun(&plan);
    let revised = good(&plan, &progress, &Edit::Regroup(graft(&[3, 2])));
    assert_eq!(
        shape(&revised),
        "order\n  shop\n    one\n      web-1\n    confirm one\n    new 3\n      web-3\n    new 2\n      web-2\n  bank\n    only\n      web-4\n",
    );
    // Before anything has started, all of the old grouping goes.
    let all = good(&plan, &fresh(&plan), &Edit::Regroup(graft(&[3, 2, 1])));
    assert!(!shape(&all).contains("confirm"), "{}", shape(&all));
    assert_eq!(revised.steps, plan.steps, "no step stands twice");
    // Servers of a deleted group come back by it.
    let edit = Edit::DeleteGroup {
        node: id(&plan, "two"),
    };
    let deleted = good(&plan, &progress, &edit);
    let carried = progress.carried(&plan, &deleted);
    let again = good(&deleted, &carried, &Edit::Regroup(graft(&[2, 3])));
    assert!(again.left_out.is_empty());
    assert_eq!(again.units.len(), plan.units.len());
    assert!(matches!(
        bad(&plan, &progress, &Edit::Regroup(graft(&[1]))),
        BadEdit::ServerStarted { .. }
    ));
    let mut other = graft(&[2]);
    other.application = "else".to_owned();
    assert!(matches!(
        bad(&plan, &progress, &Edit::Regroup(other)),
        BadEdit::NoSuchApplication { .. }
    ));
    let mut drifted = graft(&[2]);
    let mut planned = plan.clone();
    let read = drifted.plan.reads["a"].clone();
    planned
        .reads
        .insert("instance of shop".to_owned(), read.clone());
    let changed = crate::plan::Read {
        digest: crate::digest::Digest::of(b"changed"),
        ..read
    };
    drifted
        .plan
        .reads
        .insert("instance of shop".to_owned(), changed);
    assert!(matches!(
        bad(&planned, &begun(&planned), &Edit::Regroup(drifted)),
        BadEdit::Drifted { .. }
    ));
}

#[test]
fn a_plan_does_not_grow_over_its_limit() {
    let mut plan = plan();
    let bank = plan.index_of(id(&plan, "bank")).unwrap();
    let gate = crate::plan::Node {
        id: None,
        parent: Some(bank),
        level: crate::plan::Level::Step,
        name: "wait".to_owned(),
        rollback: crate::plugin::RollbackScope::Order,
        kind: NodeKind::Gate {
            message: "look".to_owned(),
        },
    };
    // `bank` stands last: its children may stand behind everything.
    plan.nodes.resize(crate::expand::MAX_NODES, gate);
    let grown = Edit::SyncServers {
        application: "shop".to_owned(),
        came: Some(graft(&[7])),
        out: Vec::new(),
        gone: Vec::new(),
        reads: [("servers of shop".to_owned(), read("now"))].into(),
    };
    match bad(&plan, &fresh(&plan), &grown) {
        BadEdit::TooLarge { nodes, limit } => {
            assert_eq!(limit, crate::expand::MAX_NODES);
            assert!(nodes > limit, "{nodes}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn servers_come_and_go() {
    let plan = plan();
    let progress = begun(&plan);
    let sync = |came: &[u128], gone: &[u128]| Edit::SyncServers {
        application: "shop".to_owned(),
        came: (!came.is_empty()).then(|| graft(came)),
        out: Vec::new(),
        gone: gone.iter().map(|number| server_id(*number)).collect(),
        reads: [("servers of shop".to_owned(), read("now"))].into(),
    };
    let revised = good(&plan, &progress, &sync(&[7], &[2]));
    assert!(
        shape(&revised).contains("two\n      web-3\n    new 7\n      web-7"),
        "{}",
        shape(&revised)
    );
    assert_eq!(revised.units.len(), plan.units.len() + 1);
    // Who is not bound any more is not to be assigned either.
    assert!(revised.left_out.is_empty());
    assert_eq!(revised.reads["servers of shop"], read("now"));
    let placed = revised.placed();
    let standing: Vec<&str> = placed
        .iter()
        .map(|unit| revised.units[*unit as usize].server_name.as_str())
        .collect();
    assert_eq!(standing, ["web-1", "web-3", "web-4", "web-7"]);
    let edit = Edit::DeleteGroup {
        node: id(&plan, "two"),
    };
    let deleted = good(&plan, &progress, &edit);
    let carried = progress.carried(&plan, &deleted);
    let forgotten = good(&deleted, &carried, &sync(&[], &[2]));
    assert_eq!(forgotten.left_out.len(), 1);
    assert!(matches!(
        bad(&plan, &progress, &sync(&[], &[])),
        BadEdit::NothingToSync { .. }
    ));
    assert!(matches!(
        bad(&plan, &progress, &sync(&[2], &[])),
        BadEdit::ServerTwice { .. }
    ));
    // What has started stays.
    let error = bad(&plan, &progress, &sync(&[], &[1]));
    assert!(matches!(error, BadEdit::NothingToSync { .. }));
}

fn read(shown: &str) -> crate::plan::Read {
    crate::plan::Read {
        digest: crate::digest::Digest::of(shown.as_bytes()),
        shown: shown.to_owned(),
    }
}

#[test]
fn what_only_left_servers_were_planned_from_is_no_drift() {
    let mut plan = plan();
    for (unit, name) in [(0, "web-1"), (1, "web-2"), (2, "web-3")] {
        let subject = format!("server {name}");
        plan.reads.insert(subject.clone(), read(name));
        plan.units[unit].reads.push(subject);
    }
    let all: Vec<String> = plan.reads.keys().cloned().collect();
    assert_eq!(plan.subjects(), all);
    let edit = Edit::DeleteGroup {
        node: id(&plan, "two"),
    };
    let left = good(&plan, &fresh(&plan), &edit).subjects();
    assert!(left.contains(&"server web-1".to_owned()));
    assert!(!left.contains(&"server web-2".to_owned()));
    assert_eq!(left.len(), all.len() - 2);
}

/// `shop`: a canary of server 1 with a share of its traffic, then 2 and 3.
fn canary() -> Plan {
    let mut input = input();
    let mut shop = part("shop", vec![server(1), server(2), server(3)]);
    shop.only_traffic = vec![server_id(9)];
    input.parts = vec![shop];
    let share = StrategyNodeKind::Share {
        application: "shop".to_owned(),
        servers: vec![server_id(1).to_string()],
        percent: 10,
    };
    let nodes = vec![
        application("shop"),
        group(0, "one"),
        unit(1, "shop", 1),
        node(Some(0), "10 percent", share),
        group(0, "two"),
        unit(4, "shop", 2),
        unit(4, "shop", 3),
    ];
    expand(input, &of(nodes)).unwrap()
}

#[test]
fn servers_stay_where_a_shift_of_traffic_counts_on_them() {
    let plan = canary();
    let mut progress = fresh(&plan);
    let two = Edit::DeleteGroup {
        node: id(&plan, "two"),
    };
    let to_one = Edit::MoveServers {
        servers: vec![server_id(2)],
        to: id(&plan, "one"),
    };
    let gone = Edit::SyncServers {
        application: "shop".to_owned(),
        came: None,
        out: Vec::new(),
        gone: vec![server_id(2)],
        reads: BTreeMap::new(),
    };
    for edit in [&two, &to_one, &gone] {
        let error = bad(&plan, &progress, edit);
        assert!(matches!(error, BadEdit::TrafficMoves { .. }), "{error}");
    }
    // Grouped anew before it was begun: the shift goes with the grouping.
    let revised = good(&plan, &progress, &Edit::Regroup(graft(&[1, 2, 3])));
    assert!(!shape(&revised).contains("percent"));
    // Once it is done, the servers behind it are free to go; to group them anew would lose what comes of the share.
    let leaf = plan.index_of(id(&plan, "10 percent")).unwrap();
    progress = Progress::load(
        &plan,
        Control::Active,
        false,
        [(
            leaf,
            crate::progress::NodeProgress {
                state: NodeState::Succeeded,
                attempt: 1,
                ..Default::default()
            },
        )],
    );
    good(&plan, &progress, &two);
    good(&plan, &progress, &gone);
    let error = bad(&plan, &progress, &Edit::Regroup(graft(&[2, 3])));
    assert!(matches!(error, BadEdit::TrafficMoved { .. }), "{error}");
}

#[test]
fn an_application_without_groups_comes_back() {
    let plan = plan();
    let mut revised = plan.clone();
    let mut progress = fresh(&plan);
    for name in ["one", "two"] {
        let edit = Edit::DeleteGroup {
            node: id(&revised, name),
        };
        let next = good(&revised, &progress, &edit);
        progress = progress.carried(&revised, &next);
        revised = next;
    }
    assert!(!shape(&revised).contains("confirm"), "the gate went, too");
    let again = good(&revised, &progress, &Edit::Regroup(graft(&[2])));
    assert!(
        shape(&again).contains("bank\n    only\n      web-4\n  shop\n    new 2\n      web-2"),
        "{}",
        shape(&again)
    );
    // It comes back in front of what depends on it, as long as that has not begun.
    let mut needed = graft(&[2]);
    needed.dependencies = vec![("bank".to_owned(), "shop".to_owned())];
    let again = good(&revised, &progress, &Edit::Regroup(needed.clone()));
    assert!(
        shape(&again).contains("shop\n    new 2\n      web-2\n  bank\n    only\n      web-4"),
        "{}",
        shape(&again)
    );
    assert!(matches!(
        bad(&revised, &begun(&revised), &Edit::Regroup(needed)),
        BadEdit::BreaksDependency { .. }
    ));
}

/// `mint`, `shop` and `bank`, one after the other, a server each. `bank` depends on `shop`, and that on `mint`.
fn chain() -> (Plan, Vec<(String, String)>) {
    let mut input = input();
    let names = [("mint", 5), ("shop", 1), ("bank", 4)];
    input.parts = names
        .iter()
        .map(|(name, number)| part(name, vec![server(*number)]))
        .collect();
    let mut nodes = Vec::new();
    for (name, number) in names {
        let at = u32::try_from(nodes.len()).unwrap();
        nodes.push(application(name));
        nodes.push(group(at, &format!("all of {name}")));
        nodes.push(unit(at + 1, name, number));
    }
    let dependencies = [("bank", "shop"), ("shop", "mint")];
    let dependencies = dependencies.map(|(one, on)| (one.to_owned(), on.to_owned()));
    (expand(input, &of(nodes)).unwrap(), dependencies.to_vec())
}

#[test]
fn a_dependency_holds_through_an_application_without_groups() {
    let (plan, dependencies) = chain();
    let start = fresh(&plan);
    let delete = Edit::DeleteGroup {
        node: id(&plan, "all of shop"),
    };
    let without = good(&plan, &start, &delete);
    let progress = start.carried(&plan, &without);
    let sequence = |lanes: &[&[&str]], dependencies: &[(String, String)]| Edit::Sequence {
        lanes: lanes
            .iter()
            .map(|stages| Lane {
                stages: stages.iter().map(|name| vec![(*name).to_owned()]).collect(),
            })
            .collect(),
        dependencies: dependencies.to_vec(),
    };
    let broken = |application: &str, on: &str| BadEdit::BreaksDependency {
        application: application.to_owned(),
        on: on.to_owned(),
    };
    for lanes in [&[&["bank", "mint"][..]][..], &[&["bank"], &["mint"]]] {
        assert_eq!(
            bad(&without, &progress, &sequence(lanes, &dependencies)),
            broken("bank", "mint"),
        );
    }
    let kept = good(
        &without,
        &progress,
        &sequence(&[&["mint", "bank"]], &dependencies),
    );
    // However it came about: what comes back does not go before what it depends on.
    let mut shop = graft(&[1]);
    shop.dependencies = dependencies;
    let back = Edit::Regroup(shop);
    let again = good(&kept, &progress.carried(&without, &kept), &back);
    let places = ["mint", "shop", "bank"].map(|name| again.index_of(id(&again, name)));
    assert!(places.is_sorted(), "{}", shape(&again));
    for lanes in [&[&["bank", "mint"][..]][..], &[&["bank"], &["mint"]]] {
        let turned = good(&without, &progress, &sequence(lanes, &[]));
        let progress = progress.carried(&without, &turned);
        assert_eq!(bad(&turned, &progress, &back), broken("shop", "mint"));
        // What is done stands in nobody's way.
        let mint = turned.index_of(id(&turned, "mint")).unwrap();
        let end = progress.subtree_end[mint as usize];
        let done = crate::progress::NodeProgress {
            state: NodeState::Succeeded,
            attempt: 1,
            ..Default::default()
        };
        let leaves = (mint..end).filter(|node| turned.nodes[*node as usize].kind.is_leaf());
        let rows = leaves.map(|node| (node, done.clone()));
        let progress = Progress::load(&turned, Control::Active, false, rows);
        good(&turned, &progress, &back);
    }
}

#[test]
fn a_gate_goes_with_its_group() {
    let plan = plan();
    let deleted = Edit::DeleteGroup {
        node: id(&plan, "one"),
    };
    let moved = Edit::MoveServers {
        servers: vec![server_id(1)],
        to: id(&plan, "two"),
    };
    for edit in [deleted, moved] {
        let revised = good(&plan, &fresh(&plan), &edit);
        assert!(!shape(&revised).contains("confirm"), "{}", shape(&revised));
        let difference = revise(&plan, &fresh(&plan), &edit).unwrap().difference;
        assert!(
            difference.ends_with("; without confirm one"),
            "{difference}"
        );
    }
}

#[test]
fn applications_change_their_sequence() {
    let plan = plan();
    let lanes = |lanes: &[&[&[&str]]]| {
        lanes
            .iter()
            .map(|stages| Lane {
                stages: stages
                    .iter()
                    .map(|stage| stage.iter().map(|name| (*name).to_owned()).collect())
                    .collect(),
            })
            .collect::<Vec<_>>()
    };
    let sequence = |shape: &[&[&[&str]]], dependencies: &[(&str, &str)]| Edit::Sequence {
        lanes: lanes(shape),
        dependencies: dependencies
            .iter()
            .map(|(one, two)| ((*one).to_owned(), (*two).to_owned()))
            .collect(),
    };
    let before = fresh(&plan);
    let revised = good(
        &plan,
        &before,
        &sequence(&[&[&["bank"]], &[&["shop"]]], &[]),
    );
    assert!(
        shape(&revised).starts_with("order\n  lanes\n    lane A\n      bank\n        only\n          web-4\n    lane B\n      shop"),
        "{}",
        shape(&revised)
    );
    let staged = good(&plan, &before, &sequence(&[&[&["bank", "shop"]]], &[]));
    assert!(shape(&staged).starts_with("order\n  stage A1\n    bank"));
    good(
        &plan,
        &before,
        &sequence(&[&[&["bank"], &["shop"]]], &[("shop", "bank")]),
    );
    let running = begun(&plan);
    good(&plan, &running, &sequence(&[&[&["shop"], &["bank"]]], &[]));
    for (progress, edit, expect) in [
        (
            &before,
            sequence(&[&[&["shop"]]], &[]),
            "leaves out the application `bank`",
        ),
        (
            &before,
            sequence(&[&[&["shop", "bank", "shop"]]], &[]),
            "`shop` twice",
        ),
        (
            &before,
            sequence(&[&[&["shop", "bank", "else"]]], &[]),
            "no application `else`",
        ),
        (
            &before,
            sequence(&[&[&["shop", "bank"], &[]]], &[]),
            "empty lane or stage",
        ),
        (
            &before,
            sequence(&[&[&["shop"]], &[&["bank"]]], &[("shop", "bank")]),
            "`shop` depends on `bank`",
        ),
        (
            &running,
            sequence(&[&[&["bank"], &["shop"]]], &[]),
            "`shop` has started",
        ),
    ] {
        let error = bad(&plan, progress, &edit).to_string();
        assert!(error.contains(expect), "{expect}: {error}");
    }
    // Arranged before it is an order, it is a first revision.
    let arranged = arrange(&plan, &lanes(&[&[&["bank"], &["shop"]]]), &[]).unwrap();
    assert_eq!((arranged.schema, arranged.next_id), (1, 0));
    assert_eq!(arranged.index_of(1), Some(1));
}
