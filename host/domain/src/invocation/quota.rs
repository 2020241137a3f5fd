//! How many invocations a workspace may still make today. Source: spec "Commands", "5,000 invocations a day".
//!
//! A day is one of UTC. An invocation counts once, whatever the number of its servers, and is counted by the commit that makes it:
//! one that was refused does not count, and one that was made counts whatever becomes of it or of the platform.

use serde::{Deserialize, Serialize};

use crate::time::Timestamp;

/// Invocations that a workspace may make in a day, unless the platform's operator says otherwise.
pub const INVOCATIONS_PER_DAY: u32 = 5000;

const DAY_MS: i64 = 86_400_000;

/// The invocations that a workspace has made in a day; the row that is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DailyCount {
    /// Which day: days since 1970-01-01.
    #[serde(default)]
    pub day: i64,
    /// How many.
    #[serde(default)]
    pub made: u32,
}

/// What is left for today.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct InvocationQuota {
    /// Invocations that the workspace may make in a day.
    pub limit: u32,
    /// How many it has made today.
    pub used: u32,
    /// When the count begins again: the next midnight, UTC.
    pub resets_at: Timestamp,
}

impl DailyCount {
    /// The count at a time. A clock that was set back does not begin a day again.
    #[must_use]
    pub fn at(self, now: Timestamp) -> Self {
        let today = now.unix_ms().div_euclid(DAY_MS);
        if self.day < today {
            Self {
                day: today,
                made: 0,
            }
        } else {
            self
        }
    }

    /// With one more; `None`: there are `limit` already.
    #[must_use]
    pub const fn one_more(self, limit: u32) -> Option<Self> {
        if self.made >= limit {
            return None;
        }
        Some(Self {
            day: self.day,
            made: self.made + 1,
        })
    }

    /// The count for people.
    #[must_use]
    pub fn against(self, limit: u32) -> InvocationQuota {
        InvocationQuota {
            limit,
            used: self.made,
            resets_at: Timestamp::from_unix_ms(self.day.saturating_add(1).saturating_mul(DAY_MS)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_ends_at_midnight_and_does_not_begin_again() {
        let noon = Timestamp::from_unix_ms(10 * DAY_MS + DAY_MS / 2);
        let mut count = DailyCount::default().at(noon);
        assert_eq!(count.against(2).used, 0);
        assert_eq!(
            count.against(2).resets_at,
            Timestamp::from_unix_ms(11 * DAY_MS)
        );
        for _ in 0..2 {
            count = count.at(noon).one_more(2).expect("room");
        }
        assert_eq!(count.one_more(2), None);
        assert_eq!(count.one_more(3).map(|count| count.made), Some(3));
        let last = Timestamp::from_unix_ms(11 * DAY_MS - 1);
        assert_eq!(count.at(last).made, 2);
        let next = count.at(Timestamp::from_unix_ms(11 * DAY_MS));
        assert_eq!((next.day, next.made), (11, 0));
        // The clock is set back by two days: still the same count.
        let back = Timestamp::from_unix_ms(9 * DAY_MS);
        assert_eq!(count.at(back), count);
        assert_eq!(
            serde_json::from_str::<DailyCount>("{}").expect("an empty row"),
            DailyCount::default()
        );
    }
}
