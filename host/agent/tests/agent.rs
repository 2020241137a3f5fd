//! The agent as a real process, against a small gateway in the test: real sockets, real scripts, real crashes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is how a test fails, also in its helpers"
)]

mod actions;
mod archives;
mod attacks;
mod crashes;
mod network;
mod processes;
mod queries;
mod races;
mod soak;
mod support;
mod upgrade;
