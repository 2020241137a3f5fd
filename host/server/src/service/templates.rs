//! Process templates: kept for orders to be planned with. Source: spec "Process templates".
//!
//! Owns the records and who may change them: the workspace that a template was made in. Which steps make sense is the domain's;
//! what an order makes of them is the planner's. Orders keep the plan that they were made with, whatever becomes of a template.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use windlass_domain::{
    flow::FlowStep,
    id::TemplateId,
    name::{InvalidValue, TemplateName, check_length},
    template::{self, Grant, MAX_GRANTS, ProcessTemplate, TemplateKind, Visibility},
    workspace::Workspace,
};
use windlass_store::{Revision, Store};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    records::{self, Sort},
};
use crate::{
    clock, ids,
    keys::{self, Kind},
};

/// A process template as it is asked for. JSON: `{"name": "careful", "kind": "restart", "steps": [{"step": "drain"}, …]}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTemplate {
    /// Name: unique in the workspace.
    pub name: TemplateName,
    /// What it is for. Never changes.
    pub kind: TemplateKind,
    /// Where it can be used.
    #[serde(default)]
    pub visibility: Visibility,
    /// Description, at most 500 characters.
    #[serde(default)]
    pub description: String,
    /// The steps of each server's turn: standard steps of its kind, in the order of the fixed flow, each at most once, with
    /// scripts and waits for confirmation between them.
    pub steps: Vec<FlowStep>,
    /// Who may use it, by workspace. Kept for when there are roles: until then every token may.
    #[serde(default)]
    pub grants: Vec<Grant>,
}

/// Process templates. Cheap to clone.
#[derive(Clone)]
pub struct Templates {
    store: Arc<dyn Store>,
}

impl Templates {
    /// Over a store.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// One template, wherever it was made.
    ///
    /// # Errors
    /// [`ServiceError::Internal`].
    pub async fn find(&self, id: TemplateId) -> Result<Option<ProcessTemplate>, ServiceError> {
        let found = records::find::<ProcessTemplate>(&*self.store, &id.to_string()).await?;
        Ok(found.map(|(template, _)| template))
    }

    /// One template that can be used in a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when another workspace keeps it to itself.
    pub async fn get(
        &self,
        ws: &str,
        id: TemplateId,
    ) -> Result<(ProcessTemplate, Revision), ServiceError> {
        let (template, revision) =
            records::get::<ProcessTemplate>(&*self.store, &id.to_string()).await?;
        if template.is_visible_in(ws) {
            Ok((template, revision))
        } else {
            Err(ServiceError::not_found(Kind::Template.what(), id))
        }
    }

