//! `windlass-agent register`: makes this server's key, shows the activation code, and keeps the answer.

use std::path::Path;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::Request;
use windlass_protocol::{
    ActivationCode, Identity, InvalidActivationCode, Problem, REGISTER_PATH, RegisterRequest,
    RegisterResponse, SecretText,
};

use crate::{
    clock,
    config::{Config, ConfigError, DataDir, Policy},
    facts,
    files::{FileError, write_durable},
    net::{NetError, Platform},
};

const MAX_ANSWER: usize = 64 * 1024;

/// Why a registration failed.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The code.
    #[error(transparent)]
    Code(#[from] InvalidActivationCode),
    /// The data directory.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The connection.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The platform said no.
    #[error("the platform refuses the registration ({status}, {code}): {detail}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The problem's code.
        code: String,
        /// For people.
        detail: String,
    },
    /// The platform's answer makes no sense.
    #[error("the platform's answer cannot be read: {0}")]
    Answer(String),
}

impl From<FileError> for RegisterError {
    fn from(error: FileError) -> Self {
        Self::Config(error.into())
    }
}

/// Registers this server. Nothing is kept unless it succeeded.
///
/// # Errors
/// When the code, the connection or the data directory is not good, or the platform refuses.
pub async fn register(
    url: &str,
    code: &str,
    data: &Path,
    name: Option<String>,
    policy: Policy,
) -> Result<Config, RegisterError> {
    let code_text = code.trim();
    let code = ActivationCode::parse(code_text)?;
    let data = DataDir::open(data)?;
    if data.config().exists() {
        return Err(ConfigError::AlreadyRegistered(data.config()).into());
    }
    let seed: [u8; 32] = clock::random();
    let identity = Identity::from_seed(seed);
    let platform = Platform::new(url, code.fingerprint())?;
    let request = RegisterRequest {
        code: SecretText::new(code_text.to_owned()),
        public_key: identity.public_key(),
        proof: identity.sign_registration(&code),
        name,
        facts: facts::gather(&data, &policy),
    };
    let body =
        serde_json::to_vec(&request).map_err(|error| RegisterError::Answer(error.to_string()))?;
    let head = Request::post(REGISTER_PATH).header("content-type", "application/json");
    let response = platform.request(head, Bytes::from(body)).await?;
    let status = response.status();
    let answer = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(|error| RegisterError::Answer(error.to_string()))?
        .to_bytes();
    if !status.is_success() {
        let problem: Problem = serde_json::from_slice(&answer).unwrap_or_else(|_| Problem {
            code: "unknown".into(),
            detail: "the answer holds no reason".into(),
        });
        return Err(RegisterError::Refused {
            status: status.as_u16(),
            code: problem.code,
            detail: problem.detail,
        });
    }
    let answer: RegisterResponse = serde_json::from_slice(&answer)
        .map_err(|error| RegisterError::Answer(error.to_string()))?;
    let key: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
    write_durable(&data.identity(), key.as_bytes(), 0o600)?;
    let config = Config {
        platform_url: url.trim_end_matches('/').to_owned(),
        fingerprint: code.fingerprint(),
        platform_key: answer.platform_key,
        server_id: answer.server_id,
        name: answer.name,
        policy,
    };
    // Last: with this file the directory is registered.
    data.save_config(&config)?;
    Ok(config)
}

/// Reads the key that was made at registration.
///
/// # Errors
/// When it is missing or broken.
pub fn load_identity(data: &DataDir) -> Result<Identity, ConfigError> {
    use crate::files::Context as _;
    let path = data.identity();
    let text = std::fs::read_to_string(&path).during("read", &path)?;
    // A public key and a private seed have the same form.
    let seed: windlass_protocol::PublicKey = text
        .trim()
        .parse()
        .map_err(|error: windlass_protocol::fixed::InvalidHex| {
            std::io::Error::other(error.to_string())
        })
        .during("understand", &path)?;
    Ok(Identity::from_seed(*seed.as_bytes()))
}
