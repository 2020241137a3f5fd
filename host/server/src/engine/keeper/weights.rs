//! Weights that a shift or a person is about to set: whether the safety envelope allows them.
//!
//! Decided in turn with admissions. One that saw the other's members still serving would let both together take more from a
//! pool than its minimum allows. What was allowed is a [`Cut`]: until it is dropped, the weights being set by then, members
//! that lose their traffic by it count as without. Cuts live in memory only: after a crash weights are as they were set, and
//! what is still to be done is decided again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::Notify;
use windlass_domain::id::{InstanceId, OrderId, PoolId, ServerId};

use super::{KeeperTask, Seat};
use crate::engine::traffic::TrafficError;

/// Weights that are to be set, in pools of one or several instances. All of it is allowed, or nothing.
#[derive(Debug, Clone)]
pub(crate) struct Reweighing {
    /// The order that sets them, and the one that it rolls back: their seats are known to be theirs.
    pub(crate) orders: Vec<OrderId>,
    /// Members with traffic that each pool keeps at least.
    pub(crate) minimum: u32,
    pub(crate) short: Short,
    pub(crate) pools: Vec<PoolWeights>,
}

/// What becomes of a pool that has too few members with traffic already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Short {
    /// Weights that leave it so are not set.
    Refuse,
    /// They are, as long as it has not fewer than now.
    NotShorter,
}

/// The weights that are to be set in one pool of one instance.
#[derive(Debug, Clone)]
pub(crate) struct PoolWeights {
    pub(crate) instance: InstanceId,
    pub(crate) pool: PoolId,
    pub(crate) weights: Vec<(ServerId, u32)>,
    /// Every server of the instance.
    pub(crate) members: Vec<ServerId>,
    /// Those whose turn in the order is over: a seat of theirs is given back in a moment.
    pub(crate) released: BTreeSet<ServerId>,
    /// Those that the order works on, or left broken.
    pub(crate) out: BTreeSet<ServerId>,
}

/// The keeper's answer to a [`Reweighing`].
#[derive(Debug)]
pub(crate) enum Weighed {
    /// Set them, then drop this.
    Allowed(Cut),
    /// This pool would keep too few healthy members with traffic. Those that are `away` are only not connected.
    TooFew {
        pool: PoolId,
        serving: u32,
        away: Vec<ServerId>,
    },
    /// A pool cannot be read.
    Unread(TrafficError),
}

/// Weights that may be set now: members that lose their traffic by it count as without, until this is dropped.
#[derive(Debug)]
pub(crate) struct Cut {
    number: u64,
    /// Servers that another order works on, or left broken: their weights are that order's.
    pub(crate) taken: BTreeSet<(PoolId, ServerId)>,
    cuts: Cuts,
    changed: Arc<Notify>,
}

/// Members that lose their traffic, by the number of their cut.
pub(super) type Cuts = Arc<Mutex<HashMap<u64, BTreeSet<(PoolId, ServerId)>>>>;

impl Drop for Cut {
    fn drop(&mut self) {
        let mut cuts = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        cuts.remove(&self.number);
        drop(cuts);
        self.changed.notify_waiters();
    }
}

impl KeeperTask {
    /// Members that are losing their traffic.
    pub(super) fn cut(&self) -> BTreeSet<(PoolId, ServerId)> {
        let cuts = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        cuts.values().flatten().copied().collect()
    }

    /// The seats of an instance.
    fn seats(&self, instance: InstanceId) -> BTreeMap<ServerId, OrderId> {
        let first = Seat {
            instance,
            cell: String::new(),
            server: ServerId::from_uuid(uuid::Uuid::nil()),
        };
        let seats = self.held.range(first..);
        seats
            .take_while(|(seat, _)| seat.instance == instance)
            .map(|(seat, row)| (seat.server, row.order))
            .collect()
    }

