//! Write a Windlass plugin in Rust: one trait, one macro line.
//!
//! | kind | trait | macro |
//! | --- | --- | --- |
//! | tech stack | [`TechStack`] | [`tech_stack!`] |
//! | deployment strategy | [`DeploymentStrategy`] | [`deployment_strategy!`] |
//! | diagnostic | [`Diagnostic`] | [`diagnostic!`] |
//! | public command | [`PublicCommand`] | [`public_command!`] |
//!
//! ```
//! use windlass_sdk::{Descriptor, TechStack, PluginError, lifecycle::{LifecyclePlan, LifecycleRequest, Phase, Step}};
//!
//! struct Hello;
//!
//! impl TechStack for Hello {
//!     fn describe() -> Descriptor {
//!         Descriptor::new("hello", "1.0.0").title("Says hello")
//!     }
//!
//!     fn lifecycle(request: LifecycleRequest) -> Result<LifecyclePlan, PluginError> {
//!         let mut plan = LifecyclePlan::new();
//!         if request.wants(Phase::Start) {
//!             plan = plan.step(Step::script(Phase::Start, "say hello", "echo hello"));
//!         }
//!         Ok(plan)
//!     }
//! }
//!
//! windlass_sdk::tech_stack!(Hello);
//! ```
//!
//! The crate is a library with `crate-type = ["cdylib", "rlib"]`. Everything compiles natively, so that unit tests call the
//! trait's functions as they are; the edges of the component exist for `wasm32` only. Build it for
//! `wasm32-unknown-unknown` with `wasm-component-ld` as the linker (see `plugins/build.sh`): the component then imports
//! nothing but its world's interfaces.
//!
//! Records that come from the contract are plain structs with public fields and an `attributes` list for growth. Build
//! them with the builders here rather than with literals.

#[doc(hidden)]
pub mod bindings;
mod descriptor;
pub mod diagnosis;
mod export;
pub mod lifecycle;
pub mod log;
mod parameters;
pub mod service;
pub mod strategy;

pub mod command;

pub use bindings::info::windlass::plugin::types::{
    Descriptor, DiagnosticItem, Environment, Extension, PackageRef, PluginError, Preset, Script,
    ServerFacts, Severity, Value, Wishes,
};
pub use export::{DeploymentStrategy, Diagnostic, PublicCommand, TechStack};
pub use parameters::parse_parameters;
