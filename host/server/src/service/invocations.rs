//! Invocations: a public command on servers, now. Source: spec "Invocations", "Public commands (plugins)".
//!
//! An invocation is an order of server work: made and run with one commit, driven by the engine, delivered by the gateway, run at
//! most once by agents' journals. This service renders the command for each server, refuses what may not run, and shows an order as
//! an invocation. Nothing is stored beside the order but how many a workspace made today (`quota`): its specification is the order's
//! `spec` blob, and what the command makes of an output is asked again at each look (a pure function of the pinned plugin).

mod output;
mod quota;
mod runs;

pub use output::{RunFollower, RunNews, RunOutput};

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};
use windlass_domain::{
    expand::{ServerTurn, ServerWork, server_work},
    id::{OrderId, ServerId},
    invocation::{
        self, Interpreted, Invocation, InvocationSpec, MAX_SERVERS, MAX_TIMEOUT_S, MIN_TIMEOUT_S,
        Run, RunCounts, RunState,
    },
    limits::{Amount, Limits},
    order::{Action, Control, Order, OrderState, PlanRevision, Purpose},
    plan::{Plan, ScriptStep},
    plugin::{CommandRequest, PluginKind},
    progress::{Counts, Progress},
    server::Server,
    workspace::Workspace,
};
use windlass_runtime::{Plugin, Plugins};
use windlass_store::{BlobDigest, Entry};

use runs::{asked, facts, runs};

use super::{
    Caller, PageOf, PageRequest, ServiceError, chosen,
    orders::Orders,
    planning::plugin_failed,
    records::{self, Sort},
    servers::Servers,
};
use crate::{
    clock,
    engine::{self, Engine, rows},
    ids, keys,
};

/// How long an invocation waits for a server that is not connected, in seconds, unless asked otherwise.
const DELIVERY_TIMEOUT_S: u64 = 30;
/// The largest specification that is read.
const MAX_SPEC_BYTES: u64 = 1024 * 1024;

/// A command to be run. JSON: `{"command": "system-info", "servers": ["srv_…"]}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateInvocation {
    /// The public command: `name` (its default version) or `name@version`.
    pub command: String,
    /// Its parameters; none unless given.
    #[serde(default = "no_parameters")]
    pub parameters: serde_json::Value,
    /// The servers: 1 to 50, each once.
    pub servers: Vec<ServerId>,
    /// Time-out in seconds: less than 10 counts as 10, at most 86,400; the command's own (mostly 60) unless given.
    #[serde(default)]
    pub timeout_s: Option<u64>,
    /// Servers at once: 1 to 50, all unless given.
    #[serde(default)]
    pub max_in_flight: Option<u32>,
    /// OS user; the command's choice (mostly the agent's own user) unless given. The agent has the last word.
    #[serde(default)]
    pub run_as: Option<String>,
    /// How long to wait for a server that is not connected, in seconds: 1 to 86,400, 30 unless given.
    #[serde(default)]
    pub delivery_timeout_s: Option<u64>,
}

fn no_parameters() -> serde_json::Value {
    serde_json::json!({})
}

/// What invocations stand on.
#[derive(Clone)]
pub struct InvocationsParts {
    /// Drives orders.
    pub engine: Engine,
    /// Reads them.
    pub orders: Orders,
    /// The commands.
    pub plugins: Arc<Plugins>,
    /// Servers.
    pub servers: Servers,
    /// Invocations that a workspace may make in a day.
    pub per_day: u32,
}

/// Invocations. Cheap to clone.
#[derive(Clone)]
pub struct Invocations {
    parts: InvocationsParts,
    /// Held while an invocation is counted and made: see `quota`.
    counting: Arc<tokio::sync::Mutex<()>>,
}

impl Invocations {
    /// Over the engine.
    #[must_use]
    pub fn new(parts: InvocationsParts) -> Self {
        Self {
            parts,
            counting: Arc::default(),
        }
    }

