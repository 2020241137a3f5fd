//! Backups of running and stopped platforms, restored and compared; altered ones refused.
#![allow(clippy::unwrap_used, reason = "helpers of tests, a failure is a panic")]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::StreamExt;
use windlass_store::backup::{
    BLOBS_DIRECTORY, BackupError, STORE_DIRECTORY, SmallFile, backup, backup_directory, restore,
    verify,
};
use windlass_store::sled::{self, SledOptions};
use windlass_store::{BlobDigest, Blobs, Key, Prefix, Revision, Store, StoreError, Txn, sortable};

async fn open(data: &Path) -> (Arc<dyn Store>, Blobs) {
    let store = sled::open(data.join(STORE_DIRECTORY), SledOptions::default())
        .await
        .unwrap();
    let blobs = Blobs::open_directory(data.join(BLOBS_DIRECTORY)).await;
    (store, blobs.unwrap())
}

fn key(segments: &[&str]) -> Key {
    Key::from_segments(segments).unwrap()
}

async fn rows(store: &dyn Store) -> BTreeMap<Key, (Revision, Bytes)> {
    let mut found = BTreeMap::new();
    let mut after: Option<Key> = None;
    loop {
        let page = store
            .scan(&Prefix::everything(), after.as_ref(), 1000)
            .await
            .unwrap();
        after = page.entries.last().map(|entry| entry.key.clone());
        for entry in page.entries {
            found.insert(entry.key, (entry.revision, entry.value));
        }
        if !page.more {
            return found;
        }
    }
}

async fn digests(blobs: &Blobs) -> Vec<BlobDigest> {
    blobs
        .list()
        .map(|info| info.unwrap().digest)
        .collect()
        .await
}

/// A small platform's data.
async fn filled(data: &Path) {
    let (store, blobs) = open(data).await;
    for number in 0..150 {
        let txn = Txn::new()
            .put(key(&["t", "row", &sortable(number)]), vec![7; 300])
            .put(key(&["t", "last"]), number.to_string());
        store.commit(txn).await.unwrap();
    }
    let gone = Txn::new().delete(key(&["t", "row", &sortable(3)]));
    store.commit(gone).await.unwrap();
    blobs
        .put_bytes(Bytes::from(vec![1; 700_000]))
        .await
        .unwrap();
    blobs.put_bytes(Bytes::new()).await.unwrap();
    std::fs::write(data.join("server.key"), b"secret").unwrap();
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_stopped_platform_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let archive = directory.path().join("backup");
    filled(&data).await;
    let manifest = backup_directory(&data, &["server.key", "missing"], &archive)
        .await
        .unwrap();
    assert_eq!((manifest.blobs, manifest.files), (2, 1));
    assert_eq!(manifest.row_frames, 150, "149 rows and the last one");
    let mode = std::fs::metadata(&archive).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(verify(&archive).await.unwrap(), manifest);
    let again = backup_directory(&data, &[], &archive).await;
    assert!(matches!(again, Err(BackupError::ArchiveExists { .. })));

    let copy = directory.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    assert_eq!(restore(&archive, &copy).await.unwrap(), manifest);
    let (old_store, old_blobs) = open(&data).await;
    let (new_store, new_blobs) = open(&copy).await;
    assert_eq!(rows(&*old_store).await, rows(&*new_store).await);
    assert_eq!(digests(&old_blobs).await, digests(&new_blobs).await);
    for digest in digests(&new_blobs).await {
        new_blobs.get_bytes(digest, 1 << 20).await.unwrap();
    }
    let server_key = std::fs::read(copy.join("server.key")).unwrap();
    assert_eq!(server_key, b"secret");
    // A revision that the old store gives out now is not given out by the new one.
    let txn = || Txn::new().put(key(&["t", "next"]), "x");
    let old = old_store.commit(txn()).await.unwrap();
    let new = new_store.commit(txn()).await.unwrap();
    assert!(new.0 > old.0 + (1 << 30), "{new} after {old}");
    old_store.close().await.unwrap();
    new_store.close().await.unwrap();

    let full = restore(&archive, &copy).await;
    assert!(matches!(full, Err(BackupError::TargetNotEmpty { .. })));
    let nowhere = backup_directory(&directory.path().join("no"), &[], &archive).await;
    assert!(matches!(nowhere, Err(BackupError::NoDataDirectory { .. })));
}

