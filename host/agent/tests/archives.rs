//! 400 archives from a generator with a fixed seed: every format, every kind of header, ordinary and hostile.
//!
//! For each of them the verdict at upload (of the file, and of the same bytes while they arrive in small pieces) equals the
//! verdict of the agent that unpacks it, and both are what the generator expects. What is unpacked equals the tree that the
//! generator meant, and what a reference extracts: `bsdtar` for tar archives, `unzip` for zip archives. Where the reference is
//! wrong or cannot do it, the class says why (`Reference::Differs`), and only the generator's tree counts.

mod generate;
mod tar_writer;
mod zip_writer;

use std::{
    collections::BTreeSet,
    fs,
    io::{BufReader, Read},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    sync::atomic::AtomicBool,
};

use windlass_agent::{
    config::Policy,
    unpack::{UnpackError, unpack},
};
use windlass_archive::{Course, Limits};
use windlass_domain::{
    Digest,
    task::{PackageFormat, PackageRef},
};

use generate::{Expect, Generated, Node, Reference, Tree};

const ARCHIVES: usize = 400;
const SEED: u64 = 0x5eed_0000_a2c4_17e5;

/// A reader that returns a few bytes at a time, as a slow client sends them.
struct Trickle<'a> {
    bytes: &'a [u8],
    piece: usize,
}

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.piece.min(buffer.len()).min(self.bytes.len());
        let (now, later) = self.bytes.split_at(count);
        buffer[..count].copy_from_slice(now);
        self.bytes = later;
        Ok(count)
    }
}

fn verdict_of_file(path: &Path, name: &str) -> Result<PackageFormat, String> {
    let mut file = fs::File::open(path).unwrap();
    windlass_archive::examine_file(&mut file, name, None, Limits::default())
        .map_err(|error| error.to_string())
}

/// `None` where the format is only examined when it is complete.
fn verdict_of_stream(bytes: &[u8], name: &str) -> Option<Result<PackageFormat, String>> {
    let head = &bytes[..bytes.len().min(windlass_archive::HEAD_BYTES)];
    let Ok(Course::Stream {
        compression,
        otherwise,
    }) = windlass_archive::course(head, name, None)
    else {
        return None;
    };
    let source = BufReader::with_capacity(700, Trickle { bytes, piece: 333 });
    // The size is not known yet: an upper bound.
    let found = windlass_archive::examine_course(
        source,
        compression,
        otherwise,
        200_000_000,
        Limits::default(),
    );
    Some(found.map_err(|error| error.to_string()))
}

fn unpack_as_agent(
    source: &Path,
    bytes: &[u8],
    format: PackageFormat,
    target: &Path,
) -> Result<(), UnpackError> {
    let package = PackageRef {
        digest: Digest::of(bytes),
        size_bytes: bytes.len() as u64,
        format,
        file_name: "app".into(),
        version: "1".into(),
    };
    let never = AtomicBool::new(false);
    unpack(source, &package, target, None, &Policy::default(), &never)
}

/// Everything below a directory.
fn tree_of(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let name = path
                .strip_prefix(root)
                .unwrap()
                .to_string_lossy()
                .into_owned();
            let mode = meta.permissions().mode() & 0o7777;
            let node = if meta.is_dir() {
                todo.push(path);
                Node::Directory { mode }
            } else if meta.is_symlink() {
                let target = fs::read_link(&path).unwrap();
                Node::Link {
                    target: target.to_str().unwrap().to_owned(),
                }
            } else {
                Node::File {
                    mode,
                    content: fs::read(&path).unwrap(),
                }
            };
            tree.insert(name, node);
        }
    }
    tree
}

/// The first difference between two trees, in words.
fn difference(found: &Tree, expected: &Tree) -> Option<String> {
    let names: BTreeSet<_> = found.keys().chain(expected.keys()).collect();
    for name in names {
        let short = |node: Option<&Node>| match node {
            Some(Node::File { mode, content }) => {
                format!(
                    "file {mode:o}, {} bytes, {}",
                    content.len(),
                    Digest::of(content)
                )
            }
            other => format!("{other:?}"),
        };
        let (found, expected) = (found.get(name), expected.get(name));
        if found != expected {
            return Some(format!(
                "`{name}`: {} instead of {}",
                short(found),
                short(expected)
            ));
        }
    }
    None
}

