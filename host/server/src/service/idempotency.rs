//! Idempotency: the answer to a request is kept with what the request changed, for 24 hours.
//!
//! The API looks a key up, begins a record ([`Idempotency::begin`]) and hands its transaction to a service as
//! [`Caller::with`]. The service commits it *together* with the change, filled with the resource that it made
//! ([`Caller::answered`]). Afterwards the API adds the exact answer ([`Idempotency::complete`]). When the server dies between
//! the two, the record still holds the resource, and its row's revision is the resource's: the answer can be given again.
//!
//! ```text
//! none ──commit of the change──► carried out (resource) ──complete──► answered (status, body, ETag, location)
//! ```
//! Source: design, "API"; spec "Tenants, access".

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use windlass_domain::{Digest, Timestamp, id::TokenId};
use windlass_store::{Change, Revision, Store, Txn, VALUE_MAX_BYTES};

use super::{Caller, ServiceError, records};
use crate::{clock, keys};

/// How long an answer is kept, in milliseconds.
pub const RETENTION_MS: u64 = 24 * 3600 * 1000;
/// Longest idempotency key, in characters.
pub const KEY_MAX_CHARS: usize = 200;
/// Room for what stands around a resource or a body in a row.
const FRAME_BYTES: usize = 2 * 1024;

/// An answer as it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Body; `Null` for none.
    pub body: serde_json::Value,
    /// ETag.
    #[serde(default)]
    pub etag: Option<String>,
    /// Location.
    #[serde(default)]
    pub location: Option<String>,
}

/// What is known about a request that was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The exact answer; `None` when the server died before it was kept, or it was too large.
    pub answer: Option<Answer>,
    /// The resource as it was committed; `None` when it was too large.
    pub resource: Option<serde_json::Value>,
    /// The revision of the resource when there is no `answer`.
    pub revision: Revision,
}

/// What [`Idempotency::begin`] found.
#[derive(Debug)]
pub enum Begun {
    /// The request is new: commit this with its change.
    New(Txn),
    /// It was carried out before.
    Answered(Stored),
}

/// A row.
#[derive(Serialize, Deserialize)]
struct Row {
    schema: u32,
    request: Digest,
    created_at: Timestamp,
    #[serde(default)]
    resource: Option<serde_json::Value>,
    #[serde(default)]
    answer: Option<Answer>,
}

impl Row {
    fn is_expired(&self, now: Timestamp) -> bool {
        now.since_ms(self.created_at) >= RETENTION_MS
    }
}

/// The idempotency records. Cheap to clone.
#[derive(Clone)]
pub struct Idempotency {
    store: Arc<dyn Store>,
}

impl Idempotency {
    /// Over a store.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// What became of an earlier request with this key, of the same caller.
    ///
    /// # Errors
    /// `idempotency_key_invalid`; `idempotency_key_reused` when the earlier request was another one.
    pub async fn lookup(
        &self,
        token: TokenId,
        key: &str,
        request: Digest,
    ) -> Result<Option<Stored>, ServiceError> {
        Ok(match self.begin(token, key, request).await? {
            Begun::New(_) => None,
            Begun::Answered(stored) => Some(stored),
        })
    }

