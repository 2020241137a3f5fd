//! x
mod bindings;
mod convert;
pub mod diagnostic;
mod error;
mod limits;
mod plugin;
mod sandbox;
mod schema;
mod state;