fn extract_with_reference(
    generated: &Generated,
    source: &Path,
    target: &Path,
) -> Result<Tree, String> {
    fs::create_dir(target).unwrap();
    let mut command = if generated.name.ends_with(".zip") {
        let mut command = Command::new("unzip");
        command
            .arg("-qq")
            .arg("-o")
            .arg(source)
            .arg("-d")
            .arg(target);
        command
    } else {
        let mut command = Command::new("bsdtar");
        command
            .args([
                "--no-same-owner",
                "--no-xattrs",
                "--no-acls",
                "--no-fflags",
                "-xpf",
            ])
            .arg(source)
            .arg("-C")
            .arg(target);
        command
    };
    let output = command
        .env("LC_ALL", "C.UTF-8")
        .output()
        .expect("bsdtar (libarchive-tools) and unzip are installed: see tests/setup.sh");
    // 1 of unzip: warnings, for example about bytes before the archive.
    let fine = output.status.success()
        || (generated.name.ends_with(".zip") && output.status.code() == Some(1));
    if !fine {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(format!("the reference fails: {why}"));
    }
    let mut tree = tree_of(target);
    for node in tree.values_mut() {
        match node {
            // The agent keeps its user's right to remove what is in a directory, and no other bits than the permissions.
            Node::Directory { mode } => *mode = (*mode & 0o777) | 0o700,
            Node::File { mode, .. } => *mode &= 0o777,
            Node::Link { .. } => {}
        }
    }
    Ok(tree)
}

/// What became of an archive that was judged as it should be.
struct Judged {
    accepted: bool,
    referenced: bool,
}

fn judge(generated: &Generated, place: &Path) -> Result<Judged, String> {
    let source = place.join(&generated.name);
    fs::write(&source, &generated.bytes).unwrap();
    let at_upload = verdict_of_file(&source, &generated.name);
    if let Some(streamed) = verdict_of_stream(&generated.bytes, &generated.name)
        && streamed.is_ok() != at_upload.is_ok()
    {
        return Err(format!(
            "the stream's verdict differs: {streamed:?}, {at_upload:?}"
        ));
    }
    let releases = place.join("releases");
    fs::create_dir(&releases).unwrap();
    let target = releases.join("r");
    // Without an examination, the agent would have received the package with the format of its name.
    let format = *at_upload.as_ref().unwrap_or(&generated.format);
    let unpacked = unpack_as_agent(&source, &generated.bytes, format, &target);
    if at_upload.is_ok() != unpacked.is_ok() {
        return Err(format!(
            "the agent's verdict differs: {at_upload:?}, {unpacked:?}"
        ));
    }
    match (&generated.expect, at_upload) {
        (Expect::Refused(why), Err(error)) => {
            if fs::read_dir(&releases).unwrap().count() > 0 {
                return Err("the agent has left something".to_owned());
            }
            if !error.contains(why) {
                return Err(format!("another reason than `{why}`: {error}"));
            }
            Ok(Judged {
                accepted: false,
                referenced: false,
            })
        }
        (Expect::Refused(why), Ok(format)) => Err(format!("accepted as {format:?}, not `{why}`")),
        (Expect::Tree(..), Err(error)) => Err(format!("refused: {error}")),
        (Expect::Tree(expected, reference), Ok(format)) => {
            if format != generated.format {
                return Err(format!("taken for {format:?}"));
            }
            let found = tree_of(&target);
            if let Some(difference) = difference(&found, expected) {
                return Err(difference);
            }
            if let Reference::Differs(why) = reference {
                assert!(!why.is_empty());
                return Ok(Judged {
                    accepted: true,
                    referenced: false,
                });
            }
            let reference = extract_with_reference(generated, &source, &place.join("reference"))?;
            match difference(&found, &reference) {
                Some(difference) => Err(format!("compared with the reference: {difference}")),
                None => Ok(Judged {
                    accepted: true,
                    referenced: true,
                }),
            }
        }
    }
}

