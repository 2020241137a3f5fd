//! `describe`: the one answer that is checked here, because a plugin is accepted or rejected by it.

use std::collections::BTreeSet;

use windlass_domain::plugin::{Descriptor, DiagnosticItem, PluginKind, Preset, Severity, Wishes};

use crate::{
    bindings::types,
    convert::attributes_from_guest,
    error::{Rejection, RejectionCode},
    schema::Schema,
};

/// Most items of any list in a descriptor.
const MAX_ITEMS: usize = 100;

pub(crate) fn descriptor_from_guest(
    kind: PluginKind,
    descriptor: types::Descriptor,
    schema_bytes: usize,
) -> Result<(Descriptor, Schema), Rejection> {
    name_in("name", &descriptor.name)?;
    let version = descriptor.version.parse().map_err(|error| {
        invalid(
            "version",
            format!(
                "`{}` is not a semver version: {error}",
                cut(&descriptor.version)
            ),
        )
    })?;
    text("title", &descriptor.title, 1, 120)?;
    text("summary", &descriptor.summary, 0, 2000)?;
    text("provider", &descriptor.provider, 0, 120)?;
    text("category", &descriptor.category, 0, 60)?;
    let schema = Schema::parse(&descriptor.parameters_schema, schema_bytes)?;
    count("operating-systems", descriptor.operating_systems.len())?;
    for system in &descriptor.operating_systems {
        text("operating-systems", system, 1, 60)?;
    }
    count("wishes.users", descriptor.wishes.users.len())?;
    for user in &descriptor.wishes.users {
        text("wishes.users", user, 1, 32)?;
    }
    count("wishes.path-roots", descriptor.wishes.path_roots.len())?;
    for root in &descriptor.wishes.path_roots {
        text("wishes.path-roots", root, 1, 4096)?;
        if !root.starts_with('/') || root.split('/').any(|part| part == "..") {
            return Err(invalid(
                "wishes.path-roots",
                format!("`{}` is not an absolute path without `..`", cut(root)),
            ));
        }
    }
    count("items", descriptor.items.len())?;
    let mut codes = BTreeSet::new();
    for item in &descriptor.items {
        name_in("items.code", &item.code)?;
        text("items.title", &item.title, 1, 120)?;
        if !codes.insert(item.code.clone()) {
            return Err(invalid(
                "items.code",
                format!("holds `{}` twice", item.code),
            ));
        }
    }
    match (kind, descriptor.items.is_empty()) {
        (PluginKind::Diagnostic, true) => {
            return Err(invalid("items", "is empty: a diagnostic names its items"));
        }
        (
            PluginKind::TechStack | PluginKind::DeploymentStrategy | PluginKind::PublicCommand,
            false,
        ) => return Err(invalid("items", "belongs to diagnostics only")),
        (PluginKind::Diagnostic, false)
        | (
            PluginKind::TechStack | PluginKind::DeploymentStrategy | PluginKind::PublicCommand,
            true,
        ) => {}
    }
    count("presets", descriptor.presets.len())?;
    let mut presets = Vec::with_capacity(descriptor.presets.len());
    let mut preset_names = BTreeSet::new();
    for preset in descriptor.presets {
        text("presets.name", &preset.name, 1, 60)?;
        text("presets.title", &preset.title, 1, 120)?;
        if !preset_names.insert(preset.name.clone()) {
            return Err(invalid(
                "presets.name",
                format!("holds `{}` twice", preset.name),
            ));
        }
        presets.push(Preset {
            parameters: serde_json::from_str(&preset.parameters).map_err(|error| {
                invalid(
                    "presets.parameters",
                    format!("of `{}` is not JSON: {error}", preset.name),
                )
            })?,
            name: preset.name,
            title: preset.title,
            operating_systems: preset.operating_systems,
        });
    }
    count("attributes", descriptor.attributes.len())?;
    for (key, value) in &descriptor.attributes {
        text("attributes", key, 1, 100)?;
        text("attributes", value, 0, 16 * 1024)?;
    }
    let attributes = attributes_from_guest("attributes", descriptor.attributes)
        .map_err(|failure| invalid("attributes", failure.to_string()))?;
    let descriptor = Descriptor {
        name: descriptor.name,
        version,
        title: descriptor.title,
        summary: descriptor.summary,
        provider: descriptor.provider,
        category: descriptor.category,
        parameters: schema.document.clone(),
        wishes: Wishes {
            users: descriptor.wishes.users,
            path_roots: descriptor.wishes.path_roots,
        },
        operating_systems: descriptor.operating_systems,
        items: descriptor
            .items
            .into_iter()
            .map(|item| DiagnosticItem {
                code: item.code,
                title: item.title,
                severity: match item.severity {
                    types::Severity::Critical => Severity::Critical,
                    types::Severity::NonCritical => Severity::NonCritical,
                },
            })
            .collect(),
        presets,
        attributes,
    };
    Ok((descriptor, schema))
}

fn invalid(field: &str, reason: impl std::fmt::Display) -> Rejection {
    Rejection::new(
        RejectionCode::DescriptorInvalid,
        format!("descriptor: `{field}` {reason}"),
    )
}

fn cut(text: &str) -> String {
    text.chars().take(100).collect()
}

fn count(field: &str, items: usize) -> Result<(), Rejection> {
    if items > MAX_ITEMS {
        return Err(invalid(
            field,
            format!("has {items} entries, the limit is {MAX_ITEMS}"),
        ));
    }
    Ok(())
}

fn text(field: &str, text: &str, min: usize, max: usize) -> Result<(), Rejection> {
    let length = text.chars().count();
    if length < min || length > max {
        return Err(invalid(
            field,
            format!("has {length} characters: {min} to {max} are allowed"),
        ));
    }
    if text.chars().any(|c| c.is_control() && c != '\n') {
        return Err(invalid(field, "holds control characters"));
    }
    Ok(())
}

fn name_in(field: &str, name: &str) -> Result<(), Rejection> {
    let good = name.len() <= 60
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if good {
        Ok(())
    } else {
        Err(invalid(
            field,
            format!(
                "`{}` is not a name: lower-case letters, digits and `-`, starting with a letter, at most 60",
                cut(name)
            ),
        ))
    }
}
