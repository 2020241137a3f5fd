//! Plugins: their list, and what operators decide about them. Source: design, "Plugins", "Consent".
//!
//! The runtime's registry acts on decisions; this keeps them in one row. A decision is durable before the registry acts on it.
//! Plugins that ship with the platform are approved once, when they are first seen, unless they want `root`: what an operator
//! withdraws later stays withdrawn.

mod files;
mod users;

use std::{collections::BTreeSet, path::Path, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use windlass_domain::{Digest, manifest::PluginRef};
use windlass_runtime::{Decisions, Failing, Figures, PluginState, PluginStatus, Plugins};
use windlass_store::{Blobs, Prefix, Store, Txn, VALUE_MAX_BYTES, WatchError};

use super::{
    Caller, ServiceError,
    plugin_events::{PluginEventKind, PluginEvents},
    records,
};
use crate::keys;
pub use users::{PluginUsers, UsedBy, VersionUsers};

/// Characters of the reason that is stored with a pin.
const PIN_REASON_MAX_CHARS: usize = 120;

/// What an operator decides about one plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Grant its wishes (OS users, path roots).
    Approve,
    /// Withdraw the grant.
    Disapprove,
    /// Make new plans with this version again.
    Enable,
    /// Make no new plans with this version.
    Disable,
    /// Never call this digest again; running orders that need it block.
    Revoke,
    /// Let this digest be called again.
    Reinstate,
    /// Make this version what the bare name stands for.
    Pin,
    /// Let the highest enabled version be the default again.
    Unpin,
    /// It failed again and again, and was looked at: it counts anew.
    ClearFailing,
}

/// The row.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Row {
    #[serde(default)]
    schema: u32,
    decisions: Decisions,
    /// Plugins of the platform that were approved once.
    #[serde(default)]
    built_in: BTreeSet<Digest>,
}

/// Plugins. Cheap to clone.
#[derive(Clone)]
pub struct PluginService {
    store: Arc<dyn Store>,
    blobs: Blobs,
    plugins: Arc<Plugins>,
    figures: Arc<Figures>,
    /// The registry is given what is stored by one task at a time: an older reading never replaces a newer one.
    applying: Arc<tokio::sync::Mutex<()>>,
}

