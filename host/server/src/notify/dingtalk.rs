//! DingTalk robots: a markdown message that holds the robot's keyword, or is signed as the robot demands.
//!
//! Signed: `timestamp` in milliseconds and `sign` = base64 of HMAC-SHA256(secret, "{timestamp}\n{secret}"), both in the query
//! beside the access token. The robot answers 200 with an `errcode`; anything but 0 is a failure. Source: spec
//! "Notifications"; DingTalk's documentation of custom robots.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use reqwest::Url;
use serde::Deserialize;
use serde_json::json;
use windlass_domain::notification::DingTalkSecurity;
use windlass_protocol::SecretText;

use super::{Secrets, SendError, Sent, hmac_sha256, message::Message, request::Requests};
use crate::clock;

/// What the robot answers.
#[derive(Deserialize)]
struct Verdict {
    errcode: i64,
    #[serde(default)]
    errmsg: String,
}

pub(super) async fn send(
    requests: &Requests,
    url: &str,
    token: &SecretText,
    security: &DingTalkSecurity,
    secrets: &Secrets<'_>,
    message: &Message,
) -> Result<Sent, SendError> {
    let mut url = Url::parse(url).map_err(|_| SendError::new("the channel's url is not one"))?;
    url.query_pairs_mut()
        .append_pair("access_token", token.reveal());
    let keyword = match security {
        DingTalkSecurity::Keyword { keyword } => keyword.as_str(),
        DingTalkSecurity::Sign { secret } => {
            let secret = secrets.read(secret).await?;
            let timestamp = clock::now().unix_ms().to_string();
            url.query_pairs_mut()
                .append_pair("sign", &sign(&secret, &timestamp))
                .append_pair("timestamp", &timestamp);
            ""
        }
    };
    let body = text(message, keyword);
    let build = |client: &reqwest::Client, url| {
        client
            .post(url)
            .header("content-type", "application/json")
            .body(body)
    };
    let answer = requests.send(url, build).await?;
    let fail = |message| SendError::answered("the robot", answer.status, message);
    if !(200..300).contains(&answer.status) {
        return Err(fail(format!("the robot answered {}", answer.status)));
    }
    match serde_json::from_slice::<Verdict>(&answer.body) {
        Ok(Verdict { errcode: 0, .. }) => Ok(Sent::answered(answer.status)),
        Ok(Verdict { errcode, errmsg }) => {
            // It may repeat what was sent.
            let told: String = errmsg
                .replace(token.reveal(), "[secret]")
                .chars()
                .filter(|c| !c.is_control())
                .take(200)
                .collect();
            Err(fail(format!(
                "the robot refused with errcode {errcode}: {told}"
            )))
        }
        Err(_) => Err(fail(
            "the robot's answer is not DingTalk's: check the channel's url".to_owned(),
        )),
    }
}

fn text(message: &Message, keyword: &str) -> String {
    let title = match keyword {
        "" => message.title.clone(),
        keyword if message.title.contains(keyword) => message.title.clone(),
        keyword => format!("{keyword} {}", message.title),
    };
    let facts: String = message
        .facts
        .iter()
        .map(|(name, value)| format!("- {name}: {value}\n"))
        .collect();
    json!({
        "msgtype": "markdown",
        "markdown": { "title": title, "text": format!("### {title}\n\n{facts}") },
    })
    .to_string()
}

fn sign(secret: &SecretText, timestamp: &str) -> String {
    BASE64.encode(hmac_sha256(
        secret,
        &format!("{timestamp}\n{}", secret.reveal()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_dingtalks() {
        // python3: base64.b64encode(hmac.new(s, t + b"\n" + s, "sha256").digest())
        let secret = SecretText::new("SECabc".into());
        assert_eq!(
            sign(&secret, "1700000000000"),
            "jcUpW0QmtKduN03n4JqQ0PBosVjqnM8gU7fIIvsDmCM="
        );
    }
}
