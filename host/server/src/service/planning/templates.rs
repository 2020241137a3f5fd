//! The flow that a process template gives a release or operation.

use std::collections::BTreeMap;

use windlass_domain::{
    flow::FlowStep,
    id::TemplateId,
    plan::{Plan, Read},
    plugin::RestoreWeight,
    template::{self, TemplateKind},
    workspace::Workspace,
};

use super::{
    Planner, ServiceError,
    faults::invalid,
    reads::{read_template, template_subject},
};

/// A flow that moves no traffic cannot give the weights that a strategy plans: gray traffic would get all of it.
///
/// # Errors
/// `template_moves_no_traffic`.
pub(super) fn expect_traffic(plan: &Plan, flow: &[FlowStep]) -> Result<(), ServiceError> {
    if flow.contains(&FlowStep::Drain) || flow.contains(&FlowStep::Restore) {
        return Ok(());
    }
    let wanting = plan.units.iter().find(|unit| {
        let has_pools = plan
            .part_of(unit)
            .is_some_and(|part| !part.pools.is_empty());
        has_pools && unit.restore != RestoreWeight::Remembered
    });
    match wanting {
        None => Ok(()),
        Some(unit) => Err(invalid(
            "template_moves_no_traffic",
            "/template".to_owned(),
            format!(
                "the process template has neither `drain` nor `restore`, and the strategy plans another weight for {}: it would \
                 keep the one that it has",
                unit.server_name
            ),
            "use a template that moves traffic, or leave gray traffic and the weight override out",
        )),
    }
}

impl Planner {
    /// The flow of a template; `None` where none was asked for. It is read: a change of its steps is drift.
    pub(super) async fn flow(
        &self,
        workspace: &Workspace,
        wanted: Option<TemplateId>,
        kind: TemplateKind,
        reads: &mut BTreeMap<String, Read>,
    ) -> Result<Option<Vec<FlowStep>>, ServiceError> {
        let Some(id) = wanted else { return Ok(None) };
        let ws = workspace.name.as_str();
        let found = self.parts.templates.find(id).await?;
        let Some(found) = found.filter(|template| template.is_visible_in(ws)) else {
            return Err(invalid(
                "no_such_template",
                "/template".to_owned(),
                format!(
                    "there is no process template {id} that can be used in the workspace `{ws}`"
                ),
                "name one that the workspace's list of process templates shows",
            ));
        };
        if found.kind != kind {
            return Err(invalid(
                "template_of_other_kind",
                "/template".to_owned(),
                format!(
                    "the process template `{}` is for {}, and this is {}",
                    found.name,
                    found.kind.name(),
                    kind.name()
                ),
                "name a template of the same kind, or none for the fixed flow",
            ));
        }
        // It was checked when it was kept; a later version of the program may know better.
        template::check(kind, &found.steps).map_err(|bad| {
            invalid(
                "template_invalid",
                "/template".to_owned(),
                format!("the process template `{}`: {bad}", found.name),
                "mend the template",
            )
        })?;
        reads.insert(template_subject(id), read_template(&found));
        Ok(Some(found.steps))
    }
}
