//! Answers to a registry's `WWW-Authenticate`: HTTP Basic, and the token service of the Docker registry
//! (distribution spec, "Token Authentication").

use std::fmt;

use reqwest::StatusCode;
use reqwest::header::HeaderValue;
use serde::Deserialize;

use super::super::error::PullError;
use super::Session;

/// A token service's whole answer.
const MAX_TOKEN_BYTES: usize = 64 << 10;

/// What a user gives to be let in.
#[derive(Clone)]
pub enum Credentials {
    /// User name and password, or what a registry takes in their place.
    Basic {
        /// User.
        username: String,
        /// Password or access key.
        password: String,
    },
    /// A ready bearer token.
    Token(String),
}

/// Secrets stay out of logs.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Basic { username, .. } => f
                .debug_struct("Basic")
                .field("username", username)
                .finish_non_exhaustive(),
            Self::Token(_) => f.write_str("Token(..)"),
        }
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl Session {
    /// The `Authorization` for the first challenge that can be answered.
    pub(super) async fn answer(&self, challenges: &[String]) -> Result<HeaderValue, PullError> {
        for text in challenges {
            for challenge in http_auth::parse_challenges(text).unwrap_or_default() {
                let param = |name: &str| {
                    let mut found = challenge
                        .params
                        .iter()
                        .filter(|(key, _)| key.eq_ignore_ascii_case(name));
                    found.next().map(|(_, value)| value.to_unescaped())
                };
                if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    if let Some(Credentials::Token(token)) = &self.credentials {
                        return self.secret(format!("Bearer {token}"));
                    }
                    let realm =
                        param("realm").ok_or_else(|| self.unauthorized("challenge without a realm"))?;
                    let scope = param("scope");
                    let token = self
                        .token(&realm, param("service").as_deref(), scope.as_deref())
                        .await?;
                    return self.secret(format!("Bearer {token}"));
                }
                if challenge.scheme.eq_ignore_ascii_case("basic") {
                    let Some(Credentials::Basic { username, password }) = &self.credentials else {
                        return Err(self.unauthorized("user name and password are needed"));
                    };
                    let value = http_auth::basic::encode_credentials(username, password);
                    return self.secret(value);
                }
            }
        }
        Err(self.unauthorized("the registry offers neither Basic nor Bearer authentication"))
    }

    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<String, PullError> {
        let mut url =
            reqwest::Url::parse(realm).map_err(|_| self.unauthorized("token realm is not a URL"))?;
        if url.scheme() != "https" && !self.is_insecure {
            return Err(self.unauthorized("token realm of a secure registry is not https"));
        }
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = service {
                query.append_pair("service", service);
            }
            let wanted = format!("repository:{}:pull", self.reference.repository());
            query.append_pair("scope", scope.unwrap_or(&wanted));
        }
        let address = format!("{}{}", url.origin().ascii_serialization(), url.path());
        let broken = |source: reqwest::Error| PullError::Unreachable {
            address: address.clone(),
            source: source.without_url().into(),
        };
        let mut request = self.http.get(url);
        if let Some(Credentials::Basic { username, password }) = &self.credentials {
            request = request.basic_auth(username, Some(password));
        }
        let mut response = request.send().await.map_err(broken)?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                return Err(self.unauthorized("the token service refused the credentials"));
            }
            status => return Err(self.refused("a token", status)),
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(broken)? {
            if body.len() + chunk.len() > MAX_TOKEN_BYTES {
                return Err(self.unauthorized("the token service's answer is too long"));
            }
            body.extend_from_slice(&chunk);
        }
        let answer: TokenAnswer = serde_json::from_slice(&body)
            .map_err(|_| self.unauthorized("the token service's answer is not JSON"))?;
        let token = answer
            .token
            .or(answer.access_token)
            .filter(|token| !token.is_empty());
        token.ok_or_else(|| self.unauthorized("the token service's answer has no token"))
    }

    fn secret(&self, text: String) -> Result<HeaderValue, PullError> {
        let mut value = HeaderValue::try_from(text)
            .map_err(|_| self.unauthorized("credentials contain control characters"))?;
        value.set_sensitive(true);
        Ok(value)
    }
}
