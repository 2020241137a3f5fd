//! API tokens, as they are stored: hashed. Source: spec "Tenants, access".

use serde::{Deserialize, Serialize};

use crate::{digest::Digest, id::TokenId, name::TokenName, time::Timestamp};

/// An API token. Every token is an administrator's until roles exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: TokenId,
    /// Name of the caller that it stands for.
    pub name: TokenName,
    /// SHA-256 of the token: 256 random bits need no slow hash.
    pub hash: Digest,
    /// Until when it can be used; `None`: until it is revoked.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
}

impl Token {
    /// The current [`Token::schema`].
    pub const SCHEMA: u32 = 1;
}
