//! Packages: which there are, and their deletion. Source: spec "Packages".
//!
//! | module | owns |
//! | --- | --- |
//! | `upload` | uploads and their records |
//! | `examine` | the examination of what is uploaded |
//! | `quota` | how much may be uploaded |
//! | `overview` | what each application has |

mod examine;
mod overview;
mod quota;
mod upload;

pub use self::{
    overview::{OverviewFilter, PackageOverview},
    upload::{BeginUpload, Upload},
};

use self::{examine::Examiners, quota::Quota};

use std::{sync::Arc, time::UNIX_EPOCH};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use windlass_domain::{
    Digest, Timestamp,
    id::{AppId, OrderId, PackageId, UploadId},
    instance::ServiceInstance,
    manifest::Manifest,
    name::PackageVersion,
    order::Order,
    package::{Package, UploadRecord},
    server::Server,
    workspace::Workspace,
};
use windlass_store::{BlobDigest, Blobs, Revision, Store, Txn};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    records::{self, Sort},
    retention::RetentionSettings,
};
use crate::{
    clock,
    config::UPLOAD_DISK_RESERVE_PERCENT,
    engine,
    keys::{self, Kind},
};

/// Manifests read at a time while users of a package are looked for.
const MANIFESTS_AT_ONCE: usize = 100;
/// Packages that are deleted at once at most.
const MAX_DELETIONS: usize = 100;

/// Which packages or upload records; all conditions that are given must hold.
#[derive(Debug, Clone, Default)]
pub struct PackageFilter {
    /// Of this application.
    pub app: Option<AppId>,
    /// Version contains this, in any case.
    pub version: Option<String>,
}

impl PackageFilter {
    fn fits(&self, app: AppId, version: &PackageVersion) -> bool {
        self.app.is_none_or(|wanted| wanted == app)
            && self.version.as_ref().is_none_or(|text| {
                let version = version.as_str().to_lowercase();
                version.contains(&text.to_lowercase())
            })
    }
}

/// A package that was deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeletedPackage {
    /// The package's id.
    pub id: PackageId,
    /// Size of its file in bytes. The workspace's upload quota no longer counts it.
    pub size_bytes: u64,
    /// The file is removed from the disk by this time at the latest, unless an order that is kept still refers to it. Missing
    /// while another package has the same file: the file is kept for that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub space_free_by: Option<Timestamp>,
}

/// Upload records that were deleted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeletedUploads {
    /// Ids of the deleted records.
    pub deleted: Vec<UploadId>,
    /// Ids without a record in this workspace.
    pub missing: Vec<UploadId>,
}

/// Knows which packages orders still need.
#[async_trait]
pub trait PackageUse: Send + Sync + 'static {
    /// The orders that are not over and use the package, for people.
    ///
    /// # Errors
    /// Those of the store.
    async fn orders_with(&self, package: &Package) -> Result<Vec<String>, ServiceError>;
}

/// Finds orders that are not over by their headers and plans.
struct OpenOrders {
    store: Arc<dyn Store>,
    blobs: Blobs,
}

#[async_trait]
impl PackageUse for OpenOrders {
    async fn orders_with(&self, package: &Package) -> Result<Vec<String>, ServiceError> {
        let store = &*self.store;
        let mut by = Vec::new();
        for row in records::all(store, &keys::orders_of(package.workspace.as_str())).await? {
            let Ok(id) = keys::last_segment(&row.key).parse::<OrderId>() else {
                continue;
            };
            let Some(entry) = store.get(&engine::rows::order(id)).await? else {
                continue;
            };
            let order: Order = records::decode_plain(&entry, "an order")?;
            if order.state.is_terminal() {
                continue;
            }
            // A plan that cannot be read may use it: then it is in use.
            let uses = engine::load_plan(&self.blobs, order.plan)
                .await
                .map_or(true, |plan| {
                    plan.parts.iter().any(|part| {
                        part.app == package.app
                            && part
                                .package
                                .as_ref()
                                .is_some_and(|released| released.digest == package.digest)
                    })
                });
            if uses {
                by.push(format!("order {} ({id})", order.title));
            }
        }
        Ok(by)
    }
}

/// Packages. Cheap to clone.
#[derive(Clone)]
pub struct Packages {
    store: Arc<dyn Store>,
    blobs: Blobs,
    orders: Arc<dyn PackageUse>,
    examiners: Examiners,
    quota: Quota,
}