impl PluginService {
    /// Over a store and its blobs (plans), the registry and the figures of its calls.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        blobs: Blobs,
        plugins: Arc<Plugins>,
        figures: Arc<Figures>,
    ) -> Self {
        Self {
            store,
            blobs,
            plugins,
            figures,
            applying: Arc::default(),
        }
    }

    /// What operators decided so far: what the registry is opened with.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn load_decisions(store: &dyn Store) -> Result<Decisions, ServiceError> {
        Ok(read(store).await?.0.decisions)
    }

    /// Every plugin, and every file that is loading or rejected; by name, version and file.
    #[must_use]
    pub fn list(&self) -> Vec<PluginStatus> {
        let mut list = self.plugins.list();
        for status in &mut list {
            // Files that are no plugins have no figures.
            if let (Some(_), Some(digest)) = (&status.descriptor, status.digest) {
                status.figures = Some(self.figures.of(digest));
            }
        }
        list
    }

    /// The plugin that a text names: a digest, `name@version`, a file of the plugin directory, or a name, which stands for its
    /// default version.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub fn get(&self, wanted: &str) -> Result<PluginStatus, ServiceError> {
        find(self.list(), wanted)
    }

    /// Decides about a plugin, named as for [`PluginService::get`].
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]; `plugin_rejected` for a file that is not a plugin; a limit when there are too many decisions.
    pub async fn decide(
        &self,
        caller: Caller,
        wanted: &str,
        decision: Decision,
    ) -> Result<PluginStatus, ServiceError> {
        let status = self.get(wanted)?;
        let (Some(digest), Some(descriptor)) = (status.digest, status.descriptor.clone()) else {
            let rejected = status.rejection.map(|rejection| rejection.to_string());
            return Err(ServiceError::conflict(
                "plugin_rejected",
                format!(
                    "`{wanted}` is not a plugin: {}",
                    rejected.unwrap_or_else(|| "it is still loading".to_owned())
                ),
                "mend the file, or decide about an accepted plugin",
            ));
        };
        let version = (descriptor.name.clone(), descriptor.version.clone());
        let store = &*self.store;
        let reference = PluginRef {
            name: version.0.clone(),
            version: version.1.clone(),
            digest,
        };
        records::change_showing(
            store,
            &caller,
            |()| serde_json::json!({"digest": digest, "decision": decision}),
            || async {
                let (mut row, guard) = read(store).await?;
                let failing = row.decisions.failing.contains_key(&digest);
                apply(&mut row.decisions, digest, &version, decision, &caller.name);
                let mut txn = write(&row, guard)?;
                if decision == Decision::ClearFailing && failing {
                    txn = txn.and(PluginEvents::put(
                        PluginEventKind::FailingCleared,
                        &reference,
                        &caller.name,
                        "an operator looked at it",
                    ));
                }
                Ok((txn, ()))
            },
        )
        .await?;
        if decision == Decision::ClearFailing {
            self.figures.forget_row(digest);
        }
        self.refresh().await?;
        self.get(&digest.to_string())
    }

    /// Approves plugins that ship with the platform and are accepted by now, each once in its life. One that wants `root` is
    /// left to an operator. Returns how many were approved.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn approve_built_ins(
        &self,
        shipped: &BTreeSet<Digest>,
    ) -> Result<usize, ServiceError> {
        let accepted: Vec<(Digest, bool)> = self
            .list()
            .into_iter()
            .filter_map(|status| {
                let digest = status.digest.filter(|digest| shipped.contains(digest))?;
                let wants_root = status
                    .descriptor?
                    .wishes
                    .users
                    .iter()
                    .any(|user| user == "root");
                Some((digest, wants_root))
            })
            .collect();
        let store = &*self.store;
        let caller = Caller::default();
        let (approved, _) = records::change(store, &caller, || async {
            let (mut row, guard) = read(store).await?;
            let mut count = 0;
            for (digest, wants_root) in &accepted {
                if !wants_root && row.built_in.insert(*digest) {
                    row.decisions.approved.insert(*digest);
                    count += 1;
                }
            }
            Ok((write(&row, guard)?, count))
        })
        .await?;
        self.refresh().await?;
        Ok(approved)
    }

    /// The digests of the `.wasm` files of the directory that ships with the platform; none where there is no such directory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn shipped_in(dir: &Path) -> std::io::Result<BTreeSet<Digest>> {
        let mut shipped = BTreeSet::new();
        let mut files = match tokio::fs::read_dir(dir).await {
            Ok(files) => files,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(shipped),
            Err(error) => return Err(error),
        };
        while let Some(file) = files.next_entry().await? {
            let path = file.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "wasm")
            {
                shipped.insert(Digest::of(&tokio::fs::read(path).await?));
            }
        }
        Ok(shipped)
    }

    /// Marks versions that failed again and again until `stop`. Run by one owned task. Nothing is switched: the mark and the event
    /// are for an operator.
    pub async fn mark_failing(
        &self,
        mut reports: mpsc::Receiver<Failing>,
        stop: CancellationToken,
    ) {
        loop {
            let report = tokio::select! {
                () = stop.cancelled() => return,
                report = reports.recv() => report,
            };
            let Some(report) = report else { return };
            if let Err(error) = self.mark(&report).await {
                tracing::error!(
                    plugin.name = report.plugin.name,
                    error = &error as &dyn std::error::Error,
                    "a plugin that fails again and again was not marked; its next failure tries again"
                );
            }
        }
    }

    async fn mark(&self, report: &Failing) -> Result<(), ServiceError> {
        let store = &*self.store;
        let digest = report.plugin.digest;
        if read(store).await?.0.decisions.failing.contains_key(&digest) {
            return Ok(());
        }
        let message = format!(
            "`{}` failed {} times in a row, last with {}: {}",
            report.export, report.failures, report.failure.code, report.failure.message
        );
        tracing::error!(
            plugin.name = report.plugin.name,
            plugin.version = %report.plugin.version,
            plugin.digest = %digest,
            "a plugin is failing: {message}. It is called all the same: disable it, or clear the mark"
        );
        let caller = Caller::default();
        records::change(store, &caller, || async {
            let (mut row, guard) = read(store).await?;
            let mut report = report.clone();
            report.failure.message = report.failure.message.chars().take(300).collect();
            row.decisions.failing.insert(digest, report.clone());
            let txn = write(&row, guard)?.and(PluginEvents::put(
                PluginEventKind::Failing,
                &report.plugin,
                "windlass",
                &message,
            ));
            Ok((txn, ()))
        })
        .await?;
        self.refresh().await
    }

    /// The part of a transaction that makes a version the default. `by` is who or what pinned it, as shown at the plugin.
    pub(crate) async fn pinning(&self, plugin: &PluginRef, by: &str) -> Result<Txn, ServiceError> {
        let (mut row, guard) = read(&*self.store).await?;
        apply(
            &mut row.decisions,
            plugin.digest,
            &(plugin.name.clone(), plugin.version.clone()),
            Decision::Pin,
            by,
        );
        write(&row, guard)
    }

    /// Gives the registry what is stored.
    pub(crate) async fn refresh(&self) -> Result<(), ServiceError> {
        let _turn = self.applying.lock().await;
        let stored = read(&*self.store).await?.0.decisions;
        self.plugins.decide(|decisions| *decisions = stored);
        Ok(())
    }

    /// Follows the row until `stop`: what other servers decide reaches this registry. Run by one owned task.
    ///
    /// # Errors
    /// Those of the store: the owner should start it again after a pause.
    pub async fn follow(&self, stop: CancellationToken) -> Result<(), ServiceError> {
        let prefix = Prefix::from_bytes(keys::plugin_decisions().to_bytes())
            .map_err(windlass_store::StoreError::from)?;
        loop {
            let from = self.store.revision().await?;
            let mut watch = match self.store.watch(&prefix, from).await {
                Ok(watch) => watch,
                Err(WatchError::Closed) => return Ok(()),
                Err(WatchError::Compacted { .. }) => continue,
            };
            self.refresh().await?;
            loop {
                let event = tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    event = watch.next() => event,
                };
                match event {
                    Ok(_) => self.refresh().await?,
                    Err(WatchError::Compacted { .. }) => break,
                    Err(WatchError::Closed) => return Ok(()),
                }
            }
        }
    }
}

