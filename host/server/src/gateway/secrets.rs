//! Secrets of workspaces: kept sealed in the store, opened only while a task is pushed to its agent.
//!
//! Row: `secret/{workspace}/{name}` below the tenant. Sealed with ChaCha20-Poly1305 under a key in a 0600 file outside the
//! store, so that neither the store's files nor a backup without that file show a secret. The row's key is authenticated
//! with it: a row that was moved to another name does not open. Values never appear in an error, a log or `Debug`.
//! Source: design, "Secrets are a type".

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use async_trait::async_trait;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use windlass_domain::Timestamp;
use windlass_protocol::SecretText;
use windlass_store::{
    CommitError, Key, LimitError, PAGE_MAX_ENTRIES, Prefix, Store, StoreError, Txn,
};

use super::identity::{self, IdentityError};
use crate::{clock, ids::random_bytes};

/// Longest value of a secret, in bytes: sealed and written as base64 it fits a row.
pub const SECRET_MAX_BYTES: usize = 16 * 1024;
/// Longest name of a secret.
pub const SECRET_NAME_MAX_CHARS: usize = 64;
/// Most secrets of a workspace.
pub const SECRETS_PER_WORKSPACE: usize = 1000;

/// Where the gateway gets the values of secrets from.
#[async_trait]
pub trait SecretSource: Send + Sync + 'static {
    /// The values of these secrets of a workspace. A name without a value is not in the answer.
    ///
    /// # Errors
    /// [`SecretError`]: nothing can be said now; asked again later.
    async fn resolve(
        &self,
        workspace: &str,
        names: &BTreeSet<String>,
    ) -> Result<BTreeMap<String, SecretText>, SecretError>;
}

