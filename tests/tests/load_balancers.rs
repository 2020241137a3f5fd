//! Load balancers: real HAProxy, real agents, the sample application behind it, and clients that never retry.

#[path = "load_balancers/agents.rs"]
mod agents;
#[path = "load_balancers/answers.rs"]
mod answers;
#[path = "load_balancers/bandwidth.rs"]
mod bandwidth;
#[path = "load_balancers/drift.rs"]
mod drift;
#[path = "load_balancers/taken_out.rs"]
mod taken_out;

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use windlass_tests::{
    balanced::{Balanced, free_front_port, http_settings},
    host::{Setup, TestHost, eventually, items, text},
    load::{Connections, Load, LoadSpec},
    scene::refusal,
};

fn three_agents() -> Setup {
    Setup {
        agents: 3,
        ..Setup::default()
    }
}

/// Both kinds of clients at once, 300 requests per second each.
fn both_loads(front: SocketAddr) -> [Load; 2] {
    [Connections::KeptAlive, Connections::OnePerRequest].map(|connections| {
        Load::start(LoadSpec {
            requests_per_s: 300,
            ..LoadSpec::to(front, connections)
        })
    })
}

async fn stop_without_a_failure(loads: [Load; 2], what: &str) {
    for load in loads {
        let report = load.stop().await;
        assert_eq!(report.counts.failed, 0, "{what}: {report:?}");
        assert!(report.counts.requests > 0, "{what}: {report:?}");
    }
}