fn find(list: Vec<PluginStatus>, wanted: &str) -> Result<PluginStatus, ServiceError> {
    let rank = |status: &PluginStatus| {
        let is_digest = status
            .digest
            .is_some_and(|digest| digest.to_string() == wanted);
        let of_name = |matches: &dyn Fn(&str, String) -> bool| {
            status.descriptor.as_ref().is_some_and(|descriptor| {
                matches(
                    &descriptor.name,
                    format!("{}@{}", descriptor.name, descriptor.version),
                )
            })
        };
        let is_version = of_name(&|_, version| version == wanted);
        let is_name = of_name(&|name, _| name == wanted);
        // Of several with one version, retired and revoked bytes among them, the living one is meant.
        let is_living = matches!(
            status.state,
            PluginState::Active | PluginState::Disabled | PluginState::Loading
        );
        match (is_digest, is_version, is_name) {
            (true, _, _) => Some(0),
            (false, true, _) => Some(if is_living { 1 } else { 2 }),
            (false, false, true) if status.is_default => Some(3),
            (false, false, true) => Some(if is_living { 4 } else { 5 }),
            (false, false, false) => (status.file.as_deref() == Some(wanted)).then_some(6),
        }
    };
    list.into_iter()
        .filter_map(|status| Some((rank(&status)?, status)))
        .min_by_key(|(rank, _)| *rank)
        .map(|(_, status)| status)
        .ok_or_else(|| ServiceError::not_found("plugin", wanted))
}

