//! Values that may be secret.
//!
//! A [`Value`] is plain text or a *reference* to a secret by its name. Plans, inboxes, journals, previews and logs hold
//! references only; the gateway resolves one while it pushes a task to the agent. Source: design, "Data", "Secrets are a type".

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Plain text, or the name of a secret. JSON: `{"plain": "text"}` or `{"secret_ref": "name"}`; a bare string is read as plain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    /// Text that anybody who may see the resource may see.
    Plain(String),
    /// The name of a secret of the workspace; the secret itself is never in this type.
    SecretRef(String),
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case", deny_unknown_fields)]
        enum Tagged {
            Plain(String),
            SecretRef(String),
        }
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "expected a string, {\"plain\": …} or {\"secret_ref\": …}"
        )]
        enum Form {
            Bare(String),
            Tagged(Tagged),
        }
        Ok(match Form::deserialize(deserializer)? {
            Form::Bare(text) | Form::Tagged(Tagged::Plain(text)) => Self::Plain(text),
            Form::Tagged(Tagged::SecretRef(name)) => Self::SecretRef(name),
        })
    }
}

/// Environment variables of a script or application: name → value.
pub type Environment = BTreeMap<String, Value>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_forms_are_read() {
        for (json, expect) in [
            ("\"a\"", Value::Plain("a".into())),
            ("{\"plain\":\"a\"}", Value::Plain("a".into())),
            ("{\"secret_ref\":\"a\"}", Value::SecretRef("a".into())),
        ] {
            assert_eq!(serde_json::from_str::<Value>(json).unwrap(), expect);
        }
        for json in [
            "1",
            "{}",
            "{\"plain\":\"a\",\"secret_ref\":\"b\"}",
            "{\"other\":\"a\"}",
        ] {
            assert!(serde_json::from_str::<Value>(json).is_err(), "{json}");
        }
    }
}
