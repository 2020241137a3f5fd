//! Files of plugins over the API: put into the directory, given back, removed.

use windlass_domain::Digest;
use windlass_runtime::{PluginState, PluginStatus, ProvideError, RemoveError};

use super::PluginService;
use crate::service::{
    Caller, ServiceError,
    plugin_calls::{not_available, rejected},
};

impl PluginService {
    /// Puts a plugin into the plugin directory after every check of a dropped file; live when this returns. Bytes that stand there
    /// already are left as they are, so that a repetition does nothing.
    ///
    /// # Errors
    /// `plugin_rejected` with the reason; `plugin_directory_not_writable`.
    pub async fn upload(
        &self,
        bytes: Vec<u8>,
        signature: Option<Vec<u8>>,
    ) -> Result<PluginStatus, ServiceError> {
        let status = self
            .plugins
            .provide(bytes, signature)
            .await
            .map_err(|error| match error {
                ProvideError::Rejected(rejection) => rejected(&rejection),
                ProvideError::Write { .. } => ServiceError::conflict(
                    "plugin_directory_not_writable",
                    format!("{error}: {}", cause(&error)),
                    "make the directory writable for the server, or put the file there by other means",
                ),
                ProvideError::NotLive { .. } => ServiceError::Unavailable {
                    message: error.to_string(),
                },
            })?;
        match status.digest {
            Some(digest) => self.get(&digest.to_string()),
            None => Ok(status),
        }
    }

    /// The bytes of a version, with their digest.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]; `plugin_not_available` when the bytes are not kept any more.
    pub async fn download(&self, wanted: &str) -> Result<(Digest, Vec<u8>), ServiceError> {
        let status = self.get(wanted)?;
        let (Some(digest), Some(_)) = (status.digest, &status.descriptor) else {
            return Err(ServiceError::not_found("plugin", wanted));
        };
        let bytes = self
            .plugins
            .bytes(digest)
            .await
            .map_err(|error| not_available("", &error))?;
        Ok((digest, bytes))
    }

    /// Deletes a version that nobody uses: its file, its kept bytes, and what was decided about it. A file that was rejected is
    /// deleted by its name.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]; `in_use` with who uses it; `plugin_directory_not_writable`.
    pub async fn delete(&self, caller: Caller, wanted: &str) -> Result<(), ServiceError> {
        let status = self.get(wanted)?;
        let (Some(digest), Some(descriptor)) = (status.digest, status.descriptor.clone()) else {
            let file = status.file.unwrap_or_default();
            return self
                .plugins
                .remove_rejected(&file)
                .await
                .map_err(not_removed);
        };
        self.check_unused(&status, wanted).await?;
        self.plugins.withdraw(digest).await.map_err(not_removed)?;
        // An order that was made before the file went may have been planned with it: its bytes stay then, as for every file that
        // is removed.
        self.check_unused(&status, wanted).await?;
        self.plugins.forget(digest).await.map_err(not_removed)?;
        let name = descriptor.name.clone();
        self.change_decisions(&caller, |decisions| {
            decisions.approved.remove(&digest);
            decisions.failing.remove(&digest);
            decisions
                .disabled
                .remove(&(name.clone(), descriptor.version.clone()));
            if decisions.pinned.get(&name) == Some(&descriptor.version) {
                decisions.pinned.remove(&name);
                decisions.pin_reasons.remove(&name);
            }
        })
        .await
    }

    async fn check_unused(&self, status: &PluginStatus, wanted: &str) -> Result<(), ServiceError> {
        let Some(digest) = status.digest else {
            return Ok(());
        };
        // What makes plans with it is asked only where it is the last version that could: others take over otherwise.
        let users = self.users_of(digest).await?;
        let mut by: Vec<String> = users
            .orders
            .iter()
            .map(|id| format!("order {id}"))
            .collect();
        by.extend(
            users
                .installed
                .iter()
                .map(|installed| format!("installed on {}", installed.server)),
        );
        let is_last = status.descriptor.as_ref().is_some_and(|descriptor| {
            !self.list().iter().any(|other| {
                other.digest != Some(digest)
                    && other.state == PluginState::Active
                    && other
                        .descriptor
                        .as_ref()
                        .is_some_and(|found| found.name == descriptor.name)
            })
        });
        if is_last {
            by.extend(users.apps.iter().map(|app| format!("application {app}")));
        }
        if by.is_empty() {
            Ok(())
        } else {
            Err(ServiceError::in_use("plugin", wanted, &by))
        }
    }
}

fn cause(error: &dyn std::error::Error) -> String {
    error
        .source()
        .map_or_else(String::new, |source| source.to_string())
}

fn not_removed(error: RemoveError) -> ServiceError {
    match error {
        RemoveError::UnknownDigest { digest } => ServiceError::not_found("plugin", digest),
        RemoveError::NoSuchFile { file } => ServiceError::not_found("rejected file", file),
        RemoveError::Provided { .. } => ServiceError::conflict(
            "in_use",
            format!("it was put back meanwhile: {error}"),
            "delete it again",
        ),
        RemoveError::Remove { .. } => ServiceError::conflict(
            "plugin_directory_not_writable",
            format!("{error}: {}", cause(&error)),
            "make the directory writable for the server, or remove the file by other means",
        ),
    }
}
