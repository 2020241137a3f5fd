//! `upload_check_mb_s`: how fast an archive is uploaded, with its complete examination.
//!
//! A `.tar.gz` of a tree of 300 MB is streamed to the real server. The server unpacks it in memory to judge every entry while it
//! arrives, and hashes and stores the file beside that. The figure is the size of the *unpacked* tree divided by the time from
//! the first byte to the answer, the median of several uploads. A megabyte is 10^6 bytes.

use std::{io::Write as _, time::Instant};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use windlass_tests::host::{Setup, TestHost};

const UPLOADS: usize = 5;
const FILES: usize = 1200;
const FILE_BYTES: usize = 250_000;
const CHUNK_BYTES: usize = 1 << 16;

#[tokio::main]
async fn main() {
    let archive = archive();
    let setup = Setup {
        agents: 0,
        ..Setup::default()
    };
    let mut host = TestHost::start(setup).await;
    let app = json!({ "name": "large", "tech_stack": { "name": "binary", "version": "*" } });
    host.api
        .post("/v1/apps", &app)
        .await
        .expect("an application");
    let mut speeds = Vec::new();
    for number in 0..UPLOADS {
        let began = Instant::now();
        upload(&host, number, &archive).await;
        let seconds = began.elapsed().as_secs_f64();
        speeds.push((FILES * FILE_BYTES) as f64 / 1e6 / seconds);
    }
    speeds.sort_by(f64::total_cmp);
    println!("upload_check_mb_s {:.0} MB/s", speeds[UPLOADS / 2]);
    host.stop().await;
}

/// Files that compress about as programs do: repeated words, numbers, and some noise.
fn archive() -> Vec<u8> {
    let encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut archive = tar::Builder::new(encoder);
    let mut state = 1_u64;
    let mut next = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    const WORDS: [&str; 8] = [
        "function ",
        "return ",
        "public ",
        "static ",
        "value",
        "index",
        " = ",
        ";\n",
    ];
    let mut content = Vec::with_capacity(FILE_BYTES + 16);
    for number in 0..FILES {
        content.clear();
        while content.len() < FILE_BYTES {
            match next() % 4 {
                0 => content.extend(next().to_le_bytes()),
                1 => write!(content, "{}", next() % 1000).expect("memory"),
                _ => {
                    let word = WORDS[(next() % WORDS.len() as u64) as usize];
                    content.extend(word.as_bytes());
                }
            }
        }
        content.truncate(FILE_BYTES);
        let mut header = tar::Header::new_ustar();
        header.set_size(FILE_BYTES as u64);
        header.set_mode(0o644);
        let name = format!("lib/{:02}/file-{number}", number % 40);
        archive
            .append_data(&mut header, name, &*content)
            .expect("a file is packed");
    }
    let encoder = archive.into_inner().expect("the archive");
    encoder.finish().expect("the compression")
}

async fn upload(host: &TestHost, number: usize, archive: &[u8]) {
    let mut stream = TcpStream::connect(host.api_address())
        .await
        .expect("a connection");
    let path = host.ws(&format!(
        "packages?app=large&version={number}.0.0&file_name=large.tar.gz"
    ));
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\ncontent-type: application/octet-stream\r\nconnection: close\r\n\r\n",
        host.api_address(),
        host.token(),
        archive.len(),
    );
    stream
        .write_all(head.as_bytes())
        .await
        .expect("the head is sent");
    for chunk in archive.chunks(CHUNK_BYTES) {
        stream.write_all(chunk).await.expect("the body is sent");
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
}
