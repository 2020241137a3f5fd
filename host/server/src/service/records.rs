//! Reading and writing the catalogue's records: JSON, schema versions, pages, and the loop around a commit.
//!
//! Owns the form of a row and of a cursor. Knows no rule of any resource.

use std::future::Future;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use windlass_domain::{
    Digest,
    activation::ActivationCode,
    application::Application,
    certificate::Certificate,
    diagnosis::Diagnosis,
    instance::ServiceInstance,
    load_balancer::{Listener, LoadBalancer},
    notification::{Channel, Delivery},
    package::Package,
    pool::Pool,
    server::Server,
    template::ProcessTemplate,
    token::Token,
    workspace::Workspace,
};
use windlass_store::{CommitError, Entry, Key, Prefix, Revision, Store, Txn};

use super::{Caller, ServiceError};
use crate::keys::{self, Kind};

/// A record as JSON at most: with its idempotency record it must fit a transaction, and each of them a row.
const RECORD_MAX_BYTES: usize = 24 * 1024;
/// Tries of a transaction that others get in the way of.
const TRIES: u32 = 16;
/// Entries of a page at most.
pub const PAGE_MAX_SIZE: usize = 200;
/// Rows read at a time while a page is filled.
const SCAN_ROWS: usize = 200;

/// Which page of a list.
#[derive(Debug, Clone, Default)]
pub struct PageRequest {
    /// Entries of the page: 1 to [`PAGE_MAX_SIZE`].
    pub size: usize,
    /// What the page before gave as its `next`; `None`: the first page.
    pub cursor: Option<String>,
}

impl PageRequest {
    /// The first page.
    #[must_use]
    pub const fn first(size: usize) -> Self {
        Self { size, cursor: None }
    }
}

/// A page of a list.
#[derive(Debug, Clone)]
pub struct PageOf<T> {
    /// Its entries.
    pub items: Vec<T>,
    /// The cursor of the next page; `None`: this was the last.
    pub next: Option<String>,
}

/// In which order a list is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sort {
    /// By rising key: names, or oldest first.
    Rising,
    /// By falling key: newest first where keys hold times.
    Falling,
}

/// A record that stands under its own id.
pub(crate) trait Record:
    Serialize + DeserializeOwned + Clone + Send + Sync + 'static
{
    const KIND: Kind;
    /// The schema version that this program writes.
    const SCHEMA: u32;
    /// Its id as a key's segment.
    fn id_text(&self) -> String;
}

macro_rules! records {
    ($($type:ident = $kind:ident, $id:ident;)*) => {$(
        impl Record for $type {
            const KIND: Kind = Kind::$kind;
            const SCHEMA: u32 = $type::SCHEMA;
            fn id_text(&self) -> String {
                self.$id.to_string()
            }
        }
    )*};
}

records! {
    Workspace = Workspace, name;
    Application = App, id;
    Package = Package, id;
    ServiceInstance = Instance, id;
    Server = Server, id;
    ActivationCode = Activation, id;
    Pool = Pool, id;
    LoadBalancer = LoadBalancer, id;
    Listener = Listener, id;
    Certificate = Certificate, id;
    Token = Token, id;
    Channel = Channel, id;
    Delivery = Delivery, id;
    Diagnosis = Diagnosis, id;
    ProcessTemplate = Template, id;
}

/// A row that is not what it should be.
pub(crate) fn malformed(key: &Key, what: &str, source: &serde_json::Error) -> ServiceError {
    ServiceError::internal(
        "read a row",
        std::io::Error::other(format!(
            "the row `{key}` cannot be read as {what}: the store was written by another version, or is damaged: {source}"
        )),
    )
}

/// Brings a stored record up to the schema of this program. A new schema version adds its step here, from the version before;
/// fields that only grew have defaults and need none.
fn migrate(json: serde_json::Value, _kind: Kind, _from: u32) -> serde_json::Value {
    json
}

pub(crate) fn decode<R: Record>(entry: &Entry) -> Result<R, ServiceError> {
    #[derive(Deserialize)]
    struct Schema {
        schema: u32,
    }
    let fail = |source: serde_json::Error| malformed(&entry.key, R::KIND.what(), &source);
    let found = serde_json::from_slice::<Schema>(&entry.value)
        .map_err(fail)?
        .schema;
    if found == R::SCHEMA {
        return serde_json::from_slice(&entry.value).map_err(fail);
    }
    if found > R::SCHEMA {
        return Err(fail(serde::de::Error::custom(format!(
            "its schema version is {found}, this program knows {}",
            R::SCHEMA
        ))));
    }
    let json = serde_json::from_slice(&entry.value).map_err(fail)?;
    serde_json::from_value(migrate(json, R::KIND, found)).map_err(fail)
}

