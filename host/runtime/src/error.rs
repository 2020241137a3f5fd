//! Why a plugin was not accepted, could not be found, or did not answer. Every one is attributed and says what to do.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use windlass_domain::{digest::Digest, manifest::PluginRef, plugin::PluginKind};

use crate::call::Export;

/// Why the plugin directory could not be opened at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The WebAssembly engine could not be set up.
    #[error("the plugin engine cannot be set up")]
    Engine(#[source] wasmtime::Error),
    /// A directory could not be made or read.
    #[error(
        "the plugin directory {path} cannot be used: check that it exists and that this user may write it"
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// A background thread could not be started.
    #[error("a thread cannot be started")]
    Thread(#[source] std::io::Error),
}

/// Stable codes of reasons for which a file is not a plugin.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum RejectionCode {
    /// Not WebAssembly at all.
    NotWasm,
    /// A core module, not a component.
    CoreModule,
    /// Compiled ahead of time: never accepted.
    Precompiled,
    /// Larger than the limit.
    TooLarge,
    /// WebAssembly that does not validate or compile.
    InvalidComponent,
    /// Compiling took too long or too much memory.
    CompileLimit,
    /// The compiling process could not be run.
    CompileFailed,
    /// It exports no interface of any world.
    NoWorld,
    /// It exports interfaces of more than one world.
    SeveralWorlds,
    /// It was made for another major version of the contract.
    ContractVersion,
    /// An export of its world is missing or has another type.
    MissingExport,
    /// It imports what its world does not have.
    UnknownImport,
    /// `describe` trapped or answered nonsense.
    DescribeFailed,
    /// `describe` computed longer than the limit.
    DescribeTimeout,
    /// It needs more memory than the limit.
    MemoryLimit,
    /// It needs more tables, memories or instances than a call has.
    ResourceLimit,
    /// A field of its descriptor breaks a rule.
    DescriptorInvalid,
    /// Its schema is not JSON Schema 2020-12.
    SchemaInvalid,
    /// Its schema is larger than the limit.
    SchemaTooLarge,
    /// Its schema refers to another document.
    SchemaRemoteReference,
    /// A pattern of its schema cannot be matched in linear time.
    SchemaRegex,
    /// It breaks a rule of the conformance kit that is checked whenever a plugin is loaded.
    NotConforming,
    /// The file could not be read.
    Unreadable,
    /// Not a regular file.
    NotAFile,
    /// A symbolic link that leaves the plugin directory.
    SymlinkOutside,
    /// Its digest is not on the server's allow-list.
    NotAllowed,
    /// It is not signed, and the server requires it.
    Unsigned,
    /// Its signature fits none of the known keys.
    SignatureInvalid,
    /// This name and version is already provided with other bytes, by another file or by this file before it was overwritten.
    DuplicateVersion,
    /// The platform could not keep its bytes.
    NotKept,
}

/// Why a file is not a plugin.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error, utoipa::ToSchema,
)]
#[error("{text}")]
pub struct Rejection {
    /// Stable code.
    pub code: RejectionCode,
    /// What is wrong, which limit, what to do.
    pub text: String,
}

impl Rejection {
    pub(crate) fn new(code: RejectionCode, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }
}

/// Why a plugin could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// No active plugin has this name.
    #[error("there is no active plugin `{name}`: see the list of plugins for its state")]
    NoSuchPlugin {
        /// The name.
        name: String,
    },
    /// None of its versions fits.
    #[error("no active version of plugin `{name}` fits `{wanted}`: active are {active}")]
    NoSuchVersion {
        /// The name.
        name: String,
        /// The requirement.
        wanted: String,
        /// Active versions, as a list.
        active: String,
    },
    /// It has another kind than asked for.
    #[error("plugin `{name}` is a {actual:?}, and a {expected:?} is needed here")]
    WrongKind {
        /// The name.
        name: String,
        /// What is needed.
        expected: PluginKind,
        /// What it is.
        actual: PluginKind,
    },
    /// No bytes of this digest were ever accepted here.
    #[error(
        "no plugin with the digest {digest} is kept here: restore the state directory, or drop the file into the plugin directory again"
    )]
    UnknownDigest {
        /// The digest.
        digest: Digest,
    },
    /// An operator revoked it.
    #[error(
        "the plugin with the digest {digest} is revoked: plan the order again with another version"
    )]
    Revoked {
        /// The digest.
        digest: Digest,
    },
    /// Its kept bytes cannot be loaded any more.
    #[error("the plugin with the digest {digest} cannot be loaded: {rejection}")]
    NotLoadable {
        /// The digest.
        digest: Digest,
        /// Why.
        rejection: Rejection,
    },
}

/// A call of a plugin that gave no answer; attributed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("plugin {}@{} ({}), `{export}`: {failure}", plugin.name, plugin.version, plugin.digest.short())]
pub struct CallError {
    /// Which plugin.
    pub plugin: Box<PluginRef>,
    /// Which of its functions.
    pub export: Export,
    /// What happened.
    pub failure: CallFailure,
}

