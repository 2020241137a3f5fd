//! Diagnoses: makes them, runs each in a task of its own, keeps what they found for 30 days. Source: spec "Diagnostics (plugins)".
//!
//! ```text
//!  create: row `running` + `diagnosis-active` row ─► commit ─► task: the plugin looks ─► record blob ─► commit: terminal row,
//!                                                      │                                        active row gone
//!                                                      └ the server ends or is killed: `recover` finds the active row at the next
//!                                                        start and ends the diagnosis as failed, `interrupted`
//! ```
//! A blob whose commit did not happen is collected as garbage. A diagnosis is never run again by itself: it only looks, so whoever
//! wants to know asks again. The service owns the tasks; [`Diagnoses::shutdown`] awaits them.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use windlass_domain::{
    Digest,
    diagnosis::{
        self, Diagnosis, DiagnosisFailure, DiagnosisRecord, DiagnosisState, FindingCounts, Look,
        Subject,
    },
    id::{DiagnosisId, InstanceId, OrderId, ServerId},
    plugin::{DiagnosisRequest, DiagnosisSubject, PluginKind},
    workspace::Workspace,
};
use windlass_runtime::{CallError, HostCall, Plugin, Plugins};
use windlass_store::{BlobDigest, Blobs, Revision, Store, Txn};

use super::{
    Caller, PageOf, PageRequest, ServiceError, chosen,
    looks::{Sights, WorkspaceSights},
    records::{self, Committed, Sort},
};
use crate::{
    clock, ids,
    keys::{self, Kind},
};

/// Diagnoses of one workspace that run at once.
pub const MAX_RUNNING: usize = 5;
/// Answers of looks that are kept with one record, in bytes; further ones are left out.
const MAX_LOOKS_BYTES: usize = 8 * 1024 * 1024;
/// What is asked, as JSON, in bytes: its end has to fit into the row, too.
const MAX_ASKED_BYTES: usize = 10 * 1024;
/// Items of one report that are kept.
const MAX_ITEMS: usize = 1000;
/// Bytes of what one item says, and of a summary.
const MAX_TEXT_BYTES: usize = 4096;
/// A record that was written is read up to this size.
const MAX_RECORD_BYTES: u64 = 64 * 1024 * 1024;

/// A diagnosis to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateDiagnosis {
    /// The diagnostic: `name` (its default version) or `name@version`.
    pub plugin: String,
    /// What to look at.
    pub subject: Subject,
    /// Parameters of the plugin; none unless given.
    #[serde(default = "no_parameters")]
    pub parameters: serde_json::Value,
    /// Codes of the wanted items; empty: all.
    #[serde(default)]
    pub items: Vec<String>,
}

fn no_parameters() -> serde_json::Value {
    serde_json::json!({})
}

/// Which diagnoses of a list.
#[derive(Debug, Clone, Default)]
pub struct DiagnosisFilter {
    /// Only in this state.
    pub state: Option<DiagnosisState>,
    /// Only of this subject's id.
    pub subject: Option<String>,
}

/// What diagnoses stand on.
pub struct DiagnosesParts {
    /// Rows.
    pub store: Arc<dyn Store>,
    /// Records.
    pub blobs: Blobs,
    /// The diagnostics.
    pub plugins: Arc<Plugins>,
    /// What they may see.
    pub sights: Sights,
}

/// Diagnoses. Cheap to clone.
#[derive(Clone)]
pub struct Diagnoses {
    inner: Arc<Inner>,
}

struct Inner {
    parts: DiagnosesParts,
    /// Of two that ask at once for the last free place one gets it.
    making: tokio::sync::Mutex<()>,
    tasks: TaskTracker,
    stop: CancellationToken,
    /// Counts ends: who waits for one looks again.
    ended: watch::Sender<u64>,
}

impl Diagnoses {
    /// Nothing runs yet.
    #[must_use]
    pub fn new(parts: DiagnosesParts) -> Self {
        Self {
            inner: Arc::new(Inner {
                parts,
                making: tokio::sync::Mutex::default(),
                tasks: TaskTracker::new(),
                stop: CancellationToken::new(),
                ended: watch::Sender::new(0),
            }),
        }
    }