/// A record of the caller's own form (not under an id of its own).
pub(crate) fn decode_plain<T: DeserializeOwned>(
    entry: &Entry,
    what: &str,
) -> Result<T, ServiceError> {
    serde_json::from_slice(&entry.value).map_err(|source| malformed(&entry.key, what, &source))
}

/// A record as bytes.
pub(crate) fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    serde_json::to_vec(record).expect("records have string keys")
}

/// A record by its id, where there is one.
pub(crate) async fn find<R: Record>(
    store: &dyn Store,
    id: &str,
) -> Result<Option<(R, Revision)>, ServiceError> {
    if id.is_empty() || id.len() > 200 || id.contains('/') {
        return Ok(None);
    }
    let entry = store.get(&keys::record(R::KIND, id)).await?;
    entry
        .map(|entry| Ok((decode(&entry)?, entry.revision)))
        .transpose()
}

/// A record by its id.
pub(crate) async fn get<R: Record>(
    store: &dyn Store,
    id: &str,
) -> Result<(R, Revision), ServiceError> {
    find(store, id)
        .await?
        .ok_or_else(|| ServiceError::not_found(R::KIND.what(), id))
}

/// The id that an index row holds, with the row's revision.
pub(crate) async fn indexed(store: &dyn Store, key: &Key) -> Result<Option<String>, ServiceError> {
    Ok(store
        .get(key)
        .await?
        .map(|entry| String::from_utf8_lossy(&entry.value).into_owned()))
}

/// Every row below a prefix.
pub(crate) async fn all(store: &dyn Store, prefix: &Prefix) -> Result<Vec<Entry>, ServiceError> {
    let mut rows: Vec<Entry> = Vec::new();
    loop {
        let after = rows.last().map(|entry| entry.key.clone());
        let page = store
            .scan(prefix, after.as_ref(), windlass_store::PAGE_MAX_ENTRIES)
            .await?;
        let more = page.more && !page.entries.is_empty();
        rows.extend(page.entries);
        if !more {
            return Ok(rows);
        }
    }
}

/// Every record that an index below `prefix` names.
pub(crate) async fn all_indexed<R: Record>(
    store: &dyn Store,
    prefix: &Prefix,
) -> Result<Vec<R>, ServiceError> {
    let mut records = Vec::new();
    for row in all(store, prefix).await? {
        // An index row and its record go in one commit: one without the other was deleted just now.
        if let Some((record, _)) = find::<R>(store, keys::last_segment(&row.key)).await? {
            records.push(record);
        }
    }
    Ok(records)
}

/// Whether anything stands below a prefix.
pub(crate) async fn any(store: &dyn Store, prefix: &Prefix) -> Result<bool, ServiceError> {
    Ok(!store.scan(prefix, None, 1).await?.entries.is_empty())
}

/// A page of the records that an index (or the records' own prefix) names, those that `keep` wants.
pub(crate) async fn list<R: Record>(
    store: &dyn Store,
    prefix: &Prefix,
    sort: Sort,
    page: &PageRequest,
    keep: impl Fn(&R) -> bool + Send + Sync,
) -> Result<PageOf<(R, Revision)>, ServiceError> {
    let own = *prefix == keys::records(R::KIND);
    list_rows(
        store,
        prefix,
        sort,
        page,
        |entry| async move {
            let record = if own {
                Some((decode::<R>(&entry)?, entry.revision))
            } else {
                find::<R>(store, keys::last_segment(&entry.key)).await?
            };
            Ok(record)
        },
        |(record, _)| keep(record),
    )
    .await
}

