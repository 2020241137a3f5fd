//! What handlers take out of a request: path, query, body, headers, each refused with a problem of its own.
//!
//! Bodies are JSON of at most [`BODY_MAX_BYTES`], read within [`BODY_TIMEOUT`]; unknown fields are refused by the request
//! types themselves (`deny_unknown_fields`). Package uploads do not come through here.

use std::{borrow::Cow, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::{FromRequest, FromRequestParts, Request},
    http::{HeaderMap, Method, StatusCode, header, request::Parts},
};
use http_body_util::BodyExt as _;
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;
use windlass_store::Revision;

use super::problem::Problem;
use crate::service::{Caller, PageRequest};

/// Largest JSON body.
pub(crate) const BODY_MAX_BYTES: usize = 1024 * 1024;
/// So much of a refused body is taken and dropped.
const REST_MAX_BYTES: usize = 64 * 1024 * 1024;
/// For so long.
const REST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a JSON body may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Who asks, put there by the gate; with the idempotency record of the request.
impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        // The gate lets no request to `/v1` pass without; this is for a route that would stand elsewhere.
        parts.extensions.get::<Self>().cloned().ok_or_else(|| {
            Problem::new(
                StatusCode::UNAUTHORIZED,
                "token_missing",
                "the request has no token",
            )
        })
    }
}

/// Parameters of the path.
pub(crate) struct Path<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        axum::extract::Path::<T>::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Path(value)| Self(value))
            .map_err(|rejection| {
                Problem::bad_request("path_invalid", cut(&rejection.body_text()))
                    .field("path")
                    .mend("use an id as the API gave it")
            })
    }
}

/// Parameters of the query.
pub(crate) struct Query<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        axum::extract::Query::<T>::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Query(value)| Self(value))
            .map_err(|rejection| {
                let text = rejection.body_text();
                let text = text
                    .rsplit_once("query string: ")
                    .map_or(&*text, |(_, rest)| rest);
                let problem = match (unknown_field(text), missing_field(text)) {
                    (Some(field), _) => {
                        Problem::bad_request("unknown_parameter", cut(text)).field(field)
                    }
                    (None, Some(field)) => {
                        let detail = format!("the parameter `{field}` is missing");
                        Problem::bad_request("missing_parameter", detail).field(field)
                    }
                    (None, None) => {
                        let field = text
                            .split_once(':')
                            .map(|(field, _)| field)
                            .filter(|field| is_name(field));
                        Problem::bad_request("parameter_invalid", cut(text))
                            .field(field.unwrap_or("query"))
                    }
                };
                problem.mend("look the parameters up in /openapi.json")
            })
    }
}

/// A JSON body.
pub(crate) struct Json<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        check_content_type(request.headers())?;
        let body = read_body(request.into_body()).await?;
        parse(&body).map(Self)
    }
}

fn check_content_type(headers: &HeaderMap) -> Result<(), Problem> {
    let found = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let essence = found.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(Problem::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "content_type_unsupported",
        format!(
            "the body's content type is `{}`, expected `application/json`",
            cut(found)
        ),
    )
    .field("Content-Type")
    .mend("send JSON, with `Content-Type: application/json`"))
}

/// Takes what is still coming of a body that is refused, so that its sender gets to read why instead of a connection that
/// breaks under its writes. Bounded: one that sends more than [`REST_MAX_BYTES`], or longer than [`REST_TIMEOUT`], is cut off.
/// Not for a sender that asked first (`Expect: 100-continue`): taking its body would tell it to send.
pub(super) async fn read_rest(body: &mut Body) {
    let rest = async {
        let mut read = 0;
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.data_ref().map_or(0, Bytes::len);
            if read > REST_MAX_BYTES {
                break;
            }
        }
    };
    let _cut_off_when_elapsed = tokio::time::timeout(REST_TIMEOUT, rest).await;
}

