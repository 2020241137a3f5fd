//! Supervised applications: started, found again, stopped, and started again after the machine (or a shim) went down.
//!
//! `app.json` in the instance's directory says what has to run: the start task, with references to secrets only, and the
//! shim's directory. It is written before the shim starts and removed before it is stopped, so after any crash the wish is known.
//! ```text
//!            start                          stop
//!  absent ─────────► app.json, shim live ─────────► absent
//!                      │  shim gone (machine shut down or restarted, shim killed)
//!                      └──► launched again, from app.json; secrets are asked of the platform first, where it refers to any
//! ```
//! An application that was killed with its shim by `stop-all` comes back in the same way when the agent starts.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    path::PathBuf,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use windlass_domain::{
    id::InstanceId,
    task::{Action, Restart, Supervise, Task},
    value::Value,
};
use windlass_protocol::{AppState, SecretText};

use crate::{
    clock,
    config::DataDir,
    crash,
    execute::{ActionError, Context, become_user, cgroup, environment, kill_marked},
    files::{chain, make_dir, read_json, remove_file, sync_dir, write_json},
    instance::{InstanceDir, expand},
    shim::{
        client::{self, Found, Watch},
        host::describe,
        spec::{Mode, RunDir, RunIdentity, Spec},
    },
    tree::remove_tree,
    users,
};

/// How long a replaced application has between its two signals.
const REPLACE_GRACE_MS: u64 = 10_000;

/// Content of `app.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AppRecord {
    /// The task that started it.
    pub task: Task,
    /// The name of its shim's directory in `apps`.
    pub dir: String,
}

impl AppRecord {
    fn run_dir(&self, instance: &InstanceDir) -> RunDir {
        RunDir::new(instance.apps().join(&self.dir))
    }

    /// Names of the secrets that its environment refers to.
    #[must_use]
    pub fn secrets(&self) -> BTreeSet<String> {
        self.task
            .env
            .values()
            .filter_map(|value| match value {
                Value::SecretRef(name) => Some(name.clone()),
                Value::Plain(_) => None,
            })
            .collect()
    }
}

/// Starts (or replaces) the application of a task's instance; done when its process runs. After a crash of the agent in the
/// middle it goes on: an application that this very task started is not started again.
pub(crate) async fn start(
    context: &Context,
    task: &Task,
    secrets: &BTreeMap<String, SecretText>,
) -> Result<(), ActionError> {
    let user = users::resolve(task.run_as.as_deref(), &context.policy)?;
    let instance = InstanceDir::of(&context.data, task, Some(&user))?;
    let before: Option<AppRecord> = read_json(&instance.app())?;
    if let Some(running) = &before
        && keeps(context, &instance, running, task, secrets)?
    {
        // It stays the process of the task that started it: whoever ends what is left of it looks for that one.
        let task = Task {
            id: running.task.id,
            ..task.clone()
        };
        let dir = running.dir.clone();
        return Ok(write_json(
            &instance.app(),
            &AppRecord { task, dir },
            0o600,
        )?);
    }
    let record = match before {
        Some(record) if record.task.id == task.id => record,
        Some(_) | None => AppRecord {
            task: task.clone(),
            dir: task.id.to_string(),
        },
    };
    let dir = record.run_dir(&instance);
    match client::find_settled(&dir).await? {
        Found::Nothing => {
            // Checked before the old one stops: what cannot be started must not end what runs.
            let spec = spec(context, &instance, &record, secrets)?;
            stop_shims(&instance, REPLACE_GRACE_MS, None).await?;
            write_json(&instance.app(), &record, 0o600)?;
            crash::point("app_recorded");
            make_dir(&instance.apps(), 0o711)?;
            client::start(&dir, &spec, None).await?;
            remove_old(&instance, &record.dir);
        }
        // This task started it before the agent died; whether it is to be launched again is not this task's to decide.
        Found::Lost(_) => return Ok(()),
        Found::Live | Found::Ended(_) => {}
    }
    await_running(&dir).await
}

/// What is wrong with an application that should run, for people: that it ends, how it did last, and the end of its output.
/// `None`: it has run all the time, or none is to run.
pub(crate) fn trouble(instance: &InstanceDir) -> Option<String> {
    let record: AppRecord = read_json(&instance.app()).ok()??;
    let dir = record.run_dir(instance);
    let identity: RunIdentity = read_json(&dir.identity()).ok()??;
    let ended = identity.restarts + u64::from(identity.main.is_none());
    if ended == 0 {
        return None;
    }
    let mut text = format!("the application has ended {ended} time(s) since it was started");
    if !identity.message.is_empty() {
        text.push_str(&format!(" (the last time: {})", identity.message));
    }
    let output = last_output(&dir);
    if !output.is_empty() {
        text.push_str(&format!("; its output ends with: {output}"));
    }
    Some(text)
}