/// A page of what `read` makes of rows, those that `keep` wants.
pub(crate) async fn list_rows<T, F>(
    store: &dyn Store,
    prefix: &Prefix,
    sort: Sort,
    page: &PageRequest,
    read: impl Fn(Entry) -> F + Send + Sync,
    keep: impl Fn(&T) -> bool + Send + Sync,
) -> Result<PageOf<T>, ServiceError>
where
    F: Future<Output = Result<Option<T>, ServiceError>> + Send,
    T: Send,
{
    if page.size == 0 || page.size > PAGE_MAX_SIZE {
        return Err(ServiceError::Limit {
            code: "out_of_limit",
            field: "page_size".to_owned(),
            message: format!(
                "a page has 1 to {PAGE_MAX_SIZE} entries, {} were asked for",
                page.size
            ),
            limit: PAGE_MAX_SIZE as u64,
            current: page.size as u64,
            mend: "ask for fewer entries and follow the cursor".to_owned(),
        });
    }
    let mut position = page
        .cursor
        .as_deref()
        .map(|cursor| position_of(prefix, cursor))
        .transpose()?;
    let mut items = Vec::new();
    let mut last: Option<String> = None;
    loop {
        let found = match sort {
            Sort::Rising => store.scan(prefix, position.as_ref(), SCAN_ROWS).await?,
            Sort::Falling => {
                store
                    .scan_reverse(prefix, position.as_ref(), SCAN_ROWS)
                    .await?
            }
        };
        position = found.entries.last().map(|entry| entry.key.clone());
        for entry in found.entries {
            let here = cursor_of(prefix, &entry.key);
            let Some(item) = read(entry).await? else {
                continue;
            };
            if !keep(&item) {
                continue;
            }
            // One more than the page proves that there is a next one.
            if items.len() == page.size {
                return Ok(PageOf { items, next: last });
            }
            items.push(item);
            last = Some(here);
        }
        if !found.more || position.is_none() {
            return Ok(PageOf { items, next: None });
        }
    }
}

/// Bytes of a cursor's seal.
const SEAL_BYTES: usize = 6;

/// The digest's first bytes of the key a cursor stands for: a cursor that was never given out, or that is another list's, does
/// not fit. It keeps mistakes out, not attackers: a cursor gives no right to anything.
fn seal(key: &[u8]) -> [u8; SEAL_BYTES] {
    let digest = Digest::of(key);
    std::array::from_fn(|at| digest.as_bytes()[at])
}

/// The cursor behind a row of a list: the end of its key, sealed. It stays good when that row is deleted.
pub(crate) fn cursor_of(prefix: &Prefix, key: &Key) -> String {
    let mut bytes = seal(key.as_bytes()).to_vec();
    bytes.extend_from_slice(&key.as_bytes()[prefix.as_bytes().len()..]);
    BASE64.encode(bytes)
}

/// The key that a cursor stands for.
pub(crate) fn position_of(prefix: &Prefix, cursor: &str) -> Result<Key, ServiceError> {
    let invalid = || {
        ServiceError::invalid(
            "cursor_invalid",
            "cursor",
            "the cursor is not one that this list gave",
            "start again without a cursor, and give `next_cursor` back as it is",
        )
    };
    let bytes = BASE64.decode(cursor).map_err(|_| invalid())?;
    let (sealed, tail) = bytes
        .split_first_chunk::<SEAL_BYTES>()
        .ok_or_else(invalid)?;
    let mut key = prefix.as_bytes().to_vec();
    key.extend_from_slice(tail);
    if *sealed != seal(&key) {
        return Err(invalid());
    }
    Key::new(key).map_err(|_| invalid())
}

/// A cursor of one list as that of another over rows that differ in their prefix alone: where two lists show the same rows, each
/// takes its own cursors only.
pub(crate) fn recast(cursor: &str, from: &Prefix, to: &Prefix) -> Result<String, ServiceError> {
    let key = position_of(from, cursor)?;
    let mut bytes = to.as_bytes().to_vec();
    bytes.extend_from_slice(&key.as_bytes()[from.as_bytes().len()..]);
    let key = Key::new(bytes).map_err(|error| ServiceError::internal("read a cursor", error))?;
    Ok(cursor_of(to, &key))
}

fn row<R: Record>(record: &R) -> Result<(Key, Vec<u8>), ServiceError> {
    let value = encode(record);
    if value.len() > RECORD_MAX_BYTES {
        return Err(ServiceError::Limit {
            code: "record_too_large",
            field: String::new(),
            message: format!(
                "the {} has {} bytes as JSON, at most {RECORD_MAX_BYTES} are allowed",
                R::KIND.what(),
                value.len()
            ),
            limit: RECORD_MAX_BYTES as u64,
            current: value.len() as u64,
            mend: "shorten its texts, parameters or environment; large values belong into files of the package".to_owned(),
        });
    }
    Ok((keys::record(R::KIND, &record.id_text()), value))
}

