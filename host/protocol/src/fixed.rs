//! Values of a fixed number of bytes, written as lower-case hexadecimal digits: nonces, epochs, keys, signatures.
//!
//! The random bytes are inputs; this crate makes none up.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Why a text is not a value of so many bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not {what}: expected {digits} lower-case hexadecimal digits")]
pub struct InvalidHex {
    /// The kind of value, with its article.
    pub what: &'static str,
    /// How many digits it has.
    pub digits: usize,
}

pub(crate) fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    fn nibble(digit: u8) -> Option<u8> {
        match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        }
    }
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

macro_rules! fixed {
    ($($(#[$doc:meta])* $name:ident, $len:literal, $what:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; $len]);

        impl $name {
            /// Takes bytes that the caller produced.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// The bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidHex;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                parse_hex(text).map(Self).ok_or(InvalidHex { what: $what, digits: 2 * $len })
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidHex;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    )*};
}

fixed! {
    /// 32 random bytes that make one handshake unlike any other.
    Nonce, 32, "a nonce";
    /// Names one life of an agent's journal: 16 random bytes, made when the journal file is made. Sent in the hello.
    Epoch, 16, "a journal epoch";
    /// Names one session: 16 random bytes, made by the gateway.
    SessionId, 16, "a session id";
    /// An Ed25519 public key. Not checked to be a valid point until it verifies something.
    PublicKey, 32, "a public key";
    /// An Ed25519 signature.
    Signature, 64, "a signature";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_both_ways() {
        let epoch = Epoch::from_bytes([0xa5; 16]);
        assert_eq!(epoch.to_string(), "a5".repeat(16));
        assert_eq!(epoch.to_string().parse(), Ok(epoch));
        for text in [
            "",
            "a5",
            &"A5".repeat(16),
            &"g5".repeat(16),
            &"a5".repeat(17),
        ] {
            assert!(text.parse::<Epoch>().is_err(), "{text}");
        }
        assert_eq!(
            "x".parse::<Nonce>().unwrap_err().to_string(),
            "not a nonce: expected 64 lower-case hexadecimal digits"
        );
    }
}
