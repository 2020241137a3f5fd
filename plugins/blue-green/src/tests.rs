//! Plans as text, and what is refused.

use serde_json::{Value, json};
use windlass_sdk::strategy::NodeKind;

use super::*;

/// An application with two servers in each of the cells `a` and `b`.
fn app(key: &str) -> Application {
    ["a", "b", "a", "b"]
        .iter()
        .enumerate()
        .fold(Application::new(key, 1), |app, (index, cell)| {
            app.server(&format!("{key}{index}"), cell, "z")
        })
}

fn request(parameters: &Value, applications: Vec<Application>) -> PlanRequest {
    applications.into_iter().fold(
        PlanRequest::new(parameters).in_cells("a,b"),
        PlanRequest::application,
    )
}

fn shift_only(mut application: Application) -> Application {
    application.role = "shift-only".into();
    application.target_version = String::new();
    application
}

fn without_pools(mut application: Application) -> Application {
    application.has_pools = false;
    application
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
                NodeKind::Sequence => node.role.clone(),
                NodeKind::Parallel(limits) => format!("parallel {}", limits.max_in_flight),
                NodeKind::Release(unit) => format!("{:?}", unit.restore),
                NodeKind::Gate(_) => "gate".into(),
                NodeKind::Share(share) => {
                    format!("{} %: {}", share.percent, share.servers.join(" "))
                }
                NodeKind::Shift(shift) => {
                    let servers = shift
                        .weights
                        .iter()
                        .map(|(server, weight)| format!("{server} {weight:?}"));
                    servers.collect::<Vec<_>>().join(" ")
                }
                other => format!("{other:?}"),
            };
            let rollback = node
                .attributes
                .iter()
                .map(|(key, value)| format!(" ({key}: {value})"));
            format!(
                "{}{}: {kind}{}",
                "  ".repeat(depth),
                node.name,
                rollback.collect::<String>()
            )
        })
        .collect()
}

#[test]
fn five_steps_in_order() {
    let plan = BlueGreen::plan(request(
        &json!({}),
        vec![app("shop"), shift_only(app("api"))],
    ));
    assert_eq!(
        outline(&plan.unwrap()),
        [
            "1 cut traffic: stage",
            "  traffic: parallel 0",
            "    shop to a: 100 %: shop0 shop2",
            "    api to a: 100 %: api0 api2",
            "  confirm 1 cut traffic: gate",
            "2 release green: stage",
            "  traffic: parallel 0",
            "    shop to a: 100 %: shop0 shop2",
            "    api to a: 100 %: api0 api2",
            "  applications: parallel 0",
            "    shop: application",
            "      shop: parallel 1",
            "        shop1: Weight::Remembered",
            "        shop3: Weight::Remembered",
            "  confirm 2 release green: gate",
            "3 switch traffic: stage",
            "  traffic: parallel 0",
            "    shop to b: 100 %: shop1 shop3",
            "    api to b: 100 %: api1 api3",
            "  confirm 3 switch traffic: gate",
            "4 release blue: stage (rollback: stage)",
            "  traffic: parallel 0",
            "    shop to b: 100 %: shop1 shop3",
            "    api to b: 100 %: api1 api3",
            "  applications: parallel 0",
            "    shop: application",
            "      shop: parallel 1",
            "        shop0: Weight::Remembered",
            "        shop2: Weight::Remembered",
            "  confirm 4 release blue: gate",
            "5 restore traffic: stage (rollback: none)",
            "  traffic: parallel 0",
            "    shop as before: shop0 Weight::Remembered shop1 Weight::Remembered shop2 Weight::Remembered shop3 Weight::Remembered",
            "    api as before: api0 Weight::Remembered api1 Weight::Remembered api2 Weight::Remembered api3 Weight::Remembered",
        ]
    );
}

