//! Measures commits per second, and the same work done on bare sled in the same run.
//!
//! Both arms: 64 tasks on the caller's runtime, each waits for its durable answer before it writes again, one key
//! of 500 bytes each, one thread that groups what waits, `flush` and `fdatasync` for each group. Rounds alternate
//! and each starts in an empty directory; the figures are medians.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::sled::{SledOptions, bare, open};
use crate::{Key, Store, StoreError, Txn, sortable};

const WRITERS: u64 = 64;
const VALUE_BYTES: usize = 500;

/// Medians of the rounds.
#[derive(Debug, Clone, Copy)]
pub struct CommitFigures {
    pub store_commits_per_s: f64,
    pub bare_commits_per_s: f64,
    /// The median of the ratios of neighbouring rounds.
    pub ratio: f64,
}

/// Runs the measurement in empty directories below `directory`. Needs a runtime of several threads.
///
/// # Errors
/// Those of the store.
pub async fn commits(
    directory: &Path,
    rounds: u32,
    round: Duration,
) -> Result<CommitFigures, StoreError> {
    let mut of_store = Vec::new();
    let mut of_bare = Vec::new();
    let mut ratios = Vec::new();
    for number in 0..rounds {
        let path = |arm: &str| directory.join(format!("{arm}-{number}"));
        // The arm that comes first takes turns.
        let (store, bare) = if number % 2 == 0 {
            let store = store_round(&path("store"), round).await?;
            (store, bare_round(&path("bare"), round).await?)
        } else {
            let bare = bare_round(&path("bare"), round).await?;
            (store_round(&path("store"), round).await?, bare)
        };
        tracing::info!(store, bare, "round");
        of_store.push(store);
        of_bare.push(bare);
        ratios.push(store / bare);
    }
    Ok(CommitFigures {
        store_commits_per_s: median(of_store),
        bare_commits_per_s: median(of_bare),
        ratio: median(ratios),
    })
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(0.0)
}

fn key_text(writer: u64, number: u64) -> String {
    format!("default/bench/{writer:02}/{}", sortable(number))
}

fn payload(writer: u64, number: u64) -> Vec<u8> {
    let mut value = vec![b'.'; VALUE_BYTES];
    value[..8].copy_from_slice(&number.to_be_bytes());
    value[8..16].copy_from_slice(&writer.to_be_bytes());
    value
}

/// Lets the writers run for the time of a round and counts their commits per second.
async fn timed<F, Fut>(round: Duration, mut writer: F) -> Result<f64, StoreError>
where
    F: FnMut(u64, Arc<AtomicBool>, Arc<AtomicU64>) -> Fut,
    Fut: Future<Output = Result<(), StoreError>> + Send + 'static,
{
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for number in 0..WRITERS {
        tasks.spawn(writer(number, Arc::clone(&stop), Arc::clone(&done)));
    }
    // The first moments go to making files.
    tokio::time::sleep(round / 8).await;
    let before = done.load(Ordering::Relaxed);
    let started = Instant::now();
    tokio::time::sleep(round).await;
    let count = done.load(Ordering::Relaxed) - before;
    let per_second = count as f64 / started.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    while let Some(joined) = tasks.join_next().await {
        joined.map_err(|error| StoreError::Engine {
            operation: "bench",
            reason: error.to_string(),
        })??;
    }
    Ok(per_second)
}

async fn store_round(directory: &Path, round: Duration) -> Result<f64, StoreError> {
    let store = open(directory, SledOptions::default()).await?;
    let writer = |writer: u64, stop: Arc<AtomicBool>, done: Arc<AtomicU64>| {
        let store: Arc<dyn Store> = Arc::clone(&store);
        async move {
            let mut number = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let key = Key::new(key_text(writer, number))?;
                let txn = Txn::new().put(key, payload(writer, number));
                store
                    .commit(txn)
                    .await
                    .map_err(|error| StoreError::Engine {
                        operation: "bench",
                        reason: error.to_string(),
                    })?;
                number += 1;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }
    };
    let figure = timed(round, writer).await?;
    store.close().await?;
    Ok(figure)
}

/// One write of the bare arm.
struct BareWrite {
    key: Bytes,
    /// The header of the store's rows is part of it, so that both arms write the same bytes.
    value: Vec<u8>,
    answer: oneshot::Sender<()>,
}

async fn bare_round(directory: &Path, round: Duration) -> Result<f64, StoreError> {
    let bare = bare::Bare::open(directory, SledOptions::default().cache_bytes)?;
    let (sender, mut queue) = mpsc::channel::<BareWrite>(512);
    let thread = std::thread::spawn(move || -> Result<(), StoreError> {
        let mut writes = Vec::with_capacity(512);
        let mut answers = Vec::with_capacity(512);
        while queue.blocking_recv_many(&mut writes, 512) > 0 {
            for write in writes.drain(..) {
                bare.insert(&write.key, write.value)?;
                answers.push(write.answer);
            }
            bare.sync()?;
            for answer in answers.drain(..) {
                if answer.send(()).is_err() {
                    return Err(StoreError::Closed);
                }
            }
        }
        Ok(())
    });
    let writer = |writer: u64, stop: Arc<AtomicBool>, done: Arc<AtomicU64>| {
        let sender = sender.clone();
        async move {
            let mut number = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let mut value = number.to_be_bytes().to_vec();
                value.extend_from_slice(&payload(writer, number));
                let (answer, answered) = oneshot::channel();
                let write = BareWrite {
                    key: key_text(writer, number).into(),
                    value,
                    answer,
                };
                let sent = sender.send(write).await;
                sent.map_err(|_| StoreError::Closed)?;
                answered.await.map_err(|_| StoreError::Closed)?;
                number += 1;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }
    };
    let figure = timed(round, writer).await?;
    drop(sender);
    let joined = tokio::task::spawn_blocking(move || thread.join()).await;
    match joined {
        Ok(Ok(result)) => result?,
        Ok(Err(_)) | Err(_) => return Err(StoreError::Closed),
    }
    Ok(figure)
}
