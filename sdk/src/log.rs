//! Messages to the host's log. In native tests they go to standard error.

use crate::bindings::info::windlass::plugin::logging::Level;

/// For the plugin's author.
pub fn debug(message: &str) {
    write(Level::Debug, message, &[]);
}

/// For operators.
pub fn info(message: &str) {
    write(Level::Info, message, &[]);
}

/// Something is odd.
pub fn warn(message: &str) {
    write(Level::Warn, message, &[]);
}

/// Something failed.
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
