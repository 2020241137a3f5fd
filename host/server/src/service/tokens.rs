//! API tokens. Source: spec "Tenants, access".
//!
//! A token is `wlt_` and 64 hexadecimal digits (256 random bits), shown once; the store holds its SHA-256. A check is a look
//! into a cache in memory that a watch on the tokens' rows keeps right: what is revoked here, or by another server, is out of
//! it at once, and whoever waits on [`Authenticated::revoked`] is told.

use std::{
    collections::HashMap,
    fs::OpenOptions,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use windlass_domain::{Digest, Timestamp, id::TokenId, name::TokenName, token::Token};
use windlass_store::{EventKind, Revision, Store, WatchError};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    records::{self, Sort},
};
use crate::{
    clock, ids,
    keys::{self, Kind},
};

/// Start of every token: what secret scanners look for.
const TOKEN_PREFIX: &str = "wlt_";
/// Length of a token in bytes.
const TOKEN_BYTES: usize = TOKEN_PREFIX.len() + 64;
/// The file of the first administrator's token, in the data directory.
pub const ADMIN_TOKEN_FILE: &str = "admin.token";
/// Name of the first administrator's token.
const ADMIN_NAME: &str = "admin";
/// Longest validity of a token, in days.
pub const MAX_VALIDITY_D: u32 = 3650;

/// A token to be made.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    /// Name of the caller that it stands for: unique.
    pub name: TokenName,
    /// Days that it can be used, 1 to 3650; until it is revoked unless given.
    #[serde(default)]
    pub validity_d: Option<u32>,
}

/// A token as it may be seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TokenView {
    /// Its id.
    pub id: TokenId,
    /// Name of the caller that it stands for.
    pub name: TokenName,
    /// Until when it can be used; `None`: until it is revoked.
    pub expires_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
}

impl From<&Token> for TokenView {
    fn from(token: &Token) -> Self {
        Self {
            id: token.id,
            name: token.name.clone(),
            expires_at: token.expires_at,
            created_at: token.created_at,
        }
    }
}

/// A token that was just made. `Debug` hides the token itself.
#[derive(Clone)]
pub struct NewToken {
    /// The record.
    pub record: Token,
    /// The token: shown now and never again.
    pub token: String,
}

impl std::fmt::Debug for NewToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewToken")
            .field("record", &self.record)
            .finish_non_exhaustive()
    }
}

/// A caller whose token is good.
#[derive(Debug, Clone)]
pub struct Authenticated {
    /// The token's record.
    pub token: Token,
    /// Cancelled when the token is revoked: what streams to the caller ends then. It does not tell of expiry; see
    /// [`Token::expires_at`].
    pub revoked: CancellationToken,
}

/// Why the first administrator's token could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AdminTokenError {
    /// The file could not be written or read.
    #[error("cannot {operation} `{}`", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file does not hold a token.
    #[error(
        "`{}` does not hold a token; delete it, and a new one is made when the server starts",
        path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// The store.
    #[error("the administrator's token could not be stored")]
    Store(#[source] ServiceError),
}

/// Tokens. Cheap to clone; clones share the cache.
#[derive(Clone)]
pub struct Tokens {
    store: Arc<dyn Store>,
    cache: Arc<Mutex<HashMap<Digest, Authenticated>>>,
}

