//! Who is who: key pairs, the platform's fingerprint, and the bytes that both sides sign in a handshake.
//!
//! Both sides hold an Ed25519 key. The agent's is made on the server at registration and never leaves it; the platform's public
//! key comes with the registration's answer. A signature is over a [`Transcript`], which names everything that must be the same
//! on both sides.

use std::{fmt, str::FromStr};

use ed25519_dalek::{Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};
use windlass_domain::{Digest, digest::InvalidDigest, id::ServerId};

use crate::{
    code::ActivationCode,
    fixed::{Epoch, Nonce, PublicKey, SessionId, Signature},
};

/// SHA-256 of the SubjectPublicKeyInfo (DER) of the platform's TLS certificate. Text: 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(Digest);

impl Fingerprint {
    /// The fingerprint of a key: `spki` is the DER of the certificate's SubjectPublicKeyInfo (rcgen: `public_key_der`/
    /// `subject_public_key_info`; rustls: `ParsedCertificate::subject_public_key_info`).
    #[must_use]
    pub fn of_key(spki: &[u8]) -> Self {
        Self(Digest::of(spki))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for Fingerprint {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// A key pair. `Debug` shows the public half only.
#[derive(Clone)]
pub struct Identity(SigningKey);

/// A signature does not fit its message and key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the signature of the {signer} does not fit this handshake and key")]
pub struct BadSignature {
    /// Whose signature was checked.
    pub signer: Role,
}

/// Who signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The agent, in its hello or its registration.
    Agent,
    /// The platform, in its welcome.
    Server,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Agent => "agent",
            Self::Server => "server",
        })
    }
}

impl Identity {
    /// A key pair from 32 random bytes, which are the private key: keep them in a file with mode 0600.
    #[must_use]
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self(SigningKey::from_bytes(&seed))
    }

    /// The public half.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        PublicKey::from_bytes(self.0.verifying_key().to_bytes())
    }

    /// The agent's signature in a hello.
    #[must_use]
    pub fn sign_hello(&self, transcript: &Transcript, epoch: Epoch) -> Signature {
        self.sign(&transcript.hello_bytes(epoch))
    }

    /// The platform's signature in a welcome.
    #[must_use]
    pub fn sign_welcome(&self, transcript: &Transcript, session: SessionId) -> Signature {
        self.sign(&transcript.welcome_bytes(session))
    }

    /// The agent's proof, in its registration, that it holds the private half of the key it registers.
    #[must_use]
    pub fn sign_registration(&self, code: &ActivationCode) -> Signature {
        self.sign(&registration_bytes(code, self.public_key()))
    }

    fn sign(&self, bytes: &[u8]) -> Signature {
        Signature::from_bytes(self.0.sign(bytes).to_bytes())
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.public_key())
    }
}

/// Checks an agent's proof of possession in a registration.
///
/// # Errors
/// When the signature was not made with the private half of `key` for this code.
pub fn verify_registration(
    key: PublicKey,
    code: &ActivationCode,
    proof: &Signature,
) -> Result<(), BadSignature> {
    verify(key, &registration_bytes(code, key), proof, Role::Agent)
}

fn registration_bytes(code: &ActivationCode, key: PublicKey) -> Vec<u8> {
    format!(
        "windlass agent registration 1\n{}\n{}\n{key}\n",
        code.secret_hash(),
        code.fingerprint()
    )
    .into_bytes()
}

/// What must be the same on both sides of a handshake. Each side fills it from what it sees itself: the agent takes the
/// fingerprint of the certificate that the connection showed, the platform that of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transcript {
    /// The protocol version of the session.
    pub protocol: u32,
    /// The server that the agent says it is.
    pub server_id: ServerId,
    /// The platform's nonce, from its challenge.
    pub server_nonce: Nonce,
    /// The agent's nonce, from its hello.
    pub agent_nonce: Nonce,
    /// The platform's TLS key.
    pub fingerprint: Fingerprint,
}

