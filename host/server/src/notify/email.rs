//! E-mail by SMTP: plain, with STARTTLS, or with TLS from the start.

use std::{net::SocketAddr, time::Duration};

use lettre::{
    AsyncSmtpTransport, AsyncTransport as _, Message as Mail, Tokio1Executor,
    message::{Mailbox, header::ContentType},
    transport::smtp::{
        authentication::Credentials,
        client::{Certificate, Tls, TlsParameters},
        extension::ClientId,
    },
};
use tokio::time::{Instant, timeout_at};
use windlass_domain::notification::{ChannelTarget, ReceiverOutcome, SmtpSecurity};

use super::{
    Secrets, SendError, Sent,
    message::Message,
    request::{Requests, TIMEOUT},
};

/// For all receivers of an attempt; the rest is left to the next one.
const CONVERSATION: Duration = Duration::from_secs(60);
/// Longest text of an attempt's error.
const MAX_ERROR_CHARS: usize = 2000;

pub(super) async fn send(
    requests: &Requests,
    target: &ChannelTarget,
    done: &[String],
    secrets: &Secrets<'_>,
    message: &Message,
) -> Result<Sent, SendError> {
    let ChannelTarget::Email {
        server,
        port,
        security,
        user,
        password_secret,
        certificate_authority,
        from,
        to,
    } = target
    else {
        return Err(SendError::new("the channel is not one for e-mail"));
    };
    let left: Vec<&String> = to
        .iter()
        .filter(|receiver| !done.contains(receiver))
        .collect();
    let tls = tls(server, *security, certificate_authority.as_deref())?;
    let credentials = match (user, password_secret) {
        (Some(user), Some(password)) => {
            let password = secrets.read(password).await?;
            Some(Credentials::new(user.clone(), password.reveal().to_owned()))
        }
        (Some(_) | None, _) => None,
    };
    let addresses = requests.addresses(server, *port).await?;
    let end = Instant::now() + CONVERSATION;
    // Each receiver gets a message of its own, so that one that is refused keeps no other from getting it.
    let mut receivers = Vec::new();
    for receiver in left {
        let mail = mail(message, from, receiver)?;
        let sent = timeout_at(end, deliver(&addresses, &tls, credentials.as_ref(), &mail)).await;
        let outcome = match sent {
            Ok(Ok(code)) => (Some(code), String::new(), false),
            Ok(Err(error)) => (error.code, error.message, error.permanent),
            Err(_) => {
                let text = format!(
                    "the mail server did not accept it within {} s",
                    CONVERSATION.as_secs()
                );
                (None, text, false)
            }
        };
        let (answer_code, error, permanent) = outcome;
        receivers.push(ReceiverOutcome {
            receiver: receiver.clone(),
            answer_code,
            error,
            permanent,
        });
    }
    summarize(receivers, to.len())
}

/// The outcome of an attempt from that of its receivers.
fn summarize(receivers: Vec<ReceiverOutcome>, all: usize) -> Result<Sent, SendError> {
    let failed: Vec<&ReceiverOutcome> = receivers
        .iter()
        .filter(|one| !one.error.is_empty())
        .collect();
    let Some(first) = failed.first() else {
        let code = receivers.first().and_then(|one| one.answer_code);
        return Ok(Sent { code, receivers });
    };
    let same = failed.iter().all(|one| one.error == first.error);
    let message = if same && failed.len() == all {
        first.error.clone()
    } else if same {
        let names: Vec<&str> = failed.iter().map(|one| &*one.receiver).collect();
        format!(
            "{} of {all} receivers did not get it ({}): {}",
            failed.len(),
            names.join(", "),
            first.error
        )
    } else {
        let texts: Vec<String> = failed
            .iter()
            .map(|one| format!("{}: {}", one.receiver, one.error))
            .collect();
        format!(
            "{} of {all} receivers did not get it: {}",
            failed.len(),
            texts.join("; ")
        )
    };
    Err(SendError {
        code: first.answer_code,
        message: message.chars().take(MAX_ERROR_CHARS).collect(),
        permanent: failed.iter().all(|one| one.permanent),
        receivers,
    })
}

