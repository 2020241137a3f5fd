//! What a diagnostic sees of the platform: the runtime's `Host` over services and agents, with the rights of who asked.
//!
//! Everything goes through the services of one workspace: what the caller may not read, the plugin does not see. Probes are
//! queries to agents. Nothing here changes anything. Source: wit, `probes` and `resources`.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::Serialize;
use serde_json::{Value, json};
use windlass_domain::id::{InstanceId, OrderId, PackageId, ServerId};
use windlass_protocol::{Query, QueryReply};
use windlass_runtime::diagnostic::{
    Attributes, Connection, Endpoint, Host, HostError, MetricRange, ProbeAnswer, Sample,
};

use super::{
    PAGE_MAX_SIZE, PageOf, PageRequest, ServiceError,
    apps::Apps,
    instances::{InstanceFilter, Instances},
    orders::{OrderFilter, Orders},
    packages::{PackageFilter, Packages},
    servers::{ServerFilter, Servers},
    workspaces::Workspaces,
};
use crate::{
    clock,
    gateway::{Gateway, QueryFailure},
};

/// Pages that `find` looks through: 20,000 resources.
const FIND_PAGES: usize = 100;
/// The longest that one look waits for an agent: within the runtime's limit of a host call.
const LONGEST_LOOK: Duration = Duration::from_secs(13);
/// Events of an order that its log is made of at most.
const LOG_EVENTS: usize = 2000;

/// Asks agents. The gateway, but for tests.
#[async_trait]
pub trait Inquiry: Send + Sync + 'static {
    /// See [`Gateway::query`].
    ///
    /// # Errors
    /// [`QueryFailure`].
    async fn query(
        &self,
        server: ServerId,
        body: Query,
        timeout: Duration,
    ) -> Result<QueryReply, QueryFailure>;
}

#[async_trait]
impl Inquiry for Gateway {
    async fn query(
        &self,
        server: ServerId,
        body: Query,
        timeout: Duration,
    ) -> Result<QueryReply, QueryFailure> {
        Self::query(self, server, body, timeout).await
    }
}

/// What a diagnostic may be shown.
#[derive(Clone)]
pub struct Sights {
    /// Agents.
    pub inquiry: Arc<dyn Inquiry>,
    /// Workspaces and their cells.
    pub workspaces: Workspaces,
    /// Applications.
    pub apps: Apps,
    /// Packages.
    pub packages: Packages,
    /// Service instances.
    pub instances: Instances,
    /// Servers.
    pub servers: Servers,
    /// Orders.
    pub orders: Orders,
}

/// The platform as one diagnosis of one workspace sees it.
pub(super) struct WorkspaceSights {
    pub(super) ws: String,
    pub(super) sights: Sights,
}

impl WorkspaceSights {
    /// A server of this workspace.
    async fn server(&self, id: &str) -> Result<ServerId, HostError> {
        let server = parse::<ServerId>("server", id)?;
        let (server, _) = self
            .sights
            .servers
            .get(&self.ws, server)
            .await
            .map_err(denied)?;
        Ok(server.id)
    }

    async fn probe(
        &self,
        server: ServerId,
        code: &str,
        arguments: &Attributes,
        timeout_ms: u64,
    ) -> Result<ProbeAnswer, HostError> {
        let body = Query::Probe {
            code: code.to_owned(),
            arguments: arguments.iter().cloned().collect(),
        };
        let timeout = Duration::from_millis(timeout_ms).min(LONGEST_LOOK);
        let sent = clock::now();
        let reply = self.sights.inquiry.query(server, body, timeout).await;
        let QueryReply::Probe(mut reply) = reply.map_err(|failure| unanswered(&failure))? else {
            return Err(HostError::new(
                "failed",
                "the agent answered another question than was asked",
            ));
        };
        if code == "clock" {
            compare_clocks(&mut reply.data, sent.unix_ms(), clock::now().unix_ms());
        }
        Ok(ProbeAnswer {
            data: reply.data,
            text: reply.text,
        })
    }