impl Transcript {
    /// Checks the signature in a hello against the key that this server registered.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn verify_hello(
        &self,
        key: PublicKey,
        epoch: Epoch,
        signature: &Signature,
    ) -> Result<(), BadSignature> {
        verify(key, &self.hello_bytes(epoch), signature, Role::Agent)
    }

    /// Checks the signature in a welcome against the platform's key from the registration.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn verify_welcome(
        &self,
        key: PublicKey,
        session: SessionId,
        signature: &Signature,
    ) -> Result<(), BadSignature> {
        verify(key, &self.welcome_bytes(session), signature, Role::Server)
    }

    fn hello_bytes(&self, epoch: Epoch) -> Vec<u8> {
        format!("{}epoch {epoch}\n", self.common(Role::Agent)).into_bytes()
    }

    fn welcome_bytes(&self, session: SessionId) -> Vec<u8> {
        format!("{}session {session}\n", self.common(Role::Server)).into_bytes()
    }

    /// One line per field, each of a fixed form without line ends, so no two transcripts have the same bytes.
    fn common(&self, role: Role) -> String {
        let Self {
            protocol,
            server_id,
            server_nonce,
            agent_nonce,
            fingerprint,
        } = self;
        format!(
            "windlass agent session 1\nrole {role}\nprotocol {protocol}\nserver {server_id}\nserver-nonce {server_nonce}\nagent-nonce {agent_nonce}\ntls {fingerprint}\n"
        )
    }
}

fn verify(
    key: PublicKey,
    bytes: &[u8],
    signature: &Signature,
    signer: Role,
) -> Result<(), BadSignature> {
    let signature = ed25519_dalek::Signature::from_bytes(signature.as_bytes());
    // `verify_strict` refuses keys of small order, which would accept any message.
    VerifyingKey::from_bytes(key.as_bytes())
        .and_then(|key| key.verify_strict(bytes, &signature))
        .map_err(|_| BadSignature { signer })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcript() -> Transcript {
        Transcript {
            protocol: 1,
            server_id: "srv_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f".parse().unwrap(),
            server_nonce: Nonce::from_bytes([1; 32]),
            agent_nonce: Nonce::from_bytes([2; 32]),
            fingerprint: Fingerprint::of_key(b"spki"),
        }
    }

    #[test]
    fn a_signature_fits_exactly_one_handshake_role_and_key() {
        let agent = Identity::from_seed([7; 32]);
        let epoch = Epoch::from_bytes([3; 16]);
        let signature = agent.sign_hello(&transcript(), epoch);
        let good = transcript();
        assert_eq!(
            good.verify_hello(agent.public_key(), epoch, &signature),
            Ok(())
        );

        let refused = Err(BadSignature {
            signer: Role::Agent,
        });
        let changed = [
            Transcript {
                protocol: 2,
                ..good
            },
            Transcript {
                server_id: "srv_01931c0c5b7e7c2e8a4f6d1b2c3d4e60".parse().unwrap(),
                ..good
            },
            Transcript {
                server_nonce: Nonce::from_bytes([9; 32]),
                ..good
            },
            Transcript {
                agent_nonce: Nonce::from_bytes([9; 32]),
                ..good
            },
            Transcript {
                fingerprint: Fingerprint::of_key(b"other"),
                ..good
            },
        ];
        for transcript in changed {
            assert_eq!(
                transcript.verify_hello(agent.public_key(), epoch, &signature),
                refused,
                "{transcript:?}"
            );
        }
        let other_epoch = Epoch::from_bytes([4; 16]);
        assert_eq!(
            good.verify_hello(agent.public_key(), other_epoch, &signature),
            refused
        );
        let other_key = Identity::from_seed([8; 32]).public_key();
        assert_eq!(good.verify_hello(other_key, epoch, &signature), refused);
        // The same 16 bytes as a session id: a hello reflected as a welcome is refused.
        assert!(
            good.verify_welcome(
                agent.public_key(),
                SessionId::from_bytes([3; 16]),
                &signature
            )
            .is_err()
        );
    }

    #[test]
    fn a_welcome_is_bound_to_its_session() {
        let server = Identity::from_seed([9; 32]);
        let session = SessionId::from_bytes([5; 16]);
        let signature = server.sign_welcome(&transcript(), session);
        assert_eq!(
            transcript().verify_welcome(server.public_key(), session, &signature),
            Ok(())
        );
        let other = SessionId::from_bytes([6; 16]);
        assert!(
            transcript()
                .verify_welcome(server.public_key(), other, &signature)
                .is_err()
        );
    }

    #[test]
    fn a_registration_proves_its_key() {
        let code = ActivationCode::new([1; 16], Fingerprint::of_key(b"spki"));
        let agent = Identity::from_seed([7; 32]);
        let proof = agent.sign_registration(&code);
        assert_eq!(
            verify_registration(agent.public_key(), &code, &proof),
            Ok(())
        );
        let other = ActivationCode::new([2; 16], Fingerprint::of_key(b"spki"));
        assert!(verify_registration(agent.public_key(), &other, &proof).is_err());
        // A key of small order accepts nothing.
        assert!(
            verify_registration(
                PublicKey::from_bytes([0; 32]),
                &code,
                &Signature::from_bytes([0; 64])
            )
            .is_err()
        );
    }
}