/// The row, and what a transaction that replaces it requires.
async fn read(store: &dyn Store) -> Result<(Row, Txn), ServiceError> {
    let key = keys::plugin_decisions();
    Ok(match store.get(&key).await? {
        None => (Row::default(), Txn::new().absent(key)),
        Some(entry) => (
            records::decode_plain(&entry, "decisions about plugins")?,
            Txn::new().revision_is(key, entry.revision),
        ),
    })
}

async fn apply_change(
    store: &dyn Store,
    caller: &Caller,
    change: impl Fn(&mut Decisions) + Send + Sync,
) -> Result<(), ServiceError> {
    records::change(store, caller, || async {
        let (mut row, guard) = read(store).await?;
        change(&mut row.decisions);
        Ok((write(&row, guard)?, ()))
    })
    .await?;
    Ok(())
}

fn write(row: &Row, guard: Txn) -> Result<Txn, ServiceError> {
    let row = Row {
        schema: 1,
        ..row.clone()
    };
    let value = records::encode(&row);
    if value.len() > VALUE_MAX_BYTES {
        return Err(ServiceError::Limit {
            code: "too_many_decisions",
            field: String::new(),
            message: format!(
                "the decisions about plugins have {} bytes, at most {VALUE_MAX_BYTES} are kept",
                value.len()
            ),
            limit: VALUE_MAX_BYTES as u64,
            current: value.len() as u64,
            mend: "take decisions back that are no longer needed: of plugins that are gone"
                .to_owned(),
        });
    }
    Ok(guard.put(keys::plugin_decisions(), value))
}

/// Changes the decisions. `by` is who or what decided; it is shown at a pinned plugin.
fn apply(
    decisions: &mut Decisions,
    digest: Digest,
    version: &(String, semver::Version),
    decision: Decision,
    by: &str,
) {
    match decision {
        Decision::Approve => {
            decisions.approved.insert(digest);
        }
        Decision::Disapprove => {
            decisions.approved.remove(&digest);
        }
        Decision::Enable => {
            decisions.disabled.remove(version);
        }
        Decision::Disable => {
            decisions.disabled.insert(version.clone());
        }
        Decision::Revoke => {
            decisions.revoked.insert(digest);
        }
        Decision::Reinstate => {
            decisions.revoked.remove(&digest);
        }
        Decision::Pin => {
            decisions
                .pinned
                .insert(version.0.clone(), version.1.clone());
            decisions.pin_reasons.insert(
                version.0.clone(),
                by.chars().take(PIN_REASON_MAX_CHARS).collect(),
            );
        }
        Decision::Unpin => {
            decisions.pinned.remove(&version.0);
            decisions.pin_reasons.remove(&version.0);
        }
        Decision::ClearFailing => {
            decisions.failing.remove(&digest);
        }
    }
}

#[cfg(test)]
mod tests {
    use windlass_runtime::PluginsConfig;

    use super::*;
    use crate::service::records::tests::{caller, memory_store};

    fn status(name: &str, version: &str, byte: u8, state: PluginState) -> PluginStatus {
        let descriptor = serde_json::from_value(serde_json::json!({
            "name": name, "version": version, "title": "T", "summary": "S", "provider": "P",
            "category": "C", "parameters": {}, "wishes": {"users": [], "path_roots": []},
            "operating_systems": [], "items": [], "presets": [], "attributes": {}
        }))
        .unwrap();
        PluginStatus {
            file: None,
            digest: Some(Digest::of(&[byte])),
            state,
            rejection: None,
            kind: None,
            descriptor: Some(Arc::new(descriptor)),
            is_default: false,
            pin: None,
            approved: false,
            size_bytes: None,
            signed_by: None,
            failing: None,
            figures: None,
        }
    }

