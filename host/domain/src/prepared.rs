//! What a server was prepared for: what the phases prepare and install of a tech stack amount to on it.
//!
//! A release records it in the manifest, and a later one that would do the same leaves both phases out: the tech stack is
//! "installed from cache". The same means the same bytes of the stack's plugin, the same steps as its parameters rendered
//! them, and the same environment, without the platform's own variables, which name the release.
//! Source: spec "Release orders".

use std::collections::BTreeMap;

use crate::{
    digest::Digest,
    dispatch,
    name::RESERVED_ENV_PREFIX,
    plan::{NodeIndex, NodeKind, Part, Plan, StepTemplate},
    plugin::{Phase, StackStep},
    progress::{NodeState, Progress},
    value::{Environment, Value},
};

/// Whether a step prepares the server, and not the release.
#[must_use]
pub const fn prepares(step: &StackStep) -> bool {
    match step.phase {
        Phase::Prepare | Phase::Install => true,
        Phase::Configure
        | Phase::Stop
        | Phase::Deploy
        | Phase::Start
        | Phase::Check
        | Phase::Restart
        | Phase::Uninstall => false,
    }
}

/// What all servers of an application have in common; `None`: there is nothing to prepare.
#[must_use]
pub fn common(part: &Part) -> Option<Digest> {
    let stack = part.stack.as_ref()?;
    (!part.prepare.is_empty()).then(|| Digest::of_json(&(&stack.digest, &part.prepare)))
}

/// What one server is prepared for. `env` is what differs on it.
#[must_use]
pub fn on_server(common: Digest, part: &Part, env: &Environment) -> Digest {
    Digest::of_json(&(common, peoples(part, env)))
}

/// An application's environment on a server as people gave it: without the platform's own variables. `env` is what differs on
/// the server.
pub(crate) fn peoples<'a>(part: &'a Part, env: &'a Environment) -> BTreeMap<&'a str, &'a Value> {
    part.env
        .iter()
        .chain(env)
        .filter(|(name, _)| !name.starts_with(RESERVED_ENV_PREFIX))
        .map(|(name, value)| (name.as_str(), value))
        .collect()
}

