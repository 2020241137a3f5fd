//! A small client of the API: what `windlass dev`, the demo and the tests use, the way any other user would.
//!
//! Plain HTTP to an address of this machine; one connection per request, so that nothing has to be pooled or recovered.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode, body::Incoming, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, task::JoinHandle};

/// Answers larger than this are not read.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;
/// How long a request may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Why a request had no answer that can be used.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server could not be reached, or the connection broke.
    #[error("no answer from {address}")]
    Connection {
        /// Where.
        address: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It took too long.
    #[error("{address} did not answer within {TIMEOUT:?}")]
    Timeout {
        /// Where.
        address: String,
    },
    /// The server refused.
    #[error("{method} {path}: {status}: {problem}")]
    Refused {
        /// What was asked.
        method: Method,
        /// Of what.
        path: String,
        /// The status.
        status: u16,
        /// The problem document.
        problem: Value,
    },
    /// The answer is not JSON.
    #[error("the answer to {path} cannot be read")]
    Malformed {
        /// Of what.
        path: String,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
}

/// A client of one server with one token.
#[derive(Debug, Clone)]
pub struct Client {
    address: String,
    token: String,
}

/// An answer as it came.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Bytes,
}

impl Answer {
    /// A header's value.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON; `null` when it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }
}

impl Client {
    /// A client of the server at `host:port`, or `http://host:port`.
    #[must_use]
    pub fn new(address: &str, token: &str) -> Self {
        let address = address
            .trim_start_matches("http://")
            .trim_end_matches('/')
            .to_owned();
        Self {
            address,
            token: token.trim().to_owned(),
        }
    }

    /// Reads.
    ///
    /// # Errors
    /// [`ClientError`]; anything but 2xx is [`ClientError::Refused`].
    pub async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.expect(Method::GET, path, Bytes::new(), &[]).await
    }

    /// Sends JSON.
    ///
    /// # Errors
    /// [`ClientError`]; anything but 2xx is [`ClientError::Refused`].
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        self.expect(
            Method::POST,
            path,
            body.to_string().into(),
            &[("content-type", "application/json")],
        )
        .await
    }

    /// Replaces with JSON.
    ///
    /// # Errors
    /// [`ClientError`]; anything but 2xx is [`ClientError::Refused`].
    pub async fn put(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        self.expect(
            Method::PUT,
            path,
            body.to_string().into(),
            &[("content-type", "application/json")],
        )
        .await
    }

    /// Sends a file.
    ///
    /// # Errors
    /// [`ClientError`]; anything but 2xx is [`ClientError::Refused`].
    pub async fn upload(&self, path: &str, file: Bytes) -> Result<Value, ClientError> {
        self.expect(
            Method::POST,
            path,
            file,
            &[("content-type", "application/octet-stream")],
        )
        .await
    }

    async fn expect(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        headers: &[(&str, &str)],
    ) -> Result<Value, ClientError> {
        let answer = self.request(method.clone(), path, body, headers).await?;
        if !(200..300).contains(&answer.status) {
            let path = path.to_owned();
            return Err(ClientError::Refused {
                method,
                path,
                status: answer.status,
                problem: answer.json(),
            });
        }
        if answer.body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&answer.body).map_err(|source| ClientError::Malformed {
            path: path.to_owned(),
            source,
        })
    }

    /// One request, whatever its answer.
    ///
    /// # Errors
    /// [`ClientError::Connection`], [`ClientError::Timeout`].
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        headers: &[(&str, &str)],
    ) -> Result<Answer, ClientError> {
        let whole = async {
            let (response, connection) = self.send(method, path, body, headers).await?;
            let status = response.status().as_u16();
            let headers = response
                .headers()
                .iter()
                .map(|(name, value)| {
                    (
                        name.as_str().to_owned(),
                        String::from_utf8_lossy(value.as_bytes()).into_owned(),
                    )
                })
                .collect();
            let body = http_body_util::Limited::new(response.into_body(), MAX_ANSWER_BYTES);
            let body = body
                .collect()
                .await
                .map_err(|source| self.broken(source))?
                .to_bytes();
            connection.abort();
            Ok(Answer {
                status,
                headers,
                body,
            })
        };
        match tokio::time::timeout(TIMEOUT, whole).await {
            Ok(answer) => answer,
            Err(_) => Err(ClientError::Timeout {
                address: self.address.clone(),
            }),
        }
    }

    /// Opens a stream of server-sent events; `after` is the last event id that is known.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn events(
        &self,
        path: &str,
        after: Option<&str>,
    ) -> Result<EventStream, ClientError> {
        let mut headers = vec![("accept", "text/event-stream")];
        headers.extend(after.map(|after| ("last-event-id", after)));
        let (response, connection) = self.send(Method::GET, path, Bytes::new(), &headers).await?;
        if response.status() != StatusCode::OK {
            let status = response.status().as_u16();
            let body = response
                .into_body()
                .collect()
                .await
                .map_err(|source| self.broken(source))?
                .to_bytes();
            let problem = serde_json::from_slice(&body).unwrap_or(Value::Null);
            return Err(ClientError::Refused {
                method: Method::GET,
                path: path.to_owned(),
                status,
                problem,
            });
        }
        Ok(EventStream {
            address: self.address.clone(),
            body: response.into_body(),
            connection,
            buffer: Vec::new(),
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        headers: &[(&str, &str)],
    ) -> Result<(hyper::Response<Incoming>, JoinHandle<()>), ClientError> {
        let stream = TcpStream::connect(&self.address)
            .await
            .map_err(|source| self.broken(source))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|source| self.broken(source))?;
        let connection = tokio::spawn(async move {
            // A connection that breaks shows in the answer's body.
            drop(connection.await);
        });
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.address);
        if !self.token.is_empty() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", self.token));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .body(Full::new(body))
            .map_err(|source| self.broken(source))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|source| self.broken(source))?;
        Ok((response, connection))
    }

    fn broken(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Connection {
            address: self.address.clone(),
            source: source.into(),
        }
    }
}

