//! Applications that the agent keeps running: looked at, and launched again, with secrets asked of the platform where needed.

use std::collections::BTreeMap;

use windlass_domain::id::InstanceId;
use windlass_protocol::{SecretText, ToServer};

use super::{Agent, Event, Lane};
use crate::{app, files::chain};

impl Agent {
    pub(super) fn look_at_apps(&mut self) {
        self.apps.clear();
        for (id, record) in app::recorded(&self.context.data) {
            let (state, relaunch) = app::look(&self.context.data, id, &record);
            self.apps.push(state);
            // A start or stop that is under way, or was interrupted and will go on, decides itself.
            let pending = self.busy.contains(&Lane::Instance(id))
                || self
                    .journal
                    .held()
                    .any(|(held, entry)| held == record.task.id && entry.result.is_none());
            if !relaunch || pending {
                continue;
            }
            let names = record.secrets();
            if names.is_empty() {
                self.relaunch(id, record, BTreeMap::new());
            } else if self.need_secrets.insert(id, names).is_none() {
                self.ask_secrets();
            }
        }
    }

    pub(super) fn ask_secrets(&mut self) {
        let needs: Vec<(InstanceId, Vec<String>)> = self
            .need_secrets
            .iter()
            .map(|(instance, names)| (*instance, names.iter().cloned().collect()))
            .collect();
        for (instance, names) in needs {
            self.send(ToServer::SecretsNeeded { instance, names });
        }
    }

    pub(super) fn secrets(&mut self, instance: InstanceId, values: &BTreeMap<String, SecretText>) {
        if self.need_secrets.remove(&instance).is_none()
            || self.busy.contains(&Lane::Instance(instance))
        {
            return;
        }
        let record = app::recorded(&self.context.data)
            .into_iter()
            .find(|(id, _)| *id == instance);
        if let Some((id, record)) = record
            && app::look(&self.context.data, id, &record).1
        {
            self.relaunch(id, record, values.clone());
        }
    }

    pub(super) fn relaunch(
        &mut self,
        id: InstanceId,
        record: app::AppRecord,
        secrets: BTreeMap<String, SecretText>,
    ) {
        self.busy.insert(Lane::Instance(id));
        let context = self.context.clone();
        self.tasks.spawn(async move {
            let outcome = app::relaunch(&context, id, record, &secrets).await;
            Event::Relaunched(id, outcome.map_err(|error| chain(&error)))
        });
    }
}