#[test]
fn an_application_without_pools_is_released_in_steps_2_and_4_only() {
    for applications in [
        vec![app("shop"), without_pools(app("batch"))],
        vec![without_pools(app("batch")), app("shop")],
        vec![shift_only(app("shop")), without_pools(app("batch"))],
    ] {
        let plan = BlueGreen::plan(request(&json!({}), applications)).unwrap();
        let mut step = String::new();
        let mut nodes = Vec::new();
        for line in outline(&plan) {
            match line.strip_prefix("  ") {
                None => step = line[..1].to_owned(),
                Some(node) if node.contains("batch") => {
                    nodes.push(format!("{step} {}", node.trim_start()));
                }
                Some(_) => {}
            }
        }
        assert_eq!(
            nodes,
            [
                "2 batch: application",
                "2 batch: parallel 1",
                "2 batch1: Weight::Remembered",
                "2 batch3: Weight::Remembered",
                "4 batch: application",
                "4 batch: parallel 1",
                "4 batch0: Weight::Remembered",
                "4 batch2: Weight::Remembered",
            ]
        );
    }
}

#[test]
fn green_can_be_chosen() {
    let plan = BlueGreen::plan(request(&json!({ "green": "a" }), vec![app("shop")])).unwrap();
    let outline = outline(&plan);
    assert_eq!(outline[2], "    shop to b: 100 %: shop1 shop3");
    assert!(outline.contains(&"        shop0: Weight::Remembered".to_owned()));
}

#[test]
fn a_cell_is_released_at_once_where_the_limits_allow_it() {
    let mut request = request(&json!({}), vec![app("shop")]);
    request.limits.max_unavailable = "100%".into();
    let plan = outline(&BlueGreen::plan(request).unwrap());
    assert!(
        plan.contains(&"      shop: parallel 2".to_owned()),
        "{plan:?}"
    );
}

#[test]
fn what_is_missing_is_said() {
    let without = |cell: &str| {
        let mut shop = app("shop");
        shop.servers.retain(|server| server.cell != cell);
        shop
    };
    for (cells, parameters, applications, says) in [
        (
            "",
            json!({}),
            vec![app("shop")],
            "exactly two cells, and this one has 0",
        ),
        (
            "a,b,c",
            json!({}),
            vec![app("shop")],
            "this one has 3: a, b, c",
        ),
        (
            "a,b",
            json!({ "green": "c" }),
            vec![app("shop")],
            "`c` is not a cell of the workspace, which has a and b",
        ),
        (
            "a,b",
            json!({}),
            vec![without("a")],
            "`shop` has no server in the cell a",
        ),
        (
            "a,b",
            json!({}),
            vec![app("api"), shift_only(without("b"))],
            "`shop` has no server in the cell b, so that its traffic",
        ),
        (
            "a,b",
            json!({}),
            vec![app("shop").server("x", "none", "z")],
            "the server x of `shop` is in neither of the cells a and b",
        ),
        (
            "a,b",
            json!({}),
            vec![shift_only(app("shop"))],
            "needs an application to release",
        ),
        (
            "a,b",
            json!({}),
            vec![without_pools(app("shop"))],
            "or use the strategy `grouped` with `grouping` `by-cell`",
        ),
        (
            "a,b",
            json!({}),
            vec![without_pools(app("shop")), without_pools(app("api"))],
            "None of the applications in this order has a pool",
        ),
        (
            "a,b",
            json!({}),
            vec![app("api"), without_pools(shift_only(app("shop")))],
            "takes no traffic from a pool: leave it out",
        ),
    ] {
        let request = applications.into_iter().fold(
            PlanRequest::new(&parameters).in_cells(cells),
            PlanRequest::application,
        );
        let error = BlueGreen::plan(request).unwrap_err();
        assert!(error.message.contains(says), "{cells}: {}", error.message);
    }
}

#[test]
fn rollback_brings_back_what_changed_and_leaves_traffic_to_the_core() {
    let unit = |server: &str, state: &str| UnitProgress {
        application: "shop".into(),
        server: server.into(),
        state: state.into(),
    };
    let progress = vec![
        unit("shop1", "released"),
        unit("shop3", "failed"),
        unit("shop0", "untouched"),
    ];
    let plan = BlueGreen::rollback(request(&json!({}), vec![app("shop"), app("api")]), progress);
    assert_eq!(
        outline(&plan.unwrap()),
        [
            "applications: parallel 0",
            "  shop: application",
            "    shop: parallel 1",
            "      shop1: Weight::Remembered",
            "      shop3: Weight::Remembered",
        ]
    );
}
