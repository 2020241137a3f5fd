//! Queries of the platform: each is answered in its session, in its own task, within its deadline, and changes nothing that matters
//! when it is asked twice. Nothing here touches the journal.
//!
//! What a query is stands in the head of `windlass_protocol::query`. At most [`MAX_QUERIES_IN_FLIGHT`] run at once, more are refused.
//! When the session ends they are dropped: nobody could be answered. Reading files is left to threads, of which a few at most are
//! taken, so that a file system that hangs holds up probes and nothing else.
//!
//! | module | subject |
//! | --- | --- |
//! | [`probe`] | the codes of probes, and what each answers |
//! | `connect` | connection attempts |
//! | `program` | external programs, bounded in time and output |

mod connect;
pub mod probe;
mod program;

use std::{io, sync::Arc, time::Duration};

use tokio::{
    sync::Semaphore,
    task::{JoinError, JoinSet},
    time::timeout,
};
use windlass_protocol::{
    MAX_FRAME_BYTES, MAX_QUERIES_IN_FLIGHT, MAX_QUERY_DATA_BYTES, MAX_QUERY_TEXT_BYTES,
    MAX_QUERY_TIMEOUT_MS, ProbeReply, Query, QueryError, QueryErrorCode, QueryReply,
};

use crate::execute::Context;

/// Threads that may read for queries at once. One that hangs in the kernel keeps its place.
const READERS: usize = 2;
/// How much longer than its deadline a query may take to say what it found so far.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// The longest state of a load balancer, in bytes of JSON: what a frame carries beside the rest of its message. Some three
/// thousand servers fit.
const MAX_STATE_BYTES: usize = MAX_FRAME_BYTES - 4 * 1024;

type Answer = Result<QueryReply, QueryError>;

/// What every query may use.
#[derive(Clone)]
pub struct Scope {
    /// The agent.
    pub context: Arc<Context>,
    readers: Arc<Semaphore>,
}

impl Scope {
    /// Runs something that reads files, on a thread.
    ///
    /// # Errors
    /// What `look` answers; `failed` when it panicked.
    pub async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Context) -> Result<T, QueryError> + Send + 'static,
    ) -> Result<T, QueryError> {
        let place = self
            .readers
            .clone()
            .acquire_owned()
            .await
            .map_err(|_| failed("the agent ends"))?;
        let context = self.context.clone();
        let thread = tokio::task::spawn_blocking(move || {
            let seen = look(&context);
            drop(place);
            seen
        });
        thread
            .await
            .map_err(|error| failed(format!("a worker of the agent failed: {error}")))?
    }
}

/// The queries that are under way in the current session.
pub struct Queries {
    scope: Scope,
    running: JoinSet<(u64, Answer)>,
}

impl Queries {
    /// None yet.
    #[must_use]
    pub fn new(context: Arc<Context>) -> Self {
        Self {
            scope: Scope {
                context,
                readers: Arc::new(Semaphore::new(READERS)),
            },
            running: JoinSet::new(),
        }
    }

    /// Begins to answer.
    ///
    /// # Errors
    /// The answer, where it cannot be looked for.
    pub fn ask(&mut self, id: u64, body: Query, timeout_ms: u64) -> Result<(), QueryError> {
        if self.running.len() >= MAX_QUERIES_IN_FLIGHT {
            return Err(QueryError::new(
                QueryErrorCode::LimitExceeded,
                format!("{MAX_QUERIES_IN_FLIGHT} queries are under way on this server; try again"),
            ));
        }
        let scope = self.scope.clone();
        let limit = Duration::from_millis(timeout_ms.clamp(1, MAX_QUERY_TIMEOUT_MS));
        self.running
            .spawn(async move { (id, answer(body, &scope, limit).await) });
        Ok(())
    }

    /// The next answer; never ready while nothing is under way.
    pub async fn next(&mut self) -> (u64, Answer) {
        loop {
            match self.running.join_next().await {
                Some(Ok(answer)) => return answer,
                Some(Err(error)) => log_lost(&error),
                None => std::future::pending().await,
            }
        }
    }

    /// The session is over: no answer of it may reach the next one, where its number stands for another query.
    pub fn drop_all(&mut self) {
        self.running = JoinSet::new();
    }
}

/// Without an answer the platform waits until its own deadline.
fn log_lost(error: &JoinError) {
    if error.is_panic() {
        tracing::error!(%error, "a query failed");
    }
}

async fn answer(body: Query, scope: &Scope, limit: Duration) -> Answer {
    let found = async {
        match body {
            Query::Probe { code, arguments } => probe::run(&code, arguments, scope)
                .await
                .map(QueryReply::Probe),
            Query::Connect {
                protocol,
                target,
                port,
            } => connect::attempt(&protocol, &target, port, limit)
                .await
                .map(QueryReply::Connect),
            Query::LoadBalancer { request } => {
                let state = scope.context.balancers.answer(*request).await?;
                Ok(QueryReply::LoadBalancer(Box::new(state)))
            }
            Query::Unknown => Err(QueryError::new(
                QueryErrorCode::Unsupported,
                format!(
                    "the agent {} does not know this query; upgrade it",
                    env!("CARGO_PKG_VERSION")
                ),
            )),
        }
    };
    let reply = timeout(limit + LAST_WORDS, found)
        .await
        .unwrap_or_else(|_| {
            Err(QueryError::new(
                QueryErrorCode::Timeout,
                format!("no answer within {} ms", limit.as_millis()),
            ))
        })?;
    bounded(reply)
}

