//! The gateway with the real protocol over real TLS sockets; the agent is a small one that does one step at a time.

#[path = "gateway/client.rs"]
mod client;
#[path = "gateway/queries.rs"]
mod queries;
#[path = "gateway/world.rs"]
mod world;

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use client::{Agent, Who, dial, state, tls};
use tokio::time::timeout;
use windlass::gateway::GatewaySettings;
use windlass_domain::{
    Digest,
    inbox::InboxEntry,
    task::{Action, Outcome, PackageFormat, PackageRef},
    value::Value,
};
use windlass_protocol::{
    Epoch, Fingerprint, GoodbyeReason, HeldState, HeldTask, Identity, RegisterRequest, SecretText,
    TaskPush, ToAgent, ToServer,
};
use windlass_store::{PAGE_MAX_ENTRIES, Prefix, Txn};
use world::{World, journal, result, task, until};

async fn goodbye(agent: &mut Agent) -> GoodbyeReason {
    match agent.next().await {
        Some(ToAgent::Goodbye(goodbye)) => {
            assert!(!goodbye.message.is_empty());
            goodbye.reason
        }
        other => panic!("no goodbye: {other:?}"),
    }
}

async fn pushed(agent: &mut Agent) -> TaskPush {
    match agent.next().await {
        Some(ToAgent::Task(push)) => *push,
        other => panic!("no task: {other:?}"),
    }
}

async fn acknowledged(agent: &mut Agent) -> windlass_domain::task::TaskId {
    match agent.next().await {
        Some(ToAgent::Ack { task_id }) => task_id,
        other => panic!("no ack: {other:?}"),
    }
}

fn other_epoch() -> Epoch {
    Epoch::from_bytes([9; 16])
}

#[tokio::test]
async fn a_hello_that_is_not_right_is_refused() {
    let world = World::start().await;
    let who = world.server();
    let unknown = Who {
        server: "srv_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f".parse().unwrap(),
        ..who.clone()
    };
    let wrong_key = Who {
        identity: Identity::from_seed([1; 32]),
        ..who.clone()
    };
    // What a man in the middle with a certificate of his own would relay.
    let relayed = Who {
        fingerprint: Fingerprint::of_key(b"another"),
        ..who.clone()
    };
    for signer in [unknown, wrong_key, relayed] {
        let mut agent = Agent::dial(world.at, &tls(who.fingerprint)).await;
        let hello = agent.hello(&signer).await;
        agent.send(&ToServer::Hello(Box::new(hello))).await;
        assert_eq!(goodbye(&mut agent).await, GoodbyeReason::Refused);
        assert!(agent.next().await.is_none());
    }
    // A hello of another connection, word for word.
    let mut first = Agent::dial(world.at, &tls(who.fingerprint)).await;
    let hello = first.hello(&who).await;
    let mut second = Agent::dial(world.at, &tls(who.fingerprint)).await;
    second.hello(&who).await;
    second.send(&ToServer::Hello(Box::new(hello.clone()))).await;
    assert_eq!(goodbye(&mut second).await, GoodbyeReason::Refused);
    // No common version.
    let mut later = hello.clone();
    later.protocol = 99;
    first.send(&ToServer::Hello(Box::new(later))).await;
    assert_eq!(goodbye(&mut first).await, GoodbyeReason::Refused);
    assert!(world.gateway.sessions().is_empty());
    assert!(world.records.notes.lock().unwrap().is_empty());
    world.stop().await;
}

#[tokio::test]
async fn whoever_pins_another_key_does_not_connect() {
    let world = World::start().await;
    let other = tls(Fingerprint::of_key(b"another"));
    assert!(dial(world.at, &other).await.is_err());
    world.stop().await;
}