impl Tokens {
    /// Over a store. [`Tokens::keep_cache`] must run for revocations on other servers, and of other clones' owners, to be seen.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            cache: Arc::default(),
        }
    }

    /// Makes the first administrator's token where there is no token at all, in `admin.token` of the data directory with mode
    /// 0600. The file is written before the store, so that a crash between them leaves a file that is taken over.
    ///
    /// # Errors
    /// [`AdminTokenError`].
    pub async fn ensure_admin(&self, data_dir: &Path) -> Result<(), AdminTokenError> {
        let store = &*self.store;
        let there = records::any(store, &keys::records(Kind::Token)).await;
        if there.map_err(AdminTokenError::Store)? {
            return Ok(());
        }
        let path = data_dir.join(ADMIN_TOKEN_FILE);
        let token = write_or_read_token(&path)?;
        let record = Token {
            schema: Token::SCHEMA,
            id: TokenId::from_uuid(ids::new_uuid()),
            name: ADMIN_NAME.parse().expect("the name keeps the rules"),
            hash: hash_of(&token),
            expires_at: None,
            created_at: clock::now(),
        };
        let caller = Caller::default();
        records::change(store, &caller, || async {
            Ok((self.creation(&record).await?, ()))
        })
        .await
        .map_err(AdminTokenError::Store)?;
        tracing::info!(
            path = %path.display(),
            "the first administrator's token was written"
        );
        Ok(())
    }

    async fn creation(&self, token: &Token) -> Result<windlass_store::Txn, ServiceError> {
        let name_key = keys::name_in_tenant(Kind::Token, token.name.as_str());
        if records::indexed(&*self.store, &name_key).await?.is_some() {
            return Err(ServiceError::taken("token", "name", token.name.as_str()));
        }
        let hash_key = keys::by_hash(Kind::Token, token.hash);
        let id = token.id.to_string();
        Ok(records::create(token)?
            .absent(name_key.clone())
            .put(name_key, id.clone())
            .absent(hash_key.clone())
            .put(hash_key, id))
    }

    /// Makes a token. The idempotency record does not hold it: it is shown once.
    ///
    /// # Errors
    /// `name_taken`; a validity that is not accepted.
    pub async fn create(
        &self,
        caller: Caller,
        request: CreateToken,
    ) -> Result<(NewToken, Revision), ServiceError> {
        if let Some(days) = request.validity_d
            && !(1..=MAX_VALIDITY_D).contains(&days)
        {
            return Err(ServiceError::Limit {
                code: "out_of_limit",
                field: "validity_d".to_owned(),
                message: format!(
                    "a token is valid for 1 to {MAX_VALIDITY_D} days, {days} are asked for"
                ),
                limit: u64::from(MAX_VALIDITY_D),
                current: u64::from(days),
                mend: "ask for fewer days, or leave it out: then it is valid until it is revoked"
                    .to_owned(),
            });
        }
        let token = new_token();
        let now = clock::now();
        let record = Token {
            schema: Token::SCHEMA,
            id: TokenId::from_uuid(ids::new_uuid()),
            name: request.name,
            hash: hash_of(&token),
            expires_at: request
                .validity_d
                .map(|days| now.plus_ms(u64::from(days) * 86_400_000)),
            created_at: now,
        };
        let show = |new: &NewToken| {
            serde_json::to_value(TokenView::from(&new.record)).expect("records have string keys")
        };
        records::change_showing(&*self.store, &caller, show, || async {
            let txn = self.creation(&record).await?;
            let (record, token) = (record.clone(), token.clone());
            Ok((txn, NewToken { record, token }))
        })
        .await
    }

    /// One token.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn get(&self, id: TokenId) -> Result<(Token, Revision), ServiceError> {
        records::get(&*self.store, &id.to_string()).await
    }

    /// A page of tokens, oldest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted.
    pub async fn list(&self, page: PageRequest) -> Result<PageOf<(Token, Revision)>, ServiceError> {
        let prefix = keys::records(Kind::Token);
        records::list(&*self.store, &prefix, Sort::Rising, &page, |_: &Token| true).await
    }

    /// Revokes a token: it is gone, and streams of its caller end. The last token that does not expire cannot be revoked:
    /// nobody could make another.
    ///
    /// # Errors
    /// `last_token`; [`ServiceError::NotFound`].
    pub async fn revoke(&self, caller: Caller, id: TokenId) -> Result<(), ServiceError> {
        let store = &*self.store;
        let (hash, _) = records::change(store, &caller, || async {
            let (token, revision) = self.get(id).await?;
            // Two that revoke the last two at once meet at this row.
            let guard = records::touch_exclusively(store, Kind::Token, "all").await?;
            let lasting = records::all(store, &keys::records(Kind::Token))
                .await?
                .iter()
                .map(records::decode::<Token>)
                .collect::<Result<Vec<_>, _>>()?
                .into_iter()
                .filter(|other| other.id != id && other.expires_at.is_none())
                .count();
            if token.expires_at.is_none() && lasting == 0 {
                return Err(ServiceError::conflict(
                    "last_token",
                    format!("`{}` is the last token that does not expire", token.name),
                    "make another one first: without one nobody could use this server any more",
                ));
            }
            let txn = records::remove(&token, revision)
                .and(guard)
                .delete(keys::name_in_tenant(Kind::Token, token.name.as_str()))
                .delete(keys::by_hash(Kind::Token, token.hash));
            Ok((txn, token.hash))
        })
        .await?;
        self.forget(hash);
        Ok(())
    }

    /// The caller of a token; `None` when it is unknown, revoked or expired. Usually answered from memory.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn authenticate(&self, token: &str) -> Result<Option<Authenticated>, ServiceError> {
        if token.len() != TOKEN_BYTES || !token.starts_with(TOKEN_PREFIX) {
            return Ok(None);
        }
        let hash = hash_of(token);
        let known = self.cached().get(&hash).cloned();
        let found = match known {
            Some(found) => found,
            None => match self.look_up(hash).await? {
                Some(found) => found,
                None => return Ok(None),
            },
        };
        let is_over = found
            .token
            .expires_at
            .is_some_and(|expires_at| clock::now() >= expires_at);
        Ok(Some(found).filter(|_| !is_over))
    }

    async fn look_up(&self, hash: Digest) -> Result<Option<Authenticated>, ServiceError> {
        let store = &*self.store;
        let hash_key = keys::by_hash(Kind::Token, hash);
        let Some(id) = records::indexed(store, &hash_key).await? else {
            return Ok(None);
        };
        let Some((token, _)) = records::find::<Token>(store, &id).await? else {
            return Ok(None);
        };
        let found = {
            let mut cache = self.cached();
            cache
                .entry(hash)
                .or_insert_with(|| Authenticated {
                    token,
                    revoked: CancellationToken::new(),
                })
                .clone()
        };
        // Revoked between the read and the insertion: `forget` may have come too early.
        if records::indexed(store, &hash_key).await?.is_none() {
            self.forget(hash);
            return Ok(None);
        }
        Ok(Some(found))
    }

    fn forget(&self, hash: Digest) {
        if let Some(gone) = self.cached().remove(&hash) {
            gone.revoked.cancel();
        }
    }

    fn cached(&self) -> MutexGuard<'_, HashMap<Digest, Authenticated>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the tokens' rows until `stop`: what any server revokes leaves the cache. Run by one owned task.
    ///
    /// # Errors
    /// Those of the store: the owner should start it again after a pause.
    pub async fn keep_cache(&self, stop: CancellationToken) -> Result<(), ServiceError> {
        let prefix = keys::hashes(Kind::Token);
        loop {
            let from = self.store.revision().await?;
            let mut watch = match self.store.watch(&prefix, from).await {
                Ok(watch) => watch,
                Err(WatchError::Closed) => return Ok(()),
                Err(WatchError::Compacted { .. }) => continue,
            };
            self.recheck().await?;
            loop {
                let event = tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    event = watch.next() => event,
                };
                match event {
                    Ok(event) => match event.kind {
                        EventKind::Deleted => {
                            if let Ok(hash) = keys::last_segment(&event.key).parse() {
                                self.forget(hash);
                            }
                        }
                        EventKind::Put { .. } => {}
                    },
                    Err(WatchError::Compacted { .. }) => break,
                    Err(WatchError::Closed) => return Ok(()),
                }
            }
        }
    }

    /// Looks at everything that is cached again.
    async fn recheck(&self) -> Result<(), ServiceError> {
        let hashes: Vec<Digest> = self.cached().keys().copied().collect();
        for hash in hashes {
            let key = keys::by_hash(Kind::Token, hash);
            if records::indexed(&*self.store, &key).await?.is_none() {
                self.forget(hash);
            }
        }
        Ok(())
    }
}