    /// Looks the key up; for a new request, makes the transaction that remembers it. `request` is a digest of method, path
    /// and body.
    ///
    /// # Errors
    /// Those of [`Idempotency::lookup`].
    pub async fn begin(
        &self,
        token: TokenId,
        key: &str,
        request: Digest,
    ) -> Result<Begun, ServiceError> {
        let chars = key.chars().count();
        if !(1..=KEY_MAX_CHARS).contains(&chars) {
            return Err(ServiceError::Limit {
                code: "idempotency_key_invalid",
                field: "Idempotency-Key".to_owned(),
                message: format!(
                    "the idempotency key has {chars} characters: 1 to {KEY_MAX_CHARS} are allowed"
                ),
                limit: if chars == 0 { 1 } else { KEY_MAX_CHARS as u64 },
                current: chars as u64,
                mend: "send for example a UUID".to_owned(),
            });
        }
        let row_key = keys::idempotency(token, key);
        let now = clock::now();
        let mut txn = Txn::new();
        match self.store.get(&row_key).await? {
            None => txn = txn.absent(row_key.clone()),
            Some(entry) => {
                let row: Row = records::decode_plain(&entry, "an idempotency record")?;
                if row.is_expired(now) {
                    txn = txn.revision_is(row_key.clone(), entry.revision);
                } else if row.request == request {
                    return Ok(Begun::Answered(Stored {
                        answer: row.answer,
                        resource: row.resource,
                        revision: entry.revision,
                    }));
                } else {
                    return Err(ServiceError::invalid(
                        "idempotency_key_reused",
                        "Idempotency-Key",
                        "the idempotency key was used for another request within the last 24 hours",
                        "send a new key with a new request",
                    ));
                }
            }
        }
        let row = Row {
            schema: 1,
            request,
            created_at: now,
            resource: None,
            answer: None,
        };
        Ok(Begun::New(txn.put(row_key, records::encode(&row))))
    }

