//! Diagnoses on a real server with real agents: planted faults are found, what cannot be seen is said, nothing is left running.

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};
use windlass::api::client::ClientError;
use windlass_tests::host::{Setup, TestHost, free_port, items, text};

/// A child that has ended and that nobody waits for, until this is dropped.
struct Zombie(Child);

impl Zombie {
    fn plant() -> Self {
        let child = Command::new("true").stdin(Stdio::null()).spawn();
        Self(child.expect("a child"))
    }
}

impl Drop for Zombie {
    fn drop(&mut self) {
        drop(self.0.wait());
    }
}

/// A small file system that is full; `None` where it may not be mounted.
struct FullDisk(PathBuf);

impl FullDisk {
    fn plant(at: PathBuf) -> Option<Self> {
        fs::create_dir_all(&at).expect("a mount point");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
            .arg(&at)
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !mounted {
            eprintln!("skipped: no file system may be mounted here");
            return None;
        }
        let disk = Self(at);
        // Ends with an error when nothing more fits.
        drop(fs::write(disk.0.join("filling"), vec![1; 1024 * 1024]));
        Some(disk)
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

async fn diagnose(host: &TestHost, body: &Value) -> Result<Value, ClientError> {
    let path = host.ws("diagnoses?wait_s=60");
    let made = host.api.post(&path, body).await?;
    let id = text(&made["id"]);
    host.api.get(&host.ws(&format!("diagnoses/{id}"))).await
}

fn finding<'a>(diagnosis: &'a Value, code: &str) -> &'a Value {
    diagnosis["findings"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|finding| finding["code"] == code)
        .unwrap_or_else(|| panic!("no item {code}: {diagnosis}"))
}

