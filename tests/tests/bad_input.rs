//! What nobody should send: each has an error of its own, and nothing is left behind.
//!
//! Packages, archives that a real agent unpacks, orders that cannot be planned, and files in the plugin directory of a running
//! server.

use std::{
    collections::BTreeSet,
    fs,
    io::{Cursor, Write as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use windlass::api::client::Answer;
use windlass_tests::{
    guests::{PluginDirectory, guest, guest_that},
    host::{Setup, TestHost, eventually, items, plugins, tar_gz, text},
    problem::{accepted, ask, refused},
    release::{Counted, upload},
};

/// Every file and directory below one, without locks.
fn below(directory: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut left = vec![directory.to_owned()];
    while let Some(next) = left.pop() {
        // What is being unpacked may go while it is looked at.
        for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                left.push(path.clone());
            }
            if entry.file_name() != "LOCK" {
                found.insert(path);
            }
        }
    }
    found
}

/// What a host keeps of packages: blobs, packages, uploads that failed.
async fn kept(host: &TestHost) -> (BTreeSet<PathBuf>, usize, Vec<String>) {
    let files = below(&host.data().join("blobs"))
        .into_iter()
        .filter(|path| path.is_file())
        .collect();
    let packages = items(
        &host
            .api
            .get(&host.ws("packages?page_size=50"))
            .await
            .expect("packages"),
    )
    .len();
    let uploads = items(
        &host
            .api
            .get(&host.ws("packages/uploads?page_size=50"))
            .await
            .expect("uploads"),
    );
    let failed = uploads
        .iter()
        .filter_map(|upload| {
            upload["outcome"]["failed"]["code"]
                .as_str()
                .map(str::to_owned)
        })
        .collect();
    (files, packages, failed)
}

