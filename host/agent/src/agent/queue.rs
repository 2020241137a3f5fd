//! The way of a task through the agent: taken, queued, started, ended, acknowledged. The journal goes first at every step.

use std::collections::VecDeque;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use windlass_domain::task::{Action, Fault, Outcome, Task, TaskId, TaskResult};
use windlass_protocol::{TaskPush, ToServer};

use super::{Agent, Event, Lane, Running};
use crate::{
    clock, crash,
    execute::{self, Job},
    files::{chain, remove_file},
    journal::{Entry, Known},
    shim::{
        client::{self, Found},
        spec::RunDir,
    },
    tree::remove_tree,
};

impl Agent {
    pub(super) fn push(&mut self, push: TaskPush) {
        let id = push.task.id;
        match self.journal.known(&id) {
            Known::Acknowledged(outcome) => {
                let message = "it ran before, and its result was acknowledged; it is not run again";
                let result = execute::result_without_run(outcome, message, None);
                self.send(ToServer::Result {
                    task_id: id,
                    result,
                });
            }
            Known::Held(entry) => self.push_again(*entry, push),
            Known::Never => self.push_new(push),
        }
    }

    pub(super) fn push_again(&mut self, entry: Entry, push: TaskPush) {
        let id = push.task.id;
        if let Some(result) = entry.result {
            self.send(ToServer::Result {
                task_id: id,
                result,
            });
            return;
        }
        self.send(ToServer::Accepted { task_id: id });
        if let Some(running) = self.running.get(&id) {
            if push.grant.is_some() {
                running.grants.send_replace(push.grant);
            }
            if let Some(at) = entry.started_at {
                self.send(ToServer::Started { task_id: id, at });
            }
            return;
        }
        let lane = Lane::of(&push.task);
        let queue = self.queues.entry(lane).or_default();
        match queue.iter_mut().find(|waiting| waiting.task.id == id) {
            Some(waiting) => *waiting = push,
            None => {
                queue.push_back(push);
                self.start_next(lane);
            }
        }
    }

    pub(super) fn push_new(&mut self, push: TaskPush) {
        let id = push.task.id;
        if self.context.data.run(&id).exists() {
            let message = "this agent's journal was lost, and a directory shows that the task was begun before; it is not run again";
            let result = execute::result_without_run(Outcome::Unknown, message, None);
            self.record(Some(push.task), id, result);
            return;
        }
        if let Some((message, fault)) = self.refusal(&push.task) {
            let result = TaskResult {
                fault,
                ..execute::result_without_run(Outcome::Refused, &message, None)
            };
            self.record(Some(push.task), id, result);
            return;
        }
        let lane = Lane::of(&push.task);
        // With nothing before it, its turn is now: one sync then serves its acceptance and its start.
        let is_next =
            !self.busy.contains(&lane) && self.queues.get(&lane).is_none_or(VecDeque::is_empty);
        let recorded = if is_next {
            self.journal
                .accept_and_start(push.task.clone(), clock::now())
        } else {
            self.journal.accept(push.task.clone())
        };
        if let Err(error) = recorded {
            let message = format!(
                "the agent cannot record the task, so it does not run it: {}; free some space on its disk",
                chain(&error)
            );
            tracing::error!(task.id = %id, error = %chain(&error), "a task cannot be recorded");
            let result = execute::result_without_run(Outcome::Refused, &message, None);
            self.send(ToServer::Result {
                task_id: id,
                result,
            });
            return;
        }
        self.send(ToServer::Accepted { task_id: id });
        self.queues.entry(lane).or_default().push_back(push);
        self.start_next(lane);
    }

    /// Why a task is not started, for people and for programs.
    pub(super) fn refusal(&self, task: &Task) -> Option<(String, Option<Fault>)> {
        let now = clock::now();
        if now > task.expires_at {
            let message = format!(
                "it expired at {}; it is {now} on this server now",
                task.expires_at
            );
            return Some((message, Some(Fault::Expired)));
        }
        if let Some(instance) = &task.instance {
            let highest = self.journal.fence(instance);
            if task.fence < highest {
                let message = format!(
                    "its fence is {}; this server has seen {highest} of {instance} already: a newer order has taken over",
                    task.fence
                );
                return Some((message, None));
            }
        }
        let disk = self.disk();
        let may_free = match task.action {
            Action::Script(_) | Action::StopSupervised { .. } | Action::Check(_) => true,
            Action::Fetch(_)
            | Action::Unpack { .. }
            | Action::WriteFile { .. }
            | Action::Activate(_)
            | Action::PlaceFiles(_)
            | Action::Start(_) => false,
        };
        (disk.full && !may_free).then(|| {
            let message = format!(
                "the disk of {} is full: {} bytes are free, {} have to be; run a command that frees some (scripts are still accepted)",
                self.context.data.path().display(),
                disk.free_bytes,
                self.context.policy.min_free_bytes
            );
            (message, None)
        })
    }

