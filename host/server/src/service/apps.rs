//! Applications: one code base each, shared by all workspaces of a tenant. Source: spec "Applications".

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use windlass_domain::{
    application::{Application, TechStackChoice},
    id::AppId,
    instance::ServiceInstance,
    name::{AppName, PluginName},
    package::Package,
    plugin::PluginKind,
};
use windlass_runtime::{LookupError, Plugin, Plugins};
use windlass_store::{Revision, Store};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    records::{self, Sort},
};
use crate::{
    clock, ids,
    keys::{self, Kind},
};

/// The tech stacks that applications can choose. Implemented by the plugin registry.
pub trait TechStacks: Send + Sync + 'static {
    /// Whether the choice can be made now.
    ///
    /// # Errors
    /// `tech_stack_unknown`: no active plugin of this kind, or none of its versions fits.
    fn check(&self, choice: &TechStackChoice) -> Result<(), ServiceError>;

    /// Whether parameters fit the stack's schema.
    ///
    /// # Errors
    /// Those of [`TechStacks::check`]; `parameters_invalid` with every fault.
    fn check_parameters(
        &self,
        choice: &TechStackChoice,
        parameters: &serde_json::Value,
    ) -> Result<(), ServiceError>;
}

/// The plugin of a choice. `*` is the default version, which may be pinned.
fn chosen(plugins: &Plugins, choice: &TechStackChoice) -> Result<Plugin, LookupError> {
    let wanted = Some(&choice.version).filter(|wanted| **wanted != semver::VersionReq::STAR);
    plugins.get_of_kind(PluginKind::TechStack, choice.name.as_str(), wanted)
}

fn unknown_stack(error: &LookupError) -> ServiceError {
    ServiceError::invalid(
        "tech_stack_unknown",
        "tech_stack",
        error.to_string(),
        "choose a tech stack from the list of plugins, or add it to the plugin directory",
    )
}

impl TechStacks for Plugins {
    fn check(&self, choice: &TechStackChoice) -> Result<(), ServiceError> {
        chosen(self, choice)
            .map(|_| ())
            .map_err(|error| unknown_stack(&error))
    }

    fn check_parameters(
        &self,
        choice: &TechStackChoice,
        parameters: &serde_json::Value,
    ) -> Result<(), ServiceError> {
        let plugin = chosen(self, choice).map_err(|error| unknown_stack(&error))?;
        plugin.validate_parameters(parameters).map_err(|errors| {
            let stack = plugin.reference();
            let faults: Vec<String> = errors.iter().map(ToString::to_string).collect();
            ServiceError::invalid(
                "parameters_invalid",
                "parameters",
                format!(
                    "the parameters do not fit the schema of {}@{}: {}",
                    stack.name,
                    stack.version,
                    faults.join("; ")
                ),
                "see the schema in the list of plugins",
            )
        })
    }
}

/// An application to be made.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateApp {
    /// Name: unique in the tenant.
    pub name: AppName,
    /// Alias, at most 60 characters.
    #[serde(default)]
    pub alias: String,
    /// Description, at most 500 characters.
    #[serde(default)]
    pub description: String,
    /// Owner; the caller unless given.
    #[serde(default)]
    pub owner: Option<String>,
    /// Its tech stack. The framework never changes.
    pub tech_stack: TechStackChoice,
}

/// A change of an application; what is not given stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateApp {
    /// Alias.
    #[serde(default)]
    pub alias: Option<String>,
    /// Description.
    #[serde(default)]
    pub description: Option<String>,
    /// Owner.
    #[serde(default)]
    pub owner: Option<String>,
    /// Version requirement of the tech stack, for example `^1`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub tech_stack_version: Option<semver::VersionReq>,
}

/// Which applications; all conditions that are given must hold.
#[derive(Debug, Clone, Default)]
pub struct AppFilter {
    /// Name or alias contains this, in any case.
    pub search: Option<String>,
    /// Exactly this owner.
    pub owner: Option<String>,
    /// Exactly this tech stack.
    pub tech_stack: Option<PluginName>,
}

/// Applications. Cheap to clone.
#[derive(Clone)]
pub struct Apps {
    store: Arc<dyn Store>,
    plugins: Arc<dyn TechStacks>,
}

