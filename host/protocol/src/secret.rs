//! Texts that must never be printed: resolved secrets and download grants.

use std::fmt;

use serde::{Deserialize, Serialize};
use windlass_domain::Digest;

/// A secret text. Written as plain text inside an encrypted session only; `Debug` shows nothing of it and there is no `Display`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretText(String);

impl SecretText {
    /// Wraps a secret.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The secret itself: for handing it to a process or into a header, never for a record, a message or a log.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText(…)")
    }
}

/// The right to download one package, bound to the session it was given in. It ends with the session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownloadGrant {
    /// The digest that may be downloaded.
    pub digest: Digest,
    /// Sent as `Authorization: Bearer …`. At least 128 random bits; letters, digits, `-` and `_` only.
    pub token: SecretText,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_printed() {
        let grant = DownloadGrant {
            digest: Digest::of(b"x"),
            token: SecretText::new("hunter2".into()),
        };
        assert!(!format!("{grant:?}").contains("hunter2"));
        assert_eq!(grant.token.reveal(), "hunter2");
    }
}