    pub(super) fn start_next(&mut self, lane: Lane) {
        while !self.busy.contains(&lane) {
            let Some(push) = self.queues.get_mut(&lane).and_then(VecDeque::pop_front) else {
                self.queues.remove(&lane);
                return;
            };
            let id = push.task.id;
            let begun = match self.journal.known(&id) {
                Known::Held(entry) => entry.started_at,
                Known::Never | Known::Acknowledged(_) => None,
            };
            // Interrupted while it acted: it goes on, whatever the time. Interrupted before: it may be too late for it by now.
            let refused = match begun {
                Some(_) if self.has_acted(&push.task) => None,
                Some(_) | None => self.refusal(&push.task),
            };
            if let Some((message, fault)) = refused {
                let result = TaskResult {
                    fault,
                    ..execute::result_without_run(Outcome::Refused, &message, None)
                };
                self.finish(id, result);
                continue;
            }
            let at = match begun {
                Some(at) => at,
                None => {
                    let at = clock::now();
                    if let Err(error) = self.journal.start(id, at) {
                        let message = format!(
                            "the agent cannot record the start: {}; free some space on its disk",
                            chain(&error)
                        );
                        let result = execute::result_without_run(Outcome::Refused, &message, None);
                        self.finish(id, result);
                        continue;
                    }
                    at
                }
            };
            self.send(ToServer::Started { task_id: id, at });
            if self.disk().full
                && let Err(error) = remove_file(&self.context.data.reserve())
            {
                tracing::warn!(error = %chain(&error), "the reserve cannot be given back");
            }
            self.spawn(push);
        }
    }

    /// Whether a task that started may have done something: of a script its run directory tells, of the others nothing does.
    fn has_acted(&self, task: &Task) -> bool {
        match &task.action {
            Action::Script(_) => !matches!(
                client::find(&RunDir::new(self.context.data.run(&task.id))),
                Ok(Found::Nothing)
            ),
            Action::Fetch(_)
            | Action::Unpack { .. }
            | Action::WriteFile { .. }
            | Action::Activate(_)
            | Action::Start(_)
            | Action::StopSupervised { .. }
            | Action::PlaceFiles(_)
            | Action::Check(_) => true,
        }
    }

    pub(super) fn spawn(&mut self, push: TaskPush) {
        let TaskPush {
            task,
            secrets,
            grant,
        } = push;
        let id = task.id;
        let started_at = match self.journal.known(&id) {
            Known::Held(entry) => entry.started_at,
            Known::Never | Known::Acknowledged(_) => None,
        }
        .unwrap_or_else(clock::now);
        let (grants, receiver) = watch::channel(grant);
        let revoked = CancellationToken::new();
        self.busy.insert(Lane::of(&task));
        self.running.insert(
            id,
            Running {
                revoked: revoked.clone(),
                grants,
            },
        );
        let job = Job {
            task,
            secrets,
            grants: receiver,
            revoked,
            started_at,
            output: self.output.0.clone(),
        };
        let context = self.context.clone();
        self.tasks.spawn(async move {
            let (id, result) = execute::run(context, job).await;
            Event::Finished(id, result)
        });
    }

    pub(super) fn revoke(&mut self, id: TaskId) {
        match self.journal.known(&id) {
            Known::Acknowledged(outcome) => {
                let result = execute::result_without_run(
                    outcome,
                    "it had ended before it was revoked",
                    None,
                );
                self.send(ToServer::Result {
                    task_id: id,
                    result,
                });
            }
            Known::Held(entry) => {
                if let Some(result) = entry.result {
                    self.send(ToServer::Result {
                        task_id: id,
                        result,
                    });
                } else if let Some(running) = self.running.get(&id) {
                    running.revoked.cancel();
                } else {
                    for queue in self.queues.values_mut() {
                        queue.retain(|waiting| waiting.task.id != id);
                    }
                    let message = if entry.started_at.is_some() {
                        "it was revoked after an interruption, before it went on"
                    } else {
                        "it was revoked before it started"
                    };
                    self.finish(
                        id,
                        execute::result_without_run(Outcome::Revoked, message, entry.started_at),
                    );
                }
            }
            Known::Never => {
                let result = execute::result_without_run(
                    Outcome::Revoked,
                    "it was revoked before it arrived",
                    None,
                );
                self.record(None, id, result);
            }
        }
    }

    pub(super) fn acknowledge(&mut self, id: TaskId) {
        crash::point("before_ack");
        if let Err(error) = self.journal.acknowledge(id) {
            tracing::warn!(task.id = %id, error = %chain(&error), "an acknowledgement cannot be recorded; the result will be sent again");
            return;
        }
        if matches!(self.journal.known(&id), Known::Acknowledged(_))
            && let Err(error) = remove_tree(self.context.data.run(&id).as_path())
        {
            tracing::warn!(error = %chain(&error), "a run's directory stays");
        }
        crash::point("after_ack");
    }

    pub(super) fn finish(&mut self, id: TaskId, result: TaskResult) {
        self.record(None, id, result);
    }

    /// Records an end, and only then sends it.
    pub(super) fn record(&mut self, task: Option<Task>, id: TaskId, result: TaskResult) {
        crash::point("before_result");
        match self.journal.finish(task, id, result.clone()) {
            Ok(()) => {
                crash::point("after_result");
                self.send(ToServer::Result {
                    task_id: id,
                    result,
                });
            }
            Err(error) => {
                tracing::error!(task.id = %id, error = %chain(&error), "a result cannot be recorded yet");
                self.unrecorded.push((id, result));
            }
        }
    }
}
