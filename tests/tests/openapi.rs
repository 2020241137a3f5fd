//! The OpenAPI document: compared with the one that was agreed on, so that no path, field or limit changes unseen.
//!
//! After a change that is wanted, write the agreed document anew and read its difference before it is committed:
//! `WINDLASS_BLESS=1 cargo test --release -p windlass-tests --test openapi`

use std::{collections::BTreeSet, fs, path::PathBuf};

use serde_json::Value;

/// Paths that others script against, each with a method and its operation id.
const FIXED: [(&str, &str, &str); 24] = [
    ("/healthz", "get", "get_health"),
    ("/readyz", "get", "get_readiness"),
    ("/metrics", "get", "get_metrics"),
    ("/openapi.json", "get", "get_openapi"),
    ("/v1/workspaces", "post", "create_workspace"),
    ("/v1/workspaces", "get", "list_workspaces"),
    ("/v1/apps", "post", "create_app"),
    ("/v1/apps", "get", "list_apps"),
    ("/v1/workspaces/{ws}/packages", "post", "upload_package"),
    ("/v1/workspaces/{ws}/packages", "get", "list_packages"),
    (
        "/v1/workspaces/{ws}/service-instances",
        "post",
        "create_instance",
    ),
    (
        "/v1/workspaces/{ws}/service-instances",
        "get",
        "list_instances",
    ),
    ("/v1/workspaces/{ws}/servers", "get", "list_servers"),
    (
        "/v1/workspaces/{ws}/activation-codes",
        "post",
        "create_activation_code",
    ),
    (
        "/v1/workspaces/{ws}/activation-codes",
        "get",
        "list_activation_codes",
    ),
    ("/v1/workspaces/{ws}/orders", "post", "create_order"),
    ("/v1/workspaces/{ws}/orders", "get", "list_orders"),
    (
        "/v1/workspaces/{ws}/orders/preview",
        "post",
        "preview_order",
    ),
    ("/v1/workspaces/{ws}/orders/{id}", "get", "get_order"),
    (
        "/v1/workspaces/{ws}/orders/{id}/actions",
        "post",
        "act_on_order",
    ),
    (
        "/v1/workspaces/{ws}/orders/{id}/events",
        "get",
        "watch_order_events",
    ),
    ("/v1/plugins", "get", "list_plugins"),
    ("/v1/plugins/{name}", "get", "get_plugin"),
    (
        "/v1/plugins/{name}/{version}/actions",
        "post",
        "act_on_plugin",
    ),
];

fn document() -> Value {
    serde_json::to_value(windlass::api::openapi()).expect("the document is JSON")
}

/// Every operation: path, method, operation.
fn operations(document: &Value) -> Vec<(&str, &str, &Value)> {
    let paths = document["paths"].as_object().expect("paths");
    let operations = paths.iter().flat_map(|(path, item)| {
        let item = item.as_object().expect("a path's item");
        item.iter()
            .map(move |(method, operation)| (path.as_str(), method.as_str(), operation))
    });
    operations.collect()
}

/// Every `$ref` below a value.
fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                match field.as_str() {
                    Some(target) if name == "$ref" => drop(found.insert(target)),
                    Some(_) | None => references(field, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn the_document_is_the_agreed_one() {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/openapi.json");
    let found = serde_json::to_string_pretty(&document()).expect("the document is JSON") + "\n";
    if std::env::var_os("WINDLASS_BLESS").is_some() {
        fs::create_dir_all(golden.parent().expect("it has a directory"))
            .expect("the directory of golden files");
        fs::write(&golden, &found).expect("the golden file");
    }
    let agreed = fs::read_to_string(&golden).expect("the golden file");
    if let Some((line, (agreed, found))) = (1..)
        .zip(agreed.lines().zip(found.lines()))
        .find(|(_, (agreed, found))| agreed != found)
    {
        panic!(
            "the API's document differs from tests/tests/golden/openapi.json from line {line} on:\n- {agreed}\n+ {found}\n\
             if that is wanted: WINDLASS_BLESS=1 cargo test --release -p windlass-tests --test openapi"
        );
    }
    assert_eq!(
        agreed.len(),
        found.len(),
        "one of them goes on where the other ends"
    );
}

#[test]
fn it_is_openapi_3_1_and_every_fixed_path_stands_in_it() {
    let document = document();
    assert!(
        document["openapi"]
            .as_str()
            .is_some_and(|version| version.starts_with("3.1.")),
        "{}",
        document["openapi"]
    );
    for (path, method, id) in FIXED {
        assert_eq!(
            document["paths"][path][method]["operationId"], id,
            "{method} {path}"
        );
    }
}

#[test]
fn every_operation_has_its_id_its_token_and_its_problem() {
    let document = document();
    let mut ids = BTreeSet::new();
    for (path, method, operation) in operations(&document) {
        let id = operation["operationId"]
            .as_str()
            .unwrap_or_else(|| panic!("{method} {path} has no operation id"));
        assert!(ids.insert(id), "two operations are called {id}");
        assert_eq!(
            operation["responses"]["default"]["content"]["application/problem+json"]["schema"]["$ref"],
            "#/components/schemas/Problem",
            "{id}"
        );
        assert_eq!(
            operation["security"].is_array(),
            path.starts_with("/v1/"),
            "{id}: a token is needed below /v1"
        );
        let parameters: Vec<&str> = operation["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one["name"].as_str())
            .collect();
        for part in path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        {
            assert!(
                parameters.contains(&part),
                "{id}: the parameter {part} is not described"
            );
        }
        let writes = path.starts_with("/v1/") && method != "get";
        assert_eq!(parameters.contains(&"Idempotency-Key"), writes, "{id}");
    }
}

/// What a request has to give is what has no default: none of our flags is required, and nothing with a default.
#[test]
fn no_request_has_to_give_what_has_a_default() {
    fn check(schema: &Value, found: &mut Vec<String>) {
        match schema {
            Value::Object(fields) => {
                let required = fields.get("required").and_then(Value::as_array);
                for name in required.into_iter().flatten().filter_map(Value::as_str) {
                    let field = &schema["properties"][name];
                    if field["type"] == "boolean" || field.get("default").is_some() {
                        found.push(name.to_owned());
                    }
                }
                fields.values().for_each(|field| check(field, found));
            }
            Value::Array(items) => items.iter().for_each(|item| check(item, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let document = document();
    let mut looked = 0;
    for (path, method, operation) in operations(&document) {
        // The request's schema with all that it refers to.
        let mut schemas = vec![&operation["requestBody"]];
        let mut seen = BTreeSet::new();
        while let Some(schema) = schemas.pop() {
            let mut found = Vec::new();
            check(schema, &mut found);
            assert_eq!(found, Vec::<String>::new(), "{method} {path}");
            let mut targets = BTreeSet::new();
            references(schema, &mut targets);
            for target in targets {
                if let (true, Some(pointer)) = (seen.insert(target), target.strip_prefix('#')) {
                    schemas.extend(document.pointer(pointer));
                    looked += 1;
                }
            }
        }
    }
    assert!(looked > 50, "{looked}");
}

#[test]
fn every_reference_leads_somewhere() {
    let document = document();
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    assert!(found.len() > 30, "{found:?}");
    for target in found {
        let pointer = target
            .strip_prefix('#')
            .unwrap_or_else(|| panic!("{target} leaves the document"));
        assert!(document.pointer(pointer).is_some(), "{target} is nowhere");
    }
}
