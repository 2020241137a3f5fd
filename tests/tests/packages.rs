//! Packages over the API beside their uploads: what each application has, the one that a release takes unless it names
//! another, "release now", and the deletion of many.

use hyper::Method;
use serde_json::{Value, json};
use windlass_tests::{
    host::{Setup, TestHost, items, tar_gz, text},
    release::upload,
    scene::{Scene, refusal},
};

#[tokio::test]
async fn packages_are_looked_over_released_and_deleted() {
    let mut host = TestHost::start(Setup {
        agents: 1,
        ..Setup::default()
    })
    .await;
    let scene = Scene::prepare(&host).await;
    let idle = json!({ "name": "idle", "alias": "Does nothing", "owner": "ops",
        "tech_stack": { "name": "binary", "version": "*" } });
    host.api
        .post("/v1/apps", &idle)
        .await
        .expect("an application");
    each_application_is_told_with_what_it_has(&host).await;
    an_order_takes_the_instances_package(&host, &scene).await;
    a_package_is_released_at_once(&host, &scene).await;
    many_are_deleted_each_for_itself(&host, &scene).await;
    host.stop().await;
}

async fn overview(host: &TestHost, query: &str) -> Vec<Value> {
    let path = host.ws(&format!("package-overview{query}"));
    items(&host.api.get(&path).await.expect("the overview"))
}

async fn each_application_is_told_with_what_it_has(host: &TestHost) {
    let all = overview(host, "").await;
    let told: Vec<(String, u64, Value)> = all
        .iter()
        .map(|app| {
            let count = app["packages"].as_u64().expect("a count");
            (text(&app["name"]), count, app["newest"]["version"].clone())
        })
        .collect();
    assert_eq!(
        told,
        [
            ("scene".to_owned(), 3, json!("3.0.0")),
            ("idle".to_owned(), 0, Value::Null),
        ]
    );
    assert_eq!(
        (&all[1]["owner"], &all[1]["tech_stack"]["name"]),
        (&json!("ops"), &json!("binary"))
    );
    let newest = text(&all[0]["newest"]["id"]);
    let newest = host.api.get(&host.ws(&format!("packages/{newest}"))).await;
    assert_eq!(
        newest.expect("the package")["created_at"],
        all[0]["newest"]["created_at"]
    );
    for (query, expect) in [
        ("?has_packages=true", &["scene"][..]),
        ("?has_packages=false", &["idle"]),
        ("?search=NOTHING", &["idle"]),
        ("?search=nobody", &[]),
    ] {
        let found = overview(host, query).await;
        let names: Vec<&str> = found
            .iter()
            .filter_map(|app| app["name"].as_str())
            .collect();
        assert_eq!(names, expect, "{query}");
    }
    // A page at a time.
    let first = host.ws("package-overview?page_size=1");
    let first = host.api.get(&first).await.expect("a page");
    let next = format!("?page_size=1&cursor={}", text(&first["next_cursor"]));
    assert_eq!(overview(host, &next).await[0]["name"], "idle");
}

async fn an_order_takes_the_instances_package(host: &TestHost, scene: &Scene) {
    let mut order = scene.order("by the instance", 0);
    order["targets"][0]
        .as_object_mut()
        .expect("a target")
        .remove("package");
    let (status, code, detail) = refusal(host.order(&order).await);
    assert_eq!(
        (status, code.as_str()),
        (422, "package_missing"),
        "{detail}"
    );
    scene
        .change(host, &json!({ "package": scene.packages[0] }))
        .await;
    let shown = host.api.post(&host.ws("orders/preview"), &order).await;
    order["plan_digest"] = shown.expect("a preview")["plan_digest"].clone();
    let made = host.order(&order).await.expect("an order");
    // What was made says which package it releases; what is made later takes what the instance has then.
    scene
        .change(host, &json!({ "package": scene.packages[1] }))
        .await;
    let (status, code, detail) = refusal(host.order(&order).await);
    assert_eq!((status, code.as_str()), (409, "plan_drifted"), "{detail}");
    assert!(
        detail.contains("1.0.0") && detail.contains("2.0.0"),
        "{detail}"
    );
    let act = json!({ "action": "run" });
    windlass_tests::scene::act(host, &made, &act)
        .await
        .expect("it is run");
    let ended = host.order_ended(&made).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    scene.check_serves(host, 0).await;
}

