//! The plugin host: WebAssembly components in, domain types out.
//!
//! Owns the engine, the bindings of the contract (`wit/`), the registry of plugins and its directory. Nothing above this
//! crate sees WebAssembly, and nothing here knows orders, servers or the API. A guest's failure is never the host's panic: it
//! is a [`CallError`] that names the plugin, its version and digest, the function and what was exceeded.
//!
//! ```text
//! directory ─► registry ─► compile (child process) ─► load (checks, describe) ─► plugin (calls) ─► convert ─► domain types
//!                 └─ keep (bytes by digest)              └─ sandbox (engine, pool, epoch), state (one call), schema
//! ```
//!
//! Source: design, "Plugins".

mod bindings;
mod compile;
mod convert;
pub mod diagnostic;
mod directory;
mod error;
mod keep;
mod limits;
mod load;
mod plugin;
mod registry;
mod sandbox;
mod schema;
mod state;

pub use compile::{COMPILE_SUBCOMMAND, compile_child_main};
pub use error::{
    CallError, CallFailure, FieldError, LookupError, OpenError, Rejection, RejectionCode,
};
pub use limits::RuntimeLimits;
pub use plugin::{CallRecord, CallSink, Diagnosis, Plugin};
pub use registry::{Decisions, PluginState, PluginStatus, Plugins, PluginsConfig};
pub use state::HostCall;