/// What happened in a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallFailure {
    /// The plugin answered with an error of its own, meant for the user.
    #[error("{message} ({code})")]
    Refused {
        /// Its code.
        code: String,
        /// Its message.
        message: String,
        /// The parameter to blame, as a JSON pointer.
        field: Option<String>,
    },
    /// It computed longer than allowed.
    #[error(
        "it computed longer than the limit of {limit_ms} ms: the plugin must be mended, or the limit raised"
    )]
    GuestTime {
        /// The limit.
        limit_ms: u64,
    },
    /// The whole call took longer than allowed.
    #[error("the call took longer than the limit of {limit_ms} ms")]
    CallTime {
        /// The limit.
        limit_ms: u64,
    },
    /// A host function did not answer in time.
    #[error("the host function `{function}` took longer than the limit of {limit_ms} ms")]
    HostCallTime {
        /// The function.
        function: &'static str,
        /// The limit.
        limit_ms: u64,
    },
    /// It called the host too often.
    #[error("it made more than {limit} host calls")]
    HostCalls {
        /// The limit.
        limit: u32,
    },
    /// It wanted more memory than allowed.
    #[error(
        "it wanted more memory than the limit of {limit_bytes} bytes: raise this plugin's memory setting if that is right"
    )]
    Memory {
        /// The limit.
        limit_bytes: u64,
    },
    /// It handed over more than allowed.
    #[error("it handed over more than the limit of {limit_bytes} bytes")]
    Output {
        /// The limit.
        limit_bytes: usize,
    },
    /// It trapped.
    #[error("it trapped: {reason}")]
    Trap {
        /// What the engine says, with the guest's frames.
        reason: String,
    },
    /// An export does not have the type of the contract.
    #[error("it does not fit the contract: {reason}")]
    Mismatch {
        /// Which export, and how it differs.
        reason: String,
    },
    /// Its answer breaks the contract.
    #[error("its answer cannot be used: `{field}` {reason}")]
    InvalidAnswer {
        /// Which field.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// What it was asked is not in the form of the function. The guest was not called.
    #[error("the input cannot be used: {}{reason}", at(field))]
    InvalidInput {
        /// JSON pointer of the field; empty for the whole.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A function was called that its kind does not have.
    #[error("it is a {actual:?}, and has no such function")]
    WrongKind {
        /// What it is.
        actual: PluginKind,
    },
    /// The engine could not start the call.
    #[error("the call could not be started: {reason}")]
    NotStarted {
        /// Why.
        reason: String,
    },
}

impl CallFailure {
    /// Stable code for the API and for metrics.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "plugin_refused",
            Self::GuestTime { .. } => "plugin_time_limit",
            Self::CallTime { .. } => "plugin_call_time_limit",
            Self::HostCallTime { .. } => "plugin_host_call_time_limit",
            Self::HostCalls { .. } => "plugin_host_call_limit",
            Self::Memory { .. } => "plugin_memory_limit",
            Self::Output { .. } => "plugin_output_limit",
            Self::Trap { .. } => "plugin_trap",
            Self::Mismatch { .. } => "plugin_mismatch",
            Self::InvalidAnswer { .. } => "plugin_invalid_answer",
            Self::InvalidInput { .. } => "plugin_invalid_input",
            Self::WrongKind { .. } => "plugin_wrong_kind",
            Self::NotStarted { .. } => "plugin_not_started",
        }
    }

    /// The failure as records and the API show it.
    #[must_use]
    pub fn report(&self) -> FailureReport {
        let field = match self {
            Self::Refused { field, .. } => field.clone(),
            Self::InvalidAnswer { field, .. } | Self::InvalidInput { field, .. } => {
                Some(field.clone())
            }
            Self::GuestTime { .. }
            | Self::CallTime { .. }
            | Self::HostCallTime { .. }
            | Self::HostCalls { .. }
            | Self::Memory { .. }
            | Self::Output { .. }
            | Self::Trap { .. }
            | Self::Mismatch { .. }
            | Self::WrongKind { .. }
            | Self::NotStarted { .. } => None,
        };
        FailureReport {
            code: self.code().to_owned(),
            message: self.to_string(),
            field,
        }
    }

    /// Whether the plugin is at fault: not when it refused its input, and not when the host could not call it or
    /// did not answer it.
    #[must_use]
    pub const fn is_fault(&self) -> bool {
        match self {
            Self::Refused { .. }
            | Self::HostCallTime { .. }
            | Self::InvalidInput { .. }
            | Self::WrongKind { .. }
            | Self::NotStarted { .. } => false,
            Self::GuestTime { .. }
            | Self::CallTime { .. }
            | Self::HostCalls { .. }
            | Self::Memory { .. }
            | Self::Output { .. }
            | Self::Trap { .. }
            | Self::Mismatch { .. }
            | Self::InvalidAnswer { .. } => true,
        }
    }

    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidAnswer {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

fn at(field: &str) -> String {
    if field.is_empty() {
        String::new()
    } else {
        format!("`{field}`: ")
    }
}

/// A failed call, as records and the API show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FailureReport {
    /// Stable code, see [`CallFailure::code`].
    pub code: String,
    /// What happened, which limit, what to do.
    pub message: String,
    /// The field to blame, where one is: a JSON pointer of the plugin's, or a path into its input or answer.
    #[serde(default)]
    pub field: Option<String>,
}

/// A parameter that breaks the plugin's schema.
#[derive(
    Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error, utoipa::ToSchema,
)]
#[error("{}{message}", named(field))]
pub struct FieldError {
    /// JSON pointer into the parameters; empty for the whole.
    pub field: String,
    /// What is wrong.
    pub message: String,
}

/// What a fault is of, before its message; the whole has no name.
fn named(field: &str) -> String {
    if field.is_empty() {
        String::new()
    } else {
        format!("`{field}`: ")
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
