//! The calls of the kit: one ordinary run serves several rules, the others break one thing at a time.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use windlass_domain::plugin::PluginKind;

use super::{
    Examination, Expected, Finding, FixtureAnswer, FixtureHost, Rule, SETS, Sample, Severity,
    answers, fitting_parameters, fixture, generate, ordinary_request, request, request_with,
};
use crate::{call::Export, diagnostic::Host, error::CallError, json::JsonCall, plugin::Plugin};

/// Servers of a large request.
const MANY_SERVERS: usize = 500;

/// One examination that runs.
pub(super) struct Kit {
    pub(super) plugin: Plugin,
    pub(super) examination: Examination,
    /// Parameters that fit.
    pub(super) sets: Vec<Value>,
    /// What the platform answers in ordinary calls of a diagnostic.
    pub(super) fixture: Vec<FixtureAnswer>,
}

impl Kit {
    /// Functions beside `describe`.
    fn exports(&self) -> impl Iterator<Item = Export> + use<> {
        Export::of_kind(self.plugin.kind())
            .iter()
            .copied()
            .filter(|export| *export != Export::Describe)
    }

    fn is_diagnostic(&self) -> bool {
        self.plugin.kind() == PluginKind::Diagnostic
    }

    async fn call(&mut self, export: Export, input: &Value) -> Result<JsonCall, CallError> {
        let host = fixture::host(&self.fixture);
        self.call_with(export, input, host).await
    }

    async fn call_with(
        &mut self,
        export: Export,
        input: &Value,
        host: Arc<dyn Host>,
    ) -> Result<JsonCall, CallError> {
        self.examination.calls += 1;
        let host = self.is_diagnostic().then_some(host);
        self.plugin.call_json(export, input, host).await
    }

    pub(super) fn make_sets(&mut self, samples: &[Sample]) {
        self.sets = samples
            .iter()
            .filter_map(|sample| sample.input.get("parameters"))
            .filter(|set| self.plugin.validate_parameters(set).is_ok())
            .cloned()
            .collect();
        self.sets.extend(fitting_parameters(&self.plugin, SETS));
        self.sets.dedup();
    }

    /// Parameters, determinism and answers: one run of calls serves all three.
    pub(super) async fn ordinary_calls(&mut self) {
        let (mut parameters, mut determinism, mut wrong) = (Vec::new(), Vec::new(), Vec::new());
        if self.sets.is_empty() {
            parameters.push(Finding::new(
                Rule::Parameters,
                Severity::Warning,
                "no parameters could be made that fit the schema: give the kit some, as samples or as `examples` in the schema",
            ));
        }
        let mut inputs: Vec<(Export, Value)> = Vec::new();
        for export in self.exports() {
            for set in self.sets.clone() {
                inputs.push((export, ordinary_request(export, &set, request::SERVERS)));
            }
            if let Some(set) = self.marked() {
                inputs.push((export, ordinary_request(export, &set, request::SERVERS)));
            }
        }
        let (here, elsewhere) = (self.plugin.clone(), self.plugin.elsewhere());
        for (export, input) in &inputs {
            let (export, first) = (*export, self.call(*export, input).await);
            self.plugin = elsewhere.clone();
            let second = self.call(export, input).await;
            self.plugin = here.clone();
            let (first, second) = match (first, second) {
                (Ok(first), Ok(second)) => (first, second),
                (Err(error), Ok(_) | Err(_)) | (Ok(_), Err(error)) => {
                    parameters.push(
                        Finding::new(
                            Rule::Parameters,
                            Severity::Failed,
                            error.failure.to_string(),
                        )
                        .of_call(export, input),
                    );
                    continue;
                }
            };
            self.note(&first);
            if (&first.output, failure_code(&first)) != (&second.output, failure_code(&second)) {
                determinism.push(
                    Finding::new(
                        Rule::Determinism,
                        Severity::Failed,
                        "two calls with one request got two answers: an answer must depend on the request alone, not on time, chance or earlier calls",
                    )
                    .of_call(export, input),
                );
            }
            match (&first.output, &first.failure) {
                (Some(answer), _) => {
                    for text in answers::faults(export, self.plugin.descriptor(), input, answer) {
                        wrong.push(
                            Finding::new(Rule::Answers, Severity::Failed, text)
                                .of_call(export, input),
                        );
                    }
                }
                (None, Some(failure)) if failure.code == REFUSED => {
                    if failure.message.contains("(invalid-parameter)") {
                        parameters.push(
                            Finding::new(
                                Rule::Parameters,
                                Severity::Warning,
                                format!(
                                    "its schema allows these parameters, and it refuses them: {}",
                                    failure.message
                                ),
                            )
                            .of_call(export, input),
                        );
                    }
                }
                (None, Some(failure)) => parameters.push(
                    Finding::new(
                        Rule::Parameters,
                        Severity::Failed,
                        format!("{}: {}", failure.code, failure.message),
                    )
                    .of_call(export, input),
                ),
                (None, None) => {}
            }
        }
        let tried = format!(
            "{} sets of parameters, {} requests",
            self.sets.len(),
            inputs.len()
        );
        self.examination.add(Rule::Parameters, &*tried, parameters);
        self.examination
            .add(Rule::Determinism, "each request twice", determinism);
        self.examination.add(Rule::Answers, "each answer", wrong);
    }

