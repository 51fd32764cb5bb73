//! A client of the OCI distribution API, pulling only. The registry is not trusted: every body is bounded, nothing it
//! sends is used before its digest was compared, and it cannot redirect from HTTPS to HTTP.
//!
//! Own code on `reqwest`, because the clients there are read manifests, configurations and error texts of any length
//! into memory, and leave resuming to the caller.

mod auth;
mod blob;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue, RANGE, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, redirect};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

pub use self::auth::Credentials;
use super::error::{PullError, StoreError};
use super::reference::ImageReference;
use super::store::ImageConfig;

const MAX_REDIRECTS: usize = 5;
const USER_AGENT: &str = concat!("eci-agent/", env!("CARGO_PKG_VERSION"));

/// Connections to registries, shared by all pulls.
#[derive(Clone, Debug)]
pub(super) struct RegistryClient {
    http: Client,
}

impl RegistryClient {
    /// Trusts the host's certificate authorities and those of `config`.
    pub(super) fn new(config: &ImageConfig) -> Result<Self, StoreError> {
        let mut roots = RootCertStore::empty();
        let native = rustls_native_certs::load_native_certs();
        for error in &native.errors {
            tracing::warn!(%error, "Failed to read a certificate authority of the host");
        }
        let (_, n_ignored) = roots.add_parsable_certificates(native.certs);
        if n_ignored > 0 {
            tracing::warn!(n_ignored, "Ignored unusable certificate authorities of the host");
        }
        for path in &config.extra_ca_files {
            add_authorities(&mut roots, path).map_err(|reason| StoreError::Certificates {
                path: path.clone(),
                reason,
            })?;
        }
        let unusable = |reason: String| StoreError::Certificates {
            path: Path::new("/etc/ssl/certs").to_owned(),
            reason,
        };
        let tls =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .map_err(|error| unusable(error.to_string()))?
                .with_root_certificates(roots)
                .with_no_client_auth();
        let redirects = redirect::Policy::custom(|attempt| {
            let is_downgrade = attempt.url().scheme() != "https"
                && attempt
                    .previous()
                    .first()
                    .is_some_and(|first| first.scheme() == "https");
            if is_downgrade {
                attempt.error("redirect from https to http")
            } else if attempt.previous().len() > MAX_REDIRECTS {
                attempt.error("too many redirects")
            } else {
                attempt.follow()
            }
        });
        let http = Client::builder()
            .user_agent(USER_AGENT)
            .tls_backend_preconfigured(tls)
            .redirect(redirects)
            .connect_timeout(Duration::from_secs(config.connect_timeout_seconds))
            .read_timeout(Duration::from_secs(config.read_timeout_seconds))
            .build()
            .map_err(|error| unusable(error.to_string()))?;
        Ok(Self { http })
    }

    /// Prepares requests for one image; connects to nothing yet.
    pub(super) fn session(
        &self,
        reference: &ImageReference,
        credentials: Option<Credentials>,
        insecure_registries: &[String],
    ) -> Session {
        let is_insecure = insecure_registries
            .iter()
            .any(|address| address == reference.registry());
        let scheme = if is_insecure { "http" } else { "https" };
        Session {
            http: self.http.clone(),
            base: format!(
                "{scheme}://{}/v2/{}",
                reference.registry_address(),
                reference.repository()
            ),
            reference: reference.clone(),
            is_insecure,
            credentials,
            authorization: tokio::sync::Mutex::new(None),
        }
    }
}

fn add_authorities(roots: &mut RootCertStore, path: &Path) -> Result<(), String> {
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())? {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Requests of one pull.
#[derive(Debug)]
pub(super) struct Session {
    http: Client,
    /// URL of the repository.
    base: String,
    pub(super) reference: ImageReference,
    is_insecure: bool,
    credentials: Option<Credentials>,
    /// What the registry accepted last.
    authorization: tokio::sync::Mutex<Option<HeaderValue>>,
}

/// A whole body with the type the registry gave it.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) media_type: Option<String>,
    pub(super) bytes: Vec<u8>,
}

