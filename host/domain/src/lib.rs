//! Windlass's domain: types, rules and state machines.
//!
//! Pure: no input or output, no async, no clock, no random numbers. Times and ids are inputs. One type per concept: what is
//! here is what is stored and what the API returns.

pub mod digest;
pub mod dispatch;
pub mod expand;
pub mod id;
pub mod inbox;
pub mod limits;
pub mod manifest;
pub mod order;
pub mod plan;
pub mod plugin;
pub mod progress;
pub mod reducer;
pub mod task;
pub mod time;
pub mod value;

pub use digest::Digest;
pub use time::Timestamp;