/// A whole body of at most [`BODY_MAX_BYTES`].
pub(crate) async fn read_body(body: Body) -> Result<Bytes, Problem> {
    let read = axum::body::to_bytes(body, BODY_MAX_BYTES);
    match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(error)) => {
            use std::error::Error as _;
            if error
                .source()
                .is_some_and(|source| source.is::<http_body_util::LengthLimitError>())
            {
                Err(Problem::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "body_too_large",
                    format!("the body is larger than {BODY_MAX_BYTES} bytes"),
                )
                .field("body")
                .limit(BODY_MAX_BYTES as u64, BODY_MAX_BYTES as u64 + 1)
                .mend("send a smaller body; files belong into a package"))
            } else {
                Err(
                    Problem::bad_request("body_truncated", "the body ended before it was complete")
                        .field("body")
                        .mend("send it again"),
                )
            }
        }
        Err(_) => Err(Problem::new(
            StatusCode::REQUEST_TIMEOUT,
            "body_timeout",
            format!("the body took longer than {} s", BODY_TIMEOUT.as_secs()),
        )
        .field("body")
        .mend("send it faster")),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let within = || culprit::<T>(&serde_json::from_slice(body).ok()?);
        refused(error, within)
    })?;
    reader.end().map_err(|_| {
        Problem::bad_request(
            "body_malformed",
            "there is something behind the JSON value of the body",
        )
        .field("body")
        .mend("send one JSON value")
    })?;
    Ok(value)
}

/// A part of a body that was read as JSON already.
pub(crate) fn read<T: DeserializeOwned>(json: serde_json::Value) -> Result<T, Problem> {
    serde_path_to_error::deserialize(&json).map_err(|error| refused(error, || culprit::<T>(&json)))
}

/// The same where serde passes over fields that it does not know: beside the tag of a variant without fields of its own. What
/// was read says which fields there are. Fields that are `null` say nothing.
pub(crate) fn read_whole<T: DeserializeOwned + serde::Serialize>(
    json: serde_json::Value,
) -> Result<T, Problem> {
    let value: T = read(json.clone())?;
    let known = serde_json::to_value(&value).expect("requests have string keys");
    let mut path = Vec::new();
    if let Some(unknown) = unread(&json, &known, &mut path) {
        return Err(Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "unknown_field",
            format!("unknown field `{}`", cut(&unknown)),
        )
        .field(pointer(&path))
        .mend("leave it out, or correct its name"));
    }
    Ok(value)
}

/// The first field of `asked` that `known` does not have, with its path.
fn unread(
    asked: &serde_json::Value,
    known: &serde_json::Value,
    path: &mut Vec<String>,
) -> Option<String> {
    use serde_json::Value;
    let below: Vec<(String, &Value, Option<&Value>)> = match (asked, known) {
        (Value::Object(asked), Value::Object(known)) => asked
            .iter()
            .map(|(name, value)| (name.clone(), value, known.get(name)))
            .collect(),
        (Value::Array(asked), Value::Array(known)) => asked
            .iter()
            .zip(known)
            .enumerate()
            .map(|(at, (value, known))| (at.to_string(), value, Some(known)))
            .collect(),
        _ => return None,
    };
    for (name, value, known) in below {
        path.push(name.clone());
        match known {
            None if !value.is_null() => return Some(name),
            None => {}
            Some(known) => {
                if let Some(unknown) = unread(value, known, path) {
                    return Some(unknown);
                }
            }
        }
        path.pop();
    }
    None
}

/// The field whose value cannot be read, where the reader did not say: types that are told apart by one of their fields, the
/// tag, are read in one piece, and an error in them names no field. It is the field without which nothing is wrong, or
/// something else; the tag, when it is none of the others.
fn culprit<T: DeserializeOwned>(json: &serde_json::Value) -> Option<String> {
    /// No type of the API has more.
    const MAX_FIELDS: usize = 32;
    let fields = json.as_object().filter(|all| all.len() <= MAX_FIELDS)?;
    // What is wrong with an object of these fields: nothing, or the field that it misses.
    let wrong = |fields| match T::deserialize(serde_json::Value::Object(fields)) {
        Ok(_) => None,
        Err(error) => Some(missing_field(&error.to_string()).map(str::to_owned)),
    };
    let tag = wrong(serde_json::Map::new()).flatten();
    let is_culprit = |name: &&String| {
        let mut rest = fields.clone();
        rest.remove(*name);
        wrong(rest).is_none_or(|missing| missing.as_ref() == Some(*name))
    };
    let others = fields.keys().filter(|name| Some(*name) != tag.as_ref());
    let found = others.clone().find(is_culprit);
    found
        .or_else(|| tag.as_ref().filter(|tag| fields.contains_key(*tag)))
        .cloned()
}

