//! The output of a run: what there is of it now, and live. Source: spec "Invocations", "Output".
//!
//! It is the log of the step that the run is in its order: see `orders::logs`. The end that a follower gets is the run itself, with
//! what the command makes of its output.

use serde::{Deserialize, Serialize};
use windlass_domain::{
    id::{OrderId, ServerId},
    invocation::Run,
    plan::{NodeIndex, NodeKind, Plan},
};

use super::Invocations;
use crate::service::{
    ServiceError,
    orders::logs::{LogFollower, LogNews, LogPiece},
};

/// What there is of a run's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RunOutput {
    /// The server.
    pub server: ServerId,
    /// Whether it has ended: then nothing is added any more.
    pub ended: bool,
    /// Standard output and error, secrets masked. Of a run that has ended at most 24 KiB, head and tail with a line between them
    /// that says what was dropped; of one that runs what was sent lately.
    pub output: String,
    /// Where `output` begins: bytes of the whole before it.
    pub offset: u64,
    /// Where a live view goes on: give it as `offset`.
    pub next_offset: u64,
    /// Bytes that are not in `output`.
    pub dropped_bytes: u64,
}

/// News of a followed run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunNews {
    /// Output.
    Piece(LogPiece),
    /// It has ended, and how; nothing follows.
    Ended(Box<Run>),
}

/// One follower of one run.
pub struct RunFollower {
    log: LogFollower,
    invocations: Invocations,
    ws: String,
    id: OrderId,
    server: ServerId,
}

impl Invocations {
    /// What there is of the output of one server now.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] of the invocation, or of the server in it.
    pub async fn output(
        &self,
        ws: &str,
        id: OrderId,
        server: ServerId,
    ) -> Result<RunOutput, ServiceError> {
        let node = self.node(ws, id, server).await?;
        let log = self.parts.orders.log(ws, id, node, None).await?;
        Ok(RunOutput {
            server,
            ended: log.ended,
            output: log.output,
            offset: log.offset,
            next_offset: log.next_offset,
            dropped_bytes: log.dropped_bytes,
        })
    }

    /// Follows the output of one server from an offset on.
    ///
    /// # Errors
    /// As [`Invocations::output`].
    pub async fn follow(
        &self,
        ws: &str,
        id: OrderId,
        server: ServerId,
        offset: u64,
    ) -> Result<RunFollower, ServiceError> {
        let node = self.node(ws, id, server).await?;
        let orders = &self.parts.orders;
        Ok(RunFollower {
            log: orders.follow_log(ws, id, node, None, offset).await?,
            invocations: self.clone(),
            ws: ws.to_owned(),
            id,
            server,
        })
    }

    async fn node(
        &self,
        ws: &str,
        id: OrderId,
        server: ServerId,
    ) -> Result<NodeIndex, ServiceError> {
        let (_, plan, _) = self.found(ws, id).await?;
        node_of(&plan, server)
            .ok_or_else(|| ServiceError::not_found("server of this invocation", server))
    }
}

/// The step that a server runs.
fn node_of(plan: &Plan, server: ServerId) -> Option<NodeIndex> {
    (0u32..)
        .zip(&plan.nodes)
        .filter(|(_, planned)| matches!(planned.kind, NodeKind::Step { .. }))
        .map(|(node, _)| node)
        .find(|node| {
            windlass_domain::dispatch::unit_of(plan, *node)
                .is_some_and(|(_, _, unit)| unit.server == server)
        })
}

impl RunFollower {
    /// The next news; waits for them. `None` after the end.
    ///
    /// # Errors
    /// [`ServiceError`] when a row cannot be read.
    pub async fn next(&mut self) -> Result<Option<RunNews>, ServiceError> {
        match self.log.next().await? {
            None => Ok(None),
            Some(LogNews::Piece(piece)) => Ok(Some(RunNews::Piece(piece))),
            Some(LogNews::End(_)) => {
                let invocation = self.invocations.get(&self.ws, self.id).await?;
                let mut runs = invocation.servers.into_iter();
                let run = runs.find(|run| run.server == self.server);
                Ok(run.map(|run| RunNews::Ended(Box::new(run))))
            }
        }
    }
}