    /// The largest set, with a marker for every free text.
    fn marked(&self) -> Option<Value> {
        let schema = &self.plugin.descriptor().parameters;
        let largest = self.sets.iter().max_by_key(|set| set.to_string().len())?;
        let mut set = largest.clone();
        for (name, property) in schema["properties"].as_object()? {
            let is_free = property["type"] == "string"
                && ["enum", "const", "pattern", "format"]
                    .iter()
                    .all(|word| property.get(word).is_none());
            if is_free && let Some(value) = set.get_mut(name) {
                *value = json!(answers::MARKER);
            }
        }
        self.plugin.validate_parameters(&set).is_ok().then_some(set)
    }

    fn note(&mut self, call: &JsonCall) {
        let examination = &mut self.examination;
        examination.longest_guest_time_us =
            examination.longest_guest_time_us.max(call.guest_time_us);
        examination.peak_memory_bytes = examination.peak_memory_bytes.max(call.memory_bytes);
        let answer_bytes = call
            .output
            .as_ref()
            .map_or(0, |output| output.to_string().len() as u64);
        examination.largest_answer_bytes = examination.largest_answer_bytes.max(answer_bytes);
    }

    pub(super) async fn invalid_parameters(&mut self) {
        let Some(good) = self.sets.first().cloned() else {
            self.examination
                .skip(Rule::InvalidParameters, "no parameters are known that fit");
            return;
        };
        let mut findings = Vec::new();
        let mut refused_by_schema = 0;
        // What the schema itself takes is not invalid.
        let broken: Vec<_> = generate::broken(&self.plugin.descriptor().parameters, &good)
            .into_iter()
            .filter(|set| self.plugin.validate_parameters(&set.parameters).is_err())
            .collect();
        for export in self.exports() {
            // The parameters of these were checked when the order was planned, and they may ignore them.
            if matches!(export, Export::Rollback | Export::Judge | Export::Interpret) {
                continue;
            }
            for set in &broken {
                refused_by_schema += 1;
                let mut input = ordinary_request(export, &good, request::SERVERS);
                request::set_parameters(export, &mut input, set.parameters.clone());
                match self.call(export, &input).await {
                    Ok(JsonCall { failure: Some(failure), .. }) if failure.code != REFUSED => findings.push(
                        Finding::new(
                            Rule::InvalidParameters,
                            Severity::Warning,
                            format!("with {} it ends with {}: {}. A server refuses them before it calls; an error of its own would name the field", set.how, failure.code, failure.message),
                        )
                        .of_call(export, &input),
                    ),
                    Ok(JsonCall { output: Some(_), .. }) if set.how == "an unknown parameter" => findings.push(
                        Finding::new(
                            Rule::InvalidParameters,
                            Severity::Warning,
                            "with an unknown parameter it answers: its own check is weaker than its schema",
                        )
                        .of_call(export, &input),
                    ),
                    Ok(_) => {}
                    Err(error) => findings.push(
                        Finding::new(Rule::InvalidParameters, Severity::Failed, error.failure.to_string())
                            .of_call(export, &input),
                    ),
                }
            }
        }
        let tried = format!("{refused_by_schema} requests that the schema refuses");
        self.examination
            .add(Rule::InvalidParameters, tried, findings);
    }

