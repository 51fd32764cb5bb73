//! Request signatures of the ECI OpenAPI: RPC version 1 (HMAC-SHA1 over the parameters) and ACS3-HMAC-SHA256 (over
//! method, query, headers and body). Pure: keys and time are passed in.

use std::time::{Duration, SystemTime};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ring::{digest, hmac};

/// A request's time may be this far from ours.
pub(super) const FRESHNESS: Duration = Duration::from_secs(15 * 60);

const MAX_NONCE_BYTES: usize = 128;
const ACS3: &str = "ACS3-HMAC-SHA256";

/// Headers that an ACS3 signature must cover.
const REQUIRED_HEADERS: [&str; 6] = [
    "host",
    "x-acs-action",
    "x-acs-content-sha256",
    "x-acs-date",
    "x-acs-signature-nonce",
    "x-acs-version",
];

/// RFC 3986 unreserved characters stay.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// What is signed.
#[derive(Debug)]
pub(super) struct Signed<'a> {
    pub(super) method: &'a str,
    pub(super) path: &'a str,
    /// Decoded parameters of the query.
    pub(super) query: &'a [(String, String)],
    /// Decoded parameters of a form body.
    pub(super) form: &'a [(String, String)],
    /// Names in lower case.
    pub(super) headers: &'a [(String, String)],
    pub(super) body: &'a [u8],
}

/// A request whose signature is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    pub(super) access_key_id: String,
    pub(super) nonce: String,
    /// When the request was signed.
    pub(super) at: SystemTime,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum SigningError {
    #[error("The request is not signed; sign it with an AccessKey")]
    NotSigned,
    #[error("{name} is required to verify the signature")]
    Missing { name: &'static str },
    #[error("{0}")]
    Incomplete(String),
    #[error("Signature scheme {0:?} is not supported; valid: HMAC-SHA1 and {ACS3}")]
    Scheme(String),
    #[error("Specified access key is not found")]
    UnknownKey,
    #[error("Specified time stamp {0:?} is not well formatted; valid: YYYY-MM-DDThh:mm:ssZ")]
    TimeFormat(String),
    #[error("Specified time stamp {0:?} is expired or lies ahead; the clocks differ by more than 15 minutes")]
    Expired(String),
    #[error("x-acs-content-sha256 is not the hash of the body")]
    BodyHash,
    /// Old SDKs compare what follows the colon with their own string.
    #[error(
        "Specified signature is not matched with our calculation. server string to sign is:{string_to_sign}"
    )]
    Mismatch { string_to_sign: String },
}

/// Checks the signature of a request.
///
/// # Errors
/// Why it is refused.
pub(super) fn verify<'k>(
    signed: &Signed<'_>,
    secret_of: impl Fn(&str) -> Option<&'k str>,
    now: SystemTime,
) -> Result<Caller, SigningError> {
    let authorization = header(signed.headers, "authorization");
    match authorization {
        Some(value) if value.starts_with("ACS3-") => verify_acs3(signed, value, secret_of, now),
        _ if parameter(signed, "Signature").is_some() => verify_rpc(signed, secret_of, now),
        _ => Err(SigningError::NotSigned),
    }
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let (_, value) = headers.iter().find(|(header, _)| header == name)?;
    Some(value)
}

fn parameter<'a>(signed: &Signed<'a>, name: &str) -> Option<&'a str> {
    let mut all = signed.query.iter().chain(signed.form);
    let (_, value) = all.find(|(parameter, _)| parameter == name)?;
    Some(value)
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, ENCODED).to_string()
}

fn check_time(text: &str, now: SystemTime) -> Result<SystemTime, SigningError> {
    let timestamp: jiff::Timestamp = text
        .parse()
        .map_err(|_| SigningError::TimeFormat(text.to_owned()))?;
    let at = SystemTime::from(timestamp);
    let apart = now
        .duration_since(at)
        .or_else(|_| at.duration_since(now))
        .unwrap_or(Duration::MAX);
    if apart > FRESHNESS {
        return Err(SigningError::Expired(text.to_owned()));
    }
    Ok(at)
}

fn check_nonce(nonce: Option<&str>, name: &'static str) -> Result<String, SigningError> {
    match nonce {
        None | Some("") => Err(SigningError::Missing { name }),
        Some(nonce) if nonce.len() > MAX_NONCE_BYTES => Err(SigningError::Incomplete(format!(
            "{name} has more than {MAX_NONCE_BYTES} characters"
        ))),
        Some(nonce) => Ok(nonce.to_owned()),
    }
}

/// RPC version 1.
fn verify_rpc<'k>(
    signed: &Signed<'_>,
    secret_of: impl Fn(&str) -> Option<&'k str>,
    now: SystemTime,
) -> Result<Caller, SigningError> {
    let required = |name: &'static str| parameter(signed, name).ok_or(SigningError::Missing { name });
    for (name, valid) in [("SignatureMethod", "HMAC-SHA1"), ("SignatureVersion", "1.0")] {
        let value = required(name)?;
        if value != valid {
            return Err(SigningError::Scheme(value.to_owned()));
        }
    }
    if let Some(kind) = parameter(signed, "SignatureType")
        && !kind.is_empty()
    {
        return Err(SigningError::Scheme(kind.to_owned()));
    }
    // What is done must be signed; the header of this name is not.
    required("Action")?;
    let access_key_id = required("AccessKeyId")?;
    let secret = secret_of(access_key_id).ok_or(SigningError::UnknownKey)?;
    let at = check_time(required("Timestamp")?, now)?;
    let nonce = check_nonce(parameter(signed, "SignatureNonce"), "SignatureNonce")?;
    let signature = required("Signature")?;
    let string_to_sign = rpc_string_to_sign(signed);
    let key = hmac::Key::new(
        hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
        format!("{secret}&").as_bytes(),
    );
    let given = base64_decode(signature).unwrap_or_default();
    if hmac::verify(&key, string_to_sign.as_bytes(), &given).is_err() {
        return Err(SigningError::Mismatch { string_to_sign });
    }
    Ok(Caller {
        access_key_id: access_key_id.to_owned(),
        nonce,
        at,
    })
}

