//! Shadows: a version of a plugin is asked what the default is asked, and its answers are compared and never used.
//!
//! ```text
//!  start ─► running ──answer differs, or it fails──► differed ──by hand──► promoted
//!              │ └──K equal answers in a row, or by hand──► promoted          │
//!              └────────────────by hand, or it cannot be called──► cancelled ◄┘
//! ```
//! In `differed` the comparison goes on for the evidence, and nothing is promoted by itself any more. One comparison a plugin.
//!
//! A live call is answered first; its record goes into a bounded queue (full: skipped, counted), and one task makes the calls
//! again, one after the other. Figures are written once a second and with each change of state: a crash loses at most the last
//! second of them, which only delays a promotion. A promotion is one commit: the default, the evidence, the event.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use windlass_domain::{Digest, Timestamp, id::CallId, manifest::PluginRef};
use windlass_runtime::{
    CallRecord, CallSink, Plugins,
    journal::JournaledCall,
    replay::{ReplayTotals, ReplayVerdict, Replayed, replay},
};
use windlass_store::{Store, Txn};

use super::{
    Caller, ServiceError,
    plugin_calls::not_available,
    plugin_events::{PluginEventKind, PluginEvents},
    plugins::PluginService,
    records::{self, Committed},
};
use crate::{clock, ids, keys};

/// Calls that wait to be compared.
const QUEUE: usize = 1024;
/// Differences that are kept of one comparison.
const KEPT_DIFFERENCES: usize = 5;
/// Bytes of one of them, at most: the row must stay small.
const DIFFERENCE_MAX_BYTES: usize = 3000;
/// Figures are written so often.
const WRITE_EVERY: Duration = Duration::from_secs(1);
/// Equal calls that can be asked for before a promotion.
const PROMOTE_AFTER_MAX: u64 = 1_000_000;
/// Tries of a transaction that others get in the way of.
const TRIES: u32 = 16;

/// Where a comparison is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ShadowState {
    /// Every answer so far was equal.
    Running,
    /// An answer differed: nothing is promoted by itself any more; the comparison goes on.
    Differed,
    /// It is the default now.
    Promoted,
    /// It was ended.
    Cancelled,
}

impl ShadowState {
    const fn is_over(self) -> bool {
        match self {
            Self::Running | Self::Differed => false,
            Self::Promoted | Self::Cancelled => true,
        }
    }
}

/// A comparison of one version with the default, and its evidence: kept with the version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Shadow {
    /// Schema version of this record.
    #[serde(default)]
    pub schema: u32,
    /// The version that is compared.
    pub candidate: PluginRef,
    /// What it was compared with when it began.
    pub against: PluginRef,
    /// Promoted after so many equal answers in a row; `null`: by hand only.
    pub promote_after: Option<u64>,
    /// Where it is.
    pub state: ShadowState,
    /// Why it is there, for people.
    pub reason: String,
    /// Who began it.
    pub started_by: String,
    /// When.
    pub started_at: Timestamp,
    /// When it was over.
    pub ended_at: Option<Timestamp>,
    /// Its calls in figures, time and memory of both versions beside each other.
    pub totals: ReplayTotals,
    /// Live calls that were not compared, because too many waited.
    pub skipped: u64,
    /// Equal answers since the last other one.
    pub equal_in_a_row: u64,
    /// The first calls that were not equal; at most 5, each cut to about 3 KB.
    pub differences: Vec<ShadowDifference>,
}

/// One call that was not equal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ShadowDifference {
    /// When.
    pub at: Timestamp,
    /// What differed. Its `call` is not a recorded call's id.
    pub replayed: Replayed,
}

/// What to compare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartShadow {
    /// The version that is compared with the default.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// Make it the default after so many equal answers in a row, 1 to 1,000,000; absent: by hand only.
    #[serde(default)]
    pub promote_after: Option<u64>,
    /// The version that is the default meanwhile: pinned when given. Needed where `version` itself is the default now.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub against: Option<semver::Version>,
}

/// Shadows. Cheap to clone.
#[derive(Clone)]
pub struct Shadows {
    store: Arc<dyn Store>,
    plugins: Arc<Plugins>,
    service: PluginService,
    queue: Arc<ShadowQueue>,
}

/// Takes records of live calls whose plugin is compared. One of the sinks of the registry.
pub struct ShadowQueue {
    /// Name of a plugin → the candidate that is asked too.
    compared: RwLock<HashMap<String, Compared>>,
    sender: mpsc::Sender<Arc<CallRecord>>,
}

