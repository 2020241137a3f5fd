//! One service instance's directory on this server: its releases, what is installed, where its tasks work.
//!
//! Layout: see [`crate::config`]. It must not run anything.
//!
//! **Which release a task means** is in the task: the named one, or the installed one. A named one may not be there yet (before it
//! is unpacked): `WINDLASS_RELEASE_DIR` says where it will be, and scripts start in the instance's directory.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
};

use windlass_domain::{
    manifest::{Installed, Manifest},
    task::{PackageRef, Task},
};

use crate::{
    config::DataDir,
    crash,
    files::{Context as _, FileError, make_dir, read_json, remove_file, sync_dir, write_json},
    tree::{give_tree, remove_tree},
    users::User,
};

/// A service instance's directory.
#[derive(Debug, Clone)]
pub struct InstanceDir {
    path: PathBuf,
    cache: PathBuf,
}

/// Why a release cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// A name that is none.
    #[error(
        "`{0}` is not a release name: letters, digits, `-`, `_` and `.`, at most 200, not starting with `.`"
    )]
    ReleaseName(String),
    /// A file name that is none.
    #[error("`{0}` is not a file name")]
    FileName(String),
    /// Not unpacked.
    #[error("the release `{0}` is not unpacked on this server; unpack it first")]
    NoRelease(String),
    /// The file system.
    #[error(transparent)]
    File(#[from] FileError),
}

