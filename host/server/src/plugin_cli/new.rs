//! `windlass plugin new`: a project that builds, with unit tests, an integration test and a README.
//!
//! Everything that is written is embedded in this program: the templates (`host/server/templates/plugin`), the contract
//! (`wit/`), and for Rust the kit for authors in source, so that no published crate and no checkout is needed. The project
//! is written beside its place and renamed into it: it is there whole, or not at all.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use windlass_domain::plugin::PluginKind;

mod embedded {
    include!(concat!(env!("OUT_DIR"), "/embedded.rs"));
}

/// What `windlass plugin new` is told.
#[derive(Debug, Clone, Args)]
pub struct NewOptions {
    /// Kind of the plugin.
    #[arg(long, value_enum)]
    pub kind: Kind,
    /// Language that it is written in.
    #[arg(long, value_enum, default_value = "rust")]
    pub lang: Language,
    /// Directory to make; the name unless given.
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Rust: use the kit in this directory instead of writing a copy of it into the project.
    #[arg(long)]
    pub sdk: Option<PathBuf>,
    /// Name of the plugin: lower-case letters, digits, `-`; starts with a letter; at most 60 characters.
    pub name: String,
}

/// Kinds of plugins, as the command line names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// How an application is prepared, installed, started, stopped and checked.
    TechStack,
    /// In which order and waves servers are released.
    DeploymentStrategy,
    /// Finds out what is wrong.
    Diagnostic,
    /// A command offered to everyone.
    PublicCommand,
}

/// Languages that there are templates for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Language {
    /// Needs cargo and the target `wasm32-unknown-unknown`.
    Rust,
    /// Needs python3 3.11; componentize-py is installed by the project's build.
    Python,
    /// Needs node 20; componentize-js is installed by the project's build.
    Javascript,
}

/// Why no project was made. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// The name breaks the contract's rule.
    #[error(
        "`{0}` is not a plugin's name: use lower-case letters, digits and `-`, start with a letter, at most 60 characters"
    )]
    Name(String),
    /// Something stands there.
    #[error("{0} exists already: choose another name, or another place with --dir")]
    Exists(PathBuf),
    /// The kit is not there.
    #[error(
        "{0} holds no windlass-sdk: give the directory with its Cargo.toml to --sdk, or leave --sdk out"
    )]
    NoSdk(PathBuf),
    /// A file could not be written.
    #[error("{path} cannot be written")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Makes a project and answers its directory.
///
/// # Errors
/// [`NewError`]; nothing is left behind.
pub fn new_project(options: &NewOptions) -> Result<PathBuf, NewError> {
    let name = checked(&options.name)?;
    let target = options.dir.clone().unwrap_or_else(|| PathBuf::from(name));
    if target.exists() {
        return Err(NewError::Exists(target));
    }
    let sdk = options.sdk.as_deref().map(sdk_at).transpose()?;
    let files = files(options.kind.into(), options.lang, name, sdk.as_deref());
    let hidden = target.with_file_name(format!(
        ".{}.new-{}",
        target.file_name().unwrap_or_default().display(),
        std::process::id()
    ));
    let written = write_all(&hidden, &files).and_then(|()| {
        fs::rename(&hidden, &target).map_err(|source| NewError::Write {
            path: target.clone(),
            source,
        })
    });
    if let Err(error) = written {
        if let Err(left) = fs::remove_dir_all(&hidden)
            && left.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("{} is left behind: {left}", hidden.display());
        }
        return Err(error);
    }
    Ok(target)
}

/// The files of a project: paths relative to it, and their texts.
#[must_use]
pub fn files(
    kind: PluginKind,
    language: Language,
    name: &str,
    sdk: Option<&Path>,
) -> Vec<(String, String)> {
    let texts = Texts::new(kind, name, sdk);
    let directory = language.directory();
    let mut files = Vec::new();
    for (prefix, place) in [
        (format!("{directory}/common/"), ""),
        (format!("{directory}/{}/", code(kind)), ""),
        (format!("samples/{}/", code(kind)), "samples/"),
    ] {
        for (path, text) in embedded::TEMPLATES {
            if let Some(path) = path.strip_prefix(&prefix) {
                let path = path.strip_suffix(".in").unwrap_or(path);
                files.push((format!("{place}{path}"), texts.fill(text)));
            }
        }
    }
    for (path, text) in embedded::WIT {
        files.push((format!("wit/{path}"), (*text).to_owned()));
    }
    if language == Language::Rust && sdk.is_none() {
        for (path, text) in embedded::SDK {
            // Its manifest inherits from this repository's workspace; the copy has one of its own.
            if *path != "Cargo.toml" {
                files.push((format!("windlass-sdk/{path}"), (*text).to_owned()));
            }
        }
        for (path, text) in embedded::TEMPLATES {
            if *path == "sdk/Cargo.toml.in" {
                files.push(("windlass-sdk/Cargo.toml".to_owned(), texts.fill(text)));
            }
        }
    }
    files
}

