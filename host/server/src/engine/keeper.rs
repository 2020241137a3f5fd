//! The keeper of the safety envelope: who may be unavailable at once, across all orders.
//!
//! It owns the rows `unavailable/…`. A server is *unavailable* while an order works on it, after an order left it broken,
//! and while its agent is not connected. Before a unit starts, the keeper counts the unavailable servers of its
//! application in its cell, and the members with traffic that each of its pools would keep; it admits the unit by writing
//! its row, or says what holds it. A failed server stays unavailable, tolerated or ignored: it does not serve, and a limit
//! that looked away would let a release take one server after the other. Admissions and releases that wait are answered with one commit, one keeper per store.
//! Source: design, "Safety envelope".

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use tokio::sync::{Notify, mpsc, oneshot};
use windlass_domain::{
    id::{InstanceId, OrderId, PoolId, ServerId},
    limits::Limits,
};
use windlass_store::{Store, Txn};

use super::{
    Agents,
    rows::{self, RowError, Unavailable},
    traffic::TrafficPools,
};

/// Requests that may wait for the keeper.
const QUEUE: usize = 1024;
/// Requests answered with one commit.
const BATCH: usize = 100;

/// A unit that wants to start.
#[derive(Debug, Clone)]
pub(crate) struct Admission {
    pub(crate) order: OrderId,
    pub(crate) seat: Seat,
    pub(crate) limits: Limits,
    pub(crate) pools: Vec<PoolId>,
    /// Every server of the service instance, with its cell.
    pub(crate) members: Vec<(ServerId, String)>,
}

/// A server of an instance in a cell.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seat {
    pub(crate) instance: InstanceId,
    pub(crate) cell: String,
    pub(crate) server: ServerId,
}

/// The keeper's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Admitted,
    /// Not now.
    Held(Hold),
}

/// What stands against a server's turn, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hold {
    /// Which limit, and how far it is used.
    pub(crate) limit: String,
    /// Servers that use it up.
    pub(crate) out: Vec<(ServerId, Out)>,
    /// What can be done.
    pub(crate) mend: String,
}

/// Why a server is unavailable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Out {
    /// An order works on it, or left it broken. A person's going on without it does not change that: it is given back when
    /// its turn succeeds after all (retried, or in a later order), or when it is as it was before.
    Seated(OrderId),
    /// Its agent is not connected.
    Offline,
}

impl Hold {
    fn because(limit: impl Into<String>) -> Self {
        Self {
            limit: limit.into(),
            out: Vec::new(),
            mend: "wait until that is over".to_owned(),
        }
    }

    /// As it is shown; `name` tells the names of servers, `order` is the one that is held.
    pub(crate) fn told(&self, order: OrderId, name: impl Fn(ServerId) -> String) -> String {
        const SHOWN: usize = 5;
        let shown = self.out.iter().take(SHOWN).map(|(server, out)| {
            let server = name(*server);
            match out {
                Out::Seated(holder) if *holder == order => {
                    format!("{server}: this order works on it or left it broken")
                }
                Out::Seated(holder) => {
                    format!("{server}: the order {holder} works on it or left it broken")
                }
                Out::Offline => format!("{server}: its agent is not connected"),
            }
        });
        let mut shown: Vec<String> = shown.collect();
        if self.out.len() > SHOWN {
            shown.push(format!("and {} more", self.out.len() - SHOWN));
        }
        let out = if shown.is_empty() {
            String::new()
        } else {
            format!(" ({})", shown.join("; "))
        };
        format!("{}{out}: {}", self.limit, self.mend)
    }
}

enum Request {
    Admit(Box<Admission>, oneshot::Sender<Answer>),
    Release(OrderId, Seat, oneshot::Sender<()>),
}

/// A handle to the keeper.
#[derive(Clone)]
pub(crate) struct Keeper {
    requests: mpsc::Sender<Request>,
    changed: Arc<Notify>,
}

