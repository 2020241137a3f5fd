//! What a guest finds around it where its language brings WASI: nothing, and the same in every call.
//!
//! Languages ask for the time and for random numbers when they start, and some plugins ask on their own. Neither is real: an answer
//! depends on the request alone, on every machine and at every time, so that a recorded call can be made again. The conformance kit
//! makes calls in other surroundings, too: a plugin whose answers differ there depends on what it must not depend on.

use std::{cell::Cell, time::Duration};

use wasmtime_wasi::{Deterministic, HostMonotonicClock, HostWallClock, WasiCtxBuilder};

/// Time between two looks at a clock: whoever waits for a time to come sees it come.
const LOOK: Duration = Duration::from_millis(1);
/// Random numbers begin again after so many bytes.
const NUMBERS_BYTES: usize = 4096;
/// Random bytes that are handed over at once, at most.
const MAX_RANDOM_BYTES: u64 = 1 << 20;
/// The other time: 2040-02-29, 12:34:56 UTC.
const OTHER_TIME: Duration = Duration::from_secs(2_214_131_696);

/// The time and the random numbers of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Surroundings {
    /// Those of every call of a server: it is 1970-01-01.
    Ordinary,
    /// Others, for comparison.
    Other,
}

impl Surroundings {
    pub(crate) fn furnish(self, builder: &mut WasiCtxBuilder) {
        let (time, seed) = match self {
            Self::Ordinary => (Duration::ZERO, 1),
            Self::Other => (OTHER_TIME, 2),
        };
        builder
            .wall_clock(Clock(Cell::new(time)))
            .monotonic_clock(Clock(Cell::new(time)))
            .secure_random(numbers(seed))
            .insecure_random(numbers(seed + 2))
            .insecure_random_seed(seed.into())
            .max_random_size(MAX_RANDOM_BYTES);
    }
}

/// Shows each time a little later than before.
struct Clock(Cell<Duration>);

impl Clock {
    fn look(&self) -> Duration {
        let now = self.0.get();
        self.0.set(now + LOOK);
        now
    }
}

impl HostWallClock for Clock {
    fn resolution(&self) -> Duration {
        LOOK
    }

    fn now(&self) -> Duration {
        self.look()
    }
}

impl HostMonotonicClock for Clock {
    fn resolution(&self) -> u64 {
        nanoseconds(LOOK)
    }

    fn now(&self) -> u64 {
        nanoseconds(self.look())
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Numbers that look random and are always the same (SplitMix64).
fn numbers(seed: u64) -> Deterministic {
    let mut state = seed;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    });
    let bytes = words.flat_map(u64::to_le_bytes).take(NUMBERS_BYTES);
    Deterministic::new(bytes.collect())
}