    /// Renders a command for each server and runs it.
    ///
    /// # Errors
    /// `plugin_not_available`, `parameters_invalid`, `server_unknown`, `user_not_approved`, `plugin_call_failed`, `out_of_limit`,
    /// `invocation_quota_reached`;
    /// [`ServiceError::NotFound`] of the workspace.
    pub async fn create(
        &self,
        caller: Caller,
        ws: &str,
        request: CreateInvocation,
    ) -> Result<Invocation, ServiceError> {
        let shared = &self.parts.engine.shared;
        records::get::<Workspace>(&*shared.store, ws).await?;
        check_figures(&request)?;
        let plugin = chosen::plugin(
            &self.parts.plugins,
            PluginKind::PublicCommand,
            "/command",
            &request.command,
        )?;
        plugin
            .validate_parameters(&request.parameters)
            .map_err(|faults| {
                chosen::parameters_invalid("/parameters", plugin.reference(), &faults)
            })?;
        let servers = self.servers(ws, &request.servers).await?;
        self.has_room(ws).await?;
        let rendered = servers
            .iter()
            .map(|server| self.turn(&plugin, server, &request));
        let turns: Vec<ServerTurn> = join_all(rendered)
            .await
            .into_iter()
            .collect::<Result<_, _>>()?;
        let name = format!("{}@{}", plugin.reference().name, plugin.reference().version);
        let count = u32::try_from(turns.len()).unwrap_or(u32::MAX);
        let delivery_timeout_s = request.delivery_timeout_s.unwrap_or(DELIVERY_TIMEOUT_S);
        let max_in_flight = request.max_in_flight.unwrap_or(count).min(count);
        let plan = server_work(ServerWork {
            name: plugin.reference().name.clone(),
            turns,
            limits: Limits {
                max_in_flight,
                // One server's failure is no reason to leave the others out.
                max_failures: Amount::Percent(100),
                ..Limits::default()
            },
            delivery_deadline_ms: delivery_timeout_s * 1000,
        })
        .map_err(|bad| {
            ServiceError::invalid(
                "invocation_refused",
                "",
                bad.to_string(),
                "change the request, or the command",
            )
        })?;
        let spec = InvocationSpec {
            command: plugin.reference().clone(),
            parameters: request.parameters,
            run_as: request.run_as,
            timeout_s: request.timeout_s,
            max_in_flight,
            delivery_timeout_s,
        };
        let order = self.order(&caller, ws, &name, &plan, &spec).await?;
        let made = self.shown(&order, spec.clone(), Vec::new());
        let with = caller.answered(serde_json::to_value(&made).unwrap_or_default());
        let id = order.id;
        self.create_counted(order, &plan, with).await?;
        self.get(ws, id).await
    }

    async fn order(
        &self,
        caller: &Caller,
        ws: &str,
        name: &str,
        plan: &Plan,
        spec: &InvocationSpec,
    ) -> Result<Order, ServiceError> {
        let blobs = &self.parts.engine.shared.blobs;
        let kept = |error| ServiceError::internal("keep an invocation", error);
        let digest = engine::store_json(blobs, plan).await.map_err(kept)?;
        let spec = engine::store_json(blobs, spec).await.map_err(kept)?;
        let (id, at) = (OrderId::from_uuid(ids::new_uuid()), clock::now());
        let count = u32::try_from(plan.units.len()).unwrap_or(u32::MAX);
        Ok(Order {
            schema: Order::SCHEMA,
            id,
            workspace: ws.to_owned(),
            title: name.to_owned(),
            purpose: Purpose::Invocation {
                command: name.to_owned(),
            },
            state: OrderState::NotStarted,
            state_reason: String::new(),
            strategy: String::new(),
            plan: digest,
            revisions: vec![PlanRevision {
                revision: 1,
                digest,
                author: caller.name.clone(),
                at,
                difference: String::new(),
            }],
            spec,
            counts: Counts {
                waiting: count,
                ..Counts::default()
            },
            control: Control::NotStarted,
            stalled: false,
            lock_owner: id,
            last_event: 0,
            rolled_back_by: None,
            rollback_asked: None,
            server_count: count,
            created_by: caller.name.clone(),
            created_at: at,
            started_at: None,
            finished_at: None,
            last_progress_at: None,
            // Whoever invokes waits for the answer.
            notify: false,
            tech_stacks: Vec::new(),
        })
    }

    async fn servers(&self, ws: &str, wanted: &[ServerId]) -> Result<Vec<Server>, ServiceError> {
        let mut seen = BTreeSet::new();
        let mut servers = Vec::with_capacity(wanted.len());
        for (at, id) in wanted.iter().enumerate() {
            let refused = |message: String, mend: &str| {
                ServiceError::invalid("server_unknown", format!("/servers/{at}"), message, mend)
            };
            if !seen.insert(id) {
                let message = format!("the server `{id}` is named twice");
                return Err(refused(message, "name each server once"));
            }
            let found = self.parts.servers.get(ws, *id).await;
            let (server, _) = found.map_err(|error| match error {
                ServiceError::NotFound { .. } => refused(
                    format!("there is no server `{id}` in the workspace `{ws}`"),
                    "give ids of servers of this workspace",
                ),
                other => other,
            })?;
            servers.push(server);
        }
        Ok(servers)
    }

