//! Stands between agent and gateway, and cuts.

use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpStream};

/// Forwards connections to the gateway; cuts them on demand.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    plan: Mutex<Option<Cut>>,
}

/// Where to cut: after so many bytes in one direction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    pub(crate) towards_agent: bool,
    pub(crate) after: usize,
}

impl Proxy {
    pub(crate) async fn start(to: u16) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Arc::new(Self {
            port: listener.local_addr().unwrap().port(),
            plan: Mutex::new(None),
        });
        let served = proxy.clone();
        tokio::spawn(async move {
            while let Ok((agent, _)) = listener.accept().await {
                let Ok(gateway) = TcpStream::connect(("127.0.0.1", to)).await else {
                    continue;
                };
                // One plan is for one connection.
                let plan = served.plan.lock().unwrap().take();
                tokio::spawn(async move {
                    let (agent_read, agent_write) = agent.into_split();
                    let (gateway_read, gateway_write) = gateway.into_split();
                    let limit = |towards| {
                        plan.filter(|cut| cut.towards_agent == towards)
                            .map(|cut| cut.after)
                    };
                    tokio::select! {
                        () = forward(agent_read, gateway_write, limit(false)) => {}
                        () = forward(gateway_read, agent_write, limit(true)) => {}
                    }
                });
            }
        });
        proxy
    }

    /// The next connection is cut there.
    pub(crate) fn cut_next(&self, cut: Cut) {
        *self.plan.lock().unwrap() = Some(cut);
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.plan.lock().unwrap().is_some()
    }
}

async fn forward(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut limit: Option<usize>,
) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut buffer = vec![0; 4096];
    loop {
        let Ok(count) = from.read(&mut buffer).await else {
            return;
        };
        if count == 0 {
            return;
        }
        let pass = limit.map_or(count, |left| count.min(left));
        if to.write_all(&buffer[..pass]).await.is_err() || limit == Some(pass) {
            return;
        }
        limit = limit.map(|left| left - pass);
    }
}