fn base64_decode(text: &str) -> Option<Vec<u8>> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(text).ok()
}

pub(super) fn rpc_string_to_sign(signed: &Signed<'_>) -> String {
    let mut parameters: Vec<_> = signed
        .query
        .iter()
        .chain(signed.form)
        .filter(|(name, _)| name != "Signature")
        .collect();
    parameters.sort();
    let canonical: Vec<_> = parameters
        .iter()
        .map(|(name, value)| format!("{}={}", encode(name), encode(value)))
        .collect();
    format!("{}&%2F&{}", signed.method, encode(&canonical.join("&")))
}

/// The parts of an ACS3 Authorization header.
struct Authorization<'a> {
    credential: &'a str,
    signed_headers: Vec<&'a str>,
    signature: &'a str,
}

fn parse_authorization(value: &str) -> Result<Authorization<'_>, SigningError> {
    let incomplete = || {
        SigningError::Incomplete(format!(
            "The Authorization header is malformed; valid: {ACS3} Credential=ID,SignedHeaders=A;B,Signature=HEX"
        ))
    };
    let (scheme, rest) = value.split_once(' ').ok_or_else(incomplete)?;
    if scheme != ACS3 {
        return Err(SigningError::Scheme(scheme.to_owned()));
    }
    let field = |name: &str| {
        rest.split(',')
            .filter_map(|part| part.trim().split_once('='))
            .find(|(field, _)| *field == name)
            .map(|(_, value)| value)
            .ok_or_else(incomplete)
    };
    Ok(Authorization {
        credential: field("Credential")?,
        signed_headers: field("SignedHeaders")?.split(';').collect(),
        signature: field("Signature")?,
    })
}

/// ACS3-HMAC-SHA256.
fn verify_acs3<'k>(
    signed: &Signed<'_>,
    authorization: &str,
    secret_of: impl Fn(&str) -> Option<&'k str>,
    now: SystemTime,
) -> Result<Caller, SigningError> {
    let authorization = parse_authorization(authorization)?;
    for name in REQUIRED_HEADERS {
        if !authorization.signed_headers.contains(&name) {
            return Err(SigningError::Incomplete(format!("Header {name} must be signed")));
        }
        if header(signed.headers, name).is_none() {
            return Err(SigningError::Missing { name });
        }
    }
    let secret = secret_of(authorization.credential).ok_or(SigningError::UnknownKey)?;
    let required = |name: &'static str| header(signed.headers, name).ok_or(SigningError::Missing { name });
    let at = check_time(required("x-acs-date")?, now)?;
    let nonce = check_nonce(
        header(signed.headers, "x-acs-signature-nonce"),
        "x-acs-signature-nonce",
    )?;
    if required("x-acs-content-sha256")? != hex(digest::digest(&digest::SHA256, signed.body).as_ref()) {
        return Err(SigningError::BodyHash);
    }
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let given = unhex(authorization.signature).unwrap_or_default();
    // SDKs don't encode parameter names, the specification does; they differ only for map keys.
    let strings = [false, true]
        .map(|encode_names| acs3_string_to_sign(signed, &authorization.signed_headers, encode_names));
    if strings
        .iter()
        .all(|string| hmac::verify(&key, string.as_bytes(), &given).is_err())
    {
        let [string_to_sign, _] = strings;
        return Err(SigningError::Mismatch { string_to_sign });
    }
    Ok(Caller {
        access_key_id: authorization.credential.to_owned(),
        nonce,
        at,
    })
}

fn acs3_string_to_sign(signed: &Signed<'_>, signed_headers: &[&str], encode_names: bool) -> String {
    let canonical = acs3_canonical_request(signed, signed_headers, encode_names);
    let hash = digest::digest(&digest::SHA256, canonical.as_bytes());
    format!("{ACS3}\n{}", hex(hash.as_ref()))
}

fn acs3_canonical_request(signed: &Signed<'_>, signed_headers: &[&str], encode_names: bool) -> String {
    let mut parameters: Vec<_> = signed.query.iter().collect();
    parameters.sort();
    let query: Vec<_> = parameters
        .iter()
        .map(|(name, value)| {
            let name = if encode_names { encode(name) } else { name.clone() };
            format!("{name}={}", encode(value))
        })
        .collect();
    let mut headers = String::new();
    for name in signed_headers {
        let mut values: Vec<_> = signed
            .headers
            .iter()
            .filter(|(header, _)| header == name)
            .map(|(_, value)| value.trim())
            .collect();
        values.sort_unstable();
        headers.push_str(&format!("{name}:{}\n", values.join(",")));
    }
    format!(
        "{}\n{}\n{}\n{headers}\n{}\n{}",
        signed.method,
        signed.path,
        query.join("&"),
        signed_headers.join(";"),
        header(signed.headers, "x-acs-content-sha256").unwrap_or_default(),
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect()
}

#[cfg(test)]
#[path = "signing_tests.rs"]
mod tests;
