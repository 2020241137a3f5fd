//! Blobs in a directory and in an object store.
#![allow(clippy::unwrap_used, reason = "helpers of tests, a failure is a panic")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, memory::InMemory};
use windlass_store::{BlobDigest, BlobError, Blobs, StoreError};

const NOTHING: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Every file below a directory, without the lock.
fn files(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.file_name().unwrap() != "LOCK" {
                found.push(path.strip_prefix(root).unwrap().display().to_string());
            }
        }
    }
    found.sort();
    found
}

async fn read_all(blobs: &Blobs, digest: BlobDigest, offset: u64) -> Vec<u8> {
    let mut reader = blobs.read(digest, offset).await.unwrap();
    let mut all = Vec::new();
    while let Some(chunk) = reader.next_chunk().await.unwrap() {
        all.extend_from_slice(&chunk);
    }
    all
}

fn pattern(size: usize) -> Bytes {
    (0..size).map(|n| (n * 31 % 251) as u8).collect()
}

/// What holds wherever blobs are.
async fn blobs_come_and_go(blobs: &Blobs) {
    let data = pattern(6 * 1024 * 1024 + 17);
    let digest = BlobDigest::of(&data);
    assert!(!blobs.exists(digest).await.unwrap());
    let mut writer = blobs.writer(data.len() as u64).await.unwrap();
    for chunk in data.chunks(70_001) {
        writer.write(Bytes::copy_from_slice(chunk)).await.unwrap();
    }
    let written = writer.finish(Some(digest)).await.unwrap();
    assert_eq!(written.digest, digest);
    assert_eq!(written.size_bytes, data.len() as u64);
    assert_eq!(blobs.size(digest).await.unwrap(), Some(data.len() as u64));
    assert!(read_all(blobs, digest, 0).await == data);
    assert!(read_all(blobs, digest, 1_000_003).await == data[1_000_003..]);
    assert!(read_all(blobs, digest, data.len() as u64).await.is_empty());
    let beyond = blobs.read(digest, data.len() as u64 + 1).await;
    assert!(matches!(beyond, Err(BlobError::OffsetTooLarge { .. })));
    let stream = blobs.read(digest, 0).await.unwrap().into_stream();
    let chunks: Vec<Bytes> = stream.try_collect().await.unwrap();
    assert_eq!(chunks.concat().len(), data.len());

    let empty = blobs.put_bytes(Bytes::new()).await.unwrap();
    assert_eq!(empty.to_string(), NOTHING);
    assert_eq!(blobs.get_bytes(empty, 0).await.unwrap(), Bytes::new());
    let small = blobs.put_bytes(Bytes::from_static(b"abc")).await.unwrap();
    assert_eq!(
        small,
        blobs.put_bytes(Bytes::from_static(b"abc")).await.unwrap()
    );
    assert_eq!(blobs.get_bytes(small, 3).await.unwrap(), "abc");
    let refused = blobs.get_bytes(small, 2).await;
    assert!(matches!(
        refused,
        Err(BlobError::TooLarge { limit_bytes: 2 })
    ));

    let listed: Vec<_> = blobs
        .list()
        .map(|info| info.unwrap().digest)
        .collect()
        .await;
    let mut wanted = vec![digest, empty, small];
    wanted.sort();
    assert_eq!(listed, wanted);
    assert!(blobs.delete(small).await.unwrap());
    assert!(!blobs.delete(small).await.unwrap());
    let missing = blobs.get_bytes(small, 3).await;
    assert!(matches!(missing, Err(BlobError::Missing { digest }) if digest == small));
}

async fn failed_writers_say_why(blobs: &Blobs) {
    let mut writer = blobs.writer(10).await.unwrap();
    writer.write(Bytes::from_static(b"12345678")).await.unwrap();
    let refused = writer.write(Bytes::from_static(b"901")).await;
    assert!(matches!(
        refused,
        Err(BlobError::TooLarge { limit_bytes: 10 })
    ));
    let again = writer.write(Bytes::from_static(b"9")).await;
    assert!(matches!(again, Err(BlobError::WriterFailed)));
    let finished = writer.finish(None).await;
    assert!(matches!(finished, Err(BlobError::WriterFailed)));

    let mut writer = blobs.writer(10).await.unwrap();
    writer.write(Bytes::from_static(b"abc")).await.unwrap();
    let announced = BlobDigest::of(b"abd");
    let wrong = writer.finish(Some(announced)).await;
    assert!(matches!(
        wrong,
        Err(BlobError::WrongDigest { expected, found })
            if expected == announced && found == BlobDigest::of(b"abc")
    ));
    let mut writer = blobs.writer(1 << 20).await.unwrap();
    writer.write(pattern(700_000)).await.unwrap();
    drop(writer);
    assert_eq!(blobs.list().count().await, 0);
}