    async fn listed<T, F>(
        &self,
        filters: &Attributes,
        limit: u32,
        id_field: &str,
        page: impl Fn(PageRequest) -> F + Send + Sync,
    ) -> Result<Vec<String>, HostError>
    where
        T: Serialize + Send,
        F: Future<Output = Result<PageOf<T>, ServiceError>> + Send,
    {
        let mut found = Vec::new();
        let mut request = PageRequest::first(PAGE_MAX_SIZE);
        for _ in 0..FIND_PAGES {
            let listed = page(request).await.map_err(denied)?;
            for item in listed.items {
                let item = serde_json::to_value(item).unwrap_or_default();
                if found.len() >= limit as usize {
                    return Ok(found);
                }
                if filters.iter().all(|(name, wanted)| is(&item, name, wanted))
                    && let Some(id) = item[id_field].as_str()
                {
                    found.push(id.to_owned());
                }
            }
            match listed.next {
                Some(next) => {
                    request = PageRequest {
                        size: PAGE_MAX_SIZE,
                        cursor: Some(next),
                    };
                }
                None => break,
            }
        }
        Ok(found)
    }

    async fn log_of_node(&self, order: OrderId, node: u32) -> Result<String, HostError> {
        let (view, progress) = self
            .sights
            .orders
            .node(&self.ws, order, node)
            .await
            .map_err(denied)?;
        let mut log = format!("{} {:?} {}\n", view.name, view.state, view.message);
        if let Some(result) = progress.result {
            log.push_str(&result.output);
        }
        Ok(log)
    }

    async fn log_of_order(&self, order: OrderId) -> Result<String, HostError> {
        let orders = &self.sights.orders;
        let (header, _) = orders.get(&self.ws, order).await.map_err(denied)?;
        let after = header.last_event.saturating_sub(LOG_EVENTS as u64);
        let events = orders
            .events(&self.ws, order, after, LOG_EVENTS)
            .await
            .map_err(denied)?;
        Ok(events
            .iter()
            .map(|event| serde_json::to_string(event).unwrap_or_default() + "\n")
            .collect())
    }
}

/// The field of a resource is this text; numbers and booleans as JSON writes them.
fn is(item: &Value, name: &str, wanted: &str) -> bool {
    match &item[name] {
        Value::String(text) => text == wanted,
        Value::Null => false,
        other => {
            let text = other.to_string();
            text == wanted
        }
    }
}

/// Adds to an agent's clock how far it is from the platform's: the agent read it somewhere between the two times.
fn compare_clocks(data: &mut Value, sent_ms: i64, received_ms: i64) {
    let Some(theirs) = data["unix_ms"].as_i64() else {
        return;
    };
    let middle = sent_ms + (received_ms - sent_ms) / 2;
    data["platform_unix_ms"] = middle.into();
    data["round_trip_ms"] = (received_ms - sent_ms).into();
    data["drift_ms"] = (theirs - middle).into();
}

fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(
    kind: &str,
    id: &str,
) -> Result<T, HostError> {
    id.parse()
        .map_err(|error| HostError::new("not-found", format!("there is no {kind} `{id}`: {error}")))
}

/// What a service refused, as the contract has it.
fn denied(error: ServiceError) -> HostError {
    let code = match &error {
        ServiceError::NotFound { .. } => "not-found",
        ServiceError::Invalid { .. } => "invalid-request",
        ServiceError::Limit { .. } | ServiceError::Exhausted { .. } => "limit-exceeded",
        ServiceError::Conflict { .. }
        | ServiceError::Changed { .. }
        | ServiceError::Plugin { .. }
        | ServiceError::Replay
        | ServiceError::StorageFull { .. }
        | ServiceError::Unavailable { .. } => "not-possible",
        ServiceError::Internal { .. } => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "a diagnostic's look failed"
            );
            "internal"
        }
    };
    HostError::new(code, error.to_string())
}