#[tokio::test]
async fn what_is_no_message_or_out_of_turn_ends_the_session() {
    let world = World::start().await;
    let who = world.server();
    let pong = "{\"kind\":\"pong\",\"seq\":1}";
    for text in ["[]", "{\"kind\":\"hello\"}", pong] {
        let mut agent = Agent::dial(world.at, &tls(who.fingerprint)).await;
        agent.hello(&who).await;
        agent.send_text(text).await;
        assert_eq!(goodbye(&mut agent).await, GoodbyeReason::Other, "{text}");
    }
    let mut agent = Agent::connect(world.at, &who).await;
    agent.send_text("{\"kind\":\"of_a_later_version\"}").await;
    let answer = agent.next().await;
    assert!(
        matches!(answer, Some(ToAgent::Unsupported { of_kind }) if of_kind == "of_a_later_version")
    );
    agent.send_text("{\"kind\":\"result\"}").await;
    assert_eq!(goodbye(&mut agent).await, GoodbyeReason::Other);
    world.stop().await;
}

#[tokio::test]
async fn a_slow_hello_is_not_waited_for() {
    let settings = GatewaySettings {
        handshake_timeout: Duration::from_millis(50),
        ..GatewaySettings::default()
    };
    let world = World::with(settings).await;
    let who = world.server();
    let mut agent = Agent::dial(world.at, &tls(who.fingerprint)).await;
    agent.hello(&who).await;
    assert_eq!(goodbye(&mut agent).await, GoodbyeReason::Other);
    world.stop().await;
}

#[tokio::test]
async fn the_welcome_proves_the_platform() {
    let world = World::start().await;
    let who = world.server();
    let mut agent = Agent::dial(world.at, &tls(who.fingerprint)).await;
    let Some(ToAgent::Challenge { nonce, .. }) = agent.next().await else {
        panic!("no challenge")
    };
    let agent_nonce = windlass_protocol::Nonce::from_bytes([5; 32]);
    let transcript = Agent::transcript(&who, nonce, agent_nonce);
    let hello = windlass_protocol::Hello {
        protocol: who.protocol,
        server_id: who.server,
        nonce: agent_nonce,
        epoch: who.epoch,
        signature: who.identity.sign_hello(&transcript, who.epoch),
        state: state(),
        held: vec![],
        held_total: 0,
    };
    agent.send(&ToServer::Hello(Box::new(hello))).await;
    let Some(ToAgent::Welcome(welcome)) = agent.next().await else {
        panic!("no welcome")
    };
    let proof = transcript.verify_welcome(who.platform_key, welcome.session, &welcome.signature);
    assert_eq!(proof, Ok(()));
    let info = world.gateway.session(who.server).unwrap();
    assert_eq!(
        (info.epoch, &*info.agent_version),
        (journal(who.epoch), "0.1.0")
    );
    world.stop().await;
}

#[tokio::test]
async fn a_second_session_evicts_the_first_and_is_recorded() {
    let world = World::start().await;
    let who = world.server();
    let mut first = Agent::connect(world.at, &who).await;
    let copy = Who {
        epoch: other_epoch(),
        ..who.clone()
    };
    let second = Agent::connect(world.at, &copy).await;
    assert_eq!(goodbye(&mut first).await, GoodbyeReason::Evicted);
    assert_eq!(
        world.gateway.current_epoch(who.server),
        Some(journal(other_epoch()))
    );
    let prefix = Prefix::from_segments(["default", "event"]).unwrap();
    let events = world
        .store
        .scan(&prefix, None, PAGE_MAX_ENTRIES)
        .await
        .unwrap();
    assert_eq!(events.entries.len(), 1);
    let event: serde_json::Value = serde_json::from_slice(&events.entries[0].value).unwrap();
    assert_eq!(event["kind"], "agent_session_evicted");
    assert_eq!(event["server"], who.server.to_string());
    // The copies go on evicting each other: that is no event each time.
    let mut second = second;
    let third = Agent::connect(world.at, &who).await;
    assert_eq!(goodbye(&mut second).await, GoodbyeReason::Evicted);
    let events = world.store.scan(&prefix, None, PAGE_MAX_ENTRIES).await;
    assert_eq!(events.unwrap().entries.len(), 1);
    // The first one's end is not the server's end.
    drop(first);
    drop(second);
    drop(third);
    let notes = || world.records.notes.lock().unwrap().clone();
    until("the end of the last", || (notes().len() >= 4, notes())).await;
    assert_eq!(
        notes(),
        ["connected", "connected", "connected", "disconnected"]
    );
    assert!(!world.gateway.is_online(who.server));
    world.stop().await;
}

