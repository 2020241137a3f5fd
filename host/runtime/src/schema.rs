//! Parameters' schemas: JSON Schema 2020-12, small, self-contained, matched in linear time.
//!
//! A schema is written by whoever wrote the plugin, and its patterns run on the host: so patterns that need backtracking
//! are refused when the plugin is loaded, and nothing is ever fetched.

use jsonschema::{Draft, PatternOptions, Validator};
use serde_json::Value;

use crate::error::{FieldError, Rejection, RejectionCode};

/// Errors reported for one set of parameters.
const MAX_FIELD_ERRORS: usize = 20;
/// Memory of one compiled pattern.
const PATTERN_BYTES: usize = 1024 * 1024;

/// A schema that was checked, ready to be used.
#[derive(Debug)]
pub(crate) struct Schema {
    pub(crate) document: Value,
    validator: Validator,
}

impl Schema {
    pub(crate) fn parse(text: &str, limit_bytes: usize) -> Result<Self, Rejection> {
        if text.len() > limit_bytes {
            return Err(Rejection::new(
                RejectionCode::SchemaTooLarge,
                format!(
                    "the parameters' schema has {} bytes, the limit is {limit_bytes}",
                    text.len()
                ),
            ));
        }
        let invalid = |reason: String| {
            Rejection::new(
                RejectionCode::SchemaInvalid,
                format!("the parameters' schema is not JSON Schema 2020-12: {reason}"),
            )
        };
        let document: Value =
            serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?;
        if !document.is_object() {
            return Err(invalid("it must be an object".into()));
        }
        if let Some(draft) = document.get("$schema")
            && draft.as_str().map(|uri| uri.trim_end_matches('#'))
                != Some("https://json-schema.org/draft/2020-12/schema")
        {
            return Err(invalid(format!("`$schema` is {draft}")));
        }
        look_through(&document, "")?;
        let validator = options()
            .build(&document)
            .map_err(|error| invalid(error.to_string()))?;
        Ok(Self {
            document,
            validator,
        })
    }

    pub(crate) fn validate(&self, parameters: &Value) -> Result<(), Vec<FieldError>> {
        let errors: Vec<FieldError> = self
            .validator
            .iter_errors(parameters)
            .take(MAX_FIELD_ERRORS)
            .map(|error| FieldError {
                field: error.instance_path().to_string(),
                message: cut(&error.to_string(), 300),
            })
            .collect();
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors)
        }
    }
}

fn options() -> jsonschema::ValidationOptions<'static> {
    jsonschema::options()
        .with_draft(Draft::Draft202012)
        .with_pattern_options(PatternOptions::regex().size_limit(PATTERN_BYTES))
}

fn cut(text: &str, characters: usize) -> String {
    text.chars().take(characters).collect()
}

/// Refuses references to other documents and patterns that are not linear. `at` is the JSON pointer, for the message.
fn look_through(value: &Value, at: &str) -> Result<(), Rejection> {
    match value {
        Value::Object(object) => {
            for (key, child) in object {
                let here = format!("{at}/{key}");
                match (key.as_str(), child) {
                    ("$ref" | "$dynamicRef", Value::String(target)) if !target.starts_with('#') => {
                        return Err(Rejection::new(
                            RejectionCode::SchemaRemoteReference,
                            format!(
                                "the parameters' schema refers to another document at `{here}`: `{}`; only references that start with `#` are allowed",
                                cut(target, 100)
                            ),
                        ));
                    }
                    ("$id", Value::String(_)) => {
                        return Err(Rejection::new(
                            RejectionCode::SchemaRemoteReference,
                            format!(
                                "the parameters' schema has an identifier at `{here}`: leave `$id` out, references are local"
                            ),
                        ));
                    }
                    ("pattern", Value::String(pattern)) => check_pattern(pattern, &here)?,
                    ("patternProperties", Value::Object(patterns)) => {
                        for pattern in patterns.keys() {
                            check_pattern(pattern, &here)?;
                        }
                    }
                    _ => {}
                }
                // Texts under these keys are data, not schema.
                if !matches!(key.as_str(), "const" | "enum" | "default" | "examples") {
                    look_through(child, &here)?;
                }
            }
            Ok(())
        }
        Value::Array(items) => items
            .iter()
            .enumerate()
            .try_for_each(|(index, item)| look_through(item, &format!("{at}/{index}"))),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(()),
    }
}

