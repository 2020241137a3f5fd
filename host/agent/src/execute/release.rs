//! Makes a package a release of its instance.

use std::sync::{Arc, atomic::AtomicBool};

use windlass_domain::task::{PackageRef, Task};

use super::{ActionError, Context, become_user};
use crate::{
    instance::{InstanceDir, check_file_name},
    tree::remove_tree,
    unpack, users,
};

pub(super) async fn unpack_release(
    context: &Arc<Context>,
    task: &Task,
    package: &PackageRef,
    release: &str,
    cancelled: &Arc<AtomicBool>,
) -> Result<(), ActionError> {
    check_file_name(&package.file_name)?;
    if let Some(id) = task.instance {
        context.housekeeping.finish(id).await;
    }
    let user = users::resolve(task.run_as.as_deref(), &context.policy)?;
    let instance = InstanceDir::of(&context.data, task, Some(&user))?;
    // While an application runs, its data stays its user's: it is handed over when the release becomes the installed one.
    if !instance.app().exists() {
        instance.hand_over(&user).await?;
    }
    let source = context.data.cached(&package.digest);
    if !source.is_file() {
        return Err(ActionError::NotCached(package.digest.to_string()));
    }
    let target = instance.release(release)?;
    let installed = instance.installed()?;
    let in_use = [&installed.current, &installed.previous]
        .into_iter()
        .flatten()
        .any(|manifest| manifest.release == release);
    // A release that is installed, or was before it, is left as it is: it may be running.
    if !(in_use && target.is_dir()) {
        remove_tree(&target)?;
        let (context, package, cancelled) = (context.clone(), package.clone(), cancelled.clone());
        let owner = become_user(&user);
        let work = move || {
            unpack::unpack(
                &source,
                &package,
                &target,
                owner.as_ref(),
                &context.policy,
                &cancelled,
            )
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(ActionError::Worker)??;
    }
    instance.describe_release(release, package)?;
    Ok(())
}
