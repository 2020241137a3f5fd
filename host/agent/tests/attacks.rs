//! Packages that are not what they should be. Each kind of attack has its own error, and nothing is left behind.

use std::{fs, io::Write as _, path::Path, sync::atomic::AtomicBool};

use flate2::{
    Compression,
    write::{DeflateEncoder, GzEncoder},
};
use windlass_agent::{
    config::Policy,
    unpack::{UnpackError, unpack},
};
use windlass_archive::{Reason, Refusal};
use windlass_domain::{
    Digest,
    task::{PackageFormat, PackageRef},
};

/// One entry of an archive in either format. The mode holds the kind, as in `st_mode`.
#[derive(Clone)]
struct Entry {
    path: String,
    mode: u32,
    content: Vec<u8>,
    /// Target of a hard link (tar only).
    hard: Option<String>,
}

fn file(path: &str, content: &str) -> Entry {
    Entry {
        path: path.into(),
        mode: 0o100_644,
        content: content.into(),
        hard: None,
    }
}

fn link(path: &str, target: &str) -> Entry {
    Entry {
        path: path.into(),
        mode: 0o120_777,
        content: target.into(),
        hard: None,
    }
}

fn special(path: &str, mode: u32) -> Entry {
    Entry {
        path: path.into(),
        mode,
        content: Vec::new(),
        hard: None,
    }
}

fn hard(path: &str, target: &str) -> Entry {
    Entry {
        path: path.into(),
        mode: 0o100_644,
        content: Vec::new(),
        hard: Some(target.into()),
    }
}

fn dir(path: &str, mode: u32) -> Entry {
    Entry {
        path: format!("{path}/"),
        mode: 0o040_000 | mode,
        content: Vec::new(),
        hard: None,
    }
}

fn tar_gz(entries: &[Entry]) -> Vec<u8> {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::best()));
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        // Past the checks of the builder, which would not write most of these.
        header.as_old_mut().name[..entry.path.len()].copy_from_slice(entry.path.as_bytes());
        header.set_mode(entry.mode & 0o7777);
        let kind = entry.mode & 0o170_000;
        let mut content = &entry.content[..];
        let target = match (&entry.hard, kind) {
            (Some(target), _) => Some(target.as_bytes()),
            (None, 0o120_000) => Some(std::mem::take(&mut content)),
            (None, _) => None,
        };
        if let Some(target) = target {
            header.as_old_mut().linkname[..target.len()].copy_from_slice(target);
        }
        header.set_entry_type(match kind {
            _ if entry.hard.is_some() => tar::EntryType::Link,
            0o120_000 => tar::EntryType::Symlink,
            0o040_000 => tar::EntryType::Directory,
            0o020_000 => tar::EntryType::Char,
            0o060_000 => tar::EntryType::Block,
            0o010_000 => tar::EntryType::Fifo,
            _ => tar::EntryType::Regular,
        });
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }
    builder.into_inner().unwrap().finish().unwrap()
}

fn zip(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut directory = Vec::new();
    for entry in entries {
        let mut packed = DeflateEncoder::new(Vec::new(), Compression::best());
        packed.write_all(&entry.content).unwrap();
        let packed = packed.finish().unwrap();
        let offset = u32::try_from(out.len()).unwrap();
        let mut common = Vec::new();
        for field in [20u16, 0, 8, 0, 0x21] {
            common.extend(field.to_le_bytes());
        }
        for field in [
            crc32fast::hash(&entry.content),
            packed.len() as u32,
            entry.content.len() as u32,
        ] {
            common.extend(field.to_le_bytes());
        }
        common.extend((entry.path.len() as u16).to_le_bytes());
        common.extend(0u16.to_le_bytes());
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend(entry.path.as_bytes());
        out.extend(&packed);
        directory.extend(b"PK\x01\x02\x14\x03");
        directory.extend(&common);
        directory.extend([0; 6]);
        directory.extend((entry.mode << 16).to_le_bytes());
        directory.extend(offset.to_le_bytes());
        directory.extend(entry.path.as_bytes());
    }
    let (start, size) = (out.len() as u32, directory.len() as u32);
    out.extend(directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    for field in [entries.len() as u16; 2] {
        out.extend(field.to_le_bytes());
    }
    out.extend(size.to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0, 0]);
    out
}

fn unpack_bytes(
    root: &Path,
    bytes: &[u8],
    format: PackageFormat,
    policy: &Policy,
) -> Result<(), UnpackError> {
    let source = root.join("package");
    fs::write(&source, bytes).unwrap();
    let package = PackageRef {
        digest: Digest::of(bytes),
        size_bytes: bytes.len() as u64,
        format,
        file_name: "app".into(),
        version: "1".into(),
    };
    let releases = root.join("releases");
    fs::create_dir_all(&releases).unwrap();
    let unpacked = unpack(
        &source,
        &package,
        &releases.join("r1"),
        None,
        policy,
        &AtomicBool::new(false),
    );
    if unpacked.is_err() {
        assert_eq!(
            fs::read_dir(&releases).unwrap().count(),
            0,
            "something is left"
        );
    }
    unpacked
}