    /// The command as it will run on one server.
    async fn turn(
        &self,
        plugin: &Plugin,
        server: &Server,
        request: &CreateInvocation,
    ) -> Result<ServerTurn, ServiceError> {
        let rendered = plugin
            .render(&CommandRequest {
                parameters: request.parameters.clone(),
                target: facts(server),
            })
            .await
            .map_err(|error| plugin_failed("/parameters", &error))?;
        let run_as = match (&request.run_as, rendered.run_as) {
            (Some(asked), _) => Some(asked.clone()),
            (None, Some(user)) => {
                self.check_user(plugin, &user)?;
                Some(user)
            }
            (None, None) => None,
        };
        let timeout_s = request.timeout_s.unwrap_or(rendered.timeout_ms / 1000);
        Ok(ServerTurn {
            server: server.id,
            name: server.name.to_string(),
            script: ScriptStep {
                name: plugin.reference().name.clone(),
                script: rendered.script,
                run_as,
                env: rendered.env,
                timeout_ms: timeout_s.clamp(MIN_TIMEOUT_S, MAX_TIMEOUT_S) * 1000,
            },
        })
    }

    /// A user that the plugin chooses by itself must be one of its approved wishes.
    fn check_user(&self, plugin: &Plugin, user: &str) -> Result<(), ServiceError> {
        let wished = plugin
            .descriptor()
            .wishes
            .users
            .iter()
            .any(|one| one == user);
        let digest = plugin.reference().digest;
        if wished && self.parts.plugins.is_approved(digest) {
            return Ok(());
        }
        Err(ServiceError::conflict(
            "user_not_approved",
            format!(
                "{} wants to run as the OS user `{user}`, which is not approved",
                plugin.reference().name
            ),
            "approve the plugin's wishes, or set `run_as`",
        ))
    }

    /// One invocation with the results of its servers.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also for orders that are no invocations.
    pub async fn get(&self, ws: &str, id: OrderId) -> Result<Invocation, ServiceError> {
        let (order, plan, progress) = self.found(ws, id).await?;
        let spec = self.spec(&order).await?;
        let plugin = self.parts.plugins.pinned(spec.command.digest).await;
        let mut runs = runs(&plan, &progress, order.state.is_terminal());
        let interpreted = runs.iter().map(|(run, result)| {
            let (plugin, spec) = (&plugin, &spec);
            async move {
                let asked = asked(spec, run.state, result.as_ref()?)?;
                Some(match plugin {
                    Ok(plugin) => match plugin.interpret(&asked).await {
                        Ok(result) => Interpreted::Result(result.into()),
                        Err(error) => Interpreted::Failed {
                            message: crate::platform::chain(&error),
                        },
                    },
                    Err(error) => Interpreted::Failed {
                        message: error.to_string(),
                    },
                })
            }
        });
        let interpreted = join_all(interpreted).await;
        for ((run, _), result) in runs.iter_mut().zip(interpreted) {
            run.result = result;
        }
        let runs = runs.into_iter().map(|(run, _)| run).collect();
        Ok(self.shown(&order, spec, runs))
    }

    /// The same, once it has ended or `wait` is over.
    ///
    /// # Errors
    /// As [`Invocations::get`].
    pub async fn wait(
        &self,
        ws: &str,
        id: OrderId,
        wait: Duration,
    ) -> Result<Invocation, ServiceError> {
        let until = Instant::now() + wait;
        loop {
            // Taken before reading, so that no event falls between the two.
            let mut watch = self.parts.orders.watch(id).await?;
            loop {
                let (order, plan, progress) = self.found(ws, id).await?;
                let runs = runs(&plan, &progress, order.state.is_terminal());
                let states: Vec<RunState> = runs.iter().map(|(run, _)| run.state).collect();
                if invocation::whole(&states).is_terminal() {
                    return self.get(ws, id).await;
                }
                match timeout_at(until, watch.next()).await {
                    Ok(Ok(_)) => {}
                    // Too far behind: a new watch.
                    Ok(Err(_)) => break,
                    Err(_) => return self.get(ws, id).await,
                }
            }
        }
    }