#[tokio::test]
async fn a_running_platform_is_not_opened() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let (store, _blobs) = open(&data).await;
    let archive = directory.path().join("backup");
    let refused = backup_directory(&data, &[], &archive).await;
    assert!(
        matches!(&refused, Err(BackupError::Store(StoreError::Locked { .. }))),
        "{refused:?}"
    );
    assert!(!archive.exists());
    store.close().await.unwrap();
}

/// Writers go on during the backup. Each transaction raises the number of both of its rows, refers to a blob that
/// was written before, and replaces the reference of the transaction before: the restored state must be whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_a_running_platform_is_one_state() {
    const WRITERS: u64 = 4;
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let (store, blobs) = open(&data).await;
    for number in 0..5000 {
        // In the middle of the keys, so that the scan takes time between the two rows of a writer.
        let txn = (0..100).fold(Txn::new(), |txn, part| {
            let part = sortable(number * 100 + part);
            txn.put(key(&["m", "ballast", &part]), "ballast")
        });
        store.commit(txn).await.unwrap();
        if number == 50 {
            break;
        }
    }
    let lease = store.lease(60_000).await.unwrap();
    let leased = Txn::new().put_leased(key(&["m", "owner"]), "x", lease.id());
    store.commit(leased).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicU64::new(0));
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (store, blobs) = (Arc::clone(&store), blobs.clone());
        let (stop, written) = (Arc::clone(&stop), Arc::clone(&written));
        writers.spawn(async move {
            let name = writer.to_string();
            let mut number = 0_u64;
            while !stop.load(Ordering::SeqCst) {
                let text = format!("{writer}/{number}");
                let digest = blobs.put_bytes(text.into()).await.unwrap();
                let mut txn = Txn::new()
                    .put(key(&["a", &name]), number.to_string())
                    .put(key(&["z", &name]), number.to_string())
                    .put(key(&["r", &name, &sortable(number)]), digest.to_string());
                if let Some(before) = number.checked_sub(3) {
                    txn = txn.delete(key(&["r", &name, &sortable(before)]));
                }
                store.commit(txn).await.unwrap();
                number += 1;
                written.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    for round in 0..3 {
        let before = written.load(Ordering::SeqCst);
        while written.load(Ordering::SeqCst) < before + 20 {
            tokio::task::yield_now().await;
        }
        let archive = directory.path().join(format!("backup-{round}"));
        let manifest = backup(&*store, &blobs, &[], &archive).await.unwrap();
        let after = written.load(Ordering::SeqCst);
        assert!(after > before + 20, "the writers went on");
        let copy = directory.path().join(format!("copy-{round}"));
        restore(&archive, &copy).await.unwrap();
        let (copied, copied_blobs) = open(&copy).await;
        let found = rows(&*copied).await;
        let newest = found.values().map(|(revision, _)| *revision).max();
        assert!(newest.unwrap() <= manifest.revision);
        assert!(!found.contains_key(&key(&["m", "owner"])), "leased");
        assert_eq!(
            found
                .keys()
                .filter(|key| key.to_string().starts_with("m/"))
                .count(),
            5100
        );
        for writer in 0..WRITERS {
            let name = writer.to_string();
            let first = &found[&key(&["a", &name])];
            assert_eq!(first, &found[&key(&["z", &name])], "both rows of one state");
            let number: u64 = std::str::from_utf8(&first.1).unwrap().parse().unwrap();
            let prefix = Prefix::from_segments(["r", &name]).unwrap();
            let references: Vec<_> = found
                .iter()
                .filter(|(key, _)| prefix.contains(key))
                .collect();
            let wanted: Vec<Key> = (number.saturating_sub(2)..=number)
                .map(|number| key(&["r", &name, &sortable(number)]))
                .collect();
            let keys: Vec<Key> = references.iter().map(|(key, _)| (*key).clone()).collect();
            assert_eq!(keys, wanted);
            for (_, (_, digest)) in references {
                let digest: BlobDigest = std::str::from_utf8(digest).unwrap().parse().unwrap();
                copied_blobs.get_bytes(digest, 100).await.unwrap();
            }
        }
        copied.close().await.unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_backup_never_writes_to_a_file_or_link_that_was_there_before() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    filled(&data).await;
    let other = dir.path().join("of-somebody");
    std::fs::write(&other, "kept").unwrap();
    let archive = dir.path().join("backup");
    let partial = dir.path().join("backup.partial");
    let make = async || backup_directory(&data, &[], &archive).await;
    let put_file = || {
        std::fs::write(&partial, "kept").unwrap();
        let open = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(&partial, open).unwrap();
    };
    let put_link = || symlink(&other, &partial).unwrap();
    let put_dangling_link = || symlink(dir.path().join("nowhere"), &partial).unwrap();
    for put in [&put_file as &dyn Fn(), &put_link, &put_dangling_link] {
        put();
        let refused = make().await;
        assert!(
            matches!(refused, Err(BackupError::PartialExists { .. })),
            "{refused:?}"
        );
        std::fs::remove_file(&partial).unwrap();
    }
    symlink(dir.path().join("nowhere"), &archive).unwrap();
    let refused = make().await;
    assert!(
        matches!(refused, Err(BackupError::ArchiveExists { .. })),
        "{refused:?}"
    );
    std::fs::remove_file(&archive).unwrap();
    assert!(!dir.path().join("nowhere").exists());
    assert_eq!(std::fs::read_to_string(&other).unwrap(), "kept");
    make().await.unwrap();
    let mode = std::fs::metadata(&archive).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(!partial.exists());
}

#[tokio::test]
async fn altered_and_cut_off_backups_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let archive = directory.path().join("backup");
    filled(&data).await;
    backup_directory(&data, &["server.key"], &archive)
        .await
        .unwrap();
    let whole = std::fs::read(&archive).unwrap();
    let bad = directory.path().join("bad");
    let target = directory.path().join("target");
    let listing = || -> Vec<_> {
        let entries = std::fs::read_dir(directory.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    std::fs::write(&bad, b"").unwrap();
    let before = listing();
    let refuse = async |content: &[u8]| {
        std::fs::write(&bad, content).unwrap();
        let error = restore(&bad, &target).await.unwrap_err();
        assert_eq!(listing(), before, "nothing is left");
        error
    };
    for length in (20..whole.len())
        .step_by(whole.len() / 40)
        .chain([whole.len() - 1])
    {
        let error = refuse(&whole[..length]).await;
        assert!(
            matches!(error, BackupError::Truncated { .. }),
            "{length}: {error}"
        );
    }
    for place in (20..whole.len())
        .step_by(whole.len() / 60)
        .chain([whole.len() - 1])
    {
        let mut altered = whole.clone();
        altered[place] ^= 1;
        let error = refuse(&altered).await;
        assert!(
            matches!(
                error,
                BackupError::Damaged { .. } | BackupError::Truncated { .. }
            ),
            "{place}: {error}"
        );
    }
    let mut longer = whole.clone();
    longer.push(0);
    assert!(matches!(refuse(&longer).await, BackupError::Damaged { .. }));
    for foreign in [&b""[..], b"PK\x03\x04", b"WINDLASS-BACKUP 2\n......"] {
        let error = refuse(foreign).await;
        assert!(matches!(error, BackupError::NotABackup { .. }), "{error}");
    }
    restore(&archive, &target).await.unwrap();
}

#[tokio::test]
async fn small_files_cannot_take_other_places() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let (store, blobs) = open(&data).await;
    let archive = directory.path().join("backup");
    for name in ["../x", "store", "blobs", "", "..", "a/b"] {
        let file = SmallFile {
            name: name.to_owned(),
            path: data.join(STORE_DIRECTORY).join("FORMAT"),
        };
        let refused = backup(&*store, &blobs, &[file], &archive).await;
        assert!(
            matches!(refused, Err(BackupError::BadFile { .. })),
            "{name}"
        );
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
    store.close().await.unwrap();
}