#[tokio::test]
async fn a_task_is_stamped_pushed_pushed_again_reported_and_acknowledged() {
    let world = World::start().await;
    let who = world.server();
    let task = task();
    // Dispatched while nobody is connected: no epoch.
    world.dispatch(who.server, task.clone(), None).await;
    let mut agent = Agent::connect(world.at, &who).await;
    let push = pushed(&mut agent).await;
    assert_eq!(push.task, task);
    let slot = world.slot(who.server, task.id).await.unwrap();
    assert_eq!(slot.epoch, Some(journal(who.epoch)));
    drop(agent);

    let mut agent = Agent::connect(world.at, &who).await;
    assert_eq!(pushed(&mut agent).await.task, task);
    let done = ToServer::Result {
        task_id: task.id,
        result: result(Outcome::Succeeded),
    };
    agent.send(&done).await;
    assert_eq!(acknowledged(&mut agent).await, task.id);
    assert_eq!(
        world.results(1).await,
        [(task.id, result(Outcome::Succeeded))]
    );
    assert_eq!(world.slot(who.server, task.id).await, None);
    // Sent again, as after an acknowledgement that was lost: nobody waits for it, and it is acknowledged.
    agent.send(&done).await;
    assert_eq!(acknowledged(&mut agent).await, task.id);
    assert_eq!(world.results(1).await.len(), 1);
    world.stop().await;
}

#[tokio::test]
async fn a_slot_put_during_a_session_is_pushed_once() {
    let world = World::start().await;
    let who = world.server();
    let mut agent = Agent::connect(world.at, &who).await;
    let mut expected = BTreeSet::new();
    for _ in 0..200 {
        let task = task();
        expected.insert(task.id);
        let epoch = world.gateway.current_epoch(who.server);
        assert_eq!(epoch, Some(journal(who.epoch)));
        world.dispatch(who.server, task, epoch).await;
        world.gateway.nudge(who.server);
    }
    let mut found = BTreeSet::new();
    for _ in 0..200 {
        assert!(found.insert(pushed(&mut agent).await.task.id));
    }
    assert_eq!(found, expected);
    // Nothing else is on its way: the next message is the answer to this one.
    world.gateway.nudge(who.server);
    agent.send_text("{\"kind\":\"of_a_later_version\"}").await;
    assert!(matches!(
        agent.next().await,
        Some(ToAgent::Unsupported { .. })
    ));
    world.stop().await;
}

#[tokio::test]
async fn a_slot_of_another_journal_is_unknown_and_never_pushed() {
    let world = World::start().await;
    let who = world.server();
    let (lost, revoked, fresh) = (task(), task(), task());
    let epoch = Some(journal(other_epoch()));
    world.dispatch(who.server, lost.clone(), epoch).await;
    world
        .put(who.server, InboxEntry::new(revoked.clone(), epoch).revoke())
        .await;
    world.dispatch(who.server, fresh.clone(), None).await;
    let mut agent = Agent::connect(world.at, &who).await;
    assert_eq!(pushed(&mut agent).await.task.id, fresh.id);
    let results = world.results(2).await;
    for (task, result) in &results {
        assert!([lost.id, revoked.id].contains(task));
        assert_eq!(result.outcome, Outcome::Unknown);
        assert!(
            result.message.contains("journal was lost"),
            "{}",
            result.message
        );
    }
    assert_eq!(world.slot(who.server, lost.id).await, None);
    world.stop().await;
}

