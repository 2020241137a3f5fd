//! What is known of every file and every plugin; pure lookups, and what an operator decided.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use semver::{Version, VersionReq};
use windlass_domain::{digest::Digest, plugin::Descriptor};

use super::{Decisions, PluginState, PluginStatus};
use crate::{
    directory::Stamp,
    error::{LookupError, Rejection},
    keep::Known,
    plugin::{Loaded, Plugin},
};

/// Loaded plugins that no file provides any more and nobody uses: so many stay, for orders that come back to them.
const MAX_IDLE_RETIRED: usize = 16;

#[derive(Default)]
pub(super) struct Table {
    pub(super) files: BTreeMap<String, FileEntry>,
    pub(super) loaded: HashMap<Digest, Arc<Loaded>>,
    pub(super) known: BTreeMap<Digest, Known>,
    pub(super) decisions: Decisions,
}

#[derive(Debug, Default)]
pub(super) struct FileEntry {
    /// What was last looked at; `None`: the file could not even be looked at.
    pub(super) stamp: Option<Stamp>,
    pub(super) loading: bool,
    /// Of the bytes that were last read.
    pub(super) digest: Option<Digest>,
    pub(super) size_bytes: Option<u64>,
    pub(super) rejection: Option<Rejection>,
    /// The accepted plugin that this file provides, or provided before it was replaced by something that was rejected.
    pub(super) active: Option<Digest>,
}

impl Table {
    /// Digests that a file provides, with that file.
    pub(super) fn provided(&self) -> BTreeMap<Digest, &str> {
        self.files
            .iter()
            .filter_map(|(name, entry)| Some((entry.active?, name.as_str())))
            .collect()
    }

    /// The file that provides the same name and version with other bytes. A file that was overwritten still provides its
    /// accepted bytes, so it can be found itself.
    pub(super) fn provider_of(
        &self,
        plugin: &str,
        version: &Version,
        digest: Digest,
    ) -> Option<String> {
        self.files.iter().find_map(|(name, entry)| {
            let active = entry.active.filter(|active| *active != digest)?;
            let known = self.known.get(&active)?;
            let same = known.descriptor.name == plugin && known.descriptor.version == *version;
            same.then(|| name.clone())
        })
    }

    pub(super) fn is_approved(&self, digest: Digest) -> bool {
        self.decisions.approved.contains(&digest)
            || self.known.get(&digest).is_some_and(|known| {
                known.descriptor.wishes.users.is_empty()
                    && known.descriptor.wishes.path_roots.is_empty()
            })
    }

    pub(super) fn is_enabled(&self, digest: Digest, descriptor: &Descriptor) -> bool {
        !self.decisions.revoked.contains(&digest)
            && !self
                .decisions
                .disabled
                .contains(&(descriptor.name.clone(), descriptor.version.clone()))
    }

    /// Whether a digest that a file provides can be planned with.
    fn is_candidate(&self, digest: Digest, descriptor: &Descriptor) -> bool {
        self.is_enabled(digest, descriptor) && self.loaded.contains_key(&digest)
    }

    /// Enabled plugins of a name that a file provides, highest version last; pre-releases stand below every release.
    pub(super) fn candidates(&self, name: &str) -> Vec<(Version, Digest)> {
        let mut versions: Vec<_> = self
            .files
            .values()
            .filter_map(|entry| {
                let digest = entry.active?;
                let descriptor = &self.known.get(&digest)?.descriptor;
                (descriptor.name == name && self.is_candidate(digest, descriptor))
                    .then(|| (descriptor.version.clone(), digest))
            })
            .collect();
        sort_versions(&mut versions);
        versions
    }

    /// Of every name, in one pass: a directory of a thousand files is listed as cheaply as it is read.
    fn defaults(&self) -> BTreeSet<Digest> {
        let mut by_name: BTreeMap<&str, Vec<(Version, Digest)>> = BTreeMap::new();
        for entry in self.files.values() {
            if let Some(digest) = entry.active
                && let Some(known) = self.known.get(&digest)
                && self.is_candidate(digest, &known.descriptor)
            {
                by_name
                    .entry(&known.descriptor.name)
                    .or_default()
                    .push((known.descriptor.version.clone(), digest));
            }
        }
        by_name
            .into_iter()
            .filter_map(|(name, mut versions)| {
                sort_versions(&mut versions);
                self.choose(name, &versions)
            })
            .collect()
    }

    fn choose(&self, name: &str, candidates: &[(Version, Digest)]) -> Option<Digest> {
        self.decisions
            .pinned
            .get(name)
            .and_then(|pinned| candidates.iter().find(|(version, _)| version == pinned))
            .or(candidates.last())
            .map(|(_, digest)| *digest)
    }

    /// Why the default of a name is not simply its highest version; `None` if the name is not pinned.
    pub(super) fn pin(&self, name: &str) -> Option<String> {
        let version = self.decisions.pinned.get(name)?;
        let mut text = format!("pinned to {version}");
        if let Some(reason) = self.decisions.pin_reasons.get(name) {
            text.push_str(" by ");
            text.push_str(reason);
        }
        let is_usable = self
            .candidates(name)
            .iter()
            .any(|(candidate, _)| candidate == version);
        if !is_usable {
            text.push_str(
                "; this version is not active, so the highest active version is the default",
            );
        }
        Some(text)
    }

