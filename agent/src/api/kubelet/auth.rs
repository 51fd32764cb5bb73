//! Who may use port 10250: holders of a bearer token, and clients whose certificate TLS verified.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode, header};
use ring::{
    digest::SHA256_OUTPUT_LEN,
    hmac,
    rand::{SecureRandom, SystemRandom},
};

use crate::{api::listener::ClientCertificate, config::Secret};

/// The tokens accepted, as keyed hashes: comparing takes the same time whatever is compared.
pub(in crate::api) struct Tokens {
    key: hmac::Key,
    tags: Vec<hmac::Tag>,
}

impl Tokens {
    pub(in crate::api) fn new(tokens: &[Secret]) -> Self {
        let mut random = [0; SHA256_OUTPUT_LEN];
        // The key hides lengths and beginnings; without randomness it only does so less well.
        let _ = SystemRandom::new().fill(&mut random);
        let key = hmac::Key::new(hmac::HMAC_SHA256, &random);
        let tags = tokens
            .iter()
            .filter(|token| !token.0.is_empty())
            .map(|token| hmac::sign(&key, token.0.as_bytes()))
            .collect();
        Self { key, tags }
    }

    fn accepts(&self, token: &str) -> bool {
        // All are compared, none ends it early.
        self.tags.iter().fold(false, |accepted, tag| {
            accepted | hmac::verify(&self.key, token.as_bytes(), tag.as_ref()).is_ok()
        })
    }
}

/// Lets a request with a credential pass.
pub(super) async fn require(State(tokens): State<Arc<Tokens>>, request: Request, next: Next) -> Response {
    let certificate = request.extensions().get::<ClientCertificate>();
    if certificate.is_some_and(|certificate| certificate.verified) {
        return next.run(request).await;
    }
    match bearer(request.headers()) {
        Some(token) if tokens.accepts(token) => next.run(request).await,
        _ => (
            StatusCode::UNAUTHORIZED,
            [(header::WWW_AUTHENTICATE, "Bearer")],
            "Unauthorized",
        )
            .into_response(),
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_tokens_are_accepted() {
        let tokens = Tokens::new(&[Secret("one".into()), Secret(String::new()), Secret("two".into())]);
        assert!(tokens.accepts("one") && tokens.accepts("two"));
        assert!(!tokens.accepts("") && !tokens.accepts("on") && !tokens.accepts("onetwo"));
        assert!(!Tokens::new(&[]).accepts(""));
    }
}