    /// Ends what a server that is no more left running. Called once, before anything is made.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn recover(&self) -> Result<(), ServiceError> {
        let store = &*self.inner.parts.store;
        for entry in records::all(store, &keys::active_diagnoses()).await? {
            let id = keys::last_segment(&entry.key);
            let Some((found, _)) = records::find::<Diagnosis>(store, id).await? else {
                store.commit(Txn::new().delete(entry.key.clone())).await?;
                continue;
            };
            tracing::warn!(diagnosis.id = %found.id, plugin.name = %found.plugin.name, "a diagnosis was cut off by the server's end");
            self.inner.end(found.id, interrupted()).await?;
        }
        Ok(())
    }

    /// Cuts off what runs and waits for it.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    /// Makes a diagnosis and runs it in the background.
    ///
    /// # Errors
    /// `plugin_not_available`, `parameters_invalid`, `items_unknown`, `subject_unknown`, `subject_invalid`; a limit when too many
    /// run; [`ServiceError::NotFound`] of the workspace.
    pub async fn create(
        &self,
        caller: Caller,
        ws: &str,
        request: CreateDiagnosis,
    ) -> Result<(Diagnosis, Revision), ServiceError> {
        let parts = &self.inner.parts;
        let store = &*parts.store;
        let (workspace, _) = records::get::<Workspace>(store, ws).await?;
        let plugin = chosen::plugin(
            &parts.plugins,
            PluginKind::Diagnostic,
            "/plugin",
            &request.plugin,
        )?;
        plugin
            .validate_parameters(&request.parameters)
            .map_err(|faults| {
                chosen::parameters_invalid("/parameters", plugin.reference(), &faults)
            })?;
        let known = &plugin.descriptor().items;
        if let Some((at, code)) = request
            .items
            .iter()
            .enumerate()
            .find(|(_, code)| !known.iter().any(|item| item.code == **code))
        {
            let all: Vec<&str> = known.iter().map(|item| item.code.as_str()).collect();
            return Err(ServiceError::invalid(
                "items_unknown",
                format!("/items/{at}"),
                format!("{} has no item `{code}`", plugin.reference().name),
                format!("choose among {}", all.join(", ")),
            ));
        }
        let asked = records::encode(&request).len();
        if asked > MAX_ASKED_BYTES {
            return Err(ServiceError::Limit {
                code: "out_of_limit",
                field: "/parameters".to_owned(),
                message: format!(
                    "the request has {asked} bytes as JSON, at most {MAX_ASKED_BYTES} are allowed"
                ),
                limit: MAX_ASKED_BYTES as u64,
                current: asked as u64,
                mend: "shorten the parameters or the subject's data".to_owned(),
            });
        }
        let data = self.subject(ws, &request.subject).await?;
        let _one_at_a_time = self.inner.making.lock().await;
        let running = self.running(ws).await?;
        if running >= MAX_RUNNING {
            return Err(ServiceError::Limit {
                code: "too_many_running",
                field: String::new(),
                message: format!(
                    "{running} diagnoses run in the workspace `{ws}`, at most {MAX_RUNNING} may"
                ),
                limit: MAX_RUNNING as u64,
                current: running as u64,
                mend: "wait until one has ended".to_owned(),
            });
        }
        let id = DiagnosisId::from_uuid(ids::new_uuid());
        let made = records::change(store, &caller, || async {
            let diagnosis = Diagnosis {
                schema: Diagnosis::SCHEMA,
                id,
                workspace: workspace.name.clone(),
                plugin: plugin.reference().clone(),
                subject: request.subject.clone(),
                parameters: request.parameters.clone(),
                items: request.items.clone(),
                state: DiagnosisState::Running,
                failure: None,
                verdict: None,
                summary: String::new(),
                counts: FindingCounts::default(),
                record: None,
                created_by: caller.name.clone(),
                created_at: clock::now(),
                finished_at: None,
            };
            let text = id.to_string();
            let txn = records::create(&diagnosis)?
                .and(records::refer(Kind::Workspace, ws))
                .put(keys::of_workspace(Kind::Diagnosis, ws, &text), "")
                .put(keys::active_diagnosis(ws, id), "");
            Ok((txn, diagnosis))
        })
        .await?;
        let inner = self.inner.clone();
        let diagnosis = made.0.clone();
        self.inner.tasks.spawn(async move {
            inner.run(diagnosis, plugin, data).await;
        });
        Ok(made)
    }

    async fn running(&self, ws: &str) -> Result<usize, ServiceError> {
        let store = &*self.inner.parts.store;
        let active = records::all(store, &keys::active_diagnoses_of(ws)).await?;
        Ok(active.len())
    }

    /// What the platform knows of a subject; refuses one that is not there.
    async fn subject(
        &self,
        ws: &str,
        subject: &Subject,
    ) -> Result<serde_json::Value, ServiceError> {
        let sights = &self.inner.parts.sights;
        let unknown = |message: String| {
            ServiceError::invalid(
                "subject_unknown",
                "/subject/id",
                message,
                "give the id of one that is in this workspace",
            )
        };
        let absent = || unknown(format!("there is no {} `{}`", subject.kind, subject.id));
        let missing = |error: ServiceError| match error {
            ServiceError::NotFound { .. } => absent(),
            other => other,
        };
        match subject.kind.as_str() {
            "server" => {
                let id: ServerId = subject.id.parse().map_err(|_| absent())?;
                let (server, _) = sights.servers.get(ws, id).await.map_err(missing)?;
                let now = sights.orders.server_now(server).await?;
                Ok(serde_json::to_value(now).unwrap_or_default())
            }
            "service-instance" => {
                let id: InstanceId = subject.id.parse().map_err(|_| absent())?;
                let (instance, _) = sights.instances.get(ws, id).await.map_err(missing)?;
                Ok(serde_json::to_value(instance).unwrap_or_default())
            }
            "order" => {
                let id: OrderId = subject.id.parse().map_err(|_| absent())?;
                let (order, _) = sights.orders.get(ws, id).await.map_err(missing)?;
                Ok(serde_json::to_value(order).unwrap_or_default())
            }
            "path" => {
                let source = subject.data["source"].as_str().unwrap_or_default();
                let id: ServerId = source.parse().map_err(|_| {
                    ServiceError::invalid(
                        "subject_invalid",
                        "/subject/data/source",
                        "a path begins at a server",
                        "set `source` to the id of a server of this workspace",
                    )
                })?;
                sights
                    .servers
                    .get(ws, id)
                    .await
                    .map_err(|error| match error {
                        ServiceError::NotFound { .. } => {
                            unknown(format!("there is no server `{source}`"))
                        }
                        other => other,
                    })?;
                if subject.data["target"].as_str().is_none_or(str::is_empty) {
                    return Err(ServiceError::invalid(
                        "subject_invalid",
                        "/subject/data/target",
                        "a path ends at a server, an address or a host name",
                        "set `target`",
                    ));
                }
                Ok(subject.data.clone())
            }
            "operation" => Ok(subject.data.clone()),
            other => Err(ServiceError::invalid(
                "subject_invalid",
                "/subject/kind",
                format!("nothing of the kind `{other}` can be diagnosed"),
                "choose `server`, `service-instance`, `order`, `path` or `operation`",
            )),
        }
    }

    /// One diagnosis of a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when it is another workspace's.
    pub async fn get(
        &self,
        ws: &str,
        id: DiagnosisId,
    ) -> Result<(Diagnosis, Revision), ServiceError> {
        let store = &*self.inner.parts.store;
        let (found, revision) = records::get::<Diagnosis>(store, &id.to_string()).await?;
        if found.workspace.as_str() == ws {
            Ok((found, revision))
        } else {
            Err(ServiceError::not_found("diagnosis", id))
        }
    }

    /// The same, once it has ended or `wait` is over.
    ///
    /// # Errors
    /// As [`Diagnoses::get`].
    pub async fn wait(
        &self,
        ws: &str,
        id: DiagnosisId,
        wait: Duration,
    ) -> Result<(Diagnosis, Revision), ServiceError> {
        let until = Instant::now() + wait;
        let mut ended = self.inner.ended.subscribe();
        loop {
            ended.mark_unchanged();
            let found = self.get(ws, id).await?;
            if found.0.state.is_terminal() {
                return Ok(found);
            }
            tokio::select! {
                changed = ended.changed() => {
                    if changed.is_err() {
                        return Ok(found);
                    }
                }
                () = self.inner.stop.cancelled() => return Ok(found),
                () = tokio::time::sleep_until(until) => return self.get(ws, id).await,
            }
        }
    }

    /// Items and looks of a diagnosis that succeeded; empty for others.
    ///
    /// # Errors
    /// As [`Diagnoses::get`].
    pub async fn record(&self, ws: &str, id: DiagnosisId) -> Result<DiagnosisRecord, ServiceError> {
        let (found, _) = self.get(ws, id).await?;
        let Some(digest) = found.record else {
            return Ok(DiagnosisRecord::default());
        };
        let blobs = &self.inner.parts.blobs;
        let bytes = blobs
            .get_bytes(BlobDigest::from_bytes(*digest.as_bytes()), MAX_RECORD_BYTES)
            .await?;
        serde_json::from_slice(&bytes)
            .map_err(|error| ServiceError::internal("read the record of a diagnosis", error))
    }

    /// A page of a workspace's diagnoses, newest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn list(
        &self,
        ws: &str,
        filter: &DiagnosisFilter,
        page: PageRequest,
    ) -> Result<PageOf<(Diagnosis, Revision)>, ServiceError> {
        let store = &*self.inner.parts.store;
        records::get::<Workspace>(store, ws).await?;
        let prefix = keys::all_of_workspace(Kind::Diagnosis, ws);
        records::list(store, &prefix, Sort::Falling, &page, |found: &Diagnosis| {
            filter.state.is_none_or(|state| state == found.state)
                && filter
                    .subject
                    .as_ref()
                    .is_none_or(|subject| *subject == found.subject.id)
        })
        .await
    }
}