/// Keeps an answer within what a frame can carry.
fn bounded(reply: QueryReply) -> Answer {
    match reply {
        QueryReply::Probe(ProbeReply {
            data,
            text,
            dropped_bytes,
        }) => {
            let size = data.to_string().len();
            if size > MAX_QUERY_DATA_BYTES {
                return Err(QueryError::new(
                    QueryErrorCode::LimitExceeded,
                    format!(
                        "the answer has {size} bytes, the limit is {MAX_QUERY_DATA_BYTES}; ask for less"
                    ),
                ));
            }
            let (text, cut) = last(text, MAX_QUERY_TEXT_BYTES);
            Ok(QueryReply::Probe(ProbeReply {
                data,
                text,
                dropped_bytes: dropped_bytes + cut,
            }))
        }
        QueryReply::LoadBalancer(state) => {
            let size = serde_json::to_vec(&state).map_or(usize::MAX, |json| json.len());
            if size > MAX_STATE_BYTES {
                return Err(QueryError::new(
                    QueryErrorCode::LimitExceeded,
                    format!(
                        "the state of the load balancer's {} servers has {size} bytes, the limit is {MAX_STATE_BYTES}; share \
                         them out over several load balancers",
                        state.members.len()
                    ),
                ));
            }
            Ok(QueryReply::LoadBalancer(state))
        }
        reply @ (QueryReply::Connect(_) | QueryReply::Unknown) => Ok(reply),
    }
}

/// The last bytes of a text, and how many were left out.
fn last(mut text: String, limit: usize) -> (String, u64) {
    if text.len() <= limit {
        return (text, 0);
    }
    let from = (text.len() - limit..=text.len())
        .find(|at| text.is_char_boundary(*at))
        .unwrap_or(text.len());
    let rest = text.split_off(from);
    (rest, from as u64)
}

fn failed(message: impl Into<String>) -> QueryError {
    QueryError::new(QueryErrorCode::Failed, message)
}

/// The reason why something could not be read.
fn unreadable(what: &str, error: &io::Error) -> QueryError {
    let code = match error.kind() {
        io::ErrorKind::NotFound => QueryErrorCode::NotFound,
        io::ErrorKind::PermissionDenied => QueryErrorCode::Denied,
        _ => QueryErrorCode::Failed,
    };
    QueryError::new(code, format!("{what} cannot be read: {error}"))
}

/// Reads a text file of `/proc`, `/sys` or `/etc`.
fn read_text(path: &str) -> Result<String, QueryError> {
    let bytes = std::fs::read(path).map_err(|error| unreadable(path, &error))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use windlass_protocol::BalancerState;

    use super::*;

    #[test]
    fn a_long_text_keeps_its_end_and_its_letters() {
        assert_eq!(last("abc".into(), 3), ("abc".into(), 0));
        assert_eq!(last("abcd".into(), 3), ("bcd".into(), 1));
        assert_eq!(last("äöü".into(), 3), ("ü".into(), 4));
        assert_eq!(last("äö".into(), 0), (String::new(), 4));
    }

    #[test]
    fn an_answer_fits_into_a_frame_or_is_refused() {
        let probe = |data: String, text: String| {
            bounded(QueryReply::Probe(ProbeReply {
                data: data.into(),
                text,
                dropped_bytes: 0,
            }))
        };
        let Ok(reply) = probe("x".repeat(1000), "\u{1}".repeat(200_000)) else {
            panic!("refused")
        };
        let message = windlass_protocol::ToServer::QueryAnswer {
            id: 1,
            result: Ok(reply),
        };
        assert!(windlass_protocol::encode(&message).is_ok());
        let refused = probe("x".repeat(MAX_QUERY_DATA_BYTES), String::new()).unwrap_err();
        assert_eq!(refused.code, QueryErrorCode::LimitExceeded);
        let state = |bytes: usize| {
            bounded(QueryReply::LoadBalancer(Box::new(BalancerState {
                message: "x".repeat(bytes),
                ..BalancerState::default()
            })))
        };
        let message = windlass_protocol::ToServer::QueryAnswer {
            id: u64::MAX,
            result: state(MAX_STATE_BYTES - 200),
        };
        assert!(matches!(
            &message,
            windlass_protocol::ToServer::QueryAnswer { result: Ok(_), .. }
        ));
        assert!(windlass_protocol::encode(&message).is_ok());
        let refused = state(MAX_STATE_BYTES).unwrap_err();
        assert_eq!(refused.code, QueryErrorCode::LimitExceeded);
    }
}
