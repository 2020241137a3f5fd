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
use windlass_domain::notification::{ChannelTarget, SmtpSecurity};

use super::{
    Secrets, SendError,
    message::Message,
    request::{Requests, TIMEOUT},
};

/// For all of a conversation.
const CONVERSATION: Duration = Duration::from_secs(60);

pub(super) async fn send(
    requests: &Requests,
    target: &ChannelTarget,
    secrets: &Secrets<'_>,
    message: &Message,
) -> Result<Option<u16>, SendError> {
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
    let mail = mail(message, from, to)?;
    let tls = tls(server, *security, certificate_authority.as_deref())?;
    let credentials = match (user, password_secret) {
        (Some(user), Some(password)) => {
            let password = secrets.read(password).await?;
            Some(Credentials::new(user.clone(), password.reveal().to_owned()))
        }
        (Some(_) | None, _) => None,
    };
    let mut last = SendError::new(format!("`{server}` has no address"));
    for address in requests.addresses(server, *port).await? {
        let sent = converse(address, tls.clone(), credentials.clone(), &mail).await;
        match sent {
            Ok(code) => return Ok(Some(code)),
            // It answered: another address would say the same.
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
    let sent = tokio::time::timeout(CONVERSATION, transport.send(mail.clone())).await;
    match sent {
        Err(_) => Err(SendError::new(format!(
            "the mail server did not take the message within {} s",
            CONVERSATION.as_secs()
        ))),
        Ok(Ok(answer)) => Ok(number(&answer.code().to_string())),
        Ok(Err(error)) => Err(SendError {
            code: error.status().map(|code| number(&code.to_string())),
            message: shown(&error),
        }),
    }
}

fn number(code: &str) -> u16 {
    code.parse().unwrap_or(0)
}

/// The error with its causes.
fn shown(error: &lettre::transport::smtp::Error) -> String {
    let text = crate::platform::chain(error);
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

fn mail(message: &Message, from: &str, to: &[String]) -> Result<Mail, SendError> {
    let address = |text: &str| {
        text.parse::<Mailbox>()
            .map_err(|_| SendError::new(format!("`{text}` is not an e-mail address")))
    };
    let mut mail = Mail::builder()
        .from(address(from)?)
        .subject(format!(
            "[windlass {}] {}",
            message.workspace, message.title
        ))
        .message_id(Some(format!("<{}@windlass>", message.id)))
        .header(ContentType::TEXT_PLAIN);
    for receiver in to {
        mail = mail.to(address(receiver)?);
    }
    let facts: String = message
        .facts
        .iter()
        .map(|(name, value)| format!("{name}: {value}\n"))
        .collect();
    mail.body(format!("{}\n\n{facts}", message.title))
        .map_err(|error| SendError::new(format!("the message cannot be written: {error}")))
}