/// The end of what an application wrote, masked as it is kept.
fn last_output(dir: &RunDir) -> String {
    const SHOWN_BYTES: u64 = 1500;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = fs::File::open(dir.output())?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(SHOWN_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(SHOWN_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// Whether the application runs already as the task wants it, and the task leaves such a one alone.
fn keeps(
    context: &Context,
    instance: &InstanceDir,
    running: &AppRecord,
    task: &Task,
    secrets: &BTreeMap<String, SecretText>,
) -> Result<bool, ActionError> {
    let Action::Start(Supervise {
        keep_running: true, ..
    }) = &task.action
    else {
        return Ok(false);
    };
    let dir = running.run_dir(instance);
    if client::find(&dir)? != Found::Live {
        return Ok(false);
    }
    let wanted = AppRecord {
        task: task.clone(),
        dir: running.dir.clone(),
    };
    let wanted = spec(context, instance, &wanted, secrets)?;
    // What it was started with may need secrets that this task does not have: then it is another.
    let Ok(now) = spec(context, instance, running, secrets) else {
        return Ok(false);
    };
    let is_restarted = |spec: &Spec| match spec.mode {
        Mode::App { restart, .. } => Some(restart),
        Mode::Script { .. } => None,
    };
    Ok(wanted.command == now.command
        && wanted.working_dir == now.working_dir
        && wanted.user == now.user
        && is_restarted(&wanted) == is_restarted(&now))
}

fn spec(
    context: &Context,
    instance: &InstanceDir,
    record: &AppRecord,
    secrets: &BTreeMap<String, SecretText>,
) -> Result<Spec, ActionError> {
    let Action::Start(Supervise {
        command,
        working_dir,
        restart,
        ..
    }) = &record.task.action
    else {
        return Err(ActionError::App("its record is not of a start".into()));
    };
    let user = users::resolve(record.task.run_as.as_deref(), &context.policy)?;
    let (env, texts) = environment(instance, &record.task, &user, secrets)?;
    let command = command
        .iter()
        .map(|part| expand(part, &env))
        .collect::<Result<Vec<_>, _>>()
        .map_err(ActionError::Variable)?;
    let current = instance.current();
    let base = if current.exists() {
        current
    } else {
        instance.work_dir(&record.task)?
    };
    let working_dir = match working_dir {
        Some(path) => base.join(expand(path, &env).map_err(ActionError::Variable)?),
        None => base,
    };
    // A program with a relative path is meant in its working directory.
    let mut command = command;
    if let Some(program) = command.first_mut()
        && program.contains('/')
        && !program.starts_with('/')
    {
        *program = working_dir.join(&*program).display().to_string();
    }
    Ok(Spec {
        command,
        env,
        working_dir,
        user: become_user(&user),
        secrets: texts,
        cgroup: cgroup(context, &format!("app-{}", record.dir)),
        mode: Mode::App {
            restart: *restart,
            again: false,
        },
    })
}

async fn await_running(dir: &RunDir) -> Result<(), ActionError> {
    let watch = Watch::new(dir);
    loop {
        match client::find(dir)? {
            Found::Live => {
                let identity = client::identity(dir)?;
                // One that is launched again and cannot be started says so, and is tried again.
                if let Some(identity) = identity
                    && (identity.main.is_some()
                        || identity.started_at.is_some()
                        || !identity.message.is_empty())
                {
                    return Ok(());
                }
            }
            // Even one that ended at once was running; whether it is healthy is for the check to say.
            Found::Ended(status) if status.started_at.is_some() => return Ok(()),
            Found::Ended(status) => return Err(ActionError::App(describe(&status.end))),
            Found::Nothing | Found::Lost(_) => {
                return Err(ActionError::App(
                    "its shim ended; the disk may be full".into(),
                ));
            }
        }
        watch.changed(client::LOOK_AGAIN).await;
    }
}

/// Stops the application of a task's instance. Not running: nothing to do.
pub(crate) async fn stop(context: &Context, task: &Task, grace_ms: u64) -> Result<(), ActionError> {
    let instance = InstanceDir::of(&context.data, task, None)?;
    if !instance.path().is_dir() {
        return Ok(());
    }
    let record: Option<AppRecord> = read_json(&instance.app())?;
    remove_file(&instance.app())?;
    sync_dir(instance.path())?;
    crash::point("app_unrecorded");
    stop_shims(&instance, grace_ms, record.as_ref()).await
}

/// Stops every shim of the instance that lives, and what a lost one left.
async fn stop_shims(
    instance: &InstanceDir,
    grace_ms: u64,
    record: Option<&AppRecord>,
) -> Result<(), ActionError> {
    let dirs: Vec<RunDir> = fs::read_dir(instance.apps())
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| RunDir::new(entry.path()))
        .collect();
    for dir in &dirs {
        let watch = Watch::new(dir);
        let mut asked = false;
        while client::is_live(dir)? {
            if !asked && dir.identity().exists() && dir.control().exists() {
                client::stop(dir, grace_ms);
                asked = true;
            }
            watch
                .changed(if asked {
                    client::LOOK_AGAIN.min(Duration::from_millis(200))
                } else {
                    Duration::from_millis(20)
                })
                .await;
        }
        if let Found::Lost(_) = client::find(dir)? {
            if let Some(record) = record {
                kill_marked(&record.task.id);
            } else if let Some(old) = read_json::<AppRecord>(&instance.app())? {
                kill_marked(&old.task.id);
            }
        }
    }
    Ok(())
}

/// Removes the directories (with the logs) of all but the newest application and the previous one. Housekeeping: a failure is a
/// warning, because the application has started.
fn remove_old(instance: &InstanceDir, newest: &str) {
    let mut others: Vec<(Option<std::time::SystemTime>, PathBuf)> = fs::read_dir(instance.apps())
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_str() != Some(newest))
        .map(|entry| {
            (
                entry.metadata().and_then(|meta| meta.modified()).ok(),
                entry.path(),
            )
        })
        .collect();
    others.sort();
    others.pop();
    for (_, path) in others {
        if let Err(error) = remove_tree(&path) {
            tracing::warn!(error = %chain(&error), "failed to remove the directory of an old application");
        }
    }
}

/// Every recorded application.
#[must_use]
pub fn recorded(data: &DataDir) -> Vec<(InstanceId, AppRecord)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(data.instances())
        .into_iter()
        .flatten()
        .flatten()
    {
        let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        match read_json(&InstanceDir::at(data, entry.path()).app()) {
            Ok(Some(record)) => found.push((id, record)),
            Ok(None) => {}
            Err(error) => {
                tracing::error!(error = %crate::files::chain(&error), "an application's record cannot be read")
            }
        }
    }
    found
}

