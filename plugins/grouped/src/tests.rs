//! Plans as text, and what every plan keeps to.

use serde_json::json;
use windlass_sdk::strategy::NodeKind;

use super::*;

fn shop(servers: usize) -> Application {
    (0..servers).fold(Application::new("shop", 1), |app, index| {
        let cell = if index % 2 == 0 { "a" } else { "b" };
        app.server(&format!("s{index}"), cell, &format!("zone-{cell}"))
    })
}

/// A plan as an indented outline: one line per node.
fn outline(plan: &ReleasePlan) -> Vec<String> {
    let mut depths: Vec<usize> = Vec::new();
    plan.nodes
        .iter()
        .map(|node| {
            let depth = node.parent.map_or(0, |parent| depths[parent as usize] + 1);
            depths.push(depth);
            let kind = match &node.kind {
                NodeKind::Sequence => "sequence".to_owned(),
                NodeKind::Parallel(limits) => format!("parallel {}", limits.max_in_flight),
                NodeKind::Release(unit) => format!("{} {:?}", unit.application, unit.restore),
                NodeKind::Gate(_) => "gate".to_owned(),
                NodeKind::Pause(ms) => format!("pause {ms}"),
                other => format!("{other:?}"),
            };
            format!("{}{}: {kind}", "  ".repeat(depth), node.name)
        })
        .collect()
}

fn plan(parameters: &serde_json::Value, servers: usize) -> Result<ReleasePlan, PluginError> {
    Grouped::plan(PlanRequest::new(parameters).application(shop(servers)))
}

fn group_sizes(parameters: &serde_json::Value, servers: usize) -> Vec<usize> {
    let plan = plan(parameters, servers).unwrap();
    plan.nodes
        .iter()
        .enumerate()
        .filter(|(_, node)| node.role == "group")
        .map(|(index, _)| {
            plan.nodes
                .iter()
                .filter(|node| node.parent == Some(index as u32))
                .count()
        })
        .collect()
}

#[test]
fn sizes_of_groups() {
    for (parameters, servers, expect) in [
        (json!({}), 1, vec![1]),
        (json!({}), 3, vec![1, 1, 1]),
        (json!({}), 10, vec![1, 3, 3, 3]),
        (json!({ "wave_percent": 50 }), 9, vec![1, 5, 3]),
        (json!({ "grouping": "one-per-group" }), 3, vec![1, 1, 1]),
        (json!({ "grouping": "by-cell" }), 5, vec![3, 2]),
        (json!({ "beta_group": true }), 6, vec![2, 1, 1, 1, 1]),
        (json!({ "beta_group": true }), 2, vec![2]),
        (
            json!({ "grouping": "explicit", "groups": [{ "servers": ["s2"] }, { "servers": ["s0", "s1"] }] }),
            3,
            vec![1, 2],
        ),
    ] {
        assert_eq!(group_sizes(&parameters, servers), expect, "{parameters}");
    }
}

#[test]
fn a_beta_group_is_one_of_each_zone_and_then_waits() {
    let plan = plan(&json!({ "beta_group": true, "pause_s": 5 }), 4).unwrap();
    assert_eq!(
        outline(&plan),
        [
            "shop: sequence",
            "  beta: parallel 10",
            "    s0: shop Weight::Remembered",
            "    s1: shop Weight::Remembered",
            "  confirm beta: gate",
            "  pause after beta: pause 5000",
            "  group 1: parallel 10",
            "    s2: shop Weight::Remembered",
            "  pause after group 1: pause 5000",
            "  group 2: parallel 10",
            "    s3: shop Weight::Remembered",
        ]
    );
}

#[test]
fn gray_traffic_keeps_zero_and_waits_after_every_group() {
    let plan = plan(&json!({ "gray_traffic": true, "beta_group": true }), 3).unwrap();
    assert_eq!(
        outline(&plan),
        [
            "shop: sequence",
            "  beta: parallel 10",
            "    s0: shop Weight::KeepZero",
            "    s1: shop Weight::KeepZero",
            "  confirm beta: gate",
            "  group 1: parallel 10",
            "    s2: shop Weight::KeepZero",
            "  confirm group 1: gate",
        ]
    );
}

#[test]
fn stages_follow_each_other_and_applications_of_a_stage_go_side_by_side() {
    let request = PlanRequest::new(&json!({}))
        .application(Application::new("web", 2).server("w", "a", "z"))
        .application(Application::new("db", 1).server("d", "a", "z"))
        .application(Application::new("queue", 1).server("q", "a", "z"));
    assert_eq!(
        outline(&Grouped::plan(request).unwrap()),
        [
            "stage A1: parallel 0",
            "  db: sequence",
            "    group 1: parallel 10",
            "      d: db Weight::Remembered",
            "  queue: sequence",
            "    group 1: parallel 10",
            "      q: queue Weight::Remembered",
            "web: sequence",
            "  group 1: parallel 10",
            "    w: web Weight::Remembered",
        ]
    );
}

