//! The generator: what archives contain, how they are written, and what is to be said of them.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use flate2::{Compression, write::GzEncoder};
use windlass_domain::task::PackageFormat;

use super::{
    tar_writer::{self as tar, Dialect, Raw},
    zip_writer as zip,
};

pub(super) type Tree = BTreeMap<String, Node>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Directory { mode: u32 },
    File { mode: u32, content: Vec<u8> },
    Link { target: String },
}

pub(super) enum Reference {
    /// It extracts the same.
    Equal,
    /// It does not, for this reason.
    Differs(&'static str),
}

pub(super) enum Expect {
    Tree(Tree, Reference),
    /// The message contains this.
    Refused(&'static str),
}

pub(super) struct Generated {
    pub(super) class: &'static str,
    pub(super) name: String,
    pub(super) format: PackageFormat,
    pub(super) bytes: Vec<u8>,
    pub(super) expect: Expect,
}

/// SplitMix64.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn one_of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

#[derive(Clone)]
enum Item {
    Directory {
        path: String,
        mode: u32,
    },
    File {
        path: String,
        mode: u32,
        content: Vec<u8>,
    },
    Link {
        path: String,
        target: String,
    },
    Hard {
        path: String,
        target: String,
    },
}

/// A tree of ordinary and unusual names. Hard links where the format has them.
fn items(random: &mut Random, hard_links: bool) -> Vec<Item> {
    let mut items = Vec::new();
    let mut directories = vec![String::new()];
    let mut files: Vec<String> = Vec::new();
    for number in 0..3 + random.below(10) {
        let parent = random.one_of(&directories);
        let long = format!("{}-{number}", "n".repeat(90 + random.below(140)));
        let name = match random.below(8) {
            0 => format!("with space {number}"),
            1 => format!("zażółć-日本-{number}"),
            2 => long,
            3 => format!(".hidden-{number}"),
            4 => format!("-dash='{number}'"),
            _ => format!("f{number}"),
        };
        let path = if parent.is_empty() {
            name
        } else {
            format!("{parent}/{name}")
        };
        match random.below(if hard_links { 7 } else { 6 }) {
            0 | 1 => {
                // Sometimes the directory is only above others, or comes again with another mode.
                if random.below(4) > 0 {
                    let mode = random.one_of(&[0o755, 0o700, 0o711]);
                    items.push(Item::Directory {
                        path: path.clone(),
                        mode,
                    });
                    directories.push(path);
                } else {
                    let below = format!("{path}/only/below");
                    items.push(Item::File {
                        path: below.clone(),
                        mode: 0o644,
                        content: random.bytes(5),
                    });
                    files.push(below);
                    directories.push(path);
                }
            }
            2..=4 => {
                let length = random.one_of(&[0, 1, 511, 512, 513, 3000, 70_000]);
                items.push(Item::File {
                    path: path.clone(),
                    mode: random.one_of(&[0o644, 0o755, 0o600, 0o444]),
                    content: random.bytes(length),
                });
                files.push(path);
            }
            5 => items.push(Item::Link {
                path: format!("{path}.link"),
                target: random
                    .one_of(&["f0", "./missing/later", "sub/../f1"])
                    .to_owned(),
            }),
            _ => {
                if let Some(target) = (!files.is_empty()).then(|| random.one_of(&files)) {
                    items.push(Item::Hard { path, target });
                }
            }
        }
    }
    items.push(Item::File {
        path: "run.sh".into(),
        mode: 0o755,
        content: b"#!/bin/sh\n".to_vec(),
    });
    items
}

fn tree_of(items: &[Item]) -> Tree {
    let mut tree = Tree::new();
    for item in items {
        let path = match item {
            Item::Directory { path, .. }
            | Item::File { path, .. }
            | Item::Link { path, .. }
            | Item::Hard { path, .. } => path,
        };
        let mut at = 0;
        while let Some(next) = path[at..].find('/') {
            let parent = path[..at + next].to_owned();
            tree.entry(parent)
                .or_insert(Node::Directory { mode: 0o755 });
            at += next + 1;
        }
        let node = match item {
            Item::Directory { mode, .. } => Node::Directory { mode: mode | 0o700 },
            Item::File { mode, content, .. } => Node::File {
                mode: *mode,
                content: content.clone(),
            },
            Item::Link { target, .. } => Node::Link {
                target: target.clone(),
            },
            Item::Hard { target, .. } => tree[target].clone(),
        };
        tree.insert(path.clone(), node);
    }
    tree
}

/// How names and links that are too long for a header are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Long {
    Pax,
    Gnu,
}

fn raw_of(item: &Item) -> Raw {
    match item {
        Item::Directory { path, mode } => Raw::new(&format!("{path}/"), b'5', *mode),
        Item::File {
            path,
            mode,
            content,
        } => Raw::new(path, b'0', *mode).content(content),
        Item::Link { path, target } => Raw::new(path, b'2', 0o777).link(target),
        Item::Hard { path, target } => Raw::new(path, b'1', 0o644).link(target),
    }
}

fn append(out: &mut Vec<u8>, raw: &Raw, long: Long) {
    if !raw.fits() {
        match long {
            Long::Pax => {
                let mut records = tar::record("path", &raw.name);
                if !raw.link.is_empty() {
                    records.extend(tar::record("linkpath", &raw.link));
                }
                tar::pax(out, b'x', &records);
            }
            Long::Gnu => {
                if raw.link.len() > 100 {
                    tar::gnu_long(out, b'K', &raw.link);
                }
                if raw.name.len() > 100 {
                    tar::gnu_long(out, b'L', &raw.name);
                }
            }
        }
    }
    tar::append(out, raw);
}

fn tar_of(items: &[Item], dialect: Dialect, long: Long) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        let mut raw = raw_of(item);
        raw.dialect = dialect;
        append(&mut out, &raw, long);
    }
    out
}