fn new_token() -> String {
    let bytes: [u8; 32] = ids::random_bytes();
    // A digest prints as hexadecimal digits.
    format!("{TOKEN_PREFIX}{}", Digest::from_bytes(bytes))
}

fn hash_of(token: &str) -> Digest {
    Digest::of(token.as_bytes())
}

/// A new token in a new file, or what an existing file holds.
fn write_or_read_token(path: &Path) -> Result<String, AdminTokenError> {
    let failed = |operation| {
        move |source| AdminTokenError::File {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    let opened = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    match opened {
        Ok(mut file) => {
            let token = new_token();
            file.write_all(format!("{token}\n").as_bytes())
                .and_then(|()| file.sync_all())
                .map_err(failed("write"))?;
            Ok(token)
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let text = std::fs::read_to_string(path).map_err(failed("read"))?;
            let token = text.trim().to_owned();
            let digits = token.strip_prefix(TOKEN_PREFIX);
            if digits.is_some_and(|digits| digits.parse::<Digest>().is_ok()) {
                Ok(token)
            } else {
                Err(AdminTokenError::Malformed {
                    path: path.to_owned(),
                })
            }
        }
        Err(error) => Err(failed("create")(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::service::records::tests::{caller, memory_store};

    fn request(name: &str) -> CreateToken {
        CreateToken {
            name: name.parse().unwrap(),
            validity_d: None,
        }
    }

    #[tokio::test]
    async fn the_first_administrator_gets_one_private_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = memory_store();
        let tokens = Tokens::new(store.clone());
        tokens.ensure_admin(dir.path()).await.unwrap();
        tokens.ensure_admin(dir.path()).await.unwrap();
        let path = dir.path().join(ADMIN_TOKEN_FILE);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let token = std::fs::read_to_string(&path).unwrap();
        let admin = tokens.authenticate(token.trim()).await.unwrap().unwrap();
        assert_eq!(admin.token.name.as_str(), "admin");
        assert_eq!(
            tokens
                .list(PageRequest::first(10))
                .await
                .unwrap()
                .items
                .len(),
            1
        );
        // After a crash between file and store the file is taken over.
        let other = Tokens::new(memory_store());
        other.ensure_admin(dir.path()).await.unwrap();
        assert!(other.authenticate(token.trim()).await.unwrap().is_some());
        std::fs::write(&path, "x").unwrap();
        let broken = Tokens::new(memory_store()).ensure_admin(dir.path()).await;
        assert!(matches!(broken, Err(AdminTokenError::Malformed { .. })));
    }

    #[tokio::test]
    async fn a_revoked_token_is_refused_at_once_and_its_streams_end() {
        let store = memory_store();
        let tokens = Tokens::new(store.clone());
        let (keep, _) = tokens.create(caller(), request("keep")).await.unwrap();
        let (gone, _) = tokens.create(caller(), request("gone")).await.unwrap();
        assert!(tokens.create(caller(), request("gone")).await.is_err());
        let here = tokens.authenticate(&gone.token).await.unwrap().unwrap();
        // Another server, with a cache of its own.
        let other = Tokens::new(store);
        let there = other.authenticate(&gone.token).await.unwrap().unwrap();
        let stop = CancellationToken::new();
        let keeping = tokio::spawn({
            let (other, stop) = (other.clone(), stop.clone());
            async move { other.keep_cache(stop).await }
        });
        tokens.revoke(caller(), gone.record.id).await.unwrap();
        assert!(here.revoked.is_cancelled());
        assert!(tokens.authenticate(&gone.token).await.unwrap().is_none());
        there.revoked.cancelled().await;
        assert!(other.authenticate(&gone.token).await.unwrap().is_none());
        assert!(tokens.authenticate(&keep.token).await.unwrap().is_some());
        let last = tokens.revoke(caller(), keep.record.id).await.unwrap_err();
        assert!(matches!(
            last,
            ServiceError::Conflict {
                code: "last_token",
                ..
            }
        ));
        stop.cancel();
        keeping.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn other_texts_are_no_tokens() {
        let tokens = Tokens::new(memory_store());
        let (new, _) = tokens.create(caller(), request("a")).await.unwrap();
        let mut wrong = new.token.clone();
        wrong.replace_range(10..11, if &wrong[10..11] == "0" { "1" } else { "0" });
        for text in ["", "wlt_", &wrong, &format!("{} ", new.token)] {
            assert!(tokens.authenticate(text).await.unwrap().is_none());
        }
        for (days, good) in [(0, false), (1, true), (3650, true), (3651, false)] {
            let request = CreateToken {
                name: format!("t{days}").parse().unwrap(),
                validity_d: Some(days),
            };
            assert_eq!(
                tokens.create(caller(), request).await.is_ok(),
                good,
                "{days}"
            );
        }
        assert!(!format!("{new:?}").contains(&new.token));
    }
}
