//! The keeper of the safety envelope: who may be unavailable at once, across all orders.
//!
//! It owns the rows `unavailable/…`. A server is *unavailable* while an order works on it, after an order left it broken,
//! while its application is offline because a person took it out, and while its agent is not connected. Before a unit starts, the keeper counts the unavailable servers of its
//! application in its cell, and the members with traffic that each of its pools would keep; it admits the unit by writing
//! its row, or says what holds it. A failed server stays unavailable, tolerated or ignored: it does not serve, and a limit
//! that looked away would let a release take one server after the other. Admissions and releases that wait are answered with one commit, one keeper per store.
//! Weights that others set are decided here as well, see `weights`.
//! Source: design, "Safety envelope".

mod weights;

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::{Notify, mpsc, oneshot};
use windlass_domain::{
    id::{InstanceId, OrderId, PoolId, ServerId},
    limits::Limits,
    text,
};
use windlass_store::{Store, Txn};

use super::{
    Agents, Members,
    rows::{self, RowError, Unavailable},
    traffic::TrafficPools,
};

use weights::Cuts;
pub(crate) use weights::{Cut, PoolWeights, Reweighing, Short, Weighed};

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
    pub(crate) members: Members,
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
    /// A person took its application offline.
    TakenOffline,
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
        let told = self.out.iter().map(|(server, out)| {
            let server = name(*server);
            match out {
                Out::Seated(holder) if *holder == order => {
                    format!("{server}: this order works on it or left it broken")
                }
                Out::Seated(holder) => {
                    format!("{server}: the order {holder} works on it or left it broken")
                }
                Out::TakenOffline => format!("{server}: it was taken offline"),
                Out::Offline => format!("{server}: its agent is not connected"),
            }
        });
        let out = if self.out.is_empty() {
            String::new()
        } else {
            format!(" ({})", text::first_of(told, 5, "; "))
        };
        format!("{}{out}: {}", self.limit, self.mend)
    }
}

enum Request {
    Admit(Box<Admission>, oneshot::Sender<Answer>),
    Release(OrderId, Seat, Leaving, oneshot::Sender<()>),
    Weigh(Box<Reweighing>, oneshot::Sender<Weighed>),
}