/// How a recorded application is, and whether it has to be launched again.
#[must_use]
pub fn look(data: &DataDir, id: InstanceId, record: &AppRecord) -> (AppState, bool) {
    let instance = InstanceDir::at(data, data.instance(&id));
    let dir = record.run_dir(&instance);
    let release = instance
        .installed()
        .ok()
        .and_then(|installed| installed.current)
        .map(|manifest| manifest.release);
    let mut state = AppState {
        instance: id,
        release,
        pid: None,
        since: None,
        restarts: 0,
        message: String::new(),
    };
    let restarts = match &record.task.action {
        Action::Start(Supervise {
            restart: Restart::Always,
            ..
        }) => true,
        Action::Start(Supervise {
            restart: Restart::Never,
            ..
        })
        | Action::Script(_)
        | Action::Fetch(_)
        | Action::Unpack { .. }
        | Action::WriteFile { .. }
        | Action::Activate(_)
        | Action::StopSupervised { .. }
        | Action::PlaceFiles(_)
        | Action::Check(_) => false,
    };
    let relaunch = match client::find(&dir) {
        Ok(Found::Live) => {
            if let Ok(Some(identity)) = client::identity(&dir) {
                state.pid = identity.main.as_ref().map(|main| main.pid);
                state.since = identity.started_at.filter(|_| identity.main.is_some());
                state.restarts = identity.restarts;
                state.message = identity.message;
            }
            false
        }
        Ok(Found::Ended(status)) => {
            state.message = describe(&status.end);
            false
        }
        // Gone with the machine or its shim. One that is never to be restarted had its one life only if the machine stayed up.
        Ok(Found::Lost(identity)) => {
            state.message = "its shim is gone".into();
            restarts || identity.shim.boot_id != crate::proc::boot_id()
        }
        Ok(Found::Nothing) => {
            state.message = "it was not started".into();
            true
        }
        Err(error) => {
            state.message = crate::files::chain(&error);
            false
        }
    };
    (state, relaunch)
}

/// Launches a recorded application again, in a new shim directory, after ending what may be left of it.
///
/// # Errors
/// When it cannot be started.
pub async fn relaunch(
    context: &Context,
    id: InstanceId,
    mut record: AppRecord,
    secrets: &BTreeMap<String, SecretText>,
) -> Result<(), ActionError> {
    let instance = InstanceDir::at(&context.data, context.data.instance(&id));
    kill_marked(&record.task.id);
    record.dir = format!(
        "{}.{:08x}",
        record.task.id,
        u32::from_le_bytes(clock::random())
    );
    let mut spec = spec(context, &instance, &record, secrets)?;
    if let Mode::App { again, .. } = &mut spec.mode {
        *again = true;
    }
    write_json(&instance.app(), &record, 0o600)?;
    make_dir(&instance.apps(), 0o711)?;
    let dir = record.run_dir(&instance);
    client::start(&dir, &spec, None).await?;
    remove_old(&instance, &record.dir);
    await_running(&dir).await
}
