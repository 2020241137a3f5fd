//! Damaged, foreign and unreadable directories give errors that say what is wrong.
#![allow(clippy::unwrap_used, reason = "helpers of tests, a failure is a panic")]

use std::path::Path;

use windlass_store::sled::{self, SledOptions};
use windlass_store::{Key, Prefix, StoreError, Txn};

async fn filled(directory: &Path) {
    let store = sled::open(directory, SledOptions::default()).await.unwrap();
    for number in 0..200 {
        let key = Key::from_segments(["t", &number.to_string()]).unwrap();
        let txn = Txn::new().put(key, vec![b'x'; 4096]);
        store.commit(txn).await.unwrap();
    }
    store.close().await.unwrap();
}

async fn error_of(directory: &Path) -> StoreError {
    match sled::open(directory, SledOptions::default()).await {
        Ok(_) => panic!("it was opened"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn a_missing_file_is_damage_not_an_empty_store() {
    let directory = tempfile::tempdir().unwrap();
    filled(directory.path()).await;
    std::fs::remove_file(directory.path().join("db")).unwrap();
    let error = error_of(directory.path()).await;
    assert!(
        matches!(&error, StoreError::Corrupt { reason, .. } if reason.contains("`db` is missing")),
        "{error:?}"
    );
    assert!(!directory.path().join("db").exists(), "nothing was made");
}

#[tokio::test]
async fn an_emptied_file_is_damage_not_an_empty_store() {
    let directory = tempfile::tempdir().unwrap();
    filled(directory.path()).await;
    std::fs::write(directory.path().join("db"), b"").unwrap();
    let error = error_of(directory.path()).await;
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
}

#[tokio::test]
async fn garbage_is_damage_not_an_empty_store() {
    let directory = tempfile::tempdir().unwrap();
    filled(directory.path()).await;
    let path = directory.path().join("db");
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::write(&path, vec![0xa5; usize::try_from(length).unwrap()]).unwrap();
    let error = error_of(directory.path()).await;
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
}

/// Damage anywhere is noticed, at the end of the log too, where it looks like a crash while writing.
#[tokio::test]
async fn damage_after_a_clean_shutdown_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    filled(directory.path()).await;
    let path = directory.path().join("db");
    let whole = std::fs::read(&path).unwrap();
    let written = 1 + whole.iter().rposition(|byte| *byte == b'x').unwrap();
    let mut noticed = 0;
    for percent in [5, 50, 90, 99] {
        let mut damaged = whole.clone();
        let place = written * percent / 100;
        for byte in &mut damaged[place..place + 64] {
            *byte ^= 0x5a;
        }
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(directory.path()).unwrap() {
            let entry = entry.unwrap();
            if entry.path().is_file() {
                std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
            }
        }
        std::fs::write(copy.path().join("db"), &damaged).unwrap();
        match sled::open(copy.path(), SledOptions::default()).await {
            Err(StoreError::Corrupt { .. }) => noticed += 1,
            Err(error) => panic!("{percent} %: {error:?}"),
            // It hit a page that had been written again since: then every row must be there.
            Ok(store) => {
                let page = store.scan(&Prefix::everything(), None, 1000).await.unwrap();
                assert_eq!(page.entries.len(), 200, "{percent} %");
                assert!(
                    page.entries
                        .iter()
                        .all(|entry| entry.value == vec![b'x'; 4096])
                );
                store.close().await.unwrap();
            }
        }
    }
    assert!(
        noticed >= 2,
        "the newest pages are not written again: {noticed}"
    );
    let store = sled::open(directory.path(), SledOptions::default()).await;
    store.unwrap().close().await.unwrap();
}

#[tokio::test]
async fn another_format_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    filled(directory.path()).await;
    std::fs::write(directory.path().join("FORMAT"), "7\n").unwrap();
    let error = error_of(directory.path()).await;
    assert_eq!(
        error.to_string(),
        format!(
            "the store in `{}` has format 7, this version reads format 1; use a matching version",
            directory.path().display()
        )
    );
}

#[tokio::test]
async fn a_file_in_the_place_of_the_directory_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, "x").unwrap();
    let error = error_of(&path).await;
    assert!(
        matches!(&error, StoreError::Io { path: p, .. } if *p == path),
        "{error:?}"
    );
}
