//! Services: one module per resource, between the API (or another way in) and the store, the plugins and the engine.
//!
//! A service takes parsed values and a [`Caller`], checks the rules of its resource, and writes everything that belongs
//! together with one transaction, the caller's idempotency record among it. It knows no HTTP.

use windlass_store::Txn;

/// Who asks, and what is committed together with the change.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// The token's name: what records show as author.
    pub name: String,
    /// The idempotency record of the request: part of the first transaction that the service commits.
    pub with: Txn,
}

/// Why a service refused or failed. Each variant is one kind of answer; the texts are for the person who asked.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// There is no such thing (or it is another tenant's).
    #[error("there is no {what} `{id}`")]
    NotFound {
        /// What kind of thing, for example `workspace`.
        what: &'static str,
        /// As asked.
        id: String,
    },
    /// A field is not what it must be.
    #[error("{message}")]
    Invalid {
        /// Stable code, for example `parameters_invalid`.
        code: &'static str,
        /// The field, as a JSON pointer or a query parameter's name.
        field: String,
        /// What is wrong.
        message: String,
        /// What to do.
        mend: String,
    },
    /// A limit is reached.
    #[error("{message}")]
    Limit {
        /// Stable code, for example `package_too_large`.
        code: &'static str,
        /// The field.
        field: String,
        /// What is limited, with both figures.
        message: String,
        /// The limit.
        limit: u64,
        /// The figure that was asked for or is there.
        current: u64,
        /// What to do.
        mend: String,
    },
    /// The state of things does not allow it.
    #[error("{message}")]
    Conflict {
        /// Stable code, for example `name_taken`.
        code: &'static str,
        /// What stands in the way.
        message: String,
        /// What to do.
        mend: String,
    },
    /// `If-Match` names another revision than the current one.
    #[error("the {what} was changed since it was read: it is at revision {current} now")]
    Changed {
        /// What kind of thing.
        what: &'static str,
        /// Its revision.
        current: u64,
    },
    /// A plugin failed or refused; attributed.
    #[error("{message}")]
    Plugin {
        /// Stable code, for example `plugin_call_failed`.
        code: &'static str,
        /// Plugin, version, function, and what was exceeded or said.
        message: String,
        /// What to do.
        mend: String,
    },
    /// It cannot be done now; trying again may help.
    #[error("{message}")]
    Unavailable {
        /// What stands in the way.
        message: String,
    },
    /// A fault of the server itself; logged with its cause, told without.
    #[error("the server failed to {doing}")]
    Internal {
        /// What it was about to do.
        doing: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