impl Apps {
    /// Over a store and the plugins.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, plugins: Arc<dyn TechStacks>) -> Self {
        Self { store, plugins }
    }

    /// One application by its id or its name.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn get(&self, id_or_name: &str) -> Result<(Application, Revision), ServiceError> {
        let store = &*self.store;
        if let Ok(id) = id_or_name.parse::<AppId>()
            && let Some(found) = records::find(store, &id.to_string()).await?
        {
            return Ok(found);
        }
        if let Ok(name) = id_or_name.parse::<AppName>()
            && let Some(id) =
                records::indexed(store, &keys::name_in_tenant(Kind::App, name.as_str())).await?
        {
            return records::get(store, &id).await;
        }
        Err(ServiceError::not_found("application", id_or_name))
    }

    /// A page of applications, oldest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted.
    pub async fn list(
        &self,
        filter: &AppFilter,
        page: PageRequest,
    ) -> Result<PageOf<(Application, Revision)>, ServiceError> {
        let search = filter.search.as_ref().map(|text| text.to_lowercase());
        let prefix = keys::records(Kind::App);
        records::list(
            &*self.store,
            &prefix,
            Sort::Rising,
            &page,
            |app: &Application| {
                search.as_ref().is_none_or(|text| {
                    app.name.as_str().to_lowercase().contains(text)
                        || app.alias.to_lowercase().contains(text)
                }) && filter
                    .owner
                    .as_ref()
                    .is_none_or(|owner| app.owner == *owner)
                    && filter
                        .tech_stack
                        .as_ref()
                        .is_none_or(|stack| app.tech_stack.name == *stack)
            },
        )
        .await
    }

    /// Makes an application.
    ///
    /// # Errors
    /// `name_taken`; `tech_stack_unknown`; fields that break a rule.
    pub async fn create(
        &self,
        caller: Caller,
        request: CreateApp,
    ) -> Result<(Application, Revision), ServiceError> {
        let store = &*self.store;
        let app = Application {
            schema: Application::SCHEMA,
            id: AppId::from_uuid(ids::new_uuid()),
            name: request.name,
            alias: request.alias,
            description: request.description,
            owner: request.owner.unwrap_or_else(|| caller.name.clone()),
            tech_stack: request.tech_stack,
            created_at: clock::now(),
        };
        app.validate().map_err(ServiceError::of_value)?;
        self.plugins.check(&app.tech_stack)?;
        records::change(store, &caller, || async {
            let name_key = keys::name_in_tenant(Kind::App, app.name.as_str());
            if records::indexed(store, &name_key).await?.is_some() {
                return Err(ServiceError::taken(
                    "application",
                    "name",
                    app.name.as_str(),
                ));
            }
            let txn = records::create(&app)?
                .absent(name_key.clone())
                .put(name_key, app.id.to_string());
            Ok((txn, app.clone()))
        })
        .await
    }

    /// Changes an application.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], [`ServiceError::Changed`]; `tech_stack_unknown`; fields that break a rule.
    pub async fn update(
        &self,
        caller: Caller,
        id_or_name: &str,
        if_match: Option<Revision>,
        request: UpdateApp,
    ) -> Result<(Application, Revision), ServiceError> {
        records::change(&*self.store, &caller, || async {
            let (mut app, revision) = self.get(id_or_name).await?;
            records::check_revision::<Application>(if_match, revision)?;
            if let Some(alias) = &request.alias {
                app.alias.clone_from(alias);
            }
            if let Some(description) = &request.description {
                app.description.clone_from(description);
            }
            if let Some(owner) = &request.owner {
                app.owner.clone_from(owner);
            }
            if let Some(version) = &request.tech_stack_version {
                app.tech_stack.version.clone_from(version);
                self.plugins.check(&app.tech_stack)?;
            }
            app.validate().map_err(ServiceError::of_value)?;
            Ok((records::replace(&app, revision)?, app))
        })
        .await
    }

    /// Deletes an application that no workspace holds anything of; `confirm` is its name, which is free again afterwards.
    ///
    /// # Errors
    /// `in_use`, with the service instances and packages; `confirmation_missing`; [`ServiceError::NotFound`].
    pub async fn delete(
        &self,
        caller: Caller,
        id_or_name: &str,
        confirm: &str,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        records::change(store, &caller, || async {
            let (app, revision) = self.get(id_or_name).await?;
            records::check_confirm("application", confirm, app.name.as_str())?;
            let unused = records::unused(store, Kind::App, &app.id.to_string()).await?;
            let by = self.held(app.id).await?;
            if !by.is_empty() {
                return Err(ServiceError::in_use("application", app.name.as_str(), &by));
            }
            let txn = records::remove(&app, revision)
                .and(unused)
                .delete(keys::name_in_tenant(Kind::App, app.name.as_str()));
            Ok((txn, ()))
        })
        .await?;
        Ok(())
    }

    /// What workspaces hold of it. Deletions are rare: the records are read.
    async fn held(&self, app: AppId) -> Result<Vec<String>, ServiceError> {
        let store = &*self.store;
        let mut held = Vec::new();
        for row in records::all(store, &keys::records(Kind::Instance)).await? {
            let found: ServiceInstance = records::decode(&row)?;
            if found.app == app {
                held.push(format!(
                    "service instance {} ({}) in workspace {}",
                    found.name, found.id, found.workspace
                ));
            }
        }
        for row in records::all(store, &keys::records(Kind::Package)).await? {
            let found: Package = records::decode(&row)?;
            if found.app == app {
                held.push(format!(
                    "package {} ({}) in workspace {}",
                    found.version, found.id, found.workspace
                ));
            }
        }
        Ok(held)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::service::records::tests::{caller, memory_store};

    /// One stack, `binary` 1.2.0, with one parameter `port` that must be a number.
    pub(crate) struct OneStack;

    impl TechStacks for OneStack {
        fn check(&self, choice: &TechStackChoice) -> Result<(), ServiceError> {
            let fits = choice.version.matches(&semver::Version::new(1, 2, 0));
            if choice.name.as_str() == "binary" && fits {
                return Ok(());
            }
            Err(unknown_stack(&LookupError::NoSuchPlugin {
                name: choice.name.to_string(),
            }))
        }

        fn check_parameters(
            &self,
            choice: &TechStackChoice,
            parameters: &serde_json::Value,
        ) -> Result<(), ServiceError> {
            self.check(choice)?;
            match parameters.get("port") {
                Some(port) if !port.is_u64() => Err(ServiceError::invalid(
                    "parameters_invalid",
                    "parameters",
                    "/port is no number",
                    "give a number",
                )),
                Some(_) | None => Ok(()),
            }
        }
    }

    pub(crate) fn request(name: &str) -> CreateApp {
        serde_json::from_value(serde_json::json!({
            "name": name, "tech_stack": {"name": "binary", "version": "^1"}
        }))
        .unwrap()
    }

    #[tokio::test]
    async fn names_are_unique_and_found_and_free_after_deletion() {
        let apps = Apps::new(memory_store(), Arc::new(OneStack));
        let (one, two) = tokio::join!(
            apps.create(caller(), request("shop")),
            apps.create(caller(), request("shop"))
        );
        assert!(one.is_ok() != two.is_ok());
        let (app, revision) = one.or(two).unwrap();
        assert_eq!(app.owner, "anna");
        for key in ["shop", &app.id.to_string()] {
            assert_eq!(apps.get(key).await.unwrap(), (app.clone(), revision));
        }
        for key in ["", "sho", "a/b", &"x".repeat(600)] {
            assert!(matches!(
                apps.get(key).await.unwrap_err(),
                ServiceError::NotFound { .. }
            ));
        }
        apps.delete(caller(), "shop", "shop").await.unwrap();
        apps.create(caller(), request("shop")).await.unwrap();
    }

    #[tokio::test]
    async fn the_stack_must_be_there_and_its_framework_stays() {
        let apps = Apps::new(memory_store(), Arc::new(OneStack));
        let mut other = request("shop");
        other.tech_stack.name = "java".parse().unwrap();
        assert!(matches!(
            apps.create(caller(), other).await.unwrap_err(),
            ServiceError::Invalid {
                code: "tech_stack_unknown",
                ..
            }
        ));
        let (app, revision) = apps.create(caller(), request("shop")).await.unwrap();
        let update = |version: &str| UpdateApp {
            tech_stack_version: Some(version.parse().unwrap()),
            ..UpdateApp::default()
        };
        assert!(
            apps.update(caller(), "shop", None, update("^2"))
                .await
                .is_err()
        );
        let (changed, _) = apps
            .update(caller(), "shop", Some(revision), update("~1.2"))
            .await
            .unwrap();
        assert_eq!(changed.tech_stack.name, app.tech_stack.name);
        let stale = apps.update(caller(), "shop", Some(revision), update("^1"));
        assert!(matches!(
            stale.await.unwrap_err(),
            ServiceError::Changed {
                what: "application",
                ..
            }
        ));
    }

    #[tokio::test]
    async fn filters_are_combined() {
        let apps = Apps::new(memory_store(), Arc::new(OneStack));
        for (name, owner) in [("Shop", "anna"), ("shop-admin", "ben"), ("blog", "anna")] {
            let mut request = request(name);
            request.owner = Some(owner.to_owned());
            apps.create(caller(), request).await.unwrap();
        }
        let filter = AppFilter {
            search: Some("SHOP".to_owned()),
            owner: Some("anna".to_owned()),
            tech_stack: Some("binary".parse().unwrap()),
        };
        let page = apps.list(&filter, PageRequest::first(10)).await.unwrap();
        let names: Vec<_> = page
            .items
            .iter()
            .map(|(app, _)| app.name.as_str())
            .collect();
        assert_eq!(names, ["Shop"]);
    }
}