/// What is wrong with a body, and in which field; `within` finds the field of a value that names none.
fn refused(
    error: serde_path_to_error::Error<serde_json::Error>,
    within: impl FnOnce() -> Option<String>,
) -> Problem {
    let mut path = error
        .path()
        .iter()
        .filter_map(|segment| match segment {
            Segment::Seq { index } => Some(index.to_string()),
            Segment::Map { key } => Some(key.clone()),
            Segment::Enum { variant } => Some(variant.clone()),
            Segment::Unknown => None,
        })
        .collect::<Vec<_>>();
    let error = error.into_inner();
    let text = error.to_string();
    if !error.is_data() {
        return Problem::bad_request(
            "body_malformed",
            format!("the body is not JSON: {}", cut(&text)),
        )
        .field("body")
        .mend("send well-formed JSON");
    }
    // The field says where; the place in the text would only be there where the body was read in one piece.
    let text = text
        .rsplit_once(" at line ")
        .map_or(&*text, |(text, _)| text);
    let text = &*in_terms_of_json(text);
    let problem = |code| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, code, cut(text));
    match (unknown_field(text), missing_field(text)) {
        // The path of an unknown field ends with it already, or says nothing where fields were flattened.
        (Some(unknown), _) => {
            if path.is_empty() {
                path.push(unknown.to_owned());
            }
            problem("unknown_field")
                .field(pointer(&path))
                .mend("leave it out, or correct its name")
        }
        (None, Some(missing)) => {
            path.push(missing.to_owned());
            problem("missing_field")
                .field(pointer(&path))
                .mend("give it")
        }
        (None, None) => {
            if path.is_empty() {
                path.push(within().unwrap_or_else(|| "body".to_owned()));
            }
            problem("invalid_value")
                .field(pointer(&path))
                .mend("look the field up in /openapi.json")
        }
    }
}

/// A field of the body itself by its name; one further down as a JSON pointer, as services name it.
fn pointer(path: &[String]) -> String {
    match path {
        [field] => field.clone(),
        path => path.iter().flat_map(|segment| ["/", segment]).collect(),
    }
}

/// A message without the names of our own types: `expected struct NewApp` is an object to whoever sent the body.
fn in_terms_of_json(text: &str) -> Cow<'_, str> {
    const OWN: [&str; 4] = [
        "struct ",
        "internally tagged enum ",
        "adjacently tagged enum ",
        "enum ",
    ];
    const NUMBERS: [(&str, &str); 5] = [
        ("u8", "a whole number from 0 to 255"),
        ("u16", "a whole number from 0 to 65,535"),
        ("u32", "a whole number from 0 to 4,294,967,295"),
        ("u64", "a whole number from 0 on"),
        ("usize", "a whole number from 0 on"),
    ];
    let Some((found, expected)) = text.split_once("expected ") else {
        return Cow::Borrowed(text);
    };
    if let Some((_, number)) = NUMBERS.iter().find(|(own, _)| *own == expected) {
        return Cow::Owned(format!("{found}expected {number}"));
    }
    if found.contains("unit variant") {
        return Cow::Borrowed(
            "a name alone is not enough: expected an object with that name as its field",
        );
    }
    if !OWN.iter().any(|own| expected.starts_with(own)) {
        return Cow::Borrowed(text);
    }
    // A list that is too short was taken for the fields of an object.
    if found.starts_with("invalid length") {
        return Cow::Borrowed("invalid type: sequence, expected an object");
    }
    Cow::Owned(format!("{found}expected an object"))
}

fn unknown_field(text: &str) -> Option<&str> {
    text.split_once("unknown field `")?
        .1
        .split_once('`')
        .map(|(name, _)| name)
}

