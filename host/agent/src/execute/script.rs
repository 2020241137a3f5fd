//! Scripts: under a shim, followed to their end, found again after the agent's death.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use windlass_domain::task::{Fault, Outcome, Script, Task, TaskId};
use windlass_protocol::{OutputChunk, SecretText};

use super::{ActionError, Context, Ended, Job, become_user, cgroup, environment, too_late};
use crate::{
    instance::InstanceDir,
    proc,
    shim::{
        client::{self, Found, Watch},
        spec::{End, Mode, RunDir, RunStatus, Spec},
    },
    users,
};

pub(super) fn script_spec(
    context: &Context,
    task: &Task,
    secrets: &BTreeMap<String, SecretText>,
    script: &Script,
    dir: &RunDir,
    timeout: Duration,
) -> Result<Spec, ActionError> {
    let user = users::resolve(task.run_as.as_deref(), &context.policy)?;
    let instance = InstanceDir::of(&context.data, task, Some(&user))?;
    let (env, texts) = environment(&instance, task, &user, secrets)?;
    let work_dir = instance.work_dir(task)?;
    let working_dir = match &script.working_dir {
        Some(path) => work_dir.join(path),
        None => work_dir,
    };
    let mut command = script.interpreter.clone();
    command.push(dir.script().display().to_string());
    let name = dir
        .path()
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    Ok(Spec {
        command,
        env,
        working_dir,
        user: become_user(&user),
        secrets: texts,
        cgroup: cgroup(context, &name),
        mode: Mode::Script {
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        },
    })
}

pub(super) async fn run_script(
    context: &Context,
    job: &Job,
    script: &Script,
    left: Duration,
) -> Result<Ended, ActionError> {
    let dir = RunDir::new(context.data.run(&job.task.id));
    if client::find_settled(&dir).await? == Found::Nothing {
        if left.is_zero() {
            return Ok(too_late(&job.task));
        }
        let spec = script_spec(context, &job.task, &job.secrets, script, &dir, left)?;
        client::start(&dir, &spec, Some(&script.text)).await?;
    }
    let mut tail = Tail::new(&dir, job.task.id);
    let status = follow(&dir, Some(&job.revoked), |done| {
        tail.send(&job.output, done)
    })
    .await?;
    Ok(match status {
        Followed::Ended(status) => script_ended(&status, job.task.timeout_ms),
        Followed::NeverRan => Ended::new(
            Outcome::Failed,
            "the shim could not start the script; the disk may be full or out of memory: look at the agent's log",
        ),
        Followed::Lost { machine_restarted } => {
            kill_marked(&job.task.id);
            let (fault, message) = if machine_restarted {
                (
                    Fault::Restarted,
                    "the server restarted while the script ran; what it did cannot be known",
                )
            } else {
                (
                    Fault::RunnerLost,
                    "the script's shim was killed from outside; how the script ended cannot be known, what was left of it was killed",
                )
            };
            Ended {
                output: output_of(&dir),
                ..Ended::new(Outcome::Unknown, message).because(Some(fault))
            }
        }
    })
}

fn output_of(dir: &RunDir) -> String {
    let mut capture = crate::capture::Capture::default();
    capture.push(&std::fs::read(dir.output()).unwrap_or_default());
    capture.render().0
}

/// Ends processes that a lost shim left.
pub(crate) fn kill_marked(task: &TaskId) {
    let marker = format!("WINDLASS_TASK={task}");
    for process in proc::with_environment(|line| line == marker.as_bytes()) {
        proc::signal(&process, rustix::process::Signal::KILL);
    }
}