impl Session {
    /// Gets a manifest or an index by tag or digest.
    pub(super) async fn manifest(
        &self,
        version: &str,
        accept: &str,
        limit: u64,
    ) -> Result<Document, PullError> {
        let what = format!("manifest {version}");
        let path = format!("manifests/{version}");
        self.document(&path, &what, Some(accept), limit)
            .await?
            .ok_or_else(|| PullError::NotFound {
                reference: self.reference.to_string(),
            })
    }

    /// Gets a small blob whole.
    pub(super) async fn small_blob(&self, digest: &str, limit: u64) -> Result<Document, PullError> {
        let what = format!("blob {digest}");
        let path = format!("blobs/{digest}");
        self.document(&path, &what, None, limit)
            .await?
            .ok_or_else(|| self.refused(&what, StatusCode::NOT_FOUND))
    }

    async fn document(
        &self,
        path: &str,
        what: &str,
        accept: Option<&str>,
        limit: u64,
    ) -> Result<Option<Document>, PullError> {
        let mut response = self.get(path, accept, None).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(None),
            status => return Err(self.refused(what, status)),
        }
        let media_type = response.headers().get(reqwest::header::CONTENT_TYPE);
        let media_type = media_type
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let mut bytes = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| self.unreachable(path, error))?
        {
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(PullError::TooLarge {
                    what: what.to_owned(),
                    limit,
                    unit: "bytes",
                });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Some(Document { media_type, bytes }))
    }

    /// Sends a GET, answering a challenge of the registry once. `from` asks for the rest of a blob.
    async fn get(&self, path: &str, accept: Option<&str>, from: Option<u64>) -> Result<Response, PullError> {
        let mut is_retry = false;
        loop {
            let mut request = self.http.get(format!("{}/{path}", self.base));
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if let Some(from) = from.filter(|from| *from > 0) {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let sent = self.authorization.lock().await.clone();
            if let Some(authorization) = &sent {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            let response = request
                .send()
                .await
                .map_err(|error| self.unreachable(path, error))?;
            match response.status() {
                StatusCode::UNAUTHORIZED if !is_retry => {
                    is_retry = true;
                    let challenges = response.headers().get_all(WWW_AUTHENTICATE);
                    let challenges: Vec<String> = challenges
                        .iter()
                        .filter_map(|value| value.to_str().ok())
                        .map(str::to_owned)
                        .collect();
                    self.authorize(sent.as_ref(), &challenges).await?;
                }
                StatusCode::UNAUTHORIZED => {
                    return Err(self.unauthorized("the registry does not accept what it asked for"));
                }
                StatusCode::FORBIDDEN => return Err(self.unauthorized("forbidden")),
                _ => return Ok(response),
            }
        }
    }

    /// Renews the authorization, unless another request did so since `sent` was sent.
    async fn authorize(&self, sent: Option<&HeaderValue>, challenges: &[String]) -> Result<(), PullError> {
        let mut authorization = self.authorization.lock().await;
        if authorization.as_ref() == sent {
            *authorization = Some(self.answer(challenges).await?);
        }
        Ok(())
    }

    fn unauthorized(&self, reason: &str) -> PullError {
        PullError::Unauthorized {
            reference: self.reference.to_string(),
            registry: self.reference.registry().to_owned(),
            reason: reason.to_owned(),
        }
    }

    fn refused(&self, what: &str, status: StatusCode) -> PullError {
        PullError::Refused {
            address: self.reference.registry_address().to_owned(),
            what: what.to_owned(),
            status: status.as_u16(),
        }
    }

    /// The URL after redirects may carry a token, so it is left out.
    fn unreachable(&self, path: &str, source: reqwest::Error) -> PullError {
        PullError::Unreachable {
            address: format!("{}/{path}", self.base),
            source: source.without_url().into(),
        }
    }
}
