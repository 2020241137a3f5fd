//! What tests and benches of the whole share.

pub mod host;
pub mod release;
pub mod simulated;