fn script_ended(status: &RunStatus, timeout_ms: u64) -> Ended {
    let (output, dropped_bytes) = status.output.render();
    let (outcome, exit_code, message) = match &status.end {
        End::Exited(0) => (Outcome::Succeeded, Some(0), String::new()),
        End::Exited(code) => (
            Outcome::Failed,
            Some(*code),
            format!("the script ended with exit code {code}; see its output"),
        ),
        End::Signaled(signal) => (
            Outcome::Failed,
            None,
            format!("the script was ended by signal {signal} from outside"),
        ),
        End::TimedOut => (
            Outcome::TimedOut,
            None,
            format!(
                "the script ran longer than its time-out of {timeout_ms} ms; its process tree was killed"
            ),
        ),
        End::Stopped => (
            Outcome::Revoked,
            None,
            "it was revoked while it ran; its process tree was killed".into(),
        ),
        End::NotStarted(message) => (Outcome::Failed, None, message.clone()),
    };
    Ended {
        outcome,
        exit_code,
        output,
        dropped_bytes,
        message,
        fault: status.fault,
    }
}

/// What became of a run.
pub(super) enum Followed {
    /// The shim wrote how it ended.
    Ended(Box<RunStatus>),
    /// Nothing was run.
    NeverRan,
    /// It cannot be known.
    Lost { machine_restarted: bool },
}

/// Waits for the end of a run. `look` is called after each change, with whether it is the last time.
pub(super) async fn follow(
    dir: &RunDir,
    revoked: Option<&CancellationToken>,
    mut look: impl FnMut(bool),
) -> Result<Followed, ActionError> {
    let watch = Watch::new(dir);
    let mut killed = false;
    loop {
        let found = client::find(dir)?;
        look(!matches!(found, Found::Live));
        match found {
            Found::Ended(status) => return Ok(Followed::Ended(status)),
            Found::Nothing => return Ok(Followed::NeverRan),
            Found::Lost(identity) => {
                return Ok(Followed::Lost {
                    machine_restarted: identity.shim.boot_id != proc::boot_id(),
                });
            }
            Found::Live => {}
        }
        let revoke = async {
            match revoked {
                Some(token) if !killed => token.cancelled().await,
                Some(_) | None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = revoke => {
                // A shim that is just starting has no ears yet: asked again until it takes the request.
                if dir.identity().exists() && dir.control().exists() {
                    client::kill(dir);
                    killed = true;
                } else {
                    watch.changed(Duration::from_millis(50)).await;
                }
            }
            () = watch.changed(client::LOOK_AGAIN) => {}
        }
    }
}

/// Text of as many bytes as there are, so that offsets stay true: each byte that is not UTF-8 becomes `?`.
fn same_length(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| '?'));
    }
    text
}

/// Reads what a run has written since the last look.
struct Tail {
    path: PathBuf,
    task_id: TaskId,
    offset: u64,
    dropped: u64,
}

impl Tail {
    fn new(dir: &RunDir, task_id: TaskId) -> Self {
        Self {
            path: dir.output(),
            task_id,
            offset: 0,
            dropped: 0,
        }
    }

    fn send(&mut self, output: &mpsc::Sender<OutputChunk>, last: bool) {
        use std::os::unix::fs::FileExt as _;
        let Ok(file) = std::fs::File::open(&self.path) else {
            return;
        };
        let mut buffer = vec![0; windlass_protocol::MAX_OUTPUT_CHUNK_BYTES];
        loop {
            let count = file.read_at(&mut buffer, self.offset).unwrap_or(0);
            // A character may be written in two pieces; its begin waits for the rest.
            let whole = match std::str::from_utf8(&buffer[..count]) {
                Err(error) if error.error_len().is_none() && !last => error.valid_up_to(),
                Ok(_) | Err(_) => count,
            };
            if whole == 0 {
                return;
            }
            let chunk = OutputChunk {
                task_id: self.task_id,
                offset: self.offset,
                text: same_length(&buffer[..whole]),
                dropped_bytes: self.dropped,
            };
            self.offset += whole as u64;
            match output.try_send(chunk) {
                Ok(()) => self.dropped = 0,
                Err(_) => self.dropped += whole as u64,
            }
        }
    }
}