    /// An ordinary request of the first function, with its answer.
    async fn ordinary(&mut self) -> Option<(Export, Value, JsonCall)> {
        let export = self.exports().next()?;
        for set in self.sets.clone() {
            let input = ordinary_request(export, &set, request::SERVERS);
            if let Ok(call) = self.call(export, &input).await
                && call.failure.is_none()
            {
                return Some((export, input, call));
            }
        }
        None
    }

    pub(super) async fn short_memory(&mut self) {
        let Some((export, input, good)) = self.ordinary().await else {
            self.examination
                .skip(Rule::Memory, "no request is known that it answers");
            return;
        };
        let mut findings = Vec::new();
        let mut denied = 0;
        let generous = self.plugin.clone();
        for percent in [10, 50, 90, 99] {
            let limit_bytes = good.memory_bytes.saturating_mul(percent) / 100;
            self.plugin = generous.constrained(Some(limit_bytes), None);
            let short = self.call(export, &input).await;
            self.plugin = generous.clone();
            match short {
                Ok(call) if failure_code(&call) == Some(MEMORY) => denied += 1,
                Ok(call) if call.output == good.output => {}
                Ok(call) => findings.push(
                    Finding::new(
                        Rule::Memory,
                        Severity::Failed,
                        format!(
                            "with {limit_bytes} of the {} bytes that it needs it ends with {}: a failed allocation must end the call",
                            good.memory_bytes,
                            failure_code(&call).unwrap_or("another answer")
                        ),
                    )
                    .of_call(export, &input),
                ),
                Err(error) => findings.push(Finding::new(Rule::Memory, Severity::Failed, error.failure.to_string())),
            }
        }
        findings.extend(self.undisturbed(Rule::Memory, export, &input, &good).await);
        self.examination.add(
            Rule::Memory,
            format!("4 limits below its peak, {denied} of them reached"),
            findings,
        );
    }

    pub(super) async fn no_time(&mut self) {
        let Some((export, input, good)) = self.ordinary().await else {
            self.examination
                .skip(Rule::Time, "no request is known that it answers");
            return;
        };
        let mut findings = Vec::new();
        let generous = self.plugin.clone();
        self.plugin = generous.constrained(None, Some(Duration::ZERO));
        let stopped = self.call(export, &input).await;
        self.plugin = generous;
        match stopped {
            Ok(call) if failure_code(&call) == Some(TIME) => {}
            Ok(call) => findings.push(
                Finding::new(
                    Rule::Time,
                    Severity::Failed,
                    format!(
                        "without time it ends with {}",
                        failure_code(&call).unwrap_or("an answer")
                    ),
                )
                .of_call(export, &input),
            ),
            Err(error) => findings.push(Finding::new(
                Rule::Time,
                Severity::Failed,
                error.failure.to_string(),
            )),
        }
        findings.extend(self.undisturbed(Rule::Time, export, &input, &good).await);
        self.examination.add(
            Rule::Time,
            "a call without any time, and one after it",
            findings,
        );
    }

    /// The call after a failed one: it must answer as before.
    async fn undisturbed(
        &mut self,
        rule: Rule,
        export: Export,
        input: &Value,
        good: &JsonCall,
    ) -> Option<Finding> {
        let again = self.call(export, input).await;
        let same = again.is_ok_and(|again| again.output == good.output);
        (!same).then(|| {
            Finding::new(
                rule,
                Severity::Failed,
                "the call after the one that failed answers something else",
            )
            .of_call(export, input)
        })
    }

