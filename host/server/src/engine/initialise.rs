//! Initialisation: which servers can take part, and the locks that keep two orders off one server.
//!
//! Server work needs neither: it is of no application, and waits for each server by itself.
//!
//! Owns the rows `lock/{server}`. A lock names the first order of a line, so that a rollback works under the locks of the
//! order it rolls back. A group of which a server is held by another order is locked in this one, with that order's title.
//! Taking locks again does no harm: those that are ours already are kept. A lock of an order that has ended is free, whatever
//! kept that order from giving it back.
//!
//! What brings servers back does not wait for one that is away: that one alone is locked, until somebody unlocks it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use windlass_domain::{
    id::{OrderId, ServerId},
    order::Control,
    plan::{Level, NodeIndex, NodeKind, Plan, Unit},
    reducer::Event,
    text,
};
use windlass_store::{CommitError, Txn};

use super::{
    ActError, Shared,
    executor::Job,
    rows::{self, ServerLock},
};

/// Locks taken or given back with one commit.
const CHUNK: usize = 100;

/// How long initialisation waits for servers that are not connected.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Why locks could not be taken or given back now.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    #[error("a lock could not be read")]
    Row(#[from] rows::RowError),
    #[error("a lock could not be written")]
    Commit(#[from] CommitError),
}

/// Checks the servers and takes their locks.
pub(crate) async fn initialise(job: &Job) {
    let shared = &job.engine.shared;
    // Agents that lost their session, as all do when the server starts, come back within moments: wait for them.
    let deadline = tokio::time::Instant::now() + CONNECT_WITHIN;
    let away = loop {
        if !is_awaited(job).await {
            return;
        }
        let in_time = tokio::time::Instant::now() < deadline;
        let reason = match shared.planning.check_servers(&job.plan).await {
            Ok(problems) if problems.is_empty() => {
                let away = away_from(shared, &job.plan);
                if away.is_empty() || !in_time {
                    break away;
                }
                String::new()
            }
            Ok(problems) => told(&problems),
            Err(reason) => reason,
        };
        if !in_time {
            return fail(job, reason).await;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    let owner = job.order.lock_owner;
    match lock_servers(shared, &servers(&job.plan), owner).await {
        Ok(held) => {
            let mut locked = groups_of(shared, &job.plan, &held).await;
            locked.extend(away);
            let told = job.tell(Event::Initialised { locked }, Txn::new()).await;
            // It was ended meanwhile: whoever ended it gave back the locks that were there then.
            if let Err(ActError::Refused(_) | ActError::NoSuchOrder(_)) = told
                && let Err(error) = unlock_of_ended(shared, owner).await
            {
                tracing::error!(order.id = %job.order.id, error = &error as &dyn std::error::Error, "locks could not be given back");
            }
        }
        Err(error) => {
            tracing::error!(order.id = %job.order.id, error = &error as &dyn std::error::Error, "servers could not be locked");
            fail(job, "servers could not be locked: try again".to_owned()).await;
        }
    }
}

/// Whether the order still waits to be initialised: it can be ended meanwhile.
async fn is_awaited(job: &Job) -> bool {
    match rows::read_order(&*job.engine.shared.store, job.order.id).await {
        Ok(Some((order, _))) => {
            matches!(order.control, Control::NotStarted | Control::Initialising)
        }
        Ok(None) => false,
        // It is found out when it is told.
        Err(_) => true,
    }
}

/// The servers of a plan that brings back whose agents are not connected: their turns, each with the reason that locks it.
fn away_from(shared: &Shared, plan: &Plan) -> Vec<(NodeIndex, String)> {
    if !plan.brings_back {
        return Vec::new();
    }
    units_of(plan)
        .filter(|(_, unit)| unit.part.is_some() && !shared.agents.is_online(unit.server))
        .map(|(node, unit)| {
            let reason = format!(
                "{} is not connected: unlock it when it is back, or cancel it",
                unit.server_name
            );
            (node, reason)
        })
        .collect()
}

async fn unlock_of_ended(shared: &Shared, owner: OrderId) -> Result<(), LockError> {
    if rows::has_ended(&*shared.store, owner).await? {
        unlock_all(shared, owner).await?;
    }
    Ok(())
}

/// Problems for people: the first of them.
fn told(problems: &[String]) -> String {
    format!(
        "these servers cannot take part: {}",
        text::first_of(problems.iter(), 10, "; ")
    )
}

async fn fail(job: &Job, reason: String) {
    let servers = servers(&job.plan);
    if let Err(error) = unlock_servers(&job.engine.shared, &servers, job.order.lock_owner).await {
        tracing::error!(order.id = %job.order.id, error = &error as &dyn std::error::Error, "locks could not be given back");
    }
    answer(job, Event::InitialisationFailed { reason }).await;
}

async fn answer(job: &Job, event: Event) {
    drop(job.back.send(super::actor::Command::internal(event)).await);
}

/// The servers' turns that stand in a plan's tree, with their nodes.
pub(super) fn units_of(plan: &Plan) -> impl Iterator<Item = (NodeIndex, &Unit)> {
    let nodes = (0u32..).zip(&plan.nodes);
    nodes.filter_map(|(index, planned)| match planned.kind {
        NodeKind::Unit { unit } => Some((index, plan.units.get(unit as usize)?)),
        NodeKind::Sequence
        | NodeKind::Parallel { .. }
        | NodeKind::Step { .. }
        | NodeKind::Traffic(_)
        | NodeKind::Gate { .. }
        | NodeKind::Pause { .. }
        | NodeKind::Judge { .. } => None,
    })
}

/// The servers to lock: those of applications.
fn servers(plan: &Plan) -> BTreeSet<ServerId> {
    units_of(plan)
        .filter(|(_, unit)| unit.part.is_some())
        .map(|(_, unit)| unit.server)
        .collect()
}

/// Takes the lock of every server that is free; answers those that others hold, with their holder.
pub(super) async fn lock_servers(
    shared: &Shared,
    servers: &BTreeSet<ServerId>,
    owner: OrderId,
) -> Result<BTreeMap<ServerId, OrderId>, LockError> {
    let store = &*shared.store;
    let mut held = BTreeMap::new();
    // Only what has ended is remembered: that stays so.
    let mut ended: BTreeSet<OrderId> = BTreeSet::new();
    let servers: Vec<ServerId> = servers.iter().copied().collect();
    for chunk in servers.chunks(CHUNK) {
        // Another order may take one between the look and the commit: look again.
        loop {
            let mut txn = Txn::new();
            for server in chunk {
                let key = rows::lock(*server);
                match rows::read::<ServerLock>(store, &key, "a server's lock").await? {
                    Some((lock, _)) if lock.owner == owner => drop(held.remove(server)),
                    Some((lock, revision)) => {
                        if ended.contains(&lock.owner) || rows::has_ended(store, lock.owner).await?
                        {
                            ended.insert(lock.owner);
                            held.remove(server);
                            txn = txn
                                .revision_is(key.clone(), revision)
                                .put(key, rows::encode(&ServerLock { owner }));
                        } else {
                            held.insert(*server, lock.owner);
                        }
                    }
                    None => {
                        held.remove(server);
                        txn = txn
                            .absent(key.clone())
                            .put(key, rows::encode(&ServerLock { owner }));
                    }
                }
            }
            if txn.operations().is_empty() {
                break;
            }
            match store.commit(txn).await {
                Ok(_) => break,
                Err(CommitError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(held)
}

/// Takes the locks of one node's servers; answers who holds one of them.
pub(crate) async fn lock_node(
    shared: &Shared,
    plan: &Plan,
    node: NodeIndex,
    owner: OrderId,
) -> Result<Option<(ServerId, OrderId)>, LockError> {
    let end = (node + 1..)
        .zip(plan.nodes.iter().skip(node as usize + 1))
        .find(|(_, planned)| planned.parent.is_none_or(|parent| parent < node))
        .map_or(NodeIndex::MAX, |(index, _)| index);
    let servers = units_of(plan)
        .filter(|(index, unit)| (node..end).contains(index) && unit.part.is_some())
        .map(|(_, unit)| unit.server)
        .collect();
    let held = lock_servers(shared, &servers, owner).await?;
    Ok(held.into_iter().next())
}

/// Gives back every lock that is this order's: also those of servers that its plan does not hold any more, or not yet.
pub(crate) async fn unlock_all(shared: &Shared, owner: OrderId) -> Result<(), LockError> {
    let store = &*shared.store;
    let mut mine = BTreeSet::new();
    for entry in rows::read_all(store, &rows::all_locks()).await? {
        let lock: ServerLock = rows::decode(&entry, "a server's lock")?;
        let server = entry.key.segments().next_back();
        if lock.owner == owner
            && let Some(server) = server.and_then(|server| server.parse().ok())
        {
            mine.insert(server);
        }
    }
    unlock_servers(shared, &mine, owner).await
}

/// Gives back the locks of servers, as far as they are this order's.
pub(super) async fn unlock_servers(
    shared: &Shared,
    servers: &BTreeSet<ServerId>,
    owner: OrderId,
) -> Result<(), LockError> {
    let store = &*shared.store;
    let servers: Vec<ServerId> = servers.iter().copied().collect();
    for chunk in servers.chunks(CHUNK) {
        let mut txn = Txn::new();
        for server in chunk {
            let key = rows::lock(*server);
            // Nobody else deletes the lock of an order that goes on; that of one that has ended may be another's by the commit,
            // which is then tried again.
            if let Some((lock, revision)) =
                rows::read::<ServerLock>(store, &key, "a server's lock").await?
                && lock.owner == owner
            {
                txn = txn.revision_is(key.clone(), revision).delete(key);
            }
        }
        if !txn.operations().is_empty() {
            store.commit(txn).await?;
        }
    }
    Ok(())
}

/// The groups to lock because of servers that others hold, each with the reason.
pub(super) async fn groups_of(
    shared: &Shared,
    plan: &Plan,
    held: &BTreeMap<ServerId, OrderId>,
) -> Vec<(NodeIndex, String)> {
    let mut locked: BTreeMap<NodeIndex, String> = BTreeMap::new();
    for (index, unit) in units_of(plan) {
        let Some(holder) = held.get(&unit.server) else {
            continue;
        };
        let group = group_of(plan, index);
        if locked.contains_key(&group) {
            continue;
        }
        let title = match rows::read_order(&*shared.store, *holder).await {
            Ok(Some((order, _))) => format!("`{}` ", order.title),
            Ok(None) | Err(_) => String::new(),
        };
        locked.insert(
            group,
            format!(
                "{} is held by the order {title}({holder}): unlock the group when that has ended",
                unit.server_name
            ),
        );
    }
    locked.into_iter().collect()
}

/// The group around a server; the server itself where there is none.
pub(super) fn group_of(plan: &Plan, unit: NodeIndex) -> NodeIndex {
    let mut at = Some(unit);
    while let Some(index) = at {
        let node = &plan.nodes[index as usize];
        if matches!(node.level, Level::Group | Level::Application) {
            return index;
        }
        at = node.parent;
    }
    unit
}
