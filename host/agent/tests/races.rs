//! An application's user exchanges names for links as fast as it can, while the agent, as root, works in the same directories.
//! Whatever the actions come to, nothing outside may be created, removed or changed.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt as _, chown, symlink},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::fs::{Dir, Mode, OFlags, RenameFlags, openat, renameat_with};
use windlass_agent::tree;
use windlass_domain::task::{Action, FilesRef, Outcome, PackageFormat};

use super::support::*;

/// How long every place is attacked, and how many exchanges there are at the least.
const ATTACK: Duration = Duration::from_secs(30);
const SWAPS: u64 = 10_000;
const NOBODY: u32 = 65_534;
const DAEMON: u32 = 1;
/// The attacker's names: a link to what is outside, and a directory of root's beside it.
const TRAP: &str = "trap";
const ROOTS: &str = "of-root";

/// Everything below a directory: owner, mode and content by path. Links are not followed.
fn picture(top: &Path) -> BTreeMap<PathBuf, (u32, u32, u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut left = vec![top.to_owned()];
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let content = match () {
            () if meta.is_symlink() => fs::read_link(&path)
                .unwrap()
                .into_os_string()
                .into_encoded_bytes(),
            () if meta.is_dir() => {
                left.extend(
                    fs::read_dir(&path)
                        .unwrap()
                        .map(|entry| entry.unwrap().path()),
                );
                Vec::new()
            }
            () => fs::read(&path).unwrap(),
        };
        found.insert(path, (meta.uid(), meta.gid(), meta.mode(), content));
    }
    found
}

/// A directory of root's with something to lose.
fn make_victim(path: &Path) {
    fs::create_dir_all(path.join("files/0")).unwrap();
    for file in ["secret", "files/secret", "files/0/secret"] {
        fs::write(path.join(file), "kept").unwrap();
    }
}

/// A directory of the attacker's, with the trap and a directory of root's in it.
fn make_arena(path: &Path, outside: &Path) {
    fs::create_dir_all(path).unwrap();
    symlink(outside, path.join(TRAP)).unwrap();
    make_victim(&path.join(ROOTS));
    chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
}

/// Root's directory in an arena, under whatever name and wherever it is now.
fn find_victim(arena: &Path, inode: u64) -> PathBuf {
    let mut left = vec![arena.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.ino() == inode {
                return path;
            }
            if meta.is_dir() {
                left.push(path);
            }
        }
    }
    panic!("root's directory in {} was removed", arena.display());
}

/// Exchanges names in a directory as the user `nobody`, on a thread of its own, until it is told to stop.
struct Attacker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Attacker {
    /// `swap_roots`: also with root's directory, for names that the agent makes.
    fn start(dir: PathBuf, swap_roots: fn(&str) -> bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            // Credentials are a thread's own in the kernel: only this one becomes the attacker.
            let (uid, gid) = (
                rustix::process::Uid::from_raw(NOBODY),
                rustix::process::Gid::from_raw(NOBODY),
            );
            rustix::thread::set_thread_groups(&[]).unwrap();
            rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            let mut swaps = 0;
            while !stopped.load(Ordering::Relaxed) {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let Ok(dir) = rustix::fs::open(&dir, flags, Mode::empty()) else {
                    continue;
                };
                for _ in 0..20 {
                    swaps += swap_all(&dir, swap_roots);
                }
            }
            swaps
        });
        Self { stop, thread }
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn swap_all(dir: &OwnedFd, swap_roots: fn(&str) -> bool) -> u64 {
    let mut swaps = 0;
    let mut swap = |one: &str, other: &str| {
        let swapped = renameat_with(dir, one, dir, other, RenameFlags::EXCHANGE);
        swaps += u64::from(swapped.is_ok());
    };
    let entries = Dir::read_from(dir).into_iter().flatten().flatten();
    for entry in entries {
        let Ok(name) = entry.file_name().to_str() else {
            continue;
        };
        if matches!(name, "." | ".." | TRAP | ROOTS) {
            continue;
        }
        swap(name, TRAP);
        swap(TRAP, name);
        if swap_roots(name) {
            swap(name, ROOTS);
            swap(ROOTS, name);
        }
    }
    swaps
}

