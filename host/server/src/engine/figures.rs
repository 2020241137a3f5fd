//! What pools counted while a judgement's window was open.
//!
//! Owns the rows `order-sample/…`. When a window begins, every member's counters are kept, in one commit; when it ends they
//! are compared with what the counters show then. After a crash the window goes on where it began; one that was extended has
//! its beginning before all of them. Source: spec "Canary"; the names of figures: `wit/deployment-strategy.wit`.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use windlass_domain::{
    Timestamp,
    id::{PoolId, ServerId},
    plan::{NodeIndex, Plan},
    plugin::Observation,
    pool::{Counted, MemberStats, Responses},
};
use windlass_store::{CommitError, Txn};

use super::{
    executor::{AGAIN, Job},
    rows,
};
use crate::clock;

/// Members in one row.
const CHUNK: usize = 100;
/// Rows of one window: they are written with one commit.
const MAX_CHUNKS: usize = 60;

/// Counters of some members when a window began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Sample {
    /// The attempt of the judge that they are for.
    attempt: u32,
    /// When.
    at: Timestamp,
    /// Requests and errors so far.
    members: Vec<(PoolId, ServerId, u64, u64)>,
    /// Of each of these, in the same order, its answers; of samples that were taken before they were measured: none.
    #[serde(default)]
    responses: Vec<Responses>,
}

impl Sample {
    fn of(attempt: u32, at: Timestamp, shown: &[(PoolId, MemberStats)]) -> Self {
        let members = shown.iter();
        Self {
            attempt,
            at,
            members: members
                .map(|(pool, member)| (*pool, member.server, member.requests, member.errors))
                .collect(),
            responses: shown.iter().map(|(_, member)| member.responses).collect(),
        }
    }

    fn by_member(&self) -> impl Iterator<Item = ((PoolId, ServerId), Counted)> + '_ {
        let responses = self.responses.iter().copied();
        let responses = responses.chain(std::iter::repeat(Responses::default()));
        let members = self.members.iter().zip(responses);
        members.map(|((pool, server, requests, errors), responses)| {
            let counted = Counted {
                requests: *requests,
                errors: *errors,
                responses,
            };
            ((*pool, *server), counted)
        })
    }
}

/// Counters when a window began.
struct Begin {
    at: Timestamp,
    members: BTreeMap<(PoolId, ServerId), Counted>,
}

/// Waits until the window is over, and answers what was counted in it. Without a window: nothing.
pub(super) async fn collect(
    job: &Job,
    judge: (NodeIndex, u32),
    window_ms: u64,
    extended: u32,
) -> Result<Vec<Observation>, String> {
    if window_ms == 0 {
        return Ok(Vec::new());
    }
    let begin = begin(job, judge).await?;
    let windows = u64::from(extended) + 1;
    let over = begin.at.plus_ms(window_ms.saturating_mul(windows));
    tokio::time::sleep(Duration::from_millis(over.since_ms(clock::now()))).await;
    let now = stats(job).await;
    let mut figures = vec![Observation {
        application: String::new(),
        server: String::new(),
        metric: "judge.windows".to_owned(),
        value: f64::from(extended) + 1.0,
    }];
    for ((part, server), member) in together(&job.plan, &begin, &now) {
        let application = &job.plan.parts[part as usize].key;
        let mut seen = |metric: &str, value: f64| {
            figures.push(Observation {
                application: application.clone(),
                server: server.to_string(),
                metric: metric.to_owned(),
                value,
            });
        };
        seen("pool.requests", as_figure(member.requests));
        seen("pool.errors", as_figure(member.errors));
        seen("weight", f64::from(member.weight));
        if let Some(latency_ms) = member.latency_ms() {
            seen("pool.latency-ms", latency_ms);
        }
    }
    Ok(figures)
}

