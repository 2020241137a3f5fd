//! The agent's heart: takes what the platform says, keeps the journal, decides what runs, and answers.
//!
//! One task of the runtime owns everything here; sessions and executions are other tasks that talk to it over bounded channels.
//! The states of a task are drawn in the head of `windlass_protocol`. What this module adds to them:
//! - Tasks of one service instance run one after the other, in the order of their pushes; instances run side by side.
//! - A task that was interrupted by the agent's death waits for its next push, except scripts, which are found again at once.
//! - A journal of a new epoch knows of nothing: scripts that still run are killed (their outcome is `unknown` already, and nothing
//!   should act behind one's back), applications go on.
//! - A run directory without a journal entry is a second proof that an id ran: it is never run again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    fs,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use windlass_domain::{
    id::InstanceId,
    task::{Action, Outcome, Task, TaskId, TaskResult},
};
use windlass_protocol::{
    AgentState, AppState, DiskState, DownloadGrant, Epoch, HeldState, HeldTask, MAX_HELD_IN_HELLO,
    OutputChunk, SecretText, ServerFacts, TaskPush, ToAgent, ToServer,
};

use crate::{
    app, cache, clock, crash,
    execute::{self, Context, Job},
    facts,
    files::{chain, make_dir, remove_file, remove_tree},
    instance::InstanceDir,
    journal::{self, Entry, Journal, JournalError, Known},
    proc,
    shim::{
        client::{self, Found},
        spec::RunDir,
    },
};

/// How often health is looked at.
const TICK: Duration = Duration::from_secs(2);
/// Space that is given back when a script has to run on a full disk.
const RESERVE_BYTES: u64 = 1 << 20;
/// Run directories that no journal knows are kept for so long, as a proof that their ids ran.
const UNKNOWN_RUNS_KEPT: Duration = Duration::from_secs(7 * 86_400);

/// What a session asks of the agent.
#[derive(Debug)]
pub enum Command {
    /// For the hello.
    Introduce(oneshot::Sender<Introduction>),
    /// The session is open; messages go here.
    Opened(mpsc::Sender<ToServer>),
    /// The platform said something.
    Inbound(ToAgent),
    /// The session is over.
    Closed,
}

/// What a hello says about the agent.
#[derive(Debug, Clone)]
pub struct Introduction {
    /// The journal's epoch.
    pub epoch: Epoch,
    /// Facts and health.
    pub state: AgentState,
    /// Tasks that are not acknowledged, oldest first.
    pub held: Vec<HeldTask>,
    /// How many there are.
    pub held_total: u64,
}

enum Event {
    Finished(TaskId, TaskResult),
    Relaunched(InstanceId, Result<(), String>),
}

struct Running {
    revoked: CancellationToken,
    grants: watch::Sender<Option<DownloadGrant>>,
}

/// The agent.
pub struct Agent {
    context: Arc<Context>,
    facts: ServerFacts,
    journal: Journal,
    running: HashMap<TaskId, Running>,
    /// Pushes that wait for their turn, by instance.
    queues: HashMap<InstanceId, VecDeque<TaskPush>>,
    busy: BTreeSet<InstanceId>,
    /// Results that could not be recorded yet (a disk without any space): tried again with each tick.
    unrecorded: Vec<(TaskId, TaskResult)>,
    /// Applications that wait for secrets to be launched again.
    need_secrets: BTreeMap<InstanceId, BTreeSet<String>>,
    session: Option<mpsc::Sender<ToServer>>,
    apps: Vec<AppState>,
    told: Option<AgentState>,
    tasks: JoinSet<Event>,
    output: (mpsc::Sender<OutputChunk>, mpsc::Receiver<OutputChunk>),
}