    pub(super) async fn failing_host(&mut self) {
        if !self.is_diagnostic() {
            self.examination
                .skip(Rule::HostErrors, "only diagnostics call the host");
            return;
        }
        let Some(set) = self.sets.first().cloned() else {
            self.examination
                .skip(Rule::HostErrors, "no parameters are known that fit");
            return;
        };
        let mut findings = Vec::new();
        let export = Export::Diagnose;
        let input = ordinary_request(export, &set, request::SERVERS);
        let mut hosts: Vec<(String, bool, FixtureHost)> = Vec::new();
        for code in HOST_ERRORS {
            hosts.push((
                format!("every host call failing with `{code}`"),
                true,
                FixtureHost::failing(code),
            ));
        }
        for document in [
            json!({}),
            json!([]),
            json!(null),
            json!({ "data": null, "text": "" }),
            json!({ "data": [], "text": "?" }),
            json!("?"),
        ] {
            hosts.push((
                format!("every host call answering {document}"),
                false,
                FixtureHost::answering(document),
            ));
        }
        let looks = self
            .call(export, &input)
            .await
            .map_or(0, |call| call.host_calls.len());
        for look in 0..looks.min(50) {
            hosts.push((
                format!("host call {look} failing with `timeout`"),
                false,
                FixtureHost::with_fault(self.fixture.clone(), look, "timeout"),
            ));
        }
        let tried = hosts.len();
        for (what, nothing_answered, host) in hosts {
            let call = match self.call_with(export, &input, Arc::new(host)).await {
                Ok(call) => call,
                Err(error) => {
                    findings.push(
                        Finding::new(
                            Rule::HostErrors,
                            Severity::Failed,
                            error.failure.to_string(),
                        )
                        .of_call(export, &input),
                    );
                    continue;
                }
            };
            if let Some(failure) = call
                .failure
                .as_ref()
                .filter(|failure| failure.code != REFUSED)
            {
                findings.push(
                    Finding::new(
                        Rule::HostErrors,
                        Severity::Failed,
                        format!(
                            "with {what} it ends with {}: {}. Report the item as skipped",
                            failure.code, failure.message
                        ),
                    )
                    .of_call(export, &input),
                );
            }
            let reported = call
                .output
                .as_ref()
                .and_then(|output| output["report"]["findings"].as_array());
            let (true, Some(reported)) = (nothing_answered && looks > 0, reported) else {
                continue;
            };
            // An item that its parameters leave nothing to look at may be well: not a whole report.
            let fine: Vec<&str> = reported
                .iter()
                .filter(|finding| finding["state"] == "ok")
                .filter_map(|finding| finding["code"].as_str())
                .collect();
            let severity = if fine.len() == reported.len() {
                Severity::Failed
            } else {
                Severity::Warning
            };
            for code in fine {
                let text =
                    format!("with {what} it reports `{code}` as ok: what was not seen is skipped");
                findings
                    .push(Finding::new(Rule::HostErrors, severity, text).of_call(export, &input));
            }
        }
        self.examination.add(
            Rule::HostErrors,
            format!("{tried} platforms that fail, {looks} host calls"),
            findings,
        );
    }

