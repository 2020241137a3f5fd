//! The agent's heart: takes what the platform says, keeps the journal, decides what runs, and answers.
//!
//! One task of the runtime owns everything here; sessions and executions are other tasks that talk to it over bounded channels.
//! The states of a task are drawn in the head of `windlass_protocol`. What this module adds to them:
//! - Tasks of one service instance run one after the other, in the order of their pushes; instances run side by side, and so
//!   do orders of server work (`Lane`).
//! - A task that was interrupted by the agent's death waits for its next push, except scripts, which are found again at once.
//! - A journal of a new epoch knows of nothing: scripts that still run are killed (their outcome is `unknown` already, and nothing
//!   should act behind one's back), applications go on.
//! - A run directory without a journal entry is a second proof that an id ran: it is never run again.

mod apps;
mod queue;
mod recovery;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
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
    id::{InstanceId, OrderId},
    task::{Task, TaskId, TaskResult},
};
use windlass_protocol::{
    AgentState, AppState, DiskState, DownloadGrant, Epoch, HeldState, HeldTask, MAX_HELD_IN_HELLO,
    OutputChunk, ServerFacts, TaskPush, ToAgent, ToServer,
};

use crate::{
    cache, clock, crash,
    execute::Context,
    facts,
    files::make_dir,
    journal::{self, Journal, JournalError, Known},
    proc,
    query::Queries,
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

/// What runs one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Lane {
    /// The tasks of one service instance.
    Instance(InstanceId),
    /// The tasks of one order that are of no service instance.
    Order(OrderId),
}

impl Lane {
    fn of(task: &Task) -> Self {
        task.instance
            .map_or(Self::Order(task.id.order), Self::Instance)
    }
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
    /// Pushes that wait for their turn.
    queues: HashMap<Lane, VecDeque<TaskPush>>,
    busy: BTreeSet<Lane>,
    /// Results that could not be recorded yet (a disk without any space): tried again with each tick.
    unrecorded: Vec<(TaskId, TaskResult)>,
    /// Applications that wait for secrets to be launched again.
    need_secrets: BTreeMap<InstanceId, BTreeSet<String>>,
    session: Option<mpsc::Sender<ToServer>>,
    apps: Vec<AppState>,
    told: Option<AgentState>,
    tasks: JoinSet<Event>,
    queries: Queries,
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
            queries: Queries::new(context.clone()),
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
                (id, result) = self.queries.next() => self.send(ToServer::QueryAnswer { id, result }),
                Some(chunk) = self.output.1.recv() => self.live_output(chunk),
                _ = tick.tick() => self.tick(),
            }
        }
    }

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
            Command::Closed => {
                self.session = None;
                self.queries.drop_all();
            }
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
            ToAgent::Query {
                id,
                body,
                timeout_ms,
            } => {
                if let Err(refused) = self.queries.ask(id, body, timeout_ms) {
                    let result = Err(refused);
                    self.send(ToServer::QueryAnswer { id, result });
                }
            }
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

    fn event(&mut self, event: Event) {
        match event {
            Event::Finished(id, result) => {
                self.running.remove(&id);
                let lane = match self.journal.known(&id) {
                    Known::Held(entry) => entry.task.as_ref().map(Lane::of),
                    Known::Never | Known::Acknowledged(_) => None,
                };
                self.finish(id, result);
                self.tell_state();
                if let Some(lane) = lane {
                    self.busy.remove(&lane);
                    self.start_next(lane);
                }
            }
            Event::Relaunched(instance, outcome) => {
                match outcome {
                    Ok(()) => tracing::info!(%instance, "an application was launched again"),
                    Err(error) => {
                        tracing::error!(%instance, %error, "an application cannot be launched again")
                    }
                }
                self.busy.remove(&Lane::Instance(instance));
                self.start_next(Lane::Instance(instance));
                self.tell_state();
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
        self.context.balancers.look_after();
        self.tell_state();
    }

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
