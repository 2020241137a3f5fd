//! What each application has of packages in a workspace. Source: spec "Packages", "overview of all applications".

use serde::Serialize;
use windlass_domain::{
    Timestamp,
    application::{Application, TechStackChoice},
    id::{AppId, PackageId},
    name::{AppName, PackageVersion},
    package::Package,
    workspace::Workspace,
};
use windlass_store::Entry;

use super::Packages;
use crate::{
    keys::{self, Kind},
    service::{
        PageOf, PageRequest, ServiceError,
        records::{self, Sort},
    },
};

/// An application and its packages in one workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct PackageOverview {
    /// The application.
    pub app: AppId,
    /// Its name.
    pub name: AppName,
    /// Its alias.
    pub alias: String,
    /// Its owner.
    pub owner: String,
    /// Its tech stack.
    pub tech_stack: TechStackChoice,
    /// How many packages of it the workspace has.
    pub packages: usize,
    /// The one that was uploaded last; `None`: there is none.
    pub newest: Option<NewestPackage>,
}

/// The package that was uploaded last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct NewestPackage {
    /// The package.
    pub id: PackageId,
    /// Its version.
    pub version: PackageVersion,
    /// When it was uploaded.
    pub created_at: Timestamp,
}

/// Which applications; all conditions that are given must hold.
#[derive(Debug, Clone, Default)]
pub struct OverviewFilter {
    /// Name or alias contains this, in any case.
    pub search: Option<String>,
    /// Those that have packages, or those that have none.
    pub has_packages: Option<bool>,
}

impl Packages {
    /// A page of all applications with what they have in a workspace, in the order in which they were made.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn overview(
        &self,
        ws: &str,
        filter: &OverviewFilter,
        page: PageRequest,
    ) -> Result<PageOf<PackageOverview>, ServiceError> {
        let store = &*self.store;
        records::get::<Workspace>(store, ws).await?;
        let search = filter.search.as_ref().map(|text| text.to_lowercase());
        let search = search.as_deref();
        let read = |entry: Entry| async move {
            let app: Application = records::decode(&entry)?;
            let is_wanted = search.is_none_or(|text| {
                app.name.as_str().to_lowercase().contains(text)
                    || app.alias.to_lowercase().contains(text)
            });
            if !is_wanted {
                return Ok(None);
            }
            self.of_application(ws, app).await.map(Some)
        };
        let keep = |found: &PackageOverview| {
            let wanted = filter.has_packages;
            wanted.is_none_or(|wanted| wanted == (found.packages > 0))
        };
        let (all, own) = (keys::records(Kind::App), keys::package_overview(ws));
        let recast = |cursor: Option<String>, from, to| {
            cursor
                .map(|cursor| records::recast(&cursor, from, to))
                .transpose()
        };
        let page = PageRequest {
            size: page.size,
            cursor: recast(page.cursor, &own, &all)?,
        };
        let found = records::list_rows(store, &all, Sort::Rising, &page, read, keep).await?;
        Ok(PageOf {
            items: found.items,
            next: recast(found.next, &all, &own)?,
        })
    }

    async fn of_application(
        &self,
        ws: &str,
        app: Application,
    ) -> Result<PackageOverview, ServiceError> {
        let store = &*self.store;
        let versions = records::all(store, &keys::package_versions(ws, app.id)).await?;
        // Ids are in the order of time.
        let ids = versions.iter().filter_map(|row| {
            let id = std::str::from_utf8(&row.value).ok()?;
            id.parse::<PackageId>().ok()
        });
        let newest = match ids.max() {
            Some(id) => records::find::<Package>(store, &id.to_string()).await?,
            None => None,
        };
        Ok(PackageOverview {
            app: app.id,
            name: app.name,
            alias: app.alias,
            owner: app.owner,
            tech_stack: app.tech_stack,
            packages: versions.len(),
            newest: newest.map(|(package, _)| NewestPackage {
                id: package.id,
                version: package.version,
                created_at: package.created_at,
            }),
        })
    }
}