#[tokio::test]
async fn a_revoked_slot_is_sent_as_a_revoke_until_its_result_arrives() {
    let world = World::start().await;
    let who = world.server();
    let task = task();
    let epoch = Some(journal(who.epoch));
    world.dispatch(who.server, task.clone(), epoch).await;
    let mut agent = Agent::connect(world.at, &who).await;
    pushed(&mut agent).await;
    let entry = InboxEntry::new(task.clone(), epoch).revoke();
    world.put(who.server, entry).await;
    for _ in 0..2 {
        let revoke = agent.next().await;
        assert!(matches!(revoke, Some(ToAgent::Revoke { task_id }) if task_id == task.id));
        agent = Agent::connect(world.at, &who).await;
    }
    assert!(matches!(agent.next().await, Some(ToAgent::Revoke { .. })));
    let result = result(Outcome::Revoked);
    let task_id = task.id;
    agent
        .send(&ToServer::Result {
            task_id,
            result: result.clone(),
        })
        .await;
    assert_eq!(acknowledged(&mut agent).await, task.id);
    assert_eq!(world.results(1).await, [(task.id, result)]);
    world.stop().await;
}

#[tokio::test]
async fn no_acknowledgement_before_the_report_is_durable() {
    let world = World::start().await;
    let who = world.server();
    let task = task();
    world.dispatch(who.server, task.clone(), None).await;
    let mut agent = Agent::connect(world.at, &who).await;
    pushed(&mut agent).await;
    world.reports.failing.store(2, Ordering::SeqCst);
    let result = result(Outcome::Failed);
    agent
        .send(&ToServer::Result {
            task_id: task.id,
            result,
        })
        .await;
    assert_eq!(acknowledged(&mut agent).await, task.id);
    assert_eq!(world.reports.calls.load(Ordering::SeqCst), 3);
    assert_eq!(world.results(1).await.len(), 1);
    world.stop().await;
}

/// The agent's steps of one task; the connection is cut after each of them, and at last it goes through.
#[tokio::test]
async fn a_cut_at_each_step_loses_nothing_and_reports_once() {
    let world = World::start().await;
    let who = world.server();
    for cut_after in 0..7 {
        let task = task();
        world.dispatch(who.server, task.clone(), None).await;
        let before = world.reports.committed.borrow().len();
        let done = ToServer::Result {
            task_id: task.id,
            result: result(Outcome::Succeeded),
        };
        'cut: {
            let mut agent = Agent::dial(world.at, &tls(who.fingerprint)).await;
            if cut_after == 0 {
                break 'cut;
            }
            let hello = agent.hello(&who).await;
            if cut_after == 1 {
                break 'cut;
            }
            agent.send(&ToServer::Hello(Box::new(hello.clone()))).await;
            if cut_after == 2 {
                break 'cut;
            }
            agent.welcome(&who, &hello).await;
            if cut_after == 3 {
                break 'cut;
            }
            assert_eq!(pushed(&mut agent).await.task.id, task.id);
            if cut_after == 4 {
                break 'cut;
            }
            agent.send(&ToServer::Accepted { task_id: task.id }).await;
            if cut_after == 5 {
                break 'cut;
            }
            agent.send(&done).await;
        }
        let mut agent = Agent::connect(world.at, &who).await;
        agent.send(&done).await;
        // Pushed again where the first result had not arrived; acknowledged in either case.
        let acknowledged = loop {
            match agent.next().await {
                Some(ToAgent::Task(push)) => assert_eq!(push.task.id, task.id),
                Some(ToAgent::Ack { task_id }) => break task_id,
                other => panic!("cut after {cut_after}: {other:?}"),
            }
        };
        assert_eq!(acknowledged, task.id);
        let all = world.results(before + 1).await;
        assert_eq!(all.len(), before + 1, "cut after {cut_after}");
        assert_eq!(world.slot(who.server, task.id).await, None);
    }
    world.stop().await;
}