    /// Whether weights may be set now.
    pub(super) async fn weigh(&mut self, wanted: &Reweighing) -> Weighed {
        let cut = self.cut();
        let mut taken = BTreeSet::new();
        let mut lost = BTreeSet::new();
        for change in &wanted.pools {
            let PoolWeights {
                pool,
                weights,
                released,
                out,
                ..
            } = change;
            let seats = self.seats(change.instance);
            let mut new: BTreeMap<ServerId, u32> = weights.iter().copied().collect();
            new.retain(|server, _| {
                let other = seats
                    .get(server)
                    .is_some_and(|holder| !wanted.orders.contains(holder));
                if other {
                    taken.insert((*pool, *server));
                }
                !other
            });
            let (mut now, mut then) = (0u32, 0u32);
            let mut away = Vec::new();
            for server in &change.members {
                let seated = seats.get(server).is_some_and(|holder| {
                    !(released.contains(server) && wanted.orders.contains(holder))
                });
                if seated || out.contains(server) {
                    continue;
                }
                let serves = match self.pools.serves(*pool, *server).await {
                    Ok(serves) => serves && !cut.contains(&(*pool, *server)),
                    Err(error) => return Weighed::Unread(error),
                };
                let will_serve = new.get(server).map_or(serves, |weight| *weight > 0);
                if self.agents.is_online(*server) {
                    now += u32::from(serves);
                    then += u32::from(will_serve);
                } else if will_serve {
                    away.push(*server);
                }
            }
            let minimum = match wanted.short {
                Short::Refuse => wanted.minimum,
                Short::NotShorter => wanted.minimum.min(now),
            };
            if change.members.len() > 1 && then < minimum {
                return Weighed::TooFew {
                    pool: *pool,
                    serving: then,
                    away,
                };
            }
            let without = new.iter().filter(|(_, weight)| **weight == 0);
            lost.extend(without.map(|(server, _)| (*pool, *server)));
        }
        self.last_cut += 1;
        let number = self.last_cut;
        let mut cuts = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        cuts.insert(number, lost);
        drop(cuts);
        Weighed::Allowed(Cut {
            number,
            taken,
            cuts: self.cuts.clone(),
            changed: self.changed.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use windlass_domain::inbox::JournalEpoch;

    use super::*;
    use crate::{
        engine::{
            Agents,
            keeper::{
                Admission, Answer, Keeper,
                tests::{Connected, admission},
            },
            traffic::{SimulatedPools, TrafficPools as _},
        },
        ids,
        service::records::tests::memory_store,
    };

    /// An instance with two servers behind one pool, and a keeper that runs.
    struct Two {
        keeper: Keeper,
        pools: Arc<SimulatedPools>,
        pool: PoolId,
        order: OrderId,
        seats: [Seat; 2],
    }

    /// All but one are connected.
    struct AllBut(ServerId);

    impl Agents for AllBut {
        fn current_epoch(&self, _: ServerId) -> Option<JournalEpoch> {
            None
        }

        fn is_online(&self, server: ServerId) -> bool {
            server != self.0
        }

        fn silent_for(&self, server: ServerId) -> Option<std::time::Duration> {
            (server == self.0).then_some(std::time::Duration::ZERO)
        }

        fn nudge(&self, _: ServerId) {}
    }

    impl Two {
        async fn new() -> Self {
            Self::with(|_| Arc::new(Connected)).await
        }

        async fn with(agents: impl FnOnce(&[Seat; 2]) -> Arc<dyn Agents>) -> Self {
            let instance = InstanceId::from_uuid(ids::new_uuid());
            let seats = ["one", "two"].map(|cell| Seat {
                instance,
                cell: cell.to_owned(),
                server: ServerId::from_uuid(ids::new_uuid()),
            });
            let store = memory_store();
            let pools = Arc::new(SimulatedPools::new(store.clone()));
            let open = KeeperTask::open(store, agents(&seats), pools.clone());
            let (keeper, task) = open.await.unwrap();
            tokio::spawn(task.run());
            Self {
                keeper,
                pools,
                pool: PoolId::from_uuid(ids::new_uuid()),
                order: OrderId::from_uuid(ids::new_uuid()),
                seats,
            }
        }

        /// The turn of a server.
        fn turn(&self, order: OrderId, index: usize) -> Admission {
            Admission {
                pools: vec![self.pool],
                members: self
                    .seats
                    .iter()
                    .map(|seat| (seat.server, seat.cell.clone()))
                    .collect(),
                ..admission(order, &self.seats[index])
            }
        }

        async fn admit(&self, order: OrderId, index: usize) -> Answer {
            self.keeper.admit(self.turn(order, index)).await.unwrap()
        }

        async fn weigh(&self, weights: &[(usize, u32)], short: Short) -> Weighed {
            let servers = self.seats.each_ref().map(|seat| seat.server);
            let by_server = |(index, weight): &(usize, u32)| (servers[*index], *weight);
            let wanted = Reweighing {
                orders: vec![self.order],
                minimum: 1,
                short,
                pools: vec![PoolWeights {
                    instance: self.seats[0].instance,
                    pool: self.pool,
                    weights: weights.iter().map(by_server).collect(),
                    members: servers.to_vec(),
                    released: BTreeSet::new(),
                    out: BTreeSet::new(),
                }],
            };
            self.keeper.weigh(wanted).await.unwrap()
        }

        async fn set(&self, index: usize, weight: u32) {
            let server = self.seats[index].server;
            self.pools
                .set_weight(self.pool, server, weight)
                .await
                .unwrap();
        }
    }

    fn allowed(weighed: Weighed) -> Cut {
        match weighed {
            Weighed::Allowed(cut) => cut,
            other => panic!("{other:?}"),
        }
    }

    fn is_too_few(weighed: &Weighed) -> bool {
        matches!(weighed, Weighed::TooFew { serving: 0, .. })
    }

    #[tokio::test]
    async fn a_server_is_not_drained_while_the_other_one_loses_its_weight() {
        let two = Two::new().await;
        let cut = allowed(two.weigh(&[(0, 0)], Short::Refuse).await);
        // The weight is still 100: what counts is what was allowed.
        assert!(matches!(two.admit(two.order, 1).await, Answer::Held(_)));
        // It could not be set: everything is as it was.
        drop(cut);
        assert_eq!(two.admit(two.order, 1).await, Answer::Admitted);

        let two = Two::new().await;
        let cut = allowed(two.weigh(&[(0, 0)], Short::Refuse).await);
        two.set(0, 0).await;
        drop(cut);
        assert!(matches!(two.admit(two.order, 1).await, Answer::Held(_)));
    }

    #[tokio::test]
    async fn a_server_does_not_lose_its_weight_while_the_other_one_is_drained() {
        let two = Two::new().await;
        assert_eq!(two.admit(two.order, 1).await, Answer::Admitted);
        assert!(is_too_few(&two.weigh(&[(0, 0)], Short::Refuse).await));
        // What the drained one is given does not count.
        assert!(is_too_few(
            &two.weigh(&[(0, 0), (1, 100)], Short::Refuse).await
        ));
        allowed(two.weigh(&[(0, 1)], Short::Refuse).await);
    }

    #[tokio::test]
    async fn two_changes_do_not_count_on_each_other() {
        let two = Two::new().await;
        let first = allowed(two.weigh(&[(0, 0)], Short::Refuse).await);
        assert!(is_too_few(&two.weigh(&[(1, 0)], Short::Refuse).await));
        drop(first);
        // A pool that is short already: what does not make it worse may be set, where that is asked for.
        two.set(0, 0).await;
        two.set(1, 0).await;
        assert!(is_too_few(&two.weigh(&[(1, 0)], Short::Refuse).await));
        allowed(two.weigh(&[(1, 0)], Short::NotShorter).await);
    }

    #[tokio::test]
    async fn who_is_only_not_connected_is_named() {
        let two = Two::with(|seats| Arc::new(AllBut(seats[1].server))).await;
        let server = two.seats[1].server;
        match two.weigh(&[(0, 0)], Short::Refuse).await {
            Weighed::TooFew {
                serving: 0, away, ..
            } => assert_eq!(away, [server]),
            other => panic!("{other:?}"),
        }
        two.set(1, 0).await;
        match two.weigh(&[(0, 0)], Short::Refuse).await {
            Weighed::TooFew { away, .. } => assert!(away.is_empty(), "{away:?}"),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn what_another_order_works_on_keeps_its_weight() {
        let two = Two::new().await;
        let other = OrderId::from_uuid(ids::new_uuid());
        assert_eq!(two.admit(other, 0).await, Answer::Admitted);
        let cut = allowed(two.weigh(&[(0, 100), (1, 50)], Short::Refuse).await);
        let server = two.seats[0].server;
        assert_eq!(cut.taken, BTreeSet::from([(two.pool, server)]));
        drop(cut);
        // Its new weight does not count either.
        let weighed = two.weigh(&[(0, 100), (1, 0)], Short::Refuse).await;
        assert!(is_too_few(&weighed));
    }
}