/// Measured shares lie within three percentage points of the weights.
fn check_shares(balanced: &Balanced, weights: &[u32], shares: &BTreeMap<String, f64>) {
    let all: u32 = weights.iter().sum();
    for ((name, _), weight) in balanced.servers.iter().zip(weights) {
        let wanted = f64::from(*weight) / f64::from(all);
        let found = shares.get(name).copied().unwrap_or(0.0);
        assert!(
            (wanted - found).abs() <= 0.03,
            "{name} has the weight {weight} of {all} and the share {found}: {shares:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn releases_reloads_and_crashes_lose_no_request() {
    let mut host = TestHost::start(three_agents()).await;
    let mut balanced = Balanced::prepare(&host).await;
    balanced.upload(&host, "2.0.0", &[]).await;
    let ids: Vec<String> = balanced.servers.iter().map(|(_, id)| id.clone()).collect();

    // A rolling release.
    let loads = both_loads(balanced.front);
    balanced.release(&host, "2.0.0", "one-per-group").await;
    stop_without_a_failure(loads, "a rolling release").await;
    assert_eq!(balanced.second_tries(&host).await, 0);
    for back_end in balanced.back_ends(&host, &balanced.pool).await {
        assert_eq!(back_end["weight"], 100, "{back_end}");
        assert_eq!(back_end["shown"]["weight"], 100, "{back_end}");
        assert_eq!(back_end["shown"]["health"], "up", "{back_end}");
    }

    // Weights are set and read back, and traffic follows them.
    let wanted = [100, 60, 40];
    let weights: Vec<(&str, u32)> = ids.iter().map(String::as_str).zip(wanted).collect();
    let loads = both_loads(balanced.front);
    for back_end in balanced.set_weights(&host, &weights).await {
        assert_eq!(
            back_end["shown"]["weight"], back_end["weight"],
            "{back_end}"
        );
    }
    let shares = Load::shares_of_all(&loads, 5000).await;
    check_shares(&balanced, &wanted, &shares);

    // A reload with another listener keeps weights, and every connection.
    balanced.set_weights(&host, &[(&ids[2], 0)]).await;
    let other_port = free_front_port();
    let other = json!({ "name": "other", "settings": http_settings(other_port) });
    let other = host
        .api
        .post(&balanced.path(&host, "/listeners"), &other)
        .await
        .expect("a listener");
    balanced.wait_current(&host).await;
    let after: BTreeMap<String, u64> = balanced
        .back_ends(&host, &balanced.pool)
        .await
        .iter()
        .map(|back_end| {
            let weight = back_end["shown"]["weight"].as_u64().expect("a weight");
            (text(&back_end["server"]), weight)
        })
        .collect();
    assert_eq!(
        ids.iter().map(|id| after[id]).collect::<Vec<_>>(),
        [100, 60, 0]
    );
    let answer = get(SocketAddr::from(([127, 0, 0, 1], other_port)), "/", &[]);
    assert!(
        answer.starts_with("HTTP/1.1 503"),
        "nobody is behind it: {answer}"
    );

    // A configuration that cannot run leaves the one that does.
    let taken_port = free_front_port();
    let taken = std::net::TcpListener::bind(("0.0.0.0", taken_port)).expect("a port");
    let settings = http_settings(taken_port);
    let path = balanced.path(&host, &format!("/listeners/{}", text(&other["id"])));
    host.api
        .put(&path, &json!({ "settings": settings }))
        .await
        .expect("the listener is changed");
    eventually("the state says which port cannot be had", || async {
        let state = balanced
            .state(&host)
            .await
            .map_err(|error| error.to_string())?;
        let error = state["error"].as_str().unwrap_or_default().to_owned();
        if error.contains(&format!("front port {taken_port}")) && state["running"] == true {
            Ok(())
        } else {
            Err(state.to_string())
        }
    })
    .await;
    assert!(get(balanced.front, "/", &[]).starts_with("HTTP/1.1 200"));
    drop(taken);
    host.api
        .put(&path, &json!({ "settings": http_settings(other_port) }))
        .await
        .expect("the listener is changed back");
    balanced.wait_current(&host).await;

    // The agent and the server die; HAProxy goes on, and everything converges when they are back.
    host.kill_agent(0);
    let kept = balanced.set_weights(&host, &[(&ids[2], 70)]).await;
    assert!(
        kept.iter().any(|back_end| back_end["weight"] == 70),
        "the weight is kept: {kept:?}"
    );
    host.kill();
    loads[1].shares_over(300).await;
    host.boot(&[]).await;
    host.start_agent(0, &[]);
    host.wait_online().await;
    eventually("the weight of meanwhile is set", || async {
        let back_ends = balanced.back_ends(&host, &balanced.pool).await;
        let set = back_ends.iter().any(|one| one["shown"]["weight"] == 70);
        if set {
            Ok(())
        } else {
            Err(format!("{back_ends:?}"))
        }
    })
    .await;
    stop_without_a_failure(loads, "reloads and crashes").await;

    // HAProxy itself dies: it comes back, and a drained server stays drained.
    balanced.set_weights(&host, &[(&ids[1], 0)]).await;
    balanced.kill_haproxy(&host);
    eventually("HAProxy answers again", || async {
        match try_get(balanced.front, "/", &[]) {
            Ok(answer) if answer.starts_with("HTTP/1.1 200") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    for _ in 0..10 {
        assert_ne!(who(&get(balanced.front, "/", &[])), balanced.servers[1].0);
    }
}

/// One request on a connection of its own; the whole answer.
fn get(address: SocketAddr, path: &str, headers: &[&str]) -> String {
    try_get(address, path, headers).unwrap_or_else(|error| panic!("{address}{path}: {error}"))
}

fn try_get(address: SocketAddr, path: &str, headers: &[&str]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let headers: String = headers
        .iter()
        .map(|header| format!("{header}\r\n"))
        .collect();
    let host = if headers.contains("Host:") {
        ""
    } else {
        "Host: shop.example\r\n"
    };
    let request = format!("GET {path} HTTP/1.1\r\n{host}{headers}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The server that answered.
fn who(answer: &str) -> String {
    let body = answer.split_once("\r\n\r\n").expect("a body").1;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    body.trim()
        .split(' ')
        .next_back()
        .expect("a server")
        .to_owned()
}

async fn change(host: &TestHost, balanced: &Balanced, settings: &Value) {
    let path = balanced.path(host, &format!("/listeners/{}", balanced.listener));
    host.api
        .put(&path, &json!({ "settings": settings }))
        .await
        .expect("the listener is changed");
    balanced.wait_current(host).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_listener_can_do() {
    let host = TestHost::start(three_agents()).await;
    let mut balanced = Balanced::prepare(&host).await;
    let ids: Vec<String> = balanced.servers.iter().map(|(_, id)| id.clone()).collect();
    let front = balanced.front;
    let mut settings = http_settings(front.port());

    // The client's address is told, unless not wished.
    let answer = get(front, "/headers", &[]).to_lowercase();
    assert!(answer.contains("x-forwarded-for: 127.0.0.1"), "{answer}");
    settings["forwarded_for"] = false.into();
    change(&host, &balanced, &settings).await;
    let answer = get(front, "/headers", &[]).to_lowercase();
    assert!(!answer.contains("x-forwarded-for"), "{answer}");

    // A client stays with its server, until that is drained.
    settings["sticky"] = true.into();
    change(&host, &balanced, &settings).await;
    let first = get(front, "/", &[]);
    let cookie = first
        .lines()
        .find_map(|line| line.strip_prefix("set-cookie: "))
        .and_then(|cookie| cookie.split(';').next())
        .unwrap_or_else(|| panic!("a cookie: {first}"))
        .to_owned();
    let cookie = format!("Cookie: {cookie}");
    let server = who(&first);
    for _ in 0..6 {
        assert_eq!(who(&get(front, "/", &[&cookie])), server);
    }
    let id = &balanced
        .servers
        .iter()
        .find(|(name, _)| *name == server)
        .expect("it")
        .1;
    balanced.set_weights(&host, &[(id, 0)]).await;
    for _ in 0..6 {
        assert_ne!(who(&get(front, "/", &[&cookie])), server);
    }
    balanced.set_weights(&host, &[(id, 100)]).await;
    settings["sticky"] = false.into();

    // Least connections; only listed addresses.
    settings["balance"] = "least_connections".into();
    settings["access"] = json!(["10.0.0.0/8", "127.0.0.1"]);
    change(&host, &balanced, &settings).await;
    who(&get(front, "/", &[]));
    settings["access"] = json!(["10.0.0.0/8"]);
    change(&host, &balanced, &settings).await;
    match try_get(front, "/", &[]) {
        Ok(answer) => assert_eq!(answer, "", "a connection that is rejected has no answer"),
        Err(error) => assert!(
            matches!(
                error.kind(),
                std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe
            ),
            "{error}"
        ),
    }
    settings["access"] = Value::Null;
    change(&host, &balanced, &settings).await;

    // Virtual server groups by host name and path.
    let mut pools = Vec::new();
    let groups = balanced.path(&host, &format!("/listeners/{}/groups", balanced.listener));
    for (name, hosts, paths, server) in [
        ("by-host", json!(["*.admin.example"]), json!([]), &ids[0]),
        ("by-path", json!([]), json!(["/under/"]), &ids[1]),
    ] {
        let group = json!({ "name": name, "hosts": hosts, "paths": paths });
        let listener = host.api.post(&groups, &group).await.expect("a group");
        let group = listener["groups"]
            .as_array()
            .and_then(|groups| groups.last());
        let pool = text(&group.expect("the group")["pool"]);
        put_at(&host, &pool, server, balanced.ports[server]).await;
        pools.push(pool);
    }
    balanced.wait_current(&host).await;
    for _ in 0..4 {
        let answer = get(front, "/", &["Host: a.admin.example:80"]);
        assert_eq!(who(&answer), balanced.servers[0].0);
        assert_eq!(who(&get(front, "/under/x", &[])), balanced.servers[1].0);
    }
    // A server that moves is where it says from then on, whatever was known of it before.
    put_at(&host, &pools[0], &ids[0], balanced.ports[&ids[2]]).await;
    balanced.wait_current(&host).await;
    for _ in 0..4 {
        let answer = get(front, "/", &["Host: a.admin.example:80"]);
        assert_eq!(who(&answer), balanced.servers[2].0);
    }
    put_at(&host, &pools[0], &ids[0], balanced.ports[&ids[0]]).await;
    balanced.wait_current(&host).await;

    // TCP, and HTTPS with a certificate.
    let tcp_port = free_front_port();
    let tcp = json!({ "protocol": "tcp", "front_port": tcp_port, "back_port": 9, "sticky": true });
    let path = balanced.path(&host, "/listeners");
    let tcp = json!({ "name": "tcp", "settings": tcp });
    let tcp = host.api.post(&path, &tcp).await.expect("a TCP listener");
    balanced.attach(&host, &text(&tcp["pool"])).await;
    let (chain, key) = certificate("shop.example");
    let certificate = json!({ "name": "shop", "chain": chain, "private_key": key });
    let certificate = host
        .api
        .post(&host.ws("certificates"), &certificate)
        .await
        .expect("a certificate");
    assert!(
        !certificate.to_string().contains("PRIVATE"),
        "{certificate}"
    );
    let https_port = free_front_port();
    let mut https = http_settings(https_port);
    https["protocol"] = json!({ "https": { "certificate": certificate["id"] } });
    let https = json!({ "name": "https", "settings": https });
    let https = host
        .api
        .post(&path, &https)
        .await
        .expect("an HTTPS listener");
    balanced.attach(&host, &text(&https["pool"])).await;
    balanced.wait_current(&host).await;
    let tcp_front = SocketAddr::from(([127, 0, 0, 1], tcp_port));
    let server = who(&get(tcp_front, "/", &[]));
    for _ in 0..4 {
        assert_eq!(
            who(&get(tcp_front, "/", &[])),
            server,
            "TCP clients stick by address"
        );
    }
    let answer = get_tls(https_port, "/headers", &chain).await.to_lowercase();
    assert!(answer.contains("x-forwarded-proto: https"), "{answer}");

    // Stopped and started.
    let listener = format!("/listeners/{}/actions", balanced.listener);
    let act = |action: &'static str| {
        let path = balanced.path(&host, &listener);
        let api = &host.api;
        async move {
            api.post(&path, &json!({ "action": action }))
                .await
                .expect("the action")
        }
    };
    act("stop").await;
    balanced.wait_current(&host).await;
    assert!(TcpStream::connect(front).is_err(), "it is stopped");
    assert_eq!(who(&get(tcp_front, "/", &[])), server, "others run");
    act("start").await;
    balanced.wait_current(&host).await;
    who(&get(front, "/", &[]));
    refusals(&host, &balanced, &certificate).await;
    drift::back_ends_that_change_are_noticed(&host, &balanced).await;
    answers::answers_are_timed(&host, &mut balanced).await;
    taken_out::a_server_that_is_taken_out_gets_no_traffic(&host, &mut balanced).await;

    // The whole load balancer.
    let actions = balanced.path(&host, "/actions");
    host.api
        .post(&actions, &json!({ "action": "stop" }))
        .await
        .expect("stopped");
    balanced.wait_current(&host).await;
    for address in [front, tcp_front] {
        assert!(TcpStream::connect(address).is_err(), "it is stopped");
    }
    delete_all(&host, &balanced).await;
}

/// Puts a server behind a pool, or moves it there, at a port of this machine.
async fn put_at(host: &TestHost, pool: &str, server: &str, port: u16) {
    let back_end = json!({ "server": server, "address": "127.0.0.1", "port": port });
    let attach = json!({ "servers": [back_end] });
    let path = host.ws(&format!("pools/{pool}/back-ends"));
    host.api.post(&path, &attach).await.expect("a back end");
}

/// Everything that must not get in, with its code; nothing of it leaves a trace.
async fn refusals(host: &TestHost, balanced: &Balanced, certificate: &Value) {
    let api = &host.api;
    let listeners = balanced.path(host, "/listeners");
    let before = api.get(&listeners).await.expect("listeners");
    let free = free_front_port();
    let with = |field: &str, value: Value| {
        let mut settings = http_settings(free);
        settings[field] = value;
        json!({ "name": "bad", "settings": settings })
    };
    let health = |path: &str| with("health", json!({ "probe": { "http": { "path": path } } }));
    let many: Vec<String> = (0..301)
        .map(|n| format!("10.0.{}.{}", n / 250, n % 250))
        .collect();
    for (body, code) in [
        (with("front_port", json!(81)), "invalid_value"),
        (
            with("front_port", json!(balanced.front.port())),
            "front_port_taken",
        ),
        (with("back_port", json!(0)), "invalid_value"),
        (with("access", json!(["10.0.0.1; x"])), "invalid_value"),
        (with("access", json!(["10.0.0.1/8"])), "invalid_value"),
        (with("access", json!(many)), "out_of_limit"),
        (with("peak_kbit_per_s", json!(1)), "out_of_limit"),
        (with("protocol", json!("ftp")), "invalid_value"),
        (
            with(
                "protocol",
                json!({ "https": { "certificate": "crt_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f" } }),
            ),
            "certificate_unknown",
        ),
        (with("unknown", json!(1)), "unknown_field"),
        (health("/a b"), "invalid_value"),
        (health("/a\nserver x 1.2.3.4:80"), "invalid_value"),
        (health("/a#b"), "invalid_value"),
        (health("/a\"b"), "invalid_value"),
        (health("/a\\b"), "invalid_value"),
        (health("/a;b"), "invalid_value"),
        (with("health", json!({ "interval_ms": 1 })), "out_of_limit"),
        (
            json!({ "name": "shop", "settings": http_settings(free) }),
            "name_taken",
        ),
    ] {
        let (_, found, detail) = refusal(api.post(&listeners, &body).await);
        assert_eq!(found, code, "{body}: {detail}");
    }
    assert_eq!(api.get(&listeners).await.expect("listeners"), before);
    let groups = balanced.path(host, &format!("/listeners/{}/groups", balanced.listener));
    for (hosts, paths) in [
        (json!([]), json!([])),
        (json!(["A.example"]), json!([])),
        (json!(["a.example }"]), json!([])),
        (json!([]), json!(["/a b"])),
        (json!([]), json!(["-f /etc/passwd"])),
    ] {
        let group = json!({ "name": "bad", "hosts": hosts, "paths": paths });
        let (_, code, detail) = refusal(api.post(&groups, &group).await);
        assert_eq!(code, "invalid_value", "{group}: {detail}");
    }
    let pool = host.ws(&format!("pools/{}", balanced.pool));
    let back_ends = format!("{pool}/back-ends");
    let stranger = "srv_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f";
    let id = &balanced.servers[0].1;
    for (weights, code) in [
        (
            json!([{ "server": stranger, "weight": 1 }]),
            "back_end_unknown",
        ),
        (json!([{ "server": id, "weight": 101 }]), "out_of_limit"),
        (
            json!([{ "server": id, "weight": 1 }, { "server": id, "weight": 2 }]),
            "server_twice",
        ),
        (json!([]), "out_of_limit"),
    ] {
        let (_, found, detail) = refusal(api.put(&back_ends, &json!({ "weights": weights })).await);
        assert_eq!(found, code, "{weights}: {detail}");
    }
    for address in ["169.254.169.254", "0.0.0.0", "ff02::1"] {
        let attach = json!({ "servers": [{ "server": id, "address": address }] });
        let (_, code, detail) = refusal(api.post(&back_ends, &attach).await);
        assert_eq!(code, "invalid_value", "{detail}");
    }
    let simulated = json!({ "name": "simulated" });
    let simulated = api
        .post(&host.ws("pools"), &simulated)
        .await
        .expect("a pool");
    let path = host.ws(&format!("pools/{}/back-ends", text(&simulated["id"])));
    assert_eq!(refusal(api.get(&path).await).1, "pool_has_no_back_ends");
    let fault = json!({ "refuse_set": true });
    assert_eq!(
        refusal(api.put(&format!("{pool}/fault"), &fault).await).1,
        "pool_not_simulated"
    );
    let kind = json!({ "load_balancer": { "load_balancer": balanced.balancer, "listener": balanced.listener } });
    let made = json!({ "name": "made-up", "kind": kind });
    assert_eq!(
        refusal(api.post(&host.ws("pools"), &made).await).1,
        "pool_kind_invalid"
    );
    for (path, confirm, code) in [
        (balanced.path(host, ""), "front", "in_use"),
        (
            balanced.path(host, &format!("/listeners/{}", balanced.listener)),
            "shop",
            "in_use",
        ),
        (pool, "shop", "pool_of_listener"),
        (host.ws(&format!("servers/{id}")), "agent-1", "in_use"),
        (
            host.ws(&format!("certificates/{}", text(&certificate["id"]))),
            "shop",
            "in_use",
        ),
    ] {
        let answer = delete(host, &format!("{path}?confirm={confirm}")).await;
        assert_eq!(answer.json()["code"], code, "{path}: {}", answer.text());
    }
}

async fn delete(host: &TestHost, path: &str) -> windlass::api::client::Answer {
    let method = hyper::Method::DELETE;
    let answer = host
        .api
        .request(method, path, Default::default(), &[])
        .await;
    answer.expect("an answer")
}

/// Deletes the load balancer with all that it has; HAProxy is gone afterwards, and its directory with it.
async fn delete_all(host: &TestHost, balanced: &Balanced) {
    let instance = host.ws(&format!("service-instances/{}", balanced.instance));
    let no_pools = json!({ "pools": [] });
    host.api
        .put(&instance, &no_pools)
        .await
        .expect("the instance");
    let listeners = balanced.path(host, "/listeners");
    for listener in items(&host.api.get(&listeners).await.expect("listeners")) {
        let (id, name) = (text(&listener["id"]), text(&listener["name"]));
        let answer = delete(host, &format!("{listeners}/{id}?confirm={name}")).await;
        assert_eq!(answer.status, 204, "{}", answer.text());
    }
    let answer = delete(host, &format!("{}?confirm=front", balanced.path(host, ""))).await;
    assert_eq!(answer.status, 204, "{}", answer.text());
    let directory = host.agents[0]
        .data
        .join("balancers")
        .join(&balanced.balancer);
    eventually("the load balancer's directory is gone", || async {
        if directory.exists() {
            Err(directory.display().to_string())
        } else {
            Ok(())
        }
    })
    .await;
}

/// A certificate that signed itself, and its key.
fn certificate(name: &str) -> (String, String) {
    let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).expect("a certificate");
    let clean = |pem: String| pem.replace("\r\n", "\n");
    (
        clean(made.cert.pem()),
        clean(made.signing_key.serialize_pem()),
    )
}

async fn get_tls(port: u16, path: &str, chain: &str) -> String {
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let trusted = CertificateDer::from_pem_slice(chain.as_bytes()).expect("the certificate");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted).expect("the certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("TLS")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", port))
        .await
        .expect("a connection");
    let name = "shop.example".try_into().expect("a name");
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut stream = connector
        .connect(name, stream)
        .await
        .expect("TLS with the certificate");
    let request = format!("GET {path} HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n");
    stream
        .write_all(request.as_bytes())
        .await
        .expect("the request");
    let mut answer = Vec::new();
    // The end may come without a goodbye of TLS.
    drop(stream.read_to_end(&mut answer).await);
    String::from_utf8_lossy(&answer).into_owned()
}
