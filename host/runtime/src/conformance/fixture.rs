//! A platform that answers from a fixture: what an author wrote, or what the kit injects.
//!
//! A fixture is a list of answers: `function` (`probes.run`), the `arguments` that must be among a call's own, and `answer`,
//! `{"ok": …}` or `{"error": {"code", "message"}}`. The first entry that fits answers, as often as it is asked. What nothing
//! fits is answered with `otherwise`.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::diagnostic::{
    Attributes, Connection, Endpoint, Host, HostError, MetricRange, ProbeAnswer, Sample,
};

/// One answer of a fixture. Recorded host calls can be read as such: what they have more is not looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FixtureAnswer {
    /// The host function: `probes.available`, `probes.run`, `probes.connect`, `resources.read`, `resources.find`,
    /// `resources.metrics`, `resources.order-log`.
    pub function: String,
    /// Arguments that a call must have; others are not looked at.
    #[serde(default)]
    pub arguments: Value,
    /// What it answers.
    pub answer: Answer,
}

/// An answer of the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// What the function gives.
    Ok(Value),
    /// Why it gives nothing.
    Error(HostError),
}

/// A host that answers from a fixture.
#[derive(Debug)]
pub struct FixtureHost {
    answers: Vec<FixtureAnswer>,
    otherwise: Answer,
    /// The call, from 0, that is answered with an error instead.
    fault: Option<(usize, HostError)>,
    asked: Mutex<usize>,
}

impl FixtureHost {
    /// Answers from a fixture, and `unsupported` for everything else.
    #[must_use]
    pub fn new(answers: Vec<FixtureAnswer>) -> Self {
        Self {
            answers,
            otherwise: Answer::Error(HostError::new(
                "unsupported",
                "the fixture has no answer for this call",
            )),
            fault: None,
            asked: Mutex::default(),
        }
    }

    /// Answers every call with the same error.
    pub(crate) fn failing(code: &str) -> Self {
        Self {
            otherwise: Answer::Error(HostError::new(code, format!("injected: {code}"))),
            ..Self::new(Vec::new())
        }
    }

    /// Answers every call with this document, where it fits the function.
    pub(crate) fn answering(document: Value) -> Self {
        Self {
            otherwise: Answer::Ok(document),
            ..Self::new(Vec::new())
        }
    }

    /// As the fixture says, but one call fails.
    pub(crate) fn with_fault(answers: Vec<FixtureAnswer>, call: usize, code: &str) -> Self {
        Self {
            fault: Some((call, HostError::new(code, format!("injected: {code}")))),
            ..Self::new(answers)
        }
    }

    fn answer<T: DeserializeOwned>(
        &self,
        function: &str,
        arguments: &Value,
    ) -> Result<T, HostError> {
        let index = {
            let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            let index = *asked;
            *asked += 1;
            index
        };
        if let Some((call, error)) = &self.fault
            && *call == index
        {
            return Err(error.clone());
        }
        let answer = self
            .answers
            .iter()
            .find(|entry| entry.function == function && holds(arguments, &entry.arguments))
            .map_or(&self.otherwise, |entry| &entry.answer);
        match answer {
            Answer::Error(error) => Err(error.clone()),
            Answer::Ok(document) => serde_json::from_value(document.clone()).map_err(|error| {
                HostError::new(
                    "internal",
                    format!("the fixture's answer does not fit `{function}`: {error}"),
                )
            }),
        }
    }
}

/// Whether a document has everything that another one has: fields of objects, places of lists.
pub(crate) fn holds(document: &Value, wanted: &Value) -> bool {
    match (document, wanted) {
        (_, Value::Null) => true,
        (Value::Object(have), Value::Object(wanted)) => wanted.iter().all(|(name, value)| {
            have.get(name)
                .is_some_and(|own| own == value || holds_strictly(own, value))
        }),
        (Value::Array(have), Value::Array(wanted)) => {
            have.len() >= wanted.len()
                && have
                    .iter()
                    .zip(wanted)
                    .all(|(own, value)| holds_strictly(own, value))
        }
        (have, wanted) => have == wanted,
    }
}

/// The same, where `null` wants `null`.
fn holds_strictly(document: &Value, wanted: &Value) -> bool {
    if wanted.is_null() {
        document.is_null()
    } else {
        holds(document, wanted)
    }
}

#[async_trait::async_trait]
impl Host for FixtureHost {
    async fn available(&self, server: &str) -> Result<Vec<String>, HostError> {
        self.answer("probes.available", &json!({ "server": server }))
    }

    async fn run(
        &self,
        server: &str,
        probe: &str,
        arguments: &Attributes,
        timeout_ms: u64,
    ) -> Result<ProbeAnswer, HostError> {
        self.answer(
            "probes.run",
            &json!({ "server": server, "probe": probe, "arguments": arguments, "timeout_ms": timeout_ms }),
        )
    }

    async fn connect(
        &self,
        from_server: &str,
        to: &Endpoint,
        timeout_ms: u64,
    ) -> Result<Connection, HostError> {
        self.answer(
            "probes.connect",
            &json!({ "from_server": from_server, "to": to, "timeout_ms": timeout_ms }),
        )
    }

    async fn read(&self, kind: &str, id: &str) -> Result<Value, HostError> {
        self.answer("resources.read", &json!({ "kind": kind, "id": id }))
    }

    async fn find(
        &self,
        kind: &str,
        filters: &Attributes,
        limit: u32,
    ) -> Result<Vec<String>, HostError> {
        self.answer(
            "resources.find",
            &json!({ "kind": kind, "filters": filters, "limit": limit }),
        )
    }

    async fn metrics(
        &self,
        kind: &str,
        id: &str,
        metric: &str,
        range: MetricRange,
    ) -> Result<Vec<Sample>, HostError> {
        self.answer(
            "resources.metrics",
            &json!({ "kind": kind, "id": id, "metric": metric, "range": range }),
        )
    }

    async fn order_log(
        &self,
        order: &str,
        node: Option<u32>,
        max_bytes: u32,
    ) -> Result<String, HostError> {
        self.answer(
            "resources.order-log",
            &json!({ "order": order, "node": node, "max_bytes": max_bytes }),
        )
    }
}

/// A fresh host for each call: faults count from its first.
pub(crate) fn host(answers: &[FixtureAnswer]) -> Arc<dyn Host> {
    Arc::new(FixtureHost::new(answers.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_enough_and_a_difference_is_not() {
        for (document, wanted, expect) in [
            (json!({"a":1,"b":[1,2]}), json!({"a":1}), true),
            (json!({"a":1,"b":[1,2]}), json!({"b":[1]}), true),
            (json!({"a":{"x":1,"y":2}}), json!({"a":{"y":2}}), true),
            (json!({"a":1}), Value::Null, true),
            (json!({"a":1}), json!({"a":null}), false),
            (json!({"a":1}), json!({"c":1}), false),
            (json!({"b":[1]}), json!({"b":[1,2]}), false),
            (json!("x"), json!("y"), false),
        ] {
            assert_eq!(holds(&document, &wanted), expect, "{document} {wanted}");
        }
    }
}