impl InstanceDir {
    /// The directory of a task's instance, made when it is missing; what the application writes belongs to `user`. A task of
    /// no instance has a directory that it starts in, and nothing in it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn of(data: &DataDir, task: &Task, user: Option<&User>) -> Result<Self, FileError> {
        let Some(id) = &task.instance else {
            make_dir(&data.server(), 0o711)?;
            return Ok(Self::at(data, data.server()));
        };
        let instance = Self::at(data, data.instance(id));
        make_dir(&instance.releases(), 0o711)?;
        let own = instance.data();
        if !own.is_dir() {
            make_dir(&own, 0o750)?;
            if let Some(user) = user {
                std::os::unix::fs::chown(&own, Some(user.uid), Some(user.gid))
                    .during("give away", &own)?;
            }
        }
        Ok(instance)
    }

    /// Makes the application's own directory `user`'s, with what the owner before had in it.
    ///
    /// # Errors
    /// When something cannot be given away.
    pub async fn hand_over(&self, user: &User) -> Result<(), FileError> {
        let own = self.data();
        let owner = fs::metadata(&own).during("look at", &own)?.uid();
        if owner == user.uid || !rustix::process::geteuid().is_root() {
            return Ok(());
        }
        // There may be a lot of it.
        let (path, uid, gid) = (own.clone(), user.uid, user.gid);
        tokio::task::spawn_blocking(move || give_tree(&path, owner, uid, gid))
            .await
            .map_err(std::io::Error::from)
            .during("give away", &own)?
    }

    /// The directory at a path, as it is.
    #[must_use]
    pub fn at(data: &DataDir, path: PathBuf) -> Self {
        Self {
            path,
            cache: data.cache(),
        }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn releases(&self) -> PathBuf {
        self.path.join("releases")
    }

    /// The link to the installed release.
    #[must_use]
    pub fn current(&self) -> PathBuf {
        self.path.join("current")
    }

    /// The application's own directory, kept over releases.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Shim directories of applications.
    #[must_use]
    pub fn apps(&self) -> PathBuf {
        self.path.join("apps")
    }

    /// The application to keep running.
    #[must_use]
    pub fn app(&self) -> PathBuf {
        self.path.join("app.json")
    }

    fn manifest(&self) -> PathBuf {
        self.path.join("manifest.json")
    }

    fn previous_manifest(&self) -> PathBuf {
        self.path.join("manifest.previous.json")
    }

    /// Where a release is or will be.
    ///
    /// # Errors
    /// When the name is not one.
    pub fn release(&self, name: &str) -> Result<PathBuf, InstanceError> {
        let good = !name.is_empty()
            && name.len() <= 200
            && !name.starts_with('.')
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if !good {
            return Err(InstanceError::ReleaseName(name.chars().take(200).collect()));
        }
        Ok(self.releases().join(name))
    }

    fn release_package(&self, name: &str) -> Result<PathBuf, InstanceError> {
        let mut path = self.release(name)?.into_os_string();
        path.push(".json");
        Ok(path.into())
    }

    /// What is installed.
    ///
    /// # Errors
    /// When a manifest cannot be read.
    pub fn installed(&self) -> Result<Installed, FileError> {
        Ok(Installed {
            current: read_json(&self.manifest())?,
            previous: read_json(&self.previous_manifest())?,
        })
    }

    /// Describes the package of a release that was unpacked. Durable.
    ///
    /// # Errors
    /// When it cannot be recorded.
    pub fn describe_release(
        &self,
        release: &str,
        package: &PackageRef,
    ) -> Result<(), InstanceError> {
        sync_dir(&self.releases())?;
        Ok(write_json(&self.release_package(release)?, package, 0o644)?)
    }

    /// Makes a release the installed one: link and manifests. Every step can be repeated after a crash. Old releases stay until
    /// [`InstanceDir::prune`].
    ///
    /// # Errors
    /// When the release is not there or a step fails.
    pub fn activate(&self, manifest: &Manifest) -> Result<(), InstanceError> {
        let release = self.release(&manifest.release)?;
        if !release.is_dir() {
            return Err(InstanceError::NoRelease(manifest.release.clone()));
        }
        let before = self.installed()?;
        let kept = before.previous.clone();
        let after = activated(before, manifest.clone());
        crash::point("activate_begin");
        if let Some(previous) = &after.previous
            && Some(previous) != kept.as_ref()
        {
            write_json(&self.previous_manifest(), previous, 0o644)?;
        }
        write_json(&self.manifest(), manifest, 0o644)?;
        crash::point("activate_manifest");
        let fresh = self.path.join("current.new");
        remove_file(&fresh)?;
        symlink(Path::new("releases").join(&manifest.release), &fresh)
            .during("make the link", &fresh)?;
        fs::rename(&fresh, self.current()).during("switch", &self.current())?;
        sync_dir(&self.path)?;
        crash::point("activate_switched");
        Ok(())
    }

    /// Removes every release that is neither installed nor the previous one. Continues after a failure.
    #[must_use]
    pub fn prune(&self) -> Vec<FileError> {
        let installed = match self.installed() {
            Ok(installed) => installed,
            Err(error) => return vec![error],
        };
        let keep: Vec<&str> = [&installed.current, &installed.previous]
            .into_iter()
            .flatten()
            .map(|manifest| manifest.release.as_str())
            .collect();
        let dir = self.releases();
        let listed = fs::read_dir(&dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let entries = match listed.during("list", &dir) {
            Ok(entries) => entries,
            Err(error) => return vec![error],
        };
        let is_old = |name: &str| {
            !keep
                .iter()
                .any(|keep| name == *keep || name.strip_suffix(".json") == Some(*keep))
        };
        entries
            .into_iter()
            .filter(|entry| is_old(entry.file_name().to_str().unwrap_or_default()))
            .filter_map(|entry| remove_tree(&entry.path()).err())
            .collect()
    }

    /// Removes what an interrupted unpacking left.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn sweep(&self) -> Result<(), FileError> {
        for entry in fs::read_dir(self.releases())
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry.file_name().to_string_lossy().starts_with(".new-") {
                remove_tree(&entry.path())?;
            }
        }
        Ok(())
    }

    /// The release that a task means; `None`: it names none, and nothing is installed.
    ///
    /// # Errors
    /// When the manifest cannot be read.
    pub fn release_of(&self, task: &Task) -> Result<Option<String>, InstanceError> {
        match &task.release {
            Some(release) => Ok(Some(release.clone())),
            None => Ok(self.installed()?.current.map(|manifest| manifest.release)),
        }
    }

    /// Where a task's scripts start: the release directory, or the instance's own while there is none.
    ///
    /// # Errors
    /// As [`InstanceDir::release_of`], and when the release's name is none.
    pub fn work_dir(&self, task: &Task) -> Result<PathBuf, InstanceError> {
        let release = self
            .release_of(task)?
            .map(|release| self.release(&release))
            .transpose()?;
        Ok(release
            .filter(|dir| dir.is_dir())
            .unwrap_or_else(|| self.path.clone()))
    }

    /// Where a task's relative paths are: a release that is unpacked.
    ///
    /// # Errors
    /// As [`InstanceDir::work_dir`], and when there is no such release.
    pub fn release_dir(&self, task: &Task) -> Result<PathBuf, InstanceError> {
        let release = self.release_of(task)?.unwrap_or_default();
        let dir = self.release(&release).ok().filter(|dir| dir.is_dir());
        dir.ok_or(InstanceError::NoRelease(release))
    }

    /// What the agent adds to a task's environment.
    ///
    /// # Errors
    /// As [`InstanceDir::release_of`].
    pub fn environment(
        &self,
        task: &Task,
        user: &User,
    ) -> Result<BTreeMap<String, String>, InstanceError> {
        let text = |path: &Path| path.display().to_string();
        let mut env: BTreeMap<String, String> = [
            (
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
            ),
            ("LANG", "C.UTF-8".to_owned()),
            ("HOME", user.home.clone()),
            ("USER", user.name.clone()),
            ("LOGNAME", user.name.clone()),
            ("WINDLASS_TASK", task.id.to_string()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
        let Some(instance) = task.instance else {
            return Ok(env);
        };
        let own = [
            ("WINDLASS_INSTANCE", instance.to_string()),
            ("WINDLASS_INSTANCE_DIR", text(&self.path)),
            ("WINDLASS_CURRENT_DIR", text(&self.current())),
            ("WINDLASS_DATA_DIR", text(&self.data())),
        ];
        env.extend(own.map(|(name, value)| (name.to_owned(), value)));
        if let Some(release) = self.release_of(task)? {
            let dir = self.release(&release)?;
            env.insert("WINDLASS_RELEASE_DIR".into(), text(&dir));
            let package: Option<PackageRef> = read_json(&self.release_package(&release)?)?;
            if let Some(package) = package {
                let file = if package.format.is_archive() {
                    self.cache.join(package.digest.to_string())
                } else {
                    dir.join(&package.file_name)
                };
                env.insert("WINDLASS_PACKAGE_FILE".into(), text(&file));
            }
            env.insert("WINDLASS_RELEASE".into(), release);
        }
        Ok(env)
    }
}

/// What is installed after a manifest was activated. Activating the same release again keeps the previous one.
fn activated(before: Installed, manifest: Manifest) -> Installed {
    let previous = match before.current {
        Some(current) if current.release == manifest.release => before.previous,
        replaced => replaced,
    };
    Installed {
        current: Some(manifest),
        previous,
    }
}

/// Whether a package's file name is one name, without directories.
///
/// # Errors
/// When it is not.
pub fn check_file_name(name: &str) -> Result<(), InstanceError> {
    if name.is_empty()
        || name == "."
        || name == ".."
        || name.len() > 255
        || name.contains(['/', '\0'])
    {
        return Err(InstanceError::FileName(name.chars().take(255).collect()));
    }
    Ok(())
}

/// `${NAME}` replaced by the variable of that name. `$${` stands for `${`.
///
/// # Errors
/// With the name, when there is no such variable.
pub fn expand(text: &str, env: &BTreeMap<String, String>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            out.push_str(&rest[..at]);
            out.push('{');
            rest = &rest[at + 2..];
            continue;
        }
        out.push_str(&rest[..at]);
        let Some(end) = rest[at..].find('}') else {
            rest = &rest[at..];
            break;
        };
        let name = &rest[at + 2..at + end];
        out.push_str(env.get(name).ok_or_else(|| name.to_owned())?);
        rest = &rest[at + end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_replaced_once() {
        let env: BTreeMap<String, String> =
            [("A".into(), "${B}".into()), ("B".into(), "b".into())].into();
        for (text, expect) in [
            ("x", Ok("x")),
            ("${B}-${B}", Ok("b-b")),
            ("${A}", Ok("${B}")),
            ("$${B}", Ok("${B}")),
            ("${C}", Err("C")),
            ("$B ${", Ok("$B ${")),
        ] {
            assert_eq!(
                expand(text, &env),
                expect.map(Into::into).map_err(Into::into),
                "{text}"
            );
        }
    }
}