fn of_server(id: &str, parameters: Value) -> Value {
    json!({
        "plugin": "server-health",
        "subject": { "kind": "server", "id": id },
        "parameters": parameters,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_diagnosis_finds_what_is_wrong_and_ends_whatever_happens() {
    let mut host = TestHost::start(Setup::default()).await;
    let servers = host.servers().await;
    let (healthy, other) = (servers[0].1.clone(), servers[1].1.clone());

    // --- planted faults are found, and every look is kept
    let zombie = Zombie::plant();
    let disk = FullDisk::plant(host.path().join("full"));
    let open = TcpListener::bind("127.0.0.1:0").expect("a port");
    let open_port = open.local_addr().expect("its address").port();
    let closed_port = free_port();
    let parameters = json!({ "expected_ports": [open_port, closed_port] });
    let found = diagnose(&host, &of_server(&healthy, parameters))
        .await
        .expect("a diagnosis");
    assert_eq!(found["state"], "succeeded", "{found}");
    assert_eq!(found["verdict"], "failed", "{found}");
    let ports = finding(&found, "ports");
    assert_eq!(
        (&ports["state"], &ports["severity"]),
        (&json!("failed"), &json!("critical"))
    );
    let seen = text(&ports["seen"]);
    assert!(seen.contains(&closed_port.to_string()), "{seen}");
    assert!(!seen.contains(&format!("{open_port} (")), "{seen}");
    let zombies = finding(&found, "zombies");
    assert!(
        zombies["state"] == "warning" || zombies["state"] == "failed",
        "{zombies}"
    );
    assert_eq!(finding(&found, "agent")["state"], "ok", "{found}");
    let clock = finding(&found, "clock");
    assert!(
        clock["state"] == "ok" || clock["state"] == "warning",
        "{clock}"
    );
    for code in ["disk", "inodes", "memory", "load", "file-handles"] {
        assert_ne!(finding(&found, code)["state"], "skipped", "{found}");
    }
    if let Some(disk) = &disk {
        let disks = finding(&found, "disk");
        assert_eq!(disks["state"], "failed", "{disks}");
        let seen = text(&disks["seen"]);
        assert!(seen.contains("full"), "{seen} has {}", disk.0.display());
    }
    drop((zombie, disk));
    let id = text(&found["id"]);
    let looks = host
        .api
        .get(&host.ws(&format!("diagnoses/{id}/looks")))
        .await
        .expect("looks");
    let looks = items(&looks);
    let probe = |code: &str| {
        looks
            .iter()
            .find(|look| look["function"] == "probes.run" && look["arguments"]["probe"] == code)
            .unwrap_or_else(|| panic!("no look at {code}"))
    };
    assert!(probe("memory")["answer"]["ok"]["data"]["total_kib"].is_u64());
    assert!(probe("clock")["answer"]["ok"]["data"]["drift_ms"].is_i64());
    assert_eq!(
        looks
            .iter()
            .filter(|look| look["function"] == "probes.connect")
            .count(),
        2
    );

    // --- only the wanted items
    let mut body = of_server(&healthy, json!({}));
    body["items"] = json!(["load", "agent"]);
    let some = diagnose(&host, &body).await.expect("a diagnosis");
    assert_eq!(some["findings"].as_array().map(Vec::len), Some(2), "{some}");
    assert_eq!(some["verdict"], "ok", "{some}");

    // --- bad requests leave nothing behind
    let wrong = |change: &dyn Fn(&mut Value)| {
        let mut body = of_server(&healthy, json!({}));
        change(&mut body);
        body
    };
    for (body, code, field) in [
        (
            wrong(&|body| body["plugin"] = json!("no-such-plugin")),
            "plugin_not_available",
            "plugin",
        ),
        (
            wrong(&|body| body["plugin"] = json!("binary")),
            "plugin_not_available",
            "plugin",
        ),
        (
            wrong(&|body| body["plugin"] = json!("server-health@9.9.9")),
            "plugin_not_available",
            "plugin",
        ),
        (
            wrong(&|body| body["parameters"] = json!({ "disk_failed_percent": 101 })),
            "parameters_invalid",
            "/parameters/disk_failed_percent",
        ),
        (
            wrong(&|body| body["items"] = json!(["disk", "colour"])),
            "items_unknown",
            "/items/1",
        ),
        (
            wrong(&|body| body["subject"]["id"] = json!("srv_00000000000000000000000000000000")),
            "subject_unknown",
            "/subject/id",
        ),
        (
            wrong(&|body| body["subject"]["kind"] = json!("planet")),
            "subject_invalid",
            "/subject/kind",
        ),
        (
            wrong(&|body| body["parameters"] = json!({ "dns_name": "x".repeat(12_000) })),
            "out_of_limit",
            "parameters",
        ),
    ] {
        let refused = host.api.post(&host.ws("diagnoses"), &body).await;
        let error = refused.expect_err("refused").to_string();
        // The schema may be checked before the size.
        let expected = error.contains(code)
            || (code == "out_of_limit" && error.contains("parameters_invalid"));
        assert!(expected, "{code} {field}: {error}");
    }
    let listed = host.api.get(&host.ws("diagnoses")).await.expect("a list");
    assert_eq!(items(&listed).len(), 2, "{listed}");
    assert_eq!(items(&listed)[0]["id"], some["id"], "newest first");

    // --- a server whose agent is away: nothing is well, and nothing is guessed
    host.kill_agent(1);
    let away = diagnose(&host, &of_server(&other, json!({})))
        .await
        .expect("a diagnosis");
    assert_eq!(
        (&away["state"], &away["verdict"]),
        (&json!("succeeded"), &json!("unknown"))
    );
    let disk = finding(&away, "disk");
    assert_eq!(disk["state"], "skipped", "{disk}");
    assert!(text(&disk["seen"]).contains("not connected"), "{disk}");

    // --- an agent that hangs: at most five run at once, and the server's death ends them
    host.signal_agent(0, "STOP");
    let mut running = Vec::new();
    for _ in 0..5 {
        let made = host
            .api
            .post(&host.ws("diagnoses"), &of_server(&healthy, json!({})))
            .await
            .expect("a diagnosis");
        assert_eq!(made["state"], "running", "{made}");
        running.push(text(&made["id"]));
    }
    let sixth = host
        .api
        .post(&host.ws("diagnoses"), &of_server(&healthy, json!({})))
        .await
        .expect_err("refused")
        .to_string();
    assert!(sixth.contains("too_many_running"), "{sixth}");
    host.kill();
    host.boot(&[]).await;
    for id in running {
        let ended = host
            .api
            .get(&host.ws(&format!("diagnoses/{id}?wait_s=60")))
            .await
            .expect("the diagnosis");
        assert_eq!(ended["state"], "failed", "{ended}");
        assert_eq!(ended["failure"]["code"], "interrupted", "{ended}");
        assert!(ended["finished_at"].is_string(), "{ended}");
    }
    // The reports of before are still there.
    let kept = host
        .api
        .get(&host.ws(&format!("diagnoses/{id}")))
        .await
        .expect("the first one");
    assert_eq!(kept["findings"], found["findings"]);
    host.signal_agent(0, "CONT");
    host.start_agent(1, &[]);
    host.wait_online().await;
    let again = diagnose(&host, &body_of(&healthy))
        .await
        .expect("a diagnosis");
    assert_eq!(again["state"], "succeeded", "{again}");
}

fn body_of(server: &str) -> Value {
    let mut body = of_server(server, json!({}));
    body["items"] = json!(["agent"]);
    body
}
