//! What a refusal must look like, whoever refuses what.

use bytes::Bytes;
use hyper::Method;
use serde_json::Value;
use windlass::api::client::{Answer, Client};

/// Sends a request with a JSON body, or without one.
///
/// # Panics
/// When there is no answer.
pub async fn ask(
    api: &Client,
    method: Method,
    path: &str,
    body: Option<&Value>,
    headers: &[(&str, &str)],
) -> Answer {
    let mut headers = headers.to_vec();
    if body.is_some() {
        headers.push(("content-type", "application/json"));
    }
    let body = body.map_or_else(Bytes::new, |body| body.to_string().into());
    api.request(method.clone(), path, body, &headers)
        .await
        .unwrap_or_else(|error| panic!("{method} {path}: {error}"))
}

/// Checks that an answer is a problem with this status and code, and answers the problem: it says what is wrong and what to
/// do, and carries the request's id.
///
/// # Panics
/// With the answer, when it is not.
pub fn refused(answer: &Answer, status: u16, code: &str) -> Value {
    let problem = answer.json();
    let shown = format!("{}: {}", answer.status, answer.text());
    assert_eq!(answer.status, status, "expected {code}: {shown}");
    assert_eq!(
        answer.header("content-type"),
        Some("application/problem+json"),
        "{shown}"
    );
    assert_eq!(problem["code"], code, "{shown}");
    assert_eq!(problem["status"], status, "{shown}");
    for field in ["title", "detail", "mend"] {
        assert!(
            problem[field].as_str().is_some_and(|text| !text.is_empty()),
            "{field} is missing: {shown}"
        );
    }
    let id = problem["request_id"].as_str().unwrap_or_default();
    assert!(
        !id.is_empty() && answer.header("x-request-id") == Some(id),
        "the request's id: {shown}"
    );
    problem
}

/// Checks that an answer is a success with this status, and answers its body.
///
/// # Panics
/// With the answer, when it is not.
pub fn accepted(answer: &Answer, status: u16) -> Value {
    assert_eq!(answer.status, status, "{}", answer.text());
    answer.json()
}
