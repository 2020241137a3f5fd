//! Health checks: tries in a row, until they have been good for long enough.

use std::time::Duration;

use tokio::time::Instant;
use windlass_domain::task::{Check, Outcome, Probe, Script};

use super::{
    ActionError, Context, Ended, Job, environment,
    script::{Followed, follow, script_spec},
};
use crate::{
    app, clock,
    files::chain,
    instance::InstanceDir,
    probe::{self, Streak},
    shim::{
        client,
        spec::{End, RunDir},
    },
    tree::remove_tree,
    users,
};

pub(super) async fn run_check(
    context: &Context,
    job: &Job,
    check: &Check,
    progress: &std::sync::Mutex<String>,
) -> Result<Ended, ActionError> {
    let user = users::resolve(job.task.run_as.as_deref(), &context.policy)?;
    let instance = InstanceDir::of(&context.data, &job.task, Some(&user))?;
    let (env, _) = environment(&instance, &job.task, &user, &job.secrets)?;
    let mut streak = Streak::new(check.healthy_for_ms);
    let limit = Duration::from_millis(check.try_timeout_ms.max(1));
    let mut number = 0u64;
    loop {
        let began = Instant::now();
        number += 1;
        let attempt = async {
            match &check.probe {
                Probe::Http {
                    url,
                    statuses,
                    body_contains,
                } => probe::http(url, statuses, body_contains.as_deref(), &env).await,
                Probe::Tcp { address } => probe::tcp(address, &env).await,
                Probe::Script(script) => probe_script(context, job, script, limit, number).await,
            }
        };
        // A script's shim keeps the time itself; the little more lets it say so.
        let patience = match &check.probe {
            Probe::Script(_) => limit + Duration::from_secs(5),
            Probe::Http { .. } | Probe::Tcp { .. } => limit,
        };
        let attempt = tokio::time::timeout(patience, attempt)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {} ms", check.try_timeout_ms)));
        if streak.judge(attempt, Instant::now()) {
            return Ok(Ended::new(Outcome::Succeeded, ""));
        }
        let failure = &streak.last_failure;
        let mut text = match check.healthy_for_ms {
            0 => format!("never healthy; the last failure: {failure}"),
            ms => format!("not healthy for {ms} ms on end; the last failure: {failure}"),
        };
        if let Some(trouble) = app::trouble(&instance) {
            text.push_str(&format!("; {trouble}"));
        }
        *progress
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = text;
        tokio::time::sleep_until(began + Duration::from_millis(check.interval_ms.max(10))).await;
    }
}

/// One try of a script check, under a shim of its own.
async fn probe_script(
    context: &Context,
    job: &Job,
    script: &Script,
    limit: Duration,
    number: u64,
) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| chain(error);
    let name = format!(
        "{}.probe-{number}-{:08x}",
        job.task.id,
        u32::from_le_bytes(clock::random())
    );
    let run = Try(RunDir::new(context.data.runs().join(name)));
    let dir = &run.0;
    let spec = script_spec(context, &job.task, &job.secrets, script, dir, limit)
        .map_err(|error| text(&error))?;
    client::start(dir, &spec, Some(&script.text))
        .await
        .map_err(|error| text(&error))?;
    let followed = follow(dir, None, |_| {})
        .await
        .map_err(|error| text(&error))?;
    match followed {
        Followed::Ended(status) => match &status.end {
            End::Exited(0) => Ok(()),
            end @ (End::Exited(_)
            | End::Signaled(_)
            | End::TimedOut
            | End::Stopped
            | End::NotStarted(_)) => {
                let (output, _) = status.output.render();
                let tail: String = output
                    .trim_end()
                    .chars()
                    .rev()
                    .take(500)
                    .collect::<Vec<_>>()
                    .into_iter()
                    .rev()
                    .collect();
                Err(format!(
                    "the check's script: {}; {tail}",
                    crate::shim::host::describe(end)
                ))
            }
        },
        Followed::NeverRan | Followed::Lost { .. } => Err("the check's script was lost".into()),
    }
}

/// The run of one try, which goes with it: also when the check is revoked, or its time passes, in the middle of it.
struct Try(RunDir);

impl Drop for Try {
    fn drop(&mut self) {
        // One that is just starting hears nothing, and finds no directory to start in.
        if matches!(client::is_live(&self.0), Ok(true)) {
            client::kill(&self.0);
        }
        if let Err(error) = remove_tree(self.0.path()) {
            tracing::warn!(error = %chain(&error), "the directory of a check's try stays");
        }
    }
}
