//! The only place of the agent that reads the wall clock, and its source of random bytes.

use std::time::UNIX_EPOCH;

use windlass_domain::Timestamp;

/// The current time.
#[must_use]
pub fn now() -> Timestamp {
    #[allow(clippy::disallowed_methods, reason = "this is the clock module")]
    let now = std::time::SystemTime::now();
    let ms = now.duration_since(UNIX_EPOCH).map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    });
    Timestamp::from_unix_ms(ms)
}

/// Random bytes from the kernel.
///
/// # Panics
/// When the kernel has none to give: then no key or nonce of this process would be safe.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}
