//! The seam between the gateway and the engine, both ways: who is connected, and who takes results.

use std::time::Duration;

use async_trait::async_trait;
use windlass_domain::{
    Timestamp,
    id::ServerId,
    inbox::JournalEpoch,
    reducer::Refused,
    task::{TaskId, TaskResult},
};
use windlass_protocol::OutputChunk;

use super::{Gateway, ReportError, Reported, TaskReports};
use crate::engine::{ActError, Agents, Engine};

impl Agents for Gateway {
    fn current_epoch(&self, server: ServerId) -> Option<JournalEpoch> {
        Gateway::current_epoch(self, server)
    }

    fn is_online(&self, server: ServerId) -> bool {
        Gateway::is_online(self, server)
    }

    fn silent_for(&self, server: ServerId) -> Option<Duration> {
        Gateway::silent_for(self, server)
    }

    fn nudge(&self, server: ServerId) {
        Gateway::nudge(self, server);
    }
}

#[async_trait]
impl TaskReports for Engine {
    async fn report(
        &self,
        server: ServerId,
        task: TaskId,
        result: TaskResult,
    ) -> Result<Reported, ReportError> {
        match Engine::report(self, server, task, result).await {
            Ok(()) => Ok(Reported::Committed),
            Err(
                ActError::NoSuchOrder(_)
                | ActError::Refused(
                    Refused::Terminal | Refused::NotCurrent { .. } | Refused::NoSuchNode { .. },
                ),
            ) => Ok(Reported::NotWanted),
            // No refusal of a result: the agent keeps it until it is known what it means.
            Err(
                error @ (ActError::Refused(_)
                | ActError::Busy(_)
                | ActError::Edit(_)
                | ActError::Revised { .. }
                | ActError::Held { .. }
                | ActError::Row { .. }
                | ActError::Plan { .. }),
            ) => Err(ReportError(Box::new(error))),
        }
    }

    fn started(&self, server: ServerId, task: TaskId, at: Timestamp) {
        tracing::debug!(server.id = %server, task.id = %task, %at, "a task started");
    }

    fn output(&self, server: ServerId, chunk: OutputChunk) {
        self.shared.live.push(server, chunk);
    }
}
