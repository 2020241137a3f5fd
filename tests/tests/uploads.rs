//! Uploads: every archive format goes to a real agent; forms, quotas, versions, records and freed space.

use std::{
    io::{Cursor, Read as _, Write as _},
    process::{Command, Stdio},
};

use bytes::Bytes;
use flate2::read::GzDecoder;
use hyper::Method;
use serde_json::{Value, json};
use windlass::api::client::Answer;
use windlass_tests::{
    host::{Setup, TestHost, items, tar_gz, text},
    problem::{accepted, ask, refused},
    scene::{Scene, program},
};

const OCTETS: [(&str, &str); 1] = [("content-type", "application/octet-stream")];

async fn send(host: &TestHost, query: &str, file: Bytes, headers: &[(&str, &str)]) -> Answer {
    let path = host.ws(&format!("packages?{query}"));
    host.api
        .request(Method::POST, &path, file, headers)
        .await
        .expect("an answer")
}

async fn newest_record(host: &TestHost) -> Value {
    let records = host.api.get(&host.ws("packages/uploads?page_size=1")).await;
    items(&records.expect("upload records"))[0].clone()
}

/// What a program writes for these bytes.
fn through(program: &str, arguments: &[&str], bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program} is installed (see tests/setup.sh): {error}"));
    let mut stdin = child.stdin.take().expect("its input");
    stdin.write_all(bytes).expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{program}");
    output.stdout
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packages_of_every_format_are_examined_stored_released_and_deleted() {
    let mut host = TestHost::start(Setup {
        agents: 1,
        ..Setup::default()
    })
    .await;
    let scene = Scene::prepare(&host).await;
    every_archive_format_is_released_to_a_real_agent(&host, &scene).await;
    a_form_is_refused_with_the_right_command(&host).await;
    an_archive_that_ends_in_the_middle_is_refused_with_the_byte(&host).await;
    the_kind_can_be_declared(&host).await;
    a_version_is_made_from_date_and_time(&host).await;
    the_quota_counts_stored_packages_and_is_a_setting(&host).await;
    a_deletion_states_when_the_space_is_free(&host).await;
    upload_records_are_deleted_one_or_many(&host).await;
    host.stop().await;
}

/// A zip of the program behind a start script, as executable jars are made. The file does not have a jar's name.
fn zip_behind_a_script(version: &str) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    for (name, mode, content) in [
        ("run.sh", 0o755, "#!/bin/sh\nexec sleep 1000000\n"),
        ("VERSION", 0o644, version),
    ] {
        archive
            .start_file(name, options.unix_permissions(mode))
            .expect("an entry");
        archive.write_all(content.as_bytes()).expect("its content");
    }
    let mut file = b"#!/bin/sh\nexit 0\n".to_vec();
    file.extend(archive.finish().expect("the archive").into_inner());
    file
}

async fn every_archive_format_is_released_to_a_real_agent(host: &TestHost, scene: &Scene) {
    let tar = |version: &str| {
        let mut tar = Vec::new();
        GzDecoder::new(&*program(version))
            .read_to_end(&mut tar)
            .expect("the tar archive");
        tar
    };
    type Pack = fn(&[u8]) -> Vec<u8>;
    let packs: [(&str, &str, Pack); 4] = [
        ("tar", "tar", <[u8]>::to_vec),
        ("tar.xz", "tar_xz", |tar| through("xz", &["-c"], tar)),
        ("tar.zst", "tar_zst", |tar| through("zstd", &["-qc"], tar)),
        ("tar.bz2", "tar_bz2", |tar| through("bzip2", &["-c"], tar)),
    ];
    let mut files: Vec<(String, &str, &str, Vec<u8>)> = packs
        .into_iter()
        .map(|(ending, format, pack)| {
            let version = format!("1.0.0-{ending}");
            let file = pack(&tar(&version));
            (version, ending, format, file)
        })
        .collect();
    let version = "1.0.0-zip".to_owned();
    files.push((version.clone(), "zip", "zip", zip_behind_a_script(&version)));
    for (version, ending, format, file) in files {
        let query = format!("app=scene&version={version}&file_name=scene.{ending}");
        let package = accepted(&send(host, &query, file.into(), &OCTETS).await, 201);
        assert_eq!(package["format"], format, "{package}");
        let mut order = scene.order(&format!("as {ending}"), 0);
        order["targets"][0]["package"] = package["id"].clone();
        order["run"] = true.into();
        let id = host.order(&order).await.expect("an order");
        let ended = host.order_ended(&id).await;
        assert_eq!(ended["state"], "succeeded", "{ending}: {ended}");
        let installed = scene.installed_on(&host.agents[0]);
        assert_eq!(installed.as_deref(), Some(version.as_str()));
    }
}

