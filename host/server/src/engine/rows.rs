//! The engine's rows: their keys and their JSON.
//!
//! | key (below the tenant) | value |
//! | --- | --- |
//! | `order/{id}` | [`Order`], the header; every change of the order compares and swaps it |
//! | `order-of/{workspace}/{id}` | `Summary`: orders of a workspace, by age, without invocations |
//! | `invocation-of/{workspace}/{id}` | likewise: invocations of a workspace, by age |
//! | `order-node/{id}/{node}` | [`NodeProgress`]; absent: not started. Nodes are named by their ids, which hold over revisions of a plan |
//! | `order-attempt/{id}/{node}/{attempt}` | [`NodeProgress`] at the end of an attempt that did not succeed: its log stays when the step is repeated |
//! | `order-revision/{id}/{number}` | [`PlanRevision`]: of an order whose plan was revised, all of them |
//! | `order-event/{id}/{first seq}` | the [`OrderEvent`]s of one commit |
//! | `order-sample/{id}/{node}/{chunk}` | what pools had counted when a judgement's window began |
//! | `notice/{workspace}/{order}/{seq}` | [`Notice`]: people are to be told; the notifier takes it away |
//! | `order-active/{id}` | empty: the order still has effects to perform; recovery starts here |
//! | `order-owner/{id}` | which server's engine drives it; hangs on a lease |
//! | `lock/{server}` | [`ServerLock`] |
//! | `installed/{instance}/{server}` | `Manifest`: what is installed |
//! | `installed-before/{instance}/{server}` | `Manifest`: what was installed before it |
//! | `unavailable/{instance}/{cell}/{server}` | [`Unavailable`]: counted by the safety envelope |
//! | `owed-weight/{pool}/{server}` | [`OwedWeight`]: what a server whose traffic was taken gets back |
//! | `inbox/{server}/{order}/{unit}` | the task that an agent has to do, or to end: the outbox of dispatches |

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use windlass_domain::{
    Timestamp,
    id::{InstanceId, OrderId, PoolId, ServerId},
    notification::Notice,
    order::{Order, OrderEvent, OrderState, PlanRevision, Purpose},
    plan::NodeId,
    progress::NodeProgress,
    task::TaskResult,
    text,
};
use windlass_store::{Entry, Key, Prefix, Revision, Store, StoreError, sortable};

/// The tenant of every row until there are several.
const TENANT: &str = "default";

/// A node's row is kept below this, so that it fits a value with room to spare.
const NODE_MAX_BYTES: usize = 30 * 1024;

/// A server is held by an order: no other order may work on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerLock {
    /// The first order of the line: a rollback uses the locks of the order it rolls back.
    pub owner: OrderId,
}

/// A server of an instance that takes no part in serving because of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unavailable {
    /// The order.
    pub order: OrderId,
    /// The order has taken its application offline.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub offline: bool,
    /// It was offline when the order began on it: so it is again when the order leaves it untouched.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub was_offline: bool,
}

/// The weight that a server had before an order took its traffic. It stands until an order's turn on the server succeeds:
/// what a pool shows of a server that a failed order left without traffic is no weight to go back to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwedWeight {
    /// The last order that took it.
    pub order: OrderId,
    /// The weight, 1 to 100.
    pub weight: u32,
}

/// Why a row could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    /// The store failed.
    #[error("the store failed while the engine read `{key}`")]
    Store {
        /// The row.
        key: String,
        /// The cause.
        #[source]
        source: StoreError,
    },
    /// The row is not what it should be.
    #[error(
        "the row `{key}` cannot be read as {what}: the store was written by another version, or is damaged"
    )]
    Malformed {
        /// The row.
        key: String,
        /// What it should be.
        what: &'static str,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
}

fn key<const N: usize>(segments: [&str; N]) -> Key {
    Key::from_segments(std::iter::once(TENANT).chain(segments))
        .expect("ids and numbers are short and hold no separator")
}

