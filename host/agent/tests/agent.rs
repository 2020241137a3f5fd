//! The agent as a real process, against a small gateway in the test: real sockets, real scripts, real crashes.

mod actions;
mod attacks;
mod crashes;
mod network;
mod processes;
mod support;
