//! Files that come, change and go, and what stays of them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{
    fs,
    time::{Duration, Instant},
};

use semver::{Version, VersionReq};
use serde_json::json;
use support::{Home, guest, lifecycle, outline, state_of, until};
use windlass_runtime::{LookupError, PluginState};

fn stack(version: &str) -> Vec<u8> {
    guest("tech-stack", &format!("stack;{version};ok;"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_live_side_by_side_and_a_pinned_digest_outlives_its_file_and_a_restart() {
    let home = Home::new();
    home.drop_file("one.wasm", &stack("1.0.0"));
    let plugins = home.open().await;
    let one = plugins.get("stack", None).unwrap().reference().clone();

    home.drop_file("two.wasm", &stack("1.1.0"));
    home.drop_file("beta.wasm", &stack("2.0.0-beta.1"));
    until(&plugins, "three active", |list| {
        list.iter()
            .filter(|status| status.state == PluginState::Active)
            .count()
            == 3
    })
    .await;
    assert_eq!(
        outline(&plugins),
        [
            "one.wasm stack@1.0.0 Active",
            "two.wasm stack@1.1.0 Active default",
            "beta.wasm stack@2.0.0-beta.1 Active",
        ]
    );
    let wanted = VersionReq::parse("=1.0.0").unwrap();
    assert_eq!(
        *plugins.get("stack", Some(&wanted)).unwrap().reference(),
        one
    );
    let error = plugins
        .get("stack", Some(&VersionReq::parse("^3").unwrap()))
        .unwrap_err();
    assert!(error.to_string().contains("1.0.0, 1.1.0"), "{error}");

    // Operators' decisions.
    plugins.decide(|decisions| {
        decisions
            .disabled
            .insert(("stack".into(), Version::new(1, 1, 0)));
    });
    assert_eq!(*plugins.get("stack", None).unwrap().reference(), one);
    plugins.decide(|decisions| decisions.disabled.clear());
    plugins.decide(|decisions| {
        decisions
            .pinned
            .insert("stack".into(), Version::new(1, 0, 0));
    });
    assert_eq!(*plugins.get("stack", None).unwrap().reference(), one);
    plugins.decide(|decisions| decisions.pinned.clear());

    // The file goes, the digest stays: now and after a restart.
    fs::remove_file(home.file("one.wasm")).unwrap();
    until(&plugins, "one retired", |list| {
        list.iter()
            .any(|status| status.digest == Some(one.digest) && status.state == PluginState::Retired)
    })
    .await;
    assert!(plugins.get("stack", Some(&wanted)).is_err());
    plugins
        .pinned(one.digest)
        .await
        .unwrap()
        .lifecycle(&lifecycle(json!({})))
        .await
        .unwrap();
    plugins.close().await;
    drop(plugins);

    let plugins = home.open().await;
    let pinned = plugins.pinned(one.digest).await.unwrap();
    assert_eq!(*pinned.reference(), one);
    pinned.lifecycle(&lifecycle(json!({}))).await.unwrap();
    plugins.decide(|decisions| {
        decisions.revoked.insert(one.digest);
    });
    assert_eq!(
        plugins.pinned(one.digest).await.unwrap_err(),
        LookupError::Revoked { digest: one.digest }
    );
    let unknown = windlass_domain::Digest::of(b"never seen");
    assert_eq!(
        plugins.pinned(unknown).await.unwrap_err(),
        LookupError::UnknownDigest { digest: unknown }
    );
    plugins.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_fails_never_displaces_the_running_one() {
    let home = Home::new();
    home.drop_file("stack.wasm", &stack("1.0.0"));
    let plugins = home.open().await;
    let running = plugins.get("stack", None).unwrap().reference().clone();

    home.drop_file("stack.wasm", &guest("tech-stack", "stack;1.1.0;trap;"));
    until(&plugins, "rejected", |list| {
        state_of(list, "stack.wasm") == Some(PluginState::Rejected)
    })
    .await;
    let expect = [
        "stack.wasm stack@1.0.0 Active default",
        "stack.wasm Rejected DescribeFailed",
    ];
    assert_eq!(outline(&plugins), expect);
    assert_eq!(*plugins.get("stack", None).unwrap().reference(), running);
    plugins.close().await;
    drop(plugins);

    // Also after a restart, when the good bytes are nowhere in the directory.
    let plugins = home.open().await;
    assert_eq!(outline(&plugins), expect);
    plugins
        .get("stack", None)
        .unwrap()
        .lifecycle(&lifecycle(json!({})))
        .await
        .unwrap();

    home.drop_file("stack.wasm", &stack("1.1.0"));
    until(&plugins, "mended", |list| {
        list.iter()
            .any(|status| status.is_default && status.digest != Some(running.digest))
    })
    .await;
    assert_eq!(
        outline(&plugins),
        [
            "- stack@1.0.0 Retired",
            "stack.wasm stack@1.1.0 Active default"
        ]
    );
    plugins.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_keeps_its_bytes_when_its_file_is_overwritten_in_place() {
    let home = Home::new();
    let first = stack("1.0.0");
    let mut second = stack("1.0.0");
    // Same name and version, other bytes: a custom section at the end.
    second.extend_from_slice(&[0, 5, 1, b'x', 1, 2, 3]);
    home.drop_file("a.wasm", &first);
    let plugins = home.open().await;
    home.drop_file("b.wasm", &second);
    until(&plugins, "b rejected", |list| {
        state_of(list, "b.wasm") == Some(PluginState::Rejected)
    })
    .await;
    assert_eq!(
        outline(&plugins),
        [
            "a.wasm stack@1.0.0 Active default",
            "b.wasm Rejected DuplicateVersion"
        ]
    );
    fs::remove_file(home.file("b.wasm")).unwrap();
    until(&plugins, "b removed", |list| list.len() == 1).await;

    // Overwritten by a rename, and by writing into the file itself.
    let running = windlass_domain::Digest::of(&first);
    let rejected = [
        "a.wasm stack@1.0.0 Active default",
        "a.wasm Rejected DuplicateVersion",
    ];
    home.drop_file("a.wasm", &second);
    until(&plugins, "a rejected", |list| {
        state_of(list, "a.wasm") == Some(PluginState::Rejected)
    })
    .await;
    assert_eq!(outline(&plugins), rejected);
    let text = plugins.list()[1].rejection.clone().unwrap().text;
    assert!(text.contains("overwritten"), "{text}");
    assert!(text.contains("Raise the version"), "{text}");
    home.drop_file("a.wasm", &first);
    until(&plugins, "a restored", |list| list.len() == 1).await;
    fs::write(home.file("a.wasm"), &second).unwrap();
    until(&plugins, "a rejected again", |list| {
        state_of(list, "a.wasm") == Some(PluginState::Rejected)
    })
    .await;
    assert_eq!(
        plugins.get("stack", None).unwrap().reference().digest,
        running
    );
    plugins.close().await;
    drop(plugins);

    // Also after a restart, and when the file was overwritten again while no server was running.
    second.extend_from_slice(&[0, 5, 1, b'y', 1, 2, 3]);
    home.drop_file("a.wasm", &second);
    let plugins = home.open().await;
    assert_eq!(outline(&plugins), rejected);
    plugins
        .get("stack", None)
        .unwrap()
        .lifecycle(&lifecycle(json!({})))
        .await
        .unwrap();
    assert_eq!(
        plugins.get("stack", None).unwrap().reference().digest,
        running
    );

    // A higher version replaces it, as a new build should.
    home.drop_file("a.wasm", &stack("1.1.0"));
    until(&plugins, "replaced by 1.1.0", |list| {
        list.iter()
            .any(|status| status.is_default && status.digest != Some(running))
    })
    .await;
    assert_eq!(
        outline(&plugins),
        ["- stack@1.0.0 Retired", "a.wasm stack@1.1.0 Active default"]
    );
    plugins.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pin_is_visible_with_its_reason_and_holds_back_later_versions() {
    let home = Home::new();
    home.drop_file("one.wasm", &stack("1.0.0"));
    let plugins = home.open().await;
    assert_eq!(plugins.list()[0].pin, None);
    plugins.decide(|decisions| {
        decisions
            .pinned
            .insert("stack".into(), Version::new(1, 0, 0));
        decisions
            .pin_reasons
            .insert("stack".into(), "promotion of stack@1.0.0 (by hand)".into());
    });
    home.drop_file("two.wasm", &stack("1.1.0"));
    until(&plugins, "two active", |list| list.len() == 2).await;
    until(&plugins, "two loaded", |list| {
        list.iter()
            .all(|status| status.state == PluginState::Active)
    })
    .await;
    for status in plugins.list() {
        assert_eq!(
            status.pin.as_deref(),
            Some("pinned to 1.0.0 by promotion of stack@1.0.0 (by hand)")
        );
        assert_eq!(
            status.is_default,
            status.file.as_deref() == Some("one.wasm")
        );
    }

    // A pin to a version that was removed has no effect, which is visible too.
    fs::remove_file(home.file("one.wasm")).unwrap();
    until(&plugins, "two is the default", |list| {
        list.iter()
            .any(|status| status.is_default && status.file.as_deref() == Some("two.wasm"))
    })
    .await;
    let pin = plugins.list().into_iter().find_map(|status| status.pin);
    assert!(pin.is_some_and(|pin| pin.contains("not active")));
    plugins.decide(|decisions| decisions.pinned.clear());
    assert!(plugins.list().iter().all(|status| status.pin.is_none()));
    plugins.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_still_being_written_is_not_read() {
    use std::io::Write as _;
    let home = Home::new();
    let mut config = home.config();
    config.settle = Duration::from_secs(1);
    let plugins = home.open_with(config).await;
    let mut changes = plugins.changes();
    let before = *changes.borrow_and_update();
    let bytes = stack("1.0.0");
    let mut file = fs::File::create(home.file("slow.wasm")).unwrap();
    for part in bytes.chunks(bytes.len() / 8 + 1) {
        file.write_all(part).unwrap();
        file.sync_all().unwrap();
    }
    drop(file);
    until(&plugins, "active", |list| {
        state_of(list, "slow.wasm") == Some(PluginState::Active)
    })
    .await;
    // Loading, then active: no rejection of a part of it between them.
    assert_eq!(*changes.borrow_and_update(), before + 2);
    plugins.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wishes_are_granted_by_digest() {
    let home = Home::new();
    home.drop_file("wish.wasm", &guest("tech-stack", "wish;1.0.0;wish;"));
    home.drop_file("modest.wasm", &stack("1.0.0"));
    let plugins = home.open().await;
    let digest = plugins.get("wish", None).unwrap().reference().digest;
    assert!(!plugins.is_approved(digest));
    assert!(plugins.is_approved(plugins.get("stack", None).unwrap().reference().digest));
    plugins.decide(|decisions| {
        decisions.approved.insert(digest);
    });
    assert!(plugins.is_approved(digest));
    plugins.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_warm_start_compiles_nothing() {
    let home = Home::new();
    for index in 0..4 {
        home.drop_file(&format!("{index}.wasm"), &stack(&format!("1.{index}.0")));
    }
    let plugins = home.open().await;
    plugins.close().await;
    drop(plugins);
    let mut config = home.config();
    // A compiling child that could not answer: nobody asks it.
    config.compile_command = vec!["/nonexistent".into()];
    let started = Instant::now();
    let plugins = windlass_runtime::Plugins::open(config).await.unwrap();
    let elapsed = started.elapsed();
    let active = plugins
        .list()
        .iter()
        .filter(|status| status.state == PluginState::Active)
        .count();
    assert_eq!(active, 4, "{:?}", outline(&plugins));
    // Generous: compiling four of them takes longer than this on any machine.
    assert!(elapsed < Duration::from_millis(1500), "{elapsed:?}");
    plugins.close().await;
}