struct Compared {
    candidate: Digest,
    skipped: Arc<AtomicU64>,
}

impl ShadowQueue {
    /// And what comes out of it: for [`Shadows::run`].
    #[must_use]
    pub fn new() -> (Arc<Self>, mpsc::Receiver<Arc<CallRecord>>) {
        let (sender, records) = mpsc::channel(QUEUE);
        let queue = Self {
            compared: RwLock::default(),
            sender,
        };
        (Arc::new(queue), records)
    }

    fn compare(&self, name: &str, candidate: Digest) {
        let compared = Compared {
            candidate,
            skipped: Arc::default(),
        };
        self.compared
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.to_owned(), compared);
    }

    fn end(&self, name: &str) {
        self.compared
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
    }

    fn candidate(&self, name: &str) -> Option<(Digest, Arc<AtomicU64>)> {
        self.compared
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .map(|compared| (compared.candidate, Arc::clone(&compared.skipped)))
    }
}

impl CallSink for ShadowQueue {
    fn record(&self, record: &Arc<CallRecord>) {
        let compared = self.compared.read().unwrap_or_else(PoisonError::into_inner);
        let Some(compared) = compared.get(&record.plugin.name) else {
            return;
        };
        if compared.candidate != record.plugin.digest
            && self.sender.try_send(Arc::clone(record)).is_err()
        {
            compared.skipped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Shadows {
    /// Over a store, the registry, what is decided about it, and the queue that is one of its sinks.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        plugins: Arc<Plugins>,
        service: PluginService,
        queue: Arc<ShadowQueue>,
    ) -> Self {
        Self {
            store,
            plugins,
            service,
            queue,
        }
    }

    /// The comparisons of a plugin, one a version, the youngest first.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn list(&self, name: &str) -> Result<Vec<Shadow>, ServiceError> {
        let mut shadows = self.read_all(Some(name)).await?;
        shadows.sort_by_key(|shadow| std::cmp::Reverse(shadow.started_at));
        Ok(shadows)
    }

    async fn read_all(&self, name: Option<&str>) -> Result<Vec<Shadow>, ServiceError> {
        records::all(&*self.store, &keys::plugin_shadows(name))
            .await?
            .iter()
            .map(|entry| records::decode_plain(entry, "a comparison of plugins"))
            .collect()
    }

    /// Begins to compare a version with the default. Evidence of an earlier comparison of this version is replaced.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]; `plugin_not_available`; `shadow_running` when one of this plugin is under way; `is_default`
    /// when the version is the default and `against` is not given; a limit.
    pub async fn start(
        &self,
        caller: &Caller,
        name: &str,
        start: &StartShadow,
    ) -> Result<Shadow, ServiceError> {
        if let Some(count) = start.promote_after
            && !(1..=PROMOTE_AFTER_MAX).contains(&count)
        {
            return Err(ServiceError::Limit {
                code: "out_of_limit",
                field: "/promote_after".to_owned(),
                message: format!(
                    "`promote_after` is 1 to {PROMOTE_AFTER_MAX} equal answers, {count} were asked for"
                ),
                limit: PROMOTE_AFTER_MAX,
                current: count,
                mend: "give a figure within the limit, or none to promote by hand".to_owned(),
            });
        }
        let candidate = self.reference(name, &start.version, "/version")?;
        let against = match &start.against {
            Some(version) => self.reference(name, version, "/against")?,
            None => self
                .plugins
                .get(name, None)
                .map_err(|error| not_available("", &error))?
                .reference()
                .clone(),
        };
        if against.digest == candidate.digest {
            return Err(ServiceError::conflict(
                "is_default",
                format!(
                    "{name}@{} is the default: it would be compared with itself",
                    candidate.version
                ),
                "name in `against` the version that is to be the default meanwhile",
            ));
        }
        // It must be callable at all.
        self.plugins
            .pinned(candidate.digest)
            .await
            .map_err(|error| not_available("/version", &error))?;
        let shadow = Shadow {
            schema: 1,
            candidate: candidate.clone(),
            against: against.clone(),
            promote_after: start.promote_after,
            state: ShadowState::Running,
            reason: String::new(),
            started_by: caller.name.clone(),
            started_at: clock::now(),
            ended_at: None,
            totals: ReplayTotals::default(),
            skipped: 0,
            equal_in_a_row: 0,
            differences: Vec::new(),
        };
        let key = keys::plugin_shadow(name, &start.version.to_string());
        for _ in 0..TRIES {
            let running = self.read_all(Some(name)).await?;
            if let Some(other) = running.iter().find(|shadow| !shadow.state.is_over()) {
                return Err(ServiceError::conflict(
                    "shadow_running",
                    format!(
                        "{name}@{} is compared with the default already",
                        other.candidate.version
                    ),
                    "end that comparison first",
                ));
            }
            let guard = match self.store.get(&key).await? {
                Some(entry) => Txn::new().revision_is(key.clone(), entry.revision),
                None => Txn::new().absent(key.clone()),
            };
            let message = format!("compared with {name}@{}", against.version);
            let mut txn = guard
                .put(key.clone(), records::encode(&shadow))
                .and(PluginEvents::put(
                    PluginEventKind::ShadowStarted,
                    &candidate,
                    &caller.name,
                    &message,
                ))
                .and(caller.with.clone());
            if start.against.is_some() {
                txn = txn.and(
                    self.service
                        .pinning(
                            &against,
                            &format!(
                                "{} as the baseline of a comparison with {}",
                                caller.name, candidate.version
                            ),
                        )
                        .await?,
                );
            }
            if let Committed::Done(_) = records::commit(&*self.store, txn).await? {
                self.service.refresh().await?;
                self.queue.compare(name, candidate.digest);
                return Ok(shadow);
            }
        }
        Err(busy())
    }

    /// A version by its name, provided or retired.
    fn reference(
        &self,
        name: &str,
        version: &semver::Version,
        field: &'static str,
    ) -> Result<PluginRef, ServiceError> {
        let status = self
            .service
            .get(&format!("{name}@{version}"))
            .map_err(|_| {
                ServiceError::invalid(
                    "plugin_not_available",
                    field,
                    format!("there is no {name}@{version}"),
                    "see /v1/plugins for the versions that there are",
                )
            })?;
        let digest = status
            .digest
            .ok_or_else(|| ServiceError::not_found("plugin", format!("{name}@{version}")))?;
        Ok(PluginRef {
            name: name.to_owned(),
            version: version.clone(),
            digest,
        })
    }

    /// Ends the comparison of a plugin; its evidence stays.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] when none is under way.
    pub async fn cancel(&self, caller: &Caller, name: &str) -> Result<Shadow, ServiceError> {
        self.end(caller, name, ShadowState::Cancelled, "by hand")
            .await
    }

    /// Makes the compared version the default, by hand.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] when none is under way.
    pub async fn promote(&self, caller: &Caller, name: &str) -> Result<Shadow, ServiceError> {
        self.end(caller, name, ShadowState::Promoted, "by hand")
            .await
    }

    async fn end(
        &self,
        caller: &Caller,
        name: &str,
        state: ShadowState,
        reason: &str,
    ) -> Result<Shadow, ServiceError> {
        for _ in 0..TRIES {
            let shadows = self.read_all(Some(name)).await?;
            let Some(shadow) = shadows.into_iter().find(|shadow| !shadow.state.is_over()) else {
                return Err(ServiceError::not_found("running shadow of plugin", name));
            };
            if let Some(ended) = self.write(shadow, state, reason, caller).await? {
                return Ok(ended);
            }
        }
        Err(busy())
    }

    /// Writes a comparison in a new state; `None`: somebody else changed it meanwhile.
    async fn write(
        &self,
        shadow: Shadow,
        state: ShadowState,
        reason: &str,
        caller: &Caller,
    ) -> Result<Option<Shadow>, ServiceError> {
        let name = shadow.candidate.name.clone();
        let key = keys::plugin_shadow(&name, &shadow.candidate.version.to_string());
        let Some(entry) = self.store.get(&key).await? else {
            return Ok(None);
        };
        let stored: Shadow = records::decode_plain(&entry, "a comparison of plugins")?;
        if stored.started_at != shadow.started_at || stored.state.is_over() {
            return Ok(None);
        }
        let changed = stored.state != state;
        let shadow = Shadow {
            state,
            reason: if changed {
                reason.to_owned()
            } else {
                stored.reason
            },
            ended_at: state.is_over().then(clock::now),
            ..shadow
        };
        let mut txn = Txn::new()
            .revision_is(key.clone(), entry.revision)
            .put(key, records::encode(&shadow))
            .and(caller.with.clone());
        let event = match state {
            ShadowState::Running => None,
            ShadowState::Differed => Some(PluginEventKind::ShadowDiffered),
            ShadowState::Promoted => Some(PluginEventKind::ShadowPromoted),
            ShadowState::Cancelled => Some(PluginEventKind::ShadowCancelled),
        };
        if let Some(event) = event.filter(|_| changed) {
            txn = txn.and(PluginEvents::put(
                event,
                &shadow.candidate,
                &caller.name,
                reason,
            ));
        }
        if state == ShadowState::Promoted {
            txn = txn.and(
                self.service
                    .pinning(
                        &shadow.candidate,
                        &format!(
                            "promotion of {}@{} ({reason})",
                            name, shadow.candidate.version
                        ),
                    )
                    .await?,
            );
        }
        match records::commit(&*self.store, txn).await? {
            Committed::Conflict => Ok(None),
            Committed::Done(_) => {
                if state.is_over() {
                    self.queue.end(&name);
                }
                if state == ShadowState::Promoted {
                    self.service.refresh().await?;
                }
                if changed {
                    tracing::info!(
                        plugin.name = name,
                        plugin.version = %shadow.candidate.version,
                        state = ?state,
                        "the comparison of a plugin changed its state: {reason}"
                    );
                }
                Ok(Some(shadow))
            }
        }
    }

    /// Takes up the comparisons that were under way.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn load(&self) -> Result<(), ServiceError> {
        for shadow in self.read_all(None).await? {
            if !shadow.state.is_over() {
                self.queue
                    .compare(&shadow.candidate.name, shadow.candidate.digest);
            }
        }
        Ok(())
    }