/// The counters when the window began: as they are kept, or now.
async fn begin(job: &Job, (node, attempt): (NodeIndex, u32)) -> Result<Begin, String> {
    let store = &*job.engine.shared.store;
    let node = job.plan.id_of(node);
    let prefix = rows::samples_of(job.order.id, node);
    loop {
        let entries = rows::read_all(store, &prefix)
            .await
            .map_err(|error| error.to_string())?;
        let mut kept = Vec::with_capacity(entries.len());
        for entry in &entries {
            let sample: Sample =
                rows::decode(entry, "a sample").map_err(|error| error.to_string())?;
            kept.push(sample);
        }
        if let Some(first) = kept.first()
            && first.attempt == attempt
        {
            return Ok(Begin {
                at: first.at,
                members: kept.iter().flat_map(Sample::by_member).collect(),
            });
        }
        let members = stats(job).await;
        if members.len() > CHUNK * MAX_CHUNKS {
            return Err(format!(
                "the pools have {} members; figures of at most {} are collected",
                members.len(),
                CHUNK * MAX_CHUNKS
            ));
        }
        let at = clock::now();
        let mut txn = Txn::new();
        let mut chunks: Vec<&[_]> = members.chunks(CHUNK).collect();
        if chunks.is_empty() {
            chunks.push(&[]);
        }
        for (number, members) in (0u64..).zip(&chunks) {
            let sample = Sample::of(attempt, at, members);
            txn = txn.put(
                rows::sample(job.order.id, node, number),
                rows::encode(&sample),
            );
        }
        // Rows of an earlier attempt that had more.
        for entry in entries.iter().skip(chunks.len()) {
            txn = txn.delete(entry.key.clone());
        }
        match store.commit(txn).await {
            Ok(_) | Err(CommitError::Conflict { .. }) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// What every pool of the plan shows; a pool that cannot be read is asked again until it can be.
async fn stats(job: &Job) -> Vec<(PoolId, MemberStats)> {
    let pools: BTreeSet<PoolId> = job
        .plan
        .parts
        .iter()
        .flat_map(|part| part.pools.iter().copied())
        .collect();
    let mut all = Vec::new();
    for pool in pools {
        loop {
            match job.engine.shared.pools.stats(pool).await {
                Ok(members) => {
                    all.extend(members.into_iter().map(|member| (pool, member)));
                    break;
                }
                Err(error) => {
                    tracing::warn!(order.id = %job.order.id, pool.id = %pool, error = &error as &dyn std::error::Error, "a pool's figures could not be read; it is asked again");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }
    all
}

/// What one server of one application did in all its pools together.
#[derive(Default)]
struct Together {
    requests: u64,
    errors: u64,
    weight: u32,
    timed: u64,
    latency_ms_times_requests: f64,
}

impl Together {
    fn latency_ms(&self) -> Option<f64> {
        (self.timed > 0).then(|| self.latency_ms_times_requests / as_figure(self.timed))
    }
}

fn together(
    plan: &Plan,
    begin: &Begin,
    now: &[(PoolId, MemberStats)],
) -> BTreeMap<(u32, ServerId), Together> {
    let mut all: BTreeMap<(u32, ServerId), Together> = BTreeMap::new();
    for unit in &plan.units {
        let (Some(index), Some(part)) = (unit.part, plan.part_of(unit)) else {
            continue;
        };
        let mine = all.entry((index, unit.server)).or_default();
        let members = now
            .iter()
            .filter(|(pool, member)| member.server == unit.server && part.pools.contains(pool));
        for (pool, member) in members {
            let began = begin.members.get(&(*pool, member.server));
            let began = began.copied().unwrap_or_default();
            let counted = member.counted().since(began);
            mine.requests += counted.requests;
            mine.errors += counted.errors;
            mine.weight = mine.weight.max(member.weight);
            if member.responses.count > 0 {
                mine.timed += counted.responses.count;
                // Below 0 only by what it is off.
                let took_us = u64::try_from(counted.responses.total_us).unwrap_or(0);
                mine.latency_ms_times_requests += as_figure(took_us) / 1000.0;
            } else if let Some(latency_ms) = member.latency_ms {
                // Not measured one by one: the mean of the last ones is all that is known.
                mine.timed += counted.requests;
                mine.latency_ms_times_requests +=
                    f64::from(latency_ms) * as_figure(counted.requests);
            }
        }
    }
    all
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of one window are far below 2^52"
)]
fn as_figure(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use windlass_domain::pool::MemberHealth;

    use super::*;

    fn shown(responses: Responses) -> (PoolId, MemberStats) {
        let id = Uuid::from_u128(u128::MAX);
        let member = MemberStats {
            server: ServerId::from_uuid(id),
            weight: 100,
            health: MemberHealth::Up,
            sessions: 0,
            requests: u64::MAX,
            errors: u64::MAX,
            retries: 0,
            redispatches: 0,
            latency_ms: None,
            responses,
        };
        (PoolId::from_uuid(id), member)
    }

    #[test]
    fn a_chunk_of_members_fits_a_row() {
        let most = Responses {
            count: u64::MAX,
            total_us: i64::MIN,
        };
        let sample = Sample::of(u32::MAX, clock::now(), &vec![shown(most); CHUNK]);
        assert!(rows::encode(&sample).len() < 30 * 1024);
    }

    #[test]
    fn samples_of_before_answers_were_measured_are_read() {
        let (count, total_us) = (3, 40);
        let sample = Sample::of(1, clock::now(), &[shown(Responses { count, total_us })]);
        let mut json = serde_json::to_value(&sample).unwrap();
        let read = |json: &serde_json::Value| -> Vec<Counted> {
            let sample: Sample = serde_json::from_value(json.clone()).unwrap();
            sample.by_member().map(|(_, counted)| counted).collect()
        };
        assert_eq!(read(&json)[0].responses, Responses { count, total_us });
        json.as_object_mut().unwrap().remove("responses");
        assert_eq!(read(&json)[0].responses, Responses::default());
        assert_eq!(read(&json)[0].requests, u64::MAX);
    }

    #[test]
    fn latency_is_the_mean_over_requests() {
        let together = Together {
            timed: 4,
            latency_ms_times_requests: 10.0,
            ..Together::default()
        };
        assert_eq!(together.latency_ms(), Some(2.5));
        assert_eq!(Together::default().latency_ms(), None);
    }
}
