//! Uploads of packages, streamed, and their records.
//!
//! ```text
//! begin ─► checks (names, duplicate, announced size) ─► write* (hashed, counted, first bytes looked at) ─► finish ─► one commit
//!   └─ refused ─► upload record                            └─ failed or dropped: nothing is left ─► upload record
//! ```
//! Memory use does not depend on a package's size. The blob is written first and referred to by the commit; what is left
//! without a reference (a commit that failed) is collected later.

use bytes::Bytes;
use windlass_domain::{
    Digest,
    application::Application,
    id::{AppId, PackageId, UploadId},
    name::{FileName, PackageVersion, check_length},
    package::{MAGIC_BYTES, Package, UploadOutcome, UploadRecord, content_fits, format_of},
    task::PackageFormat,
    workspace::Workspace,
};
use windlass_store::{BlobDigest, BlobError, BlobWriter, Revision, Store, Txn};

use super::Packages;
use crate::{
    clock, ids,
    keys::{self, Kind},
    service::{Caller, ServiceError, records},
};

/// What is said of an upload before its bytes.
#[derive(Debug, Clone)]
pub struct BeginUpload {
    /// Version: unique for the application in the workspace.
    pub version: PackageVersion,
    /// The file's name; says its format.
    pub file_name: FileName,
    /// Remark, at most 500 characters.
    pub remark: String,
    /// SHA-256, where the client computed it.
    pub expected_digest: Option<Digest>,
    /// Size in bytes, where it is known.
    pub content_length: Option<u64>,
}

impl Packages {
    /// Begins an upload: nothing of the body is read before this has returned.
    ///
    /// # Errors
    /// `version_taken`, `package_too_large` by the announced size, a remark that is too long: an upload record is left.
    /// [`ServiceError::NotFound`] of the workspace or application: none is.
    pub async fn begin(
        &self,
        caller: Caller,
        ws: &str,
        app: AppId,
        request: BeginUpload,
    ) -> Result<Upload, ServiceError> {
        let store = &*self.store;
        let (workspace, _) = records::get::<Workspace>(store, ws).await?;
        records::get::<Application>(store, &app.to_string()).await?;
        let about = About {
            id: UploadId::from_uuid(ids::new_uuid()),
            packages: self.clone(),
            format: format_of(&request.file_name),
            caller,
            workspace,
            app,
            request,
        };
        match about.check().await {
            Ok(writer) => Ok(Upload {
                about,
                first: Vec::with_capacity(MAGIC_BYTES),
                writer: Some(writer),
                recorded: false,
            }),
            Err(error) => {
                about.record_failure(&error).await;
                Err(error)
            }
        }
    }
}

/// An upload under way. Dropping it ends it like a failure: nothing but an upload record is left.
pub struct Upload {
    about: About,
    /// The first bytes, until they are enough to be looked at.
    first: Vec<u8>,
    /// `None` once the upload has failed.
    writer: Option<BlobWriter>,
    /// Its upload record is written, or about to be by somebody else.
    recorded: bool,
}

/// What is known of an upload beside its bytes.
struct About {
    id: UploadId,
    packages: Packages,
    caller: Caller,
    workspace: Workspace,
    app: AppId,
    request: BeginUpload,
    format: PackageFormat,
}

impl Upload {
    /// The id of its upload record.
    #[must_use]
    pub fn id(&self) -> UploadId {
        self.about.id
    }