/// Serves one file over HTTP for as long as the test runs.
fn serve(content: Vec<u8>) -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let mut request = Vec::new();
            let mut buffer = [0; 1024];
            while !request.ends_with(b"\r\n\r\n") {
                match stream.read(&mut buffer) {
                    Ok(0) | Err(_) => break,
                    Ok(count) => request.extend(&buffer[..count]),
                }
            }
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                content.len()
            );
            let sent = stream.write_all(head.as_bytes());
            sent.and_then(|()| stream.write_all(&content)).ok();
        }
    });
    port
}

fn site() -> Vec<u8> {
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut builder = tar::Builder::new(gzip);
    for at in 0..20 {
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o644);
        let path = format!("dir-{at}/sub/index.html");
        builder
            .append_data(&mut header, path, &b"hello"[..])
            .unwrap();
    }
    builder.into_inner().unwrap().finish().unwrap()
}

/// Runs an action again and again while its place is attacked. Returns how often, and how often it succeeded.
async fn attack(
    gateway: &Gateway,
    until: Instant,
    mut task: impl FnMut(u32) -> windlass_domain::task::Task,
) -> (u32, u32) {
    let (mut runs, mut succeeded) = (0, 0);
    while Instant::now() < until {
        runs += 1;
        let result = gateway.run(task(runs)).await;
        succeeded += u32::from(result.outcome == Outcome::Succeeded);
    }
    (runs, succeeded)
}