fn prefix<const N: usize>(segments: [&str; N]) -> Prefix {
    key(segments).below()
}

pub(crate) fn order(id: OrderId) -> Key {
    key(["order", &id.to_string()])
}

pub(crate) fn order_of(workspace: &str, id: OrderId) -> Key {
    key(["order-of", workspace, &id.to_string()])
}

pub(crate) fn orders_of(workspace: &str) -> Prefix {
    prefix(["order-of", workspace])
}

pub(crate) fn invocation_of(workspace: &str, id: OrderId) -> Key {
    key(["invocation-of", workspace, &id.to_string()])
}

pub(crate) fn invocations_of(workspace: &str) -> Prefix {
    prefix(["invocation-of", workspace])
}

/// The row that lists an order in its workspace.
pub(crate) fn listed(order: &Order) -> Key {
    match order.purpose {
        Purpose::Release | Purpose::Rollback { .. } | Purpose::Operation { .. } => {
            order_of(&order.workspace, order.id)
        }
        Purpose::Invocation { .. } => invocation_of(&order.workspace, order.id),
    }
}

pub(crate) fn node(id: OrderId, node: NodeId) -> Key {
    key(["order-node", &id.to_string(), &sortable(u64::from(node))])
}

pub(crate) fn nodes(id: OrderId) -> Prefix {
    prefix(["order-node", &id.to_string()])
}

pub(crate) fn attempt(id: OrderId, node: NodeId, attempt: u32) -> Key {
    let (node, attempt) = (sortable(u64::from(node)), sortable(u64::from(attempt)));
    key(["order-attempt", &id.to_string(), &node, &attempt])
}

pub(crate) fn attempts(id: OrderId) -> Prefix {
    prefix(["order-attempt", &id.to_string()])
}

pub(crate) fn revision(id: OrderId, number: u32) -> Key {
    let number = sortable(u64::from(number));
    key(["order-revision", &id.to_string(), &number])
}

pub(crate) fn revisions(id: OrderId) -> Prefix {
    prefix(["order-revision", &id.to_string()])
}

pub(crate) fn all_revisions() -> Prefix {
    prefix(["order-revision"])
}

pub(crate) fn event(id: OrderId, first_seq: u64) -> Key {
    key(["order-event", &id.to_string(), &sortable(first_seq)])
}

/// The row that tells people of an order's new state, where it is one that they are told of.
pub(crate) fn told(
    order: &Order,
    before: OrderState,
    comes_to: OrderState,
    at: Timestamp,
) -> Option<(Key, Bytes)> {
    let notice = Notice::of(order, before, comes_to, at)?;
    let seq = sortable(order.last_event);
    let key = key(["notice", &order.workspace, &order.id.to_string(), &seq]);
    Some((key, encode(&notice)))
}

pub(crate) fn events(id: OrderId) -> Prefix {
    prefix(["order-event", &id.to_string()])
}

pub(crate) fn sample(id: OrderId, node: NodeId, chunk: u64) -> Key {
    key([
        "order-sample",
        &id.to_string(),
        &sortable(u64::from(node)),
        &sortable(chunk),
    ])
}

pub(crate) fn samples_of(id: OrderId, node: NodeId) -> Prefix {
    prefix(["order-sample", &id.to_string(), &sortable(u64::from(node))])
}

pub(crate) fn samples(id: OrderId) -> Prefix {
    prefix(["order-sample", &id.to_string()])
}

pub(crate) fn active(id: OrderId) -> Key {
    key(["order-active", &id.to_string()])
}

pub(crate) fn all_active() -> Prefix {
    prefix(["order-active"])
}

pub(crate) fn owner(id: OrderId) -> Key {
    key(["order-owner", &id.to_string()])
}

pub(crate) fn all_locks() -> Prefix {
    prefix(["lock"])
}

pub(crate) fn lock(server: ServerId) -> Key {
    key(["lock", &server.to_string()])
}