    /// Adds bytes of the file. After an error the upload is over.
    ///
    /// # Errors
    /// `package_too_large`, `package_format`.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), ServiceError> {
        match self.add(bytes).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.fail(error).await),
        }
    }

    /// Ends the file and makes the package.
    ///
    /// # Errors
    /// `package_empty`, `package_truncated`, `package_digest`, `package_format`, `version_taken`: an upload record is left.
    pub async fn finish(mut self) -> Result<(Package, Revision), ServiceError> {
        match self.complete().await {
            Ok(made) => {
                self.recorded = true;
                Ok(made)
            }
            // Its twin has committed: no second record of one request.
            Err(ServiceError::Replay) => {
                self.recorded = true;
                Err(ServiceError::Replay)
            }
            Err(error) => Err(self.fail(error).await),
        }
    }

    /// Ends the upload because its bytes broke off; gives the error to answer with.
    pub async fn abort(mut self, reason: &str) -> ServiceError {
        let received = self.received();
        let error = ServiceError::invalid(
            "package_truncated",
            "body",
            format!("the upload broke off after {received} bytes: {reason}"),
            "upload the file again",
        );
        self.fail(error).await
    }

    fn received(&self) -> u64 {
        self.writer.as_ref().map_or(0, BlobWriter::size_bytes)
    }

    async fn add(&mut self, bytes: Bytes) -> Result<(), ServiceError> {
        if self.first.len() < MAGIC_BYTES && !bytes.is_empty() {
            let wanted = (MAGIC_BYTES - self.first.len()).min(bytes.len());
            self.first.extend_from_slice(&bytes[..wanted]);
            if self.first.len() == MAGIC_BYTES {
                self.about.check_format(&self.first)?;
            }
        }
        let Some(writer) = &mut self.writer else {
            return Err(BlobError::WriterFailed.into());
        };
        let would_be = writer.size_bytes() + bytes.len() as u64;
        match writer.write(bytes).await {
            Ok(()) => Ok(()),
            Err(BlobError::TooLarge { .. }) => Err(self.about.too_large(would_be)),
            Err(error) => Err(error.into()),
        }
    }

    async fn complete(&mut self) -> Result<(Package, Revision), ServiceError> {
        let received = self.received();
        if received == 0 {
            return Err(ServiceError::Limit {
                code: "package_empty",
                field: "body".to_owned(),
                message: "the package is empty".to_owned(),
                limit: 1,
                current: 0,
                mend: "upload a file of at least 1 byte".to_owned(),
            });
        }
        self.about.check_format(&self.first)?;
        if let Some(announced) = self.about.request.content_length
            && announced != received
        {
            return Err(ServiceError::invalid(
                "package_truncated",
                "body",
                format!("{received} bytes arrived, {announced} were announced"),
                "upload the file again",
            ));
        }
        let Some(writer) = self.writer.take() else {
            return Err(BlobError::WriterFailed.into());
        };
        let digest = self.about.request.expected_digest;
        let expected = digest.map(|digest| BlobDigest::from_bytes(*digest.as_bytes()));
        let written = match writer.finish(expected).await {
            Ok(written) => written,
            Err(BlobError::WrongDigest { expected, found }) => {
                return Err(ServiceError::invalid(
                    "package_digest",
                    "digest",
                    format!("the file has the SHA-256 {found}, {expected} was announced"),
                    "upload the file again, and check it where it comes from",
                ));
            }
            Err(error) => return Err(error.into()),
        };
        let digest = Digest::from_bytes(*written.digest.as_bytes());
        self.about.commit(digest, written.size_bytes).await
    }

    /// Ends the upload and records why. Gives the error back.
    async fn fail(&mut self, error: ServiceError) -> ServiceError {
        // Dropped: nothing of the blob is left.
        self.writer = None;
        if !std::mem::replace(&mut self.recorded, true) {
            self.about.record_failure(&error).await;
        }
        error
    }
}

impl About {
    /// Everything that can be said before the first byte. Gives the writer of the file.
    async fn check(&self) -> Result<BlobWriter, ServiceError> {
        check_length("the remark", &self.request.remark, 0, 500)
            .map_err(|error| ServiceError::of_value(("remark", error)))?;
        let limit_bytes = self.workspace.package_limit_bytes;
        if let Some(announced) = self.request.content_length
            && announced > limit_bytes
        {
            return Err(self.too_large(announced));
        }
        self.check_version().await?;
        Ok(self.packages.blobs.writer(limit_bytes).await?)
    }

    async fn check_version(&self) -> Result<(), ServiceError> {
        let (version, ws) = (self.request.version.as_str(), self.workspace.name.as_str());
        let key = keys::package_version(ws, self.app, version);
        match records::indexed(&*self.packages.store, &key).await? {
            None => Ok(()),
            Some(other) => Err(ServiceError::conflict(
                "version_taken",
                format!(
                    "the workspace `{ws}` has the version `{version}` of this application already: {other}"
                ),
                "give the package another version, or delete that one first",
            )),
        }
    }