    /// Keeps the exact answer of a request that was carried out. Does nothing when there is no record of it.
    ///
    /// # Errors
    /// Those of the store: the answer was given all the same, and can be given again from the resource.
    pub async fn complete(
        &self,
        token: TokenId,
        key: &str,
        answer: Answer,
    ) -> Result<(), ServiceError> {
        let row_key = keys::idempotency(token, key);
        let Some(entry) = self.store.get(&row_key).await? else {
            return Ok(());
        };
        let mut row: Row = records::decode_plain(&entry, "an idempotency record")?;
        // The answer holds the resource: one of them is enough.
        row.resource = None;
        row.answer = Some(answer);
        let value = records::encode(&row);
        if value.len() > VALUE_MAX_BYTES {
            // What stands there is enough to answer from.
            return Ok(());
        }
        let txn = Txn::new()
            .revision_is(row_key.clone(), entry.revision)
            .put(row_key, value);
        match records::commit(&*self.store, txn).await {
            // Somebody else completed it, or it was pruned.
            Ok(_) | Err(ServiceError::Replay) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Deletes records older than their retention.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn prune(&self) -> Result<u64, ServiceError> {
        let now = clock::now();
        let is_expired = |entry: &windlass_store::Entry| {
            serde_json::from_slice::<Row>(&entry.value).is_ok_and(|row| row.is_expired(now))
        };
        let pruned =
            windlass_store::retention::prune(&*self.store, &keys::all_idempotency(), 0, is_expired)
                .await?;
        Ok(pruned.deleted)
    }
}

impl Caller {
    /// [`Caller::with`], its idempotency record filled with the resource that the request makes. Resources that are too large
    /// for a row are left out.
    #[must_use]
    pub fn answered(&self, resource: serde_json::Value) -> Txn {
        let records = keys::all_idempotency();
        let mut txn = Txn::new();
        for precondition in self.with.preconditions() {
            txn = txn.require(precondition.key.clone(), precondition.expected);
        }
        let mut resource = Some(resource)
            .filter(|resource| resource.to_string().len() <= VALUE_MAX_BYTES - FRAME_BYTES);
        for operation in self.with.operations() {
            let filled = match &operation.change {
                Change::Put { value, lease: None } if records.contains(&operation.key) => {
                    serde_json::from_slice::<Row>(value).ok().map(|mut row| {
                        row.resource = resource.take();
                        Change::Put {
                            value: records::encode(&row).into(),
                            lease: None,
                        }
                    })
                }
                Change::Put { .. } | Change::Delete => None,
            };
            txn = txn.change(
                operation.key.clone(),
                filled.unwrap_or_else(|| operation.change.clone()),
            );
        }
        txn
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::service::records::tests::memory_store;

    fn token(number: u128) -> TokenId {
        TokenId::from_uuid(uuid::Uuid::from_u128(number))
    }

    async fn new(records: &Idempotency, key: &str, request: Digest) -> Caller {
        match records.begin(token(1), key, request).await.unwrap() {
            Begun::New(with) => Caller {
                name: "anna".to_owned(),
                with,
            },
            Begun::Answered(stored) => panic!("{stored:?}"),
        }
    }

    #[tokio::test]
    async fn a_request_is_remembered_with_its_change_and_answered_again() {
        let store = memory_store();
        let records = Idempotency::new(store.clone());
        let request = Digest::of(b"POST /v1/apps {}");
        let caller = new(&records, "k", request).await;
        let txn = caller.answered(json!({"name": "shop"}));
        let revision = store.commit(txn.clone()).await.unwrap();
        let stored = records
            .lookup(token(1), "k", request)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(
            stored,
            Stored {
                answer: None,
                resource: Some(json!({"name": "shop"})),
                revision
            }
        );
        // The same request at the same time does not happen twice.
        assert!(matches!(
            records::commit(&*store, txn).await,
            Err(ServiceError::Replay)
        ));
        let answer = Answer {
            status: 201,
            body: json!({"name": "shop"}),
            etag: Some(format!("\"{revision}\"")),
            location: None,
        };
        records
            .complete(token(1), "k", answer.clone())
            .await
            .unwrap();
        let stored = records
            .lookup(token(1), "k", request)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(stored.answer, Some(answer));
        // Another caller's key is another key.
        assert_eq!(records.lookup(token(2), "k", request).await.unwrap(), None);
    }

    #[tokio::test]
    async fn another_request_under_the_same_key_is_refused() {
        let store = memory_store();
        let records = Idempotency::new(store.clone());
        let caller = new(&records, "k", Digest::of(b"1")).await;
        store.commit(caller.answered(json!(null))).await.unwrap();
        let error = records
            .lookup(token(1), "k", Digest::of(b"2"))
            .await
            .unwrap_err();
        assert!(
            matches!(
                error,
                ServiceError::Invalid {
                    code: "idempotency_key_reused",
                    ..
                }
            ),
            "{error}"
        );
        for key in [String::new(), "k".repeat(201)] {
            assert!(
                records
                    .lookup(token(1), &key, Digest::of(b""))
                    .await
                    .is_err()
            );
        }
    }

    #[tokio::test]
    async fn a_large_resource_is_left_out() {
        let store = memory_store();
        let records = Idempotency::new(store.clone());
        let caller = new(&records, "k", Digest::of(b"1")).await;
        let large = json!("x".repeat(VALUE_MAX_BYTES));
        store.commit(caller.answered(large.clone())).await.unwrap();
        let stored = records
            .lookup(token(1), "k", Digest::of(b"1"))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(stored.resource, None);
        let answer = Answer {
            status: 200,
            body: large,
            etag: None,
            location: None,
        };
        records.complete(token(1), "k", answer).await.unwrap();
    }

    #[tokio::test]
    async fn old_records_are_pruned_and_replaced() {
        let store = memory_store();
        let records = Idempotency::new(store.clone());
        let old = |age_ms: i64| Row {
            schema: 1,
            request: Digest::of(b"old"),
            created_at: Timestamp::from_unix_ms(clock::now().unix_ms() - age_ms),
            resource: None,
            answer: None,
        };
        let retention = i64::try_from(RETENTION_MS).unwrap();
        for (key, age_ms) in [("old", retention + 1), ("young", retention - 60_000)] {
            let txn = Txn::new().put(
                keys::idempotency(token(1), key),
                records::encode(&old(age_ms)),
            );
            store.commit(txn).await.unwrap();
        }
        new(&records, "old", Digest::of(b"new")).await;
        assert!(
            records
                .lookup(token(1), "young", Digest::of(b"new"))
                .await
                .is_err()
        );
        assert_eq!(records.prune().await.unwrap(), 1);
        assert!(
            records
                .lookup(token(1), "young", Digest::of(b"old"))
                .await
                .unwrap()
                .is_some()
        );
    }
}
