//! The plugin host: WebAssembly components in, domain types out.
//!
//! Owns the engine, the bindings of the contract (`wit/`), the registry of plugins and its directory. Nothing above this
//! crate sees WebAssembly, and nothing here knows orders, servers or the API. A guest's failure is never the host's panic: it
//! is a [`CallError`] that names the plugin, its version and digest, the function and what was exceeded.
//!
//! ```text
//! directory ─► registry ─► compile (child process) ─► load (checks, describe) ─► plugin (calls) ─► convert ─► domain types
//!                 └─ keep (bytes by digest)              └─ sandbox (engine, pool, epoch), state (one call), schema
//! file (one plugin, for authors) ─► json (calls with JSON) ─► replay (again, from a transcript)
//!                                                          └► conformance (what a plugin must keep to)
//! every call ─► call (record) ─► sinks: journal (files), figures (counters)
//! ```
//!
//! Source: design, "Plugins".

mod bindings;
mod call;
pub mod compatibility;
mod compile;
pub mod conformance;
mod convert;
pub mod diagnostic;
mod directory;
mod error;
mod figures;
mod file;
pub mod journal;
mod json;
mod keep;
mod limits;
mod load;
mod plugin;
mod registry;
pub mod replay;
mod sandbox;
mod schema;
mod state;
mod surroundings;
mod trust;

pub use call::{
    CallContext, CallRecord, CallSink, Export, Sinks, UnknownExport, Usage, for_order, on_behalf_of,
};
pub use compile::{COMPILE_SUBCOMMAND, compile_child_main};
pub use error::{
    CallError, CallFailure, FailureReport, FieldError, LookupError, OpenError, Rejection,
    RejectionCode,
};
pub use figures::{FAILURES_IN_A_ROW, Failing, Figures, LastError, PluginFigures};
pub use file::{FileError, LoadReport, load_file};
pub use json::JsonCall;
pub use limits::RuntimeLimits;
pub use plugin::{Diagnosis, Plugin};
pub use registry::{
    Decisions, PluginState, PluginStatus, Plugins, PluginsConfig, ProvideError, RemoveError, Trial,
};
pub use state::HostCall;
pub use trust::{Trust, TrustError};
