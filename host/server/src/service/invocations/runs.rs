//! What an order's progress says of an invocation: each server's run, and what its command is asked about it.

use std::collections::BTreeMap;

use windlass_domain::{
    invocation::{self, InvocationSpec, Run, RunState},
    plan::{NodeKind, Plan, StepTemplate},
    plugin::{CommandOutcome, CommandRun, ServerFacts},
    progress::Progress,
    server::Server,
    task::{Outcome, TaskResult},
};

/// What a command may know of a server.
pub(super) fn facts(server: &Server) -> ServerFacts {
    let (os, os_version) = server
        .facts
        .os
        .split_once(' ')
        .unwrap_or((&server.facts.os, ""));
    ServerFacts {
        id: server.id.to_string(),
        name: server.name.to_string(),
        os: os.to_owned(),
        os_version: os_version.to_owned(),
        arch: server.facts.arch.clone(),
        address: server.facts.addresses.first().cloned().unwrap_or_default(),
        cell: server
            .cell
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        variables: BTreeMap::new(),
    }
}

/// Each server of the plan with its state, and how its task ended.
pub(super) fn runs(
    plan: &Plan,
    progress: &Progress,
    order_ended: bool,
) -> Vec<(Run, Option<TaskResult>)> {
    let mut runs = Vec::with_capacity(plan.units.len());
    for (node, planned) in (0u32..).zip(&plan.nodes) {
        let NodeKind::Step { step } = planned.kind else {
            continue;
        };
        let unit = windlass_domain::dispatch::unit_of(plan, node).map(|(_, _, unit)| unit);
        let (Some(unit), Some(StepTemplate::Script(script))) =
            (unit, plan.steps.get(step as usize))
        else {
            continue;
        };
        let row = progress.node(node);
        let parent = planned.parent.map(|unit| progress.state(unit));
        let stopped_before = matches!(
            parent,
            Some(windlass_domain::progress::NodeState::Cancelled)
        );
        let state = invocation::run_state(row, order_ended || stopped_before);
        let result = row.result.clone();
        let ended = result.as_ref();
        runs.push((
            Run {
                server: unit.server,
                server_name: unit.server_name.clone(),
                state,
                timeout_ms: script.timeout_ms,
                run_as: script.run_as.clone(),
                exit_code: ended.and_then(|result| result.exit_code),
                output: ended
                    .map(|result| result.output.clone())
                    .unwrap_or_default(),
                dropped_bytes: ended.map_or(0, |result| result.dropped_bytes),
                error: invocation::run_error(state, ended),
                result: None,
                started_at: ended.and_then(|result| result.started_at),
                finished_at: ended.map(|result| result.finished_at),
            },
            result,
        ));
    }
    runs
}

/// What the command is asked about a run; `None`: there is nothing to interpret, since it never ran.
pub(super) fn asked(
    spec: &InvocationSpec,
    state: RunState,
    result: &TaskResult,
) -> Option<CommandRun> {
    let outcome = match (state, result.outcome) {
        (RunState::Finished, _) => CommandOutcome::Finished,
        (_, Outcome::TimedOut) => CommandOutcome::TimedOut,
        (RunState::Stopped, _) if result.started_at.is_some() => CommandOutcome::Stopped,
        (
            RunState::Pending
            | RunState::Running
            | RunState::Stopping
            | RunState::Stopped
            | RunState::Failed,
            _,
        ) => return None,
    };
    Some(CommandRun {
        parameters: spec.parameters.clone(),
        outcome,
        exit_code: result.exit_code,
        output: result.output.clone(),
        dropped_bytes: result.dropped_bytes,
    })
}