#[tokio::test]
async fn secrets_are_resolved_while_pushing_and_nowhere_else() {
    // For the whole process: a subscriber of one thread misses what another thread has touched first.
    let logs = Logs::default();
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(logs.clone())
        .init();
    let world = World::start().await;
    let who = world.server();
    let value = SecretText::new("hunter2".into());
    world
        .vault
        .put("prod", "db", &value, Txn::new())
        .await
        .unwrap();
    let mut good = task();
    good.env
        .insert("PASSWORD".into(), Value::SecretRef("db".into()));
    let mut bad = task();
    bad.env
        .insert("TOKEN".into(), Value::SecretRef("missing".into()));
    let mut started = bad.clone();
    started.id = task().id;

    world.dispatch(who.server, good.clone(), None).await;
    let mut agent = Agent::dial(world.at, &tls(who.fingerprint)).await;
    let mut hello = agent.hello(&who).await;
    hello.held = vec![HeldTask {
        task_id: started.id,
        state: HeldState::Started,
    }];
    hello.held_total = 1;
    agent.send(&ToServer::Hello(Box::new(hello.clone()))).await;
    agent.welcome(&who, &hello).await;
    let push = pushed(&mut agent).await;
    assert_eq!(push.secrets, [("db".to_owned(), value)].into());
    assert_eq!(push.task, good);

    // Never started: the agent says so, and the reason is the secret.
    world.dispatch(who.server, bad.clone(), None).await;
    assert!(matches!(agent.next().await, Some(ToAgent::Revoke { task_id }) if task_id == bad.id));
    let result = result(Outcome::Revoked);
    agent
        .send(&ToServer::Result {
            task_id: bad.id,
            result,
        })
        .await;
    assert_eq!(acknowledged(&mut agent).await, bad.id);
    let (task_id, failed) = world.results(1).await.remove(0);
    assert_eq!((task_id, failed.outcome), (bad.id, Outcome::Failed));
    assert!(failed.message.contains("`missing`") && failed.message.contains("`prod`"));

    // What has started already goes on: a secret that vanished does not end it.
    world.dispatch(who.server, started.clone(), None).await;
    assert_eq!(pushed(&mut agent).await.task.id, started.id);

    // After a restart of the machine: what is installed refers to, and nothing else.
    world
        .records
        .restart_secrets
        .lock()
        .unwrap()
        .insert("none".into());
    let ask = |names: &[&str]| ToServer::SecretsNeeded {
        instance: good.instance.expect("a task of an instance"),
        names: names.iter().map(|name| (*name).to_owned()).collect(),
    };
    agent.send(&ask(&["db"])).await;
    assert!(
        matches!(agent.next().await, Some(ToAgent::Secrets { values, .. }) if values.is_empty())
    );
    world
        .records
        .restart_secrets
        .lock()
        .unwrap()
        .insert("db".into());
    agent.send(&ask(&["db", "none"])).await;
    assert!(
        matches!(agent.next().await, Some(ToAgent::Secrets { values, .. }) if values["db"].reveal() == "hunter2")
    );

    let everything = world
        .store
        .scan(&Prefix::everything(), None, PAGE_MAX_ENTRIES)
        .await
        .unwrap();
    for entry in everything.entries {
        assert!(
            !String::from_utf8_lossy(&entry.value).contains("hunter2"),
            "{}",
            entry.key
        );
    }
    world.stop().await;
    let logs = logs.0.lock().unwrap().clone();
    let logs = String::from_utf8_lossy(&logs);
    assert!(
        logs.contains("an agent's session is open"),
        "the log was not captured"
    );
    assert!(!logs.contains("hunter2"));
}

#[derive(Clone, Default)]
struct Logs(Arc<Mutex<Vec<u8>>>);

