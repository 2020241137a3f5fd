//! Peak bandwidth, measured in a network namespace of the test's own.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use windlass_tests::{
    balanced::free_front_port,
    host::{Setup, TestHost, eventually, text},
};

const IN_NAMESPACE: &str = "WINDLASS_TEST_IN_NETWORK_NAMESPACE";

/// Runs in a network namespace of its own: the outer run makes it and starts this test in it.
#[test]
fn a_peak_bandwidth_holds() {
    if std::env::var_os(IN_NAMESPACE).is_some() {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(peak_bandwidth());
        return;
    }
    let id = Command::new("id").arg("-u").output().expect("id(1)");
    if id.stdout != b"0\n" {
        eprintln!("skipped: a network namespace needs root");
        return;
    }
    let name = format!("windlass-test-{}", std::process::id());
    let ip = |arguments: &[&str]| {
        let output = Command::new("ip").args(arguments).output().expect("ip(8)");
        assert!(output.status.success(), "ip {arguments:?}: {output:?}");
    };
    ip(&["netns", "add", &name]);
    ip(&["-n", &name, "link", "set", "lo", "up"]);
    let own = std::env::current_exe().expect("the test's program");
    let output = Command::new("ip")
        .args(["netns", "exec", &name])
        .arg(own)
        .args([
            "--exact",
            "bandwidth::a_peak_bandwidth_holds",
            "--nocapture",
        ])
        .env(IN_NAMESPACE, "1")
        .output()
        .expect("the test in the namespace");
    ip(&["netns", "del", &name]);
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

async fn peak_bandwidth() {
    let host = TestHost::start(Setup {
        agents: 1,
        ..Setup::default()
    })
    .await;
    let (_, server) = host.servers().await.remove(0);
    // A server that sends for ever.
    let source = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let source_port = source.local_addr().expect("its address").port();
    std::thread::spawn(move || {
        for stream in source.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut stream, zeros) = (stream, vec![0; 16 * 1024]);
                while stream.write_all(&zeros).is_ok() {}
            });
        }
    });
    let front_port = free_front_port();
    let balancer = json!({ "name": "front", "server": server });
    let balancer = host.api.post(&host.ws("load-balancers"), &balancer).await;
    let balancer = text(&balancer.expect("a load balancer")["id"]);
    let mut settings =
        json!({ "protocol": "tcp", "front_port": front_port, "back_port": source_port });
    let listeners = host.ws(&format!("load-balancers/{balancer}/listeners"));
    let listener = json!({ "name": "zeros", "settings": settings });
    let listener = host
        .api
        .post(&listeners, &listener)
        .await
        .expect("a listener");
    let back_ends = host.ws(&format!("pools/{}/back-ends", text(&listener["pool"])));
    let attach = json!({ "servers": [{ "server": server, "address": "127.0.0.1" }] });
    host.api
        .post(&back_ends, &attach)
        .await
        .expect("a back end");
    let state = host.ws(&format!("load-balancers/{balancer}/state"));
    let current = || async {
        eventually("the load balancer runs what is wanted", || async {
            let state = host
                .api
                .get(&state)
                .await
                .map_err(|error| error.to_string())?;
            if state["current"] == true && state["members"][0]["stats"]["health"] == "up" {
                Ok(())
            } else {
                Err(state.to_string())
            }
        })
        .await;
    };
    current().await;
    let (free, _) = bytes_in(front_port, Duration::from_secs(1));
    assert!(
        free > 20_000_000,
        "without a limit {free} bytes came in a second"
    );

    // 16 Mbit/s: 2,000,000 bytes per second. As much, and 256 KiB, may come at once after a pause.
    settings["peak_kbit_per_s"] = 16_000.into();
    let path = format!("{listeners}/{}", text(&listener["id"]));
    let limited = json!({ "settings": settings });
    host.api
        .put(&path, &limited)
        .await
        .expect("the listener is changed");
    current().await;
    let (held, time) = bytes_in(front_port, Duration::from_secs(3));
    let most = 2_000_000.0 * (1.0 + time.as_secs_f64()) + 262_144.0;
    assert!(
        held >= 500_000 && held as f64 <= most,
        "with a peak of 2,000,000 bytes per second, {held} bytes came in {time:?}: at most {most} may"
    );

    // Whoever loads the machine's own rules drops all others.
    assert!(nft(&["list", "tables"]).contains("windlass_"));
    nft(&["flush", "ruleset"]);
    assert_eq!(nft(&["list", "tables"]), "");
    eventually("the peak is set again", || async {
        let tables = nft(&["list", "tables"]);
        if tables.contains("windlass_") {
            Ok(())
        } else {
            Err(tables)
        }
    })
    .await;

    settings["peak_kbit_per_s"] = Value::Null;
    let free = json!({ "settings": settings });
    host.api
        .put(&path, &free)
        .await
        .expect("the listener is changed");
    current().await;
    assert_eq!(nft(&["list", "tables"]), "", "no table is left");
}

fn nft(arguments: &[&str]) -> String {
    let output = Command::new("/usr/sbin/nft").args(arguments).output();
    let output = output.expect("nft(8)");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Bytes that come from a port in a time, and the time that it really was.
fn bytes_in(port: u16, time: Duration) -> (u64, Duration) {
    let began = Instant::now();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream
        .set_read_timeout(Some(Duration::from_millis(100)))
        .expect("a time-out");
    let (mut bytes, mut buffer) = (0, vec![0; 256 * 1024]);
    while began.elapsed() < time {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => bytes += count as u64,
            // Nothing came just now.
            Err(_) => {}
        }
    }
    (bytes, began.elapsed())
}