#[tokio::test]
async fn a_bad_upload_leaves_nothing_but_its_record() {
    let host = TestHost::start(Setup {
        agents: 0,
        ..Setup::default()
    })
    .await;
    let api = &host.api;
    api.put(
        "/v1/workspaces/test",
        &json!({ "package_limit_bytes": 1000 }),
    )
    .await
    .expect("a small limit");
    api.post(
        "/v1/apps",
        &json!({ "name": "shop", "tech_stack": { "name": "binary", "version": "*" } }),
    )
    .await
    .expect("an application");
    let path = |version: &str, file: &str| {
        host.ws(&format!(
            "packages?app=shop&version={version}&file_name={file}"
        ))
    };
    let good = tar_gz(&[("run.sh", 0o755, b"#!/bin/sh\n")]);
    upload(&host, "shop", "1.0.0", good.clone()).await;
    let (blobs, packages, failed) = kept(&host).await;
    assert_eq!((blobs.len(), packages, failed.len()), (1, 1, 0));

    let large = Bytes::from(vec![0; 1001]);
    let zip = b"PK\x03\x04 and more".as_slice();
    let wrong = "0".repeat(64);
    let digest = ("x-content-sha256", wrong.as_str());
    let mut records = 0;
    for (version, file, body, headers, status, code, limit) in [
        (
            "2.0.0",
            "large",
            large,
            vec![],
            413,
            "package_too_large",
            json!([1000, 1001]),
        ),
        (
            "2.0.0",
            "digest.tar.gz",
            good.clone(),
            vec![digest],
            422,
            "package_digest",
            json!([null, null]),
        ),
        (
            "1.0.0",
            "again.tar.gz",
            good.clone(),
            vec![],
            409,
            "version_taken",
            json!([null, null]),
        ),
        (
            "2.0.0",
            "magic.tar.gz",
            Bytes::from_static(zip),
            vec![],
            422,
            "package_format",
            json!([null, null]),
        ),
        (
            "2.0.0",
            "magic.zip",
            good.clone(),
            vec![],
            422,
            "package_format",
            json!([null, null]),
        ),
        (
            "2.0.0",
            "magic.jar",
            Bytes::from_static(b"short"),
            vec![],
            422,
            "package_refused",
            json!([null, null]),
        ),
        (
            "2.0.0",
            "magic.tgz",
            Bytes::from_static(b"\x1f"),
            vec![],
            422,
            "package_format",
            json!([null, null]),
        ),
        (
            "2.0.0",
            "empty",
            Bytes::new(),
            vec![],
            422,
            "package_empty",
            json!([1, 0]),
        ),
    ] {
        let answer = api
            .request(Method::POST, &path(version, file), body, &headers)
            .await
            .expect("an answer");
        let problem = refused(&answer, status, code);
        assert_eq!(
            json!([problem["limit"], problem["current"]]),
            limit,
            "{problem}"
        );
        records += 1;
        let (now, packages, failed) = kept(&host).await;
        assert_eq!(
            (now, packages, failed.len()),
            (blobs.clone(), 1, records),
            "after {file}: {failed:?}"
        );
        assert_eq!(failed[0], code, "the newest first: {failed:?}");
    }
    let malformed = api
        .request(
            Method::POST,
            &path("2.0.0", "f"),
            Bytes::from_static(b"x"),
            &[("x-content-sha256", "12")],
        )
        .await
        .expect("an answer");
    refused(&malformed, 400, "digest_invalid");
    for other in [
        host.ws("packages?app=nobody&version=1&file_name=f"),
        "/v1/workspaces/nobody/packages?app=shop&version=1&file_name=f".to_owned(),
    ] {
        refused(
            &api.request(Method::POST, &other, Bytes::from_static(b"x"), &[])
                .await
                .expect("an answer"),
            404,
            "not_found",
        );
    }

    // Nobody said how large it is: the limit is met on the way.
    let answer = raw(
        &host,
        &path("2.0.0", "chunks"),
        "Transfer-Encoding: chunked",
        &chunks(5, 300),
    )
    .await;
    assert!(
        answer.starts_with("HTTP/1.1 413 ") && answer.contains("package_too_large"),
        "{answer}"
    );
    records += 1;
    // The connection breaks off, in both forms.
    for (version, head, sent) in [
        ("3.0.0", "Content-Length: 900", vec![7; 100]),
        (
            "4.0.0",
            "Transfer-Encoding: chunked",
            chunks(2, 50)[..80].to_vec(),
        ),
    ] {
        let mut stream = begin(&host, &path(version, "cut"), head).await;
        stream.write_all(&sent).await.expect("a part is sent");
        // It has begun: a part of it is on the disk.
        eventually("the upload has begun", || async {
            let now = below(&host.data().join("blobs/tmp"));
            if now.is_empty() {
                Err("nothing is written".to_owned())
            } else {
                Ok(())
            }
        })
        .await;
        drop(stream);
        records += 1;
        eventually("the upload is given up", || async {
            let (now, packages, failed) = kept(&host).await;
            if now == blobs
                && packages == 1
                && failed.len() == records
                && failed[0] == "package_truncated"
            {
                Ok(())
            } else {
                Err(format!("{now:?} {failed:?}"))
            }
        })
        .await;
    }
    // What failed can be done right.
    for version in ["2.0.0", "3.0.0", "4.0.0"] {
        accepted(
            &api.request(
                Method::POST,
                &path(version, "good.tar.gz"),
                good.clone(),
                &[],
            )
            .await
            .expect("an answer"),
            201,
        );
    }
    let (now, packages, _) = kept(&host).await;
    assert_eq!((now, packages), (blobs, 4), "the same bytes are kept once");
}

/// So many chunks of so many bytes each, and their end.
fn chunks(count: usize, bytes: usize) -> Vec<u8> {
    let chunk = [
        format!("{bytes:x}\r\n").into_bytes(),
        vec![b'x'; bytes],
        b"\r\n".to_vec(),
    ]
    .concat();
    [chunk.repeat(count), b"0\r\n\r\n".to_vec()].concat()
}

/// The head of an upload.
async fn begin(host: &TestHost, path: &str, header: &str) -> TcpStream {
    let token = fs::read_to_string(host.data().join("admin.token")).expect("the token");
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nConnection: close\r\n{header}\r\n\r\n",
        token.trim()
    );
    let mut stream = TcpStream::connect(host.address())
        .await
        .expect("a connection");
    stream
        .write_all(head.as_bytes())
        .await
        .expect("the head is sent");
    stream
}