impl io::Write for Logs {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .expect("not poisoned")
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> tracing_subscriber::fmt::MakeWriter<'a> for Logs {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn a_grant_opens_one_package_while_its_session_lives() {
    let world = World::start().await;
    let who = world.server();
    let bytes: Vec<u8> = (0..200_000u32)
        .map(|n| b'a' + u8::try_from(n % 26).unwrap())
        .collect();
    let text = String::from_utf8(bytes.clone()).unwrap();
    world.blobs.put_bytes(bytes.clone().into()).await.unwrap();
    world.blobs.put_bytes("other".into()).await.unwrap();
    let digest = Digest::of(&bytes);
    let mut fetch = task();
    fetch.action = Action::Fetch(PackageRef {
        digest,
        size_bytes: bytes.len() as u64,
        format: PackageFormat::TarGz,
        file_name: "a.tgz".into(),
        version: "1".into(),
    });
    world.dispatch(who.server, fetch.clone(), None).await;
    let mut agent = Agent::connect(world.at, &who).await;
    let grant = pushed(&mut agent).await.grant.unwrap();
    assert_eq!(grant.digest, digest);
    let get = |digest: Digest, token: &str, range: &str| {
        format!("GET /agent/v1/blobs/{digest} HTTP/1.1\r\nAuthorization: Bearer {token}{range}")
    };
    let token = grant.token.reveal();
    let whole = world.http(&get(digest, token, ""), "").await;
    assert!(whole.starts_with("HTTP/1.1 200"), "{}", &whole[..200]);
    assert!(whole.ends_with(&text));
    let rest = world
        .http(&get(digest, token, "\r\nRange: bytes=199990-"), "")
        .await;
    assert!(rest.starts_with("HTTP/1.1 206"), "{rest}");
    assert!(
        rest.contains("content-range: bytes 199990-199999/200000"),
        "{rest}"
    );
    assert!(rest.ends_with(&text[199_990..]));
    for (request, status, code) in [
        (
            get(digest, token, "\r\nRange: bytes=200000-"),
            416,
            "range_too_far",
        ),
        (
            get(digest, token, "\r\nRange: bytes=200001-"),
            416,
            "range_too_far",
        ),
        (
            get(Digest::of(b"other"), token, ""),
            403,
            "grant_of_another_digest",
        ),
        (get(digest, "guess", ""), 401, "grant_unknown"),
        (
            format!("GET /agent/v1/blobs/{digest} HTTP/1.1"),
            401,
            "grant_unknown",
        ),
    ] {
        let answer = world.http(&request, "").await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{answer}"
        );
        assert!(answer.contains(code), "{answer}");
    }
    // Another session's grant is another one; the first ends with its session.
    drop(agent);
    let mut agent = Agent::connect(world.at, &who).await;
    let second = pushed(&mut agent).await.grant.unwrap();
    let answer = world.http(&get(digest, token, ""), "").await;
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    let answer = world
        .http(&get(digest, second.token.reveal(), ""), "")
        .await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // And with its slot: the fetch is done.
    let result = result(Outcome::Succeeded);
    agent
        .send(&ToServer::Result {
            task_id: fetch.id,
            result,
        })
        .await;
    acknowledged(&mut agent).await;
    let mut answer = String::new();
    for _ in 0..200 {
        answer = world
            .http(
                &get(digest, second.token.reveal(), "\r\nRange: bytes=199990-"),
                "",
            )
            .await;
        if answer.starts_with("HTTP/1.1 401") {
            break;
        }
    }
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    world.stop().await;
}

#[tokio::test]
async fn registration_takes_a_code_a_proof_and_patience() {
    let world = World::start().await;
    let identity = Identity::from_seed([5; 32]);
    let code = world.code(1);
    let head = "POST /agent/v1/register HTTP/1.1\r\nContent-Type: application/json";
    let request = |code: &windlass_protocol::ActivationCode| RegisterRequest {
        code: SecretText::new(code.print()),
        public_key: identity.public_key(),
        proof: identity.sign_registration(code),
        name: Some("web-7".into()),
        facts: Default::default(),
    };
    let body = |request: &RegisterRequest| serde_json::to_string(request).unwrap();
    let good = request(&code);
    let answer = world.http(head, &body(&good)).await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("web-7"),
        "{answer}"
    );

    let foreign = windlass_protocol::ActivationCode::new([1; 16], Fingerprint::of_key(b"x"));
    let unproved = RegisterRequest {
        proof: Identity::from_seed([6; 32]).sign_registration(&code),
        ..good.clone()
    };
    let malformed = RegisterRequest {
        code: SecretText::new("wl1-x".into()),
        ..good.clone()
    };
    let mut failures = 0;
    for (request, status, code) in [
        (&good, 403, "activation_code_used_up"),
        (
            &request(&foreign),
            403,
            "activation_code_of_another_platform",
        ),
        (&unproved, 403, "registration_proof_wrong"),
        (&malformed, 400, "activation_code_malformed"),
    ] {
        let answer = world.http(head, &body(request)).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{answer}"
        );
        assert!(
            answer.contains(code) && answer.contains("application/problem+json"),
            "{answer}"
        );
        failures += 1;
    }
    let answer = world.http(head, "{").await;
    assert!(
        answer.starts_with("HTTP/1.1 400") && answer.contains("body_malformed"),
        "{answer}"
    );
    let answer = world.http(head, &" ".repeat(65 * 1024)).await;
    assert!(
        answer.starts_with("HTTP/1.1 400") && answer.contains("body_unreadable"),
        "{answer}"
    );
    for _ in failures..10 {
        world.http(head, &body(&malformed)).await;
    }
    // Even with a good code now.
    let answer = world.http(head, &body(&request(&world.code(1)))).await;
    assert!(
        answer.starts_with("HTTP/1.1 429") && answer.contains("retry-after"),
        "{answer}"
    );
    world.stop().await;
}

