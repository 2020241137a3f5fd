//! `upload_rss_mb`: how much the server's resident memory grows while packages of 200 MB are uploaded to it.
//!
//! The real server as a process; the file is streamed to it and never whole in memory here either. Before the first upload a
//! small one is made, so that what any first upload costs is not counted. The kernel itself notes the peak (`VmHWM`, set back
//! before each upload). Prints the worst of several uploads: what one leaves behind counts for the next. A megabyte is 10^6
//! bytes.

use std::fs;

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use windlass_tests::host::{Setup, TestHost};

const UPLOADS: u64 = 3;
const BYTES: u64 = 200_000_000;
const SMALL_BYTES: u64 = 1_000_000;
const CHUNK_BYTES: usize = 1 << 16;

#[tokio::main]
async fn main() {
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
    let pid = host.server_pid().expect("the server runs");
    upload(&host, 0, SMALL_BYTES).await;
    let before = memory_kb(pid, "VmRSS:");
    let mut worst = 0;
    for number in 1..=UPLOADS {
        fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("the peak is set back");
        upload(&host, number, BYTES).await;
        let grown = memory_kb(pid, "VmHWM:").saturating_sub(before);
        worst = worst.max(grown);
    }
    println!("upload_rss_mb {:.1} MB", worst as f64 * 1024.0 / 1e6);
    host.stop().await;
}

fn memory_kb(pid: u32, line: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("Linux has it");
    let found = status.lines().find_map(|text| text.strip_prefix(line));
    let kb = found.and_then(|rest| rest.trim().split(' ').next()?.parse().ok());
    kb.expect("a figure in kB")
}

/// Streams a file to the server as fast as it takes it. The bytes of each number differ, so that each is a file of its own.
async fn upload(host: &TestHost, number: u64, bytes: u64) {
    let mut stream = TcpStream::connect(host.api_address())
        .await
        .expect("a connection");
    let path = host.ws(&format!(
        "packages?app=large&version={number}.0.0&file_name=large"
    ));
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\ncontent-length: {bytes}\r\nconnection: close\r\n\r\n",
        host.api_address(),
        host.token(),
    );
    stream
        .write_all(head.as_bytes())
        .await
        .expect("the head is sent");
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left = bytes;
    while left > 0 {
        chunk[..16].copy_from_slice(&(u128::from(number) << 64 | u128::from(left)).to_be_bytes());
        let length = left.min(CHUNK_BYTES as u64);
        stream
            .write_all(&chunk[..length as usize])
            .await
            .expect("the body is sent");
        left -= length;
    }
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .await
        .expect("the answer");
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
}
