//! Guests that misbehave on purpose, for tests of the runtime, the engine and the server.
//!
//! What a *call* does is chosen by its parameters: `{"behave": "loop"}` and so on (see `behave` and `strategy`). What
//! *describe* does cannot have parameters, so it is chosen by a marker in the component's bytes, which a test overwrites
//! (see [`descriptor::MARKER`]): one build serves every test.

pub mod behave;
pub mod descriptor;
#[cfg(feature = "diagnostic")]
pub mod diagnostic;
#[cfg(feature = "entropy")]
pub mod entropy;
#[cfg(feature = "public-command")]
pub mod public_command;
#[cfg(feature = "deployment-strategy")]
pub mod strategy;
#[cfg(feature = "tech-stack")]
pub mod tech_stack;
#[cfg(feature = "tiny")]
pub mod tiny;
