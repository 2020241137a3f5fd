use super::*;
use crate::query::ProbeReply;
use windlass_domain::{
    task::{Action, Outcome, Script},
    value::Value,
};

const TASK: &str = "ord_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f.3.1";

fn push() -> TaskPush {
    TaskPush {
        task: Task {
            id: TASK.parse().unwrap(),
            instance: Some("svc_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f".parse().unwrap()),
            release: None,
            fence: u64::MAX,
            expires_at: Timestamp::from_unix_ms(1_700_000_000_000),
            timeout_ms: 60_000,
            run_as: None,
            env: [("PASSWORD".into(), Value::SecretRef("db".into()))].into(),
            action: Action::Script(Script {
                interpreter: vec!["/bin/sh".into()],
                text: "true".into(),
                working_dir: None,
            }),
        },
        secrets: [("db".into(), SecretText::new("hunter2".into()))].into(),
        grant: None,
    }
}

fn to_agent() -> Vec<ToAgent> {
    let task_id = TASK.parse().unwrap();
    vec![
        ToAgent::Challenge {
            nonce: Nonce::from_bytes([1; 32]),
            protocols: ProtocolRange::OURS,
        },
        ToAgent::Welcome(Welcome {
            session: SessionId::from_bytes([2; 16]),
            signature: Signature::from_bytes([3; 64]),
            heartbeat_interval_ms: 10_000,
        }),
        ToAgent::Task(Box::new(push())),
        ToAgent::Revoke { task_id },
        ToAgent::Ack { task_id },
        ToAgent::Ping { seq: 7 },
        ToAgent::Secrets {
            instance: push().task.instance.unwrap(),
            values: push().secrets,
        },
        ToAgent::Query {
            id: 4,
            body: Query::Connect {
                protocol: "tcp".into(),
                target: "db".into(),
                port: Some(5432),
            },
            timeout_ms: 5,
        },
        ToAgent::Goodbye(Goodbye {
            reason: GoodbyeReason::Evicted,
            message: "m".into(),
        }),
        ToAgent::Unsupported {
            of_kind: "x".into(),
        },
    ]
}

fn to_server() -> Vec<ToServer> {
    let task_id = TASK.parse().unwrap();
    let at = Timestamp::from_unix_ms(5);
    let state = AgentState {
        facts: ServerFacts::default(),
        disk: DiskState {
            free_bytes: 1,
            full: false,
        },
        journal: JournalState::Replaced {
            reason: "r".into(),
            kept_as: "k".into(),
        },
        apps: vec![],
        cgroups: true,
    };
    vec![
        ToServer::Hello(Box::new(Hello {
            protocol: 2,
            server_id: "srv_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f".parse().unwrap(),
            nonce: Nonce::from_bytes([1; 32]),
            epoch: Epoch::from_bytes([1; 16]),
            signature: Signature::from_bytes([3; 64]),
            state: state.clone(),
            held: vec![HeldTask {
                task_id,
                state: HeldState::Started,
            }],
            held_total: 1,
        })),
        ToServer::Accepted { task_id },
        ToServer::Started { task_id, at },
        ToServer::Output(OutputChunk {
            task_id,
            offset: 1,
            text: "x".into(),
            dropped_bytes: 0,
        }),
        ToServer::Result {
            task_id,
            result: TaskResult {
                outcome: Outcome::Succeeded,
                exit_code: Some(0),
                output: "o".into(),
                dropped_bytes: 0,
                message: String::new(),
                fault: None,
                started_at: Some(at),
                finished_at: at,
            },
        },
        ToServer::State(Box::new(state)),
        ToServer::Pong { seq: 1 },
        ToServer::SecretsNeeded {
            instance: push().task.instance.unwrap(),
            names: vec!["db".into()],
        },
        ToServer::QueryAnswer {
            id: 4,
            result: Ok(QueryReply::Probe(ProbeReply {
                data: serde_json::json!({ "load_1m": 0.5 }),
                text: "t".into(),
                dropped_bytes: 1,
            })),
        },
        ToServer::Unsupported {
            of_kind: "x".into(),
        },
    ]
}

/// Each kind goes both ways, in the order of `KINDS`, and unknown fields in it are ignored.
fn check_all<M: Message + PartialEq + std::fmt::Debug>(messages: Vec<M>) {
    let mut kinds = Vec::new();
    for message in messages {
        let text = encode(&message).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        kinds.push(json["kind"].as_str().unwrap().to_owned());
        json["of_a_later_version"] = 1.into();
        assert_eq!(
            decode::<M>(&json.to_string()).unwrap(),
            Decoded::Message(message)
        );
    }
    assert_eq!(kinds, M::KINDS);
}

#[test]
fn every_message_goes_both_ways() {
    check_all(to_agent());
    check_all(to_server());
}

#[test]
fn an_unknown_kind_is_not_fatal_and_a_malformed_one_is() {
    assert_eq!(
        decode::<ToAgent>("{\"kind\":\"teleport\",\"x\":1}").unwrap(),
        Decoded::UnknownKind("teleport".into())
    );
    assert!(
        matches!(decode::<ToAgent>("{\"kind\":\"ping\"}"), Err(DecodeError::Malformed { kind, .. }) if kind == "ping")
    );
    assert!(matches!(
        decode::<ToAgent>("[]"),
        Err(DecodeError::NotAMessage(_))
    ));
    assert!(matches!(
        decode::<ToAgent>("{}"),
        Err(DecodeError::NotAMessage(_))
    ));
    let later = "{\"kind\":\"goodbye\",\"reason\":\"eclipse\",\"message\":\"\"}";
    assert!(matches!(
        decode::<ToAgent>(later).unwrap(),
        Decoded::Message(ToAgent::Goodbye(Goodbye {
            reason: GoodbyeReason::Other,
            ..
        }))
    ));
}

#[test]
fn frames_over_the_limit_are_refused_on_both_sides() {
    let message = |len: usize| ToAgent::Unsupported {
        of_kind: "x".repeat(len),
    };
    let overhead = encode(&message(0)).unwrap().len();
    let text = encode(&message(MAX_FRAME_BYTES - overhead)).unwrap();
    assert!(decode::<ToAgent>(&text).is_ok());
    assert!(matches!(
        encode(&message(MAX_FRAME_BYTES - overhead + 1)),
        Err(EncodeError::TooLarge { bytes }) if bytes == MAX_FRAME_BYTES + 1
    ));
    assert!(matches!(
        decode::<ToAgent>(&format!("{text} ")),
        Err(DecodeError::TooLarge { .. })
    ));
}

#[test]
fn the_highest_common_version_is_taken() {
    let range = |min, max| ProtocolRange { min, max };
    for (ours, theirs, expect) in [
        (range(1, 1), range(1, 1), Some(1)),
        (range(1, 2), range(1, 1), Some(1)),
        (range(1, 2), range(2, 3), Some(2)),
        (range(1, 1), range(2, 3), None),
        (range(2, 3), range(1, 1), None),
    ] {
        assert_eq!(negotiate(ours, theirs).ok(), expect, "{ours:?} {theirs:?}");
    }
}

#[test]
fn a_pushed_secret_is_not_in_debug_output() {
    assert!(!format!("{:?}", push()).contains("hunter2"));
}