    /// Compares until `stop`. Run by one owned task.
    pub async fn run(&self, mut records: mpsc::Receiver<Arc<CallRecord>>, stop: CancellationToken) {
        let mut fresh: BTreeMap<String, Fresh> = BTreeMap::new();
        loop {
            let due = fresh.values().map(|fresh| fresh.since).min();
            let pause = due.map_or(Duration::from_secs(3600), |since| {
                WRITE_EVERY.saturating_sub(since.elapsed())
            });
            tokio::select! {
                () = stop.cancelled() => break,
                Some(record) = records.recv() => self.compare(&record, &mut fresh).await,
                () = tokio::time::sleep(pause) => {}
            }
            let names: Vec<String> = fresh
                .iter()
                .filter(|(_, fresh)| fresh.since.elapsed() >= WRITE_EVERY || fresh.at_once)
                .map(|(name, _)| name.clone())
                .collect();
            for name in names {
                if let Some(fresh) = fresh.remove(&name) {
                    self.keep(&name, fresh).await;
                }
            }
        }
        for (name, fresh) in fresh {
            self.keep(&name, fresh).await;
        }
    }

    async fn compare(&self, record: &CallRecord, fresh: &mut BTreeMap<String, Fresh>) {
        let name = &record.plugin.name;
        let Some((candidate, _)) = self.queue.candidate(name) else {
            return;
        };
        let is_default = self
            .plugins
            .get(name, None)
            .is_ok_and(|default| default.reference().digest == record.plugin.digest);
        if !is_default {
            return;
        }
        let at = clock::now();
        let id = CallId::from_uuid(ids::new_uuid());
        let Ok(call) = JournaledCall::of(id, at, record) else {
            return;
        };
        if !fresh.contains_key(name) {
            let left = self.wanted(name).await;
            let begun = Fresh::new(candidate, left);
            fresh.insert(name.clone(), begun);
        }
        let Some(found) = fresh.get_mut(name) else {
            return;
        };
        match self.plugins.pinned(candidate).await {
            Ok(plugin) => found.add(at, replay(&plugin, &call).await),
            Err(error) => {
                found.gone = Some(error.to_string());
                found.at_once = true;
            }
        }
        // The last equal answer that was asked for is not waited for.
        found.at_once |= found.left.is_some_and(|left| found.equal_in_a_row >= left);
    }