impl Agent {
    /// Opens the journal and finds again what runs.
    ///
    /// # Errors
    /// When no journal can be had.
    pub fn open(context: Arc<Context>) -> Result<Self, JournalError> {
        let data = &context.data;
        make_dir(&data.runs(), 0o711)?;
        make_dir(&data.instances(), 0o711)?;
        let boot_id = proc::boot_id();
        let journal = Journal::open(
            &data.journal(),
            Epoch::from_bytes(clock::random()),
            &boot_id,
            clock::now(),
        )?;
        tracing::info!(epoch = %journal.epoch(), state = %journal::describe(journal.state()), "the journal is open");
        let facts = facts::gather(data, &context.policy);
        let mut agent = Self {
            facts,
            journal,
            running: HashMap::new(),
            queues: HashMap::new(),
            busy: BTreeSet::new(),
            unrecorded: Vec::new(),
            need_secrets: BTreeMap::new(),
            session: None,
            apps: Vec::new(),
            told: None,
            tasks: JoinSet::new(),
            output: mpsc::channel(64),
            context,
        };
        agent.take_reserve();
        agent.recover();
        Ok(agent)
    }

    /// Runs until `stop` is cancelled. Executions are left to their shims.
    pub async fn run(mut self, mut commands: mpsc::Receiver<Command>, stop: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => return,
                },
                Some(event) = self.tasks.join_next(), if !self.tasks.is_empty() => match event {
                    Ok(event) => self.event(event),
                    Err(error) => tracing::error!(%error, "a worker of the agent failed"),
                },
                Some(chunk) = self.output.1.recv() => self.live_output(chunk),
                _ = tick.tick() => self.tick(),
            }
        }
    }

    // ------------------------------------------------------------------------------------------ start

    fn recover(&mut self) {
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
            match client::find(&RunDir::new(data.run(&id))) {
                Ok(Found::Nothing) => {}
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
    fn end_run(&self, dir: &RunDir) {
        if matches!(client::find(dir), Ok(Found::Live)) {
            client::kill(dir);
        }
        if let Err(error) = remove_tree(dir.path()) {
            tracing::warn!(error = %chain(&error), "a run's directory stays");
        }
    }

    fn take_reserve(&self) {
        if self.disk().full {
            return;
        }
        if let Err(error) = journal::take_reserve(&self.context.data.reserve(), RESERVE_BYTES) {
            tracing::warn!(error = %chain(&error), "no reserve for a full disk");
        }
    }

    // --------------------------------------------------------------------------------------- messages

    fn command(&mut self, command: Command) {
        match command {
            Command::Introduce(reply) => {
                let introduction = self.introduce();
                if reply.send(introduction).is_err() {
                    tracing::debug!("a session ended before its hello");
                }
            }
            Command::Opened(session) => {
                self.session = Some(session);
                let results: Vec<(TaskId, TaskResult)> = self
                    .journal
                    .held()
                    .filter_map(|(id, entry)| Some((id, entry.result.clone()?)))
                    .collect();
                for (task_id, result) in results {
                    self.send(ToServer::Result { task_id, result });
                }
                self.ask_secrets();
            }
            Command::Inbound(message) => self.inbound(message),
            Command::Closed => self.session = None,
        }
    }

    fn introduce(&mut self) -> Introduction {
        let held: Vec<HeldTask> = self
            .journal
            .held()
            .take(MAX_HELD_IN_HELLO)
            .map(|(task_id, entry)| HeldTask {
                task_id,
                state: match (&entry.result, entry.started_at) {
                    (Some(_), _) => HeldState::Finished,
                    (None, Some(_)) => HeldState::Started,
                    (None, None) => HeldState::Accepted,
                },
            })
            .collect();
        self.look_at_apps();
        let state = self.state();
        self.told = Some(state.clone());
        Introduction {
            epoch: self.journal.epoch(),
            state,
            held_total: self.journal.held().count() as u64,
            held,
        }
    }

    fn inbound(&mut self, message: ToAgent) {
        match message {
            ToAgent::Task(push) => self.push(*push),
            ToAgent::Revoke { task_id } => self.revoke(task_id),
            ToAgent::Ack { task_id } => self.acknowledge(task_id),
            ToAgent::Secrets { instance, values } => self.secrets(instance, &values),
            // The session's own affairs.
            ToAgent::Challenge { .. }
            | ToAgent::Welcome(_)
            | ToAgent::Ping { .. }
            | ToAgent::Goodbye(_) => {}
            ToAgent::Unsupported { of_kind } => {
                tracing::warn!(kind = %of_kind, "the platform does not know a message of this agent");
            }
        }
    }

    fn push(&mut self, push: TaskPush) {
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

    fn push_again(&mut self, entry: Entry, push: TaskPush) {
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
        let queue = self.queues.entry(push.task.instance).or_default();
        match queue.iter_mut().find(|waiting| waiting.task.id == id) {
            Some(waiting) => *waiting = push,
            None => {
                let instance = push.task.instance;
                queue.push_back(push);
                self.start_next(instance);
            }
        }
    }

    fn push_new(&mut self, push: TaskPush) {
        let id = push.task.id;
        if self.context.data.run(&id).exists() {
            let message = "this agent's journal was lost, and a directory shows that the task was begun before; it is not run again";
            let result = execute::result_without_run(Outcome::Unknown, message, None);
            self.record(Some(push.task), id, result);
            return;
        }
        if let Some(message) = self.refusal(&push.task) {
            let result = execute::result_without_run(Outcome::Refused, &message, None);
            self.record(Some(push.task), id, result);
            return;
        }
        if let Err(error) = self.journal.accept(push.task.clone()) {
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
        let instance = push.task.instance;
        self.queues.entry(instance).or_default().push_back(push);
        self.start_next(instance);
    }

    /// Why a task is not started.
    fn refusal(&self, task: &Task) -> Option<String> {
        let now = clock::now();
        if now > task.expires_at {
            return Some(format!(
                "it expired at {}; it is {now} on this server now",
                task.expires_at
            ));
        }
        let highest = self.journal.fence(&task.instance);
        if task.fence < highest {
            return Some(format!(
                "its fence is {}; this server has seen {highest} of {} already: a newer order has taken over",
                task.fence, task.instance
            ));
        }
        let disk = self.disk();
        let may_free = match task.action {
            Action::Script(_) | Action::StopSupervised { .. } | Action::Check(_) => true,
            Action::Fetch(_)
            | Action::Unpack { .. }
            | Action::WriteFile { .. }
            | Action::Activate(_)
            | Action::Start(_) => false,
        };
        (disk.full && !may_free).then(|| {
            format!(
                "the disk of {} is full: {} bytes are free, {} have to be; run a command that frees some (scripts are still accepted)",
                self.context.data.path().display(),
                disk.free_bytes,
                self.context.policy.min_free_bytes
            )
        })
    }

    fn start_next(&mut self, instance: InstanceId) {
        while !self.busy.contains(&instance) {
            let Some(push) = self.queues.get_mut(&instance).and_then(VecDeque::pop_front) else {
                self.queues.remove(&instance);
                return;
            };
            let id = push.task.id;
            let begun = match self.journal.known(&id) {
                Known::Held(entry) => entry.started_at,
                Known::Never | Known::Acknowledged(_) => None,
            };
            let at = match begun {
                // Interrupted: goes on, whatever the time.
                Some(at) => at,
                None => {
                    if let Some(message) = self.refusal(&push.task) {
                        let result = execute::result_without_run(Outcome::Refused, &message, None);
                        self.finish(id, result);
                        continue;
                    }
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

    fn spawn(&mut self, push: TaskPush) {
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
        self.busy.insert(task.instance);
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

    fn revoke(&mut self, id: TaskId) {
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

    fn acknowledge(&mut self, id: TaskId) {
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

    // ------------------------------------------------------------------------------------------ events

    fn event(&mut self, event: Event) {
        match event {
            Event::Finished(id, result) => {
                self.running.remove(&id);
                let instance = match self.journal.known(&id) {
                    Known::Held(entry) => entry.task.map(|task| task.instance),
                    Known::Never | Known::Acknowledged(_) => None,
                };
                self.finish(id, result);
                self.tell_state();
                if let Some(instance) = instance {
                    self.busy.remove(&instance);
                    self.start_next(instance);
                }
            }
            Event::Relaunched(instance, outcome) => {
                match outcome {
                    Ok(()) => tracing::info!(%instance, "an application was launched again"),
                    Err(error) => {
                        tracing::error!(%instance, %error, "an application cannot be launched again")
                    }
                }
                self.busy.remove(&instance);
                self.start_next(instance);
                self.tell_state();
            }
        }
    }

    fn finish(&mut self, id: TaskId, result: TaskResult) {
        self.record(None, id, result);
    }

    /// Records an end, and only then sends it.
    fn record(&mut self, task: Option<Task>, id: TaskId, result: TaskResult) {
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

    fn send(&mut self, message: ToServer) {
        let Some(session) = &self.session else { return };
        crash::point("before_send");
        if session.try_send(message).is_err() {
            // Too slow or gone: without the channel the session ends, and the next one is told everything again.
            tracing::warn!("the session takes no messages; it is closed");
            self.session = None;
        }
        crash::point("after_send");
    }

    fn live_output(&mut self, chunk: OutputChunk) {
        if let Some(session) = &self.session
            && session.capacity() > session.max_capacity() / 2
            && session.try_send(ToServer::Output(chunk)).is_err()
        {
            tracing::trace!("live output was dropped");
        }
    }

    fn tick(&mut self) {
        for (id, result) in std::mem::take(&mut self.unrecorded) {
            self.finish(id, result);
        }
        self.take_reserve();
        self.look_at_apps();
        self.tell_state();
    }

    // ------------------------------------------------------------------------------------ applications

    fn look_at_apps(&mut self) {
        self.apps.clear();
        for (id, record) in app::recorded(&self.context.data) {
            let (state, relaunch) = app::look(&self.context.data, id, &record);
            self.apps.push(state);
            // A start or stop that is under way, or was interrupted and will go on, decides itself.
            let pending = self.busy.contains(&id)
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

    fn ask_secrets(&mut self) {
        let needs: Vec<(InstanceId, Vec<String>)> = self
            .need_secrets
            .iter()
            .map(|(instance, names)| (*instance, names.iter().cloned().collect()))
            .collect();
        for (instance, names) in needs {
            self.send(ToServer::SecretsNeeded { instance, names });
        }
    }

    fn secrets(&mut self, instance: InstanceId, values: &BTreeMap<String, SecretText>) {
        if self.need_secrets.remove(&instance).is_none() || self.busy.contains(&instance) {
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

    fn relaunch(
        &mut self,
        id: InstanceId,
        record: app::AppRecord,
        secrets: BTreeMap<String, SecretText>,
    ) {
        self.busy.insert(id);
        let context = self.context.clone();
        self.tasks.spawn(async move {
            let outcome = app::relaunch(&context, id, record, &secrets).await;
            Event::Relaunched(id, outcome.map_err(|error| chain(&error)))
        });
    }

    // ------------------------------------------------------------------------------------------- state

    fn disk(&self) -> DiskState {
        let free_bytes = cache::free_bytes(self.context.data.path());
        DiskState {
            free_bytes,
            full: free_bytes < self.context.policy.min_free_bytes,
        }
    }

    fn state(&self) -> AgentState {
        AgentState {
            facts: self.facts.clone(),
            disk: self.disk(),
            journal: self.journal.state().clone(),
            apps: self.apps.clone(),
            cgroups: self.context.cgroup.is_some(),
        }
    }

    /// Tells the platform what changed. Free space alone, while it is enough, is no change worth a message.
    fn tell_state(&mut self) {
        if self.session.is_none() {
            return;
        }
        self.look_at_apps();
        let state = self.state();
        let told = self.told.as_ref().is_some_and(|told| {
            told.apps == state.apps
                && told.disk.full == state.disk.full
                && told.journal == state.journal
                && told.facts == state.facts
        });
        if !told {
            self.told = Some(state.clone());
            self.send(ToServer::State(Box::new(state)));
        }
    }
}
