//! Static files as an operation, with real agents: replaced as a whole, or left as they were; over HTTP and HTTPS.

use std::{fs, path::Path, sync::Arc};

use bytes::Bytes;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;
use windlass_tests::{
    host::{TestHost, tar_gz, text},
    operated::{check_serves, done, on, ready, run},
    scene::{Scene, act, nodes},
};

#[tokio::test]
async fn people_place_static_files() {
    let (mut host, scene) = ready().await;
    let mut order = scene.order("first", 0);
    order["run"] = true.into();
    let order = host.order(&order).await.expect("an order");
    assert_eq!(host.order_ended(&order).await["state"], "succeeded");
    files_are_replaced_as_a_whole(&host, &scene).await;
    only_a_trusted_server_gives_files(&mut host, &scene).await;
}

/// Who runs the agents.
fn user() -> String {
    let user = std::process::Command::new("id").arg("-un").output();
    let user = String::from_utf8(user.expect("id(1)").stdout).expect("a name");
    user.trim().to_owned()
}

/// A server's side of TLS whose certificate has this name; it is kept at `path`, for who is to trust it.
fn tls(name: &str, path: &Path) -> TlsAcceptor {
    let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).expect("a certificate");
    fs::write(path, made.cert.pem()).expect("it is written");
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .expect("a configuration");
    TlsAcceptor::from(Arc::new(config))
}

/// The first agent trusts the certificate, the second does not. A name that the certificate does not have is refused by both.
async fn only_a_trusted_server_gives_files(host: &mut TestHost, scene: &Scene) {
    let trusted = host.path().join("trusted.pem");
    let files = vec![("/site.tar.gz", tar_gz(&[("index.html", 0o644, b"https")]))];
    let port = serve(files, Some(tls("localhost", &trusted))).await;
    host.kill_agent(0);
    let trusts = ("SSL_CERT_FILE".to_owned(), text(&json!(trusted)));
    host.start_agent(0, &[trusts]);
    host.wait_online().await;
    let root = host.path().join("www");
    let user = user();
    let site = |at: usize| root.join(format!("secure-{at}"));
    let place = |at: usize, name: &str| {
        let kind = json!({
            "kind": "static_files",
            "url": format!("https://{name}:{port}/site.tar.gz"),
            "directory": format!("{}/", site(at).display()),
            "user": user,
        });
        on(scene, "files", kind, &[at])
    };
    done(host, place(0, "localhost")).await;
    let shown = fs::read_to_string(site(0).join("index.html"));
    assert_eq!(shown.expect("the file"), "https");
    fs::remove_dir_all(site(0)).expect("the files are removed");
    for (at, name, says) in [
        (1, "localhost", "UnknownIssuer"),
        (0, "127.0.0.1", "not valid for name"),
    ] {
        let order = run(host, place(at, name)).await;
        let blocked = host.order_in(&order, &["blocked"]).await;
        let reason = text(&blocked["state_reason"]);
        assert!(reason.contains(says), "{says}: {reason}");
        act(host, &order, &json!({ "action": "cancel" }))
            .await
            .expect("cancelled");
        host.order_ended(&order).await;
        assert!(!site(at).exists(), "nothing was placed");
    }
}

type Files = Vec<(&'static str, Bytes)>;

/// Serves files over HTTP, or HTTPS; answers the port.
async fn serve(files: Files, tls: Option<TlsAcceptor>) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let port = listener.local_addr().expect("its address").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            match &tls {
                None => answer(stream, &files).await,
                // A client that does not trust it hangs up.
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        answer(stream, &files).await;
                    }
                }
            }
        }
    });
    port
}

/// Answers one request.
async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, files: &Files) {
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => request.extend_from_slice(&buffer[..read]),
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let found = files.iter().find(|(name, _)| *name == path);
    let (head, body) = match (path.as_str(), found) {
        ("/moved.tar.gz", _) => (
            "HTTP/1.1 302 Found\r\nlocation: /one.tar.gz\r\ncontent-length: 0\r\n".to_owned(),
            Bytes::new(),
        ),
        (_, Some((_, body))) => (
            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n", body.len()),
            body.clone(),
        ),
        (_, None) => (
            "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n".to_owned(),
            Bytes::new(),
        ),
    };
    let head = format!("{head}connection: close\r\n\r\n");
    if stream.write_all(head.as_bytes()).await.is_ok() {
        stream.write_all(&body).await.ok();
        stream.shutdown().await.ok();
    }
}