impl Packages {
    /// Over a store and its blobs.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, blobs: Blobs) -> Self {
        let orders = Arc::new(OpenOrders {
            store: store.clone(),
            blobs: blobs.clone(),
        });
        Self {
            store,
            blobs,
            orders,
            examiners: Examiners::default(),
            quota: Quota::new(UPLOAD_DISK_RESERVE_PERCENT),
        }
    }

    /// With another share of the disk that uploads leave free, in percent.
    #[must_use]
    pub fn with_disk_reserve(mut self, percent: u8) -> Self {
        self.quota = Quota::new(percent);
        self
    }

    /// One package of a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when it is another workspace's.
    pub async fn get(&self, ws: &str, id: PackageId) -> Result<(Package, Revision), ServiceError> {
        let (package, revision) = records::get::<Package>(&*self.store, &id.to_string()).await?;
        if package.workspace.as_str() == ws {
            Ok((package, revision))
        } else {
            Err(ServiceError::not_found("package", id))
        }
    }

    /// The package of an application with a version: for planning.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn find_version(
        &self,
        ws: &str,
        app: AppId,
        version: &str,
    ) -> Result<Option<Package>, ServiceError> {
        if version.parse::<PackageVersion>().is_err() {
            return Ok(None);
        }
        let key = keys::package_version(ws, app, version);
        let Some(id) = records::indexed(&*self.store, &key).await? else {
            return Ok(None);
        };
        let found = records::find::<Package>(&*self.store, &id).await?;
        Ok(found.map(|(package, _)| package))
    }

    /// A page of a workspace's packages, newest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn list(
        &self,
        ws: &str,
        filter: &PackageFilter,
        page: PageRequest,
    ) -> Result<PageOf<(Package, Revision)>, ServiceError> {
        records::get::<Workspace>(&*self.store, ws).await?;
        let prefix = keys::all_of_workspace(Kind::Package, ws);
        let keep = |package: &Package| filter.fits(package.app, &package.version);
        records::list(&*self.store, &prefix, Sort::Falling, &page, keep).await
    }

    /// A page of a workspace's upload records, newest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn list_uploads(
        &self,
        ws: &str,
        filter: &PackageFilter,
        page: PageRequest,
    ) -> Result<PageOf<UploadRecord>, ServiceError> {
        records::get::<Workspace>(&*self.store, ws).await?;
        let prefix = keys::uploads(ws);
        let read = |entry: windlass_store::Entry| async move {
            records::decode_plain::<UploadRecord>(&entry, "an upload record").map(Some)
        };
        let keep = |record: &UploadRecord| filter.fits(record.app, &record.version);
        records::list_rows(&*self.store, &prefix, Sort::Falling, &page, read, keep).await
    }

    /// Deletes a package that nothing uses; `confirm` is its version. A service instance uses the package that it names, and
    /// those of which a release is installed on a server bound to it, now or before (what a rollback brings back); an order
    /// that has not ended uses those of its plan. Its file is removed when nothing else refers to it: see [`DeletedPackage`].
    ///
    /// # Errors
    /// `in_use`, with the users; `confirmation_missing`; [`ServiceError::NotFound`].
    pub async fn delete(
        &self,
        caller: Caller,
        ws: &str,
        id: PackageId,
        confirm: &str,
    ) -> Result<DeletedPackage, ServiceError> {
        let store = &*self.store;
        let text = id.to_string();
        let (deleted, _) = records::change(store, &caller, || async {
            let (package, revision) = self.get(ws, id).await?;
            let version = package.version.as_str();
            records::check_confirm("package", confirm, version)?;
            let unused = records::unused(store, Kind::Package, &text).await?;
            // Orders first: one that ends after that has written what it installed before that.
            let orders = self.orders.orders_with(&package).await?;
            let below = keys::all_of_workspace(Kind::Instance, ws);
            let mut by = Vec::new();
            for instance in records::all_indexed::<ServiceInstance>(store, &below).await? {
                if instance.app != package.app {
                    continue;
                }
                if instance.package == Some(id) {
                    by.push(format!(
                        "service instance {} ({})",
                        instance.name, instance.id
                    ));
                }
                self.add_installed(&instance, &package, &mut by).await?;
            }
            by.extend(orders);
            if !by.is_empty() {
                return Err(ServiceError::in_use("package", version, &by));
            }
            let txn = records::remove(&package, revision)
                .and(unused)
                .delete(keys::package_version(ws, package.app, version))
                .delete(keys::of_workspace(Kind::Package, ws, &text));
            Ok((txn, self.freed_by(&package).await?))
        })
        .await?;
        Ok(deleted)
    }

    /// When the file of a package that is deleted now will be removed.
    async fn freed_by(&self, package: &Package) -> Result<DeletedPackage, ServiceError> {
        let rows = records::all(&*self.store, &keys::records(Kind::Package)).await?;
        let mut shared = false;
        for row in &rows {
            let other = records::decode::<Package>(row)?;
            shared |= other.id != package.id && other.digest == package.digest;
        }
        let settings = RetentionSettings::default();
        let digest = BlobDigest::from_bytes(*package.digest.as_bytes());
        let written = self.blobs.info(digest).await?.map(|info| info.modified);
        let since_written = written.and_then(|written| {
            let since = written.duration_since(UNIX_EPOCH).ok()?;
            i64::try_from(since.as_millis()).ok()
        });
        let now = clock::now();
        let may_go = since_written.map_or(now, |ms| {
            Timestamp::from_unix_ms(ms)
                .plus_ms(settings.blob_grace_ms)
                .max(now)
        });
        let interval_ms = u64::try_from(settings.interval.as_millis()).unwrap_or(u64::MAX);
        Ok(DeletedPackage {
            id: package.id,
            size_bytes: package.size_bytes,
            space_free_by: (!shared).then(|| may_go.plus_ms(interval_ms)),
        })
    }

    /// Deletes upload records. The packages that uploads made stay.
    ///
    /// # Errors
    /// `uploads_out_of_range`; [`ServiceError::NotFound`] of the workspace; errors of the store.
    pub async fn delete_uploads(
        &self,
        caller: Caller,
        ws: &str,
        ids: &[UploadId],
    ) -> Result<DeletedUploads, ServiceError> {
        if ids.is_empty() || ids.len() > MAX_DELETIONS {
            return Err(ServiceError::Limit {
                code: "uploads_out_of_range",
                field: "uploads".to_owned(),
                message: format!(
                    "1 to {MAX_DELETIONS} upload records can be deleted in one request; it lists {}",
                    ids.len()
                ),
                limit: MAX_DELETIONS as u64,
                current: ids.len() as u64,
                mend: "Split the request.".to_owned(),
            });
        }
        let store = &*self.store;
        let (deleted, _) = records::change(store, &caller, || async {
            records::get::<Workspace>(store, ws).await?;
            let mut txn = Txn::new().exists(keys::record(Kind::Workspace, ws));
            let mut answer = DeletedUploads::default();
            for id in ids {
                let key = keys::upload(ws, &id.to_string());
                if answer.deleted.contains(id) || answer.missing.contains(id) {
                    continue;
                }
                if store.get(&key).await?.is_some() {
                    txn = txn.exists(key.clone()).delete(key);
                    answer.deleted.push(*id);
                } else {
                    answer.missing.push(*id);
                }
            }
            Ok((txn, answer))
        })
        .await?;
        Ok(deleted)
    }

    /// Deletes one upload record.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn delete_upload(
        &self,
        caller: Caller,
        ws: &str,
        id: UploadId,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        let key = keys::upload(ws, &id.to_string());
        records::change(store, &caller, || async {
            if store.get(&key).await?.is_none() {
                return Err(ServiceError::not_found("upload record", id));
            }
            let txn = Txn::new().exists(key.clone()).delete(key.clone());
            Ok((txn, ()))
        })
        .await?;
        Ok(())
    }

    /// Deletes several packages, each as [`Packages::delete`] does, and says of each what became of it. Each deletion is a
    /// commit of its own: the same request again finds those gone that it has deleted.
    ///
    /// # Errors
    /// `packages_out_of_range`; faults of the store. What was deleted before one stays so.
    pub async fn delete_many(
        &self,
        ws: &str,
        asked: &[(PackageId, String)],
    ) -> Result<Vec<(PackageId, Result<DeletedPackage, ServiceError>)>, ServiceError> {
        if asked.is_empty() || asked.len() > MAX_DELETIONS {
            return Err(ServiceError::Limit {
                code: "packages_out_of_range",
                field: "packages".to_owned(),
                message: format!(
                    "1 to {MAX_DELETIONS} packages are deleted at once, and {} are named",
                    asked.len()
                ),
                limit: MAX_DELETIONS as u64,
                current: asked.len() as u64,
                mend: "name fewer packages".to_owned(),
            });
        }
        let mut outcomes = Vec::with_capacity(asked.len());
        for (id, confirm) in asked {
            let outcome = match self.delete(Caller::default(), ws, *id, confirm).await {
                Err(error @ ServiceError::Internal { .. }) => return Err(error),
                outcome => outcome,
            };
            outcomes.push((*id, outcome));
        }
        Ok(outcomes)
    }

    /// Adds the servers bound to an instance on which a release of the package is installed, or was before.
    async fn add_installed(
        &self,
        instance: &ServiceInstance,
        package: &Package,
        by: &mut Vec<String>,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        for (prefix, how) in keys::installed_of(instance.id)
            .iter()
            .zip(["installed", "kept for a rollback"])
        {
            let mut after = None;
            loop {
                // Manifests hold scripts: a page at a time.
                let page = store
                    .scan(prefix, after.as_ref(), MANIFESTS_AT_ONCE)
                    .await?;
                after = page.entries.last().map(|entry| entry.key.clone());
                for entry in &page.entries {
                    let manifest: Manifest = records::decode_plain(entry, "what is installed")?;
                    let is_it = manifest.package.version == package.version.as_str()
                        && manifest.package.digest == package.digest;
                    if !is_it {
                        continue;
                    }
                    let server = keys::last_segment(&entry.key);
                    let Some((server, _)) = records::find::<Server>(store, server).await? else {
                        continue;
                    };
                    // What runs on a server that was unbound is nobody's any more.
                    if server.instance == Some(instance.id) {
                        by.push(format!(
                            "service instance {} ({how} on server {})",
                            instance.name, server.name
                        ));
                    }
                }
                if !page.more || after.is_none() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// The digests of all packages' files: what the collection of blobs leaves alone.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn digests_in_use(&self) -> Result<std::collections::BTreeSet<Digest>, ServiceError> {
        records::all(&*self.store, &keys::records(Kind::Package))
            .await?
            .iter()
            .map(|entry| Ok(records::decode::<Package>(entry)?.digest))
            .collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::service::{
        apps::{Apps, tests::OneStack},
        instances::{BindServer, Instances, UpdateInstance},
        records::tests::{caller, memory_store},
        servers,
        workspaces::{UpdateWorkspace, Workspaces, tests::request as workspace},
    };
    use bytes::Bytes;
    use futures_util::StreamExt as _;
    use windlass_domain::package::UploadOutcome;

    pub(crate) struct Ready {
        pub(crate) store: Arc<dyn Store>,
        pub(crate) blobs: Blobs,
        pub(crate) packages: Packages,
        pub(crate) app: AppId,
        _dir: tempfile::TempDir,
    }

    /// A workspace `prod` with a limit of 100 bytes, and an application.
    pub(crate) async fn ready() -> Ready {
        let dir = tempfile::tempdir().unwrap();
        let store = memory_store();
        let blobs = Blobs::open_directory(dir.path()).await.unwrap();
        let workspaces = Workspaces::new(store.clone());
        workspaces
            .create(caller(), workspace("prod"))
            .await
            .unwrap();
        let limit = UpdateWorkspace {
            package_limit_bytes: Some(100),
            ..UpdateWorkspace::default()
        };
        workspaces
            .update(caller(), "prod", None, limit)
            .await
            .unwrap();
        let apps = Apps::new(store.clone(), Arc::new(OneStack));
        let request = crate::service::apps::tests::request("shop");
        let (app, _) = apps.create(caller(), request).await.unwrap();
        Ready {
            packages: Packages::new(store.clone(), blobs.clone()),
            store,
            blobs,
            app: app.id,
            _dir: dir,
        }
    }

    pub(crate) fn request(version: &str, file_name: &str) -> BeginUpload {
        BeginUpload {
            version: Some(version.parse().unwrap()),
            file_name: file_name.parse().unwrap(),
            kind: None,
            remark: String::new(),
            expected_digest: None,
            content_length: None,
        }
    }

    impl Ready {
        pub(crate) async fn upload(
            &self,
            request: BeginUpload,
            chunks: &[&[u8]],
        ) -> Result<Package, ServiceError> {
            let mut upload = self
                .packages
                .begin(caller(), "prod", self.app, request)
                .await?;
            for chunk in chunks {
                upload.write(Bytes::copy_from_slice(chunk)).await?;
            }
            Ok(upload.finish().await?.0)
        }

        async fn outcomes(&self) -> Vec<UploadOutcome> {
            let page = PageRequest::first(50);
            let filter = PackageFilter::default();
            let found = self.packages.list_uploads("prod", &filter, page).await;
            found
                .unwrap()
                .items
                .into_iter()
                .map(|record| record.outcome)
                .collect()
        }

        async fn blobs(&self) -> usize {
            self.blobs.list().count().await
        }
    }

    #[tokio::test]
    async fn a_failed_upload_leaves_its_record_only() {
        let ready = ready().await;
        let gzip: &[u8] = &[0x1f, 0x8b, 8, 0];
        let with_digest = |digest| BeginUpload {
            expected_digest: Some(digest),
            ..request("1", "a")
        };
        let announced = |content_length| BeginUpload {
            content_length: Some(content_length),
            ..request("1", "a")
        };
        let remark = BeginUpload {
            remark: "x".repeat(501),
            ..request("1", "a")
        };
        let cases: Vec<(BeginUpload, Vec<&[u8]>, &str)> = vec![
            (request("1", "a"), vec![], "package_empty"),
            (
                request("1", "a"),
                vec![&[0; 60], &[0; 41]],
                "package_too_large",
            ),
            (announced(101), vec![], "package_too_large"),
            (announced(5), vec![b"four"], "package_truncated"),
            (request("1", "a.zip"), vec![gzip], "package_format"),
            (
                request("1", "a.tar.gz"),
                vec![b"P", b"K\x03\x04"],
                "package_format",
            ),
            (request("1", "a.zip"), vec![b"PK"], "package_refused"),
            (request("1", "a"), vec![b"PK\x03\x04"], "package_refused"),
            (request("1", "a.tar.gz"), vec![gzip], "package_refused"),
            (
                request("1", "a.rar"),
                vec![b"Rar!\x1a\x07\0"],
                "package_format",
            ),
            (
                with_digest(Digest::of(b"other")),
                vec![b"this"],
                "package_digest",
            ),
            (remark, vec![], "out_of_limit"),
        ];
        for (number, (request, chunks, expect)) in cases.into_iter().enumerate() {
            let text = format!("{request:?} {chunks:?}");
            let error = ready.upload(request, &chunks).await.unwrap_err();
            assert_eq!(error.code(), expect, "{text}");
            let outcomes = ready.outcomes().await;
            assert_eq!(outcomes.len(), number + 1, "{text}");
            assert!(
                matches!(&outcomes[0], UploadOutcome::Failed { code, .. } if code == expect),
                "{text}: {outcomes:?}"
            );
            assert_eq!(ready.blobs().await, 0, "{text}");
        }
        let filter = PackageFilter::default();
        let page = ready
            .packages
            .list("prod", &filter, PageRequest::first(5))
            .await;
        assert!(page.unwrap().items.is_empty());
        let app = AppId::from_uuid(uuid::Uuid::nil());
        let unknown = ready
            .packages
            .begin(caller(), "prod", app, request("1", "a"));
        assert!(matches!(
            unknown.await.err(),
            Some(ServiceError::NotFound { .. })
        ));
    }

    #[tokio::test]
    async fn a_dropped_upload_leaves_its_record_only() {
        let ready = ready().await;
        let prefix = keys::uploads("prod");
        let from = ready.store.revision().await.unwrap();
        let mut watch = ready.store.watch(&prefix, from).await.unwrap();
        let begun = ready
            .packages
            .begin(caller(), "prod", ready.app, request("1", "a"));
        let mut upload = begun.await.unwrap();
        upload.write(Bytes::from_static(b"half")).await.unwrap();
        drop(upload);
        watch.next().await.unwrap();
        let outcomes = ready.outcomes().await;
        assert!(
            matches!(&outcomes[..], [UploadOutcome::Failed { reason, .. }] if reason.contains("4 bytes")),
            "{outcomes:?}"
        );
        assert_eq!(ready.blobs().await, 0);
    }

    #[tokio::test]
    async fn a_version_is_made_once() {
        let ready = ready().await;
        let at_limit = BeginUpload {
            content_length: Some(100),
            expected_digest: Some(Digest::of(&[7; 100])),
            ..request("1.0", "a")
        };
        let begin = || {
            ready
                .packages
                .begin(caller(), "prod", ready.app, request("2.0", "a"))
        };
        // Both begin before either commits.
        let (mut one, mut two) = (begin().await.unwrap(), begin().await.unwrap());
        one.write(Bytes::from_static(b"1")).await.unwrap();
        two.write(Bytes::from_static(b"2")).await.unwrap();
        let (one, two) = tokio::join!(one.finish(), two.finish());
        assert!(one.is_ok() != two.is_ok());
        assert_eq!(one.err().or(two.err()).unwrap().code(), "version_taken");
        assert_eq!(begin().await.err().unwrap().code(), "version_taken");
        let package = ready.upload(at_limit, &[&[7; 100]]).await.unwrap();
        assert_eq!(
            (package.size_bytes, package.digest),
            (100, Digest::of(&[7; 100]))
        );
        let found = ready.packages.find_version("prod", ready.app, "1.0").await;
        assert_eq!(found.unwrap(), Some(package.clone()));
        let filter = PackageFilter {
            app: Some(ready.app),
            version: Some("1.".to_owned()),
        };
        let page = ready
            .packages
            .list("prod", &filter, PageRequest::first(5))
            .await;
        assert_eq!(page.unwrap().items.len(), 1);
        let in_use = ready.packages.digests_in_use().await.unwrap();
        assert!(in_use.contains(&package.digest) && in_use.len() == 2);
    }

    #[tokio::test]
    async fn a_package_in_use_stays() {
        let ready = ready().await;
        let package = ready.upload(request("1.0", "a"), &[b"x"]).await.unwrap();
        let instances = Instances::new(ready.store.clone(), Arc::new(OneStack));
        let create = serde_json::from_value(serde_json::json!({
            "name": "shop", "app": ready.app, "package": package.id
        }));
        let made = instances.create(caller(), "prod", create.unwrap()).await;
        let (instance, _) = made.unwrap();
        let delete =
            |confirm: &'static str| ready.packages.delete(caller(), "prod", package.id, confirm);
        assert_eq!(
            delete("1").await.unwrap_err().code(),
            "confirmation_missing"
        );
        assert_eq!(delete("1.0").await.unwrap_err().code(), "in_use");
        let other = ready.upload(request("1.1", "a"), &[b"y"]).await.unwrap();
        let update = UpdateInstance {
            package: Some(other.id),
            ..UpdateInstance::default()
        };
        instances
            .update(caller(), "prod", instance.id, None, update)
            .await
            .unwrap();
        // What is installed on a server bound to it, or was there before, is used as well.
        let server = servers::tests::server(&ready.store, 1).await;
        let bind = || {
            let server = BindServer {
                server: server.id,
                variables: Default::default(),
            };
            instances.bind(caller(), "prod", instance.id, vec![server])
        };
        bind().await.unwrap();
        let manifest = Manifest {
            instance: instance.id,
            app: ready.app,
            release: "1.0-x".to_owned(),
            package: package.reference(),
            stack: windlass_domain::manifest::PluginRef {
                name: "binary".to_owned(),
                version: semver::Version::new(1, 0, 0),
                digest: Digest::of(b"binary"),
            },
            stop: vec![],
            start: vec![],
            check: vec![],
            env: Default::default(),
            plan: None,
            prepared: None,
        };
        for (key, how) in [
            (
                engine::rows::installed(instance.id, server.id),
                "installed on server",
            ),
            (
                engine::rows::installed_before(instance.id, server.id),
                "kept for a rollback on server",
            ),
        ] {
            let txn = Txn::new().put(key.clone(), records::encode(&manifest));
            ready.store.commit(txn).await.unwrap();
            let error = delete("1.0").await.unwrap_err();
            assert_eq!(error.code(), "in_use");
            assert!(error.to_string().contains(how), "{error}");
            ready.store.commit(Txn::new().delete(key)).await.unwrap();
        }
        // Another package's release, and one on a server that is not bound any more, are no use.
        let other_release = Manifest {
            package: other.reference(),
            ..manifest.clone()
        };
        let key = engine::rows::installed(instance.id, server.id);
        let txn = Txn::new().put(key.clone(), records::encode(&other_release));
        ready.store.commit(txn).await.unwrap();
        instances
            .unbind(caller(), "prod", instance.id, vec![server.id])
            .await
            .unwrap();
        let key = engine::rows::installed_before(instance.id, server.id);
        let txn = Txn::new().put(key, records::encode(&manifest));
        ready.store.commit(txn).await.unwrap();
        delete("1.0").await.unwrap();
        assert!(ready.packages.get("prod", package.id).await.is_err());
        ready.upload(request("1.0", "a"), &[b"z"]).await.unwrap();
    }
}
