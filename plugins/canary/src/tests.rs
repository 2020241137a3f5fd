//! Plans as text, and what every plan keeps to.

use serde_json::{Value, json};
use windlass_sdk::strategy::NodeKind;

use super::*;

fn shop(servers: usize) -> Application {
    (0..servers).fold(Application::new("shop", 1), |app, index| {
        // The first half stands in cell a.
        let cell = if index < servers.div_ceil(2) {
            "a"
        } else {
            "b"
        };
        app.server(&format!("s{index}"), cell, cell)
    })
}

fn plan(parameters: &Value, servers: usize) -> Result<ReleasePlan, PluginError> {
    Canary::plan(PlanRequest::new(parameters).application(shop(servers)))
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
                NodeKind::Release(unit) => format!("{:?}", unit.restore),
                NodeKind::Gate(_) => "gate".to_owned(),
                NodeKind::Share(share) => {
                    format!("{} % to {}", share.percent, share.servers.join(" "))
                }
                NodeKind::Shift(shift) => format!("of {}", shift.weights.len()),
                NodeKind::Judge(judge) => format!("{} after {} ms", judge.stage, judge.window_ms),
                other => format!("{other:?}"),
            };
            format!("{}{}: {kind}", "  ".repeat(depth), node.name)
        })
        .collect()
}

#[test]
fn servers_and_traffic_rise_together() {
    let parameters = json!({ "percentages": [5, 50, 100], "window_s": 2, "confirm": true });
    assert_eq!(
        outline(&plan(&parameters, 5).unwrap()),
        [
            "shop: sequence",
            "  5 %: sequence",
            "    5 %: parallel 1",
            "      s0: Weight::KeepZero",
            "    5 % of the traffic: 5 % to s0",
            "    judge 5 %: shop 5 after 2000 ms",
            "    confirm 5 %: gate",
            "  50 %: sequence",
            "    50 %: parallel 1",
            "      s3: Weight::KeepZero",
            "      s1: Weight::KeepZero",
            "    50 % of the traffic: 50 % to s0 s3 s1",
            "    judge 50 %: shop 50 after 2000 ms",
            "    confirm 50 %: gate",
            "  100 %: sequence",
            "    100 %, wave 1: parallel 1",
            "      s4: Weight::KeepZero",
            "      s2: Weight::KeepZero",
            "    100 %, wave 1: weights as before: of 5",
            "    judge 100 %: shop 100 after 2000 ms",
        ]
    );
}

#[test]
fn one_server_stays_with_the_old_version_below_100_percent() {
    let parameters = json!({ "percentages": [1, 99, 100] });
    let outline = outline(&plan(&parameters, 2).unwrap());
    assert!(
        outline.contains(&"    99 % of the traffic: 99 % to s0".to_owned()),
        "{outline:?}"
    );
    for servers in 2..40 {
        for percent in 1..100 {
            let released = servers_for(percent, servers);
            assert!(
                (1..servers).contains(&released),
                "{percent} % of {servers}: {released}"
            );
        }
    }
}

#[test]
fn every_server_is_in_a_plan_once() {
    for servers in 2..30 {
        let plan = plan(&json!({ "percentages": [1, 10, 33, 34, 80, 100] }), servers).unwrap();
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
        assert_eq!(planned, expect, "{servers}");
    }
}

#[test]
fn what_cannot_be_is_said() {
    let shift_only = |mut app: Application| {
        app.role = "shift-only".into();
        app
    };
    let without_pools = |mut app: Application| {
        app.has_pools = false;
        app
    };
    for (parameters, application, says) in [
        (
            json!({ "percentages": [5, 5, 100] }),
            shop(3),
            "5 does not stand above 5",
        ),
        (
            json!({ "percentages": [50, 25, 100] }),
            shop(3),
            "25 does not stand above 50",
        ),
        (
            json!({ "percentages": [5, 50] }),
            shop(3),
            "the last percentage is 100",
        ),
        (json!({}), shop(1), "`shop` has 1 server"),
        (
            json!({}),
            without_pools(shop(3)),
            "`shop` takes none from a pool",
        ),
        (
            json!({}),
            shift_only(shop(3)),
            "`shop` is to take part in shifting only",
        ),
    ] {
        let error =
            Canary::plan(PlanRequest::new(&parameters).application(application)).unwrap_err();
        assert!(error.message.contains(says), "{}", error.message);
    }
}

#[test]
fn rollback_brings_back_what_changed_failed_servers_first() {
    let unit = |server: &str, state: &str| UnitProgress {
        application: "shop".into(),
        server: server.into(),
        state: state.into(),
    };
    let progress = vec![
        unit("s0", "released"),
        unit("s3", "failed"),
        unit("s1", "untouched"),
    ];
    let request = PlanRequest::new(&json!({})).application(shop(5));
    assert_eq!(
        outline(&Canary::rollback(request, progress).unwrap()),
        [
            "applications: sequence",
            "  shop: sequence",
            "    failed servers: parallel 1",
            "      s3: Weight::Remembered",
            "    released servers: parallel 1",
            "      s0: Weight::Remembered",
        ]
    );
}