/// How an order leaves a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// Its application serves.
    Serving,
    /// As the order found it.
    AsFound,
    /// Its application was taken offline: its seat stays taken.
    Offline,
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

    /// The order is done with the server. Saying it again does no harm.
    pub(crate) async fn release(
        &self,
        order: OrderId,
        seat: Seat,
        leaving: Leaving,
    ) -> Result<(), KeeperGone> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(Request::Release(order, seat, leaving, reply))
            .await
            .map_err(|_| KeeperGone)?;
        answer.await.map_err(|_| KeeperGone)
    }

    /// Asks whether weights may be set.
    pub(crate) async fn weigh(&self, wanted: Reweighing) -> Result<Weighed, KeeperGone> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(Request::Weigh(Box::new(wanted), reply))
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
    held: BTreeMap<Seat, Unavailable>,
    cuts: Cuts,
    last_cut: u64,
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
                held.insert(seat, row);
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
                cuts: Cuts::default(),
                last_cut: 0,
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
        // Requests are answered in their order, on what is held in memory; what came of it is written with one commit.
        let mut before: BTreeMap<Seat, Option<Unavailable>> = BTreeMap::new();
        let mut admitted = Vec::new();
        let mut released = Vec::new();
        let mut deferred = Vec::new();
        let mut weighed = Vec::new();
        for request in batch {
            match request {
                Request::Admit(admission, reply) => {
                    let (order, seat) = (admission.order, admission.seat.clone());
                    let holder = self.held.get(&seat).cloned();
                    let others = holder.as_ref().is_some_and(|row| row.order != order);
                    if before.contains_key(&seat) && others {
                        deferred.push(reply);
                        continue;
                    }
                    match self.refusal(&admission).await {
                        Some(reason) => drop(reply.send(Answer::Held(reason))),
                        None => {
                            let row = Unavailable {
                                order,
                                offline: false,
                                was_offline: holder
                                    .as_ref()
                                    .is_some_and(|row| row.offline || row.was_offline),
                            };
                            before.entry(seat.clone()).or_insert(holder);
                            self.held.insert(seat, row);
                            admitted.push(reply);
                        }
                    }
                }
                Request::Release(order, seat, leaving, reply) => {
                    // Another order may hold the server by now: that is not ours to release. What was told already stays.
                    if let Some(row) = self.held.get(&seat)
                        && row.order == order
                        && !row.offline
                    {
                        let row = row.clone();
                        let offline = match leaving {
                            Leaving::Serving => false,
                            Leaving::AsFound => row.was_offline,
                            Leaving::Offline => true,
                        };
                        if offline {
                            let now = Unavailable {
                                order,
                                offline,
                                was_offline: false,
                            };
                            self.held.insert(seat.clone(), now);
                        } else {
                            self.held.remove(&seat);
                        }
                        before.entry(seat).or_insert(Some(row));
                    }
                    released.push(reply);
                }
                Request::Weigh(wanted, reply) => {
                    let answer = self.weigh(&wanted).await;
                    weighed.push((reply, answer));
                }
            }
        }
        let changes: Vec<(Seat, Option<Unavailable>)> = before
            .iter()
            .map(|(seat, before)| (seat, before, self.held.get(seat).cloned()))
            .filter(|(_, before, now)| *before != now)
            .map(|(seat, _, now)| (seat.clone(), now))
            .collect();
        if !changes.is_empty() && !self.commit(&changes).await {
            // Nothing was promised: the askers see the channel close and ask again, and what is held is as it was.
            for (seat, before) in before {
                match before {
                    Some(row) => self.held.insert(seat, row),
                    None => self.held.remove(&seat),
                };
            }
            self.changed.notify_waiters();
            return;
        }
        for reply in admitted {
            drop(reply.send(Answer::Admitted));
        }
        for reply in deferred {
            drop(reply.send(Answer::Held(Hold::because(
                "another order has just started on this server",
            ))));
        }
        if !released.is_empty() {
            self.changed.notify_waiters();
        }
        for (reply, answer) in weighed {
            // Of one that is gone the cut is dropped.
            drop(reply.send(answer));
        }
        for reply in released {
            // Whoever asked may be gone; the release stands.
            let _gone = reply.send(());
        }
    }

    async fn commit(&self, changes: &[(Seat, Option<Unavailable>)]) -> bool {
        let txn = changes.iter().fold(Txn::new(), |txn, (seat, row)| {
            let key = rows::unavailable(seat.instance, &seat.cell, seat.server);
            match row {
                Some(row) => txn.put(key, rows::encode(row)),
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
            Some(row) if row.offline => Some(Out::TakenOffline),
            Some(row) => Some(Out::Seated(row.order)),
            None if self.agents.is_online(server) => None,
            None => Some(Out::Offline),
        };
        let out = |server: ServerId, cell: &str| why_out(server, cell).is_some();
        if is_held(seat.server, &seat.cell).is_some_and(|row| row.order == *order && !row.offline) {
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
                // Taken before weights are read: a cut that ends meanwhile has set them.
                let cut = self.cut();
                let mut serving = 0u32;
                for (server, cell) in members.iter() {
                    if *server != seat.server
                        && !out(*server, cell)
                        && !cut.contains(&(*pool, *server))
                    {
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

#[cfg(test)]
mod tests {
    use windlass_domain::inbox::JournalEpoch;

    use super::*;
    use crate::{engine::traffic::SimulatedPools, ids, service::records::tests::memory_store};

    /// Every agent is connected.
    pub(super) struct Connected;

    impl Agents for Connected {
        fn current_epoch(&self, _: ServerId) -> Option<JournalEpoch> {
            None
        }

        fn is_online(&self, _: ServerId) -> bool {
            true
        }

        fn silent_for(&self, _: ServerId) -> Option<std::time::Duration> {
            None
        }

        fn nudge(&self, _: ServerId) {}
    }

    fn seat() -> Seat {
        Seat {
            instance: InstanceId::from_uuid(ids::new_uuid()),
            cell: "one".to_owned(),
            server: ServerId::from_uuid(ids::new_uuid()),
        }
    }

    fn row(order: OrderId) -> Unavailable {
        Unavailable {
            order,
            offline: false,
            was_offline: false,
        }
    }

    pub(super) fn admission(order: OrderId, seat: &Seat) -> Admission {
        Admission {
            order,
            seat: seat.clone(),
            limits: Limits::default(),
            pools: Vec::new(),
            members: vec![(seat.server, seat.cell.clone())].into(),
        }
    }

    fn admit(order: OrderId, seat: &Seat) -> (Request, oneshot::Receiver<Answer>) {
        let (reply, answer) = oneshot::channel();
        let admission = Box::new(admission(order, seat));
        (Request::Admit(admission, reply), answer)
    }

    fn release(order: OrderId, seat: &Seat) -> (Request, oneshot::Receiver<()>) {
        let (reply, answer) = oneshot::channel();
        (
            Request::Release(order, seat.clone(), Leaving::Serving, reply),
            answer,
        )
    }

    #[tokio::test]
    async fn a_turn_that_ends_in_the_batch_it_starts_in_keeps_no_seat() {
        let store = memory_store();
        let pools = Arc::new(SimulatedPools::new(store.clone()));
        let open = || KeeperTask::open(store.clone(), Arc::new(Connected), pools.clone());
        let (_keeper, mut task) = open().await.unwrap();
        let [one, two] = [0, 1].map(|_| OrderId::from_uuid(ids::new_uuid()));
        let seat = seat();

        // The asker gave up while its admission waited: nobody reads the answer.
        let (asked, _) = admit(one, &seat);
        let (given_back, done) = release(one, &seat);
        let (next, admitted) = admit(two, &seat);
        task.answer(vec![asked, given_back, next]).await;
        done.await.unwrap();
        assert_eq!(admitted.await.unwrap(), Answer::Admitted);
        assert_eq!(task.held, BTreeMap::from([(seat.clone(), row(two))]));
        assert_eq!(open().await.unwrap().1.held, task.held);

        // What is not the asker's is not given back; one order at a time starts on a server.
        let (foreign, done) = release(one, &seat);
        task.answer(vec![foreign]).await;
        done.await.unwrap();
        assert_eq!(task.held.get(&seat), Some(&row(two)));
        let (given_back, _) = release(two, &seat);
        let (first, admitted) = admit(one, &seat);
        let (second, held) = admit(two, &seat);
        task.answer(vec![given_back, first, second]).await;
        assert_eq!(admitted.await.unwrap(), Answer::Admitted);
        assert!(matches!(held.await.unwrap(), Answer::Held(_)));
        let held = BTreeMap::from([(seat, row(one))]);
        assert_eq!(open().await.unwrap().1.held, held);
    }

    #[tokio::test]
    async fn a_server_that_was_taken_offline_keeps_its_seat() {
        let store = memory_store();
        let pools = Arc::new(SimulatedPools::new(store.clone()));
        let open = || KeeperTask::open(store.clone(), Arc::new(Connected), pools.clone());
        let (_keeper, mut task) = open().await.unwrap();
        let [offline, next, last] = [0; 3].map(|_| OrderId::from_uuid(ids::new_uuid()));
        let seat = seat();
        let leave = |order, leaving| {
            let (reply, _) = oneshot::channel();
            Request::Release(order, seat.clone(), leaving, reply)
        };
        let taken_by = |order| Unavailable {
            offline: true,
            ..row(order)
        };

        let (asked, _) = admit(offline, &seat);
        // Performed again after a crash, when nobody knows any more how it was left.
        let left = [
            Leaving::Offline,
            Leaving::Offline,
            Leaving::AsFound,
            Leaving::Serving,
        ];
        let mut batch = vec![asked];
        batch.extend(left.map(|leaving| leave(offline, leaving)));
        task.answer(batch).await;
        assert_eq!(task.held.get(&seat), Some(&taken_by(offline)));
        assert_eq!(open().await.unwrap().1.held, task.held);

        // An order that is ended before it touches the server leaves it offline; what fails on it is no more so.
        let (asked, admitted) = admit(next, &seat);
        task.answer(vec![asked]).await;
        assert_eq!(admitted.await.unwrap(), Answer::Admitted);
        let seated = Unavailable {
            was_offline: true,
            ..row(next)
        };
        assert_eq!(task.held.get(&seat), Some(&seated));
        task.answer(vec![leave(next, Leaving::AsFound)]).await;
        assert_eq!(task.held.get(&seat), Some(&taken_by(next)));

        // Whoever brings it online frees it.
        let (asked, _) = admit(last, &seat);
        task.answer(vec![asked, leave(last, Leaving::Serving)])
            .await;
        assert!(task.held.is_empty());
        assert!(open().await.unwrap().1.held.is_empty());
    }
}