fn through(program: &str, arguments: &[&str], bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program} is installed (see tests/setup.sh): {error}"));
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success(), "{program}");
    output.stdout
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Compresses a tar archive in one of all ways.
fn pack(random: &mut Random, bytes: Vec<u8>) -> (String, PackageFormat, Vec<u8>) {
    let half = bytes.len() / 2;
    let twice = |program: &str, arguments: &[&str]| {
        let mut out = through(program, arguments, &bytes[..half]);
        out.extend(through(program, arguments, &bytes[half..]));
        out
    };
    let (name, format, bytes) = match random.below(11) {
        0 | 1 => ("a.tar", PackageFormat::Tar, bytes),
        2 => ("a.tar.gz", PackageFormat::TarGz, gzip(&bytes)),
        3 => {
            let mut members = gzip(&bytes[..half]);
            members.extend(gzip(&bytes[half..]));
            // Padding, as on tapes.
            members.extend([0; 512]);
            ("a.tgz", PackageFormat::TarGz, members)
        }
        4 => (
            "a.tar.xz",
            PackageFormat::TarXz,
            through("xz", &["-1c"], &bytes),
        ),
        5 => (
            "a.txz",
            PackageFormat::TarXz,
            twice("xz", &["-1c", "--check=sha256"]),
        ),
        6 => {
            let filters = ["-c", "--x86", "--lzma2=preset=1"];
            (
                "a.tar.xz",
                PackageFormat::TarXz,
                through("xz", &filters, &bytes),
            )
        }
        7 => (
            "a.tar.zst",
            PackageFormat::TarZst,
            through("zstd", &["-qc"], &bytes),
        ),
        8 => (
            "a.tar.zst",
            PackageFormat::TarZst,
            twice("zstd", &["-qc", "--check", "-12"]),
        ),
        9 => (
            "a.tar.bz2",
            PackageFormat::TarBz2,
            through("bzip2", &["-1c"], &bytes),
        ),
        _ => ("a.tbz2", PackageFormat::TarBz2, twice("bzip2", &["-1c"])),
    };
    (name.to_owned(), format, bytes)
}