async fn a_package_is_released_at_once(host: &TestHost, scene: &Scene) {
    let release = |package: &str| host.ws(&format!("packages/{package}/release"));
    let second = release(&scene.packages[1]);
    let made = host.api.post(&second, &json!({})).await.expect("an order");
    assert_eq!(made["title"], "scene 2.0.0");
    let ended = host.order_ended(&text(&made["id"])).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    scene.check_serves(host, 1).await;

    // One that nothing runs, and one that runs twice.
    let file = tar_gz(&[("run.sh", 0o755, b"#!/bin/sh\n")]);
    let unused = upload(host, "idle", "1.0.0", file).await;
    let asked = host.api.post(&release(&unused), &json!({})).await;
    let (status, code, detail) = refusal(asked);
    assert_eq!((status, code.as_str()), (409, "no_instance"), "{detail}");
    let another =
        json!({ "name": "another", "app": scene.app, "parameters": { "program": "run.sh" } });
    let another = host.api.post(&host.ws("service-instances"), &another).await;
    let another = text(&another.expect("an instance")["id"]);
    let (status, code, detail) = refusal(host.api.post(&second, &json!({})).await);
    assert_eq!(
        (status, code.as_str()),
        (409, "several_instances"),
        "{detail}"
    );
    assert!(
        detail.contains(&another) && detail.contains(&scene.instance),
        "{detail}"
    );
    let named = json!({ "instance": another });
    let (status, code, detail) = refusal(host.api.post(&second, &named).await);
    assert_eq!((status, code.as_str()), (422, "no_servers"), "{detail}");
    let idle = overview(host, "?search=idle").await[0]["app"].clone();
    let idle = json!({ "name": "idle", "app": idle, "parameters": { "program": "run.sh" } });
    let idle = host.api.post(&host.ws("service-instances"), &idle).await;
    let named = json!({ "instance": idle.expect("an instance")["id"] });
    let other = host.api.post(&second, &named).await.expect_err("refused");
    let told = other.to_string();
    assert!(
        told.contains("package_of_other_application") && told.contains("\"instance\""),
        "{told}"
    );
    let unknown = json!({ "title": "nobody's", "targets": [
        { "instance": "svc_00000000000000000000000000000000", "package": scene.packages[0] }] });
    let (status, code, detail) = refusal(host.order(&unknown).await);
    assert_eq!(
        (status, code.as_str()),
        (422, "instance_unknown"),
        "{detail}"
    );
    let first = release(&scene.packages[0]);
    let named = json!({ "instance": scene.instance, "title": "back" });
    let made = host.api.post(&first, &named).await.expect("an order");
    assert_eq!(made["title"], "back");
    let ended = host.order_ended(&text(&made["id"])).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    scene.check_serves(host, 0).await;
}

async fn many_are_deleted_each_for_itself(host: &TestHost, scene: &Scene) {
    let unused = overview(host, "?search=idle").await[0]["newest"]["id"].clone();
    let absent = "pkg_00000000000000000000000000000000";
    let delete = async |packages: Value| {
        let body = json!({ "packages": packages }).to_string();
        let path = host.ws("packages");
        let headers = [("content-type", "application/json")];
        let answer = host
            .api
            .request(Method::DELETE, &path, body.into(), &headers);
        answer.await.expect("an answer")
    };
    let answer = delete(json!([
        { "id": scene.packages[0], "confirm": "1.0.0" },
        { "id": scene.packages[2], "confirm": "3.0" },
        { "id": absent, "confirm": "1.0.0" },
        { "id": unused, "confirm": "1.0.0" },
    ]))
    .await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let outcome = answer.json();
    assert_eq!(outcome["deleted"], json!([unused]), "{outcome}");
    let refused = outcome["refused"].as_array().expect("those that stay");
    let refused: Vec<(&Value, &Value)> = refused
        .iter()
        .map(|one| (&one["id"], &one["code"]))
        .collect();
    assert_eq!(
        refused,
        [
            (&json!(scene.packages[0]), &json!("in_use")),
            (&json!(scene.packages[2]), &json!("confirmation_missing")),
            (&json!(absent), &json!("not_found")),
        ],
        "{outcome}"
    );
    assert_eq!(overview(host, "?has_packages=true").await.len(), 1);
    for packages in [
        json!([]),
        Value::Array(vec![json!({ "id": absent, "confirm": "" }); 101]),
    ] {
        let answer = delete(packages).await;
        let problem = answer.json();
        assert_eq!(
            (answer.status, &problem["code"], &problem["field"]),
            (422, &json!("packages_out_of_range"), &json!("packages")),
            "{problem}"
        );
    }
}
