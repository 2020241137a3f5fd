//! Which files are trusted as plugins: digests that are allowed, and signatures by keys that are known.
//!
//! Both are settings of the server, off unless given. A signature stands beside its file as `<file>.sig`: an Ed25519 signature
//! over the file's bytes, 64 bytes raw or as base64 text. What is asked of a file:
//!
//! | keys | required | signature | accepted |
//! | --- | --- | --- | --- |
//! | none | no | any | yes; a signature is not looked at |
//! | some | no | none | yes, as unsigned |
//! | some | yes | none | no: `unsigned` |
//! | some | any | by a known key | yes, as signed by it |
//! | some | any | anything else | no: `signature-invalid` |
//!
//! With an allow-list, the digest must also be on it. The same is asked of a plugin that a file provided before it was replaced
//! by something bad, but not of bytes that running orders are pinned to: those were accepted when they were planned with, and
//! are stopped by revoking them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use ed25519_dalek::{Signature, VerifyingKey};
use windlass_domain::digest::Digest;

use crate::error::{Rejection, RejectionCode};

/// Most bytes of a key or of a list that are read.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Which files are trusted.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    /// Known keys by name.
    keys: BTreeMap<String, VerifyingKey>,
    require_signature: bool,
    allowed: Option<BTreeSet<Digest>>,
}

/// Why a setting of trust cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file or directory cannot be read.
    #[error("{} cannot be read", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file that holds no key.
    #[error(
        "{} holds no Ed25519 public key: give 32 bytes as base64 or hexadecimal text, or PEM as `openssl pkey -pubout` writes it", path.display()
    )]
    NoKey {
        /// Which.
        path: PathBuf,
    },
    /// A line that is no digest.
    #[error("{}, line {line}: `{text}` is no SHA-256 digest of 64 hexadecimal digits", path.display())]
    NoDigest {
        /// Which list.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The line, cut.
        text: String,
    },
    /// Signatures are required, and no key is known.
    #[error(
        "signatures are required but no key is given: no plugin could be accepted; give --plugin-keys"
    )]
    NoKeys,
}

impl Trust {
    /// Reads settings: a file that holds a key or a directory of such files (`name.pub`, `name.pem`); whether every file must be
    /// signed; a file of digests, one a line, `#` begins a comment.
    ///
    /// # Errors
    /// [`TrustError`]: a server does not start with less trust than it was told to.
    pub fn read(
        keys: Option<&Path>,
        require_signature: bool,
        allow_list: Option<&Path>,
    ) -> Result<Self, TrustError> {
        let keys = keys.map(read_keys).transpose()?.unwrap_or_default();
        if require_signature && keys.is_empty() {
            return Err(TrustError::NoKeys);
        }
        Ok(Self {
            keys,
            require_signature,
            allowed: allow_list.map(read_digests).transpose()?,
        })
    }

    /// Checks a file's digest and signature; gives the name of the key that signed it.
    pub(crate) fn check(
        &self,
        digest: Digest,
        bytes: &[u8],
        signature: Option<&[u8]>,
    ) -> Result<Option<String>, Rejection> {
        self.check_allowed(digest)?;
        if self.keys.is_empty() {
            return Ok(None);
        }
        let Some(signature) = signature else {
            return if self.require_signature {
                Err(unsigned())
            } else {
                Ok(None)
            };
        };
        let invalid = |reason: &str| {
            Rejection::new(
                RejectionCode::SignatureInvalid,
                format!("its signature {reason}"),
            )
        };
        let signature = parse_signature(signature).ok_or_else(|| {
            invalid("is not an Ed25519 signature: 64 bytes, raw or as base64 text")
        })?;
        self.keys
            .iter()
            .find(|(_, key)| key.verify_strict(bytes, &signature).is_ok())
            .map(|(name, _)| Some(name.clone()))
            .ok_or_else(|| {
                let names: Vec<&str> = self.keys.keys().map(String::as_str).collect();
                invalid(&format!(
                    "fits these bytes with none of the known keys ({}): sign the file again, or add its key",
                    names.join(", ")
                ))
            })
    }

    /// Whether bytes that were accepted before would be accepted now.
    pub(crate) fn check_accepted(
        &self,
        digest: Digest,
        signed_by: Option<&str>,
    ) -> Result<(), Rejection> {
        self.check_allowed(digest)?;
        let is_signed = signed_by.is_some_and(|name| self.keys.contains_key(name));
        if self.require_signature && !is_signed {
            return Err(unsigned());
        }
        Ok(())
    }

    fn check_allowed(&self, digest: Digest) -> Result<(), Rejection> {
        match &self.allowed {
            Some(allowed) if !allowed.contains(&digest) => Err(Rejection::new(
                RejectionCode::NotAllowed,
                format!(
                    "its digest {digest} is not on this server's allow-list: add it there and restart the server, or remove the file"
                ),
            )),
            Some(_) | None => Ok(()),
        }
    }
}

fn unsigned() -> Rejection {
    Rejection::new(
        RejectionCode::Unsigned,
        "it is not signed, and this server requires it: put the signature beside it as `<file>.sig`",
    )
}

fn parse_signature(bytes: &[u8]) -> Option<Signature> {
    if let Ok(signature) = Signature::from_slice(bytes) {
        return Some(signature);
    }
    let text = std::str::from_utf8(bytes).ok()?;
    let text: String = text.split_whitespace().collect();
    Signature::from_slice(&BASE64.decode(text).ok()?).ok()
}

fn read_limited(path: &Path) -> Result<String, TrustError> {
    use std::io::Read as _;
    let unreadable = |source| TrustError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text))
        .map_err(unreadable)?;
    Ok(text)
}

