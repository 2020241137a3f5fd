//! Builders of the shared records: descriptors, errors, values, servers.

use crate::{
    Descriptor, DiagnosticItem, PackageRef, PluginError, Preset, Script, ServerFacts, Severity,
    Value, Wishes,
};

impl Descriptor {
    /// A plugin of this name and version, without parameters and wishes.
    ///
    /// The name holds lower-case letters, digits and `-`, starts with a letter and has at most 60 characters; the version
    /// is semver 2.0. The host refuses a plugin whose descriptor breaks this, and says which field does.
    ///
    /// ```
    /// # use windlass_sdk::{Descriptor, Severity};
    /// let descriptor = Descriptor::new("disk-room", "1.0.0")
    ///     .title("Disk room")
    ///     .summary("Whether the disks have room left.")
    ///     .provider("you")
    ///     .category("server")
    ///     .operating_system("linux")
    ///     .item("disk", "Disk space", Severity::Critical)
    ///     .parameters(&serde_json::json!({
    ///         "type": "object", "additionalProperties": false,
    ///         "properties": { "limit": { "type": "integer", "minimum": 1, "maximum": 100 } }
    ///     }))
    ///     .preset("strict", "Early warning", &serde_json::json!({ "limit": 70 }));
    /// assert_eq!(descriptor.items[0].code, "disk");
    /// ```
    #[must_use]
    pub fn new(name: &str, version: &str) -> Self {
        Self {
            name: name.into(),
            version: version.into(),
            title: name.into(),
            summary: String::new(),
            provider: String::new(),
            category: String::new(),
            parameters_schema: r#"{"type":"object","additionalProperties":false}"#.into(),
            operating_systems: Vec::new(),
            wishes: Wishes {
                users: Vec::new(),
                path_roots: Vec::new(),
                attributes: Vec::new(),
            },
            items: Vec::new(),
            presets: Vec::new(),
            attributes: Vec::new(),
        }
    }

    /// One line for people, at most 120 characters.
    #[must_use]
    pub fn title(mut self, title: &str) -> Self {
        self.title = title.into();
        self
    }

    /// A paragraph, at most 2,000 characters.
    #[must_use]
    pub fn summary(mut self, summary: &str) -> Self {
        self.summary = summary.into();
        self
    }

    /// Who made it.
    #[must_use]
    pub fn provider(mut self, provider: &str) -> Self {
        self.provider = provider.into();
        self
    }

    /// Free text to sort by.
    #[must_use]
    pub fn category(mut self, category: &str) -> Self {
        self.category = category.into();
        self
    }

    /// JSON Schema (2020-12) of the parameters; at most 64 KiB, no references to other documents, patterns without
    /// look-around and back-references.
    #[must_use]
    pub fn parameters(mut self, schema: &serde_json::Value) -> Self {
        self.parameters_schema = schema.to_string();
        self
    }

    /// An operating system that it supports (`linux`, `debian`, `debian:12`); none at all: any.
    #[must_use]
    pub fn operating_system(mut self, name: &str) -> Self {
        self.operating_systems.push(name.into());
        self
    }

    /// An OS user that its scripts want to run as, beside the agent's own.
    ///
    /// ```
    /// # use windlass_sdk::Descriptor;
    /// let descriptor = Descriptor::new("tomcat", "1.0.0").wish_user("tomcat").wish_path_root("/opt/tomcat");
    /// assert_eq!(descriptor.wishes.users, ["tomcat"]);
    /// ```
    #[must_use]
    pub fn wish_user(mut self, user: &str) -> Self {
        self.wishes.users.push(user.into());
        self
    }

    /// An absolute directory that it wants to write below, beside the instance's own.
    #[must_use]
    pub fn wish_path_root(mut self, path: &str) -> Self {
        self.wishes.path_roots.push(path.into());
        self
    }

    /// An item that a diagnostic reports on.
    #[must_use]
    pub fn item(mut self, code: &str, title: &str, severity: Severity) -> Self {
        self.items.push(DiagnosticItem {
            code: code.into(),
            title: title.into(),
            severity,
            attributes: Vec::new(),
        });
        self
    }

    /// A ready choice of parameters.
    #[must_use]
    pub fn preset(mut self, name: &str, title: &str, parameters: &serde_json::Value) -> Self {
        self.presets.push(Preset {
            name: name.into(),
            title: title.into(),
            operating_systems: Vec::new(),
            parameters: parameters.to_string(),
            attributes: Vec::new(),
        });
        self
    }