async fn a_form_is_refused_with_the_right_command(host: &TestHost) {
    let file = program("9.0.0");
    for (number, media) in [
        "multipart/form-data; boundary=x",
        "Multipart/Mixed; boundary=x",
        "application/x-www-form-urlencoded",
        "APPLICATION/X-WWW-FORM-URLENCODED; charset=utf-8",
    ]
    .iter()
    .enumerate()
    {
        let version = format!("9.{number}.0");
        let query = format!("app=scene&version={version}&file_name=scene.tar.gz");
        let answer = send(host, &query, file.clone(), &[("content-type", *media)]).await;
        let problem = refused(&answer, 415, "package_media_type");
        let remedy = text(&problem["mend"]);
        for part in [
            "application/octet-stream",
            "--data-binary @scene.tar.gz",
            &format!("packages?app=scene&version={version}&file_name=scene.tar.gz"),
        ] {
            assert!(remedy.contains(part), "{part}: {remedy}");
        }
        let record = newest_record(host).await;
        assert_eq!(record["version"], version, "{record}");
        let code = &record["outcome"]["failed"]["code"];
        assert_eq!(code, "package_media_type", "{record}");
    }
    // Other types, and none, are the file itself.
    for (version, headers) in [
        ("9.4.0", &[("content-type", "application/gzip")][..]),
        ("9.5.0", &[]),
    ] {
        let query = format!("app=scene&version={version}&file_name=scene.tar.gz");
        accepted(&send(host, &query, file.clone(), headers).await, 201);
    }
}