    /// Logs that a version which has just become active is not the default, although it is higher than the pinned one.
    pub(super) fn log_held_back(&self, descriptor: &Descriptor) {
        let (name, version) = (&descriptor.name, &descriptor.version);
        let is_higher = self
            .decisions
            .pinned
            .get(name)
            .is_some_and(|pinned| pinned < version);
        let is_default = self
            .choose(name, &self.candidates(name))
            .and_then(|digest| self.known.get(&digest))
            .is_some_and(|known| known.descriptor.version == *version);
        if is_higher
            && !is_default
            && let Some(pin) = self.pin(name)
        {
            tracing::warn!(
                plugin.name = name,
                plugin.version = %version,
                "the new version is active but not the default: the plugin is {pin}. Unpin the plugin to use its highest version"
            );
        }
    }

    pub(super) fn get(
        &self,
        name: &str,
        wanted: Option<&VersionReq>,
    ) -> Result<Plugin, LookupError> {
        let candidates = self.candidates(name);
        if candidates.is_empty() {
            return Err(LookupError::NoSuchPlugin {
                name: name.to_owned(),
            });
        }
        let digest = match wanted {
            None => self.choose(name, &candidates),
            Some(wanted) => candidates
                .iter()
                .rev()
                .find(|(version, _)| wanted.matches(version))
                .map(|(_, digest)| *digest),
        };
        digest
            .and_then(|digest| self.loaded.get(&digest))
            .map(|loaded| Plugin::new(Arc::clone(loaded)))
            .ok_or_else(|| LookupError::NoSuchVersion {
                name: name.to_owned(),
                wanted: wanted.map(ToString::to_string).unwrap_or_default(),
                active: candidates
                    .iter()
                    .map(|(version, _)| version.to_string())
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    pub(super) fn list(&self) -> Vec<PluginStatus> {
        let provided = self.provided();
        let defaults = self.defaults();
        let pins: BTreeMap<&String, String> = self
            .decisions
            .pinned
            .keys()
            .filter_map(|name| Some((name, self.pin(name)?)))
            .collect();
        let mut plugins: Vec<PluginStatus> = self
            .known
            .iter()
            .map(|(digest, known)| {
                let file = provided.get(digest).map(|name| (*name).to_owned());
                PluginStatus {
                    state: if self.decisions.revoked.contains(digest) {
                        PluginState::Revoked
                    } else if file.is_none() {
                        PluginState::Retired
                    } else if self.is_enabled(*digest, &known.descriptor) {
                        PluginState::Active
                    } else {
                        PluginState::Disabled
                    },
                    file,
                    digest: Some(*digest),
                    rejection: None,
                    kind: Some(known.kind),
                    descriptor: Some(Arc::clone(&known.descriptor)),
                    is_default: defaults.contains(digest),
                    pin: pins.get(&known.descriptor.name).cloned(),
                    approved: self.is_approved(*digest),
                    size_bytes: Some(known.size_bytes),
                    signed_by: known.signed_by.clone(),
                    failing: self.decisions.failing.get(digest).cloned(),
                    figures: None,
                }
            })
            .collect();
        plugins.sort_by(|one, two| {
            let key = |status: &PluginStatus| {
                status
                    .descriptor
                    .as_ref()
                    .map(|descriptor| (descriptor.name.clone(), descriptor.version.clone()))
            };
            (key(one), one.digest).cmp(&(key(two), two.digest))
        });
        plugins.extend(self.files.iter().filter_map(|(name, entry)| {
            let state = match (entry.loading, &entry.rejection) {
                (true, _) => PluginState::Loading,
                (false, Some(_)) => PluginState::Rejected,
                (false, None) => return None,
            };
            Some(PluginStatus {
                file: Some(name.clone()),
                digest: entry.digest.filter(|_| !entry.loading),
                state,
                rejection: entry.rejection.clone().filter(|_| !entry.loading),
                kind: None,
                descriptor: None,
                is_default: false,
                pin: None,
                approved: false,
                size_bytes: entry.size_bytes.filter(|_| !entry.loading),
                signed_by: None,
                failing: None,
                figures: None,
            })
        }));
        plugins
    }

    pub(super) fn retired(&mut self, digest: Digest) {
        if self.provided().contains_key(&digest) {
            return;
        }
        if let Some(known) = self.known.get(&digest) {
            tracing::info!(
                plugin.name = known.descriptor.name,
                plugin.version = %known.descriptor.version,
                plugin.digest = %digest,
                "plugin is retired; running orders keep it"
            );
        }
        self.drop_idle_retired();
    }

    /// Unloads retired plugins that nobody uses, beyond a number that stays.
    pub(super) fn drop_idle_retired(&mut self) {
        let provided: BTreeSet<Digest> = self.provided().into_keys().collect();
        let idle: Vec<Digest> = self
            .loaded
            .iter()
            .filter(|(digest, loaded)| {
                !provided.contains(*digest) && Arc::strong_count(loaded) == 1
            })
            .map(|(digest, _)| *digest)
            .collect();
        for digest in idle.into_iter().skip(MAX_IDLE_RETIRED) {
            self.loaded.remove(&digest);
        }
    }
}

/// Rising; pre-releases stand below every release.
fn sort_versions(versions: &mut [(Version, Digest)]) {
    versions
        .sort_by(|(one, _), (two, _)| (one.pre.is_empty(), one).cmp(&(two.pre.is_empty(), two)));
}
