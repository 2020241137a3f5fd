//! What may change between two versions of one plugin, read from their descriptors.

use serde_json::Value;
use windlass_domain::plugin::{Descriptor, PluginKind};

use super::{Finding, Rule, Severity};

/// Compares a version with the one before it.
pub(crate) fn compare(
    (old_kind, old): (PluginKind, &Descriptor),
    (new_kind, new): (PluginKind, &Descriptor),
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut found =
        |severity, text: String| findings.push(Finding::new(Rule::Stability, severity, text));
    if old.name != new.name {
        found(
            Severity::Failed,
            format!(
                "the name was `{}` and is `{}`: that is another plugin",
                old.name, new.name
            ),
        );
    }
    if old_kind != new_kind {
        found(
            Severity::Failed,
            format!(
                "the kind was {old_kind:?} and is {new_kind:?}: what uses the plugin cannot use it any more"
            ),
        );
    }
    if new.version <= old.version {
        found(
            Severity::Failed,
            format!(
                "the version was {} and is {}: it must rise, because a version's bytes never change",
                old.version, new.version
            ),
        );
    }
    schema("", &old.parameters, &new.parameters, &mut found);
    for wish in new
        .wishes
        .users
        .iter()
        .filter(|user| !old.wishes.users.contains(user))
    {
        found(
            Severity::Warning,
            format!("wishes for the user `{wish}`, which an operator must approve first"),
        );
    }
    for wish in new
        .wishes
        .path_roots
        .iter()
        .filter(|path| !old.wishes.path_roots.contains(path))
    {
        found(
            Severity::Warning,
            format!("wishes for the path `{wish}`, which an operator must approve first"),
        );
    }
    for item in old
        .items
        .iter()
        .filter(|item| !new.items.iter().any(|other| other.code == item.code))
    {
        found(
            Severity::Warning,
            format!(
                "the item `{}` was dropped: who asks for it gets nothing",
                item.code
            ),
        );
    }
    for preset in old
        .presets
        .iter()
        .filter(|preset| !new.presets.iter().any(|other| other.name == preset.name))
    {
        found(
            Severity::Warning,
            format!("the preset `{}` was dropped", preset.name),
        );
    }
    findings
}

/// Parameters that were valid and are not any more, as far as the schema's own words say.
fn schema(at: &str, old: &Value, new: &Value, found: &mut impl FnMut(Severity, String)) {
    let here = |name: &str| format!("{at}/{name}");
    let none = serde_json::Map::new();
    let (before, after) = (
        old["properties"].as_object().unwrap_or(&none),
        new["properties"].as_object().unwrap_or(&none),
    );
    for (name, property) in before {
        match after.get(name) {
            None => found(
                Severity::Warning,
                format!(
                    "the parameter `{}` was dropped: instances that set it are refused or change silently",
                    here(name)
                ),
            ),
            Some(other) => {
                if property["type"] != other["type"] && !property["type"].is_null() {
                    found(
                        Severity::Warning,
                        format!(
                            "the type of `{}` was {} and is {}",
                            here(name),
                            property["type"],
                            other["type"]
                        ),
                    );
                }
                for choice in property["enum"].as_array().into_iter().flatten() {
                    if other["enum"]
                        .as_array()
                        .is_some_and(|choices| !choices.contains(choice))
                    {
                        found(
                            Severity::Warning,
                            format!("`{}` does not allow {choice} any more", here(name)),
                        );
                    }
                }
                if property.get("default") != other.get("default") {
                    let text = |default: Option<&Value>| {
                        default.map_or_else(|| "none".to_owned(), Value::to_string)
                    };
                    found(
                        Severity::Warning,
                        format!(
                            "the default of `{}` was {} and is {}: instances that leave it out change",
                            here(name),
                            text(property.get("default")),
                            text(other.get("default"))
                        ),
                    );
                }
                schema(&here(name), property, other, found);
            }
        }
    }
    let required = |schema: &Value| -> Vec<String> {
        schema["required"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|name| name.as_str().map(str::to_owned))
            .collect()
    };
    let had = required(old);
    for name in required(new).into_iter().filter(|name| !had.contains(name)) {
        found(
            Severity::Warning,
            format!(
                "the parameter `{}` is required now: instances without it are refused",
                here(&name)
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn descriptor(version: &str, parameters: Value) -> Descriptor {
        serde_json::from_value(json!({
            "name": "x", "version": version, "title": "x", "summary": "", "provider": "", "category": "",
            "parameters": parameters, "wishes": {"users": [], "path_roots": []}, "operating_systems": [], "items": [],
            "presets": [], "attributes": {}
        }))
        .unwrap()
    }

    #[test]
    fn what_users_would_feel_is_named() {
        let kind = PluginKind::TechStack;
        let old = descriptor(
            "1.0.0",
            json!({"properties":{"a":{"type":"integer","default":1},"b":{"enum":["x","y"]},"c":{}}}),
        );
        let same = descriptor("1.1.0", old.parameters.clone());
        assert_eq!(compare((kind, &old), (kind, &same)), []);

        let new = descriptor(
            "1.0.0",
            json!({"required":["d"],"properties":{"a":{"type":"string","default":2},"b":{"enum":["x"]},"d":{}}}),
        );
        let findings = compare((kind, &old), (PluginKind::Diagnostic, &new));
        for part in [
            "kind was",
            "must rise",
            "`/c` was dropped",
            "type of `/a`",
            "default of `/a`",
            "does not allow \"y\"",
            "`/d` is required",
        ] {
            assert!(
                findings.iter().any(|finding| finding.text.contains(part)),
                "{part}: {findings:#?}"
            );
        }
        assert_eq!(
            findings
                .iter()
                .filter(|finding| finding.severity == Severity::Failed)
                .count(),
            2
        );
    }
}