async fn an_archive_that_ends_in_the_middle_is_refused_with_the_byte(host: &TestHost) {
    let mut content = vec![0_u8; 300_000];
    let mut state = 7_u32;
    for byte in &mut content {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    let whole = tar_gz(&[("run.sh", 0o755, b"#!/bin/sh\n"), ("data", 0o644, &content)]);
    let query = "app=scene&version=8.0.0&file_name=scene.tar.gz";
    let cut = whole.slice(..whole.len() / 2);
    let problem = refused(
        &send(host, query, cut, &OCTETS).await,
        422,
        "package_refused",
    );
    let detail = text(&problem["detail"]);
    assert!(
        detail.contains("entry `data`") && detail.contains(" at byte "),
        "{detail}"
    );
    // The whole file is accepted afterwards, under the same version.
    accepted(&send(host, query, whole, &OCTETS).await, 201);
}

async fn the_kind_can_be_declared(host: &TestHost) {
    let file = tar_gz(&[("run.sh", 0o755, b"#!/bin/sh\n")]);
    for (version, query, format) in [
        ("7.0.0", "file_name=scene", "tar_gz"),
        ("7.1.0", "file_name=scene&kind=file", "plain"),
        ("7.2.0", "file_name=scene.zip&kind=archive", "tar_gz"),
    ] {
        let query = format!("app=scene&version={version}&{query}");
        let package = accepted(&send(host, &query, file.clone(), &OCTETS).await, 201);
        assert_eq!(package["format"], format, "{query}");
    }
    for (query, code) in [
        ("file_name=scene.zip", "package_format"),
        ("file_name=scene&kind=jar", "package_refused"),
    ] {
        let query = format!("app=scene&version=7.3.0&{query}");
        refused(&send(host, &query, file.clone(), &OCTETS).await, 422, code);
    }
}

async fn a_version_is_made_from_date_and_time(host: &TestHost) {
    let query = "app=scene&file_name=scene.tar.gz";
    let mut versions = Vec::new();
    for number in 0..3 {
        let file = program(&format!("of {number}"));
        let package = accepted(&send(host, query, file, &OCTETS).await, 201);
        let version = text(&package["version"]);
        // As `2026-12-01T14:30:05.123Z` without its separators.
        let made: String = text(&package["created_at"])
            .chars()
            .filter(char::is_ascii_digit)
            .collect();
        let (date, time) = version.split_once('-').expect("a date and a time");
        assert_eq!(date, &made[..8], "{package}");
        let time = time.split('-').next().expect("a time");
        assert!(
            time.len() == 6 && time.bytes().all(|byte| byte.is_ascii_digit()),
            "{package}"
        );
        assert!(!versions.contains(&version), "{version} in {versions:?}");
        versions.push(version);
    }
}

async fn the_quota_counts_stored_packages_and_is_a_setting(host: &TestHost) {
    let packages = host.api.get(&host.ws("packages?page_size=50")).await;
    let stored: u64 = items(&packages.expect("packages"))
        .iter()
        .filter_map(|package| package["size_bytes"].as_u64())
        .sum();
    let file = program("6.0.0");
    let size = file.len() as u64;
    let set = async |bytes: u64| {
        let change = json!({ "upload_quota_bytes": bytes });
        let path = host.ws("");
        let answer = ask(
            &host.api,
            Method::PUT,
            path.trim_end_matches('/'),
            Some(&change),
            &[],
        );
        let workspace = accepted(&answer.await, 200);
        assert_eq!(workspace["upload_quota_bytes"], bytes);
    };
    let query = "app=scene&version=6.0.0&file_name=scene.tar.gz";
    set(stored + size - 1).await;
    let answer = send(host, query, file.clone(), &OCTETS).await;
    let problem = refused(&answer, 413, "upload_quota_reached");
    assert_eq!(problem["limit"], stored + size - 1, "{problem}");
    assert_eq!(problem["current"], stored + size, "{problem}");
    let remedy = text(&problem["mend"]);
    assert!(remedy.contains("upload_quota_bytes"), "{remedy}");
    let code = &newest_record(host).await["outcome"]["failed"]["code"];
    assert_eq!(code, "upload_quota_reached");
    set(stored + size).await;
    accepted(&send(host, query, file, &OCTETS).await, 201);
    set(20 << 30).await;
}

async fn a_deletion_states_when_the_space_is_free(host: &TestHost) {
    let file = tar_gz(&[("unique", 0o644, b"to be deleted")]);
    let mut made = Vec::new();
    for version in ["5.0.0", "5.1.0"] {
        let query = format!("app=scene&version={version}&file_name=scene.tar.gz");
        made.push(accepted(
            &send(host, &query, file.clone(), &OCTETS).await,
            201,
        ));
    }
    let delete = async |package: &Value| {
        let path = host.ws(&format!(
            "packages/{}?confirm={}",
            text(&package["id"]),
            text(&package["version"])
        ));
        accepted(&ask(&host.api, Method::DELETE, &path, None, &[]).await, 200)
    };
    // The other package has the same file.
    let first = delete(&made[0]).await;
    assert_eq!(first["size_bytes"], made[0]["size_bytes"], "{first}");
    assert!(first.get("space_free_by").is_none(), "{first}");
    let second = delete(&made[1]).await;
    let free_by = text(&second["space_free_by"]);
    // RFC 3339 in UTC sorts as text.
    assert!(free_by > text(&made[1]["created_at"]), "{second}");
}

async fn upload_records_are_deleted_one_or_many(host: &TestHost) {
    let list = async || {
        let records = host
            .api
            .get(&host.ws("packages/uploads?page_size=50"))
            .await;
        items(&records.expect("upload records"))
            .iter()
            .map(|record| text(&record["id"]))
            .collect::<Vec<String>>()
    };
    let before = list().await;
    let packages = host.api.get(&host.ws("packages?page_size=50")).await;
    let packages = items(&packages.expect("packages")).len();
    let path = host.ws(&format!("packages/uploads/{}", before[0]));
    let answer = ask(&host.api, Method::DELETE, &path, None, &[]).await;
    assert_eq!(answer.status, 204, "{}", answer.text());
    let answer = ask(&host.api, Method::DELETE, &path, None, &[]).await;
    refused(&answer, 404, "not_found");
    let many = json!({ "uploads": [before[0], before[1], before[2], before[1]] });
    let all = host.ws("packages/uploads");
    let answer = ask(&host.api, Method::DELETE, &all, Some(&many), &[]).await;
    let deleted = accepted(&answer, 200);
    assert_eq!(deleted["deleted"], json!([before[1], before[2]]));
    assert_eq!(deleted["missing"], json!([before[0]]));
    assert_eq!(list().await, before[3..]);
    let answer = ask(
        &host.api,
        Method::DELETE,
        &all,
        Some(&json!({ "uploads": [] })),
        &[],
    )
    .await;
    refused(&answer, 422, "uploads_out_of_range");
    let left = host.api.get(&host.ws("packages?page_size=50")).await;
    assert_eq!(items(&left.expect("packages")).len(), packages);
}

#[tokio::test]
async fn an_upload_that_would_leave_too_little_space_on_the_disk_is_refused() {
    let mut host = TestHost::start(Setup {
        agents: 0,
        server_args: vec!["--upload-disk-reserve".to_owned(), "99".to_owned()],
        ..Setup::default()
    })
    .await;
    let app = json!({ "name": "scene", "tech_stack": { "name": "binary", "version": "*" } });
    host.api
        .post("/v1/apps", &app)
        .await
        .expect("an application");
    let query = "app=scene&version=1.0.0&file_name=scene.tar.gz";
    let answer = send(&host, query, program("1.0.0"), &OCTETS).await;
    let problem = refused(&answer, 507, "storage_full");
    assert!(
        problem["limit"].as_u64() > problem["current"].as_u64(),
        "{problem}"
    );
    let remedy = text(&problem["mend"]);
    assert!(remedy.contains("--upload-disk-reserve"), "{remedy}");
    let code = &newest_record(&host).await["outcome"]["failed"]["code"];
    assert_eq!(code, "storage_full");
    host.stop().await;
}
