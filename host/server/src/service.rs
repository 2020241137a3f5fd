//! Services: one module per resource, between the API (or another way in) and the store, the plugins and the engine.
//!
//! A service takes parsed values and a [`Caller`], checks the rules of its resource, and writes everything that belongs
//! together with one transaction, the caller's idempotency record among it. It knows no HTTP.
//!
//! ```text
//! request ─► read ─► check (typed error) ─► transaction with preconditions on what was read ─► commit ─► answer
//!              ▲                                                                                 │ conflict
//!              └─────────────────────────────────────────────────────────────────────────────────┘ at most 16 times
//! ```

pub mod activation_codes;
pub mod apps;
pub mod certificates;
mod chosen;
pub mod diagnoses;
pub mod events;
pub mod idempotency;
pub mod instances;
pub mod invocations;
pub mod load_balancers;
pub mod looks;
pub mod notifications;
pub mod orders;
pub mod packages;
pub mod planning;
pub mod plugin_calls;
pub mod plugin_events;
pub mod plugins;
pub mod pools;
pub(crate) mod records;
pub mod retention;
pub mod servers;
pub mod shadows;
pub mod templates;
pub mod tokens;
pub mod workspaces;

use windlass_store::{BlobError, CommitError, StoreError, Txn};

pub use records::{PAGE_MAX_SIZE, PageOf, PageRequest};

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
    /// A quota is used up; it is renewed by itself.
    #[error("{message}")]
    Exhausted {
        /// Stable code, for example `invocation_quota_reached`.
        code: &'static str,
        /// What is limited, with both figures, and when it is renewed.
        message: String,
        /// The quota.
        limit: u64,
        /// What is used.
        current: u64,
        /// What to do.
        mend: String,
        /// When there is more, in seconds.
        renews_in_s: u64,
    },
    /// The disk has too little free space.
    #[error("{message}")]
    StorageFull {
        /// What is stored where, with the figures.
        message: String,
        /// The space that has to stay free, in bytes.
        limit: u64,
        /// The space that would be free, in bytes.
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
    /// The same request, under the same idempotency key, was carried out meanwhile: its answer is in the idempotency records.
    #[error("the same request was carried out at the same time; read its answer again")]
    Replay,
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

impl ServiceError {
    /// The stable code of the error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "not_found",
            Self::Invalid { code, .. }
            | Self::Limit { code, .. }
            | Self::Exhausted { code, .. }
            | Self::Conflict { code, .. }
            | Self::Plugin { code, .. } => code,
            Self::Changed { .. } => "changed",
            Self::StorageFull { .. } => "storage_full",
            Self::Replay => "idempotent_request_under_way",
            Self::Unavailable { .. } => "unavailable",
            Self::Internal { .. } => "internal",
        }
    }

    pub(crate) fn not_found(what: &'static str, id: impl std::fmt::Display) -> Self {
        Self::NotFound {
            what,
            id: id.to_string().chars().take(80).collect(),
        }
    }

    /// A field that breaks a rule.
    pub(crate) fn invalid(
        code: &'static str,
        field: impl Into<String>,
        message: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            code,
            field: field.into(),
            message: message.into(),
            mend: mend.into(),
        }
    }

    pub(crate) fn conflict(
        code: &'static str,
        message: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self::Conflict {
            code,
            message: message.into(),
            mend: mend.into(),
        }
    }

    pub(crate) fn taken(what: &'static str, field: &'static str, value: &str) -> Self {
        Self::conflict(
            "name_taken",
            format!("the {field} `{value}` is taken by another {what}"),
            format!("choose another {field}"),
        )
    }

    /// A deletion or change of something that others refer to. Names the first 20 of them.
    pub(crate) fn in_use(what: &'static str, id: &str, by: &[String]) -> Self {
        let list = windlass_domain::text::first_of(by.iter(), 20, ", ");
        Self::conflict(
            "in_use",
            format!("the {what} `{id}` is in use by: {list}"),
            "remove or change these first",
        )
    }

    pub(crate) fn internal(
        doing: &'static str,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self::Internal {
            doing,
            source: Box::new(source),
        }
    }

    /// A value of the domain that was refused, with the field it came from.
    pub(crate) fn of_value(
        (field, error): (&'static str, windlass_domain::name::InvalidValue),
    ) -> Self {
        match (error.limit, error.current) {
            (Some(limit), Some(current)) => Self::Limit {
                code: "out_of_limit",
                field: field.to_owned(),
                message: error.message,
                limit,
                current,
                mend: format!("give a value of `{field}` within the limit"),
            },
            _ => Self::invalid(
                "invalid_value",
                field,
                error.message,
                format!("correct `{field}`"),
            ),
        }
    }
}

impl From<StoreError> for ServiceError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Closed => Self::Unavailable {
                message: "the server is shutting down; try again shortly".to_owned(),
            },
            error => Self::internal("read or write the store", error),
        }
    }
}

impl From<CommitError> for ServiceError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Store(error) => error.into(),
            CommitError::Conflict { .. } => Self::Unavailable {
                message: "others changed the same records at the same time; try again".to_owned(),
            },
            error @ (CommitError::Limit(_) | CommitError::LeaseOver { .. }) => {
                Self::internal("commit a change", error)
            }
        }
    }
}

impl From<windlass_store::LimitError> for ServiceError {
    fn from(error: windlass_store::LimitError) -> Self {
        Self::internal("commit a change", error)
    }
}

impl From<BlobError> for ServiceError {
    fn from(error: BlobError) -> Self {
        Self::internal("read or write a blob", error)
    }
}