/// A stream of server-sent events. Ends its connection when dropped.
pub struct EventStream {
    address: String,
    body: Incoming,
    connection: JoinHandle<()>,
    buffer: Vec<u8>,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSent {
    /// Its id: what `Last-Event-ID` resumes after.
    pub id: String,
    /// Its type.
    pub event: String,
    /// Its data.
    pub data: String,
}

impl EventStream {
    /// The next event; `None` when the stream has ended.
    ///
    /// # Errors
    /// [`ClientError::Connection`] when it broke.
    pub async fn next(&mut self) -> Result<Option<ServerSent>, ClientError> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = self.buffer.drain(..end + 2).collect();
                if let Some(event) = parse(&String::from_utf8_lossy(&block)) {
                    return Ok(Some(event));
                }
                continue;
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(source)) => {
                    return Err(ClientError::Connection {
                        address: self.address.clone(),
                        source: source.into(),
                    });
                }
            }
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// A block of lines as an event; `None` for comments.
fn parse(block: &str) -> Option<ServerSent> {
    let mut event = ServerSent {
        id: String::new(),
        event: String::new(),
        data: String::new(),
    };
    let mut any = false;
    for line in block.lines() {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => event.id = value.to_owned(),
            "event" => event.event = value.to_owned(),
            "data" => {
                if any {
                    event.data.push('\n');
                }
                event.data.push_str(value);
                any = true;
            }
            _ => {}
        }
    }
    any.then_some(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_and_comments_passed_over() {
        let event = parse("id: 7\nevent: node\ndata: {\"a\":\ndata: 1}\n\n").unwrap();
        assert_eq!(
            (event.id.as_str(), event.event.as_str(), event.data.as_str()),
            ("7", "node", "{\"a\":\n1}")
        );
        assert_eq!(parse(": keep-alive\n\n"), None);
    }
}
