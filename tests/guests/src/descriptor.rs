//! `describe`, as the marker in the component's bytes says.

use serde_json::json;
use windlass_sdk::{Descriptor, Severity};

/// The text that the marker starts with; after it stand `name;version;mode;`, then blanks.
pub const MARKER: &str = "windlass-test-marker:";
/// Length of the whole marker.
pub const MARKER_BYTES: usize = 160;

/// Overwritten in the component's bytes.
static TEXT: [u8; MARKER_BYTES] = *b"windlass-test-marker:;1.0.0;ok;                                                                                                                                 ";

/// The fields of the marker: name, version, mode.
pub(crate) fn fields() -> [String; 3] {
    // Read through a black box: the compiler must not know what is in it.
    let text = std::hint::black_box(&TEXT);
    let text = String::from_utf8_lossy(text);
    let mut fields = text.trim_start_matches(MARKER).split(';');
    [(); 3].map(|()| fields.next().unwrap_or_default().to_owned())
}

/// Whether its answers differ from those of others of its kind: the mode `other`.
#[must_use]
pub fn answers_otherwise() -> bool {
    fields()[2] == "other"
}

/// What this guest is. `default_name` is used when the marker names none.
#[must_use]
pub fn describe(default_name: &str, is_diagnostic: IsDiagnostic) -> Descriptor {
    let [name, version, mode] = fields();
    let or = |field: String, default: &str| match field.as_str() {
        "" => default.to_owned(),
        _ => field,
    };
    let (name, version, mode) = (or(name, default_name), or(version, "1.0.0"), or(mode, "ok"));

    let mut descriptor = Descriptor::new(&name, &version)
        .title("A guest for tests")
        .provider("Windlass")
        .category("test")
        .parameters(&json!({
            "type": "object",
            "properties": { "behave": { "type": "string" } }
        }));
    if let IsDiagnostic::Yes = is_diagnostic {
        descriptor = descriptor.item("probe", "A probe", Severity::Critical);
    }
    match mode.as_str() {
        "schema-broken" => descriptor.parameters_schema = r#"{"type": "#.into(),
        "schema-wrong" => descriptor.parameters_schema = r#"{"type": "strin"}"#.into(),
        "schema-enormous" => {
            descriptor.parameters_schema = json!({ "title": "a".repeat(70_000) }).to_string();
        }
        "schema-remote" => {
            descriptor.parameters_schema = r#"{"$ref": "https://example.com/schema.json"}"#.into();
        }
        "schema-regex" => {
            descriptor.parameters_schema = r#"{"pattern": "^(?=(a+)+$)\\1"}"#.into();
        }
        "schema-bomb" => {
            descriptor.parameters_schema =
                r#"{"pattern": "^((((a{100}){100}){100}){100})$"}"#.into();
        }
        "no-title" => descriptor.title = String::new(),
        "wish" => descriptor = descriptor.wish_user("root").wish_path_root("/srv"),
        other => crate::behave::behave(other),
    }
    descriptor
}

/// Whether the descriptor needs items.
#[derive(Debug, Clone, Copy)]
pub enum IsDiagnostic {
    /// It does.
    Yes,
    /// It must not have any.
    No,
}
