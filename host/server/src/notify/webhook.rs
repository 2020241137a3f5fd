//! Webhooks: an HTTP request, signed where the channel has a key.
//!
//! `Windlass-Signature: v1=<hex HMAC-SHA256(key, "<Windlass-Timestamp>.<signed>")>`, where *signed* is the body of a `POST` and
//! path with query of a `GET`. `Windlass-Timestamp` is in seconds since 1970: receivers refuse old ones. Anything but 2xx is
//! a failure.

use reqwest::Url;
use windlass_domain::notification::WebhookMethod;
use windlass_protocol::SecretText;

use super::{SendError, Sent, hmac_sha256, message::Message, request::Requests};
use crate::clock;

pub(super) async fn send(
    requests: &Requests,
    url: &str,
    method: WebhookMethod,
    key: Option<&SecretText>,
    message: &Message,
) -> Result<Sent, SendError> {
    let mut url = Url::parse(url).map_err(|_| SendError::new("the channel's url is not one"))?;
    let timestamp = (clock::now().unix_ms() / 1000).to_string();
    let signed = match method {
        WebhookMethod::Post => message.json.clone(),
        WebhookMethod::Get => {
            url.query_pairs_mut()
                .append_pair("id", &message.id)
                .append_pair("moment", message.moment.code())
                .append_pair("resource", &message.resource)
                .append_pair("workspace", &message.workspace)
                .append_pair("title", &message.title);
            format!("{}?{}", url.path(), url.query().unwrap_or_default())
        }
    };
    let signature = key.map(|key| signature(key, &timestamp, &signed));
    let build = |client: &reqwest::Client, url| {
        let request = match method {
            WebhookMethod::Post => client
                .post(url)
                .header("content-type", "application/json")
                .body(message.json.clone()),
            WebhookMethod::Get => client.get(url),
        };
        let request = request
            .header("windlass-delivery", &message.id)
            .header("windlass-moment", message.moment.code())
            .header("windlass-timestamp", timestamp);
        match signature {
            Some(signature) => request.header("windlass-signature", signature),
            None => request,
        }
    };
    let answer = requests.send(url, build).await?;
    if (200..300).contains(&answer.status) {
        return Ok(Sent::answered(answer.status));
    }
    let text = format!("the receiver answered {}", answer.status);
    Err(SendError::answered("the receiver", answer.status, text))
}

fn signature(key: &SecretText, timestamp: &str, signed: &str) -> String {
    let tag = hmac_sha256(key, &format!("{timestamp}.{signed}"));
    let hex: String = tag.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("v1={hex}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_what_others_compute() {
        // python3: hmac.new(b"key", b"1700000000.{}", "sha256").hexdigest()
        assert_eq!(
            signature(&SecretText::new("key".into()), "1700000000", "{}"),
            EXPECTED
        );
    }

    const EXPECTED: &str = "v1=9d713ed406bb7076d4123f0dc2c39d2df5c654ed4b0cd56b52c8b4c940bd63ae";
}