#[test]
fn never_more_of_a_cell_in_flight_than_may_be_unavailable() {
    let plan = plan(&json!({ "grouping": "by-cell" }), 9).unwrap();
    // Cell a has 5 servers, of which 2 may be unavailable; cell b has 4, of which 2 may be.
    assert!(outline(&plan).contains(&"  cell a: parallel 2".to_owned()));
    let mut unhealthy = shop(9);
    unhealthy.servers.retain(|server| server.cell == "a");
    unhealthy.servers[0].healthy = false;
    let request = PlanRequest::new(
        &json!({ "grouping": "explicit", "groups": [{ "servers": ["s0"] }, { "servers": ["s2", "s4", "s6", "s8"] }] }),
    )
    .application(unhealthy);
    let plan = Grouped::plan(request).unwrap();
    assert!(outline(&plan).contains(&"  group 2: parallel 1".to_owned()));
}

#[test]
fn all_in_one_must_be_allowed() {
    let parameters = json!({ "grouping": "all-in-one" });
    let error = plan(&parameters, 3).unwrap_err();
    assert!(error.message.contains("50%"), "{}", error.message);
    let mut request = PlanRequest::new(&parameters).application(shop(3));
    request.limits.max_unavailable = "100%".into();
    let plan = Grouped::plan(request).unwrap();
    assert_eq!(outline(&plan)[1], "  group 1: parallel 0");
}

#[test]
fn wrong_groups_name_their_place() {
    for (parameters, field) in [
        (json!({ "grouping": "explicit" }), "/groups"),
        (json!({ "groups": [{ "servers": ["s0"] }] }), "/groups"),
        (
            json!({ "grouping": "explicit", "groups": [{ "servers": ["s0", "nobody"] }] }),
            "/groups/0/servers/1",
        ),
        (
            json!({ "grouping": "explicit", "groups": [{ "servers": ["s0"] }, { "servers": ["s0"] }] }),
            "/groups/1/servers/0",
        ),
        (
            json!({ "grouping": "explicit", "groups": [{ "servers": ["s0"] }] }),
            "/groups",
        ),
        (
            json!({ "grouping": "explicit", "groups": [{ "application": "x", "servers": ["s0"] }] }),
            "/groups/0/application",
        ),
    ] {
        let error = plan(&parameters, 2).unwrap_err();
        assert_eq!(error.field.as_deref(), Some(field), "{}", error.message);
    }
}

#[test]
fn rollback_takes_changed_servers_only_failed_first_and_stages_in_reverse() {
    let request = PlanRequest::new(&json!({ "beta_group": true, "auto_rollback": true }))
        .application(shop(4))
        .application(Application::new("web", 2).server("w", "a", "z"));
    let unit = |application: &str, server: &str, state: &str| UnitProgress {
        application: application.into(),
        server: server.into(),
        state: state.into(),
    };
    let plan = Grouped::rollback(
        request,
        vec![
            unit("shop", "s0", "released"),
            unit("shop", "s1", "failed"),
            unit("shop", "s2", "untouched"),
            unit("shop", "s3", "a-state-of-the-future"),
            unit("web", "w", "released"),
        ],
    )
    .unwrap();
    assert_eq!(
        outline(&plan),
        [
            "web: sequence",
            "  group 1: parallel 10",
            "    w: web Weight::Remembered",
            "shop: sequence",
            "  failed servers: parallel 1",
            "    s1: shop Weight::Remembered",
            "    s3: shop Weight::Remembered",
            "  group 1: parallel 10",
            "    s0: shop Weight::Remembered",
        ]
    );
    assert_eq!(plan.on_failure, "block");
}

#[test]
fn every_server_is_in_a_plan_once() {
    for grouping in ["quick", "by-cell", "one-per-group"] {
        for servers in 0..30 {
            for beta in [false, true] {
                let plan = plan(
                    &json!({ "grouping": grouping, "beta_group": beta }),
                    servers,
                )
                .unwrap();
                let mut planned: Vec<_> = plan
                    .nodes
                    .iter()
                    .filter_map(|node| match &node.kind {
                        NodeKind::Release(unit) => Some(unit.server.clone()),
                        _ => None,
                    })
                    .collect();
                planned.sort();
                let mut expect: Vec<_> = (0..servers).map(|index| format!("s{index}")).collect();
                expect.sort();
                assert_eq!(planned, expect, "{grouping} {servers} {beta}");
            }
        }
    }
}
