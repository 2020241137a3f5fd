//! Uploads of packages, streamed, and their records.
//!
//! ```text
//! begin ─► checks (names, duplicate, quota, disk) ─► write* (hashed, counted, examined) ─► finish: verdict ─► one commit
//!   └─ refused ─► upload record                         └─ failed or dropped: nothing is left ─► upload record
//! ```
//! Memory use does not depend on a package's size. The examination (`examine`) is that of the agents, and runs beside hashing and
//! writing. The blob is written first and the commit refers to it; a blob without a reference (a commit that failed) is
//! collected later.

use bytes::Bytes;
use windlass_domain::{
    Digest, Timestamp,
    application::Application,
    id::{AppId, PackageId, UploadId},
    name::{FileName, PackageVersion, check_length},
    package::{Package, UploadOutcome, UploadRecord},
    task::PackageFormat,
    workspace::Workspace,
};
use windlass_store::{BlobDigest, BlobError, BlobWriter, Revision, Store, Txn};

use super::{
    Packages,
    examine::{Declared, Examination},
    quota::Reservation,
};

use crate::{
    clock, ids,
    keys::{self, Kind},
    service::{Caller, ServiceError, records},
};

/// What is said of an upload before its bytes.
#[derive(Debug, Clone)]
pub struct BeginUpload {
    /// Version: unique for the application in the workspace. Without one, it is made from date and time.
    pub version: Option<PackageVersion>,
    /// The file's name.
    pub file_name: FileName,
    /// What the file is; its content and name decide unless it is given.
    pub kind: Option<windlass_archive::Kind>,
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
    /// `version_taken`, `package_too_large` by the announced size, `upload_quota_reached`, `storage_full`, a remark that is too
    /// long: an upload record is left.
    /// [`ServiceError::NotFound`] of the workspace or application: none is.
    pub async fn begin(
        &self,
        caller: Caller,
        ws: &str,
        app: AppId,
        request: BeginUpload,
    ) -> Result<Upload, ServiceError> {
        let about = self.about(caller, ws, app, request).await?;
        match about.check().await {
            Ok((writer, reservation)) => {
                let examination = self.examiners.begin(Declared {
                    file_name: about.request.file_name.as_str().to_owned(),
                    kind: about.request.kind,
                    max_bytes: about
                        .request
                        .content_length
                        .unwrap_or(about.workspace.package_limit_bytes),
                });
                Ok(Upload {
                    about,
                    writer: Some(writer),
                    examination: Some(examination),
                    reservation,
                    recorded: false,
                })
            }
            Err(error) => {
                about.record_failure(&error).await;
                Err(error)
            }
        }
    }

    /// Records that an upload was refused before anything of it was read.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] of the workspace or application.
    pub async fn record_refused(
        &self,
        caller: Caller,
        ws: &str,
        app: AppId,
        request: BeginUpload,
        code: &str,
        reason: String,
    ) -> Result<(), ServiceError> {
        let about = self.about(caller, ws, app, request).await?;
        let txn = about.failure(code, reason);
        write_failure(&*self.store, about.id, txn).await;
        Ok(())
    }

    async fn about(
        &self,
        caller: Caller,
        ws: &str,
        app: AppId,
        request: BeginUpload,
    ) -> Result<About, ServiceError> {
        let store = &*self.store;
        let (workspace, _) = records::get::<Workspace>(store, ws).await?;
        records::get::<Application>(store, &app.to_string()).await?;
        let version = match &request.version {
            Some(version) => version.clone(),
            None => self.free_version(ws, app, clock::now()).await?,
        };
        Ok(About {
            id: UploadId::from_uuid(ids::new_uuid()),
            packages: self.clone(),
            caller,
            workspace,
            app,
            version,
            request,
        })
    }

    /// A version from date and time (UTC) that is not taken: `20261201-143005`, then `20261201-143005-2` and so on.
    async fn free_version(
        &self,
        ws: &str,
        app: AppId,
        now: Timestamp,
    ) -> Result<PackageVersion, ServiceError> {
        let mut number = 1_u64;
        loop {
            let version = version_of_time(now, number)?;
            let key = keys::package_version(ws, app, version.as_str());
            if records::indexed(&*self.store, &key).await?.is_none() {
                return Ok(version);
            }
            number += 1;
        }
    }
}

fn version_of_time(now: Timestamp, number: u64) -> Result<PackageVersion, ServiceError> {
    // RFC 3339 without its separators: `2026-12-01T14:30:05.123Z`.
    let text: String = now
        .to_string()
        .chars()
        .take_while(|char| *char != '.')
        .filter_map(|char| match char {
            'T' => Some('-'),
            char if char.is_ascii_digit() => Some(char),
            _ => None,
        })
        .collect();
    let text = match number {
        1 => text,
        number => format!("{text}-{number}"),
    };
    text.parse()
        .map_err(|error| ServiceError::of_value(("version", error)))
}

