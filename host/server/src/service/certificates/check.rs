//! What is checked of a certificate when it comes: form, order and signatures of the chain, time, and that the key is its key.

use rustls::{
    crypto::ring::{self, sign},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};
use windlass_domain::Timestamp;
use windlass_protocol::SecretText;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _};

use crate::service::ServiceError;

/// Longest chain as PEM: with all else of its record it fits a row.
const CHAIN_MAX_BYTES: usize = 16 * 1024;
/// Longest key as PEM: more than RSA with 4096 bits takes.
const KEY_MAX_BYTES: usize = 8 * 1024;
/// Certificates of a chain at most.
const MAX_CERTIFICATES: usize = 8;
/// Names that are kept.
const MAX_NAMES: usize = 100;

/// What a good certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Checked {
    pub(super) subject: String,
    pub(super) issuer: String,
    pub(super) names: Vec<String>,
    pub(super) not_before: Timestamp,
    pub(super) not_after: Timestamp,
}

fn invalid(message: impl Into<String>) -> ServiceError {
    ServiceError::invalid(
        "certificate_invalid",
        "chain",
        message,
        "give PEM: the server's certificate first, then each issuer in turn, without blank lines and without the root",
    )
}

fn key_invalid(message: impl Into<String>) -> ServiceError {
    ServiceError::invalid(
        "certificate_key_invalid",
        "private_key",
        message,
        "give one private key as PEM: `BEGIN PRIVATE KEY` (PKCS#8) or `BEGIN RSA PRIVATE KEY` (PKCS#1), not encrypted",
    )
}

/// Checks a chain and its key.
pub(super) fn check(
    chain: &str,
    private_key: &SecretText,
    now: Timestamp,
) -> Result<Checked, ServiceError> {
    let ders = certificates_of(chain)?;
    let parsed = ders
        .iter()
        .enumerate()
        .map(|(index, der)| match X509Certificate::from_der(der) {
            Ok(([], certificate)) => Ok(certificate),
            Ok(_) | Err(_) => Err(invalid(format!(
                "certificate {} of the chain is not an X.509 certificate",
                index + 1
            ))),
        })
        .collect::<Result<Vec<_>, _>>()?;
    for (index, pair) in parsed.windows(2).enumerate() {
        let [one, issuer] = pair else { continue };
        let (number, next) = (index + 1, index + 2);
        if one.issuer() != issuer.subject() {
            return Err(invalid(format!(
                "certificate {number} was issued by `{}`, and certificate {next} is of `{}`: they are out of order, or one is missing",
                one.issuer(),
                issuer.subject()
            )));
        }
        if !issuer.is_ca() {
            return Err(invalid(format!(
                "certificate {next} of the chain may not issue certificates"
            )));
        }
        if one.verify_signature(Some(issuer.public_key())).is_err() {
            return Err(invalid(format!(
                "the signature of certificate {number} was not made by certificate {next}"
            )));
        }
    }
    let Some(leaf) = parsed.first() else {
        return Err(invalid("there is no certificate in it"));
    };
    if parsed.len() > 1 && leaf.is_ca() {
        return Err(invalid(
            "the first certificate is an authority's: the server's own stands first",
        ));
    }
    let at = |seconds: i64| Timestamp::from_unix_ms(seconds.saturating_mul(1000));
    let ends = parsed
        .iter()
        .map(|one| one.validity().not_after.timestamp());
    let not_after = at(ends.min().unwrap_or(0));
    if not_after <= now {
        return Err(ServiceError::invalid(
            "certificate_expired",
            "chain",
            format!("a certificate of the chain ended at {not_after}"),
            "give a chain that is valid",
        ));
    }
    check_key(ders.clone(), private_key)?;
    Ok(Checked {
        subject: shown(&leaf.subject().to_string()),
        issuer: shown(&leaf.issuer().to_string()),
        names: names_of(leaf),
        not_before: at(leaf.validity().not_before.timestamp()),
        not_after,
    })
}

/// Texts of certificates are anybody's: what is shown of them has an end and no control characters.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

