//! Values that may be secret.
//!
//! A [`Value`] is plain text or a *reference* to a secret by its name. Plans, inboxes, journals, previews and logs hold
//! references only; the gateway resolves one while it pushes a task to the agent. Source: design, "Data", "Secrets are a type".

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::{
    PartialSchema as _,
    openapi::{
        Schema,
        schema::{ObjectBuilder, OneOfBuilder, Type},
    },
};

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

/// What is wrong with deployment parameters as text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadParameterText {
    /// A word is none.
    #[error(
        "line {line}: `{word}` has no `=`: write key=value, separated by blanks or new lines; give a value that holds \
         blanks as JSON, {{\"key\": \"a value\"}}"
    )]
    NoValue {
        /// Where, from 1.
        line: usize,
        /// What stands there, its first 60 characters.
        word: String,
    },
    /// A word has nothing before its `=`.
    #[error("line {line}: `{word}` has no key before its `=`")]
    NoKey {
        /// Where, from 1.
        line: usize,
        /// What stands there, its first 60 characters.
        word: String,
    },
    /// A key has two values.
    #[error("line {line}: `{key}` was given in line {first} already: give each key once")]
    Twice {
        /// Where, from 1.
        line: usize,
        /// The key.
        key: String,
        /// Where it stood before.
        first: usize,
    },
}

/// Reads deployment parameters as text: `key=value`, separated by blanks or new lines. What stands behind the first `=` is
/// the value, which may be empty. Keys are checked where all parameters are. Source: spec "Release orders".
///
/// # Errors
/// [`BadParameterText`] names the line.
pub fn parameters_of_text(text: &str) -> Result<Environment, BadParameterText> {
    let mut found: BTreeMap<String, (usize, Value)> = BTreeMap::new();
    for (line, words) in (1..).zip(text.lines()) {
        for word in words.split_whitespace() {
            let shown = || word.chars().take(60).collect();
            let (key, value) = word.split_once('=').ok_or_else(|| {
                let word = shown();
                BadParameterText::NoValue { line, word }
            })?;
            if key.is_empty() {
                let word = shown();
                return Err(BadParameterText::NoKey { line, word });
            }
            if let Some((first, _)) = found.get(key) {
                return Err(BadParameterText::Twice {
                    line,
                    key: key.to_owned(),
                    first: *first,
                });
            }
            found.insert(key.to_owned(), (line, Value::Plain(value.to_owned())));
        }
    }
    Ok(found
        .into_iter()
        .map(|(key, (_, value))| (key, value))
        .collect())
}

/// Reads deployment parameters, given as an object or as text.
pub(crate) fn deserialize_parameters<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Environment, D::Error> {
    struct Form;

    impl<'de> de::Visitor<'de> for Form {
        type Value = Environment;

        fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            formatter.write_str("an object of names and values, or a text of `key=value`")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Environment, E> {
            parameters_of_text(text).map_err(E::custom)
        }

        fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Environment, A::Error> {
            Environment::deserialize(de::value::MapAccessDeserializer::new(map))
        }
    }

    deserializer.deserialize_any(Form)
}

/// How the API describes them.
pub(crate) fn parameters_schema() -> Schema {
    let text = ObjectBuilder::new()
        .schema_type(Type::String)
        .description(Some(
            "`key=value`, separated by blanks or new lines. What stands behind the first `=` is the value.",
        ));
    let named = ObjectBuilder::new()
        .schema_type(Type::Object)
        .additional_properties(Some(Value::schema()));
    OneOfBuilder::new()
        .description(Some(
            "Deployment parameters: names and values that become environment, as an object or as text. An application's own \
             stand above those of all. Names that no shell knows (`a.b`) reach programs, not scripts.",
        ))
        .item(named)
        .item(text)
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_from_text() {
        let plain = |pairs: &[(&str, &str)]| -> Environment {
            let pairs = pairs.iter();
            pairs
                .map(|(key, value)| ((*key).to_owned(), Value::Plain((*value).to_owned())))
                .collect()
        };
        for (text, expect) in [
            ("", &[][..]),
            (" \n\t\r\n", &[]),
            ("a=1", &[("a", "1")]),
            ("a=1 b.c-d_e=2", &[("a", "1"), ("b.c-d_e", "2")]),
            ("\n a=1\r\n\tb=x=y= \n", &[("a", "1"), ("b", "x=y=")]),
            ("a=", &[("a", "")]),
            ("a=\"x\"", &[("a", "\"x\"")]),
        ] {
            assert_eq!(parameters_of_text(text), Ok(plain(expect)), "{text:?}");
        }
        for (text, expect) in [
            ("a=1\nb c=2", "line 2: `b` has no `=`: write key=value"),
            ("a=1\n\nd=1 =2", "line 3: `=2` has no key"),
            ("a=1 b=1\n a=1", "line 2: `a` was given in line 1 already"),
            (
                &"x".repeat(100),
                &format!("line 1: `{}` has", "x".repeat(60)),
            ),
        ] {
            let error = parameters_of_text(text).unwrap_err().to_string();
            assert!(error.starts_with(expect), "{text:?}: {error}");
        }
    }

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
