//! The HTTP surface: the only place that knows HTTP.

pub mod agents;