/// How a diagnosis ended.
enum End {
    Reported {
        verdict: String,
        summary: String,
        record: DiagnosisRecord,
    },
    Failed(DiagnosisFailure),
}

fn interrupted() -> End {
    End::Failed(DiagnosisFailure {
        code: "interrupted".to_owned(),
        message: "the server ended while the diagnosis ran".to_owned(),
        mend: "make the diagnosis again".to_owned(),
    })
}

impl Inner {
    async fn run(&self, diagnosis: Diagnosis, plugin: Plugin, data: serde_json::Value) {
        let id = diagnosis.id;
        let request = DiagnosisRequest {
            subject: DiagnosisSubject {
                kind: diagnosis.subject.kind.clone(),
                id: diagnosis.subject.id.clone(),
                data,
            },
            parameters: diagnosis.parameters.clone(),
            items: diagnosis.items.clone(),
        };
        let host = Arc::new(WorkspaceSights {
            ws: diagnosis.workspace.to_string(),
            sights: self.parts.sights.clone(),
        });
        let end = tokio::select! {
            () = self.stop.cancelled() => interrupted(),
            answer = plugin.diagnose(&request, host) => match answer {
                Ok(found) => {
                    let known = &plugin.descriptor().items;
                    reported(known, &diagnosis.items, found)
                }
                Err(error) => End::Failed(failure(&error)),
            },
        };
        if let Err(error) = self.end(id, end).await {
            // The row says `running` until the next start, which ends it.
            tracing::error!(diagnosis.id = %id, error = &error as &dyn std::error::Error, "the end of a diagnosis could not be written");
        }
    }