/// A transaction that makes a record.
pub(crate) fn create<R: Record>(record: &R) -> Result<Txn, ServiceError> {
    let (key, value) = row(record)?;
    Ok(Txn::new().absent(key.clone()).put(key, value))
}

/// A transaction that replaces a record that was read with a revision.
pub(crate) fn replace<R: Record>(record: &R, revision: Revision) -> Result<Txn, ServiceError> {
    let (key, value) = row(record)?;
    Ok(Txn::new()
        .revision_is(key.clone(), revision)
        .put(key, value))
}

/// A transaction that deletes a record that was read with a revision.
pub(crate) fn remove<R: Record>(record: &R, revision: Revision) -> Txn {
    let key = keys::record(R::KIND, &record.id_text());
    Txn::new().revision_is(key.clone(), revision).delete(key)
}

/// The part of a transaction that begins to refer to a record: it must be there, and a deletion that has just looked for
/// users finds out.
pub(crate) fn refer(kind: Kind, id: &str) -> Txn {
    Txn::new()
        .exists(keys::record(kind, id))
        .put(keys::in_use(kind, id), "")
}

/// A guard for a deletion: read it *before* looking for users, commit it with the deletion.
pub(crate) async fn unused(store: &dyn Store, kind: Kind, id: &str) -> Result<Txn, ServiceError> {
    let key = keys::in_use(kind, id);
    Ok(match store.get(&key).await? {
        Some(entry) => Txn::new().revision_is(key.clone(), entry.revision),
        None => Txn::new().absent(key.clone()),
    }
    .delete(key))
}

/// Makes writes that commit this exclude each other: of two that read it before they decide, one has to decide again.
pub(crate) async fn touch_exclusively(
    store: &dyn Store,
    kind: Kind,
    id: &str,
) -> Result<Txn, ServiceError> {
    let key = keys::in_use(kind, id);
    Ok(match store.get(&key).await? {
        Some(entry) => Txn::new().revision_is(key.clone(), entry.revision),
        None => Txn::new().absent(key.clone()),
    }
    .put(key, ""))
}

/// Refuses when the caller's revision is not the record's.
pub(crate) fn check_revision<R: Record>(
    if_match: Option<Revision>,
    current: Revision,
) -> Result<(), ServiceError> {
    match if_match {
        Some(expected) if expected != current => Err(ServiceError::Changed {
            what: R::KIND.what(),
            current: current.0,
        }),
        Some(_) | None => Ok(()),
    }
}

/// Refuses a deletion that was not confirmed.
pub(crate) fn check_confirm(
    what: &'static str,
    confirm: &str,
    expected: &str,
) -> Result<(), ServiceError> {
    if confirm == expected {
        Ok(())
    } else {
        Err(ServiceError::invalid(
            "confirmation_missing",
            "confirm",
            format!("deleting a {what} has to be confirmed"),
            format!("set `confirm` to `{expected}`"),
        ))
    }
}

/// How a commit ended.
pub(crate) enum Committed {
    Done(Revision),
    /// A precondition did not hold: read again.
    Conflict,
}

/// Commits. A conflict on the idempotency record is [`ServiceError::Replay`].
pub(crate) async fn commit(store: &dyn Store, txn: Txn) -> Result<Committed, ServiceError> {
    match store.commit(txn).await {
        Ok(revision) => Ok(Committed::Done(revision)),
        Err(CommitError::Conflict { key, .. }) => {
            if keys::all_idempotency().contains(&key) {
                Err(ServiceError::Replay)
            } else {
                Ok(Committed::Conflict)
            }
        }
        Err(error) => Err(error.into()),
    }
}

/// Commits what `attempt` makes of what it reads, together with the caller's idempotency record, again when others were faster.
pub(crate) async fn change<T, F>(
    store: &dyn Store,
    caller: &Caller,
    attempt: impl Fn() -> F + Send + Sync,
) -> Result<(T, Revision), ServiceError>
where
    T: Serialize + Send + Sync,
    F: Future<Output = Result<(Txn, T), ServiceError>> + Send,
{
    change_showing(store, caller, |record: &T| record_json(record), attempt).await
}

fn record_json<T: Serialize>(record: &T) -> serde_json::Value {
    serde_json::to_value(record).expect("records have string keys")
}