fn missing_field(text: &str) -> Option<&str> {
    text.split_once("missing field `")?
        .1
        .split_once('`')
        .map(|(name, _)| name)
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

fn cut(text: &str) -> String {
    text.chars().take(500).collect()
}

/// The revision that `If-Match` names; absent or `*`: any. Optional on every update (the change is then made whatever the
/// current revision is). Only strong ETags as the API gives them: `"17"`.
pub(crate) struct IfMatch(pub(crate) Option<Revision>);

impl<S: Send + Sync> FromRequestParts<S> for IfMatch {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let Some(value) = parts.headers.get(header::IF_MATCH) else {
            return Ok(Self(None));
        };
        let text = value.to_str().unwrap_or_default().trim();
        if text == "*" {
            return Ok(Self(None));
        }
        text.strip_prefix('"')
            .and_then(|text| text.strip_suffix('"'))
            .and_then(|text| text.parse().ok())
            .map(|revision| Self(Some(Revision(revision))))
            .ok_or_else(|| {
                Problem::bad_request(
                    "if_match_invalid",
                    format!("`{}` is not an ETag of this API", cut(text)),
                )
                .field("If-Match")
                .mend("send the ETag as it was given, for example `\"17\"`")
            })
    }
}

/// Sizes of a list's pages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageLimits {
    /// Unless asked otherwise.
    pub(crate) default: usize,
    /// At most.
    pub(crate) max: usize,
}

/// The page that a query asks for.
pub(crate) fn page_of(
    size: Option<usize>,
    cursor: Option<String>,
    limits: PageLimits,
) -> Result<PageRequest, Problem> {
    let size = size.unwrap_or(limits.default);
    if size == 0 || size > limits.max {
        return Err(Problem::bad_request(
            "out_of_limit",
            format!(
                "a page of this list has 1 to {} entries, {size} were asked for",
                limits.max
            ),
        )
        .field("page_size")
        .limit(limits.max as u64, size as u64)
        .mend("ask for fewer entries and follow the cursor"));
    }
    Ok(PageRequest { size, cursor })
}

/// Whether requests of this method change something.
pub(crate) fn is_write(method: &Method) -> bool {
    method == Method::POST
        || method == Method::PUT
        || method == Method::PATCH
        || method == Method::DELETE
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;
    use windlass_domain::order::Action;

    use super::{Problem, parse, read};

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Wanted {
        #[expect(dead_code, reason = "only read")]
        name: String,
        #[expect(dead_code, reason = "only read")]
        size: u32,
    }

    fn said(problem: &Problem) -> (String, String) {
        let said = serde_json::to_value(problem).expect("a problem is JSON");
        let text = |name: &str| said[name].as_str().unwrap_or_default().to_owned();
        (text("field"), text("detail"))
    }

    #[test]
    fn the_field_of_a_type_that_is_read_in_one_piece_is_named() {
        for (action, field) in [
            (json!({ "action": "retry", "node": "x" }), "node"),
            (
                json!({ "action": "lock", "node": 1, "reason": 7 }),
                "reason",
            ),
            (
                json!({ "action": "retry", "node": 1, "colour": 1 }),
                "colour",
            ),
            (json!({ "action": "retry" }), "node"),
            (json!({ "action": "explode" }), "action"),
            (json!({ "node": 1 }), "action"),
        ] {
            let problem = read::<Action>(action.clone()).expect_err("refused");
            assert_eq!(said(&problem).0, field, "{action}");
            let body = serde_json::to_vec(&action).expect("JSON");
            let problem = parse::<Action>(&body).expect_err("refused");
            assert_eq!(said(&problem).0, field, "{action}");
        }
    }

    #[test]
    fn no_type_of_ours_is_named() {
        for body in ["[]", "7", "null", "\"text\""] {
            let problem = parse::<Wanted>(body.as_bytes()).expect_err("refused");
            let (field, detail) = said(&problem);
            assert_eq!(field, "body", "{body}");
            assert!(detail.ends_with("expected an object"), "{body}: {detail}");
        }
    }
}
