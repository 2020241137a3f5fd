//! Messages to the host's log. In native tests they go to standard error.

use crate::bindings::info::windlass::plugin::logging::Level;

/// For the plugin's author.
///
/// ```
/// windlass_sdk::log::debug("grouping by zone");
/// ```
pub fn debug(message: &str) {
    write(Level::Debug, message, &[]);
}

/// For operators.
///
/// ```
/// windlass_sdk::log::info("three groups planned");
/// ```
pub fn info(message: &str) {
    write(Level::Info, message, &[]);
}

/// Something is odd.
///
/// ```
/// windlass_sdk::log::warn("a server has no zone");
/// ```
pub fn warn(message: &str) {
    write(Level::Warn, message, &[]);
}

/// Something failed.
///
/// ```
/// windlass_sdk::log::error("the parameters contradict each other");
/// ```
pub fn error(message: &str) {
    write(Level::Error, message, &[]);
}

#[cfg(target_arch = "wasm32")]
fn write(level: Level, message: &str, fields: &[(String, String)]) {
    crate::bindings::info::windlass::plugin::logging::log(level, message, fields);
}

#[cfg(not(target_arch = "wasm32"))]
fn write(level: Level, message: &str, fields: &[(String, String)]) {
    eprintln!("{level:?} {message} {fields:?}");
}
