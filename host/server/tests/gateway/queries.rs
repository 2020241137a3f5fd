//! Queries: answered in any order, and every way in which there is no answer.

use std::time::Duration;

use serde_json::json;
use windlass::gateway::{Gateway, QueryFailure};
use windlass_domain::id::ServerId;
use windlass_protocol::{
    ConnectReply, MAX_QUERIES_IN_FLIGHT, ProbeReply, Query, QueryError, QueryErrorCode, QueryReply,
    ToAgent, ToServer,
};

use super::{
    client::{Agent, PATIENCE, Who},
    world::{World, until},
};

fn probe(code: &str) -> Query {
    Query::Probe {
        code: code.to_owned(),
        arguments: Default::default(),
    }
}

fn saw(text: &str) -> QueryReply {
    QueryReply::Probe(ProbeReply {
        data: json!({ "saw": text }),
        text: String::new(),
        dropped_bytes: 0,
    })
}

async fn asked(agent: &mut Agent) -> (u64, Query, u64) {
    match agent.next().await {
        Some(ToAgent::Query {
            id,
            body,
            timeout_ms,
        }) => (id, body, timeout_ms),
        other => panic!("no query: {other:?}"),
    }
}

type Asking = tokio::task::JoinHandle<Result<QueryReply, QueryFailure>>;

fn ask(gateway: &Gateway, server: ServerId, query: Query, timeout: Duration) -> Asking {
    let gateway = gateway.clone();
    tokio::spawn(async move { gateway.query(server, query, timeout).await })
}

#[tokio::test]
async fn answers_find_their_askers_in_any_order() {
    let world = World::start().await;
    let who = world.server();
    let mut agent = Agent::connect(world.at, &who).await;
    let slow = ask(&world.gateway, who.server, probe("slow"), PATIENCE);
    let (slow_id, body, timeout_ms) = asked(&mut agent).await;
    assert_eq!(body, probe("slow"));
    assert!((1..=PATIENCE.as_millis() as u64).contains(&timeout_ms));
    let connect = Query::Connect {
        protocol: "tcp".into(),
        target: "127.0.0.1".into(),
        port: Some(1),
    };
    let quick = ask(&world.gateway, who.server, connect.clone(), PATIENCE);
    let (quick_id, body, _) = asked(&mut agent).await;
    assert_eq!(body, connect);
    let refused = QueryReply::Connect(ConnectReply {
        reached: false,
        elapsed_us: 3,
        detail: "refused".into(),
    });
    let result = Ok(refused.clone());
    agent
        .send(&ToServer::QueryAnswer {
            id: quick_id,
            result,
        })
        .await;
    assert_eq!(quick.await.unwrap().unwrap(), refused);
    let result = Ok(saw("slow"));
    agent
        .send(&ToServer::QueryAnswer {
            id: slow_id,
            result,
        })
        .await;
    assert_eq!(slow.await.unwrap().unwrap(), saw("slow"));
    // The agent's reason reaches the asker.
    let denied = ask(&world.gateway, who.server, probe("secret"), PATIENCE);
    let (id, ..) = asked(&mut agent).await;
    let reason = QueryError::new(QueryErrorCode::Denied, "only root may see it");
    agent
        .send(&ToServer::QueryAnswer {
            id,
            result: Err(reason.clone()),
        })
        .await;
    match denied.await.unwrap() {
        Err(QueryFailure::Agent { source, .. }) => assert_eq!(source, reason),
        other => panic!("{other:?}"),
    }
    world.stop().await;
}

#[tokio::test]
async fn without_an_agent_there_is_a_reason() {
    let world = World::start().await;
    let who = world.server();
    let asked_of = |server| world.gateway.query(server, probe("load"), PATIENCE);
    assert!(matches!(
        asked_of(who.server).await,
        Err(QueryFailure::Offline { server }) if server == who.server
    ));
    // An agent of the version before works, and is never sent a query.
    let old = Who {
        protocol: 1,
        ..who.clone()
    };
    let mut agent = Agent::connect(world.at, &old).await;
    let failure = asked_of(who.server).await.unwrap_err();
    assert!(
        failure.to_string().contains("upgrade the agent"),
        "{failure}"
    );
    assert!(matches!(
        failure,
        QueryFailure::AgentTooOld { speaks: 1, .. }
    ));
    agent.send_text("{\"kind\":\"of_a_later_version\"}").await;
    assert!(matches!(
        agent.next().await,
        Some(ToAgent::Unsupported { .. })
    ));
    // One that goes away without an answer.
    let mut agent = Agent::connect(world.at, &who).await;
    let asking = ask(&world.gateway, who.server, probe("load"), PATIENCE);
    asked(&mut agent).await;
    drop(agent);
    assert!(matches!(
        asking.await.unwrap(),
        Err(QueryFailure::SessionLost { .. })
    ));
    world.stop().await;
}

#[tokio::test]
async fn a_late_answer_is_dropped_and_the_session_goes_on() {
    let world = World::start().await;
    let who = world.server();
    let mut agent = Agent::connect(world.at, &who).await;
    let short = Duration::from_millis(10);
    let asking = ask(&world.gateway, who.server, probe("slow"), short);
    let (late, ..) = asked(&mut agent).await;
    assert!(matches!(
        asking.await.unwrap(),
        Err(QueryFailure::Timeout { .. })
    ));
    for id in [late, 4711] {
        let result = Ok(saw("late"));
        agent.send(&ToServer::QueryAnswer { id, result }).await;
    }
    let asking = ask(&world.gateway, who.server, probe("load"), PATIENCE);
    let (id, ..) = asked(&mut agent).await;
    assert!(id > late);
    let result = Ok(saw("load"));
    agent.send(&ToServer::QueryAnswer { id, result }).await;
    assert_eq!(asking.await.unwrap().unwrap(), saw("load"));
    world.stop().await;
}

#[tokio::test]
async fn places_are_bounded_and_come_free() {
    let world = World::start().await;
    let who = world.server();
    let mut agent = Agent::connect(world.at, &who).await;
    let mut asking = Vec::new();
    let mut ids = Vec::new();
    for _ in 0..MAX_QUERIES_IN_FLIGHT {
        asking.push(ask(&world.gateway, who.server, probe("slow"), PATIENCE));
        ids.push(asked(&mut agent).await.0);
    }
    let short = Duration::from_millis(10);
    let refused = world.gateway.query(who.server, probe("load"), short).await;
    assert!(
        matches!(refused, Err(QueryFailure::Busy { .. })),
        "{refused:?}"
    );
    // The asker that gives up frees its place, without an answer.
    asking.pop().unwrap().abort();
    let next = ask(&world.gateway, who.server, probe("load"), PATIENCE);
    let (id, body, _) = asked(&mut agent).await;
    assert_eq!(body, probe("load"));
    ids.pop();
    ids.push(id);
    asking.push(next);
    for id in ids {
        let result = Ok(saw("x"));
        agent.send(&ToServer::QueryAnswer { id, result }).await;
    }
    for asking in asking {
        assert_eq!(asking.await.unwrap().unwrap(), saw("x"));
    }
    // Nothing is left of any of them.
    let online = || world.gateway.is_online(who.server);
    until("the session", || (online(), online())).await;
    world.stop().await;
}