/// The keeper has ended: the server is shutting down.
#[derive(Debug, thiserror::Error)]
#[error("the keeper of the safety envelope has ended")]
pub(crate) struct KeeperGone;

impl Keeper {
    /// Asks whether a unit may start. Admitting a unit again does no harm.
    pub(crate) async fn admit(&self, admission: Admission) -> Result<Answer, KeeperGone> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(Request::Admit(Box::new(admission), reply))
            .await
            .map_err(|_| KeeperGone)?;
        answer.await.map_err(|_| KeeperGone)
    }

    /// The server is available again as far as this order goes.
    pub(crate) async fn release(&self, order: OrderId, seat: Seat) -> Result<(), KeeperGone> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(Request::Release(order, seat, reply))
            .await
            .map_err(|_| KeeperGone)?;
        answer.await.map_err(|_| KeeperGone)
    }

    /// Wakes those who were held whenever a server may have become available.
    pub(crate) fn changed(&self) -> Arc<Notify> {
        self.changed.clone()
    }
}

/// The keeper's own side: run by one task.
pub(crate) struct KeeperTask {
    store: Arc<dyn Store>,
    agents: Arc<dyn Agents>,
    pools: Arc<dyn TrafficPools>,
    requests: mpsc::Receiver<Request>,
    changed: Arc<Notify>,
    held: BTreeMap<Seat, OrderId>,
}

impl KeeperTask {
    /// Reads the rows that stand.
    pub(crate) async fn open(
        store: Arc<dyn Store>,
        agents: Arc<dyn Agents>,
        pools: Arc<dyn TrafficPools>,
    ) -> Result<(Keeper, Self), RowError> {
        let mut held = BTreeMap::new();
        for entry in rows::read_all(&*store, &rows::all_unavailable()).await? {
            let row: Unavailable = rows::decode(&entry, "an unavailable server")?;
            if let Some(seat) = seat_of(&entry.key) {
                held.insert(seat, row.order);
            }
        }
        let (sender, requests) = mpsc::channel(QUEUE);
        let changed = Arc::new(Notify::new());
        let keeper = Keeper {
            requests: sender,
            changed: changed.clone(),
        };
        Ok((
            keeper,
            Self {
                store,
                agents,
                pools,
                requests,
                changed,
                held,
            },
        ))
    }