    pub(super) async fn many_servers(&mut self) {
        let Some(set) = self.sets.first().cloned() else {
            self.examination
                .skip(Rule::Output, "no parameters are known that fit");
            return;
        };
        let mut findings = Vec::new();
        let mut largest = 0;
        for export in self.exports() {
            let mut input = ordinary_request(export, &set, MANY_SERVERS);
            if export == Export::Interpret {
                input["output"] = json!("a line of output\n".repeat(24 * 1024 / 17));
            }
            match self.call(export, &input).await {
                Ok(call) => {
                    largest = largest.max(
                        call.output
                            .as_ref()
                            .map_or(0, |output| output.to_string().len()),
                    );
                    if let Some(failure) = call
                        .failure
                        .as_ref()
                        .filter(|failure| failure.code != REFUSED)
                    {
                        findings.push(Finding::new(
                            Rule::Output,
                            Severity::Failed,
                            format!("a large request of `{export}` ({MANY_SERVERS} servers) ends with {}: {}", failure.code, failure.message),
                        ));
                    } else if let Some(answer) = &call.output {
                        for text in
                            answers::faults(export, self.plugin.descriptor(), &input, answer)
                                .into_iter()
                                .take(3)
                        {
                            findings.push(Finding::new(
                                Rule::Output,
                                Severity::Failed,
                                format!("{MANY_SERVERS} servers: {text}"),
                            ));
                        }
                    }
                }
                Err(error) => findings.push(Finding::new(
                    Rule::Output,
                    Severity::Failed,
                    error.failure.to_string(),
                )),
            }
        }
        self.examination.add(
            Rule::Output,
            format!("{MANY_SERVERS} servers; the largest answer has {largest} bytes"),
            findings,
        );
    }

    pub(super) async fn samples(&mut self, samples: &[Sample]) {
        if samples.is_empty() {
            self.examination.skip(Rule::Samples, "there are none");
            return;
        }
        let mut findings = Vec::new();
        for sample in samples {
            let input = request_with(sample.export, &sample.input);
            let call = self
                .call_with(sample.export, &input, fixture::host(&sample.fixture))
                .await;
            let fault = match call {
                Err(error) => Some(error.failure.to_string()),
                Ok(call) => {
                    self.note(&call);
                    unexpected(&call, sample.expect.as_ref())
                }
            };
            if let Some(text) = fault {
                findings.push(
                    Finding::new(
                        Rule::Samples,
                        Severity::Failed,
                        format!("{}: {text}", sample.name),
                    )
                    .of_call(sample.export, &input),
                );
            }
        }
        self.examination.add(
            Rule::Samples,
            format!("{} samples", samples.len()),
            findings,
        );
    }
}

/// How a call differs from what its author expects.
fn unexpected(call: &JsonCall, expected: Option<&Expected>) -> Option<String> {
    let failure = call.failure.as_ref();
    match (expected, &call.output) {
        (Some(Expected::Output(wanted)), Some(output)) if fixture::holds(output, wanted) => None,
        (Some(Expected::Output(wanted)), Some(output)) => {
            Some(format!("expected at least {wanted}, got {output}"))
        }
        (Some(Expected::Failure(code)), _)
            if failure.is_some_and(|failure| failure.code == *code) =>
        {
            None
        }
        (Some(Expected::Failure(code)), Some(output)) => {
            Some(format!("expected the failure `{code}`, got {output}"))
        }
        (None, Some(_)) => None,
        (None, None) if failure.is_some_and(|failure| failure.code == REFUSED) => None,
        (_, None) => Some(failure.map_or_else(
            || "it gave no answer".to_owned(),
            |failure| format!("{}: {}", failure.code, failure.message),
        )),
    }
}

fn failure_code(call: &JsonCall) -> Option<&str> {
    call.failure.as_ref().map(|failure| failure.code.as_str())
}

/// Codes of [`crate::CallFailure`] that rules ask for; a test holds them in place.
const REFUSED: &str = "plugin_refused";
const MEMORY: &str = "plugin_memory_limit";
const TIME: &str = "plugin_time_limit";
/// What a host answers when it cannot.
const HOST_ERRORS: [&str; 5] = [
    "unsupported",
    "not-found",
    "denied",
    "timeout",
    "limit-exceeded",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::CallFailure;

    #[test]
    fn the_codes_are_those_of_the_runtime() {
        let refused = CallFailure::Refused {
            code: "x".into(),
            message: "m".into(),
            field: None,
        };
        assert_eq!(refused.code(), REFUSED);
        assert_eq!(CallFailure::Memory { limit_bytes: 0 }.code(), MEMORY);
        assert_eq!(CallFailure::GuestTime { limit_ms: 0 }.code(), TIME);
        assert_eq!(refused.report().message, "m (x)");
    }
}
