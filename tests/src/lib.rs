//! What tests and benches of the whole share.

pub mod balanced;
pub mod guests;
pub mod host;
pub mod hostile;
pub mod load;
pub mod operated;
pub mod problem;
pub mod release;
pub mod scene;
pub mod simulated;
pub mod under_load;