    /// Answers requests until every handle is gone.
    pub(crate) async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        while self.requests.recv_many(&mut batch, BATCH).await > 0 {
            self.answer(std::mem::take(&mut batch)).await;
        }
    }

    async fn answer(&mut self, batch: Vec<Request>) {
        let mut txn = Vec::new();
        let mut touched = BTreeSet::new();
        let mut admitted = Vec::new();
        let mut released = Vec::new();
        let mut deferred = Vec::new();
        for request in batch {
            match request {
                Request::Admit(admission, reply) => {
                    if touched.contains(&admission.seat) {
                        deferred.push((admission, reply));
                        continue;
                    }
                    match self.refusal(&admission).await {
                        Some(reason) => drop(reply.send(Answer::Held(reason))),
                        None => {
                            let Admission { order, seat, .. } = *admission;
                            touched.insert(seat.clone());
                            if self.held.insert(seat.clone(), order) != Some(order) {
                                txn.push((seat, Some(order)));
                            }
                            admitted.push(reply);
                        }
                    }
                }
                Request::Release(order, seat, reply) => {
                    // Another order may hold the server by now: that is not ours to release.
                    if self.held.get(&seat) == Some(&order) && !touched.contains(&seat) {
                        self.held.remove(&seat);
                        touched.insert(seat.clone());
                        txn.push((seat, None));
                    }
                    released.push(reply);
                }
            }
        }
        if !txn.is_empty() && !self.commit(&txn).await {
            // Nothing was promised: the askers see the channel close and ask again.
            for (seat, order) in txn {
                match order {
                    Some(_) => {
                        self.held.remove(&seat);
                    }
                    None => self.changed.notify_waiters(),
                }
            }
            return;
        }
        for reply in admitted {
            drop(reply.send(Answer::Admitted));
        }
        for (_, reply) in deferred {
            drop(reply.send(Answer::Held(Hold::because(
                "another order has just started on this server",
            ))));
        }
        if !released.is_empty() {
            self.changed.notify_waiters();
        }
        for reply in released {
            // Whoever asked may be gone; the release stands.
            let _gone = reply.send(());
        }
    }

    async fn commit(&self, changes: &[(Seat, Option<OrderId>)]) -> bool {
        let txn = changes.iter().fold(Txn::new(), |txn, (seat, order)| {
            let key = rows::unavailable(seat.instance, &seat.cell, seat.server);
            match order {
                Some(order) => txn.put(key, rows::encode(&Unavailable { order: *order })),
                None => txn.delete(key),
            }
        });
        match self.store.commit(txn).await {
            Ok(_) => true,
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the safety envelope could not be written"
                );
                false
            }
        }
    }

    /// Why a unit may not start now.
    async fn refusal(&self, admission: &Admission) -> Option<Hold> {
        let Admission {
            seat,
            limits,
            members,
            pools,
            order,
        } = admission;
        let is_held = |server: ServerId, cell: &str| {
            self.held.get(&Seat {
                instance: seat.instance,
                cell: cell.to_owned(),
                server,
            })
        };
        let why_out = |server: ServerId, cell: &str| match is_held(server, cell) {
            Some(holder) => Some(Out::Seated(*holder)),
            None if self.agents.is_online(server) => None,
            None => Some(Out::Offline),
        };
        let out = |server: ServerId, cell: &str| why_out(server, cell).is_some();
        if is_held(seat.server, &seat.cell) == Some(order) {
            return None;
        }
        let in_cell = || members.iter().filter(|(_, cell)| *cell == seat.cell);
        let total = u32::try_from(in_cell().count()).unwrap_or(u32::MAX);
        let others: Vec<(ServerId, Out)> = in_cell()
            .filter(|(server, _)| *server != seat.server)
            .filter_map(|(server, cell)| Some((*server, why_out(*server, cell)?)))
            .collect();
        let others_out = u32::try_from(others.len()).unwrap_or(u32::MAX);
        let allowed = limits.unavailable_of(total);
        // A server that is out already makes nothing worse.
        if others_out >= allowed && !out(seat.server, &seat.cell) {
            return Some(Hold {
                limit: format!(
                    "max_unavailable is {} of {total} servers in cell {}, and {others_out} are unavailable",
                    limits.max_unavailable, seat.cell
                ),
                out: others,
                mend: "retry what failed, wait until they are back, or cancel and allow more"
                    .to_owned(),
            });
        }
        if members.len() > 1 && limits.min_healthy_members > 0 {
            for pool in pools {
                let mut serving = 0u32;
                for (server, cell) in members {
                    if *server != seat.server && !out(*server, cell) {
                        match self.pools.serves(*pool, *server).await {
                            Ok(serves) => serving += u32::from(serves),
                            Err(error) => return Some(Hold::because(error.to_string())),
                        }
                    }
                }
                if serving < limits.min_healthy_members {
                    return Some(Hold {
                        limit: format!(
                            "min_healthy_members is {}, and the pool {pool} would keep {serving} healthy members with traffic",
                            limits.min_healthy_members
                        ),
                        out: Vec::new(),
                        mend: "wait until others are back, or lower the limit".to_owned(),
                    });
                }
            }
        }
        None
    }
}

fn seat_of(key: &windlass_store::Key) -> Option<Seat> {
    let mut segments = key.segments().rev();
    let server = segments.next()?.parse().ok()?;
    let cell = segments.next()?.to_owned();
    let instance = segments.next()?.parse().ok()?;
    Some(Seat {
        instance,
        cell,
        server,
    })
}
