//! Windlass's domain: types, rules and state machines.
//!
//! Pure: no input or output, no async, no clock, no random numbers. Times and ids are inputs. One type per concept: what is
//! here is what is stored and what the API returns.

pub mod activation;
pub mod address;
pub mod application;
pub mod certificate;
pub mod diagnosis;
pub mod digest;
pub mod dispatch;
pub mod expand;
pub mod flow;
pub mod id;
pub mod inbox;
pub mod instance;
pub mod invocation;
pub mod limits;
pub mod load_balancer;
pub mod manifest;
pub mod name;
pub mod notification;
pub mod operation;
pub mod order;
pub mod package;
pub mod plan;
pub mod plugin;
pub mod pool;
pub mod prepared;
pub mod progress;
pub mod reducer;
pub mod revise;
pub mod server;
pub mod share;
pub mod stages;
pub mod task;
pub mod template;
pub mod text;
pub mod time;
pub mod token;
pub mod value;
pub mod workspace;

pub use digest::Digest;
pub use time::Timestamp;