async fn files_are_replaced_as_a_whole(host: &TestHost, scene: &Scene) {
    let root = host.path().join("www");
    let large = tar_gz(&[("a", 0o644, b"good"), ("b/c", 0o644, b"good")]);
    let files = vec![
        (
            "/one.tar.gz",
            tar_gz(&[("index.html", 0o644, b"one"), ("only-one/x", 0o600, b"1")]),
        ),
        ("/two.tar.gz", tar_gz(&[("index.html", 0o644, b"two")])),
        ("/large.tar.gz", large),
        ("/broken.tar.gz", Bytes::from_static(b"this is no archive")),
    ];
    let url = format!("http://127.0.0.1:{}", serve(files, None).await);
    // Both agents run on this machine: each of them has a directory of its own.
    let user = user();
    let place = |at: usize, file: &str, more: Value| {
        let mut kind = json!({
            "kind": "static_files",
            "url": format!("{url}/{file}"),
            "directory": format!("{}/site-{at}/", root.display()),
            "user": user,
        });
        for (name, value) in more.as_object().cloned().unwrap_or_default() {
            kind[name] = value;
        }
        on(scene, "files", kind, &[at])
    };
    let none = || json!({});
    let shown = |at: usize| fs::read_to_string(root.join(format!("site-{at}/index.html")));
    let ended = done(host, place(0, "moved.tar.gz", none())).await;
    assert_eq!(shown(0).expect("the file"), "one");
    assert!(root.join("site-0/only-one/x").is_file());
    let order = text(&ended["id"]);
    let seen = nodes(host, &order).await;
    let steps: Vec<&Value> = seen.iter().filter(|node| node["level"] == "step").collect();
    assert_eq!(
        steps.len(),
        1,
        "the application goes on, in traffic: {steps:?}"
    );
    done(host, place(0, "two.tar.gz", none())).await;
    assert_eq!(shown(0).expect("the file"), "two");
    assert!(
        !root.join("site-0/only-one").exists(),
        "the old files are gone"
    );
    let left: Vec<String> = fs::read_dir(&root)
        .expect("the root")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    assert_eq!(left, ["site-0"], "nothing is left beside it");

    // What cannot be placed changes nothing, and says why.
    std::os::unix::fs::symlink("/etc", root.join("site-1")).expect("a link");
    for (asked, says) in [
        (
            place(1, "one.tar.gz", none()),
            "is there and is no directory",
        ),
        (place(0, "nothing.tar.gz", none()), "404"),
        (place(0, "broken.tar.gz", none()), "is not an archive"),
        (
            place(0, "large.tar.gz", json!({ "max_bytes": 20 })),
            "more than 20 bytes",
        ),
        (
            place(0, "one.tar.gz", json!({ "sha256": "0".repeat(64) })),
            "SHA-256",
        ),
        (
            place(0, "one.tar.gz", json!({ "directory": "/srv/elsewhere/" })),
            "/srv/elsewhere/",
        ),
        (
            place(
                0,
                "one.tar.gz",
                json!({ "directory": format!("{}/", root.display()) }),
            ),
            "no task's to replace",
        ),
        (
            place(0, "one.tar.gz", json!({ "user": "nobody-here" })),
            "nobody-here",
        ),
    ] {
        let order = run(host, asked).await;
        let blocked = host.order_in(&order, &["blocked"]).await;
        let reason = text(&blocked["state_reason"]);
        assert!(reason.contains(says), "{says}: {reason}");
        act(host, &order, &json!({ "action": "cancel" }))
            .await
            .expect("cancelled");
        assert_eq!(host.order_ended(&order).await["state"], "failed");
        assert_eq!(shown(0).expect("the file"), "two", "as it was");
    }
    assert!(
        !root.join("site-1/index.html").exists(),
        "nothing went through the link"
    );
    check_serves(host, scene).await;
}
