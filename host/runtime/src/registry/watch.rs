//! Looking at the plugin directory: what comes, changes and goes, once it has settled.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Instant};

use notify::Watcher;
use tokio::sync::mpsc;

use super::{Inner, blocking};
use crate::directory::{self, Stamp};

/// Reports of changes in the plugin directory, made before the first look at it, so that no change falls between.
pub(super) struct Reports {
    seen: mpsc::Receiver<()>,
    /// `None`: there are no reports, and the directory is looked at from time to time only.
    _watcher: Option<notify::RecommendedWatcher>,
}

impl Reports {
    pub(super) fn start(dir: &Path) -> Self {
        let (report, seen) = mpsc::channel::<()>(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // An error may stand for a change that was not seen.
            if event.map_or(true, |event| is_change(event.kind)) {
                let _full_when_a_look_is_due_already = report.try_send(());
            }
        })
        .and_then(|mut watcher| {
            watcher.watch(dir, notify::RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        if let Err(error) = &watcher {
            tracing::error!(
                "changes of the plugin directory are not reported, it is looked at from time to time: {error}"
            );
        }
        Self {
            seen,
            _watcher: watcher.ok(),
        }
    }
}

/// Whether files may be others than before. Opening and reading are reported too: a look at the directory would cause the next.
fn is_change(kind: notify::EventKind) -> bool {
    use notify::{
        EventKind,
        event::{AccessKind, AccessMode},
    };
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        EventKind::Any
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Remove(_)
        | EventKind::Other => true,
    }
}

impl Inner {
    pub(super) async fn watch_directory(self: &Arc<Self>, mut reports: Reports) {
        let mut unsettled = BTreeMap::new();
        loop {
            let pause = if unsettled.is_empty() {
                self.rescan
            } else {
                self.settle
            };
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                // A closed channel never wakes: the watcher could not be made.
                Some(()) = reports.seen.recv() => {}
                () = tokio::time::sleep(pause) => {}
            }
            self.look(&mut unsettled).await;
        }
    }

    /// One look at the directory: forgets what is gone, loads what has settled.
    async fn look(self: &Arc<Self>, unsettled: &mut BTreeMap<String, (Stamp, Instant)>) {
        let dir = self.dir.clone();
        let found = match blocking(move || directory::scan(&dir)).await {
            Ok(found) => found,
            Err(error) => {
                tracing::error!("the plugin directory cannot be read: {error}");
                return;
            }
        };
        unsettled.retain(|name, _| found.contains_key(name));
        let mut changed = false;
        let mut settled = Vec::new();
        {
            let mut table = self.table_mut();
            let gone: Vec<String> = table
                .files
                .keys()
                .filter(|name| !found.contains_key(*name))
                .cloned()
                .collect();
            for name in gone {
                changed = true;
                if let Some(active) = table.files.remove(&name).and_then(|entry| entry.active) {
                    table.retired(active);
                }
            }
            for (name, stamp) in found {
                match stamp {
                    Err(rejection) => {
                        let entry = table.files.entry(name.clone()).or_default();
                        if entry.rejection.as_ref() != Some(&rejection) {
                            tracing::error!(
                                plugin.file = name,
                                plugin.rejection = ?rejection.code,
                                "the file is not accepted as a plugin: {rejection}"
                            );
                            entry.rejection = Some(rejection);
                            entry.stamp = None;
                            entry.loading = false;
                            changed = true;
                        }
                    }
                    Ok(stamp) => {
                        if table
                            .files
                            .get(&name)
                            .is_some_and(|entry| entry.stamp == Some(stamp))
                        {
                            unsettled.remove(&name);
                            continue;
                        }
                        match unsettled.get(&name) {
                            Some((before, since))
                                if *before == stamp && since.elapsed() >= self.settle =>
                            {
                                unsettled.remove(&name);
                                let entry = table.files.entry(name.clone()).or_default();
                                entry.stamp = Some(stamp);
                                entry.loading = true;
                                changed = true;
                                settled.push((name, stamp));
                            }
                            Some((before, _)) if *before == stamp => {}
                            Some(_) | None => {
                                unsettled.insert(name, (stamp, Instant::now()));
                            }
                        }
                    }
                }
            }
        }
        if changed {
            let _turn = self.accepting.lock().await;
            self.write_files().await;
            self.changed();
        }
        for (name, stamp) in settled {
            let inner = Arc::clone(self);
            self.tasks
                .spawn(async move { inner.load_in_turn(name, stamp).await });
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::{fs, sync::mpsc, time::Duration};

    use super::*;

    /// Otherwise each look at the directory would cause the next, here and in every server that shares it.
    #[test]
    fn a_look_at_the_directory_is_no_change_of_it_and_a_written_file_is() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("one.wasm"), "one").unwrap();
        let (report, reports) = mpsc::sync_channel(64);
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                report.send(event.unwrap().kind).unwrap();
            })
            .unwrap();
        watcher
            .watch(dir.path(), notify::RecursiveMode::NonRecursive)
            .unwrap();
        let next = || reports.recv_timeout(Duration::from_secs(10)).unwrap();

        directory::scan(dir.path()).unwrap();
        fs::read(dir.path().join("one.wasm")).unwrap();
        fs::write(dir.path().join("two.wasm"), "two").unwrap();
        let mut looks = 0;
        let mut kind = next();
        while !is_change(kind) {
            looks += 1;
            kind = next();
        }
        assert!(looks > 0, "a look is reported");
        assert!(kind.is_create(), "{kind:?}");
        // The file counts when it is closed, not only when it is made.
        while kind
            != notify::EventKind::Access(notify::event::AccessKind::Close(
                notify::event::AccessMode::Write,
            ))
        {
            kind = next();
        }
        assert!(is_change(kind));
    }
}
