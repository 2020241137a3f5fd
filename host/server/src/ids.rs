//! The one place that makes up ids and other random values.

use std::sync::Mutex;

use uuid::{ContextV7, Timestamp, Uuid};

use crate::clock;

/// What was given out last: ids of one process rise within a millisecond too, and when the clock is set back.
static LAST: Mutex<ContextV7> = Mutex::new(ContextV7::new());

/// Random bytes from the kernel.
///
/// # Panics
/// When the kernel has no random numbers, which Linux rules out once it has booted.
#[must_use]
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

/// A UUIDv7 of now, larger than all before it, to make a typed id from: `OrderId::from_uuid(new_uuid())`. Lists that are
/// sorted by id are sorted by age, and who follows a cursor misses nothing that is made meanwhile.
#[must_use]
pub fn new_uuid() -> Uuid {
    let now_ms = u64::try_from(clock::now().unix_ms()).unwrap_or(0);
    let subsec_ms = u32::try_from(now_ms % 1000).unwrap_or(0);
    Uuid::new_v7(Timestamp::from_unix(
        &LAST,
        now_ms / 1000,
        subsec_ms * 1_000_000,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_rise_also_within_a_millisecond() {
        let ids: Vec<Uuid> = (0..10_000).map(|_| new_uuid()).collect();
        assert!(ids.is_sorted_by(|one, two| one < two));
        let (seconds, _) = ids[0].get_timestamp().unwrap().to_unix();
        assert!(seconds.abs_diff(u64::try_from(clock::now().unix_ms()).unwrap() / 1000) <= 1);
    }
}
