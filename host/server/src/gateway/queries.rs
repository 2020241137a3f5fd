//! Queries of one session: who waits for which answer.
//!
//! Owns the numbers, the frames that wait to be written, and the askers that wait. At most [`MAX_QUERIES_IN_FLIGHT`] are under way
//! in a session; further askers wait for their turn within their own time-out, each in its own task, so a slow query holds up
//! neither the session nor another query until all places are taken. Nothing is kept of a query whose asker gave up.
//! The way of a query is drawn in the head of `windlass_protocol::query`.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, oneshot},
    time::{Instant, timeout_at},
};
use windlass_domain::id::ServerId;
use windlass_protocol::{
    EncodeError, MAX_QUERIES_IN_FLIGHT, MAX_QUERY_TIMEOUT_MS, QUERIES_SINCE, Query, QueryError,
    QueryErrorCode, QueryReply, ToAgent, encode,
};

use super::{Gateway, session::Session};

/// How much longer than the agent the platform waits, so that the agent's own reason arrives where there is one.
const ANSWER_GRACE: Duration = Duration::from_secs(1);

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryFailure {
    /// There is no session.
    #[error("the agent of the server {server} is not connected")]
    Offline {
        /// Whose.
        server: ServerId,
    },
    /// The agent does not know queries.
    #[error(
        "the agent of the server {server} is too old: it speaks version {speaks} of the protocol, a query needs {QUERIES_SINCE}; upgrade the agent"
    )]
    AgentTooOld {
        /// Whose.
        server: ServerId,
        /// What it speaks.
        speaks: u32,
    },
    /// The query cannot be sent.
    #[error("the query cannot be sent")]
    Encode(#[source] EncodeError),
    /// No place became free in time.
    #[error(
        "{MAX_QUERIES_IN_FLIGHT} queries of the server {server} are under way and none ended within {waited_ms} ms; try again"
    )]
    Busy {
        /// Whose.
        server: ServerId,
        /// How long was waited.
        waited_ms: u64,
    },
    /// No answer came.
    #[error("the agent of the server {server} gave no answer within {waited_ms} ms")]
    Timeout {
        /// Whose.
        server: ServerId,
        /// How long was waited.
        waited_ms: u64,
    },
    /// The session ended before the answer.
    #[error("the session with the agent of the server {server} ended before its answer; ask again")]
    SessionLost {
        /// Whose.
        server: ServerId,
    },
    /// The agent says why.
    #[error("the agent of the server {server} has no answer: {}", .source.message)]
    Agent {
        /// Whose.
        server: ServerId,
        /// The reason.
        source: QueryError,
    },
}

type Answer = Result<QueryReply, QueryError>;

/// The queries of one session.
pub(super) struct Queries {
    places: Semaphore,
    asked: Mutex<Asked>,
}

#[derive(Default)]
struct Asked {
    last: u64,
    /// Frames that are not written yet.
    frames: VecDeque<(u64, String)>,
    askers: HashMap<u64, oneshot::Sender<Answer>>,
}

impl Queries {
    pub(super) fn new() -> Self {
        Self {
            places: Semaphore::new(MAX_QUERIES_IN_FLIGHT),
            asked: Mutex::default(),
        }
    }

    /// The next frame to write.
    pub(super) fn next_frame(&self) -> Option<String> {
        self.asked().frames.pop_front().map(|(_, frame)| frame)
    }

    /// An answer came. Nobody may wait for it any more.
    pub(super) fn answered(&self, id: u64, answer: Answer) {
        let asker = self.asked().askers.remove(&id);
        if asker.is_none_or(|asker| asker.send(answer).is_err()) {
            tracing::debug!(query.id = id, "an answer came too late");
        }
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, body: Query, timeout_ms: u64) -> Result<Waiting<'_>, EncodeError> {
        let mut asked = self.asked();
        let id = asked.last + 1;
        let frame = encode(&ToAgent::Query {
            id,
            body,
            timeout_ms,
        })?;
        asked.last = id;
        let (asker, answer) = oneshot::channel();
        asked.frames.push_back((id, frame));
        asked.askers.insert(id, asker);
        Ok(Waiting {
            queries: self,
            id,
            answer,
        })
    }
}

/// A query that is under way. Dropping it forgets it.
struct Waiting<'a> {
    queries: &'a Queries,
    id: u64,
    answer: oneshot::Receiver<Answer>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut asked = self.queries.asked();
        asked.askers.remove(&self.id);
        asked.frames.retain(|(id, _)| *id != self.id);
    }
}

impl Gateway {
    /// Asks an agent. Nothing is kept: who is cut off asks again. The agent may take `timeout`, at most
    /// [`MAX_QUERY_TIMEOUT_MS`]; the answer is here at most a second later, whatever happens.
    ///
    /// # Errors
    /// [`QueryFailure`].
    pub async fn query(
        &self,
        server: ServerId,
        body: Query,
        timeout: Duration,
    ) -> Result<QueryReply, QueryFailure> {
        let session = self.find(server).ok_or(QueryFailure::Offline { server })?;
        if session.protocol() < QUERIES_SINCE {
            return Err(QueryFailure::AgentTooOld {
                server,
                speaks: session.protocol(),
            });
        }
        let timeout = timeout.min(Duration::from_millis(MAX_QUERY_TIMEOUT_MS));
        tokio::select! {
            biased;
            () = session.ended.cancelled() => Err(QueryFailure::SessionLost { server }),
            answer = ask(&session, body, timeout) => answer,
        }
    }
}

async fn ask(
    session: &Session,
    body: Query,
    timeout: Duration,
) -> Result<QueryReply, QueryFailure> {
    let server = session.server;
    let queries = &session.queries;
    let begun = Instant::now();
    let waited_ms = || u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let Ok(Ok(_place)) = timeout_at(begun + timeout, queries.places.acquire()).await else {
        return Err(QueryFailure::Busy {
            server,
            waited_ms: waited_ms(),
        });
    };
    let left = timeout.saturating_sub(begun.elapsed());
    let timeout_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1);
    let mut waiting = queries
        .ask(body, timeout_ms)
        .map_err(QueryFailure::Encode)?;
    session.wake_up();
    match timeout_at(begun + timeout + ANSWER_GRACE, &mut waiting.answer).await {
        Ok(Ok(Ok(QueryReply::Unknown))) => Err(QueryFailure::Agent {
            server,
            source: QueryError::new(
                QueryErrorCode::Unsupported,
                "it answered in a form of a later version; upgrade the platform",
            ),
        }),
        Ok(Ok(Ok(
            reply @ (QueryReply::Probe(_) | QueryReply::Connect(_) | QueryReply::LoadBalancer(_)),
        ))) => Ok(reply),
        Ok(Ok(Err(source))) => Err(QueryFailure::Agent { server, source }),
        Ok(Err(_)) => Err(QueryFailure::SessionLost { server }),
        Err(_) => Err(QueryFailure::Timeout {
            server,
            waited_ms: waited_ms(),
        }),
    }
}