/// An upload and its answer as text.
async fn raw(host: &TestHost, path: &str, header: &str, body: &[u8]) -> String {
    let mut stream = begin(host, path, header).await;
    stream.write_all(body).await.expect("the body is sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer");
    String::from_utf8_lossy(&answer).into_owned()
}

/// An entry of an archive: type, name, mode, link target or content.
struct Entry<'a> {
    kind: tar::EntryType,
    name: &'a str,
    mode: u32,
    content: &'a [u8],
}

fn entry<'a>(kind: tar::EntryType, name: &'a str, mode: u32, content: &'a [u8]) -> Entry<'a> {
    Entry {
        kind,
        name,
        mode,
        content,
    }
}

/// A `.tar.gz` that holds these entries as they stand here, however bad they are.
fn bad_tar_gz(entries: &[Entry<'_>]) -> Bytes {
    let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(
        Vec::new(),
        flate2::Compression::best(),
    ));
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        let is_file = entry.kind == tar::EntryType::Regular;
        header.as_gnu_mut().expect("a GNU header").name[..entry.name.len()]
            .copy_from_slice(entry.name.as_bytes());
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_size(if is_file {
            entry.content.len() as u64
        } else {
            0
        });
        if entry.kind == tar::EntryType::Symlink {
            header.as_gnu_mut().expect("a GNU header").linkname[..entry.content.len()]
                .copy_from_slice(entry.content);
        }
        header.set_cksum();
        archive
            .append(&header, if is_file { entry.content } else { &[] })
            .expect("an entry");
    }
    archive
        .into_inner()
        .expect("the archive")
        .finish()
        .expect("the compression")
        .into()
}