    /// A page of the templates that can be used in a workspace, oldest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn list(
        &self,
        ws: &str,
        kind: Option<TemplateKind>,
        page: PageRequest,
    ) -> Result<PageOf<(ProcessTemplate, Revision)>, ServiceError> {
        let store = &*self.store;
        records::get::<Workspace>(store, ws).await?;
        let wanted = |template: &ProcessTemplate| {
            template.is_visible_in(ws) && kind.is_none_or(|kind| kind == template.kind)
        };
        let prefix = keys::records(Kind::Template);
        records::list(store, &prefix, Sort::Rising, &page, wanted).await
    }

    /// Makes a template.
    ///
    /// # Errors
    /// `template_invalid`, with the step; `name_taken`; [`ServiceError::NotFound`] of the workspace.
    pub async fn create(
        &self,
        caller: Caller,
        ws: &str,
        request: CreateTemplate,
    ) -> Result<(ProcessTemplate, Revision), ServiceError> {
        check(&request)?;
        let store = &*self.store;
        let id = TemplateId::from_uuid(ids::new_uuid());
        records::change(store, &caller, || async {
            let (workspace, _) = records::get::<Workspace>(store, ws).await?;
            let name_key = keys::name_in_workspace(Kind::Template, ws, request.name.as_str());
            if records::indexed(store, &name_key).await?.is_some() {
                let name = request.name.as_str();
                return Err(ServiceError::taken(Kind::Template.what(), "name", name));
            }
            let at = clock::now();
            let CreateTemplate {
                name,
                kind,
                visibility,
                description,
                steps,
                grants,
            } = request.clone();
            let template = ProcessTemplate {
                schema: ProcessTemplate::SCHEMA,
                id,
                name,
                workspace: workspace.name,
                kind,
                visibility,
                description,
                steps,
                grants,
                created_by: caller.name.clone(),
                created_at: at,
                updated_at: at,
            };
            let text = id.to_string();
            let txn = records::create(&template)?
                .and(records::refer(Kind::Workspace, ws))
                .absent(name_key.clone())
                .put(name_key, text.clone())
                .put(keys::of_workspace(Kind::Template, ws, &text), "");
            Ok((txn, template))
        })
        .await
    }

    /// Replaces all of a template but its kind. Orders that were planned with it keep their plan; those that nobody has run are
    /// drifted when its steps have changed.
    ///
    /// # Errors
    /// `template_invalid`, `template_kind_immutable`, `template_of_other_workspace`, `name_taken`; [`ServiceError::NotFound`].
    pub async fn update(
        &self,
        caller: Caller,
        ws: &str,
        id: TemplateId,
        if_match: Option<Revision>,
        request: CreateTemplate,
    ) -> Result<(ProcessTemplate, Revision), ServiceError> {
        check(&request)?;
        let store = &*self.store;
        records::change(store, &caller, || async {
            let (mut template, revision) = self.own(ws, id).await?;
            records::check_revision::<ProcessTemplate>(if_match, revision)?;
            if template.kind != request.kind {
                return Err(ServiceError::conflict(
                    "template_kind_immutable",
                    format!(
                        "the process template `{}` is for {}, and that never changes",
                        template.name,
                        template.kind.name()
                    ),
                    "make another template",
                ));
            }
            let mut names = windlass_store::Txn::new();
            if template.name != request.name {
                let key = |name: &TemplateName| {
                    keys::name_in_workspace(Kind::Template, ws, name.as_str())
                };
                if records::indexed(store, &key(&request.name))
                    .await?
                    .is_some()
                {
                    let name = request.name.as_str();
                    return Err(ServiceError::taken(Kind::Template.what(), "name", name));
                }
                names = names
                    .delete(key(&template.name))
                    .absent(key(&request.name))
                    .put(key(&request.name), id.to_string());
            }
            let CreateTemplate {
                name,
                kind: _,
                visibility,
                description,
                steps,
                grants,
            } = request.clone();
            template.name = name;
            template.visibility = visibility;
            template.description = description;
            template.steps = steps;
            template.grants = grants;
            template.updated_at = clock::now();
            Ok((records::replace(&template, revision)?.and(names), template))
        })
        .await
    }

    /// Deletes a template; `confirm` is its name. Orders that were planned with it keep their plan.
    ///
    /// # Errors
    /// `confirmation_missing`, `template_of_other_workspace`; [`ServiceError::NotFound`].
    pub async fn delete(
        &self,
        caller: Caller,
        ws: &str,
        id: TemplateId,
        confirm: &str,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        records::change(store, &caller, || async {
            let (template, revision) = self.own(ws, id).await?;
            records::check_confirm(Kind::Template.what(), confirm, template.name.as_str())?;
            let name_key = keys::name_in_workspace(Kind::Template, ws, template.name.as_str());
            let txn = records::remove(&template, revision)
                .delete(name_key)
                .delete(keys::of_workspace(Kind::Template, ws, &id.to_string()));
            Ok((txn, ()))
        })
        .await?;
        Ok(())
    }

    /// A template that a workspace may change.
    async fn own(
        &self,
        ws: &str,
        id: TemplateId,
    ) -> Result<(ProcessTemplate, Revision), ServiceError> {
        let (template, revision) = self.get(ws, id).await?;
        if template.workspace.as_str() == ws {
            return Ok((template, revision));
        }
        Err(ServiceError::conflict(
            "template_of_other_workspace",
            format!(
                "the process template `{}` was made in the workspace `{}`: it can be used here, and not changed",
                template.name, template.workspace
            ),
            "change it there, or make one of your own",
        ))
    }
}

fn check(request: &CreateTemplate) -> Result<(), ServiceError> {
    let wrong = |field: &'static str, error: InvalidValue| ServiceError::of_value((field, error));
    check_length("the description", &request.description, 0, 500)
        .map_err(|error| wrong("description", error))?;
    if request.grants.len() > MAX_GRANTS {
        let message = format!(
            "a template has at most {MAX_GRANTS} grants, and this one {}",
            request.grants.len()
        );
        let found = request.grants.len() as u64;
        let bad = InvalidValue::limit(message, MAX_GRANTS as u64, found);
        return Err(wrong("grants", bad));
    }
    for grant in &request.grants {
        for name in grant.users.iter().chain(&grant.roles) {
            check_length("the name of a user or role", name, 1, 60)
                .map_err(|error| wrong("grants", error))?;
        }
    }
    template::check(request.kind, &request.steps).map_err(|bad| {
        let field = bad
            .position()
            .map_or_else(|| "/steps".to_owned(), |at| format!("/steps/{at}"));
        ServiceError::invalid(
            "template_invalid",
            field,
            bad.to_string(),
            "mend the step; the fixed flow of its kind is a template, too",
        )
    })
}
