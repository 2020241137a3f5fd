//! What HAProxy counts, over all of its processes: each counts for itself, and a reload makes another one. What ended ones have
//! counted is kept in a file, so that an agent that is started anew counts on; it is written when processes come and go.
//!
//! Of answers HAProxy shows no sum of times, but a mean that slides over the last 512: of a server that has just got another
//! release it is mostly the former one's. From two looks at the mean, and the requests between them, follows what these took.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use windlass_domain::{
    id::{PoolId, ServerId},
    pool::Responses,
};

/// A server behind a pool.
pub(super) type Member = (PoolId, ServerId);

/// Answers over which HAProxy's mean slides (`TIME_STATS_SAMPLES`).
const SLIDES_OVER: u64 = 512;

/// What is counted of a server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counters {
    pub(super) requests: u64,
    pub(super) errors: u64,
    pub(super) retries: u64,
    pub(super) redispatches: u64,
}

/// What one process shows of a server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) counters: Counters,
    /// The sliding mean.
    pub(super) mean_ms: u32,
}

/// Counters, and the answers that were timed since the agent looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) counters: Counters,
    pub(super) responses: Responses,
}

impl Counted {
    fn add(&mut self, more: Self) {
        let Counters {
            requests,
            errors,
            retries,
            redispatches,
        } = more.counters;
        self.counters.requests += requests;
        self.counters.errors += errors;
        self.counters.retries += retries;
        self.counters.redispatches += redispatches;
        self.responses.count += more.responses.count;
        self.responses.total_us += more.responses.total_us;
    }
}

/// Everything that was counted.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Of processes that have ended.
    ended: HashMap<Member, Counted>,
    /// Of each process that was seen alive.
    alive: HashMap<u32, HashMap<Member, (Shown, Counted)>>,
    looked: bool,
}

/// What a server behind a pool has counted.
type KeptMember = (PoolId, ServerId, Counters);

/// What the file holds: of each process that lived when it was written, and of all that had ended then.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    ended: Vec<KeptMember>,
    alive: Vec<(u32, Vec<KeptMember>)>,
}

impl Tally {
    /// As an agent before has left it.
    pub(super) fn of_kept(kept: Kept) -> Self {
        let counted = |counters| Counted {
            counters,
            responses: Responses::default(),
        };
        let of = |members: Vec<KeptMember>| {
            let members = members.into_iter();
            members.map(move |(pool, server, counters)| ((pool, server), counted(counters)))
        };
        let shown = |counted: Counted| Shown {
            counters: counted.counters,
            mean_ms: 0,
        };
        let alive = kept.alive.into_iter().map(|(pid, members)| {
            let members = of(members).map(|(member, counted)| (member, (shown(counted), counted)));
            (pid, members.collect())
        });
        Self {
            alive: alive.collect(),
            ended: of(kept.ended).collect(),
            looked: false,
        }
    }

    /// What is to be kept.
    pub(super) fn kept(&self) -> Kept {
        let of = |(member, counted): (&Member, &Counted)| (member.0, member.1, counted.counters);
        let alive = self.alive.iter().map(|(pid, members)| {
            let members = members
                .iter()
                .map(|(member, (_, counted))| of((member, counted)));
            (*pid, members.collect())
        });
        Kept {
            ended: self.ended.iter().map(of).collect(),
            alive: alive.collect(),
        }
    }

    /// Takes in what the processes that live show now; says whether any came or went.
    pub(super) fn look(&mut self, shown: HashMap<u32, HashMap<Member, Shown>>) -> bool {
        let new = shown.keys().any(|pid| !self.alive.contains_key(pid));
        let known = self.alive.len();
        self.alive.retain(|pid, members| {
            // Another process may have got its number since the agent looked last.
            let lives = shown.get(pid).is_some_and(|shown| {
                members.iter().all(|(member, (_, counted))| {
                    let now = shown.get(member);
                    now.is_none_or(|now| now.counters.requests >= counted.counters.requests)
                })
            });
            if !lives {
                for (member, (_, counted)) in members.drain() {
                    self.ended.entry(member).or_default().add(counted);
                }
            }
            lives
        });
        let changed = new || self.alive.len() < known;
        for (pid, members) in shown {
            let before = self.alive.entry(pid).or_default();
            for (member, now) in members {
                let (earlier, counted) = match before.get(&member) {
                    // What was answered before the agent was started is not known one by one.
                    _ if !self.looked => (now, Responses::default()),
                    Some((earlier, counted)) => (*earlier, counted.responses),
                    None => (Shown::default(), Responses::default()),
                };
                let counted = Counted {
                    counters: now.counters,
                    responses: Responses {
                        count: counted.count
                            + now
                                .counters
                                .requests
                                .saturating_sub(earlier.counters.requests),
                        total_us: counted.total_us + took_us(earlier, now),
                    },
                };
                before.insert(member, (now, counted));
            }
        }
        self.looked = true;
        changed
    }

    /// What a server did, as far as it is known.
    pub(super) fn of(&self, member: Member) -> Counted {
        let alive = self
            .alive
            .values()
            .filter_map(|members| members.get(&member));
        let mut all = self.ended.get(&member).copied().unwrap_or_default();
        for (_, counted) in alive {
            all.add(*counted);
        }
        all
    }
}