type Judge = fn(&Reason) -> bool;

fn refusal(unpacked: Result<(), UnpackError>) -> Option<Refusal> {
    match unpacked {
        Err(UnpackError::Refused { refusal }) => Some(*refusal),
        Ok(()) | Err(_) => None,
    }
}

#[test]
fn every_attack_is_refused_in_every_format() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    let out = outside.path().to_str().unwrap();
    let traversal: Judge = |reason| matches!(reason, Reason::Traversal);
    let below: Judge =
        |reason| matches!(reason, Reason::BelowOther { parent, .. } if parent == "a");
    let leaves: Judge = |reason| matches!(reason, Reason::LinkLeaves { .. });
    let device: Judge = |reason| matches!(reason, Reason::Special(_));
    let set_id: Judge = |reason| matches!(reason, Reason::SetId(_));
    let twice: Judge = |reason| matches!(reason, Reason::Duplicate);
    let cases: Vec<(&str, Vec<Entry>, Judge)> = vec![
        ("traversal", vec![file("../victim", "x")], traversal),
        (
            "traversal inside",
            vec![file("a/../../victim", "x")],
            traversal,
        ),
        (
            "absolute",
            vec![file(&format!("{out}/victim"), "x")],
            |reason| matches!(reason, Reason::Absolute),
        ),
        ("link that leaves", vec![link("a", "../../victim")], leaves),
        ("absolute link", vec![link("a", out)], leaves),
        (
            "link then write",
            vec![dir("d", 0o755), link("a", "d"), file("a/victim", "x")],
            below,
        ),
        (
            "link replaced by a file",
            vec![link("a", "b"), file("a", "x")],
            twice,
        ),
        (
            "links that leave together",
            vec![
                dir("z", 0o755),
                dir("x", 0o755),
                dir("x/y", 0o755),
                link("x/y/l", "../../z"),
                link("m", "x/y/l/../../.."),
            ],
            leaves,
        ),
        (
            "links that leave only by the kernel's count",
            vec![
                dir("z", 0o755),
                dir("x", 0o755),
                dir("x/y", 0o755),
                link("x/y/l", "../../z"),
                link("m", "x/y/l/../.."),
            ],
            leaves,
        ),
        (
            "a file as a directory",
            vec![file("a", "x"), file("a/b", "x")],
            below,
        ),
        ("twice", vec![file("a", "x"), file("a", "y")], twice),
        (
            "twice, the same content, others between",
            vec![file("d/a", "x"), file("b", "y"), file("d/a", "x")],
            twice,
        ),
        (
            "twice in other spellings",
            vec![file("a", "x"), file("./a", "y")],
            twice,
        ),
        ("character device", vec![special("null", 0o020_666)], device),
        ("block device", vec![special("sda", 0o060_666)], device),
        ("fifo", vec![special("pipe", 0o010_666)], device),
        ("set-user-id", vec![special("su", 0o104_755)], set_id),
        ("set-group-id", vec![special("sg", 0o102_755)], set_id),
    ];
    for (name, entries, expected) in &cases {
        for (format, bytes) in [
            (PackageFormat::TarGz, tar_gz(entries)),
            (PackageFormat::Zip, zip(entries)),
        ] {
            let root = tempfile::tempdir().unwrap();
            let unpacked = unpack_bytes(root.path(), &bytes, format, &Policy::default());
            let found = refusal(unpacked).unwrap_or_else(|| panic!("{name} in {format:?}"));
            assert!(expected(&found.reason), "{name} in {format:?}: {found}");
            assert!(found.entry.is_some(), "{name} in {format:?}: {found}");
        }
    }
    // What only tar has: hard links.
    let outside_link: Judge = |reason| matches!(reason, Reason::LinkLeaves { .. });
    let missing: Judge = |reason| matches!(reason, Reason::HardLinkMissing { .. });
    let cases: Vec<(&str, Vec<Entry>, Judge)> = vec![
        ("out", vec![hard("a", "../victim")], outside_link),
        (
            "absolute",
            vec![hard("a", victim.to_str().unwrap())],
            outside_link,
        ),
        ("to nothing", vec![hard("a", "nothing")], missing),
        ("to itself", vec![hard("a", "a")], |reason| {
            matches!(reason, Reason::HardLinkCycle { .. })
        }),
        (
            "to each other",
            vec![hard("a", "b"), hard("b", "a")],
            |reason| matches!(reason, Reason::HardLinkCycle { .. }),
        ),
        (
            "to a directory",
            vec![dir("d", 0o755), hard("a", "d")],
            |reason| matches!(reason, Reason::HardLinkDirectory { .. }),
        ),
        (
            "to a link that is inside only where it is",
            vec![dir("x", 0o755), link("x/l", "../f"), hard("a", "x/l")],
            outside_link,
        ),
        (
            "to a later link that is inside only where it is",
            vec![hard("a", "x/l"), dir("x", 0o755), link("x/l", "../f")],
            outside_link,
        ),
        (
            "through a link",
            vec![
                dir("d", 0o755),
                file("d/f", "x"),
                link("l", "d"),
                hard("a", "l/f"),
            ],
            |reason| matches!(reason, Reason::BelowOther { .. }),
        ),
    ];
    for (name, entries, expected) in &cases {
        let root = tempfile::tempdir().unwrap();
        let bytes = tar_gz(entries);
        let unpacked = unpack_bytes(
            root.path(),
            &bytes,
            PackageFormat::TarGz,
            &Policy::default(),
        );
        let found = refusal(unpacked).unwrap_or_else(|| panic!("hard link {name}"));
        assert!(expected(&found.reason), "hard link {name}: {found}");
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
}

