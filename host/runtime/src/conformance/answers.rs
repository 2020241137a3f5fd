//! What the answers of each kind must keep to, beyond their shape: the rules that the core would refuse an order for.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use windlass_domain::plugin::{
    CommandRequest, Descriptor, LifecyclePlan, LifecycleRequest, RenderedCommand, Report,
    StrategyNodeKind, StrategyPlan, StrategyRequest,
};

use crate::call::Export;

/// A parameter's text that is looked for in scripts.
pub(crate) const MARKER: &str = "windlass-conformance-marker";
/// What is said where it is found.
const IN_SCRIPT: &str = "holds a parameter in its script's text: values belong into the environment, where quotes in them stay data";

/// Whether a script's text was put together with a parameter. A parameter that is the whole script is one.
fn is_in_script(text: &str) -> bool {
    text.contains(MARKER) && text.trim() != MARKER
}

/// What is wrong with an answer; empty: nothing. A user that the parameters name is the choice of who gave them.
pub(crate) fn faults(
    export: Export,
    descriptor: &Descriptor,
    request: &Value,
    answer: &Value,
) -> Vec<String> {
    match export {
        Export::Lifecycle => both(request, answer, |request, plan| {
            lifecycle(descriptor, request, plan)
        }),
        Export::Plan => both(request, answer, strategy),
        Export::Render => both(request, answer, |request, command| {
            rendered(descriptor, request, command)
        }),
        Export::Diagnose => both(request, &answer["report"], |_: &Value, report| {
            diagnosis(descriptor, report)
        }),
        Export::Describe | Export::Rollback | Export::Judge | Export::Interpret => Vec::new(),
    }
}

fn both<Request, Answer>(
    request: &Value,
    answer: &Value,
    check: impl FnOnce(&Request, &Answer) -> Vec<String>,
) -> Vec<String>
where
    Request: serde::de::DeserializeOwned,
    Answer: serde::de::DeserializeOwned,
{
    // Both were made of these types: what cannot be read is not judged here.
    match (
        serde_json::from_value(request.clone()),
        serde_json::from_value(answer.clone()),
    ) {
        (Ok(request), Ok(answer)) => check(&request, &answer),
        (Ok(_) | Err(_), Ok(_) | Err(_)) => Vec::new(),
    }
}

fn is_name(name: &str) -> bool {
    (1..=60).contains(&name.chars().count())
}

fn user_fault(
    descriptor: &Descriptor,
    parameters: &Value,
    what: &str,
    user: Option<&String>,
) -> Option<String> {
    user.filter(|user| !descriptor.wishes.users.contains(user) && !names(parameters, user))
        .map(|user| format!("{what} runs as `{user}`, which the descriptor does not wish for"))
}

/// Whether a text stands somewhere in the parameters.
fn names(parameters: &Value, text: &str) -> bool {
    match parameters {
        Value::String(own) => own == text,
        Value::Array(items) => items.iter().any(|item| names(item, text)),
        Value::Object(fields) => fields.values().any(|value| names(value, text)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

fn lifecycle(
    descriptor: &Descriptor,
    request: &LifecycleRequest,
    plan: &LifecyclePlan,
) -> Vec<String> {
    let mut faults = Vec::new();
    let mut names = BTreeSet::new();
    for step in &plan.steps {
        let what = format!("step `{}` of {:?}", step.name, step.phase);
        if !request.phases.contains(&step.phase) {
            faults.push(format!("{what} belongs to a phase that was not asked for"));
        }
        if !is_name(&step.name) {
            faults.push(format!(
                "{what} has a name without or with more than 60 characters"
            ));
        }
        if !names.insert((step.phase, step.name.clone())) {
            faults.push(format!("{what} stands there twice"));
        }
        if step.timeout_ms == 0 {
            faults.push(format!("{what} has no time: its time-out is 0"));
        }
        if step.retries > 0 && !step.repeatable {
            faults.push(format!("{what} is to be tried again and is not repeatable"));
        }
        faults.extend(user_fault(
            descriptor,
            &request.parameters,
            &what,
            step.run_as.as_ref(),
        ));
        if let windlass_domain::plugin::StackAction::Script(script) = &step.action
            && is_in_script(&script.text)
        {
            faults.push(format!("{what} {IN_SCRIPT}"));
        }
    }
    let known: BTreeSet<_> = request
        .servers
        .iter()
        .map(|server| server.id.as_str())
        .collect();
    for server in plan
        .server_env
        .keys()
        .filter(|server| !known.contains(server.as_str()))
    {
        faults.push(format!(
            "environment for `{server}`, which is no server of the request"
        ));
    }
    faults
}

fn strategy(request: &StrategyRequest, plan: &StrategyPlan) -> Vec<String> {
    let mut faults = Vec::new();
    let mut wanted: BTreeMap<(&str, &str), usize> = request
        .applications
        .iter()
        .flat_map(|app| {
            app.servers
                .iter()
                .map(move |server| ((app.key.as_str(), server.id.as_str()), 0))
        })
        .collect();
    for (index, node) in plan.nodes.iter().enumerate() {
        if node.parent.is_some_and(|parent| parent as usize >= index) {
            faults.push(format!("node {index} stands before its parent"));
        }
        if !is_name(&node.name) {
            faults.push(format!(
                "node {index} has a name without or with more than 60 characters"
            ));
        }
        if let StrategyNodeKind::Unit(unit) = &node.kind {
            match wanted.get_mut(&(unit.application.as_str(), unit.server.as_str())) {
                Some(times) => *times += 1,
                None => faults.push(format!(
                    "node {index} releases `{}` on `{}`, which the request does not have",
                    unit.application, unit.server
                )),
            }
        }
    }
    for ((application, server), times) in wanted {
        if times > 1 {
            faults.push(format!(
                "`{application}` on `{server}` is released {times} times"
            ));
        }
    }
    faults
}

fn rendered(
    descriptor: &Descriptor,
    request: &CommandRequest,
    command: &RenderedCommand,
) -> Vec<String> {
    let user = command.run_as.as_ref();
    let mut faults: Vec<String> = user_fault(descriptor, &request.parameters, "the command", user)
        .into_iter()
        .collect();
    if is_in_script(&command.script.text) {
        faults.push(format!("the command {IN_SCRIPT}"));
    }
    if !(10_000..=86_400_000).contains(&command.timeout_ms) {
        faults.push(format!(
            "the time-out is {} ms: 10 s to 24 h are allowed",
            command.timeout_ms
        ));
    }
    faults
}

fn diagnosis(descriptor: &Descriptor, report: &Report) -> Vec<String> {
    let mut faults = Vec::new();
    let mut seen = BTreeSet::new();
    for finding in &report.findings {
        if !descriptor
            .items
            .iter()
            .any(|item| item.code == finding.code)
        {
            faults.push(format!(
                "the report has the item `{}`, which the descriptor does not name",
                finding.code
            ));
        }
        if !seen.insert(&finding.code) {
            faults.push(format!("the report has the item `{}` twice", finding.code));
        }
    }
    faults
}