#[tokio::test(flavor = "multi_thread")]
async fn root_changes_nothing_outside_while_the_applications_user_swaps_links() {
    if !is_root() {
        eprintln!("skipped: only root can be led astray");
        return;
    }
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    let top = agent.dir.path().to_owned();
    let outside = top.join("outside");
    make_victim(&outside);
    let root = top.join("www");
    let (place, write) = (root.join("place"), root.join("write"));
    for arena in [&place, &write] {
        make_arena(arena, &outside);
    }
    agent.policy(|policy| policy.path_roots = vec![root.clone()]);
    agent.start();

    // A release that belongs to the attacker.
    let mut release = Order::new();
    let app = package(
        &gateway,
        b"#!/bin/sh\n".to_vec(),
        PackageFormat::Plain,
        "app",
    );
    for action in [
        Action::Fetch(app.clone()),
        Action::Unpack {
            package: app.clone(),
            release: "r1".into(),
        },
    ] {
        let mut task = release.task(action);
        task.run_as = Some("nobody".into());
        let result = gateway.run(task).await;
        assert_eq!(result.outcome, Outcome::Succeeded, "{result:?}");
    }
    let instance = agent
        .data()
        .join("instances")
        .join(release.instance.to_string());
    let released = instance.join("releases/r1");
    make_arena(&released, &outside);
    // Data that is given back and forth, and trees that are removed.
    let given = top.join("given");
    make_arena(&given, &outside);
    let removed = top.join("removed");
    fs::create_dir(&removed).unwrap();

    let inodes: Vec<u64> = [&place, &write, &released, &given]
        .map(|arena| fs::metadata(arena.join(ROOTS)).unwrap().ino())
        .into();
    let before = picture(&outside);
    let victim = picture(&place.join(ROOTS))
        .into_values()
        .collect::<Vec<_>>();

    let attackers = [
        ("static files", Attacker::start(place.clone(), |_| true)),
        (
            "files below a root",
            Attacker::start(write.clone(), |_| true),
        ),
        (
            "files of a release",
            Attacker::start(released.clone(), |_| true),
        ),
        ("data given away", Attacker::start(given.clone(), |_| true)),
        (
            "trees removed",
            Attacker::start(removed.join("tree"), |_| false),
        ),
    ];
    let until = Instant::now() + ATTACK;

    let give = std::thread::spawn({
        let given = given.clone();
        move || {
            for at in 0..10 {
                let dir = given.join(format!("d{at}"));
                fs::create_dir(&dir).unwrap();
                fs::write(dir.join("file"), "x").unwrap();
                chown(dir.join("file"), Some(NOBODY), Some(NOBODY)).unwrap();
                chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
            }
            let mut runs = 0;
            while Instant::now() < until {
                // An entry that vanishes or changes its kind in the middle is an error, and no harm.
                for (from, to) in [(NOBODY, DAEMON), (DAEMON, NOBODY)] {
                    while tree::give_tree(&given, from, to, to).is_err() {}
                }
                runs += 1;
            }
            runs
        }
    });
    let remove = std::thread::spawn({
        let (removed, outside) = (removed.clone(), outside.clone());
        move || {
            let mut runs = 0;
            while Instant::now() < until {
                let tree = removed.join("tree");
                fs::create_dir(&tree).unwrap();
                symlink(&outside, tree.join(TRAP)).unwrap();
                for at in 0..10 {
                    let dir = tree.join(format!("d{at}"));
                    fs::create_dir_all(dir.join("files/0")).unwrap();
                    fs::write(dir.join("files/secret"), "x").unwrap();
                    for dir in [dir.join("files/0"), dir.join("files"), dir] {
                        chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
                    }
                }
                chown(&tree, Some(NOBODY), Some(NOBODY)).unwrap();
                tree::remove_tree(&tree).unwrap();
                assert!(fs::symlink_metadata(&tree).is_err(), "the tree is removed");
                runs += 1;
            }
            runs
        }
    });
    let files = FilesRef {
        url: format!("http://127.0.0.1:{}/site.tar.gz", serve(site())),
        sha256: None,
        directory: format!("{}/site/", place.display()),
        max_bytes: 1 << 20,
    };
    let (mut placing, mut writing) = (Order::new(), Order::new());
    let as_nobody = |mut task: windlass_domain::task::Task| {
        task.run_as = Some("nobody".into());
        task
    };
    let write_file = |path: String| Action::WriteFile {
        path,
        content: "written".into(),
        mode: 0o644,
    };
    let (placed, written, released_files) = tokio::join!(
        attack(&gateway, until, |_| as_nobody(
            placing.task(Action::PlaceFiles(files.clone()))
        )),
        attack(&gateway, until, |run| {
            let path = format!("{}/a{run}/b/c/file", write.display());
            as_nobody(writing.task(write_file(path)))
        }),
        attack(&gateway, until, |run| {
            let mut task = as_nobody(release.task(write_file(format!("sub{run}/below/file"))));
            task.release = Some("r1".into());
            task
        }),
    );
    let (given_times, removed_times) = (give.join().unwrap(), remove.join().unwrap());
    let mut swaps = Vec::new();
    for (name, attacker) in attackers {
        swaps.push((name, attacker.stop()));
    }
    eprintln!(
        "placed {placed:?}, written {written:?}, in the release {released_files:?}, given {given_times}, removed {removed_times}; swaps {swaps:?}"
    );

    assert_eq!(picture(&outside), before, "something outside was changed");
    for (arena, inode) in [&place, &write, &released, &given].into_iter().zip(inodes) {
        let found = picture(&find_victim(arena, inode));
        assert_eq!(
            found.into_values().collect::<Vec<_>>(),
            victim,
            "root's directory in {} was changed",
            arena.display()
        );
    }
    for (name, swaps) in swaps {
        assert!(swaps >= SWAPS, "{name}: only {swaps} swaps");
    }
    for (runs, _) in [placed, written, released_files] {
        assert!(runs > 10, "the actions were not attacked: {runs} runs");
    }
    assert!(given_times > 0 && removed_times > 10);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let left = openat(rustix::fs::CWD, &removed, flags, Mode::empty()).unwrap();
    assert_eq!(
        Dir::read_from(&left).unwrap().flatten().count(),
        2,
        "only `.` and `..`"
    );
}