/// Deletes what is dead and old, keeps what is live, and what is young.
async fn collection(blobs: &Blobs) {
    let live = blobs.put_bytes(Bytes::from_static(b"live")).await.unwrap();
    let dead = blobs.put_bytes(Bytes::from_static(b"dead")).await.unwrap();
    let modified = blobs.info(dead).await.unwrap().unwrap().modified;
    let is_live = |digest| async move { Ok::<_, BlobError>(digest == live) };
    let young = blobs.collect(is_live, modified).await.unwrap();
    assert_eq!((young.deleted, young.kept), (0, 2), "within the grace time");
    let later = modified + Duration::from_secs(3600);
    let held = blobs.hold_collection().await;
    let mut collecting = std::pin::pin!(blobs.collect(is_live, later));
    for _ in 0..10 {
        assert!(futures_util::poll!(&mut collecting).is_pending(), "held");
        tokio::task::yield_now().await;
    }
    drop(held);
    let old = collecting.await.unwrap();
    assert_eq!((old.deleted, old.deleted_bytes, old.kept), (1, 4, 1));
    assert!(!blobs.exists(dead).await.unwrap());
    assert!(blobs.exists(live).await.unwrap());
    let failing = |_| async { Err::<bool, _>(BlobError::WriterFailed) };
    assert!(blobs.collect(failing, later).await.is_err());
    assert!(blobs.exists(live).await.unwrap(), "when in doubt, it stays");
}

#[tokio::test]
async fn in_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let blobs = Blobs::open_directory(directory.path()).await.unwrap();
    failed_writers_say_why(&blobs).await;
    assert_eq!(files(directory.path()), Vec::<String>::new());
    collection(&blobs).await;
    for file in files(directory.path()) {
        std::fs::remove_file(directory.path().join(file)).unwrap();
    }
    blobs_come_and_go(&blobs).await;
    let left = files(directory.path());
    assert_eq!(left.len(), 2);
    assert!(left.contains(&format!("e3/{NOTHING}")), "{left:?}");
    let path = blobs.file_path(NOTHING.parse().unwrap()).unwrap();
    let mode = std::fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn in_an_object_store() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    failed_writers_say_why(&Blobs::in_objects(Arc::clone(&objects))).await;
    let fresh = || Blobs::in_objects(Arc::new(InMemory::new()));
    collection(&fresh()).await;
    blobs_come_and_go(&fresh()).await;
}

#[tokio::test]
async fn what_a_dead_process_left_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let blobs = Blobs::open_directory(directory.path()).await.unwrap();
    let kept = blobs.put_bytes(Bytes::from_static(b"kept")).await.unwrap();
    let second = Blobs::open_directory(directory.path()).await;
    assert!(matches!(
        second,
        Err(BlobError::Directory(StoreError::Locked { .. }))
    ));
    drop(blobs);
    std::fs::write(directory.path().join("tmp/1-2"), b"half").unwrap();
    let blobs = Blobs::open_directory(directory.path()).await.unwrap();
    assert_eq!(files(directory.path()).len(), 1);
    assert_eq!(blobs.get_bytes(kept, 10).await.unwrap(), "kept");
}

#[tokio::test]
async fn a_damaged_blob_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let blobs = Blobs::open_directory(directory.path()).await.unwrap();
    let digest = blobs.put_bytes(Bytes::from_static(b"right")).await.unwrap();
    std::fs::write(blobs.file_path(digest).unwrap(), b"wrong").unwrap();
    let read = blobs.get_bytes(digest, 10).await;
    assert!(matches!(
        read,
        Err(BlobError::Corrupt { found, .. }) if found == BlobDigest::of(b"wrong")
    ));
}

/// A blob that is written again while it is being collected stays.
#[tokio::test]
async fn writing_again_makes_a_blob_young() {
    let directory = tempfile::tempdir().unwrap();
    let blobs = Blobs::open_directory(directory.path()).await.unwrap();
    let digest = blobs.put_bytes(Bytes::from_static(b"again")).await.unwrap();
    let path = blobs.file_path(digest).unwrap();
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(long_ago).unwrap();
    let cutoff = long_ago + Duration::from_secs(1);
    let collected = blobs
        .collect(
            |digest| {
                let blobs = blobs.clone();
                async move {
                    // Found dead; before it is deleted, it is uploaded once more.
                    assert_eq!(digest, blobs.put_bytes("again".into()).await?);
                    Ok::<_, BlobError>(false)
                }
            },
            cutoff,
        )
        .await
        .unwrap();
    assert_eq!((collected.deleted, collected.kept), (0, 1));
    assert!(blobs.exists(digest).await.unwrap());
}

#[test]
fn digests_are_read_strictly() {
    let digest: BlobDigest = NOTHING.parse().unwrap();
    assert_eq!(digest, BlobDigest::of(b""));
    for wrong in [
        "",
        &NOTHING[1..],
        &NOTHING.to_uppercase(),
        &NOTHING.replace('e', "g"),
        &format!("{NOTHING}0"),
    ] {
        assert!(wrong.parse::<BlobDigest>().is_err(), "{wrong}");
    }
    let json = serde_json::to_string(&digest).unwrap();
    assert_eq!(json, format!("\"{NOTHING}\""));
    assert_eq!(serde_json::from_str::<BlobDigest>(&json).unwrap(), digest);
}