    /// Writes the end, durably, and tells who waits.
    async fn end(&self, id: DiagnosisId, end: End) -> Result<(), ServiceError> {
        let store = &*self.parts.store;
        let record = match &end {
            End::Reported { record, .. } => Some(self.keep(record).await?),
            End::Failed(_) => None,
        };
        loop {
            let (found, revision) = records::get::<Diagnosis>(store, &id.to_string()).await?;
            if found.state.is_terminal() {
                return Ok(());
            }
            let active = keys::active_diagnosis(found.workspace.as_str(), id);
            let ended = ended(found, &end, record);
            let txn = records::replace(&ended, revision)?.delete(active);
            match records::commit(store, txn).await? {
                Committed::Done(_) => break,
                Committed::Conflict => {}
            }
        }
        self.ended.send_modify(|count| *count += 1);
        Ok(())
    }

    async fn keep(&self, record: &DiagnosisRecord) -> Result<Digest, ServiceError> {
        let bytes = records::encode(record);
        let stored = self.parts.blobs.put_bytes(bytes.into()).await?;
        Ok(Digest::from_bytes(*stored.as_bytes()))
    }
}

fn ended(found: Diagnosis, end: &End, record: Option<Digest>) -> Diagnosis {
    let finished_at = Some(clock::now());
    match end {
        End::Reported {
            verdict,
            summary,
            record: kept,
        } => Diagnosis {
            state: DiagnosisState::Succeeded,
            verdict: Some(verdict.clone()),
            summary: summary.clone(),
            counts: diagnosis::counts(&kept.items),
            record,
            finished_at,
            ..found
        },
        End::Failed(failure) => Diagnosis {
            state: DiagnosisState::Failed,
            failure: Some(failure.clone()),
            finished_at,
            ..found
        },
    }
}