/// Why an agent gave no answer, as the contract has it.
fn unanswered(failure: &QueryFailure) -> HostError {
    let code = match failure {
        QueryFailure::Offline { .. } | QueryFailure::SessionLost { .. } => "offline",
        QueryFailure::AgentTooOld { .. } => "unsupported",
        QueryFailure::Encode(_) | QueryFailure::Busy { .. } => "limit-exceeded",
        QueryFailure::Timeout { .. } => "timeout",
        QueryFailure::Agent { source, .. } => source.code.as_str(),
    };
    HostError::new(code, crate::platform::chain(failure))
}

fn unsupported(what: &str, kind: &str, known: &str) -> HostError {
    HostError::new(
        "unsupported",
        format!("resources of the kind `{kind}` cannot be {what}; known are {known}"),
    )
}

#[async_trait]
impl Host for WorkspaceSights {
    async fn available(&self, server: &str) -> Result<Vec<String>, HostError> {
        let server = self.server(server).await?;
        let answer = self.probe(server, "available", &Vec::new(), 5000).await?;
        serde_json::from_value(answer.data)
            .map_err(|_| HostError::new("failed", "the agent did not answer a list of codes"))
    }

    async fn run(
        &self,
        server: &str,
        probe: &str,
        arguments: &Attributes,
        timeout_ms: u64,
    ) -> Result<ProbeAnswer, HostError> {
        let server = self.server(server).await?;
        self.probe(server, probe, arguments, timeout_ms).await
    }

    async fn connect(
        &self,
        from_server: &str,
        to: &Endpoint,
        timeout_ms: u64,
    ) -> Result<Connection, HostError> {
        let from = self.server(from_server).await?;
        // A server of this workspace stands for its first address.
        let target = match to.target.parse::<ServerId>() {
            Ok(server) => {
                let (server, _) = self
                    .sights
                    .servers
                    .get(&self.ws, server)
                    .await
                    .map_err(denied)?;
                let addresses = server.facts.addresses;
                addresses.into_iter().next().ok_or_else(|| {
                    let message = format!("the server `{}` has no address", server.name);
                    HostError::new("not-possible", message)
                })?
            }
            Err(_) => to.target.clone(),
        };
        let body = Query::Connect {
            protocol: to.protocol.clone(),
            target,
            port: to.port,
        };
        let timeout = Duration::from_millis(timeout_ms).min(LONGEST_LOOK);
        let reply = self.sights.inquiry.query(from, body, timeout).await;
        match reply.map_err(|failure| unanswered(&failure))? {
            QueryReply::Connect(reply) => Ok(Connection {
                reached: reply.reached,
                elapsed_us: reply.elapsed_us,
                detail: reply.detail,
            }),
            QueryReply::Probe(_) | QueryReply::LoadBalancer(_) | QueryReply::Unknown => {
                Err(HostError::new(
                    "failed",
                    "the agent answered another question than was asked",
                ))
            }
        }
    }

    async fn read(&self, kind: &str, id: &str) -> Result<Value, HostError> {
        let ws = self.ws.as_str();
        let sights = &self.sights;
        match kind {
            "server" => {
                let id = parse::<ServerId>(kind, id)?;
                let (server, _) = sights.servers.get(ws, id).await.map_err(denied)?;
                let now = sights.orders.server_now(server).await.map_err(denied)?;
                Ok(json!(now))
            }
            "service-instance" => {
                let id = parse::<InstanceId>(kind, id)?;
                let (instance, _) = sights.instances.get(ws, id).await.map_err(denied)?;
                Ok(json!(instance))
            }
            "application" => Ok(json!(sights.apps.get(id).await.map_err(denied)?.0)),
            "package" => {
                let id = parse::<PackageId>(kind, id)?;
                Ok(json!(sights.packages.get(ws, id).await.map_err(denied)?.0))
            }
            "order" => {
                let id = parse::<OrderId>(kind, id)?;
                let (order, _) = sights.orders.get(ws, id).await.map_err(denied)?;
                let nodes = sights.orders.nodes(ws, id).await.map_err(denied)?;
                Ok(json!({ "order": order, "nodes": nodes }))
            }
            "workspace" if id == ws => {
                Ok(json!(sights.workspaces.get(ws).await.map_err(denied)?.0))
            }
            "workspace" => Err(HostError::new(
                "denied",
                format!("this diagnosis sees the workspace `{ws}` only"),
            )),
            "cell" => {
                let (workspace, _) = sights.workspaces.get(ws).await.map_err(denied)?;
                let cells = json!(workspace.cells);
                let cell = cells
                    .as_array()
                    .into_iter()
                    .flatten()
                    .find(|cell| cell["id"] == id || cell["identifier"] == id);
                cell.cloned()
                    .ok_or_else(|| HostError::new("not-found", format!("there is no cell `{id}`")))
            }
            other => Err(unsupported(
                "read",
                other,
                "server, service-instance, application, cell, workspace, package, order",
            )),
        }
    }