/// What a server is prepared for once the unit at this node has come to its activation; `None` where a step of it did not
/// succeed, or was not in the plan: then the next release prepares it again.
#[must_use]
pub fn after(plan: &Plan, progress: &Progress, unit: NodeIndex) -> Option<Digest> {
    let (node, _, of) = dispatch::unit_of(plan, unit)?;
    if of.prepared.is_some() {
        return of.prepared;
    }
    let part = plan.part_of(of)?;
    let done = progress.children(node).iter().filter(|leaf| {
        let NodeKind::Step { step } = plan.nodes[**leaf as usize].kind else {
            return false;
        };
        let prepares = match plan.steps.get(step as usize) {
            Some(StepTemplate::Stack(step)) => prepares(step),
            Some(
                StepTemplate::Fetch
                | StepTemplate::Unpack
                | StepTemplate::Activate
                | StepTemplate::PlaceFiles(_)
                | StepTemplate::Script(_),
            )
            | None => false,
        };
        prepares && progress.state(**leaf) == NodeState::Succeeded
    });
    if done.count() < part.prepare.len() {
        return None;
    }
    common(part).map(|common| on_server(common, part, &of.env))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        expand::{
            PlanInput, expand,
            fixture::{all_at_once, env, input, installed},
        },
        order::Control,
        progress::NodeProgress,
    };

    /// Servers 1 and 2 of `shop`; the first was prepared for what this input says.
    fn cached() -> PlanInput {
        let mut input = input();
        let part = &mut input.parts[0];
        part.from_cache = true;
        part.part.prepare = part
            .steps
            .steps
            .iter()
            .filter(|step| prepares(step))
            .cloned()
            .collect();
        let mut before = installed();
        before.prepared = Some(on_server(
            common(&part.part).unwrap(),
            &part.part,
            &part.servers[0].env,
        ));
        part.servers[0].installed = Some(before);
        input
    }

    /// The steps of a unit that prepare its server.
    fn prepared(plan: &Plan, unit: NodeIndex) -> Vec<NodeIndex> {
        let of = |node: &NodeIndex| plan.nodes[*node as usize].parent == Some(unit);
        let named = |node: &NodeIndex| {
            ["directories", "users", "runtime"].contains(&&*plan.nodes[*node as usize].name)
        };
        let nodes = 0..u32::try_from(plan.nodes.len()).unwrap();
        nodes.filter(of).filter(named).collect()
    }

    fn units(plan: &Plan) -> Vec<NodeIndex> {
        (0u32..)
            .zip(&plan.nodes)
            .filter(|(_, node)| matches!(node.kind, NodeKind::Unit { .. }))
            .map(|(index, _)| index)
            .collect()
    }

    #[test]
    fn a_server_that_was_prepared_for_the_same_is_not_prepared_again() {
        type Change = fn(&mut PlanInput);
        let changes: [(&str, Change, usize); 8] = [
            ("nothing", |_| {}, 0),
            (
                "another release",
                |input| {
                    let name = "WINDLASS_PACKAGE_VERSION";
                    input.parts[0].part.env.extend(env(&[(name, "2")]));
                },
                0,
            ),
            (
                "not from cache",
                |input| input.parts[0].from_cache = false,
                3,
            ),
            (
                "another stack",
                |input| {
                    let stack = input.parts[0].part.stack.as_mut().unwrap();
                    stack.digest = Digest::of(b"another");
                },
                3,
            ),
            (
                "other steps",
                |input| {
                    input.parts[0].part.prepare[0].timeout_ms += 1;
                },
                3,
            ),
            (
                "the order's environment",
                |input| {
                    input.parts[0].part.env.extend(env(&[("A", "b")]));
                },
                3,
            ),
            (
                "the server's environment",
                |input| {
                    input.parts[0].servers[0].env.extend(env(&[("A", "b")]));
                },
                3,
            ),
            (
                "never installed",
                |input| input.parts[0].servers[0].installed = None,
                3,
            ),
        ];
        for (what, change, steps) in changes {
            let mut input = cached();
            change(&mut input);
            let plan = expand(input, &all_at_once()).unwrap();
            let units = units(&plan);
            assert_eq!(prepared(&plan, units[0]).len(), steps, "{what}");
            assert_eq!(plan.units[0].prepared.is_some(), steps == 0, "{what}");
            // The other server never was.
            assert_eq!(prepared(&plan, units[1]).len(), 3, "{what}");
            assert_eq!(plan.units[1].prepared, None, "{what}");
        }
    }

    #[test]
    fn a_server_is_prepared_when_every_step_of_it_succeeded() {
        let input = cached();
        let before = input.parts[0].servers[0]
            .installed
            .as_ref()
            .unwrap()
            .prepared;
        let plan = expand(input, &all_at_once()).unwrap();
        let units = units(&plan);
        let steps = prepared(&plan, units[1]);
        let with = |states: &[NodeState]| {
            let rows = steps.iter().zip(states).map(|(node, state)| {
                let row = NodeProgress {
                    state: *state,
                    ..NodeProgress::default()
                };
                (*node, row)
            });
            Progress::load(&plan, Control::Active, false, rows)
        };
        use NodeState::{Ignored, Succeeded};
        let all = with(&[Succeeded; 3]);
        // Both servers have the same environment.
        assert_eq!(after(&plan, &all, units[1]), before);
        assert_eq!(
            after(&plan, &all, steps[0]),
            before,
            "asked by a step of it"
        );
        let ignored = with(&[Succeeded, Ignored, Succeeded]);
        assert_eq!(after(&plan, &ignored, units[1]), None);
        // What its turn leaves out stays as it was.
        assert_eq!(after(&plan, &with(&[]), units[0]), before);

        let mut none = cached();
        none.parts[0].part.prepare.clear();
        let plan = expand(none, &all_at_once()).unwrap();
        let progress = Progress::load(&plan, Control::Active, false, []);
        assert_eq!(
            after(&plan, &progress, units[1]),
            None,
            "nothing to prepare"
        );
    }
}