fn reported(
    known: &[windlass_domain::plugin::DiagnosticItem],
    wanted: &[String],
    found: windlass_runtime::Diagnosis,
) -> End {
    let summary = cut(found.report.summary.clone());
    let mut items = diagnosis::reported(known, wanted, found.report);
    items.truncate(MAX_ITEMS);
    for item in &mut items {
        item.seen = cut(std::mem::take(&mut item.seen));
        item.suggestion = cut(std::mem::take(&mut item.suggestion));
        item.code = cut(std::mem::take(&mut item.code));
        item.title = cut(std::mem::take(&mut item.title));
    }
    let verdict = found
        .verdict
        .map_or_else(|| diagnosis::verdict(&items).to_owned(), cut);
    End::Reported {
        verdict,
        summary,
        record: DiagnosisRecord {
            items,
            looks: looks(found.looks),
        },
    }
}

/// Looks with their answers, as far as there is room.
fn looks(calls: Vec<HostCall>) -> Vec<Look> {
    let mut room = MAX_LOOKS_BYTES;
    calls
        .into_iter()
        .map(|call| {
            let size = call.answer.to_string().len();
            let answer = if size <= room {
                room -= size;
                call.answer
            } else {
                serde_json::Value::Null
            };
            Look {
                function: call.function,
                arguments: call.arguments,
                answer,
                elapsed_ms: call.elapsed_ms,
            }
        })
        .collect()
}

fn cut(mut text: String) -> String {
    if text.len() > MAX_TEXT_BYTES {
        let at = (0..=MAX_TEXT_BYTES)
            .rev()
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(0);
        text.truncate(at);
        text.push('…');
    }
    text
}

fn failure(error: &CallError) -> DiagnosisFailure {
    DiagnosisFailure {
        code: error.failure.code().to_owned(),
        message: cut(crate::platform::chain(error)),
        mend: "see what the plugin says; mend the parameters, or choose another version of it"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_keeps_answers_as_far_as_there_is_room() {
        let call = |size: usize| HostCall {
            function: "probes.run".to_owned(),
            arguments: serde_json::Value::Null,
            answer: "x".repeat(size).into(),
            elapsed_ms: 1,
        };
        let kept = looks(vec![call(MAX_LOOKS_BYTES - 100), call(200), call(10)]);
        let has_answer: Vec<bool> = kept.iter().map(|look| !look.answer.is_null()).collect();
        assert_eq!(has_answer, [true, false, true]);
        assert_eq!(
            cut("ä".repeat(MAX_TEXT_BYTES)).len(),
            MAX_TEXT_BYTES + "…".len()
        );
    }
}