pub(crate) fn installed(instance: InstanceId, server: ServerId) -> Key {
    key(["installed", &instance.to_string(), &server.to_string()])
}

pub(crate) fn installed_before(instance: InstanceId, server: ServerId) -> Key {
    key([
        "installed-before",
        &instance.to_string(),
        &server.to_string(),
    ])
}

pub(crate) fn unavailable(instance: InstanceId, cell: &str, server: ServerId) -> Key {
    key([
        "unavailable",
        &instance.to_string(),
        cell,
        &server.to_string(),
    ])
}

pub(crate) fn unavailable_of(instance: InstanceId) -> Prefix {
    prefix(["unavailable", &instance.to_string()])
}

pub(crate) fn all_unavailable() -> Prefix {
    prefix(["unavailable"])
}

pub(crate) fn slot(server: ServerId, order: OrderId, unit: u32) -> Key {
    key([
        "inbox",
        &server.to_string(),
        &order.to_string(),
        &sortable(u64::from(unit)),
    ])
}

pub(crate) fn pool_weight(pool: &str, server: ServerId) -> Key {
    key(["pool-weight", pool, &server.to_string()])
}

pub(crate) fn owed_weight(pool: PoolId, server: ServerId) -> Key {
    key(["owed-weight", &pool.to_string(), &server.to_string()])
}

pub(crate) fn pool_weights(pool: &str) -> Prefix {
    prefix(["pool-weight", pool])
}

pub(crate) fn pool_fault(pool: &str) -> Key {
    key(["pool-fault", pool])
}

pub(crate) fn pool_traffic(pool: &str) -> Key {
    key(["pool-traffic", pool])
}

/// The node's id at the end of a node's key.
pub(crate) fn node_id(key: &Key) -> Option<NodeId> {
    key.segments()
        .next_back()
        .and_then(|segment| segment.parse().ok())
}

/// A record as bytes.
pub(crate) fn encode<T: Serialize>(record: &T) -> Bytes {
    serde_json::to_vec(record)
        .expect("records have string keys")
        .into()
}

/// A node's row as bytes. Texts in it are cut further where escapes made it too large: halved until the row fits.
pub(crate) fn encode_node(row: &NodeProgress) -> Bytes {
    let mut bytes = encode(row);
    let mut keep = NODE_MAX_BYTES;
    while bytes.len() > NODE_MAX_BYTES && keep > 0 {
        keep /= 2;
        let mut short = row.clone();
        text::cut(&mut short.message, keep);
        if let Some(result) = &mut short.result {
            text::cut(&mut result.message, keep);
            cut_output(result, keep);
        }
        bytes = encode(&short);
    }
    bytes
}

/// Cuts the middle of an output further, as its agent does: the line in its place says how much is missing altogether.
fn cut_output(result: &mut TaskResult, keep: usize) {
    let whole = result.output.as_str();
    let (before, (head, tail)) = match head_and_tail(result) {
        Some((head, tail)) => (head.len() + tail.len(), (head, tail)),
        None => (whole.len(), (whole, whole)),
    };
    if before <= keep {
        return;
    }
    let half = keep / 2;
    let head = &head[..head.floor_char_boundary(half)];
    let tail = &tail[tail.ceil_char_boundary(tail.len().saturating_sub(half))..];
    let dropped_bytes = result.dropped_bytes + (before - head.len() - tail.len()) as u64;
    result.output = format!("{head}{}{tail}", dropped_line(dropped_bytes));
    result.dropped_bytes = dropped_bytes;
}

/// The two ends of an output whose middle was dropped; `None`: nothing was.
pub(crate) fn head_and_tail(result: &TaskResult) -> Option<(&str, &str)> {
    match result.dropped_bytes {
        0 => None,
        dropped => result.output.split_once(&dropped_line(dropped)),
    }
}

/// What an agent writes in the place of what it drops.
fn dropped_line(bytes: u64) -> String {
    format!("\n[… {bytes} bytes dropped …]\n")
}