/// An upload in progress. Dropping it ends it like a failure: nothing but an upload record is left.
pub struct Upload {
    about: About,
    /// `None` once the upload has failed.
    writer: Option<BlobWriter>,
    /// Likewise.
    examination: Option<Examination>,
    reservation: Reservation,
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
    /// As requested, or made from the time at which the upload began.
    version: PackageVersion,
    request: BeginUpload,
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
    /// `package_too_large`, `package_format`, `package_refused`, `upload_quota_reached`, `storage_full`.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), ServiceError> {
        match self.add(bytes).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.fail(error).await),
        }
    }

    /// Ends the file and makes the package.
    ///
    /// # Errors
    /// `package_empty`, `package_truncated`, `package_digest`, `package_format`, `package_refused`, `version_taken`: an upload
    /// record is left.
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
        let (Some(writer), Some(examination)) = (&mut self.writer, &mut self.examination) else {
            return Err(BlobError::WriterFailed.into());
        };
        let length = bytes.len() as u64;
        self.reservation.receive(length).await?;
        let would_be = writer.size_bytes() + length;
        // The examination goes on in its thread while this piece is hashed and written.
        examination.add(&bytes).await?;
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
        let (Some(mut writer), Some(mut examination)) =
            (self.writer.take(), self.examination.take())
        else {
            return Err(BlobError::WriterFailed.into());
        };
        let file = if examination.needs_file().await? {
            Some(writer.reopen().await?)
        } else {
            None
        };
        let format = examination.finish(file).await?;
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
        self.about.commit(digest, written.size_bytes, format).await
    }

    /// Ends the upload and records why. Gives the error back.
    async fn fail(&mut self, error: ServiceError) -> ServiceError {
        // Dropped: nothing of the blob is left.
        self.writer = None;
        self.examination = None;
        if !std::mem::replace(&mut self.recorded, true) {
            self.about.record_failure(&error).await;
        }
        error
    }
}

impl About {
    /// Checks everything that can be checked before the first byte. Returns the writer of the file and its reserved space.
    async fn check(&self) -> Result<(BlobWriter, Reservation), ServiceError> {
        check_length("the remark", &self.request.remark, 0, 500)
            .map_err(|error| ServiceError::of_value(("remark", error)))?;
        let limit_bytes = self.workspace.package_limit_bytes;
        if let Some(announced) = self.request.content_length
            && announced > limit_bytes
        {
            return Err(self.too_large(announced));
        }
        self.check_version().await?;
        let Packages {
            store,
            blobs,
            quota,
            ..
        } = &self.packages;
        let announced = self.request.content_length;
        let reservation = quota
            .reserve(&**store, blobs, &self.workspace, announced)
            .await?;
        Ok((blobs.writer(limit_bytes).await?, reservation))
    }

    async fn check_version(&self) -> Result<(), ServiceError> {
        let (version, ws) = (self.version.as_str(), self.workspace.name.as_str());
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

    async fn commit(
        &self,
        digest: Digest,
        size_bytes: u64,
        format: PackageFormat,
    ) -> Result<(Package, Revision), ServiceError> {
        let package = Package {
            schema: Package::SCHEMA,
            id: PackageId::from_uuid(ids::new_uuid()),
            workspace: self.workspace.name.clone(),
            app: self.app,
            version: self.version.clone(),
            file_name: self.request.file_name.clone(),
            format,
            size_bytes,
            digest,
            remark: self.request.remark.clone(),
            uploaded_by: self.caller.name.clone(),
            created_at: clock::now(),
        };
        let store = &*self.packages.store;
        let ws = self.workspace.name.as_str();
        let id = package.id.to_string();
        let generated = self.request.version.is_none();
        records::change(store, &self.caller, || async {
            // All of it may have changed while the bytes came in.
            records::get::<Workspace>(store, ws).await?;
            records::get::<Application>(store, &self.app.to_string()).await?;
            let mut package = package.clone();
            if generated {
                // Another upload of the same second may have taken the version meanwhile.
                let now = package.created_at;
                package.version = self.packages.free_version(ws, self.app, now).await?;
            } else {
                self.check_version().await?;
            }
            let version_key = keys::package_version(ws, self.app, package.version.as_str());
            let mut record = self.record(UploadOutcome::Succeeded {
                package: package.id,
            });
            record.version = package.version.clone();
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
            Ok((txn, package))
        })
        .await
    }

    fn record(&self, outcome: UploadOutcome) -> UploadRecord {
        UploadRecord {
            schema: UploadRecord::SCHEMA,
            id: self.id,
            workspace: self.workspace.name.clone(),
            app: self.app,
            version: self.version.clone(),
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