    /// Equal answers that are missing for a promotion.
    async fn wanted(&self, name: &str) -> Option<u64> {
        let shadows = self.read_all(Some(name)).await.ok()?;
        let shadow = shadows
            .into_iter()
            .find(|shadow| shadow.state == ShadowState::Running)?;
        shadow
            .promote_after
            .map(|wanted| wanted.saturating_sub(shadow.equal_in_a_row))
    }

    /// Adds what was seen to the evidence, and draws the consequence.
    async fn keep(&self, name: &str, fresh: Fresh) {
        let caller = Caller {
            name: "windlass".to_owned(),
            ..Caller::default()
        };
        for _ in 0..TRIES {
            let kept = async {
                let shadows = self.read_all(Some(name)).await?;
                let Some(mut shadow) = shadows.into_iter().find(|shadow| {
                    !shadow.state.is_over() && shadow.candidate.digest == fresh.candidate
                }) else {
                    return Ok(true);
                };
                let skipped = self
                    .queue
                    .candidate(name)
                    .map_or(0, |(_, skipped)| skipped.swap(0, Ordering::Relaxed));
                shadow.skipped += skipped;
                let (state, reason) = fresh.add_to(&mut shadow);
                Ok::<_, ServiceError>(self.write(shadow, state, &reason, &caller).await?.is_some())
            };
            match kept.await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(
                        plugin.name = name,
                        error = &error as &dyn std::error::Error,
                        "what a comparison of plugins saw was not kept"
                    );
                    return;
                }
            }
        }
    }
}

