//! The flow that a process template gives a release or operation.

use std::collections::BTreeMap;

use windlass_domain::{
    flow::FlowStep,
    id::TemplateId,
    plan::Read,
    template::{self, TemplateKind},
    workspace::Workspace,
};

use super::{
    Planner, ServiceError,
    faults::invalid,
    reads::{read_template, template_subject},
};

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