/// As [`change`], where the idempotency record keeps what `show` lets be seen of the answer.
pub(crate) async fn change_showing<T, F>(
    store: &dyn Store,
    caller: &Caller,
    show: impl Fn(&T) -> serde_json::Value + Send + Sync,
    attempt: impl Fn() -> F + Send + Sync,
) -> Result<(T, Revision), ServiceError>
where
    T: Send + Sync,
    F: Future<Output = Result<(Txn, T), ServiceError>> + Send,
{
    for _ in 0..TRIES {
        let (txn, answer) = attempt().await?;
        let with = caller.answered(show(&answer));
        match commit(store, with.and(txn)).await? {
            Committed::Done(revision) => return Ok((answer, revision)),
            Committed::Conflict => {}
        }
    }
    Err(ServiceError::Unavailable {
        message: "others changed the same records again and again; try again".to_owned(),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use windlass_domain::time::Timestamp;

    use super::*;

    pub(crate) fn memory_store() -> Arc<dyn Store> {
        windlass_store::memory::open(windlass_store::memory::MemoryOptions::default()).unwrap()
    }

    pub(crate) fn caller() -> Caller {
        Caller {
            name: "anna".to_owned(),
            ..Caller::default()
        }
    }

    fn pool(number: u64) -> Pool {
        Pool {
            schema: Pool::SCHEMA,
            id: windlass_domain::id::PoolId::from_uuid(uuid::Uuid::from_u128(u128::from(number))),
            name: format!("p{number}").parse().unwrap(),
            workspace: "test".parse().unwrap(),
            kind: windlass_domain::pool::PoolKind::Simulated,
            created_at: Timestamp::default(),
        }
    }

    #[tokio::test]
    async fn pages_follow_their_cursor_in_both_orders() {
        let store = memory_store();
        for number in 0..7 {
            store.commit(create(&pool(number)).unwrap()).await.unwrap();
        }
        let prefix = keys::records(Kind::Pool);
        for (sort, expect) in [
            (Sort::Rising, vec![vec!["p0", "p2", "p4"], vec!["p6"]]),
            (Sort::Falling, vec![vec!["p6", "p4", "p2"], vec!["p0"]]),
        ] {
            let mut pages = Vec::new();
            let mut request = PageRequest::first(3);
            loop {
                let page = list::<Pool>(&*store, &prefix, sort, &request, |pool| {
                    pool.id.uuid().as_u128() % 2 == 0
                })
                .await
                .unwrap();
                pages.push(
                    page.items
                        .iter()
                        .map(|(pool, _)| pool.name.to_string())
                        .collect::<Vec<_>>(),
                );
                request.cursor = page.next;
                if request.cursor.is_none() {
                    break;
                }
            }
            assert_eq!(pages, expect);
        }
    }

    #[tokio::test]
    async fn page_sizes_and_cursors_are_checked() {
        let store = memory_store();
        let prefix = keys::records(Kind::Pool);
        let id = pool(1).id_text();
        // The row need not be there any more.
        let given = cursor_of(&prefix, &keys::record(Kind::Pool, &id));
        let others = keys::records(Kind::Server);
        let of_another = cursor_of(&others, &keys::record(Kind::Server, &id));
        for (size, cursor, good) in [
            (1, None, true),
            (PAGE_MAX_SIZE, None, true),
            (0, None, false),
            (PAGE_MAX_SIZE + 1, None, false),
            (1, Some("!"), false),
            (1, Some(""), false),
            // What was never given out, though it decodes to a key.
            (1, Some("cG9vbA"), false),
            (1, Some(&of_another), false),
            (1, Some(&given), true),
        ] {
            let page = PageRequest {
                size,
                cursor: cursor.map(str::to_owned),
            };
            let answer = list::<Pool>(&*store, &prefix, Sort::Rising, &page, |_| true).await;
            assert_eq!(answer.is_ok(), good, "{page:?}");
        }
    }

    #[tokio::test]
    async fn a_record_of_a_later_schema_is_not_read() {
        let store = memory_store();
        let mut record = pool(1);
        record.schema = Pool::SCHEMA + 1;
        store.commit(create(&record).unwrap()).await.unwrap();
        let error = get::<Pool>(&*store, &record.id_text()).await.unwrap_err();
        assert!(matches!(error, ServiceError::Internal { .. }), "{error}");
    }
}
