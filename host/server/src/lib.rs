//! The `windlass` platform server.
//!
//! Layers, top down: `api` (the only place that knows HTTP) → `service` (one module per resource) → the store, the plugin
//! runtime and the `engine`. The `gateway` holds agents' sessions; `notify` tells people. Handlers never touch the store.

pub mod api;
pub mod clock;
pub mod config;
pub mod demo;
pub mod dev;
pub mod engine;
pub mod gateway;
pub mod ids;
mod keys;
pub mod notify;
pub mod platform;
pub mod plugin_cli;
pub mod service;
pub mod telemetry;