/// What was seen since the evidence was written last.
struct Fresh {
    candidate: Digest,
    since: Instant,
    totals: ReplayTotals,
    differences: Vec<ShadowDifference>,
    /// Since the last answer that was not equal, or since the evidence was written.
    equal_in_a_row: u64,
    differed: bool,
    /// Equal answers that were missing for a promotion.
    left: Option<u64>,
    /// Why the candidate cannot be called any more.
    gone: Option<String>,
    at_once: bool,
}

impl Fresh {
    fn new(candidate: Digest, left: Option<u64>) -> Self {
        Self {
            candidate,
            left,
            since: Instant::now(),
            totals: ReplayTotals::default(),
            differences: Vec::new(),
            equal_in_a_row: 0,
            differed: false,
            gone: None,
            at_once: false,
        }
    }

    fn add(&mut self, at: Timestamp, replayed: Replayed) {
        self.totals.add(&replayed);
        match replayed.verdict {
            ReplayVerdict::Equal => self.equal_in_a_row += 1,
            ReplayVerdict::NotComparable => {}
            ReplayVerdict::Different | ReplayVerdict::Failed => {
                self.equal_in_a_row = 0;
                self.at_once |= !self.differed;
                self.differed = true;
                if self.differences.len() < KEPT_DIFFERENCES {
                    self.differences.push(ShadowDifference {
                        at,
                        replayed: shortened(replayed),
                    });
                }
            }
        }
    }

    /// The state that follows, and why.
    fn add_to(&self, shadow: &mut Shadow) -> (ShadowState, String) {
        shadow.totals.join(&self.totals);
        shadow.equal_in_a_row = if self.differed {
            self.equal_in_a_row
        } else {
            shadow.equal_in_a_row + self.equal_in_a_row
        };
        let room = KEPT_DIFFERENCES.saturating_sub(shadow.differences.len());
        shadow
            .differences
            .extend(self.differences.iter().take(room).cloned());
        if let Some(gone) = &self.gone {
            return (ShadowState::Cancelled, gone.clone());
        }
        if self.differed || shadow.state == ShadowState::Differed {
            let reason = format!(
                "of {} compared calls {} differed and {} failed: it is not promoted by itself any more",
                shadow.totals.calls, shadow.totals.different, shadow.totals.failed
            );
            return (ShadowState::Differed, reason);
        }
        match shadow.promote_after {
            Some(wanted) if shadow.equal_in_a_row >= wanted => (
                ShadowState::Promoted,
                format!("{} equal answers in a row", shadow.equal_in_a_row),
            ),
            Some(_) | None => (ShadowState::Running, String::new()),
        }
    }
}

/// Cut to what a row can hold.
fn shortened(mut replayed: Replayed) -> Replayed {
    replayed.host_calls.truncate(3);
    while records::encode(&replayed).len() > DIFFERENCE_MAX_BYTES
        && (replayed.differences.first.pop().is_some() || replayed.host_calls.pop().is_some())
    {}
    for failure in [&mut replayed.failure, &mut replayed.failure_before]
        .into_iter()
        .flatten()
    {
        failure.message = failure.message.chars().take(500).collect();
    }
    replayed
}

fn busy() -> ServiceError {
    ServiceError::Unavailable {
        message: "others changed the same comparison at the same time; try again".to_owned(),
    }
}