#[tokio::test]
async fn a_removed_server_is_told_and_cut_off() {
    let world = World::start().await;
    let who = world.server();
    let mut agent = Agent::connect(world.at, &who).await;
    world.records.servers.lock().unwrap().remove(&who.server);
    world.gateway.deregister(who.server);
    assert_eq!(goodbye(&mut agent).await, GoodbyeReason::Deregistered);
    assert!(agent.next().await.is_none());
    world.stop().await;
}

#[tokio::test]
async fn shutdown_says_goodbye() {
    let world = World::start().await;
    let who = world.server();
    let mut agent = Agent::connect(world.at, &who).await;
    let (_, reason) = tokio::join!(world.stop(), goodbye(&mut agent));
    assert_eq!(reason, GoodbyeReason::ShuttingDown);
}

#[tokio::test]
async fn facts_are_noted_when_they_change_only() {
    let world = World::start().await;
    let who = world.server();
    let mut agent = Agent::connect(world.at, &who).await;
    let mut new = state();
    new.disk.full = true;
    agent.send(&ToServer::State(Box::new(new.clone()))).await;
    new.facts.agent_version = "0.2.0".into();
    agent.send(&ToServer::State(Box::new(new))).await;
    agent.send_text("{\"kind\":\"of_a_later_version\"}").await;
    agent.next().await;
    let info = world.gateway.session(who.server).unwrap();
    assert!(info.state.disk.full);
    assert_eq!(info.agent_version, "0.2.0");
    assert_eq!(*world.records.notes.lock().unwrap(), ["connected", "facts"]);
    world.stop().await;
}

#[tokio::test]
async fn a_silent_agent_is_dead_and_a_deaf_one_holds_up_nobody() {
    let settings = GatewaySettings {
        heartbeat_interval: Duration::from_millis(100),
        ..GatewaySettings::default()
    };
    let world = World::with(settings).await;
    let (deaf, lively) = (world.server(), world.server());
    let silent = Agent::connect(world.at, &deaf).await;
    let mut agent = Agent::connect(world.at, &lively).await;
    // More than sockets and queues hold: the deaf agent's session stalls, alone.
    for _ in 0..400 {
        let mut task = task();
        let padding = "x".repeat(20_000);
        task.env.insert("PADDING".into(), Value::Plain(padding));
        world.dispatch(deaf.server, task, None).await;
    }
    let task = task();
    world.dispatch(lively.server, task.clone(), None).await;
    let got = timeout(client::PATIENCE, pushed(&mut agent)).await.unwrap();
    assert_eq!(got.task.id, task.id);
    // The lively one answers pings; the other is given up.
    let answering = tokio::spawn(async move { while agent.next().await.is_some() {} });
    until("the silent one is given up", || {
        let online = world.gateway.is_online(deaf.server);
        (!online, online)
    })
    .await;
    assert!(world.gateway.is_online(lively.server));
    drop(silent);
    world.stop().await;
    answering.await.unwrap();
}