    fn too_large(&self, current: u64) -> ServiceError {
        let limit = self.workspace.package_limit_bytes;
        ServiceError::Limit {
            code: "package_too_large",
            field: "body".to_owned(),
            message: format!(
                "the package has {current} bytes or more, the limit of the workspace `{}` is {limit}",
                self.workspace.name
            ),
            limit,
            current,
            mend: "upload a smaller file, or raise `package_limit_bytes` of the workspace"
                .to_owned(),
        }
    }

    fn check_format(&self, first: &[u8]) -> Result<(), ServiceError> {
        if content_fits(self.format, first) {
            return Ok(());
        }
        let expected = match self.format {
            PackageFormat::TarGz => "a gzip-compressed tar archive",
            PackageFormat::Zip | PackageFormat::Jar => "a zip archive",
            PackageFormat::Plain => "any file",
        };
        Err(ServiceError::invalid(
            "package_format",
            "file_name",
            format!(
                "the content of `{}` is not what its name says: {expected} begins otherwise",
                self.request.file_name
            ),
            "give the file the name of its format, or upload the right file",
        ))
    }

    async fn commit(
        &self,
        digest: Digest,
        size_bytes: u64,
    ) -> Result<(Package, Revision), ServiceError> {
        let package = Package {
            schema: Package::SCHEMA,
            id: PackageId::from_uuid(ids::new_uuid()),
            workspace: self.workspace.name.clone(),
            app: self.app,
            version: self.request.version.clone(),
            file_name: self.request.file_name.clone(),
            format: self.format,
            size_bytes,
            digest,
            remark: self.request.remark.clone(),
            uploaded_by: self.caller.name.clone(),
            created_at: clock::now(),
        };
        let store = &*self.packages.store;
        let ws = self.workspace.name.as_str();
        let id = package.id.to_string();
        let version_key = keys::package_version(ws, self.app, self.request.version.as_str());
        let record = self.record(UploadOutcome::Succeeded {
            package: package.id,
        });
        records::change(store, &self.caller, || async {
            // All of it may have changed while the bytes came in.
            records::get::<Workspace>(store, ws).await?;
            records::get::<Application>(store, &self.app.to_string()).await?;
            self.check_version().await?;
            let txn = records::create(&package)?
                .and(records::refer(Kind::Workspace, ws))
                .and(records::refer(Kind::App, &self.app.to_string()))
                .absent(version_key.clone())
                .put(version_key.clone(), id.clone())
                .put(keys::of_workspace(Kind::Package, ws, &id), "")
                .put(
                    keys::upload(ws, &self.id.to_string()),
                    records::encode(&record),
                );
            Ok((txn, package.clone()))
        })
        .await
    }

    fn record(&self, outcome: UploadOutcome) -> UploadRecord {
        UploadRecord {
            schema: UploadRecord::SCHEMA,
            id: self.id,
            workspace: self.workspace.name.clone(),
            app: self.app,
            version: self.request.version.clone(),
            file_name: self.request.file_name.clone(),
            uploaded_by: self.caller.name.clone(),
            finished_at: clock::now(),
            outcome,
        }
    }

    fn failure(&self, code: &str, reason: String) -> Txn {
        let record = self.record(UploadOutcome::Failed {
            code: code.to_owned(),
            reason,
        });
        let ws = self.workspace.name.as_str();
        // A workspace that is gone keeps no records.
        Txn::new().exists(keys::record(Kind::Workspace, ws)).put(
            keys::upload(ws, &self.id.to_string()),
            records::encode(&record),
        )
    }

    async fn record_failure(&self, error: &ServiceError) {
        let txn = self.failure(error.code(), error.to_string());
        write_failure(&*self.packages.store, self.id, txn).await;
    }
}

async fn write_failure(store: &dyn Store, id: UploadId, txn: Txn) {
    if let Err(error) = records::commit(store, txn).await {
        tracing::error!(
            upload.id = %id,
            error = &error as &dyn std::error::Error,
            "the record of a failed upload could not be written"
        );
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.recorded {
            return;
        }
        self.recorded = true;
        let received = self.received();
        let reason =
            format!("the connection broke off after {received} bytes; upload the file again");
        let txn = self.about.failure("package_truncated", reason);
        let (store, id) = (self.about.packages.store.clone(), self.about.id);
        // Outside a runtime there is nobody to write the record, and the process ends.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { write_failure(&*store, id, txn).await });
        }
    }
}