/// Reads a record.
pub(crate) fn decode<T: DeserializeOwned>(
    entry: &Entry,
    what: &'static str,
) -> Result<T, RowError> {
    serde_json::from_slice(&entry.value).map_err(|source| RowError::Malformed {
        key: entry.key.to_string(),
        what,
        source,
    })
}

/// One record by its key.
pub(crate) async fn read<T: DeserializeOwned>(
    store: &dyn Store,
    key: &Key,
    what: &'static str,
) -> Result<Option<(T, Revision)>, RowError> {
    let entry = store.get(key).await.map_err(|source| RowError::Store {
        key: key.to_string(),
        source,
    })?;
    entry
        .map(|entry| Ok((decode(&entry, what)?, entry.revision)))
        .transpose()
}

/// Every row below a prefix.
pub(crate) async fn read_all(store: &dyn Store, prefix: &Prefix) -> Result<Vec<Entry>, RowError> {
    let mut all: Vec<Entry> = Vec::new();
    loop {
        let page = store
            .scan(
                prefix,
                all.last().map(|entry| &entry.key),
                windlass_store::PAGE_MAX_ENTRIES,
            )
            .await
            .map_err(|source| RowError::Store {
                key: prefix.to_string(),
                source,
            })?;
        let more = page.more;
        all.extend(page.entries);
        if !more {
            return Ok(all);
        }
    }
}

/// An order's header.
pub(crate) async fn read_order(
    store: &dyn Store,
    id: OrderId,
) -> Result<Option<(Order, Revision)>, RowError> {
    read(store, &order(id), "an order").await
}

/// Whether an order is over, or gone: what it holds is free then, whatever kept it from giving that back.
pub(crate) async fn has_ended(store: &dyn Store, id: OrderId) -> Result<bool, RowError> {
    let found = read_order(store, id).await?;
    Ok(found.is_none_or(|(order, _)| order.state.is_terminal()))
}

/// Every node row of an order.
pub(crate) async fn read_nodes(
    store: &dyn Store,
    id: OrderId,
) -> Result<Vec<(NodeId, NodeProgress)>, RowError> {
    let rows = read_all(store, &nodes(id)).await?;
    rows.iter()
        .filter_map(|entry| Some((node_id(&entry.key)?, entry)))
        .map(|(id, entry)| Ok((id, decode(entry, "a node's progress")?)))
        .collect()
}

/// Every revision of an order's plan, the first one first.
pub(crate) async fn read_revisions(
    store: &dyn Store,
    order: &Order,
) -> Result<Vec<PlanRevision>, RowError> {
    let rows = read_all(store, &revisions(order.id)).await?;
    if rows.is_empty() {
        return Ok(order.revisions.clone());
    }
    rows.iter()
        .map(|entry| decode(entry, "a plan's revision"))
        .collect()
}

