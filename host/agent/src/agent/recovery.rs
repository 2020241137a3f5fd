//! What an agent does first: sweeps, and finds again what runs.

use std::{collections::BTreeMap, fs};

use windlass_domain::task::{Action, Outcome, TaskId};
use windlass_protocol::TaskPush;

use super::{Agent, RESERVE_BYTES, UNKNOWN_RUNS_KEPT};
use crate::{
    execute,
    files::chain,
    instance::InstanceDir,
    journal::{self, Entry, Known},
    shim::{
        client::{self, Found},
        spec::RunDir,
    },
    tree::remove_tree,
};

impl Agent {
    pub(super) fn recover(&mut self) {
        let data = self.context.data.clone();
        for entry in fs::read_dir(data.instances())
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Err(error) = InstanceDir::at(&data, entry.path()).sweep() {
                tracing::warn!(error = %chain(&error), "left-overs of an interrupted unpacking stay");
            }
        }
        for entry in fs::read_dir(data.runs()).into_iter().flatten().flatten() {
            let dir = RunDir::new(entry.path());
            let name = entry.file_name();
            let known = match name.to_str().and_then(|name| name.parse::<TaskId>().ok()) {
                Some(id) => self.journal.known(&id),
                // A try of a check: nobody waits for it any more.
                None => Known::Acknowledged(Outcome::Unknown),
            };
            match known {
                Known::Held(_) => {}
                Known::Acknowledged(_) => self.end_run(&dir),
                Known::Never => {
                    if matches!(client::find(&dir), Ok(Found::Live)) {
                        tracing::warn!(dir = %dir.path().display(), "a script of a lost journal still runs; it is killed");
                        client::kill(&dir);
                    } else if entry.metadata().and_then(|meta| meta.modified()).is_ok_and(
                        |modified| modified.elapsed().is_ok_and(|age| age > UNKNOWN_RUNS_KEPT),
                    ) {
                        self.end_run(&dir);
                    }
                }
            }
        }
        let held: Vec<(TaskId, Entry)> = self
            .journal
            .held()
            .map(|(id, entry)| (id, entry.clone()))
            .collect();
        for (id, entry) in held {
            let (Some(task), Some(_), None) = (entry.task, entry.started_at, &entry.result) else {
                continue;
            };
            if !matches!(task.action, Action::Script(_)) {
                continue;
            }
            let dir = RunDir::new(data.run(&id));
            match client::find(&dir) {
                Ok(Found::Nothing) => {}
                // It may have died with its agent before it was told all: whether it runs is asked when the task is pushed.
                Ok(Found::Live) if matches!(client::identity(&dir), Ok(None)) => {}
                Ok(Found::Live | Found::Ended(_) | Found::Lost(_)) => {
                    tracing::info!(task.id = %id, "a script is found again");
                    self.spawn(TaskPush {
                        task,
                        secrets: BTreeMap::new(),
                        grant: None,
                    });
                }
                Err(error) => {
                    let message = format!(
                        "what became of the script cannot be read: {}",
                        chain(&error)
                    );
                    let result =
                        execute::result_without_run(Outcome::Unknown, &message, entry.started_at);
                    self.finish(id, result);
                }
            }
        }
    }

    /// A run that nobody needs: what of it runs is killed, its directory removed.
    pub(super) fn end_run(&self, dir: &RunDir) {
        if matches!(client::find(dir), Ok(Found::Live)) {
            client::kill(dir);
        }
        if let Err(error) = remove_tree(dir.path()) {
            tracing::warn!(error = %chain(&error), "a run's directory stays");
        }
    }

    pub(super) fn take_reserve(&self) {
        if self.disk().full {
            return;
        }
        if let Err(error) = journal::take_reserve(&self.context.data.reserve(), RESERVE_BYTES) {
            tracing::warn!(error = %chain(&error), "no reserve for a full disk");
        }
    }
}