    async fn find(
        &self,
        kind: &str,
        filters: &Attributes,
        limit: u32,
    ) -> Result<Vec<String>, HostError> {
        let ws = self.ws.as_str();
        let sights = &self.sights;
        match kind {
            "server" => {
                let page = |request| async move {
                    let page = sights
                        .servers
                        .list(ws, &ServerFilter::default(), request)
                        .await?;
                    Ok(first(page))
                };
                self.listed(filters, limit, "id", page).await
            }
            "service-instance" => {
                let page = |request| async move {
                    let page = sights
                        .instances
                        .list(ws, &InstanceFilter::default(), request)
                        .await?;
                    Ok(first(page))
                };
                self.listed(filters, limit, "id", page).await
            }
            "package" => {
                let page = |request| async move {
                    let page = sights
                        .packages
                        .list(ws, &PackageFilter::default(), request)
                        .await?;
                    Ok(first(page))
                };
                self.listed(filters, limit, "id", page).await
            }
            "order" => {
                let filter = &OrderFilter::default();
                let page = |request| async move { sights.orders.list(ws, filter, &request).await };
                self.listed(filters, limit, "id", page).await
            }
            other => Err(unsupported(
                "found",
                other,
                "server, service-instance, package, order",
            )),
        }
    }

    async fn metrics(
        &self,
        _kind: &str,
        _id: &str,
        metric: &str,
        _range: MetricRange,
    ) -> Result<Vec<Sample>, HostError> {
        Err(HostError::new(
            "unsupported",
            format!(
                "this platform keeps no points of `{metric}`; run the probes `load`, `memory`, `disk` or `sockets` for the figures of now"
            ),
        ))
    }

    async fn order_log(
        &self,
        order: &str,
        node: Option<u32>,
        max_bytes: u32,
    ) -> Result<String, HostError> {
        let order = parse::<OrderId>("order", order)?;
        let log = match node {
            Some(node) => self.log_of_node(order, node).await?,
            None => self.log_of_order(order).await?,
        };
        let cut = log.len().saturating_sub(max_bytes as usize);
        let from = (cut..=log.len())
            .find(|at| log.is_char_boundary(*at))
            .unwrap_or(log.len());
        Ok(log[from..].to_owned())
    }
}

fn first<T, R>(page: PageOf<(T, R)>) -> PageOf<T> {
    PageOf {
        items: page.items.into_iter().map(|(item, _)| item).collect(),
        next: page.next,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_compared_at_the_middle_of_the_way() {
        let mut data = json!({ "unix_ms": 10_500 });
        compare_clocks(&mut data, 10_000, 10_100);
        assert_eq!(data["drift_ms"], 450);
        assert_eq!(data["round_trip_ms"], 100);
        let mut odd = json!({});
        compare_clocks(&mut odd, 1, 2);
        assert_eq!(odd, json!({}));
    }

    #[test]
    fn filters_compare_texts_and_figures() {
        let item = json!({ "name": "web", "cores": 2, "up": true, "gone": null });
        for (name, wanted, expect) in [
            ("name", "web", true),
            ("name", "we", false),
            ("cores", "2", true),
            ("up", "true", true),
            ("gone", "null", false),
            ("missing", "", false),
        ] {
            assert_eq!(is(&item, name, wanted), expect, "{name} {wanted}");
        }
    }
}