/// A `.zip` that holds these entries as they stand here, however bad they are.
fn bad_zip(entries: &[Entry<'_>]) -> Bytes {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for entry in entries {
        archive
            .start_file(entry.name, zip::write::SimpleFileOptions::default())
            .expect("an entry");
        archive.write_all(entry.content).expect("its content");
    }
    let mut bytes = archive.finish().expect("the archive").into_inner();
    // Types and modes stand in the central directory, which the writer does not let be bad.
    let mut at = 0;
    for entry in entries {
        let found = bytes[at..]
            .windows(4)
            .position(|window| window == b"PK\x01\x02")
            .expect("a central header");
        at += found;
        let kind = match entry.kind {
            tar::EntryType::Symlink => 0o120_000,
            tar::EntryType::Char => 0o020_000,
            tar::EntryType::Fifo => 0o010_000,
            _ => 0o100_000,
        };
        // Made by: Unix; external attributes: type and mode above.
        bytes[at + 5] = 3;
        bytes[at + 38..at + 42].copy_from_slice(&((kind | entry.mode) << 16).to_le_bytes());
        at += 4;
    }
    bytes.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_archive_is_refused_at_upload_with_its_entry_and_leaves_only_a_record() {
    use tar::EntryType::{Char, Fifo, Regular, Symlink};
    let host = TestHost::start(Setup {
        agents: 0,
        ..Setup::default()
    })
    .await;
    let app = json!({ "name": "counted", "tech_stack": { "name": "binary", "version": "*" } });
    host.api
        .post("/v1/apps", &app)
        .await
        .expect("an application");
    let blobs = host.path().join("server/blobs");
    assert!(blobs.is_dir(), "{}", blobs.display());
    let files = || {
        let mut files = below(&blobs);
        files.retain(|path| path.is_file());
        files
    };
    let before = files();
    let (absolute, target) = ("/outside/escaped", "/outside");
    let zeros = vec![0; 16 << 20];
    let run = || entry(Regular, "run.sh", 0o755, b"#!/bin/sh\nexec sleep 1000000\n");
    let cases = [
        (
            "traversal",
            vec![run(), entry(Regular, "a/../../../escaped", 0o644, b"x")],
            "`..`",
        ),
        (
            "absolute",
            vec![run(), entry(Regular, absolute, 0o644, b"x")],
            "the path is absolute",
        ),
        (
            "link-out",
            vec![run(), entry(Symlink, "out", 0o777, target.as_bytes())],
            "outside the archive's own directory",
        ),
        (
            "link-then-write",
            vec![
                run(),
                entry(Symlink, "here", 0o777, b"."),
                entry(Regular, "here/escaped", 0o644, b"x"),
            ],
            "`here` is a symbolic link in the archive",
        ),
        (
            "device",
            vec![run(), entry(Char, "null", 0o666, b"")],
            "only files, directories and links",
        ),
        (
            "fifo",
            vec![run(), entry(Fifo, "pipe", 0o666, b"")],
            "only files, directories and links",
        ),
        (
            "setuid",
            vec![run(), entry(Regular, "tool", 0o4755, b"x")],
            "set-user-id",
        ),
        (
            "bomb",
            vec![run(), entry(Regular, "zeros", 0o644, &zeros)],
            "like a decompression bomb",
        ),
    ];
    for (name, entries, expected) in &cases {
        for (format, file) in [("tar.gz", bad_tar_gz(entries)), ("zip", bad_zip(entries))] {
            let about = format!("{name}.{format}");
            let version = format!("{name}-{}", format.replace('.', ""));
            let path = host.ws(&format!(
                "packages?app=counted&version={version}&file_name={about}"
            ));
            let headers = [("content-type", "application/octet-stream")];
            let answer = host
                .api
                .request(Method::POST, &path, file, &headers)
                .await
                .expect("an answer");
            let problem = refused(&answer, 422, "package_refused");
            let detail = text(&problem["detail"]);
            let hostile = entries.last().expect("the hostile entry").name;
            assert!(detail.contains(expected), "{about}: {detail}");
            let named = detail.contains(&format!("entry `{hostile}`"));
            assert!(named, "{about}: {detail}");
            let records = host.api.get(&host.ws("packages/uploads?page_size=1")).await;
            let record = items(&records.expect("upload records"))[0].clone();
            assert_eq!(record["version"], version, "{record}");
            let failed = &record["outcome"]["failed"];
            assert_eq!(failed["code"], "package_refused", "{record}");
            assert_eq!(failed["reason"], problem["detail"], "{record}");
            assert_eq!(files(), before, "{about}: something of the file is left");
        }
    }
    let packages = host.api.get(&host.ws("packages")).await;
    assert!(items(&packages.expect("packages")).is_empty());
}

/// Asks for a preview and for an order: both refuse alike, and nothing is made.
async fn no_plan(host: &TestHost, order: &Value, status: u16, code: &str) -> Value {
    let count = || async {
        items(
            &host
                .api
                .get(&host.ws("orders?page_size=100"))
                .await
                .expect("orders"),
        )
        .len()
    };
    let before = count().await;
    let mut preview = order.clone();
    preview.as_object_mut().expect("an order").remove("run");
    let previewed = ask(
        &host.api,
        Method::POST,
        &host.ws("orders/preview"),
        Some(&preview),
        &[],
    )
    .await;
    let first = refused(&previewed, status, code);
    let made: Answer = ask(
        &host.api,
        Method::POST,
        &host.ws("orders"),
        Some(order),
        &[],
    )
    .await;
    let second = refused(&made, status, code);
    assert_eq!(
        (&first["detail"], &first["field"]),
        (&second["detail"], &second["field"])
    );
    assert_eq!(count().await, before, "no order is made: {second}");
    second
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_cannot_be_is_refused_with_its_field() {
    let mut host = TestHost::start(Setup {
        agents: 2,
        ..Setup::default()
    })
    .await;
    let counted = Counted::prepare(&host).await;
    // A server is bound to one instance at most.
    host.add_agent("agent-3").await;
    host.wait_online().await;
    let api = &host.api;
    // A second application, so that there is something to depend on.
    let other_app = api
        .post(
            "/v1/apps",
            &json!({ "name": "other", "tech_stack": { "name": "binary", "version": "*" } }),
        )
        .await
        .expect("an application");
    let other_package = upload(
        &host,
        "other",
        "1.0.0",
        tar_gz(&[("run.sh", 0o755, b"#!/bin/sh\n")]),
    )
    .await;
    let instance =
        json!({ "name": "other", "app": other_app["id"], "parameters": { "program": "run.sh" } });
    let other = text(
        &api.post(&host.ws("service-instances"), &instance)
            .await
            .expect("an instance")["id"],
    );
    let good = counted.order("bad", 0);
    let hex = "01890a5dac96774bbcceb302099a8057";
    let changed = |pointer: &str, value: Value| {
        let mut order = good.clone();
        let (parent, field) = pointer.rsplit_once('/').expect("a pointer");
        order.pointer_mut(parent).expect(pointer)[field] = value;
        order
    };

    // The second one has no servers yet.
    let both = json!([good["targets"][0], { "instance": other, "package": other_package }]);
    assert_eq!(
        no_plan(&host, &changed("/targets", both.clone()), 422, "no_servers").await["field"],
        "/targets/1/instance"
    );
    let third = host.servers().await.pop().expect("agent-3").1;
    let bind = |server: String| {
        let path = host.ws(&format!("service-instances/{other}/servers"));
        async move {
            ask(
                api,
                Method::POST,
                &path,
                Some(&json!({ "servers": [server] })),
                &[],
            )
            .await
        }
    };
    accepted(&bind(third).await, 200);
    let taken = refused(
        &bind(counted.servers[0].1.clone()).await,
        409,
        "server_bound",
    );
    assert!(
        text(&taken["detail"]).contains(&counted.instance),
        "{taken}"
    );

    let many = Value::Array(vec![good["targets"][0].clone(); 101]);
    for (order, status, code, field, says) in [
        // What a strategy refuses is the order's fault.
        (
            changed("/parameters", json!({ "grouping": "all-in-one" })),
            422,
            "plugin_refused",
            json!("parameters"),
            "set it to 100%",
        ),
        (
            changed("/environment", json!({ "A": "x\0y" })),
            422,
            "parameter_value_invalid",
            json!("/environment/A"),
            "zero byte",
        ),
        (
            changed("/targets/0/instance", json!(format!("svc_{hex}"))),
            422,
            "instance_unknown",
            json!("/targets/0/instance"),
            hex,
        ),
        (
            changed("/targets/0/package", json!(format!("pkg_{hex}"))),
            422,
            "package_unknown",
            json!("/targets/0/package"),
            hex,
        ),
        (
            changed("/targets/0/package", json!(other_package)),
            422,
            "package_of_other_application",
            json!("/targets/0/package"),
            "counted",
        ),
        (
            changed("/targets/0/cells", json!(["cell-x"])),
            422,
            "no_such_cell",
            json!("/targets/0/cells"),
            "cell-x",
        ),
        (
            changed("/strategy", json!("nobody")),
            422,
            "plugin_not_available",
            json!("strategy"),
            "nobody",
        ),
        (
            changed("/strategy", json!("grouped@9.9.9")),
            422,
            "plugin_not_available",
            json!("strategy"),
            "9.9.9",
        ),
        (
            changed("/strategy", json!("grouped@latest")),
            422,
            "strategy_invalid",
            json!("strategy"),
            "latest",
        ),
        (
            changed("/strategy", json!("binary")),
            422,
            "plugin_not_available",
            json!("strategy"),
            "binary",
        ),
        (
            changed("/targets", json!([])),
            422,
            "targets_out_of_range",
            json!("targets"),
            "names 0",
        ),
        (
            changed("/targets", many),
            422,
            "targets_out_of_range",
            json!("targets"),
            "names 101",
        ),
        (
            changed("/targets", json!([good["targets"][0], good["targets"][0]])),
            422,
            "target_twice",
            json!("/targets/1/instance"),
            "counted",
        ),
        (
            changed("/title", json!("")),
            422,
            "out_of_limit",
            json!("title"),
            "0 characters",
        ),
        (
            changed("/title", json!("ä".repeat(51))),
            422,
            "out_of_limit",
            json!("title"),
            "51 characters",
        ),
        (
            changed("/environment", json!({ "A B": "x" })),
            422,
            "parameter_key_invalid",
            json!("/environment/A B"),
            "A B",
        ),
        (
            changed("/environment", json!({ "WINDLASS_SERVER": "x" })),
            422,
            "parameter_key_reserved",
            json!("/environment/WINDLASS_SERVER"),
            "WINDLASS_",
        ),
        // The strategy's own schema.
        (
            changed("/parameters/grouping", json!("sideways")),
            422,
            "parameters_invalid",
            json!("/parameters/grouping"),
            "grouped",
        ),
        (
            changed("/parameters/wave_percent", json!(0)),
            422,
            "parameters_invalid",
            json!("/parameters/wave_percent"),
            "wave_percent",
        ),
        (
            changed("/parameters/colour", json!(1)),
            422,
            "parameters_invalid",
            json!("parameters"),
            "colour",
        ),
        // The order's own limits.
        (
            changed("/limits", json!({ "max_in_flight": 0 })),
            422,
            "out_of_limit",
            json!("/limits/max_in_flight"),
            "1 to",
        ),
        (
            changed("/limits", json!({ "max_in_flight": 10_001 })),
            422,
            "out_of_limit",
            json!("/limits/max_in_flight"),
            "10000",
        ),
        (
            changed("/limits", json!({ "max_in_flight": -1 })),
            422,
            "invalid_value",
            json!("/limits/max_in_flight"),
            "-1",
        ),
        (
            changed("/limits", json!({ "max_unavailable": "101%" })),
            422,
            "invalid_value",
            json!("/limits/max_unavailable"),
            "101%",
        ),
        (
            changed("/limits", json!({ "max_failures": "some" })),
            422,
            "invalid_value",
            json!("/limits/max_failures"),
            "some",
        ),
        (
            changed("/drain_deadline_ms", json!(u64::MAX)),
            422,
            "out_of_limit",
            json!("drain_deadline_ms"),
            "86400000",
        ),
        (
            changed("/delivery_deadline_ms", json!(0)),
            422,
            "out_of_limit",
            json!("delivery_deadline_ms"),
            "1 to",
        ),
    ] {
        let problem = no_plan(&host, &order, status, code).await;
        assert_eq!(problem["field"], field, "{problem}");
        assert!(
            text(&problem["detail"]).contains(says),
            "`{says}` is not named: {problem}"
        );
    }

    // Dependencies.
    for (dependencies, says) in [
        ("counted>other,other>counted", "circle"),
        ("counted>counted", "circle"),
        ("counted>nobody", "nobody"),
        ("counted", "a>b"),
    ] {
        let mut order = changed("/targets", both.clone());
        order["dependencies"] = json!(dependencies);
        let problem = no_plan(&host, &order, 422, "dependencies_invalid").await;
        assert_eq!(problem["field"], "dependencies");
        assert!(text(&problem["detail"]).contains(says), "{problem}");
    }

    // The tech stack's schema.
    let instance = host.ws(&format!("service-instances/{}", counted.instance));
    let before = api.get(&instance).await.expect("the instance");
    for (parameters, field) in [
        (json!({ "program": "x", "port": 70_000 }), "port"),
        (json!({ "program": "x", "port": "http" }), "port"),
        (
            json!({ "program": "x", "health": { "kind": "prayer" } }),
            "/health/kind",
        ),
        (
            json!({ "program": "x", "health": { "kind": "script" } }),
            "health",
        ),
        (json!({ "program": "x", "colour": 1 }), "colour"),
    ] {
        let answer = ask(
            api,
            Method::PUT,
            &instance,
            Some(&json!({ "parameters": parameters })),
            &[],
        )
        .await;
        let problem = refused(&answer, 422, "parameters_invalid");
        assert!(
            problem["field"].to_string().contains(field)
                || problem["detail"].to_string().contains(field),
            "{field}: {problem}"
        );
    }
    assert_eq!(
        api.get(&instance).await.expect("the instance"),
        before,
        "nothing of it is kept"
    );

    a_server_in_two_orders(&host, &counted).await;
}

/// The second order's groups are locked, and name the first.
async fn a_server_in_two_orders(host: &TestHost, counted: &Counted) {
    let mut first = counted.order("first", 0);
    first["parameters"] = json!({ "grouping": "one-per-group", "beta_group": true });
    let first = host.order(&first).await.expect("an order");
    host.order_in(&first, &["awaiting_confirmation"]).await;
    let second = host
        .order(&counted.order("second", 1))
        .await
        .expect("an order");
    let held = host.order_in(&second, &["blocked"]).await;
    assert!(text(&held["state_reason"]).contains("run first"), "{held}");
    let nodes = items(
        &host
            .api
            .get(&host.ws(&format!("orders/{second}/nodes")))
            .await
            .expect("nodes"),
    );
    let groups: Vec<&Value> = nodes
        .iter()
        .filter(|node| node["level"] == "group")
        .collect();
    assert_eq!(groups.len(), 2);
    for group in &groups {
        assert_eq!(group["state"], "locked", "{group}");
        assert!(
            text(&group["message"]).contains("`run first`")
                && text(&group["message"]).contains(&first),
            "{group}"
        );
    }
    let act = |order: String, action: Value| async move {
        ask(
            &host.api,
            Method::POST,
            &host.ws(&format!("orders/{order}/actions")),
            Some(&action),
            &[],
        )
        .await
    };
    let early = act(
        second.clone(),
        json!({ "action": "unlock", "node": groups[0]["node"] }),
    )
    .await;
    assert!(
        text(&refused(&early, 409, "server_held")["detail"]).contains(&first),
        "{}",
        early.text()
    );
    assert_eq!(counted.executions("second").len(), 0, "nothing of it ran");
    accepted(
        &act(first.clone(), json!({ "action": "cancel", "node": null })).await,
        200,
    );
    host.order_ended(&first).await;
    for group in &groups {
        accepted(
            &act(
                second.clone(),
                json!({ "action": "unlock", "node": group["node"] }),
            )
            .await,
            200,
        );
    }
    let ended = host.order_ended(&second).await;
    counted.check_succeeded(host, &ended, "second").await;
}

/// A component that exports these interfaces, each with one function that takes and gives nothing.
fn component(imports: &str, exports: &[(&str, &str)]) -> Vec<u8> {
    let exports: String = (0..)
        .zip(exports)
        .map(|(index, (interface, function))| {
            format!(
                "(instance $e{index} (export \"{function}\" (func $f)))
                 (export \"windlass:plugin/{interface}\" (instance $e{index}))"
            )
        })
        .collect();
    let text = format!(
        "(component {imports}
            (core module $m (func (export \"f\")))
            (core instance $i (instantiate $m))
            (func $f (canon lift (core func $i \"f\")))
            {exports})"
    );
    wat::parse_str(text).expect("a component")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_plugin_is_rejected_with_its_own_code_and_disturbs_nobody() {
    let directory = PluginDirectory::shipped();
    let host = TestHost::start(Setup {
        agents: 0,
        plugins: Some(directory.path()),
        ..Setup::default()
    })
    .await;
    let active = || async {
        let page = host
            .api
            .get("/v1/plugins?state=active")
            .await
            .expect("plugins");
        let mut names: Vec<String> = items(&page)
            .iter()
            .map(|plugin| text(&plugin["descriptor"]["name"]))
            .collect();
        names.sort();
        names
    };
    let before = active().await;
    let mut shipped: Vec<String> = std::fs::read_dir(plugins())
        .expect("the built plugins")
        .filter_map(|entry| {
            let name = entry.expect("an entry").file_name();
            Some(name.to_str()?.strip_suffix(".wasm")?.to_owned())
        })
        .collect();
    shipped.sort();
    assert_eq!(before, shipped);

    // What is compiled ahead of time is an ELF file for this very machine. The runtime's own tests use a real one.
    let compiled = [b"\x7fELF\x02\x01\x01".as_slice(), &[0; 57]].concat();
    let info = ("plugin-info@1.0.0", "describe");
    let lifecycle = ("lifecycle@1.0.0", "lifecycle");
    let marked = |mode: &str| guest_that("tech-stack", "bad", "1.0.0", mode);
    let import = "(import \"evil:net/sockets@1.0.0\" (instance (export \"connect\" (func))))";
    let mut cut = marked("ok");
    cut.truncate(cut.len() / 2);
    let bad = [
        ("text.wasm", b"I am no plugin".to_vec(), "not_wasm"),
        (
            "core.wasm",
            wat::parse_str("(module (func (export \"describe\")))").expect("a module"),
            "core_module",
        ),
        ("cut.wasm", cut, "invalid_component"),
        ("no-world.wasm", component("", &[]), "no_world"),
        (
            "no-describe.wasm",
            component("", &[lifecycle]),
            "missing_export",
        ),
        (
            "import.wasm",
            component(import, &[info, lifecycle]),
            "unknown_import",
        ),
        ("loops.wasm", marked("loop"), "describe_timeout"),
        ("allocates.wasm", marked("allocate"), "memory_limit"),
        ("traps.wasm", marked("trap"), "describe_failed"),
        (
            "schema-broken.wasm",
            marked("schema-broken"),
            "schema_invalid",
        ),
        (
            "schema-enormous.wasm",
            marked("schema-enormous"),
            "schema_too_large",
        ),
        ("large.wasm", vec![0; 33 << 20], "too_large"),
        ("precompiled.wasm", compiled, "precompiled"),
        (
            "bad-name.wasm",
            guest("tech-stack", "Bad Name", "1.0.0"),
            "descriptor_invalid",
        ),
    ];
    for (file, bytes, _) in &bad {
        directory.drop_in(file, bytes);
    }
    let rejected = eventually(
        "every one is rejected, and the server answers meanwhile",
        || async {
            host.api
                .get("/readyz")
                .await
                .map_err(|error| error.to_string())?;
            let page = host
                .api
                .get("/v1/plugins?state=rejected")
                .await
                .map_err(|error| error.to_string())?;
            let found = items(&page);
            if found.len() == bad.len() {
                Ok(found)
            } else {
                Err(page.to_string())
            }
        },
    )
    .await;
    for (file, _, code) in &bad {
        let found = rejected
            .iter()
            .find(|plugin| plugin["file"] == *file)
            .unwrap_or_else(|| panic!("{file} is not there: {rejected:?}"));
        assert_eq!(found["rejection"]["code"], *code, "{file}: {found}");
        assert!(
            text(&found["rejection"]["text"]).len() > 10,
            "{file}: {found}"
        );
        assert_eq!(
            host.api
                .get(&format!("/v1/plugins/{file}"))
                .await
                .expect(file),
            *found,
            "{file} by itself"
        );
        let answer = ask(
            &host.api,
            Method::POST,
            "/v1/plugins/bad/1.0.0/actions",
            Some(&json!({ "action": "approve" })),
            &[],
        )
        .await;
        refused(&answer, 404, "not_found");
    }
    assert_eq!(active().await, before, "the others stay");
    host.api
        .post(
            "/v1/apps",
            &json!({ "name": "shop", "tech_stack": { "name": "binary", "version": "*" } }),
        )
        .await
        .expect("they can be used");
    let refused_app = ask(
        &host.api,
        Method::POST,
        "/v1/apps",
        Some(&json!({ "name": "x", "tech_stack": { "name": "bad", "version": "*" } })),
        &[],
    )
    .await;
    refused(&refused_app, 422, "tech_stack_unknown");

    // A file that is mended becomes a plugin; one that goes is forgotten.
    directory.drop_in("loops.wasm", &guest("tech-stack", "mended", "1.0.0"));
    fs::remove_file(directory.path().join("text.wasm")).expect("it is removed");
    eventually("the mended one is active", || async {
        let page = host
            .api
            .get("/v1/plugins")
            .await
            .map_err(|error| error.to_string())?;
        let is_mended = items(&page)
            .iter()
            .any(|plugin| plugin["file"] == "loops.wasm" && plugin["state"] == "active");
        let is_gone = !items(&page)
            .iter()
            .any(|plugin| plugin["file"] == "text.wasm");
        if is_mended && is_gone {
            Ok(())
        } else {
            Err(page.to_string())
        }
    })
    .await;
    // Nothing of the rejected ones is kept.
    let staging = below(&host.data().join("plugins-state/staging"));
    assert!(staging.is_empty(), "{staging:?}");
}