#[test]
fn limits_name_themselves() {
    let zeros = |megabytes: usize| Entry {
        content: vec![0; megabytes << 20],
        ..file("zeros", "")
    };
    let many: Vec<Entry> = (0..50).map(|n| file(&format!("f{n}"), "x")).collect();
    let small = Policy {
        unpack_bytes: 2 << 20,
        unpack_entries: 40,
        unpack_ratio: 100_000,
        ..Policy::default()
    };
    for (entries, policy, part) in [
        (vec![zeros(3)], &small, "policy.unpack_bytes"),
        (many, &small, "policy.unpack_entries"),
        (vec![zeros(20)], &Policy::default(), "policy.unpack_ratio"),
    ] {
        for (format, bytes) in [
            (PackageFormat::TarGz, tar_gz(&entries)),
            (PackageFormat::Zip, zip(&entries)),
        ] {
            let root = tempfile::tempdir().unwrap();
            let error = unpack_bytes(root.path(), &bytes, format, policy).unwrap_err();
            assert!(error.to_string().contains(part), "{format:?}: {error}");
        }
    }
}

#[test]
fn a_file_that_is_not_an_archive_is_refused() {
    for format in [
        PackageFormat::Tar,
        PackageFormat::TarGz,
        PackageFormat::TarXz,
        PackageFormat::TarZst,
        PackageFormat::TarBz2,
        PackageFormat::Zip,
    ] {
        for bytes in [
            &b""[..],
            b"not an archive at all",
            &tar_gz(&[file("a", "x")])[..20],
            &zip(&[file("a", "x")])[..40],
        ] {
            let root = tempfile::tempdir().unwrap();
            let unpacked = unpack_bytes(root.path(), bytes, format, &Policy::default());
            let found = refusal(unpacked).unwrap_or_else(|| panic!("{format:?}"));
            assert!(
                matches!(
                    found.reason,
                    Reason::Broken { .. } | Reason::Truncated { .. }
                ),
                "{format:?}: {found}"
            );
            assert!(found.offset.is_some(), "{format:?}: {found}");
        }
    }
}

#[test]
fn a_good_package_is_unpacked_as_it_is() {
    use std::os::unix::fs::PermissionsExt as _;
    let entries = [
        dir("bin", 0o7777),
        dir("bin", 0o2555),
        Entry {
            mode: 0o100_755,
            ..file("bin/app", "#!/bin/sh\n")
        },
        file("./etc/deep/app.conf", "x=1\n"),
        link("etc/current", "deep/app.conf"),
        link("log", "missing/later"),
    ];
    for (format, bytes) in [
        (PackageFormat::TarGz, tar_gz(&entries)),
        (PackageFormat::Zip, zip(&entries)),
    ] {
        let root = tempfile::tempdir().unwrap();
        unpack_bytes(root.path(), &bytes, format, &Policy::default()).unwrap();
        let release = root.path().join("releases/r1");
        assert_eq!(
            fs::read_to_string(release.join("etc/current")).unwrap(),
            "x=1\n"
        );
        let mode = |path: &str| {
            fs::metadata(release.join(path))
                .unwrap()
                .permissions()
                .mode()
                & 0o7777
        };
        assert_eq!(
            (mode("bin"), mode("bin/app"), mode("etc/deep/app.conf")),
            (0o755, 0o755, 0o644)
        );
    }
    // Kept whole.
    for (format, mode) in [(PackageFormat::Jar, 0o644), (PackageFormat::Plain, 0o755)] {
        let root = tempfile::tempdir().unwrap();
        unpack_bytes(root.path(), b"PK whatever", format, &Policy::default()).unwrap();
        let path = root.path().join("releases/r1/app");
        assert_eq!(
            fs::metadata(path).unwrap().permissions().mode() & 0o7777,
            mode
        );
    }
}