    /// An attribute, for what the fixed fields do not hold.
    ///
    /// ```
    /// # use windlass_sdk::Descriptor;
    /// let descriptor = Descriptor::new("x", "1.0.0").attribute("vendor.example/icon", "disk");
    /// assert_eq!(descriptor.attributes.len(), 1);
    /// ```
    #[must_use]
    pub fn attribute(mut self, key: &str, value: &str) -> Self {
        self.attributes.push((key.into(), value.into()));
        self
    }
}

impl PluginError {
    /// An error with a code of the contract or your own, and a message that says what is wrong and what to do.
    ///
    /// ```
    /// # use windlass_sdk::PluginError;
    /// let error = PluginError::new("vendor-licence", "the licence ended: renew it");
    /// assert_eq!(error.field, None);
    /// ```
    #[must_use]
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            message: message.into(),
            field: None,
        }
    }

    /// A parameter is wrong; `field` is a JSON pointer into the parameters (`/port`).
    ///
    /// ```
    /// # use windlass_sdk::PluginError;
    /// let error = PluginError::invalid_parameter("/port", "port 22 is the server's own: choose another");
    /// assert_eq!(error.field.as_deref(), Some("/port"));
    /// ```
    #[must_use]
    pub fn invalid_parameter(field: &str, message: impl Into<String>) -> Self {
        Self {
            code: "invalid-parameter".into(),
            message: message.into(),
            field: Some(field.into()),
        }
    }

    /// Something that this version does not know was asked for.
    ///
    /// ```
    /// # use windlass_sdk::PluginError;
    /// assert_eq!(PluginError::unsupported("only servers can be looked at").code, "unsupported");
    /// ```
    #[must_use]
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new("unsupported", message)
    }

    /// It was understood, and the facts do not allow it.
    ///
    /// ```
    /// # use windlass_sdk::PluginError;
    /// assert_eq!(PluginError::not_possible("no server is healthy").code, "not-possible");
    /// ```
    #[must_use]
    pub fn not_possible(message: impl Into<String>) -> Self {
        Self::new("not-possible", message)
    }
}

impl Value {
    /// Plain text.
    ///
    /// ```
    /// # use windlass_sdk::Value;
    /// assert_eq!(Value::plain("8080"), Value::Plain("8080".into()));
    /// ```
    #[must_use]
    pub fn plain(text: impl Into<String>) -> Self {
        Self::Plain(text.into())
    }
}

impl Script {
    /// A script for `/bin/sh -eu`, run in the release directory.
    ///
    /// ```
    /// # use windlass_sdk::Script;
    /// assert_eq!(Script::shell("uptime").interpreter, ["/bin/sh", "-eu"]);
    /// ```
    #[must_use]
    pub fn shell(text: impl Into<String>) -> Self {
        Self {
            interpreter: vec!["/bin/sh".into(), "-eu".into()],
            text: text.into(),
            working_dir: None,
        }
    }
}

impl ServerFacts {
    /// A Linux server with an id and a name; for tests.
    ///
    /// ```
    /// # use windlass_sdk::ServerFacts;
    /// let server = ServerFacts::new("s1", "web-1").variable("PORT", "8081");
    /// assert_eq!(server.variables, [("PORT".into(), "8081".into())]);
    /// ```
    #[must_use]
    pub fn new(id: &str, name: &str) -> Self {
        Self {
            id: id.into(),
            name: name.into(),
            os: "debian".into(),
            os_version: "12".into(),
            arch: "x86_64".into(),
            address: String::new(),
            cell: String::new(),
            zone: String::new(),
            variables: Vec::new(),
            attributes: Vec::new(),
        }
    }

    /// With a variable of its own.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }
}

impl PackageRef {
    /// A package; for tests.
    ///
    /// ```
    /// # use windlass_sdk::PackageRef;
    /// assert_eq!(PackageRef::new("1.0.0", "tar_gz", "shop.tar.gz").digest.len(), 64);
    /// ```
    #[must_use]
    pub fn new(version: &str, format: &str, file_name: &str) -> Self {
        Self {
            version: version.into(),
            digest: "0".repeat(64),
            size_bytes: 1,
            format: format.into(),
            file_name: file_name.into(),
            attributes: Vec::new(),
        }
    }
}
