//! Parameters as the plugin's own type.

use serde::de::DeserializeOwned;

use crate::PluginError;

/// Reads the parameters of a request. The host has checked them against the plugin's schema already.
///
/// # Errors
/// `invalid-parameter` when they do not fit the type: the schema and the type disagree.
pub fn parse_parameters<T: DeserializeOwned>(json: &str) -> Result<T, PluginError> {
    serde_json::from_str(json)
        .map_err(|error| PluginError::new("invalid-parameter", format!("parameters: {error}")))
}
