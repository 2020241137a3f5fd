//! Queries to a real agent: answered in the session, several at once, within their deadlines, and never twice.

use windlass_protocol::{ProbeReply, Query, QueryErrorCode, QueryReply};

use crate::support::*;

fn probe(code: &str) -> Query {
    Query::Probe {
        code: code.to_owned(),
        arguments: Default::default(),
    }
}

fn connect(port: u16) -> Query {
    Query::Connect {
        protocol: "tcp".into(),
        target: "127.0.0.1".into(),
        port: Some(port),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_are_answered_beside_each_other_and_in_every_session() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    gateway.connected().await;
    gateway.ask(1, connect(gateway.port), 10_000);
    gateway.ask(2, probe("available"), 10_000);
    let codes = match gateway.answer_of(2).await {
        Ok(QueryReply::Probe(ProbeReply { data, .. })) => data,
        other => panic!("{other:?}"),
    };
    let codes: Vec<String> = serde_json::from_value(codes).unwrap();
    assert_eq!(codes, windlass_agent::query::probe::CODES);
    match gateway.answer_of(1).await {
        Ok(QueryReply::Connect(connection)) => assert!(connection.reached, "{connection:?}"),
        other => panic!("{other:?}"),
    }
    for (id, body, code) in [
        (3, probe("teleport"), QueryErrorCode::Unsupported),
        (4, Query::Unknown, QueryErrorCode::Unsupported),
    ] {
        gateway.ask(id, body, 10_000);
        assert_eq!(gateway.answer_of(id).await.unwrap_err().code, code);
    }
    // What a later version may ask.
    let later = "{\"kind\":\"query\",\"id\":5,\"timeout_ms\":1000,\"body\":{\"query\":\"defragment\",\"depth\":[1]}}";
    gateway.change(|state| state.raw.push(later.into()));
    let refused = gateway.answer_of(5).await.unwrap_err();
    assert_eq!(refused.code, QueryErrorCode::Unsupported);
    assert!(refused.message.contains("upgrade"), "{refused}");
    // In the next session numbers begin anew.
    gateway.kick();
    gateway.connected().await;
    gateway.change(|state| state.answers.clear());
    gateway.ask(1, probe("load"), 10_000);
    assert!(gateway.answer_of(1).await.is_ok());
}

/// Every probe answers facts, or a reason that says what is missing here; never nothing, never a time-out.
#[tokio::test(flavor = "multi_thread")]
async fn every_probe_answers_facts_or_says_why_not() {
    let gateway = Gateway::start().await;
    let mut agent = TestAgent::register(&gateway).await;
    agent.start();
    gateway.connected().await;
    for (id, code) in (100..).zip(windlass_agent::query::probe::CODES) {
        // All packages of a machine take longer than a test may.
        let arguments = match code {
            "package-verification" => [("package".to_owned(), "base-files".to_owned())].into(),
            _ => Default::default(),
        };
        let body = Query::Probe {
            code: code.to_owned(),
            arguments,
        };
        gateway.ask(id, body, 20_000);
        let answer = match gateway.answer_of(id).await {
            Ok(QueryReply::Probe(reply)) => Ok(reply.data),
            Ok(other) => panic!("{other:?}"),
            Err(reason) => Err(reason),
        };
        let sane = |facts: &serde_json::Value| match code {
            "system" => facts["cpus"].as_u64() > Some(0) && facts["memory_kib"].as_u64() > Some(0),
            "memory" => facts["available_kib"].as_u64() <= facts["total_kib"].as_u64(),
            "load" => facts["load_1m"].as_f64() >= Some(0.0),
            "file-handles" => facts["allocated"].as_u64() > Some(0),
            "clock" => facts["unix_ms"].as_i64() > Some(1_600_000_000_000),
            "disk" | "inodes" => facts.as_array().is_some_and(|disks| !disks.is_empty()),
            "dns" => facts["servers"]
                .as_array()
                .is_some_and(|all| !all.is_empty()),
            "kernel-log" => facts["records"].is_u64(),
            "boot-log" => facts["lines"].is_u64(),
            "processes" => facts["total"].as_u64() > Some(1),
            "failed-units" => facts["units"].is_array(),
            "agent" => facts["resident_kib"].as_u64() > Some(0) && facts["data_full"] == false,
            "interfaces" => facts
                .as_array()
                .is_some_and(|all| all.iter().any(|one| one["name"] == "lo")),
            "addresses" => facts["addresses"].is_array(),
            "routes" => facts["routes"].is_array(),
            "firewall" => facts["rules"].is_u64(),
            "listeners" => facts
                .as_array()
                .is_some_and(|all| all.iter().any(|one| one["port"] == gateway.port)),
            "sockets" => facts["tcp"]["established"].as_u64() > Some(0),
            "ssh" => facts["configured_ports"].is_array(),
            "package-verification" => facts["changed"].is_array(),
            other => panic!("the probe `{other}` has no check here"),
        };
        match answer {
            Ok(facts) => assert!(sane(&facts), "{code}: {facts}"),
            Err(reason) => {
                // What a machine may lack, or keep from this user.
                let may_lack = [
                    "kernel-log",
                    "boot-log",
                    "failed-units",
                    "firewall",
                    "ssh",
                    "package-verification",
                ];
                assert!(may_lack.contains(&code), "{code}: {reason:?}");
                assert!(
                    matches!(
                        reason.code,
                        QueryErrorCode::Unsupported
                            | QueryErrorCode::NotFound
                            | QueryErrorCode::Denied
                    ),
                    "{code}: {reason:?}"
                );
                assert!(reason.message.len() > 20, "{code}: {reason:?}");
            }
        }
    }
}
