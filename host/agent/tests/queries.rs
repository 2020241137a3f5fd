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
