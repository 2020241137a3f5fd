//! One HTTP request to somewhere else: bounded in time and size, and not to everywhere.
//!
//! The address that is connected to is the one that was looked at: a name is resolved once, addresses in denied networks are
//! left out, and the client is given the rest. Redirections are not followed, and no proxy of the environment is used.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use reqwest::{Client, RequestBuilder, Url, redirect::Policy};
use rustls::{ClientConfig, RootCertStore};

use super::{SendError, destination::Destinations};

/// How long an attempt may take.
pub const TIMEOUT: Duration = Duration::from_secs(15);
/// An answer is read up to here.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// The way out. Cheap to clone.
#[derive(Clone)]
pub struct Requests {
    tls: ClientConfig,
    destinations: Destinations,
}

/// An answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Bytes,
}

impl Requests {
    /// The way out, with the certificate authorities of this machine. Blocks on their files; called once at start.
    #[must_use]
    pub fn new(destinations: Destinations) -> Self {
        let mut roots = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        let (added, ignored) = roots.add_parsable_certificates(found.certs);
        if added == 0 {
            tracing::warn!(
                ignored,
                "this machine has no certificate authorities: notifications over TLS will fail; install the package `ca-certificates`"
            );
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring has the default versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { tls, destinations }
    }

    /// The addresses of a host that may be connected to.
    pub(crate) async fn addresses(
        &self,
        host: &str,
        port: u16,
    ) -> Result<Vec<SocketAddr>, SendError> {
        let found: Vec<SocketAddr> = match host.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, port)],
            Err(_) => tokio::net::lookup_host((host, port))
                .await
                .map_err(|error| {
                    SendError::new(format!("the name `{host}` was not found: {error}"))
                })?
                .collect(),
        };
        let allowed: Vec<SocketAddr> = found
            .iter()
            .copied()
            .filter(|address| !self.destinations.is_denied(*address))
            .collect();
        match (allowed.is_empty(), found.first()) {
            (false, _) => Ok(allowed),
            (true, Some(address)) => Err(SendError::new(format!(
                "`{host}` is {}, in a network that this platform sends no notifications to (`--notification-deny`; an operator can make exceptions with `--notification-allow`)",
                address.ip()
            ))),
            (true, None) => Err(SendError::new(format!("the name `{host}` has no address"))),
        }
    }

    /// One request and its answer. `build` makes the request with the client that it is given.
    pub(crate) async fn send(
        &self,
        url: Url,
        build: impl FnOnce(&Client, Url) -> RequestBuilder,
    ) -> Result<Answer, SendError> {
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
            return Err(SendError::new("the address has no host"));
        };
        let host = host.trim_matches(['[', ']']).to_owned();
        let exchange = async {
            let addresses = self.addresses(&host, port).await?;
            let client = Client::builder()
                .tls_backend_preconfigured(self.tls.clone())
                .redirect(Policy::none())
                .no_proxy()
                .user_agent("windlass")
                .resolve_to_addrs(&host, &addresses)
                .build()
                .map_err(|error| broke(&error.without_url()))?;
            let answer = build(&client, url).send().await;
            let mut answer = answer.map_err(|error| broke(&error.without_url()))?;
            let status = answer.status().as_u16();
            let mut body = BytesMut::new();
            // What an answer says beside its status is for DingTalk alone; a long or broken one does not matter.
            while let Ok(Some(piece)) = answer.chunk().await
                && body.len() + piece.len() <= MAX_ANSWER_BYTES
            {
                body.extend_from_slice(&piece);
            }
            Ok(Answer {
                status,
                body: body.freeze(),
            })
        };
        match tokio::time::timeout(TIMEOUT, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(SendError::new(format!(
                "no answer within {} s",
                TIMEOUT.as_secs()
            ))),
        }
    }
}

/// An error with its causes; the address, which may hold a token, is not among them.
fn broke(error: &reqwest::Error) -> SendError {
    let text = crate::platform::chain(error);
    SendError::new(text.chars().take(300).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::{super::destination::denied_by_default, *};

    #[tokio::test]
    async fn a_denied_address_is_refused_with_the_option_that_denies_it() {
        let requests = Requests::new(Destinations::new(denied_by_default(), Vec::new()));
        // Whatever the resolver makes of a name or number is judged, not the text.
        for host in ["169.254.169.254", "localhost", "2130706433", "127.1"] {
            let refused = requests.addresses(host, 80).await.unwrap_err();
            assert!(
                refused.message.contains("--notification-deny"),
                "{host}: {refused}"
            );
        }
        assert!(requests.addresses("10.1.2.3", 80).await.is_ok());
    }
}