/// What stands for the words between `@` in a template.
struct Texts(Vec<(&'static str, String)>);

impl Texts {
    fn new(kind: PluginKind, name: &str, sdk: Option<&Path>) -> Self {
        let (export, input, module) = match kind {
            PluginKind::TechStack => ("lifecycle", r#"{"parameters":{"port":8080}}"#, "stack"),
            PluginKind::DeploymentStrategy => ("plan", r#"{"parameters":{"batch":2}}"#, "batches"),
            PluginKind::Diagnostic => ("diagnose", r#"{"parameters":{}}"#, "disks"),
            PluginKind::PublicCommand => (
                "render",
                r#"{"parameters":{"directory":"/var/log"}}"#,
                "entries",
            ),
        };
        let mut title = name.replace('-', " ");
        title[..1].make_ascii_uppercase();
        let mut texts = vec![
            ("@NAME@", name.to_owned()),
            ("@CRATE@", format!("{}_plugin", name.replace('-', "_"))),
            ("@TITLE@", title),
            ("@KIND@", code(kind).to_owned()),
            ("@EXPORT@", export.to_owned()),
            ("@INPUT@", input.to_owned()),
            ("@MODULE@", module.to_owned()),
            (
                "@SDK@",
                sdk.map_or_else(
                    || "windlass-sdk".to_owned(),
                    // A TOML basic string.
                    |path| {
                        path.display()
                            .to_string()
                            .replace('\\', "\\\\")
                            .replace('"', "\\\"")
                    },
                ),
            ),
            ("@WINDLASS_VERSION@", env!("CARGO_PKG_VERSION").to_owned()),
            ("@RUST_VERSION@", env!("CARGO_PKG_RUST_VERSION").to_owned()),
        ];
        for (dependency, wanted) in embedded::DEPENDENCIES {
            let word = match *dependency {
                "wit-bindgen" => "@DEP_WIT_BINDGEN@",
                "serde" => "@DEP_SERDE@",
                _ => "@DEP_SERDE_JSON@",
            };
            texts.push((word, (*wanted).to_owned()));
        }
        Self(texts)
    }

    fn fill(&self, template: &str) -> String {
        self.0
            .iter()
            .fold(template.to_owned(), |text, (word, value)| {
                text.replace(word, value)
            })
    }
}

/// The kind's name in the contract.
#[must_use]
pub fn code(kind: PluginKind) -> &'static str {
    match kind {
        PluginKind::TechStack => "tech-stack",
        PluginKind::DeploymentStrategy => "deployment-strategy",
        PluginKind::Diagnostic => "diagnostic",
        PluginKind::PublicCommand => "public-command",
    }
}

impl Language {
    fn directory(self) -> &'static str {
        match self {
            Self::Rust => "rust",
            Self::Python => "python",
            Self::Javascript => "javascript",
        }
    }
}

impl From<Kind> for PluginKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::TechStack => Self::TechStack,
            Kind::DeploymentStrategy => Self::DeploymentStrategy,
            Kind::Diagnostic => Self::Diagnostic,
            Kind::PublicCommand => Self::PublicCommand,
        }
    }
}

fn checked(name: &str) -> Result<&str, NewError> {
    let good = name.len() <= 60
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name
            .chars()
            .all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-');
    if good {
        Ok(name)
    } else {
        Err(NewError::Name(name.chars().take(80).collect()))
    }
}

fn sdk_at(path: &Path) -> Result<PathBuf, NewError> {
    path.canonicalize()
        .ok()
        .filter(|path| path.join("Cargo.toml").is_file() && path.join("src/export.rs").is_file())
        .ok_or_else(|| NewError::NoSdk(path.to_owned()))
}

fn write_all(directory: &Path, files: &[(String, String)]) -> Result<(), NewError> {
    for (path, text) in files {
        let path = directory.join(path);
        let failed = |source| NewError::Write {
            path: path.clone(),
            source,
        };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        fs::write(&path, text).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [PluginKind; 4] = [
        PluginKind::TechStack,
        PluginKind::DeploymentStrategy,
        PluginKind::Diagnostic,
        PluginKind::PublicCommand,
    ];

    #[test]
    fn every_template_is_filled_and_has_what_a_project_needs() {
        for language in [Language::Rust, Language::Python, Language::Javascript] {
            for kind in KINDS {
                let files = files(kind, language, "my-plugin", None);
                let what = format!("{language:?} {kind:?}");
                for (path, text) in &files {
                    for word in [
                        "@NAME@", "@KIND@", "@SDK@", "@DEP_", "@TITLE@", "@EXPORT@", "@INPUT@",
                    ] {
                        assert!(!text.contains(word), "{what}: {path} holds {word}");
                    }
                }
                for needed in [
                    "README.md",
                    "windlass-plugin.json",
                    "wit/types.wit",
                    ".gitignore",
                ] {
                    assert!(
                        files.iter().any(|(path, _)| path == needed),
                        "{what} has no {needed}"
                    );
                }
                let has =
                    |directory: &str| files.iter().any(|(path, _)| path.starts_with(directory));
                assert!(
                    has("samples/") && has("src/") && (has("tests/") || has("test/")),
                    "{what}"
                );
            }
        }
    }

    #[test]
    fn a_project_is_made_once_and_bad_names_leave_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let options = |name: &str| NewOptions {
            kind: Kind::PublicCommand,
            lang: Language::Rust,
            dir: Some(temp.path().join(name)),
            sdk: None,
            name: name.to_owned(),
        };
        let made = new_project(&options("counter")).unwrap();
        assert!(made.join("windlass-sdk/src/lib.rs").is_file());
        assert!(matches!(
            new_project(&options("counter")),
            Err(NewError::Exists(_))
        ));
        for bad in ["", "Upper", "1st", "a_b", "a b", "ä", &"a".repeat(61)] {
            let error = new_project(&NewOptions {
                dir: Some(temp.path().join("bad")),
                ..options(bad)
            });
            assert!(matches!(error, Err(NewError::Name(_))), "{bad}");
        }
        let missing = NewOptions {
            sdk: Some(temp.path().join("no-such")),
            ..options("other")
        };
        assert!(matches!(new_project(&missing), Err(NewError::NoSdk(_))));
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }
}
