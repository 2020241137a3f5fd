//! Parameters as the plugin's own type.

use serde::de::DeserializeOwned;

use crate::PluginError;

/// Reads the parameters of a request. The host has checked them against the plugin's schema already.
///
/// # Errors
/// `invalid-parameter` when they do not fit the type: the schema and the type disagree.
///
/// # Examples
/// ```
/// #[derive(serde::Deserialize)]
/// #[serde(deny_unknown_fields)]
/// struct Parameters {
///     port: u16,
/// }
///
/// let parameters: Parameters = windlass_sdk::parse_parameters(r#"{"port":8080}"#).unwrap();
/// assert_eq!(parameters.port, 8080);
/// let error = windlass_sdk::parse_parameters::<Parameters>(r#"{"prt":8080}"#).err().unwrap();
/// assert_eq!(error.code, "invalid-parameter");
/// ```
pub fn parse_parameters<T: DeserializeOwned>(json: &str) -> Result<T, PluginError> {
    serde_json::from_str(json)
        .map_err(|error| PluginError::new("invalid-parameter", format!("parameters: {error}")))
}