fn certificates_of(chain: &str) -> Result<Vec<CertificateDer<'static>>, ServiceError> {
    if chain.len() > CHAIN_MAX_BYTES {
        return Err(ServiceError::Limit {
            code: "out_of_limit",
            field: "chain".to_owned(),
            message: format!("a chain has at most {CHAIN_MAX_BYTES} bytes"),
            limit: CHAIN_MAX_BYTES as u64,
            current: chain.len() as u64,
            mend: "leave out the root, and comments".to_owned(),
        });
    }
    let text = chain.trim_end();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            return Err(invalid(format!("line {} is blank", index + 1)));
        }
        let armour = line.starts_with("-----");
        if armour
            && !matches!(
                line.trim_end(),
                "-----BEGIN CERTIFICATE-----" | "-----END CERTIFICATE-----"
            )
        {
            return Err(invalid(format!(
                "line {} is {:?}: a chain holds certificates only",
                index + 1,
                line.chars().take(60).collect::<String>()
            )));
        }
        let base64 = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '=');
        if !armour && !line.trim_end().chars().all(base64) {
            return Err(invalid(format!(
                "line {} is neither base64 nor the frame of a certificate",
                index + 1
            )));
        }
    }
    let ders = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| invalid(format!("the chain is not PEM: {error}")))?;
    if ders.is_empty() {
        return Err(invalid("there is no certificate in it"));
    }
    if ders.len() > MAX_CERTIFICATES {
        return Err(invalid(format!(
            "a chain has at most {MAX_CERTIFICATES} certificates, this one has {}",
            ders.len()
        )));
    }
    Ok(ders)
}

fn check_key(
    chain: Vec<CertificateDer<'static>>,
    private_key: &SecretText,
) -> Result<(), ServiceError> {
    let text = private_key.reveal();
    if text.len() > KEY_MAX_BYTES {
        return Err(key_invalid(format!(
            "a private key has at most {KEY_MAX_BYTES} bytes"
        )));
    }
    if text.contains("ENCRYPTED") {
        return Err(key_invalid(
            "the private key is encrypted: nobody could give its pass phrase",
        ));
    }
    let begins = text.matches("-----BEGIN ").count();
    if begins != 1 {
        return Err(key_invalid(format!(
            "one PEM block is expected, {begins} are there"
        )));
    }
    let key = match PrivateKeyDer::from_pem_slice(text.as_bytes()) {
        Ok(key @ (PrivateKeyDer::Pkcs1(_) | PrivateKeyDer::Pkcs8(_))) => key,
        Ok(_) => {
            return Err(key_invalid(
                "the private key is neither PKCS#1 nor PKCS#8 (`openssl pkcs8 -topk8 -nocrypt` makes PKCS#8)",
            ));
        }
        // The cause could show what the text holds.
        Err(_) => return Err(key_invalid("the private key is not PEM")),
    };
    if sign::any_supported_type(&key).is_err() {
        return Err(key_invalid(
            "the private key cannot be used: RSA of 2048 to 4096 bits, ECDSA P-256 or P-384, or Ed25519",
        ));
    }
    match CertifiedKey::from_der(chain, key, &ring::default_provider()) {
        Ok(_) => Ok(()),
        Err(_) => Err(ServiceError::invalid(
            "certificate_key_mismatch",
            "private_key",
            "the private key is not that of the first certificate",
            "give the key that the certificate was requested with",
        )),
    }
}