/// What the answers between two looks took together, in microseconds. A mean is shown in whole milliseconds: the sum is off
/// by up to half a second, one way or the other, and later looks make up for that.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "counts are far below 2^52, and times far below 2^63"
)]
fn took_us(earlier: Shown, now: Shown) -> i64 {
    let (before, after) = (earlier.counters.requests, now.counters.requests);
    if after <= before {
        return 0;
    }
    // The part of today's mean that the mean of then still is: up to 512 answers it is a mean of all, then it slides.
    let window = SLIDES_OVER as f64;
    let kept = if after <= SLIDES_OVER {
        before as f64 / after as f64
    } else {
        let slid = (after - before.max(SLIDES_OVER)) as f64;
        before.min(SLIDES_OVER) as f64 / window * (1.0 - 1.0 / window).powf(slid)
    };
    let mean_ms = (f64::from(now.mean_ms) - f64::from(earlier.mean_ms) * kept) / (1.0 - kept);
    ((after - before) as f64 * mean_ms * 1000.0).round() as i64
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn member() -> Member {
        (
            PoolId::from_uuid(Uuid::from_u128(1)),
            ServerId::from_uuid(Uuid::from_u128(2)),
        )
    }

    fn shown(pid: u32, requests: u64, mean_ms: u32) -> HashMap<u32, HashMap<Member, Shown>> {
        let counters = Counters {
            requests,
            ..Counters::default()
        };
        HashMap::from([(
            pid,
            HashMap::from([(member(), Shown { counters, mean_ms })]),
        )])
    }

    /// HAProxy's mean, as it slides.
    struct Mean {
        sum: f64,
        count: u64,
    }

    impl Mean {
        fn answer(&mut self, ms: f64) {
            self.count += 1;
            let window = self.count.min(SLIDES_OVER) as f64;
            if self.count <= SLIDES_OVER {
                self.sum += ms;
            } else {
                self.sum += ms - self.sum / window;
            }
        }

        fn shown(&self) -> HashMap<u32, HashMap<Member, Shown>> {
            let mean = self.sum / self.count.min(SLIDES_OVER) as f64;
            shown(1, self.count, mean.ceil() as u32)
        }
    }

    #[test]
    fn what_answers_took_is_known_whatever_came_before() {
        for (before, slow, looks) in [
            (10, 100, 1),
            (400, 400, 4),
            (5000, 100, 10),
            (5000, 3000, 2),
        ] {
            let (mut tally, mut mean) = (Tally::default(), Mean { sum: 0.0, count: 0 });
            tally.look(shown(1, 0, 0));
            for _ in 0..before {
                mean.answer(2.0);
            }
            tally.look(mean.shown());
            let began = tally.of(member()).responses;
            for _ in 0..looks {
                for _ in 0..slow / looks {
                    mean.answer(50.0);
                }
                tally.look(mean.shown());
            }
            let counted = tally.of(member()).responses.since(began);
            assert_eq!(counted.count, slow);
            let mean_ms = counted.total_us as f64 / 1000.0 / counted.count as f64;
            // A millisecond of the shown mean is 512 of the sum.
            let off = 1.0 + 512.0 / slow as f64;
            assert!(
                (mean_ms - 50.0).abs() <= off,
                "{before} before, {slow} in {looks} looks: {mean_ms}"
            );
        }
    }

    #[test]
    fn processes_that_come_and_go_count_together() {
        let mut tally = Tally::default();
        // The agent was started beside a process that has counted.
        tally.look(shown(1, 1000, 7));
        assert_eq!(tally.of(member()).counters.requests, 1000);
        assert_eq!(tally.of(member()).responses, Responses::default());
        let mut both = shown(1, 1010, 7);
        both.extend(shown(2, 4, 20));
        tally.look(both);
        let counted = tally.of(member());
        assert_eq!(counted.counters.requests, 1014);
        assert_eq!(counted.responses.count, 14);
        assert_eq!(counted.responses.total_us, 150_000);
        tally.look(shown(2, 6, 20));
        let counted = tally.of(member());
        assert_eq!(counted.counters.requests, 1016);
        assert_eq!(counted.responses.total_us, 190_000);
    }

    #[test]
    fn an_agent_that_is_started_anew_counts_on() {
        let mut tally = Tally::default();
        assert!(tally.look(shown(1, 100, 7)));
        let mut both = shown(1, 130, 7);
        both.extend(shown(2, 4, 20));
        assert!(tally.look(both), "a process came");
        assert!(!tally.look(shown(2, 6, 20)) || tally.alive.len() == 1);
        let requests = |tally: &Tally| tally.of(member()).counters.requests;
        assert_eq!(requests(&tally), 136);
        let json = serde_json::to_string(&tally.kept()).unwrap();
        let kept = || serde_json::from_str(&json).unwrap();
        // It goes on with the process that lived, which has counted meanwhile.
        let mut anew = Tally::of_kept(kept());
        assert!(!anew.look(shown(2, 9, 20)));
        assert_eq!(requests(&anew), 139);
        assert_eq!(anew.of(member()).responses, Responses::default());
        anew.look(shown(2, 10, 20));
        assert_eq!(anew.of(member()).responses.count, 1);
        // Another one has the number of the one that lived.
        let mut anew = Tally::of_kept(kept());
        assert!(anew.look(shown(2, 3, 20)));
        assert_eq!(requests(&anew), 139);
    }
}