    /// Invocations of a workspace, newest first, without their servers.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn list(
        &self,
        ws: &str,
        page: &PageRequest,
    ) -> Result<PageOf<Invocation>, ServiceError> {
        let store = &*self.parts.engine.shared.store;
        records::get::<Workspace>(store, ws).await?;
        let prefix = rows::invocations_of(ws);
        let read = |entry: Entry| async move {
            let id = keys::last_segment(&entry.key).parse().ok();
            let Some(id) = id else { return Ok(None) };
            let (order, plan, progress) = match self.found(ws, id).await {
                Ok(read) => read,
                // Removed a moment ago.
                Err(ServiceError::NotFound { .. }) => return Ok(None),
                Err(error) => return Err(error),
            };
            let spec = self.spec(&order).await?;
            let runs = runs(&plan, &progress, order.state.is_terminal());
            let runs = runs.into_iter().map(|(run, _)| run).collect();
            let mut shown = self.shown(&order, spec, runs);
            shown.servers.clear();
            Ok(Some(shown))
        };
        records::list_rows(store, &prefix, Sort::Falling, page, read, |_| true).await
    }

    /// Stops what runs and what has yet to.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]; `order_ended` when everything has ended already.
    pub async fn stop(
        &self,
        caller: Caller,
        ws: &str,
        id: OrderId,
    ) -> Result<Invocation, ServiceError> {
        self.found(ws, id).await?;
        let stop = Action::Cancel { node: None };
        self.parts.orders.act(caller, ws, id, stop).await?;
        self.get(ws, id).await
    }

    async fn found(
        &self,
        ws: &str,
        id: OrderId,
    ) -> Result<(Order, Arc<Plan>, Progress), ServiceError> {
        let absent = || ServiceError::not_found("invocation", id);
        let found = self.parts.orders.progress(ws, id).await;
        let found = found.map_err(|error| match error {
            ServiceError::NotFound { .. } => absent(),
            other => other,
        })?;
        match found.0.purpose {
            Purpose::Invocation { .. } => Ok(found),
            Purpose::Release | Purpose::Rollback { .. } | Purpose::Operation { .. } => {
                Err(absent())
            }
        }
    }

    async fn spec(&self, order: &Order) -> Result<InvocationSpec, ServiceError> {
        let blobs = &self.parts.engine.shared.blobs;
        let digest = BlobDigest::from_bytes(*order.spec.as_bytes());
        let bytes = blobs.get_bytes(digest, MAX_SPEC_BYTES).await?;
        serde_json::from_slice(&bytes)
            .map_err(|error| ServiceError::internal("read what an invocation was made from", error))
    }

    fn shown(&self, order: &Order, spec: InvocationSpec, servers: Vec<Run>) -> Invocation {
        let states: Vec<RunState> = servers.iter().map(|run| run.state).collect();
        let state = invocation::whole(&states);
        let ends = servers.iter().filter_map(|run| run.finished_at).max();
        Invocation {
            id: order.id,
            workspace: order.workspace.clone(),
            command: spec.command,
            parameters: spec.parameters,
            run_as: spec.run_as,
            max_in_flight: spec.max_in_flight,
            state,
            counts: RunCounts::of(&states),
            servers,
            created_by: order.created_by.clone(),
            created_at: order.created_at,
            finished_at: order.finished_at.or(ends).filter(|_| state.is_terminal()),
        }
    }
}

fn check_figures(request: &CreateInvocation) -> Result<(), ServiceError> {
    let servers = request.servers.len() as u64;
    let timeout_s = request.timeout_s.unwrap_or(MIN_TIMEOUT_S);
    let in_flight = u64::from(request.max_in_flight.unwrap_or(1));
    let delivery_s = request.delivery_timeout_s.unwrap_or(DELIVERY_TIMEOUT_S);
    for (field, found, min, max) in [
        ("/servers", servers, 1, MAX_SERVERS as u64),
        ("/timeout_s", timeout_s, 0, MAX_TIMEOUT_S),
        ("/max_in_flight", in_flight, 1, MAX_SERVERS as u64),
        ("/delivery_timeout_s", delivery_s, 1, MAX_TIMEOUT_S),
    ] {
        if found < min || found > max {
            let what = field.trim_start_matches('/');
            return Err(ServiceError::Limit {
                code: "out_of_limit",
                field: field.to_owned(),
                message: match field {
                    "/servers" => {
                        format!("an invocation runs on {min} to {max} servers, not on {found}")
                    }
                    _ => format!("`{what}` may be {min} to {max}, not {found}"),
                },
                limit: if found < min { min } else { max },
                current: found,
                mend: format!("give `{what}` within its limits"),
            });
        }
    }
    match request.run_as.as_deref() {
        Some(user)
            if user.is_empty()
                || user.len() > 32
                || user
                    .chars()
                    .any(|c| c.is_whitespace() || c.is_control() || c == ':' || c == '/') =>
        {
            Err(ServiceError::invalid(
                "invalid_value",
                "/run_as",
                format!("`{user}` is not the name of an OS user"),
                "give 1 to 32 characters without blanks, `:` and `/`, or leave it out",
            ))
        }
        Some(_) | None => Ok(()),
    }
}