fn read_keys(path: &Path) -> Result<BTreeMap<String, VerifyingKey>, TrustError> {
    let unreadable = |source| TrustError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let mut files = Vec::new();
    if fs::metadata(path).map_err(unreadable)?.is_dir() {
        for entry in fs::read_dir(path).map_err(unreadable)? {
            let file = entry.map_err(unreadable)?.path();
            if file
                .extension()
                .is_some_and(|extension| extension == "pub" || extension == "pem")
            {
                files.push(file);
            }
        }
        files.sort();
    } else {
        files.push(path.to_owned());
    }
    files
        .into_iter()
        .map(|file| {
            let name = file
                .file_stem()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            let key = parse_key(&read_limited(&file)?)
                .ok_or_else(|| TrustError::NoKey { path: file.clone() })?;
            Ok((name, key))
        })
        .collect()
}

/// PEM (SubjectPublicKeyInfo), base64 or hexadecimal text.
fn parse_key(text: &str) -> Option<VerifyingKey> {
    /// The start of the DER form of an Ed25519 public key: RFC 8410.
    const DER_PREFIX: [u8; 12] = [
        0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
    ];
    let is_pem = text.contains("-----BEGIN PUBLIC KEY-----");
    let body: String = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with("-----") && !line.starts_with('#'))
        .collect();
    let bytes = if is_pem {
        BASE64
            .decode(body)
            .ok()?
            .strip_prefix(&DER_PREFIX)?
            .to_vec()
    } else if body.len() == 64 {
        (0..32)
            .map(|at| u8::from_str_radix(body.get(2 * at..2 * at + 2)?, 16).ok())
            .collect::<Option<Vec<u8>>>()?
    } else {
        BASE64.decode(body).ok()?
    };
    VerifyingKey::from_bytes(&bytes.try_into().ok()?).ok()
}

fn read_digests(path: &Path) -> Result<BTreeSet<Digest>, TrustError> {
    let text = read_limited(path)?;
    let mut digests = BTreeSet::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default();
        // As `sha256sum` writes it: the digest, then the file.
        let Some(digest) = line.split_whitespace().next() else {
            continue;
        };
        digests.insert(digest.parse().map_err(|_| TrustError::NoDigest {
            path: path.to_owned(),
            line: index + 1,
            text: digest.chars().take(80).collect(),
        })?);
    }
    Ok(digests)
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::{Signer as _, SigningKey};

    use super::*;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    #[test]
    fn the_table_of_the_head_holds() {
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("keys");
        fs::create_dir(&keys).unwrap();
        let text = |seed| BASE64.encode(key(seed).verifying_key().as_bytes());
        fs::write(keys.join("anna.pub"), format!("# Anna\n{}\n", text(1))).unwrap();
        fs::write(keys.join("README"), "no key").unwrap();
        let bytes = b"plugin";
        let digest = Digest::of(bytes);
        let raw = key(1).sign(bytes).to_bytes().to_vec();
        let base64 = format!("{}\n", BASE64.encode(&raw)).into_bytes();
        let other = key(2).sign(bytes).to_bytes().to_vec();
        let anna = Some("anna".to_owned());
        let check = |keys: Option<&Path>, required, signature: Option<&[u8]>| {
            Trust::read(keys, required, None)
                .unwrap()
                .check(digest, bytes, signature)
                .map_err(|rejection| rejection.code)
        };
        let keys = Some(keys.as_path());
        for (given, required, signature, expect) in [
            (None, false, None, Ok(None)),
            (None, false, Some(&b"nonsense"[..]), Ok(None)),
            (keys, false, None, Ok(None)),
            (keys, true, None, Err(RejectionCode::Unsigned)),
            (keys, true, Some(&raw[..]), Ok(anna.clone())),
            (keys, false, Some(&base64[..]), Ok(anna.clone())),
            (
                keys,
                false,
                Some(&other[..]),
                Err(RejectionCode::SignatureInvalid),
            ),
            (
                keys,
                false,
                Some(&b"nonsense"[..]),
                Err(RejectionCode::SignatureInvalid),
            ),
        ] {
            assert_eq!(
                check(given, required, signature),
                expect,
                "{required} {signature:?}"
            );
        }
        assert!(matches!(
            Trust::read(None, true, None),
            Err(TrustError::NoKeys)
        ));
    }

    #[test]
    fn keys_come_in_three_forms_and_others_are_refused() {
        let key = key(3).verifying_key();
        let hex: String = key
            .as_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let mut der = vec![
            0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
        ];
        der.extend_from_slice(key.as_bytes());
        let pem = format!(
            "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
            BASE64.encode(der)
        );
        for text in [BASE64.encode(key.as_bytes()), hex, pem] {
            assert_eq!(parse_key(&text), Some(key), "{text}");
        }
        for text in [
            "",
            "abc",
            "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
        ] {
            assert_eq!(parse_key(text), None, "{text}");
        }
    }

    #[test]
    fn an_allow_list_is_read_as_sha256sum_writes_it() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("allowed");
        let (one, two) = (Digest::of(b"one"), Digest::of(b"two"));
        fs::write(&list, format!("# ours\n{one}  one.wasm\n\n")).unwrap();
        let trust = Trust::read(None, false, Some(&list)).unwrap();
        assert_eq!(trust.check(one, b"one", None), Ok(None));
        assert_eq!(
            trust.check(two, b"two", None).unwrap_err().code,
            RejectionCode::NotAllowed
        );
        assert!(trust.check_accepted(one, None).is_ok());
        assert!(trust.check_accepted(two, Some("anna")).is_err());
        fs::write(&list, "abc").unwrap();
        let error = Trust::read(None, false, Some(&list)).unwrap_err();
        assert!(
            matches!(error, TrustError::NoDigest { line: 1, .. }),
            "{error}"
        );
    }
}
