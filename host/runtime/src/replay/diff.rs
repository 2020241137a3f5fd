//! What differs between two JSON documents: places as JSON pointers, with both values.
//!
//! Arrays are compared place by place; where they differ in length only, the longer one's rest is added or removed. Bounded:
//! the first differences are kept, all are counted.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Differences kept of one comparison.
pub const MAX_DIFFERENCES: usize = 50;
/// Bytes of one value that are kept: of larger ones the start, as text.
const MAX_VALUE_BYTES: usize = 2048;

/// One place where two documents differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Difference {
    /// JSON pointer of the place; empty: the whole.
    pub pointer: String,
    /// What happened to it.
    pub change: Change,
    /// Its value before; `null` when it was added. Values above 2 KiB are cut, as text.
    pub before: Option<Value>,
    /// Its value now; `null` when it was removed.
    pub after: Option<Value>,
}

/// What happened to a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It is there now.
    Added,
    /// It is gone.
    Removed,
    /// It has another value.
    Changed,
}

/// The differences of two documents.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Differences {
    /// How many places differ.
    pub count: usize,
    /// The first of them, at most [`MAX_DIFFERENCES`], in the order of the document.
    pub first: Vec<Difference>,
}

/// Compares two documents.
#[must_use]
pub fn compare(before: &Value, after: &Value) -> Differences {
    let mut differences = Differences::default();
    walk(&mut String::new(), before, after, &mut differences);
    differences
}

fn walk(pointer: &mut String, before: &Value, after: &Value, found: &mut Differences) {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            for (key, old) in before {
                below(pointer, key, |pointer| match after.get(key) {
                    Some(new) => walk(pointer, old, new, found),
                    None => found.add(pointer, Some(old), None),
                });
            }
            for (key, new) in after {
                if !before.contains_key(key) {
                    below(pointer, key, |pointer| found.add(pointer, None, Some(new)));
                }
            }
        }
        (Value::Array(before), Value::Array(after)) => {
            for index in 0..before.len().max(after.len()) {
                below(pointer, &index.to_string(), |pointer| {
                    match (before.get(index), after.get(index)) {
                        (Some(old), Some(new)) => walk(pointer, old, new, found),
                        (old, new) => found.add(pointer, old, new),
                    }
                });
            }
        }
        (before, after) => {
            if before != after {
                found.add(pointer, Some(before), Some(after));
            }
        }
    }
}

fn below(pointer: &mut String, key: &str, visit: impl FnOnce(&mut String)) {
    let length = pointer.len();
    pointer.push('/');
    pointer.push_str(&key.replace('~', "~0").replace('/', "~1"));
    visit(pointer);
    pointer.truncate(length);
}

impl Differences {
    /// Whether the documents are the same.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn add(&mut self, pointer: &str, before: Option<&Value>, after: Option<&Value>) {
        self.count += 1;
        if self.first.len() < MAX_DIFFERENCES {
            self.first.push(Difference {
                pointer: pointer.to_owned(),
                change: match (before, after) {
                    (None, _) => Change::Added,
                    (Some(_), None) => Change::Removed,
                    (Some(_), Some(_)) => Change::Changed,
                },
                before: before.map(cut),
                after: after.map(cut),
            });
        }
    }
}

fn cut(value: &Value) -> Value {
    let text = value.to_string();
    if text.len() <= MAX_VALUE_BYTES {
        return value.clone();
    }
    let start: String = text.chars().take(MAX_VALUE_BYTES / 4).collect();
    Value::String(format!("{start}… ({} bytes)", text.len()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn places_are_named_with_both_values() {
        for (before, after, expect) in [
            (json!({"a": 1}), json!({"a": 1}), vec![]),
            (json!(1), json!(2), vec![("", Change::Changed)]),
            (
                json!({"a": 1}),
                json!({"b": 1}),
                vec![("/a", Change::Removed), ("/b", Change::Added)],
            ),
            (
                json!({"steps": [{"name": "x"}, 2]}),
                json!({"steps": [{"name": "y"}]}),
                vec![
                    ("/steps/0/name", Change::Changed),
                    ("/steps/1", Change::Removed),
                ],
            ),
            (
                json!({"a/b~c": [1]}),
                json!({"a/b~c": [1, 2]}),
                vec![("/a~1b~0c/1", Change::Added)],
            ),
            (
                json!({"a": null}),
                json!({"a": [null]}),
                vec![("/a", Change::Changed)],
            ),
        ] {
            let found = compare(&before, &after);
            let places: Vec<_> = found
                .first
                .iter()
                .map(|difference| (difference.pointer.as_str(), difference.change))
                .collect();
            assert_eq!(places, expect, "{before} {after}");
            assert_eq!(found.count, expect.len());
        }
    }

    #[test]
    fn a_comparison_is_bounded() {
        let big = |byte: &str| Value::Array(vec![json!(byte.repeat(10_000)); 200]);
        let found = compare(&big("a"), &big("b"));
        assert_eq!((found.count, found.first.len()), (200, MAX_DIFFERENCES));
        assert!(serde_json::to_string(&found).unwrap().len() < 200_000);
    }
}
