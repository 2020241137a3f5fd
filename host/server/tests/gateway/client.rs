//! A small agent for tests: the real protocol over a real TLS socket, one step at a time.

#![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]
#![allow(
    dead_code,
    reason = "each program that includes this file uses its own part"
)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::{SinkExt as _, StreamExt as _};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring::default_provider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::WebSocketConfig},
};
use windlass_domain::id::ServerId;
use windlass_protocol::{
    AgentState, CONNECT_PATH, Decoded, DiskState, Epoch, Fingerprint, Hello, Identity,
    JournalState, Nonce, PublicKey, ServerFacts, SessionId, ToAgent, ToServer, Transcript, decode,
    encode,
};

/// Longest wait for anything; a test that reaches it has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug)]
struct Pinned {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        if Fingerprint::of_key(&certificate.subject_public_key_info()) == self.fingerprint {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::General("another key".into()))
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// TLS that trusts one key.
pub(crate) fn tls(fingerprint: Fingerprint) -> TlsConnector {
    let provider = Arc::new(default_provider());
    let pinned = Pinned {
        fingerprint,
        provider: provider.clone(),
    };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned))
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

/// A TLS connection to the platform.
pub(crate) async fn dial(
    at: SocketAddr,
    tls: &TlsConnector,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(at).await?;
    let name = ServerName::try_from("windlass").unwrap();
    tls.connect(name, stream).await
}

/// Who an agent is.
#[derive(Clone)]
pub(crate) struct Who {
    pub(crate) server: ServerId,
    pub(crate) identity: Identity,
    pub(crate) epoch: Epoch,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) platform_key: PublicKey,
    /// The version of the protocol that it chooses.
    pub(crate) protocol: u32,
}

/// A WebSocket to the platform.
pub(crate) struct Agent {
    socket: WebSocketStream<TlsStream<TcpStream>>,
}

impl Agent {
    /// Up to the upgrade.
    pub(crate) async fn dial(at: SocketAddr, tls: &TlsConnector) -> Self {
        let stream = dial(at, tls).await.unwrap();
        let config = WebSocketConfig::default()
            .read_buffer_size(4096)
            .write_buffer_size(4096);
        let url = format!("ws://windlass{CONNECT_PATH}");
        let (socket, _) = tokio_tungstenite::client_async_with_config(url, stream, Some(config))
            .await
            .unwrap();
        Self { socket }
    }

    /// Up to an open session.
    pub(crate) async fn connect(at: SocketAddr, who: &Who) -> Self {
        let mut agent = Self::dial(at, &tls(who.fingerprint)).await;
        let hello = agent.hello(who).await;
        agent.send(&ToServer::Hello(Box::new(hello.clone()))).await;
        agent.welcome(who, &hello).await;
        agent
    }

    /// Reads the challenge and makes the hello that answers it.
    pub(crate) async fn hello(&mut self, who: &Who) -> Hello {
        let ToAgent::Challenge { nonce, .. } = self.next().await.unwrap() else {
            panic!("no challenge")
        };
        let agent_nonce = Nonce::from_bytes([7; 32]);
        let transcript = Self::transcript(who, nonce, agent_nonce);
        Hello {
            protocol: who.protocol,
            server_id: who.server,
            nonce: agent_nonce,
            epoch: who.epoch,
            signature: who.identity.sign_hello(&transcript, who.epoch),
            state: state(),
            held: vec![],
            held_total: 0,
        }
    }

    /// Reads the welcome; a session that was opened with another nonce would not verify, so only its shape is checked here.
    pub(crate) async fn welcome(&mut self, _who: &Who, _hello: &Hello) -> SessionId {
        match self.next().await {
            Some(ToAgent::Welcome(welcome)) => welcome.session,
            other => panic!("no welcome: {other:?}"),
        }
    }

    pub(crate) fn transcript(who: &Who, server_nonce: Nonce, agent_nonce: Nonce) -> Transcript {
        Transcript {
            protocol: who.protocol,
            server_id: who.server,
            server_nonce,
            agent_nonce,
            fingerprint: who.fingerprint,
        }
    }

    pub(crate) async fn send(&mut self, message: &ToServer) {
        let frame = Message::text(encode(message).unwrap());
        // The other side may have cut the connection: what it says next is what the test looks at.
        drop(self.socket.send(frame).await);
    }

    pub(crate) async fn send_text(&mut self, text: &str) {
        drop(self.socket.send(Message::text(text)).await);
    }

    /// The next message but pings, which are answered; `None` when the connection is closed.
    pub(crate) async fn next(&mut self) -> Option<ToAgent> {
        loop {
            let frame = timeout(PATIENCE, self.socket.next()).await;
            match frame.expect("nothing was sent for too long") {
                None | Some(Err(_) | Ok(Message::Close(_))) => return None,
                Some(Ok(Message::Text(text))) => match decode(text.as_str()).unwrap() {
                    Decoded::Message(ToAgent::Ping { seq }) => {
                        self.send(&ToServer::Pong { seq }).await;
                    }
                    Decoded::Message(message) => return Some(message),
                    Decoded::UnknownKind(kind) => panic!("unknown kind {kind}"),
                },
                Some(Ok(_)) => {}
            }
        }
    }

    /// Waits for the next frame without answering anything.
    pub(crate) async fn wait(&mut self) -> bool {
        matches!(self.socket.next().await, Some(Ok(_)))
    }
}

/// A healthy agent's state.
pub(crate) fn state() -> AgentState {
    AgentState {
        facts: ServerFacts {
            host_name: "host".into(),
            agent_version: "0.1.0".into(),
            ..ServerFacts::default()
        },
        disk: DiskState {
            free_bytes: 1 << 30,
            full: false,
        },
        journal: JournalState::Created,
        apps: vec![],
        cgroups: false,
    }
}