    #[test]
    fn a_plugin_has_several_names() {
        let mut default = status("a", "1.0.0", 1, PluginState::Active);
        default.is_default = true;
        let list = vec![
            status("a", "1.1.0", 4, PluginState::Retired),
            status("a", "1.1.0", 2, PluginState::Active),
            default,
            status("b", "1.0.0", 3, PluginState::Revoked),
        ];
        let third = Digest::of(&[3]).to_string();
        for (wanted, byte) in [("a", 1), ("a@1.1.0", 2), ("b", 3), (third.as_str(), 3)] {
            let found = find(list.clone(), wanted).unwrap();
            assert_eq!(found.digest, Some(Digest::of(&[byte])), "{wanted}");
        }
        assert!(find(list, "c").is_err());
    }

    #[test]
    fn each_decision_has_its_opposite() {
        let version = ("a".to_owned(), semver::Version::new(1, 0, 0));
        let digest = Digest::of(b"a");
        for (there, back) in [
            (Decision::Approve, Decision::Disapprove),
            (Decision::Disable, Decision::Enable),
            (Decision::Revoke, Decision::Reinstate),
            (Decision::Pin, Decision::Unpin),
        ] {
            let mut decisions = Decisions::default();
            apply(&mut decisions, digest, &version, there, "admin");
            assert_ne!(decisions, Decisions::default(), "{there:?}");
            apply(&mut decisions, digest, &version, back, "admin");
            assert_eq!(decisions, Decisions::default(), "{back:?}");
        }
    }

    #[tokio::test]
    async fn decisions_are_limited_and_come_back() {
        let store = memory_store();
        let (mut row, guard) = read(&*store).await.unwrap();
        apply(
            &mut row.decisions,
            Digest::of(b"a"),
            &("a".to_owned(), semver::Version::new(1, 0, 0)),
            Decision::Revoke,
            "admin",
        );
        let txn = write(&row, guard).unwrap();
        store.commit(txn.clone()).await.unwrap();
        // Another that was read before is void.
        assert!(store.commit(txn).await.is_err());
        let stored = PluginService::load_decisions(&*store).await.unwrap();
        assert_eq!(stored, row.decisions);
        row.built_in = (0..600_u32)
            .map(|number| Digest::of(&number.to_be_bytes()))
            .collect();
        assert_eq!(
            write(&row, Txn::new()).unwrap_err().code(),
            "too_many_decisions"
        );
    }

    #[tokio::test]
    async fn a_file_that_is_no_plugin_is_not_decided_about() {
        let dir = tempfile::tempdir().unwrap();
        let plugin_dir = dir.path().join("plugins");
        std::fs::create_dir(&plugin_dir).unwrap();
        std::fs::write(plugin_dir.join("bad.wasm"), b"no plugin").unwrap();
        let shipped = PluginService::shipped_in(&plugin_dir).await.unwrap();
        assert_eq!(shipped, [Digest::of(b"no plugin")].into());
        let none = PluginService::shipped_in(&dir.path().join("none")).await;
        assert!(none.unwrap().is_empty());
        let config = PluginsConfig::new(plugin_dir, dir.path().join("state")).unwrap();
        let plugins = Arc::new(Plugins::open(config).await.unwrap());
        plugins.settled().await;
        let blobs = Blobs::open_directory(dir.path().join("blobs"))
            .await
            .unwrap();
        let (figures, _failing) = Figures::new(crate::clock::now);
        let service = PluginService::new(memory_store(), blobs, plugins.clone(), figures);
        assert_eq!(service.list().len(), 1);
        assert_eq!(service.approve_built_ins(&shipped).await.unwrap(), 0);
        let refused = service
            .decide(caller(), "bad.wasm", Decision::Approve)
            .await;
        assert_eq!(refused.unwrap_err().code(), "plugin_rejected");
        let unknown = service.decide(caller(), "x", Decision::Approve).await;
        assert_eq!(unknown.unwrap_err().code(), "not_found");
        plugins.close().await;
    }
}
