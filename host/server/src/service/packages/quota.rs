//! How much may be uploaded: a quota for each workspace, and a share of the disk that stays free.
//!
//! What uploads in progress have announced or sent is reserved, so that several at once cannot exceed together what each alone
//! would not. The stored packages of a workspace count with their sizes until they are deleted.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use windlass_domain::{name::WorkspaceName, package::Package, workspace::Workspace};
use windlass_store::{Blobs, Store};

use crate::{
    keys::{self, Kind},
    service::{ServiceError, records},
};

/// Between two checks of the disk while an upload of unknown size arrives.
const CHECK_EVERY_BYTES: u64 = 8 << 20;

/// What uploads in progress have reserved, in bytes.
type Reserved = Arc<Mutex<BTreeMap<WorkspaceName, u64>>>;

/// The limits that all uploads share. Cheap to clone.
#[derive(Clone)]
pub(super) struct Quota {
    reserved: Reserved,
    /// The share of the disk that stays free, in percent.
    disk_reserve_percent: u8,
}

impl Quota {
    pub(super) fn new(disk_reserve_percent: u8) -> Self {
        Self {
            reserved: Reserved::default(),
            disk_reserve_percent,
        }
    }

    /// Reserves space for an upload, of `announced` bytes where that is known.
    ///
    /// # Errors
    /// `upload_quota_reached`, `storage_full`.
    pub(super) async fn reserve(
        &self,
        store: &dyn Store,
        blobs: &Blobs,
        workspace: &Workspace,
        announced: Option<u64>,
    ) -> Result<Reservation, ServiceError> {
        let ws = workspace.name.as_str();
        let below = keys::all_of_workspace(Kind::Package, ws);
        let packages = records::all_indexed::<Package>(store, &below).await?;
        let stored = packages
            .iter()
            .fold(0_u64, |sum, package| sum.saturating_add(package.size_bytes));
        let mut reservation = Reservation {
            quota: self.clone(),
            blobs: blobs.clone(),
            workspace: workspace.name.clone(),
            quota_bytes: workspace.upload_quota_bytes,
            stored,
            reserved: 0,
            received: 0,
            checked: 0,
        };
        reservation.add(announced.unwrap_or(0))?;
        reservation.check_disk().await?;
        Ok(reservation)
    }
}

/// The space that an upload in progress has reserved. Dropping it releases the space.
pub(super) struct Reservation {
    quota: Quota,
    blobs: Blobs,
    workspace: WorkspaceName,
    quota_bytes: u64,
    /// Of the workspace's packages, when the upload began.
    stored: u64,
    reserved: u64,
    received: u64,
    /// Received bytes at the last check of the disk.
    checked: u64,
}

impl Reservation {
    /// Counts bytes that have arrived.
    ///
    /// # Errors
    /// `upload_quota_reached`, `storage_full`.
    pub(super) async fn receive(&mut self, bytes: u64) -> Result<(), ServiceError> {
        self.received = self.received.saturating_add(bytes);
        let more = self.received.saturating_sub(self.reserved);
        if more > 0 {
            self.add(more)?;
        }
        if self.received - self.checked >= CHECK_EVERY_BYTES {
            self.checked = self.received;
            self.check_disk().await?;
        }
        Ok(())
    }

    fn add(&mut self, bytes: u64) -> Result<(), ServiceError> {
        let mut all = self
            .quota
            .reserved
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let reserved = all.entry(self.workspace.clone()).or_default();
        let needed = self.stored.saturating_add(*reserved).saturating_add(bytes);
        if needed > self.quota_bytes {
            if *reserved == 0 {
                all.remove(&self.workspace);
            }
            return Err(ServiceError::Limit {
                code: "upload_quota_reached",
                field: "body".to_owned(),
                message: format!(
                    "The packages of the workspace `{}` have {} bytes. With this upload and those in progress they would have {needed} bytes or more; the quota is {}.",
                    self.workspace, self.stored, self.quota_bytes
                ),
                limit: self.quota_bytes,
                current: needed,
                mend: "Delete packages that are no longer needed, or raise `upload_quota_bytes` of the workspace.".to_owned(),
            });
        }
        *reserved = reserved.saturating_add(bytes);
        self.reserved = self.reserved.saturating_add(bytes);
        Ok(())
    }

    async fn check_disk(&self) -> Result<(), ServiceError> {
        let space = self.blobs.space().await?;
        let Some(space) = space else {
            return Ok(());
        };
        let percent = self.quota.disk_reserve_percent;
        let reserve = space.total_bytes / 100 * u64::from(percent);
        let missing = self.reserved.saturating_sub(self.received);
        let left = space.free_bytes.saturating_sub(missing);
        if left >= reserve {
            return Ok(());
        }
        Err(ServiceError::StorageFull {
            message: format!(
                "The disk of the data directory has {} bytes free. This upload would leave {left} bytes; uploads keep {reserve} bytes ({percent} % of the disk) free.",
                space.free_bytes
            ),
            limit: reserve,
            current: left,
            mend: "Delete packages that are no longer needed, or ask the operator for a larger disk or a smaller `--upload-disk-reserve`.".to_owned(),
        })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut all = self
            .quota
            .reserved
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(reserved) = all.get_mut(&self.workspace) {
            *reserved = reserved.saturating_sub(self.reserved);
            if *reserved == 0 {
                all.remove(&self.workspace);
            }
        }
    }
}