/// Why a secret could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The name has another form.
    #[error(
        "`{name}` cannot name a secret: use 1 to {SECRET_NAME_MAX_CHARS} letters, digits, `_`, `-` and `.`, beginning with a letter or `_`"
    )]
    Name {
        /// The name, cut.
        name: String,
    },
    /// The value is too long or empty.
    #[error("the value has {found_bytes} bytes; a secret has 1 to {SECRET_MAX_BYTES}")]
    Size {
        /// Its size.
        found_bytes: usize,
    },
    /// The workspace has too many.
    #[error(
        "the workspace has {found} secrets, the limit is {SECRETS_PER_WORKSPACE}; delete one first"
    )]
    TooMany {
        /// How many there are.
        found: usize,
    },
    /// The row does not open with this platform's key.
    #[error(
        "the secret `{name}` cannot be opened with the key file of this platform; set it again, or restore the key file from the same backup"
    )]
    Sealed {
        /// Its name.
        name: String,
    },
    /// The key file.
    #[error("the key of the secrets cannot be used")]
    Key(#[source] IdentityError),
    /// The store failed.
    #[error("the store failed while a secret was read or written")]
    Store(#[from] StoreError),
    /// The store did not take it.
    #[error("the secret was not written")]
    Commit(#[from] CommitError),
    /// The workspace's name is no key.
    #[error("the workspace's name cannot be used")]
    Workspace(#[from] LimitError),
}

/// What everybody may know about a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SecretInfo {
    /// Its name: what `secret_ref` refers to.
    pub name: String,
    /// When its value was set last.
    pub updated_at: Timestamp,
}

/// A row.
#[derive(Serialize, Deserialize)]
struct Sealed {
    schema: u32,
    updated_at: Timestamp,
    /// Base64 of the nonce.
    nonce: String,
    /// Base64 of the value and its tag, encrypted.
    sealed: String,
}

/// The secrets of all workspaces. Cheap to clone.
#[derive(Clone)]
pub struct SecretVault {
    store: Arc<dyn Store>,
    key: Arc<LessSafeKey>,
}

impl SecretVault {
    /// Opens the vault; makes its key file where there is none. Blocks on the file; called once at start.
    ///
    /// # Errors
    /// [`SecretError::Key`].
    pub fn open(store: Arc<dyn Store>, key_file: &Path) -> Result<Self, SecretError> {
        let bytes = identity::load_or_create(key_file, || Ok(random_bytes::<32>().to_vec()))
            .map_err(SecretError::Key)?;
        let key = UnboundKey::new(&CHACHA20_POLY1305, &bytes).map_err(|_| {
            SecretError::Key(IdentityError::Malformed {
                path: key_file.to_owned(),
                expected: "a key of 32 bytes",
            })
        })?;
        let key = Arc::new(LessSafeKey::new(key));
        Ok(Self { store, key })
    }

    /// Sets a secret. `with` is committed together with it: an idempotency record.
    ///
    /// # Errors
    /// [`SecretError::Name`], [`SecretError::Size`], [`SecretError::TooMany`].
    pub async fn put(
        &self,
        workspace: &str,
        name: &str,
        value: &SecretText,
        with: Txn,
    ) -> Result<SecretInfo, SecretError> {
        check_name(name)?;
        let found_bytes = value.reveal().len();
        if !(1..=SECRET_MAX_BYTES).contains(&found_bytes) {
            return Err(SecretError::Size { found_bytes });
        }
        let key = row(workspace, name)?;
        if self.store.get(&key).await?.is_none() {
            let found = self.list(workspace).await?.len();
            if found >= SECRETS_PER_WORKSPACE {
                return Err(SecretError::TooMany { found });
            }
        }
        let updated_at = clock::now();
        let record = self.sealed(&key, value, updated_at);
        self.store.commit(with.put(key, record)).await?;
        let name = name.to_owned();
        Ok(SecretInfo { name, updated_at })
    }

    /// A value as the row of this key keeps it: for what is no secret of a workspace's own, such as the key of a certificate.
    #[must_use]
    pub fn seal(&self, key: &Key, value: &SecretText) -> Vec<u8> {
        self.sealed(key, value, clock::now())
    }

    /// The value that was [sealed](Self::seal) into a row; `None`: there is no such row.
    ///
    /// # Errors
    /// [`SecretError::Sealed`], [`SecretError::Store`].
    pub async fn open_sealed(&self, key: &Key) -> Result<Option<SecretText>, SecretError> {
        let name = key.segments().next_back().unwrap_or_default().to_owned();
        self.open_row(key, &name).await
    }

    fn sealed(&self, key: &Key, value: &SecretText, updated_at: Timestamp) -> Vec<u8> {
        let nonce = random_bytes::<NONCE_LEN>();
        let mut sealed = value.reveal().as_bytes().to_vec();
        self.key
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(key.as_bytes()),
                &mut sealed,
            )
            .expect("the cipher takes values up to 64 GiB");
        let record = Sealed {
            schema: 1,
            updated_at,
            nonce: BASE64.encode(nonce),
            sealed: BASE64.encode(sealed),
        };
        serde_json::to_vec(&record).expect("the record has string keys")
    }

    /// The names of a workspace's secrets, sorted, with the time they were set; never a value.
    ///
    /// # Errors
    /// [`SecretError::Store`].
    pub async fn list(&self, workspace: &str) -> Result<Vec<SecretInfo>, SecretError> {
        let prefix = Prefix::from_segments(["default", "secret", workspace])?;
        let mut found = Vec::new();
        let mut after: Option<Key> = None;
        loop {
            let page = self
                .store
                .scan(&prefix, after.as_ref(), PAGE_MAX_ENTRIES)
                .await?;
            for entry in &page.entries {
                let name = entry.key.segments().next_back().unwrap_or_default();
                let record = serde_json::from_slice::<Sealed>(&entry.value);
                let updated_at = record.map(|record| record.updated_at).unwrap_or_default();
                let name = name.to_owned();
                found.push(SecretInfo { name, updated_at });
            }
            after = page.entries.last().map(|entry| entry.key.clone());
            if !page.more || after.is_none() {
                return Ok(found);
            }
        }
    }

    /// Deletes a secret. False when there was none. Tasks that refer to it fail from now on.
    ///
    /// # Errors
    /// [`SecretError::Store`], [`SecretError::Commit`].
    pub async fn delete(&self, workspace: &str, name: &str) -> Result<bool, SecretError> {
        check_name(name)?;
        let key = row(workspace, name)?;
        match self
            .store
            .commit(Txn::new().exists(key.clone()).delete(key))
            .await
        {
            Ok(_) => Ok(true),
            Err(CommitError::Conflict { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn open_one(
        &self,
        workspace: &str,
        name: &str,
    ) -> Result<Option<SecretText>, SecretError> {
        self.open_row(&row(workspace, name)?, name).await
    }

    async fn open_row(&self, key: &Key, name: &str) -> Result<Option<SecretText>, SecretError> {
        let Some(entry) = self.store.get(key).await? else {
            return Ok(None);
        };
        let sealed = || SecretError::Sealed {
            name: name.to_owned(),
        };
        let record: Sealed = serde_json::from_slice(&entry.value).map_err(|_| sealed())?;
        let nonce = BASE64.decode(&record.nonce).map_err(|_| sealed())?;
        let nonce = Nonce::try_assume_unique_for_key(&nonce).map_err(|_| sealed())?;
        let mut bytes = BASE64.decode(&record.sealed).map_err(|_| sealed())?;
        let opened = self
            .key
            .open_in_place(nonce, Aad::from(key.as_bytes()), &mut bytes)
            .map_err(|_| sealed())?;
        let text = std::str::from_utf8(opened).map_err(|_| sealed())?;
        Ok(Some(SecretText::new(text.to_owned())))
    }
}

#[async_trait]
impl SecretSource for SecretVault {
    async fn resolve(
        &self,
        workspace: &str,
        names: &BTreeSet<String>,
    ) -> Result<BTreeMap<String, SecretText>, SecretError> {
        let mut values = BTreeMap::new();
        for name in names {
            // A name that cannot be one has no value.
            if check_name(name).is_err() {
                continue;
            }
            match self.open_one(workspace, name).await {
                Ok(Some(value)) => drop(values.insert(name.clone(), value)),
                Ok(None) => {}
                // Asking again would not open it: the task fails, the log says why.
                Err(error @ SecretError::Sealed { .. }) => {
                    tracing::error!(workspace, secret.name = %name, error = &error as &dyn std::error::Error, "a secret cannot be opened");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(values)
    }
}

pub(crate) fn check_name(name: &str) -> Result<(), SecretError> {
    let right = name.len() <= SECRET_NAME_MAX_CHARS
        && name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
    if right {
        return Ok(());
    }
    Err(SecretError::Name {
        name: name.chars().take(80).collect(),
    })
}

fn row(workspace: &str, name: &str) -> Result<Key, LimitError> {
    Key::from_segments(["default", "secret", workspace, name])
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_store::memory::{self, MemoryOptions};

    fn vault(store: &Arc<dyn Store>, key: [u8; 32]) -> SecretVault {
        let key = UnboundKey::new(&CHACHA20_POLY1305, &key).unwrap();
        SecretVault {
            store: store.clone(),
            key: Arc::new(LessSafeKey::new(key)),
        }
    }

    #[tokio::test]
    async fn a_secret_is_sealed_in_the_store_and_opens_with_its_key_and_name_only() {
        let store = memory::open(MemoryOptions::default()).unwrap();
        let ours = vault(&store, [1; 32]);
        let value = SecretText::new("hunter2-hunter2".into());
        ours.put("prod", "db", &value, Txn::new()).await.unwrap();
        let key = row("prod", "db").unwrap();
        let entry = store.get(&key).await.unwrap().unwrap();
        let text = String::from_utf8_lossy(&entry.value).into_owned();
        assert!(!text.contains("hunter2") && !text.contains(&BASE64.encode("hunter2-hunter2")));

        let names: BTreeSet<String> = ["db".into(), "none".into(), "not a name".into()].into();
        let found = ours.resolve("prod", &names).await.unwrap();
        assert_eq!(found, [("db".to_owned(), value)].into());
        assert!(ours.resolve("test", &names).await.unwrap().is_empty());

        // Another key does not open it; nor does the same row under another name.
        assert!(
            vault(&store, [2; 32])
                .resolve("prod", &names)
                .await
                .unwrap()
                .is_empty()
        );
        let moved = row("prod", "none").unwrap();
        store
            .commit(Txn::new().put(moved, entry.value))
            .await
            .unwrap();
        assert_eq!(ours.resolve("prod", &names).await.unwrap().len(), 1);

        let listed = ours.list("prod").await.unwrap();
        assert_eq!(
            listed.iter().map(|info| &*info.name).collect::<Vec<_>>(),
            ["db", "none"]
        );
        assert!(ours.delete("prod", "db").await.unwrap());
        assert!(!ours.delete("prod", "db").await.unwrap());
    }

    #[tokio::test]
    async fn names_and_sizes_have_limits() {
        let store = memory::open(MemoryOptions::default()).unwrap();
        let vault = vault(&store, [1; 32]);
        let long = "x".repeat(65);
        for name in ["", "1a", "a/b", "a b", &long] {
            let error = vault
                .put("w", name, &SecretText::new("v".into()), Txn::new())
                .await;
            assert!(matches!(error, Err(SecretError::Name { .. })), "{name}");
        }
        for size in [0, SECRET_MAX_BYTES + 1] {
            let value = SecretText::new("v".repeat(size));
            let error = vault.put("w", "a", &value, Txn::new()).await.unwrap_err();
            assert!(matches!(error, SecretError::Size { found_bytes } if found_bytes == size));
        }
        let value = SecretText::new("v".repeat(SECRET_MAX_BYTES));
        vault.put("w", "a", &value, Txn::new()).await.unwrap();
    }
}