fn check_pattern(pattern: &str, at: &str) -> Result<(), Rejection> {
    options()
        .build(&serde_json::json!({ "pattern": pattern }))
        .map(drop)
        .map_err(|_| {
            Rejection::new(
                RejectionCode::SchemaRegex,
                format!(
                    "the pattern at `{at}` of the parameters' schema cannot be matched in linear time (look-around, \
                     back-references and very large repetitions are not allowed): `{}`",
                    cut(pattern, 100)
                ),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(schema: &str) -> Result<(), RejectionCode> {
        Schema::parse(schema, 64 * 1024)
            .map(drop)
            .map_err(|rejection| rejection.code)
    }

    #[test]
    fn each_fault_has_its_code() {
        for (schema, expect) in [
            ("{", RejectionCode::SchemaInvalid),
            ("true", RejectionCode::SchemaInvalid),
            (r#"{"type":"strin"}"#, RejectionCode::SchemaInvalid),
            (
                r#"{"$schema":"http://json-schema.org/draft-04/schema#"}"#,
                RejectionCode::SchemaInvalid,
            ),
            (
                r#"{"properties":{"a":{"$ref":"https://example.com/a.json"}}}"#,
                RejectionCode::SchemaRemoteReference,
            ),
            (
                r#"{"properties":{"a":{"$ref":"file:///etc/passwd"}}}"#,
                RejectionCode::SchemaRemoteReference,
            ),
            (
                r#"{"$id":"https://example.com/","$defs":{}}"#,
                RejectionCode::SchemaRemoteReference,
            ),
            (
                r#"{"properties":{"a":{"pattern":"(?=a)b"}}}"#,
                RejectionCode::SchemaRegex,
            ),
            (
                r#"{"properties":{"a":{"pattern":"(a)\\1"}}}"#,
                RejectionCode::SchemaRegex,
            ),
            (
                r#"{"patternProperties":{"((a{999}){999}){999}":{}}}"#,
                RejectionCode::SchemaRegex,
            ),
        ] {
            assert_eq!(code(schema), Err(expect), "{schema}");
        }
        assert_eq!(
            code(&format!("{{\"title\":\"{}\"}}", "a".repeat(70_000))),
            Err(RejectionCode::SchemaTooLarge)
        );
    }

    #[test]
    fn a_pattern_that_explodes_elsewhere_is_linear_here() {
        let schema = Schema::parse(
            r#"{"properties":{"a":{"type":"string","pattern":"^(a+)+$"}}}"#,
            1000,
        )
        .unwrap();
        let bomb = format!("{}!", "a".repeat(50_000));
        assert!(schema.validate(&serde_json::json!({ "a": bomb })).is_err());
    }

    #[test]
    fn errors_name_the_field() {
        let schema = Schema::parse(
            r##"{"type":"object","additionalProperties":false,
                "properties":{"port":{"$ref":"#/$defs/port"}},
                "$defs":{"port":{"type":"integer","maximum":65535}}}"##,
            1000,
        )
        .unwrap();
        assert!(schema.validate(&serde_json::json!({ "port": 80 })).is_ok());
        let errors = schema
            .validate(&serde_json::json!({ "port": 70000, "x": 1 }))
            .unwrap_err();
        assert!(
            errors
                .iter()
                .any(|error| error.field == "/port" && error.message.contains("65535")),
            "{errors:?}"
        );
        assert!(
            errors.iter().any(|error| error.message.contains('x')),
            "{errors:?}"
        );
    }
}
