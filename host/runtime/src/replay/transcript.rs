//! A platform that answers from a transcript instead of looking.
//!
//! Answers come in the order of the transcript. A call that is another one than recorded, or one too many, is a
//! [`HostCallDifference`], and is answered with the error `not-found`: the guest goes on, as it would on a platform that does
//! not know what it asks for. Later calls are compared with the place that follows.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::json;

use crate::{
    diagnostic::{
        Attributes, Connection, Endpoint, Host, HostError, MetricRange, ProbeAnswer, Sample,
    },
    state::HostCall,
};

/// A host call that was not the recorded one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostCallDifference {
    /// Place in the order of the calls, from 0.
    pub index: usize,
    /// The recorded function; `None`: nothing is recorded here.
    pub expected_function: Option<String>,
    /// The recorded arguments.
    pub expected_arguments: Option<serde_json::Value>,
    /// The function that was called; `None`: the guest ended without this call.
    pub function: Option<String>,
    /// Its arguments.
    pub arguments: Option<serde_json::Value>,
}

/// Answers the host calls of a diagnostic from a transcript, in order.
#[derive(Debug, Default)]
pub struct Transcript {
    calls: Vec<HostCall>,
    played: Mutex<Played>,
}

#[derive(Debug, Default)]
struct Played {
    next: usize,
    differences: Vec<HostCallDifference>,
}

impl Transcript {
    /// Of recorded calls, or of ones that an author wrote.
    #[must_use]
    pub fn new(calls: Vec<HostCall>) -> Self {
        Self {
            calls,
            played: Mutex::default(),
        }
    }

    /// What differed; to be asked when the guest has ended. Recorded calls that were not made are among it.
    #[must_use]
    pub fn differences(&self) -> Vec<HostCallDifference> {
        let played = self.played.lock().unwrap_or_else(PoisonError::into_inner);
        let mut differences = played.differences.clone();
        differences.extend(self.calls.iter().enumerate().skip(played.next).map(
            |(index, missing)| HostCallDifference {
                index,
                expected_function: Some(missing.function.clone()),
                expected_arguments: Some(missing.arguments.clone()),
                function: None,
                arguments: None,
            },
        ));
        differences
    }

    fn answer<T: DeserializeOwned>(
        &self,
        function: &str,
        arguments: serde_json::Value,
    ) -> Result<T, HostError> {
        let mut played = self.played.lock().unwrap_or_else(PoisonError::into_inner);
        let index = played.next;
        played.next += 1;
        let recorded = self.calls.get(index);
        if let Some(recorded) =
            recorded.filter(|call| call.function == function && call.arguments == arguments)
        {
            return answer_of(recorded);
        }
        let told = match recorded {
            Some(recorded) => format!(
                "host call {index} is `{function}` {arguments}; the transcript has `{}` {}",
                recorded.function, recorded.arguments
            ),
            None => format!(
                "host call {index} is `{function}` {arguments}; the transcript has {} calls",
                self.calls.len()
            ),
        };
        played.differences.push(HostCallDifference {
            index,
            expected_function: recorded.map(|call| call.function.clone()),
            expected_arguments: recorded.map(|call| call.arguments.clone()),
            function: Some(function.to_owned()),
            arguments: Some(arguments),
        });
        Err(HostError::new("not-found", told))
    }
}

/// `{"ok": …}` or `{"error": {"code": …, "message": …}}`.
fn answer_of<T: DeserializeOwned>(call: &HostCall) -> Result<T, HostError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Answer<T> {
        Ok(T),
        Error(HostError),
    }
    match serde_json::from_value(call.answer.clone()) {
        Ok(Answer::Ok(answer)) => Ok(answer),
        Ok(Answer::Error(error)) => Err(error),
        Err(error) => Err(HostError::new(
            "internal",
            format!(
                "the transcript's answer of `{}` cannot be used: {error}",
                call.function
            ),
        )),
    }
}

#[async_trait::async_trait]
impl Host for Transcript {
    async fn available(&self, server: &str) -> Result<Vec<String>, HostError> {
        self.answer("probes.available", json!({ "server": server }))
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
            json!({ "server": server, "probe": probe, "arguments": arguments, "timeout_ms": timeout_ms }),
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
            json!({ "from_server": from_server, "to": to, "timeout_ms": timeout_ms }),
        )
    }

    async fn read(&self, kind: &str, id: &str) -> Result<serde_json::Value, HostError> {
        self.answer("resources.read", json!({ "kind": kind, "id": id }))
    }

    async fn find(
        &self,
        kind: &str,
        filters: &Attributes,
        limit: u32,
    ) -> Result<Vec<String>, HostError> {
        self.answer(
            "resources.find",
            json!({ "kind": kind, "filters": filters, "limit": limit }),
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
            json!({ "kind": kind, "id": id, "metric": metric, "range": range }),
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
            json!({ "order": order, "node": node, "max_bytes": max_bytes }),
        )
    }
}
