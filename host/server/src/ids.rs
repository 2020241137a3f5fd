//! The one place that makes up ids and other random values.

use uuid::Uuid;

use crate::clock;

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

/// A UUIDv7 of now, to make a typed id from: `OrderId::from_uuid(new_uuid())`.
#[must_use]
pub fn new_uuid() -> Uuid {
    let now_ms = u64::try_from(clock::now().unix_ms()).unwrap_or(0);
    uuid::Builder::from_unix_timestamp_millis(now_ms, &random_bytes()).into_uuid()
}
