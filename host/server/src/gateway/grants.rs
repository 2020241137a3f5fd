//! The right to download one package: bound to a session and one digest, in memory only, ended with the session.
//!
//! The map is keyed by the SHA-256 of a grant's token, so that looking one up tells nothing about how much of it was right.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;
use windlass_domain::Digest;
use windlass_protocol::{DownloadGrant, SecretText, SessionId};

use crate::ids::random_bytes;

/// Names a grant without being one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct GrantId(Digest);

struct Granted {
    session: SessionId,
    digest: Digest,
    ended: CancellationToken,
}

/// Why a download was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GrantRefusal {
    /// Nobody gave it, or its session has ended.
    #[error(
        "the download grant is not known or its session has ended; a new one comes with the task in the next session"
    )]
    Unknown,
    /// It is for something else.
    #[error("the download grant is for another digest")]
    OtherDigest,
}

/// All grants of a gateway.
#[derive(Default)]
pub(crate) struct Grants {
    granted: Mutex<HashMap<GrantId, Granted>>,
}

impl Grants {
    fn granted(&self) -> std::sync::MutexGuard<'_, HashMap<GrantId, Granted>> {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a session the right to one digest. `ended` is cancelled when the session ends.
    pub(crate) fn give(
        &self,
        session: SessionId,
        digest: Digest,
        ended: CancellationToken,
    ) -> (GrantId, DownloadGrant) {
        let token: String = random_bytes::<32>()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let id = id_of(&token);
        let granted = Granted {
            session,
            digest,
            ended,
        };
        self.granted().insert(id, granted);
        let token = SecretText::new(token);
        (id, DownloadGrant { digest, token })
    }

    /// Checks a download. The answer is cancelled when the right ends.
    pub(crate) fn check(
        &self,
        token: &str,
        digest: Digest,
    ) -> Result<CancellationToken, GrantRefusal> {
        match self.granted().get(&id_of(token)) {
            Some(granted) if granted.ended.is_cancelled() => Err(GrantRefusal::Unknown),
            Some(granted) if granted.digest == digest => Ok(granted.ended.clone()),
            Some(_) => Err(GrantRefusal::OtherDigest),
            None => Err(GrantRefusal::Unknown),
        }
    }

    /// Takes one grant back; a download under way goes on to its end.
    pub(crate) fn take_back(&self, id: GrantId) {
        self.granted().remove(&id);
    }

    /// Forgets the grants of a session.
    pub(crate) fn end(&self, session: SessionId) {
        self.granted()
            .retain(|_, granted| granted.session != session);
    }
}

fn id_of(token: &str) -> GrantId {
    GrantId(Digest::of(token.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_opens_one_digest_until_its_session_ends() {
        let grants = Grants::default();
        let session = SessionId::from_bytes([1; 16]);
        let (wanted, other) = (Digest::of(b"wanted"), Digest::of(b"other"));
        let ended = CancellationToken::new();
        let (id, grant) = grants.give(session, wanted, ended.clone());
        let token = grant.token.reveal();
        assert!(grants.check(token, wanted).is_ok());
        assert_eq!(
            grants.check(token, other).unwrap_err(),
            GrantRefusal::OtherDigest
        );
        assert_eq!(
            grants.check("x", wanted).unwrap_err(),
            GrantRefusal::Unknown
        );
        ended.cancel();
        assert_eq!(
            grants.check(token, wanted).unwrap_err(),
            GrantRefusal::Unknown
        );
        let (_, second) = grants.give(session, other, CancellationToken::new());
        grants.take_back(id);
        grants.end(session);
        assert_eq!(
            grants.check(second.token.reveal(), other).unwrap_err(),
            GrantRefusal::Unknown
        );
    }
}
