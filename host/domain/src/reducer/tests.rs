//! Tests of the reducer: every (state, event) in a table, random plans and events, and readable examples.

mod plans;
mod properties;
mod scenarios;
mod stages;
mod table;
mod world;