#[test]
fn upload_and_agent_judge_400_archives_alike_and_extract_what_the_reference_extracts() {
    let scratch = tempfile::tempdir().unwrap();
    let mut classes = BTreeSet::new();
    let (mut accepted, mut refused, mut referenced) = (0, 0, 0);
    let mut wrong = Vec::new();
    for number in 0..ARCHIVES {
        let generated = generate::archive(SEED, number, scratch.path());
        let place = scratch.path().join("one");
        fs::create_dir(&place).unwrap();
        classes.insert(generated.class);
        match judge(&generated, &place) {
            Ok(judged) => {
                accepted += usize::from(judged.accepted);
                refused += usize::from(!judged.accepted);
                referenced += usize::from(judged.referenced);
            }
            Err(what) => wrong.push(format!(
                "archive {number}, {} ({}): {what}",
                generated.class, generated.name
            )),
        }
        fs::remove_dir_all(&place).unwrap();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(accepted + refused, ARCHIVES);
    assert_eq!(classes.len(), generate::CLASSES);
    // The generator makes enough of each.
    assert!(
        referenced > 120 && refused > 120,
        "{referenced} compared with the reference, {refused} refused"
    );
}

#[test]
fn a_zip_of_66_000_files_with_placeholders_in_its_end_record_is_accepted() {
    let entries: Vec<zip_writer::Raw> = (0..66_000)
        .map(|number| {
            let mut entry = zip_writer::Raw::new(&format!("f/{number}"), 0o100_644, b"x");
            entry.deflate = false;
            entry
        })
        .collect();
    let shape = zip_writer::Shape {
        zip64_end: true,
        ..zip_writer::Shape::default()
    };
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.zip");
    fs::write(&path, zip_writer::write(&entries, &shape)).unwrap();
    assert_eq!(verdict_of_file(&path, "a.zip"), Ok(PackageFormat::Zip));
    // Without zip64, 66,000 becomes 464: what such an archive contains depends on the program that reads it.
    let narrow = zip_writer::write(&entries, &zip_writer::Shape::default());
    fs::write(&path, narrow).unwrap();
    let refused = verdict_of_file(&path, "a.zip").unwrap_err();
    assert!(refused.contains("directory"), "{refused}");
}

#[test]
fn jars_stay_one_file_also_behind_a_script() {
    let manifest = zip_writer::Raw::new("META-INF/MANIFEST.MF", 0o100_644, b"Main-Class: A\n");
    let scratch = tempfile::tempdir().unwrap();
    for prefix in [&b""[..], b"#!/bin/sh\nexec java -jar \"$0\"\n"] {
        for adjusted in [false, true] {
            let shape = zip_writer::Shape {
                prefix: prefix.to_vec(),
                adjusted,
                ..zip_writer::Shape::default()
            };
            // Jars that were merged from others contain paths twice, which Java accepts.
            let bytes = zip_writer::write(&[manifest.clone(), manifest.clone()], &shape);
            for name in ["a.jar", "a.war", "a.EAR"] {
                let path = scratch.path().join(name);
                fs::write(&path, &bytes).unwrap();
                assert_eq!(
                    verdict_of_file(&path, name),
                    Ok(PackageFormat::Jar),
                    "{name}"
                );
                fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
                assert!(verdict_of_file(&path, name).is_err(), "{name}, cut");
            }
        }
    }
}

/// Bytes are changed at random in archives of all classes. Whatever that makes of them, there is a verdict, and not a panic.
#[test]
fn damaged_archives_have_a_verdict() {
    let scratch = tempfile::tempdir().unwrap();
    let mut random = generate::Random::new(SEED);
    for number in 0..generate::CLASSES * 3 {
        let generated = generate::archive(SEED ^ 1, number, scratch.path());
        if generated.bytes.len() > 2_000_000 {
            continue;
        }
        let path = scratch.path().join("damaged");
        for _ in 0..6 {
            let mut bytes = generated.bytes.clone();
            for _ in 0..1 + random.below(4) {
                // Mostly near the beginning or the end, where headers are.
                let length = bytes.len();
                let at = match random.below(3) {
                    0 => random.below(length.min(1100)),
                    1 => length - 1 - random.below(length.min(1100)),
                    _ => random.below(length),
                };
                bytes[at] = random.next() as u8;
            }
            fs::write(&path, &bytes).unwrap();
            let verdict = verdict_of_file(&path, &generated.name);
            if let Some(streamed) = verdict_of_stream(&bytes, &generated.name) {
                assert_eq!(streamed.is_ok(), verdict.is_ok(), "{}", generated.class);
            }
        }
    }
}