/// Sends one message; the next address is tried where there was no answer.
async fn deliver(
    addresses: &[SocketAddr],
    tls: &Tls,
    credentials: Option<&Credentials>,
    mail: &Mail,
) -> Result<u16, SendError> {
    let mut last = SendError::new("the mail server has no address");
    for address in addresses {
        match converse(*address, tls.clone(), credentials.cloned(), mail).await {
            Ok(code) => return Ok(code),
            // It answered: another address would answer the same.
            Err(error) if error.code.is_some() => return Err(error),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn converse(
    address: SocketAddr,
    tls: Tls,
    credentials: Option<Credentials>,
    mail: &Mail,
) -> Result<u16, SendError> {
    // The address that was looked at is the one that is connected to; TLS asks for the server's name.
    let mut transport =
        AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(address.ip().to_string())
            .port(address.port())
            .tls(tls)
            .hello_name(ClientId::Domain("windlass".to_owned()))
            .timeout(Some(TIMEOUT));
    if let Some(credentials) = credentials {
        transport = transport.credentials(credentials);
    }
    let transport = transport.build();
    match transport.send(mail.clone()).await {
        Ok(answer) => Ok(number(&answer.code().to_string())),
        Err(error) => {
            let code = error.status().map(|code| number(&code.to_string()));
            Err(SendError {
                code,
                message: shown(&error),
                // The mailbox does not exist, is not local, or has a name that is not allowed (RFC 5321, 4.2.3). Other answers,
                // such as a refused password, can change when a person corrects the settings.
                permanent: matches!(code, Some(550 | 551 | 553)),
                receivers: Vec::new(),
            })
        }
    }
}

fn number(code: &str) -> u16 {
    code.parse().unwrap_or(0)
}

/// The error in one line. Its text contains the texts of its causes already.
fn shown(error: &lettre::transport::smtp::Error) -> String {
    let text = error.to_string();
    let line: String = text.chars().filter(|c| !c.is_control()).take(300).collect();
    format!("the mail server: {line}")
}

fn tls(server: &str, security: SmtpSecurity, authority: Option<&str>) -> Result<Tls, SendError> {
    let parameters = || {
        let mut builder = TlsParameters::builder(server.to_owned());
        if let Some(pem) = authority {
            let certificate = Certificate::from_pem(pem.as_bytes()).map_err(|_| {
                SendError::new("the channel's certificate authority is not a certificate in PEM")
            })?;
            builder = builder.add_root_certificate(certificate);
        }
        builder
            .build_rustls()
            .map_err(|error| SendError::new(format!("TLS cannot be set up: {error}")))
    };
    Ok(match security {
        SmtpSecurity::None => Tls::None,
        SmtpSecurity::Starttls => Tls::Required(parameters()?),
        SmtpSecurity::Tls => Tls::Wrapper(parameters()?),
    })
}

fn mail(message: &Message, from: &str, to: &str) -> Result<Mail, SendError> {
    let address = |text: &str| {
        text.parse::<Mailbox>()
            .map_err(|_| SendError::new(format!("`{text}` is not an e-mail address")))
    };
    let mail = Mail::builder()
        .from(address(from)?)
        .subject(format!(
            "[windlass {}] {}",
            message.workspace, message.title
        ))
        .message_id(Some(format!("<{}@windlass>", message.id)))
        .header(ContentType::TEXT_PLAIN);
    let mail = mail.to(address(to)?);
    let facts: String = message
        .facts
        .iter()
        .map(|(name, value)| format!("{name}: {value}\n"))
        .collect();
    mail.body(format!("{}\n\n{facts}", message.title))
        .map_err(|error| SendError::new(format!("the message cannot be written: {error}")))
}
