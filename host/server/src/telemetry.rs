//! Logs: to standard error, by `tracing`.
//!
//! `WINDLASS_LOG` filters them, for example `info,windlass::engine=debug`; `info` unless given.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// Form of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Sets logging up, once for the process, with `default` where `WINDLASS_LOG` says nothing. A filter that cannot be read is
/// told and replaced by `info`.
pub fn init(format: LogFormat, default: &str) {
    let wanted = std::env::var("WINDLASS_LOG").unwrap_or_else(|_| default.to_owned());
    let (filter, wrong) = match EnvFilter::try_new(&wanted) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Colours are for people in front of a terminal, not for files.
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let set = match format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().try_init(),
    };
    if set.is_err() {
        tracing::debug!("logging was set up before");
    }
    if let Some(error) = wrong {
        tracing::warn!(%error, "WINDLASS_LOG cannot be read; `info` is used");
    }
}
