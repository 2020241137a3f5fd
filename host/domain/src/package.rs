//! Packages and the records of their uploads. Source: spec "Packages".

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    id::{AppId, PackageId, UploadId},
    name::{FileName, PackageVersion, WorkspaceName},
    task::{PackageFormat, PackageRef},
    time::Timestamp,
};

/// An uploaded build of an application.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Package {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: PackageId,
    /// Workspace.
    pub workspace: WorkspaceName,
    /// Application.
    pub app: AppId,
    /// Version: unique for the application in the workspace.
    pub version: PackageVersion,
    /// The file's name.
    pub file_name: FileName,
    /// How it is packed.
    pub format: PackageFormat,
    /// Size in bytes.
    pub size_bytes: u64,
    /// SHA-256 of the file.
    pub digest: Digest,
    /// Remark, at most 500 characters.
    #[serde(default)]
    pub remark: String,
    /// Who uploaded it.
    pub uploaded_by: String,
    /// When.
    pub created_at: Timestamp,
}

impl Package {
    /// The current [`Package::schema`].
    pub const SCHEMA: u32 = 1;

    /// The package as agents know it.
    #[must_use]
    pub fn reference(&self) -> PackageRef {
        PackageRef {
            digest: self.digest,
            size_bytes: self.size_bytes,
            format: self.format,
            file_name: self.file_name.as_str().to_owned(),
            version: self.version.as_str().to_owned(),
        }
    }
}

/// One attempt to upload a package; kept also when it failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct UploadRecord {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: UploadId,
    /// Workspace.
    pub workspace: WorkspaceName,
    /// Application.
    pub app: AppId,
    /// Version.
    pub version: PackageVersion,
    /// The file's name.
    pub file_name: FileName,
    /// Who.
    pub uploaded_by: String,
    /// When it ended.
    pub finished_at: Timestamp,
    /// How it ended.
    pub outcome: UploadOutcome,
}

impl UploadRecord {
    /// The current [`UploadRecord::schema`].
    pub const SCHEMA: u32 = 1;
}

/// How an upload ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum UploadOutcome {
    /// It made this package.
    Succeeded {
        /// The package.
        package: PackageId,
    },
    /// It made none.
    Failed {
        /// Stable code of the error.
        code: String,
        /// What was wrong.
        reason: String,
    },
}
