//! Damaged, foreign and unreadable directories give errors that say what is wrong.
#![allow(clippy::unwrap_used, reason = "helpers of tests, a failure is a panic")]

use std::path::Path;

use windlass_store::sled::{self, SledOptions};
use windlass_store::{Key, StoreError, Txn};

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
