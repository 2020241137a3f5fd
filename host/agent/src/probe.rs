//! Health checks. Source: spec "Release orders", "Per server"; `windlass_domain::task::Check`.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::Instant};

use crate::{files::chain, instance::expand, net};

/// The most of a body that is looked at.
const MAX_BODY: usize = 1 << 20;

/// One `GET` of a check: the reason when it is not good.
///
/// # Errors
/// With the reason, for people.
pub async fn http(
    url: &str,
    statuses: &[u16],
    body_contains: Option<&str>,
    env: &BTreeMap<String, String>,
) -> Result<(), String> {
    let url = expand(url, env).map_err(no_variable)?;
    let uri: Uri = url
        .parse()
        .map_err(|error| format!("`{url}` is not a URL: {error}"))?;
    let (Some("http"), Some(host)) = (uri.scheme_str(), uri.host()) else {
        return Err(format!(
            "`{url}` is not a URL of the form http://host:port/path"
        ));
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(80);
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|error| format!("{url}: {error}"))?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri
        .authority()
        .map_or_else(String::new, ToString::to_string);
    let request = Request::get(path)
        .header("host", authority)
        .header("user-agent", "windlass-agent")
        .header("connection", "close")
        .body(Full::new(Bytes::new()))
        .map_err(|error| format!("{url}: {error}"))?;
    let response = net::send(TokioIo::new(stream), request, &url)
        .await
        .map_err(|error| chain(&error))?;
    let status = response.status();
    let accepted = if statuses.is_empty() {
        status.is_success()
    } else {
        statuses.contains(&status.as_u16())
    };
    if !accepted {
        return Err(format!("{url} answers with status {}", status.as_u16()));
    }
    let Some(wanted) = body_contains else {
        return Ok(());
    };
    let wanted = expand(wanted, env).map_err(no_variable)?;
    let body = Limited::new(response.into_body(), MAX_BODY)
        .collect()
        .await
        .map_err(|error| format!("{url}: the body cannot be read: {error}"))?
        .to_bytes();
    if String::from_utf8_lossy(&body).contains(&wanted) {
        Ok(())
    } else {
        Err(format!(
            "{url} answers with status {}, but its body does not contain `{wanted}`",
            status.as_u16()
        ))
    }
}

/// One connection of a check.
///
/// # Errors
/// With the reason, for people.
pub async fn tcp(address: &str, env: &BTreeMap<String, String>) -> Result<(), String> {
    let address = expand(address, env).map_err(no_variable)?;
    match TcpStream::connect(&address).await {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{address}: {error}")),
    }
}

fn no_variable(name: String) -> String {
    format!("there is no environment variable `{name}`")
}

/// Judges a row of tries: healthy when they have been good for long enough on end.
#[derive(Debug)]
pub struct Streak {
    healthy_for: Duration,
    good_since: Option<Instant>,
    /// The latest reason, for people.
    pub last_failure: String,
}

impl Streak {
    /// Needs tries that are good for this long.
    #[must_use]
    pub fn new(healthy_for_ms: u64) -> Self {
        Self {
            healthy_for: Duration::from_millis(healthy_for_ms),
            good_since: None,
            last_failure: "it was not tried yet".into(),
        }
    }

    /// Takes a try that ended at `now`; whether the check has succeeded.
    pub fn judge(&mut self, attempt: Result<(), String>, now: Instant) -> bool {
        match attempt {
            Ok(()) => now.duration_since(*self.good_since.get_or_insert(now)) >= self.healthy_for,
            Err(reason) => {
                self.good_since = None;
                self.last_failure = reason;
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_try_begins_anew() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut streak = Streak::new(100);
        assert!(!streak.judge(Ok(()), at(0)));
        assert!(!streak.judge(Ok(()), at(99)));
        assert!(!streak.judge(Err("bad".into()), at(100)));
        assert!(!streak.judge(Ok(()), at(110)));
        assert!(streak.judge(Ok(()), at(210)));
        assert_eq!(streak.last_failure, "bad");
        assert!(Streak::new(0).judge(Ok(()), start));
    }
}