fn names_of(leaf: &X509Certificate<'_>) -> Vec<String> {
    let alternative = leaf.subject_alternative_name().ok().flatten();
    let names = alternative
        .iter()
        .flat_map(|extension| &extension.value.general_names);
    names
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(shown(name)),
            GeneralName::IPAddress(bytes) => match **bytes {
                [a, b, c, d] => Some(std::net::Ipv4Addr::new(a, b, c, d).to_string()),
                ref bytes => <[u8; 16]>::try_from(bytes)
                    .ok()
                    .map(|bytes| std::net::Ipv6Addr::from(bytes).to_string()),
            },
            _ => None,
        })
        .take(MAX_NAMES)
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

    use super::*;
    use crate::clock;

    pub(in crate::service) struct Issued {
        pub(in crate::service) chain: String,
        pub(in crate::service) key: String,
        pub(super) leaf: String,
        pub(super) intermediate: String,
    }

    fn params(name: &str, days: i64) -> CertificateParams {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let now = clock::now().unix_ms() / 1000;
        let at = |seconds: i64| {
            let time = jiff::Timestamp::from_second(seconds).unwrap().to_string();
            let (year, month, day) = (
                time[0..4].parse().unwrap(),
                time[5..7].parse().unwrap(),
                time[8..10].parse().unwrap(),
            );
            rcgen::date_time_ymd(year, month, day)
        };
        params.not_before = at(now - 30 * 86_400);
        // Dates are midnights: one more, so that the days are whole.
        params.not_after = at(now + (days + 1) * 86_400);
        params
    }

    /// A chain of two, signed by a root that is not in it; the leaf ends in so many days.
    pub(in crate::service) fn issued(days: i64) -> Issued {
        let authority = |name: &str| {
            let mut params = params(name, 1000);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params
        };
        let root_key = KeyPair::generate().unwrap();
        let root = Issuer::new(authority("root.example"), root_key);
        let middle_key = KeyPair::generate().unwrap();
        let middle_params = authority("middle.example");
        let intermediate = middle_params.signed_by(&middle_key, &root).unwrap().pem();
        let middle = Issuer::new(middle_params, middle_key);
        let key = KeyPair::generate().unwrap();
        let leaf = params("shop.example", days)
            .signed_by(&key, &middle)
            .unwrap()
            .pem();
        let clean = |pem: String| pem.replace("\r\n", "\n");
        let (leaf, intermediate) = (clean(leaf), clean(intermediate));
        Issued {
            chain: format!("{leaf}{intermediate}"),
            key: clean(key.serialize_pem()),
            leaf,
            intermediate,
        }
    }

    #[test]
    fn a_good_chain_says_whose_it_is() {
        let made = issued(90);
        let key = SecretText::new(made.key.clone());
        let checked = check(&made.chain, &key, clock::now()).unwrap();
        assert_eq!(checked.names, ["shop.example"]);
        assert!(checked.subject.contains("shop.example"), "{checked:?}");
        assert!(checked.issuer.contains("middle.example"), "{checked:?}");
        let days = checked.not_after.since_ms(clock::now()) / 86_400_000;
        assert!((89..=91).contains(&days), "{days}");
        // The server's certificate alone will do.
        check(&made.leaf, &key, clock::now()).unwrap();
    }

    #[test]
    fn what_is_wrong_is_named() {
        let made = issued(90);
        let other = issued(90);
        let over = issued(-5);
        let blank = made.chain.replacen(
            "-----END CERTIFICATE-----\n",
            "-----END CERTIFICATE-----\n\n",
            1,
        );
        let swapped = format!("{}{}", made.intermediate, made.leaf);
        let foreign = format!("{}{}", made.leaf, other.intermediate);
        let bad_base64 = made.chain.replacen("MII", "M!!", 1);
        let with_key = format!("{}{}", made.chain, made.key);
        let sec1 = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIA==\n-----END EC PRIVATE KEY-----\n";
        let encrypted = made.key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
        let two = made.key.repeat(2);
        let cases: [(&str, &str, &str, &str); 13] = [
            ("", &made.key, "certificate_invalid", "no certificate"),
            ("hello", &made.key, "certificate_invalid", "no certificate"),
            (&blank, &made.key, "certificate_invalid", "is blank"),
            (&swapped, &made.key, "certificate_invalid", "out of order"),
            (
                &foreign,
                &made.key,
                "certificate_invalid",
                "was not made by",
            ),
            (
                &bad_base64,
                &made.key,
                "certificate_invalid",
                "neither base64",
            ),
            (
                &with_key,
                &made.key,
                "certificate_invalid",
                "certificates only",
            ),
            (&over.chain, &over.key, "certificate_expired", "ended at"),
            (
                &made.chain,
                &other.key,
                "certificate_key_mismatch",
                "not that of",
            ),
            (&made.chain, "", "certificate_key_invalid", "one PEM block"),
            (
                &made.chain,
                &two,
                "certificate_key_invalid",
                "one PEM block",
            ),
            (
                &made.chain,
                sec1,
                "certificate_key_invalid",
                "neither PKCS#1 nor PKCS#8",
            ),
            (
                &made.chain,
                &encrypted,
                "certificate_key_invalid",
                "encrypted",
            ),
        ];
        for (chain, key, code, says) in cases {
            let error = check(chain, &SecretText::new(key.to_owned()), clock::now()).unwrap_err();
            assert_eq!(error.code(), code, "{error}");
            assert!(error.to_string().contains(says), "{error}: {says}");
        }
    }
}
