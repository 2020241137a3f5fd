//! Housekeeping: removes releases that nothing needs any more, after the new release was found healthy.
//!
//! It is never on the critical path: a file that cannot be removed (immutable, a mount point, owned by somebody else under an
//! agent without root) is a warning at the step that checked the release, and in the agent's log. The removal continues in the
//! background when it takes long; the next release of the same instance waits for it before it unpacks anything.
//!
//! Owns the tasks that remove releases: at most one for each service instance.

use std::{collections::BTreeMap, time::Duration};

use tokio::{sync::Mutex, task::JoinHandle, time::timeout};
use windlass_domain::id::InstanceId;

use crate::{files::chain, instance::InstanceDir};

/// How long a step waits for the removal, so that it can report what could not be removed.
const REPORTED_WITHIN: Duration = Duration::from_secs(5);
/// Warnings that are reported with a step.
const MAX_WARNINGS: usize = 5;

/// Removals that are in progress.
#[derive(Debug, Default)]
pub struct Housekeeping {
    running: Mutex<BTreeMap<InstanceId, JoinHandle<Vec<String>>>>,
}

impl Housekeeping {
    /// Removes old releases of an instance. Returns what could not be removed, as far as it is known soon.
    pub async fn remove_old_releases(&self, id: InstanceId, instance: InstanceDir) -> Vec<String> {
        // Tasks of one instance run one after the other: nothing else starts a removal for it meanwhile.
        self.finish(id).await;
        let mut task = tokio::task::spawn_blocking(move || {
            let warnings: Vec<String> = instance.prune().iter().map(|e| chain(e)).collect();
            for warning in &warnings {
                tracing::warn!(%warning, "failed to remove an old release");
            }
            warnings
        });
        match timeout(REPORTED_WITHIN, &mut task).await {
            Ok(done) => {
                let mut warnings = done.unwrap_or_else(|error| vec![error.to_string()]);
                let more = warnings.len().saturating_sub(MAX_WARNINGS);
                warnings.truncate(MAX_WARNINGS);
                if more > 0 {
                    warnings.push(format!("{more} more"));
                }
                warnings
            }
            Err(_) => {
                self.running.lock().await.insert(id, task);
                Vec::new()
            }
        }
    }

    /// Waits until nothing of an instance is being removed.
    pub async fn finish(&self, id: InstanceId) {
        let task = self.running.lock().await.remove(&id);
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::warn!(%error, "the removal of old releases failed");
        }
    }
}
