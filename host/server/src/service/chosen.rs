//! The plugin that a request names, and the check of its parameters: shared by diagnoses and invocations.

use windlass_domain::{manifest::PluginRef, plugin::PluginKind};
use windlass_runtime::{FieldError, Plugin, Plugins};

use super::ServiceError;

/// The plugin of a kind that `name` or `name@version` names; a bare name stands for its default version.
///
/// # Errors
/// `plugin_not_available`: it is not active, or has another kind.
pub(super) fn plugin(
    plugins: &Plugins,
    kind: PluginKind,
    field: &str,
    text: &str,
) -> Result<Plugin, ServiceError> {
    let refused = |message: String| {
        ServiceError::invalid(
            "plugin_not_available",
            field,
            message,
            "see /v1/plugins for what is loaded and why something is not",
        )
    };
    let (name, version) = match text.split_once('@') {
        Some((name, version)) => (name, Some(version)),
        None => (text, None),
    };
    let wanted = version
        .map(|version| format!("={version}").parse::<semver::VersionReq>())
        .transpose()
        .map_err(|error| {
            refused(format!(
                "`{text}` is not `name` or `name@version`: the version is not of the form 1.2.3 ({error})"
            ))
        })?;
    plugins
        .get_of_kind(kind, name, wanted.as_ref())
        .map_err(|error| refused(error.to_string()))
}

/// Parameters that do not fit a plugin's schema; names every fault, and the first one's field. `root` is where they stand in
/// the request.
pub(super) fn parameters_invalid(
    root: &str,
    plugin: &PluginRef,
    faults: &[FieldError],
) -> ServiceError {
    let texts: Vec<String> = faults.iter().map(ToString::to_string).collect();
    let field = faults.first().map_or("", |fault| fault.field.as_str());
    ServiceError::invalid(
        "parameters_invalid",
        format!("{root}{field}"),
        format!(
            "the parameters do not fit the schema of {}@{}: {}",
            plugin.name,
            plugin.version,
            texts.join("; ")
        ),
        "see the plugin's schema at /v1/plugins",
    )
}