/// The events of one commit.
pub(crate) fn decode_events(entry: &Entry) -> Result<Vec<OrderEvent>, RowError> {
    decode(entry, "an order's events")
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use windlass_domain::{
        Digest, Timestamp,
        order::{Control, Ending, OrderState, Purpose},
        progress::Counts,
        task::{Outcome, TaskResult},
    };

    use super::*;

    /// Order `number` of the workspace `prod`: a release that nobody has run, whose plan and request are its number.
    pub(crate) fn order(number: u128, state: OrderState) -> Order {
        let id = OrderId::from_uuid(uuid::Uuid::from_u128(number));
        let digest = |what: &str| Digest::of(format!("{what} {number}").as_bytes());
        Order {
            schema: Order::SCHEMA,
            id,
            workspace: "prod".to_owned(),
            title: format!("order {number}"),
            purpose: Purpose::Release,
            state,
            state_reason: String::new(),
            strategy: "grouped@1.0.0".to_owned(),
            plan: digest("plan"),
            revisions: vec![],
            spec: digest("spec"),
            counts: Counts::default(),
            control: if state.is_terminal() {
                Control::Ended(Ending::Succeeded)
            } else {
                Control::Active
            },
            stalled: false,
            lock_owner: id,
            last_event: 1,
            rolled_back_by: None,
            rollback_asked: None,
            server_count: 1,
            created_by: "anna".to_owned(),
            created_at: Timestamp::from_unix_ms(0),
            started_at: None,
            finished_at: None,
            last_progress_at: None,
            notify: true,
            tech_stacks: Vec::new(),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever an agent reports.
        #[test]
        fn every_row_of_a_node_fits(
            character in any::<char>(),
            message in 0_usize..120_000,
            output in 0_usize..120_000,
        ) {
            let text = |count: usize| std::iter::repeat_n(character, count).collect::<String>();
            let row = NodeProgress {
                message: text(message),
                result: Some(TaskResult {
                    outcome: Outcome::Failed,
                    exit_code: None,
                    output: text(output),
                    dropped_bytes: 0,
                    message: text(message),
                    fault: None,
                    started_at: None,
                    finished_at: Timestamp::from_unix_ms(0),
                }),
                ..NodeProgress::default()
            };
            let bytes = encode_node(&row);
            prop_assert!(bytes.len() <= NODE_MAX_BYTES, "{}", bytes.len());
            let kept: NodeProgress = serde_json::from_slice(&bytes).expect("it can be read");
            prop_assert_eq!(kept.result.expect("a result").outcome, Outcome::Failed);
        }
    }

    /// An output of `before` bytes of `text`, then `dropped` that an agent left out, then `after`.
    pub(crate) fn log_of(text: &str, before: usize, dropped: u64, after: usize) -> TaskResult {
        let repeated = text.repeat(before.max(after) / text.len() + 1);
        let middle = match dropped {
            0 => String::new(),
            dropped => format!("\n[… {dropped} bytes dropped …]\n"),
        };
        TaskResult {
            outcome: Outcome::Succeeded,
            exit_code: Some(0),
            output: format!(
                "{}{middle}{}",
                &repeated[..before],
                &repeated[repeated.len() - after..]
            ),
            dropped_bytes: dropped,
            message: String::new(),
            fault: None,
            started_at: None,
            finished_at: Timestamp::from_unix_ms(0),
        }
    }

    #[test]
    fn what_is_cut_of_a_log_is_said_in_one_line_with_what_was_dropped() {
        // JSON of JSON: every quote takes two bytes.
        let json = "{\"level\":\"info\",\"a\":\"b\"}\n";
        for (before, dropped, after) in [
            (12_288, 1_000_000, 12_224),
            (24_000, 0, 0),
            (100, 7, 24_000),
        ] {
            let result = log_of(json, before, dropped, after);
            let whole = before as u64 + dropped + after as u64;
            let (start, end) = (
                result.output[..50].to_owned(),
                result.output[result.output.len() - 50..].to_owned(),
            );
            let row = NodeProgress {
                result: Some(result),
                ..NodeProgress::default()
            };
            assert!(
                encode(&row).len() > NODE_MAX_BYTES,
                "{before} {dropped} {after}"
            );
            let kept: NodeProgress = serde_json::from_slice(&encode_node(&row)).unwrap();
            let kept = kept.result.unwrap();
            let (head, tail) = head_and_tail(&kept).unwrap();
            assert!(head.starts_with(&start) && tail.ends_with(&end));
            assert!(!head.contains("dropped") && !tail.contains("dropped"));
            assert_eq!(
                head.len() as u64 + kept.dropped_bytes + tail.len() as u64,
                whole
            );
        }
        // What fits stays as it is.
        let short = log_of("text\n", 12_288, 99, 12_224);
        let row = NodeProgress {
            result: Some(short.clone()),
            ..NodeProgress::default()
        };
        let kept: NodeProgress = serde_json::from_slice(&encode_node(&row)).unwrap();
        assert_eq!(kept.result, Some(short));
    }
}