/// Ways to write an archive, ordinary and hostile.
type Class = (&'static str, fn(&mut Random, &Path) -> Made);

enum Made {
    Tar(Vec<u8>, Expect),
    /// Not compressed, or in this way.
    Packed(&'static str, PackageFormat, Vec<u8>, Expect),
    Zip(Vec<u8>, Expect),
}

fn equal(tree: Tree) -> Expect {
    Expect::Tree(tree, Reference::Equal)
}

fn differs(tree: Tree, why: &'static str) -> Expect {
    Expect::Tree(tree, Reference::Differs(why))
}

/// An ordinary tar archive with one more entry, or several, somewhere among the others.
fn with_tar(random: &mut Random, more: &[u8]) -> Vec<u8> {
    let items = items(random, true);
    let cut = random.below(items.len());
    let mut out = tar_of(&items[..cut], Dialect::Ustar, Long::Pax);
    out.extend(more);
    // Hard links of the second half may name files of the first one only.
    out.extend(tar_of(&items[cut..], Dialect::Ustar, Long::Pax));
    tar::end(&mut out);
    out
}

fn hostile(random: &mut Random, raw: &[Raw], why: &'static str) -> Made {
    let mut more = Vec::new();
    for raw in raw {
        append(&mut more, raw, random.one_of(&[Long::Pax, Long::Gnu]));
    }
    Made::Tar(with_tar(random, &more), Expect::Refused(why))
}

fn zip_items(random: &mut Random) -> (Vec<zip::Raw>, Tree) {
    let items = items(random, false);
    let mut entries = Vec::new();
    for item in &items {
        let mut entry = match item {
            Item::Directory { path, mode } => {
                let mut entry = zip::Raw::new(&format!("{path}/"), 0o040_000 | mode, b"");
                entry.deflate = false;
                entry
            }
            Item::File {
                path,
                mode,
                content,
            } => zip::Raw::new(path, 0o100_000 | mode, content),
            Item::Link { path, target } => zip::Raw::new(path, 0o120_777, target.as_bytes()),
            Item::Hard { .. } => continue,
        };
        entry.flags = 1 << 11;
        if entry.content.is_empty() {
            entry.deflate = false;
        }
        entries.push(entry);
    }
    (entries, tree_of(&items))
}

fn hostile_zip(random: &mut Random, change: impl FnOnce(&mut zip::Raw), why: &'static str) -> Made {
    let (mut entries, _) = zip_items(random);
    let mut entry = zip::Raw::new("hostile", 0o100_644, b"some content");
    change(&mut entry);
    let at = random.below(entries.len());
    entries.insert(at, entry);
    Made::Zip(
        zip::write(&entries, &zip::Shape::default()),
        Expect::Refused(why),
    )
}

/// A file with holes, packed by GNU tar in one of its formats.
fn gnu_sparse(random: &mut Random, scratch: &Path, arguments: &[&str]) -> Made {
    let place = scratch.join("sparse");
    fs::create_dir(&place).unwrap();
    let size = 200_000 + random.below(3_000_000);
    let mut content = vec![0; size];
    let file = fs::File::create(place.join("disk.img")).unwrap();
    file.set_len(size as u64).unwrap();
    for _ in 0..1 + random.below(30) {
        let length = 1 + random.below(6000);
        let at = random.below(size - length);
        let data = random.bytes(length);
        content[at..at + length].copy_from_slice(&data);
        std::os::unix::fs::FileExt::write_all_at(&file, &data, at as u64).unwrap();
    }
    drop(file);
    fs::write(place.join("other"), "after it").unwrap();
    for name in ["disk.img", "other"] {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(place.join(name), fs::Permissions::from_mode(0o640)).unwrap();
    }
    let output = Command::new("tar")
        .args(["-S", "-cf", "-"])
        .args(arguments)
        .args(["-C", place.to_str().unwrap(), "disk.img", "other"])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    fs::remove_dir_all(&place).unwrap();
    let file = |content: &[u8]| Node::File {
        mode: 0o640,
        content: content.to_vec(),
    };
    let tree = [
        ("disk.img".to_owned(), file(&content)),
        ("other".to_owned(), file(b"after it")),
    ];
    Made::Tar(output.stdout, equal(tree.into()))
}

fn file(name: &str, content: &[u8]) -> Raw {
    Raw::new(name, b'0', 0o644).content(content)
}

fn ordinary(random: &mut Random, dialect: Dialect, long: Long) -> Made {
    let items = items(random, true);
    let mut out = tar_of(&items, dialect, long);
    tar::end(&mut out);
    Made::Tar(out, equal(tree_of(&items)))
}

pub(super) const CLASSES: usize = 77;

const ALL: [Class; CLASSES] = [
    ("ustar with pax names", |random, _| {
        ordinary(random, Dialect::Ustar, Long::Pax)
    }),
    ("GNU with long names", |random, _| {
        ordinary(random, Dialect::Gnu, Long::Gnu)
    }),
    ("v7 with pax names", |random, _| {
        ordinary(random, Dialect::V7, Long::Pax)
    }),
    ("ustar with GNU names", |random, _| {
        ordinary(random, Dialect::Ustar, Long::Gnu)
    }),
    ("pax for everything", |random, _| {
        let items = items(random, true);
        let mut out = Vec::new();
        tar::pax(&mut out, b'g', &tar::record("comment", b"a commit"));
        for item in &items {
            let raw = raw_of(item);
            let mut records = tar::record("path", b"replaced by the next record");
            records.extend(tar::record("mtime", b"1700000000.123456789"));
            records.extend(tar::record("path", &raw.name));
            records.extend(tar::record("uname", "użytkownik".as_bytes()));
            let mut short = raw.clone();
            short.name = b"short".to_vec();
            if !raw.link.is_empty() {
                records.extend(tar::record("linkpath", &raw.link));
                short.link = b"wrong".to_vec();
            }
            if raw.kind == b'0' {
                records.extend(tar::record(
                    "size",
                    raw.content.len().to_string().as_bytes(),
                ));
                short.size = Some(0);
            }
            tar::pax(&mut out, b'x', &records);
            tar::append(&mut out, &short);
        }
        tar::end(&mut out);
        Made::Tar(out, equal(tree_of(&items)))
    }),
    ("binary numbers", |random, _| {
        let items = items(random, true);
        let mut out = Vec::new();
        for item in &items {
            let mut raw = raw_of(item);
            raw.dialect = Dialect::Gnu;
            raw.binary_numbers = true;
            append(&mut out, &raw, Long::Gnu);
        }
        tar::end(&mut out);
        Made::Tar(out, equal(tree_of(&items)))
    }),
    ("sparse, GNU's first format", |random, scratch| {
        gnu_sparse(random, scratch, &["--format=gnu"])
    }),
    ("sparse, pax 0.0", |random, scratch| {
        gnu_sparse(random, scratch, &["--format=posix", "--sparse-version=0.0"])
    }),
    ("sparse, pax 0.1", |random, scratch| {
        gnu_sparse(random, scratch, &["--format=posix", "--sparse-version=0.1"])
    }),
    ("sparse, pax 1.0", |random, scratch| {
        gnu_sparse(random, scratch, &["--format=posix", "--sparse-version=1.0"])
    }),
    ("a directory with set-group-id", |random, _| {
        let mut items = items(random, true);
        items.push(Item::Directory {
            path: "shared".into(),
            mode: 0o755,
        });
        let mut out = tar_of(&items[..items.len() - 1], Dialect::Ustar, Long::Pax);
        tar::append(
            &mut out,
            &Raw::new("shared/", b'5', random.one_of(&[0o2755, 0o6755, 0o1755])),
        );
        tar::end(&mut out);
        Made::Tar(out, equal(tree_of(&items)))
    }),
    ("a directory twice: the last mode applies", |random, _| {
        let mut items = items(random, true);
        let mode = random.one_of(&[0o755, 0o711]);
        items.push(Item::Directory {
            path: "again".into(),
            mode: 0o700,
        });
        items.push(Item::File {
            path: "again/x".into(),
            mode: 0o644,
            content: random.bytes(9),
        });
        items.push(Item::Directory {
            path: "again".into(),
            mode,
        });
        let mut out = tar_of(&items, Dialect::Ustar, Long::Pax);
        tar::end(&mut out);
        Made::Tar(out, equal(tree_of(&items)))
    }),
    ("a hard link to a symbolic link", |random, _| {
        let mut items = items(random, true);
        items.push(Item::Link {
            path: "s1".into(),
            target: "run.sh".into(),
        });
        items.push(Item::Hard {
            path: "s2".into(),
            target: "s1".into(),
        });
        let mut out = tar_of(&items, Dialect::Ustar, Long::Pax);
        tar::end(&mut out);
        Made::Tar(out, equal(tree_of(&items)))
    }),
    ("a hard link before its target", |random, _| {
        let items = items(random, false);
        let mut out = Vec::new();
        // A chain, the last name first.
        tar::append(&mut out, &Raw::new("first", b'1', 0o644).link("second"));
        tar::append(&mut out, &Raw::new("second", b'1', 0o644).link("run.sh"));
        out.extend(tar_of(&items, Dialect::Ustar, Long::Pax));
        tar::end(&mut out);
        let mut tree = tree_of(&items);
        for name in ["first", "second"] {
            tree.insert(name.into(), tree["run.sh"].clone());
        }
        Made::Tar(
            out,
            differs(
                tree,
                "bsdtar creates hard links at once, when the target is missing",
            ),
        )
    }),
    ("backslashes in names of a tar", |random, _| {
        let mut items = items(random, false);
        items.push(Item::File {
            path: "dev-disk-by\\x2did.swap".into(),
            mode: 0o644,
            content: random.bytes(40),
        });
        let mut out = tar_of(&items, Dialect::Ustar, Long::Pax);
        tar::end(&mut out);
        Made::Tar(out, equal(tree_of(&items)))
    }),
    ("a dot before every name", |random, _| {
        let items = items(random, false);
        let mut out = Vec::new();
        tar::append(&mut out, &Raw::new("./", b'5', 0o700));
        for item in &items {
            let mut raw = raw_of(item);
            raw.name.splice(0..0, *b"./");
            append(&mut out, &raw, Long::Gnu);
        }
        tar::end(&mut out);
        Made::Tar(out, equal(tree_of(&items)))
    }),
    (
        "a directory of the time before there was a type for it",
        |random, _| {
            let mut items = items(random, false);
            let mut out = tar_of(&items, Dialect::V7, Long::Pax);
            let mut raw = Raw::new("old/", random.one_of(&[0, b'0']), 0o755);
            raw.dialect = Dialect::V7;
            tar::append(&mut out, &raw);
            tar::end(&mut out);
            items.push(Item::Directory {
                path: "old".into(),
                mode: 0o755,
            });
            Made::Tar(out, equal(tree_of(&items)))
        },
    ),
    ("a volume label", |random, _| {
        let items = items(random, false);
        let mut out = Vec::new();
        let mut label = Raw::new("backup of tuesday", b'V', 0);
        label.dialect = Dialect::Gnu;
        tar::append(&mut out, &label);
        out.extend(tar_of(&items, Dialect::Gnu, Long::Gnu));
        tar::end(&mut out);
        Made::Tar(out, equal(tree_of(&items)))
    }),
    ("128 directories", |random, _| {
        let deep = vec!["d"; 127].join("/") + "/f";
        let mut items = items(random, false);
        items.push(Item::File {
            path: deep,
            mode: 0o644,
            content: random.bytes(3),
        });
        let mut out = tar_of(&items, Dialect::Gnu, Long::Gnu);
        tar::end(&mut out);
        Made::Tar(out, equal(tree_of(&items)))
    }),
    ("nothing in it", |random, _| {
        let zeros = random.one_of(&[512, 1024, 10_240]);
        Made::Packed(
            "a.tar.gz",
            PackageFormat::TarGz,
            gzip(&vec![0; zeros]),
            equal(Tree::new()),
        )
    }),
    // --- hostile tar
    ("a path that goes up", |random, _| {
        let name = random.one_of(&["../x", "a/../../x", "a/..", "..", "./../x"]);
        hostile(random, &[file(name, b"x")], "contains `..`")
    }),
    ("an absolute path", |random, _| {
        let name = random.one_of(&["/etc/passwd", "//x", "/x/../y"]);
        hostile(random, &[file(name, b"x")], "absolute")
    }),
    ("a link that leaves", |random, _| {
        let target = random.one_of(&["/etc", "../x", "a/../../x", "../../../../../etc/passwd"]);
        let link = Raw::new("leaves", b'2', 0o777).link(target);
        hostile(random, &[link], "outside the archive's own directory")
    }),
    ("links that leave together", |random, _| {
        let raws = [
            Raw::new("z/", b'5', 0o755),
            Raw::new("x/y/", b'5', 0o755),
            Raw::new("x/y/l", b'2', 0o777).link("../../z"),
            Raw::new("m", b'2', 0o777).link("x/y/l/../.."),
        ];
        hostile(random, &raws, "outside the archive's own directory")
    }),
    ("links that lead to each other", |random, _| {
        let raws = [
            Raw::new("one", b'2', 0o777).link("two"),
            Raw::new("two", b'2', 0o777).link("one"),
        ];
        hostile(random, &raws, "lead to each other")
    }),
    ("a file through a link", |random, _| {
        let raws = [
            Raw::new("d/", b'5', 0o755),
            Raw::new("link", b'2', 0o777).link("d"),
            file("link/victim", b"x"),
        ];
        hostile(random, &raws, "`link` is a symbolic link in the archive")
    }),
    ("a file below a file", |random, _| {
        hostile(
            random,
            &[file("a", b"x"), file("a/b", b"y")],
            "`a` is a file in the archive",
        )
    }),
    ("a path twice", |random, _| {
        let second = random.one_of(&["twice", "./twice", "twice//"]);
        let kind = if second.ends_with('/') { b'2' } else { b'0' };
        let raws = [
            file("twice", b"x"),
            Raw::new(second, kind, 0o644).link("run.sh"),
        ];
        hostile(random, &raws, "more than once")
    }),
    ("a directory and a file", |random, _| {
        let mut raws = [file("both", b"x"), Raw::new("both/", b'5', 0o755)];
        if random.below(2) == 0 {
            raws.swap(0, 1);
        }
        hostile(random, &raws, "both as a directory and as")
    }),
    ("a device", |random, _| {
        let kind = random.one_of(b"346");
        hostile(
            random,
            &[Raw::new("device", kind, 0o666)],
            "only files, directories and links",
        )
    }),
    ("a set-user-id file", |random, _| {
        let mode = random.one_of(&[0o4755, 0o2755, 0o6711]);
        hostile(random, &[Raw::new("su", b'0', mode)], "set-user-id")
    }),
    ("a hard link to nothing", |random, _| {
        hostile(
            random,
            &[Raw::new("h", b'1', 0o644).link("nowhere")],
            "is not in the archive",
        )
    }),
    ("a hard link out", |random, _| {
        let target = random.one_of(&["../x", "/etc/shadow"]);
        hostile(
            random,
            &[Raw::new("h", b'1', 0o644).link(target)],
            "outside the archive's",
        )
    }),
    ("hard links to each other", |random, _| {
        let raws = [
            Raw::new("h", b'1', 0o644).link("i"),
            Raw::new("i", b'1', 0o644).link("h"),
        ];
        hostile(random, &raws, "leads back to itself")
    }),
    ("a hard link to a directory", |random, _| {
        let raws = [
            Raw::new("d/", b'5', 0o755),
            Raw::new("h", b'1', 0o644).link("d"),
        ];
        hostile(random, &raws, "is a directory; only files")
    }),
    ("1,500 directories", |random, _| {
        let deep = vec!["d"; 129 + random.below(1500)].join("/");
        hostile(random, &[Raw::new(&deep, b'5', 0o755)], "the limit is 128")
    }),
    ("a name of 256 bytes", |random, _| {
        hostile(random, &[file(&"n".repeat(256), b"")], "the limit is 255")
    }),
    ("a path of 4,000 bytes", |random, _| {
        hostile(
            random,
            &[file(&vec!["n".repeat(249); 16].join("/"), b"")],
            "the limit is 3072",
        )
    }),
    ("a name that is not UTF-8", |random, _| {
        let mut raw = file("", b"x");
        raw.name = vec![b'a', 0xe9, 0xff];
        hostile(random, &[raw], "not UTF-8")
    }),
    ("no name", |random, _| {
        hostile(random, &[file("", b"x")], "the name is empty")
    }),
    ("a wrong checksum", |random, _| {
        let mut raw = file("x", b"x");
        raw.bad_checksum = true;
        hostile(random, &[raw], "checksum")
    }),
    ("an unknown type", |random, _| {
        let kind = random.one_of(b"DMNA9\xff");
        hostile(random, &[Raw::new("x", kind, 0o644)], "not supported")
    }),
    ("content of a directory", |random, _| {
        let kind = random.one_of(b"521");
        let raw = Raw::new("x", kind, 0o755)
            .link("run.sh")
            .content(b"hidden content");
        hostile(random, &[raw], "14 bytes of content")
    }),
    ("a size beyond everything", |random, _| {
        let mut raw = file("x", b"");
        raw.size = Some(random.one_of(&[1 << 40, u64::MAX >> 1, u64::MAX - 511]));
        raw.dialect = Dialect::Gnu;
        hostile(random, &[raw], "")
    }),
    ("a malformed pax header", |random, _| {
        let mut more = Vec::new();
        let record = random.one_of(&[
            &b"9 a=b\n"[..],
            b"x",
            b"6 a=b\n\n",
            b"12 path=a\0b\n\n",
            b"8 size=\n",
            b"11 size=-1\n",
            b"0 a=b\n",
        ]);
        tar::pax(&mut more, b'x', record);
        tar::append(&mut more, &file("x", b""));
        Made::Tar(with_tar(random, &more), Expect::Refused("pax"))
    }),
    ("names from a global pax header", |random, _| {
        let mut more = Vec::new();
        let keyword = random.one_of(&["path", "linkpath", "size", "GNU.sparse.map"]);
        tar::pax(&mut more, b'g', &tar::record(keyword, b"5"));
        Made::Tar(
            with_tar(random, &more),
            Expect::Refused("global pax header"),
        )
    }),
    ("a sparse file of another program", |random, _| {
        let mut more = Vec::new();
        let keyword = random.one_of(&[
            "SCHILY.realsize",
            "SUN.holesdata",
            "GNU.sparse.new",
            "GNU.volume.size",
        ]);
        tar::pax(&mut more, b'x', &tar::record(keyword, b"100"));
        tar::append(&mut more, &file("x", b"data"));
        Made::Tar(with_tar(random, &more), Expect::Refused("is not supported"))
    }),
    ("a sparse map that lies", |random, _| {
        let mut more = Vec::new();
        let map = random.one_of(&["0,4,2,4", "96,8", "0,5", "18446744073709551615,1", "0"]);
        let count = map.split(',').count().div_ceil(2).to_string();
        let mut records = tar::record("GNU.sparse.size", b"100");
        records.extend(tar::record("GNU.sparse.numblocks", count.as_bytes()));
        records.extend(tar::record("GNU.sparse.map", map.as_bytes()));
        tar::pax(&mut more, b'x', &records);
        tar::append(&mut more, &file("x", b"datadata"));
        Made::Tar(with_tar(random, &more), Expect::Refused("sparse"))
    }),
    ("a hole of terabytes", |random, _| {
        let mut more = Vec::new();
        let size = random.one_of(&["5000000000", "9223372036854775807", "18446744073709551615"]);
        let mut records = tar::record("GNU.sparse.major", b"1");
        records.extend(tar::record("GNU.sparse.minor", b"0"));
        records.extend(tar::record("GNU.sparse.name", b"hole"));
        records.extend(tar::record("GNU.sparse.realsize", size.as_bytes()));
        tar::pax(&mut more, b'x', &records);
        let mut map = b"0\n".to_vec();
        map.resize(512, 0);
        tar::append(&mut more, &file("GNUSparseFile.0/hole", &map));
        Made::Tar(
            with_tar(random, &more),
            Expect::Refused("unpacks to more than"),
        )
    }),
    ("a decompression bomb", |_, _| {
        let mut out = Vec::new();
        tar::append(&mut out, &file("zeros", &vec![0; 20 << 20]));
        tar::end(&mut out);
        Made::Packed(
            "a.tar.gz",
            PackageFormat::TarGz,
            gzip(&out),
            Expect::Refused("decompression bomb"),
        )
    }),
    ("no end record", |random, _| {
        let out = tar_of(&items(random, false), Dialect::Ustar, Long::Pax);
        Made::Tar(out, Expect::Refused("ends in the middle"))
    }),
    ("data after the end record", |random, _| {
        let mut out = tar_of(&items(random, false), Dialect::Ustar, Long::Pax);
        tar::end(&mut out);
        tar::append(&mut out, &file("later", b"x"));
        tar::end(&mut out);
        Made::Tar(out, Expect::Refused("more data follows"))
    }),
    ("a tar that ends early", |random, _| {
        let mut out = with_tar(random, &[]);
        let keep = 513 + random.below(out.len() - 1024 - 512);
        out.truncate(keep - usize::from(keep % 512 == 0));
        Made::Tar(out, Expect::Refused("ends in the middle"))
    }),
    ("a compressed stream that ends early", |random, _| {
        let whole = with_tar(random, &[]);
        let (name, format, mut bytes) = match random.below(4) {
            0 => ("a.tar.gz", PackageFormat::TarGz, gzip(&whole)),
            1 => (
                "a.tar.xz",
                PackageFormat::TarXz,
                through("xz", &["-1c"], &whole),
            ),
            2 => (
                "a.tar.zst",
                PackageFormat::TarZst,
                through("zstd", &["-qc"], &whole),
            ),
            _ => (
                "a.tar.bz2",
                PackageFormat::TarBz2,
                through("bzip2", &["-c"], &whole),
            ),
        };
        bytes.truncate(bytes.len() - 1 - random.below(bytes.len() / 2));
        Made::Packed(name, format, bytes, Expect::Refused(""))
    }),
    ("a damaged compressed stream", |random, _| {
        let whole = with_tar(random, &[]);
        let (name, format, mut bytes) = match random.below(4) {
            0 => ("a.tar.gz", PackageFormat::TarGz, gzip(&whole)),
            1 => (
                "a.tar.xz",
                PackageFormat::TarXz,
                through("xz", &["-1c"], &whole),
            ),
            2 => (
                "a.tar.zst",
                PackageFormat::TarZst,
                through("zstd", &["-qc", "--check"], &whole),
            ),
            _ => (
                "a.tar.bz2",
                PackageFormat::TarBz2,
                through("bzip2", &["-c"], &whole),
            ),
        };
        // In the middle third: data, which all formats protect.
        let at = bytes.len() / 3 + random.below(bytes.len() / 3);
        bytes[at] ^= 1 << random.below(8);
        Made::Packed(name, format, bytes, Expect::Refused(""))
    }),
    (
        "a compressed stream with something behind it",
        |random, _| {
            let whole = with_tar(random, &[]);
            let (name, format, mut bytes) = match random.below(4) {
                0 => ("a.tar.gz", PackageFormat::TarGz, gzip(&whole)),
                1 => (
                    "a.tar.xz",
                    PackageFormat::TarXz,
                    through("xz", &["-1c"], &whole),
                ),
                2 => (
                    "a.tar.zst",
                    PackageFormat::TarZst,
                    through("zstd", &["-qc"], &whole),
                ),
                _ => (
                    "a.tar.bz2",
                    PackageFormat::TarBz2,
                    through("bzip2", &["-c"], &whole),
                ),
            };
            bytes.extend(b"\r\n--boundary--");
            Made::Packed(name, format, bytes, Expect::Refused(""))
        },
    ),
    ("a zip with a tar's name", |random, _| {
        let (entries, _) = zip_items(random);
        let bytes = zip::write(&entries, &zip::Shape::default());
        Made::Packed(
            "a.tar.gz",
            PackageFormat::TarGz,
            bytes,
            Expect::Refused("does not fit the content"),
        )
    }),
    // --- zip
    ("zip", |random, _| {
        let (entries, tree) = zip_items(random);
        Made::Zip(zip::write(&entries, &zip::Shape::default()), equal(tree))
    }),
    ("zip with data descriptors", |random, _| {
        let (mut entries, tree) = zip_items(random);
        for entry in &mut entries {
            entry.descriptor = entry.deflate;
        }
        Made::Zip(zip::write(&entries, &zip::Shape::default()), equal(tree))
    }),
    ("zip64 entries", |random, _| {
        let (mut entries, tree) = zip_items(random);
        for entry in &mut entries {
            entry.wide = true;
        }
        Made::Zip(zip::write(&entries, &zip::Shape::default()), equal(tree))
    }),
    ("zip64 end with placeholders only", |random, _| {
        let (mut entries, tree) = zip_items(random);
        for entry in &mut entries {
            entry.wide = random.below(2) == 0;
        }
        let shape = zip::Shape {
            zip64_end: true,
            comment: b"a comment".to_vec(),
            ..zip::Shape::default()
        };
        Made::Zip(zip::write(&entries, &shape), equal(tree))
    }),
    ("zip behind a script", |random, _| {
        let (entries, tree) = zip_items(random);
        let shape = zip::Shape {
            prefix: b"#!/bin/sh\nexec java -jar \"$0\" \"$@\"\n".to_vec(),
            adjusted: random.below(2) == 0,
            zip64_end: random.below(2) == 0,
            ..zip::Shape::default()
        };
        let expect = if shape.zip64_end {
            differs(
                tree,
                "unzip does not find a zip64 end record that was moved",
            )
        } else {
            equal(tree)
        };
        Made::Zip(zip::write(&entries, &shape), expect)
    }),
    ("zip with Unicode names in their own field", |random, _| {
        let (mut entries, mut tree) = zip_items(random);
        let mut entry = zip::Raw::new("caf\u{fffd}", 0o100_644, b"au lait");
        entry.name = b"caf\x82".to_vec();
        let real = "café.txt";
        entry.extra.extend(0x7075_u16.to_le_bytes());
        entry.extra.extend((5 + real.len() as u16).to_le_bytes());
        entry.extra.push(1);
        entry
            .extra
            .extend(crc32fast::hash(&entry.name).to_le_bytes());
        entry.extra.extend(real.as_bytes());
        entries.push(entry);
        tree.insert(
            real.into(),
            Node::File {
                mode: 0o644,
                content: b"au lait".to_vec(),
            },
        );
        Made::Zip(zip::write(&entries, &zip::Shape::default()), equal(tree))
    }),
    ("zip without modes", |random, _| {
        let (mut entries, mut tree) = zip_items(random);
        entries.retain(|entry| entry.unix_mode & 0o170_000 != 0o120_000);
        tree.retain(|_, node| !matches!(node, Node::Link { .. }));
        for entry in &mut entries {
            entry.host = 0;
            entry.unix_mode = 0;
            entry.attributes = if entry.name.ends_with(b"/") {
                0x10
            } else {
                0x20
            };
        }
        for node in tree.values_mut() {
            match node {
                Node::Directory { mode } => *mode = 0o755,
                Node::File { mode, .. } => *mode = 0o644,
                Node::Link { .. } => {}
            }
        }
        let expect = if tree.keys().all(|name| name.is_ascii()) {
            equal(tree)
        } else {
            differs(
                tree,
                "unzip decodes names of DOS archives with code page 850, although they are marked as UTF-8",
            )
        };
        Made::Zip(zip::write(&entries, &zip::Shape::default()), expect)
    }),
    ("zip with backslashes", |random, _| {
        let (mut entries, mut tree) = zip_items(random);
        let mut directory = zip::Raw::new("bin\\sub\\", 0o040_755, b"");
        directory.deflate = false;
        entries.push(directory);
        entries.push(zip::Raw::new("conf\\app.ini", 0o100_644, b"x=1"));
        for name in ["bin", "bin/sub", "conf"] {
            tree.insert(name.into(), Node::Directory { mode: 0o755 });
        }
        tree.insert(
            "conf/app.ini".into(),
            Node::File {
                mode: 0o644,
                content: b"x=1".to_vec(),
            },
        );
        Made::Zip(
            zip::write(&entries, &zip::Shape::default()),
            differs(
                tree,
                "unzip keeps backslashes in names of archives that were made on Unix; the specification forbids them",
            ),
        )
    }),
    ("zip entry that goes up", |random, _| {
        let name = random.one_of(&["../x", "..\\..\\x", "a/../../x"]);
        hostile_zip(random, |entry| entry.name = name.into(), "contains `..`")
    }),
    ("zip entry with an absolute path", |random, _| {
        let name = random.one_of(&["/etc/passwd", "\\x", "C:\\x", "c:/x"]);
        hostile_zip(random, |entry| entry.name = name.into(), "absolute")
    }),
    ("zip link that leaves", |random, _| {
        hostile_zip(
            random,
            |entry| {
                entry.unix_mode = 0o120_777;
                entry.content = b"../../etc".to_vec();
            },
            "outside the archive's own directory",
        )
    }),
    ("zip entry twice", |random, _| {
        hostile_zip(
            random,
            |entry| entry.name = b"run.sh".to_vec(),
            "more than once",
        )
    }),
    ("zip with encryption", |random, _| {
        let flags = random.one_of(&[1, 1 | 1 << 6, 1 << 13]);
        hostile_zip(
            random,
            |entry| entry.flags = flags,
            "encryption is not supported",
        )
    }),
    ("zip with an unsupported method", |random, _| {
        let method = random.one_of(&[1, 6, 9, 12, 14, 93, 95, 98, 99]);
        hostile_zip(
            random,
            |entry| entry.method = Some(method),
            "compression method",
        )
    }),
    ("zip with a wrong checksum", |random, _| {
        hostile_zip(random, |entry| entry.crc = Some(7), "checksum")
    }),
    ("zip with a wrong size", |random, _| {
        let size = random.one_of(&[0, 11, 13, 1_000_000]);
        hostile_zip(random, |entry| entry.size = Some(size), "stated")
    }),
    ("zip with two names", |random, _| {
        hostile_zip(
            random,
            |entry| entry.local_name = Some(b"another".to_vec()),
            "another name",
        )
    }),
    ("zip with special files", |random, _| {
        let (mode, why) = random.one_of(&[
            (0o104_755, "set-user-id"),
            (0o020_644, "a character device"),
            (0o060_644, "a block device"),
            (0o010_644, "a FIFO"),
            (0o140_644, "a socket"),
        ]);
        hostile_zip(random, |entry| entry.unix_mode = mode, why)
    }),
    ("zip whose end lies", |random, _| {
        let (entries, _) = zip_items(random);
        let (shape, why) = match random.below(2) {
            0 => (
                zip::Shape {
                    more_entries: 1 + random.below(9) as u16,
                    ..zip::Shape::default()
                },
                "directory",
            ),
            _ => (
                zip::Shape {
                    overlap: true,
                    ..zip::Shape::default()
                },
                "",
            ),
        };
        Made::Zip(zip::write(&entries, &shape), Expect::Refused(why))
    }),
    ("zip that is cut or continued", |random, _| {
        let (entries, _) = zip_items(random);
        let mut bytes = zip::write(&entries, &zip::Shape::default());
        if random.below(2) == 0 {
            bytes.truncate(bytes.len() - 1 - random.below(bytes.len() / 2));
            Made::Zip(bytes, Expect::Refused("ends in the middle"))
        } else {
            bytes.extend(b"\r\n--boundary--\r\n");
            Made::Zip(bytes, Expect::Refused("more data follows"))
        }
    }),
];

/// The archive with this number.
pub(super) fn archive(seed: u64, number: usize, scratch: &Path) -> Generated {
    let (class, make) = ALL[number % ALL.len()];
    let mut random = Random(seed ^ (number as u64).wrapping_mul(0x2545_f491_4f6c_dd1d));
    match make(&mut random, scratch) {
        Made::Tar(bytes, expect) => {
            let (name, format, bytes) = pack(&mut random, bytes);
            Generated {
                class,
                name,
                format,
                bytes,
                expect,
            }
        }
        Made::Packed(name, format, bytes, expect) => Generated {
            class,
            name: name.to_owned(),
            format,
            bytes,
            expect,
        },
        Made::Zip(bytes, expect) => Generated {
            class,
            name: "a.zip".to_owned(),
            format: PackageFormat::Zip,
            bytes,
            expect,
        },
    }
}
