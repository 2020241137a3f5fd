//! Activation codes: the text with which a server registers.
//!
//! `wl1-<secret>-<fingerprint>`: 32 hexadecimal digits of a random secret (128 bits) and 64 of the platform's key fingerprint.
//! The platform keeps only the secret's hash ([`ActivationCode::secret_hash`]); the secret has enough entropy that a plain
//! SHA-256 cannot be searched. The fingerprint lets the agent know the platform before it says anything.
//! Source: spec "Managed servers"; design, "Agents".

use std::{fmt, str::FromStr};

use windlass_domain::Digest;

use crate::{fixed::parse_hex, identity::Fingerprint};

/// An activation code. It is a secret: `Debug` shows the fingerprint only; use [`ActivationCode::print`] to show it once.
#[derive(Clone, PartialEq, Eq)]
pub struct ActivationCode {
    secret: [u8; 16],
    fingerprint: Fingerprint,
}

/// Why a text is not an activation code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not an activation code: expected `wl1-`, 32 hexadecimal digits, `-` and 64 hexadecimal digits (101 characters; this has {length}); copy the whole code"
)]
pub struct InvalidActivationCode {
    /// How long the text is, in bytes.
    pub length: usize,
}

impl ActivationCode {
    /// A code from 16 random bytes and the fingerprint of the platform's TLS key.
    #[must_use]
    pub const fn new(secret: [u8; 16], fingerprint: Fingerprint) -> Self {
        Self {
            secret,
            fingerprint,
        }
    }

    /// Reads a code; blanks around it are ignored.
    ///
    /// # Errors
    /// When the text has another form.
    pub fn parse(text: &str) -> Result<Self, InvalidActivationCode> {
        let text = text.trim();
        let invalid = || InvalidActivationCode { length: text.len() };
        let (secret, fingerprint) = text
            .strip_prefix("wl1-")
            .and_then(|rest| rest.split_once('-'))
            .ok_or_else(invalid)?;
        Ok(Self {
            secret: parse_hex(secret).ok_or_else(invalid)?,
            fingerprint: fingerprint.parse().map_err(|_| invalid())?,
        })
    }

    /// The code as text, to be shown once.
    #[must_use]
    pub fn print(&self) -> String {
        let mut text = String::from("wl1-");
        for byte in self.secret {
            text.push_str(&format!("{byte:02x}"));
        }
        format!("{text}-{}", self.fingerprint)
    }

    /// What the platform stores and looks up: SHA-256 of a label and the secret.
    #[must_use]
    pub fn secret_hash(&self) -> Digest {
        let mut bytes = b"windlass activation code 1\n".to_vec();
        bytes.extend_from_slice(&self.secret);
        Digest::of(&bytes)
    }

    /// The fingerprint of the platform's TLS key.
    #[must_use]
    pub const fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

impl fmt::Debug for ActivationCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ActivationCode(wl1-…-{})", self.fingerprint)
    }
}

impl FromStr for ActivationCode {
    type Err = InvalidActivationCode;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_prints_and_parses_and_hides_its_secret() {
        let code = ActivationCode::new([0x5a; 16], Fingerprint::of_key(b"spki"));
        let text = code.print();
        assert_eq!(text.len(), 101);
        assert_eq!(
            ActivationCode::parse(&format!(" {text}\n")),
            Ok(code.clone())
        );
        assert!(!format!("{code:?}").contains("5a5a5a"));
        let other = ActivationCode::new([0x5b; 16], Fingerprint::of_key(b"spki"));
        assert_ne!(code.secret_hash(), other.secret_hash());
    }

    #[test]
    fn other_texts_are_refused() {
        let good = ActivationCode::new([1; 16], Fingerprint::of_key(b"k")).print();
        for text in [
            "",
            "wl1-",
            "wl2-aa-bb",
            &good[..100],
            &good.replace("wl1", "wl2"),
        ] {
            assert_eq!(
                ActivationCode::parse(text),
                Err(InvalidActivationCode { length: text.len() }),
                "{text}"
            );
        }
    }
}
